"""The one error that a user is meant to read, and what others' errors come to in a line."""

import contextlib
import errno
import re
import traceback
from collections.abc import Iterator

# As gloo, NCCL (ncclRemoteError) and torch's store have it.
_GONE = re.compile(r"closed by peer|reset by peer|broken pipe|remote process exited", re.IGNORECASE)

# As torch has it, of a batch in /dev/shm.
_NO_SHARED_MEMORY = re.compile(r"(shared memory|/torch_\d).*No space left on device", re.DOTALL)


class UsageError(Exception):
    """What a user set cannot run. The message is the one line they read; exit code 2."""

    def __init__(self, message: str):
        # Names out of a damaged file may hold anything, a terminal's control codes among it.
        super().__init__("".join(c if c.isprintable() else " " for c in message))


def one_line(error: object, most: int = 300) -> str:
    """What an error of another library says, in one line of `most` characters."""
    return " ".join(str(error).split())[:most]


def reason(error: OSError, path: object = None) -> str:
    """What the system says, and of which file; `path` where it does not say that."""
    words, file = error.strerror or one_line(error), error.filename or path
    return f"{file}: {words}" if file else words


@contextlib.contextmanager
def refused_in_one_line(beginning: str) -> Iterator[None]:
    """How Megatron's code inside refuses a setting, by any kind of error, as a UsageError that begins so."""
    try:
        yield
    except UsageError:
        raise
    except (AssertionError, ValueError, RuntimeError) as error:
        refused = traceback.extract_tb(error.__traceback__)[-1].line  # an assertion without words
        raise UsageError(beginning + (one_line(error) or f"Megatron refused these flags: {refused}")) from error
    except (Exception, SystemExit) as error:
        raise UsageError(f"{beginning}Megatron refused it: {type(error).__name__}: {one_line(error)}") from error


def is_dead_data_worker(error: Exception) -> bool:
    """Whether it says that a process that loads data is gone; torch raises it wherever the rank stands."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid")


def is_full_shared_memory(error: Exception) -> bool:
    """Whether /dev/shm has no room, for a batch or for a semaphore, of which the system names no file."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC and not error.filename:
        frames = traceback.extract_tb(error.__traceback__)
        return any(frame.filename.endswith("multiprocessing/synchronize.py") for frame in frames)
    return isinstance(error, RuntimeError) and bool(_NO_SHARED_MEMORY.search(str(error)))


def is_lost_peer(error: Exception) -> bool:
    """Whether it only says that another rank is gone, whose own last words say why."""
    return isinstance(error, RuntimeError) and bool(_GONE.search(str(error)))
