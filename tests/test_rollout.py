"""Rollouts, disturbances, mixed driving, protocols."""

import numpy as np
import pytest
from fakes import FIRST, FORCED, LIMIT, SECOND, LineEnv, LineExpert

from envs import protocol as protocols
from envs.protocol import make_protocol, protocol_hash
from envs.rollout import BURST_METRES, BURST_RADIANS, Demonstrator, HoldStill, draw_bursts, rollout


class Forward:
    """A learned policy, as far as rollout can tell: it never declares a subtask done."""

    def __init__(self, size=0.1, until=99):
        self.size, self.until = size, until

    def reset(self, instruction=""):
        self.instruction, self.step = instruction, 0

    def act(self, observation):
        self.step += 1
        return np.array([self.size * (self.step <= self.until), 0, 0, 0, 0, 0, 1], np.float32)


def demonstrator(env, seed=1, **kwargs):
    return Demonstrator(LineExpert(env), np.random.default_rng(seed), **kwargs)


def test_success_does_not_end_an_episode_and_the_last_step_decides():
    class Returns(Forward):  # reaches the goal, then leaves it
        def act(self, observation):
            return super().act(observation) * (1 if self.step < LIMIT - 5 else -1)

    env = LineEnv()
    episode = rollout(env, Returns(), seed=1)
    assert episode.steps == LIMIT == len(episode.frames) == len(episode.proprio) == len(episode.instructions)
    assert episode.success_any and episode.success_final  # far past the goal
    episode = rollout(env, Returns(size=0.02), seed=1)
    assert episode.success_any and not episode.success_final
    assert episode.subgoals == {"drawer_opened": True, "object_placed": False}
    assert env.options == {"reconfigure": True}


def test_learned_policies_wait_for_the_forced_instruction():
    episode = rollout(LineEnv(), Forward(), seed=1)
    assert episode.advance_at == FORCED
    assert episode.instructions == ["open"] * (FORCED + 1) + ["place"] * (LIMIT - FORCED - 1)


def test_rows_hold_what_was_seen_before_the_action():
    episode = rollout(LineEnv(), Forward(until=3), seed=1)
    np.testing.assert_allclose(episode.proprio[:5, 0], [0, 0.1, 0.2, 0.3, 0.3], atol=1e-6)
    assert episode.frames[2, 0, 0, 0] == 20
    assert episode.executed.dtype == episode.action.dtype == episode.proprio.dtype == np.float32
    np.testing.assert_array_equal(episode.executed, episode.action)


@pytest.mark.parametrize("hold", [0, 4])
def test_the_expert_ends_its_subtask_after_a_wait(hold):
    env = LineEnv()
    player = demonstrator(env, hold=hold)
    episode = rollout(env, player, seed=1, linger=2)
    there = int(np.argmax(episode.proprio[:, 0] >= FIRST - 1e-6))
    assert episode.advance_at == there + player.wait
    assert episode.instructions.index("place") == episode.advance_at + 1
    assert np.abs(episode.executed[there : there + player.wait, 0]).max(initial=0) < 1e-6


def test_demonstrations_end_some_steps_after_success():
    env = LineEnv()
    episode = rollout(env, demonstrator(env), seed=1, linger=5)
    reached = int(np.argmax(episode.proprio[:, 0] >= SECOND - 1e-6))
    assert episode.success_final and episode.steps == reached + 5
    assert rollout(env, demonstrator(env), seed=7, linger=5).steps == LIMIT  # a failure runs to the limit


def test_disturbed_episodes_keep_the_experts_label():
    env = LineEnv()
    episode = rollout(env, demonstrator(env, disturbance=1.0), seed=1)
    goal = np.where(np.array(episode.instructions) == "open", FIRST, SECOND)
    label = np.clip(goal - episode.proprio[:, 0], -0.1, 0.1)
    np.testing.assert_allclose(episode.action[:, 0], label, atol=1e-6)
    assert (episode.action[:, 1:6] == 0).all() and (episode.action[:, 6] == 1).all()
    moved = np.linalg.norm(episode.executed[:, 3:6], axis=1)
    assert (moved > 0).all()  # noise everywhere, the bursts above it
    again = rollout(env, demonstrator(env, disturbance=1.0), seed=1)
    np.testing.assert_array_equal(episode.executed, again.executed)


def test_undisturbed_demonstrations_execute_the_label():
    env = LineEnv()
    episode = rollout(env, demonstrator(env, disturbance=0.0), seed=1)
    np.testing.assert_array_equal(episode.executed, episode.action)


def test_bursts_stay_within_their_limits():
    drawn = [draw_bursts(np.random.default_rng(seed)) for seed in range(200)]
    motions = np.array([motion for bursts in drawn for motion, _ in bursts.values()])
    metres, radians = np.linalg.norm(motions[:, :3], axis=1), np.linalg.norm(motions[:, 3:], axis=1)
    assert 0.9 * BURST_METRES < metres.max() <= BURST_METRES
    assert 0.9 * BURST_RADIANS < radians.max() <= BURST_RADIANS
    flips = [flip for bursts in drawn for _, flip in bursts.values()]
    assert 0.1 < np.mean(flips) < 0.3


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_a_driver_executes_and_the_expert_labels(fraction):
    env = LineEnv()
    episode = rollout(env, demonstrator(env, driver=Forward(size=-0.05), driver_fraction=fraction), seed=1)
    if fraction == 1.0:
        assert (episode.executed[:, 0] == np.float32(-0.05)).all()
        np.testing.assert_allclose(episode.action[:, 0], 0.1, atol=1e-6)  # the way back, from every state
        assert not episode.success_any
    else:
        assert episode.success_final


def test_a_mixed_episode_has_stretches_of_both():
    env = LineEnv(limit=400)
    episode = rollout(env, demonstrator(env, driver=Forward(size=-0.05), driver_fraction=0.5), seed=1)
    driven = episode.executed[:, 0] == np.float32(-0.05)
    assert 0.2 < driven.mean() < 0.8
    assert np.count_nonzero(np.diff(driven)) < 40  # stretches, not single steps


def test_holding_still_is_an_action_that_does_nothing():
    episode = rollout(LineEnv(), HoldStill(), seed=1)
    assert not episode.success_any and (episode.proprio[:, 0] == 0).all()
    assert (episode.executed == [0, 0, 0, 0, 0, 0, 1]).all()


def test_equal_measurements_have_equal_hashes():
    protocol = make_protocol("open_and_place", "random", 10000, 50)
    assert protocol == make_protocol("google_robot_place_apple_in_closed_top_drawer", "random", 10000, 50)
    assert protocol_hash(protocol) == protocol_hash(dict(reversed(protocol.items())))
    assert len(protocol_hash(protocol)) == 12


@pytest.mark.parametrize(
    "other",
    [
        dict(count=51),
        dict(first_seed=0),
        dict(task="open_top_drawer"),
        dict(width=320, height=256),
        dict(shader="rt"),
        dict(simulator="upstream"),
        dict(protocol="visual_matching"),
        dict(protocol="variant_aggregation"),
    ],
)
def test_other_measurements_have_other_hashes(other):
    usual = dict(task="open_and_place", protocol="random", first_seed=10000, count=50)
    assert protocol_hash(make_protocol(**usual | other)) != protocol_hash(make_protocol(**usual))


def test_an_unknown_task_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="unknown task 'open_fridge'; did you mean"):
        make_protocol("open_fridge", "random", 0, 1)


def test_the_protocol_states_what_the_scene_does():
    from envs import google_robot, simpler, success, widowx

    for name, module, robot in (
        ("google_robot", google_robot, google_robot.GoogleRobot),
        ("widowx", widowx, widowx.WidowX),
    ):
        assert protocols.RATES[name] == (module.CONTROL_FREQ, module.SIM_FREQ) == (robot.control_freq, robot.sim_freq)
        assert protocols.PICTURE_SIZES[name] == robot.picture_size
    assert protocols.FORCED_ADVANCE == simpler.FORCED_ADVANCE
    ours = (protocols.OPEN_QPOS, protocols.CLOSED_QPOS, protocols.PLACED_QPOS)
    assert ours == (success.OPEN_QPOS, success.CLOSED_QPOS, success.PLACED_QPOS)
