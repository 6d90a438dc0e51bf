"""Our scene replays what upstream recorded."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments.replay_reference import compare_frames, find_recordings, read_recording, replay, report

FOLDER = os.environ.get("SIMPLER_GOLDEN_DIR")
TASK = "google_robot_place_apple_in_closed_top_drawer"
absent = pytest.mark.skipif(
    not FOLDER or not Path(FOLDER).is_dir(), reason="set SIMPLER_GOLDEN_DIR to the recorded reference rollouts"
)
pytestmark = [pytest.mark.golden, absent]


def shorten(recording, steps):
    arrays = {k: v[:steps] if k in ("action", "success") else v[: steps + 1] for k, v in recording.arrays.items()}
    return replace(recording, arrays=arrays)


@pytest.mark.sim
def test_the_arm_follows_the_recording_until_it_touches_something():
    from envs.simpler import SimplerEnv

    env = SimplerEnv(TASK, width=640, height=512)
    for episode in (f"{TASK}-20", f"{TASK}-4"):
        recording = read_recording(Path(FOLDER) / episode)
        start = shorten(recording, 30)
        free = replay(env, start)
        result = report(start, free, free, compare_frames(env, recording))
        assert result["free_tcp_mm_max"] < 1, episode
        assert result["psnr_reset_db"] >= 45, episode
        assert result["first_contact"] is None or result["first_contact"] > 5, episode
    env.close()


@pytest.mark.sim
@pytest.mark.parametrize(
    ("task", "steps"), [("google_robot_pick_horizontal_coke_can", 20), ("widowx_carrot_on_plate", 12)]
)
def test_objects_start_and_arms_move_as_recorded_on_the_table(task, steps, tmp_path):
    """Seen by 640 pixels across; what the arm does before it touches anything."""
    from envs.simpler import ROBOTS, SimplerEnv
    from envs.tasks import get_task

    env = SimplerEnv(task, *ROBOTS[get_task(task).robot].picture_size)
    start = shorten(read_recording(Path(FOLDER) / f"{task}-20"), steps)
    for name in ("frame_000.png", "overlay.png"):  # one picture is enough
        (tmp_path / name).symlink_to(start.folder / name)
    free = replay(env, start)
    result = report(start, free, free, compare_frames(env, replace(start, folder=tmp_path)))
    assert env.width == 640 and result["psnr_reset_db"] >= 45
    assert result["settled_mm"] < 1 and result["settled_degrees"] < 1
    assert result["first_contact"] is None or result["first_contact"] > 5
    assert 0 < result["free_tcp_mm_max"] < 1
    assert not free["success"].any()
    env.close()


@pytest.fixture
def damaged(tmp_path):
    folder = tmp_path / f"{TASK}-20"
    shutil.copytree(Path(FOLDER) / folder.name, folder)
    return folder


def test_a_truncated_recording_is_named(damaged):
    arrays = damaged / "arrays.npz"
    arrays.write_bytes(arrays.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"{damaged} is not a complete recording"):
        read_recording(damaged)


def test_a_recording_with_missing_rows_is_named(damaged):
    with np.load(damaged / "arrays.npz") as archive:
        arrays = dict(archive)
    np.savez(damaged / "arrays.npz", **{**arrays, "qpos": arrays["qpos"][:-1]})
    with pytest.raises(ValueError, match=f"qpos must hold {len(arrays['action']) + 1} finite rows"):
        read_recording(damaged)


def test_recordings_are_found_in_a_folder_of_them(damaged, tmp_path):
    (tmp_path / "notes").mkdir()
    assert find_recordings([tmp_path]) == [damaged] == find_recordings([damaged])
    with pytest.raises(FileNotFoundError, match="elsewhere is not a folder"):
        find_recordings([tmp_path / "elsewhere"])
