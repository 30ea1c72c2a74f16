"""Prepare the study's data on the CPU: prepare.py --hf MODEL --train FILE --held FILE --output DATA

MODEL is the Hugging Face folder of a Llama. The files are JSON lines of {"text": ..}; in --held a line may have a
"kind", and perplexity is reported for each kind. Writes tokens/train.bin and .idx, hf (a link to MODEL),
evaluation.npz and settings.json, and checks the flags of every cell. Keeps existing tokens, hf and evaluation.npz.
With --short FILE and --short-held FILE, short documents of the same form, also writes tokens/short.bin and .idx, and
short.npz for their perplexity, and the grid has cells with shares of short text.
"""

import argparse
import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]

from megatron_cream.patches import platform

platform.setup()  # before any import of Megatron

import cells
import numpy as np
import retrieval
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_cream.checkpoint.families import read_config
from megatron_cream.common.errors import UsageError
from megatron_cream.config import describe, parse
from megatron_cream.evaluation.models.tokenizer import open_tokenizer


def main() -> int:
    flags = _parser().parse_args()
    if bool(flags.short) != bool(flags.short_held):
        print("prepare.py: error: --short and --short-held: give both, or neither", file=sys.stderr)
        return 2
    data = flags.output.resolve()
    (data / "tokens").mkdir(parents=True, exist_ok=True)
    settings = cells.Settings(
        window=flags.window,
        factors=tuple(flags.factors),
        steps=flags.steps,
        batch=flags.batch,
        micro_batch=flags.micro_batch,
        model_theta=read_config(flags.hf)[1].rope_theta,
        theta=flags.theta,
        rates=tuple(flags.rates),
        seeds=tuple(flags.seeds),
        lengths=tuple(flags.window * 2**i for i in range(max(flags.factors).bit_length())),
        extra=tuple(flags.extra),
        shares=tuple(flags.shares) if flags.short else (),
        short_rate=flags.short_rate,
    )
    settings.write(data)
    if not (data / "hf").exists():
        (data / "hf").symlink_to(flags.hf.resolve())
    cells.write_models(settings, data)
    for name, file in (("train", flags.train), ("held", flags.held)):
        if not (data / "tokens" / f"{name}.idx").exists():
            _tokenise(file, data / "tokens" / name, data / "hf", flags.workers)
    if flags.short:
        for name, file in (("short", flags.short), ("short_held", flags.short_held)):
            if not (data / "tokens" / f"{name}.idx").exists():
                _tokenise(file, data / "tokens" / name, data / "hf", flags.workers)
        _write_short(flags.short_held, data)
    if not (data / "evaluation.npz").exists():
        _write_evaluation(flags, settings, data)
    try:
        _check(settings, data)
    except UsageError as error:
        print(f"prepare.py: error: {error}", file=sys.stderr)
        return 2
    return 0


def _tokenise(file: Path, prefix: Path, hf: Path, workers: int) -> None:
    command = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "--input", str(file)]
    command += [
        "--output-prefix",
        str(prefix),
        "--tokenizer-type",
        "HuggingFaceTokenizer",
        "--tokenizer-model",
        str(hf),
    ]
    subprocess.run([*command, "--workers", str(workers)], check=True)


def _write_evaluation(flags, settings: cells.Settings, data: Path) -> None:
    """Write evaluation.npz: prompts made from held-out text, and the texts for perplexity."""
    longest = max(settings.lengths)
    held = IndexedDataset(str(data / "tokens" / "held"))
    kinds = [json.loads(line).get("kind", "text") for line in open(flags.held, encoding="utf-8") if line.strip()]
    documents = [(kind, held[i]) for i, kind in enumerate(kinds) if len(held[i]) > longest]
    if not documents:
        raise SystemExit(f"prepare.py: error: --held {flags.held}: no document has more than {longest} tokens")
    texts = {}
    for kind in sorted(set(kinds)):
        of_kind = [document for each, document in documents if each == kind]
        chosen = np.unique(np.linspace(0, len(of_kind) - 1, min(flags.texts, len(of_kind))).astype(int))
        if len(chosen):
            texts[kind] = np.stack([of_kind[i][:longest] for i in chosen]).astype(np.uint16)
    encode = open_tokenizer(data / "hf", flag="--hf").encode
    writer = retrieval.PromptWriter(encode, [document.astype(np.int64) for _, document in documents])
    prompts = {}
    for length in settings.lengths:
        for task, count in zip(retrieval.TASKS, flags.prompts):
            questions = 1 if task == "needle" else flags.questions
            prompts[task, length] = writer.prompts(task, length, count, questions)
    retrieval.save(data / "evaluation.npz", prompts, texts)
    print("texts:", {kind: array.shape for kind, array in texts.items()}, flush=True)


def _write_short(held: Path, data: Path) -> None:
    tokens = IndexedDataset(str(data / "tokens" / "short_held"))
    kinds = [json.loads(line).get("kind", "text") for line in open(held, encoding="utf-8") if line.strip()]
    documents: dict[str, list[np.ndarray]] = {}
    for i, kind in enumerate(kinds):
        documents.setdefault(kind, []).append(tokens[i])
    retrieval.save_short(data / "short.npz", documents)


def _check(settings: cells.Settings, data: Path) -> None:
    """Check the flags of every kind of cell, and print its positions and RoPE scaling as --print-config does.

    Raises UsageError at the first cell that pretrain_cream.py would reject.
    """
    alike = {
        (cell.scaling, cell.sampler, cell.factor, cell.share): cell for cell in cells.order(settings) if cell.trains
    }
    for cell in alike.values():
        # Only the first training: a later one starts from what that has saved.
        given = cells.stages(cell.with_rate(settings.rates[0]), settings, data, data / "none")[0]
        with contextlib.redirect_stdout(io.StringIO()):
            args = parse.read(given)
        lines = describe.describe(args).splitlines()
        print(f"{cell.name:40}", *(line[2:] for line in lines if line.startswith(("# positions", "# rope"))))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, default = parser.add_argument, cells.Settings()
    add("--hf", type=Path, required=True, help="the model's folder; its window must be --window")
    add("--train", type=Path, required=True, help="JSON lines to train on, documents longer than --window")
    add("--held", type=Path, required=True, help="JSON lines to evaluate on, documents longer than the longest target")
    add("--short", type=Path, help="JSON lines of short documents to train on, of at most --window tokens")
    add("--short-held", type=Path, help="JSON lines of short documents to evaluate on")
    add("--shares", type=float, nargs="+", default=[0.0, 0.3, 0.6], help="of short text in the cells `short`")
    add("--short-rate", type=float, default=default.short_rate, help="learning rate of these cells")
    add("--output", type=Path, required=True)
    add("--window", type=int, default=default.window)
    add("--factors", type=int, nargs="+", default=list(default.factors), help="of the window, longest first")
    add("--steps", type=int, default=default.steps)
    add("--batch", type=int, default=default.batch, help="samples of a step")
    add("--micro-batch", type=int, default=default.micro_batch)
    add("--theta", type=float, default=default.theta, help="the rope theta of the scaling `theta`")
    add("--rates", type=float, nargs="+", default=list(default.rates), help="learning rates to choose from")
    add("--seeds", type=int, nargs="+", default=list(default.seeds))
    add("--prompts", type=int, nargs=3, default=[20, 20, 12], metavar=("NEEDLE", "MULTIKEY", "LINES"))
    add("--questions", type=int, default=16, help="of a prompt of multikey and lines")
    add("--texts", type=int, default=12, help="held-out texts of each kind")
    add("--workers", type=int, default=2)
    add("extra", nargs="*", metavar="-- FLAG", help="flags for every run of pretrain_cream.py")
    return parser


if __name__ == "__main__":
    sys.exit(main())
