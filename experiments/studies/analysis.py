"""What a study's results say, with their uncertainty: functions of numbers, no files.

S training seeds, E evaluation episodes from G different starts. An arm's outcomes are bool (S, E): every training
seed, and every arm, was evaluated on the same episodes. Trainings and starts are samples: others would have given other
rates, and an interval that leaves one of them out is too narrow. So is one that counts episodes where a task begins
from few starts: from one of them a policy mostly does the same again. starts (E,), anything that compares, says which
episodes share one; None: none do.
"""

from collections.abc import Sequence
from math import isfinite, sqrt
from typing import NamedTuple

import numpy as np

from selfflow_robot.metrics import Estimate, Paired, newcombe_interval, paired_comparison, wilson_interval

RESAMPLES = 4000
# Pocock's nominal levels: that many looks, each at this level, are wrong 5 % of the time together.
NOMINAL = {1: 0.05, 2: 0.0294, 3: 0.0221, 4: 0.0182, 5: 0.0158}


# ------------------------------------------------------------------------------------------------------------- success


def wilson(outcomes: np.ndarray, starts: Sequence | None = None) -> Estimate:
    """Rate of (S, E) with Wilson's interval: of these very checkpoints, each of them at each start a trial."""
    value, trials = float(outcomes.mean()), len(outcomes) * _of_start(starts, outcomes).shape[0]
    return Estimate(value, *wilson_interval(value * trials, trials))


def rate(outcomes: np.ndarray, level: float = 0.05, seed: int = 0, starts: Sequence | None = None) -> Estimate:
    """Mean rate of (S, E), interval over training seeds and starts; never narrower than Wilson's."""
    outcomes = _checked(outcomes)
    of_start = _of_start(starts, outcomes)
    means = _resampled([outcomes], of_start, seed)[0]
    value, trials = float(outcomes.mean()), len(outcomes) * len(of_start)
    low, high = _t_interval(value, float(means.std(ddof=1)), [outcomes], len(of_start), level)
    least = wilson_interval(value * trials, trials, 1 - level)
    return Estimate(value, max(min(low, least[0]), 0.0), min(max(high, least[1]), 1.0))


def difference(
    first: np.ndarray, second: np.ndarray, level: float = 0.05, seed: int = 0, starts: Sequence | None = None
) -> Estimate:
    """First less second, (S, E) and (S', E) on the same episodes: interval over training seeds and starts together.

    Bootstrap: the starts, each with all its episodes, are drawn once for both arms, for they are the same; the seeds of
    each arm on their own; of either one fewer than there are, which makes their variance unbiased (Rao and Wu 1988). A
    few seeds say little about how much seeds vary, so the interval is Student's, with Satterthwaite's degrees of
    freedom, and not the percentiles, which are too narrow for three. It is never narrower than Newcombe's for pairs of
    independent starts: where no run ever succeeds nothing varies, and that is no certainty. One training seed: the
    interval is over the starts alone.
    """
    first, second = _checked(first), _checked(second)
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"need the same episodes, got {first.shape[1]} and {second.shape[1]}")
    of_start = _of_start(starts, first)
    means = _resampled([first, second], of_start, seed)
    value = float(first.mean() - second.mean())
    low, high = _t_interval(value, float((means[0] - means[1]).std(ddof=1)), [first, second], len(of_start), level)
    common = min(len(first), len(second))
    a, b = first[:common], second[:common]
    counts = np.array([np.sum(both) for both in (a & b, a & ~b, ~a & b, ~a & ~b)]) * len(of_start) / a.shape[1]
    below, above = (bound - float(a.mean() - b.mean()) for bound in newcombe_interval(*counts, 1 - level))
    return Estimate(value, max(min(low, value + below), -1.0), min(max(high, value + above), 1.0))


def _checked(outcomes: np.ndarray) -> np.ndarray:
    outcomes = np.asarray(outcomes, bool)
    if outcomes.ndim != 2 or not outcomes.size:
        raise ValueError(f"expected outcomes (training seeds, episodes), got {outcomes.shape}")
    return outcomes


def _of_start(starts: Sequence | None, outcomes: np.ndarray) -> np.ndarray:
    """float (G, E), 1 where an episode of `outcomes` (S, E) begins from a start."""
    count = outcomes.shape[1]
    if starts is None:
        return np.eye(count)
    if len(starts) != count:
        raise ValueError(f"need a start of each of {count} episodes, got {len(starts)}")
    number = {start: number for number, start in enumerate(dict.fromkeys(starts))}
    return np.eye(len(number))[[number[start] for start in starts]].T


def _resampled(arms: list[np.ndarray], of_start: np.ndarray, seed: int) -> list[np.ndarray]:
    """Means (RESAMPLES,) of each arm, the same starts (G, E) in all."""
    rng, count = np.random.default_rng(seed), len(of_start)
    drawn = rng.multinomial(max(count - 1, 1), np.full(count, 1 / count), RESAMPLES)  # (R, G)
    episodes = drawn @ of_start  # (R, E)
    episodes /= episodes.sum(1, keepdims=True)
    means = []
    for outcomes in arms:
        S = len(outcomes)
        drawn = max(S - 1, 1)
        seeds = rng.multinomial(drawn, np.full(S, 1 / S), RESAMPLES) / drawn  # (R, S)
        means.append(np.einsum("rs,re,se->r", seeds, episodes, outcomes.astype(float), optimize=True))
    return means


def _t_interval(value: float, error: float, arms: list[np.ndarray], starts: int, level: float) -> tuple[float, float]:
    """Student's, degrees of freedom by Satterthwaite: seeds know their share from S - 1, starts the rest."""
    from scipy.stats import t

    seeds = [
        (outcomes.mean(1).var(ddof=1) / len(outcomes), len(outcomes) - 1) for outcomes in arms if len(outcomes) > 1
    ]
    rest = max(error**2 - sum(variance for variance, _ in seeds), 0.0)
    parts = [*seeds, (rest, max(starts - 1, 1))]
    below = sum(variance**2 / freedom for variance, freedom in parts)
    freedom = sum(variance for variance, _ in parts) ** 2 / below if below else 1.0
    half = float(t.ppf(1 - level / 2, freedom)) * error
    return value - half, value + half


def mcnemar(first: np.ndarray, second: np.ndarray, starts: Sequence | None = None) -> list[Paired]:
    """Training seed by training seed, paired on the starts: whether these two checkpoints differ, not the methods. A
    start with several episodes counts once, for the checkpoint that solves more of them. ValueError unless both arms
    (S, E) have the same seeds."""
    first, second = _checked(first), _checked(second)
    if first.shape != second.shape:
        raise ValueError(f"McNemar's test pairs training seeds and episodes, got {first.shape} and {second.shape}")
    ahead = (first.astype(float) - second) @ _of_start(starts, first).T  # (S, G)
    return [paired_comparison(row > 0, row < 0) for row in ahead]


# ---------------------------------------------------------------------------------------------------------- few numbers


def over_seeds(values: Sequence[float | None], level: float = 0.05) -> Estimate:
    """Mean of one number per training seed, Student's t; no interval for a single one."""
    from scipy.stats import t

    values = np.asarray([v for v in values if v is not None and isfinite(v)], float)
    if not len(values):
        return Estimate(np.nan, np.nan, np.nan)
    if len(values) < 2:
        return Estimate(float(values[0]), np.nan, np.nan)
    half = float(t.ppf(1 - level / 2, len(values) - 1)) * values.std(ddof=1) / sqrt(len(values))
    return Estimate(float(values.mean()), float(values.mean() - half), float(values.mean() + half))


def paired_over_seeds(first: dict[int, float], second: dict[int, float]) -> Estimate:
    """First less second, {training seed: number} each: the same seed has the same first weights and batches."""
    return over_seeds([first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())])


# ------------------------------------------------------------------------------------------------------------ decisions


class Decision(NamedTuple):
    stop: bool
    why: str


def level_of(looks: int) -> float:
    """Of the interval at every look, so that all together keep 5 %."""
    return NOMINAL[looks]


def decide(found: Estimate, look: int, looks: int, margin: float, seeds: int) -> Decision:
    """The stopping rule. found: the primary difference with its interval at `level_of(looks)`; look counts from 1."""
    if seeds < 2 and look < looks:
        return Decision(False, "one training seed says nothing of others: more training seeds")
    if found.low > 0 or found.high < 0:
        return Decision(True, "the interval excludes zero")
    if -margin < found.low and found.high < margin:
        return Decision(True, f"the interval lies within {100 * margin:.0f} points of zero: no difference that matters")
    if look >= looks:
        return Decision(True, "this was the last look")
    return Decision(False, "the interval holds zero and more than the margin: more training seeds")


def conclusion(labels: tuple[str, str], rates: tuple[Estimate, Estimate], found: Estimate, margin: float, about: str):
    """One sentence from the numbers. about: what was measured on what."""
    first, second = labels
    low, high = (percent(bound) for bound in (found.low, found.high))
    numbers = (
        f"{100 * rates[0].value:.0f}% with {first}, {100 * rates[1].value:.0f}% with {second}, difference "
        f"{percent(found.value)} points [{low}, {high}], {about}"
    )
    if found.low > 0:
        return f"{first} helps: {numbers}."
    if found.high < 0:
        return f"{first} harms: {numbers}."
    if -margin < found.low and found.high < margin:
        said = f"No difference distinguishable from zero, and none beyond {100 * margin:.0f} points: {numbers}."
        for end, near in ((0, max(rate.value for rate in rates)), (1, 1 - min(rate.value for rate in rates))):
            if near < margin:
                said += f" Both lie within {100 * margin:.0f} points of {end:.0%}: there is little room for one."
        return said
    return f"No difference distinguishable from zero: {numbers}."


def percent(value: float) -> str:
    """A difference of rates in percentage points, with its sign."""
    rounded = round(100 * value)
    return f"{rounded:+d}" if rounded else "0"
