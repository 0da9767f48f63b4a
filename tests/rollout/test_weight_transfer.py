"""An engine updated to other weights equals one built from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from engine_process import EngineProcess
from exact import assert_exact_logprobs, generate
from tiny_models import LONG_PROMPT, PROMPT, split_weights
from torch import Tensor
from updates import GREEDY, assert_equals_fresh, run, update

from skyrl_spec.settings.schema import SamplingConfig
from skyrl_spec.sync.payload import pack_chunks, pack_weights


@pytest.fixture(scope="module")
def updated(engine: EngineProcess, models_dir: Path) -> Iterator[EngineProcess]:
    """The engine built from ``w0``, which gets ``w0`` back at the end."""
    engine.init_weight_transfer_engine({})
    yield engine
    update_both(engine, models_dir / "w0")


@pytest.fixture(scope="module")
def fresh(start_engine: Callable[..., EngineProcess], models_dir: Path) -> EngineProcess:
    return start_engine(model_path=str(models_dir / "w1"))


def update_both(engine: EngineProcess, path: Path) -> None:
    for draft, weights in enumerate(split_weights(path)):
        update(engine, bool(draft), [pack_weights(weights.items())])
    engine.reset_prefix_cache()


def test_updated_engine_equals_a_fresh_one(updated: EngineProcess, fresh: EngineProcess, models_dir: Path) -> None:
    update_both(updated, models_dir / "w0")
    old, _ = run(updated)
    update_both(updated, models_dir / "w1")
    assert_equals_fresh(updated, fresh)
    assert [sample.token_ids for sample in run(updated)[0]] != [sample.token_ids for sample in old]


def test_chunked_update_equals_a_single_one(updated: EngineProcess, fresh: EngineProcess, models_dir: Path) -> None:
    update_both(updated, models_dir / "w0")
    for draft, weights in enumerate(split_weights(models_dir / "w1")):
        # In reverse order, with the shards of a fused layer in different chunks.
        chunks = list(pack_chunks(reversed(weights.items()), max_bytes=20_000))
        assert len(chunks) > 3
        update(updated, bool(draft), chunks)
    updated.reset_prefix_cache()
    assert_equals_fresh(updated, fresh)


def test_target_update_alone_leaves_the_draft_stale(
    updated: EngineProcess, fresh: EngineProcess, models_dir: Path
) -> None:
    update_both(updated, models_dir / "w0")
    target, draft = split_weights(models_dir / "w1")
    update(updated, False, [pack_weights(target.items())])
    updated.reset_prefix_cache()
    fresh.reset_prefix_cache()
    (samples, counters), (expected, expected_counters) = run(updated), run(fresh)
    # The output is still right. Only acceptance shows the difference.
    assert [sample.token_ids for sample in samples] == [sample.token_ids for sample in expected]
    assert counters.num_accepted_tokens < expected_counters.num_accepted_tokens
    update(updated, True, [pack_weights(draft.items())])
    updated.reset_prefix_cache()
    assert_equals_fresh(updated, fresh)


def test_prefix_cache_holds_old_keys_until_reset(updated: EngineProcess, models_dir: Path) -> None:
    update_both(updated, models_dir / "w0")
    run(updated)
    for draft, weights in enumerate(split_weights(models_dir / "w1")):
        update(updated, bool(draft), [pack_weights(weights.items())])
    sampling = SamplingConfig(max_generate_length=8)
    stale = generate(updated, [LONG_PROMPT], sampling, n=2, seed=0)[0]
    with pytest.raises(AssertionError):
        assert_exact_logprobs(stale, LONG_PROMPT, models_dir / "w1", sampling)
    updated.reset_prefix_cache()
    right = generate(updated, [LONG_PROMPT], sampling, n=2, seed=0)[0]
    assert_exact_logprobs(right, LONG_PROMPT, models_dir / "w1", sampling)


def test_bfloat16_weights_load_into_a_float32_engine(updated: EngineProcess, models_dir: Path) -> None:
    target, _ = split_weights(models_dir / "w1")
    rounded = {name: tensor.bfloat16() for name, tensor in target.items()}
    update(updated, False, [pack_weights(rounded.items())])
    from_bf16 = generate(updated, [PROMPT], GREEDY)[0][0]
    update(updated, False, [pack_weights((name, tensor.float()) for name, tensor in rounded.items())])
    from_fp32 = generate(updated, [PROMPT], GREEDY)[0][0]
    assert from_bf16.token_ids == from_fp32.token_ids
    assert from_bf16.logprobs == from_fp32.logprobs


@pytest.mark.parametrize("draft", [False, True], ids=["target", "draft"])
def test_bad_updates_name_the_tensor(
    updated: EngineProcess, fresh: EngineProcess, models_dir: Path, draft: bool
) -> None:
    weights = split_weights(models_dir / "w1")[draft]
    name = next(name for name in weights if name.endswith("self_attn.k_proj.weight"))
    foreign = next(iter(split_weights(models_dir / "w1")[not draft].items()))
    # vLLM itself would load the first rows of a tensor with too many.
    too_long = (name, torch.cat([weights[name], weights[name]]))

    def refuse(match: str, *named_tensors: tuple[str, Tensor]) -> None:
        updated.start_weight_update(draft)
        with pytest.raises(ValueError, match=match):
            updated.update_weights(pack_weights(named_tensors))

    model = "draft" if draft else "target"
    refuse(f"nonsense: not a tensor of the {model}", ("nonsense", torch.ones(2)))
    refuse(f"{foreign[0]}: not a tensor of the {model}", foreign)
    refuse(rf"{name}: shape \[64, 64\], but the {model} .* has \[32, 64\]", too_long)
    refuse(f"{name}: sent twice", (name, weights[name]), (name, weights[name]))

    updated.start_weight_update(draft)
    updated.update_weights(pack_weights((key, weights[key]) for key in weights if key != name))
    with pytest.raises(ValueError, match=f"lacks 1 tensors of the {model} .*: {name}"):
        updated.finish_weight_update()
    # The missing tensor can still be sent.
    updated.update_weights(pack_weights([(name, weights[name])]))
    updated.finish_weight_update()
    update_both(updated, models_dir / "w1")
    assert_equals_fresh(updated, fresh)


def test_a_broken_off_update_can_be_made_again(updated: EngineProcess, fresh: EngineProcess, models_dir: Path) -> None:
    update_both(updated, models_dir / "w0")
    target, _ = split_weights(models_dir / "w0")
    shard = next(name for name in target if name.endswith("self_attn.q_proj.weight"))
    updated.start_weight_update(False)
    # The interrupted update leaves a buffered shard of a fused layer, which must not count in the next update.
    updated.update_weights(pack_weights([(shard, target[shard])]))
    with pytest.raises(ValueError, match="nonsense"):
        updated.update_weights(pack_weights([("nonsense", torch.ones(2))]))
    update_both(updated, models_dir / "w1")
    assert_equals_fresh(updated, fresh)
