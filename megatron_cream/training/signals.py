"""SIGTERM and SIGUSR1 end a run at its next step, with a checkpoint; so does the end of its torchrun (`launcher`).

A cluster gives a short time before it takes the machines away. Megatron's handler knows one signal
(--exit-signal, SIGTERM); Slurm's warning is mostly SIGUSR1. torchrun passes SIGTERM on, and kills what is left 30
seconds later; of SIGUSR1 it dies, unless it was told to pass that on too (--signals_to_handle).
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
    """Call before the flags are parsed, when Megatron makes its handler; each worker that loads data gets one too."""
    registry.install(hooks.SIGNAL_HANDLER, _both_signals)
    registry.install(hooks.SIGNALS_RECEIVED, _remember)
    registry.install(hooks.RENDEZVOUS, _end_while_waiting)


def _end_while_waiting(original, *args, **kwargs):
    with waiting_for_peers():
        return original(*args, **kwargs)


def _both_signals(original, self):
    entered = original(self)
    if get_worker_info() is not None:
        _hear_the_rank_alone({self.sig, signal.SIGUSR1})
        registry.install(hooks.LOST_BATCH, _end_with_a_lost_batch)
        return entered

    def handler(number, _frame):
        self._signal_received = number  # gathered from all ranks as an integer

    for number in (self.sig, signal.SIGUSR1):
        signal.signal(number, handler)
    return entered


def _hear_the_rank_alone(signals: set[signal.Signals]) -> None:
    """In a worker that loads data: a cluster's signals and Ctrl-C are nothing to it, as the rank needs it to the end.

    The rank's own signal ends it, which Python sends when that ends, and then waits; so does the rank's death.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent(parent=multiprocessing.parent_process().pid)

    def listen():
        while signal.sigwaitinfo(signals).si_pid != os.getppid():
            pass
        os._exit(0)

    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    threading.Thread(target=listen, daemon=True).start()


def _end_with_a_lost_batch(original, error: Exception, _batch) -> None:
    """In a worker whose batch cannot be sent: by itself it would drop the batch, for which the rank waits for ever."""
    if not is_full_shared_memory(error):
        traceback.print_exc()
    os._exit(1)  # the rank says so


def _remember(original, self):
    global _received
    numbers = original(self)
    _received = max(numbers)
    return numbers


@contextlib.contextmanager
def leaving(args: Namespace, say: Callable[[str], None]) -> Iterator[None]:
    """Check the last checkpoint at the end; after a signal, report and set the exit code.

    Args:
        args: Megatron's.
        say: prints a line where a person reads, on rank 0.

    Raises:
        SaveFailed: the last checkpoint could not be written.
    """
    global _received
    _received = 0
    try:
        yield
    except SystemExit as left:
        saving.check_last_save()
        if not left.code and _received and args.rank == 0:
            say(f"{signal.Signals(_received).name}: {_what_is_saved(args)}")
        if not left.code and _received:
            raise SystemExit(args.signal_exit_code) from left
        raise
    saving.check_last_save()


def _what_is_saved(args: Namespace) -> str:
    if not args.save:
        return "ended; nothing is saved, as there is no --save"
    step = (Path(args.save) / TRACKER).read_text()
    same = args.load and Path(args.load) == Path(args.save)
    command = "the same command" if same else f"the same command with --load {args.save}"
    return f"step {step} is saved in {args.save}; {command} goes on from there"
