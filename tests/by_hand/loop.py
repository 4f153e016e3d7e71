"""Speech -> film -> speech (study 959). One thread; each stage adds to results/loop.*

    python tests/by_hand/loop.py train DATA CACHE RUN                  # a translator of running speech, on the true films of the generator's training recordings
    python tests/by_hand/loop.py score LONG CACHE RUN MODEL [PART ...] # the loop on speech that neither network has met
    python tests/by_hand/loop.py real  RUN MODEL SOUNDS ...            # real speech: .wav files, or .mat of the X-ray microbeam data base

DATA: what the generator was trained on (checkpoints/README.md); LONG: longer recordings of the same speakers (drift.py make); MODEL: checkpoints/diffusion-small. The translator is `keep-time` of study 956:
the middle 120 mm of a film on 32 x 32 pixels, 26 frames a second, one second at a time.
"""
import sys
import time
from pathlib import Path

import numpy as np
import torch

from sirem_nb.data.movies import MoviePair, windows
from sirem_nb.data.sync import read_audio, resample
from sirem_nb.data.xrmb import read_xrmb
from sirem_nb.diffusion import scores as sc
from sirem_nb.diffusion.condition import read_talks, speech_vectors, three_splits
from sirem_nb.diffusion.train import load_diffusion
from sirem_nb.evaluate.speech import Recogniser, corr2d, l1, word_error_rate
from sirem_nb.learning.speech_encoders import load_encoder
from sirem_nb.translate.mel import MEL, join_windows, mel_spectrogram, to_wave
from sirem_nb.translate.train import Films, load_translator, train_translator
from stages import keep_stage

torch.set_num_threads(1)
OUT, SEED = Path(__file__).resolve().parents[2]/"results"/"loop.json", 0
START = (1 - MEL.n_samples/MEL.rate)/2                                  # a crop lies in the middle of its second of film
TRAINING = dict(kind="cine", matrix=32, n_crops=1, batch_size=8, lr=2e-3, channels=(8, 16, 32, 64, 128), lively=True, epochs=16)
SKIP, SECONDS, N = 10, 4, {"unseen_speech": 24, "both": 16}             # frames that do not count, seconds that do, utterances


def keep(stage, records, **about):
    "Replace one stage's records and its line of the meta file."
    keep_stage(OUT, stage, records, about, f"python tests/by_hand/loop.py {stage.split('/')[0]} ...", seed=SEED)


def seconds_of(frames, fps, pixel_mm, hop=26):
    "Films of one second, as the translator sees them, and when each begins."
    return windows(frames, fps, 26, hop, 32, pixel_mm=pixel_mm, fov_mm=120.)


def sounds_of(wave, start):
    "The crops that belong to films of a second that begin at `start`; None where the sound is too short."
    first = [round((s + START)*MEL.rate) for s in start]
    return np.stack([wave[f:f + MEL.n_samples] for f in first]) if first[-1] + MEL.n_samples <= len(wave) else None


def train(data, cache, run):
    talks = read_talks(data, cache=cache)
    pairs, films, waves = [], [], []
    for i in talks.of(three_splits(talks, SEED)["train"]):
        x, start = seconds_of(talks.videos[i].float()/255, talks.fps, talks.pixel_mm[i], 13)
        wave, _ = read_audio(talks.recordings[i].audio, MEL.rate)
        fits = [k for k, s in enumerate(start) if round((s + START)*MEL.rate) + MEL.n_samples <= len(wave)]
        films.append(x[fits]); waves.append(sounds_of(wave, start[fits]))
        pairs += [MoviePair(talks.subjects[i], talks.names[i], f"{talks.names[i]}@{start[k]:.2f}", None, talks.recordings[i].audio, "cine", start_s=float(start[k])) for k in fits]
    waves = torch.from_numpy(np.concatenate(waves)); mels = mel_spectrogram(waves)
    d = Films(pairs, torch.cat(films), mels[:, None].half(), mels, waves, START, {})
    begun = time.process_time()
    train_translator(d, run, row="keep-time", split={"train": d.subjects, "val": [], "test": []}, resume=True, seed=SEED, **TRAINING)
    np.save(Path(run)/"mean.npy", mels.mean(0).numpy())
    keep("train", [], films=len(pairs), subjects=d.subjects, settings=TRAINING, training_cpu_s=round(time.process_time() - begun))


@torch.no_grad()
def heard(model, film, fps, pixel_mm):
    "What the translator paints for each second of a film."
    return model(seconds_of(film, fps, pixel_mm)[0][:SECONDS])["mel"].clamp(0, 1)


def summed(rows, **common):
    "Records: means over utterances with intervals. rows: {row: {metric: (utterance,)}}"
    return [r for row, s in rows.items() for r in sc.summary(s, table="loop", method=row, **common)]


def judge(painted, true):
    "painted {row: (utterance, second, 64, 64)}, true (utterance, second, 64, 64) -> {row: {l1, corr2d, found}}: found: of all utterances' true spectrograms the right one is the most similar."
    out, flat = {}, lambda x: torch.nn.functional.normalize((x - x.mean((2, 3), keepdim=True)).flatten(1), dim=1)
    for row, m in painted.items():
        likes = flat(m) @ flat(true).T
        each = lambda f: np.asarray(f(m.flatten(0, 1), true.flatten(0, 1))).reshape(len(m), -1)
        out[row] = {"l1": each(l1).mean(1), "corr2d": np.nanmean(each(corr2d), 1), "found": (likes.argmax(1) == torch.arange(len(m))).double().numpy()}
    return out


def words(mels, seconds, recogniser):
    "Text of some seconds, one after the other."
    mel, settings = join_windows(mels, np.arange(len(mels), dtype=float))
    return recogniser(to_wave(mel, settings, "griffin-lim-torch").numpy(), MEL.rate)


def score(data, cache, run, model, *parts):
    talks, net, translator, mean = read_talks(data, cache=cache), load_diffusion(model), load_translator(run), torch.from_numpy(np.load(Path(run)/"mean.npy"))
    split, recogniser, length = three_splits(talks, SEED), Recogniser(), SKIP + SECONDS*50
    for part in parts or N:
        us = sc.utterances(talks, split[part], N[part], length/50, part)
        films, _ = sc.control_films(net, us, ("model", "other-audio"), seed=SEED)
        painted = {row: torch.stack([heard(translator, f[SKIP:], u.fps, u.pixel_mm) for f, u in zip(x, us)]) for row, x in {"true film": films["truth"], "made film": films["model"], "film of another sound": films["other-audio"], "still film": films["frozen"]}.items()}
        at, where = zip(*sc.places(talks, split[part], N[part], length))
        sound = [read_audio(talks.recordings[i].audio, MEL.rate)[0] for i in at]
        crops = [sounds_of(w[round((a + SKIP)/50*MEL.rate):], np.arange(SECONDS, dtype=float)) for w, a in zip(sound, where)]
        true = torch.stack([mel_spectrogram(c) for c in crops])
        painted |= {"mean spectrogram": mean.expand_as(true), "another utterance": true[sc.other_of(us)]}
        rows = judge(painted, true)
        said = [recogniser(w[round((a + SKIP)/50*MEL.rate):round((a + length)/50*MEL.rate)], MEL.rate) for w, a in zip(sound, where)]
        texts = {row: [words(m, SECONDS, recogniser) for m in x] for row, x in {"true spectrogram": true, **{k: painted[k] for k in ("true film", "made film", "film of another sound")}}.items()}
        for row, t in texts.items(): rows.setdefault(row, {})["wer"] = np.array([word_error_rate(a, b) if a.strip() else np.nan for a, b in zip(said, t)])
        keep(f"score/{part}", summed(rows, split=part), utterances=[u.name for u in us], said=said, texts=texts)
        if part == "unseen_speech":
            at = list(range(SKIP, SKIP + 100, 12))
            np.savez_compressed(OUT.with_suffix(".npz"), said=np.array(said[0]), at=np.array(at), **{f"mel/{k}": np.uint8(np.round(255*v[0].numpy())) for k, v in ({"true": true} | painted).items()}, **{f"film/{k}": (films[r][0][at]*255).round().byte().numpy() for k, r in (("true", "truth"), ("made", "model"))})
        for row, s in rows.items(): print(part, f"{row:22s}", {k: round(float(np.nanmean(v)), 3) for k, v in s.items()}, flush=True)


def read_sound(path):
    "A .wav, or the sound of a .mat of the X-ray microbeam data base."
    if path.suffix != ".mat": return read_audio(path)
    rec = read_xrmb(path)
    return rec.wave, rec.rate


def real(run, model, *paths):
    "Real voices of two seconds and more, the generator's own head. Only numbers are kept."
    net, translator, mean = load_diffusion(model), load_translator(run), torch.from_numpy(np.load(Path(run)/"mean.npy"))
    painted, true, encoder = {}, [], load_encoder(net.config.encoder)
    voices = {Path(p).stem: read_sound(Path(p)) for p in sorted(paths)}
    names, voices = zip(*((k, v) for k, v in voices.items() if len(v[0])/v[1] > 2.25))
    features = [speech_vectors(w, r, int(len(w)/r*50), encoder) for w, r in voices]
    for i, ((wave, rate), f) in enumerate(zip(voices, features)):
        n = (len(f) - SKIP - 1)//50
        wave22 = np.asarray(resample(wave, rate, MEL.rate))[round(SKIP/50*MEL.rate):]
        other = torch.cat([features[(i + 1) % len(voices)]]*9)[:SKIP + n*50]
        films = {"made film": f[:SKIP + n*50], "film of another sound": other}
        for row, g in films.items():
            film = sc.make_films(net, g[None], net.first_frame[None], seed=SEED)[0]
            painted.setdefault(row, []).append(translator(seconds_of(film[SKIP:], 50, 3.125)[0][:n])["mel"].detach().clamp(0, 1))
        true.append(mel_spectrogram(sounds_of(wave22, np.arange(n, dtype=float))))
        painted.setdefault("mean of this voice's other seconds", []).append(torch.stack([true[-1][[j for j in range(n) if j != k]].mean(0) for k in range(n)]))
    painted = {k: torch.cat(v)[:, None] for k, v in painted.items()}; true = torch.cat(true)[:, None]
    painted["mean spectrogram"] = mean.expand_as(true)
    rows = judge(painted, true)
    keep("real", summed(rows, split="real voices"), sounds=list(names), seconds=len(true))
    for row, s in rows.items(): print(f"{row:22s}", {k: round(float(np.nanmean(v)), 3) for k, v in s.items()}, flush=True)


if __name__ == "__main__": {"train": train, "score": score, "real": real}[sys.argv[1]](*sys.argv[2:])
