"""What is evaluated: a run, a checkpoint, an exported bundle, or any model that vLLM serves; and its draft."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from skyrl_spec.checkpoint.folders import RECORD, latest, read_record
from skyrl_spec.drafts.kinds import KINDS, trained_kind
from skyrl_spec.errors import ConfigError
from skyrl_spec.settings.options import EvalDraftOptions
from skyrl_spec.settings.schema import Config
from skyrl_spec.specs.files import model_directory, read_config

DEFAULT_TOKENS = (1, 2, 3, 5, 7)
# An n-gram draft proposes what followed the last 2 to 4 tokens before.
_NGRAM = {"prompt_lookup_min": 2, "prompt_lookup_max": 4}


@dataclass(frozen=True)
class Target:
    """Directories that vLLM loads. ``run`` is the configuration that it was trained with, where that is known."""

    model: Path
    method: str
    draft: Path | None = None
    run: Config | None = None
    # What a person would call it.
    name: str = ""
    # Where a result is put if nothing else is said.
    home: Path = field(default_factory=Path)

    def speculative_config(self, num_tokens: int) -> dict[str, Any]:
        """vLLM's, for so many draft tokens."""
        config: dict[str, Any] = {"method": self.method, "num_speculative_tokens": num_tokens}
        if self.method == "ngram":
            return config | _NGRAM
        return config if self.draft is None else config | {"model": str(self.draft)}

    def token_counts(self, wanted: list[int] | None) -> list[int]:
        """The numbers of draft tokens to try, ascending.

        Raises:
            ConfigError: more than a block of the draft has.
        """
        kind = KINDS.get(self.method)
        most = None if kind is None else kind.max_draft_tokens(self.draft)
        if wanted is None:
            return [count for count in DEFAULT_TOKENS if most is None or count <= most]
        if most is not None and max(wanted) > most:
            raise ConfigError(
                f"num_speculative_tokens={max(wanted)}: a block of the draft {self.draft} has {most} drafted tokens; "
                f"ask for at most {most}"
            )
        return sorted(set(wanted))


@contextmanager
def open_target(options: EvalDraftOptions) -> Iterator[Target]:
    """The target as directories, which for a checkpoint are written for the time of the context.

    Raises:
        ConfigError: it is nothing of the kind, or has no draft.
    """
    if not options.target:
        raise ConfigError("target='': names nothing to evaluate; write target=RUN, a checkpoint, a bundle or a model")
    path = Path(options.target)
    checkpoint = latest(path / "checkpoints") or latest(path)
    if checkpoint is not None or (path / RECORD).is_file():
        # Engines on other machines see the run's file system, and not this machine's folder for temporary files.
        shared = (checkpoint or path).absolute().parent if "RAY_ADDRESS" in os.environ else None
        with TemporaryDirectory(prefix="skyrl-eval-", dir=shared) as folder:
            yield _exported(checkpoint or path, Path(folder) / "bundle", options)
    elif (path / "model" / "config.json").is_file():
        draft = path / "draft" if (path / "draft" / "config.json").is_file() else None
        yield _with_draft(path / "model", draft, options, name=str(path), home=path)
    elif path.is_dir() and not (path / "config.json").is_file():
        raise ConfigError(
            f"target={path}: is neither a run with a checkpoint, nor a checkpoint, a bundle or a model; "
            "name one (a run's first checkpoint comes after trainer.ckpt_interval steps)"
        )
    else:
        yield _with_draft(model_directory(str(path), "target"), None, options, name=str(path), home=Path())


def _exported(checkpoint: Path, bundle_directory: Path, options: EvalDraftOptions) -> Target:
    # Megatron is imported where a checkpoint is read.
    from skyrl_spec.checkpoint import bundle

    read_record(checkpoint, "target")
    source = bundle.read_source(checkpoint, model=options.model)
    bundle.export_bundle(source, bundle_directory)
    draft = bundle_directory / "draft" if (bundle_directory / "draft").is_dir() else None
    if options.method is None and options.draft is None and trained_kind(source.config.trainer) is None:
        raise ConfigError(
            f"target={options.target}: was trained without a draft; name one: method=ngram, or method and draft=DIR"
        )
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
    """``own`` is the draft that came with the model."""
    if options.draft is not None and options.method in ("mtp", "ngram"):
        raise ConfigError(f"draft={options.draft}: method={options.method} has no draft beside the model; drop one")
    draft = own if options.draft is None else model_directory(options.draft, "draft")
    method = options.method or _method_of(model, draft, name)
    if method in ("dflash", "eagle3") and draft is None:
        raise ConfigError(f"method={method}: needs a draft, and {name} has none; name one with draft=DIR")
    if method == "mtp" and not KINDS["mtp"].is_in(read_config(model, "target")):
        raise ConfigError(f"method=mtp: {name} has no MTP head (num_nextn_predict_layers); choose another method")
    return Target(model, method, draft if method in ("dflash", "eagle3") else None, run, name, home)


def _method_of(model: Path, draft: Path | None, name: str) -> str:
    if draft is not None:
        config = read_config(draft, "draft")
        return next((name for name, kind in KINDS.items() if kind.has_own_directory and kind.is_in(config)), "eagle3")
    if KINDS["mtp"].is_in(read_config(model, "target")):
        return "mtp"
    raise ConfigError(f"target={name}: has no draft of its own; name one with draft=DIR, or take method=ngram")
