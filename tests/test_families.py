"""Every published layout, objective and schedule against what the released code computes. 2e-5
relative is rounding in float32; 1e-3 for the losses at T = 1000, where the release cancels."""

import dataclasses
import inspect
import json
import math
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import SHARED, relative
from model import (
    SCHEDULES, SIZES, DiT, ModelConfig, corrupt, get_schedule, load_pretrained, loglinear, on_grid,
    per_token_loss, reconstruction_loss, save_pretrained, stratified_times
)


@pytest.fixture(params=['golden', 'shared'])
def folder(request):
    path = (
        os.path.join(os.path.dirname(__file__), 'golden')
        if request.param == 'golden'
        else os.path.join(SHARED, 'fixtures')
    )
    if not os.path.isdir(path):
        pytest.skip('needs ../shared/fixtures')
    return path


def mdlm(folder, **overrides):
    return load_pretrained(os.path.join(folder, 'mdlm_hf'), **overrides), load_file(
        os.path.join(folder, 'mdlm_expected.safetensors')
    )


# --- networks


@torch.no_grad()
def test_mdlm_ar_and_lightning_match_the_release(folder):
    _, expected = mdlm(folder)
    net = load_pretrained(os.path.join(folder, 'mdlm_ar.safetensors'))
    assert net.config.causal and net.config.objective == 'ar' and net.config.n_head == 4
    x0 = expected['x0']
    log_probs = net(x0)[:, :-1, :57].log_softmax(dim=-1)  # the mask excluded
    assert relative(log_probs, expected['ar_logprob'][:, :, :57]) < 2e-5
    loss = per_token_loss(net, x0, None, None)
    assert (
        relative(loss[:, 1:], -expected['ar_logprob'].gather(2, x0[:, 1:, None]).squeeze(2)) < 2e-5
    )
    assert (loss[:, 0] == 0).all()
    ckpt = os.path.join(folder, 'mdlm_lightning.ckpt')
    assert (
        relative(load_pretrained(ckpt)(expected['xt']), expected['ckpt_ema_logits_sigma0']) < 2e-5
    )
    assert (
        relative(
            load_pretrained(ckpt, ema=False)(expected['xt']), expected['ckpt_ema_logits_sigma0']
        )
        > 1e-3
    )


@torch.no_grad()
def test_smdm_matches_the_release(folder):
    expected = load_file(os.path.join(folder, 'smdm_expected.safetensors'))
    net, ar = (
        load_pretrained(os.path.join(folder, f'{name}.safetensors'), n_head=4)
        for name in ('smdm', 'smdm_ar')
    )
    assert (net.config.vocab_size, net.config.mask_id, ar.config.vocab_size, ar.config.mask_id) == (
        89, 88, 88, None
    )
    logits = net(expected['xt'])
    assert relative(logits[:, :, :88], expected['logits']) < 2e-5
    assert (logits[:, :, 88] == -torch.inf).all()
    assert relative(ar(expected['x0']), expected['ar_logits']) < 2e-5
    assert (
        relative(
            per_token_loss(net, expected['x0'], expected['xt'], expected['p_mask']),
            expected['loss_per_token'],
        )
        < 2e-5
    )


@torch.no_grad()
def test_xlm_matches_the_release(folder):
    expected = load_file(os.path.join(folder, 'xlm_expected.safetensors'))
    meta = json.load(open(os.path.join(folder, 'xlm_meta.json')))
    net = load_pretrained(os.path.join(folder, 'xlm'))
    assert (net.config.mask_id, net.config.pad_id, net.config.n_head, net.config.objective) == (
        meta['mask_id'], meta['pad_id'], meta['nhead'], 'mlm'
    )
    assert relative(net(expected['xt']), expected['logits']) < 2e-5
    loss = per_token_loss(net, expected['x0'], expected['xt'], torch.ones(3))
    assert relative(loss.sum() / (expected['xt'] == meta['mask_id']).sum(), expected['loss']) < 2e-5


def test_sizes_are_named_after_their_parameters():
    assert len(SIZES) == 33
    for name, size in SIZES.items():
        if not name.startswith('mdlm'):
            with torch.device('meta'):
                net = DiT(
                    ModelConfig(
                        vocab_size=32001, mask_id=32000, cond_dim=0, norm='rmsnorm', mlp='swiglu',
                        mlp_bias=False, head_bias=False, head_mask=False, init='smdm', **size
                    )
                )
            assert abs(net.num_params(embedding=False) / 1e6 - int(name[:-1])) < 0.6, name


def test_smdm_starts_as_the_release():
    torch.manual_seed(0)
    net = DiT(
        ModelConfig(
            vocab_size=501, mask_id=500, n_layer=5, n_head=4, n_embd=256, cond_dim=0,
            norm='rmsnorm', mlp='swiglu', mlp_bias=False, head_bias=False, head_mask=False,
            init='smdm'
        )
    )
    for name, p in net.named_parameters():
        if p.dim() == 2:
            std = (
                1 / 16 / 5
                if name.endswith(('attn_out.weight', 'mlp_out.weight'))
                else (2 / (5 * 256)) ** 0.5
            )
            assert abs(p.std().item() / std - 1) < 0.02, name
        else:
            assert (p == 1).all()


def test_causal_nets_look_back_only(tiny_net):
    net, x = tiny_net(causal=True, objective='ar', cond_dim=0), torch.randint(10, (1, 16))
    changed = x.clone()
    changed[0, 8] = (x[0, 8] + 1) % 10
    same = (net(x) == net(changed)).all(dim=-1)[0]
    assert same[:8].all() and not same[8:].any()


# --- weights in and out


@pytest.mark.parametrize(
    'source, overrides',
    [
        ('mdlm_hf/model.safetensors', {}),
        ('mdlm_ar.safetensors', {}),
        ('smdm.safetensors', dict(n_head=4)),
        ('smdm_ar.safetensors', dict(n_head=4)),
        ('xlm/model.safetensors', {}),
    ],
)
def test_saving_gives_the_release_back_to_the_byte(folder, tmp_path, source, overrides):
    theirs = load_file(os.path.join(folder, source))
    net = load_pretrained(os.path.join(folder, source), **overrides)
    save_pretrained(net, str(tmp_path))
    ours = load_file(tmp_path / 'model.safetensors')
    assert ours.keys() == theirs.keys()
    assert all(
        torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype
        for name in theirs
    )
    again = load_pretrained(str(tmp_path))  # config.json says what the tensors cannot
    x = torch.randint(50, (2, 12))
    assert torch.equal(again(x), net(x))
    assert dataclasses.asdict(again.config) == dataclasses.asdict(net.config)


def test_mdlm_config_json_is_the_releases(folder, tmp_path):
    save_pretrained(mdlm(folder)[0], str(tmp_path))
    ours = json.load(open(tmp_path / 'config.json'))
    del ours['auto_map']  # the hub's has one too, with files of its own
    assert ours == json.load(open(os.path.join(folder, 'mdlm_hf', 'config.json')))


def test_new_nets_are_saved_with_the_names_of_the_release(folder, tmp_path, tiny_net):
    theirs = load_file(os.path.join(folder, 'mdlm_hf', 'model.safetensors'))
    save_pretrained(
        tiny_net(
            block_size=24, vocab_size=58, mask_id=57, n_layer=2, n_head=4, n_embd=32, cond_dim=16
        ),
        str(tmp_path),
    )
    ours = load_file(tmp_path / 'model.safetensors')
    assert {name: tensor.shape for name, tensor in ours.items()} == {
        name: tensor.shape for name, tensor in theirs.items()
    }
    torch.testing.assert_close(
        ours['backbone.rotary_emb.inv_freq'], theirs['backbone.rotary_emb.inv_freq']
    )


def test_sharded_safetensors_are_read(folder, tmp_path):
    theirs = load_file(os.path.join(folder, 'mdlm_hf', 'model.safetensors'))
    names = sorted(theirs)
    files = {
        'model-00001-of-00002.safetensors': names[:15],
        'model-00002-of-00002.safetensors': names[15:],
    }
    for file, some in files.items():
        save_file({name: theirs[name] for name in some}, tmp_path / file)
    json.dump(
        dict(weight_map={name: file for file, some in files.items() for name in some}),
        open(tmp_path / 'model.safetensors.index.json', 'w'),
    )
    json.dump(
        json.load(open(os.path.join(folder, 'mdlm_hf', 'config.json'))),
        open(tmp_path / 'config.json', 'w'),
    )
    x = torch.randint(50, (2, 12))
    assert torch.equal(load_pretrained(str(tmp_path))(x), mdlm(folder)[0](x))


@pytest.mark.parametrize(
    'change, overrides, message',
    [
        (
            lambda t: t.pop('transformer.ln_f.weight'),
            dict(n_head=4),
            "read in the layout 'smdm', lacks norm_f.weight",
        ),
        (
            lambda t: t.update(stray=torch.ones(1)),
            dict(n_head=4),
            "read in the layout 'smdm', has unknown stray",
        ),
        (
            lambda t: t.update({'transformer.h.1.norm_2.weight': torch.ones(5)}),
            dict(n_head=4),
            r'blocks.1.norm2.weight has shape \(5,\), the model \(32,\)',
        ),
        (
            lambda t: t.update({'transformer.h.0.attn.proj.weight': torch.ones(32, 16)}),
            dict(n_head=4),
            r'attn_out.weight has shape \(32, 16\), the model \(32, 32\)',
        ),
        (
            lambda t: None,
            {},
            'does not say how many heads its width of 32 is divided into: give n_head=',
        ),
        (
            lambda t: t.pop('transformer.wte.weight'),
            dict(n_head=4),
            'has none of the layouts mdlm, xlm, smdm',
        ),
        (lambda t: None, dict(n_heads=4), "'n_heads' is not a field"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(folder, tmp_path, change, overrides, message):
    tensors = load_file(os.path.join(folder, 'smdm.safetensors'))
    change(tensors)
    save_file(tensors, tmp_path / 'm.safetensors')
    with pytest.raises(ValueError, match=message):
        load_pretrained(str(tmp_path / 'm.safetensors'), **overrides)


def test_broken_and_absent_sources_are_refused(tmp_path):
    (tmp_path / 'm.safetensors').write_bytes(b'\x08\0\0\0\0\0\0\0{}')
    with pytest.raises(ValueError, match='is not a whole .safetensors file'):
        load_pretrained(str(tmp_path / 'm.safetensors'))
    with pytest.raises(FileNotFoundError, match='is not there'):
        load_pretrained(str(tmp_path / 'none.safetensors'))
    with pytest.raises(
        ValueError, match='hf download kuleshov-group/mdlm-owt --revision main --local-dir FOLDER'
    ):
        load_pretrained('kuleshov-group/mdlm-owt@main')


def test_the_command_line_reads_published_weights(folder, here, capsys):
    here(
        'sample.py', f'--init_from={folder}/mdlm_hf', '--num_samples=1', '--steps=4', '--device=cpu'
    )
    shown = capsys.readouterr().out
    # no tokenizer has its 58 ids: the ids themselves
    assert shown.startswith('--- sample 0')
    assert shown.count('[') == 1
    here(
        'sample.py', f'--init_from={folder}/smdm.safetensors', "--overrides={'n_head': 4}",
        '--num_samples=1', '--steps=4', '--length=8', '--device=cpu'
    )
    for source, message in (
        ('smdm.safetensors', 'give n_head='),
        ('mdlm_ar.safetensors', 'begins with a token'),
    ):
        with pytest.raises(ValueError, match=message):
            here('sample.py', f'--init_from={folder}/{source}', '--device=cpu')


def test_fine_tuning_and_measuring_published_weights(folder, here, tmp_path, monkeypatch, capsys):
    import random
    import tokenizers
    import transformers

    monkeypatch.chdir(tmp_path)
    vocabulary = [f'w{i}' for i in range(55)] + ['[UNK]']  # with EOS and the mask: 58 ids
    base = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(
            {word: i for i, word in enumerate(vocabulary)}, unk_token='[UNK]'
        )
    )
    base.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=base, unk_token='[UNK]').save_pretrained(
        'tok58'
    )
    rng = random.Random(0)
    with open('t.txt', 'w') as f:
        f.write(
            '\n\n'.join(
                ' '.join(rng.choice(vocabulary[:55]) for _ in range(40)) for _ in range(200)
            )
        )
    here('data.py', '--dataset=text:t.txt', '--tokenizer=tok58', '--name=t58')
    here(
        'eval.py', f'--init_from={folder}/mdlm_hf', '--dataset=t58', '--tokenizer=tok58',
        '--device=cpu'
    )
    assert 'bits/byte' in capsys.readouterr().out
    for source, overrides, options in (
        (f'{folder}/mdlm_hf', '{}', []),
        (f'{folder}/mdlm_ar.safetensors', '{}', ['--objective=ar', '--causal=True']),
    ):
        ran = here(
            'train.py', f'--init_from={source}', f'--overrides={overrides}', '--dataset=t58',
            '--tokenizer=tok58', '--block_size=24', '--batch_size=4', '--device=cpu',
            '--global_batch_size=8', '--max_iters=2', '--learning_rate=1e-9', '--dropout=0.0',
            '--out_dir=out', '--overwrite=True', '--sample_at_end=False', *options
        )
        assert torch.allclose(ran['net'].wte.weight, load_pretrained(source).wte.weight, atol=1e-6)


def test_a_lightning_checkpoint_with_code_in_it_gives_an_error_and_does_nothing(folder, tmp_path):
    class Attack:
        def __reduce__(self):
            return os.system, (f'touch {tmp_path}/pwned',)

    torch.save(
        dict(state_dict=dict(weight=Attack()), ema=Attack(), other=Attack()), tmp_path / 'a.ckpt'
    )
    with pytest.raises(ValueError):
        load_pretrained(str(tmp_path / 'a.ckpt'))
    good = torch.load(
        os.path.join(folder, 'mdlm_lightning.ckpt'),
        weights_only=False,
        pickle_module=pickle_without_classes(),
    )
    torch.save(
        dict(state_dict=good['state_dict'], ema=good['ema'], callbacks=Attack()),
        tmp_path / 'b.ckpt',
    )
    load_pretrained(str(tmp_path / 'b.ckpt'))  # what is foreign is ignored, not called
    assert not (tmp_path / 'pwned').exists()
    (tmp_path / 'c.ckpt').write_bytes(b'no zip')
    with pytest.raises(ValueError, match='is not a Lightning checkpoint'):
        load_pretrained(str(tmp_path / 'c.ckpt'))


def pickle_without_classes():
    import types
    from model import _TensorUnpickler

    return types.SimpleNamespace(Unpickler=_TensorUnpickler, __name__='test')


# --- objectives and schedules


@torch.no_grad()
def test_losses_match_the_release(folder):
    net, expected = mdlm(folder)
    conditioned = mdlm(folder, time_conditioning=True)[0]
    x0 = expected['x0']
    xt = expected['xt']
    t = expected['t']
    steps = expected['t_discrete']
    for name, tolerance, ours in (
        ('subs_T1000_per_token', 1e-3, per_token_loss(net, x0, xt, steps, T=1000)),
        ('d3pm_T1000_per_token', 1e-3, per_token_loss(conditioned, x0, xt, steps, 'd3pm', T=1000)),
        (
            'd3pm_subsmask_T1000_per_token',
            1e-3,
            per_token_loss(conditioned, x0, xt, steps, 'd3pm', T=1000, subs_masking=True),
        ),
        ('d3pm_reconstruction_per_token', 2e-5, reconstruction_loss(conditioned, x0)),
        ('sedd_entropy_per_token', 2e-5, per_token_loss(conditioned, x0, xt, t, 'sedd')),
        ('importance_loss_per_token', 2e-5, per_token_loss(net, x0, xt, t, importance=True)),
    ):
        assert relative(ours, expected[name]) < tolerance, name
        assert torch.equal(ours != 0, expected[name] != 0), name


def test_schedules_match_the_release(folder):
    _, expected = mdlm(folder)
    parameters = json.load(
        open(
            os.path.join(folder, '..', 'golden', 'mdlm_meta.json')
            if 'golden' in folder
            else os.path.join(folder, 'mdlm_meta.json')
        )
    )['schedule_defaults']
    t = expected['schedule_t']
    for name, some in parameters.items():
        schedule = get_schedule(name, **some)
        assert relative(schedule.sigma(t), expected[f'sigma_{name}']) < 2e-5
        assert relative(schedule.dsigma(t), expected[f'dsigma_{name}']) < 2e-5
    assert relative(loglinear.importance_time(t), expected['importance_t_loglinear']) < 2e-5


def with_other_parameters(name):
    """A schedule by its defaults, and with each number that it takes half as large."""
    yield get_schedule(name)
    for key, parameter in inspect.signature(SCHEDULES[name]).parameters.items():
        if isinstance(parameter.default, float):
            yield get_schedule(name, **{key: parameter.default / 2})


@pytest.mark.parametrize('name', SCHEDULES)
def test_schedules_are_consistent(name):
    for schedule in with_other_parameters(name):
        t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64, requires_grad=True)
        torch.testing.assert_close(
            torch.autograd.grad(schedule.sigma(t).sum(), t)[0], schedule.dsigma(t).detach()
        )
        torch.testing.assert_close(schedule.alpha(t), torch.exp(-schedule.sigma(t)))


@torch.no_grad()
@pytest.mark.parametrize('name', SCHEDULES)
def test_schedules_fall_within_their_limits_and_invert(name):
    defaults, *others = with_other_parameters(name)
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    for schedule in (defaults, *others):
        alpha = schedule.alpha(t)
        assert (alpha.diff() < 0).all() and 0.99 < alpha[0] <= 1 and 0 <= alpha[-1] < 0.7
        inner = t[1:]  # a net is told the same by the time and by the masks
        told = schedule.conditioning_at(1 - schedule.alpha(inner))
        torch.testing.assert_close(told, schedule.conditioning(inner), rtol=1e-6, atol=1e-9)
        try:
            low, high = schedule.sigma_range()
        except ValueError:
            continue  # none is defined
        sigma = torch.linspace(low, high, 50, dtype=torch.float64)
        torch.testing.assert_close(schedule.sigma(schedule.time_of(sigma)), sigma)
        masked = (1 - schedule.alpha(schedule.importance_time(t))).log()
        torch.testing.assert_close(masked.diff(), masked.diff().mean().expand(100))
    for other in others:
        assert not torch.equal(other.alpha(t), defaults.alpha(t))


@pytest.mark.parametrize(
    'name, parameters, message',
    [
        ('loglinear', dict(sigma_max=1.0), "the parameter 'sigma_max' is not known: .* eps"),
        ('loglinear', dict(eps=1.5), 'must fall'),
        ('loglinear', dict(eps='a'), 'must fall'),
        ('linear', dict(sigma_min=8.0), 'must fall'),
        ('geometric', dict(sigma_min=0), 'must fall'),
        ('change_of_variables', dict(eps=0.0), 'must fall'),
        ('cosine', dict(eps=math.nan), 'must fall'),
    ],
)
def test_parameters_that_make_no_noise_are_refused(name, parameters, message):
    with pytest.raises(ValueError, match=message):
        get_schedule(name, **parameters)


def test_the_released_linear_noise_is_the_default():
    assert get_schedule('linear') == get_schedule('linear', sigma_min=1e-3, sigma_max=7.0)


def test_every_objectives_gradient_is_that_of_its_dense_form(tiny_net):
    net = tiny_net(time_conditioning=True).double()
    x0 = torch.randint(10, (6, 16))
    t = on_grid(torch.rand(6, dtype=torch.float64), 50)
    xt = corrupt(x0, t, 10, loglinear)
    V = 11
    mask = 10
    masked = xt == mask

    def dense_d3pm():
        p = net(xt, loglinear.sigma(t)).log_softmax(dim=-1)
        log_x0 = p.gather(2, x0[:, :, None]).squeeze(2)
        p_m = p[:, :, mask].exp()
        s = (t - 1 / 50)[:, None]
        dt = 1 / 50
        t_ = t[:, None]
        kl = dt / t_ * (torch.log((1 - t_) * p_m / t_ + 1) - log_x0)
        rest = (1 - dt / t_) * (
            torch.log((1 - t_) * p_m / t_ + 1) - torch.log((1 - s) * p_m / s.clamp(min=1e-9) + 1)
        )
        return torch.where(masked, 50 * (kl + torch.where(s > 1e-6, rest, 0.0)), 0.0)

    def dense_sedd():  # equation 5 of SEDD over all V ids
        sigma = loglinear.sigma(t)
        log_score = (
            net(xt, sigma)
            - torch.log(torch.expm1(sigma))[:, None, None]
            - torch.log(torch.tensor(V - 1.0, dtype=torch.float64))
        )
        ratio = (1 / torch.expm1(sigma))[:, None]
        positive = log_score[:, :, :mask].exp().sum(dim=-1)
        negative = ratio * log_score.gather(2, x0[:, :, None]).squeeze(2)
        return torch.where(
            masked,
            loglinear.dsigma(t)[:, None] * (positive - negative + ratio * (ratio.log() - 1)),
            0.0,
        )

    weight = torch.randn(6, 16, dtype=torch.float64)
    for dense, options in (
        (dense_d3pm, dict(objective='d3pm', T=50)),
        (dense_sedd, dict(objective='sedd')),
    ):
        results = []
        for loss in (per_token_loss(net, x0, xt, t, **options), dense()):
            net.zero_grad()
            (loss * weight).sum().backward()
            results.append([loss.detach()] + [p.grad.clone() for p in net.parameters()])
        for sparse, full in zip(*results, strict=True):
            torch.testing.assert_close(
                sparse.double(), full, rtol=1e-4, atol=1e-5 * full.abs().max().item()
            )


def test_d3pm_with_subs_masking_is_subs_and_many_steps_are_continuous(tiny_net):
    net = tiny_net().double()
    x0, t = torch.randint(10, (50, 16)), on_grid(torch.rand(50, dtype=torch.float64), 100)
    xt = corrupt(x0, t, 10, loglinear)
    subs = per_token_loss(net, x0, xt, t, T=100)
    torch.testing.assert_close(
        per_token_loss(net, x0, xt, t, 'd3pm', T=100, subs_masking=True), subs
    )
    schedule, t = get_schedule('cosine'), torch.rand(50, dtype=torch.float64) * 0.8 + 0.1
    errors = [
        (
            per_token_loss(net, x0, xt, t, schedule=schedule, T=T)
            - per_token_loss(net, x0, xt, t, schedule=schedule)
        )
        .abs()
        .max()
        for T in (100, 1000, 10_000)
    ]
    assert errors[1] < errors[0] / 5 and errors[2] < errors[1] / 5


@torch.no_grad()
def test_reconstruction_excludes_the_mask_where_the_objective_does_and_unattended_padding(tiny_net):
    net, x0 = tiny_net(objective='d3pm'), torch.randint(10, (3, 16))
    logits = net(x0)
    for subs_masking, V in ((False, 11), (True, 10)):
        expected = -logits[:, :, :V].log_softmax(dim=-1).gather(2, x0[:, :, None]).squeeze(2)
        torch.testing.assert_close(
            reconstruction_loss(net, x0, subs_masking=subs_masking), expected
        )
    attention_mask = torch.ones(3, 16, dtype=torch.bool)
    attention_mask[:, 9:] = False
    torch.testing.assert_close(
        reconstruction_loss(net, x0, attention_mask=attention_mask)[:, :9],
        reconstruction_loss(net, x0[:, :9]),
    )


def test_score_entropy_is_the_nelbo_when_the_score_comes_from_subs(tiny_net, monkeypatch):
    # the score of SUBS at a masked position is p(x0 | xt) / (e^sigma - 1):
    # positive - negative + constant is then q (-log p)
    net = tiny_net().double()
    x0, t = torch.randint(10, (8, 16)), torch.rand(8, dtype=torch.float64) * 0.8 + 0.1
    xt = corrupt(x0, t, 10, loglinear)
    expected = per_token_loss(net, x0, xt, t)
    nll_and_logit = net.nll_and_logit

    def normalised(h, target, exclude=None):
        # logits that are log-probabilities, up to SEDD's log(V - 1)
        nll, _ = nll_and_logit(h, target, exclude)
        log_v = torch.log(torch.tensor(10.0, dtype=torch.float64))
        return nll, log_v - nll

    monkeypatch.setattr(net, 'nll_and_logit', normalised)
    torch.testing.assert_close(per_token_loss(net, x0, xt, t, 'sedd'), expected)


def test_importance_sampled_time_gives_the_same_nelbo_with_less_variance(tiny_net):
    net, n = tiny_net(scale=0.1), 20_000
    x0 = torch.randint(10, (n, 16))
    u = stratified_times(torch.tensor(0.3, dtype=torch.float64), torch.arange(n), n)
    with torch.no_grad():
        plain = per_token_loss(net, x0, corrupt(x0, u, 10, loglinear), u).sum(dim=1)
        t = loglinear.importance_time(u)
        important = per_token_loss(net, x0, corrupt(x0, t, 10, loglinear), t, importance=True).sum(
            dim=1
        )
    error = ((plain.var() + important.var()) / n).sqrt()
    # both read the 0.1% of eps differently
    assert abs(plain.mean() - important.mean()) < 4 * error + 2e-3 * plain.mean()


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(objective='d3pm'), 'give T, such as T=1000'),
        (dict(objective='sedd', T=10), "'sedd' is not defined in steps"),
        (dict(objective='sedd', importance=True), 'goes with objective subs'),
        (dict(importance=True, T=10), 'cannot go with T=10'),
        (dict(subs_masking=True), 'goes with objective d3pm'),
        (dict(objective='ar'), 'does not go with a net with causal=False'),
        (dict(objective='gan'), "objective 'gan' is not known"),
        (dict(T=-1), 'T=-1'),
    ],
)
def test_options_that_cannot_go_together_are_refused_by_name(tiny_net, options, message):
    with pytest.raises(ValueError, match=message):
        per_token_loss(
            tiny_net(),
            torch.zeros(1, 4, dtype=torch.int64),
            torch.full((1, 4), 10),
            torch.ones(1),
            **options,
        )
    with pytest.raises(ValueError, match='not defined for the schedule Geometric'):
        get_schedule('geometric').importance_time(torch.ones(1))
