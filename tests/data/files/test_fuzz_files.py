"""Malformed files: every one ends in a named error that names it; nothing is written or changed."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from fedl2p import MetaNets, MetaNetsConfig, models
from fedl2p.core.sites import find_sites
from fedl2p.data.files.idx import read_idx
from fedl2p.data.files.npz_client import read_npz_client
from fedl2p.data.npz import NpzFolder
from fedl2p.federation import progress as checkpoints
from fedl2p.federation.progress import Checkpoint
from fedl2p.reporting.page import write_page
from fedl2p.runs.tensors import load_tensors
from fedl2p.study.new_client import load_run
from support import data_archives
from support.fuzzing import ODD, as_json, changed, ends_well, fingerprint, fuzz, mutated, refused

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


# --- client files ---------------------------------------------------------------------------------


def npz(compressed: bool = False, **arrays: Any) -> bytes:
    file = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(file, **arrays)
    return file.getvalue()


GOOD: dict[str, Any] = {
    "x_train": np.linspace(0, 1, 6 * 4, dtype=np.float32).reshape(6, 1, 2, 2),
    "y_train": np.arange(6) % 3,
}
ARRAY_FILES = [
    npz(**GOOD),
    npz(True, **GOOD),
    npz(**GOOD, x_test=GOOD["x_train"], y_test=GOOD["y_train"]),
]

DTYPES = [
    "f2",
    "f4",
    "f8",
    "u1",
    "i4",
    "i8",
    "u8",
    "c8",
    "?",
    "U3",
    "S2",
    "M8[s]",
    "V4",
    ">f4",
    "f4,i4",
]
SHAPES = [
    (),
    (6,),
    (0, 1, 2, 2),
    (6, 0),
    (6, 1, 2, 2),
    (7, 1, 2, 2),
    (6, 3),
    (1, 1, 2, 2),
    (6, 2, 1),
]
VALUES = [0, 1, -1, 255, float("nan"), float("inf"), 1e300, 2**62]


@st.composite
def arrays(draw: st.DrawFn) -> dict[str, Any]:
    """Arrays by name: a good file of which some are replaced, added or left out."""
    made = dict(GOOD)
    for _ in range(draw(st.integers(1, 3))):
        name = draw(
            st.sampled_from(
                [
                    *(f"{a}_{p}" for p in ("train", "validation", "test", "val") for a in "xy"),
                    "z",
                    "",
                ]
            )
        )
        if draw(st.integers(0, 5)) == 0:
            made.pop(name, None)
            continue
        array = np.zeros(draw(st.sampled_from(SHAPES)), draw(st.sampled_from(DTYPES)))
        value = draw(st.sampled_from(VALUES))
        with (
            np.errstate(all="ignore"),
            contextlib.suppress(TypeError, ValueError, OverflowError),
        ):
            array = np.full_like(array, value)
        made[name] = array
    return made


@fuzz(250)
@given(made=arrays(), compressed=st.booleans())
def test_client_arrays(made: dict[str, Any], compressed: bool, place: Path) -> None:
    path = place / "client.npz"
    path.write_bytes(npz(compressed, **made))
    with ends_well("client arrays"):
        data = read_npz_client(path)
        assert data.train.x.dtype == torch.float32
        assert data.train.x.isfinite().all()
        assert len(data.train.x) == len(data.train.y) > 0


@fuzz(300)
@given(data=st.data(), base=st.sampled_from(ARRAY_FILES))
def test_client_bytes(data: st.DataObject, base: bytes, place: Path) -> None:
    path = place / "client.npz"
    path.write_bytes(data.draw(mutated(base, head=128) | mutated(base[::-1], head=128).map(_back)))
    with ends_well("client files, bytes"):
        read_npz_client(path)


IDX_FILES = [
    data_archives.idx(np.arange(24, dtype=np.uint8).reshape(2, 3, 4)),
    data_archives.idx(np.arange(24, dtype=np.uint8).reshape(2, 3, 4), compressed=True),
    data_archives.idx(np.arange(6, dtype=np.float32), code=0x0D),
]


@fuzz(300)
@given(data=st.data(), base=st.sampled_from(IDX_FILES))
def test_idx_bytes(data: st.DataObject, base: bytes, place: Path) -> None:
    path = place / "file-idx"
    path.write_bytes(data.draw(mutated(base, head=16)))
    with ends_well("idx files, bytes"):
        assert read_idx(path).nbytes <= 1 << 20


def _back(content: bytes) -> bytes:
    """Mutated from the end, where a zip archive keeps its directory."""
    return content[::-1]


@pytest.mark.slow
@fuzz(80)
@given(data=st.data())
def test_client_files_at_the_command_line(
    data: st.DataObject, place: Path, smoke_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = place / "me.npz", place / "out"
    content = data.draw(
        st.binary(max_size=64) | mutated(ARRAY_FILES[0]) | arrays().map(lambda made: npz(**made))
    )
    path.write_bytes(content)
    before = fingerprint(smoke_run)
    # The run's clients have other shapes, so that a sound file is refused too.
    line = refused(
        *("client files, command line", capsys),
        *("personalize", "--run", smoke_run, "--data", path, "--out", out),
    )
    assert str(path) in line
    assert not out.exists()
    assert fingerprint(smoke_run) == before


def forged_size(content: bytes, size: int) -> bytes:
    """A zip archive whose directory says that its first member unpacks to ``size`` bytes."""
    at = content.index(b"PK\x01\x02")
    return content[: at + 24] + struct.pack("<I", size) + content[at + 28 :]


def test_a_file_that_unpacks_to_too_much_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "bomb.npz"
    np.savez_compressed(path, x_train=np.zeros((64, 2**18), np.float32), y_train=np.zeros(64, int))
    assert path.stat().st_size < 2**17
    unpacked = 64 * 2**20
    for say in (
        lambda: read_npz_client(path, max_bytes=2**20),
        lambda: NpzFolder(tmp_path, max_bytes=2**20).open(0),
    ):
        with pytest.raises(
            ValueError, match=rf"take {unpacked // 10**6}\d+ bytes unpacked"
        ) as caught:
            say()
        assert "raise max_bytes of NpzFolder (--data.max-bytes)" in str(caught.value)
    assert read_npz_client(path).train.x.numel() > 0  # 64 MiB are little by themselves
    with pytest.raises(ValueError, match="max_bytes is 0"):
        NpzFolder(tmp_path, max_bytes=0)


def test_what_an_archive_says_of_its_sizes_cannot_be_forged_either_way(tmp_path: Path) -> None:
    path = tmp_path / "client.npz"
    content = npz(True, **GOOD)
    path.write_bytes(forged_size(content, 2**32 - 16))
    with pytest.raises(ValueError, match="bytes unpacked, more than 2147483648"):
        read_npz_client(path)
    # Too small a size: no more than it is read, and the rest is missing.
    big = npz(True, x_train=np.zeros((64, 2**12), np.float32), y_train=np.zeros(64, int))
    path.write_bytes(forged_size(big, 200))
    with pytest.raises(ValueError, match="not a readable"):
        read_npz_client(path, max_bytes=2**16)


def test_members_of_other_names_are_never_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "client.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in GOOD.items():
            file = io.BytesIO()
            np.save(file, array)
            archive.writestr(f"{name}.npy", file.getvalue())
        archive.writestr("notes.npy", b"\x93NUMPY not an array")
        archive.writestr("bomb.npy", b"\0" * 10**6)
    assert len(read_npz_client(path, max_bytes=10**4).train.y) > 0


def test_an_array_that_claims_more_than_there_is_needs_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "client.npz"
    for count in (10**9, 10**15, 10**30):
        file = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            file, {"descr": "<f4", "fortran_order": False, "shape": (count,)}
        )
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x_train.npy", file.getvalue() + b"\0" * 100)
            archive.writestr("y_train.npy", npz()[:0])
        with pytest.raises(ValueError, match=r"client\.npz: not a readable"):
            read_npz_client(path)


# --- model files ----------------------------------------------------------------------------------

NET = models.build("fedl2p.models:small_conv", shape=(1, 8, 8), classes=10, seed=0)
WEIGHTS = save(dict(NET.state_dict()))
HEADER_END = 8 + int.from_bytes(WEIGHTS[:8], "little")


@st.composite
def tensor_files(draw: st.DrawFn, base: bytes = WEIGHTS) -> bytes:
    """A safetensors file of which bytes, or entries of the header, are changed."""
    if draw(st.booleans()):
        return draw(mutated(base, head=8 + int.from_bytes(base[:8], "little")))
    end = 8 + int.from_bytes(base[:8], "little")
    header = as_json(draw(changed(json.loads(base[8:end]))))
    return len(header).to_bytes(8, "little") + header + base[end:]


@pytest.mark.slow
@fuzz(300)
@given(content=tensor_files())
def test_weights(content: bytes, place: Path) -> None:
    path = place / "weights.safetensors"
    path.write_bytes(content)
    with ends_well("weights"):
        tensors = load_tensors(path)
        assert all(t.isfinite().all() for t in tensors.values() if t.is_floating_point())


@pytest.mark.slow
@fuzz(40)
@given(content=tensor_files())
def test_weights_at_the_command_line(
    content: bytes, place: Path, smoke_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = place / "given.safetensors"
    path.write_bytes(content)
    before = fingerprint(smoke_run)
    refused(
        *("weights, command line", capsys),
        *("run", "smoke", "--out", smoke_run, "--pretrained", path),
    )
    assert fingerprint(smoke_run) == before


@pytest.fixture(scope="module")
def metanets(place: Path) -> tuple[bytes, Any]:
    MetaNets(find_sites(NET), config=MetaNetsConfig(hidden=4)).save(place / "sound")
    files = [place / "sound" / f"metanets.{kind}" for kind in ("safetensors", "json")]
    return files[0].read_bytes(), json.loads(files[1].read_text())


@fuzz(250)
@given(data=st.data())
def test_metanets(data: st.DataObject, metanets: tuple[bytes, Any], place: Path) -> None:
    weights, about = metanets
    which = data.draw(st.sampled_from(["weights", "about", "both", "junk"]))
    if which in ("weights", "both"):
        weights = data.draw(tensor_files(weights))
    said = as_json(about if which == "weights" else data.draw(changed(about)))
    if which == "junk":
        said = data.draw(mutated(said) | st.binary(max_size=40))
    (place / "nets").mkdir(exist_ok=True)
    (place / "nets" / "metanets.safetensors").write_bytes(weights)
    (place / "nets" / "metanets.json").write_bytes(said)
    with ends_well("meta-nets"):
        nets = MetaNets.load(place / "nets")
        assert all(p.isfinite().all() for p in nets.parameters())


def test_a_vast_net_is_refused_before_it_is_made(metanets: tuple[bytes, Any], place: Path) -> None:
    weights, about = metanets
    (place / "vast").mkdir()
    (place / "vast" / "metanets.safetensors").write_bytes(weights)
    for hidden in (200_000, 10**9, 10**18):
        about["config"]["hidden"] = hidden
        (place / "vast" / "metanets.json").write_text(json.dumps(about))
        with pytest.raises(
            ValueError, match=r"vast cannot be read \(.*(by the description|overflowed)"
        ):
            MetaNets.load(place / "vast")


# --- checkpoints ----------------------------------------------------------------------------------

VALUES_OF = {"round": 3, "job": {"stage": "learn"}, "clients": ["a"], "records": [{"round": 1}]}
STATE = {"w": torch.arange(6.0).reshape(2, 3), "n": torch.tensor(3)}


@pytest.fixture(scope="module")
def checkpoint(place: Path) -> bytes:
    checkpoints.save(place / "one", 1, Checkpoint({"state": STATE, "kept a": {}}, VALUES_OF))
    return (place / "one" / "round-000001.safetensors").read_bytes()


@pytest.mark.slow
@fuzz(250)
@given(data=st.data())
def test_checkpoints_fall_back(
    data: st.DataObject, checkpoint: bytes, place: Path, quiet: None
) -> None:
    folder = place / "two"
    checkpoints.save(folder, 1, Checkpoint({"state": STATE}, {"round": 1}))
    content = data.draw(tensor_files(checkpoint))
    (folder / "round-000002.safetensors").write_bytes(content)
    before = fingerprint(folder)
    with ends_well("checkpoints"):
        found = checkpoints.load_newest(folder)
        # The one before, unless the change is one that changes nothing.
        assert found is not None
        assert found.values == {"round": 1} or found.values == VALUES_OF
        assert torch.equal(found.groups["state"]["w"], STATE["w"])
    assert fingerprint(folder) == before


@pytest.fixture
def quiet() -> Iterator[None]:
    """Thousands of warnings are kept from the console."""
    logger = logging.getLogger("fedl2p")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(before)


@pytest.fixture(scope="module")
def stopped(place: Path) -> tuple[Path, dict[str, Any]]:
    """A stage's sound checkpoint: its folder and the entry that holds everything but tensors."""
    run_stage(place / "stage", resume=False)
    newest = max((place / "stage").iterdir())
    return newest, json.loads(_metadata(newest)["fedl2p"])


def run_stage(folder: Path, *, resume: bool) -> Any:
    from fedl2p.federation.rounds import federate
    from fedl2p.federation.settings import Rounds
    from support.federation_toys import Line, Toward, model

    return federate(
        *(Toward(use_kept=True), model(1), Line(seen=3)),
        rounds=Rounds(rounds=2, strategy="fedadam", give_up=9),
        seed=0,
        stage="learn",
        checkpoint=folder,
        resume=resume,
    )


def _metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


@fuzz(100)
@given(data=st.data())
def test_checkpoints_with_the_right_hash_and_wrong_content(
    data: st.DataObject, stopped: tuple[Path, dict[str, Any]], place: Path, quiet: None
) -> None:
    from safetensors.torch import load_file

    newest, header = stopped
    # The hash is no secret: a forger computes it anew.
    tensors = load_file(newest)
    try:
        forged = json.dumps(data.draw(changed(header)))
        metadata = {"fedl2p": forged, "hash": checkpoints._hash(tensors, forged)}
        folder = place / "forged"
        folder.mkdir(exist_ok=True)
        save_file(tensors, folder / newest.name, metadata=metadata)
    except UnicodeEncodeError:  # no file can hold it
        return
    with ends_well("forged checkpoints"):
        run_stage(folder, resume=True)
    for path in folder.iterdir():
        path.unlink()


# --- the files of a run ---------------------------------------------------------------------------

SMALL = (
    "config.json",
    "population.json",
    "results.json",
    "clients.csv",
    "rounds.csv",
    "metanets.json",
)
STORED = ("global.safetensors", "metanets.safetensors")


@pytest.fixture
def copied(smoke_run: Path, place: Path) -> Path:
    folder = place / "copy"
    folder.mkdir(exist_ok=True)
    for name in (*SMALL, *STORED):
        (folder / name).write_bytes((smoke_run / name).read_bytes())
    return folder


@fuzz(60)
@given(data=st.data(), name=st.sampled_from((*SMALL, *STORED)))
def test_run_folders(data: st.DataObject, name: str, copied: Path) -> None:
    sound = (copied / name).read_bytes()
    if name.endswith(".json") and data.draw(st.booleans()):
        content = as_json(data.draw(changed(json.loads(sound))))
    elif name.endswith(".safetensors"):
        content = data.draw(tensor_files(sound))
    else:
        content = data.draw(mutated(sound))
    (copied / name).write_bytes(content)
    try:
        before = fingerprint(copied)
        with ends_well("run folders"):
            load_run(copied)
        assert fingerprint(copied) == before
        if name not in STORED:
            with ends_well("run folders, report"):
                write_page(copied)
                (copied / "report.html").unlink()
            assert fingerprint(copied) == before
    finally:
        (copied / name).write_bytes(sound)


@fuzz(30)
@given(value=ODD, name=st.sampled_from(SMALL))
def test_small_files_of_anything(
    value: Any, name: str, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sound = (copied / name).read_bytes()
    (copied / name).write_bytes(as_json(value))
    try:
        before = fingerprint(copied)
        if name not in ("metanets.json", "config.json"):  # which the report shows as it is
            refused("run folders, command line", capsys, "report", copied)
        if name not in ("results.json", "clients.csv", "rounds.csv"):
            data = copied / "config.json"  # no client file either: never read before the run
            refused(
                *("run folders, command line", capsys),
                *("personalize", "--run", copied, "--data", data, "--out", copied / "out"),
            )
        assert fingerprint(copied) == before
    finally:
        (copied / name).write_bytes(sound)


@pytest.mark.parametrize("depth", [10**3, 10**5])
def test_deep_nesting_is_refused(depth: int, copied: Path) -> None:
    (copied / "config.json").write_text("[" * depth)
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        load_run(copied)
    (copied / "metanets.json").write_text('{"config": ' + "[" * depth)
    with pytest.raises(ValueError, match="cannot be read"):
        MetaNets.load(copied)
