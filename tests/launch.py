"""Run pretrain_cream.py with real ranks, as torchrun starts them, and read its logged losses."""

import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests import forked_commands
from tests.processes import ROOT

VOCABULARY = 100  # padded to 128: the padding must not show in the loss

# A tiny Llama with grouped-query attention.
TINY = [
    *"--num-layers 2 --hidden-size 32 --ffn-hidden-size 88 --num-attention-heads 4".split(),
    *"--group-query-attention --num-query-groups 2 --seq-length 96 --target-length 384".split(),
    *"--rope-scaling-type linear --micro-batch-size 2 --global-batch-size 8 --lr 1e-2 --weight-decay 0.1".split(),
    f"--tokenizer-type NullTokenizer --vocab-size {VOCABULARY} --seed 7 --num-workers 0".split(),
    *"--eval-iters 1 --eval-interval 1000 --log-interval 1".split(),
]
TINY = [flag for item in TINY for flag in ([item] if isinstance(item, str) else item)]


def write_documents(prefix: Path, documents: int = 60, shortest: int = 60, longest: int = 900) -> Path:
    """Write documents that are quick to learn: few tokens are frequent, and each document repeats a phrase."""
    rng = np.random.default_rng(0)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for length in rng.integers(shortest, longest, size=documents):
        phrase = np.minimum(rng.zipf(1.4, size=rng.integers(5, 30)), VOCABULARY - 2)
        tokens = np.resize(phrase, length)
        noise = rng.random(length) < 0.1
        tokens[noise] = rng.integers(1, VOCABULARY - 1, size=noise.sum())
        builder.add_document(torch.from_numpy(tokens), [length])
    builder.finalize(f"{prefix}.idx")
    return prefix


def torchrun(
    ranks: int, *flags, cwd: Path | None = None, timeout: int = 900, script: Path = ROOT / "pretrain_cream.py"
) -> subprocess.CompletedProcess:
    """Run `torchrun --standalone --nproc_per_node=ranks script flags` and capture the output.

    Without a GPU the ranks are forked from a process that has imported everything (tests/forked_commands.py).
    """
    command = [*forked_commands.torchrun(), f"--nproc_per_node={ranks}", script, *flags]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as error:
        ended = subprocess.run(
            [str(word) for word in command],
            stdout=out,
            stderr=error,
            timeout=timeout,
            env=forked_commands.environment(),
            cwd=cwd or ROOT,
        )
        texts = [(file.seek(0), file.read())[1] for file in (out, error)]
    return subprocess.CompletedProcess(command, ended.returncode, *texts)


def _died_of(words: str) -> str:
    """Return the text around a rank's "Fatal Python error", which precedes its stack traces."""
    before, said, after = words.partition("Fatal Python error")
    return before[-1500:] + said + after[:1500] if said else ""


def train(
    ranks: int, folder: Path, *flags, base=TINY, fp32: bool = True, script: Path = ROOT / "pretrain_cream.py"
) -> dict[int, float]:
    """Train, check that the run succeeds, and return step -> loss from TensorBoard (float32, exact).

    Args:
        base: flags placed before `flags`.
    """
    precision = ["--fp32"] if fp32 else []
    result = torchrun(ranks, *base, *precision, "--tensorboard-dir", folder, *flags, script=script)
    assert result.returncode == 0, f"{result.stdout[-3000:]}\n{_died_of(result.stderr)}\n{result.stderr[-6000:]}"
    return read_losses(folder)


def read_losses(folder: Path) -> dict[int, float]:
    """Return step -> loss from a TensorBoard folder."""
    events = EventAccumulator(str(folder)).Reload()
    return {event.step: event.value for event in events.Scalars("lm loss")}


def relative_error(losses: dict[int, float], reference: dict[int, float]) -> float:
    """Return the largest relative error of losses by step; both must have the same steps."""
    assert losses.keys() == reference.keys()
    return max(abs(losses[step] - reference[step]) / reference[step] for step in reference)
