"""The flags of what follows a checkpoint."""

from argparse import Namespace
from dataclasses import dataclass, fields

from megatron_cream.checkpoint import save_hook
from megatron_cream.common.errors import UsageError


@dataclass
class SaveConfig:
    """What this project adds to Megatron's flags of checkpoints."""

    most_recent_k: int | None = None
    """Keep the newest K checkpoints in --save, and those that --save-retain-interval keeps; remove earlier ones when
    a newer is whole. What the run was loaded from stays, and so does best/. Default: keep all."""

    save_hook: str | None = None
    """A command to run, in the background, for each whole checkpoint in --save: an upload. Its folder is added as the
    last argument; CHECKPOINT_FOLDER and CHECKPOINT_STEP are set. Its output goes to save_hook.log in --save. A token
    belongs into the environment or a file, as other users of the machine see a command's words."""

    save_hook_minutes: float = 30.0
    """--save-hook is ended after so long, and the end of the run waits no longer for it."""


def check(args: Namespace) -> None:
    """Raise UsageError at settings that cannot work together."""
    for given in fields(SaveConfig):
        value = getattr(args, given.name)
        if value == given.default:
            continue
        if given.name == "save_hook":
            value = save_hook.shown(save_hook.parse(value))
        shown = f"--{given.name.replace('_', '-')} {value}"
        if args.save is None:
            raise UsageError(f"{shown}: only with --save")
        if args.ckpt_format != "torch_dist":
            raise UsageError(f"{shown}: needs --ckpt-format torch_dist, not {args.ckpt_format}")
        if given.name == "save_hook_minutes" and args.save_hook is None:
            raise UsageError(f"{shown}: only with --save-hook")
    keep, interval = args.save_retain_interval, args.save_interval
    if keep and interval and keep % interval:
        raise UsageError(f"--save-retain-interval {keep}: must be a multiple of --save-interval {interval}")


def hide_hook(args: Namespace) -> None:
    """Leave only the program of --save-hook in `args`, which are saved and logged; `save_hook` keeps its words."""
    if args.save_hook is not None:
        args.save_hook = save_hook.take(args.save_hook)


def check_on_rank(args: Namespace) -> None:
    """Raise UsageError on the rank that runs --save-hook, if it cannot."""
    if args.save_hook is not None and args.rank == 0:
        save_hook.check_can_run()
