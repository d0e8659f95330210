"""The licences of what is shipped: each sidecar's beside it, as the catalog names it."""

from pop_local.models.catalog import read_catalog
from support.paths import ROOT

SIDECARS = ROOT / "pop_local" / "data" / "sidecars"
