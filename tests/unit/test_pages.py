"""The pages for readers name tests and files; they must exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", *sorted((ROOT / "docs").rglob("*.md"))]
TESTS = {
    name
    for path in (ROOT / "tests").rglob("test_*.py")
    for name in re.findall(r"^\s*def (test_\w+)", path.read_text(), re.MULTILINE)
}

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@each_page
def test_every_test_that_a_page_names_exists(page):
    named = set(re.findall(r"`(test_\w+)`", page.read_text()))

    assert named - TESTS == set()


@each_page
def test_every_link_of_a_page_leads_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())

    assert [link for link in links if not (page.parent / link).exists()] == []


def _events_that_people_see() -> set[str]:
    """What any module logs at warning or above, by the name that its lines have."""
    found = {"library_log"}
    for path in (ROOT / "pipeline").rglob("*.py"):
        tree = ast.parse(path.read_text())
        for call in ast.walk(tree):
            if not isinstance(call, ast.Call) or not call.args:
                continue
            # `(log.error if … else log.warning)(…)` too
            functions = [node for node in ast.walk(call.func) if isinstance(node, ast.Attribute)]
            if not {node.attr for node in functions} & {"warning", "error", "critical"}:
                continue
            name = call.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                found.add(name.value)
            elif isinstance(name, ast.Name):
                found |= _texts_given_to(name.id, tree)
    return found


def _texts_given_to(variable: str, tree: ast.Module) -> set[str]:
    given = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and variable in map(ast.unparse, node.targets)
    ]
    branches = [
        branch
        for value in given
        for branch in ([value.body, value.orelse] if isinstance(value, ast.IfExp) else [value])
    ]
    return {ast.literal_eval(branch) for branch in branches if isinstance(branch, ast.Constant)}


def test_every_event_that_wants_attention_is_explained_and_no_other_is():
    """The table of Operations is complete, and names what the program really logs."""
    page = (ROOT / "docs/operations.md").read_text()
    [table] = re.findall(r"^\| event \| meaning.*?(?=\n\n)", page, re.DOTALL | re.MULTILINE)
    rows = [line.split("|")[1] for line in table.splitlines()[2:]]
    explained = [event for row in rows for event in re.findall(r"`(\w+)`", row)]
    logged = _events_that_people_see()
    texts = {
        node.value
        for path in (ROOT / "pipeline").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }

    assert len(logged) > 30
    assert {"topic_missing", "kafka_client_error", "waiting_for_lock"} <= logged
    assert logged - set(explained) == set()
    assert set(explained) - texts == set()
    assert len(explained) == len(set(explained))


def test_every_promise_names_a_test():
    page = (ROOT / "docs/guarantees.md").read_text()

    promises = [it for it in re.split(r"^(?=\*\*|## )", page, flags=re.M) if it[:2] == "**"]

    assert len(promises) == 12
    assert [promise for promise in promises if "`test_" not in promise] == []
