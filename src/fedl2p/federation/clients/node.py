"""The client's side: what happens on a node when messages arrive, on every engine alike."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from torch import nn

from fedl2p.core.clientdata import ClientData
from fedl2p.data.pools.opened import KEEP_BYTES, Opened, size_of
from fedl2p.data.population import Population
from fedl2p.federation.clients.received_models import ModelStore
from fedl2p.federation.flower import records, shared_nodes
from fedl2p.federation.privacy.noise import privatised
from fedl2p.federation.privacy.randomness import seeded, system
from fedl2p.federation.privacy.settings import Privacy
from fedl2p.federation.server.answer_checks import not_finite, objection, one_line
from fedl2p.method import Client, Method, Outcome, State, Update
from fedl2p.runs.client_files import write_strategy

log = logging.getLogger("fedl2p")

KEEP_BYTES_GPU = 4 << 30

T = TypeVar("T", Update, Outcome)

Keeper = Callable[[str, nn.Module, State, Outcome], None]
"""``keeper(method, model, state, outcome)`` writes down a client that was personalized."""

Answer = RecordDict | str
"""The content of a reply, or in one line why there is none."""


@dataclass(frozen=True)
class Job:
    """What all messages of one call ask for."""

    action: str
    method: str
    stage: str
    round: int
    model: str


@dataclass(frozen=True)
class Task:
    """One client's part of a call."""

    message: Message
    context: Context
    client: str
    seed: int


class Handler:
    """Answers messages for the clients that live in this process.

    Parameters
    ----------
    build
        Returns the model; called once. Its weights are those that every node has from the start;
        others arrive with a message, once per node, and are then known by their content hash.
    population
        Opens the data of the clients.
    methods
        Methods by name.
    device
        Where the models, states and data are.
    folder
        Where the files that stay with the clients are written (see
        :func:`~fedl2p.runs.client_files.write_strategy`); None to write none.
    models
        Folder for the global models that arrive; None to remember them in this process alone.
    keeper
        Called with the method's name, the global model, the state and the outcome of a personalized
        client, whose ``model`` is then set; None where nobody needs the personalized models.
    live
        True if replies may carry the tensors themselves (in process), False to encode them.
    keep_bytes
        Most bytes of clients' data that stay in memory between calls, and that one call of a
        method is given, but for a single larger client; None for 128 MiB, on a GPU 4 GiB.
    privacy
        What local privacy a method's updates get before they leave, by method name; the node's own
        settings, so that no message can switch it off. A method that is not named gets none.
    simulated
        True if all clients are in one process and local noise may come from the study's seed.
    """

    def __init__(
        self,
        *,
        build: Callable[[], nn.Module],
        population: Population,
        methods: Mapping[str, Method],
        device: torch.device | str = "cpu",
        folder: Path | None = None,
        models: Path | None = None,
        keeper: Keeper | None = None,
        live: bool = True,
        keep_bytes: int | None = None,
        privacy: Mapping[str, Privacy] | None = None,
        simulated: bool = False,
    ) -> None:
        self._local = {k: p for k, p in (privacy or {}).items() if p.mechanism == "local"}
        self._simulated = simulated
        self.population = population
        self.methods = dict(methods)
        self.folder = folder
        self.keeper = keeper
        self.live = live
        self.device = torch.device(device)
        self.model = build().to(self.device)
        self._models = ModelStore(models)
        self._loaded = self._models.add(dict(self.model.state_dict()), lasting=False)

        def open_data(name: str) -> ClientData:
            return population.open(name).to(self.device)

        usual = KEEP_BYTES if self.device.type == "cpu" else KEEP_BYTES_GPU
        self._keep_bytes = usual if keep_bytes is None else keep_bytes
        self._open = Opened(open_data, keep_bytes=self._keep_bytes)

    def remember(self, weights: State) -> str:
        """Keep a copy of a global model's weights and return their content hash."""
        return self._models.add(weights)

    def knows(self, key: str) -> bool:
        """Tell whether a global model is here, by its content hash."""
        return self._models.get(key) is not None

    def handle(self, messages: Sequence[Message], contexts: Sequence[Context]) -> list[Message]:
        """Answer messages that ask for the same: one of a SuperNode, or a cohort in process.

        Parameters
        ----------
        messages
            Messages of one action, method, round and state; each to another client.
        contexts
            The contexts of these clients, in the same order; their ``state`` holds what the
            clients keep and is updated.

        Returns
        -------
        list of Message
            One reply per message, in order. A client that fails gets an error reply that says why;
            the others are not concerned.
        """
        if messages[0].metadata.message_type == records.QUERY:
            pairs = zip(messages, contexts, strict=True)
            return [
                Message(self._introduce(context), reply_to=message) for message, context in pairs
            ]
        try:
            job, tasks = self._read(messages, contexts)
            for message in messages:
                self._receive_model(message)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            # A server may send anything; whoever runs the node must see its answer, not a trace.
            reason = one_line(f"the message cannot be read: {type(error).__name__}: {error}")
            error_reply = Error(records.CLIENT_FAILED, reason)
            return [Message(error_reply, reply_to=message) for message in messages]
        if any(_job(message) != job for message in messages[1:]):
            raise ValueError(
                "messages that ask for different things cannot be answered in one call"
            )
        if self._models.get(job.model) is None:
            unknown = Error(
                records.MODEL_UNKNOWN, f"model {job.model} is not here; send its weights"
            )
            return [Message(unknown, reply_to=message) for message in messages]
        work = self._work(job, messages[0])
        answers = [a for part in self._portions(tasks) for a in self._attempt(work, part)]
        if job.method in self._local and job.action != records.PERSONALIZE:
            answers = [self._guarded(job, t, a) for t, a in zip(tasks, answers, strict=True)]
        if job.action == records.PERSONALIZE:
            answers = [
                self._with_counts(task, answer) if isinstance(answer, str) else answer
                for task, answer in zip(tasks, answers, strict=True)
            ]
        return [_reply(task, answer) for task, answer in zip(tasks, answers, strict=True)]

    def _read(
        self, messages: Sequence[Message], contexts: Sequence[Context]
    ) -> tuple[Job, list[Task]]:
        """Return what the messages ask for; the first one speaks for all."""
        tasks = [
            Task(m, c, client_name(c, self.population), _config_int(m, "seed"))
            for m, c in zip(messages, contexts, strict=True)
        ]
        return _job(messages[0]), tasks

    def _introduce(self, context: Context) -> RecordDict:
        names = shared_nodes.clients_of(context, self.population)
        known = ConfigRecord({"models": list(self._models)})
        if len(names) == 1:
            known["client"] = names[0]
        else:
            known["clients"] = list(names)
        return RecordDict({records.CONFIG: known})

    def _receive_model(self, message: Message) -> None:
        if records.MODEL in message.content and self._models.get(_job(message).model) is None:
            self.remember(
                records.to_state(records.record_of(message.content, records.MODEL, ArrayRecord))
            )

    def _work(self, job: Job, message: Message) -> Callable[[Sequence[Task]], list[Answer]]:
        """Return the function that answers any number of clients of this job."""
        if job.method not in self.methods:
            text = f"method {job.method!r} is not here; there are {', '.join(self.methods)}"
            return lambda tasks: [text for _ in tasks]
        method = self.methods[job.method]

        def work(tasks: Sequence[Task]) -> list[Answer]:
            record = records.record_of(message.content, records.ARRAYS, ArrayRecord)
            model, state = self._load(job.model), records.to_state(record, device=self.device)
            clients = [self._client(job, task) for task in tasks]
            if job.action == records.TRAIN:
                updates = _in_order(clients, method.train(model, state, clients))
                pairs = zip(tasks, updates, strict=True)
                return [self._trained(job, state, task, update) for task, update in pairs]
            if job.action == records.VALIDATE:
                updates = _in_order(clients, method.validate(model, state, clients))
                return [update.failure or _metrics(update) for update in updates]
            outcomes = _in_order(clients, method.personalize(model, state, clients))
            return [self._personalized(job, model, state, outcome) for outcome in outcomes]

        return work

    def _portions(self, tasks: Sequence[Task]) -> Iterator[list[Task]]:
        """Cut a cohort so that memory does not grow with it: by the bytes of the clients' data."""
        portion: list[Task] = []
        filled = 0
        for task in tasks:
            try:
                size = size_of(self._open(task.client))
            except Exception:  # told when the client is worked on
                size = 0
            if portion and filled + size > self._keep_bytes:
                yield portion
                portion, filled = [], 0
            portion.append(task)
            filled += size
        yield portion

    def _attempt(
        self, work: Callable[[Sequence[Task]], list[Answer]], tasks: Sequence[Task]
    ) -> list[Answer]:
        """Answer a cohort; if that raises, one client at a time, so that only the culprits fail."""
        try:
            return work(tasks)
        except Exception as error:
            if len(tasks) > 1:
                return [answer for task in tasks for answer in self._attempt(work, [task])]
            log.debug("client %s raised", tasks[0].client, exc_info=True)
            return [one_line(f"{type(error).__name__}: {error}".partition("\n")[0])]

    def _load(self, key: str) -> nn.Module:
        if key != self._loaded:
            self._loaded = ""  # unknown while it is half done
            weights = self._models.get(key)
            assert weights is not None  # handle() has looked
            self.model.load_state_dict(weights)
            self._loaded = key
        return self.model

    def _client(self, job: Job, task: Task) -> Client:
        return Client(
            name=task.client,
            data=self._open(task.client),
            kept={k: v.to(self.device) for k, v in kept(task.context, job.method).items()},
            seed=task.seed,
            round=job.round,
            wants_model=self.keeper is not None and job.action == records.PERSONALIZE,
        )

    def _guarded(self, job: Job, task: Task, answer: Answer) -> Answer:
        """Return what may leave a client under local privacy: no metric, and no reason."""
        if isinstance(answer, str):
            log.warning("client %s failed: %s", task.client, answer)
            return "it failed; under local privacy the reason stays on the node"
        weight = RecordDict({records.METRICS: MetricRecord({records.WEIGHT: 1.0})})
        return answer if job.action == records.TRAIN else weight

    def _privatised(self, privacy: Privacy, state: State, task: Task, update: Update) -> Update:
        from_seed = privacy.seeded(simulated=self._simulated)
        draw = seeded(task.seed, "privacy") if from_seed else system
        return privatised(update, state, privacy, draw)

    def _trained(self, job: Job, state: State, task: Task, update: Update) -> Answer:
        failure = update.failure or objection(
            update.shared, like=state, weight=update.weight, metrics=update.metrics
        )
        if failure is None and (name := not_finite(update.kept)) is not None:
            failure = f"tensor {name!r} that it keeps holds NaN or infinity"
        privacy = self._local.get(job.method)
        if failure is not None and privacy is None:
            return failure
        if failure is None:
            keep(task.context, job.method, update.kept, live=self.live)
        else:
            log.warning("client %s failed and sends noise alone: %s", task.client, failure)
        if privacy is not None:
            told = dataclasses.replace(update, failure=failure)
            update = self._privatised(privacy, state, task, told)
        content = _metrics(update)
        content[records.ARRAYS] = records.to_record(update.shared, live=self.live)
        return content

    def _personalized(self, job: Job, model: nn.Module, state: State, outcome: Outcome) -> Answer:
        if outcome.failure is not None:
            return outcome.failure
        if self.folder is not None:
            write_strategy(self.folder, job.method, outcome)
        if self.keeper is not None:
            self.keeper(job.method, model, state, outcome)
        numbers = {name: getattr(outcome, name) for name in OUTCOME_NUMBERS}
        return RecordDict({records.METRICS: MetricRecord(numbers)})

    def _with_counts(self, task: Task, reason: str) -> Answer:
        """Let a client that could not be personalized say how many examples it has.

        An error reply has room for a reason only, so this is none.
        """
        try:
            data = self._open(task.client)
        except Exception:  # then that is the reason
            return reason
        tested = 0 if data.test is None else len(data.test.y)
        counts = MetricRecord({"num_train": len(data.train.y), "num_test": tested})
        return RecordDict(
            {records.METRICS: counts, records.CONFIG: ConfigRecord({FAILURE: reason})}
        )


FAILURE = "failure"
"""Where the answer of a client that could not be personalized says why."""

OUTCOME_NUMBERS = (
    *("num_train", "num_test", "accuracy_before", "accuracy"),
    *("loss_before", "loss", "seconds"),
)
"""What of an :class:`~fedl2p.method.Outcome` travels, besides the failure."""


def client_name(context: Context, population: Population) -> str:
    """Return which client a node is.

    Raises
    ------
    ValueError
        If it is none, or several.
    """
    names = shared_nodes.clients_of(context, population)
    if len(names) != 1:
        raise ValueError(f"this node is {len(names)} clients, so a message must say which it means")
    return names[0]


def kept_key(method: str) -> str:
    """Return the key under which a context holds what a client keeps for a method."""
    return f"kept.{method}"


def kept(context: Context, method: str) -> State:
    """Return what a client has kept for a method; empty if nothing."""
    record = context.state.get(kept_key(method))
    return records.to_state(record) if isinstance(record, ArrayRecord) else {}


def keep(context: Context, method: str, state: State, *, live: bool) -> None:
    """Replace what a client keeps for a method."""
    context.state.pop(kept_key(method), None)
    if state:
        context.state[kept_key(method)] = records.to_record(state, live=live)


def _job(message: Message) -> Job:
    config = records.record_of(message.content, records.CONFIG, ConfigRecord)
    action = message.metadata.message_type
    if action not in records.ACTIONS:
        raise ValueError(f"it asks for {action!r}; there are {', '.join(records.ACTIONS)}")
    return Job(
        action=action,
        method=str(config["method"]),
        stage=str(config["stage"]),
        round=_config_int(message, "round"),
        model=str(config["model"]),
    )


def _config_int(message: Message, key: str) -> int:
    value = records.record_of(message.content, records.CONFIG, ConfigRecord)[key]
    if not isinstance(value, int):
        raise ValueError(f"{key} is {value!r} in the message, but must be an integer")
    return value


def _metrics(update: Update) -> RecordDict:
    return RecordDict(
        {records.METRICS: MetricRecord({records.WEIGHT: float(update.weight), **update.metrics})}
    )


def _in_order(clients: Sequence[Client], answers: Sequence[T]) -> Sequence[T]:
    asked, answered = [c.name for c in clients], [a.client for a in answers]
    if asked != answered:
        raise ValueError(f"the method was asked for {asked} but answered for {answered}")
    return answers


def _reply(task: Task, answer: Answer) -> Message:
    if isinstance(answer, str):
        return Message(Error(records.CLIENT_FAILED, answer), reply_to=task.message)
    return Message(answer, reply_to=task.message)
