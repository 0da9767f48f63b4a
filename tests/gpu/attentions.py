"""Checks of the attentions in bf16, with gradients, against plain ones in float64 written here."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_check import Check, Figure, relative_error
from torch import Tensor

from skyrl_spec.drafts.block_attention import Keys, flex_block_attention
from skyrl_spec.drafts.blocks import draw_anchors, supervised_blocks, visible
from skyrl_spec.drafts.chain_attention import chain_attention
from skyrl_spec.models.flash import Documents
from skyrl_spec.models.pack import Pack, pack_documents
from skyrl_spec.models.upload import upload

# Scores, probabilities and output are rounded to 2^-9 of themselves, one after the other.
LIMIT = 1e-2
FLOAT32_LIMIT = 1e-5
NUM_DEPTHS = 3
# Query heads, key heads and head size of Qwen3-8B and MiMo-7B.
HEADS, GROUPS, HEAD_DIM = 32, 8, 128
SCALE = HEAD_DIM**-0.5
# Of the documents of a pack.
LENGTHS = (430, 1, 700, 261, 150)

Attend = Callable[..., Tensor]


def masked_attention(query_QHd: Tensor, key_NGd: Tensor, value_NGd: Tensor, seen_QN: Tensor) -> Tensor:
    """The definition."""
    repeats = query_QHd.shape[1] // key_NGd.shape[1]
    key, value = (x.repeat_interleave(repeats, dim=1) for x in (key_NGd, value_NGd))
    scores = torch.einsum("qhd,nhd->hqn", query_QHd, key) * SCALE
    return torch.einsum("hqn,nhd->qhd", scores.masked_fill(~seen_QN, -torch.inf).softmax(-1), value)


def compare(
    attend: Attend,
    reference: Attend,
    inputs: list[Tensor],
    *,
    has_backward: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    **details: object,
) -> Figure:
    """The largest relative error of output and gradients; ``reference`` gets the inputs of ``attend`` in float64."""
    rounded = [x.to(dtype) for x in inputs]
    got = _with_gradients(attend, rounded) if has_backward else [attend(*rounded)]
    # Without a backward pass, only the first is compared.
    wanted = _with_gradients(reference, [x.double() for x in rounded])[: len(got)]
    errors = [relative_error(mine, theirs) for mine, theirs in zip(got, wanted, strict=True)]
    limit = LIMIT if dtype == torch.bfloat16 else FLOAT32_LIMIT
    return Figure(max(errors), limit, "relative", details={"output": errors[0], "gradients": errors[1:], **details})


def _with_gradients(attend: Attend, inputs: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = attend(*leaves)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    return [out, *torch.autograd.grad(out, leaves, upstream.to(out))]


def _randn(device: torch.device, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device) for shape in shapes]


def causal(device: torch.device, _folder: Path, depth: int) -> Figure:
    """The trunk's (depth 1) and the MTP head's."""
    pack = _pack(device)

    def attend(query: Tensor, *rest: Tensor) -> Tensor:
        return chain_attention(query, list(rest[:depth]), list(rest[depth:]), pack.documents, SCALE)

    return _compare_chain(device, pack, attend, depth)


def windows(device: torch.device, _folder: Path, depth: int, dtype: torch.dtype = torch.bfloat16) -> Figure:
    """The MTP head's from the last third of each document, which is how a share of the positions is trained."""
    pack = _pack(device)
    starts, lengths = pack.documents.starts, [-(-length // 3) for length in pack.documents.lengths]
    queries = upload(Documents.of(lengths), device)
    rows = torch.cat([torch.arange(end - length, end) for end, length in zip(starts[1:], lengths, strict=True)])
    rows = rows.to(device)

    def attend(query: Tensor, *rest: Tensor) -> Tensor:
        keys, values = ([x[0], *(own[rows] for own in x[1:])] for x in (rest[:depth], rest[depth:]))
        return chain_attention(query[rows], keys, values, pack.documents, SCALE, queries)

    return _compare_chain(device, pack, attend, depth, rows, dtype)


def varlen(device: torch.device, _folder: Path) -> Figure:
    """PyTorch's own interface to the kernel that the trunk calls."""
    from torch.nn.attention.varlen import varlen_attn

    # Keys shared by query heads have a flag of their own since torch 2.13.
    shared_keys = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    options: dict[str, Any] = {"scale": SCALE, "window_size": (-1, 0), **shared_keys}
    pack = _pack(device)
    starts, longest = pack.documents.start_N, pack.documents.longest

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return varlen_attn(query, key, value, starts, starts, longest, longest, **options)

    return _compare_chain(device, pack, attend, depth=1)


def _compare_chain(
    device: torch.device,
    pack: Pack,
    attend: Attend,
    depth: int,
    rows: Tensor | slice = slice(None),
    dtype: torch.dtype = torch.bfloat16,
) -> Figure:
    """``attend`` against one softmax over the keys of all depths side by side: a query sees its own deeper keys.

    Args:
        rows: queries that ``attend`` returns.
    """
    num_tokens, segment_ids_T = len(pack.token_ids_T), pack.segment_ids_T
    index_T = torch.arange(num_tokens, device=device)
    causal_TT = (index_T <= index_T[:, None]) & (segment_ids_T == segment_ids_T[:, None])
    seen_TN = torch.cat([causal_TT, *[index_T == index_T[:, None]] * (depth - 1)], dim=1)

    def reference(query: Tensor, *rest: Tensor) -> Tensor:
        return masked_attention(query, torch.cat(rest[:depth]), torch.cat(rest[depth:]), seen_TN)[rows]

    shapes = [(num_tokens, HEADS, HEAD_DIM), *[(num_tokens, GROUPS, HEAD_DIM)] * (2 * depth)]
    inputs = _randn(device, *shapes)
    return compare(attend, reference, inputs, dtype=dtype, documents=pack.documents.lengths, depth=depth)


def flex(device: torch.device, _folder: Path, num_anchors: int) -> Figure:
    """DFlash's, with FlexAttention (compiled on CUDA)."""
    pack, cpu_pack = _pack(device), _pack(torch.device("cpu"))
    num_documents = len(pack.documents.lengths)
    anchors = draw_anchors(cpu_pack, [(0, row) for row in range(num_documents)], [num_anchors] * num_documents)
    blocks = upload(supervised_blocks(anchors, cpu_pack, 7), device)
    num_tokens, num_slots = len(pack.token_ids_T), len(anchors) * blocks.num_slots
    shapes = [(size, GROUPS, HEAD_DIM) for size in (num_tokens, num_tokens, num_slots, num_slots)]
    attend, seen_QN = flex_block_attention(blocks, num_tokens), visible(blocks, num_tokens)
    return compare(
        lambda query, *keys: attend(query, Keys(*keys), SCALE),
        lambda query, *keys: masked_attention(query, torch.cat(keys[::2]), torch.cat(keys[1::2]), seen_QN),
        _randn(device, (num_slots, HEADS, HEAD_DIM), *shapes),
        # FlexAttention has no backward pass on CPUs.
        has_backward=device.type == "cuda",
        tokens=num_tokens,
        slots=num_slots,
    )


def _pack(device: torch.device) -> Pack:
    """Documents of several lengths, one of them a token, not a multiple of any block of a kernel."""
    lengths = LENGTHS if device.type == "cuda" else tuple(-(-length // 16) for length in LENGTHS)
    is_response_T = np.concatenate([np.arange(length) % 50 > 10 for length in lengths])
    return upload(pack_documents(np.zeros(sum(lengths), np.int64), is_response_T, lengths), device)


ATTENTIONS = [
    Check("flex attention", "DFlash's block attention, forward and backward", partial(flex, num_anchors=32)),
    Check("short flex attention", "the same with fewer than 128 slots", partial(flex, num_anchors=2)),
    Check("dense flex attention", "the same with every response token an anchor", partial(flex, num_anchors=1000)),
    Check("causal attention", "attention of the trunk, forward and backward", partial(causal, depth=1)),
    Check("chain attention", "attention of the MTP head's third depth, likewise", partial(causal, depth=NUM_DEPTHS)),
    Check(
        "window attention",
        "attention of windows at the ends of documents, first depth",
        partial(windows, depth=1),
    ),
    Check(
        "window chain attention",
        "the same of the MTP head's third depth",
        partial(windows, depth=NUM_DEPTHS),
    ),
    Check(
        "float32 attention",
        "window chain attention in float32",
        partial(windows, depth=NUM_DEPTHS, dtype=torch.float32),
    ),
    Check(
        "varlen attention",
        "variable-length attention of PyTorch, forward and backward",
        varlen,
        waits_for="CUDA: torch.nn.attention.varlen has no CPU kernel",
    ),
]
