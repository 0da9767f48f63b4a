"""The two kernels of DFlash's block attention on a CUDA device: FlexAttention against SDPA, output and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from skyrl_spec.drafts.block_attention import BlockAttention, flex_block_attention, sdpa_block_attention
from skyrl_spec.drafts.blocks import draw_blocks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch.cuda.is_available() is False"),
]
HEADS, GROUPS, HEAD_DIM, SEQ_LEN = 8, 2, 64, 300


def _run(attend: BlockAttention, inputs: list[Tensor], upstream: Tensor) -> list[Tensor]:
    query, key, value = (x.clone().requires_grad_() for x in inputs)
    out = attend(query, key, value, HEAD_DIM**-0.5)
    return [out, *torch.autograd.grad(out, (query, key, value), upstream)]


def check_kernels(device: str, dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    segments = torch.ones(2, SEQ_LEN, dtype=torch.long)
    segments[0, 120:] = 2
    segments[1, 280:] = 0
    loss_mask = (segments > 0) & (torch.arange(SEQ_LEN) % 50 > 10)
    blocks = draw_blocks(loss_mask.to(device), segments.to(device), 20, 7, generator)
    num_slots = blocks.anchor_BA.shape[1] * blocks.num_slots
    shapes = [(2, HEADS, num_slots, HEAD_DIM), *[(2, GROUPS, SEQ_LEN + num_slots, HEAD_DIM)] * 2]
    inputs = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    upstream = torch.randn(shapes[0], generator=generator).to(device, dtype)
    masked = _run(sdpa_block_attention(blocks, segments.to(device)), inputs, upstream)
    flex = _run(flex_block_attention(blocks, segments.to(device)), inputs, upstream)
    for name, a, b in zip(("out", "query", "key", "value"), masked, flex, strict=True):
        assert torch.isfinite(a).all()
        error = (a.double() - b.double()).norm() / a.double().norm()
        assert error < tolerance, name


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 1e-2)])
def test_flex_attention_equals_sdpa(dtype: torch.dtype, tolerance: float) -> None:
    check_kernels("cuda", dtype, tolerance)
