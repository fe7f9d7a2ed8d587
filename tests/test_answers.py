"""Answers to prompts: the vectors of SMDM's downstream suite that concern measuring, the harness,
FineWeb's stream, scaling laws."""

import importlib.util
import json
import math
import os
import types

import numpy as np
import pytest
import torch

import eval as measures
from conftest import ROOT, SHARED
from data import TokenRows, get_tokenizer, prepare
from eval import (
    chain_rule_masks, character_bleu, conditional_nll, continuation_nll, decode_prompts,
    encode_pair, fastchat_answer, greedy_matches, harness_lm, last_match, nelbo, normalized,
    prefix_and_target, same_answer, score_pairs, vicuna
)
from model import load_pretrained, per_token_loss
from test_eval import save_net

needs_lm_eval = pytest.mark.skipif(
    not importlib.util.find_spec('lm_eval'), reason='needs lm-eval (pip install lm-eval)'
)
needs_nltk = pytest.mark.skipif(
    not importlib.util.find_spec('nltk'), reason='needs nltk (pip install nltk)'
)


@pytest.fixture(scope='module')
def vectors():
    path = os.path.join(SHARED, 'fixtures', 'smdm_downstream.json')
    if not os.path.isfile(path):
        pytest.skip('needs ../shared (test vectors that are not part of the repository)')
    with open(path) as f:
        return json.load(f)


def smdm(name='smdm', **overrides):
    path = os.path.join(ROOT, 'tests', 'golden', f'{name}.safetensors')
    return load_pretrained(path, n_head=4, block_size=48, **overrides)


def toy_tokenizer():
    return get_tokenizer(os.path.join(SHARED, 'fixtures', 'toy_llama'))


# --- GSM8K


def test_gsm8k_verdicts_are_those_of_the_released_environment(vectors):
    for case in vectors['gsm8k_equivalence']:
        said = last_match('#### (.*)$', case['generation'])
        assert [normalized(said), normalized(case['target'])] == case['normalized']
        assert same_answer(case['generation'], case['target']) == case['correct_without_parser']


@pytest.mark.skipif(
    not importlib.util.find_spec('antlr4'), reason='needs antlr4-python3-runtime==4.11'
)
def test_gsm8k_verdicts_with_a_latex_parser(vectors):
    for case in vectors['gsm8k_equivalence']:
        assert same_answer(case['generation'], case['target'], match='latex') == case['correct']


def test_the_target_of_gsm8ks_own_files_is_the_released_one(vectors):
    for case in vectors['gsm8k_lines']:
        target = last_match('#### (.*)$', case['answer'], case['answer'])
        assert target.replace(',', '') == case['target']


def test_gsm8k_is_decoded_as_one_pool_in_two_passes(vectors):
    net, tok = smdm(), toy_tokenizer()
    for case in vectors['gsm8k_decode']:
        options = dict(
            length=case['length'], steps=case['steps'], cfg_scale=case['cfg_scale'],
            sampler='greedy', temperature=0.0, pooled=True, seed=0, first_row=0, batch_size=3,
        )
        prompts = [f'Question: {question}' for question in case['questions']]
        done = decode_prompts(net, tok, prompts, 1, **options)
        first = [ids for ids, text in done]
        for ids, row in zip(first, case['first_pass'], strict=True):
            assert row[-len(ids):] == ids
        done = decode_prompts(net, tok, prompts, 2, **options)
        assert [ids for ids, text in done] == case['second_pass']
        assert [text for ids, text in done] == case['answers']


def test_gsm8k_decoding_needs_its_whole_batch():
    with pytest.raises(ValueError, match='pooled=True'):
        decode_prompts(
            smdm(), toy_tokenizer(), ['a', 'b'], 1, length=8, steps=2, sampler='greedy',
            pooled=True, seed=0, first_row=0, batch_size=1,
        )


# --- reversal, MT-bench


def test_reversal_verdicts(vectors):
    for case in vectors['reverse_accuracy']:
        contains = measures.MATCHES['contains']
        assert contains(case['generation'], case['reference']) == case['correct']


@needs_nltk
def test_bleu_is_that_of_characters(vectors):
    for case in vectors['bleu']:
        found = character_bleu(case['generation'], case['reference'])
        assert found == pytest.approx(case['value'], abs=1e-9)
    for case in vectors['reverse_accuracy']:
        found = character_bleu(case['generation'], case['reference'])
        assert found == pytest.approx(case['bleu'], abs=1e-9)


def test_mt_bench_prompts_and_answers(vectors):
    for case in vectors['mt_bench_prompt']:
        assert vicuna(case['question']) == case['prompt']
    for case in vectors['mt_bench_output']:
        assert fastchat_answer(case['decoded']) == case['answer']


# --- the harness


def test_pairs_are_encoded_as_released(vectors):
    tok = toy_tokenizer()
    for case in vectors['harness_pairs']:
        pair = encode_pair(tok, case['context'], case['continuation'])
        assert pair == (case['context_ids'], case['continuation_ids'])


def settings_of(key):
    """'..._cfg1.1_padded' -> cfg_scale, padding"""
    cfg_scale, _, padded = key.partition('_cfg')[2].partition('_')
    return float(cfg_scale), bool(padded)


def test_likelihoods_and_greedy_flags_are_the_released_ones(vectors):
    net, ar, checked = smdm(), smdm('smdm_ar', causal=True), 0
    for case in vectors['harness_likelihood']:
        pair = case['prefix'], case['target']
        nats = continuation_nll(ar, *pair)
        assert nats == pytest.approx(case['ar_nll'], rel=1e-5)
        assert greedy_matches(ar, *pair) == case['ar_greedy']
        for key in case:
            if key.startswith('chain_rule_nll_'):
                cfg_scale, padding = settings_of(key)
                nats = continuation_nll(net, *pair, 'chain_rule', cfg_scale, padding=padding)
                assert nats == pytest.approx(case[key], rel=1e-5)
                checked += 1
            elif key.startswith('mc_nll_'):
                cfg_scale, padding = settings_of(key)
                hidden = torch.tensor(case['mc_draws']['masked']).flatten(0, 1).bool()
                weight = 1 / torch.tensor(case['mc_draws']['p_mask']).flatten() / len(hidden)
                nats, _ = conditional_nll(
                    net, [prefix_and_target(net, *pair, cfg_scale)],
                    lambda n, masks=(hidden, hidden, weight): masks, cfg_scale, padding,
                )
                assert nats.item() == pytest.approx(case[key], rel=1e-5)
                checked += 1
            elif key.startswith('greedy_target_'):
                goal = case['prefix'], case[key]
                cfg_scale, padding = settings_of(key)
                assert greedy_matches(net, *goal, cfg_scale, padding)
                flag = case[key.replace('greedy_target', 'greedy')]
                assert greedy_matches(net, *pair, cfg_scale, padding) == flag
                checked += 1
    assert checked == 36


def test_equal_masks_are_evaluated_once_and_change_nothing(tiny_net):
    net = tiny_net(vocab_size=11, scale=0.5)
    calls = []
    trunk = net.trunk
    net.trunk = lambda x, *rest: calls.append(len(x)) or trunk(x, *rest)
    found = continuation_nll(net, [1, 2], [3, 4], 'monte_carlo', num_mc=4096, batch_size=1)
    assert len(calls) == 3  # of two tokens: the first, the second, both
    del net.trunk
    # -log p by enumeration: E over t of the losses of a row over t
    both = sum(
        continuation_nll_of(net, [1, 2], [3, 4], hidden) for hidden in ([0, 1],)
    )
    single = sum(continuation_nll_of(net, [1, 2], [3, 4], hidden) for hidden in ([0], [1]))
    assert found == pytest.approx((single + both) / 2, rel=0.05)


def continuation_nll_of(net, prefix, target, hidden):
    """The losses of the hidden tokens of the target, given all others."""
    x = torch.tensor([prefix + target])
    for i in hidden:
        x[0, len(prefix) + i] = net.config.mask_id
    with torch.no_grad():
        logits = net(x)[0]
    logits[:, net.config.mask_id] = -torch.inf
    log_p = logits.log_softmax(dim=-1)
    return -sum(log_p[len(prefix) + i, target[i]].item() for i in hidden)


def mixed_pairs(n, seed=0):
    rng = np.random.default_rng(seed)
    return [
        (
            [1, *rng.integers(3, 88, rng.integers(2, 25)).tolist()],
            rng.integers(3, 88, rng.integers(1, 13)).tolist(),
        )
        for _ in range(n)
    ]


@pytest.mark.parametrize('cfg_scale', (0.0, 0.6))
def test_requests_together_have_the_answers_of_each_alone(cfg_scale):
    net, pairs = smdm(), mixed_pairs(12)
    prefix, target = pairs[0]
    with torch.no_grad():  # one that the net agrees with
        x = torch.tensor([prefix + [88]])
        pairs.append((prefix, [net(x)[0, -1, :88].argmax().item()]))
    for method, num_mc in (('chain_rule', 1), ('monte_carlo', 32)):
        together = score_pairs(net, pairs, method, cfg_scale, num_mc, batch_size=7)
        for (nats, greedy), pair in zip(together, pairs, strict=True):
            alone = continuation_nll(net, *pair, method, cfg_scale, num_mc)
            assert -nats == pytest.approx(alone, rel=1e-5)
            assert greedy == greedy_matches(net, *pair, cfg_scale)
    assert together[-1][1] or cfg_scale


def test_a_long_context_loses_its_beginning_and_nothing_is_certain():
    net = smdm()
    long, target = [1] * 20 + list(range(3, 60)), [5, 6]
    (cut, _), (nothing, _) = score_pairs(net, [(long, target), ([1], [])])
    assert cut == pytest.approx(-continuation_nll(net, long[-46:], target), rel=1e-5)
    assert nothing == 0.0
    with pytest.raises(ValueError, match='at most 48'):
        score_pairs(net, [([1], [3] * 60)])


@pytest.mark.slow
def test_requests_together_are_eight_times_as_fast_as_one_at_a_time():
    """The released loop: a row for each token of the target, then a row for each greedy step."""
    import time
    torch.set_num_threads(1)
    net, pairs, mask_id = smdm(), mixed_pairs(32), 88

    @torch.no_grad()
    def one_at_a_time(prefix, target):
        P, x = len(prefix), torch.tensor([prefix + [mask_id] * len(target)])
        nats, y = 0.0, x.clone()
        for i, token in enumerate(target):
            nats -= net(x)[0, P + i, :mask_id].log_softmax(dim=-1)[token].item()
            x[0, P + i] = token
        for _ in target:
            masked = y == mask_id
            prob, ids = net(y)[masked][:, :mask_id].softmax(dim=-1).max(dim=-1)
            y[masked] = torch.where(prob == prob.max(), ids, mask_id)
        return nats, y[0, P:].tolist() == target

    def timed(work):
        start = time.perf_counter()
        return work(), time.perf_counter() - start

    best = [math.inf, math.inf]
    for _ in range(5):
        slow, seconds = timed(lambda: [one_at_a_time(*pair) for pair in pairs])
        best[0] = min(best[0], seconds)
        quick, seconds = timed(lambda: score_pairs(net, pairs))
        best[1] = min(best[1], seconds)
    assert [flag for _, flag in slow] == [flag for _, flag in quick]
    assert [-nats for nats, _ in quick] == pytest.approx([nats for nats, _ in slow], rel=1e-5)
    print(best, best[0] / best[1])
    assert best[0] > 8 * best[1], best


TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: {target}
{more}
metric_list:
  - metric: {metric}
"""


def write_harness_tasks(folder):
    """Two choices a question, and a task that generates, in the harness's own form."""
    os.makedirs(folder)
    data = folder / 'questions.jsonl'
    with open(data, 'w') as f:
        for i in range(6):
            f.write(json.dumps(dict(question=f'to be {i}', choices=['or', 'not'], label=i % 2)))
            f.write('\n')
    choice = dict(kind='multiple_choice', target='label', metric='acc')
    choice['more'] = 'doc_to_choice: choices'
    told = dict(kind='generate_until', target='"{{choices[label]}}"', metric='exact_match')
    told['more'] = 'generation_kwargs: {until: ["."], max_gen_toks: 4, do_sample: false}'
    rolled = dict(kind='loglikelihood_rolling', target='"{{question}}"', metric='bits_per_byte')
    rolled['more'] = ''
    for name, options in dict(mine=choice, mine_told=told, mine_rolled=rolled).items():
        (folder / f'{name}.yaml').write_text(TASK.format(name=name, data=data, **options))


@needs_lm_eval
@pytest.mark.parametrize('causal', (False, True))
def test_a_task_of_the_harness_gives_the_accuracy_of_its_likelihoods(
    tiny_net, here, tmp_path, monkeypatch, capsys, causal
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HF_DATASETS_CACHE', str(tmp_path / 'cache'))
    options = dict(objective='ar', causal=True) if causal else {}
    net = tiny_net(vocab_size=258, mask_id=257, block_size=32, **options)
    save_net(net, tmp_path)
    write_harness_tasks(tmp_path / 'tasks')
    cfg_scale = 0.0 if causal else 0.7
    done = here(
        'eval.py', '--metric=harness', '--tasks=mine,mine_told,mine_rolled', '--task_folder=tasks',
        '--out_dir=.', '--device=cpu', f'--cfg_scale={cfg_scale}', '--steps=4', '--num_fewshot=0',
    )
    rows = {row['task']: row for row in done['result']}
    right, nats = 0, []
    for i in range(6):
        prefix = [256, *f'to be {i}'.encode()]
        scores = [
            continuation_nll(net, prefix, list(f' {word}'.encode()), cfg_scale=cfg_scale)
            for word in ('or', 'not')
        ]
        right += int(scores[1] < scores[0]) == i % 2
        whole = list(f'to be {i}'.encode())
        nats.append(continuation_nll(net, [256], whole, cfg_scale=cfg_scale))
    assert rows['mine']['value'] == right / 6
    assert rows['mine']['items'] == 6
    assert 0 <= rows['mine_told']['value'] <= 1
    per_byte = sum(nats) / (6 * 7) / math.log(2)
    assert rows['mine_rolled']['value'] == pytest.approx(per_byte, rel=1e-5)
    assert '| mine | acc |' in capsys.readouterr().out


def request(*arguments):
    return types.SimpleNamespace(args=arguments)


@needs_lm_eval
def test_the_adapter_generates_until_a_string_or_the_end(tiny_net):
    net = tiny_net(vocab_size=258, mask_id=257, block_size=64, objective='ar', causal=True)
    net.tokenizer = dict(name='bytes')
    with torch.no_grad():
        net.lm_head.bias[256] = -1e4  # no EOS
    lm = harness_lm(net, batch_size=2)
    whole = lm.generate_until([request('to be', dict(max_gen_toks=20))])[0]
    assert len(whole.encode()) >= 20
    end = whole[7]
    texts = lm.generate_until([request('to be', dict(max_gen_toks=20, until=[end]))] * 3)
    assert texts == [whole.partition(end)[0]] * 3
    with torch.no_grad():
        net.lm_head.bias[256] = 1e4
    assert lm.generate_until([request('to be', dict(max_gen_toks=20))]) == ['']


def test_what_the_harness_is_asked_wrongly_is_one_line(tiny_net, refused, tmp_path):
    save_net(tiny_net(vocab_size=258, mask_id=257), tmp_path)
    start = 'eval.py', '--metric=harness', '--out_dir=.', '--device=cpu'
    assert 'needs --tasks' in refused(*start)
    if not importlib.util.find_spec('lm_eval'):
        error = refused(*start, '--tasks=arc_easy')
        assert 'pip install lm-eval' in error and error.count('\n') == 1
        return
    assert "the nearest is 'arc_easy'" in refused(*start, '--tasks=arc_easyy')
    write_harness_tasks(tmp_path / 'tasks')
    start = *start, '--task_folder=tasks'
    error = refused(*start, '--tasks=mine_told', '--sampler=ar')
    assert "sampler 'ar' takes nets" in error and error.count('\n') == 1
    error = refused(*start, "--tasks={'mine': {'method': 'exact'}}")
    assert "method 'exact' is not known" in error
    error = refused(*start, "--tasks={'mine': {'metod': 'exact'}}")
    assert 'is not known: choose from method' in error
