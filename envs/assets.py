"""Where SIMPLER's assets are, and whether they are whole.

`SIMPLER_ASSET_DIR`, else the user cache, else (on `make setup`) a pinned checkout of the public repository into that
cache. `make setup` also links a tree it was given into the cache, for commands typed without the variable.
`assets.json` lists size and SHA-256 of every file our tasks need: sizes are checked on each load, hashes by the doctor.
Standard library only, so that `python envs/assets.py` works before anything else is installed:

    python envs/assets.py             find the assets or download them, and verify every file
    python envs/assets.py manifest    rewrite assets.json from the tree found
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

REPOSITORY = "https://github.com/simpler-env/ManiSkill2_real2sim"
COMMIT = "ef7a4d4fdf4b69f2c2154db5b15b9ac8dfe10682"
FOLDERS = ("data", "mani_skill2_real2sim/assets")
MANIFEST = Path(__file__).with_name("assets.json")
REMEDY = f"run `make setup` to download them, or set SIMPLER_ASSET_DIR to a checkout of {REPOSITORY}"

DESCRIPTIONS = "mani_skill2_real2sim/assets/descriptions"
ROBOT = f"{DESCRIPTIONS}/googlerobot_description/google_robot_meta_sim_fix_wheel_fix_fingertip"
ENTRY_POINTS = (  # patterns; everything else the tasks need is referenced from these files
    f"{ROBOT}.urdf",
    f"{ROBOT}_recolor_tabletop_visual_matching_1.urdf",
    f"{ROBOT}_recolor_tabletop_visual_matching_2.urdf",
    f"{ROBOT}_recolor_cabinet_visual_matching_1.urdf",
    f"{DESCRIPTIONS}/widowx_description/wx250s.urdf",
    "data/custom/mk_station*.urdf",
    "data/custom/info_*.json",
    "data/custom/models/*/collision.obj",
    "data/custom/models/*/textured.*",  # those that are there; `scenes.py` shows a stand-in for the others
    "data/real_inpainting/*.png",
)


def user_cache() -> Path:
    """This project's folder in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "selfflow_robot"


def asset_root() -> Path:
    """The root of a ManiSkill2_real2sim tree in which every file we need exists with its full size.

    Raises FileNotFoundError (no tree), or ValueError (files missing or truncated), each with the remedy.
    """
    root = _find_root()
    _require_whole(root)
    return root


def asset(relative: str) -> Path:
    """One file below `asset_root()`; raises FileNotFoundError or ValueError if it is absent or truncated."""
    path = asset_root() / relative
    if not path.is_file():
        raise FileNotFoundError(f"SIMPLER asset {path} does not exist; {REMEDY}")
    expected = read_manifest().get(relative, {}).get("size")
    size = path.stat().st_size
    if size == 0 or expected not in (None, size):
        raise ValueError(f"SIMPLER asset {path} has {size} bytes, expected {expected or 'some'}; {repair()}")
    return path


def has_asset(relative: str) -> bool:
    """Whether a file that we can do without is there: some trees lack a few stages and pictures (spec 8)."""
    return (asset_root() / relative).is_file()


def damaged_files(root: Path, hashes: bool = False) -> list[str]:
    """What is wrong below `root`, one line per file, by size or also by SHA-256 (half a second)."""
    damaged = []
    for relative, known in read_manifest().items():
        path = root / relative
        if not path.is_file():
            damaged.append(f"{relative} is missing")
        elif (size := path.stat().st_size) != known["size"]:
            damaged.append(f"{relative} has {size} bytes instead of {known['size']}")
        elif hashes and _sha256(path) != known["sha256"]:
            damaged.append(f"{relative} has the wrong content (SHA-256)")
    return damaged


def download_assets(dest: Path, repository: str = REPOSITORY, commit: str = COMMIT) -> Path:
    """Check out the assets of the pinned commit as `dest`; it appears whole or not at all.

    Replaces an earlier tree at `dest`. Raises RuntimeError with git's own words and the remedy.
    """
    dest.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=dest.parent, prefix=".assets-") as folder:
        tree = Path(folder) / "tree"
        _git("init", "--quiet", str(tree))
        _git("-C", str(tree), "remote", "add", "origin", repository)
        _git("-C", str(tree), "config", "remote.origin.promisor", "true")  # file contents are fetched at checkout
        _git("-C", str(tree), "sparse-checkout", "set", *FOLDERS)
        _git("-C", str(tree), "fetch", "--quiet", "--depth", "1", "--filter=blob:none", "origin", commit)
        _git("-C", str(tree), "checkout", "--quiet", "--detach", commit)
        if damaged := damaged_files(tree, hashes=True):
            raise RuntimeError(f"{repository} at {commit} is not what we expect: " + "; ".join(damaged[:5]))
        shutil.rmtree(tree / ".git")
        if dest.is_symlink():
            dest.unlink()
        elif dest.exists():
            os.replace(dest, Path(folder) / "old")
        os.replace(tree, dest)
    _require_whole.cache_clear()
    return dest


def write_manifest(root: Path, path: Path = MANIFEST) -> int:
    """List the entry points and all they refer to, with size and SHA-256; returns the number of files."""
    files = {name: {"size": (root / name).stat().st_size, "sha256": _sha256(root / name)} for name in _needed(root)}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(files, indent=1) + "\n")
    os.replace(temporary, path)
    read_manifest.cache_clear()
    return len(files)


@lru_cache
def read_manifest() -> dict[str, dict]:
    """{path relative to the asset root: {"size": bytes, "sha256": hex}}."""
    return json.loads(MANIFEST.read_text())


def _find_root() -> Path:
    if given := os.environ.get("SIMPLER_ASSET_DIR"):
        if not (Path(given) / FOLDERS[0]).is_dir() or not (Path(given) / FOLDERS[1]).is_dir():
            raise FileNotFoundError(
                f"SIMPLER_ASSET_DIR={given} is not the root of a ManiSkill2_real2sim tree "
                f"({' and '.join(FOLDERS)} are missing); correct it, or unset it and run `make setup`"
            )
        return Path(given).resolve()
    cached = user_cache() / "simpler_assets"
    if not cached.is_dir():
        raise FileNotFoundError(f"no SIMPLER assets at {cached} and SIMPLER_ASSET_DIR is not set; {REMEDY}")
    return cached.resolve()


@lru_cache  # once per process and tree; an exception is not cached
def _require_whole(root: Path) -> None:
    if damaged := damaged_files(root):
        more = f" (and {len(damaged) - 1} more)" if len(damaged) > 1 else ""
        raise ValueError(f"SIMPLER assets in {root}: {damaged[0]}{more}; {repair()}")


def repair() -> str:
    """What the user can do about a damaged file."""
    if os.environ.get("SIMPLER_ASSET_DIR"):
        return "restore the file, or unset SIMPLER_ASSET_DIR and run `make setup`"
    return "run `make setup` to download it again"


def _needed(root: Path) -> list[str]:
    """Entry points and, transitively, every file they refer to, sorted."""
    found, queue = set(), [path for name in ENTRY_POINTS for path in sorted(root.glob(name))]
    while queue:
        path = queue.pop()
        relative = os.path.relpath(path, root)
        if relative not in found:
            found.add(relative)
            queue.extend(_references(path))
    return sorted(found)


def _references(path: Path) -> Iterator[Path]:
    """Files named by a URDF, OBJ, MTL or DAE file; GLB files carry their textures inside."""
    patterns = {
        ".urdf": r'filename="([^"]+)"',
        ".obj": r"^mtllib\s+(.+?)\s*$",
        ".mtl": r"^\s*map_\w+\s+(.+?)\s*$",
        ".dae": r"<init_from>([^<]+\.\w+)</init_from>",
    }
    pattern = patterns.get(path.suffix)
    if pattern and path.name != "collision.obj":  # a collision mesh has no looks, one names a file that never was
        for name in re.findall(pattern, path.read_text(errors="replace"), re.MULTILINE):
            yield path.parent / name.removeprefix("package://").removeprefix("file://")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _git(*arguments: str) -> None:
    if shutil.which("git") is None:
        raise RuntimeError("git is not installed; install it (Debian: apt-get install git) or set SIMPLER_ASSET_DIR")
    environment = os.environ | {"GIT_TERMINAL_PROMPT": "0"}  # fail instead of asking for a password
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"git {' '.join(arguments)} failed: {done.stderr.strip()}; or set SIMPLER_ASSET_DIR")


def _ensure() -> Path:
    """The verified assets, downloaded if neither the variable nor the cache has them."""
    cached = user_cache() / "simpler_assets"
    try:
        root = asset_root()
        if damaged := damaged_files(root, hashes=True):
            raise ValueError(f"SIMPLER assets in {root}: {damaged[0]}; {repair()}")
    except (FileNotFoundError, ValueError):
        if os.environ.get("SIMPLER_ASSET_DIR"):
            raise  # the user's own tree is never replaced
        print(f"Downloading SIMPLER assets from {REPOSITORY} ...", flush=True)
        return download_assets(cached)
    if not cached.is_dir():  # so that commands typed later, without the variable, find the tree too
        cached.parent.mkdir(parents=True, exist_ok=True)
        cached.unlink(missing_ok=True)
        cached.symlink_to(root)
    return root


if __name__ == "__main__":
    try:
        if sys.argv[1:] == ["manifest"]:
            print(f"{MANIFEST}: {write_manifest(_find_root())} files")
        elif sys.argv[1:]:
            sys.exit(f"unknown arguments {' '.join(sys.argv[1:])}; use `python envs/assets.py [manifest]`")
        else:
            print(f"SIMPLER assets: {_ensure()} ({len(read_manifest())} files verified)")
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
