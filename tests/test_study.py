"""A study expands, runs once whatever happens to its runners, and says what its numbers say. The scripts pretend."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from experiments import study
from experiments.report import ReportError
from experiments.studies import analysis, archive, page, plan, results
from selfflow_robot import config
from selfflow_robot.data import encode_video
from selfflow_robot.metrics import Estimate

ROOT = Path(study.__file__).resolve().parent.parent
SCRIPTS = ("collect_demos", "pretrain", "finetune", "export", "eval_simpler", "probe", "modes", "imagine")
TEXT = """
question: Does it help?
task: open_and_place
arms:
  flow_matching: {label: plain, pretrain: {method: flow_matching}}
  self_flow: {label: Self-Flow, pretrain: {method: self_flow}, against: [flow_matching]}
  kept: {label: kept, pretrain: {method: self_flow}, finetune: {self_flow_terms: true}, against: [self_flow]}
  none: {label: no pretraining, against: [flow_matching]}
plan:
  - {model: tiny, data: 8, budget: steps, arms: [flow_matching, self_flow]}
  - {model: tiny, data: 8, budget: compute, arms: [flow_matching, self_flow, kept, none]}
primary: {first: self_flow, second: flow_matching, model: tiny, data: 8, budget: steps, margin: 0.1}
looks: [1, 2]
pretrain: {lengths: [50, 100], settings: {cooldown: 0}}
finetune: {lengths: [40, 80], settings: {cooldown: 0}}
cost:
  reference: self_flow
  pretrain: {flow_matching: 1.0, self_flow: 1.25}
  finetune: {flow_matching: 0.8, self_flow: 1.0}
judge: {episodes: 4, first_seed: 5000, test_share: 0.5}
evaluate: {episodes: 20, on_the_way: 10, first_seed: 10000, settings: {execute: 2}}
modes: {windows: 4}
seconds: {step: {tiny: 1.0}, demonstration: 1, episode: 1, probe: 1, modes: 1, imagine: 1}
"""
FAKE = """
import json, sys, time
from pathlib import Path

script, words = Path(__file__).stem, sys.argv[1:]
args = dict(zip(words[::2], words[1::2]))
said = f"{script} {' '.join(words)}"
with open("calls.log", "a") as calls:
    calls.write(said + "\\n")
if Path("fail").exists() and Path("fail").read_text() in said:
    sys.exit("disk full")
if Path("slow").exists() and Path("slow").read_text() in said:
    Path("started").touch()
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        Path("interrupted").touch()
        sys.exit(130)
if Path("meet").exists() and script == "collect_demos":  # go on only where two runners are at work
    Path(f"met_{args['--name']}").touch()
    while len(list(Path().glob("met_*"))) < 2:
        time.sleep(0.01)

def write(path, content):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))

def read(path):
    return json.loads(Path(path).read_text())

if script == "collect_demos":
    write(f"data/{args['--name']}/meta/info.json", {"total_episodes": int(args["--episodes"])})
elif script in ("pretrain", "finetune"):
    assert Path(args["--data"], "meta/info.json").exists()
    start = args.get("--pretrained", "none")
    assert start == "none" or read(f"{start}/config.json")["kind"] == "pretrain"
    path = Path(f"runs/{args['--name']}/state.json")
    before = read(path)["step"] if path.exists() else 0
    assert before < int(args["--steps"]), f"already at {before}"
    write(path, {"step": int(args["--steps"]), "kind": script})
    write(path.with_name("metrics.jsonl"), json.dumps({"step": 1, "cosine": 0.5}))
elif script == "export":
    write(f"{args['--out']}/config.json", read(f"{args['--checkpoint']}/state.json"))
elif script == "eval_simpler":
    assert read(f"{args['--checkpoint']}/config.json")["kind"] == "finetune"
    better = Path("better").exists() and "self_flow" in args["--name"]
    episodes = []
    for number in range(int(args["--episodes"])):
        good = better or number % 2 == 0
        episodes.append({"seed": int(args["--first_seed"]) + number, "success_final": good, "success_any": good,
                         "subgoals": {"drawer_opened": True, "apple_placed": good}, "steps": 9, "video": None})
        if Path("poses").exists():
            episodes[-1]["start"] = {"pose": number % int(Path("poses").read_text())}
    write(f"runs/{args['--name']}/results.json", {"task": args["--task"], "episodes": episodes, "crashed": []})
elif script == "probe":
    better = 0.1 * ("self_flow" in args["--runs"])
    layers = {str(k): {"gripper": {"value": 0.2 * k + better, "validated": 0.2 * k}} for k in range(3)}
    base = {name: {"gripper": {"value": 0.1}} for name in ("nothing", "pixels", "latents", "untrained")}
    write(f"runs/{args['--name']}/results.json", {"runs": [{"layers": layers}], "baselines": base})
elif script == "modes":
    names = "world_model_psnr_moving world_model_psnr world_model_gap policy_mm inverse_dynamics_mm".split()
    columns = {Path(args["--runs"]).name: 20.0 + ("self_flow" in args["--runs"]), "nothing learned": 15.0}
    row = {name: {"value": value, "low": None, "high": None} for name, value in columns.items()}
    write(args["--json"], {"measures": {name: row for name in names}})
elif script == "imagine":
    write(args["--out"], "video")
"""


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> plan.Study:
    """A working directory with scripts that pretend, and a small study."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scripts").mkdir()
    for script in SCRIPTS:
        (tmp_path / "scripts" / f"{script}.py").write_text(FAKE)
    for name, value in {"HERE": tmp_path / "scripts", "POLL": 0.01, "RESCAN": 0.05}.items():
        monkeypatch.setattr(study, name, value)
    (tmp_path / "small.yaml").write_text(TEXT)
    return plan.load("small.yaml")


def calls() -> list[str]:
    return Path("calls.log").read_text().splitlines() if Path("calls.log").exists() else []


def expand(one: plan.Study, seeds: int = 1) -> list[plan.Job]:
    return plan.jobs(one, plan.points(one, seeds))


def short(one: plan.Study) -> plan.Study:
    """The primary comparison alone, at one length."""
    pretrain, finetune = one.pretrain | {"lengths": [100]}, one.finetune | {"lengths": [80]}
    return replace(one, plan=one.plan[:1], pretrain=pretrain, finetune=finetune)


def few(one: plan.Study) -> list[plan.Job]:
    return expand(short(one))


def runner(jobs: int = 2, say=lambda line: None) -> study.Runner:
    return study.Runner(Path("runs/small"), [{}] * jobs, {"plan": "x"}, say)


def command(*arguments: str) -> subprocess.Popen:
    """study.py in a process of its own, with the scripts that pretend."""
    code = "import sys; from pathlib import Path; from experiments import study\n"
    code += f"study.HERE, study.POLL, study.RESCAN = Path({str(study.HERE)!r}), 0.01, 0.05\n"
    code += "sys.argv[1:] = ['--study', 'small.yaml', *sys.argv[1:]]; sys.exit(study.main())"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], env=environment, stdout=subprocess.PIPE, text=True
    )


def wait_for(path: str) -> None:
    limit = time.monotonic() + 30
    while not Path(path).exists():
        assert time.monotonic() < limit, f"{path} never came"
        time.sleep(0.02)


# ----------------------------------------------------------------------------------------------------------------- plan


def test_equal_compute(tiny):
    assert plan.steps(tiny, "self_flow", "steps") == ({50: 50, 100: 100}, {40: 40, 80: 80})
    assert plan.steps(tiny, "flow_matching", "compute") == ({50: 62, 100: 125}, {40: 40, 80: 80})
    assert plan.steps(tiny, "self_flow", "compute") == ({50: 50, 100: 100}, {40: 40, 80: 80})
    assert plan.steps(tiny, "kept", "compute") == ({50: 50, 100: 100}, {40: 32, 80: 64})
    # 100 steps of Self-Flow cost 125, which are 156.25 plain steps of fine-tuning
    assert plan.steps(tiny, "none", "compute") == ({}, {40: 196, 80: 236})
    for arm in tiny.arms:
        before, after = plan.steps(tiny, arm, "compute")
        costs = plan._step_costs(tiny, arm)
        total = (before.get(100, 0) * (costs[0] or 0)) + after[80] * costs[1]
        assert total == pytest.approx(100 * 1.25 + 80 * 0.8, abs=0.5)


def test_trainings_are_shared_and_come_in_order(tiny):
    jobs = expand(tiny)
    seen = set()
    for job in jobs:
        assert set(job.needs) <= seen
        seen.add(job.name)
    assert len(seen) == len(jobs)
    pretrained = [job.name for job in jobs if job.kind == "pretrain" and "flow_matching" in job.name]
    assert pretrained == [f"pretrain_flow_matching_tiny_8_seed0_at_{n}" for n in (50, 62, 100, 125)]  # one run
    points = plan.points(tiny, 1)
    policies = {(p.arm, p.setting.budget): p.policy for p in points if p.last}
    assert policies["self_flow", "steps"] == policies["self_flow", "compute"]
    assert policies["flow_matching", "steps"] != policies["flow_matching", "compute"]
    kept = next(job for job in jobs if job.name == policies["kept", "compute"])
    words = " ".join(kept.commands[0])
    assert "--method self_flow --self_flow_terms true" in words
    assert "--pretrained runs/small/pretrain_self_flow_tiny_8_seed0_at_100" in words
    assert "--pretrained none" in next(
        " ".join(job.commands[0]) for job in jobs if job.name.startswith("finetune_none")
    )


def test_more_seeds_go_to_the_primary_comparison_alone(tiny):
    more = plan.points(tiny, 2)
    assert {point.seed for point in more if point.block == 0} == {0, 1}
    assert {point.seed for point in more if point.block == 1} == {0}
    assert {job.name for job in expand(tiny, 1)} < {job.name for job in expand(tiny, 2)}


def test_more_seeds_come_where_other_arms_stand_beside_the_comparison(tiny):
    beside = replace(tiny, plan=[tiny.plan[0] | {"arms": ["flow_matching", "none", "self_flow"]}])
    seeds = {arm: {p.seed for p in plan.points(beside, 2) if p.arm == arm} for arm in beside.plan[0]["arms"]}
    assert seeds == {"flow_matching": {0, 1}, "none": {0}, "self_flow": {0, 1}}


def test_few_labels_share_the_pretraining_on_all_video(tmp_path, monkeypatch):
    path = tmp_path / "few.yaml"
    few = TEXT.replace(
        "plan:", "plan:\n  - {model: tiny, data: 8, labels: 4, budget: steps, arms: [flow_matching, none]}"
    )
    path.write_text(few)
    one = plan.load(path)
    points = plan.points(one, 1)
    jobs = {job.name: job for job in plan.jobs(one, points)}
    blocks = [[p for p in points if p.block == block and p.arm == "flow_matching" and p.last] for block in (0, 1)]
    (labelled,), (whole,) = blocks
    assert labelled.backbones == whole.backbones and labelled.policy != whole.policy
    for point, folder in ((labelled, "data/open_and_place_4"), (whole, "data/open_and_place_8")):
        last = jobs[point.policy]
        while last.needs[0].startswith("finetune"):
            last = jobs[last.needs[0]]
        assert f"--data {folder} " in " ".join(last.commands[0])
        assert set(last.needs) == {point.backbones[-1][1], f"collect_{Path(folder).name}"}
        assert "--data data/open_and_place_8 " in " ".join(jobs[point.backbones[-1][1]].commands[0])
    cells = results.by_cell(points)
    assert all(len({point.policy for point in seeds}) == 1 for seeds in cells.values())
    assert "8 demonstrations, 4 of them with actions" in page.heading(labelled.setting)
    assert "with actions" not in page.heading(whole.setting)
    assert page.setting_cells(labelled.setting) == ["tiny", "8, 4 of them with actions", "steps"]
    for _, backbone in labelled.backbones:
        found = tmp_path / one.root / backbone.replace("pretrain_", "probe_") / "results.json"
        found.parent.mkdir(parents=True)
        found.write_text(json.dumps({"runs": [{"layers": {}}], "baselines": {}}))
    monkeypatch.chdir(tmp_path)
    settings = {(where.labels, where.budget) for where, *_ in results.probes(one, points)}
    assert settings == {(4, "steps")}  # the same pretraining once, as the first that uses it


def test_every_arm_meets_the_same_episodes(tiny):
    last = [job for job in expand(tiny) if job.kind == "evaluate" and "--episodes 20" in " ".join(job.commands[0])]
    assert {tuple(re.findall(r"--first_seed (\d+)", " ".join(job.commands[0]))) for job in last} == {("10000",)}
    assert {point.evaluation for point in plan.points(tiny, 1) if point.last} == {job.name for job in last}


@pytest.mark.parametrize("name", sorted(path.stem for path in plan.FOLDER.glob("*.yaml")))
def test_the_studies_here_call_scripts_as_they_are(name):
    one = plan.load(name)
    classes = {script: config_class for config_class, script in config.SCRIPTS.items()}
    checked = set()
    for job in expand(one, one.looks[-1]):
        for script, *words in job.commands:
            script, keys = script.removesuffix(".py"), [word for word in words if word.startswith("--")]
            if (script, *keys) in checked:
                continue
            checked.add((script, *keys))
            if script in classes:
                known = config.overrides(classes[script], words)  # exits at a key that does not exist
                OverridesParser.create().parse_overrides(known)  # raises at a value that hydra does not read
            else:
                source = (ROOT / "experiments" / f"{script}.py").read_text()
                assert all(f'"{key}"' in source for key in keys), (script, keys)
    assert {script for script, *_ in checked} == set(SCRIPTS)


def test_the_comparison_holds_what_was_asked_for():
    one = plan.load("selfflow_vs_flow_matching")
    assert one.looks[0] >= 3 and len(one.finetune["lengths"]) >= 5
    for budget in ("steps", "compute"):
        there = {arm for block in one.plan if block["budget"] == budget for arm in block["arms"]}
        assert {"none", "flow_matching", "self_flow", "self_flow_kept", "dual_timesteps", "sra"} <= there
        assert {"attention_separation"} <= there
        assert {block["data"] for block in one.plan if block["budget"] == budget} == {80, 320}


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("question:", "quest:", "question"),
        ("arms: [flow_matching, self_flow]}", "arms: [flow_matching, other]}", "block 0"),
        ("budget: steps, arms", "budget: hours, arms", "block 0"),
        ("budget: steps, arms", "labels: 9, budget: steps, arms", "labels must be 1 to 8"),
        ("first: self_flow", "first: kept", "primary comparison"),
        ("lengths: [40, 80]", "lengths: [80, 40]", "must rise"),
        ("pretrain: {flow_matching: 1.0, self_flow: 1.25}", "pretrain: {self_flow: 1.25}", "no cost"),
        ("[flow_matching, self_flow, kept, none]", "[kept, kept]", "twice"),
        ("on_the_way: 10", "on_the_way: 30", "on_the_way"),
        ("label: kept,", "lable: kept,", "lable"),
        ("question:", "runs: elsewhere\nquestion:", "no elsewhere.yaml"),
        ("question:", "question: [", "wrong.yaml is not YAML"),
        ("on_the_way: 10", "also: 10", "wrong.yaml: something is missing.*on_the_way"),
        ("looks: [1, 2]", "looks: [1, 2, 3, 4, 5, 6]", "6 looks, at most 5"),
    ],
)
def test_what_is_wrong_with_a_plan_is_said(tmp_path, old, new, said):
    assert old in TEXT
    (tmp_path / "wrong.yaml").write_text(TEXT.replace(old, new, 1))
    with pytest.raises(ValueError, match=said):
        plan.load(tmp_path / "wrong.yaml")


def test_an_unknown_study_names_those_there_are():
    with pytest.raises(ValueError, match="quick, selfflow_vs_flow_matching"):
        plan.load("nothing")


def test_the_hash_is_of_the_content(tiny):
    assert replace(tiny, text="# a comment\n" + TEXT).hash == tiny.hash
    assert replace(tiny, text=TEXT.replace("looks: [1, 2]", "looks: [1, 3]")).hash != tiny.hash


# ------------------------------------------------------------------------------------------------------------- analysis


def outcomes(*rows: str) -> np.ndarray:
    return np.array([[letter == "1" for letter in row] for row in rows])


def test_rates():
    found = analysis.wilson(outcomes("11" + "0" * 19))
    assert (found.value, found.low, found.high) == pytest.approx((2 / 21, 0.0265, 0.2891), abs=1e-4)
    nothing = analysis.rate(outcomes("0" * 50, "0" * 50))  # nothing varies, and that is no certainty
    assert nothing.low == 0 and nothing.high == pytest.approx(analysis.wilson(outcomes("0" * 100)).high)


def test_training_seeds_count_as_a_sample():
    """Two trainings, one always right and one never: the error of their mean is sqrt(0.5 / 2) = 0.5, not 0.5 / 20."""
    always_never, never = outcomes("1" * 200, "0" * 200), outcomes("0" * 200, "0" * 200)
    means = analysis._resampled([always_never, never], np.eye(200), 0)
    assert (means[0] - means[1]).std() == pytest.approx(0.5, abs=0.01)
    found = analysis.difference(always_never, never)
    assert found.value == 0.5 and (found.low, found.high) == (-1, 1)  # Student's t with one degree of freedom
    alone = analysis.difference(outcomes("10" * 100), outcomes("00" * 100))
    assert 0.4 < alone.low < 0.5 < alone.high < 0.6  # a single training: over its episodes


def test_episodes_are_paired():
    """The same easy and hard episodes in both arms: nothing is left of their spread, beyond Newcombe's interval."""
    same = outcomes("1100" * 25)
    found, apart = analysis.difference(same, same), analysis.difference(same, same[:, ::-1])
    assert found.value == apart.value == 0
    assert found.high - found.low < 0.5 * (apart.high - apart.low)
    with pytest.raises(ValueError, match="same episodes"):
        analysis.difference(same, same[:, 1:])


@pytest.mark.parametrize(("seeds", "spread", "half"), [(3, 0.0, 0.12), (3, 0.4, 0.20), (5, 0.4, 0.14), (3, 0.8, 0.35)])
def test_intervals_cover_the_truth(monkeypatch, seeds, spread, half):
    """Trainings whose skill varies by `spread` (logits; 0.4 are 8 points) on 100 episodes that vary too, and no true
    difference: how often the interval holds zero, and how far it reaches to either side (docs/study.md)."""
    monkeypatch.setattr(analysis, "RESAMPLES", 400)
    rng, found = np.random.default_rng(0), []

    def arm(episode):
        return rng.random((seeds, 100)) < 1 / (1 + np.exp(0.8 - episode - rng.normal(0, spread, (seeds, 1))))

    for _ in range(150):
        episode = rng.normal(0, 1, 100)
        found.append(analysis.difference(arm(episode), arm(episode)))
    assert np.mean([one.low <= 0 <= one.high for one in found]) > 0.93
    assert np.mean([one.high - one.low for one in found]) / 2 == pytest.approx(half, abs=0.03)


def test_episodes_that_repeat_each_other_count_once():
    """Every start twice, with the same outcome: nothing is known that the starts alone would not say."""
    once, other = outcomes("1100110101", "1000110100"), outcomes("0100010101", "1100010000")
    twice, again = np.repeat(once, 2, 1), np.repeat(other, 2, 1)
    starts = [f"pose {number}" for number in range(10) for _ in range(2)]
    assert analysis.difference(twice, again, starts=starts) == pytest.approx(analysis.difference(once, other))
    assert analysis.rate(twice, starts=starts) == pytest.approx(analysis.rate(once))
    assert analysis.wilson(twice, starts) == pytest.approx(analysis.wilson(once))
    assert analysis.mcnemar(twice, again, starts) == analysis.mcnemar(once, other)
    naive, honest = analysis.difference(twice, again), analysis.difference(twice, again, starts=starts)
    assert naive.high - naive.low < honest.high - honest.low
    with pytest.raises(ValueError, match="start of each of 20 episodes, got 10"):
        analysis.rate(twice, starts=starts[:10])


def test_a_start_counts_for_the_checkpoint_that_solves_more_of_its_episodes():
    first, second, starts = outcomes("1100111001"), outcomes("0001001000"), "aaabbbcccd"
    (pair,) = analysis.mcnemar(first, second, starts)
    assert (pair.only_first, pair.only_second, pair.trials, pair.p_value) == (3, 0, 4, 0.25)


def test_intervals_over_few_starts_cover_the_truth(monkeypatch):
    """Forty episodes from nine starts that decide most of an outcome, no true difference: counted as episodes the
    intervals miss far too often, counted as starts they hold. The starts are drawn anew for every study."""
    monkeypatch.setattr(analysis, "RESAMPLES", 400)
    rng, by_episode, by_start = np.random.default_rng(0), [], []

    def arm(start):  # 9 of 10 outcomes are those of their start, the arm's own
        return ((rng.random(9) < 0.5)[start] ^ (rng.random(40) < 0.1))[None]

    for _ in range(150):
        start = rng.integers(9, size=40)
        first, second = arm(start), arm(start)
        by_episode.append(analysis.difference(first, second))
        by_start.append(analysis.difference(first, second, starts=start.tolist()))
    held = [np.mean([one.low <= 0 <= one.high for one in found]) for found in (by_episode, by_start)]
    assert held[0] < 0.8 and held[1] > 0.93


def test_a_large_difference_is_found():
    rng = np.random.default_rng(1)
    found = analysis.difference(rng.random((3, 100)) < 0.8, rng.random((3, 100)) < 0.3)
    assert found.low > 0.2 and found.value == pytest.approx(0.5, abs=0.08)


def test_mcnemar():
    """The published table (1, 1, 7, 12) of test_metrics, for each of two training seeds."""
    first, second = "11" + "0" * 19, "10" + "1" * 7 + "0" * 12
    pairs = analysis.mcnemar(outcomes(first, first), outcomes(second, second))
    assert [(p.only_first, p.only_second, round(p.p_value, 4)) for p in pairs] == [(1, 7, 0.0703)] * 2
    for other in (outcomes(second), outcomes(second, second, second)):
        with pytest.raises(ValueError, match="pairs training seeds"):
            analysis.mcnemar(outcomes(first, first), other)


def test_few_numbers():
    found = analysis.over_seeds([1.0, 2.0, 3.0])  # t of two degrees of freedom: 4.303
    assert found == pytest.approx((2, 2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), abs=1e-3)
    assert analysis.over_seeds([1.0])[0] == 1 and np.isnan(analysis.over_seeds([1.0]).low)
    assert np.isnan(analysis.over_seeds([]).value) and analysis.over_seeds([2.0, None]).value == 2
    gap = analysis.paired_over_seeds({0: 1.0, 1: 2.0, 5: 9.0}, {0: 0.5, 1: 1.5, 7: 0.0})
    assert gap == pytest.approx((0.5, 0.5, 0.5))


@pytest.mark.parametrize("looks", [2, 3])
def test_all_looks_together_keep_their_promise(looks):
    """Pocock's levels: the chance that any of several looks at a growing sample misleads is 5 %."""
    from scipy.stats import multivariate_normal, norm

    bound = norm.ppf(1 - analysis.level_of(looks) / 2)
    share = np.arange(1, looks + 1)
    covariance = np.sqrt(np.minimum.outer(share, share) / np.maximum.outer(share, share))
    normal = multivariate_normal(np.zeros(looks), covariance, seed=0)
    inside = normal.cdf(np.full(looks, bound), lower_limit=np.full(looks, -bound))
    assert 1 - inside == pytest.approx(0.05, abs=0.002)


@pytest.mark.parametrize(
    ("interval", "look", "stop", "said"),
    [
        ((0.12, 0.01, 0.23), 1, True, "excludes zero"),
        ((-0.12, -0.23, -0.01), 1, True, "excludes zero"),
        ((0.01, -0.05, 0.07), 1, True, "within 10 points"),
        ((0.05, -0.05, 0.15), 1, False, "more training seeds"),
        ((0.05, -0.05, 0.15), 2, True, "last look"),
    ],
)
def test_stopping_rule(interval, look, stop, said):
    decision = analysis.decide(Estimate(*interval), look, 2, 0.1, seeds=3)
    assert decision.stop == stop and said in decision.why
    alone = analysis.decide(Estimate(*interval), look, 2, 0.1, seeds=1)
    assert alone.stop == (look == 2)


@pytest.mark.parametrize(
    ("interval", "said"),
    [
        ((0.2, 0.05, 0.35), "A helps: 50% with A, 30% with B, difference +20 points [+5, +35], on x."),
        ((-0.2, -0.35, -0.05), "A harms: 50% with A, 30% with B, difference -20 points [-35, -5], on x."),
        ((0.2, -0.05, 0.45), "No difference distinguishable from zero: 50% with A"),
        ((0.0, -0.08, 0.08), "No difference distinguishable from zero, and none beyond 10 points: "),
    ],
)
def test_conclusion(interval, said):
    rates = Estimate(0.5, 0.4, 0.6), Estimate(0.3, 0.2, 0.4)
    assert analysis.conclusion(("A", "B"), rates, Estimate(*interval), 0.1, "on x").startswith(said)


@pytest.mark.parametrize(("rates", "end"), [((0.08, 0.07), "0%"), ((0.93, 0.96), "100%"), ((0.5, 0.52), None)])
def test_a_margin_says_little_at_either_end(rates, end):
    text = analysis.conclusion(("A", "B"), [Estimate(rate, 0, 1) for rate in rates], Estimate(0, -0.05, 0.05), 0.1, "x")
    assert text.startswith("No difference distinguishable from zero, and none beyond 10 points")
    assert re.findall(r"within 10 points of (\d+%): there is little room", text) == ([end] if end else [])


# --------------------------------------------------------------------------------------------------------------- claims


def test_one_of_two_gets_a_claim(tmp_path):
    taken = study.claim(tmp_path, "job")
    assert taken and study.claim(tmp_path, "job") is None and study.claim(tmp_path, "job_at_2")
    study.release(taken)
    assert study.claim(tmp_path, "job")


def test_a_silent_claim_of_another_machine_is_taken_over(tmp_path):
    foreign = tmp_path / "job.claim.1"
    foreign.write_text(json.dumps({"place": ["elsewhere"], "pid": 1, "birth": "1"}))
    assert study.claim(tmp_path, "job") is None
    old = time.time() - study.STALE - 5
    os.utime(foreign, (old, old))
    taken = study.claim(tmp_path, "job")
    assert taken == tmp_path / "job.claim.2" and study.claim(tmp_path, "job") is None
    study.release(taken)
    assert list(tmp_path.iterdir()) == []


def test_a_claim_of_a_dead_process_is_taken_over_at_once(tmp_path):
    process = subprocess.Popen(["sleep", "60"])
    holder = {"place": study.place(), "pid": process.pid, "birth": study.birth(process.pid)}
    (tmp_path / "job.claim.1").write_text(json.dumps(holder))
    assert study.claim(tmp_path, "job") is None
    process.kill()
    process.wait()
    assert study.claim(tmp_path, "job")
    holder |= {"pid": os.getpid()}  # the number is in use again, by another process
    (tmp_path / "other.claim.1").write_text(json.dumps(holder))
    assert study.claim(tmp_path, "other")


def test_a_claim_that_is_being_written_counts(tmp_path):
    (tmp_path / "job.claim.1").touch()
    assert study.claim(tmp_path, "job") is None


# --------------------------------------------------------------------------------------------------------------- runner


def test_everything_is_done_once_and_then_nothing(tiny):
    jobs = few(tiny)
    assert runner().run(jobs)
    assert all(plan.done(job) for job in jobs)
    assert len(calls()) == sum(len(job.commands) for job in jobs) == len(set(calls()))
    assert runner().run(jobs)
    assert len(calls()) == len(set(calls()))
    assert not list(Path("runs/small/jobs").glob("*.claim.*"))
    record = json.loads(Path("runs/small/jobs/collect_open_and_place_8.json").read_text())
    assert record["state"] == "done" and record["plan"] == "x"


def test_a_margin_is_of_demonstrations_and_evaluation(tiny):
    """Each in a data set of its own, and nothing else of the study knows it."""
    Path("wide.yaml").write_text(TEXT + "margin: 0.05\n")
    wide, plain = expand(plan.load("wide.yaml")), expand(tiny)
    names = [job.name for job in wide if job.kind == "collect"]
    assert names == ["collect_open_and_place_margin_0.05_8", "collect_open_and_place_margin_0.05_4_from_5000"]
    for job, other in zip(wide, plain, strict=True):
        assert ("--margin 0.05" in " ".join(job.commands[0])) == (job.kind in ("collect", "evaluate"))
        assert "--margin" not in str(other.commands)


def test_what_lies_there_from_elsewhere_is_not_made_again(tiny):
    jobs = few(tiny)
    assert runner().run(jobs)
    for path in Path("runs/small/jobs").iterdir():
        path.unlink()
    Path("calls.log").unlink()
    Path(next(job for job in jobs if job.kind == "modes").output).unlink()
    assert runner().run(jobs)
    assert [line.split()[0] for line in calls()] == ["modes"]


def test_a_script_ends_before_its_job_is_done(tiny):
    fake = Path("scripts/modes.py")  # as modes.py: the numbers, then a picture of them
    fake.write_text(fake.read_text() + '\ntime.sleep(0.5)\nwrite(args["--json"] + ".png", "picture")\n')
    jobs = few(tiny)
    assert runner().run(jobs)
    pictures = [Path(f"{job.output}.png").exists() for job in jobs if job.kind == "modes"]
    records = [json.loads(Path(f"runs/small/jobs/{job.name}.json").read_text())["state"] for job in jobs]
    assert pictures and all(pictures) and set(records) == {"done"}


def test_a_failure_is_reported_and_the_others_go_on(tiny):
    jobs, lines = [job for job in expand(tiny) if job.kind in ("collect", "pretrain", "finetune")], []
    Path("fail").write_text("finetune --name small/finetune_none")
    first = runner(say=lines.append)
    assert not first.run(jobs)
    assert first.failed == {"finetune_none_tiny_8_seed0_at_196"}
    text = "\n".join(lines)
    assert "FAILED finetune_none_tiny_8_seed0_at_196" in text and "exit code 1" in text and "disk full" in text
    left = [job.name for job in jobs if not plan.done(job)]
    assert left and all("none" in name for name in left)
    states = study.states(jobs, Path("runs/small/jobs"))
    assert states["finetune_none_tiny_8_seed0_at_196"] == "failed"
    assert states["finetune_none_tiny_8_seed0_at_236"] == "waiting"
    Path("fail").unlink()
    assert runner().run(jobs)  # the next start tries again


def test_a_script_that_leaves_the_wrong_thing_has_failed(tiny):
    fake = Path("scripts/collect_demos.py")
    fake.write_text(fake.read_text().replace('int(args["--episodes"])', "3"))
    lines = []
    assert not runner(say=lines.append).run(expand(tiny)[:1])
    assert "is not what it should be" in lines[-1].splitlines()[0]


def test_killed_in_the_middle_it_goes_on(tiny):
    Path("slow").write_text("finetune --name small/finetune_self_flow")
    process = command("--jobs", "1", "--only", "block")
    process.communicate()
    assert process.returncode == 2  # no such job
    process = command("--jobs", "1", "--only", "evaluate")
    wait_for("started")
    process.kill()
    process.communicate()
    wait_for("interrupted")  # its script does not go on alone
    assert list(Path("runs/small/jobs").glob("*.claim.1"))
    before = calls()
    Path("slow").unlink()
    process = command("--jobs", "2", "--only", "evaluate")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out
    again = [line for line in calls()[len(before) :] if line in before]
    assert again == before[-1:]  # the one that was cut off, and nothing else
    assert not list(Path("runs/small/jobs").glob("*.claim.*"))


def test_two_runners_do_no_job_twice(tiny):
    Path("meet").touch()
    processes = [command("--jobs", "1", "--only", "probe") for _ in range(2)]
    texts = [process.communicate(timeout=90)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], texts
    assert len(calls()) == len(set(calls()))
    assert [text.count("start  collect") for text in texts] == [1, 1]
    assert sum(text.count("start ") for text in texts) == len([line for line in calls() if "export" not in line])


def test_a_study_works_in_the_folder_of_another(tiny):
    assert study.execute(replace(short(tiny), looks=[1]), (), 2) == 0
    before, page_before = calls(), Path("runs/small/report.html").read_bytes()
    more = TEXT.replace("arms: [flow_matching, self_flow]}", "arms: [flow_matching, self_flow, kept]}", 1)
    Path("more.yaml").write_text("runs: small\n" + more)
    two = replace(short(plan.load("more.yaml")), looks=[1])
    assert study.execute(two, (), 2) == 0
    assert all("finetune_kept" in line or "_kept_from" in line for line in calls()[len(before) :])
    assert len(calls()) > len(before) and len(calls()) == len(set(calls()))
    assert sorted(path.name for path in Path("runs/more").iterdir()) == ["plans.json", "report.html", "success_1.svg"]
    assert Path("runs/small/report.html").read_bytes() == page_before
    versions = [json.loads(Path(f"runs/{name}/plans.json").read_text())["versions"] for name in ("small", "more")]
    assert [len(one) for one in versions] == [1, 1] and versions[0][0]["hash"] != versions[1][0]["hash"]
    text = text_of(Path("runs/more/report.html"))
    assert "shared with the study small" in text and "kept 50% 10/20" in text
    Path("more.yaml").write_text("runs: small\n" + more.replace("execute: 2", "execute: 4"))
    with pytest.raises(ValueError, match="another file name"):  # what is there under a name must be what it would make
        study.execute(replace(short(plan.load("more.yaml")), looks=[1]), (), 2)


def test_an_end_that_is_asked_for_gives_the_claims_back(tiny):
    Path("slow").write_text("collect")
    process = command("--jobs", "1")
    wait_for("started")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 130 and Path("interrupted").exists()
    assert not list(Path("runs/small/jobs").glob("*.claim.*"))


def test_a_runner_that_was_asleep_gives_way(tiny, monkeypatch):
    monkeypatch.setattr(study, "HEARTBEAT", 0.0)
    Path("slow").write_text("collect")
    one, lines = runner(1), []
    one.say = lines.append
    one._fill(expand(tiny)[:1])
    wait_for("started")
    one._beat()
    assert len(one.running) == 1
    Path("runs/small/jobs/collect_open_and_place_8.claim.2").write_text("{}")
    one._beat()
    assert not one.running and "another has taken it over" in lines[-1] and Path("interrupted").exists()


def test_a_changed_command_is_refused(tiny):
    jobs = few(tiny)
    assert runner().run(jobs)
    study.require_same_commands(jobs, Path("runs/small/jobs"))
    Path("small.yaml").write_text(TEXT.replace("execute: 2", "execute: 4"))
    with pytest.raises(ValueError, match="another file name"):
        study.require_same_commands(few(plan.load("small.yaml")), Path("runs/small/jobs"))


def test_the_stopping_rule_asks_for_more_seeds_or_not(tiny, capsys):
    tiny = short(tiny)
    assert study.execute(tiny, (), 2) == 0  # one seed decides nothing: go on to the second look
    assert "more training seeds: 2 per arm" in capsys.readouterr().out
    assert any("self_flow_tiny_8_seed1" in line for line in calls())
    assert results.current_look(tiny) == 1


def test_a_clear_answer_ends_it_at_the_first_look(tiny):
    Path("better").touch()
    one = replace(short(tiny), looks=[2, 3])
    assert study.execute(one, (), 2) == 0
    assert any("seed1" in line for line in calls()) and not any("seed2" in line for line in calls())


def test_only(tiny):
    assert study.execute(tiny, ["evaluate_none*at_196", "evaluate_none*at_236"], 1) == 0
    made = ["collect_demos", "finetune", "export", "eval_simpler"]
    assert [line.split()[0] for line in calls()] == made + made[1:]
    with pytest.raises(ValueError, match=r"no job is called \*nothing\*"):
        study.execute(tiny, ["evaluate_none", "nothing"], 1)


def test_only_does_not_make_again_what_something_finished_needed(tiny):
    """A backbone that was brought from elsewhere: neither its shorter lengths nor its data are made for it."""
    backbone = Path("runs/small/pretrain_self_flow_tiny_8_seed0_at_100/config.json")
    backbone.parent.mkdir(parents=True)
    backbone.write_text(json.dumps({"step": 100, "kind": "pretrain"}))
    assert study.execute(tiny, ["evaluate_self_flow_from_100_tiny_8_seed0_at_40"], 1) == 0
    assert [line.split()[0] for line in calls()] == ["collect_demos", "finetune", "export", "eval_simpler"]


def test_slots_take_accelerators_in_turn(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in study.slots(3)] == ["3", "5", "3"]
    assert len(study.slots(0)) == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert study.slots(2) == [{}, {}]
    with pytest.raises(ValueError, match="jobs must be at least 1"):
        study.slots(-1)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    listed = "GPU 0: H100 (UUID: GPU-1)\n  MIG 1g.10gb Device 0: (UUID: MIG-2)\nGPU 1: H100 (UUID: GPU-3)\n"
    monkeypatch.setattr(study.subprocess, "run", lambda *a, **k: SimpleNamespace(stdout=listed))
    assert study.accelerators() == ["0", "1"]


def test_estimates_learn_from_what_was_run(tmp_path, tiny):
    jobs = [replace(job, seconds=100.0) for job in expand(tiny)[:1]]
    assert study.remaining_seconds(jobs, tmp_path) == 100
    for number, seconds in enumerate((20, 30, 400)):
        record = {"state": "done", "kind": "collect", "seconds": seconds, "expected_seconds": 10}
        (tmp_path / f"{number}.json").write_text(json.dumps(record))
    assert study.remaining_seconds(jobs, tmp_path) == 300
    assert [study.duration(s) for s in (5, 65, 3660)] == ["5 s", "1 min 05 s", "1 h 01 min"]


def test_list_shows_states_and_runs_nothing(tiny, capsys):
    study.print_list(expand(tiny), Path("runs/small/jobs"))
    out = capsys.readouterr().out
    assert re.search(r"ready +\d+ s +collect_open_and_place_8\n", out) and "left, one after the other" in out
    assert calls() == []


# --------------------------------------------------------------------------------------------------------------- report


def text_of(path: Path) -> str:
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]*>", " ", path.read_text())))


def test_report_says_what_the_numbers_say(tiny):
    Path("better").touch()
    assert runner().run(expand(tiny))
    path = study.report(tiny, 0)
    html, text = path.read_text(), text_of(path)
    level = f"{100 * (1 - analysis.level_of(2)):.1f}%"
    assert "Self-Flow helps: 100% with Self-Flow, 50% with plain, difference +50 points" in text and level in text
    interval = re.search(r"difference \+50 points (\[[^]]*\])", text)[1]
    assert f"success 1, 1 +50 {interval} 0.002" in text  # the table says what the conclusion says
    assert "1 training seed per arm, 20 episodes each" in text and "it speaks of two checkpoints" in text
    assert "Go on after look 1 of 2: one training seed" in text and "At equal compute (tested" in text
    assert "100% 20/20 [84%, 100%], 1" in text and "50% 10/20 [30%, 70%], 1" in text
    assert "0.002 (10:0)" in text  # McNemar: 2 / 2**10
    assert tiny.hash in text and "Everything that the plan holds was run." in text
    assert "0.50 0.10" not in text and "Self-Flow − plain 0.10" in text  # the probe's difference
    layers = html[html.index("What the layers know") : html.index("World model and actions")]
    assert "</span>Self-Flow<" in layers and "</span>kept<" not in layers  # the same pretraining is shown once
    assert "no pretraining" in text and "drawer opened" in text
    assert "apple placed" not in text  # every episode's success, so nothing beside it
    assert "<script" not in html and "<link" not in html and "url(http" not in html and "@import" not in html
    assert all(source.startswith("data:") for source in re.findall(r'src="([^"]*)"', html))
    assert html.count('role="img"') == 2 + 2 + 1 + 1  # success and probes of two settings, differences, the cosine
    curves = sorted(path.name for path in path.parent.glob("success_*.svg"))
    assert curves == ["success_1.svg", "success_2.svg"]
    for name in curves:
        ElementTree.parse(path.parent / name)  # a file that stands alone
    text = text_of(study.report(tiny, 1))  # the next look, of which nothing more was run
    assert "Not decided yet: 2 of 4 trainings" in text
    assert "The look before said: Self-Flow helps: 100% with Self-Flow, 50% with plain" in text


def test_episodes_that_begin_alike_count_once_on_the_page(tiny):
    """Twenty episodes from four poses: said where they are counted, and the interval is that of four."""
    said = {}
    for poses in ("20", "4"):
        shutil.rmtree("runs", ignore_errors=True)
        Path("poses").write_text(poses)
        assert runner().run(few(tiny))
        said[poses] = text_of(study.report(short(tiny), 0))
    end = r"points (\[.*?\]),.* 20 episodes each( from 4 starts)?\."
    (many, unsaid), (few_starts, told) = (re.search(end, text).groups() for text in said.values())
    assert unsaid is None and told and many != few_starts
    assert re.search(r"50% 10/20 \[30%, 70%\], 1 ", said["20"])  # Wilson of 10 in 20
    assert re.search(r"50% 10/20 \[15%, 85%\], 1, 4 starts", said["4"])  # and of 2 in 4


def test_arms_with_other_training_seeds_are_paired_by_seed(tiny):
    """The second look has two of the main arms and one of the others; what is not finished is left out of pairs."""
    Path("better").touch()
    one = plan.load("small.yaml")
    jobs = expand(one, 2)
    assert runner().run(jobs)
    study.report(one, 1)  # two training seeds of Self-Flow beside one of the arm that keeps its terms
    points, outcomes = plan.points(one, 2), results.Outcomes(one)
    sides = results.primary(one, points)
    assert [[point.seed for point in side] for side in outcomes.same_seeds(*sides)] == [[0, 1], [0, 1]]
    shutil.rmtree(Path(one.root) / next(point for point in sides[0] if point.seed == 0).evaluation)
    outcomes = results.Outcomes(one)
    both = outcomes.same_seeds(*sides)
    assert [[point.seed for point in side] for side in both] == [[1], [1]]
    (pair,) = analysis.mcnemar(*outcomes.table(*both), outcomes.starts(*both))
    assert (pair.only_first, pair.only_second) == (10, 0)  # the fake: all of 20, and every other one
    assert f"{pair.p_value:.2g} (10:0)" in text_of(study.report(one, 1)).replace("\xa0", " ")


def test_a_damaged_result_is_named_and_nothing_is_run(tiny):
    assert runner().run(few(tiny))
    path = next(Path("runs/small").glob("evaluate_*/results.json"))
    path.write_text("{")
    process = command("--report")
    assert process.wait(60) == 2


def test_what_was_measured_goes_along_without_weights(tiny):
    """One file has all that the page says of it, and where it is unpacked nothing is trained that nobody needs."""
    assert runner().run(few(tiny))
    numbers = r"\S+ (?:\d+/\d+ )?\[[-+\d., %]+\]"
    before = re.findall(numbers, text_of(study.report(tiny, 0)))
    Path("elsewhere").mkdir()
    kept = [archive.keep(tiny, name) for name in ("small.zip", "again.zip")]
    assert kept == [6, 6]  # evaluation, probe and modes of both arms
    assert Path("small.zip").read_bytes() == Path("again.zip").read_bytes()
    with zipfile.ZipFile("small.zip") as file:
        assert {Path(name).name for name in file.namelist() if "/jobs/" not in name} == {"results.json", "modes.json"}
        assert socket.gethostname() not in str([file.read(name) for name in file.namelist()])
    made = len(calls())
    Path("runs").rename("elsewhere/runs")
    assert archive.take(tiny, "small.zip") == 6 and archive.take(tiny, "small.zip") == 0
    assert re.findall(numbers, text_of(study.report(tiny, 0))) == before and len(before) > 8
    _, jobs = study.selected(short(tiny), 0)
    study.require_same_commands(jobs, Path("runs/small/jobs"))
    assert {job.kind for job in jobs} == {"collect", *plan.MEASURED}
    assert runner().run(jobs) and len(calls()) == made
    _, jobs = study.selected(short(tiny), 1, ["evaluate"])  # two training seeds: the second is made, the first is there
    assert runner().run(jobs)
    assert [line for line in calls()[made:] if "seed0" in line] == []
    assert any("seed1" in line for line in calls()[made:])


def test_an_archive_that_does_not_fit_changes_nothing(tiny):
    with pytest.raises(ValueError, match="nothing was measured yet"):
        archive.keep(tiny, "small.zip")
    assert runner().run(few(tiny)) and archive.keep(tiny, "small.zip")
    whole = Path("small.zip").read_bytes()
    results_of_one = next(Path("runs/small").glob("evaluate_*/results.json"))
    results_of_one.write_text(results_of_one.read_text().replace('"steps": 9', '"steps": 8'))
    with pytest.raises(ValueError, match=rf"{results_of_one} was measured here too"):
        archive.take(tiny, "small.zip")
    shutil.rmtree("runs")
    Path("cut.zip").write_bytes(whole[: len(whole) // 2])
    for name, content in (("foreign", "{}"), ("../outside.json", "{}"), ("runs/small/jobs/../../../x.json", "{}")):
        shutil.copy("small.zip", "more.zip")
        with zipfile.ZipFile("more.zip", "a") as more:
            more.writestr(name, content)
        with pytest.raises(ValueError, match="which is no measurement of the study small"):
            archive.take(tiny, "more.zip")
    with zipfile.ZipFile("broken.zip", "w") as broken:
        broken.writestr(str(results_of_one), "{")
    middle = len(whole) // 2  # in the middle of what is packed: whatever a byte becomes, it is said
    for number in range(24):
        Path(f"flipped{number}.zip").write_bytes(
            whole[: middle + number] + bytes([whole[middle + number] ^ 255]) + whole[middle + number + 1 :]
        )
    for name in ("cut.zip", "broken.zip", "absent.zip", *(f"flipped{number}.zip" for number in range(24))):
        with pytest.raises(ValueError, match=f"{name} is missing or damaged"):
            archive.take(tiny, name)
    assert not Path("runs").exists() and not Path("../outside.json").exists()


def test_differences_of_several_studies(tiny, capsys):
    Path("better").touch()
    more = TEXT.replace("arms: [flow_matching, self_flow]}", "arms: [flow_matching, self_flow, none]}")
    Path("more.yaml").write_text("runs: small\n" + more)
    assert runner().run(expand(plan.load("more.yaml")))  # with it, all that small.yaml asks for
    path = study.compare(["small.yaml", "more.yaml"])
    steps, compute, other = re.split(r"\n(?=\w)", capsys.readouterr().out.rstrip())
    assert steps.splitlines()[0] == "small: 8 demonstrations, preset tiny, equal steps"
    # The fake solves every other episode without it, and video is 1 dB better with it.
    assert re.fullmatch(r" *Self-Flow − plain +\+50 \[[^]]*\] \* +1.00", steps.splitlines()[1])
    assert "*" not in compute and len(compute.splitlines()) == 1 + 3
    assert re.search(r"kept − Self-Flow +-50 \[-\d+, -\d+\] +-1.00\n", compute)
    assert re.search(r"no pretraining − plain +0 \[-\d+, \+\d+\] +0.00$", compute)
    title, *rows = other.splitlines()
    assert title.startswith("more: 8") and len(rows) == 1 and "no pretraining − plain" in rows[0]  # the rest is shared
    picture = ElementTree.parse(path).getroot()  # a file that stands alone
    assert "differences" in picture.attrib["aria-label"]


def test_differences_of_nothing(tiny):
    with pytest.raises(ValueError, match=r"small\.yaml: no two arms"):
        study.compare(["small.yaml"])


def test_report_of_nothing(tiny):
    text = text_of(study.report(tiny, 0))
    assert "Not decided yet: 0 of 2 trainings" in text and "No evaluation is finished yet" in text
    assert "not here: the time given to the study ended before" in text


def test_report_names_what_failed(tiny):
    Path("fail").write_text("finetune --name small/finetune_none")
    study.execute(tiny, ["none"], 2)
    text = text_of(Path("runs/small/report.html"))
    assert "failed: finetune_none_tiny_8_seed0_at_196" in text and "failed: see its log" in text


def test_report_says_that_the_plan_was_changed(tiny):
    study.note_plan(tiny)
    Path("small.yaml").write_text(TEXT.replace("margin: 0.1", "margin: 0.5"))
    changed = plan.load("small.yaml")
    study.note_plan(changed)
    text = text_of(study.report(changed, 0))
    assert f"The plan was changed after work had begun: {tiny.hash} since" in text


def test_rates_need_complete_evaluations_and_common_episodes(tiny):
    tiny = short(tiny)
    assert runner().run([job for job in expand(tiny) if job.kind not in ("probe", "modes", "imagine")])
    points = plan.points(tiny, 1)
    first, second = results.primary(tiny, points)
    path = Path(tiny.root) / first[0].evaluation / "results.json"
    content = json.loads(path.read_text())
    content["episodes"], content["crashed"] = content["episodes"][1:], [10000]
    path.write_text(json.dumps(content))
    tables = results.Outcomes(tiny).table(first, second)
    assert [table.shape for table in tables] == [(1, 19), (1, 19)] and tables[1].mean() == 9 / 19
    content["crashed"] = []
    path.write_text(json.dumps(content))
    assert results.Outcomes(tiny).table(first)[0].size == 0 and results.current_look(tiny) == 0
    assert results.primary_difference(tiny, points, results.Outcomes(tiny)) is None
    path.write_text("{")
    with pytest.raises(ReportError, match="damaged"):
        results.Outcomes(tiny).of(first[0])


def test_videos_are_on_the_page(tiny):
    video = encode_video(np.full((4, 32, 32, 3), 90, np.uint8), 3)
    path = Path("runs/small/imagine_self_flow_from_100_tiny_8_seed0_at_80/imagined.mp4")
    path.parent.mkdir(parents=True)
    path.write_bytes(video)
    assert page.example_section(tiny, plan.points(tiny, 1)).count("data:video/mp4;base64") == 1


def test_the_script_runs_on_its_own(tmp_path):
    """As people start it, from elsewhere: it finds its neighbours without being a package."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    script = [sys.executable, str(ROOT / "experiments/study.py"), "--study", "quick", "--list"]
    done = subprocess.run(script, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0 and "collect_open_top_drawer_6" in done.stdout, done.stderr
    assert list(tmp_path.iterdir()) == []
