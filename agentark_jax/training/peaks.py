"""What accelerators can do at most: dense bf16 matrix products, FLOP/s per device as JAX counts devices."""

from collections.abc import Sequence

import jax

# By the beginning of `device_kind`, from the vendors' data sheets (without sparsity). Figures of GPUs are those of the
# SXM form where there are several.
PEAK_FLOPS = {
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA B200": 2250e12,
}


def peak_flops(devices: Sequence[jax.Device]) -> float | None:
    """FLOP/s of all devices together; None where one of them is not in the table, as no CPU is."""
    total = 0.0
    for device in devices:
        known = [kind for kind in PEAK_FLOPS if device.device_kind.startswith(kind)]
        if not known:
            return None
        total += PEAK_FLOPS[max(known, key=len)]
    return total
