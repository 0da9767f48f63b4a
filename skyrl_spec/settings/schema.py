"""Settings of a run: dataclasses with SkyRL's names. Values live in ``configs/``.

Each field carries its documentation (``setting``), which the command line, the reference pages and the errors read.
``null`` means that the value follows from other settings, as the documentation of the field says. Rules that tie
settings together are in ``rules``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from skyrl_spec.settings.allowed import (
    FROM_ONE,
    LEVEL,
    NOT_NEGATIVE,
    POSITIVE,
    PROBABILITY,
    SEEDS,
    SHARE,
    Allowed,
    Range,
)

DEVICES = ("cpu", "cuda")
ON_FAILURE = ("error", "warn")
DTYPES = ("fp32", "bf16")
LOSS_TYPES = ("soft_ce", "topk_soft_ce", "hard_ce")
LOSS_REDUCTIONS = ("token_mean", "sequence_mean", "seq_mean_token_sum_norm")
LOGGERS = ("console", "wandb", "tensorboard")
SPECULATIVE_METHODS = ("mtp", "dflash", "eagle3", "ngram")


def setting(default: Any, doc: str, allowed: Allowed = None) -> Any:
    """A dataclass field with its documentation and allowed values. A callable ``default`` makes the default.

    ``allowed`` None: the type alone decides. A value of None is always allowed where the type has it.
    """
    metadata = {"doc": doc, "allowed": allowed}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class DataConfig:
    """Prompts: parquet or JSONL files in SkyRL's dataset schema."""

    train_data: list[str] = setting(list, "Files with the training prompts.")
    val_data: list[str] = setting(list, "Files with the held-out prompts.")
    shuffle: bool = setting(
        True, "Shuffle the prompts anew in every epoch, from trainer.seed. false: keep the order of the files."
    )


@dataclass
class ModelConfig:
    """The policy's checkpoint."""

    path: str = setting("", "Hugging Face directory or hub name of a Qwen2, Qwen3 or MiMo model.")


@dataclass
class OptimizerConfig:
    """Adam, as Megatron implements it. Steps are optimizer steps."""

    lr: float = setting(1e-6, "Peak learning rate.", NOT_NEGATIVE)
    min_lr: float = setting(0.0, "Learning rate at the end of a decaying schedule.", NOT_NEGATIVE)
    weight_decay: float = setting(0.0, "Decoupled weight decay, as in AdamW.", NOT_NEGATIVE)
    adam_betas: list[float] = setting(
        lambda: [0.9, 0.95], "Decay rates of the running means of the gradient and of its square."
    )
    adam_eps: float = setting(1e-8, "Constant added to Adam's denominator.", POSITIVE)
    max_grad_norm: float = setting(1.0, "Gradient norm above which gradients are scaled down.", POSITIVE)
    num_warmup_steps: int = setting(0, "Steps of linear learning-rate warm-up.", NOT_NEGATIVE)
    scheduler: str = setting(
        "constant",
        "Learning-rate schedule after warm-up. cosine and linear decay to min_lr over the whole run.",
        ("constant", "cosine", "linear"),
    )


@dataclass
class MegatronConfig:
    """Parallel layout and precision of the policy workers. The workers that remain form data parallelism."""

    tensor_model_parallel_size: int = setting(1, "Workers that share one replica of the model.", FROM_ONE)
    use_distributed_optimizer: bool = setting(False, "Shard optimizer state over the data-parallel workers.")
    dtype: str = setting("bf16", "Type of parameters and activations. The optimizer keeps fp32 master weights.", DTYPES)
    recompute_activations: bool = setting(
        False, "Recompute activations in the backward pass. Saves memory, costs about a third of the training time."
    )
    fp32_output_head: bool | None = setting(
        None,
        "Compute logits in fp32 from bf16 states and weights, for losses and log-probs. "
        "null: true on cuda, false on cpu (where the product needs an fp32 copy of the head).",
    )


@dataclass
class PolicyConfig:
    """The policy that is trained."""

    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer_config: OptimizerConfig = field(default_factory=OptimizerConfig)
    megatron_config: MegatronConfig = field(default_factory=MegatronConfig)


@dataclass
class PlacementConfig:
    """Processes that train the policy, and their devices."""

    device: str = setting("cuda", "Device of workers and engines. cpu uses gloo, cuda uses NCCL.", DEVICES)
    policy_num_nodes: int = setting(
        1, "Machines of the policy workers. Each holds policy_num_gpus_per_node of them (cuda only).", FROM_ONE
    )
    policy_num_gpus_per_node: int | None = setting(
        None, "Policy workers on each machine. null: one model replica, tensor_model_parallel_size.", FROM_ONE
    )
    colocate_all: bool = setting(
        False, "Put one worker and one engine on each GPU. The engine keeps its memory while the workers train."
    )
    timeout_s: float = setting(600.0, "Seconds for all actors to be placed and started.", POSITIVE)
    worker_timeout_s: float = setting(
        7200.0,
        "Seconds for the workers to answer one call (a mini-batch, a checkpoint). A run ends if they do not.",
        POSITIVE,
    )
    collective_timeout_s: float = setting(
        1800.0,
        "Seconds that a worker waits for the others in a collective. Must cover rank 0 writing a checkpoint.",
        POSITIVE,
    )


@dataclass
class DynamicSamplingConfig:
    """DAPO's dynamic sampling: groups whose rewards are all equal are replaced by new ones."""

    type: str | None = setting(None, "filter: drop groups with equal rewards. null: keep all groups.", ("filter",))
    max_sample_batches: int = setting(
        10, "Batches sampled at most for one train batch. The step then continues with the groups it has.", FROM_ONE
    )


@dataclass
class OverlongConfig:
    """DAPO's soft overlong punishment: linear from 0 to -penalty_factor over the last buffer_len tokens."""

    buffer_len: int = setting(
        0, "Tokens before max_generate_length at which the punishment begins. 0: none.", NOT_NEGATIVE
    )
    penalty_factor: float = setting(1.0, "Punishment of a response of max_generate_length tokens.", NOT_NEGATIVE)


@dataclass
class AlgorithmConfig:
    """The policy objective. GRPO is DAPO with equal clips and no filter."""

    advantage_estimator: str = setting(
        "grpo", "grpo: the reward minus the mean reward of the prompt's responses.", ("grpo",)
    )
    grpo_norm_by_std: bool = setting(True, "Divide advantages by the standard deviation of the prompt's rewards.")
    eps_clip_low: float = setting(0.2, "Clip probability ratios below 1 - eps_clip_low.", LEVEL)
    eps_clip_high: float = setting(
        0.2,
        "Clip probability ratios above 1 + eps_clip_high. A value above eps_clip_low is DAPO's clip-higher.",
        POSITIVE,
    )
    clip_ratio_c: float | None = setting(
        None,
        "Bound c > 1 of the dual-clip objective for negative advantages. null: no dual clip.",
        Range(1, low_open=True),
    )
    loss_reduction: str = setting(
        "token_mean",
        "How token losses are averaged over a mini-batch: over all tokens, per sequence and then over sequences, "
        "or over sequences x max_generate_length.",
        LOSS_REDUCTIONS,
    )
    use_kl_loss: bool = setting(False, "Add a KL term to the initial policy. Keeps a frozen copy of it on the workers.")
    kl_loss_coef: float = setting(0.001, "Weight of the KL term.", NOT_NEGATIVE)
    use_tis: bool = setting(
        False, "Truncated importance sampling: weigh tokens by trainer probability over engine probability."
    )
    tis_imp_ratio_cap: float = setting(2.0, "Largest weight that use_tis gives a token.", POSITIVE)
    dynamic_sampling: DynamicSamplingConfig = field(default_factory=DynamicSamplingConfig)
    overlong: OverlongConfig = field(default_factory=OverlongConfig)


@dataclass
class MtpConfig:
    """The model's own MTP head as the draft, trained with the policy in every step."""

    enabled: bool = setting(False, "Draft with the MTP head and train it.")
    num_speculative_tokens: int = setting(3, "Tokens drafted at a time, k. The head runs k times for them.", FROM_ONE)
    unroll_steps: int | None = setting(
        None, "Depths at which the head is trained on its own output. null: num_speculative_tokens.", FROM_ONE
    )
    loss_type: str = setting(
        "soft_ce",
        "Target of the draft's cross-entropy: the policy's distribution, its loss_topk most probable tokens, or the "
        "sampled token.",
        LOSS_TYPES,
    )
    loss_topk: int = setting(32, "Number of teacher tokens kept by topk_soft_ce.", FROM_ONE)
    loss_chunk_size: int = setting(1024, "Tokens whose logits exist at the same time in the draft's loss.", FROM_ONE)
    optimizer_config: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-4))


@dataclass
class DflashConfig:
    """A DFlash block-diffusion draft, trained with the policy in every step. null: what the draft at path says."""

    enabled: bool = setting(False, "Draft with the DFlash draft and train it.")
    path: str | None = setting(
        None,
        "Directory or hub name of the draft to start from. null: a draft from scratch with the target's width, heads "
        "and RoPE.",
    )
    num_layers: int | None = setting(None, "Layers of the draft. From scratch: 5.", FROM_ONE)
    block_size: int | None = setting(
        None, "Slots of a block: the last sampled token and the drafted ones. From scratch: 16.", Range(2)
    )
    num_speculative_tokens: int | None = setting(None, "Tokens drafted at a time. null: block_size - 1.", FROM_ONE)
    target_layer_ids: list[int] | None = setting(
        None, "Target layers whose outputs the draft reads, from 0, ascending. From scratch: spread evenly."
    )
    mask_token_id: int | None = setting(
        None,
        "Token in the slots to be drafted. From scratch: the tokenizer's mask token, else the first row of the "
        "vocabulary that no token uses.",
        NOT_NEGATIVE,
    )
    anchors_per_sequence: int = setting(
        128, "Blocks trained on per sequence and step. Each begins at a response token drawn at random.", FROM_ONE
    )
    loss_type: str = setting(
        "soft_ce",
        "Target of the draft's cross-entropy: the policy's distribution, its loss_topk most probable tokens, or the "
        "sampled token.",
        LOSS_TYPES,
    )
    loss_topk: int = setting(32, "Number of teacher tokens kept by topk_soft_ce.", FROM_ONE)
    loss_decay_gamma: float | None = setting(
        None,
        "Drafted token i of a block has weight exp(-(i - 1) / gamma). null: 4, 5 or 7 for blocks of 8, 10 or 16, "
        "else half the block size.",
        POSITIVE,
    )
    loss_chunk_size: int = setting(1024, "Tokens whose logits exist at the same time in the draft's loss.", FROM_ONE)
    export_rope_scaling: dict[str, Any] | None = setting(
        None,
        "RoPE scaling for the config.json of an exported draft, such as {rope_type: yarn, factor: 4.0}. Training "
        "does not scale.",
    )
    optimizer_config: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-4))


@dataclass
class WarmupConfig:
    """``skyrl-spec warmup-draft``: trains the draft on responses of the frozen policy."""

    run_dir: str | None = setting(None, "Output directory. null: trainer.run_dir + _warmup.")
    from_scratch: bool = setting(
        True, "Start from random weights. false: start from trainer.dflash.path or the checkpoint's MTP head."
    )
    num_steps: int = setting(200, "Training steps, each on trainer.train_batch_size prompts.", FROM_ONE)
    update_epochs_per_batch: int = setting(1, "Passes over each batch of responses.", FROM_ONE)
    optimizer_config: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(lr=6e-4, scheduler="cosine", num_warmup_steps=20)
    )


@dataclass
class CanaryConfig:
    """Checks during a run: engines hold the trainer's weights, and the draft does not change what is sampled."""

    enabled: bool = setting(
        True, "After syncs, compare log-probs and drafts of trainer and engines on a few fixed prompts."
    )
    interval: int = setting(10, "Syncs between two checks. The first sync is always checked.", FROM_ONE)
    num_prompts: int = setting(4, "Fixed prompts, spread over the training data.", FROM_ONE)
    num_tokens: int = setting(16, "Tokens sampled for each fixed prompt.", Range(2))
    num_baselines: int = setting(
        3,
        "Checks before the first sync, with different seeds. They measure the rounding noise between trainer and "
        "engines. A mismatch counts as one only if it repeats under as many other seeds.",
        FROM_ONE,
    )
    on_mismatch: str = setting(
        "error", "error: save a checkpoint and end the run. warn: print a warning and continue.", ON_FAILURE
    )
    lossless_interval: int = setting(
        0,
        "Steps between two checks that the engines generate the same with and without the draft. 0: none. Needs one "
        "more engine (cpu only).",
        NOT_NEGATIVE,
    )
    lossless_num_samples: int = setting(64, "Responses to each fixed prompt in such a check.", FROM_ONE)
    lossless_level: float = setting(1e-4, "Probability that one such check fails by chance.", LEVEL)
    max_logprobs_diff: float | None = setting(
        None,
        "Mean |log-prob difference| between engine and trainer above which a warning is printed. null: 0.001 in fp32, "
        "0.1 in bf16.",
        POSITIVE,
    )
    max_acceptance_gap: float = setting(
        0.3,
        "Largest difference of predicted and measured acceptance length without a warning, as a share of the latter.",
        POSITIVE,
    )


@dataclass
class TrainerConfig:
    """The run: steps, batches, checkpoints, logging."""

    policy: PolicyConfig = field(default_factory=PolicyConfig)
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    mtp: MtpConfig = field(default_factory=MtpConfig)
    dflash: DflashConfig = field(default_factory=DflashConfig)
    warmup: WarmupConfig = field(default_factory=WarmupConfig)
    canary: CanaryConfig = field(default_factory=CanaryConfig)
    run_dir: str = setting("runs/default", "Output directory of the run.")
    dry_run: bool = setting(False, "Check everything, print the plan (processes, memory, sizes) and start nothing.")
    seed: int = setting(0, "Seed of sampling, shuffling and the draft's random positions.", SEEDS)
    epochs: int = setting(1, "Passes over the training prompts.", FROM_ONE)
    max_training_steps: int | None = setting(None, "Training steps at most. null: until the epochs are over.", FROM_ONE)
    update_epochs_per_batch: int = setting(1, "Passes over each batch of rollouts.", FROM_ONE)
    max_skipped_updates: int = setting(
        3,
        "Consecutive updates that may be skipped because the gradient is not finite. One more ends the run. Policy "
        "and draft count separately.",
        NOT_NEGATIVE,
    )
    train_batch_size: int = setting(
        128, "Prompts of a training step. Each has generator.n_samples_per_prompt responses.", FROM_ONE
    )
    policy_mini_batch_size: int = setting(128, "Prompts of an optimizer step.", FROM_ONE)
    eval_batch_size: int = setting(1024, "Held-out prompts generated at a time.", FROM_ONE)
    micro_train_batch_size_per_gpu: int = setting(
        8, "Sequences of one forward and backward pass on a worker.", FROM_ONE
    )
    micro_forward_batch_size_per_gpu: int = setting(
        16, "Sequences of one forward pass without gradients on a worker.", FROM_ONE
    )
    logprobs_chunk_size: int = setting(
        1024, "Tokens whose logits exist at the same time in the policy's log-probs.", FROM_ONE
    )
    max_prompt_length: int = setting(
        512, "Tokens of a prompt at most. Longer prompts are skipped and counted.", FROM_ONE
    )
    eval_interval: int = setting(
        10, "Steps between evaluations on data.val_data, with generator.eval_sampling_params. 0: none.", NOT_NEGATIVE
    )
    eval_before_train: bool = setting(True, "Evaluate once before the first step.")
    measure_speedup: bool = setting(
        False,
        "After the last step, measure tokens/s with and without the draft on the same weights and prompts (cpu only).",
    )
    ckpt_interval: int = setting(
        10,
        "Steps between checkpoints in run_dir/checkpoints. The last step is saved too. 0: save only when SIGTERM "
        "stops the run.",
        NOT_NEGATIVE,
    )
    max_ckpts_to_keep: int = setting(
        2, "Checkpoints to keep. Older ones are removed once a new one is complete.", FROM_ONE
    )
    hf_save_interval: int = setting(
        0,
        "Steps between exports to run_dir/exports/step_N, as skyrl-spec export writes them. A multiple of "
        "ckpt_interval. 0: none. All are kept.",
        NOT_NEGATIVE,
    )
    on_ckpt_failure: str = setting(
        "error",
        "When a checkpoint cannot be written: error ends the run, warn prints a warning and continues.",
        ON_FAILURE,
    )
    resume_mode: str | None = setting(
        None,
        "null: start from the beginning. latest: resume from the newest checkpoint in run_dir, if there is one. "
        "from_path: resume from resume_path.",
        ("latest", "from_path"),
    )
    resume_path: str | None = setting(None, "Checkpoint to resume from (RUN/checkpoints/step_N), for from_path.")
    max_restarts: int = setting(
        0,
        "How often a run restarts by itself, from its last checkpoint or its beginning, when a worker fails or the "
        "sync canary finds a mismatch.",
        NOT_NEGATIVE,
    )
    save_final_model: bool = setting(
        True,
        "At the end, write the policy with its MTP head to run_dir/model, and a DFlash draft to run_dir/draft, as "
        "Hugging Face checkpoints.",
    )
    logger: list[str] = setting(
        lambda: ["console"], "Any of console, wandb and tensorboard. metrics.jsonl is always written."
    )
    project_name: str = setting("skyrl_spec", "wandb project.")
    run_name: str = setting("default", "Name of the run in wandb and in exports.")


@dataclass
class SamplingConfig:
    """How responses are sampled."""

    max_generate_length: int = setting(1024, "Tokens of a response at most.", FROM_ONE)
    temperature: float = setting(1.0, "Sampling temperature. 0 is greedy, for evaluation only.", NOT_NEGATIVE)
    top_p: float = setting(1.0, "Nucleus sampling: probability mass of the most probable tokens to sample from.", SHARE)
    top_k: int = setting(-1, "Number of most probable tokens to sample from. -1: all.")
    min_p: float = setting(
        0.0,
        "Leave out tokens less probable than this share of the most probable one. Must be 0 with a draft.",
        PROBABILITY,
    )


@dataclass
class InferenceEngineConfig:
    """The vLLM engines."""

    num_engines: int = setting(1, "Number of engines. Prompts are distributed over them.", FROM_ONE)
    tensor_parallel_size: int = setting(1, "GPUs of an engine.", FROM_ONE)
    dtype: str | None = setting(
        None, "Type of weights and activations. null: trainer.policy.megatron_config.dtype.", DTYPES
    )
    gpu_memory_utilization: float = setting(0.8, "Share of a GPU's memory that an engine takes.", SHARE)
    cpu_kvcache_space: float = setting(1.0, "KV cache of a CPU engine, in GiB.", POSITIVE)
    max_num_seqs: int = setting(256, "Responses that an engine generates at the same time.", FROM_ONE)
    enable_prefix_caching: bool = setting(
        True, "Reuse the keys of common prompt prefixes. The cache is emptied after every sync."
    )
    enforce_eager: bool = setting(
        False, "No compilation and no CUDA graphs. Starts sooner; faster for tiny models on CPU."
    )
    weight_sync_backend: str | None = setting(
        None,
        "Transport of weights to the engines. null: ray on cpu, nccl on cuda, ipc on cuda with "
        "trainer.placement.colocate_all.",
        ("ray", "nccl", "ipc"),
    )
    generate_timeout_s: float = setting(
        3600.0,
        "Seconds for an engine to answer one call (a batch). An engine that takes longer or dies is restarted; with "
        "nccl or ipc the run ends.",
        POSITIVE,
    )
    max_restarts: int = setting(
        3, "Restarts of engines, all engines together, until the run itself restarts.", NOT_NEGATIVE
    )
    speculative_config: dict[str, Any] | None = setting(
        None,
        "vLLM's speculative_config. null: from trainer.mtp or trainer.dflash, which also complete the one given here. "
        "Options that change what is sampled, or hide the draft from the canary, are refused.",
    )
    engine_init_kwargs: dict[str, Any] = setting(dict, "Further vLLM engine arguments.")


@dataclass
class GeneratorConfig:
    """Rollouts."""

    inference_engine: InferenceEngineConfig = field(default_factory=InferenceEngineConfig)
    n_samples_per_prompt: int = setting(8, "Responses to each training prompt. GRPO compares them.", FROM_ONE)
    sampling_params: SamplingConfig = field(default_factory=SamplingConfig)
    eval_sampling_params: SamplingConfig = field(default_factory=lambda: SamplingConfig(temperature=0.0))
    eval_n_samples_per_prompt: int = setting(1, "Responses to each held-out prompt.", FROM_ONE)


@dataclass
class EnvironmentConfig:
    """Environments that score the responses."""

    env_class: str = setting("gsm8k", "Environment of rows that name none.")
    custom: dict[str, str] = setting(dict, "Your own environments: module:Class by env_class.")
    skyrl_gym: dict[str, Any] = setting(
        dict, "Keyword arguments by env_class. The environment gets them as env_config."
    )
    timeout_s: float = setting(
        60.0,
        "Seconds to score one response. A response that takes longer, or raises, has failed: its reward is 0.",
        POSITIVE,
    )
    max_failed_share: float = setting(0.1, "Share of a batch's responses that may fail. More end the run.", Range(0, 1))


@dataclass
class Config:
    """All settings of a run."""

    data: DataConfig = field(default_factory=DataConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
