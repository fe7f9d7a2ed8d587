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
