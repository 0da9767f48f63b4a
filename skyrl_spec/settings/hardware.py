"""What the plan of a run assumes about its machines."""

from __future__ import annotations

from dataclasses import dataclass

from skyrl_spec.settings.allowed import POSITIVE
from skyrl_spec.settings.field import setting


@dataclass
class HardwareConfig:
    """Sizes and speeds of the machines, for trainer.dry_run. A run itself does not read them."""

    gpu_memory_gb: float = setting(80.0, "Memory of a GPU, in GB.", POSITIVE)
    host_to_gpu_gb_per_s: float = setting(
        25.0, "Speed of copies between a GPU and page-locked host memory, in GB/s, each way.", POSITIVE
    )
    disk_gb_per_s: float = setting(1.0, "Speed at which one worker writes its part of a checkpoint, in GB/s.", POSITIVE)
