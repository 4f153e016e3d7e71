"""k-space: bad input, files, foreign sizes, real measurements, and peers."""
import dataclasses
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import scipy.io
import torch

import sirem_nb.kspace.gridding as gridding_module
from sirem_nb.kspace.coils import rss, walsh_smaps
from sirem_nb.kspace.density import density, density_column, pipe_menon
from sirem_nb.kspace.gridding import acq_images, arm_images, combine_arms, estimate_smaps, gridding
from sirem_nb.kspace.nufft import Nufft, backends, exact_adjoint, exact_dft, shared_nufft
from sirem_nb.kspace.spiral import GAMMA_HZ_PER_T, USC13, SpiralProtocol, check_ktraj, read_ktraj, spread_order, toy_head

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"
PHANTOM = DATA / "spiral_phantom" / "spiral.mat"


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.complex64, generator=torch.Generator().manual_seed(seed))


def error(a, b):
    return float((a - b).abs().norm() / b.abs().norm())


def coil_maps(coils, ny, nx):
    y, x = torch.meshgrid(torch.arange(ny) / ny - 0.5, torch.arange(nx) / nx - 0.5, indexing="ij")
    a = 2 * torch.pi * torch.arange(coils)[:, None, None] / coils
    S = torch.exp(-2 * ((x - 0.7 * a.cos()) ** 2 + (y - 0.7 * a.sin()) ** 2)) * torch.exp(1j * (a + 2 * (x * a.sin() - y * a.cos())))
    return S / S.abs().square().sum(0).sqrt()


# ---- the protocol


@pytest.mark.parametrize("p", [USC13, SpiralProtocol(n_arms=5, n_samples=700, matrix=40), SpiralProtocol(n_arms=1, n_samples=3000, matrix=32, fov_mm=240.0),
                               SpiralProtocol(n_arms=48, n_samples=1700, matrix=200, fov_mm=300.0, dwell_s=2e-6),
                               dataclasses.replace(USC13, fov_centre=1.5, fov_edge=0.47), SpiralProtocol(n_arms=60, n_samples=900, matrix=128, slew_max=200.0, grad_max=10e-3)],
                         ids=["usc", "5 arms", "1 arm", "48 arms", "variable density", "limited by amplitude"])
def test_protocol_keeps_the_gradient_limits(p):
    k = p.ktraj()
    assert k.shape == (p.n_arms, p.n_samples, 2) and k.dtype == torch.float32
    assert torch.equal(check_ktraj(k), k)
    radius = k.norm(dim=-1)
    assert float(radius[:, 0].max()) == 0 and abs(float(radius[:, -1].min()) - 0.5) < 1e-3 and float(radius.diff(dim=1).min()) > 0
    arm = np.asarray(k[0].double()) @ [1, 1j] * p.matrix / (p.fov_mm * 1e-3)
    gradient = np.diff(arm) / p.dwell_s / GAMMA_HZ_PER_T
    assert abs(gradient).max() < 1.002 * p.grad_max
    slew = np.diff(gradient) / p.dwell_s
    rounding = 4 * 0.5 * 2**-24 * p.matrix / (p.fov_mm * 1e-3) / p.dwell_s**2 / GAMMA_HZ_PER_T      # float32 trajectory, differentiated twice
    assert abs(slew).max() < 1.01 * p.slew_max + rounding
    assert sorted(p.arm_order) == list(range(p.n_arms))


def test_protocol_turns_obey_nyquist():
    p = dataclasses.replace(USC13, fov_centre=0.9, fov_edge=0.9)
    k = torch.view_as_complex(p.ktraj().double()).numpy()
    angle = np.unwrap(np.angle(k[:, 1:]), axis=1)
    crossings = []
    for a, r in zip(angle, abs(k[:, 1:])):
        turns = np.arange(np.ceil(a[0] / (2 * np.pi)), np.floor(a[-1] / (2 * np.pi)) + 1) * 2 * np.pi
        crossings += list(np.interp(turns, a, r))
    spacing = np.diff(np.sort(crossings))
    assert np.allclose(spacing[3:], 1 / (0.9 * 84), rtol=0.02)                    # cycles/pixel between neighbouring tracks


def test_play_order():
    assert USC13.arm_order[:4] == (12, 3, 10, 0)
    order = USC13.play_order(2703)
    assert order.dtype == torch.int64 and len(order) == 2703 and torch.equal(order[:13], order[13:26])
    assert len(USC13.play_order(0)) == 0 and USC13.play_order(5).tolist() == list(USC13.arm_order[:5])
    assert SpiralProtocol(n_arms=3, arm_order=(2, 0, 1)).play_order(4).tolist() == [2, 0, 1, 2]
    assert spread_order(1) == (0,) and spread_order(8)[1] == 4


@pytest.mark.parametrize("fields", [dict(n_arms=1), dict(slew_max=20.0), dict(n_samples=100), dict(matrix=400)])
def test_impossible_protocols_say_what_to_change(fields):
    with pytest.raises(ValueError, match="use at least .* samples or more arms"):
        dataclasses.replace(USC13, arm_order=None, **fields).ktraj()


@pytest.mark.parametrize("order", [(0, 1), tuple(range(12)) + (11,), tuple(range(1, 14))])
def test_bad_arm_order(order):
    with pytest.raises(ValueError, match="each of the 13 arms once"):
        SpiralProtocol(arm_order=order)


# ---- trajectories: bad input and files


@pytest.mark.parametrize("ktraj, says", [
    (USC13.ktraj() * 2 * np.pi, "cycles/pixel"), (USC13.ktraj() * 84, "matrix size"), (torch.full((3, 2), 0.502), "0.502"),
    (torch.full((3, 2), torch.nan), "NaN"), (torch.tensor([[0.1, torch.inf]]), "infinite"),
    (torch.zeros(13, 630, 3), "kx, ky last"), (torch.zeros(0, 2), "shape"), (torch.zeros(2), "shape")])
def test_bad_trajectories(ktraj, says):
    with pytest.raises(ValueError, match=says):
        check_ktraj(ktraj)
    with pytest.raises(ValueError, match=says):
        Nufft(ktraj, (84, 84))


def test_rounding_above_one_half_is_allowed():
    assert float(check_ktraj(torch.tensor([[0.5000001, -0.5009]])).abs().max()) > 0.5


@pytest.fixture
def arms():
    return USC13.ktraj()[:3, ::7]


def test_trajectory_files(tmp_path, arms):
    c = torch.view_as_complex(arms.contiguous()).numpy()
    np.save(tmp_path / "a.npy", arms.numpy())
    np.savez(tmp_path / "b.npz", ktraj=arms.numpy(), dcf=np.ones(3))
    np.savez(tmp_path / "only.npz", whatever=c)
    scipy.io.savemat(tmp_path / "c.mat", {"k": c.T, "w": np.ones(3)})
    np.save(tmp_path / "three.npy", np.concatenate([arms.numpy(), np.ones((3, 90, 1))], -1))
    with h5py.File(tmp_path / "d.h5", "w") as f:
        f["traj"] = arms.numpy().astype(np.float64)
    with h5py.File(tmp_path / "e.mat", "w") as f:                                # MATLAB 7.3: a pair of reals, axes swapped
        pair = np.zeros(c.shape, dtype=[("real", "f8"), ("imag", "f8")])
        pair["real"], pair["imag"] = c.real, c.imag
        f["k"] = pair
    for name in ("a.npy", "b.npz", "only.npz", "c.mat", "three.npy", "d.h5", "e.mat"):
        assert torch.equal(read_ktraj(tmp_path / name), arms), name
    np.save(tmp_path / "one.npy", c[0])
    assert torch.equal(read_ktraj(tmp_path / "one.npy"), arms[:1])


def test_bad_trajectory_files(tmp_path, arms):
    with pytest.raises(FileNotFoundError, match="no trajectory file"):
        read_ktraj(tmp_path / "none.npy")
    np.savez(tmp_path / "two.npz", a=arms.numpy(), b=arms.numpy())
    with pytest.raises(ValueError, match="say which"):
        read_ktraj(tmp_path / "two.npz")
    assert torch.equal(read_ktraj(tmp_path / "two.npz", "b"), arms)
    with pytest.raises(ValueError, match="say which"):
        read_ktraj(tmp_path / "two.npz", "c")
    np.save(tmp_path / "flat.npy", np.zeros(10))
    with pytest.raises(ValueError, match="expected"):
        read_ktraj(tmp_path / "flat.npy")
    (tmp_path / "t.txt").write_text("0 0")
    with pytest.raises(ValueError, match=".npy, .npz, .mat or .h5"):
        read_ktraj(tmp_path / "t.txt")
    np.save(tmp_path / "pickled.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError):
        read_ktraj(tmp_path / "pickled.npy")
    with h5py.File(tmp_path / "whole.h5", "w") as f:
        f["ktraj"] = USC13.ktraj().numpy()
    for name, raw in (("cut.h5", (tmp_path / "whole.h5").read_bytes()[:5000]), ("cut.npy", b"\x93NUMPY"), ("noise.mat", bytes(range(200))), ("empty.npz", b"")):
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(ValueError, match=f"{name}.*damaged|{name}.*not"):
            read_ktraj(tmp_path / name)


# ---- the operator: bad input, missing backends


def test_operator_refuses_what_does_not_fit():
    op = Nufft(USC13.ktraj(), (84, 84))
    for bad in (torch.zeros(84, 83), torch.zeros(84), torch.zeros(13, 630)):
        with pytest.raises(ValueError, match="takes arrays"):
            op(bad)
    with pytest.raises(ValueError, match=r"\(..., 13, 630\), found \(8, 12, 630\)"):
        op.adjoint(torch.zeros(8, 12, 630))
    for im_size in ((84,), (0, 84), (84, 84, 84), (-3, 4)):
        with pytest.raises(ValueError, match="im_size"):
            Nufft(USC13.ktraj(), im_size)
    with pytest.raises(ValueError, match="choose one of"):
        Nufft(USC13.ktraj(), (84, 84), "gpunufft")


def test_missing_backend_names_the_extra(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if "finufft" in name else real(name, *a))
    assert "finufft" not in backends() and backends()[0] == "sparse"
    with pytest.raises(ValueError, match=r"needs the package finufft.*sirem-nb\[fast\]"):
        Nufft(USC13.ktraj(), (84, 84), "finufft")


@pytest.mark.skipif(importlib.util.find_spec("finufft") is None, reason="finufft is not installed")
def test_finufft_without_its_torch_bridge(monkeypatch):
    x, y, k = random(3, 30, 27), random(3, 4, 50, seed=1), USC13.ktraj()[:4, ::12][:, :50]
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "pytorch_finufft" else real(name, *a))
    op = Nufft(k, (30, 27), "finufft")
    assert error(op(x), exact_dft(x, k)) < 1e-4 and error(op.adjoint(y), exact_adjoint(y, k, (30, 27))) < 1e-4


def test_backends_are_imported_late():
    code = ("import sys, sirem_nb.kspace.gridding as g; from sirem_nb.kspace.nufft import Nufft; from sirem_nb.kspace.spiral import USC13; Nufft(USC13.ktraj(), (84, 84));"
            "found = {'torchkbnufft', 'finufft', 'pytorch_finufft', 'matplotlib', 'nbdev', 'fastcore'} & set(sys.modules); assert not found, found")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[1], timeout=120)


# ---- density


def test_weights_from_the_file_only_where_they_are_weights():
    k = USC13.ktraj()
    r = k.norm(dim=-1)
    good = r.sqrt() / r.sqrt().max()
    assert torch.equal(density_column(good, k), good) and density(k, (84, 84), good)[1] == "file"
    assert torch.allclose(density(k, (84, 84), good * 7)[0], density(k, (84, 84), good)[0])
    for bad in (None, torch.zeros_like(r), torch.ones_like(r), 1 - r, good - 0.01, good * torch.nan, good[:, :9], -good, torch.arange(13.0)[:, None].expand(13, 630)):
        assert density_column(bad, k) is None
        dcf, source = density(k, (84, 84), bad)
        assert source == "pipe-menon" and abs(float(dcf.sum()) - 84 * 84) < 1 and float(dcf.min()) > 0


def test_a_point_comes_back_with_height_one():
    for k, im_size in ((USC13.ktraj(), (84, 84)), (SpiralProtocol(n_arms=9, n_samples=800, matrix=64).ktraj(), (64, 61))):
        dcf, _ = density(k, im_size)
        point = torch.zeros(im_size)
        point[im_size[0] // 2, im_size[1] // 2] = 1
        op = Nufft(k, im_size)
        spread = op.adjoint(dcf * op(point)).abs()
        assert abs(float(spread.max()) - 1) < 2e-3 and spread.argmax() == point.argmax()
        assert float(spread.median()) < 0.02


def test_weights_are_areas_on_a_grid():
    """On the points of a Cartesian grid all weights inside are equal."""
    f = (torch.arange(32) - 16) / 32
    grid = torch.stack(torch.meshgrid(f, f, indexing="ij"), -1)
    w = pipe_menon(grid, (32, 32))[2:-2, 2:-2]
    assert float(w.std() / w.mean()) < 0.02


# ---- coils


def test_maps_are_found_in_noise():
    S, head = coil_maps(6, 64, 60), toy_head(64)[:, :60]
    x = head * S + 0.02 * random(6, 64, 60)
    found = walsh_smaps(x)
    inside = head > 0.1
    assert found.shape == S.shape and found.dtype == torch.complex64
    assert torch.allclose(found.abs().square().sum(0), torch.ones(64, 60), atol=1e-4)
    assert float((found.conj() * S).sum(0).abs()[inside].quantile(0.05)) > 0.99
    smooth = (found[:, 1:] * found[:, :-1].conj()).sum(0)                        # neighbours agree in phase too
    assert float(smooth.real[inside[1:] & inside[:-1]].quantile(0.02)) > 0.98


def test_maps_do_not_depend_on_the_scale_of_the_data():
    x = toy_head(40) * coil_maps(4, 40, 40) + 0.01 * random(4, 40, 40)
    for factor in (1e-12, 1e12, 1j):
        overlap = (walsh_smaps(factor * x).conj() * walsh_smaps(x)).sum(0).abs()
        assert float(overlap.min()) > 0.999


# ---- gridding


@pytest.fixture(scope="module")
def scan():
    """39 arms of a still head, 5 coils."""
    k, S, arm = USC13.ktraj(), coil_maps(5, 84, 84), USC13.play_order(39)
    kspace = Nufft(k, (84, 84))(toy_head() * S).transpose(0, 1)[arm]              # (acq, coil, sample)
    return dict(kspace=kspace, arm=arm, ktraj=k, dcf=density(k, (84, 84))[0], S=S)


def run(scan, f=acq_images, **change):
    a = {**scan, **change}
    return f(a["kspace"], a["arm"], a["ktraj"], a["dcf"], a["S"], (84, 84))


def test_every_rotation_gives_the_same_true_picture(scan):
    A = run(scan)
    frames = A.reshape(3, 13, 84, 84).sum(1)
    assert error(frames[1], frames[0]) < 1e-5
    best = frames[0] * (frames[0].conj() * toy_head()).sum() / frames[0].abs().square().sum()
    assert error(best, toy_head()) < 0.05


def test_pieces_make_no_difference(scan, monkeypatch):
    whole = run(scan)
    monkeypatch.setattr(gridding_module, "shared_nufft", lambda *a: SimpleNamespace(chunk=1, adjoint=shared_nufft(*a).adjoint))
    assert error(run(scan), whole) < 1e-5


def test_order_of_acquisitions_makes_no_difference(scan):
    shuffle = torch.randperm(39, generator=torch.Generator().manual_seed(0))
    assert error(run(scan, kspace=scan["kspace"][shuffle], arm=scan["arm"][shuffle]), run(scan)[shuffle]) < 1e-6


def test_maps_of_a_scan(scan):
    found = estimate_smaps(scan["kspace"], scan["arm"], scan["ktraj"], scan["dcf"], (84, 84))
    inside = toy_head() > 0.1
    assert float((found.conj() * scan["S"]).sum(0).abs()[inside].quantile(0.05)) > 0.99
    part = estimate_smaps(scan["kspace"][:20], scan["arm"][:20], scan["ktraj"], scan["dcf"], (84, 84))   # not a multiple of 13
    assert float((part.conj() * found).sum(0).abs()[inside].min()) > 0.99


@pytest.mark.parametrize("change, says", [
    (lambda s: dict(arm=s["arm"] + 1), r"unknown arm index \[13\]"), (lambda s: dict(arm=s["arm"] - 1), r"unknown arm index \[-1\]"),
    (lambda s: dict(arm=s["arm"][:7]), r"arm \(acq,\)"), (lambda s: dict(kspace=s["kspace"][..., :600]), "600 samples"),
    (lambda s: dict(kspace=s["kspace"][:, :3]), "3 coils, the coil maps 5"), (lambda s: dict(S=s["S"][:2]), "5 coils, the coil maps 2"),
    (lambda s: dict(kspace=s["kspace"] * torch.nan), "NaN"), (lambda s: dict(dcf=s["dcf"][:5]), "dcf"),
    (lambda s: dict(ktraj=s["ktraj"][0]), "ktraj"), (lambda s: dict(ktraj=s["ktraj"] * 84), "cycles/pixel")])
def test_bad_scans(scan, change, says):
    with pytest.raises(ValueError, match=says) as e:
        run(scan, **change(scan))
    assert "\n" not in str(e.value)


def test_foreign_sizes():
    """3 arms of 3996 samples, 8 coils, a 320 grid, no density weights."""
    t = torch.linspace(0, 1, 3996).sqrt()
    phase = 2 * torch.pi * (12 * t + torch.arange(3)[:, None] / 3)
    k = torch.stack([0.15 * t * phase.cos(), 0.15 * t * phase.sin()], -1)        # reaches 0.15 cycles/pixel: fine arms, coarse picture
    im_size, arm = (320, 320), torch.tensor([2, 0, 1, 2, 0, 1])
    head = torch.nn.functional.pad(toy_head(100), [110] * 4)
    raw = Nufft(k, im_size)(head * coil_maps(8, *im_size)).transpose(0, 1)[arm]   # (6, 8, 3996)
    dcf, source = density(k, im_size, torch.zeros(3, 3996))
    assert source == "pipe-menon"
    S = estimate_smaps(raw, arm, k, dcf, im_size, cutoff=0.15)
    A = acq_images(raw, arm, k, dcf, S, im_size)
    assert A.shape == (6, 320, 320) and torch.isfinite(A.abs()).all()
    frame = raw[:3].transpose(0, 1)[None][:, :, [1, 2, 0]]                         # (frame, coil, arm, sample), sorted by arm
    picture = gridding(frame, k, dcf, S, im_size)[0]
    assert error(A[:3].sum(0), picture) < 1e-5 and error(A[3:].sum(0), picture) < 1e-5
    seen = picture.abs().flatten()
    assert float(torch.corrcoef(torch.stack([seen, head.flatten()]))[0, 1]) > 0.9


def test_two_arms_and_thirteen_from_the_same_images(scan):
    A = run(scan)[:26].reshape(13, 2, 84, 84)
    frames = scan["kspace"][:26].reshape(13, 2, 5, 630).transpose(1, 2)
    pairs = scan["arm"][:26].reshape(13, 2)
    args = (frames, scan["ktraj"], scan["dcf"], scan["S"], (84, 84))
    assert error(gridding(*args, arm=pairs), A.sum(1)) < 1e-5
    p = torch.tensor([0.2, 0.9])
    assert error(combine_arms(arm_images(*args, arm=pairs), p), (p[:, None, None] * A).sum(1)) < 1e-6
    assert error(combine_arms(A, p.expand(13, 2)), (p[:, None, None] * A).sum(1)) < 1e-6


# ---- a real measurement


@pytest.mark.skipif(not PHANTOM.is_file(), reason="no real spiral measurement beside this checkout (shared/data/spiral_phantom)")
def test_real_phantom():
    k, file = read_ktraj(PHANTOM), scipy.io.loadmat(PHANTOM)
    assert k.shape == (60, 1182, 2)
    raw, theirs = torch.as_tensor(file["data"]).permute(1, 2, 0).to(torch.complex64), torch.as_tensor(file["w"].T).float()
    dcf, source = density(k, (360, 360), theirs)
    assert source == "file"
    ours = pipe_menon(k, (360, 360), 10)
    inner = slice(20, -20)
    assert float(torch.corrcoef(torch.stack([ours[:, inner].flatten(), theirs[:, inner].flatten()]))[0, 1]) > 0.98
    op = Nufft(k, (360, 360))
    picture, with_ours = (rss(op.adjoint(raw.transpose(0, 1) * w)) for w in (dcf, ours))
    rows, cols = slice(100, 110), slice(200, 210)                                  # a patch, by the exact sum
    waves = lambda n, kk: torch.exp(2j * torch.pi * kk.reshape(-1).double()[:, None] * (torch.arange(360)[n] - 180))
    weighted = (raw.transpose(0, 1) * dcf).reshape(8, 1, -1).to(torch.complex128)
    patch = rss((weighted * waves(rows, k[..., 1]).T) @ waves(cols, k[..., 0]) / 360)
    assert error(picture[rows, cols], patch) < 1e-3
    inside = picture > 0.1 * picture.max()
    assert 0.05 < float(inside.float().mean()) < 0.5                               # bottles on a dark ground
    assert float(torch.corrcoef(torch.stack([picture[inside], with_ours[inside]]))[0, 1]) > 0.99


# ---- peers


def test_agrees_with_sigpy():
    sigpy = pytest.importorskip("sigpy", reason="the peer sigpy is not installed")
    x, k = random(2, 40, 33), USC13.ktraj()[:5, ::6]
    coord = k.flip(-1).numpy() * np.array([40, 33], dtype=np.float32)             # rows first, in cycles per field of view
    theirs = torch.from_numpy(sigpy.nufft(x.numpy(), coord, oversamp=2, width=6))
    assert error(Nufft(k, (40, 33))(x), theirs) < 1e-3
    y = random(2, *k.shape[:-1], seed=1)
    back = torch.from_numpy(sigpy.nufft_adjoint(y.numpy(), coord, oshape=(2, 40, 33), oversamp=2, width=6))
    assert error(Nufft(k, (40, 33)).adjoint(y), back) < 1e-3


def test_density_makes_no_worse_a_picture_than_sigpys():
    mri = pytest.importorskip("sigpy.mri", reason="the peer sigpy is not installed")
    k, op, head = USC13.ktraj(), Nufft(USC13.ktraj(), (84, 84)), toy_head()
    theirs = torch.from_numpy(np.asarray(mri.pipe_menon_dcf(k.numpy() * 84, img_shape=(84, 84), show_pbar=False))).abs().float()
    def scaled_error(w):
        p = op.adjoint(w * op(head)).real
        return error(p * (p * head).sum() / p.square().sum(), head)
    assert scaled_error(pipe_menon(k, (84, 84))) < min(0.03, 1.02 * scaled_error(theirs))
