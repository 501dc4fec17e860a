from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from fedl2p import find_sites, models

CONV = "fedl2p.models:small_conv"
RESNET = "fedl2p.models:small_resnet"
MEL = "fedl2p.models:small_mel"


@pytest.mark.parametrize("spec", [CONV, RESNET, MEL])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 13, 9), (2, 1, 1)])
def test_a_model_takes_any_image_size(spec: str, shape: tuple[int, int, int]) -> None:
    model = models.load(spec, shape=shape, classes=7)
    logits = model(torch.randn(5, *shape))
    assert logits.shape == (5, 7)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_small_conv_has_three_norms() -> None:
    model = models.load(CONV, shape=(1, 8, 8), classes=10)
    norms = [name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms == ["norm1", "norm2", "norm3"]


def test_small_mel_tells_low_from_high_frequencies_and_takes_any_duration() -> None:
    model = models.build(MEL, shape=(1, 50, 40), classes=12, seed=0).eval()
    assert [n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)] == [
        *("norm1", "norm2", "norm3")
    ]
    low = torch.zeros(1, 1, 48, 40)
    low[..., 3] = 1
    high = low.roll(24, dims=-1)  # a tone 24 filters higher
    with torch.no_grad():
        assert not torch.allclose(model(low), model(high), atol=1e-3)
        assert model(torch.randn(2, 1, 128, 40)).shape == (2, 12)


def test_small_resnet_nests_its_norms_and_has_a_strided_shortcut() -> None:
    model = models.load(RESNET, shape=(1, 8, 8), classes=10)
    norms = [name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms == [
        "stem.1",
        "blocks.0.norm1",
        "blocks.0.norm2",
        "blocks.1.norm1",
        "blocks.1.norm2",
        "blocks.1.shortcut.1",
    ]
    assert sum(parameter.numel() for parameter in model.parameters()) == 5130
    assert model.get_submodule("blocks.1.shortcut.0").stride == (2, 2)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 9, 17), (6, 100), (2, 9)])
def test_small_strided_takes_images_and_series(shape: tuple[int, ...]) -> None:
    model = models.build("fedl2p.models:small_strided", shape=shape, classes=4, seed=0)
    assert model(torch.zeros(5, *shape)).shape == (5, 4)
    assert len(find_sites(model).norms) == 3
    with pytest.raises(ValueError, match=r"small_strided wants images .* got examples of shape"):
        models.build("fedl2p.models:small_strided", shape=(7,), classes=4, seed=0)


def test_a_seed_fixes_the_weights_and_leaves_the_global_generator() -> None:
    def build(seed: int) -> dict[str, torch.Tensor]:
        return models.build(CONV, shape=(1, 8, 8), classes=10, seed=seed).state_dict()

    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = build(0)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(6)
    second, other = build(0), build(1)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])


def test_images_of_another_form_are_refused() -> None:
    with pytest.raises(ValueError, match=r"small_conv wants images .* got examples of shape \(12,"):
        models.load(CONV, shape=(12,), classes=2)


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model_zoo.py").write_text(
        "from torch import nn\n"
        "class Flat(nn.Module):\n"
        "    def __init__(self, shape, classes):\n"
        "        super().__init__()\n"
        "        self.head = nn.Linear(shape[0], classes)\n"
        "def lonely(classes): return nn.Identity()\n"
        "def text(shape, classes): return 'a model'\n"
        "def failing(shape, classes): raise RuntimeError('out of clay')\n"
        "number = 3\n"
    )
    (tmp_path / "model_zoo_broken.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("zoo")
def test_a_users_class_serves_as_it_is() -> None:
    model = models.build("model_zoo:Flat", shape=(4,), classes=3, seed=0)
    assert type(model).__name__ == "Flat"
    assert model.get_submodule("head").weight.shape == (3, 4)


@pytest.mark.usefixtures("zoo")
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("small_conv", "not of the form package.module:callable"),
        (":small_conv", "not of the form"),
        ("fedl2p.models:", "not of the form"),
        ("", "not of the form"),
        ("fedl2p.modles:small_conv", "'fedl2p.modles' is not imported"),
        ("no_such_zoo:net", "cannot import 'no_such_zoo' .*No module named"),
        (".models:small_conv", "cannot import '.models'"),
        ("model_zoo_broken:net", "cannot import .*no_such_dependency"),
        ("fedl2p.models:small_cnov", "'small_cnov' does not exist in 'fedl2p.models'"),
        ("model_zoo:number", "'number' is not callable"),
        ("model_zoo:lonely", r"cannot be used .*name a function of \(shape, classes\)"),
        ("model_zoo:text", "returned str; name a function"),
    ],
)
def test_a_name_that_is_no_model_is_refused_in_one_line(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        models.load(spec, shape=(1, 8, 8), classes=10)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("zoo")
def test_what_the_callable_raises_is_passed_on() -> None:
    with pytest.raises(RuntimeError, match="out of clay"):
        models.load("model_zoo:failing", shape=(1, 8, 8), classes=10)


def test_small_conv_learns_clean_digits() -> None:
    digits = pytest.importorskip("fedl2p.data.digits")
    source = digits.Digits(
        seen=1, unseen=0, alpha=1000.0, feature_shift=False, train=800, validation=1, test=400
    )
    data = source.open(0).open("seen-00")
    model = models.build(CONV, shape=(1, 8, 8), classes=10, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    order = torch.Generator().manual_seed(0)
    for _ in range(10):
        for batch in torch.randperm(800, generator=order).split(32):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(data.train.x[batch]), data.train.y[batch])
            loss.backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        right = model(data.test.x).argmax(1) == data.test.y
    assert float(right.float().mean()) > 0.93
