"""Any data set of images of the Hugging Face hub, or a folder of Parquet files in its form."""

from __future__ import annotations

import dataclasses

from fedl2p.data.huggingface import HuggingFace
from fedl2p.recipes.digits_sensors import digits_sensors
from fedl2p.recipes.registry import recipe
from fedl2p.study.settings import Study


@recipe
def huggingface(
    dataset: str = "",
    image: str = "image",
    label: str = "label",
    partitioner: str = HuggingFace.partitioner,
) -> Study:
    """Return the digits_sensors study on that data set, with all seen clients in every round.

    Parameters
    ----------
    dataset
        Name on the hub, or path of a folder of Parquet files; may be given later, by
        ``--data.dataset``.
    image, label
        Its columns.
    partitioner
        How it is split over clients: a partitioner of flwr_datasets, as in Python, e.g.
        ``DirichletPartitioner(num_partitions=20, partition_by='label', alpha=0.5)``.
    """
    usual = digits_sensors()
    return dataclasses.replace(
        usual,
        data=HuggingFace(dataset=dataset, image=image, label=label, partitioner=partitioner),
        pretrain=dataclasses.replace(usual.pretrain, clients_per_round=0),
        learn=dataclasses.replace(usual.learn, clients_per_round=0),
    )
