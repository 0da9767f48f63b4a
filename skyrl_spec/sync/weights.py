"""One sync: policy, then draft, one version number, caches reset. The only place that knows the order.

    export policy -> start_weight_update -> update_weights (chunks) -> finish
    export draft  -> start_draft_weight_update -> update_weights (chunks) -> finish
    reset the prefix cache (it holds keys of the old policy and draft) -> set versions

Engines are idle meanwhile. An engine takes the new version only when both have arrived, so a rollout's version says
what it was sampled with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import ray

from skyrl_spec.types import Component, Versions

# What is sent, and its chunks in Ray's object store.
Update = tuple[Component, Sequence[ray.ObjectRef]]


class UpdatedEngine(Protocol):
    """What a sync asks of one engine."""

    def start_weight_update(self, draft: bool) -> None: ...
    def update_weights(self, update_info: dict[str, Any]) -> None: ...
    def finish_weight_update(self) -> None: ...
    def reset_prefix_cache(self) -> None: ...
    def set_versions(self, versions: Versions) -> None: ...


class UpdatedEngines(Protocol):
    """What a sync asks of all engines together."""

    handles: list[Any]
    timeout_s: float

    def all(self, method: str, *args: Any) -> list[Any]: ...
    def allow_replacement(self, bring_up: Callable[[Any], None]) -> None: ...


class SendingWorkers(Protocol):
    """What a sync asks of the policy workers."""

    def export(self, component: Component) -> list[tuple[ray.ObjectRef, int]]: ...
    def connect(self, backend: str, engines: list[Any], components: list[Component], timeout_s: float) -> None: ...
    def send(self, component: Component, timeout_s: float) -> int: ...


def load_updates(engine: UpdatedEngine, updates: Iterable[Update], versions: Versions) -> None:
    """An engine's side of a sync over the object store. On one host the arrays are mapped, not copied."""
    for component, chunks in updates:
        engine.start_weight_update(component == "draft")
        for chunk in chunks:
            engine.update_weights(ray.get(chunk))
        engine.finish_weight_update()
    engine.reset_prefix_cache()
    engine.set_versions(versions)


class WeightSync:
    """Carries the workers' weights to the engines, over Ray's object store or vLLM's GPU transfers.

    ``components``: what is trained, in the order it is sent; what is frozen stays at version 0.
    """

    def __init__(self, policy: SendingWorkers, engines: UpdatedEngines, *, backend: str, components: list[Component]):
        self._policy, self._engines, self._over_ray = policy, engines, backend == "ray"
        self.components = components
        self.versions = Versions()
        if self._over_ray:
            engines.all("init_weight_transfer_engine", {})
            engines.allow_replacement(self._catch_up)
        else:
            # Engines are ranks of one transfer group here, and cannot be replaced one by one.
            policy.connect(backend, engines.handles, self.components, engines.timeout_s)

    def sync(self) -> int:
        """Bring every engine to the workers' weights under the next version; returns the bytes of one copy."""
        version = 1 + max(self.versions.policy, self.versions.draft)
        return self.restore(replace(self.versions, **dict.fromkeys(self.components, version)))

    def restore(self, versions: Versions) -> int:
        """The same under given versions: the workers' weights are those of a checkpoint."""
        self.versions = versions
        if self._over_ray:
            updates, num_bytes = self._export()
            self._engines.all("load_weights", updates, versions)
            return num_bytes
        num_bytes = sum(self._policy.send(component, self._engines.timeout_s) for component in self.components)
        self._engines.all("reset_prefix_cache")
        self._engines.all("set_versions", versions)
        return num_bytes

    def _export(self) -> tuple[list[Update], int]:
        """What there is to load, and the bytes of it."""
        exported = [(component, self._policy.export(component)) for component in self.components]
        updates: list[Update] = [(component, [chunk for chunk, _ in chunks]) for component, chunks in exported]
        return updates, sum(num_bytes for _, chunks in exported for _, num_bytes in chunks)

    def _catch_up(self, engine: Any) -> None:
        """Bring an engine that has just been built from disk to where the others are."""
        timeout_s = self._engines.timeout_s
        ray.get(engine.init_weight_transfer_engine.remote({}), timeout=timeout_s)
        ray.get(engine.load_weights.remote(self._export()[0], self.versions), timeout=timeout_s)
