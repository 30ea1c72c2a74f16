"""Extend the context window of a Llama with CREAM, on NVIDIA Megatron-Core.

from megatron_cream import RotaryEmbedding, build_sampler
"""

__version__ = "0.2.0"

__all__ = ["RotaryEmbedding", "__version__", "build_sampler"]


def __getattr__(name: str):
    # Looked up when asked for: a command's first lines must not wait for torch.
    if name == "build_sampler":
        from megatron_cream.positions import build_sampler

        return build_sampler
    if name == "RotaryEmbedding":
        from megatron_cream.model.rotary import RotaryEmbedding

        return RotaryEmbedding
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
