"""Settings of a run: dataclasses with SkyRL's names, their defaults, allowed values and documentation.

The command line, the reference pages and the error messages read the documentation from here. ``null`` means that the
value follows from other settings, as the field's documentation says. ``policy`` and ``draft`` declare the settings of
the two models, ``algorithm`` those of the objective. ``rules`` holds the rules that tie several settings together.
``configs/`` holds ready-made sets of values.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from skyrl_spec.settings.algorithm import AlgorithmConfig
from skyrl_spec.settings.allowed import (
    DEVICES,
    DRAFT_SAMPLE_METHODS,
    DTYPES,
    FROM_ONE,
    LEVEL,
    NOT_NEGATIVE,
    ON_FAILURE,
    POSITIVE,
    PROBABILITY,
    RUNNING_REQUESTS,
    SEEDS,
    SHARE,
    SLEEP_LEVELS,
    Range,
)
from skyrl_spec.settings.draft import DflashConfig, DraftTrainingConfig, MtpConfig, WarmupConfig
from skyrl_spec.settings.field import setting
from skyrl_spec.settings.hardware import HardwareConfig
from skyrl_spec.settings.policy import PolicyConfig, RefConfig


@dataclass
class DataConfig:
    """Datasets of prompts: .parquet or .jsonl files in SkyRL's format."""

    train_data: list[str] = setting(list, "Files with the training prompts.")
    val_data: list[str] = setting(list, "Files with the held-out prompts.")
    shuffle: bool = setting(
        True, "Shuffle the training prompts in every epoch, seeded by trainer.seed. false: keep the order of the files."
    )


@dataclass
class PlacementConfig:
    """Devices, machines and time limits of the processes."""

    device: str = setting("cuda", "Device of workers and engines.", DEVICES)
    policy_num_nodes: int = setting(
        1, "Machines with policy workers. On cuda each holds policy_num_gpus_per_node workers.", FROM_ONE
    )
    policy_num_gpus_per_node: int | None = setting(
        None,
        "Policy workers on each machine. null: as few as the parallel sizes of megatron_config need.",
        FROM_ONE,
    )
    colocate_all: bool = setting(
        False,
        "Put workers and engines on the same GPUs (cuda only). They take turns: the engine sleeps while the worker "
        "trains (generator.inference_engine.sleep_level), and the worker offloads while the engine samples.",
    )
    timeout_s: float = setting(
        600.0, "Seconds for all processes to be placed and started. Then the run ends with an error.", POSITIVE
    )
    worker_timeout_s: float = setting(
        7200.0,
        "Seconds for the workers to answer one call (a mini-batch, a checkpoint). Then the run ends with an error, or "
        "restarts (trainer.max_restarts).",
        POSITIVE,
    )
    collective_timeout_s: float = setting(
        1800.0,
        "Seconds that a worker waits for the others in a collective operation. Must be long enough for rank 0 to "
        "write a checkpoint, and at most worker_timeout_s.",
        POSITIVE,
    )


@dataclass
class CanaryConfig:
    """Checks during a run.

    The sync canary checks that the engines hold the trainer's weights. The losslessness canary checks that the draft
    does not change the distribution of responses.
    """

    enabled: bool = setting(
        True,
        "Sync canary: after weight syncs, compare log-probs and drafts of trainer and engines on a few fixed prompts.",
    )
    interval: int = setting(
        10, "Syncs between two checks of the sync canary. The first sync is always checked.", FROM_ONE
    )
    num_prompts: int = setting(4, "Number of fixed prompts, taken from the training data.", FROM_ONE)
    num_tokens: int = setting(16, "Tokens sampled for each fixed prompt in the sync canary.", Range(2))
    num_baselines: int = setting(
        3,
        "Checks before the first sync, with different seeds. They measure the rounding noise between trainer and "
        "engines. Later a mismatch counts only if it repeats under most of as many other seeds.",
        FROM_ONE,
    )
    on_mismatch: str = setting(
        "error",
        "When a canary fails: error ends the run, and after a mismatch of the sync canary first saves the completed "
        "step. warn prints a warning and continues.",
        ON_FAILURE,
    )
    lossless_interval: int = setting(
        0,
        "Steps between two checks of the losslessness canary, which compares responses with and without the draft. "
        "0: none. Needs an additional engine (cpu only).",
        NOT_NEGATIVE,
    )
    lossless_num_samples: int = setting(64, "Responses to each fixed prompt in the losslessness canary.", FROM_ONE)
    lossless_level: float = setting(
        1e-4, "Probability that the losslessness canary fails by chance in one check.", LEVEL
    )
    max_logprobs_diff: float | None = setting(
        None,
        "Print a warning if engine and trainer differ by more than this in the log-probs of a step's rollouts, on "
        "average. null: 0.001 in fp32, 0.1 in bf16.",
        POSITIVE,
    )
    max_acceptance_gap: float = setting(
        0.3,
        "Print a warning if predicted and measured acceptance length differ by more than this share of the measured "
        "one.",
        POSITIVE,
    )


@dataclass
class FullyAsyncConfig:
    """Sampling of the next batch beside training, instead of one after the other."""

    enabled: bool = setting(
        False,
        "Sample the next batch while the workers train. Engines and workers then need GPUs, or cores, of their own.",
    )
    max_staleness_steps: int = setting(
        1,
        "Training steps by which the policy may be ahead of the weights that sampled its batch. 0: none, as without "
        "enabled. 1: a batch is sampled during the training step before. 2 and more: responses are sampled without "
        "pause, and go on across syncs.",
        NOT_NEGATIVE,
    )
    running_requests: str = setting(
        "recompute",
        "With max_staleness_steps from 2: what a sync does with responses that are being sampled. recompute: they go "
        "on, and their keys are computed again with the new weights. keep: they go on with the keys they have. wait: "
        "the sync waits until they have ended.",
        RUNNING_REQUESTS,
    )
    allow_uncorrected: bool = setting(
        False, "Allow trainer.algorithm.use_tis=false, though batches are sampled with older weights."
    )


@dataclass
class TrainerConfig:
    """Steps, batches, evaluation, checkpoints and logging of the run."""

    policy: PolicyConfig = field(default_factory=PolicyConfig)
    ref: RefConfig = field(default_factory=RefConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    mtp: MtpConfig = field(default_factory=MtpConfig)
    dflash: DflashConfig = field(default_factory=DflashConfig)
    draft: DraftTrainingConfig = field(default_factory=DraftTrainingConfig)
    fully_async: FullyAsyncConfig = field(default_factory=FullyAsyncConfig)
    warmup: WarmupConfig = field(default_factory=WarmupConfig)
    canary: CanaryConfig = field(default_factory=CanaryConfig)
    run_dir: str = setting("runs/default", "Output directory of the run.")
    dry_run: bool = setting(False, "Check everything, print the plan (processes, memory, sizes), and stop.")
    seed: int = setting(0, "Seed of sampling, shuffling and the draft's random positions.", SEEDS)
    epochs: int = setting(1, "Passes over the training prompts.", FROM_ONE)
    max_training_steps: int | None = setting(
        None, "Largest number of training steps. null: no limit but epochs.", FROM_ONE
    )
    update_epochs_per_batch: int = setting(1, "Passes over each batch of rollouts.", FROM_ONE)
    max_skipped_updates: int = setting(
        3,
        "Consecutive updates that may be skipped because the gradient is not finite. One more ends the run. Updates of "
        "policy and draft count separately.",
        NOT_NEGATIVE,
    )
    train_batch_size: int = setting(
        128, "Prompts in a training step. Each gets generator.n_samples_per_prompt responses.", FROM_ONE
    )
    policy_mini_batch_size: int = setting(128, "Prompts in an optimizer step. Must divide train_batch_size.", FROM_ONE)
    eval_batch_size: int = setting(1024, "Held-out prompts sent to the engines at the same time.", FROM_ONE)
    max_tokens_per_microbatch: int = setting(
        8192,
        "Tokens in one forward and backward pass of a worker. Sequences are packed end to end up to this number, times "
        "context_parallel_size. A longer sequence has a pass to itself.",
        FROM_ONE,
    )
    logprobs_chunk_size: int = setting(
        1024, "Tokens whose logits the policy's log-probs hold in memory at the same time.", FROM_ONE
    )
    max_prompt_length: int = setting(
        512, "Longest prompt, in tokens. Longer prompts are skipped; their number is printed.", FROM_ONE
    )
    eval_interval: int = setting(
        10,
        "Steps between evaluations on data.val_data, with generator.eval_sampling_params. The last step is evaluated "
        "too. 0: none.",
        NOT_NEGATIVE,
    )
    eval_before_train: bool = setting(True, "Evaluate before the first step.")
    measure_speedup: bool = setting(
        False,
        "After the last step, measure tokens/s with and without the draft, on the same weights and prompts. Needs an "
        "additional engine (cpu only).",
    )
    ckpt_interval: int = setting(
        10,
        "Steps between checkpoints in run_dir/checkpoints. The last step is saved too. 0: save only if SIGTERM stops "
        "the run.",
        NOT_NEGATIVE,
    )
    max_ckpts_to_keep: int = setting(
        2, "Number of checkpoints to keep. The oldest is removed when a new one is complete.", FROM_ONE
    )
    hf_save_interval: int = setting(
        0,
        "Steps between exports of a checkpoint to run_dir/exports/step_N, in the form of skyrl-spec export. Must be a "
        "multiple of ckpt_interval. All exports are kept. 0: none.",
        NOT_NEGATIVE,
    )
    on_ckpt_failure: str = setting(
        "error",
        "When a checkpoint cannot be written: error ends the run, warn prints a warning and continues.",
        ON_FAILURE,
    )
    resume_mode: str | None = setting(
        None,
        "null: start from the beginning. latest: resume from the newest checkpoint in run_dir, or start if there is "
        "none. from_path: resume from resume_path.",
        ("latest", "from_path"),
    )
    resume_path: str | None = setting(None, "Checkpoint for resume_mode=from_path, such as RUN/checkpoints/step_N.")
    resume_with_new_data: bool = setting(
        False,
        "Resume although data.train_data is not the data of the checkpoint. The new data begins at its first epoch. "
        "false: such a resumption is refused.",
    )
    max_restarts: int = setting(
        0,
        "How often a run restarts by itself when a worker fails, engines can no longer be restarted, or the sync "
        "canary finds a mismatch. It continues from its last checkpoint, or starts again if there is none.",
        NOT_NEGATIVE,
    )
    save_final_model: bool = setting(
        True,
        "At the end, write Hugging Face checkpoints: the policy with its MTP head to run_dir/model, a DFlash draft to "
        "run_dir/draft.",
    )
    logger: list[str] = setting(
        lambda: ["console"], "Where metrics go: any of console, wandb and tensorboard. metrics.jsonl is always written."
    )
    project_name: str = setting("skyrl_spec", "Project in wandb.")
    run_name: str = setting("default", "Name of the run in wandb and in exports.")
    tags: list[str] = setting(list, "Tags of the run in wandb.")
    dump_eval_results: bool = setting(
        True, "Write every response of an evaluation, with its reward, to run_dir/dumped_evals/step_N.jsonl."
    )


@dataclass
class SamplingConfig:
    """Sampling of responses."""

    max_generate_length: int = setting(1024, "Longest response, in tokens.", FROM_ONE)
    temperature: float = setting(
        1.0,
        "Sampling temperature. 0 is greedy, which is allowed in evaluation only. vLLM allows at most 2.",
        Range(0, 2),
    )
    top_p: float = setting(
        1.0, "Nucleus sampling: sample from the most probable tokens with this total probability.", SHARE
    )
    top_k: int = setting(-1, "Sample from this many most probable tokens. At least 1, or -1: all tokens.")
    min_p: float = setting(
        0.0,
        "Do not sample tokens whose probability is below min_p times that of the most probable token. Must be 0 with a "
        "draft.",
        PROBABILITY,
    )
    stop: list[str] = setting(
        list, "Texts that end a response, such as [</answer>]. A response keeps the one it ends at."
    )


@dataclass
class InferenceEngineConfig:
    """The vLLM engines, which generate the responses."""

    num_engines: int = setting(1, "Number of engines. Prompts are divided among them.", FROM_ONE)
    tensor_parallel_size: int = setting(1, "Tensor-parallel size, which is the number of GPUs of an engine.", FROM_ONE)
    dtype: str | None = setting(
        None, "Type of weights and activations. null: trainer.policy.megatron_config.dtype.", DTYPES
    )
    gpu_memory_utilization: float = setting(0.8, "Share of a GPU's memory that an engine takes (cuda only).", SHARE)
    cpu_kvcache_space: float = setting(1.0, "Size of the KV cache of an engine, in GiB (cpu only).", POSITIVE)
    max_num_seqs: int = setting(256, "Largest number of responses that an engine generates at the same time.", FROM_ONE)
    enable_prefix_caching: bool = setting(
        True, "Reuse the KV cache of common prompt prefixes. It is emptied after every weight sync."
    )
    sleep_level: int = setting(
        1,
        "How engines sleep while the workers train, with trainer.placement.colocate_all. 1: their weights wait in host "
        "memory. 2: they drop them, and every sync brings policy and draft. 0: they keep their memory.",
        SLEEP_LEVELS,
    )
    enforce_eager: bool = setting(
        False, "Use no compilation and no CUDA graphs. The engine starts sooner and usually generates more slowly."
    )
    weight_sync_backend: str | None = setting(
        None,
        "Transport of weights to the engines: ray on cpu, nccl on cuda, ipc on cuda with "
        "trainer.placement.colocate_all. null: the one that fits.",
        ("ray", "nccl", "ipc"),
    )
    generate_timeout_s: float = setting(
        3600.0,
        "Seconds for an engine to answer a call (a batch is sampled in many). An engine that takes longer or dies is "
        "restarted (cpu only). On cuda the run ends with an error, or restarts (trainer.max_restarts).",
        POSITIVE,
    )
    max_restarts: int = setting(
        3,
        "Restarts of engines, all engines together. One more failure ends the run, or restarts it "
        "(trainer.max_restarts).",
        NOT_NEGATIVE,
    )
    speculative_config: dict[str, Any] | None = setting(
        None,
        "vLLM's speculative_config. null: made from trainer.mtp or trainer.dflash. Entries given here are added to "
        "it, or configure a draft that is not trained, such as {method: ngram}. Entries that make rollouts inexact, "
        "or hide the draft from the sync canary, are refused.",
    )
    engine_init_kwargs: dict[str, Any] = setting(
        dict, "Further arguments of vLLM's engine. Arguments that other settings decide are refused."
    )


@dataclass
class SpeculationConfig:
    """When the engines draft, and how many tokens at a time."""

    schedule: Any = setting(
        "fixed",
        "Tokens drafted at a time, by the number of responses that an engine generates at the same time. fixed: always "
        "num_speculative_tokens. auto: the number from 0 to num_speculative_tokens that gives most tokens/s, by step "
        "times and acceptance measured in the engine; runs are then not repeatable bit by bit. A table: rows "
        "[first, last, tokens], as in [[1,8,7],[9,64,3],[65,256,0]].",
    )
    draft_sample_method: str = setting(
        "greedy",
        "How the engines draft a token. greedy: the draft's most probable one. probabilistic: one sampled from the "
        "draft's distribution at the sampling temperature, which is accepted more often where the policy is undecided "
        "and the draft agrees with it, and needs memory for a distribution of each drafted token.",
        DRAFT_SAMPLE_METHODS,
    )


@dataclass
class GeneratorConfig:
    """Generation of responses."""

    inference_engine: InferenceEngineConfig = field(default_factory=InferenceEngineConfig)
    speculation: SpeculationConfig = field(default_factory=SpeculationConfig)
    n_samples_per_prompt: int = setting(
        8, "Responses to each training prompt. grpo needs at least 2, which it compares with one another.", FROM_ONE
    )
    sampling_params: SamplingConfig = field(default_factory=SamplingConfig)
    eval_sampling_params: SamplingConfig = field(default_factory=lambda: SamplingConfig(temperature=0.0))
    eval_n_samples_per_prompt: int = setting(1, "Responses to each held-out prompt.", FROM_ONE)
    max_turns: int = setting(
        1,
        "Most turns of a response. Between two turns the environment answers. Its tokens are not trained on.",
        FROM_ONE,
    )
    max_input_length: int | None = setting(
        None,
        "Most tokens in front of a turn: the prompt, earlier turns and answers. A response ends if the next turn would "
        "have more. Required for max_turns above 1. null: trainer.max_prompt_length.",
        FROM_ONE,
    )
    chat_template_kwargs: dict[str, Any] = setting(
        dict, "Further arguments of the model's chat template, such as {enable_thinking: false}."
    )
    zero_reward_on_non_stop: bool = setting(
        False, "Reward 0 for a response that ended at max_generate_length, not at an end token. In evaluations too."
    )
    apply_overlong_filtering: bool = setting(
        False, "Do not train on responses that ended at max_generate_length. Advantages of their group count them."
    )


@dataclass
class EnvironmentConfig:
    """Environments, which score the responses."""

    env_class: str = setting("gsm8k", "Environment of rows without the field env_class.")
    custom: dict[str, str] = setting(
        dict, "Your own environments, as {env_class: 'module:Class'} with a subclass of skyrl_gym's BaseTextEnv."
    )
    skyrl_gym: dict[str, Any] = setting(
        dict, "Settings of environments, as {env_class: {key: value}}. The environment gets its own as env_config."
    )
    servers: dict[str, Any] = setting(
        dict,
        "Servers that environments use, as {name: {command: 'python server.py', url: 'http://127.0.0.1:8000/health'}}. "
        "A run starts them first, waits until the address answers, and ends them last. One that answers already is "
        "used as it is.",
    )
    timeout_s: float = setting(
        60.0,
        "Seconds to score one response. Beyond that, or if its environment raises an error, the response has failed "
        "and its reward is 0.",
        POSITIVE,
    )
    max_env_workers: int = setting(
        32,
        "Processes that play environments at the same time, at most. As many as there are cores begin, and two more "
        "for each that has been busy with one turn for half a second.",
        FROM_ONE,
    )
    max_failed_share: float = setting(
        0.1, "Share of a batch's responses that may fail. A larger share ends the run.", Range(0, 1)
    )


@dataclass
class Config:
    """All settings of a run."""

    data: DataConfig = field(default_factory=DataConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
