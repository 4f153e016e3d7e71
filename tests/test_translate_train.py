"Training the translators: data to tensors, three losses for three networks, resuming, folds (alone, stacked, spread), controls, and a film to a sound."
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from sirem_nb.cli import main
from sirem_nb.data.movies import find_pairs, fit_movie
from sirem_nb.data.sync import write_movie
from sirem_nb.learning import training
from sirem_nb.translate import folds as F
from sirem_nb.translate import train as T
from sirem_nb.translate.mel import MEL, mel_spectrogram
from sirem_nb.translate.use import film_to_mel, translate

TINY = dict(matrix=32, channels=(4, 4, 8, 8, 32), n_crops=5, epochs=2, batch_size=3, audio_steps=3)
TYPED = [a for k, v in TINY.items() if k not in ("matrix", "epochs") for a in ("--set", f"{k}={json.dumps(v)}")] + ["--matrix", "32", "--epochs", "2", "--device", "cpu"]
BIN = Path(sys.executable).parent


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


# ---------------------------------------------------------------- long recordings
def running_speech(home, name="ann_story", words=8, quiet=()):
    "Toy words in a row, as one movie with its sound; some of them said without a voice."
    home.mkdir(parents=True, exist_ok=True)
    said = [T.toy_utterance(i % 5, i % 2 == 0) for i in range(words)]
    frames, wave = np.concatenate([f for f, _ in said]), np.concatenate([w[:MEL.rate]*(i not in quiet) for i, (_, w) in enumerate(said)])
    np.save(home/f"{name}.npy", frames); (home/f"{name}.json").write_text('{"fps": 26}'); soundfile.write(home/f"{name}.wav", wave, MEL.rate)
    return frames, soundfile.read(home/f"{name}.wav", dtype="float32")[0]


def test_long_recordings_become_examples(tmp_path):
    frames, wave = running_speech(tmp_path/"d"/"cine", quiet=(4, 5))
    d = T.prepare_pairs(tmp_path/"d", T.make_settings(**TINY), tmp_path/"c")
    starts = [p.start_s for p in d.pairs]
    assert starts == [0, .5, 1, 1.5, 2, 2.5, 3, 3.5, 5.5, 6, 6.5, 7] and d.pairs[3].name == "ann_story@1.50"      # two of the pieces were pauses
    assert d.notes["ann_story"][-1] == "8.00 s of film: cut into 15 pieces, of which 3 are pauses and left out"
    whole, _ = fit_movie(frames, 26., matrix=32)
    for i, s in enumerate(starts):
        assert (d.films[i] - whole[round(26*s):][:26]).abs().max() < 1e-3
        begin = round(s*MEL.rate)
        loud = max(0, int(d.waves[i].abs().argmax()) - 20)
        at = next(k for k in range(1200) if np.array_equal(wave[begin + k + loud:][:40], d.waves[i, loud:loud + 40].numpy()))      # the middle crop: sound of the same second
        assert np.array_equal(wave[begin + at:][:MEL.n_samples], d.waves[i].numpy()) and abs(at/MEL.rate - d.start_s) < .03
    assert d.subjects == ["ann"] and len(set(d.words.tolist())) == len(d)                       # nobody knows which word a piece holds
    again = T.prepare_pairs(tmp_path/"d", T.make_settings(**TINY), tmp_path/"c")                # from the cache
    assert [p.name for p in again.pairs] == [p.name for p in d.pairs] and torch.equal(again.films, d.films) and torch.equal(again.mels, d.mels)
    wide = T.prepare_pairs(tmp_path/"d", T.make_settings(**TINY, hop=26), tmp_path/"c")
    assert [p.start_s for p in wide.pairs] == [0, 1, 2, 3, 6, 7]


def test_long_and_short_recordings_train_together_and_a_person_stays_one(toy, tmp_path):
    for who in ("ann", "bob"): running_speech(tmp_path/"d"/"cine", f"{who}_story", 4)
    for i in range(2):
        for e in ("npy", "json", "wav"): (tmp_path/"d"/"cine"/f"sub00{i + 1}_word.{e}").write_bytes(next((toy/"data").glob(f"sub00{i + 1}/cine/*.{e}")).read_bytes())
    assert main(["train", "translate", str(tmp_path/"d"), "--out", str(tmp_path/"r"), "--cache", str(tmp_path/"c"), *TYPED]) == 0
    split, facts = json.loads((tmp_path/"r"/"split.json").read_text()), json.loads((tmp_path/"r"/"settings.json").read_text())
    assert sorted(sum(split.values(), [])) == ["ann", "bob", "sub001", "sub002"] and facts["n_train"] == sum(7 if s in ("ann", "bob") else 1 for s in split["train"])
    path, = F.leave_one_out(tmp_path/"d", tmp_path/"loo", "plain", (0,), [0], cache=tmp_path/"c", **TINY)
    r = json.loads(path.read_text())
    assert [p["recording"] for p in r["predictions"]] == [f"ann_story@{s:.2f}" for s in np.arange(0, 3.1, .5)] and "ann" not in r["train"]
    records = F.evaluate_folds(tmp_path/"loo", tmp_path/"d", tmp_path/"c", waves=False)
    assert not [x for x in records if x["method"] == "mean-of-word"] and [x for x in records if x["method"] == "mean-spectrogram"]     # of a piece there is no word to average
    with pytest.raises(ValueError, match="cannot be stacked"): F.leave_one_out(tmp_path/"d", tmp_path/"st", "plain", (0,), [0, 2], 2, cache=tmp_path/"c", **TINY)


def test_long_films_cost_memory_once():
    "Windows are views: a film of some minutes is held a few times (stored, at its rate, scaled), not once more for each window."
    code = """
        import resource, torch
        from types import SimpleNamespace
        from sirem_nb.translate.use import film_to_mel
        class Painter(torch.nn.Linear):                      # as quick as a model can be
            config = SimpleNamespace(n_frames=26, matrix=64)
            def forward(self, x): return {"mel": x.mean((1, 2, 3))[:, None, None].expand(-1, 64, 64)}
        for n in (130, 4030):
            film = torch.rand(n, 64, 64, generator=torch.Generator().manual_seed(0))
            film_to_mel(film, 26., Painter(1, 1), hop=3)
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024)
    """
    peak = [int(v) for v in subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True).stdout.split()]
    held = 3900*64*64*4
    assert peak[1] - peak[0] < 6*held, [p/1e6 for p in peak]                   # copies of the windows alone would be 9 of these


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
    every = [r for r in T.ROWS if r != "keep-time"]                          # ours alone: not a row of the papers
    assert T.rows_of("cine") == [r for r in every if r != "no-attention"] and T.rows_of("tagged") == every
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
    real = training.run_epoch
    def die(r, *a):
        if len(r.history) == 1: raise KeyboardInterrupt
        return real(r, *a)
    go = lambda resume: T.train_translator(data, toy/"killed", split=json.loads((run[0]/"split.json").read_text()), resume=resume, **TINY)
    monkeypatch.setattr(training, "run_epoch", die)
    with pytest.raises(KeyboardInterrupt): go(False)
    monkeypatch.setattr(training, "run_epoch", real)
    assert all(torch.equal(a, b) for a, b in zip(run[1].state_dict().values(), go(True).state_dict().values()))
    with pytest.raises(ValueError, match="was begun with"): T.train_translator(data, toy/"killed", split=json.loads((run[0]/"split.json").read_text()), resume=True, **{**TINY, "beta": .1})


def test_two_processes_train_one_model(toy, data, two_processes, tmp_path):
    "torchrun (what accelerate launch uses): gradients are averaged, and both processes end with the same weights."
    split = dict(train=["sub001", "sub002", "sub003", "sub004"], val=[], test=["sub005"])
    two_processes("sirem_nb.translate.train", f"train_translator({str(toy/'data')!r}, {str(tmp_path/'run')!r}, split={split!r}, cache={str(toy/'cache')!r}, **{TINY | {'batch_size': 2}!r})", timeout=240)


def test_accelerate_launch_of_the_command_is_one_process_with_twice_the_batch(toy, tmp_path):
    (tmp_path/"split.json").write_text(json.dumps(dict(train=["sub001", "sub002", "sub003", "sub004"], val=[], test=["sub005"])))
    argv = ["train", "translate", toy/"data", "--row", "plain", "--split", tmp_path/"split.json", "--cache", toy/"cache", *TYPED]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launch = [BIN/"accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    two = subprocess.run([*launch, BIN/"sirem", *argv, "--out", tmp_path/"two", "--set", "batch_size=2"], env=env, capture_output=True, text=True, timeout=300)
    assert two.returncode == 0 and two.stdout.count("wrote") == 1, two.stderr[-2000:]
    assert main([str(a) for a in [*argv, "--out", tmp_path/"one", "--set", "batch_size=4"]]) == 0
    s = T.make_settings(**TINY)
    fresh = T.new_game("plain", T.prepare_pairs(toy/"data", s, toy/"cache"), torch.arange(2), s)[0].translator.state_dict()
    a, b = (T.load_translator(tmp_path/k).state_dict() for k in ("one", "two"))
    assert all(torch.allclose(a[k], b[k], atol=2e-5) for k in a) and max((a[k] - fresh[k]).abs().max() for k in a) > 1e-3


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


def no_clock(path): return {k: v for k, v in json.loads(path.read_text()).items() if k != "seconds"}


def test_folds_killed_and_started_again_give_the_same_files(toy, tmp_path):
    "The command is killed outright when its first file is there, and typed again; and a stack of which one file is missing is trained again as a stack."
    argv = ["train", "translate", str(toy/"data"), "--leave-one-out", "--rows", "ours,plain", "--seeds", "0", "--folds", "0:4", "--together", "2", "--cache", str(toy/"cache"), *TYPED]
    assert main([*argv, "--out", str(tmp_path/"whole")]) == 0
    whole = {p.name: no_clock(p) for p in (tmp_path/"whole"/"folds").glob("*.json")}
    p = subprocess.Popen([BIN/"sirem", *argv, "--out", str(tmp_path/"killed")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())})
    limit = time.time() + 200
    while time.time() < limit and not list((tmp_path/"killed").glob("folds/*.json")): time.sleep(.01)
    p.send_signal(signal.SIGKILL); p.wait()
    there = list((tmp_path/"killed").glob("folds/*.json"))
    assert 0 < len(there) < 8, "killed too late or too early to show anything"
    assert main([*argv, "--out", str(tmp_path/"killed")]) == 0
    assert {p.name: no_clock(p) for p in (tmp_path/"killed"/"folds").glob("*.json")} == whole and len(whole) == 8
    kept = (tmp_path/"whole"/"folds"/"ours-seed0-sub001.json").read_bytes()
    (tmp_path/"whole"/"folds"/"ours-seed0-sub002.json").unlink()
    assert main([*argv, "--out", str(tmp_path/"whole")]) == 0
    assert {p.name: no_clock(p) for p in (tmp_path/"whole"/"folds").glob("*.json")} == whole and (tmp_path/"whole"/"folds"/"ours-seed0-sub001.json").read_bytes() == kept


def test_machines_share_the_folds(toy, tmp_path):
    "Each machine its own --folds; two processes of this one; a dask cluster at an address: the same files as from one process."
    pytest.importorskip("dask.distributed", reason="dask is not installed: pip install 'sirem-nb[cluster]'")
    from dask.distributed import LocalCluster
    argv = ["train", "translate", str(toy/"data"), "--leave-one-out", "--rows", "plain", "--seeds", "0", "--cache", str(toy/"cache"), *TYPED]
    go = lambda name, *more: main([*argv, "--out", str(tmp_path/name), *more])
    read = lambda name: {p.name: no_clock(p) for p in (tmp_path/name/"folds").glob("*.json")}
    assert go("one", "--folds", "0:3") == 0 and go("hand", "--folds", "0:1") == go("hand", "--folds", "1:3") == 0
    assert read("one") == read("hand") and len(read("one")) == 3
    assert go("two", "--folds", "0:3", "--workers", "2") == 0
    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as cluster: assert go("dask", "--folds", "0:3", "--scheduler", cluster.scheduler_address) == 0
    for name in ("two", "dask"):
        assert read(name).keys() == read("one").keys()
        for k, r in read(name).items(): assert np.abs(np.array(r["predictions"][0]["mel"]) - np.array(read("one")[k]["predictions"][0]["mel"])).max() < 2e-3      # other threads, other rounding


def test_nobody_answers(toy, tmp_path, capsys):
    pytest.importorskip("dask.distributed", reason="dask is not installed: pip install 'sirem-nb[cluster]'")
    import socket
    from sirem_nb.learning.cluster import job_map
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    with pytest.raises(ValueError, match="no dask scheduler answers"):
        with job_map(scheduler=f"tcp://127.0.0.1:{port}", timeout=2): pass


def test_folds_are_done_once_and_by_anybody(toy, data):
    files = F.leave_one_out(toy/"data", toy/"spread", "plain", (0,), "0:2", cache=toy/"cache", map=ThreadPoolExecutor(1).map, **TINY)
    assert [f.exists() for f in files] == [True, True]
    before = files[0].read_bytes()
    files[1].unlink()
    again = F.leave_one_out(data, toy/"spread", "plain", (0,), [0, 1, 2], **TINY)
    assert again[0].read_bytes() == before and len(list((toy/"spread"/"folds").glob("*.json"))) == 3
    for f in files: f.write_text(json.dumps({**(r := json.loads(f.read_text())), "settings": {k: v for k, v in r["settings"].items() if k != "hop"}}))     # written before there was this setting
    assert F.leave_one_out(data, toy/"spread", "plain", (0,), [0, 1], **TINY) == files
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
    one = F.translate_verdict(fake("ours", [.3]) + fake("mean-of-word", [.2]))
    assert len(one) == 1 and "one recording, which decides nothing" in one[0]
    noise = fake("ours", [.1, .3, .1, .3]) + fake("mean-of-word", [.2, .2, .21, .19])
    assert "cannot be told apart" in F.translate_verdict(noise)[0]


def test_evaluate_knows_a_translator_and_all_its_folds(run, toy, tmp_path, capsys):
    assert main(["evaluate", str(toy/"data"), "--run", str(run[0]), "--out", str(tmp_path/"t"), "--cache", str(toy/"cache")]) == 0
    records, text = json.loads((tmp_path/"t"/"translate.json").read_text()), (tmp_path/"t"/"translate.md").read_text()
    assert {r["subject"] for r in records if r["table"] == "translate"} == {"sub005"} and {r["method"] for r in records} == {"ours", *F.CONTROLS} and "| ours |" in text and "one recording" in text
    assert (tmp_path/"t"/"translate.png").stat().st_size > 5000
    mel = torch.as_tensor(T.prepare_pairs(toy/"data", T.make_settings(**TINY), toy/"cache").films[4:])
    with torch.no_grad(): want = float((T.load_translator(run[0])(mel)["mel"] - T.prepare_pairs(toy/"data", T.make_settings(**TINY), toy/"cache").middle[4:]).abs().mean())
    assert next(r["value"] for r in records if r["table"] == "translate" and (r["method"], r["metric"]) == ("ours", "l1")) == pytest.approx(want, rel=1e-4)
    assert main(["evaluate", str(toy/"data"), "--run", str(run[0]/"best"), "--out", str(tmp_path/"b"), "--tables", "translate", "--part", "val", "--cache", str(toy/"cache")]) == 0
    assert {r["subject"] for r in json.loads((tmp_path/"b"/"translate.json").read_text()) if r["table"] == "translate"} == {"sub004"}
    F.leave_one_out(toy/"data", tmp_path/"loo", "plain", (0,), "1:3", cache=toy/"cache", **TINY)
    assert main(["evaluate", str(toy/"data"), "--run", str(tmp_path/"loo"), "--out", str(tmp_path/"l"), "--cache", str(toy/"cache")]) == 0
    assert {r["subject"] for r in json.loads((tmp_path/"l"/"translate.json").read_text()) if r["table"] == "translate"} == {"sub002", "sub003"} and not (tmp_path/"loo"/"translate.json").exists()
    assert (tmp_path/"l"/"translate.md").read_text().startswith("SMOKE RUN") and (tmp_path/"l"/"translate.png").exists()
    capsys.readouterr()
    for table, said in (("fusion", "a run of sirem train translate"), ("paper", "a run of sirem train translate")):
        assert main(["evaluate", str(toy/"data"), "--run", str(run[0]), "--out", str(tmp_path/"x"), "--tables", table]) == 2
        assert said in capsys.readouterr().err and not (tmp_path/"x").exists()
    assert main(["evaluate", str(toy/"data"), "--out", str(tmp_path/"x"), "--tables", "translate"]) == 2 and "sirem train translate" in capsys.readouterr().err


def test_strangers_are_judged_too(run, tmp_path):
    "Data of people whom the run has never met: all of them are judged, each beside guesses from the others."
    T.toy_pairs(tmp_path/"d", 3)
    for p in sorted((tmp_path/"d").rglob("sub0*.*")): p.rename(p.with_name(p.name.replace("sub0", "new")))
    films = T.prepare_pairs(tmp_path/"d", T.make_settings(**TINY), tmp_path/"c")
    records = [r for r in F.score_translator(films, run[0], tmp_path/"t", waves=False) if r["table"] == "translate"]
    assert {r["subject"] for r in records} == {"new01", "new02", "new03"} and "3 speaker(s) of other data" in (tmp_path/"t"/"translate.md").read_text()
    guess = next(r["value"] for r in records if (r["method"], r["subject"], r["metric"]) == ("mean-spectrogram", "new02", "l1"))
    assert guess == pytest.approx(float((films.target[[0, 2]].mean(0) - films.middle[1]).abs().mean()), rel=1e-4)
    one = T.prepare_pairs([films.pairs[0]], T.make_settings(**TINY), tmp_path/"c")
    assert {r["method"] for r in F.score_translator(one, run[0], waves=False)} == {"ours", "true-mel"}


def test_word_error_rate_is_there_where_a_recogniser_is(run, toy, tmp_path, data):
    heard = lambda wave, rate: "up"                                            # hears one word, whatever is said
    records = F.score_translator(data, run[0], tmp_path/"t", recogniser=heard)
    word = data.pairs[4].word
    assert {r["value"] for r in records if r["metric"] == "wer" and r["table"] == "translate"} == {float(word != "up")}
    assert "wer" in (tmp_path/"t"/"translate.md").read_text()


def test_the_table_by_one_command(toy, tmp_path):
    assert main(["train", "translate", str(toy/"data"), "--ablation", "--kind", "cine", "--out", str(tmp_path/"t"), "--cache", str(toy/"cache"), *TYPED]) == 0
    meta, records = (json.loads((tmp_path/"t"/f"translate{e}").read_text()) for e in (".meta.json", ".json"))
    assert {r["method"] for r in records} == {*T.rows_of("cine"), *F.CONTROLS} and (tmp_path/"t"/"translate.md").read_text().startswith("SMOKE RUN")
    assert meta["command"].startswith("sirem train translate DATA --kind cine --ablation --out OUT") and meta["folds"] == [0, 2, 4] and meta["seeds"] == [0] and meta["seconds"] > 0 and meta["date"][:2] == "20" and "cores" in meta["machine"]
    assert meta["settings"]["lr"] == F.SMOKE["lr"] and meta["settings"]["matrix"] == 32                  # what is typed goes before what is small


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


# ---------------------------------------------------------------- bad input, as it is typed
@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    "A folder of movies that are none, and of data sets with one thing wrong in each."
    d = tmp_path_factory.mktemp("bad"); film, wave = T.toy_utterance(0, True)
    nan = film.copy(); nan[3, 4, 4] = np.nan
    for name, x in dict(good=film, nan=nan, one=film[:1], short=film[:9], flat=0*film, colour=np.zeros((26, 8, 8, 3)), tiny=film[:, :4, :4]).items(): np.save(d/f"{name}.npy", x)
    (d/"text.mp4").write_text("no movie"); (d/"empty.mp4").write_bytes(b""); (d/"text.h5").write_text("no hdf5")
    write_movie(d/"long.mp4", np.kron(np.tile(film, (4, 1, 1)), np.ones((1, 4, 4), np.float32)), 26, wave, MEL.rate, scale=1)
    whole = (d/"long.mp4").read_bytes(); (d/"cut.mp4").write_bytes(whole[:len(whole)*2//3])
    def data(name, **files):
        home = d/name/"cine"; T.toy_pairs(d/name, 4)
        home.mkdir(exist_ok=True)
        for file, content in files.items():
            stem, kind = file.rsplit("_", 1); f = home/f"{stem}.{kind}"
            if kind == "npy": np.save(f, content)
            elif kind == "wav": soundfile.write(f, content, MEL.rate, subtype="FLOAT")
            else: f.write_bytes(content)
    data("silent", ann_up_npy=film, ann_up_wav=0*wave); data("mute", ann_up_npy=film); data("blind", ann_up_wav=wave)
    data("nanfilm", ann_up_npy=nan, ann_up_wav=wave); data("single", ann_up_npy=film[:1], ann_up_wav=wave); data("nansound", ann_up_npy=film, ann_up_wav=np.where(np.arange(len(wave)) == 99, np.nan, wave))
    data("brief", ann_up_npy=film, ann_up_wav=wave[:5000]); data("apart", ann_up_npy=np.tile(film, (20, 1, 1)), ann_up_wav=wave); data("nameless", ann_npy=film, ann_wav=wave)
    data("hush", ann_up_npy=np.tile(film, (4, 1, 1)), ann_up_wav=np.tile(0*wave, 4)); data("broken", ann_up_mp4=whole[:len(whole)*2//3], ann_up_wav=np.tile(wave, 4))
    T.toy_pairs(d/"few", 2); (d/"nothing").mkdir()
    return d


def said(argv, d, capsys):
    "The one line that a command leaves; and nothing written."
    before = {p for p in d.rglob("*")}
    status = main([a.format(d=d) for a in argv])
    lines = [l for l in capsys.readouterr().err.splitlines() if l.strip() and not l.startswith("sirem: note:")]
    assert status == 2 and len(lines) == 1 and lines[0].startswith("sirem: "), lines
    assert {p for p in d.rglob("*")} == before, "something was left behind"
    return lines[0]


@pytest.mark.parametrize("movie, more, message", [("nan.npy", [], "not numbers"), ("one.npy", [], "single frame"), ("short.npy", [], "half of it"), ("flat.npy", [], "nothing to see"), ("colour.npy", [], "grey frames"),
    ("tiny.npy", [], "at least 8 x 8"), ("text.mp4", [], "not a movie"), ("empty.mp4", [], "empty"), ("cut.mp4", [], "cut.mp4"), ("text.h5", [], ""), ("none.mp4", [], "no such movie"), ("nothing", [], "empty"),
    ("good.npy", ["--fps", "0"], "above 0"), ("good.npy", ["--fps", "9000"], "between 1 and 2000"), ("good.npy", ["--out", "{d}/o/x.mp3"], "wav"),
    ("good.npy", ["--checkpoint", "{d}/nothing"], "model.safetensors"), ("good.npy", ["--checkpoint", "{root}/checkpoints/sirem-13"], "another kind")])
def test_bad_movies_are_one_line(bad, root, movie, more, message, capsys):
    argv = ["translate", f"{{d}}/{movie}", "--checkpoint", f"{root}/checkpoints/translate-cine", "--out", "{d}/o/x.wav", "--device", "cpu"]
    assert message in said(argv + [m.replace("{root}", str(root)) for m in more], bad, capsys)


@pytest.mark.parametrize("data, message", [("silent", "silent"), ("hush", "silent"), ("mute", "a movie without a sound"), ("blind", "a sound without a movie"), ("nanfilm", "not numbers"), ("nansound", "not numbers"), ("single", "single frame"),
    ("brief", "0.23 s of sound"), ("apart", "do they belong together"), ("nameless", "who said what"), ("broken", "ann_up.mp4"), ("nothing", "pairs SUBJECT_WORD"), ("none", "no such folder"), ("few", "at least 3")])
def test_bad_data_is_one_line(bad, data, message, capsys, tmp_path):
    for more in ([], ["--leave-one-out"]):
        assert message in said(["train", "translate", f"{{d}}/{data}", "--out", "{d}/o", "--cache", str(tmp_path/"cache"), *TYPED, *more], bad, capsys)
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".npz"]


@pytest.mark.parametrize("more, message", [(["--kind", "film"], "expected cine, tagged"), (["--matrix", "100"], "expected 128, 64, 32"), (["--row", "magic"], "expected ours"), (["--row", "no-attention"], "expected ours"), (["--set", "magic=1"], "no setting"),
    (["--set", "lr"], "NAME=VALUE"), (["--epochs", "0"], "above 0"), (["--folds", "0:2"], "goes with --leave-one-out"), (["--leave-one-out", "--folds", "0-2"], "expected a:b"), (["--leave-one-out", "--seeds", "a"], "whole numbers"),
    (["--leave-one-out", "--rows", "magic"], "no row"), (["--leave-one-out", "--folds", "7:9"], "expected numbers from 0 to 4"), (["--set", "lr=fast"], "lr")])
def test_bad_wishes_are_one_line(toy, tmp_path, more, message, capsys):
    assert message in said(["train", "translate", str(toy/"data"), "--out", "{d}/o", "--cache", str(toy/"cache"), *TYPED, *more], tmp_path, capsys)


def test_other_sizes_and_rates_are_noted_and_done(bad, root, tmp_path, capsys):
    film, _ = T.toy_utterance(0, True)
    write_movie(tmp_path/"fast.mp4", np.kron(np.repeat(film, 2, 0), np.ones((1, 3, 4), np.float32)), 52, scale=1)
    assert main(["translate", str(tmp_path/"fast.mp4"), "--checkpoint", str(root/"checkpoints"/"translate-cine"), "--out", str(tmp_path/"x.wav"), "--device", "cpu"]) == 0
    told = capsys.readouterr().err
    assert "52 frames a second resampled to 26" in told and "96 x 128 pixels put on 64 x 64" in told and all(l.startswith("sirem: note:") for l in told.strip().splitlines())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fast.mp4", "x.json", "x.png", "x.wav"]


# ---------------------------------------------------------------- real recordings
@pytest.mark.parametrize("kind", ["cine", "tagged"])
def test_real_movies_are_translated(real_data, root, tmp_path, kind):
    "No claim about what is said: the checkpoints have seen virtual heads and two words. The times must be right, and every file whole."
    movies = sorted((real_data/"usc_timit").glob("*.avi"))[:1] + sorted((real_data/"usc_timit_m3_audio").glob("*.mp4"))[:1]
    if not movies: pytest.skip("no USC-TIMIT movies in shared/data")
    for m in movies:
        out = tmp_path/f"{m.stem}.wav"
        assert main(["translate", str(m), "--checkpoint", str(root/"checkpoints"/f"translate-{kind}"), "--out", str(out), "--device", "cpu"]) == 0
        wave, rate = soundfile.read(out); about = json.loads(out.with_suffix(".json").read_text())
        assert rate == 22050 and np.isfinite(wave).all() and np.abs(wave).max() > .1 and abs(len(wave)/rate - about["frames"]/about["fps"]) < .15
        assert about["fps"] == pytest.approx(23.18, abs=.01) and any("resampled to 26" in n for n in about["notes"]) and len(about["windows_start_s"]) > 1


def test_real_movies_are_training_pairs(real_data, tmp_path):
    home = real_data/"usc_timit_m3_audio"
    if not home.is_dir(): pytest.skip("no movies with sound in shared/data")
    d = T.prepare_pairs(home, T.make_settings(**TINY), tmp_path)
    assert len(d) > 3*len(find_pairs(home)) and d.subjects == ["usctimit"] and torch.isfinite(d.films).all() and torch.isfinite(d.mels.float()).all()
    assert (d.films[:, 1:] - d.films[:, :-1]).abs().mean() > .002 and d.middle.std((1, 2)).min() > .05            # it moves, and it sounds
    f = T.FilmLoader(d, range(len(d)), 4); game, _ = T.new_game("ours", d, torch.arange(len(d)), T.make_settings(**TINY))
    assert torch.isfinite(T.game_loss(game.train(), next(iter(f)))["loss"])


# ---------------------------------------------------------------- what is shipped
@pytest.mark.parametrize("kind", ["cine", "tagged"])
def test_shipped_checkpoints_work(kind, tmp_path):
    folder = Path(__file__).resolve().parents[1]/"checkpoints"/f"translate-{kind}"
    model = T.load_translator(folder)
    assert model.config.attention == (kind == "tagged") and .5e6 < sum(p.numel() for p in model.parameters()) < .75e6
    about = translate(torch.rand(26, 64, 64, generator=torch.Generator().manual_seed(0)), folder, tmp_path/"x.wav", fps=26)
    assert about["kind"] == kind and about["words"] == ["ageese", "asouk"] and not set(json.loads((folder/"split.json").read_text())["test"]) & set(json.loads((folder/"split.json").read_text())["train"])
