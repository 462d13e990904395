"""The numbers of `edge_bcs.core.random`, computed by torch where the network is, the same to the bit.

On a CPU numpy is used; on a GPU, drawing there saves the host's time and the transfer. The operations are
those of `edge_bcs.core.random`, each rounded separately, so both give the same float32 numbers. There the
step may be a tensor i64[], so that a recorded graph draws anew each time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edge_bcs.core import random

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def uniform(
    count: int, *, seed: int, step: int | Tensor, purpose: int, start: int = 0, device: torch.device
) -> Tensor:
    """Return f32[count] uniform in [0, 1), as `random.uniform`, on `device`."""
    if device.type == "cpu":
        step = int(step)
        return torch.from_numpy(random.uniform(count, seed=seed, step=step, purpose=purpose, start=start))
    return uniform_from_words(words(count, seed=seed, step=step, purpose=purpose, start=start, device=device))


def normal(
    count: int, *, seed: int, step: int | Tensor, purpose: int, start: int = 0, device: torch.device
) -> Tensor:
    """Return f32[count] standard normal, as `random.normal`, on `device`."""
    if device.type == "cpu":
        step = int(step)
        return torch.from_numpy(random.normal(count, seed=seed, step=step, purpose=purpose, start=start))
    return normal_from_words(words(count, seed=seed, step=step, purpose=purpose, start=start, device=device))


def words(
    count: int, *, seed: int, step: int | Tensor, purpose: int, start: int = 0, device: torch.device
) -> Tensor:
    """Return the draws start to start + count − 1, i64[count] of 32-bit words, as `random.words`."""
    first, last = start // 4, (start + count + 3) // 4
    block = torch.arange(first, last, device=device)
    return blocks(block, seed=seed, step=step, purpose=purpose).flatten()[start - 4 * first :][:count]


def signs(positions: Tensor, *, seed: int) -> Tensor:
    """Return γ (f32, ±1) of positions i64[n], as `random.signs`."""
    word = blocks(positions, seed=seed, step=0, purpose=random.SIGN)[:, 0]
    return 1.0 - 2.0 * (word >> 31).to(torch.float32)


def blocks(block: Tensor, *, seed: int, step: int | Tensor, purpose: int) -> Tensor:
    """Return the words of the blocks with these numbers i64[n], i64 [n, 4], as `random.blocks`."""
    c0, c1 = block & _MASK, block >> 32
    c2 = _everywhere(step & _MASK, block)
    c3 = _everywhere(purpose | (step >> 32) << 8, block)
    k0, k1 = seed & _MASK, seed >> 32
    for _ in range(10):
        # 64-bit products of 32-bit numbers: they wrap into the sign bit, which the masks take away again.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32 & _MASK) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32 & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return torch.stack([c0, c1, c2, c3], dim=1)


def _everywhere(number: int | Tensor, block: Tensor) -> Tensor:
    return number.expand_as(block) if isinstance(number, Tensor) else torch.full_like(block, number)


def uniform_from_words(word: Tensor) -> Tensor:
    """Return (word >> 8)·2⁻²⁴ as f32."""
    return (word >> 8).to(torch.float32) * 2.0**-24


def normal_from_words(word: Tensor) -> Tensor:
    """Return f32, the standard normal quantiles at (word + ½)·2⁻³² (Wichura's AS 241), without a branch."""
    u = (word.to(torch.float64) + 0.5) * 2.0**-32
    q = u - 0.5
    central = q * _ratio(random.CENTRE, 0.180625 - q * q)
    depth = torch.sqrt(-_log(torch.where(q < 0, u, 1.0 - u)))
    size = torch.where(depth <= 5, _ratio(random.MIDDLE, depth - 1.6), _ratio(random.TAIL, depth - 5.0))
    outside = torch.where(q < 0, -size, size)
    return torch.where(q.abs() > 0.425, outside, central).to(torch.float32)


def _ratio(coefficients: tuple[tuple[float, ...], tuple[float, ...]], x: Tensor) -> Tensor:
    return _polynomial(coefficients[0], x) / _polynomial(coefficients[1], x)


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    total = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total = total * x + coefficient
    return total


def _log(x: Tensor) -> Tensor:
    """Natural logarithm of positive numbers from + − × ÷ only, as `random._log`."""
    m, e = torch.frexp(x)
    low = m < random.SQRT_HALF
    m = torch.where(low, m * 2, m)
    exponent = torch.where(low, e - 1, e).to(torch.float64)
    s = (m - 1) / (m + 1)
    series = _polynomial(tuple(1.0 / (2 * k + 1) for k in range(12)), s * s)
    return exponent * random.LN2_HIGH + ((2 * s) * series + exponent * random.LN2_LOW)
