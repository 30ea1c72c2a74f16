"""Properties every plan has, over windows, factors, deviations, seeds and document lengths."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cream.positions import SAMPLERS, build_sampler
from megatron_cream.positions.random import unit, words

WORD = st.integers(0, 2**64 - 1)


@st.composite
def cases(draw, names=SAMPLERS):
    """(sampler, epoch, sample, document length)."""
    name = draw(st.sampled_from(names))
    factor = draw(st.integers(1, 64))
    window = draw(st.integers(8 * factor + 1 if name == "cream" else 1, 8 * factor + 700))
    options = {}
    if name == "cream":
        options = dict(sigma=draw(st.floats(0.3, 30)), variant=draw(st.sampled_from(["paper", "released"])))
    sampler = build_sampler(name, window=window, target=factor * window, seed=draw(WORD), **options)
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
        assert np.all(np.diff(tokens) > 0)  # no token twice, in the document's order
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
def test_words_are_philox(seed, epoch, sample, stream):
    """numpy's Philox steps its 256-bit counter before it generates."""
    counter = (sample + (stream << 64) - 1) % 2**256
    expected = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64), counter=counter).random_raw(4).tolist()
    assert list(words(seed, epoch, sample, stream)) == expected
    arrays = words(seed, epoch, np.array([sample, sample], dtype=np.uint64), stream)
    assert [int(a[1]) for a in arrays] == expected
    assert unit(expected[0]) == unit(np.array(expected, dtype=np.uint64))[0] and 0 <= unit(expected[0]) < 1


@pytest.mark.parametrize("name", SAMPLERS)
def test_factor_one_is_plain_positions(name):
    sampler = build_sampler(name, window=128, target=128, seed=3)
    for sample in range(50):
        plan = sampler.plan(epoch=0, sample=sample, document_length=128)
        np.testing.assert_array_equal(plan.position_ids, np.arange(128))
        np.testing.assert_array_equal(plan.token_indices, np.arange(128))


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
        (dict(sigma=0.0), ["sigma 0.0", "positive"]),
        (dict(sigma=float("nan")), ["sigma nan"]),
        (dict(variant="draft"), ["variant draft", "paper, released"]),
        (dict(name="pose", sigma=3.0), ["sigma", "pose"]),
        (dict(gap=3), ["gap", "cream", "sigma, variant"]),
    ],
    ids=str,
)
def test_errors_are_one_line(arguments, words_):
    with pytest.raises(ValueError) as caught:
        build_sampler(**(dict(name="cream", window=512, target=4096, seed=1) | arguments))
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words_), caught.value


@pytest.mark.parametrize("name", SAMPLERS)
def test_short_document(name):
    sampler = build_sampler(name, window=128, target=256)
    with pytest.raises(ValueError, match=f"document_length 127.*{sampler.sequence_length}"):
        sampler.plan(0, 0, 127)
