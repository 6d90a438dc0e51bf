"""The two contracts everything meets at: what a policy may see, and what an action is.

Action (outside `envs/`): float32 (7,) `[dx, dy, dz, rx, ry, rz, gripper]`
  dx, dy, dz   translation of the tool centre point, metres per control step, in the robot's base frame
  rx, ry, rz   rotation vector, radians per control step, base frame, applied from the left
  gripper      absolute opening: 1 = open, 0 = closed

Both parts refer to the *sensed* pose at the moment the action is given; on the WidowX, whose controller is of that kind
in SIMPLER, to the pose commanded last. Robot-specific encodings live in `envs/` only.
"""

from typing import Any, Protocol, TypedDict

import numpy as np

ACTION_NAMES = ("dx", "dy", "dz", "rx", "ry", "rz", "gripper")
ACTION_DIM = len(ACTION_NAMES)

# Tool centre point in the base frame: position (m), first two columns of its rotation matrix, opening (1 = open).
PROPRIO_NAMES = ("x", "y", "z", "r00", "r10", "r20", "r01", "r11", "r21", "gripper")
PROPRIO_DIM = len(PROPRIO_NAMES)

# What a simulator knows and no policy sees, for probes: the object to act on (m, base frame), how far the drawer is
# open (m), and whether the scene has them (1 or 0; where it has not, their numbers are 0).
ENVIRONMENT_NAMES = ("object_x", "object_y", "object_z", "drawer", "has_object", "has_drawer")


class Observation(TypedDict):
    """What a policy may see."""

    images: dict[str, np.ndarray]  # {view: uint8 (H, W, 3)}
    proprio: np.ndarray  # float32 (P,)
    instruction: str


class Policy(Protocol):
    def reset(self, instruction: str = "") -> None:
        """Forget history and queued actions; called at the start of every episode."""
        ...

    def act(self, observation: Observation) -> np.ndarray:
        """The next action, float32 (7,)."""
        ...


class Env(Protocol):
    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Observation, dict[str, Any]]: ...

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]: ...

    def close(self) -> None: ...
