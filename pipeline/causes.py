"""Why a server does not serve us: an outage to wait for, or a mistake that somebody must fix.

One table for both servers, and every command uses it. A cause is found by the code that the server
or its client library reports or, where there is no code, by the words of its message. A cause that
no entry names is treated as an outage: waiting is safe, and the message is shown.

What this program itself refuses to protect data (exit code 65) is not here, because no server
reports it: each such cause is a subclass of ``errors.RefusedError``, with its message.

Codes of Kafka: librdkafka's ``rdkafka.h``. Codes of PostgreSQL: appendix A of its manual. The words
are those of librdkafka 2.x, OpenSSL 3 and libpq 15 to 18.
"""

import re
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import NamedTuple


class Verdict(Enum):
    """What a command does."""

    OUTAGE = "wait until the server is available"
    MISCONFIGURED = "end with 78; where it was right before, after a grace period"


class Cause(NamedTuple):
    """Why a server does not serve us.

    Attributes:
        verdict: What a command does.
        what: What happened, as the rest of a sentence that begins with the server's name.
        fix: What to do, as sentences.
    """

    verdict: Verdict
    what: str
    fix: str


def _outage(what: str, fix: str) -> Cause:
    return Cause(Verdict.OUTAGE, what, fix)


def _misconfigured(what: str, fix: str) -> Cause:
    return Cause(Verdict.MISCONFIGURED, what, fix)


# ------------------------------------------------------------------------------ of both servers

REFUSED_PORT = _outage(
    "refuses connections: no server listens there",
    "Check that the server runs, and that host and port are right",
)
UNKNOWN_HOST = _outage(
    "has a host name that cannot be resolved",
    "Check the spelling of the host and the name server",
)
NO_ROUTE = _outage(
    "cannot be reached over the network", "Check routes and firewalls between here and the server"
)
TIMED_OUT = _outage(
    "did not answer in time", "Check that the server runs, and firewalls between here and there"
)
UNKNOWN_CA = _misconfigured(
    "presents a certificate of an authority that this program does not trust",
    "Set the file with the authority's certificate: ssl.ca.location in PIPELINE_KAFKA_OPTIONS for "
    "Kafka, sslrootcert in PIPELINE_DATABASE_URL for PostgreSQL",
)
EXPIRED_CERTIFICATE = _misconfigured(
    "presents a certificate that has expired, or is not valid yet",
    "Have the server's certificate renewed; check the clock of this machine",
)
WRONG_HOST_NAME = _misconfigured(
    "presents a certificate for another host name",
    "Use the host name that the certificate is for, or have it issued for this one",
)
NO_TLS = _misconfigured(
    "does not speak TLS on this port",
    "Check the port; for Kafka see PIPELINE_KAFKA_SECURITY_PROTOCOL, for PostgreSQL sslmode in "
    "PIPELINE_DATABASE_URL",
)
WANTS_OUR_CERTIFICATE = _misconfigured(
    "refuses the certificate of this program, or requires one and there is none",
    "Set certificate and key of the client: ssl.certificate.location and ssl.key.location in "
    "PIPELINE_KAFKA_OPTIONS for Kafka, sslcert and sslkey in PIPELINE_DATABASE_URL for PostgreSQL",
)
NO_COMMON_TLS = _misconfigured(
    "offers no version or cipher of TLS that this program supports",
    "Have the server accept TLS 1.2 or newer",
)
UNREADABLE_CERTIFICATES = _misconfigured(
    "cannot be verified: a file of certificates or keys cannot be read here",
    "Check the path and its permissions",
)

# An alert is the server's objection to our side of the handshake, in OpenSSL's words.
TLS_ALERT_ON_CERTIFICATE = (
    r"alert (certificate required|(bad|unsupported|unknown|expired|revoked) certificate|"
    r"certificate (unknown|expired|revoked)|unknown ca)"
)
TLS_ALERT_ON_VERSION = r"alert (protocol version|handshake failure|insufficient security)"

# ------------------------------------------------------------------------------------- of Kafka

KAFKA_LOGIN = _misconfigured(
    "refused the login",
    "Check PIPELINE_KAFKA_USERNAME, PIPELINE_KAFKA_PASSWORD and PIPELINE_KAFKA_SASL_MECHANISM",
)
KAFKA_MECHANISM = _misconfigured(
    "does not offer this SASL mechanism",
    "Set PIPELINE_KAFKA_SASL_MECHANISM to the one that Upvest names",
)
KAFKA_WANTS_TLS = _misconfigured(
    "requires TLS on this port, and this program is set to connect without TLS",
    "Set PIPELINE_KAFKA_SECURITY_PROTOCOL to SASL_SSL, or use the port without TLS",
)
KAFKA_CLOSES = _outage(
    "closes each connection before it is ready",
    "Check that the brokers run, and that PIPELINE_KAFKA_SECURITY_PROTOCOL fits the port",
)
KAFKA_GROUP = _misconfigured(
    "does not let this user use consumer group {group}",
    "Ask for the right READ on this group, or set PIPELINE_GROUP_ID to a group that you may use",
)
KAFKA_TOPIC = _misconfigured(
    "does not let this user read a topic",
    "Ask for the rights READ and DESCRIBE on each topic of PIPELINE_TOPICS",
)
KAFKA_CLUSTER = _misconfigured(
    "does not let this user do this on the cluster", "Ask for the right that the message names"
)
KAFKA_SETTING = _misconfigured(
    "refuses an option of this program",
    "Check PIPELINE_KAFKA_OPTIONS and PIPELINE_KAFKA_GROUP_PROTOCOL",
)
KAFKA_UNAVAILABLE = _outage(
    "is unavailable: no broker answers", "Check that the brokers run and can be reached from here"
)
KAFKA_BUSY = _outage("is busy or reorganising", "Wait; if it lasts, read the log of the brokers")
KAFKA_UNEXPECTED = _outage(
    "answered with an unexpected error",
    "The request is repeated; if it lasts, look for this error in the log of the brokers",
)

_REORGANISING = """
    CONCURRENT_TRANSACTIONS ELIGIBLE_LEADERS_NOT_AVAILABLE FENCED_LEADER_EPOCH
    FETCH_SESSION_ID_NOT_FOUND ILLEGAL_GENERATION INVALID_FETCH_SESSION_EPOCH
    KAFKA_STORAGE_ERROR MEMBER_ID_REQUIRED NOT_CONTROLLER NOT_ENOUGH_REPLICAS
    NOT_ENOUGH_REPLICAS_AFTER_APPEND OFFSET_NOT_AVAILABLE PREFERRED_LEADER_NOT_AVAILABLE
    REASSIGNMENT_IN_PROGRESS REBOOTSTRAP_REQUIRED REPLICA_NOT_AVAILABLE STALE_BROKER_EPOCH
    STALE_CTRL_EPOCH STALE_MEMBER_EPOCH UNKNOWN_LEADER_EPOCH UNKNOWN_MEMBER_ID
    UNKNOWN_TOPIC_ID UNSTABLE_OFFSET_COMMIT _IN_PROGRESS _PREV_IN_PROGRESS _RETRY
    _UNKNOWN_BROKER _WAIT_CACHE
"""
KAFKA_CODES: Mapping[str, Cause] = {
    "_AUTHENTICATION": KAFKA_LOGIN,
    "SASL_AUTHENTICATION_FAILED": KAFKA_LOGIN,
    "UNACCEPTABLE_CREDENTIAL": KAFKA_LOGIN,
    "UNSUPPORTED_SASL_MECHANISM": KAFKA_MECHANISM,
    "ILLEGAL_SASL_STATE": KAFKA_MECHANISM,
    "SECURITY_DISABLED": KAFKA_SETTING,
    "GROUP_AUTHORIZATION_FAILED": KAFKA_GROUP,
    "TOPIC_AUTHORIZATION_FAILED": KAFKA_TOPIC,
    "CLUSTER_AUTHORIZATION_FAILED": KAFKA_CLUSTER,
    "TRANSACTIONAL_ID_AUTHORIZATION_FAILED": KAFKA_CLUSTER,
    "DELEGATION_TOKEN_AUTHORIZATION_FAILED": KAFKA_CLUSTER,
    "DELEGATION_TOKEN_AUTH_DISABLED": KAFKA_LOGIN,
    "DELEGATION_TOKEN_EXPIRED": KAFKA_LOGIN,
    "DELEGATION_TOKEN_NOT_FOUND": KAFKA_LOGIN,
    "DELEGATION_TOKEN_OWNER_MISMATCH": KAFKA_LOGIN,
    "INVALID_GROUP_ID": KAFKA_SETTING,
    "INVALID_SESSION_TIMEOUT": KAFKA_SETTING,
    "INCONSISTENT_GROUP_PROTOCOL": KAFKA_SETTING,
    "UNSUPPORTED_ASSIGNOR": KAFKA_SETTING,
    "UNSUPPORTED_VERSION": KAFKA_SETTING,
    "GROUP_MAX_SIZE_REACHED": KAFKA_SETTING,
    "INVALID_CONFIG": KAFKA_SETTING,
    "INVALID_REGULAR_EXPRESSION": KAFKA_SETTING,
    "_UNSUPPORTED_FEATURE": KAFKA_SETTING,
    "_INVALID_ARG": KAFKA_SETTING,
    "_RESOLVE": UNKNOWN_HOST,
    "_ALL_BROKERS_DOWN": KAFKA_UNAVAILABLE,
    "_TRANSPORT": KAFKA_UNAVAILABLE,
    "_TIMED_OUT": TIMED_OUT,
    "_TIMED_OUT_QUEUE": TIMED_OUT,
    "_MSG_TIMED_OUT": TIMED_OUT,
    "REQUEST_TIMED_OUT": TIMED_OUT,
    "NETWORK_EXCEPTION": KAFKA_UNAVAILABLE,
    "BROKER_NOT_AVAILABLE": KAFKA_UNAVAILABLE,
    "_WAIT_COORD": KAFKA_BUSY,
    "COORDINATOR_LOAD_IN_PROGRESS": KAFKA_BUSY,
    "COORDINATOR_NOT_AVAILABLE": KAFKA_BUSY,
    "NOT_COORDINATOR": KAFKA_BUSY,
    "LEADER_NOT_AVAILABLE": KAFKA_BUSY,
    "NOT_LEADER_FOR_PARTITION": KAFKA_BUSY,
    "REBALANCE_IN_PROGRESS": KAFKA_BUSY,
    "THROTTLING_QUOTA_EXCEEDED": KAFKA_BUSY,
    **dict.fromkeys(_REORGANISING.split(), KAFKA_BUSY),
}
"""By librdkafka's name. Any other code is ``KAFKA_UNEXPECTED``, and is waited for."""

# In this order: the first that is found counts.
KAFKA_WORDS: Sequence[tuple[re.Pattern[str], Cause]] = (
    (re.compile(TLS_ALERT_ON_CERTIFICATE), WANTS_OUR_CERTIFICATE),
    (re.compile(TLS_ALERT_ON_VERSION), NO_COMMON_TLS),
    (re.compile(r"(?i)certificate has expired|not yet valid"), EXPIRED_CERTIFICATE),
    (re.compile(r"(?i)hostname mismatch|ip address mismatch"), WRONG_HOST_NAME),
    (
        re.compile(
            r"(?i)certificate could not be verified|certificate verify failed|"
            r"unable to get (local )?issuer|"
            r"self.signed certificate|unknown ca"
        ),
        UNKNOWN_CA,
    ),
    (re.compile(r"(?i)unsupported protocol|wrong version number|packet length too long"), NO_TLS),
    (re.compile(r"(?i)ssl\.ca\.location|CA certificates|ssl\.(key|certificate)"),
     UNREADABLE_CERTIFICATES),
    (re.compile(r"(?i)unsupported SASL mechanism|mechanism .* not (enabled|supported)"),
     KAFKA_MECHANISM),
    (re.compile(r"(?i)SASL auth|authentication failed"), KAFKA_LOGIN),
    (re.compile(r"(?i)incorrect security\.protocol|connecting to a \S+ (broker )?listener"),
     KAFKA_CLOSES),
    (re.compile(r"(?i)failed to resolve"), UNKNOWN_HOST),
    (re.compile(r"(?i)connection refused"), REFUSED_PORT),
    (re.compile(r"(?i)no route to host|network is unreachable"), NO_ROUTE),
    (re.compile(r"(?i)timed out|timeout"), TIMED_OUT),
)  # fmt: skip
"""By librdkafka's message about a connection; only a few of these have a code of their own."""


def of_kafka(code: str, words: str) -> Cause:
    """Why Kafka does not serve us.

    Args:
        code: librdkafka's name of the error, e.g. ``_TRANSPORT``.
        words: Its message.
    """
    if code in {"_TRANSPORT", "_SSL", "_ALL_BROKERS_DOWN", "_AUTHENTICATION", "_FAIL"}:
        for pattern, cause in KAFKA_WORDS:
            if pattern.search(words):
                return cause
    return KAFKA_CODES.get(code, KAFKA_UNEXPECTED)


# -------------------------------------------------------------------------------- of PostgreSQL

POSTGRES_LOGIN = _misconfigured(
    "refused the login",
    "Check user and password in PIPELINE_DATABASE_URL or in libpq's PGPASSFILE, and that the "
    "password is still valid (VALID UNTIL of the role)",
)
POSTGRES_LOGIN_RULE = _misconfigured(
    "does not let this user log in",
    "A rule of pg_hba.conf must let this host, user and database in, and the role must exist and "
    "have LOGIN",
)
POSTGRES_RULE = _misconfigured(
    "has no rule in pg_hba.conf for this host, user and database",
    "Have a DBA add one, or connect as the rules require (with TLS, for example)",
)
POSTGRES_NO_ROLE = _misconfigured(
    "has no such user, or the user may not log in",
    "Check the user in PIPELINE_DATABASE_URL; a DBA creates one with CREATE ROLE … LOGIN",
)
POSTGRES_NO_DATABASE = _misconfigured(
    "has no such database, or this user may not connect to it",
    "Check the database in PIPELINE_DATABASE_URL, and have a DBA create it or GRANT CONNECT on it",
)
POSTGRES_RIGHT = _misconfigured(
    "denies a right that this login needs",
    "`pipeline check` lists the rights that are missing; where the database has roles, "
    "`pipeline migrate` grants them again",
)
POSTGRES_POLICY = _misconfigured(
    "refuses a statement because of row-level security on a table of ours",
    "Have its owner run ALTER TABLE … DISABLE ROW LEVEL SECURITY; `pipeline check` names the table",
)
POSTGRES_SCHEMA = _misconfigured(
    "lacks an object that `pipeline migrate` creates",
    "Run `pipeline check`, then `pipeline migrate`; restore from a backup what was dropped by hand",
)
POSTGRES_FOREIGN_CODE = _misconfigured(
    "was stopped by code of somebody else: a trigger or a function raised an error",
    "Have its owner change it, or drop the trigger",
)
POSTGRES_LIBRARY = _misconfigured(
    "cannot start a session: a library that it must load is missing",
    "Correct session_preload_libraries and local_preload_libraries of the role, the database or "
    "the server: ALTER ROLE … RESET, for example",
)
POSTGRES_OTHER_TABLES = _misconfigured(
    "has a table of ours that somebody has changed: a statement does not fit it",
    "Run `pipeline check`; undo the change",
)
POSTGRES_FULL_OF_SESSIONS = _outage(
    "accepts no more connections: all its slots are in use",
    "Close sessions, or raise max_connections or the role's CONNECTION LIMIT",
)
POSTGRES_NO_ROOM = _outage(
    "has no space left on a disk: nothing can be written until there is",
    "Free space on the disk of the database; nothing else helps",
)
POSTGRES_READ_ONLY = _outage(
    "is read-only: a standby, or a server on which writing was stopped",
    "Connect to the primary (HOST1,HOST2 in PIPELINE_DATABASE_URL finds it), or allow writing",
)
POSTGRES_PARAMETER = _misconfigured(
    "cannot be connected to: libpq refuses a parameter of the connection",
    "Correct it in PIPELINE_DATABASE_URL, in libpq's variables (PG…) or its service file",
)
POSTGRES_SESSION_SETTING = _misconfigured(
    "refuses a setting for our session",
    "Remove or correct it: `options` in PIPELINE_DATABASE_URL or in libpq's service file, or "
    "PGOPTIONS",
)
POSTGRES_STARTS = _outage(
    "is starting or stopping", "Wait; if it lasts, read the log of the server"
)
POSTGRES_BROKE = _outage(
    "closed the connection", "Wait, the server may be restarting; if it lasts, read its log"
)
POSTGRES_CONFLICT = _outage(
    "ended the transaction to resolve a conflict with another one",
    "Nothing: the transaction is repeated",
)
POSTGRES_RESOURCES = _outage(
    "lacks memory or another resource", "Read the log of the server; the work is repeated"
)

LOGINS = frozenset({KAFKA_LOGIN, POSTGRES_LOGIN})
"""An account may be locked after too many of these."""

# The longest prefix wins. Codes for bad records, and for defects of this program, are in `errors`.
SQLSTATES: Mapping[str, Cause] = {
    "08": POSTGRES_BROKE,
    "0A": POSTGRES_OTHER_TABLES,
    "25006": POSTGRES_READ_ONLY,
    "25P03": POSTGRES_CONFLICT,
    "25P04": POSTGRES_CONFLICT,
    "28": POSTGRES_LOGIN_RULE,
    "28P01": POSTGRES_LOGIN,
    "3D000": POSTGRES_NO_DATABASE,
    "3F000": POSTGRES_SCHEMA,
    "40": POSTGRES_CONFLICT,
    "42501": POSTGRES_RIGHT,
    "42703": POSTGRES_SCHEMA,
    "42883": POSTGRES_SCHEMA,
    "42P01": POSTGRES_SCHEMA,
    "42P10": POSTGRES_OTHER_TABLES,
    "42804": POSTGRES_OTHER_TABLES,
    "42809": POSTGRES_OTHER_TABLES,
    "428C9": POSTGRES_OTHER_TABLES,
    "53": POSTGRES_RESOURCES,
    "53100": POSTGRES_NO_ROOM,
    "53300": POSTGRES_FULL_OF_SESSIONS,
    "55006": POSTGRES_CONFLICT,
    "57": POSTGRES_BROKE,
    "57014": POSTGRES_CONFLICT,
    "57P03": POSTGRES_STARTS,
    "57P04": POSTGRES_NO_DATABASE,
    "P0": POSTGRES_FOREIGN_CODE,
    "58": _outage("has an error of its disk", "Read the log of the server; the work is repeated"),
}

# In this order: the first that is found counts. libpq gives no code when a connection fails.
LIBPQ_WORDS: Sequence[tuple[re.Pattern[str], Cause]] = (
    # First: a function that runs at each login can raise any text.
    (re.compile(r"\n.*PL/\w+ function|SQL function"), POSTGRES_FOREIGN_CODE),
    (re.compile(r"could not (access file|load library)"), POSTGRES_LIBRARY),
    (re.compile(r"permission denied to set parameter|unrecognized configuration parameter|"
                r"invalid value for parameter|parameter \S+ cannot be (set|changed)"),
     POSTGRES_SESSION_SETTING),
    (re.compile(TLS_ALERT_ON_CERTIFICATE + "|requires a valid client certificate"),
     WANTS_OUR_CERTIFICATE),
    (re.compile(TLS_ALERT_ON_VERSION), NO_COMMON_TLS),
    (re.compile(r"password authentication failed|no password supplied|authentication failed"),
     POSTGRES_LOGIN),
    (re.compile(r"pg_hba\.conf"), POSTGRES_RULE),
    (re.compile(r'role ".*" does not exist|is not permitted to log in'), POSTGRES_NO_ROLE),
    (re.compile(r'database ".*" does not exist|permission denied for database|'
                r"not currently accepting connections"), POSTGRES_NO_DATABASE),
    (re.compile(r"too many (clients|connections)|connection slots"), POSTGRES_FULL_OF_SESSIONS),
    (re.compile(r"read-only|in hot standby mode|standby"), POSTGRES_READ_ONLY),
    (re.compile(r"is (starting up|shutting down)|recovery"), POSTGRES_STARTS),
    (re.compile(r"does not support SSL|server does not support|SSL was required"), NO_TLS),
    (re.compile(r"does not match host name|IP address mismatch|hostname mismatch"),
     WRONG_HOST_NAME),
    (re.compile(r"certificate has expired|not yet valid"), EXPIRED_CERTIFICATE),
    (re.compile(r"certificate verify failed|unable to get local issuer|self.signed"), UNKNOWN_CA),
    (re.compile(r"root certificate file|could not (load|read) .*(certificate|key)|"
                r"certificate file|private key file"), UNREADABLE_CERTIFICATES),
    (re.compile(r"(?i)could not translate host name|name or service not known|"
                r"failed to resolve host|name resolution|nodename nor servname"), UNKNOWN_HOST),
    (re.compile(r"(?i)connection refused|No such file or directory"), REFUSED_PORT),
    (re.compile(r"(?i)no route to host|network is unreachable"), NO_ROUTE),
    (re.compile(r"(?i)definition of service|service file|bad value for|"
                r"invalid \S+ value|invalid port|invalid connection option"), POSTGRES_PARAMETER),
    (re.compile(r"(?i)timeout|timed out"), TIMED_OUT),
)  # fmt: skip
"""By the message of libpq or of the server about a connection that failed."""


def of_sqlstate(sqlstate: str) -> Cause | None:
    """Why PostgreSQL does not serve us; None where the code means something else."""
    for length in (5, 3, 2):
        if cause := SQLSTATES.get(sqlstate[:length]):
            return cause
    return None


_QUOTED = re.compile(r'"[^"\n]*"')


def of_libpq(words: str) -> Cause | None:
    """Why a connection to PostgreSQL failed; None where its words are not known.

    Of several hosts, one that refuses us is named before one that is unavailable: it runs.

    Args:
        words: libpq's message; several lines where it tried several hosts. The server's part of it
            is in the language of its lc_messages.
    """
    # The name of a host, role or database may be one of the words below.
    words = _QUOTED.sub('""', words)
    for pattern, cause in LIBPQ_WORDS:
        if pattern.search(words):
            return cause
    return None


# The causes of codes that mean something else when they refuse a statement.
_AT_LOGIN: Mapping[str, Cause] = {
    "22023": POSTGRES_SESSION_SETTING,
    "42501": POSTGRES_NO_DATABASE,
    "42704": POSTGRES_SESSION_SETTING,
    "55P02": POSTGRES_SESSION_SETTING,
    "58P01": POSTGRES_LIBRARY,
}


def of_login(sqlstates: Sequence[str]) -> Cause:
    """Why a connection to PostgreSQL failed, by the codes of the servers that were tried."""
    found = [_AT_LOGIN.get(code) or of_sqlstate(code) for code in sqlstates]
    known = [cause for cause in found if cause]
    misconfigured = [cause for cause in known if cause.verdict is Verdict.MISCONFIGURED]
    return next(iter(misconfigured or known), POSTGRES_BROKE)
