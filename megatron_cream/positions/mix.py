"""A mixture of samplers: each sample is drawn by one of them, chosen at random by given shares."""

import math
from collections.abc import Mapping
from numbers import Real

from megatron_cream.positions.cream import CreamSampler
from megatron_cream.positions.plain import PiSampler
from megatron_cream.positions.pose import PoseSampler
from megatron_cream.positions.random import unit, words
from megatron_cream.positions.randpos import RandposSampler
from megatron_cream.positions.sampler import Sampler

_PARTS = {cls.name: cls for cls in (CreamSampler, PoseSampler, RandposSampler, PiSampler)}
_STREAM = 3
"""Random stream of the choice; the samplers use other streams."""


class MixSampler(Sampler):
    """The mixture; see `Sampler` for window, target and seed.

    A plan is a pure function of (seed, epoch, sample, document length). It equals the plan that the chosen sampler
    gives alone with the same seed.

    Args:
        shares: {sampler name: its share of the samples}, positive; they are normalized by their sum.
        options: {sampler name: its options}, for samplers in `shares`.
    """

    name = "mix"

    def __init__(
        self,
        window: int,
        target: int,
        seed: int = 0,
        shares: Mapping[str, float] | None = None,
        options: Mapping[str, Mapping] | None = None,
    ):
        super().__init__(window, target, seed)
        shares, options = shares or {}, options or {}
        if not shares:
            raise ValueError("shares: must name one sampler or more, such as cream=0.6,pose=0.4")
        for name, share in shares.items():
            if name not in _PARTS:
                raise ValueError(f"sampler {name}: a mixture takes {', '.join(_PARTS)}")
            if not (isinstance(share, Real) and share > 0 and math.isfinite(share)):
                raise ValueError(f"share {share} of {name}: must be a positive number")
        self.parts = {name: _PARTS[name](window, target, seed, **options.get(name, {})) for name in shares}
        total, self.ends, end = sum(shares.values()), [], 0.0
        for name, share in shares.items():
            end += share / total
            self.ends.append((end, name))

    def choose(self, epoch: int, sample: int) -> str:
        """Return the name of the sampler that draws this sample."""
        point = unit(words(self.seed, epoch, sample, _STREAM)[0])
        # In floating point the shares may add up to a little less than 1: the last sampler gets the rest.
        return next((name for end, name in self.ends if point < end), self.ends[-1][1])

    def plan(self, epoch: int, sample: int, document_length: int):
        epoch, sample, document_length = self._check_arguments(epoch, sample, document_length)
        return self.parts[self.choose(epoch, sample)].plan(epoch, sample, document_length)
