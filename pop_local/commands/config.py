"""`pop-local config`: show settings."""

from pop_local.commands.shared_options import Json
from pop_local.config import settings
from pop_local.config.settings import SettingValue, state_dir
from pop_local.models.model_names import models_dir
from pop_local.ui.console import note, warn
from pop_local.ui.tables import Column, print_json, print_table

_COLUMNS = (
    Column("Setting", lambda value: value.key),
    Column("Value", lambda value: _shown(value)),
    Column("From", lambda value: value.origin),
    Column("Variable", lambda value: settings.find(value.key).variable),
)


def config(json: Json = False) -> None:
    """Show each setting and its source: the default, the settings file, or the environment.

    To change a setting, add a line such as threads = 4 to the settings file, or set the
    environment variable that is listed for the setting. Text needs quotation marks, as in system =
    "Be brief". Command-line options override settings.
    """
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
