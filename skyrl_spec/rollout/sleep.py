"""What an engine lacks while it sleeps. vLLM itself would go on with whatever is left in that memory, and say nothing.

    awake -> sleep(level) -> nothing -> wake_weights() -> weights -> [sync] -> wake_keys() -> awake

At level 1 the weights of policy and draft wait in host memory. At level 2 they are gone, and a sync must bring each of
them before the engine samples. A draft that was forgotten would change no response: its acceptance alone would fall to
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from skyrl_spec.types import Component


class Sleep:
    """Refuses with ``RuntimeError`` what an engine cannot do now.

    Args:
        synced: what syncs bring. An engine with other weights must not sleep at level 2.
    """

    def __init__(self, synced: Sequence[Component]):
        self._synced = synced
        self._has_weights = self._has_keys = True
        # Weights of before the sleep that no sync has brought back.
        self._lacking: set[Component] = set()

    def falls_asleep(self, level: int) -> None:
        if level not in (1, 2):
            raise ValueError(f"no such level of sleep: {level}")
        if not (self._has_weights and self._has_keys):
            raise RuntimeError("the engine is told to sleep, but it sleeps already")
        self.require_awake()
        self._has_weights = self._has_keys = False
        if level == 2:
            self._lacking = set(self._synced)

    def wakes_weights(self) -> None:
        if self._has_weights:
            raise RuntimeError("the engine's weights are told to wake, but they are awake")
        self._has_weights = True

    def wakes_keys(self) -> None:
        if self._has_keys:
            raise RuntimeError("the engine's keys are told to wake, but they are awake")
        if not self._has_weights:
            raise RuntimeError("the engine's keys are told to wake before its weights")
        self._require_complete()
        self._has_keys = True

    def require_weights(self) -> None:
        """For a weight update."""
        if not self._has_weights:
            raise RuntimeError("weights are sent to an engine that sleeps: wake its weights first")

    def arrived(self, component: Component) -> None:
        """Notes that a sync has brought all weights of ``component``."""
        self._lacking.discard(component)

    def require_awake(self) -> None:
        """For sampling."""
        if not (self._has_weights and self._has_keys):
            raise RuntimeError("the engine sleeps: wake its weights and keys first")
        self._require_complete()

    def _require_complete(self) -> None:
        if self._lacking:
            raise RuntimeError(
                f"the engine slept at level 2, which drops weights, and no sync has brought its "
                f"{' and '.join(sorted(self._lacking))}"
            )
