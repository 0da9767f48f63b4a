"""Supervised warm start of a tiny model of any architecture on the task's demonstrations: data, optimizers, loop.

Plain PyTorch and transformers; ``make_model.py`` of an example says what the model is and what its losses are.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from task import WORDS_FRAC, demonstration, problems
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

IGNORE = -100


def arguments(description: str | None, minutes: float, depths: int = 0) -> argparse.Namespace:
    """``--out`` and how to train; threads and seed are set."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="a model to go on from; default: random weights")
    parser.add_argument("--words", type=float, default=WORDS_FRAC, help="share of demonstrations in words")
    if depths:
        parser.add_argument("--depths", type=int, default=depths, help="depths of the head to train, or 0")
        parser.add_argument("--head-only", action="store_true", help="leave the trunk as it is")
    parser.add_argument("--minutes", type=float, default=minutes)
    parser.add_argument("--tokens-per-batch", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    return args


def examples(tokenizer: PreTrainedTokenizerFast, seed: int, words: float) -> Iterator[tuple[list[int], list[int]]]:
    """Endless (prompt ids, response ids). A share ``words`` of the responses is in words."""
    rng = random.Random(seed)
    for expression, answer in problems(seed):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": f"{expression}="}], add_generation_prompt=True, return_dict=False
        )
        yield prompt, tokenizer.encode(demonstration(expression, answer, rng, words) + "<|end|>")


def batches(source: Iterator[tuple[list[int], list[int]]], tokens: int, pad: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of rows of like length, ``tokens`` in each: (ids, labels), both ``[B, S]``."""
    while True:
        pool = sorted(itertools.islice(source, 2048), key=lambda pair: len(pair[0]) + len(pair[1]))
        chunks, chunk = [], []
        for pair in pool:
            if (len(chunk) + 1) * (len(pair[0]) + len(pair[1])) > tokens:
                chunks.append(chunk)
                chunk = []
            chunk.append(pair)
        random.Random(len(pool[0][0])).shuffle(chunks)
        for rows in chunks:
            width = max(len(prompt) + len(response) for prompt, response in rows)
            ids = torch.full((len(rows), width), pad)
            labels = torch.full((len(rows), width), IGNORE)
            for index, (prompt, response) in enumerate(rows):
                end = len(prompt) + len(response)
                ids[index, :end] = torch.tensor(prompt + response)
                labels[index, len(prompt) : end] = torch.tensor(response)
            yield ids, labels


def cross_entropy(logits: Tensor, labels: Tensor, shift: int) -> Tensor:
    """Mean cross-entropy of the tokens ``shift`` positions ahead. Only response tokens count. Without any: 0."""
    flat = labels[:, shift:].flatten()
    total = F.cross_entropy(logits[:, :-shift].flatten(0, 1).float(), flat, ignore_index=IGNORE, reduction="sum")
    return total / (flat != IGNORE).sum().clamp(min=1)


def optimizers(model: Any, further_blocks: Iterable[nn.Parameter] = ()) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for everything else."""
    blocks = [*model.model.layers.parameters(), *further_blocks]
    matrices = [p for p in blocks if p.ndim == 2]
    rest = [p for p in blocks if p.ndim != 2] + [model.model.embed_tokens.weight, model.lm_head.weight]
    rest.append(model.model.norm.weight)
    return [
        torch.optim.Muon(matrices, lr=2e-3, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def fit(
    losses: Callable[[Tensor, Tensor], list[Tensor]],
    loss_weights: list[float],
    opts: list[torch.optim.Optimizer],
    data: Iterator[tuple[Tensor, Tensor]],
    minutes: float,
    look: Callable[[], None],
) -> None:
    """Train for ``minutes``: linear warm-up, then a cosine over the time given. ``look`` is called now and then."""
    params = [p for opt in opts for group in opt.param_groups for p in group["params"]]
    base_lrs = [[group["lr"] for group in opt.param_groups] for opt in opts]
    start, last_print, last_look = time.monotonic(), 0.0, 0.0
    averages: list[float] | None = None
    for step, (ids, labels) in enumerate(data):
        elapsed = time.monotonic() - start
        progress = elapsed / (60 * minutes)
        if progress >= 1:
            break
        scale = min(1.0, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * progress) + 0.02)
        for opt, lrs in zip(opts, base_lrs, strict=True):
            for group, lr in zip(opt.param_groups, lrs, strict=True):
                group["lr"] = lr * scale
        parts = losses(ids, labels)
        torch.stack([weight * loss for weight, loss in zip(loss_weights, parts, strict=True)]).sum().backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        values = [loss.item() for loss in parts]
        averages = values if averages is None else [0.95 * a + 0.05 * v for a, v in zip(averages, values, strict=True)]
        if elapsed - last_print > 20:
            last_print = elapsed
            print(
                f"{elapsed / 60:6.1f} min  step {step:5d}  losses {' '.join(f'{a:.3f}' for a in averages)}", flush=True
            )
        if elapsed - last_look > 240:
            last_look = elapsed
            look()


@torch.no_grad()
def greedy_reward(model: Any, tokenizer: PreTrainedTokenizerFast, num_problems: int) -> dict[int, float]:
    """Share of held-out problems solved at temperature 0, by number of terms (0: all)."""
    right: dict[int, list[bool]] = {}
    held_out = itertools.islice(problems(seed=777_000_000), num_problems)
    by_length: dict[int, list[tuple[str, str]]] = {}
    for expression, answer in held_out:
        by_length.setdefault(len(expression), []).append((expression, answer))
    for group in by_length.values():
        prompts = torch.tensor([tokenizer.encode(f"<|user|>{expression}=<|assistant|>") for expression, _ in group])
        out = model.generate(
            prompts,
            max_new_tokens=200,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        for (expression, answer), ids in zip(group, out[:, prompts.shape[1] :], strict=True):
            text = tokenizer.decode(ids).split("<|end|>")[0]
            right.setdefault((len(expression) + 1) // 2, []).append(text.endswith(f"#### {answer}"))
    table = {terms: sum(hits) / len(hits) for terms, hits in sorted(right.items())}
    table[0] = sum(map(sum, right.values())) / num_problems
    return table


def load_weights(model: Path) -> dict[str, Tensor]:
    """The tensors of a model directory that ``save_checkpoint`` wrote, in fp32."""
    return {name: tensor.float() for name, tensor in load_file(model / "model.safetensors").items()}


def save_checkpoint(
    weights: dict[str, Tensor], config: dict[str, Any], tokenizer: PreTrainedTokenizerFast, out: Path
) -> None:
    """A Hugging Face checkpoint directory in bf16, with what vLLM and the trainer read from ``config.json``."""
    out.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in weights.items()},
        out / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = config | {
        "rope_theta": config["rope_parameters"]["rope_theta"],
        "torch_dtype": "bfloat16",
        "dtype": "bfloat16",
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    tokenizer.save_pretrained(out)
