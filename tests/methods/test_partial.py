"""Methods that treat a part of the model apart: norms that stay, heads that stay or wait."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from fedl2p.core.finetuning.batches import StackBatch
from fedl2p.core.finetuning.in_place_sgd import InPlaceSGD
from fedl2p.core.finetuning.inner_loop import finetune
from fedl2p.core.functional.model import FunctionalModel
from fedl2p.core.settings import InnerLoop
from fedl2p.core.working_copies import working_copies
from fedl2p.methods import build
from fedl2p.methods.base.local_sgd import run_local_sgd
from fedl2p.methods.base.tensor_groups import client_states, client_tensors, tensor_names
from fedl2p.seeds import derive_seed
from support.baseline_tools import (
    CLIENTS,
    HEAD,
    SETTINGS,
    STRANGER,
    adapted,
    after_a_round,
    assert_same,
    method,
    moved,
    norm_tensors,
)
from support.nets import nested_net

# FedBN


def test_fedbn_norms_never_travel_three_levels_deep() -> None:
    model = nested_net()
    norms = norm_tensors(model)
    assert len(norms) == 6 * 4
    assert "blocks.1.shortcut.1.running_var" in norms  # in a list in a block in a list
    chosen = method("fedbn")
    state = chosen.start(model)
    assert not norms & state.keys()
    assert norms | state.keys() == set(tensor_names(FunctionalModel(model)))
    for update in chosen.train(model, state, CLIENTS):
        assert update.shared.keys() == state.keys()
        assert update.kept.keys() == norms
        assert moved(update.kept, dict(model.state_dict())) == norms  # they did train


def test_fedbn_takes_norms_without_running_statistics_too() -> None:
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8, track_running_stats=False)
    )
    model = nn.Sequential(model, nn.Linear(8, 10)).double()
    assert method("fedbn").start(model).keys() == {"0.1.weight", "0.1.bias", "1.weight", "1.bias"}


def test_fedbn_a_seen_client_uses_its_norms_and_an_unseen_one_makes_them() -> None:
    model = nested_net()
    chosen = method("fedbn")
    state, clients = after_a_round(chosen, model)
    seen, unseen = adapted(chosen, model, state, [clients[1], STRANGER])
    assert_same(seen, clients[1].kept | state)
    assert_same(state, unseen)
    assert moved(unseen, dict(model.state_dict())) >= norm_tensors(model)
    (judged,) = chosen.validate(model, state, [clients[1]])
    model.load_state_dict(clients[1].kept | state, strict=False)
    part = clients[1].data.validation
    assert part is not None
    logits = model.eval()(part.x)
    assert judged.metrics["loss"] == pytest.approx(
        nn.functional.cross_entropy(logits, part.y).item()
    )


# FedBABU, FedPer, FedRep


def test_fedbabu_trains_no_head_and_fine_tunes_it() -> None:
    model = nested_net()
    chosen = method("fedbabu")
    fitted = chosen.train_stack(working_copies(model).net, chosen.start(model), CLIENTS)
    for j in range(len(CLIENTS)):
        trained = client_tensors(
            working_copies(model).net, fitted.state, j, tensor_names(FunctionalModel(model))
        )
        changed = moved(trained, dict(model.state_dict()))
        # a bias before a batch-norm has no gradient but rounding
        assert changed | {"stem.0.bias"} == trained.keys() - HEAD
    state, clients = after_a_round(chosen, model)
    assert not HEAD & state.keys()
    assert not any(c.kept for c in clients)
    (personal,) = adapted(chosen, model, state, [STRANGER])
    whole = {k: v for k, v in model.state_dict().items() if k in HEAD} | state
    assert moved(whole, personal) | {"stem.0.bias"} == whole.keys()


@pytest.mark.parametrize("name", ["fedper", "fedrep"])
def test_heads_never_travel_and_an_unseen_client_starts_one_anew(name: str) -> None:
    model = nested_net()
    chosen = method(name)
    state, clients = after_a_round(chosen, model)
    assert not HEAD & state.keys()
    assert [c.kept.keys() for c in clients] == [HEAD] * 3
    at_once = dataclasses.replace(chosen, inner=InnerLoop(epochs=0))
    seen, unseen = adapted(at_once, model, state, [clients[2], STRANGER])
    assert_same(clients[2].kept, seen)
    assert_same({k: model.state_dict()[k] for k in HEAD}, unseen)
    assert moved(clients[2].kept, dict(model.state_dict())) == HEAD


def test_fedrep_trains_the_head_under_a_frozen_body_and_then_the_body_under_that_head(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trained: list[set[str]] = []

    def noting(sgd: InPlaceSGD, batch: StackBatch) -> None:
        trained.append(set(sgd.step_and_directions(batch)))

    model = nested_net()
    net = working_copies(model).net
    chosen = method("fedrep", fedrep_head_epochs=3)
    monkeypatch.setattr(InPlaceSGD, "step", noting)
    fitted = chosen.train_stack(net, chosen.start(model), CLIENTS)
    per_epoch = 3  # 20 examples in batches of 8
    assert trained == [HEAD] * 3 * per_epoch + [set(net.sites.params) - HEAD] * 2 * per_epoch
    head_only = dataclasses.replace(chosen.round_loop, epochs=3)
    start = client_states(net, chosen.start(model), CLIENTS)
    first = run_local_sgd(net, start, CLIENTS, head_only, 0.05, only=HEAD, stream="head")
    assert all(torch.equal(first.params[k], fitted.state.params[k]) for k in HEAD)


def test_fedrep_personalizes_the_head_alone() -> None:
    model = nested_net()
    chosen = method("fedrep")
    state, clients = after_a_round(chosen, model)
    for client, personal in zip(clients, adapted(chosen, model, state, clients), strict=True):
        assert_same({k: v for k, v in state.items() if "running" not in k}, personal)
        assert moved(client.kept, personal) == HEAD


# Fine-tuning a part


@pytest.mark.parametrize("part", ["head", "norms"])
def test_partial_fine_tuning_leaves_all_else_bit_equal(part: str) -> None:
    model = nested_net()
    built = build(f"finetuning-{part}", SETTINGS)
    (outcome,) = built.personalize(model, built.start(model), [STRANGER])
    assert outcome.hyperparams is not None
    seed = derive_seed(STRANGER.seed, "finetune")
    tuned = finetune(model, outcome.hyperparams, STRANGER.data, epochs=2, batch_size=8, seed=seed)
    test = STRANGER.data.test
    assert test is not None
    loss = nn.functional.cross_entropy(tuned.eval()(test.x), test.y).item()
    assert outcome.loss == pytest.approx(loss)  # this is the model that was judged
    expected = HEAD if part == "head" else norm_tensors(model)
    assert moved(dict(tuned.state_dict()), dict(model.state_dict())) == expected
