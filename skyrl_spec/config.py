"""The configuration's schema: dataclasses with SkyRL's names. Values live in ``configs/``.

Nothing here imports torch. ``None`` means "decided from the other settings"; what it is decided to be is written
next to the field. ``validation.validate`` holds every rule that needs more than one type.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class ConfigError(ValueError):
    """A setting the user can mend; the message is one line: setting, value, what is allowed, the mend."""


class RunError(RuntimeError):
    """What ends a run that was rightly configured (a dead actor, no place to start one); one line, exit code 1."""


class LostActorError(RunError):
    """An engine or a worker is gone, and the run with it; it can go on from ``checkpoint``, if one was saved."""

    checkpoint: Path | None = None


@dataclass
class DataConfig:
    """Where the prompts come from: parquet or JSONL files in SkyRL's dataset schema."""

    # Files with the prompts to train on.
    train_data: list[str] = field(default_factory=list)
    # Files with the held-out prompts.
    val_data: list[str] = field(default_factory=list)
    # A new order every epoch, drawn from trainer.seed; false: the order of the files.
    shuffle: bool = True


@dataclass
class ModelConfig:
    """A Hugging Face checkpoint directory or hub name."""

    # Of Qwen2, Qwen3 or MiMo architecture.
    path: str = ""


@dataclass
class OptimizerConfig:
    """Adam through Megatron's optimizer, its warm-up counted in optimizer steps."""

    # The largest learning rate.
    lr: float = 1e-6
    # Where a decaying schedule ends.
    min_lr: float = 0.0
    # Decoupled, as in AdamW.
    weight_decay: float = 0.0
    # Of the running means of the gradient and of its square.
    adam_betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    # Added to the denominator.
    adam_eps: float = 1e-8
    # Larger gradients are scaled down to it.
    max_grad_norm: float = 1.0
    # Optimizer steps over which the rate rises linearly.
    num_warmup_steps: int = 0
    # "constant" or "cosine" or "linear"; the latter two decay to min_lr over the whole run.
    scheduler: str = "constant"


@dataclass
class MegatronConfig:
    """The parallel layout of the policy workers; data parallelism is what is left of the workers."""

    # Workers that share a replica of the model.
    tensor_model_parallel_size: int = 1
    # Optimizer state is divided over the data-parallel workers.
    use_distributed_optimizer: bool = False
    # "fp32" or "bf16": dtype of parameters and activations; the optimizer keeps fp32 masters.
    dtype: str = "bf16"
    # Activations are computed again in the backward pass, to save their memory (cuda only).
    recompute_activations: bool = False


@dataclass
class PolicyConfig:
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer_config: OptimizerConfig = field(default_factory=OptimizerConfig)
    megatron_config: MegatronConfig = field(default_factory=MegatronConfig)


@dataclass
class PlacementConfig:
    """How many processes train the policy, and on what."""

    # "cpu" (gloo) or "cuda" (NCCL); engines follow.
    device: str = "cuda"
    # Times policy_num_gpus_per_node it is the number of workers. Ray packs them on as few machines as it can.
    policy_num_nodes: int = 1
    # None: one model replica, that is tensor_model_parallel_size.
    policy_num_gpus_per_node: int | None = None
    # Workers and engines share GPUs, one of each a GPU. An engine keeps its memory while the workers train.
    colocate_all: bool = False
    # How long actors may wait to be placed and started before the run gives up.
    timeout_s: float = 600.0


@dataclass
class DynamicSamplingConfig:
    """DAPO's dynamic sampling: groups whose rewards are all equal are sampled again."""

    # None or "filter".
    type: str | None = None
    # Batches sampled for one train batch before the step goes on with what it has.
    max_sample_batches: int = 10


@dataclass
class OverlongConfig:
    """DAPO's soft overlong punishment: linear from 0 to -penalty_factor over the last buffer_len tokens."""

    # Tokens before max_generate_length at which the punishment begins; 0: none.
    buffer_len: int = 0
    # The punishment of a response that was cut off.
    penalty_factor: float = 1.0


@dataclass
class AlgorithmConfig:
    """The policy objective. GRPO is DAPO with equal clips and no filter."""

    # "grpo": rewards of the responses to a prompt, less their mean.
    advantage_estimator: str = "grpo"
    # Advantages are divided by the standard deviation of the rewards to the prompt.
    grpo_norm_by_std: bool = True
    # Ratios below 1 - this are clipped.
    eps_clip_low: float = 0.2
    # Ratios above 1 + this are clipped; larger than eps_clip_low it is DAPO's clip-higher.
    eps_clip_high: float = 0.2
    # None: no dual clip; else c > 1 of the dual-clip PPO objective.
    clip_ratio_c: float | None = None
    # "token_mean", "sequence_mean" or "seq_mean_token_sum_norm".
    loss_reduction: str = "token_mean"
    # Adds kl_loss_coef times the KL to the policy as it was at the start, which costs a copy of it.
    use_kl_loss: bool = False
    # Weight of the KL term.
    kl_loss_coef: float = 0.001
    # Truncated importance correction of the rollout/trainer log-prob gap.
    use_tis: bool = False
    # Where use_tis cuts the weight of a token off.
    tis_imp_ratio_cap: float = 2.0
    dynamic_sampling: DynamicSamplingConfig = field(default_factory=DynamicSamplingConfig)
    overlong: OverlongConfig = field(default_factory=OverlongConfig)


@dataclass
class MtpConfig:
    """The model's own MTP head as draft, trained with the policy in every step."""

    # Train the head and draft with it.
    enabled: bool = False
    # Tokens drafted at a time, k; the head runs that often.
    num_speculative_tokens: int = 3
    # Depths the head is trained at, on its own output. None: num_speculative_tokens.
    unroll_steps: int | None = None
    # "soft_ce", "topk_soft_ce" or "hard_ce".
    loss_type: str = "soft_ce"
    # Of topk_soft_ce: the policy's likeliest tokens that count.
    loss_topk: int = 32
    # Tokens whose logits exist at a time.
    loss_chunk_size: int = 1024
    optimizer_config: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-4))


@dataclass
class DflashConfig:
    """A DFlash block-diffusion draft, trained with the policy in every step. None: what the draft at ``path`` says."""

    # Train the draft and draft with it.
    enabled: bool = False
    # A Hugging Face draft to start from, a directory or a hub name. None: from scratch, with the target's width, heads
    # and RoPE.
    path: str | None = None
    # From scratch: 5 layers.
    num_layers: int | None = None
    # Slots of a block: the last sampled token and the drafted ones. From scratch: 16.
    block_size: int | None = None
    # None: block_size - 1.
    num_speculative_tokens: int | None = None
    # Target layers whose outputs the draft sees, 0-based, ascending. From scratch: spread evenly over the target.
    target_layer_ids: list[int] | None = None
    # From scratch: the tokenizer's mask token, else the first row of the vocabulary that no token uses.
    mask_token_id: int | None = None
    # Blocks a sequence is trained on in a step, begun at response tokens drawn at random.
    anchors_per_sequence: int = 128
    # "soft_ce", "topk_soft_ce" or "hard_ce".
    loss_type: str = "soft_ce"
    # Of topk_soft_ce: the policy's likeliest tokens that count.
    loss_topk: int = 32
    # Drafted token i of a block counts exp(-(i - 1) / gamma). None: 4, 5, 7 for blocks of 8, 10, 16; else half a block.
    loss_decay_gamma: float | None = None
    # Tokens whose logits exist at a time.
    loss_chunk_size: int = 1024
    # Written into the config.json of an exported draft, e.g. {rope_type: yarn, factor: 4.0}; training is without.
    export_rope_scaling: dict[str, Any] | None = None
    optimizer_config: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-4))


@dataclass
class WarmupConfig:
    """``skyrl-spec warmup-draft``: the draft is trained on the frozen policy's own responses."""

    # Where it writes. None: trainer.run_dir with "_warmup" behind it.
    run_dir: str | None = None
    # False: go on from trainer.dflash.path, or from the checkpoint's MTP head.
    from_scratch: bool = True
    # Batches of trainer.train_batch_size prompts.
    num_steps: int = 200
    # How often a batch is trained on.
    update_epochs_per_batch: int = 1
    optimizer_config: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(lr=6e-4, scheduler="cosine", num_warmup_steps=20)
    )


@dataclass
class CanaryConfig:
    """Checks during a run that engines hold what the trainer trains, and that a draft changes nothing."""

    # After syncs: trainer and engines compute the same log-probs and drafts on a few fixed prompts.
    enabled: bool = True
    # Every so many syncs, the first one included.
    interval: int = 10
    # Fixed prompts, spread over the training data.
    num_prompts: int = 4
    # Sampled to each of them.
    num_tokens: int = 16
    # "error": a mismatch ends the run; "warn": it is said.
    on_mismatch: str = "error"
    # Steps between checks that generations with and without the draft are the same; 0: none. Takes an engine more
    # (CPU only).
    lossless_interval: int = 0
    # Responses to each of num_prompts prompts.
    lossless_num_samples: int = 64
    # Probability of a false alarm of one such check.
    lossless_level: float = 1e-4
    # Mean |log-prob difference| of rollouts between engine and trainer that is warned of. None: 0.001 in fp32, 0.1 in
    # bf16.
    max_logprobs_diff: float | None = None
    # Share of the measured acceptance length by which the predicted one may be off without a warning.
    max_acceptance_gap: float = 0.3


@dataclass
class TrainerConfig:
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    mtp: MtpConfig = field(default_factory=MtpConfig)
    dflash: DflashConfig = field(default_factory=DflashConfig)
    warmup: WarmupConfig = field(default_factory=WarmupConfig)
    canary: CanaryConfig = field(default_factory=CanaryConfig)
    # Where everything is written.
    run_dir: str = "runs/default"
    # Check everything, print the plan (processes, memory, sizes), and start nothing.
    dry_run: bool = False
    # Of sampling, shuffling and blocks drawn at random.
    seed: int = 0
    # Times that the training prompts are gone through.
    epochs: int = 1
    # None: until the epochs are over.
    max_training_steps: int | None = None
    # Times that a batch of rollouts is trained on.
    update_epochs_per_batch: int = 1
    # An optimizer skips an update whose gradient is not finite; more in a row than this end the run. Policy and draft
    # are counted apart.
    max_skipped_updates: int = 3
    # Prompts; times n_samples_per_prompt gives sequences.
    train_batch_size: int = 128
    # Prompts of one optimizer step.
    policy_mini_batch_size: int = 128
    # Held-out prompts handed to the engines at a time.
    eval_batch_size: int = 1024
    # Sequences a forward/backward, per data-parallel rank.
    micro_train_batch_size_per_gpu: int = 8
    # Sequences a forward without gradient, per data-parallel rank.
    micro_forward_batch_size_per_gpu: int = 16
    # Tokens whose policy logits exist at a time.
    logprobs_chunk_size: int = 1024
    # Tokens; longer prompts are left out, and counted.
    max_prompt_length: int = 512
    # Steps between evaluations on data.val_data, sampled as generator.eval_sampling_params says; 0 turns it off.
    eval_interval: int = 10
    # Evaluate once before the first step.
    eval_before_train: bool = True
    # After the last step: tokens/s of the engine against one without a draft, same weights and prompts (CPU only).
    measure_speedup: bool = False
    # Steps between checkpoints in run_dir/checkpoints, besides one after the last; 0: only where SIGTERM stops the run.
    ckpt_interval: int = 10
    # Older checkpoints are removed once a new one is complete.
    max_ckpts_to_keep: int = 2
    # Steps between checkpoints that are also written to run_dir/exports/step_N, as `skyrl-spec export` does; 0: none.
    # These stay. A multiple of ckpt_interval.
    hf_save_interval: int = 0
    # A checkpoint that cannot be written (no space): "error" ends the run, "warn" says so and goes on without it.
    on_ckpt_failure: str = "error"
    # None: from the beginning; "latest": from the newest checkpoint in run_dir, if there is one; "from_path".
    resume_mode: str | None = None
    # A checkpoint (RUN/checkpoints/step_N), for from_path.
    resume_path: str | None = None
    # How often a run goes on by itself from its last checkpoint (or from where it began) when a worker dies.
    max_restarts: int = 0
    # Write the policy to run_dir/model at the end, as a Hugging Face checkpoint with its MTP head; a DFlash draft to
    # run_dir/draft.
    save_final_model: bool = True
    # Any of "console", "wandb" and "tensorboard"; metrics.jsonl is always written.
    logger: list[str] = field(default_factory=lambda: ["console"])
    # The wandb project.
    project_name: str = "skyrl_spec"
    # The name of the run, in wandb and exports.
    run_name: str = "default"


@dataclass
class SamplingConfig:
    # Tokens of a response, at most.
    max_generate_length: int = 1024
    # 0: greedy, for evaluation only.
    temperature: float = 1.0
    # Nucleus: the likeliest tokens that together have this probability.
    top_p: float = 1.0
    # -1: all tokens.
    top_k: int = -1
    # Tokens less likely than this share of the likeliest one are left out; not with a draft.
    min_p: float = 0.0


@dataclass
class InferenceEngineConfig:
    """The vLLM engines."""

    # Prompts are dealt out over them.
    num_engines: int = 1
    # GPUs of an engine.
    tensor_parallel_size: int = 1
    # None: trainer.policy.megatron_config.dtype.
    dtype: str | None = None
    # Share of a GPU's memory that an engine takes.
    gpu_memory_utilization: float = 0.8
    # GiB of KV cache on CPU engines.
    cpu_kvcache_space: float = 1.0
    # Responses that an engine generates at a time.
    max_num_seqs: int = 256
    # Keys of equal beginnings are kept; the cache is emptied at every sync.
    enable_prefix_caching: bool = True
    # No compiling and no CUDA graphs: starts sooner, and for tiny models on CPU it is faster.
    enforce_eager: bool = False
    # None: "ray" on CPU, "nccl" on GPU, "ipc" on GPUs with trainer.placement.colocate_all.
    weight_sync_backend: str | None = None
    # Seconds for an engine to answer a call (one batch). One that takes longer, or dies, is restarted; where weights
    # travel by nccl or ipc, that ends the run.
    generate_timeout_s: float = 3600.0
    # Of all engines together, until the run itself is started anew.
    max_restarts: int = 3
    # None: filled from trainer.mtp or trainer.dflash, which also complete what is given here. Drafting that changes
    # what is sampled is refused; the rest goes to vLLM as it is.
    speculative_config: dict[str, Any] | None = None
    # Further vLLM engine arguments, passed through.
    engine_init_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class GeneratorConfig:
    inference_engine: InferenceEngineConfig = field(default_factory=InferenceEngineConfig)
    # Responses to each training prompt, which GRPO compares.
    n_samples_per_prompt: int = 8
    sampling_params: SamplingConfig = field(default_factory=SamplingConfig)
    eval_sampling_params: SamplingConfig = field(default_factory=lambda: SamplingConfig(temperature=0.0))
    # Responses to each held-out prompt.
    eval_n_samples_per_prompt: int = 1


@dataclass
class EnvironmentConfig:
    # Used for rows that name none themselves.
    env_class: str = "gsm8k"
    # module:Class of the user's own environments, by env_class.
    custom: dict[str, str] = field(default_factory=dict)
    # Per env_class keyword arguments, handed to the environment as env_config.
    skyrl_gym: dict[str, Any] = field(default_factory=dict)
    # Seconds to score one response. Where that takes longer, or raises, the response has failed: its reward is 0.
    timeout_s: float = 60.0
    # Share of a batch's responses that may fail so before the run ends.
    max_failed_share: float = 0.1


@dataclass
class Config:
    data: DataConfig = field(default_factory=DataConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
