"""The paper's CIFAR-10: ResNet-18, 1,000 clients of 50 images, label skew --data.alpha."""

from __future__ import annotations

from fedl2p.data.cifar10 import Cifar10
from fedl2p.federation.settings import Rounds
from fedl2p.methods.base.settings import LocalTraining
from fedl2p.recipes.paper import settings as paper
from fedl2p.recipes.registry import recipe
from fedl2p.study.settings import Study


@recipe
def cifar10(alpha: float = 0.1, *, as_published: bool = False, smoke: bool = False) -> Study:
    """Return the study.

    Parameters
    ----------
    alpha
        Concentration of the Dirichlet distribution of clients' classes; published are 1000, 1.0,
        0.5 and 0.1.
    as_published
        Whether FedL2P learns with the paper's settings; otherwise with ours.
    smoke
        Whether to shrink the study to seconds, to try it out.
    """
    published = Study(
        data=Cifar10(seen=1000, alpha=alpha, train=40, validation=10, test=10),
        model="fedl2p.models:resnet18_cifar",
        methods=paper.METHODS,
        pretrain=Rounds(rounds=500, clients_per_round=10, keep="last"),
        learn=Rounds(rounds=500, clients_per_round=100, patience=50),
        settings=paper.settings(
            rate=1e-3,
            epochs=15,
            turns=500 * 100 / 1000,
            # The published code splits off validation data only to learn to personalize.
            local=LocalTraining(
                epochs=1,
                batch_size=32,
                rate=0.1,
                decay=0.1,
                decay_rounds=(250, 375),
                reads="train+validation",
            ),
            final="train+validation",
        ),
    )
    study = published if as_published else paper.ours(published)
    if not smoke:
        return study
    return paper.miniature(study, Cifar10(alpha=alpha, seen=4, train=16, validation=8, test=8))
