import collections
import html
import io
import itertools
import json
import math
import os
import pty
import re
import shutil
import subprocess
import sys
import tempfile

import pytest
import torch

import reference
from conftest import ROOT, save_net
from model import get_schedule, loglinear
from data import get_tokenizer
from sample import draw, generate, spelling

TINY = dict(
    block_size=8, vocab_size=4, mask_id=3, n_layer=1, n_head=1, n_embd=8, cond_dim=4, scale=1.5
)


def chi_square_p(counts, probabilities, n):
    """p-value of counts (dict) under probabilities (dict); outcomes that are expected fewer than 5
    times are pooled."""
    assert set(counts) <= set(probabilities), 'an impossible outcome was drawn'
    cells, rest = [], [0, 0.0]
    for outcome, p in probabilities.items():
        if p * n >= 5:
            cells.append((counts.get(outcome, 0), p * n))
        else:
            rest = [rest[0] + counts.get(outcome, 0), rest[1] + p * n]
    cells += [tuple(rest)] if rest[1] >= 1 else []
    statistic = sum((seen - expected) ** 2 / expected for seen, expected in cells)
    assert len(cells) > 1
    return torch.special.gammaincc(
        torch.tensor((len(cells) - 1) / 2), torch.tensor(statistic / 2)
    ).item()


def counts_of(tokens):
    return collections.Counter(map(tuple, tokens.tolist()))


# --- the distribution


@pytest.mark.parametrize('steps', [1, 2, 5])
@pytest.mark.parametrize(
    'net_options', [dict(), dict(time_conditioning=True), dict(objective='mlm', mask_id=1)]
)
def test_ancestral_sampler_matches_enumerated_distribution(tiny_net, steps, net_options):
    net, n = tiny_net(**TINY | net_options), 50_000
    exact = reference.ancestral_distribution(net, 3, steps, loglinear)
    assert abs(sum(exact.values()) - 1) < 1e-5
    out = generate(net, n, 3, steps, seed=1, batch_size=10_000)
    assert chi_square_p(counts_of(out.tokens), exact, n) > 1e-3


def test_other_schedules_and_what_they_condition_on(tiny_net):
    for name, steps in (('cosine', 3), ('change_of_variables', 3)):
        net, schedule = tiny_net(**TINY, time_conditioning=True), get_schedule(name)
        out = generate(net, 20_000, 3, steps, batch_size=10_000, schedule=schedule)
        assert (
            chi_square_p(
                counts_of(out.tokens),
                reference.ancestral_distribution(net, 3, steps, schedule),
                20_000,
            )
            > 1e-3
        )


def test_enumeration_tells_one_number_of_steps_from_another(tiny_net):
    # the test above can fail: samples at 5 steps do not fit the distribution of 1 step
    net = tiny_net(**TINY)
    out = generate(net, 10_000, 3, 5, batch_size=2500)
    assert (
        chi_square_p(
            counts_of(out.tokens), reference.ancestral_distribution(net, 3, 1, loglinear), 10_000
        )
        < 1e-6
    )


def test_textbook_loop_matches_enumerated_distribution(tiny_net):
    net, n = tiny_net(**TINY, time_conditioning=True), 20_000
    exact = reference.ancestral_distribution(net, 3, 4, loglinear)
    tokens = reference.ancestral(net, n, 3, 4, loglinear, torch.Generator().manual_seed(0))
    assert chi_square_p(counts_of(tokens), exact, n) > 1e-3


def test_reveal_steps_are_uniform_under_loglinear(tiny_net):
    out = generate(tiny_net(**TINY), 4000, 8, 10, batch_size=4000)
    counts = collections.Counter(out.reveal_step.flatten().tolist())
    assert chi_square_p(counts, {step: 0.1 for step in range(10)}, 32_000) > 1e-3


@pytest.mark.parametrize(
    'options',
    [
        dict(temperature=0.5),
        dict(top_k=3),
        dict(top_p=0.8),
        dict(temperature=1.5, top_k=4, top_p=0.9),
    ],
)
def test_options_change_the_distribution_as_they_say(tiny_net, options):
    net, n = tiny_net(**TINY | dict(scale=0.5, vocab_size=6, mask_id=5)), 10_000
    # one step: positions are independent
    logits = net(torch.full((1, 2), 5))[0, :, :5].detach().double()
    p = torch.softmax(logits / options.get('temperature', 1.0), dim=-1)
    # in words: the top_k, renormalised; of these the first, and more while the running sum is at
    # most top_p
    for i, row in enumerate(p.clone()):
        order = row.argsort(descending=True).tolist()[: options.get('top_k') or 5]
        running = (row[order] / row[order].sum()).cumsum(dim=0).tolist()
        kept = [
            token
            for rank, token in enumerate(order)
            if rank == 0 or running[rank] <= options.get('top_p', 1.0) + 1e-12
        ]
        assert len(kept) > 1
        p[i] = torch.zeros(5, dtype=torch.float64).index_copy(
            0, torch.tensor(kept), row[kept] / row[kept].sum()
        )
    exact = {
        state: math.prod(p[i, token].item() for i, token in enumerate(state))
        for state in itertools.product(range(5), repeat=2)
    }
    out = generate(net, n, 2, 1, batch_size=2500, **options)
    assert (
        chi_square_p(
            counts_of(out.tokens), {state: mass for state, mass in exact.items() if mass}, n
        )
        > 1e-3
    )


@pytest.mark.parametrize('cfg_scale', [-1.0, -0.4, 1.5])
def test_guidance_is_unconditional_plus_scaled_difference(tiny_net, cfg_scale):
    net = tiny_net(**TINY | dict(scale=0.5))
    n = 10_000
    prompt = [2, 0]
    cond, un = (
        net(torch.tensor([x]))[0, 2:, :3].detach().double() for x in ([2, 0, 3, 3], [3, 3, 3, 3])
    )
    p = torch.softmax(un + (1 + cfg_scale) * (cond - un), dim=-1)
    exact = {(2, 0, a, b): (p[0, a] * p[1, b]).item() for a in range(3) for b in range(3)}
    assert sorted(exact.values())[3] > 1e-3
    out = generate(net, n, 4, 1, prompt=prompt, cfg_scale=cfg_scale, batch_size=2500)
    assert chi_square_p(counts_of(out.tokens), exact, n) > 1e-3 and (out.nfe == 2).all()


# --- draws


def test_draw_is_the_inverse_cdf_without_the_mask():
    logits = torch.tensor([0.2, 0.5, 0.0, 0.3]).log().repeat(5, 1)
    logits[:, 2] = 7.0
    u = torch.tensor([0.0, 0.199, 0.201, 0.699, 0.701], dtype=torch.float64)
    assert draw(logits, u, mask_id=2)[0].tolist() == [0, 0, 1, 1, 3]
    assert draw(logits, u, mask_id=2, temperature=0)[0].tolist() == [1] * 5


def test_draw_reaches_the_tail_that_float32_cuts_off():
    logits = torch.tensor([[0.0, -23.0, 0.0]])  # the second token: 1e-10
    for u, token in ((1 - 1e-9, 0), (1 - 1e-11, 1), (1 - 2.0**-53, 1)):
        assert (
            draw(logits.clone(), torch.tensor([u], dtype=torch.float64), mask_id=2)[0].item()
            == token
        )


def test_top_p_leaves_out_the_token_that_crosses_it():
    logits = torch.tensor([[0.5, 0.3, 0.2, 0.0]]).log()
    grid = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000

    def drawn(**options):
        return set(draw(logits.repeat(1000, 1), grid, 3, **options)[0].tolist())

    assert drawn(top_p=0.49) == {0}
    assert drawn(top_p=0.79) == {0}
    assert drawn(top_p=0.81) == {0, 1}
    assert drawn(top_p=1.0) == {0, 1, 2}
    assert drawn(top_k=1) == {0} and drawn(top_k=2) == {0, 1} and drawn(top_k=50) == {0, 1, 2}
    assert drawn(top_k=2, top_p=0.62) == {0}  # 0.5 / 0.8 = 0.625: after top_k, renormalised


def test_top_k_keeps_exactly_k_of_equal_tokens():
    grid = (torch.arange(100, dtype=torch.float64) + 0.5) / 100
    assert len(set(draw(torch.zeros(100, 10), grid, 9, top_k=3)[0].tolist())) == 3


def test_a_net_that_gives_no_numbers_is_refused(tiny_net):
    net = tiny_net()
    with torch.no_grad():
        net.lm_head.bias[3] = math.nan
    with pytest.raises(ValueError, match='are not numbers'):
        generate(net, 2, 8, 4)


# --- what a caller relies on


def test_a_row_depends_on_its_seed_alone(tiny_net):
    net = tiny_net().double()
    whole = generate(net, 7, 12, 20, seed=3, batch_size=7)
    for batch_size in (1, 2, 3):
        again = generate(net, 7, 12, 20, seed=3, batch_size=batch_size)
        assert torch.equal(again.tokens, whole.tokens)
        assert torch.equal(again.nfe, whole.nfe)
        assert torch.equal(again.reveal_step, whole.reveal_step)
    later = generate(net, 3, 12, 20, seed=3, first_row=4)
    assert torch.equal(later.tokens, whole.tokens[4:])
    assert not torch.equal(generate(net, 7, 12, 20, seed=4).tokens, whole.tokens)


def test_prompts_are_kept_bit_for_bit(tiny_net):
    net = tiny_net()
    for prompt, expected in (
        ([4, 5], torch.tensor([[4, 5]] * 3)),
        (torch.tensor([[1, 2], [3, 4], [5, 6]]), torch.tensor([[1, 2], [3, 4], [5, 6]])),
        (list(range(10)), torch.arange(10).expand(3, -1)),
    ):
        out = generate(net, 3, 10, 6, prompt=prompt)
        P = expected.size(1)
        assert torch.equal(out.tokens[:, :P], expected)
        assert (out.reveal_step[:, :P] == -1).all()
        assert (out.reveal_step[:, P:] >= 0).all()
        assert (out.tokens != 10).all() and out.tokens.dtype == torch.int64


def test_text_prompts_go_through_the_nets_tokenizer(tiny_net):
    net = tiny_net(vocab_size=258, mask_id=257)
    with pytest.raises(ValueError, match='names no tokenizer'):
        generate(net, 1, 8, 2, prompt='ab')
    net.tokenizer = dict(name='bytes')
    assert generate(net, 1, 8, 2, prompt='ab').tokens[0, :2].tolist() == [97, 98]


def test_nfe_counts_the_distinct_steps_and_averages_as_the_formula_says(tiny_net, monkeypatch):
    net = tiny_net()
    T = 40
    L = 16
    n = 400
    calls, trunk = [], net.trunk

    def counted(x, sigma=None, attention_mask=None):
        calls.append(len(x))
        return trunk(x, sigma, attention_mask)

    monkeypatch.setattr(net, 'trunk', counted)
    out = generate(net, n, L, T, batch_size=50)
    assert out.nfe.tolist() == [len(set(row.tolist())) for row in out.reveal_step]
    assert sum(calls) == out.nfe.sum()  # the trunk ran for rows that changed, and no others
    expected = T * (1 - (1 - 1 / T) ** L)
    assert abs(out.nfe.double().mean() - expected) < 4 * out.nfe.double().std() / math.sqrt(n)


def test_only_positions_being_revealed_are_projected(tiny_net, monkeypatch):
    net = tiny_net()
    rows = []
    head = tiny_net().head

    def counted(h):
        rows.append(len(h))
        return head(h)

    monkeypatch.setattr(net, 'head', counted)
    generate(net, 5, 16, 8, batch_size=2)
    assert sum(rows) == 5 * 16


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(steps=0), 'steps=0'),
        (dict(top_p=0.0), 'top_p=0.0: it must be above 0'),
        (dict(top_p=1.1), 'top_p=1.1'),
        (dict(top_k=-1), 'top_k=-1'),
        (dict(temperature=-1.0), 'temperature=-1.0'),
        (dict(sampler='magic'), "sampler 'magic' is not known: choose from ancestral"),
        (dict(length=17), 'length=17'),
        (dict(length=0), 'length=0'),
        (dict(num_samples=0), 'num_samples=0'),
        (dict(cfg_scale=-2.0), 'cfg_scale=-2.0'),
        (dict(prompt=[1] * 9), 'has 9 tokens, more than'),
        (dict(prompt=[11]), 'an id that is not a token'),
        (dict(prompt=[10]), 'an id that is not a token'),
        (dict(prompt=[-1]), 'an id that is not a token'),
        (dict(prompt=[[1], [2], [3]]), 'prompt has 3 rows'),
        (dict(prompt=[1.5]), 'prompt holds 1.5, which is no id'),
        (dict(prompt=torch.tensor(3)), 'text or ids are needed'),
        (dict(length='abc'), "length='abc'"),
        (dict(length=[8, None]), 'length='),
        (dict(steps=2.5), 'steps=2.5'),
        (dict(temperature=math.inf), 'temperature=inf'),
        (dict(top_p=math.nan), 'top_p=nan'),
    ],
)
def test_impossible_options_are_refused(tiny_net, options, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny_net(), **dict(num_samples=2, length=8, steps=4) | options)


# --- the command line


def test_sample_py_prints_and_writes_samples(tiny_net, run, tmp_path):
    save_net(tiny_net(vocab_size=258, mask_id=257), tmp_path)
    shown = run(
        'sample.py', '--out_dir=.', '--num_samples=2', '--steps=8', '--prompt=Hi', '--device=cpu'
    ).stdout
    assert shown.count('--- sample') == 2 and shown.count('\nHi') == 2
    run(
        'sample.py', '--out_dir=.', '--num_samples=3', '--steps=8', '--out=s.jsonl', '--length=6',
        '--top_p=0.9'
    )
    lines = [json.loads(line) for line in open(tmp_path / 's.jsonl')]
    assert len(lines) == 3 and not (tmp_path / 's.jsonl.unfinished').exists()
    for line in lines:
        assert len(line['ids']) == 6
        assert 1 <= line['nfe'] <= 6
        assert isinstance(line['text'], str)
        assert line['settings']['top_p'] == 0.9


def test_prompts_come_from_a_file_or_from_stdin(tiny_net, here, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_net(tiny_net(vocab_size=258, mask_id=257), tmp_path)
    (tmp_path / 'prompts.txt').write_text('Hello\n\nA\nBe\n')
    here(
        'sample.py', '--out_dir=.', '--prompt=FILE:prompts.txt', '--num_samples=2', '--steps=4',
        '--out=s.jsonl'
    )
    texts = [json.loads(line)['text'] for line in open('s.jsonl')]
    assert len(texts) == 6
    assert [
        text.startswith(begin)
        for text, begin in zip(texts, ('Hello', 'Hello', 'A', 'A', 'Be', 'Be'), strict=True)
    ] == [True] * 6
    monkeypatch.setattr('sys.stdin', io.TextIOWrapper(io.BytesIO(b'One\r\nTwo\n')))
    out = here(
        'sample.py', '--out_dir=.', '--prompt=-', '--num_samples=1', '--steps=4', '--length=9'
    )['samples']
    assert bytes(out.tokens[1, :3].tolist()) == b'Two' and out.tokens.shape == (2, 9)
    monkeypatch.setattr('sys.stdin', io.TextIOWrapper(io.BytesIO(b'a<|mask|>c\nab<|mask:3|>de\n')))
    out = here(
        'sample.py', '--out_dir=.', '--template=-', '--num_samples=1', '--steps=4',
        '--sampler=fixed'
    )['samples']
    assert out.length.tolist() == [3, 7]
    assert (out.reveal_step == -1).tolist() == [
        [True, False, True] + [True] * 4,
        [True, True] + [False] * 3 + [True] * 2,
    ]
    for arguments, message in (
        (['--prompt=FILE:none.txt'], 'there is no file none.txt'),
        (['--prompt=FILE:empty.txt'], 'there is no text in it'),
        (['--template=ab<|mask:3|>', '--length=6'], 'the template has 5 tokens, the length is 6'),
        (['--eta=0.1'], "eta does not go with sampler 'ancestral'"),
        (['--template=a<|mask:-1|>'], 'open tokens are written'),
        (['--template=a<|mask:99999999|>'], '99999999 open tokens, where a row has at most 16'),
        (['--prompt=FILE:latin.txt'], 'not UTF-8 text'),
        (['--prompt=\udcff'], 'not valid UTF-8'),
        (['--overrides={1: 2}'], 'a dict of fields of ModelConfig'),
        (['--steps=99999999999999999999'], 'at most 100 million'),
        (['--out=pipe'], 'it is no file'),
        (['--out=x', '--trace=x'], 'give two names'),
        (['--sampler=remdm', '--strategy=[1]'], 'is not known'),
    ):
        (tmp_path / 'latin.txt').write_bytes(b'caf\xe9\n')
        if not os.path.exists('pipe'):
            os.mkfifo('pipe')
        (tmp_path / 'empty.txt').write_text('\n')
        with pytest.raises((ValueError, OSError), match=message):
            here('sample.py', '--out_dir=.', *arguments)


def test_letters_of_several_tokens_are_spelt_whole():
    tok = get_tokenizer('bytes')
    ids = list('aé日😀b'.encode())
    assert spelling(tok, ids) == ['a', 'é', '', '日', '', '', '😀', '', '', '', 'b']
    assert spelling(tok, [97, 0xC3, None, 0xA9]) == ['a', '\ufffd', None, '\ufffd']


def test_the_natural_sampler_of_each_objective(tiny_net, here, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for options in (
        dict(objective='sedd', time_conditioning=True),
        dict(objective='d3pm', time_conditioning=True),
        dict(objective='ar', causal=True, cond_dim=0),
    ):
        save_net(tiny_net(vocab_size=258, mask_id=257, **options), tmp_path)
        out = here('sample.py', '--out_dir=.', '--num_samples=3', '--steps=4', '--prompt=Hi')[
            'samples'
        ]
        assert bytes(out.tokens[0, :2].tolist()) == b'Hi' and (out.tokens != 257).all()
    # ar: begins with BOS
    out = here('sample.py', '--out_dir=.', '--num_samples=3', '--length=5')['samples']
    assert (out.tokens[:, 0] == 256).all() and (out.length <= 5).all()


def test_watch_shows_the_first_sample_filling_in(tiny_net, run, tmp_path):
    save_net(tiny_net(vocab_size=258, mask_id=257), tmp_path)
    shown = run(
        'sample.py', '--out_dir=.', '--prompt=Hi', '--watch=True', '--steps=50', '--num_samples=2'
    ).stdout
    assert 3 < shown.count('--- step') <= 9
    assert 'of 14 tokens\nHi' in shown
    assert '_' in shown
    assert shown.count('14 of 14 tokens') == 1
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.execv(
            sys.executable,
            [
                sys.executable,
                os.path.join(ROOT, 'sample.py'),
                '--out_dir=.',
                '--prompt=Hi',
                '--watch=True',
                '--steps=50',
            ],
        )
    shown = b''
    while True:
        try:
            shown += os.read(terminal, 4096)
        except OSError:
            break
    assert os.waitpid(pid, 0)[1] == 0
    frames = shown.decode(errors='replace').split('\x1b[J')
    assert len(frames) > 1 and '14 of 14 tokens' in frames[-1] and '░' not in frames[-1]


def played(path, fragment):
    """The page as headless Chromium leaves it: (text, class) of each token, and the text of the
    panel."""
    folder = tempfile.mkdtemp()
    dom = subprocess.run(
        [
            shutil.which('chromium'),
            '--headless',
            '--no-sandbox',
            '--disable-gpu',
            '--disable-quic',
            '--no-first-run',
            '--disable-background-networking',
            '--disable-component-update',
            '--disable-sync',
            f'--user-data-dir={folder}',
            '--virtual-time-budget=1500',
            '--dump-dom',
            f'file://{path}{fragment}',
        ],
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout
    shutil.rmtree(folder, ignore_errors=True)
    shown = re.search(r'<div id="text">(.*?)</div>', dom, re.S).group(1)
    spans = re.findall(r'<span class="(\w*)"[^>]*>(.*?)</span>', shown, re.S)
    now = re.search(r'id="now">(.*?)<', dom).group(1)
    return [(html.unescape(text), kind) for kind, text in spans], now


def trace_of(here, tmp_path, *arguments):
    here('sample.py', '--out_dir=.', '--trace=t.html', '--steps=30', *arguments)
    page = (tmp_path / 't.html').read_text()
    # nothing is loaded from anywhere
    assert 'http' not in page
    assert 'src=' not in page
    assert '@import' not in page
    return json.loads(
        re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.S).group(1)
    )


@pytest.mark.parametrize('sampler', ['ancestral', 'remdm'])
def test_the_trace_plays_to_the_sample(tiny_net, here, tmp_path, monkeypatch, capsys, sampler):
    monkeypatch.chdir(tmp_path)
    save_net(tiny_net(vocab_size=258, mask_id=257), tmp_path)
    eta = ['--eta=0.5'] if sampler == 'remdm' else []
    data = trace_of(
        here, tmp_path, f'--sampler={sampler}', '--prompt=</script><b>', '--num_samples=2',
        '--out=s.jsonl', *eta
    )
    for sample, line in zip(data['samples'], open('s.jsonl'), strict=True):
        tokens = list(sample['given'])
        for step, at, text, confidence in sample['events']:
            assert 0 <= step < 30 and 0 <= confidence <= 1 and sample['given'][at] is None
            tokens[at] = text
        assert tokens == [
            chr(i) if i < 128 else '<|endoftext|>' if i == 256 else '\ufffd'
            for i in json.loads(line)['ids']
        ]
    assert any(text is None for _, _, text, _ in data['samples'][0]['events']) == (
        sampler == 'remdm'
    )


@pytest.mark.skipif(
    not shutil.which('chromium'), reason='needs Chromium (Debian: apt install chromium)'
)
def test_the_trace_in_a_browser(tiny_net, here, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_net(tiny_net(vocab_size=258, mask_id=257), tmp_path)
    sample = trace_of(here, tmp_path, '--prompt=a<b', '--num_samples=1')['samples'][0]
    final = {at: text for _, at, text, _ in sample['events']}
    spans, now = played(tmp_path / 't.html', '')
    assert [text.replace('\u21b5', '') for text, _ in spans] == [
        given or final[i] for i, given in enumerate(sample['given'])
    ]
    assert now.endswith(', 0 masked')
    assert [kind for _, kind in spans[:3]] == ['given'] * 3
    spans, now = played(tmp_path / 't.html', '#3')
    third = sorted({step for step, *_ in sample['events']})[2]
    masked = sum(step > third for step, *_ in sample['events'])
    assert sum(kind == 'mask' for _, kind in spans) == masked
    assert now == f'step {third + 1}, {masked} masked'
    assert 'fresh' in [kind for _, kind in spans]
    spans, now = played(tmp_path / 't.html', '#play')  # half of the shortest duration
    assert 0 < sum(kind == 'mask' for _, kind in spans) < 13


@pytest.mark.parametrize(
    'arguments, message',
    [
        ([], 'error: no checkpoint at out/ckpt.pt: train one'),
        (['--out_dir=.', '--top_p=0.0'], 'error: top_p=0.0'),
        (['--out_dir=.', '--steps=0'], 'error: steps=0'),
        (['--out_dir=.', '--device=cuda:99'], "error: device='cuda:99'"),
        (['--out_dir=.', '--tokenizer=gpt2-xlm'], 'error: '),
        (
            ['--out_dir=.', '--out=nowhere/s.jsonl'],
            'error: out=nowhere/s.jsonl: there is no folder nowhere',
        ),
    ],
)
def test_bad_input_ends_sample_py_with_one_line(tiny_net, refused, tmp_path, arguments, message):
    save_net(tiny_net(vocab_size=258, mask_id=257), tmp_path)
    stderr = [
        line for line in refused('sample.py', *arguments).splitlines() if 'sampling' not in line
    ]
    assert len(stderr) == 1 and stderr[0].startswith(message), stderr
