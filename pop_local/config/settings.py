"""Settings: what the user's file says, over it the environment, over both a command's flags."""

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

from pop_local.base.errors import PopError
from pop_local.base.nearest import nearest_hint

PREFIX = "POP_LOCAL_"
CONFIG_VARIABLE = PREFIX + "CONFIG"
# No settings: where they are, and what does not belong into a file.
_OTHER_VARIABLES = (CONFIG_VARIABLE, PREFIX + "API_KEY")

Scalar = int | float | str
Origin = Literal["default", "file", "environment"]
# llama.cpp counts no further.
MOST = 2**31 - 1
# The next one asks llama.cpp for chance.
MOST_SEED = 2**32 - 2
_MOST_BITS = 64
_KINDS = {int: "a whole number", float: "a number", str: "text"}


@dataclass(frozen=True)
class Setting:
    """A setting that a user may make.

    `default` says for people what holds when nobody sets it; `least` and `most` are inclusive.
    """

    key: str
    kind: type[int] | type[float] | type[str]
    default: str = ""
    least: float = -math.inf
    most: float = math.inf
    is_path: bool = False

    @property
    def variable(self) -> str:
        """The variable of the environment that sets it."""
        return PREFIX + self.key.upper()


# Keys are the names of the commands' parameters, which is how they reach them.
SETTINGS = (
    Setting("models_dir", str, is_path=True),
    Setting("state_dir", str, is_path=True),
    Setting("model", str, "SmolLM2-135M-Instruct"),
    Setting("threads", int, "the physical cores", least=1, most=MOST),
    Setting("ctx", int, "the model's, at most 8192", least=1, most=MOST),
    Setting("gpu_layers", int, "-1 (all)", least=-1, most=MOST),
    Setting("temperature", float, "the model's, else the engine's", least=0),
    Setting("top_p", float, "the model's, else the engine's", least=0, most=1),
    Setting("max_tokens", int, "what the context holds", least=1, most=MOST),
    Setting("system", str, "none"),
    Setting("theme", str, "the terminal's own colours"),
)
KEYS = tuple(setting.key for setting in SETTINGS)


@dataclass(frozen=True)
class Value:
    """What a setting is, and who says so; `where` is the file or the variable."""

    key: str
    value: Scalar | None
    origin: Origin = "default"
    where: str = ""


def config_path() -> Path:
    """Return $POP_LOCAL_CONFIG, else config.toml in the user's configuration folder."""
    if chosen := os.environ.get(CONFIG_VARIABLE):
        return expanded(chosen)
    return platformdirs.user_config_path("pop-local") / "config.toml"


def expanded(path: str) -> Path:
    """Put a home folder for its ~. Raises PopError where there is no such user, or a NUL in it."""
    if "\0" in path:
        raise PopError("a path has no NUL in it", "write the path anew")
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise PopError(f"{path}: there is no such home folder", "write the path out") from None


def load() -> tuple[Value, ...]:
    """Return all settings in their order. Raises PopError naming file or variable, line and key."""
    in_file = _from_file(config_path())
    return tuple(
        _from_environment(setting) or in_file.get(setting.key) or Value(setting.key, None)
        for setting in SETTINGS
    )


def given() -> dict[str, Scalar]:
    """Return the settings that someone set, by key. Raises PopError as `load` does."""
    return {value.key: value.value for value in load() if value.value is not None}


def get(key: str) -> Scalar | None:
    """Return the value of a setting, None where nobody set it. Raises PopError as `load` does."""
    return next(value.value for value in load() if value.key == key)


def state_dir() -> Path:
    """Return the folder that is set, else the system's for such things; it need not exist yet."""
    chosen = get("state_dir")
    return Path(str(chosen)) if chosen else platformdirs.user_state_path("pop-local")


def sessions_dir() -> Path:
    """Return where saved sessions lie."""
    return state_dir() / "sessions"


def unsaved_dir() -> Path:
    """Return where chats that are under way are kept, in case of a crash."""
    return state_dir() / "unsaved"


def history_file() -> Path:
    """Return the file that keeps the lines typed in the chat."""
    return state_dir() / "history"


def unknown_variables() -> list[str]:
    """Return variables of the environment that look like settings and are none."""
    known = {*_OTHER_VARIABLES, *(setting.variable for setting in SETTINGS)}
    return sorted(name for name in os.environ if name.startswith(PREFIX) and name not in known)


def find(key: str) -> Setting:
    """Return the setting of that name. Raises PopError naming the nearest one."""
    for setting in SETTINGS:
        if setting.key == key:
            return setting
    hint = nearest_hint(key, {known: known for known in KEYS}, "known: " + ", ".join(KEYS))
    raise PopError(f"there is no setting {key!r}", hint)


def parse(setting: Setting, text: str) -> Scalar:
    """Parse a value as typed. Raises PopError saying what it should be."""
    try:
        text.encode()  # what the command line could not decode
        return _checked(setting, setting.kind(text))
    except ValueError:
        raise PopError(f"{text!r} is not {_wanted(setting)}") from None


def _from_environment(setting: Setting) -> Value | None:
    text = os.environ.get(setting.variable)
    if not text:
        return None
    value = located(lambda: parse(setting, text), setting.variable, "correct or unset it")
    if setting.is_path:
        value = str(expanded(str(value)))
    return Value(setting.key, value, "environment", setting.variable)


def _from_file(path: Path) -> dict[str, Value]:
    document = read_document(path)
    text = tomlkit.dumps(document)
    return {key: _file_value(path, text, key, value) for key, value in document.unwrap().items()}


def read_document(path: Path) -> tomlkit.TOMLDocument:
    """Read the file, comments included; an empty one when there is none.

    Raises PopError naming the line of a mistake.
    """
    try:
        return tomlkit.parse(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return tomlkit.document()
    except TOMLKitError as error:
        raise PopError(
            f"{path} is not valid TOML: {error}", 'lines look like: threads = 4, system = "..."'
        ) from error
    except UnicodeDecodeError as error:
        raise PopError(f"{path} is not UTF-8 text", "save it as UTF-8") from error
    except OSError as error:
        raise PopError(f"cannot read {path}: {error.strerror}", "check the path") from error


def _file_value(path: Path, text: str, key: str, value: object) -> Value:
    where = f"{path}, line {_line(text, key)}"
    setting = located(lambda: find(key), where)
    checked = located(lambda: _checked(setting, value), f"{where}, {key}", "correct that line")
    if setting.is_path:
        # Not of wherever a command happens to run.
        checked = str(path.parent / expanded(str(checked)))
    return Value(key, checked, "file", str(path))


def _line(text: str, key: str) -> int:
    pattern = re.compile(rf"""\s*\[*\s*["']?{re.escape(key)}["']?\s*[=.\]]""")
    numbers = (n for n, line in enumerate(text.splitlines(), start=1) if pattern.match(line))
    return next(numbers, 1)


def located(call: Callable[[], Any], where: str, hint: str = "") -> Any:
    """Call it, with `where` before the message of a PopError, and `hint` where it has none."""
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
    # Also refuses nan, which is neither, and what no float holds.
    if not setting.least <= value <= min(setting.most, sys.float_info.max):
        raise PopError(f"{_shown(value)} is not {_wanted(setting)}")
    return setting.kind(value)


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    # Python writes no whole number of thousands of digits.
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        return f"a number of {value.bit_length():,} bits"
    return repr(value) if isinstance(value, str | int | float) else f"a {type(value).__name__}"


def _wanted(setting: Setting) -> str:
    kind = _KINDS[setting.kind]
    if math.isinf(setting.least):
        return kind
    most = "" if math.isinf(setting.most) else f" to {setting.most:,}"
    return f"{kind} from {setting.least:g}{most}"
