"""Stand-ins for the parts of vLLM's ``nccl`` transfer that need a GPU: the communicator and CUDA streams.

The ranks meet in vLLM's process group on a TCP store, and tensors travel through that store. Handshake, ranks,
packing, messages and unpacking are vLLM's.
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
    """Replaces ``PyNcclCommunicator`` as far as a transfer uses it."""

    def __init__(self, group: StatelessProcessGroup, device: int):
        self._group = group
        # As with NCCL, no rank has a communicator before all have joined.
        group.barrier(timeout=60)

    def broadcast(self, tensor: Tensor, src: int, stream: Any = None) -> None:
        tensor.copy_(self._group.broadcast(tensor, src))


def replacements() -> Iterator[tuple[Any, str, Any]]:
    """Object, attribute and stand-in, to be set in every participating process."""
    stream = SimpleNamespace(synchronize=lambda: None)
    yield pynccl, "PyNcclCommunicator", StoreCommunicator
    yield packed_tensor, "_get_streams", lambda _device, num_buffers: (stream,) * num_buffers
    yield torch.cuda, "stream", lambda _: nullcontext()
    yield torch.accelerator, "current_device_index", lambda: 0
