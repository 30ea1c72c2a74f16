"""What a run was, kept in its folder: the command, every setting, versions, commit, machine, environment."""

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
    "megatron-core", "torch", "triton", "transformer-engine", "flash-attn-4", "flash-attn", "transformers",
    "safetensors", "sentencepiece", "numpy",
)  # fmt: skip
# What of the environment changes how a run computes or talks.
_ENVIRONMENT = (
    "CUDA", "CUBLAS", "CUDNN", "NCCL", "NVTE", "TORCH", "PYTORCH", "TRITON", "GLOO", "OMP", "MKL", "SLURM_JOB",
)  # fmt: skip


_SECRET = re.compile("KEY|TOKEN|SECRET|PASS|CREDENTIAL", re.IGNORECASE)
_USER_OF_URL = re.compile(r"(?<=://)[^/@\s]+(?=@)")


def write(args: Namespace, argv: list[str]) -> Path:
    """Write `--save`/runs/TIME.yaml, one for each start of the run.

    Args:
        args: Megatron's.
        argv: the command line, without the program.
    """
    folder = Path(args.save) / "runs"
    folder.mkdir(parents=True, exist_ok=True)
    name = time.strftime("%Y%m%d-%H%M%S")
    # Two starts in a second, or a clock that was set back.
    path = next(path for i in itertools.count() if not (path := folder / f"{name}{f'.{i}' if i else ''}.yaml").exists())
    with atomic_write(path) as file:
        yaml.safe_dump(describe(args, argv), file, sort_keys=False, default_flow_style=None)
    return path


def describe(args: Namespace, argv: list[str]) -> dict[str, Any]:
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
    """The command line, but for the words of --save-hook, which may hold a token; its program stands for them."""
    shown = []
    for word in argv:
        if shown and shown[-1] == "--save-hook":
            word = str(hook)
        elif word.startswith("--save-hook="):
            word = f"--save-hook={hook}"
        shown.append(_plain(word))
    return shown


def _recipe(path: Path) -> str:
    """The recipe's text; one that sets save_hook without it, written anew."""
    text = path.read_text()
    values = yaml.safe_load(text)
    kept = {key: value for key, value in values.items() if key not in ("save_hook", "save-hook")}
    return _plain(text if len(kept) == len(values) else yaml.safe_dump(kept, sort_keys=False))


def _commit() -> dict[str, Any] | None:
    """Of the checkout that this package runs from; None where it is no checkout."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).resolve().parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        return {"id": git("rev-parse", "HEAD"), "changed": git("status", "--porcelain", "--untracked-files=no") != ""}
    except (OSError, subprocess.SubprocessError):
        return None


def _plain(value: Any) -> Any:
    """As YAML writes it: numbers, texts without the passwords of URLs, lists and mappings; the rest by name."""
    if isinstance(value, Enum):  # before numbers, which some are too
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
