"""The simulated scanner: what it measures, when, where, and how loud the noise is; and real movies put through it."""
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F

from sirem_nb.data.frames import cut_frames, find_recordings
from sirem_nb.data.mrd import info, read_mrd, write_mrd
from sirem_nb.data.sync import read_audio, read_movie, write_movie
from sirem_nb.kspace.density import density
from sirem_nb.kspace.gridding import estimate_smaps, gridding
from sirem_nb.kspace.nufft import exact_dft
from sirem_nb.kspace.spiral import USC13, SpiralProtocol
from sirem_nb.speaker.scanner import (ArmPlayer, add_scanner_noise, arm_times, coil_maps, field_map, head_signal, movie_picture, play_off_resonance,
                                      scan_movie, scanner_sound, simulate_video, steady_state, time_segments, true_pictures)

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"
SMALL = SpiralProtocol(n_arms=5, n_samples=500, matrix=32, fov_mm=160., tr_s=5e-3)


def blobs(matrix, fov_mm=200., at=((0, 0, 30., 1.), (-20, 15, 12., .6))):
    "Gaussians at places in mm (x to the right, y down)."
    y, x = torch.meshgrid(*[(torch.arange(matrix) - matrix//2) * fov_mm / matrix]*2, indexing="ij")
    return sum(a * torch.exp(-((x - cx)**2 + (y - cy)**2) / (2*s**2)) for cx, cy, s, a in at)


def still(picture):
    return lambda times: picture.expand(len(times), *picture.shape)


def recon(scan, arms=None):
    dcf = density(scan.ktraj, scan.im_size, scan.dcf_column)[0]
    f = cut_frames(scan, arms)
    smaps = estimate_smaps(scan.kspace, scan.arm, scan.ktraj, dcf, scan.im_size)
    return gridding(f.kspace, scan.ktraj, dcf, smaps, scan.im_size, f.arm).abs(), f.centre_s


# ---------------------------------------------------------------- what is measured

@pytest.mark.parametrize("protocol, oversample", [(USC13, 2), (SMALL, 2), (SMALL, 3), (SMALL, 1)])
def test_player_is_the_exact_sum_on_the_fine_grid(protocol, oversample):
    g = torch.Generator().manual_seed(0)
    n = protocol.matrix * oversample
    x = torch.view_as_complex(torch.randn(3, n, n, 2, generator=g))
    player, k = ArmPlayer(protocol.ktraj(), (protocol.matrix,)*2, oversample), protocol.ktraj()
    for arm in (0, protocol.n_arms - 1):
        exact = exact_dft(x, k[arm] / oversample) / oversample
        assert float((player(x, arm) - exact).norm() / exact.norm()) < 2e-3


def test_scale_is_that_of_the_coarse_grid():
    "A broad blob measured on the fine grid equals the book's forward operator on the coarse grid."
    fine, coarse, k = blobs(168), blobs(84), USC13.ktraj()
    got = ArmPlayer(k, (84, 84))(fine[None].to(torch.complex64), 4)[0]
    want = exact_dft(coarse, k[4])
    assert float((got - want).norm() / want.norm()) < 1e-3


def test_coils():
    c = coil_maps(8, 84, 200., seed=3)
    assert c.dtype == torch.complex64 and torch.allclose(c.abs().square().sum(0), torch.ones(84, 84), atol=1e-5)
    assert torch.allclose(coil_maps(8, 168, 200., seed=3)[:, ::2, ::2], c, atol=1e-5)
    assert float(c.diff(dim=1).abs().max()) < .1 and float(c.diff(dim=2).abs().max()) < .1, "smooth"
    s = torch.linalg.svdvals(c.flatten(1))
    assert float(s[-1] / s[0]) > .05, "eight different views"
    assert not torch.allclose(coil_maps(8, 84, 200., seed=4), c, atol=.05) and torch.equal(coil_maps(8, 84, 200., seed=3), c)
    assert coil_maps(1, 20).shape == (1, 20, 20) and coil_maps(5, (20, 30), (100, 150)).shape == (5, 20, 30)


def test_every_arm_sees_its_own_instant():
    "A picture whose brightness is the time: the strength of each acquisition says when it looked."
    base = blobs(64, 160.)
    bright = lambda t: torch.as_tensor(t).float()[:, None, None] * base
    scan = scan_movie(bright, .2, SMALL, n_coils=3, snr=None)
    ref = scan_movie(still(base), .2, SMALL, n_coils=3, snr=None)
    seen = (scan.kspace.abs().sum((1, 2)) / ref.kspace.abs().sum((1, 2))).double()
    assert torch.allclose(seen, arm_times(scan.n_acq, SMALL), rtol=1e-4)
    start = scan.time_s
    assert ((seen > start) & (seen < start + SMALL.tr_s)).all() and scan.n_acq == 40


def test_order_fields_and_determinism():
    a, b, c = (scan_movie(still(blobs(168)), .2, seed=s) for s in (1, 1, 2))
    assert a.arm[:4].tolist() == [12, 3, 10, 0] and torch.equal(a.arm[13:26], a.arm[:13]) and sorted(a.arm[:13].tolist()) == list(range(13))
    assert torch.equal(a.kspace, b.kspace) and not torch.equal(a.kspace, c.kspace)
    assert a.origin == "virtual speaker" and a.im_size == (84, 84) and a.kspace.shape == (33, 8, 630) and a.tr_s == 6.004e-3
    assert float(a.dcf_column.max()) == 1 and float(a.dcf_column[:, 0].max()) < .1, "column 2 as in the real files: small in the centre, 1 at the edge"


def test_picture_comes_back():
    truth = true_pictures(blobs(168)[None], (84, 84))[0]
    x, _ = recon(scan_movie(still(blobs(168)), .1, snr=None))
    head = truth > .15 * truth.max()
    scale = (x[0] * truth)[head].sum() / (x[0]**2)[head].sum()
    assert float((scale * x[0] - truth)[head].square().mean().sqrt() / truth[head].square().mean().sqrt()) < .02
    assert torch.allclose(truth, blobs(84), atol=2e-3), "a smooth object is the same on both grids: no half pixel between them"


def test_no_inverse_crime():
    "Detail finer than the reconstruction's pixels is measured as the fine grid has it, not as the coarse one would."
    fine = blobs(168, at=((1.1, .7, 1.2, 1.),))
    k = USC13.ktraj()
    got = ArmPlayer(k, (84, 84))(fine[None].to(torch.complex64), 0)[0]
    crime = exact_dft(blobs(84, at=((1.1, .7, 1.2, 1.),)), k[0])
    assert float((got - crime).norm() / got.norm()) > .02
    with pytest.raises(ValueError, match="168"):
        scan_movie(still(blobs(84)), .1)


@pytest.mark.parametrize("snr", [5., 20.])
def test_snr_is_what_was_asked_for(snr):
    "Mean head signal over the standard deviation of the noise in pictures gridded from all arms."
    noisy, clean = (scan_movie(still(blobs(168)), .8, snr=s, seed=4) for s in (snr, None))
    dcf, f, g = density(clean.ktraj, (84, 84))[0], cut_frames(noisy), cut_frames(clean)
    smaps = coil_maps(8, 84, 200., seed=4)
    a, b = (gridding(x.kspace, clean.ktraj, dcf, smaps, (84, 84), x.arm) for x in (f, g))
    measured = head_signal(b.abs()[0]) / float((a - b).real.std())
    assert measured == pytest.approx(snr, rel=.05)
    with pytest.raises(ValueError, match="signal-to-noise"):
        scan_movie(still(blobs(168)), .1, snr=-1)


def test_transient_and_steady_state():
    plain, new = (scan_movie(still(blobs(64, 160.)), 3., SMALL, 2, snr=None, transient=t) for t in (False, True))
    ratio = (new.kspace.abs().square().sum((1, 2)) / plain.kspace.abs().square().sum((1, 2))).numpy()
    assert np.allclose(ratio, steady_state(new.time_s).square(), rtol=1e-4) and (np.diff(ratio) < 1e-5).all() and ratio[0] > 2.5
    frames = steady_state(torch.arange(390) * 6.004e-3).square().reshape(-1, 13).mean(1).numpy()
    assert np.abs(frames[:4] - [2.17, 1.71, 1.57, 1.36]).max() < .05, "USC's files"
    assert frames[20] < 1.02 < frames[8]
    assert new.extras["transient"] == "simulated" and cut_frames(new).transient.any() and not cut_frames(plain).transient.any()


def test_subset_of_arms(tmp_path):
    scan = scan_movie(still(blobs(64, 160.)), .2, SMALL, 2, snr=None, arms=[3, 1])
    full = scan_movie(still(blobs(64, 160.)), .2, SMALL, 2, snr=None)
    assert set(scan.arm.tolist()) == {1, 3} and scan.arm[0] != scan.arm[1] and scan.n_arms == 5 and scan.n_acq == 40
    for a in (1, 3):
        assert torch.allclose(scan.kspace[scan.arm == a][0], full.kspace[full.arm == a][0], atol=1e-5)
    write_mrd(tmp_path / "a.h5", scan)
    back = read_mrd(tmp_path / "a.h5")
    assert torch.equal(back.arm, scan.arm) and torch.equal(back.ktraj, scan.ktraj) and back.extras["notes"] == []
    for bad in ([], [5], [-1]):
        with pytest.raises(ValueError, match="cannot be played"):
            scan_movie(still(blobs(64, 160.)), .2, SMALL, arms=bad)


def test_off_resonance():
    pic, coils = blobs(64, 160.), coil_maps(2, 64, 160.)
    player, times = ArmPlayer(SMALL.ktraj(), (32, 32)), SMALL.te_s + np.arange(500) * SMALL.dwell_s
    df = field_map(pic, 120.)
    got = play_off_resonance(player, pic, coils, 2, times, 120.)
    for s in (0, 133, 499):
        want = exact_dft(pic * torch.exp(-2j*torch.pi*df*times[s]) * coils, SMALL.ktraj()[2, s:s+1] / 2) / 2
        assert float((got[:, s:s+1] - want).norm()) < 3e-3 * float(got.norm() / 500**.5), s
    assert 60 < float(df.abs().max()) <= 240
    at, w = time_segments(times, 240.)
    f = np.linspace(-240, 240, 77)
    assert np.abs(np.exp(-2j*np.pi*f[:, None]*at) @ w.numpy() - np.exp(-2j*np.pi*f[:, None]*times)).max() < 1e-3
    a, b = (recon(scan_movie(still(blobs(168)), .1, snr=None, off_resonance_hz=h))[0] for h in (None, 200.))
    assert float((a - b).norm() / a.norm()) > .02, "and it blurs the picture"


def test_too_short_and_broken_pictures():
    with pytest.raises(ValueError, match="rotation"):
        scan_movie(still(blobs(168)), .07)
    with pytest.raises(ValueError, match="not numbers"):
        scan_movie(still(blobs(168) * float("nan")), .1)


def test_speed():
    "A second of scan takes at most about two seconds of one core, rendering aside (the limit here allows for slow machines)."
    picture = still(blobs(168))
    scan_movie(picture, .1)
    t = time.process_time()
    scan = scan_movie(picture, 1.)
    took = time.process_time() - t
    print(f"1 s of scan ({scan.n_acq} arms, 8 coils): {took:.2f} s of CPU")
    assert took < 4


# ---------------------------------------------------------------- sound

def test_scanner_noise():
    rate, t = 20000, np.arange(40000) / 20000
    wave = (.1 * np.sin(2*np.pi*200*t)).astype(np.float32)
    for db in (-20., 0.):
        noise = add_scanner_noise(wave, rate, USC13.tr_s, db, seed=1) - wave
        assert 20*np.log10(noise.std() / wave.std()) == pytest.approx(db, abs=.2)
    sound = scanner_sound(40000, rate)
    period = 13 * USC13.tr_s * rate
    shift = round(10 * period)
    assert np.corrcoef(sound[5000:20000], sound[5000 + shift:20000 + shift])[0, 1] > .8, "repeats with the rotation of the arms"
    loud = add_scanner_noise(wave * 9, rate, None, 10.)
    assert np.abs(loud).max() <= 1 and np.isfinite(add_scanner_noise(0 * wave, rate)).all()


# ---------------------------------------------------------------- movies

def moving_blob(n=68, fps=23.18, seconds=1.2, aspect=1):
    "A blob that moves 0.35 of the frame a second; frame j is the blob at j/fps."
    t = torch.arange(round(seconds * fps)) / fps
    y, x = torch.meshgrid((torch.arange(n) + .5) / n, (torch.arange(n * aspect) + .5) / (n * aspect), indexing="ij")
    return torch.exp(-((x - .3 - .35*t[:, None, None])**2 + (y - .55)**2) / (2*.04**2)), fps


def place(pictures):
    w = (pictures - .25 * pictures.amax((1, 2), keepdim=True)).clamp(min=0)
    y, x = ((torch.arange(n) + .5) / n for n in pictures.shape[1:])
    total = w.sum((1, 2))
    return (w.sum(1) * x).sum(1) / total, (w.sum(2) * y).sum(1) / total


@pytest.mark.parametrize("n, protocol", [(68, USC13), (204, USC13), (84, USC13), (51, SMALL)])
def test_movie_is_where_and_when_it_should_be(n, protocol):
    frames, fps = moving_blob(n)
    size = (protocol.matrix,)*2
    scan = scan_movie(movie_picture(frames, fps, size), len(frames) / fps, protocol, n_coils=4, snr=None, origin="movie")
    pic, t = recon(scan)
    x, y = place(pic)
    inside = t < (len(frames) - 2) / fps
    assert float((y - .55).abs().max()) * protocol.matrix < .1, "no half pixel up or down"
    late = (t - (x - .3) / .35)[inside]
    assert abs(float(late.mean()) - .25/fps) < 4e-3, "a quarter of a frame after its time stamp: 11 ms from its start, 11 ms from its middle"
    still_movie = frames[5:6].expand(4, -1, -1)
    pic, _ = recon(scan_movie(movie_picture(still_movie, 10., size), .3, protocol, n_coils=4, snr=None, origin="movie"))
    xx, yy = place(frames[5:6])
    assert abs(float(place(pic)[0][0] - xx[0])) * protocol.matrix < .1 and abs(float(place(pic)[1][0] - yy[0])) * protocol.matrix < .1


def test_fine_grid_agrees_with_a_centre_aligned_resize():
    frames = torch.rand(2, 20, 20, generator=torch.Generator().manual_seed(0))
    smooth = F.interpolate(frames[:, None], (204, 204), mode="bicubic", align_corners=False)[:, 0]
    fine = movie_picture(smooth, 10., (84, 84), measured_at=0.)([0., .1])
    want = F.interpolate(smooth[:, None], (84, 84), mode="bicubic", antialias=True, align_corners=False)[:, 0]
    assert float((fine[:, ::2, ::2] - want).abs().max()) < .03
    halfway = movie_picture(smooth, 10., (84, 84), measured_at=0.)([.05])[0]
    assert torch.allclose(halfway, fine.mean(0), atol=1e-5), "linear in time"


def test_simulate_video(tmp_path):
    frames, fps = moving_blob(seconds=.8)
    t = np.arange(round(.8 * 48000)) / 48000
    click = (.02 * np.sin(2*np.pi*200*t)).astype(np.float32)
    click[round(.4*48000):][:96] = .9
    write_movie(tmp_path / "my clip_1.mp4", frames, fps, click, 48000, scale=3)
    r = simulate_video(tmp_path / "out", tmp_path / "my clip_1.mp4", snr=20., seed=5)
    assert r.name == "sub001_2drt_01_my-clip-1" and r.subject == "sub001"
    assert [found.name for found in find_recordings(tmp_path / "out")] == [r.name] and r.audio and r.truth and r.video
    facts = info(r.raw)
    assert facts["origin"] == "movie" and facts["trouble"] == [] and facts["n_acquisitions"] == int(len(frames)/fps/6.004e-3) and facts["audio_rate_hz"] == 20000
    wave, rate = read_audio(r.audio)
    assert rate == 20000 and abs(int(np.abs(wave).argmax()) / rate - .401) < 2e-3
    movie, got, w, hz = read_movie(r.video)
    assert got == pytest.approx(1/(2*6.004e-3), rel=1e-4) and abs(int(np.abs(w).argmax()) / hz - .401) < 2e-3
    scan = read_mrd(r.raw)
    assert not cut_frames(scan).transient.any() and len(cut_frames(scan)) == scan.n_acq // 13
    with h5py.File(r.truth) as f:
        truth, times = torch.as_tensor(f["frames"][:].astype(np.float32)), f["frame_times_s"][:]
    assert truth.shape == (scan.n_acq // 2, 84, 84) and times[1] == pytest.approx(3 * 6.004e-3)
    again = simulate_video(tmp_path / "again", tmp_path / "my clip_1.mp4", snr=20., seed=5)
    assert torch.equal(read_mrd(again.raw).kspace, scan.kspace), "same seed, same file"


def test_simulate_video_with_other_sound_or_none(tmp_path):
    frames, fps = moving_blob(seconds=.5, aspect=2)
    write_movie(tmp_path / "quiet.mp4", frames, fps)
    r = simulate_video(tmp_path / "a", tmp_path / "quiet.mp4")
    assert r.audio is None and any("no sound" in t for t in info(r.raw)["trouble"])
    assert read_mrd(r.raw).fov_mm == pytest.approx((100., 200.)), "a movie twice as wide as high: the full frame is the field of view"
    soundfile.write(tmp_path / "s.wav", np.stack([np.ones(6000)*.1, np.zeros(6000)], 1), 16000)
    r = simulate_video(tmp_path / "b", tmp_path / "quiet.mp4", audio=tmp_path / "s.wav", subject="sub007", arms=[0, 5], n_coils=3, scanner_noise_db=-6.)
    assert r.subject == "sub007" and len(read_audio(r.audio)[0]) == 7500 and set(read_mrd(r.raw).arm.tolist()) == {0, 5}
    assert any("lasts" in t for t in info(r.raw)["trouble"])
    for video, error in ((tmp_path / "nothing.mp4", FileNotFoundError), (tmp_path / "s.wav", ValueError)):
        with pytest.raises(error) as e:
            simulate_video(tmp_path / "c", video)
        assert "\n" not in str(e.value)
    write_movie(tmp_path / "short.mp4", frames[:1], fps)
    with pytest.raises(ValueError, match="longer movie"):
        simulate_video(tmp_path / "c", tmp_path / "short.mp4")
    assert not (tmp_path / "c").exists()


def at_times(clip, fps, times, convention):
    u = (torch.as_tensor(times) * fps - convention).clamp(0, len(clip) - 1)
    j = u.long().clamp(max=len(clip) - 2)
    return torch.lerp(clip[j], clip[j + 1], (u - j).float()[:, None, None])


REAL = sorted((DATA / "usc_timit_m3_audio").glob("*.mp4")) + [DATA / "usc_timit" / f"{n}.avi" for n in ("F1_359", "F2_002", "M2_359")]


@pytest.mark.parametrize("path", REAL, ids=lambda p: p.stem)
def test_real_movie_comes_back(tmp_path, path):
    "PSNR in the head after one scale, the gain over the movie's mean frame, and the lag, for both readings of a frame's time."
    if not path.exists():
        pytest.skip(f"no real recordings at {DATA}")
    clip, fps, wave, _ = read_movie(path)
    r = simulate_video(tmp_path, path, snr=20.)
    pic, t = recon(read_mrd(r.raw), 13)
    clip = F.interpolate(clip[:, None], (84, 84), mode="bilinear", antialias=True, align_corners=False)[:, 0]
    mean = clip.mean(0)
    head = mean > .15 * mean.max()
    x = pic[:, head]

    def psnr(lag, convention):
        ref = at_times(clip, fps, t + lag, convention)[:, head]
        return float(10 * torch.log10(ref.max()**2 / ((x*ref).sum() / (x*x).sum() * x - ref).square().mean()))
    for convention in (0., .5):
        ref = at_times(clip, fps, t, convention)[:, head]
        base = float(10 * torch.log10(ref.max()**2 / (mean[head] - ref).square().mean()))
        lags = np.arange(-.04, .0401, .002)
        lag = lags[int(np.argmax([psnr(l, convention) for l in lags]))]
        print(f"{path.stem}, frames at (j + {convention})/fps: PSNR {psnr(0., convention):.1f} dB, mean frame {base:.1f} dB, best lag {1e3*lag:+.0f} ms")
        assert psnr(0., convention) > 26 and psnr(0., convention) > base + 4 and abs(lag) < .02
    assert (r.audio is not None) == (wave is not None)
    assert info(r.raw)["origin"] == "movie"
