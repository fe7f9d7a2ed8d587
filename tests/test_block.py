"""Block diffusion (BD3-LM: Arriola et al. 2025, arXiv 2503.09573): autoregressive over blocks,
masked diffusion within one."""

import itertools
import json
import math
import os

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import model
from eval import continuation_nll, nelbo
from model import (
    KVCache, ModelConfig, corrupt_batch, load_pretrained, loglinear, per_token_loss, save_pretrained
)
from reference import Says, chain, masked_positions, revealing
from sample import generate
from test_samplers import ancestral_rule, counts_at, fits, net_of  # noqa: F401 (a fixture)

M = 3  # the mask of net_of's nets, which have three tokens
GOLDEN = os.path.join(os.path.dirname(__file__), 'golden')
FAMILIES = [dict(), dict(norm='rmsnorm', mlp='swiglu', cond_dim=0, rotary_bf16=True)]


class Rows:
    """Rows of ids (n, L) as data.TokenRows gives them."""

    def __init__(self, x0, maskable=None):
        self.x0 = x0
        self.maskable = torch.ones_like(x0, dtype=torch.bool) if maskable is None else maskable
        self.counts = dict(tokens=1, bytes=1)

    def __len__(self):
        return len(self.x0)

    def __getitem__(self, index):
        x0, maskable = self.x0[index], self.maskable[index]
        every = torch.ones_like(maskable)
        return dict(
            x0=x0, maskable=maskable, scored=maskable, document=every, attention_mask=every)


def nll_of(net, seen, x0):
    """-log p(x0 | seen) of each position (B, L), the mask excluded, without a cache."""
    logits = net(seen).double()
    logits[:, :, net.config.mask_id] = -torch.inf
    return F.cross_entropy(logits.transpose(1, 2), x0, reduction='none')


def given(x0, begin, noised):
    """Rows up to the end of a block: the clean tokens before it, and what is noised of it."""
    return torch.cat((x0[:, :begin], noised), dim=1)


# -----------------------------------------------------------------------------
# the network


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('width', [1, 4, 16])
def test_one_pass_gives_what_each_block_gives_after_the_clean_ones(tiny_net, family, width):
    net = tiny_net(block_length=width, **family)
    x0 = torch.randint(0, 10, (3, 16))
    xt = torch.where(torch.rand(3, 16) < 0.5, 10, x0)
    weight = torch.randn(3, 16, 16)
    h = net.trunk(xt, x0=x0)
    (h * weight).sum().backward()
    grads = [p.grad.clone() for p in net.blocks.parameters()]
    net.zero_grad()
    for begin in range(0, 16, width):
        span = slice(begin, begin + width)
        alone = net.trunk(given(x0, begin, xt[:, span]))[:, -width:]
        torch.testing.assert_close(h[:, span], alone, rtol=1e-5, atol=1e-5)
        (alone * weight[:, span]).sum().backward()
    for p, grad in zip(net.blocks.parameters(), grads, strict=True):
        torch.testing.assert_close(grad, p.grad, rtol=1e-4, atol=1e-4 * float(p.grad.abs().max()))
    with torch.no_grad():  # what a block looks at does count
        assert width == 16 or not torch.allclose(h, net.trunk(xt, x0=xt), atol=1e-3)


@pytest.mark.filterwarnings('ignore:flex_attention called without')
@pytest.mark.parametrize('twice', [True, False])
def test_all_ways_of_attention_in_blocks_are_a_masked_softmax(twice, monkeypatch):
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(model, 'flex_attention', lambda: flex_attention)  # compiling takes long
    length, width, reach = 150 if not twice else 144, 6, 48
    config = ModelConfig(block_size=reach, block_length=width)
    n = length * (2 if twice else 1)

    def looks(i, j):
        block_i, block_j = i % length // width, j % length // width
        if j < length:  # clean
            last = block_i if i < length else block_i - 1
            return block_i - reach // width < block_j <= last
        return i >= length and block_i == block_j

    mask = torch.tensor([[looks(i, j) for j in range(n)] for i in range(n)])
    inside = torch.arange(length) < torch.tensor([[length], [length - 20]])
    q, k, v = torch.randn(3, 2, 2, n, 16)
    for attention_mask in (None, inside):
        seen = mask
        if attention_mask is not None:
            seen = mask & attention_mask.repeat(1, n // length)[:, None, None]
        scores = (q @ k.transpose(2, 3) / 4).masked_fill(~seen, -1e9)
        for way in ('each', 'flex'):
            attend = model.within_blocks(
                config, length, torch.zeros(2, n), attention_mask, way=way)
            found = attend(q, k, v).unflatten(2, (-1, length))[:, :, :, :length - 20]
            expected = (scores.softmax(dim=3) @ v).unflatten(2, (-1, length))
            torch.testing.assert_close(found, expected[:, :, :, :length - 20])


@pytest.mark.slow  # compiles
def test_a_compiled_trunk_takes_both_halves(tiny_net):
    net = tiny_net(n_layer=1, block_length=4)
    x0, xt = torch.randint(0, 11, (2, 3, 16))
    compiled = torch.compile(net.trunk)
    h, expected = compiled(xt, x0=x0), net.trunk(xt, x0=x0)
    torch.testing.assert_close(h, expected, rtol=1e-5, atol=1e-5)
    grads = [torch.autograd.grad(y.sum(), net.wte.weight)[0] for y in (h, expected)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_padding_changes_nothing(tiny_net):
    net = tiny_net(block_length=4)
    x0 = torch.randint(0, 10, (2, 16))
    xt = torch.where(torch.rand(2, 16) < 0.5, 10, x0)
    inside = torch.arange(16) < torch.tensor([[16], [7]])
    h = net.trunk(xt, None, inside, x0=x0)
    alone = net.trunk(xt[1:, :7], x0=x0[1:, :7])
    torch.testing.assert_close(h[1:, :7], alone, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize('family', FAMILIES)
def test_cached_logits_are_those_without_a_cache(tiny_net, family):
    net = tiny_net(block_length=4, **family)
    x = torch.randint(0, 10, (3, 40))  # two and a half times what the net was trained on
    clean = net(x)
    for first in (0, 4, 24):  # of a prompt, longer than block_size too
        cache = KVCache(3, 16, 4)
        cache.slots = torch.tensor([2, 0])
        if first:
            net.trunk(x[[2, 0], :first], cache=cache)
        for begin in range(first, 40, 4):
            cache.begin(torch.full((2,), begin), 4, x.device)
            block = x[[2, 0], begin:begin + 4]
            for seen in (block.masked_fill(torch.rand(2, 4) < 0.5, 10), block):
                whole = given(x[[2, 0]], begin, seen)
                found = net.head(net.trunk(seen, cache=cache))
                torch.testing.assert_close(found, net(whole)[:, -4:], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(found, clean[[2, 0], begin:begin + 4], rtol=1e-5, atol=1e-5)


# -----------------------------------------------------------------------------
# the bound


@torch.no_grad()
def test_with_blocks_of_one_token_the_bound_is_the_exact_likelihood(tiny_net):
    net = tiny_net(block_length=1)
    x0 = torch.randint(0, 10, (5, 16))
    nll = [nll_of(net, given(x0, i, torch.full((5, 1), 10)), x0[:, :i + 1])[:, i]
           for i in range(16)]
    for seed in (0, 1):
        found = nelbo(net, Rows(x0), seed=seed)
        assert found['estimator'] == 'count'
        assert found['nats_per_token'] == pytest.approx(float(torch.stack(nll).mean()), rel=1e-6)
    kept = slice(3, None)  # of a causal net's table: every token given those before it, exactly
    answer = continuation_nll(net, x0[0, :3], x0[0, kept])
    assert answer == pytest.approx(float(torch.stack(nll)[kept, 0].sum()), rel=1e-6)


def test_with_one_block_the_bound_and_the_samples_are_those_of_mdlm(tiny_net):
    net, mdlm = tiny_net(block_length=16), tiny_net()
    rows = Rows(torch.randint(0, 10, (7, 16)))
    for options in (dict(), dict(estimator='time'), dict(T=5)):
        found, expected = (nelbo(each, rows, num_mc=3, **options) for each in (net, mdlm))
        assert found['nats_per_token'] == expected['nats_per_token']
    for rule in ('ancestral', 'fixed', 'remdm', 'low_confidence'):
        a = generate(net, 5, None, 8, None, rule=rule, prompt=[1, 2], cfg_scale=0.5, eos_id=-1)
        b = generate(mdlm, 5, None, 8, rule, prompt=[1, 2], cfg_scale=0.5)
        for key in ('tokens', 'nfe', 'reveal_step', 'length'):
            assert torch.equal(getattr(a, key), getattr(b, key)), (rule, key)


def enumerated_bound(net, x0, maskable, width):
    """NELBO in nats of one row (1, L), over all that can be masked: of the n maskable tokens of a
    block k, uniform in 1 ... n, with the weight n / k."""
    total = 0.0
    for begin in range(0, x0.size(1), width):
        before = x0[:, :begin + width]
        cols = [i for i in range(begin, before.size(1)) if maskable[0, i]]
        for k in range(1, len(cols) + 1):
            for masked in itertools.combinations(cols, k):
                seen = before.clone()
                seen[0, list(masked)] = M
                nats = nll_of(net, seen, before)[0, list(masked)].sum().item()
                total += nats / k / math.comb(len(cols), k)
    return total


@torch.no_grad()
def test_the_bound_by_blocks_is_its_enumeration(net_of):  # noqa: F811
    net = net_of(block_length=3, block_size=9)
    x0 = torch.tensor([[0, 1, 2, 2, 0, 1, 1, 1]])  # the last block has two tokens
    maskable = torch.arange(8)[None] > 0
    exact = enumerated_bound(net, x0, maskable, 3)
    rows = Rows(x0.repeat(2000, 1), maskable.repeat(2000, 1))
    for options in (dict(), dict(estimator='time'), dict(T=1000)):
        found = nelbo(net, rows, batch_size=500, **options)
        low = 1e-3 * (options == dict(estimator='time'))  # eps, see eval.py
        error = 4 * found['nats_per_token_se'] * 7
        assert found['nats_per_token'] * 7 == pytest.approx(exact * (1 - low), abs=error), options


@torch.no_grad()
def test_the_bound_is_no_less_than_the_likelihood_of_the_process(net_of):  # noqa: F811
    net = net_of(block_length=2)
    says = Says(net)

    def one_at_a_time(i, state):
        end = 2 * (i // 2 + 1)
        tokens, positions = says.tokens(state[:end]), masked_positions(state[:end], M)
        for j in positions:
            for following, mass in revealing(state, [j], tokens):
                yield following, mass / len(positions)

    exact = chain((M,) * 4, 4, one_at_a_time)
    for text in ((0, 1, 2, 0), (2, 2, 2, 2), (1, 0, 1, 1)):
        x0 = torch.tensor([text])
        bound = enumerated_bound(net, x0, x0 < M, 2)
        assert 0 < bound + math.log(exact[text]) < 1


def test_each_block_has_a_time(tiny_net):
    config = tiny_net(block_length=4).config
    t = torch.tensor([[0.0, 1.0, 0.5, 0.2]]).repeat(400, 1)
    rows = Rows(torch.zeros(400, 16, dtype=torch.int64))[torch.arange(400)]
    for exactly in (False, True):
        batch = corrupt_batch(rows, t, config, loglinear, 0, torch.device('cpu'), exactly=exactly)
        assert torch.equal(batch['t'], t.repeat_interleave(4, dim=1))
        masked = (batch['xt'] == 10).float().view(400, 4, 4).mean(dim=2)
        share = torch.tensor([0.0, 1.0, 0.5, 0.25 if exactly else 0.2])
        torch.testing.assert_close(masked.mean(dim=0), share, atol=0.05, rtol=0)
        if exactly:
            assert (masked == share).all()


def test_a_loss_has_the_weight_of_its_own_time(tiny_net):
    net = tiny_net(block_length=4)
    x0 = torch.randint(0, 10, (2, 16))
    t = torch.rand(2, 16).clamp(min=0.1)
    every = torch.full_like(x0, 10)
    loss = per_token_loss(net, x0, every, t)
    for begin in range(0, 16, 4):
        nll = nll_of(net, given(x0, begin, every[:, :4]), x0[:, :begin + 4])[:, begin:]
        span = slice(begin, begin + 4)
        torch.testing.assert_close(loss[:, span], (nll / t[:, span]).float(), rtol=1e-4, atol=1e-5)


# -----------------------------------------------------------------------------
# the sampler


def in_blocks(width, steps):
    """What the net sees in each step: up to the end of the block."""
    return lambda i: (0, width * (i // steps + 1))


@pytest.mark.parametrize(
    'width, steps', [(1, 1), (2, 3), *(pytest.param(*each, marks=pytest.mark.slow)
                                       for each in ((2, 1), (4, 2)))])
def test_block_sampler_is_the_enumerated_process(net_of, width, steps):  # noqa: F811
    net = net_of(block_length=width)
    rule = ancestral_rule(Says(net), steps, window=in_blocks(width, steps))
    start = (M, M, 1, M, M)  # a template; the last block is cut off
    fits(chain(start, steps * -(-5 // width), rule), net, start, steps, 'block')


@pytest.mark.parametrize(
    'options', [dict(cfg_scale=0.7, top_k=2), pytest.param(dict(), marks=pytest.mark.slow)])
def test_beyond_block_size_and_with_a_prompt_and_guidance(net_of, options):  # noqa: F811
    net = net_of(block_length=2, block_size=4)
    start = (0, 2, 1, M, M, M, M)
    says = Says(net, given=[0, 1, 2], **options)
    rule = ancestral_rule(says, 2, window=in_blocks(2, 2))
    fits(chain(start, 8, rule), net, start, 2, 'block', **options)


def test_any_rule_in_blocks(net_of):  # noqa: F811
    net = net_of(block_length=3, block_size=9)
    says = Says(net)

    def rule(i, state):
        end = 3 * (i // 2 + 1)
        positions = masked_positions(state[:end], M)
        belief = says.belief(state[:end])
        ranked = sorted(positions, key=lambda j: -max(belief[j][:M]))
        count = counts_at(i % 2, 2, len(positions))
        return revealing(state, ranked[:count], says.tokens(state[:end]))

    start, exact = (M,) * 6, chain((M,) * 6, 4, rule)
    options = dict(rule='fixed', rule_options=dict(confidence='top_prob'))
    fits(exact, net, start, 2, 'block', **options)
    text = torch.tensor(list(itertools.product(range(M), repeat=6)))
    out = generate(net, len(text), 6, 2, 'block', text=text, batch_size=100, **options)
    for row, log_prob in zip(text.tolist(), out.log_prob.sum(dim=1).tolist(), strict=True):
        assert math.exp(log_prob) == pytest.approx(exact[tuple(row)], rel=1e-4)
    assert out.log_prob.sum(dim=1).exp().sum() == pytest.approx(1, abs=1e-6)
    assert (out.nfe == 5).all()  # two steps a block, and one to remember the first


@pytest.mark.slow
def test_a_benchmark_of_blocks(here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here('tests/bench.py', '--part=block', '--n_layer=1', '--n_head=2', '--n_embd=32',
         '--vocab_size=100', '--block_size=64', '--dtype=float32')
    with open('bench.jsonl') as f:
        rows = [json.loads(line) for line in f]
    assert [(row['name'], row['tokens']) for row in rows] == [
        *(('block', n) for n in (16, 32, 64, 128, 256)), ('ancestral', 64), ('ar', 64)]
    assert all(0 < row['nfe_per_token'] <= 1.07 and row['tokens_per_s'] > 0 for row in rows)


def test_rows_of_all_lengths_and_prompts_are_as_alone(tiny_net):
    net = tiny_net(block_length=4)
    length, prompt = [40, 3, 17, 9], [[1, 2, 3], [4], [5, 6, 7, 8, 9, 1, 2], [1, 2, 3, 4]]
    for options in (dict(), dict(cfg_scale=0.5), dict(rule='low_confidence'), dict(eos_id=7)):
        together = generate(net, 4, length, 8, 'block', prompt=prompt, batch_size=3, **options)
        for i in range(4):
            alone = generate(
                net, 1, length[i], 8, 'block', prompt=prompt[i], first_row=i, **options)
            n = alone.length[0]
            assert together.length[i] == n and together.nfe[i] == alone.nfe[0]
            assert together.tokens[i, :n].tolist() == alone.tokens[0, :n].tolist()
            assert together.reveal_step[i, :n].tolist() == alone.reveal_step[0, :n].tolist()


def test_a_row_ends_with_its_first_eos_behind_what_is_given(tiny_net):
    net = tiny_net(block_length=4)
    free = generate(net, 6, 24, 4, 'block')
    ended = generate(net, 6, 24, 4, 'block', eos_id=7)
    for a, b, n in zip(free.tokens.tolist(), ended.tokens.tolist(), ended.length, strict=True):
        assert n == (a.index(7) + 1 if 7 in a else 24)
        assert a[:n] == b[:n] and not any(b[n:])  # padding is 0 where no tokenizer tells
    assert (ended.length < 24).any() and (ended.nfe < free.nfe).any()
    assert generate(net, 1, 3, 4, 'block', prompt=[1, 2, 3]).tokens.tolist() == [[1, 2, 3]]
    template = [-1] * 12 + [3] + [-1] * 3
    filled = generate(net, 6, None, 4, 'block', template=template, eos_id=7)
    assert (filled.length >= 13).all() and (filled.tokens[:, 12] == 3).all()


def test_the_cache_saves_evaluations_of_earlier_blocks(tiny_net, monkeypatch):
    net, seen = tiny_net(block_length=4), []
    trunk = net.trunk
    monkeypatch.setattr(net, 'trunk', lambda x, *args, **options: (
        seen.append(x.shape), trunk(x, *args, **options))[1])
    out = generate(net, 1, 64, 4, 'block', prompt=[1] * 30)
    assert seen[0] == (1, 28) and set(seen[1:]) == {(1, 4)}
    assert len(seen) == out.nfe[0]


def test_events_of_a_row_are_told_in_its_own_positions_and_steps(tiny_net):
    net, events, finished = tiny_net(block_length=4), [], []
    out = generate(
        net, 2, 16, 4, 'block', prompt=[1, 2],
        on_change=lambda *columns: events.extend(
            zip(*(x.tolist() for x in columns), strict=True)),
        on_finish=lambda i, ids, nfe: finished.append((i, ids, nfe)))
    final = {(row, col): (i, step) for row, col, i, _, step in events if step >= 0}
    assert len(final) == 2 * 14
    for (row, col), (i, step) in final.items():
        assert out.tokens[row, col] == i and out.reveal_step[row, col] == step
        assert col // 4 == step // 4
    assert finished == [(i, out.tokens[i].tolist(), out.nfe[i]) for i in range(2)]


# -----------------------------------------------------------------------------
# published weights, scripts, bad input


def published(folder, net):
    """net in the layout of kuleshov-group/bd3lm-owt-block_size4."""
    save_pretrained(net, folder)
    tensors = load_file(f'{folder}/model.safetensors')
    for name, value in (('min', 1e-3), ('max', 0.999)):
        tensors[f'sampling_eps_{name}'] = torch.tensor(value)
    save_file(tensors, f'{folder}/model.safetensors')
    config = dict(
        architectures=['BD3LM'], model_type='bd3lm', attn_backend='sdpa', cross_attn=True,
        block_size=4, model_length=16, hidden_dim=16, cond_dim=8, n_blocks=2, n_heads=2,
        dropout=0.1, sampling_eps_min=0.001, sampling_eps_max=0.999, time_conditioning=False,
        var_min=True, vocab_size=11, torch_dtype='float32', return_dict=False)
    with open(f'{folder}/config.json', 'w') as f:
        json.dump(config, f)


def test_published_weights_are_read(tiny_net, tmp_path):
    net = tiny_net(block_length=4)
    published(tmp_path, net)
    read = load_pretrained(tmp_path)
    assert (read.config.block_length, read.config.block_size) == (4, 16)
    assert read.constants['first_given'] and read.constants['packing'] == 'concat'
    names = [name for name, _ in read.named_parameters()]
    assert names == [name for name, _ in net.named_parameters()]
    x = torch.randint(0, 11, (2, 16))
    torch.testing.assert_close(read(x), net(x), rtol=1e-5, atol=1e-5)
    lone = load_pretrained(tmp_path / 'model.safetensors', block_length=8, n_head=2, block_size=16)
    assert lone.config.block_length == 8
    save_pretrained(read, tmp_path / 'again')
    again = load_pretrained(tmp_path / 'again')
    assert again.config == read.config and torch.equal(again(x), read(x))


def test_mdlm_weights_are_fine_tuned_in_blocks(tmp_path):
    mdlm = load_pretrained(f'{GOLDEN}/mdlm_hf')
    net = load_pretrained(f'{GOLDEN}/mdlm_hf', block_length=mdlm.config.block_size // 4)
    for a, b in zip(mdlm.parameters(), net.parameters(), strict=True):
        assert torch.equal(a, b)
    assert net.config.block_length and not mdlm.config.block_length


SHAPE = [
    '--dataset=mine', '--n_layer=1', '--n_head=2', '--n_embd=32', '--block_size=32',
    '--batch_size=4', '--global_batch_size=8', '--eval_interval=2', '--eval_iters=1',
    '--log_interval=1', '--device=cpu', '--dtype=float32', '--sample_at_end=False'
]


def test_training_resuming_sampling_and_measuring(mine, here, capsys):
    train = [*SHAPE, '--block_length=8', '--t_range=(0.3, 0.8)', '--first_given=True']
    here('train.py', *train, '--max_iters=4', '--out_dir=whole')
    here('train.py', *train, '--max_iters=2', '--out_dir=parts')
    here('train.py', *train, '--max_iters=4', '--out_dir=parts', '--init_from=resume')
    whole, parts = (torch.load(f'{name}/ckpt.pt')['model'] for name in ('whole', 'parts'))
    for name in whole:
        assert torch.equal(whole[name], parts[name])
    here('sample.py', '--out_dir=whole', '--num_samples=2', '--length=80', '--steps=8',
         '--rule=fixed', "--rule_options={'confidence': 'top_prob'}", '--out=samples.jsonl')
    bos = load_pretrained('whole').tokenizer['meta']['bos_id']
    with open('samples.jsonl') as f:
        assert [json.loads(line)['ids'][0] for line in f] == [bos] * 2  # which was always given
    found = here('eval.py', '--out_dir=whole', '--device=cpu')
    assert found is not None
    with open('results.jsonl') as f:
        result = json.loads(f.readlines()[-1])['result']
    rows = result['rows']
    assert result['tokens'] == rows * 31 and 1 < result['nats_per_token'] < 7
    here('eval.py', '--out_dir=whole', '--device=cpu', '--estimator=duel', '--steps=4',
         '--rule=fixed', "--rule_options={'confidence': 'top_prob'}", '--max_rows=4')
    assert 'by block in 4 steps' in capsys.readouterr().out


def test_times_are_within_their_range(mine, here):
    script = here('train.py', *SHAPE, '--block_length=8', '--t_range=(0.3, 0.8)', '--max_iters=1',
                  '--batch_size=8')
    for sampling in ('stratified', 'per_process', 'iid'):
        script['times_of'].__globals__['time_sampling'] = sampling
        t = torch.stack([script['times_of'](step, 0) for step in range(50)])
        assert t.shape == (50, 8, 4) and 0.3 <= t.min() < 0.32 and 0.78 < t.max() <= 0.8
        if sampling != 'iid':  # one in each of 32 strata of a step
            gaps = t.flatten(1).sort(dim=1).values.diff(dim=1)
            assert gaps.max() < 2 * 0.5 / 32 + 1e-6


@pytest.mark.parametrize(
    'fields, message',
    [
        (dict(block_length=5), 'a divisor of block_size=16'),
        (dict(block_length=0), 'a divisor of block_size=16'),
        (dict(block_length=4, causal=True, objective='ar'), 'with objective subs'),
        (dict(block_length=4, objective='mlm'), 'with objective subs'),
        (dict(block_length=4, time_conditioning=True), 'no time_conditioning'),
        (dict(block_length=4, mixer='mamba', n_head=1), 'subs, attention'),
    ],
)
def test_bad_configurations(tiny_net, fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_net(**fields)


def test_bad_requests(tiny_net, refused):
    net, plain = tiny_net(block_length=4), tiny_net()
    for options, message in (
        (dict(sampler='ancestral'), 'subs with block_length, there is block'),
        (dict(rule='nothing'), "sampler 'nothing' is not known"),
        (dict(rule='ar'), "sampler 'ar' takes nets of the objectives ar"),
        (dict(rule_options=dict(stride=1)), "stride does not go with sampler 'ancestral'"),
        (dict(rule_options=3), 'it must be a dict'),
        (dict(eos_id=99), 'it must be an id below 11'),
        (dict(compile=True), "it must be False for sampler 'block'"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(net, 1, 8, 4, **dict(sampler='block') | options)
    with pytest.raises(ValueError, match='takes nets of the objectives subs with block_length'):
        generate(plain, 1, 8, 4, 'block')
    with pytest.raises(ValueError, match='do not go with block_length: give another packing'):
        net.trunk(torch.zeros(1, 16, dtype=torch.int64), None, torch.zeros(1, 16, dtype=int))
    with pytest.raises(ValueError, match='choose chain_rule or duel'):
        continuation_nll(net, [1], [2], 'monte_carlo')
    with pytest.raises(ValueError, match='gives no exact likelihood'):
        generate(net, 1, 8, 4, 'block', text=torch.ones(1, 8, dtype=torch.int64))
    for t_range in ((0.8, 0.3), (0.2, 1.5), (0.5,), (), ('a', 1), (True, 1)):
        error = refused('train.py', '--dataset=stdlib', f'--t_range={t_range}')
        assert error.count('\n') == 1 and f't_range={t_range}: (least, most)' in error


def test_a_dropped_prompt_is_dropped_from_the_context_too(tiny_net):
    config = tiny_net(block_length=4).config
    x0 = torch.randint(0, 10, (3, 16))
    answer = torch.arange(16).repeat(3, 1) >= 6
    t = torch.full((3, 4), 0.5)
    batch = corrupt_batch(
        Rows(x0, answer)[[0, 1, 2]], t, config, loglinear, 0, torch.device('cpu'),
        drop_prompt=True)
    for name in ('x0', 'xt'):
        assert (batch[name][:, :6] == 10).all()
    assert torch.equal(batch['x0'][:, 6:], x0[:, 6:])
    assert (batch['masked'] % 16 >= 6).all()
