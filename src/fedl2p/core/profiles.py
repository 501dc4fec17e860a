"""A client's data profile: how far its feature statistics lie from the global model's."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedl2p.core.sites import Sites


@dataclass(frozen=True)
class Profile:
    """One client's data as the global model sees it.

    Parameters
    ----------
    divergence
        Shape (B,), nats: symmetrised KL between the client's and the global input distribution of
        each norm layer, mean over channels.
    moments
        Shape (L, 2): mean and standard deviation of each layer's whole input tensor.
    num_examples
        Number of examples profiled.
    sites
        The names that the entries belong to.
    """

    divergence: Tensor
    moments: Tensor
    num_examples: int
    sites: Sites
