"""Every fault is seen by the checks that docs/fidelity.md names, and a run without one is not complained of."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from faults import FAULTS, Fault, Rig, rig, table

DOCUMENTED = Path(__file__).resolve().parents[2] / "docs" / "fidelity.md"
CASES = [pytest.param(fault.draft, fault, id=f"{fault.draft}-{fault.name}") for fault in FAULTS]


@pytest.fixture(scope="module")
def running(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None
) -> Iterator[Rig]:
    """Actors of a run with the draft that the parameter names."""
    with rig(request.param, tmp_path_factory.mktemp("faults")) as actors:
        yield actors


def test_the_documented_table_is_that_of_the_faults() -> None:
    assert table([fault.expected() for fault in FAULTS]) in DOCUMENTED.read_text()


@pytest.mark.parametrize(("running", "fault"), CASES, indirect=["running"])
def test_a_fault_is_seen_by_its_checks_and_by_no_other(running: Rig, fault: Fault) -> None:
    sighting = running.run(fault)
    assert sighting.seen == fault.expected().seen, sighting.lines
