"""Secrets and personal data pass through every command and failure, and show nowhere.

Every command of the program has a run here; one that has none fails the first test. What is looked
for stands in ``tests/canaries.py``.
"""

import json
import secrets
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from urllib.parse import quote

import pytest
from confluent_kafka import Producer
from psycopg.sql import SQL, Identifier, Literal

from pipeline import catalogue
from pipeline.catalogue import Catalogue
from pipeline.db import open_engine
from pipeline.readmodel import Custom, integer
from pipeline.sandbox.servers.broker import MockBroker
from pipeline.sandbox.servers.postgres import PostgresServer, free_port
from pipeline.schema.migrate import migrate
from tests import canaries
from tests.canaries import IBAN, NAME, TAX_ID, leaks
from tests.commands import Commands, InProcess, Result, command_names, wait
from tests.given import (
    create_tables,
    event,
    execution_event,
    order_event,
    some_id,
)
from tests.records import EVENT_ID, envelope
from tests.refusing_broker import RefusingBroker
from tests.servers import FAST_AND_UNSAFE
from tests.servers.databases import Database, fresh_database

TOPIC = "Notifications"
SIMULATED = "Simulated"
GOOD = 0
"""The offset of an event that nothing is wrong with."""
REFUSED = 1
"""The offset of an event whose amount is a name."""
PLACE = f"{TOPIC}:0:{REFUSED}"

HEADERS: list[tuple[str, str | bytes | None]] = [
    ("name", NAME.encode()),
    ("iban", IBAN.encode()),
    (f"tax-{TAX_ID}", b"\xff"),
]
KEY = f"{NAME}:{TAX_ID}".encode()
PERSON = {"client_reference": f"{NAME} {IBAN} {TAX_ID}"}


def records() -> list[bytes | None]:
    """Personal data wherever an event has room for it, in good events and in bad ones."""
    events = [
        order_event("NEW", at=1, **PERSON),
        order_event("NEW", at=2, order="b", **PERSON | {"cash_amount": NAME}),
        order_event("NEW", at=3, order="c", updated_at=IBAN),
        order_event("NEW", at=4, id=TAX_ID),
        event("ORDER.NEW", {"id": some_id("d"), "status": {"name": NAME, "iban": IBAN}}),
        event("ORDER.NEW", {"id": some_id("e"), "status": NAME}),
        order_event("NEW", at=7, order="f", executions=[{"id": NAME}]),
        execution_event("FILLED", at=8, price=IBAN),
        event("USER.CREATED", {"id": NAME, "first_name": NAME, "tax_id": TAX_ID}),
        event("COMET.SEEN", {"id": some_id("x"), "name": NAME, "iban": IBAN}),
    ]
    hostile = [
        *(envelope(id=NAME), envelope(created_at=IBAN), envelope(type={"name": NAME})),
        envelope(object={"id": TAX_ID, "account_id": IBAN}),
        # What no jsonb takes: found before COPY, or refused by it.
        *(envelope(note=f"{NAME}\0{IBAN}"), envelope(note="x").replace(b'"x"', b"1e200000")),
        envelope(note=NAME).replace(NAME.encode(), rf"{NAME}\ud800".encode()),
        *(NAME.encode(), envelope(note=NAME)[:-1], f'"{NAME} {IBAN}"'.encode()),
        b'{"name": "' + NAME.encode() + b'", "a": ' + b"[" * 8000 + b"]" * 8000 + b"}",
        f'{{"id": "{EVENT_ID}", "id": "{IBAN}", "iban": "{IBAN}"}}'.encode(),
        NAME.encode("utf-16"),
        None,
    ]
    return [*(json.dumps(event).encode() for event in events), *hostile]


@dataclass(frozen=True)
class House:
    """A database and brokers full of canaries, and the settings that lead to them."""

    server: PostgresServer
    broker: MockBroker
    database: Database
    role: str
    commands: Commands
    first_run: Result
    argv: str
    sessions: str

    def url(self, *, password: str = canaries.DATABASE_PASSWORD, port: int | None = None) -> str:
        """The database, for the canary's role."""
        address = f"127.0.0.1:{port or self.server.port}/{self.database.name}"
        return f"postgresql://{self.role}:{quote(password, safe='')}@{address}"


@pytest.fixture(scope="module")
def house() -> Iterator[House]:
    role = f"canary_{secrets.token_hex(4)}"
    with (
        PostgresServer(settings=FAST_AND_UNSAFE) as server,
        MockBroker() as broker,
        fresh_database(server) as database,
    ):
        migrate(database.url)
        with database.connect() as db:
            db.execute(
                SQL("CREATE ROLE {} SUPERUSER LOGIN PASSWORD {}").format(
                    Identifier(role), Literal(canaries.DATABASE_PASSWORD)
                )
            )
            # As `pipeline check` recommends it.
            db.execute(SQL("ALTER ROLE {} SET log_min_messages = 'fatal'").format(Identifier(role)))
        for topic in (TOPIC, SIMULATED):
            broker.create_topic(topic, 2)
        producer = Producer({"bootstrap.servers": broker.bootstrap_servers})
        for value in records():
            producer.produce(TOPIC, value, KEY, partition=0, headers=HEADERS)
        producer.flush()
        empty = House(server, broker, database, role, Commands(), Result(0, "", ""), "", "")
        commands = Commands(
            database_url=empty.url(),
            kafka_bootstrap_servers=broker.bootstrap_servers,
            kafka_security_protocol="PLAINTEXT",
            kafka_group_protocol="consumer",
            kafka_username="somebody",
            kafka_password=canaries.KAFKA_PASSWORD,
            kafka_options=(
                f"ssl.key.password={canaries.KEY_PASSWORD},"
                f"sasl.oauthbearer.client.secret={canaries.TOKEN},debug=broker"
            ),
            topics=TOPIC,
            log_level="debug",
            log_format="json",
            # One dead letter after the other would make a projector itself suspect.
            dead_letter_budget="1000",
        )
        yield _filled(empty, commands)


def _filled(house: House, commands: Commands) -> House:
    """Ingest and project as people do, look at the process meanwhile, and crash it at the end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONFAULTHANDLER", "1")
        with commands.started("run") as process, house.database.connect() as db:

            def is_projected() -> bool:
                done = db.execute(
                    "SELECT count(*) FROM pipeline.projection_checkpoints WHERE next_offset = %s",
                    [len(records())],
                ).fetchone()
                return done is not None and done[0] == len(catalogue.load().models)

            wait(is_projected)
            argv = subprocess.run(
                ["ps", "-e", "-ww", "-o", "args"], capture_output=True, text=True, check=True
            ).stdout
            sessions = repr(
                db.execute("SELECT application_name, query FROM pg_stat_activity").fetchall()
            )
            process.send(signal.SIGABRT)
            code = process.wait()
        result = Result(code, "".join(process.out), "".join(process.err))
    return replace(house, commands=commands, first_run=result, argv=argv, sessions=sessions)


@pytest.fixture
def pipeline(monkeypatch, capfd) -> InProcess:
    """Runs commands here; what libraries in C write is seen too."""
    # Brokers of the mock never tell it, and need not be waited for so often.
    monkeypatch.setattr("pipeline.kafka.metadata.OPTIONAL_REQUEST_S_MAX", 0.2)
    return InProcess(monkeypatch, capfd)


def shown(*results: Result) -> list[str]:
    return sorted({leak for result in results for leak in leaks(result.out + result.err)})


# ---------------------------------------------------------------------------------------- success

RUNS: Mapping[str, Sequence[Sequence[str]]] = {
    "check": [[], ["--json"]],
    "dead-letters list": [[], ["--json"]],
    "dead-letters retry": [[], ["--json"]],
    "dead-letters show": [[PLACE], [PLACE, "--json"]],
    # Takes a minute: tests/integration/test_demo.py has it in an environment of canaries.
    "demo": [["--help"]],
    "events": [
        *([], ["--json"], ["--bad"], ["--bad", "--json"], ["--type", "ORDER"], [EVENT_ID]),
        *(["--at", f"{TOPIC}:0:0-99"], ["--at", f"{TOPIC}:0:0-99", "--json"]),
        ["--follow", "--since", "1h", "--limit", "5"],
    ],
    "gaps accept": [[TOPIC], [TOPIC, "--json"]],
    "gaps list": [[], ["--json"]],
    "ingest": [["--until-end"]],
    "migrate": [[], ["--json"], ["--plan"], ["--sql"]],
    "project": [["--until-end"]],
    "rebuild": [["--all"], ["--all", "--check", "--json"], ["orders", "--in-place"]],
    "rewind": [
        *([TOPIC, "--to", "earliest"], [TOPIC, "--to", "earliest", "--json"]),
        [TOPIC, "--to", "earliest", "--execute"],
    ],
    "run": [["--until-end"]],
    "simulate": [["--events", "40", "--topic", SIMULATED, "--chaos"]],
    "status": [[], ["--json"]],
    "verify": [[], ["--json"]],
}
each_command = pytest.mark.parametrize("command", RUNS)


def test_every_command_has_a_run_among_canaries():
    assert sorted(command_names()) == sorted(RUNS)


@pytest.mark.faults
def test_a_long_run_shows_no_canary_to_its_log_to_other_processes_or_in_a_crash(house):
    output = house.first_run.err

    assert '"event":"events_rejected"' in output.replace(" ", "")
    assert '"action": "pipeline dead-letters list ' in output
    assert "Fatal Python error: Aborted" in output
    assert "pipeline run" in house.sessions
    assert [leaks(text) for text in (output, house.first_run.out, house.argv, house.sessions)] == (
        [[]] * 4
    )


@each_command
def test_no_command_shows_a_canary(house, pipeline, command):
    results = [
        pipeline(house.commands, *command.split(), *arguments) for arguments in RUNS[command]
    ]

    assert {result.code for result in results} <= {0, 1}, results[-1].err
    assert shown(*results) == []


@pytest.mark.parametrize("form", [[], ["--json"]], ids=["people", "programs"])
def test_payloads_are_shown_on_request_and_secrets_never(house, pipeline, form):
    found = pipeline(house.commands, "events", "--at", f"{TOPIC}:0:{GOOD}", "--payload", *form)
    letter = pipeline(house.commands, "dead-letters", "show", PLACE, "--payload", *form)

    for result in (found, letter):
        assert result.code == 0
        assert {NAME, IBAN, TAX_ID} <= set(leaks(result.out))
        assert not set(leaks(result.out)) & set(canaries.SECRETS)
        assert leaks(result.err) == []


# ---------------------------------------------------------------------------------------- failures

MISSPELT = [
    *("postgresql//u:{}@h/d", "mysql://u:{}@h/d", "postgresql://u:{}@h:port/d", "u:{}@h:5432/d"),
    *("postgresql://u:{}@[h/d", "{}", "host=h user=u password={} dbname=d"),
]


@each_command
def test_no_command_shows_the_content_of_a_misspelt_url(pipeline, tmp_path, command):
    password = canaries.DATABASE_PASSWORD
    arguments = [*command.split(), *RUNS[command][0]]
    wrong_file = tmp_path / "pipeline.toml"
    wrong_file.write_text(f'kafka_password = "{canaries.KAFKA_PASSWORD}\n')
    wrong_type = tmp_path / "other.toml"
    wrong_type.write_text(f'kafka_password = ["{canaries.KAFKA_PASSWORD}"]\ngroup_id = 7\n')

    results = [
        *(pipeline(Commands(database_url=url.format(password)), *arguments) for url in MISSPELT),
        # The secret itself, where the name of its file is wanted; and brokers with a login.
        pipeline(Commands(kafka_password_file=canaries.KAFKA_PASSWORD), *arguments),
        pipeline(Commands(database_url_file=MISSPELT[0].format(password)), *arguments),
        pipeline(Commands(kafka_bootstrap_servers=f"u:{canaries.TOKEN}@kafka:9092"), *arguments),
        pipeline(Commands(kafka_options=f"sasl.password={canaries.TOKEN}"), *arguments),
        pipeline(Commands(kafka_options=f'{{"a": "{canaries.TOKEN}"'), *arguments),
        *(
            pipeline(Commands(), "--config", str(one), *arguments)
            for one in (wrong_file, wrong_type)
        ),
    ]

    assert {result.code for result in results} == ({0} if command == "demo" else {78})
    assert shown(*results) == []


def test_secrets_from_files_are_not_shown(house, pipeline, tmp_path):
    (tmp_path / "database").write_text(house.url() + "\n")
    (tmp_path / "PIPELINE_KAFKA_PASSWORD").write_text(canaries.KAFKA_PASSWORD)
    (tmp_path / "more.toml").write_text(
        f'kafka_options = {{"ssl.key.password" = "{canaries.KEY_PASSWORD}"}}\nnonsense = 1\n'
    )
    commands = Commands(
        database_url_file=str(tmp_path / "database"),
        secrets_dir=str(tmp_path),
        kafka_bootstrap_servers=house.broker.bootstrap_servers,
        kafka_security_protocol="PLAINTEXT",
        log_level="debug",
    )

    well = pipeline(commands, "status", "--json")
    refused = pipeline(commands, "--config", str(tmp_path / "more.toml"), "status")

    # For 30 s after its last sign of life, a process that crashed counts as alive.
    assert well.code in {0, 1}
    assert json.loads(well.out)["partitions"] != []
    assert refused.code == 78
    assert "nonsense" in refused.err
    assert shown(well, refused) == []


NEEDS_DATABASE = sorted(set(RUNS) - {"demo", "simulate"})


@pytest.fixture
def impatient(monkeypatch):
    """One-shot commands give servers up that are away after a moment, not after a minute."""
    monkeypatch.setattr("pipeline.outages.UNAVAILABLE_S_MAX", 0.1)
    monkeypatch.setattr("pipeline.kafka.metadata.REQUEST_S_MAX", 1.0)
    monkeypatch.setattr("pipeline.sandbox.simulator.producer._ANSWER_SECONDS_MAX", 1.0)


@pytest.mark.parametrize("command", NEEDS_DATABASE)
def test_no_command_shows_the_password_of_a_database_that_refuses_it(
    house, pipeline, impatient, command
):
    arguments = [*command.split(), *RUNS[command][0]]
    away = house.commands.with_(database_url=house.url(port=free_port()))
    # Only `check` looks at the brokers all the same.
    wrong = house.commands.with_(database_url=house.url(password=canaries.WRONG_PASSWORD))

    results = [pipeline(one, *arguments) for one in (away, wrong)]

    assert [result.code for result in results] == [69, 78]
    assert shown(*results) == []


@pytest.mark.faults
@pytest.mark.parametrize("command", ["check", "ingest", "simulate"])
def test_a_login_that_kafka_refuses_shows_no_password(house, pipeline, monkeypatch, command):
    # A login takes the client a second or two, so questions get some more.
    monkeypatch.setattr("pipeline.outages.UNAVAILABLE_S_MAX", 0.1)
    monkeypatch.setattr("pipeline.kafka.metadata.REQUEST_S_MAX", 6.0)
    monkeypatch.setattr("pipeline.sandbox.simulator.producer._ANSWER_SECONDS_MAX", 6.0)
    with RefusingBroker() as broker:
        refused = house.commands.with_(
            kafka_bootstrap_servers=broker.bootstrap_servers,
            kafka_security_protocol="SASL_PLAINTEXT",
            kafka_sasl_mechanism="PLAIN",
            kafka_options="debug=broker,reconnect.backoff.ms=2000",
        )

        result = pipeline(refused, *command.split(), *RUNS[command][0])

    assert any(canaries.KAFKA_PASSWORD.encode() in login for login in broker.logins)
    assert result.code == 78
    assert "invalid credentials" in result.err
    output = result.out + result.err
    assert f"Kafka at {broker.bootstrap_servers} for user " in output
    assert "refused the login" in output
    assert shown(result) == []


@pytest.mark.parametrize("command", ["check", "ingest", "run", "simulate"])
def test_an_option_that_the_client_refuses_is_named_without_its_value(house, pipeline, command):
    wrong = house.commands.with_(kafka_options=f"client.dns.lookup={canaries.TOKEN}")

    result = pipeline(wrong, *command.split(), *RUNS[command][0])

    assert result.code == 78
    assert "client.dns.lookup" in result.out + result.err
    assert shown(result) == []


def test_the_error_for_a_record_that_is_already_in_the_log_shows_no_content(house, pipeline):
    """PostgreSQL's DETAIL would repeat its key, CONTEXT its row."""
    back = "UPDATE pipeline.consumer_offsets SET next_offset = next_offset - 5 WHERE partition = 0"
    forth = back.replace("- 5", "+ 5")
    with house.database.connect() as db:
        db.execute(back)

        result = pipeline(house.commands, "ingest", "--until-end")

        db.execute(forth)
    assert result.code == 70
    assert "UniqueViolation (23505)" in result.err
    assert "DETAIL" not in result.err
    assert "CONTEXT" not in result.err
    assert shown(result) == []


def raising(_db: object, _batch: object) -> None:
    """What a projector's author may write."""
    found = {"name": NAME}
    raise ValueError(f"no account of {found['name']}, {IBAN}")


@pytest.mark.parametrize("command", ["project", "run"])
def test_the_error_of_a_projector_shows_no_content_of_its_event(
    house, pipeline, monkeypatch, command
):
    faulty = Custom(
        table=f"raising_{command}",
        comment="Nothing.",
        events="ORDER.*",
        key=[integer("id", "Id.")],
        reads=[],
        apply=raising,
    )
    engine = open_engine(house.database.url, application="test")
    create_tables(engine, faulty)
    engine.dispose()
    monkeypatch.setattr("pipeline.catalogue.load", lambda _folders: Catalogue((faulty,)))

    result = pipeline(house.commands, command, "--until-end")

    with house.database.connect() as db:
        db.execute(f"DROP TABLE {faulty.tables[0].fullname}".encode())
    assert result.code == 70
    assert "ValueError: ***" in result.err
    assert "in raising" in result.err
    assert shown(result) == []


def test_a_crash_shows_its_stack_and_no_value(house, pipeline, monkeypatch):
    def look(*_: object) -> None:
        held = house.url()
        thread = threading.Thread(target=raising, args=[held, held])
        thread.start()
        thread.join()
        raise RuntimeError(f"could not look at {held} for {NAME}")

    monkeypatch.setattr("pipeline.health.status.read_status", look)

    result = pipeline(house.commands, "status")

    assert result.code == 70
    assert [line["event"] for line in result.log if line["level"] == "critical"] == [
        *("thread_crashed", "crashed")
    ]
    assert shown(result) == []


def test_postgresqls_own_log_holds_no_value_with_the_settings_that_check_requires(house):
    """The last test here, so that all the others have left their traces."""
    assert "ready to accept connections" in house.server.log.read_text()
    assert leaks(house.server.log.read_text()) == []
