"""The scripted expert of the Google robot's table tasks: it solves them, recovers, and acts on the state alone."""

from itertools import pairwise

import numpy as np
import pytest

pytest.importorskip("sapien")

from envs import make_env
from envs.expert import DIRECTIONS, chords, draw_style, make_expert, opening_across, shadows
from envs.expert_tabletop import TABLE_SPREAD, TableStyle, TabletopExpert

pytestmark = pytest.mark.sim


@pytest.fixture(scope="module")
def scenes():
    """One scene per task for all tests of this file."""
    envs = {task: make_env(task, obs_mode="none") for task in ("pick_object", "move_near")}
    yield envs
    for env in envs.values():
        env.close()


def drive(env, expert, steps: int, push=None) -> dict:
    """Let the expert act until it succeeds, with the motion push(t) (6,) in place of its own where there is one."""
    info = {"success": False}
    for t in range(steps):
        action, _ = expert.act()
        if push is not None and push(t) is not None:
            action[:6] = push(t)
        _, _, _, truncated, info = env.step(action)
        if info["success"] or truncated:
            break
    return info


@pytest.mark.parametrize("orientation", ["upright", "laid_vertically", "lr_switch"])
@pytest.mark.parametrize("model", ["opened_coke_can", "sponge", "apple"])
def test_picks_what_lies_and_what_stands(scenes, model, orientation):
    env = scenes["pick_object"]
    env.reset(seed=2, options={"model": model, "orientation": orientation})
    expert = make_expert(env, np.random.default_rng(0))
    expert.reset()
    assert isinstance(expert, TabletopExpert)
    info = drive(env, expert, 80)
    assert info["success"] and info["subgoals"]["object_grasped"]


@pytest.mark.parametrize("seed", [0, 1])
def test_moves_near_and_lets_go(scenes, seed):
    env = scenes["move_near"]
    env.reset(seed=seed)
    expert = make_expert(env, np.random.default_rng(seed))
    expert.reset()
    for _ in range(80):  # to the end of the episode: success lasts
        *_, info = env.step(expert.act()[0])
    assert info["success"] and info["subgoals"]["object_grasped"]
    assert env.unwrapped.agent.closedness() < 0.1


def test_recovers_from_pushes(scenes):
    env, rng = scenes["pick_object"], np.random.default_rng(0)
    env.reset(seed=3, options={"model": "opened_pepsi_can", "orientation": "laid_vertically"})
    pushes = {t: np.concatenate([rng.uniform(-0.08, 0.08, 3), rng.uniform(-0.3, 0.3, 3)]) for t in (6, 7, 14, 15, 18)}
    assert drive(env, make_expert(env, variation=0), 80, pushes.get)["success"]


def test_takes_over_and_sees_only_the_state(scenes):
    env = scenes["pick_object"]
    env.reset(seed=4)
    first = make_expert(env, np.random.default_rng(4))
    first.reset()
    for _ in range(8):
        env.step(first.act()[0])
    second = make_expert(env)
    second.style = first.style
    for _ in range(12):
        action = second.act()[0]
        for again in (second, first):
            np.testing.assert_array_equal(action, again.act()[0])
        env.step(action)


def test_styles_stay_within_their_spread_and_differ():
    assert draw_style(TableStyle, TABLE_SPREAD, np.random.default_rng(0), 0) == TableStyle()
    styles = [draw_style(TableStyle, TABLE_SPREAD, np.random.default_rng(seed)) for seed in range(50)]
    for name, half in TABLE_SPREAD.items():
        values = np.array([getattr(style, name) for style in styles]) - getattr(TableStyle(), name)
        assert np.abs(values).max() <= half and values.std() > half / 4
    assert all(a != b for a, b in pairwise(styles))


@pytest.mark.parametrize("turn", [0.0, 0.4, 1.2])
def test_the_hand_opens_across_the_narrow_side(turn):
    """A box of 10 by 4 cm turned by `turn`."""
    axes = np.array([[np.cos(turn), np.sin(turn), 0], [-np.sin(turn), np.cos(turn), 0]])
    signs, center = np.array([(a, b) for a in (-1, 1) for b in (-1, 1)]), np.array([0.3, -0.1, 0.9])
    corners = center + signs @ (axes * [[0.05], [0.02]])
    across = np.abs(axes[:, :2] @ DIRECTIONS)  # (2, K)
    np.testing.assert_allclose(shadows(corners), 0.1 * across[0] + 0.04 * across[1], atol=1e-9)
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(chords(corners, center), np.minimum(0.1 / across[0], 0.04 / across[1]), atol=1e-9)
    for widths in (shadows(corners), chords(corners, center)):
        assert abs(opening_across(widths, wanted=0.0, allowed=1.001) @ axes[1]) > 0.998  # they are 2.5 degrees apart
        free = opening_across(widths, wanted=0.7, allowed=10.0)  # anything goes: the wanted one
        assert np.arctan2(free[1], free[0]) == pytest.approx(0.7, abs=0.03)
