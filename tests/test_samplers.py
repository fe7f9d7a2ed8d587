"""Every sampler of sample.py against its exact distribution on tiny vocabularies, enumerated with
tests/reference.py."""

import collections
import itertools
import json
import math
import os

import pytest
import torch
from safetensors.torch import load_file

import reference
from model import load_pretrained, loglinear
from reference import (
    Says, chain, independently, masked_positions, reveal_each_with, revealing, subsets
)
from sample import analytic_probs, denoiser_probs, generate
from test_sample import chi_square_p, counts_of

GOLDEN = os.path.join(os.path.dirname(__file__), 'golden')
M, N = 3, 20_000


@pytest.fixture
def net_of(tiny_net):
    """A function that makes a net of three tokens and a mask. Its answers depend on every token and
    its place, and are not too sure."""

    def make(**options):
        net = tiny_net(
            **dict(
                block_size=8, vocab_size=4, mask_id=M, n_layer=2, n_head=2, n_embd=16, cond_dim=4,
                scale=0.5
            )
            | options
        )
        with torch.no_grad():
            for block in net.blocks:
                block.attn_qkv.weight *= 0.5
                block.attn_out.weight *= 3
            h = net.trunk(
                torch.arange(4**3)[:, None] // torch.tensor([16, 4, 1]) % 4, torch.full((64,), 0.7)
            )
            net.lm_head.weight *= 0.9 / (h @ net.lm_head.weight.T).std()
            net.lm_head.bias *= 0.3
        return net

    return make


def fits(exact, net, start, steps, sampler, n=N, **options):
    """Do n samples fit the exact distribution (dict of state -> probability)? start: template."""
    assert abs(sum(exact.values()) - 1) < 1e-6 and not any(M in state for state in exact)
    out = generate(net, n, len(start), steps, sampler, template=start, batch_size=12_500, **options)
    p = chi_square_p(
        counts_of(out.tokens), {state: mass for state, mass in exact.items() if mass > 0}, n
    )
    assert p > 1e-3, p
    return out


def mask_prob(t, schedule=loglinear):
    return 1 - schedule.alpha(torch.tensor(t, dtype=torch.float64)).item() if t else 0.0


def ancestral_rule(says, steps, schedule=loglinear, conditioned=False, window=None):
    t = [1 - i / steps for i in range(steps)] + [0]
    return reveal_each_with(
        lambda i: 1 - mask_prob(t[i % steps + 1], schedule) / mask_prob(t[i % steps], schedule),
        says,
        (lambda i: float(schedule.sigma(torch.tensor(t[i % steps])))) if conditioned else None,
        window,
    )


# --- ancestral, with all that goes across samplers


def all_pairs(many, few):
    """For parametrize. Slow, but for one pair of each of `many`, which take `few` in turn."""
    return [
        pytest.param(a, b, marks=[] if i % len(few) == j else pytest.mark.slow)
        for i, a in enumerate(many)
        for j, b in enumerate(few)
    ]


OPTIONS = [
    dict(),
    dict(top_p=0.9),
    dict(top_k=2),
    dict(temperature=0.6),
    dict(cfg_scale=0.7),
    dict(cfg_scale=-0.5, temperature=1.3, top_k=2),
]
TEMPLATES = [(M, M, M), (1, M, M), (0, M, 2, M)]


@pytest.mark.parametrize('options, template', all_pairs(OPTIONS, TEMPLATES))
def test_ancestral_with_options_prompts_and_templates(net_of, template, options):
    net = net_of()
    says = Says(net, given=[i for i, token in enumerate(template) if token != M], **options)
    fits(chain(template, 3, ancestral_rule(says, 3)), net, template, 3, 'ancestral', **options)


def test_ancestral_takes_the_dense_step_for_d3pm_nets(net_of):
    net, steps = net_of(objective='d3pm', time_conditioning=True), 4
    t = [1 - i / steps for i in range(steps)] + [0]

    def rule(i, state):
        m_t, m_s = mask_prob(t[i]), mask_prob(t[i + 1])
        p = (
            net(torch.tensor([state]), loglinear.sigma(torch.tensor([t[i]])))[0]
            .double()
            .softmax(dim=-1)
            .tolist()
        )
        choices = {}
        for j in masked_positions(state, M):
            reveal = {v: p[j][v] * (m_t - m_s) for v in range(M)}
            stay = m_s if i < steps - 1 else 0.0
            total = sum(reveal.values()) + stay
            choices[j] = [(M, stay / total)] + [(v, q / total) for v, q in reveal.items()]
        return independently(state, choices)

    exact = chain((M, 1, M), steps, rule)
    fits(exact, net, (M, 1, M), steps, 'ancestral')
    says = Says(net)
    fits(
        chain((M, 1, M), steps, ancestral_rule(says, steps, conditioned=True)),
        net,
        (M, 1, M),
        steps,
        'ancestral',
        subs_masking=True,
    )


def test_ancestral_in_many_steps_is_first_hitting(net_of):
    for net in (net_of(), net_of(time_conditioning=True)):
        many, hitting = (
            generate(net, 30_000, 3, 3000, sampler, seed=seed, batch_size=10_000).tokens
            for seed, sampler in enumerate(('ancestral', 'first_hitting'))
        )
        a, b = counts_of(many), counts_of(hitting)
        both = {state: (a[state] + b[state]) for state in a | b}
        # two samples of one size
        statistic = sum((a[state] - b[state]) ** 2 / (a[state] + b[state]) for state in both)
        assert (
            torch.special.gammaincc(
                torch.tensor((len(both) - 1) / 2), torch.tensor(statistic / 2)
            ).item()
            > 1e-3
        )


def test_first_hitting_takes_positions_in_random_order(net_of):
    net = net_of()
    says = Says(net)

    def rule(i, state):
        positions = masked_positions(state, M)
        for j in positions:
            for following, mass in revealing(state, [j], says.tokens(state)):
                yield following, mass / len(positions)

    out = fits(chain((M, 2, M, M), 3, rule), net, (M, 2, M, M), 1, 'first_hitting')
    assert (out.nfe == 3).all()
    assert all(sorted(row) == [-1, 0, 1, 2] for row in out.reveal_step.tolist()[:50])


# --- analytic


def analytic_exact(net, template, steps):
    """Densely, from analytic_probs and denoiser_probs, which the vectors below check."""
    times = [1 - i / steps * (1 - 1e-5) for i in range(steps + 1)]

    def rule(i, state):
        x, t = torch.tensor([state]), torch.tensor([times[i]], dtype=torch.float64)
        p = (
            (
                analytic_probs(net, x, t, times[i] - times[i + 1])
                if i < steps
                else denoiser_probs(net, x, t)
            )[0]
            .double()
            .clamp(min=0)
        )
        return independently(
            state, {j: list(enumerate((p[j] / p[j].sum()).tolist())) for j in range(len(state))}
        )

    return chain(template, steps + 1, rule)


@pytest.mark.parametrize('objective', ['subs', 'sedd'])
def test_analytic_sampler_draws_from_its_probabilities(net_of, objective):
    net = net_of(objective=objective, time_conditioning=objective == 'sedd')
    fits(analytic_exact(net, (M, M, 1), 4), net, (M, M, 1), 4, 'analytic')


def test_analytic_probabilities_match_the_released_code():
    expected = load_file(f'{GOLDEN}/mdlm_expected.safetensors')
    meta = json.load(open(f'{GOLDEN}/mdlm_meta.json'))
    xt, t = expected['xt'], expected['t']
    for objective in ('subs', 'sedd'):
        net = load_pretrained(
            f'{GOLDEN}/mdlm_hf', objective=objective, time_conditioning=objective == 'sedd'
        )
        torch.testing.assert_close(
            analytic_probs(net, xt, t, meta['dt']),
            expected[f'analytic_probs_{objective}'],
            atol=1e-5,
            rtol=1e-5,
        )
        torch.testing.assert_close(
            denoiser_probs(net, xt, t),
            expected[f'denoiser_probs_{objective}'],
            atol=1e-5,
            rtol=1e-5,
        )
    net, rows = load_pretrained(f'{GOLDEN}/mdlm_hf'), []
    for i in range(len(xt)):
        q = reference.reverse_probs(net, xt[i : i + 1], t[i], t[i] - meta['dt'], loglinear)
        rows.append(q)
    ddpm = expected['ddpm_probs'] / expected['ddpm_probs'].sum(dim=-1, keepdim=True)
    masked = xt == net.config.mask_id  # the released code copies the rest afterwards
    torch.testing.assert_close(torch.cat(rows)[masked], ddpm[masked], atol=1e-5, rtol=1e-4)


# --- fixed


def counts_at(i, steps, masked):
    return masked if i == steps - 1 else masked // (steps - i)


@pytest.mark.parametrize('steps', [1, 2, 3, 5])
def test_fixed_uniform(net_of, steps):
    net = net_of()
    says = Says(net, top_p=0.9)

    def rule(i, state):
        positions = masked_positions(state, M)
        for chosen, probability in subsets(positions, counts_at(i, steps, len(positions))):
            for following, mass in revealing(state, chosen, says.tokens(state)):
                yield following, mass * probability

    fits(chain((M, M, 1, M), steps, rule), net, (M, M, 1, M), steps, 'fixed', top_p=0.9)


SCORES = {
    'top_prob': max,
    'prob_diff': lambda p: sorted(p)[-1] - sorted(p)[-2],
    'entropy': lambda p: sum(x * math.log(x) for x in p if x),
}


REVEALING = [dict(), dict(confidence_temperature=0.5), dict(threshold=0.5), dict(threshold=1.1)]


@pytest.mark.parametrize('options, confidence', all_pairs(REVEALING, list(SCORES)))
def test_fixed_by_confidence(net_of, confidence, options):
    net = net_of()
    steps = 3
    template = (M, 0, M, M, M)
    says = Says(net)

    def rule(i, state):
        positions = masked_positions(state, M)
        score = {j: SCORES[confidence](says.belief(state)[j][:M]) for j in positions}
        ranked = sorted(positions, key=lambda j: -score[j])
        assert min([score[a] - score[b] for a, b in itertools.pairwise(ranked)] or [1]) > 1e-6, (
            'ties: rounding would decide'
        )
        count = counts_at(i, steps, len(positions))
        if 'threshold' in options and i < steps - 1:
            lack = [(0.0 if confidence == 'entropy' else 1.0) - score[j] for j in ranked]
            count = sum(
                1
                for k in range(1, len(ranked) + 1)
                if sum(lack[:k]) - max(lack[:k]) < options['threshold']
            )
        if 'confidence_temperature' in options:
            sets = subsets(
                positions,
                count,
                {j: math.exp(score[j] / options['confidence_temperature']) for j in positions},
            )
        else:
            sets = [(ranked[:count], 1.0)]
        for chosen, probability in sets:
            for following, mass in revealing(state, chosen, says.tokens(state)):
                yield following, mass * probability

    fits(
        chain(template, steps, rule),
        net,
        template,
        steps,
        'fixed',
        confidence=confidence,
        **options,
    )


# --- greedy and low_confidence


def most_confident(says, state, positions, count):
    """Tokens are drawn at all positions; those that the net gives most probability are kept."""
    belief = says.belief(state)
    every = sorted(belief[j][v] for j in positions for v in range(M))
    assert min([b - a for a, b in itertools.pairwise(every)] or [1]) > 1e-6, (
        'ties: rounding would decide'
    )
    for following, mass in revealing(state, positions, says.tokens(state)):
        kept = sorted(positions, key=lambda j: -belief[j][following[j]])[:count]
        yield tuple(following[j] if j in kept else token for j, token in enumerate(state)), mass


@pytest.mark.parametrize(
    'options', [dict(), dict(temperature=0.5), dict(temperature=0.0), dict(top_k=2, cfg_scale=0.5)]
)
def test_greedy_with_temperature(net_of, options):
    net = net_of()
    steps = 3
    template = (1, M, M, 0, M, M)
    says, times = Says(net, given=[0, 3], **options), torch.linspace(1, 1e-5, steps + 1)

    def rule(i, state):
        positions = masked_positions(state, M)
        count = (
            len(positions)
            if i == steps - 1
            else int(len(positions) * (1 - times[i + 1] / times[i]))
        )
        return most_confident(says, state, positions, count) if count else [(state, 1.0)]

    exact = chain(template, steps, rule)
    if options.get('temperature') == 0:
        assert len(exact) == 1
        assert (
            generate(net, 3, 6, steps, 'greedy', template=template, **options).tokens
            == torch.tensor(next(iter(exact)))
        ).all()
    else:
        fits(exact, net, template, steps, 'greedy', **options)


def test_greedy_matches_the_released_code():
    expected = load_file(f'{GOLDEN}/smdm_expected.safetensors')
    net = load_pretrained(f'{GOLDEN}/smdm.safetensors', n_head=4)
    names = [name for name in expected if name.startswith('greedy_cfg')]
    for name, batch_size in itertools.product(names, (1, 2)):
        cfg_scale, steps = name.removeprefix('greedy_cfg').split('_steps')
        out = generate(
            net, 2, 24, int(steps), 'greedy', prompt=expected['prompt'], cfg_scale=float(cfg_scale),
            temperature=0.0, batch_size=batch_size
        )
        assert torch.equal(out.tokens, expected[name]), name
        assert (out.nfe <= (2 if float(cfg_scale) else 1) * min(int(steps), 18)).all()
    assert len(names) == 9


@pytest.mark.parametrize('steps, block_length', [(2, None), (4, 2), (6, 2), (3, 1)])
def test_low_confidence_goes_block_by_block(net_of, steps, block_length):
    net, template = net_of(), (0, M, M, M) if block_length == 1 else (0, M, M, M, M)
    says, length = Says(net, temperature=0.7), len(template)
    width = block_length or length - 1
    each = steps // ((length - 1) // width)

    def rule(i, state):
        begin = 1 + i // each * width
        positions = [j for j in masked_positions(state, M) if begin <= j < begin + width]
        count = width // each + (i % each < width % each)
        return most_confident(says, state, positions, count) if count else [(state, 1.0)]

    out = fits(
        chain(template, steps, rule),
        net,
        template,
        steps,
        'low_confidence',
        temperature=0.7,
        block_length=block_length or 8,
    )
    blocks = (out.reveal_step[:, 1:] // each).unique(dim=0)
    assert blocks.tolist() == [[k // width for k in range(length - 1)]]


# --- semi_ar


@pytest.mark.parametrize('length, stride', [(3, 1), (5, 1), (5, 2), (6, 2)])
def test_semi_ar_conditions_each_window_on_what_the_last_left(net_of, length, stride):
    net = net_of(block_size=3)
    steps = 2
    template = (M, 1) + (M,) * (length - 2)
    windows = [0]
    while windows[-1] + 3 < length:
        windows.append(min(windows[-1] + stride, length - 3))
    rule = ancestral_rule(
        Says(net), steps, window=lambda i: (windows[i // steps], windows[i // steps] + 3)
    )
    fits(
        chain(template, steps * len(windows), rule), net, template, steps, 'semi_ar', stride=stride
    )


def test_semi_ar_rows_of_different_lengths_are_as_they_would_be_alone(tiny_net):
    net = tiny_net(block_size=6).double()
    together = generate(net, 4, [15, 4, 6, 11], 5, 'semi_ar', stride=2, seed=5)
    for i, length in enumerate([15, 4, 6, 11]):
        alone = generate(net, 1, length, 5, 'semi_ar', stride=2, seed=5, first_row=i)
        assert torch.equal(together.tokens[i, :length], alone.tokens[0])
        assert (together.tokens[i, length:] == 0).all()
    assert together.length.tolist() == [15, 4, 6, 11]


# --- remdm


def remdm_exact(says, template, steps, strategy, eta, t_on=0.55, t_off=0.05, alpha_on=0.9):
    """A state carries the probability with which each token was drawn, for 'conf'."""
    t = [1 - i / steps for i in range(steps + 1)]

    def alpha(time):
        if strategy != 'loop':
            return 1 - mask_prob(time)
        if time > t_on:
            return (1 - time) / (1 - t_on) * alpha_on
        if time > t_off:
            return alpha_on
        return 1 - time / t_off * (1 - alpha_on)

    def rule(i, state):
        tokens = says.tokens(tuple(token for token, _ in state))
        a_t, a_s = alpha(t[i]), alpha(t[i + 1]) if i < steps - 1 else 1.0
        most = min(1.0, (1 - a_s) / a_t) if a_t > 0 else 1.0
        choices = {}
        weights = {
            j: math.exp(-drawn)
            for j, (token, drawn) in enumerate(state)
            if token != M and drawn is not None
        }
        for j, (token, drawn) in enumerate(state):
            seen = token != M
            sigma = {
                'cap': min(eta, most),
                'rescale': eta * most,
                'loop': min(eta, most) if t_off < t[i] <= t_on else 0.0,
                'conf': most * weights.get(j, 0) / max(sum(weights.values()), 1e-300),
            }[strategy]
            if seen and drawn is not None:
                choices[j] = [((token, drawn), 1 - sigma), ((M, None), sigma)]
            elif not seen:
                c = (a_s - (1 - sigma) * a_t) / (1 - a_t)
                choices[j] = [((M, None), 1 - c)] + [
                    ((v, round(p, 9)), c * p) for v, p in enumerate(tokens[j]) if p
                ]
        return independently(state, choices)

    exact = collections.defaultdict(float)
    for state, mass in chain(tuple((token, None) for token in template), steps, rule).items():
        exact[tuple(token for token, _ in state)] += mass
    return dict(exact)


@pytest.mark.parametrize(
    'strategy, options, steps',
    [
        ('cap', dict(eta=0.4), 4),
        ('rescale', dict(eta=0.7), 4),
        ('conf', dict(), 4),
        ('loop', dict(eta=0.1, t_on=0.7, t_off=0.2), 5),
        ('cap', dict(eta=0.0), 3),
        ('loop', dict(), 20),
    ],
)
def test_remdm(net_of, strategy, options, steps):
    net, template = net_of(), (M, 1, M)
    etas = dict(cap=0.008, rescale=0.015, conf=1.0, loop=0.02)
    exact = remdm_exact(
        Says(net, top_p=0.9), template, steps, strategy, **dict(eta=etas[strategy]) | options
    )
    # top_p is 0.9 if it is not given
    out = fits(exact, net, template, steps, 'remdm', strategy=strategy, **options)
    assert (out.tokens[:, 1] == 1).all()
    if options.get('eta') == 0:
        plain = chain(template, steps, ancestral_rule(Says(net, top_p=0.9), steps))
        assert all(abs(plain[state] - exact[state]) < 1e-9 for state in plain)


def test_remdm_masks_tokens_again(net_of):
    net, events = net_of(), []
    generate(
        net,
        200,
        6,
        20,
        'remdm',
        eta=0.5,
        on_change=lambda rows, cols, ids, sure, steps: events.extend(
            zip(rows.tolist(), cols.tolist(), ids.tolist(), steps.tolist(), strict=True)
        ),
    )
    again = [event for event in events if event[2] == -1 and event[3] >= 0]
    assert len(again) > 100


# --- ar


def test_ar_draws_token_after_token_and_stops_at_eos(net_of):
    net = net_of(causal=True, objective='ar', cond_dim=0)
    says, eos = Says(net, top_k=2), 2

    def rule(i, state):
        if eos in state[1:] or M not in state:
            return [(state, 1.0)]
        at = state.index(M)
        return revealing(state, [at], says.tokens(state[:at])[at - 1 : at] * (at + 1))

    exact = {
        tuple(0 if token == M else token for token in state): mass
        for state, mass in chain((1, M, M, M), 3, rule).items()
    }
    out = fits(exact, net, (1, M, M, M), 1, 'ar', top_k=2, eos_id=eos)
    assert out.length.tolist() == [
        min([i + 1 for i in range(1, 4) if row[i] == eos] or [4]) for row in out.tokens.tolist()
    ]
    assert torch.equal(out.nfe, out.length - 1)


def test_the_key_value_cache_changes_nothing(tiny_net):
    net = tiny_net(
        causal=True, objective='ar', cond_dim=0, mask_id=None, vocab_size=40, n_head=4
    ).double()
    prompts = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10, 11], [3, 3]]
    out = generate(net, 5, 12, 1, 'ar', prompt=prompts, temperature=0.0, batch_size=2)
    for row, given in zip(out.tokens, prompts, strict=True):
        x = row[None, : len(given)]
        while x.size(1) < 12:
            x = torch.cat((x, net(x)[:, -1:].argmax(dim=-1)), dim=1)
        assert torch.equal(x[0], row)
    again = generate(net, 5, 12, 1, 'ar', prompt=prompts, batch_size=5, seed=2, eos_id=7)
    for batch_size in (1, 2, 3):
        assert torch.equal(
            again.tokens,
            generate(
                net, 5, 12, 1, 'ar', prompt=prompts, batch_size=batch_size, seed=2, eos_id=7
            ).tokens,
        )


# --- what holds for all of them

CALLS = [
    ('ancestral', {}),
    ('analytic', {}),
    ('fixed', {}),
    ('fixed', dict(confidence='entropy', confidence_temperature=0.3)),
    ('fixed', dict(confidence='top_prob', threshold=0.8)),
    ('greedy', {}),
    ('low_confidence', dict(block_length=12)),
    ('semi_ar', dict(stride=3)),
    ('first_hitting', {}),
    *(('remdm', dict(strategy=s)) for s in ('cap', 'rescale', 'conf', 'loop')),
]


@pytest.mark.parametrize('sampler, options', CALLS)
def test_a_row_is_its_own_whatever_the_batch(tiny_net, sampler, options):
    net = tiny_net(scale=0.6).double()
    common = dict(seed=3, prompt=[4, 7], cfg_scale=0.5, **options)
    whole = generate(net, 7, 13, 10, sampler, batch_size=7, **common)
    assert (whole.tokens != 10).all()
    assert (whole.tokens[:, :2] == torch.tensor([4, 7])).all()
    assert (whole.reveal_step[:, :2] == -1).all()
    assert (whole.reveal_step[:, 2:] >= 0).all()
    for batch_size in (1, 3):  # of 7 rows: rows leave and enter
        again = generate(net, 7, 13, 10, sampler, batch_size=batch_size, **common)
        assert torch.equal(again.tokens, whole.tokens)
        assert torch.equal(again.nfe, whole.nfe)
        assert torch.equal(again.reveal_step, whole.reveal_step)
    later = generate(net, 2, 13, 10, sampler, first_row=5, **common)
    assert torch.equal(later.tokens, whole.tokens[5:]) and torch.equal(later.nfe, whole.nfe[5:])


@pytest.mark.parametrize('sampler, options', [call for call in CALLS if call[0] != 'semi_ar'])
def test_rows_of_different_lengths_are_as_they_would_be_alone(tiny_net, sampler, options):
    net, lengths = tiny_net(scale=0.6).double(), [5, 13, 9, 2]
    prompts = [[1], [2, 3], [4, 5, 6], []]
    options = options | dict(block_length=16) if 'block_length' in options else options
    together = generate(
        net, 4, lengths, 10, sampler, prompt=prompts, seed=1, batch_size=3, **options
    )
    for i, (n, prompt) in enumerate(zip(lengths, prompts, strict=True)):
        alone = generate(net, 1, n, 10, sampler, prompt=prompt, seed=1, first_row=i, **options)
        assert torch.equal(together.tokens[i, :n], alone.tokens[0])
        assert together.nfe[i] == alone.nfe[0]


@pytest.mark.parametrize(
    'sampler, options',
    [
        ('greedy', dict(temperature=0.0)),
        ('low_confidence', dict(temperature=0.0)),
        ('fixed', dict(confidence='top_prob')),
        ('fixed', dict(confidence='prob_diff')),
        ('fixed', dict(confidence='entropy', threshold=0.5)),
    ],
)
def test_ties_are_not_decided_by_rounding(tiny_net, sampler, options):
    # in float32. At the start all of a row is masked, and every position equally confident
    for seed in range(3):
        net = tiny_net(seed, scale=0.5, n_embd=32, vocab_size=97, mask_id=96)
        alone = generate(net, 20, 9, 9, sampler, **options)
        beside = generate(net, 21, [9] * 20 + [16], 9, sampler, batch_size=21, **options)
        assert torch.equal(alone.reveal_step, beside.reveal_step[:20, :9])
        assert torch.equal(alone.tokens, beside.tokens[:20, :9])
        first = alone.reveal_step.amin(dim=1)
        assert (alone.reveal_step[:, 0] == first).all()  # from left to right


@pytest.mark.parametrize('sampler, options', CALLS)
def test_templates_are_kept_bit_for_bit(tiny_net, sampler, options):
    net, template = tiny_net(), torch.tensor([[10, 1, 10, 10, 2, 3, 10], [0, 10, 10, 4, 10, 10, 5]])
    out = generate(net, 2, 7, 6, sampler, template=template, **options)
    assert torch.equal(out.tokens[template != 10], template[template != 10])
    assert (out.tokens != 10).all()
    assert torch.equal(out.reveal_step == -1, template != 10)
    holes = torch.where(template == 10, -1, template).tolist()
    assert torch.equal(
        generate(net, 2, None, 6, sampler, template=holes, **options).tokens, out.tokens
    )


def test_the_batch_stays_full_while_rows_are_waiting(tiny_net, monkeypatch):
    net, sizes = tiny_net(), []
    trunk = net.trunk

    def counted(x, sigma=None, attention_mask=None):
        sizes.append(len(x))
        return trunk(x, sigma, attention_mask)

    monkeypatch.setattr(net, 'trunk', counted)
    out = generate(net, 40, 16, 8, batch_size=5)
    assert max(sizes) == 5 and sizes.count(5) * 5 > 0.95 * out.nfe.sum()


def test_confidence_samplers_skip_steps_that_reveal_nothing(tiny_net):
    net = tiny_net()
    for sampler, options in (
        ('greedy', {}),
        ('low_confidence', {}),
        ('fixed', dict(confidence='top_prob')),
    ):
        out = generate(net, 2, 6, 50, sampler, **options)
        assert out.nfe.tolist() == [len(set(row)) for row in out.reveal_step.tolist()]
        assert out.nfe.max() <= 6


@pytest.mark.slow
def test_compiled_trunk_gives_the_same_samples(tiny_net):
    net = tiny_net().double()
    plain, compiled = (
        generate(net, 5, 8, 6, seed=2, batch_size=3, compile=compiled) for compiled in (False, True)
    )
    assert torch.equal(plain.tokens, compiled.tokens)


@pytest.mark.parametrize(
    'net_options, options, message',
    [
        (
            dict(),
            dict(sampler='ar'),
            "sampler 'ar' takes nets of the objectives ar; "
            'for this one, subs, there is ancestral, analytic',
        ),
        (
            dict(causal=True, objective='ar', cond_dim=0),
            dict(sampler='ancestral'),
            'for this one, ar, there is ar',
        ),
        (
            dict(objective='sedd', time_conditioning=True),
            dict(sampler='greedy'),
            'for this one, sedd, there is analytic',
        ),
        (dict(objective='d3pm'), dict(sampler='fixed'), 'for this one, d3pm, there is ancestral'),
        (
            dict(causal=True, objective='ar', cond_dim=0),
            dict(sampler='ar'),
            'begins with a token: give a prompt',
        ),
        (
            dict(causal=True, objective='ar', cond_dim=0),
            dict(sampler='ar', template=[1, -1, 2, -1], length=4),
            'cannot fill in a template',
        ),
        (
            dict(causal=True, objective='ar', cond_dim=0),
            dict(sampler='ar', prompt=[1], cfg_scale=1.0),
            "cfg_scale=1.0: it must be 0 for sampler 'ar'",
        ),
        (dict(), dict(template=[1, 2]), 'the template has 2 tokens, the length is 8'),
        (dict(), dict(template=[-1] * 9), 'the template has 9 tokens, the length is 8'),
        (dict(), dict(template=[11] + [-1] * 7), 'the template holds 11'),
        (dict(), dict(template=[-2] * 8), 'the template holds -2'),
        (dict(), dict(template=[-1] * 8, prompt=[1]), 'a prompt or a template, not both'),
        (dict(), dict(template='a <|mask|>'), 'names no tokenizer'),
        (
            dict(),
            dict(sampler='semi_ar', stride=16),
            'stride=16: it must be at least 1 and below 16',
        ),
        (dict(), dict(sampler='semi_ar', stride=0), 'stride=0'),
        (
            dict(),
            dict(sampler='ancestral', stride=4),
            "stride does not go with sampler 'ancestral'",
        ),
        (
            dict(),
            dict(sampler='fixed', eta=0.1),
            "eta does not go with sampler 'fixed', which has the options confidence",
        ),
        (dict(), dict(sampler='fixed', confidence='best'), "confidence='best' is not known"),
        (dict(), dict(sampler='fixed', threshold=0.5), "goes with confidence 'top_prob'"),
        (dict(), dict(sampler='fixed', confidence='entropy', threshold=0.0), 'threshold=0.0'),
        (
            dict(),
            dict(sampler='fixed', confidence='entropy', confidence_temperature=-1.0),
            'confidence_temperature=-1.0',
        ),
        (
            dict(),
            dict(sampler='low_confidence', block_length=3, steps=4),
            'steps=4 cannot be shared evenly by 3 blocks of 3',
        ),
        (dict(), dict(sampler='low_confidence', block_length=0), 'block_length=0'),
        (dict(), dict(sampler='remdm', strategy='none'), "strategy='none' is not known"),
        (dict(), dict(sampler='remdm', eta=1.5), 'eta=1.5'),
        (dict(), dict(sampler='remdm', strategy='loop', alpha_on=0.0), 'alpha_on=0.0'),
        (dict(), dict(sampler='remdm', t_on=0.01), 't_on=0.01, t_off=0.05'),
        (dict(), dict(length=[8]), None),
        (dict(), dict(length=[8, 8, 8]), 'length='),
        (dict(), dict(length=[8, 20]), 'length=20: it must be 1 to 16'),
        (dict(), dict(length=2.5), 'length=2.5'),
        (dict(), dict(prompt=dict(a=1)), 'text or ids are needed'),
        (dict(), dict(prompt=[[1, 2], 3]), 'prompt holds'),
        (dict(), dict(top_p='a'), 'top_p=a'),
        (dict(), dict(seed='x'), "seed='x'"),
    ],
)
def test_impossible_requests_are_refused(tiny_net, net_options, options, message):
    net = tiny_net(**net_options)
    call = dict(num_samples=2, length=8, steps=4) | options
    if message is None:
        generate(net, **call)
    else:
        with pytest.raises(ValueError) as error:
            generate(net, **call)
        assert message in str(error.value) and '\n' not in str(error.value)


def test_guidance_is_evaluated_only_where_something_given_is_in_sight(tiny_net):
    net = tiny_net()
    plain, guided = (
        generate(net, 2, 64, 4, 'semi_ar', prompt=[1], cfg_scale=c) for c in (0.0, 1.0)
    )
    assert (
        guided.nfe
        == plain.nfe
        + torch.tensor([len(set(row[:16]) - {-1}) for row in plain.reveal_step.tolist()])
    ).all()


def test_confident_logits_are_told_apart():
    from sample import CONFIDENCE, probability

    logits = torch.zeros(6, 50)
    # in float32 most of p is 1
    logits[torch.arange(6), torch.arange(6)] = torch.tensor([18.0, 20.0, 19.0, 25.0, 22.0, 10.0])
    for score, most in CONFIDENCE.values():
        assert score(logits.clone()).argsort().tolist() == [5, 0, 2, 1, 4, 3]
        assert score(logits.clone()).max() < most
    logits = torch.randn(9, 7)
    logits[:, 3] = -torch.inf  # the mask
    p = logits.double().softmax(dim=-1)
    exact = dict(
        top_prob=p.amax(dim=-1),
        prob_diff=p.topk(2).values[:, 0] - p.topk(2).values[:, 1],
        entropy=(p * p.clamp(min=1e-300).log()).sum(dim=-1),
    )
    for name, values in exact.items():
        assert torch.allclose(CONFIDENCE[name][0](logits.clone()), values, atol=1e-6)
    assert torch.allclose(
        probability(logits, torch.arange(9) % 7), p[torch.arange(9), torch.arange(9) % 7], atol=1e-7
    )


def test_rows_that_are_given_whole_stand_beside_others(tiny_net):
    for sampler, options in CALLS:
        options = options | dict(block_length=4) if 'block_length' in options else options
        out = generate(tiny_net(), 2, 8, 3, sampler, prompt=[[1] * 8, [1] * 5], **options)
        assert (out.tokens[0] == 1).all() and out.nfe[0] == 0 and out.nfe[1] > 0


def test_events_of_a_net_without_a_mask(tiny_net):
    from sample import Events

    events = Events(1)
    out = generate(
        tiny_net(causal=True, objective='ar', cond_dim=0, mask_id=None),
        1,
        6,
        1,
        'ar',
        prompt=[5, 6],
        on_change=events,
    )
    assert [(step, col, i) for step, col, i, _ in events.of_row[0]] == [(-1, 0, 5), (-1, 1, 6)] + [
        (-1, col, None) for col in range(2, 6)
    ] + [(step, step + 2, i) for step, i in enumerate(out.tokens[0, 2:].tolist())]
