"""A password is changed while we run: the new one is used, and the old one is tried seldom."""

import os
import re
from pathlib import Path

import pytest
from sqlalchemy import text
from structlog.testing import capture_logs

from pipeline import catalogue, outages
from pipeline.db import open_engine, transaction
from pipeline.errors import ConfigurationError, ExitCode
from pipeline.health.status import read_status, states
from pipeline.settings import load_settings
from tests import waiting
from tests.commands import Commands
from tests.integration.ingesting import Ledger, Running, logged

pytestmark = [pytest.mark.timeout(120), pytest.mark.faults]
WAIT_S_MAX = 40.0
REFUSED_MAX = 10
"""Most refused logins at first: the member of the group and two clients beside it, each with up to
three connections. After that it is one per ``LOGIN_RETRY_S``."""


class KafkaUser:
    """One whose connections end soon after its password was changed; it may read one topic."""

    def __init__(self, kafka, database, directory: Path) -> None:
        self.kafka = kafka
        self.name = f"client-{os.urandom(4).hex()}"
        self.topic = f"topic-{self.name}"
        kafka.create_topic(self.topic)
        kafka.add_user(self.name, mechanism="SCRAM-SHA-256")
        kafka.add_acl(self.name, "READ", "DESCRIBE", topic=self.topic)
        kafka.add_acl(self.name, "READ", group=self.topic)
        self.ledger = Ledger(kafka.bootstrap_servers)
        self._file = directory / "password"
        self.update_file()
        environment = kafka.environment(self.name)
        del environment["PIPELINE_KAFKA_PASSWORD"]
        self.settings = {name[9:].lower(): value for name, value in environment.items()}
        self.settings |= {
            "kafka_password_file": str(self._file),
            "database_url": database.dsn,
            "group_id": self.topic,
            "topics": self.topic,
            "log_format": "json",
        }
        # A member whose login is refused cannot leave: Kafka holds its partitions for so long.
        self.settings["kafka_options"] += ",session.timeout.ms=6000"

    def update_file(self) -> None:
        """Put the password as it is now where the program reads it."""
        self._file.write_text(self.kafka.password(self.name))

    def send(self) -> None:
        self.ledger.send(self.topic, [b'{"n": 1}'])
        self.ledger.flush()

    def refused_logins(self) -> int:
        """How often the broker has refused a login, of a new connection or of an old one."""
        return len(re.findall(r"Failed (re-)?authentication", self.kafka.log.read_text()))


@pytest.fixture
def user(secured_kafka, database, tmp_path):
    made = KafkaUser(secured_kafka, database, tmp_path)
    yield made
    secured_kafka.remove_acls_of(made.name)


@pytest.mark.kafka
@pytest.mark.parametrize("when", ["before it is refused", "after it was refused"])
def test_a_password_of_kafka_that_is_changed_in_its_file_is_used(user, database, when):
    """Whoever changes it does so in two places, in either order."""
    user.send()
    with Commands(**user.settings).started("ingest") as worker:
        waiting.until(
            lambda: logged(database, user.topic) == user.ledger.records,
            "the first record is there",
            seconds_max=WAIT_S_MAX,
        )

        user.kafka.set_password(user.name)
        if when == "after it was refused":
            worker.until('"access_refused"')
        user.update_file()
        worker.until('"password_reloaded"')
        user.send()

        waiting.until(
            lambda: logged(database, user.topic) == user.ledger.records,
            "the second record is there",
            seconds_max=WAIT_S_MAX,
        )
        lines = "".join(worker.err)
    assert user.kafka.password(user.name) not in lines
    assert lines.count('"password_reloaded"') == 1


@pytest.mark.kafka
def test_a_wrong_password_of_kafka_is_tried_rarely_and_ends_with_78(user, database, monkeypatch):
    monkeypatch.setattr(outages, "GRACE_S", 10.0)
    monkeypatch.setattr(states, "SEEN_S_MAX", 6.0)
    user.send()
    settings = {k: v for k, v in user.settings.items() if k != "kafka_password_file"}
    running = Running(
        load_settings(None, **settings, kafka_password=user.kafka.password(user.name))
    )
    waiting.until(
        lambda: logged(database, user.topic) == user.ledger.records,
        "the record is there",
        seconds_max=WAIT_S_MAX,
    )
    refused_before = user.refused_logins()

    user.kafka.set_password(user.name)
    engine = open_engine(database.url, application="test", read_only=True)
    waiting.until(
        lambda: (
            [partition.state for partition in read_status(engine, catalogue.load()).partitions]
            == ["UNKNOWN"]
        ),
        "status says that it is unknown what Kafka has",
        seconds_max=WAIT_S_MAX,
    )
    assert not running.has_ended
    assert not read_status(engine, catalogue.load()).ok
    engine.dispose()
    waiting.until(lambda: running.has_ended, "it ends", seconds_max=WAIT_S_MAX)

    refused = user.refused_logins() - refused_before
    error = running.end()
    assert isinstance(error, ConfigurationError)
    assert error.exit_code is ExitCode.CONFIGURATION
    for named in (user.name, user.kafka.servers(), "refused the login"):
        assert named in str(error)
    assert 2 <= refused <= REFUSED_MAX


@pytest.mark.postgres
def test_a_password_of_postgresql_is_read_again_and_a_wrong_password_is_tried_once(
    secured_postgres,
):
    user = f"u{os.urandom(4).hex()}"
    secured_postgres.add_user(user)
    url = secured_postgres.dsn(user)
    in_file = [url]
    engine = open_engine(url, application="test", fresh_url=lambda: in_file[-1])

    def run_statement() -> None:
        with transaction(engine) as db:
            db.execute(text("SELECT 1"))

    def refused() -> int:
        words = f'password authentication failed for user "{user}"'
        return str(secured_postgres.server.log.read_text()).count(words)

    run_statement()
    secured_postgres.set_password(user)
    secured_postgres.end_connections(user)
    engine.dispose()
    for _ in range(20):
        with pytest.raises(ConfigurationError, match="refused the login"):
            run_statement()
    assert refused() == 1

    in_file.append(secured_postgres.dsn(user))
    with capture_logs() as logged:
        run_statement()

    assert [line["event"] for line in logged] == ["password_reloaded"]
    assert secured_postgres.password(user) not in str(logged)
    assert refused() == 1
    engine.dispose()
