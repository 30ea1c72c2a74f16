"""Worker process of the study: many runs in turn, because importing Megatron takes longer than an extension."""

import gc
import json
import multiprocessing
import os
import re
import shutil
import statistics
import sys
from pathlib import Path

import methods
import recall
import torch
from corpus import Corpus

DEPTHS = [i / 8 for i in range(9)]


def start(gpu: int) -> None:
    """Import the trainer ahead of this process's first run, which uses GPU `gpu` if there is one."""
    _be_single_rank(gpu)
    import pretrain_cream  # noqa: F401


def do(
    run: methods.Run, gpu: int, folder: Path, corpus: Corpus, lengths: list[int], samples: int, extra: list[str]
) -> dict:
    """Train, measure recall and perplexity, delete an extension's checkpoint, and return the result.

    Args:
        gpu: index of the GPU to use, if the machine has one.
        lengths: tokens of the recall contexts; `samples` contexts for each length and depth.
        extra: more flags for pretrain_cream.py.

    Raises:
        RuntimeError: training ended before its last step.
    """
    saved, exported = folder / run.name, folder / f"{run.name}.hf"
    if run.method != "base":
        for left in (saved, folder / f"{run.name}.first"):  # by a run that was stopped
            shutil.rmtree(left, ignore_errors=True)
    seconds = 0.0
    for stage, flags in enumerate(methods.stages(run, folder, corpus), 1):
        log = folder / "logs" / (f"{run.name}.txt" if stage == 1 else f"{run.name}.{stage}.txt")
        _train(flags + extra, gpu, log)
        seconds += _seconds(log)
    shutil.rmtree(folder / f"{run.name}.first", ignore_errors=True)

    from megatron_cream.checkpoint.convert import export_hf
    from megatron_cream.checkpoint.megatron_folder import MegatronCheckpoint

    shutil.rmtree(exported, ignore_errors=True)
    export_hf(MegatronCheckpoint(saved), exported)
    model, haystack, symbols = recall.load(exported), corpus.held_out(), corpus.symbols()
    answers = {n: recall.recall_by_depth(model, haystack, symbols, n, DEPTHS, samples) for n in lengths}
    result = {
        "run": run.name,
        "method": run.method,
        "factor": run.factor,
        "seed": run.seed,
        "alone": run.alone,
        "scaling": run.scaling,
        "rate": run.rate,
        "seconds": round(seconds, 2),
        "recall": {str(n): {str(d): share for d, (share, _) in found.items()} for n, found in answers.items()},
        "loss": {str(n): statistics.fmean(loss for _, loss in found.values()) for n, found in answers.items()},
        "perplexity": {} if run.method == "base" else _perplexity(saved),
    }
    del model
    shutil.rmtree(exported)
    if run.method != "base":
        shutil.rmtree(saved)
    _forget()
    return result


def _be_single_rank(gpu: int) -> None:
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": str(gpu),
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "0",  # any free port: there is no other rank
    }
    # This process was spawned, so data loader workers would be spawned too, but Megatron's cannot be pickled.
    multiprocessing.set_start_method("fork", force=True)


def _train(flags: list[str], gpu: int, log: Path) -> None:
    """Run pretrain_cream.py with these flags, on GPU `gpu` if there is one; redirect all output to `log`."""
    _be_single_rank(gpu)
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from megatron.training.training import destroy_global_state

    import pretrain_cream

    try:
        pretrain_cream.train(flags)
    finally:
        sys.stdout.flush()
        destroy_global_state()
        _forget()


def _seconds(log: Path) -> float:
    """Return the GPU time of a training: the median time of a step, times the number of steps.

    Raises:
        RuntimeError: training ended before its last step.
    """
    steps = re.findall(r"iteration +(\d+)/ +(\d+) .*?elapsed time per iteration \(ms\): ([\d.]+)", log.read_text())
    if not steps or steps[-1][0] != steps[-1][1]:
        raise RuntimeError(f"{log.stem} did not come to its last step: see {log}")
    return statistics.median(float(ms) for *_, ms in steps) * int(steps[-1][1]) / 1000


def _forget() -> None:
    """Free the memory of finished work."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _perplexity(saved: Path) -> dict[str, float]:
    """Return held-out perplexity by tokens of context, as the run measured it at its end."""
    lines = (saved / "perplexity_by_length.jsonl").read_text().splitlines()
    return json.loads(lines[-1])["perplexity"]
