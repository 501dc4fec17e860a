"""A resumed run ends as an uninterrupted one, bit for bit, whatever happened to its last file."""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from fedl2p import atomic_files
from fedl2p.core.functional.precision import with_compute
from fedl2p.core.settings import Compute
from fedl2p.federation import progress as checkpoints
from fedl2p.federation.clients.in_process import InProcess
from fedl2p.federation.clients.node import ClientNode
from fedl2p.federation.listeners import Listener
from fedl2p.federation.messages import FederationError
from fedl2p.federation.personalizing import personalize_all
from fedl2p.federation.progress import Checkpoint
from fedl2p.federation.round_records import Federated, RoundRecord
from fedl2p.federation.rounds import federate
from fedl2p.federation.settings import Rounds
from support.federation_toys import Line, Toward, model, same

POPULATION = Line(seen=6, unseen=1)
METHOD = Toward(noise=0.2, rate=0.7, use_kept=True)


class StopAfter(Listener):
    """Presses Ctrl-C while a round's record is delivered."""

    def __init__(self, round: int) -> None:
        self.round = round

    def on_start(self, stage: str, rounds: int, done: Any) -> None: ...

    def on_round(self, record: RoundRecord) -> None:
        if record.round == self.round:
            raise KeyboardInterrupt

    def on_end(self, stage: str) -> None: ...


def clients(method: Toward = METHOD, **options: Any) -> InProcess:
    return InProcess(
        ClientNode(
            build=lambda: with_compute(model(), Compute(stack_size=1)),
            population=POPULATION,
            methods={method.name: method},
            **options,
        )
    )


def run(
    folder: Path | None,
    where: InProcess | None = None,
    *,
    method: Toward = METHOD,
    seed: int = 3,
    resume: bool = False,
    stop: int = 0,
    pretrained: int = 1,
    **rounds: Any,
) -> Federated:
    return federate(
        method,
        model(pretrained),
        POPULATION,
        rounds=Rounds(**{"rounds": 5, "clients_per_round": 4, **rounds}),
        seed=seed,
        stage="learn",
        clients=where or clients(method),
        listeners=[StopAfter(stop)],
        checkpoint=folder,
        resume=resume,
    )


def assert_same(a: Federated, b: Federated) -> None:
    assert same(a.state, b.state)
    assert (a.best_round, a.stopped_early) == (b.best_round, b.stopped_early)
    assert [dataclasses.replace(r, seconds=0.0) for r in a.records] == [
        dataclasses.replace(r, seconds=0.0) for r in b.records
    ]


@pytest.mark.parametrize(
    ("strategy", "keep"), [("fedavg", "last"), ("fedadam", "average"), ("fedavgm", "last")]
)
@pytest.mark.parametrize("stop", range(1, 7))
def test_resuming_after_every_round_equals_no_interruption(
    tmp_path: Path, strategy: str, keep: str, stop: int
) -> None:
    settings: dict[str, Any] = {"strategy": strategy, "keep": keep}
    whole_clients, resumed_clients = clients(), clients()
    whole = run(None, whole_clients, **settings)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stop=stop, **settings)
    # New clients: the process was gone, and with it what clients kept and the model they had.
    resumed = run(tmp_path, resumed_clients, resume=True, **settings)
    assert_same(whole, resumed)
    for one, other in ((whole_clients.kept("toward"), resumed_clients.kept("toward")),):
        assert one.keys() == other.keys()
        assert all(same(one[name], other[name]) for name in one)
    outcomes = [
        personalize_all(METHOD, model(1), done.state, POPULATION, seed=3, clients=where)
        for done, where in ((whole, whole_clients), (resumed, resumed_clients))
    ]
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("stop", range(1, 4))
def test_patience_and_the_best_state_survive_a_resumption(tmp_path: Path, stop: int) -> None:
    method = Toward(rate=2.5, noise=0.1)
    settings: dict[str, Any] = {"rounds": 9, "patience": 3, "method": method}
    whole = run(None, **settings)
    assert whole.stopped_early
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stop=stop, **settings)
    assert_same(whole, run(tmp_path, resume=True, **settings))


def test_an_interruption_inside_a_round_goes_back_to_the_last_finished_one(tmp_path: Path) -> None:
    class Interrupted(Toward):
        def train(self, model: Any, state: Any, clients: Any) -> Any:
            if clients[0].round == 3 and next(asked) == 2:
                raise KeyboardInterrupt
            return super().train(model, state, clients)

    asked = iter(range(99))
    method = Interrupted(noise=0.2, rate=0.7, use_kept=True)
    where = clients(method, keep_bytes=0)
    # Clients one by one: some have trained and kept something when the interruption comes.
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, where, method=method)
    # The same clients go on, as in a notebook.
    where.node.methods["toward"] = METHOD
    assert_same(run(None), run(tmp_path, where, resume=True))


def test_a_finished_stage_returns_its_result_without_a_question(tmp_path: Path) -> None:
    whole = run(tmp_path)
    where = clients()

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a question was asked")

    where.ask = refuse  # type: ignore[method-assign]
    assert_same(whole, run(tmp_path, where, resume=True))
    assert len(where.kept("toward")) > 0


def test_resuming_without_a_checkpoint_starts_and_a_used_folder_is_not_overwritten(
    tmp_path: Path,
) -> None:
    first = run(tmp_path / "new", resume=True)
    before = {p.name: p.read_bytes() for p in (tmp_path / "new").iterdir()}
    with pytest.raises(ValueError, match="holds checkpoints already; resume, or use another"):
        run(tmp_path / "new")
    assert {p.name: p.read_bytes() for p in (tmp_path / "new").iterdir()} == before
    assert_same(first, run(None))


def test_the_newest_two_are_kept_and_no_temporary_file(tmp_path: Path) -> None:
    run(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["round-000005.safetensors", "round-000006.safetensors"]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "foreign"])
def test_a_damaged_newest_falls_back_to_the_one_before(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stop=3, strategy="fedadam")
    newest = tmp_path / "round-000003.safetensors"
    content = bytearray(newest.read_bytes())
    match damage:
        case "truncated":
            content = content[:-9]
        case "flipped":
            content[-3] ^= 1
        case "empty":
            content = bytearray()
        case "foreign":
            content = bytearray(b"PK not a checkpoint")
    newest.write_bytes(bytes(content))
    with caplog.at_level(logging.WARNING, logger="fedl2p"):
        resumed = run(tmp_path, resume=True, strategy="fedadam")
    assert f"checkpoint {newest} is damaged" in caplog.text
    assert_same(run(None, strategy="fedadam"), resumed)


def test_only_damaged_checkpoints_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stop=2)
    for path in tmp_path.iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"every checkpoint in .* is damaged"):
        run(tmp_path, resume=True)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"seed": 4}, "seed is 3 there and 4 here"),
        ({"rounds": 6}, "rounds is .* there"),
        ({"pretrained": 2}, "model is"),
        ({"method": Toward(name="other")}, "method is 'toward' there and 'other' here"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    tmp_path: Path, change: dict[str, Any], difference: str
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stop=2)
    with pytest.raises(ValueError, match=difference):
        run(tmp_path, resume=True, **change)


def test_giving_up_leaves_a_run_that_can_go_on(tmp_path: Path) -> None:
    bad = Toward(bad=POPULATION.seen, how="raise")
    with pytest.raises(FederationError):
        run(tmp_path, method=bad, give_up=2)
    done = run(tmp_path, method=Toward(), give_up=2, resume=True)
    assert [r.failures for r in done.records] == [4, 4, 0, 0, 0, 0]


def test_a_checkpoint_holds_odd_names_and_tensors(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    groups = {
        "state": {"a/b c": shared[:3], "view": shared.reshape(2, 3).T, "zero-d": torch.tensor(3)},
        "kept ../x": {"half": torch.ones(2, dtype=torch.bfloat16), "none": torch.zeros(0, 2)},
        "empty": {},
    }
    values = {"loss": 0.1 + 0.2, "nothing": None, "name": "naïve"}
    checkpoints.save(tmp_path, 1, Checkpoint(groups, values))
    back = checkpoints.load_newest(tmp_path)
    assert back is not None
    assert back.values == values
    assert back.groups.keys() == groups.keys()
    assert all(same(back.groups[name], groups[name]) for name in groups)


def saved_and_killed(folder: Path, rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write checkpoints in processes that die once the new file is there."""
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "_remove", lambda old: None)
        for number in range(1, rounds + 1):
            one = Checkpoint({"state": {"w": torch.ones(2)}}, {"n": number})
            checkpoints.save(folder, number, one)


def test_what_a_killed_process_did_not_remove_goes_with_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved_and_killed(tmp_path, 4, monkeypatch)
    back = checkpoints.load_newest(tmp_path)
    assert back is not None
    assert back.values == {"n": 4}
    assert sorted(os.listdir(tmp_path)) == ["round-000003.safetensors", "round-000004.safetensors"]


def test_the_only_sound_checkpoint_is_never_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved_and_killed(tmp_path, 4, monkeypatch)
    names = [f"round-{number:06d}.safetensors" for number in (1, 2, 3, 4)]
    for name in names[2:]:
        (tmp_path / name).write_bytes(b"torn")
    for _ in range(2):
        back = checkpoints.load_newest(tmp_path)
        assert back is not None
        assert back.values == {"n": 2}
        assert sorted(os.listdir(tmp_path)) == names[1:]


def test_a_failed_write_leaves_the_older_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Checkpoint({"state": {"w": torch.ones(2)}}, {"n": 1})
    checkpoints.save(tmp_path, 1, one)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic_files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(tmp_path, 2, one)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["round-000001.safetensors"]
    back = checkpoints.load_newest(tmp_path)
    assert back is not None
    assert back.values == {"n": 1}
