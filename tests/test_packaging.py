"""What pyproject.toml asks for: one place for the version, ranges instead of exact releases of torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import edge_bcs
from edge_bcs.core.metadata import parse_toml

ROOT = Path(__file__).parents[1]


def pyproject() -> dict[str, Any]:
    return dict(parse_toml((ROOT / "pyproject.toml").read_bytes()))


def requirements() -> list[str]:
    project = pyproject()["project"]
    return [
        *project["dependencies"],
        *(one for extra in project["optional-dependencies"].values() for one in extra),
    ]


def test_the_version_stands_in_the_package_alone() -> None:
    """The expression is that of scikit-build-core's provider "regex"."""
    settings = pyproject()
    assert settings["project"]["dynamic"] == ["version"] and "version" not in settings["project"]
    source = settings["tool"]["scikit-build"]["metadata"]["version"]
    assert source["provider"] == "scikit_build_core.metadata.regex"
    found = re.findall(
        r"""(?im)^(?:__version__|VERSION)(?: ?\: ?str)? *= *(['"])v?(.+?)\1""",
        (ROOT / source["input"]).read_text(),
    )
    assert [version for _, version in found] == [edge_bcs.__version__]


def test_no_extra_asks_for_one_release_of_torch() -> None:
    """An exact release would exclude every other package that has one of its own."""
    asked = {one.split(";")[0].strip() for one in requirements() if re.match(r"torch\b", one)}
    assert asked == {"torch>=2.4"}


def test_the_lowest_versions_are_the_lower_bounds() -> None:
    """`make test-lowest` tries what pyproject.toml promises, not something else."""
    release = re.compile(r"([\w-]+)==([\d.]+)")
    pinned = dict(release.findall((ROOT / "tests" / "lowest-versions.txt").read_text()))
    tested = {*pyproject()["project"]["dependencies"]}
    for extra in ("host", "dev"):
        tested |= {*pyproject()["project"]["optional-dependencies"][extra]}
    bounds = dict(re.match(r"([\w-]+)>=([\d.]+)", one).groups() for one in tested)  # type: ignore[union-attr, misc]
    tools = {"ruff", "mypy", "clang-format", "tomli"}  # tomli is Python 3.10's alone
    assert set(bounds) - tools == set(pinned)
    for name, version in pinned.items():
        assert version.rstrip(".0") == bounds[name].rstrip(".0"), name


def test_a_board_is_asked_for_numpy_and_pillow_alone() -> None:
    """Beside what the command line prints with, and safetensors, which has no dependencies."""
    project = pyproject()["project"]
    names = {re.split(r"[>=<; ]", one)[0] for one in project["dependencies"]}
    assert names == {"numpy", "click", "safetensors", "rich", "tomli"}
    assert [re.split(r"[>=<; ]", one)[0] for one in project["optional-dependencies"]["device"]] == ["pillow"]
