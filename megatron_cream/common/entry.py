"""What every command does first and last: Ctrl-C in one line, output that takes no words, Python without assertions.

`start` comes before the imports, which take seconds, so this module imports next to nothing, not even `typing`.
"""

import errno
import gc
import io
import os
import signal
import sys

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT, as of a shell."""
CLOSED_PIPE = 141
"""Exit code when the reader of standard output has left (`| head`): 128 + SIGPIPE, as of other Unix tools."""

_main_runs = _interrupted = False
_pid = 0


def start() -> None:
    """Prepare the process. Call it in a script's first lines, if that is run and not imported."""
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
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where a shell has it ignored, as with &
        signal.signal(signal.SIGINT, _interrupt)
        sys.unraisablehook = _exit_on_lost_interrupt


def run(main) -> None:
    """Exit with what `main()` returns, or in one line where it was interrupted or its words could not be written."""
    global _main_runs
    gc.freeze()  # what was imported stays: later collections need not look at it
    gc.enable()
    code: int | str | None = 0
    try:
        try:
            _main_runs = True
            code = main()
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            if not _interrupted:  # else an extension module may have made another error of it
                raise
            code = _say_interrupted()
        finally:
            _main_runs = False
    except KeyboardInterrupt:  # in the last lines above
        _main_runs, code = False, _say_interrupted()
    if _interrupted and code:
        code = INTERRUPTED
    raw = _raw(sys.__stdout__)
    try:
        sys.stdout.flush()
    except SystemExit as lost:
        code = lost.code
    sys.exit(raw.code or code if raw else code)


def ignore_lost_output() -> None:
    """Drop what standard output does not take, from now on: a training run outlives the place its words go to."""
    if raw := _raw(sys.__stdout__):
        raw.lossy = True


class _Raw(io.FileIO):
    """A standard stream of the system's.

    A write that fails ends the command, in one line on standard error unless a reader has closed its pipe. That is by
    SystemExit, since an OSError would be taken for one of the command's own files by what is in between.
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
            self.lossy = True  # for what is still in buffers
            self.code = CLOSED_PIPE if error.errno == errno.EPIPE else 2
            if self.code == 2:
                print(f"{_name()}: error: standard output: {error.strerror}", file=sys.stderr)
            raise SystemExit(self.code) from None


def _stream(fd: int, like: io.TextIOWrapper | None, lossy: bool) -> io.TextIOWrapper:
    """A text stream to `fd`, buffered as Python's own is."""
    raw = _Raw(fd, lossy)
    unbuffered = like is not None and like.write_through  # python -u
    if like is not None:
        like.flush()
    return io.TextIOWrapper(
        raw if unbuffered else io.BufferedWriter(raw),
        encoding=like.encoding if like is not None else "utf-8",
        errors="backslashreplace",  # names of files need not be UTF-8
        line_buffering=lossy or raw.isatty(),
        write_through=unbuffered,
    )


def _raw(stream: object) -> _Raw | None:
    buffer = getattr(stream, "buffer", None)
    found = getattr(buffer, "raw", buffer)
    return found if isinstance(found, _Raw) else None


def _open_closed_streams() -> None:
    """Else the next file that is opened would be standard output. Writing to these fails still, as it did."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_WRONLY if fd == 0 else os.O_RDONLY)  # takes the lowest number that is free


def _interrupt(_number, _frame) -> None:
    global _interrupted
    if os.getpid() != _pid:  # a fork that has not set its own handler yet; its parent says it
        os._exit(INTERRUPTED)
    if _main_runs:
        _interrupted = True
        raise KeyboardInterrupt
    # While modules are imported, or at Python's end: what is raised there comes out as any error, or is lost.
    _say_interrupted()
    os._exit(INTERRUPTED)


def _exit_on_lost_interrupt(unraisable) -> None:
    """For `sys.unraisablehook`: an interrupt inside a destructor or callback, where nothing can be raised."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        _say_interrupted()
        os._exit(INTERRUPTED)
    sys.__unraisablehook__(unraisable)


def _say_interrupted() -> int:
    if os.environ.get("RANK", "0") == "0":
        # Not by sys.stderr: a handler may have come in the middle of one of its writes.
        try:
            os.write(2, f"{_name()}: interrupted\n".encode())
        except OSError:
            pass
    return INTERRUPTED


def _name() -> str:
    return os.path.basename(sys.argv[0])


def _run_command(name: str) -> None:
    """Run a module of `commands` as an installed program, whose file pip makes."""
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
