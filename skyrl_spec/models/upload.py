"""Copies plain dataclasses of tensors from the host to a GPU without a wait."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")

# Of a tensor's first byte in the common buffer: that of the widest dtype.
_ALIGNMENT = 8


def upload(item: Item, device: torch.device) -> Item:
    """``item`` with all tensors on ``device``: a dataclass of CPU tensors, dataclasses like it, and tuples of them.

    All tensors travel in one copy from pinned memory, which the host does not wait for.
    """
    return item if device.type == "cpu" else copied(item, device)


def copied(item: Item, device: torch.device) -> Item:
    """``upload`` on any device, also where there is nothing to do."""
    tensors = list(_tensors(item))
    sizes = [-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in tensors]
    buffer = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=device.type == "cuda")
    for part, tensor in zip(buffer.split(sizes), tensors, strict=True):
        _as(part, tensor).copy_(tensor)
    parts = buffer.to(device, non_blocking=True).split(sizes)
    return _with_tensors(item, map(_as, parts, tensors))


def _as(part: Tensor, tensor: Tensor) -> Tensor:
    """The bytes ``part`` seen as a tensor of the dtype and shape of ``tensor``."""
    return part[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)


def _tensors(item: Any) -> Iterator[Tensor]:
    if isinstance(item, Tensor):
        yield item
    elif is_dataclass(item):
        for field in fields(item):
            yield from _tensors(getattr(item, field.name))
    elif isinstance(item, tuple):
        for part in item:
            yield from _tensors(part)


def _with_tensors(item: Any, tensors: Iterator[Tensor]) -> Any:
    """``item`` with ``tensors`` in place of its own, in the order of ``_tensors``."""
    if isinstance(item, Tensor):
        return next(tensors)
    if is_dataclass(item) and not isinstance(item, type):
        return replace(
            item, **{field.name: _with_tensors(getattr(item, field.name), tensors) for field in fields(item)}
        )
    if isinstance(item, tuple):
        return tuple(_with_tensors(part, tensors) for part in item)
    return item
