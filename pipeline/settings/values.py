"""How the text of a setting becomes its value. The error for a wrong text states what is allowed.

Each function takes the value from a source and returns the value of the setting. The message of
its ``ValueError`` continues a sentence that begins with the setting's name. If a value may be a
secret, no message repeats any part of it.
"""

import json
import os
import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from psycopg import ProgrammingError
from psycopg.conninfo import conninfo_to_dict
from psycopg.pq import Conninfo
from pydantic import SecretStr

_NO_FOREIGN_CODE = "this program loads no code of others"
_OLD_PROTOCOL = "older protocols have neither headers nor transactions"
_OURS_TO_SET = "this program sets it"
_WHO_ANSWERS = "may not switch {} off: the identity of the brokers would not be verified"
_OFFSETS_ARE_OURS = "offsets are stored in PostgreSQL, with the rows they belong to"
# Options of the connection, and options on which the guarantees depend: what to use instead, or
# the reason.
_REFUSED_OPTIONS: Mapping[str, str] = {
    "bootstrap.servers": "use PIPELINE_KAFKA_BOOTSTRAP_SERVERS",
    "metadata.broker.list": "use PIPELINE_KAFKA_BOOTSTRAP_SERVERS",
    "security.protocol": "use PIPELINE_KAFKA_SECURITY_PROTOCOL",
    "sasl.mechanism": "use PIPELINE_KAFKA_SASL_MECHANISM",
    "sasl.mechanisms": "use PIPELINE_KAFKA_SASL_MECHANISM",
    "sasl.username": "use PIPELINE_KAFKA_USERNAME",
    "sasl.password": "use PIPELINE_KAFKA_PASSWORD",
    "group.id": "use PIPELINE_GROUP_ID",
    "group.instance.id": "use PIPELINE_GROUP_INSTANCE_ID",
    "group.protocol": "use PIPELINE_KAFKA_GROUP_PROTOCOL",
    "auto.offset.reset": "use PIPELINE_START; this program never skips lost offsets",
    "enable.auto.commit": _OFFSETS_ARE_OURS,
    "auto.commit.enable": _OFFSETS_ARE_OURS,
    "auto.commit.interval.ms": _OFFSETS_ARE_OURS,
    "enable.auto.offset.store": _OFFSETS_ARE_OURS,
    "offset.store.method": _OFFSETS_ARE_OURS,
    "offset.store.path": _OFFSETS_ARE_OURS,
    "isolation.level": "records of an aborted transaction are never read",
    "enable.partition.eof": "this program sets it",
    "default.topic.config": "set the options that it contains one by one",
    "offset.store.sync.interval.ms": _OFFSETS_ARE_OURS,
    "plugin.library.paths": _NO_FOREIGN_CODE,
    "ssl.engine.location": _NO_FOREIGN_CODE,
    "ssl.engine.id": _NO_FOREIGN_CODE,
    "ssl.providers": _NO_FOREIGN_CODE,
    "sasl.kerberos.kinit.cmd": "this program runs no command",
    "enable.sasl.oauthbearer.unsecure.jwt": "an unsigned token does not prove who the client is",
    "api.version.request": _OLD_PROTOCOL,
    "api.version.fallback.ms": _OLD_PROTOCOL,
    "broker.version.fallback": _OLD_PROTOCOL,
    "allow.auto.create.topics": "only the owner of a topic creates it",
    "topic.blacklist": "use PIPELINE_TOPICS",
    "internal.termination.signal": "the program handles signals",
    "log.queue": "nothing reads this queue, so no message would be logged",
    "enabled_events": _OURS_TO_SET,
    "interceptors": _OURS_TO_SET,
    "opaque": _OURS_TO_SET,
    "logger": _OURS_TO_SET,
    "on_commit": _OURS_TO_SET,
    "on_delivery": _OURS_TO_SET,
    "default_topic_conf": "set the options that it contains one by one",
}
# Families of options, by prefix or suffix.
_REFUSED_FAMILIES: Mapping[re.Pattern[str], str] = {
    re.compile(r".*_cb"): _OURS_TO_SET,
    re.compile(r"test\.mock\..*|ut_.*"): "it replaces your brokers with simulated ones",
    # Their values become part of a shell command.
    re.compile(r"sasl\.kerberos\..*"): "no mechanism of PIPELINE_KAFKA_SASL_MECHANISM uses it",
}
# Options with restricted values: what is allowed, and the reason. As librdkafka reads them: `f`
# and `0` are false, too.
_ALLOWED_VALUES: Mapping[str, tuple[re.Pattern[str], str]] = {
    "enable.ssl.certificate.verification": (re.compile(r"true|t|1"), _WHO_ANSWERS),
    "ssl.endpoint.identification.algorithm": (re.compile(r"https"), _WHO_ANSWERS),
    "topic.metadata.refresh.interval.ms": (
        re.compile(r"\d+"),
        "may not switch {} off: the program would not detect added partitions",
    ),
    "debug": (
        re.compile(r"(?!.*\b(all|conf|security)\b).*"),
        "may not contain all, conf or security for {}: the log would contain secrets",
    ),
}
_ANYTHING = re.compile(r".*", re.DOTALL)
_OPTION_NAME = re.compile(r"[a-zA-Z0-9._]+")
_TOPIC = re.compile(r"[a-zA-Z0-9._-]{1,249}")
_NAME = re.compile(r"[^\s\x00-\x1f\x7f]+")
_SERVER = re.compile(r"(\[[0-9a-fA-F:.]+\]|[a-zA-Z0-9._-]+)(:(?P<port>\d{1,5}))?")


def upper(value: object) -> object:
    """Convert to upper case."""
    return value.strip().upper() if isinstance(value, str) else value


def lower(value: object) -> object:
    """Convert to lower case."""
    return value.strip().lower() if isinstance(value, str) else value


def group_name(value: object) -> object:
    """A name in Kafka without spaces, which would be invisible in a list of groups."""
    if value is None or (isinstance(value, str) and _NAME.fullmatch(value)):
        return value
    raise ValueError("must be a name without spaces")


def topics(value: object) -> object:
    """Names of topics, by Kafka's rules, each once."""
    names = _comma_list(value)
    if not names or len(set(names)) < len(names):
        raise ValueError("must name at least one topic, each once, separated by commas")
    if not all(_TOPIC.fullmatch(name) and name not in {".", ".."} for name in names):
        raise ValueError("must name topics of 1 to 249 characters a-z A-Z 0-9 . _ -")
    return tuple(names)


def folders(value: object) -> object:
    """Paths of folders, separated as in PATH."""
    names = value.split(os.pathsep) if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(it, str | Path) for it in names):
        raise ValueError(f"must be paths of folders, separated by {os.pathsep}")
    return tuple(Path(name) for name in names if str(name).strip())


def servers(value: object) -> object:
    """Brokers, in librdkafka's spelling."""
    if value is None:
        return None
    names = _comma_list(value)
    ports = [found["port"] or 9092 for name in names if (found := _SERVER.fullmatch(name))]
    if not names or len(ports) < len(names) or not all(1 <= int(port) <= 65535 for port in ports):
        raise ValueError("must be host:port, several separated by commas")
    return ",".join(names)


def _comma_list(value: object) -> list[str]:
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple) or not all(isinstance(part, str) for part in parts):
        return []
    return [part.strip() for part in parts if part.strip()]


def start(value: object) -> object:
    """``earliest``, ``latest`` or a moment."""
    if isinstance(value, str) and value.lower() in {"earliest", "latest"}:
        return value.lower()
    try:
        time = datetime.fromisoformat(value) if isinstance(value, str) else value
    except ValueError:
        time = None
    if isinstance(time, datetime) and time.tzinfo is not None:
        return time
    raise ValueError(
        "must be earliest, latest, or a time with its zone such as 2026-01-31T08:00:00Z"
    )


def database_url(value: object) -> object:
    """A URL of PostgreSQL, in any form that libpq takes; it is a secret."""
    text = value.get_secret_value() if isinstance(value, SecretStr) else value
    if text is None:
        return None
    if isinstance(text, str) and (found := _DATABASE.match(text.strip())):
        url = f"postgresql://{text.strip()[found.end() :]}"
        if unknown := _unknown_parameter(url):
            raise ValueError(f"may not contain {unknown}: libpq has no such parameter")
        if _is_understood(url):
            return SecretStr(url)
    raise ValueError(
        "must be postgresql://USER:PASSWORD@HOST:PORT/DATABASE, "
        "special characters in USER and PASSWORD as %XX"
    )


_DATABASE = re.compile(r"postgres(ql(\+psycopg)?)?://")
_PORTS = re.compile(r"(\d{1,5})?(,(\d{1,5})?)*")
# A replication session accepts hardly any SQL.
_NOT_OURS = {"replication"}


def _unknown_parameter(url: str) -> str | None:
    """The name of a parameter that libpq does not have, unless it may be a part of a password."""
    _, _, query = url.partition("?")
    if "@" in query:
        return None
    known = {option.keyword.decode() for option in Conninfo.get_defaults()} | {"ssl"}
    names = [pair.partition("=")[0] for pair in query.split("&") if pair]
    return next((name for name in names if name not in known or name in _NOT_OURS), None)


def _is_understood(url: str) -> bool:
    try:
        given = conninfo_to_dict(url)
    except ProgrammingError:
        return False
    hosts, ports = (str(given.get(name, "")) for name in ("host", "port"))
    counts = {1, hosts.count(",") + 1}
    return bool(_PORTS.fullmatch(ports)) and ports.count(",") + 1 in counts


def options(value: object) -> object:
    """Options of librdkafka, as text. Each may be a secret."""
    given = _read_options(value)
    if not isinstance(given, dict):
        raise ValueError("must be a table of names and values")
    return {name: _option(name, option) for name, option in given.items()}


def _option(name: str, value: object) -> str:
    plain = value.get_secret_value() if isinstance(value, SecretStr) else value
    if not _OPTION_NAME.fullmatch(name):
        # librdkafka reads up to a NUL, so that it would see another name than the one checked here.
        raise ValueError("must name options of librdkafka: a-z 0-9 . _")
    if instead := _why_refused(name):
        raise ValueError(f"may not contain {name}: {instead}")
    if not isinstance(plain, str | int | float):
        raise ValueError(f"must have a string, a number, true or false for {name}")
    text = str(plain).lower() if isinstance(plain, bool) else str(plain)
    if "\x00" in text:
        raise ValueError(f"may not contain a NUL for {name}")
    allowed, why = _ALLOWED_VALUES.get(name, (_ANYTHING, ""))
    if not allowed.fullmatch(text.strip().lower()):
        raise ValueError(why.format(name))
    return text


def _why_refused(name: str) -> str | None:
    """The reason, for any spelling of the name; librdkafka accepts only one."""
    dotted = name.lower().replace("_", ".")
    for refused, instead in _REFUSED_OPTIONS.items():
        if dotted == refused.replace("_", "."):
            return instead
    for family, instead in _REFUSED_FAMILIES.items():
        if family.fullmatch(name.lower()):
            return instead
    return None


def _read_options(value: object) -> object:
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("{"):
        try:
            return json.loads(value)
        except json.JSONDecodeError as error:
            message = f"must be a JSON object: {error.msg} at character {error.pos}"
        raise ValueError(message)
    pairs = [pair.partition("=") for pair in re.split(r"[,\n]", value) if pair.strip()]
    if not all(equals and name.strip() for name, equals, _ in pairs):
        raise ValueError("must be name=value,name=value; a JSON object where a value has a comma")
    return {name.strip(): option.strip() for name, _, option in pairs}
