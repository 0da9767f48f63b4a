"""The checks that docs/fidelity.md names see every fault, and see nothing in a run without one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faults import FAULTS, Fault, Rig, rig, table

DOCUMENTED = Path(__file__).resolve().parents[2] / "docs" / "fidelity.md"


def faults_of(draft: str) -> list[Any]:
    return [pytest.param(fault, id=fault.name) for fault in FAULTS if fault.draft == draft]


@pytest.fixture(scope="module")
def running(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None
) -> Iterator[Rig]:
    """Actors of a run with the draft that is the fixture's parameter."""
    with rig(request.param, tmp_path_factory.mktemp("faults")) as actors:
        yield actors


def test_the_documented_table_is_that_of_the_faults() -> None:
    assert table([fault.expected() for fault in FAULTS]) in DOCUMENTED.read_text()


# ``running`` is parametrized alone: together with ``fault``, pytest would start new actors for every fault.
@pytest.mark.parametrize("running", ["mtp"], indirect=True)
@pytest.mark.parametrize("fault", faults_of("mtp"))
def test_a_fault_with_an_mtp_head_is_seen_by_its_checks_and_by_no_other(running: Rig, fault: Fault) -> None:
    assert_seen(running, fault)


@pytest.mark.parametrize("running", ["dflash"], indirect=True)
@pytest.mark.parametrize("fault", faults_of("dflash"))
def test_a_fault_with_a_dflash_draft_is_seen_by_its_checks_and_by_no_other(running: Rig, fault: Fault) -> None:
    assert_seen(running, fault)


def assert_seen(running: Rig, fault: Fault) -> None:
    sighting = running.run(fault)
    assert sighting.seen == fault.expected().seen, sighting.lines
