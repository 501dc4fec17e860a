"""Derivatives of the validation loss with respect to a client's hyperparameters."""
