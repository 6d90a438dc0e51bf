"""What a checkpoint can do in each of its modes, window by window on held-out episodes.

Everything is one number per window (or per window and future frame), so that tables can pair runs and resample
episodes. The noise of a window depends on (seed, its number in the data set's split) alone: it is the same for every
action given to the world model and for every run, which makes differences sharp.

N windows, F future frames, H horizon.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from policies.consistency import self_consistency
from policies.flow_policy import FlowPolicy
from selfflow_robot import metrics
from selfflow_robot.data import Dataset, windows
from selfflow_robot.flow import generator
from selfflow_robot.probe import layer_tokens
from selfflow_robot.tokens import MODES, Layout
from selfflow_robot.validation import with_actions

BATCH = 16  # windows through the network at once
VARIANTS = ("true", "shuffled", "zero")  # actions given to the world model, see `validation.with_actions`


@dataclass(frozen=True)
class Held:
    """Windows that lie inside their episodes with all their frames and actions."""

    batch: dict  # of all N, see `data.Windows.gather`
    episode: np.ndarray  # int64 (N,), first frame of each one's episode: what intervals resample
    step: np.ndarray  # int64 (N,), control step within the episode
    past: int  # of the video's frames

    @property
    def real(self) -> np.ndarray:
        """Future frames, uint8 (N, F, H, W, 3)."""
        return self.batch["video"][:, self.past :].numpy()

    @property
    def given(self) -> np.ndarray:
        """The present frame, uint8 (N, 1, H, W, 3)."""
        return self.batch["video"][:, self.past - 1 : self.past].numpy()

    @property
    def repeated(self) -> np.ndarray:
        """The present frame shown again instead of a prediction, uint8 (N, F, H, W, 3): what learned nothing gets."""
        return np.repeat(self.given, self.real.shape[1], 1)

    def __len__(self) -> int:
        return len(self.episode)


def held(
    dataset: Dataset, layout: Layout, count: int | None = None, split: str = "validation", episode: int | None = None
) -> Held:
    """`count` windows evenly spread over a split, or all of them; episode: of the one that starts at this frame alone.
    Raises ValueError where there are fewer than two, or the pictures are of another size than the layout's."""
    wanted, there = (layout.height, layout.width), dataset.image_shape[:2]
    if wanted != there:
        raise ValueError(f"the checkpoint sees pictures of {wanted}, {dataset.root} holds {there}")
    source = windows(dataset, layout.past, layout.future, layout.horizon, split)
    chosen = source.now + max(*layout.future, layout.horizon - 1) <= source.last
    if episode is not None:
        chosen &= source.first == episode
    chosen = np.flatnonzero(chosen)
    if len(chosen) < 2:
        where = f"split {split}" if episode is None else "the episode"
        raise ValueError(f"{dataset.root}: {where} is too short for two windows of the checkpoint")
    if count is not None:
        chosen = chosen[np.unique(np.linspace(0, len(chosen) - 1, count).astype(int))]
    return Held(source.gather(chosen), source.first[chosen], (source.now - source.first)[chosen], len(layout.past))


def in_parts(
    function: Callable, batch: dict, seed: int = 0, advance: Callable[[int], None] = lambda count: None
) -> np.ndarray:
    """function(part, generators), one array row per window, over BATCH windows at a time. Generators begin anew in
    every call, so that calls share their noise. advance(count) after each part."""
    parts, numbers = [], batch["index"].tolist()
    for start in range(0, len(numbers), BATCH):
        rows = slice(start, start + BATCH)
        part = {name: value[rows] for name, value in batch.items()}
        parts.append(function(part, [generator(seed, number) for number in numbers[rows]]))
        advance(len(numbers[rows]))
    return np.concatenate(parts)


def counted(update: Callable[[int, str], None]) -> Callable[[int], None]:
    """A progress bar's update(done, note) as advance(count)."""
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        update(done, "")

    return advance


def observations(policy: FlowPolicy, batch: dict) -> dict:
    """What a robot would know at that moment: the past alone."""
    past = batch["video"][:, : len(policy.layout.past)]
    return {"video": past, "proprio": batch["proprio"], "instruction": batch["instruction"]}


def predictions(
    policy: FlowPolicy, windows: Held, seed: int = 0, advance=lambda count: None, variants: Sequence[str] = VARIANTS
) -> dict[str, np.ndarray]:
    """World model: {variant of the actions: uint8 (N, F, H, W, 3)}."""
    batches = with_actions(windows.batch)
    return {name: in_parts(policy.predict_video, batches[name], seed, advance) for name in variants}


def frame_scores(windows: Held, predicted: np.ndarray, perceptual: bool = False) -> dict[str, np.ndarray]:
    """Predicted frames (N, F, H, W, 3) against the real ones: {measure: (N, F)}."""
    real, changed = windows.real, metrics.moving(windows.given, windows.real)
    scores = {
        "psnr": metrics.frame_psnr(real, predicted),
        "psnr_moving": metrics.frame_psnr(real, predicted, changed),
        "ssim": metrics.frame_ssim(real, predicted),
    }
    return scores | ({"lpips": metrics.frame_lpips(real, predicted)} if perceptual else {})


def sampled_actions(
    policy: FlowPolicy, windows: Held, mode: str, committed: int = 0, seed: int = 0, advance=lambda count: None
) -> np.ndarray:
    """Action chunks of a mode, (N, H, 7), planned at the policy's temperature. The future is shown to inverse dynamics
    alone; the first `committed` actions are those that were executed."""

    def sample(part: dict, generators) -> np.ndarray:
        if mode == "inverse_dynamics":
            return policy.explain(part, generators)
        seen = observations(policy, part)
        if committed:
            seen["executed"] = part["executed"]
        roles = MODES[mode]  # not the name: imagined in full
        tokens, z = policy.generate(seen, roles, generators, committed, policy.temperature)
        return policy.packer.actions(tokens, z).cpu().numpy()

    return in_parts(sample, windows.batch, seed, advance)


def predicted_video(policy: FlowPolicy, windows: Held, seed: int = 0, advance=lambda count: None) -> np.ndarray:
    """Video prediction: future frames without being told the actions, uint8 (N, F, H, W, 3)."""

    def sample(part: dict, generators) -> np.ndarray:
        seen = observations(policy, part)
        tokens, z = policy.generate(seen, "video_prediction", generators)
        return policy.packer.video(tokens, z).cpu().numpy()

    return in_parts(sample, windows.batch, seed, advance)


def chunk_errors(actions: np.ndarray, true: torch.Tensor, counted: torch.Tensor | None = None) -> dict[str, np.ndarray]:
    """Chunks (N, h, 7) twice -> {"mm", "degrees", "gripper"}: (N,), mean over the steps counted (N, h); NaN where
    there are none."""
    errors = metrics.action_errors(actions, true.numpy())
    mask = np.ones(actions.shape[:2], bool) if counted is None else counted.numpy()
    total = mask.sum(1)
    return {
        name: np.where(total, (error * mask).sum(1) / np.maximum(total, 1), np.nan) for name, error in errors.items()
    }


def consistencies(policy: FlowPolicy, windows: Held, seed: int = 0, advance=lambda count: None) -> np.ndarray:
    """(N, 2): see `consistency.self_consistency`."""
    return in_parts(lambda part, generators: self_consistency(policy, part, generators), windows.batch, seed, advance)


@torch.no_grad()
def clip_features(policy: FlowPolicy, videos: np.ndarray) -> np.ndarray:
    """Clips uint8 (N, 1 + F, H, W, 3), the given frame first -> (N, F 2 D): what a frame's patches are like in the
    middle block of the frozen network, which sees it by itself, less the same of the given frame. A clip where nothing
    moves is all zeros. Mean over the patches, and their spread: disorder that a mean would hide is seen too.
    """
    layer, past = max(len(policy.model.blocks) // 2, 1), len(policy.layout.past)
    pooled = []
    for part in torch.from_numpy(videos.reshape(-1, *videos.shape[2:])).split(4 * BATCH):
        patches = layer_tokens(policy.model, policy.packer, part[:, None].repeat(1, past, 1, 1, 1))[layer]
        patches = patches.flatten(1, 2).float()  # (B, h w, D)
        pooled.append(torch.cat([patches.mean(1), patches.std(1)], -1).cpu())
    features = torch.cat(pooled).unflatten(0, videos.shape[:2])  # (N, 1 + F, 2 D)
    return (features[:, 1:] - features[:, :1]).flatten(1).numpy()


def clip_distance(features: np.ndarray, others: np.ndarray, episode: np.ndarray) -> metrics.Estimate:
    """Frechet distance of predicted clips' features (N, D) from real ones', of the same windows, with an interval over
    episodes (N,)."""
    found = metrics.jackknife(lambda rows: metrics.frechet_distance(features[rows], others[rows]), episode)
    return found._replace(low=max(found.low, 0.0) if np.isfinite(found.low) else found.low)
