"""A shuffled order that needs no memory: a keyed bijection of 0 … n − 1 that is computed position by position.

A Feistel network over pairs (left, right) of Z_a × Z_b with a·b just above n: each round adds to one half a hash of
the other, modulo its size, so every round can be undone and the whole is a permutation of 0 … a·b − 1. What
lands at n or above is sent through again until it is below ("cycle walking", Black and Rogaway 2002, "Ciphers with
arbitrary finite domains"), which keeps it a permutation of 0 … n − 1. Sixteen rounds of SplitMix64's finaliser; integer
arithmetic alone, so the order is the same on every machine and with every version of NumPy.
"""

import hashlib
import math

import numpy as np
import numpy.typing as npt

ROUNDS = 16  # with 8, the orders of five records are measurably not alike
Numbers = npt.NDArray[np.int64]


class Permutation:
    """`permutation(positions)` are the shuffled places of `positions`, for 0 … size − 1."""

    def __init__(self, size: int, key: str) -> None:
        """Args: size: how many there are; key: whatever tells this order from others."""
        self.size = size
        left = math.isqrt(max(size, 1) - 1) + 1
        self._sizes = np.uint64(left), np.uint64(-(-max(size, 1) // left))
        self._keys = np.frombuffer(hashlib.shake_256(key.encode("utf-8")).digest(8 * ROUNDS), dtype="<u8")

    def __call__(self, positions: npt.ArrayLike) -> Numbers:
        """(n,) positions below `size` to (n,) places, each below `size`, no two alike."""
        values = np.atleast_1d(np.asarray(positions)).astype(np.uint64)
        if values.size and int(values.max()) >= self.size:
            raise IndexError(f"Position {int(values.max())} is not below {self.size}.")
        values = self._once(values)
        while (outside := values >= self.size).any():
            values[outside] = self._once(values[outside])
        return values.astype(np.int64)

    def _once(self, values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        left_size, right_size = self._sizes
        left, right = values // right_size, values % right_size
        for number in range(0, ROUNDS, 2):
            left = (left + _mix(right + self._keys[number]) % left_size) % left_size
            right = (right + _mix(left + self._keys[number + 1]) % right_size) % right_size
        return left * right_size + right


def draw(size: int, key: str, first: int, last: int) -> tuple[Numbers, Numbers]:
    """Draws `first` to `last` (excluded) of an endless stream that goes through 0 … size − 1 again and again.

    Each pass has an order of its own, so that all come once before any comes twice. Any part can be had by itself.

    Returns:
        the draws themselves (n,), pass by pass, and the places (n,) that they came to.
    """
    draws = np.arange(first, last)
    passes, positions = np.divmod(draws, size)
    places = np.empty_like(draws)
    for number in np.unique(passes):
        chosen = passes == number
        places[chosen] = Permutation(size, f"{key}/pass {number}")(positions[chosen])
    return draws, places


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014); wraps at 2⁶⁴."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
