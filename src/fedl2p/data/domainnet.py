"""DomainNet: ten classes in six domains, from photograph to sketch; every client has one domain.

X. Peng et al., "Moment Matching for Multi-Source Domain Adaptation", ICCV 2019,
https://ai.bu.edu/M3SDA, with FedBN's choice of classes and lists
(:mod:`fedl2p.data.files.fedbn_images`). As FedL2P's authors use it (NeurIPS 2023, section 4): all
domains have equally many training images, each is dealt out to 25 clients with label skew.

Of clipart and painting FedBN uses the cleaned archives, in the server's folder ``groundtruth``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from fedl2p.data.files.downloads import RemoteFile, fetch_all
from fedl2p.data.files.fedbn_images import FedBNImages
from fedl2p.data.files.folders import ProgressCallback, root_of
from fedl2p.data.pools.client_indices import check_counts, deal_groups
from fedl2p.data.pools.domains import make_population, split_domains
from fedl2p.data.pools.shared_pool import SharedPool

LISTS = RemoteFile(
    url="https://huggingface.co/datasets/Jemary/FedBN_Dataset/resolve/main/domainnet_dataset.zip",
    name="domainnet_dataset.zip",
)
_SERVER = "http://csr.bu.edu/ftp/visda/2019/multi-source"
_CLEANED = ("clipart", "painting")
_NAMES = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")
IMAGES = tuple(
    RemoteFile(
        url=f"{_SERVER}/{'groundtruth/' if domain in _CLEANED else ''}{domain}.zip",
        name=f"{domain}.zip",
    )
    for domain in _NAMES
)
DOMAINS = FedBNImages(
    name="domainnet",
    inner="DomainNet",
    lists=LISTS.name,
    images=tuple(archive.name for archive in IMAGES),
    domains=_NAMES,
    classes=(
        *("bird", "feather", "headphones", "ice_cream", "teapot"),
        *("tiger", "whale", "windmill", "wine_glass", "zebra"),
    ),
)


@dataclass(frozen=True, kw_only=True)
class DomainNet:
    """DomainNet with label skew, one domain per client.

    Parameters
    ----------
    root
        Folder with the archives, or with the folders that they unpack to; None for
        $FEDL2P_DATA/domainnet or data/domainnet.
    seen
        Clients per domain that take part in training.
    unseen
        Clients per domain that only come afterwards.
    alpha
        Concentration of the Dirichlet distribution that each client's class distribution is drawn
        from: 0.1 is strong label skew, 1000 is none.
    """

    root: Path | None = None
    seen: int = 25
    unseen: int = 0
    alpha: float = 1.0

    def __post_init__(self) -> None:
        check_counts(self, at_least_one=("seen",), or_none="unseen")

    def open(self, seed: int) -> SharedPool:
        """Return the population under a seed.

        The first call decodes the listed images into one file, which every later one maps.

        Raises
        ------
        ValueError
            If the data is missing or damaged, or too little for so many clients.
        """
        pool = DOMAINS.load(root_of(DOMAINS.name, self.root))
        seen, unseen = deal_groups(
            split_domains(pool, DOMAINS.domains, seed=seed, name=DOMAINS.name),
            torch.from_numpy(pool.column("label")),
            seen=self.seen,
            unseen=self.unseen,
            classes=len(DOMAINS.classes),
            alpha=self.alpha,
            seed=(seed, DOMAINS.name),
            kind="domain",
        )
        return make_population(pool, len(DOMAINS.classes), seen, unseen)


def get(root: Path, progress: ProgressCallback) -> list[str]:
    """Download the lists and the six archives of images, one after another."""
    files = [] if (root / DOMAINS.inner).is_dir() else [LISTS]
    for domain, archive in zip(DOMAINS.domains, IMAGES, strict=True):
        unpacked = (root / domain, root / DOMAINS.inner / domain)
        if not any(folder.is_dir() for folder in unpacked):
            files.append(archive)
    return fetch_all(files, root, progress) or check(root)


def check(root: Path) -> list[str]:
    """Look up and decode every listed image; no checksums of the archives are published."""
    return DOMAINS.check(root)
