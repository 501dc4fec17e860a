"""Clients on machines of their own, one SuperNode each: flwr run, see docs/deploy.md."""

from __future__ import annotations

import dataclasses

from fedl2p.data.remote import Remote
from fedl2p.recipes import npz
from fedl2p.study.settings import Study


def recipe() -> Study:
    """Return the npz study with FedL2P alone, for clients that a SuperLink reaches.

    What it is compared with, the global model before fine-tuning, every personalization says.
    """
    return dataclasses.replace(npz.recipe(), data=Remote(), methods=("fedl2p",))
