"""Command with which vLLM serves policy and draft."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from shlex import quote

from skyrl_spec.drafts.kinds import trained_kind
from skyrl_spec.settings.schema import TrainerConfig

COMMAND = "vllm serve"
# vLLM's CPU build has another package name, and `vllm serve` fails because of it. This command starts the same server.
# By default the CPU build takes nearly all memory for its cache and compiles for minutes.
CPU_COMMAND = "python -m vllm.entrypoints.openai.api_server --enforce-eager --kv-cache-memory-bytes 1G --model"


def command_here() -> str:
    """Serve command of the installed vLLM."""
    try:
        version("vllm")
    except PackageNotFoundError:
        return CPU_COMMAND
    return COMMAND


def serve_command(trainer: TrainerConfig, policy: str, draft: str, command: str | None = None) -> str:
    """Command line that serves the policy in directory ``policy`` with its draft.

    Args:
        draft: directory of a draft that has its own.
        command: server to start. None: that of the installed vLLM.
    """
    line = f"{command or command_here()} {quote(policy)}"
    kind = trained_kind(trainer)
    if kind is None:
        return line
    speculative = kind.speculative_config(kind.with_path(trainer, draft))
    return f"{line} --speculative-config {quote(json.dumps(speculative))}"
