"""Every method has a name that people can read."""

from __future__ import annotations

from fedl2p import methods
from fedl2p.reporting.method_names import method_name


def test_every_method_has_a_label_and_a_line_of_its_own() -> None:
    known = {name: method_name(name) for name in methods.names()}
    for name, said in known.items():
        assert said.label != name, f"{name} has no entry in reporting/method_names.py"
        assert said.line
    assert len({said.label for said in known.values()}) == len(known)
    assert len({said.line for said in known.values()}) == len(known)


def test_an_unknown_method_goes_by_its_own_name() -> None:
    said = method_name("mine")
    assert (said.label, said.line, said.role) == ("mine", "", "other")
