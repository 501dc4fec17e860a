"""The command ``fedl2p explain``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedl2p import user_code


@dataclass(frozen=True, kw_only=True)
class Explain:
    """Attribute a client's hyperparameters to the entries of its data profile.

    The baseline is a typical client: the median profile of the run's seen clients. Writes
    NAME.html, a picture, and NAME.json, the share of every entry in every hyperparameter.

    Parameters
    ----------
    run
        Folder of a finished run that learned the meta-nets (method fedl2p).
    client
        Name of one of the run's clients, as in its clients.csv.
    data
        Instead of a client of the run: a new client's .npz file, arrays x_train and y_train.
    out
        Folder to write into; by default the folder explain of the run, or explain/new for a new
        client.
    device
        Where to compute profiles that the run did not record: auto is cuda if there is a GPU, else
        cpu.
    model
        The run's model as package.module:callable; needed only for code outside this package.
    """

    run: Path
    client: str | None = None
    data: Path | None = None
    out: Path | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    model: str | None = None

    def __call__(self) -> int:
        """Explain the client, print a summary, and return the exit status."""
        from fedl2p.study.explain_client import explain_client

        user_code.import_user_module(self.model or "", what="model")
        print(explain_client(**vars(self)))
        return 0
