"""Tensors in safetensors files: the only format that is read, since to read a pickle is to run it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from components.foundation.errors import IntegrityError
from components.foundation.untrusted import one_line, shown

_KINDS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
"""Of numbers, that we write."""


def read_tensors(path: Path, device: torch.device) -> dict[str, Tensor]:
    """Name -> tensor.

    Raises:
        IntegrityError: the file is missing, cut, no safetensors, or its header lies about what follows.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path, device=str(device))
    except (OSError, SafetensorError) as error:
        raise IntegrityError(f"{path} cannot be read: {one_line(error)}") from error
    for name, tensor in tensors.items():
        if tensor.dtype not in _KINDS:
            raise IntegrityError(f"{path} cannot be read: {shown(name)} holds {tensor.dtype}, and no weights of ours")
    return tensors
