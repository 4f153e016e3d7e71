"""Movies with sound from any folder, and cine and tagged movies of virtual speakers."""
import json
import sys
import time

import numpy as np
import pytest
import soundfile
import torch

from sirem_nb.data.movies import find_pairs, fit_frames, read_frames, read_pair, resize, retime, windows
from sirem_nb.data.mrd import write_recon
from sirem_nb.data.sync import write_movie
from sirem_nb.speaker.anatomy import LABELS
from sirem_nb.speaker.cine import (OPEN_WORDS, SAMPLES, came_from, casting, cine, fading, frame_times, hurry, metronome, simulate_cine, spamm, tagged)
from sirem_nb.speaker.corpus import read_truth, virtual_speaker

SMALL = dict(matrix=48, n_frames=13, frame_hz=13.)


def toy(n=30, fps=30., ny=40, nx=56):
    "A disc that moves up and down once a second."
    t, y, x = (np.arange(n) + .5) / fps, *np.mgrid[:ny, :nx]
    return np.float32(np.exp(-((x - nx / 2) ** 2 + (y - ny / 2 + 10 * np.sin(2 * np.pi * t)[:, None, None]) ** 2) / 30))


def sound(path, seconds=1., rate=22050, level=.1):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, level * np.sin(2 * np.pi * 150 * np.arange(round(seconds * rate)) / rate), rate)
    return path


# ------------------------------------------------------------------------------------------------ folders
def test_every_kind_of_movie_is_found_and_read_alike(tmp_path):
    x = toy()
    home = tmp_path / "Cine"
    for name in ("ann_asouk", "ben_asouk", "cy_asouk_r3", "dee_a-geese"): sound(home / f"{name}.wav")
    write_recon(home / "ann_asouk.h5", x, frame_times(30, 30.), 2.5, "toy")
    np.save(home / "ben_asouk.npy", x); (home / "ben_asouk.json").write_text(json.dumps(dict(fps=30, pixel_mm=2.5)))
    write_movie(home / "cy_asouk_r3.mp4", x, 30, scale=1)
    np.save(home / "dee_a-geese.npy", np.uint8(255 * x))
    pairs = find_pairs(tmp_path)
    assert [(p.subject, p.word, p.kind) for p in pairs] == [("ann", "asouk", "cine"), ("ben", "asouk", "cine"), ("cy", "asouk", "cine"), ("dee", "a-geese", "cine")]
    read = [read_frames(p.movie) for p in pairs]
    assert [r[0].shape for r in read] == [(30, 40, 56)] * 4
    assert [r[1] for r in read] == [pytest.approx(30), 30, pytest.approx(30), None] and [r[2] for r in read] == [2.5, 2.5, None, None]
    assert torch.equal(read[0][0], read[1][0]) and (read[2][0] - read[0][0]).abs().max() < .1      # H.264 is not exact
    assert (read[3][0] / 255 - read[0][0]).abs().max() < 1 / 255
    a, b = (fit_frames(r[0], 30., pixel_mm=2.5)[0] for r in (read[0], read[2]))
    assert (a - b).abs().max() < .1


@pytest.mark.parametrize("make, says", [
    (lambda d: None, "no movies with sound"),
    (lambda d: sound(d / "ann_asouk.wav"), "a sound without a movie"),
    (lambda d: np.save(d / "ann_asouk.npy", toy()), "a movie without a sound"),
    (lambda d: (sound(d / "ann.wav"), np.save(d / "ann.npy", toy())), "SUBJECT_WORD"),
    (lambda d: (sound(d / "ann_a.wav"), np.save(d / "ann_a.npy", toy()), (d / "ann_a.avi").write_bytes(b"x")), "2 movies of that name"),
])
def test_a_folder_that_does_not_fit_is_refused_in_one_line(tmp_path, make, says):
    make(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=says) as e: find_pairs(tmp_path)
    assert "\n" not in str(e.value) and str(tmp_path) in str(e.value)


def test_other_refusals(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"): find_pairs(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="kind"): find_pairs(tmp_path, "x-ray")
    with pytest.raises(FileNotFoundError, match="no such movie"): read_frames(tmp_path / "a.mp4")
    for name, content, says in (("a.npy", b"no numpy", "numpy array"), ("a.mp4", b"no movie", "not a movie"), ("a.h5", b"no hdf5", "HDF5"), ("a.txt", b"", "movies end in")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=says): read_frames(tmp_path / name)
    np.save(tmp_path / "flat.npy", np.zeros((5, 5)))
    with pytest.raises(ValueError, match="grey frames"): read_frames(tmp_path / "flat.npy")
    np.save(tmp_path / "b.npy", toy()); (tmp_path / "b.json").write_text("fps: 30")
    with pytest.raises(ValueError, match="not JSON"): read_frames(tmp_path / "b.npy")


def test_trouble_of_the_sound_is_told(tmp_path):
    for name, wav in dict(ann_silent=dict(level=0.), ann_short=dict(seconds=.4), ann_fine=dict()).items():
        np.save(tmp_path / f"{name}.npy", toy()); (tmp_path / f"{name}.json").write_text('{"fps": 30}')
        sound(tmp_path / f"{name}.wav", **wav)
    notes = {p.word: read_pair(p)[2] for p in find_pairs(tmp_path)}
    assert any("silent" in n for n in notes["silent"]) and any("lasts 0.40 s" in n for n in notes["short"])
    assert not any("sound" in n for n in notes["fine"])


# ------------------------------------------------------------------------------------------------ one shape
@pytest.mark.parametrize("frames, fps, says", [
    (np.zeros((0, 20, 20)), 26, "at least two"), (toy(1), 26, "single frame"), (np.full((5, 20, 20), np.nan), 26, "not numbers"), (np.ones((26, 20, 20)), 26, "nothing to see"),
    (toy()[0], 26, "frame, y, x"), (toy(8), 26, "half of it"), (toy(), 1e5, "frames a second"), (toy(ny=5), 26, "at least 8"),
])
def test_what_is_no_movie_is_refused(frames, fps, says):
    with pytest.raises(ValueError, match=says) as e: fit_frames(frames, fps)
    assert "\n" not in str(e.value)


def test_what_fits_is_not_touched():
    x = torch.rand(26, 128, 128, generator=torch.Generator().manual_seed(0))
    y, notes = fit_frames(x, 26., pixel_mm=1.875)
    assert notes == [] and torch.allclose(y, ((x - x.min()) / (x.flatten().kthvalue(int(.999 * x.numel())).values - x.min())).clamp(0, 1), atol=1e-5)


@pytest.mark.parametrize("fps", [15., 23.18, 26., 50., 83.28])
def test_time_is_kept_at_every_frame_rate(fps):
    n = int(1.3 * fps)
    line = torch.arange(float(n))[:, None, None].expand(n, 8, 8)                   # frame i shows the number i
    got = retime(line, fps, 26., 26)[:, 0, 0].numpy()
    inside = ((np.arange(26) + .5) / 26 * fps - .5).clip(0)
    assert np.abs(got - inside).max() < (.13 if fps > 26 else 1e-4)
    assert torch.equal(retime(line, fps, 26., 100, block=7), retime(line, fps, 26., 100, block=100))


def test_millimetres_are_kept():
    disc = torch.zeros(2, 84, 84); disc[:, 37:47, 37:47] = 1                        # 10 pixels of 2.4 mm
    x = resize(disc, 128, 200 / 84)
    assert x.shape == (2, 128, 128) and x.sum() * 1.875 ** 2 == pytest.approx(float(disc.sum()) * (200 / 84) ** 2, rel=.02)
    assert resize(disc, 32, 200 / 84).shape == (2, 32, 32) and resize(torch.rand(2, 300, 200), 128, 1.).shape == (2, 128, 128)
    assert abs(float((x[0].sum(0) * torch.arange(128.)).sum() / x[0].sum()) - 63.5) < 1


def test_windows_cover_a_long_movie():
    x = toy(fps=20., n=97)
    w, start = windows(x, 20., hop=10)
    whole = fit_frames(x, 20., n_frames=126)[0]
    assert w.shape[1:] == (26, 128, 128) and start[0] == 0 and start[-1] == pytest.approx(100 / 26) and np.diff(start).max() < 26 / 26
    for one, s in zip(w, start): assert torch.allclose(one, whole[round(s * 26):round(s * 26) + 26], atol=1e-5)
    assert windows(x[:15], 20.)[0].shape[0] == 1
    with pytest.raises(ValueError, match="hop"): windows(x, 20., hop=0)


# ------------------------------------------------------------------------------------------------ DICOM
def dicom(path, frame, **tags):
    pydicom = pytest.importorskip("pydicom", reason="pydicom is not installed: pip install 'sirem-nb[dicom]'")
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = pydicom.uid.ExplicitVRLittleEndian, "1.2.840.10008.5.1.4.1.1.4", pydicom.uid.generate_uid()
    d = pydicom.dataset.Dataset()
    d.file_meta, frame = meta, np.asarray(frame, np.uint16)
    d.SOPClassUID, d.SOPInstanceUID, d.Modality = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID, "MR"
    d.Rows, d.Columns = frame.shape[-2:]
    d.SamplesPerPixel, d.PhotometricInterpretation, d.BitsAllocated, d.BitsStored, d.HighBit, d.PixelRepresentation = 1, "MONOCHROME2", 16, 12, 11, 0
    if frame.ndim == 3: d.NumberOfFrames = len(frame)
    for k, v in (dict(SeriesInstanceUID="1.2.3", PixelSpacing=[2.5, 2.5]) | tags).items(): setattr(d, k, v)
    d.PixelData = frame.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    d.save_as(path, enforce_file_format=True)


def test_dicom_series_and_multi_frame_file(tmp_path):
    x = np.round(4000 * toy(26, 26.))
    for i in range(26): dicom(tmp_path / f"ann_asouk/IM{(i * 7) % 26:03d}.dcm", x[i], TriggerTime=f"{i * 1000 / 26:.3f}", InstanceNumber=str(26 - i))
    dicom(tmp_path / "ben_asouk.dcm", x, FrameTime="38.4615", RescaleSlope="2", RescaleIntercept="1")
    dicom(tmp_path / "cy_asouk.IMA", x, RecommendedDisplayFrameRate="26")
    for n in ("ann", "ben", "cy"): sound(tmp_path / f"{n}_asouk.wav")
    (a, fps_a, mm_a), (b, fps_b, mm_b), (c, fps_c, _) = (read_frames(p.movie) for p in find_pairs(tmp_path))
    assert np.array_equal(a.numpy(), x) and np.array_equal(b.numpy(), 2 * x + 1) and np.array_equal(c.numpy(), x)
    assert (fps_a, fps_b, fps_c) == (pytest.approx(26, rel=1e-3), pytest.approx(26, rel=1e-4), 26) and mm_a == mm_b == 2.5
    inner, outer = pytest.importorskip("pydicom").Dataset(), pytest.importorskip("pydicom").Dataset()
    inner.PixelSpacing, outer.PixelMeasuresSequence = [1.5, 1.5], [inner]
    dicom(tmp_path / "enhanced.dcm", x, PixelSpacing=None, SharedFunctionalGroupsSequence=[outer])
    assert read_frames(tmp_path / "enhanced.dcm")[1:] == (None, 1.5)                # says no rate; the pixel size stands one level down
    dicom(tmp_path / "ann_asouk/IM099.dcm", x[0], SeriesInstanceUID="1.2.4")
    with pytest.raises(ValueError, match="2 DICOM series"): read_frames(tmp_path / "ann_asouk")
    (tmp_path / "bad.dcm").write_bytes(b"not dicom at all" * 20)
    with pytest.raises(ValueError, match="not DICOM"): read_frames(tmp_path / "bad.dcm")


def test_without_pydicom_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydicom", None)
    (tmp_path / "a.dcm").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match=r"sirem-nb\[dicom\]"): read_frames(tmp_path / "a.dcm")


# ------------------------------------------------------------------------------------------------ real recordings
def test_real_movies_without_sound(real_data):
    files = sorted((real_data / "usc_timit").glob("*.avi"))
    if not files: pytest.skip("no USC-TIMIT movies in shared/data")
    for f in files[::9]:
        frames, fps, pixel = read_frames(f)
        assert frames.shape[1:] == (68, 68) and fps == pytest.approx(23.18, abs=.01) and pixel is None
        w, start = windows(frames, fps)
        assert w.shape[1:] == (26, 128, 128) and w.isfinite().all() and float(w.max()) == 1 and start[-1] + 1 == pytest.approx(len(frames) / fps, abs=.05)
        assert w.std() > .1 and (w[0, 1:] - w[0, :-1]).abs().mean() > .002          # something is seen, and it moves
        assert fit_frames(frames, fps, pixel_mm=200 / 68)[0].shape == (26, 128, 128)
    with pytest.raises(ValueError, match="a movie without a sound"): find_pairs(real_data / "usc_timit")


def test_real_movies_with_sound(real_data):
    home = real_data / "usc_timit_m3_audio"
    if not home.is_dir(): pytest.skip("no movies with sound in shared/data")
    for p in find_pairs(home):
        frames, fps, _ = read_frames(p.movie)
        x, wave, notes = read_pair(p, n_frames=round(len(frames) / fps * 26))
        assert frames.shape[1:] == (204, 204) and x.shape[1:] == (128, 128) and abs(len(wave) / 22050 - len(frames) / fps) < .15
        assert any("23.18 frames a second" in n for n in notes) and not any("silent" in n for n in notes)


# ------------------------------------------------------------------------------------------------ virtual speakers
def test_words_fit_into_a_beat():
    for seed in range(4):
        for word in ("asouk", "ageese", "raindrops", *OPEN_WORDS[seed::12]):
            u, n = metronome(word, virtual_speaker(seed), seed)
            assert SAMPLES[0] <= n <= SAMPLES[1] and .08 <= u.phones[0][1] + 1e-9 and u.phones[-1][2] <= .94 + 1e-6 and abs(u.duration_s - n / 22050) < .006
    with pytest.raises(ValueError, match="shorter word"): hurry("the north wind and the sun were disputing", 1.)


def test_cine_is_a_picture_of_the_anatomy():
    s = virtual_speaker(3)
    u, _ = metronome("asouk", s)
    clean, noisy = cine(u, s, snr=None), cine(u, s)
    assert clean.shape == (26, 128, 128) and torch.equal(noisy, cine(u, s)) and not torch.equal(noisy, cine(u, s, seed=1))
    coarse = s.head.render(u.at(frame_times()), 128, 240.)
    assert (clean - coarse).square().mean().sqrt() < .15 * coarse.square().mean().sqrt()
    air = noisy[:, 100:, :20]                                                       # noise alone: Rayleigh, mean / sd = 1.91
    assert air.mean() / air.std() == pytest.approx(1.913, rel=.05)


def test_repetitions_differ_only_where_it_moves():
    s = virtual_speaker(2)
    u, _ = metronome("ageese", s)
    one, four = (cine(u, s, snr=None, repetitions=r, **SMALL) for r in (1, 4))
    change = (one - four).abs().mean((0, 1))
    assert change[12:30].mean() > 10 * change[38:].mean() and torch.equal(four, cine(u, s, snr=None, repetitions=4, **SMALL))


def test_grid_is_straight_at_first_and_then_follows_the_motion():
    s = virtual_speaker(4)
    u, _ = metronome("asouk", s)
    times, start = frame_times(), u.at([0.])[0]
    mm = (torch.arange(128) - 64) * 240 / 128
    here = torch.stack(torch.meshgrid(mm, mm, indexing="xy"), -1)
    at_once, was = came_from(s.head, start, start[None])[0], came_from(s.head, start, u.at(times))
    miss = (at_once - here)[at_once.isfinite().all(-1)].norm(dim=-1)
    assert miss.max() < .25 and miss.mean() < .01                                  # mm
    labels = s.head.labels(u.at(times), 128, 240.)
    assert torch.equal(was.isfinite(), s.head.motion(u.at(times), 128, 240.).isfinite())
    e, m_ss = fading(times)
    ratio = tagged(u, s, snr=None, spacing_mm=20.) / cine(u, s, snr=None)
    for j in (0, 6, 11, 14):
        tongue = labels[j] == LABELS["tongue"]
        expected = lambda at: m_ss * (1 - e[j]) + e[j] * spamm(at[tongue], 20.)
        follows, stands = ((ratio[j][tongue] - expected(at)).square().mean().sqrt() for at in (was[j], here))
        assert follows < .06 * e[j] + .01
        if j > 10: assert (here - was[j])[tongue].norm(dim=-1).max() > 5 and stands > 4 * follows


def test_fading_and_grid_have_their_closed_forms():
    e, m_ss = fading(np.array([0., .0061, .147]), t1_ms=1000., tr_ms=6., flip_deg=15.)
    c = np.exp(-.006) * np.cos(np.radians(15))
    assert np.allclose(e, [1, c, c ** 24]) and m_ss == pytest.approx((1 - np.exp(-.006)) / (1 - c))
    at = torch.rand(50, 2) * 40
    turned = torch.stack([at[:, 1], -at[:, 0]], 1)
    assert torch.allclose(spamm(at, turn_deg=90.), spamm(turned), atol=1e-5) and spamm(at).min() >= 0 and spamm(at).max() <= 1 + 1e-6
    assert spamm(at, total_deg=180., pulses=(1, 1)).min() < -.5                    # inverted lines


def test_who_says_what():
    for counts in ((43, 20), (20, 43)):
        cast = casting(63, ("asouk", "ageese"), counts)
        assert tuple(sum(w == v for _, w in cast) for v in ("asouk", "ageese")) == counts and {s for s, _ in cast} == set(range(63))
    assert casting(8, ("a", "b"), (1, 1), seed=1) != casting(8, ("a", "b"), (1, 1), seed=2)
    some = casting(6, (), (), OPEN_WORDS, 7)
    assert len(some) == 42 and some[:7] == casting(1, (), (), OPEN_WORDS, 7)      # more speakers do not change the first one's words
    with pytest.raises(ValueError, match="one count for each"): casting(3, ("a",), (1, 2))


@pytest.fixture(scope="module")
def data_set(tmp_path_factory):
    out = tmp_path_factory.mktemp("cine")
    return out, simulate_cine(out, 2, tagged="both", n_workers=1, seed=5, recordings=2, repetitions=2, **SMALL)


def test_data_set_and_its_truth(data_set):
    out, pairs = data_set
    assert len(pairs) == 8 and sorted(p.name for p in find_pairs(out, "tagged")) == sorted(p.name for p in pairs if p.kind == "tagged")
    assert {p.name.endswith("_r2") for p in pairs} == {True, False}
    for p in pairs:
        frames, wave, notes = read_pair(p, n_frames=13, matrix=48, frame_hz=13.)
        truth = read_truth(p.truth)
        assert notes == [] and SAMPLES[0] <= len(wave) <= SAMPLES[1] and np.sqrt(np.mean(wave ** 2)) > .005
        assert truth["labels"].shape == (13, 48, 48) and truth["contours"]["tongue"].shape[0] == 13 and truth["parameters"].shape == (13, 8) and truth["phones"]
        loud = np.abs(wave[int((truth["phones"][0][1]) * 22050):int(truth["phones"][-1][2] * 22050)]).mean()
        assert loud > 5 * np.abs(wave[:int(.05 * 22050)]).mean()                    # the sound is where the phones are
    one, two = pairs[0], next(p for p in pairs if p.kind == "tagged" and p.name == pairs[0].name)
    assert one.audio.read_bytes() == two.audio.read_bytes() and not torch.equal(read_frames(one.movie)[0], read_frames(two.movie)[0])


def test_a_stopped_run_goes_on_and_gives_the_same(data_set, tmp_path):
    out, pairs = data_set
    kept, lost = pairs[0].movie, pairs[-1].movie
    stamp, before = kept.stat().st_mtime_ns, read_frames(lost)[0]
    lost.unlink()
    simulate_cine(out, 2, tagged="both", n_workers=1, seed=5, recordings=2, repetitions=2, **SMALL)
    assert kept.stat().st_mtime_ns == stamp and torch.equal(read_frames(lost)[0], before)
    with pytest.raises(ValueError, match="made with other settings"): simulate_cine(out, 2, n_workers=1, seed=6, **SMALL)
    with pytest.raises(ValueError, match="made with other settings"): simulate_cine(out, 3, tagged="both", n_workers=1, seed=5, recordings=2, repetitions=2, **SMALL)


def test_open_vocabulary_and_bad_words(tmp_path):
    pairs = simulate_cine(tmp_path / "a", 1, open_vocabulary=("fish", "[B IY T]"), n_workers=1, **SMALL)
    assert [p.word for p in pairs] == ["fish", "b-iy-t"] and all(p.kind == "cine" for p in pairs)
    for words, says in (("xqzt", "not in the dictionary"), ("well he is nearly ninety three years old", "shorter word")):
        with pytest.raises(ValueError, match=says): simulate_cine(tmp_path / "b", 2, words=("asouk", words), n_workers=1)
    assert not list((tmp_path / "b").rglob("*.h5"))


def test_cost():
    s = virtual_speaker(7)
    u, _ = metronome("asouk", s)
    cine(u, s, **SMALL)
    t = time.process_time(); cine(u, s); plain = time.process_time() - t
    t = time.process_time(); tagged(u, s); grid = time.process_time() - t
    assert plain < 3 and grid < 8, (plain, grid)                                     # 0.3 and 1.1 s of one core here
