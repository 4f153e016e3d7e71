"Articulator scores and the tracker: what their notebooks cannot show well."
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sirem_nb.evaluate.articulators import (PARTS, articulator_records, articulator_scores, bootstrap, contacts, counted, curve_distance, follows_speech, frozen, gap,
                                            match_contacts, mean_pose, motion, motion_ratios, other_utterance, paired_ratio, phone_class)
from sirem_nb.speaker.corpus import perform, virtual_speaker

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def talk():
    s = virtual_speaker(3)
    u = perform(s, ["apa", "iki"], 0)
    return u.phones, {k: v.numpy() for k, v in s.head.contours_mm(u.at((np.arange(int(u.duration_s*50)) + .5)/50)).items()}


def brute_force(a, b):
    "Mean symmetric distance by dense points, one frame."
    dense = lambda c: np.stack([np.interp(np.linspace(0, 1, 4000), np.r_[0, np.linalg.norm(np.diff(c, axis=0), axis=1).cumsum()]/np.linalg.norm(np.diff(c, axis=0), axis=1).sum(), x) for x in c.T], -1)
    a, b = dense(a), dense(b)
    d = np.sqrt(((a[::10, None] - b[None])**2).sum(-1)).min(1).mean(), np.sqrt(((b[::10, None] - a[None])**2).sum(-1)).min(1).mean()
    return sum(d)/2


def test_distance_agrees_with_brute_force_and_is_symmetric(talk):
    c = counted(talk[1])
    for name in ("tongue", "upper_lip", "velum", "jaw"):
        a, b = c[name][20:21], c[name][45:46] + [1.5, -.7]
        assert curve_distance(a, b)[0] == pytest.approx(brute_force(a[0], b[0]), rel=.03, abs=.02)
        assert curve_distance(a, b)[0] == pytest.approx(curve_distance(b, a)[0], abs=1e-12)
        assert curve_distance(a + [30, -80], b + [30, -80])[0] == pytest.approx(curve_distance(a, b)[0], abs=1e-9)      # where the head lies does not matter
        assert curve_distance(a, b[:, ::-1])[0] == pytest.approx(curve_distance(a, b)[0], abs=1e-6)                       # nor in which order points are numbered


def test_gap_is_the_smallest_distance_and_zero_where_curves_cross():
    g = np.random.default_rng(0)
    a, b = g.normal(0, 5, (6, 9, 2)).cumsum(1), g.normal(0, 5, (6, 9, 2)).cumsum(1) + [60, 0]
    dense = lambda c: np.stack([np.interp(np.linspace(0, 8, 1500), np.arange(9), x) for x in c.T], -1)
    for i in range(6):
        d = np.sqrt(((dense(a[i])[:, None] - dense(b[i])[None])**2).sum(-1)).min()
        assert gap(a[i:i + 1], b[i:i + 1])[0] == pytest.approx(d, abs=.6)
    cross = np.array([[[0, 0], [10, 10.]]]), np.array([[[0, 10], [10, 0.]]])
    assert gap(*cross)[0] < .1


def test_long_recordings_are_worked_on_in_blocks(talk):
    c = counted(talk[1])["tongue"]
    many = np.concatenate([c]*8)
    assert np.allclose(curve_distance(many, many[::-1]), np.concatenate([curve_distance(many[i:i + 1], many[::-1][i:i + 1]) for i in range(len(many))]))
    assert curve_distance(c[:0], c[:0]).shape == (0,)


def test_a_frozen_mouth_does_not_pass(talk):
    phones, true = talk
    still = articulator_scores(frozen(true), true, 50, phones)
    assert still["lips_contact_f1"] == 0 and still["tongue_speed_ratio"] == 0 and still["lips_opening_corr"].why == "nothing moves"
    rows = [articulator_scores(frozen({k: v[i:] for k, v in true.items()}), {k: v[i:] for k, v in true.items()}, 50) for i in range(0, 40, 5)]
    mm = [r["tongue_mm"] for r in rows]
    weak = [10*v for v in mm]                                               # a control that is easily beaten does not help a frozen mouth
    assert not follows_speech(mm, {"other_utterance": weak}, [r["tongue_speed_ratio"] for r in rows])[0]
    assert follows_speech(mm, {"other_utterance": weak}, [1.]*len(mm))[0]
    assert not follows_speech([np.nan]*8, {"other_utterance": weak}, [1.]*8)[0]


def test_contacts_that_were_there_from_the_start_or_last_have_no_begin_or_end():
    x = np.array([0, 0, 5, 5, 1, 1, 5, 0, 0.])
    got = contacts(x, 10)
    assert np.isnan(got[0, 0]) and got[0, 1] == pytest.approx(.2) and got[1].tolist() == pytest.approx([.4, .6]) and got[2, 0] == pytest.approx(.7) and np.isnan(got[2, 1])
    assert len(contacts(np.full(9, np.nan), 10)) == 0 and len(contacts([], 10)) == 0
    holes = np.where(np.arange(9) == 5, np.nan, x)
    assert np.allclose(contacts(holes, 10), got, equal_nan=True)


def test_matching_uses_each_contact_once_and_finds_the_most_pairs():
    begin = lambda *t: np.array([[x, x + .1] for x in t])
    m = match_contacts(begin(.05, .10), begin(.0, .06), .06)                # greedy by nearest would pair .05 with .06 and lose the other
    assert m["f1"] == 1 and m["timing_ms"] == pytest.approx(45)
    assert match_contacts(begin(), begin(.1))["f1"] == 0 and np.isnan(match_contacts(begin(.1), begin())["f1"])


def test_motion_ignores_where_the_mouth_is_and_scales():
    g = np.random.default_rng(1)
    p = g.normal(0, 1, (200, 7, 2)).cumsum(0)
    v, s = motion(p, 50)
    assert motion(p + 100, 50)[0] == pytest.approx(v) and motion(3*p, 50)[0] == pytest.approx(3*v) and motion(3*p, 50)[1] == pytest.approx(s)
    assert motion(p, 100)[1] == pytest.approx(2*s)                          # the same film at double speed
    assert motion_ratios(p[:3], p[:3], 50)["speed_ratio"].why


def test_bootstrap_covers_about_as_often_as_it_says():
    g = np.random.default_rng(5)
    hits = [(lambda i: i.low <= 3 <= i.high)(bootstrap(g.normal(3, 1, 25), draws=400, seed=k)) for k in range(300)]
    assert .88 < np.mean(hits) < .98
    assert paired_ratio([1., 2, 3], [0., 0, 0]).value != paired_ratio([1., 2, 3], [0., 0, 0]).value    # NaN, no crash


def test_controls_have_the_right_shapes(talk):
    c = talk[1]
    n = len(c["tongue"])
    assert mean_pose([c, c], 5)["tongue"].shape == (5, 134, 2) and np.allclose(mean_pose([c], 1)["jaw"][0], c["jaw"].mean(0), atol=1e-4)
    assert other_utterance(c, n + 7)["velum"].shape == (n + 7, 52, 2) and (frozen(c)["tongue"] == c["tongue"][:1]).all()


def test_records_are_json_without_nan(talk):
    phones, c = talk
    records = articulator_records(articulator_scores(frozen(c), c, 50, phones), table="diffusion", subject="sub001")
    json.dumps(records, allow_nan=False)
    assert {r["unit"] for r in records if r["metric"].endswith("_mm")} == {"mm"} and all(("note" in r) == (r["value"] is None) for r in records)


def test_bad_calls_say_what_was_expected(talk):
    c = talk[1]
    for call, text in ((lambda: articulator_scores({"tongue": c["tongue"][:, :50]}, c), "134"), (lambda: articulator_scores({}, c), "expected"),
                       (lambda: curve_distance(c["tongue"][0], c["tongue"][0]), "frame, point, 2"), (lambda: phone_class([("XX", 0, 1)], [0]), "ARPAbet")):
        with pytest.raises(ValueError, match=text): call()


def test_parts_fit_the_outlines(talk):
    for name, (n, first, end) in PARTS.items(): assert talk[1][name].shape[1] == n and 0 <= first < end <= n


# the tracker

from sirem_nb.learning.tracker import (OUTLINES, Tracker, TrackerConfig, TrackerLoader, disturb, draw_frames, load_tracker, masks_of, move, read_contours, shape_model,  # noqa: E402
                                       stack, to_grid, train_tracker, unstack)

TRACKER = ROOT/"checkpoints"/"tracker"


@pytest.fixture(scope="module")
def tracker(): return load_tracker(TRACKER)


@pytest.fixture(scope="module")
def few(): return draw_frames(range(540000, 540002), 10)


def test_outlines_go_into_points_and_back(few):
    parts = unstack(few["points"])
    assert {k: v.shape[1] for k, v in parts.items()} == OUTLINES and torch.equal(stack(parts), few["points"])
    with pytest.raises(ValueError, match="velum"): stack({k: v for k, v in parts.items() if k != "velum"})
    with pytest.raises(ValueError, match="at least 40"): shape_model(few["points"], 40)
    mean, shapes = shape_model(few["points"], 15)
    flat = (few["points"] - mean).flatten(1)
    z = flat @ torch.linalg.pinv(shapes.flatten(1))
    assert (z @ shapes.flatten(1) - flat).unflatten(1, (-1, 2)).norm(dim=-1).mean() < .1 and z.std(0) == pytest.approx(torch.ones(15), abs=.02)


def test_the_grid_keeps_a_point_where_it_is_in_mm():
    for n, pixel in ((64, 3.125), (84, 200/84), (68, 200/68), (101, 2.)):
        y, x = ((torch.arange(n) - n//2)*pixel for _ in "yx")
        spot = torch.exp(-((x - 11.)**2 + (y[:, None] + 23.)**2)/(2*9.**2))[None]
        got, at = to_grid(spot, pixel)[0], (torch.arange(64) - 32)*3.125
        centre = (got*at).sum()/got.sum(), (got*at[:, None]).sum()/got.sum()
        assert centre == (pytest.approx(11, abs=.2), pytest.approx(-23, abs=.2)), n


def test_moving_moves_picture_and_points_alike():
    at = (torch.arange(112) - 56)*(240/112)
    where = torch.tensor([[-20., 12.], [15., -30.], [3., 25.]]*4)
    spots = torch.exp(-((at - where[:, :1, None])**2 + (at[:, None] - where[:, 1:, None])**2)/(2*7.**2))
    x, p = move(spots, where[:, None].expand(-1, 594, 2), torch.Generator().manual_seed(3))
    grid = (torch.arange(64) - 32)*3.125
    centre = torch.stack([(x*grid).sum((1, 2)), (x*grid[:, None]).sum((1, 2))], -1)/x.sum((1, 2))[:, None]
    assert (p[:, 0] - where).norm(dim=-1).max() > 4 and torch.allclose(centre, p[:, 0], atol=.25)


def test_training_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path, few, monkeypatch):
    from sirem_nb.learning import tracker as module
    tiny, calls, loss = dict(people=1, per_speaker=8, epochs=3, steps=4, batch_size=8, progress=False, width=8, coefficients=12), [], module.tracker_loss
    monkeypatch.setattr(module, "draw_frames", lambda *a: few)       # drawn once
    losses = lambda d: [h["loss"] for h in json.loads((d/"curves.json").read_text())["history"]]
    train_tracker(tmp_path/"a", **tiny)
    def killed(model, batch):
        calls.append(1)
        if len(calls) == 8: raise KeyboardInterrupt                             # in the second epoch (five calls an epoch: four batches and a look)
        return loss(model, batch)
    monkeypatch.setattr(module, "tracker_loss", killed)
    with pytest.raises(KeyboardInterrupt): train_tracker(tmp_path/"b", **tiny)
    assert len(losses(tmp_path/"b")) == 1
    monkeypatch.setattr(module, "tracker_loss", loss)
    train_tracker(tmp_path/"b", resume=True, **tiny)
    assert losses(tmp_path/"a") == losses(tmp_path/"b") and len(losses(tmp_path/"a")) == 3
    loader = TrackerLoader(few, 4, 3, seed=1)
    first = [b["points"] for b in loader]; loader.set_epoch(1); second = [b["points"] for b in loader]; loader.set_epoch(0)
    assert all(torch.equal(a, b["points"]) for a, b in zip(first, loader)) and not torch.equal(first[0], second[0])


def test_a_tracker_goes_to_disk_and_back(tmp_path, few):
    torch.manual_seed(0)
    model = Tracker(TrackerConfig(width=8, coefficients=10)).eval()
    model.mean[:], model.shapes[:] = shape_model(few["points"], 10)
    model.save_pretrained(tmp_path/"t")
    x = disturb(few, torch.Generator().manual_seed(0))["frames"]
    with torch.no_grad(): assert torch.equal(load_tracker(tmp_path/"t")(x), model(x))


def test_the_shipped_tracker_is_small_and_reads_people_it_has_not_seen(tracker):
    assert sum(p.numel() for p in tracker.parameters()) < 1e6 and sum(f.stat().st_size for f in TRACKER.rglob("*")) < 6e6
    s = virtual_speaker(77)
    u = perform(s, ["asouk", "apa"], 5)
    p = u.at((np.arange(int(u.duration_s*50)) + .5)/50)
    true = {k: v.numpy() for k, v in s.head.contours_mm(p).items()}
    score = {m: articulator_scores(read_contours(s.head.render(p, m), tracker), true, 50., u.phones) for m in (64, 84)}
    pose = articulator_scores(mean_pose([true], len(p)), true)
    for m, got in score.items():
        for k in ("tongue_mm", "lips_mm"): assert got[k] < 1.5 and got[k] < .5*pose[k], (m, k, got[k], pose[k])
        assert got["lips_contact_f1"] > .6 and got["lips_opening_corr"] > .95 and got["palate_mm"] < 2


def test_reading_does_not_depend_on_grey_scale_or_batch(tracker):
    x = virtual_speaker(78).head.render(torch.zeros(3, 8), 64)
    a = read_contours(x, tracker)
    for b in (read_contours(300*x + 20, tracker), read_contours((x*255).round().to(torch.uint8), tracker), read_contours(x, tracker, 3.125, batch_size=1), read_contours(x.numpy(), tracker)):
        assert max(np.abs(a[k] - b[k]).max() for k in a) < .25


def test_frames_without_a_mouth_are_nan_and_bad_calls_say_so(tracker, tmp_path):
    x = virtual_speaker(78).head.render(torch.zeros(3, 8), 64)
    x[1], x[2, 3, 3] = .5, float("inf")
    got = read_contours(x, tracker)
    assert all(np.isfinite(v[0]).all() and np.isnan(v[1:]).all() for v in got.values())
    assert read_contours(x[:0], tracker)["tongue"].shape == (0, 134, 2) and not masks_of(got)["tongue"][1].any() and masks_of(got)["tongue"][0].sum() > 100
    for call, text in ((lambda: read_contours(x[0], tracker), "expected \\(n, y, x\\)"), (lambda: read_contours(x, tracker, 0.), "0.2 to 10")):
        with pytest.raises(ValueError, match=text): call()
    with pytest.raises(FileNotFoundError): load_tracker(tmp_path)
    with pytest.raises(ValueError): load_tracker(ROOT/"checkpoints"/"translate-cine")
