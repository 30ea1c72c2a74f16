"""The accelerator of this machine and its peak speed by NVIDIA's data sheets."""

import contextlib
import ctypes

import torch

# Dense bf16 peak in TFLOP/s, by a part of torch's device name. From NVIDIA's data sheets.
PEAK_TFLOPS = {
    "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "GH200": 989, "H20": 148,
    "B200": 2250, "B300": 2250, "A100": 312, "A800": 312, "A40": 150, "A10": 125, "L40S": 362, "L40": 181,
    "L4": 121, "RTX 4090": 165, "RTX A6000": 155, "V100": 125,
}  # fmt: skip


def has_cuda() -> bool:
    """Return whether this machine has a CUDA device.

    The replacements in `patches.platform` return True for Megatron alone.
    """
    return torch.cuda.is_available()


def read_gpu_name() -> str | None:
    """Return the name of the first visible GPU without initializing CUDA in torch; None without a GPU.

    torch.cuda.get_device_name initializes it, and torch's allocator reads PYTORCH_CUDA_ALLOC_CONF then, once.
    """
    device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
    with contextlib.suppress(OSError):
        driver = ctypes.CDLL("libcuda.so.1")
        failed = (
            driver.cuInit(0)
            or driver.cuDeviceGet(ctypes.byref(device), 0)
            or driver.cuDeviceGetName(name, len(name), device)
        )
        return None if failed else name.value.decode(errors="replace")
    return None


def gpu_kind(name: str | None = None) -> str | None:
    """Return the key of PEAK_TFLOPS for this machine's GPUs; None without a GPU, or if it is unknown.

    Args:
        name: torch's name of the GPU; None asks torch, which initializes CUDA.
    """
    if not has_cuda():
        return None
    name = name or torch.cuda.get_device_name()
    # The longest name that matches: "GH200" before "H200", "H100 PCIe" before "H100".
    return max((part for part in PEAK_TFLOPS if part in name), key=len, default=None)


def peak_flops() -> float | None:
    """Return the bf16 peak of one of this machine's GPUs in FLOP/s; None where it is unknown."""
    kind = gpu_kind()
    return None if kind is None else PEAK_TFLOPS[kind] * 1e12
