"""Clients of your own, one .npz file each: fedl2p run npz --data.path DIR --out DIR."""

from __future__ import annotations

import dataclasses

from fedl2p.data.npz import NpzFolder
from fedl2p.recipes.digits_sensors import digits_sensors
from fedl2p.recipes.registry import recipe
from fedl2p.study.settings import Study


@recipe
def npz() -> Study:
    """Return the digits_sensors study on a folder of files, with all seen clients in every round.

    Their number is not known beforehand; set ``clients_per_round`` where they are many.
    """
    usual = digits_sensors()
    return dataclasses.replace(
        usual,
        data=NpzFolder(),
        pretrain=dataclasses.replace(usual.pretrain, clients_per_round=0),
        learn=dataclasses.replace(usual.learn, clients_per_round=0),
    )
