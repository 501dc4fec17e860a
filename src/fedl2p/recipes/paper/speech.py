"""The paper's Speech Commands: ResNet-18 on log-mels, 250 seen and 50 unseen speakers."""

from __future__ import annotations

from fedl2p.data.audio.filter_banks import FilterBank
from fedl2p.data.speech import Speech
from fedl2p.federation.settings import Rounds
from fedl2p.methods.base.settings import LocalTraining
from fedl2p.recipes.paper import settings as paper
from fedl2p.recipes.registry import recipe
from fedl2p.study.settings import Study


@recipe
def speech(unseen: int = 50, *, as_published: bool = False, smoke: bool = False) -> Study:
    """Return the study.

    Parameters
    ----------
    unseen
        Speakers that take no part in training; published are 50.
    as_published
        Whether FedL2P learns with the paper's settings; otherwise with ours.
    smoke
        Whether to shrink the study to seconds, to try it out.
    """
    published = Study(
        data=Speech(
            seen=250,
            unseen=unseen,
            silence=0.1,
            balanced=True,
            shift_ms=100.0,
            noise_probability=0.8,
            noise_volume=0.1,
            features=FilterBank(bins=128, shift_ms=10.0, frames=128),
        ),
        model="fedl2p.models:resnet18_speech",
        methods=paper.METHODS,
        pretrain=Rounds(rounds=500, clients_per_round=25, keep="last"),
        learn=Rounds(rounds=100, clients_per_round=25, patience=50),
        settings=paper.settings(
            rate=1e-2,
            epochs=5,
            turns=100 * 25 / 250,
            local=LocalTraining(epochs=1, batch_size=32, rate=0.1, end_rate=0.01, end_round=500),
        ),
    )
    study = published if as_published else paper.ours(published)
    return paper.miniature(study, Speech(seen=3, unseen=min(unseen, 2))) if smoke else study
