"""Importing the package stays cheap, and personalizing needs none of the extras."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import fedl2p

SRC = Path(fedl2p.__file__).parent


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(SRC.parent), "PATH": "", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# None in sys.modules makes an import fail as if the package were not there.
WITHOUT_EXTRAS = """
    import sys
    for name in (
        *("flwr", "ray", "sklearn", "rich", "tyro", "jinja2"),
        *("scipy", "matplotlib", "captum"),
    ):
        sys.modules[name] = None
"""


def test_the_package_works_without_any_extra() -> None:
    """Every public name, ``learn`` and ``run_study`` need torch, numpy and safetensors alone."""
    run_python(
        WITHOUT_EXTRAS
        + """
    import dataclasses
    import torch
    import fedl2p
    from fedl2p.core.settings import InnerLoop
    from fedl2p.data.pools.in_memory import InMemory

    assert all(getattr(fedl2p, name) is not None for name in fedl2p.__all__)

    g = torch.Generator().manual_seed(0)

    def examples(count):
        x = torch.randn(count, 1, 8, 8, generator=g)
        return fedl2p.Examples(x, torch.randint(0, 3, (count,), generator=g))

    clients = {
        name: fedl2p.ClientData(examples(12), examples(6), examples(6)) for name in "abcd"
    }
    few = fedl2p.Rounds(rounds=1, keep="last", strategy="fedadam")
    settings = fedl2p.Settings(finetune=InnerLoop(epochs=1, batch_size=6))
    from fedl2p import models

    net = models.build("fedl2p.models:small_conv", shape=(1, 8, 8), classes=3, seed=0)
    nets = fedl2p.learn(net, clients, rounds=few, settings=settings)
    fedl2p.personalize(net, nets, clients["a"], epochs=1)

    @dataclasses.dataclass(frozen=True)
    class Source:
        def open(self, seed):
            return InMemory({name: clients[name] for name in "abc"}, {"d": clients["d"]})

    study = fedl2p.Study(
        data=Source(), methods=("fedl2p",), pretrain=few, learn=few, settings=settings
    )
    assert len(fedl2p.run_study(study).rows) == 4
    """
    )


def test_public_names_resolve() -> None:
    pytest.importorskip("flwr")
    for name in fedl2p.__all__:
        assert getattr(fedl2p, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'personalise'"):
        _ = fedl2p.personalise  # type: ignore[attr-defined]


@pytest.mark.slow
def test_import_costs_less_than_one_and_a_half_times_torch() -> None:
    code = """
        import time
        start = time.process_time()
        import {module}
        print(time.process_time() - start)
    """

    def best(module: str) -> float:
        return float(run_python(code.format(module=module)))

    # Interleaved and best of several: what another process does in between hits both alike.
    torch_s, fedl2p_s = float("inf"), float("inf")
    for _ in range(5):
        torch_s, fedl2p_s = min(torch_s, best("torch")), min(fedl2p_s, best("fedl2p"))
        if fedl2p_s < 1.3 * torch_s:
            break
    assert fedl2p_s < 1.5 * torch_s, (
        f"import fedl2p took {fedl2p_s:.2f} s, torch alone {torch_s:.2f} s"
    )
