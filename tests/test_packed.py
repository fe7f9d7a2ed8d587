"""Rows of several documents, and the quality of samples at evaluations."""

import json
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import model
from data import TokenRows, get_tokenizer
from eval import generative_perplexity, nelbo, without_special
from model import corrupt_batch, loglinear, per_token_loss

SHAPE = [
    '--tokenizer=bytes', '--n_layer=1', '--n_head=2', '--n_embd=32', '--block_size=64',
    '--batch_size=4', '--global_batch_size=8', '--max_iters=4', '--eval_interval=2',
    '--eval_iters=1', '--log_interval=1', '--device=cpu', '--dtype=float32'
]
DOCUMENTS = torch.tensor([[0] * 5 + [1] * 1 + [2] * 8 + [-1] * 2, [0] * 16, [0] * 9 + [1] * 7])


def runs(numbers):
    """(row, first, end) of each document and of the padding."""
    for i, row in enumerate(numbers.tolist()):
        cuts = [0, *(j for j in range(1, len(row)) if row[j] != row[j - 1]), len(row)]
        yield from ((i, *span) for span in zip(cuts, cuts[1:], strict=False))


def metrics(folder='out'):
    with open(f'{folder}/metrics.jsonl') as f:
        return [json.loads(line) for line in f]


# -----------------------------------------------------------------------------
# the network


@pytest.mark.parametrize(
    'family',
    [
        dict(),
        dict(causal=True, objective='ar'),
        dict(time_conditioning=True),
        dict(norm='rmsnorm', mlp='swiglu', cond_dim=0, rotary_bf16=True),
    ],
)
def test_a_packed_row_gives_what_each_document_gives_alone(tiny_net, family):
    net = tiny_net(**family)
    x = torch.randint(0, 10, DOCUMENTS.shape)
    sigma = torch.tensor([0.3, 1.0, 2.0])
    h = net.trunk(x, sigma, DOCUMENTS)
    for i, first, end in runs(DOCUMENTS):
        alone = net.trunk(x[i : i + 1, first:end], sigma[i : i + 1])
        torch.testing.assert_close(h[i : i + 1, first:end], alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(h[0, 6:14], net.trunk(x, sigma)[0, 6:14], atol=1e-3)


def test_a_mamba_net_refuses_rows_of_several_documents(tiny_net):
    net, x = tiny_net(mixer='mamba', n_head=1), torch.zeros_like(DOCUMENTS)
    with pytest.raises(ValueError, match="need a net with mixer='attention': give another packing"):
        net.trunk(x, None, DOCUMENTS)
    net.trunk(x, None, DOCUMENTS >= 0)


def test_gradients_of_a_packed_row_are_those_of_its_documents(tiny_net):
    net = tiny_net()
    x = torch.randint(0, 10, DOCUMENTS.shape)
    weight = torch.randn(*DOCUMENTS.shape, 16)
    (net.trunk(x, None, DOCUMENTS) * weight).sum().backward()
    packed = [p.grad.clone() for p in net.blocks.parameters()]
    net.zero_grad()
    for i, first, end in runs(DOCUMENTS):
        (net.trunk(x[i : i + 1, first:end]) * weight[i, first:end]).sum().backward()
    for p, grad in zip(net.blocks.parameters(), packed, strict=True):
        torch.testing.assert_close(grad, p.grad, rtol=1e-4, atol=1e-4 * float(p.grad.abs().max()))


def flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, dropout_p=0.0, causal=False):
    """The package's, in plain torch: q, k, v (tokens, H, C/H)."""
    assert cu_q.dtype == torch.int32 and torch.equal(cu_q, cu_k) and cu_q[-1] == len(q)
    assert max_q == max_k >= cu_q.diff().max() and dropout_p == 0.0
    return torch.cat(
        [
            F.scaled_dot_product_attention(
                *(x[first:end].transpose(0, 1) for x in (q, k, v)), is_causal=causal
            ).transpose(0, 1)
            for first, end in zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), strict=True)
        ]
    )


@pytest.mark.parametrize('causal', [False, True])
@pytest.mark.filterwarnings('ignore:flex_attention called without')
def test_all_ways_of_attention_within_documents_are_a_masked_softmax(causal, monkeypatch):
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(model, 'flex_attention', lambda: flex_attention)  # compiling takes long
    monkeypatch.setattr(model, 'flash_attn_varlen_func', flash_attn_varlen_func)
    q, k, v = torch.randn(3, 3, 2, 16, 16)
    mask = DOCUMENTS[:, None, :, None] == DOCUMENTS[:, None, None, :]
    if causal:
        mask = mask & torch.ones(16, 16, dtype=torch.bool).tril()
    scores = (q @ k.transpose(2, 3) / 4).masked_fill(~mask, -math.inf)
    for way in ('each', 'flex', 'flash'):
        attend, position = model.within_documents(DOCUMENTS, causal, way=way)
        found, expected = attend(q, k, v), scores.softmax(dim=3) @ v
        if way == 'flash':  # which computes nothing for padding
            expected = expected * (DOCUMENTS >= 0)[:, None, :, None]
        torch.testing.assert_close(found, expected)
        for i, first, end in runs(DOCUMENTS):
            assert position[i, first:end].tolist() == list(range(end - first))


@pytest.mark.slow  # compiles
def test_a_compiled_trunk_with_flex_attention_takes_any_documents(tiny_net, monkeypatch):
    net, x = tiny_net(n_layer=1), torch.randint(0, 10, DOCUMENTS.shape)
    several = DOCUMENTS, DOCUMENTS.flip(0), DOCUMENTS.clamp(max=1)
    within = model.within_documents
    with torch.no_grad():  # on a CPU FlexAttention has no gradient
        expected = [net.trunk(x, None, documents) for documents in several]
        monkeypatch.setattr(
            model, 'within_documents', torch.compiler.disable(partial(within, way='flex')))
        compiled = torch.compile(net.trunk)
        for documents, h in zip(several, expected, strict=True):
            torch.testing.assert_close(compiled(x, None, documents), h, rtol=1e-5, atol=1e-5)


def test_a_causal_net_does_not_score_the_first_token_of_a_document(tiny_net):
    net = tiny_net(causal=True, objective='ar')
    x0 = torch.randint(0, 10, DOCUMENTS.shape)
    inside = DOCUMENTS >= 0
    rows = dict(x0=x0, scored=inside, maskable=inside, attention_mask=DOCUMENTS)
    t = torch.zeros(3)
    batch = corrupt_batch(rows, t, net.config, loglinear, 0, torch.device('cpu'))
    loss = per_token_loss(net, x0, None, t, attention_mask=batch['attention_mask'])
    for i, first, end in runs(DOCUMENTS):
        if inside[i, first]:
            assert batch['scored'][i, first:end].tolist() == [False] + [True] * (end - first - 1)
            alone = per_token_loss(net, x0[i : i + 1, first:end], None, t[:1])
            found = (loss * batch['scored'])[i, first:end]
            torch.testing.assert_close(found, alone[0], rtol=1e-5, atol=1e-5)
        else:
            assert not batch['scored'][i, first:end].any()


# -----------------------------------------------------------------------------
# the rows


def test_best_fit_fills_rows_with_whole_documents_each_once():
    rng = np.random.default_rng(0)
    lengths = np.minimum(np.exp(rng.normal(5, 1, 3000)).astype(int) + 1, 512)
    members, starts = data.best_fit(lengths, 512)
    assert sorted(members) == list(range(3000)) and starts[-1] == 3000
    filled = np.add.reduceat(lengths[members], starts[:-1])
    assert filled.max() <= 512
    assert filled.mean() > 0.97 * 512  # in the order of the text: 0.73
    first = members[starts[:-1]]
    assert (np.diff(first) > 0).mean() > 0.99  # near the order of the text


def test_documents_longer_than_a_row_are_cut_at_every_row():
    offsets = np.array([0, 3, 15, 25, 26])
    assert data.cut_longer(offsets, 5).tolist() == [0, 3, 8, 13, 15, 20, 25, 26]
    assert data.cut_longer(offsets, 12).tolist() == offsets.tolist()


def test_packed_rows_hold_each_document_whole_and_once(mine):
    rows = TokenRows('data/mine', 'train', 64, 'documents')
    batch = rows[:]
    x0, numbers = batch['x0'], batch['attention_mask']
    inside = numbers >= 0
    for key in ('document', 'maskable', 'scored'):
        assert torch.equal(batch[key], inside)
    assert (x0[~inside] == rows.tok['pad_id']).all() and inside.sum() == len(rows.tokens)
    found = [x0[i, a:b].tolist() for i, a, b in runs(numbers) if inside[i, a]]
    whole = TokenRows('data/mine', 'train', 64, 'pad')
    theirs = [whole.document(i).tolist() for i in range(len(whole))]
    assert sorted(found) == sorted(piece for ids in theirs for piece in cut(ids, 64))
    assert len(rows) < 0.7 * len(whole)
    for i, a, _ in runs(numbers):  # counted from 0
        assert a > 0 or numbers[i, a] == 0
        assert a == 0 or not inside[i, a] or numbers[i, a] == numbers[i, a - 1] + 1


def cut(ids, length):
    return [ids[i : i + length] for i in range(0, len(ids), length)]


def test_damaged_offsets_are_refused(mine):
    offsets = np.fromfile('data/mine/train.idx', '<i8')
    offsets[3] = offsets[5]
    offsets.tofile('data/mine/train.idx')
    with pytest.raises(ValueError, match='do not rise at document 3: rebuild it'):
        TokenRows('data/mine', 'train', 64, 'documents')


def test_the_nelbo_of_packed_rows_is_that_of_padded_ones(mine, tiny_net):
    net = tiny_net(vocab_size=258, mask_id=257, block_size=128, scale=0.1)
    found = [
        nelbo(net, TokenRows('data/mine', 'validation', 128, packing, False), num_mc=64)
        for packing in ('pad', 'documents')
    ]
    assert found[0]['tokens'] == found[1]['tokens'] and found[0]['rows'] > found[1]['rows']
    for key in ('nats_per_token', 'bits_per_byte'):
        error = math.hypot(*(result[key + '_se'] for result in found))
        assert abs(found[0][key] - found[1][key]) < 4 * error


def test_berts_pieces_get_xlms_bos_and_eos(monkeypatch):
    bert = data.Tokenizer(
        'bert', data.bytes_tokenizer('').encode_batch, lambda ids: bytes(ids).decode(), 256,
        eos_id=102, bos_id=101, pad_id=0, mask_id=103)
    monkeypatch.setattr(data, 'hugging_face_tokenizer', lambda name: bert)
    tok = get_tokenizer('bert-xlm')
    assert tok.meta() == dict(
        name='bert-xlm', vocab_size=258, bos_id=256, eos_id=257, pad_id=0, mask_id=103, sha256=None)
    assert tok.encode('a [EOS]') == bert.encode('a [EOS]')
    assert tok.decode([256, *b'a', 257]) == '[BOS]a[EOS]'


# -----------------------------------------------------------------------------
# training


def test_training_on_packed_rows_learns_and_eval_measures_it_with_the_same_packing(
        mine, here, capsys):
    trained = here('train.py', '--dataset=mine', '--packing=documents', *SHAPE,
                   '--sample_at_end=False', '--warmup_iters=0', '--learning_rate=0.01')
    losses = [line['loss'] for line in metrics() if 'loss' in line]
    assert losses[-1] < losses[0] and trained['train_rows'].pack is data.document_rows
    here('eval.py', '--max_rows=4', '--num_mc=1', '--device=cpu')
    packed = TokenRows('data/mine', 'validation', 64, 'documents')[[0]]
    assert len(set(packed['attention_mask'][0].tolist())) > 2
    with open('results.jsonl') as f:
        result = json.loads(f.readline())['result']
    rows = TokenRows('data/mine', 'validation', 64, 'documents')
    chosen = np.arange(result['rows']) * len(rows) // result['rows']
    assert result['tokens'] == int(rows[chosen]['scored'].sum())


@pytest.fixture(scope='module')
def judge(tmp_path_factory):
    """A folder with a random GPT-2 of byte-level tokens."""
    import tokenizers
    import transformers

    folder = str(tmp_path_factory.mktemp('judge'))
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    base = tokenizers.Tokenizer(
        tokenizers.models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    base.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    transformers.PreTrainedTokenizerFast(tokenizer_object=base).save_pretrained(folder)
    shape = dict(vocab_size=256, n_positions=256, n_embd=16, n_layer=1, n_head=2)
    torch.manual_seed(0)
    config = transformers.GPT2Config(**shape, bos_token_id=0, eos_token_id=0)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def test_evaluations_judge_samples_and_leave_training_as_it_is(mine, here, judge, capsys):
    options = ['--dataset=mine', *SHAPE, '--sample_at_end=False', '--warmup_iters=0',
               '--learning_rate=0.02']
    here('train.py', *options, '--out_dir=plain')
    judged = here('train.py', *options, '--eval_gen_ppl=True', f'--gen_ppl_judge={judge}',
                  '--gen_ppl_samples=3')
    plain, found = metrics('plain'), metrics()
    evaluations = [line for line in found if 'val_loss' in line]
    assert len(evaluations) == 2 and not any('gen_ppl' in line for line in plain)
    for line, other in zip(found, plain, strict=True):
        for key in other.keys() - {'tokens_per_s'}:
            assert line[key] == other[key]
    texts = [without_special(text) for text in judged['texts_of_average'](3)[0]]
    expected = generative_perplexity(texts, judge, 'xlm')  # the last ones again
    for key in ('gen_ppl', 'entropy'):
        assert evaluations[1][key] == pytest.approx(expected[key], rel=1e-5)
    assert evaluations[0]['gen_ppl'] != evaluations[1]['gen_ppl']
    assert 'of 3 samples by' in capsys.readouterr().out


def test_a_judge_that_is_not_there_ends_the_run_before_it_begins(refused, mine, tmp_path):
    told = refused('train.py', '--dataset=mine', *SHAPE, '--eval_gen_ppl=True',
                   '--gen_ppl_judge=nowhere')
    assert "the judge 'nowhere' cannot be loaded" in told and not (tmp_path / 'out').exists()


@pytest.mark.slow
def test_packed_rows_hold_more_than_twice_the_tokens_of_padded_ones(run, tmp_path):
    run('tests/bench.py', '--part=packing', '--n_layer=1', '--n_head=2', '--n_embd=32',
        '--vocab_size=300', '--block_size=128', '--batch_size=2', '--dtype=float32')
    with open(tmp_path / 'bench.jsonl') as f:
        packed, *padded = [json.loads(line) for line in f]
    assert packed['name'] == 'documents' and [row['name'] for row in padded] == ['pad', 'pad']
    assert packed['filled'] > 0.97 and all(packed['filled'] > 2 * row['filled'] for row in padded)
    assert packed['useful_tokens_per_s'] > 0
