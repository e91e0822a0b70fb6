"""Every kind of problem that `status`, `check` and `verify` report, with its fix.

Only this module has these texts, so that a problem reads the same wherever it is reported. What a
partition is halted for, and its fix, are in ``pipeline.errors``: see ``problem.of_refusal``.
"""

from pipeline.health.problem import Kind

_RUN = "start `pipeline run`; if it runs, read its log"
_SEE_READER = (
    "check that this process runs. If it runs, read its log: it may wait for Kafka or for the "
    "database (not reachable, a refused login, a full disk). If you run this command on a standby, "
    "check that the standby does not lag"
)
_REBUILD = "`pipeline rebuild {subject}`"

# ----------------------------------------------------------------------------- servers, any command

SERVER_ERROR = Kind("error", "{error}", "resolve this, then run the command again")
SERVER_UNAVAILABLE = Kind(
    "error", "{error}", "check that the server runs and can be reached from here"
)

# --------------------------------------------------------------------------- partitions of the log

NOTHING_READ = Kind("error", "no partition was read yet, so no events arrive", _RUN)
EMPTY_LOG = Kind("unknown", "the log is empty", _RUN)
HALTED = Kind("error", "halted: {why}", "{fix}")
READER_SILENT = Kind(
    "error",
    "its state is unknown: its reader, {reader}, last recorded Kafka's end offset at {since}, so "
    "perhaps no process reads it",
    _SEE_READER,
)
SEEN_IN_FUTURE = Kind(
    "error",
    "its state is unknown: its reader, {reader}, recorded Kafka's end offset at {since}, which is "
    "in the future by the clock of this database, so nobody knows how old that is",
    _SEE_READER,
)
NO_READER = Kind(
    "error",
    "no process reads it, so no events arrive; Kafka's end offset was last recorded at {since}",
    "start `pipeline run`; if it runs, read its log: Kafka or the database may be unavailable",
)
INGEST_STALLED = Kind(
    "error",
    "its lag is {lag}, and the last commit was at {since}",
    "read the log of its reader, {reader}: it says what the reader waits for (a full disk, a lock, "
    "a right in the database, Kafka)",
)
INGEST_LAGS = Kind(
    "warning",
    "its lag is {lag} and {length}",
    "wait, or start another worker: `pipeline ingest`",
)
RETENTION_ENDS = Kind(
    "warning",
    "in about {left}, Kafka may delete the oldest unread event",
    "resolve the other problems before that time",
)
RETENTION_ENDED = Kind(
    "error",
    "the retention of the oldest unread event is over, so Kafka may have deleted events",
    "resolve the other problems now. If events were deleted, the partition is then halted, and "
    "`pipeline gaps list` shows their offsets",
)
_RECORDS_DELETED = "Kafka's retention has deleted {deleted} from {first} on before they were read"
RECORDS_DELETED = Kind(
    "error",
    _RECORDS_DELETED,
    "start `pipeline run`: it halts this partition and records the gap. Then see "
    "`pipeline gaps list`",
)
RECORDS_DELETED_AND_HALTED = Kind(
    "error",
    _RECORDS_DELETED,
    "see `pipeline gaps list`; to continue without them: `pipeline gaps accept {subject}`",
)
BAD_RECORDS = Kind(
    "warning",
    "{bad} of the last hour could not be decoded: {reasons}. The log has them; no read model takes "
    "them",
    "run `pipeline events --bad`",
)
LOG_NOT_PROTECTED = Kind(
    "error",
    "{table} can be changed: its append-only trigger is missing or disabled",
    "enable it, or create it again: CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR "
    "TRUNCATE ON {table} FOR EACH STATEMENT EXECUTE FUNCTION pipeline.refuse_change()",
)
LOG_NOT_PROTECTED_BY_RIGHTS = Kind(
    "warning",
    "this role owns the log or may change it: only triggers keep it append-only",
    "run this program with a role that has only SELECT and INSERT on pipeline.events",
)
KEYING_UNKNOWN = Kind(
    "unknown",
    "its key (tenant, user or entity) is not known: {records} too few to decide",
    "run `pipeline check` again when there are more records",
)

# -------------------------------------------------------------------- the log, proven by `verify`

LOG_CONTRADICTED = Kind(
    "error",
    "rows violate this claim: a person or a damaged disk has changed them",
    "find out who or what changed them; restore them from a backup, or with `pipeline rewind` if "
    "they are missing. See docs/operations.md, Verify",
)
MISSING_IN_LOG = Kind(
    "error",
    "these records are in Kafka and not in the log",
    "run `pipeline rewind {topic}:{number} --to {first} --execute`",
)
DIFFERS_FROM_KAFKA = Kind(
    "error",
    "these records differ between Kafka and the log",
    "find out who changed the log or the topic",
)
MISSING_IN_KAFKA = Kind(
    "error",
    "these records are in the log and not in Kafka",
    "find out whether the topic was compacted, or deleted and recreated",
)
NO_LONGER_IN_KAFKA = Kind(
    "unknown",
    "offsets {first} to {last} are no longer in Kafka",
    "nothing: only records that Kafka still has can be compared",
)
PARTITION_NOT_VISIBLE = Kind(
    "unknown",
    "Kafka has no such partition, or hides it from this user",
    "check the name of the topic, and the rights of the Kafka user",
)
NOT_COMPARED = Kind("unknown", "{error}", "resolve this, then run `pipeline verify` again")

# ---------------------------------------------------------------------------------- read models

BROKEN = Kind(
    "error",
    "broken, so it is halted: {why}",
    f"fix the cause (its declaration, or what somebody changed), then run {_REBUILD}",
)
STALE = Kind(
    "warning",
    "stale: its definition has changed since the table was built, so no events are applied to it",
    f"start `pipeline run` or `pipeline project`, which rebuild it; or run {_REBUILD}",
)
NOT_AS_DECLARED = Kind("error", "{what}", "run `pipeline migrate`")
REBUILDING = Kind(
    "warning", "a rebuild is running, or was interrupted", f"wait, or resume it with {_REBUILD}"
)
CATCHING_UP = Kind(
    "warning",
    "its lag is {lag}, of which the oldest came into the log {length} ago",
    "wait; if the lag grows, start another worker",
)
PROJECTION_STALLED = Kind(
    "error",
    "its lag is {lag}, and one of its checkpoints has not moved since {since}",
    "read the log of the process that projects it: it says what the process waits for (a lock, a "
    "full disk, a right in the database)",
)
NOT_PROJECTED = Kind(
    "error",
    "no process projects it; its checkpoint last moved at {since}, and its lag is {lag}",
    "start `pipeline run` or `pipeline project`",
)
NOT_PROJECTED_WITHOUT_LAG = Kind(
    "warning",
    "no process projects it; its checkpoint last moved at {since}, and its lag is 0",
    "start `pipeline run` or `pipeline project`",
)
DEAD_LETTERS = Kind(
    "warning",
    "it has {letters}: events that it rejected",
    "run `pipeline dead-letters list {subject}`; after a fix, `pipeline dead-letters retry "
    "{subject}`",
)
NOT_REFILLED = Kind(
    "error",
    "table {table} is not refilled after TRUNCATE: its trigger is missing or disabled",
    "run the SQL: SELECT pipeline.watch_read_model('{table}', '{subject}')",
)
CHANGED_TABLE = Kind("error", "{changes}", "{fixes}. Then run `pipeline rebuild {subject}`")
DIFFERS_FROM_REPLAY = Kind(
    "error",
    "{missing}, {changed}, {surplus:,} should not exist",
    _REBUILD,
)

# ---------------------------------------------------------------------------------- PostgreSQL

STANDBY_PAUSED = Kind(
    "error",
    "this database is a standby that has applied no transaction since {since}: what is shown here "
    "may be out of date",
    "its replay is paused: run SELECT pg_wal_replay_resume() there, or connect to the primary",
)
STANDBY_LAGS = Kind(
    "error",
    "this database is a standby that has applied no transaction since {since}: what is shown here "
    "may be out of date",
    "connect to the primary; if it has newer data, check that the standby is connected to it",
)
IS_STANDBY = Kind(
    "error",
    "the database is a standby, which is read-only",
    "set PIPELINE_DATABASE_URL to the primary",
)
NEWER_SERVER = Kind(
    "warning",
    "{server} is newer than the versions with which this program was tested",
    "run the tests of this program on this version first",
)
WRITES_NOT_SAFE = Kind(
    "warning",
    "{setting} is off: a crash of the machine may lose or corrupt committed data",
    "set {setting} to on in the server's configuration",
)
COMMITS_NOT_SAFE = Kind(
    "warning",
    "synchronous_commit is off: a crash undoes the last commits, although analysts may have seen "
    "them; they are then read from Kafka again",
    "set synchronous_commit to on for this role",
)
NO_CHECKSUMS = Kind(
    "warning",
    "data checksums are off: a disk that changes the log is not detected",
    "stop the server and run pg_checksums --enable",
)
UNKNOWN_SETTINGS = Kind(
    "warning",
    "this PostgreSQL has settings that this program does not know: {names}",
    "leave them at their defaults, or use a newer version of this program",
)
DATABASE_WITHOUT_TLS = Kind(
    "warning",
    "sslmode={sslmode}, and no TLS to {host}: others can read and change what is sent over the "
    "network",
    "add ?sslmode=verify-full&sslrootcert=system to PIPELINE_DATABASE_URL",
)
DATABASE_NOT_VERIFIED = Kind(
    "warning",
    "{tls}, but sslmode={sslmode} does not verify that the server is {host}",
    "add ?sslmode=verify-full&sslrootcert=system to PIPELINE_DATABASE_URL",
)
NO_CHANNEL_BINDING = Kind(
    "warning",
    "{tls} to {host} is verified, but channel_binding=disable allows anyone who has a certificate "
    "for that name to forward the login",
    "set channel_binding=require in PIPELINE_DATABASE_URL",
)
WEAK_PASSWORDS = Kind(
    "warning",
    "password_encryption is md5: anyone who can read the stored hash of a password can log in with "
    "it",
    "set it to scram-sha-256, then set the passwords again",
)
SERVER_LOGS_VALUES = Kind(
    "warning",
    "the server log of PostgreSQL contains values that PostgreSQL refuses (log_min_messages is "
    "{level})",
    "have a superuser run: ALTER ROLE {role} SET log_min_messages = 'fatal'. The log of this "
    "program names the column of a refused value, without the value",
)
FOREIGN_OBJECT = Kind("error", "{what}", "{fix}")
RIGHTS_MISSING = Kind(
    "error",
    "this role lacks rights to {purpose}: {privileges} on {name}",
    "{grant} to this role",
)
ROLE_WITHOUT_PURPOSE = Kind(
    "error",
    "this role has neither the rights to ingest nor the rights to project",
    "GRANT {prefix}ingest, {prefix}project TO this role; `pipeline migrate --roles` creates the "
    "two roles",
)
ANALYST_WITHOUT_LIMITS = Kind(
    "warning",
    "a query of analyst {login} may block others without limit: {settings} are not set for this "
    "login",
    "run ALTER ROLE {login} SET … for each of them; a login does not inherit settings from {group}",
)

# --------------------------------------------------------------------------------------- Kafka

NOT_REPORTED = Kind("unknown", "Kafka does not report {what}", "ask Upvest")
KAFKA_WITHOUT_TLS = Kind(
    "warning",
    "{protocol}: others can read {exposed}",
    "set PIPELINE_KAFKA_SECURITY_PROTOCOL to SASL_SSL",
)
DEFAULT_TOPIC_MISSING = Kind(
    "warning",
    "{why}; the other topics are read",
    "have Upvest provide the topic (Prices needs a separate contract), or set "
    "PIPELINE_TOPICS={rest}",
)
TOPIC_MISSING = Kind(
    "error",
    "{why}",
    "correct PIPELINE_TOPICS, or have Upvest provide the topic; Kafka shows {visible}",
)
TOPIC_REFUSED = Kind(
    "error",
    "Kafka does not let {user} read this topic (TOPIC_AUTHORIZATION_FAILED)",
    "request {right}",
)
GROUP_REFUSED = Kind(
    "error",
    "Kafka does not let {user} join consumer group {group!r} (GROUP_AUTHORIZATION_FAILED)",
    "request {right}; or set PIPELINE_GROUP_ID to a group that you may use",
)
GROUP_SHARED = Kind(
    "error",
    "consumer group {group!r} also feeds database {others}: each database would get only a part of "
    "the events",
    "give each database its own PIPELINE_GROUP_ID",
)
COMPACTED = Kind(
    "warning",
    "the topic is compacted: Kafka may remove records before they are read, and this cannot be "
    "detected",
    "request cleanup.policy=delete from Upvest",
)
RETENTION_SHORT = Kind(
    "warning",
    "Kafka keeps the records of the topic for {kept}, but PIPELINE_LONGEST_OUTAGE_HOURS is "
    "{outage}: a longer outage than {kept} loses records",
    "request a longer retention.ms from Upvest, or set PIPELINE_LONGEST_OUTAGE_HOURS to a length "
    "that you can guarantee",
)
RETENTION_BY_SIZE = Kind(
    "warning",
    "Kafka keeps at most {bytes:,} bytes per partition (retention.bytes) and deletes even new "
    "records above that: on a busy day, an outage shorter than the planned one may lose records",
    "request retention.bytes=-1 from Upvest",
)
UNCLEAN_ELECTION = Kind(
    "warning",
    "unclean.leader.election.enable is true: a broker that lags may become the "
    "leader, and the records that it lacks are lost",
    "request unclean.leader.election.enable=false from Upvest",
)
ONE_COPY = Kind(
    "warning",
    "the topic has only one replica: if the disk of its broker fails, all unread records are lost",
    "request a replication factor of 3 from Upvest",
)
ONE_CONFIRMS = Kind(
    "warning",
    "min.insync.replicas is {in_sync}: if a broker fails, records that only this broker has "
    "confirmed are lost",
    "request min.insync.replicas=2 from Upvest",
)
LARGE_RECORDS = Kind(
    "warning",
    "the topic allows records of {most:,} bytes, more than PIPELINE_BATCH_BYTES ({batch:,}): such "
    "a record needs several times its size in memory",
    "check that there is enough memory, and set PIPELINE_BATCH_BYTES to {most} or more",
)
