"""The four pictures: what they show, and what they refuse."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch

import fedl2p
from fedl2p import Hyperparams, Report, Row, find_sites
from fedl2p.core.sites import Sites
from support.core_nets import mlp


@pytest.fixture(autouse=True)
def without_a_screen() -> Iterator[None]:
    before = matplotlib.get_backend()
    matplotlib.use("agg")
    yield
    matplotlib.pyplot.close("all")
    matplotlib.use(before)


def two_clients(sites: Sites) -> dict[str, Hyperparams]:
    return {
        name: Hyperparams.constant(sites, mix=mix, rate=rate)
        for name, mix, rate in (("a", 0.25, 0.1), ("b", 1.0, 0.0))
    }


def report(accuracies: dict[str, tuple[float, float]], method: str = "fedl2p") -> Report:
    rows = [
        Row(
            method=method,
            client=name,
            pool="unseen",
            num_train=10,
            num_test=1000,
            accuracy_before=before,
            accuracy=after,
            loss_before=1.0,
            loss=1.0,
            seconds=0.1,
        )
        for name, (before, after) in accuracies.items()
    ]
    return Report(recipe="r", seed=0, engine="in-process", device="cpu", rows=tuple(rows))


def texts(labels: Any) -> list[str]:
    return [label.get_text() for label in labels]


def test_mixes_are_a_row_per_client_and_a_column_per_norm() -> None:
    sites = find_sites(mlp())
    ax = fedl2p.plot.mixes(two_clients(sites))
    values = np.asarray(ax.images[0].get_array())
    assert values.tolist() == [[0.25] * len(sites.norms), [1.0] * len(sites.norms)]
    assert texts(ax.get_yticklabels()) == ["a", "b"]
    assert texts(ax.get_xticklabels()) == list(sites.norms)


def test_rates_of_zero_are_drawn_as_the_lowest() -> None:
    sites = find_sites(mlp())
    ax = fedl2p.plot.rates(two_clients(sites))
    values = np.asarray(ax.images[0].get_array())
    assert values.shape == (2, len(sites.params))
    np.testing.assert_allclose(values, 0.1, rtol=1e-6)


def test_they_draw_into_axes_that_are_given() -> None:
    figure, axes = matplotlib.pyplot.subplots(2)
    clients = two_clients(find_sites(mlp()))
    assert fedl2p.plot.mixes(clients, ax=axes[0]) is axes[0]
    assert fedl2p.plot.made_worse({"m": {"a": (0.1, 0.2)}}, ax=axes[1]) is axes[1]
    assert figure is axes[0].figure


SCORES = {"lost": (0.9, 0.8), "gained": (0.2, 0.9), "level": (0.5, 0.497)}


@pytest.mark.parametrize("scores", [SCORES, report(SCORES)], ids=["numbers", "report"])
def test_accuracies_are_sorted_by_gain(scores: Any) -> None:
    ax = fedl2p.plot.accuracies(scores)
    assert texts(ax.get_yticklabels()) == ["gained", "level", "lost"]
    assert ax.get_title(loc="left") == "+19.9 points, mean of 3 clients"


@pytest.mark.parametrize("scores", [{"FedL2P": SCORES}, report(SCORES)], ids=["numbers", "report"])
def test_the_share_made_worse(scores: Any) -> None:
    ax = fedl2p.plot.made_worse(scores)
    assert texts(ax.get_yticklabels()) == ["FedL2P"]
    assert [bar.get_width() for bar in ax.patches] == [pytest.approx(100 / 3)]


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: fedl2p.plot.mixes({}), "no client to draw"),
        (lambda: fedl2p.plot.mixes(two_clients(find_sites(mlp(norm=False)))), "no batch-norm"),
        (
            lambda: fedl2p.plot.rates(
                {"a": Hyperparams.stack(list(two_clients(find_sites(mlp())).values()))}
            ),
            "'a' has hyperparameters of many",
        ),
        (
            lambda: fedl2p.plot.rates(
                {
                    **two_clients(find_sites(mlp())),
                    "c": Hyperparams.constant(find_sites(mlp(norm=False)), mix=0, rate=0.1),
                }
            ),
            "'c' is of another model",
        ),
        (lambda: fedl2p.plot.accuracies({"a": (math.nan, 0.5)}), "no client with an accuracy"),
        (lambda: fedl2p.plot.accuracies(report(SCORES), method="l2p"), "no method 'l2p'"),
        (lambda: fedl2p.plot.made_worse({}), "no method with a tested client"),
    ],
)
def test_what_cannot_be_drawn_is_said(draw: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw()


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'fedl2p\[notebook\]'"):
        fedl2p.plot.made_worse({"m": SCORES})


# ------------------------------------------------------------ representations


def test_representations_are_short_and_tables_in_a_notebook() -> None:
    sites = find_sites(mlp())
    one = two_clients(sites)["a"]
    assert repr(one) == (
        f"Hyperparams(mix=[0.25, {len(sites.norms)} norms], "
        f"rate=[0.1, {len(sites.params)} tensors])"
    )
    both = Hyperparams.stack(list(two_clients(sites).values()))
    assert repr(both).startswith("Hyperparams(clients=2, mix=[0.25 to 1, ")
    assert one._repr_html_().count("<tr>") == len(sites.norms) + len(sites.params) + 2
    seen = fedl2p.profile(mlp(), [torch.randn(5, 4)])
    assert repr(seen).startswith("Profile(num_examples=5, divergence=[")
    assert seen._repr_html_().count("<tr>") == 1 + len(sites.norms) + 2 * len(sites.layers)
    nets = fedl2p.MetaNets(sites)
    assert repr(nets).startswith("MetaNets(form='default', reads=[")
    assert len(repr(nets)) < 120


def test_a_report_is_one_line_and_a_table_in_a_notebook() -> None:
    one = report({"<b>": (0.1, 0.2)}, method="<i>")
    assert repr(one) == "Report(recipe='r', seed=0, methods=['<i>'], clients=1)"
    html = one._repr_html_()
    assert "&lt;i&gt;" in html
    assert "<i>" not in html
    assert "20.00" in html
