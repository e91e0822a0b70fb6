"""The settings: one field each, with default, bounds and meaning."""

import os
from collections.abc import Callable
from datetime import datetime
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, PrivateAttr, SecretStr, model_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from pipeline.errors import ConfigurationError
from pipeline.settings import values

PREFIX = "PIPELINE_"

# What libpq reads by itself when no URL is given; any one of them names a database.
_LIBPQ = ("PGHOST", "PGHOSTADDR", "PGSERVICE", "PGDATABASE")
# What somebody may change while we run.
_LOGINS = ("database_url", "kafka_username", "kafka_password", "kafka_options")
# With group.protocol=consumer the brokers decide these, and librdkafka refuses to start with them.
_CLASSIC_GROUP_OPTIONS = (
    "partition.assignment.strategy",
    "session.timeout.ms",
    "heartbeat.interval.ms",
    "group.protocol.type",
)


class KafkaClientConfig(dict[str, str | int | float | bool]):
    """Configuration of a Kafka client. Shows names only: values may be secrets."""

    def __repr__(self) -> str:
        """The names of what is set."""
        return f"{type(self).__name__}({', '.join(sorted(self))})"

    __str__ = __repr__


class Settings(BaseSettings):
    """Every setting. Immutable, and what stands here has been checked.

    Building one reads neither the environment nor files: that is ``load_settings``.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
    )

    database_url: Annotated[SecretStr | None, BeforeValidator(values.database_url)] = Field(
        default=None,
        description="The database of the log and the read models: postgresql://USER:PASSWORD@HOST/DB",
    )

    kafka_bootstrap_servers: Annotated[str | None, BeforeValidator(values.servers)] = Field(
        default=None,
        description="The brokers to ask first: host:port, several separated by commas",
    )
    kafka_security_protocol: Annotated[
        Literal["SASL_SSL", "SASL_PLAINTEXT", "SSL", "PLAINTEXT"], BeforeValidator(values.upper)
    ] = Field(default="SASL_SSL", description="How to talk to the brokers")
    kafka_sasl_mechanism: Annotated[
        Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER"] | None,
        BeforeValidator(values.upper),
    ] = Field(default=None, description="How to log in; Upvest names it for each client")
    kafka_username: str | None = Field(
        default=None, min_length=1, description="The user to log in with"
    )
    kafka_password: SecretStr | None = Field(
        default=None, min_length=1, description="The password to log in with; best in a file"
    )
    kafka_options: Annotated[dict[str, SecretStr], NoDecode, BeforeValidator(values.options)] = (
        Field(
            default={},
            description="What else librdkafka takes, as name=value,name=value or a JSON object; "
            "nothing that the guarantees stand on",
        )
    )
    kafka_group_protocol: Annotated[
        Literal["classic", "consumer"], BeforeValidator(values.lower)
    ] = Field(
        default="classic",
        description="How workers share partitions; consumer needs Kafka 4 and moves them faster",
    )

    group_id: Annotated[str, BeforeValidator(values.group_name)] = Field(
        default="pipeline", max_length=249, description="The consumer group; one for each database"
    )
    group_instance_id: Annotated[str | None, BeforeValidator(values.group_name)] = Field(
        default=None,
        # Kafka takes 249; with --workers each puts its number behind it.
        max_length=246,
        description="This worker's own name, so that its restart moves no partition",
    )
    topics: Annotated[tuple[str, ...], NoDecode, BeforeValidator(values.topics)] = Field(
        default=("Notifications", "Prices"), description="The topics to read, separated by commas"
    )
    start: Annotated[Literal["earliest", "latest"] | datetime, BeforeValidator(values.start)] = (
        Field(
            default="earliest",
            description="Where a partition that was never seen begins: earliest, latest or a time",
        )
    )

    batch_rows: int = Field(
        default=10_000, ge=1, le=100_000, description="Most records in one transaction"
    )
    batch_bytes: int = Field(
        default=8 * 1024 * 1024,
        ge=64 * 1024,
        le=256 * 1024 * 1024,
        description="Most bytes of records in one transaction; a larger record goes alone",
    )
    linger_ms: int = Field(
        default=2,
        ge=0,
        le=5000,
        description="How long a record waits for others to share its transaction, in milliseconds",
    )
    repeat_window: int = Field(
        default=10_000,
        ge=0,
        le=1_000_000,
        description="How many offsets back the first copy of an event is looked for",
    )
    segment_offsets: int = Field(
        default=1_000_000,
        ge=1000,
        le=10_000_000_000,
        description="How many offsets of each partition one segment of the log spans",
    )
    keep_raw: bool = Field(
        default=False,
        description="Keep the bytes of every record, even where the payload says the same",
    )
    revoke_deadline_ms: int = Field(
        default=20_000,
        ge=1000,
        # Well under max.poll.interval.ms (300 000), or a slow commit costs the assignment.
        le=240_000,
        description="How long a batch may take to end when a partition moves, in milliseconds",
    )

    project_batch_offsets: int = Field(
        default=20_000,
        ge=1,
        le=10_000_000,
        description="Most offsets in one pass of the projection",
    )
    poll_interval_ms: int = Field(
        default=500,
        ge=10,
        le=60_000,
        description="How often the projection looks for events unasked, in milliseconds",
    )
    dead_letter_budget: int = Field(
        default=1000,
        ge=0,
        le=1_000_000,
        description="Guilty events in one pass past which the projector itself is broken",
    )

    longest_outage_hours: int = Field(
        default=72,  # a weekend
        ge=1,
        le=8760,
        description="The longest outage you plan for, in hours: Kafka must keep records for longer",
    )
    idle_in_transaction_timeout_ms: int = Field(
        default=10_000,
        ge=1000,
        le=600_000,
        description="When PostgreSQL ends the transaction of a silent client, in milliseconds",
    )
    lock_timeout_ms: int = Field(
        default=10_000, ge=100, le=600_000, description="Longest wait for a lock, in milliseconds"
    )
    answer_timeout_ms: int = Field(
        default=60_000,
        ge=1000,
        le=3_600_000,
        description="Longest wait of ingest and projection for the answer to one statement, beyond "
        "that for a lock, in milliseconds",
    )

    log_format: Annotated[Literal["auto", "console", "json"], BeforeValidator(values.lower)] = (
        Field(
            default="auto", description="Form of the log: auto is console on a terminal, else json"
        )
    )
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], BeforeValidator(values.lower)
    ] = Field(default="info", description="The least level that is logged")

    _read_again: Callable[[], "Settings"] | None = PrivateAttr(default=None)
    """Reads all settings from where these were read."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Nothing but what the caller gives; ``load_settings`` knows the places."""
        return (init_settings,)

    @model_validator(mode="after")
    def _login_is_complete(self) -> Self:
        if not self.kafka_bootstrap_servers or not self._logs_in:
            return self
        wanted = ["kafka_sasl_mechanism"]
        if self.kafka_sasl_mechanism != "OAUTHBEARER":
            wanted += ["kafka_username", "kafka_password"]
        if missing := [public_name(name) for name in wanted if getattr(self, name) is None]:
            raise ValueError(
                f"{', '.join(missing)} must be set: the brokers want a login, as "
                f"PIPELINE_KAFKA_SECURITY_PROTOCOL is {self.kafka_security_protocol}"
            )
        return self

    @model_validator(mode="after")
    def _options_suit_the_group_protocol(self) -> Self:
        refused = [name for name in _CLASSIC_GROUP_OPTIONS if name in self.kafka_options]
        if self.kafka_group_protocol == "consumer" and refused:
            raise ValueError(
                f"PIPELINE_KAFKA_OPTIONS may not hold {', '.join(refused)}: the brokers decide, "
                "as PIPELINE_KAFKA_GROUP_PROTOCOL is consumer"
            )
        return self

    @property
    def _logs_in(self) -> bool:
        return self.kafka_security_protocol.startswith("SASL_")

    def with_fresh_logins(self) -> Self:
        """These settings with users and passwords as their files say now.

        All else stays as it was at the start. Where a file cannot be read, as while somebody
        replaces it, nothing changes.
        """
        if self._read_again is None:
            return self
        try:
            fresh = self._read_again()
        except ConfigurationError:
            return self
        return self.model_copy(update={name: getattr(fresh, name) for name in _LOGINS})

    def database(self) -> str:
        """The URL of the database, as libpq takes it. It holds the password: never show it.

        Without ``DATABASE_URL``, libpq's own environment (PGHOST, PGSERVICE …) decides.

        Raises:
            ConfigurationError: Neither names a database.
        """
        if self.database_url:
            return self.database_url.get_secret_value()
        if any(os.environ.get(name) for name in _LIBPQ):
            return "postgresql://"
        raise ConfigurationError(
            f"{missing('database_url')}. Or set one of libpq's {', '.join(_LIBPQ)}"
        )

    def kafka_client(self) -> KafkaClientConfig:
        """Connection, login and ``KAFKA_OPTIONS``, for consumers and producers alike.

        Raises:
            ConfigurationError: No broker is named.
        """
        if not self.kafka_bootstrap_servers:
            raise ConfigurationError(missing("kafka_bootstrap_servers"))
        config = KafkaClientConfig(
            {name: value.get_secret_value() for name, value in self.kafka_options.items()}
        )
        config["bootstrap.servers"] = self.kafka_bootstrap_servers
        config["security.protocol"] = self.kafka_security_protocol
        if self._logs_in and self.kafka_sasl_mechanism:
            config["sasl.mechanism"] = self.kafka_sasl_mechanism
            if self.kafka_username and self.kafka_password:
                config["sasl.username"] = self.kafka_username
                config["sasl.password"] = self.kafka_password.get_secret_value()
        return config


def public_name(name: str) -> str:
    """The name under which people know a setting."""
    return PREFIX + name.upper()


def missing(name: str) -> str:
    """The complaint about a setting that a command cannot do without."""
    return f"{public_name(name)} is missing. {Settings.model_fields[name].description}"
