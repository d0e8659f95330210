"""Check that LICENSES.md lists each shipped sidecar with its model's license in the catalog."""

from pathlib import Path

from pop_local.models.model_names import load_catalog
from support.paths import ROOT

SIDECARS = ROOT / "pop_local" / "data" / "sidecars"


def test_each_sidecar_has_its_models_license() -> None:
    table = (SIDECARS / "LICENSES.md").read_text(encoding="utf-8")
    lines = dict(line.split(" | ", 1) for line in table.splitlines() if line.startswith("| `"))
    assert {name[3:-1] for name in lines} == {path.name for path in SIDECARS.glob("*.gguf")}
    for model in load_catalog():
        line = lines[f"| `{Path(model.file).stem}.pop-sidecar.gguf`"]
        assert line.split(" | ")[-1].strip(" |") == model.license.split(" (")[0]
        assert line.startswith(model.name)
