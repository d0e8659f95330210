"""Work that nobody waits for is not done on a battery."""

import psutil


def on_battery() -> bool:
    """Whether the machine runs on its battery; False where psutil cannot tell."""
    sensors = getattr(psutil, "sensors_battery", None)
    battery = None if sensors is None else sensors()
    return battery is not None and not battery.power_plugged
