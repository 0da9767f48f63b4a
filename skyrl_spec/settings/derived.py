"""Values that follow from the settings of a run."""

from __future__ import annotations

import math
from typing import NamedTuple

from skyrl_spec.errors import ConfigError
from skyrl_spec.settings.policy import MegatronConfig
from skyrl_spec.settings.schema import Config


class ParallelSizes(NamedTuple):
    """Number of policy workers, and of ranks in each parallelism: tensor, context, pipeline and data."""

    world_size: int
    tp: int
    cp: int
    pp: int
    dp: int
    # Of experts, over the ranks of a stage.
    ep: int = 1
    expert_tp: int = 1

    @property
    def expert_dp(self) -> int:
        """Ranks with the same experts."""
        return self.world_size // (self.pp * self.ep * self.expert_tp)

    def __str__(self) -> str:
        others = "".join(f" x {name} {size}" for name, size in (("CP", self.cp), ("PP", self.pp)) if size > 1)
        experts = "".join(f", {name} {size}" for name, size in (("EP", self.ep), ("ETP", self.expert_tp)) if size > 1)
        return f"TP {self.tp}{others} x DP {self.dp}{experts}"


def parallel_sizes(config: Config) -> ParallelSizes:
    """Sizes of the policy workers' parallel layout.

    Raises:
        ConfigError: the number of workers is not a multiple of the workers of a replica, or that of a stage of those
            that divide its experts.
    """
    placement, megatron = config.trainer.placement, config.trainer.policy.megatron_config
    sizes = _model_sizes(megatron)
    world_size, replica = placement.policy_num_nodes * workers_per_node(config), math.prod(sizes.values())
    if world_size % replica:
        first, *others = [f"{name}={size}" for name, size in sizes.items() if size > 1]
        verb = f"times {' times '.join(others)} must divide" if others else "must divide"
        raise ConfigError(
            f"trainer.policy.megatron_config.{first}: {verb} the {world_size} policy workers (policy_num_nodes x "
            "policy_num_gpus_per_node); change it or trainer.placement.policy_num_gpus_per_node"
        )
    tp, cp, pp = sizes.values()
    ep, expert_tp = megatron.expert_model_parallel_size, megatron.expert_tensor_parallel_size
    if world_size // pp % (ep * expert_tp):
        times = f" times expert_tensor_parallel_size={expert_tp}" if expert_tp > 1 else ""
        raise ConfigError(
            f"trainer.policy.megatron_config.expert_model_parallel_size={ep}:{times} must divide the "
            f"{world_size // pp} policy workers of a pipeline stage; change it or "
            "trainer.placement.policy_num_gpus_per_node"
        )
    return ParallelSizes(world_size, tp, cp, pp, world_size // replica, ep, expert_tp)


def _model_sizes(megatron: MegatronConfig) -> dict[str, int]:
    """Ranks of one replica in each parallelism, by setting."""
    names = ("tensor_model_parallel_size", "context_parallel_size", "pipeline_model_parallel_size")
    return {name: getattr(megatron, name) for name in names}


def workers_per_node(config: Config) -> int:
    """Number of policy workers on each machine."""
    per_node, megatron = config.trainer.placement.policy_num_gpus_per_node, config.trainer.policy.megatron_config
    if per_node is not None:
        return per_node
    # A replica, and as many more as it takes to have all experts.
    replica, stages = math.prod(_model_sizes(megatron).values()), megatron.pipeline_model_parallel_size
    with_experts = megatron.expert_model_parallel_size * megatron.expert_tensor_parallel_size
    return stages * math.lcm(replica // stages, with_experts)


def pack_tokens(config: Config) -> int:
    """Most tokens of a pack, unless a sequence is longer."""
    return config.trainer.max_tokens_per_microbatch * config.trainer.policy.megatron_config.context_parallel_size


def max_input_length(config: Config) -> int:
    """Most tokens in front of a turn of the policy."""
    return config.generator.max_input_length or config.trainer.max_prompt_length


def longest_sequence(config: Config) -> int:
    """Tokens of the longest sequence that a run may train on: the last turn's input, and that turn."""
    return max_input_length(config) + config.generator.sampling_params.max_generate_length


def longest_response(config: Config) -> int:
    """Most tokens that the policy samples in a response."""
    return config.generator.max_turns * config.generator.sampling_params.max_generate_length


def sync_backend(config: Config) -> str:
    """Transport of weights to the engines: "ray", "nccl" or "ipc".

    ``ipc`` shares memory of a GPU that worker and engine are both on. NCCL refuses two ranks on one GPU.
    """
    placement = config.trainer.placement
    if placement.device == "cpu":
        return "ray"
    return "ipc" if placement.colocate_all else "nccl"


def sleep_level(config: Config) -> int:
    """Level at which engines sleep while workers train: 0 where they have devices of their own."""
    level = config.generator.inference_engine.sleep_level
    return level if config.trainer.placement.colocate_all else 0


def engine_dtype(config: Config) -> str:
    """Type of the engines' weights: "fp32" or "bf16"."""
    return config.generator.inference_engine.dtype or config.trainer.policy.megatron_config.dtype


def coarser_dtype(config: Config) -> str:
    """The less precise of the trainer's and the engines' types: "bf16" or "fp32"."""
    return "bf16" if "bf16" in (config.trainer.policy.megatron_config.dtype, engine_dtype(config)) else "fp32"


def training_interval(train: str) -> int | None:
    """Training steps from one that trains the draft to the next, by ``trainer.draft.train``. None: none trains it.

    Raises:
        ValueError: no such value.
    """
    # YAML reads off without quotes as false.
    if train in ("off", "False"):
        return None
    # auto decides step by step, and begins with training.
    if train in ("every_step", "auto"):
        return 1
    word, _, number = train.partition(":")
    if word != "every" or int(number) < 1:
        raise ValueError(train)
    return int(number)


def max_staleness(config: Config) -> int:
    """Training steps by which the policy may be ahead of the weights that sampled its batch. 0: synchronous."""
    settings = config.trainer.fully_async
    return settings.max_staleness_steps if settings.enabled else 0


def ratio_anchor(config: Config) -> str:
    """Log-probs that the policy's loss compares the policy with: "old" or "rollout"."""
    algorithm = config.trainer.algorithm
    by_default = "rollout" if max_staleness(config) and algorithm.use_tis is None else "old"
    return algorithm.ratio_anchor or by_default


def uses_tis(config: Config) -> bool:
    """Whether the policy's loss has truncated importance weights."""
    by_default = max_staleness(config) > 0 and ratio_anchor(config) == "old"
    return by_default if config.trainer.algorithm.use_tis is None else config.trainer.algorithm.use_tis


def uses_fp32_head(config: Config) -> bool:
    """Whether logits are computed in fp32 from bf16 states and weights."""
    wanted = config.trainer.policy.megatron_config.fp32_output_head
    return config.trainer.placement.device == "cuda" if wanted is None else wanted


def uses_sequence_parallel(megatron: MegatronConfig, device: str, *, has_experts: bool) -> bool:
    """Whether tensor-parallel workers on a ``device`` ("cpu", "cuda") divide the tokens between matrix products.

    Layers of experts need it: tokens that several ranks have would be sent to experts several times.
    """
    if megatron.sequence_parallel is None:
        return (device == "cuda" or has_experts) and megatron.tensor_model_parallel_size > 1
    return megatron.sequence_parallel
