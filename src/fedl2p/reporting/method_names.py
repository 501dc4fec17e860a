"""What people call the methods, one line on each, and their role in a comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class MethodName:
    """How a report speaks of a method.

    Parameters
    ----------
    label
        Its name in tables.
    line
        What it does with a client, in one line.
    role
        ``learned``: meta-nets choose the strategy; ``fixed``: one strategy for every client;
        ``search``: a search per client; ``other``: anything else.
    """

    label: str
    line: str
    role: Literal["learned", "fixed", "search", "other"]


_NAMES = {
    "fedl2p": MethodName(
        "FedL2P",
        "meta-nets, learned by federation, give every client its own mix and rates",
        "learned",
    ),
    "fedl2p-constant": MethodName(
        "FedL2P, without profiles",
        "one mix per norm layer and one rate per tensor for all, learned by federation (ablation)",
        "fixed",
    ),
    "l2p": MethodName(
        "L2P, without federation",
        "the same meta-nets, but every client learns its own alone",
        "learned",
    ),
    "fedavg": MethodName("FedAvg", "one global model for all, no fine-tuning", "fixed"),
    "finetuning-global": MethodName(
        "Fine-tuning, global statistics",
        "batch-norm keeps the global model's statistics; one rate for all",
        "fixed",
    ),
    "finetuning-client": MethodName(
        "Fine-tuning, client statistics",
        "batch-norm takes the client's own statistics; one rate for all",
        "fixed",
    ),
    "finetuning-half": MethodName(
        "Fine-tuning, half and half",
        "batch-norm takes the mean of global and client statistics; one rate for all",
        "fixed",
    ),
    "finetuning-head": MethodName(
        "Fine-tuning, head only",
        "the last layer trains, everything else stays the global model's; one rate for all",
        "fixed",
    ),
    "finetuning-norms": MethodName(
        "Fine-tuning, norms only",
        "batch-norm trains and takes the client's statistics, all else stays; one rate for all",
        "fixed",
    ),
    "bestfixed": MethodName(
        "One mix and rate for all",
        "the pair of a grid that is best for the seen clients together, on validation data",
        "fixed",
    ),
    "gridsearch": MethodName(
        "Grid search per client",
        "every client tries every mix and rate of a grid on its validation part",
        "search",
    ),
    "local": MethodName("Local training", "every client trains alone from scratch", "other"),
    "fedprox": MethodName(
        "FedProx", "one global model, trained by clients held near it; no fine-tuning", "other"
    ),
    "fedprox-finetuning": MethodName(
        "FedProx, then fine-tuning", "FedProx's model, fine-tuned by every client", "other"
    ),
    "fedbn": MethodName(
        "FedBN", "batch-norm stays on the client, the rest is averaged; no fine-tuning", "other"
    ),
    "fedbn-finetuning": MethodName(
        "FedBN, then fine-tuning", "FedBN's model with the client's norms, fine-tuned", "other"
    ),
    "fedbabu": MethodName(
        "FedBABU", "the federation trains the body under a fixed head; all fine-tunes", "other"
    ),
    "fedper": MethodName(
        "FedPer", "the body is averaged, every client keeps a head; both fine-tune", "other"
    ),
    "fedrep": MethodName(
        "FedRep", "body and own head train in turns; the head fine-tunes over the body", "other"
    ),
    "perfedavg": MethodName(
        "Per-FedAvg (FO)", "a global model trained to be fine-tuned, first-order", "other"
    ),
    "perfedavg-hf": MethodName(
        "Per-FedAvg (HF)", "a global model trained to be fine-tuned, Hessian-free", "other"
    ),
    "ditto": MethodName(
        "Ditto", "every client trains a model of its own, pulled to the global one", "other"
    ),
    "apfl": MethodName(
        "APFL", "every client mixes a model of its own with the global one", "other"
    ),
}


def method_name(method: str) -> MethodName:
    """Return how to speak of a method; one that is not known here goes by its own name."""
    return _NAMES.get(method, MethodName(method, "", "other"))
