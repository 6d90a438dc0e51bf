"""Imports go one way: experiments -> all, policies -> selfflow_robot, envs -> interfaces, selfflow_robot -> nothing."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = ("selfflow_robot", "envs", "policies", "experiments", "tests")
ALLOWED = {
    "selfflow_robot": ("selfflow_robot",),
    "envs": ("envs", "selfflow_robot.interfaces"),
    "policies": ("policies", "selfflow_robot"),
    "experiments": OURS[:-1],
}


def imported_modules(source: str, package: str) -> set[str]:
    """Dotted names of all modules imported anywhere in a file of `package`, relative ones resolved."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            names.update(f"{module}.{alias.name}" for alias in node.names)
    return names


def violations(source: str, package: str) -> list[str]:
    """Imports of our own that a file of `package` may not have."""
    allowed = ALLOWED[package.split(".")[0]]
    ours = [name for name in imported_modules(source, package) if name.split(".")[0] in OURS]
    return sorted(n for n in ours if not any(n == a or n.startswith(f"{a}.") for a in allowed))


@pytest.mark.parametrize("folder", ALLOWED)
def test_imports_go_one_way(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    found = {}
    for path in files:
        package = ".".join(path.relative_to(ROOT).parent.parts)
        if wrong := violations(path.read_text(), package):
            found[str(path.relative_to(ROOT))] = wrong
    assert found == {}


@pytest.mark.parametrize(
    ("package", "source", "wrong"),
    [
        ("selfflow_robot", "import envs", ["envs"]),
        ("selfflow_robot", "def f():\n    from policies.load import load_policy", ["policies.load.load_policy"]),
        ("envs", "from selfflow_robot import flow", ["selfflow_robot.flow"]),
        ("envs", "from selfflow_robot.interfaces import Observation", []),
        ("envs", "from .tasks import TASKS", []),
        ("envs", "from ..policies import load_policy", ["policies.load_policy"]),
        ("policies", "from envs import make_env", ["envs.make_env"]),
        ("policies", "import selfflow_robot.flow, torch", []),
        ("experiments", "import envs, policies, selfflow_robot", []),
        ("experiments", "from tests.test_layout import OURS", ["tests.test_layout.OURS"]),
    ],
)
def test_a_planted_violation_is_caught(package, source, wrong):
    assert violations(source, package) == wrong


@pytest.mark.parametrize("banned", ["pickle", "torch.load", "torch.save"])
def test_nothing_is_pickled(banned):
    """Checkpoints are safetensors and JSON: loading a file must never be able to run code."""
    users = []
    for folder in ALLOWED:
        for path in (ROOT / folder).rglob("*.py"):
            tree = ast.parse(path.read_text())
            calls = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
            if banned in calls or banned in imported_modules(path.read_text(), folder):
                users.append(str(path.relative_to(ROOT)))
    assert users == []
