"""How vLLM serves what was trained."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version

from skyrl_spec.drafts.kinds import trained_kind
from skyrl_spec.settings.schema import TrainerConfig

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
    """The command that serves the policy in directory ``policy`` with its draft.

    ``draft`` is the directory of a draft that has its own. ``command`` None: the one for the vLLM that is installed.
    """
    line = f"{command or command_here()} {policy}"
    kind = trained_kind(trainer)
    if kind is None:
        return line
    speculative = kind.speculative_config(kind.with_path(trainer, draft))
    return f"{line} --speculative-config '{json.dumps(speculative)}'"
