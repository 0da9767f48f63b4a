"""Checks of settings, model, draft, tokenizer and machine. They start no process and import no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import redirect_stderr
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

from skyrl_spec.data.tokenizer import load_tokenizer
from skyrl_spec.doctor.finding import OK, WARN, Finding, look
from skyrl_spec.drafts.kinds import describe_draft, trained_kind
from skyrl_spec.errors import ConfigError
from skyrl_spec.planning.preflight import preflight
from skyrl_spec.planning.validation import validate
from skyrl_spec.settings.schema import Config
from skyrl_spec.specs.entries import Entries
from skyrl_spec.specs.files import INDEX, POLICY_PATH, read_config, read_shapes, require_tensors, stray_files
from skyrl_spec.specs.model import OUTPUT_HEAD, ModelSpec, parse_spec, require_tied_head, tensor_shapes

_QUESTION, _ANSWER = {"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}


def file_findings(config: Config) -> Iterator[Finding]:
    """Findings, one after the other. The checks behind one that fails may need what it misses, and are left out."""
    directory = Path(config.trainer.policy.model.path)
    for check, see in (
        ("settings", partial(_settings, config)),
        ("config.json", partial(_config_json, directory)),
        ("weights", partial(_weights, directory)),
        ("output head", partial(_output_head, directory)),
        ("tokenizer", partial(_tokenizer, directory)),
        ("draft's files", partial(_draft, config, directory)),
    ):
        finding = look(check, see)
        yield finding
        if finding.state not in (OK, WARN):
            return
    yield from _oddities(directory)
    yield _end_token(directory)
    yield _chat_template(directory)
    yield look("data and machine", partial(_preflight, config))


def _settings(config: Config) -> str:
    validate(config)
    return "they fit together"


def _config_json(directory: Path) -> str:
    spec = _spec(directory)
    return f"{spec.architecture}, {spec.num_layers} layers x {spec.hidden_size}, {spec.vocab_size:,} tokens"


def _weights(directory: Path) -> str:
    require_tensors(str(directory), POLICY_PATH, tensor_shapes(_spec(directory)))
    return f"all tensors are there, {len(read_shapes(directory, POLICY_PATH))} in all"


def _output_head(directory: Path) -> str:
    spec = _spec(directory)
    require_tied_head(str(directory), spec)
    if not spec.tie_word_embeddings:
        return "has a weight of its own"
    is_stored = OUTPUT_HEAD in read_shapes(directory, POLICY_PATH)
    return "tied to the embedding" + (", of which the file has an equal copy" if is_stored else "")


def _draft(config: Config, directory: Path) -> str:
    kind = trained_kind(config.trainer)
    if kind is None:
        return "no draft"
    spec = _spec(directory)
    kind.preflight(config, spec, from_scratch=False)
    tokenizer = load_tokenizer(directory, POLICY_PATH, spec.vocab_size)
    return describe_draft(kind.decide(config, spec, tokenizer, may_write=False).trainer)


def _tokenizer(directory: Path) -> str:
    spec = _spec(directory)
    tokenizer = load_tokenizer(directory, POLICY_PATH, spec.vocab_size)
    if tokenizer.chat_template is None:
        raise ConfigError(f"{POLICY_PATH}={directory}: has no chat template; add one to tokenizer_config.json")
    return f"{len(tokenizer):,} tokens for {spec.vocab_size:,} rows, end token {tokenizer.eos_token!r}"


def _preflight(config: Config) -> str:
    # Its warnings have rows of their own here.
    with redirect_stderr(StringIO()):
        preflight(config)
    return "as a run needs them"


def _oddities(directory: Path) -> Iterator[Finding]:
    """Contradictions in config.json, and files that nothing reads."""
    for line in Entries(read_config(directory), "").contradictions():
        yield Finding("config.json", WARN, line, "remove one of the two")
    if strays := stray_files(directory, POLICY_PATH):
        yield Finding("weights", WARN, f"{', '.join(strays)}: not in {INDEX}, so not read", "move them away")


def _end_token(directory: Path) -> Finding:
    """The engines stop at the tokens of generation_config.json, the trainer's tokenizer names one."""
    eos = load_tokenizer(directory, POLICY_PATH).eos_token_id
    configs = [read_config(directory)]
    if (directory / "generation_config.json").is_file():
        configs.append(json.loads((directory / "generation_config.json").read_text()))
    stated = [value for config in configs if (value := config.get("eos_token_id")) is not None]
    ends = sorted({token for value in stated for token in (value if isinstance(value, list) else [value])})
    if ends and eos not in ends:
        return Finding(
            "end tokens",
            WARN,
            f"the tokenizer ends at {eos}, config.json and generation_config.json at {', '.join(map(str, ends))}",
            "make them agree, or responses end where they should not",
        )
    return Finding("end tokens", OK, f"{eos}" + (f", of {', '.join(map(str, ends))}" if len(ends) > 1 else ""))


def _chat_template(directory: Path) -> Finding:
    """Whether a prompt's tokens stay the same once the answer is a turn of the conversation."""
    tokenizer = load_tokenizer(directory, POLICY_PATH)
    render: Any = partial(tokenizer.apply_chat_template, return_dict=False)
    try:
        prompt = render([_QUESTION], add_generation_prompt=True)
        whole = render([_QUESTION, _ANSWER])
    # A template may raise anything.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return Finding("chat template", WARN, f"refuses a question and its answer ({reason})", "correct it")
    if whole[: len(prompt)] != prompt:
        return Finding(
            "chat template",
            WARN,
            "the tokens of a prompt change once its answer is a turn",
            "train single turns only, or use a template that keeps them",
        )
    return Finding("chat template", OK, "a prompt's tokens stay when its answer is a turn")


def _spec(directory: Path) -> ModelSpec:
    return parse_spec(directory, read_config(directory))
