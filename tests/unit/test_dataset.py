"""Rows of both types of dataset files, prompts made from them, and errors about bad files."""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from skyrl_spec.data.dataset import LoadedPrompts, load_prompts, read_rows
from skyrl_spec.errors import ConfigError

EXAMPLE = Path(__file__).parents[2] / "examples" / "arithmetic_mtp"


def load_module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return load_module(EXAMPLE / "tokenizer.py").build_tokenizer()


def row(text: str = "1+2=", **fields: Any) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": text}], **fields}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        # In parquet a field of some rows becomes a field of all rows.
        pq.write_table(pa.Table.from_struct_array(pa.array(rows)), path)
    else:
        path.write_text("".join(json.dumps(item) + "\n" for item in rows))
    return path


def load(tokenizer: PreTrainedTokenizerFast, *paths: Path, max_prompt_length: int = 64) -> LoadedPrompts:
    return load_prompts(
        paths,
        tokenizer,
        max_prompt_length=max_prompt_length,
        default_env_class="gsm8k",
        setting="data.train_data",
    )


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_rows_come_back_the_same_from_both_kinds(tmp_path: Path, suffix: str) -> None:
    rows = [
        row(reward_spec={"ground_truth": "3"}, extra_info={"index": 0, "tags": ["a", "b"]}),
        row(env_class="aime", extra_info={"index": 1, "weight": 0.5}),
    ]
    assert list(read_rows(write(tmp_path / f"rows{suffix}", rows))) == rows


def test_numpy_values_become_plain_python(tmp_path: Path) -> None:
    import pandas as pd

    frame = pd.DataFrame({"prompt": [row()["prompt"]], "scores": [np.arange(3)], "nothing": [None], "n": [np.int64(7)]})
    frame.to_parquet(tmp_path / "rows.parquet")
    (found,) = read_rows(tmp_path / "rows.parquet")
    assert found == row(scores=[0, 1, 2], n=7)
    assert type(found["n"]) is int
    assert type(found["scores"]) is list


def test_prompts_are_templated_and_carry_the_rest_of_the_row(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write(tmp_path / "rows.jsonl", [row("7-2=", env_class="aime", reward_spec={"ground_truth": "5"}), row()])
    first, second = load(tokenizer, path).prompts
    assert tokenizer.decode(first.token_ids) == "<|user|>7-2=<|assistant|>"
    assert first.messages == [{"role": "user", "content": "7-2="}]
    assert first.extras == {"reward_spec": {"ground_truth": "5"}}
    assert (first.env_class, second.env_class) == ("aime", "gsm8k")
    assert (first.uid, second.uid) == (f"{path}:1", f"{path}:2")


def test_uids_are_unique_over_files(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [row(extra_info={"index": i % 2}) for i in range(3)]
    paths = [write(tmp_path / name, rows) for name in ("a.jsonl", "b.parquet")]
    assert [prompt.uid for prompt in load(tokenizer, *paths).prompts] == ["0", "1", "0#3", "0#4", "1#5", "0#6"]


def test_long_prompts_are_skipped_and_counted(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    # Two control tokens, and one token per character.
    path = write(tmp_path / "rows.jsonl", [row("x" * length) for length in (1, 7, 8, 9, 30)])
    loaded = load(tokenizer, path, max_prompt_length=10)
    assert [len(prompt.token_ids) for prompt in loaded.prompts] == [3, 9, 10]
    assert loaded.num_skipped == 2
    with pytest.raises(ConfigError, match=r"trainer\.max_prompt_length=2: all 5 prompts of data\.train_data"):
        load(tokenizer, path, max_prompt_length=2)


def invalid_utf8(path: Path) -> None:
    path.write_bytes(json.dumps(row()).encode() + b'\n{"prompt": "\xff"}\n')


BAD_FILES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "missing": ("a.jsonl", lambda path: None, "no such file"),
    "extension": ("a.csv", lambda path: path.write_text("x"), "must end in .parquet or .jsonl"),
    "empty jsonl": ("a.jsonl", lambda path: path.write_text("\n"), "has no rows"),
    "empty parquet": ("a.parquet", lambda path: pq.write_table(pa.table({"prompt": []}), path), "has no rows"),
    "no parquet": ("a.parquet", lambda path: path.write_text("hello"), "cannot be read as parquet"),
    "no json": ("a.jsonl", lambda path: path.write_text(json.dumps(row()) + "\n{oops\n"), "row 2 is not JSON"),
    "no utf8": ("a.jsonl", invalid_utf8, "row 2 is not JSON in UTF-8"),
    "no object": ("a.jsonl", lambda path: path.write_text("[1]\n"), "row 1 must be a JSON object"),
    "no prompt": ("a.parquet", lambda path: write(path, [{"question": "1+1"}]), "row 1 has no field prompt"),
    "null prompt": ("a.jsonl", lambda path: write(path, [row(), {"prompt": None}]), "row 2 has no field prompt"),
    "text prompt": ("a.jsonl", lambda path: write(path, [{"prompt": "1+1"}]), "must be a list of {role, content}"),
    "no role": (
        "a.jsonl",
        lambda path: write(path, [{"prompt": [{"content": "1"}]}]),
        "prompt[0].role must be text, but is missing",
    ),
    "no message": ("a.jsonl", lambda path: write(path, [{"prompt": []}]), "must be a list of {role, content}"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_answered_by_one_line(tmp_path: Path, case: str) -> None:
    name, make, expected = BAD_FILES[case]
    path = tmp_path / name
    make(path)
    with pytest.raises(ConfigError) as caught:
        list(read_rows(path, setting="data.val_data"))
    message = str(caught.value)
    assert message.startswith(f"data.val_data={path}: ")
    assert expected in message
    assert "\n" not in message


def test_templates_that_refuse_are_answered_by_one_line(tmp_path: Path) -> None:
    tokenizer = load_module(EXAMPLE / "tokenizer.py").build_tokenizer()
    path = write(tmp_path / "rows.jsonl", [row()])
    tokenizer.chat_template = "{{ raise_exception('no user here') }}"
    with pytest.raises(ConfigError, match=r"row 1: the model's chat template refuses the prompt \(no user here\)"):
        load(tokenizer, path)
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="has no chat template"):
        load(tokenizer, path)
    with pytest.raises(ConfigError, match=r"data\.train_data=\[\]"):
        load(tokenizer)


def test_example_files_are_what_the_script_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    make_data = load_module(EXAMPLE / "make_data.py")
    splits = make_data.splits()
    assert not set(splits["train"]) & set(splits["validation"])
    for split, pairs in splits.items():
        rows = [make_data.row(*pair, split, index) for index, pair in enumerate(pairs)]
        assert list(read_rows(EXAMPLE / "data" / f"{split}.jsonl")) == rows
        assert list(read_rows(EXAMPLE / "data" / f"{split}.parquet")) == rows


def test_example_splits_share_no_problem(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [
        {prompt.messages[0]["content"] for prompt in load(tokenizer, EXAMPLE / "data" / f"{split}.parquet").prompts}
        for split in ("train", "validation")
    ]
    assert [len(split) for split in texts] == [4096, 128]
    assert not texts[0] & texts[1]


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ({"prompt": [{"role": "user", "content": "a\ud800b"}]}, "prompt[0].content has a lone surrogate, \\ud800, at"),
        (row() | {"extra_info": {"tags": ["ok", "\udfff"]}}, "extra_info.tags[1] has a lone surrogate, \\udfff, at"),
        (row() | {"\ud800": 1}, "the name of a field has a lone surrogate"),
        (row(env_class=3), "env_class must be the name of an environment, but is 3"),
        (row(env_class=["gsm8k"]), "env_class must be the name of an environment, but is ['gsm8k']"),
        (
            {"prompt": [{"role": "user", "content": "1"}, None]},
            "prompt[1] must be an object {role, content}, but is missing",
        ),
        (
            {"prompt": [*row()["prompt"], {"role": "user", "content": None}]},
            "prompt[1].content must be text, but is missing",
        ),
        ({"prompt": [{"role": 1, "content": "1"}]}, "prompt[0].role must be text, but is 1"),
        ({"prompt": [{"role": "user", "content": ["1"]}]}, "prompt[0].content must be text, but is ['1']"),
        ({"prompt": [{"content": "1"}]}, "prompt[0].role must be text, but is missing"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_the_line_names_the_message_and_the_field(content: dict[str, Any], place: str, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [row(), content])
    with pytest.raises(ConfigError) as caught:
        list(read_rows(path))
    assert str(caught.value).startswith(f"data.train_data={path}: row 2: {place}")
    str(caught.value).encode()


def test_a_turn_that_calls_tools_needs_no_text(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": "{}"}}]}
    path = write(tmp_path / "rows.jsonl", [{"prompt": [*row()["prompt"], call, {"role": "tool", "content": "3"}]}])
    (found,) = read_rows(path)
    assert found["prompt"][1] == {name: value for name, value in call.items() if value is not None}
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content or m.tool_calls[0].function.name }}{% endfor %}"
    (prompt,) = load(tokenizer, path).prompts
    assert tokenizer.decode(prompt.token_ids) == "1+2=add3"


@pytest.mark.parametrize("template", ["{{ messages[0].content + 1 }}", "{{ messages[9].x.y }}", "{{ raise('no') }}"])
def test_a_template_that_stumbles_is_named_with_the_row(
    template: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = template
    with pytest.raises(ConfigError, match=r"row 1: the model's chat template refuses the prompt \(.+\); fix the row"):
        load(tokenizer, write(tmp_path / "rows.jsonl", [row()]))


def test_a_row_nested_without_end(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for depth in (300, 900, 100_000):
        path.write_text('{"prompt": ' + "[" * depth + "]" * depth + "}\n")
        with pytest.raises(ConfigError, match="row 1"):
            list(read_rows(path))


def test_arguments_reach_the_chat_template(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = "{{ messages[0].content }}{% if enable_thinking is false %}0{% endif %}"
    path = write(tmp_path / "rows.jsonl", [row("1")])
    texts = []
    for arguments in ({}, {"enable_thinking": False}):
        loaded = load_prompts(
            [path],
            tokenizer,
            max_prompt_length=9,
            default_env_class="gsm8k",
            setting="data.train_data",
            template_kwargs=arguments,
        )
        texts.append(tokenizer.decode(loaded.prompts[0].token_ids))
    assert texts == ["1", "10"]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "tool_calls", "index", "ground_truth"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]) | VALUES, "content": st.text() | VALUES})
    | VALUES,
    max_size=3,
)
FIELDS = {"env_class": VALUES, "extra_info": VALUES, "reward_spec": VALUES, "data_source": VALUES, "turns": VALUES}


@settings(max_examples=700, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.fixed_dictionaries({}, optional={"prompt": MESSAGES | VALUES, **FIELDS}))
def test_no_row_gives_a_traceback(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, content: dict[str, Any]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(content) + "\n")
    line = ""
    try:
        load(tokenizer, path, max_prompt_length=10**6)
    except ConfigError as error:
        line = str(error)
    assert not line or line.startswith(f"data.train_data={path}: ")
    assert len(line.splitlines()) <= 1
