"""Order of the training prompts, which a checkpoint can save and restore."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from skyrl_spec.errors import ConfigError
from skyrl_spec.types import Prompt


class PromptStream:
    """Endless batches of prompts. The order in an epoch depends on ``(seed, epoch)`` only, so that resuming is exact.

    An epoch has ``steps_per_epoch`` batches of ``batch_size`` prompts. Prompts left over at its end are dropped.

    Raises:
        ConfigError: there are fewer prompts than ``batch_size``.
    """

    def __init__(self, prompts: Sequence[Prompt], batch_size: int, *, seed: int, shuffle: bool) -> None:
        if not 1 <= batch_size <= len(prompts):
            raise ConfigError(
                f"trainer.train_batch_size={batch_size}: must be from 1 to {len(prompts)}, the number of prompts in "
                "data.train_data; change it or add data"
            )
        self._prompts = prompts
        self._batch_size = batch_size
        self._seed = seed
        self._shuffle = shuffle
        self._epoch = self._position = 0
        self._order = self._order_of(epoch=0)

    @property
    def prompts(self) -> Sequence[Prompt]:
        """All prompts in the order of the dataset."""
        return self._prompts

    @property
    def epoch(self) -> int:
        """Number of completed epochs, which is also the epoch, from 0, of the next batch."""
        return self._epoch

    @property
    def steps_per_epoch(self) -> int:
        return len(self._prompts) // self._batch_size

    def next_batch(self) -> list[Prompt]:
        """The next ``batch_size`` prompts, all from one epoch."""
        end = self._position + self._batch_size
        batch = [self._prompts[index] for index in self._order[self._position : end]]
        if end + self._batch_size > len(self._prompts):
            self._go_to(self._epoch + 1, position=0)
        else:
            self._position = end
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "position": self._position, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues after the last batch before ``state`` was saved. The batch size may differ.

        Raises:
            ConfigError: the number of prompts, the seed or ``shuffle`` differs, so that the order would be another.
        """
        settings = {"num_prompts": "data.train_data", "seed": "trainer.seed", "shuffle": "data.shuffle"}
        for name, value in self._identity().items():
            if state[name] != value:
                raise ConfigError(
                    f"{settings[name]}: {name} is {value}, but must be {state[name]} as in the checkpoint, because the "
                    "order of the prompts depends on it; set it back or start a new run"
                )
        self._go_to(state["epoch"], state["position"])
        if self._position + self._batch_size > len(self._prompts):
            self._go_to(self._epoch + 1, position=0)

    def _identity(self) -> dict[str, Any]:
        return {"num_prompts": len(self._prompts), "seed": self._seed, "shuffle": self._shuffle}

    def _go_to(self, epoch: int, position: int) -> None:
        self._epoch = epoch
        self._position = position
        self._order = self._order_of(epoch)

    def _order_of(self, epoch: int) -> np.ndarray:
        num_prompts = len(self._prompts)
        if not self._shuffle:
            return np.arange(num_prompts)
        return np.random.default_rng((self._seed, epoch)).permutation(num_prompts)
