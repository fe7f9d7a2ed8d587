"""Prompts and answers: what data.py makes of them, and what training does with it, against the
vectors of SMDM's fine-tuning, enumeration, and the released formulas."""

import itertools
import json
import math
import os
import re
import shutil

import numpy as np
import pytest
import torch

import model
from conftest import ROOT
from data import TokenRows, get_tokenizer, gsm8k_line, prepare, read_meta, vicuna_prompt
from model import corrupt_batch, get_schedule, load_pretrained, per_token_loss

GOLDEN = os.path.join(os.path.dirname(__file__), 'golden')
TINY = (
    '--dataset=mine', '--packing=pair', '--n_layer=1', '--n_head=2', '--n_embd=16', '--cond_dim=0',
    '--block_size=24', '--batch_size=4', '--global_batch_size=8', '--log_interval=1',
    '--warmup_iters=1', '--learning_rate=1e-2', '--sample_at_end=False', '--device=cpu',
    '--dtype=float32', '--val_split=train', '--eval_iters=1',
)


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(path, *lines):
    with open(path, 'w', encoding='utf-8') as f:
        f.writelines(line if isinstance(line, str) else json.dumps(line) + '\n' for line in lines)
    return str(path)


def pair(prompt, answer):
    return dict(prompt=prompt, answer=answer)


@pytest.fixture
def pairs():
    """data/mine: 40 prompts of 3 to 12 bytes, with answers of 1 to 9."""
    lines = [pair('ask ' + str(7 ** i)[:1 + i % 9], str(3 ** i)[:1 + i % 9]) for i in range(40)]
    return prepare('pairs:' + write('p.jsonl', *lines), 'bytes', 'mine')


@pytest.fixture
def toy(shared):
    return os.path.join(shared, 'fixtures', 'toy_llama')


def metrics(out_dir='out'):
    lines = [json.loads(line) for line in open(f'{out_dir}/metrics.jsonl')]
    return {line['iter']: line for line in lines if 'loss' in line}


# --- data


def test_pairs_are_documents_in_order_with_the_length_of_their_prompts():
    write('p.jsonl', pair('Who?', ' Me'), '\n', pair('', 'all'), pair('é\n', '日'))
    folder = prepare('pairs:p.jsonl', 'bytes')
    counts = dict(
        documents=3, tokens=22, bytes=16, prompt_tokens=10, prompt_bytes=7, malformed_left_out=0,
        too_long_left_out=0)
    assert read_meta(folder)['splits'] == dict(train=counts)
    assert np.fromfile(f'{folder}/train.prompt', '<i8').tolist() == [5, 1, 4]
    rows = TokenRows(folder, 'train', 10, 'pair')
    texts = (b'Who? Me', b'all', 'é\n日'.encode())  # behind BOS, which is EOS here
    assert rows[:]['x0'].tolist() == [[256, *text] + [256] * (9 - len(text)) for text in texts]
    answer = [[j >= n for j in range(10)] for n in (5, 1, 4)]
    assert rows[:]['maskable'].tolist() == rows[:]['scored'].tolist() == answer
    assert rows[:]['attention_mask'].all()
    # the longest of those asked for, with its EOS
    assert TokenRows(folder, 'train', 10, 'pair', pad_to='batch')[[1, 2]]['x0'].shape == (2, 8)
    unpadded = TokenRows(folder, 'train', 10, 'pair', loss_on_padding=False)[1]
    for mask in ('maskable', 'scored', 'attention_mask'):  # its one EOS is the answer's
        assert unpadded[mask].tolist() == [[mask == 'attention_mask'] + [True] * 4 + [False] * 5]


def test_several_files_and_folders_keep_their_splits():
    os.makedirs('d')
    write('d/a.train.jsonl', pair('1', 'a'))
    write('d/a_test.jsonl', pair('2', 'b'))
    write('e.jsonl', pair('3', 'c'))
    folder = prepare('pairs:d,e.jsonl', 'bytes', 'both')
    assert [TokenRows(folder, 'train', 4, 'pair')[i]['x0'][0, 1].item() for i in (0, 1)] == [49, 51]
    assert TokenRows(folder, 'test', 4, 'pair')[:]['x0'].tolist() == [[256, 50, 98, 256]]
    assert list(read_meta(prepare('pairs:d/a_test.jsonl', 'bytes'))['splits']) == ['train']


def test_gsm8k_is_read_in_both_forms(shared, vectors):
    for item in vectors['gsm8k_lines']:
        line = gsm8k_line(item['question'], item['answer'])
        assert line == item['line'].rstrip('\n') + '\n'
    lines = [gsm8k_line(row['question'], row['answer']) for row in vectors['gsm8k_lines']]
    write('lines', *lines)
    write('objects', *vectors['gsm8k_lines'])
    bins = [prepare('gsm8k', 'bytes', name, name, max_length=4096) for name in ('lines', 'objects')]
    for file in ('train.bin', 'train.prompt'):
        one, two = (np.fromfile(f'{folder}/{file}', '<u2') for folder in bins)
        assert len(one) > 8 and np.array_equal(one, two)


def test_the_public_gsm8k_is_whole(shared):
    path = os.path.join(shared, 'data', 'gsm8k.test.jsonl')
    folder = prepare('gsm8k', 'bytes', 'g', path, max_length=4096)
    counts = read_meta(folder)['splits']['train']
    assert counts['documents'] == 2 * 1319
    assert counts['malformed_left_out'] == counts['too_long_left_out'] == 0


def test_gsm8k_rows_are_the_released_ones(vectors, toy, here, capsys):
    released = vectors['gsm8k_rows']
    write('train.txt', *released['lines'])
    limit = released['max_length']
    expected = [row['ids'] for row in released['rows']]
    prompts = [row['prompt_length'] for row in released['rows']]
    here(
        'data.py', '--dataset=gsm8k', '--input=train.txt', f'--tokenizer={toy}', '--name=g',
        f'--max_length={limit}')
    assert '5 malformed left out, 1 too long left out' in capsys.readouterr().out
    whole = prepare('gsm8k', toy, 'whole', 'train.txt')  # up to 256 tokens
    for folder in ('data/g', whole):
        rows = TokenRows(folder, 'train', limit, 'pair')  # both documents of an example, or none
        assert rows[:]['x0'].tolist() == expected
        assert (~rows[:]['scored']).sum(dim=1).tolist() == prompts
    assert (len(TokenRows(whole, 'train', 256, 'pair')), rows.left_out) == (len(expected) + 2, 2)


def test_sharegpt_rows_are_the_released_ones(vectors, toy):
    released = vectors['sharegpt_rows']
    write('s.json', released['data'])
    folder = prepare('sharegpt', toy, 's', 's.json')
    rows = TokenRows(folder, 'train', 2048, 'pair', pad_to='batch')
    assert len(rows) == len(released['rows'])
    for i, row in enumerate(released['rows']):
        assert rows[i]['x0'].tolist() == [row['ids']]
        assert (~rows[i]['scored']).sum() == row['prompt_length']
    batch = released['batch']
    assert rows[batch['rows']]['x0'].tolist() == batch['ids']
    assert read_meta(folder)['splits']['train']['too_long_left_out'] == 1
    for item in vectors['mt_bench_prompt']:
        assert vicuna_prompt(item['question']) == item['prompt']


def test_reverse_rows_are_the_released_ones(vectors, toy):
    released = vectors['reverse_rows']
    folder = prepare('reverse', toy, 'r', write('r.jsonl', *released['data']))
    rows = TokenRows(folder, 'train', 52, 'pair', pad_to='batch')
    for i, row in enumerate(released['rows']):
        assert rows[i]['x0'].tolist() == [row['ids']] and rows[i]['scored'].all()
    batch = released['batch']
    assert rows[batch['rows']]['x0'].tolist() == batch['ids']


def test_a_tokenizer_is_trained_on_prompts_and_answers():
    lines = [pair(f'what is {i} and {i}?', f'two times {i}') for i in range(200)]
    folder = prepare('pairs:' + write('p.jsonl', *lines), 'bpe-300')
    tok = get_tokenizer('bpe-300', folder)
    row = TokenRows(folder, 'train', 64, 'pair', pad_to='batch')[7]
    ids = [tok.bos_id, *tok.encode('what is 7 and 7?'), *tok.encode('two times 7'), tok.eos_id]
    assert row['x0'].tolist() == [ids]


@pytest.mark.parametrize(
    'line, error',
    [
        (dict(prompt='x'), 'p.jsonl, line 2: not a JSON object with a "answer" field'),
        (dict(answer='x', text='y'), 'p.jsonl, line 2: not a JSON object with a "prompt" field'),
        (dict(prompt='x', answer=None), 'p.jsonl, line 2: not a JSON object with a "answer" field'),
        (pair('x', ''), 'p.jsonl, line 2: the answer is empty'),
        (pair('x', '\ud83d'), 'p.jsonl, line 2: not a JSON object with a "answer" field'),
        ('[1]\n', 'p.jsonl, line 2: not a JSON object with a "prompt" field'),
        ('{"prompt"\n', 'p.jsonl, line 2: not a JSON object with a "prompt" field'),
    ],
)
def test_a_row_without_answer_is_one_line(line, error, refused):
    write('p.jsonl', pair('a', 'b'), line)
    message = refused('data.py', '--dataset=pairs:p.jsonl', '--tokenizer=bytes')
    assert message.startswith('error: ' + error) and message.count('\n') == 1
    assert not os.path.exists('data/p-bytes')


@pytest.mark.parametrize(
    'arguments, error',
    [
        (['--dataset=sharegpt'], 'give --input=FILE: ShareGPT_V3'),
        (['--dataset=sharegpt', '--input=p.jsonl'], 'p.jsonl is not JSON'),
        (['--dataset=sharegpt', '--input=object'], 'object is not a list of conversations'),
        (['--dataset=reverse', '--input=.'], '. is a folder: give one file'),
        (['--dataset=reverse', '--input=p.jsonl'], 'p.jsonl, line 1: not a JSON object with'),
        (['--dataset=gsm8k', '--input=p.jsonl'], 'p.jsonl, line 1: not a JSON object with'),
        (['--dataset=pairs:nowhere.jsonl'], 'nowhere.jsonl is not there'),
        (['--dataset=pairs:empty'], 'empty is a folder without .jsonl files'),
        (['--dataset=pairs:p.jsonl', '--max_length=2'], 'pairs:p.jsonl holds no document'),
        (['--dataset=pairs:p.jsonl', '--input=p.jsonl'], '--input=p.jsonl takes the place'),
    ],
)
def test_what_is_no_data_of_prompts_and_answers_is_refused(arguments, error, refused):
    os.makedirs('empty')
    write('object', {})
    write('p.jsonl', pair('a', 'b'), pair('c', 'd'))
    message = refused('data.py', *arguments, '--tokenizer=bytes')
    assert message.startswith('error: ' + error)


# --- training


@pytest.mark.parametrize(
    'arguments, error',
    [
        (['--block_size=10'], 'data/mine/train: the prompt of document 17 has 14 tokens'),
        (['--packing=pad', '--pad_to=batch'], "pad_to and prompt_drop go with packing 'pair'"),
        (['--packing=pad', '--prompt_drop=0.1'], "pad_to and prompt_drop go with packing 'pair'"),
        (['--prompt_drop=0.1', '--causal=True', '--objective=ar'], 'prompt_drop goes with nets'),
        (['--prompt_drop=2'], 'prompt_drop=2'),
        (['--epochs=1', '--flops=1e9'], 'epochs and flops both set max_iters'),
        (['--epochs=0.1'], 'epochs=0.1 of 40 rows are less than one step'),
        (['--dataset=words'], "packing 'pair': data/words/train has no prompts and answers"),
    ],
)
def test_settings_that_do_not_go_with_the_data_are_refused(arguments, error, pairs, refused):
    write('w.txt', '\n\n'.join(f'word {i}' for i in range(100)))
    prepare('text:w.txt', 'bytes', 'words')
    message = refused('train.py', *TINY, *arguments)
    assert message.startswith('error: ' + error) and message.count('\n') == 1


def test_answers_that_do_not_fit_are_left_out_and_counted(here, capsys):
    write('p.jsonl', pair('ask', 'short'), pair('ask', 'much too long'), pair('a', 'fits.'))
    rows = TokenRows(prepare('pairs:p.jsonl', 'bytes', 'mine'), 'train', 10, 'pair')
    assert (len(rows), rows.left_out) == (2, 1)
    assert rows[1]['x0'].tolist() == [[256, *b'afits.', *[256] * 3]]
    with pytest.raises(IndexError):
        rows[2]
    here('train.py', *TINY, '--block_size=10', '--max_iters=1')
    assert '2 rows of 10 tokens (1 longer ones left out)' in capsys.readouterr().out


def released_batches(vectors, kind):
    """A released micro-batch, as rows of a folder: (item, rows)."""
    for i, item in enumerate(vectors['sft_loss'][kind]):
        ids = np.array(item['ids'])
        n = len(ids)
        lengths = [*item['length']] if 'length' in item else [len(row) for row in item['ids']]
        for row in range(n):  # the padding is EOS, of which a document has one
            while lengths[row] > 1 and (ids[row, lengths[row] - 2:] == 2).all():
                lengths[row] -= 1
        folder = f'data/{kind}{i}'
        os.makedirs(folder)
        flat = np.concatenate([row[:k] for row, k in zip(ids, lengths, strict=True)])
        prompt = np.array(item.get('prompt_length', [0] * n), dtype='<i8')
        flat.astype('<u2').tofile(f'{folder}/train.bin')
        np.cumsum([0, *lengths]).astype('<i8').tofile(f'{folder}/train.idx')
        prompt.tofile(f'{folder}/train.prompt')
        counts = dict(
            documents=n, tokens=len(flat), bytes=len(flat), prompt_tokens=int(prompt.sum()),
            prompt_bytes=0)
        tok = dict(name='toy', vocab_size=89, eos_id=2, bos_id=1, pad_id=88, mask_id=88)
        meta = dict(
            source=dict(dataset='pairs:x'), command='none', tokenizer=tok, dtype='uint16',
            splits=dict(train=counts))
        with open(f'{folder}/meta.json', 'w') as f:
            json.dump(meta, f)
        rows = TokenRows(
            folder, 'train', 48, 'pair', loss_on_padding=kind != 'ar', pad_to='batch')
        if item['recipe'] == 'gsm8k':
            rows = TokenRows(folder, 'train', len(item['ids'][0]), 'pair')
        assert rows[:]['x0'].tolist() == item['ids']
        yield item, rows[:]


def loss_of(net, batch):
    loss = per_token_loss(
        net, batch['x0'], batch['xt'], batch['t'], masked=batch['masked'],
        attention_mask=batch['attention_mask'])
    return ((loss * batch['scored']).sum() / batch['scored'].sum()).item()


@pytest.mark.parametrize('drop', [False, True])
def test_the_loss_of_a_batch_is_the_released_one(drop, vectors, monkeypatch):
    net = load_pretrained(f'{GOLDEN}/smdm.safetensors', n_head=4)
    count = 0
    for item, rows in released_batches(vectors, 'diffusion'):
        if drop and 'loss_prompt_dropped' not in item:
            continue
        masked = torch.tensor(item['masked'], dtype=bool)
        assert not (masked & ~rows['maskable']).any()

        def released_draw(x0, *_, masked=masked):
            return x0.masked_fill(masked, 88)

        monkeypatch.setattr(model, 'corrupt', released_draw)
        t = torch.tensor(item['p_mask'])
        device = torch.device('cpu')
        batch = corrupt_batch(
            rows, t, net.config, get_schedule('loglinear'), 0, device, drop_prompt=drop)
        suffix = '_prompt_dropped' if drop else ''
        assert batch['xt'].tolist() == item['input' + suffix]
        assert loss_of(net, batch) == pytest.approx(item['loss' + suffix], rel=1e-5)
        count += 1
    assert count == (2 if drop else 6)


def test_the_loss_of_a_causal_batch_is_the_released_one(vectors):
    net = load_pretrained(f'{GOLDEN}/smdm_ar.safetensors', n_head=4)
    for item, rows in released_batches(vectors, 'ar'):
        batch = corrupt_batch(
            rows, torch.ones(4), net.config, get_schedule('loglinear'), 0, torch.device('cpu'))
        lengths = zip(item['prompt_length'], item['length'], strict=True)
        scored = [[a <= j < b for j in range(batch['x0'].size(1))] for a, b in lengths]
        assert batch['scored'].tolist() == scored
        assert loss_of(net, batch) == pytest.approx(item['loss'], rel=1e-5)


def test_what_a_step_trains_on_is_the_released_formula(pairs, here):
    here('train.py', *TINY, '--max_iters=1', '--out_dir=source', '--ema=0')
    command = (
        *TINY, '--init_from=source', '--max_iters=1', '--global_batch_size=4', '--dropout=0')
    for pad_to in ('block', 'batch'):
        done = here('train.py', *command, f'--pad_to={pad_to}', f'--out_dir={pad_to}')
        batch = done['training_batch'](0, 0)
        x0, xt, t = batch['x0'], batch['xt'], batch['t']
        prompt = ~batch['scored']
        assert (xt == x0)[prompt].all() and prompt.any()
        logits = load_pretrained('source')(xt)
        logits[..., 257] = -math.inf
        nll = -logits.log_softmax(dim=-1).gather(2, x0[..., None])[..., 0]
        D = x0.numel() - prompt.sum()
        loss = (nll / t[:, None])[xt == 257].sum() / D
        assert metrics(pad_to)[1]['loss'] == pytest.approx(loss.item(), rel=1e-5)
        rows = TokenRows(pairs, 'train', 24, 'pair')
        longest = rows.longest(done['rows_of'](0, 0, 4))
        assert x0.size(1) == (24 if pad_to == 'block' else longest) and longest < 24


def test_a_row_of_pad_to_batch_is_as_long_as_the_longest_of_the_step(pairs, here):
    done = here('train.py', *TINY, '--max_iters=1', '--pad_to=batch')
    widths = []
    for step in range(5):
        parts = [done['training_batch'](step, micro)['x0'] for micro in (0, 1)]
        both = torch.cat(parts)  # of one width
        ends = (both != 256).sum(dim=1) + 2  # BOS, EOS
        assert both.size(1) == ends.max()
        widths.append(both.size(1))
    assert len(set(widths)) > 1


def test_prompts_are_dropped_in_the_given_share_of_micro_batches_and_nothing_else_changes(
    pairs, here
):
    kept = here('train.py', *TINY, '--max_iters=1')['training_batch']
    options = ['--max_iters=1', '--prompt_drop=0.3', '--overwrite=True']
    sometimes = here('train.py', *TINY, *options)['training_batch']
    dropped = 0
    for step, micro in itertools.product(range(200), range(2)):
        a, b = kept(step, micro), sometimes(step, micro)
        for key in ('x0', 't', 'masked', 'scored'):
            assert torch.equal(a[key], b[key])
        prompt = ~a['scored']
        assert torch.equal(a['xt'][~prompt], b['xt'][~prompt])
        assert torch.equal(a['xt'][prompt], a['x0'][prompt])
        is_mask = b['xt'][prompt] == 257
        assert is_mask.all() or not is_mask.any()
        dropped += bool(is_mask.all())
    assert abs(dropped / 400 - 0.3) < 4 * (0.3 * 0.7 / 400) ** 0.5  # four standard errors


def test_the_likelihood_trained_is_that_of_the_answer_given_the_prompt(tiny_net):
    """The bound averaged over t and all masks, from what TokenRows says may be masked and is
    scored, against -log p(answer | prompt) revealed in every order, each with the same chance."""
    net = tiny_net(vocab_size=258, mask_id=257, cond_dim=0, block_size=8).double()
    folder = prepare('pairs:' + write('p.jsonl', pair('why', 'so')), 'bytes')
    row = TokenRows(folder, 'train', 8, 'pair', pad_to='batch')[0]
    x0 = row['x0']
    places = row['maskable'][0].nonzero().flatten().tolist()
    assert places == row['scored'][0].nonzero().flatten().tolist() == [4, 5, 6]  # s, o, EOS
    n = len(places)
    bound = 0.0
    for k in range(1, n + 1):
        for chosen in itertools.combinations(places, k):
            xt = x0.clone()
            xt[0, list(chosen)] = 257
            # the integral of t^k (1-t)^(n-k) / t; per_token_loss has its own 1/t, here 1
            chance = math.factorial(k - 1) * math.factorial(n - k) / math.factorial(n)
            loss = per_token_loss(net, x0, xt, torch.ones(1), 'subs') * row['scored']
            bound += chance * loss.double().sum().item()
    orders = 0.0
    for order in itertools.permutations(places):
        xt = x0.clone()
        xt[0, places] = 257
        for place in order:
            logits = net(xt)[0, place].double()
            logits[257] = -math.inf
            orders -= logits.log_softmax(dim=0)[x0[0, place]].item() / math.factorial(n)
            xt[0, place] = x0[0, place]
    assert bound == pytest.approx(orders, rel=1e-5)  # per_token_loss is float32


@pytest.mark.slow
def test_two_processes_see_the_batches_of_one(pairs, run):
    command = (*TINY, '--max_iters=4', '--pad_to=batch', '--prompt_drop=0.5', '--dropout=0')
    run('train.py', *command, '--out_dir=one')
    run('train.py', *command, '--out_dir=two', processes=2)
    one, two = ([line['loss'] for line in metrics(out).values()] for out in ('one', 'two'))
    assert len(one) == 4 and one == pytest.approx(two, rel=1e-5)  # sums in another order


@pytest.mark.parametrize('objective', ['subs', 'ar'])
def test_a_killed_run_on_pairs_resumes_exactly(objective, pairs, here):
    command = (
        *TINY, '--epochs=1.3', '--lr_schedule=cosine', '--pad_to=batch', '--keep_interval=3',
        f'--objective={objective}', f'--causal={objective == "ar"}',
        f'--prompt_drop={0.5 * (objective == "subs")}')
    done = here('train.py', *command, '--out_dir=whole')
    assert done['max_iters'] == 6  # 40 rows * 1.3 // 8
    os.makedirs('part')
    shutil.copy('whole/ckpt_3.pt', 'part/ckpt.pt')
    here('train.py', *command, '--out_dir=part', '--init_from=resume')
    whole, part = (torch.load(f'{folder}/ckpt.pt') for folder in ('whole', 'part'))
    assert whole['iter'] == part['iter'] == 6 and whole['tokens_seen'] == part['tokens_seen']
    assert whole['tokens_seen'] < 6 * 8 * 24
    assert all(torch.equal(whole['model'][name], part['model'][name]) for name in whole['model'])
    for step in (4, 5, 6):
        assert metrics('whole')[step]['loss'] == metrics('part')[step]['loss']


def test_eval_reads_the_conditional_likelihood_of_the_trained_data(pairs, here, capsys):
    for causal, objective in ((False, 'subs'), (True, 'ar')):
        out = '--out_dir=' + objective
        here('train.py', *TINY, '--max_iters=2', out, f'--causal={causal}',
             f'--objective={objective}', '--pad_to=batch')
        capsys.readouterr()
        here('eval.py', out, '--device=cpu', '--results=r.jsonl')
        shown = capsys.readouterr().out
        if causal:  # answers and their EOS, no padding
            counts = TokenRows(pairs, 'train', 24, 'pair').counts
            assert f"{counts['tokens']:,} tokens ({counts['tokens']:,} of documents)" in shown


# --- configs


@pytest.mark.parametrize('recipe', ['gsm8k', 'sharegpt', 'reverse', 'sharegpt_ar'])
def test_a_config_has_the_released_batch_steps_and_rates(recipe, vectors, pairs, here):
    released = next(item for item in vectors['lr_schedule'] if item['recipe'] == recipe)
    path = f'{ROOT}/config/sft_{recipe}.py'
    text = open(path).read()
    rows, = re.findall(r'epochs of ([\d,]+) rows', text)
    done = here(
        'train.py', path, *TINY[1:8], '--dataset=mine', '--init_from=scratch', '--epochs=None',
        '--max_iters=1', '--global_batch_size=4', '--batch_size=4', '--device=cpu',
        '--eval_iters=1')
    config = {}
    exec(text, config)
    assert config['global_batch_size'] == released['bs'] and config['epochs'] == released['epoch']
    assert config['batch_size'] == released['micro_batch_size']
    assert f"{released['steps']:,} steps" in text
    steps = int(rows.replace(',', '')) * config['epochs'] // config['global_batch_size']
    assert steps == released['steps']
    assert config['init_from'].startswith('nieshen/SMDM:') and 'shard=True' in text
    get_lr = done['get_lr']
    settings = get_lr.__globals__
    settings |= dict(max_iters=steps, warmup_iters=config['warmup_iters'])
    rates = [get_lr(step) for step in released['at_step']]
    assert rates == pytest.approx(released['lr'], rel=1e-9)


def test_samples_of_pairs_answer_prompts_of_the_split(pairs, here, capsys):
    for extra in ([], ['--causal=True', '--objective=ar']):
        here('train.py', *TINY, '--max_iters=1', '--sample_at_end=True', '--overwrite=True', *extra)
        told = capsys.readouterr().out
        prompts = ['ask ' + str(7 ** i)[:1 + i % 9] for i in range(40)]
        samples = re.findall(r'--- sample \d .*\n(.*)', told)
        assert len(samples) == 4
        for sample in samples:
            text = sample.removeprefix('<|endoftext|>')
            assert any(text.startswith(prompt) for prompt in prompts), sample
            assert '<|endoftext|>' not in text  # what fills the row is not shown
