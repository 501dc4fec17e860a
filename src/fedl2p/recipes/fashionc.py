"""Fashion-MNIST as the paper has CIFAR-10-C: 25 clients for each of ten corruptions."""

from __future__ import annotations

import dataclasses

from fedl2p.data.fashion import CORRUPTIONS, FashionC
from fedl2p.recipes import _ours
from fedl2p.recipes.fashion import fashion, miniature
from fedl2p.recipes.registry import recipe
from fedl2p.study.settings import Study


@recipe
def fashionc(alpha: float = 0.1, *, as_published: bool = False, smoke: bool = False) -> Study:
    """Return the study.

    The global model is that of the recipe fashion under the same label skew.

    Parameters
    ----------
    alpha
        Concentration of the Dirichlet distribution of clients' classes.
    as_published
        Whether FedL2P learns with the paper's settings; otherwise with ours.
    smoke
        Whether to shrink the study to seconds, to try it out: two corruptions.
    """
    clean = fashion(alpha)
    study = dataclasses.replace(
        clean,
        data=FashionC(seen=25, alpha=alpha),
        learn=_ours.learning(rounds=30, clients_per_round=25),
        settings=dataclasses.replace(
            clean.settings,
            # published here: the last fine-tuning reads the training part alone
            finetune=dataclasses.replace(clean.settings.finetune, final="train"),
        ),
    )
    if as_published:
        study = _ours.published(study, validation_batches=2)
    small = FashionC(seen=2, alpha=alpha, corruptions=CORRUPTIONS[:2], clean=6)
    return miniature(study, small) if smoke else study
