"""The errors, grouped by what the caller does next, and their exit codes.

No message carries a payload, a key, a header or a secret.
"""

from enum import IntEnum, StrEnum

from pipeline import causes
from pipeline.causes import Cause
from pipeline.counts import count
from pipeline.partitions import Epoch, NextOffset, Partition


class ExitCode(IntEnum):
    """Exit codes of commands; 65 and above are those of BSD's ``sysexits.h``."""

    DONE = 0
    FOUND = 1
    USAGE = 2
    REFUSED = 65
    UNAVAILABLE = 69
    INVARIANT = 70
    FENCED = 75
    CONFIGURATION = 78


class Server(StrEnum):
    """The servers that this program waits for."""

    POSTGRESQL = "PostgreSQL"
    KAFKA = "Kafka"


class PipelineError(Exception):
    """Everything that this program raises on purpose."""

    exit_code = ExitCode.INVARIANT


class ConfigurationError(PipelineError):
    """A setting, a right or the schema is wrong; repeating does not help, an operator must act.

    Attributes:
        is_login: A server refused our login. Each further attempt counts against the account.
        server: The server concerned.
        address: Where it is; empty where not known.
    """

    exit_code = ExitCode.CONFIGURATION

    def __init__(
        self,
        message: str,
        *,
        is_login: bool = False,
        server: Server = Server.POSTGRESQL,
        address: str = "",
    ) -> None:
        super().__init__(message)
        self.is_login = is_login
        self.server = server
        self.address = address

    @property
    def server_name(self) -> str:
        """The server with its address."""
        return _named(self.server, self.address)


class TransientError(PipelineError):
    """A server is unavailable, or ended this transaction to resolve a conflict. Repeat the batch.

    Attributes:
        sqlstate: PostgreSQL's code, None where the connection broke without one.
        server: The server concerned.
        address: Where it is; empty where not known.
    """

    exit_code = ExitCode.UNAVAILABLE

    def __init__(
        self,
        message: str,
        *,
        sqlstate: str | None = None,
        server: Server = Server.POSTGRESQL,
        address: str = "",
    ) -> None:
        super().__init__(message)
        self.sqlstate = sqlstate
        self.server = server
        self.address = address

    @property
    def server_name(self) -> str:
        """The server with its address."""
        return _named(self.server, self.address)


def _named(server: Server, address: str) -> str:
    return f"{server} at {address}" if address else str(server)


class HangingServerError(TransientError):
    """The server keeps the connection open and does not answer. Repeat the batch."""


class LockHeldError(TransientError):
    """Another session holds the lock (SQLSTATE 55P03). Try again later."""


class PoisonRecordError(PipelineError):
    """The data is wrong, however often it is tried. Put the record aside and continue.

    Attributes:
        sqlstate: PostgreSQL's code for the error.
        column: The column concerned, where PostgreSQL or a projector names it.
    """

    def __init__(self, message: str, *, sqlstate: str, column: str | None = None) -> None:
        super().__init__(message)
        self.sqlstate = sqlstate
        self.column = column


class MissingSegmentError(PipelineError):
    """No segment of the log covers a row's offset (SQLSTATE 23514). Create it and repeat."""


class FencedError(PipelineError):
    """A newer owner has the partition, or its next offset has changed. Nothing was written.

    Attributes:
        partition: The partition that was refused.
        held: The epoch under which we wrote.
    """

    exit_code = ExitCode.FENCED

    def __init__(self, partition: Partition, *, held: Epoch) -> None:
        super().__init__(
            f"{partition}: another worker has claimed it, or its next offset was changed, after "
            f"epoch {held}. Nothing was written"
        )
        self.partition = partition
        self.held = held


class GroupFencedError(PipelineError):
    """Another process repeatedly takes this member's place in the group, or its partitions."""

    exit_code = ExitCode.FENCED


class MemberReplacedError(GroupFencedError):
    """Kafka has given this member's place to another member with its ``GROUP_INSTANCE_ID``.

    The other member may be this process: after a pause of the brokers the client joins twice, or
    with an old request (seen with librdkafka 2.16, a group of one member, Apache Kafka 4.4).
    """


class RefusedError(PipelineError):
    """Continuing would lose or mix up data; an operator must decide.

    Attributes:
        partition: The partition that is halted.
        what: What happened and what it means.
        fix: What to do.
        cause: Both, without the partition: equal for all partitions with one cause.
    """

    exit_code = ExitCode.REFUSED

    def __init__(self, partition: Partition, what: str, fix: str) -> None:
        self.cause = f"{what}. {fix}"
        super().__init__(f"{partition}: {self.cause}")
        self.partition = partition
        self.what = what
        self.fix = fix


class RetentionGapError(RefusedError):
    """Kafka has deleted records that were not read."""

    def __init__(self, partition: Partition, *, expected: NextOffset, low: NextOffset) -> None:
        super().__init__(
            partition,
            f"expected to continue at offset {expected}, but Kafka's first record is at {low}: "
            f"{count(low - expected, 'offset is', 'offsets are')} lost",
            "See `pipeline gaps list`; to continue after them: "
            f"`pipeline gaps accept {partition.topic}:{partition.number}`",
        )
        self.expected = expected
        self.low = low


class RecreatedTopicError(RefusedError):
    """The topic is not the one whose records are in the log."""

    def __init__(self, partition: Partition, *, expected: str, found: str) -> None:
        super().__init__(
            partition,
            f"expected {expected}, found {found}: the topic was deleted and recreated. Its offsets "
            "name other records now",
            "Ingest it under another topic name or into another database",
        )


class TruncatedTopicError(RefusedError):
    """Kafka has lost records that are in the log, and gives their offsets to others."""

    def __init__(self, partition: Partition, *, expected: str, found: str) -> None:
        super().__init__(
            partition,
            f"expected {expected}, found {found}: the topic is the same, but Kafka has lost "
            "records of it that are in the log (an unclean leader election, a lost disk). Their "
            "offsets name other records now, or will",
            "Ingest it into another database",
        )


class DeletedTopicError(RefusedError):
    """The topic does not exist, or is hidden from this user; it may come back."""

    def __init__(self, partition: Partition) -> None:
        super().__init__(
            partition,
            "its topic no longer exists, or is hidden from this user. The partition continues when "
            "the topic exists again",
            "If the topic is deleted for good, remove it from PIPELINE_TOPICS",
        )


class ForbiddenTopicError(RefusedError):
    """Kafka does not let this user see or read the topic; it continues once the right exists."""

    exit_code = ExitCode.CONFIGURATION

    def __init__(self, partition: Partition, why: str) -> None:
        super().__init__(
            partition, why, "Nothing is lost; reading continues when the right is granted"
        )


class WrongClusterError(RefusedError):
    """The brokers belong to another Kafka cluster than the one whose records are in the log."""

    def __init__(self, partition: Partition, *, expected: str, found: str) -> None:
        super().__init__(
            partition,
            f"the log was read from Kafka cluster {expected}, but these brokers are cluster "
            f"{found}",
            "Check PIPELINE_KAFKA_BOOTSTRAP_SERVERS and PIPELINE_DATABASE_URL: one of them is "
            "wrong",
        )


class SharedGroupError(RefusedError):
    """Another database is fed by the same consumer group: each would get a part of the events."""

    def __init__(self, partition: Partition, *, group: str, expected: str, found: str) -> None:
        super().__init__(
            partition,
            f"consumer group {group!r} also feeds database {found}, this one is {expected}: each "
            "would get a part of the events",
            "Give each database its own PIPELINE_GROUP_ID",
        )


class CopiedDatabaseError(PipelineError):
    """The group feeds a copy of this database, or its original, at this moment."""

    exit_code = ExitCode.REFUSED

    def __init__(
        self, *, group: str, member: str, here: str, installation: object, other: str | None
    ) -> None:
        known = f" It last registered in {other}." if other else ""
        super().__init__(
            f"consumer group {group!r} has an active member that does not write to this database: "
            f"{member}.{known} This database is {here}, identity {installation}. One of the two is "
            "a copy of the other, or this one was moved while the old one still runs; each would "
            "get a part of the events. This worker leaves the group and loses nothing: its "
            "database holds the next offsets. If this is a copy, give it a PIPELINE_GROUP_ID of "
            "its own. If this database was moved, stop the workers of the old one and start again. "
            'See Operations, "Backups, copies and moves"'
        )


class InvariantError(PipelineError):
    """Something that must be impossible has happened. Stop, keep everything, wake a person."""

    exit_code = ExitCode.INVARIANT


POISON_SQLSTATES = frozenset({"23502", "23503", "23514", "54000", "54001"})
"""Besides class 22 (data exception), the only codes of errors that the record itself causes."""


DEADLOCK = "40P01"
"""SQLSTATE of a transaction that was ended to resolve a deadlock."""


def is_poison(sqlstate: str) -> bool:
    """Whether the data is wrong, so that repeating the statement cannot help."""
    return sqlstate.startswith("22") or sqlstate in POISON_SQLSTATES


def from_sqlstate(
    sqlstate: str, message: str, *, column: str | None = None, address: str = ""
) -> PipelineError:
    """The branch of the tree that a PostgreSQL error belongs to.

    Args:
        sqlstate: Five characters, as in PostgreSQL's appendix A.
        message: A text without data of any row.
        column: Column that was refused, where known.
        address: Where the server is.
    """
    if sqlstate == "55P03":
        return LockHeldError(message, sqlstate=sqlstate, address=address)
    if is_poison(sqlstate):
        return PoisonRecordError(message, sqlstate=sqlstate, column=column)
    cause = causes.of_sqlstate(sqlstate)
    if cause is None:
        return InvariantError(message)
    return server_error(cause, message, sqlstate=sqlstate, address=address)


def server_error(
    cause: Cause,
    message: str,
    *,
    sqlstate: str | None = None,
    server: Server = Server.POSTGRESQL,
    address: str = "",
) -> TransientError | ConfigurationError:
    """The error of a server that does not serve us, by what a command must do."""
    match cause.verdict:
        case causes.Verdict.OUTAGE:
            return TransientError(message, sqlstate=sqlstate, server=server, address=address)
        case causes.Verdict.MISCONFIGURED:
            is_login = cause in causes.LOGINS
            return ConfigurationError(message, is_login=is_login, server=server, address=address)
