"""The order in which an epoch visits its documents, without a table.

A keyed permutation of 0 .. n-1: a four-round Feistel network on the next even power
of two, walked until it lands below n. It needs no memory and no cache file whatever
n is, and any process computes any entry alike. It is for shuffling, not for secrecy.
"""

_MASK = (1 << 64) - 1


def permute(index: int, n: int, key: tuple[int, int]) -> int:
    """The document visited at `index` (0 <= index < n) under `key` (seed, epoch).

    A bijection of range(n) for every key.

    Raises:
        IndexError: index is outside 0 .. n-1.
    """
    if not 0 <= index < n:
        raise IndexError(f"index {index} is not in 0 .. {n - 1}")
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    round_keys = [_mix(_mix(key[0]) ^ _mix(key[1] + 0x9E3779B97F4A7C15) ^ r) for r in range(4)]
    while True:
        left, right = index >> half, index & mask
        for round_key in round_keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        index = left << half | right
        if index < n:
            return index


def _mix(x: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea & Flood 2014): every bit depends on every bit."""
    x &= _MASK
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK
    return x ^ (x >> 31)
