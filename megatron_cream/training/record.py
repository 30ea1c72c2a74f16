"""The record of a run: command, settings, versions, commit, machine, environment."""

import itertools
import os
import platform as system
import re
import subprocess
import time
from argparse import Namespace
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_cream.common import devices
from megatron_cream.common.files import atomic_write
from megatron_cream.common.versions import find_versions
from megatron_cream.config.recipe import locate

_PACKAGES = (
    "megatron-core",
    "torch",
    "triton",
    "transformer-engine",
    "flash-attn-4",
    "flash-attn",
    "transformers",
    "safetensors",
    "sentencepiece",
    "numpy",
)
# Prefixes of the environment variables that change how a run computes or communicates.
_ENVIRONMENT = (
    "CUDA",
    "CUBLAS",
    "CUDNN",
    "NCCL",
    "NVTE",
    "TORCH",
    "PYTORCH",
    "TRITON",
    "GLOO",
    "OMP",
    "MKL",
    "SLURM_JOB",
)


_SECRET = re.compile("KEY|TOKEN|SECRET|PASS|CREDENTIAL", re.IGNORECASE)
_USER_OF_URL = re.compile(r"(?<=://)[^/@\s]+(?=@)")


def write(args: Namespace, argv: list[str]) -> Path:
    """Write SAVE/runs/TIME.yaml, one file for each start of the run.

    Args:
        args: Megatron's.
        argv: the command line, without the program.
    """
    folder = Path(args.save) / "runs"
    folder.mkdir(parents=True, exist_ok=True)
    name = time.strftime("%Y%m%d-%H%M%S")
    # The name may exist: two starts within a second, or a clock that was set back.
    path = next(path for i in itertools.count() if not (path := folder / f"{name}{f'.{i}' if i else ''}.yaml").exists())
    with atomic_write(path) as file:
        yaml.safe_dump(describe(args, argv), file, sort_keys=False, default_flow_style=None)
    return path


def describe(args: Namespace, argv: list[str]) -> dict[str, Any]:
    """Return the record as plain values; arguments as for `write`."""
    return {
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": ["pretrain_cream.py", *_command(argv, args.save_hook)],
        "recipe": _recipe(locate(args.config)) if args.config else None,
        "seed": args.seed,
        "versions": find_versions(_PACKAGES),
        "commit": _commit(),
        "machine": {
            "system": system.platform(),
            "gpu": torch.cuda.get_device_name() if devices.has_cuda() else None,
            "cuda": torch.version.cuda,
            "ranks": args.world_size,
        },
        "environment": {
            name: _plain(value)
            for name, value in sorted(os.environ.items())
            if name.startswith(_ENVIRONMENT) and not _SECRET.search(name)
        },
        "settings": {name: _plain(value) for name, value in sorted(vars(args).items())},
    }


def _command(argv: list[str], hook: str | None) -> list[str]:
    """Return the command line; of --save-hook only the program, as the rest may be secret."""
    shown = []
    for word in argv:
        if shown and shown[-1] == "--save-hook":
            word = str(hook)
        elif word.startswith("--save-hook="):
            word = f"--save-hook={hook}"
        shown.append(_plain(word))
    return shown


def _recipe(path: Path) -> str:
    """Return the text of the recipe; without save_hook, if it sets one."""
    text = path.read_text()
    values = yaml.safe_load(text)
    kept = {key: value for key, value in values.items() if key not in ("save_hook", "save-hook")}
    return _plain(text if len(kept) == len(values) else yaml.safe_dump(kept, sort_keys=False))


def _commit() -> dict[str, Any] | None:
    """Return the commit of the checkout that this package runs from; None if it is installed."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).resolve().parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        return {"id": git("rev-parse", "HEAD"), "changed": git("status", "--porcelain", "--untracked-files=no") != ""}
    except (OSError, subprocess.SubprocessError):
        return None


def _plain(value: Any) -> Any:
    """Return a value that YAML can write, without passwords in URLs; objects become text."""
    if isinstance(value, Enum):  # first: some are numbers too
        return value.name
    if isinstance(value, str):
        return _USER_OF_URL.sub("***", value)
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(item) for item in value]
    return str(value)
