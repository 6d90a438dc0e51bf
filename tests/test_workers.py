"""Worker processes that crash, hang, raise or cannot start."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from envs.workers import WorkerError, Workers, write_json


def start_square(folder: str, faults: dict):
    """work(seed) = seed squared; faults {seed: "raise", "hang", or how many times it kills its process}."""

    def work(seed):
        with open(Path(folder) / f"{seed}.tries", "a") as file:
            file.write("x")
        fault = faults.get(seed, 0)
        if fault == "raise":
            raise RuntimeError("bad luck")
        if fault == "hang":
            time.sleep(60)
        elif len((Path(folder) / f"{seed}.tries").read_text()) <= fault:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"square": seed**2, "threads": os.environ["OMP_NUM_THREADS"]}

    return work


def start_and_die():
    os.kill(os.getpid(), signal.SIGSEGV)


def run_squares(folder, faults, seeds, count=2, **kwargs):
    with Workers(start_square, (str(folder), faults), count, **kwargs) as workers:
        for seed in seeds:
            workers.submit(seed)
        return dict(workers.results())


def test_killed_workers_lose_nothing_but_a_seed_that_kills_twice(tmp_path, caplog):
    before = os.environ.get("OMP_NUM_THREADS")
    results = run_squares(tmp_path, {0: 99, 3: 1}, range(6))
    assert results.pop(0) is None
    assert results == {seed: {"square": seed**2, "threads": "1"} for seed in range(1, 6)}
    tries = {seed: len((tmp_path / f"{seed}.tries").read_text()) for seed in range(6)}
    assert tries == {0: 2, 1: 1, 2: 1, 3: 2, 4: 1, 5: 1}
    assert "seed 3: worker died (SIGKILL); trying once more" in caplog.text and "seed 0: worker died" in caplog.text
    assert os.environ.get("OMP_NUM_THREADS") == before


def test_a_hanging_worker_is_replaced(tmp_path):
    results = run_squares(tmp_path, {1: "hang"}, (1, 2), count=1, timeout=1.0)
    assert results[1] is None and results[2]["square"] == 4


def test_an_exception_stops_the_run_and_names_the_seed(tmp_path):
    with pytest.raises(WorkerError, match="seed 2: RuntimeError: bad luck"):
        run_squares(tmp_path, {2: "raise"}, (1, 2), count=1)


def test_workers_that_cannot_start_point_to_the_doctor():
    with pytest.raises(WorkerError, match=r"SIGSEGV.*doctor"), Workers(start_and_die, (), 1) as workers:
        workers.submit(0)
        list(workers.results())


def test_json_is_replaced_at_once(tmp_path, monkeypatch):
    path = tmp_path / "a" / "results.json"
    write_json(path, {"k": 1})
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_json(path, {"k": 2})
    assert json.loads(path.read_text()) == {"k": 1}
