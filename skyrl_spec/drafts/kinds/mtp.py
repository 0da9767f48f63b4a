"""MTP head as a kind of draft. It is a part of the policy's checkpoint; vLLM's method is ``mtp``."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skyrl_spec.drafts.kinds.kind import DraftKind, DraftShapes, require_user_speculation
from skyrl_spec.drafts.shares import mean_window
from skyrl_spec.errors import ConfigError
from skyrl_spec.settings.schema import Config, TrainerConfig
from skyrl_spec.specs import flops
from skyrl_spec.specs.files import POLICY_PATH, read_shapes, require_tensors
from skyrl_spec.specs.flops import Flops
from skyrl_spec.specs.model import ModelSpec, load_spec
from skyrl_spec.specs.mtp import mtp_tensor_shapes

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

    from skyrl_spec.drafts.base import Draft
    from skyrl_spec.models.conversion import Rule
    from skyrl_spec.models.parallel import Parallel


class MtpKind(DraftKind):
    """MiMo's MTP head."""

    method = "mtp"
    has_own_directory = False
    on_setting = "trainer.mtp.enabled"

    def describe(self, trainer: TrainerConfig) -> str:
        mtp = trainer.mtp
        depths = mtp.unroll_steps or mtp.num_speculative_tokens
        return f"MTP head, k={mtp.num_speculative_tokens}, trained {depths} deep, {mtp.loss_type}"

    def check_user_speculation(self, user: dict[str, Any]) -> None:
        require_user_speculation(
            user.get("method") == "mtp" and "model" not in user,
            user,
            "must be of method mtp, without model, while trainer.mtp.enabled trains that head; "
            "change it or turn mtp off",
        )

    def preflight(self, config: Config, spec: ModelSpec, *, from_scratch: bool) -> None:
        if from_scratch:
            return
        path = config.trainer.policy.model.path
        if spec.num_mtp_layers == 0:
            raise _refusal(path, "has no MTP head (num_nextn_predict_layers is missing or 0 in its config.json)")
        if spec.architecture != "MiMoForCausalLM":
            raise _refusal(path, f"is a {spec.architecture}, whose MTP head is not supported (MiMoForCausalLM's is)")
        # Weights of a hub name are not downloaded yet.
        if Path(path).is_dir() and not any(".mtp_layers." in name for name in read_shapes(Path(path), POLICY_PATH)):
            raise _refusal(path, "has no tensor named *.mtp_layers.* in its *.safetensors")
        require_tensors(path, POLICY_PATH, mtp_tensor_shapes(spec))

    def write_fresh(self, config: Config) -> Config:
        from skyrl_spec.drafts.fresh import write_fresh_mtp

        trainer = config.trainer
        directory = (Path(trainer.run_dir) / "model_start").resolve()
        spec = load_spec(trainer.policy.model.path)
        write_fresh_mtp(spec, directory, trainer.policy.megatron_config.dtype, trainer.seed)
        policy = replace(trainer.policy, model=replace(trainer.policy.model, path=str(directory)))
        return replace(config, trainer=replace(trainer, policy=policy))

    def shapes(
        self, config: Config, spec: ModelSpec, path: str | None, *, may_be_unwritten: bool = False
    ) -> DraftShapes:
        return DraftShapes(mtp_tensor_shapes(spec), 1)

    def training_layer_tokens(self, config: Config, spec: ModelSpec, tokens: int) -> int:
        mtp = config.trainer.mtp
        # Keys of all tokens count as a layer.
        return tokens + math.ceil(mtp.positions_per_step * tokens) * self.num_positions(config, spec)

    def training_flops(self, config: Config, spec: ModelSpec, prompt: int, response: int) -> Flops:
        mtp, hidden = config.trainer.mtp, spec.hidden_size
        depths = self.num_positions(config, spec)
        # The first base is the last token of the prompt, and a base drafts after the next token.
        num_bases = max(response - 1, 0)
        probability, first, end = mean_window(num_bases, mtp.positions_per_step)
        num_chains, num_read = probability * (end - first), probability * (prompt - 1 + end)
        runs = num_chains * depths
        per_run = flops.linear(runs, 2 * hidden, hidden) + flops.layer(spec, runs)
        keys = flops.linear(num_read, 2 * hidden, hidden) + flops.key_value(spec, num_read)
        # The teacher's logits, and twice as many operations for each of the draft's.
        heads = flops.head(spec, num_chains + probability * (depths - 1)) + 2 * flops.head(spec, runs)
        context = prompt + (first + end) / 2
        return Flops(
            flops.TRAINED * (per_run + keys) + heads,
            flops.ATTENTION_TRAINED * flops.attention(spec, runs * context),
        )

    def speculative_config(self, trainer: TrainerConfig) -> dict[str, Any]:
        return {"method": "mtp", "num_speculative_tokens": trainer.mtp.num_speculative_tokens}

    def frozen_config(self, trainer: TrainerConfig) -> dict[str, Any]:
        return self.speculative_config(trainer)

    def is_in(self, config: dict[str, Any]) -> bool:
        return bool(config.get("num_nextn_predict_layers"))

    def build(self, config: Config, spec: ModelSpec, trunk: TransformerConfig, parallel: Parallel) -> Draft:
        from skyrl_spec.drafts.base import RolloutSampling
        from skyrl_spec.drafts.mtp import MtpDraft

        trainer, sampling = config.trainer, RolloutSampling.of(config.generator)
        return MtpDraft(trainer.mtp, spec, trunk, parallel, sampling, trainer.seed)

    def rules(self, trainer: TrainerConfig, spec: ModelSpec) -> list[Rule]:
        from skyrl_spec.models.conversion import mtp_rules

        return mtp_rules(spec)

    def num_positions(self, config: Config, spec: ModelSpec) -> int:
        return config.trainer.mtp.unroll_steps or config.trainer.mtp.num_speculative_tokens


def _refusal(path: str, reason: str) -> ConfigError:
    return ConfigError(
        f"trainer.mtp.enabled=true: the model {path} {reason}; "
        "use a model with an MTP head or trainer.mtp.enabled=false"
    )
