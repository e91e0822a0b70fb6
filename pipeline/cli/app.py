"""The composition root: global options, settings, database; errors become exit codes.

What only some commands need is imported where it is used, so that help starts fast.
"""

import os
import platform
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from pipeline import __version__
from pipeline.cli.command import PLAIN, Lazy
from pipeline.cli.output import say
from pipeline.errors import ExitCode, PipelineError

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from pipeline.projection.loop import Limits
    from pipeline.settings import Settings


class _Root(Lazy):
    """All commands. A signal ends a command with 128 + its number."""

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401 - typer's own type
        """Run the command. Typer would exit with 1 on Ctrl-C, which is our code for a problem."""
        from pipeline.signals import raised_by_signals

        try:
            with raised_by_signals():
                return super().invoke(ctx)
        except KeyboardInterrupt as interrupted:
            number = signal.Signals(*interrupted.args or [signal.SIGINT])
            if number != signal.SIGINT:
                say(f"pipeline: ended by {number.name} before it was done.")
            raise typer.Exit(128 + number) from None
        except BrokenPipeError:
            # The reader of our output has read enough, as in `pipeline events | head`.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            raise typer.Exit(128 + signal.SIGPIPE) from None


app = typer.Typer(
    name="pipeline",
    cls=_Root,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    **(PLAIN | {"add_completion": True}),
)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line, and end with the exit code that says what happened."""
    _open_standard_streams()
    for argument in sys.argv[1:] if arguments is None else arguments:
        if not _is_text(argument):
            say(f"pipeline: the argument {argument!a} is not UTF-8. Use UTF-8 text.")
            sys.exit(ExitCode.USAGE)
    try:
        app(arguments)
    except PipelineError as error:
        say(f"pipeline: {error}")
        sys.exit(error.exit_code)
    except Exception as error:  # noqa: BLE001 - logged, with what it may show
        _log_crash(error)
        sys.exit(ExitCode.INVARIANT)
    sys.exit(ExitCode.DONE)


def _log_crash(error: Exception) -> None:
    import structlog

    from pipeline import log_events

    if not structlog.is_configured():
        log_events.configure()
    structlog.get_logger("pipeline.cli").critical("crashed", exc_info=error)


def _is_text(argument: str) -> bool:
    """Whether the bytes of an argument are UTF-8; Python keeps others as lone surrogates."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        return False
    return True


def _open_standard_streams() -> None:
    """Ensure that 0, 1 and 2 are open.

    If the command was started without them (``2>&-``), the next file that is opened, for example
    the socket of a database, gets the number 2, and everything written to stderr goes there.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - open for as long as we run
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115


def versions() -> dict[str, str]:
    """The versions of the program and of what it depends on, for logs and bug reports."""
    import psycopg

    from pipeline.kafka.version import librdkafka_version

    libpq = psycopg.pq.version()
    return {
        "version": __version__,
        "librdkafka": librdkafka_version(),
        "libpq": f"{libpq // 10000}.{libpq % 10000}",
        "python": platform.python_version(),
    }


def _show_version(wanted: bool) -> None:
    if wanted:
        found = versions()
        parts = ", ".join(f"{name} {found[name]}" for name in ("librdkafka", "libpq", "python"))
        typer.echo(f"pipeline {__version__} ({parts})")
        raise typer.Exit


@app.callback()
def root(
    ctx: typer.Context,
    config: Annotated[
        Path | None,
        typer.Option(
            help='A TOML file with settings, for example topics = ["Notifications"]. '
            "Environment variables (PIPELINE_TOPICS) override it.",
            metavar="PATH",
        ),
    ] = None,
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show versions and exit."
        ),
    ] = False,
) -> None:
    """Upvest's Kafka events, exactly once, in PostgreSQL: an append-only log and read models.

    To try it: pipeline demo. It shows everything and needs no configuration.

    To use it: set PIPELINE_DATABASE_URL and PIPELINE_KAFKA_BOOTSTRAP_SERVERS, then run
    pipeline migrate, pipeline check, pipeline run.

    Data goes to stdout; logs, progress and messages go to stderr. Exit codes: 0 done; 1 the command
    found a problem; 2 wrong usage; 65 refused, to protect data; 69 a server is unavailable; 70 an
    unexpected error, a defect of this program; 75 another process does the same work; 78 a setting,
    a right or the schema is wrong; 128 + N ended by signal N.
    """
    ctx.obj = config


def settings_of(
    ctx: typer.Context, *, log_level: Literal["info", "warning"] = "warning"
) -> "Settings":
    """The settings, checked. From here on, logs have the format and level that are set.

    Args:
        ctx: Has ``--config``.
        log_level: Replaces the level info. Most commands answer with their output and log only
            warnings and errors.

    Raises:
        ConfigurationError: A setting is wrong, or a fail point is armed that may not be.
    """
    import logging

    from pipeline import failpoints, log_events
    from pipeline.settings import load_settings

    log_events.configure()
    settings = load_settings(ctx.obj)
    level = settings.log_level
    log_events.configure(settings.log_format, log_level if level == "info" else level)
    # Alembic logs each look at the schema. What `migrate` did, it reports itself.
    logging.getLogger("alembic").setLevel(logging.WARNING)
    failpoints.arm(os.environ)
    return settings


@contextmanager
def database_of(
    settings: "Settings",
    command: str,
    *,
    pool_size: int = 4,
    answers_soon: bool = False,
    read_only: bool = False,
) -> Iterator["Engine"]:
    """The configured database, until the block ends. It does not connect yet.

    Args:
        settings: Its URL and timeouts.
        command: The name of the command, which PostgreSQL shows for its sessions.
        pool_size: Maximum connections at a time.
        answers_soon: No statement may take longer than ``ANSWER_TIMEOUT_MS``.
        read_only: Nothing is written, so that a standby is enough.
    """
    from pipeline.db import SessionLimits, open_engine

    engine = open_engine(
        settings.database(),
        application=f"pipeline {command}",
        limits=SessionLimits(
            idle_in_transaction=timedelta(milliseconds=settings.idle_in_transaction_timeout_ms),
            lock_wait=timedelta(milliseconds=settings.lock_timeout_ms),
            answer=timedelta(milliseconds=settings.answer_timeout_ms) if answers_soon else None,
        ),
        pool_size=pool_size,
        read_only=read_only,
        fresh_url=lambda: settings.with_fresh_logins().database(),
    )
    try:
        yield engine
    finally:
        engine.dispose()


@contextmanager
def migrated_database_of(
    settings: "Settings", command: str, *, writes_read_models: bool = False, **options: Any
) -> Iterator["Engine"]:
    """The same, after a check that it has the schema of this program.

    Args:
        settings: As above.
        command: As above.
        writes_read_models: Check also that objects of others on our tables change nothing that
            this command writes.
        **options: As above.

    Raises:
        ConfigurationError: Another version of the program has migrated the database, or none.
    """
    from pipeline import catalogue
    from pipeline.schema.bookkeeping import check_tables
    from pipeline.schema.revisions import check_schema

    with database_of(settings, command, **options) as engine:
        check_schema(engine)
        if writes_read_models:
            check_tables(engine, catalogue=catalogue.load(settings.read_models))
        yield engine


def projection_limits(settings: "Settings") -> "Limits":
    """The limits of the projection that are set."""
    from pipeline.projection.loop import Limits

    return Limits(
        batch_offsets_max=settings.project_batch_offsets,
        rejected_max=settings.dead_letter_budget,
        poll_interval=timedelta(milliseconds=settings.poll_interval_ms),
    )
