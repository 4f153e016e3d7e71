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
    n = len(true["tongue"])
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
