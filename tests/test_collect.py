"""Collection: which seeds, resuming after interruptions, mixed driving. A fake world; one episode in the real one."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from fakes import LIMIT, InlineWorkers, LineEnv, LineExpert

from envs.tasks import POSES, get_task
from experiments.collect_demos import collect, record
from selfflow_robot.config import CollectConfig
from selfflow_robot.data import DatasetError, committed_seeds, open_dataset

FATAL = 5  # a seed whose first attempt kills its worker


class Backwards:
    def reset(self, instruction=""):
        pass

    def act(self, observation):
        return np.array([-0.05, 0, 0, 0, 0, 0, 1], np.float32)


def start(cfg, root, keep_failures):
    driver = Backwards() if cfg.policy else None
    work = partial(record, LineEnv(width=cfg.width, height=cfg.height), LineExpert, driver, cfg, root, keep_failures)

    def fatal_once(seed):
        if seed == FATAL and not Path("killed").exists():
            Path("killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.3 if Path("slow").exists() else 0)
        return work(seed)

    return fatal_once


def config(**kwargs):
    return CollectConfig(**{"name": "line", "width": 32, "height": 16, "disturbance": 0.0, **kwargs})


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def inline(monkeypatch):
    monkeypatch.setattr("experiments.collect_demos.Workers", InlineWorkers)


def test_successes_only_whatever_crashes_and_whoever_works(folder, capsys):
    root = collect(config(episodes=8, workers=2), start)
    assert committed_seeds(root) == {1, 2, 3, 4, 5, 6, 8, 9}  # 0 and 7 fail, 5 killed its worker once
    assert (folder / "killed").exists()
    dataset = open_dataset(root)
    assert [episode.seed for episode in dataset.episodes] == [1, 2, 3, 4, 5, 6, 8, 9]
    assert all(episode.success for episode in dataset.episodes)
    assert set(dataset.instructions) == {"open", "place"}
    assert "success 8/10 = 80% [49%, 94%]" in capsys.readouterr().out


def test_a_data_set_grows_and_is_repaired(folder, inline):
    (folder / "killed").touch()
    root = collect(config(episodes=3, workers=1), start)
    assert committed_seeds(root) == {1, 2, 3}
    collect(config(episodes=7, workers=1), start)  # continues behind the last seed
    assert committed_seeds(root) == {1, 2, 3, 4, 5, 6, 8}
    os.unlink(root / "data/chunk-000/file-003.parquet")  # as the reader advises for a damaged file
    (root / "collection.json").unlink()
    collect(config(episodes=7, workers=1), start)
    assert [episode.seed for episode in open_dataset(root).episodes] == [1, 2, 3, 4, 5, 6, 8]
    noted = json.loads((root / "collection.json").read_text())["success"]  # those of the lost list count again
    assert {int(seed) for seed, success in noted.items() if success} == {1, 2, 3, 4, 5, 6, 8}


def test_a_killed_run_continues_with_the_same_command(folder):
    (folder / "slow").touch()
    here = Path(__file__).parent
    code = "import test_collect as t; t.collect(t.config(episodes=6, workers=1), t.start)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(here.parent), str(here), *sys.path])}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.DEVNULL)
    root, deadline = folder / "data/line", time.monotonic() + 100
    while len(committed_seeds(root)) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    survived = committed_seeds(root)
    assert 2 <= len(survived) < 6
    modified = {path: path.stat().st_mtime_ns for path in root.glob("videos/**/*.mp4")}
    (folder / "slow").unlink()
    (folder / "killed").touch()
    collect(config(episodes=6, workers=1), start)
    assert [episode.seed for episode in open_dataset(root).episodes] == [1, 2, 3, 4, 5, 6]
    kept = [path for path, when in modified.items() if path.stat().st_mtime_ns == when]
    assert len(kept) >= len(survived)


def test_with_a_policy_failures_are_kept_and_labelled(folder, inline):
    root = collect(config(episodes=3, first_seed=20, workers=1, policy="p", policy_fraction=1.0), start)
    dataset = open_dataset(root)
    assert [(e.seed, e.success) for e in dataset.episodes] == [(20, False), (21, False), (22, False)]
    assert (dataset.executed[:, 0] == np.float32(-0.05)).all()
    assert (dataset.action[:, 0] > 0).all()


def test_what_comes_after_success_is_recorded_as_told(folder, inline):
    (folder / "killed").touch()
    roots = {n: collect(config(name=f"line_{n}", episodes=1, linger=n), start) for n in (0, 3, 8, 100)}
    lengths = {n: open_dataset(root).episodes[0].length for n, root in roots.items()}
    assert lengths == {n: min(lengths[0] + n, LIMIT) for n in lengths} and lengths[8] < LIMIT
    with pytest.raises(ValueError, match="linger -1"):
        collect(config(linger=-1), start)


@pytest.mark.parametrize("variation", [0.0, 1.0])
def test_the_expert_varies_as_told(folder, variation):
    told = []

    def make_expert(env, rng, variation):
        told.append((variation, rng.bit_generator.state))
        return LineExpert(env)

    for seed in (1, 1, 2):
        record(LineEnv(width=32, height=16), make_expert, None, config(variation=variation), "data/line", False, seed)
    assert [given for given, _ in told] == [variation] * 3
    first, again, other = (state for _, state in told)
    assert first == again != other  # the seed's own


def test_ways_do_not_hang_on_where_a_margin_stands_the_robot(folder):
    """The expert's random numbers are others than those of the place: the stream of `Task.draw` is not drawn twice."""
    told = []

    def make_expert(env, rng, variation):
        told.append(rng.uniform(-1, 1, 2))
        return LineExpert(env)

    env = LineEnv(width=32, height=16)
    env.task = get_task("open_drawer")
    for margin in (0.0, 0.04):
        record(env, make_expert, None, config(margin=margin), f"data/{margin}", False, 1)
    drawn = env.task.draw(1, 0.04)
    beside = np.subtract(drawn["robot_xy"], POSES[drawn["pose"]][:2]) / 0.04
    assert not np.allclose(told[1], beside) and not np.allclose(told[0], told[1])
    assert np.array_equal(told[0], np.random.default_rng([1, 0]).uniform(-1, 1, 2))  # without one as ever


def test_a_margin_moves_the_object_and_before_a_cabinet_the_robot(folder):
    env = LineEnv(width=32, height=16)
    robot = ["pose", "robot_xy"]
    for name, moved in (("open_and_place", ["object_xy", *robot]), ("open_drawer", robot), ("move_near", [])):
        env.task = get_task(name)
        for margin in (0.0, 0.04):
            told = config(margin=margin)
            record(env, lambda env, *_: LineExpert(env), None, told, f"data/{name}_{margin}", False, 1)
            drawn = env.task.draw(1, 0.04)
            assert env.options == {"reconfigure": True} | ({key: drawn[key] for key in moved} if margin else {})
    for wrong in (config(task="move_near", margin=0.04), config(task="open_and_place", margin=-0.04)):
        with pytest.raises(ValueError, match="margin"):
            collect(wrong, start)


def test_another_kind_of_data_set_is_refused(folder, inline):
    (folder / "data/line").mkdir(parents=True)
    path = folder / "data/line/collection.json"
    path.write_text(json.dumps({"task": "open_and_place", "width": 64, "height": 16, "success": {}}))
    with pytest.raises(DatasetError, match=r"holds .*'width': 64.*--name"):
        collect(config(), start)
    path.unlink()
    collect(config(episodes=1, workers=1), start)
    for name, value in {"linger": 80, "margin": 0.04, "variation": 0.0, "policy": "runs/a"}.items():
        with pytest.raises(DatasetError, match=rf"holds .*'{name}'.*, not .*'{name}': {value!r}.*--name"):
            collect(config(episodes=2, workers=1, **{name: value}), start)
    older = json.loads(path.read_text())
    del older["linger"]  # a version that did not write it down
    path.write_text(json.dumps(older))
    collect(config(episodes=2, workers=1, linger=80), start)
    for damaged in ("{", json.dumps({name: value for name, value in older.items() if name != "width"})):
        path.write_text(damaged)
        with pytest.raises(DatasetError, match=re.escape(str(path.relative_to(folder)))):
            collect(config(episodes=2), start)
    with pytest.raises(ValueError, match="unknown task 'fridge'; known: open_and_place"):
        collect(config(task="fridge"), start)


def start_hopeless(cfg, root, keep_failures):
    return lambda seed: {"success": False, "steps": 1}


def test_an_expert_that_never_succeeds_does_not_run_for_ever(folder, inline):
    with pytest.raises(DatasetError, match="only 0/24"):
        collect(config(episodes=2, workers=1), start_hopeless)


@pytest.mark.sim
def test_one_real_episode(folder):
    from experiments.collect_demos import start_collecting

    cfg = CollectConfig(name="real", episodes=1, workers=1, width=64, height=48, disturbance=1.0)
    seed = start_collecting(cfg, "data/real", True)
    result = seed(3)
    assert committed_seeds("data/real") == {3}
    collect(cfg, start)  # finalizes
    dataset = open_dataset("data/real")
    assert dataset.num_frames == result["steps"] and dataset.image_shape == (48, 64, 3)
    assert dataset.frames.std() > 20 and not np.array_equal(dataset.action, dataset.executed)
    assert dataset.instructions[0] == "open top drawer"
