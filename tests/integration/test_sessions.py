"""A session waits for as long as its server lives, and no longer than it may."""

import socket
from datetime import timedelta

import pytest
from sqlalchemy import text
from structlog.testing import capture_logs

from pipeline.db import SessionLimits, open_engine, transaction
from pipeline.db import connection as connection_module
from pipeline.errors import TransientError

LONG = text("SELECT pg_sleep(1)")


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(connection_module, "SILENCE_S", 0.2)
    monkeypatch.setattr(connection_module, "ALIVE_S_MAX", 5.0)


@pytest.fixture
def open_(database):
    engines = []

    def open_(limits=None):
        engines.append(open_engine(database.url, application="test", limits=limits))
        return engines[-1]

    yield open_
    for engine in engines:
        engine.dispose()


def test_a_long_statement_is_logged_once_and_waited_for(open_):
    with capture_logs() as logged, transaction(open_()) as connection:
        connection.execute(LONG)

    assert [line["event"] for line in logged] == ["server_slow"]


def test_a_statement_without_an_answer_in_time_is_given_up_and_the_next_one_is_answered(open_):
    engine = open_(
        SessionLimits(lock_wait=timedelta(milliseconds=100), answer=timedelta(milliseconds=300))
    )

    with pytest.raises(TransientError, match="no answer to a statement"), transaction(engine) as db:
        db.execute(LONG)

    with transaction(engine) as connection:
        assert connection.execute(text("SELECT 1")).scalar_one() == 1


def test_a_server_that_accepts_no_connections_is_given_up(open_, monkeypatch):
    """What it would look like where the host is gone; the real thing is among the faults."""
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        host, port = deaf.getsockname()
        monkeypatch.setattr(connection_module, "ALIVE_S_MAX", 0.2)
        dial = connection_module._dial
        monkeypatch.setattr(connection_module, "_dial", lambda _host, _port: dial(host, port))

        with pytest.raises(TransientError, match="hangs"), transaction(open_()) as connection:
            connection.execute(LONG)


def test_a_server_is_checked_through_its_socket_in_a_folder_too(tmp_path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / ".s.PGSQL.5432"))
        server.listen()

        with connection_module._dial(str(tmp_path), 5432) as asking:
            assert asking.family == socket.AF_UNIX
