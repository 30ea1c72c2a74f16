"""Which checkpoints of a run are kept: the newest few, and every so many steps one.

Megatron's own --save-retain-interval removes the checkpoint that a run was loaded from, and one that is being
uploaded; killed meanwhile, it leaves half a folder under a checkpoint's name. Here a folder first takes a name that
nothing loads, and is removed in the background.
"""

import contextlib
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from megatron_cream.checkpoint.output import TRACKER

_STEP = re.compile(r"iter_(\d{7,})")
_COMPLETE_FILES = (".metadata", "metadata.json")
_CLOSE_SECONDS = 60


def find_complete_steps(save: Path) -> dict[int, Path]:
    """The checkpoints in a folder that were written to their end, whether the tracker names them or not."""
    steps = {}
    for folder in save.glob("iter_*"):
        named = _STEP.fullmatch(folder.name)
        if named and not folder.is_symlink() and all((folder / name).is_file() for name in _COMPLETE_FILES):
            steps[int(named[1])] = folder
    return steps


class Retention:
    """Of one run; on its first rank.

    Args:
        save: --save.
        last: how many of the newest are kept, 1 or more.
        every: a step that is a multiple of it is kept too; None: none is.
        kept: folders that are not removed in any case: what the run was loaded from.
        busy: says which folders are in use now.
    """

    def __init__(
        self,
        save: Path,
        *,
        last: int,
        every: int | None,
        protected: Iterable[Path],
        busy: Callable[[], set[Path]] = set,
    ):
        self._save, self._last, self._every, self._busy = save, last, every, busy
        self._protected = {path.resolve() for path in protected}
        self._lock, self._removal = threading.Lock(), None
        self._start_removal()  # what a run that was killed had begun to

    def prune(self) -> None:
        """Remove what is to go: call when a checkpoint is whole, and again when one is no longer in use.

        Raises nothing: what cannot be removed costs a line.
        """
        with self._lock:
            try:
                for folder in self._find_removable():
                    folder.rename(folder.with_name(f".{folder.name}.removed"))
            except OSError as error:
                _warn(self._save, error)
            self._start_removal()

    def close(self) -> None:
        """Wait for the last removal, but not for a file system that hangs; the next start goes on with it."""
        if self._removal:
            self._removal.join(_CLOSE_SECONDS)

    def _find_removable(self) -> list[Path]:
        """Whole checkpoints before the one that the tracker names; what is not whole counts for nothing, and stays."""
        newest = int((self._save / TRACKER).read_text())
        steps = find_complete_steps(self._save)
        earlier = sorted(step for step in steps if step < newest)
        last = earlier[1 - self._last :] if self._last > 1 else []  # beside the newest itself
        stays = set(last) | {step for step in earlier if self._every and step % self._every == 0}
        in_use = self._protected | {path.resolve() for path in self._busy()}
        return [steps[step] for step in earlier if step not in stays and steps[step].resolve() not in in_use]

    def _start_removal(self) -> None:
        before = self._removal
        left = list(self._save.glob(".iter_*.removed"))

        def remove() -> None:
            if before:
                before.join()
            for folder in left:
                with contextlib.suppress(FileNotFoundError):
                    try:
                        shutil.rmtree(folder)
                    except OSError as error:
                        _warn(folder, error)

        if left:
            self._removal = threading.Thread(target=remove, daemon=True)
            self._removal.start()


def _warn(place: Path, error: OSError) -> None:
    reason = error.strerror or error
    print(f"warning: {place}: an earlier checkpoint is not removed: {reason}", file=sys.stderr, flush=True)
