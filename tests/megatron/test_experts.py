"""Load of experts, and the loss that evens it out, equal those of a forward pass by transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from gradients import hf_gradients
from published_experts import experts_as_published
from spawn import run_distributed
from tiny_checkpoints import EXPERTS_PER_TOKEN, NUM_EXPERTS, make_batch, make_config, write_model
from transformers import AutoModelForCausalLM

from skyrl_spec.data.packing import gather_shards, shard_rows
from skyrl_spec.metrics import names
from skyrl_spec.metrics.values import values
from skyrl_spec.models import parallel
from skyrl_spec.models.expert_load import load_range
from skyrl_spec.specs.model import load_spec
from skyrl_spec.training.trainer import PolicyTrainer
from skyrl_spec.types import TrainBatch

NUM_LAYERS = 2


def _train(rank: int, path: Path, layout: dict[str, int], recompute: str | None, out: Path) -> None:
    config = make_config(path, draft="dflash", **layout)
    config.trainer.policy.megatron_config.recompute_granularity = recompute
    ranks = parallel.lay_out(
        1,
        torch.device("cpu"),
        pipeline_parallel_size=layout.get("pp", 1),
        expert_parallel_size=layout.get("ep", 1),
    )
    trainer = PolicyTrainer(config, load_spec(str(path)), ranks, total_optimizer_steps=10)
    # Passes without gradients do not count.
    trainer.forward_logprobs(make_batch(seed=1))
    metrics = values(trainer.train_mini_batch(make_batch(seed=0)).metrics)
    torch.save([metrics[names.EXPERT_LOAD_MAX], metrics[names.EXPERT_LOAD_MIN]], out / f"{rank}.pt")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("mixture") / "model", "dflash", has_experts=True)


def _expected(path: Path) -> tuple[float, float]:
    model, batch = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), make_batch(seed=0)
    counts = torch.zeros(NUM_LAYERS, NUM_EXPERTS, dtype=torch.int64)
    for row, length in zip(batch.token_ids, batch.lengths, strict=True):
        with torch.no_grad():
            outputs = model(torch.from_numpy(row[:length])[None], output_router_logits=True)
        for layer, logits in enumerate(outputs.router_logits):
            chosen = logits.topk(EXPERTS_PER_TOKEN, dim=-1).indices
            counts[layer] += torch.bincount(chosen.flatten(), minlength=NUM_EXPERTS)
    return load_range(counts)


@pytest.mark.parametrize("recompute", [None, "selective", "full"])
@pytest.mark.parametrize("layout", [{}, {"ep": 2}, {"pp": 2}], ids=str)
def test_load_equals_a_count(checkpoint: Path, layout: dict[str, int], recompute: str | None, tmp_path: Path) -> None:
    num_ranks = layout.get("ep", 1) * layout.get("pp", 1)
    run_distributed(_train, num_ranks, checkpoint, layout, recompute, tmp_path)
    highest, lowest = _expected(checkpoint)
    assert highest > 1.05
    for rank in range(num_ranks):
        # With expert parallelism a rank that has no pack left computes one of a token, for the others.
        assert torch.load(tmp_path / f"{rank}.pt") == pytest.approx(
            [highest, lowest], abs=0.02 if "ep" in layout else 0
        )


def test_range_of_the_load() -> None:
    counts = torch.tensor([[2, 2, 2, 2], [8, 0, 4, 4]])
    assert load_range(counts) == (1.5, 0.5)


COEFFICIENT = 0.5


def _gradients_of_load(_rank: int, path: Path, layout: dict[str, int], out: Path) -> None:
    config = make_config(path, draft="dflash", **layout)
    config.trainer.policy.megatron_config.moe_aux_loss_coeff = COEFFICIENT
    # One pack on a rank.
    config.trainer.max_tokens_per_microbatch = 1000
    ranks = parallel.lay_out(1, torch.device("cpu"), expert_parallel_size=layout.get("ep", 1))
    trainer = PolicyTrainer(config, load_spec(str(path)), ranks, total_optimizer_steps=10)
    trainer.forward_backward(_without_rewards())
    gradients = hf_gradients(trainer, "policy")
    torch.save(gradients, out / f"{ranks.rank}.pt")


def _without_rewards() -> TrainBatch:
    batch = make_batch(seed=0)
    return replace(batch, advantages=np.zeros_like(batch.advantages))


def _expected_gradients(path: Path, num_ranks: int) -> dict[str, torch.Tensor]:
    """E times the sum of f_e P_e: the share of an expert in what is chosen, and its mean probability, in each pack."""
    model, batch = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), _without_rewards()
    loss = torch.zeros(())
    for rows in shard_rows(batch.lengths, num_ranks):
        documents = [torch.from_numpy(batch.token_ids[row][: batch.lengths[row]]) for row in rows]
        logits = [model(document[None], output_router_logits=True).router_logits for document in documents]
        for of_layer in zip(*logits, strict=True):
            probabilities_TE = torch.cat(of_layer).softmax(-1)
            chosen = probabilities_TE.topk(EXPERTS_PER_TOKEN, dim=-1).indices
            share_E = torch.bincount(chosen.flatten(), minlength=NUM_EXPERTS) / chosen.numel()
            mean = NUM_EXPERTS * (share_E * probabilities_TE.mean(dim=0)).sum()
            # Packs count by their tokens.
            loss = loss + COEFFICIENT * mean * len(probabilities_TE) / batch.lengths.sum()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return experts_as_published(gradients)


@pytest.mark.parametrize("layout", [{}, {"ep": 2}], ids=str)
def test_the_loss_of_the_load_has_the_gradients_of_its_definition(
    checkpoint: Path, layout: dict[str, int], tmp_path: Path
) -> None:
    num_ranks = layout.get("ep", 1)
    run_distributed(_gradients_of_load, num_ranks, checkpoint, layout, tmp_path)
    expected = _expected_gradients(checkpoint, num_ranks)
    routers = [name for name in expected if name.endswith("mlp.gate.weight")]
    assert len(routers) == NUM_LAYERS
    for rank in range(num_ranks):
        gradients = torch.load(tmp_path / f"{rank}.pt")
        for name, gradient in expected.items():
            assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, name
        assert all(gradients[name].norm() > 1e-4 for name in routers)


def _replayed_batch() -> TrainBatch:
    """Rows with random experts for all tokens but the last; one without any, whose router chooses."""
    batch, rng = make_batch(seed=0), np.random.default_rng(0)
    shape = (NUM_LAYERS, EXPERTS_PER_TOKEN)
    experts = [
        np.stack([rng.permutation(NUM_EXPERTS)[:EXPERTS_PER_TOKEN] for _ in range((length - 1) * NUM_LAYERS)])
        for length in batch.lengths
    ]
    rows = [one.reshape(-1, *shape).astype(np.uint8) for one in experts]
    return replace(batch, policy_logprobs=None, experts=(*rows[:-1], None))


def _replay(_rank: int, path: Path, layout: dict[str, int], recompute: str | None, out: Path) -> None:
    config = make_config(path, draft="dflash", sequence_parallel=None, **layout)
    config.trainer.algorithm.router_replay = True
    config.trainer.policy.megatron_config.recompute_granularity = recompute
    sizes = (layout.get(name, 1) for name in ("cp", "pp", "ep"))
    ranks = parallel.lay_out(layout.get("tp", 1), torch.device("cpu"), *sizes)
    trainer, batch = PolicyTrainer(config, load_spec(str(path)), ranks, total_optimizer_steps=10), _replayed_batch()
    shards = [None] * ranks.dp_size
    mine = {"logprobs": trainer.forward_logprobs(batch)["policy_logprobs"]}
    dist.all_gather_object(shards, mine, group=ranks.dp_group)
    trainer.forward_backward(batch)
    record = {"logprobs": torch.from_numpy(gather_shards(batch, shards)["logprobs"])}
    torch.save(record | hf_gradients(trainer, "policy"), out / f"{ranks.rank}.pt")


def _forced(model: Any, experts: np.ndarray | None) -> None:
    """Makes transformers' routers choose these experts, ``[tokens, L, k]``, and their own for the last token."""
    for number, layer in enumerate(model.model.layers):
        router = layer.mlp.gate
        own = type(router).forward

        def forward(hidden: torch.Tensor, router: Any = router, own: Any = own, number: int = number) -> Any:
            logits, weights, chosen = own(router, hidden)
            if experts is None:
                return logits, weights, chosen
            chosen = torch.cat([torch.from_numpy(experts[:, number]).long(), chosen[-1:]])
            probabilities = logits.softmax(-1).gather(1, chosen)
            return logits, probabilities / probabilities.sum(-1, keepdim=True), chosen

        router.forward = forward


def _forced_logprobs(path: Path) -> torch.Tensor:
    model, batch = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), _replayed_batch()
    found = torch.zeros(batch.token_ids.shape)
    for row, length in enumerate(batch.lengths):
        _forced(model, batch.experts[row])
        token_ids = torch.from_numpy(batch.token_ids[row][:length])
        with torch.no_grad():
            logprobs = model(token_ids[None]).logits[0].log_softmax(-1)
        found[row, 1:length] = logprobs[:-1].gather(1, token_ids[1:, None])[:, 0]
    return found * torch.from_numpy(batch.loss_mask)


@pytest.fixture(scope="module")
def replayed(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """On one rank, without recompute."""
    out = tmp_path_factory.mktemp("replayed")
    run_distributed(_replay, 1, checkpoint, {}, None, out)
    return torch.load(out / "0.pt")


def test_tokens_go_to_the_experts_of_the_engine(checkpoint: Path, replayed: dict[str, torch.Tensor]) -> None:
    torch.testing.assert_close(replayed["logprobs"], _forced_logprobs(checkpoint), atol=1e-5, rtol=0)


@pytest.mark.parametrize("recompute", [None, "selective", "full"])
@pytest.mark.parametrize("layout", [{}, {"ep": 2}, {"tp": 2}, {"cp": 2}, {"pp": 2}], ids=str)
def test_nor_does_the_layout_change_where_they_go(
    checkpoint: Path, replayed: dict[str, torch.Tensor], layout: dict[str, int], recompute: str | None, tmp_path: Path
) -> None:
    num_ranks = 2 if layout else 1
    run_distributed(_replay, num_ranks, checkpoint, layout, recompute, tmp_path)
    stages = [torch.load(tmp_path / f"{rank}.pt") for rank in range(num_ranks)]
    # With stages, the last one has the log-probs.
    torch.testing.assert_close(stages[-1].pop("logprobs"), replayed["logprobs"], atol=1e-5, rtol=0)
    found = {name: tensor for stage in stages for name, tensor in stage.items() if name != "logprobs"}
    assert found.keys() == replayed.keys() - {"logprobs"}
    for name, gradient in found.items():
        assert (gradient - replayed[name]).norm() <= 1e-5 * replayed[name].norm(), name
