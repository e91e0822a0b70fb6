"""A whole run that leaves a promised test out is red and says which; a part is not judged."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.promised import CORE, REST

ROOT = Path(__file__).parents[2]
CONFTEST = """
from pathlib import Path
from tests_of_the_pipeline import PromisedTests

def pytest_configure(config):
    page = Path(__file__).parents[1] / "guarantees.md"
    missing = {"a broker": ["test_wants_a_broker"]}
    config.pluginmanager.register(PromisedTests(config, missing, page))
"""
TESTS = """
import pytest

def test_holds():
    pass

@pytest.mark.parametrize("n", [1, 2])
def test_holds_twice(n):
    pass

@pytest.mark.skipif(True, reason="today")
def test_is_skipped():
    pass

@pytest.mark.parametrize("n", [1, 2])
def test_is_half_skipped(n):
    if n == 2:
        pytest.skip("today")

def test_not_named():
    pass

@pytest.mark.faults
def test_kills():
    pass

@pytest.mark.faults
@pytest.mark.core
def test_kills_quickly():
    pass
"""
GREEN = "`test_holds` `test_holds_twice` `test_wants_a_broker`"
RED = f"{GREEN} `test_is_skipped` `test_is_half_skipped` `test_is_gone`"
UNSEEN = ["test_is_skipped was skipped", "test_is_half_skipped was skipped", "test_is_gone did not"]

with_and_without_workers = pytest.mark.parametrize(
    "workers",
    [[], ["-n", "2"]] if importlib.util.find_spec("xdist") else [[]],
    ids=lambda arguments: " ".join(arguments) or "one process",
)


@pytest.fixture
def run(tmp_path):
    """Runs pytest on a little suite whose page names some of its tests."""
    suite = tmp_path / "tests"
    suite.mkdir()
    (suite / "conftest.py").write_text(CONFTEST)
    (suite / "test_some.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\ntestpaths = tests\nmarkers = faults\n core\n")
    (tmp_path / "tests_of_the_pipeline.py").write_text((ROOT / "tests/promised.py").read_text())

    def run(page, *arguments):
        (tmp_path / "guarantees.md").write_text(page)
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100,
            check=False,
        )  # fmt: skip
        return done.returncode, done.stdout

    return run


@with_and_without_workers
def test_a_whole_run_fails_with_the_promised_tests_that_did_not_run(run, workers):
    status, output = run(RED, *workers)

    assert status == pytest.ExitCode.TESTS_FAILED
    for line in UNSEEN:
        assert line in output
    assert "test_holds " not in output
    assert "test_wants_a_broker" not in output, "its server is missing; that is reported elsewhere"
    assert " passed" in output.splitlines()[-1], "the closing line stays the last"


@with_and_without_workers
def test_a_whole_run_with_every_promised_test_passed_is_green(run, workers):
    status, output = run(GREEN, *workers)

    assert status == pytest.ExitCode.OK
    assert "promised" not in output


@pytest.mark.parametrize(
    "part",
    [
        ["-k", "holds"],
        ["tests/test_some.py"],
        ["-m", "not slow"],
        ["--deselect", "tests/test_some.py::test_holds"],
        ["--collect-only"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_run_of_some_tests_is_not_judged(run, part):
    status, output = run(RED, *part)

    assert status == pytest.ExitCode.OK
    assert "promised in" not in output


@with_and_without_workers
@pytest.mark.parametrize("part", [CORE, REST], ids=["core", "rest"])
def test_each_part_of_the_suite_is_judged_by_the_promised_tests_that_it_runs(run, part, workers):
    whole = "`test_holds` `test_kills` `test_kills_quickly`"

    green = run(f"**1. It holds.** {whole}", "-m", part, *workers)
    red = run(f"**1. It holds.** {whole} `test_is_gone`", "-m", part, *workers)

    assert green[0] == pytest.ExitCode.OK, green[1]
    assert red[0] == pytest.ExitCode.TESTS_FAILED
    assert "test_is_gone did not run" in red[1]


@with_and_without_workers
def test_the_core_needs_a_test_of_each_promise(run, workers):
    page = "**1. It holds.** `test_holds`\n\n**2. A kill is harmless.** `test_kills`\n"

    status, output = run(page, "-m", CORE, *workers)

    assert status == pytest.ExitCode.TESTS_FAILED
    assert "2. A kill is harmless. has no test in this run" in output
