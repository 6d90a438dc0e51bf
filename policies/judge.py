"""What a picture shows, for a world model whose pictures no simulator knows the state of.

Ridge regressions on features of the network itself (and a thumbnail) say, of a real or imagined frame: how far the
drawer is open, whether the task is done, how many control steps are left to that; and, with the actions that led to it,
where the robot's hand is. They are fitted on demonstrations and on what the world model makes of them, so that they
have seen its blur, and scored on episodes neither has seen. `experiments/judge.py` makes one for a run.

B frames, D features, H horizon, P proprioception.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file

from policies.flow_policy import FlowPolicy
from selfflow_robot import checkpoint
from selfflow_robot.codec import to_float
from selfflow_robot.config import CollectConfig
from selfflow_robot.data import Dataset, windows
from selfflow_robot.flow import generator
from selfflow_robot.interfaces import ENVIRONMENT_NAMES
from selfflow_robot.probe import PIXEL_GRID, Regression, layer_tokens, pool, regress

GRID = (2, 2)  # that the network's features are averaged to
BATCH = 32  # windows at once
LINGER = CollectConfig.linger  # control steps that demonstrations go on after success
DRIFT = 0.02  # m and, for the other numbers, their unit: noise on the past proprioception while fitting, so that the
# picture is believed where the sum of many predictions has gone astray
SATURATION = 0.1  # m and radians per control step, beyond which the controller moves no faster
FORMAT = 1


@dataclass(frozen=True)
class Judge:
    body: Regression  # proprioception, actions, picture -> proprioception after them
    remaining: Regression  # control steps until the task is done, as a demonstrator would need
    done: Regression  # 1 where it is done
    threshold: float  # of `done`
    drawer: Regression | None = None  # m; None where the data did not record it

    def look(self, features: np.ndarray) -> dict[str, np.ndarray]:
        """features (B, D) of frames -> {remaining, done: (B,) and, where known, drawer}."""
        seen = {"remaining": self.remaining(features)[:, 0], "done": self.done(features)[:, 0] > self.threshold}
        return seen | ({"drawer": self.drawer(features)[:, 0]} if self.drawer else {})

    def feel(self, features: np.ndarray, proprio: np.ndarray, executed: np.ndarray) -> np.ndarray:
        """Proprioception float32 (B, P) after actions (B, H, 7) that led from `proprio` to frames of `features`."""
        felt = self.body(body_inputs(features, proprio, executed)).astype(np.float32)
        felt[:, 3:9] = orthonormal(felt[:, 3:9])
        felt[:, 9] = felt[:, 9].clip(0, 1)
        return felt


def body_inputs(features: np.ndarray, proprio: np.ndarray, executed: np.ndarray) -> np.ndarray:
    motion = executed[..., :6].reshape(len(executed), -1)
    gripper = executed[..., 6]
    return np.concatenate([features, proprio, motion, np.tanh(motion / SATURATION), gripper], 1)


def orthonormal(columns: np.ndarray) -> np.ndarray:
    """Two columns of rotation matrices (B, 6), nearly orthonormal -> exactly so (Gram-Schmidt)."""
    a, b = columns[:, :3], columns[:, 3:]
    a = a / np.linalg.norm(a, axis=1, keepdims=True).clip(1e-6)
    b = b - (a * b).sum(1, keepdims=True) * a
    return np.concatenate([a, b / np.linalg.norm(b, axis=1, keepdims=True).clip(1e-6)], 1)


@torch.no_grad()
def picture_features(policy: FlowPolicy, frames: np.ndarray) -> np.ndarray:
    """frames uint8 (B, H, W, 3) -> (B, D): tokens after the middle block, and a thumbnail."""
    video = torch.from_numpy(np.array(frames))[:, None].to(policy.device)
    past = len(policy.layout.past)
    block = max(1, policy.model.config.depth // 2)
    tokens = layer_tokens(policy.model, policy.packer, video.repeat(1, past, 1, 1, 1))[block]
    thumbnail = pool(to_float(video[:, 0]), PIXEL_GRID)
    return torch.cat([pool(tokens, GRID), thumbnail], 1).float().cpu().numpy()


@dataclass(frozen=True)
class Seen:
    """Frames with what is known of them, one per row."""

    features: np.ndarray  # (F, D)
    proprio: np.ndarray  # (F, P), before the actions
    executed: np.ndarray  # (F, H, 7)
    felt: np.ndarray  # (F, P), when the frame was taken
    remaining: np.ndarray  # (F, 1)
    done: np.ndarray  # (F, 1)
    drawer: np.ndarray | None  # (F, 1)
    episode: np.ndarray  # (F,)


def watch(
    policy: FlowPolicy,
    dataset: Dataset,
    split: str,
    count: int,
    imagined: bool,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Seen:
    """`count` evenly spread frames of a split, a horizon after their window's present; imagined: as the world model
    expects them to look, given the actions that were done."""
    layout = policy.layout
    if not layout.future:
        raise ValueError("a judge reads imagined frames, and this checkpoint predicts none (--future was empty)")
    jump = layout.future[-1]
    source = windows(dataset, layout.past, layout.future, layout.horizon, split)
    inside = np.flatnonzero(source.now + jump <= source.last)
    if not inside.size:
        raise ValueError(f"{dataset.root}: no episode of split {split} is longer than {jump} control steps")
    chosen = inside[np.unique(np.linspace(0, len(inside) - 1, min(count, len(inside))).astype(int))]
    features = []
    for start in range(0, len(chosen), BATCH):
        part = chosen[start : start + BATCH]
        batch = source.gather(part)
        seeds = [generator(0, int(index)) for index in part]
        frames = policy.predict_video(batch, seeds)[:, -1] if imagined else batch["video"][:, -1].numpy()
        features.append(picture_features(policy, frames))
        report(min(start + BATCH, len(chosen)), len(chosen))
    now, then, last = source.now[chosen], source.now[chosen] + jump, source.last[chosen]
    left = (last - LINGER - then).clip(0)
    drawer = None
    if dataset.environment is not None and dataset.environment[then, ENVIRONMENT_NAMES.index("has_drawer")].all():
        drawer = dataset.environment[then, ENVIRONMENT_NAMES.index("drawer")][:, None]
    return Seen(
        features=np.concatenate(features),
        proprio=dataset.proprio[now],
        executed=np.stack([dataset.executed[n : n + layout.horizon] for n in now]),
        felt=dataset.proprio[then],
        remaining=left[:, None].astype(float),
        done=(left == 0)[:, None].astype(float),
        drawer=drawer,
        episode=source.first[chosen],
    )


def fit(seen: Sequence[Seen]) -> Judge:
    """From frames of several kinds, real and imagined ones."""
    drawers = [part.drawer for part in seen]
    all_of = {
        f.name: np.concatenate([getattr(part, f.name) for part in seen]) for f in fields(Seen) if f.name != "drawer"
    }
    x, episode = all_of["features"], all_of["episode"]
    drift = np.random.default_rng(0).normal(scale=DRIFT, size=all_of["proprio"].shape)
    inputs = body_inputs(x, all_of["proprio"] + drift, all_of["executed"])
    done = regress(x, all_of["done"], episode)
    return Judge(
        body=regress(inputs, all_of["felt"], episode),
        remaining=regress(x, all_of["remaining"], episode),
        done=done,
        threshold=best_threshold(done(x)[:, 0], all_of["done"][:, 0] > 0.5),
        drawer=regress(x, np.concatenate(drawers), episode) if all(d is not None for d in drawers) else None,
    )


def best_threshold(scores: np.ndarray, labels: np.ndarray) -> float:
    """Above which a score means yes, so that balanced accuracy is highest; 0.5 where there is only one class."""
    if labels.all() or not labels.any():
        return 0.5
    order = np.argsort(scores)
    right = np.cumsum(~labels[order]) / (~labels).sum() + 1 - np.cumsum(labels[order]) / labels.sum()
    best = int(right[:-1].argmax())
    return float(scores[order[best : best + 2]].mean())


def errors(judge: Judge, seen: Seen) -> dict[str, float]:
    """How wrong it is about frames it was not fitted on: mean errors, and of `done` the balanced accuracy."""
    found, felt = judge.look(seen.features), judge.feel(seen.features, seen.proprio, seen.executed)
    done = seen.done[:, 0] > 0.5
    shares = [(found["done"][done == side] == side).mean() for side in (False, True) if (done == side).any()]
    scores = {
        "hand_mm": 1000 * np.linalg.norm(felt[:, :3] - seen.felt[:, :3], axis=1).mean(),
        "remaining_steps": np.abs(found["remaining"] - seen.remaining[:, 0]).mean(),
        "done_balanced_accuracy": np.mean(shares),
    }
    if judge.drawer and seen.drawer is not None:
        scores["drawer_mm"] = 1000 * np.abs(found["drawer"] - seen.drawer[:, 0]).mean()
    return {name: float(value) for name, value in scores.items()}


def save(judge: Judge, folder: Path, about: dict) -> Path:
    """judge.safetensors and judge.json in a run's folder. about: what it was made from, its errors."""
    tensors = {
        f"{f.name}.{part.name}": torch.from_numpy(getattr(value, part.name))
        for f in fields(Judge)
        if isinstance(value := getattr(judge, f.name), Regression)
        for part in fields(Regression)
    }
    digest = checkpoint.write_tensors(folder / "judge.safetensors", tensors)
    manifest = {"format": FORMAT, "sha256": digest, "threshold": judge.threshold} | about
    checkpoint.write_atomic(folder / "judge.json", json.dumps(manifest, indent=1).encode())
    return folder / "judge.json"


def read_manifest(run: str | Path) -> dict:
    """What a run's judge.json says. Raises ValueError with the command that makes one, where there is none."""
    folder = checkpoint.run_folder(run)
    try:
        manifest = json.loads((folder / "judge.json").read_text())
        version, _ = manifest["format"], manifest["sha256"]
    except FileNotFoundError as error:
        raise ValueError(f"{folder} has no judge. {_remedy(run)}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder}/judge.json is damaged ({error!r}). {_remedy(run)}") from error
    if version != FORMAT:
        raise ValueError(f"{folder}/judge.json has format {version}, this version reads {FORMAT}. {_remedy(run)}")
    return manifest


def _remedy(run: str | Path) -> str:
    return f"Make it: python experiments/judge.py --checkpoint {run}"


def load(run: str | Path, policy: FlowPolicy) -> Judge:
    """The judge of a run. Raises ValueError with the command that makes one, where there is none or it judges another
    checkpoint."""
    folder, manifest, remedy = checkpoint.run_folder(run), read_manifest(run), _remedy(run)
    try:
        if manifest["checkpoint_hash"] != policy.manifest.get("sha256"):
            raise ValueError(f"{folder}/judge.json was made for another state of this run. {remedy}")
        if checkpoint.sha256(folder / "judge.safetensors") != manifest["sha256"]:
            raise ValueError(f"{folder}/judge.safetensors is truncated or altered. {remedy}")
        tensors, threshold = load_file(folder / "judge.safetensors"), float(manifest["threshold"])
    except FileNotFoundError as error:
        raise ValueError(f"{folder} has no judge. {remedy}") from error
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder}/judge.json is damaged ({error!r}). {remedy}") from error
    parts = {
        f.name: Regression(*(tensors[f"{f.name}.{part.name}"] for part in fields(Regression)))
        for f in fields(Judge)
        if f"{f.name}.mean" in tensors
    }
    return Judge(**parts, threshold=threshold)
