"""Turn text into the .bin/.idx files that --data-path reads.

    python tools/preprocess_data.py --input data/part-*.jsonl.gz --output-prefix data/pile \\
        --tokenizer-type Llama2Tokenizer --tokenizer-model llama/tokenizer.model --workers 16

    python tools/preprocess_data.py --input books/ --output-prefix data/books --glob '*.md' \\
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model Llama-3.1-8B/

    python tools/preprocess_data.py --input ShareGPT_V3.json --output-prefix data/sharegpt --chat-format llama2 \\
        --tokenizer-type Llama2Tokenizer --tokenizer-model llama/tokenizer.model

Inputs are JSON lines (.jsonl, .ndjson, .json), text files (.txt), both also .gz or .zst; a .json
that is one array; .parquet; folders of these, or folders that `datasets.save_to_disk` wrote. One
document a line, row, element or text file; each becomes BOS, text, EOD.

With --chat-format the documents are chats, ShareGPT's {"conversations": [{"from", "value"}]} or
OpenAI's {"messages": [{"role", "content"}]}. OUTPUT_PREFIX_loss_mask.bin/.idx is written too, and
training finds it there: the loss counts on the assistant's answers alone. Answers before the first
question and questions after the last answer are left out, as FastChat does; chats whose turns do
not alternate, are empty, or have a role not known, are dropped and counted.

A run that was killed goes on where it was when it is started again with the same flags. Bad input
ends with one line and exit code 2, and writes nothing.
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

from megatron_cream.common.cli import OneLineParser, path, to_flag
from megatron_cream.common.errors import UsageError, one_line
from megatron_cream.common.files import check_can_create, convert_disk_errors
from megatron_cream.data.chat import CHAT_FORMATS
from megatron_cream.data.documents import find_files
from megatron_cream.data.partial import check_output
from megatron_cream.data.preprocess import PreprocessReport, preprocess
from megatron_cream.data.tokenizers import TOKENIZER_TYPES, check_tokenizer_files, load_tokenizer, tokenizer_id

LONG_DOCUMENTS = (4096, 8192, 16384, 32768)
"""Lengths in tokens that the report counts documents from."""


def main() -> None:
    parser = build_parser()
    args = parser.parse_args()
    try:
        check(args)
        from megatron_cream.patches import platform

        # Says that there is no GPU, where text is often prepared on a machine without.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        platform.setup()  # before anything of Megatron is imported
        with blame("--tokenizer-model"):
            tokenizer = load_tokenizer(args.tokenizer_type, args.tokenizer_model)
        with convert_disk_errors(args.output_prefix, "--output-prefix", "with room the same command goes on from here"):
            report = preprocess(
                args.input,
                args.output_prefix,
                tokenizer,
                json_key=args.json_key,
                glob=args.glob,
                chat_format=args.chat_format,
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
        print(f"{parser.prog}: stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    print_report(report, args.output_prefix)


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--input", type=path, nargs="+", required=True, help="files and folders of text")
    add("--glob", help="which files of an input folder are read (default: those of a known suffix, but for .json)")
    add(
        "--json-key",
        "--json-keys",
        help="key or column of the text (default: text), or of a chat's turns (default: conversations or messages)",
    )
    add(
        "--chat-format",
        choices=CHAT_FORMATS,
        help="documents are chats, written as Llama-2-chat's, or by the Hugging Face tokenizer's chat template",
    )
    add("--output-prefix", type=path, required=True, help="writes OUTPUT_PREFIX.bin and OUTPUT_PREFIX.idx")
    add("--overwrite", action="store_true", help="replace output that is there")
    add("--tokenizer-type", choices=TOKENIZER_TYPES, required=True, help="as for the trainer")
    add("--tokenizer-model", type=path, required=True, help="a sentencepiece .model, or a Hugging Face folder")
    add("--append-eod", action=argparse.BooleanOptionalAction, help="end documents with EOD (default: yes)")
    add(
        "--prepend-bos",
        action=argparse.BooleanOptionalAction,
        help="start documents with BOS (default: yes for sentencepiece; as the tokenizer does for Hugging Face)",
    )
    add("--min-document-tokens", type=int, default=1, help="drop documents with less text (default: %(default)s)")
    add("--workers", type=int, default=1, help="processes that tokenize (default: %(default)s)")
    add("--strict", action="store_true", help="stop at the first document that cannot be read")
    return parser


def check(args: argparse.Namespace) -> None:
    """Everything that can be told before Megatron is imported, which takes seconds.

    Raises:
        ValueError: one line with the flag, its value and what would be right.
    """
    for flag in ("workers", "min_document_tokens"):
        if getattr(args, flag) < 1:
            raise ValueError(f"{to_flag(flag)} {getattr(args, flag)}: expected a whole number from 1")
    for flag in ("append_eod", "prepend_bos"):
        if args.chat_format and getattr(args, flag) is not None:
            raise ValueError(f"{to_flag(flag)}: not with --chat-format, whose tokens these are")
    with blame("--tokenizer-model"):
        check_tokenizer_files(args.tokenizer_type, args.tokenizer_model)
    with blame("--input"):
        find_files(args.input, args.glob, args.output_prefix)
    prefix = args.output_prefix
    if prefix.is_dir() or prefix.suffix in (".bin", ".idx"):
        raise ValueError(f"--output-prefix {prefix}: expected a path up to .bin and .idx, such as data/pile")
    try:
        check_can_create(prefix.absolute().parent, f"--output-prefix {prefix}:")
        check_output(prefix, args.overwrite)
    except FileExistsError as error:
        raise ValueError(f"--output-prefix {prefix}: {error}; give another prefix, or --overwrite") from error
    except (ValueError, OSError) as error:
        raise ValueError(f"--output-prefix {prefix}: {getattr(error, 'strerror', None) or error}") from error


@contextlib.contextmanager
def blame(flag: str) -> Iterator[None]:
    """Put the flag in front of the message of a ValueError that is raised inside."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{flag} {error}") from error


def print_report(report: PreprocessReport, prefix: Path) -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # names of files need not be UTF-8
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
    table.add_row("seconds", f"{report.seconds:.1f}")
    Console().print(table)
    for reason, where in report.first_dropped.items():  # below, where a path is not wrapped
        print(f"first dropped: {reason}: {where}")
