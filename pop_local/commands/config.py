"""`pop-local config`: show and change settings."""

from pathlib import Path
from typing import Annotated

import tomlkit
import typer

from pop_converter.base.errors import PopError
from pop_converter.base.output_file import make_private, replacing
from pop_local.commands.shared_options import Json
from pop_local.config import settings
from pop_local.config.settings import Scalar, SettingValue, expanded, state_dir
from pop_local.models.model_names import models_dir
from pop_local.ui.console import note, warn
from pop_local.ui.lazy import sub_app
from pop_local.ui.tables import Column, print_json, print_table

config = sub_app(invoke_without_command=True)

_COLUMNS = (
    Column("Setting", lambda value: value.key),
    Column("Value", lambda value: _shown(value)),
    Column("From", lambda value: value.origin),
    Column("Variable", lambda value: settings.find(value.key).variable),
)


@config.callback()
def show(context: typer.Context, json: Json = False) -> None:
    """Show each setting and its source: the default, the settings file or the environment.

    Command-line options override settings.
    """
    if context.invoked_subcommand is not None:
        return
    file, values = settings.config_path(), settings.load()
    for name in settings.unknown_variables():
        warn(f"The environment variable {name} does not match any setting.")
    if json:
        print_json({"file": file, "settings": values})
        return
    note(f"{file}{'' if file.exists() else ' (does not exist yet)'}:")
    print_table(_COLUMNS, values)


def _shown(value: SettingValue) -> object:
    if value.value is not None:
        return value.value
    computed = {"models_dir": models_dir, "state_dir": state_dir}.get(value.key)
    return computed() if computed else settings.find(value.key).default


# Without this, Click would parse the value -1 as an option.
@config.command("set", context_settings={"ignore_unknown_options": True})
def set_value(
    key: Annotated[str, typer.Argument(metavar="KEY", help=", ".join(settings.KEYS))],
    value: Annotated[str, typer.Argument(metavar="VALUE")],
) -> None:
    """Write a setting to the settings file. Preserves comments in the file."""
    setting = settings.find(key)
    _edit(key, settings.located(lambda: _checked(setting, value), key))


def _checked(setting: settings.Setting, text: str) -> Scalar:
    value = settings.parse(setting, text)
    if setting.is_path and not text.strip():
        raise PopError(
            "an empty path is not allowed",
            f"to restore the default, run: pop-local config unset {setting.key}",
        )
    # Paths are relative to the current folder, as in a shell.
    return str(expanded(text).absolute()) if setting.is_path else value


@config.command()
def unset(
    key: Annotated[str, typer.Argument(metavar="KEY", help="A setting's name.")],
) -> None:
    """Remove a setting from the settings file."""
    _edit(settings.find(key).key, None)


def _edit(key: str, value: Scalar | None) -> None:
    file = settings.config_path()
    document = settings.read_document(file)
    if value is not None:
        document[key] = value
    elif key in document:
        del document[key]
    make_private(file.parent)
    # Replace the target of a symbolic link, not the link.
    with replacing(file.resolve(), force=True) as output:
        Path(output.name).chmod(0o600)
        output.write(tomlkit.dumps(document).encode())
