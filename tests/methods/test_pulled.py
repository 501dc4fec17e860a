"""Methods with a gradient of their own: proximal terms, look-ahead, mixtures."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fedl2p.core.functional.model import FunctionalModel, ModelState
from fedl2p.core.settings import InnerLoop
from fedl2p.core.working_copies import working_copies
from fedl2p.method import State
from fedl2p.methods import apfl
from fedl2p.methods.apfl import APFL, Pair, alpha_gradient
from fedl2p.methods.base.local_sgd import LocalSGD, finetune_plain, loss_gradient, run_local_sgd
from fedl2p.methods.base.personalizing import model_with_state
from fedl2p.methods.base.proximal import damped, pulled
from fedl2p.methods.base.tensor_groups import client_states, client_tensors, tensor_names
from fedl2p.methods.ditto import PERSONAL
from fedl2p.methods.perfedavg import through_step
from support.baseline_tools import (
    CLIENTS,
    STRANGER,
    adapted,
    after_a_round,
    assert_same,
    method,
)
from support.core_nets import cross_entropy
from support.nets import nested_net

# FedProx


def test_fedprox_without_the_term_is_fedavg_bit_for_bit() -> None:
    model = nested_net()
    ours, fedavg = method("fedprox", fedprox_mu=0.0), method("fedavg")
    for a, b in zip(
        ours.train(model, ours.start(model), CLIENTS),
        fedavg.train(model, fedavg.start(model), CLIENTS),
        strict=True,
    ):
        assert_same(a.shared, b.shared)


def test_fedprox_a_step_goes_down_loss_and_term() -> None:
    net = FunctionalModel(nested_net())
    anchor = net.start(2, "global").params
    away = {k: v + 0.1 for k, v in anchor.items()}
    start = ModelState(away, net.start(2, "global").stats)
    loss = loss_gradient(net, CLIENTS[:2], InnerLoop(batch_size=8), "local")
    mu, eta = 3.0, 0.1
    one = InnerLoop(epochs=1, batch_size=20)
    after = run_local_sgd(
        net, start, CLIENTS[:2], one, damped(eta, mu), gradient=pulled(loss, anchor, mu)
    )
    grads, _ = loss(start, 0, frozenset(away))
    for k, w in away.items():
        # where the quadratic model of the step, term included, has gradient zero
        residual = grads[k] + (after.params[k] - w) / eta + mu * (after.params[k] - anchor[k])
        assert residual.abs().max() < 1e-6  # the rate is held in float32
        explicit = w - eta / (1 + eta * mu) * (grads[k] + mu * (w - anchor[k]))
        torch.testing.assert_close(after.params[k], explicit, rtol=1e-6, atol=1e-9)


def test_fedprox_a_large_term_holds_weights_at_the_start() -> None:
    model = nested_net()
    near, far = method("fedprox", fedprox_mu=1e6), method("fedprox", fedprox_mu=0.0)

    def distance(chosen: LocalSGD) -> float:
        start = chosen.start(model)
        shared = chosen.train(model, start, CLIENTS[:1])[0].shared
        return max(float((shared[k] - start[k]).abs().max()) for k in start if "running" not in k)

    assert distance(far) > 1e-2
    assert distance(near) < 1e-5


# Ditto


def test_ditto_global_path_is_fedavg() -> None:
    model = nested_net()
    ours, fedavg = method("ditto"), method("fedavg")
    for a, b in zip(
        ours.train(model, ours.start(model), CLIENTS),
        fedavg.train(model, fedavg.start(model), CLIENTS),
        strict=True,
    ):
        assert_same(a.shared, b.shared)


def test_ditto_without_pull_is_local_training() -> None:
    model = nested_net()
    net = working_copies(model).net
    chosen = method("ditto", ditto_lambda=0.0)
    state, clients = after_a_round(chosen, model)
    updates = chosen.train(model, state, clients)
    alone = client_states(net, {}, CLIENTS)
    for cohort in (CLIENTS, clients):
        alone = run_local_sgd(net, alone, cohort, chosen.round_loop, 0.05, stream="personal")
    for j, update in enumerate(updates):
        expected = client_tensors(net, alone, j, tensor_names(net))
        assert_same(expected, {k.removeprefix(PERSONAL): v for k, v in update.kept.items()})


def test_ditto_with_a_large_pull_gives_the_global_model() -> None:
    model = nested_net()
    chosen = method("ditto", ditto_lambda=1e7)
    state, clients = after_a_round(chosen, model)
    params = [k for k in state if "running" not in k]
    for update in chosen.train(model, state, clients):
        for k in params:
            torch.testing.assert_close(update.kept[PERSONAL + k], state[k], rtol=0, atol=1e-5)
    for personal in adapted(chosen, model, state, [*clients, STRANGER]):
        for k in params:
            torch.testing.assert_close(personal[k], state[k], rtol=0, atol=1e-5)


def test_ditto_an_unseen_client_starts_from_the_global_model() -> None:
    model = nested_net()
    chosen = method("ditto", ditto_lambda=0.0)
    state, _ = after_a_round(chosen, model)
    net = working_copies(model_with_state(model, state)).net
    (personal,) = adapted(chosen, model, state, [STRANGER])
    plain = finetune_plain(
        net, client_states(net, state, [STRANGER]), [STRANGER], chosen.inner, chosen.rate
    )
    torch.testing.assert_close(
        client_tensors(net, plain.state, 0, tensor_names(net)), personal, rtol=1e-9, atol=1e-12
    )


# Per-FedAvg


class TwoSteps:
    """The loss after a step on one batch, of another batch, and its exact gradient."""

    alpha = 0.1

    def __init__(self) -> None:
        self.net = FunctionalModel(nested_net())
        self.mix = torch.ones(2, len(self.net.sites.norms), dtype=torch.float64)
        self.batches = [
            (torch.stack([c.data.train.x[s] for c in CLIENTS[:2]]), self.labels(s))
            for s in (slice(0, 8), slice(8, 16))
        ]
        self.start = self.net.start(2, "global")

    @staticmethod
    def labels(part: slice) -> Tensor:
        return torch.stack([c.data.train.y[part] for c in CLIENTS[:2]])

    def loss(self, params: State, batch: int) -> Tensor:
        x, y = self.batches[batch]
        logits, _ = self.net.logits(
            ModelState(params, self.start.stats), self.mix, x, training=True
        )
        return cross_entropy(logits, y)

    def gradient(self, batch: int) -> Callable[..., tuple[State, State]]:
        def of(state: ModelState, step: int, wanted: object) -> tuple[State, State]:
            leaf = {k: v.detach().requires_grad_() for k, v in state.params.items()}
            grads = torch.autograd.grad(self.loss(leaf, batch).sum(), list(leaf.values()))
            return dict(zip(leaf, grads, strict=True)), state.stats

        return of

    def exact(self) -> State:
        leaf = {k: v.detach().requires_grad_() for k, v in self.start.params.items()}
        inner = torch.autograd.grad(
            self.loss(leaf, 0).sum(), list(leaf.values()), create_graph=True
        )
        ahead = {k: v - self.alpha * g for (k, v), g in zip(leaf.items(), inner, strict=True)}
        grads = torch.autograd.grad(self.loss(ahead, 1).sum(), list(leaf.values()))
        return dict(zip(leaf, grads, strict=True))

    def estimate(self, delta: float | None) -> State:
        third = None if delta is None else self.gradient(0)
        found = through_step(
            self.gradient(0), self.gradient(1), third, alpha=self.alpha, delta=delta or 1.0
        )
        return found(self.start, 0, frozenset(self.start.params))[0]


def error(a: State, b: State) -> float:
    return max(float((a[k] - b[k]).abs().max()) for k in b) / max(
        float(v.abs().max()) for v in b.values()
    )


def test_perfedavg_gradient_is_the_one_through_the_step() -> None:
    two = TwoSteps()
    exact = two.exact()
    errors = [error(two.estimate(delta), exact) for delta in (1e-2, 1e-3, 1e-4)]
    assert errors[2] < 1e-6
    assert errors[1] < errors[0] / 30  # a central difference: error in delta squared
    assert error(two.estimate(None), exact) > 0.01  # so the Hessian's term matters here


def test_perfedavg_first_order_is_the_gradient_at_the_adapted_point() -> None:
    two = TwoSteps()
    grads, _ = two.gradient(0)(two.start, 0, None)
    ahead = {k: v - two.alpha * grads[k] for k, v in two.start.params.items()}
    expected, _ = two.gradient(1)(ModelState(ahead, two.start.stats), 0, None)
    assert error(two.estimate(None), expected) < 1e-12


# APFL


def test_apfl_with_share_zero_is_fedavg() -> None:
    model = nested_net()
    net = working_copies(model).net
    chosen, fedavg = method("apfl", apfl_alpha=0.0, apfl_adaptive=False), method("fedavg")
    state, clients = after_a_round(chosen, model)
    plain = fedavg.train(model, state, clients)
    assert isinstance(chosen, APFL)
    pair = chosen.trained(
        net, chosen.pair(net, state, clients), clients, chosen.round_loop, 0.05, "local"
    )
    for j, (a, b) in enumerate(zip(chosen.train(model, state, clients), plain, strict=True)):
        assert_same(a.shared, b.shared)
        assert_same(b.shared, client_tensors(net, pair.mixture, j, tensor_names(net)))


def test_apfl_with_share_one_is_local_training() -> None:
    model = nested_net()
    net = working_copies(model).net
    chosen = method("apfl", apfl_alpha=1.0, apfl_adaptive=False)
    state, clients = after_a_round(chosen, model)
    alone = client_states(net, {}, CLIENTS)
    for cohort in (CLIENTS, clients):
        alone = run_local_sgd(net, alone, cohort, chosen.round_loop, 0.05)
    for j, update in enumerate(chosen.train(model, state, clients)):
        assert_same(
            client_tensors(net, alone, j, tensor_names(net)),
            {k.removeprefix(apfl.LOCAL): v for k, v in update.kept.items()},
        )


def test_apfl_gradient_of_the_share_against_finite_differences() -> None:
    two = TwoSteps()
    away = {k: v + 0.05 * torch.cos(v + 1) for k, v in two.start.params.items()}
    alpha = torch.tensor([0.3, 0.8], dtype=torch.float64)

    def loss(shift: float) -> Tensor:
        return two.loss(
            Pair(two.start, ModelState(away, two.start.stats), alpha + shift).mixture.params, 0
        )

    pair = Pair(two.start, ModelState(away, two.start.stats), alpha)
    grads, _ = two.gradient(0)(pair.mixture, 0, None)
    numeric = (loss(1e-5) - loss(-1e-5)) / 2e-5
    torch.testing.assert_close(alpha_gradient(pair, grads), numeric, rtol=1e-6, atol=1e-9)


def test_apfl_share_takes_one_step_a_round_down_its_gradient() -> None:
    model = nested_net()
    net = working_copies(model).net
    chosen = method("apfl", apfl_alpha=0.5)
    assert isinstance(chosen, APFL)
    state, clients = after_a_round(chosen, model)
    assert all(float(c.kept["alpha"]) == 0.5 for c in clients)  # v = w at first: no gradient
    pair = chosen.pair(net, state, clients)
    grads, _ = loss_gradient(net, clients, chosen.round_loop, "local")(
        pair.mixture, 0, frozenset(pair.shared.params)
    )
    expected = (pair.alpha - 0.05 * alpha_gradient(pair, grads)).clamp(0, 1)
    found = torch.cat([u.kept["alpha"] for u in chosen.train(model, state, clients)])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    assert (found != 0.5).all()
