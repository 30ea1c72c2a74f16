"""Position samplers: choose the tokens of a document for a sample, and their position ids.

    sampler = build_sampler("cream", window=4096, target=32768, seed=1234, sigma=3.0, variant="paper")
    plan = sampler.plan(epoch=0, sample=17, document_length=20000)
    plan.token_indices, plan.position_ids, plan.segments, plan.alpha

Samplers are pure functions of (seed, epoch, sample, document length). Imports neither torch nor Megatron.
"""

from megatron_cream.positions.build import SAMPLERS, build_sampler
from megatron_cream.positions.plan import Plan, Plans
from megatron_cream.positions.sampler import Sampler

__all__ = ["SAMPLERS", "Plan", "Plans", "Sampler", "build_sampler"]
