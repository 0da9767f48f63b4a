"""The shipped Qwen3 models and their DFlash drafts: trainer, synced engine and a plain vLLM process agree.

Draft tokens of the Megatron draft are those of vLLM's drafter over whole responses, before and after training and a
sync; what was exported is served by a vLLM that knows nothing of the run, with the same acceptance.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch
from ray.actor import ActorHandle
from recording import DflashRecorder
from trainer_actor import TrainerActor

from skyrl_spec.controller.engines import EngineGroup
from skyrl_spec.controller.workers import PolicyGroup
from skyrl_spec.data.dataset import load_prompts
from skyrl_spec.rollout.actor import actor_options
from skyrl_spec.rollout.engine_settings import EngineSettings
from skyrl_spec.settings.compose import load_config
from skyrl_spec.settings.schema import Config, SamplingConfig
from skyrl_spec.sync.weights import WeightSync
from skyrl_spec.types import SpecCounters

ROOT = Path(__file__).resolve().parents[2]
K = 7
# fp32 on two implementations.
TOLERANCE = 1e-4
RESPONSE_LENGTH = 60
MIN_BLOCKS = 200
# The mixture's responses are short.
NUM_PROMPTS = {"cpu_dflash_grpo": 80, "cpu_moe_dflash_grpo": 128}

# Script as a user of an exported draft would write it.
PLAIN_VLLM = """
import json, sys
from vllm import LLM, SamplingParams, TokensPrompt

model, draft, prompts, length = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])
llm = LLM(
    model,
    dtype="float32",
    max_model_len=256,
    max_num_seqs=64,
    enforce_eager=True,
    kv_cache_memory_bytes=2**28,
    disable_log_stats=False,
    speculative_config={"method": "dflash", "model": draft, "num_speculative_tokens": 7},
)
params = SamplingParams(temperature=0.0, max_tokens=length)
outputs = llm.generate([TokensPrompt(prompt_token_ids=ids) for ids in prompts], params, use_tqdm=False)
counters = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
prefix = "vllm:spec_decode_num_"
result = {name: counters[prefix + name] for name in ("drafts", "accepted_tokens")}
print("RESULT", json.dumps(result | {"tokens": [list(output.outputs[0].token_ids) for output in outputs]}))
"""


@pytest.fixture(scope="module", params=["cpu_dflash_grpo", "cpu_moe_dflash_grpo"])
def config(request: pytest.FixtureRequest) -> Config:
    one_rank = "trainer.policy.megatron_config.expert_model_parallel_size=1"
    config = load_config([f"experiment={request.param}", "trainer.dflash.num_speculative_tokens=7", one_rank])
    config.trainer.policy.model.path = str(ROOT / config.trainer.policy.model.path)
    config.trainer.dflash.path = str(ROOT / config.trainer.dflash.path)
    config.trainer.policy.optimizer_config.lr = config.trainer.dflash.optimizer_config.lr = 1e-3
    return config


@pytest.fixture(scope="module")
def prompts(config: Config) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(config.trainer.policy.model.path)
    path = ROOT / config.data.val_data[0]
    loaded = load_prompts([str(path)], tokenizer, max_prompt_length=32, default_env_class="gsm8k", setting="data")
    # Several lengths: three to six terms.
    return [prompt.token_ids for prompt in loaded.prompts[: NUM_PROMPTS[config.trainer.run_name]]]


@pytest.fixture(scope="module")
def pair(
    config: Config, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None
) -> Iterator[tuple[ActorHandle, ActorHandle]]:
    settings = EngineSettings(
        model_path=config.trainer.policy.model.path,
        dtype="fp32",
        device="cpu",
        max_model_len=200,
        max_num_seqs=64,
        enforce_eager=True,
        speculative_config={"method": "dflash", "model": config.trainer.dflash.path, "num_speculative_tokens": K},
        weight_sync_backend="ray",
        num_threads=1,
        cpu_kvcache_space=0.25,
    )
    engine = ray.remote(DflashRecorder).options(**actor_options(settings)).remote(settings)
    trainer = TrainerActor.options(num_cpus=0).remote(config, tmp_path_factory.mktemp("trainer") / "store")
    yield engine, trainer
    ray.kill(engine)
    ray.kill(trainer)


def _assert_agreement(engine: ActorHandle, trainer: ActorHandle, prompts: list[list[int]]) -> None:
    num_blocks = 0
    for prompt in prompts:
        response = ray.get(engine.draft.remote(prompt, RESPONSE_LENGTH), timeout=300)
        logits = ray.get(
            trainer.drafted_logits.remote(response.token_ids, [block.anchor for block in response.blocks]), timeout=300
        )
        for block, mine in zip(response.blocks, logits, strict=True):
            assert (block.logits - mine).abs().max() < TOLERANCE, (len(prompt), block.anchor)
            assert torch.equal(block.logits.argmax(-1), mine.argmax(-1)), (len(prompt), block.anchor)
        num_blocks += len(response.blocks)
    assert len({len(prompt) for prompt in prompts}) >= 3
    assert num_blocks >= MIN_BLOCKS


def _acceptance(engine: ActorHandle, prompts: list[list[int]]) -> tuple[SpecCounters, list[list[int]]]:
    """Greedy responses to all prompts, in one batch."""
    sampling = SamplingConfig(max_generate_length=RESPONSE_LENGTH, temperature=0.0)
    before = ray.get(engine.spec_counters.remote())
    generations = ray.get(engine.generate.remote(prompts, sampling, 1, 0), timeout=300)
    return ray.get(engine.spec_counters.remote()) - before, [group[0].token_ids for group in generations]


def _plain_vllm(model: Path, draft: Path, prompts: list[list[int]]) -> dict[str, object]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "VLLM_", "OMP_NUM_THREADS"))}
    process = subprocess.run(
        [sys.executable, "-c", PLAIN_VLLM, str(model), str(draft), json.dumps(prompts), str(RESPONSE_LENGTH)],
        env=kept | {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        cwd=model,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    lines = [line for line in process.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, process.stderr[-3000:]
    return json.loads(lines[0].removeprefix("RESULT "))


def test_trainer_engine_and_a_plain_vllm_agree_before_and_after_a_sync(
    pair: tuple[ActorHandle, ActorHandle], prompts: list[list[int]], tmp_path: Path
) -> None:
    engine, trainer = pair
    _assert_agreement(engine, trainer, prompts)
    before, _ = _acceptance(engine, prompts)
    assert before.mean_acceptance_length >= 3.5, "the shipped draft is worse than it was"
    # Random tokens and advantages change the policy and the draft.
    ray.get([trainer.train.remote(seed) for seed in range(2)])
    with pytest.raises(AssertionError):
        _assert_agreement(engine, trainer, prompts)
    policy = PolicyGroup([trainer], [(0, 0)], timeout_s=300)
    sync = WeightSync(policy, EngineGroup([engine], timeout_s=300), backend="ray", components=["policy", "draft"])
    assert sync.sync() > 0
    _assert_agreement(engine, trainer, prompts)

    synced, tokens = _acceptance(engine, prompts)
    assert synced.num_accepted_tokens != before.num_accepted_tokens
    policy.save_hf(tmp_path)
    plain = _plain_vllm(tmp_path / "model", tmp_path / "draft", prompts)
    assert plain["tokens"] == tokens
    assert (plain["drafts"], plain["accepted_tokens"]) == (synced.num_drafts, synced.num_accepted_tokens)
