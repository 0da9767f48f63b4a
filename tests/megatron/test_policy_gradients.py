"""Policy gradients of a GRPO mini-batch against transformers and autograd in float64.

The reference runs transformers' model on one row after the other, without padding, and writes the objective out from
its formulas. Real PolicyTrainers on real gloo processes get the same rollouts as a batch, in several micro-batches.
Every parameter's gradient is compared by HF name.

Log-probs of engine, old policy and reference are those of the reference model plus offsets, so that every branch of
the objective has tokens far from its bounds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import cycle, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gradients import hf_gradients
from published_experts import experts_as_published
from spawn import run_distributed
from tiny_checkpoints import ARCHITECTURES, VOCAB_SIZE, make_config, write_checkpoint
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2ForCausalLM

from skyrl_spec.data.packing import build_train_batch, mini_batches
from skyrl_spec.metrics.values import values
from skyrl_spec.models import parallel
from skyrl_spec.settings.schema import Config
from skyrl_spec.specs.model import load_spec
from skyrl_spec.training.trainer import PolicyTrainer
from skyrl_spec.types import Generation, Prompt, Rollout, TrainBatch, Versions

# Norm of the difference over norm of the reference, fp32 against float64: 2e-6 to 4e-6 are measured.
TOLERANCE = 1e-5

TEMPERATURE = 0.7
# So far apart that a bound taken for the other one changes which tokens get gradient.
EPS_LOW, EPS_HIGH, DUAL_CLIP = 0.2, 0.6, 3.0
TIS_CAP, KL_COEF = 2.0, 0.1
MAX_RESPONSE_LENGTH = 20

# Offsets of log-probs, dealt out token by token. Their numbers have no common factor, so branches meet one another.
LOG_RATIOS = (-0.7, 1.6, -0.1, 0.8, 0.3)  # policy - old
LOG_TIS_WEIGHTS = (1.2, 0.3, -0.4)  # old - rollout
LOG_REF_RATIOS = (0.5, -0.3)  # reference - policy

# Prompt length, response length, advantage. The third row has no token in its loss mask.
ROWS = ((3, 12, 1.3), (7, 5, -0.9), (4, 6, 0.6), (2, 18, -1.4), (5, 9, 0.7), (6, 1, 2.0), (3, 14, -0.5))
MASKED_ROW = 2
# Rows behind the mini-batch, of another one.
OTHER_ROWS = ((2, 8, 0.4), (3, 3, -0.8))

# Tensor parallelism, data parallelism, distributed optimizer.
LAYOUTS = {"one rank": (1, 1, False), "tp2": (2, 1, False), "dp2": (1, 2, False), "dp2 distributed": (1, 2, True)}
MODELS = {
    f"{architecture} {'tied' if tied else 'untied'}": (architecture, tied)
    for architecture, tied in product(ARCHITECTURES, (False, True))
}

# The mean that each reduction stands for, of token losses row by row.
REDUCTIONS: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "token_mean": lambda rows: torch.cat(rows).mean(),
    "sequence_mean": lambda rows: torch.stack([row.mean() for row in rows if len(row)]).mean(),
    "seq_mean_token_sum_norm": lambda rows: torch.stack([row.sum() for row in rows]).mean() / MAX_RESPONSE_LENGTH,
}


@dataclass(frozen=True)
class Row:
    """A rollout, and the log-probs that are given with it. R: tokens of the response."""

    prompt_ids: list[int]
    response_ids: list[int]
    is_trained_R: Tensor
    advantage: float
    old_R: Tensor
    rollout_R: Tensor
    ref_R: Tensor


@dataclass(frozen=True)
class Expected:
    """Loss and gradients (by HF name) of the reference, float64."""

    loss: float
    gradients: dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A checkpoint, and the reference's rows, per-token values and results for it."""

    path: Path
    rows: list[Row]
    token_values: dict[str, Tensor]
    expected: dict[str, Expected]


def response_logprobs(model: PreTrainedModel, prompt_ids: list[int], response_ids: list[int]) -> Tensor:
    """Log-probs of the response's tokens at the sampling temperature, ``[R]``."""
    logits_SV = model(torch.tensor([prompt_ids + response_ids])).logits[0]
    logprobs_SV = torch.log_softmax(logits_SV / TEMPERATURE, dim=-1)
    predicted_RV = logprobs_SV[len(prompt_ids) - 1 : -1]
    return predicted_RV[torch.arange(len(response_ids)), response_ids]


def make_rows(model: PreTrainedModel) -> list[Row]:
    """Rollouts of random tokens, some of which are not trained on."""
    rng = np.random.default_rng(0)
    offsets = zip(cycle(LOG_RATIOS), cycle(LOG_TIS_WEIGHTS), cycle(LOG_REF_RATIOS), strict=False)
    rows = []
    for index, (num_prompt, num_response, advantage) in enumerate(ROWS + OTHER_ROWS):
        prompt_ids, response_ids = (rng.integers(0, VOCAB_SIZE, num).tolist() for num in (num_prompt, num_response))
        with torch.no_grad():
            policy_R = response_logprobs(model, prompt_ids, response_ids)
        ratio_R, tis_R, ref_ratio_R = torch.tensor([next(offsets) for _ in response_ids], dtype=torch.float64).T
        # A token in six is left out, as tokens of tools are; never the first, which may be the only one.
        is_trained_R = (torch.arange(num_response) % 6 != 3) & (index != MASKED_ROW)
        old_R = policy_R - ratio_R
        # Rounded as in a batch, so that both sides read the same numbers.
        given = [logprobs.float().double() for logprobs in (old_R, old_R - tis_R, policy_R + ref_ratio_R)]
        rows.append(Row(prompt_ids, response_ids, is_trained_R, advantage, *given))
    return rows


def token_values(policy_R: Tensor, row: Row) -> dict[str, Tensor]:
    """What the objective is made of, of each token that is trained on; the formulas of the papers."""
    policy_T, old_T, rollout_T, ref_T = (
        logprobs_R[row.is_trained_R] for logprobs_R in (policy_R, row.old_R, row.rollout_R, row.ref_R)
    )
    return {
        "advantage": torch.full_like(policy_T, row.advantage),
        "ratio": torch.exp(policy_T - old_T),
        "tis_weight": torch.exp(old_T - rollout_T),
        "kl": torch.exp(ref_T - policy_T) - (ref_T - policy_T) - 1,
    }


def token_loss(advantage: Tensor, ratio: Tensor, tis_weight: Tensor, kl: Tensor) -> Tensor:
    """Token losses: PPO's clip, dual clip, truncated importance sampling, and the KL to the reference."""
    objective = torch.minimum(ratio * advantage, ratio.clamp(1 - EPS_LOW, 1 + EPS_HIGH) * advantage)
    bounded = torch.maximum(objective, DUAL_CLIP * advantage)
    objective = torch.where(advantage < 0, bounded, objective)
    return -torch.minimum(tis_weight, torch.tensor(TIS_CAP)) * objective + KL_COEF * kl


def expected_of(model: PreTrainedModel, rows: list[Row], reduction: str) -> Expected:
    model.zero_grad()
    losses = []
    for row in rows:
        policy_R = response_logprobs(model, row.prompt_ids, row.response_ids)
        losses.append(token_loss(**token_values(policy_R, row)))
    loss = REDUCTIONS[reduction](losses)
    loss.backward()
    # ``named_parameters`` names a tied head once, as the embedding.
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return Expected(loss.item(), experts_as_published(gradients))


def make_case(path: Path, architecture: str, tied: bool) -> Case:
    write_checkpoint(path, architecture, tied=tied)
    # MiMo's trunk is Qwen2's. Transformers' eager attention would take its softmax in fp32.
    kind = Qwen2ForCausalLM if architecture == "MiMoForCausalLM" else AutoModelForCausalLM
    # A grouped product does not take float64.
    experts = {"experts_implementation": "eager"} if architecture == "Qwen3MoeForCausalLM" else {}
    model = kind.from_pretrained(path, dtype=torch.float64, attn_implementation="sdpa", **experts)
    rows = make_rows(model)
    mine = rows[: len(ROWS)]
    with torch.no_grad():
        parts = [token_values(response_logprobs(model, row.prompt_ids, row.response_ids), row) for row in mine]
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return Case(path, rows, joined, {reduction: expected_of(model, mine, reduction) for reduction in REDUCTIONS})


def make_mini_batch(rows: list[Row], reduction: str) -> TrainBatch:
    """The first of two mini-batches, laid out as the driver does it."""
    settings: dict[str, Any] = {"loss_reduction": reduction, "max_response_length": MAX_RESPONSE_LENGTH}
    rollouts = [
        Rollout(
            prompt=Prompt(str(index), row.prompt_ids, [], "", {}),
            generation=Generation(row.response_ids, row.rollout_R.tolist(), "stop", Versions()),
            text="",
            reward=0.0,
            loss_mask=row.is_trained_R.int().tolist(),
        )
        for index, row in enumerate(rows)
    ]
    batch = build_train_batch(rollouts, [row.advantage for row in rows], pad_token_id=0, **settings)
    old_BS, ref_BS = np.zeros_like(batch.rollout_logprobs), np.zeros_like(batch.rollout_logprobs)
    for index, row in enumerate(rows):
        response = slice(len(row.prompt_ids), len(row.prompt_ids) + len(row.response_ids))
        old_BS[index, response], ref_BS[index, response] = row.old_R, row.ref_R
    batch = replace(batch, policy_logprobs=old_BS, ref_logprobs=ref_BS)
    return next(mini_batches(batch, len(ROWS), **settings))


def run_config(path: Path, tp: int, distributed: bool) -> Config:
    config = make_config(path, tp=tp, draft=None, distributed=distributed, sequence_parallel=None)
    config.generator.sampling_params.temperature = TEMPERATURE
    config.trainer.max_tokens_per_microbatch = 40
    algorithm = config.trainer.algorithm
    algorithm.eps_clip_low, algorithm.eps_clip_high, algorithm.clip_ratio_c = EPS_LOW, EPS_HIGH, DUAL_CLIP
    algorithm.use_tis, algorithm.tis_imp_ratio_cap = True, TIS_CAP
    algorithm.use_kl_loss, algorithm.kl_loss_coef = True, KL_COEF
    return config


def _train(
    rank: int, paths: dict[str, Path], batches: dict[str, dict[str, TrainBatch]], tp: int, distributed: bool, out: Path
) -> None:
    """Write this rank's metrics and gradients of every model and reduction."""
    ranks = parallel.lay_out(tp, torch.device("cpu"))
    record = {}
    for name, path in paths.items():
        trainer = PolicyTrainer(run_config(path, tp, distributed), load_spec(str(path)), ranks, total_optimizer_steps=1)
        for reduction, batch in batches[name].items():
            metrics = values(trainer._reduce(trainer.forward_backward(batch)))
            record[f"{name}, {reduction}"] = {"metrics": metrics, "gradients": hf_gradients(trainer, "policy")}
    torch.save(record, out / f"{rank}.pt")


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    folder = tmp_path_factory.mktemp("models")
    return {name: make_case(folder / name, *model) for name, model in MODELS.items()}


@pytest.fixture(scope="module", params=LAYOUTS)
def records(
    request: pytest.FixtureRequest, cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """Metrics and gradients of each rank, of every model and reduction, under one layout."""
    tp, dp, distributed = LAYOUTS[request.param]
    out = tmp_path_factory.mktemp("ranks")
    paths = {name: case.path for name, case in cases.items()}
    batches = {
        name: {reduction: make_mini_batch(case.rows, reduction) for reduction in REDUCTIONS}
        for name, case in cases.items()
    }
    run_distributed(_train, tp * dp, paths, batches, tp, distributed, out)
    return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(tp * dp)]


def branches(advantage: Tensor, ratio: Tensor, tis_weight: Tensor, kl: Tensor) -> dict[str, dict[str, Tensor]]:
    """Tokens in each branch of each part of the objective, those within a tenth of its bounds left out."""
    low, high, dual, cap = ratio / (1 - EPS_LOW), ratio / (1 + EPS_HIGH), ratio / DUAL_CLIP, tis_weight / TIS_CAP
    gains, loses = advantage > 0, advantage < 0
    is_inside = (low > 1.1) & (high < 0.9)
    clips = {
        "inside, gain": gains & is_inside,
        "inside, loss": loses & is_inside,
        "clipped high": gains & (high > 1.1),
        "clipped low": loses & (low < 0.9),
        "below the clip, which does not bind": gains & (low < 0.9),
        "above the clip, which does not bind": loses & (high > 1.1) & (dual < 0.9),
        "dual clip": loses & (dual > 1.1),
    }
    return {"clip": clips, "TIS": {"at the cap": cap > 1.1, "below it": cap < 0.9}, "KL": {"not 0": kl > 0.01}}


@pytest.mark.parametrize("model", MODELS)
def test_the_mini_batch_meets_every_branch(cases: dict[str, Case], model: str) -> None:
    for part, tokens_of in branches(**cases[model].token_values).items():
        assert {name for name, tokens in tokens_of.items() if tokens.sum() < 3} == set(), part
        # Every token is in one branch of each part, so none is near a bound.
        assert (torch.stack(list(tokens_of.values())).sum(dim=0) == 1).all(), part


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("model", MODELS)
def test_gradients_equal_autograds(
    records: list[dict[str, Any]], cases: dict[str, Case], model: str, reduction: str
) -> None:
    expected = cases[model].expected[reduction]
    for rank, record in enumerate(records):
        gradients = record[f"{model}, {reduction}"]["gradients"]
        assert gradients.keys() == expected.gradients.keys()
        errors = {name: relative_error(gradients[name], tensor) for name, tensor in expected.gradients.items()}
        worst = max(errors, key=lambda name: errors[name])
        assert errors[worst] < TOLERANCE, (rank, worst, errors[worst])


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("model", MODELS)
def test_loss_kl_and_clip_ratio_equal_the_formulas(
    records: list[dict[str, Any]], cases: dict[str, Case], model: str, reduction: str
) -> None:
    case = cases[model]
    clips = branches(**case.token_values)["clip"]
    clipped = clips["clipped high"] | clips["clipped low"] | clips["dual clip"]
    for record in records:
        metrics = record[f"{model}, {reduction}"]["metrics"]
        assert metrics["policy/policy_loss"] == pytest.approx(case.expected[reduction].loss, rel=1e-5)
        assert metrics["policy/kl"] == pytest.approx(case.token_values["kl"].mean().item(), rel=1e-5)
        assert metrics["policy/clip_ratio"] == pytest.approx(clipped.double().mean().item(), rel=1e-12)


def relative_error(gradient: Tensor, expected: Tensor) -> float:
    return float((gradient.double() - expected).norm() / expected.norm())
