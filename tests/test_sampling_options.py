"""What sample.py takes and how it answers: options as flags, prompts, files; and what its samplers
wait for on a GPU, and do as released."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import pretended
from conftest import ROOT, save_net
from configurator import configure, constants_of
from model import get_schedule
from sample import SAMPLERS, TAKES, draw, flags, float32_uniforms, generate
from test_sample import chi_square_p, counts_of

GOLDEN = os.path.join(ROOT, 'tests', 'golden')
BYTES = dict(vocab_size=258, mask_id=257)


# --- what a GPU would wait for

AR = dict(causal=True, objective='ar', cond_dim=0)


@pytest.mark.parametrize(
    'sampler, options, net_options, decides',
    [
        ('ancestral', dict(), dict(), False),
        ('ancestral', dict(top_p=0.9, top_k=5), dict(time_conditioning=True), False),
        ('ancestral', dict(prompt=[1, 2], cfg_scale=1.0), dict(), False),
        ('ancestral', dict(), dict(objective='d3pm'), True),
        ('fixed', dict(), dict(), False),
        ('fixed', dict(confidence='top_prob'), dict(), True),
        ('greedy', dict(), dict(), True),
        ('semi_ar', dict(length=24), dict(), False),
        ('remdm', dict(), dict(), False),
        ('remdm', dict(strategy='conf'), dict(), True),
        ('ar', dict(prompt=[1, 2]), AR, False),
        ('ar', dict(prompt=[1], eos_id=99), AR, True),
    ],
)
def test_a_step_waits_for_the_gpu_only_where_it_decides(
    tiny_net, monkeypatch, sampler, options, net_options, decides
):
    monkeypatch.setattr(torch.cuda, '_lazy_init', lambda: None)
    net = tiny_net(**dict(vocab_size=110, mask_id=109) | net_options)
    options = dict(num_samples=2, length=12, steps=6, sampler=sampler) | options
    expected = generate(net, **options)
    steps = []
    trunk = net.trunk
    monkeypatch.setattr(net, 'trunk', lambda *a, **k: steps.append(1) or trunk(*a, **k))
    with pretended.PretendedGPU() as gpu:
        out = generate(pretended.moved(net), **options)
    assert torch.equal(out.tokens, expected.tokens)
    num_steps = len(steps) - (sampler == 'ar' and options['prompt'] == [1, 2])  # one for the prompt
    # the start goes there; the tokens come back, and whether all logits were numbers
    assert gpu.waits['copy'] == 1
    assert gpu.waits['read'] == 2 + decides * num_steps
    assert num_steps <= gpu.sent <= 2 * len(steps)  # the device did see what the steps send


# --- samplers as released


def test_xlm_nets_take_its_predictor_where_no_sampler_is_named(tiny_net):
    net = tiny_net(objective='mlm', init='xlm', cond_dim=0)
    named, default = (generate(net, 3, 16, 6, sampler) for sampler in ('fixed', None))
    assert torch.equal(named.tokens, default.tokens)
    assert torch.equal(named.reveal_step, default.reveal_step)


@pytest.mark.parametrize('steps', [1, 3, 5, 7, 16, 40])
def test_fixed_unmasks_what_is_left_at_the_last_evaluation(tiny_net, steps):
    # xlm's predictor: (masked / steps left).long() a step; one step left takes all
    masked, counts = 11, []
    for i in range(steps):
        counts.append(int(masked / (steps - i)))
        masked -= counts[-1]
    assert masked == 0
    for options in (dict(), dict(confidence='top_prob')):
        out = generate(tiny_net(), 4, 11, steps, 'fixed', **options)
        for row in out.reveal_step.tolist():
            assert [row.count(i) for i in range(steps)] == counts
    out = generate(tiny_net(), 4, 11, 3, 'fixed', confidence='top_prob', threshold=1e-9)
    for row in out.reveal_step.tolist():
        assert [row.count(i) for i in range(3)] == [1, 1, 9]


def test_greedy_across_rows_takes_the_most_confident_of_all(tiny_net):
    net, steps = tiny_net(scale=0.5), 5
    prompts = [[1, 2], [3], [4, 5, 6], [7], [8, 9]]
    out = generate(
        net, 5, 12, steps, 'greedy', prompt=prompts, temperature=0.0, across_rows=True, batch_size=3
    )
    times, uneven = torch.linspace(1, 1e-5, steps + 1), False
    for batch in (slice(0, 3), slice(3, 5)):
        x = torch.tensor([p + [10] * (12 - len(p)) for p in prompts[batch]])
        for i in range(steps):  # the released loop: one topk over the flattened batch
            masked = x == 10
            logits = net(x).detach()
            logits[..., 10] = -torch.inf
            best, ids = logits.double().softmax(dim=-1).max(dim=-1)
            count = int(masked.sum() * (1 - times[i + 1] / times[i]))
            count = masked.sum() if i == steps - 1 else count
            chosen = torch.where(masked, best, -1).flatten().topk(count).indices
            x.view(-1)[chosen] = ids.view(-1)[chosen]
            uneven |= len(set((masked & (x != 10)).sum(dim=1).tolist())) > 1
        assert torch.equal(out.tokens[batch], x)
    assert uneven  # rows do advance unevenly: the test tells the two rules apart


def test_remdm_takes_one_step_where_nothing_is_visible_before_it(tiny_net):
    from_all_masked = get_schedule('loglinear', eps=0.0)
    for strategy in ('cap', 'rescale', 'conf', 'loop'):
        out = generate(tiny_net(), 2, 8, 1, 'remdm', strategy=strategy, schedule=from_all_masked)
        assert (out.tokens != 10).all() and out.nfe.tolist() == [1, 1]


def test_float32_draws_are_the_released_arithmetic():
    torch.manual_seed(0)
    logits = torch.randn(500, 20)
    u = torch.rand(500, dtype=torch.float64)
    uniforms = float32_uniforms(u, 20)
    assert uniforms.dtype == torch.float32 and 0 <= uniforms.min() and uniforms.max() < 1
    p = logits.clone().index_fill_(1, torch.tensor([7]), -torch.inf).softmax(dim=-1)
    expected = (p / (1e-10 - (uniforms + 1e-10).log())).argmax(dim=-1)
    ids, drawn = draw(logits.clone(), u, 7, dtype=torch.float32)
    assert torch.equal(ids, expected)
    assert torch.allclose(drawn.float(), p.gather(1, ids[:, None]).squeeze(1))


def test_float32_uniforms_are_uniform_and_end_below_one():
    u = torch.rand(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = float32_uniforms(u, 1000)
    assert torch.equal(x, (x * 2**24).round() / 2**24)
    n = x.numel()  # four standard errors of the mean, the variance and two correlations
    assert abs(x.mean() - 0.5) < 4 * (1 / 12 / n) ** 0.5
    assert abs(x.double().var() - 1 / 12) < 4 * (1 / 180 / n) ** 0.5
    centred = x.double() - 0.5
    for a, b in ((centred[1:], centred[:-1]), (centred[:, 1:], centred[:, :-1])):
        assert abs((a * b).mean()) < 4 / 12 / n**0.5


def test_float32_draws_have_the_distribution_of_the_net(tiny_net):
    net, n = tiny_net(), 5000
    p = net(torch.full((1, 1), 10))[0, 0, :10].detach().double().softmax(dim=-1)
    out = generate(net, n, 1, 1, draw_dtype='float32', batch_size=n)
    exact = {(i,): p[i].item() for i in range(10)}
    assert chi_square_p(counts_of(out.tokens), exact, n) > 1e-3
    again = generate(net, 50, 1, 1, draw_dtype='float32', batch_size=7)
    assert torch.equal(again.tokens, out.tokens[:50])


# --- options are flags


def as_script(name, *arguments):
    """The constants of a script after these arguments."""
    path = os.path.join(ROOT, name)
    module = {key: default for key, (default, _) in constants_of(path).items()}
    return configure(module | dict(__file__=path), list(arguments), **flags())


def test_an_option_of_a_new_sampler_is_a_flag_of_both_scripts(monkeypatch):
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)

    def left_to_right(
        b, num_steps,
        backwards=False,  # from right to left
    ):
        pass

    for script in ('sample.py', 'eval.py'):
        with pytest.raises(ValueError, match="no constant 'backwards'"):
            as_script(script, '--backwards=True')
    monkeypatch.setitem(SAMPLERS, 'left_to_right', left_to_right)
    for script in ('sample.py', 'eval.py'):
        constants = as_script(script, '--backwards=True', '--eta=0.1', '--n_head=4')
        assert constants['sampler_options'] == dict(backwards=True, eta=0.1)
        assert constants['overrides'] == dict(n_head=4)
    assert flags()['sampler_options']['backwards'] == (False, 'left_to_right: from right to left')
    for options in flags()['sampler_options'].values():
        assert not options[1].endswith('its own option')  # each has its comment


@pytest.mark.slow
def test_a_sampler_with_an_option_is_added_in_one_place(tiny_net, run, tmp_path):
    for name in os.listdir(ROOT):
        if name.endswith('.py'):
            shutil.copy(os.path.join(ROOT, name), tmp_path)
    text = (tmp_path / 'sample.py').read_text()
    new = '''
@sampler_for('x0')
def in_a_line(
    b, num_steps,
    backwards=False,  # from right to left
):
    order = torch.arange(b.x.size(1))
    order = order.flip(0) if backwards else order
    b.follow(order.expand(len(b.x), -1), torch.ones(len(order)))

'''
    before = '\n# ' + '-' * 77 + '\n# draw'
    assert text.count(before) == 1
    (tmp_path / 'sample.py').write_text(text.replace(before, new + before))
    save_net(tiny_net(**BYTES), tmp_path)
    run(
        tmp_path / 'sample.py', '--out_dir=.', '--sampler=in_a_line', '--backwards=True',
        '--trace=t.html', '--num_samples=1', '--device=cpu'
    )
    data = json.loads(re.search('application/json">(.*?)</', (tmp_path / 't.html').read_text())[1])
    assert [col for _, col, *_ in data['samples'][0]['events']] == list(range(15, -1, -1))
    for script in ('sample.py', 'eval.py'):
        shown = run(tmp_path / script, '--help').stdout
        assert re.search('--backwards=False +in_a_line: from right to left', shown)


def test_a_field_of_the_net_is_a_flag_and_ids_are_a_prompt(here, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source = f'--init_from={GOLDEN}/smdm.safetensors'  # of a net without a tokenizer
    for how in ('--n_head=4', "--overrides={'n_head': 4}"):
        here('sample.py', source, how, '--prompt=IDS:5, 6,7', '--length=9', '--steps=4', '--seed=2')
    first, second = (
        [line for line in shown.splitlines() if line.startswith('[5, 6, 7, ')]
        for shown in [capsys.readouterr().out] for shown in shown.split('--- sample 0')[1:]
    )  # fmt: skip
    assert len(first) == 4 and first == second
    template = '--template=IDS:5,-1,-1,7'
    here('sample.py', source, '--n_head=4', template, '--steps=2', '--num_samples=1')
    assert re.search(r'^\[5, \d+, \d+, 7\]$', capsys.readouterr().out, re.M)


# --- bad input is one line


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--etaa=0.1'], "no constant 'etaa' in this script; the nearest is 'eta'"),
        (['--eta=0.1', '--sampler=fixed'], "eta does not go with sampler 'fixed'"),
        (['--sampler_options=[1]', '--eta=0.1'], 'sampler_options=[1]: it must be a dict'),
        (['--template=all of it'], 'open tokens are written <|mask|> or <|mask:20|>'),
        (['--template=a <mask> b'], 'open tokens are written <|mask|> or <|mask:20|>'),
        (['--template=<|mask|> [MASK] b'], 'open tokens are written <|mask|> or <|mask:20|>'),
        (['--prompt=prompts.txt'], 'the name of a file: FILE:prompts.txt takes its lines'),
        (['--prompt=IDS:5,six'], 'ids are written as in IDS:5,6,7'),
        (['--prompt=IDS:5,400'], 'the prompt holds 400'),
        (['--trace=t.json'], 'trace=t.json: it is a page: NAME.html'),
        (['--draw_dtype=float16'], "draw_dtype='float16' is not known"),
        (['--tokenizer=gpt2-xlm'], '--tokenizer=none does without'),
        (['--tokenizer=bpe-300'], '--tokenizer=none does without'),
        (['--tokenizer=none', '--prompt=a'], 'IDS:5,6,7'),
        (['--seed=99999999999999999999'], 'in -2^63 ... 2^64 - 1'),
        (['--sampler=semi_ar', '--length=9999999', '--num_samples=99999999'], 'of memory, where'),
        (['--sampler=ar'], "for this one, subs, there is"),
        (['--top_k=99999999999999999999'], 'at most 2^62'),
        (['--sampler=semi_ar', '--length=999999', '--steps=100000000'], 'of memory, where'),
        (['--sampler=greedy', '--across_rows=1'], 'across_rows=1: it must be True or False'),
        (['--sampler=remdm', '--eta=abc'], "eta='abc': it must be at least 0 and at most 1"),
        (['--sampler=remdm', '--t_off=None'], 't_off=None: it must be above 0 and below 1'),
        (['--sampler=semi_ar', '--stride=1.5'], 'stride=1.5: it must be a whole number'),
        (['--sampler=ancestral', '--subs_masking=yes'], "subs_masking='yes': it must be True or"),
    ],
)
def test_bad_input_is_one_line(tiny_net, refused, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path))
    save_net(tiny_net(**BYTES), tmp_path)
    (tmp_path / 'prompts.txt').write_text('a\n')
    before = sorted(os.listdir(tmp_path))
    shown = refused('sample.py', '--out_dir=.', '--out=s.jsonl', *arguments)
    lines = [line for line in shown.splitlines() if 'sampling' not in line]
    assert len(lines) == 1 and lines[0].startswith('error: ') and message in lines[0], lines
    assert sorted(set(os.listdir(tmp_path)) - {'data'}) == before


def test_an_option_without_a_bracket_takes_the_type_of_its_default(tiny_net, monkeypatch):
    def left_to_right(b, num_steps, power=1.0):
        order = (torch.arange(b.x.size(1)) * power).long()
        b.follow(order.expand(len(b.x), -1), torch.ones(2 * len(order)))

    monkeypatch.setitem(SAMPLERS, 'left_to_right', left_to_right)
    monkeypatch.setitem(TAKES, 'left_to_right', ('x0',))
    for power in (2, np.float64(2), np.int64(2)):
        out = generate(tiny_net(), 1, 8, 8, 'left_to_right', power=power)
        assert out.nfe.tolist() == [8] and (out.tokens != 10).all()
    for power in ('abc', None, [2.0]):
        with pytest.raises(ValueError, match='power=.*: power takes a float, like 1.0'):
            generate(tiny_net(), 1, 8, 8, 'left_to_right', power=power)


@pytest.mark.parametrize('path', ['--out={}.jsonl', '--trace={}.html'])
def test_what_cannot_be_written_is_said_before_anything_else(refused, tmp_path, path):
    long = path.format('a' * 240)  # no file can have the name with which it begins
    assert 'it cannot be written (File name too long)' in refused('sample.py', long)
    assert not os.listdir(tmp_path)


def test_what_a_stopped_run_left_is_there_until_samples_replace_it(tiny_net, refused, tmp_path):
    save_net(tiny_net(**BYTES), tmp_path)
    (tmp_path / 's.jsonl.unfinished').write_text('kept')
    assert 'top_p=0.0' in refused('sample.py', '--out_dir=.', '--out=s.jsonl', '--top_p=0.0')
    assert (tmp_path / 's.jsonl.unfinished').read_text() == 'kept'


def test_huge_numbers_that_mean_all_are_taken(tiny_net):
    net = tiny_net()
    for options in (
        dict(sampler='low_confidence', block_length=10**30), dict(batch_size=10**30),
        dict(top_k=2**62), dict(seed=2**64 - 1), dict(seed=-(2**63)),
    ):  # fmt: skip
        assert (generate(net, 2, 8, 8, **options).tokens != 10).all()


def test_ids_alone_need_no_tokenizer(tiny_net, here, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_net(tiny_net(**BYTES), tmp_path)
    here(
        'sample.py', '--out_dir=.', '--tokenizer=none', '--steps=4', '--num_samples=1',
        '--prompt=IDS:7'
    )
    assert re.search(r'^\[7, (\d+, ){14}\d+\]$', capsys.readouterr().out, re.M)


def test_guidance_without_a_prompt_is_said(tiny_net, here, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_net(tiny_net(**BYTES), tmp_path)
    for prompt in ('', 'ab'):
        here('sample.py', '--out_dir=.', '--steps=2', '--cfg_scale=0.5', f'--prompt={prompt}')
        said = 'warning: cfg_scale=0.5 does nothing without a prompt' in capsys.readouterr().err
        assert said == (not prompt)


# --- the file


def test_rows_are_told_of_as_they_are_finished(tiny_net, monkeypatch):
    net = tiny_net(**AR)
    calls = []
    trunk = net.trunk
    monkeypatch.setattr(net, 'trunk', lambda *a, **k: calls.append(1) or trunk(*a, **k))
    told = []
    out = generate(
        net, 6, [3, 16, 3, 3, 1, 5], 1, 'ar', prompt=[1], batch_size=2,
        on_finish=lambda i, ids, nfe: told.append((len(calls), i, ids, nfe))
    )  # fmt: skip
    # row 4 is all prompt; rows 2, 3 and 5 go through the net beside the long row 1
    assert [(when, i) for when, i, *_ in told] == [(0, 4), (2, 0), (4, 2), (6, 3), (10, 5), (15, 1)]
    for _, i, ids, nfe in told:
        assert ids == out.tokens[i, : out.length[i]].tolist() and nfe == out.nfe[i]


def test_a_disk_that_is_full_at_once_is_named(tiny_net, refused, tmp_path):
    save_net(tiny_net(**BYTES), tmp_path)
    (tmp_path / 's.jsonl.unfinished').symlink_to('/dev/full')
    shown = refused('sample.py', '--out_dir=.', '--out=s.jsonl', '--steps=4')
    assert 'error: s.jsonl cannot be written (No space left on device)\n' in shown
    assert os.listdir(tmp_path) == ['ckpt.pt']
    (tmp_path / 't.html.unfinished').symlink_to('/dev/full')
    shown = refused('sample.py', '--out_dir=.', '--trace=t.html', '--steps=4')
    assert 'error: t.html cannot be written (No space left on device)\n' in shown
    assert os.listdir(tmp_path) == ['ckpt.pt']


@pytest.mark.slow
def test_a_full_disk_keeps_what_was_finished(tiny_net, tmp_path):
    save_net(tiny_net(**BYTES), tmp_path)
    command = f'ulimit -f 12; exec {sys.executable} {ROOT}/sample.py --out_dir=. --out=s.jsonl'
    done = subprocess.run(
        ['bash', '-c', f'{command} --steps=4 --num_samples=50 --batch_size=2 --device=cpu'],
        cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | dict(PYTHONDONTWRITEBYTECODE='1'),
    )  # fmt: skip
    assert done.returncode == 1
    said = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
    kept = (tmp_path / 's.jsonl.unfinished').read_text().splitlines()
    assert 1 < len(kept) < 50 and not (tmp_path / 's.jsonl').exists()
    assert all(len(json.loads(line)['ids']) == 16 for line in kept)
    message = f'{len(kept)} finished samples are kept in s.jsonl.unfinished'
    assert len(said) == 1 and 'File too large' in said[0] and message in said[0]
    assert 'Traceback' not in done.stderr


def test_a_net_without_numbers_writes_no_file(tiny_net, refused, tmp_path):
    net = tiny_net(**BYTES)
    with torch.no_grad():
        net.lm_head.bias[3] = torch.nan
    save_net(net, tmp_path)
    shown = refused('sample.py', '--out_dir=.', '--out=s.jsonl', '--steps=4', '--sampler=greedy')
    assert 'are not numbers' in shown
    assert os.listdir(tmp_path) == ['ckpt.pt']


def test_the_comment_of_an_option_may_stand_behind_a_whole_signature():
    from configurator import defaults_of

    def sampler(b, num_steps, tokens_a_step=None):  # [int >= 1] how many
        pass

    def two(b, eta=0.5, gamma=1):  # [>= 0] of gamma
        pass

    assert defaults_of(sampler) == dict(tokens_a_step=(None, '[int >= 1] how many'))
    assert defaults_of(two)['eta'] == (0.5, 'its own option')
    assert defaults_of(two)['gamma'] == (1, '[>= 0] of gamma')
