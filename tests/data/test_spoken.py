"""Made speech: the layout that is written, with a stand-in voice and with espeak-ng itself."""

from __future__ import annotations

import collections
import dataclasses
import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from fedl2p import recipes
from fedl2p.cli import entry as cli
from fedl2p.data import spoken
from fedl2p.data.audio.espeak import ACCENTS, VARIANTS, Espeak, Utterance, trimmed
from fedl2p.data.audio.filter_banks import SAMPLE_RATE, FilterBank
from fedl2p.data.audio.recording_conditions import DEVICES, NOISES, apply_device, make_noise
from fedl2p.data.audio.speech_commands import COMMANDS, scan
from fedl2p.data.audio.wav_files import read_wav
from fedl2p.data.files.folders import no_progress
from fedl2p.data.speech import Speech
from fedl2p.data.spoken import OTHERS, Make, check, draw_speakers, words_of, write_archive
from support.speech_tree import tone

pytest.importorskip("soundfile")
pytest.importorskip("scipy")

SMALL = Make(speakers=6, unseen=3, repeats=3, others=4, workers=2)


def beep(utterance: Utterance) -> np.ndarray:
    """Speak a word as a tone: the stand-in for the synthesiser."""
    word = (*COMMANDS, *OTHERS).index(utterance.word)
    return tone(200 + 40 * word + utterance.pitch, seconds=40 / utterance.speed, volume=0.9)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("spoken")
    write_archive(SMALL, root, beep, no_progress, made_by="beep 1.0")
    return root


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def test_the_layout_is_that_of_the_archive(made: Path) -> None:
    layout = scan(made / "clips", remedy="-")
    assert len(layout.clips) == 6
    assert len(layout.held_out) == 3
    for own in layout.clips.values():
        words = collections.Counter(clip.partition("/")[0] for clip in own)
        assert all(words[command] == 3 for command in COMMANDS)
        assert sorted(words.values()) == [1] * 4 + [3] * 10
    assert {Path(name).stem for name in layout.noises} == set(NOISES)
    assert check(made) == []
    for clip in layout.clips["voice00"]:
        assert len(read_wav(made / "clips" / clip)) == SAMPLE_RATE
    # each list names whole speakers, and no speaker is in both
    named = [
        {line.partition("/")[2].partition("_")[0] for line in path.read_text().splitlines()}
        for path in sorted((made / "clips").glob("*_list.txt"))
    ]
    assert sorted(map(len, named)) == [1, 2]
    assert not named[0] & named[1]
    assert named[0] | named[1] == layout.held_out


def test_the_reader_takes_it_for_real_and_knows_the_speakers(made: Path) -> None:
    source = Speech(root=made, dataset="spoken", seen=3, unseen=3, features=FilterBank(bins=20))
    population = source.open(0)
    cast = {s.name: s for s in draw_speakers(SMALL)}
    assert {name for name, s in cast.items() if s.held_out} == set(population.unseen)
    for name in population.names:
        data = population.open(name)
        assert data.test is not None
        assert set(data.test.y.tolist()) >= set(range(10))
        about = population.about(name)
        assert about["accent"] == cast[name].accent
        assert about["device"] == cast[name].device
        assert about["clips"] == 34 + 3


@pytest.mark.slow
def test_the_same_settings_give_the_same_files_with_any_number_of_threads(
    made: Path, tmp_path: Path
) -> None:
    one = dataclasses.replace(SMALL, workers=1)
    write_archive(one, tmp_path, beep, no_progress, made_by="beep 1.0")
    assert contents(tmp_path / "clips") == contents(made / "clips")
    assert draw_speakers(SMALL) != draw_speakers(dataclasses.replace(SMALL, seed=1))


def test_clips_of_a_word_differ_and_speakers_have_their_loudness(made: Path) -> None:
    cast = draw_speakers(SMALL)
    for speaker in cast:
        clips = [
            read_wav(made / f"clips/yes/{speaker.name}_nohash_{i}.wav").astype(float)
            for i in range(3)
        ]
        assert len({clip.tobytes() for clip in clips}) == 3
        for clip in clips:
            peak = 20 * np.log10(np.abs(clip).max() / 32767)
            assert abs(peak - speaker.loudness) < 3.3
    assert np.ptp([s.loudness for s in cast]) > 6


def test_voices_devices_and_noises_go_round() -> None:
    cast = draw_speakers(Make())
    assert len(cast) == 60
    assert sum(s.held_out for s in cast) == 15
    assert len({s.variant for s in cast}) == 60
    for values, kinds in (
        ([s.accent for s in cast], ACCENTS),
        ([s.device for s in cast], DEVICES),
        ([s.noise for s in cast], NOISES),
    ):
        counts = collections.Counter(values)
        assert set(counts) == set(kinds)
        assert max(counts.values()) - min(counts.values()) <= 1
    assert {s.device for s in cast if s.held_out} != {cast[0].device}


def test_words_of_a_speaker() -> None:
    make = Make(others=7)
    said = [words_of(make, s) for s in draw_speakers(make)[:5]]
    for words in said:
        assert [w for w, _ in words[:10]] == list(COMMANDS)
        assert len({w for w, _ in words[10:]} & set(OTHERS)) == 7
    assert said[0] != said[1]
    assert not set(COMMANDS) & set(OTHERS)
    assert len((*COMMANDS, *OTHERS)) == 35  # those of Speech Commands, version 2


def test_an_error_while_speaking_leaves_nothing(tmp_path: Path) -> None:
    spoken_words = []
    lock = threading.Lock()

    def choking(utterance: Utterance) -> np.ndarray:
        with lock:
            spoken_words.append(utterance.word)
            if len(spoken_words) == 30:
                raise ValueError("out of breath")
        return beep(utterance)

    with pytest.raises(ValueError, match="out of breath"):
        write_archive(SMALL, tmp_path, choking, no_progress)
    assert list(tmp_path.iterdir()) == []
    assert len(spoken_words) < 6 * 34


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    def stop(what: str, done: int, total: int | None) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_archive(SMALL, tmp_path, beep, stop)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_made_with_other_settings_is_left_alone(made: Path) -> None:
    before = contents(made)
    SMALL.run(made, no_progress)  # the same settings: nothing to do, and no espeak-ng needed
    with pytest.raises(ValueError, match=r"clips is there already, made with other settings .*--r"):
        Make(speakers=7, unseen=3).run(made, no_progress)
    assert contents(made) == before


def test_progress_is_told(tmp_path: Path) -> None:
    told: list[tuple[str, int, int | None]] = []
    few = Make(speakers=2, unseen=1, repeats=1, others=1)
    write_archive(few, tmp_path, beep, lambda *args: told.append(args))
    assert told == [("speaking", i, 22) for i in range(1, 23)]
    settings = json.loads((tmp_path / "clips/speakers.json").read_text())["settings"]
    assert settings == {"speakers": 2, "unseen": 1, "repeats": 1, "others": 1, "seed": 0}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"unseen": 60}, "unseen must be 0 or more and below speakers, got 60 of 60"),
        ({"repeats": 0}, "repeats must be 1 or more"),
        ({"others": 26}, "others 1 to 25, got 10 and 26"),
        ({"workers": -1}, "workers must be 0"),
    ],
)
def test_bad_settings_are_refused(fields: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Make(**fields)


def test_a_missing_synthesiser_is_one_line_and_status_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(SystemExit) as stop:
        cli.main(["data", "make", "spoken", "--root", str(tmp_path / "out")])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "espeak-ng, which speaks, is missing; install it" in line
    assert "apt-get install espeak-ng" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", list(DEVICES))
def test_a_device_acts_on_each_clip_by_itself(kind: str) -> None:
    clips = np.stack([tone(300), tone(1200) + 0.1 * tone(3000), 0.01 * tone(700)])
    heard = apply_device(kind, clips, severity=0.6, rng=np.random.default_rng(0))
    assert heard.shape == clips.shape
    assert np.isfinite(heard).all()
    assert (np.abs(heard - clips).max() > 0.01) == (kind != "none")
    alone = apply_device(kind, clips[1:2], severity=0.6, rng=np.random.default_rng(0))
    np.testing.assert_allclose(alone[0], heard[1], atol=1e-9)


def power(x: np.ndarray, low: float, high: float) -> float:
    spectrum = np.abs(np.fft.rfft(x)) ** 2
    hertz = np.fft.rfftfreq(len(x), 1 / SAMPLE_RATE)
    return float(spectrum[(hertz >= low) & (hertz < high)].sum() / spectrum.sum())


@pytest.mark.parametrize(
    ("kind", "low", "high"),
    [("telephone", 425, 2700), ("muffled", 0, 1300), ("thin", 1200, 8000)],
)
def test_a_band_is_kept_and_the_rest_is_not(kind: str, low: float, high: float) -> None:
    white = np.random.default_rng(0).standard_normal((1, SAMPLE_RATE))
    heard = apply_device(kind, white, severity=0.5, rng=np.random.default_rng(0))[0]
    assert power(white[0], low, high) < 0.9
    assert power(heard, low / 1.3, high * 1.3) > 0.98


def test_echo_and_room_go_on_after_the_sound() -> None:
    click = np.zeros((1, SAMPLE_RATE))
    click[0, 100] = 1
    for kind in ("echo", "room"):
        heard = apply_device(kind, click, severity=0.5, rng=np.random.default_rng(0))[0]
        assert heard[100] == pytest.approx(1, abs=0.2)
        assert np.square(heard[1000:]).sum() > 0.1
        assert np.abs(heard[:100]).max() < 1e-9


def test_a_severer_device_changes_the_spectrum_more() -> None:
    white = np.random.default_rng(0).standard_normal((1, SAMPLE_RATE))
    plain = np.abs(np.fft.rfft(white))
    for kind in set(DEVICES) - {"none"}:
        far = []
        for severity in (0.0, 1.0):
            heard = apply_device(kind, white, severity=severity, rng=np.random.default_rng(1))
            far.append(np.square(np.abs(np.fft.rfft(heard)) - plain).mean())
        assert far[0] < far[1], kind


def test_an_unknown_device_or_severity_is_refused() -> None:
    clips = np.zeros((1, 100))
    with pytest.raises(ValueError, match="no device 'tin'; the kinds are none, telephone"):
        apply_device("tin", clips, severity=0.5, rng=np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"between 0 and 1, got 1\.5"):
        apply_device("echo", clips, severity=1.5, rng=np.random.default_rng(0))


@pytest.mark.parametrize("kind", list(NOISES))
def test_a_noise_is_its_generators_and_about_one_in_size(kind: str) -> None:
    long = make_noise(kind, 4 * SAMPLE_RATE, np.random.default_rng(0))
    assert long.shape == (4 * SAMPLE_RATE,)
    assert 0.5 < np.sqrt(np.mean(long**2)) < 2
    assert np.array_equal(long, make_noise(kind, 4 * SAMPLE_RATE, np.random.default_rng(0)))
    assert not np.array_equal(long, make_noise(kind, 4 * SAMPLE_RATE, np.random.default_rng(1)))


def test_the_colour_of_a_noise_is_its_slope() -> None:
    for kind, slope in (("white", 0.0), ("pink", 1.0), ("brown", 2.0)):
        x = make_noise(kind, 20 * SAMPLE_RATE, np.random.default_rng(0))
        # power per hertz falls by 2^slope per octave
        octaves = [power(x, f, 2 * f) / f for f in (200, 400, 800, 1600)]
        falls = np.diff(-np.log2(octaves))
        np.testing.assert_allclose(falls, slope, atol=0.1)


def test_silence_around_a_word_is_cut_away() -> None:
    x = np.concatenate([np.zeros(500), 0.3 * np.ones(100), np.zeros(700)])
    assert np.array_equal(trimmed(x), np.ones(100))
    with pytest.raises(ValueError, match="is silent"):
        trimmed(np.zeros(100))


def test_the_recipe_is_the_reader_on_made_speech() -> None:
    study = recipes.get("spoken")
    assert isinstance(study.data, Speech)
    assert study.data.dataset == "spoken"
    assert (study.data.seen + study.data.unseen, study.data.unseen) == (
        Make().speakers,
        Make().unseen,
    )


ESPEAK = pytest.mark.skipif(
    shutil.which("espeak-ng") is None,
    reason="espeak-ng is not installed here (apt-get install espeak-ng); it is no Python package",
)


@ESPEAK
def test_espeak_speaks_words_of_plausible_length_the_same_at_every_call() -> None:
    espeak = Espeak()
    said = {
        (word, variant): espeak(
            Utterance(word=word, accent="en-us", variant=variant, speed=150, pitch=50)
        )
        for word in ("yes", "backward")
        for variant in ("m1", "f3", "whisper")
    }
    for samples in said.values():
        assert 0.15 < len(samples) / SAMPLE_RATE < 1.2
        assert np.abs(samples).max() == 1
    assert len({samples.tobytes() for samples in said.values()}) == 6
    assert len(said["backward", "m1"]) > len(said["yes", "m1"])
    again = espeak(Utterance(word="yes", accent="en-us", variant="whisper", speed=150, pitch=50))
    assert np.array_equal(again, said["yes", "whisper"])
    assert "eSpeak" in espeak.version()


@ESPEAK
def test_all_voices_are_there_and_a_missing_one_is_named() -> None:
    espeak = Espeak()
    espeak.check(ACCENTS, VARIANTS)
    with pytest.raises(ValueError, match="no voice variant 'nobody'"):
        espeak.check(ACCENTS, ["nobody"])
    with pytest.raises(ValueError, match=r"failed .*voice does not exist"):
        espeak.check(["xx-none"], VARIANTS)


@ESPEAK
def test_the_command_makes_what_the_reader_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["data", "make", "spoken", "--root", str(tmp_path), "--speakers", "2", "--unseen", "1"]
    with pytest.raises(SystemExit) as stop:
        cli.main([*args, "--repeats", "3", "--others", "3"])
    assert not stop.value.code, capsys.readouterr().err
    assert check(tmp_path) == []
    source = Speech(root=tmp_path, dataset="spoken", seen=1, unseen=1, features=FilterBank(bins=20))
    population = source.open(0)
    for name in population.names:
        assert len(population.open(name).train.y) >= 10
    assert spoken.ABOUT in {p.name for p in (tmp_path / "clips").iterdir()}
