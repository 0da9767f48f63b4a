"""What a run trains, on what, for how long: configuration, model, tokenizer and prompts, before anything starts."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skyrl_spec.checkpoint.folders import read_record
from skyrl_spec.config import Config
from skyrl_spec.data.dataset import load_prompts
from skyrl_spec.data.prompts import PromptStream
from skyrl_spec.data.tokenizer import load_tokenizer
from skyrl_spec.draft_spec import decided, plan_dflash, read_dflash_spec, resolve_mask_token
from skyrl_spec.envs.registry import register_custom
from skyrl_spec.envs.rewards import check_environments
from skyrl_spec.model_spec import ModelSpec, load_spec
from skyrl_spec.types import Prompt


@dataclass(frozen=True)
class Task:
    """What is trained, on what, for how long."""

    config: Config
    spec: ModelSpec
    tokenizer: Any
    stream: PromptStream
    eval_prompts: list[Prompt]
    steps: int
    # The checkpoint that it goes on from.
    resume_from: Path | None = None
    # False: a warm-up, whose policy is frozen.
    trains_policy: bool = True

    @property
    def steps_done(self) -> int | None:
        """None: it begins."""
        return None if self.resume_from is None else read_record(self.resume_from)["extra"]["trainer"]["step"]


def num_steps(config: Config, stream: PromptStream) -> int:
    """Steps of the run: ``epochs``, or fewer if ``max_training_steps`` says so."""
    steps = stream.steps_per_epoch * config.trainer.epochs
    limit = config.trainer.max_training_steps
    return steps if limit is None else min(steps, limit)


def load_task(config: Config, resume_from: Path | None = None, *, may_write: bool = True) -> Task:
    """Everything read and decided; a draft from scratch is written to run_dir if that is allowed.

    Raises:
        ConfigError: model, tokenizer, draft, data or environments do not fit the configuration.
    """
    # Of a hub name a plan needs no weights.
    spec = load_spec(config.trainer.policy.model.path, weights=may_write)
    tokenizer = load_tokenizer(spec.path, "trainer.policy.model.path", spec.vocab_size)
    config = _decide_draft(config, spec, tokenizer, may_write=may_write)
    register_custom(config.environment.custom)
    train = _load_prompts(config, tokenizer, config.data.train_data, "data.train_data")
    validation = _load_prompts(config, tokenizer, config.data.val_data, "data.val_data") if config.data.val_data else []
    check_environments([*train, *validation], config.environment)
    stream = PromptStream(train, config.trainer.train_batch_size, seed=config.trainer.seed, shuffle=config.data.shuffle)
    return Task(config, spec, tokenizer, stream, validation, num_steps(config, stream), resume_from)


def _decide_draft(config: Config, spec: ModelSpec, tokenizer: Any, *, may_write: bool) -> Config:
    """``config`` with nothing left open about its draft; a DFlash draft from scratch is written to run_dir first."""
    dflash = config.trainer.dflash
    if not dflash.enabled:
        return config
    found = None if dflash.path is None else read_dflash_spec(dflash.path, weights=may_write)
    known = dflash.mask_token_id if found is None else found.mask_token_id
    mask_token_id = resolve_mask_token(known, tokenizer, spec.vocab_size)
    draft = plan_dflash(config, spec, found, mask_token_id)
    path = dflash.path
    if path is None:
        directory = (Path(config.trainer.run_dir) / "draft_start").resolve()
        path = str(directory)
    if dflash.path is None and may_write:
        from skyrl_spec.checkpoint.fresh import write_fresh_dflash

        write_fresh_dflash(draft, directory, config.trainer.policy.megatron_config.dtype, config.trainer.seed)
    return decided(config, draft, path)


def _load_prompts(config: Config, tokenizer: Any, paths: list[str], setting: str) -> list[Prompt]:
    limit = config.trainer.max_prompt_length
    loaded = load_prompts(
        paths, tokenizer, max_prompt_length=limit, default_env_class=config.environment.env_class, setting=setting
    )
    if loaded.num_skipped:
        total = loaded.num_skipped + len(loaded.prompts)
        print(
            f"skyrl-spec: {setting}: {loaded.num_skipped} of {total} prompts are longer than "
            f"trainer.max_prompt_length={limit} tokens and are skipped",
            file=sys.stderr,
        )
    return loaded.prompts
