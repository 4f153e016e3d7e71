"""Every linear operator of the library goes through the same questions: adjoint, linear, exact, gradient, batch shapes, dtype, device."""
from dataclasses import dataclass
from functools import lru_cache
from typing import Callable

import pytest
import torch

from sirem_nb.kspace.coils import combine
from sirem_nb.kspace.gridding import acq_images, arm_images, combine_arms, gridding
from sirem_nb.kspace.nufft import Nufft, backends, exact_adjoint, exact_dft
from sirem_nb.kspace.spiral import USC13

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def random(*shape, seed=0, real=False):
    return torch.randn(*shape, dtype=torch.float32 if real else torch.complex64, generator=torch.Generator().manual_seed(seed))


def inner(a, b):
    return torch.vdot(a.detach().cpu().to(torch.complex128).flatten(), b.detach().cpu().to(torch.complex128).flatten())


def error(a, b):
    a, b = a.detach().cpu().to(torch.complex128), b.detach().cpu().to(torch.complex128)
    return float((a - b).norm() / b.norm())


@dataclass
class Case:
    there: Callable         # (batch, *shape_in) -> (batch, *shape_out)
    back: Callable          # its adjoint
    exact: Callable         # the same as there, in float64
    exact_back: Callable
    shape_in: tuple
    shape_out: tuple
    tolerance: float = 1e-3  # relative l2 against float64
    dot: float = 1e-6        # adjoint mismatch, relative to the lengths of both sides


def spiral(arms, samples, turns):
    t = torch.linspace(0, 1, samples).sqrt()
    phase = 2 * torch.pi * (turns * t + torch.arange(arms)[:, None] / arms)
    return torch.stack([0.5 * t * phase.cos(), 0.5 * t * phase.sin()], -1)


def scattered(*shape):
    return torch.rand(*shape, 2, generator=torch.Generator().manual_seed(1)) - 0.5


TRAJECTORIES = {  # name: (trajectory, (ny, nx))
    "usc13": (lambda: USC13.ktraj(), (84, 84)),
    "three-long-arms": (lambda: spiral(3, 3996, 30), (320, 320)),
    "odd": (lambda: spiral(5, 101, 4), (37, 51)),
    "narrow": (lambda: scattered(4, 60), (6, 90)),
    "one-arm-no-arm-axis": (lambda: USC13.ktraj()[4], (84, 84)),
    "many-axes": (lambda: scattered(2, 3, 4), (9, 8)),
    "tiny": (lambda: scattered(5), (1, 2)),
    "corners": (lambda: torch.tensor([[-0.5, -0.5], [0.5, 0.5], [0.5, -0.5], [0.0, 0.0], [0.4999, -0.25]]), (16, 15)),
}


def nufft_case(trajectory, backend, device):
    ktraj, im_size = TRAJECTORIES[trajectory][0](), TRAJECTORIES[trajectory][1]
    op = Nufft(ktraj, im_size, backend, device=device)
    return Case(op.forward, op.adjoint, lambda x: exact_dft(x, ktraj), lambda y: exact_adjoint(y, ktraj, im_size), im_size, tuple(ktraj.shape[:-1]))


def coil_maps(coils, *im_size):
    S = random(coils, *im_size, seed=2)
    return S / S.abs().square().sum(0).sqrt()


def combine_case(device):
    S = coil_maps(5, 20, 21).to(device)
    S64 = S.cpu().to(torch.complex128)
    return Case(lambda x: combine(x, S), lambda m: m[..., None, :, :] * S, lambda x: (x.to(torch.complex128) * S64.conj()).sum(-3),
                lambda m: m.to(torch.complex128)[..., None, :, :] * S64, (5, 20, 21), (20, 21))


def recon_case(which, device):
    """Raw data (coil, arm, sample) of one frame -> picture; the batch axis is the frame. 5 arms of 7 are played, in a foreign order."""
    full, im_size, played = spiral(7, 90, 3), (30, 26), torch.tensor([4, 0, 6, 1, 3])
    dcf, S = torch.rand(7, 90, generator=torch.Generator().manual_seed(3)) + 0.1, coil_maps(4, *im_size)
    w, S64, k = dcf[played].double(), S.to(torch.complex128), full[played]
    p = torch.tensor([0.3, 1.0, 0.0, 0.7, 0.2]) if which == "weighted arms" else torch.ones(5)
    common = (full.to(device), dcf.to(device), S.to(device), im_size)

    def there(y):
        if which == "gridding":
            return gridding(y, *common, arm=played)
        if which == "acq_images":
            A = acq_images(y.transpose(1, 2).reshape(-1, 4, 90), played.repeat(len(y)), *common)
            return A.reshape(len(y), 5, *im_size).sum(1)
        return combine_arms(arm_images(y, *common, arm=played), p)

    op = Nufft(k, im_size, device=device, eps=1e-3)            # what gridding asks for: the same operator, so the exact adjoint
    weight = (p[:, None] * dcf[played]).to(device)
    return Case(there, lambda m: weight * op(m[..., None, :, :] * S.to(device)),
                lambda y: (S64.conj() * exact_adjoint(y.to(torch.complex128) * w * p[:, None], k, im_size)).sum(-3),
                lambda m: w * p[:, None] * exact_dft(m.to(torch.complex128)[..., None, :, :] * S64, k), (4, 5, 90), im_size)


CASES = {f"nufft-{t}-{b}": (lambda d, t=t, b=b: nufft_case(t, b, d)) for t in TRAJECTORIES for b in backends()}
CASES |= {"combine": combine_case}
CASES |= {w.replace(" ", "-"): (lambda d, w=w: recon_case(w, d)) for w in ("gridding", "acq_images", "weighted arms")}


@pytest.fixture(scope="module", params=[(n, d) for n in CASES for d in DEVICES], ids=lambda p: "-".join(p))
def case(request):
    name, device = request.param
    c = CASES[name](device)
    c.device = device
    c.same_as = name if "nufft" not in name else name.rsplit("-", 1)[0] + "-" + backends()[0]
    return c


@lru_cache(maxsize=1)
def exact_pair(what):
    """In float64, once for all backends (they follow each other)."""
    c = CASES[what]("cpu")
    return c.exact(random(2, *c.shape_in)), c.exact_back(random(2, *c.shape_out, seed=1))


def test_agrees_with_float64(case):
    x, y = random(2, *case.shape_in), random(2, *case.shape_out, seed=1)
    there, back = exact_pair(case.same_as)
    assert error(case.there(x.to(case.device)), there) < case.tolerance
    assert error(case.back(y.to(case.device)), back) < case.tolerance


def test_adjoint(case):
    x, y = random(2, *case.shape_in), random(2, *case.shape_out, seed=1)
    Ax, Ay = case.there(x.to(case.device)), case.back(y.to(case.device))
    assert abs(inner(y, Ax) - inner(Ay, x)) < case.dot * float(Ax.abs().norm() * y.abs().norm() + Ay.abs().norm() * x.abs().norm())


def test_linear(case):
    a, b = 0.3 - 1.2j, -0.7 + 0.1j
    for f, shape in ((case.there, case.shape_in), (case.back, case.shape_out)):
        u, v = random(1, *shape).to(case.device), random(1, *shape, seed=1).to(case.device)
        assert error(f(a * u + b * v), a * f(u) + b * f(v)) < 1e-5
        assert float(f(0 * u).abs().max()) == 0


def test_gradient(case):
    """L(x) = |A x - d|^2 is a parabola along any line, so a central difference is exact but for rounding."""
    for f, shape_in, shape_out in ((case.there, case.shape_in, case.shape_out), (case.back, case.shape_out, case.shape_in)):
        d, v = random(1, *shape_out, seed=3).to(case.device), random(1, *shape_in, seed=4).to(case.device)
        x = random(1, *shape_in, seed=5).to(case.device).requires_grad_()
        loss = lambda x: (f(x) - d).abs().double().square().sum()
        loss(x).backward()
        by_autograd = float(inner(v, x.grad).real)
        with torch.no_grad():
            by_difference = float(loss(x + v) - loss(x - v)) / 2
            size = float(loss(v) + loss(x))
        assert abs(by_autograd - by_difference) < 1e-4 * size


def test_batch_of_none(case):
    assert tuple(case.there(torch.zeros(0, *case.shape_in, dtype=torch.complex64, device=case.device)).shape) == (0, *case.shape_out)


def test_batch_is_one_by_one(case):
    x = random(19, *case.shape_in) if max(case.shape_in) < 200 else random(3, *case.shape_in)
    together, single = case.there(x.to(case.device)), torch.cat([case.there(u[None].to(case.device)) for u in x])
    assert together.shape == (len(x), *case.shape_out) and together.dtype == torch.complex64 and together.device.type == case.device
    assert error(together, single) < 1e-5


# ---- what only the NUFFT promises


@pytest.fixture(scope="module", params=backends())
def usc(request):
    return Nufft(USC13.ktraj(), (84, 84), request.param)


@pytest.mark.parametrize("batch", [(), (1,), (2, 3), (2, 1, 3), (0,), (2, 0)])
def test_leading_axes(usc, batch):
    x, y = random(*batch, 84, 84), random(*batch, 13, 630)
    assert usc(x).shape == (*batch, 13, 630) and usc.adjoint(y).shape == (*batch, 84, 84)
    if x.numel():
        assert error(usc(x).reshape(-1), torch.stack([usc(u) for u in x.reshape(-1, 84, 84)]).reshape(-1)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128, torch.int32, torch.uint8])
def test_any_dtype_in_complex64_out(usc, dtype):
    x = (100 * random(84, 84, real=True).abs()).to(dtype)
    out = usc(x)
    assert out.dtype == torch.complex64
    assert error(out, exact_dft(x, USC13.ktraj())) < 1e-3


def test_odd_memory_layouts(usc):
    x = random(3, 84, 84)
    y = random(13, 630, 3)
    assert error(usc(x.transpose(1, 2)), usc(x.transpose(1, 2).contiguous())) < 1e-6
    assert error(usc.adjoint(y.permute(2, 0, 1)), usc.adjoint(y.permute(2, 0, 1).contiguous())) < 1e-6
    assert error(usc(x.conj()), usc(x.conj().resolve_conj())) < 1e-6       # a lazy conjugate
    assert error(usc(x[:1].expand(4, 84, 84)), usc(x[:1].repeat(4, 1, 1))) < 1e-6


def test_real_input_has_real_gradient(usc):
    x = random(84, 84, real=True).requires_grad_()
    d = random(13, 630)
    (usc(x) - d).abs().square().sum().backward()
    assert x.grad.dtype == torch.float32
    assert error(x.grad, 2 * usc.adjoint(usc(x.detach()) - d).real) < 1e-4


def test_second_derivative(usc):
    x, v = random(84, 84).requires_grad_(), random(84, 84, seed=1)
    loss = usc(x).abs().square().sum()
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    (hv,) = torch.autograd.grad((grad * v.conj()).real.sum(), x)          # H v = 2 A^H A v
    assert error(hv, 2 * usc.adjoint(usc(v))) < 1e-4


def test_backends_agree_in_scale():
    x, k = random(4, 84, 84), USC13.ktraj()
    results = [Nufft(k, (84, 84), b)(x) for b in backends()]
    for r in results[1:]:
        assert error(r, results[0]) < 1e-3
        assert abs(float(inner(results[0], r).real / inner(results[0], results[0]).real) - 1) < 1e-4
