"""The server's side of a round: checking and aggregating answers."""
