"""SIMPLER's scenes on ManiSkill 3: any of its tasks, on either robot (spec sections 0, 2, 3).

`SimplerEnv` speaks upstream's action; `CanonicalEnv` around it speaks the project's (`selfflow_robot/interfaces.py`)
and is what `gymnasium.make("simpler/open_and_place-v0")` and `make_env` return.
"""

from dataclasses import replace
from string import ascii_lowercase, digits

import gymnasium as gym
import numpy as np
import sapien
import torch
from mani_skill.envs.sapien_env import BaseEnv
from mani_skill.utils.structs.types import DefaultMaterialsConfig, SceneConfig, SimConfig
from scipy.spatial.transform import Rotation

from envs import scenes
from envs.assets import asset
from envs.google_robot import GoogleRobot
from envs.robot import SimplerRobot, by_plain_name, checked_action
from envs.scenes import Standins
from envs.success import JUDGES
from envs.tasks import CLOSE_START, VISUAL_MATCHING, get_task, next_episode_seed
from envs.widowx import PLACES, WidowX
from selfflow_robot.interfaces import PROPRIO_DIM, Observation

ROBOTS: dict[str, type[SimplerRobot]] = {"google_robot": GoogleRobot, "widowx": WidowX}
FORCED_ADVANCE = 100  # elapsed steps at which upstream moves on to the second subtask
COMMON_OPTIONS = ("robot_xy", "robot_yaw", "urdf_version", "overlay", "variant", "setup", "reconfigure")


class SimplerEnv(BaseEnv):
    """One task's scene: robot, stage or cabinet, loose objects.

    Args: task name; width, height of the camera picture (default: a quarter of upstream's); overlay: the real picture
    behind the scene; shader "default" (rasteriser) or "rt" (ray tracing, needs a GPU); physics: scene settings that
    differ from ours (for studies of what the results depend on). Action: see the robot's controller.
    `reset(seed=..., options=...)`: the seed draws the episode as upstream would; options fix parts of it: those of the
    task (`Task.options`: pose, drawer, object_xy, model, orientation, episode_id), robot_xy (m), robot_yaw (rad),
    urdf_version, overlay (picture path), variant (`Variant`), setup (a whole `Setup`).
    """

    SUPPORTED_OBS_MODES = ("rgb", "none")
    agent: SimplerRobot

    def __init__(
        self, task="open_and_place", width=None, height=None, overlay=True, shader="default", physics=None, **kwargs
    ):
        self.task = get_task(task)
        self.robot_class = ROBOTS[self.task.robot]
        full = self.robot_class.picture_size
        self.width, self.height = width or full[0] // 4, height or full[1] // 4
        self.overlay, self.shader, self.physics = overlay, shader, physics or {}
        self.episode_seed, self.background = 2022, None
        self.setup = self.task.setup(self.task.draw(2022))
        self.built = None  # what the scene stands for (`Setup.scene`)
        self.subtask, self.standins, self.judge = 0, Standins(), None
        self.hide_standins = False  # show the background where an object has no picture, as upstream would
        if shader.startswith("rt") and not torch.cuda.is_available():
            raise ValueError(f"shader {shader!r} traces rays, which needs an NVIDIA GPU; use shader='default'")
        backend = kwargs.pop("sim_backend", "physx_cpu")
        if backend != "physx_cpu" or kwargs.get("num_envs", 1) != 1:
            raise ValueError(
                f"sim_backend {backend!r}, num_envs {kwargs.get('num_envs', 1)}: scenes run on the CPU, "
                "one environment per process; no GPU does physics yet. Several: envs.make_vector_env(task, n)"
            )
        super().__init__(robot_uids=self.robot_class.uid, reward_mode="sparse", sim_backend="physx_cpu", **kwargs)

    @property
    def _default_sim_config(self):
        settings = dict(
            contact_offset=self.task.contact_offset,
            solver_position_iterations=scenes.SOLVER_ITERATIONS,
            solver_velocity_iterations=1
            if self.robot_class is WidowX
            else 4,  # a lost grasp in fifteen with 1 (LOG.md)
            enable_pcm=False,
            # PhysX 5's TGS lets the Google robot's heavy fingers chatter and lose what they hold; the WidowX needs it
            # where its fingers press on the table, and holds as well with either (LOG.md).
            enable_tgs=self.robot_class is WidowX,
        )
        return SimConfig(
            sim_freq=self.robot_class.sim_freq,
            control_freq=self.robot_class.control_freq,
            scene_config=SceneConfig(**settings | self.physics),
            default_materials_config=DefaultMaterialsConfig(1.0, 1.0, 0.0),
        )

    # -- scene ---------------------------------------------------------------------------------------------------

    def _load_agent(self, options: dict):
        self.robot_class.urdf_version = self.setup.urdf_version
        if self.robot_class is WidowX:
            WidowX.place = PLACES["sink" if scenes.has_sink(self.setup) else "table"]
        super()._load_agent(options, sapien.Pose([-10, 0, 0]))
        if self.robot_class is WidowX:
            self.agent.place = WidowX.place  # its own from here on: the next scene of the process may have another
        if self.setup.shiny_robot and self.scene.can_render():
            polish(self.agent.body)

    def _load_scene(self, options: dict):
        setup, self.standins = self.setup, Standins()
        visual = self.scene.can_render()
        stage = self.scene.create_actor_builder()
        if scenes.add_stage(stage, setup, self.standins, visual):
            stage.initial_pose = sapien.Pose()
            self.stage = stage.build_static("arena")._objs[0]
            if visual:
                scenes.finish_looks(self.stage, matte=False)
        self.pictureless: list[sapien.Entity] = []
        self.cabinet, self.drawers = None, []
        if setup.station:
            self._load_cabinet(setup.station)
        self.sink = self._load_thing("sink", 100000, scenes.SINK_POSE) if scenes.has_sink(setup) else None
        if self.sink:
            scenes.lock(self.sink, "xyzabc")
        things = [
            self._load_thing(thing.model, scenes.density(thing, setup.model_db), sapien.Pose([0, 3 * i, 9]), i)
            for i, thing in enumerate(setup.things + setup.distractors)
        ]
        self.things, self.distractors = things[: len(setup.things)], things[len(setup.things) :]
        for thing in self.things:
            body = scenes.body_of(thing)
            body.linear_damping = body.angular_damping = scenes.OBJECT_DAMPING

    def _load_cabinet(self, station: str):
        loader = self.scene.create_urdf_loader()
        loader.name, loader.fix_root_link = "cabinet", True
        builder = loader.parse(str(asset(f"data/custom/{station}.urdf")))["articulation_builders"][0]
        builder.initial_pose = scenes.STATION_POSE
        self.cabinet = builder.build()._objs[0]
        self.drawers = [name.split("_")[0] for name in by_plain_name(self.cabinet.active_joints)]
        for joint in self.cabinet.active_joints:
            joint.set_friction(0.05)
            joint.set_drive_properties(stiffness=0, damping=1)

    def _load_thing(self, model: str, density: float, pose: sapien.Pose, index=None) -> sapien.Entity:
        builder = self.scene.create_actor_builder()
        scenes.add_collision(builder, model, density)
        seen = not self.scene.can_render() or scenes.add_visual(builder, model, self.standins)
        builder.initial_pose = pose
        entity = builder.build(model if index is None else f"{index}_{model}")._objs[0]
        if not seen:
            self.pictureless.append(entity)
        if self.scene.can_render():
            scenes.finish_looks(entity, self.setup.matte)
        return entity

    def _load_lighting(self, options: dict):
        scenes.light(self.scene, self.setup.lighting)

    def _setup_sensors(self, options: dict):
        if self._obs_mode != "none":
            super()._setup_sensors(options)
        else:
            self._sensors, self._human_render_cameras = {}, {}
            self._sensor_configs, self._human_render_camera_configs = {}, {}
            self.scene.sensors, self.scene.human_render_cameras = {}, {}

    @property
    def _default_sensor_configs(self):
        return [self.agent.camera(self.width, self.height, self.shader)]

    # -- episodes ------------------------------------------------------------------------------------------------

    def reset(self, seed=None, options=None):
        options = dict(options or {})
        known = (*self.task.options, *COMMON_OPTIONS)
        if unknown := set(options) - set(known):
            raise ValueError(
                f"unknown reset options {sorted(unknown)} for {self.task.short}; known: {', '.join(known)}"
            )
        if seed is None:
            seed = next_episode_seed(self.episode_seed)
        seed = int(np.atleast_1d(seed)[0])
        self.episode_seed = seed
        reconfigure, variant = options.pop("reconfigure", False), options.pop("variant", VISUAL_MATCHING)
        setup = options.pop("setup", None) or self.task.setup({**self.task.draw(seed), **options}, variant)
        if not self.overlay:
            setup = replace(setup, overlay=None)
        reconfigure |= setup.scene != self.built
        self.setup, self.built = setup, None  # a reset that fails leaves nothing to go on with
        answer = super().reset(seed=[seed % 2**32], options={"reconfigure": bool(reconfigure)})
        self.built = setup.scene
        return answer

    def _initialize_episode(self, env_idx, options: dict):
        setup, robot = self.setup, self.agent.body
        self.background = None
        if setup.overlay and self._obs_mode != "none":
            self.background = scenes.read_overlay(scenes.overlay_path(setup), self.width, self.height)
        if self.cabinet:
            drawers = np.zeros(len(self.drawers), dtype=np.float32)
            if self.task.kind == "close":
                drawers[self.drawers.index(setup.drawer)] = CLOSE_START
            self.cabinet.set_qpos(drawers)
            self.cabinet.set_qvel(np.zeros_like(drawers))
            self.drawer_link = by_plain_name(self.cabinet.links)[f"{setup.drawer}_drawer"]
        qpos = self.agent.init_qpos()
        if setup.head_tilt is not None:
            qpos[self.agent.controller.names.index("joint_head_tilt")] = setup.head_tilt
        robot.set_qpos(qpos)
        robot.set_qvel(np.zeros(robot.dof, dtype=np.float32))
        robot.set_qf(np.zeros(robot.dof, dtype=np.float32))
        if self.things:
            poses = scenes.settle(setup, self.robot_class.sim_freq, self.task.contact_offset)
            self._set_scene_config()  # settling has its own
            for entity, pose in zip(self.things + self.distractors, poses):
                entity.set_pose(pose)
                scenes.hold_still(entity)
        base = Rotation.from_euler("z", np.pi + setup.robot_yaw).as_quat(scalar_first=True)
        robot.set_root_pose(sapien.Pose([*setup.robot_xy, self.agent.base_height], base))
        self.robot_entities = {link.entity for link in robot.links}
        self.subtask = 0
        self.agent.controller.moved = False
        self.judge = JUDGES[self.task.kind](self)

    def _clear_sim_state(self):
        """Nothing: `_initialize_episode` writes every velocity."""

    @property
    def object(self) -> sapien.Entity | None:
        """The thing to act on."""
        return self.things[self.setup.source] if self.things else None

    # -- stepping ------------------------------------------------------------------------------------------------

    def is_final_subtask(self) -> bool:
        return self.task.kind != "place" or self.subtask == 1

    def advance_to_next_subtask(self):
        """The policy declares the drawer open; the instruction becomes "place apple into top drawer"."""
        if self.task.kind != "place":
            raise NotImplementedError(f"{self.task.short} has one subtask")
        self.subtask = 1

    @property
    def instruction(self) -> str:
        return self.setup.instructions[self.subtask]

    def _step_action(self, action):
        if not self.is_final_subtask() and int(self._elapsed_steps[0]) >= FORCED_ADVANCE:
            self.advance_to_next_subtask()
        action = checked_action(np.reshape(action, -1))
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
        return float(self.cabinet.qpos[self.drawers.index(self.setup.drawer)])

    def environment_state(self) -> np.ndarray:
        """What the scene knows and no policy sees, float32 (6,): `interfaces.ENVIRONMENT_NAMES`."""
        position, drawer = np.zeros(3), self.drawer_qpos() if self.cabinet else 0.0
        if self.object is not None:
            position = (self.agent.body.root_pose.inv() * self.object.pose).p
        has = self.object is not None, self.cabinet is not None
        return np.array([*position, drawer, *has], np.float32)

    def evaluate(self) -> dict:
        """Upstream's success and statistics (`envs/success.py`), which add up once per control step, and subgoals."""
        judge = self.judge if self.agent.controller.moved else JUDGES[self.task.kind](self)
        info = judge(self)
        return {**info, "success": torch.tensor([info["success"]]), "instruction": self.instruction}

    def set_state(self, qpos: dict, qvel: dict, drawers=None, drawer_speeds=None, object_poses=()):
        """Take over a recorded state: {joint: rad, rad/s}, {drawer joint: m, m/s}, things' xyz wxyz (7,) at rest."""
        robot, names = self.agent.body, self.agent.controller.names
        robot.set_qpos(np.array([qpos[n] for n in names], dtype=np.float32))
        robot.set_qvel(np.array([qvel[n] for n in names], dtype=np.float32))
        if self.cabinet:
            speeds = drawer_speeds or {}
            joints = [f"{drawer}_drawer_joint" for drawer in self.drawers]
            self.cabinet.set_qpos(np.array([drawers[joint] for joint in joints], dtype=np.float32))
            self.cabinet.set_qvel(np.array([speeds.get(joint, 0) for joint in joints], dtype=np.float32))
        for thing, pose in zip(self.things, object_poses):
            thing.set_pose(sapien.Pose(pose[:3], pose[3:]))
            scenes.hold_still(thing)

    # -- pictures ------------------------------------------------------------------------------------------------

    def render_picture(self) -> tuple[np.ndarray, np.ndarray]:
        """The policy camera now: uint8 (H, W, 3) with the overlay, and the mask (H, W) of simulated pixels."""
        return self.composite(*self.render_raw())

    def render_raw(self) -> tuple[np.ndarray, np.ndarray]:
        """The policy camera now: float32 (H, W, 3) in [0, 1] and the id of what each pixel (H, W) shows."""
        self.scene.update_render(update_sensors=True, update_human_render_cameras=False)
        camera = self._sensors[self.agent.view].camera._render_cameras[0]
        camera.take_picture()
        return camera.get_picture("Color")[..., :3], camera.get_picture("Segmentation")[..., 1]

    def composite(self, color: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Lay the real background around what is simulated; truncated to uint8 as upstream does (spec 2.5)."""
        mask = np.isin(ids, self._simulated_ids())
        if self.background is not None:
            color = np.where(mask[..., None], color, self.background)
        return np.clip(color * 255, 0, 255).astype(np.uint8), mask

    def _simulated_ids(self) -> np.ndarray:
        """Of the entities that the overlay does not cover: sink and target plane are part of the real picture."""
        bodies = [self.agent.body, *([self.cabinet] if self.cabinet else [])]
        entities = [link.entity for body in bodies for link in body.links] + self.distractors
        painted = [thing.model == "dummy_sink_target_plane" for thing in self.setup.things]
        entities += [thing for thing, hidden in zip(self.things, painted) if not hidden]
        if self.hide_standins:
            entities = [entity for entity in entities if entity not in self.pictureless]
        return np.array([entity.per_scene_id for entity in entities])

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
            self.agent.view: {
                "rgb": torch.from_numpy(rgb)[None],
                "segmentation": torch.from_numpy(mask)[None, ..., None],
            }
        }

    def get_state_dict(self):
        return self.scene.get_sim_state()


def polish(body) -> None:
    """Upstream's override of the robot's materials (spec 1.1)."""
    for link in body.links:
        for component in link.entity.components:
            if isinstance(component, sapien.render.RenderBodyComponent):
                for shape in component.render_shapes:
                    for part in shape.parts:
                        part.material.set_specular(0.9)
                        part.material.set_roughness(0.3)


class CanonicalEnv(gym.Wrapper):
    """Observation and action of `selfflow_robot/interfaces.py`; everything robot-specific ends here."""

    def __init__(self, env: SimplerEnv):
        super().__init__(env)
        self.sim = env.unwrapped
        self.view = self.sim.robot_class.view
        picture = gym.spaces.Box(0, 255, (self.sim.height, self.sim.width, 3), np.uint8)
        self.observation_space = gym.spaces.Dict(
            images=gym.spaces.Dict({} if self.sim.obs_mode == "none" else {self.view: picture}),
            proprio=gym.spaces.Box(-np.inf, np.inf, (PROPRIO_DIM,), np.float32),
            instruction=gym.spaces.Text(64, charset=ascii_lowercase + digits + " "),
        )
        low, high = np.full(7, -np.inf, np.float32), np.full(7, np.inf, np.float32)
        low[6], high[6] = 0, 1
        self.action_space = gym.spaces.Box(low, high)

    def reset(self, *, seed=None, options=None):
        observation, info = self.env.reset(seed=seed, options=options)
        return self._observation(observation), self._info(info)

    def step(self, action):
        upstream = self.sim.agent.to_upstream(checked_action(action))
        observation, reward, terminated, truncated, info = self.env.step(upstream)
        return self._observation(observation), float(reward), bool(terminated), bool(truncated), self._info(info)

    def render(self):
        return self._picture

    def _observation(self, raw) -> Observation:
        self._picture = raw["sensor_data"][self.view]["rgb"][0].numpy() if raw else None
        return {
            "images": {self.view: self._picture} if raw else {},
            "proprio": self.sim.agent.proprio(),
            "instruction": self.sim.instruction,
        }

    def _info(self, info) -> dict:
        scalars = {"success": bool(info["success"]), "elapsed_steps": int(info["elapsed_steps"])}
        return {**info, **scalars, "seed": self.sim.episode_seed, "standins": list(self.sim.standins)}
