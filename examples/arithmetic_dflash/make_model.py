"""Makes the tiny Qwen3 model of this example: a supervised warm start on the demonstrations of ``arithmetic_mtp``.

    python examples/arithmetic_dflash/make_model.py --out examples/arithmetic_dflash/model --minutes 25

The vocabulary has more rows than the tokenizer has tokens, as Qwen3's has: the first of them is the draft's mask token.
"""

from __future__ import annotations

import sys
from pathlib import Path

# The task, its tokenizer and the warm start are the other example's.
sys.path.append(str(Path(__file__).resolve().parents[1] / "arithmetic_mtp"))

from tokenizer import build_tokenizer
from transformers import Qwen3Config, Qwen3ForCausalLM
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

VOCAB_ROWS = 128


def model_config() -> Qwen3Config:
    """12 layers x 192 wide: deep and narrow, so that a draft pays off on a CPU too (decoding is latency bound)."""
    return Qwen3Config(
        vocab_size=VOCAB_ROWS,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=12,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        initializer_range=0.02,
    )


def main() -> None:
    args = arguments(__doc__, minutes=25)
    tokenizer = build_tokenizer()
    model = Qwen3ForCausalLM(model_config())
    if args.start:
        model.load_state_dict(load_weights(args.start))

    def save() -> None:
        config = model.config.to_dict() | {"architectures": ["Qwen3ForCausalLM"]}
        save_checkpoint(model.state_dict(), config, tokenizer, args.out)

    def look() -> None:
        print("  greedy reward by terms (0: all):", greedy_reward(model, tokenizer, 128), flush=True)
        save()

    fit(
        lambda ids, labels: [cross_entropy(model(ids).logits, labels, 1)],
        [1.0],
        optimizers(model),
        batches(examples(tokenizer, args.seed, args.words), args.tokens_per_batch, tokenizer.pad_token_id),
        args.minutes,
        look,
    )
    save()
    print("greedy reward by terms (0: all):", greedy_reward(model, tokenizer, 512))


if __name__ == "__main__":
    main()
