"""Coverage of positions by the samplers, counted independently, and the tool that draws it."""

import os
import subprocess
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cream.positions import build_sampler
from megatron_cream.positions.coverage import coverage, distances
from tests import forked_commands

ROOT = Path(__file__).resolve().parents[2]


@settings(max_examples=50, deadline=None)
@given(st.sets(st.integers(0, 99), min_size=1))
def test_distances_are_counted(positions):
    ids = np.array(sorted(positions))
    expected = np.bincount(np.abs(ids[:, None] - ids[None]).ravel(), minlength=100)
    expected[1:] //= 2  # each pair is counted twice
    assert distances(ids, 100).tolist() == expected.tolist()


def test_coverage_counts_samples():
    sampler = build_sampler("cream", window=96, target=384, seed=3)
    found = coverage(sampler, target=384, samples=40, document_length=500)
    plans = [sampler.plan(epoch=0, sample=i, document_length=500) for i in range(40)]
    for p in (0, 40, 190, 383):
        assert found.position[p] == sum(p in plan.position_ids for plan in plans) / 40
        middles = [plan.segments[1] for plan in plans]
        assert found.middle[p] == sum(start <= p < start + size for start, size in middles) / 40
    for d in (1, 200, 383):
        seen = [np.isin(plan.position_ids + d, plan.position_ids).sum() for plan in plans]
        assert found.distance[d] == np.mean(np.array(seen) > 0)
        assert np.isclose(found.pairs[d], np.mean(seen))


def run(*flags):
    command = [*forked_commands.python(), ROOT / "tools" / "plot_positions.py", *flags]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env={**os.environ, "COLUMNS": "120"})


def test_tool_draws(tmp_path):
    size = ["--seq-length", 64, "--target-length", 256, "--samples", 50]
    result = run(*size, "--sigmas", 1, 3, "--variants", "paper", "released", "--output", tmp_path / "a.png")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    kinds = ["--samplers", "cream", "pose", "--middles", "uniform", "--pose-chunks", 3, "--mixes", "cream=1,pi=1"]
    more = run(*size, *kinds, "--output", tmp_path / "b.png")
    assert more.returncode == 0 and all(word in more.stdout for word in ("cream, uniform", "3 chunks", "cream=1,pi=1"))
    assert "cream, sigma 3, released" in result.stdout and "pose" in result.stdout
    row = next(line for line in result.stdout.splitlines() if " pi " in line)
    assert row.count("25.0%") == 3  # exactly a quarter of the window


def test_tool_rejects_bad_input_in_one_line(tmp_path):
    for flags, word in [
        (["--target-length", 5000], "multiple of window"),
        (["--samples", 0], "above 0"),
        (["--sigmas", "-1"], "sigma"),
        (["--samples", 1, "--output", tmp_path / "no" / "a.png"], "does not exist"),
    ]:
        result = run(*flags)
        assert result.returncode == 2 and result.stderr.count("\n") == 1 and word in result.stderr, result.stderr
