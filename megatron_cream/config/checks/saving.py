"""Checks of the flags for saving checkpoints, of --save-hook and of --save-hf."""

from argparse import Namespace
from dataclasses import fields
from pathlib import Path

from megatron_cream.checkpoint import output, save_hook
from megatron_cream.checkpoint.megatron_folder import HF
from megatron_cream.common.cli import to_flag
from megatron_cream.common.errors import UsageError
from megatron_cream.config.options import SaveConfig


def check(args: Namespace) -> None:
    """Raise UsageError for settings that cannot work together."""
    for given in fields(SaveConfig):
        value = getattr(args, given.name)
        if value == given.default:
            continue
        if given.name == "save_hook":
            value = save_hook.program_name(save_hook.parse_command(value))
        shown = f"{to_flag(given.name)} {value}"
        if args.save is None:
            raise UsageError(f"{shown}: only with --save")
        if args.ckpt_format != "torch_dist":
            raise UsageError(f"{shown}: needs --ckpt-format torch_dist, not {args.ckpt_format}")
        if given.name == "save_hook_minutes" and args.save_hook is None:
            raise UsageError(f"{shown}: only with --save-hook")
    if args.async_save and args.save is None:
        raise UsageError("--async-save: only with --save")
    keep, interval = args.save_retain_interval, args.save_interval
    if keep and interval and keep % interval:
        raise UsageError(f"--save-retain-interval {keep}: must be a multiple of --save-interval {interval}")


def check_export(args: Namespace, is_intermediate: bool) -> None:
    """Raise UsageError if --save-hf must not be written; call it after `fill.set_saving`.

    Args:
        args: the parsed flags.
        is_intermediate: whether --save is the folder that an export removes.
    """
    if args.save_hf is None:
        return
    target = Path(args.save_hf).absolute()
    output.check_target(target, flag="--save-hf", overwrite=False)
    if is_intermediate:
        _reject_finished(args, Path(args.save) / output.TRACKER)
    _check_outside_save(args, target)


def _check_outside_save(args: Namespace, target: Path) -> None:
    """Raise UsageError if --save-hf is a folder where --save keeps its files."""
    save, target = Path(args.save).resolve(), target.resolve()
    below = target.relative_to(save).parts[0] if save in target.parents else ""
    if target == save or target in save.parents or below in (HF, "runs", "best") or below.startswith("iter_"):
        raise UsageError(f"--save-hf {args.save_hf}: --save {args.save} keeps its files there; give a folder beside it")


def _reject_finished(args: Namespace, tracker: Path) -> None:
    """Raise UsageError if an earlier run finished, but its checkpoint was not exported."""
    step = tracker.read_text().strip() if tracker.is_file() else ""
    if step.isdigit() and args.train_iters and int(step) >= args.train_iters:
        raise UsageError(
            f"--save-hf {args.save_hf}: step {step} of an earlier run is in {tracker.parent}. Export it with python "
            f"tools/convert_hf.py export --checkpoint {tracker.parent} --hf-path {args.save_hf}, or delete it."
        )


def check_on_rank(args: Namespace) -> None:
    """Raise UsageError on the rank that runs --save-hook if it cannot run the command."""
    if args.save_hook is not None and args.rank == 0:
        save_hook.check_can_run()
