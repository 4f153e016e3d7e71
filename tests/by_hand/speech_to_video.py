"""How good is the shipped generator? Scores, curves, a film strip, real speech (study 957). One thread; each stage adds to results/speech_to_video.*

    python tests/by_hand/speech_to_video.py piles  DATA CACHE                 # I3D features of what does not depend on the model
    python tests/by_hand/speech_to_video.py choose DATA CACHE MODEL           # settings of the sampler, on the training run's validation recordings
    python tests/by_hand/speech_to_video.py scores DATA CACHE MODEL [PART ...]  # all rows of the parts of the split
    python tests/by_hand/speech_to_video.py train  DATA CACHE RUN [NAME=VALUE ...]  # the checkpoint's training again, with another setting: pooled=true, encoder="moonshine"
    python tests/by_hand/speech_to_video.py row    DATA CACHE RUN NAME        # that run on the same utterances of unseen speech
    python tests/by_hand/speech_to_video.py anchors DATA CACHE MODEL          # unseen speech without an anchor, and with one in every clip
    python tests/by_hand/speech_to_video.py fvd    DATA CACHE MODEL           # FVD of the model's films, unseen speech
    python tests/by_hand/speech_to_video.py curves DATA CACHE MODEL           # steps and solvers, guidance
    python tests/by_hand/speech_to_video.py strip  DATA CACHE MODEL           # frames for a picture
    python tests/by_hand/speech_to_video.py time   DATA CACHE MODEL           # seconds for a second of film, one film, one and two threads (on a machine that does nothing else)

DATA: `sirem simulate DATA --no-raw --free ...` as checkpoints/README.md says; MODEL: checkpoints/diffusion-small.
"""
import dataclasses
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

from sirem_nb.diffusion import scores as sc
from sirem_nb.diffusion.condition import read_talks, three_splits
from sirem_nb.diffusion.long_video import FilmSettings
from sirem_nb.diffusion.train import load_diffusion, train_diffusion
from sirem_nb.evaluate.perceptual import load_lpips
from sirem_nb.evaluate.video import Blocks, clip_features, fvd, load_i3d
from stages import keep_stage

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[2]
OUT, TRACKER = ROOT/"results"/"speech_to_video.json", ROOT/"checkpoints"/"tracker"
N, SECONDS, PILE, SEED = {"unseen_speech": 24, "unseen_subject": 16, "both": 16}, 2., 256, 0
MAKING = dataclasses.asdict(FilmSettings())   # what sirem generate does
TRAINING = dict(mixed=True, epochs=54, per_epoch=600, batch_size=6, lr=1.2e-3, context=(0, 1, 1, 1, 2, 2, 3, 3, 3, 4), val_every=9)   # as for the checkpoint


def world(data, cache):
    talks = read_talks(data, cache=cache)
    return talks, three_splits(talks, SEED)


def keep(stage, records, **about):
    "Replace one stage's records and its line of the meta file."
    keep_stage(OUT, stage, records, about, f"python tests/by_hand/speech_to_video.py {stage.split('/')[0]} DATA CACHE MODEL", seed=SEED, seconds=SECONDS, making=MAKING)


def some(clips, n=PILE): return clips[torch.linspace(0, len(clips) - 1, min(n, len(clips))).round().long()]


def piles(data, cache):
    talks, split = world(data, cache)
    i3d = load_i3d()
    films = {"training": sc.training_clips(talks, split["train"], PILE), "training-again": sc.training_clips(talks, split["train"], 2*PILE + 1)[1::2]}
    for name, clips in films.items():
        np.save(Path(cache)/f"i3d-{name}.npy", clip_features(clips, i3d, 1.).numpy())
        print(name, len(clips), "clips", round(time.process_time()), "s", flush=True)


def scores(data, cache, model, *parts):
    talks, split = world(data, cache)
    net, reader, others = load_diffusion(model), sc.reader_of(TRACKER), sc.training_clips(talks, split["train"], PILE)
    for part in parts or N:
        us = sc.utterances(talks, split[part], N[part], SECONDS, part)
        records, films = sc.score_part(net, us, reader, others, None, (Blocks(),), seed=SEED, **MAKING)
        np.savez_compressed(Path(cache)/f"films-{part}.npz", **{k: (films[k]*255).round().byte().numpy() for k in films})
        keep(f"scores/{part}", records, utterances=len(us), subjects=sorted({u.subject for u in us}), recordings=len({u.name for u in us}))
        print(part, *[r["text"] for r in records if "text" in r], sep="\n", flush=True)
        for row in films: print(f"{row:12s}", *(f"{m} {v['value']:.2f}" for m in ("tongue_mm", "lips_mm", "velum_mm", "lips_opening_corr", "lips_contact_f1", "tongue_speed_ratio", "ssim", "fvd-blocks") if (v := next((r for r in records if r["method"] == row and r["metric"] == m and r["value"] is not None), None))), flush=True)


def train(data, cache, run, *given):
    from sirem_nb.cli import assignments
    from sirem_nb.diffusion.train import DiffusionSettings
    train_diffusion(data, run, resume=True, cache=cache, seed=SEED, **TRAINING | assignments(given, DiffusionSettings))


def row(data, cache, run, name, stage="rows", **making):
    "One other model, or other settings, on the utterances of unseen speech."
    net = load_diffusion(run); talks = read_talks(data, net.config.encoder, cache=cache); split = three_splits(talks, SEED)
    us = sc.utterances(talks, split["unseen_speech"], N["unseen_speech"], SECONDS, "unseen_speech")
    films, _ = sc.control_films(net, us, ("model", "other-audio"), seed=SEED, **MAKING | making)
    mouths = {k: sc.mouth_scores(c, us) for k, c in sc.outlines(films, us, sc.reader_of(TRACKER)).items()}
    others, common = sc.training_clips(talks, split["train"], PILE), {"table": "diffusion", "split": "unseen_speech"}
    records = [{**r, "method": name} for r in sc.summary(mouths["model"] | sc.look_scores(films["model"], films["truth"], others), **common) + sc.pile_records({"model": films["model"]}, others, (Blocks(),), None, split="unseen_speech") + sc.verdict(mouths, speakers=[u.subject for u in us], **common)]
    curve = Path(run)/"curves.json"
    about = {"val_loss": [round(h["val_loss"], 3) for h in json.loads(curve.read_text())["history"] if "val_loss" in h], "hears": [round(h["hears"], 2) for h in json.loads(curve.read_text())["history"] if "hears" in h]} if curve.exists() else {}
    keep(f"{stage}/{name}", records, utterances=len(us), making=MAKING | making, **about)
    print(name, *[r["text"] for r in records if "text" in r], sep="\n", flush=True)


def anchors(data, cache, model):
    for name, k in (("no anchor", 0), ("anchor in every clip", 1)): row(data, cache, model, name, "anchors", anchor=k)


def timing(data, cache, model):
    talks, split = world(data, cache)
    net, u = load_diffusion(model), sc.utterances(talks, split["unseen_speech"], 1, 4., "unseen_speech")[0]
    sc.make_films(net, u.features[None, :30], u.video[:1])
    records = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for steps in (1, MAKING["steps"]):
            took = []
            for _ in range(3): begin = time.perf_counter(), time.process_time(); sc.make_films(net, u.features[None], u.video[:1], steps=steps); took.append(((time.perf_counter() - begin[0])/4, (time.process_time() - begin[1])/4))
            records += [{"table": "time", "method": "model", "metric": m, "value": min(t[i] for t in took), "n": 3, "unit": "s", "threads": threads, "steps": steps} for i, m in enumerate(("seconds_per_second", "cpu_s_per_second"))]; print(threads, steps, took, flush=True)
    torch.set_num_threads(1)
    keep("time", records, load=os.getloadavg()[0])


def fvds(data, cache, model, n=32):
    "FVD and LPIPS of unseen speech, every row; as many clips in every pile, enough for a stable number."
    talks, split = world(data, cache)
    us, i3d, lpips = sc.utterances(talks, split["unseen_speech"], int(n), SECONDS, "unseen_speech"), load_i3d(), load_lpips()
    films, _ = sc.control_films(load_diffusion(model), us, seed=SEED, **MAKING)
    clips = {k: some(sc.clips_of(v)) for k, v in films.items()}
    common, out = {"table": "diffusion", "split": "unseen_speech"}, []
    for k, v in clips.items():
        if k == "truth": continue
        d = sc.clip_scores(v[::4], clips["truth"][::4], v[:1], 1., lpips)
        out += [{**common, "method": k, "metric": m, "value": d[m].mean().item(), "n": len(d[m]), "unit": "1"} for m in ("lpips", "temporal_lpips")]
    keep("lpips", out, utterances=len(us)); print(*out, sep="\n", flush=True)
    pile = {k: torch.from_numpy(np.load(Path(cache)/f"i3d-{k}.npy")) for k in ("training", "training-again")}
    rows = {"training": pile["training-again"]} | {k: clip_features(v, i3d, 1.) for k, v in clips.items()}
    out = [{**common, "method": k, **fvd(real, f, extractor=i3d), "against": name, "frames": 10} for name, real in (("training", pile["training"]), ("truth", rows["truth"])) for k, f in rows.items() if name == "training" or k not in ("training", "truth")]
    keep("fvd", out, utterances=len(us), recordings=len({u.name for u in us}))
    for r in out: print(r["method"], r["against"], round(r["value"], 1), r["n_made"], r["note"])


def curves(data, cache, model, n=24):
    talks, split = world(data, cache)
    net, reader, others = load_diffusion(model), sc.reader_of(TRACKER), sc.training_clips(talks, split["train"], PILE)
    us, base = sc.utterances(talks, split["unseen_speech"], n, SECONDS, "unseen_speech"), {k: v for k, v in MAKING.items() if k not in ("steps", "solver", "last_sigma", "guidance_scale")}
    last = MAKING["last_sigma"]
    steps = [{"label": {"family": f}, "solver": s, "last_sigma": level, "steps": k, "guidance_scale": 1.} for f, s, level, ks in
             (("2M", "dpm2m", 0, (1, 2, 4, 8)), ("Heun", "heun", 0, (2, 4)), (f"2M to {last:g}", "dpm2m", last, (2, 4, 8)), (f"Heun to {last:g}", "heun", last, (2, 4))) for k in ks]
    guide = [{**{k: MAKING[k] for k in ("solver", "steps", "last_sigma")}, "guidance_scale": w} for w in (0., 1., 1.5, 2.5)]
    for name, settings in (("steps", steps), ("guidance", guide)):
        keep(f"curves/{name}", sc.sweep(net, us, reader, others, settings, (Blocks(),), seed=SEED, **base), utterances=len(us)); print(name, round(time.process_time()), "s", flush=True)


def choose(data, cache, model, n=24):
    "Where to stop and how much noise on the past: on recordings that training set aside, never on a test part."
    talks, split = world(data, cache)
    val = json.loads((Path(model)/"settings.json").read_text())["val"]
    us = sc.utterances(talks, val, n, SECONDS, "val")
    settings = [{"last_sigma": s, "steps": k, "known_sigma": v} for s, k, vs in ((0, 8, (.1, .02)), (.5, 5, (.1, .02)), (1.5, 4, (.1, .05, .02, .01)), (1.5, 2, (.02,)), (5., 3, (.02,)), (0, 1, (.02,))) for v in vs]
    keep("choose", sc.sweep(load_diffusion(model), us, sc.reader_of(TRACKER), sc.training_clips(talks, split["train"], PILE), settings, (Blocks(),), seed=SEED, **{k: v for k, v in MAKING.items() if k not in settings[0]}), utterances=len(us), recordings=val)


def strip(data, cache, model, i=0, frames=range(10, 100, 10)):
    "One utterance: true, ours, mean pose, wrong sound; openings of the lips of all frames."
    talks, split = world(data, cache)
    us, films, reader = sc.utterances(talks, split["unseen_speech"], N["unseen_speech"], SECONDS, "unseen_speech"), np.load(Path(cache)/"films-unseen_speech.npz"), sc.reader_of(TRACKER)
    from sirem_nb.evaluate.articulators import lip_aperture, tongue_palate
    u, j = us[i], list(frames)
    made = {"true": u.video, "ours": torch.from_numpy(films["model"][i]).float()/255, "wrong sound": torch.from_numpy(films["other-audio"][i]).float()/255}
    lines = {k: u.contours if k == "true" else reader(v, u.pixel_mm) for k, v in made.items()}
    rest = {k: np.repeat(v[None], len(u.video), 0) for k, v in u.rest["contours"].items()}
    step = {k: np.abs(np.diff(films[v].astype(np.float32)/255, axis=1)).mean((0, 2, 3)) for k, v in (("true", "truth"), ("ours", "model"))}     # from frame to frame, over all utterances
    np.savez_compressed(OUT.with_suffix(".npz"), **{f"step/{k}": v for k, v in step.items()}, times_s=np.array(j)/u.fps, phones=np.array(json.dumps(u.phones)), name=np.array(u.name),
                        **{f"film/{k}": (v[j]*255).round().byte().numpy() for k, v in (made | {"mean pose": u.rest["frame"].expand(len(u.video), -1, -1)}).items()},
                        **{f"lips/{k}": lip_aperture(v) for k, v in (lines | {"mean pose": rest}).items()}, **{f"tongue/{k}": tongue_palate(v) for k, v in (lines | {"mean pose": rest}).items()},
                        **{f"outline/{k}/{a}": v[a][j].astype(np.float32) for k, v in lines.items() for a in ("tongue", "upper_lip", "lower_lip")})
    keep("strip", [], recording=u.name)


if __name__ == "__main__": {"piles": piles, "scores": scores, "fvd": fvds, "choose": choose, "curves": curves, "strip": strip, "train": train, "row": row, "anchors": anchors, "time": timing}[sys.argv[1]](*sys.argv[2:])
