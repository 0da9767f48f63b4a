"""A stand-in for the part of vLLM's ``ipc`` transfer that needs a GPU: device memory that two processes map.

Files take the place of GPU memory, and every process is told which "GPU" it is on. Packing, the all-gather of handles,
messages, unpacking and loading are vLLM's. Use it in a separate process, because it replaces functions of torch.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


def install(gpu: str, directory: Path) -> None:
    """Replaces GPU memory by files in ``directory``. ``gpu`` is this process's device UUID."""
    import torch.multiprocessing.reductions as reductions
    from vllm.distributed.weight_transfer import packed_tensor

    memory = _Memory(directory)
    packed_tensor.torch = memory
    packed_tensor.reduce_tensor = lambda tensor: (reductions.rebuild_cuda_tensor, memory.handle(tensor))
    reductions.rebuild_cuda_tensor = _rebuild
    torch.cuda.get_device_properties = lambda _: SimpleNamespace(uuid=gpu)
    torch.cuda.current_stream = lambda: SimpleNamespace(synchronize=lambda: None)
    # Separate functions, because torch.compile keeps a table by function.
    torch.cuda.synchronize = lambda: None
    torch.cuda.ipc_collect = lambda: None
    torch.accelerator.synchronize = lambda: None
    torch.accelerator.current_device_index = lambda: 0


class _Memory:
    """``torch``, except that CUDA memory is a mapped file."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._paths: dict[int, str] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, size: int, *, dtype: torch.dtype, device: str) -> Tensor:
        assert device == "cuda"
        with tempfile.NamedTemporaryFile(dir=self._directory, delete=False) as file:
            file.truncate(size)
        buffer = torch.from_file(file.name, shared=True, size=size, dtype=dtype)
        self._paths[buffer.data_ptr()] = file.name
        return buffer

    def handle(self, tensor: Tensor) -> tuple[Any, ...]:
        """torch's handle of a CUDA tensor, with the file's name in place of the memory handle."""
        return (
            type(tensor),
            tensor.size(),
            tensor.stride(),
            tensor.storage_offset(),
            torch.storage.TypedStorage,
            tensor.dtype,
            0,  # device
            self._paths[tensor.data_ptr()].encode(),
            tensor.nbytes,
            0,  # offset of the storage in the memory
            tensor.requires_grad,
            b"reference counter",
            0,
            b"event",
            True,
        )


def _rebuild(
    cls: type, size: Any, stride: Any, offset: int, _storage: type, dtype: torch.dtype, _device: int, *rest: Any
) -> Tensor:
    assert cls is Tensor
    name, num_bytes, *_ = rest
    mapped = torch.from_file(name.decode(), shared=True, size=num_bytes // dtype.itemsize, dtype=dtype)
    return mapped.as_strided(size, stride, offset)
