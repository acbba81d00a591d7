"""Which revision of the source made a result."""

from __future__ import annotations

import subprocess

import dist_cifar
from dist_cifar.run.provenance import git_revision


def test_the_history_of_a_project_around_the_package_is_not_its_own(tmp_path, monkeypatch):
    package = tmp_path / "site/dist_cifar"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.invalid", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "other"], check=True)
    monkeypatch.setattr(dist_cifar, "__file__", str(package / "__init__.py"))
    assert git_revision() is None
    subprocess.run([*git, "add", "site"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "ours"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert git_revision() == head
