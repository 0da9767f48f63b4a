"""Settings of the policy: model, optimizer, parallel layout."""

from __future__ import annotations

from dataclasses import dataclass, field

from skyrl_spec.settings.allowed import DTYPES, FROM_ONE, NOT_NEGATIVE, RECOMPUTE
from skyrl_spec.settings.draft import OptimizerConfig
from skyrl_spec.settings.field import setting


@dataclass
class ModelConfig:
    """The model that the policy starts from."""

    path: str = setting(
        "", "Directory or hub name of a Hugging Face checkpoint of a Qwen2, Qwen3, Qwen3-MoE or MiMo model. Required."
    )


@dataclass
class MegatronConfig:
    """Parallel layout and precision of the policy workers. Several replicas of the model are data-parallel."""

    tensor_model_parallel_size: int = setting(1, "Workers that share one replica of the model.", FROM_ONE)
    context_parallel_size: int = setting(
        1,
        "Workers that divide the tokens of every pack, for long sequences: each holds the activations of its part.",
        FROM_ONE,
    )
    pipeline_model_parallel_size: int = setting(
        1,
        "Stages of consecutive layers, each on workers of its own. For models that do not fit otherwise, across "
        "machines: stages send little to each other, but wait for each other.",
        FROM_ONE,
    )
    num_layers_in_first_pipeline_stage: int | None = setting(
        None,
        "Layers of the first stage, which also has the embedding. null: as many as the others.",
        FROM_ONE,
    )
    num_layers_in_last_pipeline_stage: int | None = setting(
        None,
        "Layers of the last stage, which also has the output head and the draft. null: as many as the others.",
        FROM_ONE,
    )
    expert_model_parallel_size: int = setting(
        1,
        "Workers that divide the experts of each layer. They are workers of a stage, of several replicas too, and each "
        "sends its tokens to the workers with their experts.",
        FROM_ONE,
    )
    expert_tensor_parallel_size: int = setting(
        1, "Workers that divide each expert. A product of whole experts on fewer tokens is faster.", FROM_ONE
    )
    moe_aux_loss_coeff: float = setting(
        0.0,
        "Weight of a loss that evens out the load of experts (Switch Transformer's), pack by pack. 0: none, so that "
        "rewards alone move the router.",
        NOT_NEGATIVE,
    )
    sequence_parallel: bool | None = setting(
        None,
        "Divide activations between matrix products over the workers of a replica: less memory. null: true if "
        "tensor_model_parallel_size is above 1 and the device is cuda or the model has experts, else false.",
    )
    use_distributed_optimizer: bool = setting(False, "Shard optimizer state over the data-parallel workers.")
    dtype: str = setting("bf16", "Type of parameters and activations. The optimizer's master weights are fp32.", DTYPES)
    recompute_granularity: str | None = setting(
        None,
        "What is recomputed in the backward pass instead of stored: less memory, more time. selective: "
        "recompute_modules. full: whole layers. null: nothing.",
        RECOMPUTE,
    )
    recompute_modules: list[str] = setting(
        lambda: ["layernorm", "mlp"],
        "Parts of a layer that recompute_granularity=selective recomputes: layernorm, mlp, core_attn. core_attn costs "
        "an attention and saves next to nothing, because attention stores no scores.",
    )
    async_dist_ckpt_save: bool = setting(
        False,
        "Write checkpoints beside training, from copies in host memory. One save at a time; the next one waits for it.",
    )
    cpu_offload: bool | None = setting(
        None,
        "Keep the weights of policy and draft in host memory while engines generate. null: true where "
        "engines sleep (trainer.placement.colocate_all), else false.",
    )
    fp32_output_head: bool | None = setting(
        None,
        "Compute the logits of losses and log-probs in fp32, from bf16 hidden states and weights. null: true on cuda, "
        "false on cpu, where it needs an fp32 copy of the output head.",
    )


@dataclass
class PolicyConfig:
    """The policy that is trained."""

    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer_config: OptimizerConfig = field(default_factory=OptimizerConfig)
    megatron_config: MegatronConfig = field(default_factory=MegatronConfig)


@dataclass
class RefConfig:
    """The frozen policy of the KL penalty (algorithm.use_kl_loss)."""

    cpu_offload: bool | None = setting(
        None,
        "Keep its weights in host memory but while it computes log-probs. null: true where "
        "engines sleep (trainer.placement.colocate_all), else false.",
    )
