"""Does a movie of ten seconds hold? The paper's feedback beside overlap, second by second (study 958). One thread; each stage replaces its own part of results/drift.*

    python tests/by_hand/drift.py make   LONG                        # 16 virtual speakers, two free recordings of 12 s each (a quarter of an hour on two cores)
    python tests/by_hand/drift.py choose DATA  CACHE MODEL [NAME ...] # context, noise, anchor, steps, guidance: on the training run's validation recordings
    python tests/by_hand/drift.py final  LONG  CACHE MODEL [PART ...] # feedback and overlap on free speech that no training recording holds
    python tests/by_hand/drift.py final  DATA  CACHE MODEL unseen_subject   # the same on scripted speech of new speakers
    python tests/by_hand/drift.py strip  LONG  CACHE MODEL           # frames for a picture

DATA: what the model was trained on (checkpoints/README.md); MODEL: checkpoints/diffusion-small.
"""
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from sirem_nb.diffusion import scores as sc
from sirem_nb.diffusion.condition import read_talks, three_splits
from sirem_nb.diffusion.long_video import FilmSettings
from sirem_nb.diffusion.train import load_diffusion
from sirem_nb.kspace.spiral import USC13
from sirem_nb.speaker.corpus import FREE, simulate_corpus
from stages import keep_stage

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[2]
OUT, TRACKER, SEED = ROOT/"results"/"drift.json", ROOT/"checkpoints"/"tracker", 0
OURS = {k: v for k, v in asdict(FilmSettings()).items() if k != "method"}                        # what sirem generate does
WAYS = {"feedback": dict(method="feedback"), "no anchor": dict(anchor=0), **{f"anchor {k}": dict(anchor=k) for k in (1, 2, 4, 8)}, "no anchor, noise 0.1": dict(anchor=0, known_sigma=.1), "anchor 4, noise 0.1": dict(known_sigma=.1),
        "anchor 4, 1 past frame": dict(context=1), "anchor 4, guidance 1.5": dict(guidance_scale=1.5), "anchor 4, 1 step": dict(steps=1, last_sigma=0)}


def keep(stage, records, **about):
    "Replace one stage's records and its line of the meta file."
    keep_stage(OUT, stage, records, about, f"python tests/by_hand/drift.py {stage.split('/')[0]} ...", seed=SEED)


def make(out):
    simulate_corpus(out, 16, ("asouk",), replace(USC13, matrix=64, tr_s=.01), seed=80, seconds=None, raw=False, free=FREE, free_recordings=2, free_seconds=12., progress=True)


def line(rows, name):
    m = {k: np.nanmean(rows[name][k], 0) for k in ("tongue_mm", "lips_mm", "tongue_speed")}
    print(f"{name:24} tongue mm: " + " ".join(f"{v:5.2f}" for v in m["tongue_mm"]) + "   lips mm: " + " ".join(f"{v:4.2f}" for v in m["lips_mm"]) + "   speed: " + " ".join(f"{v:3.0f}" for v in m["tongue_speed"]), flush=True)


def choose(data, cache, model, *names):
    talks, net, reader = read_talks(data, cache=cache), load_diffusion(model), sc.reader_of(TRACKER)
    us = sc.utterances(talks, json.loads((Path(model)/"settings.json").read_text())["val"], 6, 10., "val")
    for name in names or WAYS:
        start, rows = time.process_time(), sc.drift(net, us, reader, {name: {"method": "overlap", **OURS, **WAYS[name]}}, seed=SEED)
        line(rows, "mean-pose"); line(rows, name)
        extra = [] if (OUT.exists() and any(r["stage"] == "choose/controls" for r in json.loads(OUT.read_text()))) else [r for r in sc.drift_records(rows, split="val") if r["method"] != name]
        if extra: keep("choose/controls", extra)
        keep(f"choose/{name}", [r for r in sc.drift_records(rows, split="val") if r["method"] == name], setting={**OURS, **WAYS[name]}, cpu_s_here=round(time.process_time() - start))


def final(data, cache, model, *parts):
    talks, net, reader = read_talks(data, cache=cache), load_diffusion(model), sc.reader_of(TRACKER)
    split = three_splits(talks, SEED)
    for part in parts or ("unseen_speech", "both"):
        us = sc.utterances(talks, split[part], 24, 10., part)
        print(part, len(us), "utterances", flush=True)
        rows = sc.drift(net, us, reader, {"feedback": {**OURS, "method": "feedback"}, "overlap": {"method": "overlap", **OURS}}, seed=SEED)
        for name in rows: line(rows, name)
        verdicts = [{"split": part, **v} for method in ("overlap", "feedback", "frozen") for v in sc.drift_verdict(rows, method)]
        for v in verdicts: print(v["method"], v["text"], flush=True)
        keep(f"final/{part}", sc.drift_records(rows, split=part) + verdicts, setting=OURS, utterances=[u.name for u in us])


def strip(data, cache, model):
    talks, net = read_talks(data, cache=cache), load_diffusion(model)
    us = sc.utterances(talks, three_splits(talks, SEED)["unseen_speech"], 2, 10., "unseen_speech")
    first, f = torch.stack([u.video[0] for u in us]), torch.stack([u.features for u in us])
    films = {"truth": torch.stack([u.video for u in us]), "feedback": sc.make_films(net, f, first, **{**OURS, "method": "feedback"}), "overlap": sc.make_films(net, f, first, **OURS)}
    at = [45, 95, 145, 245, 345, 495]
    np.savez_compressed(OUT.with_suffix(".npz"), at=at, **{k: (v[:, at]*255).round().byte().numpy() for k, v in films.items()})


if __name__ == "__main__": {"make": make, "choose": choose, "final": final, "strip": strip}[sys.argv[1]](*sys.argv[2:])
