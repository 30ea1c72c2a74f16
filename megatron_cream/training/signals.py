"""SIGTERM and SIGUSR1 save a checkpoint after the current step and end the run.

So does the death of torchrun (`launcher`). A cluster gives a short time before it takes the machines away. Megatron
handles one signal (--exit-signal, SIGTERM); Slurm mostly warns with SIGUSR1. torchrun forwards SIGTERM and kills the
remaining processes 30 seconds later. SIGUSR1 kills torchrun itself unless --signals_to_handle names it.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

from torch.utils.data import get_worker_info

from megatron_cream.checkpoint import saving
from megatron_cream.checkpoint.output import TRACKER
from megatron_cream.common.errors import is_full_shared_memory
from megatron_cream.common.processes import end_with_parent
from megatron_cream.distributed.launcher import waiting_for_peers
from megatron_cream.patches import hooks, registry

_received = 0


def install() -> None:
    """Install the handlers, also in data loader workers.

    Call it before the flags are parsed, when Megatron creates its own handler.
    """
    registry.install(hooks.SIGNAL_HANDLER, _handle_sigusr1_too)
    registry.install(hooks.SIGNALS_RECEIVED, _record_signal)
    registry.install(hooks.RENDEZVOUS, _exit_while_waiting)


def _exit_while_waiting(original, *args, **kwargs):
    """End on a signal while the rank waits for its peers."""
    with waiting_for_peers():
        return original(*args, **kwargs)


def _handle_sigusr1_too(original, self):
    """Handle SIGUSR1 like Megatron's own signal; in a data loader worker, ignore both."""
    entered = original(self)
    if get_worker_info() is not None:
        _ignore_signals_of_others({self.sig, signal.SIGUSR1})
        registry.install(hooks.LOST_BATCH, _exit_on_lost_batch)
        return entered

    def handler(number, _frame):
        self._signal_received = number  # gathered from all ranks as an integer

    for number in (self.sig, signal.SIGUSR1):
        signal.signal(number, handler)
    return entered


def _ignore_signals_of_others(signals: set[signal.Signals]) -> None:
    """Ignore Ctrl-C and signals of the cluster in a data loader worker.

    The rank needs the worker until its end. The worker ends on a signal from its rank, which Python sends when the rank
    ends, and when the rank dies.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent(parent=multiprocessing.parent_process().pid)

    def listen():
        while signal.sigwaitinfo(signals).si_pid != os.getppid():
            pass
        os._exit(0)

    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    threading.Thread(target=listen, daemon=True).start()


def _exit_on_lost_batch(original, error: Exception, _batch) -> None:
    """End a data loader worker whose batch cannot be sent.

    torch would drop the batch, and the rank would hang.
    """
    if not is_full_shared_memory(error):
        traceback.print_exc()
    os._exit(1)  # the rank reports it


def _record_signal(original, self):
    """Remember the signals that Megatron has gathered from all ranks."""
    global _received
    numbers = original(self)
    _received = max(numbers)
    return numbers


@contextlib.contextmanager
def exit_on_signal(args: Namespace, say: Callable[[str], None]) -> Iterator[None]:
    """Check the last checkpoint at the end; after a signal, report it and set the exit code.

    Args:
        args: Megatron's.
        say: prints a line on the terminal; called on rank 0.

    Raises:
        SaveFailed: the last checkpoint could not be written.
    """
    global _received
    _received = 0
    try:
        yield
    except SystemExit as stop:
        saving.check_last_save()
        if not stop.code and _received and args.rank == 0:
            say(f"{signal.Signals(_received).name}: {_describe_saved(args)}")
        if not stop.code and _received:
            raise SystemExit(args.signal_exit_code) from stop
        raise
    saving.check_last_save()


def _describe_saved(args: Namespace) -> str:
    """Return what is saved, and how to resume."""
    if not args.save:
        return "ended; nothing is saved, since there is no --save"
    step = (Path(args.save) / TRACKER).read_text()
    same = args.load and Path(args.load) == Path(args.save)
    command = "the same command" if same else f"the same command with --load {args.save}"
    return f"step {step} is saved in {args.save}; {command} resumes from it"
