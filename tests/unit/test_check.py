"""What the findings of a check make of each promise."""

import re
from datetime import timedelta
from pathlib import Path

import pytest

from pipeline.errors import ExitCode
from pipeline.health.check.database import database_tls
from pipeline.health.check.findings import Finding, ok, unknown, warning, worth, wrong
from pipeline.health.check.kafka import record_size, replication, retention
from pipeline.health.check.promises import ANYWHERE, Promise, Standing

PAGE = Path(__file__).parents[2] / "docs/guarantees.md"
LOG = Promise.FAITHFUL_LOG

WELL = ok("log", "well", LOG)
UNTOLD = unknown("log", "how long", LOG)
RISK = warning("log", "risky", "mend it", LOG)
BROKEN = wrong("log", "broken", "mend it", LOG)
AWAY = wrong("log", "away", "start it", LOG, code=ExitCode.UNAVAILABLE)
REFUSED = wrong("log", "no such topic", "name another", LOG, code=ExitCode.CONFIGURATION)


def test_the_promises_are_those_of_the_page_in_its_order_and_words():
    titles = re.findall(r"^\*\*(\d+)\. (.+?)\.?\*\*", PAGE.read_text(), re.MULTILINE)

    assert titles == [(str(n), one.value) for n, one in enumerate(Promise, start=1)]


@pytest.mark.parametrize(
    ("findings", "standing", "reasons"),
    [
        ([WELL], Standing.HOLDS, []),
        ([UNTOLD, WELL], Standing.NOT_KNOWN, ["how long, not told: ask Upvest"]),
        ([AWAY], Standing.NOT_KNOWN, ["away"]),
        ([REFUSED], Standing.NOT_KNOWN, ["no such topic"]),
        ([WELL, RISK], Standing.AT_RISK, ["risky"]),
        ([UNTOLD, RISK], Standing.AT_RISK, ["how long, not told: ask Upvest", "risky"]),
        ([RISK, BROKEN, WELL], Standing.BROKEN, ["risky", "broken"]),
        ([BROKEN, AWAY], Standing.BROKEN, ["broken", "away"]),
        ([ok("kafka", "of another promise", Promise.SECRECY)], Standing.NOT_KNOWN, None),
        ([], Standing.NOT_KNOWN, None),
    ],
)
def test_the_worst_finding_decides_and_every_reason_is_told(findings, standing, reasons):
    [log] = [one for one in worth(findings) if one.promise is LOG]

    assert log.standing is standing
    assert log.reasons == (["nothing was looked at"] if reasons is None else reasons)


def test_what_hangs_on_no_installation_is_not_judged():
    assert {one.promise for one in worth([])} == set(Promise) - ANYWHERE


@pytest.mark.parametrize("finding", [WELL, UNTOLD, RISK])
def test_only_what_is_wrong_changes_the_exit_code(finding: Finding):
    assert finding.exit_code is ExitCode.DONE
    assert BROKEN.exit_code is ExitCode.FOUND


# ----------------------------------------------------------------------------- what a broker tells

HOUR, DAY = timedelta(hours=1), timedelta(days=1)
DELETED = {"cleanup.policy": "delete", "retention.bytes": "-1"}


def kept(length):
    return {**DELETED, "retention.ms": str(length // timedelta(milliseconds=1))}


@pytest.mark.parametrize(
    ("told", "outage", "levels", "said"),
    [
        (kept(DAY), 3 * DAY, ["warning"], "for 1 day, you plan for an outage of 3 days"),
        (kept(71.5 * HOUR), 3 * DAY, ["warning"], "for 71.5 hours, you plan"),
        (kept(3 * DAY), 3 * DAY, ["ok"], "for 3 days, you plan for an outage of 3 days"),
        (kept(HOUR), HOUR, ["ok"], "for 1 hour, you plan for an outage of 1 hour"),
        (kept(-timedelta(milliseconds=1)), 3 * DAY, ["ok"], "for ever"),
        (kept(7 * DAY) | {"retention.bytes": "1000000"}, DAY, ["ok", "warning"], "1,000,000 bytes"),
        (kept(7 * DAY) | {"cleanup.policy": "compact"}, DAY, ["warning", "ok"], "is compacted"),
        ({"cleanup.policy": "delete"}, DAY, ["unknown"], "how long it keeps its records"),
        ({}, DAY, ["unknown", "unknown"], "whether it is compacted"),
    ],
)
def test_kafka_must_keep_records_for_longer_than_the_longest_outage(told, outage, levels, said):
    findings = list(retention("Notifications", told, outage))

    assert [one.level for one in findings] == levels
    assert any(said in one.text for one in findings)
    assert {promise for one in findings for promise in one.promises} == {Promise.NO_SILENT_LOSS}


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
    told = {name: value for name, value in settings.items() if value is not None}

    findings = replication("Notifications", told, replicas)

    assert [one.level for one in findings] == levels


@pytest.mark.parametrize(
    ("told", "level"),
    [
        ({"max.message.bytes": "1048588"}, "ok"),
        ({"max.message.bytes": "20000000"}, "warning"),
        ({}, "unknown"),
    ],
)
def test_a_record_larger_than_a_batch_takes_memory_of_its_own(told, level):
    finding = record_size("Notifications", told, batch_bytes=8 * 1024 * 1024)

    assert (finding.level, finding.promises) == (level, (Promise.BOUNDED_MEMORY,))


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
    finding = database_tls(host, tls, sslmode, channel_binding)

    assert finding.level == level
    assert Promise.SECRECY in finding.promises
