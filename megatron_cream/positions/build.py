"""Build a position sampler by name."""

import inspect

from megatron_cream.positions.cream import CreamSampler
from megatron_cream.positions.mix import MixSampler
from megatron_cream.positions.plain import FullSampler, PiSampler
from megatron_cream.positions.pose import PoseSampler
from megatron_cream.positions.randpos import RandposSampler
from megatron_cream.positions.sampler import Sampler

_CLASSES = {cls.name: cls for cls in (CreamSampler, PoseSampler, RandposSampler, PiSampler, FullSampler, MixSampler)}
SAMPLERS = tuple(_CLASSES)


def build_sampler(name: str, *, window: int, target: int, seed: int = 0, **options) -> Sampler:
    """Return the sampler `name`.

    Args:
        name: one of SAMPLERS.
        window: N, the pre-trained window, in tokens.
        target: L, the window to extend to: a multiple of N.
        seed: an integer in [0, 2**64).
        options: options of that sampler; cream: sigma, variant, relativity, middle; pose: chunks; mix: shares,
            and the options of its samplers.

    Raises:
        ValueError: unknown name, unknown option or value out of range. One line.
    """
    if name not in _CLASSES:
        raise ValueError(f"sampler {name}: choose from {', '.join(SAMPLERS)}")
    cls = _CLASSES[name]
    known = set(inspect.signature(cls).parameters) - {"window", "target", "seed"}
    for option in options:
        if option not in known:
            takes = f"takes {', '.join(sorted(known))}" if known else "takes none"
            raise ValueError(f"{option}: not an option of sampler {name}, which {takes}")
    return cls(window=window, target=target, seed=seed, **options)
