#!/usr/bin/env bash
# Prepares a machine for this project: virtual environment, pinned packages, a Vulkan driver, SIMPLER's assets.
# Each step is skipped where its result is already there; running again repairs a set-up that was interrupted.
set -euo pipefail

TORCH=2.13.0
TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
OS_RELEASE=${OS_RELEASE:-/etc/os-release}
STAMP=.venv/.complete
SUPPORTED='import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))'

say() { printf '==> %s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

# Run shell lines as root. Without root, show them to the user and stop before anything is changed.
as_root() {
    if [[ $(id -u) == 0 ]]; then
        DEBIAN_FRONTEND=noninteractive bash -euc "$1"
    elif sudo -n true 2>/dev/null; then
        sudo -n DEBIAN_FRONTEND=noninteractive bash -euc "$1"
    else
        printf '\nThis needs root, once. Ask an administrator to run, as root:\n\n%s\n\nthen run the same command again.\n' "$1" >&2
        exit 1
    fi
}

# The lines that install system packages; options of apt-get come first, as in: install_lines -t bookworm-backports PACKAGE.
install_lines() {
    command -v apt-get >/dev/null || fail "no apt-get here: install with your system's package manager the equivalent of: $*"
    printf 'apt-get install -y -qq --no-install-recommends %s\n' "$*"
}

# The lines that install software Vulkan and the libraries that sapien and OpenCV link against.
driver_lines() {
    local ID='' VERSION_ID='' backports=''
    # shellcheck disable=SC1090
    . "$OS_RELEASE"
    if [[ $ID == debian && $VERSION_ID == 12 ]]; then # its own Mesa, 22.3, is too old for SAPIEN 3
        backports='-t bookworm-backports'
        printf '%s\n' "grep -rqs '^[^#]*bookworm-backports' /etc/apt/sources.list /etc/apt/sources.list.d ||" \
            "    echo 'deb http://deb.debian.org/debian bookworm-backports main' > /etc/apt/sources.list.d/bookworm-backports.list"
    fi
    echo 'apt-get update -qq || true'
    install_lines libgl1 libglib2.0-0 libx11-6 libvulkan1
    install_lines ${backports:+"$backports"} mesa-vulkan-drivers
}

find_python() {
    local candidate
    for candidate in python3.11 python3.12 python3.10 python3 python; do
        if "$candidate" -c "$SUPPORTED" 2>/dev/null; then command -v "$candidate"; return; fi
    done
    return 1
}

# True where .venv runs a supported Python and every installed file has its recorded size.
venv_intact() {
    [[ -x .venv/bin/python ]] && .venv/bin/python -c "$SUPPORTED" 2>/dev/null && .venv/bin/python - 2>/dev/null <<'PYTHON'
import sys
from importlib.metadata import distributions

import pip  # noqa: F401


def intact(distribution):
    files = distribution.files  # None where the installation stopped before its last file, RECORD
    return files and all(f.locate().stat().st_size == f.size for f in files if f.size and f.suffix != ".pyc")


sys.exit(not all(map(intact, distributions())))
PYTHON
}

create_venv() {
    local python version
    if ! python=$(find_python); then
        # A distribution with a newer Python, as Debian 13, has none of these to install.
        command -v python3 >/dev/null || as_root "$(echo 'apt-get update -qq || true'; install_lines python3 python3-venv)"
        python=$(find_python) || fail "no Python 3.10, 3.11 or 3.12 found; put one on PATH, for example with uv:
    uv python install 3.11 && export PATH=\"\$(dirname \"\$(uv python find 3.11)\"):\$PATH\""
    fi
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    say "Creating .venv with Python $version ($python)"
    rm -rf .venv
    if ! "$python" -m venv .venv; then # Debian and Ubuntu keep the module in a package of its own
        rm -rf .venv
        as_root "$(echo 'apt-get update -qq || true'; install_lines "python$version-venv")"
        "$python" -m venv .venv || fail "$python cannot create virtual environments; install its venv module"
    fi
}

pip_install() { .venv/bin/python -m pip install --disable-pip-version-check "$@"; }

# Without an NVIDIA GPU the CPU build, which PyPI does not have for Linux: from a registry of this machine, or from PyTorch's own.
install_torch() {
    if [[ $(nvidia-smi -L 2>/dev/null) == GPU* ]]; then
        pip_install --no-deps "torch==$TORCH"
    elif pip_install --quiet --no-deps --retries 1 --timeout 20 "torch==$TORCH+cpu" 2>/dev/null; then
        return
    elif ! pip_install --no-deps --retries 1 --timeout 20 --index-url "$TORCH_CPU_INDEX" "torch==$TORCH"; then
        say "$TORCH_CPU_INDEX cannot be reached: taking PyPI's larger CUDA build, which also runs on the CPU"
        pip_install --no-deps "torch==$TORCH"
    fi
}

install_packages() {
    venv_intact || create_venv
    rm -f "$STAMP"
    .venv/bin/python -c 'import torch' 2>/dev/null || { say "Installing torch $TORCH"; install_torch; }
    say 'Installing the other packages'
    pip_install -c constraints.txt "torch==$TORCH" -e '.[dev]'
    fingerprint >"$STAMP"
}

# Changes whenever the installed environment would: its inputs, and its place (the project is installed by path).
fingerprint() { { cat pyproject.toml constraints.txt scripts/setup.sh; pwd; } | sha256sum; }

up_to_date() { [[ $(cat "$STAMP" 2>/dev/null) == "$(fingerprint)" ]] && .venv/bin/python -c "$SUPPORTED" 2>/dev/null; }

# Libraries and device are found (0.4 s); that they draw what they should is the doctor's to check.
can_render() { .venv/bin/python -c 'import cv2, sapien; sapien.render.RenderSystem()' >/dev/null 2>&1; }

main() {
    cd "$(dirname "${BASH_SOURCE[0]}")/.."
    exec 9<scripts/setup.sh
    flock 9 # two makes at once: the second waits, then finds all done
    up_to_date || install_packages
    if ! can_render; then
        say 'Installing a software Vulkan driver'
        as_root "$(driver_lines)"
        can_render || { .venv/bin/python experiments/doctor.py --only vulkan; fail 'the Vulkan driver does not work'; }
    fi
    .venv/bin/python envs/assets.py
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then main; fi
