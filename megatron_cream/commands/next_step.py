"""The command that a tool advises when it has finished."""

import math
import shlex
from pathlib import Path

from megatron_cream.checkpoint.families import ModelShape, read_config
from megatron_cream.common.advice import command_line
from megatron_cream.common.errors import UsageError

_WINDOW = 4096
"""Window of an unknown model, in tokens."""

_LONGEST_SAMPLE = 8192
"""--seq-length of the advised run is at most this: a sample of a model's whole long window may not fit on a GPU."""


def training_command(
    flag: str, weights: str | Path, data: str | Path, shape: ModelShape | None, parallel: tuple[int, int] = (1, 1)
) -> str:
    """Return the command of a run that makes a model's window four times as long.

    Args:
        flag: names the weights: --load-hf or --pretrained-checkpoint.
        weights: its value.
        data: value of --data-path.
        shape: of the model; None if unknown.
        parallel: tensor- and pipeline-parallel ranks of the only layout that opens the weights.
    """
    window, sample = shape.window if shape else _WINDOW, sample_length(shape)
    target = -(-4 * window // sample) * sample
    scaling = [] if shape and shape.rope_scaling else ["--rope-scaling-type", "yarn"]  # else the model's own grows
    words = f"--seq-length {sample} --target-length {target} --micro-batch-size 1 --global-batch-size 32"
    words += " --train-iters 100 --lr 2e-5 --split 90,10,0 --eval-iters 2 --save extended"
    for name, ranks in zip(("tensor", "pipeline"), parallel, strict=True):
        words += f" --{name}-model-parallel-size {ranks}" * (ranks > 1)
    ranks = (f"--nproc_per_node={math.prod(parallel)}",)
    return command_line("pretrain_cream", flag, weights, "--data-path", data, *scaling, *words.split(), torchrun=ranks)


def training_on(data: Path, tokenizer: Path, longest: int) -> str:
    """Return the command that trains on preprocessed data.

    Args:
        data: prefix of the .bin and .idx.
        tokenizer: --tokenizer-model of the preprocessing, which may be the folder of a model.
        longest: tokens of the longest document. If it is shorter than a sample, the data is packed beside long texts.
    """
    try:
        model, shape = str(tokenizer), read_config(tokenizer)[1]
    except UsageError:  # it is a tokenizer alone, or no model that can be trained here
        model, shape = "HF_MODEL", None
    if longest >= sample_length(shape):
        return training_command("--load-hf", model, data, shape)
    command = training_command("--load-hf", model, "LONG_DATA", shape)
    return f"{command} {shlex.join(['--short-data-path', str(data), '--short-share', '0.3'])}"


def sample_length(shape: ModelShape | None) -> int:
    """Return --seq-length of the advised run."""
    window = shape.window if shape else _WINDOW
    return window if window <= _LONGEST_SAMPLE else _WINDOW
