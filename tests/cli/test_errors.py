from __future__ import annotations

import errno
import json

import pytest

from retex_cli.cli.errors import Failure, describe, explain
from retex_cli.errors import GateMissed, RetexError, UsageError


@pytest.mark.parametrize(
    ("error", "code"), [(RetexError("m", "h"), 1), (UsageError("m", "h"), 2), (GateMissed("m", "h"), 3)]
)
def test_our_errors_keep_words_and_status(error: RetexError, code: int) -> None:
    assert describe(error) == Failure("m", "h", code)


def test_one_line_each() -> None:
    assert describe(RetexError("two\n  lines", "and\nmore")) == Failure("two lines", "and more", 1)


def test_interruption_is_130() -> None:
    assert describe(KeyboardInterrupt()) == Failure("interrupted", None, 130)


def test_the_operating_system_names_the_file() -> None:
    found = describe(PermissionError(errno.EACCES, "Permission denied", "secret.safetensors"))
    assert found is not None
    assert found.error == "secret.safetensors: Permission denied"
    full = describe(OSError(errno.ENOSPC, "No space left on device"))
    assert full is not None
    assert "free some space" in str(full.hint)


def test_too_little_memory_is_no_bug() -> None:
    class OutOfMemoryError(RuntimeError):
        """As torch calls it."""

    assert describe(MemoryError()) == describe(OutOfMemoryError("CUDA out of memory"))
    assert describe(MemoryError()) is not None


def test_a_bug_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(IndexError) as caught:
        _ = [][0]
    assert explain(caught.value, as_json=False, debug=False) == 1
    written = capsys.readouterr()
    assert written.out == ""
    assert "Traceback" in written.err
    assert "bug in retex" in written.err


def test_anything_else_has_none_unless_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert explain(UsageError("no such method", "did you mean ties?"), as_json=False, debug=False) == 2
    assert capsys.readouterr().err == "error: no such method\nhint: did you mean ties?\n"
    explain(UsageError("no such method"), as_json=False, debug=True)
    assert "UsageError" in capsys.readouterr().err


def test_with_json_the_failure_is_the_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert explain(RetexError("broken", "mend it"), as_json=True, debug=False) == 1
    written = capsys.readouterr()
    assert json.loads(written.out) == {"error": "broken", "hint": "mend it", "code": 1}
    assert written.err == ""


def test_with_json_a_bug_is_an_object_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert explain(KeyError("x"), as_json=True, debug=False) == 1
    written = capsys.readouterr()
    assert json.loads(written.out)["error"] == "KeyError: 'x'"
    assert "KeyError" in written.err
