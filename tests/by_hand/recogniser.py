"""How well the recogniser of sirem_nb.evaluate.speech hears recorded speech and the virtual speakers: the ceiling of every word error rate.

    apt-get download asterisk-core-sounds-en-g722 asterisk-core-sounds-en pocketsphinx-testdata && for p in *.deb; do dpkg -x $p debian; done
    python tests/by_hand/recogniser.py prompts debian      # 550 prompts, two minutes
    python tests/by_hand/recogniser.py novel debian
    python tests/by_hand/recogniser.py sentences           # virtual speakers, three minutes
    python tests/by_hand/recogniser.py words
    python tests/by_hand/recogniser.py pair

Each writes its records into results/recogniser.json. Of the recordings (CC BY-SA 3.0; BSD) only numbers are kept.
"""
import datetime
import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import soundfile
import torch
from imageio_ffmpeg import get_ffmpeg_exe

from sirem_nb.data.mrd import replacing
from sirem_nb.evaluate.speech import Recogniser, edits, identified, word_error_rate, word_scores, words_of
from sirem_nb.speaker.corpus import virtual_speaker, voice_of
from sirem_nb.speaker.utterances import utter

torch.set_num_threads(1)
OUT, RATE = Path(__file__).resolve().parents[2]/"results"/"recogniser.json", 16000
SENTENCES = ("when the sunlight strikes raindrops in the air", "they act as a prism and form a rainbow", "you wished to know all about my grandfather",
             "well he is nearly ninety three years old", "a long beard clings to his chin")
WORDS = "beat bit bait bet bat pot but bought boat put boot water seven yellow morning people rainbow window grandfather sunlight".split()


def keep(task, records):
    old = json.loads(OUT.read_text()) if OUT.exists() else {"meta": {}, "records": []}
    meta = {"task": task, "command": f"python tests/by_hand/recogniser.py {task}", "date": str(datetime.date.today()), "device": "cpu, one thread", "weights": "moonshine-voice 0.0.73, tiny-en"}
    old["meta"][task] = meta
    old["records"] = [r for r in old["records"] if r["task"] != task] + [{"table": "recogniser", "task": task, **r} for r in records]
    with replacing(OUT) as tmp: tmp.write_text(json.dumps(old, indent=1) + "\n")
    for r in records: print(r)


def rate_of(what, pairs):
    n = sum(len(words_of(s)) for s, _ in pairs)
    exact = float(np.mean([words_of(s) == words_of(h) for s, h in pairs]))
    return [{"what": what, "metric": "wer", "value": round(word_error_rate(*zip(*pairs)), 4), "n": n, "of": "words"},
            {"what": what, "metric": "all words right", "value": round(exact, 4), "n": len(pairs), "of": "recordings"}]


def prompts(recogniser, folder):
    folder = Path(folder)
    text = gzip.open(folder/"usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz", "rt", errors="replace").read()
    said = dict(line.split(": ", 1) for line in text.splitlines() if ": " in line and not line.startswith(";"))
    pairs = []
    for name, s in sorted(said.items()):
        file = folder/"usr/share/asterisk/sounds/en_US_f_Allison"/f"{name}.g722"
        if re.search(r"[\[(<*#]", s) or not words_of(s) or not file.exists(): continue    # tones, silences, stage directions
        raw = subprocess.run([get_ffmpeg_exe(), "-v", "error", "-f", "g722", "-i", str(file), "-f", "f32le", "-ar", str(RATE), "-ac", "1", "-"], capture_output=True).stdout
        pairs.append((s, recogniser(np.frombuffer(raw, np.float32), RATE)))
    short = [p for p in pairs if len(words_of(p[0])) == 1]
    keep("prompts", rate_of("recorded prompts, 5 words and more", [p for p in pairs if len(words_of(p[0])) >= 5]) + rate_of("recorded prompts, 2 to 4 words", [p for p in pairs if 2 <= len(words_of(p[0])) < 5])
         + rate_of("recorded prompts, 1 word or letter", short))


def novel(recogniser, folder):
    folder = Path(folder)/"usr/share/pocketsphinx/test/data/librivox"
    pairs = []
    for line in (folder/"transcription").read_text().splitlines():
        s, name = re.fullmatch(r"<s> (.*) </s> \((.*)\)", line).groups()
        pairs.append((s, recogniser(*soundfile.read(folder/f"{name}.wav"))))
    keep("novel", rate_of("a novel, read aloud", pairs))


def speak(seed, text):
    s = virtual_speaker(seed)
    u = utter(text, s.shape, s.pace, s.voice.f0_hz, 0, semitones=s.voice.f0_range)
    return voice_of(u, s, RATE).numpy()


def sentences(recogniser):
    pairs = {seed: [(s, recogniser(speak(seed, s), RATE)) for s in SENTENCES] for seed in range(6)}
    heard = [{"what": f"virtual speaker {seed}: {s}", "metric": "heard", "text": h, "value": round(word_error_rate(s, h), 4), "n": len(words_of(s)), "of": "words"} for seed, ps in pairs.items() for s, h in ps]
    each = [word_error_rate(*zip(*ps)) for ps in pairs.values()]
    print("by speaker", np.round(each, 2))
    keep("sentences", rate_of("six virtual speakers, five sentences each", sum(pairs.values(), [])) + heard)


def words(recogniser):
    right, plain, pairs = [], [], []
    for seed in range(4):
        waves = [speak(seed, w) for w in WORDS]
        scores = np.array([word_scores(recogniser, w, RATE, WORDS) for w in waves])
        right += list(identified(scores) == np.arange(len(WORDS))); plain += list(identified(scores, False) == np.arange(len(WORDS)))
        pairs += [(s, recogniser(w, RATE)) for s, w in zip(WORDS, waves)]
    one = lambda metric, v: {"what": f"four virtual speakers, one of {len(WORDS)} words", "metric": metric, "value": round(float(np.mean(v)), 4), "n": len(v), "of": "words"}
    keep("words", [one("wer", [edits(words_of(s), words_of(h)) for s, h in pairs]), one("all words right", [words_of(s) == words_of(h) for s, h in pairs]), one("identified", right), one("identified, no prior", plain)])


def pair(recogniser):
    two = ("asouk", "ageese")
    scores = np.array([word_scores(recogniser, speak(seed, w), RATE, two) for seed in range(6) for w in two])
    right = identified(scores, prior=False) == np.tile([0, 1], 6)
    keep("pair", [{"what": "six virtual speakers, asouk or ageese", "metric": "identified, no prior", "value": round(float(right.mean()), 4), "n": len(right), "of": "words"}])


if __name__ == "__main__":
    {"prompts": prompts, "novel": novel, "sentences": sentences, "words": words, "pair": pair}[sys.argv[1]](Recogniser(), *sys.argv[2:])
