"""Updates of policy and draft against AdamW, the clip and the warm-up written out in float64; the reference stays."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from gradients import hf_gradients
from spawn import run_distributed
from tiny_checkpoints import make_batch, make_config, write_model
from torch import Tensor

from skyrl_spec.metrics.values import values
from skyrl_spec.models import parallel
from skyrl_spec.settings.draft import OptimizerConfig
from skyrl_spec.specs.model import load_spec
from skyrl_spec.training.trainer import PolicyTrainer
from skyrl_spec.types import Component

COMPONENTS: tuple[Component, ...] = ("policy", "draft")
NUM_STEPS = 4
# Of an update's largest difference, in learning rates: weights of order 1 are rounded to 6e-8 in fp32.
TOLERANCE = 1e-3

POLICY = OptimizerConfig(
    lr=1e-3, weight_decay=0.1, adam_betas=[0.8, 0.95], adam_eps=1e-5, max_grad_norm=0.05, num_warmup_steps=2
)
# Not clipped, and decays from the first step on.
DRAFT = OptimizerConfig(lr=2e-3, adam_betas=[0.9, 0.99], adam_eps=1e-4, max_grad_norm=1e3, scheduler="linear")
# Learning rates of the steps; linear decay reaches min_lr, 0, after the run's 8.
LRS = {"policy": [1e-3 / 3, 2e-3 / 3, 1e-3, 1e-3], "draft": [2e-3 * (1 - step / 8) for step in range(NUM_STEPS)]}


class AdamW:
    """AdamW (arXiv 1711.05101) after a clip of the global norm; biases and norms do not decay."""

    def __init__(self, config: OptimizerConfig, weights: dict[str, Tensor]):
        self._config, self._num_steps = config, 0
        self.weights = {name: tensor.double() for name, tensor in weights.items()}
        self._mean = {name: torch.zeros_like(tensor) for name, tensor in self.weights.items()}
        self._mean_square = {name: torch.zeros_like(tensor) for name, tensor in self.weights.items()}

    def step(self, gradients: dict[str, Tensor], lr: float) -> float:
        """Returns the norm of the gradients."""
        self._num_steps += 1
        (beta1, beta2), config = self._config.adam_betas, self._config
        norm = math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients.values()))
        scale = min(1.0, config.max_grad_norm / (norm + 1e-6))
        for name, weight in self.weights.items():
            gradient = gradients[name].double() * scale
            mean, mean_square = self._mean[name], self._mean_square[name]
            mean.mul_(beta1).add_((1 - beta1) * gradient)
            mean_square.mul_(beta2).add_((1 - beta2) * gradient.square())
            if weight.ndim > 1:
                weight.mul_(1 - lr * config.weight_decay)
            root = (mean_square / (1 - beta2**self._num_steps)).sqrt()
            weight.sub_(lr * mean / (1 - beta1**self._num_steps) / (root + config.adam_eps))
        return norm


def _weights(trainer: PolicyTrainer, component: Component) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.export(component)}


def _check_updates(_rank: int, path: Path, distributed: bool) -> None:
    config = make_config(path, distributed=distributed)
    config.trainer.policy.optimizer_config, config.trainer.mtp.optimizer_config = POLICY, DRAFT
    ranks = parallel.lay_out(1, torch.device("cpu"))
    trainer = PolicyTrainer(config, load_spec(str(path)), ranks, total_optimizer_steps=2 * NUM_STEPS)
    settings = {"policy": POLICY, "draft": DRAFT}
    expected = {name: AdamW(settings[name], _weights(trainer, name)) for name in COMPONENTS}
    for step in range(NUM_STEPS):
        trainer.forward_backward(make_batch(seed=step))
        gradients = {name: hf_gradients(trainer, name) for name in COMPONENTS}
        # Nothing is carried over from one mini-batch to the next.
        trainer.forward_backward(make_batch(seed=step))
        for name in COMPONENTS:
            for key, gradient in hf_gradients(trainer, name).items():
                assert torch.equal(gradient, gradients[name][key]), (step, name, key)
        metrics = values(trainer.optimizer_step())
        for name in COMPONENTS:
            lr, before = LRS[name][step], {key: w.clone() for key, w in expected[name].weights.items()}
            norm = expected[name].step(gradients[name], lr)
            assert (norm > settings[name].max_grad_norm) == (name == "policy"), "one was to be clipped"
            assert metrics[f"{name}/grad_norm"] == pytest.approx(norm, rel=1e-5)
            assert metrics[f"{name}/lr"] == pytest.approx(lr, rel=1e-9)
            for key, weight in _weights(trainer, name).items():
                wanted = expected[name].weights[key]
                assert (wanted - before[key]).abs().max() > 0.1 * lr, f"{key} was to move"
                assert (weight - wanted).abs().max() < TOLERANCE * lr, (step, name, key)


@pytest.mark.parametrize(("distributed", "num_ranks"), [(False, 1), (True, 2)])
def test_updates_are_those_of_adamw(tmp_path: Path, distributed: bool, num_ranks: int) -> None:
    run_distributed(_check_updates, num_ranks, write_model(tmp_path / "model", "mtp"), distributed)


def _check_reference(_rank: int, path: Path) -> None:
    config = make_config(path)
    config.trainer.algorithm.use_kl_loss = True
    ranks = parallel.lay_out(1, torch.device("cpu"))
    trainer = PolicyTrainer(config, load_spec(str(path)), ranks, total_optimizer_steps=1)
    batch = make_batch(seed=0)
    before = trainer.forward_logprobs(batch)
    np.testing.assert_array_equal(before["ref_logprobs"], before["policy_logprobs"])
    batch.ref_logprobs = before["ref_logprobs"]
    trainer.train_mini_batch(batch)
    after = trainer.forward_logprobs(batch)
    np.testing.assert_array_equal(after["ref_logprobs"], before["ref_logprobs"])
    assert np.abs(after["policy_logprobs"] - before["policy_logprobs"]).max() > 1e-3


def test_the_reference_stays_where_the_policy_started(tmp_path: Path) -> None:
    run_distributed(_check_reference, 1, write_model(tmp_path / "model", "mtp"))
