"""Whoever reproduces a published number gets its protocol: a test for each line that differed.

Times, learning rates and objectives are in test_gradients and test_model, samplers and draws in
test_sampling_options, weights in test_weights, data in test_own_text and test_packed.
"""

import itertools
import json
import os

import pytest
import torch

import eval as measures
from configurator import configure
from conftest import ROOT, save_net
from data import TokenRows, get_tokenizer, pack_wrap, prepare
from eval import against_release, continuation_nll, generative_perplexity, mauve, streamed
from model import load_pretrained
from sample import generate
from test_metrics import by_the_book, judge  # noqa: F401 (a fixture)

GOLDEN = os.path.join(os.path.dirname(__file__), 'golden')
CONFIG = os.path.join(ROOT, 'config', 'eval_owt_mlm.py')


# --- 2. the xlm table


@pytest.fixture
def xlm_tokenizer(tmp_path):
    """A folder with a tokenizer of the 61 ids of the xlm fixtures."""
    import tokenizers
    import transformers

    special = ['<eos>', '<cls>', '<bos>', '<pad>', '<unk>', '<mask>', '<sep>']
    words = {word: i for i, word in enumerate([*(f'w{i}' for i in range(54)), *special])}
    base = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token='<unk>'))
    base.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    names = {f'{name}_token': f'<{name}>' for name in ('eos', 'bos', 'pad', 'unk', 'mask', 'sep')}
    folder = str(tmp_path / 'words')
    transformers.PreTrainedTokenizerFast(tokenizer_object=base, **names).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_the_xlm_table_is_measured_as_released(
    shared, xlm_tokenizer, here, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    folder = f'{shared}/fixtures/judge_gpt2'
    here(
        'eval.py', CONFIG, f'--init_from={shared}/fixtures/xlm', f'--judge={folder}',
        f'--tokenizer={xlm_tokenizer}', '--num_samples=2', '--length=24', '--featurizer=',
        '--device=cpu', '--dataset=', '--overrides={"n_head": 4}'
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == 'sampler fixed, float32, judge bfloat16, T 128 … 1024'
    assert [line.split(' | ')[0] for line in lines[3:7]] == ['| 128', '| 256', '| 512', '| 1,024']
    assert lines[-1].startswith('not as released: ')
    for name in 'init_from judge tokenizer num_samples length featurizer dataset'.split():
        assert f' {name}=' in lines[-1]
    assert 'num_samples=2 (released: 1000)' in lines[-1]
    assert 'top_p' not in lines[-1] and 'dtype' not in lines[-1]

    result = json.loads(open('results.jsonl').readline())
    assert result['released'] == lines[-1]
    texts = [json.loads(line)['text'] for line in open('samples-owt-mlm/128/000000-000001.jsonl')]
    loaded = measures.load_judge(folder)
    texts = [measures.without_special(text, loaded[1]) for text in texts]
    expected = generative_perplexity(texts, loaded, 'xlm', judge_dtype='bfloat16')
    assert result['result']['gen_ppl'] == pytest.approx(expected['gen_ppl'], rel=1e-6)
    assert expected['gen_ppl'] != generative_perplexity(texts, loaded, 'xlm')['gen_ppl']
    assert '| not as released: ' in measures.report('results.jsonl')


def test_a_config_as_it_stands_is_as_released():
    module = dict(vars(measures))
    assert against_release(configure(module, [CONFIG]), configure(dict(module), [CONFIG])) == (
        'as released'
    )
    changed = configure(dict(module), [CONFIG, '--top_p=0.9', '--seed=3', '--batch_size=1'])
    assert against_release(changed, configure(dict(module), [CONFIG])) == (
        'not as released: top_p=0.9 (released: 0.95)'
    )


# --- 3. packing, prompts and measures follow the release of the weights


def test_data_and_measures_follow_the_family():
    for source, packing, protocol in (
        ('mdlm_hf', 'wrap', 'mdlm'), ('mdlm_ar.safetensors', 'wrap', 'mdlm'),
        ('xlm/model.safetensors', 'pad', 'xlm'), ('smdm.safetensors', 'concat', None),
        ('smdm_ar.safetensors', 'concat', None)
    ):
        constants = load_pretrained(os.path.join(GOLDEN, source), n_head=4).constants
        assert (constants['packing'], constants.get('protocol')) == (packing, protocol)


def test_published_weights_are_measured_on_rows_as_released(
    xlm_tokenizer, here, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'c.txt').write_text('\n\n'.join(['w1 w2 w3 w4 w5'] * 400))
    prepare('text:c.txt', xlm_tokenizer, 'words')
    result = here(
        'eval.py', f'--init_from={GOLDEN}/xlm/model.safetensors', '--dataset=words',
        f'--tokenizer={xlm_tokenizer}', '--block_size=12', '--num_mc=1', '--max_rows=6',
        '--overrides={"n_head": 4}', '--device=cpu'
    )['result']
    # padding is a token like any other, and no part of the document
    assert (result['tokens'], result['document_tokens']) == (6 * 12, 6 * 6)


def test_text_prompts_of_smdm_begin_with_bos(shared, tmp_path):
    tok = get_tokenizer(f'{shared}/fixtures/toy_llama')
    net = load_pretrained(f'{GOLDEN}/smdm.safetensors', n_head=4)
    net.tokenizer = dict(name=f'{shared}/fixtures/toy_llama')
    ids = tok.encode('Question: 2 + 2')
    out = generate(net, 1, len(ids) + 3, 2, prompt='Question: 2 + 2')
    assert out.tokens[0, :len(ids) + 1].tolist() == [1, *ids]
    assert generate(net, 1, 8, 2, prompt=ids[:4]).tokens[0, :4].tolist() == ids[:4]
    net.constants = load_pretrained(f'{GOLDEN}/mdlm_hf').constants
    out = generate(net, 1, len(ids) + 3, 2, prompt='Question: 2 + 2')
    assert out.tokens[0, :len(ids)].tolist() == ids


# --- 5. MDLM's AR sampler runs to full length


def test_the_samples_of_an_mdlm_table_run_to_full_length(
    tiny_net, here, tmp_path, judge, monkeypatch  # noqa: F811
):
    monkeypatch.chdir(tmp_path)
    net = tiny_net(vocab_size=258, mask_id=257, causal=True, objective='ar', cond_dim=0)
    net.lm_head.bias.data[256] += 4.0  # it often draws EOS
    save_net(net, tmp_path)
    lengths = {}
    for protocol in ('mdlm', 'xlm'):
        here(
            'eval.py', '--metric=samples', '--out_dir=.', f'--judge={judge}', '--featurizer=',
            '--dataset=', '--num_samples=6', '--device=cpu', f'--protocol={protocol}',
            f'--samples_dir={protocol}'
        )
        (path,) = os.listdir(f'{protocol}/1024')
        rows = [json.loads(line) for line in open(f'{protocol}/1024/{path}')]
        lengths[protocol] = [len(row['ids']) for row in rows]
    assert set(lengths['mdlm']) == {16}
    assert min(lengths['xlm']) < 16


# --- 6. rows of 1,000 documents at a time


def test_grouped_rows_are_those_that_the_release_cuts(rows):
    some = rows()
    folder = os.path.dirname(some.name)
    documents = [some.document(i)[:-1].tolist() for i in range(some.counts['documents'])]
    bos, eos = some.tok['bos_id'], some.tok['eos_id']
    for size in (1, 3, 7, 1000):
        groups = [documents[i:i + size] for i in range(0, len(documents), size)]
        expected = [pack_wrap(group, 16, bos, eos) for group in groups]
        found = TokenRows(folder, 'validation', 16, 'wrap', grouping=size)
        assert found[:]['x0'].tolist() == list(itertools.chain(*(x.tolist() for x in expected)))
        assert len(found) == sum(map(len, expected))
    assert len(TokenRows(folder, 'validation', 16, 'wrap', grouping=3)) < len(some)


def test_the_zero_shot_table_is_cut_as_released():
    constants = configure(
        dict(vars(measures)), [os.path.join(ROOT, 'config', 'eval_owt_mdlm.py')]
    )
    assert (constants['grouping'], constants['estimator'], constants['num_mc']) == (1000, 'time', 1)


# --- 8. MAUVE and generative perplexity


def test_documents_are_streamed_in_the_order_of_datasets():
    # IterableDataset.shuffle(seed=42, buffer_size=100) of datasets 3.6.0 over 2,345 rows
    order = list(streamed(2345, 100))
    assert order[:10] == [8, 77, 65, 43, 103, 85, 100, 69, 20, 9]
    assert order[-5:] == [2344, 2173, 2044, 2123, 2326]
    assert sorted(order) == list(range(2345))
    # and over 30
    assert list(streamed(30, 100))[:8] == [29, 16, 7, 25, 24, 22, 5, 21]


def test_mauve_drops_empty_texts_and_short_references(monkeypatch):
    library, seen = pytest.importorskip('mauve'), {}

    def compute_mauve(**arguments):
        seen.update(arguments)
        return type('Result', (), dict(mauve=0.5))

    monkeypatch.setattr(library, 'compute_mauve', compute_mauve)
    references = ['short', ' a long reference ', 'eight ch', 'seven c', 'one more of them']
    found = mauve(['a', ' ', '', ' b c '], references, 'gpt2')
    assert found == dict(mauve=0.5, mauve_texts=2, mauve_skipped=2)
    assert seen['q_text'] == ['a', 'b c']
    assert seen['p_text'] == ['a long reference', 'eight ch']  # in their order
    assert (seen['seed'], seen['max_text_length']) == (25, 256)


@torch.no_grad()
def test_texts_are_padded_within_their_generated_batch(judge):  # noqa: F811
    texts = ['a b c d', 'e f', 'a a', 'g h i j a b c', 'b a', 'c d e']
    for size in (1, 2, 4):
        batches = [texts[i:i + size] for i in range(0, len(texts), size)]
        expected = [row for batch in batches for row in by_the_book(batch, judge, 'mdlm')]
        found = generative_perplexity(texts, judge, 'mdlm', generated_batch=size)
        assert found['tokens'] == sum(count for _, count in expected)
        nats = sum(nats for nats, _ in expected) / found['tokens']
        assert found['gen_ppl'] == pytest.approx(measures.exp(nats), rel=1e-5)


# --- 9. SMDM's likelihoods


def test_smdm_likelihoods_are_drawn_as_released(tiny_net, monkeypatch):
    seen, draw = [], measures.monte_carlo_masks

    def spy(n, num_mc, seed, eps):
        seen.append((num_mc, eps))
        return draw(n, num_mc, seed, eps)

    monkeypatch.setattr(measures, 'monte_carlo_masks', spy)
    smdm = load_pretrained(f'{GOLDEN}/smdm.safetensors', n_head=4)
    continuation_nll(smdm, [1, 2], [3], 'monte_carlo')
    continuation_nll(tiny_net(), [1, 2], [3], 'monte_carlo')
    continuation_nll(tiny_net(), [1, 2], [3], 'monte_carlo', num_mc=8, eps=0.0)
    assert seen == [(1024, 0.0), (128, 1e-3), (8, 0.0)]
    # eps = 0 and one token: each draw masks it with probability t and weighs by 1/t, so that the
    # mean over stratified times is near its loss, and no draw is a division by zero
    exact = continuation_nll(smdm, [1, 2], [3])
    found = continuation_nll(smdm, [1, 2], [3], 'monte_carlo', num_mc=4000, batch_size=2000)
    assert found == pytest.approx(exact, rel=0.1)
