"""A broker without Kafka: librdkafka's mock cluster, in a process of its own.

The library inside the confluent-kafka wheel carries it; other processes connect to it by TCP as to
any broker. It serves the demo and quick tests, and it is not Kafka: it keeps 5 MB per partition and
nothing after its end, delivers aborted records, does not fence transactional producers, hands
partitions over only under ``group.protocol=consumer``, and answers no admin request. Its interface
is declared unstable, so it is used only here, after a check that all of it exists.

``python -m pipeline.sandbox.servers.broker`` is the process: it prints its address, then executes
one command per line of stdin, as JSON, and ends with its stdin.
"""

import ctypes
import ctypes.util
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Self

STOP_SECONDS_MAX = 5.0
BROKER_ID = 1
REBALANCE_DELAY_MS = 100
SESSION_TIMEOUT_MS = 6_000
HEARTBEAT_INTERVAL_MS = 300

_CONSUMER_TYPE = 1
_PARTITION_REPLICAS = 1


class MockBrokerError(RuntimeError):
    """The mock cluster is not in this librdkafka, or refused a command."""


class MockBroker:
    """A mock broker on the loopback interface; it ends with this process, however that ends.

    As a context manager it starts on entry and ends on exit. All it holds is lost at its end, and
    the next one has another cluster id.

    Raises:
        MockBrokerError: From every method: the broker refused, or is not running.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._bootstrap_servers = ""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def bootstrap_servers(self) -> str:
        """Where clients connect, without encryption or login."""
        return self._bootstrap_servers

    def start(self) -> None:
        """Start an empty broker and return when it listens."""
        # Only this process holds the other end of its stdin, which is its lifeline (see
        # `pipeline.lifeline`). It has its own session, so that Ctrl-C reaches only us.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.sandbox.servers.broker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            self._bootstrap_servers = self._answer()
        except MockBrokerError:
            self.stop()
            raise

    def stop(self) -> None:
        """End the broker and everything it holds."""
        process, self._process = self._process, None
        if process is None:
            return
        try:
            # Closes its stdin.
            process.communicate(timeout=STOP_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()

    def create_topic(self, name: str, partitions: int) -> None:
        """Create an empty topic. A topic that a client requests first has 4 partitions."""
        self._request("create_topic", name, partitions)

    def delete_topic(self, name: str) -> None:
        """Delete a topic with its records. If it is recreated, its offsets start at 0."""
        self._request("delete_topic", name)

    def delete_records(self, topic: str, partition: int, before: int) -> None:
        """Make ``before`` the first offset of a partition, as retention would."""
        self._request("delete_records", topic, partition, before)

    def set_down(self) -> None:
        """Close all connections and refuse new ones; what it holds stays."""
        self._request("set_down")

    def set_up(self) -> None:
        """Accept connections again; clients are back within about a second."""
        self._request("set_up")

    def push_errors(self, api_key: int, *errors: int) -> None:
        """Answer the next requests of one kind with these errors, one each.

        Args:
            api_key: Kafka's number of the request: 0 Produce, 1 Fetch, 8 OffsetCommit …
            errors: Kafka's error codes, e.g. 29 for a topic that one may not read.
        """
        self._request("push_errors", api_key, *errors)

    def _request(self, command: str, *arguments: str | int) -> None:
        if self._process is None or self._process.stdin is None:
            raise MockBrokerError("the mock broker is not running")
        try:
            self._process.stdin.write(json.dumps([command, *arguments]) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise MockBrokerError("the mock broker has ended") from None
        self._answer()

    def _answer(self) -> str:
        line = self._process.stdout.readline() if self._process and self._process.stdout else ""
        if not line:
            raise MockBrokerError("the mock broker has ended")
        answer = json.loads(line)
        if "error" in answer:
            raise MockBrokerError(answer["error"])
        return str(answer["ok"])


# From here on: the broker's own process.

_POINTER, _INT, _TEXT = ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p
_FUNCTIONS: dict[str, tuple[type | None, list[type]]] = {
    "rd_kafka_conf_new": (_POINTER, []),
    "rd_kafka_conf_set": (_INT, [_POINTER, _TEXT, _TEXT, _TEXT, ctypes.c_size_t]),
    "rd_kafka_new": (_POINTER, [_INT, _POINTER, _TEXT, ctypes.c_size_t]),
    "rd_kafka_err2str": (_TEXT, [_INT]),
    "rd_kafka_mock_cluster_new": (_POINTER, [_POINTER, _INT]),
    "rd_kafka_mock_cluster_bootstraps": (_TEXT, [_POINTER]),
    "rd_kafka_mock_topic_create": (_INT, [_POINTER, _TEXT, _INT, _INT]),
    "rd_kafka_mock_topic_delete": (_INT, [_POINTER, _TEXT]),
    "rd_kafka_mock_partition_delete_records": (
        _INT,
        [_POINTER, _TEXT, ctypes.c_int32, ctypes.c_int64],
    ),
    "rd_kafka_mock_broker_set_down": (_INT, [_POINTER, ctypes.c_int32]),
    "rd_kafka_mock_broker_set_up": (_INT, [_POINTER, ctypes.c_int32]),
    "rd_kafka_mock_push_request_errors_array": (
        None,
        [_POINTER, ctypes.c_int16, ctypes.c_size_t, ctypes.POINTER(_INT)],
    ),
    "rd_kafka_mock_group_initial_rebalance_delay_ms": (None, [_POINTER, ctypes.c_int32]),
    "rd_kafka_mock_set_group_consumer_session_timeout_ms": (None, [_POINTER, _INT]),
    "rd_kafka_mock_set_group_consumer_heartbeat_interval_ms": (None, [_POINTER, _INT]),
}


def _librdkafka() -> ctypes.CDLL:
    """The library that the wheel ships, else the system's, with every function that we need.

    Raises:
        MockBrokerError: There is none, or it has lost a function.
    """
    found = _shipped_library() or ctypes.util.find_library("rdkafka")
    if found is None:
        raise MockBrokerError(
            "found no librdkafka, neither in the confluent-kafka wheel nor on this machine. "
            "Install the confluent-kafka wheel"
        )
    library = ctypes.CDLL(str(found))
    missing = [name for name in _FUNCTIONS if not hasattr(library, name)]
    if missing:
        raise MockBrokerError(
            f"{found} has no mock cluster that this program can use: {', '.join(missing)} are "
            "missing. Use a real Kafka, or the version of confluent-kafka in requirements.txt"
        )
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def _shipped_library() -> Path | None:
    package = importlib.util.find_spec("confluent_kafka")
    for place in (package.submodule_search_locations or ()) if package else ():
        # Linux keeps it beside the package, macOS inside it.
        for folder in (Path(place).with_name("confluent_kafka.libs"), Path(place, ".dylibs")):
            for library in sorted(folder.glob("librdkafka*")):
                return library
    return None


class _Cluster:
    """The mock cluster inside this process; each method is a command."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        reason = ctypes.create_string_buffer(512)
        configuration = library.rd_kafka_conf_new()
        # The cluster needs a client around it, which would complain of having no broker.
        library.rd_kafka_conf_set(configuration, b"log_level", b"3", reason, len(reason))
        client = library.rd_kafka_new(_CONSUMER_TYPE, configuration, reason, len(reason))
        if not client:
            raise MockBrokerError(reason.value.decode())
        self._cluster = library.rd_kafka_mock_cluster_new(client, 1)
        if not self._cluster:
            raise MockBrokerError("librdkafka could not start its mock cluster")
        library.rd_kafka_mock_group_initial_rebalance_delay_ms(self._cluster, REBALANCE_DELAY_MS)
        library.rd_kafka_mock_set_group_consumer_session_timeout_ms(
            self._cluster, SESSION_TIMEOUT_MS
        )
        library.rd_kafka_mock_set_group_consumer_heartbeat_interval_ms(
            self._cluster, HEARTBEAT_INTERVAL_MS
        )

    def bootstrap_servers(self) -> str:
        listening: bytes = self._library.rd_kafka_mock_cluster_bootstraps(self._cluster)
        return listening.decode()

    def create_topic(self, name: str, partitions: int) -> None:
        self._check(
            self._library.rd_kafka_mock_topic_create(
                self._cluster, name.encode(), partitions, _PARTITION_REPLICAS
            )
        )

    def delete_topic(self, name: str) -> None:
        self._check(self._library.rd_kafka_mock_topic_delete(self._cluster, name.encode()))

    def delete_records(self, topic: str, partition: int, before: int) -> None:
        self._check(
            self._library.rd_kafka_mock_partition_delete_records(
                self._cluster, topic.encode(), partition, before
            )
        )

    def set_down(self) -> None:
        self._check(self._library.rd_kafka_mock_broker_set_down(self._cluster, BROKER_ID))

    def set_up(self) -> None:
        self._check(self._library.rd_kafka_mock_broker_set_up(self._cluster, BROKER_ID))

    def push_errors(self, api_key: int, *errors: int) -> None:
        self._library.rd_kafka_mock_push_request_errors_array(
            self._cluster, api_key, len(errors), (_INT * len(errors))(*errors)
        )

    def _check(self, code: int) -> None:
        if code:
            raise MockBrokerError(self._library.rd_kafka_err2str(code).decode())


def _serve() -> None:
    def say(answer: dict[str, str]) -> None:
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()

    try:
        cluster = _Cluster(_librdkafka())
    except (MockBrokerError, OSError) as error:
        say({"error": str(error)})
        return
    commands: dict[str, Callable[..., None]] = {
        "create_topic": cluster.create_topic,
        "delete_topic": cluster.delete_topic,
        "delete_records": cluster.delete_records,
        "set_down": cluster.set_down,
        "set_up": cluster.set_up,
        "push_errors": cluster.push_errors,
    }
    say({"ok": cluster.bootstrap_servers()})
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        try:
            commands[command](*arguments)
        except MockBrokerError as error:
            say({"error": f"{command} {arguments}: {error}"})
        else:
            say({"ok": ""})
    # The cluster is not destroyed, which would wait for its clients: it goes with the process.


if __name__ == "__main__":
    _serve()
