"""The commands: parse, call, print. One file per command; errors become exit codes in `app`.

stdout is data, stderr is logs, progress and words for people.
"""

# Importing a module registers its commands.
from pipeline.cli import (  # noqa: F401 - see above
    check,
    dead_letters,
    demo,
    events,
    gaps,
    ingest,
    migrate,
    project,
    rebuild,
    rewind,
    run,
    simulate,
    status,
    verify,
)
from pipeline.cli.app import main

__all__ = ["main"]
