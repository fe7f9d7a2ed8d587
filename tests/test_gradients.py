"""The gradient of a step, whatever it is cut into, its times and rate; constants that are idle."""

import math
import os
import zlib

import pytest
import torch
from torch.overrides import TorchFunctionMode

import model
from eval import exp, guided_log_probs, nelbo
from model import load_pretrained, per_token_loss
from sample import SAMPLERS, TAKES, analytic_probs, generate
from test_train import SMALL, checkpoint, metrics


def corrupt_by_row(x0, t, mask_id, schedule, generator=None, maskable=None):
    """model.corrupt with masks that are a function of the row, in whatever batch it comes."""
    keys = [zlib.crc32(row.numpy().tobytes()) for row in x0]
    u = [torch.rand(x0.size(1), generator=torch.Generator().manual_seed(key)) for key in keys]
    masked = (torch.stack(u) < 1 - schedule.alpha(t)[:, None]) & maskable
    return torch.where(masked, mask_id, x0)


def first_step(out_dir):
    """Loss and norm as logged, and the gradient that Adam saw: 10 times its first average."""
    line = metrics(out_dir)[0][1]
    state = checkpoint(out_dir)['optimizer'][0]['state']
    gradient = torch.cat([10 * state[i]['exp_avg'].flatten() for i in sorted(state)])
    return torch.tensor([line['loss'], line['grad_norm']]), gradient


def assert_same_step(a, b):
    # float32 sums in another order; relative to the largest entry
    for ours, theirs in zip(first_step(a), first_step(b), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())


ONE_STEP = [*SMALL, '--max_iters=1', '--warmup_iters=0', '--grad_clip=0', '--dropout=0']
PACKINGS = dict(
    wrap=[], concat=['--packing=concat'], pad=['--packing=pad'], sentence=['--packing=sentence'],
    unattended=['--packing=pad', '--loss_on_padding=False'],
)  # fmt: skip
OBJECTIVES = dict(
    subs=[], mlm=['--objective=mlm'], sedd=['--objective=sedd', '--time_conditioning=True'],
    d3pm=['--objective=d3pm', '--T=100'], ar=['--objective=ar', '--causal=True', '--cond_dim=0'],
    factor=['--objective=mlm', '--use_num_masked_factor=True'],
    visible=['--objective=mlm', '--loss_on_visible_tokens=True'],
)  # fmt: skip
assert set(OBJECTIVES) >= set(model.OBJECTIVES)


@pytest.mark.parametrize(
    'packing, objective',
    [(packing, 'mlm') for packing in PACKINGS] + [('sentence', name) for name in OBJECTIVES],
)
def test_micro_batches_give_the_gradient_of_one_big_batch(
    mine, here, monkeypatch, packing, objective
):
    monkeypatch.setattr(model, 'corrupt', corrupt_by_row)
    options = [*ONE_STEP, *PACKINGS[packing], *OBJECTIVES[objective]]
    here('train.py', *options, '--batch_size=8', '--out_dir=big')
    here('train.py', *options, '--batch_size=1', '--out_dir=small')
    assert_same_step('small', 'big')


def test_micro_batches_may_count_alike_as_released(mine, here):
    options = [*ONE_STEP, *PACKINGS['sentence'], *OBJECTIVES['ar'], '--batch_size=1']
    ran = here('train.py', *options, '--out_dir=start')
    losses, counts = [], []
    for micro in range(8):
        batch = ran['training_batch'](0, micro)
        with torch.no_grad():
            loss = model.per_token_loss(ran['ema_net'], batch['x0'], None, batch['t'])
        losses.append((loss * batch['scored']).sum().item())
        counts.append(batch['scored'].sum().item())
    assert len(set(counts)) > 1
    by_row = sum(loss / count for loss, count in zip(losses, counts, strict=True)) / 8
    for norm, expected in (('micro', by_row), ('step', sum(losses) / sum(counts))):
        here('train.py', *options, f'--loss_norm={norm}', '--init_from=start', f'--out_dir={norm}')
        assert metrics(norm)[0][1]['loss'] == pytest.approx(expected, rel=1e-5)
    assert sum(losses) / sum(counts) != pytest.approx(by_row, rel=1e-4)


DRIVER = f"""
import runpy, sys
sys.path[:0] = [{os.path.dirname(__file__)!r}, {os.path.dirname(os.path.dirname(__file__))!r}]
import model
from test_gradients import corrupt_by_row
model.corrupt = corrupt_by_row
sys.argv[0] = {os.path.join(os.path.dirname(os.path.dirname(__file__)), 'train.py')!r}
runpy.run_path(sys.argv[0], run_name='__main__')
"""


@pytest.mark.slow
@pytest.mark.parametrize('shard', [False, True])
def test_two_processes_give_the_gradient_of_one_big_batch(mine, run, tmp_path, shard):
    (tmp_path / 'driver.py').write_text(DRIVER)
    driver = str(tmp_path / 'driver.py')
    options = [*ONE_STEP, *PACKINGS['sentence'], *OBJECTIVES['mlm']]
    run(driver, *options, '--batch_size=8', '--out_dir=one')
    run(driver, *options, '--batch_size=1', f'--shard={shard}', '--out_dir=two', processes=2)
    assert_same_step('two', 'one')


# --- times, rates, cuts, validation


def test_times_are_sampled_as_each_family_does(mine, here):
    u = {}
    for kind in ('stratified', 'per_process', 'iid'):
        options = [f'--time_sampling={kind}', '--sampling_eps=0.2', '--overwrite=True']
        ran = here('train.py', *ONE_STEP, *options)
        t = torch.stack([ran['times_of'](step, micro) for step in range(50) for micro in range(4)])
        assert torch.equal(t[4 * 7 + 3], ran['times_of'](7, 3))  # of (seed, step, micro) alone
        assert t.min() >= 0.2 and t.max() < 1
        u[kind] = ((t.double() - 0.2) / 0.8).view(50, 4, 2)  # steps, micro-batches, rows
    # 8 strata a step at one offset; 2 a micro-batch, each with an offset of its own; none
    offset = u['stratified'].flatten(1).sort(dim=1).values * 8 % 1
    assert ((offset - offset[:, :1] + 0.5) % 1 - 0.5).abs().max() < 1e-5
    per_process = u['per_process']
    assert torch.equal((per_process * 2).long(), torch.tensor([0, 1]).expand(50, 4, 2))
    offset = (per_process * 2 % 1).flatten()
    assert offset.std() > 0.25 and (per_process[:, :, 1] - per_process[:, :, 0]).std() > 0.1
    iid = u['iid'].flatten()
    counts = torch.bincount((iid * 8).long(), minlength=8).double()
    assert 1 < ((counts - 50) ** 2 / 50).sum() < 21  # chi-squared of 7: 0.5% on either side
    assert len(iid.unique()) == 400


def test_smdm_masks_with_the_probability_that_it_weighs_by(mine, here):
    # p = (1 - eps) u + eps, weight 1 / p: schedule and times of config/smdm_mdm.py
    ran = here('train.py', *ONE_STEP, "--schedule_parameters={'eps': 0.0}", '--time_sampling=iid')
    schedule, t = ran['schedule'], ran['times_of'](0, 0)
    torch.testing.assert_close(1 - schedule.alpha(t), t, rtol=0, atol=6e-8)
    weight = schedule.dsigma(t) / torch.expm1(schedule.sigma(t))
    torch.testing.assert_close(weight, 1 / t, rtol=1e-5, atol=0)
    largest = model.stratified_times(torch.tensor(1 - 1e-12, dtype=torch.float64), 0, 1, eps=0)
    assert math.isfinite(schedule.dsigma(largest) / torch.expm1(schedule.sigma(largest)))


@pytest.mark.parametrize('objective', ['subs', 'sedd'])
def test_a_net_trained_without_eps_can_be_sampled(tiny_net, objective):
    net = tiny_net(objective=objective, time_conditioning=True)
    net.constants = dict(schedule='loglinear', schedule_parameters={'eps': 0.0})
    for sampler in SAMPLERS:
        if model.OBJECTIVES[objective].predicts in TAKES[sampler]:
            tokens = generate(net, 4, 8, 5, sampler).tokens
            assert ((tokens >= 0) & (tokens < 10)).all()


def test_schedule_parameters_travel_with_the_checkpoint(mine, here):
    parameters = "{'sigma_min': 0.01, 'sigma_max': 5.0}"
    options = ['--schedule=linear', f'--schedule_parameters={parameters}', '--sampling_eps=0.01']
    here('train.py', *ONE_STEP, *options)
    net = load_pretrained('out')
    schedule = model.schedule_of(net.constants)
    assert schedule == model.Linear(0.01, 5.0) and net.constants['sampling_eps'] == 0.01
    asked = []
    net.constants = Asked(asked, net.constants)
    generate(net, 1, 4, 2)
    assert 'schedule_parameters' in asked
    # before they were recorded, linear was from 1e-4 to 20
    old = checkpoint()
    del old['constants']['schedule_parameters']
    torch.save(old, 'out/ckpt.pt')
    assert model.schedule_of(load_pretrained('out').constants) == model.Linear(1e-4, 20.0)


class Asked(dict):
    """A dict that notes which keys are read."""

    def __init__(self, asked, entries):
        super().__init__(entries)
        self.asked = asked

    def get(self, key, default=None):
        self.asked.append(key)
        return super().get(key, default)


@pytest.mark.parametrize('offset, rates', [(None, [5e-3, 1e-2]), (0, [0.0, 5e-3, 1e-2])])
def test_the_warm_up_may_begin_at_zero_as_released(mine, here, offset, rates):
    options = ['--max_iters=3', f'--lr_offset={offset}', '--eval_interval=100']
    here('train.py', *SMALL, *options)
    logged = [line['lr'] for line in metrics()[0].values()]
    assert logged == pytest.approx(rates + [1e-2] * (3 - len(rates)), rel=1e-12)


def test_neighbouring_micro_batches_may_share_a_cut(mine, here):
    lengths = {}
    for group in (1, 2):
        options = [*ONE_STEP, '--ssl_ratio=1.0', f'--ssl_group={group}']
        ran = here('train.py', *options, '--overwrite=True')
        lengths[group] = [[ran['row_length_of'](step, micro) for micro in range(4)]
                          for step in range(20)]  # fmt: skip
    assert all(a == b and c == d for a, b, c, d in lengths[2])
    assert any(a != c for a, _, c, _ in lengths[2])
    assert any(a != b for a, b, _, _ in lengths[1])
    assert {length for step in lengths[2] for length in step} <= set(range(1, 17))


def test_mlm_runs_log_xlms_validation_loss_over_the_whole_split(mine, here):
    options = [*SMALL, '--objective=mlm', '--max_iters=3', '--eval_interval=3', '--packing=pad']
    ran = here('train.py', *options, '--eval_iters=0')
    logged = metrics()[1][3]
    assert set(logged) == {'iter', 'val_loss', 'val_bpb', 'val_mlm_loss'}
    net, rows, n = ran['ema_net'], ran['val_rows'], len(ran['val_rows'])
    assert n > 8
    total = count = 0
    for start in range(0, n, 2):  # the textbook's: all logits, the mean at masks
        index = torch.arange(start, min(start + 2, n))
        t = model.stratified_times(0.5, torch.from_numpy(ran['permute'](index.numpy(), n, 0)), n)
        generator = torch.Generator().manual_seed(ran['key_of'](start))
        x0 = rows[index.numpy()]['x0']
        xt = model.corrupt(x0, t, ran['mask_id'], ran['schedule'], generator)
        with torch.no_grad():
            logits = net(xt)
        masked = xt == ran['mask_id']
        total += torch.nn.functional.cross_entropy(logits[masked], x0[masked], reduction='sum')
        count += masked.sum()
    assert logged['val_mlm_loss'] == pytest.approx((total / count).item(), rel=1e-5)
    here('train.py', *options, '--eval_iters=1', '--out_dir=first')
    assert metrics('first')[1][3]['val_loss'] != logged['val_loss']


# --- numbers that are too large, or none


@pytest.mark.parametrize('option', ['--flops=1e300', '--max_iters=1' + 300 * '0'])
def test_a_run_without_an_end_starts(mine, here, option, monkeypatch):
    from concurrent.futures import ThreadPoolExecutor

    def only_two_steps(pool, function, step, micro):
        if step == 2:
            os.kill(os.getpid(), 15)
        return submit(pool, function, step, micro)

    submit = ThreadPoolExecutor.submit
    monkeypatch.setattr(ThreadPoolExecutor, 'submit', only_two_steps)
    arguments = [a for a in SMALL if not a.startswith('--max_iters')]
    here('train.py', *arguments, option, '--lr_schedule=cosine', '--warmup_share=0.5')
    assert 2 <= max(metrics()[0]) <= 3


@pytest.mark.parametrize('option', ['--flops=1e999', '--flops=1' + 400 * '0'])
def test_what_no_float_holds_is_one_line(mine, refused, option):
    stderr = refused('train.py', *SMALL, option)
    assert stderr.startswith('error: flops=') and stderr.count('\n') == 1


def test_a_clock_that_is_set_back_does_not_show(mine, here, capsys, monkeypatch):
    import time

    moments = iter(range(10**9, 0, -3600))
    monkeypatch.setattr(time, 'time', lambda: next(moments))
    here('train.py', *SMALL)
    assert all(line['tokens_per_s'] > 0 for line in metrics()[0].values())
    assert '-' not in capsys.readouterr().out.replace('e-', '')


def test_perplexities_overflow_to_inf_and_nan_weights_are_an_error(tiny_net, rows):
    assert exp(709.0) == pytest.approx(math.exp(709)) and exp(1e4) == math.inf
    net, rows = tiny_net(vocab_size=257, mask_id=256), rows()
    with torch.no_grad():
        net.lm_head.weight *= 1e7
    result = nelbo(net, rows, max_rows=4)
    assert result['nats_per_token'] > 709 and result['ppl'] == math.inf
    with torch.no_grad():
        net.lm_head.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match='are not numbers'):
        nelbo(net, rows, max_rows=4)


# --- constants that do nothing


@pytest.mark.parametrize(
    'arguments, said',
    [
        (['--min_lr=1e-3'], "min_lr=0.001 (it needs lr_schedule='cosine')"),
        (['--min_lr=1e-3', '--lr_schedule=cosine'], None),
        (['--loss_on_padding=False'], "loss_on_padding=False (it needs packing='pad' or 'pair')"),
        (['--loss_on_padding=False', '--packing=pad'], None),
        (['--warmup_share=0.5'], 'warmup_share=0.5 (it needs a larger max_iters)'),
        (['--warmup_share=0.5', '--warmup_iters=0'], None),
        (['--ssl_group=2'], 'ssl_group=2 (it needs ssl_ratio)'),
        (["--overrides={'n_head': 2}"], "overrides={'n_head': 2} (it needs weights in init_from)"),
        (
            [*OBJECTIVES['ar'], '--schedule=cosine', '--sampling_eps=0'],
            "schedule='cosine' (it needs an objective with noise), "
            'sampling_eps=0.0 (it needs an objective with noise)',
        ),
        ([], None),
    ],
)
def test_constants_that_do_nothing_are_said(mine, here, capsys, arguments, said):
    here('train.py', *SMALL, '--max_iters=1', *arguments)
    lines = [line for line in capsys.readouterr().out.splitlines() if 'warning' in line]
    assert lines == ([f'warning: these do nothing: {said}'] if said else [])


# --- a device without float64


class LikeMPS(TorchFunctionMode):
    """Tensors say that they are on MPS, and none of them becomes float64."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function == torch.Tensor.device.__get__:
            return torch.device('mps')
        kwargs = {key: value for key, value in (kwargs or {}).items() if key != 'device'}
        result = function(*args, **kwargs)
        given = [x.dtype for x in args if isinstance(x, torch.Tensor)]
        is_wide = isinstance(result, torch.Tensor) and result.dtype == torch.float64
        if given and is_wide and torch.float64 not in given:
            raise TypeError("Cannot convert a MPS Tensor to float64, as MPS doesn't support it")
        return result


def test_nothing_on_mps_is_float64(tiny_net):
    net = tiny_net(objective='d3pm', time_conditioning=True)
    x0, t = torch.randint(10, (4, 16)), torch.tensor([0.1, 0.3, 0.7, 1.0])
    xt = model.corrupt(x0, t, 10, model.loglinear)
    expected = per_token_loss(net, x0, xt, t, T=10)
    subs, position = tiny_net(time_conditioning=True), (xt == 10).nonzero(as_tuple=True)
    guided = subs, xt, position, torch.full((4,), 2), 0.5
    expected_probs = analytic_probs(subs, xt, t, 0.05), guided_log_probs(*guided)
    with pytest.raises(TypeError, match='MPS'), LikeMPS():
        t.double()
    with LikeMPS():
        found = per_token_loss(net, x0, xt, t, T=10)
        probs = analytic_probs(subs, xt, t, 0.05), guided_log_probs(*guided)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(probs, expected_probs, rtol=1e-4, atol=1e-5)
