"""Iterative reconstruction: the normal operator's promises, solvers against closed forms and each other, bad input, a measured phantom."""
from pathlib import Path

import numpy as np
import pytest
import torch

from sirem_nb.kspace import iterative
from sirem_nb.kspace.iterative import (SenseNormal, Wavelet, cg_sense, compress_coils, gradient, gradient_adjoint, lam_scale, metric,
                                       objective, sense_problem, tv, wavelet)
from sirem_nb.kspace.nufft import Nufft, exact_adjoint, exact_dft
from sirem_nb.kspace.spiral import USC13

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def random(*shape, seed=0, real=False):
    return torch.randn(*shape, dtype=torch.float32 if real else torch.complex64, generator=torch.Generator().manual_seed(seed))


def error(a, b):
    a, b = a.detach().cpu().to(torch.complex128), b.detach().cpu().to(torch.complex128)
    return float((a - b).norm() / b.norm())


def inner(a, b):
    return torch.vdot(a.cpu().to(torch.complex128).flatten(), b.cpu().to(torch.complex128).flatten())


def maps(coils, *im_size):
    ny, nx = im_size
    y, x = torch.meshgrid(torch.arange(ny) / ny - 0.5, torch.arange(nx) / nx - 0.5, indexing="ij")
    a = 2 * torch.pi * torch.arange(coils)[:, None, None] / coils
    S = torch.exp(-2 * ((x - 0.7 * a.cos())**2 + (y - 0.7 * a.sin())**2) + 1j * (a + 2 * x * a.sin() - y * a.cos()))
    return S / S.abs().square().sum(0).sqrt()


def scattered(*shape):
    return torch.rand(*shape, 2, generator=torch.Generator().manual_seed(1)) - 0.5


# ---- the normal operator

NORMALS = {  # ktraj (arm, sample, 2), coils, (ny, nx), arms of the frames, weighted
    "usc13": (lambda: USC13.ktraj(), 8, (84, 84), None, False),
    "usc13 weighted pairs": (lambda: USC13.ktraj(), 3, (84, 84), [[0, 7], [7, 0], [3, 12]], True),
    "odd and oblong": (lambda: scattered(5, 70), 3, (21, 34), [[4, 1], [0, 2], [3, 3]], True),
    "one coil, one arm": (lambda: scattered(1, 40), 1, (9, 8), None, False),
    "tiny": (lambda: scattered(2, 5), 2, (1, 2), None, True),
    "corners": (lambda: torch.tensor([[[-0.5, -0.5], [0.5, 0.5], [0.5, -0.5], [0.0, 0.0], [0.4999, -0.25]]]), 2, (16, 15), None, False),
}


@pytest.fixture(params=[(n, d) for n in NORMALS for d in DEVICES], ids=lambda p: "-".join(p))
def normal(request):
    name, device = request.param
    make, coils, im_size, arm, weighted = NORMALS[name]
    ktraj, S = make(), random(coils, *im_size, seed=2)
    w = torch.rand(ktraj.shape[:2], generator=torch.Generator().manual_seed(3)) if weighted else None
    arm = torch.arange(len(ktraj)).expand(3, -1) if arm is None else torch.tensor(arm)
    return SenseNormal(ktraj, S.to(device), arm, w), (ktraj, S, arm, w, device)


def exactly(x, ktraj, S, arm, w):
    out = []
    for v, a in zip(x, arm):
        y = exact_dft(v * S, ktraj[a]) * (1 if w is None else w[a].double())
        out.append((exact_adjoint(y, ktraj[a], S.shape[1:]) * S.conj().to(torch.complex128)).sum(0))
    return torch.stack(out)


def test_normal_is_the_exact_one(normal):
    N, (ktraj, S, arm, w, device) = normal
    x = random(3, *S.shape[1:])
    assert error(N(x.to(device)), exactly(x, ktraj, S, arm, w)) < 1e-5


def test_normal_agrees_with_the_nufft(normal):
    N, (ktraj, S, arm, w, device) = normal
    x = random(3, *S.shape[1:])
    long = []
    for v, a in zip(x, arm):
        op = Nufft(ktraj[a], S.shape[1:], eps=1e-6)
        long.append((op.adjoint(op(v * S) * (1 if w is None else w[a])) * S.conj()).sum(0))
    assert error(N(x.to(device)), torch.stack(long)) < 1e-5


def test_normal_is_hermitian_and_positive(normal):
    N, (_, S, _, _, device) = normal
    u, v = random(3, *S.shape[1:]).to(device), random(3, *S.shape[1:], seed=1).to(device)
    Nu, Nv = N(u), N(v)
    assert abs(inner(u, Nv) - inner(Nu, v)) < 1e-5 * float(Nu.norm() * v.norm())
    for a, b in zip(u, Nu):
        assert inner(a, b).real > -1e-5 * float(a.norm() * Nu.norm())


def test_normal_is_linear(normal):
    N, (_, S, _, _, device) = normal
    u, v = random(3, *S.shape[1:]).to(device), random(3, *S.shape[1:], seed=1).to(device)
    assert error(N((0.3 - 1.2j) * u - 0.7 * v), (0.3 - 1.2j) * N(u) - 0.7 * N(v)) < 1e-5
    assert float(N(0 * u).abs().max()) == 0


def test_normal_frames_stand_alone(normal):
    N, (_, S, _, _, device) = normal
    x = random(3, *S.shape[1:]).to(device)
    for i in range(3):
        assert error(N(x[i:i + 1], torch.tensor([i])), N(x)[i:i + 1]) < 1e-5
    many = x.repeat(5, 1, 1)
    assert error(N(many, torch.arange(3).repeat(5)), N(x).repeat(5, 1, 1)) < 1e-5
    assert N(x[:0], torch.arange(0)).shape == (0, *S.shape[1:])


def test_many_different_sets_of_arms():
    ktraj, S = scattered(9, 40), maps(2, 12, 10)
    arm = torch.stack([torch.randperm(9, generator=torch.Generator().manual_seed(i))[:4] for i in range(120)])
    N = SenseNormal(ktraj, S, arm)
    assert len(N.sets) > 64 and N.kernels is None                     # kernels are made when needed
    x = random(120, 12, 10)
    assert error(N(x), exactly(x, ktraj, S, arm, None)) < 1e-5


# ---- transforms and regularisers


@pytest.mark.parametrize("im_size", [(84, 84), (32, 48), (16, 16)])
@pytest.mark.parametrize("name", ["db4", "haar", "sym4"])
def test_wavelet_is_orthonormal(im_size, name):
    psi = Wavelet(im_size, name)
    x, c = random(2, *im_size), random(2, *im_size, seed=1)
    assert error(psi.inverse(psi(x)), x) < 1e-5 and error(psi(psi.inverse(c)), c) < 1e-5
    assert abs(inner(c, psi(x)) - inner(psi.inverse(c), x)) < 1e-5 * float(c.norm() * x.norm())


def test_wavelet_is_pywavelets():
    import pywt
    x = random(16, 32)
    low, *details = pywt.wavedec2(x.numpy(), "db4", mode="periodization", level=1)
    c = Wavelet((16, 32), levels=1)(x)
    assert error(c[:8, :16], torch.from_numpy(low)) < 1e-5
    assert error(c[8:, :16], torch.from_numpy(details[0][0])) < 1e-5 and error(c[:8, 16:], torch.from_numpy(details[0][1])) < 1e-5


def test_gradient_adjoint_and_size():
    x, g = random(2, 7, 9), random(2, 2, 7, 9, seed=1)
    assert abs(inner(g, gradient(x)) - inner(gradient_adjoint(g), x)) < 1e-5 * float(g.norm() * x.norm())
    v = random(1, 7, 9)
    for _ in range(200):
        v = gradient_adjoint(gradient(v)); v = v / v.norm()
    assert float(gradient_adjoint(gradient(v)).norm()) < 8


# ---- solvers on a problem small enough to write down as a matrix


@pytest.fixture(scope="module")
def small():
    ktraj, S = scattered(6, 90), maps(3, 16, 16)
    arm = torch.tensor([[0, 1, 2, 4], [3, 5, 1, 0]])
    w = torch.rand(6, 90, generator=torch.Generator().manual_seed(4)) + 0.05
    x = torch.zeros(2, 16, 16, dtype=torch.complex64)
    x[0, 4:11, 3:12], x[1, 6:14, 6:9] = 1, 1j
    y = torch.stack([exact_dft(v * S, ktraj[a]) for v, a in zip(x, arm)]).to(torch.complex64)
    y = y + 0.05 * random(*y.shape, seed=5)
    return y, ktraj, S, arm, w


def dense(small, weighted):
    """A^H W A and A^H W y of every frame, as matrices in float64."""
    y, ktraj, S, arm, w = small
    eye = torch.eye(256, dtype=torch.complex128).reshape(256, 1, 16, 16)
    for m, a in zip(y, arm):
        A = exact_dft(eye * S.to(torch.complex128), ktraj[a]).reshape(256, -1).T
        W = (w[a] if weighted else torch.ones_like(w[a])).double().expand(3, -1, -1).reshape(-1, 1)
        yield A, W, m.reshape(-1, 1).to(torch.complex128)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("lam", [0.01, 0.3])
def test_cg_is_the_closed_form(small, weighted, lam):
    y, ktraj, S, arm, w = small
    sol = cg_sense(y, ktraj, S, arm, w if weighted else None, lam=lam, n_iter=150, record=True)
    best = torch.stack([torch.linalg.solve(A.mH @ (W * A) + lam * torch.eye(256), A.mH @ (W * m)).reshape(16, 16) for A, W, m in dense(small, weighted)])
    assert error(sol.image, best) < 1e-3
    assert bool((sol.objective.diff(dim=0) < 1e-5 * sol.objective[0]).all())


def optimality(small, x, lam, weighted, psi, approx):
    """How far -gradient is from lam times a subgradient of |Psi x|_1, relative to lam."""
    worst = 0
    for v, (A, W, m) in zip(x, dense(small, weighted)):
        slope = psi((A.mH @ (W * (A @ v.reshape(-1, 1).to(torch.complex128) - m))).reshape(16, 16).to(torch.complex64))
        c, price = psi(v), lam * psi.charged(approx)
        zero = c.abs() < 1e-6
        gap = torch.where(zero, (slope.abs() - price).clamp_min(0), (slope + price * c / c.abs().clamp_min(1e-30)).abs())
        worst = max(worst, float(gap.max()) / lam)
    return worst


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("approx", [False, True])
def test_wavelet_meets_the_optimality_conditions(small, weighted, approx):
    y, ktraj, S, arm, w = small
    w = w if weighted else None
    lam = 0.05 * lam_scale(y, ktraj, S, arm, w)
    sol = wavelet(y, ktraj, S, arm, w, lam=lam, n_iter=800, approx=approx, rank=4)
    assert optimality(small, sol.image, lam, weighted, Wavelet((16, 16)), approx) < 0.02
    assert optimality(small, sol.image * 1.02, lam, weighted, Wavelet((16, 16)), approx) > 0.05      # and would notice


@pytest.mark.parametrize("isotropic", [True, False])
def test_tv_has_no_better_neighbour(small, isotropic):
    """F is convex: a picture that no step in any tried direction improves, and that a long plain run agrees with, is the lowest."""
    y, ktraj, S, arm, _ = small
    lam, reg = 0.02 * lam_scale(y, ktraj, S, arm), "tv" if isotropic else "tv-aniso"
    F = lambda x: objective(x, y, ktraj, S, arm, lam=lam, reg=reg)
    fast = tv(y, ktraj, S, arm, lam=lam, n_iter=1500, isotropic=isotropic, rank=8).image
    plain = tv(y, ktraj, S, arm, lam=lam, n_iter=4000, isotropic=isotropic, rank=0, x0=torch.zeros_like(fast)).image
    assert error(fast, plain) < 2e-3
    lowest = F(fast)
    for seed in range(8):
        step = random(2, 16, 16, seed=seed)
        assert bool((F(fast + 0.02 * step / step.abs().max()) > lowest).all())
    assert bool((F(0.98 * fast) > lowest).all()) and bool((F(fast.mean() + 0 * fast) > lowest).all())


SOLVERS = {"cg": (cg_sense, "tikhonov"), "wavelet": (wavelet, "wavelet"), "tv": (tv, "tv")}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", SOLVERS)
def test_objective_is_what_the_judge_says(small, name, device):
    y, ktraj, S, arm, w = small
    solve, reg = SOLVERS[name]
    for weights in (None, w):
        lam = 0.01 * lam_scale(y, ktraj, S, arm, weights)
        sol = solve(y.to(device), ktraj, S, arm, weights, lam=lam, n_iter=25, record=True)
        judged = objective(sol.image.cpu(), y, ktraj, S, arm, weights, lam, reg)
        assert sol.objective.shape == (26, 2) and sol.n_iter == 25 and sol.image.device.type == device
        assert bool(((sol.objective[-1].cpu() - judged).abs() < 1e-3 * judged).all())
        zero = objective(torch.zeros_like(sol.image).cpu(), y, ktraj, S, arm, weights, lam, reg)
        assert torch.allclose(sol.objective[0].cpu(), zero, rtol=1e-4) and bool((judged < 0.2 * zero).all())


@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_do_not_mind_batches_order_or_scale(small, name):
    y, ktraj, S, arm, _ = small
    solve, _ = SOLVERS[name]
    lam = 0.01 * lam_scale(y, ktraj, S, arm)
    both = solve(y, ktraj, S, arm, lam=lam, n_iter=20)
    flipped = solve(y.flip(0), ktraj, S, arm.flip(0), lam=lam, n_iter=20, batch=1)
    assert error(flipped.image.flip(0), both.image) < 1e-3
    order = torch.tensor([2, 0, 3, 1])                                # arms of a frame in another order: the same question
    assert error(solve(y[:, :, order], ktraj, S, arm[:, order], lam=lam, n_iter=20).image, both.image) < 1e-3
    factor = 1 if name == "cg" else 50                                # of a quadratic price lam has no unit of the data
    assert error(solve(50 * y, ktraj, S, arm, lam=factor * lam, n_iter=20).image, 50 * both.image) < 1e-3


@pytest.mark.parametrize("name", SOLVERS)
def test_warm_start_and_tolerance(small, name):
    y, ktraj, S, arm, _ = small
    solve, reg = SOLVERS[name]
    lam = 0.01 * lam_scale(y, ktraj, S, arm)
    settled = solve(y, ktraj, S, arm, lam=lam, n_iter=600, tol=1e-5)
    assert settled.n_iter < 600
    again = solve(y, ktraj, S, arm, lam=lam, n_iter=600, tol=1e-4, x0=settled.image)
    assert again.n_iter < settled.n_iter / 2 and error(again.image, settled.image) < 1e-2
    assert solve(y, ktraj, S, arm, lam=lam, n_iter=0, x0=settled.image).image.equal(settled.image) or name == "wavelet"


@pytest.mark.parametrize("name", SOLVERS)
def test_no_frames_and_no_signal(small, name):
    y, ktraj, S, arm, _ = small
    solve, _ = SOLVERS[name]
    assert solve(y[:0], ktraj, S, arm[:0], lam=0.1).image.shape == (0, 16, 16)
    silent = solve(0 * y, ktraj, S, arm, lam=0.1, n_iter=5, record=True)
    assert float(silent.image.abs().max()) == 0 and float(silent.objective.abs().max()) == 0


# ---- the claims of the notebook, on a spiral of 13 arms


@pytest.fixture(scope="module")
def spiral():
    from sirem_nb.kspace.spiral import toy_head
    ktraj, S, head = USC13.ktraj(), maps(8, 84, 84), toy_head()
    y = Nufft(ktraj, (84, 84), eps=1e-6)(head * S)[None]
    return y + 0.02 * random(*y.shape), ktraj, S


@pytest.mark.parametrize("solve, enough", [(wavelet, 20), (tv, 45)])
def test_few_iterations_are_within_a_thousandth(spiral, solve, enough):
    """Without density weights, prices from cheap to dear."""
    for relative in (3e-4, 1e-3):
        lam = relative * lam_scale(*spiral)
        curve = solve(*spiral, lam=lam, n_iter=200, record=True).objective[:, 0]
        assert float(curve[enough] / curve.min()) < 1.001
        reg = "wavelet" if solve is wavelet else "tv"
        assert float(objective(solve(*spiral, lam=lam, n_iter=enough).image, *spiral, lam=lam, reg=reg) / curve.min()) < 1.001


def test_metric_lies_above_the_operator(spiral):
    _, ktraj, S = spiral
    arm = torch.tensor([[0, 1], [5, 9], [3, 12]])
    for rank, psi in ((24, None), (24, Wavelet((84, 84))), (0, None)):
        N = SenseNormal(ktraj, S, arm)
        ruler = metric(N, rank, psi)
        see = (lambda v: psi(N(psi.inverse(v)))) if psi else N
        v = random(3, 84, 84, seed=6)
        assert error(ruler.solve(ruler.times(v)), v) < 1e-4
        for _ in range(60):                                           # towards the direction where the operator exceeds it most
            v = ruler.solve(see(v)); v = v / v.flatten(1).norm(dim=1)[:, None, None]
        ratio = (v.conj() * see(v)).real.sum((1, 2)) / (v.conj() * ruler.times(v)).real.sum((1, 2))
        assert float(ratio.max()) < 1.0
        assert float(ratio.max()) > 0.7                               # and not far above


def test_coil_compression(spiral):
    y, ktraj, S = spiral
    k, s, kept = compress_coils(y, S, 8)
    assert abs(kept - 1) < 1e-6 and error(sense_problem(k, ktraj, s).b, sense_problem(y, ktraj, S).b) < 1e-4
    k, s, kept = compress_coils(y, S, 5)
    assert k.shape == (1, 5, 13, 630) and s.shape == (5, 84, 84) and 0.99 < kept < 1
    lam = 1e-3 * lam_scale(*spiral)
    full, few = wavelet(*spiral, lam=lam, n_iter=60).image, wavelet(k, ktraj, s, lam=lam, n_iter=60).image
    assert float(objective(few, *spiral, lam=lam, reg="wavelet") / objective(full, *spiral, lam=lam, reg="wavelet")) < 1.001


def test_setup_is_remembered_but_not_confused(spiral):
    y, ktraj, S = spiral
    a = cg_sense(y, ktraj, S, n_iter=3).image
    made = []
    original, iterative.arm_kernels = iterative.arm_kernels, lambda *args: made.append(1) or original(*args)
    try:
        assert cg_sense(y, ktraj.clone(), S, n_iter=3).image.equal(a) and not made
        assert error(cg_sense(y, ktraj * 0.9, S, n_iter=3).image, a) > 0.01 and len(made) == 1
    finally:
        iterative.arm_kernels = original
    assert len(iterative._kept) <= 8


# ---- bad input


def test_bad_input_is_refused_in_one_line(small):
    y, ktraj, S, arm, w = small
    hole = y.clone(); hole[1, 0, 2, 7] = float("nan")
    cases = [(dict(kspace=hole), "NaN"), (dict(kspace=y[:, :2]), "2 coils"), (dict(kspace=y[..., :80]), "80 samples"), (dict(kspace=y[0]), "expected kspace"),
             (dict(arm=None), "4 arms"), (dict(arm=arm + 3), "unknown arm"), (dict(arm=arm[:, :3]), "arms"), (dict(weights=w[:3]), "weights are"),
             (dict(weights=-w), "negative"), (dict(ktraj=ktraj * 16), "cycles/pixel"), (dict(x0=torch.zeros(2, 8, 8)), "x0"), (dict(lam=-1.0), "negative"),
             (dict(lam=float("nan")), "lam"), (dict(n_iter=-1), "n_iter")]
    for solve in (cg_sense, wavelet, tv):
        for change, says in cases:
            with pytest.raises(ValueError, match=says) as e:
                solve(**(dict(kspace=y, ktraj=ktraj, smaps=S, arm=arm, lam=0.1) | change))
            assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match="halved"):
        wavelet(y, ktraj, maps(3, 15, 15), arm, lam=0.1)
    with pytest.raises(ValueError, match="orthogonal"):
        wavelet(y, ktraj, S, arm, lam=0.1, wavelet="bior2.2")
    with pytest.raises(ValueError, match="no regulariser"):
        objective(torch.zeros(2, 16, 16), y, ktraj, S, arm, reg="ridge")
    with pytest.raises(ValueError, match="compressed"):
        compress_coils(y, S, 4)


# ---- a measured phantom

PHANTOM = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "spiral_phantom" / "spiral.mat"


@pytest.fixture(scope="module")
def phantom():
    if not PHANTOM.exists():
        pytest.skip("the measured spiral phantom is not here")
    import scipy.io
    m = scipy.io.loadmat(PHANTOM)
    k = torch.from_numpy(np.stack([m["k"].real, m["k"].imag], -1).astype(np.float32)).transpose(0, 1).contiguous().clamp(-0.5, 0.5)   # (60, 1182, 2)
    y = torch.from_numpy(m["data"].astype(np.complex64)).permute(2, 1, 0).contiguous()[None]                                         # (1, 8, 60, 1182)
    w = torch.from_numpy(np.asarray(m["w"], dtype=np.float32))
    w = (w if w.ndim == 2 and w.shape[1] == 60 else w.reshape(-1, 1).expand(-1, 60)).T.contiguous()
    return y / y.abs().max(), k, w / w.max()


def test_measured_phantom_is_at_least_as_close_as_sigpy(phantom):
    """Every 2nd and every 4th interleave by CG-SENSE against the picture of all 60; each package at its best iteration and price of a grid."""
    mri = pytest.importorskip("sigpy.mri", reason="sigpy is not installed")
    from sirem_nb.kspace.gridding import estimate_smaps, gridding
    y, k, w = phantom
    S = estimate_smaps(y[0].transpose(0, 1), torch.arange(60), k, w, (360, 360), cutoff=0.06, window=9)
    full = gridding(y, k, w, S, (360, 360))[0]
    inside = full.abs() > 0.1 * full.abs().max()
    y, S, kept = compress_coils(y, S, 4)                              # both packages get the same four virtual coils
    assert kept > 0.9

    def off(x):
        a, b = x[inside], full[inside]
        return float((torch.vdot(a, b) / a.abs().square().sum() * a - b).norm() / b.norm())

    for every in (2, 4):
        played = torch.arange(0, 60, every)
        coord = k[played].flip(-1).reshape(-1, 2).numpy() * 360
        ours, theirs = [], []
        for weights in (None, w[played]):
            problem = sense_problem(y[:, :, played], k[played], S, None, weights)
            for relative in (0.0, 5e-3):
                lam = relative * float(problem.b.abs().max())
                N = lambda v: problem.normal(v) + lam * v
                iterative._cg(N, problem.b, torch.zeros_like(problem.b), 12, None, lambda x, Nx: ours.append(off(x[0])) if bool(x.any()) else None)
                app = mri.app.SenseRecon(y[0][:, played].reshape(4, -1).numpy(), S.numpy(), coord=coord, lamda=lam, max_iter=12, show_pbar=False,
                                         weights=None if weights is None else weights.reshape(-1).numpy())
                step = app.alg.update
                app.alg.update = lambda: (step(), theirs.append(off(torch.from_numpy(np.array(app.x)))))
                app.run()
        gridded = off(gridding(y[:, :, played], k[played], w[played], S, (360, 360))[0])
        print(f"every {every}: gridding {gridded:.4f}, ours {min(ours):.4f}, sigpy {min(theirs):.4f}")
        assert len(ours) == len(theirs) == 48
        assert min(ours) <= 1.001 * min(theirs) and min(ours) < gridded      # the same method: the same picture, to three digits
