"""The scripted expert for Open-and-Place and the drawer tasks (issue 2, point 3; spec 3.4, 3.5).

A feedback law: the action is a function of the state now (drawer, tool centre point, fingers, object, instruction) and
of a few constants per episode (`Style`). There is no clock and no memory, so the expert can take over from any state
and what it does can be learned from observations. Phases are regions of the state, tested from the last to the first;
inside a phase the target slides along a funnel: it advances only as far as the hand is aligned.

All geometry is in the world frame: +x points from the cabinet towards the robot, +z up; metres and radians.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import sapien
from scipy.spatial import ConvexHull
from scipy.spatial.transform import Rotation

from envs.scenes import body_of, rotation_matrix

MAX_STEP, MAX_TURN = 0.12, 0.35  # m, rad per control step at speed 1
GAIN = 1.3  # the arm covers 0.3 to 0.4 of a commanded step within the step
PANEL_TOP = {"top": 0.755, "middle": 0.51, "bottom": 0.265}  # z of the front panel's top edge
PANEL_BACK, PANEL_FRONT = 0.003, 0.018  # m; x of the faces when the drawer is closed
GAP = np.array([0.01, 0.0525])  # x, z from the panel's top back edge: middle of the gap above it
STANDOFF = 0.12  # m along the fingers before that middle: where the way in begins
INSIDE_X = 0.02  # the inside of an open drawer begins here, behind is the cabinet
COUNTER_Z, COUNTER_X = 0.882, 0.02  # the cabinet's top and its front edge
YAWS = -0.18 + np.linspace(-np.pi / 2, np.pi / 2, 72, endpoint=False)  # of the opening direction: what the wrist can do
DIRECTIONS = np.stack([np.cos(YAWS), np.sin(YAWS)])  # (2, K)
OPENING_YAW, NARROW_ENOUGH = -0.64, 1.3  # rad, of the opening direction on the cabinet; see `grasp_hand`
PANEL_HALF_WIDTH = 0.3
HOOK_HALF_WIDTH = 0.17  # |y| where the hand clears the drawer's sides with margin
OPEN_ENOUGH, CLOSED_ENOUGH = 0.17, 0.02  # m; success asks for 0.15 and 0.05
FINGERS_SHUT = 0.3  # opening below which nothing is between the fingers (closed: 0.17)
FINGERS_ON_OBJECT = 0.62  # opening below which closing fingers have reached the apple


@dataclass(frozen=True)
class Style:
    """How this episode is done: what may vary without hurting success."""

    speed: float = 1.0  # of MAX_STEP and MAX_TURN
    hook_side: float = 0.08  # y of the hook from the robot's base
    hook_pitch: float = 0.6  # of the hand below horizontal
    hook_depth: float = 0.023  # of the tool centre point below the panel's edge
    reach_in: float = 0.085  # along the fingers, from the middle of the gap above the panel
    gap_offset: float = 0.0045  # of the tool centre point across the way in: the fingers are thicker below it
    pull_to: float = 0.235  # drawer opening
    grasp_tilt: float = 0.6  # of the hand from vertical
    grasp_side: float = 0.0  # offset on the object along the world's y
    hover: float = 0.07  # pre-grasp distance along the hand
    carry_height: float = 0.965
    release_height: float = 0.86


# Half ranges of the uniform draws around the defaults; speed is drawn from 0.7 to 1.1.
SPREAD = dict(
    hook_side=0.04, hook_pitch=0.05, hook_depth=0.004, reach_in=0.008, gap_offset=0.003, pull_to=0.01,
    grasp_tilt=0.06, grasp_side=0.004, hover=0.015, carry_height=0.012, release_height=0.012,
)  # fmt: skip


def draw_style(style: type, spread: dict[str, float], rng: np.random.Generator, variation: float = 1.0):
    """A `style` from `rng`; variation 0 gives the nominal one, 1 the full spread."""
    draws = {name: getattr(style, name) + variation * rng.uniform(-half, half) for name, half in spread.items()}
    return style(speed=1 + variation * rng.uniform(-0.3, 0.1), **draws)


class State(NamedTuple):
    """What the expert looks at."""

    p: np.ndarray  # (3,) tool centre point
    rotation: Rotation  # of the hand; columns: z along the fingers, y the direction they open in
    opening: float  # 1 = open
    drawer: float  # m
    base: sapien.Pose
    object: np.ndarray | None  # (3,) its centre
    corners: np.ndarray | None  # (N, 3) of its collision shapes
    held: bool  # both fingers press on the object


class Waypoint(NamedTuple):
    p: np.ndarray
    rotation: Rotation
    gripper: float


def ramp(x: float, low: float, high: float) -> float:
    """0 below `low`, 1 above `high` (or the other way round when low > high), linear between."""
    return float(np.clip((x - low) / (high - low), 0, 1))


def mix(a, b, share: float):
    return a + (np.asarray(b) - a) * share


def hand(approach, opening) -> Rotation:
    """The hand pointing along `approach` (3,), opening as nearly as possible along `opening` (3,)."""
    z = np.asarray(approach) / np.linalg.norm(approach)
    y = np.asarray(opening) - z * (z @ opening)
    y /= np.linalg.norm(y)
    return Rotation.from_matrix(np.stack([np.cross(y, z), y, z], axis=1))


def angle(a: Rotation, b: Rotation) -> float:
    return float((b * a.inv()).magnitude())


# -- drawers ---------------------------------------------------------------------------------------------------------


def hook_hand(pitch: float) -> Rotation:
    return hand([-np.cos(pitch), 0, -np.sin(pitch)], [0, 1, 0])


def open_drawer(s: State, edge: float, style: Style) -> Waypoint:
    """Hook the closed fingers over the panel's top edge at height `edge` and pull."""
    pitch = style.hook_pitch
    rotation = hook_hand(pitch)
    x, z = s.p[0] - s.drawer - PANEL_BACK, s.p[2] - edge  # from the edge; the fingers are behind the panel at x < 0
    y = np.clip(s.base.p[1] + style.hook_side, -HOOK_HALF_WIDTH, HOOK_HALF_WIDTH)

    # Hooked: pull, keeping the depth; steeper once clear of the counter.
    if -0.15 < x < -0.01 and z < 0.004 and abs(s.p[1]) < PANEL_HALF_WIDTH:
        rotation = hook_hand(pitch + mix(0.12, 0.35, ramp(s.drawer, 0.03, 0.1)))
        return Waypoint(np.array([s.p[0] + MAX_STEP, y, edge - style.hook_depth]), rotation, 0)

    # The way in: a line along the fingers through the middle of the gap above the panel.
    along, across = np.array([-np.cos(pitch), -np.sin(pitch)]), np.array([-np.sin(pitch), np.cos(pitch)])
    from_gap = np.array([x, z]) - GAP
    depth, miss = from_gap @ along, from_gap @ across - style.gap_offset

    def on_line(depth):  # target on the way in, world x and z
        return np.array([s.drawer + PANEL_BACK, edge]) + GAP + along * depth + across * style.gap_offset

    # Behind the panel: down, steeper, which lifts the knuckles over the edge.
    if depth > 0.06 and z < 0.08:
        rotation = hook_hand(pitch + 0.12)
        return Waypoint(np.array([min(s.p[0], on_line(0.07)[0]), s.p[1], edge - style.hook_depth]), rotation, 0)
    # Above the counter, or below the edge: get in front first.
    front = on_line(-STANDOFF)
    if s.p[0] < front[0] - 0.02 and (miss > 0.05 or miss < -0.045):
        return Waypoint(np.array([front[0] + 0.02, s.p[1], max(s.p[2], edge - 0.05)]), rotation, 0)
    # In front or in the gap: go in as fast as aligned, back where not.
    off = max(abs(miss) / 0.015, abs(s.p[1] - y) / 0.04, angle(s.rotation, rotation) / 0.15, (s.opening - 0.2) / 0.1)
    lead = np.interp(off, [0.5, 1, 2, 3], [MAX_STEP, MAX_STEP / 2, MAX_STEP / 12, -MAX_STEP])
    goal = on_line(np.clip(depth + lead, -STANDOFF, style.reach_in))
    return Waypoint(np.array([goal[0], y, goal[1]]), rotation, 0)


def close_drawer(s: State, edge: float, style: Style) -> Waypoint:
    """Push the panel with the closed fingers."""
    rotation = hook_hand(style.hook_pitch)
    z = edge - 0.06
    y = np.clip(s.base.p[1] + style.hook_side, -HOOK_HALF_WIDTH, HOOK_HALF_WIDTH)
    front = s.drawer + PANEL_FRONT
    off = max(abs(s.p[2] - z) / 0.05, abs(s.p[1] - y) / 0.1, angle(s.rotation, rotation) / 0.4)
    aligned = ramp(off, 1.3, 0.7)
    # Over or behind the panel: up and back to the front.
    if s.p[0] < front + 0.01 and off > 1.3:
        return Waypoint(np.array([front + 0.12, s.p[1], max(s.p[2], edge + 0.08)]), rotation, 0)
    return Waypoint(np.array([mix(front + 0.07, s.p[0] - MAX_STEP, aligned), y, z]), rotation, 0)


def go_home(s: State, edge: float, home: sapien.Pose) -> Waypoint:
    """Up and out of the drawer, then to the start pose with open fingers."""
    rotation = Rotation.from_quat(home.q, scalar_first=True)
    x, z = s.p[0] - s.drawer - PANEL_BACK, s.p[2] - edge
    if x < 0.08 and z < 0.09:
        return Waypoint(np.array([max(s.p[0], COUNTER_X + 0.06), s.p[1], edge + 0.16]), s.rotation, 0)
    return Waypoint(home.p, rotation, 1)


# -- placing ---------------------------------------------------------------------------------------------------------


def grasp_hand(s: State, style: Style) -> Rotation:
    """Opening the way that keeps both fingers about level and suits the arm, where the object is narrow enough in its
    middle that way; across its narrow side where it is not."""
    tilt, widths = style.grasp_tilt, chords(s.corners, s.object)
    fits = widths[np.abs(YAWS - OPENING_YAW).argmin()] <= NARROW_ENOUGH * widths.min()
    direction = opening_across(widths, OPENING_YAW, NARROW_ENOUGH if fits else 1.02)
    return hand([-np.sin(tilt), 0, -np.cos(tilt)], direction)


def shadows(corners: np.ndarray) -> np.ndarray:
    """How wide corners (N, 3) are along every direction of YAWS, m."""
    return np.ptp(corners[:, :2] @ DIRECTIONS, axis=0)


def chords(corners: np.ndarray, center: np.ndarray) -> np.ndarray:
    """How long lines through `center` within the outline of corners (N, 3) are, along every direction of YAWS, m."""
    sides = ConvexHull(corners[:, :2]).equations  # (F, 3): outward normal, offset
    away = -(sides[:, :2] @ center[:2] + sides[:, 2])[:, None]  # (F, 1)
    slope = sides[:, :2] @ DIRECTIONS  # (F, K)
    with np.errstate(divide="ignore"):
        forth, back = (np.where(sign * slope > 1e-9, away / (sign * slope), np.inf).min(0) for sign in (1, -1))
    return forth + back


def opening_across(widths: np.ndarray, wanted: float, allowed: float) -> np.ndarray:
    """Of the directions of YAWS with widths (K,) of at most `allowed` times the narrowest, the nearest to the yaw
    `wanted` (rad): (3,), horizontal."""
    turn = np.where(widths <= allowed * widths.min(), np.abs(np.sin(YAWS - wanted)), np.inf)
    return np.array([*DIRECTIONS[:, turn.argmin()], 0])


def model_corners(entity: sapien.Entity) -> np.ndarray:
    """(N, 3) corners of the collision shapes in the object's own frame."""
    corners = []
    for shape in body_of(entity).collision_shapes:
        pose = shape.local_pose
        corners.append(np.asarray(shape.vertices) * np.asarray(shape.scale) @ rotation_matrix(pose.q).T + pose.p)
    return np.concatenate(corners).astype(np.float64)


def in_drawer(s: State, edge: float) -> bool:
    return s.object[2] < edge - 0.04 and 0 < s.object[0] < s.drawer + PANEL_BACK and abs(s.object[1]) < 0.28


def place(s: State, edge: float, home: sapien.Pose, style: Style) -> Waypoint:
    """From the open drawer on: grasp the object on the counter, carry it over the drawer, let go."""
    rotation = grasp_hand(s, style)
    apple = s.object
    reach = apple - s.p
    near = np.linalg.norm(reach) < 0.06
    middle = (INSIDE_X + s.drawer) / 2  # x where the object falls in the middle of the opening
    over = abs(apple[0] - middle) < 0.04 and abs(apple[1]) < 0.22

    # Over the opening and low: let go.
    if near and over and s.p[2] < style.release_height + 0.03:
        return Waypoint(s.p, s.rotation, 1)
    # In the hand: lift, carry, lower.
    if near and s.held and s.opening < FINGERS_ON_OBJECT:
        lifted = ramp(s.p[2], COUNTER_Z + 0.05, COUNTER_Z + 0.07)
        above = ramp(abs(s.p[0] - middle), 0.06, 0.03)
        goal = np.array([mix(s.p[0], middle, lifted), s.p[1], mix(style.carry_height, style.release_height, above)])
        return Waypoint(goal, rotation, 0)
    # Fallen off the counter: out of reach, or on its way into the drawer.
    if apple[2] < COUNTER_Z:
        return go_home(s, edge, home)._replace(gripper=1)
    # Fingers around it: close.
    across = np.linalg.norm(s.rotation.as_matrix()[:, :2].T @ reach)  # miss across the hand
    along = s.rotation.as_matrix()[:, 2] @ reach
    missed = s.opening < FINGERS_SHUT
    tolerance = 0.015 if s.opening > 0.95 else 0.035  # once closing, the fingers centre the object themselves
    if across < tolerance and along < tolerance and not missed:
        return Waypoint(apple + [0, style.grasp_side, 0], rotation, 0)
    # Approach along the hand, as far as aligned and open.
    off = max(across / 0.03, angle(s.rotation, rotation) / 0.2)
    aligned = ramp(off, 1.2, 0.6) * ramp(s.opening, 0.6, 0.85)
    start = apple - style.hover * rotation.as_matrix()[:, 2] + [0, 0, 0.02]
    return Waypoint(mix(start, apple, aligned) + [0, style.grasp_side, 0], rotation, 1)


# -- the expert ------------------------------------------------------------------------------------------------------


def clip(vector: np.ndarray, length: float) -> np.ndarray:
    return vector * min(1.0, length / max(np.linalg.norm(vector), 1e-9))


def home_pose(sim) -> sapien.Pose:
    """The tool centre point of the start pose in the base frame."""
    return sim.agent.controller.forward_kinematics(sim.agent.init_qpos())


def read_hand(sim) -> dict:
    """What every expert's State begins with: tool centre point, rotation, opening, and the robot's base."""
    base = sim.agent.body.root_pose
    tcp = base * sim.agent.controller.tcp_pose()
    return {
        "p": np.asarray(tcp.p, dtype=np.float64),
        "rotation": Rotation.from_quat(tcp.q, scalar_first=True),
        "opening": float(np.clip(1 - sim.agent.closedness(), 0, 1)),
        "base": base,
    }


class Expert:
    """A policy that sees the simulator's state. `style` holds the constants of the episode, the only thing it keeps.

    Args: env, a SIMPLER environment or anything around it; rng draws a style at each `reset`; variation 0 (the nominal
    style) to 1 (`SPREAD`).
    """

    styles: ClassVar[tuple[type, dict[str, float]]] = (Style, SPREAD)

    def __init__(self, env, rng: np.random.Generator | None = None, variation: float = 1.0):
        self.sim = env.unwrapped
        self.rng, self.variation = rng or np.random.default_rng(), variation
        self.style, self.home = self.styles[0](), home_pose(self.sim)
        self.models: dict[sapien.Entity, np.ndarray] = {}  # their corners

    def reset(self):
        """Draw the constants of the next episode."""
        self.style = draw_style(*self.styles, self.rng, self.variation)

    def act(self) -> tuple[np.ndarray, bool]:
        """The action for the state now, canonical float32 (7,), and whether the first of two subtasks is finished:
        the drawer is open and the arm back at its start pose, so that the caller may ask for the second one.
        """
        s = self._read_state()
        home = s.base * self.home
        arrived = np.linalg.norm(home.p - s.p) < 0.08
        done_subtask = bool(self.sim.task.kind == "place" and s.drawer > OPEN_ENOUGH and arrived)
        return self._towards(s, self._waypoint(s, home)), done_subtask

    def _read_state(self) -> State:
        sim, thing = self.sim, self.sim.object
        return State(
            **read_hand(sim),
            drawer=sim.drawer_qpos() if sim.cabinet else 0.0,
            object=None if thing is None else np.asarray(thing.pose.p, dtype=np.float64),
            corners=None if thing is None else self._corners(thing),
            held=thing is not None and sim.agent.is_grasping(sim.contacts(), thing),
        )

    def _corners(self, entity: sapien.Entity) -> np.ndarray:
        """(N, 3) of its collision shapes, where they are now."""
        if entity not in self.models:
            self.models[entity] = model_corners(entity)
        return self.models[entity] @ rotation_matrix(entity.pose.q).T + entity.pose.p

    def _waypoint(self, s: State, home: sapien.Pose) -> Waypoint:
        task, style = self.sim.task, self.style
        edge = PANEL_TOP[self.sim.setup.drawer]
        if task.kind == "close":
            return close_drawer(s, edge, style) if s.drawer > CLOSED_ENOUGH else go_home(s, edge, home)
        if task.kind == "place" and in_drawer(s, edge):
            return go_home(s, edge, home)._replace(gripper=1)
        # A hooked hand pulls on to `pull_to`; a free one comes back only if the drawer is not open enough.
        hooked = s.p[2] < edge and s.p[0] < s.drawer + PANEL_BACK
        if s.drawer < (style.pull_to if hooked else OPEN_ENOUGH):
            return open_drawer(s, edge, style)
        if task.kind == "place" and self.sim.is_final_subtask() and s.p[2] > edge + 0.09:
            return place(s, edge, home, style)
        return go_home(s, edge, home)

    def _towards(self, s: State, goal: Waypoint) -> np.ndarray:
        """One clipped step to the waypoint in the base frame, shortened where inverse kinematics fails."""
        to_base = Rotation.from_quat(s.base.q, scalar_first=True).inv()
        step = to_base.apply(clip(GAIN * (goal.p - s.p), MAX_STEP * self.style.speed))
        turn = to_base.apply(clip(GAIN * (goal.rotation * s.rotation.inv()).as_rotvec(), MAX_TURN * self.style.speed))
        for share, turned in ((1, 1), (0.5, 0.5), (0.5, 0), (0.2, 0), (0, 0.5)):
            action = np.array([*share * step, *turned * turn, goal.gripper], dtype=np.float32)
            if self._reachable(action):
                break
        return action

    def _reachable(self, action: np.ndarray) -> bool:
        """Whether the controller's inverse kinematics will find this step (otherwise the arm stalls)."""
        controller = self.sim.agent.controller
        qpos = controller.robot.qpos.astype(np.float64)
        return controller.inverse_kinematics(controller.target(action), qpos)[1]


def make_expert(env, rng: np.random.Generator | None = None, variation: float = 1.0) -> Expert:
    """The expert of this environment's task."""
    from envs.expert_tabletop import TabletopExpert
    from envs.expert_widowx import WidowXExpert

    kinds = {"pick": TabletopExpert, "near": TabletopExpert, "put_on": WidowXExpert}
    return kinds.get(env.unwrapped.task.kind, Expert)(env, rng, variation)
