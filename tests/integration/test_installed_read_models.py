"""A package that is installed next to ours, or a folder, brings read models of its own."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from pipeline import catalogue
from tests.given import event, some_id
from tests.integration.test_roles import Cast

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "tests" / "data" / "extra_read_models"


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A fresh virtual environment with the wheels of both; its Python."""
    folder = tmp_path_factory.mktemp("installed")
    for project in (ROOT, PACKAGE):
        build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
        subprocess.run(build, cwd=project, check=True, capture_output=True)
    python: Path = folder / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    [packages] = (folder / "venv").glob("lib/*/site-packages")
    for wheel in folder.glob("*.whl"):
        subprocess.run([sys.executable, "-m", "zipfile", "-e", wheel, packages], check=True)
    # Dependencies alone: a path that is added so does not load our editable installation.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


@pytest.fixture(params=["package", "folder"])
def pipeline(request, given):
    """Runs a command where the read model is installed, in one of the two ways."""

    def run(*arguments: str, code: int = 0) -> str:
        environment = {"PATH": os.environ["PATH"], "PIPELINE_DATABASE_URL": given.database.dsn}
        python = sys.executable
        if request.param == "package":
            python = request.getfixturevalue("installed")
        else:
            environment["PIPELINE_READ_MODELS"] = str(PACKAGE / "extra_read_models")
        done = subprocess.run(
            [python, "-m", "pipeline", *arguments],
            env=environment,
            cwd="/",
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    return run


def test_read_models_and_views_of_a_package_take_part_in_every_command(given, pipeline):
    cast = Cast(given.database)
    body = {"id": some_id("letter"), "user_id": some_id("user"), "street": "Elm", "stamp": "blue"}
    given([event("LETTER.SENT", body)])

    plan = pipeline("migrate", "--plan", code=1)
    pipeline("migrate", "--roles", "--role-prefix", cast.prefix)
    pipeline("project", "--until-end")
    rows = given.query("SELECT stamp, letters FROM upvest.letters_per_stamp")
    rebuilt = json.loads(pipeline("rebuild", "letters", "--json"))
    verified = json.loads(pipeline("verify", "letters", "--only", "read-models", "--json"))
    given.execute("DROP VIEW upvest.letters_per_stamp")
    status = json.loads(pipeline("status", "--json", code=1))
    pipeline("migrate")

    assert "upvest_personal.letters: create table" in plan
    assert "upvest.letters_per_stamp: create view" in plan
    assert rows == [("blue", 1)]
    assert "letters" in str(rebuilt)
    assert verified["ok"]
    assert "letters" in [model["projector"] for model in status["projectors"]]
    named = [it["subject"] for it in status["problems"] if "dropped" in it["what"]]
    assert named == ["upvest.letters_per_stamp"]
    may = {
        (name, role): given.scalar(
            "SELECT has_table_privilege(:role, :name, 'SELECT')",
            role=cast.prefix + role,
            name=name,
        )
        for name in ("upvest.letters", "upvest.letters_per_stamp", "upvest_personal.letters")
        for role in ("analyst", "personal_data")
    }
    assert [key for key, is_so in may.items() if not is_so] == [
        ("upvest_personal.letters", "analyst")
    ]
    cast.end()


def test_a_package_that_cannot_be_loaded_is_named(tmp_path):
    (tmp_path / "orders.py").write_text("import nothing_of_this_name\n")

    with pytest.raises(Exception, match=r"orders\.py:1: ModuleNotFoundError: .*nothing"):
        catalogue.load((tmp_path,))
    (tmp_path / "orders.py").write_text("")
    (tmp_path / "holdings.sql").write_text("-- Personal data: none, reviewed today.\n")
    with pytest.raises(Exception, match=r"two tables or views are called holdings"):
        catalogue.load((tmp_path,))
