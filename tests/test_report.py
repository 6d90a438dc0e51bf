import json

import pytest

from experiments.report import report


def write_arm(folder, successes, first=10_000, protocol_hash="abc123"):
    (folder / "videos").mkdir(parents=True)
    episodes = []
    for seed, success in enumerate(successes, first):
        name = f"videos/seed_{seed}.mp4"
        (folder / name).write_bytes(b"not really a video")
        goals = {"drawer_opened": True, "object_placed": success}
        episodes.append(
            {
                "seed": seed,
                "steps": 200,
                "success_final": success,
                "success_any": success,
                "subgoals": goals,
                "video": name,
            }
        )
    results = {
        "task": "open_and_place",
        "protocol": {"seeds": {"first": first, "count": len(successes)}, "benchmark": "SIMPLER"},
        "protocol_hash": protocol_hash,
        "success_rule": "final",
        "command": "python experiments/eval_simpler.py --name <x>",
        "episodes": episodes,
    }
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def write_run(folder):
    folder.mkdir(parents=True)
    rows = [{"step": k, "loss_action/policy": 1 / k, "loss_video": 2 / k} for k in range(1, 40)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_page_states_counts_intervals_and_the_paired_difference(tmp_path):
    arms = [write_arm(tmp_path / "a", [True] * 8 + [False] * 2), write_arm(tmp_path / "b", [True] * 4 + [False] * 6)]
    runs = [write_run(tmp_path / "pretrain_a"), write_run(tmp_path / "a_run")]
    page = report(arms, runs, [], tmp_path / "out" / "report.html", count=2).read_text()
    assert "8/10 = 80% [49%, 94%]" in page and "4/10 = 40% [17%, 69%]" in page  # Wilson
    assert "+40%" in page and "p = 0.12" in page  # exact McNemar with 4 : 0 discordant pairs: 2 / 2^4
    assert "(4 / 0 of 10 seeds differ)" in page
    assert "abc123" in page and page.count("<svg") == 3  # bars, pretraining, fine-tuning
    assert page.count("data:video/mp4;base64") == 4  # two seeds, two arms
    assert "&lt;x&gt;" in page  # text is escaped
    assert 'src="http' not in page and "<link" not in page and "<script" not in page  # nothing from outside


def test_different_protocols_are_not_compared_silently(tmp_path):
    arms = [write_arm(tmp_path / "a", [True]), write_arm(tmp_path / "b", [True], protocol_hash="other")]
    assert "do not compare" in report(arms, [], [], tmp_path / "report.html").read_text()


def test_what_is_missing_is_said(tmp_path):
    arm = write_arm(tmp_path / "a", [True])
    (arm / "videos" / "seed_10000.mp4").unlink()
    page = report([arm], [], [tmp_path / "imagined.mp4"], tmp_path / "report.html").read_text()
    assert "seed_10000.mp4 is missing" in page and "imagined.mp4 is missing" in page and "No training run" in page


@pytest.mark.parametrize("content", ["", '{"episodes": [', '{"episodes": []}', "{}"])
def test_damaged_results_are_named(tmp_path, content):
    arm = write_arm(tmp_path / "a", [True])
    (arm / "results.json").write_text(content)
    with pytest.raises(ValueError, match=r"a/results\.json"):
        report([arm], [], [], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
