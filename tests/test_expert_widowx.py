"""The scripted expert of the WidowX tasks: it solves them, recovers, and its action follows from the state."""

from dataclasses import fields

import numpy as np
import pytest

pytest.importorskip("sapien")

import sapien
from scipy.spatial.transform import Rotation

from envs import make_env
from envs.expert import draw_style
from envs.expert_widowx import (
    JOBS,
    MAX_STEP,
    MAX_TURN,
    SPREAD,
    Style,
    WidowXExpert,
    grasp_yaw,
    hand_down,
    hand_yaw,
    keep_near,
)
from envs.scenes import hold_still
from envs.success import horizontal

pytestmark = pytest.mark.sim

TASKS = ("spoon_on_towel", "carrot_on_plate", "stack_cube", "eggplant_in_basket")


@pytest.fixture(scope="module")
def scenes():
    """One scene per task for all tests of this file."""
    envs = {task: make_env(task, obs_mode="none") for task in TASKS}
    yield envs
    for env in envs.values():
        env.close()


def drive(env, expert, steps: int, disturb=None) -> dict:
    """Let the expert act, with the motion disturb(t) (6,) or None in place of its own. -> info of the last step"""
    for t in range(steps):
        action, _ = expert.act()
        push = disturb(t) if disturb else None
        if push is not None:
            action[:6] = push
        _, _, _, truncated, info = env.step(action)
        if truncated:
            break
    return info


def solved(info) -> bool:
    return info["success"] and info["subgoals"]["object_grasped"]


@pytest.mark.parametrize(
    "task, episode, variation",
    [  # sources lying both ways, far and near
        ("spoon_on_towel", 0, 0),
        ("spoon_on_towel", 23, 1),
        ("carrot_on_plate", 13, 0),
        ("carrot_on_plate", 6, 1),
        ("stack_cube", 22, 0),
        ("stack_cube", 1, 1),
        ("eggplant_in_basket", 5, 1),
        ("eggplant_in_basket", 15, 0),  # at the wall of the sink
    ],
)
def test_solves_within_the_limit_and_success_lasts(scenes, task, episode, variation):
    env, sim = scenes[task], scenes[task].unwrapped
    env.reset(seed=0, options={"episode_id": episode})
    expert = WidowXExpert(env, np.random.default_rng(episode), variation)
    expert.reset()
    target = sim.things[sim.setup.target]
    start = np.array(target.pose.p)
    assert solved(drive(env, expert, sim.task.max_steps))
    assert horizontal(target.pose.p - start) < 0.01  # the target stays where it is
    action, done = expert.act()  # the hand has come home, open, and stays there
    assert not done and action[6] == 1
    assert np.linalg.norm(action[:3]) < 0.005 and np.linalg.norm(action[3:6]) < 0.05


@pytest.mark.parametrize("task", ["carrot_on_plate", "stack_cube"])
def test_recovers_from_pushes(scenes, task):
    env, rng = scenes[task], np.random.default_rng(7)

    def push(t):  # two of ten steps, 4 cm and 0.15 rad in a random direction
        if t % 10 < 8 or t > 35:
            return None
        direction = rng.normal(size=(2, 3))
        return (direction / np.linalg.norm(direction, axis=1, keepdims=True) * [[0.04], [0.15]]).ravel()

    env.reset(seed=0, options={"episode_id": 3})
    assert solved(drive(env, WidowXExpert(env, variation=0), 60, push))


@pytest.mark.parametrize("task", ["spoon_on_towel", "stack_cube"])
def test_tries_again_when_the_object_slips_away(scenes, task):
    env, sim = scenes[task], scenes[task].unwrapped
    env.reset(seed=0, options={"episode_id": 1})
    expert, start = WidowXExpert(env, variation=0), sim.object.pose
    while sim.object.pose.p[2] < start.p[2] + 0.02:
        env.step(expert.act()[0])
        assert int(sim._elapsed_steps[0]) < 25
    sim.object.set_pose(sapien.Pose(start.p - [0.03, 0, 0], start.q))
    hold_still(sim.object)
    drive(env, expert, 2)
    assert expert.act()[0][6] == 1  # shut around nothing: it opens
    assert solved(drive(env, expert, 60))


def test_stops_pushing_where_it_is_blocked(scenes):
    """The plate is held in the air over the carrot: the hand presses on it, its target stays near."""
    env, sim = scenes["carrot_on_plate"], scenes["carrot_on_plate"].unwrapped
    env.reset(seed=0, options={"episode_id": 0})
    expert, controller = WidowXExpert(env, variation=0), sim.agent.controller
    for _ in range(30):
        source = sim.object.pose.p
        sim.things[sim.setup.target].set_pose(sapien.Pose([source[0], source[1], 0.94]))
        hold_still(sim.things[sim.setup.target])
        env.step(expert.act()[0])
        assert np.linalg.norm(controller.last_target.p - controller.tcp_pose().p) < 0.1


def test_takes_over_and_sees_only_the_state(scenes):
    """An expert built in mid-episode gives, step for step, the actions of the one that was there from the start."""
    env = scenes["spoon_on_towel"]
    env.reset(seed=4)
    first, second = WidowXExpert(env, variation=0), None
    for t in range(40):
        second = WidowXExpert(env, variation=0) if t % 10 == 0 else second
        action, _ = first.act()
        np.testing.assert_array_equal(action, second.act()[0])
        np.testing.assert_array_equal(action, first.act()[0])
        env.step(action)


def test_actions_are_canonical_and_bounded(scenes):
    env = scenes["carrot_on_plate"]
    env.reset(seed=0, options={"episode_id": 1})  # the hand turns by a quarter
    expert = WidowXExpert(env, np.random.default_rng(2))
    expert.reset()
    for _ in range(30):
        action, _ = expert.act()
        assert action.shape == (7,) and action.dtype == np.float32
        assert np.linalg.norm(action[:3]) <= MAX_STEP * expert.style.speed + 1e-6
        assert np.linalg.norm(action[3:6]) <= MAX_TURN * expert.style.speed + 1e-6
        assert action[6] in (0, 1)
        env.step(action)


def test_the_hand_closes_across_the_object():
    np.testing.assert_allclose(hand_down(0).as_matrix(), [[0, 0, -1], [0, -1, 0], [-1, 0, 0]], atol=1e-12)
    for yaw in (-1.7, -0.3, 0.0, 0.4, 1.5):
        hand = hand_down(yaw)
        assert hand_yaw(hand) == pytest.approx(yaw)
        np.testing.assert_allclose(hand.apply([1, 0, 0]), [0, 0, -1], atol=1e-12)
    for job in JOBS.values():
        for degrees in range(0, 360, 7):
            axis = Rotation.from_euler("z", degrees, degrees=True).apply([1, 0, 0.2])
            yaw = grasp_yaw(axis, job)
            assert job.yaw_low <= yaw < job.yaw_low + 2 * np.pi / job.turns
            opening = hand_down(yaw).apply([0, 1, 0])
            across = [opening @ axis, np.cross(opening, axis)[2]] if job.turns == 4 else [opening @ axis]
            assert min(np.abs(across)) < 1e-9


def test_a_target_is_kept_near_the_hand():
    np.testing.assert_array_equal(keep_near(np.array([0.02, 0, 0]), np.array([0.03, 0, 0]), 0.08), [0.02, 0, 0])
    np.testing.assert_allclose(keep_near(np.array([0.02, 0, 0]), np.array([0.07, 0, 0]), 0.08), [0.01, 0, 0])
    np.testing.assert_allclose(keep_near(np.array([0.02, 0, 0]), np.array([0.2, 0, 0]), 0.08), [-0.02, 0, 0])


def test_styles():
    assert draw_style(Style, SPREAD, np.random.default_rng(0), variation=0) == Style()
    a, b = (draw_style(Style, SPREAD, np.random.default_rng(1)) for _ in range(2))
    assert a == b != draw_style(Style, SPREAD, np.random.default_rng(2))
    assert set(SPREAD) | {"speed"} == {field.name for field in fields(Style)}
    styles = [draw_style(Style, SPREAD, np.random.default_rng(seed)) for seed in range(100)]
    for name, half in SPREAD.items():
        assert all(abs(getattr(style, name) - getattr(Style, name)) <= half for style in styles)
    assert all(0.7 <= style.speed <= 1.1 for style in styles)
