"""Predicted beside real: the right frames are compared."""

from types import SimpleNamespace

import numpy as np
import pytest

from experiments.imagine import BAR, imagine, side_by_side
from selfflow_robot.data import finalize, open_dataset, write_episode


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Frame t of an episode is evenly grey 2 t; action t has dx = t."""
    root, length = tmp_path_factory.mktemp("data"), 40
    for seed in range(2):
        frames = np.tile(2 * np.arange(length, dtype=np.uint8)[:, None, None, None], (1, 16, 32, 3))
        action = np.zeros((length, 7), np.float32)
        action[:, 0] = np.arange(length)
        write_episode(root, seed, frames, np.zeros((length, 10), np.float32), action, action, ["go"] * length, True)
    finalize(root)
    return open_dataset(root)


class Perfect:
    """A world model of that data set: it knows how far each action brightens the picture."""

    layout = SimpleNamespace(past=(0,), future=(4, 8), horizon=8)

    def predict_video(self, batch, generator):
        given = batch["video"][:, :1].numpy().astype(int)
        first = batch["executed"][:, 0, 0].numpy()
        assert np.abs(given[:, 0, 0, 0, 0] - 2 * first).max() <= 2  # actions belong to the given frame
        return np.concatenate([given + 8, given + 16], axis=1).astype(np.uint8)


def test_a_perfect_model_predicts_the_real_frames(dataset):
    real, predicted, given = imagine(Perfect(), dataset)
    assert real.shape == predicted.shape == given.shape == (32, 16, 32, 3)
    assert np.abs(real.astype(int) - predicted).max() <= 3  # video compression
    assert np.abs(real.astype(int) - given - 16).max() <= 3


def test_an_episode_that_is_not_there_is_named(dataset):
    with pytest.raises(ValueError, match="--episode 7: the validation split has 1"):
        imagine(Perfect(), dataset, number=7)


def test_left_is_real_and_right_is_predicted():
    left, right = np.full((3, 16, 32, 3), 10, np.uint8), np.full((3, 16, 32, 3), 200, np.uint8)
    video = side_by_side(left, right, ("", ""))
    assert video.shape == (3, 32 + BAR, 128, 3)
    assert (video[:, BAR:, :60] == 10).all() and (video[:, BAR:, 68:] == 200).all()
