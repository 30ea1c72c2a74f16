"""The order of documents in an epoch, computed without a table.

A keyed permutation of 0 .. n-1: a four-round Feistel network on the next even power
of two, repeated until the result is below n. It needs no memory and no cache file for
any n, and every process computes the same entries. It shuffles; it is not encryption.
"""

import numpy as np

_MASK = (1 << 64) - 1


def permute(index: int, n: int, key: tuple[int, int]) -> int:
    """Return the document at place `index`, 0 to n - 1, in the order of `key` (seed, epoch).

    A bijection of range(n) for every key.

    Raises:
        IndexError: index is outside 0 .. n-1.
    """
    if not 0 <= index < n:
        raise IndexError(f"index {index} is not in 0 .. {n - 1}")
    half, round_keys = _schedule(n, key)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for round_key in round_keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        index = left << half | right
        if index < n:
            return index


def permute_range(count: int, n: int, key: tuple[int, int]) -> np.ndarray:
    """Return the documents at the first `count` places, int64, as `permute` does one by one."""
    half, round_keys = _schedule(n, key)
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    index = np.arange(count, dtype=np.uint64)
    open_ = np.arange(count)  # places whose result is not below n yet
    while len(open_):
        left, right = index[open_] >> shift, index[open_] & mask
        for round_key in round_keys:
            left, right = right, left ^ (_mix_array(right ^ np.uint64(round_key)) & mask)
        index[open_] = left << shift | right
        open_ = open_[index[open_] >= n]
    return index.astype(np.int64)


def _schedule(n: int, key: tuple[int, int]) -> tuple[int, list[int]]:
    """Return the bits of half an index below n, and the keys of the rounds."""
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    return half, [_mix(_mix(key[0]) ^ _mix(key[1] + 0x9E3779B97F4A7C15) ^ r) for r in range(4)]


def _mix_array(x: np.ndarray) -> np.ndarray:
    """Mix 64 bits of each uint64, as `_mix`; products wrap."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _mix(x: int) -> int:
    """Mix 64 bits by SplitMix64's finaliser (Steele, Lea & Flood 2014).

    Each output bit depends on all input bits.
    """
    x &= _MASK
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK
    return x ^ (x >> 31)
