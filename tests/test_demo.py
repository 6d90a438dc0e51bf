"""The demo skips what is done, stops on the first failure, and leaves nothing running."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import demo

ROOT = Path(demo.__file__).resolve().parent.parent


@pytest.fixture
def scripts(tmp_path, monkeypatch) -> Path:
    """An empty working directory whose scripts/ stands in for experiments/."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "HERE", tmp_path / "scripts")
    demo.FOLDER.mkdir(parents=True)
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "make.py").write_text("import sys; open(sys.argv[1], 'a').write('x')")
    (tmp_path / "scripts" / "fail.py").write_text("import sys; print('disk full'); sys.exit(3)")
    (tmp_path / "scripts" / "sleep.py").write_text(
        "import sys, time\nopen('started', 'w')\n"
        "try:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    open('saved', 'w')\n    sys.exit(1)\n"
    )
    return tmp_path / "scripts"


def stages(*commands: str) -> list[demo.Stage]:
    return [demo.Stage(f"stage {i}", [c], [c.split()[-1]]) for i, c in enumerate(commands)]


def test_finished_stages_are_skipped(scripts):
    assert demo.run_pipeline(stages("make.py a", "make.py b")) == 0
    assert demo.run_pipeline(stages("make.py a", "make.py b")) == 0
    assert (Path("a").read_text(), Path("b").read_text()) == ("x", "x")


def test_a_stage_runs_again_when_its_output_is_gone_or_an_earlier_command_changed(scripts):
    demo.run_pipeline(stages("make.py a", "make.py b"))
    Path("b").unlink()
    demo.run_pipeline(stages("make.py a", "make.py b"))
    assert (Path("a").read_text(), Path("b").read_text()) == ("x", "x")
    demo.run_pipeline(stages("make.py more a", "make.py b"))
    assert (Path("more").read_text(), Path("b").read_text()) == ("x", "xx")


def test_a_failure_keeps_what_was_done_and_runs_nothing_after_it(scripts, capfd):
    assert demo.run_pipeline(stages("make.py a", "fail.py b", "make.py c")) == 3
    assert "run the same command again" in capfd.readouterr().err
    assert not Path("c").exists()
    (scripts / "fail.py").write_text((scripts / "make.py").read_text())
    assert demo.run_pipeline(stages("make.py a", "fail.py b", "make.py c")) == 0
    assert Path("a").read_text() == "x"


def test_the_second_arm_s_failure_is_shown_and_stops_the_first(scripts, capfd):
    (scripts / "fail.py").write_text(
        "import os, sys, time\nwhile not os.path.exists('started'): time.sleep(0.05)\nprint('disk full'); sys.exit(3)"
    )
    assert demo.run_together(["sleep.py", "fail.py"]) == 3
    assert "disk full" in capfd.readouterr().err
    assert Path("saved").exists()


def test_killing_the_demo_interrupts_its_scripts(scripts):
    code = f"from pathlib import Path; from experiments import demo; demo.HERE = Path({str(scripts)!r}); "
    process = subprocess.Popen(
        [sys.executable, "-c", code + "demo.run_together(['sleep.py'])"], env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    wait_for(Path("started"))
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for(Path("saved"))


def test_a_second_demo_refuses_to_start(scripts, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["demo.py"])
    with open(demo.FOLDER / "lock", "w") as lock:
        demo.fcntl.flock(lock, demo.fcntl.LOCK_EX)
        assert demo.main() == 1
    assert "another demo is running" in capsys.readouterr().err


def test_the_headline_counts(tmp_path):
    results = tmp_path / "results.json"
    results.write_text(
        '{"episodes": [{"success_final": true, "subgoals": {"drawer_opened": true}},'
        ' {"success_final": false, "subgoals": {"drawer_opened": true}}]}'
    )
    assert demo.headline(results) == "success 1/2, drawer opened 2/2"


def test_every_stage_runs_a_script_that_exists():
    scripts = {command.split()[0] for stage in demo.pipeline() for command in stage.commands}
    assert [name for name in sorted(scripts) if not (ROOT / "experiments" / name).exists()] == []


def wait_for(path: Path, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.05)
