"""Rules that need nothing but the settings, checked before anything is read or started.

``schema`` declares the allowed values of each setting. This module adds the rules that tie several settings together.
Rules about drafts are in ``drafts.kinds``. ``planning.validation`` applies all of them. ``planning.preflight`` checks
model, data and devices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Any

from skyrl_spec.errors import ConfigError
from skyrl_spec.settings.allowed import LOGGERS, PROBABILITY, RECOMPUTE_MODULES, Allowed, Range
from skyrl_spec.settings.derived import (
    max_staleness,
    parallel_sizes,
    ratio_anchor,
    sleep_level,
    sync_backend,
    training_interval,
    uses_tis,
    workers_per_node,
)
from skyrl_spec.settings.describe import Section, sections
from skyrl_spec.settings.loss_type import check_loss_type
from skyrl_spec.settings.schema import Config

_ENGINE = "generator.inference_engine"
_MEGATRON = "trainer.policy.megatron_config"
SAMPLINGS = ("generator.sampling_params", "generator.eval_sampling_params")
# An engine that does not sleep never frees its share of a GPU. The trainer needs the rest: its gradients and optimizer
# state alone take several times the memory of the weights.
MAX_COLOCATED_MEMORY = 0.6


@cache
def _sections() -> tuple[Section, ...]:
    return tuple(sections(Config))


def check_rules(config: Config) -> None:
    """Checks the allowed values of every setting, then all rules.

    Raises:
        ConfigError: the first rule that ``config`` breaks.
    """
    all_sections = _sections()
    for section in all_sections:
        for setting in section.settings:
            check_allowed(setting.name, get_setting(config, setting.name), setting.allowed)
    for section in all_sections:
        if section.name.endswith(".optimizer_config"):
            _check_optimizer(section.name, get_setting(config, section.name))
    _check_sampling(config)
    _check_paths(config)
    _check_each("trainer.logger", config.trainer.logger, LOGGERS)
    _check_each(
        f"{_MEGATRON}.recompute_modules", config.trainer.policy.megatron_config.recompute_modules, RECOMPUTE_MODULES
    )
    _check_sequence_parallel(config)
    _check_pipeline(config)
    _check_draft_training(config)
    check_loss_type("trainer.mtp.loss_type", config.trainer.mtp.loss_type)
    check_loss_type("trainer.dflash.loss_type", config.trainer.dflash.loss_type)
    _check_batches(config)
    _check_lengths(config)
    _check_turns(config)
    _check_environments(config)
    _check_colocation(config)
    _check_async(config)
    _check_sync_backend(config)
    _check_timeouts(config)
    _check_device_settings(config)


def _check_environments(config: Config) -> None:
    """SkyRL has ``max_env_workers`` among the settings of its environments."""
    for name, entry in config.environment.servers.items():
        fields = set(entry) if isinstance(entry, Mapping) else set()
        if fields != {"command", "url"} or not all(isinstance(entry[key], str) and entry[key] for key in fields):
            raise ConfigError(
                f"environment.servers.{name}={entry}: must have a command and a url, both text, such as {{command: "
                "'python server.py --port 8000', url: 'http://127.0.0.1:8000/health'}}; change it"
            )
    for name, settings in config.environment.skyrl_gym.items():
        if not isinstance(settings, Mapping):
            raise ConfigError(
                f"environment.skyrl_gym.{name}={settings}: must be the settings of an environment, {{key: value}}; the "
                "number of processes is environment.max_env_workers"
            )


def check_allowed(setting: str, value: Any, allowed: Allowed) -> None:
    """Raises ``ConfigError`` unless ``value`` is None or one of ``allowed``."""
    if value is None or allowed is None or value in allowed:
        return
    if isinstance(allowed, Range):
        finite = "" if math.isfinite(value) else "finite and "
        raise ConfigError(f"{setting}={value}: must be {finite}{allowed}; change it")
    raise ConfigError(f"{setting}={value}: must be {' or '.join(allowed)}; set one of these")


def get_setting(config: Any, setting: str) -> Any:
    """The value of a dotted setting."""
    for name in setting.split("."):
        config = getattr(config, name)
    return config


def require(condition: bool, setting: str, value: object, message: str) -> None:
    """Raises ``ConfigError`` unless ``condition``."""
    if not condition:
        raise ConfigError(f"{setting}={value}: {message}")


def _check_optimizer(prefix: str, optimizer: Any) -> None:
    betas = optimizer.adam_betas
    require(
        len(betas) == 2 and all(beta in PROBABILITY for beta in betas),
        f"{prefix}.adam_betas",
        betas,
        f"must be two numbers, each {PROBABILITY}; write for example [0.9,0.95]",
    )
    require(
        optimizer.min_lr <= optimizer.lr,
        f"{prefix}.min_lr",
        optimizer.min_lr,
        f"must be at most {prefix}.lr={optimizer.lr}, the learning rate that decays to it; lower it",
    )


def _check_sampling(config: Config) -> None:
    # At temperature 0 all responses to a prompt are equal, and there is no distribution to take log-probs of.
    temperature = config.generator.sampling_params.temperature
    require(
        temperature > 0, "generator.sampling_params.temperature", temperature, "must be above 0 in training; raise it"
    )
    for sampling in SAMPLINGS:
        top_k = get_setting(config, sampling).top_k
        require(
            top_k == -1 or top_k >= 1, f"{sampling}.top_k", top_k, "must be at least 1, or -1 for all tokens; change it"
        )


def _check_paths(config: Config) -> None:
    start = "set it, or choose experiment=NAME"
    trainer, data = config.trainer, config.data
    path = trainer.policy.model.path
    require(path != "", "trainer.policy.model.path", "''", f"must name a model; {start}")
    require(data.train_data != [], "data.train_data", "[]", f"must name at least one .parquet or .jsonl file; {start}")
    require(trainer.run_dir != "", "trainer.run_dir", "''", "must name the output directory; set it")
    require(
        (trainer.resume_mode == "from_path") == (trainer.resume_path is not None),
        "trainer.resume_path",
        trainer.resume_path,
        f"is used with trainer.resume_mode=from_path only, and that mode needs it; the mode is {trainer.resume_mode}: "
        "set both or neither",
    )
    require(
        trainer.hf_save_interval == 0
        or (trainer.ckpt_interval > 0 and trainer.hf_save_interval % trainer.ckpt_interval == 0),
        "trainer.hf_save_interval",
        trainer.hf_save_interval,
        f"must be a multiple of trainer.ckpt_interval={trainer.ckpt_interval}, because checkpoints are exported; "
        "change one of them",
    )
    if trainer.eval_interval > 0 or trainer.eval_before_train:
        require(
            data.val_data != [],
            "data.val_data",
            "[]",
            "must name a file for evaluation; set it, or set trainer.eval_interval=0 trainer.eval_before_train=false",
        )


def _check_each(setting: str, words: list[str], allowed: tuple[str, ...]) -> None:
    for word in words:
        require(word in allowed, setting, words, f"{word} is not one of {', '.join(allowed)}; remove it")


def _check_draft_training(config: Config) -> None:
    train = config.trainer.draft.train
    try:
        training_interval(train)
    except ValueError:
        raise ConfigError(
            f"trainer.draft.train={train}: must be every_step, every:N with N of at least 1, auto or off; choose one"
        ) from None


def _check_sequence_parallel(config: Config) -> None:
    megatron = config.trainer.policy.megatron_config
    require(
        not megatron.sequence_parallel or megatron.tensor_model_parallel_size > 1,
        f"{_MEGATRON}.sequence_parallel",
        "true",
        f"must be null or false with {_MEGATRON}.tensor_model_parallel_size=1, which has nobody to divide the tokens "
        "with; change one",
    )


def _check_pipeline(config: Config) -> None:
    megatron = config.trainer.policy.megatron_config
    for name in ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"):
        require(
            getattr(megatron, name) is None or megatron.pipeline_model_parallel_size > 1,
            f"{_MEGATRON}.{name}",
            getattr(megatron, name),
            f"must be null with {_MEGATRON}.pipeline_model_parallel_size=1, which has one stage; change one",
        )


def _check_batches(config: Config) -> None:
    trainer, samples = config.trainer, config.generator.n_samples_per_prompt
    mini = trainer.policy_mini_batch_size
    require(
        trainer.train_batch_size % mini == 0,
        "trainer.train_batch_size",
        trainer.train_batch_size,
        f"must be a multiple of trainer.policy_mini_batch_size={mini}; change one of them",
    )
    estimator = trainer.algorithm.advantage_estimator
    require(
        estimator not in ("grpo", "rloo") or samples >= 2,
        "generator.n_samples_per_prompt",
        samples,
        f"must be at least 2, because {estimator} compares the responses to a prompt; raise it",
    )
    require(
        trainer.algorithm.policy_loss_type == "regular" or trainer.algorithm.clip_ratio_c is None,
        "trainer.algorithm.clip_ratio_c",
        trainer.algorithm.clip_ratio_c,
        "is the dual clip of trainer.algorithm.policy_loss_type=regular; set it to null",
    )
    dp = parallel_sizes(config).dp
    require(
        mini * samples % dp == 0,
        "trainer.policy_mini_batch_size",
        mini,
        f"times generator.n_samples_per_prompt={samples} must be a multiple of the {dp} data-parallel ranks; change it",
    )


def _check_lengths(config: Config) -> None:
    length = config.generator.sampling_params.max_generate_length
    buffer = config.trainer.algorithm.overlong.buffer_len
    require(
        buffer < length,
        "trainer.algorithm.overlong.buffer_len",
        buffer,
        f"must be below generator.sampling_params.max_generate_length={length}; lower it",
    )


def _check_turns(config: Config) -> None:
    generator, overlong = config.generator, config.trainer.algorithm.overlong
    require(
        generator.max_turns == 1 or generator.max_input_length is not None,
        "generator.max_input_length",
        "null",
        f"is needed with generator.max_turns={generator.max_turns}; set it to the tokens of the prompt, and of all "
        "turns and answers but the last turn",
    )
    require(
        generator.max_input_length is None or generator.max_input_length >= config.trainer.max_prompt_length,
        "generator.max_input_length",
        generator.max_input_length,
        f"must be at least trainer.max_prompt_length={config.trainer.max_prompt_length}; raise it",
    )
    require(
        generator.max_turns == 1 or overlong.buffer_len == 0,
        "trainer.algorithm.overlong.buffer_len",
        overlong.buffer_len,
        "is a penalty on responses of one turn; set it to 0 with generator.max_turns above 1",
    )


def _check_timeouts(config: Config) -> None:
    placement = config.trainer.placement
    require(
        placement.collective_timeout_s <= placement.worker_timeout_s,
        "trainer.placement.collective_timeout_s",
        placement.collective_timeout_s,
        f"must be at most trainer.placement.worker_timeout_s={placement.worker_timeout_s}, which limits a whole call; "
        "lower it",
    )


def _check_device_settings(config: Config) -> None:
    trainer, sampling = config.trainer, config.generator.sampling_params
    on_cpu = trainer.placement.device == "cpu"
    require(
        trainer.canary.lossless_interval == 0 or on_cpu,
        "trainer.canary.lossless_interval",
        trainer.canary.lossless_interval,
        "needs an additional engine, which only trainer.placement.device=cpu allows; set it to 0",
    )
    require(
        not trainer.measure_speedup or on_cpu,
        "trainer.measure_speedup",
        "true",
        "needs an additional engine, which only trainer.placement.device=cpu allows; set it to false",
    )
    truncated = sampling.top_p < 1 or sampling.top_k != -1 or sampling.min_p > 0
    neither = "ratio_anchor=old use_tis=false (trainer.algorithm)"
    if max_staleness(config):
        neither += " trainer.fully_async.allow_uncorrected=true"
    require(
        not (uses_tis(config) and truncated),
        "trainer.algorithm.use_tis",
        "true",
        "needs log-probs of the full distribution, but generator.sampling_params truncates it; "
        f"set top_p=1 top_k=-1 min_p=0 there, or {neither}",
    )
    anchor = ratio_anchor(config)
    require(
        anchor == "old" or not truncated,
        "trainer.algorithm.ratio_anchor",
        anchor,
        "needs log-probs of the full distribution, but generator.sampling_params truncates it; "
        f"set top_p=1 top_k=-1 min_p=0 there, or {neither}",
    )
    require(
        anchor == "old" or not uses_tis(config),
        "trainer.algorithm.ratio_anchor",
        anchor,
        "corrects what trainer.algorithm.use_tis=true corrects, which would count twice; set one of the two to its "
        "default",
    )


def _check_async(config: Config) -> None:
    if not max_staleness(config):
        return
    setting, trainer = "trainer.fully_async.enabled", config.trainer
    require(
        not trainer.placement.colocate_all,
        setting,
        "true",
        "engines sample while the workers train, but trainer.placement.colocate_all=true gives them the same GPUs; "
        "set one of the two to false",
    )
    is_corrected = uses_tis(config) or ratio_anchor(config) == "rollout"
    require(
        is_corrected or trainer.fully_async.allow_uncorrected,
        "trainer.algorithm.use_tis",
        "false",
        f"batches are sampled with older weights ({setting}=true), which use_tis corrects; set it to null, or set "
        "trainer.fully_async.allow_uncorrected=true",
    )


def _check_colocation(config: Config) -> None:
    placement, engine = config.trainer.placement, config.generator.inference_engine
    if not placement.colocate_all:
        return
    setting = "trainer.placement.colocate_all"
    require(
        placement.device == "cuda",
        setting,
        "true",
        "needs trainer.placement.device=cuda, but that is cpu; set it to false",
    )
    size, num_workers = engine.tensor_parallel_size, parallel_sizes(config).world_size
    require(
        workers_per_node(config) % size == 0,
        f"{_ENGINE}.tensor_parallel_size",
        size,
        f"must divide the {workers_per_node(config)} policy workers of a machine with {setting}=true, whose GPUs an "
        "engine shares; change it",
    )
    require(
        engine.num_engines * size <= num_workers,
        f"{_ENGINE}.num_engines",
        engine.num_engines,
        f"must be at most {num_workers // size} with {setting}=true: engines of {size} share the GPUs of {num_workers} "
        "policy workers; change it",
    )
    require(
        sleep_level(config) > 0 or engine.gpu_memory_utilization <= MAX_COLOCATED_MEMORY,
        f"{_ENGINE}.gpu_memory_utilization",
        engine.gpu_memory_utilization,
        f"must be at most {MAX_COLOCATED_MEMORY} with {setting}=true and {_ENGINE}.sleep_level=0, because the trainer "
        "needs the rest of the GPU for weights, gradients and optimizer state; lower it, or let the engines sleep",
    )


def _check_sync_backend(config: Config) -> None:
    backend, right = config.generator.inference_engine.weight_sync_backend, sync_backend(config)
    fixes = {
        "ray": "must be ray with trainer.placement.device=cpu; leave it null",
        "nccl": "must be nccl with trainer.placement.device=cuda, or ipc if trainer.placement.colocate_all=true; "
        "leave it null",
        "ipc": "must be ipc with trainer.placement.colocate_all=true (NCCL refuses two ranks on one GPU); "
        "leave it null",
    }
    require(backend in (None, right), f"{_ENGINE}.weight_sync_backend", backend, fixes[right])
