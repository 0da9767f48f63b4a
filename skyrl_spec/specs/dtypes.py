"""The types of weights that the settings name. Imports no torch."""

from __future__ import annotations

from typing import NamedTuple


class Dtype(NamedTuple):
    """``torch_name`` is the name in torch, vLLM and ``config.json``."""

    torch_name: str
    num_bytes: int


DTYPES = {"fp32": Dtype("float32", 4), "bf16": Dtype("bfloat16", 2)}
