"""Makes the tiny Qwen3 model of this example: a supervised warm start on the demonstrations of ``arithmetic_mtp``.

    python examples/arithmetic_dflash/make_model.py --out examples/arithmetic_dflash/model --minutes 25

The vocabulary has more rows than the tokenizer has tokens, as Qwen3's has: the first of them is the draft's mask token.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

# The task, its tokenizer and the warm start are the other example's.
sys.path.append(str(Path(__file__).resolve().parents[1] / "arithmetic_mtp"))

import torch
from safetensors.torch import save_file
from tokenizer import build_tokenizer
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from warm_start import batches, cross_entropy, examples, fit, greedy_reward, optimizers

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


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """A Qwen3 checkpoint directory in bf16: config, weights, tokenizer."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | {
        "architectures": ["Qwen3ForCausalLM"],
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
    parser.add_argument("--minutes", type=float, default=25.0)
    parser.add_argument("--tokens-per-batch", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    tokenizer = build_tokenizer()
    model = Qwen3ForCausalLM(model_config())

    def look() -> None:
        print("  greedy reward by terms (0: all):", greedy_reward(model, tokenizer, 128), flush=True)
        save(model, tokenizer, args.out)

    fit(
        lambda ids, labels: [cross_entropy(model(ids).logits, labels, 1)],
        [1.0],
        optimizers(model),
        batches(examples(tokenizer, args.seed), args.tokens_per_batch, tokenizer.pad_token_id),
        args.minutes,
        look,
    )
    save(model, tokenizer, args.out)
    print("greedy reward by terms (0: all):", greedy_reward(model, tokenizer, 512))


if __name__ == "__main__":
    main()
