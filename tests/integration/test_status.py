"""What `pipeline status` reports, from the database alone."""

import random
import re

import pytest
from sqlalchemy import text
from sqlalchemy.event import listen

from pipeline import catalogue
from pipeline.cli.status import _age
from pipeline.db import transaction
from pipeline.health import problems
from pipeline.health.recent import RECENT_OFFSETS_MAX
from pipeline.health.status import read_status
from pipeline.log.search import first_since
from pipeline.partitions import Partition
from pipeline.projectors.orders import orders
from tests.commands import Commands, InProcess, wait
from tests.given import TOPIC, event, order_event

ALL = catalogue.load().models


def seen(given):
    return read_status(given.engine, catalogue.load())


def partition_of(given):
    [partition] = seen(given).partitions
    return partition


def offsets(given, setting):
    given.execute(f"UPDATE pipeline.consumer_offsets SET {setting}")


@pytest.fixture
def log(given):
    """Ten orders in one partition, read to the end; Kafka's end was recorded just now."""
    given([order_event("NEW", at=n, order=str(n)) for n in range(10)])
    offsets(given, "high_watermark = 10, watermarks_at = now()")
    return given


# ----------------------------------------------------------------------------------- partitions


@pytest.mark.both_postgres
def test_a_partition_that_is_read_to_its_end_is_ok(log):
    partition = partition_of(log)

    assert (partition.topic, partition.partition, partition.state) == (TOPIC, 0, "OK")
    assert (partition.next_offset, partition.end, partition.lag, partition.lag_s) == (
        10,
        10,
        0,
        0.0,
    )
    assert partition.rate == pytest.approx(10 / 60)
    assert partition.owner is not None
    assert partition.owner.group == "tests"
    assert seen(log).ok


@pytest.mark.parametrize(
    ("setting", "state", "is_wrong"),
    [
        ("high_watermark = 15", "OK", False),
        # Kafka paused, the worker dead or halted, its disk full: nothing is recorded any more.
        ("watermarks_at = now() - interval '31 s'", "UNKNOWN", True),
        ("watermarks_at = NULL, high_watermark = NULL", "UNKNOWN", True),
        (
            "high_watermark = 15, committed_at = now() - interval '61 s', "
            "claimed_at = now() - interval '61 s'",
            "STALL",
            True,
        ),
        ("owner_member = NULL", "STOP", True),
        (
            "watermarks_at = now() - interval '61 s', committed_at = now() - interval '61 s', "
            "claimed_at = now() - interval '61 s'",
            "UNKNOWN",
            True,
        ),
        ("problem = 'records are gone', problem_fix = 'accept it'", "ERR", True),
    ],
    ids=[
        *("shortly behind", "old facts", "no facts", "not moving", "no reader", "silent reader"),
        "halted",
    ],
)
def test_the_state_of_a_partition_is_a_state_of_burrow(log, setting, state, is_wrong):
    offsets(log, setting)

    found = seen(log)

    assert found.partitions[0].state == state
    assert found.ok is not is_wrong
    assert [problem.subject for problem in found.problems if problem.subject == f"{TOPIC}:0"] == (
        [] if state == "OK" else [f"{TOPIC}:0"]
    )


def test_a_partition_that_moves_but_lags_for_long_is_a_warning(given):
    given([order_event("NEW", at=1)])
    offsets(given, "high_watermark = 900, watermarks_at = now()")
    _age_log(given, "2 minutes")

    partition = partition_of(given)

    assert (partition.state, partition.lag) == ("WARN", 899)
    assert 119 < partition.lag_s < 140


def _age_log(given, age):
    """Make the log's records older, which only a superuser without triggers can."""
    given.execute(
        "SET LOCAL session_replication_role = replica; "
        f"UPDATE pipeline.events SET ingested_at = ingested_at - interval '{age}'"
    )


def test_a_halted_partition_shows_its_reason_and_its_fix(log):
    offsets(log, "problem = 'records are gone', problem_fix = 'accept it'")

    [problem] = [problem for problem in seen(log).problems if problem.severity == "error"]

    assert (problem.subject, problem.what, problem.fix) == (
        f"{TOPIC}:0",
        "halted: records are gone",
        "accept it",
    )


def test_a_halted_partition_shows_its_reason_and_how_long_kafka_keeps_its_records(log):
    offsets(log, "high_watermark = 15, retention_ms = 3600000, owner_member = NULL")
    offsets(log, "problem = 'records are gone', problem_fix = 'accept it'")

    fixes = {problem.fix for problem in seen(log).problems if problem.subject == f"{TOPIC}:0"}

    assert fixes == {"accept it", problems.RETENTION_ENDS.fix}


def test_an_old_measurement_is_not_shown_as_current(log, pipeline):
    offsets(log, "watermarks_at = now() - interval '45 s'")

    result = pipeline(Commands(database_url=log.database.dsn), "status")

    assert result.code == 1
    assert "lag and rate unknown" in result.out.splitlines()[0]
    assert "records/s" not in result.out
    assert re.search(r"(4[5-9]|[5-9]\d) s ago", result.out)
    assert "its state is unknown" in result.out
    partition = partition_of(log)
    assert (partition.lag, partition.lag_s, partition.rate, seen(log).lag, seen(log).rate) == (
        None,
    ) * 5


def test_a_log_that_never_read_anything_is_not_ok(given):
    found = seen(given)

    assert (found.ok, found.lag, found.rate) == (False, None, None)
    assert [problem.subject for problem in found.problems if problem.severity == "error"] == ["log"]


def test_lag_is_unknown_and_not_zero_before_kafka_was_seen(given):
    given([order_event("NEW", at=1)])
    offsets(given, "high_watermark = NULL, watermarks_at = NULL")

    partition = partition_of(given)

    assert (partition.end, partition.lag) == (None, None)


# ----------------------------------------------------------------------------------- throughput


@pytest.mark.parametrize("seed", range(5))
def test_the_first_offset_since_a_moment_is_found_whatever_the_log_looks_like(given, seed):
    print(f"seed {seed}")
    chance = random.Random(seed)
    for number in range(3):
        for _ in range(chance.randrange(4)):
            records = [order_event("NEW", at=n) for n in range(chance.randrange(1, 6))]
            given.log.append(records, partition=number, gap=chance.randrange(3))
    _spread_times(given)
    moments = [row.ingested_at for row in given.query("SELECT ingested_at FROM pipeline.events")]
    chosen = chance.sample(moments, min(5, len(moments)))

    with transaction(given.engine) as db:
        found = first_since(db, chosen)

    for partition, ends in _ends(given).items():
        for moment in chosen:
            rows = given.query(
                'SELECT min("offset") AS first FROM pipeline.events '
                'WHERE "partition" = :number AND ingested_at >= :moment',
                number=partition.number,
                moment=moment,
            )
            # Between two records any offset is as good.
            expected = ends if rows[0].first is None else rows[0].first
            below = given.scalar(
                'SELECT coalesce(max("offset"), -1) FROM pipeline.events '
                'WHERE "partition" = :number AND "offset" < :first',
                number=partition.number,
                first=expected,
            )
            assert below < found[partition, moment] <= expected


def _spread_times(given):
    """A second from record to record of a partition, as if they had come slowly."""
    given.execute(
        "SET LOCAL session_replication_role = replica; "
        "UPDATE pipeline.events SET ingested_at = '2026-01-01'::timestamptz + \"offset\" * "
        "interval '1 s' + \"partition\" * interval '0.3 s'"
    )


def _ends(given):
    rows = given.query('SELECT topic, "partition", next_offset FROM pipeline.consumer_offsets')
    return {Partition(row.topic, row.partition): row.next_offset for row in rows}


def test_the_rate_counts_the_last_minute_only(log):
    _age_log(log, "90 seconds")
    log([order_event("NEW", at=n, order=f"later {n}") for n in range(30)])

    assert seen(log).rate == pytest.approx(30 / 60)


# ----------------------------------------------------------------------------------- read models


def model(given, name="orders"):
    return next(projector for projector in seen(given).projectors if projector.projector == name)


@pytest.mark.both_postgres
def test_a_read_model_is_never_run_then_catching_up_then_live(log):
    states = [model(log).state]
    log.project(orders)
    _worker(log, 1, lives_for="25 s")
    states.append(model(log).state)
    _age_log(log, "20 seconds")
    log([order_event("NEW", at=1, order="one more")])
    states.append(model(log).state)
    _age_log(log, "20 seconds")
    states.append(model(log).state)

    assert states == ["never run", "live", "live", "catching up"]
    assert model(log).lag == 1
    assert 19 < model(log).lag_s < 40


def test_broken_stale_and_interrupted_read_models_are_named_with_their_fix(log):
    log.project(*ALL)
    for change in (
        "state = 'broken', problem = 'too many' WHERE projector = 'orders'",
        "fingerprint = 'older' WHERE projector = 'users'",
    ):
        log.execute(f"UPDATE pipeline.projectors SET {change}")
    log.execute("INSERT INTO pipeline.projectors (projector) VALUES ('accounts@rebuild'), ('gone')")

    found = seen(log)

    states = {projector.projector: projector.state for projector in found.projectors}
    assert (states["orders"], states["users"], states["accounts"], states["gone"]) == (
        *("broken", "stale", "rebuilding", "not in this program"),
    )
    assert "accounts@rebuild" not in states
    fixes = {problem.subject: (problem.severity, problem.fix) for problem in found.problems}
    assert fixes["orders"] == ("error", problems.BROKEN.fix.format(subject="orders"))
    assert fixes["users"] == ("warning", problems.STALE.fix.format(subject="users"))
    assert not found.ok


def _worker(given, number, *, lives_for="10 s", projectors=("orders", "users")):
    given.execute(
        "INSERT INTO pipeline.projection_workers (worker, host, pid, projectors, since, expires_at)"
        " VALUES (gen_random_uuid(), :host, :number, :projectors,"
        " now() + :number * interval '1 ms', now() + CAST(:lives_for AS interval))",
        host=f"host-{number}",
        number=number,
        lives_for=lives_for,
        projectors=list(projectors),
    )


def test_active_workers_are_shown_with_what_they_project(log):
    for partition in range(1, 4):
        log([order_event("NEW", at=1, order=f"order {partition}")], partition=partition)
    _worker(log, 1)
    _worker(log, 2, lives_for="-1 s")
    _worker(log, 3)

    workers = seen(log).workers

    shown = [
        (worker.host, worker.pid, [partition.number for partition in worker.partitions])
        for worker in workers
    ]
    assert shown == [("host-1", 1, [0, 2]), ("host-3", 3, [1, 3])]


def test_read_models_that_no_process_projects_are_named(log):
    log.project(orders)
    _age_log(log, "20 seconds")
    log([order_event("NEW", at=1, order="one more")])
    _age_log(log, "20 seconds")
    [unattended] = [problem for problem in seen(log).problems if problem.subject == "orders"]
    _worker(log, 1)
    [attended] = [problem for problem in seen(log).problems if problem.subject == "orders"]

    assert model(log).state == "catching up"
    assert (unattended.severity, attended.severity) == ("error", "warning")
    assert "no process projects it" in unattended.what
    assert "its lag is 1 record" in unattended.what
    assert unattended.fix == "start `pipeline run` or `pipeline project`"
    assert attended.fix.startswith("wait")


def test_a_read_model_without_a_worker_is_an_error_at_once(log):
    """Somebody projects, but a program without this read model."""
    log.project(*ALL)
    log([order_event("NEW", at=1, order="one more")])
    _worker(log, 1)

    found = seen(log)

    wrong = {problem.subject for problem in found.problems if problem.severity == "error"}
    assert wrong == {model.name for model in ALL} - {"orders", "users"}
    assert not found.ok


def test_a_read_model_without_a_process_and_without_lag_is_a_warning(log):
    log.project(*ALL)

    found = seen(log)

    assert {projector.state for projector in found.projectors} == {"unattended"}
    assert {problem.severity for problem in found.problems} == {"warning"}
    assert found.ok


def test_a_stalled_projection_is_reported(log):
    """Its worker lives and waits: for a lock, for a disk."""
    log.project(orders)
    log.execute("UPDATE pipeline.projection_checkpoints SET moved_at = now() - interval '61 s'")
    log([order_event("NEW", at=1, order="one more")])
    _worker(log, -90_000)
    young = model(log).state
    _age_log(log, "61 seconds")

    found = seen(log)

    assert (young, model(log).state) == ("live", "stalled")
    [problem] = [problem for problem in found.problems if problem.subject == "orders"]
    assert problem.severity == "error"
    assert "has not moved since" in problem.what
    assert "a lock, a full disk" in problem.fix


def test_a_projection_that_has_just_started_is_given_time(log):
    log.project(orders)
    log.execute("UPDATE pipeline.projection_checkpoints SET moved_at = now() - interval '1 day'")
    log([order_event("NEW", at=1, order="one more")])
    _age_log(log, "1 day")
    _worker(log, 1)

    assert model(log).state == "catching up"


def test_a_clock_that_was_set_back_does_not_make_old_records_current(log):
    """Times in the future say nothing about now: neither of a reader nor of a projection."""
    offsets(log, "watermarks_at = now() + interval '1 hour'")
    log.project(*ALL)
    _worker(log, 1, lives_for="1 hour")

    found = seen(log)

    assert partition_of(log).state == "UNKNOWN"
    assert not found.ok
    assert any(
        "in the future by the clock of this database" in problem.what for problem in found.problems
    )
    assert found.workers == []
    assert model(log).state == "unattended"


def test_dead_letters_are_counted_and_are_a_warning(log):
    log([order_event("NEW", at=1, order="bad", cash_amount="12,5")]).project(orders)

    found = seen(log)

    assert model(log).dead_letters == 1
    assert [
        (problem.severity, problem.fix) for problem in found.problems if "dead" in problem.what
    ] == [("warning", problems.DEAD_LETTERS.fix.format(subject="orders"))]
    assert found.ok


# ----------------------------------------------------------------------------------------- of late


def test_repeats_bad_records_and_types_without_a_read_model_are_counted(given):
    known = order_event("NEW", at=1, name="known")
    given([known, known, event("NEW.THING", {"id": 1}), b"{", None, b"\xff"])

    recent = seen(given).recent

    assert (recent.records, recent.repeats) == (6, 1)
    assert sum(recent.bad[TOPIC].values()) == 3
    assert recent.bad[TOPIC]["not JSON"] == 1
    assert recent.unknown_types == {"NEW.THING": 1}


def test_records_older_than_an_hour_are_not_counted(given):
    given([b"{"])
    _age_log(given, "2 hours")

    assert seen(given).recent.records == 0


def test_only_the_newest_records_are_examined_whatever_the_length_of_the_log(given):
    given([order_event("NEW", at=n, order=str(n)) for n in range(20)])
    offsets(given, f"next_offset = {RECENT_OFFSETS_MAX + 15}")

    assert seen(given).recent.records == 5


def test_a_status_reads_no_more_rows_than_it_needs(given):
    for number in range(20):
        given([order_event("NEW", at=n, order=f"{number} {n}") for n in range(1000)])
    _age_log(given, "3 hours")
    given.project(*ALL)
    # With statistics the planner thinks differently than without.
    given.execute("ANALYZE pipeline.events")
    # A session counts what its earlier transactions fetched, too, until that is flushed.
    given.engine.dispose()
    fetched = []
    listen(given.engine, "commit", lambda db: fetched.append(db.execute(FETCHED).scalar()))

    seen(given)

    # A few dozen index searches; a scan of the log would have fetched 20,000 rows.
    [rows] = fetched
    assert 0 < rows < 500


FETCHED = text("""
SELECT sum(coalesce(idx_tup_fetch, 0) + seq_tup_read) FROM pg_stat_xact_user_tables
WHERE schemaname = 'pipeline_segments'
""")


# -------------------------------------------------------------------------------------- the command


@pytest.fixture
def pipeline(monkeypatch, capsys):
    return InProcess(monkeypatch, capsys)


def test_the_command_prints_tables(log, pipeline):
    log.project(*ALL)
    log([b"{"])
    _worker(log, 1, projectors=[model.name for model in ALL])

    result = pipeline(Commands(database_url=log.database.dsn), "status")

    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[0].startswith("Log: 11 offsets, caught up, 0.2 records/s over the last minute.")
    assert any(line.split()[:4] == [f"{TOPIC}:0", "OK", "11", "11"] for line in lines)
    assert any(line.split()[:3] == ["orders", "live", "1"] for line in lines)
    assert any("not JSON" in line for line in lines)


def test_status_ends_with_1_when_an_operator_must_act(log, pipeline):
    offsets(log, "problem = 'records are gone', problem_fix = 'accept it'")

    result = pipeline(Commands(database_url=log.database.dsn), "status", "--json")

    assert result.code == 1
    assert result.json["ok"] is False
    assert result.json["partitions"][0]["state"] == "ERR"


def test_partitions_with_the_same_problem_share_its_lines(given, pipeline):
    for number in range(3):
        given([order_event("NEW", at=1)], partition=number)
    offsets(given, "owner_member = NULL, watermarks_at = now()")

    result = pipeline(Commands(database_url=given.database.dsn), "status")

    assert f"✗ {TOPIC}:0, {TOPIC}:1, {TOPIC}:2: no process reads it" in result.out


def test_the_text_of_a_problem_cannot_control_the_terminal(log, pipeline):
    log([event("EVIL\x1b[2J", {"id": 1})])

    result = pipeline(Commands(database_url=log.database.dsn), "status")

    assert "EVIL\\x1b[2J" in result.out
    assert "\x1b" not in result.out


def test_watching_repeats_until_it_is_stopped(log):
    import signal

    commands = Commands(database_url=log.database.dsn)
    with commands.started("status", "--watch", "--every", "0.2", "--json") as watching:
        wait(lambda: len(watching.out) >= 2)
        log([order_event("NEW", at=1, order="one more")])
        watching.until('"offsets":11')
        watching.send(signal.SIGINT)
        code = watching.wait()

    assert code == 0
    assert watching.err == []


@pytest.mark.parametrize("seconds", [float("inf"), float("-inf"), 1e15, -1e15])
def test_an_age_that_python_cannot_hold_is_shown(seconds):
    assert str(_age(seconds)).endswith((" d", " s"))
