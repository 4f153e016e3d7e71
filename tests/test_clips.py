"""Movies with sound on one clock; splits by name; clips; long movies without gap or repeat."""
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

from sirem_nb.data.frames import Recording
from sirem_nb.data.sync import write_movie
from sirem_nb.diffusion.condition import (SPLITS, ClipLoader, Talks, cached_talk, clip_places, feature_stats, find_talks, fit_size, fixed_clips, kind_of, normalise, pair_frames,
                                          read_talk, read_talks, speech_vectors, three_splits, usc75_names)
from sirem_nb.diffusion.long_video import generate, plan_windows
from sirem_nb.diffusion.noise import EdmConfig, as_network
from sirem_nb.diffusion.unet3d import UNet3D, UNet3DConfig
from sirem_nb.kspace.spiral import SpiralProtocol
from sirem_nb.learning import speech_encoders as se
from sirem_nb.learning.speech_encoders import LogMel, load_encoder
from sirem_nb.speaker.corpus import read_truth, simulate_corpus

SMALL = SpiralProtocol(n_arms=9, n_samples=400, matrix=42)
REAL = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "usc_timit_m3_audio"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    out = tmp_path_factory.mktemp("talks")
    made = simulate_corpus(out, 2, ["asouk"], SMALL, seconds=None, raw=False, video=True, free=["apa", "iki"], free_recordings=2, free_seconds=None, n_workers=1)
    return out, made


def test_finds_movies_truths_and_pairs(corpus, tmp_path):
    found = find_talks(corpus[0])
    assert [r.name for r in found] == [f"sub00{s}_2drt_{t}" for s in (1, 2) for t in ("01_asouk", "17_topic1", "18_topic2")]
    assert all(r.raw is None and r.audio and r.video and r.truth for r in found) and [kind_of(r.name) for r in found] == ["script", "free", "free"] * 2
    for p in corpus[0].rglob("*_truth.h5"):
        if "sub001" in str(p):
            for kind, q in (("truth", p), ("audio", p.parent.parent / "audio" / p.name.replace("truth.h5", "audio.wav"))):
                new = tmp_path / "virtual" / "sub001" / "2drt" / kind / q.name
                new.parent.mkdir(parents=True, exist_ok=True)
                new.write_bytes(q.read_bytes())
    only_truth = find_talks(tmp_path / "virtual")
    assert len(only_truth) == 3 and all(r.video is None and r.truth for r in only_truth)
    a, b = read_talk(only_truth[0]), read_talk(found[0])                 # the same pictures, without and with the loss of an mp4
    assert torch.equal(a["frame_of"], b["frame_of"]) and torch.equal(a["features"], b["features"]) and a["pixel_mm"] == b["pixel_mm"] == 200 / 64
    assert 0 < (a["video"].float() - b["video"].float()).abs().mean() < 2
    for ext in (".mp4", ".wav"):
        (tmp_path / "pairs").mkdir(exist_ok=True)
        (tmp_path / "pairs" / f"m3_016{ext}").write_bytes((found[0].video if ext == ".mp4" else found[0].audio).read_bytes())
    (pair,) = find_talks(tmp_path / "pairs")
    assert (pair.subject, pair.name, kind_of(pair.name)) == ("m3", "m3_016", "script") and read_talk(pair)["pixel_mm"] is None
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="movies with sound"):
        find_talks(tmp_path / "empty")


def test_frames_are_those_of_the_truth(corpus):
    talks = read_talks(corpus[0], cache=corpus[0] / "cache")
    for i, r in enumerate(talks.recordings):
        truth = read_truth(r.truth)
        t = truth["frame_times_s"][talks.frame_of[i]]
        assert np.abs(t - (np.arange(len(t)) + 0.5) / 50).max() <= SMALL.tr_s + 1e-9
        want = (fit_size(torch.from_numpy(truth["frames"][talks.frame_of[i]])).clamp(0, 1) * 255)
        assert (want - talks.videos[i].float()).abs().mean() < 2
        assert len(talks.videos[i]) == len(talks.features[i]) == int(truth["frame_times_s"][-1] * 50 + 0.5 * 50 * 2 * SMALL.tr_s + 1e-6)


@pytest.mark.parametrize("fps", [23.18, 30.0, 50.0, 83.28])
def test_a_flash_and_a_bang_are_in_one_frame(tmp_path, fps):
    at, rate = 1.23, 20000
    n = int(2.5 * fps)
    frames = np.full((n, 24, 24), 0.2, np.float32)
    frames[:, :12] += 0.1 * np.linspace(0, 1, 12)[None, :, None]
    times = (np.arange(n) + 0.5) / fps
    frames[times >= at] += 0.5
    wave = 1e-4 * np.random.default_rng(0).standard_normal(int(2.5 * rate))
    wave[int(at * rate):] += 0.3 * np.random.default_rng(1).standard_normal(len(wave) - int(at * rate))
    write_movie(tmp_path / "a_flash.mp4", frames, fps)
    soundfile.write(tmp_path / "a_flash.wav", wave, rate)
    t = read_talk(find_talks(tmp_path)[0], LogMel(reach=0))
    bright = t["video"].float().mean((1, 2)).diff().argmax().item() + 1
    loud = t["features"].mean(1).diff().argmax().item() + 1
    assert len(t["video"]) == int(n / fps * 50 + 1e-6) and abs(loud - at * 50) <= 1
    assert abs(bright - at * 50) <= 0.5 + max(0.5 / fps * 50, 0.5), (bright, loud)


def test_the_middle_stays_the_middle():
    for n, size in ((84, 64), (68, 64), (204, 64), (42, 64), (64, 64), (84, 32)):
        x = torch.exp(-((torch.arange(n)[:, None] - n // 2) ** 2 + (torch.arange(n) - n // 2) ** 2) / (2 * (n / 20) ** 2))[None]
        y = fit_size(x, size)
        assert y.shape == (1, size, size)
        for axis in (1, 2):
            assert abs(float((y.sum(axis) * torch.arange(size)).sum() / y.sum()) - size // 2) < 0.02
    wide = fit_size(torch.ones(2, 60, 80), 40)
    assert wide[:, 20, 20].eq(1).all() and wide[:, 0].eq(0).all() and wide[:, :, 0].eq(1).sum() > 40      # black above and below, nothing lost at the sides


def test_the_cache_knows_files_sizes_and_encoders(corpus, tmp_path):
    r, one, other = find_talks(corpus[0])[0], LogMel(), LogMel(reach=1)
    a = cached_talk(r, one, 64, 50, tmp_path)
    assert len(list(tmp_path.glob("*.npz"))) == 1 and torch.equal(cached_talk(r, one, 64, 50, tmp_path)["features"], a["features"])
    assert cached_talk(r, other, 64, 50, tmp_path)["features"].shape[1] == 120 and cached_talk(r, one, 32, 50, tmp_path)["video"].shape[1] == 32
    assert len(list(tmp_path.glob("*.npz"))) == 3
    assert not list(tmp_path.glob("*tmp*"))


@pytest.mark.parametrize("name, family", [("hubert-base", "HubertModel"), ("wavlm-base", "WavLMModel"), ("wav2vec2-base", "Wav2Vec2Model")])
def test_each_transformer_in_its_own_class(corpus, tmp_path, name, family):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, family).config_class(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, conv_dim=(16,) * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4)
    torch.manual_seed(0)
    with se.quiet():
        getattr(transformers, family)(config).save_pretrained(tmp_path / "w")
    transformers.Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(tmp_path / "w")
    encoder = load_encoder(name, tmp_path / "w")
    assert type(encoder.model).__name__ == family and encoder.frame_rate == 50
    t = read_talks(corpus[0], encoder, cache=tmp_path / "c")
    assert t.encoder == name and t.dim == 32 and all(len(f) == len(v) and torch.isfinite(f).all() for f, v in zip(t.features, t.videos))
    wave, rate = soundfile.read(t.recordings[0].audio, dtype="float32")
    with torch.no_grad():
        for p in encoder.parameters(): p.mul_(1.01)
    assert not torch.equal(read_talks(corpus[0], encoder, cache=tmp_path / "c").features[0], t.features[0])     # other weights, other cache
    whole, part = speech_vectors(wave, rate, 40, encoder), speech_vectors(wave[:16000], rate, 40, encoder)
    assert (whole[:20] - part[:20]).abs().max() > 1e-4                   # the whole utterance is heard, not the clip alone


def test_bad_recordings_are_left_out_and_named(corpus, tmp_path):
    good = find_talks(corpus[0])[0]
    soundfile.write(tmp_path / "silent.wav", np.zeros(20000), 20000)
    soundfile.write(tmp_path / "short.wav", 0.1 * np.ones(100), 20000)
    soundfile.write(tmp_path / "stereo.wav", np.stack([soundfile.read(good.audio)[0]] * 2, 1), 20000)
    (tmp_path / "broken.mp4").write_bytes(b"no movie")
    make = lambda name, **kw: Recording("sub001", f"sub001_2drt_01_{name}", None, **({"audio": good.audio, "video": good.video, "truth": good.truth} | kw))
    talks = read_talks([make("good"), make("silent", audio=tmp_path / "silent.wav"), make("short", audio=tmp_path / "short.wav"), make("broken", video=tmp_path / "broken.mp4"),
                        make("stereo", audio=tmp_path / "stereo.wav"), make("track", audio=None), make("mute", audio=None, video=None)], cache=tmp_path / "c")
    assert [n.split("_")[-1] for n in talks.names] == ["good", "stereo", "track"] and torch.allclose(talks.features[0], talks.features[1], atol=1e-4)
    near = torch.nn.functional.cosine_similarity(talks.features[0], talks.features[2])       # the movie's own sound track, through AAC, in step
    assert near[10:-10].mean() > 0.95
    for name, word in (("silent", "silent"), ("short", "at least one frame"), ("broken", "not a movie"), ("mute", "no sound")):
        assert word in talks.notes[f"sub001_2drt_01_{name}"] and name in talks.notes[f"sub001_2drt_01_{name}"]
    with pytest.raises(ValueError, match="none of 1 recordings"):
        read_talks([make("silent", audio=tmp_path / "silent.wav")], cache=tmp_path / "c")


def test_splits_are_disjoint_and_depend_on_the_seed_alone():
    names = usc75_names()
    gone = set(names) - set(np.random.default_rng(0).choice(names, 29, replace=False))          # 29 do not exist
    for data in (names, sorted(gone)):
        for seed in (0, 1):
            s = three_splits(data, seed)
            flat = sum(s.values(), [])
            assert list(s) == list(SPLITS) and len(flat) == len(set(flat)) and set(flat) <= set(data)
            who = {k: {n[:6] for n in v} for k, v in s.items()}
            assert len(who["train"]) == 60 and len(who["unseen_subject"]) == 15 and not who["train"] & who["both"]
            assert who["unseen_speech"] <= who["train"] and who["both"] <= who["unseen_subject"]
            assert {kind_of(n) for k in ("train", "unseen_subject") for n in s[k]} == {"script"} and {kind_of(n) for k in ("unseen_speech", "both") for n in s[k]} == {"free"}
            assert max(np.unique([n[:6] for n in s["unseen_speech"]], return_counts=True)[1]) == 4
            assert s == three_splits(list(reversed(data)), seed)
    assert three_splits(names, 0) != three_splits(names, 1)
    virtual = [f"sub{i:03d}_2drt_{t}" for i in range(1, 17) for t in ("01_words", "17_topic1", "18_topic2")]
    assert {k: len(v) for k, v in three_splits(virtual).items()} == {"train": 12, "unseen_speech": 24, "unseen_subject": 4, "both": 8}
    for wrong in (dict(n_unseen=0), dict(n_unseen=75)):
        with pytest.raises(ValueError, match="expected at least one new"):
            three_splits(names, **wrong)


def pretend(frames=(35, 9, 20), d=3):
    "Talks whose frame n of recording i is n + 50 i, with features that say the same."
    video = [(torch.arange(n) + 50 * i).byte()[:, None, None].expand(-1, 8, 8).clone() for i, n in enumerate(frames)]
    return Talks(video, [v[:, 0, :1].float().expand(-1, d) for v in video], [f"sub00{i}_2drt_01_x" for i in range(len(frames))], ["a"] * len(frames), ["script"] * len(frames))


def test_clips_hold_frames_and_features_of_one_moment():
    talks = pretend()
    loader = ClipLoader(talks, [0, 1, 2], 10, 8, 50, seed=3)
    assert len(loader) == 7 and len(loader.places) == 26 + 11            # recording 1 is too short for a clip
    epochs = []
    for epoch in (0, 1, 0):
        loader.set_epoch(epoch)
        epochs.append([b for b in loader])
    assert [len(b["video"]) for b in epochs[0]] == [8] * 6 + [2]
    for b in epochs[0]:
        grey = ((b["video"][:, :, 0, 0, 0] + 1) * 127.5).round()
        assert torch.equal(grey, b["features"][..., 0]) and (grey.diff(dim=1) == 1).all()
    assert all(torch.equal(x["video"], y["video"]) for x, y in zip(epochs[0], epochs[2])) and not torch.equal(epochs[0][0]["video"], epochs[1][0]["video"])
    assert clip_places(talks, [0, 2]).tolist() == [[0, 0], [0, 10], [0, 20], [2, 0], [2, 10]] and len(fixed_clips(talks, [0, 2], n=3)["video"]) == 3
    with pytest.raises(ValueError, match="none with 10 frames"):
        ClipLoader(talks, [1], 10)
    with pytest.raises(ValueError, match="do not overlap"):
        fixed_clips(talks, [0], n=4)


def test_statistics_come_from_the_training_recordings():
    talks = pretend()
    s = feature_stats(talks, [0])
    z = normalise(talks.features[0], s)
    assert torch.allclose(z.mean(0), torch.zeros(3), atol=1e-5) and torch.allclose(z.std(0), torch.ones(3), atol=1e-4)
    assert normalise(talks.features[2], s).mean() > 5
    with pytest.raises(ValueError, match="encoder it was trained with"):
        normalise(torch.zeros(4, 7), s)


def test_pairs_are_the_nearest_frames():
    times = (np.arange(300) + 0.5) / 83.28
    which = pair_frames(times, 3.0)
    middles = (np.arange(150) + 0.5) / 50
    assert np.array_equal(which.numpy(), np.abs(times[:, None] - middles).argmin(0))
    with pytest.raises(ValueError, match="at least one frame"):
        pair_frames(times, 0.01)


# long movies

class Obedient:
    "A perfect listener: every frame that is not given becomes as grey as the sound says. It writes down how it was asked."
    def __init__(self, length=10):
        self.config, self.calls = SimpleNamespace(frames=length, edm=EdmConfig(sigma_data=0.5)), []

    def parameters(self): return iter(())

    def __call__(self, x, c_noise, features=None):
        self.calls.append((c_noise.clone(), features.clone()))
        said = lambda x, sigma, features=None: features[..., 0][..., None, None, None].expand_as(x)
        return as_network(said, self.config.edm)(x, c_noise, features=features)


def grey(n): return (0.8 * torch.sin(torch.arange(n) * 1.7 + 0.3))[:, None]      # every frame differs from its neighbours


@pytest.mark.parametrize("kw", [dict(method="feedback"), dict(context=1), dict(context=3, known_sigma=0.2), dict(context=9, known_sigma=0.05, anchor=0), dict(context=8), dict(anchor=1), dict(anchor=2, last_sigma=0), dict(context=4, length=7)])
@pytest.mark.parametrize("n", [1, 2, 9, 10, 11, 37])
def test_blocks_join_without_gap_or_repeat(kw, n):
    sound, first = grey(n), torch.full((4, 4), 0.25)
    blocks = list(generate(Obedient(), sound, first, steps=3, **kw))
    movie = torch.cat(blocks)
    assert movie.shape == (n, 4, 4) and torch.equal(movie[0], first) and all(len(b) for b in blocks)
    assert torch.allclose(movie[1:, 0, 0], (sound[1:, 0] + 1) / 2, atol=2e-3)
    many = torch.cat(list(generate(Obedient(), torch.stack([sound, -sound]), torch.stack([first, first]), steps=3, **kw)), 1)
    assert many.shape == (2, n, 4, 4) and torch.allclose(many[1, 1:, 0, 0], (1 - sound[1:, 0]) / 2, atol=2e-3)


def test_what_is_given_and_how_noisy():
    kw = dict(context=3, known_sigma=0.2, steps=2, solver="euler", last_sigma=0)
    start_of = lambda plan: [round(float(grey(30)[a, 0] * 1e6)) for a, *_ in plan]
    net = Obedient()
    list(generate(net, grey(30), torch.zeros(4, 4), anchor=0, **kw))
    levels = [(4 * c).exp() for c, _ in net.calls]
    given = [int((torch.isclose(s[0], torch.tensor(0.2), rtol=1e-4)).sum()) for s in levels]
    assert given[:2] == [1, 1] and set(given[2:]) == {3}                 # one frame is all there is at first
    assert [round(float(f[0, 0, 0] * 1e6)) for _, f in net.calls[::2]] == start_of(plan_windows(30, 10, 3))
    is_anchored = lambda c, f: bool(torch.isclose((4 * c).exp()[0, 0], torch.tensor(0.01), rtol=1e-4))
    for every in (1, 2, 3):                                              # the first frame goes to every so-manyth clip, in front of the others
        held, plan = Obedient(), plan_windows(30, 10, 3, every)
        list(generate(held, grey(30), torch.zeros(4, 4), anchor=every, **kw))
        calls = held.calls[::2]
        assert [is_anchored(*c) for c in calls] == [bool((i + 1) % every == 0) for i in range(len(plan))] == [bool(e) for *_, e in plan]
        assert all(f[0, 0] == grey(30)[0] and torch.isclose((4 * c).exp()[0, 1], torch.tensor(0.2), rtol=1e-4) for c, f in calls if is_anchored(c, f))
        assert [round(float(f[0, e, 0] * 1e6)) for (_, f), (*_, e) in zip(calls, plan)] == start_of(plan)
    paper = Obedient()
    list(generate(paper, grey(30), torch.zeros(4, 4), method="feedback", **{**kw, "context": 5}))
    first = torch.stack([(4 * c).exp()[0] for c, _ in paper.calls])
    assert (first[:, 0] <= 0.002 + 1e-6).all() and (first[:, 1:] > 0.0019).all() and len(paper.calls) == 2 * 4


def test_the_last_call_is_where_the_settings_say():
    net = Obedient()
    list(generate(net, grey(10), torch.zeros(4, 4), steps=3, last_sigma=1.5))
    assert [round(float((4 * c).exp()[0, -1]), 3) for c, _ in net.calls] == [80., round((80**(1/7)/2 + 1.5**(1/7)/2)**7, 3), 1.5]


def test_it_streams():
    net = Obedient()
    movie = generate(net, grey(100), torch.zeros(4, 4), steps=4, solver="euler", anchor=2)
    assert len(next(movie)) == 1 and not net.calls
    assert len(next(movie)) == 9 and len(net.calls) == 4
    assert len(next(movie)) == 6 and len(net.calls) == 8                 # three past frames and the first one


def test_one_seed_one_movie_and_bad_input():
    torch.manual_seed(0)
    net = UNet3D(UNet3DConfig(size=16, dim=8, mults=(1, 2), time=(0, 1), speech=(0, 1), heads=2, emb_dim=16, cond_dim=5)).eval()
    for p in net.parameters(): torch.nn.init.normal_(p, std=0.05) if p.ndim > 1 else None
    sound, first = torch.randn(23, 5), torch.rand(16, 16)
    make = lambda seed=0, **kw: torch.cat(list(generate(net, sound, first, steps=2, seed=seed, **kw)))
    state = torch.random.get_rng_state()
    a = make()
    assert torch.equal(a, make()) and not torch.equal(a, make(1)) and torch.equal(state, torch.random.get_rng_state()) and 0 <= a.min() and a.max() <= 1
    assert torch.equal(torch.cat(list(generate(net, sound, steps=2)))[0], net.first_frame)
    for word, kw in (("one for each frame", dict(frames=24)), ("at least one new frame", dict(context=10)), ("at least one new frame", dict(context=0)), ("expected feedback or overlap", dict(method="x")), ("0 or more", dict(known_sigma=-1.)),
                     ("expected 0, 1, 2", dict(anchor=-1)), ("expected 0, 1, 2", dict(anchor=.01)), ("at least one new frame", dict(context=9, anchor=1)), ("anker", dict(anker=1)), ("a level between 0 and 80", dict(last_sigma=90.))):
        with pytest.raises(ValueError, match=word):
            make(**kw)
    for word, bad in (("grey values in 0..1", 255 * first), ("grey values in 0..1", first * float("nan")), ("first frame of shape", torch.rand(3, 16, 16)), ("expected", torch.rand(20, 16))):
        with pytest.raises(ValueError, match=word):
            list(generate(net, sound, bad, steps=2))
    with pytest.raises(ValueError, match="encoder the model was trained with"):
        list(generate(net, sound[:, :4], first, steps=2))


def test_real_movies_with_sound(tmp_path):
    if not REAL.is_dir(): pytest.skip(f"no real recordings at {REAL.parent}")
    talks = read_talks(REAL, cache=tmp_path)
    assert len(talks) == 3 and not talks.notes and all(v.shape[1:] == (64, 64) for v in talks.videos) and 6 < talks.seconds < 9
    for i in range(3):
        assert torch.isfinite(talks.features[i]).all() and len(talks.features[i]) == len(talks.videos[i])
        shown = talks.frame_of[i].double()
        assert 2.0 < float(np.bincount(talks.frame_of[i].numpy()).mean()) < 2.3 and (shown.diff() >= 0).all() and shown.diff().max() <= 1    # 50/23.18
