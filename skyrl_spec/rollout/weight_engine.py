"""Weight transfer for CPU engines: weights arrive as numpy arrays, as arguments of the call.

One update of one model (target or draft) is ``start_weight_update``, any number of ``update_weights`` with payloads of
``skyrl_spec.sync.payload``, and ``finish_weight_update``. Together they carry every tensor of the model's checkpoint
once, under the checkpoint's names. vLLM loads a layer when its last tensor has arrived.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from vllm.config import VllmConfig
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader import reload
from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from skyrl_spec.specs.files import read_shapes
from skyrl_spec.specs.model import OUTPUT_HEAD
from skyrl_spec.sync.payload import unpack_weights

Manifest = dict[str, tuple[int, ...]]


@dataclass
class RayInitInfo(WeightTransferInitInfo):
    """Empty: there is nothing to agree on."""


@dataclass
class RayUpdateInfo(WeightTransferUpdateInfo):
    """A payload of ``pack_weights``."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    arrays: list[np.ndarray]


class RayWeightTransferEngine(WeightTransferEngine[RayInitInfo, RayUpdateInfo]):
    """Loads weights into the target or the draft, and checks names and shapes against the model's checkpoint."""

    init_info_cls = RayInitInfo
    update_info_cls = RayUpdateInfo
    # Any, because nn.Module does not declare load_weights and hf_to_vllm_mapper of vLLM's models.
    model: Any
    _default_model: Any

    def __init__(
        self, config: WeightTransferConfig, vllm_config: VllmConfig, device: torch.device, model: torch.nn.Module
    ) -> None:
        super().__init__(config, vllm_config, device, model)
        self._manifests: dict[torch.nn.Module, Manifest] = {}
        self._awaited: Manifest = {}

    def init_transfer_engine(self, init_info: RayInitInfo) -> None:
        """Does nothing: there is no connection to make."""

    def start_weight_update(self) -> None:
        """Begins an update of every tensor. Discards an unfinished update."""
        if self.model not in self._manifests:
            self._manifests[self.model] = self._build_manifest()
        self._awaited = dict(self._manifests[self.model])
        reload.initialize_layerwise_reload(self.model)
        for layer in self.model.modules():
            info = get_layerwise_info(layer)
            info.load_numel = 0
            info.loaded_weights.clear()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Loads one chunk, without the base class's device synchronization: there is no device."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: RayUpdateInfo) -> None:
        """Loads one chunk. Raises ``ValueError`` for a tensor that is unknown, sent twice or of another shape."""
        weights = unpack_weights(**vars(update_info))
        for name, tensor in weights:
            self._check(name, tuple(tensor.shape))
        with disable_mtp_completeness_check():
            self.model.load_weights(weights)

    def finish_weight_update(self) -> None:
        """Ends the update. Raises ``ValueError`` if tensors are missing; the update can be completed afterwards."""
        if self._awaited:
            names = sorted(self._awaited)
            raise ValueError(f"weight update lacks {len(names)} tensors of {self._describe()}: {_some(names)}")
        reload.finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Does nothing: there is nothing to close."""

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        manifest = self._manifests[self.model]
        if name not in manifest:
            raise ValueError(f"{name}: not a tensor of {self._describe()}, which has {_some(sorted(manifest))}")
        if shape != manifest[name]:
            raise ValueError(f"{name}: shape {list(shape)}, but {self._describe()} has {list(manifest[name])}")
        if name not in self._awaited:
            raise ValueError(f"{name}: sent twice in one weight update of {self._describe()}")
        del self._awaited[name]

    def _build_manifest(self) -> Manifest:
        """Tensors of the active model. In a shared checkpoint the draft's are those that the target's loader skips."""
        target = self._default_model_config
        is_draft = self.model is not self._default_model
        tensors = checkpoint_manifest(self.model_config.model, self.model_config.revision)
        # A tied head is the embedding, also if the checkpoint stores it.
        if self.model_config.hf_text_config.tie_word_embeddings:
            tensors.pop(OUTPUT_HEAD, None)
        if is_draft and self.model_config.model != target.model:
            return tensors
        mapper = self._default_model.hf_to_vllm_mapper
        return {name: shape for name, shape in tensors.items() if (mapper.map_name(name) is None) == is_draft}

    def _describe(self) -> str:
        role = "target" if self.model is self._default_model else "draft"
        return f"the {role} ({self.model_config.model})"


def checkpoint_manifest(model: str, revision: str | None = None) -> Manifest:
    """Names and shapes of a checkpoint's tensors, read from safetensors headers. ``model``: directory or hub name."""
    directory = Path(model)
    if not directory.is_dir():
        directory = Path(snapshot_download(model, revision=revision, local_files_only=True))
    return read_shapes(directory, "model")


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
