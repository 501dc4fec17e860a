"""Federation: Flower carries the messages, this room says what is in them and drives the rounds.

The only room, with ``app``, that imports Flower. ``federate`` runs the rounds of a method,
``personalize_all`` personalizes clients; both ask ``Nodes``, which stand for clients in this
process (``InProcessGrid``), in Ray's workers (``RayGrid``) or anywhere else that Flower reaches. On
the client's side ``Handler`` answers, the same on every engine. Nothing here knows a particular
method.
"""

from __future__ import annotations

import os

# Flower reports its use to its makers unless told not to before its first import.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

from fedl2p.federation.clients.in_process import InProcessGrid
from fedl2p.federation.clients.node import Handler, Keeper
from fedl2p.federation.clients.ray import RayGrid
from fedl2p.federation.clients.ray_settings import Ray
from fedl2p.federation.flower.client_directory import Nodes, in_process, model_bytes
from fedl2p.federation.listeners import (
    CsvListener,
    FailuresListener,
    Listener,
    ProgressListener,
    TensorBoardListener,
)
from fedl2p.federation.personalizing import personalize_all
from fedl2p.federation.privacy import accounting
from fedl2p.federation.privacy.settings import Privacy
from fedl2p.federation.round_records import Federated, RoundRecord
from fedl2p.federation.rounds import FederationError, draw_cohort, federate
from fedl2p.federation.settings import Rounds

__all__ = [
    "CsvListener",
    "FailuresListener",
    "Federated",
    "FederationError",
    "Handler",
    "InProcessGrid",
    "Keeper",
    "Listener",
    "Nodes",
    "Privacy",
    "ProgressListener",
    "Ray",
    "RayGrid",
    "RoundRecord",
    "Rounds",
    "TensorBoardListener",
    "accounting",
    "draw_cohort",
    "federate",
    "in_process",
    "model_bytes",
    "personalize_all",
]
