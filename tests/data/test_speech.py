"""The reader of Speech Commands, on a small folder in its true layout."""

from __future__ import annotations

import hashlib
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from fedl2p.cli import entry as cli
from fedl2p.data import speech
from fedl2p.data.audio import clip_cache
from fedl2p.data.audio.filter_banks import FilterBank
from fedl2p.data.audio.speech_commands import CLASSES, COMMANDS, LISTS, scan
from fedl2p.data.audio.wav_files import read_wav, to_float
from fedl2p.data.files.downloads import RemoteFile
from fedl2p.data.files.folders import no_progress
from fedl2p.data.speech import Speech, check, get
from support.speech_tree import WORDS, tone, write, write_tree

pytest.importorskip("soundfile")

SMALL = FilterBank(bins=20, shift_ms=20.0, frames=52)
SILENCE, UNKNOWN = CLASSES.index("silence"), CLASSES.index("unknown")
# clips per word; twelve words
TRAINING = {"ann": 5, "bob": 4, "cem": 4, "dee": 3}
VALIDATION, TESTING = {"eva": 3, "fay": 4}, {"gus": 5}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("speech")
    write_tree(root / "clips", training=TRAINING, validation=VALIDATION, testing=TESTING)
    return root


@pytest.fixture
def own(tree: Path, tmp_path: Path) -> Path:
    """Return a copy that may be changed."""
    shutil.copytree(tree, tmp_path / "own", ignore=shutil.ignore_patterns("cache"))
    return tmp_path / "own"


def source(root: Path, **fields: object) -> Speech:
    usual = {"seen": 3, "unseen": 2, "features": SMALL}
    return Speech(root=root, **{**usual, **fields})  # type: ignore[arg-type]


def test_seen_are_the_training_speakers_with_the_most_clips_unseen_those_of_the_lists(
    tree: Path,
) -> None:
    population = source(tree).open(0)
    assert population.seen == ("ann", "bob", "cem")  # ties by name
    assert population.unseen == ("gus", "fay")
    assert (population.classes, population.shape) == (12, (1, 52, 20))


def test_by_default_everything_is_as_published() -> None:
    usual = Speech()
    assert (usual.seen, usual.unseen, usual.silence) == (250, 50, 0.1)
    assert (usual.shift_ms, usual.noise_probability, usual.noise_volume) == (100.0, 0.8, 0.1)
    assert usual.balanced
    assert usual.features == FilterBank(bins=128, shift_ms=10.0, frames=128)


def test_classes_are_ten_commands_unknown_and_a_tenth_of_silence(tree: Path) -> None:
    population = source(tree).open(0)
    for name, times in (("ann", 5), ("gus", 5), ("bob", 4)):
        data = population.open(name)
        assert data.validation is not None
        assert data.test is not None
        labels = torch.cat([data.train.y, data.validation.y, data.test.y])
        counts = torch.bincount(labels, minlength=12).tolist()
        assert counts[:10] == [times] * 10
        assert counts[UNKNOWN] == times * (len(WORDS) - 10)
        assert counts[SILENCE] == round(0.1 * times * len(WORDS))


def test_a_class_is_split_80_to_20_twice_and_no_clip_crosses_parts(tree: Path) -> None:
    population = source(tree).open(0)
    train, validation, test = population.rows("ann")
    together = torch.cat([train, validation, test])
    assert together.sort().values.tolist() == list(range(len(together)))
    data = population.open("ann")
    assert data.validation is not None
    assert data.test is not None
    # five clips: 4 to 1, then 3 to 1; ten of other words: 8 to 2, then 6 to 2
    for part, each, unknown in ((data.train, 3, 6), (data.validation, 1, 2), (data.test, 1, 2)):
        counts = torch.bincount(part.y, minlength=12)
        assert counts[:10].tolist() == [each] * 10
        assert int(counts[UNKNOWN]) == unknown
        assert int(counts[SILENCE]) > 0


def test_clips_are_the_files_and_features_are_theirs(tree: Path) -> None:
    population = source(tree).open(0)
    data = population.open("bob")
    assert data.raw is not None
    assert data.train.x.shape == (len(data.train.y), 1, 52, 20)
    assert data.train.x.dtype == torch.float32
    torch.testing.assert_close(data.train.x, SMALL(to_float(data.raw)))
    files = {
        label: {read_wav(p).tobytes() for p in (tree / "clips" / word).glob("bob_*.wav")}
        for label, word in enumerate(COMMANDS)
    }
    for clip, label in zip(data.raw, data.train.y.tolist(), strict=True):
        if label < 10:
            assert clip.numpy().tobytes() in files[label]


def test_silence_is_cut_from_the_noise_the_same_under_every_seed(tree: Path) -> None:
    noises = [read_wav(p) for p in sorted((tree / "clips/_background_noise_").glob("*.wav"))]
    cuts = []
    for seed in (0, 1):
        population = source(tree).open(seed)
        begin = population._rows["ann"][0]
        rows = [r for r in range(*population._rows["ann"]) if population._labels[r] == SILENCE]
        assert rows[0] > begin
        cuts.append([np.array(population._clips.x["waveform"][r]) for r in rows])
    assert all(np.array_equal(a, b) for a, b in zip(*cuts, strict=True))
    for cut in cuts[0]:
        assert any(
            np.array_equal(noise[i : i + 16_000], cut)
            for noise in noises
            for i in np.flatnonzero(noise[: len(noise) - 15_999] == cut[0])
        )
    assert len({cut.tobytes() for cut in cuts[0]}) == len(cuts[0])


def test_the_seed_decides_the_splits_and_nothing_else_does(tree: Path) -> None:
    first, again, other = (source(tree).open(seed) for seed in (0, 0, 1))
    assert torch.equal(first.open("ann").train.x, again.open("ann").train.x)
    for a, b in zip(first.rows("fay"), again.rows("fay"), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.rows("ann")[2], other.rows("ann")[2])
    assert first.about("ann")["clips"] == 66


def test_only_training_batches_are_balanced_and_distorted(tree: Path) -> None:
    data = source(tree).open(0).open("ann")
    assert data.balanced
    assert data.augment is not None
    assert data.raw is not None
    assert data.raw_validation is not None
    rng = torch.Generator().manual_seed(0)
    once = data.augment(data.raw, rng)
    assert once.shape == data.train.x.shape
    moved = (once - data.train.x).abs().flatten(1).amax(1)
    assert float(moved.min()) > 0
    plain = source(tree, distort=False, balanced=False).open(0).open("ann")
    assert (plain.augment, plain.raw, plain.balanced) == (None, None, False)


def test_features_are_computed_once(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source(tree).open(0)

    def never(path: Path) -> np.ndarray:
        raise AssertionError(path)

    monkeypatch.setattr(clip_cache, "read_wav", never)
    population = source(tree).open(3)
    assert population.open("cem").train.x.shape[0] > 0
    with pytest.raises(AssertionError):
        source(tree, features=FilterBank(bins=10)).open(0)


def test_a_changed_file_makes_the_cache_old(own: Path) -> None:
    before = source(own).open(0)
    write(own / "clips/yes/ann_nohash_0.wav", tone(3000))
    after = source(own).open(0)
    changed = np.flatnonzero(
        (np.array(before._clips.x["waveform"]) != after._clips.x["waveform"]).any(1)
    )
    assert len(changed) == 1
    assert not list((own / "cache").glob(".*"))


def test_nobody_is_on_both_sides(own: Path) -> None:
    (own / "clips/testing_list.txt").write_text("yes/ann_nohash_0.wav\n")
    layout = scan(own / "clips", remedy="-")
    assert layout.held_out == {"ann", "eva", "fay"}
    assert layout.ranked(held_out=True)[0] == "ann"


def test_a_missing_folder_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"clips is missing; .*`fedl2p data get speech --root"):
        Speech(root=tmp_path).open(0)
    with pytest.raises(ValueError, match=r"clips is missing; .*`fedl2p data make spoken --root"):
        Speech(root=tmp_path, dataset="spoken").open(0)


def spoil(root: Path, kind: str) -> None:
    clips = root / "clips"
    if kind == "a command":
        shutil.rmtree(clips / "stop")
    elif kind == "other words":
        for word in set(WORDS) - set(COMMANDS):
            shutil.rmtree(clips / word)
    elif kind == "noise":
        shutil.rmtree(clips / "_background_noise_")
    elif kind == "short noise":
        write(clips / "_background_noise_" / "hiss.wav", tone(100, seconds=0.5))
    elif kind == "a list":
        (clips / LISTS[0]).unlink()
    elif kind == "a listed clip":
        (clips / "yes/gus_nohash_0.wav").unlink()
    elif kind == "a name":
        (clips / "yes/ann_nohash_0.wav").rename(clips / "yes/ann.wav")
    elif kind == "a rate":
        write(clips / "yes/ann_nohash_0.wav", tone(400), rate=22_050)
    elif kind == "an empty clip":
        write(clips / "yes/ann_nohash_0.wav", np.zeros(0))
    elif kind == "a cut clip":
        clip = clips / "yes/ann_nohash_0.wav"
        clip.write_bytes(clip.read_bytes()[:9000])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("a command", "clips/stop has no clips of the command; "),
        ("other words", "no folder of another word, so the class unknown is empty; "),
        ("noise", "_background_noise_ has no WAV files, from which silence is cut; "),
        ("short noise", r"hiss.wav is 0\.50 s long, .* at least 1 s; remove it"),
        ("a list", "validation_list.txt is missing, which lists unseen speakers; "),
        ("a listed clip", "testing_list.txt, entry 1: 'yes/gus_nohash_0.wav' is not in the folder"),
        ("a name", "yes/ann.wav is not named SPEAKER_nohash_NUMBER.wav"),
        ("a rate", "ann_nohash_0.wav has 22050 samples per second, but must have 16000"),
        ("an empty clip", "ann_nohash_0.wav has no samples"),
        ("a cut clip", "ann_nohash_0.wav is cut off"),
    ],
)
def test_what_is_missing_or_damaged_is_named_in_one_line(
    own: Path, kind: str, message: str
) -> None:
    spoil(own, kind)
    with pytest.raises(ValueError, match=message) as caught:
        source(own).open(0)
    assert str(caught.value).startswith(str(own / "clips"))
    assert "\n" not in str(caught.value)
    assert not (own / "cache").exists() or not list((own / "cache").iterdir())
    said = check(own)
    assert len(said) == 1
    assert said[0] == str(caught.value)


def test_the_command_names_damage_and_ends_with_2(
    own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["data", "check", "speech", "--root", str(own)])
    assert not stop.value.code
    assert "complete" in capsys.readouterr().out
    for clip in sorted((own / "clips/no").iterdir())[:30]:
        clip.write_bytes(b"nothing")
    with pytest.raises(SystemExit) as stop:
        cli.main(["data", "check", "speech", "--root", str(own)])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 21
    assert "clips/no/ann_nohash_0.wav is not a readable WAV file" in lines[0]
    assert "further files like these" in lines[-1]


def test_too_few_speakers_are_refused(tree: Path) -> None:
    with pytest.raises(ValueError, match="has 4 training speakers, but seen asks for 5"):
        source(tree, seen=5).open(0)
    with pytest.raises(ValueError, match="3 validation and test speakers, but unseen asks for 4"):
        source(tree, unseen=4).open(0)


def test_a_speaker_with_too_few_clips_is_refused(tmp_path: Path) -> None:
    write_tree(tmp_path / "clips", training={"ann": 5, "bob": 1})
    population = source(tmp_path, seen=2, unseen=0, silence=0.0).open(0)
    assert len(population.open("ann").train.y)
    with pytest.raises(ValueError, match=r"'bob' has only 12 clips .*; ask for fewer speakers"):
        population.open("bob")
    with pytest.raises(KeyError, match="there is no client 'zoe'"):
        population.open("zoe")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seen", 0),
        ("unseen", -1),
        ("silence", -0.1),
        ("shift_ms", 1000.0),
        ("noise_probability", 1.1),
        ("noise_volume", float("nan")),
        ("dataset", "song"),
    ],
)
def test_a_setting_out_of_range_is_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{field} must be|and {field} 0 or more"):
        Speech(**{field: value})  # type: ignore[arg-type]


def archive(tree: Path, path: Path) -> RemoteFile:
    """Write the archive of the folder as the published one is made, with members ``./...``."""
    with tarfile.open(path, "w:gz") as tar:
        tar.add(tree / "clips", arcname=".")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return RemoteFile(url="http://127.0.0.1:9/none", name=path.name, checksum=f"sha256:{digest}")


def test_a_downloaded_archive_is_checked_unpacked_and_read(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = archive(tree, tmp_path / speech.ARCHIVE.name)
    monkeypatch.setattr(speech, "ARCHIVE", remote)
    assert get(tmp_path, no_progress) == []
    assert check(tmp_path) == []
    assert source(tmp_path).open(0).seen == source(tree).open(0).seen
    assert get(tmp_path, no_progress) == []  # nothing to do any more


def test_a_wrong_or_cut_archive_leaves_nothing(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / speech.ARCHIVE.name
    remote = archive(tree, path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    monkeypatch.setattr(speech, "ARCHIVE", remote)
    with pytest.raises(ValueError, match="is damaged: its SHA256 is"):
        get(tmp_path, no_progress)
    cut = RemoteFile(url=remote.url, name=remote.name)  # as if the sum were not known
    monkeypatch.setattr(speech, "ARCHIVE", cut)
    with pytest.raises(ValueError, match="is damaged or not the published archive"):
        get(tmp_path, no_progress)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
