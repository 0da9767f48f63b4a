"""A character-level tokenizer with a chat template: printable ASCII, newline and a few control tokens.

Tokens are written in the byte-level alphabet (a space is ``Ġ``). transformers makes a ``Qwen2Tokenizer`` of every
tokenizer beside a ``qwen2`` model, and that class drops what is not in this alphabet.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
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
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    characters = [byte_level.pre_tokenize_str(character)[0][0] for character in CHARACTERS]
    tokens = [*CONTROL, *characters, *("".join(pair) for pair in pairs)]
    vocab = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=list(pairs), unk_token="<|unk|>"))
    backend.pre_tokenizer, backend.decoder = byte_level, decoders.ByteLevel()
    backend.add_special_tokens(CONTROL)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<|pad|>", unk_token="<|unk|>", eos_token="<|end|>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
