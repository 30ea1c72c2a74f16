"""Measure checkpoints of pretrain_cream.py: seconds that training stops, write time, size and load time.

    python benchmarks/checkpoints.py FOLDER      # a small model on two ranks, CPU or GPU
    python benchmarks/checkpoints.py FOLDER --nproc 2 --config llama_7b_width --num-layers 32 \\
        --tensor-model-parallel-size 2 --micro-batch-size 1 --global-batch-size 8 --saves 1 --interval 4 \\
        --rows sync async      # the full 7B, 95 GB a checkpoint

Other flags go to pretrain_cream.py. Each row is a separate run, one after the other, that saves every --interval steps
and keeps only the newest checkpoint, so that FOLDER needs room for two, or for one with --saves 1. The checkpoint of
the last row that can be resharded is loaded at --resume's layout; rows -dp can only be loaded at their own tensor and
pipeline parallelism. "Stands still" counts the time that a save takes from training (collecting the state, handing it to
the writer, and finalizing the checkpoint once it is written), not the training steps in between. The next step waits
for the copies from the GPU before it updates the weights, if they are not finished: its time is given too.
"""

import argparse
import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # not this folder: its profile.py hides the standard library's

from megatron_cream.common import devices
from megatron_cream.patches import platform

platform.setup()  # at import, because the process that writes a checkpoint imports this file

import itertools

import yaml

from benchmarks.stopping import end_ranks, leave_no_ranks
from megatron_cream.config.recipe import locate

ROWS = {
    "sync": ("synchronous", []),
    "async": ("--async-save", ["--async-save"]),
    "sync-dp": ("synchronous, optimizer in Megatron's buffers", ["--no-dist-ckpt-optim-fully-reshardable"]),
    "async-dp": (
        "--async-save, optimizer in Megatron's buffers",
        ["--async-save", "--no-dist-ckpt-optim-fully-reshardable"],
    ),
    "sync-plain": ("synchronous, no checksums", ["--no-checkpoint-checksums"]),
    "async-plain": ("--async-save, no checksums", ["--async-save", "--no-checkpoint-checksums"]),
}
SMALL = """--num-layers 8 --hidden-size 512 --ffn-hidden-size 1408 --num-attention-heads 8 --seq-length 64
--micro-batch-size 1 --global-batch-size 2 --lr 1e-4 --use-distributed-optimizer --embedded-data --vocab-size 32000
--padded-vocab-size 32000 --eval-iters 1 --eval-interval 100000 --log-interval 1 --console progress"""


def main() -> int:
    if sys.argv[1:2] == ["child"]:
        return child(Path(sys.argv[2]), sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where checkpoints are written; the benchmark's own, emptied")
    parser.add_argument("--config", help="a recipe; without one, a small model")
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument(
        "--rows", nargs="+", choices=list(ROWS), default=["sync", "async", "sync-dp", "async-dp", "async-plain"]
    )
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--interval", type=int, default=6, help="steps from one save to the next")
    parser.add_argument("--more-steps", type=int, default=0, help="after the last save, while it is written")
    parser.add_argument("--resume", help="flags of the layout to load at; default: tensor-parallel if it was not")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for a row")
    args, flags = parser.parse_known_args()
    flags = [*(["--config", args.config] if args.config else SMALL.split()), *flags]
    leave_no_ranks()
    check_room(args, flags)
    args.folder.mkdir(parents=True, exist_ok=True)
    steps = args.saves * args.interval
    common = [*flags, "--train-iters", str(steps + args.more_steps), "--lr-decay-iters", "1000", "--most-recent-k", "1"]
    results, loaded = {}, None
    reshardable = [row for row in args.rows if not row.endswith("-dp")]
    for row in args.rows:
        save = args.folder / "checkpoints"
        shutil.rmtree(save, ignore_errors=True)
        own = ["--save", str(save), "--save-interval", str(args.interval), *ROWS[row][1]]
        results[row] = found = run(args, row, [*common, *own])
        if found:
            print(f"{row:14} " + "; ".join(words(s) for s in found["saves"]) + f"; {steps_words(found)}", flush=True)
        if found and row == (reshardable or args.rows)[-1]:
            layout = args.resume if reshardable or args.resume else ""
            written = [flag for flag in ROWS[row][1] if flag != "--async-save"]  # the resumed run saves nothing
            loaded = resume(args, [*common, *written], save, steps, layout)
            print(f"loaded: {loaded}", flush=True)
    (args.folder / "results.json").write_text(json.dumps({"flags": flags, "rows": results, "load": loaded}, indent=1))
    print("\n| row | training stands still, s | until whole, s | GB | GB/s |\n|---|---|---|---|---|")
    for row, found in results.items():
        saves = found["saves"] if found else []
        still = ", ".join(f"{s['still']:.2f}" for s in saves)
        whole = ", ".join(f"{s['whole']:.1f}" for s in saves)
        rate = ", ".join(f"{s['bytes'] / 1e9 / s['whole']:.2f}" for s in saves)
        size = f"{saves[-1]['bytes'] / 1e9:.2f}" if saves else "failed"
        print(f"| {ROWS[row][0]} | {still} | {whole} | {size} | {rate} |")
    if loaded:
        print(
            f"\nloaded with {loaded['layout']} in {loaded['load']:.1f} s; looked at before (checksums, pickles) in "
            f"{loaded['check']:.1f} s"
        )
    shutil.rmtree(args.folder / "checkpoints", ignore_errors=True)
    return 0 if all(results.values()) and loaded else 1


def words(save: dict) -> str:
    after = f", next step {save['next']:.2f} s" if "next" in save else ""
    return f"step {save['step']}: still {save['still']:.2f} s{after}, whole after {save['whole']:.1f} s"


def steps_words(found: dict) -> str:
    alone, beside = found["steps"]["alone"][1:], found["steps"]["beside"]  # the first step reserves memory
    text = f"a step takes {statistics.median(alone):.2f} s" if alone else "no step was alone"
    return text + (f", while a checkpoint is written {statistics.median(beside):.2f} s" if beside else "")


def check_room(args, flags: list[str]) -> None:
    """Exit if the disk looks too small, estimated from weights plus 12 bytes of optimizer state per parameter."""
    known = yaml.safe_load(locate(args.config).read_text()) if args.config else {}
    known |= {name[2:].replace("-", "_"): value for name, value in itertools.pairwise(flags) if name[:1] == "-"}
    layers, hidden, ffn = (int(known[name]) for name in ("num_layers", "hidden_size", "ffn_hidden_size"))
    parameters = layers * (4 * hidden**2 + 3 * hidden * ffn) + 2 * hidden * int(known["vocab_size"])
    each = parameters * (14 if devices.has_cuda() else 16)
    args.folder.mkdir(parents=True, exist_ok=True)
    free, need = shutil.disk_usage(args.folder).free, each * min(args.saves, 2) * 1.05
    print(f"{parameters / 1e9:.2f}B parameters, about {each / 1e9:.1f} GB a checkpoint; {free / 1e9:.0f} GB free")
    if free < need:
        sys.exit(f"{args.folder}: {need / 1e9:.0f} GB are needed: give --saves 1, --num-layers 8, or another folder")


def run(args, name: str, flags: list[str]) -> dict | None:
    result = args.folder / f"{name}.json"
    result.unlink(missing_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={args.nproc}", "--standalone"]
    command += [__file__, "child", str(result), *flags]
    env = {"OMP_NUM_THREADS": "1" if not devices.has_cuda() else "8"} | os.environ
    log = args.folder / f"{name}.log"
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, cwd=ROOT, env=env)
        try:
            code = process.wait(args.timeout)
        except subprocess.TimeoutExpired:
            end_ranks()
            code = f"none in {args.timeout:.0f} s"
    if code or not result.is_file():
        print(
            f"{name}: exit code {code}; the end of {log}:\n{log.read_text(errors='replace')[-3000:]}", file=sys.stderr
        )
        return None
    return json.loads(result.read_text())


def resume(args, flags: list[str], saved: Path, step: int, layout: str | None) -> dict | None:
    if layout is None:
        tensor = "--tensor-model-parallel-size"
        was = int(flags[flags.index(tensor) + 1]) if tensor in flags else 1
        layout = f"{tensor} {1 if was > 1 else args.nproc}"
    own = ["--load", str(saved), "--train-iters", str(step + 1), "--override-opt-param-scheduler", *layout.split()]
    keep = flags.index("--most-recent-k")
    found = run(args, "load", [*flags[:keep], *flags[keep + 2 :], *own])
    return found and {"layout": layout, **found}


# ---------------------------------------------------------------- code of the ranks


def child(result: Path, flags: list[str]) -> int:
    from megatron.training import training

    import pretrain_cream as main_job
    from megatron_cream.checkpoint import after_save, start

    clock = Clock()
    # Not the save after the last step, which --more-steps would add.
    training.save_checkpoint_and_time = at_intervals(clock.saving(training.save_checkpoint_and_time))
    training.save_checkpoint = at_intervals(training.save_checkpoint)
    training.maybe_finalize_async_save = clock.finalizing(training.maybe_finalize_async_save)
    training.train_step = clock.step(training.train_step)
    training.load_checkpoint = clock.timed("load", training.load_checkpoint)
    start.check_content = clock.timed("check", start.check_content)
    after_save.process_checkpoint = clock.whole(after_save.process_checkpoint)
    sys.argv = [str(ROOT / "pretrain_cream.py"), *flags]
    code = main_job.main()
    if not code and os.environ["RANK"] == "0":
        steps = {"alone": clock.alone, "beside": clock.beside}
        result.write_text(json.dumps({"saves": list(clock.saves.values()), "steps": steps, **clock.seconds}))
    return code


def at_intervals(save):
    """Return a save of Megatron's that saves nothing between two --save-interval."""
    from megatron.training import get_args

    @functools.wraps(save)
    def save_at_interval(iteration, *args, **kwargs):
        if iteration % get_args().save_interval == 0:
            save(iteration, *args, **kwargs)

    return save_at_interval


class Clock:
    """Timings of one rank.

    Attributes:
        saves: by step: seconds that training stood still, seconds until the checkpoint was complete, bytes on disk.
        alone, beside: seconds of the steps during which no checkpoint was being written, and of the others.
    """

    def __init__(self):
        self.saves, self.seconds, self.alone, self.beside = {}, {}, [], []
        self._pending, self._inside, self._began = None, False, {}

    def saving(self, original):
        def save(iteration, *args, **kwargs):
            began = _now()
            self._pending = self.saves[iteration] = save = {"step": iteration, "still": 0.0}
            self._began[iteration], self._inside = began, True
            original(iteration, *args, **kwargs)
            self._inside = False
            save["still"] += _now() - began

        return save

    def finalizing(self, original):
        @functools.wraps(original)
        def finalize(*args, **kwargs):
            # The wait for the last save at the end of training delays no step.
            save = None if self._inside or kwargs.get("terminate") else self._pending
            began = _now() if save else 0.0
            original(*args, **kwargs)
            if save:
                save["still"] += _now() - began

        return finalize

    def whole(self, original):
        def whole(save_folder, step, folder):
            save = self.saves[step]
            save["whole"] = time.monotonic() - self._began[step]
            save["bytes"] = sum(path.stat().st_size for path in Path(folder).iterdir())
            if self._pending is save:
                self._pending = None
            original(save_folder, step, folder)

        return whole

    def step(self, original):
        @functools.wraps(original)
        def step(*args, **kwargs):
            beside, began = self._pending is not None, _now()
            result = original(*args, **kwargs)
            (self.beside if beside else self.alone).append(_now() - began)
            if beside:
                self._pending.setdefault("next", _now() - began)
            return result

        return step

    def timed(self, name: str, original):
        def function(*args, **kwargs):
            began = _now()
            result = original(*args, **kwargs)
            self.seconds[name] = _now() - began
            return result

        return function


def _now() -> float:
    import torch

    if devices.has_cuda() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.monotonic()


if __name__ == "__main__":
    sys.exit(main())
