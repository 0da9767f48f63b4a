"""Which experts each token went to in an engine, for a trainer that lets them go the same way (``router_replay``).

The router of every layer of experts hands over its choice. It is kept by the slot that the token's keys have in the
cache: tokens of a cached prefix are there already, drafted tokens that were rejected are overwritten, and a request
that begins anew writes anew. When a request ends, the rows of its slots go with its output.

Shapes: L layers, k experts of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch


class ExpertRecorder:
    """Base class that vLLM adds to its worker. ``collective_rpc`` calls the methods by name."""

    model_runner: Any

    def record_experts(self) -> str:
        """Begins to keep choices of experts. Returns the name of an attention layer whose slots count."""
        from vllm.model_executor.layers.fused_moe.runner.moe_runner_interface import MoERunnerInterface

        modules = self.model_runner.get_model().modules()
        layers: list[Any] = [module for module in modules if isinstance(module, MoERunnerInterface)]
        attention = layers[0].layer_name.replace(".mlp.experts", ".self_attn.attn")
        cache = self.model_runner.kv_cache_config
        group = cache.kv_cache_groups[group_of(cache, attention)]
        experts = self.model_runner.model_config
        num_experts, per_token = experts.get_num_experts(), experts.get_num_experts_per_tok()
        # A row more, for the slot -1 of tokens that fill up a batch.
        shape = (cache.num_blocks * group.kv_cache_spec.block_size + 1, len(layers), per_token)
        dtype = torch.uint8 if num_experts <= 256 else torch.int16
        self._chosen = torch.zeros(shape, dtype=dtype, device=self.model_runner.device)
        for number, layer in enumerate(layers):
            layer.router.set_capture_fn(partial(self._keep, attention, number))
        return attention

    def take_experts(self, slots: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Choices for the tokens in these slots of the cache, ``[tokens, L, k]`` for each request."""
        rows = torch.from_numpy(np.concatenate(slots)).to(self._chosen.device)
        lengths = np.cumsum([len(one) for one in slots])[:-1]
        return np.split(self._chosen[rows].cpu().numpy(), lengths)

    def _keep(self, attention: str, layer: int, chosen_Tk: torch.Tensor) -> None:
        from vllm.forward_context import get_forward_context

        slots_by_layer: Any = get_forward_context().slot_mapping
        # vLLM's trial runs have no cache.
        if slots_by_layer:
            slots_T = slots_by_layer[attention][: len(chosen_Tk)]
            self._chosen[slots_T, layer] = chosen_Tk.to(self._chosen.dtype)


def group_of(kv_cache_config: Any, layer: str) -> int:
    """Number of vLLM's group of layers, with slots of their own, that has this layer."""
    groups = kv_cache_config.kv_cache_groups
    return next(number for number, group in enumerate(groups) if layer in group.layer_names)


def return_experts(core: Any) -> None:
    """Makes vLLM's engine core add the experts of a request's tokens to its last output.

    The last token has none: it was sampled, but not computed. vLLM's own option for this needs its second model runner,
    which needs Triton.
    """
    scheduler, (attention, *_) = core.scheduler, core.model_executor.collective_rpc("record_experts")
    group = group_of(scheduler.kv_cache_config, attention)
    block_size = scheduler.kv_cache_config.kv_cache_groups[group].kv_cache_spec.block_size
    free, update, ended = scheduler._free_request, scheduler.update_from_output, dict[str, np.ndarray]()

    def note_and_free(request: Any, *args: Any, **kwargs: Any) -> Any:
        blocks = np.asarray(scheduler.kv_cache_manager.get_block_ids(request.request_id)[group], np.int64)
        slots = (blocks[:, None] * block_size + np.arange(block_size)).reshape(-1)
        ended[request.request_id] = slots[: request.num_tokens - 1]
        return free(request, *args, **kwargs)

    def update_and_add(scheduler_output: Any, model_runner_output: Any) -> dict[int, Any]:
        ended.clear()
        outputs: dict[int, Any] = update(scheduler_output, model_runner_output)
        if ended:
            # Before the next step, in which others may get the slots.
            found = core.model_executor.collective_rpc("take_experts", args=(list(ended.values()),))[0]
            chosen = dict(zip(ended, found, strict=True))
            for output in (output for of_client in outputs.values() for output in of_client.outputs):
                output.routed_experts = chosen.get(output.request_id)
        return outputs

    scheduler._free_request, scheduler.update_from_output = note_and_free, update_and_add
