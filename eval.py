"""
Measure a trained net, or samples:

    python eval.py --out_dir=out                        the NELBO of the validation split
    python eval.py --out_dir=out --metric=zero_shot     the same of MDLM's benchmarks, in one table
    python eval.py --estimator=duel --sampler=fixed --confidence=top_prob   a sampler's likelihood
    python eval.py --metric=samples --input=samples.jsonl --dataset=stdlib
                                generative perplexity, entropy, MAUVE, distinct-n, memorisation
    python eval.py config/eval_owt_mlm.py       the xlm experiment's table: samples in 128 ... steps
    python eval.py --metric=frontier            generative perplexity and entropy by temperature
    python eval.py config/eval_gsm8k.py         answers to prompts, judged; also eval_reverse.py
    python eval.py config/eval_smdm_harness.py  tasks of lm-evaluation-harness
    python eval.py --metric=curves --runs='out-*'  validation of several trainings, and a plot
    python eval.py --metric=report              results.jsonl -> results.md and plots

Under torchrun the processes share rows and samples; the figures are the same. A new metric is a
function and an entry of METRICS. The loglinear schedule masks with probability (1 - eps) t but
weighs by 1/t, as published: a NELBO by sampled times reads eps = 0.1% low, one by counts does not.
"""
from configurator import configure, require  # first: it answers Ctrl-C

import collections
import contextlib
import dataclasses
import datetime
import difflib
import functools
import glob
import hashlib
import inspect
import itertools
import json
import math
import os
import platform
import re
import sys
import textwrap
import time
import types
import uuid
import warnings

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from filelock import FileLock, Timeout
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from data import (
    BENCHMARKS, DATASETS, GPT2_XLM, MEASURED_AS, TokenRows, Tokenizer, find_or_prepare,
    get_tokenizer, key_of, permute, read_meta, splitmix64, vicuna_prompt)
from model import (
    OBJECTIVES, DiT, autocast, check_overrides, corrupt_batch, float64, in_blocks, is_packed,
    likelihood_of, load_pretrained, loglinear, on_grid, options_of, per_token_loss, pick_device,
    ratio_with_error, require_known, reuse_memory, row_sums, schedule_of, stratified_times,
    with_error, write_whole)
from sample import (
    check_output, check_sampler, default_sampler, flags, generate, tokenizer_of)

metric = 'ppl'          # a key of METRICS
out_dir = 'out'         # where train.py left ckpt.pt
init_from = None        # another source of weights for load_pretrained; None: out_dir
overrides = None        # [dict] ModelConfig fields that the source lacks; --n_head=4 sets one
ema = True              # the averaged weights; False: the last ones
device = 'auto'         # 'auto', 'cpu', 'cuda', 'cuda:1', 'mps'
dtype = 'float32'       # 'bfloat16' (autocast) is faster and reads a little differently
seed = 0
batch_size = 16         # [>= 1] rows through the net, or texts through the judge, at a time
results = 'results.jsonl'  # every result is appended to it, with the settings that made it

# likelihood (ppl, zero_shot)
dataset = None          # a folder in data/ or a name of data.py; None: what the net was trained on
tokenizer = None        # None: the one the checkpoint names
split = None            # None: 'test' for lm1b, ag_news, text8; else what training validated on
packing = None          # a key of data.PACKINGS; None: as trained, else 'wrap'
grouping = None         # [int >= 1] cut so many documents at a time, drop their rest (MDLM: 1000)
block_size = None       # [int >= 1] tokens a row; None: the net's
T = None                # [int >= 0] steps of the bound; 0: continuous time; None: as trained
estimator = None        # [time | count | duel] see nelbo; None: 'count' where it is defined
num_mc = 4              # [>= 1] times, or counts, drawn for each row (harness: SMDM has 1024)
max_rows = None         # [int >= 1] evaluate so many rows, spread over the split; None: all
max_tokens = None       # [int >= 1] evaluate the first tokens of the split; None: all, or as usual
datasets = (
    'ptb', 'wikitext2', 'lm1b', 'lambada', 'ag_news', 'scientific_papers_pubmed',
    'scientific_papers_arxiv')  # of zero_shot

# samples (samples, table, frontier); dataset: what MAUVE and memorisation compare with, '': nothing
input = None            # samples: a .jsonl file with a "text" field; None: draw them from the net
judge = 'gpt2-large'    # causal net of generative perplexity: a Hugging Face name or folder,
                        # or the out_dir of an ar net of ours
judge_dtype = None      # [float32 | bfloat16] None: as the weights' release, else float32
judge_length = 1024     # [int >= 1] texts are cut to so many tokens of the judge
protocol = None         # [xlm | mdlm] see PROTOCOLS; None: as the weights' release, else xlm
featurizer = 'gpt2-large'  # of MAUVE: a gpt2 or bert, Hugging Face name or folder; '': no MAUVE
num_samples = 16        # [>= 1]
length = None           # tokens a sample; None: the net's block_size
steps = 1024
sampler = None          # a sampler of sample.py; None: by the net's objective
sampler_options = None  # [dict] its own options; --eta=0.1 sets one
temperature = 1.0
top_p = None
top_k = 0
draw_dtype = 'float64'  # [float64 | float32] see draw() of sample.py
table_steps = (128, 256, 512, 1024)  # table, frontier: the steps of each column
temperatures = (0.7, 0.8, 0.9, 1.0, 1.1)  # frontier: of each curve
samplers = ()           # frontier: names, or dicts of one and its options; (): sampler
samples_dir = None      # they are kept here by steps; None: <out_dir>/samples, or /frontier
cfg_scale = 0.0         # generation, harness: guidance, as in sample.py

# generation: the net's answers to the prompts of `input`, a .jsonl file or {'name': FILE, ...};
# None: to those of `dataset`
prompt_template = '{prompt}'  # with fields of a row; 'vicuna': of MT-bench's questions
target_template = '{answer}'  # the right answer; '': answers are not judged
passes = 1              # [int >= 1] decode so often, each time from the text of the last (GSM8K: 2)
answer_pattern = None   # regular expression: the last match, or its group, is the answer
match = 'exact'         # [exact | contains | number | latex] answer against target, see MATCHES
bleu = False            # BLEU over characters besides (needs nltk)
answer_file = None      # write FastChat's answer file too, DATA/model_answer/MODEL.jsonl

# harness: tasks of lm-eval
tasks = None            # 'arc_easy,hellaswag', or a dict: task -> its own of the next constants
task_folder = None      # of YAML files in lm-eval's form, in place of its own tasks
num_fewshot = None      # [int >= 0] None: as the task says
method = 'chain_rule'   # [chain_rule | monte_carlo] of the likelihood; ar nets: exact
greedy = True           # [bool] tell which targets are what the net gives greedily
padding = False         # [bool] fill rows with masks up to block_size

# shift, curves and scaling: several nets
nets = ()               # sources of weights; datasets: where the likelihood is compared
runs = None             # out_dirs of train.py with commas between, or a pattern: 'out-scaling-*'
published = None        # [dict] to compare: zero_shot {'ptb': 95.26}, table {'gen_ppl': {128: 78}}


# -----------------------------------------------------------------------------
# likelihood


def ranks():
    """(rank, world_size), (0, 1) without torch.distributed."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def require_positive(**counts):
    for name, value in counts.items():
        good = type(value) is int and value >= 1
        require(good, f'{name}={value!r}: it must be a whole number of at least 1')


def not_nan(nats):
    require(not math.isnan(nats), 'the losses are not numbers: the weights are not, or overflow')
    return nats


def exp(nats):
    """The perplexity; inf where it overflows."""
    return math.exp(nats) if nats <= 709 else math.inf


def draw_times(u, stratum, num_strata, estimator, T, maskable, sampling_eps=1e-3):
    """Times (B,) of rows that share the uniform u, each in its stratum (B,). 'count': t = k/n, k
    uniform in 1 ... n, the number of maskable (B,) tokens. T > 0: on the grid of T steps."""
    if maskable.dim() == 2:  # of each block
        blocks = maskable.size(1)
        stratum = stratum[:, None] * blocks + torch.arange(blocks)
        num_strata *= blocks
    if estimator == 'time' and not T:
        return stratified_times(u, stratum, num_strata, sampling_eps)
    t = stratified_times(u, stratum, num_strata, eps=0)
    if T:
        return on_grid(t, T)
    return ((t * maskable).floor().clamp(max=maskable - 1) + 1) / maskable


@torch.no_grad()
def nelbo(
    net, rows, num_mc=1, batch_size=16, seed=0, max_rows=None, schedule=loglinear, T=0,
    options=None, estimator=None, progress=False, sampling_eps=1e-3, sampling=None,
):
    """The negative evidence lower bound of rows (data.TokenRows) by the net's own objective ('mlm':
    MDLM's equation 10; 'ar': the likelihood itself; one without a bound: its loss), in continuous
    time or in T steps, with num_mc draws a row, stratified within and over the rows.
    options: a dict with those of the loss, as d3pm's subs_masking.

    estimator 'time': each position is masked by chance at a drawn time. 'count': exactly k of n
    (of a block's n) are, k uniform in 1 ... n, and losses weigh n/k; the same mean but for eps,
    less variance (Ou et al. 2024, arXiv 2406.03736, section 3.3). 'duel': the likelihood under a
    sampler, see text_nll; sampling: dict of its sampler, steps and options. None: 'count' where it
    is defined.
    -> what model.likelihood_of gives, ppl, num_mc, estimator; 'duel': nfe, evaluations a row."""
    config, objective = net.config, net.config.objective
    bound = OBJECTIVES[objective].bound
    duel = estimator == 'duel' and not config.causal
    countable = bound == 'subs' and not config.time_conditioning and not T
    if estimator is None:
        estimator = 'count' if countable else 'time'
    by_count = estimator == 'count'
    require_known('estimator ', estimator, ('time', 'count', 'duel'))
    require(
        countable or not by_count,
        "estimator 'count' is for subs and mlm nets without time conditioning in continuous time")
    if config.causal or duel:
        num_mc = 1                                        # nothing is drawn
    n = len(rows) if max_rows is None else max_rows
    require_positive(num_mc=num_mc, batch_size=batch_size, max_rows=n)

    rank, world_size = ranks()
    device = next(net.parameters()).device
    options = options_of(bound or objective, (options or {}) | dict(importance=False))
    schedule = loglinear if by_count else schedule        # weighs by 1/t = n/k
    n = min(len(rows), n)
    chosen = np.arange(n) * len(rows) // n
    generator = torch.Generator().manual_seed(key_of(seed))
    u = torch.rand((), generator=generator, dtype=torch.float64)
    sums = torch.zeros(5, n, dtype=torch.float64)         # row_sums and nfe
    starts = range(rank * batch_size, n, world_size * batch_size)
    quiet = not progress or rank > 0
    for start in tqdm(starts, desc='rows', unit_scale=batch_size, disable=quiet):
        index = np.arange(start, min(start + batch_size, n))
        clean = rows[chosen[index]]
        if duel:
            nll, nfe = text_nll(net, clean, schedule=schedule, **sampling or {})
            sums[:, index] = torch.cat((row_sums(nll, clean, clean), nfe[None]))
            continue
        for j in range(num_mc):
            stratum = torch.from_numpy(permute(index, n, seed)) + j * n
            maskable = clean['maskable'].sum(dim=1)
            if config.block_length:
                maskable = in_blocks(clean['maskable'], config.block_length).sum(dim=2).clamp(min=1)
            t = draw_times(u, stratum, num_mc * n, estimator, T, maskable, sampling_eps)
            keys = [key_of(seed, row, j) for row in chosen[index]]
            batch = corrupt_batch(clean, t, config, schedule, keys, device, exactly=by_count)
            loss = per_token_loss(
                net, batch['x0'], batch['xt'], batch['t'], bound or objective, schedule, T,
                batch['masked'], batch['attention_mask'], reconstruction=True, **options)
            sums[:4, index] += row_sums(loss, batch, clean)
    if dist.is_initialized():
        sums = sums.to(device)
        dist.all_reduce(sums)
        sums = sums.cpu()
    sums /= num_mc                                        # exact for counts

    not_nan(float(sums.sum()))
    found = likelihood_of(sums[:4], rows.counts, objective)
    if duel:
        found['nfe'] = float(sums[4].mean())
    if bound:
        found['ppl'] = exp(found['nats_per_token'])
        found['ppl_se'] = found['ppl'] * found['nats_per_token_se']
    return found | dict(num_mc=num_mc, estimator=None if config.causal else estimator)


def text_nll(net, clean, **sampling):
    """-log p of rows of data.TokenRows under a sampler that chooses positions by the net alone
    (DUEL: Turok et al. 2026, arXiv 2603.01367). sampling: of generate(); temperature, top_k and
    top_p play no part. -> (B, L) nats, evaluations of the rows (B,)"""
    x0, attention_mask = clean['x0'], clean['attention_mask']
    require(not is_packed(attention_mask), "estimator 'duel' is not for packing 'documents'")
    lengths = attention_mask.sum(dim=1)
    start = x0.masked_fill(clean['maskable'], -1)
    template = [row[:L] for row, L in zip(start.tolist(), lengths.tolist(), strict=True)]
    out = generate(
        net, len(x0), lengths, template=template, text=x0, batch_size=len(x0), **sampling)
    return F.pad(-out.log_prob, (0, x0.size(1) - out.log_prob.size(1))), out.nfe


# -----------------------------------------------------------------------------
# likelihood of a continuation


def guided_log_probs(net, x, position, prompt_length, cfg_scale, attention_mask=None):
    """log p at the N positions (row, col) of x (B, L) -> (N, V) float32, the mask excluded; guided
    away from the net with the prompts, prompt_length (B,), masked (SMDM: Nie et al. 2024, arXiv
    2410.18514). The tensors may be the CPU's."""
    mask_id, device = net.config.mask_id, next(net.parameters()).device
    if attention_mask is not None and attention_mask.all():
        attention_mask = None
    parts = x, prompt_length, attention_mask, *position
    if x.device != device:
        parts = [part if part is None else part.to(device) for part in parts]
    x, prompt_length, attention_mask, *position = parts
    masked, length = x == (-1 if mask_id is None else mask_id), x.size(1)
    if attention_mask is not None:
        masked, length = masked & attention_mask, attention_mask.sum(dim=1)
    schedule = schedule_of(net.constants)
    sigma = schedule.conditioning_at(float64(masked).sum(dim=1) / length).float()
    logits = net.head(net.trunk(x, sigma, attention_mask)[tuple(position)])
    if cfg_scale:
        is_prompt = torch.arange(x.size(1), device=device) < prompt_length[:, None]
        x = x.masked_fill(is_prompt, mask_id)
        unconditional = net.head(net.trunk(x, sigma, attention_mask)[tuple(position)])
        logits = unconditional + (1 + cfg_scale) * (logits - unconditional)
    if mask_id is not None:
        logits[:, mask_id] = -torch.inf
    return logits.log_softmax(dim=-1)


def prefix_and_target(net, prefix, target, cfg_scale):
    """Both as tensors (P,), (n,). Raises ValueError for what does not fit the net."""
    config = net.config
    good = OBJECTIVES[config.objective].predicts in ('x0', 'next token')
    require(good, f'conditional likelihoods: for subs, mlm and ar nets, not {config.objective}')
    finite = type(cfg_scale) in (int, float) and -1 <= cfg_scale < math.inf
    require(finite, f'cfg_scale={cfg_scale!r}: it must be -1 or more, and finite')
    guided = cfg_scale and config.causal
    require(not guided, f'cfg_scale={cfg_scale}: a causal net does not know a masked prompt')
    pair = [torch.as_tensor(ids, dtype=torch.int64, device='cpu') for ids in (prefix, target)]
    V, mask_id, L = config.vocab_size, config.mask_id, config.block_size
    for name, ids in zip(('prefix', 'target'), pair, strict=True):
        good = ids.dim() == 1 and all(0 <= i < V and i != mask_id for i in ids.tolist())
        require(good, f'{name}: ids (n,) below {V}, not the mask, are needed')
    P, n = map(len, pair)
    begins = P > 0 or not config.causal
    require(begins, 'a causal net begins with a token: give a prefix, such as its BOS')
    found = f'prefix and target have {P} and {n} tokens'
    require(n > 0, f'{found}: at least one target token is needed')
    require(P + n <= L, f'{found}: they may have at most {L} in all')
    return pair


# Rows of a target: which of its n tokens each hides, and which it scores, (R, n) bool; weights (R,)


def causal_masks(n):
    """A causal net scores all in one row, and hides nothing."""
    return torch.zeros(1, n, dtype=torch.bool), torch.ones(1, n, dtype=torch.bool), torch.ones(1)


def chain_rule_masks(n):
    """Row i hides all from token i on, and scores this token."""
    column = torch.arange(n)
    return column >= column[:, None], column == column[:, None], torch.ones(n)


def monte_carlo_masks(n, num_mc, seed, eps):
    """Row i hides each token with probability t_i, and weighs it by 1/t_i (MDLM, equation 10).
    Of num_mc rows those that are the same become one, and those that hide nothing none."""
    generator = torch.Generator().manual_seed(key_of(seed))
    u = torch.rand((), generator=generator)
    t = stratified_times(u, torch.arange(num_mc), num_mc, eps)
    hidden = torch.rand(num_mc, n, generator=generator) < t[:, None]
    some = hidden.any(dim=1)
    hidden, same = hidden[some].unique(dim=0, return_inverse=True)
    weight = torch.zeros(len(hidden)).index_add_(0, same, 1 / (num_mc * t[some]))
    return hidden, hidden, weight


def side_by_side(config, pairs, hidden, scored, padding):
    """A row for each of the pairs, prefix and target: ids (B, W), and bool (B, W): inside the text,
    in its target, and of the target what is hidden and scored, given as (n,) each."""
    texts = [torch.cat(pair) for pair in pairs]
    x0 = pad_sequence(texts, batch_first=True)
    # a multiple of 8 is faster (on a CPU 32 columns take less than 27)
    width = min(-(-x0.size(1) // 8) * 8, config.block_size)
    if padding and not config.causal:
        width = config.block_size
    x0 = F.pad(x0, (0, width - x0.size(1)))
    column = torch.arange(width)
    inside = column < torch.tensor([len(text) for text in texts])[:, None]
    is_target = inside & (column >= torch.tensor([len(prefix) for prefix, _ in pairs])[:, None])
    hidden, scored = (torch.zeros_like(inside).masked_scatter(is_target, torch.cat(part))
                      for part in (hidden, scored))
    return x0, inside, is_target, hidden, scored


@torch.no_grad()
def evaluate_rows(net, pairs, rows, cfg_scale, padding, batch_size):
    """pairs: (P,), (n,); rows: (index of the pair, hidden (n,), scored (n,), weight) -> for each
    pair -log p of what is scored (k,) float64; are the net's best tokens the target's, (k,) bool:
    all of a causal net, else at the most confident position of a row that hides all or scores
    nothing; and where in the target this is (k,)."""
    mask_id, causal = net.config.mask_id, net.config.causal
    nats = torch.zeros(len(pairs), dtype=torch.float64)
    agrees = torch.ones(len(pairs), dtype=torch.bool)
    surest = torch.zeros(len(pairs), dtype=torch.int64)
    rows = iter(rows)
    while batch := list(itertools.islice(rows, batch_size)):
        index, hidden, scored, weight = zip(*batch, strict=True)
        some = [pairs[i] for i in index]
        x0, inside, is_target, hidden, scored = side_by_side(
            net.config, some, hidden, scored, padding)
        index, weight = torch.tensor(index), torch.stack(weight).double()
        P = torch.tensor([len(prefix) for prefix, _ in some])
        is_step = (hidden == is_target).all(dim=1) | ~scored.any(dim=1)  # of greedy unmasking
        row, col = (scored | hidden & is_step[:, None]).nonzero(as_tuple=True)
        if causal:
            log_p = guided_log_probs(net, x0, (row, col - 1), P, cfg_scale)
        else:
            x = torch.where(hidden | ~inside, mask_id, x0)
            attention_mask = None if padding else inside
            log_p = guided_log_probs(net, x, (row, col), P, cfg_scale, attention_mask)

        goal = x0[row, col]
        found = log_p.gather(1, goal[:, None].to(log_p.device)).squeeze(1).cpu().double()
        nats.index_add_(0, index[row], -found * weight[row] * scored[row, col])

        highest, best = (part.cpu() for part in log_p.max(dim=1))
        wrong = best != goal
        if not causal:
            confidence = torch.full(x0.shape, -torch.inf)
            confidence[row, col] = torch.where(is_step[row], highest, -torch.inf)
            most = confidence.argmax(dim=1)
            wrong &= is_step[row] & (most[row] == col)
            surest[index[is_step]] = (most - P)[is_step]
        agrees[index[row[wrong]]] = False
    return nats, agrees, surest


def conditional_nll(net, pairs, masks, cfg_scale=0.0, padding=False, batch_size=16):
    """Of pairs of prefix_and_target: -log p(target | prefix) by masks(n), as above -> nats (k,)
    float64; does the net give the target greedily (others than causal: in the first step)?"""
    require_positive(batch_size=batch_size)
    order = sorted(range(len(pairs)), key=lambda i: sum(map(len, pairs[i])))
    rows = ((i, *row) for i in order for row in zip(*masks(len(pairs[i][1])), strict=True))
    return evaluate_rows(net, pairs, rows, cfg_scale, padding, batch_size)[:2]


def reached_greedily(net, pairs, cfg_scale=0.0, padding=False, batch_size=16):
    """greedy_matches of pairs of prefix_and_target, for diffusion nets -> (k,) bool"""
    require(not net.config.block_length, 'greedy matches do not go with block_length: greedy=False')
    hidden = [torch.ones(len(target), dtype=torch.bool) for _, target in pairs]
    agrees, weight = torch.ones(len(pairs), dtype=torch.bool), torch.zeros(())
    left = sorted(range(len(pairs)), key=lambda i: sum(map(len, pairs[i])))
    while left:
        some = [pairs[i] for i in left]
        rows = ((k, hidden[i], hidden[i] & False, weight) for k, i in enumerate(left))
        _, agrees[left], surest = evaluate_rows(net, some, rows, cfg_scale, padding, batch_size)
        for i, position in zip(left, surest, strict=True):
            hidden[i][position] = False
        left = [i for i in left if agrees[i] and hidden[i].any()]
    return agrees


def masks_of(net, method, num_mc=None, seed=0, eps=None):
    """What conditional_nll takes: 'chain_rule' or 'monte_carlo', of a causal net its own."""
    num_mc = net.constants.get('mc_draws', 128) if num_mc is None else num_mc
    eps = net.constants.get('mc_eps', 1e-3) if eps is None else eps
    require_known('method ', method, ('chain_rule', 'monte_carlo'))
    require(method == 'chain_rule' or not net.config.block_length,
            "method 'monte_carlo' does not go with block_length: choose chain_rule or duel")
    require_positive(num_mc=num_mc)
    if net.config.causal:
        return causal_masks
    draw = functools.partial(monte_carlo_masks, num_mc=num_mc, seed=seed, eps=eps)
    return chain_rule_masks if method == 'chain_rule' else draw


def continuation_nll(
    net, prefix, target, method='chain_rule', cfg_scale=0.0, num_mc=None, padding=False,
    batch_size=16, seed=0, eps=None, sampler=None, steps=None, **options,
):
    """-log p(target | prefix) in nats, summed over the target; ids (P,), (n,) -> float.

    'chain_rule': the target from left to right, each token given those before it with all after it
    masked (SMDM), one row a token. 'monte_carlo': the bound, over num_mc low-discrepancy times in
    [eps, 1], the prefix always seen; None: as SMDM's release (1024, 0) for its weights, else 128
    and 1e-3. 'duel': exactly under a sampler in so many steps (None: one a token), with its
    options, see text_nll. 'ar' nets: exactly. cfg_scale: of guided_log_probs. padding: with masks
    to block_size, as SMDM evaluates. Raises ValueError for what does not fit the net."""
    pair = prefix_and_target(net, prefix, target, cfg_scale)
    if method == 'duel':
        require(not padding, "method 'duel' goes without padding")
        ids = torch.cat(pair)[None]
        maskable = torch.arange(ids.size(1))[None] >= len(pair[0])
        clean = dict(x0=ids, maskable=maskable, attention_mask=torch.ones_like(maskable))
        nats, _ = text_nll(
            net, clean, sampler=sampler, steps=len(pair[1]) if steps is None else steps,
            cfg_scale=cfg_scale, **options)
    else:
        good = sampler is None and steps is None and not options
        require(good, "a sampler, its steps and options go with method 'duel'")
        masks = masks_of(net, method, num_mc, seed, eps)
        nats, _ = conditional_nll(net, [pair], masks, cfg_scale, padding, batch_size)
    return not_nan(float(nats.sum()))


def greedy_matches(net, prefix, target, cfg_scale=0.0, padding=False):
    """Does unmasking the most confident position with its most probable token, one a step, give
    target? Of a causal net: from left to right. ids (P,), (n,) -> bool"""
    pairs = [prefix_and_target(net, prefix, target, cfg_scale)]
    if net.config.causal:
        return bool(conditional_nll(net, pairs, causal_masks)[1])
    return bool(reached_greedily(net, pairs, cfg_scale, padding))


# -----------------------------------------------------------------------------
# metrics of texts


@contextlib.contextmanager
def one_line(what):
    """Whatever a library raises while it loads something becomes one line."""
    try:
        yield
    except Exception as error:
        reason = f'{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}'
        raise ValueError(f'{what} cannot be loaded ({reason})') from None


ENGLISH = (
    'The city council met on Monday to talk about the price of water, and the mayor said that she '
    'would not raise it before the end of the year. Most of the people who came were glad of that.')


class OwnTokenizer:
    """A tokenizer of data.py that is called as those of transformers are."""

    def __init__(self, tok):
        self.tok, self.eos_token_id = tok, tok.eos_id
        self.all_special_tokens = [tok.decode([i]) for i in sorted(tok.special_ids)]

    def __call__(self, texts, **options):
        texts = [texts] if isinstance(texts, str) else texts
        rows = []
        for text in texts:
            parts = text.split(self.tok.decode([self.eos_token_id]))
            ids = [[*self.tok.encode(part), self.eos_token_id] for part in parts]
            rows.append(list(itertools.chain(*ids))[:-1])
        return dict(input_ids=rows)


class OwnJudge(torch.nn.Module):
    """An ar net of ours that is called as those of transformers are."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.config = types.SimpleNamespace(n_positions=net.config.block_size)

    def forward(self, ids, attention_mask=None):  # which pads on the right, where nobody looks
        logits = self.net(ids)
        if self.net.config.mask_id is not None:
            logits[..., self.net.config.mask_id] = -math.inf
        return types.SimpleNamespace(logits=logits)


def load_judge(name, device='cpu'):
    """(causal language model, its tokenizer) of a Hugging Face name or folder, or of an ar net of
    ours; else ValueError.
    Warns where English is no likelier to it than the same tokens backwards: it is not trained."""
    require(name, "judge='': samples are measured by a causal net: give a name, such as gpt2")
    if name.endswith('.pt') or os.path.isfile(os.path.join(name, 'ckpt.pt')):
        net = load_pretrained(name, device=device)
        model, tok = OwnJudge(net), OwnTokenizer(tokenizer_of(net))
    else:
        import transformers
        transformers.utils.logging.disable_progress_bar()
        with one_line(f"the judge '{name}'"):
            model = transformers.AutoModelForCausalLM.from_pretrained(
                name, dtype=torch.float32, trust_remote_code=False).to(device).eval()
            tok = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    x = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1]], device=device)
    ids = torch.tensor(tok([ENGLISH], add_special_tokens=False)['input_ids'], device=device)
    with torch.no_grad():
        first, second = model(x).logits[:, 0]
        texts = ids[:, :32], ids[:, :32].flip(1)
        forward, backward = [F.cross_entropy(model(text).logits[0, :-1], text[0, 1:]).item()
                             for text in texts]
    causal = torch.allclose(first, second, atol=1e-4)
    require(causal, f"the judge '{name}' looks ahead: a causal language model is needed")
    if not forward < backward - 0.5:
        print(
            f"warning: the judge '{name}' gives English {forward:.2f} nats/token and the same "
            f'tokens backwards {backward:.2f}: is it trained?', file=sys.stderr)
    return model, tok


def entropy_of(ids):
    """Entropy in nats of the histogram of ids."""
    _, counts = np.unique(np.asarray(ids), return_counts=True)
    p = counts / counts.sum()
    return float(-(p * np.log(p)).sum())


def mdlm_protocol(rows, eos):
    """As MDLM's release: texts keep their EOS, and one closes those shorter than the longest.
    Scored are the tokens up to the first EOS, itself included, and later ones that are no EOS.
    rows: lists of ids -> rows, scored (n,) bool of each, entropy of each"""
    longest = max(map(len, rows), default=0)
    closed = [ids + [eos] if len(ids) < longest else ids for ids in rows]
    is_eos = [np.array(ids) == eos for ids in closed]
    scored = [(ends.cumsum() == 1) | ~ends for ends in is_eos]
    return closed, scored, [entropy_of(ids) for ids in rows]


def xlm_protocol(rows, eos):
    """As the xlm experiment: all tokens of texts without special ones."""
    scored = [np.ones(len(ids), dtype=bool) for ids in rows]
    return rows, scored, [entropy_of(ids[1:]) for ids in rows]


PROTOCOLS = {'mdlm': mdlm_protocol, 'xlm': xlm_protocol}


@torch.no_grad()
def generative_perplexity(
    texts, judge='gpt2-large', protocol='mdlm', batch_size=8, max_length=1024, device='cpu',
    progress=False, judge_dtype='float32', generated_batch=None,
):
    """The perplexity of texts (str) under a causal judge: a name, a folder, or (model, tokenizer).

    Texts are cut to max_length tokens. Scored is what the protocol says but for the first token;
    texts without a scored token are skipped. 'xlm' expects texts as without_special leaves them;
    'mdlm' pads generated_batch texts together (None: all). judge_dtype: of the autocast.
    -> dict of gen_ppl (nats pooled over tokens), gen_ppl_se (texts being independent), gen_ppl_mean
    (mean over texts), entropy (nats, of a text's tokens, averaged), entropy_se, tokens, texts,
    skipped, protocol; the same for every batch_size. Raises ValueError if no text can be scored."""
    require_known('protocol ', protocol, PROTOCOLS)
    strings = not isinstance(texts, str) and all(isinstance(text, str) for text in texts)
    require(strings, 'texts: a list of str is needed')
    model, tok = load_judge(judge, device) if isinstance(judge, str) else judge
    closable = protocol != 'mdlm' or tok.eos_token_id is not None
    require(closable, "protocol 'mdlm' needs an EOS in the judge's tokenizer")

    device, config = next(model.parameters()).device, model.config
    limits = [getattr(config, key, 0) for key in ('n_positions', 'max_position_embeddings')]
    max_length = min([max_length, *filter(None, limits)])
    rows = tok(list(texts), add_special_tokens=False)['input_ids'] if texts else []
    rows = [ids[:max_length] for ids in rows]
    n = generated_batch or max(1, len(rows))
    parts = [
        PROTOCOLS[protocol](rows[i:i + n], tok.eos_token_id) for i in range(0, len(rows) or 1, n)]
    rows, scored, entropies = (list(itertools.chain(*part)) for part in zip(*parts, strict=True))
    kept = [i for i in range(len(rows)) if scored[i][1:].any()]
    require(kept, f'of {len(texts)} texts none has a token that can be scored')
    nats, counts = torch.zeros(2, len(rows), dtype=torch.float64)
    order = sorted(kept, key=lambda i: len(rows[i]))      # texts of one length together
    pad = functools.partial(pad_sequence, batch_first=True)
    starts = range(0, len(order), batch_size)
    for start in tqdm(starts, desc='judging', unit_scale=batch_size, disable=not progress):
        chunk = order[start:start + batch_size]
        ids = [torch.tensor(rows[i]) for i in chunk]
        attention_mask = pad([torch.ones_like(row) for row in ids]).to(device)
        loss_mask = pad([torch.from_numpy(scored[i]) for i in chunk])[:, 1:]
        ids = pad(ids).to(device)
        with autocast(device, judge_dtype):
            logits = model(ids, attention_mask=attention_mask).logits[:, :-1]
        pairs = zip(logits, ids[:, 1:], strict=True)
        nll = [F.cross_entropy(row.float(), goal, reduction='none') for row, goal in pairs]
        nats[chunk] = (torch.stack(nll).cpu().double() * loss_mask).sum(dim=1)
        counts[chunk] = loss_mask.double().sum(dim=1)
    nats, counts, n = nats[kept], counts[kept], len(kept)
    not_nan(float(nats.sum()))
    mean, error = ratio_with_error(nats, counts)
    entropies = np.array(entropies)[kept]
    entropy_se = entropies.std(ddof=1) / math.sqrt(n) if n > 1 else math.nan
    return dict(
        gen_ppl=exp(mean), gen_ppl_se=exp(mean) * error,
        gen_ppl_mean=float((nats / counts).exp().mean()), entropy=float(entropies.mean()),
        entropy_se=float(entropy_se), tokens=int(counts.sum()), texts=n, skipped=len(texts) - n,
        protocol=protocol)


def without_special(text, tok=None):
    """Text without the special tokens of GPT-2, of xlm's layout, and of a tokenizer."""
    for special in ('<|endoftext|>', *GPT2_XLM, *(tok.all_special_tokens if tok else ())):
        text = text.replace(special, '')
    return text


def comparable(n, references):
    """The n references that MAUVE compares n texts with."""
    usable = [text.strip() for text in references if len(text.strip()) >= 8]
    found = f'{n} texts, not empty, and {len(usable)} references of at least 8 characters'
    require(2 <= n <= len(usable), 'MAUVE takes as many references as texts, at least 2: '
            f'{found} are too few (--featurizer= leaves it out)')
    return usable[:n]


def mauve(texts, references, featurizer='gpt2-large', device='cpu'):
    """MAUVE (Pillutla et al. 2021, arXiv 2102.01454) as the xlm experiment computes it: all texts
    that are not empty, as many of the references, the first of at least 8 characters, all stripped,
    256 tokens, its own seed 25 -> dict of mauve, mauve_texts, mauve_skipped."""
    kept = [text.strip() for text in texts if text.strip()]
    references, device = comparable(len(kept), references), torch.device(device)
    with one_line(f"MAUVE with the featurizer '{featurizer}'"):
        from mauve import compute_mauve
        result = compute_mauve(
            p_text=references, q_text=kept, featurize_model_name=featurizer, seed=25,
            max_text_length=256, num_buckets='auto', batch_size=8, verbose=False,
            device_id=(device.index or 0) if device.type == 'cuda' else -1)
    skipped = len(texts) - len(kept)
    return dict(mauve=float(result.mauve), mauve_texts=len(kept), mauve_skipped=skipped)


def load_featurizer(name):
    """Raises ValueError if MAUVE or its featurizer cannot be had."""
    import transformers
    good = 'gpt2' in name or 'bert' in name
    require(good, f"featurizer='{name}': mauve-text needs gpt2 or bert in the name; '': no MAUVE")
    with one_line(f"the featurizer '{name}' of mauve-text"):
        import mauve as _  # noqa: F401 (is it installed?)
        transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def distinct(rows, n):
    """Distinct n-grams over all n-grams of rows, lists of ids; None where all are shorter."""
    grams = [tuple(row[i:i + n]) for row in rows for i in range(len(row) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def hashes(ids, n):
    """64-bit hashes of the n-grams of ids (N,) -> uint64 (N - n + 1,), none where it is shorter:
    a polynomial modulo 2^64, from differences of its running sum."""
    ids = splitmix64(np.asarray(ids).astype(np.uint64))
    if len(ids) < n:
        return ids[:0]
    factor = 0x9E3779B97F4A7C15                           # odd: it has an inverse
    powers = np.full(len(ids), factor, dtype=np.uint64).cumprod()
    inverse = np.full(len(ids) - n + 1, pow(factor, -1, 2 ** 64), dtype=np.uint64).cumprod()
    sums = np.cumsum(ids * powers)
    sums[n:] -= sums[:-n].copy()
    return sums[n - 1:] * inverse


def verbatim_shares(columns, path, dtype, n=20, chunk=2 ** 22):
    """Memorisation: for each of columns, lists of rows of ids, the fraction of its n-grams that
    stand in the bin of ids at path; None where all rows are shorter. The bin is read once."""
    none = np.zeros(0, dtype=np.uint64)
    ours = [np.concatenate([none, *(hashes(row, n) for row in rows)]) for rows in columns]
    wanted = np.unique(np.concatenate(ours))
    found = np.zeros(len(wanted), dtype=bool)
    sieve = np.zeros(2 ** 24, dtype=bool)                 # 24 bits tell most of them apart
    sieve[wanted >> np.uint64(40)] = True
    corpus = np.memmap(path, dtype=dtype, mode='r')
    for start in range(0, len(corpus) - n + 1 if len(wanted) else 0, chunk):
        theirs = hashes(corpus[start:start + chunk + n - 1], n)
        theirs = theirs[sieve[theirs >> np.uint64(40)]]
        place = np.searchsorted(wanted, theirs).clip(max=len(wanted) - 1)
        found[place[wanted[place] == theirs]] = True
    places = [np.searchsorted(wanted, grams) for grams in ours]
    return [float(found[place].mean()) if len(place) else None for place in places]


# -----------------------------------------------------------------------------
# samples


def read_lines(path, read, problem, name=''):
    """read(object) of each line of a .jsonl file. Raises ValueError, which names the line, where it
    holds none or `read` fails."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f'{name}{path}: there is no such file')
    found = []
    with open(path, encoding='utf-8-sig') as f:
        for number, line in enumerate(f, 1):
            try:
                found.append(read(json.loads(line)))
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                why = f'{problem} ({type(error).__name__}: {error})'
                raise ValueError(f'{path}, line {number}: {why}') from None
    require(found, f'{path} holds no text')
    return found


def read_texts(path):
    """The objects of a .jsonl file with a "text" field."""
    def read(row):
        row['text'].encode()                              # a string of whole characters
        return row
    return read_lines(path, read, 'not a JSON object with a "text" that is a string', 'input=')


def how_drawn(settings):
    """What a list of settings has in common, of those that are shown beside the measures."""
    shown = ('steps', 'sampler', 'top_p', 'temperature', 'batch_size')
    first, *others = [each if isinstance(each, dict) else {} for each in settings]
    return {
        key: first[key] for key in shown if first.get(key) is not None
        and all(each.get(key) == first[key] for each in others)}


def read_drawn(folder, settings):
    """number -> row of the samples in a folder; ValueError where other settings drew them."""
    def read(row):
        return row['row'], {**row['settings']}, row

    rows, settings = {}, json.loads(json.dumps(settings))  # as they will be read
    for path in glob.glob(os.path.join(glob.escape(folder), '*.jsonl')):
        for number, theirs, row in read_lines(path, read, 'no sample of eval.py'):
            rows[number] = row
            for key in theirs | settings:
                value, wanted = theirs.get(key), settings.get(key)
                message = f'{folder} holds samples drawn with {key}={value!r}, not {wanted!r}'
                require(value == wanted, f'{message}: remove it, or give another samples_dir')
    return rows


def kept_rows(folder, n, batch_size, settings, make):
    """Rows 0 ... n - 1 (dicts) by make(list of row numbers), kept in folder. Those already there
    are not made again. Raises ValueError where they were made with other settings (a dict), or
    another eval.py fills the folder."""
    rank, world_size = ranks()
    os.makedirs(folder, exist_ok=True)
    lock = contextlib.nullcontext()
    if rank == 0:
        try:
            lock = FileLock(f'{folder}.lock').acquire(timeout=0)
        except Timeout:
            advice = 'wait for it, or give another samples_dir'
            raise ValueError(f'{folder}: another eval.py draws into it: {advice}') from None
    with lock:
        done = read_drawn(folder, settings)
        missing = np.array([i for i in range(n) if i not in done], dtype=np.int64)
        batches = []                                      # of consecutive rows
        for run in np.split(missing, np.flatnonzero(np.diff(missing) != 1) + 1):
            batches += [run[i:i + batch_size].tolist() for i in range(0, len(run), batch_size)]
        if dist.is_initialized():
            dist.barrier()                                # all have read before one writes
        title = f'sampling {os.path.basename(folder)}'
        for batch in tqdm(batches[rank::world_size], desc=title, disable=rank > 0):
            lines = [json.dumps(dict(row=i) | row | dict(settings=settings)) + '\n'
                     for i, row in zip(batch, make(batch), strict=True)]
            path = os.path.join(folder, f'{batch[0]:06}-{batch[-1]:06}.jsonl')
            write_whole(path, ''.join(lines))
        if dist.is_initialized():
            dist.barrier()
        rows = read_drawn(folder, settings)
    return [rows[i] for i in range(n)]


def draw_rows(net, folder, n, settings, **options):
    """n samples of the net by sample.generate(**options), kept in folder -> dicts of ids, text and
    nfe."""
    tok = get_tokenizer(**net.tokenizer)

    def make(batch):
        out = generate(net, len(batch), first_row=batch[0], **options)
        columns = out.tokens.tolist(), out.length.tolist(), out.nfe.tolist()
        return [dict(ids=ids[:length], text=tok.decode(ids[:length]), nfe=nfe)
                for ids, length, nfe in zip(*columns, strict=True)]

    return kept_rows(folder, n, options['batch_size'], settings, make)


def streamed(total, buffer_size):
    """The order of `total` rows of one file in the shuffle buffer of datasets before version 5."""
    rng, buffer = np.random.default_rng(42), list(range(min(total, buffer_size)))
    for start in range(buffer_size, total, 1000):
        draws = rng.integers(0, buffer_size, size=1000).tolist()
        for i, row in zip(draws, range(start, total), strict=False):
            yield buffer[i]
            buffer[i] = row
    rng.shuffle(buffer)
    yield from buffer


def reference_texts(folder, split, tok, n, num_texts=1):
    """The first n documents of a split in the order that xlm compares num_texts texts with."""
    rows = TokenRows(folder, split, 1, 'concat')
    offsets, total = rows.offsets, len(rows.offsets) - 1
    chosen = itertools.islice(streamed(total, max(10_000, 20 * num_texts)), n)
    return [tok.decode(rows.tokens[offsets[i]:offsets[i + 1] - 1].tolist()) for i in chosen]


# -----------------------------------------------------------------------------
# results


def weights_hash(net):
    """The first 16 digits of the sha256 of the weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        raw = tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
        digest.update(name.encode() + raw.tobytes())
    return digest.hexdigest()[:16]


def record(path, **line):
    """Append a result, with what made it, to a .jsonl file."""
    line = json.loads(json.dumps(line), parse_constant=lambda name: None)  # NaN: null
    now = datetime.datetime.now().isoformat(timespec='seconds')
    line |= dict(time=now, torch=torch.__version__, python=platform.python_version())
    size = None
    try:
        with open(path, 'a', encoding='utf-8') as f:
            size = f.tell()
            f.write(json.dumps(line) + '\n')
    except OSError as error:
        if size is not None:
            os.truncate(path, size)
        raise OSError(f'{path} cannot be written ({error.strerror}); what it lacks: '
                      f"{json.dumps(line['result'])}") from None


def read_results(path):
    """(metric, row of the report) of each result in a file of `record`."""
    def read(line):
        row = dict(source=line['source']) | line['result']
        row |= dict(seed=line['settings']['seed'], weights=line['weights'])
        released = line.get('released')
        return line['metric'], row | (dict(settings=released) if released else {})
    return read_lines(path, read, 'not a result of eval.py')


def chosen(row, keys):
    return {key: row[key] for key in keys if key in row}


def cell(value, error):
    if value is None:
        return ''
    if type(value) is int:
        return f'{value:,}'
    text = f'{value:.4g}' if isinstance(value, float) else str(value)
    return f'{text} ± {error:.2g}' if error and math.isfinite(error) else text


def table(rows):
    """Markdown of a list of dicts, in the order of their keys; key_se is the error beside key."""
    keys = list(dict.fromkeys(key for row in rows for key in row if not key.endswith('_se')))
    lines = [keys, *([cell(row.get(key), row.get(key + '_se')) for key in keys] for row in rows)]
    lines = ['| ' + ' | '.join(line) + ' |' for line in lines]
    return '\n'.join([lines[0], '|' + '---|' * len(keys), *lines[1:]])


def plot(rows, x, ys, path, along='steps'):
    """A panel for each of ys that was measured against x, in it a line for each way to draw samples
    but for `along` -> is there one? Raises ImportError without matplotlib."""
    ys = [y for y in ys if any(row.get(x) and row.get(y) is not None for row in rows)]
    if not ys:
        return False
    from matplotlib import pyplot
    pyplot.switch_backend('Agg')
    keys = ('source', 'sampler', 'steps', 'top_p', 'temperature', 'judge', 'protocol')
    keys = [key for key in keys if key != along and len({row.get(key) for row in rows}) > 1]
    lines = collections.defaultdict(list)
    for row in rows:
        lines[', '.join(f'{key} {row[key]}' for key in keys if key in row)].append(row)
    figure, axes = pyplot.subplots(
        1, len(ys), figsize=(4 * len(ys), 3.2), squeeze=False, layout='constrained')
    for axis, y in zip(axes[0], ys, strict=True):
        for label, line in lines.items():
            points = {(row[x], row[y], row.get(x + '_se') or 0, row.get(y + '_se') or 0)
                      for row in line if row.get(x) and row.get(y) is not None}
            xs, values, x_errors, errors = np.array(sorted(points)).reshape(-1, 4).T
            axis.errorbar(xs, values, errors, x_errors, marker='o', capsize=3, label=label)
        scales = ['log' if name in ('steps', 'tokens', 'gen_ppl') else 'linear' for name in (x, y)]
        axis.set(xlabel=x, ylabel=y.replace('_', ' '), xscale=scales[0], yscale=scales[1])
        axis.grid(alpha=0.3)
    if keys:
        handles, labels = axes[0][0].get_legend_handles_labels()
        labels = [textwrap.fill(label, 56 * len(ys)) for label in labels]
        figure.legend(handles, labels, loc='outside lower center', fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return True


def report(path):
    """results.jsonl -> results.md and plots beside it."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f'there is no {path}: every run of eval.py appends to it')
    kinds = collections.defaultdict(list)
    for metric, row in read_results(path):
        kinds[metric].append(row)
    text = '\n\n'.join(f'## {kind}\n\n{table(rows)}' for kind, rows in kinds.items())
    drawn = [row for row in kinds['table'] + kinds['samples'] if row.get('gen_ppl')]
    stem = os.path.splitext(path)[0]
    write_whole(stem + '.md', text + '\n')                # whatever becomes of the plots
    try:
        for name, rows, x, ys, along in (
                ('steps', drawn, 'steps', ('gen_ppl', 'entropy', 'mauve'), 'steps'),
                ('entropy', drawn, 'entropy', ('gen_ppl',), 'steps'),
                ('frontier', kinds['frontier'], 'entropy', ('gen_ppl', 'nfe'), 'temperature')):
            if plot(rows, x, ys, f'{stem}-{name}.png', along):
                text += f'\n\n![{name}]({os.path.basename(stem)}-{name}.png)'
    except ImportError:
        text += '\n\nNo plots: they need matplotlib (pip install matplotlib).'
    write_whole(stem + '.md', text + '\n')
    return text


# -----------------------------------------------------------------------------
# what --metric names: functions of the constants, c -> results, which they record, and the text to
# print


@dataclasses.dataclass
class Run:
    """What is measured, and the constants."""
    c: types.SimpleNamespace
    source: str               # of the weights, or of the texts
    device: torch.device = None
    net: DiT = None           # None: texts come from a file
    tok: Tokenizer = None
    weights: str = None       # weights_hash

    def trained(self, key, default=None):
        """A constant, or where it is None what the net was trained with."""
        value = getattr(self.c, key, None)
        if value is None and self.net:
            value = self.net.constants.get(key)
        return default if value is None else value

    def having(self, **constants):
        """The same with other constants."""
        return dataclasses.replace(self, c=types.SimpleNamespace(**vars(self.c) | constants))

    def record(self, result):
        if ranks()[0] > 0:
            return
        settings = {key: value for key, value in vars(self.c).items() if value is not None}
        released = settings.pop('released', None)
        record(
            self.c.results, metric=self.c.metric, source=self.source, result=result,
            released=released, weights=self.weights, settings=settings)


def load(c, source=None):
    """The net and its tokenizer. Starts torch.distributed under torchrun."""
    source = str(source or c.init_from or c.out_dir)
    device = pick_device(c.device, int(os.environ.get('LOCAL_RANK', 0)))
    if device.type == 'cpu':
        reuse_memory()
    path = os.path.join(source, 'ckpt.pt') if source == c.out_dir else source
    net = load_pretrained(path, c.ema, device, **(c.overrides or {}))
    if c.tokenizer or net.tokenizer is None:
        net.tokenizer = (net.tokenizer or {}) | dict(name=str(c.tokenizer or 'gpt2'))
    tok = tokenizer_of(net)
    if 'RANK' in os.environ and not dist.is_initialized():
        options = dict(backend='gloo', timeout=datetime.timedelta(hours=4))
        if device.type == 'cuda':
            torch.cuda.set_device(device)
            options |= dict(backend='nccl', device_id=device)
        dist.init_process_group(**options)
    return Run(c, source, device, net, tok, weights_hash(net))


def dataset_of(folder):
    """What the data were made from."""
    return read_meta(folder)['source']['dataset']


def split_of(run, folder, name):
    """The split that is measured of the data that are called so."""
    net = run.net.constants if run.net else {}
    own = net.get('val_split') if name == net.get('dataset') else None
    return run.c.split or BENCHMARKS.get(dataset_of(folder)) or own or 'validation'


def likelihood(run, name):
    """nelbo of the data that are called so."""
    c, net, folder = run.c, run.net, find_or_prepare(name, run.tok.name)
    split, usual = split_of(run, folder, name), MEASURED_AS.get(dataset_of(folder), {})
    packing = c.packing or usual.get('packing') or run.trained('packing', 'wrap')
    max_tokens = c.max_tokens or usual.get('max_tokens')
    block_size = net.config.block_size if c.block_size is None else c.block_size
    if net.config.causal and packing in ('concat', 'crop'):
        block_size += 1                                   # the first token is not predicted
    pad_to, padding = run.trained('pad_to', 'block'), run.trained('loss_on_padding', True)
    if packing == 'pair' and (net.config.causal or pad_to == 'batch'):
        padding = False                                   # or it would depend on the batch
    rows = TokenRows(folder, split, block_size, packing, padding, pad_to, c.grouping)
    rows.first_given = run.trained('first_given', False)
    if max_tokens:
        rows.length = min(rows.length, max_tokens // block_size)
        require(rows.length, f'max_tokens={max_tokens} are less than a row of {block_size}')
    ours, theirs = run.tok.meta(), rows.meta['tokenizer']
    require(ours == theirs, f'the net has ids of the tokenizer {ours}, the data those of {theirs}')
    schedule, how = schedule_of(net.constants), {}
    sampling = dict(cfg_scale=c.cfg_scale) | (c.sampler_options or {})
    if c.estimator == 'duel':
        how = dict(sampler=sampler_of(run), steps=c.steps)
        check_sampler(net.config, how['sampler'], c.sampler_options or {})
    with autocast(run.device, c.dtype):
        result = nelbo(
            net, rows, c.num_mc, c.batch_size, c.seed, c.max_rows, schedule, run.trained('T', 0),
            net.constants, c.estimator, progress=True, sampling=how | sampling,
            sampling_eps=run.trained('sampling_eps', 1e-3))
    kept = float(schedule.alpha(torch.ones((), dtype=torch.float64)))
    if result['estimator'] == 'time' and kept > 0.01 and ranks()[0] == 0:
        print(f'warning: the schedule leaves {kept:.1%} of the tokens unmasked at t = 1: without '
              'a term for these this is no bound of the likelihood', file=sys.stderr)
    return dict(dataset=name, split=split) | how | result


def measure_ppl(c):
    """The NELBO of one split."""
    run = load(c)
    name, objective = run.trained('dataset'), run.net.config.objective
    require(name is not None, 'the weights do not say which data to measure: give --dataset=NAME')
    r = likelihood(run, name)
    run.record(r)
    if 'nfe' in r:
        what = 'NLL'
        how = f"by {r['sampler']} in {r['steps']} steps, {r['nfe']:.1f} evaluations a row"
    else:
        what = 'NLL' if run.net.config.causal else 'NELBO'
        how = f"x {r['num_mc']} {r['estimator']}s" if r['estimator'] else 'in one pass'
    what = objective if objective in r else what
    lines = [
        f"{what} of {run.source} on {name}/{r['split']}, {r['rows']:,} rows {how}, "
        f"{r['tokens']:,} tokens ({r['document_tokens']:,} of documents)"]
    for key, digits, unit in (
            ('nats_per_token', 4, 'nats/token'), ('ppl', 2, 'perplexity (exp of nats/token)'),
            ('bits_per_byte', 4, 'bits/byte'), (objective, 4, 'a token, no bound of likelihood')):
        if key in r:
            lines.append(f"  {with_error(r[key], r[key + '_se'], digits)} {unit}")
    return r, '\n'.join(lines)


def measure_zero_shot(c):
    """The NELBO of many datasets. A ValueError names those that fail, after the others."""
    run, rows, failed = load(c), [], []
    objective = run.net.config.objective
    shown = (
        'dataset', 'split', 'ppl', 'ppl_se', 'nats_per_token', 'nats_per_token_se',
        'bits_per_byte', 'bits_per_byte_se', objective, f'{objective}_se', 'tokens')
    for name in c.datasets:
        try:
            folder = find_or_prepare(name, run.tok.name)
            origin = dataset_of(folder)
            good = origin == name or name not in DATASETS
            require(good, f'{folder} was made from {origin}, which is not the benchmark')
            result = likelihood(run, name)
        except (ValueError, OSError) as error:
            failed.append(f'{name}: {error}')
            continue
        run.record(result)
        rows.append(chosen(result, shown) | dict(published=(c.published or {}).get(name)))
    text = table(rows)
    if failed and rows and ranks()[0] == 0:
        print(text)
    count = f'{len(failed)} of {len(c.datasets)}'
    require(not failed, f"{count} datasets could not be measured: {'; '.join(failed)}")
    return rows, text


def load_references(run, num_texts):
    """What samples are compared with: a folder of data, its tokenizer and, for MAUVE, a function
    n -> documents to compare n texts with; Nones where there are no data."""
    c, name, folder = run.c, run.trained('dataset'), None
    own = run.tok.name if run.tok else 'gpt2'
    try:
        folder = find_or_prepare(name, str(c.tokenizer or own)) if name else None
    except FileNotFoundError as error:
        if c.dataset is not None:
            raise
        print(f'no MAUVE and no memorisation: {error}')
    if not folder:
        return None, None, None
    tok = get_tokenizer(read_meta(folder)['tokenizer']['name'], folder)
    if not c.featurizer:
        return folder, tok, None
    load_featurizer(c.featurizer)

    def references(n):
        return reference_texts(folder, split_of(run, folder, name), tok, 2 * n + 100, n)

    comparable(num_texts, references(num_texts))
    return folder, tok, references


def sampler_of(run):
    return run.c.sampler or default_sampler(run.net.config)


def home_of(run, name):
    """The folder where samples are kept."""
    home = run.source if os.path.isdir(run.source) else run.c.out_dir
    return run.c.samples_dir or os.path.join(home, name)


def sampling(run, own):
    """(arguments of generate(), the settings that a kept sample must have). own: sampler_options"""
    c, config = run.c, run.net.config
    shared = dict(
        length=config.block_size if c.length is None else c.length, sampler=c.sampler,
        steps=c.steps, temperature=c.temperature, top_p=c.top_p, top_k=c.top_k, seed=c.seed)
    if c.draw_dtype != 'float64':
        shared |= dict(draw_dtype=c.draw_dtype)
    settings = shared | dict(
        sampler_options=own or None, dtype=c.dtype, weights=run.weights,
        model=dataclasses.asdict(config))
    return shared | dict(batch_size=c.batch_size) | own, settings


def draw(run):
    """(folder, num_samples, settings, options) of draw_rows, by the constants. Raises ValueError
    where the folder holds other samples."""
    c, own = run.c, dict(run.c.sampler_options or {})
    if sampler_of(run) == 'ar' and run.trained('protocol') == 'mdlm':
        own.setdefault('eos_id', -1)                      # to full length, as released
    options, settings = sampling(run, own)
    if own.get('across_rows'):                            # a row depends on those beside it
        settings |= dict(batch_size=c.batch_size)
    folder = os.path.join(home_of(run, 'samples'), str(c.steps))
    read_drawn(folder, settings)
    return folder, c.num_samples, settings, options


def quality(run, columns, drawn, measures):
    """All that is measured of each of columns, lists of texts -> dicts. drawn: for each, a dict of
    how. measures: see measured."""
    c, (judge, (folder, reference_tok, references)) = run.c, measures
    tok, verbatim, results = judge[1], None, []
    protocol, judge_dtype = run.trained('protocol', 'xlm'), run.trained('judge_dtype', 'float32')
    plain = [[without_special(text, tok) for text in texts] for texts in columns]
    meta = read_meta(folder) if folder else dict(splits=())
    if 'train' in meta['splits']:
        ids = [[reference_tok.encode(text) for text in texts] for texts in plain]
        dtype = np.dtype(meta['dtype']).newbyteorder('<')
        verbatim = verbatim_shares(ids, os.path.join(folder, 'train.bin'), dtype)
    for i, texts in enumerate(plain):
        result = drawn[i] | dict(judge=c.judge, judge_dtype=judge_dtype)
        generated_batch = result.pop('batch_size', None)
        result |= generative_perplexity(
            texts if protocol == 'xlm' else columns[i], judge, protocol, min(c.batch_size, 8),
            c.judge_length, progress=True, judge_dtype=judge_dtype, generated_batch=generated_batch)
        ids = tok(texts, add_special_tokens=False, verbose=False)['input_ids']
        result |= {f'distinct_{n}': distinct(ids, n) for n in (1, 2, 3)}
        if verbatim:
            result['verbatim_20'] = verbatim[i]
        if references:
            n = sum(bool(text.strip()) for text in texts)
            result |= mauve(texts, references(n), c.featurizer, device=run.device)
        run.record(result)
        results.append(result)
    return results


def measured(run, points):
    """quality of samples of the net; points: runs with the constants of each."""
    drawings, columns, drawn = [draw(point) for point in points], [], []
    rank, c = ranks()[0], run.c
    if rank == 0:                                         # what can fail fails before the sampling
        measures = load_judge(c.judge, run.device), load_references(run, c.num_samples)
    for point, (*where, options) in zip(points, drawings, strict=True):
        with autocast(run.device, c.dtype):
            rows = draw_rows(run.net, *where, **options)
        columns.append([row['text'] for row in rows])
        nfe = np.array([row['nfe'] for row in rows])
        nfe_se = nfe.std() / math.sqrt(max(1, len(nfe) - 1))
        constants = dict(label=sampler_of(point)) | vars(point.c)
        how = how_drawn([constants | dict(sampler=constants['label'])])
        drawn.append(how | dict(nfe=float(nfe.mean()), nfe_se=float(nfe_se)))
    return quality(run, columns, drawn, measures) if rank == 0 else []


def measure_samples(c):
    """The quality of the texts of a file, or of samples of the net."""
    if str(c.input).endswith('.jsonl'):
        require('RANK' not in os.environ, 'samples in a file are measured without torchrun')
        run, rows = Run(c, str(c.input), pick_device(c.device)), read_texts(c.input)
        measures = load_judge(c.judge, run.device), load_references(run, len(rows))
        drawn = how_drawn([row.get('settings') for row in rows])
        found = quality(run, [[row['text'] for row in rows]], [drawn], measures)
    else:
        run = load(c, c.input)
        found = measured(run, [run])
    return found, table(found)


def measure_table(c):
    """The quality of samples of the net in each number of table_steps."""
    run, rows = load(c), []
    if c.released and ranks()[0] == 0:
        steps = f'{c.table_steps[0]} … {c.table_steps[-1]}'
        judge = run.trained('judge_dtype', 'float32')
        print(f'sampler {sampler_of(run)}, {c.dtype}, judge {judge}, T {steps}', flush=True)
    shown = (
        'steps', 'gen_ppl', 'gen_ppl_se', 'gen_ppl_mean', 'entropy', 'entropy_se', 'mauve',
        'mauve_texts', 'distinct_2', 'verbatim_20', 'texts', 'skipped')
    for result in measured(run, [run.having(steps=steps) for steps in c.table_steps]):
        known = (c.published or {}).items()
        published = {f'{key} published': values.get(result['steps']) for key, values in known}
        rows.append(chosen(result, shown) | published)
    return rows, table(rows)


def measure_frontier(c):
    """Generative perplexity and entropy of the samplers at each of temperatures, in each number of
    table_steps (arXiv 2604.02718: a single point of a curve cannot be compared)."""
    run, points = load(c), []
    given = c.samplers or [dict(sampler=sampler_of(run)) | (c.sampler_options or {})]
    require(c.temperatures, 'temperatures=(): --metric=frontier needs one at least')
    for entry, steps, temperature in itertools.product(given, c.table_steps, c.temperatures):
        own = dict(entry) if isinstance(entry, dict) else dict(sampler=entry)
        name = own.pop('sampler', None)
        check_sampler(run.net.config, name, own)
        label = ' '.join([name, *(f'{key}={value}' for key, value in own.items())])
        folder = re.sub(r'[^\w.-]+', '_', f'{label} {temperature}')
        points.append(run.having(
            sampler=name, sampler_options=own, steps=steps, temperature=temperature, label=label,
            samples_dir=os.path.join(home_of(run, 'frontier'), folder)))
    shown = (
        'sampler', 'steps', 'temperature', 'nfe', 'nfe_se', 'gen_ppl', 'gen_ppl_se', 'entropy',
        'entropy_se', 'mauve', 'distinct_2', 'texts', 'skipped')
    rows = [chosen(result, shown) for result in measured(run, points)]
    return rows, table(rows)


def against_release(constants, in_config):
    """What differs from the config of a published table, which is as released."""
    ours = ('metric', 'out_dir', 'device', 'seed', 'results', 'samples_dir', 'batch_size')
    changed = [
        f'{key}={value!r} (released: {in_config[key]!r})' for key, value in constants.items()
        if key not in ours and value != in_config[key]]
    return f"not as released: {', '.join(changed)}" if changed else 'as released'


def show_report(c):
    print(report(c.results))
    raise SystemExit


# -----------------------------------------------------------------------------
# prompts and answers: a task is a file of rows, templates, a sampler, and how answers are judged


def encode(tok, text):
    """The ids of a text that begins a row."""
    return [tok.bos_id, *tok.encode(text)]


def plain_text(tok, ids):
    return tok.decode([i for i in ids if i not in tok.special_ids])


def fastchat_answer(text):
    """What MT-bench's judge sees of a text that was decoded with its special tokens."""
    for special in ('<s>', '</s>', '<unk>'):
        text = text.replace(special, '')
    return text.strip()


def read_tasks(path, prompt_template, target_template):
    """(rows, prompts, targets) of a .jsonl file; the templates name the fields of its rows.
    Targets are None where there is no template."""
    require(not os.path.isdir(path), f'input={path} is a folder: give one file; eval_reverse.py '
            'takes one if it stands before: --input=FOLDER config/eval_reverse.py')

    def read(row):
        vicuna = prompt_template == 'vicuna'
        prompt = vicuna_prompt(row['turns'][0]) if vicuna else prompt_template.format(**row)
        return row, prompt, target_template.format(**row) if target_template else None

    templates = f'{prompt_template!r} and {target_template!r}'
    problem = f'not a JSON object with the fields of the templates {templates}'
    return zip(*read_lines(path, read, problem, 'input='), strict=True)


def read_pairs(run):
    """{a name: the same} of a split of prompts and answers that data.py made."""
    name = run.trained('dataset')
    folder = find_or_prepare(name, run.tok.name)
    split = split_of(run, folder, name)
    pairs = TokenRows(folder, split, run.net.config.block_size, 'pair')
    rows = []
    for i in pairs.kept:
        ids, n = pairs.document(i).tolist(), pairs.prompt[i]
        rows.append(dict(prompt=plain_text(run.tok, ids[:n]), answer=plain_text(run.tok, ids[n:])))
    columns = rows, [row['prompt'] for row in rows], [row['answer'] for row in rows]
    return {f'{name} {split}': columns}


def last_match(pattern, text, otherwise=''):
    """The group of the last match of a pattern, or all of it where it has no group."""
    found = otherwise
    for match in re.finditer(pattern, text):
        found = match[min(1, match.re.groups)] or ''
    return found


# what GSM8K's evaluation deletes from an answer, in this order
UNITS = (
    'square', 'ways', 'integers', 'dollars', 'mph', 'inches', 'ft', 'hours', 'km', 'units',
    r'\ldots', 'sue', 'points', 'feet', 'minutes', 'digits', 'cents', 'degrees', 'cm', 'gm',
    'pounds', 'meters', 'meals', 'edges', 'students', 'childrentickets', 'multiples', r'\text{s}',
    r'\text{.}', '\\text{\ns}', r'\text{}^2', r'\text{}^3', '\\text{\n}', r'\text{}',
    r'\mathrm{th}', r'^\circ', r'^{\circ}', r'\;', r',\!', '{,}', '"', r'\dots')
REPLACED = (
    ('an ', ''), ('a ', ''), ('.$', '$'), (r'\$', ''), ('\\ ', ''), (r'\%', '%'), (' ', ''),
    ('mbox', 'text'), (r',\text{and}', ','), (r'\text{and}', ','), (r'\text{m}', r'\text{}'),
    *((unit, '') for unit in UNITS))
UNWRAPPED = (
    (r'.*?\$(.*?)\$.*', r'$\1$'), (r'\\text\{(.*?)\}', r'\1'), (r'\\textbf\{(.*?)\}', r'\1'),
    (r'\\overline\{(.*?)\}', r'\1'), (r'\\boxed\{(.*)\}', r'\1'),
    (r'frac([^{])(.)', r'frac{\1}{\2}'), (r'sqrt([^{])', r'sqrt{\1}'), (r'\$', ''))


def normalized(answer):
    """A number or formula as GSM8K's evaluation compares it (Lewkowycz et al. 2022, Minerva,
    appendix D.1)."""
    answer = answer.rpartition('=')[2]
    for old, new in REPLACED:
        answer = answer.replace(old, new)
    for pattern, new in UNWRAPPED:
        answer = re.sub(pattern, new, answer)
    if answer.replace(',', '').isdigit():
        answer = answer.replace(',', '')
    return answer


def same_number(prediction, target):
    return normalized(prediction) == normalized(target)


def same_formula(prediction, target):
    """The same, but what sympy reads as LaTeX is compared by value."""
    with one_line("match='latex' (pip install sympy antlr4-python3-runtime==4.11)"):
        import sympy
        from sympy.parsing.latex import parse_latex
        parse_latex('1')
    prediction, target = normalized(prediction), normalized(target)
    try:
        difference = parse_latex(prediction) - parse_latex(target)
    except Exception:  # antlr's and sympy's own
        return prediction == target
    try:
        return bool(sympy.simplify(difference) == 0)
    except Exception:
        return False


MATCHES = {
    'exact': lambda prediction, target: prediction.strip() == target.strip(),
    'contains': lambda prediction, target: target.strip().lower() in prediction.strip().lower(),
    'number': same_number,
    'latex': same_formula,
}


def same_answer(generation, target, pattern='#### (.*)$', match='number'):
    """GSM8K's verdict on a whole generation: what the last match of the pattern holds against the
    target, both normalized, as strings, as the released environment has no LaTeX parser;
    match='latex' as it would with one."""
    return MATCHES[match](last_match(pattern, generation), target)


def character_bleu(prediction, target):
    """BLEU-4 over characters, stripped and in lower case, as SMDM's release measures it."""
    with one_line('nltk, which computes BLEU (pip install nltk),'):
        from nltk.translate.bleu_score import sentence_bleu
    with warnings.catch_warnings(action='ignore'):        # an order without a match
        return float(sentence_bleu([target.strip().lower()], prediction.strip().lower()))


def decode_prompts(net, tok, prompts, passes, length, seed, first_row, **options):
    """What the net makes of prompts in `length` tokens, prompt included -> (ids of each without its
    prompt, text). Each further pass goes on from the whole text of the one before, encoded again:
    then ids and text of the whole. A prompt that is too long: 'ERROR'."""
    texts, results = list(prompts), [([], 'ERROR')] * len(prompts)
    for k in range(passes):
        ids = [encode(tok, text) for text in texts]
        fit = [i for i, row in enumerate(ids) if len(row) <= length and (k == 0 or results[i][0])]
        if not fit:
            break
        out = generate(
            net, len(fit), length, prompt=[ids[i] for i in fit], seed=seed + k,
            numbers=[first_row + i for i in fit], **options)
        for i, row, n in zip(fit, out.tokens.tolist(), out.length.tolist(), strict=True):
            made = row[0 if passes > 1 else len(ids[i]):n]
            texts[i] = plain_text(tok, made)
            results[i] = made, texts[i]
    return results


def judge_answers(c, name, path, prompts, targets, drawn):
    """The table's row of a task. What was said to each prompt goes to a .jsonl file at path."""
    items = []
    for prompt, target, row in zip(prompts, targets, drawn, strict=True):
        said = row['text']
        item = dict(prompt=prompt, generation=said)
        if target is not None:
            if c.bleu:
                item |= dict(bleu=character_bleu(said, target))
            if c.answer_pattern:
                said = last_match(c.answer_pattern, said)
                target = last_match(c.answer_pattern, target, target)
            item |= dict(answer=target, verdict=MATCHES[c.match](said, target))
        items.append(item)
    write_whole(path, ''.join(json.dumps(item) + '\n' for item in items))
    n, result = len(items), dict(task=name, items=len(items))
    verdicts = [item['verdict'] for item in items if 'verdict' in item]
    bleu = [item['bleu'] for item in items if 'bleu' in item]
    if verdicts:
        k = sum(verdicts)
        q = k / n if 0 < k < n else (k + 1) / (n + 2)     # none or all: Laplace's, or it would be 0
        result |= dict(correct=k, accuracy=k / n, accuracy_se=math.sqrt(q * (1 - q) / n))
    if bleu:
        spread = float(np.std(bleu, ddof=1)) if n > 1 else math.nan
        result |= dict(bleu=float(np.mean(bleu)), bleu_se=spread / math.sqrt(n))
    return result | dict(too_long=sum(row['text'] == 'ERROR' for row in drawn))


def write_fastchat(path, tok, rows, drawn):
    """Answers to the first turns, as FastChat's judge reads them; it knows a model by the name of
    the file."""
    model = os.path.splitext(os.path.basename(path))[0]
    answers = []
    for row, made in zip(rows, drawn, strict=True):
        said = fastchat_answer(tok.decode(made['ids'])) if made['ids'] else made['text']
        answers.append(dict(
            question_id=row['question_id'], answer_id=uuid.uuid4().hex[:22], model_id=model,
            choices=[dict(index=0, turns=[said, ''])], tstamp=time.time()))
    answers.sort(key=lambda answer: answer['question_id'])
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    write_whole(path, ''.join(json.dumps(answer) + '\n' for answer in answers))


def measure_generation(c):
    """The answers of the net to the prompts of files, or of its own data, judged."""
    try:
        re.compile(c.answer_pattern or '')
    except re.error as error:
        why = f'it is no regular expression ({error})'
        raise ValueError(f'answer_pattern={c.answer_pattern!r}: {why}') from None
    MATCHES[c.match]('1', '1')                            # are the libraries there?
    if c.bleu:
        character_bleu('a', 'a')
    files = c.input or {}
    if not isinstance(files, dict):
        files = {os.path.splitext(os.path.basename(str(files)))[0]: files}
    tasks = {
        name: read_tasks(str(path), c.prompt_template, c.target_template)
        for name, path in files.items()}
    run, results = load(c), []
    tasks = tasks or read_pairs(run)
    options, settings = sampling(run, c.sampler_options or {})
    options |= dict(cfg_scale=c.cfg_scale)
    for name, columns in tasks.items():
        rows, prompts, targets = (column[:c.max_rows] for column in columns)

        def make(numbers, prompts=prompts):
            made = decode_prompts(
                run.net, run.tok, [prompts[i] for i in numbers], c.passes, first_row=numbers[0],
                **options)
            return [dict(ids=ids, text=text) for ids, text in made]

        folder = os.path.join(home_of(run, 'answers'), re.sub(r'[^\w.-]+', '_', name))
        said = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16]
        own = dict(
            cfg_scale=c.cfg_scale, batch_size=c.batch_size, passes=c.passes, prompts=said)
        with autocast(run.device, c.dtype):
            drawn = kept_rows(folder, len(prompts), c.batch_size, settings | own, make)
        if ranks()[0] > 0:
            continue
        results.append(judge_answers(c, name, folder + '.jsonl', prompts, targets, drawn))
        if c.answer_file:
            write_fastchat(c.answer_file, run.tok, rows, drawn)
    for result in results:                                # after all: a stopped run recorded none
        run.record(result)
    return results, table(results)


# -----------------------------------------------------------------------------
# lm-evaluation-harness


def encode_pair(tok, context, continuation):
    """Ids of both, as SMDM's release: white space at the end of the context goes to the front of
    the continuation, and what follows the context's ids in those of the whole is the target."""
    prefix = encode(tok, context.rstrip())
    return prefix, encode(tok, context + continuation)[len(prefix):]


def among_processes(items, work):
    """work(items) -> a list as long, of items that torch.distributed shares."""
    rank, world_size = ranks()
    parts = [work(items[rank::world_size])]
    if world_size > 1:
        mine, parts = parts[0], [None] * world_size
        dist.all_gather_object(parts, mine)
    return [parts[i % world_size][i // world_size] for i in range(len(items))]


def score_pairs(
    net, pairs, method='chain_rule', cfg_scale=0.0, num_mc=1024, greedy=True, padding=False,
    batch_size=32, seed=0,
):
    """(-continuation_nll, greedy_matches) of pairs of ids (P,), (n,), many at a time. A prefix that
    is too long loses its beginning; an empty target has probability 1."""
    masks, results = masks_of(net, method, num_mc, seed), [(0.0, greedy)] * len(pairs)
    options = cfg_scale, padding, batch_size

    def work(some):
        fitted = []
        for prefix, target in some:
            room = max(net.config.block_size - len(target), 1)
            fitted.append(prefix_and_target(net, prefix[-room:], target, cfg_scale))
        nats, agrees = conditional_nll(net, fitted, masks, *options)
        if not greedy:
            agrees = torch.zeros_like(agrees)
        elif not net.config.causal:
            may = agrees.nonzero().squeeze(1).tolist()
            agrees[may] = reached_greedily(net, [fitted[i] for i in may], *options)
        return list(zip((-nats).tolist(), agrees.tolist(), strict=True))

    some = [i for i, (_, target) in enumerate(pairs) if len(target)]
    for i, result in zip(some, among_processes([pairs[i] for i in some], work), strict=True):
        results[i] = result
    return results


def continue_until(net, tok, requests, batch_size=32, seed=0, steps=256, **options):
    """Continuations (str) of requests, (number, (text, generation arguments of the harness)), which
    end before the first of the strings `until`, and at EOS. The number makes the row's seed."""
    groups, texts, L = collections.defaultdict(list), {}, net.config.block_size
    for number, (text, arguments) in requests:
        sampled = arguments.get('do_sample', bool(arguments.get('temperature')))
        temperature = float(arguments.get('temperature', 1.0)) if sampled else 0.0
        most = int(arguments.get('max_gen_toks', 256))
        prompt = encode(tok, text)[-max(L - most, 1):]
        groups[temperature, most].append((number, prompt, arguments.get('until') or []))
    for (temperature, most), group in groups.items():
        numbers, prompts, ends = zip(*group, strict=True)
        out = generate(
            net, len(group), [min(len(prompt) + most, L) for prompt in prompts], steps,
            prompt=list(prompts), temperature=temperature, seed=seed, batch_size=batch_size,
            numbers=list(numbers), **options)
        for number, prompt, until, row, n in zip(
                *(numbers, prompts, ends), out.tokens.tolist(), out.length, strict=True):
            made = row[len(prompt):n]
            if tok.eos_id in made:
                made = made[:made.index(tok.eos_id)]
            text = plain_text(tok, made)
            for end in filter(None, [until] if isinstance(until, str) else until):
                text = text.partition(end)[0]
            texts[number] = text
    return [texts[number] for number, _ in requests]


def harness_lm(
    net, method='chain_rule', cfg_scale=0.0, num_mc=1024, greedy=True, padding=False, batch_size=32,
    seed=0, **sampling,
):
    """The net as a model of lm-evaluation-harness (lm_eval.simple_evaluate(model=...)). Arguments
    of score_pairs; sampling: of generate(), for tasks that generate; net.tokenizer encodes."""
    with one_line('lm-eval, the harness (pip install lm-eval),'):
        from lm_eval.api.model import LM
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    tok = tokenizer_of(net)
    score = functools.partial(
        score_pairs, net, method=method, cfg_scale=cfg_scale, num_mc=num_mc, greedy=greedy,
        padding=padding, batch_size=batch_size, seed=seed)

    class Adapter(LM):

        def loglikelihood(self, requests):
            return score([encode_pair(tok, *request.args) for request in requests])

        def loglikelihood_rolling(self, requests):
            windows = [
                [make_disjoint_window(window) for window in get_rolling_token_windows(
                    tok.encode(request.args[0]), tok.bos_id, net.config.block_size - 1, 1)]
                for request in requests]
            results = iter(score([pair for pairs in windows for pair in pairs], greedy=False))
            return [sum(next(results)[0] for _ in pairs) for pairs in windows]

        def generate_until(self, requests):
            options = sampling | dict(batch_size=batch_size, seed=seed)
            options['sampler'] = sampling.get('sampler')
            if not net.config.causal:
                options['cfg_scale'] = cfg_scale
            work = functools.partial(continue_until, net, tok, **options)
            return among_processes([*enumerate(request.args for request in requests)], work)

    return Adapter()


HARNESS_OPTIONS = (
    'method', 'cfg_scale', 'num_mc', 'greedy', 'padding', 'batch_size', 'seed', 'steps', 'sampler',
    'top_p', 'top_k', 'draw_dtype')


def measure_harness(c):
    """Tasks of lm-evaluation-harness, in one table."""
    tasks = c.tasks.split(',') if isinstance(c.tasks, str) else c.tasks or ()
    tasks = tasks if isinstance(tasks, dict) else {name: {} for name in tasks}
    require(tasks, '--metric=harness needs --tasks=arc_easy,hellaswag')
    own_words = c.length is None and c.temperature == 1
    require(own_words, '--metric=harness takes neither --length nor --temperature: a task says '
            'max_gen_toks, do_sample and temperature itself')
    with one_line('lm-eval, the harness (pip install lm-eval),'):
        import lm_eval.tasks
        manager = lm_eval.tasks.TaskManager(
            include_path=c.task_folder, include_defaults=not c.task_folder)
    for name, own in tasks.items():
        near = difflib.get_close_matches(name, manager.all_tasks, n=1, cutoff=0)[0]
        require(name == near, f"task '{name}' is not known to lm-eval; the nearest is '{near}'")
        for key in own:
            require_known(f'the option of {name} ', key, HARNESS_OPTIONS)
    run, rows, options = load(c), [], c.sampler_options or {}
    for name, own in tasks.items():
        settings = {key: getattr(c, key) for key in HARNESS_OPTIONS} | own
        with one_line(f"task '{name}' of lm-eval"):
            loaded = manager.load([name])['tasks']
        if any(task.OUTPUT_TYPE == 'generate_until' for task in loaded.values()):
            sampler = settings['sampler'] or sampler_of(run)
            check_sampler(run.net.config, sampler, options)
        lm = harness_lm(run.net, **settings | options)
        with autocast(run.device, c.dtype):
            done = lm_eval.simple_evaluate(
                model=lm, tasks=[name], num_fewshot=c.num_fewshot, limit=c.max_rows,
                task_manager=manager, log_samples=False)
        for task, values in (done or dict(results={}))['results'].items():
            for key, value in values.items():
                measure, _, filtered = key.partition(',')
                if not filtered or measure.endswith('_stderr'):
                    continue
                error = values.get(f'{measure}_stderr,{filtered}')
                result = dict(
                    task=task, measure=measure, value=float(value),
                    value_se=error if isinstance(error, float) else None,
                    items=done['n-samples'].get(task, {}).get('effective'))
                run.record(result | dict(options=settings))
                rows.append(result)
    return rows, table(rows)


# -----------------------------------------------------------------------------
# several nets: the shift of a likelihood in time, and scaling laws


def measure_shift(c):
    """The NELBO of several datasets, of nets in a list, and how much the last reads above the
    first."""
    require(c.nets and c.datasets, '--metric=shift needs nets and datasets')
    rows = []
    for source in c.nets:
        run = load(c, source)
        found = [likelihood(run, name) for name in c.datasets]
        row = dict(net=str(source))
        for result in found:
            run.record(result)
            row |= {result['dataset']: result['ppl'], f"{result['dataset']}_se": result['ppl_se']}
        shift = found[-1]['nats_per_token'] - found[0]['nats_per_token']
        error = math.hypot(found[0]['nats_per_token_se'], found[-1]['nats_per_token_se'])
        rows.append(row | dict(shift_nats=shift, shift_nats_se=error, ratio=math.exp(shift)))
    return rows, table(rows)


def folders_of(c):
    """The out_dirs that runs names."""
    names = c.runs.split(',') if isinstance(c.runs, str) else c.runs or ()
    require(names, f'--metric={c.metric} needs runs: out_dirs of train.py, or a pattern of them')
    folders = []
    for name in map(str, names):
        found = sorted(glob.glob(name))
        require(found, f'runs={c.runs}: there is no {name}')
        folders += found
    return folders


def validations(folder):
    """The validations of a run of train.py, dicts of iter, val_loss, val_bpb."""
    path = os.path.join(folder, 'metrics.jsonl')
    found = [row for row in read_lines(path, dict, 'not of train.py') if 'val_loss' in row]
    require(found, f'{path} holds no validation')
    return found


def measure_curves(c):
    """Validation of runs over the tokens they have seen: the best and last of each, and a plot."""
    points, rows = [], []
    for folder in folders_of(c):
        trained = load_pretrained(folder).constants
        a_step = trained['global_batch_size'] * trained['block_size']
        line = [dict(source=folder, tokens=row['iter'] * a_step, bits_per_byte=row['val_bpb'])
                for row in validations(folder) if row['val_bpb'] is not None]
        require(line, f'{folder}: its objective has no bits/byte to be compared by')
        best, last = min(line, key=lambda row: row['bits_per_byte']), line[-1]
        row = dict(
            dataset=trained['dataset'], best_bits_per_byte=best['bits_per_byte'],
            best_at=best['tokens'], bits_per_byte=last['bits_per_byte'], tokens=last['tokens'])
        Run(c, folder).record(row)
        rows.append(dict(run=folder) | row)
        points += line
    path = f'{os.path.splitext(c.results)[0]}-curves.png'
    drawn = f'drawn in {path}'
    try:
        plot(points, 'tokens', ('bits_per_byte',), path, 'tokens')
    except ImportError:
        drawn = 'no plot: it needs matplotlib (pip install matplotlib)'
    return rows, f'{table(rows)}\n\n{drawn}'


def read_run(folder):
    """dict of N (parameters without embeddings), D (tokens), C (6 N D FLOPs), loss (nats a token,
    the last validation) and budget of a finished run of train.py."""
    net, last = load_pretrained(folder), validations(folder)[-1]
    c = net.constants
    cut, L, N = c.get('ssl_ratio', 0.0), c['block_size'], net.num_params(embedding=False)
    one_step = c['global_batch_size'] * (L * (1 - cut) + cut * (1 + L) / 2)
    D, budget = last['iter'] * one_step, c.get('flops')
    steps = round(budget / (6 * N * one_step)) if budget else c['max_iters']
    done = f"validated at step {last['iter']:,} of {steps:,}"
    require(last['iter'] == steps, f'{folder} is not finished: it was {done}')
    budget = budget or float(f'{6 * N * D:.1e}')
    return dict(run=folder, N=N, D=D, C=6 * N * D, loss=last['val_loss'], budget=budget)


def isoflop_optimum(N, loss):
    """The lowest point of a parabola of loss over log N (n,) -> log N*, its standard error (nan for
    three points), the loss there, and the parabola (middle, a, b, c)."""
    x = np.log(N)
    middle, cov = x.mean(), np.full((3, 3), math.nan)     # around the middle: well-conditioned
    a, b, c = np.polyfit(x - middle, loss, 2)
    if len(x) > 3:
        _, cov = np.polyfit(x - middle, loss, 2, cov=True)
    require(a > 0, 'the losses have no minimum over the sizes: add smaller or larger ones')
    slope = np.array([b / (2 * a ** 2), -1 / (2 * a), 0])  # of -b/2a, by a, b, c
    log_n, error = middle - b / (2 * a), math.sqrt(slope @ cov @ slope)
    return log_n, error, c - b ** 2 / (4 * a), (middle, a, b, c)


def power_law(x, y):
    """y = k x^a -> a, its standard error (nan for two points), k."""
    from scipy.stats import linregress
    fit = linregress(np.log(x), np.log(y))
    error = float(fit.stderr) if len(x) > 2 else math.nan
    return float(fit.slope), error, math.exp(fit.intercept)


def plot_scaling(stem, runs, optima, laws):
    """IsoFLOP curves; N* and D* over budgets."""
    with one_line('matplotlib, which plots (pip install matplotlib),'):
        from matplotlib.figure import Figure
    figures = {name: Figure((5, 3.6), layout='constrained') for name in ('isoflop', 'laws')}
    curves, lines = [figure.subplots() for figure in figures.values()]
    for row in optima:
        N, loss = np.array(sorted(
            (run['N'], run['loss']) for run in runs if run['budget'] == row['flops'])).T
        dots, = curves.plot(N, loss, 'o')
        middle, *p = row['parabola']
        grid = np.geomspace(N[0], N[-1], 100)
        parabola = np.polyval(p, np.log(grid) - middle)
        curves.plot(grid, parabola, color=dots.get_color(), label=f"{row['flops']:.0e} FLOPs")
    curves.set(xscale='log', xlabel='N, parameters without embeddings', ylabel='nats a token')
    C = np.array([row['flops'] for row in optima])
    for key in ('N', 'D'):
        dots, = lines.plot(C, [row[key] for row in optima], 'o')
        a, _, k = laws[key]
        lines.plot(C, k * C ** a, color=dots.get_color(), label=f'{key}* = {k:.2g} C^{a:.3f}')
    lines.set(xscale='log', yscale='log', xlabel='C, FLOPs', ylabel='parameters, tokens')
    for name, figure in figures.items():
        figure.axes[0].legend(fontsize=8)
        figure.savefig(f'{stem}-{name}.png', dpi=150)


def measure_scaling(c):
    """Scaling laws by IsoFLOP parabolas (Hoffmann et al. 2022, arXiv 2203.15556, approach 2) of
    finished runs, three sizes or more at each of two budgets or more."""
    runs, optima = [read_run(folder) for folder in folders_of(c)], []
    for budget in sorted({run['budget'] for run in runs}):
        some = [run for run in runs if run['budget'] == budget]
        N, loss = [[run[key] for run in some] for key in ('N', 'loss')]
        sizes = len(set(N))
        require(sizes >= 3, f'{budget:g} FLOPs have {sizes} sizes: a parabola needs three')
        log_n, error, lowest, parabola = isoflop_optimum(N, loss)
        best = math.exp(log_n)
        D = budget / (6 * best)
        optima.append(dict(
            flops=budget, runs=len(N), N=best, N_se=best * error, D=D, D_se=D * error, loss=lowest,
            parabola=parabola))
    require(len(optima) >= 2, 'a power law needs two budgets at least')
    budgets = [row['flops'] for row in optima]
    laws = {key: power_law(budgets, [row[key] for row in optima]) for key in ('N', 'D', 'loss')}
    result = dict(optima=optima, laws=laws, runs=runs)
    Run(c, 'runs').record(result)
    stem = os.path.splitext(c.results)[0]
    figures = f'drawn in {stem}-isoflop.png and {stem}-laws.png'
    try:
        plot_scaling(stem, runs, optima, laws)
    except ValueError as error:
        figures = str(error)
    shown = [{key: row[key] for key in row if key != 'parabola'} for row in optima]
    lines = [f'{key} = {k:.4g} C^a, a = {cell(a, error)}' for key, (a, error, k) in laws.items()]
    return result, '\n'.join([table(shown), '', *lines, figures])


METRICS = {
    'ppl': measure_ppl, 'zero_shot': measure_zero_shot, 'samples': measure_samples,
    'table': measure_table, 'frontier': measure_frontier, 'report': show_report,
    'generation': measure_generation, 'harness': measure_harness, 'shift': measure_shift,
    'curves': measure_curves, 'scaling': measure_scaling}


# -----------------------------------------------------------------------------

if __name__ == '__main__':
    configs = [argument for argument in sys.argv[1:] if argument.endswith('.py')]
    in_config = configure(dict(globals()), configs, **flags())
    constants = configure(globals(), **flags())
    check_overrides(overrides)
    require_known('metric ', metric, METRICS)
    check_output('results', results)
    require(results.endswith('.jsonl'), f'results={results}: it must end in .jsonl')
    if os.path.exists(results) and os.path.getsize(results):
        read_results(results)                             # nothing is appended to another file
    whole = table_steps and all(type(n) is int and n >= 1 for n in table_steps)
    require(whole, f'table_steps={table_steps}: whole numbers of at least 1 are needed')
    dicts = metric != 'table' or all(isinstance(d, dict) for d in (published or {}).values())
    require(dicts, f'published={published}: a dict of dicts, as {dict(gen_ppl={128: 78.34})}')
    own = {*constants, *inspect.signature(generate).parameters}.isdisjoint(sampler_options or ())
    require(own, f'sampler_options={sampler_options}: only options that belong to one sampler')

    released = against_release(constants, in_config) if configs and published else None
    result, text = METRICS[metric](types.SimpleNamespace(**constants, released=released))
    if ranks()[0] == 0:
        print('\n'.join([text, *([released] if released else [])]))
    if dist.is_initialized():
        dist.destroy_process_group()
