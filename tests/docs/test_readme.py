"""The README's lines of Python, run as printed on a model and data that are not ours."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fedl2p
import fedl2p.study.learn
from fedl2p.core.settings import InnerLoop
from fedl2p.federation.settings import Rounds
from fedl2p.methods.base.settings import Settings

README = Path(__file__).parents[2] / "README.md"


class Residual(nn.Module):
    """A block three levels deep, whose shortcut has a norm of its own."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.path = nn.Sequential(
            nn.Sequential(nn.Conv2d(inputs, outputs, 3, 2, 1), nn.BatchNorm2d(outputs), nn.GELU()),
            nn.Sequential(nn.Conv2d(outputs, outputs, 3, 1, 1), nn.BatchNorm2d(outputs)),
        )
        self.skip = nn.ModuleDict(
            {"s": nn.Conv2d(inputs, outputs, 1, 2), "n": nn.BatchNorm2d(outputs)}
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.path(x) + self.skip["n"](self.skip["s"](x)))


class MyNet(nn.Module):
    """A user's nested residual net for colour images of 20 x 12 pixels and 3 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(Residual(3, 6), nn.Sequential(Residual(6, 8)))
        self.classifier = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


def images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 3, (count,), generator=generator)
    x = torch.randn(count, 3, 20, 12, generator=generator)
    x[torch.arange(count), y] += 1.0  # the class is the brighter channel
    return x * (1 + seed % 3), y


def my_clients():  # type: ignore[no-untyped-def]
    for i in range(3):
        yield f"hospital-{i}", *images(24, 10 + i), *images(12, 20 + i)


def block() -> str:
    code = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert code, "the README has no Python block"
    return code.group(1)


def test_the_readmes_lines_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = block()
    statements = [line for line in code.splitlines() if line.strip()]
    assert len(statements) <= 15
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    original = MyNet()
    torch.save(original.state_dict(), "global.pt")
    quick = fedl2p.study.learn.learn

    def with_fewer_rounds(model: nn.Module, clients: dict) -> fedl2p.MetaNets:  # type: ignore[type-arg]
        # the same call with less work: its defaults take minutes where a test has seconds
        settings = Settings(finetune=InnerLoop(epochs=2))
        return quick(model, clients, rounds=Rounds(rounds=2), settings=settings)

    monkeypatch.setattr(fedl2p, "learn", with_fewer_rounds, raising=False)
    my_x, my_y = images(30, 5)
    names = {"MyNet": MyNet, "my_clients": my_clients, "my_x": my_x, "my_y": my_y}
    exec(compile(code, str(README), "exec"), names)
    mine = names["mine"]
    assert type(mine.model) is MyNet  # type: ignore[attr-defined]
    restored = MyNet()
    restored.load_state_dict(torch.load("mine.pt", weights_only=True), strict=True)
    x, y = images(60, 50)
    mine.model.eval()  # type: ignore[attr-defined]
    restored.eval()
    assert torch.equal(restored(x), mine.model(x))  # type: ignore[attr-defined]
    before = nn.functional.cross_entropy(original.eval()(x), y)
    assert nn.functional.cross_entropy(restored(x), y) < before
    for name, value in names["model"].state_dict().items():  # type: ignore[attr-defined]
        assert torch.equal(value, original.state_dict()[name])
    assert "features.0.skip.n" in capsys.readouterr().out


def test_learn_refuses_clients_without_validation_part() -> None:
    data = fedl2p.ClientData(fedl2p.Examples(*images(8, 1)))
    with pytest.raises(ValueError, match=r"'a'.*validation"):
        fedl2p.study.learn.learn(MyNet(), {"a": data})


def test_every_command_of_the_readme_exists() -> None:
    makefile = (README.parent / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README.read_text(), re.MULTILINE):
        assert f"\n{target}:" in makefile
