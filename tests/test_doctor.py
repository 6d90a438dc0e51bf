"""The doctor names what is wrong and the remedy, and survives whatever it examines."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments import doctor


def run(*arguments: str, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, doctor.__file__, *arguments], capture_output=True, text=True, **kwargs)


def interpreter(path: Path, line: str) -> str:
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)
    return str(path)


def test_python_is_fine_here():
    done = run("--only", "python")
    assert done.returncode == 0, done.stdout
    assert "python" in done.stdout and "FAIL" not in done.stdout


def test_missing_assets_fail_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("SIMPLER_ASSET_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    done = run("--only", "assets")
    assert done.returncode == 1
    assert done.stdout.startswith("FAIL  assets")
    assert "-> run `make setup`" in done.stdout


def test_a_changed_asset_is_named(tmp_path, monkeypatch):
    manifest = json.loads((doctor.ROOT / "envs" / "assets.json").read_text())
    for name, known in manifest.items():  # right sizes, wrong content
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        with open(tmp_path / name, "wb") as file:
            file.truncate(known["size"])
    monkeypatch.setenv("SIMPLER_ASSET_DIR", str(tmp_path))
    finding = doctor.check_assets()
    assert finding.status == "fail"
    assert "wrong content" in finding.detail
    assert "restore the file" in finding.remedy


def test_a_crash_and_a_hang_are_findings(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", interpreter(tmp_path / "crash", "echo about to; kill -SEGV $$"))
    assert doctor._in_process("vulkan")["error"].startswith("crashed with SIGSEGV")
    assert doctor.check_vulkan().status == doctor.check_scene().status == "fail"
    monkeypatch.setattr(sys, "executable", interpreter(tmp_path / "hang", "exec sleep 60"))
    assert doctor._in_process("vulkan", seconds=0.2) == {"error": "no answer within 0 s"}


def test_the_last_line_of_a_traceback_is_the_finding(tmp_path, monkeypatch):
    script = "echo 'RuntimeError: no rendering device' >&2; exit 1"
    monkeypatch.setattr(sys, "executable", interpreter(tmp_path / "fails", script))
    assert doctor.check_vulkan().detail == "RuntimeError: no rendering device"


@pytest.mark.parametrize(("free", "status"), [(0.5e9, "fail"), (2e9, "warn"), (50e9, "ok")])
def test_disk(monkeypatch, free, status):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    assert doctor.check_disk().status == status


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert doctor.check_writing().status == "ok"
    (tmp_path / "runs").symlink_to("/proc/self")  # not writable, not even for root
    finding = doctor.check_writing()
    assert finding.status == "fail" and "/proc/" in finding.detail


def test_missing_packages_and_a_harmful_one(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "sapien" else "1.0")
    assert doctor.check_packages().detail == "not installed: sapien"
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: _spec(doctor.ROOT / name))
    monkeypatch.setattr(doctor, "_version", lambda name: "1.0")
    assert doctor.check_packages().remedy == "pip uninstall pin"
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "pin" else "1.0")
    assert doctor.check_packages().status == "ok"
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: _spec(Path("/site-packages") / name))
    assert "imported from /site-packages/selfflow_robot" in doctor.check_packages().detail


def _spec(folder: Path) -> SimpleNamespace:
    return SimpleNamespace(submodule_search_locations=[str(folder)], origin=str(folder / "__init__.py"))


def test_recordings_are_optional(tmp_path, monkeypatch):
    monkeypatch.delenv("SIMPLER_GOLDEN_DIR", raising=False)
    assert doctor.check_recordings().status == "warn"
    (tmp_path / "episode-1").mkdir()
    monkeypatch.setenv("SIMPLER_GOLDEN_DIR", str(tmp_path))
    assert doctor.check_recordings() == doctor.Finding("ok", f"1 in {tmp_path}")


@pytest.mark.sim
def test_no_vulkan_driver(monkeypatch):
    for variable in ("VK_ICD_FILENAMES", "VK_DRIVER_FILES"):
        monkeypatch.setenv(variable, "/nonexistent.json")
    finding = doctor.check_vulkan()
    assert finding.status == "fail"
    assert "make setup" in finding.remedy


@pytest.mark.sim
@pytest.mark.slow
@pytest.mark.parametrize("check", ["vulkan", "scene"])
def test_vulkan_and_scene_work_here(check):
    finding = doctor.CHECKS[check]()
    assert finding.status == "ok", finding
