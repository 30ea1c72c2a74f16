"""Run Megatron on machines without CUDA.

Call `setup()` once, before anything of Megatron is imported. With a CUDA device it only
sets environment variables that Megatron needs. Without one, Megatron's own code (TP, PP,
DP over gloo, distributed optimizer, recompute, checkpoints) runs on the CPU, by means of:

- stand-ins for the functions of `torch.cuda` that Megatron calls,
- a `TorchFunctionMode` that replaces `device='cuda'` by the CPU, and
- blocked imports of packages that have CUDA kernels only.

torch itself is not deceived: `torch.cuda.is_available()` returns True only to callers
inside the `megatron` package. So pinned memory, `torch.accelerator`, fused optimizers
and torch.compile see a machine without CUDA.

The replacements made here are not in the registry, because they precede Megatron's imports: names of `torch.cuda`,
whose stand-ins take any arguments, `torch.autograd._engine_run_backward`, and `_get_cuda_rng_state` and
`_set_cuda_rng_state` of `megatron.core.tensor_parallel.random`.
"""

import contextlib
import logging
import os
import sys
import types
import warnings

# torch reads it when it is imported. Its C++ libraries log every connection otherwise.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch
from torch.overrides import TorchFunctionMode

_installed: TorchFunctionMode | None = None


def setup() -> None:
    """Prepare torch for Megatron. Idempotent; call before importing `megatron`."""
    # Megatron's tensor and sequence parallel overlap relies on one hardware queue.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    _silence_import_warnings()
    if not torch.cuda.is_available() and _installed is None:
        _install_cpu()


def _silence_import_warnings() -> None:
    """Silence import and deprecation warnings of Megatron and its dependencies.

    They are about accelerators that are optional here (`--print-config` shows which are
    in use) and about deprecated APIs that Megatron itself calls.
    """
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # torchao registers enums as torch deprecates it
    for module in ("megatron", "torch", "transformer_engine"):
        for category in (DeprecationWarning, FutureWarning, UserWarning):
            warnings.filterwarnings("ignore", category=category, module=module)
    texts = ["Apex is not installed", "Transformer Engine", ".*ModelConfig.*instead"]
    texts += ["Detected a Jax installation", "Argument aux_data"]  # Transformer Engine's, flash-attn-4's
    for text in texts:
        warnings.filterwarnings("ignore", message=rf"\s*{text}")
    logging.getLogger("megatron.core.models.gpt.gpt_model").addFilter(
        lambda record: "DEPRECATED" not in record.getMessage()
    )
    # torch 2.9+ logs a deprecation of the local-store key layout at every save.
    logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)


# ---------------------------------------------------------------- without CUDA


# Megatron calls their kernels wherever they can be imported, for example on a login node without GPUs.
_CUDA_ONLY_PACKAGES = ("transformer_engine", "transformer_engine_torch", "apex", "amp_C", "flash_attn")


def _install_cpu() -> None:
    global _installed
    # Megatron compiles small functions at first use. On a CPU that takes longer than it saves, and to import the
    # compiler takes two seconds: torch.compile here returns what it is given, as it does where dynamo is disabled.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    torch.compile = _leave_uncompiled
    for package in _CUDA_ONLY_PACKAGES:
        sys.modules.setdefault(package, None)
    _replace_torch_cuda()
    _installed = _CudaToCpu()
    _installed.__enter__()
    _keep_mode_in_backward(_installed)

    from megatron.core.tensor_parallel import random as megatron_random

    megatron_random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)


def _leave_uncompiled(model=None, **options):
    return model if model is not None else lambda model: model


_CPU = torch.device("cpu")
_CUDA_TYPE_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.float16: "torch.cuda.HalfTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
}


def _to_cpu(device):
    """Return the CPU for a CUDA device or device index, and anything else unchanged."""
    if isinstance(device, bool):
        return device
    if isinstance(device, int):
        return _CPU
    if isinstance(device, str) and device.startswith("cuda"):
        return _CPU
    if isinstance(device, torch.device) and device.type == "cuda":
        return _CPU
    return device


class _CudaToCpu(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": _to_cpu(kwargs["device"])}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        if func is torch.Tensor.to and len(args) > 1:
            args = (args[0], _to_cpu(args[1]), *args[2:])
        elif func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # Megatron's optimizers group parameters by this string.
            return _CUDA_TYPE_NAMES.get(args[0].dtype) or func(*args)
        elif func is torch.Tensor.record_stream:
            return None
        return func(*args, **kwargs)


def _keep_mode_in_backward(mode: _CudaToCpu) -> None:
    """Keep the mode active in `backward`, where torch disables it.

    Recompute and collectives in the backward pass need it.
    """
    engine = torch.autograd._engine_run_backward

    def run_backward(*args, **kwargs):
        with mode:
            return engine(*args, **kwargs)

    torch.autograd._engine_run_backward = run_backward


class _Stream:
    """Stand-in for a CUDA stream, on a device that runs every call synchronously."""

    cuda_stream = 0

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False

    def _nothing(self, *_, **__):
        return None

    wait_stream = wait_event = synchronize = record_event = record = wait = _nothing

    def query(self):
        return True


class _Event(_Stream):
    def elapsed_time(self, _other) -> float:
        return 0.0


def _replace_torch_cuda() -> None:
    """Replace the functions of `torch.cuda` that Megatron's training path calls."""
    cuda = torch.cuda
    stream = _Stream()
    properties = types.SimpleNamespace(
        name="cpu",
        major=0,
        minor=0,
        multi_processor_count=1,
        warp_size=32,
        total_memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    )

    def returning(value):  # a function for each name: dynamo has different rules for them, and allows one a function
        return lambda *_, **__: value

    def is_available() -> bool:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return caller.partition(".")[0] == "megatron"

    stand_ins = dict(
        is_available=is_available,
        is_initialized=lambda: False,
        current_device=returning(0),
        device_count=lambda: 1,
        set_device=returning(None),
        synchronize=returning(None),
        empty_cache=returning(None),
        ipc_collect=returning(None),
        Stream=_Stream,
        Event=_Event,
        current_stream=lambda *_: stream,
        default_stream=lambda *_: stream,
        stream=lambda s: s if s is not None else contextlib.nullcontext(),
        set_stream=returning(None),
        is_current_stream_capturing=lambda: False,
        manual_seed=torch.manual_seed,
        get_rng_state=lambda *_: torch.get_rng_state(),
        set_rng_state=lambda state, *_: torch.set_rng_state(state),
        memory_allocated=returning(0),
        memory_reserved=returning(0),
        max_memory_allocated=returning(0),
        max_memory_reserved=returning(0),
        reset_peak_memory_stats=returning(None),
        memory_stats=lambda *_: _ZeroStats(),
        mem_get_info=lambda *_: (properties.total_memory, properties.total_memory),
        get_device_properties=lambda *_: properties,
        get_device_capability=lambda *_: (0, 0),
        get_device_name=lambda *_: "cpu",
    )
    for name, stand_in in stand_ins.items():
        setattr(cuda, name, stand_in)
    cuda.nvtx.range_push = cuda.nvtx.range_pop = returning(None)
    cuda.nvtx.range = lambda *_, **__: contextlib.nullcontext()


class _ZeroStats(dict):
    def __missing__(self, key):
        return 0
