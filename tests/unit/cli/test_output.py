import contextlib
import io
import json
import os
import pty
import unicodedata
from datetime import UTC, datetime, timedelta
from uuid import UUID

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.cli import output
from pipeline.cli.output import Gauge, Mark, emit, say, table


def test_a_table_aligns_numbers_right_and_truncates_nothing(capsys):
    long = "x" * 500

    table(["name", "count"], [("a", 1), (long, 12_345), ("b", None)])

    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"{'name':<500}   count"
    assert out[1] == f"{'a':<500}       1"
    assert out[2] == f"{long}  12,345"
    assert out[3] == f"{'b':<500}       -"


def test_a_table_without_rows_prints_nothing(capsys):
    table(["name"], [])

    assert capsys.readouterr().out == ""


def test_data_from_outside_can_neither_move_the_cursor_nor_use_markup(capsys):
    table(["event"], [("\x1b[2J\u202e[bold]evil[/bold]\n",), (Mark("\x07", "red"),)])
    say("\x1b]0;title\x07")

    out, err = capsys.readouterr()
    assert out.splitlines()[1:] == ["\\x1b[2J\\u202e[bold]evil[/bold]\\n", "\\x07"]
    assert err == "\\x1b]0;title\\x07\n"


@settings(suppress_health_check=[HealthCheck.too_slow])  # on a busy machine
@given(st.recursive(st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_json_is_the_same_value_and_cannot_move_the_cursor_either(document):
    written = io.StringIO()
    with contextlib.redirect_stdout(written):
        emit(document)

    assert json.loads(written.getvalue()) == document
    assert misleading(written.getvalue()[:-1]) == []


def misleading(written):
    return [
        character
        for character in written
        if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")
    ]


def test_json_is_one_document_on_one_line(capsys):
    identity = UUID("6f5b4f5e-5d8f-4c40-8a4b-7d3a1f6d0a11")

    emit({"id": identity, "at": datetime(2026, 1, 2, tzinfo=UTC), "for": timedelta(seconds=2.5)})

    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert json.loads(out) == {"id": str(identity), "at": "2026-01-02T00:00:00+00:00", "for": 2.5}


def test_short_work_without_a_terminal_prints_no_progress(capsys):
    with Gauge("working", total=3) as gauge:
        gauge.show(3)

    assert capsys.readouterr() == ("", "")


def test_progress_is_printed_in_plain_lines_if_no_bar_can_be_drawn(capsys, monkeypatch):
    monkeypatch.setattr(output, "PLAIN_LINE_S", 0.0)

    with Gauge("working", total=2000, unit="offsets") as gauge:
        gauge.show(1000)
        gauge.show(2000)

    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[0].startswith("working: 1,000 of 2,000 offsets, ")
    assert err.splitlines()[-1].startswith("working: 2,000 of 2,000 offsets, ")


def test_progress_is_a_bar_on_a_terminal(monkeypatch):
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as screen, monkeypatch.context() as patch:
        patch.setattr("sys.stderr", screen)
        with Gauge("working \x1b[2J", total=2) as gauge:
            gauge.show(1)
            gauge.show(2, 2, "done \x1b[2J")
    seen = "".join(_read(ours))

    assert "2/2" in seen
    assert "\x1b[2J" not in seen


def _read(terminal):
    """What was written to a terminal that has been closed."""
    with contextlib.suppress(OSError):  # how Linux tells the end
        while piece := os.read(terminal, 65_536):
            yield piece.decode()
    os.close(terminal)
