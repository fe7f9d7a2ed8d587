"""What eval.py must survive, and what it must say: exact counts, infinite perplexities, full disks,
judges that are not trained, reports without matplotlib, nets of no published family."""

import contextlib
import json
import math
import os
import resource
import sys

import numpy as np
import pytest
import torch

from conftest import save_net
from data import train_bpe
from eval import (
    ENGLISH, TokenRows, draw_rows, exp, greedy_matches, load_judge, nelbo, plot,
    record, report, write_whole
)
from model import FAMILIES, load_pretrained, save_pretrained

UNIFORM = dict(vocab_size=258, mask_id=257, scale=0.0)


# --- figures


def test_token_counts_are_exact_for_every_number_of_draws(tiny_net, rows):
    net, some = tiny_net(**UNIFORM), rows()
    for num_mc in (1, 3, 5, 6, 7, 11, 13):
        found = nelbo(net, some, num_mc, batch_size=64, max_rows=20)
        assert (found['tokens'], found['document_tokens']) == (20 * 16, 20 * 14)


def test_draws_do_not_depend_on_the_batch_size(tiny_net, rows):
    net, some = tiny_net(vocab_size=258, mask_id=257), rows()
    for estimator in ('time', 'count'):
        one, four, all_ = [
            nelbo(net, some, 2, batch_size, max_rows=8, estimator=estimator)['nats_per_token']
            for batch_size in (1, 4, 8)
        ]
        # float32 sums of 16 losses; other masks move it by a hundredth
        assert one == pytest.approx(four, rel=1e-5) and one == pytest.approx(all_, rel=1e-5)


def test_a_perplexity_beyond_floats_is_infinite(tiny_net, rows, here, capsys, tmp_path):
    assert exp(1.0) == math.e and exp(800.0) == math.inf
    rows()
    net = tiny_net(**UNIFORM)
    net.lm_head.bias.data[0] = 5000.0
    save_net(net, tmp_path)
    here('eval.py', '--out_dir=.', '--max_rows=2', '--device=cpu')
    assert '  inf ± inf perplexity' in capsys.readouterr().out
    assert json.loads(open('results.jsonl').read())['result']['ppl'] is None  # JSON has no inf


def test_weights_that_are_no_numbers_end_in_one_line(tiny_net, rows, refused, tmp_path):
    rows()
    net = tiny_net(**UNIFORM)
    net.lm_head.bias.data[0] = math.nan
    save_net(net, tmp_path)
    error = refused('eval.py', '--out_dir=.', '--max_rows=2', '--device=cpu')
    assert error == 'error: the losses are not numbers: the weights are not, or overflow\n'


def test_a_causal_net_needs_a_prefix_to_be_greedy(tiny_net):
    net = tiny_net(causal=True, objective='ar', cond_dim=0, mask_id=None)
    with pytest.raises(ValueError, match='a causal net begins with a token: give a prefix'):
        greedy_matches(net, [], [1])


# --- full disks


@contextlib.contextmanager
def full_disk(size):
    """Lets no file grow beyond so many bytes; not even that which pytest reports to."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_named_and_what_was_finished_is_kept(tmp_path):
    path = str(tmp_path / 's.jsonl')
    record(path, metric='ppl', result=dict(ppl=1.0))
    before = open(path).read()
    lacking = 's.jsonl cannot be written .* what it lacks: {"ppl": 2.0}'
    with full_disk(len(before) + 100), pytest.raises(OSError, match=lacking):
        record(path, metric='ppl', result=dict(ppl=2.0))
    assert open(path).read() == before
    with full_disk(5000), pytest.raises(OSError, match='t.jsonl cannot be written'):
        write_whole(str(tmp_path / 't.jsonl'), 'x' * 10_000)
    assert os.listdir(tmp_path) == ['s.jsonl']


def test_samples_drawn_before_the_disk_was_full_are_not_drawn_again(tiny_net, tmp_path):
    net, folder = tiny_net(vocab_size=258, mask_id=257), str(tmp_path / 'samples')
    net.tokenizer = dict(name='bytes')
    options = dict(length=8, steps=2, seed=1)
    draw_rows(net, folder, 2, {}, batch_size=1, **options)
    failure = r'samples/000002-000005.jsonl cannot be written'
    with full_disk(300), pytest.raises(OSError, match=failure):
        draw_rows(net, folder, 6, {}, batch_size=4, **options)
    assert sorted(os.listdir(folder)) == ['000000-000000.jsonl', '000001-000001.jsonl']


# --- the report


def results(path, *rows):
    with open(path, 'w') as f:
        for row in rows:
            result = dict(gen_ppl_se=1.0, entropy_se=0.1, judge='j', protocol='xlm') | row
            line = dict(metric='table', source='out', weights='0', settings=dict(seed=0))
            f.write(json.dumps(line | dict(result=result)) + '\n')


def test_a_report_without_matplotlib_has_its_tables(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    results(tmp_path / 'r.jsonl', dict(steps=4, gen_ppl=3.0, entropy=2.0))
    text = report(str(tmp_path / 'r.jsonl'))
    assert '3 ± 1' in text and '2 ± 0.1' in text
    assert 'No plots: they need matplotlib' in text
    assert (tmp_path / 'r.md').read_text() == text + '\n'
    assert sorted(os.listdir(tmp_path)) == ['r.jsonl', 'r.md']


def test_plots_have_no_empty_panel_and_a_legend_of_what_differs(tmp_path, monkeypatch):
    pyplot = pytest.importorskip('matplotlib.pyplot')
    monkeypatch.setattr(pyplot, 'close', lambda figure: None)
    alike = dict(source='out', judge='gpt2-large', top_p=0.9, gen_ppl_se=0.5, entropy_se=0.2)
    rows = [
        alike | dict(sampler=sampler, steps=steps, gen_ppl=80 / steps, entropy=4.0)
        for sampler in ('fixed', 'ancestral')
        for steps in (4, 8)
    ]
    assert plot(rows, 'steps', ('gen_ppl', 'entropy', 'mauve'), tmp_path / 'a.png')
    figure = pyplot.gcf()
    assert [axis.get_ylabel() for axis in figure.axes] == ['gen ppl', 'entropy']
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        'sampler fixed', 'sampler ancestral'
    ]
    assert plot(rows, 'entropy', ('gen_ppl',), tmp_path / 'b.png')
    bars = pyplot.gcf().axes[0].containers[0]
    assert bars.has_xerr and bars.has_yerr
    assert not plot(rows, 'steps', ('mauve',), tmp_path / 'c.png')
    assert sorted(os.listdir(tmp_path)) == ['a.png', 'b.png']


# --- judges


@pytest.fixture
def make_judge(tmp_path):
    """A function that saves a small GPT-2 of words, trained on ENGLISH for so many steps."""
    import tokenizers
    import transformers

    def make(steps):
        words = dict.fromkeys(ENGLISH.replace('.', ' .').replace(',', ' ,').split())
        words = {word: i for i, word in enumerate(['<|endoftext|>', '[UNK]', *words])}
        base = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token='[UNK]'))
        base.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        tok = transformers.PreTrainedTokenizerFast(
            tokenizer_object=base, unk_token='[UNK]', eos_token='<|endoftext|>'
        )
        torch.manual_seed(0)
        config = transformers.GPT2Config(
            vocab_size=len(words), n_embd=32, n_layer=1, n_head=2, n_positions=64
        )
        model = transformers.GPT2LMHeadModel(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        ids = torch.tensor([tok(ENGLISH)['input_ids']])
        for _ in range(steps):
            optimizer.zero_grad()
            model(ids, labels=ids).loss.backward()
            optimizer.step()
        tok.save_pretrained(tmp_path / 'judge')
        model.save_pretrained(tmp_path / 'judge')
        return str(tmp_path / 'judge')

    return make


def test_a_judge_that_is_not_trained_is_warned_about(make_judge, capsys):
    load_judge(make_judge(0))
    assert 'tokens backwards' in (said := capsys.readouterr().err) and 'is it trained?' in said
    load_judge(make_judge(60))
    assert 'trained?' not in capsys.readouterr().err


def test_samples_of_sample_py_say_how_they_were_drawn(tiny_net, here, tmp_path, make_judge,
                                                      monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_net(tiny_net(vocab_size=258, mask_id=257), tmp_path)
    here('sample.py', '--out_dir=.', '--steps=3', '--top_p=0.5', '--device=cpu', '--out=s.jsonl')
    here('eval.py', '--metric=samples', '--input=s.jsonl', f'--judge={make_judge(0)}')
    result = json.loads(open('results.jsonl').readlines()[-1])['result']
    assert (result['sampler'], result['steps'], result['top_p']) == ('ancestral', 3, 0.5)


# --- nets of no published family, and gradients


def test_a_net_of_no_published_family_comes_back(tiny_net, tmp_path):
    for i, options in enumerate((
        dict(cond_dim=0),
        dict(cond_dim=0, norm='rmsnorm', mlp='gelu', mlp_bias=False, objective='mlm', pad_id=3),
        dict(norm_bias=True, time_conditioning=True, objective='d3pm', rotary_bf16=True),
    )):
        net, folder = tiny_net(**options), str(tmp_path / str(i))
        net.constants = dict(T=8, packing='concat', table=(1, 2))
        train_bpe(['to be or not to be'] * 9, 260, str(tmp_path / 'tokenizer.json'))
        net.tokenizer = dict(name='bpe-260', folder=str(tmp_path))
        save_pretrained(net, folder)
        again = load_pretrained(folder)
        assert again.config == net.config
        assert again.tokenizer == dict(name='bpe-260', folder=folder)
        assert again.constants == net.constants | dict(table=[1, 2])  # as JSON has it
        assert os.path.exists(os.path.join(folder, 'tokenizer.json'))
        x, sigma = torch.randint(10, (2, 12)), torch.ones(2)
        assert torch.equal(again(x, sigma), net(x, sigma))
    assert list(FAMILIES)[-1] == 'native'  # it fits every net: the others are asked first


def test_a_loaded_net_has_no_gradients_unless_asked(tiny_net, tmp_path):
    save_net(tiny_net(), tmp_path)
    save_pretrained(tiny_net(), tmp_path / 'folder')
    for source in (tmp_path, tmp_path / 'folder'):
        assert not any(p.requires_grad for p in load_pretrained(source).parameters())
        assert all(p.requires_grad for p in load_pretrained(source, trainable=True).parameters())
        assert load_pretrained(source)(torch.zeros(1, 4, dtype=torch.int64)).grad_fn is None


def test_rows_cut_in_groups_are_the_rows_of_each_group(rows):
    whole = rows('concat')
    one = TokenRows(os.path.dirname(whole.name), 'validation', 16, 'concat', grouping=10 ** 6)
    assert np.array_equal(one[:]['x0'], whole[:]['x0'])
