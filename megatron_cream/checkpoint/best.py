"""Keep the best checkpoint of a run in `best/` of --save.

The folder is a Megatron checkpoint folder of one step with its own tracker. The checkpoint's score is saved among its
flags, so a resumed run finds both or neither. Whenever a run is killed, the tracker names a complete checkpoint.
"""

import contextlib
import shutil
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_cream.checkpoint import saving
from megatron_cream.checkpoint.adapter_checkpoint import open_checkpoint
from megatron_cream.checkpoint.megatron_folder import HF
from megatron_cream.checkpoint.output import TRACKER
from megatron_cream.common.errors import UsageError
from megatron_cream.patches import hooks, registry

FOLDER = "best"
_SCORE_KEY = "long_eval_kept"


class BestCheckpoint:
    """The best checkpoint so far, and its replacement by a better one.

    Attributes:
        folder: `save`/best.
        step: training step of the checkpoint; None if there is none yet.
        score: the score that `saving` was given for it; None if there is none yet.

    Args:
        save: the run's --save.
        settings: evaluation settings, as plain values; scores compare only under equal settings.
        clean: remove incomplete checkpoints of a killed run; set it on one rank.
        base: where the base model of adapters is; None means where it was when the best step was saved.

    Raises:
        UsageError: the folder has a checkpoint from other evaluation settings, or one without a score.
    """

    def __init__(self, save: Path, settings: dict[str, Any], *, clean: bool, base: str | None = None):
        self.folder, self._save, self._settings = save / FOLDER, save, settings
        self.step = self.score = self._writing = None
        if not (self.folder / TRACKER).is_file():
            return
        try:
            checkpoint = open_checkpoint(self.folder, base=base)
        except UsageError as error:
            raise UsageError(str(error).replace("--checkpoint ", "the best checkpoint in --save: ", 1)) from error
        kept = getattr(checkpoint.args, _SCORE_KEY, None)
        if kept is None:
            raise UsageError(f"{self.folder}: contains a checkpoint without a long-evaluation score. Move it away.")
        if kept["settings"] != settings:
            raise UsageError(
                f"{self.folder}: step {checkpoint.step} was scored by another evaluation "
                f"({_format_settings(kept['settings'])}), which is not comparable with this one "
                f"({_format_settings(settings)}). Give the same settings, or move the folder away."
            )
        self.step, self.score = checkpoint.step, kept["score"]
        if clean:
            self._remove_all_but(self.step)

    @contextlib.contextmanager
    def saving(self, args: Namespace, step: int, score: dict[str, Any]) -> Iterator[None]:
        """Redirect the checkpoint that Megatron saves in this block to `best/`.

        The earlier checkpoint stays until the new one is complete.

        Args:
            args: Megatron's flags.
            step: training step that is saved.
            score: score of the step, as plain values.
        """
        if args.rank == 0:
            self.remove_earlier()
            shutil.rmtree(self._step_folder(step), ignore_errors=True)  # incomplete, from a killed run
            if (self._save / HF).is_dir():
                with contextlib.suppress(OSError):  # if the disk is full, the checkpoint fails too, with a warning
                    shutil.copytree(self._save / HF, self.folder / HF, dirs_exist_ok=True)
        # A copy, because an asynchronous save reads the flags after this block too. No save_retain_interval: Megatron
        # would remove steps from the run's own folder by the tracker of best/.
        own = Namespace(**vars(args) | {"save": str(self.folder), "save_retain_interval": None})
        setattr(own, _SCORE_KEY, {"score": score, "settings": self._settings})
        with registry.override(hooks.SAVE_ARGS, lambda original: own):
            yield
        self._before = (self.step, self.score)
        self.step, self.score, self._writing = step, score, step
        self.undo_failed()

    def undo_failed(self) -> None:
        """Restore the earlier best step and score if the newest save failed; call on every rank."""
        if self._writing is not None and saving.has_failed(str(self.folder)):
            (self.step, self.score), self._writing = self._before, None

    def remove_earlier(self) -> None:
        """Remove the earlier checkpoint if the new one is complete; call on one rank."""
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
