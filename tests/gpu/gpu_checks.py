"""All checks of the GPU pack. Those that tell most come first, because a GPU may be lent for minutes only."""

from __future__ import annotations

from attentions import ATTENTIONS
from gpu_check import Check
from measures import FUSIONS, MEMORY, PACKING, PLANS, SPEED, SYNC
from offloads import OFFLOAD
from training import DISTRIBUTED, ISOLATION, LONG_ROWS, RECOMPUTE, STEPS
from vocabularies import LOGPROBS, LOSSES

CHECKS: list[Check] = [
    *STEPS,
    *ISOLATION,
    *ATTENTIONS,
    *LOSSES,
    *LOGPROBS,
    *RECOMPUTE,
    *OFFLOAD,
    *MEMORY,
    *SPEED,
    *PACKING,
    *SYNC,
    *PLANS,
    *LONG_ROWS,
    *DISTRIBUTED,
    *FUSIONS,
]
