"""The scene against upstream's numbers: controller, draws, rest positions, subtasks, pictures."""

import json
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import sapien

from envs import make_env
from envs.rollout import rollout
from envs.tasks import TASKS, get_task, next_episode_seed

VECTORS = json.loads((Path(__file__).parent / "simpler_vectors.json").read_text())  # made by upstream
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


# -- draws, without a scene --------------------------------------------------------------------------------------------


def test_unseeded_episodes_follow_upstreams_chain():
    seed, chain = 2022, []
    for _ in VECTORS["seed_chain"]:
        chain.append(seed := next_episode_seed(seed))
    assert chain == VECTORS["seed_chain"]


@pytest.mark.parametrize("task", VECTORS["reset_draws"])
def test_a_seed_draws_upstreams_episode(task):
    for expected in VECTORS["reset_draws"][task]:
        drawn = get_task(task).draw(expected["episode_seed"])
        assert (drawn["pose"], drawn["urdf_version"]) == (expected["overlay"], expected["urdf_version"])
        if "obj_init_xy" in expected:
            np.testing.assert_array_equal(drawn["object_xy"], expected["obj_init_xy"])


def test_every_task_is_registered_under_both_names():
    for task in TASKS:
        for name in (task.short, task.name):
            assert gym.spec(f"simpler/{name}-v0").max_episode_steps == (200 if task.kind == "place" else 113)
    with pytest.raises(ValueError, match="unknown task 'open_fridge'; known: open_and_place, open_top_drawer"):
        make_env("open_fridge")


# -- the scene ---------------------------------------------------------------------------------------------------------


@pytest.mark.sim
def test_the_controller_moves_the_joints_as_upstream_does(scene):
    trajectory, names = VECTORS["controller"]["trajectory"], VECTORS["controller"]["qpos_order"]
    scene.reset(seed=0, options=FAR)
    controller = scene.agent.controller
    order = [controller.names.index(name) for name in names]
    arm = [i for i, name in enumerate(names) if "finger" not in name]
    np.testing.assert_allclose(controller.tcp_pose().p, trajectory[0]["tcp_p"], atol=2e-6)
    for row in trajectory[1:]:
        scene.step(np.array(row["action"]))
        qpos = scene.agent.body.qpos[order]
        np.testing.assert_allclose(qpos[arm], np.array(row["qpos"])[arm], atol=2e-3, err_msg=f"step {row['step']}")
        np.testing.assert_allclose(controller.tcp_pose().p, row["tcp_p"], atol=1e-3, err_msg=f"step {row['step']}")


@pytest.mark.sim
def test_unseeded_resets_continue_the_chain(scene):
    scene.reset(seed=2022)
    for expected in VECTORS["reset_draws"]["google_robot_place_apple_in_closed_top_drawer"][:3]:
        scene.reset()
        assert scene.episode_seed == expected["episode_seed"]
        assert scene.episode["pose"] == expected["overlay"]
        np.testing.assert_allclose(scene.object.pose.p[:2], expected["obj_init_xy"], atol=5e-3)


@pytest.mark.sim
def test_the_apple_comes_to_rest_where_upstreams_does(scene):
    expected = VECTORS["apple_on_cabinet_top"]
    scene.reset(seed=0, options={"object_xy": expected["xy"]})
    assert np.linalg.norm(scene.object.pose.p - expected["settled_p"]) < 1e-4
    np.testing.assert_allclose(scene.object.pose.q, expected["settled_q"], atol=1e-3)
    for _ in range(3):  # and stays there in the robot's scene
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
    assert scene.episode["urdf_version"] == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"posture": "a0"}, r"unknown reset options \['posture'\]; known: pose"),
        ({"pose": "z9"}, "unknown robot pose 'z9'; known: a0"),
        ({"urdf_version": "blue"}, "unknown urdf_version 'blue'"),
    ],
)
@pytest.mark.sim
def test_wrong_reset_options_are_refused(scene, options, message):
    with pytest.raises(ValueError, match=message):
        scene.reset(seed=0, options=options)


@pytest.mark.sim
def test_gripper_openings_survive_the_way_to_upstream_and_back(canonical):
    from envs.simpler import from_upstream, to_upstream

    observation, _ = canonical.reset(seed=0, options=FAR)
    assert observation["proprio"][9] > 0.99
    for opening in (0.0, 0.0, 0.0, 0.0, 0.4, 0.4, 1.0, 1.0, 1.0):
        action = np.array([0.01, 0, 0, 0, 0.02, 0, opening], np.float32)
        angle = canonical.sim.agent.controller.finger_angle()
        np.testing.assert_allclose(from_upstream(to_upstream(action, canonical.sim), angle), action, atol=1e-6)
        before, observation = observation, canonical.step(action)[0]
        if opening == 0.0:
            assert observation["proprio"][9] < before["proprio"][9] - 0.01 or observation["proprio"][9] < 0.2
    assert observation["proprio"][9] > 0.95
    assert observation["proprio"].dtype == np.float32 and observation["proprio"].shape == (10,)


@pytest.mark.parametrize("action", [np.full(7, np.nan), np.array([0, 0, np.inf, 0, 0, 0, 1]), np.zeros(6)])
@pytest.mark.sim
def test_actions_that_are_not_seven_numbers_are_refused(canonical, action):
    canonical.reset(seed=0)
    with pytest.raises(ValueError, match="action must be 7 finite numbers"):
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


@pytest.mark.sim
def test_opening_a_drawer_is_judged_by_upstreams_threshold(scene):
    scene.reset(seed=0, options=FAR)
    qpos = np.zeros(len(scene.drawers), np.float32)
    for opening, opened in ((0.149, False), (0.151, True), (0.1, True)):  # the subgoal stays reached
        qpos[scene.drawers.index("top")] = opening
        scene.cabinet.set_qpos(qpos)
        result = scene.evaluate()
        assert result["subgoals"]["drawer_opened"] == opened
        assert not result["success"].item()  # the apple is still on top


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
