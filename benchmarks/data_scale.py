"""Measure a blend of 100 million documents on real ranks: time and memory to index, samples/s to read.

    python benchmarks/data_scale.py FOLDER [--documents 100000000] [--prefixes 4] [--ranks 2]

Makes PREFIX.idx for each prefix (20 bytes per document), and PREFIX.bin as a sparse file, which takes no disk space and
reads as zeros. Then three phases run in separate processes under torchrun (gloo): the checks that `pretrain_cream.py`
makes before a run; and twice, without and with a cache, building the data set as `pretrain_cream.py` does and reading
samples, in the process and with workers. Memory comes from /proc/self/smaps_rollup: a rank's own (anonymous) memory, and
its share of mapped files. The files are removed at the end, except with --keep.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # not this folder: its profile.py hides the standard library's

import numpy as np

WINDOW = 4096
_CHUNK = 1 << 22
_CHECKS = ("check", "check_whole", "check_splits", "check_held_out", "check_token_ids")


def main() -> None:
    if sys.argv[1:2] == ["child"]:
        return child(sys.argv[2], json.loads(sys.argv[3]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--documents", type=int, default=100_000_000, help="in all")
    parser.add_argument("--prefixes", type=int, default=4)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--samples", type=int, default=1_000_000, help="of training, which the blend has an entry for")
    parser.add_argument("--reads", type=int, default=4000, help="samples read at random places")
    parser.add_argument("--workers", type=int, default=2, help="of the data loader, each rank")
    parser.add_argument("--median", type=int, default=2500, help="tokens of a document")
    parser.add_argument("--keep", action="store_true")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    prefixes = [args.folder / f"part{i}" for i in range(args.prefixes)]
    settings = dict(prefixes=list(map(str, prefixes)), cache=str(args.folder / "cache"))
    settings |= dict(samples=args.samples, reads=args.reads, workers=args.workers)
    try:
        started = time.monotonic()
        for i, prefix in enumerate(prefixes):
            long = make(prefix, args.documents // args.prefixes, i, args.median)
            size = prefix.with_suffix(".idx").stat().st_size
            hole = prefix.with_suffix(".bin").stat().st_size
            print(f"{prefix.name}: {args.documents // args.prefixes:,} documents, {long:,} of {WINDOW} tokens or more")
            print(f"  .idx {size / 1e9:.2f} GB, .bin {hole / 1e9:,.0f} GB", flush=True)
        print(f"made in {time.monotonic() - started:.0f} s", flush=True)
        shutil.rmtree(settings["cache"], ignore_errors=True)
        for what in ("checks", "cold", "warm"):
            print(f"\n{what}", flush=True)
            command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={args.ranks}", "--standalone"]
            command += [__file__, "child", what, json.dumps(settings)]
            subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
        cached = [path for path in Path(settings["cache"]).rglob("*") if path.is_file()]
        print(f"\ncache: {len(cached)} files, {sum(path.stat().st_size for path in cached) / 1e9:.2f} GB")
    finally:
        if not args.keep:
            shutil.rmtree(settings["cache"], ignore_errors=True)
            for path in (path for prefix in prefixes for path in prefix.parent.glob(f"{prefix.name}.*")):
                path.unlink()


def make(prefix: Path, documents: int, seed: int, median: int) -> int:
    """Write PREFIX.idx, and a sparse PREFIX.bin; return the number of documents with WINDOW tokens or more."""
    from megatron_cream.data import indexed

    def lengths(begin: int) -> np.ndarray:
        rng = np.random.default_rng((seed, begin))
        drawn = rng.lognormal(np.log(median), 1.0, size=min(_CHUNK, documents - begin))
        return np.clip(drawn, 16, 1 << 20).astype("<i4")

    at = long = 0
    begins = range(0, documents, _CHUNK)
    with prefix.with_suffix(".idx").open("wb") as file:
        file.write(indexed._HEADER.pack(indexed._MAGIC, 1, 8, documents, documents + 1))  # uint16
        for begin in begins:
            part = lengths(begin)
            part.tofile(file)
            long += int((part >= WINDOW).sum())
        for begin in begins:
            ends = at + 2 * np.cumsum(lengths(begin), dtype="<i8")
            np.concatenate(([at], ends[:-1])).astype("<i8").tofile(file)
            at = int(ends[-1])
        for begin in range(0, documents + 1, _CHUNK):
            np.arange(begin, min(begin + _CHUNK, documents + 1), dtype="<i8").tofile(file)
    prefix.with_suffix(".bin").touch()
    os.truncate(prefix.with_suffix(".bin"), at)
    return long


# ---------------------------------------------------------------- code of the ranks


def child(what: str, settings: dict) -> None:
    from megatron_cream.patches import platform

    platform.setup()
    import torch

    rank = int(os.environ["RANK"])
    if what == "checks":
        return say(rank, checks(settings))
    torch.distributed.init_process_group("gloo")
    lines = build_and_read(settings)
    torch.distributed.barrier()
    for turn in range(torch.distributed.get_world_size()):
        if turn == rank:
            say(rank, lines)
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def say(rank: int, lines: list[str]) -> None:
    print("".join(f"  rank {rank}: {line}\n" for line in lines), end="", flush=True)


def checks(settings: dict) -> list[str]:
    """Run the checks of `parse.parse`, timing each."""
    from megatron_cream.config import parse
    from megatron_cream.config.checks import data as data_checks

    seconds = {}

    def timed(name, original):
        def function(*args):
            started = time.monotonic()
            result = original(*args)
            seconds[name] = time.monotonic() - started
            return result

        return function

    for name in filter(lambda name: hasattr(data_checks, name), _CHECKS):
        setattr(data_checks, name, timed(name, getattr(data_checks, name)))
    flags = "--num-layers 1 --hidden-size 32 --num-attention-heads 2 --micro-batch-size 1 --train-iters 1000 --lr 1e-3"
    flags += f" --seq-length {WINDOW} --tokenizer-type NullTokenizer --vocab-size 100 --global-batch-size 32"
    flags += f" --eval-lengths {WINDOW} --split 969,30,1"
    with Memory() as memory:
        parse.parse([*flags.split(), "--data-path", *settings["prefixes"]])
    shown = ", ".join(f"{name} {value:.2f}" for name, value in seconds.items())
    return [f"{sum(seconds.values()):.2f} s ({shown}); {memory}"]


def build_and_read(settings: dict) -> list[str]:
    import torch
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder

    from megatron_cream.data.dataset import LongDocumentDataset, LongDocumentDatasetConfig

    prefixes = settings["prefixes"]
    config = LongDocumentDatasetConfig(
        random_seed=1,
        sequence_length=WINDOW,
        blend=(prefixes, [1.0] * len(prefixes)),
        split="969,30,1",
        path_to_cache=settings["cache"],
        sampler=dict(name="cream", window=WINDOW, target=8 * WINDOW),
    )
    sizes = [settings["samples"], 3200, 320]
    with Memory() as memory:
        started = time.monotonic()
        train = BlendedMegatronDatasetBuilder(LongDocumentDataset, sizes, lambda: True, config).build()[0]
        seconds = time.monotonic() - started
    lines = [f"built in {seconds:.2f} s, waits for the other ranks among them; {memory}"]
    places = np.random.default_rng(int(os.environ["RANK"])).integers(len(train), size=settings["reads"])
    with Memory() as memory:
        started = time.monotonic()
        for place in places:
            train[int(place)]
        seconds = time.monotonic() - started
    lines.append(f"{len(places) / seconds:,.0f} samples/s in the process; {memory}")
    loader = torch.utils.data.DataLoader(train, 4, sampler=places.tolist(), num_workers=settings["workers"])
    with Memory(children=True) as memory:
        started = time.monotonic()
        for _ in loader:
            pass
        seconds = time.monotonic() - started
    lines.append(
        f"{len(places) / seconds:,.0f} samples/s of {settings['workers']} workers, their start counted; {memory}"
    )
    return lines


class Memory:
    """CPU seconds and peak memory growth of this process during a block; `children`: peak of its largest child."""

    def __init__(self, children: bool = False):
        self._children, self._ended = children, threading.Event()
        self.alone = self.mapped = 0

    def __enter__(self):
        self._before = 0 if self._children else _rollup("self")["Anonymous"]
        self._cpu = sum(os.times()[:4])
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.cpu = sum(os.times()[:4]) - self._cpu
        self._ended.set()
        self._thread.join()
        self.kept = 0 if self._children else _rollup("self")["Anonymous"] - self._before

    def _watch(self) -> None:
        while not self._ended.wait(0.05):
            self._look()
        self._look()

    def _look(self) -> None:
        for process in _children() if self._children else ["self"]:
            with contextlib.suppress(OSError, KeyError):
                found = _rollup(process)
                # Pages that a fork shares with its parent do not count.
                alone = found["Private_Dirty"] if self._children else found["Anonymous"] - self._before
                self.alone, self.mapped = max(self.alone, alone), max(self.mapped, found["Pss_File"])

    def __str__(self) -> str:
        whose = "a worker's own" if self._children else "own memory"
        kept = "" if self._children else f", {self.kept / 2**20:+,.0f} kept"
        return f"CPU {self.cpu:.2f} s; {whose} {self.alone / 2**20:+,.0f} MiB at most{kept}, files' {self.mapped / 2**20:,.0f} MiB"


def _rollup(process: str | int) -> dict[str, int]:
    """Return the entries of smaps_rollup, in bytes."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
    return {name.rstrip(":"): int(value) * 1024 for name, value, _ in map(str.split, lines)}


def _children() -> list[int]:
    return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


if __name__ == "__main__":
    main()
