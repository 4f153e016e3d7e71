"""A data set of virtual speakers: same seed, same data; sound and picture agree; killed runs; several processes; cost."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import soundfile
import torch

from sirem_nb.data.frames import find_recordings
from sirem_nb.data.mrd import info, read_mrd
from sirem_nb.data.sync import resample
from sirem_nb.kspace.spiral import SpiralProtocol
from sirem_nb.speaker.anatomy import LABELS
from sirem_nb.speaker.articulators import area_function
from sirem_nb.speaker.corpus import FREE, ITEMS, SCRIPT as SENTENCES, CorpusSettings, perform, read_truth, record, simulate_corpus, virtual_speaker, voice_of
from sirem_nb.speaker.scanner import recording_paths, true_pictures
from sirem_nb.speaker.utterances import pronounce

SMALL = SpiralProtocol(n_arms=9, n_samples=400, matrix=42)
KW = dict(words=["asouk", "[AA P AA]"], seconds=None, protocol=SMALL, n_coils=3)


def contents(recording):
    "Everything in the files of a recording that is data."
    scan, out = read_mrd(recording.raw), {}
    out["kspace"], out["arm"], out["wave"] = scan.kspace.numpy(), scan.arm.numpy(), soundfile.read(recording.audio)[0]
    with h5py.File(recording.truth) as f:
        f.visititems(lambda name, item: out.__setitem__(name, item[:]) if isinstance(item, h5py.Dataset) else None)
    return out


def differing(a, b):
    "Names of what is not equal bit for bit in two lists of recordings."
    out = []
    for one, two in zip(a, b, strict=True):
        x, y = contents(one), contents(two)
        assert x.keys() == y.keys()
        out += [f"{one.name} {k}" for k in x if x[k].dtype != y[k].dtype or x[k].tobytes() != y[k].tobytes()]
    return out


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    out = tmp_path_factory.mktemp("corpus")
    return out, simulate_corpus(out, 2, recordings=2, n_workers=1, seed=3, **KW)


def test_a_seed_is_a_person():
    people = [virtual_speaker(s) for s in range(40)]
    assert people == [virtual_speaker(s) for s in range(40)]
    assert len({(p.shape, p.voice, p.pace, p.head_seed, p.coil_seed) for p in people}) == 40
    f0 = {sex: [p.voice.f0_hz for p in people if p.sex == sex] for sex in "fm"}
    assert 90 < min(f0["m"]) and max(f0["f"]) < 300 and np.mean(f0["f"]) > 1.5 * np.mean(f0["m"])
    assert all(0 < getattr(p.voice, k) < 1 for p in people for k in ("open_quotient", "gap_cm2", "breathiness", "jitter", "shimmer"))


def test_layout_and_truth(corpus):
    out, made = corpus
    assert [r.name for r in find_recordings(out)] == [r.name for r in made] and len(made) == 4
    assert made[0].raw == out / "sub001" / "2drt" / "raw" / "sub001_2drt_01_words_raw.h5" and made[3].name == "sub002_2drt_02_words"
    scan, truth = read_mrd(made[0].raw), read_truth(made[0].truth)
    n = scan.n_acq // 2
    assert scan.origin == "virtual speaker" and not info(made[0].raw)["trouble"]
    assert np.allclose(truth["frame_times_s"], (np.arange(n) + 0.5) * 2 * scan.tr_s)
    assert truth["frames"].shape == (n, 42, 42) and truth["frames"].dtype == np.float16 and truth["labels"].shape == (n, 42, 42)
    assert truth["labels"].dtype == np.uint8 and truth["labels_names"] == LABELS and set(np.unique(truth["labels"])) <= {0, *LABELS.values()}
    assert truth["parameters"].shape == (n, 8) and truth["parameters_names"][7] == "velum" and truth["formants_hz"].shape == (n, 4)
    assert truth["area_cm2"].shape == truth["length_cm"].shape == (n, truth["area_cm2"].shape[1]) and truth["port_cm2"].shape == (n,)
    assert truth["contours"]["tongue"].shape[::2] == (n, 2) and np.isfinite(truth["formants_hz"]).all()
    assert [p for p, _, _ in truth["phones"]] == ["AX", "S", "UW", "K", "AA", "P", "AA"] and all(a < b for _, a, b in truth["phones"])
    wave, rate = soundfile.read(made[0].audio)
    assert rate == 20000 and abs(len(wave) / rate - scan.duration_s) < 1e-3 and 0.01 < np.abs(wave).max() < 1
    same_head = virtual_speaker(3000).head.render(torch.as_tensor(truth["parameters"][40:42]), 84)
    gap = np.abs(true_pictures(same_head, (42, 42)).numpy() - truth["frames"][40:42])
    assert gap.max() < 2e-3


def test_sound_and_picture_tell_one_story(corpus):
    for r in corpus[1]:
        truth, (wave, rate) = read_truth(r.truth), soundfile.read(r.audio)
        size = int(0.012 * rate)
        level = np.array([10 * np.log10((wave[max(0, m - size // 2):m + size // 2] ** 2).mean() + 1e-12)
                          for m in (truth["frame_times_s"] * rate).astype(int)])
        shut = (truth["area_cm2"][:, 3:].min(1) <= 0) & (truth["port_cm2"] <= 0.01)
        shut[1:] &= shut[:-1]                                            # not the very moment of closing
        open_and_voiced = (truth["area_cm2"][:, 3:].min(1) > 0.4) & (truth["voicing"] > 0.9)
        assert shut.sum() > 4 and np.median(level[open_and_voiced]) > np.median(level[shut]) + 30
        loud = level > level.max() - 25
        first = truth["phones"][0][1]
        assert abs(truth["frame_times_s"][loud][0] - first) < 0.06       # sound begins when the first phone does


def test_speakers_differ_and_recordings_differ(corpus):
    made = corpus[1]
    frames = [read_truth(r.truth)["frames"][30].astype(float) for r in made]
    rel = lambda a, b: np.linalg.norm(a - b) / np.linalg.norm(a)
    assert rel(frames[0], frames[2]) > 0.2
    assert not np.array_equal(read_mrd(made[0].raw).kspace[:50], read_mrd(made[1].raw).kspace[:50])


def test_resume_remakes_only_what_is_missing(corpus, tmp_path):
    make = lambda **kw: simulate_corpus(tmp_path, 2, recordings=1, n_workers=1, seed=3, **(KW | kw))
    again = make()
    assert differing(corpus[1][::2], again) == []
    stamp = again[0].raw.stat().st_mtime_ns
    again[1].truth.unlink()
    (again[1].truth.parent / f".{again[1].truth.stem}.99999.tmp.h5").write_bytes(b"half")
    assert differing(corpus[1][::2], make()) == [] and again[0].raw.stat().st_mtime_ns == stamp
    assert not list(tmp_path.rglob(".*tmp*"))
    with pytest.raises(ValueError, match="other settings"):
        make(n_coils=4)


SCRIPT = """
import os, signal, sys
from sirem_nb.data.mrd import replacing
from sirem_nb.speaker import corpus
from sirem_nb.kspace.spiral import SpiralProtocol
out, workers, die_at = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
write, calls = corpus.write_mrd, []

def write_or_die(path, scan):
    calls.append(path)
    if len(calls) == die_at:
        with replacing(path) as half:
            open(half, "wb").write(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
    write(path, scan)

if __name__ == "__main__":
    if die_at: corpus.write_mrd = write_or_die
    corpus.simulate_corpus(out, 1, ["[AA P AA]"], SpiralProtocol(n_arms=9, n_samples=400, matrix=42), seed=3, recordings=3, n_workers=workers, seconds=None, n_coils=3)
"""


def test_without_the_scanner_nothing_else_changes(corpus, tmp_path):
    kw = KW | dict(n_workers=1, seed=3, raw=False)
    made = simulate_corpus(tmp_path, 1, recordings=2, video=True, free=["iki", "upu", "ara"], free_recordings=2, free_seconds=None, **kw)
    assert [r.name.split("2drt_")[1] for r in made] == ["01_words", "02_words", "17_topic1", "18_topic2"] and not list(tmp_path.rglob("*_raw.h5"))
    for with_raw, without in zip(corpus[1][:2], made):
        assert without.raw is None and without.video and with_raw.audio.read_bytes() == without.audio.read_bytes()
        with h5py.File(with_raw.truth) as a, h5py.File(without.truth) as b:
            names = []
            a.visititems(lambda n, item: names.append(n) if isinstance(item, h5py.Dataset) else None)
            assert len(names) > 15 and all(a[n][()].tobytes() == b[n][()].tobytes() for n in names) and np.array_equal(a.attrs["pixel_mm"], b.attrs["pixel_mm"])
    said = [[p for p, _, _ in read_truth(r.truth)["phones"]] for r in made[2:]]
    assert said == [["IY", "K", "IY", "AA", "R", "AA"], ["UW", "P", "UW"]]                      # each free recording has its own share of the list
    stamp = made[0].truth.stat().st_mtime_ns
    made[2].audio.unlink()
    again = simulate_corpus(tmp_path, 1, recordings=2, video=True, free=["iki", "upu", "ara"], free_recordings=2, free_seconds=None, **kw)
    assert again[2].audio.is_file() and made[0].truth.stat().st_mtime_ns == stamp


def test_free_sentences_are_in_no_script(tmp_path):
    assert not set(FREE) & set(SENTENCES + ITEMS) and len(set(SENTENCES)) == len(SENTENCES) and len(set(FREE)) == len(FREE)
    phones = {p for s in SENTENCES for p in pronounce(s)}
    assert phones >= {p for s in FREE for p in pronounce(s)} and len(phones) == 40
    for wrong, words in ((dict(free=["asouk"]), "in the script and among the free"), (dict(free=["iki"], free_recordings=2), "2 free recordings from 1"), (dict(free=["xqzzt"]), "xqzzt")):
        with pytest.raises(ValueError, match=words):
            simulate_corpus(tmp_path / "set", 1, n_workers=1, **KW, **wrong)
    assert not (tmp_path / "set").exists()


def test_a_plan_of_an_older_version_goes_on(tmp_path):
    made = simulate_corpus(tmp_path, 1, n_workers=1, **KW)
    plan = json.loads((tmp_path / "corpus.json").read_text())
    for new in ("raw", "free", "free_recordings", "free_seconds"): del plan["settings"][new]
    (tmp_path / "corpus.json").write_text(json.dumps(plan))
    stamp = made[0].raw.stat().st_mtime_ns
    assert simulate_corpus(tmp_path, 1, n_workers=1, **KW)[0].raw.stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="other settings"):
        simulate_corpus(tmp_path, 1, n_workers=1, raw=False, **KW)


def test_killed_in_the_middle_then_finished_by_two_processes(tmp_path):
    script = tmp_path / "make.py"
    script.write_text(SCRIPT)
    env = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1]), "OMP_NUM_THREADS": "1"}

    def start(folder, workers, die_at=0):
        command = [sys.executable, str(script), str(tmp_path / folder), str(workers), str(die_at)]
        return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)

    def end(p):
        err = p.communicate(timeout=300)[1]
        return p.returncode, err[-2000:]

    whole, killed = start("whole", 1), start("killed", 1, die_at=2)      # dies while it writes its second raw file
    assert end(killed)[0] == -signal.SIGKILL
    left = find_recordings(tmp_path / "killed")
    assert len(left) == 1 and list((tmp_path / "killed").rglob(".*tmp*"))
    for r in left:                                                       # what is there is whole
        read_mrd(r.raw), read_truth(r.truth), soundfile.read(r.audio)
    for p in (whole, start("killed", 2)):
        code, err = end(p)
        assert code == 0, err
    made = find_recordings(tmp_path / "killed")
    assert len(made) == 3 and differing(find_recordings(tmp_path / "whole"), made) == []
    assert not list((tmp_path / "killed").rglob(".*tmp*"))


def test_unknown_words_are_named_before_anything_is_made(tmp_path):
    with pytest.raises(ValueError, match="xqzzt"):
        simulate_corpus(tmp_path / "set", 1, ["asouk", "xqzzt"], n_workers=1)
    assert not (tmp_path / "set").exists()
    with pytest.raises(FileNotFoundError, match="truth"):
        read_truth(tmp_path / "no_truth.h5")


def test_everybody_reaches_their_closures():
    for seed in range(8):
        p = virtual_speaker(seed)
        u = perform(p, ["[AA P AA T AA K AA]"], 1)
        area = area_function(u.params, p.shape)[0].numpy()
        for label, a, b in u.phones:
            if label in "PTK":
                assert area[(u.times_s > a) & (u.times_s < b), 3:].min() == 0, (p.name, label)


def test_a_recogniser_that_knows_people_understands_the_voices():
    pocketsphinx = pytest.importorskip("pocketsphinx")
    words = "seven nine grandfather rainbow shoe sea mom zoo five house water beard sunlight computer coffee father".split()
    decoder = pocketsphinx.Decoder(pocketsphinx.Config(samprate=16000, lm=None, loglevel="FATAL"))
    decoder.add_jsgf_string("g", f"#JSGF V1.0; grammar g; public <s> = {' | '.join(words)} ;")
    decoder.activate_search("g")
    rng, right = np.random.default_rng(0), 0
    for p in (virtual_speaker(0), virtual_speaker(2)):
        for word in words:
            wave = resample(voice_of(perform(p, [word], 1), p), 20000, 16000)
            wave = np.pad(0.6 * wave / np.abs(wave).max(), 3000) + 2e-4 * rng.standard_normal(len(wave) + 6000)
            decoder.start_utt()
            decoder.process_raw((wave * 32767).astype(np.int16).tobytes(), full_utt=True)
            decoder.end_utt()
            right += decoder.hyp() is not None and decoder.hyp().hypstr == word
    assert right >= 24, f"{right} of 32 words recognised; 2 would be chance"


def test_a_list_is_read_for_about_as_long_as_asked():
    p = virtual_speaker(5)
    u, v = perform(p, ["asouk", "ageese", "bit"], 0, 5.0), perform(p, ["asouk", "ageese", "bit"], 1, 5.0)
    assert abs(u.duration_s - 5) < 1 and [x[0] for x in u.phones] != [x[0] for x in v.phones]
    assert (np.diff(u.times_s) > 0).all() and len(u.times_s) == len(u.params) == len(u.pressure)
    assert len(voice_of(u, p)) == pytest.approx(u.duration_s * 20000, abs=2)


def test_cost_of_a_second_of_scan(tmp_path):
    p = virtual_speaker(11)
    p.head, voice_of(perform(p, ["bit"]), p)                             # the head is drawn, and loops compiled, once
    start = time.process_time()
    r = record(p, recording_paths(tmp_path, "sub012", "01", "words"), 0, CorpusSettings(seconds=3.0))  # 13 arms, 84 x 84, 8 coils
    cost = (time.process_time() - start) / read_mrd(r.raw).duration_s
    assert cost < 5, f"{cost:.1f} s of one core for a second of scan"     # measured: 1.7
