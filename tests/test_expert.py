"""The scripted expert: it solves the tasks, sees nothing but the state, and recovers."""

from dataclasses import fields

import numpy as np
import pytest

pytest.importorskip("sapien")

from envs import make_env
from envs.expert import MAX_STEP, MAX_TURN, SPREAD, Expert, Style, draw_style

pytestmark = pytest.mark.sim


@pytest.fixture(scope="module")
def scene():
    """One open-and-place scene for all tests of this file: building one takes seconds."""
    env = make_env("open_and_place", obs_mode="none")
    yield env
    env.close()


def drive(env, expert, steps: int, disturb=None):
    """Let the expert act for at most `steps` control steps; disturb(t) may replace the motion. -> info, steps taken"""
    info = {}
    for t in range(steps):
        action, done_subtask = expert.act()
        if done_subtask:
            env.unwrapped.advance_to_next_subtask()
        push = disturb(t) if disturb else None
        if push is not None:
            action[:6] = push
        _, _, terminated, truncated, info = env.step(action)
        if terminated or truncated:
            return info, t + 1
    return info, steps


def solved(info) -> bool:
    """Success that was earned in this episode: drawer opened, apple grasped, apple placed."""
    return info["success"] and all(info["subgoals"].values())


def random_pushes(seed: int, first: int, last: int):
    """Bursts of 1 to 4 steps of random motion, up to 4 cm and 0.15 rad, about 30% of the steps in [first, last)."""
    rng, left, push = np.random.default_rng(seed), 0, None

    def disturb(t):
        nonlocal left, push
        if not first <= t < last:
            return None
        if left == 0 and rng.random() < 0.14:
            left = rng.integers(1, 5)
            direction = rng.normal(size=(2, 3))
            push = (direction / np.linalg.norm(direction, axis=1, keepdims=True) * [[0.04], [0.15]]).ravel()
        left, active = max(left - 1, 0), left > 0
        return push if active else None

    return disturb


@pytest.mark.parametrize("seed", [0, 1, 3])  # robot poses a0, b0, c0
def test_opens_and_places(scene, seed):
    scene.reset(seed=seed)
    expert = Expert(scene, np.random.default_rng(seed))
    expert.reset()
    info, steps = drive(scene, expert, 200)
    assert solved(info)
    assert steps < 140


@pytest.mark.parametrize("task", ["open_bottom_drawer", "close_middle_drawer"])
def test_drawers(task):
    env = make_env(task, obs_mode="none")
    for pose in ("a2", "c2"):  # the far corners
        env.reset(seed=0, options={"pose": pose, "urdf_version": ""})
        info, _ = drive(env, Expert(env, variation=0), 113)
        assert info["success"], (task, pose)
    env.close()


def test_recovers_from_pushes(scene):
    scene.reset(seed=5)
    info, _ = drive(scene, Expert(scene, variation=0), 200, random_pushes(5, 0, 200))
    assert solved(info)


def test_takes_over_and_sees_only_the_state(scene):
    """An expert built in mid-episode gives, step for step, the actions of the one that was there from the start."""
    scene.reset(seed=4)
    first = Expert(scene, np.random.default_rng(4))
    first.reset()
    drive(scene, first, 20, random_pushes(4, 5, 20))
    second = Expert(scene)
    second.style = first.style
    for _ in range(60):
        action, done = second.act()
        for again in (second.act(), first.act()):
            np.testing.assert_array_equal(action, again[0])
            assert done == again[1]
        if done:
            scene.unwrapped.advance_to_next_subtask()
        _, _, terminated, _, info = scene.step(action)
        if terminated:
            break
    if not terminated:
        info, _ = drive(scene, second, 100)
    assert solved(info)


def test_waits_for_the_second_instruction_and_opens_first_if_it_comes_early(scene):
    scene.reset(seed=1)
    expert = Expert(scene, variation=0)
    scene.unwrapped.advance_to_next_subtask()  # "place ..." while the drawer is shut
    closed = [expert.act()[0][6]]
    while scene.unwrapped.drawer_qpos() < 0.2:
        scene.step(expert.act()[0])
        assert int(scene.unwrapped._elapsed_steps[0]) < 80
    assert closed == [0] and not scene.unwrapped.judge.grasped

    scene.unwrapped.subtask = 0  # told to open what is open: go home and hold still with open fingers
    for _ in range(35):
        scene.step(expert.act()[0])
    action, done = expert.act()
    assert done and action[6] == 1
    assert np.linalg.norm(action[:3]) < 0.01 and np.linalg.norm(action[3:6]) < 0.05


def test_retries_when_the_drawer_is_pushed_shut(scene):
    scene.reset(seed=1)
    sim, expert = scene.unwrapped, Expert(scene, variation=0)
    while not expert.act()[1]:
        scene.step(expert.act()[0])
    sim.cabinet.set_qpos(np.zeros(3, dtype=np.float32))
    assert not expert.act()[1]
    info, _ = drive(scene, expert, 140)
    assert solved(info)


def test_actions_are_canonical_and_bounded(scene):
    scene.reset(seed=2)
    expert = Expert(scene, np.random.default_rng(2))
    for _ in range(30):
        action, done = expert.act()
        assert action.shape == (7,) and action.dtype == np.float32 and isinstance(done, bool)
        assert np.linalg.norm(action[:3]) <= MAX_STEP * expert.style.speed + 1e-6
        assert np.linalg.norm(action[3:6]) <= MAX_TURN * expert.style.speed + 1e-6
        assert action[6] in (0, 1)
        scene.step(action)


def test_styles():
    assert draw_style(Style, SPREAD, np.random.default_rng(0), variation=0) == Style()
    a, b = (draw_style(Style, SPREAD, np.random.default_rng(1)) for _ in range(2))
    assert a == b != draw_style(Style, SPREAD, np.random.default_rng(2))
    styles = [draw_style(Style, SPREAD, np.random.default_rng(seed)) for seed in range(200)]
    assert set(SPREAD) | {"speed"} == {field.name for field in fields(Style)}
    for name, half in SPREAD.items():
        values = [getattr(style, name) for style in styles]
        middle = getattr(Style(), name)
        assert middle - half <= min(values) < middle - 0.8 * half and middle + 0.8 * half < max(values) <= middle + half
    assert 0.7 <= min(s.speed for s in styles) < 0.75 and 1.05 < max(s.speed for s in styles) <= 1.1
