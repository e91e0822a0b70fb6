"""The registry of log events is what the program logs, and the page of operations shows it."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.log_events import EVENTS
from tests.log_events_page import PAGE, with_table

PACKAGE = Path(__file__).parents[2] / "pipeline"
LEVELS = {"debug", "info", "warning", "error", "critical"}
TREES = {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def logging_calls(tree: ast.Module) -> Iterator[tuple[ast.expr, str]]:
    """The event and the level of each call that logs; `(log.error if … else log.info)(…)` too."""
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call) or not call.args:
            continue
        for method in ast.walk(call.func):
            if isinstance(method, ast.Attribute) and method.attr in LEVELS | {"exception"}:
                logger = ast.unparse(method.value)
                if logger == "log" or "get_logger" in logger:
                    level = "error" if method.attr == "exception" else method.attr
                    yield call.args[0], level


def texts(expression: ast.expr, tree: ast.Module) -> set[str]:
    """The texts that an event may have: a constant, or a variable's or a parameter's values."""
    match expression:
        case ast.Constant(value=str(text)):
            return {text}
        case ast.IfExp(body=first, orelse=second):
            return texts(first, tree) | texts(second, tree)
        case ast.Name(id=name):
            assigned = [
                node.value
                for node in ast.walk(tree)
                if isinstance(node, ast.Assign) and name in map(ast.unparse, node.targets)
            ]
            return {text for value in assigned for text in texts(value, tree)} or given(name, tree)
        case _:
            return set()


def given(parameter: str, tree: ast.Module) -> set[str]:
    """The constants that any module gives for a parameter of a function of this module."""
    found = set()
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        names = [argument.arg for argument in function.args.args if argument.arg != "self"]
        if parameter not in names:
            continue
        for other in TREES.values():
            for call in ast.walk(other):
                if isinstance(call, ast.Call) and name_of(call.func) == function.name:
                    values = call.args[names.index(parameter) :][:1]
                    values += [word.value for word in call.keywords if word.arg == parameter]
                    found |= {text for value in values for text in texts(value, other)}
    return found


def name_of(function: ast.expr) -> str | None:
    return getattr(function, "attr", getattr(function, "id", None))


@pytest.fixture(scope="module")
def logged():
    """All events that the program logs, with their levels."""
    found = defaultdict(set)
    for path, tree in TREES.items():
        for expression, level in logging_calls(tree):
            names = texts(expression, tree)
            assert names, f"{path}:{expression.lineno}: the event of this line is not known here"
            for name in names:
                found[name].add(level)
    # Lines of libraries get this name from the processors.
    found["library_log"] = set(EVENTS["library_log"].levels)
    return found


def test_the_registry_has_every_event_that_is_logged_and_no_other(logged):
    assert len(logged) > 50
    assert {"topic_missing", "kafka_client_error", "partitions_revoked"} <= logged.keys()
    assert sorted(EVENTS.keys() - logged.keys()) == []
    assert sorted(logged.keys() - EVENTS.keys()) == []


def test_every_event_is_logged_at_the_levels_in_the_registry(logged):
    wrong = {
        name: (sorted(levels), EVENTS[name].levels)
        for name, levels in logged.items()
        if name in EVENTS and levels != set(EVENTS[name].levels)
    }

    assert wrong == {}


@pytest.mark.parametrize("event", EVENTS.values(), ids=lambda event: event.name)
def test_every_event_has_a_name_a_meaning_and_where_it_is_serious_an_action(event):
    assert re.fullmatch(r"[a-z]+(_[a-z]+)*", event.name)
    assert event.meaning
    assert event.action or not {"warning", "error", "critical"} & set(event.levels)


def test_no_event_changes_after_it_is_declared():
    with pytest.raises(AttributeError):
        EVENTS["started"].meaning = "another"  # type: ignore[misc] # that is the test


def test_the_table_of_operations_is_written_from_the_registry():
    page = PAGE.read_text()

    assert page == with_table(page), "run: python -m tests.log_events_page"


def test_no_two_events_have_the_same_name():
    source = (PACKAGE / "log_events" / "registry.py").read_text()

    assert len(EVENTS) == source.count('    LogEvent(\n        "') + source.count('    LogEvent("')
