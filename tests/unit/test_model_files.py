"""What is read of a model's directory: its files of weights, a tied head, and the entries of config.json."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoConfig

from skyrl_spec.errors import ConfigError
from skyrl_spec.models.conversion import HfTensors
from skyrl_spec.specs.dflash import parse_dflash_spec
from skyrl_spec.specs.entries import Entries
from skyrl_spec.specs.files import INDEX, read_config, read_shapes, stray_files, weight_files
from skyrl_spec.specs.model import EMBEDDING, OUTPUT_HEAD, Experts, parse_spec, require_tied_head

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
# The entries of experts are transformers' defaults, unless a test changes them.
MIXTURE = QWEN3 | {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}
QWEN2 = {name: value for name, value in QWEN3.items() if name != "head_dim"} | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
}
DFLASH = json.loads((EXAMPLES / "arithmetic_dflash" / "draft" / "config.json").read_text())


def directory(tmp_path: Path, files: dict[str, dict[str, float]], index: list[str] | None = None) -> Path:
    """A checkpoint of tensors with one number each. ``index`` lists files."""
    for name, tensors in files.items():
        save_file({key: torch.full((2,), value) for key, value in tensors.items()}, tmp_path / name)
    if index is not None:
        weight_map = {key: name for name in index for key in files.get(name, {"missing": 0.0})}
        (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tmp_path


def test_a_leftover_shard_beside_an_index_is_not_read(tmp_path: Path) -> None:
    path = directory(
        tmp_path,
        {"model-1-of-2.safetensors": {"a": 1.0}, "model-2-of-2.safetensors": {"b": 2.0}, "old.safetensors": {"a": 9.0}},
        index=["model-1-of-2.safetensors", "model-2-of-2.safetensors"],
    )
    assert [file.name for file in weight_files(path, "x")] == ["model-1-of-2.safetensors", "model-2-of-2.safetensors"]
    assert stray_files(path, "x") == ["old.safetensors"]
    assert HfTensors(path)["a"].tolist() == [1.0, 1.0]
    assert read_shapes(path, "x") == {"a": (2,), "b": (2,)}


def test_one_file_of_any_name_is_the_checkpoint(tmp_path: Path) -> None:
    path = directory(tmp_path, {"weights.safetensors": {"a": 1.0}})
    assert HfTensors(path).names() == ["a"]
    assert stray_files(path, "x") == []


@pytest.mark.parametrize(
    ("files", "index", "message"),
    [
        ({}, None, "has no *.safetensors"),
        ({"model.safetensors": {"a": 1.0}, "adapter_model.safetensors": {"b": 1.0}}, None, "load adapter_model"),
        ({"model-1-of-2.safetensors": {"a": 1.0}, "model-2-of-2.safetensors": {"b": 1.0}}, None, "copy the index"),
        ({"model-1-of-2.safetensors": {"a": 1.0}}, ["model-1-of-2.safetensors", "model-2-of-2.safetensors"], "missing"),
        (
            {"model.safetensors": {"a": 1.0}, "m-1.safetensors": {"a": 1.0}},
            ["m-1.safetensors"],
            "remove one of the two",
        ),
    ],
    ids=["none", "a stray adapter", "no index", "a missing shard", "both forms"],
)
def test_files_that_transformers_and_vllm_would_not_read_alike_are_refused(
    files: dict[str, dict[str, float]], index: list[str] | None, message: str, tmp_path: Path
) -> None:
    path = directory(tmp_path, files, index)
    with pytest.raises(ConfigError) as caught:
        weight_files(path, "trainer.policy.model.path")
    assert str(caught.value).startswith(f"trainer.policy.model.path={path}: ")
    assert message in str(caught.value)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "\x00"])
def test_an_index_that_cannot_be_read(content: str, tmp_path: Path) -> None:
    path = directory(tmp_path, {"model.safetensors": {"a": 1.0}})
    (path / INDEX).write_text(content)
    with pytest.raises(ConfigError, match=r"cannot be read|remove one of the two"):
        weight_files(path, "x")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", ["equal", "missing", "differs", "another type"])
def test_a_tied_head_must_be_the_embedding(dtype: torch.dtype, change: str, tmp_path: Path) -> None:
    embedding = torch.randn(6, 4).to(dtype)
    head = {"differs": embedding + 1, "another type": embedding.double()}.get(change, embedding.clone())
    tensors = {EMBEDDING: embedding, "model.norm.weight": torch.ones(4)}
    save_file(tensors | ({} if change == "missing" else {OUTPUT_HEAD: head}), tmp_path / "model.safetensors")
    tied, untied = (parse_spec(tmp_path, QWEN3 | {"tie_word_embeddings": is_tied}) for is_tied in (True, False))
    require_tied_head(str(tmp_path), untied)
    if change in ("equal", "missing"):
        require_tied_head(str(tmp_path), tied)
        return
    with pytest.raises(ConfigError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight; set tie_word"):
        require_tied_head(str(tmp_path), tied)


def both(config: dict[str, Any], tmp_path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What this project and transformers read."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours, theirs = parse_spec(tmp_path, read_config(tmp_path)), AutoConfig.from_pretrained(tmp_path)
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    names = {
        "vocab_size": theirs.vocab_size,
        "hidden_size": theirs.hidden_size,
        "ffn_hidden_size": theirs.intermediate_size,
        "num_layers": theirs.num_hidden_layers,
        "num_heads": theirs.num_attention_heads,
        "num_kv_heads": theirs.num_key_value_heads,
        "head_dim": head_dim,
        "rms_norm_eps": theirs.rms_norm_eps,
        "rope_theta": theirs.rope_parameters["rope_theta"],
        "max_position_embeddings": theirs.max_position_embeddings,
        "tie_word_embeddings": theirs.tie_word_embeddings,
    }
    found = {name: getattr(ours, name) for name in names}
    if theirs.model_type != "qwen3_moe":
        return found | {"experts": ours.experts}, names | {"experts": None}
    experts = Experts(
        theirs.num_experts, theirs.num_experts_per_tok, theirs.moe_intermediate_size, theirs.norm_topk_prob
    )
    return found | {"experts": ours.experts}, names | {"experts": experts}


@pytest.mark.parametrize("base", [QWEN2, QWEN3, MIXTURE], ids=["qwen2", "qwen3", "mixture"])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"rope_theta": None, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        {"rope_parameters": {"rope_type": "default"}},
        {"rope_scaling": {"rope_type": "default", "rope_theta": 3e5}, "rope_parameters": {"rope_theta": 5e5}},
        {"rope_scaling": None, "rope_parameters": {"rope_theta": 5e5}},
        {"rope_scaling": {"rope_type": "default"}, "rope_parameters": {"rope_theta": 5e5}},
        {"num_key_value_heads": None},
        {"head_dim": 8},
        {"tie_word_embeddings": True},
        {"rope_theta": 500000},
    ],
    ids=lambda change: ",".join(f"{name}={value}" for name, value in change.items()) or "as it is",
)
def test_every_entry_is_read_as_transformers_reads_it(
    base: dict[str, Any], change: dict[str, Any], tmp_path: Path
) -> None:
    if base is MIXTURE and "num_key_value_heads" in change:
        pytest.skip("transformers refuses null in a mixture")
    config = {name: value for name, value in (base | change).items() if value is not None or name != "rope_theta"}
    ours, theirs = both(config, tmp_path)
    assert ours == theirs


@pytest.mark.parametrize(
    "change",
    [
        {"num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "norm_topk_prob": True},
        {"num_local_experts": 16},
        {"num_local_experts": 16, "num_experts": 16, "mlp_only_layers": [], "decoder_sparse_step": 1},
    ],
    ids=["published", "newer name", "both names"],
)
def test_experts_are_read_as_transformers_reads_them(change: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = both(MIXTURE | change, tmp_path)
    assert ours == theirs


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mlp_only_layers": [0]}, "mlp_only_layers=[0] in config.json is not supported"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step=2 in config.json is not supported"),
        ({"attention_bias": True}, "attention_bias=True in config.json is not supported"),
        ({"num_experts": 4, "num_experts_per_tok": 8}, "num_experts_per_tok=8 in config.json is above num_experts=4"),
        ({"num_experts": "4"}, "num_experts='4' in config.json must be an integer of at least 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_mixtures_are_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        parse_spec(tmp_path, MIXTURE | change)


def test_a_head_size_that_is_missing_is_that_of_the_class(tmp_path: Path) -> None:
    for base in (QWEN2, *({name: one[name] for name in one if name != "head_dim"} for one in (QWEN3, MIXTURE))):
        ours, theirs = both(base, tmp_path)
        assert ours == theirs


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rope_parameters": {"rope_theta": 5e5}}, ("rope_theta=500000.0 inside", "10000.0 beside", "500000.0 counts")),
        ({"rope_scaling": {"rope_theta": 1e4}, "rope_parameters": {"rope_theta": 5e5}}, ("rope_scaling counts",)),
        ({"dtype": "bfloat16", "torch_dtype": "float32"}, ("bfloat16 and float32",)),
    ],
    ids=["theta", "two sections", "two types"],
)
def test_a_contradiction_is_said(change: dict[str, Any], words: tuple[str, ...]) -> None:
    (line,) = Entries(QWEN3 | change, "").contradictions()
    assert all(word in line for word in words)
    assert Entries(QWEN3, "").contradictions() == []


@pytest.mark.parametrize("name", ["mtp/model", "dflash/model", "dflash/draft", "moe/model", "moe/draft"])
def test_the_examples_contradict_nothing(name: str) -> None:
    path = EXAMPLES / f"arithmetic_{name}"
    assert Entries(read_config(path), "").contradictions() == []
    assert stray_files(path, "x") == []


@pytest.mark.parametrize(
    "change",
    [
        {"partial_rotary_factor": 0.5},
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}},
        {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_rotary_embedding_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not supported"):
        parse_spec(tmp_path, QWEN3 | change)


ANY = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 2**70)
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["Qwen3ForCausalLM", "DFlashDraftModel", "default", "yarn"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["rope_theta", "rope_type", "type", "mask_token_id", "target_layer_ids", "causal", "x"]),
            inner,
        )
    ),
    max_leaves=6,
)


def fuzzed(config: dict[str, Any], parse: Callable[[Path, dict[str, Any]], object], data: st.DataObject) -> None:
    """``parse`` takes the config with up to three entries changed or missing, or refuses it with a line."""
    names = st.sampled_from([*sorted(config), "rope_parameters", "rope_scaling", "dflash_config", "layer_types"])
    changed = config | data.draw(st.dictionaries(names, ANY, min_size=1, max_size=3))
    for name in data.draw(st.lists(names, max_size=1)):
        changed.pop(name, None)
    line = ""
    try:
        parse(Path("model"), changed)
        Entries(changed, "trainer.policy.model.path=model").contradictions()
    except ConfigError as error:
        line = str(error)
    assert not line or line.startswith(("trainer.policy.model.path=model: ", "trainer.dflash.path=model: "))
    assert len(line.splitlines()) <= 1


EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "norm_topk_prob": True}


@settings(max_examples=700)
@given(st.data())
def test_no_config_of_a_model_gives_a_traceback(data: st.DataObject) -> None:
    fuzzed(QWEN3, parse_spec, data)
    fuzzed(MIXTURE | EXPERTS, parse_spec, data)


@settings(max_examples=700)
@given(st.data())
def test_no_config_of_a_draft_gives_a_traceback(data: st.DataObject) -> None:
    fuzzed(DFLASH, parse_dflash_spec, data)


def test_bytes_are_compared_wherever_they_are(tmp_path: Path) -> None:
    """The embedding and the head in two files, in the middle of each."""
    embedding = torch.from_numpy(np.arange(12, dtype=np.float32).reshape(3, 4))
    save_file({"a": torch.ones(5), EMBEDDING: embedding, "z": torch.ones(3)}, tmp_path / "m-1.safetensors")
    save_file({"b": torch.ones(7), OUTPUT_HEAD: embedding, "y": torch.ones(2)}, tmp_path / "m-2.safetensors")
    weight_map = {"a": "m-1.safetensors", "b": "m-2.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    require_tied_head(str(tmp_path), parse_spec(tmp_path, QWEN3 | {"tie_word_embeddings": True}))
    embedding[2, 3] += 1
    save_file({"b": torch.ones(7), OUTPUT_HEAD: embedding, "y": torch.ones(2)}, tmp_path / "m-2.safetensors")
    with pytest.raises(ConfigError, match=r"lm_head\.weight differs"):
        require_tied_head(str(tmp_path), parse_spec(tmp_path, QWEN3 | {"tie_word_embeddings": True}))


def test_a_line_break_in_a_value_does_not_break_the_line() -> None:
    with pytest.raises(ConfigError) as refused:
        parse_spec(Path("model"), QWEN3 | {"architectures": ["Qwen\r3"]})
    assert str(refused.value).startswith("trainer.policy.model.path=model: architecture Qwen 3 is not supported; use")
    assert len(str(refused.value).splitlines()) == 1
