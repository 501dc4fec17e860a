"""Differential privacy of federated rounds: settings, noise, accounting."""
