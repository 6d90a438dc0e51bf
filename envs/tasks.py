"""The benchmark's tasks as data: names, instructions, poses, limits (spec sections 3.4, 3.5; draws: spec 0)."""

from dataclasses import dataclass

import numpy as np

# The four visual-matching arms: same geometry, recoloured (spec 1.1).
URDF_VERSIONS = (
    "",
    "recolor_tabletop_visual_matching_1",
    "recolor_tabletop_visual_matching_2",
    "recolor_cabinet_visual_matching_1",
)
DRAWERS = ("top", "middle", "bottom")
OVERLAY = "data/real_inpainting/open_drawer_{}.png"
# Robot poses of the visual-matching protocol, each with its real background picture: id -> (x m, y m, yaw rad).
POSES = {
    "a0": (0.644, -0.179, -0.03),
    "a1": (0.765, -0.182, -0.02),
    "a2": (0.889, -0.203, -0.06),
    "b0": (0.652, 0.009, 0.0),
    "b1": (0.752, 0.009, 0.0),
    "b2": (0.851, 0.035, 0.0),
    "c0": (0.665, 0.224, 0.0),
    "c1": (0.765, 0.222, -0.025),
    "c2": (0.865, 0.222, -0.025),
}
OBJECT_XY_LOW, OBJECT_XY_HIGH = (-0.10, 0.0), (-0.05, 0.10)  # m, on the cabinet top


@dataclass(frozen=True)
class Task:
    """One SIMPLER task. `name` is upstream's, `short` is what people type."""

    name: str
    short: str
    kind: str  # "open" | "close" | "place"
    drawer: str
    max_steps: int
    contact_offset: float  # m
    poses: tuple[str, ...]
    model_id: str | None = None  # object dropped on the cabinet
    density: float = 800.0  # kg/m^3, of that object

    def instruction(self, subtask: int = 0) -> str:
        if self.kind == "place":
            return f"place apple into {self.drawer} drawer" if subtask else f"open {self.drawer} drawer"
        return f"{self.kind} {self.drawer} drawer"

    def draw(self, seed: int) -> dict:
        """The reset upstream draws from `seed`: {"pose", "urdf_version", "object_xy" (m)}.

        Upstream restarts its stream before every group of draws; keep that to get its episodes.
        """
        stream = np.random.RandomState(seed)
        pose = self.poses[stream.randint(len(self.poses))]
        drawn = {"pose": pose, "urdf_version": URDF_VERSIONS[stream.randint(len(URDF_VERSIONS))]}
        if self.model_id:
            stream = np.random.RandomState(seed)
            drawn["object_xy"] = stream.uniform(OBJECT_XY_LOW, OBJECT_XY_HIGH)
        return drawn


TASKS = [
    Task(
        "google_robot_place_apple_in_closed_top_drawer",
        "open_and_place",
        "place",
        "top",
        200,
        0.005,
        ("a0", "b0", "c0"),
        "baked_apple_v2",
    ),
    *(
        Task(f"google_robot_{kind}_{drawer}_drawer", f"{kind}_{drawer}_drawer", kind, drawer, 113, 0.02, tuple(POSES))
        for kind in ("open", "close")
        for drawer in DRAWERS
    ),
]
BY_NAME = {key: task for task in TASKS for key in (task.name, task.short)}


def get_task(name: str) -> Task:
    """The task of this (upstream or short) name; ValueError listing the known ones otherwise."""
    if name not in BY_NAME:
        raise ValueError(f"unknown task {name!r}; known: {', '.join(task.short for task in TASKS)}")
    return BY_NAME[name]


def next_episode_seed(seed: int) -> int:
    """The seed of upstream's unseeded reset after an episode seeded with `seed`; the chain starts at 2022 (spec 0)."""
    return int(np.random.RandomState(seed).randint(2**32, dtype=np.int64))
