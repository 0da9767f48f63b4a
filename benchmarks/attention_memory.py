"""Benchmark of the memory of attention on packs: the trunk's, the MTP head's chain and DFlash's blocks.

    python benchmarks/attention_memory.py                 # CPU, about five minutes on two cores
    python benchmarks/attention_memory.py --device cuda

A pack is one document of 1k to 32k tokens. Extra memory is the peak of forward and backward pass minus what the process
held before: resident memory on CPU, the allocator's on CUDA. Each measurement runs in a new process. A ratio of 2 from
line to line means memory that is linear in tokens.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from skyrl_spec.drafts.block_attention import Keys, block_attention
from skyrl_spec.drafts.blocks import draw_anchors, supervised_blocks
from skyrl_spec.drafts.chain_attention import chain_attention
from skyrl_spec.models.pack import Pack, pack_documents
from skyrl_spec.models.upload import upload

HEADS, GROUPS, HEAD_DIM, NUM_DEPTHS, NUM_DRAFTED = 4, 2, 64, 3, 7
SCALE = HEAD_DIM**-0.5
LENGTHS = tuple(1024 * 2**power for power in range(6))
MIB = 2**20


def trunk(pack: Pack, device: torch.device) -> list[Tensor]:
    """Inputs and output of the trunk's attention."""
    return _chain(pack, device, depth=1)


def chain(pack: Pack, device: torch.device) -> list[Tensor]:
    """Inputs and output of the attention of the MTP head's third depth."""
    return _chain(pack, device, depth=NUM_DEPTHS)


def _chain(pack: Pack, device: torch.device, depth: int) -> list[Tensor]:
    num_tokens = pack.documents.lengths[0]
    leaves = _leaves(device, (num_tokens, HEADS), *[(num_tokens, GROUPS)] * (2 * depth))
    return [*leaves, chain_attention(leaves[0], leaves[1 : 1 + depth], leaves[1 + depth :], pack.documents, SCALE)]


def blocks(pack: Pack, device: torch.device) -> list[Tensor]:
    """Inputs and output of the attention of DFlash's blocks, one for every eight tokens."""
    num_tokens = pack.documents.lengths[0]
    cpu_pack = make_pack(num_tokens)
    drawn = upload(supervised_blocks(draw_anchors(cpu_pack, [(0,)], [num_tokens // 8]), cpu_pack, NUM_DRAFTED), device)
    num_slots = len(drawn.anchors) * drawn.num_slots
    sizes = [(size, GROUPS) for size in (num_tokens, num_tokens, num_slots, num_slots)]
    leaves = _leaves(device, (num_slots, HEADS), *sizes)
    return [*leaves, block_attention(drawn, num_tokens)(leaves[0], Keys(*leaves[1:]), SCALE)]


ATTENTIONS: dict[str, Callable[[Pack, torch.device], list[Tensor]]] = {"trunk": trunk, "chain": chain, "blocks": blocks}


def make_pack(num_tokens: int) -> Pack:
    """One document, all of it a response."""
    return pack_documents(np.zeros(num_tokens, np.int64), np.ones(num_tokens, bool), [num_tokens])


def _leaves(device: torch.device, *shapes: tuple[int, int]) -> list[Tensor]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return [torch.randn(*shape, HEAD_DIM, device=device, dtype=dtype, requires_grad=True) for shape in shapes]


def peak_memory(device: torch.device) -> int:
    """Peak memory of this process, in bytes."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def measure(name: str, num_tokens: int, device: torch.device) -> None:
    """Prints the extra MiB of one forward and backward pass. A small one before loads the libraries."""
    for length in (64, num_tokens):
        pack = upload(make_pack(length), device)
        before = peak_memory(device)
        *leaves, out = ATTENTIONS[name](pack, device)
        torch.autograd.grad(out, leaves, torch.ones_like(out))
    print(json.dumps((peak_memory(device) - before) / MIB))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    # The script sets these for its child processes.
    parser.add_argument("--name", default="", help=argparse.SUPPRESS)
    parser.add_argument("--num-tokens", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.name:
        measure(args.name, args.num_tokens, torch.device(args.device))
        return
    heads = ["tokens", *(f"{name} MiB | ratio" for name in ATTENTIONS)]
    print(f"| {' | '.join(heads)} |\n|{'---:|' * (1 + 2 * len(ATTENTIONS))}")
    last: dict[str, float] = {}
    for num_tokens in LENGTHS:
        cells = [f"{num_tokens}"]
        for name in ATTENTIONS:
            command = [
                sys.executable,
                __file__,
                "--device",
                args.device,
                "--name",
                name,
                "--num-tokens",
                str(num_tokens),
            ]
            mib = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
            cells += [f"{mib:.0f}", f"{mib / last[name]:.1f}" if name in last else ""]
            last[name] = mib
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
