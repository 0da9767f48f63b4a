"""Order of the training prompts, which a checkpoint can save and restore."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from skyrl_spec.errors import ConfigError
from skyrl_spec.types import Prompt


class PromptStream:
    """Endless batches of prompts. The order in an epoch depends on ``(seed, epoch)`` only, so that resuming is exact.

    An epoch has ``steps_per_epoch`` batches of ``batch_size`` prompts. Prompts left over at its end are dropped.

    Args:
        source: names of the files, for messages.

    Raises:
        ConfigError: there are fewer prompts than ``batch_size``.
    """

    def __init__(
        self, prompts: Sequence[Prompt], batch_size: int, *, seed: int, shuffle: bool, source: str = ""
    ) -> None:
        if not 1 <= batch_size <= len(prompts):
            raise ConfigError(
                f"trainer.train_batch_size={batch_size}: must be from 1 to {len(prompts)}, the number of prompts in "
                "data.train_data; change it or add data"
            )
        self._prompts = prompts
        self._batch_size = batch_size
        self._seed = seed
        self._shuffle = shuffle
        self._source = source
        # Batches that were taken, before a resumption too.
        self.num_taken = 0
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

    def num_batches(self, epochs: int) -> int:
        """Batches that were taken, and those until ``epochs`` epochs are complete."""
        if self._epoch >= epochs:
            return self.num_taken
        of_this_epoch = (len(self._prompts) - self._position) // self._batch_size
        return self.num_taken + of_this_epoch + (epochs - self._epoch - 1) * self.steps_per_epoch

    def next_batch(self) -> list[Prompt]:
        """The next ``batch_size`` prompts, all from one epoch."""
        self.num_taken += 1
        end = self._position + self._batch_size
        batch = [self._prompts[index] for index in self._order[self._position : end]]
        if end + self._batch_size > len(self._prompts):
            self._go_to(self._epoch + 1, position=0)
        else:
            self._position = end
        return batch

    def state_dict(self) -> dict[str, Any]:
        where = {"epoch": self._epoch, "position": self._position, "num_taken": self.num_taken}
        return {**where, "source": self._source, **self._identity()}

    def has_data_of(self, state: dict[str, Any]) -> bool:
        """Whether ``state`` was saved with these prompts. Only their number is known of one from an earlier version."""
        names = ("fingerprint",) if "fingerprint" in state else ("num_prompts",)
        return all(self._identity()[name] == state[name] for name in names)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues after the last batch before ``state`` was saved. The batch size may differ.

        Raises:
            ConfigError: the prompts, the seed or ``shuffle`` differ, so that the order would be another.
        """
        if not self.has_data_of(state):
            raise ConfigError(
                f"data.train_data={self._source}: its {len(self._prompts)} prompts are not those of the checkpoint "
                f"({state['num_prompts']} of {state.get('source', 'other files')}); set it back, or begin with the new "
                "data by trainer.resume_with_new_data=true"
            )
        for name, setting in (("seed", "trainer.seed"), ("shuffle", "data.shuffle")):
            value = self._identity()[name]
            if state[name] != value:
                raise ConfigError(
                    f"{setting}: {name} is {value}, but must be {state[name]} as in the checkpoint, because the "
                    "order of the prompts depends on it; set it back or start a new run"
                )
        # A checkpoint of an earlier version does not have the number.
        self.num_taken = state.get("num_taken", 0)
        self._go_to(state["epoch"], state["position"])
        if self._position + self._batch_size > len(self._prompts):
            self._go_to(self._epoch + 1, position=0)

    def _identity(self) -> dict[str, Any]:
        return {
            "num_prompts": len(self._prompts),
            "fingerprint": self._fingerprint,
            "seed": self._seed,
            "shuffle": self._shuffle,
        }

    @cached_property
    def _fingerprint(self) -> str:
        """Changes with any token of a prompt, with what its environment reads, and with the order."""
        digest = hashlib.sha256()
        for prompt in self._prompts:
            content = [list(prompt.token_ids), prompt.env_class, prompt.extras]
            digest.update(json.dumps(content, sort_keys=True, default=str).encode() + b"\n")
        return digest.hexdigest()

    def _go_to(self, epoch: int, position: int) -> None:
        self._epoch = epoch
        self._position = position
        self._order = self._order_of(epoch)

    def _order_of(self, epoch: int) -> np.ndarray:
        num_prompts = len(self._prompts)
        if not self._shuffle:
            return np.arange(num_prompts)
        return np.random.default_rng((self._seed, epoch)).permutation(num_prompts)
