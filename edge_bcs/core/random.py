"""Counter-based random numbers: Philox4x32-10, the same to the bit as the operator library's.

Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. A number is a function
of (seed, step, purpose, draw), so a run is the same whatever the number of threads, and a resumed run is the
run that would have been. The normal distribution uses only operations that IEEE 754 rounds exactly, hence the
same bits on every machine.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edge_bcs.core.errors import EdgeBcsError

# What numbers are for: each purpose has a stream of its own in every step.
SIGN = 1  # γ of a position (step 0, block = position)
NOISE = 2  # Langevin noise of entry t of the κ arrays
BIRTH = 3  # candidates for new connections
PGD_START = 4
SHUFFLE = 5
AUGMENT = 6
MASK = 7  # the initial connections
WEIGHT = 8  # the initial θ
EVALUATION = 9
BALANCE = 10  # the order of the classes in each round
CORRUPTION = 11  # of an image that is measured, and of one severity
GROWTH = 12  # candidates for connections that grow where the gradient is large

_MULTIPLIER = np.array([0xD2511F53, 0xCD9E8D57], np.uint64)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def philox(counter: ArrayLike, key: tuple[int, int]) -> NDArray[np.uint32]:
    """Philox4x32 with ten rounds.

    Args:
        counter: u32[..., 4], the counters.
        key: two u32.

    Returns:
        u32[..., 4]: four random words for each counter.
    """
    c0, c1, c2, c3 = np.moveaxis(np.asarray(counter, np.uint64), -1, 0)
    k0, k1 = key
    for _ in range(10):
        product0, product1 = _MULTIPLIER[0] * c0, _MULTIPLIER[1] * c2
        c0, c1, c2, c3 = (
            (product1 >> _HALF) ^ c1 ^ np.uint64(k0),
            product1 & _LOW,
            (product0 >> _HALF) ^ c3 ^ np.uint64(k1),
            product0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def blocks(numbers: ArrayLike, *, seed: int, step: int, purpose: int) -> NDArray[np.uint32]:
    """Returns u32[n, 4], the words of the blocks with these numbers.

    Args:
        numbers: u64[n], block numbers.
        seed: in [0, 2⁶⁴).
        step: in [0, 2⁵⁶).
        purpose: in [0, 256).

    Raises:
        EdgeBcsError: seed, step or purpose is out of range.
    """
    if not (0 <= seed < 1 << 64 and 0 <= step < 1 << 56 and 0 <= purpose < 256):
        raise EdgeBcsError(
            f"the seed {seed} must be in [0, 2^64), the step {step} in [0, 2^56) and the purpose {purpose} "
            "in [0, 256)."
        )
    block = np.atleast_1d(np.asarray(numbers)).astype(np.uint64)
    counter = np.empty((*block.shape, 4), np.uint64)
    counter[..., 0] = block & _LOW
    counter[..., 1] = block >> _HALF
    counter[..., 2] = step & 0xFFFFFFFF
    counter[..., 3] = purpose | (step >> 32) << 8
    return philox(counter, (seed & 0xFFFFFFFF, seed >> 32))


def words(count: int, *, seed: int, step: int, purpose: int, start: int = 0) -> NDArray[np.uint32]:
    """Returns u32[count], draws start to start + count − 1: draw t is word t mod 4 of block t // 4."""
    first, last = start // 4, (start + count + 3) // 4
    drawn = blocks(np.arange(first, last), seed=seed, step=step, purpose=purpose).reshape(-1)
    return drawn[start - 4 * first : start - 4 * first + count]


def uniform(count: int, *, seed: int, step: int, purpose: int, start: int = 0) -> NDArray[np.float32]:
    """Returns f32[count], uniform in [0, 1): the multiples of 2⁻²⁴."""
    return uniform_from_words(words(count, seed=seed, step=step, purpose=purpose, start=start))


def normal(count: int, *, seed: int, step: int, purpose: int, start: int = 0) -> NDArray[np.float32]:
    """Returns f32[count], standard normal."""
    return normal_from_words(words(count, seed=seed, step=step, purpose=purpose, start=start))


def signs(positions: ArrayLike, *, seed: int) -> NDArray[np.float32]:
    """Returns γ (f32, ±1) of the positions: +1 where the top bit of word 0 of the position's block is 0."""
    word = blocks(positions, seed=seed, step=0, purpose=SIGN)[..., 0]
    return np.where(word >> 31 == 0, np.float32(1), np.float32(-1))


def uniform_from_words(word: NDArray[np.uint32]) -> NDArray[np.float32]:
    """Returns (word >> 8)·2⁻²⁴ as f32."""
    return (word >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)


class IntegerStream:
    """Integers uniform in [0, below), one after the other, from the words of (seed, step, purpose) in order.

    Lemire's method without bias: word w gives m = w·below; it is skipped if m mod 2³² < 2³² mod below;
    otherwise the integer is m >> 32.
    """

    def __init__(self, below: int, *, seed: int, step: int, purpose: int) -> None:
        if not 0 < below <= 1 << 32:
            raise EdgeBcsError(f"integers can be drawn below 1 to 2^32, not below {below}.")
        self._seed, self._step, self._purpose = seed, step, purpose
        self._below = np.uint64(below)
        self._threshold = np.uint64((1 << 32) % below)
        self._next_word = 0
        self._ready: NDArray[np.int64] = np.empty(0, np.int64)

    def take(self, count: int) -> NDArray[np.int64]:
        """Returns i64[count], the next integers."""
        parts = [self._ready]
        missing = count - len(self._ready)
        while missing > 0:
            fetched = max(missing, 64)
            word = words(
                fetched, seed=self._seed, step=self._step, purpose=self._purpose, start=self._next_word
            )
            self._next_word += fetched
            product = word.astype(np.uint64) * self._below
            parts.append((product[(product & _LOW) >= self._threshold] >> _HALF).astype(np.int64))
            missing -= len(parts[-1])
        drawn = np.concatenate(parts)
        self._ready = drawn[count:]
        return drawn[:count]


def integers(count: int, below: int, *, seed: int, step: int, purpose: int) -> NDArray[np.int64]:
    """Returns i64[count], uniform in [0, below): the first integers of the `IntegerStream`."""
    return IntegerStream(below, seed=seed, step=step, purpose=purpose).take(count)


# The inverse of the normal distribution function: Wichura, "Algorithm AS 241: The percentage points of the
# normal distribution", Applied Statistics 37 (1988), PPND16; relative accuracy about 1e-16. Lowest power
# first. `edge_bcs.method.device_random` computes with the same numbers.
CENTRE = (
    (3.3871328727963666080e0, 1.3314166789178437745e2, 1.9715909503065514427e3,
     1.3731693765509461125e4, 4.5921953931549871457e4, 6.7265770927008700853e4,
     3.3430575583588128105e4, 2.5090809287301226727e3),
    (1.0, 4.2313330701600911252e1, 6.8718700749205790830e2,
     5.3941960214247511077e3, 2.1213794301586595867e4, 3.9307895800092710610e4,
     2.8729085735721942674e4, 5.2264952788528545610e3),
)  # fmt: skip
MIDDLE = (
    (1.42343711074968357734e0, 4.63033784615654529590e0, 5.76949722146069140550e0,
     3.64784832476320460504e0, 1.27045825245236838258e0, 2.41780725177450611770e-1,
     2.27238449892691845833e-2, 7.74545014278341407640e-4),
    (1.0, 2.05319162663775882187e0, 1.67638483018380384940e0,
     6.89767334985100004550e-1, 1.48103976427480074590e-1, 1.51986665636164571966e-2,
     5.47593808499534494600e-4, 1.05075007164441684324e-9),
)  # fmt: skip
TAIL = (
    (6.65790464350110377720e0, 5.46378491116411436990e0, 1.78482653991729133580e0,
     2.96560571828504891230e-1, 2.65321895265761230930e-2, 1.24266094738807843860e-3,
     2.71155556874348757815e-5, 2.01033439929228813265e-7),
    (1.0, 5.99832206555887937690e-1, 1.36929880922735805310e-1,
     1.48753612908506148525e-2, 7.86869131145613259100e-4, 1.84631831751005468180e-5,
     1.42151175831644588870e-7, 2.04426310338993978564e-15),
)  # fmt: skip

# The leading 32 bits of ln 2, so that its multiples by exponents are exact, and the rest.
LN2_HIGH = 6.93147180369123816490e-01
LN2_LOW = 1.90821492927058770002e-10
SQRT_HALF = 0.70710678118654752440


def _polynomial(coefficients: tuple[float, ...], x: NDArray[np.float64]) -> NDArray[np.float64]:
    total = np.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total = total * x + coefficient
    return total


def _log(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Natural logarithm of positive numbers, from + − × ÷ only: x = m·2ᵉ, log m = 2 artanh((m−1)/(m+1))."""
    m, e = np.frexp(x)
    low = m < SQRT_HALF
    m = np.where(low, m * 2.0, m)
    exponent = np.where(low, e - 1, e).astype(np.float64)
    s = (m - 1.0) / (m + 1.0)
    series = _polynomial(tuple(1.0 / (2 * k + 1) for k in range(12)), s * s)
    return exponent * LN2_HIGH + ((2.0 * s) * series + exponent * LN2_LOW)


def normal_from_words(word: NDArray[np.uint32]) -> NDArray[np.float32]:
    """Returns f32, the standard normal quantiles at u = (word + ½)·2⁻³²."""
    u = (word.astype(np.float64) + 0.5) * 2.0**-32
    q = u - 0.5
    r = 0.180625 - q * q
    central = q * (_polynomial(CENTRE[0], r) / _polynomial(CENTRE[1], r))
    outside = np.abs(q) > 0.425
    if outside.any():
        edge, side = u[outside], q[outside]
        depth = np.sqrt(-_log(np.where(side < 0.0, edge, 1.0 - edge)))
        middle, tail = depth - 1.6, depth - 5.0
        size = np.where(
            depth <= 5.0,
            _polynomial(MIDDLE[0], middle) / _polynomial(MIDDLE[1], middle),
            _polynomial(TAIL[0], tail) / _polynomial(TAIL[1], tail),
        )
        central[outside] = np.where(side < 0.0, -size, size)
    return central.astype(np.float32)
