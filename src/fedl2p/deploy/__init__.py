"""A federation of machines: server, node, run configuration.

A process that imports this package is one of a federation, started for it by Flower: its threads
wait asleep, since others share the machine, and it keeps the memory that training frees.
"""

from fedl2p.process_environment import prepare_process

prepare_process()  # before a module of this package imports torch
