"""What is measured, as data: two results compare when the hashes of their protocols are equal (spec section 4).

Three protocols. `random`: upstream's random draws from a range of seeds. `visual_matching` and `variant_aggregation`:
the published ones, every episode of them, averaged as upstream averages.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from statistics import mean

import numpy as np

from envs.tasks import ORIENTATIONS, PUT_ON, URDF_VERSIONS, VISUAL_MATCHING, Task, Variant, get_task, next_episode_seed

PROTOCOLS = ("random", "visual_matching", "variant_aggregation")
PUBLISHED = {  # task of ours -> row of the published table (`reference_numbers.json`)
    "pick_coke_can": "google_robot_pick_coke_can",
    "move_near_v0": "google_robot_move_near",
    "open_drawer": "google_robot_open_drawer",
    "close_drawer": "google_robot_close_drawer",
    "open_and_place": "google_robot_place_apple_in_closed_top_drawer",
    "spoon_on_towel": "widowx_spoon_on_towel",
    "carrot_on_plate": "widowx_carrot_on_plate",
    "stack_cube": "widowx_stack_cube",
    "eggplant_in_basket": "widowx_put_eggplant_in_basket",
}
# In numbers of its own, so that reading a protocol needs no simulator; a test compares them with the scene's.
RATES = {"google_robot": (3, 513), "widowx": (5, 500)}  # Hz, control and simulation
PICTURE_SIZES = {"google_robot": (640, 512), "widowx": (640, 480)}
FORCED_ADVANCE = 100
OPEN_QPOS, CLOSED_QPOS, PLACED_QPOS = 0.15, 0.05, 0.05
# Scene settings that success should not hinge on; "default" is the closest to the recordings (`envs/simpler.py`).
PHYSICS = {
    "default": {},
    "pgs": {"enable_tgs": False},
    "tgs": {"enable_tgs": True},
    "iterations_50": {"solver_position_iterations": 50},
    "velocity_1": {"solver_velocity_iterations": 1},
    "velocity_4": {"solver_velocity_iterations": 4},
    "pcm": {"enable_pcm": True},
    "contact_5mm": {"contact_offset": 0.005},
}
SUCCESS = {
    "pick": "object off everything but the robot, more than 0.01 m up; or more than 0.02 m in 5 steps in all",
    "near": "right object moved, within 0.1 m of the target beyond both halves, closest to it, nothing knocked over",
    "open": f"drawer open by at least {OPEN_QPOS} m",
    "close": f"drawer open by at most {CLOSED_QPOS} m",
    "place": f"second subtask, drawer open by at least {PLACED_QPOS} m, object has touched the bottom inside it",
    "put_on": "source over the target and little above it",
}
RULE = "SIMPLER: an episode runs to the step limit, success does not end it; success_final counts the last step"

PICK_GRID = [(x, y) for x in np.linspace(-0.35, -0.12, 5).tolist() for y in np.linspace(-0.02, 0.42, 5).tolist()]
PLACE_GRID = [(x, y) for x in (-0.08, -0.05, -0.02) for y in (-0.02, 0.03, 0.08)]  # m, on the cabinet's top
ROBOT_GRID = [(x, y) for x in (0.65, 0.75, 0.85) for y in (-0.2, 0.0, 0.2)]  # m, variant aggregation, yaw 0
COUNTER, ALT, BAKED = "google_pick_coke_can_1_v4", "alt_background", "Baked_sc1_staging_objaverse_cabinet{}_h870"


def _variant(name: str, **changes) -> Variant:
    return Variant(name, overlay=False, baked=False, **changes)


_TABLETOP = (
    _variant("base"),
    _variant("background1", stage=f"{COUNTER}_{ALT}"),
    _variant("background2", stage=f"{COUNTER}_{ALT}_2"),
    _variant("brighter", lighting="slightly_brighter"),
    _variant("darker", lighting="slightly_darker"),
    _variant("table1", stage=BAKED.format(1)),
    _variant("table2", stage=BAKED.format(2)),
)
_DISTRACTORS = (_variant("distractor_less", distractors="less"), _variant("distractor_more", distractors="more"))
CAMERAS = (_variant("camera1", head_tilt=0.9351361), _variant("camera2", head_tilt=0.6651361))  # run, never averaged
_APARTMENT = dict(stage="frl_apartment_stage_simple", lighting="drawer", station="mk_station")
_DRAWERS = tuple(
    _variant(name, **_APARTMENT | changes)
    for name, changes in {
        "base": {},
        "background1": {"stage": "modern_bedroom_no_roof"},
        "background2": {"stage": "modern_office_no_roof"},
        "brighter": {"lighting": "drawer_brighter"},
        "darker": {"lighting": "drawer_darker"},
        "cabinet2": {"station": "mk_station2"},
        "cabinet3": {"station": "mk_station3"},
    }.items()
)
VARIANTS = {
    "pick": _TABLETOP + _DISTRACTORS,
    "near": (*_TABLETOP, _variant("no_distractor", no_distractor=True)),
    "open": _DRAWERS,
    "close": _DRAWERS,
    "place": _DRAWERS,
}


@dataclass(frozen=True)
class ProtocolEpisode:
    """One start. group: where it enters the average, outermost first. averaged: whether it does."""

    number: int
    seed: int
    group: tuple[str, ...] = ()
    choices: dict = field(default_factory=dict)
    variant: Variant = VISUAL_MATCHING
    averaged: bool = True

    @property
    def options(self) -> dict:
        """Reset options of `SimplerEnv`."""
        return self.choices if self.variant == VISUAL_MATCHING else {**self.choices, "variant": self.variant}


def protocol_episodes(
    task: str | Task, protocol: str, first_seed: int = 0, count: int = 1, margin: float = 0.0
) -> list[ProtocolEpisode]:
    """All episodes of a protocol; first_seed, count and margin (m, `Task.draw`) belong to "random" alone.

    Raises ValueError for an unknown protocol, where none was published for a task, and for a margin of what has none.
    """
    task = get_task(task) if isinstance(task, str) else task
    check_margin(margin, [task])
    if protocol == "random":
        seeds = range(first_seed, first_seed + count)
        return [ProtocolEpisode(seed, seed, choices=task.beyond(seed, margin)) for seed in seeds]
    if margin:
        raise ValueError(f"the episodes of {protocol} are fixed: a margin is for --protocol random")
    if protocol not in PROTOCOLS:
        raise ValueError(f"unknown protocol {protocol!r}; known: {', '.join(PROTOCOLS)}")
    if len(task.models) > 1 or (task.kind == "put_on" and protocol == "variant_aggregation"):
        raise ValueError(f"no {protocol} protocol was published for {task.short}; use --protocol random")
    parts = _visual_matching(task) if protocol == "visual_matching" else _variant_aggregation(task)
    first = next_episode_seed(2022)  # upstream builds every episode anew and never seeds it
    return [
        ProtocolEpisode(number, first, group, choices, variant, variant not in CAMERAS)
        for number, (group, choices, variant) in enumerate(parts)
    ]


def check_margin(margin: float, tasks: list[Task]) -> None:
    """ValueError unless margin (m) is 0, or positive and there is something in one of `tasks` that it widens."""
    if not 0 <= margin < np.inf or (margin and not any(task.widened for task in tasks)):
        names = ",".join(task.short for task in tasks)
        raise ValueError(f"margin {margin} (m, from 0) is for tasks that draw a place of object or robot; got {names}")


def _visual_matching(task: Task) -> Iterator[tuple[tuple, dict, Variant]]:
    if task.kind == "put_on":
        for number in range(task.episodes):
            yield (), {"episode_id": number}, VISUAL_MATCHING
        return
    for outer, choices in _starts(task, [{"pose": pose} for pose in task.poses]):
        for urdf in URDF_VERSIONS:
            yield (*outer, urdf or "original"), {**choices, "urdf_version": urdf}, VISUAL_MATCHING


def _variant_aggregation(task: Task) -> Iterator[tuple[tuple, dict, Variant]]:
    ys = ROBOT_GRID if task.kind != "place" else ROBOT_GRID[:3]
    places = [{"pose": task.poses[0], "robot_xy": xy, "robot_yaw": 0.0} for xy in ys] if task.poses else []
    if task.kind == "place":
        places = [{**place, "model": "apple"} for place in places]
    cameras = CAMERAS if task.kind in ("pick", "near") else ()
    for outer, choices in _starts(task, places):
        for variant in (*VARIANTS[task.kind], *cameras):
            yield (*outer, variant.name), {**choices, "urdf_version": ""}, variant


def _starts(task: Task, places: list[dict]) -> Iterator[tuple[tuple, dict]]:
    """(outer group, choices) of every start of a Google-robot task; `places` are the robot's, where they vary."""
    if task.kind == "pick":
        for orientation in sorted(task.orientations, key=list(ORIENTATIONS).index, reverse=True):
            for xy in PICK_GRID:
                yield (orientation,), {"orientation": orientation, "object_xy": xy, "model": task.models[0]}
    elif task.kind == "near":
        for number in range(task.episodes):
            yield (), {"episode_id": number}
    else:
        for drawer in task.drawers:
            for place in places:
                for xy in PLACE_GRID if task.kind == "place" else [None]:
                    objects = {"object_xy": xy, "model": task.models[0]} if xy else {}
                    yield (drawer,), {"drawer": drawer, **objects, **place}


def average(episodes: list[ProtocolEpisode], outcomes: dict[int, bool]) -> float | None:
    """Upstream's score: the mean over each level of the groups, from the inside out; None without an outcome.

    outcomes: {episode number: success}; episodes without one are left out.
    """
    tree: dict[tuple, list] = {}
    for episode in episodes:
        if episode.averaged and episode.number in outcomes:
            tree.setdefault(episode.group, []).append(outcomes[episode.number])
    scores = {group: mean(values) for group, values in tree.items()}
    while scores and () not in scores:
        outer: dict[tuple, list] = {}
        for group, score in scores.items():
            outer.setdefault(group[:-1], []).append(score)
        scores = {group: mean(values) for group, values in outer.items()}
    return scores.get(())


def make_protocol(
    task: str,
    protocol: str = "random",
    first_seed: int = 0,
    count: int = 1,
    width: int | None = None,
    height: int | None = None,
    shader: str = "default",
    simulator: str = "ours",
    physics: str = "default",
    margin: float = 0.0,
) -> dict:
    """Everything about a measurement that does not belong to the policy. ValueError for an unknown task, protocol or
    physics."""
    if physics not in PHYSICS:
        raise ValueError(f"unknown physics {physics!r}; known: {', '.join(PHYSICS)}")
    task, episodes = get_task(task), protocol_episodes(task, protocol, first_seed, count, margin)
    control, simulation = RATES[task.robot]
    full = PICTURE_SIZES[task.robot]
    starts = [asdict(episode) | {"number": 0} for episode in episodes]
    published = protocol != "random"
    moved = " and ".join(name for name in task.widened if name != "pose")
    beyond = f", {moved} up to {margin} m beyond" if margin else ""
    return {
        "benchmark": "SIMPLER",
        "simulator": simulator,
        "protocol": protocol,
        "task": task.name,
        "env_id": f"simpler/{task.short}-v0",
        "seeds": {"first": episodes[0].number, "count": len(episodes)},
        "episodes_hash": protocol_hash(starts) if published else None,
        "reset": "the protocol's episodes" if published else f"upstream's random draws from the seed{beyond}",
        "scene": "built anew for every episode",
        "step_limit": task.max_steps,
        "control_hz": control,
        "simulation_hz": simulation,
        "physics": physics,
        "success": success_text(task),
        "success_rule": RULE,
        "second_subtask": f"forced at step {FORCED_ADVANCE}; learned policies never end a subtask"
        if task.kind == "place"
        else None,
        "camera": {
            "view": "overhead",
            "width": width or full[0] // 4,
            "height": height or full[1] // 4,
            "shader": {"ours": "rasteriser"}.get(simulator, "upstream's own") if shader == "default" else shader,
        },
        "overlay": protocol != "variant_aggregation",
    }


def success_text(task: Task) -> str:
    if task.kind != "put_on":
        return SUCCESS[task.kind]
    rule = PUT_ON[task.put_on]
    touching = ", touching nothing else but the robot" if rule.completely else ""
    return f"{SUCCESS['put_on']} (at most {rule.height_margin} m){touching}"


def protocol_hash(protocol) -> str:
    """12 hexadecimal digits, equal for equal content whatever the order of the keys."""
    return hashlib.sha256(json.dumps(protocol, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:12]
