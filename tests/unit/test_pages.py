"""What the pages for readers name exists: tests, files, commands, settings, tables, decisions."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import typer

from pipeline import catalogue
from pipeline.cli.app import app
from pipeline.errors import ExitCode
from pipeline.health.check.promises import Promise
from pipeline.settings import Settings
from tests import reference_page

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
DECISIONS = ROOT / "docs/decisions"
# A decision may name what it replaced; no other page names anything that does not exist.
OF_TODAY = [page for page in PAGES if page.parent != DECISIONS]
TESTS = {
    name
    for path in (ROOT / "tests").rglob("test_*.py")
    for name in re.findall(r"^\s*def (test_\w+)", path.read_text(), re.MULTILINE)
}
FILES = subprocess.run(
    ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
    cwd=ROOT, check=True, capture_output=True, text=True,
).stdout.splitlines() if (ROOT / ".git").exists() else [
    str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file()
]  # fmt: skip
# Files that a reader writes by following the page.
EXAMPLES = {
    "pipeline/projectors/withdrawals.py",
    "pipeline/views/withdrawals_per_day.sql",
    "tests/integration/test_withdrawals.py",
}


def name(page):
    return str(page.relative_to(ROOT))


each_page = pytest.mark.parametrize("page", PAGES, ids=name)
each_page_of_today = pytest.mark.parametrize("page", OF_TODAY, ids=name)


def code_in(page):
    """Every span and every line of a block of code."""
    text = re.sub(r"\\\|", "|", page.read_text())
    blocks = re.findall(r"^ *```\w*\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    prose = re.sub(r"^ *```\w*\n.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    return spans, [line.strip() for block in blocks for line in block.splitlines()]


@each_page
def test_every_test_that_a_page_names_exists(page):
    named = set(re.findall(r"`(test_\w+)`", page.read_text()))

    assert named - TESTS == set()


@each_page
def test_every_link_of_a_page_leads_to_a_file_and_a_heading(page):
    broken = [
        link
        for link in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text())
        if not leads_somewhere(page, *link.partition("#")[::2])
    ]

    assert broken == []


def leads_somewhere(page, path, anchor):
    target = page.parent / path if path else page
    return target.exists() and (not anchor or anchor in anchors(target))


def anchors(page):
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page_of_today
def test_every_path_that_a_page_names_exists(page):
    spans, _ = code_in(page)
    paths = [
        promise
        for promise in spans
        if re.fullmatch(r"[\w./-]+(\.(py|sql|md|toml|xml|txt)|/)", promise)
    ]

    assert [path for path in paths if not exists(path)] == []


def test_every_module_in_the_table_of_packages_is_in_its_package():
    page = (ROOT / "ARCHITECTURE.md").read_text()
    rows = re.findall(r"^\| `(\w+/)`[^|]*\| (.*) \|$", page, re.MULTILINE)

    missing = [
        (package, word)
        for package, text in rows
        if package != "migrations/"
        for word in re.findall(r"`([a-z_]+)`", text)
        if not {f"pipeline/{package}{word}.py", f"pipeline/{package}{word}/__init__.py"}
        & set(FILES)
    ]

    assert len(rows) > 10
    assert missing == []


def exists(path):
    if path in EXAMPLES:
        return True
    if path.endswith("/"):
        return any(file.startswith((path, f"pipeline/{path}")) for file in FILES)
    if "/" in path:
        return path in FILES or f"pipeline/{path}" in FILES
    return any(Path(file).name == path for file in FILES)


@each_page_of_today
def test_every_command_that_a_page_names_exists_with_its_options(page):
    spans, lines = code_in(page)
    called = [
        words
        for text in [*spans, *lines]
        for words in re.findall(r"(?:^|[ /])(?:pipeline) ([a-z-]+(?: [^|;>]*)?)", text)
        if re.match(r"(\.venv/bin/)?pipeline ", text) or "bin/pipeline " in text
    ]

    wrong = [call for call in called if (why := what_is_wrong(call)) is not None and why]

    assert wrong == []


def what_is_wrong(call):
    """Whether this call names a command or an option that does not exist."""
    words = shlex.split(call.partition("#")[0].replace("'", ""))
    command = typer.main.get_command(app)
    options = known_options(command)
    while words and hasattr(command, "get_command") and not words[0].startswith("-"):
        command = command.get_command(None, words.pop(0))
        if command is None:
            return True
        options = known_options(command)
    return any(
        word.partition("=")[0] not in options for word in words if re.match(r"--?[a-z]", word)
    )


def known_options(command):
    options = {
        opt for promise in command.params for opt in [*promise.opts, *promise.secondary_opts]
    }
    return options | {"--help", "-h"}


def test_every_target_of_make_that_a_page_names_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {
        target
        for page in PAGES
        for text in [text for texts in code_in(page) for text in texts]
        for target in re.findall(r"^make ([a-z-]+)", text)
    }

    assert named - targets == set()


@each_page_of_today
def test_every_setting_that_a_page_names_exists(page):
    settings = {f"PIPELINE_{field.upper()}" for field in Settings.model_fields}
    settings |= {f"{setting}_FILE" for setting in settings}
    settings |= {"PIPELINE_SECRETS_DIR", "PIPELINE_CONFIG", "PIPELINE_TEST_KAFKA"}

    named = set(re.findall(r"\bPIPELINE_[A-Z][A-Z_]*[A-Z]\b", page.read_text()))

    assert named - settings == set()


@each_page_of_today
def test_every_table_and_view_that_a_page_names_exists(page):
    declared = catalogue.load()
    readable = {table.name for model in declared.models for table in model.tables}
    readable |= {*declared.views, "withdrawals", "withdrawals_per_day"}
    migrations = "".join(path.read_text() for path in (ROOT / "migrations/versions").glob("*.py"))

    named = set(re.findall(r"\bupvest(?:_personal)?\.([a-z_]+)", page.read_text()))
    own = set(re.findall(r"`pipeline\.([a-z_]+)", page.read_text())) - {"read_models", "toml"}

    assert named - readable - {"co", "py"} == set()
    assert {promise for promise in own if promise not in migrations} == set()


def test_the_page_of_commands_and_settings_is_written_from_their_declarations():
    assert reference_page.PAGE.read_text() == reference_page.page(), (
        "run: python -m tests.reference_page"
    )


def test_operations_has_every_exit_code():
    page = (ROOT / "docs/operations.md").read_text()
    section = page.partition("\n## Exit codes\n")[2].partition("\n## ")[0]

    codes = {int(code) for row in re.findall(r"^\| ([\d, ]+) \|", section, re.M)
             for code in row.split(",")}  # fmt: skip

    assert {int(code) for code in ExitCode} == {code for code in codes if code < 128}


def test_the_index_has_every_decision_under_its_title():
    index = (DECISIONS / "README.md").read_text()
    decisions = sorted(DECISIONS.glob("0*.md"))

    entries = re.findall(r"^- \[(.+?)\]\((.+?)\)", index, re.MULTILINE)

    assert entries == [
        (path.read_text().partition("\n")[0].removeprefix("# "), path.name) for path in decisions
    ]
    assert [path.name[:4] for path in decisions] == [
        f"{number:04}" for number in range(1, len(decisions) + 1)
    ]


def test_a_replaced_decision_and_its_successor_name_each_other():
    replaced = {
        path: re.findall(r"^Replaced by \[(\d+)\]", path.read_text(), re.MULTILINE)
        for path in DECISIONS.glob("0*.md")
    }
    index = (DECISIONS / "README.md").read_text()

    for path, successors in replaced.items():
        for successor in successors:
            newer = next(DECISIONS.glob(f"{successor}-*.md")).read_text()
            assert f"Replaces [{path.name[:4]}]({path.name})" in newer
            assert f"({path.name}), replaced by {successor}" in index


def test_measured_figures_are_on_the_page_of_performance_only():
    """Bounds and waits are the program's; speeds and costs were measured."""
    measured = re.compile(
        r"\d ?(µs|MB/s|events/s)|\d (events|rows|records)[\w ]* (a|per) second|times as fast"
    )
    others = [page for page in OF_TODAY if page.name != "performance.md"]

    assert {
        name(page): found for page in others if (found := measured.findall(page.read_text()))
    } == {}


def test_every_share_on_the_page_of_performance_is_in_the_report():
    report = (ROOT / "benchmarks/results.md").read_text()
    numbers = [float(promise.replace(",", "")) for promise in re.findall(r"\d[\d,]*\.?\d*", report)]
    page = (ROOT / "docs/performance.md").read_text()

    shares = re.findall(r"\*\*(\d+\.\d+)", page)

    assert len(shares) > 5
    assert [
        share for share in shares
        if float(share) not in {round(promise, len(share.partition(".")[2])) for promise in numbers}
    ] == []  # fmt: skip


def test_the_promises_are_those_of_check_and_each_names_a_test():
    page = (ROOT / "docs/guarantees.md").read_text()

    promises = [
        promise for promise in re.split(r"^(?=\*\*|## )", page, flags=re.M) if promise[:2] == "**"
    ]

    headings = re.findall(r"^\*\*\d+\. (.*?)\.?\*\*", page, re.MULTILINE)
    assert headings == [promise.value for promise in Promise], "check uses the same words"
    assert [promise for promise in promises if "`test_" not in promise] == []


def test_the_readme_takes_three_minutes():
    page = (ROOT / "README.md").read_text()

    assert len(page.splitlines()) <= 130
    assert len(page.split()) <= 900
