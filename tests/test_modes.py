"""What a checkpoint can do in each mode: the right errors, paired, and a plan's agreement with itself."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from experiments import modes
from experiments.modes import MEASURES, compare, nothing_learned, rows, video_scores
from policies import measures
from policies.consistency import consistency, self_consistency
from policies.flow_policy import FlowPolicy
from selfflow_robot.data import open_dataset
from selfflow_robot.flow import generator
from selfflow_robot.tokens import MODES
from tests.synthetic import LAYOUT, make_batch, make_model, make_packer, save_run, write_dataset


@pytest.fixture(scope="module")
def windows(tmp_path_factory):
    dataset = open_dataset(write_dataset(tmp_path_factory.mktemp("data"), 60))
    return measures.held(dataset, LAYOUT, 12)


@pytest.fixture(scope="module")
def policy():
    packer = make_packer()
    packer.codec.fit([make_batch()["video"]])
    return FlowPolicy(make_model(packer), packer, steps=2)


class Knowing:
    """Does in every mode what was recorded, off by so much: actions in metres along x, frames in levels of grey."""

    def __init__(self, windows, metres=0.0, level=0):
        self.layout, self.windows, self.metres, self.level = LAYOUT, windows, metres, level
        self.packer = SimpleNamespace(actions=lambda tokens, z: tokens, video=lambda tokens, z: tokens)
        self.asked, self.temperature = [], 1.0

    def of(self, batch, name):
        """The batch's rows of what was recorded: a window is known by its proprioception."""
        known = self.windows.batch["proprio"]
        index = [(known == one).all(1).nonzero()[0, 0].item() for one in batch["proprio"]]
        return self.windows.batch[name][index]

    def shifted(self, actions):
        actions = actions.clone()
        actions[..., 0] += self.metres
        return actions

    def predict_video(self, batch, generators):
        right = (batch["executed"] == self.of(batch, "executed")).all()
        return self.frames(batch, 0 if right else 40)

    def frames(self, batch, more=0):
        real = self.of(batch, "video")[:, 2:].numpy().astype(int)
        off = self.level + more
        return np.where(real > 128, real - off, real + off).astype(np.uint8)

    def explain(self, batch, generators):
        assert batch["video"].shape[1] == 4
        return self.shifted(self.of(batch, "executed")).numpy()

    def generate(self, batch, mode, generators, committed=0, temperature=1.0):
        assert batch["video"].shape[1] == 2 and len(generators) == len(batch["video"])  # the future is not shown
        assert "action" not in batch and ("executed" in batch) == bool(committed)
        self.asked.append((mode, committed))
        assert temperature == 1.0
        if mode == "video_prediction":
            return torch.from_numpy(self.frames(batch)), None
        actions = self.shifted(self.of(batch, "action"))
        actions[:, :committed, 0] += 9  # are not to be counted
        return actions, None


def test_a_policy_that_knows_makes_the_errors_it_was_given(windows):
    knowing = Knowing(windows, metres=0.003, level=5)
    found = rows(knowing, windows)
    assert found.keys() == MEASURES.keys() and all(values.shape == (12,) for values in found.values())
    for mode in ("policy", "joint_plan", "half_committed", "inverse_dynamics"):
        here = ~np.isnan(found[f"{mode}_mm"])
        assert here.sum() > 6 and found[f"{mode}_mm"][here] == pytest.approx(3, abs=1e-3)
        assert (found[f"{mode}_degrees"][here] == 0).all() and (found[f"{mode}_gripper"][here] == 0).all()
    for name in ("world_model_psnr", "world_model_psnr_moving", "video_prediction_psnr"):
        there = found[name][~np.isnan(found[name])]
        assert len(there) and there == pytest.approx(20 * np.log10(255 / 5))
    gap = found["world_model_gap"][~np.isnan(found["world_model_gap"])]
    assert gap == pytest.approx(20 * np.log10(45 / 5))  # wrong actions cost 40 levels more
    assert set(knowing.asked) == {
        (MODES["policy"], 0),
        (MODES["policy"], 1),  # half of a horizon of 3
        (MODES["joint_plan"], 0),
        ("video_prediction", 0),
    }


def test_differences_are_paired(windows):
    table = compare({"a": Knowing(windows, 0.005, 10), "b": Knowing(windows, 0.002, 5)}, windows)
    assert table["policy_mm"]["difference"] == pytest.approx((3, 3, 3), abs=1e-3)
    assert table["world_model_psnr"]["difference"] == pytest.approx((-6.0206,) * 3, abs=1e-3)
    assert table["inverse_dynamics_gripper"]["difference"] == (0, 0, 0)
    assert list(table["policy_mm"]) == ["nothing learned", "a", "b", "difference"]
    assert "difference" not in compare({"a": Knowing(windows)}, windows)["policy_mm"]


def test_what_learned_nothing_stands_still_and_shows_the_given_frame(windows):
    idle = nothing_learned(windows, 1)
    executed = windows.batch["executed"].double().numpy()
    assert idle["inverse_dynamics_mm"] == pytest.approx(1000 * np.linalg.norm(executed[..., :3], axis=-1).mean(1))
    scores = video_scores(windows, windows.repeated)
    assert np.array_equal(idle["world_model_psnr_moving"], scores["psnr_moving"], equal_nan=True)
    assert (idle["world_model_gap"] == 0).all()


def test_steps_after_a_change_of_instruction_are_not_counted():
    true, actions = torch.zeros(2, 2, 7), np.zeros((2, 2, 7), np.float32)
    actions[0, 0, 0], actions[0, 1, 0] = 0.001, 0.5
    errors = measures.chunk_errors(actions, true, torch.tensor([[True, False], [False, False]]))
    assert errors["mm"][0] == pytest.approx(1) and np.isnan(errors["mm"][1])


# -- self-consistency --------------------------------------------------------------------------------------------------


class TwoMinded:
    """Plans no motion and 200 grey; reads 3 mm and 2 degrees out of such frames, and nothing out of others."""

    layout = LAYOUT
    packer = SimpleNamespace(
        actions=lambda tokens, z: torch.zeros(len(tokens["video"]), 3, 7),
        video=lambda tokens, z: torch.full((len(tokens["video"]), 2, 32, 48, 3), 200, dtype=torch.uint8),
    )

    def generate(self, batch, mode, generators):
        assert mode == MODES["joint_plan"] and batch["video"].shape[1] == 2
        return batch, None

    def explain(self, batch, generators):
        video = batch["video"]
        assert video.shape[1] == 4 and (video[:, 2:] == 200).all() and not (video[:, :2] == 200).all()
        actions = np.zeros((len(video), 3, 7), np.float32)
        actions[..., 1], actions[:, 0, 4] = 0.003, np.radians(6)  # 2 degrees, mean of three steps
        return actions


def test_distance_between_plan_and_explanation():
    found = self_consistency(TwoMinded(), make_batch(3), [generator(0, i) for i in range(3)])
    assert found.shape == (3, 2) and found == pytest.approx(np.tile([3.0, 2.0], (3, 1)), abs=1e-4)


def observation(seed):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (32, 48, 3), dtype=np.uint8)
    return {
        "images": {"overhead": image},
        "proprio": rng.normal(size=10).astype(np.float32),
        "instruction": "open",
    }


def test_consistency_of_a_situation_is_its_own(policy):
    """The same alone and among others, again, and whatever the policy's dial."""
    histories, keys = [[observation(2 * i), observation(2 * i + 1)] for i in range(3)], [(0, 5), (0, 6), (1, 5)]
    found = consistency(policy, histories, keys)
    assert found.shape == (3, 2) and np.isfinite(found).all() and (found > 0).all()
    assert np.array_equal(found, consistency(policy, histories, keys))
    alone = consistency(policy, histories[1:2], keys[1:2])
    assert alone == pytest.approx(found[1:2], rel=0.01)  # rounded otherwise; frames are whole numbers on the way
    half = FlowPolicy(policy.model, policy.packer, steps=2, imagination=0.5)
    assert np.array_equal(found, consistency(half, histories, keys))
    assert consistency(policy, histories[1:2], [(9, 9)]) != pytest.approx(found[1:2], rel=0.05)  # other noise


# -- the script --------------------------------------------------------------------------------------------------------


def start(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["modes.py", *map(str, arguments)])
    modes.main()


def test_the_script_compares_two_runs(tmp_path, monkeypatch, capsys):
    data = write_dataset(tmp_path / "data", 60)
    runs = [save_run(tmp_path / "corners"), save_run(tmp_path / "shared", seed=1)]
    out = tmp_path / "out/modes.json"
    start(monkeypatch, "--runs", *runs, "--data", data, "--windows", 8, "--sample_steps", 1, "--json", out)
    report = json.loads(out.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert report["measures"].keys() == MEASURES.keys() and report["windows"] == 8
    for estimates in report["measures"].values():
        value = {name: estimate["value"] for name, estimate in estimates.items()}
        assert value["difference"] == pytest.approx(value["corners"] - value["shared"])
    assert report["runs"]["shared"]["step"] == 1 and report["runs"]["corners"]["sha256"]
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "first - second" in printed and "inverse dynamics" in printed and "\\[" not in printed


def test_errors_are_one_line(tmp_path, monkeypatch, capsys):
    data, first = write_dataset(tmp_path / "data", 3), save_run(tmp_path / "first")
    second = save_run(tmp_path / "second", replace(LAYOUT, future=(4,)))
    for arguments, message in (
        (["--runs", first, second], r"error: first has future (2, 4), second (4,)"),
        (["--runs", first, first], "error: runs of the same name"),
        (["--runs", first, "--windows", 1], "error: --windows 1: two or more"),
        (["--runs", tmp_path / "none"], "error: "),
    ):
        with pytest.raises(SystemExit) as stopped:
            start(monkeypatch, "--data", data, "--json", tmp_path / "a.json", *arguments)
        printed = capsys.readouterr().err.strip()
        assert stopped.value.code == 1 and printed.startswith(message) and len(printed.splitlines()) == 1
