"""Workers as real processes, what is done to them, and the checks of what they leave."""

import base64
import itertools
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import psycopg
from psycopg.sql import SQL, Identifier, Literal

from pipeline import catalogue
from pipeline.partitions import Partition
from pipeline.sandbox.simulator import Books
from pipeline.schema.migrate import migrate
from pipeline.schema.roles import ROLES
from tests import canaries, waiting
from tests.faults.ledger import Feed, Headers, Ledger
from tests.given import full
from tests.servers import Kafka
from tests.servers.databases import Database

WAIT_SECONDS_MAX = 60.0
"""Longest wait for what should happen within a few seconds; the machine may be busy."""
PASSWORD = "c4n4ry-of-the-workers"
LOG_LINES_SHOWN = 40
DIFFERENCES_SHOWN = 5

PROJECT = Path(__file__).resolve().parents[2]
ENTRY = [sys.executable, "-m", "pipeline"]

QUICK_TO_NOTICE = "session.timeout.ms=2000,heartbeat.interval.ms=400,reconnect.backoff.max.ms=500"
"""A classic member that sends nothing loses its partitions after two seconds."""


until = partial(waiting.until, seconds_max=WAIT_SECONDS_MAX)


# ------------------------------------------------------------------------------------------ workers


class Worker:
    """One process of the program, with its log and its output on stdout.

    Args:
        command: What to run, e.g. ``["ingest", "--until-end"]``.
        environment: Its settings.
        log: Where its stderr goes.
        role: The database role it logs in as.
    """

    def __init__(
        self, command: list[str], environment: Mapping[str, str], log: Path, role: str
    ) -> None:
        self.log = log
        self.output = log.with_suffix(".out")
        self.role = role
        # The kernel ends the worker if the tests are killed.
        tied = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
        with log.open("ab") as stderr, self.output.open("ab") as stdout:
            self._process = subprocess.Popen(
                [*tied, *ENTRY, *command],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env={**_foreign_environment(), **environment},
                cwd=PROJECT,
                start_new_session=True,
            )
        self.pid = self._process.pid

    @property
    def exit_code(self) -> int | None:
        """Minus the signal's number where one ended it; None while it runs."""
        return self._process.poll()

    def send(self, number: signal.Signals) -> None:
        """Send a signal, if the worker still runs."""
        if self.exit_code is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL, and wait until the process has ended."""
        self.send(signal.SIGKILL)
        self._process.wait(WAIT_SECONDS_MAX)

    def stop(self, *, seconds_max: float = WAIT_SECONDS_MAX) -> int:
        """SIGTERM, once the command has started; the exit code."""
        until(lambda: self.exit_code is not None or bool(self.logged("started")), "it starts")
        self.send(signal.SIGTERM)
        return self.wait(seconds_max=seconds_max)

    def wait(self, *, seconds_max: float = WAIT_SECONDS_MAX) -> int:
        """Wait until the worker ends by itself; the exit code."""
        try:
            return self._process.wait(seconds_max)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"worker {self.pid} still runs after {seconds_max:.0f} s:\n{self.tail()}"
            ) from None

    def pause(self) -> None:
        """SIGSTOP, and wait until the process is stopped."""
        self.send(signal.SIGSTOP)
        self.wait_until_stopped()

    def wait_until_stopped(self, **bounds: float) -> None:
        """Wait until the process is stopped, by us or by a fail point of its own."""
        until(self._is_stopped, f"worker {self.pid} is stopped", **bounds)

    def resume(self) -> None:
        """SIGCONT."""
        self.send(signal.SIGCONT)

    @property
    def is_gone(self) -> bool:
        """Whether the process and all that it started have ended."""
        return self.exit_code is not None and not _has_processes(self)

    def lines(self) -> Iterator[dict[str, Any]]:
        """The worker's log lines so far."""
        for line in self.log.read_text(errors="replace").splitlines():
            if line.startswith("{"):
                yield json.loads(line)

    def logged(self, *events: str) -> list[dict[str, Any]]:
        """The worker's log lines of these events."""
        return [line for line in self.lines() if line.get("event") in events]

    def reasons(self) -> list[str]:
        """The reasons in the log lines about a server that did not serve the worker."""
        return [line["reason"] for line in self.logged("server_unavailable", "access_refused")]

    def wait_for_log(self, *events: str, seconds_max: float = WAIT_SECONDS_MAX) -> None:
        """Wait for the first log line of one of these events."""

        def has_logged() -> bool:
            has_ended = self.exit_code is not None
            logged = bool(self.logged(*events))
            assert logged or not has_ended, "the worker ended without this log line"
            return logged

        try:
            until(has_logged, f"logs {' or '.join(events)}", seconds_max=seconds_max)
        except AssertionError as timeout:
            raise AssertionError(f"{timeout}\n{self.tail()}") from None

    def tail(self) -> str:
        """The last lines of the worker's log."""
        lines = self.log.read_text(errors="replace").splitlines()[-LOG_LINES_SHOWN:]
        return f"--- worker {self.pid} ({self.role}), exit code {self.exit_code}\n" + "\n".join(
            lines
        )

    def peak_memory_kib(self) -> int:
        """Most resident memory so far."""
        return self._kib("VmHWM")

    def address_space_kib(self, *, most: bool = False) -> int:
        """Reserved address space, used or not; now, or the most so far."""
        return self._kib("VmPeak" if most else "VmSize")

    def data_kib(self) -> int:
        """The writable part of it: a reserved arena counts as far as it is used."""
        return self._kib("VmData")

    def _kib(self, name: str) -> int:
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(next(line for line in status.splitlines() if name in line).split()[1])

    def _is_stopped(self) -> bool:
        assert self.exit_code is None, f"ended instead of stopping:\n{self.tail()}"
        state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state == "T"


# ------------------------------------------------------------------------------------ the checks

# Who moved which partition, when, from which offset to which. The service does not use it.
AUDIT = """
CREATE SCHEMA audit;
CREATE TABLE audit.moves (
    move bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    writer text NOT NULL, topic text NOT NULL, partition int NOT NULL,
    old_epoch bigint NOT NULL, epoch bigint NOT NULL,
    old_next bigint NOT NULL, next bigint NOT NULL
);
CREATE FUNCTION audit.note() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    INSERT INTO audit.moves (writer, topic, partition, old_epoch, epoch, old_next, next)
    VALUES (session_user, new.topic, new.partition,
            old.epoch, new.epoch, old.next_offset, new.next_offset);
    RETURN NULL;
END $$;
CREATE TRIGGER audit AFTER UPDATE ON pipeline.consumer_offsets FOR EACH ROW
    WHEN (old.epoch <> new.epoch OR old.next_offset <> new.next_offset)
    EXECUTE FUNCTION audit.note();
"""

# Outside these tests the workers share one login, so they see and may end their own sessions.
SEE_EACH_OTHER = "GRANT pg_signal_backend, pg_read_all_stats TO {role}"

LOGGED = """
SELECT topic, partition, "offset", digest, payload::text, raw, key, headers, ingested_at
FROM pipeline.events ORDER BY topic, partition, "offset"
"""


class Bench:
    """One topic, one database, one group, their workers, and the checks of the result.

    Args:
        kafka: The brokers.
        database: A migrated database of this test's own.
        topic: A topic of this test's own.
        partitions: The number of partitions of the topic.
        folder: For the workers' logs.
    """

    def __init__(
        self, kafka: Kafka, database: Database, topic: str, partitions: int, folder: Path
    ) -> None:
        self.kafka = kafka
        self.database = database
        self.topic = topic
        self.partitions = partitions
        self.group = f"group-{secrets.token_hex(4)}"
        self.workers: list[Worker] = []
        self._folder = folder
        self._numbers = itertools.count(1)
        self._prefix = f"bench_{secrets.token_hex(4)}_"
        self._groups = [self._prefix + role for role in ("ingest", "project")]
        self._roles: list[str] = []
        self._roles_in_store: list[str] = []
        with database.connect() as db:
            db.execute(AUDIT)
        migrate(database.url, with_roles=True, role_prefix=self._prefix)

    def grant(self) -> None:
        """Let the product grant its roles their rights again."""
        migrate(self.database.url)

    def revoke(self, rights: str) -> None:
        """Take rights from the workers' roles, e.g. ``INSERT ON pipeline.events``."""
        self._compose(
            SQL(f"REVOKE {rights} FROM {{}}, {{}}").format(*map(Identifier, self._groups))
        )

    # ----------------------------------------------------------------------------------- what runs

    def feed(self, *, seed: int = 7, **options: Any) -> Feed:
        """A producer for the topic; see ``Feed``."""
        return Feed(
            self.kafka.bootstrap_servers,
            self.topic,
            partitions=self.partitions,
            seed=seed,
            **options,
        )

    def worker(
        self,
        *command: str,
        fail: str | None = None,
        through: Callable[[str], str] = lambda url: url,
        **settings: str,
    ) -> Worker:
        """Start a process that logs in as a role of its own.

        Args:
            *command: ``ingest`` if left out.
            fail: A fail point with its action, as in ``PIPELINE_FAILPOINT``.
            through: Changes the database's URL, e.g. to go through a proxy.
            **settings: More settings by their small names, e.g. ``linger_ms="0"``.
        """
        number = next(self._numbers)
        role = self._roles_in_store.pop(0) if self._roles_in_store else self._new_role(number)
        environment = {
            "database_url": through(self.url_of(role)),
            "kafka_bootstrap_servers": self.kafka.bootstrap_servers,
            "kafka_security_protocol": "PLAINTEXT",
            "kafka_options": QUICK_TO_NOTICE,
            "topics": self.topic,
            "group_id": self.group,
            # Small, so that a process is usually in the middle of its work.
            "batch_rows": "50",
            "log_format": "json",
            "idle_in_transaction_timeout_ms": "2000",
            "lock_timeout_ms": "1000",
        } | settings
        if (
            environment.get("kafka_group_protocol") == "consumer"
            and "kafka_options" not in settings
        ):
            environment["kafka_options"] = "reconnect.backoff.max.ms=500"
        if fail:
            environment |= {"failpoint": fail, "enable_failpoints": "1"}
        started = Worker(
            list(command or ["ingest"]),
            {f"PIPELINE_{name.upper()}": value for name, value in environment.items()},
            self._folder / f"worker-{number}.log",
            role,
        )
        self.workers.append(started)
        return started

    @property
    def roles_in_store(self) -> int:
        """How many workers may start while the database is away."""
        return len(self._roles_in_store)

    def prepare_role(self) -> str:
        """Create the role of a later worker now; its name."""
        role = self._new_role(next(self._numbers))
        self._roles_in_store.append(role)
        return role

    def alter_role(self, role: str, change: str) -> None:
        """``ALTER ROLE``, e.g. ``CONNECTION LIMIT 0``; existing sessions continue."""
        self._compose(SQL(f"ALTER ROLE {{}} {change}").format(Identifier(role)))

    def url_of(self, role: str) -> str:
        """The URL with which a worker's role connects."""
        parts = urlsplit(self.database.url)
        address = parts.netloc.rpartition("@")[2]
        return parts._replace(netloc=f"{quote(role)}:{PASSWORD}@{address}").geturl()

    def as_owner(self, _url: str) -> str:
        """For ``through``: a rebuild runs as the owner, because it creates tables."""
        return self.database.url

    @property
    def password(self) -> str:
        """The workers' password."""
        return PASSWORD

    def set_password(self, role: str, password: str) -> None:
        """Change a role's password; existing sessions continue."""
        self._compose(SQL("ALTER ROLE {} PASSWORD {}").format(Identifier(role), Literal(password)))

    def end_sessions(self, *, of: Worker | None = None) -> int:
        """Have PostgreSQL end the sessions of the workers; the number of sessions."""
        roles = [of.role] if of else self._roles
        return len(
            self.query(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = ANY(%s)",
                roles,
            )
        )

    def cancel_statements(self, worker: Worker) -> None:
        """Cancel the current statements of a worker's sessions, as an operator does."""
        self.query(
            "SELECT pg_cancel_backend(pid) FROM pg_stat_activity "
            "WHERE usename = %s AND state = 'active'",
            worker.role,
        )

    # -------------------------------------------------------------------------------- what is seen

    def query(self, statement: str, *parameters: object) -> list[tuple[Any, ...]]:
        """Rows, as the superuser sees them."""
        with self.database.connect() as db:
            return db.execute(statement.encode(), parameters).fetchall()

    def execute(self, statements: str) -> None:
        """Statements of the superuser."""
        with self.database.connect() as db:
            db.execute(statements.encode())

    def next_offsets(self) -> dict[Partition, int]:
        """The next offset of each partition of the log."""
        rows = self.query('SELECT topic, "partition", next_offset FROM pipeline.consumer_offsets')
        return {Partition(topic, number): next_offset for topic, number, next_offset in rows}

    def checkpoints(self) -> dict[tuple[str, Partition], int]:
        """The checkpoint of each projector in each partition."""
        rows = self.query(
            'SELECT projector, topic, "partition", next_offset FROM pipeline.projection_checkpoints'
        )
        return {
            (name, Partition(topic, number)): next_offset
            for name, topic, number, next_offset in rows
        }

    def logged(self) -> int:
        """How many offsets the log has passed, over all partitions."""
        return sum(self.next_offsets().values())

    def projected(self) -> int:
        """How many offsets all read models together have passed."""
        [(passed,)] = self.query(
            "SELECT coalesce(sum(next_offset), 0)::bigint FROM pipeline.projection_checkpoints"
        )
        return int(passed)

    def count(self, table: str) -> int:
        """Rows of a read model."""
        [(rows,)] = self.query(f"SELECT count(*) FROM {full(table)}")
        return int(rows)

    def owners_of_all(self) -> dict[Partition, int | None]:
        """The process id that owns each partition of every topic."""
        rows = self.query('SELECT topic, "partition", owner_pid FROM pipeline.consumer_offsets')
        return {Partition(topic, number): pid for topic, number, pid in rows}

    def owners(self) -> dict[int, int | None]:
        """The process id that owns each partition."""
        rows = self.query('SELECT "partition", owner_pid FROM pipeline.consumer_offsets')
        return dict(rows)

    def is_owner_of_all(self, worker: Worker) -> bool:
        """Whether every partition is this worker's."""
        owners = self.owners()
        return len(owners) == self.partitions and set(owners.values()) == {worker.pid}

    def sessions(self, worker: Worker) -> int:
        """How many sessions the worker has."""
        return len(self.query("SELECT FROM pg_stat_activity WHERE usename = %s", worker.role))

    def sessions_in_transaction(self, worker: Worker, *states: str) -> int:
        """How many sessions of the worker have a transaction open, and are in one of the states."""
        return len(
            self.query(
                "SELECT FROM pg_stat_activity "
                "WHERE usename = %s AND xact_start IS NOT NULL AND state = ANY(%s)",
                worker.role,
                list(states or ("active", "idle in transaction")),
            )
        )

    def waits_for_lock(self, worker: Worker) -> bool:
        """Whether a session of the worker waits for a lock."""
        waiting = self.query(
            "SELECT 1 FROM pg_stat_activity WHERE usename = %s AND wait_event_type = 'Lock'",
            worker.role,
        )
        return bool(waiting)

    def wait_until_sent(self, ledger: Ledger, records: int, **bounds: float) -> None:
        """Wait until the brokers have this number of records."""
        self._until(lambda: len(ledger) >= records, f"{records} records are sent", **bounds)

    def wait_until_owner_of_all(self, worker: Worker, **bounds: float) -> None:
        """Wait until every partition is this worker's."""
        self._until(lambda: self.is_owner_of_all(worker), f"{worker.role} owns all", **bounds)

    def wait_until_logged(self, records: int, **bounds: float) -> None:
        """Wait until the log has passed this number of offsets."""
        self._until(lambda: self.logged() >= records, f"{records} records are logged", **bounds)

    def wait_until_drained(self, ledger: Ledger, **bounds: float) -> None:
        """Wait until the log holds everything that was sent."""

        def is_drained() -> bool:
            stored = self.next_offsets()
            return all(stored.get(partition, 0) >= end for partition, end in ledger.ends.items())

        self._until(is_drained, f"all {len(ledger)} records are logged", **bounds)

    def wait_until_projected(self, ledger: Ledger, **bounds: float) -> None:
        """Wait until every read model has seen everything that was sent."""

        def is_projected() -> bool:
            seen = {
                key: next_offset
                for key, next_offset in self.checkpoints().items()
                if key[1] in ledger.ends
            }
            return len(seen) == len(catalogue.load().models) * len(ledger.ends) and all(
                next_offset >= ledger.ends[partition]
                for (_, partition), next_offset in seen.items()
            )

        self._until(is_projected, f"all {len(ledger)} records are projected", **bounds)

    # -------------------------------------------------------------------- the checks of the result

    def finish(self, ledger: Ledger, **bounds: float) -> None:
        """Drain, stop the workers that still run, and check what they leave."""
        self.wait_until_drained(ledger, **bounds)
        for worker in self.workers:
            if worker.exit_code is None:
                # Before the worker has started, a signal ends it like any process.
                worker.wait_for_log("started")
                assert worker.stop() == 0, worker.tail()
        self.judge(ledger)

    def judge(self, ledger: Ledger) -> None:
        """The log equals the ledger, each ownership has one writer, and nothing is left over."""
        assert len(ledger), "nothing was sent, so nothing is proven"
        differences = list(itertools.islice(self._differences(ledger), DIFFERENCES_SHOWN))
        assert not differences, "\n".join([*differences, self.tails()])
        violations = self.ownership_violations()
        assert not violations, "\n".join([*violations, self.tails()])
        self.judge_leftovers()

    def judge_leftovers(self) -> None:
        """No process, session or lock of a worker is left over."""
        leftovers = until(lambda: self._leftovers() or "none", "an answer")
        if leftovers != "none":
            # A session ends a moment after its process.
            until(lambda: not self._leftovers(), f"gone: {leftovers}", seconds_max=5)

    def judge_read_models(self, books: Books) -> None:
        """Every read model equals the simulator's books and its own rebuild."""
        for table in books.tables:
            assert not self.differing_from(books, table), f"{table} differs from the books"
        check = self.replay()
        assert check.returncode == 0, check.stdout + check.stderr

    def differing_from(self, books: Books, table: str) -> int:
        """The number of rows that only the read model or only the books have."""
        columns = SQL(", ").join(map(Identifier, books.columns(table)))
        with self.database.connect() as db:
            found = Counter(db.execute(SQL(f"SELECT {{}} FROM {full(table)}").format(columns)))
        wanted = Counter(books.rows(table))
        return (found - wanted).total() + (wanted - found).total()

    def replay(self, *options: str) -> "subprocess.CompletedProcess[str]":
        """``rebuild --all --check``: every read model against one computed from the log."""
        return subprocess.run(
            [*ENTRY, "rebuild", "--all", "--check", *options],
            env={**_foreign_environment(), "PIPELINE_DATABASE_URL": self.database.url},
            capture_output=True,
            text=True,
            check=False,
            cwd=PROJECT,
        )

    def ownership_violations(self) -> list[str]:
        """Moves of partitions by others than the owner, or out of step."""
        found = []
        last: dict[Partition, tuple[int, int]] = {}
        owner: dict[Partition, str] = {}
        for writer, topic, number, old_epoch, epoch, old_next, next_offset in self.query(
            "SELECT writer, topic, partition, old_epoch, epoch, old_next, next "
            "FROM audit.moves ORDER BY move"
        ):
            partition = Partition(topic, number)
            what = (
                f"{partition}: {writer} moved epoch {old_epoch} to {epoch}, "
                f"{old_next} to {next_offset}"
            )
            if last.setdefault(partition, (old_epoch, old_next)) != (old_epoch, old_next):
                found.append(f"{what}, after {last[partition]}")
            if epoch < old_epoch or next_offset < old_next:
                found.append(f"{what}: backwards")
            if epoch > old_epoch:
                owner[partition] = writer
                if next_offset != old_next:
                    found.append(f"{what}: a claim moves no offset")
            elif owner.get(partition) != writer:
                found.append(f"{what}, but epoch {epoch} is {owner.get(partition)}'s")
            last[partition] = epoch, next_offset
        return found

    def writers(self) -> set[str]:
        """The roles of the workers that have written to the log."""
        return {
            role for (role,) in self.query("SELECT writer FROM audit.moves WHERE next > old_next")
        }

    def tails(self) -> str:
        """The last lines of every worker's log."""
        return "\n".join(worker.tail() for worker in self.workers)

    def _differences(self, ledger: Ledger) -> Iterator[str]:
        """How the log differs from what was sent: lost, doubled, changed, out of order."""
        missing = dict(ledger.records)
        ingested: dict[Partition, Any] = {}
        with self.database.connect(autocommit=False) as db, db.cursor("logged") as cursor:
            cursor.execute(LOGGED)
            for topic, number, offset, digest, payload, raw, key, headers, at in cursor:
                partition = Partition(topic, number)
                sent = missing.pop((topic, number, offset), None)
                if sent is None:
                    yield f"{partition}: offset {offset} was never sent, or is in the log twice"
                    continue
                if at < ingested.setdefault(partition, at):
                    yield f"{partition}: offset {offset} was written before the offset before it"
                ingested[partition] = at
                if (digest, key) != (sent.digest, sent.key):
                    yield f"{partition}: offset {offset} has another value or key"
                if headers != as_stored(sent.headers):
                    yield f"{partition}: offset {offset} has other headers"
                if ledger.keeps_values and not is_faithful(sent.value, payload, raw):
                    yield f"{partition}: offset {offset} is stored as another JSON value"
        for topic, number, offset in missing:
            yield f"{Partition(topic, number)}: offset {offset} is missing"
        stored = self.next_offsets()
        for partition, end in ledger.ends.items():
            if stored.get(partition) != end:
                yield f"{partition}: next offset is {stored.get(partition)}, Kafka ends at {end}"

    def _leftovers(self) -> list[str]:
        found = [f"process {worker.pid}" for worker in self.workers if _has_processes(worker)]
        sessions = self.query(
            "SELECT pid, application_name, state FROM pg_stat_activity WHERE usename = ANY(%s)",
            self._roles,
        )
        found += [f"session {pid} of {name}, {state}" for pid, name, state in sessions]
        held = self.query(
            "SELECT l.name, l.session_pid FROM pipeline.locks l JOIN pg_locks k "
            "ON k.pid = l.session_pid AND k.virtualxid = l.virtual_transaction"
        )
        return found + [f"lock {name!r} of session {pid}" for name, pid in held]

    # -------------------------------------------------------------------------------------- within

    def close(self) -> None:
        """Kill what still runs, remove the roles, and check that no log holds a secret."""
        for worker in self.workers:
            worker.kill()
        for role in [*self._roles, *(self._prefix + role for role in ROLES)]:
            self._compose(SQL("DROP OWNED BY {}").format(Identifier(role)))
            self._compose(SQL("DROP ROLE {}").format(Identifier(role)))
        for worker in self.workers:
            output = worker.log.read_text(errors="replace")
            assert PASSWORD not in output, f"{worker.log} holds the password"
            assert canaries.simulated(output) == [], f"{worker.log} holds personal data"

    def _new_role(self, number: int) -> str:
        role = f"{self._prefix}{number}"
        self._compose(
            SQL("CREATE ROLE {} LOGIN PASSWORD {} IN ROLE {}, {}").format(
                Identifier(role), Literal(PASSWORD), *map(Identifier, self._groups)
            )
        )
        self._compose(SQL(SEE_EACH_OTHER).format(role=Identifier(role)))
        self._roles.append(role)
        return role

    def _compose(self, statement: psycopg.sql.Composed) -> None:
        with self.database.connect() as db:
            db.execute(statement)

    def _any_worker_runs(self) -> bool:
        return any(worker.exit_code is None for worker in self.workers)

    def _until(self, condition: Callable[[], bool], what: str, **bounds: float) -> None:
        def is_met() -> bool:
            met = condition()
            assert met or not self.workers or self._any_worker_runs(), "no worker runs any more"
            return met

        try:
            until(is_met, what, **bounds)
        except AssertionError as timeout:
            raise AssertionError(f"{timeout}; {self.next_offsets()}\n{self.tails()}") from None


def as_stored(headers: Headers) -> list[list[object]] | None:
    """Headers as the log's comment promises them."""
    return [[name, _text_or_base64(value)] for name, value in headers] or None


def _text_or_base64(value: bytes | None) -> object:
    if value is None:
        return None
    try:
        text = value.decode()
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(value).decode()}
    return {"base64": base64.b64encode(value).decode()} if "\0" in text else text


def is_faithful(value: bytes | None, payload: str | None, raw: bytes | None) -> bool:
    """Whether the bytes are kept, or payload is the same JSON value."""
    if raw is not None or value is None:
        return raw == value
    return payload is not None and _parsed(payload) == _parsed(value)


def _parsed(text: str | bytes) -> object:
    return json.loads(text, parse_float=Decimal, parse_int=Decimal)


def _foreign_environment() -> dict[str, str]:
    """The environment without settings of ours."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PIPELINE_")}


def _has_processes(worker: Worker) -> bool:
    """Whether the worker, or anything it started, still runs."""
    try:
        os.killpg(worker.pid, 0)
    except ProcessLookupError:
        return False
    return True
