"""Runs that may choose CUDA graphs by themselves, and that resume from each other's checkpoints."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import yaml

from tests.hf_models import save_model
from tests.launch import read_losses, torchrun, write_documents

FLAGS = (
    "--seq-length 96 --target-length 384 --micro-batch-size 2 --global-batch-size 4 --lr 1e-3 --rope-scaling-type linear "
    "--tokenizer-type NullTokenizer --num-workers 0 --eval-iters 0 --train-iters 4 --save-interval 2 --split 90,10,0"
).split()
NONE = ("--cuda-graph-impl", "none")


class Ran(NamedTuple):
    """A run: its losses by step, --cuda-graph-impl and --te-rng-tracker of its record, and what it printed."""

    losses: dict[int, float]
    graphs: tuple[str, bool]
    output: str


def run_and_resume(folder: Path, ranks: int, *more: str) -> dict[str, Ran]:
    """Run four steps that choose graphs, and four without; then resume both, from step 2, with and without.

    more: further flags of every run.
    """
    save_model(folder / "hf", "llama-gqa-odd-vocabulary", hidden_size=256, intermediate_size=688, head_dim=64)
    flags = [*FLAGS, "--data-path", write_documents(folder / "documents"), "--load-hf", folder / "hf", *more]

    def run(name: str, *extra) -> Ran:
        save = folder / name
        ended = torchrun(ranks, *flags, "--save", save, "--tensorboard-dir", folder / f"tb {name}", *extra, timeout=240)
        assert ended.returncode == 0, f"{name}\n{ended.stdout[-3000:]}\n{ended.stderr[-6000:]}"
        (record,) = (save / "runs").glob("*.yaml")
        settings = yaml.safe_load(record.read_text())["settings"]
        graphs = settings["cuda_graph_impl"], settings["te_rng_tracker"]
        return Ran(read_losses(folder / f"tb {name}"), graphs, ended.stdout)

    def resume(name: str) -> tuple:
        return "--load", folder / name, "--ckpt-step", 2

    stages = (
        {"by itself": (), "none": NONE},
        {
            "by itself, from by itself": resume("by itself"),
            "by itself, from none": resume("none"),
            "none, from by itself": (*resume("by itself"), *NONE),
        },
    )
    found = {}
    with ThreadPoolExecutor(3) as pool:  # most of a run's time is its imports
        for stage in stages:
            started = {name: pool.submit(run, name, *extra) for name, extra in stage.items()}
            found |= {name: each.result() for name, each in started.items()}
    return found
