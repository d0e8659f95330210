"""Work that nobody waits for is not done on a battery."""

import time

import psutil

# Asked between the nodes of a graph; nobody unplugs that often.
RECHECK_S = 5.0
_seen = (-RECHECK_S, False)


def on_battery() -> bool:
    """Whether the machine runs on its battery; False where psutil cannot tell."""
    global _seen
    now_s = time.monotonic()
    if now_s - _seen[0] >= RECHECK_S:
        _seen = (now_s, _is_unplugged())
    return _seen[1]


def _is_unplugged() -> bool:
    sensors = getattr(psutil, "sensors_battery", None)
    try:
        battery = None if sensors is None else sensors()
    except Exception:  # on Linux an OSError without /sys/class/power_supply, elsewhere psutil's own
        return False
    return battery is not None and battery.power_plugged is False  # None: it cannot tell
