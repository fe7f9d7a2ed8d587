"""
Draw samples from a trained net:

    python sample.py --steps=1024 --top_p=0.95       from out/, where config/owt_mlm.py trains to
    python sample.py --out_dir=out-quickstart --num_samples=4 --prompt="Return the"
    python sample.py --out_dir=out-quickstart --template="Return the <|mask:20|> list."

A sampler is a loop over b.steps(...), b being the Batch of rows. In each step it asks the net
(b.score, b.draw), chooses positions, and fills them in (b.unmask) or masks them again (b.remask).
Where the steps do not depend on the net they are drawn first (b.follow): the net runs only for
rows that change, and projects only what is unmasked.
Row i is a function of (seed, first_row + i) alone: the batch size changes nothing but rounding.

MDLM: Sahoo et al. 2024, arXiv 2406.07524; SEDD: Lou et al. 2023, 2310.16834; SMDM: Nie et al. 2024,
2410.18514; LLaDA: Nie et al. 2025, 2502.09992; ReMDM: Wang et al. 2025, 2503.00307; first hitting:
Zheng et al. 2024, 2409.02908; BD3-LM: Arriola et al. 2025, 2503.09573.
"""
# first: it answers Ctrl-C
from configurator import check_spec, checked, configure, constants_of, defaults_of, require

import json
import math
import numbers
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import get_tokenizer, key_of, splitmix64
from model import (
    FIELDS, OBJECTIVES, KVCache, Schedule, autocast, check_overrides, float64, free_memory,
    load_pretrained, loglinear, pick_device, require_known, reuse_memory, schedule_of, sent,
    sent_at_once, write_whole)

# the constants; configurator.py checks what stands in [...]
out_dir = 'out'         # where train.py left ckpt.pt
init_from = None        # another source of weights for load_pretrained; None: out_dir
overrides = None        # [dict] ModelConfig fields the source cannot tell; --n_head=4 sets one
ema = True              # the averaged weights; False: the last ones
tokenizer = None        # None: the one the checkpoint names; 'none': ids alone
device = 'auto'         # 'auto', 'cpu', 'cuda', 'cuda:1', 'mps'
dtype = 'auto'          # [auto | float32 | bfloat16] auto: bfloat16 where the device is fast at it
compile = False         # compile the trunk, with CUDA graphs: for many steps of few rows (not ar)
seed = 0
num_samples = 4         # of each prompt or template
batch_size = 16         # rows that go through the net together
length = None           # tokens a sample, prompt included; None: the template's or block_size
steps = 1024            # of the sampler (semi_ar, block: of each; first_hitting, ar: one a token)
sampler = None          # a key of SAMPLERS; None: by the net's objective
temperature = 1.0       # 0: the most probable token
top_p = None            # keep tokens of cumulative probability <= top_p; None: 1.0, remdm 0.9
top_k = 0               # keep the k most probable tokens; 0: all
cfg_scale = 0.0         # guidance: un + (1 + cfg_scale) (cond - un), un with the prompt masked
prompt = ''             # text to begin with; FILE:prompts.txt: one a line; -: stdin; IDS:5,6,7: ids
template = ''           # text to fill in at <|mask|> or <|mask:20|>; as above, open ids being -1
draw_dtype = 'float64'  # [float64 | float32] of draws; float32: as released, see draw()
sampler_options = None  # [dict] its own options; --eta=0.1 sets one
out = None              # [str] write the samples to this .jsonl file instead of the terminal
watch = False           # show the first sample in the terminal as it fills in
trace = None            # [str] write a page that plays the sampling to this .html file


@dataclass
class Samples:
    tokens: torch.Tensor       # (n, L) int64, no mask id left; padding after the end of a row
    nfe: torch.Tensor          # (n,) int64, network evaluations of a row; a guided pair counts 2
    reveal_step: torch.Tensor  # (n, L) int64, step of the last unmasking, from 0; -1: given
    length: torch.Tensor       # (n,) int64, tokens of the row, its EOS included
    log_prob: torch.Tensor = None  # (n, L) float64, of a text's tokens, each as it was unmasked


@torch.no_grad()
def generate(
    net, num_samples, length, steps, sampler='ancestral', prompt=None, cfg_scale=0.0,
    temperature=1.0, top_p=None, top_k=0, seed=0, first_row=0, batch_size=16, schedule=None,
    template=None, progress=False, on_change=None, compile=False, draw_dtype='float64',
    on_finish=None, numbers=None, text=None, **options,
):
    """Draw num_samples rows -> Samples. The options not named here are as the constants above say.

    length: tokens a row, for all or for each. sampler None: by the objective; **options: its own.
    prompt: text, n texts, ids (P,), or n rows of ids of any lengths. template: the same, as long as
    the row, open where it holds -1 or the mask. schedule None: the one the net was trained with.
    on_change(rows, cols, ids, confidence, steps), each (N,) on the CPU, hears of positions that are
    unmasked, with the net's probability of the tokens, or masked again (id -1); and first of the
    whole start, as step -1. on_finish(row, ids, nfe) hears of each row when it is finished.
    numbers (n,): of the rows, in place of first_row, first_row + 1, ...
    text: ids (n, L) that the open positions take in place of draws. A rule that chooses positions
    by the net alone then gives the text the exact likelihood out.log_prob.sum(dim=1), at
    temperature 1 and with all tokens (DUEL: Turok et al. 2026, arXiv 2603.01367).
    Raises ValueError where an option is impossible, or memory does not suffice."""
    config = net.config
    if sampler is None:
        sampler = default_sampler(config)
    if top_p is None:
        top_p = 0.9 if 'remdm' in (sampler, options.get('rule')) else 1.0
    check_numbers(locals())
    require_known('draw_dtype=', draw_dtype, ('float64', 'float32'))
    check_sampler(config, sampler, options)
    if schedule is None:
        schedule = schedule_of(net.constants)
    bos_id = None
    require(sampler != 'ar' or not cfg_scale,
            f"cfg_scale={cfg_scale}: it must be 0 for sampler 'ar'")
    if sampler in ('ar', 'block'):
        require(not compile, f"compile=True: it must be False for sampler '{sampler}'")
        if net.tokenizer is not None:
            tok = get_tokenizer(**net.tokenizer)
            if sampler == 'ar' or net.constants.get('first_given'):
                bos_id = tok.bos_id
            options.setdefault('eos_id', tok.eos_id if text is None else -1)
    longest = 2 ** 24 if sampler in ('semi_ar', 'block') else config.block_size
    x, is_open, lengths = lay_out(
        net, num_samples, length, prompt, template, bos_id, longest, steps)
    numbers = range(first_row, first_row + num_samples) if numbers is None else numbers
    keys = np.array([key_of(seed, number) for number in numbers], dtype=np.uint64)
    draw_options = dict(
        temperature=temperature, top_k=top_k, top_p=top_p, dtype=getattr(torch, draw_dtype))
    scored = () if text is None else (text_of(net, text, is_open), sampler)
    b = (Batch if text is None else TextBatch)(
        net, x, is_open, lengths, keys, batch_size, schedule, cfg_scale, draw_options, on_change,
        on_finish, compile, progress, *scored)
    try:
        SAMPLERS[sampler](b, steps, **options)
    finally:
        b.bar.close()

    assert not b.masked.any()
    b.require_finite()
    inside = torch.arange(x.size(1)) < b.length[:, None]
    if not inside.all():
        pad_id = config.pad_id
        if pad_id is None:
            pad_id = get_tokenizer(**net.tokenizer).pad_id if net.tokenizer else 0
        b.x = torch.where(inside.to(b.device), b.x, pad_id)
    log_prob = None if text is None else b.drawn_prob
    return Samples(b.x.cpu(), b.nfe, b.reveal_step, b.length, log_prob)


# -----------------------------------------------------------------------------
# the samplers: f(batch, num_steps, its own options). A new one is a function under @sampler_for;
# the comment behind an option says what it takes as that of a constant does: [0 <= x <= 1]

SAMPLERS = {}
TAKES = {}  # name -> what the nets it takes predict


def sampler_for(*predicts):
    """Enter a sampler into the table, for nets whose objective predicts one of these."""
    def enter(function):
        SAMPLERS[function.__name__] = function
        TAKES[function.__name__] = predicts
        return function
    return enter


def flags():
    """What configure() takes besides the constants: --n_head=4 for a key of overrides, --eta=0.1
    for one of sampler_options."""
    options, constants = {}, constants_of(__file__)
    for name, function in SAMPLERS.items():
        for option, (default, comment) in defaults_of(function).items():
            require(option not in constants, f"sampler '{name}': its option {option} "
                    'has the name of a constant of sample.py: give it another')
            about = f'{name}: {comment}'
            if option in options:
                default, others = options[option]
                about = f'{others}; {about}'
            options[option] = default, about
    fields = {field: (None, 'a field of ModelConfig') for field in FIELDS}
    return dict(overrides=fields, sampler_options=options)


def grid(begin, end, num_steps):
    """num_steps + 1 evenly spaced times, exact at both ends."""
    return begin + (end - begin) * torch.arange(num_steps + 1, dtype=torch.float64) / num_steps


def plan_steps(b, mask_prob):
    """Draw the step (n, L) that unmasks each position, given the probability of a mask (S + 1,)
    before each step and at the end: the first step after which P(still masked) is at or below the
    position's uniform. The last step takes the rest."""
    still = mask_prob / mask_prob[0]
    still[-1] = 0
    return len(still) - 1 - torch.searchsorted(still[1:].flip(0), b.uniforms(), right=True)


def most_confident(scores, count):
    """The `count` (A,) highest of each row of scores (A, L) -> (A, L) bool; the first of equals.
    What a net gives goes through b.rounded(scores) before."""
    rank = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return rank < count[:, None]


def confidence_of(b, candidates, confidence):
    """Scores (A, L) of the candidates (A, L) bool by a key of CONFIDENCE, or None: the probability
    that the net gives a token drawn now; and the highest that a score can be."""
    if confidence is None:
        return b.draw(candidates), 1.0
    function, highest = CONFIDENCE[confidence]
    return b.score(candidates, function), highest


@sampler_for('x0', 'x0 or mask')
def ancestral(
    b, num_steps,
    subs_masking=None,  # [bool] for d3pm nets; None: as it was trained
):
    """MDLM's ancestral sampler (equation 7; its `ddpm` and `ddpm_cache`) on the times 1 -> 0. A net
    that never predicts the mask unmasks at steps that do not depend on the tokens. A d3pm net gives
    the mask a probability p_m and unmasks with probability
    (1 - p_m)(m_t - m_s) / ((1 - p_m)(m_t - m_s) + m_s), m = 1 - alpha, unless subs_masking (None:
    as it was trained). The last step unmasks the rest."""
    if subs_masking is None:
        subs_masking = b.net.constants.get('subs_masking', False)
    mask_prob = 1 - b.schedule.alpha(grid(1, 0, num_steps))
    mask_prob[-1] = 0
    if b.predicts == 'x0' or subs_masking:
        b.follow(plan_steps(b, mask_prob), mask_prob)
        return

    for rows, step in b.steps(mask_prob):
        m_t = mask_prob[step][:, None]
        m_s = mask_prob[step + 1][:, None]
        token_prob = b.token_prob(b.masked[rows]) * (m_t - m_s)
        unmask_prob = torch.where(m_s == 0, 1, token_prob / (token_prob + m_s))
        b.unmask(b.uniforms(rows, step) < unmask_prob)


@sampler_for('x0', 'score')
def analytic(b, num_steps):
    """SEDD's Tweedie sampler (algorithm 2) on the times 1 -> 1e-5, then one step to no noise. From
    sigma to sigma - dsigma a mask turns into token v with probability (e^dsigma - 1) s_v, s the
    concrete score (theorem 4.2). Under SUBS their sum does not depend on the net."""
    times = torch.cat((grid(1, 1e-5, num_steps), torch.zeros(1, dtype=torch.float64)))
    mask_prob = 1 - b.schedule.alpha(times)
    mask_prob[-1] = 0
    if b.predicts == 'x0':
        b.follow(plan_steps(b, mask_prob), mask_prob)
        return

    sigma = b.schedule.sigma(times).clamp(max=30)  # where alpha is 0
    sigma[-1] = 0
    for rows, step in b.steps(mask_prob):
        sigma_t = sigma[step][:, None]
        sigma_s = sigma[step + 1][:, None]
        token_prob = b.total_score(b.masked[rows])
        token_prob = token_prob * torch.expm1(sigma_t - sigma_s) / torch.expm1(sigma_t)
        stay = (1 - token_prob).clamp(min=0)
        unmask_prob = torch.where(sigma_s == 0, 1, token_prob / (token_prob + stay))
        b.unmask(b.uniforms(rows, step) < unmask_prob)


@sampler_for('x0')
def fixed(
    b, num_steps,
    confidence='uniform',        # [uniform | top_prob | prob_diff | entropy] which to unmask
    confidence_temperature=0.0,  # [>= 0] draw them by softmax(score / this); 0: the top; xlm: 1.0
    threshold=None,              # [> 0] unmask while the summed lack of confidence is under this
    single_threshold=1.0,        # [0 < x <= 1] unmask besides all whose score is above this
):
    """xlm's predictor: each step unmasks floor(masked / steps left) positions, the last the rest:
    any ('uniform'), or the most confident by a key of CONFIDENCE. threshold: instead, the most
    confident while their lacks of confidence but the largest sum to less, at least one.
    single_threshold: Fast-dLLM (Wu et al. 2025, arXiv 2505.22618), for top_prob or prob_diff."""
    check_thresholds(confidence, single_threshold, threshold, confidence_temperature)
    mask_prob = 1 - b.schedule.alpha(grid(1, 0, num_steps))
    if confidence == 'uniform':
        b.follow(plan_counts(b, num_steps), mask_prob)
        return

    for rows, step in b.steps(mask_prob):
        count = b.num_masked[rows] // (num_steps - step)
        if threshold is not None:
            count = count.clamp(min=1)
        scores, highest = confidence_of(b, b.masked[rows] & (count > 0)[:, None], confidence)
        first = b.rounded(scores, highest)
        if confidence_temperature:
            gumbel = -torch.log(-torch.log1p(-b.uniforms(rows, step)))
            first = scores / confidence_temperature + gumbel
        if threshold is not None:
            under = num_under(threshold, highest - scores, first)
            count = torch.where(step == num_steps - 1, count, under)
        b.unmask(most_confident(first, count) | (scores > single_threshold))


def plan_counts(b, num_steps):
    """The step (n, L) at which `fixed` unmasks each position, in random order."""
    rank = torch.where(b.masked, b.uniforms(), 1).argsort(dim=1).argsort(dim=1)
    left = b.num_masked
    unmasked = []  # until the end of each step
    for i in range(num_steps):
        left = left - left // (num_steps - i)
        unmasked.append(b.num_masked - left)
    return torch.searchsorted(torch.stack(unmasked, dim=1), rank, right=True)


def num_under(threshold, lack, scores):
    """How many of each row of lack (A, L), in the order of falling scores (A, L), sum to less than
    the threshold without the last, at least 1 -> (A,)"""
    lack = lack.gather(1, scores.argsort(dim=1, descending=True, stable=True))
    return (lack.cumsum(dim=1) - lack < threshold).sum(dim=1).clamp(min=1)


@sampler_for('x0')
def greedy(
    b, num_steps,
    across_rows=False,  # [bool] the most confident of batch_size rows at once, as released
    confidence=None,    # [top_prob | prob_diff | entropy] None: probability of the token drawn
):
    """SMDM's greedy sampler (appendix) on the times 1 -> 1e-5: from t to s
    int(masked (1 - s/t)) of the most confident are unmasked, at the last step the rest. Its power
    form of Gumbel noise is a draw at the temperature."""
    alone = not across_rows or confidence is None
    require(alone, 'across_rows does not go with a confidence')
    times = torch.linspace(1, 1e-5, num_steps + 1)  # in float32 as released: it decides the counts
    mask_prob = 1 - b.schedule.alpha(times.double())
    fraction = 1 - times[1:] / times[:-1]
    fraction[-1] = 1
    if across_rows:  # where other prompts are longer, guidance hides what has been drawn, too
        b.hidden_by_guidance |= torch.arange(b.x.size(1)) < b.prompt_length.max()
    for rows, step in b.steps(mask_prob, to_the_end=across_rows):
        masked = b.num_masked[rows]
        if across_rows:
            masked = masked.sum().expand(len(rows))
        count = (masked * fraction[step]).long()
        scores, highest = confidence_of(b, b.masked[rows] & (count > 0)[:, None], confidence)
        if across_rows:
            scores, count = scores.view(1, -1), count[:1]
        best = most_confident(b.rounded(scores, highest), count)
        b.unmask(best.view(len(rows), -1))


@sampler_for('x0')
def low_confidence(
    b, num_steps,
    block_length=None,     # [int >= 1] tokens a block; None: one block
    confidence=None,       # [top_prob | prob_diff | entropy] None: probability of the token drawn
    single_threshold=1.0,  # [0 < x <= 1] unmask besides all whose score is above this
):
    """LLaDA's low-confidence remasking: after the prompt, blocks from left to right, num_steps /
    blocks steps each. A step unmasks masks // steps of the positions masked at the beginning of its
    block, and one more in the first masks % steps. A block_length of 1: left to right."""
    check_thresholds(confidence, single_threshold)
    width = b.x.size(1)
    block_length = min(block_length or width, width)
    blocks = ((b.length - b.prompt_length + block_length - 1) // block_length).clamp(min=1)  # (n,)
    uneven = (blocks * (num_steps % blocks > 0)).max()
    require(uneven == 0,
            f'steps={num_steps} cannot be shared evenly by {uneven} blocks of {block_length}')
    for rows, step in b.steps(1 - b.schedule.alpha(grid(1, 0, num_steps))):
        steps = num_steps // blocks[rows]
        begin = b.prompt_length[rows] + step // steps * block_length
        place = torch.arange(width) - begin[:, None]
        in_block = (place >= 0) & (place < block_length)
        masks = (b.is_open[rows] & in_block).sum(dim=1)
        count = masks // steps + (step % steps < masks % steps)
        masked = b.masked[rows] & in_block
        scores, highest = confidence_of(b, masked & (count > 0)[:, None], confidence)
        best = most_confident(b.rounded(scores, highest), count)
        b.unmask(best | (scores > single_threshold))


@sampler_for('x0')
def semi_ar(
    b, num_steps,
    stride=None,  # [int >= 1] tokens a window advances by; None: half of block_size
):
    """MDLM's semi-autoregressive sampler: windows of block_size that advance by `stride`, each
    sampled by `ancestral` in num_steps steps given what the last one left. Rows of any length."""
    width = b.net.config.block_size
    if stride is None:
        stride = max(1, width // 2)
    require(stride < max(width, 2),
            f'stride={stride}: it must be at least 1 and below {width}, the block_size of the net')
    # the window that unmasks each position
    window = ((torch.arange(b.x.size(1)) - width + stride) // stride).clamp(min=0)
    windows = int(window[-1]) + 1
    check_memory(*b.x.shape, num_steps * windows)
    start = (torch.arange(windows) * stride).repeat_interleave(num_steps)
    mask_prob = 1 - b.schedule.alpha(grid(1, 0, num_steps))
    plan = plan_steps(b, mask_prob) + window * num_steps
    b.follow(plan, mask_prob[:-1].repeat(windows), start)


@sampler_for('x0')
def remdm(
    b, num_steps,
    strategy='cap',  # [cap | rescale | conf | loop]
    eta=None,        # [0 <= x <= 1] None: cap 0.008, rescale 0.015, conf 1, loop 0.02
    t_on=0.55,       # [0 < x < 1] loop: the time at which remasking begins
    t_off=0.05,      # [0 < x < 1] loop: the time at which it ends
    alpha_on=0.9,    # [0 < x <= 1] loop: the share of visible tokens in between
):
    """ReMDM (equation 6): from t to s a visible token is masked again with probability sigma, a
    masked one unmasked with (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t); sigma is at most
    (1 - alpha_s) / alpha_t. strategy: 'cap', sigma = min(eta, that); 'rescale', eta times that;
    'conf', eta times that times a softmax over the visible tokens of minus the probability with
    which each was drawn; 'loop', alpha rises to alpha_on by t_on, stays while tokens are remasked
    as in cap, and rises to 1 from t_off on."""
    require(t_off <= t_on, f't_on={t_on}, t_off={t_off}: t_off must not be above t_on')
    if eta is None:
        eta = dict(cap=0.008, rescale=0.015, conf=1.0, loop=0.02)[strategy]
    alpha, sigmas = remdm_schedule(b, num_steps, strategy, eta, t_on, t_off, alpha_on)
    if strategy == 'conf':
        b.drawn_prob = torch.full(b.x.shape, torch.inf, dtype=torch.float64)
    for rows, step in b.steps(1 - alpha, to_the_end=True):
        alpha_t = alpha[step][:, None]
        alpha_s = alpha[step + 1][:, None]
        sigma = sigmas[step][:, None]
        masked = b.masked[rows]
        visible = b.is_open[rows] & ~masked
        if strategy == 'conf':  # 0 where it is masked
            weight = torch.where(visible, torch.exp(-b.drawn_prob[rows]), 0)
            sigma = sigma * weight / weight.sum(dim=1, keepdim=True).clamp(min=1e-300)
        u = b.uniforms(rows, step)
        b.unmask(masked & (u < (alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t)))
        b.remask(visible & (u < sigma))


def remdm_schedule(b, num_steps, strategy, eta, t_on, t_off, alpha_on):
    """alpha (S + 1,) before each step and at the end; sigma (S,) without the softmax of 'conf'."""
    t = grid(1, 0, num_steps)
    alpha = b.schedule.alpha(t)
    if strategy == 'loop':
        alpha = torch.where(t > t_off, alpha_on, 1 - t / t_off * (1 - alpha_on))
        alpha = torch.where(t > t_on, (1 - t) / (1 - t_on) * alpha_on, alpha)
    alpha[-1] = 1
    sigma = ((1 - alpha[1:]) / alpha[:-1].clamp(min=1e-300)).clamp(max=1)
    sigma = eta * sigma if strategy in ('rescale', 'conf') else sigma.clamp(max=eta)
    if strategy == 'loop':
        sigma[(t > t_on)[:-1] | (t <= t_off)[:-1]] = 0
    return alpha, sigma


@sampler_for('x0')
def first_hitting(b, num_steps):
    """One token at a time at exactly drawn hitting times (Zheng et al., algorithm 1), the limit of
    `ancestral` for infinitely many steps. num_steps plays no part."""
    u = torch.where(b.masked, b.uniforms(), -1)
    order = u.argsort(dim=1, descending=True)
    mask_prob_1 = 1 - b.schedule.alpha(torch.ones((), dtype=torch.float64))
    mask_prob = u.gather(1, order).clamp(min=1e-9) * mask_prob_1  # (n, L), at each hitting time
    b.follow(order.argsort(dim=1), mask_prob)


@sampler_for('next token')
def ar(
    b, num_steps,
    eos_id=None,  # [int >= -1] the id that ends a row; None: the tokenizer's; -1: none
):
    """Token after token from a causal net with a key/value cache. num_steps plays no part."""
    check_eos(eos_id, b.net.config)
    require((b.prompt_length > 0).all(),
            'a causal net begins with a token: give a prompt (or a net that names its tokenizer)')
    require((b.is_open.sum(dim=1) == b.length - b.prompt_length).all(),
            'a causal net goes on after a prompt; it cannot fill in a template')
    cache = KVCache(len(b.rows), b.x.size(1))
    for rows, step in b.steps(torch.ones(b.x.size(1))):
        col = b.prompt_length[rows] + step
        h = b.hidden_with_cache(cache, col)
        ids = b.unmask(torch.arange(b.x.size(1)) == col[:, None], h)
        if eos_id not in (None, -1):
            ended = (ids == eos_id).cpu()
            b.end(rows[ended], col[ended] + 1)


@sampler_for('x0 in blocks')
def block(
    b, num_steps,
    rule='ancestral',   # another sampler, for each block
    rule_options=None,  # [dict] its own
    eos_id=None,        # [int >= -1] the id that ends a row; None: the tokenizer's; -1: none
):
    """Block after block, each by the rule in num_steps steps, given those before it, whose keys and
    values are computed once (BD3-LM, algorithm 2). Any length: a block looks at the last block_size
    tokens. A row ends with the first eos_id drawn behind all that is given."""
    rule_options = rule_options or {}
    check_eos(eos_id, b.net.config)
    eos_id = -1 if eos_id is None else eos_id
    check_sampler(replace(b.net.config, block_length=None), rule, rule_options)
    width, end = b.net.config.block_length, b.x.size(1)
    col = torch.arange(end)
    given = ~b.is_open & (col < b.length[:, None])
    behind = torch.where(given, col + 1, 0).amax(dim=1, keepdim=True)
    for group in torch.cat((b.rows, b.queue)).split(len(b.rows) or 1):
        if not len(group):  # nothing is open
            break
        b.use_cache(group)
        first = int(b.prompt_length[group].min()) // width * width
        b.remember(group, 0, first)
        for begin in range(first, end, width):
            cols = slice(begin, begin + width)
            rows = group[b.masked[group, cols].any(dim=1)]
            if len(rows):
                part = b.part(rows, cols, begin // width * num_steps)
                SAMPLERS[rule](part, num_steps, **rule_options)
                b.join(part)
                ended = (part.x == eos_id).cpu() & (col[cols] >= behind[rows])
                at = begin + 1 + ended.int().argmax(dim=1)
                ended = ended.any(dim=1)
                b.end(rows[ended], at[ended])
            b.remember(group[b.length[group] > cols.stop], begin, cols.stop)
        b.report(group)


# -----------------------------------------------------------------------------
# drawing tokens, and how confident the net is of them


def draw(logits, u, mask_id, temperature=1.0, top_k=0, top_p=1.0, dtype=torch.float64):
    """One token for each row of logits (N, V), by inverse CDF of the uniforms u (N,) float64 in
    [0, 1) -> ids (N,), -1 where the logits are not finite, and the probabilities (N,) with which
    they were drawn. In this order: mask excluded, temperature, top_k, top_p. top_p keeps the tokens
    whose cumulative probability is at most top_p, and always the first, as xlm and ReMDM do.

    dtype float32: MDLM's released arithmetic, argmax p / (1e-10 - log(u + 1e-10)) with a float32
    uniform a token. No such uniform lies above 1 - 2^-24, so that improbable tokens are drawn too
    seldom, as at a lower temperature (Zheng et al. 2024)."""
    logits = without_mask(logits.to(u.device), mask_id)
    if temperature == 0:
        highest, ids = logits.max(dim=-1)
        return torch.where(highest.isnan(), -1, ids), torch.ones_like(u)
    logits = logits.to(dtype)
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
            ordered.masked_fill_(crossed, 0)
        probs = torch.zeros_like(probs).scatter_(1, order, ordered)
    if dtype == torch.float32:
        noise = 1e-10 - (float32_uniforms(u, probs.size(1)) + 1e-10).log()
        ids = (probs / noise).argmax(dim=-1)
        drawn = probs.gather(1, ids[:, None]).squeeze(1) / probs.sum(dim=-1)
        return torch.where(drawn.isnan(), -1, ids), drawn.double()
    cdf = probs.cumsum(dim=-1)
    ids = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True).squeeze(1)
    last = probs.size(1) - 1 - (probs.flip(1) > 0).int().argmax(dim=-1)
    ids = torch.minimum(ids, last)  # u -> 1 may round up to the end
    drawn = probs.gather(1, ids[:, None]).squeeze(1) / cdf[:, -1]
    return torch.where(cdf[:, -1].isnan(), -1, ids), drawn


def float32_uniforms(u, n):
    """n float32 uniforms, multiples of 2^-24 below 1, of each of u (N,) float64 -> (N, n): a hash
    (splitmix64 in int64, which wraps) of the bits of u."""
    x = u.contiguous().view(torch.int64)[:, None] * 0x2545F4914F6CDD1D
    x = x + torch.arange(n, device=u.device) * -0x61C8864680B583EB
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x ^= x >> shift & (1 << 64 - shift) - 1
        x *= factor
    return (x >> 40 & 0xFFFFFF).float() * 2 ** -24


def without_mask(logits, mask_id):
    """logits (..., V), changed in place to give the mask no probability (None: there is none)."""
    if mask_id is not None:
        logits[..., mask_id] = -torch.inf
    return logits


def odds(logits):
    """Of logits (N, V): the highest (N,), its id (N,), the ratio e (N, V) of each other probability
    to the highest (0 at itself), and their sum (N,) float64. The highest probability is
    1 / (1 + sum), exact however close it comes to 1."""
    highest, ids = logits.max(dim=-1)
    e = (logits - highest[:, None]).exp_().scatter_(1, ids[:, None], 0)
    return highest, ids, e, e.sum(dim=-1).double()


def probability(logits, ids):
    """Of the tokens ids (N,) under logits (N, V), (N,) float64."""
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


# function of logits (N, V) -> (N,), higher where the net is more confident; its highest value
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
    V, mask_id = net.config.vocab_size, net.config.mask_id
    logits = net(xt, sigma)
    ratio = torch.expm1(float64(dsigma)) / torch.expm1(float64(sigma))
    masked = relative_score(net, float64(logits)) * ratio[:, None, None]
    masked[..., mask_id] = 1 - masked.sum(dim=-1)
    is_masked = (xt == mask_id)[..., None]
    return torch.where(is_masked, masked, F.one_hot(xt, V)).to(logits.dtype)


def analytic_probs(net, xt, t, dt):
    """What `analytic` draws from in a step from t (B,) to t - dt under loglinear, (B, L, V)."""
    sigma = loglinear.sigma(t)
    return transition(net, xt, sigma, sigma - loglinear.sigma(t - dt))


def denoiser_probs(net, xt, t):
    """What its last step, from t (B,) to no noise, draws from, (B, L, V): no mask is left."""
    sigma = loglinear.sigma(t)
    probs = transition(net, xt, sigma, sigma)
    probs[:, :, net.config.mask_id] = 0
    return probs


# -----------------------------------------------------------------------------
# the rows of a call


@dataclass(eq=False)
class Batch:
    """The n rows of a call of generate(). At most batch_size of them, `rows` (A,), are in work; one
    that is finished makes room for the next. x is on the net's device, all else on the CPU, so that
    what is masked is known without asking a GPU. A step of a sampler

        reads        masked, num_masked, is_open, length, prompt_length of the rows, and uniforms()
        asks the net by score(), draw(), token_prob() or total_score(), at most once
        changes      the rows by unmask(), remask(), end().

    Tables (A, ...) are of the rows in work, those (n, ...) of all. What only some samplers use:
    hidden_by_guidance (greedy), drawn_prob (remdm), hidden_with_cache (ar); more for `block`."""
    net: torch.nn.Module
    x: torch.Tensor        # (n, L) ids
    is_open: torch.Tensor  # (n, L) bool: it was not given
    length: torch.Tensor   # (n,) tokens
    keys: np.ndarray       # (n,) uint64, of the random numbers
    batch_size: int
    schedule: Schedule
    cfg_scale: float
    draw_options: dict     # of draw()
    on_change: Callable
    on_finish: Callable
    compile: bool
    progress: bool

    def __post_init__(self):
        n, L = self.x.shape
        self.predicts = OBJECTIVES[self.net.config.objective].predicts
        self.device = next(self.net.parameters()).device
        self.draw_device = self.device
        if self.device.type == 'mps':  # it has no float64
            self.draw_device = torch.device('cpu')
        self.x = self.x.to(self.device)
        self.masked = self.is_open.clone()
        self.num_masked = self.is_open.sum(dim=1)
        first = self.is_open.int().argmax(dim=1)
        self.prompt_length = torch.where(self.num_masked > 0, first, self.length)
        self.step = torch.zeros(n, dtype=torch.int64)
        self.nfe = torch.zeros(n, dtype=torch.int64)
        self.reveal_step = torch.full((n, L), -1)
        self.drawn_prob = None  # a sampler may ask for it: (n, L), of each token when it was drawn
        self.asked = None  # in a step that has asked the net: row, col, h, ids drawn or None
        # what the net is shown
        self.start = torch.zeros(n, dtype=torch.int64)  # of a row's window
        self.mask_prob = torch.ones(n, dtype=torch.float64)  # if it is time-conditioned
        self.hidden_by_guidance = ~self.is_open
        self.guided = torch.zeros(n, dtype=torch.bool)  # whatever a row's window shows
        self.offset = 0  # of a part, its first column in the row
        self.cache = None
        self.run_trunk = self.compile_trunk() if self.compile else self.net.trunk
        self.saw_non_finite = torch.zeros((), dtype=torch.bool, device=self.draw_device)
        # the rows in work and those that wait
        queue = self.num_masked.nonzero().squeeze(1)
        self.rows = queue[:min(self.batch_size, n)]
        self.queue = queue[len(self.rows):]
        self.slots = torch.arange(len(self.rows))  # the place of each row in the step before
        self.entered = torch.ones(len(self.rows), dtype=torch.bool)
        self.bar = tqdm(total=int(self.num_masked.sum()), unit=' tokens', desc='sampling',
                        disable=not self.progress)
        if self.on_change:
            rows, cols = (torch.arange(L) < self.length[:, None]).nonzero(as_tuple=True)
            ids = torch.where(self.is_open, -1, self.x.cpu())[rows, cols]
            self.on_change(rows, cols, ids, torch.ones(len(rows)), torch.full_like(rows, -1))
        self.report((self.num_masked == 0).nonzero().squeeze(1))

    def steps(self, mask_prob, plan=None, start=None, to_the_end=False):
        """Yield the rows in work and the step each takes now, both (A,), until all are finished.

        mask_prob (S,) or (n, S): the probability of a mask before each step; one more, at the end,
        may follow, and allows one step more. plan (n, L): the step of each position; steps that
        unmask nothing are skipped. start (S,): where the net's window begins, at most. to_the_end:
        a row takes all S steps, even if nothing is masked. Raises ValueError where masks are left
        after the last step."""
        never = torch.iinfo(torch.int64).max
        last = mask_prob.size(-1) - 1
        mask_prob = mask_prob.expand(len(self.x), -1)
        while len(self.rows):
            rows = self.rows
            if plan is not None:
                self.step[rows] = torch.where(self.masked[rows], plan[rows], never).amin(dim=1)
            step = self.step[rows]
            require(step.max() <= last,
                    'the sampler left masks after its last step: it needs more steps')
            self.mask_prob[rows] = mask_prob[rows, step].double()
            if start is not None:
                end = (self.length[rows] - self.net.config.block_size).clamp(min=0)
                self.start[rows] = torch.minimum(start[step], end)
            masked = int(self.num_masked.sum())
            yield rows, step
            self.asked = None
            self.bar.update(masked - int(self.num_masked.sum()))
            self.step[rows] += 1
            self.refill(self.step[rows] == last if to_the_end else self.num_masked[rows] == 0)

    def follow(self, plan, mask_prob, start=None):
        """Unmask every position at its step of the plan (n, L)."""
        for rows, step in self.steps(mask_prob, plan, start):
            self.unmask(plan[rows] == step[:, None])

    def score(self, candidates, function):
        """Ask the net about the candidates (A, L) bool: function(logits (N, V)) -> (N,), as a table
        (A, L) float64, -inf elsewhere. Rows without candidates are not evaluated."""
        def scores(logits):
            if self.predicts == 'x0':
                without_mask(logits, self.net.config.mask_id)
            return (function(logits),)
        return self.ask(candidates, scores)

    def draw(self, candidates):
        """Draw a token at each candidate, for `unmask` to put there. As `score`, of the probability
        that the net gives it, whatever the temperature."""
        def probs_and_ids(logits, u):
            ids, _ = self.draw_from(logits, u)
            return probability(logits, ids), ids
        return self.ask(candidates, probs_and_ids, draws=True)

    def rounded(self, scores, highest=1.0):
        """Scores (A, L) for a choice among them: on a grid of log odds (where the highest is 0, of
        the log of the distance to it) that is coarser than the net's rounding and begins at each
        row's best. Equal logits are equal whatever stands beside the row."""
        far = (highest - scores).clamp(min=1e-300).log()
        if highest:
            far -= scores.clamp(min=1e-12).log()
        far.nan_to_num_(nan=-1000, posinf=torch.inf)  # NaN is chosen first: it ends the sampling
        narrow = next(self.net.parameters()).element_size() == 2
        narrow = narrow or torch.is_autocast_enabled(self.device.type)
        steps = (far - far.amin(dim=1, keepdim=True)) / (0.25 if narrow else 2 ** -12)
        return -steps.round().nan_to_num_(nan=torch.inf, posinf=torch.inf)

    def unmask(self, chosen, h=None):
        """Put tokens at the chosen positions (A, L) bool that are masked, and were asked about if
        `score` or `draw` was called in this step: those of `draw`, else drawn now.
        h: the net's hidden states (N, 1, n_embd) there, if known."""
        chosen = chosen & self.masked[self.rows]
        row, col, h, ids = self.asked or (*chosen.nonzero(as_tuple=True), h, None)
        kept = chosen[row, col].nonzero().squeeze(1)
        if not len(kept):
            return
        rows = self.rows[row[kept]]
        cols = col[kept]
        at = self.place(rows, cols)
        u = self.uniforms_of_tokens(rows, cols) if ids is None else None
        if h is None:
            h, at, u = self.hidden_states(rows, cols, at, u)
        else:
            kept, at, u = sent_at_once((kept, at, u), self.device)
            h = h[kept]
        if ids is None:
            ids, probs = self.from_logits(h, self.draw_from, u)
            if self.drawn_prob is not None:
                self.drawn_prob[rows, cols] = probs.cpu()
        else:
            ids = ids[kept.to(ids.device)]
        self.saw_non_finite |= (ids < 0).any()
        self.put(rows, cols, at, ids.clamp(min=0).to(self.device), masked=False)
        self.reveal_step[rows, cols] = self.step[rows]
        if self.on_change:
            confidence, = self.from_logits(h, self.prob_of, ids)
            self.on_change(rows, cols, ids.cpu(), confidence.cpu(), self.step[rows])
        return ids

    def remask(self, chosen):
        """Mask the chosen positions (A, L) bool again."""
        row, cols = chosen.nonzero(as_tuple=True)
        rows = self.rows[row]
        at = sent(self.place(rows, cols), self.device)
        self.put(rows, cols, at, torch.full_like(at, self.net.config.mask_id), masked=True)
        if self.on_change and len(rows):
            nothing = torch.full_like(rows, -1)
            self.on_change(rows, cols, nothing, torch.zeros(len(rows)), self.step[rows])

    def end(self, rows, length):
        """End rows (n,) at these lengths (n,)."""
        self.length[rows] = length
        self.num_masked[rows] = 0
        self.masked[rows] = False

    def token_prob(self, candidates):
        """The probability that a d3pm net gives all tokens together, as `score`."""
        mask_id = self.net.config.mask_id
        return self.score(
            candidates, lambda logits: 1 - logits.double().softmax(dim=-1)[:, mask_id])

    def total_score(self, candidates):
        """The sum of the concrete scores, times e^sigma - 1, as `score`."""
        return self.score(
            candidates, lambda logits: relative_score(self.net, logits.double()).sum(dim=-1))

    def uniforms(self, rows=None, step=0):
        """Uniforms (A, L) float64 that decide when, of all positions of rows (A,); None: all."""
        rows = torch.arange(len(self.x)) if rows is None else rows
        step = torch.as_tensor(step).view(-1, 1)
        return self.hashed(rows[:, None], torch.arange(self.x.size(1)), step, 0)

    # ---- how it is done: skip at first reading

    def place(self, rows, cols):
        """Where (rows, cols) stand in x. It is sent before the net is called, with all else that a
        step needs: so the copy waits for nothing."""
        return rows * self.x.size(1) + cols

    def put(self, rows, cols, at, ids, masked):
        self.x.view(-1)[at] = ids
        self.masked[rows, cols] = masked
        change = rows.bincount(minlength=len(self.num_masked))
        self.num_masked += change if masked else -change

    def refill(self, finished):
        """Rows that are finished (A,) leave; the next in the queue take their places."""
        self.report(self.rows[finished])
        places = finished.nonzero().squeeze(1)[:len(self.queue)]
        entered = torch.zeros_like(finished).index_fill(0, places, True)
        rows = self.rows.index_copy(0, places, self.queue[:len(places)])
        self.queue = self.queue[len(places):]
        self.slots = (~finished | entered).nonzero().squeeze(1)
        self.rows = rows[self.slots]
        self.entered = entered[self.slots]

    def report(self, rows):
        if self.on_finish and len(rows):
            self.require_finite()
            every = self.x[sent(rows, self.device)].tolist()
            for i, ids in zip(rows.tolist(), every, strict=True):
                self.on_finish(i, ids[:self.length[i]], self.nfe[i].item())

    def require_finite(self):
        require(
            not self.saw_non_finite,
            'non-finite logits: what the net gives, with these options, are not numbers')

    def ask(self, candidates, function, draws=False):
        """The table (A, L) of scores by function(logits) -> (scores,), or, where it draws, by
        function(logits, u) -> (scores, ids); hidden states and ids are kept for `unmask`."""
        table = torch.full(candidates.shape, -torch.inf, dtype=torch.float64)
        row, col = candidates.nonzero(as_tuple=True)
        self.asked = row, col, None, None
        if len(row):
            rows = self.rows[row]
            columns = [self.uniforms_of_tokens(rows, col)] if draws else []
            h, *columns = self.hidden_states(rows, col, *columns)
            scores, *ids = self.from_logits(h, function, *columns)
            table[row, col] = scores.double().cpu()
            self.asked = row, col, h, ids[0] if ids else None
        return table

    def uniforms_of_tokens(self, rows, cols):
        return self.hashed(rows, cols, self.step[rows], 1)

    def draw_from(self, logits, u):
        return draw(logits, u, self.net.config.mask_id, **self.draw_options)

    def prob_of(self, logits, ids):
        return (probability(without_mask(logits, self.net.config.mask_id), ids),)

    def hashed(self, rows, cols, step, what):
        """Float64 uniforms in [0, 1): a hash of the row's key, the position, the step, and `what`
        they decide (0: when, 1: which token)."""
        counter = ((2 * step + what) << 32 | cols + self.offset).numpy().astype(np.uint64)
        bits = splitmix64(self.keys[rows.numpy()] ^ splitmix64(counter))
        return torch.from_numpy((bits >> np.uint64(11)).astype(np.float64) * 2.0 ** -53)

    def hidden_states(self, rows, cols, *others):
        """h (N, 1, n_embd) at (rows, cols), both (N,); with guidance (N, 2, n_embd), the second
        with what is given masked. The net sees block_size tokens of a row from its start.
        And CPU tensors `others` on the device, which they go to with all else."""
        config = self.net.config
        active, row = rows.unique(return_inverse=True)
        start = self.start[active]
        width = min(config.block_size, int((self.length[active] - start).max()))
        window = start[:, None] + torch.arange(width)  # (A, W)
        attention_mask = window < self.length[active][:, None]
        window = window.clamp(max=self.x.size(1) - 1)
        given = self.hidden_by_guidance[active[:, None], window] & attention_mask
        guided = given.any(dim=1) & bool(self.cfg_scale) | self.guided[active]
        guided = guided.nonzero().squeeze(1)
        self.nfe[active] += 1
        self.nfe[active[guided]] += 1

        A = len(active)
        source = torch.cat((torch.arange(A), guided))  # of each row that the net sees
        index = row[:, None]
        if len(guided):  # a row without anything given is its own partner
            partner = torch.arange(A).index_copy(0, guided, torch.arange(A, len(source)))
            index = torch.stack((row, partner[row]), dim=1)  # (N, 2)
        index = index * width + (cols - start[row])[:, None]
        place = self.place(active[source, None], window[source])
        sigma = torch.zeros(len(source))
        if config.time_conditioning:
            sigma = self.schedule.conditioning_at(self.mask_prob[active[source]]).float()
        hidden = None
        if len(guided):
            hidden = given[source] & (torch.arange(len(source)) >= A)[:, None]
        attention_mask = None if attention_mask.all() else attention_mask[source]
        looked_at = None if self.cache else attention_mask  # which a cache takes on the CPU
        *others, index, place, sigma, hidden, looked_at = sent_at_once(
            (*others, index, place, sigma, hidden, looked_at), self.device)
        x = self.x.view(-1)[place]
        if hidden is not None:
            x = x.masked_fill(hidden, config.mask_id)
        if self.cache:
            slots = self.slot[active][source]
            slots[A:] += self.cache.rows // 2
            h = self.run_with_cache(x, slots, self.offset, attention_mask)
        else:
            h = self.run_in_chunks(x, sigma, looked_at)
        return h.flatten(0, 1)[index], *others

    def run_in_chunks(self, x, sigma, attention_mask):
        """The trunk over x (B, W); on a CPU a few rows at a time, to stay in its cache."""
        size = max(1, 1024 // x.size(1)) if self.device.type == 'cpu' else len(x)
        chunks = [x.split(size), sigma.split(size)]
        if attention_mask is not None:
            chunks.append(attention_mask.split(size))
        return torch.cat([self.run_trunk(*chunk) for chunk in zip(*chunks, strict=True)])

    def compile_trunk(self):
        """The compiled trunk, in few sizes: its last row fills a batch up to a power of 2."""
        options = dict(mode='reduce-overhead') if self.device.type == 'cuda' else {}
        compiled = torch.compile(self.net.trunk, dynamic=False, **options)

        def run(x, sigma, attention_mask=None):
            size = 2 ** math.ceil(math.log2(len(x)))
            repeat = torch.arange(size, device=self.device).clamp(max=len(x) - 1)
            mask = None if attention_mask is None else attention_mask[repeat]
            return compiled(x[repeat], sigma[repeat], mask)[:len(x)].clone()
        return run

    def hidden_with_cache(self, cache, col):
        """A causal net's h (A, 1, n_embd) for position col (A,) of the rows in work."""
        if len(self.slots) < cache.rows:
            cache.keep(sent(self.slots, self.device))
        fresh = self.entered & (self.prompt_length[self.rows] > 1)
        if fresh.any():  # all of the prompt but its last token
            rows = self.rows[fresh]
            cache.slots = sent(fresh.nonzero().squeeze(1), self.device)
            cache.position = None
            longest = int(self.prompt_length[rows].max()) - 1
            self.net.trunk(self.x[sent(rows, self.device), :longest], cache=cache)
            self.nfe[rows] += 1
        cache.slots = slice(None)
        place, = cache.begin(col - 1, 1, self.device, [self.place(self.rows, col - 1)])
        self.nfe[self.rows] += 1
        return self.net.trunk(self.x.view(-1)[place][:, None], cache=cache)

    # blocks

    def use_cache(self, group):
        """Begin a cache for rows (m,), and as many that guidance adds."""
        self.slot = torch.zeros(len(self.x), dtype=torch.int64)
        self.slot[group] = torch.arange(len(group))
        given = ~self.is_open & (torch.arange(self.x.size(1)) < self.length[:, None])
        self.guided = given.any(dim=1) & bool(self.cfg_scale)
        rows = len(group) * (2 if self.cfg_scale else 1)
        config = self.net.config
        self.cache = KVCache(rows, config.block_size, config.block_length)

    def run_with_cache(self, x, slots, begin, attention_mask=None):
        """The trunk over tokens (n, T) of block diffusion from position `begin` on."""
        every = torch.equal(slots, torch.arange(self.cache.rows))
        self.cache.slots = slice(None) if every else sent(slots, self.device)
        self.cache.position = None
        if x.size(1) <= self.net.config.block_length:
            position = torch.full((len(x),), begin)
            self.cache.begin(position, x.size(1), self.device, attention_mask=attention_mask)
        return self.net.trunk(x, cache=self.cache)

    def remember(self, rows, begin, end):
        """Put the tokens begin ... end of rows (m,), which are known now, into the cache."""
        if not len(rows) or begin == end:
            return
        guided = rows[self.guided[rows]]
        hidden = sent(self.hidden_by_guidance[guided, begin:end], self.device)
        un = self.x[guided, begin:end].masked_fill(hidden, self.net.config.mask_id)
        slots = torch.cat((self.slot[rows], self.slot[guided] + self.cache.rows // 2))
        self.nfe[rows] += 1
        self.nfe[guided] += 1
        self.run_with_cache(torch.cat((self.x[rows, begin:end], un)), slots, begin)

    def part(self, rows, cols, first_step):
        """The Batch of columns (a slice) of rows (m,), in work from first_step on, for `join`."""
        tables = 'x', 'is_open', 'text'
        own = {name: getattr(self, name)[rows, cols] for name in tables if hasattr(self, name)}
        length = (self.length[rows] - cols.start).clamp(max=own['x'].size(1))
        part = replace(
            self, **own, length=length, keys=self.keys[rows.numpy()], batch_size=len(rows),
            on_change=None, on_finish=None, progress=False)
        part.of_rows, part.cols, part.offset, part.first_step = rows, cols, cols.start, first_step
        part.cache, part.slot, part.guided = self.cache, self.slot[rows], self.guided[rows]
        if self.on_change:
            part.on_change = lambda rows, cols, ids, confidence, steps: self.on_change(
                part.of_rows[rows], cols + part.offset, ids, confidence, steps + first_step)
        return part

    def join(self, part):
        """Take over what a part has done."""
        rows, cols = part.of_rows, part.cols
        part.reveal_step[part.reveal_step >= 0] += part.first_step
        for name in ('x', 'masked', 'reveal_step', 'drawn_prob'):
            if getattr(self, name) is not None:
                getattr(self, name)[rows, cols] = getattr(part, name)
        self.nfe[rows] += part.nfe
        self.num_masked[rows] = self.masked[rows].sum(dim=1)
        self.saw_non_finite |= part.saw_non_finite
        self.bar.update(int(part.is_open.sum()))

    def from_logits(self, h, function, *columns):
        """function(logits (N, V), *columns (N,)) -> a tuple of (N,), over chunks of h
        (N, 1 or 2, n_embd). It may change the logits. The guidance is SMDM's equation 6."""
        logits_at_once = 2 ** (22 if self.device.type == 'cpu' else 25)
        size = max(1, logits_at_once // self.net.config.vocab_size)
        results = []
        for i in range(0, len(h), size):
            logits = self.net.head(h[i:i + size])  # (n, 1 or 2, V)
            cond = logits[:, 0]
            if logits.size(1) == 2:
                un = logits[:, 1]
                cond = un + (1 + self.cfg_scale) * (cond - un)
            if not self.net.config.head_mask:
                without_mask(cond, self.net.config.mask_id)  # -inf minus -inf would be NaN
            chunk = [column[i:i + size].to(self.draw_device) for column in columns]
            results.append(function(cond.to(self.draw_device), *chunk))
        return [torch.cat(parts) for parts in zip(*results, strict=True)]


@dataclass(eq=False)
class TextBatch(Batch):
    """Rows that take the tokens of a text (n, L) where others draw them. drawn_prob (n, L) holds
    the log probability of each as it was unmasked, 0 where it was given. Raises ValueError where a
    sampler lets chance or drawn tokens decide on positions."""
    text: torch.Tensor
    sampler: str

    def __post_init__(self):
        super().__post_init__()
        self.drawn_prob = torch.zeros(self.text.shape, dtype=torch.float64)

    def uniforms_of_tokens(self, rows, cols):
        return self.text[rows, cols]

    def draw_from(self, logits, ids):
        highest, _, _, others = odds(without_mask(logits, self.net.config.mask_id))
        logit = logits.gather(1, ids[:, None]).squeeze(1)
        return ids, (logit - highest).double() - others.log1p()

    def uniforms(self, rows=None, step=0):
        raise ValueError(
            f"sampler '{self.sampler}', with its options, chooses positions by chance or by tokens "
            'that it draws: it gives no exact likelihood, as fixed, greedy and low_confidence do '
            f'with confidence {", ".join(CONFIDENCE)}')

    draw = uniforms


# -----------------------------------------------------------------------------
# what a user gives: numbers, prompts, templates


def default_sampler(config):
    return 'block' if config.block_length else OBJECTIVES[config.objective].sampler


def check_sampler(config, name, options):
    """Refuse a sampler that does not take the net, and options that it has not or does not take."""
    require_known('sampler ', name, SAMPLERS)
    in_blocks = 'subs with block_length'
    kinds = {key: record.predicts for key, record in OBJECTIVES.items()}
    kinds[in_blocks] = 'x0 in blocks'
    kind = in_blocks if config.block_length else config.objective
    able = [other for other in SAMPLERS if kinds[kind] in TAKES[other]]
    takes = [key for key, predicts in kinds.items() if predicts in TAKES[name]]
    require(name in able, f"sampler '{name}' takes nets of the objectives {', '.join(takes)}; for "
            f"this one, {kind}, there is {', '.join(able)}")
    own = defaults_of(SAMPLERS[name])
    for key, value in options.items():
        require(key in own, f"{key} does not go with sampler '{name}', which has the options "
                f"{', '.join(own) or '(none)'}")
        check_spec(key, plain(value), *own[key])
        checked(key, plain(value), own[key][0])


def check_numbers(values):
    whole, real = numbers.Integral, numbers.Real
    for name, kind, least, most, needed in (
        ('num_samples', whole, 1, 10 ** 8, 'at least 1, and at most 100 million'),
        ('steps', whole, 1, 10 ** 8, 'at least 1, and at most 100 million'),
        ('batch_size', whole, 1, math.inf, 'at least 1'),
        ('seed', whole, -2 ** 63, 2 ** 64 - 1, 'in -2^63 ... 2^64 - 1'),
        ('first_row', whole, 0, 2 ** 62, '0 or more, and at most 2^62'),
        ('top_k', whole, 0, 2 ** 62, '0 (all tokens) or more, and at most 2^62'),
        ('temperature', real, 0, sys.float_info.max, '0 or more, and finite'),
        ('top_p', real, 5e-324, 1, 'above 0 and at most 1'),
        ('cfg_scale', real, -1, sys.float_info.max, '-1 or more, and finite'),
    ):
        value = values[name]
        fits = isinstance(value, kind) and type(value) is not bool and least <= value <= most
        if kind is whole:
            value, needed = repr(value), f'a whole number, {needed}'
        require(fits, f'{name}={value}: it must be {needed}')


def check_memory(n, length, steps):
    """Refuse n rows of a length that do not fit, before anything is drawn."""
    need = n * length * 100 + steps * 64  # bytes, about
    free = free_memory(torch.device('cpu'))
    require(need < free,
            f'num_samples={n} of {length} tokens in {steps} steps need about {need / 1e9:.1f} GB '
            f'of memory, where {free / 1e9:.1f} GB are free: draw fewer at a time')


def check_eos(eos_id, config):
    V = config.vocab_size
    require(eos_id is None or eos_id < V, f'eos_id={eos_id}: it must be an id below {V}, or -1')


def check_thresholds(confidence, single_threshold, threshold=None, confidence_temperature=0.0):
    require(single_threshold == 1 or confidence in (None, 'top_prob', 'prob_diff'),
            f"single_threshold={single_threshold} goes with confidence 'top_prob' or 'prob_diff', "
            f"not '{confidence}'")
    require(single_threshold == 1 or threshold is None and not confidence_temperature,
            'single_threshold goes without threshold and confidence_temperature')
    require(threshold is None or confidence != 'uniform' and not confidence_temperature,
            "threshold goes with confidence 'top_prob', 'prob_diff' or 'entropy', and without "
            'confidence_temperature')


def tokenizer_of(net):
    """The tokenizer that net.tokenizer names. Raises ValueError unless its ids are the net's."""
    tok, config = get_tokenizer(**net.tokenizer), net.config
    theirs = dict(vocab_size=config.vocab_size, mask_id=config.mask_id)
    if config.mask_id is None:  # the tokenizer's is the id after the last of the net
        theirs = dict(vocab_size=config.vocab_size + 1, mask_id=config.vocab_size)
    if config.pad_id is not None:
        theirs['pad_id'] = config.pad_id
    ours = {key: getattr(tok, key) for key in theirs}
    require(ours == theirs, f"tokenizer '{tok.name}' has {ours}, the net {theirs}: "
            'give the one it was trained with')
    return tok


def plain(value):
    """Lists in place of a tensor or an array."""
    return value.tolist() if hasattr(value, 'tolist') else value


def text_to_ids(net, name, text, longest):
    """Text of a prompt or a template (`name`) -> ids, -1 where the template is open."""
    require(net.tokenizer, f'the source of the weights names no tokenizer: give the {name} as ids '
            '(on the command line IDS:5,6,7), or --tokenizer')
    require(not re.search('[\ud800-\udfff]', text), f'{name}={text!r}: it is not valid UTF-8 text')
    tok = get_tokenizer(**net.tokenizer)
    pieces = [text]
    if name == 'template':  # text, number, text, number, ..., text
        pieces = re.split(r'<\|mask(?::([1-9]\d{0,7}))?\|>', text)
        others = re.search(r'<\|?mask\b|\[mask\]', ' '.join(pieces[::2]), re.I)
        require(len(pieces) > 1 and not others, f'{name}={text!r}: open tokens are written '
                '<|mask|> or <|mask:20|>, and at least one is needed')
    # as SMDM's tokenizer does, and as the rows of prompts and answers begin
    bos = net.constants.get('prompt_bos') or net.constants.get('packing') == 'pair'
    ids = [tok.bos_id] if bos else []
    for i, piece in enumerate(pieces):
        if i % 2 == 0:
            ids += tok.encode(piece) if piece else []
            continue
        count = int(piece or 1)
        require(count <= longest,
                f'{name}={text!r}: {count} open tokens, where a row has at most {longest}')
        ids += [-1] * count
    return ids


def id_rows(net, name, value, n, longest):
    """Text, n texts, ids (P,), or n rows of ids of any lengths -> 1 (for all) or n rows of ids."""
    value = [value] if isinstance(value, str) else value
    require(isinstance(value, (list, tuple)), f'{name}={value!r}: text or ids are needed')
    rows = [text_to_ids(net, name, row, longest) if isinstance(row, str) else plain(row)
            for row in value]
    if not any(isinstance(row, (list, tuple)) for row in rows):
        rows = [rows]
    require(len(rows) in (1, n),
            f'{name} has {len(rows)} rows: 1, for all, or num_samples={n} are needed')
    V, mask_id = net.config.vocab_size, net.config.mask_id
    for row in rows:
        require(isinstance(row, (list, tuple)), f'{name} holds {row!r} beside rows of ids')
        for i in row:
            is_hole = name == 'template' and i in (-1, mask_id)
            if type(i) is not int or not (is_hole or 0 <= i < V and i != mask_id):
                raise ValueError(
                    f'the {name} holds {i!r}, which is no id, or an id that is not a token: ids '
                    f'are 0 ... {V - 1}, without the mask {mask_id}')
    return rows


def read_lengths(length, n, longest, block_size):
    """The tokens of all rows [L], or of each, from a number or n of them."""
    lengths = plain(length)
    lengths = lengths if isinstance(lengths, (list, tuple)) else [lengths]
    whole = all(
        isinstance(L, numbers.Integral) and type(L) is not bool and L >= 1 for L in lengths)
    require(len(lengths) in (1, n) and whole, f'length={length!r}: a whole number of at least 1 is '
            f'needed, for all rows or for each of num_samples={n}')
    hint = ", the net's block_size (sampler 'semi_ar' goes further)"
    require(max(lengths) <= longest, f'length={max(lengths)}: it must be 1 to {longest}'
            f'{hint if longest == block_size else ""}')
    return lengths


def lay_out(net, n, length, prompt, template, bos_id, longest, steps):
    """The start: ids x (n, L), which are open (n, L) bool, and the lengths of the rows (n,).
    bos_id: what a row without a prompt begins with, or None; longest: the most tokens of a row."""
    mask_id = net.config.mask_id
    given = dict(prompt=plain(prompt), template=plain(template))
    given = {name: value for name, value in given.items() if value not in (None, '', [], ())}
    require(len(given) < 2,
            'give a prompt or a template, not both: a template may begin with the prompt')
    name, value = given.popitem() if given else ('prompt', [])
    rows = id_rows(net, name, value, n, longest)
    if bos_id is not None:
        rows = [row or [bos_id] for row in rows]
    if length is None:
        length = net.config.block_size
        if name == 'template':
            length = [len(row) for row in rows]
    lengths = read_lengths(length, n, longest, net.config.block_size)
    L = max(lengths)
    check_memory(n, L, steps)

    lengths = torch.tensor(lengths).repeat(n // len(lengths))
    for i, length in enumerate(lengths.tolist()):
        size = len(rows[i if len(rows) > 1 else 0])
        require(name == 'prompt' or size == length,
                f'the template has {size} tokens, the length is {length}')
        require(size <= length, f'the prompt has {size} tokens, more than the length of {length}')
    x = torch.tensor([[*row, *[-1] * (L - len(row))] for row in rows]).expand(n, L)
    hole = (x == -1) | (x == (-1 if mask_id is None else mask_id))
    x = torch.where(hole, mask_id or 0, x)
    return x, hole & (torch.arange(L) < lengths[:, None]), lengths


def text_of(net, text, is_open):
    """The ids (n, L) that the open positions (n, L) take."""
    n, L = is_open.shape
    text = torch.as_tensor(text, device='cpu')
    good = text.dim() == 2 and len(text) == n and text.size(1) >= L
    require(good, f'text has the shape {tuple(text.shape)}: {n} rows of {L} ids are needed')
    text = text[:, :L]
    ids = text[is_open]
    mask_id = -1 if net.config.mask_id is None else net.config.mask_id
    good = (ids >= 0) & (ids < net.config.vocab_size) & (ids != mask_id)
    require(good.all(), f'text holds an id that is not a token of {net.config.vocab_size}')
    return text


# -----------------------------------------------------------------------------
# watching: in a terminal, and as a page


class Events:
    """Keeps what happens to each row, in order: (step, position, id, confidence). An id of None is
    a mask, a step of -1 the start. show(events), if given, is told of what is new in the first."""

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
        rest = ids[len(texts):len(texts) + 4]
        if None in rest:
            rest = rest[:rest.index(None)]
        sizes = (n for n in range(1, len(rest) + 1) if '\ufffd' not in tok.decode(rest[:n]))
        n = next(sizes, 1)
        texts += [tok.decode(rest[:n]) if rest else None] + [''] * (n - 1)
    return texts


class Terminal:
    """Shows a row as it fills in: on a screen of its own in a terminal, which the end leaves, else
    printed each time another eighth is there."""

    def __init__(self, spell):
        self.spell = spell  # ids -> texts
        self.live = sys.stdout.isatty()
        self.drawn = 0      # events on show
        self.eighths = 0    # of the open tokens
        self.when = 0.0     # seconds

    def __call__(self, events, end=False):
        if self.live and not end and time.time() < self.when + 0.05:
            return
        ids = list({col: i for _, col, i, _ in events}.values())  # the last of each position
        num_open = sum(i is None for step, _, i, _ in events if step < 0)
        filled = num_open - ids.count(None)
        eighths = 8 * filled // max(num_open, 1)
        if not (self.live or eighths > self.eighths or end and self.drawn < len(events)):
            return
        fresh = {col for _, col, _, _ in events[self.drawn:] if self.live and not end}
        text = ''
        for col, token in enumerate(self.spell(ids)):
            if token is None:
                text += '░' if self.live else '_'
                continue
            token = ''.join(c if c.isprintable() or c in '\n\t' else ' ' for c in token)
            text += f'\x1b[1;32m{token}\x1b[m' if col in fresh else token
        head = f'--- step {events[-1][0] + 1}, {filled} of {num_open} tokens'
        if self.live:  # the head below the text, where it stays in sight
            screen = '\x1b[?1049l\r\x1b[J' if end else '\x1b[?1049h\x1b[H\x1b[J'
            print(f'{screen}{text}\n\x1b[7m{head}\x1b[m', end='\n' * end, flush=True)
        else:
            print(head, text, sep='\n', flush=True)
        self.drawn = len(events)
        self.eighths = max(eighths, self.eighths)
        self.when = time.time()


PAGE = r"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>nanoMDM: a sample, step by step</title>
<style>
:root { color-scheme: light dark; --accent: light-dark(#4b4acf, #a3a2ff) }
body { max-width: 60rem; margin: auto; padding: 1rem; font: 15px/1.5 system-ui }
header { position: sticky; top: 0; background: canvas; padding-bottom: .5rem }
#at { width: 100%; accent-color: var(--accent) }
#scale { padding: 0 4rem; margin: 0 1rem }
#text { margin: 1.5rem 0; font: 1.1rem/1.9 serif; white-space: pre-wrap; overflow-wrap: anywhere }
.mask { background: #8884; margin: 0 1px }
.given { border-bottom: 2px solid var(--accent); font-weight: 600 }
.fresh { outline: 2px solid var(--accent) }
</style>
<header><input id="at" type="range" aria-label="step"><button id="play" autofocus>Play</button>
<label>sample <select id="which"></select></label>
<label>colour <select id="colour"><option value="when">time: first to last</option>
<option value="sure">confidence: 0 to 1</option></select></label>
<span id="scale"></span> <span id="now"></span></header>
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
  show(steps.length)
}
function show(n) {  // what there is after n of the steps
  const last = n ? steps[n - 1] : -1, tokens = sample.given.map(text => ({ text }))
  for (const [step, at, text, sure] of sample.events)
    if (step <= last) tokens[at] = text === null ? { text } : { text, step, sure }
  $('text').replaceChildren(...tokens.map(({ text, step, sure }) => {
    const span = document.createElement('span')
    span.textContent = text === null ? '\u2007\u2007' : text.replace(/\n/g, '\u21b5\n')
    span.className = text === null ? 'mask' : step === undefined ? 'given' : ''
    if (step === undefined) return span
    if (step === last && n < steps.length) span.className = 'fresh'
    span.style.background = tint(byTime() ? step / Math.max(1, steps.at(-1)) : sure)
    span.title = `step ${step + 1}, probability ${sure.toFixed(3)}`
    return span
  }))
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
$('settings').textContent = data.settings
choose(0)
if (location.hash === '#play') play(true)
else if (location.hash) show(Math.min(steps.length, +location.hash.slice(1) || 0))
</script></html>
"""


def write_page(path, rows, spell, settings):
    """A page that plays the sampling and needs nothing else. rows: of each the ids it ended as and
    its events; settings: a line. In the page's data text is null where it is masked."""
    samples = []
    for ids, events in rows:
        final = dict(enumerate(zip(ids, spell(ids), strict=True)))

        def text(col, i, final=final):
            last, spelt = final.get(col, (None, None))
            return spelt if i == last else spell([i])[0]  # the last is spelt with its neighbours
        samples.append(dict(
            given=[text(col, i) for step, col, i, _ in events if step < 0],
            events=[(step, col, text(col, i), round(sure, 4))
                    for step, col, i, sure in events if step >= 0]))
    data = json.dumps(dict(samples=samples, settings=settings)).replace('<', '\\u003c')
    write_whole(path, PAGE.replace('DATA', data))  # no text ends the script


class Results:
    """Writes the result of each row to a .jsonl file, in their order, as soon as those before it
    are there. Until all are the file is called path.unfinished."""

    def __init__(self, path):
        self.path = path
        self.f = None
        self.written = 0

    def write(self, results):
        try:
            self.f = self.f or open(self.path + '.unfinished', 'wb', buffering=0)
            while self.written in results:
                begin = self.f.tell()
                line = (json.dumps(results[self.written]) + '\n').encode()
                while line:
                    line = line[self.f.write(line):]
                self.written += 1
        except OSError as error:
            kept = ''
            if self.written:
                self.f.truncate(begin)
                kept = f'; {self.written} finished samples are kept in {self.path}.unfinished'
            elif self.f:
                os.remove(self.path + '.unfinished')
            raise OSError(f'{self.path} cannot be written ({error.strerror}){kept}') from None

    def end(self):
        self.f.close()
        os.replace(self.path + '.unfinished', self.path)


# -----------------------------------------------------------------------------


def read_texts(name, text):
    """[text], or the lines of a file (FILE:path) or of stdin (-), or [ids] (IDS:5,6,7); [] where
    there is nothing."""
    require(not os.path.isfile(text), f'{name}={text} is the name of a file: FILE:{text} takes its '
            'lines, and - those of stdin')
    if text.startswith('IDS:'):
        ids = text[4:].split(',')
        require(all(re.fullmatch(r' *-?\d{1,18} *', i) for i in ids),
                f'{name}={text}: ids are written as in IDS:5,6,7')
        return [[int(i) for i in ids]]
    if text == '-':
        data = sys.stdin.buffer.read()
    elif text.startswith('FILE:'):
        require(os.path.isfile(text[5:]), f'{name}={text}: there is no file {text[5:]}')
        with open(text[5:], 'rb') as f:
            data = f.read()
    else:
        return [text] if text else []
    try:
        lines = data.decode('utf-8-sig').replace('\r', '').split('\n')
    except UnicodeDecodeError as error:
        raise ValueError(f'{name}={text}: not UTF-8 text ({error.reason})') from None
    lines = [line for line in lines if line]
    require(lines, f'{name}={text}: there is no text in it')
    return lines


def check_output(name, path):
    """Refuse a path that cannot be written, before hours of sampling."""
    folder = os.path.dirname(path) or '.'
    require(os.path.isdir(folder), f'{name}={path}: there is no folder {folder}')
    require(os.path.isfile(path) or not os.path.exists(path), f'{name}={path}: it is no file')
    unfinished = f'{path}.unfinished'
    is_new = not os.path.lexists(unfinished)
    try:
        open(unfinished, 'ab').close()
    except OSError as error:
        raise OSError(f'{name}={path}: it cannot be written ({error.strerror})') from None
    if is_new:
        os.remove(unfinished)


if __name__ == '__main__':
    constants = configure(globals(), **flags())
    check_overrides(overrides)
    if out:
        check_output('out', out)
    if trace:
        check_output('trace', trace)
    require(not out or out != trace, f'out and trace are both {out}: give two names')
    require(not out or out.endswith('.jsonl'), f'out={out}: it must end in .jsonl')
    require(not trace or trace.endswith('.html'), f'trace={trace}: it is a page: NAME.html')
    texts = dict(prompt=read_texts('prompt', prompt), template=read_texts('template', template))
    repeats = num_samples
    check_memory(repeats * max(map(len, texts.values())), 1, 0)
    for name, lines in texts.items():
        num_samples = max(num_samples, repeats * len(lines))
        texts[name] = [line for line in lines for _ in range(repeats)]
    if cfg_scale and not any(texts.values()):
        print(f'warning: cfg_scale={cfg_scale} does nothing without a prompt or a template',
              file=sys.stderr)
    device = pick_device(device)
    if device.type == 'cpu':
        reuse_memory()

    source = init_from or os.path.join(out_dir, 'ckpt.pt')
    net = load_pretrained(str(source), ema, device, **(overrides or {}))
    constants['sampler'] = sampler or default_sampler(net.config)
    check_sampler(net.config, constants['sampler'], sampler_options or {})
    if tokenizer == 'none':
        net.tokenizer = None
    elif tokenizer:
        net.tokenizer = (net.tokenizer or {}) | dict(name=str(tokenizer))
    tok = None
    if net.tokenizer:
        try:
            tok = tokenizer_of(net)
        except (ValueError, OSError) as error:
            raise ValueError(f'{error}; --tokenizer=none does without: ids alone') from None
    spell = partial(spelling, tok)
    show = Terminal(spell) if watch else None
    events = Events(num_samples, show) if watch or trace else None
    file = Results(out) if out else None
    results = {}

    def on_finish(i, ids, nfe):
        text = tok and tok.decode([i for i in ids if i != tok.pad_id or i == tok.eos_id])
        results[i] = dict(ids=ids, text=text, nfe=nfe, settings=constants)
        if file:
            file.write(results)

    try:
        with autocast(device, dtype):
            samples = generate(
                net, num_samples, length, steps, sampler, cfg_scale=cfg_scale,
                temperature=temperature, top_p=top_p, top_k=top_k, seed=seed,
                batch_size=batch_size, progress=not watch, on_change=events, compile=compile,
                draw_dtype=draw_dtype, on_finish=on_finish, **texts, **(sampler_options or {}))
    finally:
        if watch and events.of_row[0]:
            show(events.of_row[0], end=True)

    if file:
        file.end()
        print(f'{num_samples} samples written to {out}')
    if trace:
        settings = ', '.join(
            f'{name}={value!r}' for name, value in constants.items() if value is not None)
        ids = [results[i]['ids'] for i in range(num_samples)]
        write_page(trace, zip(ids, events.of_row, strict=True), spell, settings)
        print(f'{num_samples} samples written to {trace}: open it in a browser')
    if not out:
        for i, result in sorted(results.items())[watch:]:  # the first has been watched
            print(f"--- sample {i} ({result['nfe']} network evaluations)")
            print(result['ids'] if result['text'] is None else result['text'])
