"""READ and DESCRIBE on the topics and READ on the one group are enough; what is missing is named.

Commands run as people run them, against a Kafka with TLS, logins and an authorizer.
"""

import os
from collections.abc import Iterator

import pytest
from confluent_kafka import Consumer

from pipeline.kafka.client import consumer_config
from pipeline.kafka.metadata import Brokers
from pipeline.kafka.reports import ClientReports
from pipeline.settings import load_settings
from tests import waiting
from tests.commands import Commands
from tests.integration.ingesting import Ledger, logged, next_offsets
from tests.servers.databases import Database
from tests.servers.secured import SecuredKafka

# Each test runs up to eight commands, which take ten times as long on a busy machine.
pytestmark = [pytest.mark.timeout(300), pytest.mark.faults]
WAIT_S_MAX = 40.0
GOOD = [b'{"n": %d}' % n for n in range(5)]


class Client:
    """A user with exactly the rights that the documentation lists, for one topic and one group."""

    def __init__(self, kafka: SecuredKafka, database: Database) -> None:
        self.kafka = kafka
        self.name = f"client-{os.urandom(4).hex()}"
        self.topic, self.group = f"topic-{self.name}", f"group-{self.name}"
        kafka.create_topic(self.topic, 2)
        kafka.add_user(self.name)
        kafka.add_acl(self.name, "READ", "DESCRIBE", topic=self.topic)
        kafka.add_acl(self.name, "READ", group=self.group)
        self.ledger = Ledger(kafka.bootstrap_servers)
        self.send()
        settings = {k[9:].lower(): v for k, v in kafka.environment(self.name).items()}
        settings["kafka_options"] += ",topic.metadata.refresh.interval.ms=500"
        settings |= {"database_url": database.dsn, "group_id": self.group, "topics": self.topic}
        self.commands = Commands(**settings)
        self.settings = load_settings(None, **settings)

    def send(self) -> None:
        for partition in (0, 1):
            self.ledger.send(self.topic, GOOD, partition=partition)
        self.ledger.flush()


@pytest.fixture
def client(secured_kafka: SecuredKafka, database: Database) -> Iterator[Client]:
    made = Client(secured_kafka, database)
    yield made
    secured_kafka.remove_acls_of(made.name)


@pytest.mark.parametrize("protocol", ["classic", "consumer"])
def test_the_documented_rights_are_enough_for_everything(client, database, protocol):
    commands = client.commands.with_(kafka_group_protocol=protocol)

    for arguments in (
        ["check"],
        ["ingest", "--until-end"],
        ["check"],
        ["ingest", "--until-end"],
        ["status"],
        ["verify", "--only", "log", "--only", "kafka"],
        ["rewind", f"{client.topic}:0", "--to", "0"],
    ):
        result = commands.run(*arguments)
        # Nothing ingests between these commands, so status exits with 1.
        expected = 1 if arguments == ["status"] else 0
        assert result.code == expected, (arguments, result.out, result.err)
        assert "AUTHORIZATION" not in result.out + result.err
        client.send()

    assert commands.run("ingest", "--until-end").code == 0
    assert logged(database, client.topic) == client.ledger.records


@pytest.mark.parametrize("protocol", ["classic", "consumer"])
def test_read_on_the_group_is_enough_to_see_its_members(client, protocol):
    """By them a copy of the database is recognised."""
    settings = client.settings.model_copy(update={"kafka_group_protocol": protocol})
    other = Consumer(consumer_config(settings))
    other.subscribe([client.topic])

    def is_seen() -> bool:
        other.poll(0.1)
        members = Brokers(settings, ClientReports()).group.members()
        assert members is not None, "not authorized"
        return other.memberid() in members

    waiting.until(is_seen, "the member is seen", seconds_max=WAIT_S_MAX)
    other.close()


@pytest.mark.parametrize("missing", ["READ on topic", "topic", "READ on group", "DESCRIBE only"])
def test_check_names_the_missing_right(client, missing):
    kafka, name = client.kafka, client.name
    match missing:
        case "READ on topic":
            kafka.remove_acl(name, "READ", topic=client.topic)
            wanted = ("READ", "topic", client.topic)
        case "topic":
            kafka.remove_acl(name, "READ", "DESCRIBE", topic=client.topic)
            wanted = ("READ", "topic", client.topic)
        case "READ on group":
            kafka.remove_acl(name, "READ", group=client.group)
            wanted = ("READ", "group", client.group)
        case _:
            kafka.remove_acl(name, "READ", group=client.group)
            kafka.add_acl(name, "DESCRIBE", group=client.group)
            wanted = ("READ", "group", client.group)

    result = client.commands.run("check")

    assert result.code == 78, result.out
    operation, kind, resource = wanted
    requested = f"--allow-principal User:{name} --operation {operation} --{kind} {resource}"
    assert requested in " ".join(result.out.split()), result.out


def test_read_on_a_topic_includes_describe(client):
    client.kafka.remove_acl(client.name, "DESCRIBE", topic=client.topic)

    assert client.commands.run("check").code == 0
    assert client.commands.run("ingest", "--until-end").code == 0


@pytest.mark.parametrize("when", ["first start", "restart"])
def test_an_ingest_that_may_not_read_its_topic_reports_it(client, when):
    if when == "restart":
        assert client.commands.run("ingest", "--until-end").code == 0
    client.kafka.remove_acl(client.name, "READ", topic=client.topic)

    result = client.commands.run("ingest", "--until-end")

    assert result.code == 78, result.err
    assert f"--operation READ --topic {client.topic}" in result.err
    for command in (
        [["verify", "--only", "kafka"], ["rewind", f"{client.topic}:0", "--to", "0"]]
        if when == "restart"
        else []
    ):
        refused = client.commands.run(*command)
        assert refused.code == 78, (command, refused.out, refused.err)
        assert f"topic {client.topic}" in refused.err


@pytest.mark.parametrize("revoked", [["READ"], ["READ", "DESCRIBE"]], ids=["read", "all"])
def test_a_revoked_right_is_reported_and_used_again_when_granted(client, database, revoked):
    with client.commands.started("ingest") as process:

        def reached(count):
            waiting.until(
                lambda: sum(next_offsets(database, client.topic).values()) == count,
                f"{count} records",
                seconds_max=WAIT_S_MAX,
            )

        reached(10)
        client.kafka.remove_acl(client.name, *revoked, topic=client.topic)
        client.send()
        process.until(f"--operation READ --topic {client.topic}")
        client.kafka.add_acl(client.name, *revoked, topic=client.topic)
        reached(20)
        output = "".join(process.err)

    assert "topic_missing" not in output
    assert "member_timed_out" not in output


def test_a_missing_topic_of_the_default_list_is_a_warning_and_a_configured_one_is_refused(
    secured_kafka, database, client
):
    kafka = secured_kafka
    kafka.create_topic("Notifications")
    kafka.add_acl(client.name, "READ", "DESCRIBE", topic="Notifications")
    settings = dict(client.commands._settings)
    del settings["PIPELINE_TOPICS"]
    default = Commands()
    default._settings = settings

    ingested = default.run("ingest", "--until-end")
    assert ingested.code == 0, ingested.err
    [warned] = [line for line in ingested.err.splitlines() if "topic_not_available" in line]
    assert "Prices" in warned
    assert "PIPELINE_TOPICS=Notifications" in warned
    checked = default.run("check")
    assert checked.code == 0, checked.out
    assert "Prices needs a separate contract" in " ".join(checked.out.split())

    explicit = default.with_(topics="Notifications,Prices")
    for command in (["check"], ["ingest", "--until-end"]):
        refused = explicit.run(*command)
        assert refused.code == 78
        assert "Prices" in refused.out + refused.err
    kafka.delete_topic("Notifications")


@pytest.mark.parametrize("missing", ["WRITE", "CREATE", "topic"])
def test_simulate_without_rights_names_topic_user_and_right(client, missing):
    kafka, topic = client.kafka, client.topic
    arguments = ["simulate", "--events", "50", "--topic", topic]
    if missing == "CREATE":
        arguments = [*arguments[:-1], topic + "-new", "--create-topics"]
    elif missing == "topic":
        arguments = [*arguments[:-1], topic + "-unknown"]

    result = client.commands.run(*arguments)

    assert result.code == 78, result.err
    assert "Traceback" not in result.err
    for named in (topic, client.name, "WRITE" if missing == "topic" else missing):
        assert named in result.err
    kafka.add_acl(client.name, "WRITE", "CREATE", topic=topic, prefixed=True)
    if missing != "topic":
        assert client.commands.run(*arguments).code == 0
