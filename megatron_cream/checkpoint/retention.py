"""Remove older checkpoints of a run, except the newest few and every n-th step.

Megatron's own --save-retain-interval also removes the checkpoint that a run was loaded from, and one that is being
uploaded. If it is killed, it leaves an incomplete folder under a checkpoint's name. Here a folder is first renamed to
a name that nothing loads, and then removed in the background.
"""

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
    """Return {step: folder} of all complete checkpoints in a folder."""
    steps = {}
    for folder in save.glob("iter_*"):
        named = _STEP.fullmatch(folder.name)
        if named and not folder.is_symlink() and all((folder / name).is_file() for name in _COMPLETE_FILES):
            steps[int(named[1])] = folder
    return steps


class Retention:
    """The removal of older checkpoints of one run, on its first rank.

    Args:
        save: --save.
        last: number of newest checkpoints to keep, 1 or more.
        every: keep each step that is a multiple of this too; None for no others.
        protected: folders that are never removed, such as the one that the run was loaded from.
        busy: returns the folders that are in use now.
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
        self._start_removal()  # finish the removals of a killed run

    def prune(self) -> None:
        """Remove older checkpoints that are not in use.

        Call it when a checkpoint is complete, and when one is no longer in use. If a folder cannot be removed, it
        prints a warning and does not raise.
        """
        with self._lock:
            try:
                for folder in self._find_removable():
                    folder.rename(folder.with_name(f".{folder.name}.removed"))
            except OSError as error:
                _warn(self._save, error)
            self._start_removal()

    def close(self) -> None:
        """Wait up to a minute for the last removal.

        The next start of the run finishes an incomplete one.
        """
        if self._removal:
            self._removal.join(_CLOSE_SECONDS)

    def _find_removable(self) -> list[Path]:
        """Return the checkpoints to remove: complete ones, older than the tracker's."""
        newest = int((self._save / TRACKER).read_text())
        steps = find_complete_steps(self._save)
        earlier = sorted(step for step in steps if step < newest)
        last = earlier[1 - self._last :] if self._last > 1 else []  # the newest is kept anyway
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
                try:
                    shutil.rmtree(folder)
                except FileNotFoundError:
                    pass  # the removal before this one has removed it
                except OSError as error:
                    _warn(folder, error)

        if left:
            self._removal = threading.Thread(target=remove, daemon=True)
            self._removal.start()


def _warn(place: Path, error: OSError) -> None:
    reason = error.strerror or error
    print(f"warning: {place}: cannot remove an older checkpoint: {reason}", file=sys.stderr, flush=True)
