"""The settings: one field each, with default, bounds and meaning."""

import os
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
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

# libpq reads these itself when no URL is given; each of them names a database.
_LIBPQ = ("PGHOST", "PGHOSTADDR", "PGSERVICE", "PGDATABASE")
# These may change while the process runs.
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
    """Every setting, checked. Immutable.

    The constructor reads neither the environment nor files; ``load_settings`` does.
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
        description="Database of the log and the read models: postgresql://USER:PASSWORD@HOST/DB",
    )

    kafka_bootstrap_servers: Annotated[str | None, BeforeValidator(values.servers)] = Field(
        default=None,
        description="Brokers to connect to first: host:port, several separated by commas",
    )
    kafka_security_protocol: Annotated[
        Literal["SASL_SSL", "SASL_PLAINTEXT", "SSL", "PLAINTEXT"], BeforeValidator(values.upper)
    ] = Field(default="SASL_SSL", description="Protocol of connections to the brokers")
    kafka_sasl_mechanism: Annotated[
        Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER"] | None,
        BeforeValidator(values.upper),
    ] = Field(
        default=None,
        description="Method of login to the brokers; Upvest tells each client which one",
    )
    kafka_username: str | None = Field(
        default=None, min_length=1, description="User of the login to the brokers"
    )
    kafka_password: SecretStr | None = Field(
        default=None,
        min_length=1,
        description="Password of the login to the brokers; best in a file",
    )
    kafka_options: Annotated[dict[str, SecretStr], NoDecode, BeforeValidator(values.options)] = (
        Field(
            default={},
            description="Further options of librdkafka, as name=value,name=value or a JSON object; "
            "options on which the guarantees depend are refused",
        )
    )
    kafka_group_protocol: Annotated[
        Literal["classic", "consumer"], BeforeValidator(values.lower)
    ] = Field(
        default="classic",
        description="Protocol of the consumer group; consumer needs Kafka 4 and moves partitions "
        "faster",
    )

    group_id: Annotated[str, BeforeValidator(values.group_name)] = Field(
        default="pipeline",
        max_length=249,
        description="Consumer group; each database needs its own",
    )
    group_instance_id: Annotated[str | None, BeforeValidator(values.group_name)] = Field(
        default=None,
        # Kafka allows 249; with --workers each worker appends its number.
        max_length=246,
        description="Name of this worker in the consumer group, so that its restart moves no "
        "partition",
    )
    topics: Annotated[tuple[str, ...], NoDecode, BeforeValidator(values.topics)] = Field(
        default=("Notifications", "Prices"), description="Topics to read, separated by commas"
    )
    start: Annotated[Literal["earliest", "latest"] | datetime, BeforeValidator(values.start)] = (
        Field(
            default="earliest",
            description="Where to start in a partition that was never read: earliest, latest or a "
            "time",
        )
    )

    batch_rows: int = Field(
        default=10_000, ge=1, le=100_000, description="Maximum records per transaction"
    )
    batch_bytes: int = Field(
        default=8 * 1024 * 1024,
        ge=64 * 1024,
        le=256 * 1024 * 1024,
        description="Maximum bytes of records per transaction; a larger record has its own "
        "transaction",
    )
    linger_ms: int = Field(
        default=2,
        ge=0,
        le=5000,
        description="How long a record waits for others to join its transaction, in milliseconds",
    )
    repeat_window: int = Field(
        default=10_000,
        ge=0,
        le=1_000_000,
        description="How many offsets back to search for the first copy of an event",
    )
    segment_offsets: int = Field(
        default=1_000_000,
        ge=1000,
        le=10_000_000_000,
        description="Offsets of a partition per segment of the log",
    )
    keep_raw: bool = Field(
        default=False,
        description="Keep the bytes of every record, even if the payload has the same content",
    )
    revoke_deadline_ms: int = Field(
        default=20_000,
        ge=1000,
        # Well under max.poll.interval.ms (300 000), or a slow commit costs the assignment.
        le=240_000,
        description="Maximum time to finish a batch when a partition moves to another worker, in "
        "milliseconds",
    )

    project_batch_offsets: int = Field(
        default=20_000,
        ge=1,
        le=10_000_000,
        description="Maximum offsets per pass of the projection",
    )
    poll_interval_ms: int = Field(
        default=500,
        ge=10,
        le=60_000,
        description="How often the projection checks for events without a notification, in "
        "milliseconds",
    )
    dead_letter_budget: int = Field(
        default=1000,
        ge=0,
        le=1_000_000,
        description="Maximum rejected events per pass before the read model is marked broken",
    )

    longest_outage_hours: int = Field(
        default=72,  # a weekend
        ge=1,
        le=8760,
        description="Longest outage that you plan for, in hours; Kafka must keep records longer "
        "than this",
    )
    idle_in_transaction_timeout_ms: int = Field(
        default=10_000,
        ge=1000,
        le=600_000,
        description="When PostgreSQL ends a session that is idle in a transaction, in milliseconds",
    )
    lock_timeout_ms: int = Field(
        default=10_000, ge=100, le=600_000, description="Maximum wait for a lock, in milliseconds"
    )
    answer_timeout_ms: int = Field(
        default=60_000,
        ge=1000,
        le=3_600_000,
        description="Maximum time of one statement of ingest and projection, in addition to the "
        "wait "
        "for a lock, in milliseconds",
    )

    read_models: Annotated[tuple[Path, ...], NoDecode, BeforeValidator(values.folders)] = Field(
        default=(),
        description="Folders with your own read models (*.py) and views (*.sql), separated by "
        "colons as in PATH (semicolons on Windows)",
    )

    log_format: Annotated[Literal["auto", "console", "json"], BeforeValidator(values.lower)] = (
        Field(
            default="auto",
            description="Format of the log: auto is console on a terminal, json elsewhere",
        )
    )
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], BeforeValidator(values.lower)
    ] = Field(default="info", description="Lowest level that is logged")

    _read_again: Callable[[], "Settings"] | None = PrivateAttr(default=None)
    """Reads all settings again, from the same sources."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what the caller gives; ``load_settings`` reads the sources."""
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
                f"{', '.join(missing)} must be set: the brokers require a login, because "
                f"PIPELINE_KAFKA_SECURITY_PROTOCOL is {self.kafka_security_protocol}"
            )
        return self

    @model_validator(mode="after")
    def _options_suit_the_group_protocol(self) -> Self:
        refused = [name for name in _CLASSIC_GROUP_OPTIONS if name in self.kafka_options]
        if self.kafka_group_protocol == "consumer" and refused:
            raise ValueError(
                f"PIPELINE_KAFKA_OPTIONS may not contain {', '.join(refused)}: the brokers decide, "
                "because PIPELINE_KAFKA_GROUP_PROTOCOL is consumer"
            )
        return self

    @property
    def _logs_in(self) -> bool:
        return self.kafka_security_protocol.startswith("SASL_")

    def with_fresh_logins(self) -> Self:
        """These settings with the users and passwords that the files contain now.

        All other settings keep their values. If a file cannot be read, for example while
        somebody replaces it, nothing changes.
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
    """The name of a setting as an environment variable."""
    return PREFIX + name.upper()


def missing(name: str) -> str:
    """The error text for a setting that a command needs."""
    return f"{public_name(name)} is missing. {Settings.model_fields[name].description}"
