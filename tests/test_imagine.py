"""Predicted beside real: the right frames are compared, under the right actions."""

import io
import json
import re
import sys

import av
import numpy as np
import pytest
import torch
from PIL import Image

from envs.rollout import rollout
from experiments import imagine as script
from experiments.imagine import BAR, MOMENTS, as_dataset, contact_sheet, imagine, panels, side_by_side
from policies import measures
from policies.flow_policy import FlowPolicy
from selfflow_robot.data import finalize, open_dataset, write_episode
from selfflow_robot.tokens import Layout
from tests.fakes import LineEnv, LineExpert
from tests.synthetic import LAYOUT, make_batch, save_run, write_dataset

LENGTH = 40


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Frame t of an episode is evenly grey 2 t; action t has dx = t."""
    root = tmp_path_factory.mktemp("data")
    for seed in range(2):
        frames = np.tile(2 * np.arange(LENGTH, dtype=np.uint8)[:, None, None, None], (1, 16, 32, 3))
        action = np.zeros((LENGTH, 7), np.float32)
        action[:, 0] = np.arange(LENGTH)
        write_episode(root, seed, frames, np.zeros((LENGTH, 10), np.float32), action, action, ["go"] * LENGTH, True)
    finalize(root)
    return open_dataset(root)


class Perfect:
    """A world model of that data set: it knows how far each action brightens the picture, whatever it is given."""

    layout = Layout(past=(0,), future=(4, 8), horizon=8, height=16, width=32)

    def predict_video(self, batch, generators):
        assert len(generators) == len(batch["video"])
        first = 2 * batch["executed"][:, 0, 0].numpy().astype(int)[:, None, None, None, None]
        return np.tile(np.concatenate([first + 8, first + 16], 1), (1, 1, 16, 32, 3)).astype(np.uint8)


class Repeating(Perfect):
    """It shows again what it was given, whatever is done."""

    def predict_video(self, batch, generators):
        return batch["video"][:, :1].repeat(1, 2, 1, 1, 1).numpy()


def test_a_perfect_model_predicts_the_real_frames_under_the_true_actions_alone(dataset):
    windows, predicted = imagine(Perfect(), dataset)
    assert windows.real.shape == (32, 2, 16, 32, 3) and windows.given.shape == (32, 1, 16, 32, 3)
    assert np.array_equal(windows.step, np.arange(32))
    real = windows.real.astype(int)
    assert np.abs(real - predicted["true"]).max() <= 3  # video compression
    assert np.abs(real - windows.given - np.array([8, 16])[:, None, None, None]).max() <= 5
    # those of half the episode's windows later, 16 of them, 2 brighter each; and none
    assert np.abs(np.abs(real - predicted["shuffled"]) - 32).max() <= 3
    assert np.abs(predicted["zero"][:, 1].astype(int) - 16).max() == 0


def test_scores_and_gaps_of_a_perfect_model_and_of_one_that_repeats(dataset):
    windows = measures.held(dataset, Perfect.layout)
    assert len(windows) == 32 and len(set(windows.episode)) == 1  # of two episodes, one is held out
    predicted = measures.predictions(Perfect(), windows)
    scores = {name: measures.frame_scores(windows, frames) for name, frames in predicted.items()}
    assert scores["shuffled"]["psnr"] == pytest.approx(20 * np.log10(255 / 32), abs=1)
    assert (scores["true"]["psnr"] > 38).all() and (scores["true"]["ssim"] > 0.9).all()
    # the nearer frame is 8 brighter than the given one, which is no motion
    assert np.isnan(scores["true"]["psnr_moving"]).all()
    repeated = measures.frame_scores(windows, windows.repeated)
    same = measures.predictions(Repeating(), windows, variants=("true",))
    assert np.array_equal(repeated["psnr"], measures.frame_scores(windows, same["true"])["psnr"])
    assert repeated["psnr"][:, 1] == pytest.approx(20 * np.log10(255 / 16), abs=1.5)


def test_an_episode_that_is_not_there_or_too_short_is_named(dataset, tmp_path):
    with pytest.raises(ValueError, match="--episode 7: the validation split has 1"):
        imagine(Perfect(), dataset, number=7)
    short = open_dataset(write_dataset(tmp_path / "short", 2, length=5, height=16, width=32))
    with pytest.raises(ValueError, match="too short"):
        imagine(Perfect(), short)
    other = open_dataset(write_dataset(tmp_path / "other", 2, length=5))
    with pytest.raises(ValueError, match=r"pictures of \(16, 32\), .* holds \(32, 48\)"):
        measures.held(other, Perfect.layout)


def test_windows_are_spread_over_all_held_out_episodes(tmp_path):
    dataset = open_dataset(write_dataset(tmp_path, 60))
    every, some = measures.held(dataset, LAYOUT), measures.held(dataset, LAYOUT, 6)
    held_out = {episode.start for episode in dataset.split("validation")}
    assert len(held_out) > 1 and set(every.episode) == set(some.episode) == held_out
    assert len(every) == 8 * len(held_out) and every.step.max() == 7  # of 12 steps, 4 lie ahead
    assert len(some) == 6 and bool(every.batch["video_mask"].all()) and some.real.shape[1] == 2
    assert np.array_equal(every.given[:, 0], every.batch["video"][:, 1].numpy())  # the present is the last past frame


def test_columns_and_rows_of_the_video(dataset):
    values = [np.full((3, 16, 32, 3), value, np.uint8) for value in (10, 200)]
    video = side_by_side(values, ["", ""])
    assert video.shape == (3, 32 + BAR, 128, 3)
    assert (video[:, BAR:, :60] == 10).all() and (video[:, BAR:, 68:] == 200).all()

    windows, predicted = imagine(Perfect(), dataset)
    video = panels(windows, predicted, (4, 8), 3)
    assert video.shape == (32, 2 * (32 + BAR), 4 * 64, 3)
    near, far = video[5, BAR + 16, 32::64, 0].astype(int), video[5, 2 * BAR + 48, 32::64, 0].astype(int)
    expected = np.array([2 * 5, 2 * 5, 2 * 21, 0])  # real, true, shuffled, no motion
    assert np.abs(near - expected - 8).max() <= 3 and np.abs(far - expected - 16).max() <= 3

    sheet = np.asarray(Image.open(io.BytesIO(contact_sheet(windows, predicted, (4, 8), 3))))
    assert sheet.shape == (BAR + MOMENTS * 32, 256, 3)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("run"))


def test_a_windows_noise_is_its_own(run, tmp_path):
    """Whatever else is measured, and beside whatever it is computed."""
    policy = FlowPolicy.load(run, steps=2, temperature=1.0)
    dataset = open_dataset(write_dataset(tmp_path, 60))
    every, some = measures.held(dataset, LAYOUT), measures.held(dataset, LAYOUT, 3)
    rows = [every.batch["index"].tolist().index(number) for number in some.batch["index"].tolist()]
    together = measures.sampled_actions(policy, every, "policy")
    assert together.shape == (len(every), 3, 7)
    assert measures.sampled_actions(policy, some, "policy") == pytest.approx(together[rows], abs=1e-4)
    assert not np.allclose(measures.sampled_actions(policy, some, "policy", seed=1), together[rows], atol=1e-3)


def test_features_of_a_still_clip_are_zero(run):
    policy = FlowPolicy.load(run)
    video = make_batch()["video"].numpy()  # (2, 4, ...)
    still = np.repeat(video[:, :1], 3, 1)
    assert np.abs(measures.clip_features(policy, still)).max() < 1e-5
    moving = measures.clip_features(policy, video[:, 1:])
    assert moving.shape == (2, 2 * 2 * 32) and np.abs(moving).max() > 1e-3


def start(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["imagine.py", *map(str, arguments)])
    script.main()


def test_the_script_writes_video_still_and_numbers(run, tmp_path, monkeypatch, capsys):
    data, out = write_dataset(tmp_path / "data", 60), tmp_path / "made/imagined.mp4"
    monkeypatch.setattr(script, "lpips_missing", lambda: "not here")
    start(monkeypatch, "--checkpoint", run, "--data", data, "--out", out, "--windows", 12, "--sample_steps", 2)
    with av.open(str(out)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 8 and frames[0].shape == (2 * (64 + BAR), 4 * 96, 3)
    assert Image.open(out.with_suffix(".png")).size == (4 * 96, BAR + MOMENTS * 64)
    report = json.loads(out.with_suffix(".json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert report["windows"] == 12 and report["episodes"] > 1 and report["lpips_missing"] == "not here"
    assert [row["offset"] for row in report["ahead"]] == [2, 4]
    for row in report["ahead"]:
        assert row.keys() == {"offset", "psnr", "psnr_moving", "ssim"}
        values = {name: estimate["value"] for name, estimate in row["psnr"].items()}
        assert values["true - shuffled"] == pytest.approx(values["true"] - values["shuffled"])
        assert row["psnr"]["true"]["low"] < values["true"] < row["psnr"]["true"]["high"]
    assert report["frechet"].keys() == {"true", "shuffled", "zero", "given"}
    assert report["consistency"]["mm"]["value"] > 0 and report["inverse_dynamics"]["degrees"]["value"] > 0
    printed = capsys.readouterr().out
    assert "2 held-out" in printed and "LPIPS left out: not here" in printed and "Self-consistency" in printed
    assert sorted(path.name for path in out.parent.iterdir()) == ["imagined.json", "imagined.mp4", "imagined.png"]


def test_the_video_alone(run, tmp_path, monkeypatch):
    data, out = write_dataset(tmp_path / "data", 3), tmp_path / "imagined.mp4"
    start(monkeypatch, "--checkpoint", run, "--data", data, "--out", out, "--windows", 0, "--sample_steps", 1)
    assert out.exists() and not out.with_suffix(".json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--windows", 1], "error: --windows 1: two or more"),
        (["--episode", 9], "error: --episode 9: the validation split has 1"),
        (["--data", "nowhere"], "error: data set nowhere is not there"),
        (["--checkpoint", "nothing"], "error: .*nothing"),
    ],
)
def test_errors_are_one_line(run, tmp_path, monkeypatch, capsys, arguments, message):
    data = write_dataset(tmp_path / "data", 3)
    with pytest.raises(SystemExit) as stopped:
        start(monkeypatch, "--checkpoint", run, "--data", data, "--out", tmp_path / "a.mp4", *arguments)
    printed = capsys.readouterr().err.strip()
    assert stopped.value.code == 1
    assert len(printed.splitlines()) == 1 and re.match(message, printed)


def test_a_live_episode_is_a_data_set_of_one():
    env = LineEnv()

    class Driver:
        def reset(self, instruction=""):
            self.expert = LineExpert(env)

        def act(self, observation):
            action, self.done_subtask = self.expert.act()
            return action

    episode = rollout(env, Driver(), seed=3)
    layout = Layout(past=(-1, 0), future=(2, 4), horizon=3, height=16, width=32)
    dataset = as_dataset(episode, layout)
    windows = measures.held(dataset, layout, split="all")
    assert len(windows) == episode.steps - 4 and dataset.instructions == ("open", "place")
    assert np.array_equal(windows.batch["video"][5].numpy(), episode.frames[[4, 5, 7, 9]])
    assert torch.equal(windows.batch["executed"][5], torch.from_numpy(episode.executed[5:8]))
    assert [windows.batch["instruction"][i] for i in (0, 10)] == [episode.instructions[i] for i in (0, 10)]
