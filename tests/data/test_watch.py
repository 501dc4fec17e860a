"""The smartwatch series, from small files as seglearn's is written."""

from __future__ import annotations

import collections
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedl2p.data import watch
from fedl2p.data.watch import MEAN, SD, Watch, read_series
from support.rounds import one_round


def series(people: int = 4, *, length: int = 600) -> dict[str, Any]:
    """One series per exercise, arm and person; its values tell which, and the time."""
    rows = [(p, a, y) for p in range(1, people + 1) for a in (0, 1) for y in range(7)]
    x = []
    for person, arm, label in rows:
        values = np.zeros((length + 5 * label, 6), order="F")
        values[:] = [person, arm, label, 0, 0, 0]
        values[:, 3] = np.arange(len(values))
        x.append(values)
    order = np.random.default_rng(0).permutation(len(rows))
    return {
        "X": [x[i] for i in order],
        "y": np.array([rows[i][2] for i in order]),
        "subject": np.array([rows[i][0] for i in order]),
        "side": np.array([float(rows[i][1]) for i in order]),
        "X_labels": ["ax", "ay", "az", "wx", "wy", "wz"],
        "y_labels": ["PEN", "ABD", "FEL", "IR", "ER", "TRAP", "ROW"],
    }


def write(path: Path, fields: Any) -> Path:
    np.save(path, np.array(fields, dtype=object), allow_pickle=True)
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("watch") / "watch_dataset.npy", series())


def raw(x: torch.Tensor) -> torch.Tensor:
    return (x * torch.tensor(SD)[:, None] + torch.tensor(MEAN)[:, None]).round().long()


def test_a_client_is_an_arm_and_holds_its_windows(path: Path) -> None:
    population = Watch(path=path, unseen=1).open(0)
    assert (len(population.seen), len(population.unseen)) == (6, 2)
    assert (population.classes, population.shape) == (7, (6, 100))
    for name in population.names:
        about, data = population.about(name), population.open(name)
        assert name == f"person-{about['person']}-{about['arm']}"
        for part in (data.train, data.validation, data.test):
            assert part is not None
            person, arm, label, *_ = raw(part.x)[:, :, 0].unbind(1)
            assert set(person.tolist()) == {about["person"]}
            assert set(arm.tolist()) == {("left", "right").index(str(about["arm"]))}
            assert torch.equal(label, part.y)
            assert set(part.y.tolist()) == set(range(7))


def test_windows_are_two_seconds_and_no_moment_is_in_two_parts(path: Path) -> None:
    population = Watch(path=path, unseen=1).open(0)
    data = population.open(population.seen[0])
    for label in range(7):
        spans = []
        for part in (data.train, data.validation, data.test):
            assert part is not None
            times = raw(part.x)[part.y == label][:, 3]
            assert bool((times.diff(dim=1) == 1).all())
            begins = times[:, 0].sort().values
            assert bool((begins.diff() == 50).all())
            spans.append((int(times.min()), int(times.max())))
        (_, train_end), (begin, end), (test_begin, _) = spans
        assert train_end < begin <= end < test_begin


def test_unseen_people_are_drawn_with_both_arms(path: Path) -> None:
    drawn = collections.Counter()
    for seed in range(8):
        population = Watch(path=path, unseen=2).open(seed)
        people = {name.rpartition("-")[0] for name in population.unseen}
        assert len(people) == 2
        assert not people & {name.rpartition("-")[0] for name in population.seen}
        drawn.update(people)
    assert len(drawn) > 2


def test_one_round(path: Path) -> None:
    one_round(Watch(path=path).open(0), model="fedl2p.models:small_strided")


def test_the_recordings_of_seglearn() -> None:
    pytest.importorskip("sklearn")
    if watch.find_spec("seglearn") is None:
        pytest.skip("seglearn is not installed")
    found = read_series(watch.installed_file())
    assert len(found) == 140
    counts = collections.Counter((one.person, one.arm) for one in found)
    assert set(counts.values()) == {7}
    assert len(counts) == 20
    values = np.concatenate([one.values for one in found]).astype(np.float64)
    np.testing.assert_allclose(values.mean(0), MEAN, atol=1e-4)
    np.testing.assert_allclose(values.std(0), SD, atol=1e-4)
    assert len(Watch().open(0).names) == 20


def test_without_seglearn_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"seglearn, .* pip install 'fedl2p\[watch\]'"):
        Watch().open(0)


class Runs:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def test_nothing_in_the_file_is_executed(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    path = write(tmp_path / "x.npy", {"X": [Runs(mark)]})
    with pytest.raises(ValueError, match="not only plain data"):
        read_series(path)
    assert not mark.exists()


def changed(**fields: Any) -> dict[str, Any]:
    return series(1) | fields


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "'X'"),
        ([1, 2], "does not hold seglearn's series"),
        (changed(y=np.zeros(13, int)), "is shorter|is longer"),
        (changed(y=np.full(14, 7)), "exercise 7"),
        (changed(side=np.full(14, 2.0)), "side 2.0"),
        (changed(subject=np.full(14, -1)), "person -1"),
        (changed(X=[np.zeros((600, 5))] * 14), r"shape \(600, 5\)"),
        (changed(X=[np.zeros((400, 6))] * 14), r"shape \(400, 6\).*503 values or more"),
        (changed(X=[np.full((600, 6), np.nan)] * 14), "must be finite"),
        (changed(X=["text"] * 14), "could not convert"),
        (changed(X=[[[1.0], [1.0, 2.0]]] * 14), "inhomogeneous"),
    ],
)
def test_a_file_of_another_form_is_refused_in_one_line(
    tmp_path: Path, fields: Any, said: str
) -> None:
    path = write(tmp_path / "x.npy", fields)
    with pytest.raises(ValueError, match=said) as refused:
        read_series(path)
    assert str(refused.value).startswith(f"{path} does not hold seglearn's series")
    assert "\n" not in str(refused.value)


def test_a_damaged_file_is_refused_in_one_line(path: Path, tmp_path: Path) -> None:
    content = path.read_bytes()
    for end in (0, 5, 50, 200, len(content) // 2, len(content) - 1):
        cut = tmp_path / f"{end}.npy"
        cut.write_bytes(content[:end])
        with pytest.raises(ValueError, match=r"\.npy ") as refused:
            read_series(cut)
        assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match=r"cannot read .*none\.npy"):
        read_series(tmp_path / "none.npy")


def test_a_file_that_is_too_large_is_not_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="at most 1000 are read"):
        read_series(path)


def test_settings_out_of_range(path: Path) -> None:
    with pytest.raises(ValueError, match="unseen must be 0 or more"):
        Watch(unseen=-1)
    with pytest.raises(ValueError, match=r"unseen is 4, but .* has 4 people"):
        Watch(path=path, unseen=4).open(0)
