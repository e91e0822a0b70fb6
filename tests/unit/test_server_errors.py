"""What the texts and log lines about an unreachable server contain."""

import logging

import pytest
from confluent_kafka import KafkaError
from structlog.testing import capture_logs

from pipeline import causes
from pipeline.db.postgres_errors import UnreachableError, add_address, translate
from pipeline.errors import Server, TransientError
from pipeline.kafka.reports import ClientReports
from pipeline.log_events import output
from pipeline.signals import Stop

REFUSED = (
    'connection to server at "127.0.0.1", port 1 failed: Connection refused\n'
    "\tIs the server running on that host and accepting TCP/IP connections?\n"
)


def test_a_refused_connection_to_postgresql_is_one_sentence_without_libpqs_question():
    unreachable = UnreachableError(REFUSED, causes.REFUSED_PORT)
    add_address(unreachable, "127.0.0.1:1/upvest for user ingest")

    error = translate(unreachable)

    assert "Cause: Connection refused. Check that" in str(error)
    assert isinstance(error, TransientError)
    assert error.server_name == "PostgreSQL at 127.0.0.1:1/upvest"


def test_an_error_of_kafka_names_all_servers_so_that_its_lines_can_be_paired():
    reports = ClientReports()
    reports.client_created({"bootstrap.servers": "127.0.0.1:1,127.0.0.1:2"}, "upvest")

    error = reports.translated(KafkaError(KafkaError._TRANSPORT, "127.0.0.1:2/2: down"))

    assert isinstance(error, TransientError)
    assert (error.server, error.server_name) == (
        Server.KAFKA,
        "Kafka at 127.0.0.1:1,127.0.0.1:2",
    )


@pytest.mark.parametrize(
    ("code", "level"),
    [
        (KafkaError._TRANSPORT, "info"),
        (KafkaError._ALL_BROKERS_DOWN, "info"),
        (KafkaError.UNKNOWN, "warning"),
        (KafkaError._AUTHENTICATION, "error"),
    ],
)
def test_a_broken_connection_is_info_because_a_lasting_one_is_logged_as_an_outage(code, level):
    reports = ClientReports()
    reports.client_created({"bootstrap.servers": "127.0.0.1:1"}, "upvest")

    with capture_logs() as lines:
        reports.on_client_error(KafkaError(code, "127.0.0.1:1/1: failed"))

    [line] = lines
    assert (line["log_level"], line["occurrences"]) == (level, 1)


def test_librdkafkas_line_about_a_broken_connection_is_info(capsys):
    library = logging.getLogger("librdkafka")
    failed = "FAIL [client] 127.0.0.1:1/1: Connect failed: Connection refused"

    output.configure("json", "info")
    library.error(failed)
    library.error("CONFWARN [client] another")
    output.configure("json", "warning")
    library.error(failed)

    lines = capsys.readouterr().err.splitlines()
    assert [('"level": "info"' in line, "FAIL" in line) for line in lines] == [
        (True, True),
        (False, False),
    ]


def test_the_reason_for_a_stop_is_the_name_of_the_signal():
    stop = Stop()
    stop.by(15)

    assert stop.reason == "SIGTERM"
