"""The start and the end of every command: Ctrl-C, unwritable output, disabled assertions.

Scripts call `start` before their imports, which take seconds. So this module imports very little, not even `typing`.
"""

import errno
import gc
import io
import os
import signal
import sys
import warnings

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT, as shells have it."""
CLOSED_PIPE = 141
"""Exit code when the reader of standard output has closed the pipe (`| head`): 128 + SIGPIPE, as Unix tools have it."""

_main_runs = _interrupted = False
_pid = 0


def start() -> None:
    """Prepare the process; call this in the first lines of a script that is run, not imported."""
    global _pid
    _pid = os.getpid()
    gc.disable()  # until `run`: collections take a quarter of the imports' time and find nothing
    _open_closed_streams()
    sys.stdout = sys.__stdout__ = _stream(1, sys.stdout, lossy=False)  # pyright: ignore[reportArgumentType]
    sys.stderr = sys.__stderr__ = _stream(2, sys.stderr, lossy=True)  # pyright: ignore[reportArgumentType]
    if sys.flags.optimize:
        problem = "switches off the checks that Megatron makes with assert; run Python without it"
        print(f"{_name()}: error: python -O or PYTHONOPTIMIZE: {problem}", file=sys.stderr)
        os._exit(2)
    # Of libraries that Python compiles at their first import.
    warnings.filterwarnings("ignore", category=SyntaxWarning, module=r".*[/\\](site|dist)-packages[/\\]")
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell ignores it for a job started with &
        signal.signal(signal.SIGINT, _interrupt)
        sys.unraisablehook = _exit_on_lost_interrupt


def run(main) -> None:
    """Run `main()` and exit with its code; report an interrupt or a failed write in one line."""
    global _main_runs
    gc.freeze()  # imported objects stay alive: later collections skip them
    gc.enable()
    code: int | str | None = 0
    try:
        try:
            _main_runs = True
            code = main()
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            if not _interrupted:  # if interrupted, an extension module may have turned KeyboardInterrupt into this
                raise
            code = _report_interrupt()
        finally:
            _main_runs = False
    except KeyboardInterrupt:  # raised in the except or finally clause above
        _main_runs, code = False, _report_interrupt()
    if _interrupted and code:
        code = INTERRUPTED
    raw = _raw(sys.__stdout__)
    try:
        sys.stdout.flush()
    except SystemExit as lost:
        code = lost.code
    sys.exit(raw.code or code if raw else code)


def ignore_lost_output() -> None:
    """Drop unwritable output from now on, so that a run survives a closed terminal."""
    if raw := _raw(sys.__stdout__):
        raw.lossy = True


class _Raw(io.FileIO):
    """The file behind standard output or standard error.

    A failed write ends the command, with one line on standard error unless the reader has closed the pipe. It raises
    SystemExit: callers would take an OSError for a fault of one of the command's own files.
    """

    def __init__(self, fd: int, lossy: bool):
        super().__init__(fd, "w", closefd=False)
        self.lossy, self.code = lossy, 0

    def write(self, data) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            if self.lossy:
                return len(data)
            self.lossy = True  # what is still in buffers must not raise again
            self.code = CLOSED_PIPE if error.errno == errno.EPIPE else 2
            if self.code == 2:
                print(f"{_name()}: error: standard output: {error.strerror}", file=sys.stderr)
            raise SystemExit(self.code) from None


def _stream(fd: int, like: io.TextIOWrapper | None, lossy: bool) -> io.TextIOWrapper:
    """Return a text stream to `fd` with the buffering of Python's own stream `like`."""
    raw = _Raw(fd, lossy)
    unbuffered = like is not None and like.write_through  # python -u
    if like is not None:
        like.flush()
    return io.TextIOWrapper(
        raw if unbuffered else io.BufferedWriter(raw),
        encoding=like.encoding if like is not None else "utf-8",
        errors="backslashreplace",  # file names need not be UTF-8
        line_buffering=lossy or raw.isatty(),
        write_through=unbuffered,
    )


def _raw(stream: object) -> _Raw | None:
    """Return the `_Raw` behind a stream; None for a stream that `start` did not open."""
    buffer = getattr(stream, "buffer", None)
    found = getattr(buffer, "raw", buffer)
    return found if isinstance(found, _Raw) else None


def _open_closed_streams() -> None:
    """Open closed standard streams, so that no other file gets their descriptors.

    Writes to them still fail, as before.
    """
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_WRONLY if fd == 0 else os.O_RDONLY)  # gets the lowest free number


def _interrupt(_number, _frame) -> None:
    global _interrupted
    if os.getpid() != _pid:  # a fork before it sets its own handler; its parent reports the interrupt
        os._exit(INTERRUPTED)
    if _main_runs:
        _interrupted = True
        raise KeyboardInterrupt
    # During imports and at Python's exit, an exception could turn into another error or be lost.
    _report_interrupt()
    os._exit(INTERRUPTED)


def _exit_on_lost_interrupt(unraisable) -> None:
    """Exit on an interrupt inside a destructor or callback; a `sys.unraisablehook`."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        _report_interrupt()
        os._exit(INTERRUPTED)
    sys.__unraisablehook__(unraisable)


def _report_interrupt() -> int:
    """Print that the command was interrupted, on rank 0 only; return the exit code."""
    if os.environ.get("RANK", "0") == "0":
        # Not through sys.stderr: the signal may have arrived in the middle of one of its writes.
        try:
            os.write(2, f"{_name()}: interrupted\n".encode())
        except OSError:
            pass
    return INTERRUPTED


def _name() -> str:
    return os.path.basename(sys.argv[0])


def _run_command(name: str) -> None:
    """Run a module of `commands`; console scripts call this."""
    start()  # before the imports, which take seconds
    from importlib import import_module

    run(import_module(f"megatron_cream.commands.{name}").main)


def convert() -> None:
    """Run megatron-cream-convert."""
    _run_command("convert")


def evaluate() -> None:
    """Run megatron-cream-evaluate."""
    _run_command("evaluate")


def plan() -> None:
    """Run megatron-cream-plan."""
    _run_command("plan")


def preprocess() -> None:
    """Run megatron-cream-preprocess."""
    _run_command("preprocess")


def plot_positions() -> None:
    """Run megatron-cream-plot-positions."""
    _run_command("plot_positions")
