"""The commands: parse, call, print. One file per command; errors become exit codes in `app`.

stdout is data; stderr is logs, progress and messages for people.
"""

from pipeline.cli.app import main

__all__ = ["main"]
