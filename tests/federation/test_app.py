"""The Flower app: a ClientApp, message by message, gives the bits of cohorts of one in process."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedl2p import app, methods, models, recipes
from fedl2p.core.functional.precision import with_compute
from fedl2p.core.settings import Compute
from fedl2p.deploy import server as serving
from fedl2p.federation.clients.in_process import InProcess
from fedl2p.federation.clients.node import ClientNode
from fedl2p.federation.flower.clients import OnFlower
from fedl2p.federation.messages import Clients
from fedl2p.federation.rounds import federate
from fedl2p.federation.settings import Rounds
from fedl2p.reporting import page
from fedl2p.seeds import derive_seed
from support.federation_toys import same
from support.flower_grid import NodeGrid

pytest.importorskip("sklearn")


class AppGrid(NodeGrid):
    """Hands every message to a ClientApp, as a runtime does."""

    def __init__(self, client: ClientApp, names_of: ClientNode) -> None:
        super().__init__(names_of)
        self.client = client

    def send_and_receive(self, messages: Iterable[Message], **_: Any) -> list[Message]:
        return [self.client(m, self.contexts[m.metadata.dst_node_id]) for m in messages]


def test_a_client_app_gives_the_bits_of_the_process() -> None:
    study = dataclasses.replace(recipes.get("smoke"), seed=derive_seed("app") % 1000)
    method = methods.build("fedavg", study.settings)
    population = study.data.open(study.seed)
    initial = models.build(
        study.model, shape=population.shape, classes=population.classes, seed=study.seed
    )
    node = ClientNode(
        build=lambda: with_compute(initial, Compute(stack_size=1)),
        population=population,
        methods={method.name: method},
    )
    engines: list[Clients] = [
        InProcess(node),
        OnFlower(AppGrid(app.client_app(study), node)),  # type: ignore[arg-type]
    ]
    ends = [
        federate(
            method,
            initial,
            population,
            rounds=Rounds(rounds=2, clients_per_round=2),
            seed=study.seed,
            stage="pretrain",
            clients=clients,
        )
        for clients in engines
    ]
    assert same(ends[0].state, ends[1].state)
    a, b = ([dataclasses.replace(r, seconds=0.0) for r in end.records] for end in ends)
    assert a == b
    assert a[-1].failures == 0


def context(**config: Any) -> Context:
    return Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=config)


def test_the_run_configuration_names_the_study() -> None:
    assert app.study_of(context(recipe="smoke", seed=7)) == dataclasses.replace(
        recipes.get("smoke"), seed=7
    )
    assert app.study_of(context()) == recipes.get("digits")
    fields = '{"learn": {"rounds": 2}, "methods": ["fedavg"], "seed": 3}'
    changed = app.study_of(context(recipe="smoke", fields=fields, device="cpu"))
    smoke = recipes.get("smoke")
    assert changed == dataclasses.replace(
        smoke,
        seed=3,
        device="cpu",
        methods=("fedavg",),
        learn=dataclasses.replace(smoke.learn, rounds=2),
    )
    for config, problem in (
        ({"recipe": "none"}, "unknown recipe 'none'"),
        ({"fields": "{"}, "fields in the run's configuration is no JSON"),
        ({"fields": "[1]"}, "wanted a JSON object"),
        ({"fields": '{"lern": {}}'}, "unknown field 'lern'"),
        ({"fields": '{"learn": {"rounds": -1}}'}, "rounds is -1"),
    ):
        with pytest.raises(ValueError, match=problem):
            app.study_of(context(**config))


def test_a_server_app_runs_the_study_on_the_grid_that_it_gets(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    runs: list[Any] = []

    pages: list[Path] = []

    def noting(study: Any, out: Any, *, resume: bool, clients: OnFlower, **_: Any) -> None:
        runs.append((study.recipe, out, resume, clients.directory.grid))

    monkeypatch.setattr(serving, "run_study", noting)
    monkeypatch.setattr(page, "write_page", pages.append)
    study = recipes.get("smoke")
    grid = NodeGrid(app.node_of(study))
    app.server_app(study, out=tmp_path)(grid, context())
    app.server(grid, context(recipe="smoke", out="run-{run-id}", resume=True))
    app.server(grid, context(recipe="smoke", out=""))
    assert runs == [
        ("smoke", tmp_path, False, grid),
        ("smoke", Path("run-1"), True, grid),
        ("smoke", None, False, grid),
    ]
    assert pages == [tmp_path, Path("run-1")]
