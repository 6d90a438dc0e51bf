"""The Google robot's controller for many environments at once, on any device (spec section 1.1).

One call turns sensed joints and actions of B environments into the drive targets of all physics steps of a control
step, with the semantics of `GoogleRobotController.set_action`; `tests/test_batched.py` holds the two against each
other. Inverse kinematics and waypoints are batched tensor operations in float64. Only the times and jerks of each plan
come from the ruckig library, one environment after another on the CPU (microseconds each).

How it plugs into ManiSkill's GPU backend, where one controller object serves all environments:
- `set_drive_property` builds `BatchedController(urdf, joint names, num_envs, device)`; `reset` passes
  `scene._reset_mask` as `mask`; `set_action` passes `articulation.qpos`, `.qvel` and the action, and keeps the result.
- `before_simulation_step` k = 1..171 writes `arm[:, k]` and `fingers[:, k]` with `set_joint_drive_targets` and
  `finger_speed[:, k]` with `set_joint_drive_velocity_targets`, then calls `px.gpu_apply_articulation_target_position`
  and `_velocity` itself: ManiSkill applies targets once per control step only.
- SAPIEN has no `compute_passive_force` on the GPU. There `disable_gravity` of the links takes its place; Coriolis and
  centrifugal forces stay uncompensated. Solver iterations do not follow each environment's contacts: all would use
  `GRASP_SOLVER_ITERATIONS`. Both change the physics, not how targets follow from sensed joints.
"""

from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import torch
from ruckig import InputParameter, Ruckig, Trajectory
from scipy.spatial.transform import Rotation
from torch.nn.functional import pad

from envs.google_robot import (
    ARM_GAINS,
    CONTROL_FREQ,
    FINGER_CLOSED,
    FINGER_RANGE,
    FINGER_SMALL_ACTION,
    FINGER_TARGET_LIMITS,
    FINGERS,
    SIM_FREQ,
)

SUBSTEPS = SIM_FREQ // CONTROL_FREQ
ARM_LIMITS, FINGER_LIMITS = (1.5, 2.0, 50.0), (1.0, 7.0, 50.0)  # rad/s, rad/s^2, rad/s^3
IK_TOLERANCE, IK_ITERATIONS, IK_STEP, IK_DAMPING = 1e-4, 100, 0.1, 1e-6
SERIES_BELOW = 1e-2  # rad^2: below it the log's coefficients come from their series, whose rest is under 1e-15


# -- rotations and rigid motions ---------------------------------------------------------------------------------------


def skew(w: torch.Tensor) -> torch.Tensor:
    """Cross-product matrix (..., 3, 3) of w (..., 3)."""
    x, y, z = w.unbind(-1)
    o = torch.zeros_like(x)
    return torch.stack([o, -z, y, z, o, -x, -y, x, o], -1).unflatten(-1, (3, 3))


def rotation_matrix(w: torch.Tensor) -> torch.Tensor:
    """Rotation (..., 3, 3) of the rotation vector w (..., 3) rad."""
    angle, k = w.norm(dim=-1)[..., None, None] / torch.pi, skew(w)  # torch.sinc(x) is sin(pi x) / (pi x)
    return torch.eye(3).to(w) + torch.sinc(angle) * k + 0.5 * torch.sinc(angle / 2) ** 2 * (k @ k)


def inverse(pose: torch.Tensor) -> torch.Tensor:
    """Inverse of rigid motions (..., 4, 4)."""
    back = pose[..., :3, :3].mT
    top = torch.cat([back, -back @ pose[..., :3, 3:]], -1)
    return torch.cat([top, pose[..., 3:, :]], -2)


def log_and_derivative(pose: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logarithm (..., 6) = (linear, angular) of rigid motions (..., 4, 4), and its derivative (..., 6, 6).

    The derivative is that of -log(pose) by a motion of the frame `pose` is seen from, written in that frame: what turns
    the frame's Jacobian into the error's. It is the function `I - ad/2 + c ad^2` of ad = [[W, V], [0, W]], whose upper
    right block is a derivative by W in the direction V.
    """
    rotation, p = pose[..., :3, :3], pose[..., :3, 3]
    odd = rotation - rotation.mT
    sine_axis = 0.5 * torch.stack([odd[..., 2, 1], odd[..., 0, 2], odd[..., 1, 0]], -1)
    sine = sine_axis.norm(dim=-1)
    angle = torch.atan2(sine, 0.5 * (rotation.diagonal(dim1=-2, dim2=-1).sum(-1) - 1))
    w = sine_axis * (angle / sine.clamp(min=1e-300))[..., None]

    # c = (1 - h cot h) / s with h = angle / 2, s = angle^2, and twice its derivative by s
    s = (w * w).sum(-1)
    small = s < SERIES_BELOW
    safe, h = torch.where(small, 1.0, s), torch.where(small, 0.5, angle / 2)
    cot = 1 / torch.tan(h)
    c = (1 - h * cot) / safe
    slope = ((h / torch.sin(h) ** 2 - cot) / (4 * h) - 2 * c) / safe
    c = torch.where(small, 1 / 12 + s * (1 / 720 + s * (1 / 30240 + s / 1209600)), c)
    slope = torch.where(small, 1 / 360 + s * (1 / 7560 + s / 201600), slope)

    c, slope, k = c[..., None, None], slope[..., None, None], skew(w)
    kk = k @ k
    same = torch.eye(3).to(w) - 0.5 * k + c * kk
    v = (same @ p[..., None])[..., 0]
    kv, along = skew(v), (w * v).sum(-1)[..., None, None]
    mixed = -0.5 * kv + c * (k @ kv + kv @ k) + slope * along * kk
    derivative = torch.cat([torch.cat([same, mixed], -1), torch.cat([torch.zeros_like(same), same], -1)], -2)
    return torch.cat([v, w], -1), derivative


# -- kinematics --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chain:
    """The J revolute joints from the base to the TCP; a joint's transform is `still + sin(q) sine + cos(q) cosine`."""

    names: list[str]
    axis: torch.Tensor  # (J, 3)
    still: torch.Tensor  # (J, 4, 4)
    sine: torch.Tensor  # (J, 4, 4)
    cosine: torch.Tensor  # (J, 4, 4)
    tip: torch.Tensor  # (4, 4) TCP in the last joint's frame


def read_chain(urdf: str | Path, tip: str = "link_gripper_tcp", device="cpu") -> Chain:
    """The chain from the root link of `urdf` to the link `tip`."""
    above = {joint.find("child").get("link"): joint for joint in ElementTree.parse(urdf).getroot().iter("joint")}
    joints, link = [], tip
    while link in above:
        joints.insert(0, above[link])
        link = above[link].find("parent").get("link")

    def numbers(text: str) -> torch.Tensor:
        return torch.tensor([float(x) for x in text.split()], dtype=torch.float64)

    names, axes, origins, origin = [], [], [], torch.eye(4, dtype=torch.float64)
    for joint in joints:
        step = torch.eye(4, dtype=torch.float64)
        placed = joint.find("origin")
        place = {"xyz": "0 0 0", "rpy": "0 0 0", **({} if placed is None else placed.attrib)}
        step[:3, 3] = numbers(place["xyz"])
        step[:3, :3] = torch.from_numpy(Rotation.from_euler("xyz", numbers(place["rpy"]).numpy()).as_matrix())
        origin = origin @ step
        if joint.get("type") == "revolute":
            names.append(joint.get("name"))
            axes.append(numbers(joint.find("axis").get("xyz")))
            origins.append(origin)
            origin = torch.eye(4, dtype=torch.float64)
        elif joint.get("type") != "fixed":
            raise ValueError(f"joint {joint.get('name')!r} is {joint.get('type')}, neither revolute nor fixed")
    axis, origins = torch.stack(axes), torch.stack(origins)
    along, k = axis[:, :, None] * axis[:, None, :], skew(axis)
    still = pad(along, (0, 1, 0, 1))
    still[:, 3, 3] = 1
    parts = still, pad(k, (0, 1, 0, 1)), pad(-k @ k, (0, 1, 0, 1))
    return Chain(names, axis.to(device), *((origins @ part).to(device) for part in parts), origin.to(device))


def joint_limits(urdf: str | Path, names, device="cpu") -> torch.Tensor:
    """(2, J) rad: lowest and highest position of each joint, which drive targets never leave."""
    limits = {joint.get("name"): joint.find("limit") for joint in ElementTree.parse(urdf).getroot().iter("joint")}
    rows = [[float(limits[name].get(side)) for name in names] for side in ("lower", "upper")]
    return torch.tensor(rows, dtype=torch.float64, device=device)


def joint_frames(chain: Chain, q: torch.Tensor) -> torch.Tensor:
    """Frames (B, J, 4, 4) in the base of the chain's joints at q (B, J) rad; times `chain.tip` the last is the TCP."""
    q = q[..., None, None]
    local = chain.still + torch.sin(q) * chain.sine + torch.cos(q) * chain.cosine
    frames = [local[:, 0]]
    for i in range(1, local.shape[1]):
        frames.append(frames[-1] @ local[:, i])
    return torch.stack(frames, 1)


def inverse_kinematics(chain: Chain, tcp: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Joint positions (B, J) rad that bring the TCP to `tcp` (B, 4, 4), from q (B, J), and whether they do (B,).

    SAPIEN's closed loop: a tenth of a damped Gauss-Newton step at a time on log(current^-1 target) of the last joint's
    frame, until its norm falls below the tolerance. Each environment stops for itself; unfound, its q is no use.
    """
    target, damping = tcp @ inverse(chain.tip), IK_DAMPING * torch.eye(6).to(q)
    for iteration in range(IK_ITERATIONS + 1):
        frames = joint_frames(chain, q)
        last = frames[:, -1]
        error, derivative = log_and_derivative(inverse(last) @ target)
        found = error.norm(dim=-1) < IK_TOLERANCE
        if iteration == IK_ITERATIONS or bool(found.all()):
            break
        axis = (frames[..., :3, :3] @ chain.axis[..., None])[..., 0]
        arm = last[:, None, :3, 3] - frames[..., :3, 3]
        columns = torch.stack([torch.linalg.cross(axis, arm), axis], -2)  # (B, J, 2, 3): linear, angular, base axes
        jacobian = derivative @ (columns @ last[:, None, :3, :3]).flatten(-2).mT
        factor = torch.linalg.cholesky_ex(jacobian @ jacobian.mT + damping)[0]
        step = (jacobian.mT @ torch.cholesky_solve(error[..., None], factor))[..., 0]
        q = torch.where(found[:, None], q, q + IK_STEP * step)
    return q, found


# -- plans -------------------------------------------------------------------------------------------------------------


def plan_times_and_jerks(start, velocity, target, limits) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Time-optimal, time-synchronised plans to rest: durations (B, J, 9) s, jerks (B, J, 9) rad/s^3, total (B,) s.

    Two phases bring a start outside the limits inside, seven are the plan. Limits: velocity, acceleration, jerk.
    """
    joints, rows, totals = start.shape[1], [], []
    solver, plan = Ruckig(joints), InputParameter(joints)
    plan.max_velocity, plan.max_acceleration, plan.max_jerk = ([limit] * joints for limit in limits)
    for p0, v0, p1 in zip(start.tolist(), velocity.tolist(), target.tolist()):
        trajectory = Trajectory(joints)
        plan.current_position, plan.current_velocity, plan.target_position = p0, v0, p1
        solver.calculate(plan, trajectory)  # the result code is not checked, as upstream
        rows.append([[part.brake.t + part.t, part.brake.j + part.j] for part in trajectory.profiles[0]])
        totals.append(trajectory.duration)
    durations, jerks = torch.tensor(rows, dtype=torch.float64, device=start.device).unbind(2)
    return durations, jerks, torch.tensor(totals, dtype=torch.float64, device=start.device)


def jerk_limited(start, velocity, target, limits, steps=SUBSTEPS) -> tuple[torch.Tensor, torch.Tensor]:
    """Waypoints of the plans from (`start`, `velocity`) to rest at `target`, all (B, J) rad, rad/s.

    Returns: positions, velocities (B, J, steps + 1) at k / 513 s, held at the end of each environment's plan.
    """
    t, j, total = plan_times_and_jerks(start, velocity, target, limits)
    times = torch.minimum(torch.arange(steps + 1).to(start) / SIM_FREQ, total[:, None])
    times = times[:, None].expand(-1, start.shape[1], -1).contiguous()

    def until(increments):  # sum of the increments before each phase, and after the last
        return pad(increments.cumsum(-1), (1, 0))

    a = until(j * t)
    v = velocity[..., None] + until(t * (a[..., :-1] + t * j / 2))
    p = start[..., None] + until(t * (v[..., :-1] + t * (a[..., :-1] / 2 + t * j / 6)))
    begin = until(t)
    phase = torch.searchsorted(begin[..., 1:].contiguous(), times, right=True)
    p, v, a, j, begin = (x.gather(-1, phase) for x in (p, v, a, pad(j, (0, 1)), begin))
    t = times - begin
    return p + t * (v + t * (a / 2 + t * j / 6)), v + t * (a + t * j / 2)


# -- the controller ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DriveTargets:
    """Of one control step; index k belongs to physics step k = 1..171, index 0 is where the plans start."""

    arm: torch.Tensor  # (B, 172, 9) rad, in the order of `ARM_GAINS`
    fingers: torch.Tensor  # (B, 172, 2) rad, in the order of `FINGERS`
    finger_speed: torch.Tensor  # (B, 172, 2) rad/s; the arm's velocity targets are 0
    ik_success: torch.Tensor  # (B,)


class BatchedController:
    """`GoogleRobotController` of B environments, which share nothing but the call.

    Args: urdf of the robot; joint names in the order of the simulator's qpos. State, float64: `arm_position`,
    `arm_velocity` (B, 9) at the end of the last plan where `moved` (B,); `finger_end`, `finger_target` (B, 2).
    """

    def __init__(self, urdf: str | Path, names: list[str], device="cpu"):
        self.chain = read_chain(urdf, device=device)
        self.arm = [names.index(name) for name in ARM_GAINS]
        self.fingers = [names.index(name) for name in FINGERS]
        self.arm_limits = joint_limits(urdf, ARM_GAINS, device)
        self.reaching = [list(ARM_GAINS).index(name) for name in self.chain.names]  # the rest moves the head

    def reset(self, qpos: torch.Tensor, mask: torch.Tensor | None = None):
        """Start anew from sensed qpos (B, 11), in the environments of `mask` (B,) only if given."""
        fresh = {
            "arm_position": qpos[:, self.arm].double(),
            "arm_velocity": torch.zeros_like(qpos[:, self.arm], dtype=torch.float64),
            "moved": torch.zeros_like(qpos[:, 0], dtype=torch.bool),
            "finger_end": qpos[:, self.fingers].double(),
            "finger_target": qpos[:, self.fingers].double(),
        }
        for name, value in fresh.items():
            if mask is not None:
                value = torch.where(mask.reshape(-1, *[1] * (value.ndim - 1)), value, getattr(self, name))
            setattr(self, name, value)

    def tcp_pose(self, qpos: torch.Tensor) -> torch.Tensor:
        """TCP poses (B, 4, 4) in the robots' base frames at qpos (B, 11)."""
        return joint_frames(self.chain, qpos[:, self.arm].double()[:, self.reaching])[:, -1] @ self.chain.tip

    def set_action(self, qpos: torch.Tensor, qvel: torch.Tensor, action: torch.Tensor) -> DriveTargets:
        """The drive targets for `action` (B, 7) (see `GoogleRobotController`) from sensed qpos, qvel (B, 11)."""
        qpos, qvel, action = qpos.double(), qvel.double(), action.double()
        arm, fingers = qpos[:, self.arm], qpos[:, self.fingers]

        tcp = self.tcp_pose(qpos)
        turned = rotation_matrix(action[:, 3:6]) @ tcp[:, :3, :3]
        top = torch.cat([turned, (tcp[:, :3, 3] + action[:, :3])[..., None]], -1)
        solution, success = inverse_kinematics(self.chain, torch.cat([top, tcp[:, 3:]], -2), q=arm[:, self.reaching])
        arm_target = arm.clone()
        arm_target[:, self.reaching] = torch.where(success[:, None], solution, arm[:, self.reaching])
        moved = self.moved[:, None]
        start = torch.where(moved, self.arm_position, arm)
        velocity = torch.where(moved, self.arm_velocity, qvel[:, self.arm].clamp(-1.5, 1.5))
        arm_path, arm_speed = jerk_limited(start, velocity, arm_target, ARM_LIMITS)
        self.arm_position, self.arm_velocity = arm_path[..., -1], arm_speed[..., -1]
        self.moved = torch.ones_like(self.moved)

        delta = FINGER_RANGE * action[:, 6:].clamp(-1, 1)
        commanded = (self.finger_end + delta).clamp(*FINGER_TARGET_LIMITS)
        self.finger_target = torch.where(delta.abs() >= FINGER_SMALL_ACTION, commanded, self.finger_target)
        path, speed = jerk_limited(fingers, qvel[:, self.fingers].clamp(-1, 1), self.finger_target, FINGER_LIMITS)
        self.finger_end = path[..., -1]
        speed = torch.where(path < FINGER_CLOSED, speed, 0.0)
        arm_path = arm_path.mT.clamp(*self.arm_limits)
        return DriveTargets(arm_path, path.clamp(max=FINGER_CLOSED).mT, speed.mT, success)
