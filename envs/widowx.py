"""The WidowX 250s of SIMPLER on ManiSkill 3: the articulation and upstream's controller (spec section 1.2).

One control step (1/5 s) is 100 physics steps, the drive targets constant. Actions move a *target* pose that runs ahead
of the hand: the translation adds up over steps, the rotation turns the target about where the hand is sensed to be.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import sapien
from mani_skill.agents.controllers.base_controller import ControllerConfig
from mani_skill.agents.registration import register_agent
from scipy.spatial.transform import Rotation

from envs.robot import RobotController, SimplerRobot, by_plain_name

URDF = "mani_skill2_real2sim/assets/descriptions/widowx_description/wx250s.urdf"
SIM_FREQ, CONTROL_FREQ = 500, 5
# name: (stiffness N m/rad, damping N m s/rad, force limit N m)
ARM_GAINS = {
    "waist": (1169.7891719504198, 330.0, 200.0),
    "shoulder": (730.0, 180.0, 200.0),
    "elbow": (808.4601346394447, 152.12036565582588, 100.0),
    "forearm_roll": (1229.1299089624076, 309.6215302722146, 100.0),
    "wrist_angle": (1272.2760456418862, 201.04998711007383, 100.0),
    "wrist_rotate": (1056.3326605132252, 269.51458932695414, 100.0),
}
FINGERS = ("left_finger", "right_finger")
FINGER_GAINS = (1000.0, 200.0, 60.0)
FINGER_SHUT, FINGER_OPEN = 0.014, 0.038  # m, drive targets of gripper action -1 and +1
FINGER_LIMITS = (0.015, 0.037)  # m
MATERIALS = {"finger": dict(static_friction=2.0, dynamic_friction=2.0, restitution=0.0)}
LINKS = {
    f"{side}_finger_link": dict(material="finger", patch_radius=0.01, min_patch_radius=0.01)
    for side in ("left", "right")
}
# Collision groups: bodies that share a bit of the third ignore each other. The bar would jam the fingers otherwise.
IGNORES = {"gripper_bar_link": 0b11, "left_finger_link": 0b01, "right_finger_link": 0b10}


@dataclass(frozen=True)
class Place:
    """A robot's place, start and camera in one family of tasks."""

    init_qpos: tuple[float, ...]  # rad, m: arm, fingers
    base_height: float  # m
    camera_p: tuple[float, float, float]  # m, in the base frame
    camera_q: tuple[float, float, float, float]
    camera_near: float  # m


PLACES = {
    "table": Place(
        (-0.01840777, 0.0398835, 0.22242722, -0.00460194, 1.36524296, 0.00153398, 0.037, 0.037),
        0.870,
        (0.0, -0.16, 0.36),
        (0.89929167, -0.09263245, 0.35892477, 0.23209206),
        0.1,
    ),
    "sink": Place(
        (-0.2600599, -0.12875618, 0.04461369, -0.00652761, 1.7033415, -0.26983038, 0.037, 0.037),
        0.850,
        (-0.00300001, -0.21, 0.39),
        (-0.907313, 0.0782, -0.36434, -0.194741),
        0.01,
    ),
}


class WidowXController(RobotController):
    """Upstream's `arm_pd_ee_target_delta_pose_align2_gripper_pd_joint_pos`.

    Action (7,): [dx, dy, dz (m), rotation vector (rad), gripper in [-1, 1]: +1 open, -1 closed (absolute)], base frame,
    relative to the last target. Only the gripper is clipped.
    """

    config: "WidowXControllerConfig"
    arm_gains, fingers, finger_gains, tcp_name = ARM_GAINS, FINGERS, FINGER_GAINS, "ee_gripper_link"

    def reset(self):
        self.moved = False  # whether an action was given since
        self.last_target = self.tcp_pose()
        self.arm_target = self.robot.qpos[self.arm]
        self.finger_target = float(self.robot.qpos[self.finger_indices].mean())

    def target(self, action: np.ndarray) -> sapien.Pose:
        """Where an action (7,) sends the target of the tool centre point, base frame."""
        here, last = self.tcp_pose().p, self.last_target
        turn = Rotation.from_rotvec(action[3:6])
        rotation = turn * Rotation.from_quat(last.q, scalar_first=True)
        return sapien.Pose(here + turn.apply(last.p - here) + action[:3], rotation.as_quat(scalar_first=True))

    def set_action(self, action):
        action = np.asarray(action, dtype=np.float64).reshape(7)
        qpos = self.robot.qpos.astype(np.float64)
        self.last_target = self.target(action)
        solution, self.ik_success = self.inverse_kinematics(self.last_target, qpos)
        self.arm_target = np.clip((solution if self.ik_success else qpos)[self.arm], *self.arm_limits)
        self.finger_target = float(np.interp(np.clip(action[6], -1, 1), (-1, 1), (FINGER_SHUT, FINGER_OPEN)))
        for joint, position in zip(self.arm_joints, self.arm_target):
            joint.set_drive_target(position)
        for joint, low, high in zip(self.finger_joints, *self.finger_limits):
            joint.set_drive_target(float(np.clip(self.finger_target, low, high)))
        self.moved = True

    def before_simulation_step(self):
        self.compensate_passive_forces()


@dataclass
class WidowXControllerConfig(ControllerConfig):
    controller_cls = WidowXController


@register_agent()
class WidowX(SimplerRobot):
    """`widowx`: 6 arm joints, two fingers driven apart from each other, a camera that looks over its shoulder."""

    uid = "simpler_widowx"
    urdf = URDF
    sim_freq, control_freq = SIM_FREQ, CONTROL_FREQ
    urdf_config: ClassVar = dict(_materials=MATERIALS, link=LINKS)
    kept_frames = ("ee_gripper_link", "base_link")
    finger_pads: ClassVar = {"left": (("left_finger_link",), 1), "right": (("right_finger_link",), -1)}
    grasp_angle = 60.0
    view, picture_size = "overhead", (640, 480)  # one name for the policy's camera on both robots
    place = PLACES["table"]

    @property
    def base_height(self) -> float:
        return self.place.base_height

    def _load_articulation(self, initial_pose=None):
        super()._load_articulation(initial_pose)
        for name, ignored in IGNORES.items():
            for shape in self.links[name].collision_shapes:
                shape.set_collision_groups([1, 1, ignored, 0])

    @property
    def _controller_configs(self):
        return {"ee_target_delta_pose_align2": WidowXControllerConfig(joint_names=[*ARM_GAINS, *FINGERS])}

    def init_qpos(self) -> np.ndarray:  # (8,)
        start = dict(zip([*ARM_GAINS, *FINGERS], self.place.init_qpos))
        return np.array([start[name] for name in by_plain_name(self.body.active_joints)], dtype=np.float32)

    def closedness(self) -> float:
        """0 = open, 1 = closed as far as the joints go (spec 1.2)."""
        shut, wide = FINGER_LIMITS
        return max(float(np.mean(wide - self.body.qpos[self.controller.finger_indices])) / (wide - shut), 0.0)

    def to_upstream(self, action: np.ndarray) -> np.ndarray:
        """Canonical action (7,) -> upstream's: both openings are absolute."""
        return np.append(action[:6], 2 * np.clip(action[6], 0, 1) - 1)

    def camera(self, width: int, height: int, shader: str):
        """`3rd_view_camera`: fx = fy = 623.588 at 640 x 480 (spec 1.2)."""
        pose = sapien.Pose(self.place.camera_p, self.place.camera_q)
        center, near = (319.501, 239.545), self.place.camera_near
        return self.camera_config(width, height, shader, pose, 623.588, center, near, "base_link")
