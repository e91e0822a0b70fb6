"""Reads settings from their sources, and reports wrong ones.

A setting ``batch_rows`` comes from the first of these that has it: command line, environment
(``PIPELINE_BATCH_ROWS``), a file that the environment names (``PIPELINE_BATCH_ROWS_FILE``), the
secrets directory (``PIPELINE_SECRETS_DIR``, a file of that name in upper or lower case), the TOML
file (``--config`` or ``PIPELINE_CONFIG``, key ``batch_rows``), the default. An empty environment
variable counts as unset.

The environment and TOML are read by the sources of pydantic-settings. Our own code does what these
lack: it names the source of a wrong value, refuses unknown names, reads ``*_FILE``, and reads
secrets without removing spaces at their ends (``SecretsSettingsSource`` strips them).
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
# Not settings: these say where settings are, or are for tests.
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
        **overrides: Values from the command line; None counts as not given.

    Raises:
        ConfigurationError: One line for each wrong setting: its name, the source, what is allowed,
            and its value unless that may be a secret.
    """
    given: dict[str, object] = {}
    source_of: dict[str, str] = {}
    for source, found in _sources(config, overrides):
        for name in found.keys() - given.keys():
            given[name], source_of[name] = found[name], source
    errors = _unknown_in_environment() + _unknown(source_of)
    try:
        settings = Settings.model_validate({name: given[name] for name in given if name in _FIELDS})
    except ValidationError as error:
        errors += [_error_text(detail, source_of) for detail in error.errors()]
    else:
        if not errors:
            settings._read_again = partial(load_settings, config, **overrides)  # noqa: SLF001 - ours
            return settings
    # Raised here, because an error raised in the handler would have the values in its context.
    raise ConfigurationError("\n".join(errors))


# ------------------------------------------------------------------------------------------ sources


def _sources(
    config: Path | None, overrides: Mapping[str, object]
) -> Iterator[tuple[str, Mapping[str, object]]]:
    """Every source of settings, in order of precedence."""
    yield "command line", {name: value for name, value in overrides.items() if value is not None}
    yield "environment", EnvSettingsSource(Settings)()
    for name in _FIELDS:
        variable = f"{public_name(name)}_FILE"
        if path := os.environ.get(variable):
            # Somebody may have given the secret instead of the path of its file.
            shown = (
                path
                if _is_surely_path(path) or not _may_be_secret(name)
                else "the file that it names"
            )
            yield variable, {name: _content(Path(path), variable, shown)}
    if directory := os.environ.get(_SECRETS_DIR):
        yield _SECRETS_DIR, _secrets(Path(directory))
    if config:
        yield str(config), _toml(config, "--config")
    elif path := os.environ.get(_CONFIG):
        yield path, _toml(Path(path), _CONFIG)


def _is_surely_path(text: str) -> bool:
    """Whether the path leads into a folder that exists. No password does that by chance."""
    folder = Path(text).parent
    return folder.is_absolute() and folder != Path("/") and folder.is_dir()


def _content(path: Path, named_by: str, shown: str | None = None) -> str:
    """The content of a file, without the line end that editors add.

    Args:
        path: The file.
        named_by: What names it.
        shown: Its name in an error; its path by default.
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
    """The settings in a secrets directory. Other files in it are ignored."""
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
        position = re.search(r"\(at [^)]*\)", str(error))
        message = f"{named_by}: {path} is not TOML {position[0] if position else ''}".rstrip()
    raise ConfigurationError(message)


# --------------------------------------------------------------------------------------- errors


def _unknown_in_environment() -> list[str]:
    known = {public_name(name) for name in _FIELDS}
    known |= {f"{name}_FILE" for name in known}
    names = {name for name in os.environ if name.startswith(PREFIX)} - known
    return [
        f"{name} (environment) is not a setting{_did_you_mean(name, known)}"
        for name in sorted(names)
        if not _NOT_SETTINGS.fullmatch(name)
    ]


def _unknown(source_of: Mapping[str, str]) -> list[str]:
    return [
        f"{name} ({source}) is not a setting{_did_you_mean(name, _FIELDS)}"
        for name, source in sorted(source_of.items())
        if name not in _FIELDS
    ]


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    return f"; did you mean {close[0]}?" if close else ""


def _error_text(detail: ErrorDetails, source_of: Mapping[str, str]) -> str:
    """One line about one wrong setting."""
    own_text = detail.get("ctx", {}).get("error")
    if not detail["loc"]:  # settings that conflict
        return str(own_text)
    name = str(detail["loc"][0])
    must = own_text or _bounds(_FIELDS[name]) or detail["msg"].replace("Input should", "must")
    return f"{public_name(name)} ({source_of[name]}) {must}{_not(name, detail['input'])}"


def _bounds(field: FieldInfo) -> str | None:
    """Both bounds of a number."""
    low = next((bound.ge for bound in field.metadata if isinstance(bound, Ge)), None)
    high = next((bound.le for bound in field.metadata if isinstance(bound, Le)), None)
    return f"must be a whole number from {low} to {high}" if low is not None else None


def _not(name: str, value: object) -> str:
    return "" if _may_be_secret(name) else f", not {redacted(repr(value))[:100]}"


def _may_be_secret(name: str) -> bool:
    return "Secret" in str(_FIELDS[name].annotation)
