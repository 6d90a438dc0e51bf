"""Episodes of the scene: resets, options, subtasks, actions, pictures."""

import json
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import sapien
import torch
from gymnasium.vector.utils import concatenate, create_empty_array
from scipy.spatial.transform import Rotation

from envs import make_env, make_vector_env
from envs.protocol import CAMERAS
from envs.rollout import rollout
from envs.tasks import TASKS, Variant, get_task
from envs.widowx import PLACES

HERE = Path(__file__).parent
VECTORS = json.loads((HERE / "simpler_vectors.json").read_text())  # made by upstream, as are the resets
RESETS = json.loads((HERE / "simpler_resets.json").read_text())["resets"]
HOLD = np.array([0, 0, 0, 0, 0, 0, 1], np.float32)
FAR = {"robot_xy": (5.0, 0.0), "robot_yaw": 0.0}  # free space


@pytest.fixture(scope="module")
def scene():
    """Open-and-Place without pictures, upstream's action."""
    from envs.simpler import SimplerEnv

    env = SimplerEnv("open_and_place", obs_mode="none")
    yield env
    env.close()


@pytest.fixture(scope="module")
def canonical(scene):
    from envs.simpler import CanonicalEnv

    return CanonicalEnv(scene)


class Wander:
    """Random motion from a fixed stream."""

    def reset(self, instruction=""):
        self.rng = np.random.default_rng(0)

    def act(self, observation):
        motion = self.rng.normal(scale=[0.03] * 3 + [0.1] * 3)
        return np.append(motion + [0.05, 0, -0.02, 0, 0, 0], self.rng.random() < 0.5).astype(np.float32)


# -- the scene ---------------------------------------------------------------------------------------------------------


@pytest.mark.sim
def test_unseeded_resets_continue_the_chain(scene):
    scene.reset(seed=2022)
    for expected in VECTORS["reset_draws"]["google_robot_place_apple_in_closed_top_drawer"][:3]:
        scene.reset()
        assert scene.episode_seed == expected["episode_seed"]
        assert scene.setup.choices["pose"] == expected["overlay"]
        np.testing.assert_allclose(scene.object.pose.p[:2], expected["obj_init_xy"], atol=5e-3)


@pytest.mark.sim
def test_the_apple_stays_where_upstreams_came_to_rest(scene):
    expected = VECTORS["apple_on_cabinet_top"]
    scene.reset(seed=0, options={"object_xy": expected["xy"]})
    assert np.linalg.norm(scene.object.pose.p - expected["settled_p"]) < 1e-4
    np.testing.assert_allclose(scene.object.pose.q, expected["settled_q"], atol=1e-3)
    for _ in range(3):
        scene.step(np.zeros(7))
    assert np.linalg.norm(scene.object.pose.p - expected["settled_p"]) < 1e-3


@pytest.mark.sim
def test_an_episode_depends_on_its_seed_alone(canonical):
    env = gym.wrappers.TimeLimit(canonical, max_episode_steps=15)
    episodes, apples = [], []
    for seed in (3, 4, 3):  # without a new scene each, the apple's rest would remember the episode before
        episodes.append(rollout(env, Wander(), seed))
        apples.append(canonical.sim.object.pose.p.copy())
    np.testing.assert_array_equal(apples[0], apples[2])
    np.testing.assert_array_equal(episodes[0].proprio, episodes[2].proprio)
    assert not np.array_equal(apples[0], apples[1])
    assert episodes[0].steps == 15 and episodes[0].executed.shape == (15, 7)


@pytest.mark.sim
def test_a_reset_forgets_the_contacts_of_the_episode_before(scene):
    scene.reset(seed=1)
    scene.object.set_pose(sapien.Pose([0.05, 0.0, 0.64]))  # inside the drawer, which is then pulled open
    scene.cabinet.set_qpos(np.array([0.25 if d == "top" else 0 for d in scene.drawers], dtype=np.float32))
    for _ in range(3):
        info = scene.step(np.zeros(7))[-1]
    assert info["subgoals"]["object_placed"]
    assert not any(scene.reset(seed=1)[1]["subgoals"].values())


@pytest.mark.sim
def test_reset_options_fix_the_episode(scene):
    options = {"robot_xy": (0.7, 0.1), "robot_yaw": 0.05, "urdf_version": "", "object_xy": (-0.08, 0.02)}
    scene.reset(seed=1, options=options)
    pose = scene.agent.body.root_pose
    np.testing.assert_allclose(pose.p[:2], (0.7, 0.1), atol=1e-6)
    assert np.isclose(2 * np.arctan2(pose.q[3], pose.q[0]), np.pi + 0.05, atol=1e-5)
    np.testing.assert_allclose(scene.object.pose.p[:2], (-0.08, 0.02), atol=5e-3)
    assert scene.setup.urdf_version == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"posture": "a0"}, r"unknown reset options \['posture'\] for open_and_place; known: pose"),
        ({"pose": "z9"}, "unknown pose 'z9'; known: 'a0'"),
        ({"urdf_version": "blue"}, "unknown urdf_version 'blue'"),
        ({"episode_id": 3}, r"unknown reset options \['episode_id'\] for open_and_place"),
        ({"drawer": "middle"}, "unknown drawer 'middle'; known: 'top'"),
        ({"object_xy": (0.0, np.inf)}, "object_xy must be 2 finite numbers"),
    ],
)
@pytest.mark.sim
def test_wrong_reset_options_are_refused(scene, options, message):
    with pytest.raises(ValueError, match=message):
        scene.reset(seed=0, options=options)


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        (Variant(lighting="disco"), "unknown lighting 'disco'; known: tabletop"),
        (Variant(station="mk_station9"), r"mk_station9\.urdf does not exist; .*make setup"),
    ],
)
@pytest.mark.sim
def test_a_variant_of_what_does_not_exist_is_refused_every_time(scene, variant, message):
    for _ in range(2):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            scene.reset(seed=0, options={"variant": variant})
    scene.reset(seed=0)
    scene.step(np.zeros(7))


@pytest.mark.sim
def test_an_environment_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="unknown task 'pick_coke'; did you mean"):
        make_env("pick_coke")
    with pytest.raises(ValueError, match="one environment per process"):
        make_env("pick_coke_can", num_envs=2)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"shader 'rt' .* needs an NVIDIA GPU; use shader='default'"):
            make_env("open_drawer", shader="rt")


@pytest.mark.sim
@pytest.mark.parametrize("name", ["pick_object", "move_near_v0", "close_drawer", "place_in_closed_drawer",
                                  "carrot_on_plate", "eggplant_in_basket"])  # fmt: skip
def test_resets_are_upstreams(name):
    """One whole scene of every kind; `test_scenes.py` has the rest of the objects, `test_tasks.py` of the draws."""
    env = make_env(name, obs_mode="none")
    sim = env.unwrapped
    reset = next(r for r in RESETS if r["task"] == sim.task.name and r["seed"] == 3)
    observation, _ = env.reset(seed=3)
    assert observation["instruction"] == reset["instruction"]
    assert (sim.setup.urdf_version, sim.setup.drawer) == (reset["urdf_version"], reset["drawer"])
    assert reset["urdf_version"] in sim.agent.urdf_path
    for pose, recorded in ((sim.agent.body.root_pose, "robot_base"), (sim.agent.controller.tcp.entity_pose, "tcp")):
        np.testing.assert_allclose(pose.p, reset[recorded][:3], atol=1e-5)
        assert degrees_between(pose.q, reset[recorded][3:]) < 0.01
    assert len(sim.things) == len(reset["objects"])
    for thing, (model, pose) in zip(sim.things, reset["objects"]):
        chaotic = model in ("eggplant", "dummy_sink_target_plane")
        assert np.linalg.norm(thing.pose.p - pose[:3]) < (6e-3 if chaotic else 1.6e-3), model
        assert degrees_between(thing.pose.q, pose[3:]) < 1.6, model
    opened = {drawer: float(q) for drawer, q in zip(sim.drawers, sim.cabinet.qpos)} if sim.cabinet else {}
    closing = name == "close_drawer"
    assert opened == {d: pytest.approx(0.2 * (closing and d == sim.setup.drawer)) for d in opened}
    env.close()


def degrees_between(q, other) -> float:
    """Between two orientations (wxyz)."""
    turn = Rotation.from_quat(q, scalar_first=True).inv() * Rotation.from_quat(other, scalar_first=True)
    return float(np.degrees(turn.magnitude()))


@pytest.mark.sim
def test_the_head_of_a_variant_is_tilted(scene):
    tilt = scene.agent.controller.names.index("joint_head_tilt")
    for variant, angle in ((CAMERAS[0], 0.9351361), (CAMERAS[1], 0.6651361), (Variant(), 0.7851361)):
        scene.reset(seed=0, options={"variant": variant})
        assert scene.agent.body.qpos[tilt] == pytest.approx(angle)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (np.full(7, np.nan), r"its dx \(dimension 0\) is nan"),
        ([0, 0, np.inf, 0, 0, 0, 1], r"its dz \(dimension 2\) is inf"),
        ([0, 0, 0, 0, 0, 0, np.nan], r"its gripper \(dimension 6\) is nan"),
        (np.zeros(6), r"got shape \(6,\)"),
        (np.zeros((7, 1)), r"got shape \(7, 1\)"),
        ("left", "got 'left'"),
    ],
)
@pytest.mark.sim
def test_actions_that_are_not_seven_numbers_are_refused(canonical, action, message):
    canonical.reset(seed=0)
    with pytest.raises(ValueError, match=f"action must be 7 finite numbers, .*{message}"):
        canonical.step(action)


@pytest.mark.sim
def test_the_instruction_changes_by_force_and_the_limit_truncates(canonical):
    env = gym.wrappers.TimeLimit(canonical, max_episode_steps=get_task("open_and_place").max_steps)
    env.reset(seed=0, options=FAR)
    for step in range(1, 201):
        observation, _, terminated, truncated, info = env.step(HOLD)
        assert observation["instruction"] == ("open top drawer" if step <= 100 else "place apple into top drawer")
        assert truncated == (step == 200) and not terminated and info["elapsed_steps"] == step
    assert info["subgoals"] == {"drawer_opened": False, "object_grasped": False, "object_placed": False}


@pytest.mark.sim
def test_the_instruction_changes_when_the_subtask_is_declared_done(canonical):
    canonical.reset(seed=0, options=FAR)
    canonical.unwrapped.advance_to_next_subtask()
    observation, *_ = canonical.step(HOLD)
    assert observation["instruction"] == "place apple into top drawer"
    observation, _ = canonical.reset(seed=0)
    assert observation["instruction"] == "open top drawer"


# -- pictures ----------------------------------------------------------------------------------------------------------


@pytest.mark.sim
def test_pictures_at_any_size_show_the_same():
    envs = {size: make_env("open_and_place", width=size[0], height=size[1]) for size in ((160, 128), (640, 512))}
    pictures = {}
    for (width, height), env in envs.items():
        observation, _ = env.reset(seed=5)
        picture = observation["images"]["overhead"]
        assert picture.dtype == np.uint8 and picture.shape == (height, width, 3)
        assert env.observation_space["images"]["overhead"].contains(picture)
        pictures[width] = picture.astype(np.float64)
    reduced = pictures[640].reshape(128, 4, 160, 4, 3).mean((1, 3))
    error = np.abs(reduced - pictures[160]).mean()
    assert error < 4, error
    assert error < np.abs(np.roll(reduced, 2, axis=1) - pictures[160]).mean() / 2  # two pixels aside is another camera


# -- several at once ---------------------------------------------------------------------------------------------------


@pytest.mark.sim
def test_observations_are_of_their_space(canonical):
    """Without pictures, too: a vector of environments stacks what the space says."""
    observation, _ = canonical.reset(seed=0)
    space = canonical.observation_space
    assert space.contains(observation) and observation["images"] == {}
    stacked = concatenate(space, [observation] * 2, create_empty_array(space, 2))
    assert stacked["proprio"].shape == (2, 10) and stacked["instruction"] == (observation["instruction"],) * 2
    words = {text for task in TASKS for text in task.setup(task.draw(0)).instructions}
    assert all(space["instruction"].contains(text) for text in words)


@pytest.mark.sim
@pytest.mark.slow
def test_a_vector_of_environments_is_as_many_single_ones():
    """Equal to the bit: pictures, proprio, instructions, what one reset and one step after the other gives.

    On the WidowX, whose scene no seed changes: building another costs more than all else here.
    """
    size = {"width": 40, "height": 30}
    actions = np.random.default_rng(0).normal(scale=0.02, size=(3, 2, 7)).astype(np.float32)
    actions[..., 6] = [1, 0]
    vector = make_vector_env("stack_cube", 2, **size)
    processes = list(vector.processes)
    seen = [vector.reset(seed=[3, 8])]
    assert all(process.is_alive() for process in processes)
    seen += [vector.step(action) for action in actions]
    again, _ = vector.reset(seed=[5, 5], options={"reset_mask": np.array([True, False])})

    env = make_env("stack_cube", **size)
    view = env.unwrapped.robot_class.view
    for i, seed in enumerate((3, 8)):
        single = [env.reset(seed=seed), *(env.step(action[i]) for action in actions)]
        for many, one in zip(seen, single):
            assert isinstance(many[0]["instruction"], tuple) and many[0]["instruction"][i] == one[0]["instruction"]
            assert many[0]["images"][view].shape == (2, 30, 40, 3)
            np.testing.assert_array_equal(many[0]["images"][view][i], one[0]["images"][view])
            np.testing.assert_array_equal(many[0]["proprio"][i], one[0]["proprio"])
            assert many[-1]["success"][i] == one[-1]["success"] and many[-1]["seed"][i] == one[-1]["seed"]
            assert [float(value[i]) for value in many[1:-1]] == [float(value) for value in one[1:-1]]
    make_env("eggplant_in_basket", obs_mode="none").close()  # whose robot stands lower: that of no other scene does
    assert env.unwrapped.agent.base_height == PLACES["table"].base_height != PLACES["sink"].base_height
    fresh, last = env.reset(seed=5)[0], seen[-1][0]
    for i, expected in ((0, fresh["proprio"]), (1, last["proprio"][1])):  # the second one goes on
        np.testing.assert_array_equal(again["proprio"][i], expected)
    np.testing.assert_array_equal(again["images"][view][0], fresh["images"][view])
    np.testing.assert_array_equal(again["images"][view][1], last["images"][view][1])
    env.close()

    vector.close()
    assert not any(process.is_alive() for process in processes)


def test_a_vector_of_an_unknown_task_is_refused_before_any_process_starts():
    with pytest.raises(ValueError, match="unknown task 'open_fridge'; did you mean"):
        make_vector_env("open_fridge")
