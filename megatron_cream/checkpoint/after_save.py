"""Run the user's hook and remove older checkpoints after each save, on the first rank."""

from argparse import Namespace
from pathlib import Path

from megatron_cream.checkpoint import save_hook
from megatron_cream.checkpoint.retention import Retention
from megatron_cream.checkpoint.save_hook import SaveHook

_hook: SaveHook | None = None
_retention: Retention | None = None
_save_folder: Path | None = None


def install(args: Namespace, loaded: Path | None) -> None:
    """Set up the hook and the retention of one run; a second call replaces the first.

    Args:
        args: Megatron's flags, with --save.
        loaded: step folder that the run starts from; it is never removed.
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
    """Start the hook and the removal of older checkpoints; return without waiting.

    Args:
        save: folder whose tracker names this checkpoint now.
        step: training step of the checkpoint.
        folder: step folder of the checkpoint.
    """
    if Path(save).resolve() != _save_folder:  # best/ has neither hook nor retention
        return
    if _hook:
        _hook.start(step, folder)
    _prune()


def close() -> None:
    """Wait for running hooks and removals at the end of the run, up to their time limits."""
    global _hook, _retention, _save_folder
    if _hook:
        _hook.close()
    if _retention:
        _retention.close()
    _hook = _retention = _save_folder = None


def _prune() -> None:
    if _retention:
        _retention.prune()
