"""Weight sync: policy, then draft, then caches, under one version number. No other module knows this order.

    export policy -> start_weight_update -> update_weights (chunks) -> finish
    export draft  -> start_draft_weight_update -> update_weights (chunks) -> finish
    reset the prefix cache (it holds keys of the old policy and draft) -> set versions

Engines are idle during a sync. An engine takes the new version only when all weights have arrived, so the version of
a rollout tells with which weights it was sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import ray

from skyrl_spec.types import Component, Versions

# A component, and its chunks in Ray's object store.
Update = tuple[Component, Sequence[ray.ObjectRef]]


class UpdatedEngine(Protocol):
    """Methods of one engine that a sync needs."""

    def start_weight_update(self, draft: bool) -> None: ...
    def update_weights(self, update_info: dict[str, Any]) -> None: ...
    def finish_weight_update(self) -> None: ...
    def reset_prefix_cache(self) -> None: ...
    def keys_are_old(self) -> None: ...
    def set_versions(self, versions: Versions) -> None: ...


class UpdatedEngines(Protocol):
    """Methods of the group of engines that a sync needs."""

    handles: list[Any]
    timeout_s: float

    def all(self, method: str, *args: Any) -> list[Any]: ...
    def allow_replacement(self, bring_up: Callable[[Any], None]) -> None: ...


class SendingWorkers(Protocol):
    """Methods of the policy workers that a sync needs."""

    def export(self, component: Component) -> list[tuple[ray.ObjectRef, int]]: ...
    def connect(self, backend: str, engines: list[Any], components: list[Component], timeout_s: float) -> None: ...
    def send(self, component: Component, timeout_s: float) -> int: ...


def load_updates(
    engine: UpdatedEngine, updates: Iterable[Update], versions: Versions, *, keeps_keys: bool = False
) -> None:
    """Engine's side of a sync over the object store. On one host the arrays are mapped, not copied."""
    for component, chunks in updates:
        engine.start_weight_update(component == "draft")
        for chunk in chunks:
            engine.update_weights(ray.get(chunk))
        engine.finish_weight_update()
    if keeps_keys:
        engine.keys_are_old()
    else:
        engine.reset_prefix_cache()
    engine.set_versions(versions)


class WeightSync:
    """Brings the workers' weights to the engines, over Ray's object store or vLLM's GPU transfers.

    Args:
        components: the trained components, in the order of a sync. Frozen ones stay at version 0.
        keeps_updates: keep the last sync's weights in the object store, for an engine that is replaced while the
            workers train, when their weights are those of no version.
    """

    def __init__(
        self,
        policy: SendingWorkers,
        engines: UpdatedEngines,
        *,
        backend: str,
        components: list[Component],
        keeps_updates: bool = False,
    ):
        self._policy, self._engines, self._over_ray = policy, engines, backend == "ray"
        self.components = components
        self.versions = Versions()
        # Bytes of one copy of each component in the last sync.
        self.num_bytes: dict[Component, int] = {}
        self._are_gone = False
        self._keeps_updates = keeps_updates
        self._kept: dict[Component, Sequence[ray.ObjectRef]] = {}
        if self._over_ray:
            engines.all("init_weight_transfer_engine", {})
            engines.allow_replacement(self._catch_up)
        else:
            # The engines are ranks of one transfer group, so a single one cannot be replaced.
            policy.connect(backend, engines.handles, self.components, engines.timeout_s)

    def sync(self, *, draft: bool = True, keeps_keys: bool = False) -> int:
        """Brings every engine to the workers' weights, under the next version. Returns the bytes of one copy.

        ``draft=False``: the draft has not changed since the last sync, and is not sent. ``keeps_keys``: requests that
        are paused keep the keys that they have.
        """
        changed, versions = self._next(draft)
        return self._send(self.components if self._are_gone else changed, versions, keeps_keys=keeps_keys)

    def weights_are_gone(self) -> None:
        """Notes that the engines have lost all weights: the next sync sends also what has not changed."""
        self._are_gone = True

    def skip(self, *, draft: bool = True) -> None:
        """Counts a sync that is left out, because the run is told to stop and its engines are busy."""
        _, self.versions = self._next(draft)

    def _next(self, draft: bool) -> tuple[list[Component], Versions]:
        """Components of the next sync, and the versions after it."""
        version = 1 + max(self.versions.policy, self.versions.draft)
        changed = [component for component in self.components if draft or component != "draft"]
        return changed, replace(self.versions, **dict.fromkeys(changed, version))

    def restore(self, versions: Versions) -> int:
        """Brings every engine to the workers' weights, under the versions of a checkpoint. Returns the bytes."""
        return self._send(self.components, versions)

    def _send(self, components: list[Component], versions: Versions, *, keeps_keys: bool = False) -> int:
        self.versions = versions
        if self._over_ray:
            updates, self.num_bytes = self._export(components)
            if self._keeps_updates:
                self._kept |= dict(updates)
            self._engines.all("load_weights", updates, versions, keeps_keys)
        else:
            self.num_bytes = {
                component: self._policy.send(component, self._engines.timeout_s) for component in components
            }
            self._engines.all("keys_are_old" if keeps_keys else "reset_prefix_cache")
            self._engines.all("set_versions", versions)
        self._are_gone = False
        return sum(self.num_bytes.values())

    def _export(self, components: list[Component]) -> tuple[list[Update], dict[Component, int]]:
        """Updates for the engines, and the size of each component in bytes."""
        exported = {component: self._policy.export(component) for component in components}
        updates: list[Update] = [(component, [chunk for chunk, _ in chunks]) for component, chunks in exported.items()]
        sizes = {component: sum(num_bytes for _, num_bytes in chunks) for component, chunks in exported.items()}
        return updates, sizes

    def _catch_up(self, engine: Any) -> None:
        """Brings a replacement engine, just built from disk, to the weights and versions of the others."""
        timeout_s = self._engines.timeout_s
        ray.get(engine.init_weight_transfer_engine.remote({}), timeout=timeout_s)
        updates = list(self._kept.items()) if self._keeps_updates else self._export(self.components)[0]
        ray.get(engine.load_weights.remote(updates, self.versions), timeout=timeout_s)
