"""The error for a user's mistakes, and one-line descriptions of other libraries' errors."""

import contextlib
import errno
import re
import traceback
from collections.abc import Iterator

# Wordings of gloo, NCCL (ncclRemoteError) and torch's store.
_LOST_PEER = re.compile(r"closed by peer|reset by peer|broken pipe|remote process exited", re.IGNORECASE)

# torch's wording when a batch does not fit into /dev/shm.
_NO_SHARED_MEMORY = re.compile(r"(shared memory|/torch_\d).*No space left on device", re.DOTALL)


# Wordings of torch's allocators, CUDA, NCCL, cuBLAS, the system and NumPy. InfiniBand's "ibv_..., Cannot allocate
# memory" is about the limit of locked memory (`ulimit -l`).
_NO_MEMORY = re.compile(
    r"out of memory|can't allocate memory|cannot allocate memory|not enough memory|STATUS_ALLOC_FAILED"
    r"|Unable to allocate \S+ \S+ for an array",
    re.IGNORECASE,
)


class UsageError(Exception):
    """A mistake in a setting or file. The command prints the message, one line, and exits with 2."""

    def __init__(self, message: str):
        # Names from a damaged file may contain terminal control codes.
        super().__init__("".join(c if c.isprintable() else " " for c in message))


class OtherWeights(UsageError):
    """A checkpoint lacks weights of the model, or has others; each rank finds it for its own part."""


class NotAvailable(UsageError):
    """What an evaluation needs is not here, such as data, a package, or a BOS; a suite leaves the evaluation out."""


def one_line(error: object, max_chars: int = 300) -> str:
    """Return an error's text as one line of at most `max_chars` characters."""
    return " ".join(str(error).split())[:max_chars]


def reason(error: OSError, path: object = None) -> str:
    """Return `FILE: MESSAGE` of a system error; `path` is the file if the error names none."""
    message, file = error.strerror or one_line(error), error.filename or path
    return f"{file}: {message}" if file else message


@contextlib.contextmanager
def convert_megatron_errors(prefix: str) -> Iterator[None]:
    """Convert any error in the block, which calls Megatron, to a UsageError with `prefix`."""
    try:
        yield
    except UsageError:
        raise
    except (AssertionError, ValueError, RuntimeError) as error:
        line = traceback.extract_tb(error.__traceback__)[-1].line  # for an assertion without a message
        raise UsageError(prefix + (one_line(error) or f"Megatron rejected these flags: {line}")) from error
    except (Exception, SystemExit) as error:
        raise UsageError(f"{prefix}Megatron rejected it: {type(error).__name__}: {one_line(error)}") from error


def is_dead_data_worker(error: Exception) -> bool:
    """Return whether the error reports that a data loader worker died.

    torch raises it from a signal handler, anywhere in the rank's code. A worker that dies while it hands over a batch
    ends the connection first.
    """
    if isinstance(error, OSError | EOFError):
        return _passed_through(error, "multiprocessing/resource_sharer.py")
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid")


def _passed_through(error: Exception, file: str) -> bool:
    return any(frame.filename.endswith(file) for frame in traceback.extract_tb(error.__traceback__))


def is_full_shared_memory(error: Exception) -> bool:
    """Return whether /dev/shm has no room for a batch or a semaphore.

    The system's error for a semaphore names no file.
    """
    if isinstance(error, OSError) and error.errno == errno.ENOSPC and not error.filename:
        return _passed_through(error, "multiprocessing/synchronize.py")
    return isinstance(error, RuntimeError) and bool(_NO_SHARED_MEMORY.search(str(error)))


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether Python, torch, a library under it or the system could not allocate memory of a GPU or of the host.

    For a GPU torch raises an error of its own, a RuntimeError; for the host a plain one. Python's own has no text.
    """
    text = str(error)
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, MemoryError) and not text:
        return True
    return isinstance(error, RuntimeError | MemoryError) and bool(_NO_MEMORY.search(text)) and "ibv_" not in text


def is_lost_peer(error: Exception) -> bool:
    """Return whether the error reports that a peer rank is gone.

    That rank's own error has the cause.
    """
    return isinstance(error, RuntimeError) and bool(_LOST_PEER.search(str(error)))
