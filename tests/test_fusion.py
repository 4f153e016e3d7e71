"SIREM on files: what a notebook cannot show well (caches, resuming, leaks of the answer, bad input)."
import json
import os
import shutil

import h5py
import numpy as np
import pytest
import torch

from sirem_nb.data.mrd import Scan, read_mrd, write_mrd, write_recon
from sirem_nb.data.sync import read_audio
from sirem_nb.fusion import sirem as S
from sirem_nb.fusion import train as T
from sirem_nb.fusion.arm_profile import ArmProfile, measured_image, normalise01, weighted_sum
from sirem_nb.fusion.fusion_map import least_squares_map, map_sums, mask_map
from sirem_nb.fusion.objective import mask_loss, psf_loss, total
from sirem_nb.fusion.sirem import Sirem, SiremConfig, acquisition_pictures, load_sirem, reconstruct
from sirem_nb.kspace.density import density
from sirem_nb.kspace.gridding import estimate_smaps, gridding

SPLIT = {"train": ["sub001"], "val": ["sub002"], "test": ["sub003"]}
SMALL = dict(hidden=(32, 32), delta_s=0.1, epochs=4, lr=2e-3, val_every=2, dropout=0.2)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    "Three toy subjects with two recordings each, and a cache."
    root = tmp_path_factory.mktemp("fusion")
    T.toy_corpus(root / "data", n_subjects=3, n_words=2, n_frames=16)
    return root


@pytest.fixture(scope="module")
def runs(corpus):
    "A run with five arms per frame and one with two."
    for n in (5, 2): T.train_fusion(corpus / "data", corpus / "run" / f"arms{n}", n, SPLIT, cache=corpus / "cache", **SMALL)
    return corpus / "run"


def prepared(corpus, **kw):
    return T.prepare(corpus / "data", **{"arms_per_frame": 5, "delta_s": 0.1, "cache": corpus / "cache", **kw})


@pytest.mark.parametrize("arms_per_frame", (5, 2, 3))
def test_weighted_arm_pictures_equal_gridding_of_weighted_kspace(corpus, arms_per_frame):
    "x_m = sum_i p_i A_i is eq. 13 with p on the k-space, for any arms per frame, p indexed by arm."
    p = prepared(corpus, arms_per_frame=arms_per_frame)[0]
    scan, weights = read_mrd(p.recording.raw), torch.rand(5, generator=torch.Generator().manual_seed(0))
    dcf, _ = density(scan.ktraj, scan.im_size, scan.dcf_column)
    smaps = estimate_smaps(scan.kspace, scan.arm, scan.ktraj, dcf, scan.im_size)
    kspace = scan.kspace[p.groups].transpose(1, 2) * weights[p.arm_index][:, None, :, None]
    long_way = gridding(kspace, scan.ktraj, dcf, smaps, scan.im_size, arm=p.arm_index)
    short_way = weighted_sum(p.arms(torch.arange(len(p))), weights[p.arm_index])
    assert (long_way - short_way).norm() / long_way.norm() < 1e-3
    assert torch.equal(p.arm_index, scan.arm[p.groups])


def test_a_common_factor_is_invisible_and_single_arms_are_not():
    arms = torch.randn(3, 7, 12, 10, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    p = torch.rand(7, generator=torch.Generator().manual_seed(1)) + 0.1
    assert torch.allclose(measured_image(arms, p), measured_image(arms, 100 * p), atol=1e-5)
    assert not torch.allclose(measured_image(arms, p), measured_image(arms, p * (torch.arange(7) > 3)), atol=1e-2)
    assert torch.equal(normalise01(torch.full((2, 4, 4), 3.0)), torch.zeros(2, 4, 4))


def test_gradient_of_the_profile_is_that_of_finite_differences():
    arms = torch.randn(2, 5, 6, 6, dtype=torch.complex128, generator=torch.Generator().manual_seed(0))
    p = torch.rand(5, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    assert torch.autograd.gradcheck(lambda q: weighted_sum(arms, q).abs(), p)
    target = torch.rand(2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert torch.autograd.gradcheck(lambda q: (measured_image(arms, q) - target).square().sum(), p, eps=1e-7, atol=1e-4)


def test_hard_top_k_has_exact_zeros_and_reaches_every_logit():
    profile = ArmProfile(13, k=4)
    torch.nn.init.normal_(profile.logits, generator=torch.Generator().manual_seed(0))
    p = profile()
    assert set(p.detach().round(decimals=6).tolist()) == {0.0, 1.0} and round(p.sum().item()) == 4
    (p * torch.arange(1.0, 14)).sum().backward()
    assert (profile.logits.grad != 0).all()


def test_the_printed_regularisers_are_energies():
    p, w = torch.rand(13, generator=torch.Generator().manual_seed(0)), torch.rand(9, 8, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(psf_loss(p), p.square().mean() / 13)
    assert torch.allclose(mask_loss(w), (1 - w).square().mean())
    out = {"x": w[None], "w": w, "p_all": p}
    expected = 0.1 * psf_loss(p) + 0.01 * ((p.sum() - 2) ** 2 + p.mean()) + 0.01 * mask_loss(w)   # the paper's weights and K
    assert torch.allclose(total(out, w[None])["loss"], expected)


def test_settings_are_the_papers():
    s = T.make_settings()
    assert (s.lr, s.weight_decay, s.batch_size, s.epochs, s.clip, s.val_every) == (1e-4, 1e-5, 8, 20, 1.0, 5)
    assert (s.alpha, s.beta, s.gamma, s.budget, s.hidden) == (0.1, 0.01, 0.01, 2, (1024, 2048))
    with pytest.raises(ValueError, match="no setting 'learning_rate'"): T.make_settings(learning_rate=1)


def test_the_cache_is_used_shared_and_renewed(corpus, tmp_path, monkeypatch):
    shutil.copytree(corpus / "data" / "sub001", tmp_path / "data" / "sub001")
    go = lambda **kw: T.prepare(tmp_path / "data", **{"arms_per_frame": 5, "cache": tmp_path / "cache", **kw})
    first = go()
    calls = []
    real_pictures, real_features = T.acquisition_pictures, T.pooled_features
    monkeypatch.setattr(T, "acquisition_pictures", lambda *a, **k: (calls.append("pictures"), real_pictures(*a, **k))[1])
    monkeypatch.setattr(T, "pooled_features", lambda *a, **k: (calls.append("features"), real_features(*a, **k))[1])
    second = go()
    assert calls == [] and all(torch.equal(a.features, b.features) for a, b in zip(first, second))
    go(arms_per_frame=2)
    assert calls == ["features"] * 2                                # the pictures serve any number of arms per frame
    go(delta_s=0.3)
    assert calls == ["features"] * 4
    raw = first[0].recording.raw
    scan = read_mrd(raw)
    write_mrd(raw, Scan(**{**vars(scan), "kspace": 2j * scan.kspace}))
    third = go()
    assert calls[4:] == ["pictures"] and not np.allclose(third[0].pictures, first[0].pictures)
    assert not list((tmp_path / "cache").glob("*tmp*"))


def test_pictures_are_mapped_not_loaded(corpus):
    p = prepared(corpus)[0]
    assert isinstance(p.pictures, np.memmap) and not p.pictures.flags.writeable
    scan = read_mrd(p.recording.raw)
    assert np.allclose(p.pictures, acquisition_pictures(scan).numpy(), atol=1e-6)


def test_target_is_the_nearest_reference_each_in_0_1(corpus):
    p = prepared(corpus)[0]
    with h5py.File(p.recording.truth) as f: frames, times = torch.from_numpy(f["frames"][:]).float(), f["frame_times_s"][:]
    for t in (0, 7, 15):
        best = np.abs(times - float(p.centre_s[t])).argmin()
        assert torch.allclose(p.target(torch.tensor([t]))[0], normalise01(frames[best]), atol=1e-6)
    x = p.target(torch.arange(16))
    assert torch.equal(x.amin((1, 2)), torch.zeros(16)) and torch.equal(x.amax((1, 2)), torch.ones(16))


def test_targets_of_other_kinds(corpus, tmp_path):
    shutil.copytree(corpus / "data" / "sub001", tmp_path / "sub001")
    recs = T.find_recordings(tmp_path)
    for r in recs: r.truth.unlink()
    with pytest.raises(ValueError, match="no reference picture"): T.prepare(tmp_path, 5, cache=tmp_path / "cache")
    own = T.prepare(tmp_path, 5, cache=tmp_path / "cache", target="gridding")[0]
    i = torch.arange(len(own))
    assert own.reference["kind"] == "gridding" and torch.allclose(own.target(i), normalise01(own.arms(i).sum(1).abs()), atol=2e-3)
    scan = read_mrd(recs[0].raw)
    film = torch.rand(40, 32, 32)
    for r in recs: write_recon(r.raw.parent.parent / "recon" / f"{r.name}_recon.h5", film, torch.arange(40) * 0.02, scan.pixel_mm, "test")
    p = T.prepare(tmp_path, 5, cache=tmp_path / "cache")[0]
    assert p.reference["kind"] == "recon" and torch.equal(p.reference["frames"], film)
    late = p.centre_s > 40 * 0.02 + 0.1
    assert late.any() and not p.use[late].any() and p.use[~late].any()    # frames without a reference near by do not count


def test_the_transient_is_not_trained_on(corpus, tmp_path):
    shutil.copytree(corpus / "data" / "sub001", tmp_path / "sub001")
    for r in T.find_recordings(tmp_path):
        scan = read_mrd(r.raw)
        scan.origin = "scanner"
        write_mrd(r.raw, scan)
    p = T.prepare(tmp_path, 5, cache=tmp_path / "cache")[0]
    assert p.transient.any() and not p.use[p.transient].any()
    assert {int(t) for _, t in T.FrameLoader([p]).where} == set(p.use.nonzero()[:, 0].tolist())


def test_loader_gives_each_frame_once_and_depends_on_seed_and_epoch_alone(corpus):
    data = prepared(corpus)[:3]
    loader = T.FrameLoader(data, batch_size=7, seed=3)
    key = lambda: torch.cat([b["features"].sum(1) for b in loader])
    a = key()
    assert len(a) == 48 and len(a.unique()) > 40 and torch.equal(a, key())
    loader.set_epoch(1)
    b = key()
    assert not torch.equal(a, b) and torch.equal(a.sort().values, b.sort().values)
    few = T.FrameLoader(data, batch_size=7, shuffle=False, per_epoch=10)
    assert sum(len(b["target"]) for b in few) == 10


def test_training_writes_a_run_that_can_be_loaded(runs):
    model = load_sirem(runs / "arms2")
    s = json.loads((runs / "arms2" / "settings.json").read_text())
    assert model.config.arms_per_frame == 2 and model.config.n_arms == 5 and s["map_from"] == "masks" and s["target_kind"] == "truth"
    assert json.loads((runs / "arms2" / "split.json").read_text()) == SPLIT
    history = json.loads((runs / "arms5" / "curves.json").read_text())["history"]
    assert len(history) == 4 and history[-1]["recon"] < history[0]["recon"] and "score" in history[1]
    best = max(h["score"] for h in history if "score" in h)
    data = T.prepare([r for r in T.find_recordings(runs.parent / "data") if r.subject == "sub002"], 5, delta_s=0.1, cache=runs.parent / "cache")
    model = load_sirem(runs / "arms5")
    with torch.no_grad(): score = torch.cat([T.psnr(T.run_model(model, b)["x"], b["target"], 1.0) for b in T.FrameLoader(data, shuffle=False)]).mean()
    assert score.item() == pytest.approx(best, abs=1e-3)               # the saved weights are those that validation chose


def test_an_interrupted_run_ends_as_an_uninterrupted_one(corpus, tmp_path, monkeypatch):
    go = lambda out, **kw: T.train_fusion(corpus / "data", out, 5, SPLIT, cache=corpus / "cache", constant=False, **SMALL, **kw)
    whole = go(tmp_path / "whole")
    plain = T.FrameLoader.__iter__
    for own_masks in (False, True):                                 # stopped in the model, then in the oracle
        def dies(self):
            if self.shuffle and self.epoch == 2 and own_masks == (self.masks is not None): raise KeyboardInterrupt
            return plain(self)
        monkeypatch.setattr(T.FrameLoader, "__iter__", dies)
        with pytest.raises(KeyboardInterrupt): go(tmp_path / "cut", resume=own_masks)
        monkeypatch.setattr(T.FrameLoader, "__iter__", plain)
    resumed = go(tmp_path / "cut", resume=True)
    same = lambda a, b: all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
    assert same(whole, resumed) and same(*(load_sirem(tmp_path / d / "oracle") for d in ("whole", "cut")))
    pick = lambda d: [{k: v for k, v in h.items() if k != "seconds"} for h in json.loads((d / "curves.json").read_text())["history"]]
    for d in (".", "oracle"): assert pick(tmp_path / "whole" / d) == pick(tmp_path / "cut" / d)


@pytest.mark.parametrize("extra", ({"fusion_map": "predicted"}, {"k": 3}, {"psf": "true"}, {"reduction": "sum"}))
def test_variants_train(corpus, tmp_path, extra):
    model = T.train_fusion(corpus / "data", tmp_path, 5, SPLIT, cache=corpus / "cache", constant=False, oracle=False, **{**SMALL, "epochs": 1, **extra})
    b = next(iter(T.FrameLoader(prepared(corpus), shuffle=False)))
    with torch.no_grad(): x = T.run_model(load_sirem(tmp_path), b)
    assert torch.isfinite(x["x"]).all() and x["w"].min() >= 0 and x["w"].max() <= 1
    if "k" in extra: assert (model.profile().detach().round() == 1).sum() == 3


def test_the_table_has_every_row_and_flat_records(runs, tmp_path):
    records = T.evaluate_fusion(runs.parent / "data", runs, tmp_path, cache=runs.parent / "cache")
    rows = {"gridding", "mean-image", "sirem", "sirem-xa0", "sirem-w0", "sirem-constant", "sirem-other-audio", "sirem-shifted-audio", "sirem-oracle"}
    for n in (5, 2):
        assert rows <= {r["method"] for r in records if r["arms_per_frame"] == n}
    assert records == json.loads((tmp_path / "fusion.json").read_text())
    assert all(not isinstance(v, (list, dict)) for r in records for v in r.values())
    assert {r["subject"] for r in records} == {"sub003", "all"} and {r["region"] for r in records if "label" not in r["table"]} == {"frame", "articulators"}
    one = [r["value"] for r in records if r["table"] == "fusion" and (r["method"], r["metric"], r["region"], r["arms_per_frame"]) == ("sirem", "psnr", "frame", 5)]
    mean = [r for r in records if r["table"] == "fusion-mean" and (r["method"], r["metric"], r["region"], r["arms_per_frame"]) == ("sirem", "psnr", "frame", 5)]
    assert len(one) == 2 and len(mean) == 1 and mean[0]["value"] == pytest.approx(np.mean(one))


def test_only_the_oracle_sees_the_masks_of_test_frames(runs):
    data = [p for p in prepared(runs.parent) if p.recording.subject == "sub003"]
    model, oracle, i = load_sirem(runs / "arms5"), load_sirem(runs / "arms5" / "oracle"), torch.arange(6)
    rows = lambda o=oracle: T.all_rows(data[0], i, model, None, data, ("tongue",), 0.0, o)
    before = rows()
    data[0].reference["labels"] = data[0].reference["labels"].flip(1)
    after = rows()
    for name in before: assert torch.equal(before[name][0], after[name][0]) == (name != "sirem-oracle"), name
    assert "sirem-oracle" not in rows(None)
    data[0].reference["labels"] = None
    assert "sirem-oracle" not in rows()


def test_the_oracle_alone_trains_and_validates_with_each_frames_own_masks(corpus, tmp_path, monkeypatch):
    seen, real = [], T.run_model
    monkeypatch.setattr(T, "run_model", lambda m, b, **kw: (seen.append((m, m.training, b, kw, out := real(m, b, **kw), m.audio)), out)[1])
    small = {**SMALL, "epochs": 1, "val_every": 1}
    T.train_fusion(corpus / "data", tmp_path / "run", 5, SPLIT, cache=corpus / "cache", **small)
    models = list(dict.fromkeys(id(s[0]) for s in seen))            # SIREM, the constant picture, the oracle
    masks = {"train": [], "val": []}
    for p in prepared(corpus):
        part = "train" if p.recording.subject == "sub001" else "val" if p.recording.subject == "sub002" else None
        if part: masks[part] += list(zip(p.features, p.masks(torch.arange(len(p)), ("tongue",))))
    for m, training, b, kw, out, _ in seen:
        if id(m) != models[2]:
            assert "mask" not in b and kw.get("w") is None and out["w"] is m.map
            continue
        for f, w in zip(b["features"], out["w"]):
            assert any(torch.equal(f, g) and torch.equal(w, v) for g, v in masks["train" if training else "val"])
    assert {(id(m), t) for m, t, *_ in seen} == {(m, t) for m in models for t in (True, False)} and len(models) == 3


def test_trained_with_masks_beats_masks_at_test_time_only(corpus, tmp_path):
    "Weights that were trained with a map below 1 exaggerate x_a; the oracle's x_a is a picture inside the mask."
    T.train_fusion(corpus / "data", tmp_path, 5, SPLIT, cache=corpus / "cache", constant=False, **{**SMALL, "epochs": 40})
    p = [p for p in prepared(corpus) if p.recording.subject == "sub003"][0]
    i = torch.arange(len(p))
    w = p.masks(i, ("tongue",))
    with torch.no_grad(): deployed, oracle = (T.run_model(load_sirem(tmp_path / k), p.batch(i), w=w) for k in ("", "oracle"))
    inside = lambda out: float(T.psnr(out["x"], p.target(i), 1.0, w > 0).mean())
    beyond = lambda out: float((out["xa"][w > 0] - out["xa"][w > 0].clamp(0, 1)).abs().mean())
    assert inside(oracle) > inside(deployed) + 2 and beyond(oracle) < 0.5 * beyond(deployed), (inside(oracle), inside(deployed), beyond(oracle), beyond(deployed))


def test_no_oracle_without_masks_and_none_left_from_before(corpus, tmp_path):
    small = {**SMALL, "epochs": 1}
    go = lambda **kw: T.train_fusion(corpus / "data", tmp_path / "run", 5, SPLIT, cache=corpus / "cache", constant=False, **{**small, **kw})
    rows = lambda: {r["method"] for r in T.evaluate_fusion(corpus / "data", tmp_path / "run", cache=corpus / "cache", max_frames=4)}
    go()
    assert "sirem-oracle" in rows() and T.find_runs(tmp_path) == [tmp_path / "run"]
    go(oracle=False)
    assert "sirem-oracle" not in rows()                             # the folder is still there, the run disowns it
    T.train_fusion(corpus / "data", tmp_path / "bare", 5, SPLIT, cache=corpus / "cache", constant=False, **small, target="gridding")
    assert not (tmp_path / "bare" / "oracle").exists() and json.loads((tmp_path / "bare" / "settings.json").read_text())["oracle"] is False


def test_the_wrong_sound_is_wrong(runs):
    data = prepared(runs.parent)
    p, same = data[:2]
    f, note = T.other_sound(p, data, "recording")
    assert note == same.recording.name and torch.equal(f, same.features)
    f, note = T.other_sound(p, data, "speaker")
    assert note in {q.recording.name for q in data if q.recording.subject != p.recording.subject}
    assert data[int(note[3:6]) * 2 - 2].recording.stimulus != p.recording.stimulus or note.endswith("toy2")   # another text where there is one
    f, _ = T.other_sound(p, data, "shift")
    assert torch.equal(f, p.features.roll(8, 0)) and not torch.equal(f, p.features)
    assert T.other_sound(p, [p], "recording") is None


def test_reconstruct_needs_no_truth_and_agrees_with_the_evaluation(runs, tmp_path):
    r = [r for r in T.find_recordings(runs.parent / "data") if r.subject == "sub003"][0]
    model = load_sirem(runs / "arms2")
    film, centre_s = reconstruct(read_mrd(r.raw), *read_audio(r.audio), model)
    p = T.prepare([r], 2, delta_s=0.1, cache=runs.parent / "cache")[0]
    rows = T.all_rows(p, torch.arange(len(p)), model, None, [p], ("tongue",), 0.0)
    assert torch.allclose(film, rows["sirem"][0], atol=1e-3) and torch.equal(centre_s, p.centre_s)   # one adjoint of all arms, or one of each: both have the NUFFT's error


@pytest.mark.parametrize("arms,matrix,message", ((7, 32, "the scan has 5 arms, the checkpoint was trained with 7"), (5, 40, "the scan's matrix is")))
def test_reconstruct_refuses_another_protocol(corpus, arms, matrix, message):
    r = T.find_recordings(corpus / "data")[0]
    model = Sirem(SiremConfig(n_arms=arms, arms_per_frame=arms, im_size=(matrix, matrix), hidden=(8, 8)))
    with pytest.raises(ValueError, match=message): reconstruct(read_mrd(r.raw), torch.zeros(16000), 16000, model)


def test_bad_input_has_one_line_errors(corpus, tmp_path):
    shutil.copytree(corpus / "data", tmp_path / "data")
    recs = T.find_recordings(tmp_path / "data")
    with pytest.raises(ValueError, match="needs at least 3"): T.train_fusion(recs[:4], tmp_path / "x")
    with pytest.raises(ValueError, match="no recording of the val subjects"): T.train_fusion(recs, tmp_path / "x", split={"train": ["sub001"], "val": ["sub9"], "test": []})
    with pytest.raises(ValueError, match="arm index"): ArmProfile(5)(torch.tensor([[5]]))
    with pytest.raises(ValueError, match="leave frames without any arm"): T.train_fusion(recs, tmp_path / "x", 2, SPLIT, cache=corpus / "cache", k=2)
    with pytest.raises(ValueError, match="none of the articulators"): mask_map(torch.zeros(2, 4, 4), {"nose": 1})
    with pytest.raises(FileNotFoundError, match="no trained fusion model"): T.evaluate_fusion(recs, tmp_path / "data")
    os.unlink(recs[0].audio)
    with pytest.raises(ValueError, match="no audio"): T.prepare(tmp_path / "data", 5, cache=tmp_path / "cache")


def test_gridding_as_target_is_said_and_gives_no_infinite_score(corpus, tmp_path):
    "Gridding judged by itself has no PSNR; every record says what the target was."
    T.train_fusion(corpus / "data", tmp_path / "run", 5, SPLIT, cache=corpus / "cache", constant=False, **{**SMALL, "epochs": 1, "target": "gridding"})
    records = T.evaluate_fusion(corpus / "data", tmp_path / "run", tmp_path, cache=corpus / "cache", max_frames=4)
    assert all(np.isfinite(r["value"]) and r["target"] == "gridding" and r["region"] == "frame" for r in records)
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["map_from"] == "motion"
    psnr = lambda m: [r["value"] for r in records if r["method"] == m and r["metric"] == "psnr"]
    assert all(v > 80 for v in psnr("gridding")) and psnr("sirem") and max(psnr("sirem")) < 60
    assert {r["n"] for r in records if r["table"] == "fusion"} == {4}


@pytest.fixture(scope="module")
def lsq_run(tmp_path_factory):
    "Three training speakers, so that folds can be made, one that validates, one held out."
    root = tmp_path_factory.mktemp("lsq")
    T.toy_corpus(root / "data", n_subjects=5, n_words=1, n_frames=16)
    split = {"train": ["sub001", "sub002", "sub003"], "val": ["sub004"], "test": ["sub005"]}
    small = {**SMALL, "epochs": 1, "oracle": False, "constant": False, "lsq_folds": 2, "lsq_steps": 6, "lsq_hidden": (16, 16)}
    return root, lambda out, n=5, **kw: T.train_fusion(root / "data", root / out, n, split, cache=root / "cache", **{**small, **kw})


def test_least_squares_map_is_the_best_map_there_is():
    g = torch.Generator().manual_seed(0)
    x, xm, xa = torch.rand(30, 4, 5, generator=g), torch.rand(30, 4, 5, generator=g), torch.rand(30, 4, 5, generator=g)
    error = lambda w: (w * xa + (1 - w) * xm - x).square().mean(0)
    w, grid = least_squares_map(map_sums(x, xm, xa)), torch.linspace(0, 1, 201)
    best = grid[torch.stack([error(v) for v in grid]).argmin(0)]
    assert (w - best).abs().max() < 0.006 and (error(w) <= error(best) + 1e-7).all()
    assert torch.equal(least_squares_map([map_sums(x[:9], xm[:9], xa[:9]), map_sums(x[9:], xm[9:], xa[9:])]), w)
    assert torch.equal(least_squares_map(map_sums(x, x, xa)), torch.zeros(4, 5)) and torch.equal(least_squares_map(map_sums(x, xm, x)), torch.ones(4, 5))


def test_the_map_is_fitted_to_speakers_its_decoder_has_not_met(lsq_run, monkeypatch):
    root, go = lsq_run
    trained, judged, train_listener, branch_sums = {}, [], T.train_listener, T.branch_sums
    def listens(model, train, *a, **k): trained[id(model)] = (model, {p.recording.subject for p in train}); return train_listener(model, train, *a, **k)
    def sums(model, prepared, *a, **k): judged.append((trained[id(model)][1], {p.recording.subject for p in prepared})); return branch_sums(model, prepared, *a, **k)
    monkeypatch.setattr(T, "train_listener", listens); monkeypatch.setattr(T, "branch_sums", sums)
    go("folds")
    everybody = {"sub001", "sub002", "sub003"}
    folds, (last_trained, last_judged) = judged[:-1], judged[-1]
    assert len(folds) == 2 and all(not (a & b) and a | b == everybody for a, b in folds) and set.union(*(b for _, b in folds)) == everybody
    assert last_trained == last_judged == everybody                   # the in-sample map, kept to show the difference
    maps = np.load(root / "folds" / "lsq" / "maps.npz")
    model, deaf = T.load_run(root / "folds")[1]["lsq"]
    assert np.array_equal(model.map.numpy(), maps["w"]) and np.array_equal(deaf.map.numpy(), maps["constant"])
    assert all(0 <= maps[k].min() and maps[k].max() <= 1 for k in maps) and not np.array_equal(maps["w"], maps["in_sample"])
    assert deaf.config.audio == "constant" and model.config.hidden == (16, 16)


def test_rows_of_the_least_squares_map_labels_and_error_maps(lsq_run):
    root, go = lsq_run
    for n in (5, 2): go(f"rows/arms{n}", n)
    records = T.evaluate_fusion(root / "data", root / "rows", root / "tables", cache=root / "cache")
    assert {"sirem-lsq", "sirem-lsq-constant", "sirem-lsq-other-audio"} <= {r["method"] for r in records}
    assert {r["table"] for r in records} == {"fusion", "fusion-mean", "fusion-label", "fusion-label-mean"}
    assert all(not isinstance(v, (list, dict)) for r in records for v in r.values())
    data = T.prepare([r for r in T.find_recordings(root / "data") if r.subject == "sub005"], 5, delta_s=0.1, cache=root / "cache")
    i = T.evenly(data[0])
    film = T.all_rows(data[0], i, others=data, which=("tongue",), blur=0., **T.load_run(root / "rows" / "arms5")[1])["sirem-lsq"][0]
    label = [r["value"] for r in records if (r["table"], r["method"], r["arms_per_frame"], r["region"], r["metric"]) == ("fusion-label", "sirem-lsq", 5, "tongue", "psnr")]
    assert label == [pytest.approx(float(T.psnr(film, data[0].target(i), 1.0, data[0].labels(i) == 1).mean()), abs=1e-4)]
    maps = np.load(root / "tables" / "fusion_maps.npz")
    assert {f"{n}/{k}" for n in (5, 2) for k in ("gridding", "sirem-lsq", "sirem-lsq-constant", "target", "articulators", "map", "map-lsq")} <= set(maps)
    assert np.allclose(maps["5/sirem-lsq"], (film - data[0].target(i)).square().mean(0), atol=1e-6)


def test_an_interrupted_least_squares_run_ends_as_an_uninterrupted_one(lsq_run, monkeypatch):
    root, go = lsq_run
    go("whole")
    plain, calls = T.train_listener, []
    def dies(*a, **k):
        calls.append(1)
        if len(calls) == 2: raise KeyboardInterrupt
        return plain(*a, **k)
    monkeypatch.setattr(T, "train_listener", dies)
    with pytest.raises(KeyboardInterrupt): go("cut")
    done = (root / "cut" / "lsq" / "fold0.npy").stat().st_mtime_ns
    go("cut", resume=True)
    assert (root / "cut" / "lsq" / "fold0.npy").stat().st_mtime_ns == done
    for d in ("lsq", "lsq/constant"):
        a, b = (load_sirem(root / r / d).state_dict() for r in ("whole", "cut"))
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_no_least_squares_map_from_one_speaker(runs):
    s, models = T.load_run(runs / "arms5")
    assert models["lsq"] is None and not (runs / "arms5" / "lsq").exists()
    assert json.loads((runs / "arms5" / "settings.json").read_text())["lsq"] is False


@pytest.mark.parametrize("arms_per_frame", (5, 2))
def test_a_whole_scan_takes_one_adjoint_a_frame_in_blocks_of_any_size(runs, monkeypatch, arms_per_frame):
    r = [r for r in T.find_recordings(runs.parent / "data") if r.subject == "sub003"][0]
    model, pictures, adjoint = load_sirem(runs / f"arms{arms_per_frame}"), [], S.Nufft.adjoint
    def counted(self, kspace): pictures.append(len(kspace) if kspace.ndim == 4 else 0); return adjoint(self, kspace)   # (frame, coil, arm, sample)
    whole, centre_s = reconstruct(read_mrd(r.raw), *read_audio(r.audio), model, batch=1000)
    scan = read_mrd(r.raw, on_disk=True)
    monkeypatch.setattr(S.Nufft, "adjoint", counted)
    blocks = list(S.reconstruct_blocks(scan, *read_audio(r.audio), model, batch=7))
    assert max(len(x) for x, _ in blocks) == 7 and torch.allclose(torch.cat([x for x, _ in blocks]), whole, atol=1e-5)
    assert torch.equal(torch.cat([c for _, c in blocks]), centre_s)
    assert sum(pictures) == len(whole)


def test_checkpoints_are_found_or_said_to_be_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="wheel"): S.default_checkpoint(13, tmp_path)
    Sirem(SiremConfig(n_arms=5, im_size=(8, 8), hidden=(4,), dim=3)).save_pretrained(tmp_path / "sirem-5")
    assert S.default_checkpoint(5, tmp_path) == tmp_path / "sirem-5"
    with pytest.raises(FileNotFoundError, match="no checkpoint for 4 arms"): S.default_checkpoint(4, tmp_path)


@pytest.mark.parametrize("arms_per_frame", (13, 2))
def test_the_checkpoints_of_the_repository(arms_per_frame):
    folder = S.default_checkpoint(arms_per_frame)
    model = load_sirem(folder)
    assert model.config.arms_per_frame == arms_per_frame and model.config.encoder == "logmel" and model.config.im_size == (84, 84)
    assert (folder / "model.safetensors").stat().st_size < 6e6 and 0 <= model.map.min() and model.map.max() <= 1 and model.map.mean() > 0.01
    assert load_sirem(folder / "constant").config.audio == "constant"
