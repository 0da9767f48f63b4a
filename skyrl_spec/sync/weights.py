"""One sync: policy, then draft, one version number, caches reset. The only place that knows the order.

    export policy -> start_weight_update -> update_weights (chunks) -> finish
    export draft  -> start_draft_weight_update -> update_weights (chunks) -> finish
    reset the prefix cache (it holds keys of the old policy and draft) -> set versions

Engines are idle meanwhile. An engine takes the new version only when both have arrived, so a rollout's version says
what it was sampled with.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import ray

from skyrl_spec.types import Versions, Which

if TYPE_CHECKING:
    from skyrl_spec.trainer.actors import EngineGroup, PolicyGroup

# What is sent, and its chunks in Ray's object store.
Update = tuple[Which, Sequence[ray.ObjectRef]]


class Engine(Protocol):
    def start_weight_update(self, draft: bool) -> None: ...
    def update_weights(self, update_info: dict[str, Any]) -> None: ...
    def finish_weight_update(self) -> None: ...
    def reset_prefix_cache(self) -> None: ...
    def set_versions(self, versions: Versions) -> None: ...


def load_updates(engine: Engine, updates: Iterable[Update], versions: Versions) -> None:
    """An engine's side of a sync over the object store. On one host the arrays are mapped, not copied."""
    for which, chunks in updates:
        engine.start_weight_update(which == "draft")
        for chunk in chunks:
            engine.update_weights(ray.get(chunk))
        engine.finish_weight_update()
    engine.reset_prefix_cache()
    engine.set_versions(versions)


class WeightSync:
    """Carries the workers' weights to the engines, over Ray's object store or vLLM's GPU transfers.

    ``whiches``: what is trained, in the order it is sent; what is frozen stays at version 0.
    """

    def __init__(self, policy: PolicyGroup, engines: EngineGroup, *, backend: str, whiches: list[Which]):
        self._policy, self._engines, self._over_ray = policy, engines, backend == "ray"
        self.whiches = whiches
        self.versions = Versions()
        if self._over_ray:
            engines.all("init_weight_transfer_engine", {})
            engines.on_replaced = self._catch_up
        else:
            # Ranks of a transfer group cannot be replaced one by one.
            engines.is_replaceable = False
            policy.connect(backend, engines.handles, self.whiches, engines.timeout_s)

    def sync(self) -> int:
        """Bring every engine to the workers' weights under the next version; returns the bytes of one copy."""
        version = 1 + max(self.versions.policy, self.versions.draft)
        return self.restore(replace(self.versions, **dict.fromkeys(self.whiches, version)))

    def restore(self, versions: Versions) -> int:
        """The same under given versions: the workers' weights are those of a checkpoint."""
        self.versions = versions
        if self._over_ray:
            updates, num_bytes = self._export()
            self._engines.all("load_weights", updates, versions)
            return num_bytes
        num_bytes = sum(self._policy.send(which, self._engines.timeout_s) for which in self.whiches)
        self._engines.all("reset_prefix_cache")
        self._engines.all("set_versions", versions)
        return num_bytes

    def _export(self) -> tuple[list[Update], int]:
        """What there is to load, and the bytes of it."""
        exported = [(which, self._policy.export(which)) for which in self.whiches]
        updates: list[Update] = [(which, [chunk for chunk, _ in chunks]) for which, chunks in exported]
        return updates, sum(num_bytes for _, chunks in exported for _, num_bytes in chunks)

    def _catch_up(self, engine: Any) -> None:
        """Bring an engine that has just been built from disk to where the others are."""
        timeout_s = self._engines.timeout_s
        ray.get(engine.init_weight_transfer_engine.remote({}), timeout=timeout_s)
        ray.get(engine.load_weights.remote(self._export()[0], self.versions), timeout=timeout_s)
