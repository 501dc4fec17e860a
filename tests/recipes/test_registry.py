"""Recipes by name: functions, variants, and users' own."""

from __future__ import annotations

import dataclasses
import pkgutil
import sys
from types import ModuleType

import pytest

import fedl2p.recipes
from fedl2p import recipes
from fedl2p.core.settings import InnerLoop
from fedl2p.methods.base.settings import MetaLearning
from fedl2p.study.settings import Study


def test_every_file_holds_the_recipe_of_its_name() -> None:
    rooms = (fedl2p.recipes.__path__, fedl2p.recipes.paper.__path__)
    files = {m.name for room in rooms for m in pkgutil.iter_modules(room)}
    others = {"registry", "paper", "settings", "tables"}
    assert {f for f in files if not f.startswith("_")} - others == set(recipes.names())
    for name in recipes.names():
        assert recipes.get(name) == getattr(recipes, name)()
        assert recipes.get(name).recipe == name
        assert len(recipes.describe(name).split()) > 3


def test_arguments_reach_the_function() -> None:
    study = recipes.huggingface(dataset="somewhere", label="kind")
    assert study.recipe == "huggingface"
    assert (study.data.dataset, study.data.label) == ("somewhere", "kind")  # type: ignore[attr-defined]
    assert recipes.find("speech_smoke")(unseen=1).recipe == "speech_smoke"


def test_published_digits_differ_in_the_settings_of_fedl2p_only() -> None:
    ours, published = recipes.get("digits_sensors"), recipes.get("digits_sensors_published")
    assert published.recipe == "digits_sensors_published"
    same = ("data", "model", "pretrain", "methods", "seed")
    assert all(getattr(ours, field) == getattr(published, field) for field in same)
    assert published.learn.rounds == ours.learn.rounds
    assert published.learn.clients_per_round == ours.learn.clients_per_round
    assert published.learn.strategy == "fedavg"
    settings = published.settings
    assert settings.meta == MetaLearning.published(base_rate=1e-3)
    assert settings.finetune == InnerLoop(epochs=15, statistics="published")
    for field in ("local", "finetune_rate", "local_epochs", "grid", "baselines"):
        assert getattr(settings, field) == getattr(ours.settings, field)


def test_a_users_function_is_a_recipe_once_its_module_is_imported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ValueError, match="'theirs' is not imported"):
        recipes.get("theirs:study")
    module = ModuleType("theirs")
    monkeypatch.setitem(sys.modules, "theirs", module)
    monkeypatch.setattr(
        module, "study", lambda: dataclasses.replace(recipes.smoke(), seed=3), raising=False
    )
    study = recipes.get("theirs:study")
    assert (study.recipe, study.seed) == ("theirs:study", 3)
    monkeypatch.setattr(module, "study", lambda: 3)
    with pytest.raises(ValueError, match="returned int; name a function without arguments"):
        recipes.get("theirs:study")


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown recipe .mnist.; there are cifar10, .*spoken"):
        recipes.get("mnist")


def test_a_study_of_no_recipe_is_called_custom() -> None:
    assert Study(data=recipes.smoke().data).recipe == "custom"
