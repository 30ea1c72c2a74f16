"""CREAM: Continuity-Relativity indExing with gAussian Middle (Wu, Zhao, Zheng 2024, Algorithm 1).

N tokens get positions from 0 .. L-1 in three contiguous blocks: a head that starts at 0, a
tail that ends at L-1, and between them a middle whose place follows a truncated Gaussian. The
paper and the authors' released code differ in four points; both variants are implemented:

| point | variant `paper` | variant `released` |
|---|---|---|
| choice of head and tail lengths, N/3 or 4s | for each sample | for each batch of 3000 samples |
| scale of the middle | truncated: CDF renormalised over [2, 2s] | censored: mass outside is added at 2 and 2s |
| middle near the document's end | moved before the tail: no token twice | may repeat tokens of the tail |
| drawn | again in each epoch | once: all epochs are equal |
"""

import math
from collections.abc import Callable
from numbers import Real

import numpy as np

from megatron_cream.positions.random import unit, words
from megatron_cream.positions.sampler import BlockSampler

VARIANTS = ("paper", "released")


def _gaussian(points: np.ndarray, factor: int, sigma: float) -> np.ndarray:
    # erf is accurate near 0, so that a huge sigma still gives a usable, nearly uniform law.
    return np.array([math.erf((x - 1 - factor) / sigma / math.sqrt(2.0)) for x in points.tolist()])


def _uniform(points: np.ndarray, factor: int, sigma: float) -> np.ndarray:
    return (points - 1 - factor) / (factor - 1)


MIDDLES: dict[str, Callable[[np.ndarray, int, float], np.ndarray]] = {"gaussian": _gaussian, "uniform": _uniform}
"""Laws of the middle's scale: name -> function that returns 2 CDF - 1 at points of [2, 2 factor], factor >= 2."""

_RELEASED_BATCH = 3000
_POINTS = 1000


class CreamSampler(BlockSampler):
    """The CREAM sampler. See the module, and `Sampler` for window, target and seed.

    Args:
        sigma: standard deviation of the Gaussian, in half steps of the middle's scale (3.0 in the paper); only for
            middle `gaussian`.
        variant: `paper` or `released`.
        relativity: share of the samples with head and tail of N/3; the others have a long middle (1/2 in the paper).
        middle: law of the middle's scale: `gaussian`, as in the paper, or `uniform`, the limit of the Gaussian as
            sigma grows.
    """

    name = "cream"

    def __init__(
        self,
        window: int,
        target: int,
        seed: int = 0,
        sigma: float = 3.0,
        variant: str = "paper",
        relativity: float = 0.5,
        middle: str = "gaussian",
    ):
        super().__init__(window, target, seed)
        if not (isinstance(sigma, Real) and sigma > 0 and math.isfinite(sigma)):
            raise ValueError(f"sigma {sigma}: must be a positive number, 3.0 in the paper")
        if variant not in VARIANTS:
            raise ValueError(f"variant {variant}: choose from {', '.join(VARIANTS)}")
        if not (isinstance(relativity, Real) and 0 <= relativity <= 1):
            raise ValueError(f"relativity {relativity}: must be a share from 0 to 1, 0.5 in the paper")
        if middle not in MIDDLES:
            raise ValueError(f"middle {middle}: choose from {', '.join(MIDDLES)}")
        self.factor = target // window
        if window <= 8 * self.factor:
            raise ValueError(
                f"window {window}: head and tail of 4 x {self.factor} tokens leave no middle; "
                f"must be more than {8 * self.factor} for target {target}"
            )
        self.sigma, self.variant, self.relativity = float(sigma), variant, float(relativity)
        self.thresholds = scale_thresholds(self.factor, self.sigma, censored=variant == "released", middle=middle)

    def _blocks(self, math, epoch, sample, document_length):
        n, s, t_len = self.window, self.factor, document_length
        released = self.variant == "released"
        epoch = 0 if released else epoch
        coin, scale, place, _ = words(self.seed, epoch, sample)
        if released:
            coin = words(self.seed, 0, sample // _RELEASED_BATCH, stream=1)[0]

        # Step 1: relativity (thirds) or continuity (a long middle).
        head = tail = math.where(unit(coin) < self.relativity, n // 3, 4 * s)
        middle = n - head - tail
        # Step 2: the scale of the middle, in half steps k = 2 alpha of {2 .. 2s}.
        k = 2 + math.rank(self.thresholds, unit(scale))
        # Step 3: the position of the middle's last token.
        end = math.draw(unit(place), head + k * (middle - 1) // 2, k * n // 2 - tail - 1)
        # Step 4: the document's tokens at those positions, or the tokens right before its tail.
        limit = t_len if released else t_len - tail
        token_end = math.where(end < limit, end, t_len - tail - 1)
        return (
            (0 * head, token_end - middle + 1, t_len - tail),
            (0 * head, end - middle + 1, self.target - tail),
            (head, middle, tail),
            k / 2,
        )


def scale_thresholds(factor: int, sigma: float, censored: bool, middle: str = "gaussian") -> list[float]:
    """Return the CDF values at which the middle's scale steps up (Algorithm 1, step 2).

    x follows the law `middle` over [2, 2 factor], centered on 1 + factor. Its CDF is tabulated on
    1000 evenly spaced points and inverted by linear interpolation; k = floor(x). So k is 2 plus
    the number of thresholds that are at most u, for a uniform u in [0, 1).

    Returns: list of 2 factor - 2 values: the u at which x = 3, 4, .. 2 factor.
    """
    low, high = 2.0, 2.0 * factor
    if factor == 1:
        return []
    points = np.linspace(low, high, _POINTS)
    signed = MIDDLES[middle](points, factor, sigma)
    cdf = 0.5 + 0.5 * signed
    if not censored:
        cdf = (signed - signed[0]) / (signed[-1] - signed[0])
    return np.interp(np.arange(3, 2 * factor + 1), points, cdf).tolist()
