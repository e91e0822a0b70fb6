"""Apache Kafka for tests and benchmarks: any cluster, or one node of our own from its jars."""

import base64
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from confluent_kafka import KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, NewPartitions, NewTopic

from pipeline.sandbox.servers.guard import Guarded
from pipeline.sandbox.servers.postgres import free_port

START_SECONDS_MAX = 60.0
STOP_SECONDS_MAX = 20.0
ADMIN_SECONDS_MAX = 15.0
MAVEN_SECONDS_MAX = 600.0
POLL_SECONDS = 0.05
LOG_LINES_SHOWN = 20
OLDEST_JAVA = 17

_HERE = Path(__file__).resolve().parent
_POM = _HERE / "pom.xml"
_CACHE = _HERE.parents[1] / ".cache" / "kafka"

THREE_WAYS = (
    "  1. Java 17 or newer and Maven: the jars are downloaded once\n"
    "  2. Docker: an engine that answers\n"
    "  3. PIPELINE_TEST_KAFKA=host:port of a broker that tests may use"
)


class BrokerMissingError(RuntimeError):
    """No Apache Kafka is available or can be started; the message has the reason and three ways."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"no Apache Kafka for the tests: {reason}. Three ways to have one:\n{THREE_WAYS}"
        )
        self.reason = reason


# -------------------------------------------------------------------------------------- any cluster


class Kafka:
    """A cluster that tests use. Each call returns when its effect is visible."""

    def __init__(self, bootstrap_servers: str) -> None:
        self._bootstrap_servers = bootstrap_servers

    @property
    def bootstrap_servers(self) -> str:
        """Where clients connect, without encryption or login."""
        return self._bootstrap_servers

    @cached_property
    def admin(self) -> AdminClient:
        """For other requests; it continues by itself after a restart of the broker."""
        return AdminClient(
            {
                "bootstrap.servers": self.bootstrap_servers,
                "log_level": 0,  # some tests stop the broker on purpose
                "reconnect.backoff.max.ms": 200,
            }
        )

    def create_topic(
        self, name: str, partitions: int = 1, config: Mapping[str, str] | None = None
    ) -> None:
        """Make an empty topic; ``config`` is Kafka's, e.g. ``{"cleanup.policy": "compact"}``."""
        topic = NewTopic(name, partitions, 1, config=dict(config or {}))
        self._done(self.admin.create_topics([topic]))
        self._until(lambda: self._partitions_led(name) == partitions, f"{name} has its leaders")

    def delete_topic(self, name: str) -> None:
        """Delete a topic with its records."""
        self._done(self.admin.delete_topics([name]))
        self._until(lambda: self._partitions_led(name) is None, f"{name} is gone")

    def create_partitions(self, name: str, total: int) -> None:
        """Give a topic more partitions, up to ``total``."""
        self._done(self.admin.create_partitions([NewPartitions(name, total)]))
        self._until(lambda: self._partitions_led(name) == total, f"{name} has its leaders")

    def delete_records(self, topic: str, partition: int, before: int) -> None:
        """Make ``before`` the first offset of a partition, as retention would."""
        self._done(self.admin.delete_records([TopicPartition(topic, partition, before)]))

    def answers(self) -> bool:
        """Whether a broker of the cluster answers within a second."""
        try:
            return bool(self.admin.list_topics(timeout=1).brokers)
        except KafkaException:
            return False

    def wait_until_it_answers(
        self, seconds_max: float, *, has_ended: Callable[[], bool] = lambda: False
    ) -> bool:
        """Wait for the first answer; False if the server ends or the time is over first."""
        deadline = time.monotonic() + seconds_max
        while not self.answers():
            if has_ended() or time.monotonic() > deadline:
                return False
        return True

    def _partitions_led(self, name: str) -> int | None:
        topic = self.admin.list_topics(timeout=ADMIN_SECONDS_MAX).topics.get(name)
        if topic is None:
            return None
        return sum(partition.leader >= 0 for partition in topic.partitions.values())

    @staticmethod
    def _done(futures: Mapping[Any, Future[Any]]) -> None:
        for future in futures.values():
            future.result(ADMIN_SECONDS_MAX)

    @staticmethod
    def _until(condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + ADMIN_SECONDS_MAX
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {ADMIN_SECONDS_MAX:.0f} s: {what}")
            time.sleep(POLL_SECONDS)


# ------------------------------------------------------------------------------- one of our own


class KafkaServer(Kafka):
    """One KRaft node, broker and controller, on the loopback; it ends with this process.

    As a context manager it starts on entry; on exit it ends and its folder is removed.

    Args:
        settings: Anything for ``server.properties``, above ``SETTINGS``.

    Raises:
        BrokerMissingError: No Java, or no jars.
    """

    def __init__(self, settings: Mapping[str, str] | None = None) -> None:
        self._java = [find_java(), *_JAVA_OPTIONS, "-cp", class_path()]
        self._port, controller = free_port(), free_port()
        super().__init__(f"127.0.0.1:{self._port}")
        self.directory = Path(tempfile.mkdtemp(prefix="pipeline-kafka-"))
        self.log = self.directory / "server.log"
        self._settings = {
            **SETTINGS,
            "controller.quorum.voters": f"1@127.0.0.1:{controller}",
            "listeners": f"PLAINTEXT://{self.bootstrap_servers},CONTROLLER://127.0.0.1:{controller}",
            "advertised.listeners": f"PLAINTEXT://{self.bootstrap_servers}",
            "log.dirs": str(self.directory / "data"),
            **(settings or {}),
        }
        self._server: Guarded | None = None

    @property
    def pid(self) -> int:
        """The process id of Java."""
        return self._running.pid

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Start the node with its earlier data, and return when it answers."""
        configuration = self.directory / "server.properties"
        configuration.write_text("".join(f"{k}={v}\n" for k, v in self._settings.items()))
        if not (self.directory / "data" / "meta.properties").exists():
            self._format(configuration)
        server = self._server = Guarded(
            [*self._java, "kafka.Kafka", configuration], log=self.log, remove=self.directory
        )
        if not self.wait_until_it_answers(
            START_SECONDS_MAX, has_ended=lambda: server.exit_status() is not None
        ):
            last = "\n".join(self.log.read_text().splitlines()[-LOG_LINES_SHOWN:])
            raise RuntimeError(f"Kafka in {self.directory} did not start:\n{last}")

    def stop(self) -> None:
        """A controlled shutdown; its data is kept."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL; the next start recovers."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Stop and start again: same port, same records."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """SIGSTOP: connections stay open and the broker does not answer."""
        self._running.send(signal.SIGSTOP)
        self._until(self._is_stopped, "Kafka is paused")

    def resume(self) -> None:
        """Continue after a pause."""
        self._running.send(signal.SIGCONT)

    def close(self) -> None:
        """End the node and remove its folder."""
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    @property
    def _running(self) -> Guarded:
        if self._server is None:
            raise RuntimeError("Kafka is not running")
        return self._server

    def _is_stopped(self) -> bool:
        ps = ["ps", "-o", "stat=", "-p", str(self.pid)]
        return subprocess.run(ps, capture_output=True, text=True, check=True).stdout.startswith("T")

    def _end(self, number: signal.Signals) -> None:
        if self._server is not None:
            self._server.end(number, grace_seconds=STOP_SECONDS_MAX)
            self._server = None

    def _format(self, configuration: Path) -> None:
        cluster_id = base64.urlsafe_b64encode(secrets.token_bytes(16)).decode().rstrip("=")
        # Kafka's tools read an id that begins with a dash as an option.
        cluster_id = cluster_id.replace("-", "x")
        formatted = subprocess.run(
            [
                *(*self._java, "kafka.tools.StorageTool", "format"),
                *("--cluster-id", cluster_id, "--config", configuration),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        if formatted.returncode != 0:
            raise RuntimeError(f"Kafka could not format its storage:\n{formatted.stderr.strip()}")


# One node that starts and reacts quickly: no automatic topics, no wait before a rebalance,
# groups may ask for short timeouts, retention and compaction act within a second.
SETTINGS: Mapping[str, str] = {
    "process.roles": "broker,controller",
    "node.id": "1",
    "controller.listener.names": "CONTROLLER",
    "inter.broker.listener.name": "PLAINTEXT",
    "auto.create.topics.enable": "false",
    "delete.topic.enable": "true",
    "offsets.topic.replication.factor": "1",
    "offsets.topic.num.partitions": "3",
    "transaction.state.log.replication.factor": "1",
    "transaction.state.log.min.isr": "1",
    "transaction.state.log.num.partitions": "3",
    "share.coordinator.state.topic.replication.factor": "1",
    "share.coordinator.state.topic.min.isr": "1",
    "group.initial.rebalance.delay.ms": "0",
    "group.min.session.timeout.ms": "1000",
    "group.consumer.min.session.timeout.ms": "1000",
    "group.consumer.session.timeout.ms": "6000",
    "group.consumer.min.heartbeat.interval.ms": "100",
    "group.consumer.heartbeat.interval.ms": "300",
    "broker.heartbeat.interval.ms": "500",
    "broker.session.timeout.ms": "3000",
    "log.initial.task.delay.ms": "500",
    "log.retention.check.interval.ms": "500",
    "log.segment.delete.delay.ms": "500",
    "log.cleaner.backoff.ms": "500",
    "log.cleaner.dedupe.buffer.size": "8388608",
}

_JAVA_OPTIONS = (
    "-Xms128m",
    "-Xmx512m",
    "-XX:+UseSerialGC",
    "-XX:-UsePerfData",
    f"-Dlog4j2.configurationFile={_HERE / 'log4j2.properties'}",
)


# ----------------------------------------------------------------------------- Java and the jars


def find_java() -> str:
    """The path of a Java that is new enough.

    Raises:
        BrokerMissingError: Java is missing.
    """
    home = os.environ.get("JAVA_HOME")
    java = shutil.which("java", path=f"{home}/bin" if home else None) or shutil.which("java")
    if java is None:
        raise BrokerMissingError("Java is not installed")
    java_output = subprocess.run(
        [java, "-version"], capture_output=True, text=True, check=False
    ).stderr
    version = re.search(r'version "(\d+)', java_output)
    if version is None or int(version[1]) < OLDEST_JAVA:
        raise BrokerMissingError(f"{java} is not Java {OLDEST_JAVA} or newer")
    return java


def class_path() -> str:
    """Kafka's jars as a class path; downloaded by Maven once, then used offline.

    Raises:
        BrokerMissingError: They are missing, and Maven is missing or could not download them.
    """
    _CACHE.mkdir(parents=True, exist_ok=True)
    (_CACHE.parent / ".gitignore").write_text("*\n")
    cached = _cached_class_path()
    with (_CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two runs may start at once
        if not _is_whole(cached):
            _resolve(cached)
    return cached.read_text().strip()


def jars_obtainable() -> bool:
    """Whether the jars are present, or Maven can download them."""
    return _is_whole(_cached_class_path()) or shutil.which("mvn") is not None


def _cached_class_path() -> Path:
    return _CACHE / f"classpath-{hashlib.sha256(_POM.read_bytes()).hexdigest()[:12]}.txt"


def _is_whole(cached: Path) -> bool:
    return cached.exists() and all(
        Path(jar).exists() for jar in cached.read_text().strip().split(os.pathsep)
    )


def _resolve(cached: Path) -> None:
    maven = shutil.which("mvn")
    if maven is None:
        raise BrokerMissingError("Maven is missing, which downloads Kafka's jars")
    partial = cached.with_suffix(".partial")
    resolved = subprocess.run(
        [
            *(maven, "--quiet", "--batch-mode", "--file", _POM),
            *("dependency:build-classpath", f"-Dmdep.outputFile={partial}"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=MAVEN_SECONDS_MAX,
    )
    if resolved.returncode != 0:
        last = "\n".join(resolved.stdout.strip().splitlines()[-LOG_LINES_SHOWN:])
        raise BrokerMissingError(f"Maven could not fetch Kafka's jars:\n{last}\n")
    partial.rename(cached)
