"""Names and texts of others that a terminal or a spreadsheet would obey."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedl2p.runs.client_names import check_name
from fedl2p.runs.columns import to_csv
from fedl2p.runs.population import PopulationInfo
from fedl2p.runs.results import Report
from support.synthetic_run import make_run


@pytest.mark.parametrize(
    "name", ["", "a\nb", "\x1b[31m", "a\u202eb", "\ud800", "é" * 90, "=1+1", "+1", "-1", "@x"]
)
def test_names_that_do_harm_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="the name of the client"):
        check_name(name)


@pytest.mark.parametrize("name", ["a", "hospital-a", "Klinik Süd 7", "x=1", "病院", "x" * 200])
def test_names_of_people_are_taken(name: str) -> None:
    check_name(name)


def test_a_cell_that_a_spreadsheet_would_run_is_text() -> None:
    cells = ["=cmd|'/c calc'!A0", "+1", "-1", "@SUM(A1)", "a=b", -1.5, 7]
    assert to_csv([cells]) == "'=cmd|'/c calc'!A0,'+1,'-1,'@SUM(A1),a=b,-1.5,7\n"


@pytest.mark.parametrize("file", ["results.json", "clients.csv", "population.json"])
def test_a_run_of_somebody_else_cannot_write_on_the_terminal(tmp_path: Path, file: str) -> None:
    make_run(tmp_path, seen=3, unseen=1)
    path = tmp_path / file
    if file == "results.json":
        content = json.loads(path.read_text()) | {"recipe": "\x1b[2J"}
        path.write_text(json.dumps(content))
    else:
        path.write_text(
            path.read_text().replace("client-000", "\x1b[2J" if file[0] == "c" else "=1")
        )
    with pytest.raises(ValueError, match=f"{file} is damaged"):
        PopulationInfo.read(tmp_path) if file[0] == "p" else Report.load(tmp_path)
