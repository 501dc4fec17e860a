"""Private working copies of a model, made once and kept while the model is unchanged."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from torch import nn

from fedl2p.core.functional.inspection import structure
from fedl2p.core.functional.model import FunctionalModel
from fedl2p.core.profiles import Profiler
from fedl2p.core.sites import find_sites


@dataclass(frozen=True)
class WorkingCopies:
    """Private working copies of one model.

    Parameters
    ----------
    net
        The model as a function of named tensors.
    profiler
        Profiles clients against the model.
    version
        Place, version counter and ``requires_grad`` of the model's tensors when the copies were
        made, and how the model was built.
    """

    net: FunctionalModel
    profiler: Profiler
    version: Hashable


_cache: WeakKeyDictionary[nn.Module, WorkingCopies] = WeakKeyDictionary()


def working_copies(model: nn.Module) -> WorkingCopies:
    """Return the cached working copies of ``model``; they are made anew when the model changes.

    A change of a tensor is seen by torch's version counter, by its place in memory and by its
    ``requires_grad``; one of the modules by their modes, hooks and plain attributes. Writing in
    place through ``tensor.data`` leaves no trace in these and is not
    seen: write under ``torch.no_grad()`` instead, or into a new model.
    """
    # as model.parameters() and model.buffers() give them, but faster
    tensors = [
        tensor
        for module in model.modules()
        for tensor in (*module._parameters.values(), *module._buffers.values())
        if tensor is not None
    ]
    try:
        places = tuple((t.data_ptr(), t._version, t.requires_grad) for t in tensors)
    except ValueError:  # torch's, of a lazy tensor
        find_sites(model)  # which names the layer
        raise
    version = places, structure(model)
    known = _cache.get(model)
    if known is None or known.version != version:
        known = WorkingCopies(FunctionalModel(model), Profiler(model), version)
        _cache[model] = known
    return known
