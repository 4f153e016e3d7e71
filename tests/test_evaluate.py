"Metrics against scikit-image and scipy, on sizes, shapes and bad input that a notebook does not show."
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
import torch
from skimage.metrics import mean_squared_error, normalized_root_mse, peak_signal_noise_ratio, structural_similarity

from sirem_nb.evaluate import image as im

DATA = Path(__file__).resolve().parents[1].parent/"shared"/"data"
WANG = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False)


def pair(*shape, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    ref = torch.rand(*shape, generator=g, dtype=torch.float64)
    ref = torch.tensor(scipy.ndimage.gaussian_filter(ref.numpy(), (0,)*(len(shape) - 2) + (1, 1)))
    return (ref + 0.1*torch.randn(*shape, generator=g, dtype=torch.float64)).to(dtype), ref.to(dtype)


@pytest.mark.parametrize("size", [(84, 84), (68, 91), (11, 12), (320, 40)])
@pytest.mark.parametrize("data_range", [1., 255.])
def test_agrees_with_skimage(size, data_range):
    x, ref = (a*data_range for a in pair(3, *size))
    p, s, m = (f(x, ref, data_range=data_range) for f in (im.psnr, im.ssim, im.mse))
    for i in range(3):
        a, b = x[i].double().numpy(), ref[i].double().numpy()
        assert abs(p[i].item() - peak_signal_noise_ratio(b, a, data_range=data_range)) < 1e-5
        assert abs(s[i].item() - structural_similarity(b, a, data_range=data_range, **WANG)) < 1e-5
        assert m[i].item() == pytest.approx(mean_squared_error(b, a), rel=1e-9)
        assert im.nmse(x, ref)[i].item() == pytest.approx(normalized_root_mse(b, a)**2, rel=1e-9)
        assert im.nrmse(x, ref, data_range)[i].item() == pytest.approx(math.sqrt(mean_squared_error(b, a))/data_range, rel=1e-9)


def test_ssim_map_agrees_up_to_the_border():
    x, ref = pair(40, 53)
    full = structural_similarity(ref.double().numpy(), x.double().numpy(), data_range=1., full=True, **WANG)[1]
    assert np.abs(im.ssim_map(x, ref, 1.).numpy() - full).max() < 1e-5
    edge = torch.zeros(40, 53, dtype=torch.bool)
    edge[:, :4] = True                                      # a mask that touches the border, where padding matters
    assert abs(im.ssim(x, ref, 1., edge).item() - full[edge.numpy()].mean()) < 1e-5


def test_hfen_is_the_filter_of_the_paper():
    x, ref = pair(64, 50, dtype=torch.float64)
    k = im.log_kernel().numpy()
    assert k.shape == (15, 15) and abs(k.sum()) < 1e-14 and k[7, 7] == k.min()
    log = lambda a: scipy.ndimage.correlate(a, k, mode="reflect")
    want = np.linalg.norm(log(x.numpy()) - log(ref.numpy()))/np.linalg.norm(log(ref.numpy()))
    assert im.hfen(x, ref).item() == pytest.approx(want, rel=1e-9)
    wave = torch.cos(2*math.pi*0.15*torch.arange(64.))[:, None].expand(64, 50).double()
    assert 0.9 < im.hfen(0*wave, wave).item() < 1.1 and im.hfen(wave + 5, wave).item() < 1e-9


@pytest.mark.parametrize("name", list(im.METRICS))
def test_any_batch_shape_is_a_loop_over_frames(name):
    f, (x, ref) = im.METRICS[name], pair(2, 3, 20, 24)
    mask = torch.rand(2, 3, 20, 24, generator=torch.Generator().manual_seed(1)) > 0.5
    whole, masked = f(x, ref, data_range=1.), f(x, ref, data_range=1., mask=mask)
    assert whole.shape == masked.shape == (2, 3)
    for i in np.ndindex(2, 3):
        assert whole[i].item() == pytest.approx(f(x[i], ref[i], data_range=1.).item(), rel=1e-9)
        assert masked[i].item() == pytest.approx(f(x[i], ref[i], data_range=1., mask=mask[i]).item(), rel=1e-9)
    one = f(x, ref, data_range=1., mask=mask[0, 0])         # one mask for all frames
    assert one[1, 2].item() == pytest.approx(f(x[1, 2], ref[1, 2], data_range=1., mask=mask[0, 0]).item(), rel=1e-9)
    assert not torch.allclose(whole, masked)


@pytest.mark.parametrize("name", ["mse", "nmse", "nrmse", "psnr"])
def test_outside_the_mask_does_not_count(name):
    f, (x, ref) = im.METRICS[name], pair(4, 30, 30)
    mask = torch.zeros(30, 30, dtype=torch.bool)
    mask[5:12, 8:20] = True
    changed = torch.where(mask, x, x + 7)
    assert torch.equal(f(x, ref, data_range=1., mask=mask), f(changed, ref, data_range=1., mask=mask))
    assert not torch.equal(f(x, ref, data_range=1.), f(changed, ref, data_range=1.))


def test_scores_are_means_over_frames_and_skip_empty_masks():
    x, ref = pair(5, 30, 30)
    mask = torch.zeros(5, 30, 30, dtype=torch.bool)
    mask[1:3, 10:20, 10:20] = True                          # the articulator is in two of five frames
    s = im.scores(x, ref, 1., mask)
    assert s["psnr"] == pytest.approx(im.psnr(x[1:3], ref[1:3], 1., mask[1:3]).mean().item())
    assert all(math.isnan(v) for v in im.scores(x, ref, 1., mask & False).values())
    by = im.scores_by_label(x, ref, mask.long()*4, {"tongue": 4, "velum": 6}, 1.)
    assert by["tongue"] == s and math.isnan(by["velum"]["ssim"])
    assert im.scores(ref, ref, 1.) == {"psnr": math.inf, "ssim": pytest.approx(1), "mse": 0, "nmse": 0, "nrmse": 0, "hfen": 0}


def test_integer_and_half_pictures_do_not_overflow():
    x, ref = (a.mul(255).round().clamp(0, 255).to(torch.uint8) for a in pair(2, 30, 30))
    assert torch.allclose(im.mse(x, ref), (x.double() - ref.double()).square().mean((-2, -1)))
    assert im.psnr(x.numpy(), ref.numpy(), 255.).shape == (2,)


def test_best_scale():
    x, ref = pair(2, 5, 30, 30)
    x = x*torch.tensor([3., 0.01])[:, None, None, None]
    s = im.best_scale(x, ref)
    assert s.shape == (2,)
    for i in range(2):
        want = np.linalg.lstsq(x[i].double().reshape(-1, 1).numpy(), ref[i].double().flatten().numpy(), rcond=None)[0][0]
        assert s[i].item() == pytest.approx(want, rel=1e-9)
    mask = torch.rand(30, 30, generator=torch.Generator().manual_seed(2)) > 0.3
    assert im.best_scale(x[0], ref[0], mask).item() == pytest.approx(np.linalg.lstsq(x[0][:, mask].double().reshape(-1, 1).numpy(), ref[0][:, mask].double().flatten().numpy(), rcond=None)[0][0], rel=1e-9)


@pytest.mark.parametrize("call, says", [
    (lambda x, r: im.psnr(x, r[:2], 1.), "two equal shapes"),
    (lambda x, r: im.psnr(x, r, None), "data_range"),
    (lambda x, r: im.psnr(x, r, 0), "data_range"),
    (lambda x, r: im.psnr(x, r, True), "data_range"),
    (lambda x, r: im.ssim(x, r, -1.), "data_range"),
    (lambda x, r: im.nrmse(x, r, math.nan), "data_range"),
    (lambda x, r: im.mse(x + 0j, r), "magnitude"),
    (lambda x, r: im.mse(x, r, mask=torch.ones(29, 30)), "mask of shape"),
    (lambda x, r: im.mse(x/0, r), "NaN or infinite"),
    (lambda x, r: im.ssim(x[..., :9], r[..., :9], 1.), "11 x 11"),
    (lambda x, r: im.best_scale(0*x, r), "zero everywhere"),
])
def test_bad_input_is_one_clear_line(call, says):
    x, ref = pair(3, 30, 30)
    with pytest.raises(ValueError, match=says) as e: call(x, ref)
    assert "\n" not in str(e.value)


def test_data_range_has_no_default():
    x, ref = pair(3, 30, 30)
    for f in (im.psnr, im.ssim, im.nrmse, im.scores):
        with pytest.raises(TypeError): f(x, ref)


CARDS = sorted((Path(__file__).resolve().parents[1]/"data_cards").glob("*.md"))


@pytest.mark.parametrize("card", CARDS, ids=lambda p: p.stem)
def test_data_card_has_a_header_that_hugging_face_reads(card):
    from huggingface_hub import DatasetCard
    c = DatasetCard(card.read_text())
    assert c.data.pretty_name and c.data.license and c.data.tags and c.data.size_categories
    assert c.data.license != "other" or (c.data.to_dict().get("license_name"))
    for section in ("## Known trouble", "## Not verified"): assert section in c.text, f"{card.name} does not say: {section}"


def test_every_data_set_has_its_card():
    assert {p.stem for p in CARDS} >= {"usc75", "annot16", "usc_timit", "virtual_speakers", "cine_tagged_words", "maeda"}


def test_a_real_movie_shifted_by_one_frame():
    "Neighbouring frames of real speech: the still parts make a whole-frame number kinder than one at the moving tongue."
    movie = DATA/"usc_timit"/"M1_033.avi"
    if not movie.exists(): pytest.skip("real recordings (../shared/data) are not here")
    import imageio
    frames = torch.tensor(np.stack([f[..., 0] for f in imageio.get_reader(movie)])).double()/255
    x, ref = frames[:-2], frames[2:]
    moving = frames.std(0) > frames.std(0).quantile(0.9)
    assert im.scores(x, ref, 1.)["psnr"] > im.scores(x, ref, 1., moving)["psnr"] + 2
    for i in (0, 10):
        assert abs(im.ssim(x, ref, 1.)[i].item() - structural_similarity(ref[i].numpy(), x[i].numpy(), data_range=1., **WANG)) < 1e-5
