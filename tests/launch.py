"""Run pretrain_cream.py with real ranks, as torchrun starts them, and read its logged losses."""

import functools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.processes import ending_with_test

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
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

    Without a GPU the ranks are forked from a process that has imported everything (tests/preloaded.py).
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("NVTE_")}  # a model in this process sets them
    environment = {**inherited, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    flags, cwd = [str(flag) for flag in flags], str(cwd or ROOT)
    if torch.cuda.is_available():
        command = [*TORCHRUN, f"--nproc_per_node={ranks}", str(script), *flags]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, cwd=cwd)
    with tempfile.TemporaryDirectory() as folder:
        out, error = Path(folder, "out"), Path(folder, "error")
        job = dict(
            ranks=ranks,
            script=str(script),
            flags=flags,
            cwd=cwd,
            environment=environment,
            out=str(out),
            error=str(error),
        )
        code = _run_preloaded(job, timeout)
        return subprocess.CompletedProcess(flags, code, out.read_text(), error.read_text())


@functools.cache
def _preloaded() -> subprocess.Popen:
    """Start tests.preloaded once; it ends with this process."""
    command = ending_with_test([sys.executable, "-m", "tests.preloaded"])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, cwd=ROOT, env=environment
    )


def _run_preloaded(job: dict, timeout: int) -> int:
    server = _preloaded()
    server.stdin.write(json.dumps(job).encode() + b"\n")
    process = int(server.stdout.readline())
    late = not select.select([server.stdout], [], [], timeout)[0]
    if late:
        os.killpg(process, signal.SIGKILL)
    code = int(server.stdout.readline())
    if late:
        raise subprocess.TimeoutExpired(job["flags"], timeout)
    return code


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
    events = EventAccumulator(str(folder)).Reload()
    return {event.step: event.value for event in events.Scalars("lm loss")}
