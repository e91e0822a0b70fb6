"""The secured test servers refuse what a bank's would, and Kafka's rights mean what we think."""

import os
import subprocess
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest
from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient

from tests import waiting
from tests.servers.certificates import KINDS

WAIT_SECONDS_MAX = 20.0
PROJECT = Path(__file__).resolve().parents[2]
TLS, LOGIN = KafkaError._SSL, KafkaError._AUTHENTICATION

until = partial(waiting.until, seconds_max=WAIT_SECONDS_MAX)


def complaint(config) -> int | None:
    """Why the client gets no connection, as a code; None if the broker answers."""
    codes: list[int] = []
    listening: dict[str, Any] = {"error_cb": lambda error: codes.append(error.code())}
    # On a busy machine, others may come first: a connection that broke, all brokers down.
    causes = {TLS, LOGIN}
    admin = AdminClient({**config, **listening})

    def answered() -> bool:
        with suppress(KafkaException):
            admin.list_topics(timeout=0.5)
            return True
        admin.poll(0)
        return bool(causes & set(codes))

    until(answered, "an answer or a complaint")
    return next((code for code in codes if code in causes), None)


@pytest.fixture
def acme(secured_kafka, request):
    """A user of this test's own, without rights."""
    user = f"acme-{os.urandom(4).hex()}"
    secured_kafka.add_user(user)
    yield user
    secured_kafka.remove_acls_of(user)


@pytest.mark.parametrize("kind", KINDS)
def test_kafka_presents_a_certificate_of_each_kind(secured_kafka, acme, kind):
    assert complaint(secured_kafka.client(acme, kind)) == (None if kind == "good" else TLS)


@pytest.mark.parametrize("mechanism", ["SCRAM-SHA-512", "SCRAM-SHA-256"])
def test_kafka_accepts_only_the_newest_password(secured_kafka, mechanism):
    user = f"user-{os.urandom(4).hex()}"
    secured_kafka.add_user(user, mechanism=mechanism)
    before = secured_kafka.client(user)

    secured_kafka.set_password(user)

    assert complaint(before) == LOGIN
    assert complaint(secured_kafka.client(user)) is None

    after = secured_kafka.client(user)
    secured_kafka.remove_user(user)
    assert complaint(after) == LOGIN


@pytest.mark.parametrize("prefixed", [False, True], ids=["literal", "prefixed"])
def test_kafka_shows_a_topic_to_those_who_may_describe_it(secured_kafka, acme, prefixed):
    name = f"seen-{acme}"
    secured_kafka.create_topic(name)
    admin = AdminClient(secured_kafka.client(acme))

    def seen():
        return name in admin.list_topics(timeout=WAIT_SECONDS_MAX).topics

    assert not seen()
    secured_kafka.add_acl(acme, "DESCRIBE", topic="seen-" if prefixed else name, prefixed=prefixed)
    assert seen()
    secured_kafka.add_acl(acme, "DESCRIBE", topic=name, deny=True)
    assert not seen()
    secured_kafka.remove_acl(acme, "DESCRIBE", topic=name, deny=True)
    assert seen()


def test_kafka_presents_another_certificate_on_demand(secured_kafka, acme):
    try:
        secured_kafka.present("expired")
        assert complaint(secured_kafka.client(acme)) == TLS
    finally:
        secured_kafka.present("good")

    assert complaint(secured_kafka.client(acme)) is None


def test_postgres_follows_its_rules_and_its_certificate(secured_postgres):
    secured_postgres.add_user("teller")

    with psycopg.connect(secured_postgres.dsn("teller")) as connection:
        assert connection.info.user == "teller"
    try:
        with pytest.raises(psycopg.OperationalError, match="no encryption"):
            psycopg.connect(secured_postgres.dsn("teller", sslmode="disable"))
        secured_postgres.set_rules("hostssl all teller 127.0.0.1/32 reject")
        with pytest.raises(psycopg.OperationalError, match="pg_hba"):
            psycopg.connect(secured_postgres.dsn("teller"))
        secured_postgres.set_rules()
        for kind, complaint in {
            "expired": "certificate verify failed",
            "unknown_ca": "certificate verify failed",
            "other_host": "does not match host name",
        }.items():
            secured_postgres.present(kind)
            with pytest.raises(psycopg.OperationalError, match=complaint):
                psycopg.connect(secured_postgres.dsn("teller"))
    finally:
        secured_postgres.set_rules()
        secured_postgres.present("good")

    psycopg.connect(secured_postgres.dsn("teller")).close()


def test_the_command_prints_the_settings_of_secured_servers(secured_postgres):
    """What is printed works in psql as it stands."""
    command = [sys.executable, "-m", "tests.servers", "--secured", "--no-kafka"]
    process = subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        exported = process.stdout.readline().strip()
        script = f'{exported}; psql "$PIPELINE_DATABASE_URL" -Atc "SELECT ssl FROM pg_stat_ssl'
        script += ' WHERE pid = pg_backend_pid()"'
        answer = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
        assert answer.stdout.strip() == "t", answer.stderr
    finally:
        process.terminate()
        assert process.wait(WAIT_SECONDS_MAX) == 0
        process.stdout.close()
