"""Ours beside other packages on the same data: gridding, CG-SENSE, wavelet, total variation. Each test skips where its peer is not installed."""
import pytest
import torch

from sirem_nb.kspace import peers
from sirem_nb.kspace.density import pipe_menon
from sirem_nb.kspace.iterative import cg_sense, lam_scale, objective, tv
from sirem_nb.kspace.nufft import exact_adjoint, exact_dft
from sirem_nb.kspace.spiral import USC13, SpiralProtocol, toy_head

HERE = peers.peers()


def need(name):
    if name not in HERE:
        pytest.skip(f"{name} is not installed: {peers.PEERS[name][1]}")


def error(a, b):
    return float((a - b).norm() / b.norm())


def scan(ktraj, n, coils=8, frames=2, noise=2e-3):
    """Frames of a head that gets brighter, with coils around it, by the exact sum; noise relative to the largest sample."""
    y, x = torch.meshgrid(*[torch.arange(n) / n - 0.5] * 2, indexing="ij")
    a = 2 * torch.pi * torch.arange(coils)[:, None, None] / coils
    S = torch.exp(-2 * ((x - 0.7 * a.cos()) ** 2 + (y - 0.7 * a.sin()) ** 2)) * torch.exp(1j * (a + 2 * (x * a.sin() - y * a.cos())))
    S = S / S.abs().square().sum(0).sqrt()
    movie = torch.stack([toy_head(n) * (1 + 0.3 * f) for f in range(frames)])
    k = exact_dft(movie[:, None] * S, ktraj).to(torch.complex64)
    noise = noise * k.abs().max() * torch.randn(k.shape, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    return dict(kspace=k + noise, ktraj=ktraj, smaps=S), pipe_menon(ktraj, (n, n))


@pytest.fixture(scope="module")
def usc():
    return scan(USC13.ktraj(), 84)


@pytest.fixture(scope="module")
def small():
    """A smaller matrix whose sides halve evenly or not (44): other sizes than the one everything was made for."""
    return scan(SpiralProtocol(n_arms=7, n_samples=500, matrix=44, tr_s=5e-3).ktraj(), 44, coils=5)


@pytest.mark.parametrize("name", peers.GRIDDING)
@pytest.mark.parametrize("size", ["usc", "small"])
def test_gridding(name, size, request):
    if name != "sirem-nb":
        need(name)
    data, dcf = request.getfixturevalue(size)
    k, ktraj, S = data["kspace"], data["ktraj"], data["smaps"]
    exact = (exact_adjoint(k * dcf, ktraj, S.shape[1:]) * S.conj()).sum(1)
    there = peers.GRIDDING[name](ktraj, dcf, S, threads=1)(k)
    ours = peers.GRIDDING["sirem-nb"](ktraj, dcf, S)(k)
    assert there.shape == exact.shape
    assert error(there, exact) < 5e-3 and error(ours, exact) < 1e-3 and error(there, ours) < 0.01


# their picture, ours, the objective of both; iterations enough for each to settle
def common(data, dcf, weighted):
    w = dcf if weighted else None
    return dict(**data, weights=w, lam=2e-3 * lam_scale(**data, weights=w))


@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "unweighted"])
@pytest.mark.parametrize("peer", ["sigpy", "bart"])
def test_cg_sense(usc, peer, weighted):
    need(peer)
    both = common(*usc, weighted)
    both["lam"] *= 5                              # well posed, so that 40 steps are enough for all
    theirs = peers.sigpy_cg(n_iter=40, **both) if peer == "sigpy" else peers.bart_pics(reg="l2", n_iter=40, threads=1, **both)
    assert error(theirs, cg_sense(n_iter=40, **both).image) < 0.01


@pytest.mark.parametrize("size", ["usc", "small"])
@pytest.mark.parametrize("peer", ["sigpy", "bart"])
def test_wavelet(size, peer, request):
    need(peer)
    data, dcf = request.getfixturevalue(size)
    data = data | {"kspace": data["kspace"][:1]}
    both, n = common(data, dcf, True), data["smaps"].shape[1:]
    psi = peers.sigpy_psi(n) if peer == "sigpy" else peers.bart_psi(n)
    theirs = peers.sigpy_wavelet(n_iter=100, **both) if peer == "sigpy" else peers.bart_pics(reg="W", n_iter=100, threads=1, **both)
    ours = peers.peer_wavelet(psi=psi, n_iter=150, **both)
    assert error(theirs, ours) < 0.01
    value = lambda x: float(peers.peer_objective(x, psi=psi, **both))
    assert value(ours) < value(theirs) * 1.0001


@pytest.mark.parametrize("peer", ["sigpy", "bart"])
def test_total_variation(usc, peer):
    need(peer)
    data, dcf = usc
    both = common(data | {"kspace": data["kspace"][:1]}, dcf, True)
    theirs = peers.sigpy_tv(n_iter=200, **both) if peer == "sigpy" else peers.bart_pics(reg="T", n_iter=100, threads=1, **both)
    ours = tv(n_iter=200, isotropic=peer == "bart", **both).image
    assert error(theirs, ours) < 0.01
    value = lambda x: float(objective(x, reg="tv" if peer == "bart" else "tv-aniso", **both))
    assert value(ours) < value(theirs) * 1.0001


def test_frames_with_their_own_arms():
    """The second frame played other arms than the first: every frame must meet its own coordinates."""
    need("sigpy")
    data, dcf = scan(USC13.ktraj(), 84)
    arm = torch.tensor([[0, 2, 4, 6, 8, 10, 12], [1, 3, 5, 7, 9, 11, 0]])
    k = torch.stack([data["kspace"][f][:, a] for f, a in enumerate(arm)])
    both = dict(kspace=k, ktraj=data["ktraj"], smaps=data["smaps"], arm=arm, weights=dcf, lam=0.05)
    assert error(peers.sigpy_cg(n_iter=30, **both), cg_sense(n_iter=30, **both).image) < 0.01


# ---- what needs no peer


def test_absent_peer_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(peers.PEERS, "sigpy", ("no_such_module", "pip install sigpy"))
    monkeypatch.setitem(peers.PEERS, "bart", (None, "apt-get install bart"))
    monkeypatch.setattr(peers.shutil, "which", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install sigpy"):
        peers.sigpy_cg(None, None, None)
    with pytest.raises(ModuleNotFoundError, match="apt-get install bart"):
        peers.bart("version")
    assert "sigpy" not in peers.peers() and "bart" not in peers.peers()


@pytest.mark.parametrize("mode", ["zero", "symmetric"])
@pytest.mark.parametrize("size", [(84, 84), (45, 62), (16, 17)])
def test_peer_wavelets_come_back(size, mode):
    psi = peers.PeerWavelet(size, "db2", mode, 2)
    x = torch.randn(3, *size, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    assert error(psi.inverse(psi(x)), x) < 1e-5
    if mode == "zero":                            # an isometry
        assert abs(float(psi(x).norm() / x.norm()) - 1) < 1e-5


def test_unknown_regulariser():
    with pytest.raises(ValueError, match="choose one of"):
        peers.bart_pics(None, None, None, reg="X")
