"""Every kind of problem that `status`, `check` and `verify` report, with its fix.

Only this module has these texts, so that a problem reads the same wherever it is reported. What a
partition is halted for has its text in ``pipeline.errors``: see ``problem.of_refusal``.
"""

from pipeline.health.problem import Kind

_RUN = "start `pipeline run`; if it runs, read its log"
_SEE_READER = (
    "check that this process runs. If it does, read its log: it may wait for Kafka or for the "
    "database (not reachable, a refused login, a full disk). On a standby, check that it does not "
    "lag"
)
_REBUILD = "`pipeline rebuild {subject}`"

# ----------------------------------------------------------------------------- servers, any command

SERVER_ERROR = Kind("error", "{error}", "resolve this, then run the command again")
SERVER_UNAVAILABLE = Kind(
    "error", "{error}", "check that the server runs and can be reached from here"
)

# --------------------------------------------------------------------------- partitions of the log

NOTHING_READ = Kind("error", "no partition was read yet: events do not get through", _RUN)
EMPTY_LOG = Kind("unknown", "the log is empty", _RUN)
HALTED = Kind(
    "error", "halted: {why}", "resolve the cause; see docs/operations.md, Halted partitions"
)
READER_SILENT = Kind(
    "error",
    "state unknown since {since}: since then its reader, {reader}, has not recorded where Kafka "
    "ends, so perhaps no process reads it",
    _SEE_READER,
)
SEEN_IN_FUTURE = Kind(
    "error",
    "state unknown: its reader, {reader}, recorded Kafka's end at {since}, which is in the future "
    "by the clock of this database, so the age of that is not known",
    _SEE_READER,
)
NO_READER = Kind(
    "error",
    "no process reads it; Kafka's end was recorded last at {since}. Events do not get through",
    "start `pipeline run`; if it runs, read its log: it may have lost Kafka or the database",
)
INGEST_STALLED = Kind(
    "error",
    "{lag:,} records behind; the last commit was at {since}",
    "read the log of its reader, {reader}: it reports what it waits for (a full disk, a lock, a "
    "right of the database, Kafka)",
)
INGEST_LAGS = Kind(
    "warning",
    "{lag:,} records and {length} behind",
    "wait, or start another `pipeline ingest`",
)
RETENTION_ENDS = Kind(
    "warning",
    "Kafka may delete the oldest event that was not read in about {left}",
    "resolve the other problems before that",
)
RETENTION_ENDED = Kind(
    "error",
    "the retention of the oldest event that was not read is over, so Kafka may have deleted events",
    "resolve the other problems now. If events are lost, their partition is halted then, and "
    "`pipeline gaps list` names them",
)
RECORDS_DELETED = Kind(
    "error",
    "Kafka has deleted {count:,} offsets from {first} on before they were read",
    "run `pipeline ingest`, then see `pipeline gaps list`",
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
    "run with a role that has only SELECT and INSERT there",
)
KEYING_UNKNOWN = Kind(
    "unknown",
    "by what it is keyed: {records:,} recent records are too few to decide",
    "run `pipeline check` again when there are more",
)

# -------------------------------------------------------------------- the log, proven by `verify`

LOG_CONTRADICTED = Kind(
    "error",
    "rows contradict the claim",
    "somebody or a damaged disk has changed them: see docs/operations.md, Prove it",
)
MISSING_IN_LOG = Kind(
    "error",
    "in Kafka and not in the log",
    "`pipeline rewind {topic}:{number} --to {first}`",
)
DIFFERS_FROM_KAFKA = Kind(
    "error",
    "in Kafka and in the log, and not the same",
    "find out who changed the log or the topic",
)
MISSING_IN_KAFKA = Kind(
    "error",
    "in the log and not in Kafka",
    "find out whether the topic was compacted, or deleted and created again",
)
NO_LONGER_IN_KAFKA = Kind(
    "unknown",
    "offsets {first} to {last} are no longer in Kafka",
    "nothing: only records that Kafka still has can be compared",
)
PARTITION_NOT_VISIBLE = Kind(
    "unknown",
    "Kafka has no such partition, or hides it from this login",
    "check the name of the topic, and the rights of the login",
)
NOT_COMPARED = Kind("unknown", "{error}", "resolve this, then run `pipeline verify` again")

# ---------------------------------------------------------------------------------- read models

BROKEN = Kind("error", "broken, halted: {why}", f"fix the projector, then {_REBUILD}")
STALE = Kind(
    "warning",
    "its definition has changed since the table was built, so nothing is projected into it",
    f"`pipeline run` and `pipeline project` rebuild it; or {_REBUILD}",
)
NOT_AS_DECLARED = Kind("error", "{what}", "`pipeline migrate`")
REBUILDING = Kind(
    "warning", "a rebuild is running, or was interrupted", f"wait, or resume it with {_REBUILD}"
)
CATCHING_UP = Kind("warning", "{lag:,} records behind; the oldest came {length} ago", "wait")
PROJECTION_STALLED = Kind(
    "error",
    "{lag:,} records behind; one of its partitions has not moved since {since}",
    "read the log of the process that projects: it reports what it waits for (a lock, a full disk, "
    "a right of the database)",
)
NOT_PROJECTED = Kind(
    "error",
    "no process projects it; it moved last at {since}, and its lag is {lag:,} records",
    "start `pipeline run` or `pipeline project`",
)
NOT_PROJECTED_WITHOUT_LAG = Kind(
    "warning",
    "no process projects it; it moved last at {since}, and has everything that is in the log",
    "start `pipeline run` or `pipeline project`",
)
DEAD_LETTERS = Kind(
    "warning", "{count:,} dead letters", "see `pipeline dead-letters list {subject}`"
)
NOT_REFILLED = Kind(
    "error",
    "table {table} is not refilled after TRUNCATE: its trigger is missing or disabled",
    "SELECT pipeline.watch_read_model('{table}', '{subject}')",
)
CHANGED_TABLE = Kind("error", "{changes}", "{fixes}. Then run `pipeline rebuild {subject}`")
DIFFERS_FROM_REPLAY = Kind(
    "error",
    "{missing:,} rows are missing, {changed:,} are not the same, {surplus:,} should not exist",
    _REBUILD,
)

# ---------------------------------------------------------------------------------- PostgreSQL

STANDBY_PAUSED = Kind(
    "error",
    "this database is a standby that has applied no transaction since {since}: what is shown here "
    "may be out of date",
    "its replay is paused: pg_wal_replay_resume() resumes it; or connect to the primary",
)
STANDBY_LAGS = Kind(
    "error",
    "this database is a standby that has applied no transaction since {since}: what is shown here "
    "may be out of date",
    "connect to the primary; if it has newer data, check that the standby is connected to it",
)
IS_STANDBY = Kind("error", "it is a standby, and read-only", "connect to the primary")
NEWER_SERVER = Kind(
    "warning", "{server}: newer than tested", "run the tests of this program on it first"
)
WRITES_NOT_SAFE = Kind(
    "warning",
    "{setting} is off: a crash of the machine may lose or mix up what was committed",
    "turn {setting} on",
)
COMMITS_NOT_SAFE = Kind(
    "warning",
    "synchronous_commit is off: a crash undoes the last commits, which analysts may have seen; "
    "Kafka must still have them",
    "turn synchronous_commit on for this role",
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
    "{tls} to {host}, verified, but with channel_binding=disable anyone who has a certificate for "
    "that name can forward the login",
    "set channel_binding=require in PIPELINE_DATABASE_URL",
)
WEAK_PASSWORDS = Kind(
    "warning",
    "password_encryption is md5: anyone who reads the stored form of a password that is set now "
    "can log in with it",
    "set it to scram-sha-256, then set the passwords again",
)
SERVER_LOGS_VALUES = Kind(
    "warning",
    "PostgreSQL's own log repeats values that it refuses (log_min_messages is {level})",
    "have a superuser run: ALTER ROLE {role} SET log_min_messages = 'fatal'; refused values are "
    "named in our log, without the values",
)
FOREIGN_OBJECT = Kind("error", "{what}", "{fix}")
RIGHTS_MISSING = Kind(
    "error",
    "rights missing to {purpose}: {privileges} on {name}",
    "{grant} to this role",
)
ROLE_WITHOUT_PURPOSE = Kind(
    "error",
    "this role has neither the rights to ingest nor those to project",
    "GRANT {prefix}ingest, {prefix}project to it; `pipeline migrate --roles` creates these roles",
)
ANALYST_WITHOUT_LIMITS = Kind(
    "warning",
    "analyst {login} may make others wait: not set for this login: {settings}",
    "ALTER ROLE {login} SET …; settings are not inherited from {group}",
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
    "have Upvest provide it (Prices needs a contract of its own), or set PIPELINE_TOPICS={rest}",
)
TOPIC_MISSING = Kind("error", "{why}", "or set PIPELINE_TOPICS; Kafka shows {visible}")
TOPIC_REFUSED = Kind(
    "error",
    "{user} may not read it (TOPIC_AUTHORIZATION_FAILED)",
    "request {right}",
)
GROUP_REFUSED = Kind(
    "error",
    "{user} may not join consumer group {group!r} (GROUP_AUTHORIZATION_FAILED)",
    "request {right}; or set PIPELINE_GROUP_ID to a group that you may use",
)
GROUP_SHARED = Kind(
    "error",
    "group {group} also feeds database {others}: each would get a part of the events",
    "give each database its own PIPELINE_GROUP_ID",
)
COMPACTED = Kind(
    "warning",
    "it is compacted: Kafka removes records that are not read in time, without a trace",
    "request cleanup.policy=delete",
)
RETENTION_SHORT = Kind(
    "warning",
    "it keeps its records for {kept}, you plan for an outage of {outage}",
    "request more, or set PIPELINE_LONGEST_OUTAGE_HOURS to a length that you can guarantee",
)
RETENTION_BY_SIZE = Kind(
    "warning",
    "it keeps at most {bytes:,} bytes per partition, however new: on a busy day that "
    "may be less than the outage that you plan for",
    "request retention by time alone",
)
UNCLEAN_ELECTION = Kind(
    "warning",
    "unclean.leader.election.enable is true: a broker that lags may become the "
    "leader, and the records that it lacks are lost",
    "request unclean.leader.election.enable=false",
)
ONE_COPY = Kind(
    "warning",
    "it has one copy: with its broker's disk, all records that were not read are lost",
    "request a replication factor of 3",
)
ONE_CONFIRMS = Kind(
    "warning",
    "min.insync.replicas is {in_sync}: records that only one broker has confirmed "
    "may be lost with it",
    "request min.insync.replicas=2",
)
LARGE_RECORDS = Kind(
    "warning",
    "it takes records of up to {most:,} bytes, a batch holds {batch:,}: such a record "
    "is held whole, and more than once",
    "check that there is memory for it, and set PIPELINE_BATCH_BYTES to {most} or more",
)
