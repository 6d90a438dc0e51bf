"""Decisions of scripts/setup.sh: what is installed where, and what happens without root."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "setup.sh"


@pytest.fixture
def commands(tmp_path) -> Path:
    """A folder of stand-in commands that comes first on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    stand_in(folder / "apt-get", "exit 0")
    return folder


def stand_in(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


def call(function: str, commands: Path, folder: Path, **variables: str) -> subprocess.CompletedProcess:
    environment = {"PATH": f"{commands}:/usr/bin:/bin", "HOME": str(folder)} | variables
    line = f"source {SCRIPT}; {function}"
    return subprocess.run(["bash", "-c", line], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("system", "backports"),
    [("debian 12", True), ("debian 13", False), ("ubuntu 24.04", False)],
)
def test_only_debian_12_takes_the_driver_from_backports(tmp_path, commands, system, backports):
    name, version = system.split()
    (tmp_path / "os-release").write_text(f'ID={name}\nVERSION_ID="{version}"\n')
    lines = call("driver_lines", commands, tmp_path, OS_RELEASE=str(tmp_path / "os-release")).stdout
    assert ("-t bookworm-backports mesa-vulkan-drivers" in lines) == backports
    assert ("sources.list.d/bookworm-backports.list" in lines) == backports
    assert lines.rstrip().endswith("mesa-vulkan-drivers")
    assert "libvulkan1" in lines
    assert subprocess.run(["bash", "-n"], input=lines, text=True).returncode == 0


def test_root_runs_the_lines(tmp_path, commands):
    stand_in(commands / "id", "echo 0")
    assert call("as_root 'echo first\necho second'", commands, tmp_path).stdout == "first\nsecond\n"


def test_a_failing_line_stops_the_rest(tmp_path, commands):
    stand_in(commands / "id", "echo 0")
    done = call("as_root 'false\necho second'", commands, tmp_path)
    assert done.returncode != 0 and done.stdout == ""


def test_without_root_the_lines_are_shown_and_nothing_is_run(tmp_path, commands):
    stand_in(commands / "id", "echo 1000")
    stand_in(commands / "sudo", "exit 1")
    done = call("as_root 'touch changed'; echo still here", commands, tmp_path)
    assert done.returncode == 1
    assert "\ntouch changed\n" in done.stderr
    assert "still here" not in done.stdout
    assert not (tmp_path / "changed").exists()


def test_sudo_is_used_where_it_asks_for_no_password(tmp_path, commands):
    stand_in(commands / "id", "echo 1000")
    stand_in(commands / "sudo", '[[ $1 == -n ]] && shift; [[ $1 == *=* ]] && shift; exec "$@"')
    call("as_root 'touch changed'", commands, tmp_path)
    assert (tmp_path / "changed").exists()


def test_a_python_that_does_not_start_is_passed_over(tmp_path, commands):
    stand_in(commands / "python3.11", "echo 'command not found' >&2; exit 127")
    stand_in(commands / "python3.12", f'exec {sys.executable} "$@"')
    done = call("find_python", commands, tmp_path)
    assert done.stdout.strip() == str(commands / "python3.12")


def test_an_unsupported_python_is_passed_over(tmp_path):
    commands = tmp_path / "bin"
    commands.mkdir()
    for name in ("python3.12", "python3.11", "python3.10", "python3", "python"):
        stand_in(commands / name, "exit 1")
    assert call("find_python", commands, tmp_path).returncode == 1


def test_a_newer_python_alone_is_told_of_uv_and_not_of_root(tmp_path, commands):
    """As on Debian 13: its packages hold no older one, so there is nothing to ask an administrator for."""
    for name in ("python3.12", "python3.11", "python3.10", "python3", "python"):
        stand_in(commands / name, "exit 1")
    stand_in(commands / "id", "echo 1000")
    stand_in(commands / "sudo", "exit 1")
    done = call("create_venv", commands, tmp_path)
    assert done.returncode == 1 and "uv python install 3.11" in done.stderr + done.stdout
    assert "administrator" not in done.stderr + done.stdout


@pytest.mark.parametrize("gpu", [False, True])
def test_torch_is_the_cpu_build_without_a_gpu(tmp_path, commands, gpu):
    """The machine's registries lack the CPU build here, as PyPI does: PyTorch's own index is asked for it."""
    stand_in(commands / "nvidia-smi", "echo 'GPU 0: fast'" if gpu else "exit 9")
    done = call('pip_install() { echo "$*"; [[ $* != *+cpu* ]]; }; install_torch', commands, tmp_path)
    last = done.stdout.splitlines()[-1]
    assert ("download.pytorch.org/whl/cpu" in last) == (not gpu)


@pytest.mark.parametrize("damage", ["none", "truncated", "no RECORD", "no pip", "no interpreter"])
def test_a_half_made_environment_is_recognised(tmp_path, commands, environment, damage):
    shutil.copytree(environment, tmp_path / ".venv", symlinks=True)
    packages = next((tmp_path / ".venv" / "lib").glob("python*")) / "site-packages"
    if damage == "truncated":
        (packages / "pip" / "__init__.py").write_text("")
    elif damage == "no RECORD":
        next(packages.glob("pip-*.dist-info/RECORD")).unlink()
    elif damage == "no pip":
        for path in packages.glob("pip*"):
            shutil.rmtree(path)
    elif damage == "no interpreter":
        (tmp_path / ".venv" / "bin" / "python").unlink()
    assert (call("venv_intact", commands, tmp_path).returncode == 0) == (damage == "none")


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("environment") / ".venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    return folder
