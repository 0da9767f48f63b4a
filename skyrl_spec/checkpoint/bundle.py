"""Export of a checkpoint as a bundle that vLLM serves.

    out/model       the policy, with its MTP head, as a Hugging Face checkpoint with its tokenizer
    out/draft       a DFlash draft
    out/README.md   how to serve it, and the draft's measured acceptance

Tensors are read from the checkpoint's files one at a time. This needs no GPU, no other ranks and no optimizer state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from skyrl_spec.checkpoint.dist import read_parameters, reason
from skyrl_spec.checkpoint.folders import latest, read_record
from skyrl_spec.checkpoint.hf_export import complete, write_draft, write_model
from skyrl_spec.checkpoint.serving import COMMAND, CPU_COMMAND, serve_command
from skyrl_spec.drafts.kinds import describe_draft, trained_kind
from skyrl_spec.drafts.kinds.kind import DraftKind
from skyrl_spec.errors import ConfigError
from skyrl_spec.metrics import names
from skyrl_spec.models.conversion import Rule, policy_rules
from skyrl_spec.models.dtypes import DTYPES
from skyrl_spec.settings.schema import Config
from skyrl_spec.specs.files import Shapes, require_shapes
from skyrl_spec.specs.model import ModelSpec, load_spec, tensor_shapes


@dataclass(frozen=True)
class Source:
    """A checkpoint to export."""

    directory: Path
    # Settings of the run.
    config: Config
    # The policy's starting model.
    spec: ModelSpec
    # Shapes of the checkpoint's tensors, by component and HF name.
    shapes: dict[str, dict[str, list[int]]]
    # Metrics of the checkpoint's step.
    metrics: dict[str, float]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the exported tensors."""
        return DTYPES[self.config.trainer.policy.megatron_config.dtype]


def read_source(directory: Path, *, model: str | None = None, draft: str | None = None) -> Source:
    """The checkpoint at ``directory``, or the newest checkpoint of the run at ``directory``.

    Args:
        model: present place of the run's starting model. None: where it was.
        draft: present place of the run's starting draft. None: where it was.

    Raises:
        ConfigError: no checkpoint is complete, or its starting model or draft is missing or a different one.
    """
    newest = latest(directory / "checkpoints") or latest(directory)
    directory = newest or directory
    record = read_record(directory, "checkpoint")
    config = _config(record["extra"], directory)
    trainer = config.trainer
    trainer.policy.model.path = model or trainer.policy.model.path
    kind = trained_kind(trainer)
    if kind is not None and draft is not None:
        config.trainer = trainer = kind.with_path(trainer, draft)
    shapes = {name: component["shapes"] for name, component in record["parts"].items()}
    spec, where = _read_model(config), f"checkpoint={directory}"
    if "policy" in shapes:
        require_shapes(shapes["policy"], tensor_shapes(spec), f"model={trainer.policy.model.path}", where)
    if "draft" in shapes and kind is not None:
        option = f"{'draft' if kind.has_own_directory else 'model'}={kind.path(trainer)}"
        require_shapes(shapes["draft"], _draft_shapes(config, spec, kind), option, where)
    return Source(directory, config, spec, shapes, record["extra"].get("metrics", {}))


def export_bundle(source: Source, target: Path) -> Path:
    """Writes the bundle and returns ``target``, which appears when the bundle is complete.

    Raises:
        RunError: it could not be written.
    """
    trainer, kind = source.config.trainer, trained_kind(source.config.trainer)
    weights = _read(source, "policy", policy_rules(source.spec, source.spec.vocab_size))
    draft_weights = {} if kind is None else _read(source, "draft", kind.rules(trainer, source.spec))
    if kind is not None and not kind.has_own_directory:
        weights |= draft_weights
    with complete(target) as directory:
        write_model(weights, source.spec.path, source.dtype, directory / "model")
        if kind is not None and kind.has_own_directory:
            config = kind.hf_config(trainer, str(source.dtype).removeprefix("torch."))
            assert config is not None
            write_draft(draft_weights, config, directory / "draft")
        (directory / "README.md").write_text(readme(source))
    return target


def serve_line(source: Source, command: str | None = None) -> str:
    """Command that serves the bundle from its folder. ``command`` None: that of the installed vLLM."""
    return serve_command(source.config.trainer, "./model", "./draft", command)


def readme(source: Source) -> str:
    """README of the bundle."""
    trainer, kind = source.config.trainer, trained_kind(source.config.trainer)
    has_directory = kind is not None and kind.has_own_directory
    lines = [
        f"# {trainer.run_name}, {source.directory.name}",
        "",
        f"- policy: `model/`, {source.spec.architecture}, {source.spec.num_layers} layers x {source.spec.hidden_size}, "
        f"{trainer.policy.megatron_config.dtype}, trained from {trainer.policy.model.path}",
        f"- draft: {describe_draft(trainer)}{' (`draft/`)' if has_directory else ''}",
        f"- exported from: {source.directory}",
        "",
        "Serve it, in this folder:",
        "",
        "```",
        serve_line(source, COMMAND),
        "```",
        "",
        "or, with vLLM's CPU build, which lacks this command:",
        "",
        "```",
        serve_line(source, CPU_COMMAND),
        "```",
    ]
    if has_directory:
        lines += [
            "",
            "`draft/config.json` also names the policy and the number of drafted tokens, in the form of the library",
            f"speculators. So `{COMMAND} ./draft` in this folder serves both, too.",
        ]
    return "\n".join([*lines, *_acceptance_lines(source.metrics)]) + "\n"


def _acceptance_lines(metrics: Mapping[str, float]) -> list[str]:
    """Table of the acceptance that vLLM measured in the checkpoint's step. Empty if nothing was drafted."""
    modes = {"train": "training prompts, sampled", "eval": "held-out prompts, as eval_sampling_params says"}
    measured = {mode: prompts for mode, prompts in modes.items() if names.acceptance_length(mode) in metrics}
    if not measured:
        return []
    lines = [
        "",
        "Measured by vLLM in the step of this checkpoint (mean acceptance length is 1 + accepted / drafts):",
        "",
        "| on | mean acceptance length | accepted of drafted tokens | by position |",
        "|---|---|---|---|",
    ]
    for mode, prompts in measured.items():
        prefix = names.acceptance_rate_pos(mode, 1).removesuffix("1")
        positions = sorted((int(key.removeprefix(prefix)), key) for key in metrics if key.startswith(prefix))
        by_position = ", ".join(f"{metrics[key]:.2f}" for _, key in positions)
        length, rate = metrics[names.acceptance_length(mode)], metrics[names.acceptance_rate(mode)]
        lines.append(f"| {prompts} | {length:.2f} | {rate:.1%} | {by_position} |")
    return lines


def _read(source: Source, name: str, rules: list[Rule]) -> dict[str, Tensor]:
    """Tensors of component ``name`` by HF name. Empty if it was not trained."""
    if name not in source.shapes:
        return {}
    try:
        # Tensors cut from one stored tensor are views of it.
        return {key: tensor.clone() for key, tensor in read_parameters(source.directory, name, rules)}
    # Files with wrong bytes raise any exception. torch's own one is no ``Exception``.
    except (Exception, CheckpointException) as error:
        raise ConfigError(
            f"checkpoint={source.directory}: cannot be read ({reason(error)[:120]}); use another checkpoint"
        ) from None


def _read_model(config: Config) -> ModelSpec:
    try:
        return load_spec(config.trainer.policy.model.path)
    except ConfigError as error:
        raise ConfigError(f"{error}; or say where it is now with model=DIR") from None


def _draft_shapes(config: Config, spec: ModelSpec, kind: DraftKind) -> Shapes:
    try:
        return kind.shapes(config, spec, kind.path(config.trainer)).tensors
    except ConfigError as error:
        raise ConfigError(f"{error}; or say where it is now with draft=DIR") from None


def _config(extra: Mapping[str, Any], directory: Path) -> Config:
    """Settings of the run, as the checkpoint holds them."""
    try:
        saved = yaml.safe_load(extra["config"])
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), saved))  # type: ignore[return-value]
    except (KeyError, TypeError, yaml.YAMLError, OmegaConfBaseException) as error:
        text = " ".join(str(error).split())[:120]
        raise ConfigError(
            f"checkpoint={directory}: its configuration cannot be read ({text}); "
            "use the version of skyrl_spec that wrote it"
        ) from None
