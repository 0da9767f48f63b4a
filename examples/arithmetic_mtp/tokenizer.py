"""A character-level tokenizer with a chat template: printable ASCII, newline and a few control tokens."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

CONTROL = [
    "<|pad|>",
    "<|unk|>",
    "<|end|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|reserved_0|>",
    "<|reserved_1|>",
]
CHARACTERS = ["\n", *(chr(code) for code in range(32, 127))]

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build_tokenizer(pairs: Sequence[tuple[str, str]] = ()) -> PreTrainedTokenizerFast:
    """One token a character, and one for each of ``pairs`` of characters. Without pairs 104 tokens in all."""
    tokens = [*CONTROL, *CHARACTERS, *("".join(pair) for pair in pairs)]
    vocab = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=list(pairs), unk_token="<|unk|>"))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(CONTROL)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<|pad|>", unk_token="<|unk|>", eos_token="<|end|>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
