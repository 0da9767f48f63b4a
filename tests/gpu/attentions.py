"""Checks of the attentions in bf16, with gradients, against plain ones in float64 written here."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_check import Check, Figure, relative_error
from torch import Tensor

from skyrl_spec.drafts.block_attention import flex_block_attention
from skyrl_spec.drafts.blocks import Blocks, draw_blocks, visible
from skyrl_spec.drafts.chain_attention import chain_attention
from skyrl_spec.drafts.document_chain import document_chain_attention
from skyrl_spec.models.attention import SdpaAttention
from skyrl_spec.models.flash import Documents, documents_attention
from skyrl_spec.models.policy import document_mask

# Scores, probabilities and output are rounded to 2^-9 of themselves, one after the other.
LIMIT = 1e-2
NUM_DEPTHS = 3
# Query heads, key heads and head size of Qwen3-8B and MiMo-7B.
HEADS, GROUPS, HEAD_DIM = 32, 8, 128
SCALE = HEAD_DIM**-0.5
# Documents of the first row; the second row holds one, then padding.
DOCUMENTS = (0.28, 0.17, 0.45, 0.1)

Attend = Callable[..., Tensor]


def segment_ids(length: int, device: torch.device) -> Tensor:
    """``[2, S]``."""
    ends = torch.tensor(DOCUMENTS).cumsum(0)
    position = torch.arange(length) / length
    packed = 1 + (position[:, None] >= ends[:-1]).sum(1)
    return torch.stack([packed, (position < 0.9).long()]).to(device)


def masked_attention(query_BHQd: Tensor, key_BGNd: Tensor, value_BGNd: Tensor, seen_B1QN: Tensor) -> Tensor:
    """The definition."""
    repeats = query_BHQd.shape[1] // key_BGNd.shape[1]
    key, value = (x.repeat_interleave(repeats, dim=1) for x in (key_BGNd, value_BGNd))
    scores = (query_BHQd @ key.transpose(-1, -2) * SCALE).masked_fill(~seen_B1QN, -torch.inf)
    return scores.softmax(-1) @ value


def compare(
    attend: Attend, reference: Attend, inputs: list[Tensor], *, has_backward: bool = True, **details: object
) -> Figure:
    """The largest relative error of output and gradients; ``attend`` gets bf16, ``reference`` the same in float64."""
    rounded = [x.bfloat16() for x in inputs]
    got = _with_gradients(attend, rounded) if has_backward else [attend(*rounded)]
    # Without a backward pass, only the first is compared.
    wanted = _with_gradients(reference, [x.double() for x in rounded])[: len(got)]
    errors = [relative_error(mine, theirs) for mine, theirs in zip(got, wanted, strict=True)]
    return Figure(max(errors), LIMIT, "relative", details={"output": errors[0], "gradients": errors[1:], **details})


def _with_gradients(attend: Attend, inputs: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = attend(*leaves)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    return [out, *torch.autograd.grad(out, leaves, upstream.to(out))]


def _randn(device: torch.device, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device) for shape in shapes]


def causal(device: torch.device, _folder: Path) -> Figure:
    """The trunk's, with several documents in a row."""
    length = _length(device)
    segments = segment_ids(length, device)
    barred_B1SS = document_mask(segments)
    assert barred_B1SS is not None
    trunk = SdpaAttention.__new__(SdpaAttention)
    torch.nn.Module.__init__(trunk)
    trunk.scale = SCALE

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return trunk(*(x.permute(2, 0, 1, 3) for x in (query, key, value)), barred_B1SS)

    def reference(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return masked_attention(query, key, value, ~barred_B1SS).permute(2, 0, 1, 3).flatten(2)

    return compare(attend, reference, _query_key_value(device, length), length=length)


def chain(device: torch.device, _folder: Path) -> Figure:
    """The MTP head's, at its third depth."""
    length = _length(device)
    barred_B1SS = document_mask(segment_ids(length, device))
    assert barred_B1SS is not None
    keys_shape = (length, 2, GROUPS, HEAD_DIM)
    inputs = _randn(device, (length, 2, HEADS, HEAD_DIM), *[keys_shape] * (2 * NUM_DEPTHS))

    def attend(query: Tensor, *rest: Tensor) -> Tensor:
        return chain_attention(query, list(rest[:NUM_DEPTHS]), list(rest[NUM_DEPTHS:]), barred_B1SS, SCALE)

    def reference(query: Tensor, *rest: Tensor) -> Tensor:
        return _chain_in_one_softmax(query, rest[:NUM_DEPTHS], rest[NUM_DEPTHS:], ~barred_B1SS)

    return compare(attend, reference, inputs, length=length, depth=NUM_DEPTHS)


def _chain_in_one_softmax(
    query_SBHd: Tensor, keys: tuple[Tensor, ...], values: tuple[Tensor, ...], seen_B1SS: Tensor
) -> Tensor:
    """Keys of all depths side by side: a query sees those of depth 1 before it, and its own of the other depths."""
    own = torch.eye(len(query_SBHd), dtype=torch.bool, device=query_SBHd.device).expand_as(seen_B1SS)
    seen_B1SN = torch.cat([seen_B1SS, *[own] * (len(keys) - 1)], dim=-1)
    query = query_SBHd.permute(1, 2, 0, 3)
    key, value = (torch.cat(x).permute(1, 2, 0, 3) for x in (keys, values))
    return masked_attention(query, key, value, seen_B1SN).permute(2, 0, 1, 3).flatten(2)


def flex(device: torch.device, _folder: Path) -> Figure:
    """DFlash's, with FlexAttention (compiled on CUDA)."""
    length = _length(device)
    segments = segment_ids(length, device)
    blocks = _blocks(segments, num_anchors=length // 16)
    num_slots = blocks.anchor_BA.shape[1] * blocks.num_slots
    key_shape = (2, GROUPS, length + num_slots, HEAD_DIM)
    inputs = _randn(device, (2, HEADS, num_slots, HEAD_DIM), key_shape, key_shape)
    attend = flex_block_attention(blocks, segments)
    seen_B1QN = visible(blocks, segments)
    return compare(
        lambda query, key, value: attend(query, key, value, SCALE),
        lambda query, key, value: masked_attention(query, key, value, seen_B1QN),
        inputs,
        # FlexAttention has no backward pass on CPUs.
        has_backward=device.type == "cuda",
        length=length,
        slots=num_slots,
    )


def _blocks(segment_ids_BS: Tensor, num_anchors: int) -> Blocks:
    is_response_S = torch.arange(segment_ids_BS.shape[1], device=segment_ids_BS.device) % 50 > 10
    return draw_blocks(
        (segment_ids_BS > 0) & is_response_S, segment_ids_BS, num_anchors, 7, torch.Generator().manual_seed(0)
    )


def varlen(device: torch.device, _folder: Path) -> Figure:
    """PyTorch's variable-length flash attention."""
    from torch.nn.attention.varlen import varlen_attn

    # Keys shared by query heads have a flag of their own since torch 2.13.
    shared_keys = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    options: dict[str, Any] = {"scale": SCALE, "window_size": (-1, 0), **shared_keys}
    documents = _documents(device)
    starts, longest = documents.starts_on_device, documents.longest

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return varlen_attn(query, key, value, starts, starts, longest, longest, **options)

    return _compare_chain(device, documents, attend, depth=1)


def end_to_end(device: torch.device, _folder: Path, depth: int) -> Figure:
    """The attention of packed micro-batches: the trunk's (depth 1) and the MTP head's."""
    documents = _documents(device)

    def attend(query: Tensor, *rest: Tensor) -> Tensor:
        keys, values = list(rest[:depth]), list(rest[depth:])
        if depth == 1:
            return documents_attention(query, keys[0], values[0], documents, SCALE)
        return document_chain_attention(query, keys, values, documents, SCALE)

    return _compare_chain(device, documents, attend, depth)


def _documents(device: torch.device) -> Documents:
    return Documents(tuple(segment_ids(_length(device), device)[0].bincount()[1:].tolist()), device)


def _compare_chain(device: torch.device, documents: Documents, attend: Attend, depth: int) -> Figure:
    """``attend`` on ``[T, heads, d]`` against one softmax over the keys of all depths side by side."""
    num_tokens = sum(documents.lengths)
    number_S = torch.repeat_interleave(torch.arange(len(documents.lengths)), torch.tensor(documents.lengths))
    barred_B1SS = document_mask(1 + number_S[None].to(device))
    assert barred_B1SS is not None

    def reference(query: Tensor, *rest: Tensor) -> Tensor:
        keys, values = (tuple(x[:, None] for x in half) for half in (rest[:depth], rest[depth:]))
        return _chain_in_one_softmax(query[:, None], keys, values, ~barred_B1SS)[:, 0].unflatten(1, (HEADS, HEAD_DIM))

    shapes = [(num_tokens, HEADS, HEAD_DIM), *[(num_tokens, GROUPS, HEAD_DIM)] * (2 * depth)]
    inputs = _randn(device, *shapes)
    return compare(attend, reference, inputs, length=num_tokens, documents=len(documents.lengths), depth=depth)


def _query_key_value(device: torch.device, length: int) -> list[Tensor]:
    return _randn(device, *[(2, heads, length, HEAD_DIM) for heads in (HEADS, GROUPS, GROUPS)])


def _length(device: torch.device) -> int:
    # Longer than a block of queries of the chain's attention on CUDA.
    return 1536 if device.type == "cuda" else 100


ATTENTIONS = [
    Check("flex attention", "DFlash's block attention, forward and backward", flex),
    Check("chain attention", "attention of the MTP head's third depth, forward and backward", chain),
    Check("causal attention", "attention of the trunk, several documents a row, forward and backward", causal),
    Check(
        "packed attention", "attention over documents end to end, forward and backward", partial(end_to_end, depth=1)
    ),
    Check("packed chain", "the same with the keys of a chain's third depth", partial(end_to_end, depth=NUM_DEPTHS)),
    Check(
        "varlen attention",
        "variable-length attention of PyTorch, forward and backward",
        varlen,
        waits_for="CUDA: torch.nn.attention.varlen has no CPU kernel",
    ),
]
