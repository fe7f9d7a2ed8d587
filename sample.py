"""
Draw samples from a trained net:

    python sample.py --steps=1024 --top_p=0.95           from out/, where config/owt_mlm.py trains to
    python sample.py --out_dir=out-quickstart --num_samples=4 --prompt="Return the"
    python sample.py --out_dir=out-quickstart --template="Return the <|mask:20|> list."

A sampler is a loop over b.steps(...), b being the Batch of rows. In each step it asks the net
(b.score, b.draw), chooses positions, and fills them in (b.unmask) or masks them again (b.remask).
Where the step of each position does not depend on the net, all steps are drawn first (a plan): the
net runs only for rows that change, and projects only what is unmasked.
Row i is a function of (seed, first_row + i) alone: the batch size changes nothing but rounding.
Draws are float64: in float32 the tail of the uniform is cut off, which lowers the temperature.

MDLM: Sahoo et al. 2024, arXiv 2406.07524; SEDD: Lou et al. 2023, 2310.16834; SMDM: Nie et al. 2024,
2410.18514; LLaDA: Nie et al. 2025, 2502.09992; ReMDM: Wang et al. 2025, 2503.00307; first hitting:
Zheng et al. 2024, 2409.02908.
"""
import inspect
import json
import math
import numbers
import os
import re
import shutil
import sys
import time
import unicodedata
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from configurator import require
from data import get_tokenizer, key_of, splitmix64
from model import (
    OBJECTIVES,
    KVCache,
    autocast,
    check_overrides,
    get_schedule,
    load_pretrained,
    loglinear,
    pick_device,
    reuse_memory,
)

out_dir = 'out'         # where train.py left ckpt.pt
init_from = None        # another source of weights for load_pretrained; None: out_dir
overrides = None        # ModelConfig fields the source cannot tell, "{'objective': 'sedd', ...}"
ema = True              # the averaged weights; False: the last ones
tokenizer = None        # None: the one the checkpoint names
device = 'auto'         # 'auto', 'cpu', 'cuda', 'cuda:1', 'mps'
dtype = 'auto'          # [auto | float32 | bfloat16] auto: bfloat16 where the device is fast at it
compile = False         # compile the trunk, with CUDA graphs: for many steps of few rows (not ar)
seed = 0
num_samples = 4         # of each prompt or template
batch_size = 16         # rows that go through the net together
length = None           # tokens a sample, prompt included; None: the template's or block_size
steps = 1024            # of the sampler (semi_ar: of each window; first_hitting, ar: one a token)
sampler = None          # a key of SAMPLERS; None: by the net's objective
temperature = 1.0       # 0: the most probable token
top_p = None            # keep tokens of cumulative probability <= top_p; None: 1.0, remdm 0.9
top_k = 0               # keep the k most probable tokens; 0: all
cfg_scale = 0.0         # guidance: un + (1 + cfg_scale) (cond - un), un with the prompt masked
prompt = ''             # text that samples begin with; FILE:prompts.txt: one a line; -: from stdin
template = ''           # text to fill in at <|mask|> or <|mask:20|>; FILE: and - as above
confidence = None       # fixed: 'uniform' (default), 'top_prob', 'prob_diff', 'entropy'
confidence_temperature = None  # fixed: draw positions by softmax(score / this); default 0: the top
threshold = None        # fixed: unmask while the summed lack of confidence is under this
block_length = None     # low_confidence: tokens a block; default: one block
stride = None           # semi_ar: tokens a window advances by; default: half of block_size
strategy = None         # remdm: 'cap' (default), 'rescale', 'conf', 'loop'
eta = None              # remdm: default 0.008 for cap, 0.015 for rescale, 0.02 for loop
t_on = None             # remdm, loop: the time at which remasking begins; default 0.55
t_off = None            # remdm, loop: the time at which it ends; default 0.05
alpha_on = None         # remdm, loop: the share of visible tokens in between; default 0.9
eos_id = None           # ar: the id that ends a row, -1: none; default: the tokenizer's
out = None              # write the samples to this .jsonl file instead of the terminal
watch = False           # show the first sample in the terminal as it fills in
trace = None            # write a page that plays the sampling to this .html file


@dataclass
class Samples:
    tokens: torch.Tensor       # (n, L) int64, no mask id left; padding after the end of a row
    nfe: torch.Tensor          # (n,) int64, network evaluations of a row; a guided pair counts 2
    reveal_step: torch.Tensor  # (n, L) int64, step of the last unmasking, from 0; -1: given
    length: torch.Tensor       # (n,) int64, tokens of the row, its EOS included


@torch.no_grad()
def generate(net, num_samples, length, steps, sampler='ancestral', prompt=None, cfg_scale=0.0,
             temperature=1.0, top_p=None, top_k=0, seed=0, first_row=0, batch_size=16,
             schedule=None, template=None, progress=False, on_change=None, compile=False,
             **options):
    """Draw num_samples rows -> Samples. The options not named here are as the constants above say.

    length: tokens a row, prompt included, for all or for each row; None: the template's, or
    block_size. sampler: a key of SAMPLERS, None: by the objective; **options: its own.
    prompt: text, n texts, ids (P,), or n rows of ids of any lengths. template: the same, as long as
    the row, open where it holds -1 or the mask (in text <|mask|> or <|mask:20|>).
    schedule: None: the one the net was trained with.
    on_change(rows, cols, ids, confidence, steps), each (N,) on the CPU, is called when positions are
    unmasked, with the net's probability of the tokens, or masked again, with the id -1; and once
    with the whole start, as step -1. Raises ValueError where an option is impossible."""
    config = net.config
    if sampler is None:
        sampler = OBJECTIVES[config.objective].sampler
    if top_p is None:
        top_p = 0.9 if sampler == 'remdm' else 1.0
    check_sampler(config.objective, sampler, options)
    check_numbers(sampler, num_samples=num_samples, steps=steps, top_k=top_k, seed=seed,
                  batch_size=batch_size, first_row=first_row, temperature=temperature,
                  top_p=top_p, cfg_scale=cfg_scale, compile=compile)
    if schedule is None:
        schedule = get_schedule(net.constants.get('schedule', 'loglinear'))
    bos_id = None
    if sampler == 'ar' and net.tokenizer is not None:
        tok = get_tokenizer(**net.tokenizer)
        bos_id = tok.bos_id
        options.setdefault('eos_id', tok.eos_id)
    longest = 2 ** 24 if sampler == 'semi_ar' else config.block_size

    x, is_open, lengths = lay_out(net, num_samples, length, prompt, template, bos_id, longest)
    keys = np.array([key_of(seed, first_row + i) for i in range(num_samples)], dtype=np.uint64)
    draw_options = dict(temperature=temperature, top_k=top_k, top_p=top_p)
    b = Batch(net, x, is_open, lengths, keys, batch_size, schedule, cfg_scale, draw_options,
              on_change, compile, progress)
    b.report_start()
    SAMPLERS[sampler](b, steps, **options)

    assert not b.masked.any()
    require(not b.saw_non_finite,
            'the logits of the net, as the options change them, are not numbers')
    inside = torch.arange(x.size(1)) < b.length[:, None]
    if not inside.all():
        b.x = torch.where(inside.to(b.device), b.x, padding_of(net))
    return Samples(b.x.cpu(), b.nfe, b.reveal_step, b.length)


# -----------------------------------------------------------------------------
# the samplers: f(batch, num_steps, its own options). A new one is a function under @sampler

SAMPLERS = {}
TAKES = {}  # name -> what the nets it takes predict


def sampler_for(*predicts):
    """Enter a sampler into the table, for nets whose objective predicts one of these."""
    def enter(function):
        SAMPLERS[function.__name__] = function
        TAKES[function.__name__] = predicts
        return function
    return enter


def grid(begin, end, num_steps):
    """num_steps + 1 evenly spaced times, exact at both ends and where they can be."""
    return begin + (end - begin) * torch.arange(num_steps + 1, dtype=torch.float64) / num_steps


def plan_steps(b, mask_prob):
    """Draw the step (n, L) at which each position is unmasked, given the probability of a mask
    (S + 1,) before each step and at the end: the first step that ends with mask_prob / mask_prob[0]
    at or below the position's uniform; the last takes the rest."""
    still = mask_prob / mask_prob[0]
    still[-1] = 0
    u = b.uniforms(torch.arange(len(b.x)))
    return len(still) - 1 - torch.searchsorted(still[1:].flip(0), u, right=True)


def most_confident(scores, count):
    """The `count` (A,) highest of each row of scores (A, L) -> (A, L) bool."""
    rank = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return rank < count[:, None]


@sampler_for('x0', 'x0 or mask')
def ancestral(b, num_steps, subs_masking=None):
    """MDLM's ancestral sampler (equation 7; its `ddpm` and `ddpm_cache`) on the times 1 -> 0. A net
    that never predicts the mask unmasks a position at a step that does not depend on the tokens.
    A d3pm net gives the mask a probability p_m and unmasks with probability
    (1 - p_m)(m_t - m_s) / ((1 - p_m)(m_t - m_s) + m_s), m = 1 - alpha, unless it was trained with
    subs_masking (None: as its run says). The last step unmasks the rest."""
    if subs_masking is None:
        subs_masking = b.net.constants.get('subs_masking', False)
    mask_prob = 1 - b.schedule.alpha(grid(1, 0, num_steps))
    mask_prob[-1] = 0
    if b.predicts == 'x0' or subs_masking:
        plan = plan_steps(b, mask_prob)
        for rows, step in b.steps(mask_prob, plan):
            b.unmask(plan[rows] == step[:, None])
        return

    for rows, step in b.steps(mask_prob):
        m_t = mask_prob[step][:, None]
        m_s = mask_prob[step + 1][:, None]
        token_prob = b.score(b.masked[rows], b.not_the_mask) * (m_t - m_s)
        unmask_prob = torch.where(m_s == 0, 1, token_prob / (token_prob + m_s))
        b.unmask(b.uniforms(rows, step) < unmask_prob)


@sampler_for('x0', 'score')
def analytic(b, num_steps):
    """SEDD's Tweedie sampler (algorithm 2) on the times 1 -> 1e-5, then one step to no noise at all,
    as released. From sigma to sigma - dsigma a mask turns into token v with probability
    (e^dsigma - 1) s_v, s the concrete score (theorem 4.2). Under SUBS these sum to what does not
    depend on the net, so that the steps are drawn first."""
    times = torch.cat((grid(1, 1e-5, num_steps), torch.zeros(1, dtype=torch.float64)))
    mask_prob = 1 - b.schedule.alpha(times)
    mask_prob[-1] = 0
    if b.predicts == 'x0':
        plan = plan_steps(b, mask_prob)
        for rows, step in b.steps(mask_prob, plan):
            b.unmask(plan[rows] == step[:, None])
        return

    sigma = b.schedule.sigma(times)
    sigma[-1] = 0
    for rows, step in b.steps(mask_prob):
        sigma_t = sigma[step][:, None]
        sigma_s = sigma[step + 1][:, None]
        token_prob = b.score(b.masked[rows], b.total_score)
        token_prob = token_prob * torch.expm1(sigma_t - sigma_s) / torch.expm1(sigma_t)
        stay = (1 - token_prob).clamp(min=0)
        unmask_prob = torch.where(sigma_s == 0, 1, token_prob / (token_prob + stay))
        b.unmask(b.uniforms(rows, step) < unmask_prob)


@sampler_for('x0')
def fixed(b, num_steps, confidence='uniform', confidence_temperature=0.0, threshold=None):
    """xlm's predictor: each step unmasks floor(masked / steps left) positions, the last the rest.
    confidence: 'uniform', any of them, or a key of CONFIDENCE: the most confident ones, or with a
    confidence_temperature those drawn without replacement by softmax(score / temperature).
    threshold: instead, the most confident while their cumulative lack of confidence, less the
    largest of it, is under the threshold, at least one."""
    check_fixed(confidence, confidence_temperature, threshold)
    mask_prob = 1 - b.schedule.alpha(grid(1, 0, num_steps))
    if confidence == 'uniform':
        plan = plan_counts(b, num_steps)
        for rows, step in b.steps(mask_prob, plan):
            b.unmask(plan[rows] == step[:, None])
        return

    score, highest = CONFIDENCE[confidence]
    for rows, step in b.steps(mask_prob):
        if threshold is not None:
            scores = b.score(b.masked[rows], score)
            last = (step == num_steps - 1)[:, None]
            b.unmask(last | under_threshold(highest - scores, float(threshold)))
            continue
        count = b.num_masked[rows] // (num_steps - step)
        scores = b.score(b.masked[rows] & (count > 0)[:, None], score)
        if confidence_temperature:  # Gumbel noise: softmax without replacement
            gumbel = -torch.log(-torch.log1p(-b.uniforms(rows, step)))
            scores = scores / float(confidence_temperature) + gumbel
        b.unmask(most_confident(scores, count))


def plan_counts(b, num_steps):
    """The step (n, L) at which xlm's predictor unmasks each position, in random order."""
    u = torch.where(b.masked, b.uniforms(torch.arange(len(b.x))), 1)
    rank = u.argsort(dim=1).argsort(dim=1)
    plan = torch.zeros_like(rank)
    for num_masked in b.num_masked.unique().tolist():  # rows with as many masks share their counts
        left = num_masked
        unmasked = []
        for i in range(num_steps):
            left -= left // (num_steps - i)
            unmasked.append(num_masked - left)
        rows = b.num_masked == num_masked
        plan[rows] = torch.searchsorted(torch.tensor(unmasked), rank[rows], right=True)
    return plan


def under_threshold(lack, threshold):
    """Of lack (A, L), inf where nothing is to be chosen, the smallest of each row while their sum
    less the largest of them is under the threshold, at least one -> (A, L) bool."""
    ordered, order = lack.sort(dim=1)
    under = ordered.cumsum(dim=1) - ordered < threshold
    under[:, 0] = True
    return torch.zeros_like(under).scatter_(1, order, under) & lack.isfinite()


@sampler_for('x0')
def greedy(b, num_steps):
    """SMDM's greedy sampler (appendix) on the times 1 -> 1e-5: from t to s the int(masked (1 - s/t))
    most confident positions are unmasked, at the last step the rest. Their tokens are the most
    probable ones (temperature 0) or drawn: its power form of Gumbel noise is such a draw."""
    times = torch.linspace(1, 1e-5, num_steps + 1)  # in float32 as released: it decides the counts
    fraction = 1 - times[1:] / times[:-1]
    mask_prob = 1 - b.schedule.alpha(times.double())
    for rows, step in b.steps(mask_prob):
        masked = b.num_masked[rows]
        count = torch.where(step == num_steps - 1, masked, (masked * fraction[step]).long())
        scores = b.draw(b.masked[rows] & (count > 0)[:, None])
        b.unmask(most_confident(scores, count))


@sampler_for('x0')
def low_confidence(b, num_steps, block_length=None):
    """LLaDA's low-confidence remasking: after the prompt, blocks of block_length from left to right,
    num_steps / blocks steps each. A step of a block unmasks masked // steps of the positions that
    were masked at its beginning, and one more in the first masked % steps."""
    width = b.x.size(1)
    begin = b.prompt_length
    if block_length is None:
        block_length = width
    require(is_whole(block_length) and block_length >= 1,
            f'block_length={block_length}: it must be a whole number of at least 1')
    blocks = ((b.length - begin + block_length - 1) // block_length).clamp(min=1)  # (n,)
    uneven = next(iter(blocks[num_steps % blocks > 0].tolist()), None)
    require(uneven is None, f'steps={num_steps} cannot be shared evenly by {uneven} blocks of '
            f'{block_length}')
    block_length = min(block_length, width)
    steps_each = num_steps // blocks
    at_first = torch.zeros_like(begin)  # masks at the beginning of the block
    col = torch.arange(width)
    mask_prob = 1 - b.schedule.alpha(grid(1, 0, num_steps))
    for rows, step in b.steps(mask_prob):
        each = steps_each[rows]
        first = (begin[rows] + step // each * block_length)[:, None]
        masked = b.masked[rows] & (col >= first) & (col < first + block_length)
        at_first[rows] = torch.where(step % each == 0, masked.sum(dim=1), at_first[rows])
        count = at_first[rows] // each + (step % each < at_first[rows] % each)
        scores = b.draw(masked & (count > 0)[:, None])
        b.unmask(most_confident(scores, count))


@sampler_for('x0')
def semi_ar(b, num_steps, stride=None):
    """MDLM's semi-autoregressive sampler: windows of block_size that advance by `stride`, each
    sampled by `ancestral` in num_steps steps given what the last one left. Rows of any length."""
    width = b.net.config.block_size
    if stride is None:
        stride = max(1, width // 2)
    require(is_whole(stride) and 1 <= stride < max(width, 2),
            f'stride={stride}: it must be at least 1 and below {width}, the block_size of the net')
    # the window that unmasks each position
    window = ((torch.arange(b.x.size(1)) - width + stride) // stride).clamp(min=0)
    windows = int(window[-1]) + 1
    start = (torch.arange(windows) * stride).repeat_interleave(num_steps)
    mask_prob = 1 - b.schedule.alpha(grid(1, 0, num_steps))
    plan = plan_steps(b, mask_prob) + window * num_steps
    for rows, step in b.steps(mask_prob[:-1].repeat(windows), plan, start):
        b.unmask(plan[rows] == step[:, None])


@sampler_for('x0')
def remdm(b, num_steps, strategy='cap', eta=None, t_on=0.55, t_off=0.05, alpha_on=0.9):
    """ReMDM (equation 6): from t to s a visible token is masked again with probability sigma, a
    masked one unmasked with (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t); sigma is at most
    (1 - alpha_s) / alpha_t. strategy: 'cap', sigma = min(eta, that); 'rescale', eta times that;
    'conf', eta times that times a softmax over the visible tokens of minus the probability with
    which each was drawn; 'loop', alpha rises to alpha_on by t_on, stays while tokens are remasked
    as in cap, and rises to 1 from t_off on. What is given stays."""
    etas = dict(cap=0.008, rescale=0.015, conf=1.0, loop=0.02)
    check_remdm(etas, strategy, eta, t_on, t_off, alpha_on)
    eta = etas[strategy] if eta is None else eta
    t = grid(1, 0, num_steps)
    alpha = b.schedule.alpha(t)
    remasks = torch.ones(num_steps, dtype=torch.bool)
    if strategy == 'loop':
        remasks = ((t <= t_on) & (t > t_off))[:-1]
        after = torch.where(t > t_off, alpha_on, 1 - t / t_off * (1 - alpha_on))
        alpha = torch.where(t > t_on, (1 - t) / (1 - t_on) * alpha_on, after)
    alpha[-1] = 1
    sigma_max = torch.where(remasks, ((1 - alpha[1:]) / alpha[:-1]).clamp(max=1), 0)
    if strategy == 'conf':
        b.drawn_prob = torch.full(b.x.shape, torch.inf, dtype=torch.float64)

    for rows, step in b.steps(1 - alpha, to_the_end=True):
        alpha_t = alpha[step][:, None]
        alpha_s = alpha[step + 1][:, None]
        sigma = sigma_max[step][:, None]
        masked = b.masked[rows]
        visible = b.is_open[rows] & ~masked
        if strategy == 'conf':
            weight = torch.where(visible, torch.exp(-b.drawn_prob[rows]), 0)
            sigma = eta * sigma * weight / weight.sum(dim=1, keepdim=True).clamp(min=1e-300)
            unmask_prob = (alpha_s - alpha_t) / (1 - alpha_t)  # sigma is 0 where it is masked
        else:
            sigma = eta * sigma if strategy == 'rescale' else sigma.clamp(max=eta)
            unmask_prob = (alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t)
        u = b.uniforms(rows, step)
        remask = visible & (u < sigma)
        b.unmask(masked & (u < unmask_prob))
        b.remask(remask)


@sampler_for('x0')
def first_hitting(b, num_steps):
    """One token at a time at exactly drawn hitting times (Zheng et al., algorithm 1), the limit of
    `ancestral` for infinitely many steps. num_steps plays no part."""
    u = torch.where(b.masked, b.uniforms(torch.arange(len(b.x))), -1)
    order = u.argsort(dim=1, descending=True)
    plan = order.argsort(dim=1)
    mask_prob_1 = 1 - b.schedule.alpha(torch.ones((), dtype=torch.float64))
    mask_prob = u.gather(1, order).clamp(min=1e-9) * mask_prob_1  # (n, L), at each hitting time
    for rows, step in b.steps(mask_prob, plan):
        b.unmask(plan[rows] == step[:, None])


@sampler_for('next token')
def ar(b, num_steps, eos_id=None):
    """Token after token from a causal net with a key/value cache. A row ends with the first eos_id
    it draws (None or -1: at its length). num_steps plays no part."""
    require(type(eos_id) in (int, type(None)), f'eos_id={eos_id!r}: an id is needed, or -1 for none')
    require((b.prompt_length > 0).all(), 'a causal net begins with a token: give a prompt (a net that '
            'names its tokenizer begins with its BOS)')
    require((b.is_open.sum(dim=1) == b.length - b.prompt_length).all(),
            'a causal net goes on after a prompt; it cannot fill in a template')
    cache = KVCache(len(b.rows), b.x.size(1))
    for rows, step in b.steps(torch.ones(b.x.size(1))):
        col = b.prompt_length[rows] + step
        h = b.trunk_with_cache(cache, col)
        b.unmask(torch.arange(b.x.size(1)) == col[:, None], h=h)
        if eos_id not in (None, -1):
            ended = (b.x[rows.to(b.device), col.to(b.device)] == eos_id).cpu()
            b.end(rows[ended], col[ended] + 1)


# -----------------------------------------------------------------------------
# drawing tokens, and how confident the net is of them


def draw(logits, u, mask_id, temperature=1.0, top_k=0, top_p=1.0):
    """One token for each row of logits (N, V), by inverse CDF of the uniforms u (N,) float64 in
    [0, 1) -> ids (N,), -1 where the logits are not finite, and the probabilities (N,) with which
    they were drawn. In this order: mask excluded, temperature, top_k, top_p. top_p keeps the tokens
    whose cumulative probability is at most top_p, and always the first, as xlm and ReMDM do."""
    logits = without_mask(logits.to(u.device), mask_id)
    if temperature == 0:
        highest, ids = logits.max(dim=-1)
        return torch.where(highest.isnan(), -1, ids), torch.ones_like(u)
    logits = logits.double()
    if temperature != 1:
        logits = logits / temperature
    probs = torch.softmax(logits, dim=-1)  # (N, V)
    if top_k or top_p < 1:
        ordered, order = probs.sort(dim=-1, descending=True, stable=True)
        if top_k:
            ordered[:, top_k:] = 0
        if top_p < 1:
            crossed = ordered.cumsum(dim=-1) > top_p * ordered.sum(dim=-1, keepdim=True)
            crossed[:, 0] = False
            ordered[crossed] = 0
        probs = torch.zeros_like(probs).scatter_(1, order, ordered)
    cdf = probs.cumsum(dim=-1)
    ids = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True).squeeze(1)
    last = probs.size(1) - 1 - (probs.flip(1) > 0).int().argmax(dim=-1)
    ids = torch.minimum(ids, last)  # u -> 1 may round up to the end
    drawn = probs.gather(1, ids[:, None]).squeeze(1) / cdf[:, -1]
    return torch.where(cdf[:, -1].isnan(), -1, ids), drawn


def without_mask(logits, mask_id):
    """logits (N, V), changed in place to give the mask no probability (None: there is no mask)."""
    if mask_id is not None:
        logits[:, mask_id] = -torch.inf
    return logits


def odds(logits):
    """Of logits (N, V): the highest (N,), its id (N,), the ratio e (N, V) of each other probability
    to the highest, 0 at the highest itself, and their sum (N,) float64. The highest probability is
    1 / (1 + sum), exact however close it comes to 1."""
    highest, ids = logits.max(dim=-1)
    e = (logits - highest[:, None]).exp_().scatter_(1, ids[:, None], 0)
    return highest, ids, e, e.sum(dim=-1).double()


def probability(logits, ids):
    """Of the tokens ids (N,) under logits (N, V), whatever they were drawn with, (N,) float64."""
    highest, _, _, others = odds(logits)
    logit = logits.gather(1, ids.clamp(min=0)[:, None]).squeeze(1)
    return (logit - highest).double().exp() / (1 + others)


def top_prob(logits):
    return 1 / (1 + odds(logits)[3])


def prob_diff(logits):
    """Between the two most probable tokens."""
    _, _, e, others = odds(logits)
    return (1 - e.amax(dim=-1).double()) / (1 + others)


def negative_entropy(logits):
    highest, _, e, others = odds(logits)
    log_ratio = (logits - highest[:, None]).clamp_(min=-1e9)  # 0 times -inf would be NaN
    return (e * log_ratio).sum(dim=-1).double() / (1 + others) - others.log1p()


# logits (N, V) without the mask -> (N,), higher where the net is more confident; its highest value
CONFIDENCE = {
    'top_prob': (top_prob, 1.0),
    'prob_diff': (prob_diff, 1.0),
    'entropy': (negative_entropy, 0.0),
}


# -----------------------------------------------------------------------------
# the reversed absorbing process of SEDD


def relative_score(net, logits):
    """The concrete score of a masked position, (N, V), times e^sigma - 1; of the mask itself 0.
    logits (N, V) of a sedd net are log scores but for a constant; of SUBS, log probabilities."""
    logits = without_mask(logits, net.config.mask_id)
    if net.config.objective == 'sedd':
        return (logits - math.log(net.config.vocab_size - 1)).exp()
    return logits.softmax(dim=-1)


@torch.no_grad()
def transition(net, xt, sigma, dsigma):
    """What each position of xt (B, L) turns into when the noise sigma (B,) falls by dsigma (B,),
    (B, L, V) unnormalised (SEDD, theorem 4.2): the mask keeps what remains of 1, which of a learned
    score may be negative."""
    row, col = (xt == net.config.mask_id).nonzero(as_tuple=True)
    logits = net.head(net.trunk(xt, sigma)[row, col])
    ratio = torch.expm1(dsigma.double()) / torch.expm1(sigma.double())
    masked = relative_score(net, logits.double()) * ratio[row, None]
    masked[:, net.config.mask_id] = 1 - masked.sum(dim=-1)
    probs = F.one_hot(xt, net.config.vocab_size).to(logits.dtype)
    probs[row, col] = masked.to(probs.dtype)
    return probs


def analytic_probs(net, xt, t, dt):
    """What `analytic` draws from in a step from t (B,) to t - dt under loglinear, (B, L, V)."""
    sigma = loglinear.sigma(t)
    return transition(net, xt, sigma, sigma - loglinear.sigma(t - dt))


def denoiser_probs(net, xt, t):
    """What its last step, from t (B,) to no noise at all, draws from, (B, L, V): no mask is left."""
    sigma = loglinear.sigma(t)
    probs = transition(net, xt, sigma, sigma)
    probs[:, :, net.config.mask_id] = 0
    return probs


# -----------------------------------------------------------------------------
# the rows of a call. What makes the samplers fast is here: skip at first reading


class Batch:
    """The n rows of a call of generate(), and which of them, `rows` (A,), are in work: at most
    batch_size; one that is finished makes room for the next.

    The ids x (n, L) are on the net's device; all else is on the CPU, so that what is masked is known
    without asking a GPU. Samplers use `steps`, `score`, `draw`, `unmask`, `remask`, `uniforms`."""

    def __init__(self, net, x, is_open, length, keys, batch_size, schedule, cfg_scale,
                 draw_options, on_change=None, compile=False, progress=False):
        n, L = x.shape
        self.net = net
        self.predicts = OBJECTIVES[net.config.objective].predicts
        self.schedule = schedule
        self.cfg_scale = cfg_scale
        self.draw_options = draw_options
        self.on_change = on_change
        self.device = next(net.parameters()).device
        self.draw_device = 'cpu' if self.device.type == 'mps' else self.device  # MPS has no float64
        self.x = x.to(self.device)
        self.is_open = is_open
        self.masked = is_open.clone()
        self.num_masked = is_open.sum(dim=1)
        self.length = length
        self.prompt_length = torch.where(is_open.any(dim=1), is_open.int().argmax(dim=1), length)
        self.keys = keys
        self.step = torch.zeros(n, dtype=torch.int64)
        self.start = torch.zeros(n, dtype=torch.int64)  # of the window that the net sees
        self.nfe = torch.zeros(n, dtype=torch.int64)
        self.mask_prob = torch.ones(n, dtype=torch.float64)  # what a time-conditioned net is told
        self.reveal_step = torch.full((n, L), -1)
        self.drawn_prob = None  # a sampler may ask for it: (n, L), of each token when it was drawn
        self.saw_non_finite = torch.zeros((), dtype=torch.bool, device=self.draw_device)
        self.asked = None
        queue = self.num_masked.nonzero().squeeze(1)
        self.rows = queue[:batch_size]
        self.queue = queue[batch_size:]
        self.slots = torch.arange(len(self.rows))  # the place of each row in the step before
        self.entered = torch.ones(len(self.rows), dtype=torch.bool)
        self.run_trunk = self.compile_trunk() if compile else net.trunk
        self.bar = tqdm(total=int(self.num_masked.sum()), unit=' tokens', desc='sampling',
                        disable=not progress)

    def steps(self, mask_prob, plan=None, start=None, to_the_end=False):
        """Yield (rows, step), both (A,), until every row is finished: the rows in work and the step
        that each takes now.

        mask_prob (S,) or (n, S): the probability of a mask before each step. plan (n, L): the step of
        each position; steps that unmask nothing are skipped. start (S,): where the net's window
        begins, at most (the end of the row is always seen whole). to_the_end: a row is finished after
        S - 1 steps, not when nothing is masked."""
        never = torch.iinfo(torch.int64).max
        last = mask_prob.size(-1) - 1
        mask_prob = mask_prob.expand(len(self.x), -1)
        while len(self.rows):
            rows = self.rows
            if plan is not None:
                self.step[rows] = torch.where(self.masked[rows], plan[rows], never).amin(dim=1)
            step = self.step[rows]
            self.mask_prob[rows] = mask_prob[rows, step].double()
            if start is not None:
                end = (self.length[rows] - self.net.config.block_size).clamp(min=0)
                self.start[rows] = torch.minimum(start[step], end)
            masked = int(self.num_masked.sum())
            yield rows, step
            self.asked = None
            self.bar.update(masked - int(self.num_masked.sum()))
            self.step[rows] += 1
            finished = self.step[rows] == last if to_the_end else self.num_masked[rows] == 0
            self.refill(finished)
        self.bar.close()

    def refill(self, finished):
        """Rows that are finished leave; the next in the queue take their places."""
        fresh = self.queue[:int(finished.sum())]
        self.queue = self.queue[len(fresh):]
        places = finished.nonzero().squeeze(1)[:len(fresh)]
        rows = self.rows.clone()
        rows[places] = fresh
        entered = torch.zeros_like(finished)
        entered[places] = True
        self.slots = (~finished | entered).nonzero().squeeze(1)
        self.rows = rows[self.slots]
        self.entered = entered[self.slots]

    def score(self, candidates, function):
        """Ask the net about the candidates (A, L) bool of the rows in work: function(logits (N, V))
        -> (N,) as a table (A, L) float64, -inf elsewhere. Rows without any are not evaluated."""
        def scores(logits, rows, cols):
            if self.predicts == 'x0':
                without_mask(logits, self.net.config.mask_id)
            return (function(logits),)
        return self.ask(candidates, scores)

    def draw(self, candidates):
        """Draw a token at each candidate (A, L) bool, for `unmask` to put there -> the table (A, L)
        of the probabilities that the net gives them, whatever the temperature; -inf elsewhere."""
        def scores_and_ids(logits, rows, cols):
            u = self.hashed(rows, cols, self.step[rows], 1).to(logits.device)
            ids, _ = draw(logits, u, self.net.config.mask_id, **self.draw_options)
            return probability(logits, ids), ids
        return self.ask(candidates, scores_and_ids)

    def ask(self, candidates, function):
        """The table (A, L) of what function(logits, rows, cols) -> (scores, ids or nothing) gives at
        the candidates; kept for `unmask` with the hidden states."""
        table = torch.full(candidates.shape, -torch.inf, dtype=torch.float64)
        row, col = candidates.nonzero(as_tuple=True)
        self.asked = row, col, None, []
        if len(row):
            rows = self.rows[row]
            h = self.trunk(rows, col)
            scores, *ids = self.head(h, lambda logits, n: function(logits, rows[n], col[n]))
            table[row, col] = scores.double().cpu()
            self.asked = row, col, h, ids
        return table

    def unmask(self, chosen, h=None):
        """Put tokens at those of the chosen positions (A, L) bool that are masked: those drawn by
        `draw`, or else drawn now from the net. h: its hidden states (N, 1, n_embd), if known."""
        chosen = chosen & self.masked[self.rows]
        ids = None
        if self.asked is not None:
            row, col, h, ids = self.asked
            kept = chosen[row, col]
            row = row[kept]
            col = col[kept]
        else:
            row, col = chosen.nonzero(as_tuple=True)
        if len(row) == 0:
            return
        rows = self.rows[row]
        if self.asked is not None:
            h = h[kept.to(h.device)]
            ids = ids[0][kept.to(ids[0].device)] if ids else None
        elif h is None:
            h = self.trunk(rows, col)
        mask_id = self.net.config.mask_id
        if ids is None:
            u = self.hashed(rows, col, self.step[rows], 1).to(self.draw_device)
            ids, probs = self.head(
                h, lambda logits, n: draw(logits, u[n], mask_id, **self.draw_options))
            if self.drawn_prob is not None:
                self.drawn_prob[rows, col] = probs.cpu()
        self.saw_non_finite |= (ids < 0).any()
        self.x[rows.to(self.device), col.to(self.device)] = ids.clamp(min=0).to(self.device)
        self.masked[rows, col] = False
        self.reveal_step[rows, col] = self.step[rows]
        self.num_masked -= rows.bincount(minlength=len(self.num_masked))
        if self.on_change:
            def given_prob(logits, n):
                return (probability(without_mask(logits, mask_id), ids[n]),)
            confidence, = self.head(h, given_prob)
            self.on_change(rows, col, ids.cpu(), confidence.cpu(), self.step[rows])

    def remask(self, chosen):
        """Mask the chosen positions (A, L) bool of the rows in work again."""
        row, col = chosen.nonzero(as_tuple=True)
        rows = self.rows[row]
        self.x[rows.to(self.device), col.to(self.device)] = self.net.config.mask_id
        self.masked[rows, col] = True
        self.num_masked += rows.bincount(minlength=len(self.num_masked))
        if self.on_change and len(rows):
            nothing = torch.full_like(rows, -1)
            self.on_change(rows, col, nothing, torch.zeros(len(rows)), self.step[rows])

    def end(self, rows, length):
        """End rows (n,) at these lengths (n,)."""
        self.length[rows] = length
        self.num_masked[rows] = 0
        self.masked[rows] = False

    def report_start(self):
        """Tell on_change what is there before the first step."""
        if self.on_change:
            inside = torch.arange(self.x.size(1)) < self.length[:, None]
            rows, col = inside.nonzero(as_tuple=True)
            ids = torch.where(self.is_open, -1, self.x.cpu())[rows, col]
            self.on_change(rows, col, ids, torch.ones(len(rows)), torch.full_like(rows, -1))

    def uniforms(self, rows, step=0):
        """(A, L) float64 uniforms that decide when, of all positions of rows (A,) at their steps."""
        step = torch.as_tensor(step).view(-1, 1)
        return self.hashed(rows[:, None], torch.arange(self.x.size(1)), step, 0)

    def hashed(self, rows, cols, step, what):
        """Float64 uniforms in [0, 1): a hash of the row's key, the position, the step, and `what`
        they decide (0: when, 1: which token)."""
        counter = ((2 * step + what) << 32 | cols).numpy().astype(np.uint64)
        bits = splitmix64(self.keys[rows.numpy()] ^ splitmix64(counter))
        return torch.from_numpy((bits >> np.uint64(11)).astype(np.float64) * 2.0 ** -53)

    def not_the_mask(self, logits):
        """The probability that a d3pm net gives all tokens together, (N,)."""
        return 1 - logits.double().softmax(dim=-1)[:, self.net.config.mask_id]

    def total_score(self, logits):
        return relative_score(self.net, logits.double()).sum(dim=-1)

    def trunk(self, rows, cols):
        """The trunk over the rows of the positions (rows, cols), both (N,) -> h (N, 1, n_embd) there;
        with guidance (N, 2, n_embd), the second with what is given masked. Each row is seen through
        the window of block_size that begins at its start."""
        config = self.net.config
        active, row = rows.unique(return_inverse=True)
        start = self.start[active]
        width = min(config.block_size, int((self.length[active] - start).max()))
        window = start[:, None] + torch.arange(width)  # (A, W)
        attention_mask = window < self.length[active][:, None]
        window = window.clamp(max=self.x.size(1) - 1)
        given = ~self.is_open[active[:, None], window] & attention_mask
        sigma = torch.zeros(len(active))
        if config.time_conditioning:
            sigma = self.schedule.conditioning_at(self.mask_prob[active]).float()
        guided = (given.any(dim=1) & bool(self.cfg_scale)).nonzero().squeeze(1)
        self.nfe[active] += 1
        self.nfe[active[guided]] += 1

        x = self.x[active[:, None].to(self.device), window.to(self.device)]
        index = row[:, None]
        if len(guided):
            hidden = given[guided].to(self.device)
            x = torch.cat((x, x[guided.to(self.device)].masked_fill(hidden, config.mask_id)))
            sigma = torch.cat((sigma, sigma[guided]))
            attention_mask = torch.cat((attention_mask, attention_mask[guided]))
            partner = torch.arange(len(active))  # a row without anything given is its own
            partner[guided] = len(active) + torch.arange(len(guided))
            index = torch.stack((row, partner[row]), dim=1)  # (N, 2)
        if attention_mask.all():
            attention_mask = None
        h = self.run(x, sigma, attention_mask)
        return h[index.to(self.device), (cols - start[row])[:, None].to(self.device)]

    def run(self, x, sigma, attention_mask):
        """The trunk over x (B, W); on a CPU a few rows at a time, so that they stay in its cache."""
        size = len(x)
        if self.device.type == 'cpu':
            size = max(1, 1024 // x.size(1))
        sigma = sigma.to(self.device)
        if attention_mask is not None:
            attention_mask = attention_mask.to(self.device)
        parts = []
        for i in range(0, len(x), size):
            mask = None if attention_mask is None else attention_mask[i:i + size]
            parts.append(self.run_trunk(x[i:i + size], sigma[i:i + size], mask))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def compile_trunk(self):
        """The compiled trunk, in few sizes: a batch is filled up to a power of 2 by its last row."""
        options = dict(mode='reduce-overhead') if self.device.type == 'cuda' else {}
        compiled = torch.compile(self.net.trunk, dynamic=False, **options)

        def run(x, sigma, attention_mask):
            size = 2 ** math.ceil(math.log2(len(x)))
            repeat = torch.arange(size).clamp(max=len(x) - 1).to(self.device)
            mask = None if attention_mask is None else attention_mask[repeat]
            return compiled(x[repeat], sigma[repeat], mask)[:len(x)].clone()
        return run

    def trunk_with_cache(self, cache, col):
        """A causal net's h (A, 1, n_embd) for what comes at position col (A,) of the rows in work."""
        if len(self.slots) < cache.rows:
            cache.keep(self.slots)
        fresh = self.entered & (self.prompt_length[self.rows] > 1)
        if fresh.any():  # all of the prompt but its last token
            rows = self.rows[fresh]
            cache.slots = fresh.nonzero().squeeze(1).to(self.device)
            cache.position = None
            longest = int(self.prompt_length[rows].max()) - 1
            self.net.trunk(self.x[rows.to(self.device), :longest], cache=cache)
            self.nfe[rows] += 1
        cache.position = col - 1
        x = self.x[self.rows.to(self.device), (col - 1).to(self.device)][:, None]
        self.nfe[self.rows] += 1
        return self.net.trunk(x, cache=cache)

    def head(self, h, function):
        """function(logits (n, V), slice of the N positions of h) over chunks of h (N, 1 or 2, n_embd);
        what it returns, tensors (n,), joined to (N,). The logits are the function's own to change.
        Guided: un + (1 + cfg_scale) (cond - un) (SMDM, equation 6)."""
        megabytes = 22 if self.device.type == 'cpu' else 25
        size = max(1, 2 ** megabytes // self.net.config.vocab_size)
        results = []
        for i in range(0, len(h), size):
            logits = self.net.head(h[i:i + size])  # (n, 1 or 2, V)
            cond = logits[:, 0]
            if logits.size(1) == 2:
                un = logits[:, 1]
                cond = un + (1 + self.cfg_scale) * (cond - un)
            if not self.net.config.head_mask:
                without_mask(cond, self.net.config.mask_id)  # -inf minus -inf would be NaN
            results.append(function(cond.to(self.draw_device), slice(i, i + size)))
        return [torch.cat(parts) for parts in zip(*results, strict=True)]


# -----------------------------------------------------------------------------
# what a user gives: numbers, prompts, templates


def is_number(value):
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_whole(value):
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_sampler(objective, name, options):
    """Refuse a sampler that does not take the net, or options that are not its own."""
    names = list(SAMPLERS)
    require(name in names, f"sampler '{name}' is not known: choose from {', '.join(names)}")
    predicts = OBJECTIVES[objective].predicts
    able = [other for other in names if predicts in TAKES[other]]
    takes = [key for key, record in OBJECTIVES.items() if record.predicts in TAKES[name]]
    require(name in able, f"sampler '{name}' takes nets of the objectives {', '.join(takes)}; for "
            f"this one, {objective}, there is {', '.join(able)}")
    own = list(inspect.signature(SAMPLERS[name]).parameters)[2:]
    has = 'the options ' + ', '.join(own) if own else 'no options of its own'
    for key in options:
        require(key in own, f"{key} does not go with sampler '{name}', which has {has}")


def check_numbers(sampler, **values):
    for name in ('num_samples', 'steps', 'top_k', 'batch_size', 'seed', 'first_row'):
        require(is_whole(values[name]), f'{name}={values[name]!r}: it must be a whole number')
    for name, least, most, needed in (
            ('num_samples', 1, 10 ** 8, 'at least 1, and at most 100 million'),
            ('batch_size', 1, math.inf, 'at least 1'),
            ('steps', 1, 10 ** 8, 'at least 1, and at most 100 million'),
            ('top_k', 0, math.inf, '0 (all tokens) or more'),
            ('temperature', 0, sys.float_info.max, '0 or more, and finite'),
            ('top_p', 5e-324, 1, 'above 0 and at most 1'),
            ('cfg_scale', -1, sys.float_info.max, '-1 or more, and finite')):
        value = values[name]
        fits = is_number(value) and least <= value <= most
        require(fits, f'{name}={value}: it must be {needed}')
    if sampler == 'ar':
        require(not values['compile'],
                "compile=True: it must be False for sampler 'ar', whose cache grows")
        require(not values['cfg_scale'], f"cfg_scale={values['cfg_scale']}: it must be 0 for sampler "
                "'ar': guidance masks the prompt, which a causal net does not know")


def check_fixed(confidence, confidence_temperature, threshold):
    known = ['uniform', *CONFIDENCE]
    require(confidence in known,
            f"confidence='{confidence}' is not known: choose from {', '.join(known)}")
    require(is_number(confidence_temperature) and 0 <= confidence_temperature < math.inf,
            f'confidence_temperature={confidence_temperature}: it must be 0 or more, and finite')
    require(threshold is None or is_number(threshold) and 0 < threshold < math.inf,
            f'threshold={threshold}: it must be above 0')
    options = (threshold is not None) + bool(confidence_temperature)
    require(options < 2 and (confidence != 'uniform' or not options), "threshold, or else confidence_temperature, goes "
            "with confidence 'top_prob', 'prob_diff' or 'entropy'")


def check_remdm(etas, strategy, eta, t_on, t_off, alpha_on):
    require(strategy in list(etas),
            f"strategy='{strategy}' is not known: choose from {', '.join(etas)}")
    values = dict(eta=0.0 if eta is None else eta, t_on=t_on, t_off=t_off, alpha_on=alpha_on)
    for name, value in values.items():
        require(is_number(value) and 0 <= value <= 1, f'{name}={value}: it must be in 0 ... 1')
    require(0 < t_off <= t_on < 1 and alpha_on > 0, f't_on={t_on}, t_off={t_off}, '
            f'alpha_on={alpha_on}: 0 < t_off <= t_on < 1 and alpha_on above 0 are needed')


def padding_of(net):
    """The id after the end of a row that is shorter than others."""
    if net.config.pad_id is not None:
        return net.config.pad_id
    return get_tokenizer(**net.tokenizer).pad_id if net.tokenizer else 0


def text_to_ids(net, name, text, longest):
    """Text of a prompt or a template (`name`) -> ids, -1 where the template is open."""
    require(net.tokenizer is not None,
            f'the source of the weights names no tokenizer: give the {name} as ids')
    tok = get_tokenizer(**net.tokenizer)
    pieces = [text]
    if name == 'template':  # text, number, text, number, ..., text
        pieces = re.split(r'<\|mask(?::(\d{1,8}))?\|>', text)
    ids = []
    for i, piece in enumerate(pieces):
        if i % 2:
            count = int(piece or 1)
            require(count <= longest, f'{name}={text!r}: {piece} open tokens, where a row has at '
                    f'most {longest}')
            ids += [-1] * count
            continue
        require(name == 'prompt' or '<|mask' not in piece,
                f'{name}={text!r}: open tokens are written <|mask|> or <|mask:20|>')
        require(not any('\ud800' <= letter <= '\udfff' for letter in piece),
                f'{name}={text!r}: it is not valid UTF-8 text')
        ids += tok.encode(piece) if piece else []
    return ids


def id_rows(net, name, value, n, longest):
    """Text, n texts, ids (P,), or n rows of ids of any lengths -> 1 (for all) or n rows of ids."""
    if hasattr(value, 'tolist'):
        value = value.tolist()
    if isinstance(value, str):
        value = [value]
    require(isinstance(value, (list, tuple)), f'{name}={value!r}: text or ids are needed')
    rows = []
    for row in value:
        if isinstance(row, str):
            row = text_to_ids(net, name, row, longest)
        rows.append(row.tolist() if hasattr(row, 'tolist') else row)
    if not any(isinstance(row, (list, tuple)) for row in rows):
        rows = [rows]
    require(len(rows) in (1, n),
            f'{name} has {len(rows)} rows: 1, for all, or num_samples={n} are needed')
    for row in rows:
        require(isinstance(row, (list, tuple)), f'{name} holds {row!r} beside rows of ids')
        for i in row:
            require(type(i) is int, f'{name} holds {i!r}, which is no id')
    return rows


def is_nothing(value):
    if hasattr(value, 'numel') or hasattr(value, 'size'):
        return 0 in value.shape
    return value is None or isinstance(value, (str, list, tuple)) and len(value) == 0


def lay_out(net, n, length, prompt, template, bos_id, longest):
    """What is there before sampling: ids x (n, L), which of them are open (n, L) bool, and the
    lengths of the rows (n,). bos_id: what a row without a prompt begins with, or None; longest: the
    most tokens a row may have. Raises ValueError where things do not fit."""
    config = net.config
    require(is_nothing(prompt) or is_nothing(template),
            'give a prompt or a template, not both: a template may begin with the prompt')
    fills_in = not is_nothing(template)
    name = 'template' if fills_in else 'prompt'
    given = template if fills_in else prompt
    rows = id_rows(net, name, [] if is_nothing(given) else given, n, longest)
    if bos_id is not None:
        rows = [list(row) or [bos_id] for row in rows]
    if length is None:
        length = [len(row) for row in rows] if fills_in else config.block_size
    lengths = read_lengths(length, n, longest, config.block_size)

    most = lengths.tolist() if len(rows) > 1 else [int(lengths.min())]
    ragged = bool(lengths.min() < lengths.max())
    for row, L in zip(rows, most, strict=True):
        if fills_in:
            require(len(row) == L and not (ragged and len(rows) == 1),
                    f'the template has {len(row)} tokens, the length is {L}: they must be the same')
        require(len(row) <= L, f'the prompt has {len(row)} tokens, more than the length of {L}')
        for i in row:
            is_hole = fills_in and i in (-1, config.mask_id)
            require(is_hole or 0 <= i < config.vocab_size and i != config.mask_id,
                    f'the {name} holds {i}, an id that is not a token: ids are 0 ... '
                    f'{config.vocab_size - 1}, without the mask {config.mask_id}')
    L = int(lengths.max())
    ids = torch.tensor([row + [-1] * (L - len(row)) for row in map(list, rows)]).expand(n, L)
    hole = ids == -1
    if fills_in and config.mask_id is not None:
        hole = hole | (ids == config.mask_id)
    x = torch.where(hole, config.mask_id or 0, ids)
    return x, hole & (torch.arange(L) < lengths[:, None]), lengths


def read_lengths(length, n, longest, block_size):
    """The tokens of each row (n,), from a number or n of them."""
    lengths = length.tolist() if hasattr(length, 'tolist') else length
    if not isinstance(lengths, (list, tuple)):
        lengths = [lengths]
    whole = all(is_whole(value) and value >= 1 for value in lengths)
    require(len(lengths) in (1, n) and whole, f'length={length!r}: a whole number of at least 1, for '
            f'all rows or for each of num_samples={n}, is needed')
    hint = ''
    if longest == block_size:
        hint = ", the net's block_size (sampler 'semi_ar' goes further)"
    require(max(lengths) <= longest, f'length={max(lengths)}: it must be 1 to {longest}{hint}')
    return torch.tensor(lengths).expand(n).clone()


# -----------------------------------------------------------------------------
# watching: in a terminal, and as a page


class Events:
    """Keeps what happens to each row, in order: (step, position, id, confidence), where an id of
    None is a mask and a step of -1 is what was there before the first. show, if given, is called
    with the events of the first row whenever it has new ones."""

    def __init__(self, num_rows, show=None):
        self.of_row = [[] for _ in range(num_rows)]
        self.show = show

    def __call__(self, rows, cols, ids, confidence, steps):
        columns = [tensor.tolist() for tensor in (rows, steps, cols, ids, confidence)]
        for row, step, col, i, sure in zip(*columns, strict=True):
            self.of_row[row].append((step, col, None if i == -1 else i, sure))
        if self.show and 0 in rows:
            self.show(self.of_row[0])


def spelling(tok, ids):
    """The text of each of ids, None for None. A character whose bytes are spread over several
    tokens stands at the first of them."""
    if tok is None:
        return [None if i is None else f'{i} ' for i in ids]
    texts = []
    while len(texts) < len(ids):
        i = len(texts)
        text, span = None if ids[i] is None else tok.decode(ids[i:i + 1]), 1
        if text is not None and '\ufffd' in text:
            for end in range(i + 2, min(i + 4, len(ids)) + 1):
                if None not in ids[i:end] and '\ufffd' not in tok.decode(ids[i:end]):
                    text, span = tok.decode(ids[i:end]), end - i
                    break
        texts += [text] + [''] * (span - 1)
    return texts


class Terminal:
    """Shows a row as it fills in: redrawn in place in a terminal, else printed a few times."""

    def __init__(self, spell):
        self.spell = spell  # ids -> texts
        self.live = sys.stdout.isatty()
        self.drawn, self.height, self.eighths, self.when = 0, 0, 0, 0.0  # of what is on show

    def __call__(self, events, end=False):
        if self.live and not end and time.time() < self.when + 0.05:
            return
        ids = list({col: i for _, col, i, _ in events}.values())  # the last of each position
        num_open = sum(i is None for step, _, i, _ in events if step < 0)
        filled = num_open - ids.count(None)
        eighths = 8 * filled // max(num_open, 1)
        head = f'step {events[-1][0] + 1}, {filled} of {num_open} tokens'
        if self.live:
            fresh = {col for _, col, _, _ in events[self.drawn:] if not end}
            self.redraw(head, self.spell(ids), fresh, end)
        elif eighths > self.eighths or end and self.drawn < len(events):
            tokens = ['_' if token is None else token for token in self.spell(ids)]
            print(f'--- {head}', ''.join(tokens), sep='\n', flush=True)
        else:
            return
        self.drawn, self.eighths, self.when = len(events), max(eighths, self.eighths), time.time()

    def redraw(self, head, tokens, fresh, end):
        columns, rows = shutil.get_terminal_size()
        lines, width = [''], 0
        for col, token in enumerate(tokens):
            style = '\x1b[m' + ('\x1b[2m' if token is None else '\x1b[1;32m' * (col in fresh))
            lines[-1] += style
            for c in '░' if token is None else token.replace('\t', '    '):
                cells = 1 + (unicodedata.east_asian_width(c) in 'WF')
                if c == '\n' or width + cells >= columns:  # wrapped here: the height must be known
                    lines.append(style)
                    width = 0
                if c != '\n':
                    lines[-1] += c if c.isprintable() else ' '
                    width += cells
        lines = lines if end else lines[-max(1, rows - 2):]  # not over what has scrolled away
        up = f'\x1b[{self.height}A' * (self.height > 0)
        lines.insert(0, f'{up}\r\x1b[J\x1b[7m{head[:columns]}\x1b[m')
        print('\n'.join(lines) + '\x1b[m', flush=True)
        self.height = len(lines)


PAGE = r"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>nanoMDM: a sample, step by step</title>
<style>
:root { color-scheme: light dark; --paper: light-dark(#fbfaf7, #17171c); --line: #8884;
  --ink: light-dark(#22222a, #e9e7e2); --accent: light-dark(#4b4acf, #a3a2ff) }
body { max-width: 60rem; margin: auto; padding: 1.5rem; font: 15px/1.5 system-ui;
  background: var(--paper); color: var(--ink) }
header { position: sticky; top: 0; display: flex; flex-wrap: wrap; gap: .5rem 1rem;
  padding-bottom: 1rem; background: var(--paper); border-bottom: 1px solid var(--line) }
button, select { font: inherit }
button { width: 5rem; border: 0; background: var(--accent); color: var(--paper) }
button, #scale, #text span { border-radius: .3rem }
#at { width: 100%; accent-color: var(--accent) }
#scale { width: 8rem }
#now { margin-left: auto }
#text { margin: 1.5rem 0; font: 1.1rem/1.9 serif; white-space: pre-wrap; overflow-wrap: anywhere }
#text span { padding: .1em 0 }
#text .mask { background: var(--line); margin: 0 1px }
#text .given { border-bottom: 2px solid var(--accent); border-radius: 0; font-weight: 600 }
#text .fresh { outline: 2px solid var(--accent) }
</style>
<header><input id="at" type="range" min="0" aria-label="step"><button id="play">Play</button>
<label>sample <select id="which"></select></label>
<label>colour <select id="colour"><option value="when">time: first to last</option>
<option value="sure">confidence: 0 to 1</option></select></label>
<span id="scale"></span><span id="now"></span></header>
<div id="text"></div><small id="settings"></small>
<script id="data" type="application/json">DATA</script>
<script>
const $ = id => document.getElementById(id), data = JSON.parse($('data').textContent)
const byTime = () => $('colour').value === 'when'
const tint = x => `oklch(.7 .17 ${byTime() ? 285 - 235 * x : 25 + 125 * x} / .35)`
let sample, steps, timer
function choose(k) {
  sample = data.samples[k]
  steps = [...new Set(sample.events.map(([step]) => step))]
  $('at').max = steps.length
  $('text').replaceChildren(...sample.given.map(() => document.createElement('span')))
  show(steps.length)
}
function show(n) {  // what there is after n of the steps
  const last = n ? steps[n - 1] : -1, tokens = sample.given.map(text => ({ text }))
  for (const [step, at, text, sure] of sample.events)
    if (step <= last) tokens[at] = text === null ? { text } : { text, step, sure }
  tokens.forEach(({ text, step, sure }, i) => {
    const span = $('text').children[i], drawn = step !== undefined
    span.textContent = text === null ? '\u2007\u2007\u2007' : text.replace(/\n/g, '\u21b5\n')
    span.className = text === null ? 'mask' : !drawn ? 'given'
      : step === last && n < steps.length ? 'fresh' : ''
    span.style.background = drawn ? tint(byTime() ? step / Math.max(1, steps.at(-1)) : sure) : ''
    span.title = drawn ? `step ${step + 1}, probability ${sure.toFixed(3)}` : ''
  })
  $('at').value = n
  $('now').textContent = `step ${last + 1}, ${tokens.filter(t => t.text === null).length} masked`
  $('scale').style.background = `linear-gradient(90deg, ${[0, .25, .5, .75, 1].map(tint)})`
}
function play(on) {
  timer = clearInterval(timer)
  $('play').textContent = on ? 'Pause' : 'Play'
  if (!on) return
  if (+$('at').value === steps.length) show(0)
  timer = setInterval(() => {
    show(Math.min(+$('at').value + 1, steps.length))
    if (+$('at').value === steps.length) play(false)
  }, Math.min(20000, Math.max(3000, 120 * steps.length)) / steps.length)
}
data.samples.forEach((_, k) => $('which').append(new Option(k + 1, k)))
$('which').onchange = () => { play(false); choose($('which').value) }
$('colour').onchange = () => show(+$('at').value)
$('at').oninput = () => { play(false); show(+$('at').value) }
$('play').onclick = () => play(!timer)
onkeydown = e => {
  if (e.key === ' ' && !/SELECT|BUTTON/.test(e.target.tagName)) play(!timer, e.preventDefault())
}
$('settings').textContent = data.settings
choose(0)
if (location.hash === '#play') play(true)
else if (location.hash) show(Math.min(steps.length, +location.hash.slice(1) || 0))
</script></html>
"""


def write_page(path, samples, settings):
    """A page that needs nothing else. samples: for each row {given: [text, null where open],
    events: [[step, position, text or null: masked again, confidence]]}; settings: a line."""
    data = json.dumps(dict(samples=samples, settings=settings))
    with open(path + '.unfinished', 'w', encoding='utf-8') as f:
        f.write(PAGE.replace('DATA', data.replace('<', '\\u003c')))  # no text ends the script
    os.replace(path + '.unfinished', path)




# -----------------------------------------------------------------------------


def read_texts(name, text):
    """[text], or the lines of a file (FILE:path) or of stdin (-); [] where there is nothing."""
    lines = [text]
    if text.startswith('FILE:') or text == '-':
        if text != '-' and not os.path.isfile(text[5:]):
            raise FileNotFoundError(f'{name}={text}: there is no file {text[5:]}')
        with open(text[5:], 'rb') if text != '-' else sys.stdin.buffer as f:
            try:
                lines = f.read().decode('utf-8-sig').replace('\r', '').split('\n')
            except UnicodeDecodeError as error:
                raise ValueError(f'{name}={text}: not UTF-8 text ({error.reason})') from None
    lines = [line for line in lines if line]
    require(lines or not text, f'{name}={text}: there is no text in it')
    return lines


def check_output(name, path):
    """Refuse a path that cannot be written, before hours of sampling."""
    folder = os.path.dirname(path) or '.'
    require(not os.path.isdir(path), f'{name}={path}: it is a folder')
    require(os.path.isdir(folder), f'{name}={path}: there is no folder {folder}')
    require(not os.path.exists(path) or os.path.isfile(path), f'{name}={path}: it is no file')
    require(os.access(folder, os.W_OK), f'{name}={path}: {folder} cannot be written to')


def trace_page(path, rows, of_row, spell, settings):
    """Write the page of these rows of ids and their events."""
    pages = []
    for ids, events in zip(rows, of_row, strict=True):
        final = spell(ids)

        def text(col, i, ids=ids, final=final):
            if i is None:
                return None
            # what stays is spelt with its neighbours
            return final[col] if col < len(ids) and ids[col] == i else spell([i])[0]
        pages.append(dict(
            given=[text(col, i) for step, col, i, _ in events if step < 0],
            events=[(step, col, text(col, i), round(confidence, 4))
                    for step, col, i, confidence in events if step >= 0]))
    write_page(path, pages, settings)


if __name__ == '__main__':
    from configurator import configure
    constants = configure(globals())
    check_overrides(overrides)
    out = out and str(out)
    trace = trace and str(trace)
    if out:
        check_output('out', out)
    if trace:
        check_output('trace', trace)
    require(not out or out != trace, f'out and trace are both {out}: give two names')
    prompts = read_texts('prompt', prompt)
    templates = read_texts('template', template)
    device = pick_device(device)
    if device.type == 'cpu':
        reuse_memory()

    source = init_from or os.path.join(out_dir, 'ckpt.pt')
    net = load_pretrained(str(source), ema, device, **(overrides or {}))
    if tokenizer:
        net.tokenizer = (net.tokenizer or {}) | dict(name=str(tokenizer))
    tok = get_tokenizer(**net.tokenizer) if net.tokenizer else None
    if tok:
        require(tok.vocab_size == net.config.vocab_size, f"tokenizer '{tok.name}' has "
                f'{tok.vocab_size} ids, the net {net.config.vocab_size}: give the one it was '
                'trained with')
    names = {name for f in SAMPLERS.values() for name in list(inspect.signature(f).parameters)[2:]}
    options = {name: constants[name] for name in constants
               if name in names and constants[name] is not None}
    repeats = num_samples
    num_samples *= max(1, len(prompts), len(templates))
    prompts = [text for text in prompts for _ in range(repeats)]
    templates = [text for text in templates for _ in range(repeats)]

    def spell(ids):
        return spelling(tok, ids)
    show = Terminal(spell) if watch else None
    events = Events(num_samples, show) if watch or trace else None
    with autocast(device, dtype):
        samples = generate(
            net, num_samples, length, steps, sampler, prompts, cfg_scale, temperature, top_p, top_k,
            seed, batch_size=batch_size, template=templates, progress=not watch, on_change=events,
            compile=compile, **options)

    lengths = samples.length.tolist()
    rows = [ids[:n] for ids, n in zip(samples.tokens.tolist(), lengths, strict=True)]
    texts = [None] * num_samples
    if tok:
        texts = [tok.decode([i for i in ids if i != tok.pad_id or i == tok.eos_id]) for ids in rows]
    results = list(zip(rows, texts, samples.nfe.tolist(), strict=True))
    if watch:
        show(events.of_row[0], end=True)
    if trace:
        settings = ', '.join(f'{key}={value!r}' for key, value in constants.items()
                             if value is not None)
        trace_page(trace, rows, events.of_row, spell, settings)
        print(f'{num_samples} samples written to {trace}: open it in a browser')
    if out:
        with open(out + '.unfinished', 'w') as f:
            for ids, text, nfe in results:
                f.write(json.dumps(dict(ids=ids, text=text, nfe=nfe, settings=constants)) + '\n')
        os.replace(out + '.unfinished', out)
        print(f'{num_samples} samples written to {out}')
    else:
        for i, (ids, text, nfe) in list(enumerate(results))[watch:]:  # the first has been watched
            print(f'--- sample {i} ({nfe} network evaluations)\n{ids if text is None else text}')
