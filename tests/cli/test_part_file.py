"""A part of a file is good up to a mark, belongs to one export, and says by its name that it is a part."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.cli.part_file import START, Mark, PartFile


def left_behind(path: Path, kept: bytes, lost: bytes = b"") -> Mark:
    """An export that stopped: what it kept, and what it wrote beyond that."""
    with PartFile(str(path)) as file:
        file.write(kept)
        file.keep()
        mark = file.mark
    with path.with_name(f"{path.name}.part").open("ab") as part:
        part.write(lost)  # as a process that was killed leaves it
    return mark


def test_it_appears_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with PartFile(str(path)) as file:
        file.write(b"new")
        assert path.read_text() == "old"
        file.complete()
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_what_was_not_kept_is_cut_off(tmp_path: Path) -> None:
    with PartFile(str(tmp_path / "file")) as file:
        file.write(b"one\n")
        file.keep()
        file.write(b"tw")
    assert not (tmp_path / "file").exists()
    assert (tmp_path / "file.part").read_bytes() == b"one\n"


@pytest.mark.parametrize("lost", [b"", b"two\nthr", b"x" * 3_000_000])
def test_one_goes_on_from_the_mark_as_often_as_it_takes(tmp_path: Path, lost: bytes) -> None:
    path = tmp_path / "file"
    kept = b"one\n" * 600_000
    mark = left_behind(path, kept, lost)
    for _ in range(2):
        with PartFile(str(path), Mark.parse(str(mark))) as file:
            file.write(b"two\n")  # and it is killed, as far as anybody can tell: nothing was kept
    with PartFile(str(path), mark) as file:
        file.write(b"two\n")
        file.complete()
    assert path.read_bytes() == kept + b"two\n"


@pytest.mark.parametrize("content", [b"", b"one", b"two\n", b"onetwo\n"])
def test_a_part_that_is_another_one_is_refused_and_stays(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    mark = left_behind(path, b"one\n")
    part = tmp_path / "file.part"
    part.write_bytes(content)
    with pytest.raises(click.ClickException, match="is not what it was"):
        PartFile(str(path), mark)
    assert part.read_bytes() == content


def test_one_export_at_a_time(tmp_path: Path) -> None:
    path = str(tmp_path / "file")
    with PartFile(path) as file:
        file.write(b"mine")
        for mark in (None, START):
            with pytest.raises(click.ClickException, match="another export is writing"):
                PartFile(path, mark)
        file.complete()
    assert (tmp_path / "file").read_bytes() == b"mine"
    with PartFile(path) as file:
        file.complete()
    assert (tmp_path / "file").read_bytes() == b""


def test_only_you_may_read_it(tmp_path: Path) -> None:
    part = tmp_path / "file.part"
    part.write_bytes(b"")
    part.chmod(0o666)
    with PartFile(str(tmp_path / "file")) as file:
        assert part.stat().st_mode & 0o777 == 0o600
        file.complete()
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600


def test_what_somebody_put_there_is_left_alone(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    part = tmp_path / "file.part"
    ways: list[tuple[Callable[[], None], str]] = [
        (lambda: part.symlink_to(victim), "symbolic link"),
        (lambda: os.link(victim, part), "no file of yours alone"),
        (lambda: os.mkfifo(part), "no file of yours alone"),
    ]
    for put_there, why in ways:
        put_there()
        with pytest.raises(click.ClickException, match=why):
            PartFile(str(tmp_path / "file"))
        part.unlink()
    assert victim.read_text() == "precious"


def test_a_link_keeps_being_one(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with PartFile(str(tmp_path / "link")) as file:
        file.write(b"new")
        file.complete()
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


def test_a_name_that_is_taken_meanwhile_costs_nothing(tmp_path: Path) -> None:
    with PartFile(str(tmp_path / "file")) as file:
        file.write(b"kept")
        file.keep()
        (tmp_path / "file").mkdir()
        with pytest.raises(OSError, match="directory"):
            file.complete()
    assert (tmp_path / "file.part").read_bytes() == b"kept"


@pytest.mark.parametrize(
    ("path", "mark", "why"),
    [
        ("/dev/null", None, "is no file"),
        ("/no/such/directory/file", None, "cannot write"),
        ("nothing-here", START, "to go on with"),
    ],
)
def test_what_cannot_be_written_is_one_sentence(path: str, mark: Mark | None, why: str) -> None:
    with pytest.raises(click.ClickException, match=why):
        PartFile(path, mark)


@given(st.binary(), st.binary())
def test_a_mark_is_of_all_octets_and_can_be_written_down(one: bytes, other: bytes) -> None:
    mark = START.behind(one).behind(other)
    assert mark == START.behind(one + other)
    assert Mark.parse(str(mark)) == mark


@pytest.mark.parametrize("text", ["", "1", "1.", "1.12", "-1.00000000", "1.0000000g", "1.00000000 ", "١.00000000x"])
def test_what_is_no_mark(text: str) -> None:
    assert Mark.parse(text) is None
