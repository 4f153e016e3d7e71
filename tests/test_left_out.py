"Arms really left out: the algebra of sets, the frames made of them, and scanners that play only some arms."
import itertools
import json

import h5py
import numpy as np
import pytest
import torch

from sirem_nb.data.mrd import read_mrd
from sirem_nb.fusion import left_out as L
from sirem_nb.fusion import train as T
from sirem_nb.fusion.arm_profile import normalise01
from sirem_nb.kspace.spiral import SpiralProtocol
from sirem_nb.speaker.corpus import simulate_corpus

SPLIT = {"train": ["sub001", "sub002"], "val": ["sub003"], "test": ["sub004"]}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("left_out")
    T.toy_corpus(root / "data", n_subjects=4, n_words=1, n_frames=16)
    return root


def random_arms_and_truth(seed=0, frames=6, n=7):
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(frames, 10, 8, generator=g)
    return x[:, None] / n + 0.1 * torch.randn(frames, n, 10, 8, dtype=torch.complex64, generator=g), x


@pytest.mark.parametrize("n,k", ((13, 1), (13, 2), (13, 3), (13, 4), (13, 6), (13, 12), (13, 13), (5, 3)))
def test_sets_have_k_different_arms_and_even_ones_are_even(n, k):
    for s in (L.even_arms(n, k), L.random_arms(n, k, seed=k)):
        assert len(s) == len(set(s)) == k and s == tuple(sorted(s)) and 0 <= s[0] and s[-1] < n and all(type(a) is int for a in s)
    gaps = np.diff((*L.even_arms(n, k), L.even_arms(n, k)[0] + n))
    assert gaps.max() - gaps.min() <= 1
    assert sorted((a - 2) % n for a in L.even_arms(n, k, turn=2)) == list(L.even_arms(n, k))
    assert L.random_arms(n, k, 1) == L.random_arms(n, k, 1)


def test_random_sets_depend_on_the_seed():
    assert len({L.random_arms(13, 4, seed) for seed in range(20)}) > 10


@pytest.mark.parametrize("k", (0, 14))
def test_impossible_numbers_are_refused(k):
    for f in (L.even_arms, L.random_arms):
        with pytest.raises(ValueError, match="choose 1 to 13"): f(13, k)


def test_error_of_a_set_is_the_error_of_its_pictures():
    arms, x = random_arms_and_truth()
    sums, t = L.arm_sums(arms, x), x * torch.exp(1j * arms.sum(1).angle())
    for s in ((0,), (1, 4), (0, 2, 3, 6), tuple(range(7))):
        y = arms[:, list(s)].sum(1)
        a = (y.conj() * t).sum().real / y.abs().square().sum()
        assert float(L.set_error(sums, s)) == pytest.approx(float((a * y - t).abs().square().sum() / t.abs().square().sum()), rel=1e-4)
        for b in (0.9 * a, 1.1 * a): assert float(L.set_error(sums, s)) < float((b * y - t).abs().square().sum() / t.abs().square().sum())


def test_sums_of_recordings_add_up_and_brightness_does_not_matter():
    (a, x), (b, y) = random_arms_and_truth(0), random_arms_and_truth(1, frames=3)
    both, one = L.arm_sums(a, x) + L.arm_sums(b, y), L.arm_sums(torch.cat([a, b]), torch.cat([x, y]))
    assert torch.allclose(both.G, one.G) and torch.allclose(both.b, one.b) and both.e == pytest.approx(one.e)
    p = torch.rand(7, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True)
    assert float(L.set_error(one, p.detach())) == pytest.approx(float(L.set_error(one, 5 * p.detach())))
    assert torch.autograd.gradcheck(lambda q: L.set_error(one, q), p)
    g, = torch.autograd.grad(L.set_error(one, p), p)
    assert abs(float(g @ p.detach())) < 1e-9                              # a common factor has no gradient


@pytest.mark.parametrize("k", (1, 2, 3, 5))
def test_learned_sets_are_near_the_best_and_never_better(k):
    sums = L.arm_sums(*random_arms_and_truth())
    sets, errors = L.all_errors(sums, k)
    assert len(sets) == len(list(itertools.combinations(range(7), k)))
    best, learned = L.best_arms(sums, k), L.learned_arms(sums, k)
    assert float(L.set_error(sums, best)) == pytest.approx(float(errors.min()))
    assert float(errors.min()) - 1e-12 <= float(L.set_error(sums, learned)) <= float(errors.quantile(0.15))
    assert learned == L.learned_arms(sums, k) and len(learned) == k


def test_frames_of_chosen_arms_hold_nothing_of_the_others(corpus):
    whole = T.prepare(corpus / "data", 5, delta_s=0.1, cache=corpus / "cache")[0]
    some = T.prepare(corpus / "data", 5, delta_s=0.1, cache=corpus / "cache", arms=(1, 3))[0]
    i = torch.arange(len(some))
    assert torch.equal(some.arm_index, torch.tensor([[1, 3]]).expand(len(some), 2)) and len(some) == len(whole)
    assert torch.equal(some.arms(i), whole.arms(i)[:, [1, 3]])
    assert torch.equal(L.measured(some, i), normalise01(whole.arms(i)[:, [1, 3]].sum(1).abs()))
    assert torch.allclose(some.centre_s, (some.groups.double().mean(1) + 0.5) * some.facts["tr_s"])    # the middle of the arms that count
    with pytest.raises(ValueError, match="full rotations"): T.prepare(corpus / "data", 2, cache=corpus / "cache", arms=(1, 3))


def test_the_study_on_toys(corpus):
    records = L.left_out_study(corpus / "data", corpus / "out", (2, 5), split=SPLIT, cache=corpus / "cache", max_frames=8, prospective=(), folds=2, steps=5)
    assert records == json.loads((corpus / "out" / "left_out.json").read_text())
    assert all(not isinstance(v, (list, dict)) for r in records for v in r.values()) and {r["subject"] for r in records} == {"sub004"}
    sets = {(r["k"], r["choice"]) for r in records if r["mode"] == "retrospective"}
    assert sets == {(2, c) for c in ("even", "learned", "in a row", "random")} | {(5, "all")}
    assert {r["method"] for r in records} == {"gridding", "sirem-lsq", "sirem-lsq-constant", "mean-image"}
    value = lambda m, k: np.mean([r["value"] for r in records if r["mode"] == "retrospective" and (r["method"], r["k"], r["region"]) == (m, k, "frame")])
    assert value("gridding", 2) < value("gridding", 5) and value("sirem-lsq-constant", 2) > max(value("gridding", 2), value("mean-image", 2))


def test_a_scanner_that_plays_only_some_arms(tmp_path):
    "The same speaker again, with two arms of five: only these are in the file, and a frame takes two TR."
    protocol = SpiralProtocol(n_arms=5, n_samples=400, matrix=32)
    settings = dict(seconds=1.0, n_coils=2, transient=False)
    first = simulate_corpus(tmp_path / "data", 1, ("apa",), protocol, n_workers=1, **settings)[0]
    again = L.record_again(tmp_path / "data", tmp_path / "again", ["sub001"], (0, 2), seconds=1.0)[0]
    a, b = read_mrd(first.raw), read_mrd(again.raw)
    assert set(b.arm.tolist()) == {0, 2} and b.tr_s == a.tr_s and b.n_arms == a.n_arms and b.n_acq == a.n_acq
    with h5py.File(first.truth) as f, h5py.File(again.truth) as g: assert np.array_equal(f["frames"][:], g["frames"][:])   # he says and does the same
    p = T.prepare([again], 2, delta_s=0.1, cache=tmp_path / "cache")[0]
    assert len(p) == b.n_acq // 2 and torch.allclose(p.centre_s.diff(), torch.tensor(2 * b.tr_s, dtype=torch.float64), atol=1e-9)
    film, truth, masks = L.at_every_truth(p, {"gridding": L.measured(p, p.use.nonzero()[:, 0])})
    assert film["gridding"].shape == truth.shape == masks.shape and len(truth) >= len(p) - 2
