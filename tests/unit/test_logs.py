import json
import logging
import os
import sys
import threading
import warnings
from datetime import datetime, timedelta

import psycopg
import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from pipeline import log_events
from pipeline.errors import InvariantError
from pipeline.log_events import output
from pipeline.redaction import redacted

CANARY = "c4n4ry-hunter2"


@pytest.fixture(autouse=True)
def logging_as_before(monkeypatch):
    """What configure changes in the process is put back."""
    root = logging.getLogger()
    levels = {name: logging.getLogger(name).level for name in ("", "pipeline", "alembic")}
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)

    before = list(root.handlers)
    yield
    root.handlers = before
    logging.captureWarnings(capture=False)
    structlog.reset_defaults()
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture
def lines(capsys):
    """What stderr holds, line by line; stdout stays empty, for it is data."""

    def read():
        out, err = capsys.readouterr()
        assert out == ""
        return [json.loads(line) for line in err.splitlines()]

    return read


class Failed(psycopg.DataError):
    """As psycopg raises it, with the text of a real server."""

    sqlstate = "22P02"


# -------------------------------------------------------------------------------------------- lines


def test_a_line_is_json_with_time_level_event_and_logger_first(lines):
    log_events.configure("json", "info")

    structlog.get_logger("pipeline.ingest").info("batch_committed", topic="Prices", count=3)

    [line] = lines()
    assert list(line) == ["ts", "level", "event", "logger", "topic", "count"]
    assert line["ts"].endswith("Z")
    assert datetime.fromisoformat(line["ts"]).utcoffset() == timedelta(0)
    assert line["level"] == "info"
    assert line["event"] == "batch_committed"
    assert line["logger"] == "pipeline.ingest"


def test_a_value_bound_to_the_context_is_on_every_line(lines):
    log_events.configure("json", "info")

    with structlog.contextvars.bound_contextvars(instance="worker-1"):
        structlog.get_logger("pipeline").info("started")

    assert lines()[0]["instance"] == "worker-1"


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        ("debug", ["debug", "info", "warning", "error"]),
        ("info", ["info", "warning", "error"]),
        ("warning", ["warning", "error"]),
        ("error", ["error"]),
    ],
)
def test_less_than_the_level_is_not_logged(lines, level, expected):
    log_events.configure("json", level)

    for level_name in ("debug", "info", "warning", "error"):
        getattr(structlog.get_logger("pipeline.kafka"), level_name)("said")

    assert [line["level"] for line in lines()] == expected


def test_log_lines_of_libraries_have_the_same_format(lines):
    log_events.configure("json", "info")

    logging.getLogger("alembic.runtime.migration").info("Running upgrade %s -> %s", "", "0001")

    [line] = lines()
    assert line["event"] == "library_log"
    assert line["logger"] == "alembic.runtime.migration"
    assert line["msg"] == "Running upgrade  -> 0001"


def test_statements_that_a_library_logs_are_not_logged_even_at_debug(lines):
    log_events.configure("json", "debug")

    logging.getLogger("sqlalchemy.engine.Engine").info("[raw sql] ('%s',)", CANARY)

    assert lines() == []


def test_warnings_of_python_are_log_lines(lines):
    log_events.configure("json", "info")

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(capture=False)
        logging.captureWarnings(capture=True)
        warnings.warn("this will change", DeprecationWarning, stacklevel=1)

    [line] = lines()
    assert line["logger"] == "py.warnings"
    assert "this will change" in line["msg"]


def test_logging_configured_twice_logs_everything_once(lines):
    log_events.configure("json", "info")
    log_events.configure("json", "info")

    structlog.get_logger("pipeline").info("started")

    assert len(lines()) == 1


@pytest.mark.parametrize(("terminal", "is_json"), [(True, False), (False, True)])
def test_auto_is_console_on_a_terminal(capsys, monkeypatch, terminal, is_json):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    log_events.configure("auto", "info")

    structlog.get_logger("pipeline").info("started", topic="Prices")

    err = capsys.readouterr().err
    assert err.startswith("{") is is_json
    assert "started" in err
    assert "Prices" in err


# ------------------------------------------------------------------------------- what must not show


@pytest.mark.parametrize(
    "fields",
    [
        {"password": CANARY},
        {"kafka_password": CANARY},
        {"sasl.oauthbearer.client.secret": CANARY},
        {"ssl.key.pem": CANARY},
        {"access_token": [CANARY]},
        {"url": f"postgresql://user:{CANARY}@host/db"},
        {"url": f"postgresql://user:p@{CANARY}@host/db"},
        {"url": f"user:{CANARY}@host:5432/db"},
        {"reason": f"connection to host=h password={CANARY} failed"},
        {"reason": f"conninfo \"host=h password='{CANARY} and more' dbname=d\""},
        {"config": {"bootstrap.servers": "b:1", "sasl.password": CANARY}},
        {"configs": [{"sasl.password": CANARY}]},
        {"setting": SecretStr(CANARY)},
        {"payload": {"name": CANARY}},
        {"headers": [["name", CANARY]]},
        {"key": CANARY},
        {"record": CANARY},
        {"found": CANARY.encode()},
        {"error": Failed(f'invalid input syntax for type uuid: "{CANARY}"')},
        {"error": ValueError(f"postgresql://u:{CANARY}@h/d")},
        {"error": ValueError(f"no amount: {CANARY}")},
    ],
)
@pytest.mark.parametrize("form", ["json", "console"])
def test_neither_secrets_nor_payloads_are_logged(capsys, form, fields):
    log_events.configure(form, "debug")

    structlog.get_logger("pipeline").info("happened", **fields)

    err = capsys.readouterr().err
    assert "happened" in err
    assert CANARY not in err


def test_harmless_values_stay_readable(lines):
    log_events.configure("json", "info")

    structlog.get_logger("pipeline").info(
        "happened",
        topic="Prices",
        offset_first=0,
        lag=None,
        paused=False,
        seconds=0.5,
        servers="kafka.example.com:9094",
        url="https://example.com/a?b=c",
        partitions=(1, 2),
        at=datetime(2026, 1, 31),  # noqa: DTZ001 - any object that only str can show
    )

    [line] = lines()
    assert line["topic"] == "Prices"
    assert line["offset_first"] == 0
    assert line["lag"] is None
    assert line["paused"] is False
    assert line["seconds"] == 0.5
    assert line["servers"] == "kafka.example.com:9094"
    assert line["url"] == "https://example.com/a?b=c"
    assert line["partitions"] == [1, 2]
    assert line["at"] == "2026-01-31 00:00:00"


@given(st.text(), st.text(alphabet=st.characters(exclude_characters=" \t\r\n\"'<>", codec="utf-8")))
def test_no_url_keeps_its_user(around, password):
    canary = f"u:{password}{CANARY}@h"

    assert CANARY not in redacted(f"{around} kafka://{canary}/x")


@given(st.text())
def test_any_text_is_one_line_and_moves_no_cursor(text):
    event = output._without_control_characters(None, "", {"reason": text, "many": [{"a": text}]})

    shown = event["reason"] + event["many"][0]["a"]
    assert len(shown.splitlines()) <= 1
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 or 0x202A <= ord(c) <= 0x202E for c in shown)


def test_an_escape_sequence_does_not_reach_the_terminal(capsys):
    log_events.configure("console", "info")

    structlog.get_logger("pipeline").warning("happened", topic="a\x1b[2Jb\r\nforged", lag=None)

    err = capsys.readouterr().err
    assert "\x1b[2J" not in err
    assert len(err.splitlines()) == 1


# --------------------------------------------------------------------------------------- exceptions


def raised(error, cause=None):
    """The error with a traceback, from a frame whose variables hold a canary."""
    held = CANARY
    with pytest.raises(type(error)) as caught:
        raise error from cause
    assert held
    return caught.value


@pytest.mark.parametrize("form", ["json", "console"])
def test_an_exception_shows_its_stack_and_no_values(capsys, form):
    log_events.configure(form, "info")
    cause = raised(
        psycopg.errors.UniqueViolation(
            'duplicate key value violates unique constraint "events_pkey"\n'
            f"DETAIL:  Key (topic)=({CANARY}\n{CANARY}) already exists.\n"
            f"CONTEXT:  COPY events, line 1: {CANARY}"
        )
    )
    error = raised(InvariantError("could not append"), cause)

    structlog.get_logger("pipeline").error("append_failed", exc_info=error)

    err = capsys.readouterr().err
    assert "UniqueViolation: *** (23505)" in err
    assert "caused:" in err
    assert "InvariantError: could not append" in err
    assert "in raised" in err
    assert CANARY not in err


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(f'(psycopg.errors.X) no\n[SQL: insert {CANARY}]\n[parameters: ("{CANARY}",)]'),
        RuntimeError(f"relation is missing\nLINE 1: select '{CANARY}'\n    ^"),
        # A server that speaks German, French …
        Failed(f"ung\u00fcltige Syntax: \u00bb{CANARY}\u00ab\nKONTEXT:  COPY events: {CANARY}"),
        ValueError(f"invalid literal for int() with base 10: '{CANARY}'"),
        KeyError(CANARY),
        UnicodeDecodeError("utf-8", CANARY.encode(), 0, 1, CANARY),
    ],
    ids=["statement", "line", "German", "int", "key", "bytes"],
)
def test_messages_of_other_programs_about_data_are_not_repeated(error):
    text = log_events.exception_text(raised(error))

    assert CANARY not in text
    assert f"{type(error).__name__}: ***" in text


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (InvariantError("epoch 3 fell"), "InvariantError: epoch 3 fell"),
        (AttributeError("no attribute 'x'"), "AttributeError: no attribute 'x'"),
        (FileNotFoundError(2, "No such file", "/x"), "No such file"),
        (ValueError(), "ValueError: "),
        (Failed("x"), "Failed: *** (22P02)"),
    ],
)
def test_the_text_of_an_error_without_data_is_logged(error, expected):
    assert expected in log_events.exception_text(raised(error))


def test_a_group_shows_each_of_its_exceptions():
    group = ExceptionGroup("two threads", [raised(ValueError("one")), raised(KeyError("two"))])

    text = log_events.exception_text(group)

    assert "ValueError: ***" in text
    assert "KeyError: ***" in text


def test_exceptions_that_cause_each_other_end():
    first, second = ValueError("one"), ValueError("two")
    first.__cause__, second.__cause__ = second, first

    assert log_events.exception_text(first).count("ValueError") == 2


def test_the_current_exception_is_shown(lines):
    log_events.configure("json", "info")

    try:
        os.environ["GONE"]
    except KeyError:
        structlog.get_logger("pipeline").exception("failed")

    [line] = lines()
    assert line["error.type"] == "KeyError"
    assert line["exception"].endswith("KeyError: ***")


def test_an_exception_nobody_caught_is_a_log_line_too(lines):
    log_events.configure("json", "info")
    error = raised(Failed(f'bad: "{CANARY}"'))

    sys.excepthook(type(error), error, error.__traceback__)
    threading.excepthook(threading.ExceptHookArgs((type(error), error, None, None)))

    assert [line["event"] for line in lines()] == ["crashed", "thread_crashed"]


def test_an_interrupt_from_the_keyboard_is_no_crash(capsys):
    log_events.configure("json", "info")
    stop = KeyboardInterrupt()

    sys.excepthook(type(stop), stop, None)

    assert "crashed" not in capsys.readouterr().err
