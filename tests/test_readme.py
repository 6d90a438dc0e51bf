"""The commands in the README work as they stand."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
NAMED = set(re.findall(r"python (experiments/\w+\.py)", README))
SCRIPTS = sorted(NAMED | {"experiments/gallery.py", "experiments/reference.py"})
TARGETS = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_make_targets_exist():
    named = set(re.findall(r"(?:^|`)make ([a-z]+(?: [a-z]+)*)\b(?=\s*[`#])", README, re.MULTILINE))
    named = {target for names in named for target in names.split()}
    assert {"demo", "test", "setup"} <= named <= TARGETS


def test_the_scripts_people_will_type_are_there():
    assert {f"experiments/{name}.py" for name in ("doctor", "pretrain", "finetune", "eval_simpler")} <= NAMED


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_explains_itself_and_knows_the_keys_of_the_readme(script, tmp_path):
    """Run from elsewhere: needs the project installed, not the working directory."""
    done = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    keys = {key for line in re.findall(rf"python {script}([^#\n`]*)", README) for key in re.findall(r"--(\w+)", line)}
    assert [key for key in sorted(keys) if key not in done.stdout] == []
    assert list(tmp_path.iterdir()) == []  # asking for help leaves nothing behind


def test_paths_of_the_readme_exist():
    paths = re.findall(r"`((?:selfflow_robot|envs|policies|experiments|scripts)/[\w/]+\.\w+)`", README)
    assert [path for path in paths if not (ROOT / path).exists()] == []
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", README)
    assert pictures and [path for path in pictures if not (ROOT / path).is_file()] == []
