"""User settings from a file and from environment variables, which override the file."""

import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import platformdirs
import tomlkit

from pop_base.errors import PopError
from pop_base.nearest import nearest_hint
from pop_local.config.limits import MOST, MOST_GIB, MOST_SEED, MOST_THREADS
from pop_local.config.sampler_options import SAMPLER_OPTIONS

PREFIX = "POP_LOCAL_"
CONFIG_VARIABLE = PREFIX + "CONFIG"
# Variables with the prefix that are not settings.
_OTHER_VARIABLES = (CONFIG_VARIABLE, PREFIX + "API_KEY")

Scalar = int | float | str | Path
_KINDS = {int: "a whole number", float: "a number", str: "text", Path: "a path"}


@dataclass(frozen=True)
class Setting:
    """A user setting. `default` is only for display. `least` and `most` are inclusive limits."""

    key: str
    kind: type[int] | type[float] | type[str] | type[Path]
    default: str = ""
    least: float = -math.inf
    most: float = sys.float_info.max

    @property
    def variable(self) -> str:
        return PREFIX + self.key.upper()

    @property
    def description(self) -> str:
        """Return the valid values, such as "a whole number from 1 to 512"."""
        least = "" if math.isinf(self.least) else f" from {self.least:g}"
        return _KINDS[self.kind] + least + ("" if self.most > MOST_SEED else f" to {self.most:,}")


_FROM_MODEL = "the model's default; if none, pop-local's default"
SAMPLING = {
    name: Setting(name, option.kind, _FROM_MODEL, option.least, option.most)
    for name, option in SAMPLER_OPTIONS.items()
}

# Each key is also the name of a command parameter.
SETTINGS = (
    Setting("models_dir", Path),
    Setting("state_dir", Path),
    Setting("model", str, "the best catalog model that fits in free memory"),
    Setting("threads", int, "the number of physical cores", least=1, most=MOST_THREADS),
    Setting("ctx", int, "the model's context length, limited by free memory", least=1, most=MOST),
    Setting("gpu_layers", int, "-1 (all)", least=-1, most=MOST),
    *(SAMPLING[name] for name, option in SAMPLER_OPTIONS.items() if option.is_setting),
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
    if path := os.environ.get(CONFIG_VARIABLE):
        return expanded(path)
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
    values = _read(path)
    for key in values:
        find(key, f"{path}: ")
    return tuple(_value(setting, values.get(setting.key), path) for setting in SETTINGS)


def given() -> dict[str, Scalar]:
    """Return the values that the user has set, by key. Raises PopError if a value is invalid."""
    return {value.key: value.value for value in load() if value.value is not None}


def get(key: str) -> Scalar | None:
    """Return a setting's value, or None if unset. Raises PopError if any setting is invalid."""
    return next(value.value for value in load() if value.key == key)


def state_dir() -> Path:
    """Return the state_dir setting or, if unset, the system default. The folder may be missing."""
    folder = get("state_dir")
    return Path(str(folder)) if folder else platformdirs.user_state_path("pop-local")


def sessions_dir() -> Path:
    return state_dir() / "sessions"


def prompts_dir() -> Path:
    """Return the folder for KV caches from earlier prompts."""
    return state_dir() / "prompts"


def unknown_variables() -> list[str]:
    """Return the environment variables that start with POP_LOCAL_ but are not settings."""
    settings = {*_OTHER_VARIABLES, *(setting.variable for setting in SETTINGS)}
    return sorted(name for name in os.environ if name.startswith(PREFIX) and name not in settings)


def find(key: str, where: str = "") -> Setting:
    """Return the setting with this key. Raises PopError if the key is unknown."""
    for setting in SETTINGS:
        if setting.key == key:
            return setting
    hint = nearest_hint(key, {name: name for name in KEYS}, "known: " + ", ".join(KEYS))
    raise PopError(f"{where}there is no setting named {key!r}", hint)


def parse(setting: Setting, text: str, where: str = "") -> Scalar:
    """Parse a setting's value. Raises PopError with a message that describes the valid values."""
    try:
        value = text if setting.kind is Path else setting.kind(text)
    except ValueError:
        value = text
    return _checked(setting, value, where)


def _read(path: Path) -> dict[str, object]:
    """Read a settings file. A missing file counts as empty. Raises PopError."""
    try:
        return tomlkit.parse(path.read_text("utf-8-sig")).unwrap()
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:  # ValueError: invalid UTF-8 or TOML
        hint = "write one setting per line, such as threads = 4"
        raise PopError(f"cannot read the settings file {path}: {error}", hint) from error


def _value(setting: Setting, in_file: object, path: Path) -> SettingValue:
    if text := os.environ.get(setting.variable):
        value = parse(setting, text, f"{setting.variable}: ")
        return SettingValue(setting.key, value, "environment", setting.variable)
    if in_file is None:
        return SettingValue(setting.key, None)
    value = _checked(setting, in_file, f"{path}: {setting.key}: ")
    if isinstance(value, Path):
        value = path.parent / value
    return SettingValue(setting.key, value, "file", str(path))


def _checked(setting: Setting, value: Any, where: str) -> Scalar:
    if setting.kind is Path and isinstance(value, str):
        return expanded(value)
    is_kind = type(value) is setting.kind or (setting.kind is float and type(value) is int)
    # The comparison also rejects NaN and integers beyond a float's range.
    if is_kind and (isinstance(value, str) or setting.least <= value <= setting.most):
        return setting.kind(value)
    raise PopError(f"{where}{value!r} is not {setting.description}", "correct this setting")
