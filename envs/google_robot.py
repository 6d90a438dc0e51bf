"""The Google robot of SIMPLER on ManiSkill 3: the articulation and upstream's controller (spec section 1.1).

One control step (1/3 s) is 171 physics steps. The arm follows a jerk-limited plan towards `sensed TCP pose + action`,
continued from where the *previous plan* ended; the fingers follow a plan from where they are *sensed* to be. The
controller is a function of sensed joint positions, the action and the end of the last plan, nothing else, so a
recorded rollout can be re-entered at any step (`experiments/replay_reference.py`).
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import sapien
from mani_skill.agents.controllers.base_controller import ControllerConfig
from mani_skill.agents.registration import register_agent
from mani_skill.utils.structs.types import Array
from ruckig import InputParameter, Ruckig, Trajectory
from scipy.spatial.transform import Rotation

from envs.robot import RobotController, SimplerRobot, by_plain_name

DESCRIPTION = "mani_skill2_real2sim/assets/descriptions/googlerobot_description"
URDF = DESCRIPTION + "/google_robot_meta_sim_fix_wheel_fix_fingertip{}.urdf"
SIM_FREQ, CONTROL_FREQ = 513, 3
BASE_HEIGHT = 0.07905  # m
INIT_QPOS = {  # rad
    "joint_torso": -0.2639457174606611,
    "joint_shoulder": 0.0831913360274175,
    "joint_bicep": 0.5017611504652179,
    "joint_elbow": 1.156859026208673,
    "joint_forearm": 0.028583671314766423,
    "joint_wrist": 1.592598203487462,
    "joint_gripper": -1.080652960128774,
    "joint_finger_right": 0.0,
    "joint_finger_left": 0.0,
    "joint_head_pan": -0.00285961,
    "joint_head_tilt": 0.7851361,
}
# name: (stiffness N m/rad, damping N m s/rad, force limit N m)
ARM_GAINS = {
    "joint_torso": (1700.0, 1059.9791902443303, 300.0),
    "joint_shoulder": (1737.0471680861954, 1010.4720585373592, 300.0),
    "joint_bicep": (979.975871856535, 767.2803161582076, 100.0),
    "joint_elbow": (930.0, 680.0, 100.0),
    "joint_forearm": (1212.154500274304, 674.9946964336588, 100.0),
    "joint_wrist": (432.96500923932535, 274.613381336198, 100.0),
    "joint_gripper": (468.0013365498738, 340.532560578637, 100.0),
    "joint_head_pan": (2000.0, 900.0, 100.0),
    "joint_head_tilt": (2000.0, 900.0, 100.0),
}
FINGERS = ("joint_finger_right", "joint_finger_left")
FINGER_GAINS = (200.0, 8.0, 60.0)
FINGER_RANGE = 1.31  # rad; gripper action +-1 = +-this much
FINGER_TARGET_LIMITS = (-0.0101, 1.31)  # rad: joint limits -+0.01
FINGER_SMALL_ACTION = 1e-3  # rad: below it the previous target is kept
# Upstream's closed fingers rest against each other, (right + left) / 2 = 1.0735 rad in every recording. PhysX 5 turns
# that contact into a push on the wrist, so finger-finger collisions are filtered and the drive stops here instead.
FINGER_CLOSED = 1.0735  # rad

# PhysX 5 needs more iterations than PhysX 4 to balance a grasp, a loop of contacts through one articulation: with 25
# the closed gripper pushes its own wrist aside by centimetres; 100 bring it to the recordings (LOG.md, 2026-11-21).
SOLVER_ITERATIONS, GRASP_SOLVER_ITERATIONS = 25, 100

_SKIN = dict(restitution=0.0)
MATERIALS = {
    "finger": dict(static_friction=2.0, dynamic_friction=2.0, **_SKIN),
    "nail": dict(static_friction=0.1, dynamic_friction=0.1, **_SKIN),
    "base": dict(static_friction=0.1, dynamic_friction=0.0, **_SKIN),
    "wheel": dict(static_friction=1.0, dynamic_friction=0.0, **_SKIN),
}
PATCH = dict(patch_radius=0.1, min_patch_radius=0.1)
LINKS = {
    **{f"link_finger_{s}": dict(material="finger", **PATCH) for s in ("left", "right")},
    **{f"link_finger_tip_{s}": dict(material="finger", **PATCH) for s in ("left", "right")},
    **{
        f"link_finger_nail_{s}": dict(material="nail", patch_radius=0.01, min_patch_radius=0.01)
        for s in ("left", "right")
    },
    "link_base": dict(material="base", **PATCH),
    **{f"link_wheel_{s}": dict(material="wheel", **PATCH) for s in ("left", "right")},
}
FINGER_LINKS = [f"link_finger{part}_{side}" for part in ("", "_tip", "_nail") for side in ("left", "right")]
FINGER_GROUP = 1 << 27  # bodies sharing this bit of collision group 2 ignore each other


def jerk_limited(start, velocity, target, max_velocity: float, max_acceleration: float, jerk: float, steps: int):
    """Waypoints of the time-optimal plan from (`start`, `velocity`) to rest at `target` (spec 1.1, step 3).

    Args: start, velocity, target (J,) rad, rad/s; limits are the same for all joints; steps physics steps.
    Returns: positions (steps + 1, J), velocities (steps + 1, J) at k / 513 s, held at the end of the plan.
    """
    n = len(start)
    plan, trajectory = InputParameter(n), Trajectory(n)
    plan.current_position, plan.current_velocity, plan.current_acceleration = list(start), list(velocity), [0.0] * n
    plan.target_position, plan.target_velocity, plan.target_acceleration = list(target), [0.0] * n, [0.0] * n
    plan.max_velocity, plan.max_acceleration, plan.max_jerk = [max_velocity] * n, [max_acceleration] * n, [jerk] * n
    Ruckig(n).calculate(plan, trajectory)  # upstream does not check the result code either
    times = np.minimum(np.arange(steps + 1) / SIM_FREQ, trajectory.duration)
    points = [trajectory.at_time(t) for t in times]
    return np.array([p[0] for p in points]), np.array([p[1] for p in points])


class GoogleRobotController(RobotController):
    """Upstream's `arm_pd_ee_delta_pose_align_..._gripper_pd_joint_target_delta_pos_interpolate_by_planner`.

    Action (7,): [dx, dy, dz (m), rotation vector (rad), gripper in [-1, 1]: +1 closes, -1 opens], base frame, relative
    to the sensed TCP pose. Only the gripper is clipped.
    """

    config: "GoogleRobotControllerConfig"
    arm_gains, fingers, finger_gains, tcp_name = ARM_GAINS, FINGERS, FINGER_GAINS, "link_gripper_tcp"
    sets_target_qvel = True

    def set_drive_property(self):
        super().set_drive_property()
        self.finger_bodies = [link for link in self.robot.links if link.name.endswith(tuple(FINGER_LINKS))]

    def reset(self):
        qpos = self.robot.qpos
        self.moved = False  # whether an action was given since
        self.arm_end = None  # (position, velocity) of the last waypoint; None: start from the sensed state
        self.finger_end = qpos[self.finger_indices].astype(np.float64)  # last drive target
        self.finger_target = self.finger_end.copy()
        self.substep = self.sim_steps

    def finger_angle(self) -> float:
        """The last commanded finger angle, rad: what relative gripper actions refer to."""
        return float(self.finger_end.mean())

    def target(self, action: np.ndarray) -> sapien.Pose:
        """Where an action (7,) sends the tool centre point, base frame."""
        pose = self.tcp_pose()
        rotation = Rotation.from_rotvec(action[3:6]) * Rotation.from_quat(pose.q, scalar_first=True)
        return sapien.Pose(pose.p + action[:3], rotation.as_quat(scalar_first=True))

    def set_action(self, action: Array):
        action = np.asarray(action, dtype=np.float64).reshape(7)
        qpos, qvel = self.robot.qpos.astype(np.float64), self.robot.qvel.astype(np.float64)

        solution, self.ik_success = self.inverse_kinematics(self.target(action), qpos)
        arm_target = (solution if self.ik_success else qpos)[self.arm]
        start = self.arm_end or (qpos[self.arm], np.clip(qvel[self.arm], -1.5, 1.5))
        path, speed = jerk_limited(*start, arm_target, 1.5, 2.0, 50.0, self.sim_steps)
        self.arm_end = (path[-1], speed[-1])
        self.arm_path = np.clip(path, *self.arm_limits)

        delta, sensed = FINGER_RANGE * np.clip(action[6], -1, 1), self.finger_indices
        if abs(delta) >= FINGER_SMALL_ACTION:
            self.finger_target = np.clip(self.finger_end + delta, *FINGER_TARGET_LIMITS)
        self.finger_path, self.finger_speed = jerk_limited(
            qpos[sensed], np.clip(qvel[sensed], -1, 1), self.finger_target, 1.0, 7.0, 50.0, self.sim_steps
        )
        self.finger_end = self.finger_path[-1]
        self.finger_speed = np.where(self.finger_path < FINGER_CLOSED, self.finger_speed, 0.0)
        self.finger_path = np.minimum(self.finger_path, FINGER_CLOSED)
        self.substep = 0
        self.robot.set_solver_position_iterations(
            GRASP_SOLVER_ITERATIONS if self.moved and self._touches_object() else SOLVER_ITERATIONS
        )
        self.moved = True

    def _touches_object(self) -> bool:
        """Whether a finger touched something loose in the last physics step."""
        return any(
            any(body in self.finger_bodies for body in contact.bodies)
            and any(isinstance(body, sapien.physx.PhysxRigidDynamicComponent) for body in contact.bodies)
            for contact in self.articulation.px.get_contacts()
        )

    def before_simulation_step(self):
        self.substep = k = min(self.substep + 1, self.sim_steps)
        for joint, position in zip(self.arm_joints, self.arm_path[k]):
            joint.set_drive_target(position)
        for joint, position, speed in zip(self.finger_joints, self.finger_path[k], self.finger_speed[k]):
            joint.set_drive_target(position)
            joint.set_drive_velocity_target(speed)
        self.compensate_passive_forces()


@dataclass
class GoogleRobotControllerConfig(ControllerConfig):
    controller_cls = GoogleRobotController


@register_agent()
class GoogleRobot(SimplerRobot):
    """`google_robot_static`: 11 active joints, a camera in its head that looks down on its hand."""

    uid = "simpler_google_robot"
    urdf = URDF
    sim_freq, control_freq = SIM_FREQ, CONTROL_FREQ
    base_height = BASE_HEIGHT
    urdf_config: ClassVar = dict(_materials=MATERIALS, link=LINKS)
    kept_frames = ("link_gripper_tcp", "link_camera")
    finger_pads: ClassVar = {
        side: ((f"link_finger_tip_{side}", f"link_finger_{side}"), 1) for side in ("left", "right")
    }
    grasp_angle = 80.0
    view, picture_size = "overhead", (640, 512)

    def _load_articulation(self, initial_pose=None):
        super()._load_articulation(initial_pose)
        for name in FINGER_LINKS:
            for shape in self.links[name].collision_shapes:
                groups = list(shape.collision_groups)
                groups[2] |= FINGER_GROUP
                shape.set_collision_groups(groups)

    @property
    def _controller_configs(self):
        return {"ee_delta_pose_align": GoogleRobotControllerConfig(joint_names=[*ARM_GAINS, *FINGERS])}

    def init_qpos(self) -> np.ndarray:  # (11,)
        return np.array([INIT_QPOS[name] for name in by_plain_name(self.body.active_joints)], dtype=np.float32)

    def closedness(self) -> float:
        """0 = open, 1 = closed as far as the joints go (spec 1.1)."""
        return max(float(np.mean(self.body.qpos[self.controller.finger_indices])) / 1.3, 0.0)

    def to_upstream(self, action: np.ndarray) -> np.ndarray:
        """Canonical action (7,) -> upstream's: the absolute opening becomes a step from the last command."""
        wanted = FINGER_RANGE * (1 - np.clip(action[6], 0, 1))  # rad
        return np.append(action[:6], (wanted - self.controller.finger_angle()) / FINGER_RANGE)

    def camera(self, width: int, height: int, shader: str):
        """`overhead_camera`: fx = fy = 425 at 640 x 512 (spec 1.1)."""
        pose = sapien.Pose(p=[0, 0, 0], q=[0.5, 0.5, -0.5, 0.5])
        return self.camera_config(width, height, shader, pose, 425.0, (320.0, 256.0), 0.1, "link_camera")


def from_upstream(action: np.ndarray, finger_angle: float) -> np.ndarray:
    """Upstream's action -> canonical, given the finger angle (rad) last commanded before this action."""
    action = np.array(action, dtype=np.float32)
    action[6] = 1 - np.clip(finger_angle / FINGER_RANGE + np.clip(action[6], -1, 1), 0, 1)
    return action
