import subprocess
import sys
from pathlib import Path

import pytest

from selfflow_robot.config import CONFIGS, SCRIPTS, FinetuneConfig, PretrainConfig, overrides, usage

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("spelling", [["--steps", "5"], ["--steps=5"], ["steps=5"]])
def test_three_spellings(spelling):
    assert overrides(PretrainConfig, spelling) == ["steps=5"]


def test_values_that_hydra_would_misread():
    given = ["--data", "/a b/c=d,e", "--pretrained", "null", "--self-flow-terms", "lr=0.1", "--past", "[-1,0]"]
    expected = [r"data='/a b/c=d,e'", "pretrained=null", "self_flow_terms=true", "lr=0.1", "past=[-1,0]"]
    assert overrides(FinetuneConfig, given) == expected
    assert overrides(FinetuneConfig, ["--pretrained", "none"]) == ["pretrained='none'"]  # a word of its own
    assert overrides(FinetuneConfig, ["--modes.policy", "1", "--self_flow_terms", "false"]) == [
        "modes.policy=1",
        "self_flow_terms=false",
    ]


def test_hydras_flags_pass_and_come_first():
    assert overrides(PretrainConfig, ["steps=1", "--cfg", "job", "-m"]) == ["--cfg", "job", "-m", "steps=1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stepz", "3"], "unknown key 'stepz'. Closest: steps"),
        (["bach_size=3"], "unknown key 'bach_size'. Closest: batch_size"),
        (["--steps"], "--steps needs a value"),
        (["--steps", "--lr", "1"], "--steps needs a value"),
        (["steps"], "not of the form"),
    ],
)
def test_mistakes_end_with_the_remedy(arguments, message):
    with pytest.raises(SystemExit, match=message):
        overrides(PretrainConfig, arguments)


@pytest.mark.parametrize("config", SCRIPTS)
def test_help_lists_every_key(config):
    text = usage(config)
    for name in config.__dataclass_fields__:
        assert f"--{name} " in text
    assert (CONFIGS / f"{SCRIPTS[config]}.yaml").exists()


def call(tmp_path, *arguments):
    script = tmp_path / "script.py"
    script.write_text(
        "from selfflow_robot.config import PretrainConfig, run\n"
        "def main(cfg):\n"
        "    if cfg.steps == 13: raise ValueError('thirteen steps. Take 14')\n"
        "    if cfg.steps == 14: raise KeyError('a bug')\n"
        "    print(cfg)\n"
        "run(PretrainConfig, main)\n"
    )
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})


def test_a_script_gets_its_dataclass(tmp_path):
    done = call(tmp_path, "--steps", "7", "--future=[3]", "lr=0.5", "--method", "flow_matching")
    assert done.returncode == 0, done.stderr
    expected = PretrainConfig(name="pretrain_flow_matching", steps=7, future=[3], lr=0.5, method="flow_matching")
    assert done.stdout.strip() == repr(expected)
    assert [path.name for path in tmp_path.iterdir()] == ["script.py"]  # hydra leaves nothing behind


def test_errors_of_a_script(tmp_path):
    wrong_type = call(tmp_path, "--steps", "abc")
    assert wrong_type.returncode == 1 and "abc" in wrong_type.stderr and "Integer" in wrong_type.stderr
    known = call(tmp_path, "--steps", "13")
    assert known.returncode == 1 and known.stderr.strip() == "error: thirteen steps. Take 14"
    bug = call(tmp_path, "--steps", "14")
    assert bug.returncode == 1 and "a bug" in bug.stderr and "script.py" in bug.stderr
