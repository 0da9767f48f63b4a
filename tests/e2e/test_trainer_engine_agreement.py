"""The same weights and tokens give the same numbers in the trainer, in vLLM and in transformers.

Draft logits are those of the training step's own forward pass and of vLLM's loaded drafter, at every depth up to k, for
several prompt lengths, before and after a sync; policy log-probs likewise.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.actor import ActorHandle
from tiny_checkpoints import make_config, write_checkpoint
from trainer_actor import TrainerActor
from transformers import Qwen2ForCausalLM

from skyrl_spec.controller.engines import EngineGroup
from skyrl_spec.controller.workers import PolicyGroup
from skyrl_spec.rollout.actor import EngineActor, actor_options
from skyrl_spec.rollout.engine_settings import EngineSettings
from skyrl_spec.settings.schema import SamplingConfig
from skyrl_spec.sync.weights import WeightSync

K = 4
PROMPT_LENGTHS = (1, 2, 7, 30)
# fp32 on two implementations.
TOLERANCE = 1e-4


@dataclass
class Drafted:
    """One block of vLLM's drafter: the tokens it saw and its logits ``[K, V]``."""

    token_ids: list[int]
    logits: torch.Tensor
    rollout_logprobs: list[float]


@ray.remote
class RecordingEngine(EngineActor):
    """An engine that keeps what its drafter computes."""

    def draft(self, prompt: list[int]) -> Drafted:
        """The drafter's first block after ``prompt``, greedily."""
        runner = self._llm.llm_engine.model_executor.driver_worker.worker.model_runner
        model, recorded = runner.drafter.model, []
        original = model.compute_logits

        def compute_logits(*args: Any, **kwargs: Any) -> torch.Tensor:
            logits = original(*args, **kwargs)
            recorded.append(logits[0].clone())
            return logits

        model.compute_logits = compute_logits
        try:
            sampling = SamplingConfig(max_generate_length=K + 2, temperature=0.0)
            generation = self.generate([prompt], sampling, n=1, seed=0)[0][0]
        finally:
            model.compute_logits = original
        logits = torch.stack(recorded[:K])
        # The sampled token, then the drafts that the next depth is fed with.
        tokens = [*prompt, generation.token_ids[0], *logits[:-1].argmax(-1).tolist()]
        return Drafted(tokens, logits, generation.logprobs[:1])


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None
) -> Iterator[tuple[ActorHandle, ActorHandle]]:
    path = write_checkpoint(tmp_path_factory.mktemp("agreement") / "model", tied=request.param)
    settings = EngineSettings(
        model_path=str(path),
        dtype="fp32",
        device="cpu",
        max_model_len=64,
        max_num_seqs=4,
        enforce_eager=True,
        speculative_config={"method": "mtp", "num_speculative_tokens": K},
        weight_sync_backend="ray",
        num_threads=1,
        cpu_kvcache_space=0.125,
    )
    engine = RecordingEngine.options(**actor_options(settings)).remote(settings)
    config = make_config(path)
    config.trainer.mtp.num_speculative_tokens = K
    config.trainer.policy.optimizer_config.lr = config.trainer.mtp.optimizer_config.lr = 1e-2
    trainer = TrainerActor.options(num_cpus=0).remote(config, path / "store")
    yield engine, trainer
    ray.kill(engine)
    ray.kill(trainer)


def _assert_agreement(engine: ActorHandle, trainer: ActorHandle) -> list[Drafted]:
    generator = torch.Generator().manual_seed(0)
    blocks = []
    for length in PROMPT_LENGTHS:
        prompt = torch.randint(2, 97, (length,), generator=generator).tolist()
        drafted = ray.get(engine.draft.remote(prompt), timeout=300)
        logits = ray.get(trainer.chain_logits.remote(drafted.token_ids, length - 1))
        for depth in range(K):
            assert (drafted.logits[depth] - logits[depth]).abs().max() < TOLERANCE, (length, depth + 1)
        logprob = ray.get(trainer.logprob.remote(drafted.token_ids[: length + 1]))
        assert drafted.rollout_logprobs[0] == pytest.approx(logprob, abs=TOLERANCE)
        blocks.append(drafted)
    return blocks


def test_trainer_engine_and_transformers_agree_before_and_after_a_sync(
    pair: tuple[ActorHandle, ActorHandle], tmp_path: Path
) -> None:
    engine, trainer = pair
    before = _assert_agreement(engine, trainer)
    ray.get([trainer.train.remote(seed) for seed in range(3)])
    with pytest.raises(AssertionError):
        _assert_agreement(engine, trainer)
    policy = PolicyGroup([trainer], [(0, 0)], timeout_s=300)
    sync = WeightSync(policy, EngineGroup([engine], timeout_s=300), backend="ray", components=["policy", "draft"])
    assert sync.sync() > 0
    assert sync.versions.policy == sync.versions.draft == 1
    after = _assert_agreement(engine, trainer)
    assert (before[0].logits - after[0].logits).abs().max() > 100 * TOLERANCE

    policy.save_hf(tmp_path)
    exported = Qwen2ForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    tokens = after[-1].token_ids[: PROMPT_LENGTHS[-1] + 1]
    with torch.no_grad():
        logprob = exported(torch.tensor([tokens])).logits[0, -2].log_softmax(-1)[tokens[-1]]
    assert float(logprob) == pytest.approx(after[-1].rollout_logprobs[0], abs=TOLERANCE)
