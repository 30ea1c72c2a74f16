"""What follows a checkpoint that is whole, on the first rank: the user's hook, and the removal of earlier ones."""

from argparse import Namespace
from pathlib import Path

from megatron_cream.checkpoint import save_hook
from megatron_cream.checkpoint.retention import Retention
from megatron_cream.checkpoint.save_hook import SaveHook

_hook: SaveHook | None = None
_retention: Retention | None = None
_save_folder: Path | None = None


def install(args: Namespace, loaded: Path | None) -> None:
    """For each run anew.

    Args:
        args: Megatron's, with --save.
        loaded: the folder that the run starts from.
    """
    global _hook, _retention, _save_folder
    close()
    _save_folder = Path(args.save).resolve()
    if args.save_hook is not None:
        _hook = SaveHook(
            save_hook.get_command(), _save_folder / save_hook.LOG, 60 * args.save_hook_minutes, after=_prune
        )
    if args.most_recent_k or args.save_retain_interval:
        _retention = Retention(
            _save_folder,
            last=args.most_recent_k or 1,
            every=args.save_retain_interval,
            protected=[loaded] if loaded else [],
            busy=_hook.busy if _hook else set,
        )


def process_checkpoint(save: str, step: int, folder: Path) -> None:
    """Call when the tracker of `save` names this checkpoint. Returns at once."""
    if Path(save).resolve() != _save_folder:  # best/
        return
    if _hook:
        _hook.start(step, folder)
    _prune()


def close() -> None:
    """At the end of the run: wait for what goes on, as long as it may take."""
    global _hook, _retention, _save_folder
    if _hook:
        _hook.close()
    if _retention:
        _retention.close()
    _hook = _retention = _save_folder = None


def _prune() -> None:
    if _retention:
        _retention.prune()
