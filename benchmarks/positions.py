"""Measure the time to plan positions: block boundaries of many samples, and one sample with its arrays.

    python benchmarks/positions.py [--samples 1000000] [--window 4096]

Uses neither a GPU nor torch. Each figure is the best of several rounds, on one core.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # this folder's profile.py would hide the standard library's

from megatron_cream.positions import SAMPLERS, Sampler, build_sampler

FACTORS = (8, 64)
ROUNDS = 5


def best_seconds(work: Callable[[], object]) -> float:
    """Return the shortest of ROUNDS runs of `work`, in seconds."""
    seconds = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def plan_some(sampler: Sampler, samples: int, document_length: int) -> None:
    """Plan samples one by one, with their arrays; consecutive samples, so that none is cached."""
    for sample in range(samples):
        plan = sampler.plan(0, sample, document_length)
        plan.token_indices, plan.position_ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000, help="samples planned at once")
    parser.add_argument("--window", type=int, default=4096, help="N, tokens of a sample")
    options = parser.parse_args()

    generator = np.random.default_rng(0)
    samples = generator.integers(0, 2**40, options.samples)  # arbitrary, not consecutive
    print(f"numpy {np.__version__}, window {options.window}; best of {ROUNDS}")
    print(f"{'sampler':8} {'s':>3} {'tokens':>7} {'one plan':>10} {f'{options.samples:,} plans':>18}")
    for name in SAMPLERS:
        for factor in FACTORS:
            sampler = build_sampler(name, window=options.window, target=factor * options.window, seed=1234)
            length = sampler.sequence_length
            count = max(20, 4_000_000 // length)
            one = best_seconds(lambda: plan_some(sampler, count, 2 * length)) / count
            many = "-"
            if hasattr(sampler, "plan_many"):
                lengths = generator.integers(length, 2 * sampler.target + 1, options.samples)
                many = f"{best_seconds(lambda: sampler.plan_many(0, samples, lengths)):.2f} s"
            print(f"{name:8} {factor:3} {length:7} {one * 1e6:7.1f} us {many:>18}")


if __name__ == "__main__":
    main()
