"""Target of an evaluation: a run, a checkpoint, an exported bundle or a model that vLLM serves, with its draft."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from skyrl_spec.checkpoint.folders import RECORD, latest, read_record
from skyrl_spec.drafts.kinds import KINDS, trained_kind
from skyrl_spec.errors import ConfigError
from skyrl_spec.planning.environment import cluster_address
from skyrl_spec.settings.options import EvalDraftOptions
from skyrl_spec.settings.schema import Config
from skyrl_spec.specs.files import model_directory, read_config

DEFAULT_TOKENS = (1, 2, 3, 5, 7)
# An n-gram draft proposes the tokens that followed an earlier occurrence of the last 2 to 4 tokens.
_NGRAM = {"prompt_lookup_min": 2, "prompt_lookup_max": 4}


@dataclass(frozen=True)
class Target:
    """Model and draft as directories. ``run`` is the configuration they were trained with, if known."""

    model: Path
    method: str
    draft: Path | None = None
    run: Config | None = None
    # Name for people.
    name: str = ""
    # Directory for the result if no other is given.
    home: Path = field(default_factory=Path)

    def speculative_config(self, num_tokens: int) -> dict[str, Any]:
        """vLLM's ``speculative_config`` for ``num_tokens`` draft tokens."""
        config: dict[str, Any] = {"method": self.method, "num_speculative_tokens": num_tokens}
        if self.method == "ngram":
            return config | _NGRAM
        return config if self.draft is None else config | {"model": str(self.draft)}

    def token_counts(self, wanted: list[int] | None) -> list[int]:
        """Numbers of draft tokens to try, ascending.

        Raises:
            ConfigError: a number is larger than the draft allows.
        """
        kind = KINDS.get(self.method)
        most = None if kind is None else kind.max_draft_tokens(self.draft)
        if wanted is None:
            return [count for count in DEFAULT_TOKENS if most is None or count <= most]
        if most is not None and max(wanted) > most:
            raise ConfigError(
                f"num_speculative_tokens={max(wanted)}: must be at most {most}, the tokens that {self.draft} drafts in "
                "a block; lower it"
            )
        return sorted(set(wanted))


@contextmanager
def open_target(options: EvalDraftOptions) -> Iterator[Target]:
    """The target as directories. Those of a checkpoint are temporary and exist as long as the context.

    Raises:
        ConfigError: ``options.target`` is none of the possible targets, or it has no draft.
    """
    if not options.target:
        raise ConfigError("target='': must name a run, checkpoint, bundle or model; write target=RUN")
    path = Path(options.target)
    checkpoint = latest(path / "checkpoints") or latest(path)
    if checkpoint is not None or (path / RECORD).is_file():
        # Engines on other machines can read the run's file system, but not the temporary folder of this machine.
        shared = (checkpoint or path).absolute().parent if cluster_address() is not None else None
        with TemporaryDirectory(prefix="skyrl-eval-", dir=shared) as folder:
            yield _exported(checkpoint or path, Path(folder) / "bundle", options)
    elif (path / "model" / "config.json").is_file():
        draft = path / "draft" if (path / "draft" / "config.json").is_file() else None
        yield _with_draft(path / "model", draft, options, name=str(path), home=path)
    elif path.is_dir() and not (path / "config.json").is_file():
        raise ConfigError(
            f"target={path}: must be a run with a checkpoint, a checkpoint, a bundle or a model; name one (a run "
            "writes its first checkpoint after trainer.ckpt_interval steps)"
        )
    else:
        yield _with_draft(model_directory(str(path), "target"), None, options, name=str(path), home=Path())


def _exported(checkpoint: Path, bundle_directory: Path, options: EvalDraftOptions) -> Target:
    # Imported late: it imports Megatron.
    from skyrl_spec.checkpoint import bundle

    read_record(checkpoint, "target")
    source = bundle.read_source(checkpoint, model=options.model)
    bundle.export_bundle(source, bundle_directory)
    draft = bundle_directory / "draft" if (bundle_directory / "draft").is_dir() else None
    if options.method is None and options.draft is None and trained_kind(source.config.trainer) is None:
        raise ConfigError(f"target={options.target}: has no draft; give method=ngram, or draft=DIR")
    return _with_draft(
        bundle_directory / "model",
        draft,
        options,
        run=source.config,
        name=str(checkpoint),
        home=checkpoint.parent.parent,
    )


def _with_draft(
    model: Path, own: Path | None, options: EvalDraftOptions, *, name: str, home: Path, run: Config | None = None
) -> Target:
    """The target with the draft of ``options``, or else with ``own``, the draft that belongs to the model."""
    if options.draft is not None and options.method is not None and not _has_own_directory(options.method):
        raise ConfigError(
            f"draft={options.draft}: method={options.method} takes no draft directory; remove one of them"
        )
    draft = own if options.draft is None else model_directory(options.draft, "draft")
    method = options.method or _method_of(model, draft, name)
    if _has_own_directory(method) and draft is None:
        raise ConfigError(f"method={method}: needs a draft, but {name} has none; give draft=DIR")
    if method == "mtp" and not KINDS["mtp"].is_in(read_config(model, "target")):
        raise ConfigError(f"method=mtp: {name} has no MTP head (num_nextn_predict_layers); choose another method")
    return Target(model, method, draft if _has_own_directory(method) else None, run, name, home)


def _has_own_directory(method: str) -> bool:
    """Whether a draft of ``method``, trained here or not, has a checkpoint directory of its own."""
    return KINDS[method].has_own_directory if method in KINDS else method == "eagle3"


def _method_of(model: Path, draft: Path | None, name: str) -> str:
    if draft is not None:
        config = read_config(draft, "draft")
        return next((name for name, kind in KINDS.items() if kind.has_own_directory and kind.is_in(config)), "eagle3")
    if KINDS["mtp"].is_in(read_config(model, "target")):
        return "mtp"
    raise ConfigError(f"target={name}: has no draft; give draft=DIR, or method=ngram")
