"""Speakers as clients, made by `fedl2p data make spoken`: 45 seen and 15 unseen, 12 words."""

from __future__ import annotations

from fedl2p.core.settings import InnerLoop, MetaNetsConfig
from fedl2p.data.audio.filter_banks import FilterBank
from fedl2p.data.speech import Speech
from fedl2p.federation.settings import Rounds
from fedl2p.methods.base.settings import LocalTraining, MetaLearning, Settings
from fedl2p.recipes.registry import recipe
from fedl2p.study.settings import Study


@recipe
def spoken() -> Study:
    """Return the offline counterpart of the paper's study of unseen speakers."""
    return Study(
        data=Speech(
            dataset="spoken",
            seen=45,
            unseen=15,
            features=FilterBank(bins=40, shift_ms=20.0, frames=50),
        ),
        model="fedl2p.models:small_mel",
        pretrain=Rounds(rounds=150, clients_per_round=15, keep="last"),
        learn=Rounds(
            rounds=30,
            clients_per_round=15,
            strategy="fedadam",
            server_rate=0.0075,
            server_schedule="cosine",
            server_tau=1e-8,
            keep="last",
        ),
        settings=Settings(
            finetune=InnerLoop(epochs=5, early_stopping=True),
            meta=MetaLearning(nets=MetaNetsConfig(base_rate=0.1)),
            local=LocalTraining(rate=0.3),
            alone_steps=10,  # a client takes part in 30 x 15 / 45 rounds
        ),
    )
