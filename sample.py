"""
Draw samples from a trained net:

    python sample.py --steps=1024 --top_p=0.95                  from out/, where config/owt_mlm.py trains to
    python sample.py --out_dir=out-quickstart --num_samples=4 --prompt="Return the" --out=samples.jsonl
    python sample.py --out_dir=out-quickstart --template="Return the <|mask:20|> list." --watch=True

A sampler is a function that looks once at all rows and returns `step`, which takes every row that is in work one step further; one
loop, in generate(), calls it. Most are one of two kinds: `planned`, where what is revealed when does not depend on the net and is
known before it runs, and `scored`, where it depends on what the net says at the masked positions. Row i of a call is a function of
(seed, first_row + i) alone: the batch size changes nothing but rounding. All draws are made in float64: in float32 the tail of the
uniform is cut off, which lowers the temperature without saying so.

References: MDLM (Sahoo et al. 2024, arXiv 2406.07524), SEDD (Lou et al. 2023, arXiv 2310.16834), SMDM (Nie et al. 2024, arXiv
2410.18514), LLaDA (Nie et al. 2025, arXiv 2502.09992), ReMDM (Wang et al. 2025, arXiv 2503.00307), first hitting (Zheng et al. 2024,
arXiv 2409.02908).
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

from data import get_tokenizer, key_of, splitmix64
from model import KVCache, autocast, check_overrides, get_schedule, load_pretrained, loglinear, pick_device, reuse_memory

out_dir = 'out'         # where train.py left ckpt.pt
init_from = None        # another source of weights for load_pretrained; None: out_dir
overrides = None        # fields of ModelConfig that the source cannot tell, such as "{'objective': 'sedd', 'time_conditioning': True}"
ema = True              # the averaged weights; False: the last ones
tokenizer = None        # None: the one the checkpoint names
device = 'auto'         # 'auto', 'cpu', 'cuda', 'cuda:1', 'mps'
dtype = 'auto'          # 'float32', 'bfloat16' (autocast), or 'auto': bfloat16 where the device multiplies it natively
compile = False         # compile the trunk, on CUDA with CUDA graphs: for many steps of few rows (not ar)
seed = 0
num_samples = 4         # of each prompt or template
batch_size = 16         # rows that go through the net together
length = None           # tokens a sample, the prompt included; None: the template's, or the net's block_size
steps = 1024            # of the sampler; for semi_ar of each window; first_hitting and ar take one a token
sampler = None          # 'ancestral', 'analytic', 'fixed', 'greedy', 'low_confidence', 'semi_ar', 'remdm', 'first_hitting', 'ar'; None: by the net's objective
temperature = 1.0       # 0: the most probable token
top_p = None            # keep the tokens whose cumulative probability is at most top_p, and always the first; None: 1.0, remdm 0.9
top_k = 0               # keep the k most probable tokens; 0: all
cfg_scale = 0.0         # guidance, un + (1 + cfg_scale) (cond - un), un having what is given masked; 0: none
prompt = ''             # text that every sample begins with; 'FILE:prompts.txt': one a line; '-': one a line from stdin
template = ''           # text with <|mask|> or <|mask:20|> where 1 or 20 tokens are open (infilling); FILE: and - as above
confidence = None       # fixed: 'uniform' (default), 'top_prob', 'prob_diff', 'entropy'
confidence_temperature = None  # fixed: positions are drawn by softmax(score / this); default 0: the most confident
threshold = None        # fixed: positions are revealed while the cumulative lack of confidence, less the largest, is under this
block_length = None     # low_confidence: tokens a block; default: one block
stride = None           # semi_ar: tokens a window advances by; default: half of block_size
strategy = None         # remdm: 'cap' (default), 'rescale', 'conf', 'loop'
eta = None              # remdm: default 0.008 for cap, 0.015 for rescale, 0.02 for loop
t_on = None             # remdm, loop: the time at which remasking begins; default 0.55
t_off = None            # remdm, loop: the time at which it ends; default 0.05
alpha_on = None         # remdm, loop: the share of tokens seen in between; default 0.9
eos_id = None           # ar: the id that ends a row, -1: none; default: the tokenizer's
out = None              # write the samples to this .jsonl file instead of the terminal
watch = False           # show the first sample in the terminal as it fills in
trace = None            # write a page that plays the sampling to this .html file


@dataclass
class Samples:
    tokens: torch.Tensor       # (n, L) int64, no mask id left; after the end of a shorter row its padding
    nfe: torch.Tensor          # (n,) int64, network evaluations of the row; a guided pair counts 2
    reveal_step: torch.Tensor  # (n, L) int64, the step at which a position was last revealed, counted from 0; -1 where it was not drawn
    length: torch.Tensor       # (n,) int64, tokens of the row, its EOS included where it ended with one


# -----------------------------------------------------------------------------
# drawing tokens, and how confident the net is of them


def draw(logits, u, mask_id, temperature=1.0, top_k=0, top_p=1.0):
    """One token for each row of logits (N, V), by inverse CDF of the uniforms u (N,) float64 in [0, 1) -> ids (N,), and the
    probabilities (N,) with which these were drawn. In this order: the mask is excluded, temperature, top_k, top_p. Of the tokens in
    falling order, top_p keeps those whose cumulative probability is at most top_p, and always the first, as the released code of xlm
    and ReMDM does. Where the logits are not numbers the id is -1."""
    logits = without_mask(logits.to(u.device), mask_id)
    if temperature == 0:
        highest, ids = logits.max(dim=-1)
        return torch.where(highest.isnan(), -1, ids), torch.ones_like(u)
    probs = torch.softmax(logits.double() if temperature == 1 else logits.double() / temperature, dim=-1)  # (N, V)
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
    last = probs.size(1) - 1 - (probs.flip(1) > 0).int().argmax(dim=-1)                        # u -> 1 may round up to the end
    ids = torch.minimum(ids, last)
    return torch.where(cdf[:, -1].isnan(), -1, ids), probs.gather(1, ids[:, None]).squeeze(1) / cdf[:, -1]


def without_mask(logits, mask_id):
    """The same logits (N, V), which from here on give the mask no probability (mask_id None: there is none)."""
    if mask_id is not None:
        logits[:, mask_id] = -torch.inf
    return logits


def odds(logits):
    """Of logits (N, V): the highest (N,), its id (N,), each other's probability as a share of its, e (N, V) and 0 at the highest, and
    their sum (N,) float64. 1 / (1 + sum) is the highest probability, exact however close it comes to 1."""
    highest, ids = logits.max(dim=-1)
    e = (logits - highest[:, None]).exp_().scatter_(1, ids[:, None], 0)
    return highest, ids, e, e.sum(dim=-1).double()


def probability(logits, ids):
    """Of the tokens ids (N,) under logits (N, V), whatever options they were drawn with, float64."""
    highest, _, _, others = odds(logits)
    return (logits.gather(1, ids.clamp(min=0)[:, None]).squeeze(1) - highest).double().exp() / (1 + others)


def top_prob(logits):
    return 1 / (1 + odds(logits)[3])


def prob_diff(logits):
    _, _, e, others = odds(logits)
    return (1 - e.amax(dim=-1).double()) / (1 + others)


def negative_entropy(logits):
    highest, _, e, others = odds(logits)
    below = (logits - highest[:, None]).clamp_(min=-1e9)  # no 0 times infinity
    return (e * below).sum(dim=-1).double() / (1 + others) - others.log1p()


# logits (N, V) without the mask -> (N,), higher where the net is more confident; and the most there can be
CONFIDENCE = {'top_prob': (top_prob, 1.0), 'prob_diff': (prob_diff, 1.0), 'entropy': (negative_entropy, 0.0)}


# -----------------------------------------------------------------------------
# the absorbing process reversed, for nets that tell more than which token stands behind a mask


def tweedie(net, logits, sigma, dsigma):
    """What a masked position turns into when the noise falls from sigma by dsigma, (N, V) unnormalised (SEDD, theorem 4.2): token v with
    (e^dsigma - 1) s_v, s the concrete score, and the mask with what remains of 1, which of a learned score may be below zero."""
    mask_id, log_ratio = net.config.mask_id, -torch.log(torch.expm1(sigma))[:, None]           # of the true score: log alpha / (1 - alpha)
    log_score = log_ratio + (logits - math.log(net.config.vocab_size - 1) if net.config.objective == 'sedd'
                             else without_mask(logits, mask_id).log_softmax(dim=-1))
    probs = log_score.exp() * torch.expm1(dsigma)[:, None]
    probs[:, mask_id] = 0
    probs[:, mask_id] = 1 - probs.sum(dim=-1)
    return probs


@torch.no_grad()
def transition(net, xt, sigma, dsigma):
    """tweedie for the masked positions of xt (B, L), sigma and dsigma (B,); what is seen stays -> (B, L, V)."""
    row, col = (xt == net.config.mask_id).nonzero(as_tuple=True)
    logits = net.head(net.trunk(xt, sigma)[row, col])
    probs = F.one_hot(xt, net.config.vocab_size).to(logits.dtype)
    probs[row, col] = tweedie(net, logits.double(), sigma[row].double(), dsigma[row].double()).to(probs.dtype)
    return probs


def analytic_probs(net, xt, t, dt):
    """What the analytic sampler draws from in a step from t (B,) to t - dt under loglinear, (B, L, V) unnormalised."""
    sigma = loglinear.sigma(t)
    return transition(net, xt, sigma, sigma - loglinear.sigma(t - dt))


def denoiser_probs(net, xt, t):
    """What its last step, from t (B,) to no noise at all, draws from, (B, L, V) unnormalised: no mask is left."""
    sigma = loglinear.sigma(t)
    probs = transition(net, xt, sigma, sigma)
    probs[:, :, net.config.mask_id] = 0
    return probs


# -----------------------------------------------------------------------------
# the rows of a call


class Batch:
    """The n rows of a call of generate(), and which of them, `rows` (A,), are in work: as many as batch_size allows; one that is
    finished makes room for the next. The ids x (n, L) are on the net's device, all else is on the CPU, so that what is masked is known
    without asking a GPU. share (n,) is the probability of a mask that a time-conditioned net is told."""

    def __init__(self, net, x, open, length, keys, batch_size, schedule, cfg_scale, draw_options, on_change=None, compile=False):
        n, L = x.shape
        self.net, self.schedule, self.cfg_scale, self.draw_options, self.on_change = net, schedule, cfg_scale, draw_options, on_change
        self.device = next(net.parameters()).device
        self.where_drawn = 'cpu' if self.device.type == 'mps' else self.device                 # MPS has no float64
        self.x, self.open, self.masked, self.length, self.keys = x.to(self.device), open, open.clone(), length, keys
        self.left = open.sum(dim=1)                                                            # (n,) positions that are masked
        self.step, self.start, self.nfe = torch.zeros(3, n, dtype=torch.int64)                 # start: of the window that the net sees
        self.share = torch.ones(n, dtype=torch.float64)
        self.reveal_step = torch.full((n, L), -1)
        self.unfit = torch.zeros((), dtype=torch.bool, device=self.where_drawn)                # have logits been no numbers
        self.finished = lambda: self.left[self.rows] == 0
        self.queue = self.left.nonzero().squeeze(1)
        self.rows, self.queue = self.queue[:batch_size], self.queue[batch_size:]
        self.slots, self.entered = torch.arange(len(self.rows)), torch.ones(len(self.rows), dtype=torch.bool)
        self.compiled = compile and torch.compile(net.trunk, dynamic=False, **dict(mode='reduce-overhead') if self.device.type == 'cuda' else {})

    def refill(self):
        """Rows that are finished leave, those next in the queue take their places. `slots`: the place of each row before, `entered`:
        which are new there."""
        done = self.finished()
        fresh = self.queue[:int(done.sum())]
        self.queue, places = self.queue[len(fresh):], done.nonzero().squeeze(1)
        self.rows[places[:len(fresh)]] = fresh
        self.entered = torch.zeros_like(done)
        self.entered[places[:len(fresh)]] = True
        self.slots = (~done | self.entered).nonzero().squeeze(1)
        self.rows, self.entered = self.rows[self.slots], self.entered[self.slots]

    def uniforms(self, rows, cols, step=0, what=0):
        """Float64 uniforms in [0, 1), a hash of the key of the row, the position, the step, and what (0: when, 1: which token)."""
        counter = torch.as_tensor((2 * step + what) << 32 | cols).numpy().astype(np.uint64)
        bits = splitmix64(self.keys[rows.numpy()] ^ splitmix64(counter))
        return torch.from_numpy((bits >> np.uint64(11)).astype(np.float64) * 2.0 ** -53)

    def when(self, rows, step=0):
        """(A, L) uniforms of all positions of rows (A,) at their steps."""
        return self.uniforms(rows[:, None], torch.arange(self.x.size(1)), torch.as_tensor(step).view(-1, 1))

    def trunk(self, rows, cols):
        """The trunk over the rows of the positions (rows, cols), both (N,) -> h (N, 1, n_embd) at these; with guidance (N, 2, n_embd),
        the second with what is given masked. Each row is seen through the window of block_size that begins at its start."""
        config, (active, row) = self.net.config, rows.unique(return_inverse=True)
        start, L = self.start[active], self.x.size(1)
        window = start[:, None] + torch.arange(min(config.block_size, int((self.length[active] - start).max())))  # (A, W)
        attended = window < self.length[active][:, None]
        sigma = self.schedule.conditioning_at(self.share[active]).float() if config.time_conditioning else torch.zeros(len(active))
        window = window.clamp(max=L - 1)
        given = ~self.open[active[:, None], window] & attended
        guided = (given.any(dim=1) & bool(self.cfg_scale)).nonzero().squeeze(1)
        self.nfe[active] += 1
        self.nfe[active[guided]] += 1
        x = self.x[active[:, None].to(self.device), window.to(self.device)]
        index = row
        if len(guided):
            x = torch.cat((x, x[guided.to(self.device)].masked_fill(given[guided].to(self.device), config.mask_id)))
            sigma, attended = torch.cat((sigma, sigma[guided])), torch.cat((attended, attended[guided]))
            partner = torch.arange(len(active))                                                # a row without anything given is its own
            partner[guided] = len(active) + torch.arange(len(guided))
            index = torch.stack((row, partner[row]), dim=1)                                    # (N, 2)
        h = self.run(x, sigma, None if attended.all() else attended)
        return h[index.view(len(rows), -1).to(self.device), (cols - start[row])[:, None].to(self.device)]

    def run(self, x, sigma, attended):
        """The trunk over x (B, W), on a CPU some rows at a time, so that what they need stays in its cache; compiled, in a few sizes of
        batch."""
        size = len(x) if self.device.type != 'cpu' else max(1, 1024 // x.size(1))
        parts = []
        for i in range(0, len(x), size):
            part = [tensor if tensor is None else tensor[i:i + size] for tensor in (x, sigma.to(self.device), attended if attended is None else attended.to(self.device))]
            if not self.compiled:
                parts.append(self.net.trunk(*part))
                continue
            bucket = 2 ** math.ceil(math.log2(len(part[0])))                                   # rows, the last repeated
            repeat = torch.arange(bucket).clamp(max=len(part[0]) - 1).to(self.device)
            parts.append(self.compiled(*(tensor if tensor is None else tensor[repeat] for tensor in part))[:len(part[0])].clone())
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def head(self, h, function):
        """function(logits (n, V), at) over chunks `at`, slices of the N positions of h; what it returns, tensors (n,), joined to (N,).
        The logits are the function's own to change.
        Guided: un + (1 + cfg_scale) (cond - un) (SMDM, equation 6)."""
        size = max(1, 2 ** (22 if self.device.type == 'cpu' else 25) // self.net.config.vocab_size)
        results = []
        for i in range(0, len(h), size):
            logits = self.net.head(h[i:i + size])                                              # (n, 1 or 2, V)
            cond, un = logits[:, 0], logits[:, -1]
            logits = cond if logits.size(1) == 1 else un + (1 + self.cfg_scale) * (cond - un)
            if not self.net.config.head_mask:
                without_mask(logits, self.net.config.mask_id)                                  # minus infinity, less itself
            results.append(function(logits.to(self.where_drawn), slice(i, i + size)))
        return [torch.cat(parts) for parts in zip(*results)]

    def reveal(self, rows, cols, h, ids=None):
        """Put tokens at the masked positions (rows, cols), drawn from h unless they are given as ids -> the probabilities (N,) with
        which they were drawn, None where they were given."""
        if len(rows) == 0:
            return
        step, mask_id = self.step[rows], self.net.config.mask_id
        u = self.uniforms(rows, cols, step, 1).to(self.where_drawn)
        probs = None
        if ids is None:
            ids, probs = self.head(h, lambda logits, at: draw(logits, u[at], mask_id, **self.draw_options))
        if self.on_change:
            sure, = self.head(h, lambda logits, at: (probability(without_mask(logits, mask_id), ids[at]),))
            self.on_change(rows, cols, ids.cpu(), sure.cpu(), step)
        self.unfit |= (ids < 0).any()
        self.x[rows.to(self.device), cols.to(self.device)] = ids.clamp(min=0).to(self.device)
        self.masked[rows, cols], self.reveal_step[rows, cols] = False, step
        self.left -= rows.bincount(minlength=len(self.left))
        return probs

    def remask(self, rows, cols):
        self.x[rows.to(self.device), cols.to(self.device)] = self.net.config.mask_id
        self.masked[rows, cols] = True
        self.left += rows.bincount(minlength=len(self.left))
        if self.on_change and len(rows):
            self.on_change(rows, cols, torch.full_like(rows, -1), torch.zeros(len(rows)), self.step[rows])


def grid(begin, end, steps):
    """steps + 1 evenly spaced times, exact at both ends and where they can be."""
    return begin + (end - begin) * torch.arange(steps + 1, dtype=torch.float64) / steps


def planned(b, plan, share, window=None):
    """For samplers in which the step (n, L) of each position does not depend on the net: each row goes from one step that reveals
    something to the next, and the head sees only what is revealed. share (n or 1, S): of masks at the beginning of each step; window
    (S,): where the window of the net begins, at most (the end of the row is always seen whole)."""
    never = torch.iinfo(torch.int64).max
    plan, share = torch.where(b.masked, plan, never), share.expand(len(plan), -1)

    def step():
        ahead = plan[b.rows]                                                                   # (A, L)
        now = ahead.amin(dim=1)
        at, cols = (ahead == now[:, None]).nonzero(as_tuple=True)
        b.step[b.rows], b.share[b.rows] = now, share[b.rows, now]
        if window is not None:
            b.start[b.rows] = torch.minimum(window[now], (b.length[b.rows] - b.net.config.block_size).clamp(min=0))
        rows = b.rows[at]
        b.reveal(rows, cols, b.trunk(rows, cols))
        plan[rows, cols] = never
    return step


def scored(b, share, candidates, score, choose):
    """For samplers in which the net has a say. candidates(rows) -> (A, L) bool, the positions that may be revealed in this step: a row
    without any is not evaluated. score(logits (n, V), rows (n,), cols (n,)) -> (scores (n,), and perhaps the ids to put there (n,)).
    choose(rows, scores (A, L), -inf where no candidate) -> (A, L) bool, those to reveal. share (S,): as above."""
    def step():
        rows = b.rows
        b.share[rows] = share[b.step[rows]]
        at, cols = candidates(rows).nonzero(as_tuple=True)
        if len(at):
            h = b.trunk(rows[at], cols)
            scores, *ids = b.head(h, lambda logits, some: score(logits, rows[at[some]], cols[some]))
            table = torch.full((len(rows), b.x.size(1)), -torch.inf, dtype=torch.float64)
            table[at, cols] = scores.double().cpu()
            chosen = choose(rows, table)[at, cols]
            kept = chosen.to(h.device)
            b.reveal(rows[at[chosen]], cols[chosen], h[kept], *(i[chosen.to(i.device)] for i in ids))
        b.step[rows] += 1
    return step


def prompt_lengths(b):
    """(n,) tokens before the first open position."""
    return torch.where(b.open.any(dim=1), b.open.int().argmax(dim=1), b.length)


def highest(scores, count):
    """The `count` (A,) highest of each row of scores (A, L) -> (A, L) bool."""
    return scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1) < count[:, None]


# -----------------------------------------------------------------------------
# the samplers: f(batch, steps, its own options) -> step()


def reveal_steps(b, masked_share):
    """The step (n, L) at which each position is revealed, for the probabilities of a mask (S + 1,) at the beginning of S steps and at
    the end: the first step that ends with (1 - alpha_s) / (1 - alpha_1) at or below the uniform of the position; the last takes all."""
    still = masked_share / masked_share[0]
    still[-1] = 0
    return len(still) - 1 - torch.searchsorted(still[1:].flip(0), b.when(torch.arange(len(b.x))), right=True)


def ancestral(b, steps, subs_masking=None):
    """MDLM's ancestral sampler (equation 7; its `ddpm` and `ddpm_cache`) on the grid of times 1 -> 0. A net that never predicts the mask
    reveals a position at a step that does not depend on what is revealed, so these steps are drawn first. A d3pm net gives the mask a
    probability p_m and reveals with chance (1 - p_m)(m_t - m_s) / ((1 - p_m)(m_t - m_s) + m_s), m = 1 - alpha, unless it was trained
    with subs_masking (None: as its run says). The last step reveals all that is left."""
    subs_masking = b.net.constants.get('subs_masking', False) if subs_masking is None else subs_masking
    m = 1 - b.schedule.alpha(grid(1, 0, steps))
    m[-1] = 0
    if b.net.config.objective != 'd3pm' or subs_masking:
        return planned(b, reveal_steps(b, m), m[:-1])
    mask_id = b.net.config.mask_id

    def chance(logits, rows, cols):
        m_t, m_s = (m[b.step[rows] + i].to(logits.device) for i in (0, 1))
        token = 1 - logits.double().softmax(dim=-1)[:, mask_id]
        token = token * (m_t - m_s)
        return torch.where(m_s == 0, 1, token / (token + m_s)),
    return scored(b, m[:-1], lambda rows: b.masked[rows], chance, lambda rows, chances: b.when(rows, b.step[rows]) < chances)


def analytic(b, steps):
    """SEDD's Tweedie sampler (algorithm 2) on the grid of times 1 -> 1e-5, and then a step to no noise at all (as released). Under SUBS
    each step reveals a position with a probability that does not depend on the net, as in the ancestral sampler; a sedd net has a say."""
    times = torch.cat((grid(1, 1e-5, steps), torch.zeros(1, dtype=torch.float64)))
    m = 1 - b.schedule.alpha(times)
    m[-1] = 0
    if b.net.config.objective == 'subs':
        return planned(b, reveal_steps(b, m), m[:-1])
    sigma = b.schedule.sigma(times)
    sigma[-1] = 0

    def chance(logits, rows, cols):
        sigma_t, sigma_s = (sigma[b.step[rows] + i].to(logits.device) for i in (0, 1))
        probs = tweedie(b.net, logits.double(), sigma_t, sigma_t - sigma_s)
        stay = probs[:, b.net.config.mask_id].clamp(min=0)
        token = without_mask(probs, b.net.config.mask_id).clamp(min=0).sum(dim=-1)
        return torch.where(sigma_s == 0, 1, token / (token + stay)),
    return scored(b, m[:-1], lambda rows: b.masked[rows], chance, lambda rows, chances: b.when(rows, b.step[rows]) < chances)


def first_hitting(b, steps):
    """One token at a time at exactly drawn hitting times (Zheng et al., algorithm 1), the limit of ancestral for infinitely many steps:
    a position is hit when the probability of a mask falls to its uniform's share of that at t = 1. `steps` has no part in it."""
    u = torch.where(b.masked, b.when(torch.arange(len(b.x))), -1)
    order = u.argsort(dim=1, descending=True)
    share = u.gather(1, order).clamp(min=1e-9) * (1 - b.schedule.alpha(torch.ones((), dtype=torch.float64)))
    return planned(b, order.argsort(dim=1), share)


def semi_ar(b, steps, stride=None):
    """MDLM's semi-autoregressive sampler: windows of the net's block_size, each sampled by ancestral in `steps` steps, that advance by
    `stride`; what the last window left is conditioned on. Samples may have any length."""
    width, col = b.net.config.block_size, torch.arange(b.x.size(1))
    stride = max(1, width // 2) if stride is None else stride
    if not is_whole(stride) or not 1 <= stride < max(width, 2):
        raise ValueError(f'stride={stride}: it must be at least 1 and below {width}, the block_size of the net')
    number = ((col - width + stride) // stride).clamp(min=0)                                   # of the window that reveals the position
    windows = int(number[-1]) + 1
    m = 1 - b.schedule.alpha(grid(1, 0, steps))
    return planned(b, reveal_steps(b, m) + number * steps, m[:-1].repeat(windows), (torch.arange(windows) * stride).repeat_interleave(steps))


def fixed(b, steps, confidence='uniform', confidence_temperature=0.0, threshold=None):
    """xlm's predictor: at each step floor(masked / steps left) positions, at the last all that is left. confidence: 'uniform', any of
    them; or by the net's: 'top_prob', 'prob_diff' (of the two most probable tokens), 'entropy', the most confident at
    confidence_temperature 0, else drawn without replacement by softmax(score / confidence_temperature). threshold: the most confident
    as long as their cumulative lack of confidence, less the largest of it, is under the threshold, and at least one."""
    if confidence not in ('uniform', *CONFIDENCE):
        raise ValueError(f"confidence='{confidence}' is not known: choose from uniform, {', '.join(CONFIDENCE)}")
    if not is_number(confidence_temperature) or not 0 <= confidence_temperature < math.inf:
        raise ValueError(f'confidence_temperature={confidence_temperature}: it must be 0 or more, and finite')
    if threshold is not None and not (is_number(threshold) and 0 < threshold < math.inf):
        raise ValueError(f'threshold={threshold}: it must be above 0')
    threshold, confidence_temperature = threshold and float(threshold), float(confidence_temperature)
    if confidence == 'uniform' and (threshold is not None or confidence_temperature) or threshold is not None and confidence_temperature:
        raise ValueError("threshold, or else confidence_temperature, goes with confidence 'top_prob', 'prob_diff' or 'entropy'")
    m = 1 - b.schedule.alpha(grid(1, 0, steps))
    if confidence == 'uniform':
        rank = torch.where(b.masked, b.when(torch.arange(len(b.x))), 1).argsort(dim=1).argsort(dim=1)
        plan = torch.zeros_like(rank)
        for masked in b.left.unique().tolist():                                                # rows with as many masks share their counts
            left, ends = masked, []
            for i in range(steps):
                left -= left // (steps - i)
                ends.append(masked - left)
            rows = b.left == masked
            plan[rows] = torch.searchsorted(torch.tensor(ends), rank[rows], right=True)
        return planned(b, plan, m[:-1])
    score, most = CONFIDENCE[confidence]
    count = lambda rows: b.left[rows] // (steps - b.step[rows])

    def choose(rows, scores):
        if threshold is not None:
            lack, order = (most - scores).sort(dim=1)
            under = lack.cumsum(dim=1) - lack < threshold  # sorted, so that each is the largest of those up to it
            under[:, 0] = True
            return torch.zeros_like(under).scatter_(1, order, under) & (scores > -torch.inf) | (b.masked[rows] & (b.step[rows] == steps - 1)[:, None])
        if confidence_temperature:
            scores = scores / confidence_temperature - torch.log(-torch.log1p(-b.when(rows, b.step[rows])))  # Gumbel: softmax without replacement
        return highest(scores, count(rows))
    return scored(b, m[:-1], lambda rows: b.masked[rows] & (count(rows) > 0 if threshold is None else b.left[rows] > 0)[:, None],
                  lambda logits, rows, cols: (score(without_mask(logits, b.net.config.mask_id)),), choose)


def drawn_score(b):
    """Draws a token at each position; its score is the probability that the net gives it, whatever the temperature."""
    def score(logits, rows, cols):
        u = b.uniforms(rows, cols, b.step[rows], 1).to(logits.device)
        ids, _ = draw(logits, u, b.net.config.mask_id, **b.draw_options)
        return probability(logits, ids), ids
    return score


def greedy(b, steps):
    """SMDM's greedy sampler (appendix): times 1 -> 1e-5, evenly spaced; from t to s the int(masked (1 - s/t)) most confident positions
    are revealed, at the last step all that is left. The token of each is the most probable one (temperature 0) or drawn: its power
    form of Gumbel noise is a draw at that temperature."""
    times = torch.linspace(1, 1e-5, steps + 1)  # float32, and so the product below, as released: one more or less token hangs on it
    fraction = 1 - times[1:] / times[:-1]
    count = lambda rows: torch.where(b.step[rows] == steps - 1, b.left[rows], (b.left[rows] * fraction[b.step[rows]]).long())
    return scored(b, 1 - b.schedule.alpha(times[:-1].double()), lambda rows: b.masked[rows] & (count(rows) > 0)[:, None], drawn_score(b),
                  lambda rows, scores: highest(scores, count(rows)))


def low_confidence(b, steps, block_length=None):
    """LLaDA's low-confidence remasking: blocks of block_length from left to right after the prompt, steps / blocks steps each; of the
    positions masked at the beginning of a block, masked // steps of it at a step and one more in the first masked % steps."""
    width, col = b.x.size(1), torch.arange(b.x.size(1))
    begin = prompt_lengths(b)
    block_length = width if block_length is None else block_length
    if not is_whole(block_length) or block_length < 1:
        raise ValueError(f'block_length={block_length}: it must be a whole number of at least 1')
    blocks = ((b.length - begin + block_length - 1) // block_length).clamp(min=1)              # (n,)
    if (steps % blocks).any():
        raise ValueError(f'steps={steps} cannot be shared evenly by {int(blocks[(steps % blocks) > 0][0])} blocks of {block_length}')
    block_length = min(block_length, width)
    each, at_first = steps // blocks, torch.zeros_like(begin)                                  # (n,) steps a block, masks at its beginning

    def in_block(rows):
        first = begin[rows] + b.step[rows] // each[rows] * block_length
        return b.masked[rows] & (col >= first[:, None]) & (col < (first + block_length)[:, None])

    def count(rows):
        step = b.step[rows] % each[rows]
        return at_first[rows] // each[rows] + (step < at_first[rows] % each[rows])

    def candidates(rows):
        masked = in_block(rows)
        at_first[rows] = torch.where(b.step[rows] % each[rows] == 0, masked.sum(dim=1), at_first[rows])
        return masked & (count(rows) > 0)[:, None]
    return scored(b, 1 - b.schedule.alpha(grid(1, 0, steps)[:-1]), candidates, drawn_score(b), lambda rows, scores: highest(scores, count(rows)))


def remdm(b, steps, strategy='cap', eta=None, t_on=0.55, t_off=0.05, alpha_on=0.9):
    """ReMDM (equation 6): from t to s a seen token is masked again with probability sigma, and a masked one revealed with
    (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t), where sigma is at most (1 - alpha_s) / alpha_t. strategy: 'cap', sigma = min(eta, that);
    'rescale', eta times that; 'conf', that times a softmax over the seen tokens of minus the probability with which each was drawn (and times eta, 1 unless given);
    'loop', alpha rises to alpha_on by t_on, stays while tokens are masked again as in cap, and rises to 1 from t_off. What is given
    stays. The net runs for rows that reveal something."""
    etas = dict(cap=0.008, rescale=0.015, conf=1.0, loop=0.02)
    if strategy not in list(etas):
        raise ValueError(f"strategy='{strategy}' is not known: choose from {', '.join(etas)}")
    eta = etas[strategy] if eta is None else eta
    for name, value in (('eta', eta), ('t_on', t_on), ('t_off', t_off), ('alpha_on', alpha_on)):
        if not (is_number(value) and 0 <= value <= 1):
            raise ValueError(f'{name}={value}: it must be in 0 ... 1')
    if not (0 < t_off <= t_on < 1 and alpha_on > 0):
        raise ValueError(f't_on={t_on}, t_off={t_off}, alpha_on={alpha_on}: 0 < t_off <= t_on < 1 and alpha_on above 0 are needed')
    t = grid(1, 0, steps)
    alpha, remasks = b.schedule.alpha(t), torch.ones(steps, dtype=torch.bool)
    if strategy == 'loop':
        alpha = torch.where(t > t_on, (1 - t) / (1 - t_on) * alpha_on, torch.where(t > t_off, alpha_on, 1 - t / t_off * (1 - alpha_on)))
        remasks = ((t <= t_on) & (t > t_off))[:-1]
    alpha[-1] = 1
    most = torch.where(remasks, ((1 - alpha[1:]) / alpha[:-1]).clamp(max=1), 0)                # of sigma, at each step
    drawn_with = torch.full(b.x.shape, torch.inf, dtype=torch.float64) if strategy == 'conf' else None
    b.finished = lambda: b.step[b.rows] == steps

    def step():
        rows, now = b.rows, b.step[b.rows]
        alpha_t, alpha_s, sigma = (tensor[i][:, None] for tensor, i in ((alpha, now), (alpha, now + 1), (most, now)))
        masked, u = b.masked[rows], b.when(rows, now)
        seen = b.open[rows] & ~masked
        if strategy == 'conf':
            weights = torch.where(seen, torch.exp(-drawn_with[rows]), 0)
            sigma = eta * sigma * weights / weights.sum(dim=1, keepdim=True).clamp(min=1e-300)
            revealing = (alpha_s - alpha_t) / (1 - alpha_t)                                    # sigma is 0 where it is masked
        else:
            sigma = eta * sigma if strategy == 'rescale' else sigma.clamp(max=eta)
            revealing = (alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t)
        b.share[rows] = (1 - alpha_t).squeeze(1)
        at, cols = (masked & (u < revealing)).nonzero(as_tuple=True)
        hidden = (seen & (u < sigma)).nonzero(as_tuple=True)
        if len(at):
            probs = b.reveal(rows[at], cols, b.trunk(rows[at], cols))
            if strategy == 'conf':
                drawn_with[rows[at], cols] = probs.cpu()
        b.remask(rows[hidden[0]], hidden[1])
        b.step[rows] += 1
    return step


def ar(b, steps, eos_id=None):
    """Token after token from a causal net, with a key/value cache; a row ends with the first eos_id it draws (None or -1: at its length)."""
    if type(eos_id) not in (int, type(None)):
        raise ValueError(f'eos_id={eos_id!r}: an id is needed, or -1 for none')
    first = prompt_lengths(b)
    if (first == 0).any():
        raise ValueError('a causal net begins with a token: give a prompt (a net that names its tokenizer begins with its BOS)')
    if (b.open.sum(dim=1) != b.length - first).any():
        raise ValueError('a causal net goes on after a prompt; it cannot fill in a template')
    cache = KVCache(len(b.rows), b.x.size(1))

    def step():
        if len(b.slots) < cache.rows:
            cache.keep(b.slots)
        fresh = b.entered & (first[b.rows] > 1)                                                # all of the prompt but its last token
        if fresh.any():
            rows = b.rows[fresh]
            cache.slots, cache.position = fresh.nonzero().squeeze(1).to(b.device), None
            b.net.trunk(b.x[rows.to(b.device), :int(first[rows].max()) - 1], cache=cache)
            b.nfe[rows] += 1
        cols = first[b.rows] + b.step[b.rows]
        cache.position = cols - 1
        h = b.net.trunk(b.x[b.rows.to(b.device), (cols - 1).to(b.device)][:, None], cache=cache)
        b.nfe[b.rows] += 1
        b.reveal(b.rows, cols, h)
        b.step[b.rows] += 1
        if eos_id not in (None, -1):
            ended = (b.x[b.rows.to(b.device), cols.to(b.device)] == eos_id).cpu()
            rows = b.rows[ended]
            b.length[rows], b.left[rows], b.masked[rows] = cols[ended] + 1, 0, False
    return step


SAMPLERS = {  # name -> the function, and the objectives of the nets that it takes
    'ancestral': (ancestral, ('subs', 'mlm', 'd3pm')), 'analytic': (analytic, ('subs', 'sedd')), 'fixed': (fixed, ('subs', 'mlm')),
    'greedy': (greedy, ('subs', 'mlm')), 'low_confidence': (low_confidence, ('subs', 'mlm')), 'semi_ar': (semi_ar, ('subs', 'mlm')),
    'remdm': (remdm, ('subs', 'mlm')), 'first_hitting': (first_hitting, ('subs', 'mlm')), 'ar': (ar, ('ar',))}


# -----------------------------------------------------------------------------
# generate


def is_number(value):
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_whole(value):
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def rows_of(name, value, n, encode):
    """Rows of ids, 1 for all or n, from text, n texts, ids (P,), or n rows of ids of any lengths. Raises ValueError for anything else."""
    value = value.tolist() if hasattr(value, 'tolist') else [value] if isinstance(value, str) else value
    if not isinstance(value, (list, tuple)):
        raise ValueError(f'{name}={value!r}: text or ids are needed')
    value = [encode(row) if isinstance(row, str) else row.tolist() if hasattr(row, 'tolist') else row for row in value]
    rows = value if any(isinstance(row, (list, tuple)) for row in value) else [value]
    if len(rows) not in (1, n):
        raise ValueError(f'{name} has {len(rows)} rows: 1, for all, or num_samples={n} are needed')
    for row in rows:
        if not isinstance(row, (list, tuple)):
            raise ValueError(f'{name} holds {row!r} beside rows of ids')
        for i in row:
            if type(i) is not int:
                raise ValueError(f'{name} holds {i!r}, which is no id')
    return rows


def lay_out(net, n, length, prompt, template, begin, longest):
    """What is there before sampling: ids x (n, L), which of them are open (n, L) bool, and the lengths of the rows (n,). begin: the id
    that a row without a prompt begins with, or None; longest: the most tokens a row may have. Raises ValueError where things do not fit."""
    config, nothing = net.config, lambda value: value is None or isinstance(value, (str, list, tuple)) and len(value) == 0 or getattr(value, 'size', None) == 0
    if not nothing(prompt) and not nothing(template):
        raise ValueError('give a prompt or a template, not both: a template may begin with the prompt')
    name, given = ('prompt', prompt) if nothing(template) else ('template', template)

    def encode(text):
        if net.tokenizer is None:
            raise ValueError(f'the source of the weights names no tokenizer: give the {name} as ids')
        tok, ids = get_tokenizer(**net.tokenizer), []
        for i, piece in enumerate(re.split(r'<\|mask(?::(\d{1,8}))?\|>', text) if name == 'template' else [text]):
            if name == 'template' and not i % 2 and '<|mask' in piece or any('\ud800' <= letter <= '\udfff' for letter in piece or ''):
                raise ValueError(f'{name}={text!r}: ' + ('open tokens are written <|mask|> or <|mask:20|>' if '<|mask' in piece else 'it is not valid UTF-8 text'))
            if i % 2 and int(piece or 1) > longest:
                raise ValueError(f'{name}={text!r}: {piece} open tokens, where a row has at most {longest}')
            ids += [-1] * int(piece or 1) if i % 2 else tok.encode(piece) if piece else []
        return ids

    rows = rows_of(name, [] if nothing(given) else given, n, encode)
    if begin is not None:
        rows = [list(row) or [begin] for row in rows]
    length = ([len(row) for row in rows] if name == 'template' else config.block_size) if length is None else length
    lengths = length.tolist() if hasattr(length, 'tolist') else length
    lengths = lengths if isinstance(lengths, (list, tuple)) else [lengths]
    if len(lengths) not in (1, n) or not all(is_whole(value) and value >= 1 for value in lengths):
        raise ValueError(f'length={length!r}: a whole number of at least 1, for all rows or for each of num_samples={n}, is needed')
    if max(lengths) > longest:
        raise ValueError(f"length={max(lengths)}: it must be 1 to {longest}" + (", the net's block_size (sampler 'semi_ar' goes further)" if longest == config.block_size else ''))
    lengths = torch.tensor(lengths).expand(n).clone()
    holes = (-1, config.mask_id) if name == 'template' else ()
    for row, most in zip(rows, lengths.tolist() if len(rows) > 1 else [int(lengths.min())]):
        if len(row) > most or name == 'template' and (len(row) < most or lengths.min() < lengths.max() and len(rows) == 1):
            raise ValueError(f'the template has {len(row)} tokens, the length is {most}: they must be the same' if name == 'template'
                             else f'the prompt has {len(row)} tokens, more than the length of {most}')
        for i in row:
            if i not in holes and not (0 <= i < config.vocab_size and i != config.mask_id):
                raise ValueError(f'the {name} holds {i}, an id that is not a token: ids are 0 ... {config.vocab_size - 1}, without the mask {config.mask_id}')
    L = int(lengths.max())
    ids = torch.tensor([[-1 if i in holes else i for i in row] + [-1] * (L - len(row)) for row in rows]).expand(n, L)
    return torch.where(ids == -1, config.mask_id or 0, ids), (ids == -1) & (torch.arange(L) < lengths[:, None]), lengths


@torch.no_grad()
def generate(net, num_samples, length, steps, sampler='ancestral', prompt=None, cfg_scale=0.0, temperature=1.0, top_p=None, top_k=0, seed=0,
             first_row=0, batch_size=16, schedule=None, template=None, progress=False, on_change=None, compile=False, **options):
    """Draw num_samples rows of `length` tokens, the prompt included (None: the template's, or block_size; or one length for each) -> Samples.

    sampler: a key of SAMPLERS, or None for the natural one of the net's objective; **options are the sampler's own (see its function).
    prompt, what a row begins with: text, n texts, ids (P,), or n rows of ids of any lengths. template: the same, but as long as the row,
    and open where it holds -1 or the mask (in text <|mask|>, or <|mask:20|> for 20). What is given is kept as it is. Row i is seeded by
    (seed, first_row + i) and is the same whatever the batch_size; schedule: that of the noise, None: the one the net was trained with. For the rest see the constants above.
    on_change(rows, cols, ids, confidence, steps), all (N,) on the CPU, is called when positions are revealed, with the probability that the
    net gives the tokens, or masked again, with the id -1; first with all of them as they are before step 0, as step -1. Raises ValueError where an option is impossible."""
    config = net.config
    for name, value in (('num_samples', num_samples), ('steps', steps), ('top_k', top_k), ('batch_size', batch_size), ('seed', seed), ('first_row', first_row)):
        if not is_whole(value):
            raise ValueError(f'{name}={value!r}: it must be a whole number')
    schedule = get_schedule(net.constants.get('schedule', 'loglinear')) if schedule is None else schedule
    sampler = {'sedd': 'analytic', 'ar': 'ar'}.get(config.objective, 'ancestral') if sampler is None else sampler
    if sampler not in list(SAMPLERS):
        raise ValueError(f"sampler '{sampler}' is not known: choose from {', '.join(SAMPLERS)}")
    function, objectives = SAMPLERS[sampler]
    if config.objective not in objectives:
        able = ', '.join(name for name, (_, takes) in SAMPLERS.items() if config.objective in takes)
        raise ValueError(f"sampler '{sampler}' takes nets of the objectives {', '.join(objectives)}; for this one, {config.objective}, there is {able}")
    own = list(inspect.signature(function).parameters)[2:]
    for key in options:
        if key not in own:
            raise ValueError(f"{key} does not go with sampler '{sampler}', which has {'the options ' + ', '.join(own) if own else 'no options of its own'}")
    top_p = (0.9 if sampler == 'remdm' else 1.0) if top_p is None else top_p
    for name, value, fits, needed in (
            ('num_samples', num_samples, 1 <= num_samples <= 10 ** 8, 'at least 1, and at most 100 million'), ('batch_size', batch_size, batch_size >= 1, 'at least 1'),
            ('steps', steps, 1 <= steps <= 10 ** 8, 'at least 1, and at most 100 million'), ('top_k', top_k, top_k >= 0, '0 (all tokens) or more'),
            ('temperature', temperature, is_number(temperature) and 0 <= temperature < math.inf, '0 or more, and finite'),
            ('top_p', top_p, is_number(top_p) and 0 < top_p <= 1, 'above 0 and at most 1'),
            ('cfg_scale', cfg_scale, is_number(cfg_scale) and -1 <= cfg_scale < math.inf, '-1 or more, and finite'),
            ('compile', compile, not compile or sampler != 'ar', "False for sampler 'ar', whose cache grows"),
            ('cfg_scale', cfg_scale, not cfg_scale or sampler != 'ar', "0 for sampler 'ar': guidance masks the prompt, which a causal net does not know")):
        if not fits:
            raise ValueError(f'{name}={value}: it must be {needed}')
    tok = None if net.tokenizer is None or sampler != 'ar' else get_tokenizer(**net.tokenizer)
    if tok is not None:
        options.setdefault('eos_id', tok.eos_id)
    x, open, lengths = lay_out(net, num_samples, length, prompt, template, tok and tok.bos_id, 2 ** 24 if sampler == 'semi_ar' else config.block_size)
    keys = np.array([key_of(seed, first_row + i) for i in range(num_samples)], dtype=np.uint64)
    b = Batch(net, x, open, lengths, keys, batch_size, schedule, cfg_scale, dict(temperature=temperature, top_k=top_k, top_p=top_p), on_change, compile)
    step = function(b, steps, **options)
    if on_change:
        rows, cols = (torch.arange(x.size(1)) < lengths[:, None]).nonzero(as_tuple=True)
        on_change(rows, cols, torch.where(open, -1, x)[rows, cols], torch.ones(len(rows)), torch.full_like(rows, -1))
    with tqdm(total=int(b.left.sum()), unit=' tokens', desc='sampling', disable=not progress) as bar:
        while len(b.rows):
            left = b.left.sum()
            step()
            b.refill()
            bar.update(int(left - b.left.sum()))
    assert not b.masked.any()
    if b.unfit:
        raise ValueError('the logits of the net, or what the options make of them, are not numbers: nothing can be drawn from them')
    inside = torch.arange(x.size(1)) < b.length[:, None]
    if not inside.all():
        pad_id = config.pad_id if config.pad_id is not None else get_tokenizer(**net.tokenizer).pad_id if net.tokenizer else 0
        b.x = torch.where(inside.to(b.device), b.x, pad_id)
    return Samples(b.x.cpu(), b.nfe, b.reveal_step, b.length)


# -----------------------------------------------------------------------------
# watching: in a terminal, and as a page


class Events:
    """Keeps what happens to each row, (step, position, id, confidence) in order; an id of None: masked. What is there before the first
    step has step -1. show: is called with the events of the first row whenever there are new ones."""

    def __init__(self, num_rows, show=None):
        self.of_row, self.show = [[] for _ in range(num_rows)], show

    def __call__(self, rows, cols, ids, confidence, steps):
        for row, col, i, sure, step in zip(rows.tolist(), cols.tolist(), ids.tolist(), confidence.tolist(), steps.tolist()):
            self.of_row[row].append((step, col, None if i == -1 else i, sure))
        if self.show and 0 in rows:
            self.show(self.of_row[0])


def spelling(tok, ids):
    """The text of each of ids, None where it is None. Where tokens share a letter of several bytes, it stands at the first of them."""
    if tok is None:
        return [i if i is None else f'{i} ' for i in ids]
    texts, at = [], 0
    while at < len(ids):
        span, text = 1, None if ids[at] is None else tok.decode(ids[at:at + 1])
        if text is not None and '\ufffd' in text:
            for wider in (2, 3, 4):
                some = ids[at:at + wider]
                if len(some) == wider and None not in some and '\ufffd' not in (whole := tok.decode(some)):
                    span, text = wider, whole
                    break
        texts += [text] + [''] * (span - 1)
        at += span
    return texts


class Terminal:
    """Draws a row that fills in over what it drew before; where there is no terminal, prints it a few times. spell: see spelling."""

    def __init__(self, spell):
        self.spell, self.live, self.ids, self.given = spell, sys.stdout.isatty(), [], 0
        self.done, self.lines, self.last, self.shown, self.drawn = 0, 0, 0.0, 0, 0

    def __call__(self, events, end=False):
        new = set()
        for step, col, i, _ in events[self.done:]:
            if step < 0:
                self.ids.append(i)
                self.given += i is not None
            else:
                self.ids[col] = i
                new.add(col)
        self.done = len(events)
        open, filled = len(self.ids) - self.given, len(self.ids) - self.ids.count(None) - self.given
        eighths = filled * 8 // max(open, 1)
        if end and self.drawn == self.done and not self.live or not (end or (time.time() - self.last > 0.05 if self.live else eighths > self.shown)):
            return
        self.last, self.shown, self.drawn = time.time(), max(eighths, self.shown), self.done
        head, tokens = f'step {events[-1][0] + 1}, {filled} of {open} tokens', self.spell(self.ids)
        if not self.live:
            print(f'--- {head}\n' + ''.join('_' if token is None else token for token in tokens), flush=True)
            return
        columns, height = shutil.get_terminal_size()
        lines, width = [''], 0
        for col, token in enumerate(tokens):                                                   # wrapped by hand: colours have no width
            style = '2' if token is None else '1;32' if col in new and not end else '0'
            shown = '░' if token is None else ''.join(c for c in token.replace('\t', '    ') if c == '\n' or unicodedata.category(c) != 'Cc')
            for part in re.split(r'(\n)', shown):
                cells = sum(2 if unicodedata.east_asian_width(c) in 'WF' else 1 for c in part)
                if part == '\n' or width + cells >= columns:
                    lines, width = [*lines, ''], 0
                if part and part != '\n':
                    lines[-1] += f'\x1b[{style}m{part}\x1b[0m'
                    width += cells
        lines = lines if end else lines[-max(1, height - 2):]                                        # what has scrolled away cannot be drawn over
        print((f'\x1b[{self.lines}A' if self.lines else '') + '\r\x1b[J' + '\n'.join([f'\x1b[7m{f" {head} "[:columns - 1]}\x1b[0m', *lines]), flush=True)
        self.lines = len(lines) + 1


PAGE = r'''<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>nanoMDM: a sample, step by step</title>
<style>
:root { color-scheme: light dark; --paper: #fbfaf7; --ink: #22222a; --quiet: #85848c; --line: #dedcd5; --mask: #e4e2dc; --accent: #4b4acf; --wash: 26% }
@media (prefers-color-scheme: dark) { :root { --paper: #17171c; --ink: #e9e7e2; --quiet: #8d8c96; --line: #34343d; --mask: #2d2d36; --accent: #a3a2ff; --wash: 38% } }
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif }
main { max-width: 60rem; margin: 0 auto; padding: 2rem 1.5rem 4rem }
h1 { font-size: 1.15rem; margin: 0 } h1 small { font-weight: 400; color: var(--quiet); margin-left: .6em }
.panel { position: sticky; top: 0; background: var(--paper); padding: 1rem 0 .8rem; border-bottom: 1px solid var(--line); z-index: 1 }
.row { display: flex; flex-wrap: wrap; gap: .6rem 1rem; align-items: center; font-size: .875rem; color: var(--quiet) }
button, select { font: inherit; color: var(--ink); background: transparent; border: 1px solid var(--line); border-radius: .5rem; padding: .3rem .7rem; cursor: pointer }
button { min-width: 5.5rem; background: var(--accent); border-color: var(--accent); color: var(--paper); font-weight: 600 }
input { width: 100%; margin: .1rem 0 .6rem; accent-color: var(--accent); display: block } svg { width: 100%; height: 44px; display: block; margin-top: .8rem }
#now { margin-left: auto; font-variant-numeric: tabular-nums }
#text { font: 1.02rem/1.95 ui-serif, Georgia, serif; white-space: pre-wrap; overflow-wrap: anywhere; margin-top: 1.4rem }
#text span { border-radius: .25em; padding: .14em 0 }
#text .mask { background: var(--mask); color: transparent; margin: 0 1px; user-select: none }
#text .given { border-bottom: 2px solid var(--accent); border-radius: 0; font-weight: 600 }
#text .fresh { outline: 2px solid var(--accent) }
#scale { width: 8rem; height: .7rem; border-radius: .35rem; display: inline-block } footer { margin-top: 2rem; color: var(--quiet); font-size: .8rem; overflow-wrap: anywhere }
</style>
<main><h1>nanoMDM<small>a sample, step by step</small></h1>
<div class="panel"><svg id="curve" preserveAspectRatio="none" viewBox="0 0 1000 44"></svg><input id="at" type="range" min="0" value="0" aria-label="step">
<div class="row"><button id="play">Play</button><label>sample <select id="which"></select></label>
<label>colour <select id="colour"><option value="when">when revealed</option><option value="sure">how confidently</option><option value="none">none</option></select></label>
<span id="low"></span><span id="scale"></span><span id="high"></span><span id="now"></span></div></div>
<div id="text"></div><footer id="settings"></footer></main>
<script id="data" type="application/json">DATA</script>
<script>
const data = JSON.parse(document.getElementById('data').textContent), el = id => document.getElementById(id)
const hue = { when: x => `oklch(70% .17 ${285 - 235 * x})`, sure: x => `oklch(70% .17 ${25 + 125 * x})`, none: () => 'transparent' }
let sample, spans, steps, playing = false, timer
function choose(k) {
  sample = data.samples[k]
  steps = [...new Set(sample.events.map(e => e[0]))]
  el('at').max = steps.length
  el('text').replaceChildren(...(spans = sample.given.map(() => document.createElement('span'))))
  let left = sample.given.filter(g => g === null).length, all = Math.max(left, 1), seen = new Set(), i = 0, points = ['0,42']
  steps.forEach((step, n) => {
    for (; i < sample.events.length && sample.events[i][0] === step; i++) sample.events[i][2] === null ? seen.delete(sample.events[i][1]) : seen.add(sample.events[i][1])
    points.push(`${1000 * (n + 1) / steps.length},${2 + 40 * (1 - seen.size / all)}`)
  })
  points = points.map(p => { const [x, y] = p.split(','); return `${x},${44 - y}` })
  el('curve').innerHTML = `<polygon points="0,44 ${points.join(' ')} 1000,44" fill="var(--accent)" opacity=".14"/><polyline points="${points.join(' ')}" fill="none" stroke="var(--accent)" stroke-width="1.5" vector-effect="non-scaling-stroke"/><line id="hand" y1="0" y2="44" stroke="var(--ink)" vector-effect="non-scaling-stroke"/>`
  show(steps.length)
}
function show(n) {
  const tokens = sample.given.map(g => g === null ? null : { text: g, given: true }), mode = el('colour').value, last = n ? steps[n - 1] : -1
  for (const [step, at, text, sure] of sample.events) {
    if (n === 0 || step > last) break
    tokens[at] = text === null ? null : { text, sure, step }
  }
  tokens.forEach((token, i) => {
    const span = spans[i], text = token ? token.text.replace(/\n/g, '\u21b5\n') : '\u2007\u2007\u2007'
    if (span.textContent !== text) span.textContent = text
    span.className = !token ? 'mask' : token.given ? 'given' : token.step === last && n < steps.length ? 'fresh' : ''
    const x = !token || token.given ? 0 : mode === 'when' ? token.step / Math.max(1, steps[steps.length - 1]) : token.sure
    span.style.backgroundColor = token && !token.given ? `color-mix(in oklch, ${hue[mode](x)} var(--wash), transparent)` : ''
    span.title = token && !token.given ? `step ${token.step + 1}, probability ${token.sure.toFixed(3)}` : ''
  })
  el('at').value = n
  el('now').textContent = `step ${last + 1}, ${tokens.filter(t => !t).length} masked`
  for (const end of ['x1', 'x2']) el('hand').setAttribute(end, 1000 * n / Math.max(1, steps.length))
  el('scale').style.background = mode === 'none' ? 'none' : `linear-gradient(in oklch to right, ${[0, .25, .5, .75, 1].map(hue[mode]).join(', ')})`
  el('low').textContent = { when: 'first', sure: '0', none: '' }[mode]
  el('high').textContent = { when: 'last', sure: '1', none: '' }[mode]
}
function play(on) {
  playing = on
  clearInterval(timer)
  el('play').textContent = on ? 'Pause' : 'Play'
  if (!on) return
  let n = +el('at').value
  if (n >= steps.length) n = 0
  const ticks = Math.min(20000, Math.max(3000, 120 * steps.length)) / 40, from = n
  let tick = 0
  timer = setInterval(() => {
    n = Math.min(steps.length, from + Math.floor(++tick / ticks * steps.length))
    show(n)
    if (n === steps.length) play(false)
  }, 40)
}
data.samples.forEach((_, k) => el('which').append(new Option(k + 1, k)))
el('which').onchange = () => { play(false); choose(+el('which').value) }
el('colour').onchange = () => show(+el('at').value)
el('at').oninput = () => { play(false); show(+el('at').value) }
el('play').onclick = () => play(!playing)
onkeydown = e => { if (e.key === ' ' && !['SELECT', 'BUTTON'].includes(e.target.tagName)) { e.preventDefault(); play(!playing) } }
el('settings').textContent = data.settings
choose(0)
if (location.hash === '#play') { show(0); play(true) }
else if (location.hash) show(Math.min(steps.length, +location.hash.slice(1) || 0))
</script></html>
'''


def write_page(path, samples, settings):
    """A page without dependencies. samples: for each row {given: [text, or null where it is open], events: [[step, position, text, or null
    where it is masked again, confidence]]}; settings: a line of text."""
    data = json.dumps(dict(samples=samples, settings=settings)).replace('<', '\\u003c')  # no text can end the script
    with open(path + '.unfinished', 'w', encoding='utf-8') as f:
        f.write(PAGE.replace('DATA', data))
    os.replace(path + '.unfinished', path)


# -----------------------------------------------------------------------------

if __name__ == '__main__':
    from configurator import configure
    constants = configure(globals())
    check_overrides(overrides)
    for key in ('out', 'trace'):
        path = globals()[key] = globals()[key] and str(globals()[key])
        folder = os.path.dirname(path or '') or '.'
        for bad, why in ((os.path.isdir(path or ''), 'it is a folder'), (not os.path.isdir(folder), f'there is no folder {folder}'),
                         (os.path.exists(path or '') and not os.path.isfile(path), 'it is no file'), (not os.access(folder, os.W_OK), f'{folder} cannot be written to')):
            if path and bad:
                raise ValueError(f'{key}={path}: {why}')
    if out and out == trace:
        raise ValueError(f'out and trace are both {out}: give two names')

    def lines_of(name, text):
        """[text], or the lines of a file (FILE:path) or of stdin (-), or None where there is nothing."""
        if text.startswith('FILE:') and not os.path.isfile(text[5:]):
            raise FileNotFoundError(f'{name}={text}: there is no file {text[5:]}')
        lines = [text]
        if text.startswith('FILE:') or text == '-':
            with open(text[5:], 'rb') if text != '-' else sys.stdin.buffer as f:
                try:
                    lines = f.read().decode('utf-8-sig').replace('\r', '').split('\n')
                except UnicodeDecodeError as error:
                    raise ValueError(f'{name}={text}: it is not UTF-8 text ({error.reason})') from None
        lines = [line for line in lines if line]
        if text and not lines:
            raise ValueError(f'{name}={text}: there is no text in it')
        return lines

    prompts, templates = lines_of('prompt', prompt), lines_of('template', template)
    device = pick_device(device)
    if device.type == 'cpu':
        reuse_memory()
    net = load_pretrained(str(init_from or os.path.join(out_dir, 'ckpt.pt')), ema, device, **(overrides or {}))
    if tokenizer:
        net.tokenizer = (net.tokenizer or {}) | dict(name=str(tokenizer))
    tok = get_tokenizer(**net.tokenizer) if net.tokenizer else None
    if tok and tok.vocab_size != net.config.vocab_size:
        raise ValueError(f"tokenizer '{tok.name}' has {tok.vocab_size} ids, the net {net.config.vocab_size}: give the one it was trained with")
    options = {key: globals()[key] for key in ('confidence', 'confidence_temperature', 'threshold', 'block_length', 'stride', 'strategy', 'eta', 't_on', 't_off',
                                               'alpha_on', 'eos_id') if globals()[key] is not None}
    spell = lambda ids: spelling(tok, ids)
    each = num_samples
    num_samples *= max(1, len(prompts), len(templates))
    spread = lambda texts: [text for text in texts for _ in range(each)] or None
    show = Terminal(spell) if watch else None
    events = Events(num_samples, show) if watch or trace else None
    with autocast(device, dtype):
        samples = generate(net, num_samples, length, steps, sampler, spread(prompts), cfg_scale, temperature, top_p, top_k, seed, batch_size=batch_size,
                           template=spread(templates), progress=not watch, on_change=events, compile=compile, **options)
    rows = [ids[:n] for ids, n in zip(samples.tokens.tolist(), samples.length.tolist())]
    texts = [tok and tok.decode([i for i in ids if i != tok.pad_id or i == tok.eos_id]) for ids in rows]
    if watch:
        show(events.of_row[0], end=True)
    if trace:
        settings = ', '.join(f'{key}={value!r}' for key, value in constants.items() if value is not None)
        pages = []
        for row, events_of_row in zip(rows, events.of_row):
            last, final = spell(row), dict(enumerate(row))                                     # what stays is spelt with its neighbours
            text = lambda col, i: None if i is None else last[col] if final.get(col) == i else spell([i])[0]
            pages.append(dict(given=[text(col, i) for step, col, i, _ in events_of_row if step < 0],
                              events=[(step, col, text(col, i), round(sure, 4)) for step, col, i, sure in events_of_row if step >= 0]))
        write_page(trace, pages, settings)
        print(f'{num_samples} samples written to {trace}: open it in a browser')
    if out:
        with open(out + '.unfinished', 'w') as f:
            for ids, text, nfe in zip(rows, texts, samples.nfe.tolist()):
                f.write(json.dumps(dict(ids=ids, text=text, nfe=nfe, settings=constants)) + '\n')
        os.replace(out + '.unfinished', out)
        print(f'{num_samples} samples written to {out}')
    else:
        for i, (ids, text, nfe) in list(enumerate(zip(rows, texts, samples.nfe.tolist())))[watch:]:  # the first has been watched
            print(f'--- sample {i} ({nfe} network evaluations)\n{ids if text is None else text}')
