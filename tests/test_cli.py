"""The command line as a user meets it: help, one line and status 2 for trouble, files that are whole, the demo end to end."""
import json, os, re, signal, subprocess, sys, time
from pathlib import Path
import h5py, numpy as np, pytest, soundfile, torch
from sirem_nb.cli import main
from sirem_nb.data.mrd import read_recon
from sirem_nb.data.sync import read_movie, write_movie

SIREM = Path(sys.executable).parent/"sirem"
COMMANDS = [["simulate"], ["info"], ["recon"], ["tune"], ["train", "fusion"], ["train", "translate"], ["train", "diffusion"], ["generate"], ["translate"], ["evaluate"], ["bench"], ["weights", "list"], ["weights", "fetch"], ["weights", "from-file"], ["demo"]]


def run(*argv, **kw): return subprocess.run([SIREM, *map(str, argv)], capture_output=True, text=True, **kw)


@pytest.fixture(scope="module")
def movie(tmp_path_factory):
    "A small film of a moving disc, with a tone, as a stand-in for an rtMRI movie."
    d = tmp_path_factory.mktemp("movie"); t = np.arange(18)/20
    y, x = np.mgrid[:68, :68]
    blob = lambda cy, cx, r: 1/(1 + np.exp(np.hypot(y - cy, x - cx) - r))
    frames = np.stack([0.6*blob(34, 34, 26) + 0.4*blob(34 + 8*np.sin(7*s), 30, 8) for s in t]).astype(np.float32)
    wave = 0.3*np.sin(2*np.pi*220*np.arange(int(0.9*16000))/16000).astype(np.float32)
    write_movie(d/"clip.mp4", frames, 20, wave, 16000, scale=1)
    soundfile.write(d/"clip.wav", wave, 16000)
    return d/"clip.mp4"


@pytest.fixture(scope="module")
def raw(movie, tmp_path_factory):
    out = tmp_path_factory.mktemp("data")
    assert main(["simulate", str(out), "--video", str(movie), "--snr", "20", "--coils", "4"]) == 0
    return next(out.glob("sub001/2drt/raw/*_raw.h5"))


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_shows_an_example(command):
    r = run(*command, "--help")
    assert r.returncode == 0 and "Example: sirem " + " ".join(command) in r.stdout and "--help" in r.stdout


def test_help_answers_without_loading_torch():
    code = "import sys; from sirem_nb.cli import main; main(['--help']); assert 'torch' not in sys.modules, 'torch was loaded'"
    r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr


def test_info_is_json_with_the_facts(raw, capsys):
    assert main(["info", str(raw), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["n_coils"] == 4 and facts["n_arms"] == 13 and facts["origin"] == "movie" and facts["density"] == "file"
    assert facts["audio"] and facts["tr_ms"] == pytest.approx(6.004, abs=1e-3)


@pytest.mark.parametrize("arms", [13, 2])
def test_recon_writes_film_sound_and_facts(raw, movie, arms, tmp_path):
    assert main(["recon", str(raw), "--out", str(tmp_path), "--arms-per-frame", str(arms)]) == 0
    x, times, attrs = read_recon(tmp_path/"recon.h5")
    about = json.loads((tmp_path/"recon.json").read_text())
    frames, fps, wave, rate = read_movie(tmp_path/"video.mp4")
    assert len(x) == about["frames"] == len(frames) and about["dropped_frames"] == 0        # a movie keeps its first frames
    assert float(times[1] - times[0]) == pytest.approx(arms*6.004e-3, rel=1e-6) and fps == pytest.approx(1/(arms*6.004e-3), rel=1e-3)
    assert attrs["method"] == "gridding" and len(wave)/rate == pytest.approx(len(x)*arms*6.004e-3, abs=0.05)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["recon.h5", "recon.json", "video.mp4"]


@pytest.mark.parametrize("method", ["cg-sense", "wavelet", "tv", "temporal-tv", "low-rank-sparse", "sirem"])
def test_every_method_reconstructs_without_training_first(raw, method, tmp_path):
    argv = ["recon", str(raw), "--out", str(tmp_path), "--method", method] + ([] if method in ("sirem", "low-rank-sparse") else ["--lam", "0.01", "--iterations", "5"])
    assert main(argv) == 0
    about, (x, _, attrs) = json.loads((tmp_path/"recon.json").read_text()), read_recon(tmp_path/"recon.h5")
    assert attrs["method"] == method and len(x) == about["frames"] and torch.isfinite(x).all() and float(x.std()) > 0
    if method == "sirem": assert about["checkpoint"].endswith("sirem-13")
    elif "lam" in about["settings"]: assert about["settings"]["lam"] == 0.01 and about["settings"]["n_iter"] == 5


def test_recon_looks_like_the_movie(raw, movie, tmp_path):
    "One scale for the film; the moving disc is followed better than by the mean frame."
    assert main(["recon", str(raw), "--out", str(tmp_path)]) == 0
    x, times, _ = read_recon(tmp_path/"recon.h5")
    frames, fps, *_ = read_movie(movie)
    f = torch.nn.functional.interpolate(torch.as_tensor(frames)[None], size=(84, 84), mode="bilinear", antialias=True)[0]
    at = times.double()*fps - 0.5; lo = at.floor().long().clamp(0, len(f) - 1); hi = (lo + 1).clamp(max=len(f) - 1); a = (at - lo).clamp(0, 1)[:, None, None].float()
    ref = f[lo]*(1 - a) + f[hi]*a
    inside = f.mean(0) > 0.15*f.mean(0).max()
    psnr = lambda z: float(-10*torch.log10(((z - ref)[:, inside]**2).mean()/ref.max()**2))
    scaled = x*(x*ref)[:, inside].sum()/(x*x)[:, inside].sum()
    assert psnr(scaled) > 26 and psnr(scaled) > psnr(f.mean(0).expand_as(ref)) + 4


def bad_files(d, raw):
    wav = d/"short.wav"; soundfile.write(wav, np.zeros(100, np.float32), 16000)
    cut = d/"cut.h5"; cut.write_bytes(raw.read_bytes()[:20000])
    (d/"text.h5").write_text("not raw data"); (d/"empty.mp4").write_bytes(b""); (d/"text.mp4").write_text("no movie"); (d/"empty").mkdir()
    (d/"split.json").write_text('{"train": ["a"], "val": ["a"], "test": ["b"]}')
    nan = d/"nan.h5"; nan.write_bytes(raw.read_bytes())
    with h5py.File(nan, "r+") as f:
        rows = f["dataset/data"]; row = rows[3]; row["data"][:] = np.nan; rows[3] = row
    return {p.name: p for p in d.iterdir()}


BAD = {
    "no such raw file": ["info", "{d}/none.h5"], "text as raw file": ["info", "{d}/text.h5"], "truncated raw file": ["info", "{d}/cut.h5"],
    "NaN samples": ["recon", "{d}/nan.h5", "--out", "{d}/o"], "unknown method": ["recon", "{raw}", "--out", "{d}/o", "--method", "magic"],
    "more arms than the scan has": ["recon", "{raw}", "--out", "{d}/o", "--arms-per-frame", "100000"], "no arms": ["recon", "{raw}", "--out", "{d}/o", "--arms-per-frame", "0"],
    "no checkpoint for these arms": ["recon", "{raw}", "--out", "{d}/o", "--method", "sirem", "--arms-per-frame", "7"],
    "weight of a method without one": ["recon", "{raw}", "--out", "{d}/o", "--lam", "0.1"], "tuned file that is none": ["recon", "{raw}", "--out", "{d}/o", "--method", "tv", "--tuned", "{d}/text.h5"],
    "negative weight": ["recon", "{raw}", "--out", "{d}/o", "--method", "tv", "--lam", "-1"], "unknown table": ["evaluate", "{d}/empty", "--out", "{d}/o", "--tables", "magic"],
    "fusion table without a run": ["evaluate", "{d}/empty", "--out", "{d}/o", "--tables", "fusion"], "nothing to tune on": ["tune", "{d}/empty", "--out", "{d}/t.json"],
    "unknown score to tune by": ["tune", "{d}/empty", "--out", "{d}/t.json", "--by", "luck"], "unknown weights": ["weights", "fetch", "magic"],
    "checkpoint that is none": ["recon", "{raw}", "--out", "{d}/o", "--method", "sirem", "--checkpoint", "{d}/empty"],
    "sound that is none": ["recon", "{raw}", "--out", "{d}/o", "--audio", "{d}/text.h5"], "no cuda here": ["recon", "{raw}", "--out", "{d}/o", "--device", "tpu"],
    "empty movie": ["simulate", "{d}/s", "--video", "{d}/empty.mp4"], "text as movie": ["simulate", "{d}/s", "--video", "{d}/text.mp4"], "no movie": ["simulate", "{d}/s", "--video", "{d}/none.mp4"],
    "negative snr": ["simulate", "{d}/s", "--snr", "-1"], "unknown word": ["simulate", "{d}/s", "--speakers", "1", "--words", "xqzzt"], "arms that are not played": ["simulate", "{d}/s", "--video", "{movie}", "--play", "3,77"],
    "arms of a cine movie": ["simulate", "{d}/s", "--cine", "--arms", "5"], "a real movie as cine": ["simulate", "{d}/s", "--tagged", "--video", "{movie}"], "cine without raw": ["simulate", "{d}/s", "--cine", "--no-raw"],
    "repetitions of raw data": ["simulate", "{d}/s", "--repetitions", "2"], "speakers of a real movie": ["simulate", "{d}/s", "--video", "{movie}", "--speakers", "2"], "coils without raw data": ["simulate", "{d}/s", "--no-raw", "--coils", "3"],
    "a file as folder": ["simulate", "{d}/text.h5"], "folder without recordings": ["train", "fusion", "{d}/empty", "--out", "{d}/r"],
    "setting that is no number": ["train", "diffusion", "{d}/empty", "--out", "{d}/r", "--set", "lr=fast"],
    "folder without talks": ["train", "diffusion", "{d}/empty", "--out", "{d}/r"], "unknown row of the generator": ["train", "diffusion", "{data}", "--out", "{d}/r", "--row", "magic"],
    "utterances of the paper's table": ["evaluate", "{data}", "--out", "{d}/t", "--utterances", "3"], "a recogniser for pictures": ["evaluate", "{data}", "--out", "{d}/t", "--recogniser"], "methods of arms left out": ["evaluate", "{data}", "--out", "{d}/t", "--tables", "left-out", "--methods", "tv"],
    "translator's table of a folder without a run": ["evaluate", "{data}", "--run", "{d}/empty", "--out", "{d}/t", "--tables", "translate"], "translator's table without a run": ["evaluate", "{data}", "--out", "{d}/t", "--tables", "translate"],
    "split that overlaps": ["train", "fusion", "{data}", "--out", "{d}/r", "--split", "{d}/split.json"], "unknown encoder": ["train", "fusion", "{data}", "--out", "{d}/r", "--encoder", "magic"],
    "run that is none": ["evaluate", "{data}", "--run", "{d}/empty", "--out", "{d}/t"], "too few speakers": ["demo", "--out", "{d}/demo", "--speakers", "2"],
    "weights nobody knows": ["weights", "from-file", "magic", "{raw}"], "weights with another checksum": ["weights", "from-file", "moonshine", "{d}/text.h5"],
    "a folder as raw file": ["info", "{d}/empty"], "missing argument": ["recon"], "option that is no number": ["demo", "--epochs", "many"], "unknown command": ["reconstruct"],
}


@pytest.fixture(scope="module")
def places(tmp_path_factory, raw, movie):
    d = tmp_path_factory.mktemp("bad"); bad_files(d, raw)
    return dict(d=d, raw=raw, movie=movie, data=raw.parents[3])


@pytest.mark.parametrize("what", BAD)
def test_trouble_is_one_line_and_status_2(what, places, capsys):
    before = {p for p in places["d"].rglob("*")}
    status = main([a.format(**places) for a in BAD[what]])
    err = [l for l in capsys.readouterr().err.splitlines() if l.strip() and not l.startswith("sirem: note:")]
    assert status == 2 and len(err) == 1 and err[0].startswith("sirem: "), err
    assert not [p for p in places["d"].rglob("*") if p.is_file() and p not in before], "something was left behind"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")/"out"
    r = run("demo", "--out", out, "--speakers", 3, "--seconds", 1.5, "--epochs", 1, "--workers", 2, timeout=1200)
    assert r.returncode == 0, r.stderr[-3000:]
    return out, r.stdout


def test_demo_ends_by_naming_its_page(demo):
    out, said = demo
    assert said.strip().splitlines()[-1].endswith(str(out/"report.html")) and (out/"report.html").is_file()


def test_demo_page_is_self_contained(demo):
    page = (demo[0]/"report.html").read_text()
    assert len(re.findall(r'<video[^>]* src="data:video/mp4;base64,', page)) == 2 and page.count("data:image/png;base64,") >= 7
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    for row in ("gridding", "SIREM", "x_a = 0", "constant learned image", "w = 0", "sound of another recording", "oracle"): assert row in page


def test_demo_table_has_every_row_at_both_rates(demo):
    records = json.loads((demo[0]/"tables"/"fusion.json").read_text())
    rows = {(r["method"], r["arms_per_frame"]) for r in records}
    for m in ("gridding", "sirem", "sirem-xa0", "sirem-constant", "sirem-w0", "sirem-other-audio", "sirem-oracle"):
        assert {(m, 13), (m, 2)} <= rows
    assert all(np.isfinite(r["value"]) for r in records)


def test_held_out_speakers_are_held_out(demo):
    records = json.loads((demo[0]/"tables"/"fusion.json").read_text())
    for run_ in ("13-arms", "2-arms"):
        split = json.loads((demo[0]/"runs"/run_/"split.json").read_text())
        assert {r["subject"] for r in records} - {"all"} <= set(split["test"]) and not set(split["test"]) & set(split["train"] + split["val"])


def test_recon_with_the_demos_checkpoint(demo, tmp_path, capsys):
    raw = next((demo[0]/"data").glob("sub001/2drt/raw/*_raw.h5"))
    assert main(["recon", str(raw), "--out", str(tmp_path), "--method", "gridding,sirem", "--checkpoint", str(demo[0]/"runs"/"2-arms"), "--arms-per-frame", "2"]) == 0
    a, b = (read_recon(tmp_path/m/"recon.h5")[0] for m in ("gridding", "sirem"))
    assert a.shape == b.shape and torch.isfinite(b).all()
    assert main(["recon", str(raw), "--out", str(tmp_path/"x"), "--method", "sirem", "--checkpoint", str(demo[0]/"runs"/"2-arms"), "--arms-per-frame", "13"]) == 2
    assert "2 arms per frame" in capsys.readouterr().err


def test_a_cine_movie_is_simulated_and_translated(tmp_path, root):
    assert main(["simulate", str(tmp_path/"d"), "--cine", "--speakers", "2", "--words", "asouk,ageese", "--workers", "1"]) == 0
    movie = next(p for p in (tmp_path/"d").glob("sub001/cine/*.h5") if "truth" not in p.name)
    assert main(["translate", str(movie), "--checkpoint", str(root/"checkpoints"/"translate-cine"), "--out", str(tmp_path/"x.wav")]) == 0
    wave, rate = soundfile.read(tmp_path/"x.wav")
    assert rate == 22050 and len(wave) > 0.8*rate and np.isfinite(wave).all() and (tmp_path/"x.png").exists() and (tmp_path/"x.json").exists()


def test_options_of_cine_movies_reach_the_files(tmp_path):
    for name, more in {"one": [], "two": ["--repetitions", "2"]}.items(): assert main(["simulate", str(tmp_path/name), "--cine", "--speakers", "1", "--words", "asouk", "--matrix", "32", "--snr", "5", "--workers", "1", *more]) == 0
    one, two = (json.loads((tmp_path/name/"cine.json").read_text()) for name in ("one", "two"))
    assert "'matrix': 32" in str(one) and "'snr': 5.0" in str(one) and "'repetitions': 1" in str(one) and "'repetitions': 2" in str(two)
    from sirem_nb.data.movies import read_frames
    a, b = (read_frames(tmp_path/name/"sub001"/"cine"/"sub001_asouk.h5")[0] for name in ("one", "two"))
    assert a.shape[1:] == (32, 32) and not np.array_equal(a, b)


def test_scanner_noise_on_the_sound_of_a_real_movie(tmp_path, movie, raw):
    assert main(["simulate", str(tmp_path/"d"), "--video", str(movie), "--coils", "1", "--scanner-noise", "6"]) == 0
    (quiet, _), (loud, _) = (soundfile.read(next(d.glob("sub001/2drt/audio/*.wav"))) for d in (raw.parents[3], tmp_path/"d"))
    rest = loud/np.abs(loud).max() - quiet/np.abs(quiet).max()
    assert len(loud) == len(quiet) and rest.std() > .1*quiet.std()


def test_movies_without_raw_data(tmp_path, capsys):
    assert main(["simulate", str(tmp_path/"d"), "--no-raw", "--speakers", "1", "--words", "asouk", "--free", "1", "--matrix", "64", "--workers", "1"]) == 0
    said = capsys.readouterr().out.split()
    films = [Path(w) for w in said if w.endswith(".mp4")]
    assert len(films) == 2 and not list((tmp_path/"d").rglob("*_raw.h5"))
    for f in films:
        frames, fps, wave, rate = read_movie(f)
        assert frames.shape[1] == frames.shape[2] and not frames.shape[1] % 64 and fps == pytest.approx(50) and abs(len(wave)/rate - len(frames)/50) < .1 and np.abs(wave).max() > .05 and float(frames.std()) > .05
    names = [f.name.removesuffix("_video.mp4") for f in films]
    (tmp_path/"s.json").write_text(json.dumps({"train": names[:1], "unseen_speech": names[1:], "unseen_subject": [], "both": []}))
    tiny = ["--epochs", "1", "--set", "per_epoch=4", "--set", "batch_size=2", "--cache", str(tmp_path/"c"), "--device", "cpu"]
    assert main(["train", "diffusion", str(tmp_path/"d"), "--out", str(tmp_path/"run"), "--split", str(tmp_path/"s.json"), *tiny]) == 0 and (tmp_path/"run"/"best"/"model.safetensors").exists()
    assert main(["evaluate", str(tmp_path/"d"), "--run", str(tmp_path/"run"), "--out", str(tmp_path/"t"), "--tables", "translate"]) == 2 and "a run of sirem train diffusion" in capsys.readouterr().err
    argv = ["generate", str(next((tmp_path/"d").rglob("*.wav"))), "--checkpoint", str(tmp_path/"run"), "--first-frame", str(films[1]), "--seconds", "0.4", "--steps", "2", "--anchor", "1", "--set", "known_sigma=0.05", "--seed", "3", "--device", "cpu"]
    assert main([*argv, "--out", str(tmp_path/"x.mp4")]) == 0
    frames, fps, wave, _ = read_movie(tmp_path/"x.mp4"); about = json.loads((tmp_path/"x.json").read_text())
    assert len(frames) == 20 and fps == pytest.approx(50) and wave is not None and (about["steps"], about["seed"], about["anchor"], about["known_sigma"]) == (2, 3, 1, .05) and "its first frame was taken" in capsys.readouterr().err
    assert main([*argv[:2], "--checkpoint", str(tmp_path/"s.json"), "--out", str(tmp_path/"y.mp4")]) == 2 and not (tmp_path/"y.mp4").exists()
    assert main(["simulate", str(tmp_path/"e"), "--no-raw", "--video", str(films[0])]) == 2 and "a movie already" in capsys.readouterr().err


def test_evaluate_knows_a_generator(tmp_path, monkeypatch, capsys):
    "Which table is made of which run, and with what; the tables themselves are tested with notebook 88."
    scores = pytest.importorskip("sirem_nb.diffusion.scores")
    (tmp_path/"run").mkdir(); (tmp_path/"run"/"settings.json").write_text('{"model": "diffusion"}'); seen = []
    monkeypatch.setattr(scores, "score_diffusion", lambda data, run, out, **kw: seen.append((run, out, kw)) or [{"split": "unseen_speech", "method": "model", "metric": "tongue_mm", "value": 1.}, {"split": "unseen_speech", "method": "model", "text": "it passes"}])
    assert main(["evaluate", str(tmp_path), "--run", str(tmp_path/"run"), "--out", str(tmp_path/"t"), "--utterances", "3", "--seed", "5"]) == 0
    (run_, out, kw), = seen
    assert (run_, out, kw["n"], kw["seed"], kw["tracker"].name) == (tmp_path/"run", tmp_path/"t", 3, 5, "tracker")
    out = capsys.readouterr().out
    assert "diffusion.json" in out and out.count("unseen speech, model: it passes") == out.count("unseen speech") == 1
    monkeypatch.setattr(scores, "score_drift", lambda data, run, out, **kw: seen.append((run, out, kw)) or [])
    assert main(["evaluate", str(tmp_path), "--run", str(tmp_path/"run"), "--out", str(tmp_path/"t"), "--tables", "drift", "--utterances", "2"]) == 0
    run_, out, kw = seen[1]
    assert (run_, out, kw["n"], kw["seed"], kw["tracker"].name) == (tmp_path/"run", tmp_path/"t", 2, 0, "tracker") and "drift.json" in capsys.readouterr().out


def test_same_seed_same_data(tmp_path):
    for d in ("a", "b"): assert main(["simulate", str(tmp_path/d), "--speakers", "1", "--words", "asouk", "--workers", "1", "--seed", "5"]) == 0
    a, b = (next((tmp_path/d).glob("sub001/2drt/raw/*.h5")) for d in "ab")
    with h5py.File(a) as f, h5py.File(b) as g: assert all(np.array_equal(x["data"], y["data"]) for x, y in zip(f["dataset/data"][:], g["dataset/data"][:]))


def test_a_killed_simulation_leaves_only_whole_files_and_goes_on(tmp_path):
    argv = [SIREM, "simulate", tmp_path/"d", "--speakers", "2", "--words", "asouk,bite", "--workers", "1"]
    p = subprocess.Popen([*map(str, argv)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    limit = time.time() + 300
    while time.time() < limit and not list((tmp_path/"d").glob("**/*_raw.h5")): time.sleep(0.05)
    os.killpg(p.pid, signal.SIGKILL); p.wait()
    for f in (tmp_path/"d").glob("**/*_raw.h5"): assert run("info", f).returncode == 0
    r = run(*argv[1:])
    assert r.returncode == 0, r.stderr[-500:]
    assert len(list((tmp_path/"d").glob("**/raw/*_raw.h5"))) == 2 and not [q for q in (tmp_path/"d").rglob("*") if "tmp" in q.name]
