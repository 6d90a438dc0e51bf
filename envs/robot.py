"""What SIMPLER's two robots share on ManiSkill 3: loading, the sensed tool pose, inverse kinematics, the grasp check.

Joints and links are addressed by the name in their URDF: SAPIEN 3 orders them breadth first, SAPIEN 2 depth first.
"""

import re
from typing import ClassVar

import numpy as np
import sapien
from gymnasium import spaces
from mani_skill.agents.base_agent import BaseAgent
from mani_skill.agents.controllers.base_controller import BaseController
from mani_skill.sensors.camera import CameraConfig
from mani_skill.utils import sapien_utils
from scipy.spatial.transform import Rotation

from envs.assets import asset
from selfflow_robot.interfaces import ACTION_NAMES


def by_plain_name(items) -> dict:
    """Links or joints by the name in their URDF; ManiSkill prefixes them with scene and articulation."""
    return {re.sub(r"^scene-\d+-(simpler_google_robot|simpler_widowx|cabinet)_", "", i.name): i for i in items}


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


class RobotController(BaseController):
    """Upstream's action -> drive targets. A subclass has `arm_gains`, `fingers`, `finger_gains`, `tcp_name`."""

    arm_gains: ClassVar[dict[str, tuple[float, float, float]]]  # stiffness, damping, force limit
    fingers: ClassVar[tuple[str, str]]
    finger_gains: ClassVar[tuple[float, float, float]]
    tcp_name: ClassVar[str]
    sets_target_qpos = True

    def _initialize_action_space(self):
        self.single_action_space = spaces.Box(-np.inf, np.inf, (7,), np.float32)

    def set_drive_property(self):
        self.robot = self.articulation._objs[0]
        joints, links = by_plain_name(self.robot.active_joints), by_plain_name(self.robot.links)
        self.names = list(joints)
        self.arm = [self.names.index(n) for n in self.arm_gains]
        self.finger_indices = [self.names.index(n) for n in self.fingers]
        for name, gains in {**self.arm_gains, **dict.fromkeys(self.fingers, self.finger_gains)}.items():
            stiffness, damping, force = gains
            joints[name].set_drive_properties(stiffness, damping, force_limit=force, mode="force")
            joints[name].set_friction(0.0)
        self.arm_joints, self.finger_joints = [joints[n] for n in self.arm_gains], [joints[n] for n in self.fingers]
        self.tcp, self.tcp_index = links[self.tcp_name], list(links).index(self.tcp_name)
        self.kinematics = self.robot.create_pinocchio_model()
        # SAPIEN 2 clamps drive targets to the joint's limits; without that a joint hits them instead of easing in.
        limits = np.array([joints[name].limit[0] for name in self.names])  # (J, 2) rad
        self.arm_limits, self.finger_limits = limits[self.arm].T, limits[self.finger_indices].T  # low, high each
        self.mask = np.zeros(len(self.names), dtype=np.int32)
        self.mask[self.arm] = 1
        self.moved = False

    @property
    def sim_steps(self) -> int:
        """Physics steps per control step."""
        return self._sim_steps

    def tcp_pose(self) -> sapien.Pose:
        """Sensed pose of the tool centre point in the robot's base frame."""
        return self.robot.root_pose.inv() * self.tcp.entity_pose

    def inverse_kinematics(self, target: sapien.Pose, qpos: np.ndarray) -> tuple[np.ndarray, bool]:
        """Joint positions (J,) that reach `target` (base frame) from `qpos`, and whether they were found (spec 1.1)."""
        solution, success, _ = self.kinematics.compute_inverse_kinematics(
            self.tcp_index, target, initial_qpos=qpos, active_qmask=self.mask, eps=1e-4, max_iterations=100, dt=0.1
        )
        return np.asarray(solution), bool(success)

    def forward_kinematics(self, qpos: np.ndarray) -> sapien.Pose:
        """Tool centre point (base frame) at joint positions (J,)."""
        self.kinematics.compute_forward_kinematics(np.asarray(qpos, dtype=np.float64))
        return self.kinematics.get_link_pose(self.tcp_index)

    def compensate_passive_forces(self):
        """Gravity and Coriolis forces are cancelled in every physics step (spec 0)."""
        self.robot.set_qf(self.robot.compute_passive_force(gravity=True, coriolis_and_centrifugal=True))

    def get_state(self) -> dict:
        return {}


class SimplerRobot(BaseAgent):
    """An articulation on a fixed base with one controller; subclasses give files, camera and grasp check."""

    urdf: ClassVar[str]
    sim_freq: ClassVar[int]
    control_freq: ClassVar[int]
    kept_frames: ClassVar[tuple[str, ...]]  # bodiless links that something is attached to
    finger_pads: ClassVar[dict[str, tuple]]  # side -> (links that grasp, sign of their y axis towards the object)
    grasp_angle: ClassVar[float]  # degrees
    load_multiple_collisions = True
    urdf_version = ""
    view: ClassVar[str]  # name of the policy's camera
    picture_size: ClassVar[tuple[int, int]]  # upstream's, width and height

    def _load_articulation(self, initial_pose=None):
        suffix = f"_{self.urdf_version}" if self.urdf_version else ""
        self.urdf_path = str(asset(self.urdf.format(suffix)))
        loader = self.scene.create_urdf_loader()
        loader.name, loader.fix_root_link, loader.load_multiple_collisions_from_file = self.uid, True, True
        sapien_utils.apply_urdf_config(loader, sapien_utils.parse_urdf_config(self.urdf_config))
        sapien.set_log_level("error")  # it warns of STL files with several convex pieces; their number is right
        builder = loader.parse(self.urdf_path)["articulation_builders"][0]
        prune_frames(builder, self.kept_frames)
        builder.initial_pose = initial_pose
        self.robot = builder.build(build_mimic_joints=False)  # SAPIEN 2 ignores the mimic tag (spec 7.4)
        sapien.set_log_level("warning")
        self.body = self.robot._objs[0]  # the SAPIEN articulation
        self.links = by_plain_name(self.body.links)

    def _after_init(self):
        for link in self.body.links:  # the controller compensates gravity exactly
            link.disable_gravity = False

    def is_grasping(self, contacts, entity: sapien.Entity, min_impulse=1e-6) -> bool:
        """Whether both fingers press on `entity` (spec 1.1, 1.2): impulses (N s) of the last physics step."""
        return all(self._finger_presses(contacts, entity, *pads, min_impulse) for pads in self.finger_pads.values())

    def _finger_presses(self, contacts, entity, names, sign: float, min_impulse: float) -> bool:
        sizes, angles = [], []
        for name in names:
            link = self.links[name]
            impulse = contact_impulse(contacts, link.entity, entity)  # on the finger
            opening = sign * link.entity_pose.to_transformation_matrix()[:3, 1]
            size = np.linalg.norm(impulse)
            sizes.append(size)
            cosine = np.clip(impulse @ opening / size, -1, 1) if size >= 1e-6 else 0.0
            angles.append(np.degrees(np.arccos(cosine)))
        return max(sizes) >= min_impulse and min(angles) <= self.grasp_angle

    def init_qpos(self) -> np.ndarray:
        raise NotImplementedError

    def proprio(self) -> np.ndarray:
        """float32 (10,): sensed TCP position (m) and two rotation columns in the base frame, opening (1 = open)."""
        pose = self.controller.tcp_pose()
        rotation = Rotation.from_quat(pose.q, scalar_first=True).as_matrix()
        opening = np.clip(1 - self.closedness(), 0, 1)
        return np.concatenate([pose.p, rotation[:, 0], rotation[:, 1], [opening]]).astype(np.float32)

    def camera_config(self, width, height, shader, pose, focal, center, near, mount) -> CameraConfig:
        """A camera whose intrinsics (pixels at `picture_size`) scale with the picture."""
        sx, sy = width / self.picture_size[0], height / self.picture_size[1]
        intrinsic = np.array([[focal * sx, 0, center[0] * sx], [0, focal * sy, center[1] * sy], [0, 0, 1]])
        config = CameraConfig(
            uid=self.view, pose=pose, width=width, height=height, intrinsic=intrinsic, near=near, far=10.0,
            entity_uid=mount, shader_pack=shader,
        )  # fmt: skip
        config.mount, config.entity_uid = self.robot.links_map[mount], None
        return config


def prune_frames(builder, kept: tuple[str, ...]) -> None:
    """Drop links that are mere frames, without shape, looks or children: each costs time in every physics step.

    They weigh 1e-6 kg; nothing else about the articulation changes.
    """
    while True:
        parents = {link.parent for link in builder.link_builders}
        bare = [
            link
            for link in builder.link_builders
            if link not in parents
            and link.joint_record.joint_type == "fixed"
            and not (link.collision_records or link.visual_records or link.name in kept)
        ]
        if not bare:
            break
        builder.link_builders = [link for link in builder.link_builders if link not in bare]
    for index, link in enumerate(builder.link_builders):
        link.index = index


ACTION_LIMITS = np.array([1.0] * 3 + [np.pi / 2] * 3 + [np.inf])  # upstream's box; the gripper alone is clipped


def checked_action(action, dim: int = 7) -> np.ndarray:
    """The action as float64 (7,). ValueError naming its shape, or the dimension that is not finite or too large."""
    try:
        action = np.asarray(action, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"action must be {dim} finite numbers, got {action!r}") from error
    if action.shape != (dim,):
        raise ValueError(f"action must be {dim} finite numbers, got shape {action.shape}")
    if not np.isfinite(action).all():
        wrong = int(np.flatnonzero(~np.isfinite(action))[0])
        raise ValueError(f"action must be {dim} finite numbers, but its {ACTION_NAMES[wrong]} (dimension {wrong}) is "
                         f"{action[wrong]}")  # fmt: skip
    if (beyond := np.flatnonzero(np.abs(action) > ACTION_LIMITS)).size:
        wrong, limit = int(beyond[0]), ACTION_LIMITS[beyond[0]]
        raise ValueError(f"action {ACTION_NAMES[wrong]} (dimension {wrong}) is {action[wrong]:.3g}, beyond "
                         f"+-{limit:.3g} per control step")  # fmt: skip
    return action
