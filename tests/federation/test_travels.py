"""What leaves a client: every message of a whole run is read, by its fields and byte by byte."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from fedl2p import models, recipes
from fedl2p.core.metanets import MetaNets
from fedl2p.core.profile_groups import GROUPS
from fedl2p.core.profiles import Profile, Profiler
from fedl2p.core.settings import PROFILE_GROUPS, PUBLISHED_PROFILE, InnerLoop
from fedl2p.core.sites import find_sites
from fedl2p.data.population import Population
from fedl2p.federation.flower import records
from fedl2p.federation.flower.clients import OnFlower
from fedl2p.federation.messages import WEIGHT
from fedl2p.method import Method, State
from fedl2p.runs.columns import SCORES
from fedl2p.study import engines
from fedl2p.study.run import run_study
from fedl2p.study.settings import Study
from support.flower_grid import NodeGrid

pytest.importorskip("sklearn")

Number = float | int

# All that a client may say in numbers, by what it was asked: how many examples it has, and the loss
# and accuracy of the state that it received or of its personalized model.
TRAIN, VALIDATE, PERSONALIZE = records.MESSAGE_TYPES.values()
METRICS = {
    TRAIN: {WEIGHT, "loss", "accuracy"},
    VALIDATE: {WEIGHT, "loss", "accuracy"},
    PERSONALIZE: set(SCORES),
}
QUESTION = {"method", "stage", "round", "model", "seed"}


@dataclass(frozen=True)
class Said:
    """A question to one client, and its answer."""

    client: str
    kind: str
    question: RecordDict
    answer: RecordDict


class Reading(NodeGrid):
    """Keeps a copy of every question and answer, as bytes on a wire would hold them."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.said: list[Said] = []

    def send_and_receive(self, messages: Iterable[Message], **options: Any) -> list[Message]:
        asked = list(messages)
        questions = {m.metadata.dst_node_id: m.content for m in asked}
        names = self.node.population.names
        replies = super().send_and_receive(asked, **options)
        for reply in replies:
            assert not reply.has_error(), reply.error.reason
            node = reply.metadata.src_node_id
            kind = reply.metadata.message_type
            self.said.append(Said(names[(node - 3) // 7], kind, questions[node], reply.content))
        return replies


def arrays(content: RecordDict, key: str = records.ARRAYS) -> dict[str, Tensor]:
    record = content.get(key)
    return records.decode_state(record) if isinstance(record, ArrayRecord) else {}


# --- what may be said -------------------------------------------------------------------------


def strange_fields(said: Said) -> Iterator[str]:
    """Yield what an answer holds beyond what was asked for."""
    if said.kind == records.QUERY:
        allowed: dict[str, Any] = {records.CONFIG: {"client", "models", "version"}}
    else:
        allowed = {records.METRICS: METRICS[said.kind]}
        if said.kind == TRAIN:
            allowed[records.ARRAYS] = arrays(said.question).keys()
    for key, record in said.answer.items():
        if key not in allowed:
            yield f"record {key!r}"
            continue
        yield from (f"{key} {name!r}" for name in record.keys() - allowed[key])
        if isinstance(record, MetricRecord):
            several = (name for name, value in record.items() if not isinstance(value, Number))
            yield from (f"a list in {name!r}" for name in several)
    sent, back = arrays(said.question), arrays(said.answer)
    for name in back.keys() & sent.keys():
        if (back[name].shape, back[name].dtype) != (sent[name].shape, sent[name].dtype):
            yield f"another shape of {name!r}"


def strange_questions(said: Said) -> Iterator[str]:
    """Yield what a question holds beyond a state, the frozen model and the job."""
    if said.kind == records.QUERY:
        yield from (f"record {key!r}" for key in said.question)
        return
    yield from (
        f"record {k!r}"
        for k in said.question.keys() - {records.ARRAYS, records.MODEL, records.CONFIG}
    )
    config = records.record_of(said.question, records.CONFIG, ConfigRecord)
    yield from (f"config {name!r}" for name in config.keys() - QUESTION)


# --- what may not, whatever it is called --------------------------------------------------------


@dataclass(frozen=True)
class Secret:
    """Numbers of one client that nobody else may see, in their order."""

    what: str
    values: Tensor


def secrets_of(population: Population, name: str, profiles: list[Profile]) -> list[Secret]:
    """Return a client's profiles, label counts and samples, in the forms they may take."""
    data = population.open(name)
    secrets = []
    for part in (data.train, data.validation, data.test):
        assert part is not None
        counts = torch.bincount(part.y, minlength=population.classes).float()
        secrets += [
            Secret("label counts", counts),
            Secret("label shares", counts / counts.sum()),
            Secret("labels", part.y[:8].float()),
        ]
        secrets += [Secret("a sample", x.flatten()[:16]) for x in part.x[:4].float()]
        secrets += [Secret("a sample", x.flatten()[-16:]) for x in part.x[:4].float()]
    for profile in profiles:
        divergence, moments = profile.divergence, profile.moments
        secrets += [
            Secret("divergences", divergence),
            Secret("log divergences", divergence.log1p()),
            Secret("log divergences", (divergence + 1e-3).log() + 1.5),
            Secret("moments", moments.flatten()),
            Secret("moments", moments.T.flatten()),
            *(Secret("a layer's moments", pair) for pair in moments),
        ]
        for group in set(PROFILE_GROUPS) - set(PUBLISHED_PROFILE):
            entries = profile.entries(group)
            secrets += [Secret(group, entries), Secret(group, GROUPS[group].as_read(entries))]
    # A constant run (an empty background) is in every vector of equal numbers.
    return [s for s in secrets if len(s.values) > 1 and s.values.unique().numel() > 1]


def revealed(content: RecordDict, secrets: Iterable[Secret]) -> Iterator[str]:
    """Yield the secrets whose numbers stand next to one another anywhere in a message."""
    numbers = [t.flatten().double() for t in arrays(content).values() if t.numel()]
    for record in content.values():
        if isinstance(record, MetricRecord):
            numbers += [
                torch.tensor(v if isinstance(v, list) else [v]).double() for v in record.values()
            ]
    # Between two tensors stands what equals nothing.
    parts = [part for n in numbers for part in (n, n.new_full((1,), torch.nan))]
    everything = torch.cat(parts or [torch.empty(0, dtype=torch.float64)])
    for secret in secrets:
        wanted = secret.values.double()
        starts = (everything - wanted[0]).abs().le(1e-6).nonzero().flatten().tolist()
        there = [everything[s : s + len(wanted)] for s in starts]
        if any(t.shape == wanted.shape and bool((t - wanted).abs().le(1e-6).all()) for t in there):
            yield secret.what


# --- runs -------------------------------------------------------------------------------------


def small(**changes: Any) -> Study:
    """Every default method with the default settings, few rounds and epochs."""
    study = recipes.get("smoke")
    return dataclasses.replace(
        study,
        pretrain=dataclasses.replace(study.pretrain, rounds=3),
        learn=dataclasses.replace(study.learn, rounds=2),
        settings=dataclasses.replace(
            study.settings, finetune=InnerLoop(epochs=1, batch_size=16), alone_steps=1
        ),
        **changes,
    )


def conversation(study: Study, *more: Method) -> tuple[Reading, dict[str, list[Secret]]]:
    """Run a study and return all that was said, and each client's secrets."""
    population = study.data.open(study.seed)
    node = engines.node_of(study, population)
    node.methods.update({method.name: method for method in more})
    grid = Reading(node)
    run_study(study, clients=OnFlower(grid))  # type: ignore[arg-type]
    return grid, secrets(grid, study, population)


def secrets(grid: Reading, study: Study, population: Population) -> dict[str, list[Secret]]:
    """Profile every client under every model that nodes were ever sent, and the initial one."""
    model = models.build(
        study.model, shape=population.shape, classes=population.classes, seed=study.seed
    )
    weights: dict[str, State] = {"initial": copy.deepcopy(dict(model.state_dict()))}
    for said in grid.said:
        if records.MODEL in said.question:
            key = records.record_of(said.question, records.CONFIG, ConfigRecord)["model"]
            weights[str(key)] = arrays(said.question, records.MODEL)
    assert len(weights) > 1
    profiles: dict[str, list[Profile]] = {name: [] for name in population.names}
    for state in weights.values():
        model.load_state_dict(state)
        profiler = Profiler(model)
        for name in population.names:
            profiles[name].append(profiler([population.open(name).train], PROFILE_GROUPS))
    return {name: secrets_of(population, name, profiles[name]) for name in population.names}


@pytest.fixture(scope="module")
def default() -> tuple[Reading, dict[str, list[Secret]]]:
    return conversation(small())


@pytest.mark.slow
def test_every_kind_of_message_was_read(default: tuple[Reading, Any]) -> None:
    kinds = {said.kind for said in default[0].said}
    assert kinds == {records.QUERY, *records.ACTIONS}
    asked = {
        str(records.record_of(said.question, records.CONFIG, ConfigRecord)["method"])
        for said in default[0].said
        if said.kind == PERSONALIZE
    }
    assert asked == set(small().methods), "all methods that a study runs by default"


def test_a_client_says_nothing_but_states_counts_losses_and_accuracies(
    default: tuple[Reading, Any],
) -> None:
    for said in default[0].said:
        assert [*strange_fields(said)] == [], (said.client, said.kind)
        assert [*strange_questions(said)] == [], (said.client, said.kind)


def test_no_profile_label_count_or_sample_is_in_any_message(
    default: tuple[Reading, dict[str, list[Secret]]],
) -> None:
    grid, hidden = default
    for said in grid.said:
        assert [*revealed(said.answer, hidden[said.client])] == [], (said.client, said.kind)
    # What the server sends on holds nobody's secrets either.
    everybody = [secret for own in hidden.values() for secret in own]
    questions = {id(s.question): s for s in grid.said if s.kind == PERSONALIZE}
    for said in list(questions.values())[:: len(grid.contexts)]:
        assert [*revealed(said.question, everybody)] == []


def test_the_model_travels_once_to_each_node_and_then_the_meta_nets(
    default: tuple[Reading, Any],
) -> None:
    journeys: list[tuple[str, str]] = []
    learning: list[Said] = []
    for said in default[0].said:
        if said.kind == records.QUERY:
            continue
        config = records.record_of(said.question, records.CONFIG, ConfigRecord)
        if records.MODEL in said.question:
            journeys.append((said.client, str(config["model"])))
        if config["stage"] == "learn":
            learning.append(said)
    assert len(journeys) == len(set(journeys)) == len(default[0].contexts)
    study = small()
    population = study.data.open(study.seed)
    model = models.build(study.model, shape=population.shape, classes=population.classes, seed=0)
    nets = MetaNets(find_sites(model), config=study.settings.meta.nets).state_dict()
    assert learning
    for said in learning:
        assert arrays(said.question).keys() == nets.keys()
        assert all(arrays(said.question)[k].shape == nets[k].shape for k in nets)


# --- the readers above find what they look for --------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "strange"),
    [
        (RecordDict({records.METRICS: MetricRecord({"labels": [1, 2]})}), "metrics 'labels'"),
        (RecordDict({records.METRICS: MetricRecord({"loss": [1.0, 2.0]})}), "a list in 'loss'"),
        (RecordDict({"more": MetricRecord({"loss": 1.0})}), "record 'more'"),
        (
            RecordDict({records.ARRAYS: records.encode_state({"profile": torch.ones(2)})}),
            "arrays 'profile'",
        ),
        (
            RecordDict({records.ARRAYS: records.encode_state({"w": torch.ones(3)})}),
            "another shape of 'w'",
        ),
    ],
)
def test_the_reader_of_fields_sees_what_is_strange(answer: RecordDict, strange: str) -> None:
    question = RecordDict({records.ARRAYS: records.encode_state({"w": torch.ones(2)})})
    assert strange in list(strange_fields(Said("c", TRAIN, question, answer)))


def test_the_reader_of_numbers_sees_a_secret_inside_a_larger_array() -> None:
    secret = Secret("moments", torch.tensor([0.25, 3.5, -1.0]))
    held = {"w": torch.tensor([[9.0, 0.25], [3.5, -1.0]])}
    content = RecordDict({records.ARRAYS: records.encode_state(held)})
    assert list(revealed(content, [secret])) == ["moments"]
    apart = {"w": torch.tensor([0.25, 3.5]), "v": torch.tensor([-1.0])}
    content = RecordDict({records.ARRAYS: records.encode_state(apart)})
    assert list(revealed(content, [secret])) == []
    counts = RecordDict({records.METRICS: MetricRecord({"counts": [0.25, 3.5, -1.0]})})
    assert list(revealed(counts, [secret])) == ["moments"]
