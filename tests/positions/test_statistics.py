"""The samplers follow the distributions of the paper and of the released code; seeds are fixed."""

import numpy as np
import pytest
from scipy import stats

from megatron_cream.positions import build_sampler

DRAWS = 200_000
REJECT = 1e-4


def cream(window, factor, sigma=3.0, variant="paper", draws=DRAWS, seed=1234):
    sampler = build_sampler("cream", window=window, target=factor * window, seed=seed, sigma=sigma, variant=variant)
    return sampler, sampler.plan_many(0, np.arange(draws), 10**7)


def exact_scale(factor: int, sigma: float, variant: str) -> np.ndarray:
    """Return the probabilities of k = 2 to 2 factor, the floor of a truncated or censored Gaussian.

    The variant "paper" truncates, "released" censors.
    """
    cdf = stats.norm(1 + factor, sigma).cdf(np.arange(2, 2 * factor + 1))
    inside = np.diff(cdf)
    if variant == "paper":
        return np.append(inside / inside.sum(), 0.0)
    return np.append(inside, 1 - cdf[-1]) + np.append(cdf[0], np.zeros(len(inside)))


def chi_square(k: np.ndarray, probabilities: np.ndarray) -> float:
    """Return the p-value; neighbouring bins are merged until each has an expected count of 20."""
    counts = np.bincount(k - 2, minlength=len(probabilities))
    expected = probabilities * len(k)
    edges, total = [0], 0.0
    for i, e in enumerate(expected):
        total += e
        if total >= 20 and expected[i + 1 :].sum() >= 20:
            edges.append(i + 1)
            total = 0.0
    return stats.chisquare(np.add.reduceat(counts, edges), np.add.reduceat(expected, edges)).pvalue


SCALES = [(8, 3.0), (64, 3.0), (2, 1.0), (16, 10.0), (8, 6.0)]


@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("factor, sigma", SCALES)
def test_scale_of_the_middle(factor, sigma, variant):
    _, plans = cream(1024, factor, sigma, variant)
    k = (2 * plans.alpha).astype(int)
    assert chi_square(k, exact_scale(factor, sigma, variant)) > REJECT
    if variant == "paper":
        assert k.max() < 2 * factor  # the end of a continuous distribution has no mass


@pytest.mark.parametrize("factor, sigma", [(8, 3.0), (8, 6.0), (16, 10.0)])
def test_the_two_variants_differ(factor, sigma):
    """The chi-square test above tells the variants apart."""
    for variant, other in (("paper", "released"), ("released", "paper")):
        k = (2 * cream(1024, factor, sigma, variant)[1].alpha).astype(int)
        expected = np.maximum(exact_scale(factor, sigma, other), 1e-12)
        assert chi_square(k, expected / expected.sum()) < REJECT


def test_both_strategies_at_one_half():
    sampler, plans = cream(1024, 8)
    thirds = plans.lengths[:, 0] == 1024 // 3
    assert set(plans.lengths[:, 0]) == {1024 // 3, 32}
    assert stats.binomtest(int(thirds.sum()), DRAWS).pvalue > REJECT
    # The strategy is independent of the scale.
    table = [np.bincount((2 * plans.alpha[thirds == side]).astype(int), minlength=17)[4:15] for side in (0, 1)]
    assert stats.chi2_contingency(table).pvalue > REJECT


def test_released_draws_the_strategy_once_per_3000_documents():
    _, plans = cream(1024, 8, variant="released", draws=600 * 3000)
    batches = (plans.lengths[:, 0] == 1024 // 3).reshape(600, 3000)
    assert np.all(batches == batches[:, :1])
    assert stats.binomtest(int(batches[:, 0].sum()), 600).pvalue > REJECT


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_end_of_the_middle_is_uniform(variant):
    _, plans = cream(1024, 8, variant=variant)
    head, middle, tail = plans.lengths.T
    k = (2 * plans.alpha).astype(int)
    end = plans.position_starts[:, 1] + middle - 1
    low, high = head + k * (middle - 1) // 2, k * 1024 // 2 - tail - 1
    wide = high > low
    # Both ends occur, and the dithered place in the interval is uniform.
    assert np.any(end[wide] == low[wide]) and np.any(end[wide] == high[wide])
    place = (end - low + np.random.default_rng(0).random(DRAWS)) / (high - low + 1)
    assert stats.kstest(place[wide], "uniform").pvalue > REJECT


def test_pose_draws_are_uniform():
    sampler = build_sampler("pose", window=100, target=800, seed=5)
    plans = sampler.plan_many(0, np.arange(DRAWS), 300)
    first = plans.lengths[:, 0]
    draws = {
        "split": (first - 1, 50),
        "shift": (plans.position_starts[:, 1] - first, 701),
        "gap": (plans.token_starts[:, 1] - first, 201),
    }
    for name, (values, n) in draws.items():
        assert stats.chisquare(np.bincount(values, minlength=n)).pvalue > REJECT, name
    names = list(draws)
    for a, b in [(0, 1), (0, 2), (1, 2)]:
        assert stats.pearsonr(draws[names[a]][0], draws[names[b]][0]).pvalue > REJECT


def test_the_shifts_of_more_chunks_rise():
    """With four chunks, each shift is uniform from the previous one on, and each length in its range."""
    n, target, length, chunks = 100, 800, 300, 4
    plans = build_sampler("pose", window=n, target=target, seed=6, chunks=chunks).plan_many(0, np.arange(DRAWS), length)
    begins = np.cumsum(plans.lengths, axis=1) - plans.lengths
    dither = np.random.default_rng(1).random(DRAWS)
    for starts, last in ((plans.position_starts, target - n), (plans.token_starts, length - n)):
        shifts = starts - begins
        assert np.all(shifts[:, 0] == 0) and np.all(np.diff(shifts, axis=1) >= 0) and shifts.max() == last
        for before, after in zip(shifts.T, shifts.T[1:]):
            place = (after - before + dither) / (last - before + 1)
            assert stats.kstest(place, "uniform").pvalue > REJECT
    for i in range(chunks - 1):
        most = (n - begins[:, i] + 1) // (chunks - i)
        place = (plans.lengths[:, i] - 1 + dither) / most
        assert plans.lengths[:, i].min() == 1 and stats.kstest(place, "uniform").pvalue > REJECT
    assert plans.lengths.min() == 1 and np.all(plans.lengths.sum(axis=1) == n)


def test_an_even_middle_is_even():
    plans = build_sampler("cream", window=1024, target=8192, seed=1, middle="uniform").plan_many(
        0, np.arange(DRAWS), 9000
    )
    counts = np.bincount((2 * plans.alpha).astype(int) - 2, minlength=15)
    assert counts[14] == 0 and stats.chisquare(counts[:14]).pvalue > REJECT


def test_a_mixture_has_its_shares():
    """Choices follow the shares, independently between samples, epochs and the samplers' own draws."""
    shares = {"cream": 3.0, "pose": 1.0, "pi": 1.0}
    mix = build_sampler("mix", window=100, target=800, seed=8, shares=shares)
    chosen = np.array([list(shares).index(mix.choose(epoch, i)) for epoch in (0, 1) for i in range(20_000)])
    assert stats.chisquare(np.bincount(chosen), len(chosen) * np.array([0.6, 0.2, 0.2])).pvalue > REJECT
    first, second = chosen.reshape(2, -1)
    for a, b in ((first, second), (first[1:], first[:-1])):
        table = np.zeros((3, 3))
        np.add.at(table, (a, b), 1)
        assert stats.chi2_contingency(table).pvalue > REJECT
    coin = mix.parts["cream"].plan_many(0, np.arange(20_000), 1000).lengths[:, 0] == 33
    table = [np.bincount(first[coin == side], minlength=3) for side in (False, True)]
    assert stats.chi2_contingency(table).pvalue > REJECT


def test_pi_starts_uniformly():
    plans = build_sampler("pi", window=100, target=100, seed=5).plan_many(0, np.arange(DRAWS), 150)
    assert stats.chisquare(np.bincount(plans.token_starts[:, 0], minlength=51)).pvalue > REJECT


@pytest.mark.parametrize("target", [48, 400])
def test_randpos_takes_every_position_alike(target):
    """Counts of positions and of neighbouring pairs over many samples are as expected."""
    size, draws = 16, 20_000
    sampler = build_sampler("randpos", window=size, target=target, seed=2)
    ids = np.stack([sampler.plan(0, i, 64).position_ids for i in range(draws)])
    counts = np.bincount(ids.ravel(), minlength=target)
    # Without replacement the variance of the counts is (1 - N / L) times a multinomial's.
    statistic = np.sum((counts - draws * size / target) ** 2 / (draws * size / target)) / (1 - size / target)
    assert stats.chi2(target - 1).sf(statistic * (target - 1) / target) > REJECT
    pairs = np.sum(np.diff(ids) == 1)
    expected = draws * (target - 1) * size * (size - 1) / (target * (target - 1))
    assert pairs == pytest.approx(expected, rel=0.03)


def test_neighbours_and_epochs_are_independent():
    sampler, plans = cream(1024, 8)
    values = plans.alpha
    assert stats.pearsonr(values[:-1], values[1:]).pvalue > REJECT
    assert stats.pearsonr(values, sampler.plan_many(1, np.arange(DRAWS), 10**7).alpha).pvalue > REJECT
    other = build_sampler("cream", window=1024, target=8192, seed=1235).plan_many(0, np.arange(DRAWS), 10**7)
    assert stats.pearsonr(values, other.alpha).pvalue > REJECT
