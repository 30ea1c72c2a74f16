"""Convert between Hugging Face folders and Megatron checkpoints.

Runs in one process, without GPU and torchrun.

python tools/convert_hf.py import --hf-path meta-llama/Llama-2-7b-hf --output ckpt/
python tools/convert_hf.py export --checkpoint ckpt/ --hf-path out/
python tools/convert_hf.py verify --checkpoint ckpt/ --hf-path out/
"""

import argparse
import re
import sys
from pathlib import Path

from megatron_cream.checkpoint import convert, hf_folder, hub, output
from megatron_cream.checkpoint.adapter_checkpoint import AdapterCheckpoint, open_checkpoint
from megatron_cream.checkpoint.megatron_folder import MegatronCheckpoint
from megatron_cream.checkpoint.peft_folder import export_adapter
from megatron_cream.commands.next_step import training_command
from megatron_cream.common import entry
from megatron_cream.common.advice import evaluation_command, export_command
from megatron_cream.common.cli import OneLineParser, path, path_or_name, positive, program_name
from megatron_cream.common.errors import UsageError, is_out_of_memory, one_line
from megatron_cream.common.files import convert_disk_errors, read_text
from megatron_cream.common.progress_bar import TransferBar

TEXT = (
    "The window of a language model is the number of tokens it was trained to read at once. "
    "Positions beyond it are new to the model, unless they are made to look like old ones."
)
MAX_DIVISOR = 1 << 26  # the largest vocabulary, in tokens


def main() -> int:
    args = parser().parse_args()
    try:
        return args.run(args)
    except UsageError as error:
        print(f"{program_name()}: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # such as a full disk or a deleted file
        print(f"{program_name()}: error: {error}; nothing was changed", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        words = f"out of memory: {one_line(error) or 'the host has too little'}; nothing was changed"
        print(f"{program_name()}: error: {words}. Free memory of this host, or use one with more", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{program_name()}: interrupted; nothing was changed", file=sys.stderr)
        return entry.INTERRUPTED


def run_import(args) -> int:
    """Convert a Hugging Face folder to a Megatron checkpoint."""
    parallel = (args.tensor_model_parallel_size, args.pipeline_model_parallel_size)
    if args.format == "torch_dist" and parallel != (1, 1):
        raise UsageError(
            f"--tensor-model-parallel-size {parallel[0]} --pipeline-model-parallel-size {parallel[1]}: only with "
            "--format torch; a torch_dist checkpoint opens at any layout"
        )
    source = hf_folder.HfFolder(hub.locate(args.hf_path, flag="--hf-path"))
    convert.check_no_overlap(source.path, args.output, flag="--output")
    output.check_target(args.output.absolute(), flag="--output", overwrite=args.overwrite)
    output.check_unchanged(source.path)
    with TransferBar("imported") as progress, convert_disk_errors(args.output, "--output", "nothing was changed"):
        convert.import_hf(
            source,
            args.output,
            dtype=convert.DTYPES.get(args.dtype),
            vocabulary_divisor=args.make_vocab_size_divisible_by,
            checkpoint_format=args.format,
            tensor_parallel=parallel[0],
            pipeline_parallel=parallel[1],
            transformer_engine=args.transformer_impl == "transformer_engine",
            overwrite=args.overwrite,
            progress=progress,
        )
    print(f"Next: {training_command('--pretrained-checkpoint', args.output, 'DATA', source.shape, parallel)}")
    return 0


def run_export(args) -> int:
    """Convert a Megatron checkpoint to a Hugging Face folder."""
    if args.adapter and args.dtype:
        raise UsageError(f"--dtype {args.dtype}: an adapter keeps the dtype of its training; leave it out")
    source = open_checkpoint(args.checkpoint, args.ckpt_step, base=args.base)
    convert.check_no_overlap(source.path, Path(args.hf_path), flag="--hf-path")
    if isinstance(source, AdapterCheckpoint):  # without its base model the checkpoint is lost
        convert.check_no_overlap(Path(source.base["folder"]), Path(args.hf_path), flag="--hf-path")
    output.check_target(Path(args.hf_path).absolute(), flag="--hf-path", overwrite=args.overwrite)
    output.check_unchanged(source.folder)
    if args.adapter:
        return _export_adapter(source, args)
    with TransferBar("exported") as progress, convert_disk_errors(args.hf_path, "--hf-path", "nothing was changed"):
        convert.export_hf(
            source,
            Path(args.hf_path),
            dtype=convert.DTYPES.get(args.dtype),
            max_shard_bytes=args.max_shard_size,
            overwrite=args.overwrite,
            with_card=True,
            progress=progress,
        )
    positions = source.shape.max_position_embeddings
    print(f"{args.hf_path}: {source.folder.name}, for {positions} positions")
    print(f"Next: {evaluation_command(args.hf_path, positions)}")
    return 0


def _export_adapter(source: MegatronCheckpoint, args) -> int:
    if not isinstance(source, AdapterCheckpoint):
        raise UsageError(f"--adapter: --checkpoint {args.checkpoint} has all weights, and no adapters")
    with convert_disk_errors(args.hf_path, "--hf-path", "nothing was changed"):
        export_adapter(source, Path(args.hf_path), overwrite=args.overwrite)
    positions = source.shape.max_position_embeddings
    print(f"{args.hf_path}: adapter of {source.folder.name} for PEFT, for {positions} positions; see its README.md")
    step = [] if args.ckpt_step is None else ["--ckpt-step", str(args.ckpt_step)]
    if args.base:  # an evaluation would look for the base model where it was
        print(f"Next: {export_command(args.checkpoint, *step, '--base', args.base)}")
    else:
        print(f"Next: {evaluation_command(args.checkpoint, positions, *step)}")
    return 0


def run_verify(args) -> int:
    """Compare a checkpoint with a Hugging Face folder; return 1 if they differ."""
    text = read_text(args.text_file, "a text") if args.text_file else args.text
    if not text.strip():
        raise UsageError("--text, --text-file: must contain text")
    checkpoint = open_checkpoint(args.checkpoint, args.ckpt_step, base=args.base)
    folder = hf_folder.HfFolder(hub.locate(args.hf_path, flag="--hf-path"))
    from megatron_cream.patches import platform

    platform.setup()  # only the comparison runs Megatron's model
    from megatron_cream.checkpoint import verify

    same = verify.verify(checkpoint, folder, text=text)
    if same:
        print(f"Next: {evaluation_command(args.hf_path, checkpoint.shape.max_position_embeddings)}")
    return 0 if same else 1


def size(text: str) -> int:
    """Return the bytes of a size such as 5GB; a type for `add_argument`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a size such as 5GB or 800MB")
    found = float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " ")
    if not 1 <= found <= 1e18:
        raise argparse.ArgumentTypeError(f"{text!r}: must be from 1 byte to 1000000TB")
    return int(found)


def divisor(text: str) -> int:
    """Return a --make-vocab-size-divisible-by; a type for `add_argument`."""
    if positive(text) > MAX_DIVISOR:
        raise argparse.ArgumentTypeError(f"{text!r}: must be {MAX_DIVISOR} or less")
    return int(text)


def parser() -> argparse.ArgumentParser:
    main_parser = OneLineParser(
        prog=program_name(),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = main_parser.add_subparsers(required=True, metavar="import|export|verify")
    dtypes = dict(choices=list(convert.DTYPES), help="cast the weights; default: no cast")
    overwrite = dict(action="store_true", help="replace the output of an earlier conversion")
    step = dict(type=int, metavar="ITERATION", help="default: the newest")
    moved = "the model under the adapters of a LoRA checkpoint, if it is not where it was in training"

    command = commands.add_parser("import", help="Hugging Face folder -> Megatron checkpoint", allow_abbrev=False)
    command.set_defaults(run=run_import)
    command.add_argument(
        "--hf-path", type=path_or_name, required=True, help="a folder, or a model's name on the Hugging Face Hub"
    )
    command.add_argument("--output", type=path, required=True, help="the checkpoint folder to write; must not exist")
    command.add_argument("--dtype", **dtypes)
    command.add_argument(
        "--format",
        choices=["torch_dist", "torch"],
        default="torch_dist",
        help="torch_dist opens at any layout; torch writes mp_rank_XX files for another Megatron",
    )
    command.add_argument(
        "--make-vocab-size-divisible-by",
        type=divisor,
        default=128,
        metavar="N",
        help="pad the vocabulary with zeros to a multiple of N (default 128)",
    )
    command.add_argument(
        "--tensor-model-parallel-size", type=positive, default=1, metavar="TP", help="for --format torch"
    )
    command.add_argument(
        "--pipeline-model-parallel-size", type=positive, default=1, metavar="PP", help="for --format torch"
    )
    command.add_argument(
        "--transformer-impl",
        choices=["transformer_engine", "local"],
        default="transformer_engine",
        help="the implementation that names the parameters in --format torch",
    )
    command.add_argument("--overwrite", **overwrite)

    command = commands.add_parser("export", help="Megatron checkpoint -> Hugging Face folder", allow_abbrev=False)
    command.set_defaults(run=run_export)
    command.add_argument("--checkpoint", type=path, required=True, help="a folder that --save or --output named")
    command.add_argument("--hf-path", type=path_or_name, required=True, help="the folder to write; must not exist")
    command.add_argument("--ckpt-step", **step)
    command.add_argument("--base", type=path_or_name, help=moved)
    command.add_argument("--adapter", action="store_true", help="write the adapter of a LoRA checkpoint, for PEFT")
    command.add_argument("--dtype", **dtypes)
    command.add_argument("--max-shard-size", type=size, default="5GB", help="largest safetensors file (default 5GB)")
    command.add_argument("--overwrite", **overwrite)

    command = commands.add_parser("verify", help="compare the two, by tensors and by logits", allow_abbrev=False)
    command.set_defaults(run=run_verify)
    command.add_argument("--checkpoint", type=path, required=True)
    command.add_argument("--hf-path", type=path_or_name, required=True)
    command.add_argument("--ckpt-step", **step)
    command.add_argument("--base", type=path_or_name, help=moved)
    command.add_argument("--text", default=TEXT, help="the text on which logits are compared")
    command.add_argument("--text-file", type=path, help="a file with that text")
    return main_parser
