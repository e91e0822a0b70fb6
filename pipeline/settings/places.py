"""Where settings are read from, and how wrong ones are told.

A setting ``batch_rows`` comes, first place wins, from the command line, the environment
(``PIPELINE_BATCH_ROWS``), a file that the environment names (``PIPELINE_BATCH_ROWS_FILE``), the
secrets directory (``PIPELINE_SECRETS_DIR``, a file of that name in capitals or small letters), the
TOML file (``--config`` or ``PIPELINE_CONFIG``, key ``batch_rows``), or is the default. An empty
environment variable counts as unset.
"""

import difflib
import os
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

from annotated_types import Ge, Le
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from pydantic_settings import EnvSettingsSource, TomlConfigSettingsSource

from pipeline.errors import ConfigurationError
from pipeline.redaction import redacted
from pipeline.settings.fields import PREFIX, Settings, public_name

_FIELDS: Mapping[str, FieldInfo] = Settings.model_fields
_SECRETS_DIR = "PIPELINE_SECRETS_DIR"
_CONFIG = "PIPELINE_CONFIG"
# Read by others than Settings: where settings are, and what only tests set.
_NOT_SETTINGS = re.compile(
    rf"{_CONFIG}|{_SECRETS_DIR}"
    r"|PIPELINE_(TEST_\w+|REQUIRE_\w+|ENABLE_FAILPOINTS|FAILPOINT"
    # Kubernetes sets these in every pod beside a service that is called "pipeline".
    r"|SERVICE_HOST|SERVICE_PORT\w*|PORT|PORT_\d+_\w+)"
)


def load_settings(config: Path | None = None, **overrides: object) -> Settings:
    """Read and check every setting.

    Args:
        config: The TOML file; ``PIPELINE_CONFIG`` names it if None.
        **overrides: What the command line gave; None counts as not given.

    Raises:
        ConfigurationError: One line for each wrong setting: its name, the place, what it must be,
            and its value unless that may be a secret.
    """
    given: dict[str, object] = {}
    place_of: dict[str, str] = {}
    for place, found in _places(config, overrides):
        for name in found.keys() - given.keys():
            given[name], place_of[name] = found[name], place
    complaints = _unknown_in_environment() + _unknown(place_of)
    try:
        settings = Settings.model_validate({name: given[name] for name in given if name in _FIELDS})
    except ValidationError as error:
        complaints += [_complaint(detail, place_of) for detail in error.errors()]
    else:
        if not complaints:
            settings._read_again = partial(load_settings, config, **overrides)  # noqa: SLF001 - ours
            return settings
    # Out here, because an error raised up there would carry the values along as its context.
    raise ConfigurationError("\n".join(complaints))


# ------------------------------------------------------------------------------------------- places


def _places(
    config: Path | None, overrides: Mapping[str, object]
) -> Iterator[tuple[str, Mapping[str, object]]]:
    """Every place that holds settings, the one that wins first."""
    yield "command line", {name: value for name, value in overrides.items() if value is not None}
    yield "environment", EnvSettingsSource(Settings)()
    for name in _FIELDS:
        variable = f"{public_name(name)}_FILE"
        if path := os.environ.get(variable):
            # A secret may have been put where the name of its file is wanted.
            shown = path if _is_surely_path(path) or not _may_be_secret(name) else "what it names"
            yield variable, {name: _content(Path(path), variable, shown)}
    if directory := os.environ.get(_SECRETS_DIR):
        yield _SECRETS_DIR, _secrets(Path(directory))
    if config:
        yield str(config), _toml(config, "--config")
    elif path := os.environ.get(_CONFIG):
        yield path, _toml(Path(path), _CONFIG)


def _is_surely_path(text: str) -> bool:
    """Whether it leads into a folder that exists, which no password does by chance."""
    folder = Path(text).parent
    return folder.is_absolute() and folder != Path("/") and folder.is_dir()


def _content(path: Path, named_by: str, shown: str | None = None) -> str:
    """What stands in a file, without the line end that editors add.

    Args:
        path: The file.
        named_by: What names it.
        shown: What a complaint calls it; its path by default.
    """
    shown = str(path) if shown is None else shown
    try:
        return path.read_text(encoding="utf-8").rstrip("\r\n")
    except OSError as error:
        message = f"{named_by}: cannot read {shown}: {error.strerror}"
    except UnicodeDecodeError:
        message = f"{named_by}: {shown} is not UTF-8"
    raise ConfigurationError(message)


def _secrets(directory: Path) -> dict[str, object]:
    """The settings in a secrets directory, where other files may be anybody's."""
    wanted = {public_name(name): name for name in _FIELDS}
    try:
        files = [path for path in directory.iterdir() if path.name.upper() in wanted]
    except OSError as error:
        message = f"{_SECRETS_DIR}: cannot read {directory}: {error.strerror}"
    else:
        return {wanted[path.name.upper()]: _content(path, _SECRETS_DIR) for path in files}
    raise ConfigurationError(message)


def _toml(path: Path, named_by: str) -> dict[str, object]:
    _content(path, named_by)
    try:
        return TomlConfigSettingsSource(Settings, path)()
    except tomllib.TOMLDecodeError as error:
        place = re.search(r"\(at [^)]*\)", str(error))
        message = f"{named_by}: {path} is not TOML {place[0] if place else ''}".rstrip()
    raise ConfigurationError(message)


# --------------------------------------------------------------------------------------- complaints


def _unknown_in_environment() -> list[str]:
    known = {public_name(name) for name in _FIELDS}
    known |= {f"{name}_FILE" for name in known}
    names = {name for name in os.environ if name.startswith(PREFIX)} - known
    return [
        f"{name} (environment) is not a setting{_did_you_mean(name, known)}"
        for name in sorted(names)
        if not _NOT_SETTINGS.fullmatch(name)
    ]


def _unknown(place_of: Mapping[str, str]) -> list[str]:
    return [
        f"{name} ({place}) is not a setting{_did_you_mean(name, _FIELDS)}"
        for name, place in sorted(place_of.items())
        if name not in _FIELDS
    ]


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    return f"; did you mean {close[0]}?" if close else ""


def _complaint(detail: ErrorDetails, place_of: Mapping[str, str]) -> str:
    """One wrong setting in one line."""
    own_words = detail.get("ctx", {}).get("error")
    if not detail["loc"]:  # settings that do not go together
        return str(own_words)
    name = str(detail["loc"][0])
    must = own_words or _bounds(_FIELDS[name]) or detail["msg"].replace("Input should", "must")
    return f"{public_name(name)} ({place_of[name]}) {must}{_not(name, detail['input'])}"


def _bounds(field: FieldInfo) -> str | None:
    """What a number must be, said at once and not only which end it missed."""
    low = next((bound.ge for bound in field.metadata if isinstance(bound, Ge)), None)
    high = next((bound.le for bound in field.metadata if isinstance(bound, Le)), None)
    return f"must be a whole number from {low} to {high}" if low is not None else None


def _not(name: str, value: object) -> str:
    return "" if _may_be_secret(name) else f", not {redacted(repr(value))[:100]}"


def _may_be_secret(name: str) -> bool:
    return "Secret" in str(_FIELDS[name].annotation)
