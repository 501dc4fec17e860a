"""Cross-validation over clients, and the audit made of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from fedl2p import ClientData, Examples, recipes
from fedl2p.data.population import Population
from fedl2p.methods import AUDITED
from fedl2p.runs.results import Report
from fedl2p.study.audit import run_audit
from fedl2p.study.held_out import HeldOut
from fedl2p.study.settings import Source, Study
from support.command import call, refused


def smoke() -> Study:
    return dataclasses.replace(recipes.get("digits_smoke"), methods=AUDITED)


def test_every_client_is_held_out_once_and_learned_from_otherwise() -> None:
    source = smoke().data
    whole = source.open(3).seen
    folds = [HeldOut(of=source, fold=i, folds=4).open(3) for i in range(4)]
    assert sorted(name for fold in folds for name in fold.unseen) == sorted(whole)
    for fold in folds:
        assert len(fold.unseen) in (1, 2)  # 6 clients
        assert sorted((*fold.seen, *fold.unseen)) == sorted(whole)
        name = fold.unseen[0]
        assert fold.open(name).train.y.equal(source.open(3).open(name).train.y)
        assert fold.about(name) == source.open(3).about(name)
    # clients of a kind come at regular distances, folds do not
    positions = [[whole.index(name) for name in fold.unseen] for fold in folds]
    assert positions != [[0, 4], [1, 5], [2], [3]]


@pytest.mark.parametrize(("fold", "folds"), [(0, 1), (2, 2), (-1, 2)])
def test_folds_that_are_none(fold: int, folds: int) -> None:
    with pytest.raises(ValueError, match="fold"):
        HeldOut(of=smoke().data, fold=fold, folds=folds)


def test_an_audit_of_too_few_clients_of_a_missing_method_and_without_test_parts(
    tmp_path: Path,
) -> None:
    with pytest.raises(ValueError, match="folds is 9, but there are only 6 seen clients"):
        run_audit(smoke(), tmp_path, folds=9)
    without = dataclasses.replace(smoke(), methods=("fedl2p", "bestfixed"))
    with pytest.raises(ValueError, match="methods lack fedavg, fedl2p-constant, gridsearch"):
        run_audit(without, tmp_path, folds=2)
    untested = dataclasses.replace(smoke(), data=_Untested(of=smoke().data))
    with pytest.raises(ValueError, match=r"client .seen-.*. has no test part"):
        run_audit(untested, tmp_path, folds=2)
    assert list(tmp_path.iterdir()) == []


@dataclasses.dataclass(frozen=True)
class _Untested:
    """Clients whose test part is missing."""

    of: Source

    def open(self, seed: int) -> Population:
        population = self.of.open(seed)
        whole = population.open

        def untested(name: str) -> ClientData:
            data = whole(name)
            assert isinstance(data.train, Examples)
            return ClientData(data.train, data.validation)

        population.open = untested
        return population


@pytest.mark.slow
def test_the_command_writes_a_page_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "audit"
    args = ("audit", "digits_smoke", "--folds", 2, "--out", out)
    assert call(*args) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[-1] == f"written: {out / 'audit.md'}"
    page = (out / "audit.md").read_text()
    assert said.splitlines()[0] in page
    reports = [Report.load(out / f"fold-{i}") for i in (1, 2)]
    held_out = [{row.client for row in r.rows if row.pool == "unseen"} for r in reports]
    assert len(held_out[0] | held_out[1]) == 6
    assert not held_out[0] & held_out[1]
    # the second call runs nothing again and says the same
    (out / "audit.md").unlink()
    before = (out / "fold-1" / "results.json").stat().st_mtime_ns
    assert call(*args) == 0
    assert (out / "fold-1" / "results.json").stat().st_mtime_ns == before
    assert (out / "audit.md").read_text() == page
    line = refused(capsys_cleared(capsys), *args, "--learn.rounds", 1)
    assert "holds a run of other settings" in line


def capsys_cleared(capsys: pytest.CaptureFixture[str]) -> pytest.CaptureFixture[str]:
    capsys.readouterr()
    return capsys


def test_the_command_wants_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, "audit").startswith("the recipe comes first: fedl2p audit RECIPE")
    assert "unknown recipe 'nope'" in refused(capsys, "audit", "nope", "--out", "x")
    assert call("audit", "digits", "--help") == 0
    assert "--folds" in capsys.readouterr().out
