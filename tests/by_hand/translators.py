"""The ablation of both papers on two words, three runs a row: each with a seed of its own and another third of the 63 virtual speakers left out (study 955).

    python tests/by_hand/translators.py data DATA                     # 63 speakers, cine and tagged: 3 minutes
    python tests/by_hand/translators.py run DATA RUN KIND ROW [lively=0] [beta=5] [seeds=[0]] [...]     # what is there already is not done again
    python tests/by_hand/translators.py start DATA RUN                # plain and ours, torch's start and the lively one
    python tests/by_hand/translators.py sweep DATA RUN                # beta and lambda, one after the other
    python tests/by_hand/translators.py speed DATA                    # folds per hour: one by one, stacked
    python tests/by_hand/translators.py keep DATA RUN                 # into results/translators.json; what other machines kept stays
    python tests/by_hand/translators.py full DATA RUN KIND ROW        # one model of the papers' size, into results/translators_full.json
"""
import datetime
import json
import platform
import sys
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from sirem_nb.data.mrd import write_json
from sirem_nb.evaluate.speech import mel_scores
from sirem_nb.speaker.cine import simulate_cine
from sirem_nb.translate.adversary import Discriminator
from sirem_nb.translate.attention import moving_share
from sirem_nb.translate.cine_translator import CineTranslator, TranslatorConfig
from sirem_nb.translate.disentangle import word_use
from sirem_nb.translate.folds import guesses_of, measure_folds_per_hour, score_guess
from sirem_nb.translate.train import Game, game_loss, make_settings, prepare_pairs, train_translator

torch.set_num_threads(1)
OUT = Path(__file__).resolve().parents[2]/"results"
SETTINGS = dict(matrix=64, n_crops=20, epochs=24, batch_size=4, lr=3e-3, lr_attention=3e-3, channels=(8, 16, 32, 64, 128), lively=True)
LIPS = dict(lr_lips=1e-3, audio_steps=200, epochs=12)          # Lip2AudSpec: many more parameters, each step ten times as long


def named(kind, row, given):
    return "-".join([kind, row, *(f"{k}={v}" for k, v in sorted(given.items()))])


@lru_cache
def films_of(data, kind): return prepare_pairs(data, make_settings(kind=kind, **{k: SETTINGS[k] for k in ("matrix", "n_crops")}), Path(data)/"cache")


def run(data, out, kind, row, *given, seeds=(0, 1, 2)):
    given = {k: json.loads(v) for k, v in (g.split("=") for g in given)}
    d, seeds = films_of(data, kind), given.pop("seeds", seeds)
    for seed in seeds:
        here = Path(out)/named(kind, row, given)/str(seed)
        if (here/"about.json").exists(): continue
        test = d.subjects[seed::3]; split = {"train": [s for s in d.subjects if s not in test], "val": [], "test": test}
        s, cpu = {**SETTINGS, **(LIPS if row == "lip2audspec" else {}), "kind": kind, "seed": seed, **given, **({"lively": bool(given["lively"])} if "lively" in given else {})}, time.process_time()
        model = train_translator(d, here, row=row, split=split, resume=True, **s)
        learn, test = d.of(split["train"]), d.of(test)
        with torch.no_grad(): found = [model(d.films[i]) for i in test.split(7)]
        mel, g = torch.cat([f["mel"] for f in found]), guesses_of(d, learn, test, seed)
        means = [d.target[learn][d.words[learn] == w].mean(0) for w in (0, 1)]
        near = torch.stack([(mel - m).square().sum((1, 2)) for m in means], 1).argmin(1)
        with torch.no_grad(): own = torch.cat([model(d.films[i])["mel"] for i in learn[:21].split(7)])
        about = {"kind": kind, "row": row, "seed": seed, "given": given, "settings": s, "cpu_s": round(time.process_time() - cpu), "word_right": float((near == d.words[test]).float().mean()), "spread": float(mel.std(0).mean()), "date": str(datetime.date.today()),
                 "train_l1": float(mel_scores(own, d.target[learn[:21]])["l1"])}
        if "mu" in found[0]: about["word_use"] = word_use(model, d.films[test], d.target[test])
        if "masks" in found[0]: about["moving_share"] = torch.cat([moving_share(f["masks"]) for f in found]).mean().item(); about["mask_range"] = [min(f["masks"].min().item() for f in found), max(f["masks"].max().item() for f in found)]
        write_json(here/"about.json", about)
        np.savez_compressed(here/"guess.npz", mel=mel.numpy(), test=test.numpy(), **({"masks": found[0]["masks"][0].numpy()} if "masks" in found[0] else {}), **{k: torch.stack([v[i] for i in test.tolist()]).numpy() for k, v in g.items()})
        print(named(kind, row, given), seed, about["cpu_s"], "s", {k: round(float(v), 4) for k, v in mel_scores(mel, d.middle[test]).items()}, "word", about["word_right"], "mean of word", round(float(mel_scores(torch.stack([g["mean-of-word"][i] for i in test.tolist()]), d.middle[test])["l1"]), 4), flush=True)


def start(data, out):
    for row in ("plain", "ours"):
        for lively in (0, 1): run(data, out, "cine", row, f"lively={lively}")


def sweep(data, out):
    for name in ("beta", "lam"):
        for v in (.05, 5, 50): run(data, out, "cine", "ours", f"{name}={v}")


def step_cost():
    "CPU seconds of one film in one training step."
    found = []
    for matrix, channels, attention in ((128, (32, 32, 64, 64, 128), False), (128, (32, 32, 64, 64, 128), True), (64, SETTINGS["channels"], False), (64, SETTINGS["channels"], True)):
        torch.manual_seed(0); n = 2
        g = Game(CineTranslator(TranslatorConfig(matrix=matrix, channels=channels, attention=attention)), Discriminator(), .5, .5)
        b, times = {"frames": torch.rand(n, 26, matrix, matrix), "target": torch.rand(n, 64, 64), "real": torch.rand(n, 64, 64), "word": torch.zeros(n), "eps": torch.randn(n, 14, 4, 4)}, []
        for _ in range(2): t = time.process_time(); game_loss(g, b)["loss"].backward(); times.append((time.process_time() - t)/n)
        found.append({"matrix": matrix, "channels": channels, "attention": attention, "cpu_s_per_film": round(min(times), 4)})
    return found


def speed(data):
    "Four folds one after the other and stacked by vmap, one thread, one epoch of 8 films, the papers' channels."
    found, s = [], dict(epochs=1, n_train=8, batch_size=4, n_crops=20)
    for kind in ("cine", "tagged"):
        for matrix in (32, 64):
            d = prepare_pairs(data, make_settings(kind=kind, matrix=matrix, n_crops=20), Path(data)/"cache")
            v = measure_folds_per_hour(d, 4, cache=Path(data)/"cache", kind=kind, matrix=matrix, **s)
            found += [{"table": "translate-speed", "kind": kind, "matrix": matrix, "method": m, "metric": "folds_per_hour", "value": v[m], "n": 4} for m in ("one_by_one", "together")]; print(found[-2:], flush=True)
    path = OUT/"translators.json"
    write_json(path, [r for r in json.loads(path.read_text()) if r["table"] != "translate-speed"] + found)


def scored(file, d, test, mels, waves):
    "{metric: [a number or None for each recording]}, from a file if it is there."
    if file.exists(): return json.loads(file.read_text())
    each = [score_guess(mel, d, i, waves) for i, mel in zip(test, torch.from_numpy(mels))]
    out = {m: [round(float(s[m]), 5) if np.isfinite(s[m]) else None for s in each] for m in each[0]}
    write_json(file, out)
    return out


def keep(data, out):
    "The means of every run, each speaker's own l1 and corr2d, pictures of a few recordings."
    path, records, runs, pictures = OUT/"translators.json", [], [], {}
    seen = {r["seed"] for r in json.loads(path.read_text()) if r.get("run") == "controls"}            # the controls of these stand
    for here in sorted(p.parent for p in Path(out).glob("*/*/about.json")):
        a, name = json.loads((here/"about.json").read_text()), here.parent.name
        d = films_of(data, a["kind"]); z = np.load(here/"guess.npz"); test = z["test"].tolist()
        rows = {(name, a["kind"], a["row"]): (here/"scores.json", z["mel"], not a["given"])}
        if a["seed"] not in seen: seen.add(a["seed"]); rows |= {("controls", "both", k): (Path(out)/f"{k}-{a['seed']}.json", z[k], True) for k in ("mean-spectrogram", "mean-of-word", "other-speaker", "true-mel")}   # cine and tagged films have the same sounds
        for (run, kind, method), (file, mels, waves) in rows.items():
            s, common = scored(file, d, test, mels, waves), {"run": run, "kind": kind, "method": method, "seed": a["seed"]}
            for m, v in s.items():
                there = [x for x in v if x is not None]
                records.append({"table": "translate-mean", **common, "metric": m, "value": round(float(np.mean(there)), 5), "n": len(there), **({"given": a["given"]} if run == name else {})})
                if m in ("l1", "corr2d"): records += [{"table": "translate", **common, "metric": m, "subject": d.pairs[i].subject, "value": x} for i, x in zip(test, v)]
        curve = json.loads((here/"curves.json").read_text())["history"]
        runs.append({k: a[k] for k in a if k != "settings"} | {"name": name, "curve": [round(h["rec"], 2) for h in curve]})
        if a["seed"] == 0 and not a["given"]:
            two = [next(k for k, i in enumerate(test) if d.pairs[i].word == w) for w in ("asouk", "ageese")]
            pictures |= {f"{a['kind']}/{a['row']}": z["mel"][two], **{f"{a['kind']}/{k}": z[k][two] for k in ("mean-of-word", "true-mel")}, **({"masks": z["masks"], "film": d.films[test[0]].numpy()} if "masks" in z and a["row"] == "ours" else {})}
    new, old = {(r["run"], r["method"], r["seed"]) for r in records}, json.loads((OUT/"translators.meta.json").read_text())
    write_json(path, [r for r in json.loads(path.read_text()) if r["table"] == "translate-speed" or (r["run"], r["method"], r["seed"]) not in new] + records)
    runs = sorted([r for r in old["runs"] if (r["name"], r["row"], r["seed"]) not in new] + runs, key=lambda r: (r["name"], r["seed"]))
    with np.load(OUT/"translators.npz") as z: pictures = dict(z) | {k: np.uint8(np.round(255*np.clip(v, 0, 1))) for k, v in pictures.items()}
    write_json(OUT/"translators.meta.json", {"commands": [l.strip() for l in __doc__.splitlines() if l.strip().startswith("python")], "date": str(datetime.date.today()), "machine": f"CPU, one thread of a busy machine ({platform.machine()})",
        "torch": torch.__version__, "settings": SETTINGS, "settings_lip2audspec": LIPS, "cost": old.get("cost") or old["thirds"]["cost"], "runs": runs})
    np.savez_compressed(OUT/"translators.npz", **pictures)


FULL = dict(matrix=128, n_crops=100, channels=(32, 32, 64, 64, 128))      # pixels, crops and layers are the papers'; the epochs stay ours


def full(data, out, kind, row):
    "One model of full size, the first third of the speakers left out, beside the guesses for the same speakers."
    SETTINGS.update(FULL); run(data, out, kind, row, seeds=(0,))
    here, d, path = Path(out)/named(kind, row, {})/"0", films_of(data, kind), OUT/"translators_full.json"
    about, z = json.loads((here/"about.json").read_text()), np.load(here/"guess.npz")
    new = {m: mel_scores(torch.from_numpy(z["mel" if m == row else m]), d.middle[z["test"]]) for m in (row, "mean-spectrogram", "mean-of-word", "other-speaker")}
    old = [r for r in (json.loads(path.read_text()) if path.exists() else []) if (r["kind"], r["row"]) != (kind, row)]
    write_json(path, old + [{"table": "translate-full", "kind": kind, "row": row, "seed": 0, "method": m, "metric": k, "value": round(float(s[k]), 5), "n": len(z["test"])} for m, s in new.items() for k in ("l1", "corr2d")])
    meta = OUT/"translators_full.meta.json"
    runs = json.loads(meta.read_text())["runs"] if meta.exists() else {}
    runs[f"{kind}-{row}"] = {"cpu_s": about["cpu_s"], "word_right": about["word_right"], "train_l1": round(about["train_l1"], 5), "settings": about["settings"], "date": str(datetime.date.today())}
    write_json(meta, {"command": "python tests/by_hand/translators.py full DATA RUN KIND ROW", "seed": 0, "machine": f"CPU, one thread ({platform.machine()})", "torch": torch.__version__, "runs": runs})


if __name__ == "__main__":
    if sys.argv[1] == "data": simulate_cine(sys.argv[2], tagged="both", seed=0, n_workers=1)
    else: {"run": run, "start": start, "sweep": sweep, "speed": speed, "keep": keep, "full": full}[sys.argv[1]](*sys.argv[2:])
