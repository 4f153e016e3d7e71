"""Sound and shape: published formants, linear prediction on the synthesised wave, silence, noise, pitch, bad input."""
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import signal

from sirem_nb.speaker.articulators import area_function
from sirem_nb.speaker.acoustics import Voice, flows, formants, lpc_formants, resonances, synthesise, transfer_function
from sirem_nb.speaker.utterances import VOWELS, utter

MAEDA = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "maeda" / "area_vowels"
# men: Calliope 1989 (French), /i/ Peterson & Barney 1952
PUBLISHED = {"AA": (684, 1256, 2503), "AO": (531, 998, 2399), "OH": (383, 793, 2283), "IW": (300, 1750, 2120),
             "OE": (517, 1391, 2379), "IY": (270, 2290, 3010)}
T = np.linspace(0, 0.5, 101)
ON = np.interp(T, [0, 0.03, 0.46, 0.5], [0, 1, 1, 0])


def maeda(name):
    if not MAEDA.is_dir():
        pytest.skip(f"no area functions at {MAEDA}")
    word = (MAEDA / f"{name}.ARE").read_text().replace("\x1a", "").split()
    return np.array(word[3:3 + int(word[1])], float), float(word[2])


def say(area, length, **kw):
    return synthesise(T, np.tile(area, (len(T), 1)), length, kw.pop("port", 0.0), kw.pop("f0", 110.0), kw.pop("voicing", ON), **kw)


def db(wave):
    return 10 * np.log10(float((wave**2).mean()) + 1e-20)


def centroid(wave, rate=20000):
    f, p = signal.welch(np.asarray(wave), rate, nperseg=512)
    return float((f * p).sum() / p.sum())


def peak(wave, rate=20000):
    f, p = signal.welch(np.asarray(wave), rate, nperseg=256)
    return float(f[p.argmax()])


@pytest.mark.parametrize("name", PUBLISHED)
def test_cardinal_vowels_shape_books_and_ear_agree(name):
    area, step = maeda(name)
    shape = formants(area, step, 3).numpy()
    heard = lpc_formants(say(area, step)[3000:8500], 20000, 3).numpy()
    assert np.abs(shape / PUBLISHED[name] - 1).max() < 0.10
    assert np.abs(heard / shape - 1).max() < 0.10


PETERSON_BARNEY = {"IY": (270, 2290, 3010), "IH": (390, 1990, 2550), "EH": (530, 1840, 2480), "AE": (660, 1720, 2410), "AA": (730, 1090, 2440),
                   "AO": (570, 840, 2410), "UH": (440, 1020, 2240), "UW": (300, 870, 2240), "AH": (640, 1190, 2390)}   # men, 1952


@pytest.mark.parametrize("vowel", PETERSON_BARNEY)
def test_the_speakers_own_vowels_shape_books_and_ear_agree(vowel):
    area, length, _ = area_function(torch.tensor([VOWELS[vowel] + [0]]))
    shape = formants(area, length, 3)[0].numpy()
    heard = lpc_formants(say(area[0].numpy(), length[0].numpy())[3000:8500], 20000, 3).numpy()
    assert np.abs(shape / PETERSON_BARNEY[vowel] - 1).max() < 0.10
    assert np.abs(heard / shape - 1).max() < 0.10


def test_utterances_s_above_sh_nasal_murmur_and_silent_closures():
    def middle(text, i=1):
        u = utter(text)
        area, length, port = area_function(u.params)
        wave = synthesise(u.times_s, area, length, port, u.f0_hz, u.voicing, u.glottis_cm2, pressure=u.pressure)
        a, b = u.phones[i][1:]
        return wave[int((0.7 * a + 0.3 * b) * 20000):int((0.4 * a + 0.6 * b) * 20000)]
    for v in ("AA", "IY"):
        s, sh = middle(f"[{v} S {v}]"), middle(f"[{v} SH {v}]")
        assert centroid(s) > centroid(sh) + 1000 and peak(s) > 5000 and 2000 < peak(sh) < 4000    # people: sh about 2.5-4 kHz
    vowel, murmur, stop, voiced = (db(middle(t, i)) for t, i in (("[AA]", 0), ("[AA M AA]", 1), ("[AA P AA]", 1), ("[AA B AA]", 1)))
    assert vowel > murmur > voiced > stop and murmur > vowel - 20 and stop < vowel - 45 and voiced < vowel - 25


@pytest.mark.parametrize("length", [14.5, 17.5])
def test_uniform_tube_is_a_quarter_wave_resonator(length):
    n = 40
    end = 8 / (3 * np.pi) * np.sqrt(5 / np.pi)
    expected = (2 * np.arange(1, 4) - 1) * 35000 / (4 * (length + end))
    assert np.allclose(formants(np.full(n, 5.0), length / n, 3), expected, rtol=0.12)
    assert np.allclose(resonances(np.full(n, 5.0), length / n, 3, losses=False)[0], expected, rtol=0.015)


def test_bandwidths_are_those_of_people():
    # Fant 1972: B1 = 15 (500/F1)^2 + 20 (F1/500)^.5 + 5 (F1/500)^2, glottis closed
    for area in (np.full(35, 5.0), np.repeat([1.0, 7.0], 16), np.repeat([8.0, 1.0], [18, 12])):
        f, b = (x[0].item() for x in resonances(area, 0.5, 1))
        fant = 15 * (500 / f) ** 2 + 20 * (f / 500) ** 0.5 + 5 * (f / 500) ** 2
        assert 0.5 < b / fant < 2


def test_batches_equal_single_calls_and_poles_are_peaks():
    rng = np.random.default_rng(0)
    area, length, port = rng.uniform(1, 6, (5, 29)), rng.uniform(0.4, 0.7, (5, 29)), np.array([0, 0.3, 0, 0.8, 0.0])
    length[:] = length[:1]                    # the port's section is chosen for a whole batch
    together = formants(area, length, 4, port)
    for i in range(5):
        assert torch.allclose(together[i], formants(area[i], length[i], 4, port[i]))
    freq = np.arange(200.0, 5000.0, 2.0)
    h = transfer_function(area[0], length[0], freq).abs().numpy()
    peaks = freq[1:-1][(h[1:-1] > h[:-2]) & (h[1:-1] > h[2:])]
    assert all(np.abs(together[0].numpy() - p).min() < 30 for p in peaks[peaks < together[0, -1].item()])
    assert transfer_function(area, length, freq, port).shape == (5, len(freq))


def test_transfer_function_has_a_gradient():
    area = torch.full((29,), 3.0, requires_grad=True)
    transfer_function(area, 0.58, [500.0, 1500.0]).abs().sum().backward()
    assert torch.isfinite(area.grad).all() and area.grad.abs().sum() > 0


@pytest.mark.parametrize("port", [0.0, 0.5])
def test_simulation_and_chain_matrices_agree(port):
    area, times = np.repeat([1.0, 7.0], 16), np.linspace(0, 0.3, 31)
    out = flows(times, np.tile(area, (31, 1)), 0.5, port, 100.0, 0.0, 1e-3, pressure=np.eye(31)[1])
    freq = np.fft.rfftfreq(out.shape[1], 1 / 60000)
    keep = (freq > 100) & (freq < 4000)
    sim = np.abs(np.fft.rfft(out[1] + out[2])[keep] / np.fft.rfft(out[0])[keep])
    exact = transfer_function(area, 0.5, freq[keep], port).abs().numpy()
    assert np.median(np.abs(20 * np.log10(sim / exact))) < 1.0


def test_open_port_adds_a_low_resonance():
    area = np.repeat([1.0, 7.0], 16)
    assert formants(area, 0.5, 1, 0.3)[0] < formants(area, 0.5, 1)[0] - 100
    closed_lips = area.copy()
    closed_lips[-2:] = 0
    hum, mute = (say(closed_lips, 0.5, port=port)[3000:8000] for port in (0.8, 0.0))
    assert db(hum) > db(mute) + 20            # an /m/ sounds, a mouth shut behind a raised velum does not


@pytest.mark.parametrize("f0", [95.0, 120.0, 210.0])
def test_pitch_is_the_one_asked_for(f0):
    wave = say(np.full(30, 4.0), 0.55, f0=f0)[2000:9000].numpy()
    auto = np.correlate(wave, wave, "full")[len(wave) - 1:]
    lo, hi = int(20000 / (1.4 * f0)), int(20000 / (0.7 * f0))
    assert abs(20000 / (lo + auto[lo:hi].argmax()) / f0 - 1) < 0.02


def test_closed_tract_is_silent_and_its_release_is_not():
    area = np.tile(np.full(30, 4.0), (len(T), 1))
    area[:, 26:28] *= np.interp(T, [0.15, 0.17, 0.28, 0.32], [1, 0, 0, 1])[:, None]
    voiceless = np.interp(T, [0.14, 0.16, 0.30, 0.33], [1, 0, 0, 1])
    wave = synthesise(T, area, 0.55, 0.0, 110.0, voiceless, 0.15 * (1 - voiceless))
    vowel, shut, burst = wave[1000:2800], wave[4200:5500], wave[5600:5900]
    assert db(shut) < db(vowel) - 50 and db(burst) > db(shut) + 30
    voiced = synthesise(T, area, 0.55, 0.0, 110.0, 1.0)
    assert db(shut) + 10 < db(voiced[4200:5500]) < db(vowel) - 20       # the hum of a /d/
    assert np.abs(np.diff(wave)).max() < 0.4                             # and no click


def test_narrow_places_hiss_and_the_front_cavity_colours_the_hiss():
    def fricative(front, narrow=0.1):
        area = np.full(34, 4.0)
        area[-front - 2:-front], area[-front:] = narrow, 1.3
        return say(area, 0.5, voicing=0.0, glottis_cm2=0.2 * ON)[3000:8500]
    s, sh = fricative(3), fricative(7)
    assert centroid(s) > centroid(sh) + 500 and peak(s) > peak(sh) + 1500
    assert db(s) > db(say(np.full(34, 4.0), 0.5, voicing=0.0, glottis_cm2=0.2 * ON)[3000:8500]) + 3    # against breath
    assert db(fricative(3, narrow=0.0)) < db(s) - 40


def test_level_and_seed():
    area = np.repeat([1.0, 7.0], 16)
    a = say(area, 0.5, seed=1)
    assert a.dtype == torch.float32 and len(a) == 10000 and 0.1 < a.abs().max() < 1
    assert torch.equal(a, say(area, 0.5, seed=1)) and not torch.equal(a, say(area, 0.5, seed=2))
    loud = say(np.full(32, 12.0), 0.5, voice=Voice(pressure_cmh2o=40, gap_cm2=0.3))
    assert loud.abs().max() < 1 and len(say(area, 0.5, rate=16000)) == 8000


def test_lips_and_larynx_may_move():
    length = 0.5 + 0.1 * np.sin(40 * T)[:, None] * np.ones(32)
    wave = synthesise(T, np.tile(np.full(32, 4.0), (len(T), 1)), length, 0.3 * ON, 110 + 20 * ON, ON)
    assert torch.isfinite(wave).all() and wave.abs().max() < 1


@pytest.mark.parametrize("change, says", [
    (dict(area=np.full((101, 30), -1.0)), "below 0"), (dict(area=np.full((101, 30), np.nan)), "NaN"), (dict(area=np.full((9, 30), 1.0)), "101 times"),
    (dict(length=np.full(29, 0.5)), "30 areas but 29 lengths"), (dict(f0=np.full(101, np.nan)), "NaN"), (dict(times=T[::-1]), "rising"),
])
def test_bad_input_is_named(change, says):
    kw = dict(times=T, area=np.full((101, 30), 4.0), length=0.5, f0=100.0) | change
    with pytest.raises(ValueError, match=says):
        synthesise(kw["times"], kw["area"], kw["length"], 0.0, kw["f0"], 1.0)
