"""Files as files: what systems without POSIX's calls do instead gives the same results."""

from __future__ import annotations

import os
import sys

import pytest
from conftest import Space, digests, states

from sdmerge_build import files


def test_without_links_an_artifact_is_published_as_a_copy(space: Space, monkeypatch):
    """
    Where neither reflinks nor hard links exist, a copy of its own appears, writable as the umask says, and is not copied again.
    """

    def refuse(*_):
        raise OSError

    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setattr(os, "link", refuse)
    space.pair()
    first, second = space.build(), space.build()
    target = space.path / "out" / "mix.safetensors"

    assert target.read_bytes() == first.wishes[0].stored.path.read_bytes()
    assert not target.samefile(first.wishes[0].stored.path)
    assert target.stat().st_mode & 0o200
    assert (states(second), second.published) == ({"mix": "reused"}, 0)


@pytest.mark.parametrize("missing", ["posix_fallocate", "fdatasync", "O_NONBLOCK"])
def test_a_build_needs_no_posix_call(space: Space, monkeypatch, missing):
    """
    Without the call the same bytes are made.
    """
    space.pair()
    usual = digests(space.build())
    monkeypatch.delattr(os, missing)

    assert digests(space.build(store=space.path / "other", out=space.path / "other-out")) == usual


def test_a_replacement_that_fails_leaves_the_old_file(tmp_path):
    """
    Readers see the old file or the new one; nothing is left beside it.
    """
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), files.replacing(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt

    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
