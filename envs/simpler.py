"""SIMPLER's drawer and Open-and-Place scenes on ManiSkill 3 (spec sections 0, 2, 3.4, 3.5).

`SimplerEnv` speaks upstream's action; `CanonicalEnv` around it speaks the project's (`selfflow_robot/interfaces.py`)
and is what `gymnasium.make("simpler/open_and_place-v0")` and `make_env` return.
"""

from functools import lru_cache

import gymnasium as gym
import numpy as np
import sapien
import torch
from mani_skill.envs.sapien_env import BaseEnv
from mani_skill.utils.structs.types import DefaultMaterialsConfig, SceneConfig, SimConfig
from PIL import Image
from scipy.spatial.transform import Rotation

from envs.assets import asset
from envs.google_robot import (
    BASE_HEIGHT,
    CONTROL_FREQ,
    FINGER_RANGE,
    SIM_FREQ,
    SOLVER_ITERATIONS,
    GoogleRobot,
    by_plain_name,
    contact_impulse,
)
from envs.tasks import OVERLAY, POSES, URDF_VERSIONS, Task, get_task, next_episode_seed
from selfflow_robot.interfaces import PROPRIO_DIM, Observation

CABINET = "data/custom/mk_station_recolor.urdf"
CABINET_POSE = sapien.Pose([-0.295, 0, 0.017])
MODELS = "data/custom/models/"
OBJECT_DAMPING = 0.1  # linear and angular
CABINET_TOP, CABINET_TOP_Z = [0.315, 0.3075, 0.01], 0.855  # m, half size and centre in the cabinet's frame
DROP_HEIGHT = 0.87 + 0.5  # m, spec 3.0
SOLVER_VELOCITY_ITERATIONS = 4
OPEN_QPOS, CLOSED_QPOS, PLACED_QPOS, CLOSE_START = 0.15, 0.05, 0.05, 0.2  # m, success thresholds and start
FORCED_ADVANCE = 100  # elapsed steps at which upstream moves on to the second subtask
INTERIOR_BOTTOM = 2  # index of the drawer's collision shape that counts as "inside"
OPTIONS = ("pose", "robot_xy", "robot_yaw", "overlay", "urdf_version", "object_xy", "reconfigure")


@lru_cache(maxsize=32)
def read_overlay(path: str, width: int, height: int) -> np.ndarray:
    """The real background (H, W, 3) float32 in [0, 1], resized bilinearly without smoothing, as OpenCV does."""
    import cv2

    picture = np.asarray(Image.open(path).convert("RGB"), dtype=np.float32) / 255
    return cv2.resize(picture, (width, height))


class SimplerEnv(BaseEnv):
    """One scene: robot, cabinet and, for Open-and-Place, an apple on top of it.

    Args: task name; width, height of the camera picture; visual-matching overlay on or off; shader "default"
    (rasteriser) or "rt" (ray tracing, needs a GPU). Action: see `GoogleRobotController`.
    `reset(seed=..., options=...)`: the seed draws the episode as upstream would; options fix parts of it:
    pose ("a0".."c2") or robot_xy (m) and robot_yaw (rad), overlay (pose id or picture path), urdf_version,
    object_xy (m).
    """

    SUPPORTED_OBS_MODES = ("rgb", "none")
    agent: GoogleRobot

    def __init__(self, task="open_and_place", width=160, height=128, overlay=True, shader="default", **kwargs):
        self.task, self.width, self.height = get_task(task), width, height
        self.overlay, self.shader = overlay, shader
        self.urdf_version, self.episode_seed, self.background = "", 2022, None
        self.subtask = 0
        super().__init__(robot_uids=GoogleRobot.uid, reward_mode="sparse", sim_backend="physx_cpu", **kwargs)

    @property
    def _default_sim_config(self):
        return SimConfig(
            sim_freq=SIM_FREQ,
            control_freq=CONTROL_FREQ,
            scene_config=SceneConfig(
                contact_offset=self.task.contact_offset,
                solver_position_iterations=SOLVER_ITERATIONS,
                solver_velocity_iterations=SOLVER_VELOCITY_ITERATIONS,
                enable_pcm=False,
                enable_tgs=False,  # PhysX 5's TGS lets grasped objects chatter out of the fingers; PGS is also faster
            ),
            default_materials_config=DefaultMaterialsConfig(1.0, 1.0, 0.0),
        )

    # -- scene ---------------------------------------------------------------------------------------------------

    def _load_agent(self, options: dict):
        GoogleRobot.urdf_version = self.urdf_version
        super()._load_agent(options, sapien.Pose([-10, 0, 0]))

    def _load_scene(self, options: dict):
        loader = self.scene.create_urdf_loader()
        loader.name, loader.fix_root_link = "cabinet", True
        builder = loader.parse(str(asset(CABINET)))["articulation_builders"][0]
        builder.initial_pose = CABINET_POSE
        self.cabinet = builder.build()._objs[0]
        self.drawers = [name.split("_")[0] for name in by_plain_name(self.cabinet.active_joints)]
        for joint in self.cabinet.active_joints:
            joint.set_friction(0.05)
            joint.set_drive_properties(stiffness=0, damping=1)
        self.drawer_link = by_plain_name(self.cabinet.links)[f"{self.task.drawer}_drawer"]

        self.object = None
        if self.task.model_id:
            builder = object_builder(self.scene.create_actor_builder(), self.task)
            builder.initial_pose = sapien.Pose([0, 0, DROP_HEIGHT])
            self.object = builder.build("object")._objs[0]
            self.object_body = self.object.find_component_by_type(sapien.physx.PhysxRigidDynamicComponent)
            self.object_body.linear_damping = self.object_body.angular_damping = OBJECT_DAMPING
            if self.scene.can_render():
                light_up_baked_textures(self.object)

    def _load_lighting(self, options: dict):
        angle = np.deg2rad(75)
        self.scene.set_ambient_light([1.0, 1.0, 1.0])
        self.scene.add_directional_light([-np.cos(angle), 0, -np.sin(angle)], [1.0, 1.0, 1.0])

    def _setup_sensors(self, options: dict):
        if self._obs_mode != "none":
            super()._setup_sensors(options)
        else:
            self._sensors, self._human_render_cameras = {}, {}
            self._sensor_configs, self._human_render_camera_configs = {}, {}
            self.scene.sensors, self.scene.human_render_cameras = {}, {}

    @property
    def _default_sensor_configs(self):
        camera = self.agent.camera(self.width, self.height, self.shader)
        camera.mount, camera.entity_uid = self.agent.robot.links_map["link_camera"], None
        return [camera]

    # -- episodes ------------------------------------------------------------------------------------------------

    def reset(self, seed=None, options=None):
        options = dict(options or {})
        unknown = set(options) - set(OPTIONS)
        if unknown:
            raise ValueError(f"unknown reset options {sorted(unknown)}; known: {', '.join(OPTIONS)}")
        if seed is None:
            seed = next_episode_seed(self.episode_seed)
        seed = int(np.atleast_1d(seed)[0])
        self.episode_seed = seed
        episode = {**self.task.draw(seed), **options}
        if episode["pose"] not in POSES:
            raise ValueError(f"unknown robot pose {episode['pose']!r}; known: {', '.join(POSES)}")
        if episode["urdf_version"] not in URDF_VERSIONS:
            raise ValueError(f"unknown urdf_version {episode['urdf_version']!r}; known: {URDF_VERSIONS}")
        if episode["urdf_version"] != self.urdf_version:
            self.urdf_version = episode["urdf_version"]
            episode["reconfigure"] = True  # another URDF is another scene
        self.episode = episode
        return super().reset(seed=[seed % 2**32], options={"reconfigure": episode.get("reconfigure", False)})

    def _initialize_episode(self, env_idx, options: dict):
        episode, robot = self.episode, self.agent.body
        x, y, yaw = POSES[episode["pose"]]
        x, y = episode.get("robot_xy", (x, y))
        yaw = episode.get("robot_yaw", yaw)
        overlay = episode.get("overlay", episode["pose"])
        if self.overlay and self._obs_mode != "none":
            path = asset(OVERLAY.format(overlay)) if overlay in POSES else overlay
            self.background = read_overlay(str(path), self.width, self.height)

        drawers = np.zeros(len(self.drawers), dtype=np.float32)
        if self.task.kind == "close":
            drawers[self.drawers.index(self.task.drawer)] = CLOSE_START
        self.cabinet.set_qpos(drawers)
        self.cabinet.set_qvel(np.zeros_like(drawers))
        robot.set_qpos(self.agent.init_qpos())
        robot.set_qvel(np.zeros(robot.dof, dtype=np.float32))
        robot.set_qf(np.zeros(robot.dof, dtype=np.float32))
        if self.object:
            self.object.set_pose(self._settled(episode["object_xy"]))
            self.object_body.linear_velocity = self.object_body.angular_velocity = np.zeros(3, dtype=np.float32)
        base = Rotation.from_euler("z", np.pi + yaw).as_quat(scalar_first=True)
        robot.set_root_pose(sapien.Pose([x, y, BASE_HEIGHT], base))

        self.subtask, self.contact_steps, self.grasped = 0, 0, False
        self.was_open = False

    def _settled(self, xy) -> sapien.Pose:
        """Where the object comes to rest on the cabinet: dropped without tilting, released, waited for (spec 3.0).

        In a scene of its own, with upstream's solver (TGS) and without the robot, which is parked far away there too:
        0.03 mm from upstream, where the solver of the robot's scene would let the object roll 3 mm further.
        """
        self._set_scene_config()
        sapien.physx.set_scene_config(enable_pcm=False, enable_tgs=True)
        sapien.physx.set_body_config(solver_position_iterations=SOLVER_ITERATIONS, solver_velocity_iterations=1)
        scene = sapien.Scene([sapien.physx.PhysxCpuSystem()])
        scene.set_timestep(1 / SIM_FREQ)
        top = scene.create_actor_builder()
        top.add_box_collision(half_size=CABINET_TOP)
        top.build_static().set_pose(CABINET_POSE * sapien.Pose([0, 0, CABINET_TOP_Z]))
        thing = object_builder(scene.create_actor_builder(), self.task, visual=False).build()
        self._set_scene_config()
        body = thing.find_component_by_type(sapien.physx.PhysxRigidDynamicComponent)
        body.linear_damping = body.angular_damping = OBJECT_DAMPING
        still = np.zeros(3, dtype=np.float32)

        def simulate(seconds: float):
            for _ in range(int(SIM_FREQ * seconds)):
                scene.step()

        thing.set_pose(sapien.Pose([*xy, DROP_HEIGHT]))
        body.set_locked_motion_axes([False, False, False, True, True, False])
        simulate(0.5)
        body.set_locked_motion_axes([False] * 6)
        thing.set_pose(thing.pose)
        body.linear_velocity = body.angular_velocity = still
        simulate(0.5)
        if np.linalg.norm(body.linear_velocity) > 1e-3 or np.linalg.norm(body.angular_velocity) > 1e-2:
            simulate(1.5)
        return thing.pose

    def _clear_sim_state(self):
        """Nothing: `_initialize_episode` writes every velocity."""

    # -- stepping ------------------------------------------------------------------------------------------------

    def is_final_subtask(self) -> bool:
        return self.task.kind != "place" or self.subtask == 1

    def advance_to_next_subtask(self):
        """The policy declares the drawer open; the instruction becomes "place apple into top drawer"."""
        self.subtask = 1

    @property
    def instruction(self) -> str:
        return self.task.instruction(self.subtask)

    def _step_action(self, action):
        if not self.is_final_subtask() and int(self._elapsed_steps[0]) >= FORCED_ADVANCE:
            self.advance_to_next_subtask()
        action = np.asarray(action, dtype=np.float64).reshape(-1)
        if action.shape != (7,) or not np.isfinite(action).all():
            raise ValueError(f"action must be 7 finite numbers, got {action}")
        controller, physics = self.agent.controller, self.scene.px
        controller.set_action(action)
        for _ in range(self._sim_steps_per_control):
            controller.before_simulation_step()
            physics.step()
        return torch.from_numpy(action)[None]

    def contacts(self) -> list:
        """Of the last physics step of this episode; before the first action there are none, whatever was before."""
        return self.scene.px.get_contacts() if self.agent.controller.moved else []

    def drawer_qpos(self) -> float:
        """How far the task's drawer is open, m."""
        return float(self.cabinet.qpos[self.drawers.index(self.task.drawer)])

    def evaluate(self) -> dict:
        """Upstream's success and statistics, evaluated exactly once per control step, plus latched subgoals."""
        qpos = self.drawer_qpos()
        self.was_open |= qpos >= OPEN_QPOS
        if self.task.kind != "place":
            success = qpos >= OPEN_QPOS if self.task.kind == "open" else qpos <= CLOSED_QPOS
            subgoals = {f"drawer_{'opened' if self.task.kind == 'open' else 'closed'}": bool(success)}
            stats = {"qpos": f"{qpos:.3f}"}
        else:
            contacts = self.contacts()
            self.contact_steps += np.linalg.norm(self._impulse_inside(contacts)) > 1e-6
            self.grasped |= self.agent.is_grasping(contacts, self.object)
            success = self.subtask == 1 and qpos >= PLACED_QPOS and self.contact_steps >= 1
            stats = {"qpos": qpos, "is_drawer_open": self.was_open, "has_contact": int(self.contact_steps)}
            subgoals = {
                "drawer_opened": bool(self.was_open),
                "object_grasped": bool(self.grasped),
                "object_placed": bool(self.contact_steps >= 1),
            }
        return {
            "success": torch.tensor([bool(success)]),
            "qpos": qpos,
            "episode_stats": stats,
            "subgoals": subgoals,
            "instruction": self.instruction,
        }

    def _impulse_inside(self, contacts) -> np.ndarray:
        """Impulse (3,) N s between the object and the bottom of the drawer's inside, last physics step."""
        bottom = self.drawer_link.collision_shapes[INTERIOR_BOTTOM]
        relevant = [c for c in contacts if bottom in c.shapes]
        return contact_impulse(relevant, self.object, self.drawer_link.entity)

    def set_state(self, qpos: dict, qvel: dict, drawers: dict, drawer_speeds: dict | None = None, object_pose=None):
        """Take over a recorded state: {joint: rad, rad/s}, {drawer joint: m, m/s}, object xyz wxyz (7,) at rest."""
        robot, names = self.agent.body, self.agent.controller.names
        robot.set_qpos(np.array([qpos[n] for n in names], dtype=np.float32))
        robot.set_qvel(np.array([qvel[n] for n in names], dtype=np.float32))
        self.cabinet.set_qpos(np.array([drawers[f"{d}_drawer_joint"] for d in self.drawers], dtype=np.float32))
        speeds = drawer_speeds or {}
        self.cabinet.set_qvel(np.array([speeds.get(f"{d}_drawer_joint", 0) for d in self.drawers], dtype=np.float32))
        if self.object:
            self.object.set_pose(sapien.Pose(object_pose[:3], object_pose[3:]))
            self.object_body.linear_velocity = self.object_body.angular_velocity = np.zeros(3, dtype=np.float32)

    # -- pictures ------------------------------------------------------------------------------------------------

    def render_picture(self) -> tuple[np.ndarray, np.ndarray]:
        """The policy camera now: uint8 (H, W, 3) with the overlay, and the mask (H, W) of simulated pixels."""
        self.scene.update_render(update_sensors=True, update_human_render_cameras=False)
        camera = self._sensors["overhead"].camera._render_cameras[0]
        camera.take_picture()
        color = camera.get_picture("Color")[..., :3]
        mask = np.isin(camera.get_picture("Segmentation")[..., 1], self._simulated_ids())
        if self.background is not None:
            color = np.where(mask[..., None], color, self.background)
        return np.clip(color * 255, 0, 255).astype(np.uint8), mask

    def _simulated_ids(self) -> np.ndarray:
        entities = [link.entity for body in (self.agent.body, self.cabinet) for link in body.links]
        return np.array([e.per_scene_id for e in entities + ([self.object] if self.object else [])])

    def _get_obs_agent(self):
        return {
            "qpos": torch.from_numpy(self.agent.body.qpos)[None],
            "qvel": torch.from_numpy(self.agent.body.qvel)[None],
        }

    def _get_obs_extra(self, info):
        pose = self.agent.controller.tcp.entity_pose
        return {"tcp_pose": torch.from_numpy(np.concatenate([pose.p, pose.q]))[None]}

    def _get_obs_sensor_data(self, apply_texture_transforms=True):
        rgb, mask = self.render_picture()
        return {
            "overhead": {"rgb": torch.from_numpy(rgb)[None], "segmentation": torch.from_numpy(mask)[None, ..., None]}
        }

    def get_state_dict(self):
        return self.scene.get_sim_state()


def object_builder(builder, task: Task, visual: bool = True):
    """Collision, density and, where wanted, the looks of the task's object (spec 3.0, 3.5)."""
    folder = MODELS + task.model_id
    material = sapien.physx.PhysxMaterial(0.5, 0.5, 0.0)
    collision = str(asset(folder + "/collision.obj"))
    builder.add_multiple_convex_collisions_from_file(collision, material=material, density=task.density)
    if visual:
        builder.add_visual_from_file(str(asset(folder + "/textured.glb")))
    return builder


def light_up_baked_textures(entity: sapien.Entity):
    """SAPIEN 3 multiplies a baked texture by an emission colour that these files leave black (spec 7.2)."""
    for component in entity.components:
        if isinstance(component, sapien.render.RenderBodyComponent):
            for shape in component.render_shapes:
                for part in shape.parts:
                    if part.material.emission_texture is not None:
                        part.material.set_emission([1.0, 1.0, 1.0, 1.0])


class CanonicalEnv(gym.Wrapper):
    """Observation and action of `selfflow_robot/interfaces.py`; everything Google-robot-specific ends here."""

    def __init__(self, env: SimplerEnv):
        super().__init__(env)
        self.sim = env.unwrapped
        picture = gym.spaces.Box(0, 255, (self.sim.height, self.sim.width, 3), np.uint8)
        self.observation_space = gym.spaces.Dict(
            images=gym.spaces.Dict(overhead=picture),
            proprio=gym.spaces.Box(-np.inf, np.inf, (PROPRIO_DIM,), np.float32),
            instruction=gym.spaces.Text(64),
        )
        low, high = np.full(7, -np.inf, np.float32), np.full(7, np.inf, np.float32)
        low[6], high[6] = 0, 1
        self.action_space = gym.spaces.Box(low, high)

    def reset(self, *, seed=None, options=None):
        observation, info = self.env.reset(seed=seed, options=options)
        return self._observation(observation), self._info(info)

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(to_upstream(action, self.sim))
        return self._observation(observation), float(reward), bool(terminated), bool(truncated), self._info(info)

    def render(self):
        return self._picture

    def _observation(self, raw) -> Observation:
        self._picture = raw["sensor_data"]["overhead"]["rgb"][0].numpy() if raw else None
        return {
            "images": {"overhead": self._picture} if raw else {},
            "proprio": proprio(self.sim),
            "instruction": self.sim.instruction,
        }

    def _info(self, info) -> dict:
        scalars = {"success": bool(info["success"]), "elapsed_steps": int(info["elapsed_steps"])}
        return {**info, **scalars, "seed": self.sim.episode_seed}


def to_upstream(action: np.ndarray, sim: SimplerEnv) -> np.ndarray:
    """Canonical action (7,) -> upstream's: the absolute gripper opening becomes a step from the last command."""
    action = np.array(action, dtype=np.float64)
    if action.shape != (7,) or not np.isfinite(action).all():
        raise ValueError(f"action must be 7 finite numbers [dx dy dz rx ry rz gripper], got {action}")
    wanted = FINGER_RANGE * (1 - np.clip(action[6], 0, 1))  # rad
    action[6] = (wanted - sim.agent.controller.finger_angle()) / FINGER_RANGE
    return action


def from_upstream(action: np.ndarray, finger_angle: float) -> np.ndarray:
    """The inverse, given the finger angle (rad) last commanded before this action."""
    action = np.array(action, dtype=np.float32)
    action[6] = 1 - np.clip(finger_angle / FINGER_RANGE + np.clip(action[6], -1, 1), 0, 1)
    return action


def proprio(sim: SimplerEnv) -> np.ndarray:
    """float32 (10,): sensed TCP position (m) and two rotation columns in the base frame, opening (1 = open)."""
    pose = sim.agent.controller.tcp_pose()
    rotation = Rotation.from_quat(pose.q, scalar_first=True).as_matrix()
    opening = np.clip(1 - sim.agent.closedness(), 0, 1)
    return np.concatenate([pose.p, rotation[:, 0], rotation[:, 1], [opening]]).astype(np.float32)
