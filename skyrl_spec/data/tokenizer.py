"""A model's tokenizer, checked against the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from skyrl_spec.errors import ConfigError


def load_tokenizer(directory: Path, setting: str, vocab_size: int | None = None) -> Any:
    """The tokenizer in ``directory``, which ``setting`` names.

    Raises:
        ConfigError: there is none, or it has tokens beyond the model's ``vocab_size``, or no end token.
    """
    from transformers import AutoTokenizer

    where = f"{setting}={directory}"
    # Without files transformers makes an empty one.
    if not any(directory.glob("tokenizer*")):
        raise ConfigError(f"{where}: has no tokenizer; copy the tokenizer's files")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    # Of a file that is missing or broken it raises whatever its reader does.
    except Exception as error:
        reason = " ".join(str(error).split())[:120]
        raise ConfigError(f"{where}: its tokenizer cannot be loaded ({reason}); copy the tokenizer's files") from None
    largest = max(tokenizer.get_vocab().values(), default=0)
    if vocab_size is not None and largest >= vocab_size:
        raise ConfigError(
            f"{where}: its tokenizer has token {largest}, the model's vocabulary ends at {vocab_size - 1}; "
            "put the model's own tokenizer there"
        )
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"{where}: its tokenizer has no end token; add eos_token to tokenizer_config.json")
    return tokenizer
