"""The paper's DomainNet: ImageNet's ResNet-18, 25 clients for each of six domains."""

from __future__ import annotations

from fedl2p.data import resnet18_imagenet
from fedl2p.data.domainnet import DomainNet
from fedl2p.data.files.folders import root_of
from fedl2p.federation.settings import Rounds
from fedl2p.methods.base.settings import LocalTraining
from fedl2p.recipes.paper import settings as paper
from fedl2p.recipes.registry import recipe
from fedl2p.study.settings import Study


@recipe
def domainnet(alpha: float = 0.1, *, as_published: bool = False, smoke: bool = False) -> Study:
    """Return the study. Its methods are those that start from a given model.

    Parameters
    ----------
    alpha
        Concentration of the Dirichlet distribution of clients' classes.
    as_published
        Whether FedL2P learns with the paper's settings; otherwise with ours.
    smoke
        Whether to shrink the study to seconds, to try it out: one client per domain.
    """
    published = Study(
        data=DomainNet(seen=25, alpha=alpha),
        model="fedl2p.models:resnet18_imagenet",
        pretrained=root_of(resnet18_imagenet.NAME) / resnet18_imagenet.CHECKPOINT.name,
        pretrained_by=f"fedl2p data get {resnet18_imagenet.NAME}",
        methods=("finetuning-global", "finetuning-client", "local", "fedl2p"),
        pretrain=Rounds(rounds=100, clients_per_round=15, keep="last"),
        learn=Rounds(rounds=100, clients_per_round=15, patience=50),
        settings=paper.settings(
            rate=1e-2, epochs=15, turns=100 * 15 / 150, local=LocalTraining(rate=1e-2)
        ),
    )
    study = published if as_published else paper.ours(published)
    return paper.miniature(study, DomainNet(alpha=alpha, seen=1)) if smoke else study
