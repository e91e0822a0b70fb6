"""A Kafka with logins and rights: a refusal is reported, and work continues once it is fixed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka.admin import (
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    ResourcePatternType,
    ResourceType,
)

from pipeline.partitions import Partition
from pipeline.sandbox.servers.postgres import free_port
from tests.faults.harness import Bench, until
from tests.integration.ingesting import Ledger, logged
from tests.servers import KafkaServer
from tests.servers.databases import Database

ONES: list[bytes | None] = [b"1"] * 5
TWOS: list[bytes | None] = [b"2"] * 5
USER, PASSWORD = "worker", "right"
LOGIN_MODULE = "org.apache.kafka.common.security.plain.PlainLoginModule required"


@pytest.fixture(scope="module")
def guarded_kafka() -> Iterator[tuple[KafkaServer, str]]:
    """Clients without a login may do everything; the worker logs in and has only its rights."""
    plain, controller, guarded = (f"127.0.0.1:{free_port()}" for _ in range(3))
    settings = {
        "controller.quorum.voters": f"1@{controller}",
        "listeners": f"PLAINTEXT://{plain},GUARDED://{guarded},CONTROLLER://{controller}",
        "advertised.listeners": f"PLAINTEXT://{plain},GUARDED://{guarded}",
        "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT,"
        "GUARDED:SASL_PLAINTEXT",
        "listener.name.guarded.sasl.enabled.mechanisms": "PLAIN",
        "listener.name.guarded.plain.sasl.jaas.config": f'{LOGIN_MODULE} user_{USER}="{PASSWORD}";',
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "super.users": "User:ANONYMOUS",
    }
    server = KafkaServer(settings)
    server._bootstrap_servers = plain
    with server:
        yield server, guarded


def right(kind: ResourceType, name: str, operation: AclOperation) -> AclBinding:
    return AclBinding(
        kind, name, ResourcePatternType.LITERAL, f"User:{USER}", "*", operation,
        AclPermissionType.ALLOW,
    )  # fmt: skip


def allow(kafka: KafkaServer, *rights: AclBinding) -> None:
    for done in kafka.admin.create_acls(list(rights)).values():
        done.result(20)


def forbid(kafka: KafkaServer, topic: str) -> None:
    of_topic = AclBindingFilter(
        ResourceType.TOPIC, topic, ResourcePatternType.LITERAL, f"User:{USER}", "*",
        AclOperation.ANY, AclPermissionType.ANY,
    )  # fmt: skip
    for done in kafka.admin.delete_acls([of_topic]).values():
        done.result(20)


@pytest.mark.timeout(240)
def test_a_wrong_password_is_reported_and_a_revoked_right_halts_only_its_topic(
    guarded_kafka: tuple[KafkaServer, str], database: Database, tmp_path: Path
):
    kafka, guarded = guarded_kafka
    bench = Bench(kafka, database, "may-vanish", 1, tmp_path)
    for name in ("may-vanish", "stays"):
        kafka.create_topic(name)
    ledger = Ledger(kafka.bootstrap_servers)
    ledger.send("may-vanish", ONES).send("stays", ONES).flush()
    read = right(ResourceType.TOPIC, "may-vanish", AclOperation.READ)
    allow(
        kafka,
        read,
        right(ResourceType.TOPIC, "stays", AclOperation.READ),
        right(ResourceType.GROUP, bench.group, AclOperation.READ),
    )
    access: dict[str, Any] = {
        "kafka_bootstrap_servers": guarded,
        "kafka_security_protocol": "SASL_PLAINTEXT",
        "kafka_sasl_mechanism": "PLAIN",
        "kafka_username": USER,
        "topics": "may-vanish,stays",
        "kafka_options": "topic.metadata.refresh.interval.ms=500,session.timeout.ms=6000",
    }

    barred = bench.worker("run", kafka_password="wrong", **access)
    assert barred.wait() == 78, barred.tail()
    [last] = barred.logged("stopped")
    assert f"Kafka at {guarded} for user {USER} refused the login" in last["reason"]
    assert "wrong" not in barred.log.read_text()

    worker = bench.worker("ingest", kafka_password=PASSWORD, **access)
    bench.wait_until_logged(10)
    forbid(kafka, "may-vanish")
    ledger.send("may-vanish", TWOS).send("stays", TWOS).flush()
    worker.wait_for_log("topic_not_authorized")
    until(lambda: bench.next_offsets()[Partition("stays", 0)] == 10, "the other topic is read")
    hidden = (
        "SELECT FROM pipeline.consumer_offsets "
        "WHERE strpos(problem, 'TOPIC_AUTHORIZATION_FAILED') > 0"
    )
    until(lambda: len(bench.query(hidden)) == 1, "the reason for the hidden topic")
    allow(kafka, read)
    until(
        lambda: bench.next_offsets()[Partition("may-vanish", 0)] == 10,
        "the topic continues by itself",
    )
    assert bench.query("SELECT FROM pipeline.consumer_offsets WHERE problem IS NOT NULL") == []
    assert worker.stop() == 0, worker.tail()

    assert logged(database, "may-vanish") | logged(database, "stays") == ledger.records
    bench.close()
