"""Continue training with a one-line warning when a checkpoint cannot be written.

The previous checkpoint is kept. Megatron ends the run when a shard cannot be written. It hangs when only one rank
fails, at creating the folder, `.metadata`, `metadata.json` or the tracker, because the others wait for it in a
collective. Here each rank keeps its error until all ranks reach a point where they can exchange errors. Only then is
the step written to the tracker.
"""

import contextlib
import functools
import io
import logging
import os
import queue
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.training import checkpointing, training
from torch.distributed.checkpoint import CheckpointException

from megatron_cream.checkpoint import after_save, host_memory, staging
from megatron_cream.checkpoint.output import TRACKER
from megatron_cream.common import devices, files
from megatron_cream.common.errors import one_line
from megatron_cream.common.safe_pickle import to_plain
from megatron_cream.distributed import watchdog
from megatron_cream.distributed.rendezvous import find_first_reason
from megatron_cream.patches import async_writer, hooks, registry


class SaveFailed(Exception):
    """A checkpoint could not be written; the message is the one line for the user."""


@dataclass
class _SaveState:
    """The saves of one run.

    report: prints a line for the user, on one rank.
    save_folder: --save, which the first rank has locked.
    saved_steps: folder of checkpoints -> the last step that this run saved there.
    failed: folder of checkpoints -> why its newest save failed.
    leftovers: incomplete step folders that could not be removed.
    error: this rank's error in the current save, until all ranks have exchanged errors.
    step, folder: training step and step folder of the current save.
    all_written: all ranks have written everything of the current save except the tracker.
    """

    report: Callable[[str], None] = print
    save_folder: Path | None = None
    saved_steps: dict[str, int] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    leftovers: set[Path] = field(default_factory=set)
    error: str = ""
    step: int = 0
    folder: Path | None = None
    all_written: bool = False


_state = _SaveState()


def install(report: Callable[[str], None], save_folder: Path | None) -> None:
    """Install the replacements of Megatron's functions; call before each run's `pretrain`.

    Args:
        report: prints a line for the user.
        save_folder: --save, on the first rank, which checks that it is still there.
    """
    global _state
    _state = _SaveState(report=report, save_folder=save_folder)
    registry.install(hooks.SAVE_CHECKPOINT, _save_checkpoint)
    registry.install(hooks.FINALIZE_SAVE, _finalize_save)
    registry.install(hooks.SCHEDULE_SAVE, _schedule_save)
    registry.install(hooks.SAVED_ARGS, _make_args_plain)
    registry.install(hooks.SAVE_SHARDS, _agree_before_tracker)
    registry.install(hooks.SAVE_CONFIG, _keep_error)
    registry.install(hooks.WRITE_METADATA, _keep_error)
    registry.install(hooks.WRITE_SHARDS, _report_write_errors)
    registry.install(hooks.WRITER_IS_DONE, _detect_dead_writer)
    registry.install(hooks.CALL_WRITER, _replace_dead_writer)


def check_last_save() -> None:
    """Raise SaveFailed on every rank if the last checkpoint could not be written.

    Call on every rank at the end of training, when all asynchronous saves have ended.
    """
    for why in _state.failed.values():
        raise SaveFailed(f"the last checkpoint is missing: {why}")


def has_failed(folder: str) -> bool:
    """Tell whether the last finished save in this folder failed."""
    return os.path.realpath(folder) in _state.failed


# In the training process, on all ranks.


def _save_checkpoint(original, iteration, *args, **kwargs):
    training.maybe_finalize_async_save(blocking=True)  # all saves share one result queue, so run one at a time
    settings = checkpointing.get_args()
    if settings.save is None or _is_already_saved(settings, iteration):
        return None  # the rerun state machine asks any run; a finished run, restarted, would overwrite its last one
    folder = _step_folder(settings.save, iteration)
    _state.step, _state.folder, _state.all_written = iteration, folder, False
    with watchdog.watch_save(folder):
        why = find_first_reason(_make_empty_folder(folder) if settings.rank == 0 else "") or find_first_reason(
            _probe_write(folder, settings.rank) or _find_memory_shortage(settings, args[0])
        )
        if not why:
            try:
                original(iteration, *args, **kwargs)
                mine = ""
            except (CheckpointException, SaveFailed) as error:
                mine = _reason(error)
            except OSError as error:
                if not _state.all_written:
                    raise  # this rank left a collective that the others wait in: the run cannot continue
                # The tracker was not written; the other ranks wait at the last barrier of Megatron's function.
                mine = _reason_with_rank(error)
                torch.distributed.barrier()
            why = find_first_reason(mine)
            if settings.async_save and not why:
                return None  # `_schedule_save` does the rest
        _conclude_save(settings, iteration, why)


def _make_args_plain(original, *args, **kwargs):
    """Save the flags as plain values, which need no classes of this process."""
    state = original(*args, **kwargs)
    state["args"] = to_plain(state["args"])
    return state


def _is_already_saved(settings, step: int) -> bool:
    """Tell whether this run has saved the step already, or was loaded from it."""
    folder = os.path.realpath(settings.save)
    loaded = settings.load and os.path.realpath(settings.load) == folder and not settings.finetune
    return _state.saved_steps.get(folder) == step or bool(loaded and step and getattr(settings, "iteration", 0) == step)


def _make_empty_folder(folder: Path) -> str:
    """Create an empty step folder; return why it failed, or ""."""
    if gone := _find_lost_folder():
        return gone
    try:
        _remove_leftovers()
        if folder.exists() and not _is_tracked(folder):
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        return ""
    except OSError as error:
        return _reason_with_rank(error)


def _find_lost_folder() -> str:
    """Return an error if --save is no longer the folder that this run opened, or ""."""
    if _state.save_folder is None or files.is_locked_folder(_state.save_folder):
        return ""
    return f"{_state.save_folder} is not the folder that this run opened: it was unmounted, moved or deleted"


def _remove_leftovers() -> None:
    for path in list(_state.leftovers):
        if not _is_tracked(path):
            shutil.rmtree(path, ignore_errors=True)
        if not path.is_dir():
            _state.leftovers.remove(path)


def _probe_write(folder: Path, rank: int) -> str:
    """Write and remove a small file in the folder; return why it failed, or "".

    It runs before the collectives of a save, because a rank that fails inside them leaves the others waiting.
    """
    path = folder / f".writable.{rank}"
    try:
        path.write_bytes(b"\0" * 4096)
        path.unlink()
        return ""
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink()
        return _reason_with_rank(error)


def _find_memory_shortage(settings, model: list[torch.nn.Module]) -> str:
    if not settings.use_distributed_optimizer or settings.no_save_optim:
        return ""
    if settings.async_save and staging.has_memory():
        return ""
    on_host = not devices.has_cuda() or settings.optimizer_cpu_offload
    why = host_memory.find_shortage(
        sum(weight.numel() for chunk in model for weight in chunk.parameters() if weight.requires_grad),
        ranks=host_memory.count_local_ranks(),
        data_parallel=parallel_state.get_data_parallel_world_size(with_context_parallel=True),
        in_shared_memory=settings.async_save and on_host,
    )
    return f"{why} (rank {settings.rank})" if why else ""


def _agree_before_tracker(original, *args, **kwargs):
    request = original(*args, **kwargs)
    if request is None:
        _raise_kept_error()
    else:
        request.finalize_fns.append(_raise_kept_error)
    return request


def _raise_kept_error() -> None:
    error, _state.error = _state.error, ""
    if why := find_first_reason(error):
        raise SaveFailed(why)
    _state.all_written = True


def _keep_error(original, *args, **kwargs):
    """Keep the OSError of a function that only the first rank runs while the others wait."""
    try:
        return original(*args, **kwargs)
    except OSError as error:
        _state.error = _state.error or _reason_with_rank(error)


def _schedule_save(original, request):
    """Combine all final steps of an asynchronous save into one function that does not raise."""
    settings = checkpointing.get_args()
    steps, step = list(request.finalize_fns), _state.step

    def finish() -> None:
        mine = ""
        try:
            for function in steps:
                function()
        except (CheckpointException, SaveFailed) as error:
            mine = _reason(error)
        except OSError as error:
            mine = _reason_with_rank(error)
        _conclude_save(settings, step, find_first_reason(mine))

    return original(request._replace(finalize_fns=[finish]))


def _finalize_save(original, *args, **kwargs):
    with watchdog.watch_save(_state.folder) if kwargs.get("blocking") else contextlib.nullcontext():
        return original(*args, **kwargs)


def _conclude_save(settings, step: int, why: str) -> None:
    """Record a save on all ranks, and report and remove it if it failed; `why` is "" if not."""
    place, folder = os.path.realpath(settings.save), _step_folder(settings.save, step)
    if not why:
        _state.saved_steps[place] = step
        _state.failed.pop(place, None)
        if settings.rank == 0:
            after_save.process_checkpoint(settings.save, step, folder)
        return
    _state.failed[place] = f"step {step}, {folder}: {why}"
    if settings.rank != 0:
        return
    if _find_lost_folder():
        return _state.report(f"warning: no checkpoint of step {step}: {why}")
    if not _is_tracked(folder):
        shutil.rmtree(folder, ignore_errors=True)
        if folder.is_dir():
            _state.leftovers.add(folder)
    step_before = _read_tracker(folder.parent)
    newest = f"the newest checkpoint is that of step {step_before}" if step_before else "there is none yet"
    _state.report(f"warning: no checkpoint of step {step} in {folder}: {why}; {newest}")


def _is_tracked(folder: Path) -> bool:
    """Tell whether the tracker names this step folder, so that a run would resume from it."""
    return folder.name == f"iter_{_read_tracker(folder.parent):0>7}"


def _read_tracker(save: Path) -> str:
    """Return the step that the tracker names, or ""."""
    tracker = save / TRACKER
    return tracker.read_text().strip() if tracker.is_file() else ""


def _step_folder(save: str | Path, step: int) -> Path:
    return Path(checkpointing.get_checkpoint_name(str(save), step, return_base_dir=True))


def _reason_with_rank(error: OSError) -> str:
    return f"{_reason(error)} (rank {torch.distributed.get_rank()})"


def _reason(error: BaseException) -> str:
    """Return a short reason: the system's error message if there is one among the causes."""
    if isinstance(error, CheckpointException):
        said = [f"{_reason(wrapped[0])} (rank {rank})" for rank, wrapped in sorted(error.failures.items())]
        return said[0] if said else ""  # only the first rank gets the failures
    behind = error
    while behind is not None:
        if isinstance(behind, OSError) and behind.strerror:
            return behind.strerror
        behind = behind.__cause__ or behind.__context__
    return one_line(error).removeprefix("Worker failure: ") or type(error).__name__


# In the writer process.


def _report_write_errors(original, self):
    write, preload, arguments = original(self)
    if preload and not checkpointing.get_args().async_save:
        # Not to pinned memory: torch would round it up to powers of two and keep it until the run ends.
        preload = functools.partial(self.preload_tensors, self.write_buckets, non_blocking=False)
    return (functools.partial(_write, write) if write else None), preload, arguments


def _write(write: Callable, rank: int, buckets: list, results) -> None:
    """Write shards, and put the result or the reason of a failure into `results`.

    Megatron reports only the type of a failed write, or nothing at all.
    """
    answer, errors = queue.SimpleQueue(), []
    with _keep_write_errors(errors):
        try:
            write(rank, buckets, answer)
        except Exception as error:
            errors.append(error)
    results.put(RuntimeError(_reason(errors[0])) if errors else answer.get())


@contextlib.contextmanager
def _keep_write_errors(errors: list[Exception]) -> Iterator[None]:
    """Collect failed writes in `errors` and hide them from torch.

    torch would raise while it holds the buffer of a BytesIO, in a reference cycle; CPython 3.12.1 has crashed on
    collecting it.
    """

    def write(original, *args, **kwargs):
        written = original(*args, **kwargs)
        if isinstance(written[1], Exception):  # from the last flush of a file
            errors.append(written[1])
        return written

    def open_shard(original, path, mode):
        return io.BufferedWriter(_ErrorKeepingShard(path, mode, errors))

    logger = logging.getLogger(FileSystemWriterAsync.__module__)
    logger.addFilter(_drop_record)  # it would repeat the error in four lines
    try:
        with registry.override(hooks.WRITE_BUCKET, write), registry.override(hooks.OPEN_SHARD, open_shard):
            yield
    finally:
        logger.removeFilter(_drop_record)


def _drop_record(record: logging.LogRecord) -> bool:
    return False


class _ErrorKeepingShard(io.FileIO):
    """A file that discards all data after a write has failed."""

    def __init__(self, path: str, mode: str, errors: list[Exception]):
        super().__init__(path, mode)
        self._errors = errors

    def write(self, data) -> int:
        if not self._errors:
            try:
                return super().write(data)
            except OSError as error:
                self._errors.append(error)
        return len(data)


def _detect_dead_writer(original, self, blocking: bool = False, no_dist: bool = False):
    """End the save of a writer process that was killed, since it never answers."""
    while self.cur_item is None and self.process is not None:
        alive = self.process.is_alive()  # before reading the queue: the result of a writer that ended is in it
        with contextlib.suppress(queue.Empty):
            self.cur_item = self._persistent_comp_q.get(timeout=0.1 if blocking else 0.001)
        if self.cur_item is None and not alive:
            self.cur_item = -1
            async_writer.forget_writer(self)
        if not blocking:
            break
    return original(self, blocking, no_dist)


def _replace_dead_writer(original, self, request) -> None:
    if self.process is not None and not self.process.is_alive():
        async_writer.forget_writer(self)
    original(self, request)
