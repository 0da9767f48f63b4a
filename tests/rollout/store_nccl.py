"""Stand-ins for what takes a GPU in vLLM's ``nccl`` transfer: the communicator, and CUDA's streams.

The ranks meet in vLLM's own process group on a TCP store, and tensors travel through that store. Handshake, ranks,
packing, messages and unpacking stay vLLM's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.device_communicators import pynccl
from vllm.distributed.utils import StatelessProcessGroup
from vllm.distributed.weight_transfer import packed_tensor


class StoreCommunicator:
    """The part of ``PyNcclCommunicator`` that a transfer uses."""

    def __init__(self, group: StatelessProcessGroup, device: int):
        self._group = group
        # As with NCCL, nobody has a communicator before every rank is there.
        group.barrier(timeout=60)

    def broadcast(self, tensor: Tensor, src: int, stream: Any = None) -> None:
        tensor.copy_(self._group.broadcast(tensor, src))


def replacements() -> Iterator[tuple[Any, str, Any]]:
    """Object, attribute and stand-in, to be set in every process that takes part."""
    stream = SimpleNamespace(synchronize=lambda: None)
    yield pynccl, "PyNcclCommunicator", StoreCommunicator
    yield packed_tensor, "_get_streams", lambda _device, num_buffers: (stream,) * num_buffers
    yield torch.cuda, "stream", lambda _: nullcontext()
    yield torch.accelerator, "current_device_index", lambda: 0
