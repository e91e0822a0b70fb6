"""A whole run fails unless every test that the guarantee page names has run and passed.

A page that names a test which is skipped, deselected or no longer collected would promise what no
test proves. A run of some tests is not examined; nor is a test whose server is missing, which the
last lines of the run report.
"""

import re
from collections.abc import Collection, Mapping
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "guarantees.md"

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

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Fail the run when a promised test did not run."""
        if hasattr(self._config, "workerinput") or not self._is_whole(session):
            return
        named = dict.fromkeys(re.findall(r"`(test_\w+)`", self._page.read_text()))
        left_out = {name for names in self._not_run.values() for name in names}
        self._unkept = {
            name: self._others.get(name, "did not run")
            for name in named
            if name not in left_out and (name not in self._passed or name in self._others)
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
        return by_marker and wanted == roots and not session.shouldfail


def name_of(nodeid: str) -> str:
    """The name of a test's function."""
    return nodeid.split("::")[-1].partition("[")[0]
