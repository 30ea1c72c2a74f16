"""The command that a tool advises when it has finished."""

from pathlib import Path

from megatron_cream.checkpoint.families import ModelShape, read_config
from megatron_cream.common.advice import command_line
from megatron_cream.common.errors import UsageError

_LONGEST_SAMPLE = 8192
"""--seq-length of the advised run is at most this: a sample of a model's whole long window may not fit on a GPU."""


def training_command(flag: str, weights: str | Path, data: str | Path, shape: ModelShape | None) -> str:
    """Return the command of a run that makes a model's window four times as long.

    Args:
        flag: names the weights: --load-hf or --pretrained-checkpoint.
        weights: its value.
        data: value of --data-path.
        shape: of the model; None if unknown.
    """
    window = shape.window if shape else 4096
    sample = window if window <= _LONGEST_SAMPLE else 4096
    target = -(-4 * window // sample) * sample
    scaling = [] if shape and shape.rope_scaling else ["--rope-scaling-type", "yarn"]  # else the model's own grows
    words = f"--seq-length {sample} --target-length {target} --micro-batch-size 1 --global-batch-size 32"
    words += " --train-iters 100 --lr 2e-5 --split 90,10,0 --eval-iters 2 --save extended"
    return command_line("pretrain_cream", flag, weights, "--data-path", data, *scaling, *words.split())


def training_on(data: Path, tokenizer: Path) -> str:
    """Return the command that trains on preprocessed data.

    Args:
        data: prefix of the .bin and .idx.
        tokenizer: --tokenizer-model of the preprocessing, which may be the folder of a model.
    """
    try:
        return training_command("--load-hf", tokenizer, data, read_config(tokenizer)[1])
    except UsageError:  # it is a tokenizer alone, or no model that can be trained here
        return training_command("--load-hf", "HF_MODEL", data, None)
