"""One sync: policy, then draft, one version number, caches reset. The only place that knows the order.

    export policy -> start_weight_update -> update_weights (chunks) -> finish
    export draft  -> start_draft_weight_update -> update_weights (chunks) -> finish
    reset the prefix cache (it holds keys of the old policy and draft) -> set versions

Engines are idle meanwhile. An engine takes the new version only when both have arrived, so a rollout's version says
what it was sampled with.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ray

from skyrl_spec.types import Versions, Which


class WeightSync:
    """Carries the workers' weights to the engines, over Ray's object store or vLLM's GPU transfers.

    ``whiches``: what is trained, in the order it is sent; what is frozen stays at version 0.
    """

    def __init__(self, workers: list[Any], engines: list[Any], *, backend: str, whiches: list[Which]):
        self._workers, self._engines, self._backend = workers, engines, backend
        self.whiches = whiches
        self.versions = Versions()
        if backend == "ray":
            ray.get([engine.init_weight_transfer_engine.remote({}) for engine in engines])
        else:
            address = ray.get(workers[0].address.remote())
            ray.get([worker.connect.remote(backend, engines, self.whiches, address) for worker in workers])

    def sync(self) -> int:
        """Bring every engine to the workers' weights under the next version; returns the bytes of one copy."""
        version = 1 + max(self.versions.policy, self.versions.draft)
        return self.restore(replace(self.versions, **dict.fromkeys(self.whiches, version)))

    def restore(self, versions: Versions) -> int:
        """The same under given versions: the workers' weights are those of a checkpoint."""
        num_bytes = sum(self._send(which) for which in self.whiches)
        self.versions = versions
        self._all("reset_prefix_cache")
        self._all("set_versions", self.versions)
        return num_bytes

    def _send(self, which: Which) -> int:
        if self._backend != "ray":
            return ray.get([worker.send.remote(which) for worker in self._workers])[0]
        chunks = ray.get([worker.export.remote(which) for worker in self._workers])[0]
        self._all("start_weight_update", which == "draft")
        for chunk, _ in chunks:
            # The reference is resolved in the engine's process: on one host the arrays are mapped, not copied.
            self._all("update_weights", chunk)
        self._all("finish_weight_update")
        return sum(num_bytes for _, num_bytes in chunks)

    def _all(self, method: str, *args: Any) -> None:
        ray.get([getattr(engine, method).remote(*args) for engine in self._engines])
