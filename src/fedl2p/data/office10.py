"""Office-Caltech-10: photographs of ten objects from four domains; every domain is one client.

B. Gong et al., "Geodesic Flow Kernel for Unsupervised Domain Adaptation", CVPR 2012, in FedBN's
preparation and lists (:mod:`fedl2p.data.files.fedbn_images`). As FedL2P's authors use it (NeurIPS
2023, section 4): amazon, caltech, dslr and webcam, with equally many training images.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedl2p.data.files.downloads import RemoteFile, fetch
from fedl2p.data.files.fedbn_images import FedBNImages
from fedl2p.data.files.folders import ProgressCallback, root_of
from fedl2p.data.pools.client_indices import ClientIndices
from fedl2p.data.pools.domains import make_population, split_domains
from fedl2p.data.pools.shared_pool import SharedPool

ARCHIVE = RemoteFile(
    url="https://huggingface.co/datasets/Jemary/FedBN_Dataset/resolve/main/"
    "office_caltech_10_dataset.zip",
    name="office_caltech_10_dataset.zip",
)
DOMAINS = FedBNImages(
    name="office10",
    inner="office_caltech_10",
    lists=ARCHIVE.name,
    images=(),
    domains=("amazon", "caltech", "dslr", "webcam"),
    classes=(
        *("back_pack", "bike", "calculator", "headphones", "keyboard"),
        *("laptop_computer", "monitor", "mouse", "mug", "projector"),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Office10:
    """Office-Caltech-10, one client per domain.

    Parameters
    ----------
    root
        Folder with the archive, or with the folder that it unpacks to; None for
        $FEDL2P_DATA/office10 or data/office10.
    unseen
        Domains that only come afterwards; the others take part in training.
    """

    root: Path | None = None
    unseen: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for domain in self.unseen:
            if domain not in DOMAINS.domains:
                raise ValueError(
                    f"there is no domain {domain!r}; there are {', '.join(DOMAINS.domains)}"
                )
        if set(self.unseen) == set(DOMAINS.domains):
            raise ValueError("unseen names every domain; leave at least one to learn from")

    def open(self, seed: int) -> SharedPool:
        """Return the population under a seed.

        The first call decodes the images into one file, which every later one maps.

        Raises
        ------
        ValueError
            If the data is missing or damaged.
        """
        pool = DOMAINS.load(root_of(DOMAINS.name, self.root))
        parts = split_domains(pool, DOMAINS.domains, seed=seed, name=DOMAINS.name)
        indices = {
            domain: ClientIndices(train=train, validation=validation, test=test)
            for domain, (train, validation, test) in parts.items()
        }
        return make_population(
            pool,
            len(DOMAINS.classes),
            seen={name: indices[name] for name in DOMAINS.domains if name not in self.unseen},
            unseen={name: indices[name] for name in DOMAINS.domains if name in self.unseen},
        )


def get(root: Path, progress: ProgressCallback) -> list[str]:
    """Download FedBN's archive, which has lists and images."""
    if not (root / DOMAINS.inner).is_dir():
        fetch(ARCHIVE, root, progress)
    return check(root)


def check(root: Path) -> list[str]:
    """Look up and decode every listed image; no checksum of the archive is published."""
    return DOMAINS.check(root)
