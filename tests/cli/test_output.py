"""An output file is there when it is complete, and a part of it says so by its name."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from relay.cli.output import OutputFile


def test_it_appears_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with OutputFile(str(path)) as file:
        file.write(b"new")
        assert path.read_text() == "old"
        file.complete()
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_what_was_not_kept_is_cut_off_and_one_may_go_on(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with OutputFile(str(path)) as file:
        file.write(b"one\n")
        file.keep()
        file.write(b"tw")
    assert not path.exists()
    assert (tmp_path / "file.part").read_bytes() == b"one\n"
    with OutputFile(str(path), go_on=True) as file:
        file.write(b"two\n")
        file.complete()
    assert path.read_bytes() == b"one\ntwo\n"


def test_a_link_keeps_being_one(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with OutputFile(str(tmp_path / "link")) as file:
        file.write(b"new")
        file.complete()
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


@pytest.mark.parametrize(
    ("path", "go_on", "why"),
    [
        ("/dev/null", False, "is no file"),
        ("/no/such/directory/file", False, "cannot write"),
        ("nothing-here", True, "to go on with"),
    ],
)
def test_what_cannot_be_written_is_one_sentence(path: str, go_on: bool, why: str) -> None:
    with pytest.raises(click.ClickException, match=why):
        OutputFile(path, go_on=go_on)
