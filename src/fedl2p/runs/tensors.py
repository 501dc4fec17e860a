"""Weights of a model from a file, checked."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fedl2p.atomic_files import check_regular


def load_tensors(path: Path, *, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises
    ------
    ValueError
        If the file is missing or damaged, or a tensor holds NaN or infinity.
    """
    try:
        check_regular(path.stat())
        tensors = load_file(path, device=str(device))
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}; give a safetensors file of weights") from None
    # A name for a dtype or a device that torch does not have raises what it likes.
    except (
        *(OSError, SafetensorError, AttributeError, KeyError, RuntimeError, TypeError),
        ValueError,
    ) as problem:
        raise ValueError(f"{path} is not a readable safetensors file ({problem})") from None
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(
                f"{path}: tensor {name!r} holds NaN or infinity; give weights that are finite"
            )
    return tensors
