"Training the translators: data to tensors, three losses for three networks, resuming, folds (alone, stacked, spread), controls, and a film to a sound."
import json
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import soundfile
import torch

from sirem_nb.translate import folds as F
from sirem_nb.translate import train as T
from sirem_nb.translate.mel import MEL, mel_spectrogram
from sirem_nb.translate.use import film_to_mel, translate

TINY = dict(matrix=32, channels=(4, 4, 8, 8, 32), n_crops=5, epochs=2, batch_size=3, audio_steps=3)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    root = tmp_path_factory.mktemp("toy")
    T.toy_pairs(root/"data", 5)
    return root


@pytest.fixture(scope="module")
def data(toy): return T.prepare_pairs(toy/"data", T.make_settings(**TINY), toy/"cache")


@pytest.fixture(scope="module")
def run(toy, data):
    model = T.train_translator(data, toy/"run", split={"train": data.subjects[:3], "val": data.subjects[3:4], "test": data.subjects[4:]}, **TINY)
    return toy/"run", model


# ---------------------------------------------------------------- data
def test_tensors_are_what_the_files_say(data):
    assert data.films.shape == (5, 26, 32, 32) and 0 <= data.films.min() and data.films.max() <= 1
    assert data.mels.shape == (5, 5, 64, 64) and torch.allclose(data.target, data.mels.float().mean(1))
    wave, _ = soundfile.read(data.pairs[2].audio, dtype="float32")
    cut = wave[(start := round(data.start_s*MEL.rate)):start + MEL.n_samples]
    assert np.array_equal(data.waves[2].numpy(), cut) and (mel_spectrogram(cut) - data.middle[2]).abs().max() < 1e-3
    assert data.words.tolist() == [int(p.word == "up") for p in data.pairs]


def test_cache_follows_file_and_settings(tmp_path):
    pair, = T.toy_pairs(tmp_path/"toy", 1)
    a = T.prepare_one(pair, 32, 3, tmp_path/"cache")
    assert len(list((tmp_path/"cache").iterdir())) == 1
    T.prepare_one(pair, 32, 4, tmp_path/"cache")
    frames, wave = T.toy_utterance(7, False)
    np.save(pair.movie, frames); soundfile.write(pair.audio, wave, MEL.rate)
    b = T.prepare_one(pair, 32, 3, tmp_path/"cache")
    assert len(list((tmp_path/"cache").iterdir())) == 3 and not np.array_equal(a["mels"], b["mels"])


@pytest.mark.parametrize("wave, message", [(np.zeros(22050), "silent"), (np.ones(4000), "0.18 s of sound")])
def test_bad_sound_is_refused(tmp_path, wave, message):
    pair, = T.toy_pairs(tmp_path/"toy", 1)
    soundfile.write(pair.audio, .5*wave, MEL.rate)
    with pytest.raises(ValueError, match=message): T.prepare_one(pair, 32, 3, tmp_path/"cache")


def test_long_and_short_sounds_are_noted(tmp_path):
    long, notes = T.fitted_sound(np.ones(60000, np.float32))
    assert len(long) == round(1.1*MEL.rate) and "only the first" in notes[0]
    short, notes = T.fitted_sound(np.ones(15000, np.float32))
    assert len(short) == MEL.n_samples and not short[15000:].any() and "silence was added" in notes[0]


def test_kinds_are_chosen(tmp_path):
    T.toy_pairs(tmp_path/"toy", 2)
    with pytest.raises(ValueError, match="no tagged movies, only cine"): T.prepare_pairs(tmp_path/"toy", T.make_settings(kind="tagged"), tmp_path)


def test_the_loader_depends_on_seed_and_epoch_alone(data):
    def take(seed, epoch):
        l = T.FilmLoader(data, range(5), 2, seed); l.set_epoch(epoch)
        return list(l)
    a, b = take(0, 3), take(0, 3)
    assert len(a) == 3 and all(torch.equal(x[k], y[k]) for x, y in zip(a, b) for k in x)
    assert min(len(x["word"]) for x in a) >= 1 and sum(len(x["word"]) for x in a) == 5
    assert not torch.equal(a[0]["eps"], take(0, 4)[0]["eps"]) and not torch.equal(a[0]["eps"], take(1, 3)[0]["eps"])
    with pytest.raises(ValueError, match="at least 2"): T.FilmLoader(data, [0])


# ---------------------------------------------------------------- losses
def batch_of(data): return next(iter(T.FilmLoader(data, range(5), 5)))


def test_each_network_follows_its_own_loss(data):
    game, _ = T.new_game("ours", data, torch.arange(5), T.make_settings(**{**TINY, "kind": "tagged", "lam": 1000.}))
    out = T.game_loss(game.train(), batch := batch_of(data))
    out["loss"].backward()
    parts = game(batch)
    assert abs(out["loss"].item() - parts["total"].item()) < 1e-2 and parts["kl"] > 0
    got, seen = {n: p.grad for n, p in game.named_parameters()}, set()
    for name, loss in {"translator": parts["total"], "attention": parts["rec"], "discriminator": parts["dis"]}.items():
        mine = {n: p for n, p in game.named_parameters() if T.network_of(n) == name}
        for (n, p), g in zip(mine.items(), torch.autograd.grad(loss, list(mine.values()), retain_graph=True)): assert torch.allclose(got[n], g, atol=1e-6), n
        seen |= set(mine)
    assert seen == set(got)
    attention = [p for n, p in game.named_parameters() if T.network_of(n) == "attention"]
    other = torch.autograd.grad(parts["total"], attention, retain_graph=True)
    assert max(((a - p.grad).abs().max()/p.grad.abs().max()).item() for a, p in zip(other, attention) if p.grad.any()) > .05     # eq. 5 makes a difference


@pytest.mark.parametrize("row, has", [("ours", (True, True, True)), ("no-attention", (False, True, True)), ("no-disentangling", (True, False, True)), ("no-gan", (True, True, False)), ("plain", (False, False, False))])
def test_rows_take_away_what_they_say(data, row, has):
    game, _ = T.new_game(row, data, torch.arange(5), T.make_settings(**{**TINY, "kind": "tagged"}))
    t = game.translator
    assert (t.attention is not None, t.config.sample and game.beta > 0, game.discriminator is not None) == has
    parts = game.train()(batch_of(data))
    assert (parts["kl"] > 0) == has[1] and (parts["dis"] > 0) == has[2] and (parts["fool"] > 0) == has[2]


def test_cine_has_no_attention_row(data):
    assert T.rows_of("cine") == [r for r in T.ROWS if r != "no-attention"] and T.rows_of("tagged") == list(T.ROWS)
    game, _ = T.new_game("ours", data, torch.arange(5), T.make_settings(**TINY))
    assert game.translator.attention is None
    with pytest.raises(ValueError, match="no row 'no-attention'"): T.rows_of("cine", ["no-attention"])


def test_flat_starts_are_thrown_away(data, monkeypatch):
    real, made = T.CineTranslator, []
    def build(config):
        m = real(config)
        if len(made) < 2: torch.nn.init.zeros_(m.decoder.deconvs[-1].weight)
        made.append(m)
        return m
    monkeypatch.setattr(T, "CineTranslator", build)
    assert T.new_game("plain", data, torch.arange(5), T.make_settings(**TINY))[1] == 2


# ---------------------------------------------------------------- one run
def test_a_run_leaves_a_model_and_its_papers(run, data):
    folder, model = run
    again = T.load_translator(folder)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    assert len(json.loads((folder/"curves.json").read_text())["history"]) == 2
    facts = json.loads((folder/"settings.json").read_text())
    assert facts["row"] == "ours" and facts["words"] == ["down", "up"] and facts["n_train"] == 3 and facts["start_s"] == data.start_s
    assert json.loads((folder/"split.json").read_text())["test"] == data.subjects[4:]


def test_killed_and_resumed_is_the_same_bit_for_bit(toy, data, run, monkeypatch):
    real = T.run_epoch
    def die(r, *a):
        if len(r.history) == 1: raise KeyboardInterrupt
        return real(r, *a)
    go = lambda resume: T.train_translator(data, toy/"killed", split=json.loads((run[0]/"split.json").read_text()), resume=resume, **TINY)
    monkeypatch.setattr(T, "run_epoch", die)
    with pytest.raises(KeyboardInterrupt): go(False)
    monkeypatch.setattr(T, "run_epoch", real)
    assert all(torch.equal(a, b) for a, b in zip(run[1].state_dict().values(), go(True).state_dict().values()))
    with pytest.raises(ValueError, match="was begun with"): T.train_translator(data, toy/"killed", split=json.loads((run[0]/"split.json").read_text()), resume=True, **{**TINY, "beta": .1})


def test_two_processes_train_one_model(toy, data, tmp_path):
    "torchrun (what accelerate launch uses): gradients are averaged, and both processes end with the same weights."
    script = tmp_path/"two.py"
    script.write_text(textwrap.dedent(f"""
        import torch, torch.distributed as dist
        from accelerate import PartialState
        from sirem_nb.translate.train import train_translator
        torch.set_num_threads(1)
        state = PartialState(cpu=True)
        split = dict(train=["sub001", "sub002", "sub003", "sub004"], val=[], test=["sub005"])
        model = train_translator({str(toy/"data")!r}, {str(tmp_path/"run")!r}, split=split, cache={str(toy/"cache")!r}, **{{**{TINY!r}, "batch_size": 2}})
        total = torch.stack([p.double().sum() for p in model.parameters()]).sum()
        both = [torch.zeros_like(total) for _ in range(2)]; dist.all_gather(both, total)
        assert dist.get_world_size() == 2 and both[0] == both[1]
        if state.is_main_process: print("SAME", flush=True)
        dist.barrier()
        dist.destroy_process_group()
    """))
    r = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)], capture_output=True, text=True, timeout=240)
    assert r.returncode == 0 and "SAME" in r.stdout, r.stderr[-2000:]


# ---------------------------------------------------------------- folds
def mels_of(path): return torch.tensor(json.loads(path.read_text())["predictions"][0]["mel"])


def test_stacked_folds_are_the_folds(toy, data):
    kw = {**TINY, "kind": "tagged", "lr": 1e-2, "epochs": 4}
    alone = F.leave_one_out(data, toy/"alone", ["ours"], (0,), "0:3", 1, **kw)
    stacked = F.leave_one_out(data, toy/"stacked", ["ours"], (0,), "0:3", 3, **kw)
    assert [p.name for p in alone] == [p.name for p in stacked] == [f"ours-seed0-sub{i:03d}.json" for i in (1, 2, 3)]
    for a, b in zip(alone, stacked): assert (mels_of(a) - mels_of(b)).abs().max() < 2e-3
    moved = (mels_of(alone[0]) - mels_of(alone[1])).abs().max()
    assert moved > 2e-2                                                       # and they are not all the same


def test_folds_are_done_once_and_by_anybody(toy, data):
    files = F.leave_one_out(toy/"data", toy/"spread", "plain", (0,), "0:2", cache=toy/"cache", map=ThreadPoolExecutor(1).map, **TINY)
    assert [f.exists() for f in files] == [True, True]
    before = files[0].read_bytes()
    files[1].unlink()
    again = F.leave_one_out(data, toy/"spread", "plain", (0,), [0, 1, 2], **TINY)
    assert again[0].read_bytes() == before and len(list((toy/"spread"/"folds").glob("*.json"))) == 3
    with pytest.raises(ValueError, match="other settings"): F.leave_one_out(data, toy/"spread", "plain", (0,), [0], **{**TINY, "epochs": 3})


def test_nobody_is_tested_on_what_was_learned(data):
    for fold in range(5):
        learn, test = F.training_of(data, fold, T.make_settings(**TINY, n_train=3))
        who = {data.pairs[i].subject for i in learn.tolist()}
        assert len(who) == 3 and {data.pairs[i].subject for i in test.tolist()} == {data.subjects[fold]} and data.subjects[fold] not in who
        for row in ("mean-spectrogram", "mean-of-word"):
            same = learn if row == "mean-spectrogram" else learn[data.words[learn] == data.words[test[0]]]
            guess = F.controls_of(data, fold, T.make_settings(**TINY, n_train=3))[row].get(test[0].item())
            assert (guess is None) == (len(same) == 0) and (guess is None or torch.allclose(guess, data.target[same].mean(0)))


def test_lip2audspec_goes_the_same_way(toy, data):
    path, = F.leave_one_out(data, toy/"lips", "lip2audspec", (0,), [4], together=3, **{**TINY, "epochs": 1})
    r = json.loads(path.read_text())
    assert torch.isfinite(mels_of(path)).all() and r["curve"][0]["rec"] < 3 and "word_use" not in r


def test_table_has_rows_controls_and_a_verdict(toy, data):
    records = F.ablation_table(data, toy/"table", rows="plain,no-gan", folds=[0, 1, 2], seeds=(0, 1), waves=False, **TINY)
    mean = {(r["method"], r["metric"]): r for r in records if r["table"] == "translate-mean"}
    assert {m for m, _ in mean} == {"plain", "no-gan", *F.CONTROLS}
    one = [r["value"] for r in records if r["table"] == "translate" and (r["method"], r["metric"]) == ("plain", "l1")]
    assert len(one) == 6 and abs(mean["plain", "l1"]["value"] - np.mean(one)) < 1e-9 and mean["plain", "l1"]["n_seeds"] == 2 and mean["plain", "l1"]["std"] > 0
    assert mean["true-mel", "l1"]["value"] == 0 and mean["true-mel", "corr2d"]["value"] > 1 - 1e-5
    text, meta = (toy/"table"/"translate.md").read_text(), json.loads((toy/"table"/"translate.meta.json").read_text())
    assert text.startswith("SMOKE RUN") and any("mean-spectrogram" in l for l in meta["verdict"])
    with pytest.raises(FileNotFoundError, match="no folds"): F.evaluate_folds(toy/"data", data)


def fake(method, values): return [{"table": "translate", "kind": "cine", "method": method, "seed": 0, "recording": f"r{i}", "metric": "l1", "unit": "", "value": v} for i, v in enumerate(values)]


def test_the_verdict_knows_noise_from_gain():
    better = fake("ours", [.1, .11, .12, .1]) + fake("mean-of-word", [.2, .2, .21, .19])
    assert F.beats(better, "ours", "mean-of-word")[0] == pytest.approx(.0925) and "ours beats mean-of-word" in F.translate_verdict(better)[0]
    worse = fake("ours", [.3, .31, .3, .32]) + fake("mean-of-word", [.2, .2, .21, .19])
    assert "loses to" in F.translate_verdict(worse)[0] and "learned the word and not the speech" in F.translate_verdict(worse)[-1]
    assert "not even the word" in F.translate_verdict(worse + fake("mean-spectrogram", [.25, .26, .25, .25]))[-1]
    noise = fake("ours", [.1, .3, .1, .3]) + fake("mean-of-word", [.2, .2, .21, .19])
    assert "cannot be told apart" in F.translate_verdict(noise)[0]


def test_silence_has_a_stated_outcome(data):
    records = F.speech_records(F.score_guess(torch.zeros(64, 64), data, 0), method="x")
    by = {r["metric"]: r for r in records}
    for metric in ("corr2d", "pesq_wb", "stoi"):
        if metric in by: assert by[metric]["value"] is None and by[metric]["note"]


@pytest.mark.parametrize("folds, want", [(None, [0, 1, 2, 3, 4]), ("1:3", [1, 2]), (":2", [0, 1]), ("3:", [3, 4]), (2, [2]), ([0, 4], [0, 4])])
def test_folds_are_named(folds, want): assert F.chosen_folds(folds, 5) == want


@pytest.mark.parametrize("folds", ["1-3", "7:9", [5], [-1]])
def test_folds_that_are_not_there(folds):
    with pytest.raises(ValueError): F.chosen_folds(folds, 5)


# ---------------------------------------------------------------- use
def test_a_film_becomes_a_sound(run, tmp_path):
    frames, _ = T.toy_utterance(3, True)
    about = translate(frames, run[0], tmp_path/"deep"/"x.wav", fps=26)
    wave, rate = soundfile.read(tmp_path/"deep"/"x.wav")
    assert rate == MEL.rate and len(wave) == round(about["seconds"]*rate) and np.abs(wave).max() > .4 and (tmp_path/"deep"/"x.png").stat().st_size > 1000
    saved = json.loads((tmp_path/"deep"/"x.json").read_text())
    assert saved == json.loads(json.dumps(about)) and saved["words"] == ["down", "up"] and saved["notes"] == []
    mel, _, _, _ = film_to_mel(frames, 26., run[1], late_s=saved["windows_start_s"][0] + json.loads((run[0]/"settings.json").read_text())["start_s"])
    assert np.abs(np.array(saved["mel"]) - mel.numpy()).max() < 1e-3
    with torch.no_grad(): direct = run[1](torch.as_tensor(frames)[None])["mel"][0]
    shift = mel.shape[1] - 64
    assert (mel[:, shift:] - direct).abs().max() < 1e-2                          # one window: the model's own picture, a little later


def test_long_films_are_joined(run):
    frames = torch.rand(100, 40, 48, generator=torch.Generator().manual_seed(0))
    mel, s, notes, start = film_to_mel(frames, 20., run[1])
    assert len(start) > 7 and abs(s.n_samples/s.rate - 5) < .1 and mel.shape[1] == s.n_frames and len(notes) == 2 and not any("were taken" in n for n in notes)


@pytest.mark.parametrize("frames, fps, message", [(torch.rand(1, 32, 32), 26, "single frame"), (torch.full((26, 32, 32), torch.nan), 26, "not numbers"), (torch.rand(9, 32, 32), 26, "half of it"),
                                                  (torch.zeros(26, 32, 32), 26, "nothing to see"), (torch.rand(26, 32), 26, "shape"), (torch.rand(26, 32, 32), .1, "frames a second")])
def test_what_is_not_a_film_is_refused(run, tmp_path, frames, fps, message):
    with pytest.raises(ValueError, match=message): translate(frames, run[0], tmp_path/"x.wav", fps=fps)
    assert not (tmp_path/"x.wav").exists()


# ---------------------------------------------------------------- what is shipped
@pytest.mark.parametrize("kind", ["cine", "tagged"])
def test_shipped_checkpoints_work(kind, tmp_path):
    from pathlib import Path
    folder = Path(__file__).resolve().parents[1]/"checkpoints"/f"translate-{kind}"
    model = T.load_translator(folder)
    assert model.config.attention == (kind == "tagged") and .6e6 < sum(p.numel() for p in model.parameters()) < .75e6
    about = translate(torch.rand(26, 64, 64, generator=torch.Generator().manual_seed(0)), folder, tmp_path/"x.wav", fps=26)
    assert about["kind"] == kind and about["words"] == ["ageese", "asouk"] and not set(json.loads((folder/"split.json").read_text())["test"]) & set(json.loads((folder/"split.json").read_text())["train"])
