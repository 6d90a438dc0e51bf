"""The checkpoint that comes with the repository: small, described, and it acts where there is no other."""

import json

import pytest

from experiments.eval_simpler import ACTING, evaluate
from policies import load_policy
from selfflow_robot import checkpoint
from selfflow_robot.config import EvalConfig


def test_it_is_small_whole_and_says_what_was_measured():
    assert (checkpoint.SHIPPED / checkpoint.EXPORTED).stat().st_size < 48e6
    manifest = checkpoint.load(checkpoint.SHIPPED)[1]  # checks the tensors' hash
    assert {result["task"] for result in manifest["results"]} >= {"open_and_place", "open_drawer", "close_drawer"}
    card = (checkpoint.SHIPPED / "README.md").read_text()
    assert all(result["command"] in card and result["protocol_hash"] in card for result in manifest["results"])
    # What a newcomer evaluates is what was measured.
    acting = {name: getattr(EvalConfig, name) for name in ACTING}
    for result in manifest["results"]:
        assert result["policy_settings"] == acting and "--checkpoint checkpoints/google_robot" in result["command"]
        assert result["protocol"] == "visual_matching" or result["seeds"]["first"] == EvalConfig.first_seed
    load_policy(checkpoint.SHIPPED)


def test_every_episode_that_it_was_measured_by_comes_along():
    manifest = checkpoint.read_manifest(checkpoint.SHIPPED / "config.json")
    wholes = [json.loads((checkpoint.SHIPPED / name).read_text()) for name in manifest["evaluations"]]
    assert {whole["checkpoint_hash"] for whole in wholes} == {manifest["sha256"]}
    counts = {whole["protocol_hash"]: sum(e["success_final"] for e in whole["episodes"]) for whole in wholes}
    assert counts == {r["protocol_hash"]: r["summary"]["success_final"]["k"] for r in manifest["results"]}


@pytest.mark.sim
@pytest.mark.slow
def test_it_opens_the_drawer_where_nothing_was_trained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = evaluate(EvalConfig(task="open_top_drawer", episodes=1, workers=1))
    assert results["checkpoint"] == str(checkpoint.SHIPPED)
    assert results["summary"]["drawer_opened"]["k"] == 1
    assert json.loads((tmp_path / "runs/eval_google_robot_open_top_drawer/results.json").read_text())["episodes"]
