"""Files of Hugging Face checkpoints: directories, hub names, ``config.json`` and tensor shapes. Imports no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
from safetensors import SafetensorError, safe_open

from skyrl_spec.errors import ConfigError

# Shapes of tensors by name.
Shapes = Mapping[str, tuple[int, ...]]

POLICY_PATH = "trainer.policy.model.path"
HUB_TIMEOUT_S = 5.0
# The file of a checkpoint in one piece, and the table of one in several.
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_WEIGHT_FILES = ["*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf"]
# Entries of config.json that must be positive integers.
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "block_size",
    "num_target_layers",
)


def is_hub_name(path: str) -> bool:
    """Whether ``path`` has the form owner/name and is no local directory."""
    return not Path(path).exists() and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path) is not None


def model_directory(path: str, setting: str = POLICY_PATH, *, weights: bool = True) -> Path:
    """The local directory of ``path``: itself, or the snapshot of a hub name. A snapshot is downloaded unless cached.

    ``weights=False``: only the small files of a hub name are downloaded.

    Raises:
        ConfigError: ``path`` is neither a directory nor a hub name that can be downloaded.
    """
    directory = Path(path)
    if directory.is_dir():
        return directory
    if directory.is_absolute() or path.startswith(".") or path.count("/") != 1:
        raise ConfigError(f"{setting}={path}: no such directory; give a Hugging Face checkpoint directory or hub name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(path, ignore_patterns=None if weights else _WEIGHT_FILES))
    # ValueError: the name has a form that the hub does not allow.
    except (HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0][:120]
        raise ConfigError(
            f"{setting}={path}: is not a local directory and cannot be downloaded ({reason}); correct the path or "
            "check the network"
        ) from error


def read_config_only(path: str, setting: str) -> tuple[Path, dict[str, Any]]:
    """Directory and parsed ``config.json`` of a model. Of a hub name only ``config.json`` is downloaded."""
    if is_hub_name(path):
        return Path(path), _hub_config(path, setting)
    directory = model_directory(path, setting)
    return directory, read_config(directory, setting)


def read_config(directory: Path, setting: str = POLICY_PATH) -> dict[str, Any]:
    """The parsed ``config.json`` in ``directory``.

    Raises:
        ConfigError: it is missing or cannot be read, or a size in it is not a positive integer.
    """
    file = directory / "config.json"
    try:
        config = json.loads(file.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{setting}={directory}: has no config.json; give a checkpoint directory") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{setting}={directory}: config.json cannot be read ({error}); copy it again") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{setting}={directory}: config.json must hold a JSON object; copy it again")
    _check_sizes(directory, config, setting)
    return config


def weight_files(directory: Path, setting: str) -> list[Path]:
    """The ``*.safetensors`` files that make up the checkpoint, as transformers and vLLM see it.

    They are those of the index or, without one, the only file. ``stray_files`` has what is there beside them.

    Raises:
        ConfigError: there is none, one of the index is missing, or transformers and vLLM would load different ones.
    """
    found, where = sorted(directory.glob("*.safetensors")), f"{setting}={directory}"
    if not found:
        raise ConfigError(f"{where}: has no *.safetensors; give a complete checkpoint directory")
    names = [file.name for file in found]
    if not (directory / INDEX).is_file():
        if len(found) > 1:
            other = next(name for name in names if name != WEIGHTS)
            raise ConfigError(
                f"{where}: has {len(found)} *.safetensors and no {INDEX}, so vLLM would load {other} too; "
                + (f"move all but {WEIGHTS} away" if WEIGHTS in names else "copy the index of the checkpoint, too")
            )
        return found
    listed = _listed_files(directory, where)
    for name in listed:
        if name not in names:
            raise ConfigError(f"{where}: {name}, which {INDEX} lists, is missing; copy it again")
    if WEIGHTS in names and WEIGHTS not in listed:
        raise ConfigError(
            f"{where}: has {WEIGHTS}, which transformers would load, and an {INDEX} of other files, which vLLM would "
            "load; remove one of the two"
        )
    return [directory / name for name in listed]


def stray_files(directory: Path, setting: str) -> list[str]:
    """Names of files of weights beside ``weight_files``."""
    used = weight_files(directory, setting)
    return [file.name for file in sorted(directory.glob("*.safetensors")) if file not in used]


def _listed_files(directory: Path, where: str) -> list[str]:
    """File names in the index of a checkpoint."""
    try:
        listed = set(json.loads((directory / INDEX).read_text())["weight_map"].values())
        return sorted(name for name in listed if name == Path(name).name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{where}: {INDEX} cannot be read ({error!r:.80}); copy it again") from None


def read_shapes(directory: Path, setting: str) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors of the checkpoint in ``directory``, read from the headers of its files.

    Raises:
        ConfigError: ``weight_files`` finds none, or one cannot be read.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files(directory, setting):
        try:
            with safe_open(file, framework="numpy") as tensors:
                # ``tensors`` is not a dictionary and cannot be iterated.
                shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{setting}={directory}: {file.name} cannot be read ({error}); copy it again") from error
    return shapes


def has_same_bytes(directory: Path, setting: str, name: str, other: str) -> bool:
    """Whether two tensors of the checkpoint hold the same bytes, or the first one is missing."""
    found = {}
    for file in weight_files(directory, setting):
        with file.open("rb") as opened:
            header_size = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(header_size))
        for tensor in header.keys() & {name, other}:
            start, end = header[tensor]["data_offsets"]
            found[tensor] = np.memmap(file, np.uint8, "r", 8 + header_size + start, (end - start,))
    if name not in found:
        return True
    return other in found and np.array_equal(found[name], found[other])


def require_tensors(path: str, setting: str, expected: Shapes) -> None:
    """Checks that a local checkpoint has the ``expected`` tensors. A hub name is not downloaded yet, and not checked.

    Raises:
        ConfigError: a tensor is missing or has another shape.
    """
    if not Path(path).is_dir():
        return
    found = read_shapes(Path(path), setting)
    for name, shape in expected.items():
        if name not in found:
            raise ConfigError(f"{setting}={path}: has no tensor {name}, so it is incomplete; copy it again")
        if found[name] != shape:
            raise ConfigError(
                f"{setting}={path}: {name} has shape {list(found[name])}, but config.json says {list(shape)}; copy "
                "weights and config.json from the same model"
            )


def require_shapes(saved: dict[str, list[int]], expected: Shapes, setting: str, checkpoint: str) -> None:
    """Raises ``ConfigError`` unless the tensors of ``checkpoint`` are those of the model that ``setting`` names."""
    for name in sorted(saved.keys() | expected.keys()):
        saved_shape, shape = saved.get(name), list(expected[name]) if name in expected else None
        if saved_shape != shape:
            raise ConfigError(
                f"{setting}: {checkpoint} belongs to another model: {name} has shape {saved_shape or 'none (missing)'} "
                f"there and {shape or 'none (missing)'} here; set the model that it was trained from"
            )


def _check_sizes(directory: Path, config: dict[str, Any], setting: str) -> None:
    for name in _SIZES:
        size = config.get(name)
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise ConfigError(
                f"{setting}={directory}: {name}={size!r} in config.json must be an integer of at least 1; copy it again"
            )


def _hub_config(name: str, setting: str) -> dict[str, Any]:
    """``config.json`` from the hub's cache, or from one request. The hub's own client would retry for half a minute."""
    from huggingface_hub import hf_hub_url, try_to_load_from_cache
    from huggingface_hub.utils import build_hf_headers

    cached = try_to_load_from_cache(name, "config.json")
    if isinstance(cached, str):
        return read_config(Path(cached).parent)
    request = Request(hf_hub_url(name, "config.json"), headers=build_hf_headers())
    try:
        with urlopen(request, timeout=HUB_TIMEOUT_S) as reply:
            return json.load(reply)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{setting}={name}: is not a local directory and was not found on the Hugging Face hub "
            f"({str(error).splitlines()[0]}); correct it or check the network"
        ) from error
