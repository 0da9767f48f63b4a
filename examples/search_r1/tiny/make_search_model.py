"""Makes the tiny model of this example: the MTP example's shape and tokenizer, warm-started on searches and guesses.

    cd examples/search_r1/tiny
    python make_search_model.py --out model --words 0.9 --minutes 10                     # stopped after 8
    python make_search_model.py --out model --start model --depths 0 --words 1 --minutes 11 --tokens-per-batch 1536
    python make_search_model.py --out model --start model --words 0.15 --minutes 4 --tokens-per-batch 1536

The second command, stopped after 4 minutes, trains the trunk alone: it copies names within minutes then, which it did
not learn beside the head's losses. The third one guesses in most cases, as the example's policy does at first.

The places of its demonstrations are invented anew and are in no corpus: the model learns how to search and to read
what is found, not what the corpus says.
"""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Iterator
from pathlib import Path

# The tokenizer and the warm start are those of the MTP example.
sys.path.append(str(Path(__file__).resolve().parents[2] / "arithmetic_mtp"))

import torch
from facts import RELATIONS, answer, invented_name, observation, places, question, search
from make_model import MTP_LOSS_WEIGHT, build_model, losses, model_config, save_model
from syllables import build_syllable_tokenizer
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from warm_start import arguments, batches, fit, optimizers

NUM_DEPTHS = 3
END = "<|end|>"


def small_config(vocab_size: int) -> Qwen2Config:
    """Half of the MTP example's layers, each two thirds as wide."""
    config = model_config(vocab_size)
    config.hidden_size, config.intermediate_size = 128, 384
    config.num_hidden_layers, config.num_attention_heads = 6, 4
    config.layer_types = config.layer_types[:6]
    return config


def turns(seed: int, share: float) -> Iterator[tuple[str, str]]:
    """Endless (text in front of a turn, turn). A share of the conversations searches."""
    rng = random.Random(seed)
    for place in places(seed):
        relation = rng.choice(RELATIONS)
        prompt = f"<|user|>{question(place, relation)}<|assistant|>"
        if rng.random() < share:
            first = search(place) + END
            found = f"{prompt}{first}<|user|>{observation(place.passage)}<|assistant|>"
            yield prompt, first
            yield found, answer(place.facts[relation]) + END
        else:
            yield prompt, answer(invented_name(rng, rng.choice((1, 2)))) + END


def examples(tokenizer: PreTrainedTokenizerFast, seed: int, share: float) -> Iterator[tuple[list[int], list[int]]]:
    for before, turn in turns(seed, share):
        yield tokenizer.encode(before), tokenizer.encode(turn)


@torch.no_grad()
def right_readings(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, num_places: int) -> tuple[float, float]:
    """Shares of right searches, where one is begun, and of right answers to what was found."""
    right = [0, 0]
    for number, place in enumerate(itertools.islice(places(777_000_000), num_places)):
        relation = RELATIONS[number % len(RELATIONS)]
        prompt = f"<|user|>{question(place, relation)}<|assistant|>"
        found = f"{prompt}{search(place)}{END}<|user|>{observation(place.passage)}<|assistant|>"
        wanted = (prompt + "<search>", search(place)), (found, answer(place.facts[relation]))
        for index, (before, turn) in enumerate(wanted):
            ids = torch.tensor([tokenizer.encode(before)])
            out = model.generate(
                ids, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
            right[index] += tokenizer.decode(out[0]).endswith(turn + END)
    return right[0] / num_places, right[1] / num_places


def main() -> None:
    args = arguments(__doc__, minutes=20, depths=NUM_DEPTHS)
    tokenizer = build_syllable_tokenizer()
    model, head = build_model(small_config(len(tokenizer)), args.start)

    def look() -> None:
        print("  right searches and answers:", right_readings(model, tokenizer, 32), flush=True)
        save_model(model, head, tokenizer, args.out)

    fit(
        lambda *batch: losses(model, head, args.depths, *batch),
        [1.0] + [MTP_LOSS_WEIGHT] * args.depths,
        optimizers(model, head.parameters()),
        batches(examples(tokenizer, args.seed, args.words), args.tokens_per_batch, tokenizer.pad_token_id),
        args.minutes,
        look,
    )
    save_model(model, head, tokenizer, args.out)
    print("right searches and answers:", right_readings(model, tokenizer, 128))


if __name__ == "__main__":
    main()
