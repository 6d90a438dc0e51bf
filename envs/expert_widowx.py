"""The scripted expert for the WidowX put-on tasks (spec 3.6): grasp the source, put it on or into the target.

A feedback law like the one in `envs/expert.py`. The controller adds actions up to a target that the hand follows with a
lag of about one control step, so a small share of the sensed error per step (`GAIN`) makes a smooth, nearly critically
damped approach that ends exactly at the goal; what the controller's target is at the moment need not be known.

World frame, metres and radians; +z up. The hand always points down; its yaw is 0 where the fingers open along y.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import sapien
from scipy.spatial.transform import Rotation

from envs.expert import Expert, Waypoint, angle, clip, mix, ramp, read_hand
from envs.scenes import com_position

MAX_STEP, MAX_TURN = 0.045, 0.3  # m, rad per control step at speed 1
GAIN = 0.35  # of the error, per control step
MAX_LEAD, MAX_LEAD_TURN = 0.08, 0.6  # m, rad that the controller's target may be ahead of a hand that is blocked
TIP = 0.0156  # m, that the fingers reach beyond the tool centre point
TIP_GAP = 0.0034  # m, kept between fingertips and table
NEAR = 0.035  # m; an object further from the tool centre point than this is not in the hand
FINGERS_SHUT = 0.04  # opening below which nothing is between the fingers (they shut at 0)
FINGERS_WIDE = 0.9  # opening at which they clear the object
DOWN = Rotation.from_matrix([[0, 0, -1], [0, -1, 0], [-1, 0, 0]])  # columns: x along the fingers, y their opening


@dataclass(frozen=True)
class Job:
    """What is particular about a task; heights are of the source's centre of mass above the target's."""

    floor: float  # z of what the source stands on
    rest: float  # height of the source on the target
    release: float  # height at which to let go
    over: float  # m, horizontal distance from the target below which to let go
    placed: float  # m, the same for a source that lies on the target by itself
    turns: int = 2  # times in a full turn that the source looks the same to the fingers
    yaw_low: float = -np.pi / 3  # the yaws of the grasp run from here to a full turn divided by `turns` further
    depth: float = 0.008  # m above the grasp at which the fingers may close
    spread: float = 0.01  # m, of the place on the target
    carry: float = 0.075  # height of the way to the target
    x_max: float = np.inf  # of the grasp: beyond, a finger would come down on the rim of the sink


JOBS = {
    "spoon": Job(floor=0.8695, rest=0.0125, release=0.022, over=0.025, placed=0.06),
    "carrot": Job(floor=0.8695, rest=0.018, release=0.025, over=0.02, placed=0.06),
    "cube": Job(
        floor=0.8695, rest=0.03, release=0.033, over=0.006, placed=0.018, turns=4, yaw_low=-np.pi / 4, spread=0.0015
    ),
    "eggplant": Job(
        floor=0.922,
        rest=0.02,
        release=0.06,
        over=0.025,
        placed=0.07,
        yaw_low=-1.75,
        depth=0.016,
        carry=0.1,
        x_max=-0.092,
    ),
}


@dataclass(frozen=True)
class Style:
    """How this episode is done: what may vary without hurting success."""

    speed: float = 1.0  # of MAX_STEP and MAX_TURN
    grasp_along: float = 0.0  # m from the centre of mass along the source
    grasp_height: float = 0.004  # m above the centre of mass
    grasp_yaw: float = 0.0
    hover: float = 0.06  # m above the grasp, where the fingers align
    carry: float = 0.0  # m above `Job.carry`
    place_x: float = 0.0  # of `Job.spread`
    place_y: float = 0.0


SPREAD = dict(
    grasp_along=0.006, grasp_height=0.002, grasp_yaw=0.06, hover=0.012, carry=0.012, place_x=1.0, place_y=1.0
)  # fmt: skip


class State(NamedTuple):
    """What the expert looks at."""

    p: np.ndarray  # (3,) tool centre point
    rotation: Rotation  # of the hand; columns: x along the fingers, y the direction they open in
    opening: float  # 1 = open
    base: sapien.Pose
    source: np.ndarray  # (3,) centre of mass
    axis: np.ndarray  # (3,) the source's long axis
    target: np.ndarray  # (3,) centre of mass
    held: bool  # both fingers press on the source


def hand_down(yaw: float) -> Rotation:
    return Rotation.from_rotvec([0, 0, yaw]) * DOWN


def hand_yaw(rotation: Rotation) -> float:
    x, y, _ = rotation.apply([0, 1, 0])
    return float(np.arctan2(x, -y))


def grasp_yaw(axis, job: Job) -> float:
    """The yaw of fingers that close across a source lying along `axis` (3,), one per way that it can lie."""
    return float((np.arctan2(axis[1], axis[0]) - job.yaw_low) % (2 * np.pi / job.turns) + job.yaw_low)


def keep_near(step, lead, longest: float):
    """The step (3,), changed where the target, `lead` (3,) ahead of the hand, would be further ahead than `longest`."""
    return clip(clip(lead + step, longest) - lead, np.linalg.norm(step))


def put_on(s: State, home, job: Job, style: Style) -> Waypoint:
    """Approach, grasp, lift, carry, lower, let go, go home; `home` is the pose of the start."""
    from_target = s.source - s.target
    place = job.spread * np.array([style.place_x, style.place_y])
    miss = np.linalg.norm(from_target[:2] - place)
    upright = hand_down(hand_yaw(s.rotation))
    axis = np.append(s.axis[:2] / max(np.linalg.norm(s.axis[:2]), 1e-6), 0)
    grasp = s.source + style.grasp_along * (job.turns == 2) * axis
    grasp[0] = min(grasp[0], max(job.x_max, s.source[0] - 0.006))
    grasp[2] = max(s.source[2] + style.grasp_height, job.floor + TIP + TIP_GAP)
    reach = grasp - s.p
    across, depth = np.linalg.norm(reach[:2]), -reach[2]  # of the hand from the grasp: sideways, above
    in_hand = s.held and np.linalg.norm(reach) < NEAR

    # On the target: let go, then up and home.
    if in_hand:
        on_target = miss < job.over and from_target[2] < job.release
    else:
        on_target = np.linalg.norm(from_target[:2]) < job.placed and from_target[2] < job.rest + 0.012
    if on_target:
        if s.opening < FINGERS_WIDE and across < NEAR and depth < 0.03:
            return Waypoint(s.p, s.rotation, 1)
        up = ramp(depth, 0.03, 0.06)
        goal = np.append(mix(s.p[:2], home.p[:2], up), home.p[2])
        return Waypoint(goal, Rotation.from_quat(home.q, scalar_first=True) if up else s.rotation, 1)
    # In the hand: lift, carry, lower, by where the source is.
    if in_hand:
        carry = job.carry + style.carry
        high = ramp(from_target[2], carry - 0.035, carry - 0.015)
        above = ramp(miss, 2.5 * job.over, job.over)
        offset = np.append(place, mix(carry, job.release - 0.004, above)) - from_target
        offset[:2] *= max(high, above)
        return Waypoint(s.p + offset, upright, 0)
    # Fingers around it: close.
    yaw = grasp_yaw(s.axis, job) + style.grasp_yaw
    rotation = hand_down(yaw)
    turned = angle(s.rotation, rotation)
    if across < 0.01 and depth < job.depth and turned < 0.25 and s.opening > FINGERS_SHUT:
        return Waypoint(grasp, rotation, 0)
    # Approach from above, as far as aligned and open.
    aligned = ramp(max(across / 0.015, turned / 0.15), 1.5, 0.7) * ramp(s.opening, 0.55, 0.75)
    return Waypoint(grasp + [0, 0, style.hover * (1 - aligned)], rotation, 1)


class WidowXExpert(Expert):
    """`envs.expert.Expert` for the four put-on tasks."""

    styles = (Style, SPREAD)

    def _read_state(self) -> State:
        sim = self.sim
        return State(
            **read_hand(sim),
            source=np.asarray(com_position(sim.object), dtype=np.float64),
            axis=Rotation.from_quat(sim.object.pose.q, scalar_first=True).apply([1, 0, 0]),
            target=np.asarray(com_position(sim.things[sim.setup.target]), dtype=np.float64),
            held=sim.agent.is_grasping(sim.contacts(), sim.object),
        )

    def _waypoint(self, s: State, home) -> Waypoint:
        return put_on(s, home, JOBS[self.sim.task.put_on], self.style)

    def _towards(self, s: State, goal: Waypoint) -> np.ndarray:
        """A clipped share of the way to the waypoint in the base frame."""
        to_base, controller = Rotation.from_quat(s.base.q, scalar_first=True).inv(), self.sim.agent.controller
        longest, widest = MAX_STEP * self.style.speed, MAX_TURN * self.style.speed
        step = to_base.apply(clip(GAIN * (goal.p - s.p), longest))
        turn = to_base.apply(clip(GAIN * (goal.rotation * s.rotation.inv()).as_rotvec(), widest))
        # Only where the hand is blocked does the action depend on the controller's target, lest that run away.
        here, target = controller.tcp_pose(), controller.last_target
        lead = Rotation.from_rotvec(turn).apply(target.p - here.p)
        ahead = Rotation.from_quat(target.q, scalar_first=True) * Rotation.from_quat(here.q, scalar_first=True).inv()
        step, turn = keep_near(step, lead, MAX_LEAD), keep_near(turn, ahead.as_rotvec(), MAX_LEAD_TURN)
        action = np.array([*step, *turn, goal.gripper], dtype=np.float32)
        if not self._reachable(action):  # the arm would stall: back to where the hand is
            action[:3], action[3:6] = clip(step - lead, longest), clip(turn - ahead.as_rotvec(), widest)
        return action
