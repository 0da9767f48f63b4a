"""Every fault is seen, and a run without one is not complained of."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from faults import EXPERIMENTS, FAULTS, Fault, Rig, rig


@pytest.fixture(scope="module", params=EXPERIMENTS)
def running(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None
) -> Iterator[Rig]:
    with rig(request.param, tmp_path_factory.mktemp("faults")) as actors:
        yield actors


def test_every_fault_is_seen_and_nothing_else(running: Rig) -> None:
    draft = "mtp" if running.task.config.trainer.mtp.enabled else "dflash"
    for fault in FAULTS:
        if fault.draft == draft:
            _check(running, fault)


def _check(running: Rig, fault: Fault) -> None:
    sighting = running.run(fault)
    where = f"{fault.name}: {sighting.lines}"
    if fault.name == "none":
        assert sighting.seen == {}, where
    else:
        assert sighting.seen, where
