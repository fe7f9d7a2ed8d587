"""DiMamba, the mixer 'mamba': its scan against the sequential recurrence, its net against what the
released code computes, and that all the rest works with it."""

import dataclasses
import importlib.util
import json
import math
import os
import sys
import types

import pytest
import torch
from safetensors.torch import load_file, save_file

import model
import reference
from conftest import relative
from model import DiT, ModelConfig, load_pretrained, per_token_loss, save_pretrained
from sample import generate
from test_samplers import ancestral_rule, fits
from test_train import SMALL, checkpoint, metrics

DIMAMBA = dict(mixer='mamba', norm='rmsnorm', head_bias=False)  # the published settings
SHARED_NAMES = 'mamba_rev.in_proj', 'mamba_rev.out_proj'


# --- the scan


def scan_arguments(L, dtype=torch.float64, G=2, B=3, E=5, N=4):
    torch.manual_seed(L)
    shapes = dict(
        x=(G, B, L, E), delta=(G, B, L, E), A=(G, E, N), B=(G, B, L, N), C=(G, B, L, N), D=(G, E),
        bias=(G, E)
    )
    arguments = {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}
    arguments['A'] = -2 * arguments['A'].abs()
    return [argument.requires_grad_() for argument in arguments.values()]


@pytest.mark.parametrize('L', [1, 2, 32, 33, 100])  # chunks hold 32 positions
@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_the_scan_and_its_gradients_are_those_of_the_recurrence(L, dtype, tolerance):
    arguments = scan_arguments(L, dtype)
    found = []
    for scan in (model.selective_scan, reference.selective_scan):
        y = scan(*arguments)
        torch.manual_seed(0)
        found.append([y, *torch.autograd.grad((y * torch.randn_like(y)).sum(), arguments)])
    for ours, sequential in zip(*found, strict=True):
        assert ours.shape == sequential.shape
        assert (ours - sequential).abs().max() <= tolerance * sequential.abs().max()


def test_the_scan_has_the_gradient_of_finite_differences():
    assert torch.autograd.gradcheck(model.selective_scan, scan_arguments(35, B=1, E=1, N=2))


def test_the_scan_forgets_and_remembers_over_thousands_of_positions():
    # A = 0 sums up all that came, A = -1e4 nothing: no chunk overflows
    L = 3000
    x, ones = torch.ones(1, 1, L, 1), torch.ones(1, 1, L, 1)
    for A, expected in ((0.0, torch.arange(1.0, L + 1)), (-1e4, torch.ones(L))):
        weights = torch.full((1, 1, 1), A), ones, ones, torch.zeros(1, 1), torch.zeros(1, 1)
        y = model.selective_scan(x, ones.expm1().log(), *weights)  # dt = 1
        torch.testing.assert_close(y.flatten(), expected, rtol=1e-4, atol=0)


def test_the_scan_keeps_memory_in_proportion_to_the_length():
    def kept(L):
        sizes = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        arguments = scan_arguments(L, B=1, E=8, N=16)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = model.selective_scan(*arguments)
        del y
        return sum(sizes.values())

    all_states = 2 * 1 * 1024 * 8 * 16 * 8  # bytes
    assert kept(2048) < 2.1 * kept(1024)
    assert kept(1024) < all_states


def test_the_scan_is_wide_under_autocast():
    arguments = scan_arguments(50, torch.float32)
    with torch.autocast('cpu', torch.bfloat16):
        y = model.selective_scan(*arguments)
        gradients = torch.autograd.grad(y.sum(), arguments)
    exact = model.selective_scan(*arguments)
    assert torch.equal(y, exact)
    expected = torch.autograd.grad(exact.sum(), arguments)
    assert all(map(torch.equal, gradients, expected))


@pytest.mark.parametrize('L', [1, 50, 3000])  # a chunk holds 1,638 positions
@pytest.mark.parametrize('K', [1, 4])
def test_the_convolutions_are_those_of_torch_from_either_side(K, L):
    torch.manual_seed(0)
    shapes = (2, L, 20), (2, 20, K), (2, 20)
    x, taps, bias = arguments = [
        torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]
    expected = [
        torch.nn.functional.conv1d(
            rows.transpose(1, 2), taps[i, :, None], bias[i], padding=K - 1, groups=20)[:, :, :L]
        for i, rows in enumerate((x, x.flip(1)))]
    expected = torch.nn.functional.silu(torch.stack(expected)).transpose(2, 3)
    found = model.convolve_both_ways(x, taps, bias)
    grad = torch.randn_like(found)
    ours, theirs = (
        [y, *torch.autograd.grad((y * grad).sum(), arguments)] for y in (found, expected))
    for tensor, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(tensor, other, rtol=1e-9, atol=1e-9)


def test_the_kernels_of_mamba_ssm_are_taken_on_a_gpu(tiny_net, monkeypatch):
    """A stand-in with the interface of mamba_ssm 1.1.4: x, delta (B, E, L), A (E, N), B, C
    (B, N, L), D and delta_bias (E,)."""
    calls = []

    def selective_scan_fn(
        u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,
        return_last_state=False
    ):
        assert u.dtype == delta.dtype == B.dtype == C.dtype
        assert A.dtype == D.dtype == delta_bias.dtype == torch.float32
        assert delta_softplus and z is None and not return_last_state
        calls.append(u.shape)
        u, delta, B, C = (tensor.transpose(1, 2)[None] for tensor in (u, delta, B, C))
        y = reference.selective_scan(u, delta, A[None], B, C, D[None], delta_bias[None])
        return y[0].transpose(1, 2)

    class OnGPU(torch.Tensor):
        device = torch.device('cuda')

    net, ids = tiny_net(**DIMAMBA), torch.randint(11, (3, 16))
    expected = net(ids)
    monkeypatch.setattr(model, 'selective_scan_fn', selective_scan_fn)
    assert torch.equal(net(ids), expected) and not calls  # not on a CPU
    ours = model.selective_scan

    def on_gpu(x, *rest):
        return ours(x.as_subclass(OnGPU), *rest).as_subclass(torch.Tensor)

    monkeypatch.setattr(model, 'selective_scan', on_gpu)
    assert relative(net(ids), expected) < 1e-5
    assert calls == [(3, 32, 16)] * 4  # two directions of two blocks


def test_an_installed_mamba_ssm_is_found(monkeypatch):
    def import_again():
        spec = importlib.util.spec_from_file_location('model_again', model.__file__)
        monkeypatch.setitem(sys.modules, 'model_again', importlib.util.module_from_spec(spec))
        spec.loader.exec_module(sys.modules['model_again'])
        return sys.modules['model_again'].selective_scan_fn

    names = ('mamba_ssm', 'mamba_ssm.ops', 'mamba_ssm.ops.selective_scan_interface')
    monkeypatch.setitem(sys.modules, names[0], None)  # not installed
    assert import_again() is None
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules[names[-1]].selective_scan_fn = kernel = object()
    assert import_again() is kernel


# --- the net


@torch.no_grad()
def test_dimamba_matches_the_release(shared):
    path = os.path.join(shared, 'fixtures', 'dimamba')
    expected = load_file(f'{path}_expected.safetensors')
    for conditioned, logits, nelbo in (
        (False, 'logits_sigma0', 'subs_nelbo_per_token'),
        (True, 'logits_sigma', 'subs_tc_nelbo_per_token'),
    ):
        net = load_pretrained(f'{path}.safetensors', time_conditioning=conditioned)
        assert relative(net(expected['xt'], expected['sigma']), expected[logits]) < 2e-5
        loss = per_token_loss(net, expected['x0'], expected['xt'], expected['t'])
        assert relative(loss, expected[nelbo]) < 2e-5


@torch.no_grad()
def test_the_published_files_are_read_and_written_back(shared, tmp_path):
    path = os.path.join(shared, 'fixtures', 'dimamba')
    net = load_pretrained(f'{path}.safetensors')
    assert (net.config.d_state, net.config.d_conv, net.config.expand) == (16, 4, 2)
    save_pretrained(net, tmp_path)
    theirs, ours = load_file(f'{path}.safetensors'), load_file(tmp_path / 'model.safetensors')
    with open(f'{path}_meta.json') as f:
        shapes = json.load(f)['state_dict']
    assert {name: list(tensor.shape) for name, tensor in ours.items()} == shapes
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert load_pretrained(tmp_path).config == net.config


@torch.no_grad()
def test_the_net_is_that_of_the_published_equations(tiny_net, tmp_path):
    for L, shape in ((16, {}), (37, dict(d_state=3, d_conv=2, expand=3, n_embd=18, n_head=1))):
        net = tiny_net(time_conditioning=True, **DIMAMBA | shape)
        save_pretrained(net, tmp_path)
        weights = load_file(tmp_path / 'model.safetensors')
        weights = {name: tensor.double() for name, tensor in weights.items()}
        x, sigma = torch.randint(11, (3, L)), torch.tensor([0.0, 0.3, 2.0])
        expected = reference.dimamba(weights, x, sigma.double())
        assert relative(net(x, sigma), expected) < 2e-5
        no_noise = torch.zeros(3, dtype=torch.float64)  # the features of others are float32
        expected_there = reference.dimamba(weights, x, no_noise)
        assert relative(net.double()(x, no_noise), expected_there) < 1e-9
        again = load_pretrained(tmp_path)
        assert again.config == net.config
        assert relative(again(x, sigma), expected) < 2e-5


def test_a_lightning_checkpoint_with_averages_is_read(tiny_net, tmp_path):
    net, average = tiny_net(**DIMAMBA), tiny_net(seed=1, **DIMAMBA)
    states = []
    for source in (net, average):
        save_pretrained(source, tmp_path)
        states.append(load_file(tmp_path / 'model.safetensors'))
    with open(os.path.join(tmp_path, 'config.json')) as f:
        names = [name for name in states[0] if not any(tied in name for tied in SHARED_NAMES)]
        assert json.load(f)['mixer'] == 'mamba'
    path = tmp_path / 'last.ckpt'
    torch.save(
        dict(
            state_dict={f'backbone.{name}': tensor for name, tensor in states[0].items()},
            ema=dict(shadow_params=[states[1][name] for name in names]),
        ),
        path,
    )
    x = torch.randint(11, (2, 16))
    assert torch.equal(load_pretrained(path)(x), average(x))
    assert torch.equal(load_pretrained(path, ema=False)(x), net(x))


def test_directions_that_do_not_share_their_projections_are_refused(tiny_net, tmp_path):
    save_pretrained(tiny_net(**DIMAMBA), tmp_path)
    weights = load_file(tmp_path / 'model.safetensors')
    name = 'model.bimamba.backbone.layers.1.mixer.mamba_rev.in_proj.weight'
    save_file(weights | {name: weights[name] + 1}, tmp_path / 'untied.safetensors')
    with pytest.raises(ValueError, match=f'{name} is not equal to .*mamba_fwd'):
        load_pretrained(tmp_path / 'untied.safetensors')
    lacking = {name: tensor for name, tensor in weights.items() if 'fwd.A_log' not in name}
    save_file(lacking, tmp_path / 'lacking.safetensors')
    with pytest.raises(ValueError, match='lacks blocks.0.mamba.fwd.A_log'):
        load_pretrained(tmp_path / 'lacking.safetensors')


def test_settings_that_the_release_does_not_have_come_back_from_our_own_layout(tiny_net, tmp_path):
    for i, other in enumerate((dict(norm='layernorm', head_bias=True), dict(cond_dim=0))):
        net = tiny_net(**DIMAMBA | other)
        save_pretrained(net, tmp_path / str(i))
        back = load_pretrained(tmp_path / str(i))
        assert back.config == net.config
        x = torch.randint(10, (2, 9))
        torch.testing.assert_close(back(x), net(x), atol=1e-6, rtol=1e-5)


def test_a_new_net_starts_as_the_release():
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=500, mask_id=499, n_layer=4, n_embd=256, **DIMAMBA)
    net = DiT(config)
    E, R, N, K = 512, 16, 16, 4
    assert abs(net.wte.weight.std() - 0.02) < 1e-3
    assert all((p == 0).all() for name, p in net.named_parameters() if 'adaLN' in name)
    mamba = net.blocks[1].mamba
    for direction in (mamba.fwd, mamba.rev):
        assert torch.allclose(direction.A_log, torch.arange(1.0, N + 1).log().expand(E, N))
        assert (direction.D == 1).all()
        dt = torch.nn.functional.softplus(direction.dt_proj.bias)
        assert 0.001 - 1e-6 <= dt.min() < 0.0012 and 0.08 < dt.max() <= 0.1 + 1e-6
        assert abs(dt.log().mean() - math.log(0.01)) < 0.2
    uniform = [
        (net.lm_head.weight, 256), (mamba.in_proj.weight, 256), (mamba.fwd.x_proj.weight, E),
        (mamba.fwd.dt_proj.weight, R), (mamba.fwd.conv1d.weight, K), (mamba.fwd.conv1d.bias, K),
        (mamba.out_proj.weight, E * config.n_layer)
    ]
    for weight, fan_in in uniform:  # on [-1, 1] / sqrt(fan_in)
        largest = weight.abs().max() * math.sqrt(fan_in)
        assert 0.95 < largest <= 1.0001
        assert abs(weight.std() * math.sqrt(3 * fan_in) - 1) < 0.1


def test_the_config_of_openwebtext_is_the_published_size():
    settings = {}
    with open(os.path.join(os.path.dirname(model.__file__), 'config', 'owt_dimamba.py')) as f:
        exec(f.read(), settings)
    fields = [field.name for field in dataclasses.fields(ModelConfig)]
    with torch.device('meta'):
        net = DiT(ModelConfig(**{key: settings[key] for key in fields if key in settings}))
    millions = [round(net.num_params(embedding) / 1e6, 1) for embedding in (True, False)]
    assert millions == [79.9, 28.4]


def test_flops_are_those_of_the_matrices(tiny_net):
    net = tiny_net(**DIMAMBA)
    names = ('in_proj', 'out_proj', 'x_proj', 'dt_proj')
    matrices = sum(
        p.numel()
        for name, p in net.blocks.named_parameters()
        if p.dim() == 2 and any(part in name for part in names)
    )
    scored = 20 * net.lm_head.weight.numel()
    assert net.train_flops(3, 16, 20) == 6 * (3 * 16 * matrices + scored)


@torch.no_grad()
def test_every_position_sees_both_ways(tiny_net):
    net, x = tiny_net(**DIMAMBA), torch.randint(10, (1, 16))
    changed = x.clone()
    changed[0, 8] = (x[0, 8] + 1) % 10
    assert ((net(x) - net(changed)).abs().amax(dim=-1) > 1e-6).all()


@torch.no_grad()
def test_padding_that_is_not_attended_is_not_seen(tiny_net):
    net = tiny_net(**DIMAMBA).double()
    x, seen = torch.randint(11, (2, 16)), torch.ones(2, 16, dtype=torch.bool)
    seen[1, 11:] = False
    together = net(x, attention_mask=seen)
    torch.testing.assert_close(together[1, :11], net(x[1:, :11])[0], rtol=1e-10, atol=1e-10)
    assert torch.equal(together[0], net(x)[0])
    assert not torch.allclose(net(x)[1, :11], together[1, :11], atol=1e-3)  # else it is a token


def test_the_gradient_reaches_every_parameter(tiny_net):
    net = tiny_net(time_conditioning=True, dropout=0.1, **DIMAMBA).train()
    x0 = torch.randint(10, (4, 16))
    t = torch.tensor([0.2, 0.5, 0.7, 0.9])
    xt = model.corrupt(x0, t, 10, model.loglinear, torch.Generator().manual_seed(0))
    per_token_loss(net, x0, xt, t).sum().backward()
    assert all(p.grad.abs().max() > 0 for p in net.parameters())


# --- samplers, training, settings


def test_ancestral_samples_have_the_exact_distribution(tiny_net):
    net = tiny_net(block_size=8, vocab_size=4, mask_id=3, n_layer=1, **DIMAMBA)
    template = (3, 3, 3)
    says = reference.Says(net)
    belief = torch.tensor(says.belief(template))
    assert belief[:, :3].min() > 0.01  # a test of every token
    exact = reference.chain(template, 3, ancestral_rule(says, 3))
    fits(exact, net, template, 3, 'ancestral')


@pytest.mark.parametrize('sampler', ['ancestral', 'greedy', 'semi_ar', 'first_hitting'])
def test_rows_are_their_own_whatever_the_batch_and_their_lengths(tiny_net, sampler):
    net, lengths = tiny_net(scale=0.4, **DIMAMBA).double(), [5, 13, 9]
    together = generate(net, 3, lengths, 10, sampler, prompt=[4], seed=1, batch_size=2)
    for i, n in enumerate(lengths):
        alone = generate(net, 1, n, 10, sampler, prompt=[4], seed=1, first_row=i)
        assert torch.equal(together.tokens[i, :n], alone.tokens[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    'options',
    [
        [],
        ['--T=100', '--packing=sentence', '--optimizer=muon'],
        ['--importance=True', '--schedule=linear', '--dtype=bfloat16'],
        ['--packing=pad', '--loss_on_padding=False', '--norm=rmsnorm', '--ssl_ratio=0.5'],
        ['--objective=mlm', '--cond_dim=0', '--weight_decay=0.01'],
        ['--objective=d3pm', '--T=100', '--time_conditioning=True'],
        ['--objective=d3pm', '--T=100', '--subs_masking=True', '--d_state=3', '--expand=3'],
        ['--objective=sedd', '--time_conditioning=True', '--d_conv=1', '--n_embd=17'],
    ],
)
def test_every_objective_trains_is_measured_and_sampled(mine, here, options):
    here(
        'train.py', *SMALL, '--mixer=mamba', *options, '--max_iters=20', '--eval_interval=10',
        '--sample_at_end=True'
    )
    losses, validation = metrics()
    assert validation[20]['val_loss'] < 4.9 < math.log(257)
    assert all(math.isfinite(line['loss']) for line in losses.values())
    here('eval.py', '--out_dir=out', '--num_mc=1', '--device=cpu')


def test_a_run_is_resumed_to_the_bit(mine, here):
    settings = [*SMALL, '--mixer=mamba', '--dropout=0.1']
    here('train.py', *settings, '--max_iters=4', '--out_dir=whole')
    here('train.py', *settings, '--max_iters=2')
    here('train.py', *settings, '--max_iters=4', '--init_from=resume')
    for name, tensor in checkpoint('whole')['model'].items():
        assert torch.equal(checkpoint()['model'][name], tensor)


def test_checkpoints_from_before_there_were_mixers_are_read_and_resumed(mine, here):
    here('train.py', *SMALL, '--max_iters=2')
    saved = checkpoint()
    for key in ('mixer', 'd_state', 'd_conv', 'expand'):
        del saved['model_config'][key], saved['constants'][key]
    torch.save(saved, 'out/ckpt.pt')
    assert load_pretrained('out').config.mixer == 'attention'
    here('train.py', *SMALL, '--max_iters=3', '--init_from=resume')
    with pytest.raises(ValueError, match="mixer='attention', the run mixer='mamba'"):
        here('train.py', *SMALL, '--mixer=mamba', '--init_from=resume')


def test_attention_nets_have_the_names_they_had():
    config = ModelConfig(vocab_size=11, mask_id=10, n_layer=1, n_head=2, n_embd=16, cond_dim=8)
    names = 'norm1 attn_qkv attn_out norm2 mlp_in mlp_in mlp_out mlp_out adaLN adaLN'.split()
    state = [name for name in DiT(config).state_dict() if name.startswith('blocks.0')]
    assert [name.split('.')[2] for name in state] == names


def test_neither_muon_nor_weight_decay_takes_what_is_no_matrix_of_a_product(mine, here):
    ran = here('train.py', *SMALL, '--mixer=mamba', '--max_iters=1', '--optimizer=muon')
    names = {p: name for name, p in ran['net'].named_parameters()}
    adamw, muon = ran['optimizers']
    groups = [*adamw.param_groups, *muon.param_groups]
    _, not_decayed, by_muon = ([names[p] for p in group['params']] for group in groups)
    assert 'blocks.0.mamba.fwd.A_log' in not_decayed and 'blocks.0.mamba.rev.D' in not_decayed
    parts = ['fwd.x_proj', 'fwd.dt_proj', 'rev.x_proj', 'rev.dt_proj', 'in_proj', 'out_proj']
    assert by_muon == [f'blocks.0.mamba.{part}.weight' for part in parts]


BAD = [
    (['--mixer=mambo'], "mixer='mambo'"),
    (['--d_state=0'], 'd_state=0'),
    (['--d_conv=-1'], 'd_conv=-1'),
    (['--expand=1.5'], 'expand=1.5'),
    (['--mixer=mamba', '--n_embd=0'], 'n_embd=0'),
    (['--mixer=mamba', '--objective=ar', '--causal=True'], "mixer 'mamba' looks both ways"),
    (['--mixer=mamba', '--init=smdm'], "init='smdm': it must be 'mdlm' with mixer 'mamba'"),
    (['--mixer=mamba', '--attn_dropout=0.1'], "attn_dropout=0.1: it must be 0 with mixer 'mamba'"),
]


@pytest.mark.parametrize('arguments, message', BAD)
def test_bad_settings_end_train_py_with_one_line(mine, refused, arguments, message):
    line = refused('train.py', *SMALL, *arguments)
    assert line.startswith('error: ') and line.count('\n') == 1 and message in line
    assert not os.path.exists('out')


@pytest.mark.slow
def test_the_benchmark_compares_the_mixers(run, tmp_path):
    shape = ['--n_layer=1', '--n_head=2', '--n_embd=32', '--vocab_size=300', '--block_size=8']
    table = run(
        'tests/bench.py', '--part=mamba', *shape, '--batch_size=2', '--repeats=1',
        '--dtype=float32'
    ).stdout
    with open(tmp_path / 'bench.jsonl') as f:
        rows = [json.loads(line) for line in f]
    assert [(row['name'], row['rows'], row['tokens']) for row in rows] == [
        (name, 2 if tokens < 256 else 1, tokens)
        for tokens in (8, 16, 32, 64, 128, 256)
        for name in ('attention', 'mamba')
    ]
    assert all(row['times_attention'] == 1 for row in rows if row['name'] == 'attention')
    assert table.count('| mamba |') == 6


def test_memory_is_predicted_by_one_chunk_of_the_scan(monkeypatch):
    config = ModelConfig(
        block_size=256, vocab_size=50, mask_id=49, n_layer=2, n_embd=32, cond_dim=0,
        mixer='mamba')
    states, calls = model._Scan.states, []

    def counted(*args):
        calls.append(1)
        return states(*args)

    monkeypatch.setattr(model._Scan, 'states', staticmethod(counted))
    by_one = model.memory_needed(config, 2, 256)
    assert len(calls) == 2 * 2  # forward and backward of two layers
    monkeypatch.setattr(model, 'to_work_on', lambda chunks, x: chunks)
    by_all = model.memory_needed(config, 2, 256)
    assert len(calls) > 4 + 4
    # while a chunk is made, some of the one before is still there
    assert by_one['activations'] == pytest.approx(by_all['activations'], rel=0.02)
