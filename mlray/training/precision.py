"""What the hardware computes in, and which ZeRO stage that leaves."""

from __future__ import annotations

from pathlib import Path

import torch

from mlray.config import Train


def probe_precision(wanted: str) -> str:
    """`bf16` or `fp32`: what was asked for, or with `auto` what the hardware computes in."""
    if wanted != "auto":
        return wanted
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() and _cpu_multiplies_bf16() else "fp32"


def _cpu_multiplies_bf16() -> bool:
    """mkldnn also emulates bf16; only these instructions make it faster than fp32."""
    try:
        flags = Path("/proc/cpuinfo").read_text().split("flags", 2)[1].split("\n", 1)[0]
    except (OSError, IndexError):
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def settle(config: Train, num_workers: int, precision: str) -> Train:
    """What runs for what was asked: a single fp32 worker shares its states with nobody and is faster without ZeRO."""
    alone = num_workers == 1 and precision == "fp32" and not config.offload
    stage = 0 if alone else config.zero_stage
    return config.model_copy(update={"precision": precision, "zero_stage": stage})
