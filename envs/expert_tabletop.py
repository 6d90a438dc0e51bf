"""The scripted expert for the Google robot's table tasks: pick up, move near (spec 3.1 to 3.3).

A feedback law like `envs/expert.py`: the action is a function of the state now and of a few constants per episode.
Objects are known by the corners of their collision shapes, so what lies, stands or leans is grasped as it is: across
its narrow side, as deep as palm and table allow. Geometry is in the world frame; metres and radians.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import sapien
from scipy.spatial.transform import Rotation

from envs.expert import Expert, State, Waypoint, angle, hand, mix, opening_across, ramp, shadows
from envs.scenes import com_position, rotation_matrix, table_of

FREE_WIDTH = 1.04  # an object may be grasped across any width up to this times its narrowest
FINGERS_SHUT = 0.19  # opening below which nothing is between the fingers (closed: 0.174)
FINGERS_OPEN = 0.95  # opening from which they are not closing around something
FINGERTIPS = 0.035  # m, open fingertips end this far behind the tool centre point; closed ones reach it
FINGER_SWING = 0.06  # m, from the hand's axis, where the fingertips reach farthest while closing
TIP_ROOM = 0.006, 0.009  # m between the tool centre point and the table: and the swing of a lower finger; at least
HAND_ROOM = 0.16  # m, horizontally, that the open hand needs
RESTING = 0.01  # m above the table


@dataclass(frozen=True)
class TableStyle:
    """How this episode is done: what may vary without hurting success."""

    speed: float = 1.0  # of MAX_STEP and MAX_TURN
    yaw: float = -1.2  # of the opening direction, where the object leaves a choice
    tilt: float = 0.02  # of the hand from vertical, more than the arm needs
    depth: float = 0.056  # of the tool centre point below the object's top
    grasp_side: float = 0.0  # offset along the object, across the opening direction
    hover: float = 0.075  # pre-grasp distance along the hand
    lift: float = 0.09  # of a picked object above the table
    carry: float = 0.04  # of a carried object above the table
    gap: float = 0.145  # between the centres of source and target


# Half ranges of the uniform draws around the defaults; speed is drawn from 0.7 to 1.1.
TABLE_SPREAD = dict(
    yaw=0.35, tilt=0.02, depth=0.005, grasp_side=0.004, hover=0.015, lift=0.02, carry=0.01, gap=0.01
)  # fmt: skip


class Body(NamedTuple):
    """An object as it is now."""

    corners: np.ndarray  # (N, 3) of its collision shapes
    center: np.ndarray  # (3,) centre of mass

    @property
    def top(self) -> float:
        return float(self.corners[:, 2].max())

    @property
    def bottom(self) -> float:
        return float(self.corners[:, 2].min())


class Grasp(NamedTuple):
    p: np.ndarray  # (3,) tool centre point
    rotation: Rotation


# -- grasping --------------------------------------------------------------------------------------------------------


def needed_tilt(p, base: sapien.Pose) -> float:
    """How far from vertical, towards away from the robot, the wrist's range asks the hand to be at `p` (fitted)."""
    x, y = rotation_matrix(base.q).T[:2] @ (p - base.p)
    return float(np.clip(0.08 + 3 * (p[2] - 0.895) + 0.6 * (np.hypot(x, y) - 0.65) + 0.5 * max(y, 0), 0.05, 0.9))


def hand_at(p, base: sapien.Pose, opening, style: TableStyle) -> Rotation:
    """The hand at p (3,), opening along `opening` (3,), tilted as the arm needs."""
    tilt, forward = needed_tilt(p, base) + style.tilt, rotation_matrix(base.q)[:, 0]
    return hand(np.sin(tilt) * forward - [0, 0, np.cos(tilt)], opening)


def opening_yaw(s: State) -> float:
    return float(np.arctan2(*s.rotation.as_matrix()[[1, 0], 1]))


def plan_grasp(s: State, body: Body, table: float, first_yaw: float, style: TableStyle) -> Grasp:
    """Across the narrowest width; where several are as narrow (round things, cubes), the nearest to `first_yaw`, or to
    the hand's own once it closes.
    """
    wanted = first_yaw if s.opening > FINGERS_OPEN else opening_yaw(s)
    opening = opening_across(shadows(body.corners), wanted, FREE_WIDTH)
    shadow = body.corners @ opening
    middle = (shadow.min() + shadow.max()) / 2
    along = np.array([-opening[1], opening[0], 0])
    p = opening * middle + along * (along @ body.center + style.grasp_side)
    p[2] = body.top - style.depth
    askew = abs(hand_at(p, s.base, opening, style).as_matrix()[2, 1])  # one finger is lower than the other
    p[2] = max(p[2], table + max(TIP_ROOM[0] + FINGER_SWING * askew, TIP_ROOM[1]))
    return Grasp(p, hand_at(p, s.base, opening, style))


def reach_for(s: State, grasp: Grasp, others: list[Body], style: TableStyle) -> Waypoint:
    """From anywhere to closed fingers around the object."""
    frame = s.rotation.as_matrix()
    reach = grasp.p - s.p
    across, along = np.linalg.norm(frame[:, :2].T @ reach), frame[:, 2] @ reach
    rotation = hand_at(s.p, s.base, grasp.rotation.as_matrix()[:, 1] * [1, 1, 0], style)
    turn = angle(s.rotation, rotation)

    # Fingers around it: close. Once closing, they centre the object themselves.
    closing = s.opening < FINGERS_OPEN
    if (
        across < (0.035 if closing else 0.012)
        and along < (0.018 if closing else 0.012)
        and turn < (0.5 if closing else 0.15)
        and (s.opening > FINGERS_SHUT or s.held)
    ):
        return Waypoint(grasp.p, rotation, 0)
    # Approach along the hand, as far as aligned and open.
    off = max(across / 0.03, turn / 0.25)
    aligned = ramp(off, 1.2, 0.6) * ramp(s.opening, 0.6, 0.85)
    start = grasp.p - style.hover * grasp.rotation.as_matrix()[:, 2]
    goal = mix(start, grasp.p, aligned)
    # Far off: over what stands in the way, up before sideways.
    far = ramp(np.linalg.norm(reach[:2]), 0.05, 0.1)
    height = max([goal[2], *(body.top - FINGERTIPS + 0.04 for body in others if in_the_way(s.p, goal, body))])
    free = mix(1, ramp(s.p[2], height - 0.06, height - 0.02), far)
    goal = np.array([*mix(s.p[:2], goal[:2], free), mix(goal[2], max(height, goal[2]), far)])
    return Waypoint(goal, rotation, 1)


def in_the_way(start, goal, body: Body) -> bool:
    """Whether the open hand, moved from start to goal, passes over the object."""
    path, to = (goal - start)[:2], (body.center - start)[:2]
    share = np.clip(to @ path / max(path @ path, 1e-9), 0, 1)
    return bool(np.linalg.norm(to - share * path) < HAND_ROOM)


def in_hand(s: State, grasp: Grasp) -> bool:
    return s.held and np.linalg.norm(grasp.p - s.p) < 0.08


def keep_hand(s: State, style: TableStyle) -> Rotation:
    """Opening as it does now, tilted as the arm needs."""
    return hand_at(s.p, s.base, s.rotation.as_matrix()[:, 1] * [1, 1, 0], style)


# -- tasks -----------------------------------------------------------------------------------------------------------


def pick(s: State, body: Body, others: list[Body], table: float, style: TableStyle) -> Waypoint:
    grasp = plan_grasp(s, body, table, style.yaw, style)
    if in_hand(s, grasp):
        return Waypoint(s.p + [0, 0, style.lift - (body.bottom - table)], keep_hand(s, style), 0)
    return reach_for(s, grasp, others, style)


def move_near(s: State, body: Body, target: Body, others: list[Body], table: float, style: TableStyle) -> Waypoint:
    """Carry the object straight towards the target, put it down on the near side, let go, back off."""
    away = (body.center - target.center)[:2]
    distance = np.linalg.norm(away)
    away = away / distance
    # Opening across the line to the target, the fingers leave it alone.
    first_yaw = np.arctan2(away[0], -away[1]) + (style.yaw - TableStyle.yaw) / 2
    grasp = plan_grasp(s, body, table, first_yaw, style)
    height = body.bottom - table

    # There: let go, then back off along the hand.
    if distance < style.gap + 0.025 and height < RESTING:
        above = s.p[2] > body.top + 0.06
        back = 0 if above or s.opening < 0.8 else 0.1
        return Waypoint(s.p - back * s.rotation.as_matrix()[:, 2], s.rotation, 1)
    # In the hand: lift, carry, lower.
    if in_hand(s, grasp):
        rest = distance - style.gap
        lifted = ramp(height, 0.4 * style.carry, 0.8 * style.carry)
        close = ramp(abs(rest), 0.03, 0.01)
        lead = max(lifted, 0.5 * close)
        rise = mix(style.carry, 0.0, close) - height
        return Waypoint(s.p + [*(-away * rest * lead), rise], keep_hand(s, style), 0)
    return reach_for(s, grasp, others, style)


# -- the expert ------------------------------------------------------------------------------------------------------


class TabletopExpert(Expert):
    """The feedback law for "pick" and "near" tasks."""

    styles = (TableStyle, TABLE_SPREAD)

    def _waypoint(self, s: State, home: sapien.Pose) -> Waypoint:
        setup = self.sim.setup
        entities = self.sim.things + self.sim.distractors
        bodies = [self._body(entity) for entity in entities]
        source, table = bodies[setup.source], table_of(setup).top
        others = [body for body in bodies if body is not source]
        if setup.target is None:
            return pick(s, source, others, table, self.style)
        return move_near(s, source, bodies[setup.target], others, table, self.style)

    def _body(self, entity: sapien.Entity) -> Body:
        return Body(self._corners(entity), com_position(entity).astype(np.float64))
