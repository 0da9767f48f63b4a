"""Number types of weights. Imports no torch."""

from __future__ import annotations

from typing import NamedTuple


class Dtype(NamedTuple):
    """A number type. ``torch_name`` is its name in torch, vLLM and ``config.json``."""

    torch_name: str
    num_bytes: int


DTYPES = {"fp32": Dtype("float32", 4), "bf16": Dtype("bfloat16", 2)}
