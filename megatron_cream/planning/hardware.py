"""GPUs and their links: speeds from data sheets, and the shares that training reaches."""

from dataclasses import dataclass

from megatron_cream.common.devices import PEAK_TFLOPS

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One kind of GPU, according to its data sheet.

    bf16, fp8, fp32: dense FLOP/s of matrix products; None if not supported.
    bandwidth: bytes/s of its memory.
    memory: bytes of memory for programs and the driver.
    nvlink, pcie: bytes/s to other GPUs of the host, each way (data sheets state the sum of both ways).
    network: bytes/s of the network adapter for each GPU in NVIDIA's own hosts (DGX), each way.
    products: share of the peak that matrix products reach, relative to an H200's share.
    source: where these numbers come from.
    """

    name: str
    bf16: float
    fp8: float | None
    fp32: float
    bandwidth: float
    memory: float
    nvlink: float
    pcie: float
    network: float
    source: str
    products: float = 1.0


GPUS = {
    "H200": Gpu(
        name="H200 (SXM, 141 GB)", bf16=PEAK_TFLOPS["H200"] * 1e12, fp8=1979e12, fp32=67e12, bandwidth=4.8e12,
        memory=140 * GIB, nvlink=450e9, pcie=64e9, network=50e9,
        source="NVIDIA H200 Tensor Core GPU data sheet; DGX H200 data sheet (8 x ConnectX-7, 400 Gbit/s)",
    ),
    "H100": Gpu(
        name="H100 (SXM, 80 GB)", bf16=PEAK_TFLOPS["H100"] * 1e12, fp8=1979e12, fp32=67e12, bandwidth=3.35e12,
        memory=80 * GIB, nvlink=450e9, pcie=64e9, network=50e9,
        source="NVIDIA H100 Tensor Core GPU data sheet; DGX H100 data sheet (8 x ConnectX-7, 400 Gbit/s)",
        products=1.092,  # fitted on the time of the run of eight layers in bf16; not profiled
    ),
    "A100": Gpu(
        name="A100 (SXM, 80 GB)", bf16=PEAK_TFLOPS["A100"] * 1e12, fp8=None, fp32=19.5e12, bandwidth=2.039e12,
        memory=80 * GIB, nvlink=300e9, pcie=32e9, network=25e9,
        source="NVIDIA A100 Tensor Core GPU data sheet; DGX A100 data sheet (8 x ConnectX-6, 200 Gbit/s)",
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """GPUs in hosts, and the speeds of their links.

    host: number of GPUs in a host.
    inside: bytes/s between two GPUs of a host, each way.
    between: bytes/s of the network for each GPU, each way.
    """

    gpu: Gpu
    host: int
    inside: float
    between: float


# Shares of the data sheet's peaks that one H200 reached. They were fitted on the profile of one run in bf16 (eight
# layers of 7B width), unless another run is named. megatron_cream/planning/measured_runs.json has the runs, and
# tests/planning/test_measured.py repeats the fits. Other GPUs use the same shares, except for `Gpu.products`.

PRODUCTS = {"bf16": 0.791, "fp8": 0.772, "fp8 blockwise": 0.582}
"""Share of the peak FLOP/s in matrix products, not counting the time to move their operands. fp8 was fitted on the time
of the same run in FP8 with delayed scaling; blockwise on an H100."""

TILE = 256
"""Rows and columns of a product's output that are computed together, so that each counts as its next multiple.
Assumed: two neighbouring blocks of 128 x 256, a common choice on Hopper. Most models have multiples of it; small
models, adapters and TP may not. Without it a 135M is planned 3 to 8 % too fast, LoRA on a 7B and a 70B 4 to 8 %. With
128 these are 3 to 6 % and 2 to 7 %, with 256 -1 to 3 % and -1 to 5 %."""

ATTENTION = {"flash": 0.415, "te": 0.371, "sdpa": 0.224}
"""Share of the bf16 peak in attention at 4096 tokens, forward and backward, with causal FLOPs counted. flash is from
the profile. Measured alone, its kernels took 1.84 ms, cuDNN's (Transformer Engine) 2.06 ms and sdpa's flash kernel
3.41 ms. sdpa can choose cuDNN's kernel or its flash kernel: with cuDNN's rate the prediction for the measured 1.1B run
would be 16 % off, with the flash kernel's rate it is within 5 % for both runs."""

HALF_RATE = 1702
"""Sequence length in tokens at which attention has half of the rate that it approaches for long sequences. Fitted on a
run of 32K with TP 2 on two H100s."""

RING = 0.728
"""Share of that rate in Transformer Engine's ring over context-parallel ranks, which computes attention in parts and
combines them. Fitted on the only such run, 32K on two H100s. The run was not profiled, so this includes all waiting."""

PASSES = 0.753
"""Share of the memory bandwidth in kernels that only move bytes, for the bytes that `work` counts."""

IDLE = 5.9e-3
"""Seconds of a step without a running kernel."""

FP8_PARAMETERS = 13.3e-3
"""Seconds a step for the weights of one layer with --fp8-param-gather, which casts and scales each weight separately.
Fitted on the only such run; not profiled."""

HOST = {"tensor parallel": 5.72e-3, "FP8": 5.24e-3, "alone": 4.59e-3}
"""Seconds in which the host launches a layer's kernels, forward and backward. If the kernels are shorter, the GPU waits
for the host. Each value was fitted on a run that waited, at micro-batch 1: TP 2 on two H200s (another host agrees
within 0.1 %), a 3B in FP8 and a 1.1B in bf16 on one H100. Three earlier runs with TP 2 on three hosts took 7.5 to
8.3 ms; their predictions are marked as off."""

HOST_ADAPTER = {"tensor parallel": 1.45e-3, "alone": 0.25e-3}
"""The same for the kernels of LoRA's adapters at one linear. tensor parallel: fitted on a 70B with TP 4 and micro-batch
1 on eight H200s, and not profiled, so this includes all waiting. alone: assumed, about 20 kernels."""

OFFLOADED = 0.7e-9
"""Seconds of an update for each parameter of a rank that --optimizer-cpu-offload moves to the host. Assumed, not
measured: 8 bytes through PCIe at 20 GB/s, and 28 bytes of the host's memory at 100 GB/s. Two runs beside other jobs
took 1.0e-9 and 1.2e-9."""

LINKS = {"pair": 0.43, "inside": 0.835, "between": 0.8}
"""Share of a link's stated speed in a ring. pair: of two GPUs of a host. In the trace of a run with TP 2 on two H200s,
16.8 MB took 86 us to gather and 90 us to reduce (NCCL's LL protocol, without multicast); the runs on two GPUs that move
more at once agree with the same share. inside: of more GPUs of a host, fitted on the 7B with TP 4 without user buffers
on four H200s; an all-reduce of 1 GiB on eight H100s reached 0.80. between: assumed."""

OVERLAP_COST = {"pair": 0.883, "more": 0.576}
"""Share of an overlapped transfer's time by which it still slows computation, because it uses multiprocessors, memory
bandwidth and power. pair: fitted on a run with TP 2 on two H100s in which all transfers of a layer overlap with its
products (--tp-comm-overlap). more: of user buffers, gradients and weights among more than two GPUs; with it the ten
measured runs of that kind are off by zero on average."""

RINGS_OVERLAP_COST = 0.418
"""The same share for user buffers that send in rings by copy engines (model/user_buffers.yaml). With it the ten
measured runs that have them are off by zero on average, and each by at most 3.2 %."""

# Assumed, not measured.
HOP_INSIDE, HOP_BETWEEN = 3e-6, 10e-6
"""Seconds of latency of each hop in a ring, inside a host and between hosts."""
