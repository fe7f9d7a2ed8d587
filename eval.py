"""
Measure a trained net, or samples:

    python eval.py --out_dir=out-quickstart                               the NELBO of the validation split
    python eval.py --out_dir=out --metric=zero_shot                       the same of MDLM's benchmarks, into one table
    python eval.py --metric=samples --input=samples.jsonl --dataset=stdlib        generative perplexity, entropy, MAUVE, distinct-n, memorisation
    python eval.py config/eval_owt_mlm.py                                 the table of the xlm experiment: samples and metrics for each T
    python eval.py --metric=report                                        results.jsonl -> results.md and plots
    torchrun --nproc_per_node=8 eval.py ...                               rows and samples are shared among the processes, the figures are the same

A perplexity here is never without its tokens, its unit and its standard error, and what was left out is counted. The loglinear schedule
masks with probability (1 - eps) t but weighs by 1/t, as published, so that a NELBO by sampled times reads eps = 0.1% low; one by sampled
counts does not.
"""
import collections
import contextlib
import dataclasses
import datetime
import glob
import hashlib
import json
import math
import os
import platform
import random

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from data import BENCHMARKS, DATASETS, GPT2_XLM, TokenRows, find_or_prepare, get_tokenizer, key_of, permute, read_meta, splitmix64
from model import (autocast, check_overrides, corrupt_batch, get_schedule, load_pretrained, loglinear, nelbo_per_token, on_grid, pick_device,
                   reuse_memory, stratified_times)
from sample import generate

metric = 'ppl'          # 'ppl': the NELBO of a split; 'zero_shot': of many datasets; 'samples': of texts; 'table': samples in different steps; 'report'
out_dir = 'out'         # where train.py left ckpt.pt
init_from = None        # another source of weights for load_pretrained; None: out_dir
overrides = None        # fields of ModelConfig that the source cannot tell, such as "{'objective': 'sedd', 'time_conditioning': True}"
ema = True              # the averaged weights; False: the last ones
device = 'auto'         # 'auto', 'cpu', 'cuda', 'cuda:1', 'mps'
dtype = 'float32'       # 'bfloat16' (autocast) is faster and reads a little differently
seed = 0
batch_size = 16         # rows that go through the net, or texts through the judge, together
results = 'results.jsonl'  # every result is appended to this file, with the settings that made it

# likelihood (ppl, zero_shot)
dataset = None          # a folder in data/, or what data.py knows; None: what the net was trained on. samples, table: what MAUVE and memorisation compare with, '': none
tokenizer = None        # None: the one the checkpoint names
split = None            # None: 'test' for lm1b, ag_news and text8, else 'validation'
packing = None          # how rows are cut: 'wrap', 'concat', 'pad', 'sentence'; None: as the net was trained, else 'wrap'
block_size = None       # tokens a row; None: the net's
T = None                # steps of the bound, for subs and d3pm nets; 0: continuous time; None: as the net was trained, else 0
estimator = None        # 'time': masks at sampled times; 'count': exactly k masks, k sampled; None: 'count' where it is defined (README: why)
num_mc = 4              # times, or counts, drawn for each row
max_rows = None         # evaluate so many rows, spread over the split; None: all
datasets = ('ptb', 'wikitext2', 'lm1b', 'lambada', 'ag_news', 'scientific_papers_pubmed', 'scientific_papers_arxiv')  # of zero_shot

# samples (samples, table)
input = None            # samples: a .jsonl file with a "text" field; None: draw them from the net
judge = 'gpt2-large'    # causal net that generative perplexity is measured with: a Hugging Face name or folder
protocol = 'xlm'        # 'xlm': every special token is left out, each text from its second token; 'mdlm': texts with their <|endoftext|>
featurizer = 'gpt2-large'  # of MAUVE, a Hugging Face name or folder with gpt2 or bert in it; '': no MAUVE
num_samples = 16
length = None           # tokens a sample; None: the net's block_size
steps = 1024
sampler = None          # a sampler of sample.py; None: by the net's objective
sampler_options = None  # a dict of its own options
temperature = 1.0
top_p = None
top_k = 0
table_steps = (128, 256, 512, 1024)  # table: the steps of each column
samples_dir = None      # where the samples are kept, in a folder for each number of steps; None: <out_dir>/samples
published = None        # published values to stand beside the results: zero_shot {'ptb': 95.26}, table {'gen_ppl': {128: 78.34}}


# -----------------------------------------------------------------------------
# likelihood


def ratio_with_error(sums, counts):
    """sum / count over rows (n,) and its standard error, rows being independent (the ratio estimator of survey sampling)."""
    ratio = sums.sum() / counts.sum()
    residual = sums - ratio * counts
    n = len(sums)
    error = math.sqrt(n / (n - 1) * (residual ** 2).sum()) / counts.sum() if n > 1 else math.nan
    return float(ratio), float(error)


def natural_estimator(net, T=0):
    """'count' has the smaller variance; it is defined for nets that say the same whatever the time, in continuous time."""
    return 'count' if net.config.objective in ('subs', 'mlm') and not net.config.time_conditioning and not T else 'time'


@torch.no_grad()
def nelbo(net, rows, num_mc=1, batch_size=16, seed=0, max_rows=None, schedule=loglinear, T=0, subs_masking=False, estimator=None, progress=False):
    """The negative evidence lower bound of rows (data.TokenRows) by the net's own objective ('mlm' nets: by MDLM's equation 10; 'ar' nets:
    the likelihood itself), in continuous time or in T steps, with num_mc draws a row, stratified within the row and over the rows.
    estimator: 'time', each position is masked by chance at a drawn time; 'count', exactly k of the n positions of a row are, k drawn from
    1 ... n, and their losses weighed by n / k, which has the same mean (Ou et al. 2024, arXiv 2406.03736, section 3.3) but for eps.
    Under torch.distributed the rows are shared, and every process returns the same dict:

    nats_per_token, ppl: over all scored tokens, those that the packing added included (as published); bits_per_byte: over the tokens of
    documents alone, times tokens/bytes of the split; each with its standard error (.._se); tokens, document_tokens, rows, num_mc, estimator.
    The errors are those of independent rows: stratification makes the true ones a little smaller."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = next(net.parameters()).device
    num_mc = 1 if net.config.causal else num_mc               # nothing is drawn
    for name, value in (('num_mc', num_mc), ('batch_size', batch_size), ('max_rows', len(rows) if max_rows is None else max_rows)):
        if type(value) is not int or value < 1:
            raise ValueError(f'{name}={value!r}: it must be a whole number of at least 1')
    estimator = natural_estimator(net, T) if estimator is None else estimator
    if estimator not in ('time', 'count'):
        raise ValueError(f"estimator '{estimator}' is not known: choose from time, count")
    if estimator == 'count' and natural_estimator(net, T) != 'count':
        raise ValueError(f"estimator 'count' is for subs and mlm nets without time conditioning in continuous time: this one, {net.config.objective}, takes 'time'")
    n = min(len(rows), max_rows or len(rows))
    chosen = np.arange(n) * len(rows) // n
    u = torch.rand((), generator=torch.Generator().manual_seed(key_of(seed)), dtype=torch.float64)
    sums = torch.zeros(4, n, dtype=torch.float64)         # of the losses and the numbers of tokens: all scored ones, those of documents
    for start in tqdm(range(rank * batch_size, n, world_size * batch_size), desc='rows', unit_scale=batch_size, disable=not progress or rank > 0):
        here = np.arange(start, min(start + batch_size, n))
        batch = rows[chosen[here]]
        for j in range(num_mc):
            index = torch.from_numpy(permute(here, n, seed)) + j * n
            if estimator == 'count':
                maskable = batch['maskable'].sum(dim=1)
                t = ((stratified_times(u, index, num_mc * n, eps=0) * maskable).floor().clamp(max=maskable - 1) + 1) / maskable
                at = loglinear                            # weighs by 1/t
            else:
                t = stratified_times(u, index, num_mc * n, **dict(eps=0) if T else {})
                t, at = on_grid(t, T) if T else t, schedule
            noised = corrupt_batch(batch, t, net.config, at, key_of(seed, start, j), device, exactly=estimator == 'count')
            loss = nelbo_per_token(net, noised, at, T, subs_masking).cpu()
            scored = noised['scored'].cpu()
            document = scored & batch['document']
            sums[:, here] += torch.stack([x.double().sum(dim=1) for x in (loss * scored, scored, loss * document, document)]) / num_mc
    sums = shared_sum(sums, device)
    nats, nats_se = ratio_with_error(sums[0], sums[1])
    document_nats, document_se = ratio_with_error(sums[2], sums[3])
    to_bits_per_byte = rows.counts['tokens'] / rows.counts['bytes'] / math.log(2)
    return dict(nats_per_token=nats, nats_per_token_se=nats_se, ppl=math.exp(nats), ppl_se=math.exp(nats) * nats_se,
                bits_per_byte=document_nats * to_bits_per_byte, bits_per_byte_se=document_se * to_bits_per_byte,
                tokens=int(sums[1].sum()), document_tokens=int(sums[3].sum()), rows=n, num_mc=num_mc, estimator=None if net.config.causal else estimator)


def shared_sum(sums, device):
    """The sum over all processes."""
    if not dist.is_initialized():
        return sums
    sums = sums.to(device)
    dist.all_reduce(sums)
    return sums.cpu()


def guided_log_probs(net, x, position, prompt_length, cfg_scale, schedule):
    """log p at the positions (row, col) of x (B, L), (N, V) float32, the mask excluded; guided where cfg_scale is not 0."""
    mask_id, masked = net.config.mask_id, (x == net.config.mask_id)
    sigma = schedule.conditioning_at(masked.double().mean(dim=1)).float()
    logits = net.head(net.trunk(x, sigma)[position])
    if cfg_scale:
        un = x.clone()
        un[:, :prompt_length] = mask_id
        un = net.head(net.trunk(un, sigma)[position])
        logits = un + (1 + cfg_scale) * (logits - un)
    logits[:, mask_id] = -torch.inf
    return logits.log_softmax(dim=-1)


def ids_of(net, prefix, target, cfg_scale):
    """prefix and target as tensors (P,), (T,) on the net's device. Raises ValueError where they or the net do not fit."""
    if net.config.objective not in ('subs', 'mlm', 'ar'):
        raise ValueError(f"conditional likelihoods are for subs, mlm and ar nets, not {net.config.objective}")
    if type(cfg_scale) not in (int, float) or not -1 <= cfg_scale < math.inf:
        raise ValueError(f'cfg_scale={cfg_scale!r}: it must be -1 or more, and finite')
    if cfg_scale and net.config.objective == 'ar':
        raise ValueError(f'cfg_scale={cfg_scale}: guidance masks the prompt, which a causal net does not know')
    pair = [torch.as_tensor(ids, dtype=torch.int64).to(next(net.parameters()).device) for ids in (prefix, target)]
    for name, ids in zip(('prefix', 'target'), pair):
        if ids.dim() != 1 or ids.numel() and not (0 <= ids.min() and ids.max() < net.config.vocab_size and not (ids == (-1 if net.config.mask_id is None else net.config.mask_id)).any()):
            raise ValueError(f'{name}: ids (n,) below {net.config.vocab_size}, without the mask, are needed')
    if len(pair[1]) == 0 or len(pair[0]) + len(pair[1]) > net.config.block_size:
        raise ValueError(f'prefix and target have {len(pair[0])} and {len(pair[1])} tokens: at least one target token, and at most {net.config.block_size} in all, are needed')
    return pair


@torch.no_grad()
def continuation_nll(net, prefix, target, method='chain_rule', cfg_scale=0.0, num_mc=128, padding=False, batch_size=16, seed=0, schedule=loglinear):
    """-log p(target | prefix) in nats, summed over the target; ids (P,), (T,) -> float. 'ar' nets: exactly, whatever the method.

    'chain_rule': the tokens of the target from left to right, each given those before it with all after it masked (SMDM), one row a
    token. 'monte_carlo': the bound, an average over num_mc low-discrepancy times, the prefix always seen. cfg_scale: unsupervised guidance.
    padding: masks fill up the row to the net's block_size, as in SMDM's evaluation."""
    prefix, target = ids_of(net, prefix, target, cfg_scale)
    P, n, mask_id = len(prefix), len(target), net.config.mask_id
    if method not in ('chain_rule', 'monte_carlo'):
        raise ValueError(f"method '{method}' is not known: choose from chain_rule, monte_carlo")
    for name, value in (('num_mc', num_mc), ('batch_size', batch_size)):
        if type(value) is not int or value < 1:
            raise ValueError(f'{name}={value!r}: it must be a whole number of at least 1')
    if net.config.objective == 'ar':
        if P == 0:
            raise ValueError('a causal net begins with a token: give a prefix, such as its BOS')
        x = torch.cat((prefix, target))[None]
        return net.nll(net.trunk(x[:, :-1])[0, P - 1:], target, mask_id).double().sum().item()
    row = torch.cat((prefix, target, target.new_full((net.config.block_size - P - n if padding else 0,), mask_id)))
    if method == 'chain_rule':
        hidden = torch.arange(len(row), device=row.device) >= P + torch.arange(n, device=row.device)[:, None]    # (n, L)
        scored, weight = torch.arange(len(row), device=row.device) == P + torch.arange(n, device=row.device)[:, None], torch.ones(n)
    else:
        generator = torch.Generator().manual_seed(key_of(seed))
        t = stratified_times(torch.rand((), generator=generator), torch.arange(num_mc), num_mc)
        hidden = torch.zeros(num_mc, len(row), dtype=torch.bool)
        hidden[:, P:P + n] = torch.rand(num_mc, n, generator=generator) < t[:, None]
        scored, weight = hidden.clone().to(row.device), 1 / (num_mc * t)
        hidden[:, P + n:] = True
    total = 0.0
    for i in range(0, len(hidden), batch_size):
        some = slice(i, i + batch_size)
        x = torch.where(hidden[some].to(row.device), mask_id, row)
        at = scored[some].nonzero(as_tuple=True)
        log_p = guided_log_probs(net, x, at, P, cfg_scale, schedule).gather(1, row[at[1]][:, None]).squeeze(1)
        total -= (log_p.double().cpu() * weight[some].double()[at[0].cpu()]).sum().item()
    return total


def greedy_matches(net, prefix, target, cfg_scale=0.0):
    """Does revealing the most confident position with its most probable token, one a step, give target? ids (P,), (T,) -> bool."""
    prefix, target = ids_of(net, prefix, target, cfg_scale)
    sampler = 'ar' if net.config.objective == 'ar' else 'low_confidence'
    options = dict(eos_id=-1) if sampler == 'ar' else {}
    out = generate(net, 1, len(prefix) + len(target), len(target), sampler, prompt=prefix.tolist(), cfg_scale=cfg_scale, temperature=0.0, **options)
    return torch.equal(out.tokens[0, len(prefix):], target.cpu())


# -----------------------------------------------------------------------------
# samples


@contextlib.contextmanager
def one_line(what):
    """Whatever a library raises while it loads something becomes one line."""
    try:
        yield
    except Exception as error:
        raise ValueError(f'{what} cannot be loaded ({type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ""})') from None


def load_judge(name, device='cpu'):
    """(causal language model, its tokenizer) of a Hugging Face name or folder. Raises ValueError where it is not causal."""
    import transformers
    transformers.utils.logging.disable_progress_bar()
    with one_line(f"the judge '{name}'"):
        model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(device).eval()
        tok = transformers.AutoTokenizer.from_pretrained(name)
    with torch.no_grad():
        x = torch.zeros(2, 4, dtype=torch.int64, device=device)
        x[1, 3] = 1
        logits = model(x).logits[:, 0]
    if not torch.allclose(logits[0], logits[1], atol=1e-4):
        raise ValueError(f"the judge '{name}' looks ahead: a causal language model is needed, such as gpt2-large")
    return model, tok


def entropy_of(ids):
    """Entropy in nats of the histogram of ids."""
    _, counts = np.unique(np.asarray(ids), return_counts=True)
    p = counts / counts.sum()
    return float(-(p * np.log(p)).sum())


def mean_with_error(values):
    n = len(values)
    return float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(n)) if n > 1 else math.nan


@torch.no_grad()
def generative_perplexity(texts, judge='gpt2-large', protocol='mdlm', batch_size=8, max_length=1024, device='cpu', progress=False):
    """The perplexity of texts (str) under a causal judge (a name, a folder, or (model, tokenizer)), each cut to max_length of its tokens.

    protocol 'mdlm' (as its release): a text is kept with its <|endoftext|> and closed by one if it is shorter than the longest; scored are
    the tokens from the second up to and including the first EOS, and every later one that is no EOS. 'xlm': scored are all tokens but
    the first; texts are expected as without_special leaves them, no special token in them, EOS included. A text without a scored token is skipped, and counted.
    -> dict of gen_ppl (nats pooled over tokens) and its standard error gen_ppl_se (texts being independent), gen_ppl_mean (of the texts'
    own), entropy (nats, of each text's histogram of tokens, averaged) and entropy_se, tokens, texts, skipped. Raises ValueError where
    no text is left. The result does not depend on batch_size."""
    if protocol not in ('mdlm', 'xlm'):
        raise ValueError(f"protocol '{protocol}' is not known: choose from mdlm, xlm")
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise ValueError('texts: a list of str is needed')
    model, tok = load_judge(judge, device) if isinstance(judge, str) else judge
    device, eos, texts = next(model.parameters()).device, tok.eos_token_id, list(texts)
    if protocol == 'mdlm' and eos is None:
        raise ValueError("protocol 'mdlm' closes texts with the EOS of the judge's tokenizer, which has none")
    max_length = min(max_length, getattr(model.config, 'n_positions', None) or getattr(model.config, 'max_position_embeddings', max_length))
    rows = [ids[:max_length] for ids in tok(texts, add_special_tokens=False)['input_ids']] if texts else []
    entropies = [entropy_of(ids[1:] if protocol == 'xlm' else ids) for ids in rows]
    if protocol == 'mdlm':
        longest = max(map(len, rows), default=0)
        rows = [ids + [eos] if len(ids) < longest else ids for ids in rows]
    scored = []
    for ids in rows:
        ids = np.array(ids)
        scored.append(((ids == eos).cumsum() == 1) | (ids != eos) if protocol == 'mdlm' else np.ones(len(ids), dtype=bool))
    kept = [i for i, ids in enumerate(rows) if scored[i][1:].any()]
    if not kept:
        raise ValueError(f'of {len(texts)} texts none has a token that can be scored: there is nothing to measure')
    nats, counts = torch.zeros(2, len(rows), dtype=torch.float64)
    order = sorted(kept, key=lambda i: len(rows[i]))                                           # texts of one length together
    for start in tqdm(range(0, len(order), batch_size), desc='judging', unit_scale=batch_size, disable=not progress):
        some = order[start:start + batch_size]
        width = max(len(rows[i]) for i in some)
        ids = torch.tensor([rows[i] + [0] * (width - len(rows[i])) for i in some])
        mask = torch.tensor([scored[i].tolist() + [False] * (width - len(rows[i])) for i in some])
        attended = torch.tensor([[1] * len(rows[i]) + [0] * (width - len(rows[i])) for i in some])
        logits = model(ids.to(device), attention_mask=attended.to(device)).logits[:, :-1]
        nll = torch.stack([F.cross_entropy(row.float(), target, reduction='none') for row, target in zip(logits, ids[:, 1:].to(device))]).cpu().double()
        nats[some], counts[some] = (nll * mask[:, 1:]).sum(dim=1), mask[:, 1:].double().sum(dim=1)
    nats, counts = nats[kept], counts[kept]
    mean, error = ratio_with_error(nats, counts)
    entropy, entropy_se = mean_with_error([entropies[i] for i in kept])
    return dict(gen_ppl=math.exp(mean), gen_ppl_se=math.exp(mean) * error, gen_ppl_mean=float((nats / counts).exp().mean()), entropy=entropy,
                entropy_se=entropy_se, tokens=int(counts.sum()), texts=len(kept), skipped=len(texts) - len(kept), protocol=protocol)


def without_special(text, tok=None):
    """Text without the special tokens of GPT-2, of xlm's layout, and of a tokenizer."""
    for special in ('<|endoftext|>', *GPT2_XLM, *(tok.all_special_tokens if tok else ())):
        text = text.replace(special, '')
    return text


def mauve(texts, references, featurizer='gpt2-large', max_length=256, device='cpu'):
    """MAUVE of texts against reference texts as the xlm experiment computes it: both stripped, of at least 8 characters, references
    shuffled with seed 42 and as many as texts, 256 tokens, its own seed 25 -> dict of mauve, mauve_texts, mauve_skipped."""
    kept, references = ([text.strip() for text in some if len(text.strip()) >= 8] for some in (texts, references))
    random.Random(42).shuffle(references)
    if min(len(kept), len(references)) < 2:
        raise ValueError(f'MAUVE compares two distributions: {len(kept)} texts and {len(references)} references of at least 8 characters are too few')
    if len(references) < len(kept):
        raise ValueError(f'MAUVE takes as many references as texts: there are {len(references)} for {len(kept)}')
    with one_line(f"MAUVE with the featurizer '{featurizer}'"):
        from mauve import compute_mauve
        result = compute_mauve(p_text=references[:len(kept)], q_text=kept, featurize_model_name=featurizer, max_text_length=max_length, seed=25,
                               num_buckets='auto', device_id=(torch.device(device).index or 0) if torch.device(device).type == 'cuda' else -1, verbose=False)
    return dict(mauve=float(result.mauve), mauve_texts=len(kept), mauve_skipped=len(texts) - len(kept))


def load_featurizer(name):
    """Raises ValueError where MAUVE's featurizer cannot be had."""
    import transformers
    with one_line(f"the featurizer '{name}'"):
        transformers.AutoConfig.from_pretrained(name)
        transformers.AutoTokenizer.from_pretrained(name)


def distinct(rows, n):
    """The share of different n-grams among all of rows, lists of ids; None where they are all shorter."""
    grams = [tuple(row[i:i + n]) for row in rows for i in range(len(row) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def hashes(ids, n):
    """64-bit hashes of the n-grams of ids (N,) -> uint64 (N - n + 1,), none where it is shorter."""
    ids = splitmix64(np.asarray(ids).astype(np.uint64))
    if len(ids) < n:
        return ids[:0]
    total, width, at, power = np.zeros(len(ids) - n + 1, dtype=np.uint64), 1, 0, ids           # n-grams from runs of 1, 2, 4, ... ids
    while width <= n:
        if n & width:
            total = total * np.uint64(pow(0x9E3779B97F4A7C15, width, 2 ** 64)) + power[at:at + len(total)]
            at += width
        power = power[:-width] * np.uint64(pow(0x9E3779B97F4A7C15, width, 2 ** 64)) + power[width:] if len(power) > width else power[:0]
        width *= 2
    return total


def verbatim_shares(columns, path, dtype, n=20, chunk=2 ** 22):
    """For each of columns, lists of rows of ids, the share of its n-grams that stand word for word in the bin of token ids at path
    (memorisation); None where its rows are all shorter. The bin is read once."""
    ours = [np.concatenate([hashes(row, n) for row in rows] or [np.zeros(0, dtype=np.uint64)]) for rows in columns]
    wanted, bin = np.unique(np.concatenate(ours)), np.memmap(path, dtype=dtype, mode='r')
    sieve = np.zeros(2 ** 24, dtype=bool)                                                      # most are told apart by 24 bits
    sieve[wanted >> np.uint64(40)] = True
    found = np.zeros(len(wanted), dtype=bool)
    for start in range(0, max(len(bin) - n + 1, 0) if len(wanted) else 0, chunk):
        there = hashes(bin[start:start + chunk + n - 1], n)
        there = there[sieve[there >> np.uint64(40)]]
        at = np.searchsorted(wanted, there).clip(max=len(wanted) - 1)
        found[at[wanted[at] == there]] = True
    return [float(found[np.searchsorted(wanted, grams)].mean()) if len(grams) else None for grams in ours]


def read_samples(path):
    """(texts, ids or None for each) of a .jsonl file with a "text" field."""
    texts, ids = [], []
    if not os.path.isfile(path):
        raise FileNotFoundError(f'input={path}: there is no such file')
    with open(path, encoding='utf-8') as f:
        for number, line in enumerate(f, 1):
            try:
                row = json.loads(line)
                texts.append(row['text'])
                ids.append(row.get('ids'))
                texts[-1].encode()  # a string, and whole letters in it
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ValueError(f'{path}, line {number}: not a JSON object with a "text" field that holds a string') from None
    if not texts:
        raise ValueError(f'{path} holds no text')
    return texts, ids


def draw_samples(net, folder, n, settings, **options):
    """n samples of the net by sample.generate, (texts, ids). Those already in the folder are not drawn again; under torch.distributed
    the rest is shared. Raises ValueError where the folder holds samples drawn with other settings (a dict)."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    tok = get_tokenizer(**net.tokenizer)
    os.makedirs(folder, exist_ok=True)

    def read():
        rows = {}
        for path in glob.glob(os.path.join(glob.escape(folder), '*.jsonl')):
            with open(path, encoding='utf-8') as f:
                for line in f:
                    try:
                        row = json.loads(line)
                        theirs = row['settings']
                        rows[row['row']] = row
                    except (ValueError, KeyError, TypeError):
                        raise ValueError(f'{path} holds no samples of this script: give another samples_dir') from None
                    for key in {**theirs, **settings}:
                        if theirs.get(key) != settings.get(key):
                            raise ValueError(f'{folder} holds samples drawn with {key}={theirs.get(key)!r}, not {settings.get(key)!r}: remove it, or give another samples_dir')
        return rows
    settings = json.loads(json.dumps(settings))
    done = read()
    missing = np.array([i for i in range(n) if i not in done], dtype=np.int64)
    runs = [run[i:i + options['batch_size']] for run in np.split(missing, np.flatnonzero(np.diff(missing) != 1) + 1) for i in range(0, len(run), options['batch_size'])]
    if dist.is_initialized():
        dist.barrier()                                                                         # all have read before one writes
    for run in tqdm(runs[rank::world_size], desc=f'sampling {os.path.basename(folder)}', disable=rank > 0):
        out = generate(net, len(run), first_row=int(run[0]), **options)
        path = os.path.join(folder, f'{run[0]:06}-{run[-1]:06}.jsonl')
        with open(path + '.unfinished', 'w', encoding='utf-8') as f:
            for i, ids, nfe, length in zip(run.tolist(), out.tokens.tolist(), out.nfe.tolist(), out.length.tolist()):
                f.write(json.dumps(dict(row=i, ids=ids[:length], text=tok.decode(ids[:length]), nfe=nfe, settings=settings)) + '\n')
        os.replace(path + '.unfinished', path)
    if dist.is_initialized():
        dist.barrier()
    rows = read()
    return [rows[i]['text'] for i in range(n)], [rows[i]['ids'] for i in range(n)]


def reference_texts(folder, split, tok, n, seed=42):
    """n documents of a split, spread over it (fewer where it has fewer)."""
    rows = TokenRows(folder, split, 1, 'concat')
    chosen = permute(np.arange(min(n, len(rows.offsets) - 1)), len(rows.offsets) - 1, seed)
    return [tok.decode(rows.tokens[rows.offsets[i]:rows.offsets[i + 1] - 1].tolist()) for i in chosen]


# -----------------------------------------------------------------------------
# results


def weights_hash(net):
    """The first 16 digits of the sha256 of the weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def record(path, **line):
    """Append a result, with what made it, to a .jsonl file."""
    line = json.loads(json.dumps(line), parse_constant=lambda name: None)                      # no number: null
    made_by = dict(time=datetime.datetime.now().isoformat(timespec='seconds'), torch=torch.__version__, python=platform.python_version())
    with open(path, 'a', encoding='utf-8') as f:
        f.write(json.dumps(line | made_by) + '\n')


def table(rows):
    """Markdown of a list of dicts, in the order of their keys; values with a standard error beside them (key_se) show it."""
    keys = list(dict.fromkeys(key for row in rows for key in row if not key.endswith('_se')))
    show = lambda value: '' if value is None else f'{value:,}' if type(value) is int else f'{value:.4g}' if isinstance(value, float) else str(value)
    cell = lambda row, key: show(row.get(key)) + (f' ± {row[key + "_se"]:.2g}' if row.get(key) is not None and math.isfinite(row.get(key + '_se') or math.nan) else '')
    return '\n'.join(['| ' + ' | '.join(keys) + ' |', '|' + '---|' * len(keys)] + ['| ' + ' | '.join(cell(row, key) for key in keys) + ' |' for row in rows])


def report(path):
    """results.jsonl -> results.md, and plots of quality against steps and of generative perplexity against entropy, beside it."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f'there is no {path}: every run of eval.py appends its result to it')
    stem, kinds = os.path.splitext(path)[0], collections.defaultdict(list)
    with open(path, encoding='utf-8') as f:
        for number, line in enumerate(f, 1):
            try:
                row = json.loads(line)
                kinds[row['metric']].append(dict(source=row['source']) | row['result'] | dict(seed=row['settings']['seed'], weights=row['weights']))
            except (ValueError, KeyError, TypeError):
                raise ValueError(f'{path}, line {number}: not a result of eval.py') from None
    if not kinds:
        raise ValueError(f'{path} holds no result')
    text = '\n\n'.join(f'## {kind}\n\n{table(rows)}' for kind, rows in kinds.items())
    drawn = [row for row in kinds['table'] + kinds['samples'] if row.get('gen_ppl')]
    if drawn:
        try:
            import matplotlib
        except ImportError:
            raise ValueError('the plots of a report need matplotlib: pip install matplotlib') from None
        matplotlib.use('Agg')
        from matplotlib import pyplot
        label = lambda row: ', '.join(str(row[key]) for key in ('source', 'sampler', 'top_p', 'temperature', 'judge', 'protocol') if row.get(key) is not None)
        for name, x, ys in (('steps', 'steps', ('gen_ppl', 'entropy', 'mauve')), ('entropy', 'entropy', ('gen_ppl',))):
            figure, axes = pyplot.subplots(1, len(ys), figsize=(4 * len(ys), 3.2), squeeze=False)
            for axis, y in zip(axes[0], ys):
                for source in dict.fromkeys(map(label, drawn)):
                    points = sorted({(row[x], row[y], row.get(y + '_se') or 0) for row in drawn if label(row) == source and row.get(x) and row.get(y) is not None})
                    if points:
                        axis.errorbar(*zip(*[point[:2] for point in points]), yerr=[point[2] for point in points], marker='o', capsize=2, label=source)
                axis.set(xlabel=x, ylabel=y.replace('_', ' '), xscale='log' if x == 'steps' else 'linear')
                axis.grid(alpha=0.3)
            axes[0][0].legend(fontsize=8)
            figure.tight_layout()
            figure.savefig(f'{stem}-{name}.png', dpi=150)
            pyplot.close(figure)
            text += f'\n\n![{name}]({os.path.basename(stem)}-{name}.png)'
    with open(stem + '.md', 'w', encoding='utf-8') as f:
        f.write(text + '\n')
    return text


# -----------------------------------------------------------------------------

if __name__ == '__main__':
    from configurator import configure
    constants = configure(globals())
    check_overrides(overrides)
    for key in ('sampler_options', 'published'):
        if not isinstance(globals()[key], (dict, type(None))) or not all(isinstance(name, str) for name in globals()[key] or ()):
            raise ValueError(f'{key}={globals()[key]!r}: a dict is needed')
    if set(sampler_options or ()) & {'steps', 'length', 'seed', 'sampler', 'temperature', 'top_p', 'top_k', 'batch_size', 'first_row', 'num_samples', 'schedule'}:
        raise ValueError(f'sampler_options={sampler_options}: only what belongs to one sampler; the rest are constants of their own')
    if not table_steps or not all(type(T) is int and T >= 1 for T in table_steps):
        raise ValueError(f'table_steps={table_steps}: whole numbers of at least 1 are needed')
    if metric == 'table' and not all(isinstance(values, dict) for values in (published or {}).values()):
        raise ValueError(f"published={published}: for the table a dict of dicts, such as {{'gen_ppl': {{128: 78.34}}}}")
    if T is not None and (type(T) is not int or T < 0):
        raise ValueError(f'T={T!r}: a number of steps, or 0 for continuous time')
    if not os.path.isdir(os.path.dirname(results) or '.'):
        raise ValueError(f'results={results}: there is no folder {os.path.dirname(results)}')
    if metric not in ('ppl', 'zero_shot', 'samples', 'table', 'report'):
        raise ValueError(f"metric '{metric}' is not known: choose from ppl, zero_shot, samples, table, report")
    if block_size is not None and type(block_size) is not int:
        raise ValueError(f'block_size={block_size!r}: it must be a whole number')
    if type(num_samples) is not int or num_samples < 1 or type(batch_size) is not int or batch_size < 1:
        raise ValueError(f'num_samples={num_samples}, batch_size={batch_size}: whole numbers of at least 1 are needed')
    if metric == 'report':
        print(report(results))
        raise SystemExit
    from_file = metric == 'samples' and input is not None and str(input).endswith('.jsonl')
    source = str(input if metric == 'samples' and input is not None else init_from or out_dir)
    device = pick_device(device, int(os.environ.get('LOCAL_RANK', 0)))
    if device.type == 'cpu':
        reuse_memory()
    net = tok = None
    if not from_file:
        net = load_pretrained(os.path.join(source, 'ckpt.pt') if source == out_dir else source, ema, device, **(overrides or {}))
        if tokenizer or net.tokenizer is None:
            net.tokenizer = (net.tokenizer or {}) | dict(name=str(tokenizer or 'gpt2'))
        tok = get_tokenizer(**net.tokenizer)
        own_dataset = dataset is None
        dataset = net.constants.get('dataset') if dataset is None else dataset
        T = net.constants.get('T', 0) if T is None else T
        schedule = get_schedule(net.constants.get('schedule', 'loglinear'))
        if tok.vocab_size != net.config.vocab_size and net.config.mask_id is not None:
            raise ValueError(f"tokenizer '{tok.name}' has {tok.vocab_size} ids, the net {net.config.vocab_size}: give the one it was trained with")
    elif 'RANK' in os.environ:
        raise ValueError('samples in a file are measured by one process: run it without torchrun')
    if 'RANK' in os.environ:
        if device.type == 'cuda':
            torch.cuda.set_device(device)
        dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo', device_id=device if device.type == 'cuda' else None, timeout=datetime.timedelta(hours=4))
    master, weights = int(os.environ.get('RANK', 0)) == 0, net and weights_hash(net)
    split_of = lambda folder: split or BENCHMARKS.get(read_meta(folder)['source']['dataset'], 'validation')

    def finish(name, result, **more):
        if master:
            record(results, metric=name, source=source, result=more | result, weights=weights,
                   settings={key: value for key, value in constants.items() if value is not None})

    def likelihood(name):
        """nelbo of the split of a dataset, which is named with it."""
        how = packing or net.constants.get('packing', 'wrap')
        L = (net.config.block_size if block_size is None else block_size) + (net.config.causal and how == 'concat')
        folder = find_or_prepare(name, tok.name)
        if metric == 'zero_shot' and name in DATASETS and read_meta(folder)['source']['dataset'] != name:
            raise ValueError(f"{folder} was made from {read_meta(folder)['source']['dataset']}, which is not the benchmark: remove it or give it another name")
        rows = TokenRows(folder, split_of(folder), L, how, net.constants.get('loss_on_padding', True))
        if rows.meta['tokenizer'] != tok.meta():
            raise ValueError(f"the net has ids of the tokenizer {tok.meta()}, the data those of {rows.meta['tokenizer']}: measure it on data prepared with its own")
        with autocast(device, dtype):
            return dict(dataset=name, split=split_of(folder)) | nelbo(net, rows, num_mc, batch_size, seed, max_rows, schedule, T, net.constants.get('subs_masking', False),
                                                                      estimator, progress=True)

    def folder_of_references():
        """The data that samples are compared with; None where none is named, or the net's own is not here."""
        if not dataset:
            return None
        try:
            return find_or_prepare(dataset, str(tokenizer or (tok.name if tok else 'gpt2')))
        except FileNotFoundError as error:
            if net is None or not own_dataset:
                raise
            if master:
                print(f'no MAUVE and no memorisation: {error}')

    def quality(columns):
        """All that is measured of each of columns, lists of texts -> dicts."""
        judge_tok, found = loaded_judge[1], []
        plain = [[without_special(text, judge_tok) for text in texts] for texts in columns]
        if references is not None and 'train' in reference_meta['splits']:
            ids = [[reference_tok.encode(text) for text in texts] for texts in plain]
            verbatim = verbatim_shares(ids, os.path.join(references, 'train.bin'), np.dtype(reference_meta['dtype']).newbyteorder('<'))
        for i, texts in enumerate(columns):
            result = dict(judge=judge) | generative_perplexity(plain[i] if protocol == 'xlm' else texts, loaded_judge, protocol, min(batch_size, 8), progress=True)
            result |= {f'distinct_{n}': distinct(judge_tok(plain[i], add_special_tokens=False, verbose=False)['input_ids'], n) for n in (1, 2, 3)}
            if references is not None and 'train' in reference_meta['splits']:
                result['verbatim_20'] = verbatim[i]
            if references is not None and featurizer:
                result |= mauve(plain[i], texts_of_references, featurizer, device=device)
            found.append(result)
        return found

    if metric in ('samples', 'table'):                                                         # what can fail fails before hours of sampling, not after
        drawing = None
        if not from_file:
            length = net.config.block_size if length is None else length
            drawing = dict(length=length, sampler=sampler, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
            settings = drawing | dict(sampler_options=sampler_options, dtype=dtype, weights=weights, model=dataclasses.asdict(net.config))
            drawing |= dict(batch_size=batch_size, **(sampler_options or {}))
            samples_dir = samples_dir or os.path.join(source if os.path.isdir(source) else out_dir, 'samples')
        texts = read_samples(str(input))[0] if from_file else None
        references = folder_of_references()
        loaded_judge = load_judge(judge, device) if master else None
        if master and references is not None:
            reference_meta = read_meta(references)
            reference_tok = get_tokenizer(reference_meta['tokenizer']['name'], references)
            if featurizer:
                with one_line('mauve-text'):
                    import mauve as _
                if 'gpt2' not in featurizer and 'bert' not in featurizer:
                    raise ValueError(f"featurizer='{featurizer}': mauve-text takes models with gpt2 or bert in their name, or '' for no MAUVE")
                wanted = len(texts) if from_file else num_samples
                texts_of_references = reference_texts(references, split_of(references), reference_tok, 2 * wanted + 100)
                usable = sum(len(text.strip()) >= 8 for text in texts_of_references)
                if usable < wanted or wanted < 2:
                    raise ValueError(f"MAUVE takes as many references as texts, and at least 2: {references} has {usable} of 8 characters for {wanted} texts; --featurizer= leaves it out")
                load_featurizer(featurizer)

    if metric == 'ppl':
        if dataset is None:
            raise ValueError('the source of the weights does not say what to measure them on: give --dataset=NAME')
        result = likelihood(dataset)
        if master:
            print(f"{'NLL' if net.config.causal else 'NELBO'} of {source} on {dataset}/{result['split']}, {result['rows']:,} rows x {result['num_mc']} "
                  f"{result['estimator'] or 'pass'}s, {result['tokens']:,} tokens ({result['document_tokens']:,} of documents)")
            print(f"  {result['nats_per_token']:.4f} ± {result['nats_per_token_se']:.4f} nats/token")
            print(f"  {result['ppl']:.2f} ± {result['ppl_se']:.2f} perplexity (exp of nats/token)")
            print(f"  {result['bits_per_byte']:.4f} ± {result['bits_per_byte_se']:.4f} bits/byte")
        finish('ppl', result)

    elif metric == 'zero_shot':
        rows, missing = [], []
        for name in datasets:
            try:
                result = likelihood(name)
            except (ValueError, OSError) as error:
                missing.append(f'{name}: {error}')
                continue
            finish('zero_shot', result)
            rows.append({key: result[key] for key in ('dataset', 'split', 'ppl', 'ppl_se', 'nats_per_token', 'nats_per_token_se', 'bits_per_byte', 'bits_per_byte_se', 'tokens')}
                        | dict(published=(published or {}).get(name)))
        if master and rows:
            print(table(rows))
        if missing:
            raise ValueError(f'{len(missing)} of {len(datasets)} datasets could not be measured: ' + '; '.join(missing))

    elif metric == 'samples':
        if not from_file:
            with autocast(device, dtype):
                texts, _ = draw_samples(net, os.path.join(samples_dir, f'{steps}'), num_samples, settings | dict(steps=steps), steps=steps, **drawing)
        if master:
            result, = quality([texts])
            print(table([result]))
            finish('samples', result, **{} if from_file else dict(steps=steps, sampler=sampler, top_p=top_p, temperature=temperature))

    elif metric == 'table':
        columns = []
        for T in table_steps:                                                                  # all of them before the others leave
            with autocast(device, dtype):
                columns.append(draw_samples(net, os.path.join(samples_dir, f'{T}'), num_samples, settings | dict(steps=T), steps=T, **drawing)[0])
        if master:
            rows = []
            for T, result in zip(table_steps, quality(columns)):
                finish('table', result, steps=T, sampler=sampler, top_p=top_p, temperature=temperature)
                shown = ('gen_ppl', 'gen_ppl_se', 'gen_ppl_mean', 'entropy', 'entropy_se', 'mauve', 'mauve_texts', 'distinct_2', 'verbatim_20', 'texts', 'skipped')
                rows.append(dict(steps=T) | {key: result[key] for key in shown if key in result} | {f'{key} published': values.get(T) for key, values in (published or {}).items()})
            print(table(rows))

    if dist.is_initialized():
        dist.destroy_process_group()
