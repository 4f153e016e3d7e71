"""Files: raw data (MRD), sound, movies, recon files, and every way in which they can be bad."""
import errno
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import h5py
import ismrmrd
import numpy as np
import pytest
import soundfile
import torch
from ismrmrd import xsd

from sirem_nb.data.frames import (FrameDataset, check_split, cut_frames, find_recordings, frame_groups, part_of, read_split,
                                  split_subjects, write_split)
from sirem_nb.data.mrd import Scan, audio_trouble, find_audio, info, read_mrd, read_recon, replacing, write_json, write_mrd, write_recon
from sirem_nb.data.sync import audio_windows, nearest_reference, read_audio, read_movie, resample, write_movie
from sirem_nb.kspace.density import density
from sirem_nb.kspace.gridding import estimate_smaps, gridding
from sirem_nb.kspace.nufft import Nufft, exact_adjoint, exact_dft
from sirem_nb.kspace.spiral import USC13, SpiralProtocol
from sirem_nb.speaker.scanner import coil_maps

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"


def real(*names):
    path = DATA.joinpath(*names)
    if not path.exists():
        pytest.skip(f"no real recordings at {DATA}: {'/'.join(names)} is not checked")
    return path


def phantom(n):
    "A smooth head-like picture."
    y, x = np.mgrid[:n, :n] / n - .5
    return torch.as_tensor(.5 / (1 + np.exp(((x / .3)**2 + (y / .35)**2 - 1) * 30)) + .4 * np.exp(-((x + .1)**2 + (y - .05)**2) / .005))


def spiral_scan(protocol=USC13, n_acq=None, n_coils=4, dcf=True, origin="virtual speaker", seed=0):
    "Every acquisition sees the same picture, plus a little noise, so that samples differ between acquisitions."
    n_acq = n_acq or protocol.n_arms * 2
    k, arm = protocol.ktraj(), protocol.play_order(n_acq)
    signal = Nufft(k, (protocol.matrix,)*2)(phantom(protocol.matrix) * coil_maps(n_coils, protocol.matrix, protocol.fov_mm))
    noise = torch.view_as_complex(torch.randn(n_acq, n_coils, protocol.n_samples, 2, generator=torch.Generator().manual_seed(seed)))
    column = density(k, (protocol.matrix,)*2)[0] if dcf else None
    return Scan(signal.transpose(0, 1)[arm] + 1e-3 * noise, arm, k, column / column.max() if dcf else None, protocol.tr_s, (protocol.matrix,)*2,
                (protocol.fov_mm,)*2, origin, extras=dict(te_s=.8e-3, dwell_s=protocol.dwell_s, flip_deg=15., slice_mm=6.))


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("raw") / "good_raw.h5"
    write_mrd(path, spiral_scan())
    return path


def changed(good, to, change, xml=None):
    "A copy of a good file with its acquisitions (or its header) changed."
    to.write_bytes(good.read_bytes())
    with h5py.File(to, "r+") as f:
        rows = f["dataset/data"][:]
        new = change(rows) if change else rows
        rows = rows if new is None else new
        del f["dataset/data"]
        f["dataset"].create_dataset("data", data=rows, maxshape=(None,), chunks=(1,))
        if xml:
            f["dataset/xml"][0] = xml(f["dataset/xml"][0].decode()).encode()
    return to


def one_line(path, *words, error=ValueError):
    "Reading fails with one line that names the file and says these words."
    for read in (read_mrd, info):
        with pytest.raises(error) as e:
            read(path)
        text = str(e.value)
        assert "\n" not in text and path.name in text, text
        for word in words:
            assert word in text, text


# ---------------------------------------------------------------- MRD: round trip, foreign software

def test_round_trip(good):
    scan, back = spiral_scan(), read_mrd(good)
    assert torch.equal(back.kspace, scan.kspace) and torch.equal(back.arm, scan.arm)
    assert torch.equal(back.ktraj, scan.ktraj) and torch.allclose(back.dcf_column, scan.dcf_column)
    assert (back.tr_s, back.im_size, back.fov_mm, back.origin) == (scan.tr_s, scan.im_size, scan.fov_mm, scan.origin)
    assert back.extras["notes"] == [] and back.extras["te_s"] == pytest.approx(.8e-3) and back.extras["dwell_s"] == pytest.approx(4e-6)
    assert back.kspace.dtype == torch.complex64 and back.arm.dtype == torch.int64


@pytest.mark.parametrize("origin", ["scanner", "virtual speaker", "movie"])
def test_origin_is_kept(tmp_path, origin):
    write_mrd(tmp_path / "a.h5", spiral_scan(n_coils=1, origin=origin))
    assert read_mrd(tmp_path / "a.h5").origin == origin
    with ismrmrd.Dataset(str(tmp_path / "a.h5"), mode="r") as d:
        user = xsd.CreateFromDocument(d.read_xml_header()).userParameters.userParameterString
    assert {p.name: p.value for p in user}["origin"] == origin


def test_opens_in_ismrmrd_with_the_fields_of_real_files(good):
    scan = spiral_scan()
    with ismrmrd.Dataset(str(good), mode="r") as d:
        head = xsd.CreateFromDocument(d.read_xml_header())
        acq = [d.read_acquisition(n) for n in range(d.number_of_acquisitions())]
    enc = head.encoding[0]
    assert (enc.encodedSpace.matrixSize.x, enc.reconSpace.matrixSize.y, enc.reconSpace.fieldOfView_mm.x) == (84, 84, 200)
    assert head.acquisitionSystemInformation.receiverChannels == 4 and head.sequenceParameters.TR == [pytest.approx(6.004)]
    assert enc.trajectory.value == "spiral" and enc.encodingLimits.kspace_encoding_step_1.maximum == 12
    assert [a.idx.kspace_encode_step_1 for a in acq[:4]] == [12, 3, 10, 0]
    assert [a.idx.repetition for a in acq] == list(range(26))
    stamps = np.array([a.acquisition_time_stamp for a in acq]) * 2.5
    assert np.abs(stamps - np.arange(26) * 6.004).max() <= 1.25
    for n, a in enumerate(acq):
        assert a.data.shape == (4, 630) and a.traj.shape == (630, 3) and a.sample_time_us == pytest.approx(4)
        assert np.array_equal(a.data, scan.kspace[n]) and np.abs(a.traj[:, :2]).max() <= .501
        assert a.traj[0, 2] < .1 < .5 < a.traj[:, 2].max() <= 1


def test_rss_picture_from_the_fields_alone_agrees(good):
    "Exact DFT, weights from column 2: what foreign code would do, beside our reader and NUFFT."
    with ismrmrd.Dataset(str(good), mode="r") as d:
        m = xsd.CreateFromDocument(d.read_xml_header()).encoding[0].reconSpace.matrixSize
        acq = [d.read_acquisition(n) for n in range(13)]
    theirs = 0
    for a in acq:
        wx, wy = (np.exp(2j*np.pi*a.traj[:, i, None].astype(float) * (np.arange(n) - n//2)) for i, n in ((0, m.x), (1, m.y)))
        theirs = theirs + np.einsum("cs,sy,sx->cyx", a.data * a.traj[:, 2], wy, wx, optimize=True)
    theirs = np.sqrt((np.abs(theirs)**2).sum(0)) / np.sqrt(m.x * m.y)
    scan = read_mrd(good)
    f = cut_frames(scan, 13)
    w = scan.dcf_column
    ours = (Nufft(scan.ktraj, scan.im_size).adjoint(f.kspace[0] * w).abs().square().sum(0)).sqrt().numpy()
    assert np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) < .01
    assert np.corrcoef(theirs.ravel(), phantom(84).numpy().ravel())[0, 1] > .95, "and it is a picture of the object"


FOREIGN = SpiralProtocol(n_arms=3, n_samples=3996, matrix=320, fov_mm=300., dwell_s=16e-6, tr_s=70e-3, slew_max=180.)


@pytest.mark.parametrize("third", ["absent", "zero", "kz"])
def test_file_from_elsewhere(tmp_path, third):
    "3 arms of 3996 samples, 8 coils, a 320 grid, no density weights, no TR, no limits, a noise measurement first."
    scan = spiral_scan(FOREIGN, 6, 8, dcf=False, origin="scanner")
    path = tmp_path / "foreign.h5"
    write_mrd(path, scan)

    def change(rows):
        if third != "absent":
            rows["head"]["trajectory_dimensions"] = 3
            for n in range(len(rows)):
                kz = np.zeros(3996) if third == "zero" else np.linspace(-.2, .2, 3996)
                rows["traj"][n] = np.c_[rows["traj"][n].reshape(-1, 2), kz].astype(np.float32).ravel()
        noise = rows[:1].copy()
        noise["head"]["flags"] = 1 << (ismrmrd.ACQ_IS_NOISE_MEASUREMENT - 1)
        noise["head"]["number_of_samples"], noise["head"]["trajectory_dimensions"] = 256, 0
        noise["data"][0], noise["traj"][0] = np.ones(2*8*256, np.float32), np.zeros(0, np.float32)
        return np.concatenate([noise, rows])

    def bare(xml):
        for tag in ("encodingLimits", "userParameters"):
            a, b = xml.index(f"<{tag}>") + len(tag) + 2, xml.index(f"</{tag}>")
            xml = xml[:a] + xml[b:]
        return xml.replace("<TR>70.0</TR>", "")
    changed(path, path, change, bare)
    got = read_mrd(path)
    assert (got.n_arms, got.n_samples, got.n_coils, got.im_size, got.n_acq) == (3, 3996, 8, (320, 320), 6)
    assert got.dcf_column is None and got.origin == "scanner" and got.tr_s == pytest.approx(70e-3, rel=.02)
    facts = info(path)
    assert facts["density"] == "pipe-menon" and facts["n_skipped"] == 1 and any("no TR" in t for t in facts["trouble"])
    if third == "absent":
        dcf, source = density(got.ktraj, got.im_size, got.dcf_column)
        f = cut_frames(got)
        smaps = estimate_smaps(got.kspace, got.arm, got.ktraj, dcf, got.im_size)
        x = gridding(f.kspace, got.ktraj, dcf, smaps, got.im_size, f.arm).abs()[0].numpy()
        assert source == "pipe-menon" and np.corrcoef(x.ravel(), phantom(320).numpy().ravel())[0, 1] > .98


# ---------------------------------------------------------------- MRD: odd but readable

def test_noise_acquisitions_are_skipped(good, tmp_path):
    def change(rows):
        rows["head"]["flags"][[0, 5]] = 1 << (ismrmrd.ACQ_IS_NOISE_MEASUREMENT - 1)
        rows["head"]["flags"][9] = 1 << (ismrmrd.ACQ_IS_PARALLEL_CALIBRATION_AND_IMAGING - 1)   # is part of the picture
    scan = read_mrd(changed(good, tmp_path / "a.h5", change))
    assert scan.n_acq == 24 and scan.extras["n_skipped"] == 2


def test_no_order_is_assumed(good, tmp_path):
    order = np.random.default_rng(0).permutation(26)
    scan, ref = read_mrd(changed(good, tmp_path / "a.h5", lambda rows: rows[order])), read_mrd(good)
    assert torch.equal(scan.arm, ref.arm[order]) and torch.equal(scan.ktraj, ref.ktraj) and torch.equal(scan.kspace, ref.kspace[order])


def test_missing_arm_numbers(good, tmp_path):
    def change(rows): rows["head"]["idx"]["kspace_encode_step_1"] = 0
    scan, ref = read_mrd(changed(good, tmp_path / "a.h5", change)), read_mrd(good)
    assert scan.n_arms == 13 and any("arm numbers are missing" in n for n in scan.extras["notes"])
    assert torch.allclose(scan.ktraj[scan.arm], ref.ktraj[ref.arm], atol=1e-4)


def test_subset_of_arms(tmp_path):
    scan = spiral_scan()
    keep = (scan.arm == 4) | (scan.arm == 11)
    scan.kspace, scan.arm = scan.kspace[keep], scan.arm[keep]
    write_mrd(tmp_path / "a.h5", scan)
    back = read_mrd(tmp_path / "a.h5")
    assert torch.equal(back.arm, scan.arm) and torch.equal(back.ktraj, scan.ktraj) and torch.allclose(back.dcf_column, scan.dcf_column)
    with h5py.File(tmp_path / "a.h5", "r+") as f:
        del f["dataset/ktraj"]                                 # as other software would write it
    other = read_mrd(tmp_path / "a.h5")
    assert other.n_arms == 2 and other.extras["arm_label"].tolist() == [4, 11] and any("[4, 11]" in n for n in other.extras["notes"])
    assert torch.equal(other.ktraj, scan.ktraj[[4, 11]])


def test_clock_without_header(good, tmp_path):
    no_tr = lambda xml: xml.replace("<TR>6.004</TR>", "")
    assert read_mrd(changed(good, tmp_path / "a.h5", None, no_tr)).tr_s == pytest.approx(6.004e-3, rel=.02)

    def stop(rows): rows["head"]["acquisition_time_stamp"] = 0
    path = changed(good, tmp_path / "b.h5", stop, no_tr)
    assert any("guess" in n for n in read_mrd(path).extras["notes"])
    assert read_mrd(path, tr_s=5e-3).tr_s == 5e-3

    def fast(rows): rows["head"]["acquisition_time_stamp"] = np.arange(len(rows)) * 8
    assert any("time stamps" in n for n in read_mrd(changed(good, tmp_path / "c.h5", fast)).extras["notes"])


def test_density_column_or_kz(good, tmp_path):
    def kz(rows):
        for n in range(len(rows)):
            t = rows["traj"][n].reshape(-1, 3).copy()
            t[:, 2] = -.25
            rows["traj"][n] = t.ravel()
    assert read_mrd(good).dcf_column is not None and read_mrd(changed(good, tmp_path / "a.h5", kz)).dcf_column is None


# ---------------------------------------------------------------- MRD: bad

def test_not_there(tmp_path):
    one_line(tmp_path / "nothing.h5", "no such file", error=FileNotFoundError)


def test_empty_text_and_other_hdf5(tmp_path):
    (tmp_path / "empty.h5").write_bytes(b"")
    (tmp_path / "text.h5").write_text("this is not HDF5" * 100)
    with h5py.File(tmp_path / "other.h5", "w") as f:
        f["recon"] = np.zeros((3, 4, 4))
    with h5py.File(tmp_path / "none.h5", "w") as f:
        f["dataset/xml"], f["dataset/data"] = np.array([b"<x/>"]), np.zeros(0)
    one_line(tmp_path / "empty.h5", "empty")
    one_line(tmp_path / "text.h5", "not an HDF5 file")
    one_line(tmp_path / "other.h5", "no MRD group", "recon")
    one_line(tmp_path / "none.h5", "no acquisitions")


@pytest.mark.parametrize("part", [.001, .1, .5, .9, .999])
def test_cut_off(good, tmp_path, part):
    whole = good.read_bytes()
    (tmp_path / "cut.h5").write_bytes(whole[:int(len(whole) * part)])
    one_line(tmp_path / "cut.h5")


def test_scribbled_over(good, tmp_path):
    "Damage in the middle of the file: an error or the file as it was, never a crash."
    whole = bytearray(good.read_bytes())
    for n in range(12):
        bad = bytearray(whole)
        at = len(whole) * (n + 1) // 14
        bad[at:at + 4096] = b"\xff" * min(4096, len(whole) - at)
        (tmp_path / "bad.h5").write_bytes(bad)
        try:
            read_mrd(tmp_path / "bad.h5")
        except ValueError as e:
            assert "\n" not in str(e)


def test_cartesian_file_is_refused():
    one_line(real("mrd_foreign", "grappa2_1rep.h5"), "Cartesian", "trajectory")


def no_traj(rows):
    rows["head"]["trajectory_dimensions"] = 0
    for n in range(len(rows)):
        rows["traj"][n] = np.zeros(0, np.float32)


def nan_sample(rows): rows["data"][5][7] = np.nan
def nan_traj(rows): rows["traj"][3][1] = np.nan
def odd_arm(rows): rows["head"]["idx"]["kspace_encode_step_1"][7] = 99
def odd_slice(rows): rows["head"]["idx"]["slice"][7] = 1
def short_data(rows): rows["data"][4] = rows["data"][4][:100]
def all_noise(rows): rows["head"]["flags"] = 1 << (ismrmrd.ACQ_IS_NOISE_MEASUREMENT - 1)


def fewer_coils(rows):
    rows["head"]["active_channels"][9] = 3
    rows["data"][9] = rows["data"][9][:2*3*630]


def fewer_samples(rows):
    rows["head"]["number_of_samples"][9] = 600
    rows["data"][9], rows["traj"][9] = rows["data"][9][:2*4*600], rows["traj"][9][:3*600]


def two_paths(rows): rows["traj"][20] = rows["traj"][21]


def times(factor):
    def change(rows):
        for n in range(len(rows)):
            t = rows["traj"][n].reshape(-1, 3).copy()
            t[:, :2] *= factor
            rows["traj"][n] = t.ravel()
    return change


@pytest.mark.parametrize("change, words", [
    (no_traj, ["no trajectory"]), (nan_sample, ["not a number", "acquisition 5"]), (nan_traj, ["not a number", "acquisition 3"]),
    (odd_arm, ["unknown arm index 99", "acquisition 7"]), (fewer_coils, ["3 coils", "4", "acquisition 9"]), (fewer_samples, ["600 samples"]),
    (odd_slice, ["slices"]), (short_data, ["acquisition 4", "damaged"]), (all_noise, ["noise"]), (two_paths, ["two different trajectories"]),
    (times(2*np.pi), ["cycles/pixel"]), (times(84), ["cycles/pixel"]), (times(84/200), ["cycles/pixel", "1/mm"]), (times(420), ["cycles/pixel"]),
    (times(0), ["zero"]),
], ids=lambda x: getattr(x, "__name__", None))
def test_bad_acquisitions(good, tmp_path, change, words):
    one_line(changed(good, tmp_path / "bad.h5", change), *words)


def test_bad_arm_without_limits(good, tmp_path):
    "No header limit to compare with: a number that stands alone is still an error."
    def no_limit(xml): return xml[:xml.index("<kspace_encoding_step_1>")] + xml[xml.index("</kspace_encoding_step_1>") + 25:]
    def odd(rows):
        rows["head"]["idx"]["kspace_encode_step_1"][7] = 99
        return np.concatenate([rows] + [rows[np.arange(26) != 7]] * 4)
    one_line(changed(good, tmp_path / "bad.h5", odd, no_limit), "unknown arm index 99")


def test_bad_header(good, tmp_path):
    one_line(changed(good, tmp_path / "a.h5", None, lambda xml: xml[:200]), "header")
    one_line(changed(good, tmp_path / "b.h5", None, lambda xml: xml.replace("<x>84</x>", "<x>1</x>")), "matrix")


def test_writing_a_bad_trajectory_is_refused(tmp_path):
    scan = spiral_scan(n_coils=1)
    scan.ktraj = scan.ktraj * 84
    with pytest.raises(ValueError, match="cycles/pixel"):
        write_mrd(tmp_path / "a.h5", scan)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- info and sound

def usc(tmp_path, scan, name="sub001_2drt_01_vcv1_r1"):
    raw = tmp_path / "sub001" / "2drt" / "raw" / f"{name}_raw.h5"
    write_mrd(raw, scan)
    (raw.parent.parent / "audio").mkdir(exist_ok=True)
    return raw, raw.parent.parent / "audio" / f"{name}_audio.wav"


def speech(seconds, rate=20000, seed=0):
    t = np.arange(round(seconds * rate)) / rate
    return (.2 * np.sin(2*np.pi*150*t) * (1 + np.sin(2*np.pi*3*t)) + .01 * np.random.default_rng(seed).standard_normal(len(t))).astype(np.float32)


def test_info(tmp_path):
    scan = spiral_scan(n_acq=40)
    raw, wav = usc(tmp_path, scan)
    assert any("no sound" in t for t in info(raw)["trouble"])
    soundfile.write(wav, speech(scan.duration_s), 20000)
    facts = info(raw)
    assert facts["trouble"] == [] and facts["audio"] == str(wav) and facts["audio_s"] == pytest.approx(scan.duration_s, abs=1e-3)
    assert (facts["n_coils"], facts["n_arms"], facts["frames"], facts["left_over_arms"], facts["density"]) == (4, 13, 3, 1, "file")
    assert facts["arm_order"][:4] == [12, 3, 10, 0] and facts["tr_ms"] == pytest.approx(6.004) and facts["matrix"] == [84, 84]
    write_json(tmp_path / "info.json", facts)


@pytest.mark.parametrize("wave, subtype, word", [
    (np.zeros(4800), "PCM_16", "silent"), (speech(.05), "PCM_16", "lasts 0.05 s"), (speech(2.), "PCM_16", "lasts 2.00 s"),
    (np.stack([speech(.24)]*2, 1), "PCM_16", "2 channels"), (np.ones(4800), "PCM_16", "clipped"), (speech(.24), "PCM_U8", None),
])
def test_sound_of_every_kind(tmp_path, wave, subtype, word):
    scan = spiral_scan(n_acq=40, n_coils=1)
    raw, wav = usc(tmp_path, scan)
    soundfile.write(wav, wave, 20000, subtype=subtype)
    trouble = info(raw)["trouble"]
    assert (trouble == []) if word is None else any(word in t for t in trouble), trouble
    got, rate = read_audio(wav)
    mono = wave if wave.ndim == 1 else wave.mean(1)
    assert rate == 20000 and got.dtype == np.float32 and np.abs(got - mono).max() < (.01 if subtype == "PCM_U8" else 1e-4)
    f = cut_frames(scan, 13)
    win = audio_windows(got, rate, f.centre_s, .2)
    assert win.shape == (3, 8000) and torch.isfinite(win).all(), "any length gives windows of the same length"


def test_unreadable_sound(tmp_path):
    raw, wav = usc(tmp_path, spiral_scan(n_acq=40, n_coils=1))
    wav.write_text("RIFF nonsense")
    assert any("cannot be read" in t for t in info(raw)["trouble"])
    for path, error in ((wav, ValueError), (tmp_path / "no.wav", FileNotFoundError)):
        with pytest.raises(error) as e:
            read_audio(path)
        assert "\n" not in str(e.value)
    soundfile.write(wav, np.zeros(0), 20000)
    with pytest.raises(ValueError, match="empty"):
        read_audio(wav)


def test_audio_windows_are_where_they_should_be():
    rate, centres = 1000, np.array([.01, .5, .98, 5.])
    wave = np.arange(1000, dtype=np.float32) + 1
    w = audio_windows(wave, rate, centres, .05)
    assert w.shape == (4, 100) and w[1].tolist() == list(range(451, 551))
    assert w[0, :40].tolist() == [0.]*40 and w[0, 40] == 1 and w[2, -1] == 0 and w[2, 69] == 1000 and not w[3].any()
    assert torch.equal(audio_windows(wave, rate, centres + .1, .05, offset_s=.1), w)
    with pytest.raises(ValueError, match="delta"):
        audio_windows(wave, rate, centres, 0.)


def test_nearest_reference():
    assert nearest_reference([.0, .49, .51, 9.], [0., .5, 1.]).tolist() == [0, 1, 1, 2] and nearest_reference([3.], [1.]).tolist() == [0]


@pytest.mark.parametrize("rate, new", [(48000, 20000), (44100, 16000), (21739, 16000), (16000, 48000)])
def test_resampling_keeps_time_and_pitch(rate, new):
    t, t2 = np.arange(rate) / rate, np.arange(new) / new
    got = resample(np.sin(2*np.pi*1000*t) * np.hanning(rate), rate, new)
    assert abs(len(got) - new) <= 1
    assert np.abs(got[:new] - (np.sin(2*np.pi*1000*t2) * np.interp(t2, t, np.hanning(rate)))[:len(got)]).max() < 2e-3


# ---------------------------------------------------------------- files appear whole or not at all

def test_failure_leaves_the_old_file(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(RuntimeError), replacing(tmp_path / "a.txt") as tmp:
        tmp.write_text("new")
        raise RuntimeError
    assert (tmp_path / "a.txt").read_text() == "old" and len(list(tmp_path.iterdir())) == 1
    with replacing(tmp_path / "new" / "b.txt") as tmp:
        tmp.write_text("b")
    assert (tmp_path / "new" / "b.txt").read_text() == "b"


def test_kill_in_the_middle_of_a_write(tmp_path):
    "SIGKILL while a raw file is written: the old file stays readable."
    path = tmp_path / "a_raw.h5"
    write_mrd(path, spiral_scan(n_coils=1))
    code = f"""
        from sirem_nb.data.mrd import replacing
        import time
        with replacing({str(path)!r}) as tmp:
            tmp.write_bytes(b"half")
            print("writing", flush=True)
            time.sleep(60)
    """
    p = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    assert p.stdout.readline().strip() == "writing"
    p.send_signal(signal.SIGKILL)
    p.wait()
    assert read_mrd(path).n_acq == 26
    write_mrd(path, spiral_scan(n_acq=39, n_coils=1))
    assert read_mrd(path).n_acq == 39, "and the next write works"


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs a limit on the size of files")
def test_full_disk(tmp_path):
    "A file system that takes no more (here: a limit on the size of a file): one line, and the old file stays."
    code = f"""
        import resource, signal, sys, torch
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from sirem_nb.data.mrd import write_mrd, write_json, write_recon
        from sirem_nb.data.sync import write_movie
        from test_files import spiral_scan
        scan, movie = spiral_scan(n_coils=1), torch.rand(60, 84, 84, generator=torch.Generator().manual_seed(0))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
        for write in (lambda: write_mrd("x.h5", scan), lambda: write_movie("x.mp4", movie, 12.81), lambda: write_json("x.json", list(range(100000))),
                      lambda: write_recon("r.h5", movie, range(60), 2.4, "none")):
            try: write(); print("written")
            except OSError as e: print("OSError", str(e))
    """
    names = ["r.h5", "x.h5", "x.json", "x.mp4"]
    for name in names:
        (tmp_path / name).write_text("old")
    r = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert r.returncode == 0, r.stderr[-800:]
    lines = r.stdout.strip().splitlines()
    assert len(lines) == 4 and all(line.startswith("OSError could not write") for line in lines), r.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == names and all((tmp_path / n).read_text() == "old" for n in names)


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError) as e:
        write_json(tmp_path / "file" / "a.json", {})
    assert e.value.errno in (errno.ENOTDIR, errno.EEXIST)


# ---------------------------------------------------------------- movies

def clip(n, ny=31, nx=22, seed=0):
    f = torch.rand(n, 6, 6, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(f[:, None], (ny, nx), mode="bilinear")[:, 0]


@pytest.mark.parametrize("fps", [12.81, 1/(13*6.004e-3), 23.18, 25, 30000/1001, 1/(2*6.004e-3)])
def test_movie_round_trip(tmp_path, fps):
    n = round(1.2 * fps)
    frames, wave = clip(n), speech(n / fps)
    write_movie(tmp_path / "a.mp4", frames, fps, wave, 20000, scale=4)
    got, rate, w, r = read_movie(tmp_path / "a.mp4")
    assert len(got) == n and rate == pytest.approx(fps, rel=1e-5) and got.shape[1:] == (124, 88)
    small = got.reshape(n, 31, 4, 22, 4).mean((2, 4))
    assert float((small - frames).abs().mean()) < .01 and float((small - frames).mean().abs()) < .004, "grey values survive"
    w = resample(w, r, 20000)
    lags = np.arange(-400, 401)
    match = [np.dot(w[1000:15000], wave[1000 + l:15000 + l]) for l in lags]
    assert abs(lags[int(np.argmax(match))]) <= 20, "sound is in step to a millisecond"


def test_movie_plays_in_a_browser(tmp_path):
    from imageio_ffmpeg import get_ffmpeg_exe
    write_movie(tmp_path / "a.mp4", clip(10, 21, 23), 12.81, speech(1), 20000, scale=3)
    said = subprocess.run([get_ffmpeg_exe(), "-i", str(tmp_path / "a.mp4")], capture_output=True, text=True).stderr
    assert "h264" in said and "yuv420p" in said and "aac" in said and "70x64" in said, said
    whole = (tmp_path / "a.mp4").read_bytes()
    assert whole.index(b"moov") < whole.index(b"mdat"), "starts playing before it is loaded"


def test_sound_shorter_or_longer_than_the_movie(tmp_path):
    for seconds in (.3, 5.):
        write_movie(tmp_path / "a.mp4", clip(25), 25, speech(seconds), 20000)
        frames, _, w, r = read_movie(tmp_path / "a.mp4")
        assert len(frames) == 25 and abs(len(w)/r - 1) < .05


def test_bad_movies(tmp_path):
    write_movie(tmp_path / "a.mp4", clip(12), 25)
    assert read_movie(tmp_path / "a.mp4")[2:] == (None, None), "a movie without sound works"
    whole = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[:len(whole)//3])
    (tmp_path / "text.mp4").write_text("hello")
    (tmp_path / "empty.mp4").write_bytes(b"")
    soundfile.write(tmp_path / "sound.wav", speech(1), 20000)
    for name in ("cut.mp4", "text.mp4", "empty.mp4", "sound.wav"):
        with pytest.raises(ValueError) as e:
            read_movie(tmp_path / name)
        assert "\n" not in str(e.value) and name in str(e.value)
    for bad in (torch.zeros(3, 4), torch.full((2, 4, 4), float("nan")), torch.zeros(0, 4, 4)):
        with pytest.raises(ValueError):
            write_movie(tmp_path / "b.mp4", bad, 25)
    assert not (tmp_path / "b.mp4").exists()


def test_real_movies():
    "Frame counts that were counted by another route: the size of an uncompressed avi, and the annotation's columns."
    import scipy.io
    for name in ("F1_001", "M1_342", "M3_033"):
        frames, fps, wave, _ = read_movie(real("usc_timit", f"{name}.avi"))
        n = scipy.io.loadmat(DATA / "usc_timit" / f"{name}.mat")["annotation"].shape[1]
        assert frames.shape == (n, 68, 68) and fps == 23.18 and wave is None, name
        assert 0 <= float(frames.min()) and .5 < float(frames.max()) <= 1
    for path in sorted(real("usc_timit_m3_audio").glob("*.mp4")):
        frames, fps, wave, rate = read_movie(path)
        denoised, r2 = read_audio(path.with_suffix(".wav"))
        assert frames.shape[1:] == (204, 204) and fps == 23.18 and rate == r2 == 48000
        n = min(len(wave), len(denoised)) - 4800
        spectrum = np.fft.rfft(wave[:n], 2*n) * np.conj(np.fft.rfft(denoised[:n], 2*n))
        lag = int(np.fft.irfft(spectrum).argmax())
        lag = lag - 2*n if lag > n else lag
        assert abs(lag) / 48000 < 2e-3, f"{path.name}: the track is {lag/48:.1f} ms from the wav of the same sound"


# ---------------------------------------------------------------- recon files

def test_recon_round_trip_and_usc_axes(tmp_path):
    frames = torch.rand(5, 7, 9, generator=torch.Generator().manual_seed(0))
    write_recon(tmp_path / "a.h5", frames, np.arange(5) * .1, 2.4, "gridding")
    x, t, attrs = read_recon(tmp_path / "a.h5")
    assert torch.equal(x, frames) and t.tolist() == pytest.approx([0, .1, .2, .3, .4]) and attrs["method"] == "gridding" and list(attrs["pixel_mm"]) == [2.4, 2.4]
    with h5py.File(tmp_path / "usc.h5", "w") as f:
        f["recon"] = frames.transpose(1, 2).numpy()
    x, t, _ = read_recon(tmp_path / "usc.h5")
    assert torch.equal(x, frames) and t[0] == pytest.approx(.006004)
    with pytest.raises(ValueError):
        write_recon(tmp_path / "b.h5", frames, [0.], 2.4, "x")
    with pytest.raises(FileNotFoundError):
        read_recon(tmp_path / "nothing.h5")


# ---------------------------------------------------------------- frames, recordings, splits

def numbered(n_acq, origin="movie", **extras):
    "Acquisition n has the value n everywhere."
    n = torch.arange(n_acq, dtype=torch.float32)[:, None, None].expand(n_acq, 1, 630)
    return Scan(n.to(torch.complex64), USC13.play_order(n_acq), USC13.ktraj(), None, USC13.tr_s, (84, 84), (200., 200.), origin, extras=extras)


@pytest.mark.parametrize("arms", [1, 2, 3, 5, 13, 26])
def test_frames_of_any_number_of_arms(arms):
    scan = numbered(60)
    f = cut_frames(scan, arms)
    n = f.kspace[:, 0, :, 0].real.long()
    assert len(f) == 60 // arms
    assert (n.sort(1).values == torch.arange(60 // arms * arms).reshape(-1, arms)).all(), "consecutive acquisitions, each once"
    assert (f.arm.diff(dim=1) >= 0).all() and torch.equal(scan.arm[n], f.arm), "sorted by arm, and each sample with its own arm"
    assert torch.allclose(f.centre_s, (torch.arange(60 // arms).double() + .5) * arms * scan.tr_s)
    for bad in (0, 61, -1):
        with pytest.raises(ValueError, match="arms per frame"):
            frame_groups(60, scan.arm, bad)


@pytest.mark.parametrize("origin, n_acq, arms, kept", [
    ("scanner", 2703, 13, 191), ("scanner", 2703, 2, 1251), ("scanner", 100, 2, 50), ("scanner", 400, 2, 100), ("scanner", 13, 13, 1), ("movie", 60, 2, 30), ("virtual speaker", 60, 13, 4)])
def test_transient(origin, n_acq, arms, kept):
    scan = numbered(n_acq, origin, **({"transient": "simulated"} if origin == "virtual speaker" else {}))
    f = cut_frames(scan, arms)
    assert len(f) == kept
    assert float(f.centre_s[-1]) == pytest.approx((n_acq // arms - .5) * arms * scan.tr_s), "times are those of the scan, not of what was kept"
    assert len(cut_frames(scan, arms, drop_transient=False)) == n_acq // arms
    if origin == "movie":
        assert not f.transient.any()
    if origin == "virtual speaker":
        assert f.transient.any()


def test_recordings_splits_and_dataset(tmp_path):
    for s in ("sub003", "sub001", "sub002"):
        for task in ("04_bvt_r1", "17_topic1"):
            raw = tmp_path / s / "2drt" / "raw" / f"{s}_2drt_{task}_raw.h5"
            write_mrd(raw, spiral_scan(n_acq=30, n_coils=2))
    audio = tmp_path / "sub001" / "2drt" / "audio" / "sub001_2drt_04_bvt_r1_audio.wav"
    audio.parent.mkdir()
    soundfile.write(audio, speech(.2), 20000)
    found = find_recordings(tmp_path)
    assert [r.name for r in found][:2] == ["sub001_2drt_04_bvt_r1", "sub001_2drt_17_topic1"] and len(found) == 6
    assert found[0].audio == audio and found[0].stimulus == "bvt" and found[1].audio is None and found[0].truth is None
    assert find_audio(found[0].raw) == audio
    split = split_subjects([r.subject for r in found], 1, 1, seed=3)
    write_split(tmp_path / "split.json", split, name="test")
    assert read_split(tmp_path / "split.json") == split
    parts = [{r.subject for r in part_of(found, split, p)} for p in ("train", "val", "test")]
    assert all(len(p) == 1 for p in parts) and len(set.union(*parts)) == 3
    data = FrameDataset(part_of(found, split, "test"), 2, delta_s=.05)
    item = data[len(data) - 1]
    assert len(data) == 30 and item["kspace"].shape == (2, 2, 630) and item["audio"].shape == (1600,) and item["subject"] in split["test"]
    with pytest.raises(FileNotFoundError, match="raw"):
        find_recordings(tmp_path / "sub001" / "2drt" / "audio")


def test_split_is_disjoint_for_every_seed():
    names = [f"sub{n:03d}" for n in range(1, 17)]
    drawn = [split_subjects(names, 2, 4, seed) for seed in range(20)]
    for s in drawn:
        assert sorted(s["train"] + s["val"] + s["test"]) == names and [len(s[p]) for p in ("train", "val", "test")] == [10, 2, 4]
    assert len({tuple(s["test"]) for s in drawn}) > 10
    with pytest.raises(ValueError, match="twice"):
        check_split({"train": ["a"], "val": ["a"], "test": ["b"]})
    with pytest.raises(ValueError, match="cannot give"):
        split_subjects(names[:5], 2, 4)


def test_audio_trouble_is_silent_about_good_sound():
    assert audio_trouble(speech(3.), 20000, 3.02) == [] and audio_trouble(speech(3.), 20000, 2.) != []


def test_exact_pair_agrees_with_the_operator_used_for_files(good):
    "The reader's trajectory goes straight into the exact sum: no unit is lost on the way through a file."
    scan = read_mrd(good)
    image = phantom(84)
    s = exact_dft(image * coil_maps(4), scan.ktraj[scan.arm[0]])
    assert float((scan.kspace[0] - s).abs().mean() / s.abs().mean()) < .1
    assert exact_adjoint(s, scan.ktraj[scan.arm[0]], (84, 84)).shape == (4, 84, 84)


def test_pixels_of_encoded_and_reconstructed_space(good, tmp_path):
    "A finer reconstructed matrix over the same field of view: k stays in cycles per encoded pixel, and that is the matrix used."
    finer = lambda xml: "168".join(xml.rsplit("84", 2)) if xml.rindex("84") < xml.index("</reconSpace>") else xml
    scan = read_mrd(changed(good, tmp_path / "a.h5", None, finer))
    assert scan.im_size == (84, 84) and any("encoded" in n for n in scan.extras["notes"])
    assert read_mrd(good).extras["notes"] == []


def test_measured_spiral_of_another_make(tmp_path):
    "60 measured arms of a bottle phantom on a 360 grid, through an MRD file and back into a picture."
    import scipy.io
    m = scipy.io.loadmat(real("spiral_phantom", "spiral.mat"))
    k = torch.as_tensor(np.stack([m["k"].real, m["k"].imag], -1).transpose(1, 0, 2).astype(np.float32))
    data = torch.as_tensor(m["data"].transpose(1, 2, 0).astype(np.complex64))
    w = torch.as_tensor(m["w"].T.astype(np.float32).copy())
    write_mrd(tmp_path / "a.h5", Scan(data, torch.arange(60), k, w / w.max(), .02, (360, 360), (360., 360.)))
    scan = read_mrd(tmp_path / "a.h5")
    assert (scan.n_arms, scan.n_samples, scan.n_coils) == (60, 1182, 8) and scan.dcf_column is not None
    f = cut_frames(scan)
    images = [gridding(f.kspace, scan.ktraj, density(scan.ktraj, scan.im_size, c)[0], maps_of(f, scan, c), scan.im_size, f.arm).abs()[0] for c in (scan.dcf_column, None)]
    a, b = (x / x.mean() for x in images)
    assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > .95, "weights of the file and computed ones give the same picture"
    assert float(torch.quantile(a, .95) / a.median()) > 4, "bright bottles on a dark ground"


def maps_of(f, scan, column):
    return estimate_smaps(scan.kspace, scan.arm, scan.ktraj, density(scan.ktraj, scan.im_size, column)[0], scan.im_size)
