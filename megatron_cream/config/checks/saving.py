"""Checks of the flags for saving checkpoints, and of --save-hook."""

from argparse import Namespace
from dataclasses import fields

from megatron_cream.checkpoint import save_hook
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
    keep, interval = args.save_retain_interval, args.save_interval
    if keep and interval and keep % interval:
        raise UsageError(f"--save-retain-interval {keep}: must be a multiple of --save-interval {interval}")


def check_on_rank(args: Namespace) -> None:
    """Raise UsageError on the rank that runs --save-hook if it cannot run the command."""
    if args.save_hook is not None and args.rank == 0:
        save_hook.check_can_run()
