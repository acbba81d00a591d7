"""Suggestions for a word or a path that was mistyped, and numbers with their nouns."""

from __future__ import annotations

import pytest

from dist_cifar.errors import counted, nearest_path


def test_names_that_share_an_extension_alone_are_not_alike(tmp_path):
    (tmp_path / "dog.jpg").touch()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.png").touch()
    assert nearest_path(tmp_path / "nope.jpg") is None
    assert nearest_path(tmp_path / "dgo.jpg") == nearest_path(tmp_path / "dog.jpeg") == tmp_path / "dog.jpg"
    assert nearest_path(tmp_path / "fotos/cat.png") == tmp_path / "photos/cat.png"


@pytest.mark.parametrize(
    ("number", "noun", "expected"),
    [(1, "step", "1 step"), (0, "step", "0 steps"), (1200, "step", "1,200 steps"), (0.5, "epoch", "0.5 epochs")],
)
def test_one_is_singular(number, noun, expected):
    assert counted(number, noun) == expected


def test_a_plural_of_its_own():
    assert counted(2, "class", "classes") == "2 classes" and counted(1, "class", "classes") == "1 class"
