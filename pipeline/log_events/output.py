"""Structured logs on stderr: JSON lines for programs, plain lines on a terminal.

Every line has ``ts`` (RFC 3339, UTC, µs), ``level``, ``event`` (a stable snake_case name) and
``logger``; libraries that log through Python's ``logging`` come out the same way, as the event
``library_log`` with their text in ``msg``. Whatever a caller passes, no line holds a secret, a
record's bytes or payload, or the values that PostgreSQL repeats in its errors.
"""

import logging
import os
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Literal, TextIO

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from pipeline.errors import PipelineError
from pipeline.printable import printable
from pipeline.rate_limit import RateLimit, without_numbers
from pipeline.redaction import MASK, is_secret, redacted

# These log at the chosen level. Other libraries log only warnings and errors, because at DEBUG and
# INFO some of them log statements with their parameters.
_OURS = ("pipeline", "librdkafka")

# What a record contains: personal data of a client's customers.
_PERSONAL = frozenset({"payload", "raw", "value", "values", "headers", "object", "record"})

_FIRST = ("ts", "level", "event", "logger", "msg")

SAME_TEXT_S_MIN = 60.0
"""Minimum time between two lines of librdkafka with the same text."""

_worker: int | None = None


def set_worker(worker: int) -> None:
    """Add the worker's number to every line of this process, in all threads.

    Context variables of structlog would not do: a new thread starts without them.
    """
    global _worker
    _worker = worker


def configure(form: Literal["auto", "console", "json"] = "auto", level: str = "info") -> None:
    """Send every log line of this process to stderr, in one form; may be called again.

    Args:
        form: ``auto`` is console where stderr is a terminal, json elsewhere.
        level: The lowest level of our own lines: debug, info, warning or error.
    """
    terminal = sys.stderr.isatty()
    console = form == "console" or (form == "auto" and terminal)
    render: list[Processor] = (
        [_without_control_characters, _console_renderer(colors=terminal)]
        if console
        else [structlog.processors.JSONRenderer()]
    )
    common: list[Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="ts"),
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.contextvars.merge_contextvars,
            *common,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    handler = _StderrHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[_from_library, *common],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                _with_worker,
                _with_exception,
                _without_secrets,
                _in_order,
                *render,
            ],
        )
    )
    _route(handler, logging.getLevelNamesMapping()[level.upper()])
    sys.excepthook = _crashed
    threading.excepthook = _thread_crashed


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to the current stderr: a progress bar replaces it while it is drawn."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]  # read by StreamHandler, never written
        return sys.stderr


def _route(handler: logging.Handler, level: int) -> None:
    root = logging.getLogger()
    root.handlers = [other for other in root.handlers if not isinstance(other, _StderrHandler)] + [
        handler
    ]
    root.setLevel(max(level, logging.WARNING))
    logging.getLogger("alembic").setLevel(max(level, logging.INFO))
    for name in _OURS:
        logging.getLogger(name).setLevel(level)
    # It repeats a text at every attempt to connect.
    library = logging.getLogger("librdkafka")
    library.filters = [
        other for other in library.filters if not isinstance(other, _OncePerMinute)
    ] + [_OncePerMinute()]
    logging.captureWarnings(capture=True)


class _OncePerMinute(logging.Filter):
    """Passes each text of librdkafka once per minute; a broken connection is no error of its own.

    Of that, the client also reports the code, and we log it as ``kafka_client_error``.
    """

    def __init__(self) -> None:
        super().__init__()
        self._limit = RateLimit(SAME_TEXT_S_MIN)

    def filter(self, record: logging.LogRecord) -> bool:
        if record.getMessage().startswith("FAIL "):
            record.levelno, record.levelname = logging.INFO, "INFO"
            if not logging.getLogger(record.name).isEnabledFor(logging.INFO):
                return False
        return bool(self._limit.occurrences_to_log(without_numbers(record.getMessage())))


def _console_renderer(*, colors: bool) -> Processor:
    return structlog.dev.ConsoleRenderer(
        colors=colors and not os.environ.get("NO_COLOR"), timestamp_key="ts", sort_keys=False
    )


# --------------------------------------------------------------------------------------- processors


def _from_library(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    event["msg"], event["event"] = event["event"], "library_log"
    return event


def _with_worker(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    return event if _worker is None else {**event, "worker": _worker}


def _with_exception(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    info = event.pop("exc_info", None)
    error = (
        info[1] if isinstance(info, tuple) else info if isinstance(info, BaseException) else None
    )
    if info is True:
        error = sys.exception()
    if error is not None:
        event["error.type"] = _name_of(error)
        event["exception"] = exception_text(error)
    return event


def _without_secrets(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    return {name: _safe(name, value) for name, value in event.items()}


def _safe(name: str, value: object) -> object:
    if is_secret(name) or name.lower() in _PERSONAL:
        return MASK
    match value:
        case None | bool() | int() | float():
            return value
        case bytes() | bytearray() | memoryview():
            return f"<{len(value)} bytes>"
        case Mapping():
            return {str(inner): _safe(str(inner), item) for inner, item in value.items()}
        case str():
            return redacted(value)
        case Sequence() | set() | frozenset():
            return [_safe("", item) for item in value]
        case BaseException():
            return f"{_name_of(value)}: {_message(value)}"
        case _:
            return redacted(str(value))


def _in_order(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    return {name: event[name] for name in _FIRST if name in event} | dict(event)


def _without_control_characters(
    _logger: WrappedLogger, _method: str, event: EventDict
) -> EventDict:
    plain = {name: _printable(value) for name, value in event.items() if name != "exception"}
    if "exception" in event:
        plain["exception"] = "\n".join(
            str(_printable(line)) for line in event["exception"].split("\n")
        )
    return plain


def _printable(value: object) -> object:
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {_printable(name): _printable(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_printable(inner) for inner in value]
    return value


# --------------------------------------------------------------------------------------- exceptions


def exception_text(error: BaseException) -> str:
    """A traceback without values of variables, and without texts that may contain data."""
    return "\n".join(_chain(error, seen=set()))


def _chain(error: BaseException, seen: set[int]) -> Iterator[str]:
    seen.add(id(error))
    earlier = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if earlier is not None and id(earlier) not in seen:
        yield from _chain(earlier, seen)
        yield "caused:" if error.__cause__ else "while that was handled:"
    for frame in traceback.extract_tb(error.__traceback__):
        yield f'  File "{frame.filename}", line {frame.lineno}, in {frame.name}'
        if frame.line:
            yield f"    {frame.line}"
    yield f"{_name_of(error)}: {_message(error)}"
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            if id(inner) not in seen:
                yield from _chain(inner, seen)


def _name_of(error: BaseException) -> str:
    kind = type(error)
    return (
        kind.__qualname__
        if kind.__module__ == "builtins"
        else f"{kind.__module__}.{kind.__qualname__}"
    )


# The texts of these are ours, the interpreter's or the operating system's: no values of data.
_SAFE_ERRORS = (
    PipelineError,
    *(AttributeError, ImportError, KeyboardInterrupt, MemoryError, NameError, NotImplementedError),
    *(OSError, RecursionError, TypeError),
)


def _message(error: BaseException) -> str:
    """The error's text if it is ours or the interpreter's; other texts may contain data.

    A driver repeats rows, in the language of its server, and ``int()`` what it could not read. The
    class of the error, its SQLSTATE and its lines of code remain.
    """
    if isinstance(error, _SAFE_ERRORS):
        return redacted(str(error))
    sqlstate = getattr(getattr(error, "orig", error), "sqlstate", None)
    if isinstance(sqlstate, str):
        return f"{MASK} ({printable(sqlstate)})"
    return MASK if str(error) else ""


def _crashed(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    structlog.get_logger("pipeline").critical("crashed", exc_info=error)


def _thread_crashed(crash: threading.ExceptHookArgs) -> None:
    if crash.exc_value is not None:
        name = crash.thread.name if crash.thread else None
        structlog.get_logger("pipeline").critical(
            "thread_crashed", thread=name, exc_info=crash.exc_value
        )
