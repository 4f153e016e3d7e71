"The paper's tables on toys: numbers recomputed by hand, what is left out and why, files, bad input."
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from sirem_nb import report
from sirem_nb.data.frames import find_recordings
from sirem_nb.data.mrd import read_mrd
from sirem_nb.evaluate import perceptual
from sirem_nb.evaluate.image import psnr
from sirem_nb.fusion import tables as tb
from sirem_nb.fusion.arm_profile import normalise01
from sirem_nb.fusion.baselines import run_baseline
from sirem_nb.fusion.sirem import TOY
from sirem_nb.fusion.train import read_reference, toy_corpus, train_fusion

SPLIT = {"train": ["sub001"], "val": ["sub002"], "test": ["sub003"]}
FEW = ("gridding", "wavelet", "sirem-constant", "sirem", "sirem-other-audio")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("tables")
    toy_corpus(root/"data", n_subjects=3, n_words=2, n_frames=10, protocol=replace(TOY, matrix=48, n_samples=750))
    train_fusion(root/"data", root/"run", None, SPLIT, cache=root/"cache", epochs=1, hidden=(16,), oracle=False, lsq=False)
    return root


@pytest.fixture(scope="module")
def records(corpus):
    return tb.paper_tables(corpus/"data", corpus/"run", corpus/"out", FEW, arms_per_frame=5, max_frames=6, cache=corpus/"cache")


def test_a_score_is_what_it_says(corpus, records):
    "PSNR of gridding against the truth, from the files by hand; and every row of every target is there, once."
    r = next(r for r in find_recordings(corpus/"data") if r.subject == "sub003")
    x, centre, _ = run_baseline(r, "gridding", 5, max_frames=6)
    ref = read_reference(r, "truth", None, {"im_size": (48, 48)})
    near = [int(np.abs(ref["times_s"].numpy() - t).argmin()) for t in centre.tolist()]
    want = psnr(normalise01(x), normalise01(ref["frames"][near].float()), 1.0).mean().item()
    keys = [(q["recording"], q["target"], q["method"], q["region"], q["metric"]) for q in records if q["table"] == "paper"]
    assert len(keys) == len(set(keys))
    got = {k: q["value"] for k, q in zip(keys, (q for q in records if q["table"] == "paper"))}
    assert got[r.name, "truth", "gridding", "frame", "psnr"] == pytest.approx(want, abs=1e-3)
    assert {k[1] for k in keys} == set(tb.TARGETS) and {k[2] for k in keys} == set(FEW)
    assert not [k for k in keys if k[1] == k[2]]                          # no method is judged by itself
    for m in ("psnr", "ssim"): assert (r.name, "truth", "sirem", "articulators", m) in got
    assert got[r.name, "wavelet", "gridding", "frame", "psnr"] == pytest.approx(got[r.name, "gridding", "wavelet", "frame", "psnr"])


def test_times_are_per_frame_and_positive(records):
    t = {(q["method"], q["recording"]): q for q in records if q["table"] == "paper-time"}
    assert {k[0] for k in t} == {"gridding", "wavelet", "sirem"} and all(q["value"] > 0 and q["n"] == 6 and q["unit"] == "ms" for q in t.values())
    mean = lambda m: np.mean([q["value"] for k, q in t.items() if k[0] == m])
    assert mean("gridding") < mean("wavelet")


def test_the_tv_target_is_temporal_and_two_arms(corpus):
    r = find_recordings(corpus/"data")[0]
    scan, films = read_mrd(r.raw), {}
    f = tb.target_film(scan, r, "tv", 6*5*scan.tr_s, films)
    assert set(films) == {("temporal-tv", 2)} and len(f.frames) == 15
    assert tb.target_film(scan, r, "tv", 6*5*scan.tr_s, films) is f       # computed once
    assert f.centre_s[1] - f.centre_s[0] == pytest.approx(2*scan.tr_s)
    assert tb.same_picture("gridding", "gridding", 5, 5) and not tb.same_picture("gridding", "gridding", 2, 5)
    assert tb.same_picture("temporal-tv", "tv", 2, 5) and not tb.same_picture("tv", "tv", 5, 5)


def test_without_a_run_without_truth_without_sound(corpus, tmp_path):
    "A folder of raw files alone: classical methods against each other, no masks, no SIREM."
    import shutil
    r = find_recordings(corpus/"data")[0]
    home = tmp_path/"sub001"/"2drt"/"raw"; home.mkdir(parents=True); shutil.copy(r.raw, home)
    got = tb.paper_tables(tmp_path, None, None, ("gridding", "cg-sense", "sirem"), ("gridding", "truth"), 5, max_frames=3)
    assert {(q["method"], q["target"]) for q in got if q["table"] == "paper"} == {("cg-sense", "gridding")}
    assert {q["region"] for q in got if q["table"] == "paper"} == {"frame"}


def test_columns_that_cannot_be_computed_are_absent(corpus, records, tmp_path, monkeypatch):
    there = {q["metric"] for q in records if q["table"] == "paper"}
    assert {"ssim", "psnr", "hfen", "nrmse", "vif"} <= there
    assert {"lpips", "fd-alexnet"} <= there or "lpips" in perceptual.perceptual_missing()
    monkeypatch.setenv("SIREM_WEIGHTS", str(tmp_path))
    x = torch.rand(3, 48, 48, generator=torch.Generator().manual_seed(0))
    assert {k for _, k in tb.film_scores(x, 0.9*x)} == {"ssim", "psnr", "hfen", "nrmse", "vif"}


def made_up(gain):
    "Two recordings, one target; SIREM better than its control by gain[recording]."
    return [dict(table="paper", target="truth", method=m, region="frame", metric=k, recording=n, value=v + (m == "sirem")*gain[n]*sign)
            for m in ("sirem", "sirem-constant") for n in gain for k, v, sign in (("psnr", 20., 1), ("nrmse", .1, -.01))]


def test_audio_effect_has_the_right_sign_and_counts():
    e = {q["metric"]: q for q in tb.audio_effect(made_up({"a": 3., "b": -1.}))}
    assert e["psnr"]["value"] == pytest.approx(1.) and e["nrmse"]["value"] == pytest.approx(-.01)
    assert all(q["improves"] and q["n_better"] == 1 and q["n"] == 2 and q["control"] == "sirem-constant" for q in e.values())
    assert not any(q["improves"] for q in tb.audio_effect(made_up({"a": 0.})))
    assert tb.audio_effect([q for q in made_up({"a": 1.}) if q["method"] == "sirem"]) == []


def test_files_and_their_drawings(corpus, records):
    out = corpus/"out"
    assert json.loads((out/"paper_tables.json").read_text()) == json.loads(json.dumps(records))
    meta = json.loads((out/"paper_tables.meta.json").read_text())
    assert meta["recordings"] == 2 and meta["subjects"] == ["sub003"] and meta["threads"] >= 1 and "fid" in meta["left_out"] and set(meta["settings"]) == {"gridding", "wavelet"}
    shown = np.load(out/"paper_frames.npz")
    assert shown["target/truth"].shape == (5, 48, 48) and shown["target/truth"].dtype == np.uint8 and len(shown["times_s"]) == 5
    assert {k.split("/")[1] for k in shown if k.startswith("method/")} == set(FEW) & set(tb.FIGURE_2)
    written = report.write_paper_tables(out, records, out/"paper_frames.npz")
    assert [p.name for p in written] == ["paper.md", "paper_audio.png", "paper_times.png", "paper_frames.png"] and all(p.stat().st_size > 500 for p in written)
    text = (out/"paper.md").read_text()
    for t in tb.TARGETS: assert f"target: {report.TARGET_NAMES[t]}" in text
    row = next(line for line in text.splitlines() if line.startswith("| SIREM |"))
    assert row.count("|") == text.splitlines()[text.splitlines().index(row) - 1].count("|")
    assert set(report.METHODS) >= set(FEW) | set(tb.SIREM_ROWS) | set(tb.METHODS)     # every row has a name
    assert report.write_paper_tables(out/"bare", [q for q in records if q["method"] == "wavelet" and q["table"] == "paper"]) == [out/"bare"/"paper.md"]


def test_bad_input(corpus):
    data, run = corpus/"data", corpus/"run"
    with pytest.raises(ValueError, match="method 'magic'"): tb.paper_tables(data, run, methods=("magic",), arms_per_frame=5)
    with pytest.raises(ValueError, match="trained with 5"): tb.paper_tables(data, run, arms_per_frame=2)
    with pytest.raises(ValueError, match="test subjects"): tb.paper_tables([r for r in find_recordings(data) if r.subject == "sub001"], run, arms_per_frame=5)
    with pytest.raises(ValueError, match="target 'best'"): tb.paper_tables(data, run, None, ("gridding",), ("best",), 5, max_frames=2)
    with pytest.raises(FileNotFoundError): tb.paper_tables(data/"nowhere", run, arms_per_frame=5)


def test_a_lone_checkpoint_on_recordings_it_never_saw(corpus):
    "As for real movies with sound: no split, no ablations, all recordings."
    got = tb.paper_tables([r for r in find_recordings(corpus/"data") if r.subject == "sub003"], corpus/"run"/"best", None,
                          ("gridding", "sirem-constant", "sirem", "sirem-other-audio"), ("truth",), 5, max_frames=3, cache=corpus/"cache")
    assert {q["method"] for q in got if q["table"] == "paper"} == {"gridding", "sirem", "sirem-other-audio"}
    assert len({q["recording"] for q in got}) == 2
    everyone = tb.paper_tables(corpus/"data", corpus/"run", None, ("gridding", "sirem"), ("truth",), 5, None, 2, corpus/"cache")
    assert len({q["subject"] for q in everyone}) == 3
