"""Exact likelihoods of samplers whose rule is deterministic, thresholds on single tokens, and the
frontier of generative perplexity and entropy."""

import itertools
import json
import math
import os

import numpy as np
import pytest
import torch

from conftest import save_net
from eval import continuation_nll, nelbo
from reference import Says, chain, masked_positions, revealing
from sample import generate
from test_metrics import judge  # noqa: F401 (a fixture)
from test_sample import chi_square_p, counts_of
from test_samplers import net_of  # noqa: F401 (a fixture)

M = 3
RULES = [
    ('fixed', 4, dict(confidence='top_prob')),
    ('fixed', 2, dict(confidence='prob_diff')),
    ('fixed', 3, dict(confidence='entropy')),
    ('fixed', 1, dict(confidence='entropy')),
    ('fixed', 4, dict(confidence='top_prob', threshold=0.9)),
    ('fixed', 4, dict(confidence='top_prob', single_threshold=0.5)),
    ('greedy', 3, dict(confidence='top_prob')),
    ('low_confidence', 2, dict(confidence='top_prob', block_length=2)),
    ('low_confidence', 4, dict(confidence='entropy', block_length=2)),
    ('low_confidence', 4, dict(confidence='prob_diff', single_threshold=0.3)),
    ('low_confidence', 4, dict(confidence='top_prob', block_length=1)),
]
NETS = [dict(), dict(time_conditioning=True), dict(objective='mlm')]


def texts(template):
    """All texts that a template may become."""
    choices = [range(M) if token == M else [token] for token in template]
    return torch.tensor(list(itertools.product(*choices)))


def likelihoods(net, template, steps, sampler, **options):
    """dict of text -> probability."""
    text = texts(template)
    out = generate(
        net, len(text), None, steps, sampler, template=template, text=text, **options)
    assert torch.equal(out.tokens, text)
    assert (out.log_prob[:, torch.tensor(template) != M] == 0).all()
    probs = out.log_prob.sum(dim=1).exp().tolist()
    return dict(zip(map(tuple, text.tolist()), probs, strict=True))


@pytest.mark.parametrize('sampler, steps, options', RULES)
def test_the_probabilities_of_all_texts_sum_to_1(net_of, sampler, steps, options):  # noqa: F811
    for net_options in NETS:
        net = net_of(**net_options)
        for cfg_scale, template in ((0.0, (M, M, M, M)), (0.7, (1, M, 0, M, M, M))):
            if 'block_length' in options and cfg_scale:
                template = (1, 0, M, M, M, M)
            found = likelihoods(net, template, steps, sampler, cfg_scale=cfg_scale, **options)
            assert len(found) == 3 ** 4 and max(found.values()) < 0.5
            assert sum(found.values()) == pytest.approx(1, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize('sampler, steps, options', RULES)
def test_samples_follow_the_exact_likelihood(net_of, sampler, steps, options):  # noqa: F811
    for net_options in NETS[:2]:
        net, n, template = net_of(**net_options), 20_000, (2, M, M, M, M)
        exact = likelihoods(net, template, steps, sampler, **options)
        out = generate(
            net, n, None, steps, sampler, template=template, batch_size=5000, **options)
        p = chi_square_p(counts_of(out.tokens), exact, n)
        assert p > 1e-3, p


@pytest.mark.parametrize('tau', [0.4, 0.55, 0.99])
@pytest.mark.parametrize('sampler', ['fixed', 'low_confidence'])
def test_a_single_threshold_reveals_all_above_it_at_least_one(net_of, sampler, tau):  # noqa: F811
    net, steps, most = net_of(), 4, 0
    says = Says(net)

    def rule(i, state):
        nonlocal most
        positions = masked_positions(state, M)
        if sampler == 'low_confidence':  # blocks of two
            positions = positions and [j for j in positions if j // 2 == positions[0] // 2]
            if positions and i // 2 < positions[0] // 2:
                positions = []  # the steps of the block before are not over
        score = {j: max(says.belief(state)[j]) for j in positions}
        chosen = [j for j in positions if score[j] > tau]
        chosen = chosen or sorted(positions, key=lambda j: -score[j])[:1]
        most = max(most, len(chosen))
        yield from revealing(state, chosen, says.tokens(state))

    options = dict(confidence='top_prob', single_threshold=tau)
    if sampler == 'low_confidence':
        options['block_length'] = 2
    start = (M, M, M, M)
    exact = chain(start, steps, rule)
    found = likelihoods(net, start, steps, sampler, **options)
    assert found == pytest.approx({text: exact.get(text, 0.0) for text in found}, abs=1e-6)
    assert tau == 0.99 or most > 1  # or there is nothing to see


def test_a_low_threshold_saves_evaluations(net_of):  # noqa: F811
    net = net_of()
    for sampler in ('fixed', 'low_confidence'):
        nfe = [
            generate(
                net, 50, 8, 8, sampler, confidence='top_prob', single_threshold=tau
            ).nfe.double().mean().item()
            for tau in (1e-3, 0.5, 1.0)
        ]
        assert nfe[0] == 1 and nfe[2] == 8 and 1 < nfe[1] < 8
    of_drawn, of_net = (
        generate(
            net, 50, 8, 8, 'low_confidence', temperature=0.0, block_length=4, confidence=confidence,
            single_threshold=0.5)
        for confidence in (None, 'top_prob')
    )
    assert torch.equal(of_drawn.reveal_step, of_net.reveal_step)
    assert torch.equal(of_drawn.tokens, of_net.tokens)


@pytest.mark.parametrize('cfg_scale', [0.0, 0.8])
def test_left_to_right_is_the_chain_rule(net_of, cfg_scale):  # noqa: F811
    net = net_of()
    prefix, target = [1, 2, 0], [2, 1, 1, 0, 2]
    found = continuation_nll(
        net, prefix, target, 'duel', cfg_scale, sampler='low_confidence', confidence='top_prob',
        block_length=1)
    assert found == pytest.approx(continuation_nll(net, prefix, target, cfg_scale=cfg_scale))
    other = continuation_nll(
        net, prefix, target, 'duel', cfg_scale, sampler='fixed', confidence='top_prob')
    assert other != pytest.approx(found, abs=1e-3)


def test_an_ar_nets_likelihood_is_its_own(tiny_net, rows):
    net = tiny_net(objective='ar', causal=True, vocab_size=258, mask_id=257)
    prefix, target = [1, 2, 0], [2, 1, 7, 7, 2]
    exact = continuation_nll(net, prefix, target)
    assert continuation_nll(net, prefix, target, 'duel') == pytest.approx(exact)
    assert nelbo(net, rows(), estimator='duel') == nelbo(net, rows())
    with pytest.raises(ValueError, match="go with method 'duel'"):
        continuation_nll(net, prefix, target, steps=3)


def test_a_rule_by_chance_has_no_exact_likelihood(net_of):  # noqa: F811
    net, d3pm = net_of(), net_of(objective='d3pm', time_conditioning=True)
    for sampler, options in (
        ('ancestral', {}), ('analytic', {}), ('first_hitting', {}), ('semi_ar', {}), ('fixed', {}),
        ('fixed', dict(confidence='entropy', confidence_temperature=0.5)), ('greedy', {}),
        ('low_confidence', {}), *(('remdm', dict(strategy=s)) for s in ('cap', 'conf', 'loop')),
    ):
        with pytest.raises(ValueError, match=f"sampler '{sampler}', with its .* no exact likeli"):
            continuation_nll(net, [1], [2, 0], 'duel', sampler=sampler, steps=4, **options)
    with pytest.raises(ValueError, match='no exact likelihood'):
        generate(d3pm, 1, 3, 3, 'ancestral', text=[[0, 1, 2]])
    with pytest.raises(ValueError, match='across_rows does not go with a confidence'):
        continuation_nll(
            net, [1], [2], 'duel', sampler='greedy', confidence='entropy', across_rows=True)


def test_bad_thresholds_and_texts_are_refused(net_of):  # noqa: F811
    net = net_of()
    for message, options in (
        ('single_threshold=0.5 goes with confidence', dict(single_threshold=0.5)),
        ('single_threshold=0.5 goes with', dict(confidence='entropy', single_threshold=0.5)),
        ('single_threshold=1.5: it must be', dict(confidence='top_prob', single_threshold=1.5)),
        ('goes without threshold and confidence_temperature', dict(
            confidence='top_prob', single_threshold=0.5, threshold=0.5)),
        ('1 rows of 4 ids are needed', dict(text=[[0, 1]])),
        ('text holds an id that is not a token', dict(text=[[0, 1, M, 0]])),
    ):
        with pytest.raises(ValueError, match=message):
            generate(net, 1, 4, 4, 'fixed', **options)


@pytest.mark.parametrize('packing, options', [
    ('wrap', {}), ('concat', {}), ('pad', {}), ('pad', dict(loss_on_padding=False)),
    ('sentence', {})])
def test_rows_of_any_packing_and_batch_size(tiny_net, rows, packing, options):
    net, some = tiny_net(vocab_size=258, mask_id=257), rows(packing, **options)
    sampling = dict(sampler='fixed', steps=5, confidence='prob_diff')
    found = [
        nelbo(net, some, estimator='duel', max_rows=5, batch_size=batch_size, sampling=sampling)
        for batch_size in (1, 3)
    ]
    for key in ('nats_per_token', 'bits_per_byte', 'nfe', 'tokens'):
        assert found[0][key] == pytest.approx(found[1][key], rel=1e-5)
    nats = scored = 0
    for i in np.arange(5) * len(some) // 5:
        row = {key: tensor[0] for key, tensor in some[i].items()}
        n = int(row['attention_mask'].sum())
        template = row['x0'].masked_fill(row['maskable'], 257)[:n]
        out = generate(net, 1, None, template=template, text=row['x0'][None], **sampling)
        nats -= float(out.log_prob[0, row['scored'][:n]].sum())
        scored += int(row['scored'].sum())
    assert found[0]['tokens'] == scored
    assert found[0]['nats_per_token'] == pytest.approx(nats / scored, rel=1e-5)
    assert 1 <= found[0]['nfe'] <= 5 and found[0]['nats_per_token_se'] > 0


def test_packed_documents_are_refused(tiny_net, rows):
    net = tiny_net(vocab_size=258, mask_id=257)
    with pytest.raises(ValueError, match="estimator 'duel' is not for packing 'documents'"):
        nelbo(net, rows('documents'), estimator='duel')


@pytest.fixture
def trained(tiny_net, rows, tmp_path):
    save_net(tiny_net(vocab_size=258, mask_id=257), tmp_path)
    rows()


def test_eval_py_prints_and_records_the_exact_likelihood(trained, here, capsys):
    result = here(
        'eval.py', '--out_dir=.', '--device=cpu', '--estimator=duel', '--sampler=low_confidence',
        '--confidence=top_prob', '--block_length=4', '--steps=8', '--max_rows=6')['result']
    said = capsys.readouterr().out
    assert said.startswith('NLL of . on c-bytes/validation, 6 rows by low_confidence in 8 steps, ')
    assert 'nats/token' in said and ' ± ' in said
    assert result['ppl'] == pytest.approx(math.exp(result['nats_per_token']))
    recorded = json.loads(open('results.jsonl').readline())['result']
    assert recorded['sampler'] == 'low_confidence' and recorded['steps'] == 8
    assert recorded['estimator'] == 'duel' and recorded['nfe'] > 1


def test_eval_py_refuses_a_sampler_without_an_exact_likelihood(trained, refused):
    for given in ('--sampler=ancestral', '--sampler=fixed', '--sampler=ar'):
        said = refused('eval.py', '--out_dir=.', '--device=cpu', '--estimator=duel', given)
        assert said.startswith("error: sampler '") and said.count('\n') == 1
        assert 'gives no exact likelihood' in said or 'takes nets of the objectives ar' in said


@pytest.mark.slow
def test_two_processes_give_the_same_likelihood(trained, run):
    arguments = (
        'eval.py', '--out_dir=.', '--device=cpu', '--estimator=duel', '--sampler=fixed',
        '--confidence=entropy', '--steps=4', '--batch_size=2', '--max_rows=7')
    assert run(*arguments, processes=2).stdout == run(*arguments).stdout


def test_the_frontier_has_a_curve_of_each_sampler(trained, here, judge, capsys):  # noqa: F811
    pytest.importorskip('matplotlib')
    by_confidence = dict(sampler='fixed', confidence='top_prob', single_threshold=0.5)
    arguments = (
        'eval.py', '--metric=frontier', '--out_dir=.', '--device=cpu', f'--judge={judge}',
        '--featurizer=', '--num_samples=3', '--table_steps=(8,)', '--temperatures=(0.5,1.0)',
        f"--samplers=('ancestral', {by_confidence})")
    rows = here(*arguments)['result']
    fixed = 'fixed confidence=top_prob single_threshold=0.5'
    assert [(row['sampler'], row['temperature']) for row in rows] == [
        ('ancestral', 0.5), ('ancestral', 1.0), (fixed, 0.5), (fixed, 1.0)]
    assert all(1 <= row['nfe'] <= 8 and row['gen_ppl'] > 1 for row in rows)
    assert all(row['nfe_se'] >= 0 and row['steps'] == 8 for row in rows)
    assert here(*arguments)['result'] == rows  # from the samples that were kept
    lines = [json.loads(line) for line in open('results.jsonl')]
    assert [line['result']['temperature'] for line in lines] == [0.5, 1.0] * 4
    with pytest.raises(SystemExit):
        here('eval.py', '--metric=report')
    assert 'results-frontier.png' in capsys.readouterr().out
    assert os.path.getsize('results-frontier.png') > 1000


def test_a_frontier_of_unknown_samplers_is_refused(trained, refused):
    for given, message in (
        ("('best',)", "sampler 'best' is not known"),
        ("({'sampler': 'fixed', 'eta': 1},)", 'eta does not go with'),
    ):
        said = refused(
            'eval.py', '--metric=frontier', '--out_dir=.', '--device=cpu', f'--samplers={given}')
        assert said.startswith('error: ') and message in said and said.count('\n') == 1
