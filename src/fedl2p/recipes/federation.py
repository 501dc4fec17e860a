"""Clients on machines of their own, one SuperNode each: flwr run, see docs/deploy.md."""

from __future__ import annotations

import dataclasses

from fedl2p.data.remote import Remote
from fedl2p.recipes.npz import npz
from fedl2p.recipes.registry import recipe
from fedl2p.study.settings import Study


@recipe
def federation() -> Study:
    """Return the npz study with FedL2P alone.

    Its baseline is the global model before fine-tuning, whose accuracy every client reports too.
    """
    return dataclasses.replace(npz(), data=Remote(), methods=("fedl2p",))
