"""Held-out losses by noise level: closed forms, the mean of bins, what is counted."""

import pytest
import torch

from selfflow_robot.data import open_dataset
from selfflow_robot.tokens import GENERATED, GIVEN, HIDDEN
from selfflow_robot.validation import (
    action_errors,
    action_following,
    held_out,
    loss_by_level,
    video_loss,
    with_actions,
)
from tests.synthetic import LAYOUT, make_batch, make_model, make_packer, write_dataset

BIN_NAMES = ["t0.0-0.2", "t0.2-0.4", "t0.4-0.6", "t0.6-0.8", "t0.8-1.0"]


@pytest.fixture(scope="module")
def packer():
    packer = make_packer()
    packer.codec.fit([make_batch(8)["video"]])
    return packer


class Stub:
    """A model that knows its velocity(z, t, tokens)."""

    def __init__(self, packer, velocity):
        self.channels, self.velocity = packer.channels, velocity

    def prefix_cache(self, z, t, tokens):
        return None

    def __call__(self, z, t, tokens, cache):
        return self.velocity(z, t, tokens), None


def test_names_and_mean(packer):
    losses = video_loss(make_model(packer), packer, make_batch(4), "world_model")
    assert list(losses) == ["validation/loss_video", *(f"validation/loss_video/{name}" for name in BIN_NAMES)]
    mean, *bins = losses.values()
    assert mean == pytest.approx(sum(bins) / 5)


def test_closed_form_of_the_zero_velocity(packer):
    """|noise - x|^2 whatever the level: the same in every bin, near 1 + the mean square of the data."""
    tokens = packer.pack(make_batch(16), "world_model")
    mean, *bins = loss_by_level(Stub(packer, lambda z, t, tokens: torch.zeros_like(z)), tokens, "video").values()
    assert bins == pytest.approx([bins[0]] * 5)
    span = tokens.rows("video", GENERATED)
    power = tokens.x[:, span, : packer.channels["video"]].square().mean().item()
    assert mean == pytest.approx(1 + power, rel=0.05)


def test_levels_are_uniform_in_their_bin_and_given_tokens_clean(packer):
    tokens, seen = packer.pack(make_batch(64), "video_prediction"), []

    def velocity(z, t, tokens):
        seen.append(t)
        given = tokens.where(GIVEN).expand(len(z), -1)
        assert torch.equal(z[given], tokens.x[given]) and (t[given] == 0).all()
        assert (t[tokens.where(HIDDEN).expand(len(z), -1)] == 1).all()
        return torch.zeros_like(z)

    loss_by_level(Stub(packer, velocity), tokens, "video")
    for number, t in enumerate(seen):
        t = t[:, tokens.rows("video", GENERATED)]
        assert (t == t[:, :1]).all() and number / 5 <= t.min() and t.max() <= (number + 1) / 5
        assert t.mean() == pytest.approx((number + 0.5) / 5, abs=0.03)


def test_a_planted_error_shows_in_its_bin_alone(packer):
    """The exact velocity, but off by 1 above t = 0.8."""
    tokens = packer.pack(make_batch(8), "joint_plan")

    def velocity(z, t, tokens):
        generated = tokens.where(GENERATED)[..., None]
        exact = (z - tokens.x) / t.clamp_min(1e-3)[..., None]  # z - x = t (noise - x)
        return torch.where(generated, exact + (t[..., None] > 0.8), 0.0)

    for kind in ("video", "action"):
        mean, *bins = loss_by_level(Stub(packer, velocity), tokens, kind).values()
        assert bins == pytest.approx([0, 0, 0, 0, 1], abs=1e-3) and mean == pytest.approx(0.2, abs=1e-3)


def test_padding_does_not_count_and_calls_repeat_to_the_bit(packer):
    batch, model = make_batch(4), make_model(packer)
    batch["video_mask"][:, -1] = False
    noisy = batch | {"video": batch["video"].clone()}
    noisy["video"][:, -1] = torch.randint(0, 256, noisy["video"][:, -1].shape, dtype=torch.uint8)
    zero = make_model(packer, zero=True)  # its loss on a token depends on that token alone
    assert video_loss(zero, packer, batch, "pretrain") == video_loss(zero, packer, noisy, "pretrain")
    assert video_loss(model, packer, batch, "pretrain") == video_loss(model, packer, batch, "pretrain")
    counted = noisy | {"video_mask": torch.ones_like(batch["video_mask"])}
    assert video_loss(zero, packer, counted, "pretrain") != video_loss(zero, packer, noisy, "pretrain")


def test_action_errors_in_real_units(packer, monkeypatch):
    """Chunks that are off by 3 mm along one axis, half a degree about another, 0.25 of the gripper."""
    batch = make_batch(2)
    batch["action"][..., 6] = 0.5
    off = batch["action"] + torch.tensor([0, 0.003, 0, torch.pi / 360, 0, 0, -0.25])

    def exact(model, tokens, steps, generator):
        z = tokens.x.clone()
        z[:, tokens.rows("action", GENERATED), :7] = packer.normalise_action(off)
        return z

    monkeypatch.setattr("selfflow_robot.validation.generate", exact)
    errors = action_errors(make_model(packer), packer, batch)
    assert errors["validation/action_mm"] == pytest.approx(3, rel=1e-3)
    assert errors["validation/action_degrees"] == pytest.approx(0.5, rel=1e-3)
    assert errors["validation/action_gripper"] == pytest.approx(0.25, rel=1e-3)
    assert {"validation/loss_action", "validation/loss_action/t0.8-1.0"} <= errors.keys()


def test_held_out_windows_are_of_the_validation_split(tmp_path):
    dataset = open_dataset(write_dataset(tmp_path / "set", episodes=5))
    batch = held_out(dataset, LAYOUT, count=6)
    assert len(batch["video"]) == 6
    (episode,) = dataset.split("validation")
    proprio = dataset.proprio[episode.start : episode.start + episode.length]
    assert all((row == proprio).all(-1).any() for row in batch["proprio"].numpy())
    assert held_out(open_dataset(write_dataset(tmp_path / "one", episodes=1)), LAYOUT) is None


def test_a_model_that_does_not_listen_has_no_action_gap(packer):
    deaf = Stub(packer, lambda z, t, tokens: torch.ones_like(z))
    gaps = action_following(deaf, packer, make_batch(4))
    assert gaps == {"validation/action_gap_shuffled": 0.0, "validation/action_gap_zero": 0.0}


def test_the_action_gap_is_the_loss_of_wrong_actions_less_that_of_right_ones(packer):
    """A model whose error is the distance of the given actions from the right ones."""
    batch = make_batch(4)
    right = packer.normalise_action(batch["executed"])

    def velocity(z, t, tokens):
        given = tokens.x[:, tokens.rows("action", GIVEN), :7]
        off = (given - right).square().mean((1, 2)).sqrt()
        return true + off[:, None, None]

    from selfflow_robot.flow import interpolate

    tokens = packer.pack(batch, "world_model")
    noise = torch.randn(tokens.x.shape, generator=torch.Generator().manual_seed(0))  # as `loss_by_level` draws it
    true = interpolate(tokens.x, noise, torch.zeros(4, 1))[1]
    gaps = action_following(Stub(packer, velocity), packer, batch)
    for name, changed in list(with_actions(batch).items())[1:]:
        off = (packer.normalise_action(changed["executed"]) - right).square().mean((1, 2))
        assert gaps[f"validation/action_gap_{name}"] == pytest.approx(off.mean().item(), rel=1e-4)


def test_other_actions_are_those_of_far_windows_or_none():
    batch = make_batch(4)
    changed = with_actions(batch)
    assert changed["true"]["executed"] is batch["executed"] and batch.keys() == changed["zero"].keys()
    assert torch.equal(changed["shuffled"]["executed"], batch["executed"][[2, 3, 0, 1]])
    zero = changed["zero"]["executed"]
    assert not zero[..., :6].any() and torch.equal(zero[..., 6], batch["executed"][:, :1, 6].expand(-1, 3))
