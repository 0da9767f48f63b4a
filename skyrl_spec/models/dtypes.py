"""torch's dtypes by the names of the settings."""

from __future__ import annotations

import torch

from skyrl_spec.specs import dtypes

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, dtype.torch_name) for name, dtype in dtypes.DTYPES.items()}
