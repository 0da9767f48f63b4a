"""Prompts of an evaluation, from rows of a dataset or from a text file with one prompt per line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from skyrl_spec.data.dataset import read_rows
from skyrl_spec.errors import ConfigError
from skyrl_spec.types import Prompt

Messages = list[dict[str, str]]
# Field of a row that says what kind of task it is.
CATEGORY = "category"


def load(paths: Sequence[str], tokenizer: Any, max_prompt_length: int) -> list[Prompt]:
    """Prompts of at most ``max_prompt_length`` tokens, formatted with the tokenizer's chat template if it has one.

    The category of a row is in the prompt's ``extras``.

    Raises:
        ConfigError: ``paths`` is empty, a file cannot be read, or all prompts are too long.
    """
    if not paths:
        raise ConfigError("prompts=[]: must name at least one .parquet, .jsonl or .txt file; write prompts=FILE")
    rows = [row for path in paths for row in _read(path)]
    prompts = []
    for number, (messages, category) in enumerate(rows, start=1):
        token_ids = _tokenize(tokenizer, messages)
        if 0 < len(token_ids) <= max_prompt_length:
            extras = {} if category is None else {CATEGORY: category}
            prompts.append(Prompt(str(number), token_ids, messages, "", extras))
    if not prompts:
        raise ConfigError(
            f"max_prompt_length={max_prompt_length}: all {len(rows)} prompts of {', '.join(paths)} are longer; raise it"
        )
    return prompts


def by_category(prompts: Sequence[Prompt]) -> dict[str, list[Prompt]]:
    """Prompts that have a category, by category in alphabetical order."""
    categories = sorted({prompt.extras[CATEGORY] for prompt in prompts if CATEGORY in prompt.extras})
    return {name: [prompt for prompt in prompts if prompt.extras.get(CATEGORY) == name] for name in categories}


def _read(path: str) -> Iterator[tuple[Messages, str | None]]:
    """Messages and category."""
    if not path.endswith(".txt"):
        for row in read_rows(path, setting="prompts", takes_turns=True):
            yield row["prompt"], None if (category := row.get(CATEGORY)) is None else str(category)
        return
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"prompts={path}: cannot be read ({reason}); give a text file in UTF-8") from None
    if not any(map(str.strip, lines)):
        raise ConfigError(f"prompts={path}: has no text; write one prompt per line")
    for line in lines:
        if line.strip():
            yield [{"role": "user", "content": line}], None


def _tokenize(tokenizer: Any, messages: Messages) -> list[int]:
    if tokenizer.chat_template is None:
        return tokenizer.encode("\n".join(message.get("content", "") for message in messages))
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
