"""Any data set of images of the Hugging Face hub, or a folder of Parquet files in its form."""

from __future__ import annotations

import dataclasses

from fedl2p.data.huggingface import HuggingFace
from fedl2p.recipes import digits
from fedl2p.study.settings import Study


def recipe(
    dataset: str = "",
    image: str = "image",
    label: str = "label",
    partitioner: str = HuggingFace.partitioner,
) -> Study:
    """Return the digits study on another data set, all seen clients a round.

    Parameters
    ----------
    dataset
        Name on the hub, or path of a folder of Parquet files; it may be named later, by
        ``--data.dataset``.
    image, label
        Its columns.
    partitioner
        How it is dealt out to clients: a partitioner of flwr_datasets, as in Python, e.g.
        ``DirichletPartitioner(num_partitions=20, partition_by='label', alpha=0.5)``.
    """
    usual = digits.recipe()
    return dataclasses.replace(
        usual,
        data=HuggingFace(dataset=dataset, image=image, label=label, partitioner=partitioner),
        pretrain=dataclasses.replace(usual.pretrain, clients_per_round=0),
        learn=dataclasses.replace(usual.learn, clients_per_round=0),
    )
