"""Clients on Ray's workers: stacks of clients are answered by processes of this machine.

Flower's own simulation (``flwr run``) also runs on Ray; it hands out one client per task and looks
for messages ten times a second. Here a task is a whole stack, as in process, what clients keep
stays in this process, where checkpoints find it, and nothing waits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

from fedl2p.federation.clients.in_process import LocalClients, with_bytes
from fedl2p.federation.clients.node import ClientNode
from fedl2p.federation.messages import Answer, FederationError, FrozenModel, Question
from fedl2p.federation.settings import Ray
from fedl2p.method import State
from fedl2p.process_environment import VARIABLES, prepare_children

log = logging.getLogger("fedl2p")

# Ray keeps sockets in its folder, and a socket's path may have 107 characters on Linux.
_LONGEST_FOLDER = 40

# Ray gives its daemons a fixed time to come up, which a machine under heavy load may exceed.
_ATTEMPTS = 3

# Seconds until a warning says what workers wait for, and until they are given up.
_SAY_AFTER, _GIVE_UP_AFTER = 30.0, 600.0


Packed: TypeAlias = dict[str, tuple[torch.dtype, np.ndarray[Any, Any]]]
"""A state on its way to another process, as arrays, which pickle faster than tensors."""


class Worker:
    """What a worker process has from the first task to the last: a node with model and data.

    Parameters
    ----------
    make
        Makes the node, on the worker.
    threads
        Threads to compute with.
    """

    def __init__(self, make: Callable[[], ClientNode], threads: int) -> None:
        torch.set_num_threads(threads)
        self.node = make()

    def initial(self) -> str:
        """Return the content hash of the model that the node has from the start."""
        return self.node.initial

    def answer(
        self, question: Question, state: Packed, kept: dict[str, Packed], model: list[Any]
    ) -> tuple[list[tuple[Answer, Packed]], dict[str, Packed]]:
        """Answer for one stack of clients.

        Parameters
        ----------
        question
            Without its state and the weights of the frozen model.
        state
            The question's state.
        kept
            What the clients of the question keep.
        model
            Ray's reference to the weights, read if they are not here; a worker may be a new one.

        Returns
        -------
        answers
            Without the tensors of their updates, and these.
        kept
            What each client keeps now.
        """
        frozen = question.model
        if self.node.models.get(frozen.key) is None:
            import ray

            frozen = FrozenModel(ray.get(model[0]), frozen.key)
        question = dataclasses.replace(question, state=unpack(state), model=frozen)
        own = {name: unpack(packed) for name, packed in kept.items()}
        answers = [_packed(answer) for answer in self.node.answer(question, own)]
        return answers, {name: pack(state) for name, state in own.items()}


class OnRay(LocalClients):
    """The clients of a population, answered by Ray's workers, many stacks at a time.

    Ray starts with the first question, on this machine alone, and stops with :meth:`close`; where
    this process uses Ray already, that one is used and left running. A stack whose worker dies is
    tried once more on a new one; then its clients have failed.

    Parameters
    ----------
    make
        Makes the node; called once on each worker.
    names
        The clients, in the order of the population.
    stack_size
        Clients of a task.
    resources
        How many workers, with what.

    Raises
    ------
    ValueError
        If no worker fits into this machine.
    ModuleNotFoundError
        If Ray is not installed.
    """

    def __init__(
        self,
        make: Callable[[], ClientNode],
        names: Sequence[str],
        *,
        stack_size: int = 10,
        resources: Ray | None = None,
    ) -> None:
        super().__init__(names, initial=None)
        # Before Ray is imported, which reports its use to its makers unless told not to; and it
        # warns of a future in which workers without a GPU see all of them, which is now.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        import ray

        self._ray: Any = ray
        self._make, self._stack_size = make, stack_size
        self._resources = resources or Ray()
        self._cpus, self._gpus = available_cpus(), torch.cuda.device_count()
        if self._ray.is_initialized():
            cluster = self._ray.cluster_resources()
            self._cpus, self._gpus = int(cluster.get("CPU", 0)), int(cluster.get("GPU", 0))
        self._count = self._resources.fitting(cpus=self._cpus, gpus=self._gpus)
        self._workers: list[Any] = []
        self._models: dict[str, Any] = {}
        self._folder: str | None = None

    def ask(self, question: Question) -> Iterator[Answer]:
        """Yield one answer per client, as the workers have them.

        Raises
        ------
        FederationError
            If the workers cannot start.
        """
        self._start()
        sent = self._send(question)
        kept = self._kept.setdefault(question.method, {})
        model = self._model(question.model)
        bare = dataclasses.replace(question.model, weights=None)
        state = self._ray.put(pack(question.state))
        pool = self._ray.util.ActorPool(self._workers)
        left = dict.fromkeys(question.seeds)
        for names in _cut(list(question.seeds), self._stack_size):
            part = dataclasses.replace(
                question,
                state={},
                model=bare,
                seeds={name: question.seeds[name] for name in names},
            )
            own = {name: pack(kept[name]) for name in names if name in kept}
            pool.submit(
                lambda worker, task: worker.answer.remote(*task), (part, state, own, [model])
            )
        reason = ""
        while pool.has_next():
            try:
                answers, own = pool.get_next_unordered()
            except self._ray.exceptions.RayActorError as problem:
                reason = f"its worker died: {' '.join(str(problem).split())}"
                continue
            for answer, shared in answers:
                name = answer.client
                del left[name]
                kept.pop(name, None)
                if name in own:
                    kept[name] = unpack(own[name])
                yield with_bytes(_unpacked(answer, shared), sent[name])
        for name in left:
            yield with_bytes(Answer(client=name, failure=reason), sent[name])

    def close(self) -> None:
        """Stop the workers, and Ray if it was started here; nothing of them stays."""
        for worker in self._workers:
            self._ray.kill(worker)
        self._workers.clear()
        self._models.clear()
        if self._folder is not None:
            self._ray.shutdown()
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _model(self, model: FrozenModel) -> Any:
        """Return Ray's reference to the weights of a model, which are put there once."""
        if model.key not in self._models:
            self._models[model.key] = self._ray.put(model.weights)
        return self._models[model.key]

    def _start(self) -> None:
        if self._workers:
            return
        if not self._ray.is_initialized():
            self._start_ray()
        options = {
            "num_cpus": self._resources.cpus_per_worker,
            "num_gpus": self._resources.gpus_per_worker,
            "max_restarts": -1,
            "max_task_retries": 1,
        }
        remote = self._ray.remote(Worker).options(**options)
        self._workers = [
            remote.remote(self._make, self._resources.threads) for _ in range(self._count)
        ]
        try:
            initial = self._first_answer()
        except self._ray.exceptions.RayActorError as problem:
            reason = " ".join(str(problem).split())
            raise FederationError(f"ray: a worker cannot start: {reason}") from None
        self._has_model.setdefault(initial, None)
        log.info("ray: %d workers with %d threads each", self._count, self._resources.threads)

    def _first_answer(self) -> str:
        """Wait for all workers; return the content hash of the model that they have.

        Ray lets a worker wait for ever for a processor that others hold.

        Raises
        ------
        FederationError
            If they have not all started in time.
        """
        started = [worker.initial.remote() for worker in self._workers]
        for wait in (_SAY_AFTER, _GIVE_UP_AFTER - _SAY_AFTER):
            ready, late = self._ray.wait(started, num_returns=len(started), timeout=wait)
            if not late:
                return str(self._ray.get(started)[0])
            free = self._ray.available_resources()
            state = (
                f"ray: {len(ready)} of {len(started)} workers have started; each needs "
                f"{self._resources.cpus_per_worker:g} CPUs and {self._resources.gpus_per_worker:g} "
                f"GPUs, free are {free.get('CPU', 0):g} and {free.get('GPU', 0):g}"
            )
            log.warning("%s", state)
        self.close()
        raise FederationError(
            f"{state}; wait until others are done with them, or set fewer ray.workers"
        )

    def _start_ray(self) -> None:
        """Start Ray on this machine alone, in a folder of its own; try again where it is slow."""
        for attempt in range(_ATTEMPTS):
            self._folder = _short_folder()
            try:
                with _environment():
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


def available_cpus() -> int:
    """Return the CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cut(names: list[str], size: int) -> Iterator[list[str]]:
    for begin in range(0, len(names), size):
        yield names[begin : begin + size]


def _packed(answer: Answer) -> tuple[Answer, Packed]:
    """Return an answer without the tensors of its update, and these."""
    if answer.update is None:
        return answer, {}
    bare = dataclasses.replace(answer.update, shared={})
    return dataclasses.replace(answer, update=bare), pack(answer.update.shared)


def _unpacked(answer: Answer, shared: Packed) -> Answer:
    if answer.update is None:
        return answer
    update = dataclasses.replace(answer.update, shared=unpack(shared))
    return dataclasses.replace(answer, update=update)


def pack(state: State) -> Packed:
    """Return arrays on the CPU; pickled, one brings nothing else of its stack along."""
    packed: Packed = {}
    for name, tensor in state.items():
        bits = tensor.detach()
        if bits.dtype == torch.bfloat16:  # which NumPy has not
            bits = bits.view(torch.int16)
        packed[name] = tensor.dtype, bits.numpy(force=True)
    return packed


def unpack(packed: Packed) -> State:
    """Return tensors that may be written to; Ray's arrays may not."""
    return {
        name: torch.from_numpy(np.array(array)).view(dtype)
        for name, (dtype, array) in packed.items()
    }


def _short_folder() -> str:
    """Return a new folder of our own for Ray's files."""
    usual = tempfile.gettempdir()
    short = usual if len(usual) <= _LONGEST_FOLDER else "/tmp"
    return tempfile.mkdtemp(prefix="fedl2p-ray-", dir=short)


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """Let processes that start meanwhile import what this one can, and be set as it should."""
    before = {key: os.environ.get(key) for key in ("PYTHONPATH", *VARIABLES)}
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    prepare_children()
    try:
        yield
    finally:
        for key, value in before.items():
            os.environ.pop(key, None)
            if value is not None:
                os.environ[key] = value
