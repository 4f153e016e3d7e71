"""Does a translator read the tongue? Many words, speakers and words that were not in the training (study 956).

    python tests/by_hand/open_vocabulary.py data DATA            # 24 virtual speakers say 49 words: about 8 minutes of one core
    python tests/by_hand/open_vocabulary.py read DATA RUN        # linear and small readings: a minute
    python tests/by_hand/open_vocabulary.py train DATA RUN ROW SEED [EPOCHS]    # ROW: keep-time, plain, ours
    python tests/by_hand/open_vocabulary.py score DATA RUN [people=2] [METHOD ...]    # into results/open_vocabulary.json; with methods: only their part of the work, the sounds of every seed; people: the sounds of so many
    python tests/by_hand/open_vocabulary.py keep DATA RUN        # the same from what is scored so far; the rest gets spectrogram scores
    python tests/by_hand/open_vocabulary.py real DATA RUN MOVIES # a folder of .mp4 and .wav: rtMRI with sound

All sounds are cut to the shortest (21,832 samples), so that every crop begins at the same time of its film: 19 ms. The films are
cut to the middle 120 mm, 32 x 32 pixels of 3.75 mm: all that moves, for a quarter of the cost.
"""
import datetime
import json
import platform
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from sirem_nb.data.movies import find_pairs, read_frames, read_pair, windows
from sirem_nb.data.mrd import replacing, write_json
from sirem_nb.data.sync import read_audio
from sirem_nb.evaluate.speech import Recogniser, formant_scores, identified, mel_scores, pesq_score, pitch_track, stoi_score, word_error_rate, word_scores
from sirem_nb.speaker.cine import OPEN_WORDS, SAMPLES, simulate_cine
from sirem_nb.speaker.corpus import read_truth
from sirem_nb.translate.mel import MEL, mel_spectrogram, to_wave
from sirem_nb.translate.train import Films, load_translator, train_translator

torch.set_num_threads(1)
OUT = Path(__file__).resolve().parents[2]/"results"
N, SEED, START = 24, 956, (SAMPLES[0] - MEL.n_samples)//2
TEST = [f"sub{i:03d}" for i in range(4, N + 1, 4)]                     # six speakers nobody learns from
NEW, KNOWN = OPEN_WORDS[3::5], OPEN_WORDS[1::5]                       # ten words nobody learns, ten that others said
WORDS = NEW + KNOWN                                                   # the twenty of the test
TRAINING = dict(kind="cine", matrix=32, n_crops=1, batch_size=8, lr=2e-3, channels=(8, 16, 32, 64, 128), lively=True)
EPOCHS = {"keep-time": 24, "plain": 40, "ours": 40}
LAGS = np.arange(-4, 5)/26                                            # s


def load(data):
    "All recordings, each with the one crop that begins 19 ms after its film."
    pairs, kept = [p for p in find_pairs(data) if p.subject <= f"sub{N:03d}"], Path(data)/f"films{N}.npz"
    if not kept.exists():
        frames, waves = [], []
        for p in pairs:
            x, wave, _ = read_pair(p, matrix=32, fov_mm=120., rate=MEL.rate)      # the middle 120 mm: all that moves
            frames.append(x.numpy().astype(np.float16)); waves.append(wave[START:START + MEL.n_samples])
        with replacing(kept) as tmp, open(tmp, "wb") as f: np.savez(f, frames=np.stack(frames), waves=np.stack(waves), names=[p.name for p in pairs], mels=mel_spectrogram(np.stack(waves)).numpy())
    with np.load(kept) as z:
        assert list(z["names"]) == [p.name for p in pairs]
        films, waves, mels = (torch.from_numpy(z[k]).float() for k in ("frames", "waves", "mels"))
    return Films(pairs, films, mels[:, None].half(), mels, waves, START/MEL.rate, {})


def parts(d):
    "Numbers of the training and of the test recordings; the test ones by speaker, then by word in the order of WORDS."
    learn = [i for i, p in enumerate(d.pairs) if p.subject not in TEST and p.word not in NEW]
    at = {(p.subject, p.word): i for i, p in enumerate(d.pairs)}
    return torch.tensor(learn), torch.tensor([at[s, w] for s in TEST for w in WORDS])


# ---- readings without a deep network

def columns(x):
    "(rec, 26, k) -> (rec, 64, lag*k): what each column may look at, at its own time and 4 frames before and after."
    t = (START + np.arange(64)*MEL.hop)/MEL.rate
    at = np.clip((t[:, None] + LAGS)*26 - .5, 0, 25)
    lo = np.minimum(at.astype(int), 24); share = torch.tensor(at - lo, dtype=torch.float32)[None, ..., None]
    return ((1 - share)*x[:, lo] + share*x[:, lo + 1]).flatten(2)


def film_vectors(films, learn, k=40):
    "Each frame, less its film's mean frame, in k principal directions of the training films."
    x = films.flatten(2) - films.flatten(2).mean(1, keepdim=True)
    some = x[learn].flatten(0, 1)[::7]
    _, _, v = torch.svd_lowrank(some, k, niter=3)
    z = x @ v
    return z/z[learn].flatten(0, 1).std(0)


def ridge(x, y, weight):
    "(n, a), (n, b) -> (a + 1, b)"
    x = F.pad(x, (0, 1), value=1.)
    penalty = weight*len(x)*torch.eye(x.shape[1]); penalty[-1, -1] = 0
    return torch.linalg.solve(x.T @ x + penalty, x.T @ y)


def linear(z, d, learn):
    "Ridge regression from columns' vectors to mel bands; its weight by speakers left out of the training part."
    x, y, who = columns(z), d.target.transpose(1, 2), [d.pairs[i].subject for i in learn.tolist()]
    away = torch.tensor([w in sorted(set(who))[::4] for w in who])
    fit = lambda i, weight: ridge(x[i].flatten(0, 1), y[i].flatten(0, 1), weight)
    use = lambda i, w: (F.pad(x[i], (0, 1), value=1.) @ w).clamp(0, 1)
    error = {w: (use(learn[away], fit(learn[~away], w)) - y[learn[away]]).square().mean().item() for w in (1e-3, 1e-2, 1e-1, 1.)}
    best = min(error, key=error.get)
    w = fit(learn, best)
    return (lambda i: use(i, w).transpose(1, 2)), best


def small_net(z, d, learn, seed=0, epochs=12):
    "The same vectors through a network of two hidden layers."
    torch.manual_seed(seed)
    x, y = columns(z), d.target.transpose(1, 2)
    net = torch.nn.Sequential(torch.nn.Dropout(.1), torch.nn.Linear(x.shape[2], 256), torch.nn.ReLU(), torch.nn.Dropout(.3), torch.nn.Linear(256, 256), torch.nn.ReLU(), torch.nn.Dropout(.3), torch.nn.Linear(256, 64), torch.nn.Sigmoid())
    rows, want = x[learn].flatten(0, 1), y[learn].flatten(0, 1)
    steps = epochs*(len(rows)//256)
    opt = torch.optim.Adam(net.parameters(), 1e-3); plan = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
    for _ in range(steps):
        i = torch.randint(len(rows), (256,))
        loss = (net(rows[i]) - want[i]).square().mean()
        opt.zero_grad(); loss.backward(); opt.step(); plan.step()
    net.eval()
    with torch.no_grad(): return net(x).transpose(1, 2).detach()


def read(data, run):
    d = load(data); learn, test = parts(d)
    run = Path(run); run.mkdir(parents=True, exist_ok=True); begun = time.perf_counter()
    z = film_vectors(d.films, learn)
    f, weight = linear(z, d, learn); guess = {"linear": f(test)}
    for seed in range(3): guess[f"small-net.{seed}"] = small_net(z, d, learn, seed)[test]
    params = torch.stack([torch.as_tensor(np.asarray(read_truth(p.truth)["parameters"])).float() for p in d.pairs])
    params = (params - params[learn].mean((0, 1)))/params[learn].flatten(0, 1).std(0)
    f, weight2 = linear(params, d, learn); guess["linear-articulators"] = f(test)
    for seed in range(3): guess[f"net-articulators.{seed}"] = small_net(params, d, learn, seed)[test]
    still = z.mean(1, keepdim=True).expand_as(z); f, _ = linear(still + d.films.mean((1, 2, 3))[:, None, None], d, learn); guess["linear-no-motion"] = f(test)
    print({k: {m: round(float(v), 4) for m, v in mel_scores(p, d.target[test]).items()} for k, p in guess.items()}, "ridge", weight, weight2, f"{time.perf_counter() - begun:.0f} s")
    with replacing(run/"read.npz") as tmp, open(tmp, "wb") as g: np.savez_compressed(g, **{k: v.numpy() for k, v in guess.items()})


# ---- deep translators

def part_of(d, i):
    return Films([d.pairs[k] for k in i.tolist()], d.films[i], d.mels[i], d.target[i], d.waves[i], d.start_s, {})


def train(data, run, row, seed, epochs=None):
    d = load(data); learn, test = parts(d); seed = int(seed)
    mine, split = part_of(d, learn), {"train": sorted({d.pairs[i].subject for i in learn.tolist()}), "val": [], "test": []}
    begun, cpu = time.perf_counter(), time.process_time()
    out = Path(run)/f"{row}-{seed}"
    model = train_translator(mine, out, row=row, split=split, resume=True, seed=seed, **TRAINING, epochs=int(epochs or EPOCHS[row]))
    with torch.no_grad(): guess = torch.cat([model(d.films[i])["mel"] for i in test.split(16)])
    with torch.no_grad(): own = torch.cat([model(d.films[i])["mel"] for i in learn[::10].split(16)])
    np.savez_compressed(out/"guess.npz", guess=guess.numpy())
    about = {"row": row, "seed": seed, "cpu_s": round(time.process_time() - cpu), "wall_s": round(time.perf_counter() - begun), "train_l1": float(mel_scores(own, d.target[learn[::10]])["l1"]), **{k: float(v) for k, v in mel_scores(guess, d.target[test]).items()}}
    write_json(out/"about.json", about); print(about)


# ---- controls and scores

def controls(d, learn, test):
    mean = d.target[learn].mean(0)
    n, g = len(test), np.random.default_rng(SEED)
    speaker, word = np.divmod(np.arange(n), len(WORDS))
    other_word = torch.tensor([int(test[s*len(WORDS) + (w + 1 + g.integers(len(WORDS) - 1)) % len(WORDS)]) for s, w in zip(speaker, word)])
    other_speaker = torch.tensor([int(test[(s + 1 + g.integers(len(TEST) - 1)) % len(TEST)*len(WORDS) + w]) for s, w in zip(speaker, word)])
    return {"mean-spectrogram": mean.expand(n, -1, -1), "other-word": d.target[other_word], "other-speaker": d.target[other_speaker], "true-mel": d.target[test]}


def guesses(d, learn, test, run):
    "{method: {seed: (120, 64, 64)}}"
    found = {k: {0: v} for k, v in controls(d, learn, test).items()}
    with np.load(Path(run)/"read.npz") as z:
        for k in z.files: name, _, s = k.partition("."); found.setdefault(name, {})[int(s or 0)] = torch.from_numpy(z[k])
    for p in sorted(Path(run).glob("*/guess.npz")):
        row, seed = p.parent.name.rsplit("-", 1)
        with np.load(p) as z: found.setdefault(f"{row}", {})[int(seed)] = torch.from_numpy(z["guess"])
    return found


def score(data, run, *methods, finish=True):
    people = next((int(m[7:]) for m in methods if m.startswith("people=")), len(TEST)); methods = [m for m in methods if "=" not in m]
    d = load(data); learn, test = parts(d)
    r, records, kept = Recogniser() if finish else None, [], Path(run)/"scores"; kept.mkdir(exist_ok=True)             # methods: only these, a part of the work
    names = [d.pairs[i] for i in test.tolist()]
    f0 = {}
    for method, seeds in guesses(d, learn, test, run).items():
        if methods and method not in methods: continue
        for seed, mel in seeds.items():
            file = kept/f"{method}-{seed}.json"
            if file.exists(): mine = json.loads(file.read_text())["scores"]
            else:
                begun, mine, fits = time.perf_counter(), [], []
                sound = finish and (seed == 0 or method in methods)            # else: spectrogram scores only
                if sound: waves = to_wave(mel[:people*len(WORDS)].clamp(0, 1), method="griffin-lim-torch").numpy()
                same = method == "mean-spectrogram"
                for k, (p, i) in enumerate(zip(names, test.tolist())):
                    ref = d.waves[i].numpy()
                    s = {m: float(v) for m, v in mel_scores(mel[k][None], d.target[i][None]).items()}
                    s["corr2d_wrong_film"] = float(mel_scores(mel[k - k % 20 + (k + 7) % 20][None], d.target[i][None])["corr2d"])     # the same speaker's film of another word
                    mine.append(s)
                    if not sound or k >= people*len(WORDS): continue
                    s |= {"pesq_wb": float(pesq_score(waves[k], ref, MEL.rate)), "stoi": float(stoi_score(waves[k], ref, MEL.rate)), "estoi": float(stoi_score(waves[k], ref, MEL.rate, True))}
                    if k % 3 == 0:
                        if i not in f0: f0[i] = pitch_track(ref, MEL.rate)
                        s |= {m: float(v) for m, v in formant_scores(waves[k], ref, MEL.rate, np.isfinite(f0[i])).items()}
                    if not (same and k): heard = r(waves[k], MEL.rate)
                    s["wer"], s["heard"] = float(word_error_rate(p.word, heard)), heard
                    fits.append(fits[0] if same and k else word_scores(r, waves[k], MEL.rate, WORDS))
                if sound:
                    for s, ok in zip(mine, identified(np.array(fits)) == np.tile(np.arange(len(WORDS)), people)): s["identified"] = float(ok)
                if sound: write_json(file, {"scores": mine, "seconds": round(time.perf_counter() - begun)})
            print(method, seed, {m: round(float(np.mean([s[m] for s in mine if s.get(m) is not None and np.isfinite(s[m])] or [np.nan])), 4) for m in ("l1", "corr2d", "corr2d_wrong_film", "pesq_wb", "stoi", "identified")}, flush=True)
            for p, s in zip(names, mine):
                common = {"table": "open-vocabulary", "method": method, "seed": seed, "subject": p.subject, "word": p.word, "new": p.word in NEW}
                records += [{**common, "metric": m, "value": v if v is not None and np.isfinite(v) else None} for m, v in s.items() if m != "heard"] + ([{**common, "metric": "heard", "value": None, "text": s["heard"]}] if "heard" in s else [])
    if not methods: write(d, learn, test, run, records)


def write(d, learn, test, run, records):
    "Means for the study; every recording's own number of the few scores that it draws."
    means = []
    methods = list(dict.fromkeys(r["method"] for r in records))
    for method in methods:
        for words in ("all", "known", "new"):
            for metric in dict.fromkeys(r["metric"] for r in records if r["metric"] != "heard"):
                mine = [r for r in records if r["method"] == method and r["metric"] == metric and r["value"] is not None and words in ("all", "new" if r["new"] else "known")]
                if not mine: continue
                by_seed = [np.mean([r["value"] for r in mine if r["seed"] == s]) for s in sorted({r["seed"] for r in mine})]
                means.append({"table": "open-vocabulary-mean", "method": method, "words": words, "metric": metric, "value": float(np.mean(by_seed)), "std": float(np.std(by_seed, ddof=1)) if len(by_seed) > 1 else None, "n_seeds": len(by_seed), "n": len({(r["subject"], r["word"]) for r in mine})})
    few = [r for r in records if r["seed"] == 0 and (r["metric"] in ("corr2d", "identified") or (r["metric"] == "heard" and r["subject"] == TEST[0]))]
    path = OUT/"open_vocabulary.json"
    old = [r for r in json.loads(path.read_text()) if r["table"] == "open-vocabulary-real"] if path.exists() else []
    write_json(path, means + few + old)
    g = {k: v[0] for k, v in guesses(d, learn, test, run).items()}
    np.savez_compressed(OUT/"open_vocabulary.npz", **{k: np.uint8(np.round(255*v[:20].clamp(0, 1).numpy())) for k, v in g.items()})     # of the first test speaker
    path = OUT/"open_vocabulary.meta.json"
    meta = {"commands": [l.strip() for l in __doc__.splitlines() if l.strip().startswith("python")], "date": str(datetime.date.today()), "machine": f"CPU, one thread of a busy machine ({platform.machine()})", "torch": torch.__version__, "seed": SEED,
            "speakers": N, "test_speakers": TEST, "new_words": NEW, "known_words": KNOWN, "n_train": len(learn), "n_test": len(test), "settings": TRAINING,
            "runs": [json.loads(p.read_text()) for p in sorted(Path(run).glob("*/about.json"))], "curves": {p.parent.name: [round(h["rec"], 3) for h in json.loads(p.read_text())["history"]] for p in sorted(Path(run).glob("*/curves.json"))}}
    if path.exists(): meta = {**json.loads(path.read_text()), **meta}
    write_json(path, meta)


# ---- a real head

def real(data, run, movies, pixel_mm=200/204):
    "rtMRI movies with their sound, cut into seconds, through the networks that know virtual heads only. Numbers, no pictures."
    d = load(data); learn, test = parts(d)
    folders = [p.parent for p in sorted(Path(run).glob("*-0/about.json"))]
    found, mean, rows = {}, d.target[learn].mean(0), []
    for movie in sorted(Path(movies).glob("*.mp4")):
        frames, fps, _ = read_frames(movie)
        wave, _ = read_audio(movie.with_suffix(".wav"), MEL.rate)
        cut, start = windows(frames, fps, 26, 26, 32, pixel_mm=float(pixel_mm), fov_mm=120.)
        first = [round(s*MEL.rate) + START for s in start]
        ok = [i for i, f in enumerate(first) if f + MEL.n_samples <= len(wave)]
        true = mel_spectrogram(np.stack([np.asarray(wave[first[i]:first[i] + MEL.n_samples]) for i in ok])); cut = cut[ok]
        for name, mel in {"mean-spectrogram": mean.expand(len(ok), -1, -1), "mean-of-this-movie": torch.stack([true[[j for j in range(len(ok)) if j != i]].mean(0) for i in range(len(ok))]), **{f.name[:-2]: models(f)(cut) for f in folders}}.items():
            m, w = mel_scores(mel, true), mel_scores(mel.roll(1, 0), true)
            found.setdefault(name, []).append((len(ok), float(m["l1"]), float(m["corr2d"]), float(w["corr2d"])))
    for name, v in found.items():
        n = [x[0] for x in v]
        rows += [{"table": "open-vocabulary-real", "method": name, "metric": k, "value": float(np.average([x[i + 1] for x in v], weights=n)), "n": sum(n)} for i, k in enumerate(("l1", "corr2d", "corr2d_wrong_film")) if i < 2 or not name.startswith("mean")]
    path = OUT/"open_vocabulary.json"
    write_json(path, [r for r in json.loads(path.read_text()) if r["table"] != "open-vocabulary-real"] + rows)
    for r in rows: print(r)


@torch.no_grad()
def models(folder):
    m = load_translator(folder)
    return lambda cut: m(cut)["mel"]


def data(out):
    simulate_cine(out, n_speakers=N, open_vocabulary=OPEN_WORDS, seed=SEED, n_workers=1, matrix=64)


if __name__ == "__main__":
    {"data": data, "read": read, "train": train, "score": score, "keep": lambda data, run: score(data, run, finish=False), "real": real}[sys.argv[1]](*sys.argv[2:])
