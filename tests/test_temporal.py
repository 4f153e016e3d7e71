"""Reconstruction of films: the optimum against its own conditions, limits in closed form, windows, memory, the one door."""
import json, os, subprocess, sys

import pytest
import torch

from sirem_nb.kspace.iterative import cg_sense, lam_scale, objective
from sirem_nb.kspace.nufft import exact_adjoint, exact_dft
from sirem_nb.kspace.temporal import (METHODS, frame_by_frame, frame_windows, largest_singular_value, low_rank_sparse, prox_temporal, reconstruct,
                                      shrink_rank, temporal_tv, temporal_variation, tuned)

NY, NX, ARMS, SAMPLES, COILS = 10, 8, 4, 30, 3


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.complex64, generator=torch.Generator().manual_seed(seed))


def problem(NY, NX):
    "Nine frames of two arms, noisy data of a film that changes in a few places; and the film."
    g = torch.Generator().manual_seed(3)
    ktraj = torch.rand(ARMS, SAMPLES, 2, generator=g) - 0.5
    S = random(COILS, NY, NX, seed=1)
    S = S / S.abs().square().sum(0).sqrt()
    film = random(1, NY, NX, seed=2).repeat(9, 1, 1)
    film[4:, 3:5, 2:6] += 1.5
    film[6, 7, 1] -= 2j
    arm = torch.tensor([[(2 * t) % ARMS, (2 * t + 1) % ARMS] for t in range(9)])
    weights = 0.2 + torch.rand(ARMS, SAMPLES, generator=g)
    kspace = torch.stack([exact_dft(m * S, ktraj[a]) for m, a in zip(film, arm)]).to(torch.complex64)
    return dict(kspace=kspace + 0.02 * random(*kspace.shape, seed=4), ktraj=ktraj, smaps=S, arm=arm, weights=weights), film


@pytest.fixture(scope="module")
def small(): return problem(NY, NX)


@pytest.fixture(scope="module")
def square(): return problem(16, 16)                             # large enough for a wavelet


def slopes(x, d, weights):
    "The gradient of the data term, in float64 by the sums themselves."
    out = []
    for m, y, a in zip(x, d["kspace"], d["arm"]):
        residual = exact_dft(m * d["smaps"], d["ktraj"][a]) - y
        w = 1 if weights is None else weights[a]
        out.append((exact_adjoint(residual * w, d["ktraj"][a], (NY, NX)) * d["smaps"].conj()).sum(0))
    return torch.stack(out)


@pytest.mark.parametrize("weighted, lam", [(True, 0.02), (False, 0.2)])
def test_temporal_tv_meets_the_conditions_of_its_optimum(small, weighted, lam):
    "The running sum of the slopes is the force on a jump: never above lam, equal to lam along every open jump, zero in the end."
    d, _ = small
    w = d["weights"] if weighted else None
    x = temporal_tv(**{**d, "weights": w}, lam=lam, n_iter=800, inner=10).image
    force, gap = slopes(x, d, w).cumsum(0), x.diff(dim=0).to(torch.complex128)
    assert force[-1].abs().max() < 0.02 * lam
    assert force[:-1].abs().max() < 1.02 * lam
    open_ = gap.abs() > 0.02
    assert 0 < open_.sum() < open_.numel()
    assert (force[:-1][open_] / lam - gap[open_] / gap[open_].abs()).abs().max() < 0.05


def test_a_strong_weight_gives_the_one_picture_that_fits_all_frames(small):
    d, _ = small
    x = temporal_tv(**d, lam=1e3, n_iter=400, inner=10).image
    one = cg_sense(d["kspace"].transpose(1, 2).reshape(1, -1, COILS, SAMPLES).transpose(1, 2), d["ktraj"], d["smaps"], d["arm"].reshape(1, -1), d["weights"], n_iter=300).image
    assert (x - one).norm() < 2e-2 * one.norm() * 3
    assert x.diff(dim=0).abs().max() < 1e-3


def test_recorded_objective_is_the_defined_one_and_falls(small):
    d, _ = small
    s = temporal_tv(**d, lam=0.1, n_iter=60, record=True)
    defined = objective(s.image, **d) + 0.1 * temporal_variation(s.image)
    assert s.objective.shape == (61, 9)
    assert torch.allclose(s.objective[-1], defined, rtol=1e-3, atol=1e-4)
    total = s.objective.sum(1)
    assert total[-1] < 0.9 * total[0] and total[-1] <= 1.01 * total.min()
    again = temporal_tv(**d, lam=0.1, n_iter=5, x0=s.image, record=True)
    assert abs(float(again.objective[0].sum() / total[-1]) - 1) < 1e-5
    assert temporal_tv(**d, lam=0.1, n_iter=200, tol=1e-2).n_iter < 200


@pytest.mark.parametrize("frames", [1, 2, 7])
@pytest.mark.parametrize("block", [1, 5, 10_000])
def test_prox_in_blocks(frames, block):
    v = random(frames, 4, 3)
    x, state = prox_temporal(v, 0.4, jump=0.2, n_iter=300, block=block)
    y, _ = prox_temporal(v, 0.4, jump=0.2, n_iter=300)
    assert (x - y).abs().max() < 1e-5 and (x.sum(0) - v.sum(0)).abs().max() < 1e-4
    if frames == 2:                                              # closed form: both ends move towards each other by s
        gap = v[1] - v[0]
        less = gap * (1 - 2 * 0.4 / gap.abs()).clamp_min(0)
        assert (x[1] - x[0] - less).abs().max() < 1e-3
    assert torch.equal(prox_temporal(v, 0.0)[0], v)


def test_windows_cover_every_frame_once_with_room_at_the_edges():
    for n in (1, 5, 44, 45, 100, 257, 1000):
        for window, overlap in ((44, 14), (256, 14), (11, 5), (1, 0)):
            parts = frame_windows(n, window, overlap)
            assert [k for _, (a, b) in parts for k in range(a, b)] == list(range(n))
            for (a, b), (c, d) in parts:
                assert b - a <= max(window, 1) and a <= c and d <= b
                assert (c == 0 or c - a >= overlap) and (d == n or b - d >= overlap)
    with pytest.raises(ValueError, match="leaves none"): frame_windows(100, 28, 14)


def test_windows_change_little_and_fill_an_array_that_is_given(small):
    d, _ = small
    whole = temporal_tv(**d, lam=0.05, n_iter=300).image
    into = torch.zeros(9, NY, NX, dtype=torch.complex64)
    parts = temporal_tv(**d, lam=0.05, n_iter=300, window=7, overlap=2, into=into)
    assert parts.image is into
    assert 0 < (into - whole).norm() < 0.1 * whole.norm()


MEMORY = """
import sys, tempfile, h5py, numpy as np, torch
torch.set_num_threads(1)
from sirem_nb.kspace.temporal import temporal_tv
n, N = int(sys.argv[1]), 40
peak = lambda: int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])
g = np.random.default_rng(0)
with tempfile.TemporaryDirectory() as folder:
    with h5py.File(folder + "/x.h5", "w") as f:
        k, x = f.create_dataset("k", (n, 4, 2, 200), np.complex64, chunks=(16, 4, 2, 200)), f.create_dataset("x", (n, N, N), np.complex64, chunks=(16, N, N))
        for i in range(0, n, 20): k[i:i + 20] = g.normal(size=(20, 4, 2, 200)).astype(np.complex64)
        ktraj, S = torch.as_tensor(g.random((6, 200, 2)) - 0.5).float(), torch.ones(4, N, N) / 2
        arm = torch.arange(2 * n).reshape(n, 2) % 6
        run = lambda m: temporal_tv(k, ktraj, S, arm, lam=0.1, n_iter=2, window=56, overlap=4, into=x) if m else None
        before = peak()
        run(1)
        print(peak() - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the peak memory is read from /proc, which only Linux has")
def test_memory_does_not_grow_with_the_recording():
    "Raw data in a file, pictures into a file: ten times the frames, not twice the memory."
    strict = os.environ | {"MALLOC_MMAP_THRESHOLD_": "500000", "MALLOC_ARENA_MAX": "1"}            # freed memory goes back at once, so the peak is what is in use
    grown = [int(subprocess.run([sys.executable, "-c", MEMORY, str(n)], capture_output=True, text=True, check=True, env=strict).stdout) for n in (60, 600)]
    assert grown[0] > 5_000, "the short run shows no memory: the test measures nothing"
    assert grown[1] < 2 * grown[0], grown


@pytest.mark.parametrize("transform", ["fft", "difference"])
def test_low_rank_sparse(small, transform):
    d, film = small
    s = low_rank_sparse(**d, lam_low=0.3, lam_sparse=0.05, n_iter=80, transform=transform, record=True)
    total = s.objective.sum(1)
    assert total[-1] < 0.5 * total[0] and total[-1] <= 1.01 * total.min()
    static = low_rank_sparse(**d, lam_low=0.3, lam_sparse=1e4, n_iter=80, transform=transform).image
    if transform == "fft":                                       # nothing moves, so the picture is L alone: of low rank
        values = torch.linalg.svdvals(static.flatten(1))
        assert (values > 1e-3 * values[0]).sum() < 9
    black = low_rank_sparse(**d, lam_low=1e4, lam_sparse=1e4, n_iter=20, transform="fft").image
    assert black.abs().max() == 0
    with pytest.raises(ValueError, match="fft or difference"): low_rank_sparse(**d, transform="wavelet")


def test_rank_steps_against_the_svd():
    m = random(6, 5, 4)
    u, sv, vh = torch.linalg.svd(m.flatten(1), full_matrices=False)
    assert (shrink_rank(m, 1.5).flatten(1) - (u * (sv - 1.5).clamp_min(0)) @ vh).abs().max() < 1e-4
    assert abs(largest_singular_value(m) - float(sv[0])) < 1e-4


def test_frame_by_frame(small):
    d, _ = small
    k = {**d, "arm": None, "kspace": torch.stack([exact_dft(d["smaps"] * m, d["ktraj"]) for m in small[1][2:6]]).to(torch.complex64)}
    cold = frame_by_frame(cg_sense, **k, tol=None, n_iter=4, warm=False, lam=0.01)
    together = cg_sense(**k, n_iter=4, lam=0.01)
    assert (cold.image - together.image).norm() < 1e-4 * together.image.norm() and cold.n_iter == 4
    done, warm = cg_sense(**k, n_iter=60, lam=0.01).image, frame_by_frame(cg_sense, **k, tol=None, n_iter=4, lam=0.01).image
    assert (warm[2] - done[2]).norm() < (cold.image[2] - done[2]).norm()         # frame 2 looks like frame 1: the warm start is ahead


def test_every_method_through_the_one_door(square):
    d, film = square
    dcf = torch.full((ARMS, SAMPLES), 256 / (ARMS * SAMPLES))
    for method in METHODS:
        s = reconstruct(method, d["kspace"], d["ktraj"], dcf, d["smaps"], d["arm"])
        assert s.image.shape == film.shape and s.image.dtype == torch.complex64 and bool(torch.isfinite(s.image.abs()).all())
    weak = dict(lam=1e-3, n_iter=30, weighted=False)
    by_hand = temporal_tv(**{**d, "weights": None}, lam=1e-3 * lam_scale(d["kspace"], d["ktraj"], d["smaps"], d["arm"]), n_iter=30).image
    assert torch.allclose(reconstruct("temporal-tv", d["kspace"], d["ktraj"], dcf, d["smaps"], d["arm"], weak).image, by_hand, atol=1e-5)
    assert "weighted" in weak                                    # the caller's settings are left alone
    with pytest.raises(ValueError, match="choose one of"): reconstruct("tvl", d["kspace"], d["ktraj"], dcf, d["smaps"], d["arm"])


def test_brightness_is_that_of_a_full_rotation(small):
    d, _ = small
    still = random(1, NY, NX, seed=9)
    k = torch.stack([exact_dft(still[0] * d["smaps"], d["ktraj"][a]) for a in d["arm"]]).to(torch.complex64)
    dcf = torch.full((ARMS, SAMPLES), NY * NX / (ARMS * SAMPLES))
    level = lambda x: float(torch.vdot(still[0].flatten(), x.mean(0).flatten()).real / still.abs().square().sum())
    assert abs(level(reconstruct("gridding", k, d["ktraj"], dcf, d["smaps"], d["arm"]).image) - 1) < 0.3
    assert abs(level(reconstruct("temporal-tv", k, d["ktraj"], dcf, d["smaps"], d["arm"], dict(lam=1e-3, n_iter=60)).image) - 1) < 0.1


def test_scaled_data_give_scaled_pictures(small):
    "Raw data have any unit: relative weights must not notice."
    d, _ = small
    dcf = torch.full((ARMS, SAMPLES), NY * NX / (ARMS * SAMPLES))
    for method, s in (("cg-sense", dict(lam=0.1, n_iter=20)), ("tv", dict(lam=0.01, n_iter=20)), ("temporal-tv", dict(lam=0.02, n_iter=20)), ("low-rank-sparse", dict(lam_low=1.0, lam_sparse=0.05, n_iter=20))):
        one, big = (reconstruct(method, f * d["kspace"], d["ktraj"], dcf, d["smaps"], d["arm"], s).image for f in (1, 1e4))
        assert (big / 1e4 - one).norm() < 2e-3 * one.norm()


def test_stored_settings():
    for method in METHODS:
        a, b = tuned(method, 13), tuned(method, 2)
        assert all(isinstance(s, dict) and (method == "gridding" or s["n_iter"] > 0) for s in (a, b))
        a["lam"] = "changed"
        assert tuned(method, 13).get("lam") != "changed"
        assert tuned(method, 3) == b and tuned(method, 50) == tuned(method, 13)
    with pytest.raises(ValueError, match="no method 'x'"): tuned("x", 13)
    json.dumps([tuned(m, 2) for m in METHODS])


def test_bad_input(small):
    d, _ = small
    with pytest.raises(ValueError, match="coils"): temporal_tv(**{**d, "smaps": d["smaps"][:2]}, lam=1)
    with pytest.raises(ValueError, match="unknown arm"): temporal_tv(**{**d, "arm": d["arm"] + 3}, lam=1)
    with pytest.raises(ValueError, match="0 or more"): temporal_tv(**d, lam=-1)
    broken = d["kspace"].clone()
    broken[2, 1, 0, 3] = torch.nan
    with pytest.raises(ValueError, match="NaN"): temporal_tv(**{**d, "kspace": broken}, lam=1)
