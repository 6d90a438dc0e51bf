"""Numbers that go into tables, with their uncertainty."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, sqrt
from statistics import NormalDist

import numpy as np


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of a success rate (Wilson 1927). Raises ValueError unless 0 <= successes <= trials, trials > 0."""
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"{successes} successes in {trials} trials")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    rate, spread = successes / trials, z * z / trials
    centre = (rate + spread / 2) / (1 + spread)
    half = sqrt(rate * (1 - rate) * spread + spread * spread / 4) / (1 + spread)
    # Exact at the ends, where rounding would leave 1e-17.
    return 0.0 if successes == 0 else centre - half, 1.0 if successes == trials else centre + half


@dataclass(frozen=True)
class Paired:
    """Two arms on the same seeds; `difference` is the first arm's rate minus the second's."""

    trials: int
    only_first: int  # seeds where the first arm alone succeeds
    only_second: int
    difference: float
    interval: tuple[float, float]
    p_value: float


def paired_comparison(first: Sequence[bool], second: Sequence[bool], confidence: float = 0.95) -> Paired:
    """Compare outcomes on the same seeds, in the same order.

    p_value: exact two-sided McNemar test. interval: Newcombe 1998 (Statistics in Medicine 17:2635), method 10: the two
    Wilson intervals combined by squares, with the correlation of the pairs.
    """
    if len(first) != len(second) or len(first) == 0:
        raise ValueError(f"need the same seeds, at least one: got {len(first)} and {len(second)} outcomes")
    a, b = np.asarray(first, bool), np.asarray(second, bool)
    both, only_a, only_b, none = (int(np.sum(x)) for x in (a & b, a & ~b, ~a & b, ~a & ~b))
    trials, discordant = len(a), only_a + only_b
    tail = sum(comb(discordant, k) for k in range(min(only_a, only_b) + 1)) / 2**discordant

    p, q = (both + only_a) / trials, (both + only_b) / trials
    (p_low, p_high), (q_low, q_high) = (wilson_interval(k, trials, confidence) for k in (both + only_a, both + only_b))
    phi = _phi(both, only_a, only_b, none)
    below, above = (p - p_low, q_high - q), (p_high - p, q - q_low)
    low, high = (sqrt(max(x * x - 2 * phi * x * y + y * y, 0)) for x, y in (below, above))
    return Paired(trials, only_a, only_b, p - q, (p - q - low, p - q + high), min(1.0, 2 * tail))


def _phi(both: int, only_a: int, only_b: int, none: int) -> float:
    """Newcombe's continuity-corrected correlation of the pairs; 0 where a margin is empty."""
    margins = (both + only_a) * (only_b + none) * (both + only_b) * (only_a + none)
    if margins == 0:
        return 0.0
    determinant = both * none - only_a * only_b
    if determinant > 0:
        determinant = max(determinant - (both + only_a + only_b + none) / 2, 0)
    return determinant / sqrt(margins)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of uint8 arrays of one shape; infinite when they are equal."""
    if a.dtype != np.uint8 or b.dtype != np.uint8 or a.shape != b.shape:
        raise ValueError(f"expected uint8 arrays of one shape, got {a.dtype} {a.shape} and {b.dtype} {b.shape}")
    error = np.mean(np.square(a.astype(np.float64) - b))
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def _paired(real: Sequence[float], simulated: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(real, float), np.asarray(simulated, float)
    if a.shape != b.shape or a.size < 2:
        raise ValueError(f"need the same policies on both sides, at least two: got {a.size} and {b.size}")
    if not np.isfinite([a, b]).all():
        raise ValueError(f"success rates must be numbers, got {real} and {simulated}")
    return a, b


def pearson(real: Sequence[float], simulated: Sequence[float]) -> float:
    """Correlation of success rates of several policies; NaN where all of one side are equal."""
    a, b = _paired(real, simulated)
    a, b = a - a.mean(), b - b.mean()
    scale = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / scale) if scale else float("nan")


def mean_maximum_rank_violation(real: Sequence[float], simulated: Sequence[float]) -> float:
    """MMRV of SIMPLER (arXiv:2405.05941, section 4): how much real success the simulator's worst misranking hides.

    The mean over policies i of the largest |real_i - real_j| over those j that the simulator orders the other way.
    """
    a, b = _paired(real, simulated)
    apart = np.abs(a[:, None] - a[None])
    misranked = (a[:, None] > a[None]) != (b[:, None] > b[None])  # of ties, as upstream's code has it
    return float((apart * misranked).max(axis=1).mean())
