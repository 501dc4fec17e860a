"""The paper's Office-Caltech-10: ImageNet's ResNet-18, four domains, each of them a client."""

from __future__ import annotations

from fedl2p.data import resnet18_imagenet
from fedl2p.data.files.folders import root_of
from fedl2p.data.office10 import Office10
from fedl2p.federation.settings import Rounds
from fedl2p.methods.base.settings import LocalTraining
from fedl2p.recipes.paper import settings as paper
from fedl2p.recipes.registry import recipe
from fedl2p.study.settings import Study


@recipe
def office10(*, as_published: bool = False, smoke: bool = False) -> Study:
    """Return the study. Its methods are those that start from a given model.

    Parameters
    ----------
    as_published
        Whether FedL2P learns with the paper's settings; otherwise with ours.
    smoke
        Whether to shrink the study to seconds, to try it out.
    """
    published = Study(
        data=Office10(),
        model="fedl2p.models:resnet18_imagenet",
        pretrained=root_of(resnet18_imagenet.NAME) / resnet18_imagenet.CHECKPOINT.name,
        pretrained_by=f"fedl2p data get {resnet18_imagenet.NAME}",
        methods=("finetuning-global", "finetuning-client", "local", "fedl2p"),
        pretrain=Rounds(rounds=100, clients_per_round=4, keep="last"),
        learn=Rounds(rounds=100, clients_per_round=4, patience=100),
        settings=paper.settings(rate=1e-2, epochs=15, turns=100, local=LocalTraining(rate=1e-2)),
    )
    study = published if as_published else paper.ours(published)
    return paper.miniature(study, Office10()) if smoke else study
