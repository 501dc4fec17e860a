"""Office-Caltech-10 and DomainNet from FedBN's lists and archives of images."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from fedl2p.data import domainnet, office10
from fedl2p.data.domainnet import DomainNet
from fedl2p.data.files import fedbn_images
from fedl2p.data.files.fedbn_images import SIZE, FedBNImages
from fedl2p.data.office10 import Office10
from fedl2p.data.pools.domains import NORMALISE, split_domains
from support import data_archives
from support.rounds import one_round

OFFICE = {"amazon": (60, 12), "caltech": (70, 14), "dslr": (50, 6), "webcam": (55, 8)}
STYLES = {d: (24 + i, 12) for i, d in enumerate(domainnet.DOMAINS.domains)}


def write_office(root: Path, **changes: bytes) -> Path:
    lists, images = data_archives.fedbn_lists("office_caltech_10", OFFICE, office10.DOMAINS.classes)
    files = {f"office_caltech_10/{k}": v for k, v in lists.items()}
    for pictures in images.values():
        files |= {f"office_caltech_10/{k}": v for k, v in pictures.items()}
    files |= {f"office_caltech_10/{k}": v for k, v in changes.items()}
    return data_archives.write_zip(root / "office_caltech_10_dataset.zip", files)


@pytest.fixture(scope="module")
def office(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("office10")
    write_office(root)
    return root


@pytest.fixture(scope="module")
def styles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lists and five domains in archives, numpy columns, the sixth domain unpacked."""
    root = tmp_path_factory.mktemp("domainnet")
    lists, images = data_archives.fedbn_lists(
        "DomainNet", STYLES, domainnet.DOMAINS.classes, arrays=True
    )
    data_archives.write_zip(
        root / "domainnet_dataset.zip", {f"DomainNet/{k}": v for k, v in lists.items()}
    )
    for domain, pictures in images.items():
        if domain == "sketch":
            for name, content in pictures.items():
                path = root / "DomainNet" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        else:
            data_archives.write_zip(root / f"{domain}.zip", pictures)
    return root


def labels_seen(x: torch.Tensor) -> torch.Tensor:
    """The label that the colour of a picture tells."""
    mean, sd = (torch.tensor(v) for v in (NORMALISE.mean, NORMALISE.sd))
    pixels = ((x[:, :, 100, 100] * sd + mean) * 255).round().long()
    assert torch.equal(pixels[:, 1], 255 - pixels[:, 0])
    assert set(pixels[:, 2].tolist()) == {100}
    return pixels[:, 0] // 20


def test_office_is_one_client_per_domain_with_equal_training_parts(office: Path) -> None:
    population = Office10(root=office).open(0)
    assert population.seen == ("amazon", "caltech", "dslr", "webcam")
    assert population.unseen == ()
    assert (population.shape, population.classes) == ((3, *SIZE), 10)
    for name in population.names:
        client = population.open(name)
        assert client.validation is not None
        assert client.test is not None
        assert len(client.train.y) + len(client.validation.y) == 50
        assert 8 <= len(client.validation.y) <= 12
        assert len(client.test.y) == OFFICE[name][1]
        for part in (client.train, client.validation, client.test):
            assert torch.equal(labels_seen(part.x), part.y)


def test_the_cut_to_equal_size_is_random(office: Path) -> None:
    def held(seed: int) -> set[int]:
        holding = Office10(root=office).open(seed).indices["caltech"]
        return set(torch.cat([holding.train, holding.validation]).tolist())

    assert held(0) == held(0)
    assert held(0) != held(1)


def test_domains_can_be_held_out(office: Path) -> None:
    population = Office10(root=office, unseen=("dslr",)).open(0)
    assert population.seen == ("amazon", "caltech", "webcam")
    assert population.unseen == ("dslr",)
    with pytest.raises(ValueError, match="no domain 'ebay'; there are amazon"):
        Office10(unseen=("ebay",))
    with pytest.raises(ValueError, match="every domain"):
        Office10(unseen=tuple(OFFICE))


def test_domainnet_deals_each_domain_to_its_clients(styles: Path) -> None:
    population = DomainNet(root=styles, seen=3, unseen=1, alpha=0.5).open(0)
    assert len(population.seen) == 18
    assert len(population.unseen) == 6
    used: list[int] = []
    for name in population.names:
        domain, _, number = name.rpartition("-")
        assert population.about(name)["domain"] == domain
        assert (int(number) == 3) == (name in population.unseen)
        client = population.open(name)
        assert torch.equal(labels_seen(client.train.x), client.train.y)
        holding = population.indices[name]
        used += torch.cat([holding.train, holding.validation, holding.test]).tolist()
        sizes = [len(p) for p in (holding.train, holding.validation, holding.test)]
        assert sizes[2] == 3
        assert 20 <= sum(sizes[:2]) * 4 <= 24
        assert min(sizes) >= 1
    assert len(used) == len(set(used))


def test_the_published_populations() -> None:
    assert DomainNet().seen * len(domainnet.DOMAINS.domains) == 150
    assert len(office10.DOMAINS.domains) == 4


def test_one_round(office: Path, styles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        fedbn_images, "SIZE", (24, 24)
    )  # a cache of its own: the size is in its key
    one_round(Office10(root=office).open(0))
    one_round(DomainNet(root=styles, seen=2).open(0), clients=3)


def test_grey_and_palette_and_large_images_get_one_shape(tmp_path: Path) -> None:
    odd = {
        "amazon/bike/train_1.png": data_archives.picture(1, mode="L"),
        "amazon/calculator/train_2.png": data_archives.picture(2, mode="P", size=(400, 300)),
        "amazon/headphones/train_3.png": data_archives.picture(3, mode="RGBA", size=(256, 256)),
    }
    write_office(tmp_path, **odd)
    pool = office10.DOMAINS.load(tmp_path)
    assert pool.x.shape[1:] == (3, 256, 256)
    red, green, blue = pool.x[1, :, 5, 5].tolist()
    assert red == green == blue
    assert pool.x[3, :, 200, 200].tolist() == [60, 195, 100]


def test_the_unpacked_folder_gives_the_same(office: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(office / "office_caltech_10_dataset.zip") as archive:
        archive.extractall(tmp_path)
    a, b = (Office10(root=root).open(0).open("webcam").train.x for root in (office, tmp_path))
    assert torch.equal(a, b)
    assert office10.check(tmp_path) == []


def test_check_finds_nothing_wrong(office: Path, styles: Path) -> None:
    assert office10.check(office) == []
    assert domainnet.check(styles) == []


def test_check_names_missing_and_damaged_images(office: Path, tmp_path: Path) -> None:
    assert "office_caltech_10_dataset.zip is missing" in office10.check(tmp_path)[0]
    with zipfile.ZipFile(office / "office_caltech_10_dataset.zip") as archive:
        archive.extractall(tmp_path)
    folder = tmp_path / "office_caltech_10"
    (folder / "amazon" / "mug" / "train_8.png").unlink()
    broken = folder / "dslr" / "mug" / "train_8.png"
    broken.write_bytes(broken.read_bytes()[:40])
    lines = office10.check(tmp_path)
    assert len(lines) == 2
    assert "1 of 60 images that amazon_train.pkl lists are missing" in lines[0]
    assert "amazon/mug/train_8.png" in lines[0]
    assert "dslr/mug/train_8.png is no readable image" in lines[1]
    with pytest.raises(ValueError, match=r"train_8.png, which .*_train.pkl names, is missing"):
        Office10(root=tmp_path).open(0)


class Evil:
    def __reduce__(self) -> object:
        return print, ("executed",)


PATHS = [f"office_caltech_10/dslr/x/{i}.png" for i in range(10)]
NAMES = list(office10.DOMAINS.classes)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (pickle.dumps((PATHS, [*NAMES[:-1], "mug"])), "lists no image of class projector"),
        (pickle.dumps((PATHS, [*NAMES[:-1], "car"])), "lists .* as 'car'; wanted"),
        (pickle.dumps((PATHS, NAMES[:-1])), "not a pair of paths and equally many"),
        (pickle.dumps((PATHS, list(range(10)))), "as 0; wanted a path and one of back_pack"),
        (pickle.dumps("nothing"), "not a pair"),
        (pickle.dumps(([], [])), "not a pair"),
        (pickle.dumps((PATHS, [Evil()])), r"holds builtins.print, not only plain data"),
        (pickle.dumps((["../../secret.png", *PATHS[1:]], NAMES)), "leads out of the data folder"),
        (b"\x80\x04]", "is damaged"),
    ],
)
def test_a_bad_list_is_named_and_leaves_nothing(
    tmp_path: Path, content: bytes, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_office(tmp_path, **{"dslr_train.pkl": content})
    with pytest.raises(ValueError, match=said) as refused:
        Office10(root=tmp_path).open(0)
    assert "dslr_train.pkl" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert list(tmp_path.glob("cache/**/*")) == []
    assert capsys.readouterr().out == ""


def test_a_bad_image_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    write_office(tmp_path, **{"dslr/mug/train_8.png": b"no picture"})
    with pytest.raises(ValueError, match=r"dslr/mug/train_8.png is no readable image"):
        Office10(root=tmp_path).open(0)
    assert list(tmp_path.glob("cache/**/*")) == []


def test_too_few_images_to_split(tmp_path: Path) -> None:
    tiny = FedBNImages(
        name="tiny",
        inner="Tiny",
        lists="tiny.zip",
        images=(),
        domains=("one",),
        classes=("a",),
    )
    lists, images = data_archives.fedbn_lists("Tiny", {"one": (1, 1)}, ("a",))
    files = {f"Tiny/{k}": v for k, v in {**lists, **images["one"]}.items()}
    data_archives.write_zip(tmp_path / "tiny.zip", files)
    pool = tiny.load(tmp_path)
    assert np.asarray(pool.x).shape == (2, 3, 256, 256)
    with pytest.raises(ValueError, match="one has 1 training and 1 test images, too few"):
        split_domains(pool, tiny.domains, seed=0, name="tiny")


def test_too_many_clients(styles: Path) -> None:
    with pytest.raises(ValueError, match=r"clipart has \d+ validation examples for 13 clients"):
        DomainNet(root=styles, seen=13).open(0)
