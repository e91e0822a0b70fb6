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
        "how many records were ingested and projected since the last such line, and how many "
        "remain "
        "(`ingest_lag`, `projection_lag`); at most once per minute and process",
    ),
    LogEvent(
        "stop_requested", "info", "a signal is ending this process, see [exit codes](#exit-codes)"
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
        "one of several workers was killed or crashed. It is restarted; others read its partitions "
        "meanwhile",
        "see its last lines; `SIGKILL` mostly means too little memory",
    ),
    LogEvent(
        "parent_ended",
        "warning",
        "the command that started this worker was killed; the worker ends too",
        "find out what killed it",
    ),
    LogEvent(
        "workers_without_partition",
        "warning",
        "there are more workers than partitions",
        "fewer `--workers`",
    ),
    LogEvent("partitions_not_counted", "debug", "the number of partitions is unknown"),
)

_SERVERS = (
    LogEvent(
        "server_unavailable",
        "warning",
        "PostgreSQL or Kafka does not serve us; the reason names the server, the cause and what to "
        "do. The process waits for it, see [below](#a-server-is-unavailable-or-refuses-us)",
        "see the reason, if it lasts",
    ),
    LogEvent(
        "access_refused",
        "error",
        "a login or a right is refused that was granted before; the line says in how many seconds "
        "the process ends with 78",
        "correct the password, or grant the right again",
    ),
    LogEvent("server_available", "info", "the server serves us again; after how many seconds"),
    LogEvent(
        "password_reloaded",
        "info",
        "a login was refused, and the settings' files have another one now, which is used",
    ),
    LogEvent(
        "server_slow",
        "info",
        "a statement has had no answer for 5 s, and PostgreSQL still accepts connections",
        "nothing, unless it lasts",
    ),
    LogEvent(
        "waiting_for_lock",
        "warning",
        "a statement has waited 2 s or longer for a lock; the line names the object, and the "
        "session that holds it with its role, application and, if the login may see it, since when",
        "let it end, or end it: `SELECT pg_terminate_backend(PID)`",
    ),
    LogEvent(
        "kafka_client_error",
        ("warning", "error"),
        "what Kafka's client reports about its connections; each kind at most once per minute, "
        "with "
        "how often it occurred (`times_since`). At `error` if a setting or a right is wrong",
        "see the action; `pipeline check`",
    ),
    LogEvent(
        "kafka_commit_refused",
        "warning",
        "Kafka refuses the commits of the consumer group: a right was taken away. Events still "
        "arrive, until the group is joined again",
        "ask for READ on the group; `pipeline check` prints the command",
    ),
    LogEvent(
        "kafka_commit_skipped",
        "info",
        "the group's offsets in Kafka were not updated; they are for monitoring only",
    ),
    LogEvent(
        "library_log",
        ("debug", "info", "warning", "error", "critical"),
        "a line of a library; for `librdkafka`, each text at most once per minute",
        "nothing; it helps to find a cause",
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
        "Kafka has assigned these partitions to this process; it reads them from these offsets on",
    ),
    LogEvent("partitions_released", "info", "this process has given up its partitions at its end"),
    LogEvent(
        "partitions_revoked", "info", "Kafka has assigned these partitions to another process"
    ),
    LogEvent(
        "partitions_lost",
        "info",
        "the group has excluded this process; it joins again. Nothing of ours was written since",
    ),
    LogEvent(
        "partitions_not_released",
        "info",
        "the database did not answer when this process gave up its partitions",
    ),
    LogEvent(
        "partitions_fenced",
        "warning",
        "another process has claimed these partitions, or somebody moved their next offsets; "
        "nothing of ours was written",
        "nothing; find out what stopped this process, or whether a second group uses this database",
    ),
    LogEvent(
        "partition_halted",
        "error",
        "one partition is halted to protect data; the others are read",
        "see the reason, and [Halted partitions](#halted-partitions)",
    ),
    LogEvent("partition_resumed", "info", "a halted partition is read again"),
    LogEvent("partition_rewound", "info", "`rewind` has read a partition again; what it added"),
    LogEvent(
        "topic_not_available",
        "warning",
        "a topic of the default list was never read, and Kafka does not show it; the others are "
        "read",
        "see the action; `Prices` needs a contract of its own",
    ),
    LogEvent(
        "topic_available",
        "info",
        "Kafka shows that topic now; it is read from `PIPELINE_START` on",
    ),
    LogEvent(
        "topic_not_authorized",
        "error",
        "Kafka does not show a topic that was read: the right was taken away, or the topic was "
        "deleted; the others are read",
        "ask for the right in the reason",
    ),
    LogEvent(
        "topic_missing",
        "error",
        "a topic that was read does not exist any more; the others are read",
        "see the reason",
    ),
    LogEvent(
        "former_owner_terminated",
        "warning",
        "a worker that was silent in the middle of a transaction held a partition; its session was "
        "terminated, and this process has the partition",
        "find out why that worker was silent",
    ),
    LogEvent(
        "former_owner_not_terminated",
        "warning",
        "such a session could not be terminated, because its login belongs to another role; the "
        "partition waits until the session ends",
        "let all workers log in as one role",
    ),
    LogEvent(
        "member_timed_out",
        "warning",
        "this process did not poll Kafka for too long, or Kafka did not answer it, and the group "
        "gives its partitions to another member; nothing of ours was written",
        "nothing; find out what stopped this process",
    ),
    LogEvent(
        "member_replaced",
        "warning",
        "Kafka has another member under this `PIPELINE_GROUP_INSTANCE_ID`; this one joins again. "
        "Kafka's client may be both, when brokers paused for longer than its session",
        "nothing; if the process ends with 75 after the third time in a minute, find the other one",
    ),
    LogEvent(
        "unknown_member_found",
        "warning",
        "the consumer group has a member that has not registered in this database; it may be dead, "
        "or write to a copy",
        'nothing; if this worker then ends with 65, see "Backups, copies and moves"',
    ),
    LogEvent(
        "database_moved",
        "warning",
        "this database ran on another server or under another oid before: a restore, an upgrade, "
        "or a copy",
        "nothing after a move; give a copy its own `PIPELINE_GROUP_ID`",
    ),
    LogEvent(
        "group_not_left",
        "warning",
        "Kafka did not answer when this process left its group; nothing is lost",
        "nothing; find out why Kafka does not answer",
    ),
    LogEvent("group_commits_unknown", "debug", "Kafka returned no commits of the group"),
    LogEvent("time_left_unknown", "debug", "how long Kafka keeps the next record is unknown"),
)

_READ_MODELS = (
    LogEvent("events_projected", "debug", "one pass of the projection"),
    LogEvent("projection_caught_up", "info", "the read models have no lag any more"),
    LogEvent(
        "projection_not_ended",
        "warning",
        "PostgreSQL did not answer the projection's last statement when this process ended; "
        "nothing "
        "is lost",
        "nothing; find out why it does not answer",
    ),
    LogEvent(
        "events_rejected",
        "warning",
        "a read model rejected these events; they are dead letters, the others were applied",
        "`pipeline dead-letters list`",
    ),
    LogEvent(
        "projector_broken",
        "error",
        "a read model rejected so many events that its own definition must be wrong",
        "correct it, then `pipeline rebuild NAME`",
    ),
    LogEvent(
        "projectors_stale",
        "warning",
        "the definition of these read models has changed since their tables were built; they are "
        "left out until they are rebuilt, and readers see them as they were",
        "nothing: `run` and `project` rebuild them, see `read_model_rebuilt` and `rebuild_failed`",
    ),
    LogEvent(
        "projectors_current",
        "info",
        "these read models were rebuilt and follow the log again",
        "nothing",
    ),
    LogEvent(
        "rebuild_postponed",
        "warning",
        "a stale read model cannot be rebuilt now: the database refuses it; retried every 10 s",
        "see the reason",
    ),
    LogEvent(
        "rebuild_failed",
        "error",
        "a stale read model could not be rebuilt; its live table is unchanged, the others continue",
        "see the reason, then `pipeline rebuild NAME`",
    ),
    LogEvent("read_model_rebuilt", "info", "a read model was rebuilt; how many rows differed"),
    LogEvent(
        "read_model_compared",
        "info",
        "a read model was compared with the log; how many rows differ",
    ),
    LogEvent("rebuild_resumed", "info", "an interrupted rebuild continues"),
    LogEvent(
        "rebuild_tables_locked",
        "info",
        "another session holds a lock on the tables of a rebuild; it tries again",
    ),
)

_SCHEMA = (
    LogEvent(
        "personal_data_closed",
        "warning",
        "`migrate` took away a right to read personal data, in a transaction of its own and before "
        "the migrations; the line has the statements",
        "nothing; grant `pipeline_personal_data` to those who need it",
    ),
    LogEvent(
        "views_wait_for_rebuild",
        "warning",
        "views need columns that a rebuild will make",
        "wait for the rebuild, then `pipeline migrate`",
    ),
    LogEvent(
        "view_keeps_columns",
        "warning",
        "views of others need columns of a view in `upvest` that are personal now; these are NULL "
        "from now on",
        "change the views that the line names; the next `migrate` drops the columns",
    ),
)

EVENTS: Mapping[str, LogEvent] = MappingProxyType(
    {event.name: event for event in (*_COMMANDS, *_SERVERS, *_INGEST, *_READ_MODELS, *_SCHEMA)}
)
"""All events, by name."""
