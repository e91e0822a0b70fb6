"""Read models converge: however a log is projected, and however its events were ordered.

Random schedules and orders; hypothesis prints the one that fails, and a seed to repeat it.
"""

import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import given as over
from hypothesis import strategies as st
from sqlalchemy import Row

from pipeline import catalogue
from pipeline.partitions import NextOffset, OffsetRange, Partition
from pipeline.projection.loop import Limits, run_projection
from pipeline.projection.one_pass import Result, project
from pipeline.rebuild.rebuild import rebuild
from tests.given import TOPIC, Event, Given, contents, create_tables, event, some_id
from tests.given import sample_events as the_sample
from tests.planned_read_models import PLANNED
from tests.servers.databases import Database, fresh_database

pytestmark = pytest.mark.timeout(600)

PROJECTORS = tuple(
    sorted((*catalogue.load().models, *PLANNED), key=lambda projector: projector.name)
)
NAMES = [projector.name for projector in PROJECTORS]
PARTITIONS = range(4)
THOROUGH = settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)


def projected_events() -> list[Event]:
    """What of the sample concerns any read model."""
    return [
        event
        for event in the_sample()
        if any(projector.takes(event["type"]) for projector in PROJECTORS)
    ]


def harder_events(seed: int) -> Iterator[Event]:
    """The sample, and what makes versions hard to tell.

    Older and newer states of the same entities under coarse clocks, states that are not known,
    times that are absent, null or empty, values that no column takes, and repeats.
    """
    chance = random.Random(seed)
    sample = projected_events()
    yield from sample
    for number in range(300):
        original = chance.choice(sample)
        body = dict(original["object"])
        second = chance.randint(0, 20)
        match chance.randint(0, 5):
            case 0:
                body.pop("updated_at", None)
            case 1:
                body["updated_at"] = chance.choice([None, ""])
            case _:
                if "updated_at" in body:
                    body["updated_at"] = f"2026-06-01T10:00:{second:02}Z"
        if "status" in body and chance.random() < 0.3:
            body["status"] = chance.choice(["FILLED", "CANCELLED", "HALTED", "ACTIVE", "CLOSED"])
        if chance.random() < 0.03:
            body["taxes"] = [{"type": "TOTAL", "amount": chance.choice(["1,5", "NaN", "2"])}]
        if body.get("executions"):
            taxes = [{"type": "TOTAL", "amount": chance.choice(["1,5", "0", "0"])}]
            body["executions"] = [{**execution, "taxes": taxes} for execution in body["executions"]]
        if chance.random() < 0.03:
            body["id"] = chance.choice(["", None, "no uuid", some_id("somebody else")])
        if chance.random() < 0.05:
            for name in ("cash_amount", "quantity", "balance"):
                if name in body:
                    body[name] = chance.choice(["12,5", "Infinity", "1.50", "1e3", {}])
        at = f"10:00:{chance.randint(0, 9):02}"
        yield event(original["type"], body, at=at, name=f"harder {number}")
        if chance.random() < 0.1:
            yield event(original["type"], body, at=at, name=f"harder {number}")


@pytest.fixture
def harder(given: Given) -> Given:
    """One log of about 900 events over four partitions, some offsets unused."""
    create_tables(given.engine, *PLANNED)
    chance = random.Random(11)
    for delivered in harder_events(seed=11):
        partition = chance.choice(PARTITIONS)
        given.log.append([delivered], partition=partition, gap=chance.choice([0, 0, 0, 1, 7]))
    return given


def empty_tables(given: Given) -> None:
    tables = ", ".join(table.fullname for projector in PROJECTORS for table in projector.tables)
    given.execute(f"TRUNCATE {tables}")


steps = st.lists(
    st.tuples(
        st.sampled_from(PARTITIONS),
        st.integers(min_value=1, max_value=300),
        # Projectors that are left out of a pass, because another session has locked their tables.
        st.sets(st.sampled_from(NAMES), max_size=4),
    ),
    max_size=12,
)


@pytest.mark.faults
@pytest.mark.both_postgres
def test_one_log_gives_one_set_of_tables_however_it_is_projected(harder: Given, pg_version):
    """Interleaved otherwise, in other batches, some partitions late, stopped and resumed."""
    run_projection(harder.engine, PROJECTORS, until_end=True)
    expected = contents(harder.engine, PROJECTORS)
    rejected = letters(harder)
    assert all(expected[name] for name in NAMES)
    assert len({row.projector for row in rejected}) > 3
    rows = harder.query("SELECT partition, next_offset FROM pipeline.consumer_offsets")
    ends: dict[int, int] = {row.partition: row.next_offset for row in rows}

    @settings(THOROUGH, max_examples=20 if pg_version == 18 else 5)
    @over(schedule=steps, batch=st.integers(min_value=30, max_value=500))
    def same_tables(schedule, batch) -> None:
        empty_tables(harder)
        for partition, offsets, left_out in schedule:
            take(harder, partition, offsets, left_out, ends[partition])
        run_projection(harder.engine, PROJECTORS, Limits(batch_offsets_max=batch), until_end=True)

        assert contents(harder.engine, PROJECTORS) == expected
        assert letters(harder) == rejected

    same_tables()


@pytest.mark.faults
@pytest.mark.both_postgres
def test_a_rebuild_by_several_jobs_equals_a_rebuild_by_one(harder: Given, pg_version):
    """Ranges of one partition at once, in any order, with the same keys and parents in many."""
    run_projection(harder.engine, PROJECTORS, until_end=True)
    rejected = letters(harder)

    @settings(THOROUGH, max_examples=25 if pg_version == 18 else 8)
    @over(
        projector=st.sampled_from(PROJECTORS),
        jobs=st.integers(min_value=2, max_value=4),
        chunk=st.integers(min_value=5, max_value=200),
    )
    def same_tables(projector, jobs, chunk) -> None:
        difference = rebuild(harder.engine, projector, chunk_offsets=chunk, jobs=jobs)

        assert difference.differing == 0
        assert letters(harder) == rejected

    same_tables()


def letters(given: Given) -> Sequence[Row[Any]]:
    """Which events were put aside."""
    return given.query(
        'SELECT projector, topic, partition, "offset" FROM pipeline.dead_letters '
        "ORDER BY 1, 2, 3, 4"
    )


def take(given: Given, partition: int, offsets: int, left_out, end: int) -> None:
    """Bring the most lagging projectors one range further, but some."""
    rows = given.query(
        "SELECT projector, next_offset FROM pipeline.projection_checkpoints "
        "WHERE partition = :partition",
        partition=partition,
    )
    checkpoints_by_name: dict[str, int] = {row.projector: row.next_offset for row in rows}
    first = min(checkpoints_by_name[name] for name in NAMES)
    if first == end:
        return
    here = [
        projector
        for projector in PROJECTORS
        if checkpoints_by_name[projector.name] == first and projector.name not in left_out
    ]
    others = [checkpoint for checkpoint in checkpoints_by_name.values() if checkpoint > first]
    results = project(
        given.engine,
        here,
        Partition(TOPIC, partition),
        OffsetRange(NextOffset(first), NextOffset(min([first + offsets, end, *others]))),
        rejected_max=1000,
    )
    assert set(results.values()) <= {Result.DONE}


def test_the_order_of_events_and_their_partitions_do_not_matter(
    postgres_server_18, database: Database
):
    """With repeats, wherever the events' own times differ; but for where a row came from."""
    events = projected_events()
    empty = Given(database)
    create_tables(empty.engine, *PLANNED)
    empty.close()

    def tables_of(seed: int) -> Any:
        chance = random.Random(seed)
        shuffled = [*events, *chance.sample(events, k=chance.randint(0, 80))]
        chance.shuffle(shuffled)
        with fresh_database(postgres_server_18, template=database) as fresh:
            given = Given(fresh)
            try:
                partitions = chance.randint(1, 5)
                for partition in range(partitions):
                    given.log.append(shuffled[partition::partitions], partition=partition)
                batch = chance.choice([50, 200, 1000])
                run_projection(
                    given.engine, PROJECTORS, Limits(batch_offsets_max=batch), until_end=True
                )
                assert given.query("SELECT * FROM pipeline.dead_letters") == []
                return contents(given.engine, PROJECTORS, machinery=False)
            finally:
                given.close()

    expected = tables_of(0)

    @THOROUGH
    @over(seed=st.integers(min_value=1, max_value=2**32))
    def same_tables(seed) -> None:
        assert tables_of(seed) == expected

    same_tables()
