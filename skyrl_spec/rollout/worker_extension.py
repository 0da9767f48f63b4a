"""What vLLM adds to its worker (``worker_extension_cls``)."""

from __future__ import annotations

from skyrl_spec.rollout.draft_recorder import DraftRecorder
from skyrl_spec.rollout.routed_experts import ExpertRecorder


class WorkerExtension(DraftRecorder, ExpertRecorder):
    """Methods that ``collective_rpc`` calls by name."""
