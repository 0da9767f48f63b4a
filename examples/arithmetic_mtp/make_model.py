"""Makes the tiny MiMo-architecture model of this example: supervised warm start of trunk and MTP head together.

    python examples/arithmetic_mtp/make_model.py --out examples/arithmetic_mtp/model --minutes 40

MiMo was pre-trained with its MTP head, so the trunk learns to carry what the head needs; the warm start does the
same (the head's loss reaches the trunk here, and only here). Everything is plain PyTorch and transformers.
"""

from __future__ import annotations

from pathlib import Path

import torch
from mtp_reference import MtpHead
from tokenizer import build_tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from warm_start import (
    arguments,
    batches,
    cross_entropy,
    examples,
    fit,
    greedy_reward,
    load_weights,
    optimizers,
    save_checkpoint,
)

PREFIX = "model.mtp_layers.0."

NUM_DEPTHS = 7
MTP_LOSS_WEIGHT = 0.15


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


def losses(model: Qwen2ForCausalLM, head: MtpHead, num_depths: int, ids: Tensor, labels: Tensor) -> list[Tensor]:
    """Next-token loss of the trunk, then of each depth of the head."""
    captured: list[Tensor] = []
    handle = model.model.norm.register_forward_pre_hook(lambda _module, inputs: captured.append(inputs[0]))
    logits = model(ids).logits
    handle.remove()
    outputs = head(captured[0], model.model.embed_tokens(ids), num_depths)
    all_logits = [logits, *(model.lm_head(output) for output in outputs)]
    return [cross_entropy(depth_logits, labels, depth) for depth, depth_logits in enumerate(all_logits, start=1)]


def head_optimizers(head: MtpHead) -> list[torch.optim.Optimizer]:
    """AdamW for the head alone. The trunk stays as it is."""
    return [torch.optim.AdamW(head.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0)]


def build_model(config: Qwen2Config, start: Path | None) -> tuple[Qwen2ForCausalLM, MtpHead]:
    """Trunk and head with random weights, or with those of the model in ``start``."""
    model, head = Qwen2ForCausalLM(config), MtpHead(config)
    for module in head.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=config.initializer_range)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
    if start:
        weights = load_weights(start)
        head.load_state_dict({name.removeprefix(PREFIX): weights.pop(name) for name in list(weights) if PREFIX in name})
        model.load_state_dict(weights)
    return model, head


def save_model(model: Qwen2ForCausalLM, head: MtpHead, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Writes both as one MiMo checkpoint."""
    weights = dict(model.state_dict())
    weights |= {PREFIX + name: tensor for name, tensor in head.state_dict().items()}
    mimo = {"architectures": ["MiMoForCausalLM"], "model_type": "qwen2", "num_nextn_predict_layers": 1}
    save_checkpoint(weights, model.config.to_dict() | mimo | {"attention_bias": True}, tokenizer, out)


def main() -> None:
    args = arguments(__doc__, minutes=40, depths=NUM_DEPTHS)
    tokenizer = build_tokenizer()
    model, head = build_model(model_config(len(tokenizer)), args.start)
    model.requires_grad_(not args.head_only)

    def look() -> None:
        print("  greedy reward by terms (0: all):", greedy_reward(model, tokenizer, 128), flush=True)
        save_model(model, head, tokenizer, args.out)

    fit(
        lambda *batch: losses(model, head, args.depths, *batch),
        [0.0 if args.head_only else 1.0] + [MTP_LOSS_WEIGHT] * args.depths,
        head_optimizers(head) if args.head_only else optimizers(model, head.parameters()),
        batches(examples(tokenizer, args.seed, args.words), args.tokens_per_batch, tokenizer.pad_token_id),
        args.minutes,
        look,
    )
    save_model(model, head, tokenizer, args.out)
    print("greedy reward by terms (0: all):", greedy_reward(model, tokenizer, 512))


if __name__ == "__main__":
    main()
