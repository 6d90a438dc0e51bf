"""The commands in the README, and in docs, work as they stand."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
DOCS = {path: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
TEXT = "\n".join(DOCS.values()).replace("\\\n", " ")  # a command may go on in the next line
NAMED = set(re.findall(r"python (experiments/\w+\.py)", TEXT))
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
    keys = {key for line in re.findall(rf"python {script}([^#\n`]*)", TEXT) for key in re.findall(r"--(\w+)", line)}
    assert [key for key in sorted(keys) if key not in done.stdout] == []
    assert list(tmp_path.iterdir()) == []  # asking for help leaves nothing behind


def test_paths_that_are_named_exist():
    paths = re.findall(r"`((?:selfflow_robot|envs|policies|experiments|scripts)/[\w/]+\.\w+)`", TEXT)
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.stem)
def test_pictures_and_links_lead_somewhere(path):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", DOCS[path])
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (path.parent / link).exists()] == []
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", DOCS[path])
    assert [picture for picture in pictures if not (path.parent / picture).is_file()] == []
    assert path.name != "README.md" or "docs/open_and_place.gif" in pictures
