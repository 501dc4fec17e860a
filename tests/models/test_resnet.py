"""ResNet-18: torchvision's names and numbers, by a second derivation; its checkpoint loads."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedl2p import find_sites, models, recipes
from fedl2p.models.resnet import ResNet18, Stem, load_checkpoint
from fedl2p.study import preparation

NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def torchvision_names() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of torchvision's resnet18, in its order."""

    def norm(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        for part in NORM:
            yield f"{name}.{part}", () if part == "num_batches_tracked" else (width,)

    yield "conv1.weight", (64, 3, 7, 7)
    yield from norm("bn1", 64)
    before = 64
    for stage, width in enumerate((64, 128, 256, 512), 1):
        for block in (0, 1):
            at = f"layer{stage}.{block}"
            yield f"{at}.conv1.weight", (width, before, 3, 3)
            yield from norm(f"{at}.bn1", width)
            yield f"{at}.conv2.weight", (width, width, 3, 3)
            yield from norm(f"{at}.bn2", width)
            if before != width:
                yield f"{at}.downsample.0.weight", (width, before, 1, 1)
                yield from norm(f"{at}.downsample.1", width)
            before = width
    yield "fc.weight", (1000, 512)
    yield "fc.bias", (1000,)


def checkpoint(seed: int = 0) -> dict[str, Tensor]:
    """Weights in the form of torchvision's checkpoint, of sizes that keep activations near 1."""
    rng = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in torchvision_names():
        if name.endswith("num_batches_tracked"):
            continue  # resnet18-f37072fd.pth is from before they existed
        if name.endswith(("running_var", "bn1.weight", "bn2.weight", "downsample.1.weight")):
            weights[name] = 0.5 + torch.rand(shape, generator=rng)
        else:
            fan = float(torch.tensor(shape[1:]).prod()) if len(shape) > 1 else 25.0
            weights[name] = torch.randn(shape, generator=rng) / fan**0.5
    return weights


def reference(w: dict[str, Tensor], x: Tensor, stem: Stem = "imagenet") -> Tensor:
    """ResNet-18 in evaluation mode, from the paper's table 1 and torch's functions alone."""

    def norm(x: Tensor, name: str) -> Tensor:
        shape = (1, -1, 1, 1)
        mean, var = w[f"{name}.running_mean"].view(shape), w[f"{name}.running_var"].view(shape)
        scale, shift = w[f"{name}.weight"].view(shape), w[f"{name}.bias"].view(shape)
        return (x - mean) / torch.sqrt(var + 1e-5) * scale + shift

    kernel = w["conv1.weight"]
    stride, padding = (1, 1) if stem == "cifar" else (2, 3)
    x = norm(F.conv2d(x, kernel, stride=stride, padding=padding), "bn1").clamp(min=0)
    if stem == "imagenet":
        x = F.max_pool2d(x, 3, 2, 1)
    for stage in (1, 2, 3, 4):
        for block in (0, 1):
            at, step = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            h = norm(F.conv2d(x, w[f"{at}.conv1.weight"], stride=step, padding=1), f"{at}.bn1")
            h = norm(F.conv2d(h.clamp(min=0), w[f"{at}.conv2.weight"], padding=1), f"{at}.bn2")
            if f"{at}.downsample.0.weight" in w:
                x = F.conv2d(x, w[f"{at}.downsample.0.weight"], stride=step)
                x = norm(x, f"{at}.downsample.1")
            x = (h + x).clamp(min=0)
    return x.flatten(2).mean(2) @ w["fc.weight"].T + w["fc.bias"]


def test_names_shapes_and_count_are_torchvisions() -> None:
    model = models.resnet18_imagenet((3, 224, 224), 1000)
    assert sum(p.numel() for p in model.parameters()) == 11_689_512
    found = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    assert found == dict(torchvision_names())
    assert list(found) == [name for name, _ in torchvision_names()]


@pytest.mark.parametrize("stem", ["imagenet", "cifar", "speech"])
def test_outputs_equal_a_second_derivation(stem: Stem) -> None:
    channels = 1 if stem == "speech" else 3
    model = ResNet18(channels, 7, stem=stem).double().eval()
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=rng))
            elif name.endswith("running_mean"):
                tensor.copy_(torch.randn(tensor.shape, generator=rng))
    x = torch.randn(2, channels, 40, 48, generator=rng, dtype=torch.float64)
    torch.testing.assert_close(model(x), reference(dict(model.state_dict()), x, stem))


@pytest.mark.parametrize(
    ("builder", "shape", "sizes", "parameters"),
    [
        # with 10 classes: torchvision's 11,689,512 - 990 x 513; other stems change conv1 alone
        ("resnet18_imagenet", (3, 256, 256), (64, 32, 16, 8), 11_181_642),
        ("resnet18_cifar", (3, 32, 32), (32, 16, 8, 4), 11_181_642 - 64 * 3 * (49 - 9)),
        ("resnet18_speech", (1, 128, 128), (64, 32, 16, 8), 11_181_642 - 64 * 2 * 49),
    ],
)
def test_the_stems(
    builder: str, shape: tuple[int, ...], sizes: tuple[int, ...], parameters: int
) -> None:
    model = models.build(f"fedl2p.models:{builder}", shape=shape, classes=10, seed=0)
    assert sum(p.numel() for p in model.parameters()) == parameters
    seen: list[tuple[int, ...]] = []
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        assert isinstance(stage, nn.Module)
        stage.register_forward_hook(lambda m, i, out: seen.append(tuple(out.shape[2:])))
    assert model(torch.randn(1, *shape)).shape == (1, 10)
    assert seen == [(s, s) for s in sizes]
    sites = find_sites(model)
    assert len(sites.norms) == 20
    assert len(sites.params) == 62


def test_it_begins_as_torchvisions_does() -> None:
    model = models.build("fedl2p.models:resnet18_cifar", shape=(3, 32, 32), classes=10, seed=0)
    for name, parameter in model.named_parameters():
        p = parameter.detach()
        if p.dim() == 4:  # Kaiming normal, fan out: sd = sqrt(2 / (out x kernel))
            expected = (2 / (p.shape[0] * p.shape[2] * p.shape[3])) ** 0.5
            assert float(p.std()) == pytest.approx(expected, rel=0.05), name
            assert abs(float(p.mean())) < 0.1 * expected
        elif ".bn" in name or name.startswith("bn"):
            assert set(p.tolist()) == {1.0 if name.endswith("weight") else 0.0}


def save(path: Path, weights: object) -> Path:
    torch.save(weights, path)
    return path


def test_the_checkpoint_gives_the_same_logits(tmp_path: Path) -> None:
    weights = checkpoint()
    model = models.resnet18_imagenet((3, 64, 64), 1000)
    load_checkpoint(model, save(tmp_path / "resnet18.pth", weights))
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(model.eval()(x), reference(weights, x), rtol=1e-4, atol=1e-4)


def test_with_other_classes_all_but_the_head_is_loaded(tmp_path: Path) -> None:
    weights = checkpoint()
    model = models.resnet18_imagenet((3, 64, 64), 10)
    head = {name: model.state_dict()[name].clone() for name in ("fc.weight", "fc.bias")}
    load_checkpoint(model, save(tmp_path / "resnet18.pth", weights))
    for name, tensor in model.state_dict().items():
        if name in head:
            assert torch.equal(tensor, head[name])
        elif not name.endswith("num_batches_tracked"):
            assert torch.equal(tensor, weights[name])


def changed(**changes: Tensor | None) -> dict[str, Tensor]:
    weights = {**checkpoint(), **{k.replace("__", "."): v for k, v in changes.items()}}
    return {k: v for k, v in weights.items() if v is not None}


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        (changed(layer4__1__bn2__bias=None), "layer4.1.bn2.bias is missing in the file and of"),
        (changed(layer5__x=torch.zeros(1)), r"layer5.x is of shape \(1,\) in the file and missing"),
        (changed(conv1__weight=torch.zeros(64, 3, 3, 3)), r"conv1.weight is of shape \(64, 3, 3"),
        (changed(fc__weight=None), r"fc.weight is missing in the file"),
        ({"model": 3}, "does not hold named tensors"),
        ([torch.zeros(1)], "does not hold named tensors"),
    ],
)
def test_a_checkpoint_that_does_not_fit(tmp_path: Path, weights: object, said: str) -> None:
    model = models.resnet18_imagenet((3, 64, 64), 10)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=said) as refused:
        load_checkpoint(model, save(tmp_path / "resnet18.pth", weights))
    assert "\n" not in str(refused.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Evil:
    def __reduce__(self) -> object:
        return print, ("executed",)


def test_a_checkpoint_is_never_executed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.pth"
    writers = (lambda: torch.save(Evil(), path), lambda: path.write_bytes(pickle.dumps(Evil(), 2)))
    for write in writers:
        write()
        with pytest.raises(ValueError, match="holds more than tensors, and was not read"):
            load_checkpoint(models.resnet18_imagenet((3, 64, 64), 10), path)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("share", [0.0, 0.1, 0.99])
def test_a_cut_off_checkpoint(tmp_path: Path, share: float) -> None:
    path = save(tmp_path / "x.pth", {"conv1.weight": torch.zeros(1000)})
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match=r"x.pth is (damaged|no file of weights)") as refused:
        load_checkpoint(models.resnet18_imagenet((3, 64, 64), 10), path)
    assert "\n" not in str(refused.value)


def test_a_missing_checkpoint_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fedl2p data get resnet18-imagenet"):
        load_checkpoint(models.resnet18_imagenet((3, 64, 64), 10), tmp_path / "x.pth")


def test_a_study_starts_from_the_checkpoint(tmp_path: Path) -> None:
    path = save(tmp_path / "resnet18.pth", checkpoint())
    study = dataclasses.replace(
        recipes.get("smoke"), model=f"{__name__}:three_channels", pretrained=path
    )
    job = preparation.prepare(study, tmp_path / "run", resume=False, listeners=())
    assert job.given is not None
    assert torch.equal(job.given.state_dict()["conv1.weight"], checkpoint()["conv1.weight"])


class OfGrey(ResNet18):
    """Takes images of one channel as those of three equal ones."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.expand(-1, 3, -1, -1))


def three_channels(shape: object, classes: int) -> nn.Module:
    return OfGrey(3, classes, stem="imagenet")
