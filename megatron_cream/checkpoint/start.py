"""Find and check the model and the checkpoint that a run loads.

This comes before the run starts a process group, uses a GPU or writes files. Megatron checks while it loads: a
checkpoint that is truncated, of another model, or that runs code ends it with tracebacks of all ranks, after the
run's folders were created.
"""

import os
import re
from argparse import Namespace
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_cream.checkpoint import base_weights, hf_folder, hub, opening, output, peft_folder
from megatron_cream.checkpoint.families import ModelShape, read_config
from megatron_cream.checkpoint.megatron_folder import HF
from megatron_cream.checkpoint.retention import find_complete_steps
from megatron_cream.common.cli import split_names
from megatron_cream.common.errors import UsageError
from megatron_cream.distributed.rendezvous import share_errors
from megatron_cream.model.rope_choice import ModelRope


@dataclass(frozen=True)
class StartFlags:
    """The flags that say where a run starts from, and whether its --save may be used. None: not given.

    checkpoint_checksums, verify_integrity: each makes the files of a checkpoint be compared with their checksums.
    layout: tensor- and pipeline-parallel sizes.
    """

    load: str | None = None
    load_hf: str | None = None
    pretrained_checkpoint: str | None = None
    load_adapter: str | None = None
    save: str | None = None
    ckpt_step: int | None = None
    ckpt_format: str = "torch_dist"
    finetune: bool = False
    skip_train: bool = False
    checkpoint_checksums: bool = False
    verify_integrity: bool = False
    layout: tuple[int, int] = (1, 1)
    lora_rank: int = 0
    lora_train: str = "none"

    @property
    def is_load_equal_save(self) -> bool:
        """Whether --load and --save are the same folder, as in a job that may be restarted."""
        return (
            self.load is not None and self.save is not None and Path(self.load).resolve() == Path(self.save).resolve()
        )


@dataclass(frozen=True)
class FoundCheckpoint:
    """The checkpoint that a run starts from.

    flag: the flag that names it.
    folder: folder of the step.
    args: flags that it was saved with.
    step: the opened step; None for `mp_rank_XX` files.
    """

    flag: str
    folder: Path
    args: Namespace
    step: opening.Step | None


@dataclass(frozen=True)
class Origin:
    """The origin of a run's weights.

    flags: the flags that name it, with the step to load.
    model_folder: the Hugging Face folder, or the `hf/` of a checkpoint; None without an original model.
    shape: shape of the model in that folder.
    source: (flag, folder of the step) that Megatron will load.
    checkpoint: the opened checkpoint of `source`, if its format is one that this project writes.
    """

    flags: StartFlags
    model_folder: Path | None
    shape: ModelShape | None
    source: tuple[str, Path] | None
    checkpoint: FoundCheckpoint | None

    @property
    def resumed_step(self) -> int | None:
        """The step that the run resumes its training from; None if it starts from step 0."""
        if self.flags.finetune or not self.is_loaded:
            return None
        step = parse_step(self.source[1])
        return step if isinstance(step, int) else None

    @property
    def is_loaded(self) -> bool:
        """Whether the weights are those of --load."""
        return _is_load(self.source)

    @property
    def continues_save(self) -> bool:
        """Whether the run goes on in the folder of its checkpoint, so that what lies in --save is its own."""
        return self.is_loaded and self.flags.is_load_equal_save

    @property
    def weights(self) -> str:
        """The flag and value that name the run's weights, for messages."""
        if self.is_loaded:
            return f"--load {self.flags.load}"
        if self.flags.load_hf:
            return f"--load-hf {self.flags.load_hf}"
        return f"--pretrained-checkpoint {self.flags.pretrained_checkpoint}" if self.source else "--skip-train"

    @property
    def resumed(self) -> FoundCheckpoint | None:
        """The checkpoint that the run resumes its training from; None if it only starts from weights."""
        return None if self.resumed_step is None else self.checkpoint


def _is_load(source: tuple[str, Path] | None) -> bool:
    return source is not None and source[0] == "--load"


def find_origin(flags: StartFlags) -> Origin:
    """Find the model and the checkpoint that the flags name. No tensor is read.

    Raises:
        UsageError: one of them is unreadable or unsupported, or --save contains another run.
    """
    reject_other_run(flags)
    flags = replace(flags, ckpt_step=_choose_step(flags))
    source = find_checkpoint(flags)
    folder, shape = find_model(flags, is_loaded=_is_load(source))
    return Origin(flags, folder, shape, source, _open_checkpoint(flags, source))


def find_model(flags: StartFlags, *, is_loaded: bool = True) -> tuple[Path | None, ModelShape | None]:
    """Return the Hugging Face folder of the run's original model, and the model's shape.

    Args:
        flags: the flags that name it.
        is_loaded: whether --load has the weights. If not, its `hf/` is from a start that ended before its first save.
    """
    folder = _find_model_folder(flags, is_loaded)
    if folder is None:
        return None, None
    shape = read_config(folder)[1]
    return folder, shape if flags.load_adapter is None else peft_folder.take_rope(shape, Path(flags.load_adapter))


def _find_model_folder(flags: StartFlags, is_loaded: bool) -> Path | None:
    if flags.load_hf is not None:
        if flags.pretrained_checkpoint is not None:
            raise UsageError(f"--load-hf {flags.load_hf} with --pretrained-checkpoint: give one of the two")
        folder = hub.locate(flags.load_hf, flag="--load-hf")
        if not (folder / hf_folder.CONFIG).exists():
            raise UsageError(
                f"--load-hf {flags.load_hf}: has no {hf_folder.CONFIG}. Give the folder or the name of a Hugging Face "
                "model."
            )
        return folder
    for name in (flags.load if is_loaded else None, flags.pretrained_checkpoint):
        if name is not None and (Path(name) / HF / hf_folder.CONFIG).is_file():
            return Path(name) / HF
    return None


def reject_other_run(flags: StartFlags) -> None:
    """Raise UsageError if --save contains checkpoints that this run does not resume from."""
    if flags.save is None or flags.skip_train or flags.is_load_equal_save:
        return
    if os.path.lexists(Path(flags.save) / output.TRACKER):
        raise UsageError(
            f"--save {flags.save}: contains the checkpoints of an earlier run. Add --load {flags.save} to resume from "
            "them, or give another folder."
        )


def find_checkpoint(flags: StartFlags) -> tuple[str, Path] | None:
    """Return (flag, folder of the step) that Megatron will load, or None.

    Raises:
        UsageError: a folder has no checkpoint, or not the requested step.
    """
    for given, name in (("--load", flags.load), ("--pretrained-checkpoint", flags.pretrained_checkpoint)):
        if name is None:
            continue
        path, is_load = Path(name), given == "--load"
        has_tracker = (path / output.TRACKER).exists()
        if has_tracker or (is_load and flags.ckpt_step is not None):
            step = opening.read_newest_step(path, given) if has_tracker else None
            if step == "release" and flags.ckpt_step is not None:
                raise UsageError(f"--ckpt-step {flags.ckpt_step}: {given} {path} is a converted model without steps")
            step = step if flags.ckpt_step is None else flags.ckpt_step
            return given, opening.find_step_folder(path, step, given)
        if not is_load or not flags.is_load_equal_save:
            why = f"contains no checkpoint: it has no {output.TRACKER}" if path.is_dir() else "no such folder"
            if path.is_dir() and re.fullmatch(r"iter_\d{7}", path.absolute().name):
                why += f". Give {given} {path.absolute().parent} --ckpt-step {int(path.absolute().name[5:])}"
            raise UsageError(f"{given} {path}: {why}")
        _reject_lost_tracker(path)
    return None


def _choose_step(flags: StartFlags) -> int | None:
    """Return --ckpt-step, or the only complete step of a run whose --load and --save has lost its tracker."""
    if flags.ckpt_step is not None or flags.skip_train or flags.load is None or not flags.is_load_equal_save:
        return flags.ckpt_step
    return _find_untracked_step(Path(flags.load))


def _find_untracked_step(path: Path) -> int | None:
    """Return the step of a folder's only complete checkpoint if the tracker is missing.

    None otherwise. The manifest of checksums is written just before the tracker. So a run resumes that was killed
    between the two, or that lost its tracker.
    """
    complete = {} if os.path.lexists(path / output.TRACKER) else find_complete_steps(path)
    steps = [step for step, folder in complete.items() if (folder / output.MANIFEST).is_file()]
    return steps[0] if len(steps) == len(complete) == 1 else None


def _reject_lost_tracker(path: Path) -> None:
    """Raise UsageError if the folder has several complete checkpoints but no tracker.

    A single one is allowed: a run that was killed in its first save has no tracker yet.
    """
    complete = [folder.name for _, folder in sorted(find_complete_steps(path).items())]
    if len(complete) > 1 or (path / output.TRACKER).is_symlink():
        raise UsageError(
            f"--load {path}: {output.TRACKER} is missing. Training would overwrite "
            f"{', '.join(complete) or 'its checkpoints'}. Use --ckpt-step to resume from one of them, or give another "
            "folder."
        )


def _open_checkpoint(flags: StartFlags, source: tuple[str, Path] | None) -> FoundCheckpoint | None:
    """Open the checkpoint that will be loaded, without reading a tensor.

    None if there is none, or if its format is one that this project does not write.

    Raises:
        UsageError: the checkpoint is incomplete, damaged, or not plain data.
    """
    if source is None or flags.ckpt_format not in ("torch", "torch_dist"):
        return None
    given, folder = source
    checksums = flags.checkpoint_checksums or flags.verify_integrity
    if opening.is_classic(folder):
        saved = opening.open_classic(folder, given, flags.layout, checksums=checksums)
        return FoundCheckpoint(given, folder, saved, None)
    step = opening.open_step(folder, given, checksums=checksums)
    return FoundCheckpoint(given, folder, step.args, step)


def read_saved_rope(found: FoundCheckpoint | None) -> ModelRope | None:
    """Return the rotary embedding that a checkpoint was trained with.

    None for a converted model, and for one of Megatron-LM, that has a config.json: it has more details. Megatron-LM's
    own scaling (--use-rope-scaling) is left out.
    """
    if found is None:
        return None
    saved, is_converted, is_own = found.args, found.folder.name == "release", hasattr(found.args, "rope_scaling_config")
    if (is_converted or not is_own) and (found.folder.parent / HF / hf_folder.CONFIG).is_file():
        return None
    if not is_own:
        theta, positions = getattr(saved, "rotary_base", None), getattr(saved, "max_position_embeddings", None)
        return ModelRope(theta=float(theta), scaling=None, positions=positions) if theta and positions else None
    scaling, positions = saved.rope_scaling_config, saved.target_length
    original = getattr(saved, "rope_window", None)
    if original is None and not is_converted and scaling and "original_max_position_embeddings" not in scaling:
        original = round(positions / scaling["factor"])  # saved by an older release without rope_window
    return ModelRope(theta=float(saved.rotary_base), scaling=scaling, positions=positions, original=original)


def parse_step(folder: Path) -> int | str:
    """Return the step of a step folder; "release" for a converted model."""
    return folder.name if folder.name == "release" else int(folder.name.removeprefix("iter_"))


def find_base(origin: Origin) -> dict[str, Any] | None:
    """Return the record of the model under the run's adapters; None without adapters, or with random weights.

    Raises:
        UsageError: the model cannot be read, has other weights than the saved one, or does not fit --load-adapter.
    """
    flags, found = origin.flags, origin.checkpoint
    if not flags.lora_rank:
        return None
    flag, given = "--load-hf", flags.load_hf
    if given is None:
        flag, given = "--pretrained-checkpoint", flags.pretrained_checkpoint
    saved = getattr(found.args, "lora_base", None) if found and found.flag == "--load" else None
    if saved is not None:
        return base_weights.find_again(saved, given, where=f"--load {flags.load}", flag="--load-hf")
    if given is None:
        return None
    base = base_weights.describe(given, flag=flag, step=flags.ckpt_step)
    if flags.load_adapter is not None and origin.shape is not None:
        trained = [name for name in split_names(flags.lora_train) if name != "none"]
        peft_folder.PeftFolder(Path(flags.load_adapter)).check(origin.shape, trained)
    return base


def check_content(origin: Origin, share: tuple[int, int]) -> None:
    """Check the checksums, if there are any, and the pickles of a checkpoint.

    Each rank reads a share. All ranks must call it, and all raise the same error.

    Args:
        origin: where the run starts from.
        share: (i, n): this is rank i of n.

    Raises:
        UsageError: a file is damaged, missing or not plain data; the message names it.
    """
    flags, found = origin.flags, origin.checkpoint
    folder = found.folder if found else origin.model_folder if flags.load_hf else None
    with share_errors():
        if found and flags.verify_integrity and not (found.folder / output.MANIFEST).is_file():
            raise UsageError(f"--verify-integrity: {found.flag} {folder} was saved without {output.MANIFEST}")
        wanted = folder is not None and (flags.checkpoint_checksums or flags.verify_integrity)
        if wanted and (faults := output.check_manifest(folder, share=share)):
            raise UsageError(f"{found.flag if found else '--load-hf'} {faults[0]}")
    with share_errors():  # separate, because other ranks may have verified a file's checksum
        if found and found.step:
            opening.check_pickles(found.step, found.flag, keys=found.step.pickled_keys()[share[0] :: share[1]])
