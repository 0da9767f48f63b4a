"""The task of a run: configuration, model, tokenizer, prompts and number of steps, read before processes start."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skyrl_spec.checkpoint.folders import read_record
from skyrl_spec.data.dataset import load_prompts
from skyrl_spec.data.prompts import PromptStream
from skyrl_spec.data.tokenizer import load_tokenizer
from skyrl_spec.data.turns import TurnTemplate
from skyrl_spec.drafts.kinds import trained_kind
from skyrl_spec.drafts.speculation import missing_positions
from skyrl_spec.envs.episodes import check_environments
from skyrl_spec.envs.registry import register_custom
from skyrl_spec.settings.schedule import check_schedule
from skyrl_spec.settings.schema import Config
from skyrl_spec.specs.model import ModelSpec, load_spec, require_tied_head
from skyrl_spec.types import Prompt


@dataclass(frozen=True)
class Task:
    """Everything that defines a run."""

    config: Config
    spec: ModelSpec
    tokenizer: Any
    stream: PromptStream
    eval_prompts: list[Prompt]
    steps: int
    # The checkpoint that the run resumes from.
    resume_from: Path | None = None
    # False in a warm-up, whose policy is frozen.
    trains_policy: bool = True

    @property
    def steps_done(self) -> int | None:
        """Completed steps, or None if the run starts from the beginning."""
        return None if self.resume_from is None else read_record(self.resume_from)["extra"]["trainer"]["step"]


def num_steps(config: Config, stream: PromptStream) -> int:
    """Steps until ``stream`` has had ``trainer.epochs``, at most ``trainer.max_training_steps``."""
    steps = stream.num_batches(config.trainer.epochs)
    limit = config.trainer.max_training_steps
    return steps if limit is None else min(steps, limit)


def load_task(config: Config, resume_from: Path | None = None, *, may_write: bool = True) -> Task:
    """Reads model, tokenizer and data. Writes a draft from scratch to run_dir if ``may_write``.

    The stream of prompts goes on where the checkpoint ``resume_from`` stopped.

    Raises:
        ConfigError: model, tokenizer, draft, data or environments do not fit the configuration or the checkpoint.
    """
    # A plan needs no weights of a model on the hub.
    spec = load_spec(config.trainer.policy.model.path, weights=may_write)
    if may_write:
        # Of a hub name, preflight has not seen the weights.
        require_tied_head(str(spec.path), spec)
    tokenizer = load_tokenizer(spec.path, "trainer.policy.model.path", spec.vocab_size)
    kind = trained_kind(config.trainer)
    if kind is not None:
        config = kind.decide(config, spec, tokenizer, may_write=may_write)
        most = kind.speculative_config(config.trainer)["num_speculative_tokens"]
        check_schedule(config.generator.speculation.schedule, most)
        _say_of_last_positions(config, spec, most)
    register_custom(config.environment.custom)
    train = _load_prompts(config, tokenizer, config.data.train_data, "data.train_data")
    validation = _load_prompts(config, tokenizer, config.data.val_data, "data.val_data") if config.data.val_data else []
    check_environments([*train, *validation], config.environment, config.generator.max_turns)
    if config.generator.max_turns > 1:
        TurnTemplate(tokenizer, config.generator.chat_template_kwargs)
    stream = PromptStream(
        train,
        config.trainer.train_batch_size,
        seed=config.trainer.seed,
        shuffle=config.data.shuffle,
        source=", ".join(config.data.train_data),
    )
    if resume_from is not None:
        _resume_stream(stream, resume_from, config)
    return Task(config, spec, tokenizer, stream, validation, num_steps(config, stream), resume_from)


def _say_of_last_positions(config: Config, spec: ModelSpec, num_draft_tokens: int) -> None:
    """Says that drafts have no room at the end of the longest sequences."""
    missing = missing_positions(config, spec.max_position_embeddings, num_draft_tokens)
    if missing:
        length = config.generator.sampling_params.max_generate_length
        print(
            f"skyrl-spec: generator.sampling_params.max_generate_length={length}: drafts of {num_draft_tokens} tokens "
            f"need {missing} more positions behind the longest sequence than the model has "
            f"({spec.max_position_embeddings}), so nothing is drafted, for the whole batch, while a sequence is that "
            f"long; set it to {length - missing} or less",
            file=sys.stderr,
        )


def _resume_stream(stream: PromptStream, resume_from: Path, config: Config) -> None:
    """Moves ``stream`` to where the checkpoint stopped. Says if nothing is left."""
    state = read_record(resume_from)["extra"]["trainer"]
    steps_done, saved, trainer = state["step"], state["stream"], config.trainer
    if trainer.resume_with_new_data and not stream.has_data_of(saved):
        print(
            f"skyrl-spec: trainer.resume_with_new_data=true: {', '.join(config.data.train_data)} from its beginning, "
            f"in place of {saved.get('source', 'the data of the checkpoint')}",
            file=sys.stderr,
        )
    else:
        stream.load_state_dict(saved)
    # A step takes a batch or, with dynamic sampling, more.
    stream.num_taken = max(stream.num_taken, steps_done)
    if num_steps(config, stream) <= steps_done:
        print(
            f"skyrl-spec: {resume_from}: nothing is left to train after step {steps_done} with "
            f"trainer.epochs={trainer.epochs}, trainer.train_batch_size={trainer.train_batch_size} and "
            f"trainer.max_training_steps={'null' if trainer.max_training_steps is None else trainer.max_training_steps}"
            "; raise the number of epochs or steps to train on",
            file=sys.stderr,
        )


def _load_prompts(config: Config, tokenizer: Any, paths: list[str], setting: str) -> list[Prompt]:
    limit = config.trainer.max_prompt_length
    loaded = load_prompts(
        paths,
        tokenizer,
        max_prompt_length=limit,
        default_env_class=config.environment.env_class,
        setting=setting,
        template_kwargs=config.generator.chat_template_kwargs,
    )
    if loaded.num_skipped:
        total = loaded.num_skipped + len(loaded.prompts)
        print(
            f"skyrl-spec: {setting}: {loaded.num_skipped} of {total} prompts are longer than "
            f"trainer.max_prompt_length={limit} tokens and are skipped",
            file=sys.stderr,
        )
    return loaded.prompts
