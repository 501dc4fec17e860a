"""torchvision's ResNet-18 weights, trained on ImageNet: the initial model for photographs.

torchvision publishes the first eight digits of the SHA-256, in the file's name.
"""

from __future__ import annotations

from pathlib import Path

from fedl2p.data.files.downloads import RemoteFile, fetch, verify
from fedl2p.data.files.folders import ProgressCallback

NAME = "resnet18-imagenet"
CHECKPOINT = RemoteFile(
    url="https://download.pytorch.org/models/resnet18-f37072fd.pth",
    name="resnet18-f37072fd.pth",
    checksum="sha256:f37072fd47e89c5e827621c5baffa7500819f7896bbacec160b1a16c560e07ec",
)


def get(root: Path, progress: ProgressCallback) -> list[str]:
    """Download the checkpoint (47 MB) and check it."""
    fetch(CHECKPOINT, root, progress)
    return []


def check(root: Path) -> list[str]:
    """Verify the checkpoint's checksum."""
    problem = verify(CHECKPOINT, root)
    return [] if problem is None else [problem]
