"""Memory for keys and values in FP8: half of bf16's, for texts whose keys and values would not fit.

A number is a float8_e4m3fn times a power of two that the channels of one token and head share. So tokens are appended
without a change to earlier ones, nothing is calibrated, and neither chunks nor batches change what is read. A power of
two adds no rounding of its own. A number x is read with an error of at most |x| / 16, or m / 2**17 if that is more,
with m the largest magnitude among the token's channels of that head.

FP8 is for storage only: attention reads the numbers of one layer at a time in the model's dtype, from a buffer that
all layers share. So any GPU will do, and a CPU.
"""

import math

import torch
from torch import Tensor

KV_CACHE_DTYPES = ("auto", "fp8")
"""Values of --kv-cache-dtype; auto is the model's dtype."""

_LARGEST_EXPONENT = 8  # the largest magnitude becomes 128 to 256; float8_e4m3fn reaches 448
_FLOAT32_BIAS, _FLOAT32_MANTISSA = 127, 23


def count_bytes(layers: int, numbers: int, channels: int, dtype: torch.dtype, kv_cache_dtype: str) -> int:
    """Return the bytes that keys and values take.

    Args:
        layers: number of layers.
        numbers: keys and values of one layer together.
        channels: numbers that share a power of two.
        dtype: the model's dtype.
        kv_cache_dtype: one of KV_CACHE_DTYPES.
    """
    if kv_cache_dtype == "auto":
        return layers * numbers * dtype.itemsize
    return layers * (numbers + numbers // channels) + numbers * dtype.itemsize


class ReadBuffer:
    """Room for the numbers that were read last. All layers share it, as they are computed one after another."""

    def __init__(self):
        self.flat = torch.empty(0)

    def reserve(self, count: int, dtype: torch.dtype, device: torch.device) -> None:
        """Make room for `count` numbers."""
        if self.flat.numel() < count:
            self.flat = torch.empty(count, dtype=dtype, device=device)

    def take(self, shape: torch.Size) -> Tensor:
        """Return the buffer as a contiguous tensor of that shape, in place of the tensor that was taken before."""
        return self.flat[: shape.numel()].view(shape)


class Fp8Memory:
    """The keys, or the values, of one layer in FP8: [s, b, g, d], zeros at first.

    It is written and read by slices, like the tensor that it stands for in Megatron's StaticInferenceContext. What is
    read is valid until the next read from a memory with the same buffer.
    """

    def __init__(self, numbers: Tensor, exponents: Tensor, buffer: ReadBuffer):
        self._numbers, self._exponents, self._buffer = numbers, exponents, buffer

    @classmethod
    def allocate(
        cls, size: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, buffer: ReadBuffer
    ) -> "Fp8Memory":
        """Allocate memory of that size, which is read in `dtype`."""
        buffer.reserve(math.prod(size), dtype, device)
        numbers = torch.zeros(size, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
        return cls(numbers, torch.zeros(*size[:-1], 1, dtype=torch.int8, device=device), buffer)

    @property
    def nbytes(self) -> int:
        """Bytes that are kept, without the shared buffer."""
        return self._numbers.nbytes + self._exponents.nbytes

    def size(self, dim: int) -> int:
        return self._numbers.size(dim)

    def narrow(self, dim: int, start: int, length: int) -> "Fp8Memory":
        """Return a part of this memory, as `Tensor.narrow` does; dim is not the last."""
        numbers, exponents = (x.narrow(dim, start, length) for x in (self._numbers, self._exponents))
        return Fp8Memory(numbers, exponents, self._buffer)

    def __setitem__(self, place: tuple, x: Tensor) -> None:
        """Write; a token and head with NaN or infinity becomes NaN, so that the logits show it."""
        self._numbers[place], self._exponents[place] = _round(x)

    def index_copy_(self, dim: int, index: Tensor, x: Tensor) -> None:
        """Write at the places of `index`, as `Tensor.index_copy_` does; dim is not the last."""
        numbers, exponents = _round(x)
        self._numbers.view(torch.uint8).index_copy_(dim, index, numbers.view(torch.uint8))  # FP8 has no such kernel
        self._exponents.index_copy_(dim, index, exponents)

    def __getitem__(self, place: tuple | slice) -> Tensor:
        """Read into the shared buffer."""
        numbers = self._numbers[place]
        return self._buffer.take(numbers.shape).copy_(numbers).mul_(_power_of_two(self._exponents[place]))


def _round(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x in float8_e4m3fn, and the exponents of the powers of two in int8, [..., 1]."""
    largest = x.abs().amax(-1, keepdim=True).float()
    exponents = (torch.frexp(largest).exponent - _LARGEST_EXPONENT).clamp(-126, 126)
    factors = _power_of_two(-exponents).masked_fill(~largest.isfinite(), float("nan"))
    return (x.float() * factors).to(torch.float8_e4m3fn), exponents.to(torch.int8)


def _power_of_two(exponents: Tensor) -> Tensor:
    """Return 2**exponents in float32, exactly; the exponents are whole numbers from -126 to 127."""
    return (exponents.int() + _FLOAT32_BIAS << _FLOAT32_MANTISSA).view(torch.float32)
