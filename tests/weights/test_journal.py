import os
from pathlib import Path

import pytest

from vlmcore.errors import WeightError
from vlmcore.weights import journal as module
from vlmcore.weights.journal import Done, Journal, boot_id, note_begun, note_done

IDENTITY = {"source": "a", "dtype": None}


def done(unit: int) -> Done:
    return Done(unit, {f"hf{unit}": ("aa", 3)}, {f"box{unit}": ("bb", 3)}, 6)


def reopen(path: Path, identity: dict = IDENTITY) -> Journal:
    journal = Journal(path, identity)
    journal.close()
    return journal


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A journal in which unit 0 is done, and unit 1 begun."""
    journal = Journal(tmp_path / "journal", IDENTITY)
    note_done(journal.fd, done(0))
    note_begun(journal.fd, 1)
    journal.close()
    return tmp_path / "journal"


def test_what_was_done_is_found_again(path: Path) -> None:
    journal = reopen(path)
    (found,) = journal.progress.done.values()
    assert (found.unit, found.size_bytes, found.boot) == (0, 6, boot_id())
    assert found.tensors["hf0"][0] == "aa"
    assert not journal.discarded


def test_who_is_at_what_is_known_while_it_runs(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal", IDENTITY)
    note_begun(journal.fd, 4)
    assert journal.poll().begun == {os.getpid(): 4}
    note_done(journal.fd, done(4))
    assert journal.poll().begun == {}
    journal.close()


@pytest.mark.parametrize("torn", [b'{"done": {"unit"', b"\0\0\0\0\n", b'{"done": 3}\n'])
def test_a_torn_line_and_what_follows_are_left_out(path: Path, torn: bytes) -> None:
    whole = path.read_bytes()
    after = whole.splitlines(keepends=True)[1].replace(b'"unit":0', b'"unit":2')
    path.write_bytes(whole + torn + (after if torn.endswith(b"\n") else b""))
    assert set(reopen(path).progress.done) == {0}
    assert path.read_bytes() == whole


def test_the_journal_of_another_conversion_is_started_anew(path: Path) -> None:
    journal = reopen(path, {"source": "b", "dtype": None})
    assert journal.discarded
    assert journal.progress.done == {}
    assert not reopen(path, {"source": "b", "dtype": None}).discarded


def test_two_conversions_cannot_write_one_folder(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOCK_TIMEOUT_S", 0.2)
    first = Journal(path, IDENTITY)
    with pytest.raises(WeightError, match="another conversion is writing there"):
        Journal(path, IDENTITY)
    first.close()
    reopen(path)
