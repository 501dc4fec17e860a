"""A federation of machines: server, node, run configuration.

A process that imports this package is one of a federation, started for it by Flower: its threads
wait asleep, since others share the machine.
"""

from fedl2p.thread_waiting import wait_asleep

wait_asleep()  # before a module of this package imports torch
