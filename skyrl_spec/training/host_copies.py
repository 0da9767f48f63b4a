"""Tensors that go to host memory while the GPU serves others, and come back to where they were.

    tensors        storage on the device -> copy in page-locked host memory, storage emptied -> storage filled again

What moves are storages. Tensors, views of them and Megatron's buffers stay the objects that they are, so nothing else
has to know. On CPU the same is done with a second copy in host memory, in place of a device: that frees nothing, and
serves to test it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from skyrl_spec.errors import RunError


@dataclass(eq=False)
class _Copy:
    """A storage as bytes, and its copy in host memory."""

    storage: torch.UntypedStorage
    num_bytes: int
    host: Tensor
    is_current: bool = False

    def on_device(self) -> Tensor:
        """All bytes of the storage."""
        return torch.empty(0, dtype=torch.uint8, device=self.storage.device).set_(self.storage)


class HostCopies:
    """Tensors that are on the device or in host memory, all of them.

    Args:
        tensors: yields them. It is asked at every ``offload``: an optimizer makes its state in its first step.
        are_constant: their values never change, so they are copied once.
    """

    def __init__(self, tensors: Callable[[], Iterable[Tensor]], device: torch.device, *, are_constant: bool = False):
        self._tensors, self._are_constant = tensors, are_constant
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # By the address of the storage object. They live as long as this, so their page-locked memory is made once.
        self._copies: dict[int, _Copy] = {}
        self._away: dict[int, _Copy] = {}
        self._is_arriving = False

    def offload(self) -> None:
        """Copies the tensors to host memory, and frees their memory on the device. They must not be used meanwhile."""
        if self._away and not self._is_arriving:
            return
        self.require()
        copies = {key: self._copy_of(key, storage) for key, storage in _storages(self._tensors()).items()}
        with self._beside():
            for copy in copies.values():
                if not (self._are_constant and copy.is_current):
                    copy.host.copy_(copy.on_device(), non_blocking=True)
                    copy.is_current = True
        if self._stream is not None:
            self._stream.synchronize()
        for copy in copies.values():
            copy.storage.resize_(0)
        self._away = copies

    def reload(self) -> None:
        """Begins to bring the tensors back, beside what the device computes. ``require`` waits for it."""
        if not self._away or self._is_arriving:
            return
        for copy in self._away.values():
            copy.storage.resize_(copy.num_bytes)
        with self._beside():
            for copy in self._away.values():
                copy.on_device().copy_(copy.host, non_blocking=True)
        self._is_arriving = True

    def require(self) -> None:
        """Makes what is computed from now on wait until the tensors are back."""
        self.reload()
        if self._is_arriving and self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
        self._away, self._is_arriving = {}, False

    def current(self, tensor: Tensor) -> Tensor:
        """``tensor``, or its copy in host memory while it is there. The copy is overwritten by a later ``offload``."""
        copy = self._away.get(_key(tensor))
        if copy is None:
            return tensor
        return copy.host.view(tensor.dtype).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def _copy_of(self, key: int, storage: torch.UntypedStorage) -> _Copy:
        if key not in self._copies:
            self._copies[key] = _Copy(storage, storage.nbytes(), _page_locked(storage.nbytes(), storage.device))
        return self._copies[key]

    def _beside(self) -> AbstractContextManager[object]:
        """Context of copies on their own stream, after all that the device has been given so far."""
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self._stream)


def _storages(tensors: Iterable[Tensor]) -> dict[int, torch.UntypedStorage]:
    return {_key(tensor): tensor.untyped_storage() for tensor in tensors if tensor.numel()}


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _page_locked(num_bytes: int, device: torch.device) -> Tensor:
    """Host memory, page-locked for a GPU. PyTorch's own page-locked memory has sizes of powers of two only."""
    host = torch.empty(num_bytes, dtype=torch.uint8)
    if device.type == "cuda":
        # 0: for the device of this process.
        status = int(torch.cuda.cudart().cudaHostRegister(host.data_ptr(), num_bytes, 0))
        if status:
            raise RunError(
                f"offload: {num_bytes} bytes of host memory could not be page-locked (CUDA error {status}); free host "
                "memory, raise `ulimit -l`, or set offload_after_step, cpu_offload (trainer.policy, trainer.ref) to "
                "false"
            )
    return host
