"""A training run whose engine loses the draft in chosen syncs: ``python forgetful_run.py FILE SETTING=VALUE...``

``FILE`` holds a JSON list of draft versions. An engine leaves the draft out of the sync to each of them, once.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import ray

from skyrl_spec.controller import placement
from skyrl_spec.controller.run import run_training
from skyrl_spec.rollout.actor import EngineActor
from skyrl_spec.settings.compose import load_config
from skyrl_spec.sync.weights import Update
from skyrl_spec.types import Versions

# The engines inherit this variable. The file outlives a restart, the engines do not.
_FILE = "SKYRL_SPEC_TEST_LOST_VERSIONS"


class _ForgetfulEngine(EngineActor):
    def load_weights(self, updates: list[Update], versions: Versions, keeps_keys: bool = False) -> None:
        path = Path(os.environ[_FILE])
        lost = json.loads(path.read_text())
        if versions.draft in lost:
            lost.remove(versions.draft)
            path.write_text(json.dumps(lost))
            updates = [(component, chunks) for component, chunks in updates if component != "draft"]
        super().load_weights(updates, versions, keeps_keys)


if __name__ == "__main__":
    os.environ[_FILE] = sys.argv[1]
    placement.RolloutActor = ray.remote(_ForgetfulEngine)
    sys.exit(run_training(load_config(sys.argv[2:])))
