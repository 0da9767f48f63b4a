"""A model's tokenizer as transformers loads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from skyrl_spec.data.tokenizer import load_tokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"
MODELS = [EXAMPLES / name for name in ("arithmetic_mtp/model", "arithmetic_dflash/model", "search_r1/tiny/model")]
TEXT = '<|user|>river of Bes? 12+3=\n {"a": "b c"}<|end|>'


@pytest.mark.parametrize("directory", MODELS, ids=lambda path: path.parent.name)
def test_the_examples_tokenizers_keep_every_character(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = load_tokenizer(directory, "trainer.policy.model.path")
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("model_type", "is_warned"), [("qwen2", True), ("qwen3", False)])
def test_a_class_that_drops_spaces_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model_type: str, is_warned: bool
) -> None:
    tokens = ["<|end|>", *(chr(code) for code in range(32, 127)), "\n"]
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    backend.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    for _ in range(2):
        tokenizer = load_tokenizer(tmp_path, "trainer.policy.model.path")
    # What the line is about.
    assert (tokenizer.decode(tokenizer.encode("a b")) == "a b") is not is_warned
    said = capsys.readouterr().err
    assert said.count(f"warning: trainer.policy.model.path={tmp_path}: transformers loads it as") == is_warned
