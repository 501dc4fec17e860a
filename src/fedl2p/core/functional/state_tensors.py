"""The tensors of a model's ``state_dict``: what travels, is hashed and is written to files.

A module may keep other things there (``get_extra_state``). They stay in the model.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


def state_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a model's ``state_dict``, by name."""
    return {name: v for name, v in model.state_dict().items() if isinstance(v, Tensor)}


def load_state_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load what :func:`state_tensors` returned.

    Raises
    ------
    RuntimeError
        If a tensor is missing, unexpected or of another shape.
    """
    others = {name: v for name, v in model.state_dict().items() if not isinstance(v, Tensor)}
    model.load_state_dict({**others, **tensors})


def on_cpu(tensor: Tensor) -> Tensor:
    """Return a tensor's values on the CPU, outside of any graph; itself where it is that already.

    Asked first, since every answer of a round has all tensors of the model.
    """
    here = tensor.device.type == "cpu" and not tensor.requires_grad
    return tensor if here else tensor.detach().cpu()
