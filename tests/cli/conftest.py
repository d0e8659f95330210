"""What all tests of commands have."""

import pytest

from pop_local.workflows import examine


@pytest.fixture(autouse=True)
def own_projections_on_one_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """What they lose is measured wherever a command converts without a fit."""
    monkeypatch.setattr(examine, "N_OWN_WINDOWS", 1)
    monkeypatch.setattr(examine, "N_OWN_DRAWS", 1)
