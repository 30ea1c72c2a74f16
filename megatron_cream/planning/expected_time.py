"""The step time that the planner predicts for a run on the GPUs of this machine."""

import os
from argparse import Namespace
from dataclasses import replace

import torch

from megatron_cream.common import devices
from megatron_cream.common.errors import UsageError
from megatron_cream.planning import step_time
from megatron_cream.planning.flags import run_from_flags
from megatron_cream.planning.hardware import GPUS, Cluster

_OTHER_VARIANTS = ("PCI", "NVL", "40GB", "MIG")  # parts of device names that the data sheets in GPUS do not describe


def predict_step(argv: list[str], args: Namespace) -> tuple[float, str] | None:
    """Return the predicted seconds of a step and the name of the GPU; None if the planner does not know them.

    It knows the GPUs of `hardware.GPUS`, and not every flag.

    Args:
        argv: the run's flags.
        args: the same flags after all checks: the attention and the ranks of this run.
    """
    kind = devices.gpu_kind()
    if kind not in GPUS or any(part in torch.cuda.get_device_name().upper() for part in _OTHER_VARIANTS):
        return None
    attention = args.attention
    if attention["name"] == "local":
        return None
    gpu = GPUS[kind]
    host = int(os.environ.get("LOCAL_WORLD_SIZE", args.world_size))
    try:
        run = run_from_flags(argv, args.world_size)
        engine = replace(run.engine, transformer_engine=attention["transformer_engine"], attention=attention["name"])
        cluster = Cluster(gpu=gpu, host=host, inside=gpu.nvlink, between=gpu.network)
        return step_time.predict(run.model, run.layout, engine, cluster).time.step, kind
    except UsageError:
        return None
