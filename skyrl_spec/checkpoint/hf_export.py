"""Export of policy and draft as Hugging Face checkpoint directories, which transformers and vLLM load."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from torch import Tensor

from skyrl_spec.errors import RunError
from skyrl_spec.models.conversion import HfTensors
from skyrl_spec.models.parallel import Parallel
from skyrl_spec.specs.files import read_config
from skyrl_spec.specs.model import EMBEDDING, ModelSpec
from skyrl_spec.types import Component

# All files but weights and config.json are copied: tokenizer, chat template, generation config.
_NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


# A tied head that is stored, and the embedding and head that some checkpoints repeat in their MTP layers.
_COPIES = re.compile(r"(^|\.)(embed_tokens|lm_head|shared_head\.head)\.weight$")


class Exported(Protocol):
    """Part of ``training.exports.Exports`` that an export uses."""

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def takes_part(self) -> bool: ...
    @property
    def draft_source(self) -> Path | None: ...
    def draft_hf_config(self) -> dict[str, Any] | None: ...


class ExportedTrainer(Protocol):
    """Part of ``training.trainer.PolicyTrainer`` that an export uses."""

    spec: ModelSpec
    parallel: Parallel

    @property
    def exports(self) -> Exported: ...
    def export(self, component: Component) -> Iterator[tuple[str, Tensor]]: ...


def save_hf(trainer: ExportedTrainer, run_dir: Path) -> None:
    """Writes ``run_dir/model``, and ``run_dir/draft`` for a draft with its own directory.

    An MTP head is a part of the policy's checkpoint. All ranks must call this; rank 0 writes. A directory appears when
    it is complete.
    """
    components: list[Component] = ["policy"]
    if trainer.exports.draft_source == trainer.spec.path:
        components.append("draft")
    _save_model(trainer, components, run_dir / "model")
    if trainer.exports.draft_source not in (None, trainer.spec.path):
        save_draft(trainer, run_dir)


def save_draft(trainer: ExportedTrainer, run_dir: Path) -> None:
    """Writes the draft to ``run_dir/draft``, or to ``run_dir/model`` with the starting policy that it is a part of."""
    if trainer.exports.draft_source == trainer.spec.path:
        _save_model(trainer, ["draft"], run_dir / "model")
        return
    weights = _gather(trainer, ["draft"])
    if trainer.parallel.rank == 0:
        config = trainer.exports.draft_hf_config()
        assert config is not None
        write_draft(weights, config, run_dir / "draft")


def write_model(weights: dict[str, Tensor], source: Path, dtype: torch.dtype, target: Path) -> None:
    """Writes the checkpoint ``source``, with ``weights`` in place of its own, in ``dtype`` to ``target``.

    Tensors that ``weights`` does not have (further MTP layers, a frozen trunk) stay as they are in ``source``, but not
    copies of a trained embedding or output head.
    """
    untouched, config = HfTensors(source), read_config(source)
    is_copy = _COPIES.search if EMBEDDING in weights else lambda name: None
    kept = [name for name in untouched.names() if name not in weights and not is_copy(name)]
    weights = weights | {name: untouched[name].to(dtype) for name in kept}
    name = str(dtype).removeprefix("torch.")
    config |= {key: name for key in ("dtype", "torch_dtype") if key in config}
    with complete(target) as directory:
        save_torch_state_dict(weights, directory)
        _write_config(directory, config)
        for file in source.iterdir():
            is_weights = file.suffix in _NOT_COPIED or "safetensors" in file.name
            if file.is_file() and not is_weights and file.name != "config.json":
                shutil.copy2(file, directory / file.name)


def write_draft(weights: dict[str, Tensor], config: dict[str, Any], target: Path) -> None:
    """Writes a draft with its own directory to ``target``. ``config`` is its config.json."""
    with complete(target) as directory:
        save_torch_state_dict(weights, directory)
        _write_config(directory, config)


@contextmanager
def complete(target: Path) -> Iterator[Path]:
    """Directory to write into. It is renamed to ``target`` at the end of the context, or removed after an error.

    Raises:
        RunError: it could not be written.
    """
    partial = target.with_name(target.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        # safetensors raises its own error for a full disk.
        if not isinstance(error, OSError | SafetensorError):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise RunError(f"{target}: could not be written ({reason}); free space, or choose another place") from None


def _save_model(trainer: ExportedTrainer, components: list[Component], target: Path) -> None:
    weights = _gather(trainer, components)
    if trainer.parallel.rank == 0:
        write_model(weights, trainer.spec.path, trainer.exports.dtype, target)


def _gather(trainer: ExportedTrainer, components: list[Component]) -> dict[str, Tensor]:
    """Full tensors by HF name on rank 0; empty on the other ranks."""
    weights: dict[str, Tensor] = {}
    if trainer.exports.takes_part:
        for component in components:
            for name, tensor in trainer.export(component):
                if trainer.parallel.rank == 0:
                    weights[name] = tensor.cpu().clone()
    return weights


def _write_config(directory: Path, config: dict[str, Any]) -> None:
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
