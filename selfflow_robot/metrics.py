"""Numbers that go into tables, with their uncertainty."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb, sqrt
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

import numpy as np


def wilson_interval(successes: float, trials: float, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of a success rate (Wilson 1927); fractions are of trials that count less than one, because they
    repeat each other. Raises ValueError unless 0 <= successes <= trials, trials > 0."""
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

    interval = newcombe_interval(both, only_a, only_b, none, confidence)
    return Paired(trials, only_a, only_b, (only_a - only_b) / trials, interval, min(1.0, 2 * tail))


def newcombe_interval(
    both: float, only_a: float, only_b: float, none: float, confidence: float = 0.95
) -> tuple[float, float]:
    """Of the difference of two paired rates, from how often both, one or none succeed (Newcombe 1998, method 10);
    fractions as in `wilson_interval`."""
    trials = both + only_a + only_b + none
    p, q = (both + only_a) / trials, (both + only_b) / trials
    (p_low, p_high), (q_low, q_high) = (wilson_interval(k, trials, confidence) for k in (both + only_a, both + only_b))
    phi = _phi(both, only_a, only_b, none)
    below, above = (p - p_low, q_high - q), (p_high - p, q - q_low)
    low, high = (sqrt(max(x * x - 2 * phi * x * y + y * y, 0)) for x, y in (below, above))
    return p - q - low, p - q + high


def _phi(both: float, only_a: float, only_b: float, none: float) -> float:
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


# ---------------------------------------------------------------------------------------------------- what frames show

MOVING = 20  # of 255: a pixel has moved where some channel changes by more; video compression changes less
MOVING_SHARE = 0.005  # of a frame's pixels; below it there is no motion to judge
ROUNDING = 1 / 12  # squared error of rounding to 8 bits: equal frames count as 58.9 dB, not as infinitely many


def moving(given: np.ndarray, future: np.ndarray) -> np.ndarray:
    """Pixels that differ between the given frame (..., H, W, 3) and real future ones, uint8 -> bool (..., H, W).

    Most of a scene never moves, and a prediction that repeats what it was given has that right.
    """
    return (np.abs(future.astype(np.int16) - given) > MOVING).any(-1)


def frame_psnr(real: np.ndarray, predicted: np.ndarray, counted: np.ndarray | None = None) -> np.ndarray:
    """PSNR in dB of every frame: uint8 (..., H, W, 3) twice -> float64 (...), at most that of rounding to 8 bits.

    counted bool (..., H, W): pixels to go by; NaN for a frame where they are fewer than MOVING_SHARE of all.
    """
    _require_frames(real, predicted)
    error = np.square(real.astype(np.float32) - predicted).mean(-1)  # (..., H, W)
    counted = np.ones(error.shape, bool) if counted is None else counted
    count = counted.sum((-2, -1))
    mean = (error * counted).sum((-2, -1), dtype=np.float64) / np.maximum(count, 1)
    enough = count >= max(MOVING_SHARE * error.shape[-2] * error.shape[-1], 1)
    return np.where(enough, 10 * np.log10(255**2 / np.maximum(mean, ROUNDING)), np.nan)


def frame_ssim(real: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Structural similarity of every frame (Wang et al. 2004; 11 x 11 Gaussian window, mean over channels): uint8
    (..., H, W, 3) twice -> float64 (...), 1 where they are equal."""
    import torch
    from torchmetrics.functional.image import structural_similarity_index_measure as similarity

    _require_frames(real, predicted)
    pairs = zip(_pictures(real).split(64), _pictures(predicted).split(64))  # bounds the memory of the window's products
    parts = [torch.as_tensor(similarity(a, b, data_range=1.0, reduction="none")).reshape(-1) for a, b in pairs]
    return torch.cat(parts).double().numpy().reshape(real.shape[:-3])


def lpips_missing() -> str | None:
    """Why `frame_lpips` cannot run here, with the remedy; None where it can. Nothing is downloaded."""
    from importlib import import_module

    import torch

    # A CPU build of torch needs torchvision's, which PyPI does not have for Linux: the other one does not even import.
    index = "" if torch.version.cuda else " --index-url https://download.pytorch.org/whl/cpu"
    install = f"pip install -c constraints.txt torchvision{index}"
    try:
        import_module("torchvision")
    except ModuleNotFoundError:
        return f"torchvision is not installed: {install}"
    except (ImportError, RuntimeError) as error:
        return f"torchvision does not fit torch {torch.__version__} ({error}): {install}"
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    if not any(folder.glob("alexnet-*.pth")):
        fetch = "import torchvision; torchvision.models.alexnet(weights='DEFAULT')"
        return f'no AlexNet weights in {folder}; where there is a network, once: python -c "{fetch}"'
    return None


def frame_lpips(real: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Learned perceptual distance of every frame (Zhang et al. 2018, AlexNet): uint8 (..., H, W, 3) twice -> float64
    (...), 0 where they are equal. Raises RuntimeError with the reason where package or weights are absent."""
    if reason := lpips_missing():
        raise RuntimeError(f"LPIPS: {reason}")
    import torch
    from torchmetrics.functional.image import learned_perceptual_image_patch_similarity as distance

    _require_frames(real, predicted)
    pairs = zip(_pictures(real).split(64), _pictures(predicted).split(64))
    with torch.no_grad():
        parts = [distance(a, b, "alex", reduction="none", normalize=True).reshape(-1) for a, b in pairs]
    return torch.cat(parts).double().numpy().reshape(real.shape[:-3])


def _require_frames(a: np.ndarray, b: np.ndarray) -> None:
    if a.dtype != np.uint8 or b.dtype != np.uint8 or a.shape != b.shape or a.shape[-1:] != (3,):
        raise ValueError(f"expected uint8 (..., H, W, 3) twice, got {a.dtype} {a.shape} and {b.dtype} {b.shape}")


def _pictures(frames: np.ndarray):  # uint8 (..., H, W, 3) -> float tensor (N, 3, H, W) in [0, 1]
    import torch

    return torch.from_numpy(frames.reshape(-1, *frames.shape[-3:])).permute(0, 3, 1, 2).float() / 255


def action_errors(predicted: np.ndarray, true: np.ndarray) -> dict[str, np.ndarray]:
    """Canonical actions (..., 7) twice -> {"mm", "degrees", "gripper"}, each (...): length of the difference of
    translations and of rotation vectors, absolute difference of the opening."""
    error = np.asarray(predicted, np.float64) - true
    return {
        "mm": 1000 * np.linalg.norm(error[..., :3], axis=-1),
        "degrees": np.degrees(np.linalg.norm(error[..., 3:6], axis=-1)),
        "gripper": np.abs(error[..., 6]),
    }


# ------------------------------------------------------------------------------------------------------- distributions


def frechet_distance(real: np.ndarray, predicted: np.ndarray, dimensions: int = 16) -> float:
    """Squared Frechet distance of Gaussians fitted to features (N, D) and (M, D), as in FID and FVD.

    Both are projected on the first principal components of the two together (at most `dimensions`, and no more than
    leave ten samples each), for a covariance of more numbers than samples says nothing; components of the real ones
    alone would be blind to whatever only predictions have. It depends on the features and on the counts: compare
    distances of one network and as many clips.
    """
    from scipy.linalg import sqrtm

    if (
        real.ndim != 2
        or predicted.ndim != 2
        or real.shape[1] != predicted.shape[1]
        or min(map(len, (real, predicted))) < 2
    ):
        raise ValueError(
            f"expected features (N, D) and (M, D) of two or more clips, got {real.shape}, {predicted.shape}"
        )
    real, predicted = np.asarray(real, np.float64), np.asarray(predicted, np.float64)
    keep = max(1, min(dimensions, real.shape[1], min(len(real), len(predicted)) // 10))
    both = np.concatenate([real, predicted])
    centre = both.mean(0)
    axes = np.linalg.svd(both - centre, full_matrices=False)[2][:keep].T  # (D, keep)
    a, b = (real - centre) @ axes, (predicted - centre) @ axes
    cov_a, cov_b = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    # tr (A B)^1/2 from the symmetric A^1/2 B A^1/2, whose eigenvalues are real and not negative
    root = np.real(sqrtm(cov_a))
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    return float(np.square(b.mean(0) - a.mean(0)).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


# --------------------------------------------------------------------------------------------------------- uncertainty


class Estimate(NamedTuple):
    value: float
    low: float  # of the 95 % interval; NaN where there is too little to tell
    high: float

    def text(self, digits: int = 2) -> str:
        if not np.isfinite(self.value):
            return "-"
        value, low, high = (f"{round(number, digits) + 0.0:.{digits}f}" for number in self)  # + 0.0: no "-0.00"
        return f"{value} [{low}, {high}]" if np.isfinite(self.low) else value


def plain(value):
    """For JSON: estimates as dicts, numbers that are not finite as null."""
    if isinstance(value, Estimate):
        return plain(value._asdict())
    if isinstance(value, dict):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def bootstrap_mean(values: np.ndarray, groups: np.ndarray) -> Estimate:
    """Mean of values (N,) with an interval that resamples whole groups (N,), e.g. episodes: windows of one episode see
    the same scene and are no independent trials. NaN values do not count. Percentiles are too narrow for few groups."""
    from selfflow_robot.probe import bootstrap, per_episode

    values, groups = np.asarray(values, np.float64), np.asarray(groups)
    if values.shape != groups.shape or values.ndim != 1:
        raise ValueError(f"expected a group for every value, got values {values.shape} and groups {groups.shape}")
    there = ~np.isnan(values)
    if not there.any():
        return Estimate(np.nan, np.nan, np.nan)
    sums = per_episode(np.stack([values[there], np.ones(there.sum())], 1), groups[there])
    value, interval = bootstrap(sums, lambda s: s[..., 0] / s[..., 1])
    return Estimate(value, *map(float, interval))


def bootstrap_difference(first: np.ndarray, second: np.ndarray, groups: np.ndarray) -> Estimate:
    """Mean of first minus second, (N,) each on the same windows: pairs stay together, groups are resampled."""
    return bootstrap_mean(np.asarray(first, np.float64) - second, groups)


def jackknife(statistic: Callable[[np.ndarray], float], groups: np.ndarray) -> Estimate:
    """statistic(rows bool (N,)) of all rows, and an interval from leaving out one group (N,) at a time, with Student's
    t. For what is no mean and what drawing the same clip twice would change, as it does a covariance."""
    from scipy.stats import t

    groups = np.asarray(groups)
    names, value = np.unique(groups), float(statistic(np.ones(len(groups), bool)))
    if len(names) < 3:
        return Estimate(value, np.nan, np.nan)
    without = np.array([statistic(groups != name) for name in names])
    error = sqrt((len(names) - 1) * np.var(without))
    half = float(t.ppf(0.975, len(names) - 1)) * error
    return Estimate(value, value - half, value + half)


def auc(scores: Sequence[float], labels: Sequence[bool]) -> Estimate:
    """Probability that a positive's score exceeds a negative's, ties half: the area under the ROC curve. One row per
    episode: rows must be independent of each other.

    95 % interval: Newcombe 2006 (Statistics in Medicine 25:559), method 5, a score interval that stays inside [0, 1]
    and keeps a width where the two sides are separated perfectly. NaN where a side is empty.
    """
    from scipy.optimize import brentq
    from scipy.stats import rankdata

    s, positive = np.asarray(scores, np.float64), np.asarray(labels, bool)
    if s.shape != positive.shape or s.ndim != 1 or not np.isfinite(s).all():
        raise ValueError(f"expected a finite score for every label, got {s.shape} and {positive.shape}")
    m, n = int(positive.sum()), int((~positive).sum())
    if not m or not n:
        return Estimate(np.nan, np.nan, np.nan)
    value = float((rankdata(s)[positive].sum() - m * (m + 1) / 2) / (m * n))
    z, balanced = NormalDist().inv_cdf(0.975), (m + n) / 2 - 1

    def outside(area: float) -> float:  # squared distance to the estimate, less z^2 times the variance at `area`
        spread = 1 + balanced * ((1 - area) / (2 - area) + area / (1 + area))
        return (value - area) ** 2 - z * z * area * (1 - area) * spread / (m * n)

    # At 0 and 1 the variance vanishes, so that a perfect estimate is a second root there, which is not meant.
    low = 0.0 if value == 0 else brentq(outside, 0.0, min(value, 1 - 1e-9))
    high = 1.0 if value == 1 else brentq(outside, max(value, 1e-9), 1.0)
    return Estimate(value, float(low), float(high))
