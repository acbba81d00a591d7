"""What must be the same on every rank of a training."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import dist_cifar
from dist_cifar.config import Config, config_from_values, flatten
from dist_cifar.run.provenance import shared_facts

OTHER_PLACES = {
    "data.root": "/elsewhere",
    "data.url": "https://mirror",
    "data.cache_dir": "/c",
    "data.stage_dir": "/s",
    "run.device": "cpu",
    "run.threads_per_rank": 2,
}


def test_where_a_rank_finds_the_data_is_its_own_affair():
    assert shared_facts(config_from_values(OTHER_PLACES)) == shared_facts(config_from_values({}))


def test_every_other_field_is_compared_with_packages_and_code():
    facts = shared_facts(Config())
    assert flatten(Config()).keys() - facts.keys() == OTHER_PLACES.keys()
    assert {"the version of torch", "the version of numba", "the version of dist_cifar"} <= facts.keys()


@pytest.mark.parametrize("change", [{"run.seed": 1}, {"augment.policy": "none"}, {"train.epochs": 1}, {"run.dir": "x"}])
def test_a_difference_is_seen(change):
    (key,) = change
    one, other = shared_facts(config_from_values({})), shared_facts(config_from_values(change))
    assert {name for name in one if one[name] != other[name]} == {key}


def test_another_code_of_the_same_version_is_seen(tmp_path, monkeypatch):
    before = shared_facts(Config())
    copied = shutil.copytree(Path(dist_cifar.__file__).parent, tmp_path / "package")
    monkeypatch.setattr(dist_cifar, "__file__", str(copied / "__init__.py"))
    assert shared_facts(Config()) == before
    (copied / "state.py").write_text("# an edit\n")
    after = shared_facts(Config())
    assert {name for name in after if after[name] != before[name]} == {"the SHA-256 of the code of dist_cifar"}
