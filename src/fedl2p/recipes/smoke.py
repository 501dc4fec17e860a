"""The digits_sensors recipe in miniature: every stage and method, in seconds."""

from __future__ import annotations

import dataclasses

from fedl2p.core.settings import InnerLoop
from fedl2p.data.digits import Digits
from fedl2p.methods.base.settings import Grid
from fedl2p.recipes.digits_sensors import digits_sensors
from fedl2p.recipes.registry import recipe
from fedl2p.study.settings import Study


@recipe
def smoke() -> Study:
    """Return the digits_sensors study with few clients, few rounds and little data."""
    full = digits_sensors()
    return dataclasses.replace(
        full,
        data=Digits(seen=6, unseen=4, train=48, validation=24, test=32),
        pretrain=dataclasses.replace(full.pretrain, rounds=20, clients_per_round=4),
        learn=dataclasses.replace(full.learn, rounds=3, clients_per_round=4),
        settings=dataclasses.replace(
            full.settings,
            finetune=InnerLoop(epochs=3, batch_size=16, early_stopping=True),
            local_epochs=5,
            alone_steps=3,
            grid=Grid(mixes=(0.0, 1.0), rates=(0.01, 0.1)),
        ),
    )
