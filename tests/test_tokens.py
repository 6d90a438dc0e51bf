import numpy as np
import pytest
import torch

from selfflow_robot.tokens import GENERATED, GIVEN, HIDDEN, KINDS, MODES, Layout, Roles, encode_text, generate
from tests.synthetic import STATS, make_batch, make_model, make_packer

PER_FRAME = 2 * 3  # patches of 32 x 48 pixels
TEXT = 16 // 4

# The table of design.md: how many tokens are (given, generated, hidden).
COUNTS = {
    "policy": (TEXT + 1 + 2 * PER_FRAME, 3, 0),
    "joint_plan": (TEXT + 1 + 2 * PER_FRAME, 2 * PER_FRAME + 3, 0),
    "world_model": (TEXT + 1 + 2 * PER_FRAME + 3, 2 * PER_FRAME, 0),
    "inverse_dynamics": (TEXT + 1 + 4 * PER_FRAME, 3, 0),
    "video_prediction": (TEXT + 1 + 2 * PER_FRAME, 2 * PER_FRAME, 3),
    "pretrain": (2 * PER_FRAME, 2 * PER_FRAME, 0),
    "pretrain_all": (0, 4 * PER_FRAME, 0),
}


@pytest.mark.parametrize("mode", MODES)
def test_modes_are_the_table(mode):
    tokens = make_packer().pack(make_batch(), mode)
    assert tuple(int(tokens.where(role).sum()) for role in (GIVEN, GENERATED, HIDDEN)) == COUNTS[mode]
    assert tokens.prefix == COUNTS[mode][0]
    assert tokens.where(GIVEN)[0, : tokens.prefix].all()  # given first
    assert [s.start for s in tokens.spans] == [0] + [s.stop for s in tokens.spans[:-1]]
    assert tokens.spans[-1].stop == tokens.x.shape[1] == len(tokens.ids) == tokens.weight.shape[1]
    assert torch.equal(tokens.weight > 0, tokens.where(GENERATED).expand(2, -1))


def test_policies_learn_the_expert_and_everything_else_what_was_done():
    packer, batch = make_packer(), make_batch()
    for mode, name in (("policy", "action"), ("joint_plan", "executed"), ("world_model", "executed")):
        tokens = packer.pack(batch, mode)
        role = GIVEN if mode == "world_model" else GENERATED
        rows = tokens.x[:, tokens.rows("action", role), :7]
        assert torch.equal(rows, packer.normalise_action(batch[name])), mode


def test_one_clock_for_frames_and_actions():
    tokens = make_packer().pack(make_batch(), "joint_plan")
    kind = tokens.ids[:, 3]
    assert tokens.ids[kind == KINDS.index("video")][::PER_FRAME, 0].tolist() == [-1, 0, 2, 4]
    assert tokens.ids[kind == KINDS.index("action")][:, 0].tolist() == [0, 1, 2]
    grid = tokens.ids[kind == KINDS.index("video")][:PER_FRAME, 1:3].tolist()
    assert grid == [[r, c] for r in range(2) for c in range(3)]


def test_video_and_actions_come_back():
    packer, batch = make_packer(), make_batch()
    packer.codec.fit([batch["video"]])
    tokens = packer.pack(batch, "joint_plan")
    torch.testing.assert_close(packer.actions(tokens, tokens.x)[..., :6], batch["executed"][..., :6])
    expected = packer.codec.decode(packer.codec.encode(batch["video"][:, 2:]))
    assert torch.equal(packer.video(tokens, tokens.x), expected)


def test_padding_is_not_learned():
    batch = make_batch()
    batch["action_mask"][0, 1:] = False
    batch["video_mask"][1, 3] = False
    tokens = make_packer().pack(batch, "joint_plan")
    assert tokens.weight[0, tokens.rows("action", GENERATED)].tolist() == [1, 0, 0]
    assert tokens.weight[1, tokens.rows("video", GENERATED)].tolist() == [1] * PER_FRAME + [0] * PER_FRAME


def test_normalisation():
    packer = make_packer()
    low, high = torch.full((7,), -0.5), torch.full((7,), 1.5)
    low[6], high[6] = 0, 1  # the gripper's range is its contract, not the data's
    assert torch.equal(packer.normalise_action(low), -torch.ones(7))
    assert torch.equal(packer.normalise_action(high), torch.ones(7))
    assert packer.denormalise_action(torch.full((7,), 3.0))[6] == 1  # an opening stays one
    still = {**STATS, "action": {"q01": np.zeros(7), "q99": np.zeros(7)}}
    still["proprio"] = {"mean": np.ones(10), "std": np.zeros(10)}
    packer.fit_statistics(still)
    action = torch.linspace(-1, 1, 7)
    assert torch.equal(packer.normalise_action(action)[:6], action[:6])  # what never varied is left as it is
    tokens = packer.pack(make_batch() | {"proprio": torch.full((2, 10), 1.5)}, "policy")
    assert torch.equal(tokens.x[:, tokens.rows("proprio", GIVEN), :10], torch.full((2, 1, 10), 0.5))


def test_text_is_bytes():
    assert encode_text(["aé"], 4).tolist() == [[97, 0xC3, 0xA9, 0]]
    with pytest.raises(ValueError, match="17 bytes, the model reads 16"):
        encode_text(["x" * 17], 16)


@pytest.mark.parametrize(
    ("change", "mode", "message"),
    [
        ({"video": torch.zeros(2, 3, 32, 48, 3, dtype=torch.uint8)}, "policy", "expected 2 or 4 frames"),
        ({"video": torch.zeros(2, 4, 48, 48, 3, dtype=torch.uint8)}, "policy", "expected 2 or 4 frames"),
        ({"video": torch.zeros(2, 2, 32, 48, 3, dtype=torch.uint8)}, "inverse_dynamics", "needs the 2 future"),
        ({}, "plan", "choose one of"),
        ({"executed": torch.zeros(2, 2, 7)}, "world_model", r"executed \(2, 2, 7\): expected \(2, 3, 7\)"),
    ],
)
def test_wrong_batches_are_refused(change, mode, message):
    with pytest.raises(ValueError, match=message):
        make_packer().pack(make_batch() | change, mode)
    with pytest.raises(ValueError, match="multiple of 4"):
        Layout(text_bytes=10)


@pytest.mark.parametrize("mode", MODES)
def test_generation_keeps_what_is_given_and_repeats_itself(mode):
    packer = make_packer()
    model, tokens = make_model(packer).eval(), packer.pack(make_batch(), mode)
    draws = [generate(model, tokens, 3, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    kept = tokens.where(GIVEN)[0]
    assert torch.equal(draws[0][:, kept], tokens.x[:, kept])
    assert torch.equal(draws[0], draws[1])
    generated = tokens.where(GENERATED)[0]
    assert not torch.equal(draws[0][:, generated], draws[2][:, generated])


def test_what_is_to_be_generated_does_not_leak():
    """Sampling sees roles, not the answers: changing the labels changes nothing."""
    packer, batch = make_packer(), make_batch()
    model = make_model(packer).eval()
    other = make_batch(seed=5)
    changed = batch | {name: other[name] for name in ("action", "executed")}
    changed["video"] = torch.cat([batch["video"][:, :2], other["video"][:, 2:]], 1)
    for mode in ("policy", "joint_plan", "video_prediction"):
        a, b = (generate(model, packer.pack(x, mode), 2, torch.Generator().manual_seed(0)) for x in (batch, changed))
        assert torch.equal(a, b), mode


def test_committed_actions_are_given():
    """What is done already enters as it was done, in the prefix; the rest is generated and alone counts."""
    packer, batch = make_packer(), make_batch()
    tokens = packer.pack(batch, "policy", committed=2)
    given, rest = tokens.rows("action", GIVEN), tokens.rows("action", GENERATED)
    assert (given.stop - given.start, rest.stop - rest.start) == (2, 1) and given.stop == tokens.prefix
    assert torch.equal(tokens.x[:, given, :7], packer.normalise_action(batch["executed"])[:, :2])
    assert torch.equal(tokens.x[:, rest, :7], packer.normalise_action(batch["action"])[:, 2:])
    assert tokens.ids[given, 0].tolist() == [0, 1] and tokens.ids[rest, 0].tolist() == [2]
    assert not tokens.weight[:, given].any()
    torch.testing.assert_close(packer.actions(tokens, tokens.x)[:, :2, :6], batch["executed"][:, :2, :6])
    for mode, count in (("world_model", 1), ("policy", 3), ("pretrain", 1)):
        with pytest.raises(ValueError, match="committed"):
            packer.pack(batch, mode, committed=count)


def test_roles_may_be_given_by_hand():
    packer, batch = make_packer(), make_batch()
    by_hand, named = packer.pack(batch, Roles(GIVEN, GENERATED, HIDDEN)), packer.pack(batch, "video_prediction")
    assert by_hand.spans == named.spans and torch.equal(by_hand.x, named.x)


def test_a_generator_for_every_row():
    """A row's noise is its own: the same alone and among others."""
    packer, batch = make_packer(), make_batch()
    model = make_model(packer).eval()
    seeds = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    both = generate(model, packer.pack(batch, "policy"), 2, seeds)
    second = {name: value[1:] for name, value in batch.items()}
    alone = generate(model, packer.pack(second, "policy"), 2, torch.Generator().manual_seed(4))
    torch.testing.assert_close(both[1:], alone)
    with pytest.raises(ValueError, match="3 generators for 2 rows"):
        generate(model, packer.pack(batch, "policy"), 2, [torch.Generator()] * 3)


def test_temperature_narrows_the_actions_alone():
    """For data of N(m, s^2) the velocity is known: samples are m + s noise, and with a temperature T m + s T noise."""
    packer, m, s = make_packer(), 0.7, 0.3
    tokens = packer.pack(make_batch(), "joint_plan")

    class Gaussian:
        def prefix_cache(self, *_):
            return None

        def __call__(self, z, t, tokens, cache):
            t = t[..., None]
            pull = (z - (1 - t) * m) / ((1 - t) ** 2 * s**2 + t**2)
            return t * pull - m - (1 - t) * s**2 * pull, None

    draws = {T: generate(Gaussian(), tokens, 400, torch.Generator().manual_seed(0), temperature=T) for T in (1, 0.5, 0)}
    video, action = tokens.rows("video", GENERATED), tokens.rows("action", GENERATED)
    spread = draws[1][:, action] - m
    assert 0.2 < spread.std() < 0.4
    torch.testing.assert_close(draws[0.5][:, action] - m, spread / 2, atol=2e-3, rtol=0)
    torch.testing.assert_close(draws[0][:, action], torch.full_like(spread, m), atol=2e-3, rtol=0)
    assert torch.equal(draws[0][:, video], draws[1][:, video])


def test_imagination_stops_frames_on_the_way():
    """With imagination i, frames are left at level 1 - i while actions arrive: seen by a network that says where it
    was asked."""
    packer = make_packer()
    tokens, asked = packer.pack(make_batch(), "joint_plan"), []

    class Recorder:
        def prefix_cache(self, *_):
            return None

        def __call__(self, z, t, tokens, cache):
            asked.append(t)
            return torch.ones_like(z), None

    z = [generate(Recorder(), tokens, 4, torch.Generator().manual_seed(0), imagination=i) for i in (0.25, 1.0)]
    video, action = tokens.rows("video", GENERATED), tokens.rows("action", GENERATED)
    torch.testing.assert_close(
        torch.stack([t[0, video.start] for t in asked[:4]]),
        torch.tensor([1, 15, 14, 13]) / torch.tensor([1, 16, 16, 16]),
    )
    torch.testing.assert_close(torch.stack([t[0, action.start] for t in asked[:4]]), torch.tensor([1, 0.75, 0.5, 0.25]))
    moved = (z[0] - z[1])[:, video]
    torch.testing.assert_close(moved, torch.full_like(moved, 0.75))
    assert torch.equal(z[0][:, action], z[1][:, action])
