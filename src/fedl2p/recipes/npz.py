"""Clients of your own, one .npz file each: fedl2p run npz --data.path DIR --out DIR."""

from __future__ import annotations

import dataclasses

from fedl2p.data.npz import NpzFolder
from fedl2p.recipes import digits
from fedl2p.study.settings import Study


def recipe() -> Study:
    """Return the digits study on a folder that is still to be named, all seen clients a round.

    The number of clients is not known before the folder is; who has many names fewer per round.
    """
    usual = digits.recipe()
    return dataclasses.replace(
        usual,
        data=NpzFolder(),
        pretrain=dataclasses.replace(usual.pretrain, clients_per_round=0),
        learn=dataclasses.replace(usual.learn, clients_per_round=0),
    )
