"""What the fast recipes add to a run (config/fast_*.py): each option alone, against its formula."""
import math
import os

import numpy as np
import pytest
import torch
from data import TokenRows
from model import (
    DiT, ModelConfig, apply_rotary, ar, load_pretrained, per_token_loss, rotary_table,
    save_pretrained, stratified_times
)
from test_train import SMALL, checkpoint, equal, metrics

SHAPE = dict(block_size=32, vocab_size=11, mask_id=10, n_layer=2, n_head=4, n_embd=128, cond_dim=0)


@pytest.mark.parametrize('end', [1.0, 0.5, 0.3])
@pytest.mark.parametrize('n', [1, 4, 6])
def test_stratified_times_are_uniform_up_to_the_latest(n, end):
    """All u of a grid with m points in a stratum: the times are the grid of n m points, so the mean
    of any function of t over batches is its integral over [eps, end)."""
    m, eps = 8, 1e-3
    u = (torch.arange(m, dtype=torch.float64)[:, None] + 0.5) / m / n
    t = stratified_times(u, torch.arange(n), n, eps, end)
    grid = eps + (end - eps) * (np.arange(m * n) + 0.5) / (m * n)
    assert np.allclose(np.sort(t.flatten().numpy()), grid, atol=1e-7)  # float32


@pytest.mark.parametrize('time_sampling', ['stratified', 'per_process', 'iid'])
def test_no_position_of_training_has_a_time_outside_of_t_range(mine, here, time_sampling):
    ran = here('train.py', *SMALL, '--max_iters=1', '--t_range=(1e-3, 0.4)',
               f'--time_sampling={time_sampling}')
    t = torch.cat([ran['times_of'](step, micro) for step in range(50) for micro in range(4)])
    assert 0 < t.min() and 0.35 < t.max() <= 0.4
    assert abs(t.mean() - 0.2) < 4 * 0.4 / math.sqrt(12 * len(t))  # four standard errors


def test_heads_look_near_before_training():
    net = DiT(ModelConfig(**SHAPE, qkv_bias=True))
    L, H, D = 32, 4, 32
    qkv = net.blocks[1].attn_qkv(torch.zeros(1, L, H * D)).view(1, L, 3, H, D)
    q, k = apply_rotary(qkv[:, :, :2], *rotary_table(torch.arange(L), D)).permute(2, 0, 3, 1, 4)
    scores = (q @ k.transpose(2, 3) / math.sqrt(D))[0]
    w = 1e4 ** -(torch.arange(0, D, 2) / D)
    distance = torch.arange(L)[None] - torch.arange(L)[:, None]  # of the key from the query
    for head, (offset, a) in enumerate([(-1, 2.5), (1, 2.5), (-2, 2.5 / 4), (2, 2.5 / 4)]):
        expected = (a * w * torch.cos(w * (distance - offset)[:, :, None])).sum(dim=2)
        assert torch.allclose(scores[head], expected, atol=1e-4)
        inner = torch.arange(2, L - 2)
        assert torch.equal(scores[head].argmax(dim=1)[2:-2], inner + offset)


def test_a_net_with_fast_options_comes_back_from_a_folder(tmp_path):
    torch.manual_seed(0)
    net = DiT(ModelConfig(**SHAPE, qkv_bias=True, tied=True, embed_norm=True))
    torch.nn.init.normal_(net.norm_e.weight)
    save_pretrained(net, str(tmp_path))
    back = load_pretrained(str(tmp_path))
    assert back.config == net.config
    assert back.lm_head.weight is back.wte.weight
    x = torch.randint(11, (2, 32))
    assert torch.equal(back(x), net(x))
    assert len({p.data_ptr() for p in back.parameters()}) == len(list(back.parameters()))


def test_tied_weights_get_the_gradients_of_embedding_and_head():
    nets = []
    for tied in (True, False):
        torch.manual_seed(0)
        net = DiT(ModelConfig(**SHAPE, tied=tied))
        nets.append(net)
    tied, apart = nets
    assert (tied.wte.weight.norm(dim=1) > 0.1).all()  # not of zeros, as heads begin
    apart.load_state_dict(tied.state_dict())
    x0 = torch.arange(64).view(2, 32) % 10
    xt = torch.where(torch.arange(32) % 3 == 0, 10, x0)
    for net in nets:
        per_token_loss(net, x0, xt, torch.full((2,), 0.3)).mean().backward()
    both = apart.wte.weight.grad + apart.lm_head.weight.grad
    assert torch.allclose(tied.wte.weight.grad, both, atol=1e-7)
    assert tied.num_params() == apart.num_params() - 11 * 128
    assert tied.num_params(embedding=False) == apart.num_params(embedding=False)


@pytest.mark.parametrize('rows', ['concat', 'padded', 'documents'])
def test_the_ar_loss_of_any_net_is_that_of_a_causal_net(rows):
    torch.manual_seed(0)
    net = DiT(ModelConfig(**SHAPE, qkv_bias=True))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    causal = DiT(ModelConfig(**SHAPE, qkv_bias=True, objective='ar', causal=True))
    causal.load_state_dict(net.state_dict())
    x0 = torch.randint(10, (2, 32))
    attention_mask = dict(
        concat=None, padded=torch.arange(32) < torch.tensor([[32], [20]]),
        documents=(torch.arange(32) // 12).repeat(2, 1))[rows]
    losses = [ar(one, x0, attention_mask) for one in (net, causal)]
    seen = slice(None) if rows != 'padded' else attention_mask
    assert torch.allclose(losses[0][seen], losses[1][seen], atol=1e-6) and losses[0].std() > 0.1
    changed = x0.clone()
    changed[:, 16:] = 0  # the future
    after = ar(net, changed, attention_mask)
    assert torch.equal(after[:, :16], losses[0][:, :16])


@pytest.mark.parametrize('objective', ['subs', 'mlm'])
def test_an_ar_phase_is_a_mean_over_every_next_token(mine, here, objective):
    """At the start all ids but the mask have one probability, whatever is masked."""
    ran = here('train.py', *SMALL, f'--objective={objective}', '--ar_share=0.6',
               '--learning_rate=1e-9', '--warmup_iters=0')
    V = ran['net'].config.vocab_size
    loss = [line['loss'] for line in metrics()[0].values()]
    assert loss[:6] == pytest.approx([math.log(V - 1)] * 6, abs=1e-5)
    assert all(ran['training_batch'](step, 0)['masked'] is None for step in range(6))
    assert ran['training_batch'](6, 0)['masked'] is not None
    if objective == 'mlm':  # of all V ids
        assert loss[6:] == pytest.approx([math.log(V)] * 4, abs=1e-5)


@pytest.mark.parametrize('given, there_is', [
    ('--mixer=mamba', False), ('--time_conditioning=True', False),
    ('--objective=ar --causal=True', False), ('--block_length=8', True),
    ('--objective=mlm --use_num_masked_factor=True', True), ('--objective=d3pm --T=10', True)])
def test_which_nets_have_an_ar_phase(mine, here, capsys, given, there_is):
    ran = here('train.py', *SMALL, '--ar_share=0.5', '--max_iters=2', *given.split())
    said = capsys.readouterr().out
    assert ran['ar_steps'] == there_is and (', the first 1 as a causal net' in said) == there_is
    assert ('these do nothing: ar_share=0.5 (it needs attention' in said) == (not there_is)


def test_a_run_keeps_its_ar_phase_and_trained_nets_have_none(mine, here, capsys):
    here('train.py', *SMALL, '--ar_share=0.5', '--ckpt_interval=3', '--keep_interval=3')
    os.replace('out/ckpt_3.pt', 'out/ckpt.pt')
    capsys.readouterr()
    ran = here('train.py', *SMALL, '--init_from=resume')  # without the option
    assert ran['ar_steps'] == 5 and 'warning' not in capsys.readouterr().out
    assert checkpoint('out')['constants']['ar_share'] == 0.5
    for longer in (20, 40):  # it does not begin again
        ran = here('train.py', *SMALL, f'--max_iters={longer}', '--init_from=resume')
        assert ran['ar_steps'] == 5
    tuned = *SMALL, '--ar_share=0.5', '--out_dir=tuned'
    ran = here('train.py', *tuned, '--init_from=out', '--ckpt_interval=3', '--keep_interval=3')
    assert ran['ar_steps'] == 0 and checkpoint('tuned')['constants']['ar_share'] == 0.0
    assert 'ar_share=0.5 is for new nets, this run has 0.0' in capsys.readouterr().out
    os.replace('tuned/ckpt_3.pt', 'tuned/ckpt.pt')
    assert here('train.py', *tuned, '--init_from=resume')['ar_steps'] == 0


def test_an_impossible_share_is_refused(refused):
    for share in (1, -0.1, '"a"'):
        error = refused('train.py', '--dataset=stdlib', f'--ar_share={share}')
        assert error.count('\n') == 1 and 'ar_share=' in error


def test_unigram_bias_begins_at_the_entropy_of_the_tokens(mine, here):
    ran = here('train.py', *SMALL, '--max_iters=1', '--learning_rate=1e-9', '--unigram_bias=True')
    tokens = TokenRows('data/mine', 'train', 16, 'wrap').tokens
    counts = np.bincount(tokens, minlength=ran['net'].config.vocab_size) + 1
    p = torch.softmax(ran['net'].lm_head.bias.detach(), dim=0)
    assert np.allclose(p.numpy(), counts / counts.sum(), atol=1e-6)


def test_linear_decay_ends_at_min_lr(mine, here):
    here('train.py', *SMALL, '--lr_schedule=linear', '--min_lr=1e-3')
    rates = [line['lr'] for line in metrics()[0].values()]
    after = [1e-3 + 9e-3 * (1 - done / 8) for done in range(8)]
    assert rates == pytest.approx([5e-3, 1e-2, *after])


def test_a_run_with_every_fast_option_resumes_to_the_bit(mine, run):
    options = [
        *SMALL, '--n_embd=32', '--cond_dim=0', '--objective=mlm', '--optimizer=muon', '--tied=True',
        '--qkv_bias=True', '--unigram_bias=True', '--t_range=(1e-3, 0.5)', '--lr_schedule=linear',
        '--embed_norm=True', '--ar_share=0.7', '--momentum=0.9', '--ckpt_interval=5',
        '--keep_interval=5'
    ]
    run('train.py', *options, '--out_dir=whole')
    run('train.py', *options, '--out_dir=parts')
    os.replace('parts/ckpt_5.pt', 'parts/ckpt.pt')
    run('train.py', *options, '--out_dir=parts', '--init_from=resume')
    for key in ('model', 'ema', 'optimizer'):
        assert equal(checkpoint('parts')[key], checkpoint('whole')[key])
