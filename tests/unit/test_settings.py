import os
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.db.session import address_of
from pipeline.errors import ConfigurationError
from pipeline.settings import Settings, load_settings

CANARY = "c4n4ry-hunter2"
UPVEST: dict[str, Any] = {
    "kafka_bootstrap_servers": "kafka.example.com:9094",
    "kafka_sasl_mechanism": "SCRAM-SHA-512",
    "kafka_username": "client",
    "kafka_password": CANARY,
}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Nothing set but what a test sets."""
    for name in os.environ:
        if name.startswith(("PIPELINE_", "PG")):
            monkeypatch.delenv(name)

    def put(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return put


def complaints(config=None, **overrides):
    with pytest.raises(ConfigurationError) as refused:
        load_settings(config, **overrides)
    return str(refused.value).splitlines()


# ------------------------------------------------------------------------------------------- places


def test_without_settings_the_defaults_apply():
    settings = load_settings()

    assert settings.topics == ("Notifications", "Prices")
    assert settings.kafka_security_protocol == "SASL_SSL"
    assert settings.start == "earliest"
    assert settings.batch_rows == 10_000
    assert settings.batch_bytes == 8 * 1024 * 1024
    assert settings.kafka_group_protocol == "classic"
    assert settings.group_id == "pipeline"


def test_five_settings_are_enough_for_upvest(environment):
    environment(
        PIPELINE_DATABASE_URL="postgresql://pipeline:secret@db.example.com/upvest",
        PIPELINE_KAFKA_BOOTSTRAP_SERVERS="kafka.example.com:9094",
        PIPELINE_KAFKA_SASL_MECHANISM="scram-sha-512",
        PIPELINE_KAFKA_USERNAME="client",
        PIPELINE_KAFKA_PASSWORD=CANARY,
    )

    settings = load_settings()

    assert settings.database() == "postgresql://pipeline:secret@db.example.com/upvest"
    assert settings.kafka_client() == {
        "bootstrap.servers": "kafka.example.com:9094",
        "security.protocol": "SASL_SSL",
        "sasl.mechanism": "SCRAM-SHA-512",
        "sasl.username": "client",
        "sasl.password": CANARY,
    }


def test_the_first_source_in_order_wins(environment, tmp_path):
    """Command line, environment, named file, secrets directory, TOML, default: take them away."""
    (tmp_path / "named").write_text("from_named_file\n")
    (tmp_path / "pipeline_group_id").write_text("from_secrets\r\n")
    toml = tmp_path / "pipeline.toml"
    toml.write_text('group_id = "from_toml"')
    environment(
        PIPELINE_GROUP_ID="from_environment",
        PIPELINE_GROUP_ID_FILE=str(tmp_path / "named"),
        PIPELINE_SECRETS_DIR=str(tmp_path),
    )

    found = [load_settings(toml, group_id="from_command_line").group_id]
    for variable in ("PIPELINE_GROUP_ID", "PIPELINE_GROUP_ID_FILE", "PIPELINE_SECRETS_DIR"):
        found.append(load_settings(toml, group_id=None).group_id)
        environment(**{variable: ""})
    found.append(load_settings(toml).group_id)
    found.append(load_settings().group_id)

    assert found == [
        "from_command_line",
        "from_environment",
        "from_named_file",
        "from_secrets",
        "from_toml",
        "pipeline",
    ]


def test_the_environment_names_the_toml_file(environment, tmp_path):
    toml = tmp_path / "pipeline.toml"
    toml.write_text(
        'topics = ["Notifications"]\nbatch_rows = 17\nkeep_raw = true\n'
        'start = 2026-01-31T08:00:00Z\n[kafka_options]\n"fetch.min.bytes" = 65536\n'
    )
    environment(PIPELINE_CONFIG=str(toml))

    settings = load_settings()

    assert settings.topics == ("Notifications",)
    assert settings.batch_rows == 17
    assert settings.keep_raw is True
    assert settings.start == datetime(2026, 1, 31, 8, tzinfo=UTC)
    assert settings.kafka_options["fetch.min.bytes"].get_secret_value() == "65536"


def test_a_secret_file_loses_its_line_end_and_nothing_else(environment, tmp_path):
    (tmp_path / "password").write_text("  two words \n")
    environment(PIPELINE_KAFKA_PASSWORD_FILE=str(tmp_path / "password"))

    password = load_settings().kafka_password

    assert password is not None
    assert password.get_secret_value() == "  two words "


@pytest.mark.parametrize(
    "variable",
    ["PIPELINE_CONFIG", "PIPELINE_SECRETS_DIR", "PIPELINE_DATABASE_URL_FILE"],
)
def test_a_source_that_does_not_exist_is_refused(environment, tmp_path, variable):
    environment(**{variable: str(tmp_path / "nowhere")})

    assert complaints() == [
        f"{variable}: cannot read {tmp_path / 'nowhere'}: No such file or directory"
    ]


@pytest.mark.parametrize("secret", [CANARY, f"/{CANARY}", f"a/{CANARY}", f"/{CANARY}/{CANARY}"])
def test_a_secret_given_instead_of_the_path_of_its_file_is_not_shown(environment, secret):
    environment(PIPELINE_KAFKA_PASSWORD_FILE=secret)

    assert complaints() == [
        "PIPELINE_KAFKA_PASSWORD_FILE: cannot read the file that it names: "
        "No such file or directory"
    ]


def test_a_file_of_bytes_is_refused(environment, tmp_path):
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    environment(PIPELINE_KAFKA_PASSWORD_FILE=str(tmp_path / "bytes"))

    assert complaints() == [f"PIPELINE_KAFKA_PASSWORD_FILE: {tmp_path / 'bytes'} is not UTF-8"]


def test_the_error_for_broken_toml_has_the_position_and_not_the_text(tmp_path):
    toml = tmp_path / "pipeline.toml"
    toml.write_text(f'group_id = "a"\nkafka_password = {CANARY}\n')

    [complaint] = complaints(toml)

    assert complaint.startswith(f"--config: {toml} is not TOML (at line 2, column ")
    assert CANARY not in complaint


# ----------------------------------------------------------------------------------- unknown names


def test_an_unknown_variable_is_refused_and_the_likely_name_is_suggested(environment):
    environment(PIPELINE_KAFKA_PASWORD=CANARY, PIPELINE_NOTHING_LIKE_IT="x")

    assert complaints() == [
        "PIPELINE_KAFKA_PASWORD (environment) is not a setting; "
        "did you mean PIPELINE_KAFKA_PASSWORD?",
        "PIPELINE_NOTHING_LIKE_IT (environment) is not a setting",
    ]


def test_an_unknown_key_of_the_file_is_refused(tmp_path):
    toml = tmp_path / "pipeline.toml"
    toml.write_text("batch_row = 5")

    assert complaints(toml) == [f"batch_row ({toml}) is not a setting; did you mean batch_rows?"]


def test_variables_of_other_programs_are_ignored(environment):
    """Those of the tests, and those that Kubernetes sets beside a service called pipeline."""
    environment(
        PIPELINE_TEST_KAFKA="localhost:9092",
        PIPELINE_REQUIRE_KAFKA="1",
        PIPELINE_REQUIRE_POSTGRES_15="1",
        PIPELINE_ENABLE_FAILPOINTS="1",
        PIPELINE_FAILPOINT="after_copy:kill",
        PIPELINE_SERVICE_HOST="10.0.0.1",
        PIPELINE_SERVICE_PORT_HTTP="80",
        PIPELINE_PORT="tcp://10.0.0.1:80",
        PIPELINE_PORT_80_TCP_ADDR="10.0.0.1",
    )

    assert load_settings().group_id == "pipeline"


# ------------------------------------------------------------------------------------ wrong values


def test_every_wrong_setting_has_its_line_in_the_error(environment):
    environment(
        PIPELINE_BATCH_ROWS="0",
        PIPELINE_LINGER_MS="soon",
        PIPELINE_KAFKA_SECURITY_PROTOCOL="TLS",
        PIPELINE_TOPICS="Notifications, Pri ces",
        PIPELINE_START="2026-01-31T08:00:00",
        PIPELINE_KEEP_RAW="perhaps",
        PIPELINE_GROUP_ID=" ",
        PIPELINE_KAFKA_BOOTSTRAP_SERVERS="kafka.example.com:99999",
        PIPELINE_LOG_LEVEL="chatty",
    )

    assert sorted(complaints()) == [
        "PIPELINE_BATCH_ROWS (environment) must be a whole number from 1 to 100000, not '0'",
        "PIPELINE_GROUP_ID (environment) must be a name without spaces, not ' '",
        "PIPELINE_KAFKA_BOOTSTRAP_SERVERS (environment) must be host:port, several separated by "
        "commas, not 'kafka.example.com:99999'",
        "PIPELINE_KAFKA_SECURITY_PROTOCOL (environment) must be 'SASL_SSL', 'SASL_PLAINTEXT', "
        "'SSL' or 'PLAINTEXT', not 'TLS'",
        "PIPELINE_KEEP_RAW (environment) must be a valid boolean, unable to interpret input, "
        "not 'perhaps'",
        "PIPELINE_LINGER_MS (environment) must be a whole number from 0 to 5000, not 'soon'",
        "PIPELINE_LOG_LEVEL (environment) must be 'debug', 'info', 'warning' or 'error', "
        "not 'chatty'",
        "PIPELINE_START (environment) must be earliest, latest, or a time with its zone such as "
        "2026-01-31T08:00:00Z, not '2026-01-31T08:00:00'",
        "PIPELINE_TOPICS (environment) must name topics of 1 to 249 characters "
        "a-z A-Z 0-9 . _ -, not 'Notifications, Pri ces'",
    ]


NUMBERS = {
    name: (
        next(bound.ge for bound in field.metadata if hasattr(bound, "ge")),
        next(bound.le for bound in field.metadata if hasattr(bound, "le")),
    )
    for name, field in Settings.model_fields.items()
    if field.annotation is int
}


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_accepts_its_bounds_and_nothing_beyond(name):
    low, high = NUMBERS[name]

    assert [getattr(load_settings(**{name: n}), name) for n in (low, high)] == [low, high]
    for outside in (low - 1, high + 1):
        assert complaints(**{name: outside}) == [
            f"PIPELINE_{name.upper()} (command line) must be a whole number from {low} to {high}, "
            f"not {outside}"
        ]


def test_the_name_of_every_number_ends_in_its_unit():
    """Rows, bytes, milliseconds, offsets; the rest is counted in what the name says."""
    units = ("_rows", "_bytes", "_ms", "_hours", "_offsets", "repeat_window", "dead_letter_budget")

    assert [name for name in NUMBERS if not name.endswith(units)] == []


def test_every_setting_is_described():
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []


@given(st.lists(st.from_regex(r"[a-zA-Z0-9_-]{1,20}", fullmatch=True), min_size=1, unique=True))
def test_any_names_that_kafka_accepts_are_topics(names):
    assert load_settings(topics=" , ".join(names)).topics == tuple(names)


@pytest.mark.parametrize("topics", [",", "a,a", "..", "x" * 250, "ä", 7])
def test_a_name_that_kafka_refuses_is_no_topic(topics):
    assert complaints(topics=topics)[0].startswith("PIPELINE_TOPICS (command line) must name")


@given(st.datetimes(timezones=st.just(UTC)))
def test_any_moment_can_be_the_start(moment):
    assert load_settings(start=moment.isoformat()).start == moment


@pytest.mark.parametrize("start", ["tomorrow", "08:00", 5])
def test_a_text_that_is_no_moment_is_no_start(start):
    assert complaints(start=start)[0].startswith("PIPELINE_START (command line) must be earliest")


@pytest.mark.parametrize("servers", ["a", "a:9092", "a:1,b:2", "[::1]:9092", "10.0.0.1:9092"])
def test_brokers_are_hosts_and_ports(servers):
    settings = load_settings(kafka_bootstrap_servers=servers, kafka_security_protocol="plaintext")

    assert settings.kafka_client()["bootstrap.servers"] == servers


def test_settings_cannot_be_changed():
    settings = load_settings()

    with pytest.raises(ValidationError, match="frozen"):
        settings.batch_rows = 1  # type: ignore[misc]  # this is what the test tries


# ----------------------------------------------------------------------------------------- database


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+psycopg"])
def test_every_spelling_of_postgresql_is_understood(scheme):
    settings = load_settings(database_url=f"{scheme}://u:p%40ss@h:5433/d?sslmode=verify-full")

    assert settings.database() == "postgresql://u:p%40ss@h:5433/d?sslmode=verify-full"


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("postgresql://u:p@h/d", "h:5432/d"),
        ("postgres://h:1,h2:2/d?target_session_attrs=any", "h:1,h2:2/d"),
        ("postgresql://u:p%2Fw@h1,h2:5433/d", "h1:5432,h2:5433/d"),
        ("postgresql:///d?host=/run/postgresql&port=5433", "/run/postgresql:5433/d"),
        ("postgresql://%2Frun%2Fpostgresql/d", "/run/postgresql:5432/d"),
        ("postgresql://u:p@[::1]:5433/d", "[::1]:5433/d"),
        ("postgresql:///?service=upvest", "service upvest"),
        ("postgresql://h/d?options=-c%20geqo%3Doff&sslmode=require", "h:5432/d"),
    ],
)
def test_every_url_that_libpq_accepts_is_accepted_and_shown_by_its_hosts(url, address):
    settings = load_settings(database_url=url)

    assert address_of(settings.database()) == address


@pytest.mark.parametrize("name", ["sslmod", "pool_size", "replication"])
def test_a_parameter_that_libpq_does_not_have_is_named(name):
    with pytest.raises(ConfigurationError, match=f"may not contain {name}"):
        load_settings(database_url=f"postgresql://u:p@h/d?sslmode=require&{name}=x")


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://h/d?{CANARY}@h",
        f"postgresql://u:{CANARY}@h:99999999/d",
        f"mysql://u:{CANARY}@h/d",
        f"postgresql+asyncpg://u:{CANARY}@h/d",
        f"host=h password={CANARY}",
        f"postgresql://u:{CANARY}@h:port/d",
        f"://{CANARY}",
    ],
)
def test_a_wrong_url_is_refused_without_repeating_any_of_it(environment, url):
    environment(PIPELINE_DATABASE_URL=url)

    with pytest.raises(ConfigurationError) as refused:
        load_settings()

    assert "PIPELINE_DATABASE_URL (environment) must be postgresql://USER" in str(refused.value)
    assert CANARY not in "".join(traceback.format_exception(refused.value))


@pytest.mark.parametrize("variable", ["PGHOST", "PGHOSTADDR", "PGSERVICE", "PGDATABASE"])
def test_without_a_url_libpqs_environment_names_the_database(environment, variable):
    environment(**{variable: "x"})

    assert load_settings().database() == "postgresql://"


def test_without_any_database_the_missing_setting_is_named():
    settings = load_settings()

    with pytest.raises(ConfigurationError, match="PIPELINE_DATABASE_URL is missing"):
        settings.database()


# -------------------------------------------------------------------------------------------- Kafka


def test_without_brokers_the_missing_setting_is_named():
    settings = load_settings()

    with pytest.raises(ConfigurationError, match="PIPELINE_KAFKA_BOOTSTRAP_SERVERS is missing"):
        settings.kafka_client()


def test_a_login_that_is_not_complete_is_refused_before_it_is_tried():
    assert complaints(kafka_bootstrap_servers="kafka.example.com:9094") == [
        "PIPELINE_KAFKA_SASL_MECHANISM, PIPELINE_KAFKA_USERNAME, PIPELINE_KAFKA_PASSWORD must be "
        "set: the brokers require a login, because PIPELINE_KAFKA_SECURITY_PROTOCOL is SASL_SSL"
    ]


def test_no_login_is_sent_if_none_is_required():
    settings = load_settings(**UPVEST, kafka_security_protocol="SSL")

    assert set(settings.kafka_client()) == {"bootstrap.servers", "security.protocol"}


def test_oauth_needs_no_password():
    settings = load_settings(
        kafka_bootstrap_servers="kafka.example.com:9094",
        kafka_sasl_mechanism="oauthbearer",
        kafka_options={"sasl.oauthbearer.method": "oidc"},
    )

    assert settings.kafka_client()["sasl.oauthbearer.method"] == "oidc"


@pytest.mark.parametrize(
    "text",
    [
        "fetch.min.bytes=1, check.crcs=true",
        "fetch.min.bytes=1\ncheck.crcs=true\n",
        '{"fetch.min.bytes": 1, "check.crcs": true}',
    ],
)
def test_options_reach_the_client(environment, text):
    environment(PIPELINE_KAFKA_OPTIONS=text)

    client = load_settings(**UPVEST).kafka_client()

    assert client["fetch.min.bytes"] == "1"
    assert client["check.crcs"] == "true"


@pytest.mark.parametrize(
    ("option", "instead"),
    [
        ("enable.auto.commit", "offsets are stored in PostgreSQL"),
        ("enable.auto.offset.store", "offsets are stored in PostgreSQL"),
        ("auto.offset.reset", "use PIPELINE_START"),
        ("isolation.level", "records of an aborted transaction are never read"),
        ("enable.partition.eof", "this program sets it"),
        ("isolation_level", "records of an aborted transaction are never read"),
        ("Enable.Auto.Commit", "offsets are stored in PostgreSQL"),
        ("auto.commit.enable", "offsets are stored in PostgreSQL"),
        ("offset.store.sync.interval.ms", "offsets are stored in PostgreSQL"),
        ("metadata.broker.list", "use PIPELINE_KAFKA_BOOTSTRAP_SERVERS"),
        ("plugin.library.paths", "this program loads no code of others"),
        ("ssl.engine.location", "this program loads no code of others"),
        ("ssl.engine.id", "this program loads no code of others"),
        ("ssl.providers", "this program loads no code of others"),
        ("sasl.kerberos.kinit.cmd", "this program runs no command"),
        ("sasl.kerberos.principal", "no mechanism"),
        ("enable.sasl.oauthbearer.unsecure.jwt", "an unsigned token"),
        ("api.version.request", "older protocols"),
        ("broker.version.fallback", "older protocols"),
        ("test.mock.num.brokers", "it replaces your brokers"),
        ("topic.blacklist", "use PIPELINE_TOPICS"),
        ("allow.auto.create.topics", "only the owner of a topic creates it"),
        ("log.queue", "nothing reads this queue"),
        ("error_cb", "this program sets it"),
        ("default.topic.config", "set the options that it contains"),
        ("group.id", "use PIPELINE_GROUP_ID"),
        ("group.instance.id", "use PIPELINE_GROUP_INSTANCE_ID"),
        ("group.protocol", "use PIPELINE_KAFKA_GROUP_PROTOCOL"),
        ("bootstrap.servers", "use PIPELINE_KAFKA_BOOTSTRAP_SERVERS"),
        ("security.protocol", "use PIPELINE_KAFKA_SECURITY_PROTOCOL"),
        ("sasl.mechanisms", "use PIPELINE_KAFKA_SASL_MECHANISM"),
        ("sasl.username", "use PIPELINE_KAFKA_USERNAME"),
        ("sasl.password", "use PIPELINE_KAFKA_PASSWORD"),
    ],
)
def test_an_option_on_which_the_guarantees_depend_is_refused(environment, option, instead):
    environment(PIPELINE_KAFKA_OPTIONS=f"{option}={CANARY}")

    [complaint] = complaints()

    assert complaint.startswith(
        f"PIPELINE_KAFKA_OPTIONS (environment) may not contain {option}: {instead}"
    )
    assert CANARY not in complaint


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"enable.ssl.certificate.verification": False}, "may not switch"),
        ({"enable.ssl.certificate.verification": "f"}, "may not switch"),
        ({"enable.ssl.certificate.verification": 0}, "may not switch"),
        ({"ssl.endpoint.identification.algorithm": "NONE"}, "may not switch"),
        ({"ssl.endpoint.identification.algorithm": "none\0"}, "may not contain a NUL"),
        ({"topic.metadata.refresh.interval.ms": -1}, "may not switch"),
        ({"debug": "broker,security"}, "may not contain all, conf or security for debug"),
        ({"debug": "ALL"}, "may not contain all, conf or security for debug"),
        ({f"plugin.library.paths\0{CANARY}": "/x.so"}, "must name options of librdkafka"),
        ({"isolation.level ": "read_uncommitted"}, "must name options of librdkafka"),
        ({"client.id": f"\0{CANARY}"}, "may not contain a NUL"),
        ({"fetch.min.bytes": [CANARY]}, "must have a string"),
        ([CANARY], "must be a table"),
        (f"{{{CANARY}", "must be a JSON object"),
        (f"{CANARY},b=2", "must be name=value"),
    ],
)
def test_wrong_options_are_refused_without_their_values(options, reason):
    [complaint] = complaints(kafka_options=options)

    assert complaint.startswith(f"PIPELINE_KAFKA_OPTIONS (command line) {reason}")
    assert CANARY not in complaint


@pytest.mark.parametrize(
    "options",
    [
        {"enable.ssl.certificate.verification": "True"},
        {"ssl.endpoint.identification.algorithm": "https"},
        {"topic.metadata.refresh.interval.ms": 10_000},
        {"debug": "cgrp,fetch"},
        {"fetch.min.bytes": 1, "ssl.ca.location": "/etc/ssl/ca.pem", "client.rack": "a b=c"},
    ],
)
def test_an_option_on_which_no_guarantee_depends_may_be_set(options):
    client = load_settings(**UPVEST, kafka_options=options).kafka_client()

    assert {name: client[name] for name in options} == {k: str(v) for k, v in options.items()}


def test_with_the_new_group_protocol_the_brokers_decide():
    options = {"session.timeout.ms": 6000}

    assert load_settings(kafka_options=options).kafka_group_protocol == "classic"
    [complaint] = complaints(kafka_options=options, kafka_group_protocol="consumer")
    assert complaint.startswith("PIPELINE_KAFKA_OPTIONS may not contain session.timeout.ms")


def test_folders_with_read_models_are_separated_as_in_path(environment):
    environment(PIPELINE_READ_MODELS=os.pathsep.join(["/srv/models", "ours"]))

    assert load_settings().read_models == (Path("/srv/models"), Path("ours"))


# ------------------------------------------------------------------------------------------ secrets


def test_no_secret_is_shown():
    settings = load_settings(
        **UPVEST,
        database_url=f"postgresql://u:{CANARY}@h/d",
        kafka_options={"ssl.key.password": CANARY},
    )

    shown = [
        repr(settings),
        str(settings),
        repr(settings.kafka_client()),
        f"{settings.kafka_client()}",
    ]

    assert CANARY not in "".join(shown)


def test_an_error_about_one_setting_does_not_show_another():
    with pytest.raises(ConfigurationError) as refused:
        load_settings(
            **UPVEST,
            database_url=f"postgresql://u:{CANARY}@h/d",
            kafka_security_protocol=f"kafka://u:{CANARY}@h",
            log_level=f"password={CANARY}",
            batch_rows=0,
        )

    assert CANARY not in "".join(traceback.format_exception(refused.value))
    assert refused.value.__context__ is None
