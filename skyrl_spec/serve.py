"""How vLLM serves what was trained."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from skyrl_spec.config import TrainerConfig

COMMAND = "vllm serve"
# The same server. vLLM's CPU build is a package of another name, for which `vllm serve` looks in vain; by default it
# takes nearly all memory for its cache, and compiles for minutes.
CPU_COMMAND = "python -m vllm.entrypoints.openai.api_server --enforce-eager --kv-cache-memory-bytes 1G --model"


def command_here() -> str:
    """The one that works with the vLLM that is installed."""
    try:
        version("vllm")
    except PackageNotFoundError:
        return CPU_COMMAND
    return COMMAND


def serve_command(trainer: TrainerConfig, policy: str, draft: str, command: str | None = None) -> str:
    """What serves the policy in directory ``policy`` with its draft, which for DFlash is in directory ``draft``."""
    speculative: dict[str, Any] = {}
    if trainer.mtp.enabled:
        speculative = {"method": "mtp", "num_speculative_tokens": trainer.mtp.num_speculative_tokens}
    elif trainer.dflash.enabled:
        num_tokens = trainer.dflash.num_speculative_tokens
        speculative = {"method": "dflash", "model": draft, "num_speculative_tokens": num_tokens}
    line = f"{command or command_here()} {policy}"
    return f"{line} --speculative-config '{json.dumps(speculative)}'" if speculative else line
