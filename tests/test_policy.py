import numpy as np
import pytest
import torch

from policies import load_policy
from policies.chunking import ChunkedPolicy
from policies.flow_policy import FlowPolicy, Request
from selfflow_robot import checkpoint
from selfflow_robot.flow import generator
from tests.synthetic import LAYOUT, make_batch, make_model, make_packer, save_run


@pytest.fixture
def run(tmp_path):
    return save_run(tmp_path)


def observation(seed=0, instruction="open", **changes):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (32, 48, 3), dtype=np.uint8)
    made = {
        "images": {"overhead": image},
        "proprio": rng.normal(size=10).astype(np.float32),
        "instruction": instruction,
    }
    return made | changes


def episode(policy, seeds, instructions=None):
    policy.reset("open")
    instructions = instructions or ["open"] * len(seeds)
    return np.stack([policy.act(observation(s, i)) for s, i in zip(seeds, instructions)])


def test_acts_in_the_canonical_contract_and_repeats_itself(run):
    policy = load_policy(run, execute=2, steps=3)
    first = episode(policy, range(6))
    assert first.dtype == np.float32 and first.shape == (6, 7)
    assert (first[:, 6] >= 0).all() and (first[:, 6] <= 1).all()
    assert np.array_equal(first, episode(policy, range(6)))  # a second episode, the same policy
    assert np.array_equal(first, episode(load_policy(run, execute=2, steps=3), range(6)))
    warm = [episode(load_policy(run, execute=2, steps=3, seed=s, temperature=1.0), range(6)) for s in (0, 0, 1)]
    assert np.array_equal(warm[0], warm[1]) and not np.array_equal(warm[0], warm[2])


def test_carries_out_the_first_actions_of_each_chunk(run):
    policy = load_policy(run, execute=2, steps=3)
    policy.reset()
    chunk = policy.plan(observation(0)).actions
    assert chunk.shape == (LAYOUT.horizon, 7)
    # the second action is the chunk's, whatever the camera shows by then; the third is not
    acted = episode(policy, [0, 5, 6])
    assert np.array_equal(acted[:2], chunk[:2])
    assert not np.array_equal(acted[2], chunk[2])
    assert not np.array_equal(acted, episode(policy, [0, 7, 6]))  # the frame before is given too


def test_a_new_instruction_drops_the_rest_of_the_chunk(run):
    policy = load_policy(run, execute=3, steps=3)
    same = episode(policy, [0, 1, 2])
    changed = episode(policy, [0, 1, 2], ["open", "place", "place"])
    assert np.array_equal(same[0], changed[0])
    assert not np.array_equal(same[1], changed[1])


def test_planning_changes_nothing(run):
    policy = load_policy(run, execute=2, steps=3)
    expected = episode(policy, range(4))
    policy.reset()
    got = []
    for seed in range(4):
        policy.plan(observation(seed))
        got.append(policy.act(observation(seed)))
    assert np.array_equal(got, expected)


def test_imagines_while_planning(run):
    plan = load_policy(run, execute=1, imagination=1.0, steps=2).plan(observation())
    assert plan.video.shape == (2, 32, 48, 3) and plan.video.dtype == np.uint8
    assert load_policy(run, execute=1, steps=2).plan(observation()).video is None


def test_committed_actions_are_kept_and_heeded(run):
    planner = load_policy(run, execute=1, steps=2).policy
    history, committed = [observation(3)] * 2, np.full((1, 7), 0.123, np.float32)
    free, bound = planner.plan(history, (0, 0)), planner.plan(history, (0, 0), committed)
    other = planner.plan(history, (0, 0), committed + 0.5)
    assert np.array_equal(bound.actions[:1], committed) and bound.actions.shape == free.actions.shape
    assert not np.array_equal(bound.actions[1:], free.actions[1:])
    assert not np.array_equal(bound.actions[1:], other.actions[1:])
    for wrong, message in ((np.zeros((3, 7)), "nothing to plan"), (np.full((1, 7), np.nan), "finite"),
                           (np.zeros((1, 6)), "finite numbers")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            planner.plan(history, (0, 0), wrong)


def test_a_batch_gives_every_robot_its_own_plan(run):
    planner = load_policy(run, execute=1, steps=2, temperature=1.0).policy
    committed = np.full((1, 7), 0.1, np.float32)
    requests = [
        Request([observation(1)] * 2, (0, 4)),
        Request([observation(2, "place")] * 2, (7, 1), committed),
        Request([observation(3)] * 2, (0, 4)),
        Request([observation(1)] * 2, (0, 5)),
    ]
    together, alone = planner.plans(requests), [planner.plans([r])[0] for r in requests]
    for a, b in zip(together, alone):
        np.testing.assert_allclose(a.actions, b.actions, atol=0.02 * np.abs(b.actions).max())  # bf16
    assert not np.allclose(together[0].actions, together[3].actions, atol=0.05)  # another key, another noise


def test_imagination_is_a_dial(run):
    """At 0 no future frame is in the sequence; between, frames stop half denoised: other actions, and no video."""
    plans = [load_policy(run, execute=1, imagination=i, steps=2).plan(observation()) for i in (0.0, 0.5, 1.0)]
    assert [plan.video is None for plan in plans] == [True, True, False]
    assert not np.array_equal(plans[0].actions, plans[1].actions)
    assert not np.array_equal(plans[1].actions, plans[2].actions)


def test_without_temperature_no_chance(run):
    """At 0 the chunk follows from what is seen; with noise it depends on the draw too."""
    cold, warm = (FlowPolicy.load(run, steps=2, temperature=t) for t in (0.0, 1.0))
    history = [observation(0), observation(1)]
    assert np.array_equal(cold.plan(history, (0, 0)).actions, cold.plan(history, (1, 5)).actions)
    assert not np.array_equal(warm.plan(history, (0, 0)).actions, warm.plan(history, (1, 5)).actions)
    assert not np.array_equal(cold.plan(history, (0, 0)).actions, cold.plan([observation(2)] * 2, (0, 0)).actions)


def test_cached_and_plain_sampling_agree(run):
    cached, plain = (load_policy(run, execute=1, steps=4, cached=c).plan(observation()) for c in (True, False))
    np.testing.assert_allclose(cached.actions, plain.actions, atol=1e-6)


def test_explains_what_happened(run):
    policy, batch = FlowPolicy.load(run, steps=2), make_batch()
    actions = policy.explain(batch, generator(0))
    assert actions.shape == batch["executed"].shape
    other = make_batch(seed=1)
    assert np.array_equal(actions, policy.explain(batch | {"executed": other["executed"]}, generator(0)))
    assert not np.array_equal(actions, policy.explain(batch | {"video": other["video"]}, generator(0)))


def test_predicts_video_from_the_past_and_the_actions_alone(run):
    policy = FlowPolicy.load(run, steps=2)
    batch, other = make_batch(), make_batch(seed=1)
    video = policy.predict_video(batch, generator(0))
    assert video.shape == (2, 2, 32, 48, 3) and video.dtype == np.uint8
    peek = batch | {"video": torch.cat([batch["video"][:, :2], other["video"][:, 2:]], 1)}
    assert np.array_equal(video, policy.predict_video(peek, generator(0)))
    acted = policy.predict_video(batch | {"executed": other["executed"]}, generator(0))
    assert not np.array_equal(video, acted)


def test_first_frame_stands_for_the_history_before_it(run):
    policy = load_policy(run, execute=1, steps=2)
    a = policy.plan(observation(3)).actions
    b = policy.policy.plan([observation(3)] * 2, (0, 0)).actions
    assert np.array_equal(a, b)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"images": {"wrist": np.zeros((32, 48, 3), np.uint8)}},
            "view 'overhead' expected by the checkpoint, got wrist",
        ),
        ({"images": {"overhead": np.zeros((48, 32, 3), np.uint8)}}, r"expects uint8 \(32, 48, 3\)"),
        ({"images": {"overhead": np.zeros((32, 48, 3), np.float32)}}, "expects uint8"),
        ({"proprio": np.zeros(8, np.float32)}, r"proprio: the checkpoint expects float32 \(10,\)"),
        ({"proprio": np.zeros(10)}, "got float64"),
        ({"proprio": np.full(10, np.nan, np.float32)}, "proprio: not finite"),
        ({"instruction": "x" * 17}, "at most 16 bytes"),
    ],
)
def test_wrong_observations_are_refused(run, changes, message):
    with pytest.raises(ValueError, match=message):
        load_policy(run, execute=1).act(observation(**changes))


def test_wrong_settings_are_refused(run):
    with pytest.raises(ValueError, match="execute must be 1 to the checkpoint's horizon 3, got 4"):
        load_policy(run, execute=4)
    with pytest.raises(ValueError, match="steps"):
        load_policy(run, execute=1, steps=0)
    with pytest.raises(ValueError, match="imagination must be from 0"):
        load_policy(run, execute=1, imagination=1.5)
    with pytest.raises(ValueError, match="temperature must be at least 0, got -1"):
        load_policy(run, execute=1, temperature=-1)
    assert isinstance(load_policy(run, execute=1), ChunkedPolicy)


def test_a_backbone_is_no_policy(tmp_path):
    packer = make_packer()
    model = make_model(packer)
    tensors = checkpoint.collect("ema", model) | checkpoint.collect("packer", packer)
    checkpoint.save(tmp_path, 1, tensors, {"kind": "pretrain"} | checkpoint.describe(model, packer))
    with pytest.raises(ValueError, match="is a video backbone"):
        load_policy(tmp_path)
