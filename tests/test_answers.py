"""Answers to prompts: the vectors of SMDM's downstream suite that concern measuring, the harness,
FineWeb's stream, scaling laws."""

import importlib.util
import json
import math
import os
import time
import types

import numpy as np
import pytest
import torch

import eval as measures
from conftest import ROOT, SHARED, save_net
from data import TokenRows, get_tokenizer, prepare, vicuna_prompt
from eval import (
    character_bleu, conditional_nll, continuation_nll, decode_prompts, encode_pair,
    fastchat_answer, greedy_matches, harness_lm, isoflop_optimum, last_match, nelbo, normalized,
    power_law, prefix_and_target, same_answer, score_pairs
)
from model import load_pretrained, per_token_loss

needs_lm_eval = pytest.mark.skipif(
    not importlib.util.find_spec('lm_eval'), reason='needs lm-eval (pip install lm-eval)'
)
needs_nltk = pytest.mark.skipif(
    not importlib.util.find_spec('nltk'), reason='needs nltk (pip install nltk)'
)


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
            sampler='greedy', temperature=0.0, across_rows=True, seed=0, first_row=0, batch_size=3,
        )
        prompts = [f'Question: {question}' for question in case['questions']]
        done = decode_prompts(net, tok, prompts, 1, **options)
        first = [ids for ids, text in done]
        for ids, row in zip(first, case['first_pass'], strict=True):
            assert row[-len(ids):] == ids
        done = decode_prompts(net, tok, prompts, 2, **options)
        assert [ids for ids, text in done] == case['second_pass']
        assert [text for ids, text in done] == case['answers']


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
        assert vicuna_prompt(case['question']) == case['prompt']
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
def test_requests_together_are_many_times_as_fast_as_one_at_a_time():
    """The released loop: a row for each token of the target, then a row for each greedy step. On an
    idle machine 8 to 11 times; what other processes do to caches costs the batches more."""
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
    assert best[0] > 4 * best[1], best


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
@pytest.mark.slow
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


# --- scored generation, as a command


def write_questions(path, n=5):
    with open(path, 'w') as f:
        for i in range(n):
            f.write(json.dumps(dict(question=f'to be {i}?', answer=f'x\n#### {i},000')) + '\n')


def read_items(path):
    with open(path) as f:
        return [json.loads(line) for line in f]


GENERATION = (
    'eval.py', '--metric=generation', '--out_dir=.', '--device=cpu', '--input=questions.jsonl',
    '--prompt_template=Q: {question}', '--length=24', '--steps=4', '--batch_size=2',
    '--answer_pattern=#### (.*)$', '--match=number', '--dtype=float32',
)


@pytest.fixture
def asked(tiny_net, tmp_path, monkeypatch):
    """A net in an empty folder with five questions."""
    monkeypatch.chdir(tmp_path)
    save_net(tiny_net(vocab_size=258, mask_id=257, block_size=32), tmp_path)
    write_questions('questions.jsonl')


def test_answers_are_judged_one_by_one(asked, here):
    result, = here(*GENERATION)['result']
    assert (result['items'], result['correct'], result['accuracy']) == (5, 0, 0.0)
    items = read_items('answers/questions.jsonl')
    assert [item['prompt'] for item in items] == [f'Q: to be {i}?' for i in range(5)]
    assert [item['answer'] for item in items] == [f'{i},000' for i in range(5)]
    assert not any(item['verdict'] for item in items)


def test_items_that_are_finished_are_not_run_again(asked, here):
    here(*GENERATION)
    items = read_items('answers/questions.jsonl')
    file = 'answers/questions/000002-000003.jsonl'
    rows = read_items(file)
    os.remove(file)
    for path in ('answers/questions/000000-000001.jsonl', 'answers/questions/000004-000004.jsonl'):
        kept = read_items(path)
        with open(path, 'w') as f:
            for row in kept:
                f.write(json.dumps(row | dict(text=f"kept #### {row['row']}000")) + '\n')
    result, = here(*GENERATION)['result']
    assert read_items(file) == rows  # the same as before: a row has its own seed
    after = read_items('answers/questions.jsonl')
    assert [item['verdict'] for item in after] == [True, True, False, False, True]
    assert after[2:4] == items[2:4]
    assert result['correct'] == 3
    assert result['accuracy_se'] == pytest.approx(math.sqrt(0.6 * 0.4 / 5))
    with pytest.raises(ValueError, match='steps=4, not 5'):
        here(*GENERATION, '--steps=5')


@pytest.mark.slow
def test_two_processes_share_the_questions(asked, run, tmp_path):
    run(*GENERATION)
    one = read_items('answers/questions.jsonl')
    run(*GENERATION, '--samples_dir=two', processes=2)
    assert read_items('two/questions.jsonl') == one


def test_several_files_make_one_table_and_a_prompt_may_be_too_long(asked, here, capsys):
    write_questions('more.jsonl', 2)
    with open('more.jsonl', 'a') as f:
        f.write(json.dumps(dict(question='to be ' * 10, answer='1')) + '\n')
    files = "{'some': 'questions.jsonl', 'more of them': 'more.jsonl'}"
    rows = here(*GENERATION, f'--input={files}', '--passes=2')['result']
    assert [(row['task'], row['items'], row['too_long']) for row in rows] == [
        ('some', 5, 0), ('more of them', 3, 1)
    ]
    items = read_items('answers/more_of_them.jsonl')
    assert items[2]['generation'] == 'ERROR'
    assert items[0]['generation'].startswith('Q: to be 0?')  # the whole text, after two passes
    assert '| more of them | 3 |' in capsys.readouterr().out


def test_an_answer_file_is_what_fastchats_judge_reads(asked, here):
    with open('question.jsonl', 'w') as f:
        for i in (82, 81):
            row = dict(question_id=i, category='writing', turns=['Write.', 'Again.'])
            f.write(json.dumps(row) + '\n')
    here(
        'eval.py', os.path.join(ROOT, 'config', 'eval_mt_bench.py'), '--out_dir=.', '--device=cpu',
        '--answer_file=judged/1028.jsonl', '--length=32', '--steps=2',
    )
    lines = read_items('judged/1028.jsonl')
    assert [line['question_id'] for line in lines] == [81, 82]
    for line in lines:
        assert line.keys() == {'question_id', 'answer_id', 'model_id', 'choices', 'tstamp'}
        assert line['model_id'] == '1028'
        assert line['choices'] == [dict(index=0, turns=['ERROR', ''])]  # the prompt is too long


def test_bad_tasks_are_one_line(tiny_net, refused, tmp_path):
    save_net(tiny_net(vocab_size=258, mask_id=257), tmp_path)
    write_questions(tmp_path / 'questions.jsonl')
    for change, said in (
        ('--answer_pattern=#### (.*', 'it is no regular expression'),
        ('--input=nothing.jsonl', 'there is no such file'),
        ('--prompt_template={prompt}', "line 1: not a JSON object with the fields"),
        ('--target_template={completion}', "KeyError: 'completion'"),
        ('--match=nearly', 'choose from exact, contains, number, latex'),
        ('--sampler=ar', "sampler 'ar' takes nets"),
        ('--length=2000', 'it must be 1 to 16'),
    ):
        error = refused(*GENERATION, '--length=12', change)
        assert said in error and error.count('\n') == 1, error
    assert not os.path.exists(tmp_path / 'answers' / 'questions.jsonl')


# --- FineWeb


def test_documents_of_a_stream_begin_with_bos_and_have_no_eos(vectors, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    case = vectors['fineweb_stream']
    with open('web.jsonl', 'w') as f:
        for text in case['documents']:
            f.write(json.dumps(dict(text=text)) + '\n')
    toy = os.path.join(SHARED, 'fixtures', 'toy_llama')
    folder = prepare('fineweb-2024-10', toy, 'web', input='web.jsonl')
    rows = TokenRows(folder, 'validation', 3, 'bos')
    ids = rows[:]['x0'].flatten().tolist()
    assert ids == case['ids'][:len(ids)] and len(ids) >= len(case['ids']) - 2
    one = TokenRows(folder, 'validation', len(case['ids']), 'bos')
    assert one[0]['x0'].flatten().tolist() == case['ids']


class Batches:
    """Rows of ids, as data.TokenRows gives them."""

    def __init__(self, x0):
        self.x0, self.counts = x0, dict(tokens=1, bytes=1)

    def __len__(self):
        return len(self.x0)

    def __getitem__(self, index):
        x0 = self.x0[index]
        seen = torch.ones_like(x0, dtype=torch.bool)
        return dict(x0=x0, maskable=seen, scored=seen, document=seen, attention_mask=seen)


def test_fineweb_perplexities_are_the_released_ones(vectors):
    case = vectors['fineweb_ppl']
    x0 = torch.tensor(case['batches'])  # (2, 3, 24)
    found = nelbo(smdm('smdm_ar', causal=True), Batches(x0.flatten(0, 1)), batch_size=3)
    assert found['ppl'] == pytest.approx(case['ar']['ppl'], rel=1e-5)
    net, losses = smdm(), []
    for batch, p_mask, masked in zip(
        x0, case['diffusion']['p_mask'], case['diffusion']['masked'], strict=True
    ):
        for p, hidden in zip(p_mask, masked, strict=True):
            xt = torch.where(torch.tensor(hidden).bool(), 88, batch)
            with torch.no_grad():
                losses.append(per_token_loss(net, batch, xt, torch.tensor(p)).mean().item())
    assert losses == pytest.approx(np.array(case['diffusion']['loss']).flatten(), rel=1e-5)
    assert math.exp(np.mean(losses)) == pytest.approx(case['diffusion']['ppl'], rel=1e-5)


def test_the_shift_of_two_nets(tiny_net, here, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(('fineweb-2024-10', 'fineweb-2024-18')):
        with open('web.jsonl', 'w') as f:
            for k in range(40):
                f.write(json.dumps(dict(text=f'{"to be" if i else "or not"} {k}' * 3)) + '\n')
        prepare(name, 'bytes', input='web.jsonl')
    for seed in (0, 1):
        os.makedirs(f'net{seed}')
        net = tiny_net(seed, vocab_size=258, mask_id=257, block_size=32)
        save_net(net, tmp_path / f'net{seed}')
    rows = here(
        'eval.py', '--metric=shift', "--nets=('net0', 'net1')", '--device=cpu',
        "--datasets=('fineweb-2024-10', 'fineweb-2024-18')", '--max_tokens=100', '--num_mc=8',
    )['result']
    assert [row['net'] for row in rows] == ['net0', 'net1']
    one = here(
        'eval.py', '--metric=ppl', '--out_dir=net1', '--dataset=fineweb-2024-18', '--device=cpu',
        '--max_tokens=100', '--num_mc=8',
    )['result']
    assert one['rows'] == 3 and one['tokens'] == 96  # the first 100 tokens, in whole rows
    assert rows[1]['fineweb-2024-18'] == one['ppl']
    ratio = rows[1]['fineweb-2024-18'] / rows[1]['fineweb-2024-10']
    assert rows[1]['ratio'] == pytest.approx(ratio)


# --- scaling laws


def test_a_parabola_and_a_power_law_are_found_exactly():
    N = np.array([1e6, 2e6, 4e6, 9e6])
    log_n, error, loss, _ = isoflop_optimum(N, 0.3 * (np.log(N) - math.log(3e6)) ** 2 + 2.5)
    assert (log_n, error, loss) == pytest.approx((math.log(3e6), 0, 2.5), abs=1e-6)
    a, error, k = power_law([1e18, 1e19, 1e20], [0.1 * C ** 0.5 for C in (1e18, 1e19, 1e20)])
    assert (a, error, k) == pytest.approx((0.5, 0, 0.1), abs=1e-6)
    with pytest.raises(ValueError, match='no minimum'):
        isoflop_optimum(N, [1, 2, 2.5, 2.7])


def test_the_error_of_an_optimum_is_its_spread():
    rng, N = np.random.default_rng(0), np.geomspace(1e6, 1e7, 9)
    truth = 0.3 * (np.log(N) - math.log(3e6)) ** 2 + 2.5
    fits = [isoflop_optimum(N, truth + 0.01 * rng.standard_normal(9))[:2] for _ in range(400)]
    log_n, errors = np.array(fits).T
    assert np.mean(errors) == pytest.approx(log_n.std(), rel=0.15)  # 400 fits: 4% each
    assert abs(log_n.mean() - math.log(3e6)) < 5 * log_n.std() / 20


def write_run(net, folder, budget, loss, finished=True):
    folder.mkdir()
    save_net(net, folder)
    checkpoint = torch.load(folder / 'ckpt.pt', weights_only=False)
    iters = round(budget / (6 * net.num_params(embedding=False) * 8 * 16))
    checkpoint['constants'] |= dict(
        flops=budget, global_batch_size=8, block_size=16, max_iters=1, ssl_ratio=0.0)
    torch.save(checkpoint, folder / 'ckpt.pt')
    rows = [dict(iter=1, loss=9.0), dict(iter=iters - (not finished), val_loss=loss, val_bpb=1.0)]
    (folder / 'metrics.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))


def test_scaling_laws_of_finished_runs(tiny_net, here, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for budget in (1e9, 1e10):
        for width in (8, 16, 32, 64):
            net = tiny_net(vocab_size=258, mask_id=257, n_embd=width, cond_dim=0)
            N = net.num_params(embedding=False)
            best = 0.3 * budget ** 0.5
            loss = 0.1 * math.log(N / best) ** 2 + 50 * budget ** -0.1
            write_run(net, tmp_path / f'out-{width}-{budget:g}', budget, loss)
    result = here('eval.py', '--metric=scaling', '--runs=out-*')['result']
    assert [row['N'] for row in result['optima']] == pytest.approx([0.3e9 ** 0.5 * 0.3 ** 0.5,
                                                                    0.3 * 1e5], rel=1e-3)
    assert result['laws']['N'][0] == pytest.approx(0.5, abs=1e-4)
    assert result['laws']['D'][0] == pytest.approx(0.5, abs=1e-4)
    assert result['laws']['loss'][0] == pytest.approx(-0.1, abs=1e-4)
    assert 'N = 0.3 C^a, a = 0.5' in capsys.readouterr().out
    if importlib.util.find_spec('matplotlib'):
        assert os.path.getsize('results-isoflop.png') and os.path.getsize('results-laws.png')
    write_run(net, tmp_path / 'out-new', 1e9, 1.0, finished=False)
    with pytest.raises(ValueError, match='out-new is not finished'):
        here('eval.py', '--metric=scaling', '--runs=out-*')


def test_curves_tell_the_best_of_each_run_and_where(tiny_net, here, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    net = tiny_net(vocab_size=258, mask_id=257, cond_dim=0)
    for name, values in (('out-ar', (3.0, 2.0, 4.0)), ('out-mdm', (5.0, 3.5, 3.0))):
        write_run(net, tmp_path / name, 1e9, 1.0)
        rows = [dict(iter=step, val_loss=1.0, val_bpb=value)
                for step, value in zip((10, 20, 40), values, strict=True)]
        (tmp_path / name / 'metrics.jsonl').write_text(
            ''.join(json.dumps(row) + '\n' for row in [dict(iter=1, loss=9.0), *rows]))
    assert here('eval.py', '--metric=curves', '--runs=out-*')['result'][1] == dict(
        run='out-mdm', dataset='c-bytes', best_bits_per_byte=3.0, best_at=40 * 8 * 16,
        bits_per_byte=3.0, tokens=40 * 8 * 16)
    assert '| out-ar | c-bytes | 2 | 2,560 | 4 | 5,120 |' in capsys.readouterr().out
    if importlib.util.find_spec('matplotlib'):
        assert os.path.getsize('results-curves.png')
    with pytest.raises(ValueError, match='--metric=curves needs runs'):
        here('eval.py', '--metric=curves')
    with pytest.raises(ValueError, match='there is no nothing-'):
        here('eval.py', '--metric=curves', '--runs=out-ar,nothing-*')
