"""A whole run fails unless every test that the guarantee page names has run and passed.

A page that names a test which is skipped, deselected or no longer collected would promise what no
test proves. A run of some tests is not examined; nor is a test whose server is missing, which the
last lines of the run report.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "guarantees.md"

CORE = "not benchmark and (core or not faults)"
"""What ``make test`` runs: of each promise at least one test."""
REST = "not benchmark and faults and not core"
"""What ``make test-faults`` runs: all other tests."""

# On the command line, each of these options leaves tests out on purpose.
_PARTS = ("keyword", "lf", "deselect", "ignore", "ignore_glob", "collectonly", "stepwise")


class PromisedTests:
    """Watches a run for the tests that the page names.

    Args:
        config: The configuration of the run.
        not_run: Tests left out because a server is missing, by the reason.
        page: The page.
    """

    def __init__(
        self, config: pytest.Config, not_run: Mapping[str, Collection[str]], page: Path = PAGE
    ) -> None:
        self._config = config
        self._not_run = not_run
        self._page = page
        self._passed: set[str] = set()
        self._others: dict[str, str] = {}
        self._deselected: set[str] = set()
        self._unkept: Mapping[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Under pytest-xdist the workers' reports come to the controller, and here."""
        name = name_of(report.nodeid)
        if report.failed:
            self._others[name] = "failed"
        elif report.skipped:
            self._others.setdefault(name, "was skipped")
        elif report.when == "call":
            self._passed.add(name)

    def pytest_deselected(self, items: Sequence[pytest.Item]) -> None:
        """Under pytest-xdist only the workers collect tests; all collect the same."""
        self._deselected |= {name_of(item.nodeid) for item in items}

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Take from a worker which tests it left out."""
        self._deselected |= set(getattr(node, "workeroutput", {}).get("deselected", ()))

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Fail the run when a promised test did not run."""
        if (output := getattr(self._config, "workeroutput", None)) is not None:
            output["deselected"] = sorted(self._deselected)
            return
        if not self._is_whole(session):
            return
        text = self._page.read_text()
        left_out = {name for names in self._not_run.values() for name in names}
        if self._is_part():
            left_out |= self._deselected
        self._unkept = {
            name: self._others.get(name, "did not run")
            for name in _tests(text)
            if name not in left_out and (name not in self._passed or name in self._others)
        }
        if self._config.getoption("markexpr") == CORE:
            self._unkept |= {
                heading: "has no test in this run"
                for heading, promise in _promises(text)
                if _tests(promise) and set(_tests(promise)) <= self._deselected
            }
        if self._unkept and exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """List the promised tests that did not pass."""
        if not self._unkept:
            return
        terminalreporter.section(f"promised in {self._page.name}, and not seen to hold", red=True)
        for name, why in self._unkept.items():
            terminalreporter.write_line(f"{name} {why}")

    def _is_whole(self, session: pytest.Session) -> bool:
        option = self._config.option
        if any(getattr(option, part, None) for part in _PARTS) or session.shouldstop:
            return False
        root = self._config.rootpath
        wanted = {Path(given).resolve() for given in self._config.args}
        roots = {(root / path).resolve() for path in self._config.getini("testpaths")}
        by_marker = self._config.getoption("markexpr") in ("", "not benchmark")
        return (by_marker or self._is_part()) and wanted == roots and not session.shouldfail

    def _is_part(self) -> bool:
        return self._config.getoption("markexpr") in (CORE, REST)


def _tests(text: str) -> Sequence[str]:
    return list(dict.fromkeys(re.findall(r"`(test_\w+)`", text)))


def _promises(text: str) -> Iterator[tuple[str, str]]:
    """Each promise of the page: its heading and its text."""
    for promise in re.split(r"(?m)^(?=\*\*\d+\. |#)", text):
        if heading := re.match(r"\*\*(\d+\. [^*]+)\*\*", promise):
            yield heading[1], promise


def name_of(nodeid: str) -> str:
    """The name of a test's function."""
    return nodeid.split("::")[-1].partition("[")[0]
