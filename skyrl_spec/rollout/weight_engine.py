"""vLLM's weight transfer over Ray's object store, for CPU engines: weights arrive as numpy arrays in the call itself.

One update of one model (the target, or the draft) is ``start_weight_update``, any number of ``update_weights`` with
the payloads of ``skyrl_spec.sync.payload``, ``finish_weight_update``; together they carry every tensor of the model's
checkpoint once, under the checkpoint's names. vLLM loads a layer when its last tensor is there.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
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

from skyrl_spec.sync.payload import unpack_weights

Manifest = dict[str, tuple[int, ...]]


@dataclass
class RayInitInfo(WeightTransferInitInfo):
    """Nothing has to be agreed on."""


@dataclass
class RayUpdateInfo(WeightTransferUpdateInfo):
    """What ``pack_weights`` makes."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    arrays: list[np.ndarray]


class RayWeightTransferEngine(WeightTransferEngine[RayInitInfo, RayUpdateInfo]):
    """Loads the weights of each call into the target or the draft, checked against the model's checkpoint."""

    init_info_cls = RayInitInfo
    update_info_cls = RayUpdateInfo
    # vLLM's models have ``load_weights`` and ``hf_to_vllm_mapper``; ``nn.Module`` does not say so.
    model: Any
    _default_model: Any

    def __init__(
        self, config: WeightTransferConfig, vllm_config: VllmConfig, device: torch.device, model: torch.nn.Module
    ) -> None:
        super().__init__(config, vllm_config, device, model)
        self._manifests: dict[torch.nn.Module, Manifest] = {}
        self._awaited: Manifest = {}

    def init_transfer_engine(self, init_info: RayInitInfo) -> None:
        """No connection to make."""

    def start_weight_update(self) -> None:
        """Begins an update of every tensor; one that was broken off before is forgotten."""
        if self.model not in self._manifests:
            self._manifests[self.model] = self._build_manifest()
        self._awaited = dict(self._manifests[self.model])
        reload.initialize_layerwise_reload(self.model)
        for layer in self.model.modules():
            info = get_layerwise_info(layer)
            info.load_numel = 0
            info.loaded_weights.clear()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """As the base class does, without its device synchronization: there is no device."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: RayUpdateInfo) -> None:
        """Loads one chunk. Raises ``ValueError`` for a tensor that is unknown, of another shape, or sent twice."""
        weights = unpack_weights(**vars(update_info))
        for name, tensor in weights:
            self._check(name, tuple(tensor.shape))
        with disable_mtp_completeness_check():
            self.model.load_weights(weights)

    def finish_weight_update(self) -> None:
        """Ends the update. Raises ``ValueError`` if tensors are missing: they can still be sent, then finish again."""
        if self._awaited:
            names = sorted(self._awaited)
            raise ValueError(f"weight update lacks {len(names)} tensors of {self._describe()}: {_some(names)}")
        reload.finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Nothing to close."""

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
        """The tensors of the active model: what the target's loader takes, or leaves to a draft in its checkpoint."""
        target = self._default_model_config
        is_draft = self.model is not self._default_model
        tensors = checkpoint_manifest(self.model_config.model, self.model_config.revision)
        if is_draft and self.model_config.model != target.model:
            return tensors
        mapper = self._default_model.hf_to_vllm_mapper
        return {name: shape for name, shape in tensors.items() if (mapper.map_name(name) is None) == is_draft}

    def _describe(self) -> str:
        role = "target" if self.model is self._default_model else "draft"
        return f"the {role} ({self.model_config.model})"


def checkpoint_manifest(model: str, revision: str | None = None) -> Manifest:
    """Names and shapes of a checkpoint's tensors, from its safetensors headers. ``model``: directory or hub name."""
    directory = Path(model)
    if not directory.is_dir():
        directory = Path(snapshot_download(model, revision=revision, local_files_only=True))
    manifest: Manifest = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            manifest |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    if not manifest:
        raise ValueError(f"{directory}: no safetensors file to take the tensors' names and shapes from")
    return manifest


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
