"""What stands between a policy and a robot: limits on actions, and reasons to refuse an observation.

Nothing here knows about learning. Limits come from the checkpoint's action contract: a policy that was trained on
motions of up to 0.1 m per step has no business making larger ones. They are a net under the robot's own, not a
replacement for them: they know nothing of joints, forces or collisions.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from selfflow_robot.interfaces import ACTION_DIM, PROPRIO_DIM, Observation

MARGIN = 1.25  # on the largest speeds in the training data
MAX_AGE = 2.0  # of an observation, control periods
FROZEN = 5  # control steps a camera may show one picture to the bit: sensor noise makes that impossible


class Refused(ValueError):
    """An observation or action that must not reach policy or robot; the message says why."""


@dataclass(frozen=True)
class Limits:
    """fps: control rate, Hz. speed: of the tool centre point, m/s; turn: rad/s. workspace: lowest and highest corner of
    the box the tool centre point may be in, m, base frame."""

    fps: float
    speed: float
    turn: float
    workspace: tuple[Sequence[float], Sequence[float]] | None = None

    def __post_init__(self):
        if not (self.fps > 0 and self.speed >= 0 and self.turn >= 0 and self.speed + self.turn > 0):
            raise ValueError(f"limits: fps {self.fps}, speed {self.speed} m/s, turn {self.turn} rad/s allow no motion")
        if self.workspace is not None:
            low, high = np.asarray(self.workspace, float)
            if low.shape != (3,) or not (low < high).all():
                raise ValueError(f"workspace {self.workspace}: expected two corners (x, y, z), the lower one first")

    @classmethod
    def of(cls, packer, margin: float = MARGIN, workspace=None) -> "Limits":
        """From a checkpoint's `Packer`: `margin` times the length of the vector of each axis' largest q01 or q99, so
        with a margin of at least 1 no action between the quantiles is limited. An axis that never varied adds nothing.
        """
        centre, scale = (buffer.double().cpu().numpy()[:6] for buffer in (packer.action_centre, packer.action_scale))
        varies = (centre != 0) | (scale != 1)  # (0, 1): no statistics, see `Packer.fit_statistics`
        if not varies.any():
            raise ValueError("the checkpoint has no action statistics; give Limits by hand")
        largest = np.where(varies, np.maximum(abs(centre - scale), abs(centre + scale)), 0)
        speed, turn = (margin * packer.layout.fps * float(np.linalg.norm(part)) for part in (largest[:3], largest[3:]))
        return cls(packer.layout.fps, speed, turn, workspace)

    def limit(self, action: np.ndarray, proprio: np.ndarray) -> tuple[np.ndarray, list[str]]:
        """action (7,), proprio (P,) at the moment of the action -> action within the limits, and what was changed.

        An action that needs no change comes back to the bit. Too fast: slower in the same direction. Leaving the
        workspace: that axis stops at its border; outside it already: it may only move towards it, and is not pulled.
        Raises Refused for what is no action or proprioception at all.
        """
        action, proprio = np.asarray(action), np.asarray(proprio)
        for name, value, size in (("action", action, ACTION_DIM), ("proprio", proprio, PROPRIO_DIM)):
            if value.shape != (size,) or value.dtype.kind != "f":
                raise Refused(f"{name}: expected {size} floating-point numbers, got {value.dtype} {value.shape}")
            if not np.isfinite(value).all():
                raise Refused(f"{name}: not finite: {value}")
        action, reasons = action.astype(np.float32), []
        if self.workspace is not None:
            low, high = np.asarray(self.workspace, np.float64)
            here = proprio[:3].astype(np.float64)
            there = here + action[:3]
            inside = np.clip(there, np.minimum(low, here), np.maximum(high, here))
            for axis in np.flatnonzero(inside != there):
                action[axis] = inside[axis] - here[axis]
                reasons.append(f"workspace: {'xyz'[axis]} would be {there[axis]:.3f} m")
        motions = (("speed", slice(0, 3), self.speed, "m/s"), ("turn", slice(3, 6), self.turn, "rad/s"))
        for name, part, most, unit in motions:
            wanted = float(np.linalg.norm(action[part].astype(np.float64))) * self.fps
            if wanted > most:
                action[part] *= most / wanted
                reasons.append(f"{name}: {wanted:.3f} {unit}, at most {most:.3f}")
        if not 0 <= action[6] <= 1:
            reasons.append(f"gripper: {action[6]:.3f}")
            action[6] = np.clip(action[6], 0, 1)
        return action, reasons


def fade(action: np.ndarray, factor: float = 0.0) -> np.ndarray:
    """The action to give instead of none, after `action` (7,): its motion times `factor`, the gripper where it is.

    0 holds still; applied again and again, a factor of 0.5 stops within a few steps instead of at once.
    """
    return np.append(factor * action[:6], action[6]).astype(np.float32)


def refuse_age(taken: float, now: float, period: float, periods: float = MAX_AGE) -> None:
    """Raises Refused unless a picture of time `taken` is between 0 and `periods` control periods old. Seconds."""
    age = now - taken
    if not -period <= age <= periods * period:  # NaN fails too; clocks of camera and computer differ by a little
        raise Refused(f"observation stale: {age:.3f} s old, at most {periods * period:.3f}")


def unchanged(steps: int, before: np.ndarray | None, image: np.ndarray) -> int:
    """For how many control steps the camera has shown the same picture to the bit: `steps` + 1, or 0."""
    return steps + 1 if before is not None and np.array_equal(before, image) else 0


class Guard:
    """Looks at every observation before the policy does.

    check: the planner's, which knows shapes and types. period: s. frozen: steps that the picture of `view` may stay the
    same to the bit; None: any number, for simulators.
    """

    def __init__(
        self, check: Callable, view: str, period: float, max_age: float = MAX_AGE, frozen: int | None = FROZEN
    ):
        self.check, self.view, self.period, self.max_age, self.frozen = check, view, period, max_age, frozen
        self.image, self.steps = None, 0

    def inspect(self, observation: Observation, taken: float, now: float) -> None:
        """Raises Refused for an observation that is incomplete, of the wrong shape, not finite, stale or frozen."""
        try:
            self.check(observation)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            missing = f"observation lacks {error}" if isinstance(error, KeyError) else str(error)
            raise Refused(missing) from error
        refuse_age(taken, now, self.period, self.max_age)
        image = observation["images"][self.view]
        self.steps, self.image = unchanged(self.steps, self.image, image), image.copy()
        if self.frozen is not None and self.steps >= self.frozen:
            raise Refused(f"observation frozen: one picture for {self.steps} control steps")


def refuse_rate(fps: float, rate: float, robot_rate: float | None) -> None:
    """Raises ValueError where a robot would not do in one control step what the checkpoint means by one.

    fps: the checkpoint's, rate: the loop's, Hz; robot_rate: the robot's own, None where a command is one control step
    however fast they come (simulators, recordings).
    """
    if robot_rate is None:
        return
    if not math.isclose(robot_rate, rate):
        raise ValueError(f"the robot takes commands at {robot_rate:g} Hz, the loop would give them at {rate:g} Hz")
    if not math.isclose(rate, fps):
        raise ValueError(
            f"the checkpoint's actions are metres per step at {fps:g} Hz: at {rate:g} Hz the robot would move "
            f"{rate / fps:.2g} times as fast as in its training data"
        )
