"""What the plan of a run assumes about its machines."""

from __future__ import annotations

from dataclasses import dataclass

from skyrl_spec.settings.allowed import NOT_NEGATIVE, POSITIVE, SHARE
from skyrl_spec.settings.field import setting


@dataclass
class HardwareConfig:
    """Sizes and speeds of the machines, for trainer.dry_run and layouts. A run itself does not read them."""

    gpu_memory_gb: float = setting(80.0, "Memory of a GPU, in GB.", POSITIVE)
    host_to_gpu_gb_per_s: float = setting(
        25.0, "Speed of copies between a GPU and page-locked host memory, in GB/s, each way.", POSITIVE
    )
    reserved_gb: float = setting(4.0, "What CUDA, NCCL and CUDA graphs take of a GPU, in GB.", NOT_NEGATIVE)
    gpu_tflops: float = setting(989.0, "Peak speed of a GPU's matrix products in bf16, in TFLOP/s.", POSITIVE)
    mfu: float = setting(0.3, "Share of the peak speed that training reaches.", SHARE)
    gpu_bandwidth_gb_per_s: float = setting(3350.0, "Speed at which a GPU reads its memory, in GB/s.", POSITIVE)
    gpu_to_gpu_gb_per_s: float = setting(
        400.0, "Speed at which a GPU sends to the others of its machine, in GB/s.", POSITIVE
    )
    all_reduce_us: float = setting(
        10.0, "Least time of a collective between GPUs of a machine, in microseconds.", NOT_NEGATIVE
    )
    network_gb_per_s: float = setting(50.0, "Speed at which a GPU sends to other machines, in GB/s.", POSITIVE)
    disk_gb_per_s: float = setting(1.0, "Speed at which one worker writes its part of a checkpoint, in GB/s.", POSITIVE)
