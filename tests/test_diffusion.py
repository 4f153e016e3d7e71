"""Noise and samplers of the diffusion chapter against closed forms, against scipy's integrator, and against diffusers where it is installed."""
import itertools
import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from sirem_nb.diffusion.noise import (EdmConfig, GaussianData, Peaks, as_network, denoise, draw_sigma, edm_loss, gaussian_flow, gaussian_given, loss_weight,
                                      measure_sigma_data, precondition)
from sirem_nb.diffusion.sample import RELEASED_CHURN, SOLVERS, Churn, dpm_2m, dynamic_threshold, euler, guided, heun, karras_sigmas, known_first, sample

F64 = torch.float64
CFG = EdmConfig(sigma_data=0.4)


def normal(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gaussian(time=4, pixels=(1, 2, 1), seed=0):
    "Correlated films with a mean, of more than one pixel."
    d = time*math.prod(pixels)
    a = normal(d, d + 2, seed=seed)
    return GaussianData(0.5*normal(time, *pixels, seed=seed + 1), 0.3**2*a @ a.T/d)


def spread(x):
    return x.square().mean().sqrt().item()


# ---------------------------------------------------------------- the denoiser
def test_factors_give_unit_input_and_target():
    y, n = 0.4*normal(100_000, 1, 1, 1, 1), normal(100_000, 1, 1, 1, 1, seed=1)
    for s in (0.002, 0.1, 0.4, 3., 80.):
        skip, out, gain, _ = precondition(torch.tensor([[s]], dtype=F64), 0.4)
        x = y + s*n
        assert abs((gain*x).std() - 1) < 0.01 and abs(((y - skip*x)/out).std() - 1) < 0.01
        if 0.05 < s < 10:                                                          # c_skip is where the rest is smallest
            assert (y - skip*x).std() < min((y - k*skip*x).std() for k in (0.5, 1.5))


def test_each_frame_has_its_own_level_and_clean_frames_come_back():
    x, sigma = normal(2, 3, 1, 4, 5), torch.tensor([[0., 0.5, 3.], [0., 0., 1.]], dtype=F64)
    net = lambda x, c: torch.sin(3*x) + c[..., None, None, None]
    out = denoise(net, x, sigma, CFG)
    assert torch.equal(out[sigma == 0], x[sigma == 0])
    for b, t in itertools.product(range(2), range(3)):                             # a frame alone gives the same (this net does not look around)
        alone = denoise(net, x[b:b + 1, t:t + 1], sigma[b:b + 1, t:t + 1], CFG)
        assert torch.allclose(out[b, t], alone[0, 0], atol=1e-12)
    assert torch.isfinite(precondition(sigma, 0.4)[3]).all() and math.isclose(precondition(sigma, 0.4)[3][0, 1], math.log(0.5)/4)


def test_a_half_precision_network_gives_float32():
    x = normal(1, 2, 1, 4, 4, dtype=torch.float32)
    assert denoise(lambda x, c: x.bfloat16(), x, torch.ones(1, 2), CFG).dtype == torch.float32


def test_peaks_denoiser_is_the_posterior_mean():
    world, y = Peaks(mean=(-0.5, 0.1, 0.7), sd=(0.05, 0.2, 0.1), share=(0.3, 0.3, 0.4)), torch.linspace(-3, 3, 60_001, dtype=F64)
    prior = world.density(y)
    assert abs(torch.trapezoid(prior, y) - 1) < 1e-6
    for s, x in itertools.product((0.05, 0.4, 2.), (-0.9, 0.3, 1.)):
        w = prior*torch.exp(-(x - y)**2/(2*s*s))
        got = world.denoise(torch.full((1, 1, 1, 1, 1), x, dtype=F64), torch.full((1, 1), s, dtype=F64))
        assert abs(got.item() - (w*y).sum()/w.sum()) < 1e-6
    assert torch.isfinite(world.denoise(torch.full((1, 1, 1, 1, 1), 50.), torch.full((1, 1), 0.01))).all()


def test_gaussian_denoiser_is_the_best_linear_guess():
    data, s = gaussian(), torch.tensor([[0.1, 0.4, 0.05, 2.]], dtype=F64)
    y = data.sample(200_000, torch.Generator().manual_seed(3))
    assert (y.mean(0) - data.mean).abs().max() < 0.01 and (y.flatten(1).T.cov() - data.cov).abs().max() < 0.01
    x = y + s[..., None, None, None]*normal(*y.shape, seed=4)
    ours = data.denoise(x, s.expand(len(x), -1))
    best = torch.linalg.lstsq((x - data.mean).flatten(1), (y - data.mean).flatten(1)).solution
    assert spread((ours - data.mean).flatten(1) - (x - data.mean).flatten(1) @ best) < 5e-3
    each = torch.cat([data.denoise(x[i:i + 1], s*k) for i, k in enumerate((1, 2, 3))])     # a level for each film, too
    assert torch.allclose(data.denoise(x[:3], s*torch.tensor([[1.], [2.], [3.]])), each)


@pytest.mark.parametrize("data", [gaussian(), Peaks()], ids=["gaussian", "peaks"])
def test_flow_against_scipy(data):
    shape = (1, *data.mean.shape) if isinstance(data, GaussianData) else (1, 1, 1, 1, 1)
    x = 3*normal(*shape, seed=5)
    def slope(s, v):
        v = torch.from_numpy(v).reshape(shape)
        return ((v - data.denoise(v, v.new_full(shape[:2], s)))/s).flatten().numpy()
    end = torch.from_numpy(solve_ivp(slope, (3., 0.05), x.flatten().numpy(), rtol=1e-9, atol=1e-10, method="LSODA").y[:, -1]).reshape(shape)
    ours = heun(data.denoise, x/3, torch.logspace(math.log10(3), math.log10(0.05), 300, dtype=F64))
    assert (ours - end).abs().max() < 2e-4
    if isinstance(data, GaussianData): assert (gaussian_flow(data, x, 3., 0.05) - end).abs().max() < 1e-7


def test_flow_carries_one_distribution_into_the_other():
    data = gaussian()
    d = len(data.cov)
    basis = gaussian_flow(data, data.mean + torch.eye(d, dtype=F64).reshape(d, *data.mean.shape), 2., 0.3) - data.mean     # its matrix
    m = basis.flatten(1).T
    eye = torch.eye(d, dtype=F64)
    assert torch.allclose(m @ (data.cov + 4*eye) @ m.T, data.cov + 0.09*eye, atol=1e-10)


def test_network_of_a_denoiser():
    data, s = gaussian(), torch.tensor([[0.01, 0.5, 3., 80.]], dtype=F64)
    x = normal(1, *data.mean.shape)*5
    assert torch.allclose(denoise(as_network(data.denoise, CFG), x, s, CFG), data.denoise(x, s), atol=1e-9)


# ---------------------------------------------------------------- the loss
def test_loss_is_the_formula_and_starts_at_one():
    y, n, s = 0.4*normal(20_000, 2, 1, 1, 1), normal(20_000, 2, 1, 1, 1, seed=1), draw_sigma((20_000, 2), CFG, torch.Generator().manual_seed(2)).double()
    assert abs(edm_loss(lambda x, c: 0*x, y, s, CFG, n) - 1) < 0.03
    net = lambda x, c: 0.3*x
    by_hand = (loss_weight(s, CFG)[..., None, None, None]*(denoise(net, y + s[..., None, None, None]*n, s, CFG) - y)**2).mean()
    assert torch.isclose(edm_loss(net, y, s, CFG, n), by_hand)


def test_the_ideal_denoiser_has_the_smallest_loss():
    data = gaussian()
    y, n = data.sample(20_000, torch.Generator().manual_seed(1)), normal(20_000, *data.mean.shape, seed=2)
    s = draw_sigma((20_000, 1), CFG, torch.Generator().manual_seed(3)).double().expand(-1, 4)
    ideal = as_network(data.denoise, CFG)
    best = edm_loss(ideal, y, s, CFG, n)
    for wrong in (lambda x, c: 1.1*ideal(x, c), lambda x, c: 0.9*ideal(x, c), lambda x, c: ideal(x, c) + 0.1): assert edm_loss(wrong, y, s, CFG, n) > best


def test_known_frames_are_not_judged():
    y, n, known = normal(3, 4, 1, 2, 2), normal(3, 4, 1, 2, 2, seed=1), torch.zeros(3, 4, dtype=torch.bool)
    known[0, 0] = known[2, 3] = True
    s = torch.where(known, 0., 0.7).double()
    gain = torch.ones((), dtype=F64, requires_grad=True)
    loss = edm_loss(lambda x, c: gain*x, y, s, CFG, n, known=known)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(gain.grad)                              # although the weight of a clean frame is infinite
    spoiled = lambda x, c: torch.where((c < -1)[..., None, None, None], 100., x)            # wrong on the clean frames only
    assert torch.equal(edm_loss(spoiled, y, torch.where(known, 0.01, 0.7).double(), CFG, n, known=known), edm_loss(lambda x, c: x, y, torch.where(known, 0.01, 0.7).double(), CFG, n, known=known))
    each = edm_loss(lambda x, c: x, y[1:2], s[1:2], CFG, n[1:2])                           # judged frames are averaged, however many there are
    twice = edm_loss(lambda x, c: x, y[1:2].repeat(1, 2, 1, 1, 1), s[1:2].repeat(1, 2), CFG, n[1:2].repeat(1, 2, 1, 1, 1), known=torch.tensor([[False]*4 + [True]*4]))
    assert torch.isclose(each, twice)


def test_levels_for_training_are_log_normal():
    s = draw_sigma((50_000, 2), EdmConfig(P_mean=-1.5, P_std=0.7), torch.Generator().manual_seed(0))
    assert abs(s.log().mean() + 1.5) < 0.02 and abs(s.log().std() - 0.7) < 0.02 and s.shape == (50_000, 2)
    assert torch.equal(draw_sigma((5, 1), CFG, torch.Generator().manual_seed(1)), draw_sigma((5, 1), CFG, torch.Generator().manual_seed(1)))


def test_sigma_data_is_measured_in_pieces():
    clips = 0.3*normal(7, 5, 1, 8, 8, dtype=torch.float32) - 0.8
    assert abs(measure_sigma_data(clips) - clips.double().std(correction=0)) < 1e-6
    assert abs(measure_sigma_data(c for c in clips) - measure_sigma_data(clips)) < 1e-9


# ---------------------------------------------------------------- the solvers
def test_levels():
    s = karras_sigmas(10, EdmConfig(sigma_min=0.01, sigma_max=50., rho=5.)).numpy()
    ramp = np.linspace(0, 1, 10)
    assert np.allclose(s[:-1], (50**(1/5) + ramp*(0.01**(1/5) - 50**(1/5)))**5) and s[-1] == 0 and len(s) == 11
    assert karras_sigmas(1).tolist() == pytest.approx([80., 0.])


@pytest.mark.parametrize("name, order", [("euler", 1), ("heun", 2), ("dpm2m", 2)])
def test_order_of_convergence(name, order):
    data, z = gaussian(seed=7), normal(50, 4, 1, 2, 1, seed=8)
    exact = gaussian_flow(data, 80*z, 80., 0.002)
    errors = [spread(SOLVERS[name](data.denoise, z, karras_sigmas(n + 1)[:-1]) - exact) for n in (40, 80, 160)]
    assert all(abs(math.log2(a/b) - order) < 0.15 for a, b in zip(errors, errors[1:])), errors


@pytest.mark.parametrize("n", [1, 2, 3, 9])
def test_2m_is_the_published_formula(n):
    "Lu et al. 2022, algorithm 2 with alpha = 1, in their lambda and phi; the last step to sigma = 0 is of first order."
    data, z, s = gaussian(), normal(5, 4, 1, 2, 1), karras_sigmas(n).tolist()
    x, ds = s[0]*z, []
    for i in range(n):
        ds.append(data.denoise(x, x.new_full(x.shape[:2], s[i])))
        if s[i + 1] == 0: x = ds[-1]; continue
        lam = lambda j: -math.log(s[j])
        h = lam(i + 1) - lam(i)
        d = ds[-1]
        if i: r = (lam(i) - lam(i - 1))/h; d = (1 + 1/(2*r))*ds[-1] - 1/(2*r)*ds[-2]
        x = s[i + 1]/s[i]*x - math.expm1(-h)*d
    assert torch.allclose(dpm_2m(data.denoise, z, s), x, atol=1e-10)


@pytest.mark.parametrize("name, calls", [("euler", 6), ("dpm2m", 6), ("heun", 11)])
def test_number_of_calls(name, calls):
    seen, steps = [], []
    SOLVERS[name](lambda x, s: seen.append(s) or 0*x, normal(1, 2, 1, 1, 1), karras_sigmas(6), callback=lambda i, x, d: steps.append(i))
    assert len(seen) == calls and steps == list(range(6)) and all((s > 0).all() for s in seen)


@pytest.mark.parametrize("amount, noise", [(0., 1.), (3., 1.), (80., 1.003)])
def test_churn_in_closed_form(amount, noise):
    "One Gaussian pixel: every step is a factor and an addition to the variance, so the variance of the result is known."
    v, n, churn = 0.25, 12, Churn(amount, 0.05, 50., noise)
    data = GaussianData(torch.zeros(1, 1, 1, 1, dtype=F64), torch.tensor([[v]], dtype=F64))
    s, var = karras_sigmas(n).tolist(), 80.**2
    for a, b in zip(s, s[1:]):
        gamma = min(amount/n, math.sqrt(2) - 1) if 0.05 <= a <= 50 else 0.
        up = a*(1 + gamma)
        var += (up**2 - a**2)*noise**2
        k = up/(v + up**2)                                                        # slope of the flow, times x
        f = 1 + (b - up)*k
        if b > 0: f = 1 + (b - up)*(k + f*b/(v + b**2))/2
        var *= f**2
    made = heun(data.denoise, normal(40_000, 1, 1, 1, 1, seed=1), s, churn=churn, generator=torch.Generator().manual_seed(2))
    assert abs(made.var()/var - 1) < 4*math.sqrt(2/40_000)


def test_released_churn_with_ten_steps_is_at_its_limit():
    assert RELEASED_CHURN.gamma(1., 10) == math.sqrt(2) - 1 and RELEASED_CHURN.gamma(1., 256) == 80/256
    assert RELEASED_CHURN.gamma(60., 10) == RELEASED_CHURN.gamma(0.01, 10) == 0 == Churn().gamma(1., 10)


# ---------------------------------------------------------------- diffusers
@pytest.fixture
def diffusers():
    return pytest.importorskip("diffusers", reason="diffusers is not installed: pip install diffusers (a peer, for tests only)")


@pytest.mark.parametrize("n", [3, 10, 18])
@pytest.mark.parametrize("scheduler, solver", [("EDMEulerScheduler", euler), ("EDMDPMSolverMultistepScheduler", dpm_2m)])
def test_diffusers_edm(diffusers, scheduler, solver, n):
    data, net = gaussian(), as_network(gaussian().denoise, CFG)
    s = getattr(diffusers, scheduler)(sigma_min=0.002, sigma_max=80., sigma_data=CFG.sigma_data, rho=7.)
    s.set_timesteps(n)
    assert torch.allclose(s.sigmas.double(), karras_sigmas(n), rtol=1e-5)
    z = normal(3, 4, 1, 2, 1)
    x = 80*z
    for i, t in enumerate(s.timesteps):
        level = x.new_full(x.shape[:2], s.sigmas[i].item())
        x = s.step(net(s.scale_model_input(x, t), level.log()/4), t, x).prev_sample
    assert spread(x - solver(data.denoise, z, s.sigmas)) < 2e-5


@pytest.mark.parametrize("n", [3, 10, 18])
def test_diffusers_heun(diffusers, n):
    data = gaussian()
    s = diffusers.HeunDiscreteScheduler(use_karras_sigmas=True)
    s.set_timesteps(n)
    ours = karras_sigmas(n, EdmConfig(sigma_min=s.sigmas[-2].item(), sigma_max=s.sigmas[0].item()))
    assert torch.allclose(ours[:-1], torch.cat([s.sigmas[:1], s.sigmas[1:-1:2]]).double(), rtol=1e-5) and len(s.timesteps) == 2*n - 1
    z = normal(3, 4, 1, 2, 1)
    x = ours[0]*z
    for i, t in enumerate(s.timesteps):
        level = s.sigmas[i].item()
        x = s.step((x - data.denoise(x, x.new_full(x.shape[:2], level)))/level, t, x).prev_sample
    assert spread(x - heun(data.denoise, z, ours)) < 2e-5


# ---------------------------------------------------------------- guidance
def line(mean, v):
    return GaussianData(torch.full((1, 1, 1, 1), mean, dtype=F64), torch.tensor([[v]], dtype=F64))


@pytest.mark.parametrize("w", [0., 0.5, 1., 3.])
def test_guidance_in_closed_form(w):
    "N(0, V) and N(m, v): guided samples have variance V^(1-w) v^w; for V = v the mean w m."
    def made(condition):
        net = as_network(lambda x, s, features=None: (line(0., 0.8) if features is None else condition).denoise(x, s), CFG)
        z = torch.tensor([-1., 1.], dtype=F64).reshape(2, 1, 1, 1, 1)                              # the map is affine: two points tell it
        x = heun(guided(net, CFG, w, torch.ones(2, 1, 1, dtype=F64)), z, karras_sigmas(400)).flatten()
        return x.mean().item(), ((x[1] - x[0])/2).item()**2
    assert math.isclose(made(line(0.5, 0.3))[1], 0.8**(1 - w)*0.3**w, rel_tol=3e-3)
    assert math.isclose(made(line(0.5, 0.8))[0], 0.5*w, rel_tol=0.02, abs_tol=1e-9)


def test_guidance_one_is_no_guidance():
    calls = []
    def net(x, c_noise, features=None):
        calls.append(features)
        return 0*x if features is None else 0.1*features.mean()*x
    f = torch.ones(2, 3, 5)
    plain = sample(lambda x, c, features: 0.1*features.mean()*x, CFG, (2, 3, 1, 4, 4), f, steps=4)
    assert torch.equal(sample(net, CFG, (2, 3, 1, 4, 4), f, steps=4), plain) and len(calls) == 7 and all(c is f for c in calls)
    calls.clear()
    assert not torch.equal(sample(net, CFG, (2, 3, 1, 4, 4), f, steps=4, guidance_scale=2.), plain)
    assert len(calls) == 14 and sum(c is None for c in calls) == 7
    calls.clear()
    silence = torch.zeros(2, 3, 5)
    sample(net, CFG, (2, 3, 1, 4, 4), f, steps=1, guidance_scale=2., null=silence)
    assert calls[0] is f and calls[1] is silence
    calls.clear()
    sample(net, CFG, (2, 3, 1, 4, 4), steps=1, guidance_scale=2.)                                    # nothing to be guided by
    assert calls == [None]


def test_dynamic_threshold():
    x = normal(3, 4, 1, 5, 5)*torch.tensor([0.1, 1., 5.], dtype=F64).reshape(3, 1, 1, 1, 1)
    out = dynamic_threshold(x, 0.9)
    assert torch.equal(out[0], x[0])                                                                  # a quiet video stays
    for v, o in zip(x.numpy(), out.numpy()):
        s = max(1., np.quantile(np.abs(v), 0.9))
        assert np.allclose(o, np.clip(v, -s, s)/s, atol=1e-6)
    loud = lambda x, c, features: 0*x + 10
    assert sample(loud, CFG, (1, 2, 1, 3, 3), steps=3, threshold=0.95).abs().max() <= 1 < sample(loud, CFG, (1, 2, 1, 3, 3), steps=3).abs().max()


# ---------------------------------------------------------------- known frames
@pytest.mark.parametrize("n", [2, 7])
@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("sigma", [0., 0.2])
def test_known_frames_make_it_the_conditional_problem(name, sigma, n):
    "Step by step the sampler with known frames must do what a sampler of the exact conditional distribution does: not only in the limit."
    data, z = gaussian(), normal(3, 4, 1, 2, 1)
    given = normal(2, 1, 2, 1, seed=9)
    made = SOLVERS[name](data.denoise, z, karras_sigmas(n), known=known_first(given.expand(3, -1, -1, -1, -1), z, sigma))
    for b in range(3):
        seen = given + sigma*z[b, :2]
        rest = gaussian_given(data, seen, sigma)
        assert torch.allclose(made[b:b + 1, 2:], SOLVERS[name](rest.denoise, z[b:b + 1, 2:], karras_sigmas(n)), atol=1e-8)
        assert torch.equal(made[b, :2], seen)


def test_exact_conditional():
    data, given = gaussian(), normal(1, 1, 2, 1, seed=9)
    rest, z = gaussian_given(data, given), normal(20_000, 4, 1, 2, 1)
    made = heun(data.denoise, z, karras_sigmas(60), known=known_first(given.expand(20_000, -1, -1, -1, -1), z, 0.))[:, 1:]
    sd = rest.cov.diagonal().sqrt()
    assert ((made.mean(0) - rest.mean).flatten()/sd).abs().max() < 0.05
    assert ((made.flatten(1).T.cov() - rest.cov)/sd/sd[:, None]).abs().max() < 0.05
    y = data.sample(400_000, torch.Generator().manual_seed(1))                                       # and the formula itself, by regression on the first frame
    a, b = (y[:, :1] - data.mean[:1]).flatten(1), (y[:, 1:] - data.mean[1:]).flatten(1)
    fit = torch.linalg.lstsq(a, b).solution
    assert ((given - data.mean[:1]).flatten() @ fit - (rest.mean - data.mean[1:]).flatten()).abs().max() < 0.02
    assert ((b - a @ fit).T.cov() - rest.cov).abs().max() < 0.01


@pytest.mark.parametrize("name", SOLVERS)
def test_known_frames_anywhere_are_never_touched(name):
    data, z, frames = gaussian(), normal(2, 4, 1, 2, 1), normal(2, 4, 1, 2, 1, seed=3)
    mask, seen = torch.tensor([[True, False, False, True], [False, True, False, False]]), []
    def watched(x, s):
        seen.append(s)
        assert torch.equal(x[mask], frames[mask])
        return data.denoise(x, s)
    extra = {"churn": RELEASED_CHURN, "generator": torch.Generator().manual_seed(0)} if name == "heun" else {}
    made = SOLVERS[name](watched, z, karras_sigmas(5), known=(frames, mask, 0.), **extra)
    assert torch.equal(made[mask], frames[mask]) and not torch.isclose(made[~mask], frames[~mask]).any()
    assert all((s[mask] == 0).all() and (s[~mask] > 0).all() for s in seen)


# ---------------------------------------------------------------- sample
def perfect(data):
    return as_network(lambda x, s, features=None: data.denoise(x.double(), s.double()).to(x.dtype), CFG)


@pytest.mark.parametrize("name", SOLVERS)
def test_the_seed_decides(name):
    net, given = perfect(gaussian()), 0.5*torch.ones(2, 1, 1, 2, 1)
    make = lambda **kw: sample(net, CFG, (2, 4, 1, 2, 1), known_frames=given, steps=6, solver=name, **kw)
    state = torch.get_rng_state()
    first = make(seed=1)
    assert torch.equal(first, make(seed=1)) and torch.equal(first, make(seed=torch.Generator().manual_seed(1))) and not torch.equal(first, make(seed=2))
    assert torch.equal(torch.get_rng_state(), state)                                                  # torch's own generator is left alone
    assert torch.equal(make(seed=1, known_sigma=0.3)[:, :1], given) and not torch.equal(make(seed=1, known_sigma=0.3)[:, 1:], first[:, 1:])
    assert first.dtype == torch.float32 and not first.requires_grad


def test_churn_depends_on_the_seed_too():
    make = lambda seed, churn: sample(perfect(gaussian()), CFG, (2, 4, 1, 2, 1), steps=5, seed=seed, churn=churn)
    assert torch.equal(make(1, RELEASED_CHURN), make(1, RELEASED_CHURN)) and not torch.equal(make(1, RELEASED_CHURN), make(1, None))


def test_solvers_agree_with_many_steps():
    made = [sample(perfect(gaussian()), CFG, (3, 4, 1, 2, 1), steps=200, solver=s, seed=3) for s in ("heun", "dpm2m")]
    assert spread(made[0] - made[1]) < 2e-3


def test_a_module_decides_the_device():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = torch.nn.Parameter(torch.ones(()))
        def forward(self, x, c_noise, features=None): return self.gain*x
    assert sample(Net().to("meta"), CFG, (1, 2, 1, 3, 3), steps=2).device.type == "meta"
    for name, kw in {"heun": {"churn": RELEASED_CHURN}, "dpm2m": {"threshold": 0.9}, "euler": {"guidance_scale": 2.}}.items():   # "meta" refuses any tensor that stayed on the CPU
        made = sample(Net().to("meta"), CFG, (1, 4, 1, 3, 3), torch.ones(1, 4, 5, device="meta"), torch.ones(1, 2, 1, 3, 3), 0.1, steps=3, solver=name, **kw)
        assert made.device.type == "meta" and made.shape == (1, 4, 1, 3, 3)
    if not torch.cuda.is_available(): return
    there = sample(Net().cuda(), CFG, (1, 2, 1, 3, 3), steps=5)
    assert there.is_cuda and torch.allclose(there.cpu(), sample(Net(), CFG, (1, 2, 1, 3, 3), steps=5), atol=1e-5)


BAD = {
    "no time axis in sigma": (lambda: denoise(lambda x, c: x, torch.zeros(2, 3, 1, 4, 4), torch.ones(2), CFG), r"\(2,\): expected"),
    "four axes": (lambda: denoise(lambda x, c: x, torch.zeros(3, 1, 4, 4), torch.ones(3, 1), CFG), r"\(3, 1, 4, 4\)"),
    "all known": (lambda: edm_loss(lambda x, c: x, torch.zeros(1, 2, 1, 4, 4), torch.zeros(1, 2), CFG, torch.zeros(1, 2, 1, 4, 4), known=torch.ones(1, 2, dtype=torch.bool)), "every frame is known"),
    "constant data": (lambda: measure_sigma_data(torch.ones(3, 4)), "expected clips"),
    "NaN in the data": (lambda: measure_sigma_data(torch.tensor([0., float("nan"), 1.])), "without NaN"),
    "no data": (lambda: measure_sigma_data([]), "not empty"),
    "sigma_data 0": (lambda: EdmConfig(sigma_data=0.), "sigma_data = 0.0: expected"),
    "sigma_max below sigma_min": (lambda: EdmConfig(sigma_max=1e-3), "sigma_max"),
    "no steps": (lambda: karras_sigmas(0), "expected at least 1"),
    "unknown solver": (lambda: sample(lambda x, c, features: x, CFG, (1, 2, 1, 4, 4), solver="ddim"), "'ddim': expected one of heun, dpm2m, euler"),
    "churn with 2M": (lambda: sample(lambda x, c, features: x, CFG, (1, 2, 1, 4, 4), solver="dpm2m", churn=RELEASED_CHURN), "only with heun"),
    "all frames given": (lambda: sample(lambda x, c, features: x, CFG, (1, 2, 1, 4, 4), known_frames=torch.zeros(1, 2, 1, 4, 4)), "1 to 1 frames"),
    "frames of another size": (lambda: sample(lambda x, c, features: x, CFG, (1, 4, 1, 4, 4), known_frames=torch.zeros(1, 1, 1, 8, 8)), r"\(1, 1, 1, 8, 8\)"),
    "frames of another batch": (lambda: sample(lambda x, c, features: x, CFG, (2, 4, 1, 4, 4), known_frames=torch.zeros(1, 1, 1, 4, 4)), "2 videos"),
    "mask of another size": (lambda: heun(lambda x, s: x, torch.zeros(1, 4, 1, 2, 2), karras_sigmas(2), known=(torch.zeros(1, 4, 1, 2, 2), torch.ones(1, 3, dtype=torch.bool), 0.)), r"\(1, 3\)"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_clear_line(what):
    call, words = BAD[what]
    with pytest.raises(ValueError, match=words) as e: call()
    assert "\n" not in str(e.value)
