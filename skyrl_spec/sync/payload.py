"""Weights as payloads for Ray's object store: names, dtypes, shapes, and arrays that share the tensors' memory."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

# dtype of a tensor -> dtype of its array. numpy has no bfloat16, so its bits travel as int16.
_WIRE_DTYPES = {torch.float32: torch.float32, torch.float16: torch.float16, torch.bfloat16: torch.int16}
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _WIRE_DTYPES}


def pack_weights(named_tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Any]:
    """Payload for ``update_weights`` of vLLM's weight transfer: ``{"names", "dtype_names", "shapes", "arrays"}``.

    CPU tensors are not copied: put the payload into the object store before the weights change again.

    Raises:
        ValueError: a dtype that cannot be sent.
    """
    payload: dict[str, list[Any]] = {"names": [], "dtype_names": [], "shapes": [], "arrays": []}
    for name, tensor in named_tensors:
        if tensor.dtype not in _WIRE_DTYPES:
            raise ValueError(f"{name}: cannot send {tensor.dtype}; weights travel as one of {sorted(_DTYPES)}")
        payload["names"].append(name)
        payload["dtype_names"].append(str(tensor.dtype).removeprefix("torch."))
        payload["shapes"].append(list(tensor.shape))
        bits = tensor.detach().cpu().contiguous().view(_WIRE_DTYPES[tensor.dtype])
        # Not ``numpy()``, which forbids for ever that the memory is freed (``training.host_copies``).
        payload["arrays"].append(np.from_dlpack(bits))
    return payload


def pack_chunks(named_tensors: Iterable[tuple[str, Tensor]], max_bytes: int = 512 * 2**20) -> Iterator[dict[str, Any]]:
    """Payloads of at most ``max_bytes`` each. A larger tensor gets its own."""
    chunk: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in named_tensors:
        if chunk and size + tensor.nbytes > max_bytes:
            yield pack_weights(chunk)
            chunk, size = [], 0
        chunk.append((name, tensor))
        size += tensor.nbytes
    if chunk:
        yield pack_weights(chunk)


def unpack_weights(
    names: list[str], dtype_names: list[str], shapes: list[list[int]], arrays: list[np.ndarray]
) -> list[tuple[str, Tensor]]:
    """Named tensors of a payload. They share the arrays' memory, which may be read-only: do not write to them.

    Raises:
        ValueError: lists of different length, an unknown dtype, or an array without the announced shape.
    """
    if not len(names) == len(dtype_names) == len(shapes) == len(arrays):
        raise ValueError(
            f"names, dtype_names, shapes and arrays must have one length,"
            f" got {len(names)}, {len(dtype_names)}, {len(shapes)}, {len(arrays)}"
        )
    named_tensors = []
    for name, dtype_name, shape, array in zip(names, dtype_names, shapes, arrays, strict=True):
        if dtype_name not in _DTYPES:
            raise ValueError(f"{name}: unknown dtype {dtype_name!r}; weights travel as one of {sorted(_DTYPES)}")
        if array.shape != tuple(shape):
            raise ValueError(f"{name}: announced with shape {list(shape)}, but its array has {list(array.shape)}")
        named_tensors.append((name, _as_tensor(array).view(_DTYPES[dtype_name])))
    return named_tensors


def payload_bytes(payload: dict[str, Any]) -> int:
    """Number of bytes of the weights in a payload."""
    return sum(array.nbytes for array in payload["arrays"])


def _as_tensor(array: np.ndarray) -> Tensor:
    # torch warns about the read-only arrays of the object store. Nothing writes to these tensors.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)
