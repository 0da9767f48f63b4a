"""Tokenizer of a model, checked against the model."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from skyrl_spec.errors import ConfigError

# Directories that a warning named.
_SAID: set[Path] = set()
# What tokenizers of another kind lose or split otherwise.
_TEXT = 'River of Bes? 12+3=\n {"a": "b c"}'


def load_tokenizer(directory: Path, setting: str, vocab_size: int | None = None) -> Any:
    """The tokenizer in ``directory``, which is the value of ``setting``.

    Raises:
        ConfigError: it is missing or cannot be loaded, it has tokens beyond ``vocab_size``, or it has no end token.
    """
    from transformers import AutoTokenizer

    # Threads of the tokenizer would get signals that the main thread blocks while Ray starts. Ray's handler would then
    # end the process in them.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    where = f"{setting}={directory}"
    # Without these files transformers would make an empty tokenizer.
    if not any(directory.glob("tokenizer*")):
        raise ConfigError(f"{where}: has no tokenizer; copy the files of the tokenizer there")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    # For a missing or broken file transformers raises errors of many types.
    except Exception as error:
        reason = " ".join(str(error).split())[:120]
        raise ConfigError(f"{where}: its tokenizer cannot be loaded ({reason}); copy its files again") from None
    _warn_of_another_class(tokenizer, directory, where)
    largest = max(tokenizer.get_vocab().values(), default=0)
    if vocab_size is not None and largest >= vocab_size:
        raise ConfigError(
            f"{where}: its tokenizer has token {largest}, but the last token of the model is {vocab_size - 1}; "
            "use the tokenizer of this model"
        )
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"{where}: its tokenizer has no end token; add eos_token to tokenizer_config.json")
    return tokenizer


def _warn_of_another_class(tokenizer: Any, directory: Path, where: str) -> None:
    """Prints a line if transformers makes another tokenizer than the file describes.

    It takes the class of some model types (``qwen2``) whatever the tokenizer's own files say. Such a class may drop
    spaces from prompts, and nothing else shows that.
    """
    file = directory / "tokenizer.json"
    if directory in _SAID or not file.exists():
        return
    from tokenizers import Tokenizer

    own = Tokenizer.from_file(str(file)).encode(_TEXT, add_special_tokens=False).ids
    if tokenizer.encode(_TEXT, add_special_tokens=False) != own:
        _SAID.add(directory)
        print(
            f"skyrl-spec: warning: {where}: transformers loads it as {type(tokenizer).__name__}, which splits text "
            "unlike its tokenizer.json: spaces may be lost; give tokenizer.json a ByteLevel pre-tokenizer and decoder "
            "(as examples/arithmetic_mtp/tokenizer.py does), or another model_type to config.json",
            file=sys.stderr,
        )
