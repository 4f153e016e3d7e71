"The picture of the virtual head: agreement of picture, labels, outlines and motion; speed; likeness to real films in numbers."
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.path import Path as Outline

from sirem_nb.speaker.anatomy import LABELS, Head, coverage, k_disc, look_up, pixel_mm, texture_statistics
from sirem_nb.speaker.articulators import SpeakerShape, tract

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "usc_timit"
POSES = torch.tensor([[0] * 8, [.5, -2, 1, -2, 1, -1, 0, 0], [-1.5, 2, 0, -.5, .5, -.5, 0, 0], [.5, 2, 1.5, -2, -1, 1.5, 0, 0],
                      [1, -1, -1, 3, 0, 0, 0, 0], [-1.5, .5, 0, -.5, .5, -.5, 0, 1]], dtype=torch.float32)
SHAPES = [SpeakerShape(), SpeakerShape(size=.98, pharynx_scale=.88, palate_doming_mm=3., lip_thickness_mm=14., chin_mm=4.),
          SpeakerShape(size=1.16, pharynx_scale=1.12, oral_scale=1.08, pharynx_depth_mm=-3., overjet_mm=4., chin_mm=-3.)]


@pytest.fixture(scope="module")
def heads(): return [Head(shape, seed=s) for s, shape in enumerate(SHAPES)]


def inside(outline, matrix=84, fov=200.):
    x = pixel_mm(matrix, fov)
    grid = np.stack(np.meshgrid(x, x), -1).reshape(-1, 2)
    return torch.as_tensor(Outline(np.asarray(outline)).contains_points(grid).reshape(matrix, matrix))


def test_shapes_types_and_seed(heads):
    h = heads[0]
    frames, labels, motion, contours = h.render(POSES), h.labels(POSES), h.motion(POSES), h.contours_mm(POSES)
    assert frames.shape == labels.shape == (6, 84, 84) and motion.shape == (6, 84, 84, 2)
    assert frames.dtype == torch.float32 and labels.dtype == torch.uint8 and frames.isfinite().all() and frames.min() >= 0 and .5 < frames.max() < 1.5
    assert set(labels.unique().tolist()) == {0, *LABELS.values()}
    assert {"tongue", "palate", "velum", "pharynx", "larynx", "upper_lip", "lower_lip", "jaw", "epiglottis"} <= set(contours)
    assert torch.equal(Head(SHAPES[0], seed=0).render(POSES[:1]), h.render(POSES[:1]))
    assert not torch.allclose(Head(SHAPES[0], seed=9).render(POSES[:1]), h.render(POSES[:1]), atol=.05)


def test_frames_do_not_depend_on_their_neighbours(heads):
    h = heads[1]
    alone = torch.cat([h.render(p[None], 168) for p in POSES])
    assert (h.render(POSES, 168) - alone).abs().max() < 2e-3


@pytest.mark.parametrize("matrix", [68, 84, 168])
def test_any_resolution_shows_the_same_picture(heads, matrix):
    fine = k_disc(heads[0].render(POSES[:2], 336), 42)
    coarse = k_disc(heads[0].render(POSES[:2], matrix), 42)
    assert (fine - coarse).square().mean().sqrt() / fine.square().mean().sqrt() < .06


def test_contours_are_the_tract_turned_and_shifted(heads):
    for h in heads:
        ours, theirs = h.contours_mm(POSES), tract(POSES, h.shape)
        for name in theirs:
            a, b = ours[name].flatten(0, -2), 10 * theirs[name].flatten(0, -2)
            a, b = a - a.mean(0), b - b.mean(0)
            turn = math.radians(h.who.tilt_deg)
            back = a @ torch.tensor([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
            assert torch.allclose(back, b * torch.tensor([1., -1.]), atol=2e-2), name


def test_labels_agree_with_outlines_and_picture(heads):
    for h in heads:
        frames, labels, c = h.render(POSES), h.labels(POSES), h.contours_mm(POSES)
        for i in range(len(POSES)):
            tongue = labels[i] == LABELS["tongue"]
            want = inside(c["tongue"][i])
            assert (tongue & want).sum() / want.sum() > .85
            airway = inside(np.vstack([c["inner"][i, 4:-3], c["outer"][i, 4:-3].flip(0)])) & (labels[i] == 0)
            if airway.sum() > 20: assert frames[i][airway].mean() < .4 * frames[i][tongue].mean()
            for name in ("upper_lip", "lower_lip", "velum"):
                want, got = inside(c[name][i]), labels[i] == LABELS[name]
                assert 2 * (want & got).sum() / (want.sum() + got.sum()) > .6, (name, i)
        outside = (labels == 0).all(0) & (torch.arange(84) < 8)
        assert h.render(POSES)[:, outside].max() < .02


def test_the_tongue_keeps_its_area(heads):
    for h in heads:
        area = (h.labels(POSES, 168) == LABELS["tongue"]).sum((1, 2)).float() * (200 / 168) ** 2 / 100
        assert 18 < area.min() and area.max() < 45 and (area / area.mean() - 1).abs().max() < .2, area


def test_motion_carries_the_texture(heads):
    for h in heads:
        labels, motion, frames = h.labels(POSES), h.motion(POSES), h.render(POSES)
        soft, _, shade, at = h._fitted(84, 200.)
        deep = F.avg_pool2d((labels == LABELS["tongue"])[:, None].float(), 5, 1, 2)[:, 0] > .999
        again = look_up(soft["tongue"], motion.nan_to_num()) * shade
        assert deep.sum() > 500 and (again - frames)[deep].abs().max() < 1e-3
        assert motion[labels == 0].isnan().all(-1).float().mean() > .95 and motion[labels > 0].isfinite().all()
        still = (labels == LABELS["back"]).all(0)
        assert torch.allclose(motion[:, still], at[still].expand(6, -1, -1), atol=1e-4)
        assert (motion[0] - at)[labels[0] == LABELS["tongue"]].norm(dim=-1).max() < .6            # at rest nothing has moved
        assert (motion[1] - at)[labels[1] == LABELS["tongue"]].norm(dim=-1).mean() > 3            # and for [i] the tongue has


def test_a_bilabial_closure_closes_the_lips(heads):
    h, closed = heads[0], torch.tensor([[.5, 0, 0, 0, -3., 0, 0, 0], [.5, 0, 0, 0, 2., 0, 0, 0]])
    c, frames = h.contours_mm(closed), h.render(closed, 168)
    x, y = ((c["upper_lip"].mean(1) + c["lower_lip"].mean(1)) / 2).mean(0)
    i, j = round(float(y) * 168 / 200 + 84), round(float(x) * 168 / 200 + 84)
    gap = frames[:, i - 12:i + 13, j - 2:j + 3].mean(-1).amin(-1)
    assert gap[0] > 2 * gap[1]


@pytest.mark.parametrize("wrong", [dict(params=torch.zeros(4, 7)), dict(params=torch.zeros(8)), dict(params=torch.full((1, 8), float("inf"))),
                                   dict(params=torch.zeros(1, 8), matrix=3), dict(params=torch.zeros(1, 8), fov_mm=-1.)])
def test_bad_input_is_named(heads, wrong):
    with pytest.raises(ValueError, match="expected"): heads[0].render(**wrong)


def test_coverage_is_area():
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        th = torch.sort(2 * math.pi * torch.rand(9, generator=g))[0]
        r = 5 + 10 * torch.rand(9, generator=g)
        p = torch.stack([20 + r * th.cos(), 21 + r * th.sin()], -1)
        q = p.roll(-1, 0)
        area = .5 * (p[:, 0] * q[:, 1] - p[:, 1] * q[:, 0]).sum().abs()
        if area > 60: assert abs(coverage(p[None], 44, 44).sum() / area - 1) < .03


def test_as_rough_as_real_films():
    films = sorted(DATA.glob("*.avi"))
    if not films: pytest.skip("real films (shared/data/usc_timit) are not here")
    import imageio.v3 as iio

    def alike(film, k=8):
        z = film[:, 8:60:2, 8:60:2].flatten(1)
        d = torch.cdist(z, z)
        return film[d[d.topk(k, largest=False)[0].sum(1).argmin()].topk(k, largest=False)[1]]

    real = {}
    for path in films:
        film = torch.as_tensor(np.stack([f[..., 0] for f in iio.imiter(path, plugin="FFMPEG")])).float()
        real.setdefault(path.stem[:2], []).append(texture_statistics(alike(film)))
    spectra = torch.stack([torch.stack([s for s, _ in v]).mean(0) for v in real.values()])
    kurtosis = [float(np.mean([k for _, k in v])) for v in real.values()]
    ours, rough = [], []
    for seed in range(6):
        seen = [texture_statistics(f[None]) for f in k_disc(Head(seed=seed).render(POSES, 168), 68)]
        ours.append(torch.stack([s for s, _ in seen]).mean(0)); rough.append(float(np.mean([k for _, k in seen])))
    ours = torch.stack(ours)
    assert (ours > spectra.amin(0) / 2).all() and (ours < spectra.amax(0) * 2).all()
    assert min(kurtosis) <= min(rough) and max(rough) <= max(kurtosis), (kurtosis, rough)
