"""Replace the file that names the newest checkpoint at once."""

from pathlib import Path

from megatron_cream.common.files import replacing
from megatron_cream.patches import registry
from megatron_cream.patches.registry import Patch

TRACKER = Patch(
    "tracker",
    "megatron.training.checkpointing:maybe_msc",
    "Megatron empties the tracker before it writes it: a kill in between loses all checkpoints.",
    value_type="MaybeMultiStorageClient",
)


def install() -> None:
    """Call before `pretrain`."""
    from megatron.training import checkpointing

    files = checkpointing.maybe_msc
    if not isinstance(files, _ReplacingTracker):
        registry.assign(TRACKER, _ReplacingTracker(files))


class _ReplacingTracker:
    """Megatron's file functions; a tracker that is opened for writing takes its place when it is whole."""

    def __init__(self, files):
        self._files = files

    def __getattr__(self, name: str):
        return getattr(self._files, name)

    def open(self, path, mode: str = "r", *args, **kwargs):
        if mode == "w" and Path(path).name == "latest_checkpointed_iteration.txt" and Path(path).parent.is_dir():
            return replacing(Path(path))
        return self._files.open(path, mode, *args, **kwargs)
