"""A database belongs to one group and one cluster: others are refused."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.harness import QUICK_TO_NOTICE, Bench, until
from tests.integration.ingesting import Ledger, logged
from tests.servers import Kafka, KafkaServer, Postgres
from tests.servers.databases import Database, fresh_database


def numbered(count: int) -> list[bytes | None]:
    return [b'{"n": %d}' % n for n in range(count)]


def problems(bench: Bench) -> list[str]:
    rows = bench.query(
        "SELECT problem_fix FROM pipeline.consumer_offsets WHERE problem IS NOT NULL"
    )
    return [text for (text,) in rows]


@pytest.fixture
def second(
    kafka: Kafka,
    postgres_server: Postgres,
    _templates: Callable[[Postgres], Database],
    bench: Bench,
    tmp_path: Path,
) -> Iterator[Bench]:
    """A bench like the first, on another database, in the same group."""
    (tmp_path / "second").mkdir()
    with fresh_database(postgres_server, template=_templates(postgres_server)) as database:
        with database.connect() as db:
            # A copy of a template also has the template's identity.
            db.execute("UPDATE pipeline.installation SET installation_id = gen_random_uuid()")
        other = Bench(kafka, database, bench.topic, bench.partitions, tmp_path / "second")
        other.group = bench.group
        yield other
        other.close()


def test_a_second_database_that_joins_the_group_of_a_running_one_takes_nothing_from_it(
    bench: Bench, second: Bench
):
    """Kafka shares the partitions between the two, and neither reports an error."""
    first = bench.worker()

    with bench.feed(rate=300) as feed:
        bench.wait_until_logged(300)
        intruder = second.worker()
        assert intruder.wait() == 65, intruder.tail()
        bench.wait_until_owner_of_all(first)

    assert "also feeds database" in intruder.logged("partitions_halted")[0]["reason"]
    assert second.query("SELECT FROM pipeline.events") == []
    bench.finish(feed.ledger)
    assert first.exit_code == 0


def test_another_kafka_with_the_same_names_is_refused_and_begins_no_partition(
    bench: Bench, private_kafka: KafkaServer
):
    """A database is connected to staging by mistake; then the setting is corrected."""
    ledger = Ledger(bench.kafka.bootstrap_servers)
    ledger.send(bench.topic, numbered(10)).flush()
    private_kafka.create_topic(bench.topic, bench.partitions + 2)
    for number in range(bench.partitions + 2):
        Ledger(private_kafka.bootstrap_servers).send(
            bench.topic, numbered(50), partition=number
        ).flush()
    assert bench.worker("ingest", "--until-end").wait() == 0
    staging: dict[str, Any] = {"kafka_bootstrap_servers": private_kafka.bootstrap_servers}

    one_shot = bench.worker("ingest", "--until-end", **staging)
    assert one_shot.wait() == 65, one_shot.tail()
    worker = bench.worker(**staging)
    worker.wait_for_log("partitions_halted")
    until(lambda: len(problems(bench)) == bench.partitions, "every partition has a reason")
    assert all("PIPELINE_KAFKA_BOOTSTRAP_SERVERS" in text for text in problems(bench))
    assert worker.stop() == 0, worker.tail()
    assert len(bench.next_offsets()) == bench.partitions, (
        "partitions that only staging has are not begun"
    )

    ledger.send(bench.topic, numbered(10), partition=1).flush()
    assert bench.worker("ingest", "--until-end").wait() == 0
    assert problems(bench) == []
    assert logged(bench.database, bench.topic) == ledger.records


def test_a_deleted_consumer_group_changes_nothing(bench: Bench):
    ledger = Ledger(bench.kafka.bootstrap_servers)
    ledger.send(bench.topic, numbered(10)).flush()
    worker = bench.worker(kafka_options=f"{QUICK_TO_NOTICE},fetch.wait.max.ms=50")
    bench.wait_until_logged(10)
    assert worker.stop() == 0, worker.tail()
    for deletion in bench.kafka.admin.delete_consumer_groups([bench.group]).values():
        deletion.result(20)

    ledger.send(bench.topic, numbered(10), partition=1).flush()
    again = bench.worker()
    bench.wait_until_logged(20)

    assert again.stop() == 0, again.tail()
    assert logged(bench.database, bench.topic) == ledger.records
