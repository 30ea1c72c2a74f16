"""Commands that a user is advised to run next."""

import shlex
import sys
from pathlib import Path

_INSTALLED = {
    "convert_hf": "megatron-cream-convert",
    "evaluate": "megatron-cream-evaluate",
    "plan": "megatron-cream-plan",
    "preprocess_data": "megatron-cream-preprocess",
}
"""{tool: its program in an installed package}."""


def command_line(tool: str, *words: str | Path, torchrun: tuple[str, ...] = ("--nproc_per_node=1",)) -> str:
    """Return a command that works from the folder where this process was started.

    Args:
        tool: a file of tools/ without its suffix, or "pretrain_cream".
        words: flags and values; quoted where a shell needs it.
        torchrun: the flags of torchrun, which starts pretrain_cream.
    """
    script = Path(sys.argv[0])
    root = script.parent.parent if script.parent.name == "tools" else script.parent
    checkout = (root / "tools" / "convert_hf.py").is_file()
    if tool == "pretrain_cream":
        start = ["torchrun", *torchrun, *([root / "pretrain_cream.py"] if checkout else ["-m", tool])]
    elif checkout:
        start = ["python", root / "tools" / f"{tool}.py"]
    else:
        start = [_INSTALLED[tool]]
    return shlex.join(map(str, [*start, *words]))


def plan_command(ranks: int | str, *words: str) -> str:
    """Return the command that lists the layouts that fit on as many GPUs; it needs the flags of the run besides."""
    return f"{command_line('plan', '--gpus', str(ranks), *words)} with the flags of this run"


def export_command(checkpoint: str | Path, *words: str) -> str:
    """Return the command that writes a checkpoint as a Hugging Face folder beside it."""
    return command_line("convert_hf", "export", "--checkpoint", checkpoint, *words, "--hf-path", f"{checkpoint}-hf")


def evaluation_command(model: str | Path, positions: int, *words: str) -> str:
    """Return the command that tests a Hugging Face folder or a checkpoint up to its last position."""
    lengths = ["--min-length", str(min(1024, positions)), "--max-length", str(positions)]
    return command_line("evaluate", "needle", "--model", model, *words, *lengths)
