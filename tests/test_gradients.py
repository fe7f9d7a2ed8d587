"""The gradient of a step, whatever it is cut into; what sets its rate; what is said of constants."""

import os
import zlib

import pytest
import torch

import model
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
