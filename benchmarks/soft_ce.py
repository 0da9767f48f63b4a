"""Benchmark of the draft loss against two other ways to compute it: time and peak extra memory.

    python benchmarks/soft_ce.py                    # CPU, about six minutes on two cores
    python benchmarks/soft_ce.py --device cuda

- ``ours``: the loss of this project, one chunk of positions at a time.
- ``plain``: logits of all positions at once, softmax in float32.
- ``checkpointed``: logits of all positions at once; the float32 softmax exists for a chunk of positions, and again in
  the backward pass (``torch.utils.checkpoint``). SkyRL computes its draft loss like this.

All compute the loss and its gradient with respect to the draft's hidden states (forward and backward) on the same
inputs. The gradients are compared every time. Each measurement runs in a new process. The versions take turns, and the
table has medians. Extra memory is the peak minus the memory held once libraries and inputs are loaded: resident memory
on CPU, the allocator's on CUDA.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from skyrl_spec.losses.soft_ce import vocab_parallel_soft_ce

TEMPERATURE = 0.8
SIZES: dict[str, dict[str, Any]] = {
    "cpu": {"num_tokens": 1024, "hidden_size": 256, "chunk_size": 64, "dtype": "float32"},
    "cuda": {"num_tokens": 4096, "hidden_size": 4096, "chunk_size": 512, "dtype": "bfloat16"},
}
# Relative to the largest entry of the gradient. The two versions round bf16 in different places.
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}
MIB = 2**20


def loss_and_grad(version: str, inputs: tuple[Tensor, ...], chunk_size: int) -> Tensor:
    """Gradient of the loss with respect to the draft's hidden states."""
    return torch.autograd.grad(VERSIONS[version](*inputs, chunk_size), inputs[0])[0]


def ours(draft_KTD: Tensor, teacher_TD: Tensor, weight_VD: Tensor, weights_KT: Tensor, chunk_size: int) -> Tensor:
    """This project's loss."""
    return vocab_parallel_soft_ce(
        draft_KTD,
        teacher_TD,
        weight_VD,
        weights_KT,
        vocab_size=len(weight_VD),
        temperature=TEMPERATURE,
        chunk_size=chunk_size,
        group=None,
    ).loss


def plain(draft_KTD: Tensor, teacher_TD: Tensor, weight_VD: Tensor, weights_KT: Tensor, _chunk_size: int) -> Tensor:
    """Plain soft cross-entropy."""
    # In one expression each, so that no logits outlive their softmax.
    with torch.no_grad():
        probabilities_TV = ((teacher_TD @ weight_VD.t()).float() / TEMPERATURE).softmax(-1)
    logq_KTV = ((draft_KTD @ weight_VD.t()).float() / TEMPERATURE).log_softmax(-1)
    return -(weights_KT * (probabilities_TV * logq_KTV).sum(-1)).sum()


def checkpointed(
    draft_KTD: Tensor, teacher_TD: Tensor, weight_VD: Tensor, weights_KT: Tensor, chunk_size: int
) -> Tensor:
    """Plain soft cross-entropy, a checkpointed chunk of positions at a time, of full logits."""
    logits = (draft_KTD @ weight_VD.t()).split(chunk_size, dim=1)
    with torch.no_grad():
        teacher = (teacher_TD @ weight_VD.t()).split(chunk_size)
    chunks = zip(logits, teacher, weights_KT.split(chunk_size, dim=1), strict=True)
    return torch.stack(
        [checkpoint(_of_logits, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    ).sum()


def _of_logits(logits_KTV: Tensor, teacher_TV: Tensor, weights_KT: Tensor) -> Tensor:
    probabilities_TV = (teacher_TV.float() / TEMPERATURE).softmax(-1)
    logq_KTV = (logits_KTV.float() / TEMPERATURE).log_softmax(-1)
    return -(weights_KT * (probabilities_TV * logq_KTV).sum(-1)).sum()


VERSIONS: dict[str, Callable[..., Tensor]] = {"ours": ours, "plain": plain, "checkpointed": checkpointed}
OTHERS = ("plain", "checkpointed")


def make_inputs(
    device: str, dtype: torch.dtype, num_drafts: int, num_tokens: int, hidden_size: int, vocab_size: int
) -> tuple[Tensor, ...]:
    """Random draft states, teacher states, output weight and token weights, in the order of the versions."""
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    draft_KTD = randn(num_drafts, num_tokens, hidden_size).requires_grad_()
    # Logits get standard deviation 2, so they are as peaked as a language model's.
    weight_VD = randn(vocab_size, hidden_size).mul_(2 * hidden_size**-0.5)
    weights_KT = torch.full((num_drafts, num_tokens), 1.0 / num_tokens, device=device)
    return draft_KTD, randn(num_tokens, hidden_size), weight_VD, weights_KT


def peak_memory(device: str) -> int:
    """Peak memory of this process, in bytes. VmHWM starts at zero; ``ru_maxrss`` starts at the parent's peak."""
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def measure(args: argparse.Namespace) -> None:
    """Measure one version once, in a child process, and print a line of JSON. A tiny run before loads the libraries."""

    def build(num_tokens: int, vocab_size: int) -> tuple[Tensor, ...]:
        dtype = getattr(torch, args.dtype)
        return make_inputs(args.device, dtype, args.num_drafts, num_tokens, args.hidden_size, vocab_size)

    loss_and_grad(args.version, build(8, 64), args.chunk_size)
    inputs = build(args.num_tokens, args.vocab_size)
    before = peak_memory(args.device)
    start = time.perf_counter()
    grad_KTD = loss_and_grad(args.version, inputs, args.chunk_size)
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
    runs: dict[str, list[dict[str, float]]] = {version: [] for version in VERSIONS}
    with tempfile.TemporaryDirectory() as folder:
        files = {version: f"{folder}/{version}.npy" for version in VERSIONS}
        for _ in range(args.rounds):
            for version, file in files.items():
                runs[version].append(
                    measure_in_child(
                        args, version=version, vocab_size=vocab_size, num_drafts=num_drafts, grad_file=file
                    )
                )
            mine, *others = (np.load(file) for file in files.values())
            error = max(np.abs(mine - other).max() / np.abs(other).max() for other in others)
            assert error < TOLERANCE[args.dtype], f"the gradients differ by {error:.1e} of the largest entry"
    seconds, mib = (
        {version: statistics.median(run[key] for run in runs[version]) for version in VERSIONS}
        for key in ("seconds", "extra_mib")
    )
    cells = [f"{vocab_size}", f"{num_drafts}", *(f"{value:.2f}" for value in seconds.values())]
    cells += [f"{seconds['ours'] / seconds[other]:.2f}" for other in OTHERS]
    cells += [f"{value:.0f}" for value in mib.values()]
    cells += [f"{mib['ours'] / mib[other]:.1%}" for other in OTHERS]
    return f"| {' | '.join([*cells, f'{error:.0e}'])} |"


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
    heads = ["vocabulary", "drafts"]
    for unit in ("s", "MiB"):
        heads += [f"{version} {unit}" for version in VERSIONS] + [f"ours / {other}" for other in OTHERS]
    print(f"| {' | '.join([*heads, 'gradient error'])} |\n|{'---:|' * (len(heads) + 1)}")
    for vocab_size in (32_000, 152_064):
        for num_drafts in (1, 3):
            print(compare(args, vocab_size, num_drafts), flush=True)


if __name__ == "__main__":
    main()
