"""A sync over vLLM's ``ipc`` engine: real workers, real engines, vLLM's classes on both sides.

There is no GPU, so its memory, and nothing else, is files (``shared_memory_ipc``). tests/gpu has the real one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from engine_process import EngineProcess
from ray.actor import ActorHandle
from safetensors.torch import load_file
from tiny_checkpoints import make_batch, make_config, write_checkpoint

from skyrl_spec.controller.engines import EngineGroup
from skyrl_spec.controller.workers import PolicyGroup
from skyrl_spec.rollout.actor import EngineActor, actor_options
from skyrl_spec.rollout.engine import RolloutEngine
from skyrl_spec.rollout.engine_settings import EngineSettings, engine_environment
from skyrl_spec.settings.schema import SamplingConfig
from skyrl_spec.sync.weights import WeightSync
from skyrl_spec.training.worker import PolicyWorker
from skyrl_spec.types import SpecCounters

# Two ranks of one model replica, and an engine on the "GPU" of each.
WORLD_SIZE = 2
PROMPTS = ([9], [3, 4, 5, 6, 7], list(range(10, 40)))
GREEDY = SamplingConfig(temperature=0.0, max_generate_length=24)
# Small, so that an update takes many chunks and a tensor is larger than it.
BUFFER_BYTES = 30_000


@ray.remote
class IpcEngine(EngineActor):
    """A real engine that logs its updates: ``P`` policy, ``D`` draft, ``.`` a chunk, ``|`` the end."""

    def __init__(self, settings: EngineSettings, gpu: str, directory: Path):
        super().__init__(settings)
        self._gpu, self._directory, self._calls = gpu, directory, []

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        from shared_memory_ipc import install

        install(self._gpu, self._directory)
        super().init_weight_transfer_engine(init_info)

    def start_weight_update(self, draft: bool) -> None:
        self._calls.append("D" if draft else "P")
        super().start_weight_update(draft)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """As from an engine's front to its core, which on GPUs is a process of its own."""
        from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

        self._calls.append(".")
        super().update_weights(MsgpackDecoder().decode(MsgpackEncoder().encode(update_info)))

    def finish_weight_update(self) -> None:
        self._calls.append("|")
        super().finish_weight_update()

    def calls(self) -> list[str]:
        return self._calls

    def answer(self) -> Answer:
        return ask(self)


class _IpcWorker(PolicyWorker.__ray_metadata__.modified_class):  # type: ignore[name-defined]
    """A real worker."""

    def use(self, gpu: str, directory: Path) -> None:
        from shared_memory_ipc import install

        from skyrl_spec.rollout import sender

        install(gpu, directory)
        sender.DEFAULT_PACKED_BUFFER_SIZE_BYTES = BUFFER_BYTES


IpcWorker = ray.remote(_IpcWorker)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("ipc") / "model")


@pytest.fixture
def engines(
    ray_cluster: None, base_settings: EngineSettings, checkpoint: Path, tmp_path: Path
) -> Iterator[list[ActorHandle]]:
    settings = replace(base_settings, model_path=str(checkpoint), max_model_len=64, weight_sync_backend="ipc")
    actor_class = IpcEngine.options(**actor_options(settings))
    actors = [actor_class.remote(settings, f"GPU-{rank}", tmp_path) for rank in range(WORLD_SIZE)]
    yield actors
    for actor in actors:
        ray.kill(actor)


@pytest.fixture
def workers(ray_cluster: None, checkpoint: Path, tmp_path: Path) -> Iterator[list[ActorHandle]]:
    config = make_config(checkpoint, tp=WORLD_SIZE)
    config.trainer.policy.optimizer_config.lr = config.trainer.mtp.optimizer_config.lr = 1e-2
    actors = [IpcWorker.options(num_cpus=0).remote(config, rank, WORLD_SIZE, 1) for rank in range(WORLD_SIZE)]
    address = ray.get(actors[0].serve_store.remote(), timeout=300)
    ray.get([actor.start.remote(address, 10, False) for actor in actors], timeout=300)
    ray.get([actor.use.remote(f"GPU-{rank}", tmp_path) for rank, actor in enumerate(actors)])
    yield actors
    for actor in actors:
        ray.kill(actor)


Answer = tuple[list[list[int]], list[list[float]], SpecCounters]


def ask(engine: RolloutEngine | EngineProcess) -> Answer:
    """Greedy tokens and log-probs, and the counters of drafting."""
    before = engine.spec_counters()
    groups = engine.generate(list(PROMPTS), GREEDY, 1, 0)
    counters = engine.spec_counters() - before
    return [group[0].token_ids for group in groups], [group[0].logprobs for group in groups], counters


def test_engines_synced_over_ipc_equal_a_fresh_one(
    engines: list[ActorHandle],
    workers: list[ActorHandle],
    start_engine: Callable[..., EngineProcess],
    tmp_path: Path,
) -> None:
    group = EngineGroup(engines, timeout_s=300)
    sync = WeightSync(
        PolicyGroup(workers, [(0, 0), (0, 1)], timeout_s=300), group, backend="ipc", components=["policy", "draft"]
    )
    # The second sync starts from the state that the first one left.
    first = train_and_sync(workers, sync, engines, tmp_path / "first")
    second = train_and_sync(workers, sync, engines, tmp_path / "second")
    fresh = ask(start_engine(model_path=str(tmp_path / "second" / "model"), max_model_len=64))
    assert first == [first[0]] * WORLD_SIZE
    assert second == [fresh] * WORLD_SIZE
    assert first[0][0] != fresh[0]
    assert fresh[2].num_accepted_tokens > 0, "drafts of which none is accepted tell nothing"
    for engine in engines:
        *updates, rest = "".join(ray.get(engine.calls.remote())).split("|")
        assert rest == ""
        assert [update[0] for update in updates] == ["P", "D", "P", "D"]
        assert all(update[1:] == "." * len(update[1:]) for update in updates)
        # More than one chunk, so that buffers are reused.
        assert min(map(len, updates)) > 3


def train_and_sync(
    workers: list[ActorHandle], sync: WeightSync, engines: list[ActorHandle], exported: Path
) -> list[Answer]:
    """Five steps and a sync; returns the engines' answers and the exported weights."""
    for _ in range(5):
        ray.get([worker.train_mini_batch.remote(make_batch(seed=0)) for worker in workers])
    num_bytes = sync.sync()
    ray.get([worker.save_hf.remote(exported) for worker in workers])
    weights = load_file(exported / "model" / "model.safetensors")
    assert num_bytes == sum(tensor.nbytes for tensor in weights.values())
    return ray.get([engine.answer.remote() for engine in engines], timeout=300)


def test_vllm_sends_handles_to_its_engine_process_by_pickle_alone(
    base_settings: EngineSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reason for the variable, which no other backend sets."""
    from vllm.v1.serial_utils import MsgpackEncoder

    flag, info = "VLLM_ALLOW_INSECURE_SERIALIZATION", {"ipc_handles": {"GPU-0": (torch.Tensor, torch.float32)}}
    monkeypatch.delenv(flag, raising=False)
    with pytest.raises(TypeError, match=flag):
        MsgpackEncoder().encode(info)
    assert flag not in engine_environment(base_settings)
    assert engine_environment(replace(base_settings, weight_sync_backend="ipc"))[flag] == "1"
