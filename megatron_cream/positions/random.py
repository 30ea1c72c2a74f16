"""Counter-based random numbers: a sample's words depend only on (seed, epoch, stream, sample).

Philox 4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), the
generator of numpy.random.Philox, keyed by (seed, epoch), with one 256-bit block for each
counter (sample, stream). The same code computes with Python integers (one sample, no
numpy overhead) and with numpy arrays (a million samples).
"""

import numpy as np

_MASK = (1 << 64) - 1
_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)


def words(seed: int, epoch: int, sample, stream: int = 0) -> tuple:
    """Return four independent 64-bit words.

    Args:
        seed: integer in [0, 2**64).
        epoch: integer in [0, 2**64).
        sample: integer in [0, 2**64), or a uint64 array of them.
        stream: integer in [0, 2**64); streams are independent.

    Returns: four Python integers, or four uint64 arrays shaped like `sample`.
    """
    if isinstance(sample, np.ndarray):
        stream_words = np.full(sample.shape, stream, dtype=np.uint64)
        zeros = np.zeros(sample.shape, dtype=np.uint64)
        return _rounds((sample.astype(np.uint64), stream_words, zeros, zeros), (seed, epoch), _multiply_arrays)
    return _rounds((sample, stream, 0, 0), (seed, epoch), _multiply_integers)


def word_source(seed: int, epoch: int, sample: int, stream: int) -> np.random.Philox:
    """Return a generator of any number of words of one sample; call its `random_raw`.

    numpy keeps a bit generator's words the same across versions, but not the results of
    Generator methods. Counters are (block, stream, sample, 1); those of `words` end in 0.
    """
    return np.random.Philox(
        counter=np.array([0, stream, sample, 1], dtype=np.uint64), key=np.array([seed, epoch], dtype=np.uint64)
    )


def unit(word):
    """Return a word's first 53 bits as a float64 in [0, 1)."""
    if isinstance(word, np.ndarray):
        return (word >> np.uint64(11)) * 2.0**-53
    return (word >> 11) * 2.0**-53


def _rounds(counter, key, multiply):
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = multiply(_MULTIPLIERS[0], c0)
        high1, low1 = multiply(_MULTIPLIERS[1], c2)
        if isinstance(high0, np.ndarray):
            c0, c1, c2, c3 = high1 ^ c1 ^ np.uint64(k0), low1, high0 ^ c3 ^ np.uint64(k1), low0
        else:
            c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _multiply_integers(a: int, b: int) -> tuple[int, int]:
    product = a * b
    return product >> 64, product & _MASK


def _multiply_arrays(a: int, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the high and low 64 bits of the 128-bit products, computed in 32-bit halves."""
    a_low, a_high = np.uint64(a & 0xFFFFFFFF), np.uint64(a >> 32)
    b_low, b_high = b & _LOW, b >> _32
    low, cross = a_low * b_low, a_high * b_low
    middle = a_low * b_high + (low >> _32) + (cross & _LOW)
    return a_high * b_high + (cross >> _32) + (middle >> _32), np.uint64(a) * b
