"""Operations of a whole training step, of policy and draft."""

from __future__ import annotations

from skyrl_spec.drafts.kinds import trained_kind
from skyrl_spec.settings.derived import ratio_anchor
from skyrl_spec.settings.schema import Config
from skyrl_spec.specs import flops
from skyrl_spec.specs.model import load_spec


def step_flops(config: Config, prompt: int, response: int) -> tuple[float, float]:
    """Operations of policy and draft, with what recompute does again and the passes for log-probs.

    Args:
        prompt, response: mean numbers of tokens.
    """
    trainer, spec = config.trainer, load_spec(config.trainer.policy.model.path, weights=False)
    policy = flops.policy_training(spec, prompt, response)
    trunk = spec.num_layers * (
        flops.layer(spec, prompt + response) + flops.attention(spec, (prompt + response) ** 2 / 2)
    )
    again = trunk * (trainer.policy.megatron_config.recompute_granularity == "full")
    is_one_update = trainer.update_epochs_per_batch == 1 and trainer.policy_mini_batch_size == trainer.train_batch_size
    num_passes = (ratio_anchor(config) == "old" and not is_one_update) + trainer.algorithm.use_kl_loss
    logprobs = num_passes * (trunk + flops.head(spec, response))
    rows, kind = trainer.train_batch_size * config.generator.n_samples_per_prompt, trained_kind(trainer)
    draft = 0.0 if kind is None else kind.training_flops(config, spec, prompt, response).total
    epochs = trainer.update_epochs_per_batch
    return rows * (epochs * (policy.total + again) + logprobs), rows * epochs * draft
