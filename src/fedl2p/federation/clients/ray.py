"""Flower on Ray: a Grid whose cohorts are answered by worker processes, many at a time.

Flower's own simulation (``flwr run``) also runs on Ray and takes the same app; it hands out one
client per task and looks for messages ten times a second. Here a task is a whole cohort, as in
process, what clients keep stays in this process where checkpoints find it, and nothing waits.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict

from fedl2p.federation.clients.local_grid import LocalGrid, Part
from fedl2p.federation.clients.node import Handler, kept_key
from fedl2p.federation.clients.ray_settings import Ray, available_cpus
from fedl2p.federation.flower import records
from fedl2p.federation.rounds import FederationError
from fedl2p.method import State

log = logging.getLogger("fedl2p")

# Ray keeps sockets in its folder, and a socket's path may have 107 characters on Linux.
_LONGEST_FOLDER = 40

# Ray gives its daemons a fixed time to come up, which a machine under heavy load may exceed.
_ATTEMPTS = 3


class Worker:
    """What a worker process holds from the first task to the last: a handler with model and data.

    Parameters
    ----------
    make
        Makes the handler, on the worker.
    threads
        Threads to compute with.
    """

    def __init__(self, make: Callable[[], Handler], threads: int) -> None:
        torch.set_num_threads(threads)
        self.handler = make()

    def knows(self, key: str) -> bool:
        """Tell whether a global model is here."""
        return self.handler.knows(key)

    def remember(self, key: str, weights: ArrayRecord) -> None:
        """Keep a global model, if it is not here yet."""
        if not self.handler.knows(key):
            self.handler.remember(records.to_state(weights))

    def answer(
        self, state: ArrayRecord | None, messages: list[Message], contexts: list[Context]
    ) -> tuple[list[Message], list[RecordDict]]:
        """Answer one part; return the replies and what each client keeps now.

        Parameters
        ----------
        state
            The tensors that all messages carry, if any.
        messages, contexts
            As :meth:`~fedl2p.federation.clients.node.Handler.handle` takes them, without ``state``.
        """
        for message in messages:
            if state is not None:
                message.content[records.ARRAYS] = state
        replies = self.handler.handle(messages, contexts)
        return replies, [context.state for context in contexts]


class RayGrid(LocalGrid):
    """A Flower grid whose nodes are the clients of a population, answered by Ray's workers.

    Ray starts with the first messages, on this machine alone, and stops with :meth:`close`; where
    this process uses Ray already, that one is used and left running.

    Parameters
    ----------
    make
        Makes the clients' side; called once on each worker.
    names
        The clients, in the order of the population.
    cohort
        Most clients in one call, and so in one task; > 0.
    resources
        How many workers, with what.

    Raises
    ------
    ValueError
        If ``cohort`` is not positive, or no worker fits into this machine.
    ModuleNotFoundError
        If Ray is not installed.
    """

    def __init__(
        self,
        make: Callable[[], Handler],
        names: Sequence[str],
        *,
        cohort: int = 1,
        resources: Ray | None = None,
    ) -> None:
        if cohort == 0:
            raise ValueError(
                "cohort is 0, all clients in one call, but workers need parts to share"
            )
        super().__init__(names, cohort=cohort, live=False)
        # Before Ray is imported, which reports its use to its makers unless told not to; and it
        # warns of a future in which workers without a GPU see all of them, which is now.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        import ray

        self._ray: Any = ray
        self._make = make
        self._resources = resources or Ray()
        self._cpus, self._gpus = available_cpus(), torch.cuda.device_count()
        if self._ray.is_initialized():
            there = self._ray.cluster_resources()
            self._cpus, self._gpus = int(there.get("CPU", 0)), int(there.get("GPU", 0))
        self._count = self._resources.fitting(cpus=self._cpus, gpus=self._gpus)
        self._workers: list[Any] = []
        self._folder: str | None = None

    def answer(
        self, parts: Sequence[Part], timeout: float | None
    ) -> Iterator[tuple[int, Sequence[Message]]]:
        """Yield place and replies of each part; whoever of the workers is free takes the next one.

        A worker that dies fails the clients of its part and is replaced; so is one that is still
        busy when the time is over, whose part is left out.
        """
        self._start()
        # Whoever has died since or is just starting: no question's clock runs meanwhile.
        self._ask_all(lambda worker: worker.knows.remote(""))
        self._give_models(parts)
        state = self._share_state(parts)
        waiting, busy = deque(range(len(parts))), dict[Any, tuple[int, Any]]()
        idle = list(self._workers)
        end = None if timeout is None else time.monotonic() + timeout

        def hand_out() -> None:
            while waiting and idle:
                place, worker = waiting.popleft(), idle.pop()
                busy[worker.answer.remote(state, *_lean(parts[place]))] = (place, worker)

        hand_out()
        while busy:
            left = None if end is None else max(0.0, end - time.monotonic())
            ready, _ = self._ray.wait(list(busy), timeout=left)
            if not ready:
                for _, worker in busy.values():
                    self._replace(worker)
                break
            place, worker = busy.pop(ready[0])
            replies, alive = self._collect(ready[0], parts[place])
            idle.append(worker if alive else self._replace(worker))
            hand_out()  # nobody is idle while the replies are looked at
            yield place, replies

    def remember(self, weights: State) -> str:
        """Let every worker know a global model; return its content hash."""
        self._start()
        key = records.content_hash(weights)
        self._give(key, records.to_record(weights, live=False))
        return key

    def close(self) -> None:
        """Stop the workers, and Ray if it was started here; nothing of them stays."""
        for worker in self._workers:
            self._ray.kill(worker)
        self._workers.clear()
        if self._folder is not None:
            self._ray.shutdown()
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _start(self) -> None:
        if self._workers:
            return
        if not self._ray.is_initialized():
            self._start_ray()
        self._workers = [self._new() for _ in range(self._count)]
        log.info("ray: %d workers with %d threads each", self._count, self._resources.threads)

    def _start_ray(self) -> None:
        """Start Ray on this machine alone, in a folder of its own; try again where it is slow."""
        for attempt in range(_ATTEMPTS):
            self._folder = _short_folder()
            try:
                with _search_path():
                    self._ray.init(
                        address="local",
                        num_cpus=self._cpus,
                        num_gpus=self._gpus,
                        include_dashboard=False,
                        log_to_driver=False,
                        logging_level=logging.ERROR,
                        _temp_dir=self._folder,
                    )
                return
            except BaseException as problem:
                self.close()
                if not isinstance(problem, Exception):
                    raise
                reason = " ".join(str(problem).split())
                log.warning("ray: start %d of %d failed: %s", attempt + 1, _ATTEMPTS, reason)
        raise FederationError(f"ray cannot start on this machine: {reason}")

    def _new(self) -> Any:
        options = {
            "num_cpus": self._resources.cpus_per_worker,
            "num_gpus": self._resources.gpus_per_worker,
        }
        remote = self._ray.remote(Worker).options(**options)
        return remote.remote(self._make, self._resources.threads)

    def _replace(self, worker: Any) -> Any:
        self._ray.kill(worker)
        place = self._workers.index(worker)
        self._workers[place] = self._new()
        return self._workers[place]

    def _give_models(self, parts: Sequence[Part]) -> None:
        """Bring the models that messages carry to all workers: any of them may be asked next."""
        models = {}
        for messages, _ in parts:
            for message in messages:
                if records.MODEL in message.content:
                    key = records.record_of(message.content, records.CONFIG, ConfigRecord)["model"]
                    models[str(key)] = records.record_of(
                        message.content, records.MODEL, ArrayRecord
                    )
        for key, record in models.items():
            self._give(key, record)

    def _give(self, key: str, record: ArrayRecord) -> None:
        if not all(self._ask_all(lambda worker: worker.knows.remote(key))):
            shared = self._ray.put(record)
            self._ask_all(lambda worker: worker.remember.remote(key, shared))

    def _ask_all(self, call: Callable[[Any], Any]) -> list[Any]:
        """Call every worker and return the answers; one that has died is replaced and asked again.

        Raises
        ------
        FederationError
            If a new worker dies too.
        """
        died = self._ray.exceptions.RayActorError
        answers = []
        for worker, asked in [(worker, call(worker)) for worker in self._workers]:
            try:
                answers.append(self._ray.get(asked))
            except died:
                try:
                    answers.append(self._ray.get(call(self._replace(worker))))
                except died as problem:
                    reason = " ".join(str(problem).split())
                    raise FederationError(f"ray: a worker cannot start: {reason}") from None
        return answers

    def _share_state(self, parts: Sequence[Part]) -> Any:
        """Put the tensors that all messages carry where every worker can read them."""
        first = parts[0][0][0].content.get(records.ARRAYS) if parts else None
        for messages, _ in parts:
            for message in messages:
                assert message.content.get(records.ARRAYS) is first, "a question has one state"
        return None if first is None else self._ray.put(first)

    def _collect(self, result: Any, part: Part) -> tuple[Sequence[Message], bool]:
        """Return the replies to a part, and whether its worker lives."""
        messages, contexts = part
        try:
            replies, states = self._ray.get(result)
        except self._ray.exceptions.RayActorError as problem:
            reason = f"its worker died: {' '.join(str(problem).split())}"
            return [_failed(message, reason) for message in messages], False
        for message, context, state in zip(messages, contexts, states, strict=True):
            for key in _lean_state(context, message):
                del context.state[key]
            context.state.update(state)
        return replies, True


def _failed(message: Message, reason: str) -> Message:
    return Message(Error(records.CLIENT_FAILED, reason), reply_to=message)


def _lean(part: Part) -> Part:
    """Return a part without what goes to workers only once, and without what it does not need."""
    messages, contexts = part
    return [_lean_message(m) for m in messages], [
        Context(
            run_id=context.run_id,
            node_id=context.node_id,
            node_config=context.node_config,
            state=_lean_state(context, message),
            run_config=context.run_config,
        )
        for context, message in zip(contexts, messages, strict=True)
    ]


def _lean_message(message: Message) -> Message:
    about = message.metadata
    content = {k: v for k, v in message.content.items() if k not in (records.ARRAYS, records.MODEL)}
    return Message(
        RecordDict(content), about.dst_node_id, about.message_type, group_id=about.group_id
    )


def _lean_state(context: Context, message: Message) -> RecordDict:
    """Return what a client keeps for the method of a message."""
    if records.CONFIG not in message.content:
        return RecordDict()
    key = kept_key(str(records.record_of(message.content, records.CONFIG, ConfigRecord)["method"]))
    return RecordDict({key: context.state[key]} if key in context.state else {})


def _short_folder() -> str:
    """Return a new folder of our own for Ray's files."""
    usual = tempfile.gettempdir()
    short = usual if len(usual) <= _LONGEST_FOLDER else "/tmp"
    return tempfile.mkdtemp(prefix="fedl2p-ray-", dir=short)


@contextlib.contextmanager
def _search_path() -> Iterator[None]:
    """Let processes that start meanwhile import what this one can import."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    try:
        yield
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before
