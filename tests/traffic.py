"""Run by torchrun: trains for two steps at each of several layouts, and writes what its rank said in the second.

torchrun --nproc_per_node=2 tests/traffic.py FOLDER LAYOUTS.json

LAYOUTS.json: {name: flags}. FOLDER/NAME.RANK.json: {operation: bytes of the whole tensors}, of groups of several
ranks; what is less than a token's worth (norms, counters) is left out.
"""

import json
import os
import runpy
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.distributed import distributed_c10d as c10d

from megatron_cream.patches import platform

SMALLEST = 256  # bytes
said: Counter[str] = Counter()
listening = False

# Where each operation has its whole tensor among its arguments.
WHOLE = {
    "all_gather": ("all_gather_into_tensor", 0, "output_tensor"),
    "reduce_scatter": ("reduce_scatter_tensor", 1, "input"),
    "all_reduce": ("all_reduce", 0, "tensor"),
    "broadcast": ("broadcast", 0, "tensor"),
    "send": ("isend", 0, "tensor"),
}
# Not used by Megatron here; if they ever are, the test shall notice.
OTHERS = ("all_gather", "reduce_scatter", "all_to_all_single", "all_to_all", "send", "gather", "scatter")


def listen() -> None:
    """Wrap torch's collectives; before Megatron is imported, which takes some of them by name."""
    for operation, (name, place, keyword) in WHOLE.items():
        _wrap(name, operation, place, keyword)
    for name in OTHERS:
        _wrap(name, f"other: {name}", 0, None)


def _wrap(name: str, operation: str, place: int, keyword: str | None) -> None:
    original = getattr(c10d, name)

    def wrapped(*args, **kwargs):
        global listening
        tensor = args[place] if len(args) > place else kwargs.get(keyword)
        group = kwargs.get("group") or next((x for x in args if isinstance(x, c10d.ProcessGroup)), None)
        nbytes = tensor.numel() * tensor.element_size() if isinstance(tensor, torch.Tensor) else SMALLEST
        if listening and nbytes >= SMALLEST and torch.distributed.get_world_size(group) > 1:
            said[operation] += nbytes
        before, listening = listening, False  # some come in once more, through torch's function modes
        try:
            return original(*args, **kwargs)
        finally:
            listening = before

    for module in (c10d, torch.distributed):
        setattr(module, name, wrapped)


def main() -> None:
    folder, layouts = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    sys.argv = [str(Path(__file__).resolve().parents[1] / "pretrain_cream.py")]
    listen()
    platform.setup()
    job = runpy.run_path(sys.argv[0], run_name="job")

    from megatron.training import training

    step = training.train_step

    def heard(*args, **kwargs):
        global listening
        said.clear()  # so that the last step's stays
        listening = True
        try:
            return step(*args, **kwargs)
        finally:
            listening = False

    training.train_step = heard
    for name, flags in layouts.items():
        job["train"](flags)
        (folder / f"{name}.{os.environ['RANK']}.json").write_text(json.dumps(said))
        training.destroy_global_state()


if __name__ == "__main__":
    main()
