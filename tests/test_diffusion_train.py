"Notebooks 82, 86 and 87: the video network, its training, and the way from a sound file to a movie file."
import json
from dataclasses import replace

import imageio.v3 as iio
import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file

import sirem_nb.diffusion.train as T
import sirem_nb.diffusion.use as U
from sirem_nb.data.sync import read_movie
from sirem_nb.diffusion.condition import ClipLoader, three_splits
from sirem_nb.diffusion.noise import denoise
from sirem_nb.diffusion.unet3d import PAPER, SMALL, UNet3D
from sirem_nb.learning import training

TINY = dict(epochs=3, per_epoch=24, batch_size=6, warmup=2, val_every=1)


@pytest.fixture(scope="module")
def toys(): return T.toy_talks()

@pytest.fixture(scope="module")
def run(toys, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")/"run"
    return out, T.train_diffusion(toys, out, **TINY)

def awake(config, seed=0):
    "A network whose zero-initialised layers say something."
    torch.manual_seed(seed)
    net = UNet3D(config).eval()
    for p in net.parameters():
        if p.ndim > 1 and not p.any(): torch.nn.init.normal_(p, std=.05)
    return net

def curve(out): return json.loads((out/"curves.json").read_text())["history"]


# ---------------------------------------------------------------- the network
@pytest.mark.parametrize("config", [SMALL, replace(SMALL, pooled=True), replace(SMALL, reference=False, vector=False, paint=False, time=(1, 1, 1), speech=(1, 1, 1)), replace(PAPER, dim=8, heads=2)])
@torch.no_grad()
def test_network_shapes_and_conditions(config):
    net = awake(replace(config, size=16, cond_dim=6))
    x, c, f = torch.randn(2, 7, 1, 16, 16), torch.randn(2, 7), torch.randn(2, 7, 6)
    y = net(x, c, f)
    assert y.shape == x.shape and torch.isfinite(y).all()
    assert torch.allclose(net(x[:1], c[:1], f[:1]), y[:1], atol=1e-5)                             # clips do not mix
    assert not torch.allclose(net(x, c, f + 1), y, atol=1e-3)                                     # it listens
    d = net(x, c, f, torch.tensor([True, False]))
    assert torch.allclose(d[0], net(x, c)[0], atol=1e-5) and torch.allclose(d[1], y[1], atol=1e-5)
    c2 = c.clone(); c2[:, 6] += .1
    assert not torch.allclose(net(x, c2, f)[:, 6], y[:, 6], atol=1e-5)                            # each frame's own noise level
    assert net(x[:, :1], c[:, :1], f[:, :1]).shape == (2, 1, 1, 16, 16)


@torch.no_grad()
def test_pooling_forgets_the_order_and_time_keeps_it():
    x, c, f = torch.randn(1, 6, 1, 16, 16), torch.zeros(1, 6), torch.randn(1, 6, 6)
    for pooled in (True, False):
        net = awake(replace(SMALL, size=16, cond_dim=6, pooled=pooled))
        assert torch.allclose(net(x, c, f), net(x, c, f.flip(1)), atol=1e-4) == pooled


@torch.no_grad()
def test_causal_network_does_not_look_ahead():
    for causal in (True, False):
        c = replace(PAPER, size=16, dim=8, heads=2, cond_dim=6, mults=(1, 2), time=(1, 0), speech=(0, 0), mix=True, causal=causal)   # without the joint attention of the bottleneck
        net, x = awake(c), torch.randn(1, 6, 1, 16, 16)
        late = x.clone(); late[:, 4] += 1
        moved = (net(late, torch.zeros(1, 6)) - net(x, torch.zeros(1, 6))).abs().amax((0, 2, 3, 4))
        assert moved[4] > 1e-3 and (moved[:4].max() < 1e-6) == causal


@torch.no_grad()
def test_a_fresh_network_answers_with_the_best_guess_for_gaussians():
    "Pictures and motion with known spectra: the error of D is the posterior's, at every noise level; and the loss of a fresh network is 1."
    g = torch.Generator().manual_seed(0)
    k = torch.hypot(torch.fft.fftfreq(16)[:, None], torch.fft.rfftfreq(16)[None])
    picture, moved = .3/(1 + (10*k)**2)**2 + 1e-4, .02/(1 + (6*k)**2) + 1e-5
    colour = lambda n, power: torch.fft.irfft2(torch.fft.rfft2(torch.randn(n, 1, 1, 16, 16, generator=g), norm="ortho")*power.sqrt(), norm="ortho")
    r = colour(300, picture); x0 = torch.cat([r, r + colour(300, moved), r + colour(300, moved)], 1)
    c = replace(SMALL, size=16, edm=replace(SMALL.edm, sigma_data=x0.std().item()))
    net = UNet3D(c); net.guess.picture.copy_(picture); net.guess.moved.copy_(moved)
    for clean, s in ((.01, .05), (.01, .5), (.2, 2.), (.1, 30.)):
        sigma = torch.tensor([[clean, s, s]]).expand(300, 3)
        error = (denoise(net, x0 + sigma[..., None, None, None]*torch.randn(x0.shape, generator=g), sigma, c.edm) - x0)[:, 1:].square().mean()
        assert abs(error/net.guess.known_up_to(sigma**2)[2][0, 1] - 1) < .1
        loss = T.clip_loss(net, x0, sigma, torch.randn(x0.shape, generator=g), sigma == clean)
        assert abs(loss - 1) < .1


def test_network_survives_the_disk(tmp_path):
    net = awake(replace(SMALL, size=16, cond_dim=6)); net.speech.mean += 3; net.first_frame += .25; net.guess.moved *= 2
    back = UNet3D.from_pretrained(net.save_pretrained(tmp_path/"m"))
    assert back.config == net.config and all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), back.state_dict().values()))
    with pytest.raises(ValueError, match="expected .2, 3, 6."): back(torch.zeros(2, 3, 1, 16, 16), torch.zeros(2, 3), torch.zeros(2, 3, 7))
    with pytest.raises(ValueError, match="16, 16"): back(torch.zeros(2, 3, 1, 20, 20), torch.zeros(2, 3))


# ---------------------------------------------------------------- training
def test_tasks_come_from_seed_and_epoch_alone(toys):
    s = T.make_settings(**TINY)
    def batches(seed, epoch):
        load = T.TaskLoader(ClipLoader(toys, [0, 1], 10, 6, 24, seed), replace(s, seed=seed), SMALL.edm); load.set_epoch(epoch); torch.rand(3)
        return list(load)
    a, b, other = batches(0, 3), batches(0, 3), batches(0, 4)
    assert len(a) == 4 and all(torch.equal(p[k], q[k]) for p, q in zip(a, b) for k in p)
    assert not torch.equal(a[0]["noise"], other[0]["noise"]) and not torch.equal(a[0]["sigma"], batches(1, 3)[0]["sigma"])


def test_best_holds_the_running_mean(run):
    out, model = run
    last = T.Trainee(UNet3D(model.config), .05)
    last.load_state_dict({k[6:]: v for k, v in load_file(out/"last.safetensors").items() if k.startswith("model/")})
    assert last.steps == 12 and not torch.equal(last.net.stem.weight, last.mean.stem.weight)
    best = json.loads((out/"curves.json").read_text())["best"]["epoch"]
    if best == 2: assert torch.equal(model.stem.weight, last.mean.stem.weight)
    assert not torch.equal(model.stem.weight, last.net.stem.weight)
    assert model.first_frame.max() > .5 and model.speech.std.min() > 0 and model.config.edm.sigma_data != .5


@pytest.mark.parametrize("at", [0, 1, 2])
def test_killed_and_resumed_is_the_same_run(toys, run, tmp_path, monkeypatch, at):
    real = training.run_epoch
    def die(r, *a):
        if len(r.history) == at: raise KeyboardInterrupt
        return real(r, *a)
    monkeypatch.setattr(training, "run_epoch", die)
    with pytest.raises(KeyboardInterrupt): T.train_diffusion(toys, tmp_path/"k", **TINY)
    monkeypatch.setattr(training, "run_epoch", real)
    model = T.train_diffusion(toys, tmp_path/"k", resume=True, **TINY)
    same = [k for k in curve(run[0])[0] if k != "seconds"]
    assert [[h[k] for k in same] for h in curve(run[0])] == [[h[k] for k in same] for h in curve(tmp_path/"k")]
    assert all(torch.equal(a, b) for a, b in zip(run[1].state_dict().values(), model.state_dict().values()))
    with pytest.raises(ValueError, match="was begun with lr"): T.train_diffusion(toys, tmp_path/"k", resume=True, **{**TINY, "lr": .5})


def test_two_processes_train_one_model(toys, two_processes, tmp_path):
    "torchrun (what accelerate launch uses): gradients are averaged, and both processes end with the same weights."
    two_processes("sirem_nb.diffusion.train", f"train_diffusion(toy_talks(), {str(tmp_path/'run')!r}, **{TINY!r})")
    assert len(curve(tmp_path/"run")) == 3


def test_mixed_precision_is_nearly_the_same(toys):
    s = T.make_settings(**TINY)
    model, b = T.new_model(toys, [0, 1], s), next(iter(T.TaskLoader(ClipLoader(toys, [0, 1], 10, 6, 6), s, SMALL.edm)))
    net = awake(model.net.config); net.load_state_dict({k: v if k in dict(model.net.named_buffers()) else net.state_dict()[k] for k, v in model.net.state_dict().items()})
    exact, mixed = (T.loss_fn(m)(net, b).item() for m in (False, True))
    assert exact != mixed and abs(mixed/exact - 1) < .02


def test_begun_with_another_model(toys, run, tmp_path):
    model = T.train_diffusion(toys, tmp_path/"x", start=run[0], **{**TINY, "epochs": 1, "lr": 1e-9})
    assert all(torch.allclose(a.float(), b.float(), atol=1e-6) for a, b in zip(model.parameters(), run[1].parameters()))
    UNet3D(replace(SMALL, size=16, dim=16)).save_pretrained(tmp_path/"other"); UNet3D(replace(SMALL, size=16, cond_dim=5)).save_pretrained(tmp_path/"deaf")
    with pytest.raises(ValueError, match="another network"): T.train_diffusion(toys, tmp_path/"y", start=tmp_path/"other", **TINY)
    with pytest.raises(ValueError, match="5 numbers"): T.train_diffusion(toys, tmp_path/"y", start=tmp_path/"deaf", **TINY)


def test_paper_row(toys):
    s = T.make_settings("paper")
    assert (s.batch_size, s.lr, s.context, s.context_sigma, s.P_mean, s.P_std, s.pooled, s.length) == (2, 1e-4, (1,), (0., 0.), -1.2, 1.2, True, 10)
    with torch.device("meta"): assert 15e6 < sum(p.numel() for p in UNet3D(replace(PAPER, pooled=True)).parameters()) < 60e6
    s = replace(s, length=4)
    model = T.new_model(toys, [0], s); b = next(iter(T.TaskLoader(ClipLoader(toys, [0], 4, 1, 1), s, model.net.config.edm)))
    optimizer = T.new_optimizer(model, s, 10); before = model.net.head[-1].weight.clone()
    loss = T.loss_fn()(model, b); loss.backward(); optimizer.step()
    assert torch.isfinite(loss) and not torch.equal(before, model.net.head[-1].weight) and model.steps == 1


@pytest.mark.parametrize("bad, says", [(dict(epoch=1), "no setting"), (dict(row="theirs"), "no row"), (dict(context=(10,)), "context"), (dict(context_sigma=(.3, .1)), "context_sigma"), (dict(per_epoch=0), "per_epoch"), (dict(size="big"), "size")])
def test_wrong_settings(bad, says):
    with pytest.raises(ValueError, match=says): T.make_settings(**bad)


def test_nobody_is_tested_on_what_was_learned(toys, run):
    split = json.loads((run[0]/"split.json").read_text())
    train, val = T.choose_recordings(toys, split, 0)
    assert {toys.names[i] for i in train} | {toys.names[i] for i in val} == set(split["train"]) and not set(train) & set(val) and val
    assert not set(split["train"]) & {n for k in split if k != "train" for n in split[k]} and split == three_splits(toys, 0)
    with pytest.raises(ValueError, match="does not hold"): T.choose_recordings(toys, {"train": ["sub077_2drt_01_words"]}, 0)


# ---------------------------------------------------------------- from a sound to a movie
@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    path = tmp_path_factory.mktemp("wav")/"x.wav"
    soundfile.write(path, T.toy_talk(0, 7, 30)[1], 16000)
    return path


def go(sound, run, out, **kw): return U.generate_movie(sound, run[0], out, **{"steps": 2, **kw})


def test_a_movie_with_its_sound(sound, run, tmp_path):
    done = []
    about = go(sound, run, tmp_path/"x.mp4", callback=lambda n, total: done.append((n, total)))
    frames, fps, wave, rate = read_movie(tmp_path/"x.mp4")
    assert len(frames) == about["frames"] == 30 and abs(fps - 50) < .1 and frames.shape[1:] == (64, 64)       # 16 x 16, four times as large
    assert wave is not None and abs(len(wave)/rate - .6) < .1 and np.abs(wave).max() > .03
    assert len(done) > 1 and done[-1] == (30, 30) and json.loads((tmp_path/"x.json").read_text()) == about       # streamed, block by block
    assert any("checkpoint's own" in n for n in about["notes"]) and about["seconds_per_generated_second"] > 0
    again = go(sound, run, tmp_path/"y.mp4"); other = go(sound, run, tmp_path/"z.mp4", seed=1)
    assert torch.equal(read_movie(tmp_path/"y.mp4")[0], frames) and not torch.equal(read_movie(tmp_path/"z.mp4")[0], frames)
    assert go(sound, run, tmp_path/"s.mp4", seconds=.3)["frames"] == 15 and again["notes"] == other["notes"]


def test_any_first_frame(sound, run, tmp_path):
    picture = (torch.from_numpy(np.asarray(T.toy_talk(1, 0, 4)[0][0])).float()/255)
    big = picture.repeat_interleave(2, 0).repeat_interleave(2, 1)
    iio.imwrite(tmp_path/"f.png", (255*big).byte().numpy()); iio.imwrite(tmp_path/"c.png", (255*picture).byte().numpy()[..., None].repeat(3, 2)); np.save(tmp_path/"m.npy", 900*big[None].repeat(3, 1, 1).numpy())
    for file, says in (("f.png", "32 x 32 pixels fitted to 16 x 16"), ("m.npy", "its first frame"), ("c.png", None)):
        first, notes = U.read_first_frame(tmp_path/file, 16)
        assert first.shape == (16, 16) and (first - picture).abs().mean() < .05 and (says is None and not notes or any(says in n for n in notes))
    about = go(sound, run, tmp_path/"x.mp4", first_frame=tmp_path/"f.png", seconds=.3)
    shown = read_movie(tmp_path/"x.mp4")[0][0][::4, ::4]
    assert (shown - picture).abs().mean() < .1 and any("32 x 32" in n for n in about["notes"])


def test_other_sounds_are_taken_with_a_note(run, tmp_path):
    wave = T.toy_talk(0, 7, 30)[1]
    soundfile.write(tmp_path/"8k.wav", np.stack([wave[::2], wave[::2]], 1), 8000)
    notes = " | ".join(go(tmp_path/"8k.wav", run, tmp_path/"x.mp4")["notes"])
    assert "2 channels" in notes and "8000 Hz resampled" in notes and "4 kHz" in notes


def test_bad_input_is_one_line(sound, run, tmp_path):
    n = np.full(8000, np.nan, np.float32)
    for name, wave in (("silent", np.zeros(8000)), ("short", .1*np.ones(900)), ("nan", n)): soundfile.write(tmp_path/f"{name}.wav", wave, 16000, subtype="FLOAT")
    (tmp_path/"no.wav").write_text("hello"); (tmp_path/"no.png").write_text("hello")
    np.save(tmp_path/"nan.npy", np.full((2, 16, 16), np.nan)); np.save(tmp_path/"flat.npy", np.ones((2, 16, 16)))
    from sirem_nb.translate.cine_translator import CineTranslator, TranslatorConfig
    CineTranslator(TranslatorConfig(matrix=32, channels=(4, 8, 16, 16, 32))).save_pretrained(tmp_path/"translator")
    x = tmp_path/"x.mp4"
    for bad in (dict(wav="silent.wav"), dict(wav="short.wav"), dict(wav="nan.wav"), dict(wav="no.wav"), dict(wav="none.wav"), dict(out=tmp_path/"x.avi"), dict(checkpoint=tmp_path/"translator"), dict(checkpoint=tmp_path), dict(seconds=-1.),
                dict(first_frame=tmp_path/"none.png"), dict(first_frame=tmp_path/"no.png"), dict(first_frame=tmp_path/"nan.npy"), dict(first_frame=tmp_path/"flat.npy"), dict(first_frame=np.zeros((3, 3))), dict(method="magic"), dict(solver="magic")):
        given = {"wav": sound, "checkpoint": run[0], "out": x, "steps": 2, **bad}
        given["wav"] = tmp_path/given["wav"]
        with pytest.raises((ValueError, FileNotFoundError)) as e: U.generate_movie(**given)
        assert "\n" not in str(e.value) and 20 < len(str(e.value)) < 400, bad
    assert not x.exists() and not list(tmp_path.glob(".*"))


def test_stopped_while_streaming_leaves_the_old_movie(sound, run, tmp_path):
    go(sound, run, tmp_path/"x.mp4", seconds=.3); old = (tmp_path/"x.mp4").read_bytes()
    def stop(n, total): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): go(sound, run, tmp_path/"x.mp4", callback=stop)
    assert (tmp_path/"x.mp4").read_bytes() == old and not list(tmp_path.glob(".*"))
