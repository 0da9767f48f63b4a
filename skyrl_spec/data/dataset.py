"""Rows of dataset files, and tokenized prompts made from them.

A row has the fields of SkyRL's datasets: ``prompt`` (chat messages), ``env_class``, and fields that its environment
reads (``reward_spec``, ``extra_info``, ``data_source``, ...).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from skyrl_spec.errors import ConfigError
from skyrl_spec.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]


@dataclass(frozen=True)
class LoadedPrompts:
    """Prompts in file order, and the number of prompts that were skipped because they are too long."""

    prompts: list[Prompt]
    num_skipped: int


def read_rows(path: str | Path, *, setting: str = "data.train_data", takes_turns: bool = False) -> Iterator[Row]:
    """Rows of a ``.parquet`` or ``.jsonl`` file as plain Python values.

    Fields that are None are removed, because parquet gives every row the fields of all rows. With ``takes_turns``, a
    row may have ``turns`` in place of a prompt, a list of the user's texts, as in MT-Bench and SPEED-Bench. The first
    becomes the prompt.

    Raises:
        ConfigError: the file is missing, empty, of another type, or cannot be read; the ``prompt`` of a row is missing
            or not a list of ``{role, content}``; or a text is no Unicode. The line names ``setting``, the file, the row
            from 1 and the field.
    """
    path = Path(path)
    if path.suffix not in _READERS:
        raise ConfigError(f"{setting}={path}: must end in {' or '.join(_READERS)}; convert the file")
    if not path.is_file():
        raise ConfigError(f"{setting}={path}: no such file; correct the path or create the file")
    is_empty = True
    for number, raw in _READERS[path.suffix](path, setting):
        is_empty = False
        where = f"{setting}={path}: row {number}"
        try:
            yield _checked(raw, where, takes_turns=takes_turns)
        except RecursionError:
            raise ConfigError(f"{where}: is nested too deeply; rewrite it") from None
    if is_empty:
        raise ConfigError(f"{setting}={path}: has no rows; give a file with at least one row")


def _checked(raw: Row, where: str, *, takes_turns: bool) -> Row:
    row = _without_none(raw)
    if takes_turns and "prompt" not in row and isinstance(row.get("turns"), list):
        row["prompt"] = [{"role": "user", "content": text} for text in row["turns"][:1]]
    _check_texts(row, where)
    _check_prompt(row, where)
    return row


def load_prompts(
    paths: Iterable[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_length: int,
    default_env_class: str,
    setting: str,
    template_kwargs: Mapping[str, Any] | None = None,
) -> LoadedPrompts:
    """All rows of ``paths`` as prompts, tokenized with the chat template and its generation prompt.

    ``template_kwargs`` are further arguments of the template.

    Prompts of more than ``max_prompt_length`` tokens are skipped and counted. The uid of a prompt is the row's
    ``extra_info.index``, or ``file:row`` without one. A repeated uid gets ``#`` and the row's number among all rows.

    Raises:
        ConfigError: ``read_rows`` fails, ``paths`` is empty, the tokenizer has no chat template, the template refuses
            a prompt, or all prompts are too long.
    """
    paths = [Path(path) for path in paths]
    if not paths:
        raise ConfigError(f"{setting}=[]: must name at least one .parquet or .jsonl file; add one")
    if tokenizer.chat_template is None:
        raise ConfigError(
            f"trainer.policy.model.path={tokenizer.name_or_path}: its tokenizer has no chat template; "
            "add one to tokenizer_config.json"
        )
    prompts: list[Prompt] = []
    uids: set[str] = set()
    num_rows = 0
    for path in paths:
        for index_in_file, row in enumerate(read_rows(path, setting=setting), start=1):
            num_rows += 1
            token_ids = _tokenize(
                tokenizer, row["prompt"], f"{setting}={path}: row {index_in_file}", template_kwargs or {}
            )
            if len(token_ids) > max_prompt_length:
                continue
            uid = row_id(row) or f"{path}:{index_in_file}"
            uid = f"{uid}#{num_rows}" if uid in uids else uid
            uids.add(uid)
            prompts.append(_prompt(uid, token_ids, row, default_env_class))
    if not prompts:
        raise ConfigError(
            f"trainer.max_prompt_length={max_prompt_length}: all {num_rows} prompts of {setting} are longer; raise it"
        )
    return LoadedPrompts(prompts, num_rows - len(prompts))


def _prompt(uid: str, token_ids: list[int], row: Row, default_env_class: str) -> Prompt:
    extras = {name: value for name, value in row.items() if name not in ("prompt", "env_class")}
    return Prompt(uid, token_ids, row["prompt"], row.get("env_class", default_env_class), extras)


def row_id(row: Row) -> str | None:
    """``extra_info.index`` as text. None if the row has none."""
    extra_info = row.get("extra_info")
    index = extra_info.get("index") if isinstance(extra_info, dict) else None
    return None if index is None else str(index)


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], where: str, template_kwargs: Mapping[str, Any]
) -> list[int]:
    try:
        token_ids: Any = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False, **template_kwargs
        )
    # A template raises to refuse messages, such as a system message that the model was not trained on. It may stumble
    # over messages of a form that it was not written for, with any exception.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{where}: the model's chat template refuses the prompt ({reason}); fix the row") from error
    return token_ids


def _read_jsonl(path: Path, setting: str) -> Iterator[tuple[int, Row]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            # Invalid JSON, invalid UTF-8, or lists in lists without end.
            except (ValueError, RecursionError) as error:
                raise ConfigError(
                    f"{setting}={path}: row {number} is not JSON in UTF-8 ({error}); fix the row"
                ) from error
            if not isinstance(row, dict):
                raise ConfigError(
                    f"{setting}={path}: row {number} must be a JSON object, but is {line[:40]!r}; fix the row"
                )
            yield number, row


def _read_parquet(path: Path, setting: str) -> Iterator[tuple[int, Row]]:
    try:
        number = 0
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{setting}={path}: cannot be read as parquet ({reason}); write it again") from error


_READERS = {".parquet": _read_parquet, ".jsonl": _read_jsonl}


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_none(item) for name, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_none(item) for item in value]
    return value


def _check_prompt(row: Row, where: str) -> None:
    if "prompt" not in row:
        raise ConfigError(f"{where} has no field prompt (fields: {', '.join(row) or 'none'}); add the chat messages")
    prompt = row["prompt"]
    if not isinstance(prompt, list) or not prompt:
        shown = repr(prompt)[:60]
        raise ConfigError(f"{where}: prompt must be a list of {{role, content}} texts, but is {shown}; rewrite it")
    for number, message in enumerate(prompt):
        if not isinstance(message, dict):
            raise _wrong(f"{where}: prompt[{number}]", "an object {role, content}", message)
        # A turn that calls tools may have no text.
        fields = ("role",) if "content" not in message and message.get("tool_calls") else ("role", "content")
        for field in fields:
            if not isinstance(message.get(field), str):
                raise _wrong(f"{where}: prompt[{number}].{field}", "text", message.get(field))
    if not isinstance(row.get("env_class", ""), str):
        raise _wrong(f"{where}: env_class", "the name of an environment", row["env_class"])


def _check_texts(value: Any, where: str, field: str = "") -> None:
    """Refuses texts that cannot be written as UTF-8. JSON can hold half of a pair of code units."""
    if isinstance(value, dict):
        for name, item in value.items():
            _check_texts(name, where, "the name of a field")
            _check_texts(item, where, f"{field}.{name}" if field else name)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            _check_texts(item, where, f"{field}[{number}]")
    elif isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(
                f"{where}: {field} has a lone surrogate, \\u{ord(value[error.start]):04x}, at character "
                f"{error.start}; rewrite it"
            ) from None


def _wrong(where: str, allowed: str, value: Any) -> ConfigError:
    shown = "missing" if value is None else ascii(value)[:60]
    return ConfigError(f"{where} must be {allowed}, but is {shown}; rewrite it")
