"""Each table of the log's bookkeeping has its statements in `pipeline/log`, and nowhere else."""

import re
from pathlib import Path

import pytest

import pipeline

PACKAGE = Path(pipeline.__file__).parent
TABLES = ("consumer_offsets", "gaps", "installation", "ingest_workers", "segments")
NAMED = r"\bpipeline\.{table}\b|\b{table}\.c\.|import [^\n]*\b{table}\b"


def modules_that_name(table: str) -> set[Path]:
    pattern = re.compile(NAMED.format(table=table))
    return {
        path.relative_to(PACKAGE)
        for path in PACKAGE.rglob("*.py")
        # A comment or a docstring may name it: only what Python or PostgreSQL executes counts.
        if any(
            pattern.search(line) and re.search(r"FROM|JOIN|UPDATE|INTO|import|\.c\.", line)
            for line in path.read_text().splitlines()
        )
    }


@pytest.mark.parametrize("table", TABLES)
def test_only_the_log_has_statements_on_the_tables_of_the_log(table):
    outside = {path for path in modules_that_name(table) if path.parts[0] != "log"}

    assert not outside


def test_the_statements_on_the_offsets_are_found():
    """If the search above finds nothing at all, it proves nothing."""
    assert Path("log/offsets.py") in modules_that_name("consumer_offsets")
