"""Federation: the rounds of a method, and the clients that answer, in this process or elsewhere.

``rounds.federate`` runs the rounds of a method and ``personalizing.personalize_all`` personalizes
clients. Nothing here knows a particular method.
"""

import os

# Flower reports its use to its makers unless told not to before its first import.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
