"""What a benchmark's report rests on: rivals are pinned, and all get events like real ones."""

import re
import subprocess
import sys
from itertools import islice
from pathlib import Path
from xml.etree import ElementTree

import orjson
import pytest

from benchmarks import rivals
from benchmarks.projection import COLUMNS
from benchmarks.report import Pairs, Run, Section, table, ways_table, with_new
from benchmarks.rivals import faucet
from benchmarks.stage import sized
from pipeline.projectors.orders import orders
from pipeline.sandbox.simulator import Simulation

HERE = Path(rivals.__file__).parent


@pytest.mark.parametrize(
    "rival", [*rivals.READERS, *rivals.PROJECTING], ids=lambda rival: rival.name
)
def test_the_report_describes_each_rival_and_its_missing_guarantees(rival):
    assert rival.name
    assert rival.version
    assert rival.lacks
    assert rival.wanted > 0


@pytest.mark.parametrize("path", sorted(HERE.glob("*/requirements.txt")), ids=str)
def test_requirements_of_a_python_rival_are_pinned_by_hashes(path):
    text = re.sub(r"^#.*\n", "", path.read_text(), flags=re.MULTILINE)

    pinned = re.findall(
        r"^\S+?(?:\[.+\])?==.+\\\n(?: +--hash=sha256:\w{64}.*\n)+", text, re.MULTILINE
    )

    assert pinned
    assert "".join(pinned) == text


def test_requirements_of_a_java_rival_are_pinned():
    pom = ElementTree.parse(HERE / "debezium" / "pom.xml").getroot()  # noqa: S314 - our own file
    space = {"": "http://maven.apache.org/POM/4.0.0"}
    versions = [version.text or "" for version in pom.iterfind(".//dependency/version", space)]

    assert versions
    assert all(re.fullmatch(r"\d[\w.]*|\$\{\w+\.version\}", version) for version in versions)


def test_requirements_of_a_javascript_rival_are_pinned_by_hashes_without_urls():
    locked = orjson.loads((HERE / "emmett" / "package-lock.json").read_bytes())["packages"]
    packages = [package for path, package in locked.items() if path]

    assert packages
    assert all(package["integrity"].startswith("sha512-") for package in packages)
    assert not any("resolved" in package for package in packages)


def test_a_rival_that_cannot_be_installed_is_reported_with_the_reason(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(faucet, "ENVIRONMENT", Path("/nowhere"))

    absent = rivals.absent([faucet.rival])

    assert absent == {faucet.rival: "cargo is not installed"}


@pytest.mark.parametrize("size", [400, 700, 4096])
def test_events_of_a_given_size_are_real_events_with_a_longer_text(size):
    simulated = Simulation(seed=1, events=4000, topic="t", partitions=6, keep_books=False)

    values = [record.value or b"" for record in islice(sized(simulated, size), 200)]

    assert [len(value) for value in values] == [size] * 200
    events = [orjson.loads(value) for value in values]
    assert len({event["id"] for event in events}) == 200
    assert all({"id", "created_at", "type", "object"} <= event.keys() for event in events)


def test_runs_that_are_compared_several_times_are_in_the_table_once():
    one = Pairs("ours / one", 0.9, ours=[Run(100), Run(300)], theirs=[Run(100), Run(100)])
    other = Pairs("ours / other", 4, ours=one.ours, theirs=[Run(25), Run(50)])

    lines = table([one, other])

    assert [line for line in lines if line.startswith("| ours |")] == [
        "| ours | 200/s (100 to 300) |  |"
    ]
    assert "(wanted: 4 or more) | **5.00** of 4.00, 6.00" in lines[-1]


def test_ways_are_compared_with_the_first_way_run_by_run():
    lines = ways_table({"one": [Run(100), Run(200)], "two": [Run(150), Run(200, 1.5, 2.5)]})

    assert lines[2:] == [
        "| one | 150/s (100 to 200) |  |  |",
        "| two | 175/s (150 to 200) | client 1.5 µs, PostgreSQL 2.5 µs | **1.25** of 1.50, 1.00 |",
    ]


def test_a_section_that_is_measured_again_replaces_the_old_one():
    one, two, new = (
        Section("One", "a", ["1"]),
        Section("Two", "b", ["2"]),
        Section("One", "c", []),
    )
    report = with_new("", "# Here\n", [one, two])

    again = with_new(report, "# Here\n", [new])
    elsewhere = with_new(report, "# There\n", [new])

    assert [line for line in again.splitlines() if line] == [
        "# Here",
        *("## One", "c"),
        *("## Two", "b", "2"),
    ]
    assert [line for line in elsewhere.splitlines() if line] == ["# There", "## One", "c"]
    assert with_new(again, "# Here\n", []) == again


def test_the_command_documents_its_options():
    output = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--help"], capture_output=True, text=True, check=True
    ).stdout

    assert all(part in output for part in ("--quick", "--pairs", "rivals"))


def test_the_statement_to_compare_with_fills_every_column_of_the_table():
    assert sorted(COLUMNS) == sorted(column.name for column in orders.tables[0].columns)
