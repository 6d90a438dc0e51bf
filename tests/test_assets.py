"""Assets are found in the promised order, and a missing or truncated file is named before anything loads it."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from envs import assets

FILES = {"data/models/cube.glb": b"glb" * 100, "mani_skill2_real2sim/assets/robot.urdf": b"<robot/>"}
HAVE_ASSETS = bool(os.environ.get("SIMPLER_ASSET_DIR")) or (assets.user_cache() / "simpler_assets").is_dir()


def make_tree(root: Path) -> Path:
    for name, content in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


@pytest.fixture
def tree(tmp_path, monkeypatch) -> Iterator[Path]:
    """A small asset tree named by SIMPLER_ASSET_DIR, with a manifest and an empty cache of its own."""
    root = make_tree(tmp_path / "tree")
    manifest = {n: {"size": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in FILES.items()}
    (tmp_path / "assets.json").write_text(json.dumps(manifest))
    monkeypatch.setattr(assets, "MANIFEST", tmp_path / "assets.json")
    monkeypatch.setenv("SIMPLER_ASSET_DIR", str(root))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assets.read_manifest.cache_clear()
    assets._require_whole.cache_clear()
    yield root
    assets.read_manifest.cache_clear()
    assets._require_whole.cache_clear()


def test_variable_comes_before_cache_and_cache_before_nothing(tree, tmp_path, monkeypatch):
    cached = make_tree(tmp_path / "cache" / "selfflow_robot" / "simpler_assets")
    assert assets.asset_root() == tree
    monkeypatch.setenv("SIMPLER_ASSET_DIR", "")  # set but empty means not set
    assert assets.asset_root() == cached
    shutil.rmtree(cached)
    with pytest.raises(FileNotFoundError, match="make setup"):
        assets.asset_root()


def test_a_wrong_variable_is_an_error_and_not_skipped(tree, tmp_path, monkeypatch):
    make_tree(tmp_path / "cache" / "selfflow_robot" / "simpler_assets")
    monkeypatch.setenv("SIMPLER_ASSET_DIR", str(tmp_path / "elsewhere"))
    with pytest.raises(FileNotFoundError, match=r"SIMPLER_ASSET_DIR=.*elsewhere"):
        assets.asset_root()


def test_asset_is_the_file_and_its_absence_is_named(tree):
    assert assets.asset("data/models/cube.glb").read_bytes() == FILES["data/models/cube.glb"]
    with pytest.raises(FileNotFoundError, match=r"data/models/sphere\.glb"):
        assets.asset("data/models/sphere.glb")


@pytest.mark.parametrize("length", [0, 299])
def test_a_truncated_file_is_named_whichever_file_is_asked_for(tree, length):
    (tree / "data/models/cube.glb").write_bytes(FILES["data/models/cube.glb"][:length])
    with pytest.raises(ValueError, match=rf"cube\.glb has {length} bytes instead of 300"):
        assets.asset("mani_skill2_real2sim/assets/robot.urdf")


def test_an_unlisted_empty_file_is_refused(tree):
    (tree / "data/empty.png").touch()
    with pytest.raises(ValueError, match=r"empty\.png has 0 bytes"):
        assets.asset("data/empty.png")


def test_truncation_after_the_first_check_is_noticed(tree):
    assets.asset_root()
    (tree / "data/models/cube.glb").write_bytes(b"glb")
    with pytest.raises(ValueError, match=r"has 3 bytes, expected 300"):
        assets.asset("data/models/cube.glb")


def test_changed_content_of_equal_size_is_found_by_hash_only(tree):
    (tree / "data/models/cube.glb").write_bytes(b"x" * 300)
    assert assets.damaged_files(tree) == []
    assert assets.damaged_files(tree, hashes=True) == ["data/models/cube.glb has the wrong content (SHA-256)"]


def test_setup_links_the_given_tree_into_the_cache(tree, monkeypatch):
    stale = assets.user_cache() / "simpler_assets"
    stale.parent.mkdir(parents=True)
    stale.symlink_to(tree / "gone")
    assets._ensure()
    monkeypatch.delenv("SIMPLER_ASSET_DIR")
    assert assets.asset_root() == tree


@pytest.fixture
def repository(tmp_path) -> tuple[str, str]:
    """A local git repository with the tree and a file we do not want; its address and commit."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    root = make_tree(tmp_path / "repository")
    (root / "unwanted").mkdir()
    (root / "unwanted" / "large.bin").write_bytes(b"0" * 1000)

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
        return subprocess.run(
            ["git", "-C", str(root), *identity, *arguments], check=True, capture_output=True, text=True
        ).stdout

    git("init", "--quiet")
    git("config", "uploadpack.allowFilter", "true")
    git("config", "uploadpack.allowAnySHA1InWant", "true")
    git("add", ".")
    git("commit", "--quiet", "-m", "assets")
    return f"file://{root}", git("rev-parse", "HEAD").strip()


def test_download_takes_only_our_folders_and_repairs_the_cache(tree, repository, monkeypatch):
    cached = assets.user_cache() / "simpler_assets"
    make_tree(cached)
    (cached / "data/models/cube.glb").write_bytes(b"damaged")
    assets.download_assets(cached, *repository)
    monkeypatch.delenv("SIMPLER_ASSET_DIR")
    assert assets.asset_root() == cached
    assert not (cached / "unwanted").exists()
    assert not (cached / ".git").exists()
    assert [path.name for path in cached.parent.iterdir()] == ["simpler_assets"]


def test_a_failed_download_leaves_what_was_there(tree, repository, tmp_path):
    cached = make_tree(tmp_path / "cache" / "selfflow_robot" / "simpler_assets")
    with pytest.raises(RuntimeError, match="SIMPLER_ASSET_DIR"):
        assets.download_assets(cached, repository[0], "0" * 40)
    manifest = json.loads(assets.MANIFEST.read_text())
    manifest["data/models/cube.glb"]["sha256"] = "0" * 64
    assets.MANIFEST.write_text(json.dumps(manifest))
    assets.read_manifest.cache_clear()
    with pytest.raises(RuntimeError, match=r"cube\.glb has the wrong content"):
        assets.download_assets(cached, *repository)
    assert (cached / "data/models/cube.glb").read_bytes() == FILES["data/models/cube.glb"]
    assert [path.name for path in cached.parent.iterdir()] == ["simpler_assets"]


@pytest.mark.skipif(not HAVE_ASSETS, reason="no SIMPLER assets: run `make setup`")
def test_the_committed_manifest_lists_exactly_what_the_entry_points_refer_to():
    root = assets.asset_root()
    assert sorted(assets.read_manifest()) == assets._needed(root)
    assert assets.damaged_files(root, hashes=True) == []


def test_runs_as_a_plain_script_without_any_package(tree, tmp_path):
    """Set-up calls it with an interpreter that may have nothing installed: -I -S hides site-packages."""
    environment = os.environ | {"SIMPLER_ASSET_DIR": str(tmp_path / "elsewhere")}
    script = Path(assets.__file__)
    done = subprocess.run([sys.executable, "-I", "-S", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert done.stderr.startswith("error: SIMPLER_ASSET_DIR=")
