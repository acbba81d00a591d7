"""Suggestions for a word or a path that was mistyped."""

from __future__ import annotations

from dist_cifar.errors import nearest_path


def test_names_that_share_an_extension_alone_are_not_alike(tmp_path):
    (tmp_path / "dog.jpg").touch()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.png").touch()
    assert nearest_path(tmp_path / "nope.jpg") is None
    assert nearest_path(tmp_path / "dgo.jpg") == nearest_path(tmp_path / "dog.jpeg") == tmp_path / "dog.jpg"
    assert nearest_path(tmp_path / "fotos/cat.png") == tmp_path / "photos/cat.png"
