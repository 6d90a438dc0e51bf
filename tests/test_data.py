import json
import multiprocessing
import os
import resource
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from selfflow_robot import data
from selfflow_robot.data import (
    DatasetError,
    batch_indices,
    batches,
    committed_seeds,
    finalize,
    open_dataset,
    windows,
    write_episode,
)
from selfflow_robot.metrics import psnr

SEEDS = (3, 11, 40, 1007)
FORK = multiprocessing.get_context("fork")


def make_episode(seed: int, length: int | None = None) -> dict:
    """A smooth scene with a moving ball, random numbers, an instruction that changes half way."""
    random = np.random.default_rng(seed)
    length = 9 + seed % 7 if length is None else length
    y, x = np.mgrid[:48, :64]
    scene = np.stack([90 + x + seed % 5 * 10, 80 + y, 140 - x], axis=-1)  # (H, W, 3)
    centre = np.linspace(10, 54, length)
    ball = np.exp(-((x - centre[:, None, None]) ** 2 + (y - 24) ** 2) / 80)[..., None]  # (T, H, W, 1)
    half = length // 2
    return {
        "frames": (scene * (1 - ball) + np.array([200, 60, 60]) * ball).astype(np.uint8),
        "proprio": random.normal(size=(length, 10)).astype(np.float32),
        "action": random.normal(size=(length, 7)).astype(np.float32),
        "executed": random.normal(size=(length, 7)).astype(np.float32),
        "instructions": ["open top drawer"] * half + ["place apple into top drawer"] * (length - half),
        "success": seed % 2 == 1,
    }


def collect(root: Path, seeds=SEEDS) -> Path:
    for seed in seeds:
        write_episode(root, seed, **make_episode(seed))
    finalize(root)
    return root


def tree(root: Path) -> dict[str, bytes]:
    """Every file but the frame cache."""
    files = (p for p in root.rglob("*") if p.is_file() and ".cache" not in p.parts)
    return {str(p.relative_to(root)): p.read_bytes() for p in files}


@pytest.fixture(scope="module")
def collected(tmp_path_factory) -> Path:
    return collect(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture
def copy(collected, tmp_path) -> Path:
    """A private copy to damage, its videos not decoded yet."""
    return Path(shutil.copytree(collected, tmp_path / "set", ignore=shutil.ignore_patterns(".cache")))


def flip_byte(path: Path, where: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * where)] ^= 0xFF
    path.write_bytes(content)


# ---------------------------------------------------------------------------------------------- round trip and format


def test_round_trip_loses_only_video_compression(collected):
    dataset = open_dataset(collected)
    assert [episode.seed for episode in dataset.episodes] == sorted(SEEDS)
    assert dataset.image_shape == (48, 64, 3) and dataset.fps == 3 and dataset.view == "overhead"
    start = 0
    for episode in dataset.episodes:
        source = make_episode(episode.seed)
        assert (episode.start, episode.length) == (start, len(source["frames"]))
        assert episode.success == source["success"]
        rows = slice(start, start + episode.length)
        for name in ("proprio", "action", "executed"):
            np.testing.assert_array_equal(getattr(dataset, name)[rows], source[name])
            assert getattr(dataset, name).dtype == np.float32
        assert [dataset.instructions[task] for task in dataset.task[rows]] == source["instructions"]
        assert psnr(dataset.frames[rows], source["frames"]) > 38
        start += episode.length
    assert dataset.num_frames == start == len(dataset.frames)


def test_layout_is_lerobot_v3(collected):
    info = json.loads((collected / "meta/info.json").read_text())
    assert info["codebase_version"] == "v3.0" and info["fps"] == 3 and info["total_episodes"] == len(SEEDS)
    assert info["features"]["observation.images.overhead"]["shape"] == [48, 64, 3]
    assert info["features"]["action.executed"]["shape"] == [7]
    rows = pq.read_table(collected / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    assert [row["episode_index"] for row in rows] == list(range(len(SEEDS)))
    index = []
    for row in rows:
        path = collected / info["data_path"].format(
            chunk_index=row["data/chunk_index"], file_index=row["data/file_index"]
        )
        table = pq.read_table(path)
        assert set(table["episode_index"].to_pylist()) == {row["episode_index"]}
        np.testing.assert_array_equal(table["timestamp"].to_numpy(), np.arange(row["length"], dtype=np.float32) / 3)
        assert table.schema.field("action").type == pa.list_(pa.float32(), 7)
        index += table["index"].to_pylist()
    assert index == list(range(info["total_frames"]))
    assert [row["seed"] for row in rows] == list(SEEDS)
    # LeRobot reads the instructions with pandas, as the index
    pandas = pytest.importorskip("pandas")
    tasks = pandas.read_parquet(collected / "meta/tasks.parquet")
    assert list(tasks.index) == ["open top drawer", "place apple into top drawer"]
    assert list(tasks["task_index"]) == [0, 1]


def test_tree_does_not_depend_on_the_order_of_collection(collected, tmp_path):
    root = collect(tmp_path / "set", seeds=(1007, 11))
    collect(root, seeds=(40, 3))  # earlier seeds arrive later: every global index moves
    assert tree(root) == tree(collected)


def test_statistics(collected):
    values = np.arange(101.0)[:, None] * [1, -2]
    result = data.statistics(values)
    np.testing.assert_allclose(result["mean"], [50, -100])
    np.testing.assert_allclose(result["q01"], [1, -198])
    np.testing.assert_allclose(result["std"], np.sqrt((101**2 - 1) / 12) * np.array([1, 2]))
    dataset, stored = open_dataset(collected), json.loads((collected / "meta/stats.json").read_text())
    np.testing.assert_allclose(stored["action"]["std"], dataset.stats["action"]["std"], rtol=1e-12)
    assert stored["index"]["max"] == [dataset.num_frames - 1]
    image = stored["observation.images.overhead"]
    assert np.shape(image["mean"]) == (3, 1, 1) and image["count"] == [dataset.num_frames]
    pixels = dataset.frames.reshape(-1, 3) / 255
    np.testing.assert_allclose(np.ravel(image["mean"]), pixels.mean(0), atol=0.02)
    np.testing.assert_allclose(np.ravel(image["std"]), pixels.std(0), atol=0.02)


def test_reads_many_episodes_per_file_and_foreign_columns(collected, tmp_path):
    """As LeRobot itself writes: one parquet, one mp4 for all episodes; no seed, success or action.executed."""
    ours, root = open_dataset(collected), tmp_path / "foreign"
    info = json.loads((collected / "meta/info.json").read_text())
    del info["features"]["action.executed"]
    (root / "meta/episodes/chunk-000").mkdir(parents=True)
    (root / "meta/info.json").write_text(json.dumps(info))
    shutil.copy(collected / "meta/tasks.parquet", root / "meta/tasks.parquet")
    table = pa.concat_tables([pq.read_table(p) for p in sorted(collected.glob("data/*/*.parquet"))])
    table = table.drop_columns(["action.executed"]).replace_schema_metadata(None)
    (root / "data/chunk-000").mkdir(parents=True)
    pq.write_table(table, root / "data/chunk-000/file-000.parquet")
    key = "observation.images.overhead"
    rows = pq.read_table(collected / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    for row in rows:
        del row["seed"], row["success"]
        row["data/chunk_index"] = row["data/file_index"] = 0
        row[f"videos/{key}/chunk_index"] = row[f"videos/{key}/file_index"] = 0
        row[f"videos/{key}/from_timestamp"] = row["dataset_from_index"] / 3
    pq.write_table(pa.Table.from_pylist(rows), root / "meta/episodes/chunk-000/file-000.parquet")
    (root / f"videos/{key}/chunk-000").mkdir(parents=True)
    (root / f"videos/{key}/chunk-000/file-000.mp4").write_bytes(data.encode_video(ours.frames, 3))

    dataset = open_dataset(root)
    np.testing.assert_array_equal(dataset.action, ours.action)
    np.testing.assert_array_equal(dataset.executed, dataset.action)
    assert [e.seed for e in dataset.episodes] == [0, 1, 2, 3] and dataset.hash != ours.hash
    for episode in dataset.episodes:
        rows = slice(episode.start, episode.start + episode.length)
        assert psnr(dataset.frames[rows], ours.frames[rows]) > 38


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": np.zeros((9, 48, 64, 3), np.float32)}, "uint8"),
        ({"frames": np.zeros((9, 47, 64, 3), np.uint8)}, "even"),
        ({"proprio": np.zeros((9, 9))}, "observation.state: expected"),
        ({"action": np.full((9, 7), np.nan)}, "action: not finite"),
        ({"instructions": ["open top drawer"]}, "instructions"),
        ({"seed": 1_000_000}, "seed 1000000"),
    ],
)
def test_refuses_wrong_episodes(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        write_episode(tmp_path, **{"seed": 0, **make_episode(0, length=9), **change})
    assert committed_seeds(tmp_path) == set()


# ------------------------------------------------------------------------------------------------- interruptions


def write_for_ever(root: Path, first: int) -> None:
    for seed in range(first, 1_000_000, 2):
        write_episode(root, seed, **make_episode(seed))


def test_killed_writers_lose_nothing_committed(tmp_path):
    root = tmp_path / "set"
    writers = [FORK.Process(target=write_for_ever, args=(root, first)) for first in (0, 1)]
    for writer in writers:
        writer.start()
    deadline = time.monotonic() + 60
    while len(committed_seeds(root)) < 6:
        assert time.monotonic() < deadline and all(writer.is_alive() for writer in writers)
        time.sleep(0.01)
    for writer in writers:
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
    seeds = committed_seeds(root)
    finalize(root)
    dataset = open_dataset(root)
    assert {episode.seed for episode in dataset.episodes} == seeds
    for episode in dataset.episodes:
        rows = slice(episode.start, episode.start + episode.length)
        np.testing.assert_array_equal(dataset.action[rows], make_episode(episode.seed)["action"])
    # resumed: as if never interrupted
    wanted = range(max(seeds) + 3)  # with the two that were interrupted
    collect(root, [seed for seed in wanted if seed not in seeds])
    assert tree(root) == tree(collect(tmp_path / "uninterrupted", wanted))


class Killed(BaseException):
    pass


@pytest.mark.parametrize("survives", range(7))
def test_finalize_killed_anywhere_is_repaired(collected, tmp_path, monkeypatch, survives):
    root = collect(tmp_path / "set", seeds=(11, 40, 1007))
    write_episode(root, 3, **make_episode(3))
    replace_file, calls = os.replace, iter(range(survives))

    def dying_replace(*args):
        if next(calls, None) is None:
            raise Killed
        replace_file(*args)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", dying_replace)
        finalize(root)
    with pytest.raises(DatasetError, match=r"not finalized.*collect_demos"):
        open_dataset(root)
    finalize(root)
    assert tree(root) == tree(collected)


def test_disk_full_is_reported_and_loses_nothing(copy):
    before = tree(copy)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # the kernel refuses to grow files further
    try:
        with pytest.raises(DatasetError, match=r"cannot write .*file-005.mp4: File too large.*make room"):
            write_episode(copy, 5, **make_episode(5))
        with pytest.raises(DatasetError, match=r"cannot write .*frames-.*make room"):
            open_dataset(copy)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert tree(copy) == before  # no temporary file either
    assert len(open_dataset(copy).episodes) == len(SEEDS)


# ---------------------------------------------------------------------------------------------------- damaged files


def damage_parquet(root: Path) -> Path:
    flip_byte(path := root / "data/chunk-000/file-011.parquet", 0.2)
    return path


def truncate_parquet(root: Path) -> Path:
    path = root / "data/chunk-000/file-011.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    return path


def damage_video(root: Path) -> Path:
    flip_byte(path := root / "videos/observation.images.overhead/chunk-000/file-011.mp4")
    return path


def truncate_video(root: Path) -> Path:
    path = root / "videos/observation.images.overhead/chunk-000/file-011.mp4"
    path.write_bytes(path.read_bytes()[:-100])
    return path


def delete_video(root: Path) -> Path:
    (path := root / "videos/observation.images.overhead/chunk-000/file-011.mp4").unlink()
    return path


def put_nan(root: Path) -> Path:
    path = root / "data/chunk-000/file-011.parquet"
    table = pq.read_table(path)
    values = np.full(len(table) * 7, np.nan, np.float32)
    column = table.schema.get_field_index("action")
    pq.write_table(table.set_column(column, "action", pa.FixedSizeListArray.from_arrays(pa.array(values), 7)), path)
    return path


@pytest.mark.parametrize(
    "damage", [damage_parquet, truncate_parquet, damage_video, truncate_video, delete_video, put_nan]
)
def test_damage_names_the_file_and_the_remedy_works(collected, copy, damage):
    path = damage(copy)
    with pytest.raises(DatasetError, match=rf"{path.name}.*Delete it and run the same .*collect_demos"):
        open_dataset(copy)
    path.unlink(missing_ok=True)
    assert committed_seeds(copy) == set(SEEDS) - {11}
    collect(copy, seeds=(11,))
    assert tree(copy) == tree(collected)
    assert open_dataset(copy).hash == open_dataset(collected).hash


def test_undecodable_foreign_video_is_named(tmp_path):
    path = tmp_path / "file-000.mp4"
    video = data.encode_video(make_episode(0)["frames"], 3)
    path.write_bytes(video[: len(video) // 2])
    with pytest.raises(DatasetError, match=r"file-000.mp4 does not decode"):
        list(data.decode_video(path))


def edit_info(root: Path, **changes) -> None:
    path = root / "meta/info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_meta_errors(copy, tmp_path):
    with pytest.raises(DatasetError, match=r"nowhere is not there.*Run: python experiments/collect_demos.py"):
        open_dataset(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match='no video of view "wrist"'):
        open_dataset(copy, view="wrist")
    edit_info(copy, codebase_version="v2.1")
    with pytest.raises(DatasetError, match=r"info.json: codebase_version v2.1"):
        open_dataset(copy)
    info = json.loads((copy / "meta/info.json").read_text())
    info["features"]["observation.state"]["shape"] = [8]
    edit_info(copy, codebase_version="v3.0", features=info["features"])
    with pytest.raises(
        DatasetError, match=r"file-003.parquet: observation.state has shape \(12, 10\), expected \(12, 8\)"
    ):
        open_dataset(copy)
    (copy / "meta/info.json").write_text('{"codebase_version": ')
    with pytest.raises(DatasetError, match=r"info.json is damaged.*rebuilds meta/"):
        open_dataset(copy)
    finalize(copy)  # what the collect command ends with
    assert len(open_dataset(copy).episodes) == len(SEEDS)


def test_finalize_refuses_mixed_recordings(tmp_path):
    write_episode(tmp_path, 1, **make_episode(1))
    write_episode(tmp_path, 2, **make_episode(2), fps=5)
    with pytest.raises(DatasetError, match=r"file-002.parquet: fps is 5, in the first episode 3"):
        finalize(tmp_path)


# ------------------------------------------------------------------------------------------------------ frame cache


def test_merged_data_sets_are_one(collected, tmp_path):
    """As if collected in one go; with what came since when merged again."""
    one, two, both = (tmp_path / name for name in ("one", "two", "both"))
    collect(one, SEEDS[::2]), collect(two, SEEDS[1:2])
    data.merge([one, two], both)
    collect(two, SEEDS[3:])
    info = data.merge([one, two], both)
    assert info["total_episodes"] == len(SEEDS) and tree(both) == tree(collected)


def test_merging_loses_nothing(tmp_path):
    one, two, both = (tmp_path / name for name in ("one", "two", "both"))
    collect(one, (3, 11)), collect(two, (11,)), collect(both, (40,))
    before = tree(both)
    with pytest.raises(DatasetError, match=r"two and .*one both have an episode of seed 11.*--first_seed"):
        data.merge([one, two], tmp_path / "new")
    with pytest.raises(DatasetError, match=r"both holds other episodes already \(seed 40\)"):
        data.merge([one], both)
    with pytest.raises(DatasetError, match=r"absent: no committed episode"):
        data.merge([one, tmp_path / "absent"], both)
    assert tree(both) == before and not (tmp_path / "new").exists()


def read_slowly(root: Path, queue, log: Path) -> None:
    decode = data.decode_video

    def slow_decode(path: Path):
        with open(log, "a") as file:
            file.write(f"{path.name}\n")
        time.sleep(0.05)
        return decode(path)

    data.decode_video = slow_decode  # in this process only
    queue.put(int(open_dataset(root).frames.sum()))


def test_processes_starting_together_decode_once(copy, tmp_path):
    queue, log = FORK.Queue(), tmp_path / "log"
    readers = [FORK.Process(target=read_slowly, args=(copy, queue, log)) for _ in range(2)]
    for reader in readers:
        reader.start()
    sums = [queue.get(timeout=60) for _ in readers]
    for reader in readers:
        reader.join()
    assert sums == [int(open_dataset(copy).frames.sum())] * 2
    assert len(log.read_text().split()) == len(SEEDS)


def test_cache_is_reused_repaired_and_replaced(copy, monkeypatch):
    frames = np.array(open_dataset(copy).frames)
    (path,) = (copy / ".cache").glob("frames-*.npy")
    path.write_bytes(path.read_bytes()[:-10])
    np.testing.assert_array_equal(open_dataset(copy).frames, frames)
    with monkeypatch.context() as patch:
        patch.setattr(data, "decode_video", lambda path: pytest.fail("decoded again"))
        np.testing.assert_array_equal(open_dataset(copy).frames, frames)
    collect(copy, seeds=(5,))
    assert len(open_dataset(copy).frames) == len(frames) + len(make_episode(5)["frames"])
    assert not path.exists() and len(list((copy / ".cache").glob("frames-*"))) == 1


# ------------------------------------------------------------------------------------------------ splits and windows


@pytest.fixture
def counted(collected) -> data.Dataset:
    """Frame i shows the value i everywhere; action i is i, executed -i."""
    dataset = open_dataset(collected)
    count = np.arange(dataset.num_frames)
    return replace(
        dataset,
        frames=np.broadcast_to(count.astype(np.uint8)[:, None, None, None], (len(count), 2, 2, 3)),
        proprio=np.repeat(count[:, None], 10, 1).astype(np.float32),
        action=np.repeat(count[:, None], 7, 1).astype(np.float32),
        executed=-np.repeat(count[:, None], 7, 1).astype(np.float32),
    )


def test_split_is_by_seed_and_stable(counted):
    def with_seeds(seeds):
        return replace(counted, episodes=tuple(data.Episode(10 * i, 10, s, True) for i, s in enumerate(seeds)))

    few, many = with_seeds(range(200)), with_seeds(reversed(range(2000)))
    held_out = {e.seed for e in few.split("validation")}
    assert held_out == {e.seed for e in many.split("validation") if e.seed < 200}
    assert held_out.isdisjoint(e.seed for e in few.split("train"))
    assert len(few.split("train")) + len(held_out) == 200
    assert 70 <= len(many.split("validation")) <= 130  # 5% of 2000
    assert len(counted.split("validation")) == 1 and len(counted.split("train")) == 3
    single = with_seeds([4])
    assert len(single.split("train")) == 1
    with pytest.raises(DatasetError, match="no episode in split validation"):
        windows(single, split="validation")
    with pytest.raises(ValueError, match="split"):
        counted.split("test")


def test_windows_know_the_answer(counted):
    every = windows(counted, past=(-2, 0), future=(3, 6), horizon=4, split="all")
    assert len(every) == counted.num_frames
    for episode in counted.episodes:
        last = episode.start + episode.length - 1
        for now in (episode.start, episode.start + 1, last - 4, last):
            item = every[now]  # split "all": windows are numbered like frames
            asked = np.array([now - 2, now, now + 3, now + 6])
            np.testing.assert_array_equal(item["video"][:, 0, 0, 0], np.clip(asked, episode.start, last))
            np.testing.assert_array_equal(item["video_mask"], asked <= last)
            steps = now + np.arange(4)
            np.testing.assert_array_equal(item["action"][:, 0], np.minimum(steps, last))
            np.testing.assert_array_equal(item["executed"], -item["action"])
            np.testing.assert_array_equal(item["action_mask"], steps <= last)
            assert item["proprio"][0] == now and item["index"] == now
            expected = make_episode(episode.seed)["instructions"][now - episode.start]
            assert item["instruction"] == expected


def test_actions_after_a_change_of_instruction_are_masked(counted):
    every = windows(counted, horizon=4, split="all")
    episode = counted.episodes[1]
    instructions = make_episode(episode.seed)["instructions"]
    change = instructions.index("place apple into top drawer")
    assert 2 <= change <= len(instructions) - 4
    for ahead, expected in ((2, [True, True, False, False]), (1, [True, False, False, False]), (0, [True] * 4)):
        item = every[episode.start + change - ahead]
        np.testing.assert_array_equal(item["action_mask"], expected)


def test_gather_shapes_and_types(collected):
    batch = windows(open_dataset(collected)).gather([0, 5, 2])
    assert batch["video"].shape == (3, 3, 48, 64, 3) and batch["video"].dtype == torch.uint8
    assert batch["action"].shape == batch["executed"].shape == (3, 8, 7) and batch["action"].dtype == torch.float32
    assert batch["video_mask"].dtype == batch["action_mask"].dtype == torch.bool
    assert batch["proprio"].shape == (3, 10) and batch["index"].tolist() == [0, 5, 2]
    batch["video"].zero_()  # a copy: the data set is not touched
    assert windows(open_dataset(collected)).gather([0])["video"].any()


@pytest.mark.parametrize("past,future,horizon", [((1,), (2,), 8), ((0,), (0,), 8), ((0,), (8, 4), 8), ((0,), (4,), 0)])
def test_windows_refuse_wrong_offsets(counted, past, future, horizon):
    with pytest.raises(ValueError, match="must increase"):
        windows(counted, past, future, horizon)


@pytest.mark.parametrize("size", [3, 7, 50])
def test_every_window_once_per_epoch(size):
    row = np.concatenate([batch_indices(20, size, seed=1, step=k) for k in range(200 // size + 1)])
    for epoch in range(10):
        assert sorted(row[20 * epoch : 20 * epoch + 20]) == list(range(20))
    assert not np.array_equal(row[:20], row[20:40])
    assert not np.array_equal(row[:20], [*batch_indices(20, 20, seed=2, step=0)])


def test_batches_resume_anywhere(counted):
    part = windows(counted, split="all")
    straight, resumed = batches(part, 8, seed=5), batches(part, 8, seed=5, start_step=6)
    for _ in range(6):
        next(straight)
    for _ in range(4):
        a, b = next(straight), next(resumed)
        assert a["instruction"] == b["instruction"]
        for name in a.keys() - {"instruction"}:
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=0)
