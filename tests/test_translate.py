"The translators: shapes, counts, gradients, the adversary's direction, files, bad input, learning a few films by heart, folds stacked in one process."
import math
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, stack_module_state, vmap

from sirem_nb.translate.adversary import Discriminator, discriminator_loss, printed_losses, translator_loss
from sirem_nb.translate.attention import SelfResidualAttention, moving_share, residuals
from sirem_nb.translate.cine_translator import CineTranslator, KeepTime, KeepTimeConfig, TranslatorConfig, count_parameters, lively_start, recon_loss, reparametrise, slice_latent
from sirem_nb.translate.disentangle import pairwise_kl, word_use
from sirem_nb.translate.folds import translate_verdict
from sirem_nb.translate.lip2audspec import AudioAutoencoder, Lip2AudSpec, Lip2AudSpecConfig, StackableLSTM, audspec_loss, corr2, inputs, time_first
from sirem_nb.translate.mel import METHODS, MEL, MelSettings, crops, griffin_lim, istft, join_windows, mel_power, mel_spectrogram, stft, to_wave
from sirem_nb.translate.train import toy_utterance

SMALL = dict(matrix=32, channels=(4, 8, 16, 16, 32))


def seeded(*shape, seed=0, normal=False):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g) if normal else torch.rand(*shape, generator=g)


def vowel(n=21000, f0=120., formants=(500., 1500., 2500.), rate=22050):
    "Harmonics under three resonances, faded in and out."
    t = torch.arange(n)/rate
    k = torch.arange(1, 60)[:, None]*f0
    strength = sum(1/(1 + ((k - f)/120)**2) for f in formants)*(k < 7500)
    wave = (strength*torch.sin(2*math.pi*k*t)).sum(0)
    return 0.3*wave/wave.abs().max()*torch.sin(math.pi*t/t[-1])


def build(config, seed=0):
    torch.manual_seed(seed)
    return CineTranslator(config)


# ---------------------------------------------------------------- mel
def test_a_tone_lights_its_band_and_loudness_does_not_matter():
    tone = 0.1*torch.sin(2*math.pi*1000*torch.arange(21000)/22050)
    mel = mel_spectrogram(tone)
    import librosa
    centres = librosa.mel_frequencies(66, fmin=MEL.fmin, fmax=MEL.fmax)[1:-1]
    assert abs(centres[mel[:, 32].argmax()] - 1000) < 30 and mel[:, 32].argmin() != mel[:, 32].argmax()
    assert torch.allclose(mel_spectrogram(tone*1e-3), mel, atol=1e-3)
    quiet = mel_spectrogram(tone*0.1, ref=mel_power(tone).max())
    assert abs((mel - quiet)[mel.argmax() // 64, 32].item() - 20/80) < 1e-3          # a tenth is 20 dB, of 80


def test_batches_are_like_single_waves():
    waves = torch.stack([vowel(), vowel(f0=200.), torch.zeros(21000)]).reshape(3, 1, 21000)
    mel = mel_spectrogram(waves)
    assert mel.shape == (3, 1, 64, 64) and not mel[2].any()
    assert torch.equal(mel[1, 0], mel_spectrogram(waves[1, 0]))


def test_crops_cover_the_recording():
    wave = torch.arange(24175.)
    c, start = crops(wave)
    assert c.shape == (100, 21000) and start[0] == 0 and start[-1] == 3175 and torch.equal(c[:, 0], wave[start]) and c[-1, -1] == wave[-1]
    c, start = crops(wave[:21000], 5)
    assert (start == 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_way_back_keeps_the_spectrogram(method):
    wave = vowel(); mel = mel_spectrogram(wave)
    back = to_wave(mel, method=method)
    assert back.shape == (21000,) and abs(back.abs().max().item() - 0.5) < 1e-5
    error = (mel_spectrogram(back) - mel).abs().mean().item()
    assert error < (0.01 if method == "descent" else 0.06), error
    assert torch.equal(back, to_wave(mel, method=method))                                # the seed decides


def test_descent_is_better_than_griffin_lim_and_ref_gives_the_level_back():
    wave = vowel(); mel, ref = mel_spectrogram(wave), mel_power(wave).max()
    error = {m: (mel_spectrogram(to_wave(mel, method=m)) - mel).abs().mean().item() for m in ("griffin-lim", "descent")}
    assert error["descent"] < 0.7*error["griffin-lim"]
    level = to_wave(mel, method="descent", ref=ref)
    assert abs(level.square().mean().sqrt().item()/wave.square().mean().sqrt().item() - 1) < 0.1


def test_silence_and_batches_on_the_way_back():
    mel = torch.stack([torch.zeros(64, 64), mel_spectrogram(vowel())])
    for method in METHODS:
        back = to_wave(mel, method=method, n_iter=5)
        assert back.shape == (2, 21000) and not back[0].any() and back[1].any() and torch.isfinite(back).all()


def test_istft_inverts_stft_and_griffin_lim_comes_nearer():
    wave = vowel()[None]
    assert torch.allclose(istft(stft(wave)), wave, atol=1e-5)
    magnitude = stft(wave).abs()
    miss = [(stft(griffin_lim(magnitude, n_iter=n, generator=torch.Generator().manual_seed(0))).abs() - magnitude).norm() for n in (1, 32)]
    assert miss[1] < 0.5*miss[0]


def test_windows_join_to_one_long_spectrogram():
    mels = torch.stack([torch.full((64, 64), v) for v in (0.2, 0.6)])
    joined, long = join_windows(mels, [0., 32*MEL.frame_s])
    assert joined.shape == (64, 96) and (long.n_frames, long.n_samples) == (96, 95*333)
    assert torch.allclose(joined[:, :32], torch.tensor(0.2)) and torch.allclose(joined[:, 64:], torch.tensor(0.6))
    assert (joined[0].diff() >= -1e-6).all() and 0.2 < joined[0, 48] < 0.6                 # a soft passage between
    assert not join_windows(mels, [0., 100*MEL.frame_s])[0][:, 64:100].any()                # a gap is silence
    assert to_wave(joined, long, "griffin-lim-torch", n_iter=2).shape == (95*333,)
    for bad in (lambda: join_windows(mels, [0.]), lambda: join_windows(mels, [-1., 0.])):
        with pytest.raises(ValueError, match="start"): bad()


@pytest.mark.parametrize("bad, word", [
    (lambda: mel_spectrogram(torch.zeros(22050)), "21000"), (lambda: mel_spectrogram(torch.full((21000,), math.nan)), "NaN"), (lambda: mel_spectrogram(torch.tensor(1.)), "21000"),
    (lambda: crops(torch.zeros(20999)), "20999"), (lambda: crops(torch.zeros(2, 21000)), "one channel"), (lambda: to_wave(torch.zeros(64, 63)), "(64, 63)"),
    (lambda: to_wave(torch.full((64, 64), math.nan)), "NaN"), (lambda: to_wave(torch.zeros(64, 64), method="wavenet"), "wavenet"),
    (lambda: MelSettings(hop=340), "hop"), (lambda: MelSettings(fmax=12000.), "11025")])
def test_bad_sound_gets_one_line(bad, word):
    with pytest.raises(ValueError) as e: bad()
    assert word in str(e.value) and "\n" not in str(e.value)


# ---------------------------------------------------------------- translator
def test_parameters_and_sizes_are_the_papers():
    net = CineTranslator().eval()
    assert count_parameters(net) == 651_101 and count_parameters(CineTranslator(TranslatorConfig(attention=True))) == 651_101 + 54_561
    with torch.no_grad(): out = net(seeded(1, 26, 128, 128))
    assert {k: tuple(v.shape[1:]) for k, v in out.items()} == {"mel": (64, 64), "mu": (14, 4, 4), "log_var": (14, 4, 4), "w": (14, 4, 4), "subject": (100, 4, 4), "z": (128, 4, 4)}
    assert 0 < out["mel"].min() and out["mel"].max() < 1


@pytest.mark.parametrize("extra", [dict(), dict(matrix=64), dict(decoder_in="text"), dict(attention=True), dict(attention=True, first_mask="drop"), dict(attention=True, first_mask="one"),
                                   dict(latent_relu=True), dict(n_frames=13)])
def test_every_parameter_gets_a_gradient(extra):
    config = TranslatorConfig(**{**SMALL, **extra})
    net = build(config, seed=1)
    out = net(seeded(2, config.n_frames, config.matrix, config.matrix), generator=torch.Generator().manual_seed(0))
    assert out["mel"].shape == (2, 64, 64) and out["z"].shape[1] == config.channels[-1] - (14 if config.decoder_in == "text" else 0)
    (recon_loss(out["mel"], seeded(2, 64, 64, seed=2)) + out["mu"].square().sum() + out["log_var"].square().sum()).backward()
    for name, p in net.named_parameters(): assert p.grad is not None and torch.isfinite(p.grad).all() and p.grad.any(), name


def test_noise_in_training_only_and_by_generator():
    net, x = build(TranslatorConfig(**SMALL)), seeded(1, 26, 32, 32)
    g = lambda: torch.Generator().manual_seed(3)
    assert torch.equal(net(x, generator=g())["w"], net(x, generator=g())["w"]) and not torch.equal(net(x)["w"], net(x)["mu"])
    assert torch.equal(net(x, eps=torch.zeros(1, 14, 4, 4))["w"], net(x)["mu"])
    assert torch.equal(net.eval()(x)["w"], net(x)["mu"])
    assert torch.equal(build(TranslatorConfig(**SMALL, sample=False))(x)["w"], net(x)["mu"])


@pytest.mark.parametrize("attention", [False, True])
def test_it_learns_two_films_by_heart(attention):
    films, mels = seeded(2, 26, 32, 32), seeded(2, 8, 8, seed=1).repeat_interleave(8, 1).repeat_interleave(8, 2)
    films[1, 10:, 10:20] = 0
    net = build(TranslatorConfig(**SMALL, attention=attention), seed=1)
    optimiser = torch.optim.Adam(net.parameters(), 3e-3, betas=(0.5, 0.999))
    flat = recon_loss(mels.mean(0, keepdim=True).expand_as(mels), mels).item()
    for _ in range(100):
        loss = recon_loss(net(films, generator=torch.Generator().manual_seed(0))["mel"], mels)
        optimiser.zero_grad(); loss.backward(); optimiser.step()
    assert loss.item() < 0.8*flat, (loss.item(), flat)            # below what ignoring the film gives


@pytest.mark.parametrize("model", [lambda: build(TranslatorConfig(**SMALL, attention=True, first_mask="drop")), lambda: Lip2AudSpec(Lip2AudSpecConfig(matrix=32))])
def test_saved_and_loaded_is_the_same(tmp_path, model):
    net, x = model(), seeded(1, 26, 32, 32)
    again = type(net).from_pretrained(net.save_pretrained(tmp_path/"net"))
    with torch.no_grad(): assert again.config == net.config and torch.equal(again(x)["mel"], net.eval()(x)["mel"])
    with pytest.raises(ValueError): AudioAutoencoder.from_pretrained(tmp_path/"net")


@pytest.mark.parametrize("bad, word", [
    (lambda: build(TranslatorConfig(**SMALL))(torch.zeros(1, 26, 64, 64)), "fit_frames"), (lambda: build(TranslatorConfig(**SMALL))(torch.zeros(26, 32, 32)), "(batch, 26, 32, 32)"),
    (lambda: TranslatorConfig(matrix=84), "84"), (lambda: TranslatorConfig(n_word=64), "128"), (lambda: TranslatorConfig(first_mask="zero"), "zero"), (lambda: TranslatorConfig(decoder=(96, 24)), "32"),
    (lambda: CineTranslator(TranslatorConfig(n_frames=33)), "33"), (lambda: SelfResidualAttention()(torch.zeros(1, 26, 84, 84)), "16")])
def test_bad_films_and_configs_get_one_line(bad, word):
    with pytest.raises(ValueError) as e: bad()
    assert word in str(e.value) and "\n" not in str(e.value)


# ---------------------------------------------------------------- attention
def test_masks_come_from_changes_only():
    attention, film = SelfResidualAttention(), seeded(1, 26, 32, 32)
    seen, masks = attention(film)
    assert torch.allclose(attention(film + 0.3)[1], masks, atol=1e-5)               # brightness does not matter
    assert torch.allclose(seen[:, 0], film[:, 0]*masks[:, 0]) and torch.allclose(seen[:, 1:], film[:, 1:]*masks)
    changed = film.clone(); changed[:, 20] = 0
    moved = (attention(changed)[1] - masks).abs().amax((0, 2, 3)) > 0
    assert moved.nonzero().flatten().tolist() == [19, 20] and not residuals(film[:, :1].expand(1, 5, 32, 32)).any()
    assert moving_share(attention(film[:, :1].expand(1, 26, 32, 32))[1]) < 1e-3


# ---------------------------------------------------------------- word and speaker
def test_kl_is_the_librarys_and_off_for_different_words():
    m1, l1, m2, l2 = (seeded(4, 14, 4, 4, seed=s, normal=True) for s in range(4))
    normal = lambda m, l: torch.distributions.Normal(m, (l/2).exp())
    want = torch.distributions.kl_divergence(normal(m1, l1), normal(m2, l2)).sum(1).mean((1, 2))
    assert torch.allclose(pairwise_kl(m1, l1, m2, l2), want.mean())
    assert torch.allclose(pairwise_kl(m1, l1, m2, l2, torch.tensor([True, False, True, False])), want[::2].mean())
    m1.requires_grad_()
    off = pairwise_kl(m1, l1, m2, l2, torch.zeros(4, dtype=torch.bool))
    off.backward()
    assert off == 0 and not m1.grad.any()


def test_slice_and_sample():
    latent = seeded(2, 128, 4, 4)
    s, m, l = slice_latent(latent)
    assert torch.equal(torch.cat([s, m, l], 1), latent) and s.shape[1] == 100
    w = reparametrise(torch.full((40000,), 2.), torch.full((40000,), math.log(9.)), torch.Generator().manual_seed(0))
    assert abs(w.mean().item() - 2) < 0.05 and abs(w.std().item() - 3) < 0.05


def test_word_use_sees_a_deaf_decoder():
    net = build(TranslatorConfig(**SMALL), seed=1).eval()
    films, mels = torch.stack([torch.zeros(26, 32, 32), seeded(26, 32, 32)]), seeded(2, 64, 64, seed=5)
    with torch.no_grad():
        for layer in net.decoder.deconvs: layer.weight *= 4
    free = word_use(net, films, mels)
    with torch.no_grad(): net.decoder.deconvs[0].weight[4:] = 0
    deaf = word_use(net, films, mels)
    assert free[0] != free[1] and deaf[0] == deaf[1]


# ---------------------------------------------------------------- adversary
def test_losses_are_cross_entropy_and_printed_signs_point_the_other_way():
    r, g = seeded(6, seed=1, normal=True).requires_grad_(), seeded(6, seed=2, normal=True).requires_grad_()
    bce = lambda x, y: F.binary_cross_entropy_with_logits(x, torch.full_like(x, y))
    assert torch.allclose(discriminator_loss(r, g), bce(r, 1.) + bce(g, 0.)) and torch.allclose(translator_loss(g), bce(g, 1.))
    sign = lambda loss, *x: [bool((v < 0).all()) for v in torch.autograd.grad(loss, x)]      # True: a step raises the logit
    dis, trans = printed_losses(r, g)
    assert sign(discriminator_loss(r, g), r, g) == [True, False] and sign(translator_loss(g), g) == [True]
    assert sign(dis, r, g) == [False, True] and sign(trans, g) == [False]
    assert torch.allclose(printed_losses(-r, -g)[1], translator_loss(g)) and printed_losses(torch.full((1,), -50.), torch.full((1,), 50.))[0] < -90


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_translators_step_makes_the_discriminator_less_sure(seed):
    net = build(TranslatorConfig(**SMALL, sample=False), seed=seed + 1)
    judge, films, mels = Discriminator(), seeded(4, 26, 32, 32), seeded(4, 64, 64, seed=7)
    optimiser = torch.optim.Adam(judge.parameters(), 1e-3)
    first = judge(net(films)["mel"]).mean().item()
    for _ in range(10):
        loss = discriminator_loss(judge(mels), judge(net(films)["mel"].detach())); optimiser.zero_grad(); loss.backward(); optimiser.step()
    sure = judge(net(films)["mel"]).mean()
    assert sure < first and judge(mels).mean() > sure                                   # it has learned to tell them apart
    optimiser = torch.optim.SGD(net.parameters(), 1e-2)
    translator_loss(judge(net(films)["mel"])).backward(); optimiser.step()
    assert judge(net(films)["mel"]).mean() > sure.detach()


# ---------------------------------------------------------------- baseline
def test_baseline_sizes_windows_and_reshape():
    net = Lip2AudSpec()
    assert count_parameters(net) == count_parameters(net.lips) == 11_910_336                # the autoencoder is frozen
    assert abs(count_parameters(Lip2AudSpec(Lip2AudSpecConfig(n_windows=1, n_columns=20)))/1e6 - 12.7) < 0.05
    x = seeded(2, 128, 5, 4, 4)
    assert torch.equal(time_first(x)[:, 3], x[:, :, 3].flatten(1)) and not torch.equal(time_first(x, False)[:, 3], x[:, :, 3].flatten(1))
    assert torch.equal(time_first(x, False).flatten(), x.permute(0, 1, 3, 4, 2).flatten())  # a reshape moves nothing
    film = seeded(1, 26, 32, 32)
    windows = inputs(film, Lip2AudSpecConfig(matrix=32))
    assert windows.shape == (1, 8, 3, 5, 32, 32) and windows[:, :, 0].min() == 0 and windows[:, :, 0].max() == 1


def test_the_last_columns_do_not_depend_on_the_first_frames():
    net, film = Lip2AudSpec(Lip2AudSpecConfig(matrix=32)).eval(), seeded(1, 26, 32, 32)
    other = film.clone(); other[:, :6] = 0.5
    with torch.no_grad(): a, b = net(film)["mel"], net(other)["mel"]
    assert torch.equal(a[..., 40:], b[..., 40:]) and not torch.equal(a[..., :8], b[..., :8])


def test_autoencoder_learns_and_stays_frozen_in_the_baseline():
    mels = mel_spectrogram(torch.stack([vowel(), vowel(f0=200., formants=(300., 2300., 3000.))]))
    torch.manual_seed(0)
    audio = AudioAutoencoder(Lip2AudSpecConfig(matrix=32))
    optimiser = torch.optim.Adam(audio.parameters(), 2e-3)
    for _ in range(80): loss = audspec_loss(audio(mels), mels); optimiser.zero_grad(); loss.backward(); optimiser.step()
    assert corr2(audio.eval()(mels), mels).min() > 0.9
    net = Lip2AudSpec(audio.config, audio).train()
    before = {k: v.clone() for k, v in audio.state_dict().items()}
    audio.zero_grad(); net(seeded(2, 26, 32, 32))["mel"].sum().backward()
    assert not audio.training and all(p.grad is None and not p.requires_grad for p in audio.parameters()) and net.lips.last.weight.grad.any()
    assert all(torch.equal(v, before[k]) for k, v in audio.state_dict().items())


def test_corr2_is_pearsons():
    a, b = seeded(3, 64, 64), seeded(3, 64, 64, seed=1)
    want = [np.corrcoef(x.flatten(), y.flatten())[0, 1] for x, y in zip(a.numpy(), b.numpy())]
    assert np.allclose(corr2(a, b), want, atol=1e-5) and torch.allclose(corr2(a, -a), -torch.ones(3)) and corr2(a[:1], torch.ones(1, 64, 64)) == 0


# ---------------------------------------------------------------- folds stacked in one process
@pytest.mark.parametrize("make, shape", [
    (lambda: CineTranslator(TranslatorConfig(**SMALL, sample=False)), (26, 32, 32)), (lambda: CineTranslator(TranslatorConfig(**SMALL, sample=False, attention=True)), (26, 32, 32)),
    (lambda: CineTranslator(TranslatorConfig(**SMALL, attention=True, first_mask="drop")), (26, 32, 32)), (Discriminator, (64, 64)),
    (lambda: Lip2AudSpec(Lip2AudSpecConfig(matrix=32)), (26, 32, 32)), (lambda: AudioAutoencoder(Lip2AudSpecConfig(matrix=32)), (64, 64)),
    (lambda: StackableLSTM(6, 4, batch_first=True), (5, 6))], ids=["cine", "tagged", "tagged-sampling", "discriminator", "lip2audspec", "autoencoder", "lstm"])
def test_folds_stack_under_vmap(make, shape):
    "Three models, three batches, one vmap: outputs and gradients as one by one."
    torch.manual_seed(0)
    folds, x = [make().train() for _ in range(3)], seeded(3, 2, *shape)
    noise = dict(eps=torch.zeros(2, 14, 4, 4)) if isinstance(folds[0], CineTranslator) else {}
    if isinstance(folds[0], (Lip2AudSpec, AudioAutoencoder)): folds = [m.eval() for m in folds]     # dropout and noise are random; see the next test for training
    pick = lambda out: out["mel"] if isinstance(out, dict) else out
    params, buffers = stack_module_state(folds)
    base = make().to("meta").train(folds[0].training)
    one = lambda p, b, x: pick(functional_call(base, (p, b), (x,), noise))
    together = vmap(one)(params, buffers, x)
    alone = torch.stack([pick(m(xi, **noise)) for m, xi in zip(folds, x)])
    assert torch.allclose(together, alone, atol=1e-5)
    slopes = vmap(grad(lambda p, b, x: one(p, b, x).square().sum()))(params, buffers, x)
    for i, (m, xi) in enumerate(zip(folds, x)):
        m.zero_grad(); pick(m(xi, **noise)).square().sum().backward()
        for name, p in m.named_parameters():
            if p.requires_grad: assert torch.allclose(slopes[name][i], p.grad, rtol=1e-3, atol=1e-4*float(p.grad.abs().max()) + 1e-7), name


def test_training_with_noise_and_batch_norm_stacks_too():
    "randomness='different' gives each fold its own draw; running averages come out per fold."
    torch.manual_seed(0)
    make = lambda: AudioAutoencoder(Lip2AudSpecConfig(matrix=32))
    folds, x = [make().train() for _ in range(2)], seeded(2, 3, 64, 64)
    params, buffers = stack_module_state(folds)
    base = make().to("meta").train()
    out = vmap(lambda p, b, x: functional_call(base, (p, b), (x,)), randomness="different")(params, buffers, x)
    for m, xi in zip(folds, x): m(xi)
    assert out.shape == (2, 3, 64, 64)
    for i, m in enumerate(folds): assert torch.allclose(buffers["encoder.1.running_mean"][i], m.encoder[1].running_mean, atol=1e-5)


# ---------------------------------------------------------------- starting values, and time that is kept
@pytest.mark.parametrize("config", [dict(matrix=32), dict(SMALL, sample=False), dict(SMALL, attention=True)])
def test_a_lively_start_lets_the_film_through(config):
    x = torch.stack([torch.from_numpy(toy_utterance(i, i % 2 == 0)[0]) for i in range(4)])
    def share(model):
        with torch.no_grad(): mel = model.eval()(x)["mel"].clamp(1e-6, 1 - 1e-6).logit()
        return float((mel - mel.mean(0)).std()/mel.std())
    blind, sees = ([share(start(build(TranslatorConfig(**config), seed))) for seed in range(3)] for start in (lambda m: m, lively_start))
    assert min(sees) > .02 and min(sees) > 5*max(blind)
    model = lively_start(build(TranslatorConfig(**config)))
    assert (model.eval()(x)["log_var"] == 0).all() and all(torch.isfinite(p).all() for p in model.parameters())


def test_keep_time_keeps_time_and_comes_back_from_a_file(tmp_path):
    torch.manual_seed(0)
    model = lively_start(KeepTime(KeepTimeConfig(matrix=32, channels=(4, 8, 8, 8, 16), hidden=32))).eval()
    x = seeded(2, 26, 32, 32).requires_grad_()
    for column, frame in ((4, 1.6), (32, 12.6), (60, 23.5)):
        g, = torch.autograd.grad(model(x)["mel"][:, :, column].sum(), x)
        weight = (g - g.median(1, keepdim=True).values).abs().sum((0, 2, 3))
        assert abs(float((weight*torch.arange(26)).sum()/weight.sum()) - frame) < 3
    again = KeepTime.from_pretrained(model.save_pretrained(tmp_path/"m"))
    assert again.config == model.config and torch.equal(again.eval()(x)["mel"], model(x)["mel"]) and model(x)["mel"].shape == (2, 64, 64)
    with pytest.raises(ValueError, match="expected \\(batch, 26, 32, 32\\)"): model(seeded(2, 25, 32, 32))


# ---------------------------------------------------------------- a table and what may be said of it
def test_freed_memory_is_kept_for_the_next_step():
    "As in a dask worker, which gives it back: the pages that one more step has to fetch, before and after."
    code = """
        import resource, torch
        from sirem_nb.learning.training import keep_memory
        pages = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        def step(): a = torch.ones(2**20); b = a + 1; return float((a*b).sum())         # tensors of 4 MB
        for prepare in (lambda: None, keep_memory):
            prepare()
            for _ in range(10): step()
            before = pages()
            for _ in range(50): step()
            print(pages() - before)
    """
    given, kept = (int(v) for v in subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True, env={**os.environ, "MALLOC_TRIM_THRESHOLD_": "65536"}).stdout.split())
    if not sys.platform.startswith("linux"): pytest.skip("another C library")
    assert given > 100*1024, given                              # of 150 tensors, 1024 pages each
    assert kept < 15*1024, (given, kept)                        # the heap may still grow by a tensor or two


def verdict(sound, word):
    "Recordings with these gains over the mean sound and over the mean of the word."
    record = lambda method, i, v: {"table": "translate", "kind": "cine", "method": method, "seed": 0, "recording": f"r{i}", "metric": "l1", "unit": "", "value": v}
    return translate_verdict([record("ours", i, .1) for i in range(len(sound))] + [record("mean-spectrogram", i, .1 + g) for i, g in enumerate(sound)] + [record("mean-of-word", i, .1 + g) for i, g in enumerate(word)])


@pytest.mark.parametrize("sound, word, last", [
    ([.02, .00, -.01], [.02, .01, -.01], "So 3 recordings cannot decide whether it has learned anything from the films."),
    ([.030, .032, .031], [.02, .01, -.01], "So 3 recordings cannot decide whether it has learned more than the word."),
    ([.05, .051, .049], [-.02, -.021, -.019], "So it has learned the word and not the speech."),
    ([-.02, -.021, -.019], [-.02, -.021, -.019], "So it has learned the mean sound at best, and not even the word."),
    ([.05, .051, .049], [.02, .021, .019], "So it has learned more than the mean of the word.")])
def test_a_verdict_says_no_more_than_its_recordings(sound, word, last):
    lines = verdict(sound, word)
    assert lines[-1] == last and len(lines) == 3 and "95 % interval" in lines[0] and "of 3 recordings" in lines[1]


def test_a_few_recordings_need_a_wide_interval():
    "Student's t: with three recordings 4.3 standard errors to each side, with sixty-three two. The same mean gain and spread."
    gain = lambda n: [.01 + .008*(i % 3 - 1) for i in range(n)]
    assert "cannot be told apart" in verdict(gain(3), gain(3))[0] and "beats mean-spectrogram" in verdict(gain(63), gain(63))[0]
    assert verdict([.02], [.02]) == [f"ours beside {c} in l1: +0.0200 on one recording, which decides nothing" for c in ("mean-spectrogram", "mean-of-word")]
