import base64
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments import report as page
from experiments.report import ReportConfig, ReportError, report
from selfflow_robot.data import encode_video

VIDEO = encode_video(np.full((4, 32, 32, 3), 90, np.uint8), 3)


def write_arm(folder: Path, outcomes: list[bool], first_seed: int = 100, protocol_hash: str = "abc") -> Path:
    (folder / "videos").mkdir(parents=True)
    episodes = []
    for seed, success in enumerate(outcomes, start=first_seed):
        (folder / f"videos/{seed}.mp4").write_bytes(VIDEO)
        rates = {"success_final": success, "success_any": True, "subgoals": {"drawer_opened": True}}
        episodes.append({"seed": seed, "steps": 120, "video": f"videos/{seed}.mp4", **rates})
    results = {"task": "open_and_place", "checkpoint": "runs/x/checkpoint", "success_rule": "final"}
    results |= {"protocol": {"max_steps": 200}, "protocol_hash": protocol_hash, "episodes": episodes}
    results["command"] = f"python experiments/eval_simpler.py --protocol visual_matching --name {folder.name}"
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def write_curves(folder: Path, lines: list[str]) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    return folder


def make(tmp_path: Path, **inputs) -> str:
    inputs = {name: [str(path) for path in paths] for name, paths in inputs.items()}
    return report(ReportConfig(out=str(tmp_path / "report.html"), **inputs)).read_text()


@pytest.fixture
def full(tmp_path) -> str:
    # 21 seeds of the published table (1, 1, 7, 12): see test_metrics
    first = write_arm(tmp_path / "eval_self_flow", [True] * 2 + [False] * 19)
    second = write_arm(tmp_path / "eval_flow_matching", [True, False] + [True] * 7 + [False] * 12)
    curves = [json.dumps({"step": s, "loss/video": 1 / (1 + s), "heldout/video": 0.5}) for s in range(5)]
    run = write_curves(tmp_path / "finetune_self_flow", curves)
    (tmp_path / "imagined.mp4").write_bytes(VIDEO)
    return make(tmp_path, arms=[first, second], training=[run], imagined=[tmp_path / "imagined.mp4"])


def test_episodes_that_begin_alike_are_counted(tmp_path):
    arm = write_arm(tmp_path / "eval", [True, False, True])
    for starts, said in ((2, "3 (100 to 102), from 2 different starts<"), (3, "3 (100 to 102)<"), (None, "102)<")):
        results = json.loads((arm / "results.json").read_text())
        (arm / "results.json").write_text(json.dumps(results | {"starts": starts}))
        assert said in make(tmp_path, arms=[arm])


def test_numbers(full):
    text = re.sub(r"<[^>]*>", "", full)
    assert "10% 2/21 [3%, 29%]" in text and "38% 8/21 [21%, 59%]" in text
    assert "-29 [-51, -3], p = 0.07, n = 21" in text
    assert "100% 21/21 [85%, 100%]" in text  # drawer opened
    assert "drawer opened" in text and 'class="note"' not in full
    assert "\npython experiments/eval_simpler.py --protocol visual_matching --name eval_self_flow\n" in text


def test_page_is_self_contained(full):
    assert "<script" not in full and "<link" not in full and "@import" not in full and "url(http" not in full
    sources = re.findall(r'src="([^"]*)"', full)
    assert len(sources) == 2 * 6 + 1 and all(source.startswith("data:video/mp4;base64,") for source in sources)
    assert all(base64.b64decode(source.split(",")[1]) == VIDEO for source in sources)
    assert full.count("<svg") == 2  # bars, one panel


def test_examples_take_turns_between_outcomes(tmp_path):
    first = write_arm(tmp_path / "a", [True] * 8 + [False, False])
    second = write_arm(tmp_path / "b", [True] * 7 + [False, True, False])
    arms = [page.read_arm(first), page.read_arm(second)]
    assert page.choose_examples(arms, list(range(100, 110)), 6) == [100, 107, 108, 109, 101, 102]


def test_pairs_only_common_seeds(tmp_path):
    first = write_arm(tmp_path / "a", [True] * 4, first_seed=0)
    second = write_arm(tmp_path / "b", [False] * 4, first_seed=2)
    text = make(tmp_path, arms=[first, second])
    assert "n = 2" in text and "2 of 2 common seeds" in text
    third = write_arm(tmp_path / "c", [False], first_seed=50)
    text = make(tmp_path, arms=[first, third])
    assert "no common seed" in text and "No seed has a video in every arm." in text


def test_different_protocols_are_called_out(tmp_path):
    arms = [write_arm(tmp_path / "a", [True]), write_arm(tmp_path / "b", [True], protocol_hash="def")]
    assert "cannot be compared" in make(tmp_path, arms=arms)


def test_missing_inputs_leave_a_note(tmp_path):
    text = make(tmp_path, arms=[tmp_path / "later"], training=[tmp_path / "later_too"], imagined=[tmp_path / "no.mp4"])
    for words in (
        "later: no results",
        "later_too: no results",
        "No evaluation yet",
        "No training curves",
        "no.mp4: not",
    ):
        assert words in text
    arm = write_arm(tmp_path / "a", [True])
    (arm / "videos/100.mp4").unlink()
    assert "No seed has a video" in make(tmp_path, arms=[arm])


@pytest.mark.parametrize("content", ["{", "[]", '{"episodes": [{"seed": 1}]}', '{"episodes": 3}'])
def test_damaged_results_are_named(tmp_path, content):
    (tmp_path / "arm").mkdir()
    (tmp_path / "arm/results.json").write_text(content)
    with pytest.raises(ReportError, match=r"arm/results.json is damaged.*eval_simpler.py again"):
        make(tmp_path, arms=[tmp_path / "arm"])
    assert not (tmp_path / "report.html").exists()


def test_curves_of_a_killed_and_resumed_run(tmp_path):
    lines = ['{"step": 0, "a": 1}', '{"step": 1, "a": 2, "note": "x"}', '{"step": 1, "a": 3}', '{"step": 2, "a"']
    run = write_curves(tmp_path / "run", lines)
    assert page.read_curves(run / "metrics.jsonl") == {"a": {0: 1.0, 1: 3.0}}
    run = write_curves(tmp_path / "damaged", ["{", '{"step": 1, "a": 2}'])
    with pytest.raises(ReportError, match=r"damaged/metrics.jsonl, line 1,"):
        make(tmp_path, training=[run])


def test_no_curve_and_no_run_is_left_out(tmp_path):
    """More keys than styles of lines take a second panel; two runs of one name are two."""
    keys = [f"{name}/policy" for name in ("loss", "cosine", "cleaner", "noisier", "norm")]
    line = json.dumps({"step": 1} | dict.fromkeys(keys, 1.0))
    runs = [write_curves(tmp_path / where / "run", [line, line.replace('"step": 1', '"step": 2')]) for where in "ab"]
    text = make(tmp_path, training=runs)
    assert text.count('aria-label="training curves: policy"') == 2
    assert all(str(run) in text for run in runs)


def test_names_are_escaped(tmp_path):
    text = make(tmp_path, arms=[write_arm(tmp_path / "<b>arm", [True])])
    assert "<b>arm" not in text and "&lt;b&gt;arm" in text


def test_command_line(tmp_path, monkeypatch, capsys):
    arm = write_arm(tmp_path / "a", [True])
    out = tmp_path / "deep/page.html"
    monkeypatch.setattr(sys, "argv", ["report.py", "--out", str(out), "--arms", str(arm)])
    page.main()
    assert capsys.readouterr().out.strip() == str(out) and out.exists()
    (arm / "results.json").write_text("{")
    with pytest.raises(SystemExit, match=r"error: .*results.json is damaged"):
        page.main()
