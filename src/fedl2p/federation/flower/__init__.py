"""Clients by way of Flower: the only room, with ``app``, that imports it."""

import os

# Flower reports its use to its makers unless told not to before its first import.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
