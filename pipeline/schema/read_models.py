"""Read models and views as their declarations say: what is missing is made."""

from collections.abc import Iterable
from importlib.resources import files

from sqlalchemy import Connection, text

from pipeline.readmodel import Projector

WATCH = text("SELECT pipeline.watch_read_model(CAST(:table AS regclass), :projector)")
EXISTS = text("SELECT to_regclass(:name) IS NOT NULL")


def make_missing(db: Connection, projectors: Iterable[Projector]) -> list[str]:
    """Make the tables and views that are not there.

    Returns:
        Their names.
    """
    made = []
    for projector in projectors:
        for table in projector.tables:
            if not db.execute(EXISTS, {"name": table.fullname}).scalar_one():
                table.create(db)
                db.execute(WATCH, {"table": table.fullname, "projector": projector.name})
                made.append(table.fullname)
    for view, definition in sorted(views().items()):
        if not db.execute(EXISTS, {"name": f"upvest.{view}"}).scalar_one():
            db.execute(text(definition.replace(":", r"\:")))
            made.append(f"upvest.{view}")
    return made


def views() -> dict[str, str]:
    """The definitions of all views, by name."""
    folder = files("pipeline") / "views"
    return {
        file.name.removesuffix(".sql"): file.read_text()
        for file in folder.iterdir()
        if file.name.endswith(".sql")
    }
