import json
import math
import os
import re
import shutil

import pytest
import torch

from conftest import ROOT
from model import load_pretrained

SMALL = [
    '--dataset=mine', '--tokenizer=bytes', '--n_layer=1', '--n_head=2', '--n_embd=16',
    '--cond_dim=8', '--block_size=16', '--batch_size=2', '--global_batch_size=8', '--max_iters=10',
    '--log_interval=1', '--warmup_iters=2', '--learning_rate=1e-2', '--sample_at_end=False',
    '--device=cpu', '--dtype=float32', '--out_dir=out'
]


def metrics(out_dir='out'):
    lines = [json.loads(line) for line in open(os.path.join(out_dir, 'metrics.jsonl'))]
    losses = {line['iter']: line for line in lines if 'loss' in line}
    validation = {line['iter']: line for line in lines if 'val_loss' in line}
    return losses, validation


def checkpoint(out_dir='out', file='ckpt.pt'):
    return torch.load(os.path.join(out_dir, file), weights_only=True)


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_training_learns_and_leaves_what_it_says(mine, run):
    shown = run(
        'train.py', *SMALL, '--max_iters=60', '--eval_interval=20', '--ckpt_interval=20',
        '--keep_interval=40', '--sample_at_end=True'
    ).stdout
    losses, validation = metrics()
    assert sorted(losses) == list(range(1, 61)) and sorted(validation) == [20, 40, 60]
    assert set(losses[1]) == {'iter', 'loss', 'lr', 'grad_norm', 'tokens_per_s'}
    assert set(validation[20]) == {'iter', 'val_loss', 'val_bpb'}
    assert abs(losses[1]['loss'] - 5.55) < 1.5
    assert validation[60]['val_loss'] < validation[20]['val_loss'] < 4
    assert losses[1]['lr'] == 5e-3 and losses[2]['lr'] == losses[60]['lr'] == 1e-2
    assert sorted(os.listdir('out')) == [
        'ckpt.prev.pt', 'ckpt.pt', 'ckpt_40.pt', 'ckpt_best.pt', 'metrics.jsonl'
    ]
    last = checkpoint()
    assert set(last) == {
        'model', 'ema', 'optimizer', 'iter', 'tokens_seen', 'best_val_loss', 'model_config',
        'constants', 'tokenizer'
    }
    assert (last['iter'], last['tokens_seen'], checkpoint(file='ckpt_40.pt')['iter']) == (
        60, 60 * 8 * 16, 40
    )
    assert last['best_val_loss'] == min(line['val_loss'] for line in validation.values())
    assert last['constants']['max_iters'] == 60 and last['tokenizer']['name'] == 'bytes'
    assert shown.count('--- sample') == 4 and 'bits/byte' in shown
    run('sample.py', '--steps=4', '--device=cpu')  # from out/, which needs no data folder
    evaluated = run('eval.py', '--num_mc=8', '--device=cpu').stdout
    bits = float(re.search(r'([\d.]+) ± ([\d.]+) bits/byte', evaluated).group(1))
    assert abs(bits / validation[60]['val_bpb'] - 1) < 0.15


def test_resumed_run_equals_the_uninterrupted_one_to_the_bit(mine, run):
    options = [
        *SMALL, '--dropout=0.1', '--attn_dropout=0.1', '--eval_interval=4', '--ckpt_interval=5',
        '--lr_schedule=cosine'
    ]
    run('train.py', *options, '--out_dir=whole')
    run('train.py', *options, '--out_dir=parts', '--keep_interval=5')
    os.replace('parts/ckpt_5.pt', 'parts/ckpt.pt')  # as after a kill between steps 5 and 10
    with open('parts/metrics.jsonl', 'a') as f:
        f.write('{"iter": 11, "lo')  # and in the middle of a line
    run('train.py', *options, '--out_dir=parts', '--init_from=resume')
    whole, parts = checkpoint('whole'), checkpoint('parts')
    for key in ('model', 'ema', 'optimizer', 'iter', 'tokens_seen', 'best_val_loss'):
        assert equal(whole[key], parts[key]), key

    def without_speed(table):
        return {
            i: {key: value for key, value in line.items() if key != 'tokens_per_s'}
            for i, line in table.items()
        }

    whole, parts = metrics('whole'), metrics('parts')
    assert [without_speed(table) for table in whole] == [without_speed(table) for table in parts]


@pytest.mark.slow
def test_two_processes_equal_one(mine, run):
    run('train.py', *SMALL, '--dropout=0.1', '--eval_interval=5', '--out_dir=one')
    run('train.py', *SMALL, '--dropout=0.1', '--eval_interval=5', '--out_dir=two', processes=2)
    (losses, validation), (losses2, validation2) = metrics('one'), metrics('two')
    assert len(losses) == 10
    for step in losses:
        assert losses2[step]['loss'] == pytest.approx(losses[step]['loss'], rel=1e-5)
        assert losses2[step]['grad_norm'] == pytest.approx(losses[step]['grad_norm'], rel=1e-4)
    for step in validation:
        assert validation2[step]['val_loss'] == pytest.approx(
            validation[step]['val_loss'], rel=1e-5
        )
    for name, p in checkpoint('one')['ema'].items():
        torch.testing.assert_close(checkpoint('two')['ema'][name], p, rtol=1e-3, atol=1e-5)
    # and back on one process
    run(
        'train.py', *SMALL, '--dropout=0.1', '--out_dir=two', '--init_from=resume', '--max_iters=12'
    )
    assert sorted(metrics('two')[0]) == list(range(1, 13))
    # nothing left to do
    run(
        'train.py', *SMALL, '--dropout=0.1', '--out_dir=two', '--init_from=resume',
        '--max_iters=12', processes=2
    )


def test_micro_batches_are_an_accounting_matter(mine, here):
    # for 'subs' every row counts the same: the mean over equal micro-batches is the mean over the
    # global batch
    here('train.py', *SMALL, '--max_iters=1', '--out_dir=a')
    here('train.py', *SMALL, '--max_iters=1', '--out_dir=b', '--batch_size=8', '--eval_interval=1')
    # other masks: they are drawn by micro-batch
    assert metrics('a')[0][1]['loss'] != metrics('b')[0][1]['loss']
    assert metrics('a')[0][1]['loss'] == pytest.approx(metrics('b')[0][1]['loss'], rel=0.5)


@pytest.mark.parametrize(
    'options',
    [
        ['--objective=sedd', '--time_conditioning=True'],
        ['--objective=d3pm', '--T=100', '--time_conditioning=True'],
        ['--objective=d3pm', '--T=100', '--subs_masking=True'],
        ['--objective=ar', '--causal=True', '--cond_dim=0', '--packing=concat'],
        ['--importance=True', '--schedule=linear'],
        ['--schedule=cosine'],
        ['--T=100', '--packing=sentence'],
        ['--schedule=change_of_variables', '--time_conditioning=True'],
        ['--objective=mlm', '--use_num_masked_factor=True', '--loss_on_visible_tokens=True'],
        ['--ssl_ratio=0.5'],
        [
            '--objective=mlm', '--packing=pad', '--cond_dim=0', '--norm_bias=True', '--mlp=relu',
            '--head_bias=False', '--init=xlm', '--weight_decay=0.01', '--tokenizer=bytes'
        ],
        ['--packing=pad', '--loss_on_padding=False'],
        ['--packing=concat', '--time_conditioning=True', '--decay_all=True', '--weight_decay=0.1'],
        ['--optimizer=muon', '--grad_clip=0.0'],
        ['--dtype=bfloat16'],
    ],
)
def test_every_setting_trains(mine, here, options):
    here('train.py', *SMALL, *options, '--batch_size=4', '--max_iters=30', '--eval_interval=15')
    losses, validation = metrics()
    assert validation[30]['val_loss'] < 4.5 < math.log(257)
    assert all(math.isfinite(line['loss']) for line in losses.values())


def test_dropout_and_masks_come_from_streams_of_their_own(mine, here, monkeypatch):
    seeds, manual_seed = [], torch.manual_seed

    def noted(seed):
        seeds.append(seed)
        return manual_seed(seed)

    monkeypatch.setattr(torch, 'manual_seed', noted)
    ran = here('train.py', *SMALL, '--max_iters=2')
    used = {ran['key_of'](0, step, micro) for step in range(2) for micro in range(4)}
    assert len(set(seeds)) == 1 + 8 and not used & set(seeds)


def test_a_flop_budget_sets_the_number_of_steps(mine, here):
    arguments = [a for a in SMALL if not a.startswith('--max_iters')]
    here('train.py', *arguments, '--flops=1e8', '--ssl_ratio=0.5')
    last = checkpoint()
    net = load_pretrained('out')
    mean_length = 16 * 0.5 + 0.5 * 17 / 2
    assert last['iter'] == round(1e8 / (6 * net.num_params(embedding=False) * 8 * mean_length)) > 20
    assert abs(last['tokens_seen'] / (last['iter'] * 8 * mean_length) - 1) < 0.2


def test_named_sizes_set_the_shape_and_say_what_they_overrule(mine, here, capsys):
    here(
        'train.py', *SMALL, '--size=6M', '--max_iters=1', '--cond_dim=0', '--norm=rmsnorm',
        '--mlp=swiglu', '--mlp_bias=False', '--head_bias=False', '--head_mask=False', '--init=smdm'
    )
    config = load_pretrained('out').config
    assert (config.n_layer, config.n_head, config.n_embd, config.n_mlp) == (6, 4, 256, 1024)
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith('warning')]
    assert len(warnings) == 3
    assert warnings[0] == (
        'warning: size=6M says what n_layer is, n_layer=1 is not used: '
        'give --size=None to choose it yourself'
    )


def test_resuming_says_what_changed_and_takes_it(mine, here, capsys):
    here('train.py', *SMALL, '--max_iters=2')
    here('train.py', *SMALL, '--max_iters=3', '--weight_decay=0.5', '--init_from=resume')
    assert (
        'resuming at step 2, max_iters=3 (was 2), weight_decay=0.5 (was 0.0)'
        in capsys.readouterr().out
    )
    assert checkpoint()['optimizer'][0]['param_groups'][0]['weight_decay'] == 0.5
    with pytest.raises(ValueError, match="out/ckpt.pt has the state of optimizer='adamw'"):
        here('train.py', *SMALL, '--optimizer=muon', '--init_from=resume')


def test_weight_decay_falls_on_matrices_only_unless_all_is_asked_for(mine, here):
    # with a gradient of zero, AdamW's step is the decay alone: in a new MDLM net the embeddings
    # have none, since the head is zero
    for decay_all, moved in ((False, False), (True, True)):
        here(
            'train.py', *SMALL, '--weight_decay=0.5', f'--decay_all={decay_all}', '--max_iters=1',
            '--warmup_iters=0', '--overwrite=True'
        )
        model = checkpoint()['model']
        assert (model['blocks.0.norm1.weight'][0].item() != 1.0) == moved
        torch.manual_seed(0)
        assert checkpoint()['model']['wte.weight'].abs().max() < 0.25 * (1 - 1e-2 * 0.5) + 1e-6


def test_ema_is_the_ramped_average(mine, here):
    here('train.py', *SMALL, '--max_iters=1', '--out_dir=a')
    here('train.py', *SMALL, '--max_iters=2', '--out_dir=b')
    one, two = checkpoint('a'), checkpoint('b')
    for name, ema in two['ema'].items():  # decay 3/12 at the second step, 2/11 at the first
        torch.testing.assert_close(
            ema, one['ema'][name] * 3 / 12 + two['model'][name] * 9 / 12, rtol=1e-5, atol=1e-6
        )


def test_the_average_keeps_no_graph(mine, here):
    ran = here('train.py', *SMALL)
    assert not any(p.requires_grad or p.grad_fn for p in ran['ema_net'].parameters())
    assert all(p.requires_grad for p in ran['net'].parameters())


def test_fine_tuning_starts_from_the_weights_of_a_source(mine, here):
    here('train.py', *SMALL, '--out_dir=a')
    here(
        'train.py', *SMALL, '--out_dir=b', '--init_from=a', '--max_iters=1', '--learning_rate=1e-9'
    )
    start, tuned = load_pretrained('a'), load_pretrained('b')
    assert all(
        torch.allclose(p, q, atol=1e-6)
        for p, q in zip(start.parameters(), tuned.parameters(), strict=True)
    )
    assert checkpoint('b')['iter'] == 1


@pytest.mark.slow
def test_a_registry_name_that_is_local_is_prepared_when_missing(mine, run):
    arguments = [a for a in SMALL if not a.startswith('--dataset')] + [
        '--dataset=text:c.txt', '--tokenizer=bpe-300', '--max_iters=2', '--sample_at_end=True'
    ]
    run('train.py', *arguments, processes=2)  # one of the two prepares, the other waits
    assert os.path.isfile('data/c-bpe-300/train.bin')
    shutil.rmtree('data')
    run('sample.py', '--num_samples=1', '--steps=2')  # its tokenizer travels with the weights


@pytest.mark.parametrize(
    'arguments, message',
    [
        (
            ['--dataset=openwebtext', '--tokenizer=gpt2'],
            'error: there is no data in data/openwebtext-gpt2: '
            'make it with python data.py --dataset=openwebtext --tokenizer=gpt2',
        ),
        (['--global_batch_size=9'], 'error: global_batch_size=9 is not divisible'),
        (['--init_from=resume'], 'error: no checkpoint at out/ckpt.pt'),
        (['--init_from=nowhere'], 'error: no checkpoint at nowhere/ckpt.pt'),
        (['--packing=bag'], "error: packing 'bag' is not known"),
        (['--objective=gan'], "error: objective 'gan' is not known"),
        (['--tokenizer=gpt2'], "error: data/mine holds ids of the tokenizer 'bytes', not 'gpt2'"),
        (['--n_embd=15'], 'error: n_embd=15'),
        (['--optimizer=sgd'], "error: optimizer='sgd' is not known"),
        (['--block_size=100000'], 'error: data/mine/train.bin holds'),
        (['--dtype=float8'], "error: dtype='float8'"),
        (['--beta1=1.0'], 'error: beta1=1.0'),
        (['--ema=1.5'], 'error: ema=1.5'),
        (['--n_mlp=abc'], "error: n_mlp='abc'"),
        (['--max_iters=0'], 'error: max_iters=0'),
        (['--size=7M'], "error: size='7M' is not known"),
        (['--objective=d3pm'], "error: objective 'd3pm' is defined in steps"),
        (
            ['--objective=sedd', '--importance=True'],
            'error: importance=True goes with objective subs',
        ),
        (['--schedule=cubic'], "error: schedule 'cubic' is not known"),
        (
            ['--importance=True', '--schedule=cosine'],
            'error: importance-sampled time is not defined for the schedule Cosine',
        ),
        (['--flops=1.0'], 'error: flops=1 is less than one step'),
        (['--compile=maybe'], "error: compile='maybe'"),
        (['--batch_size=0'], 'error: batch_size=0'),
        pytest.param(
            ['--device=cuda'],
            "error: device='cuda': there is no cuda device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason='there is CUDA here'),
        ),
    ],
)
def test_bad_input_is_refused(mine, here, arguments, message):
    with pytest.raises(
        (ValueError, FileNotFoundError), match=re.escape(message.removeprefix('error: '))
    ):
        here('train.py', *SMALL, *arguments)
    assert not os.path.exists('out/ckpt.pt')


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--dataset=nowhere'], 'error: there is no data in data/nowhere-bytes'),
        (['--global_batch_size=9'], 'error: global_batch_size=9 is not divisible'),
        (['--init_from=resume'], 'error: no checkpoint at out/ckpt.pt'),
        (['--n_embd=15'], 'error: n_embd=15'),
    ],
)
def test_bad_input_ends_train_py_with_one_line(mine, refused, arguments, message):
    stderr = refused('train.py', *SMALL, *arguments).splitlines()
    assert len(stderr) == 1 and stderr[0].startswith(message), stderr
    assert not os.path.exists('out/ckpt.pt')


def test_bad_bins_and_checkpoints_end_train_py_with_one_line(mine, run, refused):
    run('train.py', *SMALL, '--max_iters=1')
    for change, message in (
        ('--n_layer=2', 'error: out/ckpt.pt has n_layer=1, the run n_layer=2'),
        ('--objective=mlm', "error: out/ckpt.pt has objective='subs'"),
    ):
        assert refused('train.py', *SMALL, change, '--init_from=resume').startswith(message)
    whole = open('out/ckpt.pt', 'rb').read()
    with open('out/ckpt.pt', 'wb') as f:
        f.write(whole[:-100])
    stderr = refused('train.py', *SMALL, '--init_from=resume')
    assert stderr.startswith('error: out/ckpt.pt is truncated or damaged')
    assert stderr.count('\n') == 1
    assert refused('sample.py').startswith('error: out/ckpt.pt is truncated or damaged')
    with open('data/mine/train.bin', 'r+b') as f:
        f.truncate(100)
    stderr = refused('train.py', *SMALL)
    assert 'train.bin holds 100 bytes' in stderr
    assert 'rebuild it with python data.py --dataset=text:c.txt' in stderr
    assert stderr.count('\n') == 1


@pytest.mark.slow
def test_a_compiled_trunk_trains_like_an_eager_one(mine, run):
    if shutil.which('g++') is None:
        pytest.skip('torch.compile needs a C++ compiler on the CPU')
    run('train.py', *SMALL, '--max_iters=3', '--out_dir=eager')
    run('train.py', *SMALL, '--max_iters=3', '--compile=True', '--out_dir=compiled')
    for step, line in metrics('eager')[0].items():
        assert metrics('compiled')[0][step]['loss'] == pytest.approx(line['loss'], rel=1e-4)


@pytest.mark.slow
def test_quickstart_learns_in_its_first_steps(run):
    shown = run(
        'train.py',
        os.path.join(ROOT, 'config', 'quickstart.py'),
        '--max_iters=40',
        '--log_interval=10',
        '--sample_at_end=False',
        threads=2,
    ).stdout
    assert float(re.search(r'([\d.]+) bits/byte', shown).group(1)) < 2.75
