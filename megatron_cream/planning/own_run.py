"""The step time and memory that the planner predicts for a run on the GPUs of this machine."""

import os
from argparse import Namespace
from dataclasses import dataclass, replace

import torch

from megatron_cream.common import devices
from megatron_cream.common.errors import UsageError
from megatron_cream.config.expected import Expected
from megatron_cream.planning import memory, outside, step_time
from megatron_cream.planning.flags import run_from_flags
from megatron_cream.planning.hardware import GPUS, Cluster
from megatron_cream.planning.run import Engine, Layout, Model

_OTHER_VARIANTS = ("PCI", "NVL", "40GB", "MIG")  # parts of device names that the data sheets in GPUS do not describe


@dataclass(frozen=True)
class OwnRun:
    """The run of these flags on this machine, as the planner sees it.

    kind: the key of its GPUs in `hardware.GPUS`.
    """

    model: Model
    layout: Layout
    engine: Engine
    cluster: Cluster
    kind: str


def find_own_run(argv: list[str], args: Namespace, gpu_name: str) -> OwnRun | None:
    """Return the run of these flags on this machine; None if the planner does not know its GPU or its flags.

    It knows the GPUs of `hardware.GPUS`, and not every flag.

    Args:
        argv: the run's flags.
        args: the same flags after all checks: the attention, the graphs and the ranks of this run.
        gpu_name: torch's name of the GPU.
    """
    kind = devices.gpu_kind(gpu_name)
    if kind not in GPUS or any(part in gpu_name.upper() for part in _OTHER_VARIANTS):
        return None
    attention = args.attention
    if attention["name"] == "local":
        return None
    gpu = GPUS[kind]
    host = int(os.environ.get("LOCAL_WORLD_SIZE", args.world_size))
    try:
        run = run_from_flags(argv, args.world_size)
    except UsageError:
        return None
    engine = replace(
        run.engine,
        transformer_engine=attention["transformer_engine"],
        attention=attention["name"],
        graphs=args.cuda_graph_impl == "local",
    )
    cluster = Cluster(gpu=gpu, host=host, inside=gpu.nvlink, between=gpu.network)
    return OwnRun(run.model, run.layout, engine, cluster, kind)


def predict_own_run(argv: list[str], args: Namespace) -> Expected | None:
    """Return the predicted step time and memory; None if the planner does not know them.

    Args:
        argv: the run's flags.
        args: the same flags after all checks.
    """
    own = find_own_run(argv, args, torch.cuda.get_device_name()) if devices.has_cuda() else None
    if own is None:
        return None
    try:
        step = step_time.predict(own.model, own.layout, own.engine, own.cluster).time.step
    except UsageError:
        return None
    needed = memory.predict(own.model, own.layout, own.engine).device
    usable = torch.cuda.get_device_properties().total_memory
    return Expected(own.kind, step, needed, usable, is_close=outside.is_close(needed, usable))
