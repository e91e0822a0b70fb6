import re

import pytest

from tests.commands import Commands, InProcess

CANARY = "c4n4ry"

COMMANDS = [
    *("demo", "migrate", "check", "run", "ingest", "project", "status", "events", "rebuild"),
    *("verify", "rewind"),
    *("dead-letters list", "dead-letters show", "dead-letters retry"),
    *("gaps list", "gaps accept", "simulate"),
]


@pytest.fixture
def pipeline(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    return InProcess(monkeypatch, capsys)


NOTHING = Commands()


def test_help_lists_every_command_in_the_order_of_first_use(pipeline):
    result = pipeline(NOTHING, "--help")

    listed = re.findall(r"^  ([a-z-]+) {2,}\S", result.out.partition("Commands:")[2], re.MULTILINE)
    assert result.code == 0
    assert listed == list(dict.fromkeys(name.split()[0] for name in COMMANDS))


def test_no_line_of_the_list_of_commands_is_truncated(pipeline):
    result = pipeline(NOTHING, "--help")

    assert "..." not in result.out.partition("Commands:")[2]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_each_command_has_an_example_and_its_exit_codes(pipeline, name):
    result = pipeline(NOTHING, *name.split(), "--help")

    assert result.code == 0
    assert f"$ pipeline {name}" in result.out
    assert "Exit codes: 0" in result.out


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_no_help_shows_a_secret_that_is_set(pipeline, name):
    secrets = Commands(
        database_url=f"postgresql://me:{CANARY}@localhost/db",
        kafka_password=CANARY,
        kafka_options=f"ssl.key.password={CANARY}",
    )

    result = pipeline(secrets, *name.split(), "--help")

    assert CANARY not in result.out + result.err


def test_version_names_the_program_and_its_libraries(pipeline):
    result = pipeline(NOTHING, "--version")

    assert result.code == 0
    assert re.fullmatch(
        r"pipeline \d+\.\d+\.\d+ \(librdkafka [\d.]+, libpq \d+\.\d+, python 3[\d.]+\)\n",
        result.out,
    )


@pytest.mark.parametrize(
    "wrong",
    [
        ["nonsense"],
        ["status", "--nonsense"],
        ["rebuild"],
        ["rebuild", "orders", "--all"],
        ["rebuild", "orders", "--check", "--in-place"],
        ["rebuild", "nonsense"],
        ["events", "not-a-uuid"],
        ["events", "--since", "yesterday"],
        ["events", "--at", "Notifications:x"],
        ["dead-letters", "list", "nonsense"],
        ["dead-letters", "show", "Notifications:1"],
        ["gaps", "accept"],
        ["gaps", "accept", "Notifications:0:5"],
        ["simulate", "--events", "0"],
    ],
    ids=" ".join,
)
def test_wrong_usage_ends_with_2_and_a_message_on_stderr_only(pipeline, wrong):
    result = pipeline(NOTHING, *wrong)

    assert (result.code, result.out) == (2, "")
    assert "Error" in result.err


@pytest.mark.parametrize(
    "command",
    [
        *(["migrate"], ["run"], ["ingest"], ["project"], ["status"], ["events"], ["simulate"]),
        *(["rebuild", "--all"], ["gaps", "list"], ["dead-letters", "list"]),
    ],
    ids=" ".join,
)
def test_a_missing_setting_ends_with_78_and_is_named(pipeline, command):
    result = pipeline(NOTHING, *command)

    assert (result.code, result.out) == (78, "")
    wanted = "KAFKA_BOOTSTRAP_SERVERS" if command == ["simulate"] else "DATABASE_URL"
    assert f"PIPELINE_{wanted} is missing" in result.err


def test_a_wrong_setting_ends_with_78_and_the_error_names_what_is_allowed(pipeline):
    result = pipeline(Commands(batch_rows="0"), "status")

    assert result.code == 78
    assert result.err == (
        "pipeline: PIPELINE_BATCH_ROWS (environment) must be a whole number from 1 to 100000, "
        "not '0'\n"
    )


def test_settings_come_from_the_file_that_config_names(pipeline, tmp_path):
    file = tmp_path / "pipeline.toml"
    file.write_text("batch_rows = 0\n")

    result = pipeline(NOTHING, "--config", str(file), "status")

    assert result.code == 78
    assert f"PIPELINE_BATCH_ROWS ({file})" in result.err


def test_a_fail_point_that_is_not_enabled_is_refused(pipeline):
    armed = Commands(database_url="postgresql://localhost/db", failpoint="after_poll:kill")

    result = pipeline(armed, "ingest")

    assert result.code == 78
    assert "fail points are for tests only" in result.err
