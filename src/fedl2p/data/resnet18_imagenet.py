"""torchvision's ResNet-18 weights, trained on ImageNet: where models for photographs begin.

The file's name ends in the first eight digits of its SHA-256.
"""

from __future__ import annotations

from pathlib import Path

from fedl2p.data.files.downloads import Remote, fetch_all, verify
from fedl2p.data.files.folders import Tell

NAME = "resnet18-imagenet"
CHECKPOINT = Remote(
    url="https://download.pytorch.org/models/resnet18-f37072fd.pth",
    name="resnet18-f37072fd.pth",
    checksum="sha256:f37072fd",
)


def get(root: Path, tell: Tell) -> list[str]:
    """Download the checkpoint; nothing is left to do by hand."""
    return fetch_all([CHECKPOINT], root, tell)


def check(root: Path) -> list[str]:
    """Verify the checkpoint's checksum."""
    found = verify(CHECKPOINT, root)
    return [] if found is None else [found]
