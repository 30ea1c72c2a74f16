"""The best checkpoint of a run, kept in `best/` of --save: a Megatron folder of one step, with a tracker of its own.

The score that it was kept for is saved in it, with the flags: so a resumed run knows both or neither, and
whatever moment a run is killed at, the tracker names a whole checkpoint.
"""

import contextlib
import shutil
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_cream.checkpoint import saving
from megatron_cream.checkpoint.megatron_folder import HF, MegatronCheckpoint
from megatron_cream.checkpoint.output import TRACKER
from megatron_cream.common.errors import UsageError
from megatron_cream.patches import hooks, registry

FOLDER = "best"
_SCORE_KEY = "long_eval_kept"


class BestCheckpoint:
    """What is kept, and how another takes its place.

    Attributes:
        folder: `save`/best.
        step: of the checkpoint that is kept; None where there is none yet.
        score: what `saving` was given for it.

    Args:
        save: the run's --save.
        settings: plain values: scores of other settings do not compare.
        clean: remove what a killed run left unfinished; on one rank.

    Raises:
        UsageError: the folder holds another checkpoint than this would have kept.
    """

    def __init__(self, save: Path, settings: dict[str, Any], *, clean: bool):
        self.folder, self._save, self._settings = save / FOLDER, save, settings
        self.step = self.score = self._writing = None
        if not (self.folder / TRACKER).is_file():
            return
        try:
            checkpoint = MegatronCheckpoint(self.folder)
        except UsageError as error:
            raise UsageError(str(error).replace("--checkpoint ", "the best checkpoint in --save: ", 1)) from error
        kept = getattr(checkpoint.args, _SCORE_KEY, None)
        if kept is None:
            raise UsageError(f"{self.folder}: holds a checkpoint that no long evaluation has kept: move it away")
        if kept["settings"] != settings:
            raise UsageError(
                f"{self.folder}: step {checkpoint.step} was kept by another evaluation, "
                f"{_format_settings(kept['settings'])}, "
                f"which does not compare with {_format_settings(settings)}: give the same, or move it away"
            )
        self.step, self.score = checkpoint.step, kept["score"]
        if clean:
            self._remove_all_but(self.step)

    @contextlib.contextmanager
    def saving(self, args: Namespace, step: int, score: dict[str, Any]) -> Iterator[None]:
        """Send the checkpoint that Megatron saves in this block to `best/`.

        The earlier checkpoint stays until the new one is whole.

        Args:
            args: Megatron's.
            step: the training step that is saved.
            score: plain values.
        """
        if args.rank == 0:
            shutil.rmtree(self._step_folder(step), ignore_errors=True)  # what a killed run left unfinished
            if (self._save / HF).is_dir():
                with contextlib.suppress(OSError):  # no room: then the checkpoint fails too, and says so
                    shutil.copytree(self._save / HF, self.folder / HF, dirs_exist_ok=True)
        # A copy, which an asynchronous save reads after this block too. Megatron would remove earlier steps from
        # the run's own folder by this one's tracker.
        own = Namespace(**vars(args) | {"save": str(self.folder), "save_retain_interval": None})
        setattr(own, _SCORE_KEY, {"score": score, "settings": self._settings})
        with registry.override(hooks.SAVE_ARGS, lambda original: own):
            yield
        self._before = (self.step, self.score)
        self.step, self.score, self._writing = step, score, step
        self.undo_failed()

    def undo_failed(self) -> None:
        """Of a save that turned out to have failed: the earlier one is still the best. On every rank."""
        if self._writing is not None and saving.has_failed(str(self.folder)):
            (self.step, self.score), self._writing = self._before, None

    def remove_earlier(self) -> None:
        """Remove the earlier checkpoint once the new one is whole; on one rank, any number of times."""
        tracker = self.folder / TRACKER
        if self._writing is not None and tracker.is_file() and tracker.read_text() == str(self._writing):
            self._remove_all_but(self._writing)
            self._writing = None

    def _remove_all_but(self, step: int) -> None:
        for other in self.folder.glob("iter_*"):
            if other != self._step_folder(step):
                shutil.rmtree(other)

    def _step_folder(self, step: int) -> Path:
        return self.folder / f"iter_{step:07d}"


def _format_settings(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())
