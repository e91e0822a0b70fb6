"""What is wrong in a file that declares read models: file and line, what, and what is allowed.

Python's own text says what went wrong inside a function; the author of the file needs the line that
calls it.
"""

import builtins
import inspect
import linecache
import re
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from traceback import FrameSummary, extract_tb

import pipeline.readmodel
from pipeline.readmodel import fields, upvest

_OURS = Path(__file__).parent
_MISSING = re.compile(r"(\w+)(?:\.__init__)?\(\) missing \d+ required [\w-]+ arguments?: (.+)")
_SURPLUS = re.compile(r"(\w+)(?:\.__init__)?\(\) got an unexpected keyword argument '(\w+)'")
_FIRST_TEXT = re.compile(r"\w+\(\s*[\"'](\w+)[\"']")


def described(error: Exception, source: str) -> str:
    """One line: ``FILE:LINE: what is wrong; what is allowed``.

    Args:
        error: What the import of the file raised.
        source: What is named where no line of a file is known.
    """
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}: {error.msg}: {(error.text or '').strip()}"
    frame = _line_of(error)
    place = f"{frame.filename}:{frame.lineno}" if frame else source
    return f"{place}: {_what(error, _call(frame) if frame else '')}"


def _line_of(error: Exception) -> FrameSummary | None:
    """The innermost line of the author's: below the folder of the file that is imported."""
    frames = [
        frame
        for frame in extract_tb(error.__traceback__)
        if Path(frame.filename).exists() and not _is_machinery(Path(frame.filename))
    ]
    if not frames:
        return None
    folder = Path(frames[0].filename).parent
    return next(it for it in reversed(frames) if folder in Path(it.filename).parents)


def _is_machinery(file: Path) -> bool:
    return _OURS in file.parents or file.parent.name == "importlib" or file.stem == "catalogue"


def _call(frame: FrameSummary) -> str:
    """The expression of that line that failed, as far as it is on the line."""
    line = linecache.getline(frame.filename, frame.lineno or 0).encode()
    end = frame.end_colno if frame.end_lineno == frame.lineno else None
    return line[frame.colno or 0 : end].decode(errors="replace").strip()


def _what(error: Exception, call: str) -> str:
    if isinstance(error, ImportError) and (name := _not_found(error)):
        return f"{error.name} has no {name}. {_offered(name)}"
    if isinstance(error, NameError) and error.name:
        return f"{error.name} is not defined or not imported. {_offered(error.name)}"
    if isinstance(error, TypeError) and (found := _MISSING.match(str(error))):
        return f"{_column(found[1], call)}: {_missing(found[2])} missing. {_takes(found[1])}"
    if isinstance(error, TypeError) and (found := _SURPLUS.match(str(error))):
        return f"{_column(found[1], call)}: it takes no {found[2]}. {_takes(found[1])}"
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


def _not_found(error: ImportError) -> str | None:
    found = re.match(r"cannot import name '(\w+)' from 'pipeline\.readmodel", str(error))
    return found[1] if found else None


def _column(function: str, call: str) -> str:
    """``text("memo")`` is column memo; of anything else, its name."""
    first = _FIRST_TEXT.match(call)
    return f"column {first[1]}, {function}(…)" if first else f"{function}(…)"


def _missing(names: str) -> str:
    """As Python lists them: ``'table', 'comment', and 'events'``."""
    found = re.findall(r"'(\w+)'", names)
    return f"{', '.join(found)} {'is' if len(found) == 1 else 'are'}"


def _takes(function: str) -> str:
    declared = _declarations().get(function)
    if declared is None:
        return ""
    return f"{function} takes: {', '.join(inspect.signature(declared).parameters)}"


def _offered(name: str) -> str:
    """What the author may have meant, and all that there is."""
    ours = _declarations()
    if name in ours:
        return f"Import it: from {_module_of(name)} import {name}"
    near = get_close_matches(name, [*ours, *dir(builtins)], 1)
    meant = f"Did you mean {near[0]}? " if near else ""
    kinds = [it for it in ours if it in vars(fields) and it.islower()]
    return f"{meant}Kinds of columns are: {' '.join(kinds)}"


def _declarations() -> dict[str, Callable[..., object]]:
    """What a file may import, by name."""
    vocabulary = {
        name: value
        for name, value in vars(upvest).items()
        if getattr(value, "__module__", "") == upvest.__name__
    }
    offered = {name: getattr(pipeline.readmodel, name, None) for name in pipeline.readmodel.__all__}
    kinds = {name: it for name, it in offered.items() if callable(it)}
    return {**kinds, **vocabulary}


def _module_of(name: str) -> str:
    return upvest.__name__ if name not in pipeline.readmodel.__all__ else "pipeline.readmodel"
