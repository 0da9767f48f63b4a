"""The MTP example's tokenizer with a token for each syllable of an invented name, such as ``Vo`` and ``da``."""

from __future__ import annotations

from facts import CONSONANTS, VOWELS
from tokenizer import build_tokenizer
from transformers import PreTrainedTokenizerFast


def build_syllable_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, and one for each consonant with a vowel behind it: 244 tokens in all."""
    return build_tokenizer([(c, v) for consonant in CONSONANTS for c in (consonant, consonant.lower()) for v in VOWELS])
