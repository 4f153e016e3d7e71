"Annot-16: files written in its format, read, rasterised, joined with raw files."
import importlib.util
import json

import h5py
import numpy as np
import pytest
import torch
from scipy.io import savemat

from sirem_nb.data import annot16 as a

NAME = "sub009_2drt_06_rainbow_r1"


def cell(*segments):
    out = np.empty(3, object)
    out[:] = [{"v": np.concatenate([p for p, _ in s]), "i": np.concatenate([np.full(len(p), i) for p, i in s]), "mu": 0.} for s in segments]
    return out


def square(x, y, r): return np.array([[x - r, y - r], [x + r, y - r], [x + r, y + r], [x - r, y + r]], float)


def track(path, n=5, order=None):
    "Square lips and tongue whose place says the frame."
    frames = [{"frameNo": k + 1, "template": 1, "contours": {"segment": cell([(square(k, 0, 5), 2), (square(-25, -15, 3), 4)], [(np.array([[30., 20.], [30., -20.]]), 2)], [(square(-25, 0, 3), 5), (np.array([[0., 9.]]), 9)])}} for k in range(n)]
    savemat(path, {"trackdata": [frames[k] for k in order or range(n)]})
    return path


def grid(path, phones=(("AA1", .1, .2), ("S", .2, .4))):
    body = "".join(f'        intervals [{i}]:\n            xmin = {s}\n            xmax = {e}\n            text = "{p}"\n' for i, (p, s, e) in enumerate(phones, 1))
    path.write_text('File type = "ooTextFile"\nObject class = "TextGrid"\n\nxmin = 0\nxmax = 9\ntiers? <exists>\nsize = 1\nitem []:\n    item [1]:\n        class = "IntervalTier"\n'
                    f'        name = "phones"\n        xmin = 0\n        xmax = 9\n        intervals: size = {len(phones)}\n' + body)
    return path


def test_coordinates_names_and_order(tmp_path):
    t = a.read_track(track(tmp_path/f"{NAME}_track.mat", order=[3, 0, 4, 1, 2]))
    assert t.name == NAME and len(t) == 5 and np.allclose(np.diff(t.times_s), 0.012008)
    assert set(t.contours) == {"tongue", "lower_lip", "pharynx", "upper_lip", "segment2_9"}
    for k in range(5): assert np.allclose(t.contours["tongue"][k].mean(0), [42 + k, 42])           # sorted by frame number
    assert np.allclose(t.contours["lower_lip"][0].mean(0), [17, 57])                               # v1 up becomes y down


def test_one_frame_and_frames_without_an_articulator(tmp_path):
    savemat(tmp_path/"a_track.mat", {"trackdata": {"frameNo": 7, "contours": {"segment": cell([(square(0, 0, 4), 2)], [(square(0, 0, 1), 2)], [(square(1, 1, 2), 1)])}}})
    t = a.read_track(tmp_path/"a_track.mat")
    assert len(t) == 1 and np.isclose(t.times_s[0], 6.5*a.FRAME_S)
    two = {"tongue": [square(40, 40, 4), np.zeros((0, 2))], "palate": [np.zeros((0, 2)), np.array([[10., 10.], [20., 10.]])]}
    labels, names = a.rasterise(two, width=1.)
    assert set(np.unique(labels[0])) == {0, names["tongue"]} and set(np.unique(labels[1])) == {0, names["palate"]}


def test_masks_cover_what_they_should(tmp_path):
    labels, names = a.rasterise(a.read_track(track(tmp_path/"b_track.mat")).contours, width=0.)
    for k in range(5): assert labels[k, 42, 42 + k] == names["tongue"] and labels[k, 42, 42 + k + 7] == 0 and (labels[k] == names["tongue"]).sum() == 121
    assert labels[0, 57, 17] == names["lower_lip"] and labels[0, 30, 72] == names["pharynx"] and "segment2_9" not in names
    wide, _ = a.rasterise(a.read_track(tmp_path/"b_track.mat").contours, width=2.)
    assert ((wide > 0) >= (labels > 0)).all() and (wide > 0).sum() > (labels > 0).sum()


def test_outlines_beyond_the_picture_are_cut_off():
    labels, names = a.rasterise({"tongue": [square(84, 84, 6)], "pharynx": [np.array([[90., -5.], [90., 99.]])]})
    assert labels[0, 83, 82] == names["tongue"] and labels.shape == (1, 84, 84)


def test_phones_and_hand_traces(tmp_path):
    pytest.importorskip("praatio")
    assert a.read_phones(grid(tmp_path/"x_text.TextGrid")) == [("AA1", .1, .2), ("S", .2, .4)]
    with pytest.raises(ValueError, match="no tier 'words', only phones"): a.read_phones(tmp_path/"x_text.TextGrid", "words")
    hand = tmp_path/f"{NAME}_track_frame-12.json"
    hand.write_text(json.dumps({"Tongue": [[1, 2], [3, 4]], "hard palate": [[5, 6]]}))
    n, c = a.read_hand(hand)
    assert n == 12 and set(c) == {"tongue", "palate"} and c["tongue"].shape == (2, 2)


def test_joined_and_read_by_training(tmp_path):
    pytest.importorskip("praatio")
    from sirem_nb.data.mrd import write_recon
    from sirem_nb.data.frames import Recording
    from sirem_nb.fusion.train import read_reference
    home = tmp_path/"usc"/"sub009"/"2drt"
    raw = home/"raw"/f"{NAME}_raw.h5"; raw.parent.mkdir(parents=True); raw.write_bytes(b"")
    recon = home/"recon"/f"{NAME}_recon.h5"; recon.parent.mkdir()
    annot = tmp_path/"annot"; annot.mkdir()
    track(annot/f"{NAME}_track.mat"); grid(annot/f"{NAME}_text.TextGrid", [("AA1", .1, 8.)])
    written, notes = a.join_annotations(annot, tmp_path/"usc")
    assert written == [a.annotation_of(raw)] and len(notes) == 1 and "after the last frame" in notes[0]
    with h5py.File(written[0]) as f: labels, times = f["labels"][:], f["frame_times_s"][:]
    write_recon(recon, np.random.default_rng(0).random((4, 84, 84), np.float32), times[1:] + .001, (2.4, 2.4), "tv")
    r = read_reference(Recording("sub009", NAME, raw, None, recon, None, None), "auto", None, {"im_size": (84, 84)})
    assert r["kind"] == "recon" and torch.equal(r["labels"], torch.from_numpy(labels[1:])) and r["names"]["tongue"] == a.LABEL_OF["tongue"]
    (written[0]).unlink()
    assert read_reference(Recording("sub009", NAME, raw, None, recon, None, None), "auto", None, {"im_size": (84, 84)})["labels"] is None


@pytest.mark.parametrize("make,words", [(lambda p: p.write_bytes(b"x"*200), "not a MATLAB file"), (lambda p: savemat(p, {"y": 1}), "no variable trackdata"),
    (lambda p: savemat(p, {"trackdata": [{"frameNo": 1}]}), "not built as expected"), (lambda p: p.write_bytes(b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(124) + b"\x00\x02IM" + b"\0"*100), "7.3")])
def test_bad_tracks(tmp_path, make, words):
    make(tmp_path/"q_track.mat")
    with pytest.raises(ValueError, match=words) as e: a.read_track(tmp_path/"q_track.mat")
    assert "\n" not in str(e.value)


def test_bad_folders_and_other_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="track.mat"): a.join_annotations(tmp_path, tmp_path)
    track(tmp_path/f"{NAME}_track.mat")
    with pytest.raises(ValueError, match="none of its 0 raw files"): a.join_annotations(tmp_path, tmp_path)
    (tmp_path/"n_frame-x.json").write_text("{}")
    with pytest.raises(ValueError, match="frame-N"): a.read_hand(tmp_path/"n_frame-x.json")
    if importlib.util.find_spec("praatio"):
        (tmp_path/"n.TextGrid").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(ValueError, match="not a TextGrid"): a.read_phones(tmp_path/"n.TextGrid")


def test_split_is_whole():
    assert sorted(sum(a.SIREM_SPLIT.values(), [])) == list(a.SUBJECTS) and list(map(len, a.SIREM_SPLIT.values())) == [10, 2, 4]
