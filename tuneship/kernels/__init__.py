"""What makes a step fast: attention over packed rows, the loss at the labels only, Gemma 2 by hand.

Everything here is arithmetic on tensors; nothing here knows recipes, files or PEFT.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def operations(x: Tensor) -> Any:
    """The module that computes on a tensor's device: the GPU's kernels, or their definitions in torch."""
    if x.is_cuda:
        # Triton comes with torch's CUDA builds only.
        from tuneship.kernels import fused

        return fused
    from tuneship.kernels import reference

    return reference


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU's on a device; to a GPU without waiting for what it is doing."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
