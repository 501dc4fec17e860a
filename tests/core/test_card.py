"""The card of meta-nets: what it says, whom it warns of, how it travels."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fedl2p import ClientData, Examples, MetaNets, Privacy, Rounds, Settings, learn, personalize
from fedl2p.core.card import FAR, Card, shapes_of
from fedl2p.core.profile_groups import GROUPS
from fedl2p.core.profiles import profile
from fedl2p.core.settings import PROFILE_GROUPS
from fedl2p.core.sites import find_sites

ROUNDS = Rounds(rounds=1)


def some_client(seed: int, *, n: int = 24, scale: float = 1.0, classes: int = 3) -> Examples:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (n,), generator=generator)
    return Examples(scale * (torch.randn(n, 4, generator=generator) + y[:, None]), y)


def small(width: int = 5) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 3))


@pytest.fixture(scope="module")
def nets() -> MetaNets:
    clients = {f"client {i}": ClientData(some_client(i), some_client(100 + i)) for i in range(8)}
    return learn(small(), clients, rounds=ROUNDS, seed=7, data_licence="CC BY 4.0")


def test_learning_says_for_what_on_whom_and_how(nets: MetaNets) -> None:
    card = nets.card
    assert (card.model, card.clients, card.profiled, card.seed) == ("Sequential", 8, 8, 7)
    assert card.data_licence == "CC BY 4.0"
    assert card.shapes["0.weight"] == (5, 4)
    assert card.shapes["1.running_var"] == (5,)
    assert card.settings["inner.epochs"] == Settings().finetune.epochs
    assert card.settings["rounds.rounds"] == 1
    assert card.settings["loss"] == "cross-entropy"


def test_the_range_is_that_of_the_clients_profiles(nets: MetaNets) -> None:
    model = small()
    seen = [profile(model, some_client(i).batches(8), groups=PROFILE_GROUPS) for i in range(8)]
    for group in PROFILE_GROUPS:
        entries = torch.stack([p.entries(group) for p in seen])
        for name, column in zip(GROUPS[group].names(nets.sites), entries.T, strict=True):
            assert nets.card.low[name] == pytest.approx(float(column.min()), rel=1e-4), name
            assert nets.card.high[name] == pytest.approx(float(column.max()), rel=1e-4), name


def test_under_privacy_no_profile_is_told() -> None:
    clients = {f"client {i}": ClientData(some_client(i), some_client(9 + i)) for i in range(4)}
    private = Rounds(rounds=1, keep="last", privacy=Privacy(mechanism="local"))
    assert learn(small(), clients, rounds=private).card.low == {}


def test_saved_and_loaded_with_the_nets(nets: MetaNets, tmp_path: Path) -> None:
    nets.save(tmp_path / "nets")
    assert MetaNets.load(tmp_path / "nets").card == nets.card


# ------------------------------------------------------------ who lies outside


def test_a_client_like_the_others_is_not_warned(nets: MetaNets) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        personalize(small(), nets, some_client(50), epochs=1)


@pytest.mark.parametrize(
    ("client", "said"),
    [
        (some_client(50, scale=6.0), r"most of all 'input (mean|sd) of 0': .* of 8 clients"),
        (some_client(50, n=700), r"'number of examples': 700, learned on 24 to 24"),
        (some_client(50, classes=1), r"entries lies? far outside"),
    ],
)
def test_a_client_far_outside_is_warned_once(nets: MetaNets, client: Examples, said: str) -> None:
    with pytest.warns(UserWarning, match=said) as caught:
        personalize(small(), nets, client, epochs=0)
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    assert caught[0].filename == __file__


def test_a_model_of_other_shapes_is_warned_of(nets: MetaNets) -> None:
    with pytest.warns(UserWarning, match=r"0\.weight is \[9, 4\], but .* learned for \[5, 4\]"):
        personalize(small(9), nets, some_client(50), epochs=0)


def test_the_margin_is_on_the_scale_that_the_nets_read() -> None:
    """Of 10 to 1000 examples ``log(n) / 2`` has width 2.3: twice FAR of that is a factor of 10."""
    model = small()
    sites = find_sites(model)
    (name,) = GROUPS["size"].names(sites)
    card = Card(low={name: 10.0}, high={name: 1000.0}, profiled=2)
    at = profile(model, some_client(0).batches(24), groups=("size",))
    for size, far in ((9_000.0, False), (11_000.0, True), (1.1, False), (0.9, True)):
        one = dataclasses.replace(at, size=torch.tensor([size]))
        assert bool(card.misfits(model, one, ("size",))) == far, size
    assert FAR == 0.5


# ------------------------------------------------------------ for people, and on the hub


def test_the_readme_says_it_in_the_form_of_the_hub(nets: MetaNets, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    nets.save(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "fedl2p"
    assert "federated-learning" in card.data.tags
    for said in ("`Sequential`", "CC BY 4.0", "input sd of 0", "inner.epochs", "[5, 4]"):
        assert said in card.text, said


def test_a_readme_of_the_users_is_left_as_it_is(nets: MetaNets, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    nets.save(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert MetaNets.load(tmp_path).card == nets.card


def test_names_cannot_leave_their_cell() -> None:
    card = Card(model="M", shapes={"a|b`<i>": (1,)}, settings={"x": "a\n| b"})
    text = card.readme(find_sites(small()), "default")
    assert r"| `a\|b'&lt;i>` | [1] |" in text
    assert r"| x | a \| b |" in text


def test_pushed_and_read_back(
    nets: MetaNets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    made: dict[str, Any] = {}

    def create_repo(self: object, repository: str, **options: Any) -> str:
        made.update(repository=repository, **options)
        return f"https://huggingface.co/{repository}"

    def upload_folder(self: object, *, repo_id: str, folder_path: str, **_: Any) -> object:
        shutil.copytree(folder_path, tmp_path / repo_id)
        return SimpleNamespace(oid="0")

    def snapshot_download(repository: str, *, revision: str | None, **_: Any) -> str:
        cache = tmp_path / "cache"  # the hub's cache holds links to its files
        cache.mkdir()
        for file in (tmp_path / repository).iterdir():
            (cache / file.name).symlink_to(file)
        return str(cache)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert nets.push_to_hub("me/nets", private=True) == "https://huggingface.co/me/nets"
    assert made == {"repository": "me/nets", "private": True, "exist_ok": True}
    files = {file.name for file in (tmp_path / "me" / "nets").iterdir()}
    assert files == {"README.md", "metanets.json", "metanets.safetensors"}
    again = MetaNets.from_hub("me/nets")
    assert again.card == nets.card
    assert all(map(torch.equal, again.state_dict().values(), nets.state_dict().values()))


def test_without_huggingface_hub_the_extra_is_named(
    nets: MetaNets, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'fedl2p\[hub\]'"):
        nets.push_to_hub("me/nets")


# ------------------------------------------------------------ damaged cards


@pytest.mark.parametrize(
    "change",
    [
        {"model": "a\x1b[2J"},
        {"clients": -1},
        {"clients": 2.5},
        {"seed": "0"},
        {"shapes": {"w": [1, "2"]}},
        {"low": {"x": 0.0}},
        {"low": {"x": 2.0}, "high": {"x": 1.0}},
        {"low": {"x": "0"}, "high": {"x": 1.0}},
        {"low": {"x": float("nan")}, "high": {"x": 1.0}},
        {"settings": []},
        {"age": 3},
    ],
)
def test_a_card_that_cannot_be_is_refused(
    nets: MetaNets, change: dict[str, Any], tmp_path: Path
) -> None:
    nets.save(tmp_path)
    path = tmp_path / "metanets.json"
    content = json.loads(path.read_text())
    content["card"] |= {"low": {}, "high": {}} | change
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="cannot be read"):
        MetaNets.load(tmp_path)


def test_shapes_are_those_of_parameters_and_buffers() -> None:
    assert shapes_of(nn.BatchNorm1d(2)) == {
        **dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (2,)),
        "num_batches_tracked": (),
    }


def test_the_range_can_be_taken_out(nets: MetaNets) -> None:
    card = nets.card.with_profiles([], [])
    assert (card.profiled, card.low, card.high) == (0, {}, {})
    assert card.clients == 8
    assert "not known: profiles stay" in card.readme(nets.sites, "default")
