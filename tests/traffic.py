"""Train two steps in each of several layouts, and write how many bytes each rank communicates in the second step.

torchrun --nproc_per_node=2 tests/traffic.py FOLDER LAYOUTS.json

LAYOUTS.json: {name: flags}. FOLDER/NAME.RANK.json: {"bytes": {operation: bytes of the whole tensors}, "groups": names},
for groups of several ranks. The bytes leave out tensors below 256 bytes (norms, counters); the groups are those that
the whole training used.
"""

import functools
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
groups: set[str] = set()
listening = False

# Operation: (function, position of the whole tensor among its arguments, keyword of that tensor).
WHOLE = {
    "all_gather": ("all_gather_into_tensor", 0, "output_tensor"),
    "reduce_scatter": ("reduce_scatter_tensor", 1, "input"),
    "all_reduce": ("all_reduce", 0, "tensor"),
    "broadcast": ("broadcast", 0, "tensor"),
    "send": ("isend", 0, "tensor"),
}
# Megatron does not use these here; the test fails if it ever does.
OTHERS = ("all_gather", "reduce_scatter", "all_to_all_single", "all_to_all", "send", "gather", "scatter")


def listen() -> None:
    """Wrap torch's collectives. Call it before Megatron is imported, which imports some of them by name."""
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
        if torch.distributed.get_world_size(group) > 1:
            groups.add((group or torch.distributed.group.WORLD).group_desc)
            if listening and nbytes >= SMALLEST:
                said[operation] += nbytes
        before, listening = listening, False  # do not count nested calls through torch's function modes
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

    @functools.wraps(step)  # whose parameters are checked before a run
    def heard(*args, **kwargs):
        global listening
        said.clear()  # keep only the last step
        listening = True
        try:
            return step(*args, **kwargs)
        finally:
            listening = False

    training.train_step = heard
    for name, flags in layouts.items():
        groups.clear()
        job["train"](flags)
        heard_all = {"bytes": said, "groups": sorted(groups)}
        (folder / f"{name}.{os.environ['RANK']}.json").write_text(json.dumps(heard_all))
        training.destroy_global_state()


if __name__ == "__main__":
    main()
