"""Real-time chunking with planners whose latency is an event, not a sleep; and the measurements' arithmetic."""

import threading
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest

from experiments.realtime import bootstrap, commanded, drive, jitter, jumps, make_policy, measure_smoothness
from policies.chunking import ChunkedPolicy
from policies.flow_policy import FlowPolicy, Plan
from policies.realtime import DeadlineMissed, Holding, RealTimePolicy, ticks
from selfflow_robot.data import open_dataset
from tests.synthetic import LAYOUT, make_batch, make_model, make_packer, write_dataset

HORIZON = 8


class Planner:
    """Action i of the chunk begun at step s: [s, i, seen, 0, 0, 0, 1], `seen` the number in the observation; the
    committed ones first. `gate`: plans wait for it; `fault`: raised, or given instead of the actions, once."""

    def __init__(self, horizon=HORIZON, past=(0,)):
        self.layout = SimpleNamespace(horizon=horizon, past=past)
        self.gate = threading.Event()
        self.gate.set()
        self.requests, self.fault = [], None

    def check(self, observation):
        if observation["proprio"] < 0:
            raise ValueError("negative")

    def plan(self, history, key, committed=None):
        self.requests.append(([o["proprio"] for o in history], key, committed))
        assert self.gate.wait(10)
        fault, self.fault = self.fault, None
        if isinstance(fault, Exception):
            raise fault
        if fault is not None:
            return Plan(fault, None)
        actions = np.zeros((self.layout.horizon, 7), np.float32)
        actions[:, 0], actions[:, 1], actions[:, 2], actions[:, 6] = (
            key[1],
            range(len(actions)),
            history[-1]["proprio"],
            1,
        )
        if committed is not None:
            actions[: len(committed)] = committed
        return Plan(actions, None)


def observation(number, instruction="open"):
    return {"images": {}, "proprio": number, "instruction": instruction}


def acts(policy, numbers, instruction="open"):
    """(chunk begun at, index) of each action; None where the deadline was missed."""
    found = []
    for number in numbers:
        try:
            action = policy.act(observation(number, instruction))
            found.append((int(action[0]), int(action[1])))
        except DeadlineMissed:
            found.append(None)
    return found


def settle(policy):
    """Waits until the background is idle."""
    with policy.condition:
        assert policy.condition.wait_for(lambda: policy.pending is None or policy.pending.done, 10)


@pytest.fixture
def planner():
    planner = Planner()
    yield planner
    planner.gate.set()


@pytest.fixture
def threaded(planner):
    with RealTimePolicy(planner, fps=10, execute=4, delay=2) as policy:
        yield policy
        planner.gate.set()


# ------------------------------------------------------------------------------------------------ taking over


def test_takes_over_at_the_step_the_actions_were_made_for(planner):
    policy = RealTimePolicy(planner, 3, execute=4, delay=2, threaded=False)
    found = acts(policy, range(14))
    # begun at 4, 8, 12 with the observation of that moment; the two actions that follow are the running chunk's
    assert found == [(0, i) for i in range(6)] + [(4, i) for i in range(2, 6)] + [(8, i) for i in range(2, 6)]
    seen, keys, committed = zip(*planner.requests)
    assert seen == ([0], [4], [8], [12]) and keys == ((0, 0), (0, 4), (0, 8), (0, 12))
    assert committed[0] is None and [[int(a[0]), int(a[1])] for a in committed[2]] == [[4, 4], [4, 5]]


def test_naive_switching_changes_chunks_at_the_same_moments_and_commits_nothing(planner):
    policy = RealTimePolicy(planner, 3, execute=4, delay=2, committed=False, threaded=False)
    found = acts(policy, range(14))
    assert found == [(0, i) for i in range(6)] + [(4, i) for i in range(2, 6)] + [(8, i) for i in range(2, 6)]
    assert all(committed is None for _, _, committed in planner.requests)


def test_a_delay_longer_than_execute_starts_again_at_once(planner):
    policy = RealTimePolicy(planner, 3, execute=1, delay=4, threaded=False)
    assert acts(policy, range(13)) == [(0, i) for i in range(5)] + [(1, i) for i in range(4, 8)] + [
        (5, i) for i in range(4, 8)
    ]


def test_without_delay_it_is_the_chunked_policy():
    planner = Planner(past=(-2, 0))
    realtime, chunked = RealTimePolicy(planner, 3, 3, delay=0, threaded=False), ChunkedPolicy(planner, 3)
    for _ in range(2):
        realtime.reset("open"), chunked.reset("open")
        words = ["", "", "", "", "place", "place", "", "", "", ""]
        for number, instruction in enumerate(words):
            seen = observation(number, instruction)
            assert np.array_equal(realtime.act(seen), chunked.act(seen))
    assert planner.requests[::2] == planner.requests[1::2]


def test_committed_actions_are_carried_out_to_the_bit():
    """With a real network: what was executed is what the plan was told."""
    packer = make_packer()
    packer.codec.fit([make_batch()["video"]])
    flow, told = FlowPolicy(make_model(packer), packer, steps=2), []

    def plan(history, key, committed=None):
        made = flow.plan(history, key, committed)
        told.append((key[1], committed, made.actions))
        return made

    planner = SimpleNamespace(layout=flow.layout, check=flow.check, plan=plan)
    policy, rng, executed = RealTimePolicy(planner, 3, execute=1, delay=1, threaded=False), np.random.default_rng(0), []
    for _ in range(8):
        image = rng.integers(0, 256, (LAYOUT.height, LAYOUT.width, 3), dtype=np.uint8)
        proprio = rng.normal(size=10).astype(np.float32)
        executed.append(policy.act({"images": {"overhead": image}, "proprio": proprio, "instruction": "open"}))
    assert [step for step, _, _ in told] == list(range(8)) and told[0][1] is None
    for step, committed, actions in told[1:]:
        assert committed.tobytes() == actions[:1].tobytes() == executed[step].tobytes()


# ------------------------------------------------------------------------------------------------ against a clock


def test_acts_while_the_planner_thinks_and_waits_for_its_step_when_it_was_quick(planner, threaded):
    assert acts(threaded, range(4)) == [(0, i) for i in range(4)]
    planner.gate.clear()
    assert acts(threaded, [4]) == [(0, 4)]  # the inference has begun and cannot end
    planner.gate.set()
    settle(threaded)
    assert acts(threaded, [5, 6, 7]) == [(0, 5), (4, 2), (4, 3)]  # no sooner
    assert (threaded.late, threaded.missed) == (0, 0)


def test_a_late_chunk_is_waited_for_with_the_old_one_and_joins_at_its_step(planner, threaded):
    acts(threaded, range(4))
    planner.gate.clear()
    assert acts(threaded, [4, 5, 6]) == [(0, 4), (0, 5), (0, 6)]  # due at 6
    planner.gate.set()
    settle(threaded)
    assert acts(threaded, [7, 8]) == [(4, 3), (4, 4)]
    assert (threaded.late, threaded.missed) == (1, 0)


def test_a_hanging_planner_is_reported_and_time_stands_still_meanwhile(planner, threaded):
    acts(threaded, range(4))
    planner.gate.clear()
    assert acts(threaded, range(4, 11)) == [(0, 4), (0, 5), (0, 6), (0, 7), None, None, None]
    planner.gate.set()
    settle(threaded)
    assert acts(threaded, [11, 12]) == [(4, 4), (4, 5)]  # the first that was not given
    assert threaded.missed == 3 and threaded.chunks == 2


def test_a_plan_for_a_world_too_long_ago_is_thrown_away(planner, threaded):
    acts(threaded, range(8))
    settle(threaded)
    planner.gate.clear()
    assert acts(threaded, range(8, 12 + HORIZON + 1)) == [(4, i) for i in range(4, 8)] + [None] * (HORIZON + 1)
    planner.gate.set()
    settle(threaded)
    assert acts(threaded, [50]) == [None] and threaded.dropped == 1
    settle(threaded)
    assert acts(threaded, [51]) == [(12, 0)] and planner.requests[-1][0] == [50]


def test_what_is_left_of_a_chunk_after_a_long_hold_is_thrown_away(planner, threaded):
    acts(threaded, range(2))
    for _ in range(HORIZON):
        threaded.hold()
    assert acts(threaded, [20]) == [(0, 2)]  # just young enough
    threaded.hold()
    assert acts(threaded, [30]) == [None]
    settle(threaded)
    assert acts(threaded, [31]) == [(3, 0)] and planner.requests[-1][2] is None


def test_what_the_planner_raises_surfaces_once(planner, threaded):
    acts(threaded, range(4))
    planner.fault = RuntimeError("out of memory")
    assert acts(threaded, [4]) == [(0, 4)]
    settle(threaded)
    with pytest.raises(RuntimeError, match="out of memory"):
        threaded.act(observation(5))
    assert acts(threaded, [5]) == [(0, 5)]  # and asks again
    settle(threaded)
    assert acts(threaded, [6, 7]) == [(0, 6), (5, 2)]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (np.full((HORIZON, 7), np.nan), "not finite"),
        (np.zeros((HORIZON, 6)), r"expected actions \(8, 7\), got \(8, 6\)"),
        (np.zeros((3, 7)), "got"),
    ],
)
def test_a_plan_that_is_none_is_refused(planner, threaded, wrong, message):
    planner.fault = wrong
    with pytest.raises(ValueError, match=message):
        threaded.act(observation(0))
    acts(threaded, [0])
    settle(threaded)
    assert acts(threaded, [1]) == [(0, 0)]


def test_only_the_first_chunk_is_waited_for_and_not_for_ever(planner):
    planner.gate.clear()
    with RealTimePolicy(planner, 10, 4, delay=2, patience=0.01) as policy:
        assert acts(policy, range(3)) == [None] * 3
        planner.gate.set()
        settle(policy)
        assert acts(policy, [3]) == [(0, 0)]


def test_a_wrong_observation_changes_nothing(planner, threaded):
    acts(threaded, range(2))
    with pytest.raises(ValueError, match="negative"):
        threaded.act(observation(-1))
    assert acts(threaded, range(2, 4)) == [(0, 2), (0, 3)]


# ------------------------------------------------------------------------------------------------ instructions, reset


def test_a_new_instruction_ends_the_old_chunk_with_what_is_committed(planner, threaded):
    acts(threaded, range(2))
    planner.gate.clear()
    assert acts(threaded, [2, 3, 4], "close") == [(0, 2), (0, 3), None]  # two are committed, no third
    planner.gate.set()
    settle(threaded)
    assert acts(threaded, [5, 6], "close") == [(2, 2), (2, 3)]
    assert planner.requests[-1][0] == [2] and len(planner.requests[-1][2]) == 2


def test_what_was_thought_for_the_old_instruction_is_thrown_away(planner, threaded):
    acts(threaded, range(4))
    planner.gate.clear()
    assert acts(threaded, [4]) == [(0, 4)]  # begins for the old one
    assert acts(threaded, [5, 6, 7], "close") == [(0, 5), (0, 6), None]
    planner.gate.set()
    settle(threaded)
    assert acts(threaded, [8], "close") == [(5, 2)]


def test_where_time_stands_still_a_busy_planner_costs_its_time_too(planner):
    policy = RealTimePolicy(planner, 3, execute=4, delay=3, threaded=False)
    acts(policy, range(5))  # at 4 an inference begins that occupies the planner until 7, the next until 10
    assert acts(policy, range(5, 12), "close") == [(0, 5), (0, 6), (0, 7), None, None, (5, 3), (5, 4)]


def test_a_reset_forgets_the_episode(planner, threaded):
    first = acts(threaded, range(7))
    planner.gate.clear()
    acts(threaded, [7, 8])  # one is being thought when the episode ends
    threading.Timer(0.01, planner.gate.set).start()
    threaded.reset()
    assert acts(threaded, range(3)) == first[:3]
    assert planner.requests[-1][:2] == ([0], (0, 0))


def test_closing_ends_the_thread_even_of_a_planner_that_hangs(planner):
    policy = RealTimePolicy(planner, 10, 4, delay=2)
    acts(policy, range(5))
    policy.close()
    assert not policy.thread.is_alive()
    with pytest.raises(RuntimeError, match="closed"):
        policy.act(observation(0))
    planner.gate.clear()
    with RealTimePolicy(planner, 10, 4, delay=2, patience=0.01) as hung:
        acts(hung, [0])
    assert hung.thread.daemon  # left behind: does not keep the process


def test_closing_frees_who_waits_for_the_first_chunk(planner):
    planner.gate.clear()
    policy, raised = RealTimePolicy(planner, 10, 4, delay=2), []

    def act():
        try:
            policy.act(observation(0))
        except RuntimeError as error:
            raised.append(str(error))

    waiting = threading.Thread(target=act)
    waiting.start()
    with policy.condition:  # until the request is there
        assert policy.condition.wait_for(lambda: policy.pending is not None or policy.condition.wait(0.01), 10)
    policy.close()
    waiting.join(10)
    assert raised == ["closed or reset while waiting for the first chunk"]


def test_expects_the_longest_of_the_last_latencies(planner):
    with RealTimePolicy(planner, fps=50) as policy:
        assert policy.expected == 1
        policy.latencies.extend([0.005, 0.041, 0.02])
        assert policy.expected == 3  # 2.05 control steps
        policy.latencies.append(1.0)
        assert policy.expected == HORIZON - 1
        policy.latencies.extend([0.02] * 30)
        assert policy.expected == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"execute": 0}, "execute 0"),
        ({"execute": 8}, "must fit the checkpoint's horizon 8"),
        ({"execute": 4, "delay": 5}, "must fit the checkpoint's horizon 8"),
        ({"delay": 0}, "delay must be at least 1"),
        ({"threaded": False}, "needs a delay"),
        ({"fps": 0}, "fps must be positive"),
    ],
)
def test_wrong_settings_are_refused(planner, settings, message):
    with pytest.raises(ValueError, match=message):
        RealTimePolicy(planner, **({"fps": 3} | settings))


# ------------------------------------------------------------------------------------------------ clock and measures


class Clock:
    def __init__(self):
        self.time = 100.0

    def now(self):
        return self.time

    def sleep(self, seconds):
        self.time += seconds + 0.001  # a system that wakes late


def test_lateness_does_not_add_up_and_lost_steps_are_left_out():
    clock, found = Clock(), []
    work = {0: 7.0, 3: 0.13, 5: 0.25}  # s; 0: the first chunk, 3: a little late for 4, 5: loses step 6
    for step, lateness in ticks(10, 0.9, clock.now, clock.sleep):
        found.append((step, round(lateness, 6)))
        clock.time += work.get(step, 0.02)
    assert found == [(0, 0), (1, 0.001), (2, 0.001), (3, 0.001), (4, 0.031), (5, 0.001), (7, 0.051), (8, 0.001)]


def test_jitter_in_closed_form():
    steady = jitter(np.arange(10) / 50, 50)
    assert np.allclose(steady["error_ms"], 0) and (steady["pauses"], steady["lost_steps"]) == (0, 0)
    found = jitter(np.array([0, 0.1, 0.21, 0.3, 0.7, 0.8]), 10)  # one step late by 10 ms; three steps lost
    assert np.allclose(found["error_ms"], [0, 10, -10, 300, 0])
    assert (found["pauses"], found["lost_steps"]) == (1, 3)


def test_drive_counts_missed_deadlines(planner, monkeypatch):
    monkeypatch.setattr("experiments.realtime.ticks", lambda rate, seconds: zip(range(12), [0.0] * 12))
    with RealTimePolicy(planner, 10, 4, delay=2) as policy:
        plan, calls = planner.plan, count()

        def hang_on_the_second(*arguments):
            if next(calls) == 1:
                planner.gate.clear()
            return plan(*arguments)

        planner.plan = hang_on_the_second
        found = drive(policy, [observation(0)], 10, 1.2)
        planner.gate.set()
    assert found["missed"] == 4 and len(found["times"]) == len(found["act"]) == 7  # steps 1 to 7; 8 to 11 missed


def test_jumps_in_closed_form():
    actions, border = np.zeros((6, 7), np.float32), np.array([True, False, False, True, False, False])
    actions[:, 0] = [0, 0.001, 0.002, 0.012, 0.013, 0.014]  # m: 1 mm steps, 10 mm at the border
    actions[:, 4] = np.radians([0, 0, 0, 3, 3, 3])
    found = jumps(actions, border)
    assert np.allclose(found["translation, mm"]["border"], 10, atol=1e-4)
    assert np.allclose(found["translation, mm"]["within"], [1, 1, 1, 1], atol=1e-4)
    assert np.allclose(found["translation, mm"]["second"], 9, atol=1e-4)
    assert np.allclose(found["rotation, degrees"]["border"], 3, atol=1e-4)
    actions[2] = np.nan  # no action in that step: nothing to compare around it
    assert len(jumps(actions, border)["translation, mm"]["border"]) == 0


def test_borders_are_where_another_chunk_begins(planner):
    seen = [observation(number) for number in range(12)]
    for mode, expected in (("rtc", [6, 10]), ("naive", [6, 10]), ("synchronous", [0, 4, 8])):
        actions, border = commanded(make_policy(planner, mode, execute=4, delay=2), seen)
        assert actions.shape == (12, 7) and np.flatnonzero(border).tolist() == expected, mode


def test_the_bootstrap_of_equal_episodes_is_a_point_and_of_others_holds_their_mean():
    assert bootstrap(np.full(5, 2.0)) == (2.0, 2.0, 2.0)
    mean, low, high = bootstrap(np.arange(20.0))
    assert mean == 9.5 and 6.5 < low < 7.5 and 11.5 < high < 12.5  # 9.5 -+ 1.96 * 5.77 / sqrt(20)


def test_smoothness_knows_a_planner_that_heeds_what_is_committed(tmp_path):
    """Its chunks start anywhere and go on evenly from what is committed: RTC has no jump at all."""
    data = open_dataset(write_dataset(tmp_path, episodes=3, length=24))

    class Wandering(Planner):
        def plan(self, history, key, committed=None):
            actions = np.full((HORIZON, 7), np.random.default_rng(key).normal(), np.float32)
            if committed is not None:
                actions[:] = committed[-1]
            return Plan(actions, None)

        def check(self, observation):
            pass

    rows = measure_smoothness(Wandering(), data, list(data.episodes), execute=4, delay=2)
    found = {row["kind"]: row for row in rows if row["quantity"] == "translation, mm"}
    assert found["border"]["rtc"] == (0, 0, 0) and found["border"]["naive"][1] > 100
    assert found["border"]["naive_minus_rtc"] == found["border"]["naive"]
    assert found["within"]["naive"] == (0, 0, 0) and found["border"]["episodes"] == 3


def test_holds_in_an_episode_where_it_would_have_missed_a_deadline(planner):
    policy = Holding(RealTimePolicy(planner, 3, execute=4, delay=3, threaded=False))
    policy.reset()
    for number in range(5):
        policy.act(observation(number))
    last = [policy.act(observation(number, "close")) for number in range(5, 10)]
    assert policy.held == 2 and np.array_equal(last[3], [0, 0, 0, 0, 0, 0, 1])
    policy.reset()
    assert policy.held == 0  # of an episode
