"""The commands: parse, call, print. One room for each family; errors become exit codes in `app`.

stdout is data, stderr is logs, progress and words for people.
"""

# Importing a room registers its commands; this order is the one that `--help` shows.
from pipeline.cli import (  # noqa: F401 - see above
    dead_letters,
    events,
    flow,
    gaps,
    rebuild,
    rewind,
    setup,
    status,
    trying,
    verify,
)
from pipeline.cli.app import main

__all__ = ["main"]
