"""The published mode against numbers of the public reference implementation, 1e-8 relative."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedl2p.core.finetuning.inner_loop import run_inner_loop
from fedl2p.core.functional.model import FunctionalModel
from fedl2p.core.hyperparams import Hyperparams
from fedl2p.core.metanets import MetaNets
from fedl2p.core.profiles import profile
from fedl2p.core.settings import HypergradientConfig, MetaNetsConfig
from support.core_nets import cross_entropy, hypergradient_of
from support.nets import NestedNet

LRNET = {"lrnet.hidden1": "first_layer.0", "lrnet.hidden2": "hl_0.0", "lrnet.out": "last_layer"}
BNNET = {"bnnet.hidden1": "model.0", "bnnet.hidden2": "model.2", "bnnet.out": "model.4"}


class Golden:
    """One case: the model, the batches and every expected number."""

    def __init__(self, name: str) -> None:
        self.of = load_file(Path(__file__).parent / "golden" / f"{name}.safetensors")
        self.model = NestedNet().double()
        prefix = "in.state."
        state = {k.removeprefix(prefix): v for k, v in self.of.items() if k.startswith(prefix)}
        self.model.load_state_dict(state)
        self.net = FunctionalModel(self.model)
        x, y = self.of["in.train.x"], self.of["in.train.y"]
        self.batches = []
        while f"in.inner.{len(self.batches)}.indices" in self.of:
            rows = self.of[f"in.inner.{len(self.batches)}.indices"]
            self.batches.append((x[rows][None], y[rows][None]))
        rows = self.of["in.implicit.indices"]
        self.following = (x[rows][None], y[rows][None])
        self.validation = (self.of["in.val.x"][None], self.of["in.val.y"][None])
        self.profile_batches = []
        while f"in.stats.{len(self.profile_batches)}.indices" in self.of:
            rows = self.of[f"in.stats.{len(self.profile_batches)}.indices"]
            self.profile_batches.append(x[rows])
        self.hyperparams = Hyperparams(
            self.of["out.betas"][None], self.of["out.effective_rates"][None], self.net.sites
        )

    def metanets(self) -> MetaNets:
        """Return the case's meta-nets, BNNet's input in forward order."""
        nets = MetaNets(self.net.sites, config=MetaNetsConfig.published()).double()
        with torch.no_grad():
            for ours, theirs in LRNET.items():
                for part in ("weight", "bias"):
                    nets.get_parameter(f"{ours}.{part}").copy_(self.of[f"in.lrnet.{theirs}.{part}"])
            for ours, theirs in BNNET.items():
                for part in ("weight", "bias"):
                    first = ours.endswith("hidden1") and part == "weight"
                    source = "in.bnnet_fwd" if first else "in.bnnet_ref"
                    nets.get_parameter(f"{ours}.{part}").copy_(self.of[f"{source}.{theirs}.{part}"])
            nets.base.copy_(self.of["in.base_rates"])
        return nets


@pytest.fixture(params=["case_a", "case_b"])
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-8) -> None:
    """Compare relatively to the largest entry."""
    assert ours.shape == theirs.shape
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error < tolerance, f"relative error {error:.2e}"


def test_profile(golden: Golden) -> None:
    seen = profile(golden.model, golden.profile_batches)
    close(seen.divergence, golden.of["out.kl_forward"])
    close(seen.moments[:, 0], golden.of["out.features_mean"])
    close(seen.moments[:, 1], golden.of["out.features_std"])


def test_hyperparams_from_profile(golden: Golden) -> None:
    ours = golden.metanets()(profile(golden.model, golden.profile_batches))
    close(ours.mix, golden.of["out.betas"])
    close(ours.rate, golden.of["out.effective_rates"])


def test_inner_loop(golden: Golden) -> None:
    net, hyper = golden.net, golden.hyperparams
    first = net.start(1, "published")
    logits, _ = net.logits(first, hyper.mix, golden.batches[0][0], training=True)
    close(logits[0], golden.of["out.train_forward_first_batch"])
    state = run_inner_loop(net, hyper, golden.batches, statistics="published")
    for name, value in state.params.items():
        close(value[0], golden.of[f"out.theta.{name}"])
    for name in net.sites.norms:
        close(state.stats[f"{name}.client_mean"][0], golden.of[f"out.running.{name}.running_mean"])
        close(state.stats[f"{name}.client_var"][0], golden.of[f"out.running.{name}.running_var"])
    logits, _ = net.logits(state, hyper.mix, golden.validation[0], training=False)
    close(logits[0], golden.of["out.val_logits"])
    loss = cross_entropy(logits, golden.validation[1])
    close(loss, golden.of["out.val_loss"].reshape(1))


@pytest.mark.parametrize("psi", [0.1, 0.01])
def test_hypergradient_of_the_metanets(golden: Golden, psi: float) -> None:
    ours = hypergradient_of(
        golden.net,
        golden.hyperparams,
        golden.batches,
        golden.validation,
        config=HypergradientConfig(mode="published", psi=psi, terms=3),
        following=golden.following,
        statistics="published",
    )
    nets = golden.metanets()
    written = nets(profile(golden.model, golden.profile_batches))
    torch.autograd.backward([written.mix, written.rate], [ours.mix[0], ours.rate[0]])
    implicit = f"out.hyper_implicit_psi{psi}_K3"
    close(nets.base.grad, golden.of[f"{implicit}.base_rates"])
    for name, theirs in LRNET.items():
        for part in ("weight", "bias"):
            key = f"{implicit}.lrnet.{theirs}.{part}"
            if key in golden.of:
                close(nets.get_parameter(f"{name}.{part}").grad, golden.of[key])
    for name, theirs in BNNET.items():
        for part in ("weight", "bias"):
            end = f"bnnet_ref.{theirs}.{part}"
            if f"{implicit}.{end}" in golden.of:
                expected = golden.of[f"{implicit}.{end}"] + golden.of[f"out.hyper_direct.{end}"]
                if name == "bnnet.hidden1" and part == "weight":
                    expected = expected.flip(1)  # the reference lists divergences last layer first
                close(nets.get_parameter(f"{name}.{part}").grad, expected)


def test_last_step_mode_is_the_derivative_through_the_last_step(golden: Golden) -> None:
    ours = hypergradient_of(
        golden.net,
        golden.hyperparams,
        golden.batches,
        golden.validation,
        config=HypergradientConfig(mode="last-step"),
        statistics="published",
    )
    close(ours.rate[0], golden.of["out.dval_drates_last_step"])


def test_unrolled_equals_the_references_own_finite_differences(golden: Golden) -> None:
    ours = hypergradient_of(
        golden.net,
        golden.hyperparams,
        golden.batches,
        golden.validation,
        config=HypergradientConfig(mode="unrolled"),
        statistics="published",
    )
    close(ours.mix[0], golden.of["out.fd_dbetas"], 1e-6)
    close(ours.rate[0], golden.of["out.fd_drates"], 1e-6)
