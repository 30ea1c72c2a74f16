"""How often a sampler's samples contain each position and each distance of two tokens."""

from dataclasses import dataclass

import numpy as np

from megatron_cream.positions.sampler import Sampler


@dataclass(frozen=True)
class Coverage:
    """Statistics over samples, by position or by distance.

    position: float64 [L], share of the samples in which a token has this position.
    middle: float64 [L], share of the samples whose middle segment, of three, contains this position.
    distance: float64 [L], share of the samples in which two tokens are this far apart.
    pairs: float64 [L], mean number of token pairs in a sample that are this far apart.
    """

    position: np.ndarray
    middle: np.ndarray
    distance: np.ndarray
    pairs: np.ndarray


def coverage(sampler: Sampler, *, target: int, samples: int, document_length: int) -> Coverage:
    """Draw `samples` plans and return their coverage.

    Args:
        sampler: the sampler to measure.
        target: L; position ids are in [0, L).
        samples: number of plans: samples 0 to samples - 1 of epoch 0.
        document_length: length of every document, in tokens.
    """
    position, middle, distance, pairs = np.zeros((4, target))
    for sample in range(samples):
        plan = sampler.plan(epoch=0, sample=sample, document_length=document_length)
        position[plan.position_ids] += 1
        if len(plan.segments) == 3:
            (_, head), (_, size), _ = plan.segments
            middle[plan.position_ids[head : head + size]] += 1
        counts = distances(plan.position_ids, target)
        distance += counts > 0
        pairs += counts
    return Coverage(position / samples, middle / samples, distance / samples, pairs / samples)


def distances(position_ids: np.ndarray, target: int) -> np.ndarray:
    """Count the pairs of tokens that are 0, 1, .. target - 1 apart, int64 [target].

    This is the autocorrelation, computed by FFT.
    """
    present = np.zeros(2 * target)
    present[position_ids] = 1
    spectrum = np.fft.rfft(present)
    return np.rint(np.fft.irfft(spectrum * spectrum.conj(), 2 * target)[:target]).astype(np.int64)
