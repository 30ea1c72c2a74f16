"""Replace the tracker file, which names the newest checkpoint, atomically."""

from pathlib import Path

from megatron_cream.common.files import atomic_write
from megatron_cream.patches import registry
from megatron_cream.patches.registry import Patch

TRACKER = Patch(
    "tracker",
    "megatron.training.checkpointing:maybe_msc",
    "Megatron empties the tracker file before it writes it: after a kill in between no checkpoint is found.",
    value_type="MaybeMultiStorageClient",
)


def install() -> None:
    """Install the patch. Call before `pretrain`."""
    from megatron.training import checkpointing

    files = checkpointing.maybe_msc
    if not isinstance(files, _AtomicTracker):
        registry.assign(TRACKER, _AtomicTracker(files))


class _AtomicTracker:
    """Megatron's file functions, which replace a tracker file once it is fully written."""

    def __init__(self, files):
        self._files = files

    def __getattr__(self, name: str):
        return getattr(self._files, name)

    def open(self, path, mode: str = "r", *args, **kwargs):
        if mode == "w" and Path(path).name == "latest_checkpointed_iteration.txt" and Path(path).parent.is_dir():
            return atomic_write(Path(path))
        return self._files.open(path, mode, *args, **kwargs)
