import math

import pytest
import torch

import reference
from conftest import save_net
from eval import nelbo, ratio_with_error
from model import corrupt, loglinear


def test_ratio_estimator():
    torch.manual_seed(0)
    counts = torch.randint(1, 20, (2000, 500)).double()
    sums = counts * 3 + torch.randn(2000, 500).double() * counts.sqrt()
    estimates = torch.tensor([ratio_with_error(s, c) for s, c in zip(sums, counts, strict=True)])
    assert abs(estimates[:, 0].mean() - 3) < 4 * estimates[:, 0].std() / math.sqrt(2000)
    # the error it gives is the spread it has
    assert abs(estimates[:, 1].mean() / estimates[:, 0].std() - 1) < 0.1
    assert math.isnan(ratio_with_error(torch.ones(1), torch.ones(1))[1])


def test_nelbo_agrees_with_the_dense_loss(tiny_net, rows):
    net, some = tiny_net(vocab_size=258, mask_id=257), rows()
    result = nelbo(net, some, num_mc=64, batch_size=32)
    x0, dense = some[:]['x0'].repeat(64, 1), []
    torch.manual_seed(0)
    with torch.no_grad():
        t = torch.rand(len(x0)) * 0.999 + 0.001
        dense = reference.subs_nelbo(net, x0, corrupt(x0, t, 257, loglinear), t, loglinear).mean(
            dim=1
        )
    error = (dense.std() / math.sqrt(len(dense))).item()
    assert abs(result['nats_per_token'] - dense.mean().item()) < 4 * math.hypot(
        error, result['nats_per_token_se']
    )
    assert result['tokens'] == len(some) * 16
    assert result['document_tokens'] == len(some) * 14
    assert result['rows'] == len(some)
    assert result['ppl'] == pytest.approx(math.exp(result['nats_per_token']))
    assert result['ppl_se'] == pytest.approx(result['ppl'] * result['nats_per_token_se'])


def test_uniform_net_has_log_v_nats_and_known_bits_per_byte(tiny_net, rows):
    # a new net: uniform over 257 ids
    net = tiny_net(vocab_size=258, mask_id=257, scale=0.0, n_layer=1)
    for packing in ('wrap', 'concat', 'pad'):
        some = rows(packing)
        result = nelbo(net, some, num_mc=200, batch_size=256)
        assert (
            abs(result['nats_per_token'] - math.log(257)) < 4 * result['nats_per_token_se'] + 1e-3
        )
        per_byte = some.counts['tokens'] / some.counts['bytes'] / math.log(2)
        assert (
            abs(result['bits_per_byte'] - math.log(257) * per_byte)
            < 4 * result['bits_per_byte_se'] + 2e-3
        )
    scored = rows('pad', loss_on_padding=False)
    assert (
        nelbo(net, scored)['tokens']
        == nelbo(net, scored)['document_tokens']
        == int(scored[:]['document'].sum())
    )


def test_every_objective_is_measured_by_its_own_bound(tiny_net, rows):
    some, uniform = rows(), math.log(257)
    for options, T in (
        (dict(objective='sedd', time_conditioning=True), 0),
        (dict(objective='ar', causal=True, cond_dim=0), 0),
        (dict(), 50),
    ):
        # uniform: every bound is log(V - 1), but for eps
        net = tiny_net(vocab_size=258, mask_id=257, scale=0.0, **options)
        result = nelbo(net, some, num_mc=50, batch_size=64, T=T)
        assert (
            abs(result['nats_per_token'] - uniform)
            < 4 * result['nats_per_token_se'] + 2e-3 * uniform
        )
        assert result['tokens'] == len(some) * (15 if options.get('causal') else 16)
    # over 258 ids; a token is revealed at the cost of log 258, ...
    net = tiny_net(vocab_size=258, mask_id=257, scale=0.0, objective='d3pm')
    result = nelbo(net, some, num_mc=50, batch_size=64, T=50)
    # ... and the chance of the mask and the last term cost more
    assert result['nats_per_token'] > uniform


def test_figures_are_a_function_of_the_seed(tiny_net, rows):
    net, some = tiny_net(vocab_size=258, mask_id=257), rows()
    a = nelbo(net, some)
    b = nelbo(net, some)
    c = nelbo(net, some, seed=1)
    assert a == b and a['nats_per_token'] != c['nats_per_token']
    few = nelbo(net, some, max_rows=5)
    assert few['rows'] == 5 and few['tokens'] == 80


@pytest.mark.slow
def test_eval_py_prints_the_same_figures_on_one_process_and_two(tiny_net, rows, run, tmp_path):
    save_net(tiny_net(vocab_size=258, mask_id=257), tmp_path)
    rows()
    one = run('eval.py', '--out_dir=.', '--num_mc=2', '--device=cpu').stdout
    assert '± ' in one and 'nats/token' in one and 'perplexity' in one and 'bits/byte' in one
    two = run('eval.py', '--out_dir=.', '--num_mc=2', '--device=cpu', processes=2).stdout
    assert two == one


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--metric=elo'], "error: metric 'elo' is not known"),
        (['--split=test'], "error: data/c-bytes has no split 'test'"),
        (['--num_mc=0'], 'error: num_mc=0'),
        (['--dataset=nothing'], 'error: there is no data in data/nothing-bytes'),
        (['--tokenizer=gpt2-xlm'], 'error: '),
        (['--out_dir=none'], 'error: no checkpoint at none/ckpt.pt'),
    ],
)
def test_bad_input_ends_eval_py_with_one_line(
    tiny_net, rows, refused, tmp_path, arguments, message
):
    save_net(tiny_net(vocab_size=258, mask_id=257), tmp_path)
    rows()
    stderr = refused('eval.py', '--out_dir=.', *arguments).splitlines()
    assert len(stderr) == 1 and stderr[0].startswith(message), stderr
