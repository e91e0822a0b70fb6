"""The root of all commands: global options, what every command needs, errors to exit codes."""

import logging
import os
import platform
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, NoReturn

import psycopg
import structlog
import typer
from sqlalchemy import Engine
from typer.core import TyperGroup

from pipeline import __version__, failpoints, log_events
from pipeline.cli.output import say
from pipeline.db import SessionLimits, open_engine
from pipeline.errors import ExitCode, PipelineError
from pipeline.kafka import client_version
from pipeline.projection.loop import Limits
from pipeline.settings import Settings, load_settings
from pipeline.signals import open_standard_streams, raised_by_signals, tell

log = structlog.get_logger("pipeline.cli")

_ORDER = (
    *("demo", "migrate", "check", "run", "ingest", "project", "status", "events"),
    *("rebuild", "verify", "rewind", "dead-letters", "gaps", "simulate"),
)


class _Root(TyperGroup):
    """All commands, in the order in which a newcomer meets them."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ANN401 - typer's own type
        """Their names, for the help."""
        return sorted(super().list_commands(ctx), key=_ORDER.index)

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401 - typer's own type
        """Run the command; typer would call Ctrl-C a failure, with our code for a finding."""
        try:
            with raised_by_signals():
                return super().invoke(ctx)
        except KeyboardInterrupt as interrupted:
            number = signal.Signals(*interrupted.args or [signal.SIGINT])
            if number != signal.SIGINT:
                tell(f"pipeline: ended by {number.name} before it was done.")
            raise typer.Exit(128 + number) from None
        except BrokenPipeError:
            # Whoever read our output has what was wanted, as in `pipeline events | head`.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            raise typer.Exit(128 + signal.SIGPIPE) from None


app = typer.Typer(
    name="pipeline",
    cls=_Root,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain text keeps its examples, on a terminal of any width
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line, and end with the exit code that tells what happened."""
    open_standard_streams()
    log_events.configure()
    for argument in sys.argv[1:] if arguments is None else arguments:
        if not _is_text(argument):
            say(f"pipeline: the argument {argument!a} is not UTF-8")
            sys.exit(ExitCode.USAGE)
    try:
        app(arguments)
    except PipelineError as error:
        say(f"pipeline: {error}")
        sys.exit(error.exit_code)
    except Exception as error:
        log.critical("crashed", exc_info=error)
        sys.exit(ExitCode.INVARIANT)
    sys.exit(ExitCode.DONE)


def _is_text(argument: str) -> bool:
    """Whether the bytes of an argument are UTF-8; Python keeps others as lone surrogates."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        return False
    return True


def versions() -> dict[str, str]:
    """What this program is made of, for the start line and bug reports."""
    libpq = psycopg.pq.version()
    return {
        "version": __version__,
        "librdkafka": client_version(),
        "libpq": f"{libpq // 10000}.{libpq % 10000}",
        "python": platform.python_version(),
    }


def _show_version(wanted: bool) -> None:
    if wanted:
        made_of = versions()
        parts = ", ".join(f"{name} {made_of[name]}" for name in ("librdkafka", "libpq", "python"))
        typer.echo(f"pipeline {__version__} ({parts})")
        raise typer.Exit


@app.callback()
def root(
    ctx: typer.Context,
    config: Annotated[
        Path | None,
        typer.Option(
            help='A TOML file with settings, e.g. topics = ["Notifications"]. '
            "The environment (PIPELINE_TOPICS) wins over it.",
            metavar="PATH",
        ),
    ] = None,
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Versions; then end."
        ),
    ] = False,
) -> None:
    """Upvest's Kafka events, exactly once, in PostgreSQL: an append-only log and read models.

    New here?  pipeline demo shows all of it; nothing to set up.

    With settings (PIPELINE_DATABASE_URL, PIPELINE_KAFKA_BOOTSTRAP_SERVERS …):
    pipeline migrate, pipeline check, then pipeline run.

    Data goes to stdout; logs, progress and words to stderr. Exit codes: 0 done; 1 a check found
    something; 2 wrong usage; 65 refused, to protect data; 69 a server is away; 70 an invariant
    broke; 75 somebody else has it; 78 settings, rights or schema are wrong.
    """
    ctx.obj = config


def settings_of(ctx: typer.Context, *, tells_all: bool = False) -> Settings:
    """The settings, checked; logs speak in the chosen form from here on.

    Args:
        ctx: Holds ``--config``.
        tells_all: Log at the level that is set. Other commands answer with their output, so they
            log no less than warnings, unless the level is set to debug.

    Raises:
        ConfigurationError: A setting is wrong or a fail point is armed that may not be.
    """
    settings = load_settings(ctx.obj)
    level = settings.log_level
    log_events.configure(
        settings.log_format, "warning" if level == "info" and not tells_all else level
    )
    # It tells whenever it looks at the schema; what it has done we tell ourselves.
    logging.getLogger("alembic").setLevel(logging.WARNING)
    failpoints.arm(os.environ)
    return settings


@contextmanager
def database_of(
    settings: Settings,
    command: str,
    *,
    pool_size: int = 4,
    answers_soon: bool = False,
    read_only: bool = False,
) -> Iterator[Engine]:
    """The configured database, until the block ends. Nothing is connected yet.

    Args:
        settings: Which, and for how long to wait for it.
        command: Who asks.
        pool_size: Most connections open at a time.
        answers_soon: No statement may take longer than ``ANSWER_TIMEOUT_MS``.
        read_only: Nothing is written, so a standby will do.
    """
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


def projection_limits(settings: Settings) -> Limits:
    """The bounds of the projection, as they are set."""
    return Limits(
        batch_offsets_max=settings.project_batch_offsets,
        rejected_max=settings.dead_letter_budget,
        poll_interval=timedelta(milliseconds=settings.poll_interval_ms),
    )
