"""Makes the tiny Qwen3-MoE model of this example: a supervised warm start on the demonstrations of ``arithmetic_mtp``.

    python examples/arithmetic_moe/make_model.py --out examples/arithmetic_moe/model --minutes 25

transformers' loss of the experts' load is a part of the warm start. It takes all layers together. The vocabulary has
more rows than the tokenizer has tokens: the first of them is the draft's mask token.
"""

from __future__ import annotations

import sys
from pathlib import Path

# The task, its tokenizer and the warm start are the other example's.
sys.path.append(str(Path(__file__).resolve().parents[1] / "arithmetic_mtp"))

import torch
from published_experts import experts_as_published
from tokenizer import build_tokenizer
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from warm_start import (
    arguments,
    batches,
    cross_entropy,
    examples,
    fit,
    greedy_reward,
    optimizers,
    save_checkpoint,
)

VOCAB_ROWS = 128
LOAD_LOSS_WEIGHT = 0.01


def model_config() -> Qwen3MoeConfig:
    """8 layers x 160 wide, 8 experts of which a token has 2."""
    return Qwen3MoeConfig(
        vocab_size=VOCAB_ROWS,
        hidden_size=160,
        intermediate_size=256,
        moe_intermediate_size=128,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        initializer_range=0.02,
        router_aux_loss_coef=1.0,
    )


def losses(model: Qwen3MoeForCausalLM, ids: Tensor, labels: Tensor) -> list[Tensor]:
    """Next-token loss, and the load's: the number of experts of a token if the load is even."""
    outputs = model(ids, output_router_logits=True)
    return [cross_entropy(outputs.logits, labels, 1), outputs.aux_loss]


def main() -> None:
    args = arguments(__doc__, minutes=25)
    tokenizer = build_tokenizer()
    model = Qwen3MoeForCausalLM(model_config())
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.mlp.gate.weight, std=model.config.initializer_range)
    if args.start:
        model = Qwen3MoeForCausalLM.from_pretrained(args.start, dtype=torch.float32)

    def save() -> None:
        # Names of published files, which transformers reads too.
        experts = {"num_experts": model.config.num_experts, "architectures": ["Qwen3MoeForCausalLM"]}
        config = {name: value for name, value in model.config.to_dict().items() if name != "num_local_experts"}
        save_checkpoint(experts_as_published(model.state_dict()), config | experts, tokenizer, args.out)

    def look() -> None:
        print("  greedy reward by terms (0: all):", greedy_reward(model, tokenizer, 128), flush=True)
        save()

    fit(
        lambda ids, labels: losses(model, ids, labels),
        [1.0, LOAD_LOSS_WEIGHT],
        optimizers(model),
        batches(examples(tokenizer, args.seed, args.words), args.tokens_per_batch, tokenizer.pad_token_id),
        args.minutes,
        look,
    )
    save()
    print("greedy reward by terms (0: all):", greedy_reward(model, tokenizer, 512))


if __name__ == "__main__":
    main()
