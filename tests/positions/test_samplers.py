"""Properties of all plans, over windows, factors, deviations, seeds and document lengths."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cream.positions import SAMPLERS, build_sampler
from megatron_cream.positions.random import unit, word_source, words
from megatron_cream.positions.randpos import _first_distinct
from megatron_cream.positions.sampler import Arrays, Integers

WORD = st.integers(0, 2**64 - 1)
MIX = dict(shares={"cream": 0.5, "pose": 0.2, "pi": 0.2, "randpos": 0.1})


def build(name, **options):
    return build_sampler(name, **options, **(MIX if name == "mix" else {}))


@st.composite
def cases(draw, names=SAMPLERS):
    """Draw a sampler, epoch, sample and document length."""
    name = draw(st.sampled_from(names))
    factor = draw(st.integers(1, 64))
    window = draw(st.integers(8 * factor + 1 if name in ("cream", "mix") else 1, 8 * factor + 700))
    options = {}
    if name == "cream":
        options = dict(
            sigma=draw(st.floats(0.3, 30)),
            variant=draw(st.sampled_from(["paper", "released"])),
            relativity=draw(st.sampled_from([0, 0.5, 1])),
            middle=draw(st.sampled_from(["gaussian", "uniform"])),
        )
    if name == "pose":
        options = dict(chunks=draw(st.integers(2, max(2, min(window, 9)))))
    sampler = build(name, window=window, target=factor * window, seed=draw(WORD), **options)
    least = sampler.sequence_length
    length = draw(st.integers(least, least + draw(st.sampled_from([0, 1, window, 80 * window]))))
    return sampler, draw(st.integers(0, 10**6)), draw(st.integers(0, 2**40)), length


@settings(max_examples=600, deadline=None)
@given(cases())
def test_every_plan(case):
    sampler, epoch, sample, length = case
    plan = sampler.plan(epoch=epoch, sample=sample, document_length=length)
    n = sampler.sequence_length
    ids, tokens = plan.position_ids, plan.token_indices
    assert ids.dtype == tokens.dtype == np.int64 and ids.shape == tokens.shape == (n,)
    assert np.all(np.diff(ids) > 0) and ids[0] >= 0 and ids[-1] < sampler.target
    assert tokens.min() >= 0 and tokens.max() < length
    np.testing.assert_array_equal(ids, np.concatenate([np.arange(s, s + m) for s, m in plan.segments]))
    assert all(m > 0 for _, m in plan.segments)
    if getattr(sampler, "variant", "") != "released":
        assert np.all(np.diff(tokens) > 0)  # in document order, without repeats
    again = sampler.plan(epoch=epoch, sample=sample, document_length=length)
    np.testing.assert_array_equal(again.position_ids, ids)
    np.testing.assert_array_equal(again.token_indices, tokens)


@settings(max_examples=400, deadline=None)
@given(cases(names=("cream",)))
def test_cream_blocks(case):
    sampler, epoch, sample, length = case
    n, s, big = sampler.window, sampler.target // sampler.window, sampler.target
    plan = sampler.plan(epoch=epoch, sample=sample, document_length=length)
    segments = [segment for segment in plan.segments]
    (head_start, h), (middle, m), (tail_start, t) = segments
    assert (head_start, tail_start + t) == (0, big) and h == t and h in (n // 3, 4 * s) and h + m + t == n
    assert 2 * plan.alpha == int(2 * plan.alpha) and 1 <= plan.alpha <= s
    end = middle + m - 1
    assert int(h + plan.alpha * (m - 1)) <= end <= int(plan.alpha * n) - t - 1
    tokens = np.split(plan.token_indices, [h, h + m])
    for block in tokens:
        assert np.all(np.diff(block) == 1)
    assert tokens[0][0] == 0 and tokens[2][-1] == length - 1
    limit = length if sampler.variant == "released" else length - t
    expected = end if end < limit else length - t - 1
    assert tokens[1][-1] == expected


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_middle_near_the_end_of_the_document(variant):
    """Step 4 is right when the middle's end e is at, just before or just after the borders of the tail tokens."""
    sampler = build_sampler("cream", window=128, target=1024, seed=1, variant=variant)
    lengths = 128 + np.arange(200_000) % 900
    plans = sampler.plan_many(0, np.arange(len(lengths)), lengths)
    head, middle, tail = plans.lengths.T
    end = plans.position_starts[:, 1] + middle - 1
    tokens = plans.token_starts[:, 1]
    own, before_tail = end - middle + 1, lengths - tail - middle
    for place in (end == lengths - tail - 1, end == lengths - tail, end == lengths - 1, end == lengths):
        assert place.sum() > 20  # each border case occurs
    if variant == "paper":
        np.testing.assert_array_equal(tokens, np.where(end < lengths - tail, own, before_tail))
        assert np.all(head <= tokens) and np.all(tokens + middle <= lengths - tail)  # no repeated tokens
    else:
        np.testing.assert_array_equal(tokens, np.where(end < lengths, own, before_tail))
        assert np.any(tokens + middle > lengths - tail) and np.all(tokens + middle <= lengths)


def test_draws_on_a_threshold():
    """`plan` and `plan_many` treat a draw equal to a threshold in the same way."""
    thresholds = [0.0, 0.0, 0.25, 0.5, 1.0]
    draws = [0.0, 0.1, 0.25, 0.5, 0.75]
    assert [Integers.rank(thresholds, u) for u in draws] == [2, 2, 3, 4, 4]
    assert Arrays.rank(thresholds, np.array(draws)).tolist() == [2, 2, 3, 4, 4]


@settings(max_examples=150, deadline=None)
@given(cases(names=("cream", "pose", "pi", "full")), st.integers(0, 2**62))
def test_many_equal_one_by_one(case, first):
    sampler, epoch, _, length = case
    samples = np.array([first, first + 1, 3, 2999, 3000, first // 2])
    lengths = length + np.arange(6)
    plans = sampler.plan_many(epoch, samples, lengths)
    assert len(plans) == 6
    for i in range(6):
        assert plans[i] == sampler.plan(epoch, int(samples[i]), int(lengths[i]))


@settings(max_examples=200, deadline=None)
@given(WORD, WORD, WORD, WORD)
def test_draws_are_philox(seed, epoch, sample, stream):
    """The words equal those of numpy's Philox, which increments its 256-bit counter before generating."""
    counter = (sample + (stream << 64) - 1) % 2**256
    expected = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64), counter=counter).random_raw(4).tolist()
    assert list(words(seed, epoch, sample, stream)) == expected
    arrays = words(seed, epoch, np.array([sample, sample], dtype=np.uint64), stream)
    assert [int(a[1]) for a in arrays] == expected
    assert unit(expected[0]) == unit(np.array(expected, dtype=np.uint64))[0] and 0 <= unit(expected[0]) < 1


@settings(max_examples=100, deadline=None)
@given(WORD, st.integers(1, 60), st.data())
def test_randpos_reads_one_row_of_draws(seed, population, data):
    size = data.draw(st.integers(0, population // 2))
    source, row = word_source(seed, 1, 3, stream=2), []
    while len(row) < size:
        value = int(unit(source.random_raw()) * population)
        if value not in row:
            row.append(value)
    assert _first_distinct(word_source(seed, 1, 3, stream=2), population, size).tolist() == sorted(row)


# Name, options, segments (randpos: the first three), first and 65th token at epoch 1, sample 2**40, 2000 tokens.
KEPT = [
    ("cream", {}, ((0, 42), (469, 44), (982, 42)), 0, 491),
    ("cream", {"variant": "released"}, ((0, 42), (436, 44), (982, 42)), 0, 458),
    ("cream", {"middle": "uniform"}, ((0, 42), (523, 44), (982, 42)), 0, 545),
    ("pose", {}, ((0, 10), (593, 118)), 0, 1469),
    ("pose", {"chunks": 3}, ((0, 7), (590, 10), (861, 111)), 0, 1799),
    ("mix", MIX, ((0, 42), (469, 44), (982, 42)), 0, 491),
    ("pi", {}, ((0, 128),), 273, 337),
    ("full", {}, ((0, 1024),), 142, 206),
    ("randpos", {}, ((28, 1), (42, 1), (45, 1)), 273, 337),
]


@pytest.mark.parametrize("name, options, segments, first, later", KEPT, ids=str)
def test_plans_do_not_change_between_versions(name, options, segments, first, later):
    """A run that resumes with another release, or another numpy, must see the same samples."""
    plan = build_sampler(name, window=128, target=1024, seed=1234, **options).plan(1, 2**40, 2000)
    assert tuple(plan.segments)[:3] == segments
    assert (plan.token_indices[0], plan.token_indices[64]) == (first, later)


@pytest.mark.parametrize("name", SAMPLERS)
def test_numpy_integers_are_integers(name):
    python = build(name, window=128, target=1024, seed=3).plan(2, 17, 2000)
    numpy_ = build(name, window=np.int32(128), target=np.int64(1024), seed=np.uint64(3)).plan(
        np.int64(2), np.int32(17), np.int32(2000)
    )
    np.testing.assert_array_equal(python.token_indices, numpy_.token_indices)
    np.testing.assert_array_equal(python.position_ids, numpy_.position_ids)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("epoch, sample", [(-1, 0), (0, -1), (2**64, 0), (0, 2**64), (0, 1.5), (0, None)])
def test_samples_and_epochs_out_of_range(name, epoch, sample):
    sampler = build(name, window=128, target=1024)
    with pytest.raises(ValueError, match=r"^(epoch|sample) .*must be an integer, in 0 \.\. 2\*\*64 - 1$"):
        sampler.plan(epoch, sample, 2000)
    if name not in ("randpos", "mix"):
        with pytest.raises(ValueError, match="must be (an )?integer"):
            sampler.plan_many(epoch, [sample], 2000)


@pytest.mark.parametrize("name", SAMPLERS)
def test_many_plans_of_no_samples(name):
    if name not in ("randpos", "mix"):
        assert len(build_sampler(name, window=128, target=1024).plan_many(0, [], 2000)) == 0


def test_extreme_deviations():
    """A tiny sigma always gives k = 1 + s; a huge sigma gives a uniform k over [2, 2s]."""
    draw = lambda sigma: build_sampler("cream", window=512, target=4096, sigma=sigma)
    assert set(draw(1e-300).plan_many(0, np.arange(500), 5000).alpha) <= {4.0, 4.5}
    for sigma in (1e9, 1e17, 1e308):
        np.testing.assert_allclose(draw(sigma).thresholds, np.arange(1, 15) / 14, rtol=1e-12)


@pytest.mark.parametrize("name", SAMPLERS)
def test_factor_one_is_plain_positions(name):
    sampler = build(name, window=128, target=128, seed=3)
    for sample in range(50):
        plan = sampler.plan(epoch=0, sample=sample, document_length=128)
        np.testing.assert_array_equal(plan.position_ids, np.arange(128))
        np.testing.assert_array_equal(plan.token_indices, np.arange(128))


def test_an_even_middle_is_the_limit_of_wide_gaussians():
    even, wide = (
        build_sampler("cream", window=512, target=4096, seed=9, **o) for o in ({"middle": "uniform"}, {"sigma": 1e6})
    )
    np.testing.assert_allclose(even.thresholds, wide.thresholds, rtol=1e-9)
    a, b = (sampler.plan_many(0, np.arange(5000), 9000) for sampler in (even, wide))
    np.testing.assert_array_equal(a.position_starts, b.position_starts)
    released = build_sampler("cream", window=512, target=4096, middle="uniform", variant="released")
    np.testing.assert_allclose(released.thresholds, even.thresholds)  # no probability mass beyond the ends


@settings(max_examples=100, deadline=None)
@given(WORD, st.integers(0, 10**6), st.integers(0, 2**40))
def test_a_mixture_draws_as_one_of_its_samplers(seed, epoch, sample):
    options = {"pose": {"chunks": 3}, "cream": {"middle": "uniform"}}
    shares = {"pi": 2, "pose": 1, "cream": 3, "randpos": 2}
    mix = build_sampler("mix", window=100, target=400, seed=seed, shares=shares, options=options)
    name = mix.choose(epoch, sample)
    alone = build_sampler(name, window=100, target=400, seed=seed, **options.get(name, {}))
    plan, expected = mix.plan(epoch, sample, 1000), alone.plan(epoch, sample, 1000)
    np.testing.assert_array_equal(plan.position_ids, expected.position_ids)
    np.testing.assert_array_equal(plan.token_indices, expected.token_indices)


def test_epochs():
    draw = lambda variant, epoch: build_sampler("cream", window=512, target=4096, seed=1, variant=variant).plan_many(
        epoch, np.arange(300), 5000
    )
    assert np.mean(draw("paper", 0).position_starts[:, 1] == draw("paper", 1).position_starts[:, 1]) < 0.05
    np.testing.assert_array_equal(draw("released", 0).position_starts, draw("released", 7).position_starts)


@pytest.mark.parametrize(
    "arguments, words_",
    [
        (dict(name="alibi"), ["alibi", "cream, pose"]),
        (dict(window=0), ["window 0", "1 or more"]),
        (dict(target=1000), ["target 1000", "multiple of window 512"]),
        (dict(window=1024, target=512), ["target 512", "1024"]),
        (dict(window=64, target=512), ["window 64", "more than 64"]),
        (dict(seed=-1), ["seed -1"]),
        (dict(seed=2**64), ["seed"]),
        (dict(seed=1.5), ["seed 1.5", "integer"]),
        (dict(window=512.0), ["window 512.0", "integer"]),
        (dict(sigma="3"), ["sigma 3", "number"]),
        (dict(sigma=float("inf")), ["sigma inf"]),
        (dict(sigma=0.0), ["sigma 0.0", "positive"]),
        (dict(sigma=float("nan")), ["sigma nan"]),
        (dict(relativity=1.5), ["relativity 1.5", "0 to 1"]),
        (dict(relativity=-0.1), ["relativity -0.1"]),
        (dict(relativity="1"), ["relativity 1", "share"]),
        (dict(middle="wide"), ["middle wide", "gaussian, uniform"]),
        (dict(name="pose", chunks=1), ["chunks 1", "2 or more"]),
        (dict(name="pose", chunks=513), ["chunks 513", "512"]),
        (dict(name="mix"), ["shares", "cream=0.6"]),
        (dict(name="mix", shares={"full": 1.0}), ["sampler full", "cream, pose"]),
        (dict(name="mix", shares={"pi": 0.0}), ["share 0.0 of pi", "positive"]),
        (dict(variant="draft"), ["variant draft", "paper, released"]),
        (dict(name="pose", sigma=3.0), ["sigma", "pose"]),
        (dict(gap=3), ["gap", "cream", "middle, relativity, sigma, variant"]),
    ],
    ids=str,
)
def test_errors_are_single_lines(arguments, words_):
    with pytest.raises(ValueError) as caught:
        build_sampler(**(dict(name="cream", window=512, target=4096, seed=1) | arguments))
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words_), caught.value


@pytest.mark.parametrize("name", SAMPLERS)
def test_short_document(name):
    sampler = build(name, window=128, target=256)
    with pytest.raises(ValueError, match=f"document_length 127.*{sampler.sequence_length}"):
        sampler.plan(0, 0, 127)
