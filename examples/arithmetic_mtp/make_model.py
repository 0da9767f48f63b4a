"""Makes the tiny MiMo-architecture model of this example: supervised warm start of trunk and MTP head together.

    python examples/arithmetic_mtp/make_model.py --out examples/arithmetic_mtp/model --minutes 40

MiMo was pre-trained with its MTP head, so the trunk learns to carry what the head needs; the warm start does the
same (the head's loss reaches the trunk here, and only here). Everything is plain PyTorch and transformers.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from mtp_reference import MtpHead
from safetensors.torch import save_file
from task import demonstration, problems
from tokenizer import build_tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

NUM_DEPTHS = 3
MTP_LOSS_WEIGHT = 0.3
IGNORE = -100


def model_config(vocab_size: int) -> Qwen2Config:
    """12 layers x 192 wide: deep and narrow, so that a draft pays off on a CPU too (decoding is latency bound)."""
    return Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=12,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        initializer_range=0.02,
    )


def examples(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[tuple[list[int], list[int]]]:
    """Endless (prompt ids, response ids)."""
    rng = random.Random(seed)
    for expression, answer in problems(seed):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": f"{expression}="}], add_generation_prompt=True, return_dict=False
        )
        response = tokenizer.encode(demonstration(expression, answer, rng) + "<|end|>")
        yield prompt, response


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


def losses(model: Qwen2ForCausalLM, head: MtpHead, ids: Tensor, labels: Tensor) -> list[Tensor]:
    """Next-token loss of the trunk, then of each depth of the head."""
    captured: list[Tensor] = []
    handle = model.model.norm.register_forward_pre_hook(lambda _module, inputs: captured.append(inputs[0]))
    logits = model(ids).logits
    handle.remove()
    outputs = head(captured[0], model.model.embed_tokens(ids), NUM_DEPTHS)
    all_logits = [logits, *(model.lm_head(output) for output in outputs)]
    out = []
    for depth, depth_logits in enumerate(all_logits):
        shift = depth + 1
        out.append(
            F.cross_entropy(
                depth_logits[:, :-shift].flatten(0, 1).float(), labels[:, shift:].flatten(), ignore_index=IGNORE
            )
        )
    return out


def optimizers(model: Qwen2ForCausalLM, head: MtpHead) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for everything else."""
    blocks = [*model.model.layers.parameters(), *head.parameters()]
    matrices = [p for p in blocks if p.ndim == 2]
    rest = [p for p in blocks if p.ndim != 2] + [model.model.embed_tokens.weight, model.lm_head.weight]
    rest.append(model.model.norm.weight)
    return [
        torch.optim.Muon(matrices, lr=2e-3, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]


@torch.no_grad()
def greedy_reward(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, num_problems: int) -> dict[int, float]:
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
            max_new_tokens=72,
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


def save(model: Qwen2ForCausalLM, head: MtpHead, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """A MiMo checkpoint directory in bf16: config, weights with the MTP head, tokenizer."""
    out.mkdir(parents=True, exist_ok=True)
    weights = dict(model.state_dict())
    weights |= {f"model.mtp_layers.0.{name}": tensor for name, tensor in head.state_dict().items()}
    save_file(
        {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in weights.items()},
        out / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = model.config.to_dict() | {
        "architectures": ["MiMoForCausalLM"],
        "model_type": "qwen2",
        "num_nextn_predict_layers": 1,
        "attention_bias": True,
        "rope_theta": model.config.rope_parameters["rope_theta"],
        "torch_dtype": "bfloat16",
        "dtype": "bfloat16",
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=40.0)
    parser.add_argument("--tokens-per-batch", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    tokenizer = build_tokenizer()
    config = model_config(len(tokenizer))
    model = Qwen2ForCausalLM(config)
    head = MtpHead(config)
    for module in head.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=config.initializer_range)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
    opts = optimizers(model, head)
    base_lrs = [[group["lr"] for group in opt.param_groups] for opt in opts]
    params = [*model.parameters(), *head.parameters()]

    start, last_print, last_eval = time.monotonic(), 0.0, 0.0
    averages: list[float] | None = None
    data = batches(examples(tokenizer, args.seed), args.tokens_per_batch, tokenizer.pad_token_id)
    for step, (ids, labels) in enumerate(data):
        elapsed = time.monotonic() - start
        progress = elapsed / (60 * args.minutes)
        if progress >= 1:
            break
        # Linear warm-up, then a cosine over the time given.
        scale = min(1.0, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * progress) + 0.02)
        for opt, lrs in zip(opts, base_lrs, strict=True):
            for group, lr in zip(opt.param_groups, lrs, strict=True):
                group["lr"] = lr * scale
        policy_loss, *mtp_losses = losses(model, head, ids, labels)
        (policy_loss + MTP_LOSS_WEIGHT * sum(mtp_losses)).backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        values = [loss.item() for loss in (policy_loss, *mtp_losses)]
        averages = values if averages is None else [0.95 * a + 0.05 * v for a, v in zip(averages, values, strict=True)]
        if elapsed - last_print > 20:
            last_print = elapsed
            print(
                f"{elapsed / 60:6.1f} min  step {step:5d}  losses {' '.join(f'{a:.3f}' for a in averages)}", flush=True
            )
        if elapsed - last_eval > 240:
            last_eval = elapsed
            print("  greedy reward by terms (0: all):", greedy_reward(model, tokenizer, 128), flush=True)
            save(model, head, tokenizer, args.out)
    save(model, head, tokenizer, args.out)
    print("greedy reward by terms (0: all):", greedy_reward(model, tokenizer, 512))


if __name__ == "__main__":
    main()
