"""The page that shows how to add a read model: each of its files, commands and queries works."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import catalogue, projectors
from pipeline.db import transaction
from tests.commands import Commands, InProcess, Result
from tests.given import Given, create_tables, sample_events
from tests.read_models_page import reference

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "adding-a-read-model.md"


def blocks(language: str) -> list[str]:
    """The page's blocks in a language."""
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.fixture
def added(given: Given, tmp_path, monkeypatch) -> Iterator[Path]:
    """The page's files among those of a database that was migrated without them."""
    assert given.query("SELECT to_regclass('upvest.withdrawals')")[0][0] is None
    (tmp_path / "withdrawals.py").write_text(blocks("python")[0])
    (tmp_path / "views").mkdir()
    (tmp_path / "views" / "withdrawals_per_day.sql").write_text(blocks("sql")[0])
    monkeypatch.setattr(projectors, "__path__", [*projectors.__path__, str(tmp_path)])
    catalogue.load.cache_clear()
    yield tmp_path
    sys.modules.pop("pipeline.projectors.withdrawals", None)
    catalogue.load.cache_clear()


def test_every_step_of_the_page_works(given: Given, added: Path, monkeypatch, capsys):
    given(sample_events())
    commands = Commands(
        database_url=given.database.dsn,
        kafka_bootstrap_servers="localhost:9",
        kafka_security_protocol="PLAINTEXT",
        topics="Notifications",
        read_models=str(added / "views"),
    )
    pipeline = InProcess(monkeypatch, capsys)

    def run(line: str) -> Result:
        match shlex.split(line):
            case ["pipeline", *arguments]:
                return pipeline(commands, *arguments)
            case ["make", target]:
                return executed("make", "--dry-run", target)
            case [".venv/bin/python", "-m", "pytest", "tests/integration/test_withdrawals.py"]:
                return executed(sys.executable, "-m", "pytest", "--version")
            case [".venv/bin/python", "-m", "tests.read_models_page"]:
                return written_reference(given)
            case _:
                raise AssertionError(f"no test executes: {line}")

    lines = [line for block in blocks("sh") for line in block.splitlines()]
    results = {line: run(line) for line in lines}

    due = [line for line in lines if line.endswith("--plan")]
    assert {line: it.err for line, it in results.items() if it.code != (line in due)} == {}
    assert "upvest.withdrawals_per_day: create view" in results[due[0]].out
    assert "### `withdrawals_per_day`" in results[".venv/bin/python -m tests.read_models_page"].out
    sent = [event["object"] for event in sample_events() if event["type"].startswith("WITHDRAWAL.")]
    counted = sum(row._mapping["count"] for row in given.query(blocks("sql")[1]))
    assert counted == len({body["id"] for body in sent})
    assert given.query("SELECT day, currency, amount FROM upvest.withdrawals_per_day")
    comment = given.scalar("SELECT obj_description(CAST('upvest.withdrawals' AS regclass))")
    assert comment.startswith("One row per withdrawal")


def executed(*command: str) -> Result:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return Result(done.returncode, done.stdout, done.stderr)


def written_reference(given: Given) -> Result:
    with transaction(given.engine) as db:
        return Result(0, reference(db), "")


@pytest.mark.usefixtures("added")
def test_the_test_on_the_page_passes(given: Given):
    # It is in the catalogue already.
    create_tables(given.engine)
    written: dict[str, object] = {}

    exec(blocks("python")[1], written)  # noqa: S102 - our own page

    (test,) = [value for name, value in written.items() if name.startswith("test_")]
    assert callable(test)
    test(given)


def test_the_package_on_the_page_is_the_one_that_tests_install():
    (page,) = blocks("toml")

    assert page == (ROOT / "tests/data/extra_read_models/pyproject.toml").read_text()
