"""FedAvg, then FedL2P: every client gets a model of its own."""
