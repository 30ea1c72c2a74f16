"""A cache of transformers whose keys and values are in FP8."""

from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from megatron_cream.common.errors import UsageError
from megatron_cream.evaluation.models.fp8_memory import Fp8Memory, ReadBuffer


def new_fp8_cache(config: PreTrainedConfig, length: int) -> DynamicCache:
    """Make a cache for texts of at most `length` tokens.

    Layers that attend to a sliding window stay in the model's dtype: their window limits their memory.

    Raises:
        UsageError: the model has no layer that attends to the whole text.
    """
    cache = DynamicCache(config=config)
    buffers = (ReadBuffer(), ReadBuffer())
    layers = [Fp8Layer(length, buffers) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    if not any(isinstance(layer, Fp8Layer) for layer in layers):
        raise UsageError(
            "--kv-cache-dtype fp8: no layer of this model attends to the whole text, so its keys and values stay few. "
            "Leave the flag out."
        )
    cache.layers = layers
    return cache


class Fp8Layer(DynamicLayer):
    """The keys and values of one layer; both buffers are shared by all layers."""

    is_croppable = False

    def __init__(self, length: int, buffers: tuple[ReadBuffer, ReadBuffer]):
        super().__init__()
        self._length, self._buffers, self._used = length, buffers, 0
        self.memories: list[Fp8Memory] = []

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        for states_BGSD, buffer in zip((key_states, value_states), self._buffers, strict=True):
            batch, groups, _, channels = states_BGSD.shape
            size = (self._length, batch, groups, channels)
            self.memories.append(Fp8Memory.allocate(size, states_BGSD.dtype, states_BGSD.device, buffer))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append keys and values [b, g, s, d]; return all so far, as they are read from FP8."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        begin, self._used = self._used, self._used + key_states.shape[-2]
        for memory, states_BGSD in zip(self.memories, (key_states, value_states), strict=True):
            memory[begin : self._used,] = states_BGSD.permute(2, 0, 1, 3)
        keys, values = (memory[: self._used,].permute(1, 2, 0, 3) for memory in self.memories)
        return keys, values

    def get_seq_length(self) -> int:
        return self._used
