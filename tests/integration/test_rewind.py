"""Rewind: what is missing comes in once, what is there is compared, read models come out right."""

import secrets
import threading

import pytest

from pipeline import catalogue
from pipeline.db import locks, open_engine
from pipeline.errors import ExitCode
from pipeline.kafka.metadata import Brokers
from pipeline.kafka.reports import ClientReports
from pipeline.log.compare import Comparison
from pipeline.partitions import NextOffset, OffsetRange, Partition
from pipeline.projection.loop import run_projection
from pipeline.projectors.orders import orders
from pipeline.rebuild.rebuild import check, rebuild
from pipeline.rewind import Step, execute, plan
from pipeline.sandbox.simulator import Chaos, Simulation
from tests.commands import Commands, InProcess
from tests.given import contents, full
from tests.integration.ingesting import (
    Ledger,
    ingest_until_end,
    is_faithful,
    logged,
    next_offsets,
    payloads,
    read_back,
    running,
    settings_for,
    until,
)
from tests.records import HOSTILE, deep_nesting

pytestmark = deep_nesting
PARTITIONS = 2


@pytest.fixture
def ledger(kafka):
    return Ledger(kafka.bootstrap_servers)


@pytest.fixture
def settings(database, kafka):
    def make(topic, **changes):
        return settings_for(database, kafka.bootstrap_servers, topic, **changes)

    return make


@pytest.fixture
def engine(database):
    made = open_engine(database.url, application="test")
    yield made
    made.dispose()


@pytest.fixture
def pipeline(monkeypatch, capsys, database, kafka):
    """``pipeline("rewind", …)``, in this process."""
    commands = Commands(
        database_url=database.dsn,
        kafka_bootstrap_servers=kafka.bootstrap_servers,
        kafka_security_protocol="PLAINTEXT",
    )
    in_process = InProcess(monkeypatch, capsys)
    return lambda *arguments: in_process(commands, *arguments)


def numbered(count, first=0):
    return [b'{"n": %d}' % (first + n) for n in range(count)]


def simulated(ledger, topic, events, seed=5):
    """A day at a broker with chaos, and everything hostile."""
    for record in Simulation(
        seed=seed, events=events, topic=topic, partitions=PARTITIONS, chaos=Chaos()
    ):
        ledger.send(
            topic, [record.value], partition=record.partition or 0, key=record.key,
            headers=record.headers,
        )  # fmt: skip
    ledger.send(topic, [value for value, *_ in HOSTILE.values()], partition=1, key=b"\x00\xff")
    return ledger.flush()


def tamper(database, *statements):
    """Do to the log what nobody may: as the superuser, past its triggers."""
    with database.connect() as db:
        db.execute("SET session_replication_role = replica")
        for statement in statements:
            db.execute(statement)


def first_offsets(database):
    with database.connect() as db:
        return dict(
            db.execute('SELECT "partition", first_offset FROM pipeline.consumer_offsets').fetchall()
        )


def differing(engine):
    return {model.name: check(engine, model).differing for model in catalogue.load().models}


# ------------------------------------------------------------------------------------ what it fills


@pytest.mark.both_postgres
def test_history_before_the_first_offset_is_added_and_read_models_include_it(
    topic, database, settings, ledger, engine, pipeline
):
    name = topic(PARTITIONS)
    simulated(ledger, name, 700)
    ingest_until_end(settings(name, start="latest"))
    assert logged(database, name) == {}
    for record in Simulation(seed=6, events=300, topic=name, partitions=PARTITIONS):
        ledger.send(name, [record.value], partition=record.partition or 0, key=record.key)
    ledger.flush()
    ingest_until_end(settings(name))
    run_projection(engine, catalogue.load().models, until_end=True)

    result = pipeline("rewind", name, "--to", "earliest", "--execute", "--json")

    assert result.code == 0, result.err
    assert sum(interval["filled"] for interval in result.json["done"]) > 700
    assert in_log_order(database, name) == ledger.records
    stored = payloads(database, name)
    assert [at for at, value in ledger.values.items() if not is_faithful(value, stored[at])] == []
    assert first_offsets(database) == {0: 0, 1: 0}
    run_projection(engine, catalogue.load().models, until_end=True)
    assert set(differing(engine).values()) == {0}
    afterwards = contents(engine, catalogue.load().models, machinery=False)
    for model in catalogue.load().models:
        with database.connect() as db:
            db.execute(f"TRUNCATE {full(model.name)} CASCADE")
    run_projection(engine, catalogue.load().models, until_end=True)
    assert contents(engine, catalogue.load().models, machinery=False) == afterwards


def in_log_order(database, name):
    """The log, without the promise that later offsets were written later."""
    with database.connect() as db:
        db.execute("SET session_replication_role = replica")
        db.execute("CREATE TABLE public.before AS SELECT * FROM pipeline.events")
        db.execute("UPDATE pipeline.events SET ingested_at = now()")
        found = logged(database, name)
        db.execute(
            "UPDATE pipeline.events e SET ingested_at = b.ingested_at FROM public.before b "
            'WHERE (e.topic, e."partition", e."offset") = (b.topic, b."partition", b."offset")'
        )
        db.execute("DROP TABLE public.before")
    return found


def test_a_hole_is_filled_and_nothing_else_changes(topic, database, settings, ledger, pipeline):
    name = topic(1)
    ledger.send(name, numbered(5000)).flush()
    ingest_until_end(settings(name))
    with database.connect() as db:
        untouched = (
            'SELECT "offset", xmin FROM pipeline.events WHERE "offset" NOT BETWEEN 10 AND 19'
        )
        before = db.execute(untouched).fetchall()
    tamper(database, 'DELETE FROM pipeline.events WHERE "offset" BETWEEN 10 AND 19')

    result = pipeline("rewind", f"{name}:0", "--to", "5", "--execute", "--json")

    [done] = result.json["done"]
    assert done.items() >= {"read": 4995, "same": 4985, "filled": 10, "changed": 0}.items()
    with database.connect() as db:
        assert db.execute(untouched).fetchall() == before
    assert in_log_order(database, name) == ledger.records
    assert next_offsets(database, name) == {0: 5000}


def test_records_of_aborted_transactions_stay_out(
    kafka, topic, database, settings, ledger, pipeline
):
    name = topic(1)
    sender = Ledger(kafka.bootstrap_servers, {"transactional.id": f"tx-{secrets.token_hex(4)}"})
    sender.producer.init_transactions()
    for number in range(6):
        sender.producer.begin_transaction()
        sender.send(name, numbered(10, first=10 * number))
        if number % 2:
            sender.forget()
            sender.producer.abort_transaction()
        else:
            sender.flush()
            sender.producer.commit_transaction()
    ingest_until_end(settings(name, start="latest"))

    result = pipeline("rewind", name, "--to", "earliest", "--execute", "--json")

    [done] = result.json["done"]
    assert (done["read"], done["filled"]) == (30, 30)
    assert in_log_order(database, name) == sender.records
    assert read_back(kafka.bootstrap_servers, name) == set(sender.records)


def test_filled_records_are_in_segments_of_their_own(topic, database, settings, ledger, pipeline):
    name = topic(1)
    ledger.send(name, numbered(2500)).flush()
    ingest_until_end(settings(name, start="latest"))
    with database.connect() as db:
        db.execute("DELETE FROM pipeline.segments WHERE first_offset < 2000")

    result = pipeline("rewind", name, "--to", "earliest", "--execute")

    assert result.code == 0, result.err
    assert set(in_log_order(database, name)) == set(ledger.records)


def test_a_rewind_during_live_traffic_loses_and_doubles_nothing(
    kafka, topic, database, settings, engine
):
    name = topic(PARTITIONS)
    ledger = simulated(Ledger(kafka.bootstrap_servers), name, 600)
    ingest_until_end(settings(name, start="latest"))
    stop = threading.Event()
    follower = threading.Thread(
        target=run_projection, args=[engine, catalogue.load().models], kwargs={"stop": stop}
    )
    follower.start()
    brokers = Brokers(settings(name), ClientReports())
    with running(settings(name)):
        for record in Simulation(seed=8, events=600, topic=name, partitions=PARTITIONS):
            ledger.send(name, [record.value], partition=record.partition or 0, key=record.key)
        steps = plan(engine, brokers, [Partition(name, n) for n in range(PARTITIONS)], "earliest")
        list(execute(engine, brokers, settings(name), steps))
        ledger.flush()
        until(lambda: len(logged_places(database)) == len(ledger.records), "all is in the log")
    stop.set()
    follower.join()
    brokers.close()

    assert in_log_order(database, name) == ledger.records
    run_projection(engine, catalogue.load().models, until_end=True)
    assert set(differing(engine).values()) == {0}


def logged_places(database):
    with database.connect() as db:
        return db.execute('SELECT topic, "partition", "offset" FROM pipeline.events').fetchall()


def test_a_running_rebuild_applies_records_that_are_filled_below_it(
    topic, database, settings, ledger, engine
):
    name = topic(PARTITIONS)
    simulated(ledger, name, 600)
    ingest_until_end(settings(name, start="latest"))
    for record in Simulation(seed=9, events=300, topic=name, partitions=PARTITIONS):
        ledger.send(name, [record.value], partition=record.partition or 0, key=record.key)
    ledger.flush()
    ingest_until_end(settings(name))
    run_projection(engine, [orders], until_end=True)
    brokers = Brokers(settings(name), ClientReports())
    rewound: list[tuple[Step, Comparison]] = []

    def rewind_once(_progress):
        if not rewound:
            steps = plan(
                another, brokers, [Partition(name, n) for n in range(PARTITIONS)], "earliest"
            )
            rewound.extend(execute(another, brokers, settings(name), steps))

    another = open_engine(database.url, application="rewind")
    rebuild(engine, orders, chunk_offsets=50, observe=rewind_once)

    another.dispose()
    brokers.close()
    assert sum(found.missing.count for _, found in rewound) > 600
    run_projection(engine, [orders], until_end=True)
    assert check(engine, orders).differing == 0


# ---------------------------------------------------------------------------- what it leaves alone


def test_the_plan_alone_changes_nothing(topic, database, settings, ledger, pipeline):
    name = topic(1)
    ledger.send(name, numbered(30)).flush()
    ingest_until_end(settings(name, start="latest"))

    result = pipeline("rewind", name, "--to", "12")

    assert (result.code, logged(database, name)) == (0, {})
    assert "12 … 30" in result.out
    assert "Nothing was changed" in result.err
    assert first_offsets(database) == {0: 30}


def test_a_row_that_differs_from_kafka_is_reported_and_kept(
    topic, database, settings, ledger, pipeline
):
    name = topic(1)
    ledger.send(name, numbered(30)).flush()
    ingest_until_end(settings(name))
    tamper(
        database,
        'UPDATE pipeline.events SET payload = \'{"n": 0}\' WHERE "offset" IN (7, 8, 20)',
    )

    result = pipeline("rewind", name, "--to", "earliest", "--execute")

    assert result.code == ExitCode.FOUND
    assert "3 records with other bytes in the log than in Kafka, at 7-8, 20" in result.err
    assert payloads(database, name)[name, 0, 20][0] == '{"n": 0}'


def test_rows_that_kafka_has_compacted_away_are_reported_and_kept(
    kafka, topic, database, settings, ledger, pipeline
):
    name = topic(1)
    ledger.send(name, numbered(10)).flush()
    ingest_until_end(settings(name))
    with database.connect() as db:
        db.execute(
            'INSERT INTO pipeline.events (topic, "partition", "offset", kafka_timestamp_type) '
            "SELECT topic, 0, 100 + n, 0 FROM pipeline.consumer_offsets, generate_series(0, 2) n"
        )
        db.execute("UPDATE pipeline.consumer_offsets SET next_offset = 110")
    ledger.send(name, numbered(110, first=10)).flush()
    tamper(database, 'DELETE FROM pipeline.events WHERE "offset" >= 100')
    kafka.delete_records(name, 0, 5)

    result = pipeline("rewind", name, "--to", "earliest", "--execute", "--json")

    [done] = result.json["done"]
    assert (result.code, done["read"], done["filled"]) == (0, 105, 100)
    assert set(logged(database, name)) == {(name, 0, n) for n in range(110)}


def test_records_that_kafka_no_longer_has_are_reported(
    kafka, topic, database, settings, ledger, pipeline
):
    name = topic(1)
    ledger.send(name, numbered(30)).flush()
    ingest_until_end(settings(name, start="latest"))
    kafka.delete_records(name, 0, 20)

    result = pipeline("rewind", name, "--to", "5", "--execute")

    assert result.code == 0
    assert "Kafka's first record is at 20; 15 earlier offsets are no longer in Kafka" in result.err
    assert set(logged(database, name)) == {(name, 0, n) for n in range(20, 30)}
    assert first_offsets(database) == {0: 20}


def test_a_recreated_topic_is_not_read(kafka, topic, database, settings, ledger, pipeline):
    name = topic(1)
    ledger.send(name, numbered(10)).flush()
    ingest_until_end(settings(name))
    kafka.delete_topic(name)
    kafka.create_topic(name, 1)
    ledger.send(name, numbered(20)).flush()

    result = pipeline("rewind", name, "--to", "earliest", "--execute")

    assert result.code == ExitCode.REFUSED
    assert "deleted and recreated" in result.err


def test_a_time_is_the_first_record_at_or_after_it(topic, database, settings, ledger, pipeline):
    name = topic(1, config={"retention.ms": "-1"})
    for minute in range(10):
        ledger.send(
            name, numbered(3, first=minute), timestamp_ms=1_767_225_600_000 + minute * 60_000
        )
    ledger.flush()
    ingest_until_end(settings(name, start="latest"))

    result = pipeline("rewind", name, "--to", "2026-01-01T00:04:30Z", "--execute", "--json")

    assert result.json["plan"][0]["first"] == 15, result.out
    assert set(logged(database, name)) == {(name, 0, n) for n in range(15, 30)}


def test_only_one_rewind_of_a_partition_at_a_time(topic, database, settings, ledger, pipeline):
    name = topic(1)
    ledger.send(name, numbered(10)).flush()
    ingest_until_end(settings(name))

    engine = open_engine(database.url, application="another rewind")
    with locks.held(engine, f"rewind {Partition(name, 0)}"):
        result = pipeline("rewind", name, "--to", "earliest", "--execute")
    engine.dispose()

    assert result.code == ExitCode.FENCED
    assert "another rewind of this partition is running: 'another rewind', process" in result.err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nowhere", "--to", "earliest"], "the log has no partition nowhere; the log is empty"),
        (["a:0:7", "--to", "earliest"], "TOPIC or TOPIC:PARTITION"),
        (["a", "--to", "yesterday"], "a time such as"),
        (["a"], "Missing option '--to'"),
    ],
)
def test_wrong_usage_is_reported(pipeline, arguments, expected):
    result = pipeline("rewind", *arguments)

    assert result.code == ExitCode.USAGE
    assert expected in " ".join(result.err.split()).replace(" │ │ ", " ")


# ----------------------------------------------------------------------------------- when it breaks


@pytest.mark.parametrize("step", ["before_fill", "mid_fill", "after_fill"])
def test_a_killed_rewind_is_complete_or_has_changed_nothing(
    step, topic, database, settings, ledger, engine, kafka
):
    name = topic(1)
    ledger.send(name, numbered(50)).flush()
    ingest_until_end(settings(name, start="latest"))
    commands = Commands(
        database_url=database.dsn,
        kafka_bootstrap_servers=kafka.bootstrap_servers,
        kafka_security_protocol="PLAINTEXT",
    )
    rewind = ["rewind", name, "--to", "earliest", "--execute", "--json"]

    killed = commands.with_(failpoint=f"{step}:kill", enable_failpoints="1").run(*rewind)

    assert killed.code == -9
    assert len(logged(database, name)) == (50 if step == "after_fill" else 0)
    assert first_offsets(database) == {0: 0 if step == "after_fill" else 50}
    again = commands.run(*rewind)
    assert (again.code, again.json["done"][0]["read"]) == (0, 50)
    assert logged(database, name) == ledger.records


def test_a_range_that_retention_overtakes_is_read_from_its_new_beginning(
    kafka, topic, database, settings, ledger, engine, monkeypatch
):
    name = topic(1)
    ledger.send(name, numbered(100)).flush()
    ingest_until_end(settings(name, start="latest"))
    brokers = Brokers(settings(name), ClientReports())
    steps = plan(engine, brokers, [Partition(name, 0)], "earliest")
    kafka.delete_records(name, 0, 40)

    [(_, found)] = execute(engine, brokers, settings(name), steps)

    brokers.close()
    assert (found.read, found.missing.count) == (60, 60)
    assert found.missing.ranges == [OffsetRange(NextOffset(40), NextOffset(100))]
    assert first_offsets(database) == {0: 40}
    assert set(logged(database, name)) == {(name, 0, n) for n in range(40, 100)}
