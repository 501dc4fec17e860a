"""What a server learns of a client's profile from one update, under each privacy setting.

    python examples/inversion.py

In a round of FedL2P a client sends the meta-nets after one step along its hypergradient. The
gradient of a net's first weight matrix is the outer product of a vector and the net's input, and
the gradient of its bias is that vector. So the input is the one divided by the other: the client's
profile, whatever the step's length was clipped to. No secret of the client is used here but its
update; what is recovered is then compared with what the client had.

Printed per setting: the relative error of the recovered divergences (median over clients and norm
layers; near 1 nothing is recovered), and of how many clients the recovered profile is nearer to
their own than to any other client's. With the profile the server has the hyperparameters too: it
has the nets that write them.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedl2p import (
    MetaNets,
    Method,
    Outcome,
    Population,
    Privacy,
    Profile,
    Rounds,
    federate,
    find_sites,
    methods,
    models,
)
from fedl2p.data.digits import Digits
from fedl2p.federation.clients.node import ClientNode
from fedl2p.federation.messages import Action, FrozenModel, Question
from fedl2p.method import State
from fedl2p.recipes import get
from fedl2p.seeds import derive_seed

NOISES = (0.00001, 0.0001, 0.001, 0.01)
TOGETHER = 10


@dataclass(frozen=True)
class Recovered:
    """How well profiles are recovered: the median relative error, and a share of clients."""

    setting: str
    divergences: float
    identified: float

    def __str__(self) -> str:
        return f"{self.setting:28} {self.divergences:12.2g} {100 * self.identified:10.0f} %"


def invert(sent: State, returned: State, nets: MetaNets) -> Tensor:
    """Return the divergences of the profile that a client's update holds, shape (B,).

    The other groups of the profile stand behind them in the same vector.

    Parameters
    ----------
    sent, returned
        The meta-nets before and after the client's step.
    nets
        Their form, with the weights that were sent.
    """
    weight, bias = (
        (returned[f"lrnet.hidden1.{k}"] - sent[f"lrnet.hidden1.{k}"]).double()
        for k in ("weight", "bias")
    )
    inputs = (weight * bias[:, None]).sum(0) / bias.square().sum()
    # Back through the nets' own shift and scale, which every server knows, and the logarithm.
    inputs = inputs / sent["input_scale.scale"].double() + sent["input_scale.shift"].double()
    assert nets.config.groups[0] == "divergences"
    divergence = inputs[: len(nets.sites.norms)]
    return ((divergence - 1.5).clamp(max=50).exp() - 1e-3).clamp(min=0)


def measure(*, clients: int, pretrain: int, seed: int) -> list[Recovered]:
    """Return what is recovered under each setting, without privacy first."""
    study = get("digits_sensors")
    population = Digits(seen=clients, unseen=0).open(seed)
    model = models.build(study.model, shape=population.shape, classes=population.classes, seed=seed)
    model = pretrained(model, population, rounds=pretrain, seed=seed)
    method = methods.build("fedl2p", study.settings)
    state = method.start(model, seed=derive_seed(seed, "start", method.name))
    nets = MetaNets(find_sites(model), config=study.settings.meta.nets)
    nets.load_state_dict(state)
    truth = profiles_of(model, population, method, state, seed=seed)

    def updates(privacy: Privacy) -> dict[str, State]:
        node = ClientNode(
            build=lambda: model,
            population=population,
            methods={method.name: method},
            privacy={method.name: privacy},
        )
        answers = node.answer(question("train", model, method.name, state, population, seed), {})
        return {a.client: a.update.shared for a in answers if a.update is not None}

    rows = []
    plain = updates(Privacy())
    rows.append(compared("none (the default)", plain, truth, state, nets))
    for noise in NOISES:
        privacy = Privacy(mechanism="local", noise=noise, clip=study.learn.privacy.clip)
        rows.append(compared(f"local noise {noise:g}", updates(privacy), truth, state, nets))
    names = sorted(plain)
    groups = [names[i : i + TOGETHER] for i in range(0, len(names), TOGETHER)]
    mixed = {}
    for group in groups:
        mean = {k: torch.stack([plain[n][k] for n in group]).mean(0) for k in state}
        mixed |= dict.fromkeys(group, mean)
    rows.append(compared(f"only the sum of {TOGETHER} is seen", mixed, truth, state, nets))
    return rows


def pretrained(model: nn.Module, population: Population, *, rounds: int, seed: int) -> nn.Module:
    """Return the model after some rounds of FedAvg."""
    study = get("digits_sensors")
    fedavg = methods.build("fedavg", study.settings)
    some = Rounds(rounds=rounds, clients_per_round=min(10, len(population.seen)), keep="last")
    done = federate(fedavg, model, population, rounds=some, seed=seed, stage="pretrain")
    model.load_state_dict(done.state)
    return model


def profiles_of(
    model: nn.Module, population: Population, method: Method, state: State, *, seed: int
) -> dict[str, Profile]:
    """Return what every client has, as its own node sees it."""
    found: dict[str, Profile] = {}

    def note(name: str, model: nn.Module, state: object, outcome: Outcome) -> None:
        assert outcome.profile is not None
        found[outcome.client] = outcome.profile

    node = ClientNode(
        build=lambda: model,
        population=population,
        methods={method.name: method},
        on_personalized=note,
    )
    list(node.answer(question("personalize", model, method.name, state, population, seed), {}))
    return found


def question(
    action: Action,
    model: nn.Module,
    method: str,
    state: State,
    population: Population,
    seed: int,
) -> Question:
    """Return a question to all clients."""
    seeds = {name: derive_seed(seed, "inversion", 1, name) for name in population.seen}
    return Question(
        action=action,
        method=method,
        stage="learn",
        round=1,
        state=state,
        model=FrozenModel.of(model),
        seeds=seeds,
    )


def compared(
    setting: str,
    updates: Mapping[str, State],
    truth: Mapping[str, Profile],
    state: State,
    nets: MetaNets,
) -> Recovered:
    """Return how near the recovered profiles are to the clients' own."""
    own = {name: truth[name].divergence.double() for name in sorted(updates)}
    errors, hits = [], 0
    for name, update in updates.items():
        seen = invert(state, update, nets)
        errors += ((seen - own[name]).abs() / own[name].abs().clamp(min=1e-12)).tolist()
        logs = {
            other: (torch.log(1e-3 + seen) - torch.log(1e-3 + value)).square().sum()
            for other, value in own.items()
        }
        hits += min(logs, key=logs.__getitem__) == name
    return Recovered(setting, _median(errors), hits / len(updates))


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--clients", type=int, default=40)
    parser.add_argument("--pretrain", type=int, default=20, help="rounds of FedAvg before")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(f"{'what the server sees':28} {'divergences':>12} {'identified':>12}")
    for row in measure(clients=args.clients, pretrain=args.pretrain, seed=args.seed):
        print(row)


if __name__ == "__main__":
    main()
