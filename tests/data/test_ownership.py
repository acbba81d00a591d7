"""Folders that others use too: what another user or all could have changed is not read."""

from __future__ import annotations

import os
import stat

import pytest

from dist_cifar.config import DataConfig
from dist_cifar.data import ownership
from dist_cifar.data.cache import load_or_build
from dist_cifar.data.dataset import load_dataset
from dist_cifar.data.node_staging import staged
from dist_cifar.data.ownership import own_folder, private_in, require_trusted
from dist_cifar.errors import DataError
from tests.data.test_cache import KEY, Builder, fail

ANOTHER = 12345


@pytest.fixture
def owners(monkeypatch):
    """`owners[path] = uid` makes a file another user's, without the rights of root."""
    real, changed = (os.stat, os.lstat), {}

    def pretend(function):
        def status(path, **options):
            found = function(path, **options)
            uid = None if isinstance(path, int) else changed.get(os.path.abspath(path))
            if uid is None:
                return found
            return os.stat_result((*found[:4], uid, *found[5:10]))

        return status

    monkeypatch.setattr(ownership.os, "stat", pretend(real[0]))
    monkeypatch.setattr(ownership.os, "lstat", pretend(real[1]))
    return changed


def test_what_is_everybodys_gets_a_folder_of_ones_own(tmp_path):
    tmp_path.chmod(0o1777)
    mine = private_in(tmp_path, "data.cache_dir")
    assert mine == tmp_path / f"dist_cifar-{os.getuid()}"
    assert stat.S_IMODE(mine.stat().st_mode) == 0o700
    assert private_in(mine, "data.cache_dir") == mine
    assert private_in(tmp_path / "missing" / "x", "data.cache_dir") == tmp_path / "missing" / "x"
    mine.chmod(0o777)  # by a mistake: it is closed again
    assert own_folder(tmp_path, "data.cache_dir") == mine
    assert stat.S_IMODE(mine.stat().st_mode) == 0o700


@pytest.mark.parametrize("kind", ["another user's", "a link", "a file"])
def test_a_folder_of_ones_own_that_another_made_is_refused(tmp_path, owners, kind):
    mine = tmp_path / f"dist_cifar-{os.getuid()}"
    if kind == "another user's":
        mine.mkdir()
        owners[str(mine)] = ANOTHER
    elif kind == "a link":
        (tmp_path / "theirs").mkdir()
        mine.symlink_to("theirs")
    else:
        mine.write_text("")
    with pytest.raises((DataError, FileExistsError), match=r"another user, who could|File exists"):
        own_folder(tmp_path, "data.stage_dir")


def test_anothers_folder_in_one_that_is_everybodys_is_refused_and_a_shared_one_is_used(tmp_path, owners):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    owners[str(theirs)] = ANOTHER
    assert private_in(theirs, "data.cache_dir") == theirs  # a colleague's, whom the config names
    tmp_path.chmod(0o1777)
    with pytest.raises(DataError, match=r"data\.cache_dir=.*everybody's"):
        private_in(theirs, "data.cache_dir")


def test_an_entry_that_others_could_have_changed_is_refused(tmp_path, owners):
    directory = load_or_build(tmp_path, "set", KEY, Builder()).directory
    for path in (directory, directory / "train_images.npy"):
        mode = stat.S_IMODE(path.stat().st_mode)
        path.chmod(mode | stat.S_IWOTH)
        with pytest.raises(DataError, match=r"all users may write to it.*data\.cache_dir"):
            load_or_build(tmp_path, "set", KEY, fail)
        path.chmod(mode)
        owners[str(path)] = ANOTHER
        with pytest.raises(DataError, match=r"belongs to another user.*data\.cache_dir"):
            load_or_build(tmp_path, "set", KEY, fail)
        owners[str(tmp_path)] = ANOTHER  # a colleague's cache
        load_or_build(tmp_path, "set", KEY, fail)
        owners.clear()
    load_or_build(tmp_path, "set", KEY, fail)
    require_trusted(tmp_path / "missing", "data.cache_dir")


def test_a_staged_copy_that_others_could_change_is_refused(tmp_path, owners):
    entry = load_or_build(tmp_path / "cache", "set", KEY, Builder())
    copy = staged(entry, tmp_path / "node").directory
    owners[str(copy / "test_images.npy")] = ANOTHER
    with pytest.raises(DataError, match=r"test_images\.npy: belongs to another user.*data\.stage_dir"):
        staged(entry, tmp_path / "node")
    owners[str(copy.parent)] = ANOTHER
    with pytest.raises(DataError, match=r"belongs to another user.*data\.stage_dir"):
        staged(entry, tmp_path / "node")


def test_a_umask_of_zero_opens_nothing_to_all(tmp_path):
    before = os.umask(0)
    try:
        config = DataConfig(
            source="synthetic", synthetic_train_size=20, synthetic_test_size=10, cache_dir=str(tmp_path / "c")
        )
        directory = load_dataset(config).directory
        assert load_dataset(config).directory == directory and directory.parent == tmp_path / "c"
    finally:
        os.umask(before)
    for path in (directory.parent, directory, *directory.iterdir()):
        assert not path.stat().st_mode & stat.S_IWOTH
