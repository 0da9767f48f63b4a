"""Benchmark of the chunked draft loss against plain PyTorch with full logits: time and peak extra memory.

    python benchmarks/soft_ce.py                    # CPU, about three minutes on two cores
    python benchmarks/soft_ce.py --device cuda

Both versions compute the loss and its gradient with respect to the draft's hidden states (forward and backward) on the
same inputs. The gradients are compared every time. Each measurement runs in a new process. The two versions take turns,
and the table has medians. Extra memory is the peak minus the memory held once libraries and inputs are loaded: resident
memory on CPU, the allocator's on CUDA.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from skyrl_spec.losses.soft_ce import vocab_parallel_soft_ce

TEMPERATURE = 0.8
SIZES: dict[str, dict[str, Any]] = {
    "cpu": {"num_tokens": 1024, "hidden_size": 256, "chunk_size": 64, "dtype": "float32"},
    "cuda": {"num_tokens": 4096, "hidden_size": 4096, "chunk_size": 512, "dtype": "bfloat16"},
}
# Relative to the largest entry of the gradient. The two versions round bf16 in different places.
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}
MIB = 2**20


def plain_soft_ce(draft_KTD: Tensor, teacher_TD: Tensor, weight_VD: Tensor, weights_KT: Tensor) -> Tensor:
    """Plain soft cross-entropy: logits of all tokens at once, softmax in float32."""
    with torch.no_grad():
        teacher_TV = ((teacher_TD @ weight_VD.t()).float() / TEMPERATURE).softmax(-1)
    logq_KTV = ((draft_KTD @ weight_VD.t()).float() / TEMPERATURE).log_softmax(-1)
    return -(weights_KT * (teacher_TV * logq_KTV).sum(-1)).sum()


def loss_and_grad(args: argparse.Namespace, inputs: tuple[Tensor, ...]) -> Tensor:
    """Gradient of the loss with respect to the draft's hidden states."""
    if args.version == "plain":
        loss = plain_soft_ce(*inputs)
    else:
        loss = vocab_parallel_soft_ce(
            *inputs, vocab_size=len(inputs[2]), temperature=TEMPERATURE, chunk_size=args.chunk_size, group=None
        ).loss
    return torch.autograd.grad(loss, inputs[0])[0]


def make_inputs(args: argparse.Namespace, vocab_size: int, num_tokens: int) -> tuple[Tensor, ...]:
    """Random draft states, teacher states, output weight and token weights, in the order of ``plain_soft_ce``."""
    generator = torch.Generator(args.device).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=args.device, dtype=getattr(torch, args.dtype))

    draft_KTD = randn(args.num_drafts, num_tokens, args.hidden_size).requires_grad_()
    # Logits get standard deviation 2, so they are as peaked as a language model's.
    weight_VD = randn(vocab_size, args.hidden_size).mul_(2 * args.hidden_size**-0.5)
    weights_KT = torch.full((args.num_drafts, num_tokens), 1.0 / num_tokens, device=args.device)
    return draft_KTD, randn(num_tokens, args.hidden_size), weight_VD, weights_KT


def peak_memory(device: str) -> int:
    """Peak memory of this process, in bytes. VmHWM starts at zero; ``ru_maxrss`` starts at the parent's peak."""
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def measure(args: argparse.Namespace) -> None:
    """Measure one version once, in a child process, and print a line of JSON. A tiny run before loads the libraries."""
    loss_and_grad(args, make_inputs(args, vocab_size=64, num_tokens=8))
    inputs = make_inputs(args, args.vocab_size, args.num_tokens)
    before = peak_memory(args.device)
    start = time.perf_counter()
    grad_KTD = loss_and_grad(args, inputs)
    after = peak_memory(args.device)
    seconds = time.perf_counter() - start
    np.save(args.grad_file, grad_KTD.float().cpu().numpy())
    print(json.dumps({"seconds": seconds, "extra_mib": (after - before) / MIB}))


def measure_in_child(args: argparse.Namespace, **settings: Any) -> dict[str, float]:
    """Result of ``measure`` in a new process, with ``settings`` in place of those of ``args``."""
    command = [sys.executable, __file__]
    for name, value in {**vars(args), **settings}.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def compare(args: argparse.Namespace, vocab_size: int, num_drafts: int) -> str:
    """A row of the table: alternating rounds of one size."""
    runs: dict[str, list[dict[str, float]]] = {"plain": [], "chunked": []}
    with tempfile.TemporaryDirectory() as folder:
        files = {version: f"{folder}/{version}.npy" for version in runs}
        for _ in range(args.rounds):
            for version, file in files.items():
                runs[version].append(
                    measure_in_child(
                        args, version=version, vocab_size=vocab_size, num_drafts=num_drafts, grad_file=file
                    )
                )
            plain, chunked = (np.load(file) for file in files.values())
            error = np.abs(chunked - plain).max() / np.abs(plain).max()
            assert error < TOLERANCE[args.dtype], f"the gradients differ by {error:.1e} of the largest entry"
    (plain_s, chunked_s), (plain_mib, chunked_mib) = (
        [statistics.median(run[key] for run in runs[version]) for version in runs] for key in ("seconds", "extra_mib")
    )
    return (
        f"| {vocab_size} | {num_drafts} | {plain_s:.2f} | {chunked_s:.2f} | {chunked_s / plain_s:.2f} "
        f"| {plain_mib:.0f} | {chunked_mib:.0f} | {chunked_mib / plain_mib:.1%} | {error:.0e} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(SIZES), default="cpu")
    parser.add_argument("--num-tokens", type=int)
    parser.add_argument("--hidden-size", type=int)
    parser.add_argument("--chunk-size", type=int)
    parser.add_argument("--dtype", choices=list(TOLERANCE))
    parser.add_argument("--rounds", type=int, default=3)
    # The script sets these for its child processes.
    for name in ("--version", "--grad-file"):
        parser.add_argument(name, default="", help=argparse.SUPPRESS)
    for name in ("--vocab-size", "--num-drafts"):
        parser.add_argument(name, type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    for name, value in SIZES[args.device].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.version:
        measure(args)
        return
    print(
        f"{args.device}, {args.dtype}: {args.num_tokens} tokens, hidden size {args.hidden_size}, "
        f"{args.chunk_size} tokens a chunk, medians of {args.rounds} rounds\n"
    )
    print("| vocabulary | drafts | plain s | chunked s | ratio | plain MiB | chunked MiB | ratio | gradient error |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    for vocab_size in (32_000, 152_064):
        for num_drafts in (1, 3):
            print(compare(args, vocab_size, num_drafts), flush=True)


if __name__ == "__main__":
    main()
