"""GPUs and the links between them: what their makers state, and what of it a training step was seen to reach."""

from dataclasses import dataclass

from megatron_cream.common.devices import PEAK_TFLOPS

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One kind of GPU, as its data sheet has it.

    bf16, fp8, fp32: dense FLOP/s of matrix products; None where there is none.
    bandwidth: bytes/s of its memory.
    memory: bytes that it gives to programs and its driver.
    nvlink, pcie: bytes/s to its neighbours in the host, each way (data sheets state both ways together).
    network: bytes/s of the adapter that a host of the maker's own (DGX) has for each GPU, each way.
    products: rate of its matrix products as a share of its peak, beside an H200's.
    source: where these stand.
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
        products=1.092,  # so that the run of eight layers in bf16 took what it took; not profiled
    ),
    "A100": Gpu(
        name="A100 (SXM, 80 GB)", bf16=PEAK_TFLOPS["A100"] * 1e12, fp8=None, fp32=19.5e12, bandwidth=2.039e12,
        memory=80 * GIB, nvlink=300e9, pcie=32e9, network=25e9,
        source="NVIDIA A100 Tensor Core GPU data sheet; DGX A100 data sheet (8 x ConnectX-6, 200 Gbit/s)",
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """GPUs in hosts.

    host: GPUs of one host.
    inside: bytes/s between two GPUs of a host, each way.
    between: bytes/s of the network for each GPU, each way.
    """

    gpu: Gpu
    host: int
    inside: float
    between: float


# What one H200 reached, as shares of its data sheet's peaks. All were fitted on the profile of one run in bf16
# (eight layers of 7B width) but where another is named; megatron_cream/planning/measured_runs.json has the runs, and
# tests/planning/test_measured.py fits them again. Other GPUs are given the same shares, but for `Gpu.products`.

PRODUCTS = {"bf16": 0.791, "fp8": 0.772, "fp8 blockwise": 0.582}
"""Of the peak in matrix products, beside the time that their operands' bytes take. fp8: so that the same run in FP8
takes what it took, with delayed scaling; blockwise on an H100."""

ATTENTION = {"flash": 0.415, "te": 0.371, "sdpa": 0.224}
"""Of the bf16 peak at 4096 tokens, forward and backward, causal attention counted once. flash is the profile's. By
themselves its kernels took 1.84 ms, cuDNN's (Transformer Engine) 2.06, sdpa's flash kernel 3.41. sdpa may take either:
with cuDNN's rate the measured 1.1B run would be 16 % off, with flash's both runs are within 5 %."""

HALF_RATE = 1702
"""Tokens of a sequence at which attention has half the rate that it nears at endless length. Fitted on a run of 32K
with TP 2 on two H100s."""

RING = 0.728
"""Of that rate, what remains in Transformer Engine's ring over context-parallel ranks, whose attention comes in parts
that are put together. Fitted on the only such run, 32K on two H100s; as it is not profiled, whatever else it waits for
is in it."""

PASSES = 0.753
"""Of the memory's bandwidth, where a kernel only moves bytes, for the bytes that `work` counts."""

IDLE = 5.9e-3
"""Seconds of a step in which no kernel runs."""

FP8_PARAMETERS = 13.3e-3
"""Seconds a step that a layer's weights cost with --fp8-param-gather, where each is cast and scaled apart. Fitted on
the only such run; not profiled."""

HOST = {"tensor parallel": 5.72e-3, "FP8": 5.24e-3, "alone": 4.59e-3}
"""Seconds in which the host launches a layer's kernels, forward and backward; for smaller products the GPU waits for
it. Each fitted on a run that was seen waiting, at micro-batch 1: TP 2 on two H200s (another host gives the same to 1 in
1,000), a 3B in FP8 and a 1.1B in bf16 on one H100. Three earlier runs, on three hosts, took 7.5 to 8.3 ms with TP 2:
the rows that are off."""

LINKS = {"inside": 0.43, "between": 0.8}
"""Of a link's stated speed, in a ring. inside: in the trace of a run with TP 2 on two H200s 16.8 MB took 86 us to
gather and 90 to reduce (NCCL's LL protocol, without multicast). between: assumed."""

BESIDE = 0.896
"""Of the time of a transfer beside computation, what it costs all the same: it takes multiprocessors, memory and power.
Fitted on a run with TP 2 on two H100s in which every layer's transfers lie beside its products (--tp-comm-overlap)."""

IN_RINGS = 0.604
"""The same of user buffers that send in rings (model/user_buffers.yaml), by copy engines. Fitted so that the 7B with
TP 2 at micro-batch 8 gains over micro-batch 4 without user buffers what it gained on two H200s."""

# Assumed: not measured.
HOP_INSIDE, HOP_BETWEEN = 3e-6, 10e-6
"""Seconds of each hop of a ring."""
