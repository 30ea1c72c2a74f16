"""Process of one run of the study; it imports and compiles in advance, while another run uses the GPU.

`study.py` starts it with CUDA_VISIBLE_DEVICES, and later sends one line of JSON on standard input to start the run:
{"cell": {..}, "data": "..", "runs": "..", "evaluate_only": false}. The results go to runs/NAME.training.json and
runs/NAME.evaluation.json, each one line for results.jsonl; the output goes to runs/NAME.log.
"""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]

import cells
import retrieval

from megatron_cream.common.processes import end_with_parent

_FLAGS = "training with the flags"
"""Starts the lines of a training in the log."""
UNLIMITED = 1 << 40
"""Maximum position, so that longer texts than the model was trained for are evaluated too, as transformers does."""


def main() -> int:
    end_with_parent()  # without study.py nobody reads the results, and the GPU may be reused
    _prepare()
    line = sys.stdin.readline()
    if not line.strip():
        return 0
    task = json.loads(line)
    cell, data, runs = cells.Cell(**task["cell"]), Path(task["data"]), Path(task["runs"])
    with open(runs / f"{cell.name}.log", "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    settings = cells.Settings.read(data)
    if cell.trains and not task["evaluate_only"]:
        _remove(runs, cell)
        began = time.monotonic()
        stages = cells.stages(cell, settings, data, runs)
        _train(stages)
        _write(runs, cell, "training", _training(runs / f"{cell.name}.log", len(stages), began))
    began = time.monotonic()
    found = _evaluate(cell, settings, data, runs)
    _write(runs, cell, "evaluation", found | {"wall": round(time.monotonic() - began, 1)})
    _remove(runs, cell)
    return 0


def _remove(runs: Path, cell: cells.Cell) -> None:
    for folder in (cell.name, f"{cell.name}.first", f"{cell.name}.cache"):
        shutil.rmtree(runs / folder, ignore_errors=True)


def _prepare() -> None:
    """Do the slow work that is the same for all cells: imports, and compiling flash-attn's kernels."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    global pretrain_cream
    import torch

    import pretrain_cream
    from megatron_cream.common import devices
    from megatron_cream.model.attention import find_flash_attention

    if not devices.has_cuda() or (attend := find_flash_attention()) is None:
        return
    try:
        shape = json.loads((Path(sys.argv[1]) / "hf" / "config.json").read_text())
        heads, groups = shape["num_attention_heads"], shape["num_key_value_heads"]
        size = shape.get("head_dim") or shape["hidden_size"] // heads
        make = lambda n: torch.randn(1, 8192, n, size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        query, key, value = make(heads), make(groups), make(groups)
        attend(query, key, value, causal=True, deterministic=False).sum().backward()
        with torch.inference_mode():
            attend(query, key, value, causal=True, deterministic=False)
        torch.cuda.synchronize()
        del query, key, value
        torch.cuda.empty_cache()
    except Exception as error:  # the run itself will report it or use another kernel
        print(f"flash-attn ahead of the run: {error!r}", flush=True)


def _train(stages: list[list[str]]) -> None:
    """Do the trainings of a run, the last in this process: Megatron trains once in a process."""
    for flags in stages[:-1]:
        print(_FLAGS, *flags, flush=True)
        subprocess.run([sys.executable, str(HERE.parents[1] / "pretrain_cream.py"), *flags], check=True)
    print(_FLAGS, *stages[-1], flush=True)
    pretrain_cream.train(stages[-1])
    sys.stdout.flush()


def _training(log: Path, trainings: int, began: float) -> dict:
    """Read losses by step, and GPU seconds: the median time of a step times the number of steps, of each training."""
    pattern = r"iteration +(\d+)/ +(\d+) .*?elapsed time per iteration \(ms\): ([\d.]+).*?lm loss: ([\d.E+-]+)"
    losses: dict[str, float] = {}
    seconds, before = 0.0, 0
    # An earlier worker that was killed has written to the same log.
    for text in log.read_text().split(_FLAGS)[-trainings:]:
        steps = re.findall(pattern, text)
        if not steps or int(steps[-1][0]) + int(steps[0][0]) <= int(steps[-1][1]):  # one line in --log-interval steps
            raise RuntimeError(f"training did not come to its last step: see {log}")
        losses |= {str(before + int(step)): round(float(loss), 4) for step, _, _, loss in steps}
        seconds += statistics.median(float(ms) for *_, ms, _ in steps) * int(steps[-1][1]) / 1000
        before += int(steps[-1][1])
    return {"losses": losses, "seconds": round(seconds, 1), "wall": round(time.monotonic() - began, 1)}


def _evaluate(cell: cells.Cell, settings: cells.Settings, data: Path, runs: Path) -> dict:
    import gc

    import torch

    from megatron_cream.checkpoint.adapter_checkpoint import open_checkpoint
    from megatron_cream.checkpoint.convert import import_hf
    from megatron_cream.checkpoint.hf_folder import HfFolder
    from megatron_cream.checkpoint.model import load_model
    from megatron_cream.common import devices

    gc.collect()
    if devices.has_cuda():
        torch.cuda.empty_cache()
    saved = runs / cell.name
    if not cell.trains:
        shutil.rmtree(saved, ignore_errors=True)
        import_hf(HfFolder(cells.model_folder(cell.scaling, data, cell.factor)), saved)
    checkpoint = open_checkpoint(saved)  # an adapter is merged into the model from which it started
    cuda = devices.has_cuda()
    for attention in ("auto", "sdpa") if cuda else ("sdpa",):
        try:
            model = load_model(checkpoint, torch.bfloat16 if cuda else torch.float32, attention=attention)
            model.rotary = replace(checkpoint.shape, max_position_embeddings=UNLIMITED).rotary()
            found = retrieval.evaluate(model, data / "evaluation.npz", settings.window * cell.factor)
            if (data / "short.npz").exists():
                found["short"] = retrieval.evaluate_short(model, data / "short.npz")
            return found
        except Exception as error:  # the kernel does not support this GPU or length
            if attention == "sdpa":
                raise
            print(f"evaluation with --attention-backend {attention}: {error!r}; once more with sdpa", flush=True)
    raise AssertionError


def _write(runs: Path, cell: cells.Cell, what: str, found: dict) -> None:
    """Write a result atomically, because `study.py` reads the file as soon as it exists."""
    path = runs / f"{cell.name}.{what}.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"run": cell.name, "what": what, **asdict(cell), **found}))
    part.replace(path)


if __name__ == "__main__":
    code = 1
    try:
        code = main()
    except SystemExit as error:
        code = error.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a normal exit can hang while the process group shuts down
