"""User settings from a file and from environment variables, which override the file."""

import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import platformdirs
import tomlkit
from tomlkit.exceptions import TOMLKitError

from pop_converter.base.errors import PopError
from pop_converter.base.files import read_file
from pop_converter.base.nearest import nearest_hint
from pop_converter.base.numbers import size

PREFIX = "POP_LOCAL_"
CONFIG_VARIABLE = PREFIX + "CONFIG"
# Variables with the prefix that are not settings.
_OTHER_VARIABLES = (CONFIG_VARIABLE, PREFIX + "API_KEY")

Scalar = int | float | str
# llama.cpp's counts have 32 bits.
MOST = 2**31 - 1
MOST_GIB = 2**20
MOST_THREADS = 512  # ggml.h's GGML_MAX_N_THREADS; with more, llama.cpp aborts
# The next larger number makes llama.cpp choose a random seed.
MOST_SEED = 2**32 - 2
_MOST_BITS = 64
_MOST_BYTES = 10**6
_KINDS = {int: "a whole number", float: "a number", str: "text"}


@dataclass(frozen=True)
class Setting:
    """A user setting. `default` is only for display. `least` and `most` are inclusive limits."""

    key: str
    kind: type[int] | type[float] | type[str]
    default: str = ""
    least: float = -math.inf
    most: float = math.inf
    is_path: bool = False

    @property
    def variable(self) -> str:
        return PREFIX + self.key.upper()


# Each key is also the name of a command parameter.
SETTINGS = (
    Setting("models_dir", str, is_path=True),
    Setting("state_dir", str, is_path=True),
    Setting("model", str, "the best catalog model that fits in free memory"),
    Setting("threads", int, "the number of physical cores", least=1, most=MOST_THREADS),
    Setting("ctx", int, "the model's context length, limited by free memory", least=1, most=MOST),
    Setting("gpu_layers", int, "-1 (all)", least=-1, most=MOST),
    Setting("temperature", float, "the model's default; if none, pop-local's default", least=0),
    Setting("top_p", float, "the model's default; if none, pop-local's default", least=0, most=1),
    Setting("max_tokens", int, "the number of tokens left in the context", least=1, most=MOST),
    Setting("system", str, "none"),
    Setting("cache_disk", int, "0 (store no prompts)", least=0, most=MOST_GIB),
)
KEYS = tuple(setting.key for setting in SETTINGS)


@dataclass(frozen=True)
class SettingValue:
    """A setting's value and its origin. `where` is the file or variable that sets the value."""

    key: str
    value: Scalar | None
    origin: Literal["default", "file", "environment"] = "default"
    where: str = ""


def config_path() -> Path:
    """Return $POP_LOCAL_CONFIG or, if unset, config.toml in the user's configuration folder."""
    if chosen := os.environ.get(CONFIG_VARIABLE):
        return expanded(chosen)
    return platformdirs.user_config_path("pop-local") / "config.toml"


def expanded(path: str) -> Path:
    """Expand ~ to the home folder. Raises PopError for an unknown user or an invalid path."""
    if "\0" in path:
        raise PopError("the path contains a NUL character", "correct the path")
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise PopError(f"no home folder was found for {path}", "use an absolute path") from None


def load() -> tuple[SettingValue, ...]:
    """Return all settings in the order of SETTINGS. Raises PopError if any setting is invalid."""
    path = config_path()
    document = _read_document(path)
    text = tomlkit.dumps(document)
    in_file = {key: _file_value(path, text, key, value) for key, value in document.unwrap().items()}
    return tuple(
        _from_environment(setting) or in_file.get(setting.key) or SettingValue(setting.key, None)
        for setting in SETTINGS
    )


def given() -> dict[str, Scalar]:
    """Return the values that the user has set, by key. Raises PopError if a value is invalid."""
    return {value.key: value.value for value in load() if value.value is not None}


def get(key: str) -> Scalar | None:
    """Return a setting's value, or None if unset. Raises PopError if any setting is invalid."""
    return next(value.value for value in load() if value.key == key)


def state_dir() -> Path:
    """Return the state_dir setting or, if unset, the system default. The folder may be missing."""
    chosen = get("state_dir")
    return Path(str(chosen)) if chosen else platformdirs.user_state_path("pop-local")


def sessions_dir() -> Path:
    return state_dir() / "sessions"


def prompts_dir() -> Path:
    """Return the folder for KV caches from earlier prompts."""
    return state_dir() / "prompts"


def unknown_variables() -> list[str]:
    """Return the environment variables that start with POP_LOCAL_ but are not settings."""
    known = {*_OTHER_VARIABLES, *(setting.variable for setting in SETTINGS)}
    return sorted(name for name in os.environ if name.startswith(PREFIX) and name not in known)


def find(key: str) -> Setting:
    """Return the setting with this key. Raises PopError if the key is unknown."""
    for setting in SETTINGS:
        if setting.key == key:
            return setting
    hint = nearest_hint(key, {known: known for known in KEYS}, "known: " + ", ".join(KEYS))
    raise PopError(f"there is no setting named {key!r}", hint)


def parse(setting: Setting, text: str) -> Scalar:
    """Parse a setting's value. Raises PopError with a message that describes the valid values."""
    try:
        text.encode()  # raises for bytes that the command line could not decode
        return _checked(setting, setting.kind(text))
    except ValueError:
        raise PopError(f"{text!r} is not {_wanted(setting)}") from None


def _from_environment(setting: Setting) -> SettingValue | None:
    text = os.environ.get(setting.variable)
    if not text:
        return None
    hint = "correct the value, or unset the variable"
    value = _located(lambda: parse(setting, text), setting.variable, hint)
    if setting.is_path:
        value = str(expanded(str(value)))
    return SettingValue(setting.key, value, "environment", setting.variable)


def _read_document(path: Path) -> tomlkit.TOMLDocument:
    """Read a settings file. A missing file counts as empty. Raises PopError."""
    try:
        if str(path) == os.devnull:
            return tomlkit.document()
        raw = read_file(path, _MOST_BYTES + 1)
        if len(raw) > _MOST_BYTES:
            raise PopError(f"{path} is larger than {size(_MOST_BYTES)}", "check the path")
        return tomlkit.parse(raw.decode("utf-8-sig"))
    except FileNotFoundError:
        return tomlkit.document()
    except TOMLKitError as error:
        raise PopError(
            f"{path} is not valid TOML: {error}", "write one setting per line, such as threads = 4"
        ) from error
    except UnicodeDecodeError as error:
        raise PopError(f"{path} is not UTF-8 text", "save the file as UTF-8") from error
    except OSError as error:
        raise PopError(f"cannot read {path}: {error.strerror}", "check the path") from error


def _file_value(path: Path, text: str, key: str, value: object) -> SettingValue:
    where = f"{path}, line {_line(text, key)}"
    setting = _located(lambda: find(key), where)
    checked = _located(lambda: _checked(setting, value), f"{where}, {key}", "correct that line")
    if setting.is_path:
        # Paths are relative to the settings file.
        checked = str(path.parent / expanded(str(checked)))
    return SettingValue(key, checked, "file", str(path))


def _line(text: str, key: str) -> int:
    pattern = re.compile(rf"""\s*\[*\s*["']?{re.escape(key)}["']?\s*[=.\]]""")
    numbers = (n for n, line in enumerate(text.splitlines(), start=1) if pattern.match(line))
    return next(numbers, 1)


def _located(call: Callable[[], Any], where: str, hint: str = "") -> Any:
    """Return `call()`. Prefix a PopError's message with `where`. `hint`: the default hint."""
    try:
        return call()
    except PopError as error:
        raise PopError(f"{where}: {error.message}", error.hint or hint) from error


def _checked(setting: Setting, value: object) -> Scalar:
    kinds = (int, float) if setting.kind is float else (setting.kind,)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise PopError(f"{_shown(value)} is not {_wanted(setting)}")
    if isinstance(value, str):
        if setting.is_path:
            expanded(value)
        return value
    # This also rejects NaN and integers beyond a float's range.
    if not setting.least <= value <= min(setting.most, sys.float_info.max):
        raise PopError(f"{_shown(value)} is not {_wanted(setting)}")
    return setting.kind(value)


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    # Python refuses to print an integer with thousands of digits.
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        return f"a {value.bit_length():,}-bit number"
    return repr(value) if isinstance(value, str | int | float) else f"a {type(value).__name__}"


def _wanted(setting: Setting) -> str:
    kind = _KINDS[setting.kind]
    if math.isinf(setting.least):
        return kind
    most = "" if math.isinf(setting.most) else f" to {setting.most:,}"
    return f"{kind} from {setting.least:g}{most}"
