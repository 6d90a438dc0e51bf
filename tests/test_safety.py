"""Limits and refusals with known answers."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from policies.safety import Guard, Limits, Refused, fade, refuse_age, refuse_rate, unchanged
from selfflow_robot.codec import CodecConfig
from selfflow_robot.tokens import Layout, Packer

LIMITS = Limits(fps=10, speed=0.5, turn=1.0)  # 5 cm and 0.1 rad per step
BOXED = Limits(fps=10, speed=10, turn=10, workspace=([0, -0.5, 0.1], [1, 0.5, 0.6]))


def action(*motion, gripper=1.0):
    return np.array([*motion, *[0] * (6 - len(motion)), gripper], np.float32)


def proprio(x=0.5, y=0.0, z=0.3):
    return np.array([x, y, z, 1, 0, 0, 0, 1, 0, 1], np.float32)


def test_limits_come_from_the_quantiles_of_the_training_actions():
    low, high = np.array([-0.02, -0.03, 0.01, -0.1, 0, 0, 0.0]), np.array([0.01, 0.04, 0.12, 0.1, 0, 0, 1.0])
    stats = {"action": {"q01": low, "q99": high}, "proprio": {"mean": np.zeros(10), "std": np.ones(10)}}
    packer = Packer(Layout(fps=5), CodecConfig(luma=4, chroma=2)).fit_statistics(stats)
    limits = Limits.of(packer, margin=1.5)
    assert limits.fps == 5
    assert limits.speed == pytest.approx(1.5 * 5 * np.sqrt(0.02**2 + 0.04**2 + 0.12**2), rel=1e-6)
    assert limits.turn == pytest.approx(1.5 * 5 * 0.1, rel=1e-6)  # two axes never varied
    within = packer.denormalise_action(torch.rand(200, 7) * 2 - 1).numpy()
    within[:, 4:6] = 0  # as in the data
    for a in within:
        assert limits.limit(a, proprio())[1] == []


def test_a_checkpoint_without_statistics_gives_no_limits():
    with pytest.raises(ValueError, match="no action statistics"):
        Limits.of(Packer(Layout(), CodecConfig(luma=4, chroma=2)))


def test_what_is_within_the_limits_passes_to_the_bit():
    given = action(0.03, -0.02, 0.01, 0.05, 0.05, 0, gripper=0.3)
    got, reasons = LIMITS.limit(given, proprio())
    assert got.tobytes() == given.tobytes() and reasons == [] and got is not given


def test_too_fast_becomes_slower_in_the_same_direction():
    got, reasons = LIMITS.limit(action(0.06, 0.08, 0, 0, 0, 0.4), proprio())
    assert np.allclose(got, action(0.03, 0.04, 0, 0, 0, 0.1))  # 5 of 10 cm; 0.1 of 0.4 rad
    assert reasons == ["speed: 1.000 m/s, at most 0.500", "turn: 4.000 rad/s, at most 1.000"]


def test_the_workspace_stops_the_axis_that_would_leave_it():
    got, reasons = BOXED.limit(action(0.1, 0, -0.05), proprio(0.95, 0, 0.3))
    assert np.allclose(got, action(0.05, 0, -0.05)) and reasons == ["workspace: x would be 1.050 m"]
    assert BOXED.limit(action(0.1, 0.1, 0.1), proprio(0.5, 0, 0.3))[1] == []


def test_outside_the_workspace_nothing_pulls_and_only_the_way_back_is_open():
    outside = proprio(1.2, 0, 0.05)
    assert np.allclose(BOXED.limit(action(), outside)[0], action())
    assert np.allclose(BOXED.limit(action(0.1, 0, -0.1), outside)[0], action(0, 0, 0))
    back, reasons = BOXED.limit(action(-0.1, 0.1, 0.1), outside)
    assert np.allclose(back, action(-0.1, 0.1, 0.1)) and reasons == []


def test_the_gripper_stays_between_closed_and_open():
    assert LIMITS.limit(action(gripper=1.2), proprio())[0][6] == 1
    got, reasons = LIMITS.limit(action(gripper=-0.5), proprio())
    assert got[6] == 0 and reasons == ["gripper: -0.500"]


@pytest.mark.parametrize("wrong", [np.full(7, np.nan), action(np.inf), np.zeros(6), np.zeros(7, int), None])
def test_what_is_no_action_is_refused(wrong):
    with pytest.raises(Refused, match="action"):
        LIMITS.limit(wrong, proprio())


def test_what_is_no_proprioception_is_refused():
    with pytest.raises(Refused, match="proprio: not finite"):
        LIMITS.limit(action(), proprio(z=np.nan))


@pytest.mark.parametrize(
    "settings",
    [{"fps": 0}, {"speed": -1}, {"speed": 0, "turn": 0}, {"speed": np.nan}, {"workspace": ([0, 0, 0], [1, 0, 1])}],
)
def test_limits_that_make_no_sense_are_refused(settings):
    with pytest.raises(ValueError):
        Limits(**({"fps": 3, "speed": 1, "turn": 1} | settings))


def test_fading_holds_or_slows_down_and_keeps_the_gripper():
    moving = action(0.04, 0, 0, 0, 0, 0.2, gripper=0.0)
    assert np.array_equal(fade(moving), action(gripper=0.0))
    slow = fade(fade(moving, 0.5), 0.5)
    assert np.allclose(slow, action(0.01, 0, 0, 0, 0, 0.05, gripper=0.0)) and slow.dtype == np.float32


@pytest.mark.parametrize(("age", "stale"), [(0, False), (0.199, False), (0.201, True), (-0.05, False), (-0.2, True)])
def test_observations_older_than_two_periods_are_refused(age, stale):
    if stale:
        with pytest.raises(Refused, match="stale"):
            refuse_age(100 - age, 100, period=0.1)
    else:
        refuse_age(100 - age, 100, period=0.1)


def test_a_time_that_is_none_is_refused():
    with pytest.raises(Refused, match="stale"):
        refuse_age(np.nan, 100, period=0.1)


def test_counts_for_how_long_a_picture_has_stayed_the_same():
    a, b, steps, before, counts = np.zeros((2, 2, 3)), np.ones((2, 2, 3)), 0, None, []
    for image in (a, a, a, b, b, a):
        steps, before = unchanged(steps, before, image), image
        counts.append(steps)
    assert counts == [0, 1, 2, 0, 1, 0]


def seen(value):
    return {"images": {"overhead": np.full((2, 2, 3), value, np.uint8)}, "proprio": proprio(), "instruction": "go"}


def test_a_frozen_camera_is_refused_until_it_moves_again():
    guard = Guard(lambda observation: None, "overhead", period=0.1, frozen=3)
    refused = []
    shared = seen(0)  # a driver that writes into one buffer
    for value in (1, 2, 2, 2, 2, 2, 3, 3):
        shared["images"]["overhead"][:] = value
        try:
            guard.inspect(shared, 0, 0)
            refused.append(False)
        except Refused as error:
            assert "frozen" in str(error)
            refused.append(True)
    assert refused == [False] * 4 + [True, True] + [False] * 2
    still = Guard(lambda observation: None, "overhead", period=0.1, frozen=None)
    for _ in range(20):
        still.inspect(seen(0), 0, 0)


def test_the_planner_says_what_does_not_fit():
    def check(observation):
        if observation["proprio"].shape != (10,):
            raise ValueError("proprio: expected (10,)")

    guard = Guard(check, "overhead", period=0.1)
    with pytest.raises(Refused, match="expected"):
        guard.inspect(seen(0) | {"proprio": np.zeros(3)}, 0, 0)
    with pytest.raises(Refused, match="observation lacks 'proprio'"):
        guard.inspect({"images": {}}, 0, 0)
    with pytest.raises(Refused):
        guard.inspect(seen(0) | {"proprio": None}, 0, 0)


def test_a_robot_of_another_rate_is_refused():
    layout = SimpleNamespace(fps=3)
    refuse_rate(layout.fps, 3, 3.0)
    refuse_rate(layout.fps, 50, None)  # a simulator steps when it is told to
    with pytest.raises(ValueError, match="would move 5 times as fast"):
        refuse_rate(layout.fps, 15, 15)
    with pytest.raises(ValueError, match="robot takes commands at 15 Hz"):
        refuse_rate(layout.fps, 3, 15)
