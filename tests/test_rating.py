"The study with people: fair plans, answers that survive a crash, a page that is blind, a table with intervals."
import numpy as np
import pytest

from sirem_nb.evaluate import rating as r

PNG = bytes.fromhex("89504e470d0a1a0a0000000d4948445200000001000000010806000000 1f15c4890000000d49444154789c6360000002000001e221bc330000000049454e44ae426082".replace(" ", ""))


@pytest.fixture
def clips(tmp_path):
    for kind in ("real", "made"):
        (tmp_path/kind).mkdir()
        for word in ("bite", "boat", "s"):
            for n in range(4): (tmp_path/kind/f"{word}_{n}.png").write_bytes(PNG)
    return r.find_clips(tmp_path/"real", tmp_path/"made")


def test_plans_are_fair_and_follow_the_seed(clips):
    for seed in range(5):
        p = r.plan(clips, seed, n_reference=2, n_each=2)
        assert len(p.reference) == 6 and all(c.real for c in p.reference) and len(p.trials) == len(set(p.trials)) == 12 and not set(p.trials) & set(p.reference)
        for w in ("bite", "boat", "s"): assert [sum(c.real == k for c in p.trials if c.word == w) for k in (True, False)] == [2, 2]
        assert p == r.plan(clips, seed, 2, 2)
    orders = {tuple(c.real for c in r.plan(clips, s).trials) for s in range(8)}
    assert len(orders) > 4


def test_two_raters_one_file_and_odd_names(clips, tmp_path):
    p, out = r.plan(clips, 0), tmp_path/"deep"/"a.csv"
    a, b = r.Study(p, out, 'Ann, "the ear"\nX'), r.Study(p, out, "B")
    for _ in range(3): a.answer(False, 1); b.answer(True)
    assert [x["rater"] for x in r.read_answers(out)] == [a.rater, "B"]*3
    assert r.Study(p, out, 'Ann, "the ear"\nX').done == 3 == r.Study(p, out, "B").done and r.Study(p, out, "C").done == 0


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_a_torn_line_is_asked_again(clips, tmp_path, cut):
    p, out = r.plan(clips, 0), tmp_path/"a.csv"
    s = r.Study(p, out, "A")
    for _ in range(4): s.answer(False, 2)
    whole = out.read_bytes()
    out.write_bytes(whole[:-cut])
    again = r.Study(p, out, "A")
    assert again.done == (whole[:-cut].count(b"\n") - 1)
    while again.clip: again.answer(True)
    assert [x["trial"] for x in r.read_answers(out)] == list(range(len(p.trials)))


def test_page_is_blind_and_writes(clips, tmp_path):
    pytest.importorskip("ipywidgets")
    s = r.Study(r.plan(clips, 0), tmp_path/"a.csv", "A", rate_all=True)
    box = r.page(s)
    text = str([w.get_state() for w in walk(box.children[3:])])
    assert not any(str(c.path) in text or c.path.name in text or c.path.parent.name + "/" in text for c in s.plan.trials)
    real, fake = box.children[5].children
    for k in range(len(s.plan.trials)):
        (real if k % 2 else fake).click()
        assert s.done == k                      # a mark is wanted for both
        box.children[6].value = 1 + k % 5
        assert s.done == k + 1
    assert real.disabled and fake.disabled and "last" in box.children[3].value and box.children[4].children == ()
    answers = r.read_answers(tmp_path/"a.csv")
    assert [a["judged_real"] for a in answers] == [bool(k % 2) for k in range(len(answers))] and [a["mark"] for a in answers] == [1 + k % 5 for k in range(len(answers))]
    assert [a["real"] for a in answers] == [c.real for c in s.plan.trials]


def walk(widgets):
    for w in widgets: yield w; yield from walk(getattr(w, "children", ()))


def made_up(rater, n, p_right, seed):
    g = np.random.default_rng(seed)
    return [{"rater": rater, "word": "w", "real": (real := bool(k % 2)), "judged_real": real == (g.random() < p_right), "mark": 3} for k in range(n)]


def test_scores_closed_form():
    a = [{"real": x, "judged_real": y, "mark": m, "word": "w", "rater": "A"} for x, y, m in [(False, False, 1), (False, False, 3), (False, True, None), (True, False, 4), (True, True, None), (True, True, None)]]
    assert r.f1(a) == pytest.approx(2*2/(2*2 + 1 + 1)) and r.accuracy(a) == pytest.approx(4/6) and r.mos(a, False) == 2 and r.mos(a, True) == 4
    t = {x["metric"]: x for x in r.rating_table(a) if x["word"] == "all"}
    assert t["f1"]["always_synthesised"] == pytest.approx(2/3) and t["mos_made"]["value"] == 2
    assert np.isnan(r.f1([x for x in a if x["real"] and x["judged_real"]])) and np.isnan(r.mos([], True))


def test_intervals_cover_about_as_often_as_they_say():
    hits = [low <= .7 <= high for low, high in (r.interval(made_up("A", 100, .7, s), r.accuracy, 300) for s in range(60))]
    assert .85 <= np.mean(hits) <= 1
    one, three = (r.interval(sum((made_up(f"r{k}", 60, p, k) for k, p in enumerate(ps)), []), r.accuracy, 400) for ps in ((.75,)*3, (.5, .75, 1.)))
    assert three[1] - three[0] > 1.5*(one[1] - one[0])          # raters who disagree make it wider


def test_bad_input(clips, tmp_path):
    s = r.Study(r.plan(clips, 0), tmp_path/"a.csv", "A")
    for args in ((False,), (True, 3), (False, 6), (False, 0)):
        with pytest.raises(ValueError, match="mark"): s.answer(*args)
    assert not (tmp_path/"a.csv").exists()
    s.answer(True)
    with pytest.raises(ValueError, match="another study"): r.Study(r.plan(clips, 3), tmp_path/"a.csv", "A", seed=3)
    (tmp_path/"made"/"new_1.png").write_bytes(PNG)
    with pytest.raises(ValueError, match="new"): r.find_clips(tmp_path/"real", tmp_path/"made")
    with pytest.raises(FileNotFoundError): r.find_clips(tmp_path/"real", tmp_path/"nowhere")
    with pytest.raises(ValueError, match="no answers"): r.rating_table([])
