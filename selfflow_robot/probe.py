"""Probes: what a frozen representation knows, by ridge regression from it to what control needs.

The cheap, early measure of a pretraining: no policy is trained and no simulator runs. Regressions are fitted on some
episodes and scored on others; neighbouring frames are nearly copies, so everything that judges (penalty, score,
interval) goes by whole episodes.

F frames, E episodes, h x w patches, D features, K numbers of a target, L penalties, S sums per episode.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from selfflow_robot.codec import to_float
from selfflow_robot.data import Dataset, windows
from selfflow_robot.flow import generator, interpolate
from selfflow_robot.interfaces import PROPRIO_DIM
from selfflow_robot.model import Model
from selfflow_robot.tokens import GENERATED, GIVEN, Packer

PENALTIES = 10.0 ** np.arange(-6, 5)  # per frame, for features of unit variance; the last leaves nothing but the mean
FOLDS = 4  # of the fitted episodes, to choose the penalty
RESAMPLES = 2000  # of the test episodes, for intervals
PIXEL_GRID = (16, 20)  # of the baseline that sees pixels alone
BATCH = 64  # frames through the network at once


# ----------------------------------------------------------------------------------------------------------- features


@torch.no_grad()
def layer_tokens(
    model: Model, packer: Packer, video: Tensor, given: bool = True, level: float = 0.0, keys: Sequence[int] = ()
) -> dict[int, Tensor]:
    """Tokens of the present frame after every block, {block: (B, h, w, D)}; 0 is what enters the first.

    video uint8 (B, T, H, W, 3): the layout's past frames, the present last; nothing else is shown to the network.
    given: the frames condition (clean, seen in every pixel); of the last block nothing depends on such tokens, so it
    has none. Else they are what is generated, noised to `level`, as in the paper's probes, with the noise of their
    `keys`: B whole numbers.
    """
    shown = copy.copy(packer)
    shown.layout = replace(packer.layout, future=())
    tokens = shown.pack({"video": video}, "pretrain" if given else "pretrain_all")
    kept: dict[int, Tensor] = {}
    hooks = [model.blocks[0].register_forward_pre_hook(lambda _, inputs: kept.update({0: inputs[0]}))]
    for number, block in enumerate(model.blocks, 1):
        hooks.append(block.register_forward_hook(lambda _, __, out, number=number: kept.update({number: out[0]})))
    try:
        if given:
            model.prefix_cache(tokens.x, torch.zeros_like(tokens.x[..., 0]), tokens)
        else:
            model(*noised(tokens.x, level, keys), tokens)
    finally:
        for hook in hooks:
            hook.remove()
    span = tokens.rows("video", GIVEN if given else GENERATED)
    h, w = packer.grid
    return {number: x[:, span][:, -h * w :].unflatten(1, (h, w)) for number, x in kept.items()}


def noised(x: Tensor, level: float, keys: Sequence[int]) -> tuple[Tensor, Tensor]:
    """x (B, N, C) -> noised x and levels (B, N). A row's noise depends on its key alone, so that runs share it."""
    noise = torch.stack([torch.randn(x.shape[1:], generator=generator(0, int(key))) for key in keys]).to(x.device)
    levels = torch.full(x.shape[:2], level, device=x.device)
    return interpolate(x, noise, levels)[0], levels


def pool(x: Tensor, grid: Sequence[int]) -> Tensor:
    """x (B, h, w, D) -> (B, rows * columns * D): means over the cells of a coarser grid; (1, 1) is the mean."""
    return F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2).float(), tuple(grid)).flatten(1)


def collect(dataset: Dataset, past: Sequence[int], frames: np.ndarray, extract: Callable) -> dict[int, np.ndarray]:
    """extract(video uint8 (B, T, H, W, 3), frame numbers) -> {layer: (B, D)}, over flat frame numbers (F,) -> {layer:
    (F, D)}."""
    source = windows(dataset, past, (), 1, "all")  # one window per frame, in order
    chunks = [
        {layer: x.cpu().numpy() for layer, x in extract(source.gather(part)["video"], part).items()}
        for part in np.array_split(frames, -(-len(frames) // BATCH))
    ]
    return {layer: np.concatenate([chunk[layer] for chunk in chunks]) for layer in chunks[0]}


def model_features(
    model: Model, packer: Packer, dataset: Dataset, frames: np.ndarray, given: bool, level: float, grid: Sequence[int]
) -> dict[int, np.ndarray]:
    """Pooled features of every layer, {layer: float32 (F, D)}."""

    def extract(video, numbers):
        tokens = layer_tokens(model, packer, video, given, level, numbers)
        return {layer: pool(x, grid) for layer, x in tokens.items()}

    return collect(dataset, packer.layout.past, frames, extract)


def latent_features(packer: Packer, dataset: Dataset, frames: np.ndarray, grid: Sequence[int]) -> np.ndarray:
    """Of the codec alone, (F, D)."""
    device = packer.action_centre.device
    return collect(dataset, (0,), frames, lambda v, _: {0: pool(packer.codec.encode(v.to(device))[:, 0], grid)})[0]


def pixel_features(dataset: Dataset, frames: np.ndarray) -> np.ndarray:
    """A small picture, (F, D)."""
    return collect(dataset, (0,), frames, lambda video, _: {0: pool(to_float(video[:, 0]), PIXEL_GRID)})[0]


# ------------------------------------------------------------------------------------------------------------ targets


@dataclass(frozen=True)
class Target:
    name: str
    values: np.ndarray  # float64 (F, K): metres, or one column per class, 1 where it is that
    present: np.ndarray  # bool (F,): where there is something to predict
    classes: tuple[str, ...] = ()  # empty: a position or length


def make_targets(dataset: Dataset, frames: np.ndarray) -> tuple[list[Target], list[str]]:
    """What control needs to know, at flat frame numbers (F,); and why what is absent is absent, a line each."""
    everywhere, found, absent = np.ones(len(frames), bool), [], []
    if dataset.proprio.shape[1] == PROPRIO_DIM:
        proprio = dataset.proprio[frames].astype(np.float64)
        found.append(Target("tcp_position", proprio[:, :3], everywhere))
        found.append(Target("gripper", _one_hot(proprio[:, 9] > 0.5, 2), everywhere, ("closed", "open")))
    else:
        absent.append(f"tcp_position, gripper: {dataset.root} has another proprioception than interfaces.PROPRIO_NAMES")
    if dataset.environment is None:
        absent.append(f"object_position, drawer: {dataset.root} does not record them; collect it again to have them")
    else:
        environment = dataset.environment[frames].astype(np.float64)
        found.append(Target("object_position", environment[:, :3], environment[:, 4] > 0))
        found.append(Target("drawer", environment[:, 3:4], environment[:, 5] > 0))
    number = subtask(dataset)[frames]
    classes = tuple(str(i + 1) for i in range(number.max() + 1))
    found.append(Target("subtask", _one_hot(number, len(classes)), everywhere, classes))
    return found, absent


def subtask(dataset: Dataset) -> np.ndarray:
    """Of every frame, how often its episode's instruction has changed until then: int64 (N,)."""
    number = np.zeros(dataset.num_frames, np.int64)
    for episode in dataset.episodes:
        span = slice(episode.start, episode.start + episode.length)
        number[span][1:] = np.cumsum(np.diff(dataset.task[span]) != 0)
    return number


def _one_hot(number: np.ndarray, count: int) -> np.ndarray:
    return np.eye(count)[number.astype(int)]


def varying(targets: list[Target], test: np.ndarray) -> tuple[list[Target], list[str]]:
    """Targets that there is something to learn and to score about, and a line for each of the others."""
    kept, absent = [], []
    for target in targets:
        parts = [target.values[target.present & side] for side in (test, ~test)]
        if all(len(part) and np.ptp(part, axis=0).max() > 1e-6 for part in parts):
            kept.append(target)
        else:
            absent.append(f"{target.name}: the same in all frames fitted or tested on")
    return kept, absent


# --------------------------------------------------------------------------------------------------------- regression


def ridge(x: np.ndarray, y: np.ndarray, penalties: np.ndarray) -> np.ndarray:
    """Weights (L, D, K) that minimise |x w - y|^2 / F + penalty |w|^2, in closed form; x (F, D), y (F, K) centred."""
    count, penalties = len(x), penalties[:, None, None]
    dual = count < x.shape[1]  # (x x' + p) has the same answer in fewer numbers: x' (x x' + p)^-1 y
    values, vectors = np.linalg.eigh((x @ x.T if dual else x.T @ x) / count)
    projected = vectors.T @ (y if dual else x.T @ y) / count
    solved = vectors @ (projected / (values.clip(0)[:, None] + penalties))
    return x.T @ solved if dual else solved


def predictions(x: np.ndarray, y: np.ndarray, others: np.ndarray, penalties: np.ndarray) -> np.ndarray:
    """Fitted on x (F, D), y (F, K); for `others` (G, D) -> (L, G, K). Features are standardised."""
    mean, std, centre = x.mean(0), x.std(0), y.mean(0)
    std = np.where(std > 1e-8, std, 1.0)
    return ((others - mean) / std) @ ridge((x - mean) / std, y - centre, penalties) + centre


@dataclass(frozen=True)
class Regression:
    """A fitted probe, to be used: features (F, D) -> (F, K)."""

    mean: np.ndarray  # (D,) of the features
    std: np.ndarray  # (D,)
    weights: np.ndarray  # (D, K)
    centre: np.ndarray  # (K,) of the target

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return (x - self.mean) / self.std @ self.weights + self.centre


def regress(x: np.ndarray, y: np.ndarray, episode: np.ndarray) -> Regression:
    """Ridge regression of y (F, K) on x (F, D), its penalty chosen by cross-validation over episodes (F,)."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    errors, _ = cross_validate(x, y, episode, PENALTIES)
    mean, std, centre = x.mean(0), x.std(0), y.mean(0)
    std = np.where(std > 1e-8, std, 1.0)
    penalty = PENALTIES[errors.sum(1).argmin()]
    return Regression(mean, std, ridge((x - mean) / std, y - centre, np.array([penalty]))[0], centre)


def cross_validate(
    x: np.ndarray, y: np.ndarray, episode: np.ndarray, penalties: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Squared errors (L, K) of regressions, each on the episodes left out of it, and those of their means (K,)."""
    names = np.random.default_rng(0).permutation(np.unique(episode))
    error, spread = np.zeros((len(penalties), y.shape[1])), np.zeros(y.shape[1])
    for part in np.array_split(names, min(FOLDS, len(names))):
        out = np.isin(episode, part)
        error += np.square(predictions(x[~out], y[~out], x[out], penalties) - y[out]).sum(1)
        spread += np.square(y[out] - y[~out].mean(0)).sum(0)
    return error, spread


# ------------------------------------------------------------------------------------------------------------- scores


@dataclass(frozen=True)
class Score:
    """On the test episodes, with 95 % intervals over them; NaN where there are fewer than two."""

    value: float  # R^2 against the mean of what was fitted, or balanced accuracy
    interval: tuple[float, float]
    validated: float  # R^2 in cross-validation on the fitted episodes: what layers are chosen by
    penalty: float
    error_mm: float | None = None  # mean distance; positions and lengths only
    error_interval: tuple[float, float] | None = None
    chance: float = 0.0  # of `value`


def probe(x: np.ndarray, targets: list[Target], episode: np.ndarray, test: np.ndarray) -> dict[str, Score]:
    """Features (F, D), which episode (F,) a frame is of, which frames (F,) are tested on -> a score per target.

    Raises ValueError when frames of one episode are on both sides.
    """
    if both := set(episode[test]) & set(episode[~test]):
        raise ValueError(f"episodes {sorted(map(int, both))[:5]} are both fitted and tested on")
    x, scores = x.astype(np.float64), {}
    masks = {target.present.tobytes(): target.present for target in targets}
    for key, present in masks.items():  # one decomposition for all targets known in the same frames
        group = [target for target in targets if target.present.tobytes() == key]
        fit, held, y = present & ~test, present & test, np.concatenate([target.values for target in group], 1)
        if len(np.unique(episode[fit])) < 2:
            raise ValueError(f"{group[0].name}: known in fewer than two of the episodes fitted on; take more episodes")
        errors, spread = cross_validate(x[fit], y[fit], episode[fit], PENALTIES)  # (L, K), (K,)
        predicted = predictions(x[fit], y[fit], x[held], PENALTIES)  # (L, G, K)
        first = 0
        for target in group:
            columns = slice(first, first := first + target.values.shape[1])
            validation = errors[:, columns].sum(1) / spread[columns].sum()
            best = int(validation.argmin())
            result = score(target, predicted[best][:, columns], fit, held, episode[held])
            scores[target.name] = replace(result, validated=float(1 - validation[best]), penalty=float(PENALTIES[best]))
    return scores


def score(target: Target, predicted: np.ndarray, fit: np.ndarray, held: np.ndarray, episode: np.ndarray) -> Score:
    """predicted (G, K) of the frames `held`, of episodes (G,). What is reported is a function of sums over episodes."""
    true, centre = target.values[held], target.values[fit].mean(0)
    if target.classes:
        right = (predicted.argmax(1) == true.argmax(1))[:, None] & (true > 0)  # (G, K)
        sums = per_episode(np.concatenate([right, true], 1), episode)
        value, interval = bootstrap(sums, balanced_accuracy)
        return Score(value, interval, np.nan, np.nan, chance=1 / int((true.sum(0) > 0).sum()))
    error, spread = np.square(predicted - true).sum(1), np.square(true - centre).sum(1)
    distance = 1000 * np.sqrt(error)
    value, interval = bootstrap(per_episode(np.stack([error, spread], 1), episode), lambda s: 1 - s[..., 0] / s[..., 1])
    mean_sums = per_episode(np.stack([distance, np.ones_like(distance)], 1), episode)
    millimetres, error_interval = bootstrap(mean_sums, lambda s: s[..., 0] / s[..., 1])
    return Score(value, interval, np.nan, np.nan, millimetres, error_interval)


def balanced_accuracy(sums: np.ndarray) -> np.ndarray:
    """sums (..., 2 K): right and all, per class -> mean over the classes that occur of the share that is right."""
    right, count = np.split(sums, 2, -1)
    share = np.divide(right, count, out=np.full(right.shape, np.nan), where=count > 0)
    return np.nanmean(share, -1)


def per_episode(values: np.ndarray, episode: np.ndarray) -> np.ndarray:
    """values (G, S), episode (G,) -> sums (E, S)."""
    _, index = np.unique(episode, return_inverse=True)
    sums = np.zeros((index.max() + 1, values.shape[1]))
    np.add.at(sums, index, values)
    return sums


def bootstrap(sums: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray]) -> tuple[float, tuple[float, float]]:
    """The statistic of the total of sums (E, S), and its 95 % percentile interval over resampled episodes."""
    value, episodes = float(statistic(sums.sum(0))), len(sums)
    if episodes < 2:
        return value, (np.nan, np.nan)
    counts = np.random.default_rng(0).multinomial(episodes, np.full(episodes, 1 / episodes), RESAMPLES)
    low, high = np.nanquantile(statistic(counts @ sums), [0.025, 0.975])
    return value, (float(low), float(high))
