"""The command ``fedl2p personalize``."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedl2p import user_code


@dataclass(frozen=True, kw_only=True)
class Personalize:
    """Personalize the global model of a run for one new client.

    Writes model.safetensors (the state_dict of the personalized plain model), hyperparams.json (its
    mix per norm layer and rate per parameter tensor, and the profile that led to them) and, if the
    client has test examples, outcome.json (accuracy before and after).

    Parameters
    ----------
    run
        Folder of a finished run that learned the meta-nets (method fedl2p).
    data
        The client's .npz file: arrays x_train, y_train and, if it has them, x_test, y_test.
    out
        Folder to write into; made if there is none.
    seed
        Seed of the order of its batches.
    device
        Where to compute: auto is cuda if there is a GPU, else cpu.
    model
        The run's model as package.module:callable; needed only for code outside this package, which
        a run folder from elsewhere must not choose.
    code
        The run's loss, metric and outputs as package.module:callable; needed for the same reason.
    """

    run: Path
    data: Path
    out: Path
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    model: str | None = None
    code: tuple[str, ...] = ()

    def __call__(self) -> int:
        """Personalize, print the outcome, and return the exit status."""
        from fedl2p.study.new_client import personalize_new_client

        user_code.import_user_module(self.model or "", what="model")
        for name in self.code:
            user_code.import_user_module(name, what="code")
        with warnings.catch_warnings(record=True) as caught:
            try:
                result = personalize_new_client(**vars(self))
            finally:
                for warning in caught:  # without the place in the code that it comes from
                    sys.stderr.write(f"fedl2p: warning: {warning.message}\n")
        print(result)
        return 0
