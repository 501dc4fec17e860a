"""All data sets of the paper in miniature, in the formats and folders in which users have them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from fedl2p.data import domainnet, office10, resnet18_imagenet
from fedl2p.data.cifar10c import CORRUPTIONS
from fedl2p.data.files.fedbn_images import FedBNImages
from fedl2p.models.resnet import ResNet18
from support import data_archives, speech_tree


def write_all(folder: Path) -> Path:
    """Write every data set where FEDL2P_DATA = ``folder`` makes the recipes look."""
    data_archives.write_cifar10(folder / "cifar10")
    corrupted = data_archives.cifar10c_files(CORRUPTIONS[:2])
    data_archives.write_folder(folder / "cifar10c", corrupted)
    for domains in (office10.DOMAINS, domainnet.DOMAINS):
        for name, files in photographs(domains):
            data_archives.write_zip(folder / domains.name / name, files)
    checkpoint = folder / resnet18_imagenet.NAME / resnet18_imagenet.CHECKPOINT.name
    checkpoint.parent.mkdir()
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        torch.save(ResNet18(3, 1000, stem="imagenet").state_dict(), checkpoint)
    speech_tree.write_tree(
        folder / "speech" / "clips",
        training={f"aaaa000{i}": 2 for i in range(3)},
        validation={"bbbb0000": 2},
        testing={"cccc0000": 2},
    )
    return folder


def photographs(domains: FedBNImages) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield name and files of each archive with FedBN's lists and the images of all domains."""
    counts = {domain: (20 + i, 10) for i, domain in enumerate(domains.domains)}
    lists, images = data_archives.fedbn_lists(domains.inner, counts, domains.classes)
    files = {f"{domains.inner}/{name}": content for name, content in lists.items()}
    for domain, pictures in images.items():
        if domains.images:
            yield f"{domain}.zip", pictures
        else:
            files |= {f"{domains.inner}/{name}": content for name, content in pictures.items()}
    yield domains.lists, files
