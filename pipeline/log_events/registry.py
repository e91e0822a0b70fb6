"""The closed list of all events that this program logs.

A test finds every call that logs, anywhere in the program, and compares event and level with this
list. The table in docs/operations.md is written from it: ``python -m tests.log_events_page``.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

Level = Literal["debug", "info", "warning", "error", "critical"]


class LogEvent(NamedTuple):
    """One kind of line in the log.

    Attributes:
        name: What happened, or a state; the same in all versions of the program.
        level: Its level; several if the line says how serious it is.
        meaning: What it means for the service.
        action: What the operator does; nothing if empty.
    """

    name: str
    level: Level | tuple[Level, ...]
    meaning: str
    action: str = ""

    @property
    def levels(self) -> tuple[Level, ...]:
        """Its levels."""
        return self.level if isinstance(self.level, tuple) else (self.level,)


_COMMANDS = (
    LogEvent("started", "info", "this process has started; the line has versions and settings"),
    LogEvent(
        "events_processed",
        "info",
        "how many records this process ingested and projected since the last such line, and the "
        "lags that remain (`ingest_lag`, `projection_lag`), at most once per minute. A lag is null "
        "while a server that is needed to measure it is unavailable",
    ),
    LogEvent(
        "stop_requested",
        "info",
        "this process received a signal and will end after its current batch, see "
        "[exit codes](#exit-codes)",
    ),
    LogEvent(
        "stopped",
        ("info", "error"),
        "this process has ended; at `error` with the reason and the exit code",
        "if at `error`, see the reason and the [exit code](#exit-codes)",
    ),
    LogEvent(
        "crashed",
        "critical",
        "an unexpected error in the command; it exits with 70",
        "keep the log, file a bug",
    ),
    LogEvent(
        "thread_crashed",
        "critical",
        "an unexpected error in a thread of the command",
        "keep the log, file a bug",
    ),
    LogEvent("workers_started", "info", "`--workers` has started its processes"),
    LogEvent("workers_ended", "info", "all workers have ended"),
    LogEvent(
        "worker_died",
        "error",
        "one of several workers was killed or crashed. It is restarted; meanwhile, other workers "
        "read its partitions",
        "read the last log lines of this worker; `SIGKILL` usually means too little memory",
    ),
    LogEvent(
        "parent_ended",
        "warning",
        "the command that started this worker was killed; the worker ends too",
        "find out what killed the command",
    ),
    LogEvent(
        "workers_without_partition",
        "warning",
        "there are more workers than partitions; the additional workers are idle",
        "set a lower number for `--workers`",
    ),
    LogEvent("partitions_not_counted", "debug", "the number of partitions is unknown"),
)

_SERVERS = (
    LogEvent(
        "server_unavailable",
        "warning",
        "PostgreSQL or Kafka is unavailable: the line has the server, the cause and what to do. "
        "The process waits for the server, see [below](#a-server-is-unavailable-or-refuses-us). "
        "All loops of a process share one line per cause, and causes within 10 s share one line",
        "if it lasts, do what the reason says",
    ),
    LogEvent(
        "access_refused",
        "error",
        "a server refuses a login or a right that it granted before; the line says in how many "
        "seconds the process ends with 78",
        "correct the password, or grant the right again",
    ),
    LogEvent(
        "server_available",
        "info",
        "`server` is available again, and everything in this process that waited for it has used "
        "it; the line says after how many seconds",
    ),
    LogEvent(
        "password_reloaded",
        "info",
        "a login was refused, and the files of the settings contain a new password; the program "
        "uses it",
    ),
    LogEvent(
        "server_slow",
        "info",
        "PostgreSQL has not answered a statement for 5 s; it still accepts connections",
        "if it lasts, check the load and the disks of the database server",
    ),
    LogEvent(
        "waiting_for_lock",
        "warning",
        "a statement has waited 2 s or longer for a lock. The line names the locked object, and "
        "the session that holds the lock with its role, its application and, if this login may "
        "see it, the start of its transaction",
        "wait until that session ends its transaction, or terminate the session: "
        "`SELECT pg_terminate_backend(PID)`",
    ),
    LogEvent(
        "kafka_client_error",
        ("info", "warning", "error"),
        "Kafka's client reports an error of a connection. Each kind of error is logged at most "
        "once per minute; `occurrences` says how often it occurred. The level is `error` if a "
        "setting or a right is wrong, and `info` if a broker cannot be reached: if that lasts, "
        "`server_unavailable` follows",
        "at `warning` or `error`, do what `action` in the line says; run `pipeline check`",
    ),
    LogEvent(
        "kafka_commit_refused",
        "warning",
        "Kafka refuses the commits of the consumer group, because a right was revoked. Events "
        "still arrive until this process joins the group again",
        "request the right READ on the group; `pipeline check` prints the command",
    ),
    LogEvent(
        "kafka_commit_skipped",
        "info",
        "the offsets that Kafka's tools show are late, usually because the group moved "
        "partitions between workers; no event is affected",
    ),
    LogEvent(
        "library_log",
        ("debug", "info", "warning", "error", "critical"),
        "a log line of a library; lines of `librdkafka` at most once per minute and text",
        "nothing; the line helps to find the cause of another event",
    ),
    LogEvent("topic_ids_unknown", "debug", "Kafka returned no ids of topics"),
    LogEvent("topic_settings_unknown", "debug", "Kafka returned no settings of a topic"),
    LogEvent("end_unknown", "debug", "Kafka returned no end of a partition"),
    LogEvent("members_unknown", "debug", "Kafka returned no members of the group"),
)

_INGEST = (
    LogEvent(
        "partitions_claimed",
        "info",
        "Kafka has assigned these partitions to this process, which reads them from these offsets "
        "on",
    ),
    LogEvent(
        "assignment_pending",
        "info",
        "Kafka answers, and has assigned no partition to this process for 10 s: it waits for "
        "former members of the group for up to their session timeout (45 s unless you set another)",
    ),
    LogEvent(
        "partitions_released",
        "info",
        "this process ends and has released its partitions; the next owner reads the "
        "`records_to_read_again`, which were received but not written",
    ),
    LogEvent(
        "partitions_revoked", "info", "Kafka has assigned these partitions to another process"
    ),
    LogEvent(
        "partitions_lost",
        "info",
        "the consumer group has excluded this process, which joins again; it wrote nothing since "
        "then",
    ),
    LogEvent(
        "partitions_fenced",
        "warning",
        "another process has claimed these partitions, or somebody changed their next offsets; "
        "this process wrote nothing",
        "find out what stopped this process, or whether a second consumer group uses this database",
    ),
    LogEvent(
        "partitions_halted",
        "error",
        "these partitions are halted to protect data, for one cause; the others are read",
        "resolve the cause, see [Halted partitions](#halted-partitions)",
    ),
    LogEvent("partitions_resumed", "info", "partitions that were halted are read again"),
    LogEvent(
        "partition_rewound",
        "info",
        "`pipeline rewind` has read a partition again; the line says how many records it added",
    ),
    LogEvent(
        "topic_not_available",
        "warning",
        "Kafka does not show a topic of the default list, which was never read; the other topics "
        "are read",
        "do what `action` in the line says; `Prices` needs a separate contract",
    ),
    LogEvent(
        "topic_available",
        "info",
        "Kafka now shows a topic that was not available; it is read from `PIPELINE_START` on",
    ),
    LogEvent(
        "topic_not_authorized",
        "error",
        "Kafka does not show a topic that was read before: the right was revoked, or the topic was "
        "deleted; the other topics are read",
        "request the right that the reason names",
    ),
    LogEvent(
        "topic_missing",
        "error",
        "a topic that was read before no longer exists; the other topics are read",
        "do what the reason says",
    ),
    LogEvent(
        "former_owner_terminated",
        "warning",
        "the former owner of a partition did not respond in the middle of a transaction; its "
        "session was terminated, and this process now owns the partition",
        "find out why the former owner did not respond",
    ),
    LogEvent(
        "former_owner_not_terminated",
        "warning",
        "the session of a former owner that does not respond could not be terminated, because it "
        "belongs to another role; the partition waits until the session ends",
        "let all workers log in as one role",
    ),
    LogEvent(
        "member_timed_out",
        "warning",
        "Kafka did not answer this process for its session timeout, or this process was paused. "
        "The group may give its partitions to another worker; nothing is lost, and this process "
        "joins again by itself",
        "if Kafka was available: find out what paused this process",
    ),
    LogEvent(
        "member_replaced",
        "warning",
        "Kafka has another member with the same `PIPELINE_GROUP_INSTANCE_ID`; this process joins "
        "again. The other member may be an earlier connection of this same process, after the "
        "brokers paused for longer than `session.timeout.ms`",
        "nothing after the first time. After the third time in a minute the process ends with 75: "
        "then find the other process that has this id",
    ),
    LogEvent(
        "unknown_member_found",
        "warning",
        "the consumer group has a member that is not registered in this database: it is dead, or "
        "it writes to a copy of this database",
        'nothing; if this worker then ends with 65, see "Backups, copies and moves"',
    ),
    LogEvent(
        "database_moved",
        "warning",
        "this database was on another server before, or had another oid: it was restored, upgraded "
        "or copied",
        "after a move: nothing. If this database is a copy: give it its own `PIPELINE_GROUP_ID`",
    ),
    LogEvent(
        "group_not_left",
        "warning",
        "Kafka did not answer when this process left its consumer group; nothing is lost",
        "find out why Kafka does not answer",
    ),
    LogEvent("group_commits_unknown", "debug", "Kafka returned no commits of the group"),
    LogEvent(
        "retention_deadline_unknown", "debug", "how long Kafka keeps the next record is unknown"
    ),
)

_READ_MODELS = (
    LogEvent("events_projected", "debug", "one pass of the projection"),
    LogEvent("projection_caught_up", "info", "the projection lag is 0"),
    LogEvent(
        "projection_not_ended",
        "warning",
        "PostgreSQL did not answer the last statement of the projection when this process ended; "
        "nothing is lost",
        "find out why PostgreSQL does not answer",
    ),
    LogEvent(
        "events_rejected",
        "warning",
        "a read model rejected these events. They are dead letters now; the other events were "
        "applied",
        "run `pipeline dead-letters list NAME`, as `action` in the line says",
    ),
    LogEvent(
        "read_model_broken",
        "error",
        "a read model is halted: it rejected so many events that its definition must be wrong, or "
        "somebody changed its table; the other read models continue",
        "do what the reason says, then run `pipeline rebuild NAME`",
    ),
    LogEvent(
        "read_models_stale",
        "warning",
        "the definition of these read models has changed since their tables were built. Events are "
        "not applied to them until they are rebuilt; readers see the old rows",
        "nothing: `run` and `project` rebuild them, and log `read_model_rebuilt` or "
        "`rebuild_failed`",
    ),
    LogEvent(
        "read_models_current",
        "info",
        "these read models were rebuilt; events are applied to them again",
        "nothing",
    ),
    LogEvent(
        "rebuild_postponed",
        ("debug", "warning"),
        "the rebuild of a stale read model failed with an error of the database; it is retried "
        "every 10 s. Each cause is logged once; at `debug` if no read model is stale",
        "do what the reason says",
    ),
    LogEvent(
        "rebuild_failed",
        "error",
        "a stale read model could not be rebuilt. Its live table is unchanged; the other read "
        "models continue",
        "do what the reason says, then run `pipeline rebuild NAME`",
    ),
    LogEvent(
        "read_model_rebuilt",
        "info",
        "a read model was rebuilt; the line says how many rows differed",
    ),
    LogEvent(
        "read_model_compared",
        "info",
        "a read model was compared with the log; the line says how many rows differ",
    ),
    LogEvent(
        "read_model_refilled",
        "info",
        "the table of a read model had been emptied (`TRUNCATE`), and holds all events of the log "
        "again",
    ),
    LogEvent("rebuild_resumed", "info", "an interrupted rebuild continues"),
    LogEvent(
        "table_locked",
        "info",
        "another session holds a lock on a table that `migrate` or a rebuild must lock; the "
        "command tries again",
    ),
)

_SCHEMA = (
    LogEvent(
        "personal_data_closed",
        "warning",
        "`migrate` revoked a right to read personal data, in a separate transaction before the "
        "migrations; the line has the statements",
        "grant `pipeline_personal_data` to the logins that need personal data",
    ),
    LogEvent(
        "views_wait_for_rebuild",
        "warning",
        "these views were not created: they need columns that a rebuild will add",
        "wait for the rebuild, then run `pipeline migrate` again",
    ),
    LogEvent(
        "view_keeps_columns",
        "warning",
        "views of other owners need columns of a view in `upvest` that are now personal; these "
        "columns are NULL from now on",
        "have the owners change the views that the line names; the next `migrate` drops the "
        "columns",
    ),
)

EVENTS: Mapping[str, LogEvent] = MappingProxyType(
    {event.name: event for event in (*_COMMANDS, *_SERVERS, *_INGEST, *_READ_MODELS, *_SCHEMA)}
)
"""All events, by name."""
