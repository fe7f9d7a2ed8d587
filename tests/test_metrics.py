"""Conditional likelihoods, the estimators of the NELBO, and the metrics of samples."""

import itertools
import json
import math
import os
import random
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from conftest import save_net
from data import TokenRows, get_tokenizer, prepare
from eval import (
    continuation_nll, distinct, draw_rows, entropy_of, generative_perplexity, greedy_matches,
    hashes, load_judge, mauve, nelbo, read_texts, record, reference_texts, report,
    verbatim_shares, without_special
)
from model import load_pretrained

GOLDEN = os.path.join(os.path.dirname(__file__), 'golden')


# --- estimators of the NELBO


def exact_nelbo(net, x0):
    """By enumeration (any-order form): the mean over k of n/k times the mean over all sets of k
    masks of the losses in it, in nats per row."""
    n, total = len(x0), 0.0
    for k in range(1, n + 1):
        sets = list(itertools.combinations(range(n), k))
        xt = x0.repeat(len(sets), 1)
        for row, hidden in zip(xt, sets, strict=True):
            row[list(hidden)] = net.config.mask_id
        logits = net(xt)
        logits[:, :, net.config.mask_id] = -torch.inf
        nll = F.cross_entropy(
            logits.transpose(1, 2), x0.expand(len(sets), -1), reduction='none'
        ) * (xt == net.config.mask_id)
        total += n / k * nll.sum(dim=1).double().mean().item() / n
    return total


@torch.no_grad()
def test_both_estimators_have_the_exact_mean_and_counts_the_smaller_variance(tiny_net, rows):
    net, some = tiny_net(vocab_size=258, mask_id=257, scale=0.5), rows('concat')
    some = TokenRows(os.path.dirname(some.name), 'validation', 6, 'concat')
    exact = sum(exact_nelbo(net, some[i]['x0'][0]) for i in range(10)) / 60
    found = {
        name: [
            nelbo(net, FirstTen(some), num_mc=50, seed=seed, estimator=name)['nats_per_token']
            for seed in range(12)
        ]
        for name in ('time', 'count')
    }
    for name in found:
        mean, error = np.mean(found[name]), np.std(found[name], ddof=1) / math.sqrt(12)
        assert abs(mean - exact) < 4 * error + 2e-3 * exact, (name, mean, exact, error)
    assert np.std(found['count']) < np.std(found['time'])


class FirstTen:
    def __init__(self, rows):
        self.rows, self.counts = rows, rows.counts

    def __len__(self):
        return 10

    def __getitem__(self, indices):
        return self.rows[indices]


def test_counts_are_refused_where_they_are_not_defined(tiny_net, rows):
    for options, T in (
        (dict(time_conditioning=True), 0),
        (dict(objective='sedd', time_conditioning=True), 0),
        (dict(), 10),
    ):
        net = tiny_net(vocab_size=258, mask_id=257, **options)
        with pytest.raises(ValueError, match="estimator 'count' is for subs and mlm nets"):
            nelbo(net, rows(), T=T, estimator='count')
        assert nelbo(net, rows(), T=T, max_rows=3)['estimator'] == 'time'
    with pytest.raises(ValueError, match="estimator 'best' is not known"):
        nelbo(net, rows(), estimator='best')


# --- conditional likelihoods


@pytest.fixture(scope='module')
def smdm():
    return (
        load_pretrained(f'{GOLDEN}/smdm.safetensors', n_head=4),
        load_file(f'{GOLDEN}/smdm_expected.safetensors'),
        json.load(open(f'{GOLDEN}/smdm_meta.json')),
    )


@pytest.mark.parametrize('cfg_scale', [0.0, 1.1])
def test_conditional_likelihoods_match_the_released_code(smdm, cfg_scale):
    net, expected, meta = smdm
    prefix, target = expected['prefix'], expected['target']
    for batch_size in (1, 3, 16):
        assert continuation_nll(
            net, prefix, target, cfg_scale=cfg_scale, batch_size=batch_size
        ) == pytest.approx(meta[f'chain_rule_nll_cfg{cfg_scale}'], abs=1e-4)
    found = [
        continuation_nll(
            net, prefix.tolist(), target.tolist(), 'monte_carlo', cfg_scale=cfg_scale, num_mc=256,
            seed=seed
        )
        for seed in range(16)
    ]
    error = np.std(found, ddof=1) / 4  # 4096 draws each, ours and theirs
    assert abs(np.mean(found) - meta[f'mc_nll_cfg{cfg_scale}_n4096']) < 4 * math.sqrt(2) * error
    assert greedy_matches(net, prefix, target, cfg_scale) == meta[f'suffix_greedy_cfg{cfg_scale}']
    assert greedy_matches(net, prefix, expected[f'greedy_target_cfg{cfg_scale}'], cfg_scale)


def test_the_chain_rule_is_a_probability_distribution(tiny_net):
    net = tiny_net(vocab_size=4, mask_id=3, scale=1.0)
    for padding in (False, True):
        total = sum(
            math.exp(-continuation_nll(net, [1, 2], list(target), cfg_scale=0.7, padding=padding))
            for target in itertools.product(range(3), repeat=2)
        )
        assert total == pytest.approx(1, abs=1e-5)
    assert continuation_nll(net, [1, 2], [0, 1], padding=True) != pytest.approx(
        continuation_nll(net, [1, 2], [0, 1]), abs=1e-4
    )


def test_monte_carlo_has_the_mean_of_the_enumerated_bound(tiny_net):
    net = tiny_net(vocab_size=5, mask_id=4, scale=0.8)
    prefix = [1, 2]
    target = [0, 3, 1]
    exact = 0.0
    for k in range(1, 4):
        sets = list(itertools.combinations(range(3), k))
        for hidden in sets:
            x = torch.tensor(
                [prefix + [4 if i in hidden else token for i, token in enumerate(target)]]
            )
            logits = net(x)[0, 2:].detach()
            logits[:, 4] = -torch.inf
            exact += (
                sum(F.cross_entropy(logits[i], torch.tensor(target[i])).item() for i in hidden)
                / k
                / len(sets)
            )
    found = [
        continuation_nll(net, prefix, target, 'monte_carlo', num_mc=2000, seed=seed, batch_size=500)
        for seed in range(8)
    ]
    assert abs(np.mean(found) - exact) < 4 * np.std(found, ddof=1) / math.sqrt(8) + 2e-3 * exact


def test_a_causal_net_is_exact(tiny_net):
    net = tiny_net(causal=True, objective='ar', cond_dim=0, mask_id=None)
    x = torch.tensor([[1, 2, 3, 4, 5]])
    log_p = net(x).log_softmax(dim=-1)[0]
    assert continuation_nll(net, [1, 2], [3, 4, 5]) == pytest.approx(
        -sum(log_p[i, x[0, i + 1]].item() for i in (1, 2, 3)), abs=1e-4
    )
    best = net(torch.tensor([[1, 2]]))[0, -1].argmax().item()
    assert greedy_matches(net, [1, 2], [best])
    assert not greedy_matches(net, [1, 2], [(best + 1) % 11])


@pytest.mark.parametrize(
    'call, message',
    [
        (dict(target=[]), 'at least one target token'),
        (dict(prefix=[1] * 14, target=[1] * 3), 'at most 16 in all'),
        (dict(target=[10]), 'target: ids'),
        (dict(prefix=[11]), 'prefix: ids'),
        (dict(method='guess'), "method 'guess' is not known"),
        (dict(method='monte_carlo', num_mc=0), 'num_mc=0'),
        (dict(batch_size=-1), 'batch_size=-1'),
        (dict(cfg_scale=math.nan), 'cfg_scale=nan'),
    ],
)
def test_impossible_conditional_likelihoods_are_refused(tiny_net, call, message):
    with pytest.raises(ValueError, match=message):
        continuation_nll(tiny_net(), **dict(prefix=[1, 2], target=[3]) | call)
    with pytest.raises(ValueError, match='not sedd'):
        continuation_nll(tiny_net(objective='sedd', time_conditioning=True), [1], [2])


# --- generative perplexity


@pytest.fixture(scope='module')
def judge(tmp_path_factory):
    """A small random GPT-2 with a tokenizer of words, EOS among them, in a folder."""
    import tokenizers
    import transformers

    folder = str(tmp_path_factory.mktemp('judge-gpt2'))
    words = {word: i for i, word in enumerate(['<|endoftext|>', '[UNK]', *'abcdefghij'])}
    base = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token='[UNK]'))
    base.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=base, unk_token='[UNK]', eos_token='<|endoftext|>'
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=12, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=0,
        eos_token_id=0, initializer_range=0.5
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def by_the_book(texts, judge, protocol):
    """nats and number of scored tokens of each text, one at a time."""
    model, tok = load_judge(judge)
    rows = [tok(text)['input_ids'] for text in texts]
    longest, found = max(map(len, rows)), []
    for ids in rows:
        ids = ids + [0] * (longest > len(ids)) if protocol == 'mdlm' else ids
        nll = F.cross_entropy(
            model(torch.tensor([ids])).logits[0, :-1], torch.tensor(ids[1:]), reduction='none'
        )
        first = ids.index(0) if 0 in ids else len(ids)
        scored = (
            [i <= first or token != 0 for i, token in enumerate(ids)][1:]
            if protocol == 'mdlm'
            else [True] * len(nll)
        )
        found.append((nll[torch.tensor(scored)].sum().item(), sum(scored)))
    return found


@torch.no_grad()
def test_generative_perplexity_by_the_book(judge):
    rng = random.Random(0)
    texts = [
        ' '.join(rng.choice('abcdefghij') for _ in range(rng.randint(2, 40))) for _ in range(9)
    ]
    texts += [
        '<|endoftext|> a b <|endoftext|> c <|endoftext|> d', 'a b <|endoftext|> <|endoftext|>',
        'a <|endoftext|> b b b b'
    ]
    for protocol in ('mdlm', 'xlm'):
        expected = by_the_book(texts, judge, protocol)
        results = [
            generative_perplexity(texts, judge, protocol, batch_size) for batch_size in (1, 4, 12)
        ]
        for result in results:
            assert result['gen_ppl'] == pytest.approx(
                math.exp(sum(n for n, _ in expected) / sum(k for _, k in expected)), rel=1e-5
            )
            assert result['gen_ppl_mean'] == pytest.approx(
                np.mean([math.exp(n / k) for n, k in expected]), rel=1e-5
            )
            assert result['tokens'] == sum(k for _, k in expected)
            assert result['texts'] == 12
            assert result['skipped'] == 0
            assert result['gen_ppl_se'] > 0


def test_generative_perplexity_matches_the_released_code(shared):
    folder = f'{shared}/fixtures/judge_gpt2'
    expected = json.load(open(f'{shared}/fixtures/gen_ppl_expected.json'))
    for batch_size in (1, 4):
        found = generative_perplexity(expected['texts'], folder, 'mdlm', batch_size)
        assert found['gen_ppl'] == pytest.approx(expected['mdlm_gen_ppl'], rel=1e-5)
        found = generative_perplexity(expected['texts'], folder, 'xlm', batch_size)
        assert found['gen_ppl'] == pytest.approx(expected['xlm_total_ppl'], rel=1e-5)
        assert found['gen_ppl_mean'] == pytest.approx(expected['xlm_mean_ppl'], rel=1e-5)
        assert found['entropy'] == pytest.approx(expected['xlm_mean_entropy'], abs=1e-6)
        assert found['tokens'] == sum(row['tokens'] for row in expected['xlm_rows'])


def test_texts_that_cannot_be_measured_are_counted_or_refused(judge):
    found = generative_perplexity(['a b c', '', 'a', 'b a'], judge, 'xlm')
    assert (found['texts'], found['skipped'], found['tokens']) == (2, 2, 3)
    for texts, message in (
        (['', 'a'], 'of 2 texts none has a token that can be scored'),
        ([], 'of 0 texts'),
        ('a b', 'a list of str'),
        ([1], 'a list of str'),
    ):
        with pytest.raises(ValueError, match=message):
            generative_perplexity(texts, judge, 'xlm')
    with pytest.raises(ValueError, match="protocol 'mlm' is not known"):
        generative_perplexity(['a b'], judge, 'mlm')
    with pytest.raises(ValueError, match="the judge 'nowhere/none' cannot be loaded"):
        load_judge('nowhere/none')


def test_a_judge_that_looks_ahead_is_refused(judge, tmp_path):
    import transformers

    config = transformers.BertConfig(
        vocab_size=12, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16
    )
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path)
    for file in ('tokenizer.json', 'tokenizer_config.json'):
        shutil.copy(os.path.join(judge, file), tmp_path)
    with pytest.raises(ValueError, match='looks ahead: a causal language model is needed'):
        load_judge(str(tmp_path))


def test_entropy_special_tokens_and_distinct():
    assert entropy_of([1, 1, 2, 2]) == pytest.approx(math.log(2)) and entropy_of([5] * 9) == 0
    assert without_special('<|endoftext|>a <|pad|><|mask|>b<|cls|>') == 'a b'
    assert distinct([[1, 2, 1, 2], [1, 2]], 2) == 2 / 4 and distinct([[1]], 2) is None


def test_verbatim_share_by_brute_force(tmp_path):
    rng = np.random.default_rng(0)
    corpus = rng.integers(0, 5, 3000).astype('<u2')
    corpus.tofile(tmp_path / 'train.bin')
    samples = [
        rng.integers(0, 5, 50).tolist(),
        corpus[100:140].tolist() + [4] * 30,
        corpus[-25:].tolist(),
        [1] * 3,
    ]
    for n in (2, 5, 7, 20):
        grams = {tuple(corpus[i : i + n]) for i in range(len(corpus) - n + 1)}
        ours = [tuple(row[i : i + n]) for row in samples for i in range(len(row) - n + 1)]
        for chunk in (64, 2**22):
            share, none, again = verbatim_shares(
                [samples, [[1]], samples[:2] + samples[2:]],
                tmp_path / 'train.bin',
                np.dtype('<u2'),
                n,
                chunk,
            )
            assert share == again == pytest.approx(sum(gram in grams for gram in ours) / len(ours))
            assert none is None
    assert len(hashes([1, 2], 3)) == 0


@pytest.mark.slow
def test_mauve_tells_alike_from_different(shared, judge):
    rng = random.Random(0)
    alike = [' '.join(rng.choice('abcde') for _ in range(30)) for _ in range(120)]
    other = [' '.join(rng.choice('hij') for _ in range(30)) for _ in range(60)]
    same, different = mauve(alike[:60], alike[60:], judge), mauve(other, alike[60:], judge)
    assert same['mauve'] > 0.8 and different['mauve'] < 0.3 and same['mauve_texts'] == 60
    assert mauve(alike[:30] + ['', 'a'], alike[60:], judge)['mauve_skipped'] == 1
    for texts, references, message in (
        (['a b c d e'], alike, 'are too few'),
        (alike, other, 'as many references as texts'),
    ):
        with pytest.raises(ValueError, match=message):
            mauve(texts, references, judge)


# --- samples of a net, tables, reports


def test_samples_on_disk_are_not_drawn_again(tiny_net, tmp_path):
    net = tiny_net(vocab_size=258, mask_id=257)
    net.tokenizer = dict(name='bytes')
    options = dict(length=8, steps=4, seed=1, batch_size=3)
    rows = draw_rows(net, str(tmp_path / 's'), 5, dict(steps=4), **options)
    assert sorted(os.listdir(tmp_path / 's')) == ['000000-000002.jsonl', '000003-000004.jsonl']
    assert len(rows) == 5
    os.remove(tmp_path / 's' / '000003-000004.jsonl')
    before = os.stat(tmp_path / 's' / '000000-000002.jsonl').st_mtime_ns
    again = draw_rows(
        net, str(tmp_path / 's'), 7, dict(steps=4), **options | dict(batch_size=2)
    )
    assert again[:5] == rows
    assert os.stat(tmp_path / 's' / '000000-000002.jsonl').st_mtime_ns == before
    with pytest.raises(ValueError, match='holds samples drawn with steps=4, not 5'):
        draw_rows(net, str(tmp_path / 's'), 5, dict(steps=5), **options)


@pytest.fixture
def measured(tiny_net, rows, tmp_path):
    save_net(tiny_net(vocab_size=258, mask_id=257), tmp_path)
    rows()
    return tmp_path


def test_the_table_its_results_and_the_report(measured, here, judge, capsys):
    pytest.importorskip('matplotlib')
    arguments = [
        '--metric=table', '--out_dir=.', f'--judge={judge}', '--featurizer=', '--num_samples=5',
        '--table_steps=(2,4)', '--device=cpu', '--sampler=fixed',
        "--published={'gen_ppl': {2: 3.0}}"
    ]
    here('eval.py', *arguments)
    first = capsys.readouterr().out
    assert first.splitlines()[0].startswith('| steps | gen_ppl |')
    assert 'gen_ppl published' in first
    assert len(first.splitlines()) == 4
    assert ' ± ' in first
    here('eval.py', *arguments)
    assert capsys.readouterr().out == first
    here('eval.py', '--out_dir=.', '--device=cpu', '--max_rows=8')
    lines = [json.loads(line) for line in open('results.jsonl')]
    assert [line['metric'] for line in lines] == ['table'] * 4 + ['ppl']
    assert lines[0]['result'] == lines[2]['result']
    assert lines[0]['result']['steps'] == 2
    assert lines[0]['settings']['sampler'] == 'fixed'
    assert len(lines[0]['weights']) == 16
    assert lines[4]['result']['ppl_se'] > 0
    with pytest.raises(SystemExit):
        here('eval.py', '--metric=report')
    assert capsys.readouterr().out.count('## ') == 2
    assert {'results.md', 'results-steps.png', 'results-entropy.png'} <= set(os.listdir('.'))


def test_samples_of_a_file_and_of_a_net(measured, here, judge, refused, capsys):
    with open('s.jsonl', 'w') as f:
        f.write(
            ''.join(
                json.dumps(dict(text=text)) + '\n'
                for text in ('to be or not to be, not to be or to be', 'not to be', '')
            )
        )
    here(
        'eval.py', '--metric=samples', '--input=s.jsonl', f'--judge={judge}', '--dataset=c-bytes',
        '--tokenizer=bytes', '--featurizer='
    )
    assert '| verbatim_20 |' in capsys.readouterr().out
    result = json.loads(open('results.jsonl').readlines()[-1])['result']
    assert result['skipped'] == 1 and 0 <= result['verbatim_20'] <= 1
    here(
        'eval.py', '--metric=samples', '--out_dir=.', f'--judge={judge}', '--featurizer=',
        '--num_samples=3', '--steps=4', '--device=cpu'
    )
    result = json.loads(open('results.jsonl').readlines()[-1])['result']
    assert result['texts'] + result['skipped'] == 3
    for arguments, message in (
        (['--input=none.jsonl'], 'error: input=none.jsonl: there is no such file'),
        (['--input=bad.jsonl'], 'error: bad.jsonl, line 1: not a JSON object with a "text"'),
        (
            ['--input=s.jsonl', '--judge=nowhere/none'],
            "error: the judge 'nowhere/none' cannot be loaded",
        ),
        (['--input=empty.jsonl'], 'error: empty.jsonl holds no text'),
        (
            ['--input=s.jsonl', '--dataset=c-bytes', '--tokenizer=bytes', '--featurizer=bertha'],
            'error: the featurizer',
        ),
        (['--input=s.jsonl', '--dataset=nowhere'], 'error: there is no data'),
        (['--input=s.jsonl', '--results=none/r.jsonl'], 'error: results=none/r.jsonl'),
        (['--table_steps=()'], 'error: table_steps=()'),
        (['--T=1.5'], 'error: T=1.5'),
        (['--out_dir=.', "--sampler_options={'seed': 3}"], 'error: sampler_options'),
    ):
        open('bad.jsonl', 'w').write('{"t": 1}\n')
        open('empty.jsonl', 'w').write('')
        error = refused('eval.py', '--metric=samples', f'--judge={judge}', *arguments)
        assert error.startswith(message) and error.count('\n') == 1


def test_zero_shot_is_one_table_and_says_what_is_missing(tiny_net, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_net(tiny_net(vocab_size=258, mask_id=257), tmp_path)
    for name in ('wikitext2', 'ag_news'):
        (tmp_path / f'{name}.txt').write_text(' some words , here \n' * 30)
        prepare(name, 'bytes', input=f'{name}.txt')
    error = refused(
        'eval.py', '--metric=zero_shot', '--out_dir=.', "--datasets=('wikitext2','ag_news','ptb')",
        '--device=cpu'
    )
    missing = 'there is no data in data/ptb-bytes: make it with python data.py'
    assert (
        f'1 of 3 datasets could not be measured: ptb: {missing} --dataset=ptb --tokenizer=bytes'
        in error
    )
    lines = [json.loads(line)['result'] for line in open('results.jsonl')]
    assert [(line['dataset'], line['split']) for line in lines] == [
        ('wikitext2', 'validation'),
        ('ag_news', 'test'),
    ]


def test_references_are_documents_of_the_split(rows):
    some = rows()
    folder, tok = os.path.dirname(some.name), get_tokenizer('bytes')
    texts = reference_texts(folder, 'validation', tok, 1000)
    assert len(texts) == some.counts['documents']
    assert set(texts) < set(open('c.txt').read().split('\n\n'))
    assert len(reference_texts(folder, 'validation', tok, 3)) == 3


def test_bad_results_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match='every run of eval.py appends'):
        report(str(tmp_path / 'results.jsonl'))
    record(str(tmp_path / 'results.jsonl'), metric='ppl')
    with pytest.raises(ValueError, match='line 1: not a result of eval.py'):
        report(str(tmp_path / 'results.jsonl'))
    with pytest.raises(FileNotFoundError):
        read_texts(str(tmp_path / 'none.jsonl'))


# --- a language of known entropy


@pytest.mark.slow
def test_a_markov_chain_is_learned_to_its_entropy_rate(here, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    letters, P = 'abcdefgh', rng.dirichlet(np.full(8, 0.5), size=8)
    stationary = np.linalg.matrix_power(P, 200)[0]
    rate = -(stationary[:, None] * P * np.log(P)).sum()  # nats a letter
    cdf, u = P.cumsum(axis=1), rng.random((400, 5000))
    state, out = rng.choice(8, size=400, p=stationary), []
    for column in u.T:
        out.append(state)
        state = (column[:, None] > cdf[state]).sum(axis=1).clip(max=7)
    with open('chain.txt', 'w') as f:
        f.write('\n\n'.join(''.join(letters[i] for i in row) for row in np.array(out).T))
    here('data.py', '--dataset=text:chain.txt', '--tokenizer=bytes', '--name=chain')
    here(
        'train.py', '--dataset=chain', '--tokenizer=bytes', '--packing=concat', '--block_size=64',
        '--n_layer=3', '--n_head=4', '--n_embd=128', '--cond_dim=16', '--batch_size=32',
        '--global_batch_size=32', '--max_iters=1000', '--warmup_iters=50', '--learning_rate=2e-3',
        '--lr_schedule=cosine', '--eval_interval=1000', '--ema=0.99', '--device=cpu',
        '--sample_at_end=False'
    )
    result = here('eval.py', '--device=cpu', '--num_mc=16', '--max_rows=2000')['result']
    nats, error = result['nats_per_token'], result['nats_per_token_se']
    # the first letter of a row of 64 costs the entropy of the stationary distribution;
    # a document ends every 5,001st token
    first = (-(stationary * np.log(stationary)).sum() - rate) / 64
    assert rate - 4 * error - 1e-3 * rate < nats < 1.03 * rate + first, (nats, rate, error)
    samples = here(
        'sample.py', '--num_samples=400', '--steps=64', '--batch_size=100', '--device=cpu'
    )['samples'].tokens.numpy() - ord('a')
    pairs = np.zeros((8, 8))
    for row in samples:
        inside = (row[:-1] >= 0) & (row[:-1] < 8) & (row[1:] >= 0) & (row[1:] < 8)
        np.add.at(pairs, (row[:-1][inside], row[1:][inside]), 1)
    # total variation; 25,000 pairs alone make 0.01
    assert np.abs(pairs / pairs.sum() - stationary[:, None] * P).sum() / 2 < 0.06
