"""The wait before a failed attempt is repeated."""

import re
from pathlib import Path

import pytest

import pipeline
from pipeline.backoff import SERVER, Backoff

PACKAGE = Path(pipeline.__file__).parent


@pytest.mark.parametrize(
    ("failures", "wait_s"), [(1, 0.5), (2, 1.0), (3, 2.0), (4, 4.0), (5, 5.0), (10**9, 5.0)]
)
def test_the_wait_doubles_with_each_failure_up_to_the_longest(failures, wait_s):
    assert Backoff(first_s=0.5, longest_s=5.0).wait_s(failures) == wait_s


def test_many_workers_do_not_retry_at_one_moment():
    waits = [SERVER.random_wait_s(100) for _ in range(1000)]

    assert all(SERVER.longest_s / 2 <= wait <= SERVER.longest_s for wait in waits)
    assert len(set(waits)) > 100


def test_no_other_module_computes_a_wait_that_doubles():
    formula = re.compile(r"\* *2(\.0)? *\*\*")
    others = {
        path.relative_to(PACKAGE)
        for path in PACKAGE.rglob("*.py")
        if formula.search(path.read_text()) and "simulator" not in path.parts
    }

    assert others == {Path("backoff.py")}
