"""Which senders share the one transfer group of an engine. vLLM's handshake, which needs GPUs, is stood in for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerWeightTransferEngine

from skyrl_spec.rollout.sender import ExportSource, build_senders

SOURCE = ExportSource([("w", torch.float32, (2, 2))], lambda: iter(()))


@pytest.mark.parametrize("components", [["policy", "draft"], ["policy"], ["draft"]])
@pytest.mark.parametrize("rank", [0, 1])
def test_whatever_is_trained_goes_through_one_group(
    components: list[str], rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A warm-up has a draft alone."""
    opened: list[Any] = []

    def trainer_init(info: Any, *, client: Any, source: Any) -> Any:
        sender = NCCLTrainerWeightTransferEngine(
            client=client, source=source, is_sender=info.is_sender, packed=info.packed
        )
        sender.model_update_group = object() if info.is_sender else None
        opened.append(info)
        return sender

    monkeypatch.setattr(NCCLTrainerWeightTransferEngine, "trainer_init", staticmethod(trainer_init))
    senders = build_senders(
        dict.fromkeys(components, SOURCE),
        [None, None],
        backend="nccl",
        rank=rank,
        tensor_parallel_size=2,
        master_address="127.0.0.1",
        master_port=1,
    )
    assert list(senders) == components
    (info,) = opened
    assert (info.world_size, info.rank) == (5, rank)
    assert len({id(sender.model_update_group) for sender in senders.values()}) == 1
