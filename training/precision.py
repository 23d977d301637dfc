"""The four precisions of a run: what the batch, the weights and the products are computed in."""

import contextlib

import torch

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


def batch_dtype(precision: str) -> torch.dtype:
    """Type of weights and images: float32, but for proofs in double precision."""
    return torch.float64 if precision == "fp64" else torch.float32


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    """Half precision for matrix products, where that is what was asked for."""
    if precision in ("fp32", "fp64"):
        return contextlib.nullcontext()
    return torch.autocast(device.type, PRECISIONS[precision])


def has_bf16(device: torch.device) -> bool:
    """Whether bf16 products are computed by the hardware, not emulated."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(getattr(torch.cpu, f"_is_{isa}_supported", lambda: False)() for isa in ("avx512_bf16", "amx_tile"))
