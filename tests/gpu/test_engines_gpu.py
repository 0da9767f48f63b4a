"""A weight sync between real trainers and vLLM engines on CUDA devices, and training steps on two of them.

What one GPU can show without Ray and vLLM is in the checks of the GPU pack (``gpu_checks.py``).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import ray
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny_checkpoints import make_batch, make_config, write_model
from training import DRAFTS, Record, Setup, assert_trains, bf16_model, loss_shares, num_different, train

from skyrl_spec.controller.placement import start_actors
from skyrl_spec.controller.shifts import Shifts
from skyrl_spec.rollout.actor import RolloutActor, actor_options
from skyrl_spec.rollout.engine_settings import EngineSettings
from skyrl_spec.settings.schema import Config, SamplingConfig
from skyrl_spec.sync.weights import WeightSync
from skyrl_spec.types import SpecCounters

needs_cuda = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch.cuda.is_available() is False"),
]
needs_two = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.device_count() < 2, reason=f"needs two CUDA devices; there are {torch.cuda.device_count()}"
    ),
]
NUM_DEPTHS = 3


DEVICES = ["cpu", pytest.param("cuda", marks=needs_two)]


def train_on_ranks(setup: Setup, path: Path, folder: Path) -> list[Record]:
    """What each rank has afterwards."""
    folder.mkdir()
    mp.spawn(_train_rank, args=(setup, path, folder), nprocs=setup.tp)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(setup.tp)]


def _train_rank(rank: int, setup: Setup, path: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.save(train(setup, path, rank, dist.FileStore(f"{folder}/store", setup.tp)), folder / f"rank{rank}.pt")


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("device", DEVICES)
def test_three_bf16_steps_on_two_devices_against_fp32_on_one_cpu(tmp_path: Path, device: str, draft: str) -> None:
    path = bf16_model(tmp_path, draft)
    (reference,) = train_on_ranks(Setup("cpu", dtype="fp32", draft=draft), path, tmp_path / "reference")
    for record in train_on_ranks(Setup(device, tp=2, draft=draft), path, tmp_path / "bf16"):
        shares = loss_shares(record, reference)
        assert max(shares.values()) < 1.0, shares


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("device", DEVICES)
def test_the_draft_changes_no_bit_of_the_policy_on_two_devices(tmp_path: Path, device: str, draft: str) -> None:
    path = write_model(tmp_path / "model", draft)
    with_draft = train_on_ranks(Setup(device, tp=2, draft=draft), path, tmp_path / "on")
    without = train_on_ranks(Setup(device, tp=2, draft=None), path, tmp_path / "off")
    for on, off in zip(with_draft, without, strict=True):
        assert_trains(on)
        assert num_different(on, off) == 0


PROMPTS = ([9], [3, 4, 5, 6, 7], list(range(10, 40)))
GREEDY = SamplingConfig(temperature=0.0, max_generate_length=24)


class Answers(NamedTuple):
    """Greedy tokens and log-probs of every prompt, and what the draft did meanwhile."""

    token_ids: list[list[int]]
    logprobs: list[list[float]]
    counters: SpecCounters


def ask(engine: Any) -> Answers:
    """A prompt at a time, so that what is in a batch does not vary."""
    before: SpecCounters = ray.get(engine.spec_counters.remote(), timeout=300)
    generations = [ray.get(engine.generate.remote([prompt], GREEDY, 1, 0), timeout=300)[0][0] for prompt in PROMPTS]
    return Answers(
        [generation.token_ids for generation in generations],
        [generation.logprobs for generation in generations],
        ray.get(engine.spec_counters.remote()) - before,
    )


def ask_around_a_sync(config: Config, settings: EngineSettings, exported: Path) -> tuple[Answers, list[Answers]]:
    """Answers of an engine before all got the weights of ten training steps, and of each after; exports them too."""
    engines, policy = start_actors(config, settings, total_optimizer_steps=10)
    old = ask(engines.handles[0])
    for _ in range(10):
        policy.train_mini_batch(make_batch(seed=0))
    sync = WeightSync(policy, engines, backend=settings.weight_sync_backend, components=["policy", "draft"])
    assert sync.sync() > 0
    synced = [ask(engine) for engine in engines.handles]
    policy.save_hf(exported)
    engines.shutdown()
    policy.shutdown()
    return old, synced


def check_sync(device: str, folder: Path, backend: str, num_shared: int = 0) -> None:
    """Engines that got trained weights from workers answer, and draft, like one that is built from them.

    With ``num_shared`` there are as many tensor-parallel workers, and an engine on the GPU of each.
    """
    config = shared_config(device, folder, num_shared)
    settings = tiny_engine(config, backend)
    old, answers = ask_around_a_sync(config, settings, folder / "trained")
    assert_answers_like_a_fresh_engine(answers, settings, folder / "trained")
    assert all(synced.token_ids != old.token_ids for synced in answers)


def shared_config(device: str, folder: Path, num_shared: int) -> Config:
    """A tiny model with its MTP head, whose weights move far in a few steps."""
    config = make_config(bf16_model(folder, "mtp"), dtype="bf16", tp=max(1, num_shared))
    config.trainer.placement.device = device
    config.trainer.placement.colocate_all = num_shared > 0
    config.generator.inference_engine.num_engines = max(1, num_shared)
    config.trainer.policy.optimizer_config.lr = config.trainer.mtp.optimizer_config.lr = 1e-2
    return config


def tiny_engine(config: Config, backend: str) -> EngineSettings:
    device = config.trainer.placement.device
    return EngineSettings(
        model_path=config.trainer.policy.model.path,
        device=device,
        max_model_len=64,
        max_num_seqs=4,
        gpu_memory_utilization=0.3,
        enforce_eager=True,
        speculative_config={"method": "mtp", "num_speculative_tokens": NUM_DEPTHS},
        weight_sync_backend=backend,
        num_threads=1 if device == "cpu" else None,
    )


def assert_answers_like_a_fresh_engine(answers: list[Answers], settings: EngineSettings, trained: Path) -> None:
    built = replace(settings, model_path=str(trained))
    actor_class: Any = RolloutActor
    fresh_engine = actor_class.options(**actor_options(built)).remote(built)
    fresh = ask(fresh_engine)
    ray.kill(fresh_engine)
    for synced in answers:
        assert synced.token_ids == fresh.token_ids
        # A stale draft would leave the tokens right and be seen here alone.
        assert synced.counters == fresh.counters
        assert synced.counters.num_accepted_tokens > 0, "drafts of which none is accepted tell nothing"
        for mine, theirs in zip(synced.logprobs, fresh.logprobs, strict=True):
            assert mine == pytest.approx(theirs, abs=1e-3)


@pytest.mark.parametrize("level", [pytest.param(level, marks=needs_cuda) for level in (1, 2)])
def test_worker_and_engine_take_turns_on_one_gpu(tmp_path: Path, ray_cluster: None, level: int) -> None:
    """Three cycles of sleep, training, sync and waking. Then the engine answers like one built from the weights.

    What a sleeping engine loses here, tests/rollout/sleeping_engine.py stands in for on a CPU.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        pytest.skip("needs the vllm package built for CUDA; the one installed is for another device")
    config = shared_config("cuda", tmp_path, 1)
    config.generator.inference_engine.sleep_level = level
    settings = replace(tiny_engine(config, "ipc"), sleep_level=level, synced=("policy", "draft"))
    engines, policy = start_actors(config, settings, total_optimizer_steps=10)
    sync = WeightSync(policy, engines, backend="ipc", components=["policy", "draft"])
    shifts = Shifts(config, engines, policy, sync)
    shifts.begin()
    for step in range(3):
        with shifts.workers():
            policy.train_mini_batch(make_batch(seed=step))
        with shifts.sync():
            sync.sync(draft=step == 2)
        assert ask(engines.handles[0]).counters.num_draft_tokens > 0
    synced = ask(engines.handles[0])
    with shifts.scoring():
        policy.save_hf(tmp_path / "trained")
    engines.shutdown()
    policy.shutdown()
    assert_answers_like_a_fresh_engine([synced], replace(settings, sleep_level=0), tmp_path / "trained")


@pytest.mark.parametrize(
    ("backend", "num_shared"),
    [
        pytest.param("nccl", 0, marks=needs_two),
        pytest.param("ipc", 1, marks=needs_cuda),
        pytest.param("ipc", 2, marks=needs_two),
    ],
)
def test_a_synced_engine_equals_a_fresh_one(tmp_path: Path, ray_cluster: None, backend: str, num_shared: int) -> None:
    """``nccl`` from another GPU, ``ipc`` on the GPU that worker and engine share."""
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        pytest.skip("needs the vllm package built for CUDA; the one installed is for another device")
    check_sync("cuda", tmp_path, backend, num_shared)
