"""A stand-in for a GPU's waits on a CPU: which reads of the host would wait for the device.

A tensor counts as the device's if it was uploaded, is made with ``device=``, or comes from a tensor that does. It is
known by its storage, so also in the backward pass. Reads of such a tensor by the host are recorded, with their place.
What is not Python (kernels, the autograd engine) is not seen. The GPU pack counts the real waits.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from skyrl_spec.models import megatron_patches

# The host needs the values, or their number.
_READS = {
    "item", "tolist", "numpy", "cpu", "nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "equal",
    "allclose", "is_nonzero", "bincount", "__bool__", "__int__", "__float__", "__index__", "__contains__",
}  # fmt: skip
_FACTORIES = {"tensor", "as_tensor", "zeros", "ones", "empty", "full", "arange", "eye"}


class HostWaits(TorchFunctionMode):
    """Counts waits by place, ``file.py:line``, while it is entered."""

    def __init__(self, device_tensors: Iterable[Tensor]):
        super().__init__()
        self.places: Counter[str] = Counter()
        # By address. They are kept, so that no address is used again.
        self._storages: dict[int, torch.UntypedStorage] = {}
        self.mark(device_tensors)

    def mark(self, tensors: Iterable[Tensor]) -> None:
        """Takes these tensors for the device's."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._storages[storage._cdata] = storage

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        device_tensors = [tensor for tensor in _tensors((args, kwargs)) if self._is_marked(tensor)]
        if self._waits(name, args, kwargs, bool(device_tensors)):
            self.places[_place()] += 1
        result = func(*args, **kwargs)
        is_device = bool(device_tensors) or (name in _FACTORIES and kwargs.get("device") is not None)
        if is_device and name != "cpu":
            self.mark(_tensors(result))
        return result

    def _waits(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], has_device_tensor: bool) -> bool:
        if name in ("tensor", "as_tensor"):
            return kwargs.get("device") is not None
        if name == "copy_":
            return self._is_marked(args[1]) != self._is_marked(args[0]) and not kwargs.get("non_blocking", False)
        if not has_device_tensor:
            return False
        if name == "__setitem__" and not (isinstance(args[2], Tensor) and args[2].numel() > 1):
            # PyTorch fills by a mask without counting its positions.
            return False
        if name in ("__getitem__", "__setitem__"):
            return any(index.dtype == torch.bool for index in _tensors(args[1]))
        if name == "repeat_interleave":
            # With one argument, that is the numbers.
            repeats = [*args[1:], kwargs.get("repeats")] if len(args) > 1 or "repeats" in kwargs else args
            return bool(_tensors(repeats)) and kwargs.get("output_size") is None
        if name == "where":
            return len(args) == 1
        return name in _READS

    def _is_marked(self, tensor: Any) -> bool:
        return isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata in self._storages


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _place() -> str:
    # Modes call each other.
    modes = (__file__, torch.overrides.__file__, megatron_patches.__file__)
    frames = [frame for frame in traceback.extract_stack() if frame.filename not in modes]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}"
