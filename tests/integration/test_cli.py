"""The commands that move and mend, as people run them: exit codes, stdout against stderr."""

import json
import re
import secrets
import shlex
import signal
import subprocess
import sys

import pytest
from confluent_kafka import Consumer, TopicPartition

from pipeline import catalogue
from pipeline.db import locks
from pipeline.errors import ExitCode
from pipeline.sandbox.servers.postgres import free_port
from pipeline.sandbox.simulator import Chaos, Simulation
from pipeline.sandbox.simulator.producer import Producer
from tests.commands import SCRIPT, Commands, InProcess, on_mock, wait
from tests.given import order_event, sample_events

TOPIC = "Notifications"
CANARY = "c4n4ry"


@pytest.fixture
def pipeline(monkeypatch, capsys):
    return InProcess(monkeypatch, capsys)


@pytest.fixture
def broker(mock_broker):
    mock_broker.create_topic(TOPIC, 2)
    return mock_broker


@pytest.fixture
def commands(database, broker):
    return on_mock(database, broker)


def produce(broker, events=300, **simulation):
    with Producer({"bootstrap.servers": broker.bootstrap_servers}) as producer:
        records = Simulation(7, events=events, topic=TOPIC, partitions=2, **simulation)
        return producer.produce(records)


def count(database, what="pipeline.events"):
    with database.connect() as db:
        return db.execute(f"SELECT count(*) FROM {what}").fetchone()[0]


# ------------------------------------------------------------------------------- the main job


def test_run_until_end_fills_log_and_read_models_and_prints_nothing_on_stdout(
    commands, broker, database
):
    sent = produce(broker, 600)

    result = commands.run("run", "--until-end")

    assert (result.code, result.out) == (0, "")
    assert count(database) == sent
    with database.connect() as db:
        lag = db.execute("SELECT sum(lag_events) FROM pipeline.projection_lag").fetchone()[0]
    assert lag == 0
    assert count(database, "upvest.orders") > 0
    first, last = result.log[0], result.log[-1]
    assert first["event"] == "started"
    assert first.items() >= {"command": "run", "group": "pipeline", "topics": [TOPIC]}.items()
    assert {"version", "librdkafka", "libpq", "host", "pid", "database"} <= first.keys()
    assert last["event"] == "stopped"
    assert last["reason"] == "reached the end"


def test_the_two_halves_do_the_same(commands, broker, database):
    sent = produce(broker)

    halves = [commands.run("ingest", "--until-end"), commands.run("project", "--until-end")]

    assert [half.code for half in halves] == [0, 0]
    assert count(database) == sent
    assert count(database, "upvest.users") > 0


def test_no_secret_reaches_the_log(commands, broker, database):
    with database.connect() as db:
        db.execute(f"CREATE ROLE {database.name} LOGIN SUPERUSER PASSWORD '{CANARY}'")
    host = database.dsn.rpartition("@")[2]
    secretive = commands.with_(
        database_url=f"postgresql://{database.name}:{CANARY}@{host}",
        kafka_options=f"client.id=mine,ssl.key.password={CANARY}",
        log_level="debug",
    )

    result = secretive.run("run", "--until-end")

    with database.connect() as db:
        db.execute(f"DROP ROLE {database.name}")
    assert result.code == 0, result.err
    assert CANARY not in result.err


@pytest.mark.parametrize("stopping", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_run_with_0_after_the_current_batch(commands, broker, database, stopping):
    sent = produce(broker)

    with commands.started("run") as run:
        run.until("partitions_claimed")
        run.send(stopping)
        code = run.wait()

    assert code == 0, "".join(run.err)
    assert f'"reason": "{stopping.name}"' in run.err[-1]
    with database.connect() as db:
        stored = db.execute("SELECT sum(next_offset) FROM pipeline.consumer_offsets").fetchone()[0]
        owned = db.execute("SELECT count(owner_pid) FROM pipeline.consumer_offsets").fetchone()[0]
    assert count(database) == stored <= sent
    assert owned == 0


_IN_HAND = (
    "pg_stat_activity WHERE datname = current_database() AND state = 'idle in transaction' "
    "AND query = 'NOTIFY pipeline_events'"
)


def test_the_second_signal_ends_at_once(commands, broker, database):
    produce(broker)
    hanging = commands.with_(enable_failpoints="1", failpoint="before_commit:sleep:300")

    with hanging.started("ingest") as ingest:
        wait(lambda: count(database, _IN_HAND))
        ingest.send(signal.SIGTERM)
        ingest.until("stop_requested")
        ingest.send(signal.SIGTERM)
        code = ingest.wait()

    assert code == 128 + signal.SIGTERM, "".join(ingest.err)
    assert count(database) == 0


@pytest.mark.faults
@pytest.mark.parametrize(
    ("failure", "event"),
    [
        ("after_projection:raise:XX000", "stopped"),
        ("after_copy:raise:XX000", "stopped"),
        ("after_projection:sleep:99999999999999999999", "crashed"),
    ],
)
def test_when_one_half_of_run_breaks_both_end_and_its_error_decides(
    commands, broker, failure, event
):
    produce(broker)
    breaking = commands.with_(enable_failpoints="1", failpoint=failure)

    result = breaking.run("run")

    assert result.code == 70, result.err
    assert result.log[-1]["event"] == event


def test_a_slow_stop_ends_with_0(commands, broker):
    slow = commands.with_(enable_failpoints="1", failpoint="on_sigterm:sleep:0.2")

    with slow.started("run") as run:
        run.until("partitions_claimed")
        run.send(signal.SIGTERM)

        assert run.wait() == 0


@pytest.mark.parametrize("command", ["run", "ingest", "project"])
def test_another_schema_is_refused_at_the_start(empty_database, broker, command):
    result = on_mock(empty_database, broker).run(command)

    assert (result.code, result.out) == (78, "")
    assert "run `pipeline migrate`" in result.log[-1]["reason"]


def test_a_missing_topic_ends_with_78_and_names_the_existing_topics(commands):
    result = commands.with_(topics="Nonsense").run("ingest", "--until-end")

    assert result.code == 78
    assert "no topic Nonsense" in result.log[-1]["reason"]
    assert TOPIC in result.log[-1]["reason"]


@pytest.mark.parametrize("command", ["run", "ingest", "project"])
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"batch_rows": "0"}, "PIPELINE_BATCH_ROWS (environment) must be a whole number"),
        ({"database_url": ""}, "PIPELINE_DATABASE_URL is missing"),
    ],
)
def test_several_workers_report_a_wrong_setting_once(commands, command, wrong, said):
    result = commands.with_(**wrong).run(command, "--workers", "3")

    assert result.code == 78
    assert result.err.count("\n") == 1
    assert said in result.err


@pytest.mark.parametrize("workers", ["0", "65", "two"])
def test_an_impossible_number_of_workers_is_wrong_usage(commands, workers):
    result = commands.run("run", "--workers", workers)

    assert (result.code, result.out) == (2, "")
    assert "--workers" in result.err


def test_several_workers_read_their_settings_from_the_named_file(commands, broker, tmp_path):
    produce(broker)
    settings = tmp_path / "settings.toml"
    settings.write_text(f'topics = ["{TOPIC}"]\n')

    result = commands.with_(topics="").run(
        "--config", str(settings), "run", "--until-end", "--workers", "2"
    )

    assert result.code == 0, result.err
    assert {line["worker"] for line in result.log if line["event"] == "started"} == {1, 2}
    events = [line["event"] for line in result.log if "worker" not in line]
    assert events == ["workers_started", "workers_ended"]


@pytest.mark.faults
@pytest.mark.parametrize("command", [["run"], ["project"], ["run", "--workers", "2"]])
def test_stale_read_models_are_rebuilt_first(commands, broker, given, command):
    produce(broker)
    commands.run("run", "--until-end")
    given.execute("UPDATE pipeline.projectors SET fingerprint = 'older' WHERE projector = 'users'")
    given.execute("UPDATE upvest_personal.users SET status = 'CORRUPTED'")

    result = commands.run(*command, "--until-end")

    assert result.code == 0, result.err
    assert [line["projector"] for line in result.log if line["event"] == "read_model_rebuilt"] == [
        "users"
    ]
    assert given.scalar("SELECT count(*) FROM upvest.users WHERE status = 'CORRUPTED'") == 0


# -------------------------------------------------------------------------------------- the gaps


def test_a_gap_is_listed_accepted_and_then_skipped(commands, broker, pipeline):
    produce(broker, 400)
    commands.run("ingest", "--until-end")
    produce(broker, 400)
    broker.delete_records(TOPIC, 0, _end(broker, 0) - 5)

    refused = commands.run("run", "--until-end")
    listed = pipeline(commands, "gaps", "list", "--json")
    status = pipeline(commands, "status")
    accepted = pipeline(commands, "gaps", "accept", f"{TOPIC}:0", "--json")
    again = commands.run("run", "--until-end")

    assert refused.code == 65
    assert any(f"gaps accept {TOPIC}:0" in str(line) for line in refused.log)
    [gap] = listed.json
    assert (gap["topic"], gap["partition"], gap["accepted_at"]) == (TOPIC, 0, None)
    assert gap["end_offset"] == _end(broker, 0) - 5
    assert status.code == 1
    assert "halted" in status.out
    assert accepted.json == [
        {
            "topic": TOPIC,
            "partition": 0,
            "first_offset": gap["first_offset"],
            "end_offset": gap["end_offset"],
        }
    ]
    assert again.code == 0
    assert "accepted by" in pipeline(commands, "gaps", "list").out


def _end(broker, partition):
    consumer = Consumer({"bootstrap.servers": broker.bootstrap_servers, "group.id": "looks"})
    _low, high = consumer.get_watermark_offsets(TopicPartition(TOPIC, partition))
    consumer.close()
    return high


def test_accepting_without_a_gap_is_reported_and_an_unknown_partition_is_wrong_usage(
    commands, given, pipeline
):
    given([order_event("NEW", at=1)])

    nothing = pipeline(commands, "gaps", "accept", TOPIC)
    unknown = pipeline(commands, "gaps", "accept", f"{TOPIC}:7")

    assert (nothing.code, nothing.out) == (0, "")
    assert "no open gap" in nothing.err
    assert unknown.code == 2
    assert f"the log has no partition {TOPIC}:7; the log has partitions 0 of {TOPIC}" in _words(
        unknown.err
    )


@pytest.mark.parametrize("arguments", [["gaps", "accept"], ["rewind", "--to", "earliest"]])
def test_a_partition_in_brackets_is_refused_with_the_way_to_write_it(
    commands, given, pipeline, arguments
):
    for partition in (0, 1, 2, 4):
        given([order_event("NEW", at=1, order=f"order {partition}")], partition=partition)

    refused = pipeline(commands, *arguments, f"{TOPIC}[1]")

    assert refused.code == 2
    assert f"write it as {TOPIC}:1; the log has partitions 0-2, 4 of {TOPIC}" in _words(refused.err)


def _words(text):
    """Without the frame and the line breaks of a usage error."""
    return " ".join(text.replace("│", " ").split())


# ------------------------------------------------------------------------------------ read models


def test_rebuild_counts_differing_rows_and_check_ends_with_1(commands, given, pipeline):
    given([order_event("NEW", at=n, order=str(n)) for n in range(10)])
    pipeline(commands, "project", "--until-end")
    given.execute("DELETE FROM upvest.orders WHERE _offset < 3")

    found = pipeline(commands, "rebuild", "orders", "--check", "--json")
    repaired = pipeline(commands, "rebuild", "orders", "--json")
    clean = pipeline(commands, "rebuild", "orders", "--check")

    assert found.code == 1
    assert [(model["missing"], model["differing"]) for model in found.json] == [(3, 3)]
    assert (repaired.code, repaired.json[0]["missing"]) == (0, 3)
    assert clean.code == 0
    assert re.search(r"orders +10 +0 +0 +0 +0", clean.out)
    assert "0 rows differ." in clean.err


def test_a_stopped_rebuild_ends_with_0_and_leaves_the_other_read_models(commands, given, pipeline):
    given([order_event("NEW", at=1)])
    pipeline(commands, "project", "--until-end")
    slow = commands.with_(enable_failpoints="1", failpoint="before_swap:sleep:3")

    with slow.started("rebuild", "orders", "users", "--jobs", "1", "--json") as rebuild:
        wait(lambda: count(given.database, _SWAPPING))
        rebuild.send(signal.SIGTERM)
        code = rebuild.wait()

    assert code == 0, "".join(rebuild.err)
    assert [model["projector"] for model in json.loads(rebuild.out[-1])] == ["orders"]
    assert "stopped before users" in rebuild.err[-1]


_SWAPPING = (
    "pg_locks WHERE relation = 'upvest.orders'::regclass AND mode = 'ShareRowExclusiveLock' "
    "AND granted"
)


def test_all_read_models_are_rebuilt_several_at_once(commands, given, pipeline):
    given(sample_events())
    pipeline(commands, "project", "--until-end")
    given.execute("DELETE FROM upvest.orders")
    given.execute("DELETE FROM upvest.execution_taxes")
    gone = {"orders", "executions"}

    repaired = pipeline(commands, "rebuild", "--all", "--jobs", "3", "--json")
    clean = pipeline(commands, "rebuild", "--all", "--check", "-j", "5", "--json")

    assert repaired.code == 0
    assert [model["projector"] for model in repaired.json] == [
        model.name for model in catalogue.load().models
    ]
    assert {model["projector"] for model in repaired.json if model["differing"]} == gone
    assert clean.code == 0
    assert {model["differing"] for model in clean.json} == {0}


def test_the_exit_code_is_that_of_a_failed_rebuild_among_several(commands, given, pipeline):
    given(sample_events())
    pipeline(commands, "project", "--until-end")

    with locks.held(given.engine, "rebuild orders"):
        result = pipeline(commands, "rebuild", "orders", "users", "--jobs", "2", "--json")

    assert result.code == ExitCode.FENCED
    assert "orders: another rebuild" in result.err
    assert {model["projector"] for model in result.json} <= {"users"}
    assert pipeline(commands, "rebuild", "orders", "users", "--check").code == 0


def test_rebuild_in_place_refills(commands, given, pipeline):
    given([order_event("NEW", at=n, order=str(n)) for n in range(10)])
    pipeline(commands, "project", "--until-end")
    given.execute("UPDATE upvest.orders SET status = 'CORRUPTED'")

    result = pipeline(commands, "rebuild", "orders", "--in-place")

    assert (result.code, result.out) == (0, "")
    assert "orders: refilled." in result.err
    assert {row.status for row in given.rows("orders")} == {"NEW"}


def test_dead_letters_are_listed_shown_and_tried_again(commands, given, pipeline):
    given([order_event("NEW", at=1), order_event("NEW", at=2, order="bad", cash_amount="12,5")])
    pipeline(commands, "project", "--until-end")

    listed = pipeline(commands, "dead-letters", "list", "--json")
    table = pipeline(commands, "dead-letters", "list", "orders")
    shown = pipeline(commands, "dead-letters", "show", f"{TOPIC}:0:1")
    content = pipeline(commands, "dead-letters", "show", f"{TOPIC}:0:1", "--payload", "--json")
    absent = pipeline(commands, "dead-letters", "show", f"{TOPIC}:0:0")
    refused = pipeline(commands, "dead-letters", "retry", "--json")

    [letter] = listed.json
    assert (
        letter.items()
        >= {
            "projector": "orders",
            "topic": TOPIC,
            "partition": 0,
            "offset": 1,
            "event_type": "ORDER.NEW",
            "sqlstate": "22P02",
            "column": "cash_amount",
            "attempts": 1,
        }.items()
    )
    assert f"{TOPIC}:0:1" in table.out
    assert "not of the column's type (22P02)" in table.out
    assert "column cash_amount" in shown.out
    assert "12,5" not in shown.out
    assert content.json["event"]["payload"]["object"]["cash_amount"] == "12,5"
    assert absent.code == 1
    assert (refused.code, refused.json) == (1, {"applied": 0, "rejected": 1})


# --------------------------------------------------------------------------------------- setting up


def test_migrate_reports_its_changes_and_may_be_repeated(empty_database, broker, pipeline):
    commands = on_mock(empty_database, broker)

    first = pipeline(commands, "migrate", "--json")
    second = pipeline(commands, "migrate", "--json")
    third = pipeline(commands, "migrate")

    assert first.json["applied"][:2] == ["0001", "0002"]
    assert second.json == {"applied": [], "steps": [], "rights": [], "role_prefix": None}
    assert (third.code, third.out) == (0, "")
    assert "the schema is current" in third.err


def test_a_plan_changes_nothing_and_a_dba_may_run_its_sql(empty_database, broker, pipeline):
    commands = on_mock(empty_database, broker)

    plan = pipeline(commands, "migrate", "--plan")
    with empty_database.connect() as db:
        nothing = db.execute("SELECT to_regnamespace('pipeline')").fetchone()
        for _ in range(2):
            printed = pipeline(commands, "migrate", "--sql")
            assert printed.code == 1, printed.err
            db.execute(printed.out.encode())
    left = pipeline(commands, "migrate", "--json")
    again = pipeline(commands, "migrate", "--plan")

    assert (plan.code, nothing) == (1, (None,))
    assert "Migrations: 0001, 0002" in plan.out
    assert left.json["applied"] == []
    assert {step["what"].partition(":")[0] for step in left.json["steps"]} == {
        "record its definition",
        "record it",
    }
    assert (again.code, again.out) == (0, "")


@pytest.mark.parametrize(
    "command",
    [
        *(["migrate"], ["status"], ["events"], ["rebuild", "--all"], ["gaps", "list"]),
        *(["dead-letters", "list"], ["dead-letters", "retry"], ["check"]),
    ],
    ids=" ".join,
)
def test_a_one_shot_command_ends_with_69_when_the_database_is_unavailable(
    broker, pipeline, command
):
    away = Commands(
        database_url=f"postgresql://127.0.0.1:{free_port()}/postgres",
        kafka_bootstrap_servers=broker.bootstrap_servers,
        kafka_security_protocol="PLAINTEXT",
        topics=TOPIC,
    )

    result = pipeline(away, *command)

    assert result.code == 69
    assert "refuses connections" in result.err + result.out
    assert "Traceback" not in result.err


def test_ctrl_c_ends_a_one_shot_command_with_130(empty_database, broker):
    slow = on_mock(empty_database, broker).with_(
        enable_failpoints="1", failpoint="mid_migration:sleep:60"
    )

    with slow.started("migrate") as migrate:
        wait(lambda: count(empty_database, _MIGRATING))
        migrate.send(signal.SIGINT)
        code = migrate.wait()

    assert code == 130
    assert "Traceback" not in "".join(migrate.err)


_MIGRATING = (
    "pg_stat_activity WHERE datname = current_database() AND state = 'idle in transaction' "
    "AND application_name = 'pipeline migrate' AND backend_xid IS NOT NULL "
    "AND state_change < clock_timestamp() - interval '1 second'"
)


@pytest.mark.parametrize("command", ["run", "project"])
def test_run_waits_for_an_unavailable_database_and_can_be_stopped(broker, command):
    away = Commands(
        database_url=f"postgresql://127.0.0.1:{free_port()}/postgres",
        kafka_bootstrap_servers=broker.bootstrap_servers,
        kafka_security_protocol="PLAINTEXT",
        topics=TOPIC,
    )

    with away.started(command) as waiting:
        waiting.until("server_unavailable")
        waiting.send(signal.SIGTERM)
        code = waiting.wait()

    assert code == 0, "".join(waiting.err)
    assert '"reason": "SIGTERM"' in waiting.err[-1]


def test_an_unexpected_error_ends_with_70_and_is_logged(empty_database, broker):
    longer_than_a_clock_can_tell = "mid_migration:sleep:99999999999999999999"
    broken = on_mock(empty_database, broker).with_(
        enable_failpoints="1", failpoint=longer_than_a_clock_can_tell
    )

    result = broken.run("migrate")

    assert (result.code, result.out) == (70, "")
    [line] = result.log
    assert (line["event"], line["error.type"]) == ("crashed", "OverflowError")


# --------------------------------------------------------------------------------------- trying out


def test_simulate_produces_the_number_of_events_that_it_reports(
    commands, broker, database, pipeline
):
    result = pipeline(commands, "simulate", "--events", "200", "--chaos", "--json", "--seed", "x")
    commands.run("ingest", "--until-end")

    assert result.code == 0
    assert result.json["topics"] == [TOPIC]
    assert result.json["produced"] == count(database) > 200
    expected = Simulation("x", events=200, topic=TOPIC, partitions=2, chaos=Chaos())
    assert len(list(expected)) == result.json["produced"]
    assert result.json["chaos"] == dict(sorted(expected.report.counts.items()))


def test_simulate_stops_on_a_signal_with_0(commands):
    with commands.started("simulate", "--rate", "50", "--json") as simulate:
        simulate.send(signal.SIGCONT)  # harmless; it is started
        _wait_for_records(commands)
        simulate.send(signal.SIGTERM)
        code = simulate.wait()

    assert code == 0, "".join(simulate.err)
    assert '"produced":' in simulate.out[-1]


def _wait_for_records(commands):
    servers = commands.environment["PIPELINE_KAFKA_BOOTSTRAP_SERVERS"]
    consumer = Consumer({"bootstrap.servers": servers, "group.id": "looks"})
    wait(
        lambda: any(
            consumer.get_watermark_offsets(TopicPartition(TOPIC, number))[1] for number in (0, 1)
        )
    )
    consumer.close()


def test_simulate_refuses_a_topic_that_does_not_exist(commands, pipeline):
    result = pipeline(commands, "simulate", "--events", "10", "--topic", "Nonsense")

    assert (result.code, result.out) == (78, "")
    assert "no topic Nonsense: it does not exist" in result.err


def test_simulate_creates_topics_only_with_the_option(kafka, pipeline):
    name = f"made-{secrets.token_hex(4)}"
    commands = Commands(
        kafka_bootstrap_servers=kafka.bootstrap_servers, kafka_security_protocol="PLAINTEXT"
    )
    wanted = ["simulate", "--events", "50", "--topic", name, "--partitions", "3", "--json"]

    refused = pipeline(commands, *wanted)
    made = pipeline(commands, *wanted, "--create-topics")

    assert refused.code == 78
    assert (made.code, made.json["produced"]) == (0, 50)
    kafka.delete_topic(name)


# ------------------------------------------------------------------------------------------ pipes


def test_a_reader_that_closes_the_pipe_early_is_no_error(commands, given):
    given([order_event("NEW", at=n, order=str(n)) for n in range(40)])

    done = subprocess.run(
        ["bash", "-c", f"{SCRIPT} events --json -n 40 | head -n 1"],
        env=commands.environment,
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stdout.count("\n") == 1
    assert "Traceback" not in done.stderr


def test_python_dash_m_is_the_same_command():
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "--version"], capture_output=True, text=True, check=True
    )

    assert done.stdout.startswith("pipeline ")


# --------------------------------------------------------------------------------------- examples

_ENDLESS = {
    *("pipeline run", "pipeline run --workers 4", "pipeline ingest", "pipeline project"),
    "pipeline status --watch",
    *("pipeline events --follow --json", "pipeline simulate --rate 200 --chaos"),
    "pipeline demo",  # has tests of its own
}


def _examples(pipeline):
    """Every example of every help."""
    root = pipeline(Commands(), "--help").out.partition("Commands:")[2]
    for command in re.findall(r"^  ([a-z-]+) {2,}\S", root, re.MULTILINE):
        text = pipeline(Commands(), command, "--help").out
        below = re.findall(r"^  ([a-z]+) {2,}\S", text.partition("Commands:")[2], re.MULTILINE)
        for rest in [[subcommand] for subcommand in below] or [[]]:
            text = pipeline(Commands(), command, *rest, "--help").out
            for line in re.findall(r"^ +\$ (pipeline .*)$", text, re.MULTILINE):
                yield line.partition("#")[0].partition("|")[0].strip()


@pytest.mark.faults
def test_every_example_in_the_help_works(kafka, topic, given, pipeline):
    for partition in range(4):
        given([order_event("NEW", at=1, cash_amount="12,5")], partition=partition)
    commands = Commands(
        database_url=given.database.dsn,
        kafka_bootstrap_servers=kafka.bootstrap_servers,
        kafka_security_protocol="PLAINTEXT",
        topics=topic(2),
    )

    examples = [line for line in _examples(pipeline) if line not in _ENDLESS]
    codes = {line: pipeline(commands, *shlex.split(line)[1:]).code for line in examples}

    assert len(examples) > 15
    # The log of this test is not of this Kafka, so there is nothing to be read again.
    of_kafka = {line for line in codes if line.startswith("pipeline rewind ")}
    assert {codes.pop(line) for line in of_kafka} == {65}
    assert set(codes.values()) <= {0, 1}, codes
    assert {line for line, code in codes.items() if code == 1} <= {
        "pipeline check",  # the log of this test is not of this Kafka
        "pipeline verify",
        "pipeline verify --only log --only kafka",
        "pipeline status",  # nobody reads
        "pipeline status --json",
        "pipeline dead-letters show Notifications:3:1204 --payload",
        "pipeline dead-letters retry orders",
    }
