"""Every rule the settings alone decide, checked before anything is read or started.

Rules about one setting are rows of the tables below; rules that tie settings together are functions. What needs the
disk (model, data, devices) is in ``preflight``.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from skyrl_spec.config import Config, ConfigError, TrainerConfig
from skyrl_spec.rollout.speculative import (
    build_speculative_config,
    require_exact_sampling,
    require_other_engine_args,
)


class Layout(NamedTuple):
    """Trainer processes, how many of them share a model replica, and how many replicas that makes."""

    world_size: int
    tp: int
    dp: int


class Range(NamedTuple):
    """Allowed numbers; an open end is excluded."""

    low: float
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def __contains__(self, value: object) -> bool:
        assert isinstance(value, int | float)
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return above and below and math.isfinite(value)

    def __str__(self) -> str:
        low = f"{'above' if self.low_open else 'at least'} {self.low:g}"
        high = f"{'below' if self.high_open else 'at most'} {self.high:g}"
        return low if math.isinf(self.high) else f"{low} and {high}"


POSITIVE = Range(0, low_open=True)
NOT_NEGATIVE = Range(0)
FROM_ONE = Range(1)
PROBABILITY = Range(0, 1, high_open=True)
# Those of torch and vLLM are 64 bits wide, numpy's of old are 32.
SEEDS = Range(0, 2**32 - 1)

_ENGINE = "generator.inference_engine"
_MEGATRON = "trainer.policy.megatron_config"
_OPTIMIZERS = tuple(f"trainer.{part}.optimizer_config" for part in ("policy", "mtp", "dflash", "warmup"))
_SAMPLINGS = ("generator.sampling_params", "generator.eval_sampling_params")

# None is allowed wherever the schema allows it, and means what the schema says.
RANGES: dict[str, Range] = {
    "trainer.placement.policy_num_nodes": FROM_ONE,
    "trainer.placement.policy_num_gpus_per_node": FROM_ONE,
    "trainer.placement.timeout_s": POSITIVE,
    f"{_MEGATRON}.tensor_model_parallel_size": FROM_ONE,
    "trainer.algorithm.eps_clip_low": Range(0, 1, low_open=True, high_open=True),
    "trainer.algorithm.eps_clip_high": POSITIVE,
    "trainer.algorithm.clip_ratio_c": Range(1, low_open=True),
    "trainer.algorithm.kl_loss_coef": NOT_NEGATIVE,
    "trainer.algorithm.tis_imp_ratio_cap": POSITIVE,
    "trainer.algorithm.dynamic_sampling.max_sample_batches": FROM_ONE,
    "trainer.algorithm.overlong.buffer_len": NOT_NEGATIVE,
    "trainer.algorithm.overlong.penalty_factor": NOT_NEGATIVE,
    "trainer.mtp.num_speculative_tokens": FROM_ONE,
    "trainer.mtp.unroll_steps": FROM_ONE,
    "trainer.mtp.loss_topk": FROM_ONE,
    "trainer.mtp.loss_chunk_size": FROM_ONE,
    "trainer.dflash.num_layers": FROM_ONE,
    # The sampled token and a drafted one.
    "trainer.dflash.block_size": Range(2),
    "trainer.dflash.num_speculative_tokens": FROM_ONE,
    "trainer.dflash.mask_token_id": NOT_NEGATIVE,
    "trainer.dflash.anchors_per_sequence": FROM_ONE,
    "trainer.dflash.loss_topk": FROM_ONE,
    "trainer.dflash.loss_decay_gamma": POSITIVE,
    "trainer.dflash.loss_chunk_size": FROM_ONE,
    "trainer.canary.interval": FROM_ONE,
    "trainer.canary.num_prompts": FROM_ONE,
    # A block is drafted behind the first token, and needs one more to be held against.
    "trainer.canary.num_tokens": Range(2),
    "trainer.canary.lossless_interval": NOT_NEGATIVE,
    "trainer.canary.lossless_num_samples": FROM_ONE,
    "trainer.canary.lossless_level": Range(0, 1, low_open=True, high_open=True),
    "trainer.canary.max_logprobs_diff": POSITIVE,
    "trainer.canary.max_acceptance_gap": POSITIVE,
    "trainer.warmup.num_steps": FROM_ONE,
    "trainer.warmup.update_epochs_per_batch": FROM_ONE,
    "trainer.ckpt_interval": NOT_NEGATIVE,
    "trainer.max_restarts": NOT_NEGATIVE,
    "trainer.hf_save_interval": NOT_NEGATIVE,
    "trainer.max_ckpts_to_keep": FROM_ONE,
    "trainer.seed": SEEDS,
    "trainer.epochs": FROM_ONE,
    "trainer.max_training_steps": FROM_ONE,
    "trainer.update_epochs_per_batch": FROM_ONE,
    "trainer.max_skipped_updates": NOT_NEGATIVE,
    "trainer.train_batch_size": FROM_ONE,
    "trainer.policy_mini_batch_size": FROM_ONE,
    "trainer.eval_batch_size": FROM_ONE,
    "trainer.micro_train_batch_size_per_gpu": FROM_ONE,
    "trainer.micro_forward_batch_size_per_gpu": FROM_ONE,
    "trainer.logprobs_chunk_size": FROM_ONE,
    "trainer.max_prompt_length": FROM_ONE,
    "trainer.eval_interval": NOT_NEGATIVE,
    f"{_ENGINE}.num_engines": FROM_ONE,
    f"{_ENGINE}.tensor_parallel_size": FROM_ONE,
    f"{_ENGINE}.gpu_memory_utilization": Range(0, 1, low_open=True),
    f"{_ENGINE}.cpu_kvcache_space": POSITIVE,
    f"{_ENGINE}.max_num_seqs": FROM_ONE,
    f"{_ENGINE}.generate_timeout_s": POSITIVE,
    f"{_ENGINE}.max_restarts": NOT_NEGATIVE,
    "environment.timeout_s": POSITIVE,
    "environment.max_failed_share": Range(0, 1),
    "generator.n_samples_per_prompt": FROM_ONE,
    "generator.eval_n_samples_per_prompt": FROM_ONE,
    # Rollouts at temperature 0 are all the same, and their log-probs are those of no distribution.
    "generator.sampling_params.temperature": POSITIVE,
    "generator.eval_sampling_params.temperature": NOT_NEGATIVE,
}
for _optimizer in _OPTIMIZERS:
    RANGES |= {
        f"{_optimizer}.lr": NOT_NEGATIVE,
        f"{_optimizer}.min_lr": NOT_NEGATIVE,
        f"{_optimizer}.weight_decay": NOT_NEGATIVE,
        f"{_optimizer}.adam_eps": POSITIVE,
        # Megatron takes 0 for "no clipping", and then reports no gradient norm either.
        f"{_optimizer}.max_grad_norm": POSITIVE,
        f"{_optimizer}.num_warmup_steps": NOT_NEGATIVE,
    }
for _sampling in _SAMPLINGS:
    RANGES |= {
        f"{_sampling}.max_generate_length": FROM_ONE,
        f"{_sampling}.top_p": Range(0, 1, low_open=True),
        f"{_sampling}.min_p": PROBABILITY,
    }

_DTYPES = ("fp32", "bf16")
_LOSS_TYPES = ("soft_ce", "topk_soft_ce", "hard_ce")
CHOICES: dict[str, tuple[str, ...]] = {
    "trainer.placement.device": ("cpu", "cuda"),
    f"{_MEGATRON}.dtype": _DTYPES,
    f"{_ENGINE}.dtype": _DTYPES,
    f"{_ENGINE}.weight_sync_backend": ("ray", "nccl", "ipc"),
    "trainer.algorithm.advantage_estimator": ("grpo",),
    "trainer.algorithm.loss_reduction": ("token_mean", "sequence_mean", "seq_mean_token_sum_norm"),
    "trainer.algorithm.dynamic_sampling.type": ("filter",),
    "trainer.mtp.loss_type": _LOSS_TYPES,
    "trainer.dflash.loss_type": _LOSS_TYPES,
    "trainer.canary.on_mismatch": ("error", "warn"),
    "trainer.on_ckpt_failure": ("error", "warn"),
    "trainer.resume_mode": ("latest", "from_path"),
} | {f"{optimizer}.scheduler": ("constant", "cosine", "linear") for optimizer in _OPTIMIZERS}
LOGGERS = ("console", "wandb", "tensorboard")
# An engine holds its part of a GPU all the time. The trainer needs the rest: gradients and optimizer state alone are
# several times the weights that it shares the GPU with.
MAX_COLOCATED_MEMORY = 0.6


def validate(config: Config) -> None:
    """Raises ``ConfigError`` for the first rule that ``config`` breaks: setting, value, what is allowed, the mend."""
    _check_drafts(config.trainer)
    for setting, allowed in RANGES.items():
        _check_range(setting, _get(config, setting), allowed)
    for setting, names in CHOICES.items():
        _check_choice(setting, _get(config, setting), names)
    for optimizer in _OPTIMIZERS:
        _check_optimizer(optimizer, _get(config, optimizer))
    for sampling in _SAMPLINGS:
        top_k = _get(config, sampling).top_k
        _require(top_k == -1 or top_k >= 1, f"{sampling}.top_k", top_k, "must be at least 1, or -1 for all tokens")
    _check_paths(config)
    _check_logger(config.trainer)
    _check_batches(config)
    _check_lengths(config)
    _check_colocation(config)
    _check_engine(config)
    _check_device_settings(config)


def parallel_layout(config: Config) -> Layout:
    """World size, tensor-parallel and data-parallel size of the policy workers.

    Raises ``ConfigError`` where the workers are no whole number of model replicas.
    """
    placement = config.trainer.placement
    tp = config.trainer.policy.megatron_config.tensor_model_parallel_size
    per_node = tp if placement.policy_num_gpus_per_node is None else placement.policy_num_gpus_per_node
    world_size = placement.policy_num_nodes * per_node
    _require(
        world_size % tp == 0,
        f"{_MEGATRON}.tensor_model_parallel_size",
        tp,
        f"must divide the {world_size} policy workers (policy_num_nodes x policy_num_gpus_per_node); "
        "change it or trainer.placement.policy_num_gpus_per_node",
    )
    return Layout(world_size, tp, world_size // tp)


def sync_backend(config: Config) -> str:
    """How weights reach the engines. Each placement has one way, so ``weight_sync_backend`` can but say the same.

    vLLM's ``ipc`` engine maps memory of the GPU that both sides are on; NCCL refuses two ranks on one GPU.
    """
    placement = config.trainer.placement
    if placement.device == "cpu":
        return "ray"
    return "ipc" if placement.colocate_all else "nccl"


def _get(config: Any, setting: str) -> Any:
    for name in setting.split("."):
        config = getattr(config, name)
    return config


def _require(condition: bool, setting: str, value: object, message: str) -> None:
    if not condition:
        raise ConfigError(f"{setting}={value}: {message}")


def _check_range(setting: str, value: float | None, allowed: Range) -> None:
    if value is not None:
        _require(value in allowed, setting, value, f"must be {allowed}; change it")


def _check_choice(setting: str, value: str | None, names: tuple[str, ...]) -> None:
    if value is not None:
        _require(value in names, setting, value, f"must be {' or '.join(names)}; choose one")


def _check_drafts(trainer: TrainerConfig) -> None:
    _require(
        not (trainer.dflash.enabled and trainer.mtp.enabled),
        "trainer.dflash.enabled",
        "true",
        "one draft at a time, and trainer.mtp.enabled is true as well; turn one of them off",
    )


def _check_optimizer(prefix: str, optimizer: Any) -> None:
    betas = optimizer.adam_betas
    _require(
        len(betas) == 2 and all(beta in PROBABILITY for beta in betas),
        f"{prefix}.adam_betas",
        betas,
        f"must be two numbers, each {PROBABILITY}; the usual ones are [0.9,0.95]",
    )
    _require(
        optimizer.min_lr <= optimizer.lr,
        f"{prefix}.min_lr",
        optimizer.min_lr,
        f"must be at most {prefix}.lr={optimizer.lr}, from which it decays; lower it",
    )


def _check_paths(config: Config) -> None:
    start = "set it, or start from experiment=NAME"
    trainer, data = config.trainer, config.data
    path = trainer.policy.model.path
    _require(path != "", "trainer.policy.model.path", "''", f"no model is named; {start}")
    _require(data.train_data != [], "data.train_data", "[]", f"no .parquet or .jsonl file is named; {start}")
    _require(trainer.run_dir != "", "trainer.run_dir", "''", "must name a directory for what the run writes; set it")
    _require(
        (trainer.resume_mode == "from_path") == (trainer.resume_path is not None),
        "trainer.resume_path",
        trainer.resume_path,
        f"goes with trainer.resume_mode=from_path, and that is {trainer.resume_mode}; set both or neither",
    )
    _require(
        trainer.hf_save_interval == 0
        or (trainer.ckpt_interval > 0 and trainer.hf_save_interval % trainer.ckpt_interval == 0),
        "trainer.hf_save_interval",
        trainer.hf_save_interval,
        f"must be a multiple of trainer.ckpt_interval={trainer.ckpt_interval}: checkpoints are what is exported; "
        "change one of them",
    )
    if trainer.eval_interval > 0 or trainer.eval_before_train:
        _require(
            data.val_data != [],
            "data.val_data",
            "[]",
            "evaluation needs a file; set it, or trainer.eval_interval=0 trainer.eval_before_train=false",
        )


def _check_logger(trainer: TrainerConfig) -> None:
    for logger in trainer.logger:
        _require(
            logger in LOGGERS, "trainer.logger", trainer.logger, f"{logger} is none of {', '.join(LOGGERS)}; drop it"
        )


def _check_batches(config: Config) -> None:
    trainer, samples = config.trainer, config.generator.n_samples_per_prompt
    mini = trainer.policy_mini_batch_size
    _require(
        trainer.train_batch_size % mini == 0,
        "trainer.train_batch_size",
        trainer.train_batch_size,
        f"must be a multiple of trainer.policy_mini_batch_size={mini}; change one of them",
    )
    _require(
        trainer.algorithm.advantage_estimator != "grpo" or samples >= 2,
        "generator.n_samples_per_prompt",
        samples,
        "must be at least 2: grpo compares the responses to one prompt; raise it",
    )
    dp = parallel_layout(config).dp
    _require(
        mini * samples % dp == 0,
        "trainer.policy_mini_batch_size",
        mini,
        f"times generator.n_samples_per_prompt={samples} must be a multiple of the {dp} data-parallel ranks; change it",
    )


def _check_lengths(config: Config) -> None:
    length = config.generator.sampling_params.max_generate_length
    buffer = config.trainer.algorithm.overlong.buffer_len
    _require(
        buffer < length,
        "trainer.algorithm.overlong.buffer_len",
        buffer,
        f"must be below generator.sampling_params.max_generate_length={length}; lower it",
    )


def _check_device_settings(config: Config) -> None:
    trainer, sampling = config.trainer, config.generator.sampling_params
    on_cpu = trainer.placement.device == "cpu"
    _require(
        not (trainer.policy.megatron_config.recompute_activations and on_cpu),
        f"{_MEGATRON}.recompute_activations",
        "true",
        "Megatron recomputes on cuda alone; leave it false on cpu",
    )
    _require(
        trainer.canary.lossless_interval == 0 or on_cpu,
        "trainer.canary.lossless_interval",
        trainer.canary.lossless_interval,
        "needs an engine more than the run has, so it is for cpu alone; set it to 0",
    )
    _require(
        not trainer.measure_speedup or on_cpu,
        "trainer.measure_speedup",
        "true",
        "needs an engine more than the run has, so it is for cpu alone; set it to false",
    )
    truncated = sampling.top_p < 1 or sampling.top_k != -1 or sampling.min_p > 0
    _require(
        not (trainer.algorithm.use_tis and truncated),
        "trainer.algorithm.use_tis",
        "true",
        "compares log-probs of the whole distribution, but generator.sampling_params truncates it; "
        "set top_p=1 top_k=-1 min_p=0, or turn it off",
    )


def _check_colocation(config: Config) -> None:
    placement, engine = config.trainer.placement, config.generator.inference_engine
    if not placement.colocate_all:
        return
    setting = "trainer.placement.colocate_all"
    _require(placement.device == "cuda", setting, "true", "shares GPUs, and trainer.placement.device=cpu; set it false")
    _require(
        engine.tensor_parallel_size == 1,
        f"{_ENGINE}.tensor_parallel_size",
        engine.tensor_parallel_size,
        f"must be 1 with {setting}: an engine shares the one GPU of its worker; set it to 1",
    )
    num_workers = parallel_layout(config).world_size
    _require(
        engine.num_engines == num_workers,
        f"{_ENGINE}.num_engines",
        engine.num_engines,
        f"must be {num_workers} with {setting}, one for each policy worker; change it",
    )
    _require(
        engine.gpu_memory_utilization <= MAX_COLOCATED_MEMORY,
        f"{_ENGINE}.gpu_memory_utilization",
        engine.gpu_memory_utilization,
        f"must be at most {MAX_COLOCATED_MEMORY} with {setting}: the trainer's weights, gradients and optimizer state "
        "need the rest of the GPU; lower it",
    )


def _check_sync_backend(config: Config) -> None:
    backend, right = config.generator.inference_engine.weight_sync_backend, sync_backend(config)
    mends = {
        "ray": "with trainer.placement.device=cpu it must be ray; leave it null",
        "nccl": "with trainer.placement.device=cuda it must be nccl, unless trainer.placement.colocate_all=true puts "
        "trainer and engine on the same GPU, as ipc needs; leave it null, or set that",
        "ipc": "with trainer.placement.colocate_all=true it must be ipc (NCCL refuses two ranks on one GPU); "
        "leave it null",
    }
    _require(backend in (None, right), f"{_ENGINE}.weight_sync_backend", backend, mends[right])


def _check_engine(config: Config) -> None:
    engine = config.generator.inference_engine
    _check_sync_backend(config)
    _require(
        "speculative_config" not in engine.engine_init_kwargs,
        f"{_ENGINE}.engine_init_kwargs.speculative_config",
        engine.engine_init_kwargs.get("speculative_config"),
        f"belongs in {_ENGINE}.speculative_config; move it there",
    )
    require_other_engine_args(engine.engine_init_kwargs)
    _check_user_speculation(config.trainer, engine.speculative_config)
    speculative = build_speculative_config(config.trainer, engine.speculative_config)
    for setting in _SAMPLINGS:
        require_exact_sampling(_get(config, setting), speculative, setting)


def _check_user_speculation(trainer: TrainerConfig, user: dict[str, Any] | None) -> None:
    """A draft that is trained is the one the engines run; the rest of vLLM's settings is the user's."""
    if user is None:
        return
    setting = f"{_ENGINE}.speculative_config"
    num_tokens = user.get("num_speculative_tokens", 1)
    _require(
        isinstance(num_tokens, int) and num_tokens >= 1,
        f"{setting}.num_speculative_tokens",
        num_tokens,
        "must be an integer of at least 1; change it",
    )
    _require(
        not trainer.mtp.enabled or (user.get("method") == "mtp" and "model" not in user),
        setting,
        user,
        "must be of method mtp, without model, while trainer.mtp.enabled trains that head; change it or turn mtp off",
    )
    _require(
        not trainer.dflash.enabled
        or (user.get("method") == "dflash" and user.keys().isdisjoint(("model", "num_speculative_tokens"))),
        setting,
        user,
        "must be of method dflash, without model and num_speculative_tokens (trainer.dflash has them), while "
        "trainer.dflash.enabled trains that draft; change it or turn dflash off",
    )
