"X-ray microbeam: the reader, the clock, bad files; and the real recordings, where they are."
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat
from scipy.ndimage import gaussian_filter1d

from sirem_nb.data.xrmb import PELLETS, at_times, log_mel, measure_offset, openings, read_out, read_xrmb, to_outline

DATA = Path(__file__).resolve().parents[1].parent/"shared"/"data"/"xrmb"
RATE, FPS = 16000, 145.645


def write(path, late_s=0.1, seconds=6., drop=None, **change):
    "Four slow movements set the loudness of four tones and move eight pellets."
    rng = np.random.default_rng(3)
    slow = gaussian_filter1d(rng.standard_normal((4, round((seconds + 2)*1000))), 45, axis=1); slow /= slow.std(1, keepdims=True)
    move = lambda t: np.stack([np.interp(t + 1, np.arange(slow.shape[1])/1000, s) for s in slow])
    t = np.arange(round(seconds*RATE))/RATE
    wave = 1000*sum(np.exp(a)*np.sin(2*np.pi*f*t) for a, f in zip(move(t), (300, 900, 2000, 4500)))
    b = move(np.arange(round(seconds*FPS))/FPS + late_s)
    signal = {k: (rng.standard_normal((2, 4)) @ b).T.astype(np.float32) for k in PELLETS} | {"AUDIO": wave.astype(np.float32)} | change
    savemat(path, {"x": [{"NAME": k, "SRATE": RATE if k == "AUDIO" else FPS, "SIGNAL": v} for k, v in signal.items() if k != drop], "pal": [[-50., 20], [-5, 20]], "pha": [[-80., 0], [-80, 9]]})
    return path


@pytest.mark.parametrize("late_s", (-0.25, 0., 0.3))
def test_a_known_offset_is_found(tmp_path, late_s):
    o = measure_offset(read_xrmb(write(tmp_path/"a.mat", late_s)), .5, .01)
    assert abs(o.seconds - late_s) <= .011 and o.spread_s <= .02 and o.peak > .5
    assert o.r2[np.abs(o.lags_s - late_s) > .2].max() < o.peak - .2


def test_what_is_read(tmp_path):
    rec = read_xrmb(write(tmp_path/"a.mat"))
    assert rec.name == "a" and rec.rate == RATE and len(rec.wave) == 6*RATE and rec.wave.dtype == np.float32 and np.abs(rec.wave).max() <= 1
    assert set(rec.pellets) == set(PELLETS) and rec.palate.shape == (2, 2) and np.allclose(rec.times_s[:2], [0, 1/FPS])
    o = openings(rec)
    assert np.allclose(o["lips"], np.hypot(*(rec.pellets["UL"] - rec.pellets["LL"]).T))
    assert np.allclose(to_outline(np.array([[-20., 5], [0, 20]]), rec.palate), [15, 5], atol=.01)


def test_gaps_stay_gaps(tmp_path):
    rec = read_xrmb(write(tmp_path/"a.mat"))
    x = np.arange(len(rec.times_s), dtype=float); x[100:103] = np.nan; x[200:240] = np.nan
    got = at_times(x, replace(rec, offset_s=1.), np.arange(0, 8, .002))
    t = np.arange(0, 8, .002)
    own = (t - 1)*FPS
    assert np.isnan(got[t < 1]).all() and np.isfinite(got[(own > 99) & (own < 104)]).all() and np.isnan(got[(own > 199.1) & (own < 239.9)]).all()
    ok = np.isfinite(got); assert np.allclose(got[ok], own[ok], atol=1e-6)


def test_the_reader_cannot_cheat():
    "Noise is not predicted from noise; a linear relation is."
    g = np.random.default_rng(0); x = g.standard_normal((500, 10))
    assert read_out(x, g.standard_normal((500, 3))).max() < .05 and read_out(x, x @ g.standard_normal((10, 3))).min() > .99


def test_log_mel_is_on_the_right_clock():
    wave = np.zeros(RATE, np.float32); wave[8000:8080] = 1.
    m = log_mel(wave, RATE, np.arange(0, 1, .01)).sum(1)
    assert abs(np.arange(0, 1, .01)[m.argmax()] - .5) <= .011


@pytest.mark.parametrize("make, says", [
    (lambda p: p.write_bytes(b"no"), "not a MATLAB file"), (lambda p: savemat(p, {"a": 1}), "no channel AUDIO"), (lambda p: write(p, drop="T3"), "no channel T3"),
    (lambda p: write(p, AUDIO=np.zeros(1000)), "silent"), (lambda p: write(p, AUDIO=np.array([1., np.nan])), "not numbers"), (lambda p: write(p, T1=np.zeros((9, 2))), "different lengths")])
def test_bad_files(tmp_path, make, says):
    make(tmp_path/"a.mat")
    with pytest.raises(ValueError, match=says): read_xrmb(tmp_path/"a.mat")
    with pytest.raises(FileNotFoundError, match="no such file"): read_xrmb(tmp_path/"b.mat")


def test_a_lost_pellet_is_named(tmp_path):
    rec = read_xrmb(write(tmp_path/"a.mat", T2=np.full((874, 2), np.nan)))
    with pytest.raises(ValueError, match="pellet T2 was lost all the time"): measure_offset(rec)


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no real X-ray microbeam files at {DATA}")
@pytest.mark.parametrize("name", ("JW11", "JW12", "JW13"))
def test_real_recordings_begin_together(name):
    rec = read_xrmb(DATA/f"{name}_TP007.mat")
    assert rec.rate == 21739 and abs(rec.sound_s - 11.154) < .01 and len(rec.palate) >= 12
    o = measure_offset(rec, .7, .02, [k for k in PELLETS if np.isnan(rec.pellets[k][:, 0]).mean() < .03])
    surplus = len(rec.times_s)/rec.fps - rec.sound_s
    assert abs(o.seconds) <= .02 and o.peak > .1 and surplus > .4 and np.interp(-surplus, o.lags_s, o.r2.mean(1)) < 0
