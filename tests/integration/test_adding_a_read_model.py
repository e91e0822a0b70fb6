"""The page that shows how to add a read model: each of its files, commands and queries works."""

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import catalogue, projectors
from tests.commands import Commands, InProcess
from tests.given import Given, create_tables, sample_events

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-read-model.md"


def blocks(language: str, page: Path = PAGE) -> list[str]:
    """The page's blocks in a language."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.fixture
def added(given: Given, tmp_path, monkeypatch) -> Iterator[None]:
    """The page's file among the read models of a database that was migrated without it."""
    assert given.query("SELECT to_regclass('upvest.topups')")[0][0] is None
    (tmp_path / "topups.py").write_text(blocks("python")[0])
    monkeypatch.setattr(projectors, "__path__", [*projectors.__path__, str(tmp_path)])
    catalogue.load.cache_clear()
    yield
    sys.modules.pop("pipeline.projectors.topups", None)
    catalogue.load.cache_clear()


@pytest.mark.usefixtures("added")
def test_every_step_of_the_page_works(given: Given, monkeypatch, capsys):
    given(sample_events())
    commands = Commands(
        database_url=given.database.dsn,
        kafka_bootstrap_servers="localhost:9",
        kafka_security_protocol="PLAINTEXT",
        topics="Notifications",
    )
    run = InProcess(monkeypatch, capsys)

    lines = [shlex.split(line) for block in blocks("sh") for line in block.splitlines()]
    results = [run(commands, *arguments) for _, *arguments in lines]

    assert {program for program, *_ in lines} == {"pipeline"}
    assert [(result.code, result.err) for result in results if result.code] == []
    (query,) = blocks("sql")
    sent = [event["object"] for event in sample_events() if event["type"].startswith("TOPUP.")]
    counted = sum(row._mapping["count"] for row in given.query(query))
    assert counted == len({body["id"] for body in sent})
    comment = given.scalar("SELECT obj_description(CAST('upvest.topups' AS regclass))")
    assert comment.startswith("One row per top-up")


@pytest.mark.usefixtures("added")
def test_the_test_on_the_page_passes(given: Given):
    # It is in the catalogue already.
    create_tables(given.engine)
    written: dict[str, object] = {}

    exec(blocks("python")[1], written)  # noqa: S102 - our own page

    (test,) = [value for name, value in written.items() if name.startswith("test_")]
    assert callable(test)
    test(given)
