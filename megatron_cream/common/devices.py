"""Which accelerator this machine has, and how fast its data sheet says that it is."""

import torch

# Dense bf16 peak, TFLOP/s, by a part of the name torch gives the device. From NVIDIA's data sheets.
PEAK_TFLOPS = {
    "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "GH200": 989, "H20": 148,
    "B200": 2250, "B300": 2250, "A100": 312, "A800": 312, "A40": 150, "A10": 125, "L40S": 362, "L40": 181,
    "L4": 121, "RTX 4090": 165, "RTX A6000": 155, "V100": 125,
}  # fmt: skip


def has_cuda() -> bool:
    """Return whether this machine has a CUDA device.

    The stand-ins of `patches.platform` say True to Megatron alone.
    """
    return torch.cuda.is_available()


def peak_flops() -> float | None:
    """Peak FLOP/s of one of this machine's GPUs in bf16; None where it is not known."""
    if not has_cuda():
        return None
    name = torch.cuda.get_device_name()
    # The longest name that fits: "GH200" before "H200", "H100 PCIe" before "H100".
    fits = [part for part in PEAK_TFLOPS if part in name]
    return PEAK_TFLOPS[max(fits, key=len)] * 1e12 if fits else None
