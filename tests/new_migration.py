"""A migration for declared tables of the log and bookkeeping that no migration creates yet.

``make migration name="add fees"`` writes the next numbered file: the difference to a database
of its own that all existing migrations have made.
"""

import argparse
import sys
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine

from pipeline.schema.migrate import migrate
from tests.servers import FAST_AND_UNSAFE, find_postgres
from tests.servers.databases import fresh_database

FOLDER = Path(__file__).resolve().parents[1] / "migrations"
NEWEST = 18


def write(url: str, name: str, folder: Path = FOLDER) -> Path:
    """Write the migration that takes a migrated database to what is declared.

    Args:
        url: A database that ``migrate`` has brought to the head.
        name: What the migration does, in a few words.
        folder: Holds ``env.py`` and ``versions``.

    Returns:
        The file.
    """
    engine = create_engine(url)
    with engine.connect() as db:
        config = Config(attributes={"connection": db})
        config.set_main_option("script_location", str(folder))
        config.set_main_option("file_template", "%%(rev)s_%%(slug)s")
        last = len(list(ScriptDirectory(str(folder)).walk_revisions()))
        command.revision(config, message=name, autogenerate=True, rev_id=f"{last + 1:04}")
    engine.dispose()
    return next(folder.glob(f"versions/{last + 1:04}_*.py"))


def main() -> int:
    """Write the file and print its name."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("name", help="what the migration does, in a few words")
    name = arguments.parse_args().name
    with find_postgres(NEWEST, FAST_AND_UNSAFE) as server, fresh_database(server) as database:
        migrate(database.url)
        file = write(database.url, name)
    print(f"{file}: write its lock into its first lines, then check every statement")
    return 0


if __name__ == "__main__":
    sys.exit(main())
