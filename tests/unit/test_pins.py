"""The versions that a study runs with: one set of pins for pip and conda, within the ranges of the package."""

from __future__ import annotations

import tomllib
from importlib import metadata
from itertools import chain
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).parents[2]


def pinned(lines):
    """Version by name of `name==version` lines."""
    found = {}
    for line in lines:
        requirement = Requirement(line)
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", line
        name = canonicalize_name(requirement.name)
        assert name not in found, f"{name} is pinned twice"
        found[name] = specifier.version
    return found


def read_lock(path):
    lines = (REPOSITORY / path).read_text().splitlines()
    return pinned(line for line in lines if line.strip() and not line.startswith("#"))


@pytest.fixture(scope="module")
def lock():
    return read_lock("requirements.lock")


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def test_conda_and_pip_install_the_same_versions(lock):
    environment = yaml.safe_load((REPOSITORY / "envs/rlsae.yaml").read_text())
    (pip,) = (entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert pinned(pip) == lock


def test_conda_and_pip_agree_on_python(project):
    environment = yaml.safe_load((REPOSITORY / "envs/rlsae.yaml").read_text())
    (python,) = (entry for entry in environment["dependencies"] if str(entry).startswith("python="))
    assert Requirement(f"python{project['requires-python']}").specifier.contains(python.partition("=")[2] + ".0")


def test_the_container_is_made_from_the_same_python_and_pins():
    lines = (REPOSITORY / "envs/Dockerfile").read_text().splitlines()
    environment = yaml.safe_load((REPOSITORY / "envs/rlsae.yaml").read_text())
    (image,) = (line.split()[1] for line in lines if line.startswith("FROM "))
    (python,) = (entry for entry in environment["dependencies"] if str(entry).startswith("python="))
    assert image.startswith(python.replace("=", ":"))
    copied = [name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]]
    assert "requirements.lock" in copied
    assert all((REPOSITORY / name).exists() for name in copied)
    assert not any("==" in line.replace("'^torch=='", "") for line in lines)  # versions stand in the lock file alone


def test_every_dependency_of_the_package_is_pinned_within_its_range(lock, project):
    for requirement in map(Requirement, chain(project["dependencies"], *project["optional-dependencies"].values())):
        name = canonicalize_name(requirement.name)
        assert name in lock, f"{name} is not in requirements.lock"
        assert requirement.specifier.contains(lock[name]), f"{requirement}: {lock[name]} is pinned"


def test_what_executes_the_tutorial_replaces_no_pinned_version(lock):
    assert read_lock("tests/workflow/drivers.lock").keys() & lock.keys() == set()


def test_the_version_of_the_package_is_told_once(project):
    import rlsae

    assert project["version"] == rlsae.__version__ == metadata.version("rlsae")
