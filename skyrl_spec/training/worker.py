"""Ray actor around the trainer of one rank. Megatron is imported when a worker starts, never in the driver."""

from __future__ import annotations

import logging
import os
import signal
import socket
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from skyrl_spec.drafts.kinds import trained_kind
from skyrl_spec.settings.schema import Config
from skyrl_spec.specs.model import load_spec
from skyrl_spec.types import Component, Proposals, ProposalScores, StepReport, TrainBatch

if TYPE_CHECKING:
    from skyrl_spec.checkpoint.background import BackgroundSaver


@ray.remote
class PolicyWorker:
    """Policy worker of one rank. Most methods are collective, so the driver calls all ranks together."""

    def __init__(self, config: Config, rank: int, world_size: int, num_threads: int | None):
        # The driver decides when a worker ends. A scheduler may signal every process of a job.
        signal.signal(signal.SIGTERM, lambda *_: None)
        # Megatron logs a line for every optional package that is missing.
        logging.disable(logging.INFO)
        warnings.filterwarnings("ignore")
        import torch

        if num_threads is not None:
            torch.set_num_threads(num_threads)
        self._config, self._rank, self._world_size = config, rank, world_size
        self._senders: dict[str, Any] = {}
        self._saver: BackgroundSaver | None = None
        self._store: Any = None

    def ping(self) -> None:
        """Answers a liveness check."""

    def visible_devices(self) -> str:
        """GPUs that Ray gave this worker, as CUDA names them on its machine."""
        return os.environ.get("CUDA_VISIBLE_DEVICES", "")

    def serve_store(self) -> tuple[str, int]:
        """Serves the store where the ranks meet, on a port that stays bound; returns this node's IP and the port."""
        from torch.distributed import TCPStore

        host = ray.util.get_node_ip_address()
        self._store = TCPStore(host, 0, self._world_size, is_master=True, wait_for_workers=False)
        return host, self._store.port

    def free_address(self) -> tuple[str, int]:
        """This node's IP and a port that is free now. vLLM binds it later, so it may be taken by then."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def start(self, store_address: tuple[str, int], total_optimizer_steps: int, freeze_policy: bool) -> None:
        """Joins the other ranks at rank 0's store, and loads policy and draft."""
        import torch
        from torch.distributed import TCPStore

        from skyrl_spec.models import parallel
        from skyrl_spec.training.trainer import PolicyTrainer

        placement, megatron = self._config.trainer.placement, self._config.trainer.policy.megatron_config
        # A rank sees the one GPU that Ray gave it.
        device = torch.device("cpu") if placement.device == "cpu" else torch.device("cuda", 0)
        if self._rank > 0:
            self._store = TCPStore(*store_address, self._world_size, is_master=False, wait_for_workers=False)
        ranks = parallel.initialize(
            rank=self._rank,
            world_size=self._world_size,
            tensor_parallel_size=megatron.tensor_model_parallel_size,
            context_parallel_size=megatron.context_parallel_size,
            pipeline_parallel_size=megatron.pipeline_model_parallel_size,
            expert_parallel_size=megatron.expert_model_parallel_size,
            expert_tensor_parallel_size=megatron.expert_tensor_parallel_size,
            device=device,
            store=self._store,
            timeout_s=placement.collective_timeout_s,
        )
        torch.manual_seed(self._config.trainer.seed)
        spec = load_spec(self._config.trainer.policy.model.path)
        self._trainer = PolicyTrainer(self._config, spec, ranks, total_optimizer_steps, freeze_policy=freeze_policy)

    def place(self) -> tuple[int, int]:
        """Number of the data-parallel replica, and of this rank in it."""
        return self._trainer.parallel.dp_rank, self._trainer.parallel.rank_in_replica

    def forward_logprobs(self, batch: TrainBatch, policy: bool) -> dict[str, np.ndarray]:
        return self._trainer.forward_logprobs(batch, policy=policy)

    def train_mini_batch(self, batch: TrainBatch, draft: bool = True, scored: tuple[str, ...] = ()) -> StepReport:
        return self._trainer.train_mini_batch(batch, draft=draft, scored=scored)

    def keep_draft(self, copy: str) -> None:
        if (copies := self._trainer.draft_copies) is not None:
            copies.keep(copy)

    def restore_draft(self, copy: str) -> None:
        if (copies := self._trainer.draft_copies) is not None:
            copies.restore(copy)

    def offload_training_state(self) -> None:
        self._trainer.offload.training_state()

    def offload_weights(self) -> None:
        self._trainer.offload.weights()

    def train_draft(self, batch: TrainBatch) -> StepReport:
        return self._trainer.train_draft(batch)

    def score_proposals(self, proposals: list[Proposals]) -> ProposalScores:
        return self._trainer.score_proposals(proposals)

    def export(self, component: Component) -> list[tuple[ray.ObjectRef, int]]:
        """Chunks of weights in Ray's object store, and their bytes. All ranks gather; only rank 0 returns chunks."""
        from skyrl_spec.sync.payload import pack_chunks, payload_bytes

        if not self._trainer.exports.takes_part:
            return []
        chunks = pack_chunks(self._trainer.export(component))
        if self._rank > 0:
            for _ in chunks:
                pass
            return []
        return [(ray.put(chunk), payload_bytes(chunk)) for chunk in chunks]

    def connect(self, backend: str, engines: list[Any], components: list[Component], address: tuple[str, int]) -> None:
        """Opens vLLM's own weight transfer to the engines, ``nccl`` or ``ipc``."""
        from skyrl_spec.rollout.sender import ExportSource, build_senders

        trainer = self._trainer
        sources = {
            component: ExportSource(trainer.exports.shapes(component), partial(trainer.export, component))
            for component in components
        }
        self._senders = build_senders(
            sources,  # type: ignore[arg-type]
            engines,
            backend=backend,
            rank=self._rank,
            tensor_parallel_size=self._config.generator.inference_engine.tensor_parallel_size,
            master_address=address[0],
            master_port=address[1],
        )

    def send(self, component: Component) -> int:
        """Sends ``component`` to the engines through the transfer of ``connect``; returns the bytes sent."""
        import torch

        # The sender packs on its own CUDA streams. They wait neither for the optimizer's, nor for that of weights that
        # come back.
        self._trainer.offload.require(self._trainer.model)
        torch.cuda.synchronize()
        self._senders[component].send_weights()
        return sum(int(np.prod(shape)) * dtype.itemsize for _, dtype, shape in self._trainer.exports.shapes(component))

    def save_checkpoint(self, directory: Path, extra: dict[str, Any]) -> None:
        """Saves the trained components, with the driver's ``extra``."""
        from skyrl_spec.checkpoint import dist

        trainer = self._trainer
        dist.save(directory, trainer.saved_components(), extra, trainer.random_state(), trainer.parallel)

    def begin_save(self, directory: Path, extra: dict[str, Any]) -> None:
        """Begins a save beside training; see ``save_checkpoint``."""
        from skyrl_spec.checkpoint.background import BackgroundSaver

        if self._saver is None:
            self._saver = BackgroundSaver(self._config.trainer.placement.collective_timeout_s)
        trainer = self._trainer
        self._saver.begin(directory, trainer.saved_components(), extra, trainer.random_state(), trainer.parallel)

    def finish_save(self, wait: bool) -> bool:
        """Whether the save beside training is complete. ``wait``: waits until it is."""
        assert self._saver is not None
        return self._saver.finish(wait=wait)

    def load_checkpoint(self, directory: Path) -> dict[str, Any]:
        """Loads the components that the checkpoint and this run both train; returns the driver's ``extra``.

        A draft may be new or dropped. The policy must be in the checkpoint.
        """
        from skyrl_spec.checkpoint import dist
        from skyrl_spec.checkpoint.folders import contents

        saved, trained = contents(directory), self._trainer.saved_components()
        # ``dist.load`` refuses a checkpoint without the policy, or without the only trained component.
        required = {"policy"} if len(trained) > 1 else set(trained)
        components = {name: component for name, component in trained.items() if name in saved | required}
        loaded = dist.load(directory, components, self._trainer.parallel)
        self._trainer.set_random_state(loaded.per_rank)
        return loaded.extra

    def export_checkpoint(self, directory: Path, target: Path) -> None:
        """Writes the bundle of a checkpoint to ``target`` from its files. Not collective."""
        from skyrl_spec.checkpoint.bundle import export_bundle, read_source

        trainer = self._config.trainer
        # Paths on this node. The checkpoint's settings hold them as the user wrote them.
        kind = trained_kind(trainer)
        draft = None if kind is None else kind.path(trainer)
        export_bundle(read_source(directory, model=trainer.policy.model.path, draft=draft), target)

    def save_hf(self, run_dir: Path) -> None:
        """Writes policy and draft as Hugging Face checkpoints that vLLM loads."""
        from skyrl_spec.checkpoint.hf_export import save_hf

        save_hf(self._trainer, run_dir)

    def save_draft_hf(self, run_dir: Path) -> None:
        """Writes the draft only."""
        from skyrl_spec.checkpoint.hf_export import save_draft

        save_draft(self._trainer, run_dir)
