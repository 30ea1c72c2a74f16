"""Turn text into the .bin/.idx files that --data-path reads.

    python tools/preprocess_data.py --input data/part-*.jsonl.gz --output-prefix data/pile \\
        --tokenizer-type Llama2Tokenizer --tokenizer-model llama/tokenizer.model --workers 16

    python tools/preprocess_data.py --input books/ --output-prefix data/books --glob '*.md' \\
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model Llama-3.1-8B/

    python tools/preprocess_data.py --input ShareGPT_V3.json --output-prefix data/sharegpt --chat-format llama2 \\
        --tokenizer-type Llama2Tokenizer --tokenizer-model llama/tokenizer.model

Inputs are JSON lines (.jsonl, .ndjson, .json), .csv and text files (.txt), all also .gz, .bz2, .xz,
.zst or .lz4; a .json that is one array; .parquet; .zip archives and folders of these, or folders
that `datasets.save_to_disk` wrote; hf://datasets/OWNER/NAME[@REVISION][:CONFIG[:SPLIT]], streamed
from the Hugging Face Hub. One document per line, row, element or text file; each becomes BOS, text,
EOD.

With --chat-format the documents are chats, ShareGPT's {"conversations": [{"from", "value"}]} or
OpenAI's {"messages": [{"role", "content"}]}. OUTPUT_PREFIX_loss_mask.bin/.idx is written too, and
training reads it there: only the assistant's answers count in the loss. Answers before the first
question and questions after the last answer are removed, as in FastChat. A chat is used up to its
first turn that cannot be used, such as an empty one; cuts and dropped chats are counted.

After an interruption the same command resumes. Bad input ends with one line and exit code 2, and
nothing is written.
"""

import argparse
import contextlib
import io
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_cream.common import entry
from megatron_cream.common.cli import OneLineParser, path, path_or_name, to_flag
from megatron_cream.common.errors import UsageError, one_line
from megatron_cream.common.files import check_can_create, convert_disk_errors
from megatron_cream.data.chat import CHAT_FORMATS
from megatron_cream.data.input_files import find_files, parse_input
from megatron_cream.data.partial import check_output
from megatron_cream.data.preprocess import PreprocessReport, preprocess
from megatron_cream.data.tokenizers import TOKENIZER_TYPES, check_tokenizer_files, load_tokenizer, tokenizer_id

LONG_DOCUMENTS = (4096, 8192, 16384, 32768)
"""The report counts documents of at least these lengths, in tokens."""


def main() -> None:
    parser = build_parser()
    args = parser.parse_args()
    try:
        check(args)
        from megatron_cream.patches import platform

        # It reports a missing GPU, and text is often prepared on a machine without one.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        platform.setup()  # before anything of Megatron is imported
        with blame("--tokenizer-model"):
            tokenizer = load_tokenizer(args.tokenizer_type, args.tokenizer_model, args.parse_special)
        with convert_disk_errors(
            args.output_prefix, "--output-prefix", "after freeing space, the same command resumes"
        ):
            report = preprocess(
                args.input,
                args.output_prefix,
                tokenizer,
                json_key=args.json_key,
                glob=args.glob,
                chat_format=args.chat_format,
                chat_template=read_template(args.chat_template),
                append_eod=args.append_eod is not False,
                prepend_bos=args.prepend_bos,
                min_document_tokens=args.min_document_tokens,
                workers=args.workers,
                overwrite=args.overwrite,
                strict=args.strict,
                tokenizer_id=tokenizer_id(args.tokenizer_type, args.tokenizer_model),
            )
    except (UsageError, ValueError, OSError) as error:
        parser.error(one_line(error, 1000))
    except MemoryError:
        parser.error("out of memory; use fewer --workers, or split the largest documents")
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted; the same command resumes", file=sys.stderr)
        sys.exit(entry.INTERRUPTED)
    print_report(report, args.output_prefix)
    from megatron_cream.commands.next_step import training_on  # imports torch, which bad input need not wait for

    print(f"Next: {training_on(args.output_prefix, args.tokenizer_model, int(report.lengths.max()))}")


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "--input",
        type=parse_input,
        nargs="+",
        required=True,
        help="files and folders of text, or datasets on the Hugging Face Hub: "
        "hf://datasets/OWNER/NAME[@REVISION][:CONFIG[:SPLIT]]",
    )
    add(
        "--glob",
        help="which files of an input folder or .zip are read (default: all known suffixes but .json, .csv and .zip)",
    )
    add(
        "--json-key",
        "--json-keys",
        help="key or column of the text (default: text), or of a chat's turns (default: conversations or messages)",
    )
    add(
        "--chat-format",
        choices=CHAT_FORMATS,
        help="documents are chats, formatted as for Llama-2-chat or by the tokenizer's chat template",
    )
    add(
        "--chat-template",
        type=path_or_name,
        metavar="FILE_OR_NAME",
        help="with --chat-format tokenizer: a template's .jinja file, or the name of one of the tokenizer's templates "
        "(default: the tokenizer's)",
    )
    add("--output-prefix", type=path, required=True, help="writes OUTPUT_PREFIX.bin and OUTPUT_PREFIX.idx")
    add("--overwrite", action="store_true", help="replace existing output")
    add("--tokenizer-type", choices=TOKENIZER_TYPES, required=True, help="as for the trainer")
    add("--tokenizer-model", type=path, required=True, help="a sentencepiece .model, or a Hugging Face folder")
    add("--append-eod", action=argparse.BooleanOptionalAction, help="end documents with EOD (default: yes)")
    add(
        "--prepend-bos",
        action=argparse.BooleanOptionalAction,
        help="start documents with BOS (default: yes for sentencepiece; as the tokenizer does for Hugging Face)",
    )
    add(
        "--parse-special",
        action="store_true",
        help="special tokens that a text spells, such as <s>, become control tokens of a Hugging Face tokenizer "
        "(default: they stay text)",
    )
    add(
        "--min-document-tokens",
        type=int,
        default=1,
        help="drop documents with fewer tokens of text (default: %(default)s)",
    )
    add("--workers", type=int, default=1, help="number of tokenizing processes (default: %(default)s)")
    add("--strict", action="store_true", help="stop at the first unreadable document")
    return parser


def check(args: argparse.Namespace) -> None:
    """Check all that can be checked before Megatron is imported, which takes seconds.

    Raises:
        ValueError: one line with the flag, its value and the problem.
    """
    for flag in ("workers", "min_document_tokens"):
        if getattr(args, flag) < 1:
            raise ValueError(f"{to_flag(flag)} {getattr(args, flag)}: must be a whole number above 0")
    for flag in ("append_eod", "prepend_bos"):
        if args.chat_format and getattr(args, flag) is not None:
            raise ValueError(f"{to_flag(flag)}: cannot be used with --chat-format, which sets these tokens")
    if args.chat_template is not None and args.chat_format != "tokenizer":
        raise ValueError("--chat-template: only with --chat-format tokenizer")
    if args.parse_special and args.tokenizer_type != "HuggingFaceTokenizer":
        raise ValueError(f"--parse-special: {args.tokenizer_type} never parses special tokens; leave it out")
    with blame("--tokenizer-model"):
        check_tokenizer_files(args.tokenizer_type, args.tokenizer_model)
    with blame("--input"):
        find_files(args.input, args.glob, args.output_prefix)
    prefix = args.output_prefix
    if prefix.is_dir() or prefix.suffix in (".bin", ".idx"):
        raise ValueError(f"--output-prefix {prefix}: must be the path without .bin or .idx, such as data/pile")
    try:
        check_can_create(prefix.absolute().parent, "--output-prefix", prefix)
        check_output(prefix, args.overwrite)
    except FileExistsError as error:
        raise ValueError(f"--output-prefix {prefix}: {error}; give another prefix, or --overwrite") from error
    except (ValueError, OSError) as error:
        raise ValueError(f"--output-prefix {prefix}: {getattr(error, 'strerror', None) or error}") from error


def read_template(file_or_name: str | None) -> str | None:
    """Return a chat template's text if a file is given; names stay.

    Raises:
        ValueError: the file is not UTF-8.
    """
    if file_or_name is None or not Path(file_or_name).is_file():
        return file_or_name
    try:
        return Path(file_or_name).read_text("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"--chat-template {file_or_name}: not a UTF-8 text file") from None


@contextlib.contextmanager
def blame(flag: str) -> Iterator[None]:
    """Put the flag in front of the message of a ValueError raised in the block."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{flag} {error}") from error


def print_report(report: PreprocessReport, prefix: Path) -> None:
    """Print the table of documents and tokens, and the first dropped document or file left out of each kind."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # file names may be other than UTF-8
    table = Table(title=escape(f"{prefix}.bin, {prefix}.idx"), show_header=False)
    table.add_row("documents", f"{report.documents:,}")
    table.add_row("tokens", f"{report.tokens:,}")
    table.add_row("longest document", f"{report.lengths.max():,} tokens")
    if report.loss_tokens is not None:
        table.add_row("tokens of the assistant", f"{report.loss_tokens:,}")
    for length in LONG_DOCUMENTS:
        table.add_row(f"documents of {length:,} tokens or more", f"{report.documents_of_at_least(length):,}")
    for reason, count in report.dropped.items():
        table.add_row(escape(f"dropped: {reason}"), f"{count:,}")
    for what, count in report.cuts.items():
        table.add_row(escape(f"cut: {what}"), f"{count:,}")
    for kind, count in report.left_out.counts.items():
        table.add_row(escape(f"left out: {kind}"), f"{count:,}")
    table.add_row("seconds", f"{report.seconds:.1f}")
    Console().print(table)
    for reason, where in report.first_dropped.items():  # below the table, which would wrap a path
        print(f"first dropped: {reason}: {where}")
    for what, where in report.first_cut.items():
        print(f"first cut: {what}: {where}")
    for kind, where in report.left_out.first.items():
        print(f"first left out: {kind}: {where}")
