"""What the results of a check make of each promise."""

import re
from datetime import timedelta
from pathlib import Path

import pytest

from pipeline.errors import ExitCode
from pipeline.health.check.database import database_tls
from pipeline.health.check.kafka import record_size, replication, retention
from pipeline.health.check.promises import NOT_OF_AN_INSTALLATION, Promise, PromiseState
from pipeline.health.check.result import Result, found, ok, promise_statuses
from pipeline.health.problem import Problem

PAGE = Path(__file__).parents[2] / "docs/guarantees.md"
LOG = Promise.FAITHFUL_LOG

WELL = ok("log", "well", LOG)
UNREPORTED = found(Problem("unknown", "log", "how long", "ask"), LOG)
RISK = found(Problem("warning", "log", "risky", "fix it"), LOG)
BROKEN = found(Problem("error", "log", "broken", "fix it"), LOG)
AWAY = found(Problem("error", "log", "unavailable", "start it"), LOG, code=ExitCode.UNAVAILABLE)
REFUSED = found(Problem("error", "log", "no topic", "name it"), LOG, code=ExitCode.CONFIGURATION)


def test_the_promises_are_those_of_the_page_in_order_and_wording():
    titles = re.findall(r"^\*\*(\d+)\. (.+?)\.?\*\*", PAGE.read_text(), re.MULTILINE)

    assert titles == [(str(n), result.value) for n, result in enumerate(Promise, start=1)]


@pytest.mark.parametrize(
    ("results", "state", "reasons"),
    [
        ([WELL], PromiseState.HOLDS, []),
        ([UNREPORTED, WELL], PromiseState.NOT_KNOWN, ["log: how long"]),
        ([AWAY], PromiseState.NOT_KNOWN, ["log: unavailable"]),
        ([REFUSED], PromiseState.NOT_KNOWN, ["log: no topic"]),
        ([WELL, RISK], PromiseState.AT_RISK, ["log: risky"]),
        ([UNREPORTED, RISK], PromiseState.AT_RISK, ["log: how long", "log: risky"]),
        ([RISK, BROKEN, WELL], PromiseState.BROKEN, ["log: risky", "log: broken"]),
        ([BROKEN, AWAY], PromiseState.BROKEN, ["log: broken", "log: unavailable"]),
        ([ok("kafka", "of another promise", Promise.SECRECY)], PromiseState.NOT_KNOWN, None),
        ([], PromiseState.NOT_KNOWN, None),
    ],
)
def test_the_worst_result_decides_and_every_reason_is_reported(results, state, reasons):
    [log] = [status for status in promise_statuses(results) if status.promise is LOG]

    assert log.state is state
    assert log.reasons == (["nothing was examined"] if reasons is None else reasons)


def test_promises_that_depend_on_no_installation_are_not_examined():
    judged = {status.promise for status in promise_statuses([])}

    assert judged == set(Promise) - NOT_OF_AN_INSTALLATION


@pytest.mark.parametrize("result", [WELL, UNREPORTED, RISK])
def test_only_an_error_changes_the_exit_code(result: Result):
    assert result.exit_code is ExitCode.DONE
    assert BROKEN.exit_code is ExitCode.FOUND


# --------------------------------------------------------------------------- what a broker reports

HOUR, DAY = timedelta(hours=1), timedelta(days=1)
DELETED = {"cleanup.policy": "delete", "retention.bytes": "-1"}


def kept(length):
    return {**DELETED, "retention.ms": str(length // timedelta(milliseconds=1))}


@pytest.mark.parametrize(
    ("reported", "outage", "levels", "expected"),
    [
        (kept(DAY), 3 * DAY, ["warning"], "for 1 day, but PIPELINE_LONGEST_OUTAGE_HOURS is 3 days"),
        (kept(71.5 * HOUR), 3 * DAY, ["warning"], "for 71.5 hours, but PIPELINE"),
        (kept(3 * DAY), 3 * DAY, ["ok"], "for 3 days, PIPELINE_LONGEST_OUTAGE_HOURS is 3 days"),
        (kept(HOUR), HOUR, ["ok"], "for 1 hour, PIPELINE_LONGEST_OUTAGE_HOURS is 1 hour"),
        (kept(-timedelta(milliseconds=1)), 3 * DAY, ["ok"], "for ever"),
        (kept(7 * DAY) | {"retention.bytes": "1000000"}, DAY, ["ok", "warning"], "1,000,000 bytes"),
        (kept(7 * DAY) | {"cleanup.policy": "compact"}, DAY, ["warning", "ok"], "is compacted"),
        ({"cleanup.policy": "delete"}, DAY, ["unknown"], "how long the topic keeps its records"),
        ({}, DAY, ["unknown", "unknown"], "whether the topic is compacted"),
    ],
)
def test_kafka_must_keep_records_for_longer_than_the_longest_outage(
    reported, outage, levels, expected
):
    results = list(retention("Notifications", reported, outage))

    assert [result.level for result in results] == levels
    assert any(expected in str(result) for result in results)
    assert {promise for result in results for promise in result.promises} == {
        Promise.NO_SILENT_LOSS
    }


@pytest.mark.parametrize(
    ("unclean", "in_sync", "replicas", "levels"),
    [
        ("false", "2", 3, ["ok"]),
        ("false", "1", 3, ["warning"]),
        ("false", "1", 1, ["warning"]),
        ("true", "2", 3, ["warning"]),
        ("true", "1", 1, ["warning", "warning"]),
        (None, None, 3, ["unknown"]),
        (None, "2", 3, ["unknown"]),
        (None, None, 1, ["unknown", "warning"]),
    ],
)
def test_a_topic_must_outlive_a_broker(unclean, in_sync, replicas, levels):
    settings = {"unclean.leader.election.enable": unclean, "min.insync.replicas": in_sync}
    reported = {name: value for name, value in settings.items() if value is not None}

    results = replication("Notifications", reported, replicas)

    assert [result.level for result in results] == levels


@pytest.mark.parametrize(
    ("reported", "level"),
    [
        ({"max.message.bytes": "1048588"}, "ok"),
        ({"max.message.bytes": "20000000"}, "warning"),
        ({}, "unknown"),
    ],
)
def test_a_record_larger_than_a_batch_takes_memory_of_its_own(reported, level):
    result = record_size("Notifications", reported, batch_bytes=8 * 1024 * 1024)

    assert (result.level, result.promises) == (level, (Promise.BOUNDED_MEMORY,))


# ------------------------------------------------------------------------------------------- TLS


@pytest.mark.parametrize(
    ("host", "tls", "sslmode", "channel_binding", "level"),
    [
        ("/run/postgresql", None, "prefer", "prefer", "ok"),
        ("db.example", None, "prefer", "prefer", "warning"),
        ("db.example", "TLSv1.3", "require", "require", "warning"),
        ("db.example", "TLSv1.3", "verify-ca", "prefer", "warning"),
        ("db.example", "TLSv1.3", "verify-full", "disable", "warning"),
        ("db.example", "TLSv1.3", "verify-full", "prefer", "ok"),
        ("db.example", "TLSv1.3", "verify-full", "require", "ok"),
    ],
)
def test_anything_below_verify_full_over_the_network_is_a_risk_of_secrets(
    host, tls, sslmode, channel_binding, level
):
    result = database_tls(host, tls, sslmode, channel_binding)

    assert result.level == level
    assert Promise.SECRECY in result.promises
