"""The other methods on whole recordings, and the choice of their settings."""
import json

import pytest
import torch

from sirem_nb.data.frames import cut_frames
from sirem_nb.data.mrd import read_mrd
from sirem_nb.evaluate.image import best_scale
from sirem_nb.fusion import baselines
from sirem_nb.fusion.baselines import SCORES, best_settings, ready, references, run_baseline, score_film, solve_frames, tune, tuning_frames, write_tuned
from sirem_nb.fusion.train import toy_corpus
from sirem_nb.kspace.density import density
from sirem_nb.kspace.gridding import estimate_smaps, gridding
from sirem_nb.kspace.temporal import METHODS, tuned


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toys")
    return folder, toy_corpus(folder, n_subjects=2, n_words=1, n_frames=14)


def test_gridding_is_that_of_the_chapter(toys):
    r = toys[1][0]
    x, centre_s, seconds = run_baseline(r, "gridding", 2)
    scan = read_mrd(r.raw)
    f, (dcf, _) = cut_frames(scan, 2, False), density(scan.ktraj, scan.im_size, scan.dcf_column)
    S = estimate_smaps(scan.kspace, scan.arm, scan.ktraj, dcf, scan.im_size)
    by_hand = gridding(f.kspace, scan.ktraj, dcf, S, scan.im_size, f.arm).abs() * scan.n_arms / 2
    assert torch.allclose(x, by_hand, rtol=1e-4, atol=1e-5) and torch.equal(centre_s, f.centre_s) and seconds > 0


@pytest.mark.parametrize("method", METHODS)
def test_scan_path_recording_and_disk_are_the_same(toys, method):
    r = toys[1][0]
    s = tuned(method, 5) | ({} if method == "gridding" else {"n_iter": 3})
    films = [run_baseline(thing, method, None, s, max_frames=6, first=3) for thing in (r, r.raw, read_mrd(r.raw), read_mrd(r.raw, on_disk=True))]
    assert films[0][0].shape == (6, 32, 32) and films[0][0].dtype == torch.float32
    for x, centre_s, _ in films[1:]:
        assert torch.equal(centre_s, films[0][1]) and (x - films[0][0]).norm() < 1e-4 * films[0][0].norm()


def test_blocks_do_not_show(toys):
    p = ready(toys[1][0], 5)
    i, s = torch.arange(11), dict(lam=0.1, n_iter=5, weighted=True)
    whole = solve_frames(p, "cg-sense", s, i)
    assert (solve_frames(p, "cg-sense", s, i, block=3) - whole).norm() < 1e-4 * whole.norm()


def test_time_helps_where_arms_are_few(toys):
    "Two of five arms: temporal TV is nearer to the truth than any method that treats each frame by itself."
    r = toys[1][1]
    score = {}
    for m in METHODS:
        x, centre_s, _ = run_baseline(r, m, 2)
        score[m] = score_film(x, *references(r, centre_s))["psnr_both"]
    assert score["temporal-tv"] > max(score[m] for m in ("gridding", "cg-sense", "wavelet", "tv")) + 1


def test_tune_chooses_the_best_and_stores_it(toys, tmp_path):
    folder, recordings = toys
    tries = {"temporal-tv": [dict(lam=l, n_iter=8, weighted=True) for l in (1e-4, 0.02, 3.0)], "cg-sense": [dict(lam=l, n_iter=8, weighted=w) for l in (0.1, 10.0) for w in (True, False)]}
    records, best = tune(folder, ["sub002"], ("temporal-tv", "cg-sense"), (2, 5), tries, max_frames=12, seed=1)
    assert len(records) == 2 * (3 + 4) * (len(SCORES) + 1) and all(not isinstance(v, (dict, list)) for r in records for v in r.values())
    assert best["temporal-tv"]["2"]["lam"] == 0.02 and set(best) == set(tries) and best == best_settings(records)
    for A in (2, 5):                                              # the winner's score, computed again
        p = ready(recordings[1], A)
        i = tuning_frames(p, "temporal-tv", 12, 1)
        again = [score_film(solve_frames(p, "temporal-tv", s, i), *references(recordings[1], p.centre_s[i]))["psnr_both"] for s in tries["temporal-tv"]]
        stored = [r["value"] for r in records if r["method"] == "temporal-tv" and r["arms_per_frame"] == A and r["metric"] == "psnr_both"]
        assert again == pytest.approx(stored, rel=1e-4)
        assert tries["temporal-tv"][again.index(max(again))] == best["temporal-tv"][str(A)]
    write_tuned(tmp_path / "tuned.json", records, best, seed=1, subjects=["sub002"])
    found = json.loads((tmp_path / "tuned.json").read_text())
    assert found["settings"] == best and found["about"]["seed"] == 1 and len(found["records"]) == len(records)
    assert tuned("temporal-tv", 2, tmp_path / "tuned.json") == best["temporal-tv"]["2"]


def test_frames_to_tune_on_leave_the_transient_out():
    class Scan: pass
    r = Scan()
    r.arm, r.transient = torch.zeros(50, 2), torch.arange(50) < 20
    assert tuning_frames(r, "wavelet", 10, 0).tolist() == torch.linspace(20, 49, 10).round().long().tolist()
    stretch = tuning_frames(r, "temporal-tv", 10, 3)
    assert stretch[0] >= 20 and stretch[-1] < 50 and set(stretch.diff().tolist()) == {1}
    assert torch.equal(stretch, tuning_frames(r, "temporal-tv", 10, 3)) and not torch.equal(stretch, tuning_frames(r, "temporal-tv", 10, 4))
    assert len(tuning_frames(r, "temporal-tv", 100, 0)) == 30


def test_score_has_one_factor_for_the_film(toys):
    r = toys[1][0]
    truth, inside = references(r, ready(r, 5).centre_s)
    assert score_film(3 * truth, truth, inside)["psnr"] > 100
    uneven = truth * torch.linspace(0.5, 1.5, len(truth))[:, None, None]
    assert score_film(uneven, truth, inside)["psnr"] < 40
    assert float(best_scale(3 * truth, truth)) == pytest.approx(1 / 3)


def test_bad_input(toys, tmp_path):
    with pytest.raises(ValueError, match="choose one of"): run_baseline(toys[1][0], "magic")
    with pytest.raises(ValueError, match="no recording of"): tune(toys[0], ["sub009"], ("tv",), (2,))
    with pytest.raises(ValueError, match="no recording of"): tune(toys[0], [], ("tv",), (2,))
    with pytest.raises(FileNotFoundError): run_baseline(tmp_path / "none.h5", "gridding")
    blind = baselines.find_recordings(toys[0])[0]
    blind.truth = None
    with pytest.raises(ValueError, match="no truth"): references(blind, torch.zeros(1))
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(ValueError, match="sirem tune"): tuned("tv", 2, tmp_path / "x.json")
    with pytest.raises(FileNotFoundError): tuned("tv", 2, tmp_path / "none.json")
