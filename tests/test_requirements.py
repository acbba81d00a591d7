"""Tests of the lock, `requirements/*.txt`: `make lock` has been run since pyproject.toml changed."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())

MACHINES = [
    {"python_version": f"3.{minor}", "python_full_version": f"3.{minor}.1", "platform_machine": machine}
    for minor in range(11, 15)
    for machine in ("x86_64", "aarch64")
]


def wanted(*extras: str) -> Iterator[Requirement]:
    """What pyproject.toml asks for, with the extras that an extra names."""
    project = PROJECT["project"]
    lines = [*project["dependencies"], *PROJECT["build-system"]["requires"]]
    lines += [line for extra in extras for line in project["optional-dependencies"][extra]]
    for requirement in map(Requirement, lines):
        if requirement.name == project["name"]:
            yield from wanted(*requirement.extras)
        else:
            yield requirement


def locked(name: str, machine: dict[str, str]) -> dict[str, str]:
    """The versions of a file of the lock that are installed on such a machine, by package."""
    environment = {"sys_platform": "linux", "platform_python_implementation": "CPython"} | machine
    versions = {}
    for line in (REPOSITORY / "requirements" / name).read_text().splitlines():
        if line.startswith("#"):
            continue
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate(environment):
            (exact,) = requirement.specifier
            assert exact.operator == "==" and requirement.name not in versions, line
            versions[canonicalize_name(requirement.name)] = exact.version
    return versions


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: "-".join(machine.values()))
@pytest.mark.parametrize(("name", "extras"), [("run.txt", ()), ("test.txt", ("test",))])
def test_the_lock_has_what_pyproject_asks_for(name, extras, machine):
    versions = locked(name, machine)
    for requirement in wanted(*extras):
        version = versions.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement} is not in requirements/{name}; run make lock"
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement}, not {version}; run make lock"


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: "-".join(machine.values()))
def test_quickstart_runs_what_is_tested(machine):
    run, test = (locked(name, machine) for name in ("run.txt", "test.txt"))
    assert run.items() <= test.items() and {"pytest", "deepspeed", "wandb"} <= test.keys() - run.keys()
