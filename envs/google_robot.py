"""The Google robot of SIMPLER on ManiSkill 3: the articulation and upstream's controller (spec section 1.1).

One control step (1/3 s) is 171 physics steps. The arm follows a jerk-limited plan towards `sensed TCP pose + action`,
continued from where the *previous plan* ended; the fingers follow a plan from where they are *sensed* to be. The
controller is a function of sensed joint positions, the action and the end of the last plan, nothing else, so a
recorded rollout can be re-entered at any step (`experiments/replay_reference.py`).
"""

import re
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import sapien
from gymnasium import spaces
from mani_skill.agents.base_agent import BaseAgent
from mani_skill.agents.controllers.base_controller import BaseController, ControllerConfig
from mani_skill.agents.registration import register_agent
from mani_skill.sensors.camera import CameraConfig
from mani_skill.utils.structs.types import Array
from ruckig import InputParameter, Ruckig, Trajectory
from scipy.spatial.transform import Rotation

from envs.assets import asset

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


def by_plain_name(items) -> dict:
    """Links or joints by the name in their URDF; ManiSkill prefixes them with scene and articulation."""
    return {re.sub(r"^scene-\d+-(simpler_google_robot|cabinet)_", "", item.name): item for item in items}


class GoogleRobotController(BaseController):
    """Upstream's `arm_pd_ee_delta_pose_align_..._gripper_pd_joint_target_delta_pos_interpolate_by_planner`.

    Action (7,): [dx, dy, dz (m), rotation vector (rad), gripper in [-1, 1]: +1 closes, -1 opens], base frame, relative
    to the sensed TCP pose. Only the gripper is clipped.
    """

    config: "GoogleRobotControllerConfig"
    sets_target_qpos = True
    sets_target_qvel = True

    def _initialize_action_space(self):
        self.single_action_space = spaces.Box(-np.inf, np.inf, (7,), np.float32)

    def set_drive_property(self):
        self.robot = self.articulation._objs[0]
        joints = by_plain_name(self.robot.active_joints)
        self.names = list(joints)
        self.arm = [self.names.index(n) for n in ARM_GAINS]
        self.fingers = [self.names.index(n) for n in FINGERS]
        for name, gains in {**ARM_GAINS, **dict.fromkeys(FINGERS, FINGER_GAINS)}.items():
            stiffness, damping, force = gains
            joints[name].set_drive_properties(stiffness, damping, force_limit=force, mode="force")
            joints[name].set_friction(0.0)
        self.arm_joints, self.finger_joints = [joints[n] for n in ARM_GAINS], [joints[n] for n in FINGERS]
        links = by_plain_name(self.robot.links)
        self.tcp, self.tcp_index = links["link_gripper_tcp"], list(links).index("link_gripper_tcp")
        self.kinematics = self.robot.create_pinocchio_model()
        self.finger_bodies = [links[name] for name in FINGER_LINKS]
        self.mask = np.zeros(len(self.names), dtype=np.int32)
        self.mask[self.arm] = 1

    def reset(self):
        qpos = self.robot.qpos
        self.arm_end = None  # (position, velocity) of the last waypoint; None: start from the sensed state
        self.finger_end = qpos[self.fingers].astype(np.float64)  # last drive target
        self.finger_target = self.finger_end.copy()
        self.substep = self._sim_steps

    @property
    def moved(self) -> bool:
        """Whether an action was given since the last reset."""
        return self.arm_end is not None

    def tcp_pose(self) -> sapien.Pose:
        """Sensed TCP pose in the robot's base frame."""
        return self.robot.root_pose.inv() * self.tcp.entity_pose

    def finger_angle(self) -> float:
        """The last commanded finger angle, rad: what relative gripper actions refer to."""
        return float(self.finger_end.mean())

    def set_action(self, action: Array):
        action = np.asarray(action, dtype=np.float64).reshape(7)
        qpos, qvel = self.robot.qpos.astype(np.float64), self.robot.qvel.astype(np.float64)

        pose = self.tcp_pose()
        rotation = Rotation.from_rotvec(action[3:6]) * Rotation.from_quat(pose.q, scalar_first=True)
        target = sapien.Pose(pose.p + action[:3], rotation.as_quat(scalar_first=True))
        solution, success, _ = self.kinematics.compute_inverse_kinematics(
            self.tcp_index, target, initial_qpos=qpos, active_qmask=self.mask, eps=1e-4, max_iterations=100, dt=0.1
        )
        self.ik_success = bool(success)
        arm_target = np.asarray(solution if success else qpos)[self.arm]
        moved, start = self.moved, self.arm_end or (qpos[self.arm], np.clip(qvel[self.arm], -1.5, 1.5))
        self.arm_path, speed = jerk_limited(*start, arm_target, 1.5, 2.0, 50.0, self._sim_steps)
        self.arm_end = (self.arm_path[-1], speed[-1])

        delta = FINGER_RANGE * np.clip(action[6], -1, 1)
        if abs(delta) >= FINGER_SMALL_ACTION:
            self.finger_target = np.clip(self.finger_end + delta, *FINGER_TARGET_LIMITS)
        self.finger_path, self.finger_speed = jerk_limited(
            qpos[self.fingers], np.clip(qvel[self.fingers], -1, 1), self.finger_target, 1.0, 7.0, 50.0, self._sim_steps
        )
        self.finger_end = self.finger_path[-1]
        self.finger_speed = np.where(self.finger_path < FINGER_CLOSED, self.finger_speed, 0.0)
        self.finger_path = np.minimum(self.finger_path, FINGER_CLOSED)
        self.substep = 0
        self.robot.set_solver_position_iterations(
            GRASP_SOLVER_ITERATIONS if moved and self._touches_object() else SOLVER_ITERATIONS
        )

    def _touches_object(self) -> bool:
        """Whether a finger touched something loose in the last physics step."""
        return any(
            any(body in self.finger_bodies for body in contact.bodies)
            and any(isinstance(body, sapien.physx.PhysxRigidDynamicComponent) for body in contact.bodies)
            for contact in self.articulation.px.get_contacts()
        )

    def before_simulation_step(self):
        self.substep = k = min(self.substep + 1, self._sim_steps)
        for joint, position in zip(self.arm_joints, self.arm_path[k]):
            joint.set_drive_target(position)
        for joint, position, speed in zip(self.finger_joints, self.finger_path[k], self.finger_speed[k]):
            joint.set_drive_target(position)
            joint.set_drive_velocity_target(speed)
        self.robot.set_qf(self.robot.compute_passive_force(gravity=True, coriolis_and_centrifugal=True))

    def get_state(self) -> dict:
        return {}


@dataclass
class GoogleRobotControllerConfig(ControllerConfig):
    controller_cls = GoogleRobotController


@register_agent()
class GoogleRobot(BaseAgent):
    """`google_robot_static`: fixed base, 11 active joints addressed by name (SAPIEN 3 orders them breadth first)."""

    uid = "simpler_google_robot"
    urdf_config: ClassVar = dict(_materials=MATERIALS, link=LINKS)
    load_multiple_collisions = True
    urdf_version = ""

    def _load_articulation(self, initial_pose=None):
        suffix = f"_{self.urdf_version}" if self.urdf_version else ""
        self.urdf_path = str(asset(URDF.format(suffix)))
        super()._load_articulation(initial_pose)
        self.body = self.robot._objs[0]  # the SAPIEN articulation
        self.links = by_plain_name(self.body.links)
        for name in FINGER_LINKS:
            for shape in self.links[name].collision_shapes:
                groups = list(shape.collision_groups)
                groups[2] |= FINGER_GROUP
                shape.set_collision_groups(groups)

    @property
    def _controller_configs(self):
        return {"ee_delta_pose_align": GoogleRobotControllerConfig(joint_names=[*ARM_GAINS, *FINGERS])}

    def _after_init(self):
        # Passive forces are compensated exactly, Coriolis included, by the controller (spec 0).
        for link in self.body.links:
            link.disable_gravity = False

    def init_qpos(self) -> np.ndarray:  # (11,)
        return np.array([INIT_QPOS[name] for name in by_plain_name(self.body.active_joints)], dtype=np.float32)

    def is_grasping(self, contacts, entity: sapien.Entity, min_impulse=1e-6, max_angle=80.0) -> bool:
        """Whether both fingers press on `entity` (spec 1.1, grasp check): impulses (N s) of the last physics step."""
        return all(self._finger_presses(contacts, entity, side, min_impulse, max_angle) for side in ("left", "right"))

    def _finger_presses(self, contacts, entity, side: str, min_impulse: float, max_angle: float) -> bool:
        sizes, angles = [], []
        for name in (f"link_finger_tip_{side}", f"link_finger_{side}"):
            link = self.links[name]
            impulse = contact_impulse(contacts, link.entity, entity)  # on the finger
            opening = link.entity_pose.to_transformation_matrix()[:3, 1]
            size = np.linalg.norm(impulse)
            sizes.append(size)
            cosine = np.clip(impulse @ opening / size, -1, 1) if size >= 1e-6 else 0.0
            angles.append(np.degrees(np.arccos(cosine)))
        return max(sizes) >= min_impulse and min(angles) <= max_angle

    def closedness(self) -> float:
        """0 = open, 1 = closed as far as the joints go (spec 1.1)."""
        fingers = [self.body.qpos[self.controller.names.index(n)] for n in FINGERS]
        return max(float(np.mean(fingers)) / 1.3, 0.0)

    def camera(self, width: int, height: int, shader: str) -> CameraConfig:
        """`overhead_camera`: fx = fy = 425 at 640 x 512, intrinsics scaled with the picture (spec 1.1)."""
        sx, sy = width / 640, height / 512
        return CameraConfig(
            uid="overhead",
            pose=sapien.Pose(p=[0, 0, 0], q=[0.5, 0.5, -0.5, 0.5]),
            width=width,
            height=height,
            intrinsic=np.array([[425.0 * sx, 0, 320.0 * sx], [0, 425.0 * sy, 256.0 * sy], [0, 0, 1]]),
            near=0.1,
            far=10.0,
            entity_uid="link_camera",
            shader_pack=shader,
        )


def contact_impulse(contacts, body: sapien.Entity, other: sapien.Entity) -> np.ndarray:
    """Impulse (3,) N s acting on `body` from `other` in the last physics step."""
    total = np.zeros(3)
    for contact in contacts:
        pair = [b.entity for b in contact.bodies]
        if body in pair and other in pair:
            sign = 1.0 if pair[0] == body else -1.0
            for point in contact.points:
                total += sign * np.asarray(point.impulse)
    return total
