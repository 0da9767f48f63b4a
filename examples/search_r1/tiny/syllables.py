"""The MTP example's tokenizer with a token for each syllable of an invented name, such as ``Vo`` and ``da``."""

from __future__ import annotations

from facts import CONSONANTS, VOWELS
from tokenizer import CHARACTERS, CHAT_TEMPLATE, CONTROL
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, and one for each consonant with a vowel behind it: 244 tokens in all."""
    pairs = [(c, v) for consonant in CONSONANTS for c in (consonant, consonant.lower()) for v in VOWELS]
    tokens = [*CONTROL, *CHARACTERS, *("".join(pair) for pair in pairs)]
    backend = Tokenizer(
        models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=pairs, unk_token="<|unk|>")
    )
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(CONTROL)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<|pad|>", unk_token="<|unk|>", eos_token="<|end|>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
