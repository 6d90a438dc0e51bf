"""Checks that this machine can run the project, and prints the remedy for whatever fails.

    python experiments/doctor.py                 everything; exit code 1 if something needed fails
    python experiments/doctor.py --only vulkan   one check

Standard library only at the top: it must work where nothing else does. What may crash runs in a process of its own.
"""

import argparse
import ctypes
import importlib.metadata
import importlib.util
import os
import platform
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SETUP = "run `make setup`"
# Not `import envs.assets`: that would start the simulator, whose absence this script must survive.
ASSETS = SimpleNamespace(**runpy.run_path(str(ROOT / "envs" / "assets.py")))
PACKAGES = ("torch", "numpy", "sapien", "mani_skill", "gymnasium", "hydra-core", "av", "pyarrow", "safetensors")


class Finding(NamedTuple):
    status: str  # "ok", "warn" (works with less) or "fail"
    detail: str
    remedy: str = ""


def check_python() -> Finding:
    """A supported Python, in the project's own environment."""
    detail = f"{platform.python_version()} at {sys.executable}"
    if not (3, 10) <= sys.version_info < (3, 13):
        return Finding("fail", detail, f"needs 3.10, 3.11 or 3.12: {SETUP}, then use .venv/bin/python")
    if sys.prefix == sys.base_prefix:
        return Finding("warn", f"{detail}, not a virtual environment", f"{SETUP}, then use .venv/bin/python")
    return Finding("ok", detail)


def check_packages() -> Finding:
    """The packages we stand on, the project itself, and the one package that must be absent."""
    versions = {name: _version(name) for name in PACKAGES}
    if missing := [name for name, version in versions.items() if version is None]:
        return Finding("fail", f"not installed: {', '.join(missing)}", f"{SETUP}, then use .venv/bin/python")
    for name in ("selfflow_robot", "envs", "policies"):
        spec = importlib.util.find_spec(name)
        if spec is None or ROOT not in [Path(p).resolve().parent for p in spec.submodule_search_locations or ()]:
            origin = "not installed" if spec is None else f"imported from {spec.origin}"
            return Finding("fail", f"package {name} is {origin}", f"`pip uninstall {name}` if it is foreign; {SETUP}")
    if _version("pin"):
        return Finding(
            "warn", "`pin` is installed: SAPIEN's inverse kinematics becomes 18x slower", "pip uninstall pin"
        )
    return Finding("ok", ", ".join(f"{name} {version}" for name, version in versions.items()))


def check_torch() -> Finding:
    """torch imports; what it computes on."""
    answer = _in_process("torch")
    if "error" in answer:
        return Finding("fail", answer["error"], f"{SETUP}; if it stays, `rm -rf .venv` first")
    return Finding("ok", answer["detail"])


def check_vulkan() -> Finding:
    """A Vulkan device on which SAPIEN renders a box."""
    answer = _in_process("vulkan")
    if "error" in answer:
        return Finding("fail", answer["error"], f"{SETUP}: it installs a software driver, or prints the command for it")
    return Finding("ok", answer["detail"])


def check_assets() -> Finding:
    """Every SIMPLER file our tasks need, by SHA-256."""
    try:
        root = ASSETS.asset_root()
        damaged = ASSETS.damaged_files(root, hashes=True)
    except (OSError, ValueError) as error:
        detail, _, remedy = str(error).rpartition("; ")
        return Finding("fail", detail, remedy)
    if damaged:
        return Finding("fail", f"{root}: {'; '.join(damaged[:3])}", ASSETS.repair())
    return Finding("ok", f"{root}, {len(ASSETS.read_manifest())} files verified")


def check_recordings() -> Finding:
    """Recorded rollouts of upstream: only tests and experiments/replay_reference.py want them."""
    given = os.environ.get("SIMPLER_GOLDEN_DIR")
    count = sum(1 for path in Path(given).iterdir() if path.is_dir()) if given and Path(given).is_dir() else 0
    if count:
        return Finding("ok", f"{count} in {given}")
    where = f"none in {given}" if given else "SIMPLER_GOLDEN_DIR is not set"
    return Finding(
        "warn", where, "set SIMPLER_GOLDEN_DIR to their folder; without them the tests that replay them are skipped"
    )


def check_disk() -> Finding:
    """Room for data sets and runs where we stand."""
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    status = "ok" if free >= 5 else "warn" if free >= 1 else "fail"
    return Finding(
        status, f"{free:.0f} GB free in {Path.cwd()}", "" if status == "ok" else "free some space: 5 GB is comfortable"
    )


def check_writing() -> Finding:
    """data/ and runs/ can be written from here."""
    for folder in (Path("data"), Path("runs")):
        target = folder if folder.is_dir() else Path()
        try:
            with tempfile.TemporaryFile(dir=target) as file:
                file.write(b"x")
        except OSError as error:
            return Finding(
                "fail", f"cannot write in {target.resolve()}: {error.strerror}", "correct its owner or permissions"
            )
    return Finding("ok", "data/ and runs/ can be written")


def check_scene() -> Finding:
    """The benchmark scene resets, renders one frame and steps one action."""
    answer = _in_process("scene")
    if "error" in answer:
        return Finding("fail", answer["error"], "repair what fails above first; if nothing does, report this text")
    return Finding("ok", answer["detail"])


CHECKS = {
    "python": check_python,
    "packages": check_packages,
    "torch": check_torch,
    "vulkan": check_vulkan,
    "assets": check_assets,
    "recordings": check_recordings,
    "disk": check_disk,
    "writing": check_writing,
    "scene": check_scene,
}


def probe_torch() -> str:
    import torch

    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        return f"{torch.__version__}, {device.name}, {device.total_memory / 2**30:.0f} GiB"
    bf16 = "bf16 in hardware" if torch.backends.mkldnn.is_available() and _cpu_has_bf16() else "no bf16 in hardware"
    return (
        f"{torch.__version__}, CPU {torch.backends.cpu.get_cpu_capability()}, {bf16}, {torch.get_num_threads()} threads"
    )


def probe_vulkan() -> str:
    import sapien

    scene = sapien.Scene()
    scene.set_ambient_light([0.5, 0.5, 0.5])
    builder = scene.create_actor_builder()
    builder.add_box_visual(half_size=[0.5, 0.5, 0.5], material=[1.0, 0.0, 0.0])
    builder.build_static().set_pose(sapien.Pose([2, 0, 0]))
    camera = scene.add_camera("camera", width=32, height=32, fovy=1.0, near=0.1, far=10)
    scene.update_render()
    camera.take_picture()
    color = camera.get_picture("Color")  # (32, 32, 4), linear
    if not color[16, 16, 0] > color[16, 16, 1] + 0.1:
        raise RuntimeError(f"a red box was rendered as {color[16, 16, :3].tolist()}")
    device = sapien.render.RenderSystem().device.name
    return f"{device}, driver {_driver_version(device)}"


def probe_scene() -> str:
    import numpy as np

    import envs

    env = envs.make_env("open_and_place", width=160, height=128)
    observation, _ = env.reset(seed=0)
    frame = observation["images"]["overhead"]  # (128, 160, 3) uint8
    if frame.shape != (128, 160, 3) or frame.std() < 10:
        raise RuntimeError(f"the frame is blank: shape {frame.shape}, standard deviation {frame.std():.1f}")
    start = time.perf_counter()
    env.step(np.array([0, 0, 0, 0, 0, 0, 1], np.float32))
    elapsed = time.perf_counter() - start
    env.close()
    return f"open_and_place: frame of {frame.shape[1]}x{frame.shape[0]}, first action in {1000 * elapsed:.0f} ms"


PROBES = {"torch": probe_torch, "vulkan": probe_vulkan, "scene": probe_scene}


def _in_process(probe: str, seconds: float = 120) -> dict[str, str]:
    """Run a probe in a process of its own: {"detail": ...} or {"error": ...}, whatever happens to it."""
    command = [sys.executable, __file__, "--probe", probe]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {seconds:.0f} s"}
    if done.returncode < 0:
        return {"error": f"crashed with {signal.Signals(-done.returncode).name}: {_last_line(done.stderr)}"}
    if done.returncode:
        return {"error": _last_line(done.stderr)}
    return {"detail": _last_line(done.stdout)}


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no message")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_has_bf16() -> bool:
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


def _driver_version(device: str) -> str:
    """The driver's own words for its version, asked of the Vulkan loader, since SAPIEN does not tell."""
    try:
        vulkan = ctypes.CDLL("libvulkan.so.1")
    except OSError:
        return "of unknown version (no libvulkan.so.1)"
    application = _buffer(struct.pack("=5Q2I", 0, 0, 0, 0, 0, 0, 1 << 22 | 2 << 12))  # VkApplicationInfo for Vulkan 1.2
    request = _buffer(struct.pack("=8Q", 1, 0, 0, ctypes.addressof(application), 0, 0, 0, 0))  # VkInstanceCreateInfo
    instance, count, handles = ctypes.c_void_p(), ctypes.c_uint32(16), (ctypes.c_void_p * 16)()
    if vulkan.vkCreateInstance(request, None, ctypes.byref(instance)) != 0:
        return "of unknown version"
    vulkan.vkEnumeratePhysicalDevices(instance, ctypes.byref(count), handles)
    for handle in handles[: count.value]:
        driver = _buffer(struct.pack("=Q", 1000196000), size=1024)  # VkPhysicalDeviceDriverProperties
        properties = _buffer(struct.pack("=2Q", 1000059001, ctypes.addressof(driver)), size=2048)  # ...Properties2
        vulkan.vkGetPhysicalDeviceProperties2(ctypes.c_void_p(handle), properties)
        if _text(properties, 36) == device:  # deviceName
            return f"{_text(driver, 20)} {_text(driver, 276)}"  # driverName, driverInfo
    return "of unknown version"


def _buffer(content: bytes, size: int = 0) -> ctypes.Array:
    return ctypes.create_string_buffer(content, max(size, len(content)))


def _text(buffer: ctypes.Array, offset: int) -> str:
    return buffer.raw[offset : offset + 256].split(b"\0")[0].decode(errors="replace")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=CHECKS, help="one check instead of all")
    parser.add_argument("--probe", choices=PROBES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.probe:
        print(PROBES[arguments.probe]())
        return 0
    failed = False
    for name in [arguments.only] if arguments.only else CHECKS:
        finding = CHECKS[name]()
        failed |= finding.status == "fail"
        print(f"{_colored(finding.status)}  {name:<10}  {finding.detail}", flush=True)
        if finding.remedy:
            print(f"{'':>18}-> {finding.remedy}", flush=True)
    return int(failed)


def _colored(status: str) -> str:
    text = f"{status.upper():<4}"
    code = {"ok": 32, "warn": 33, "fail": 31}[status]
    return f"\033[{code}m{text}\033[0m" if sys.stdout.isatty() else text


if __name__ == "__main__":
    sys.exit(main())
