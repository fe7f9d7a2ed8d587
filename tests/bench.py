"""
How fast, measured against the dense textbook of tests/reference.py and a large matrix product:

    python tests/bench.py                       every table, 20 minutes on 2 cores
    python tests/bench.py --device=cuda         the same on a GPU
    python tests/bench.py --device=cuda --minutes=9    what a GPU is for, with pass or fail
    python tests/bench.py --compare=FILE        and what changed since FILE, an earlier bench.jsonl
    python tests/bench.py --part=train --n_layer=12 --n_head=12 --n_embd=768 --batch_size=2
    python tests/bench.py --part=optimizers     AdamW and Muon on the quickstart, 5 minutes
    python tests/bench.py --part=memory         what train.py says it needs, its peak, textbook's
    python tests/bench.py --part=mamba --dtype=float32 --repeats=1    DiMamba beside attention
    python tests/bench.py --part=block --block_size=1024    block diffusion with its cache
    python tests/bench.py --part=nelbo --out_dir=out-quickstart   estimators over seeds
    python tests/bench.py --part=race --race_seeds='(0,)'          tokens until a loss, see RECIPES

Prints one table a part and appends each row to `out`. In a row, whole numbers and words say what
was measured; the other numbers are what was found. "of matmul" is the share of the FLOP/s of a
large matrix product in the same process and format. Only products that are performed are counted:
the projection at masked positions. The versions we compare with have torch's own attention and
dropout, our network otherwise, and keep freed memory as we do (model.reuse_memory) unless a row
says otherwise. Peak memory is the process's (CPU) or the allocator's (CUDA).
"""

import contextlib
import ctypes
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import types
from collections import Counter
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(1, os.path.dirname(os.path.abspath(__file__)))

import data
import model
import pretended
import reference
from configurator import configure
from eval import nelbo as measured_nelbo
from model import (
    SIZES, DiT, ModelConfig, autocast, corrupt, load_pretrained, loglinear, per_token_loss,
    pick_device, require_known, reuse_memory
)
from sample import generate

part = None  # which table: see PARTS below; None: all but nelbo, optimizers, memory, mamba, block
device = 'cpu'  # 'cpu', 'cuda'
dtype = None  # [float32 | bfloat16] None: both (cost: bfloat16)
n_layer = None  # [int >= 1] the shape of the net; None: 4 (mamba: 14)
n_head = None  # [int >= 1] None: 4 (mamba: 8)
n_embd = None  # [int >= 1] None: 256 (mamba: 512)
cond_dim = 128  # width of the adaLN conditioning
dropout = 0.1  # on the residual branches
vocab_size = 50258  # ids, the mask included
block_size = 256  # [>= 1] tokens a row; mamba: of the shortest, the longest has 32 times as many
batch_size = None  # [int >= 1] rows; None: 8, of part sample 4
repeats = 5  # [>= 1] training steps that are timed, after two that are not; the median counts
steps = 512  # [>= 1] of the sampler
first = 0  # (sample) time only this many network evaluations of the first row; 0: all
dense_steps = 6  # [>= 1] (sample) steps timed of the dense sampler; all steps cost the same
compile = False  # compile the trunk (train, sample)
megabytes = 200  # [>= 1] of text (data)
tokenizer = 'gpt2'  # (data, loop, checkpoint, processes)
out_dir = 'out-quickstart'  # a trained net (nelbo)
seeds = 16  # [>= 1] (nelbo)
recipes = 'mdlm 1e-3,fast 1/8'  # (race) names in RECIPES with commas between them
recipe = None  # [dict] (race) constants of train.py, one recipe in place of those
texts = 'stdlib,wikitext2'  # (race) names in TEXTS
race_seeds = (0, 1, 2)  # [tuple] (race)
race_dir = 'out-race'  # (race) what is found here is not run again
out = 'bench.jsonl'  # rows are appended to it
minutes = None  # [number > 0] measure the goals in so many: one table, with pass or fail
compare = None  # an earlier one: print what changed since
constants = configure(globals())
if batch_size is None:
    batch_size = 4 if part == 'sample' else 8
usual = (14, 8, 512) if part == 'mamba' else (4, 4, 256)  # the published DiMamba
n_layer, n_head, n_embd = (
    value or default for value, default in zip((n_layer, n_head, n_embd), usual, strict=True)
)
constants |= dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd)
device = pick_device(device)
root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if device.type == 'cpu' and part != 'train':
    reuse_memory()


def synchronize():
    if device.type == 'cuda':
        torch.cuda.synchronize()


def timed(function):
    """(seconds, result)."""
    synchronize()
    start = time.perf_counter()
    result = function()
    synchronize()
    return time.perf_counter() - start, result


def seconds(function):
    return timed(function)[0]


def median(function, n=5):
    """Seconds a call, the median of n calls after two."""
    function()
    function()
    return sorted(seconds(function) for _ in range(n))[n // 2]


def reset_peak():
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats()
    elif os.path.exists('/proc/self/clear_refs'):
        with contextlib.suppress(AttributeError):  # not glibc
            ctypes.CDLL(None).malloc_trim(0)  # what earlier rows have freed is not of this one
        with open('/proc/self/clear_refs', 'w') as f:
            f.write('5')  # Linux: forget the peak of the resident memory


def peak_gigabytes():
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated() / 1e9
    if os.path.exists('/proc/self/status'):
        with open('/proc/self/status') as f:
            return next(int(line.split()[1]) for line in f if line.startswith('VmHWM')) / 1e6
    import resource

    unit = 1e9 if sys.platform == 'darwin' else 1e6  # bytes, elsewhere kB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def matmul_rate(precision):
    """FLOP/s of a large matrix product."""
    n = 8192 if device.type == 'cuda' else 2048
    a, b = (torch.randn(n, n, device=device).to(getattr(torch, precision)) for _ in range(2))
    a @ b
    return 2 * n**3 / min(seconds(lambda: a @ b) for _ in range(5))


def new_net(**shape):
    torch.manual_seed(0)
    shape = (
        dict(
            block_size=block_size, vocab_size=vocab_size, n_layer=n_layer, n_head=n_head,
            n_embd=n_embd, cond_dim=cond_dim, dropout=dropout
        )
        | shape
    )
    net = DiT(ModelConfig(**dict(mask_id=shape['vocab_size'] - 1) | shape)).to(device)
    with torch.no_grad():
        for p in net.parameters():  # adaLN-zero would switch the blocks off
            p.add_(torch.randn_like(p) * 0.02)
    return net


@contextlib.contextmanager
def torch_only():
    """With torch's own attention and dropout."""
    ours = model.attention, model.dropout

    def attention(q, k, v, attn_mask=None, p=0.0, is_causal=False):
        return F.scaled_dot_product_attention(q, k, v, attn_mask, p, is_causal)

    model.attention = attention
    model.dropout = F.dropout
    yield
    model.attention, model.dropout = ours


# -----------------------------------------------------------------------------
# training


class Training:
    """A net, its average and AdamW; step() is one step of train.py on a batch that is ready."""

    def __init__(self, loss_function=per_token_loss, rows=None, **shape):
        self.loss_function, self.rows = loss_function, rows or batch_size
        self.net = net = new_net(**shape).train()
        if compile:
            net.trunk = torch.compile(net.trunk)
        self.parameters = list(net.parameters())
        self.ema = [p.detach().clone() for p in net.parameters()]
        self.optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
        self.x0 = torch.randint(net.config.mask_id, (self.rows, net.config.block_size)).to(device)
        self.t = ((torch.arange(self.rows) + 0.5) / self.rows).to(device)
        self.xt = corrupt(
            self.x0, self.t, net.config.mask_id, loglinear, torch.Generator().manual_seed(0)
        )
        self.masked = (self.xt == net.config.mask_id).flatten().nonzero().squeeze(1)
        self.options = dict(masked=self.masked) if loss_function is per_token_loss else {}
        self.dense = loss_function not in (per_token_loss, prototype)

    def use_muon(self):
        """For the matrices of the blocks, as train.py."""
        matrices = [p for p in self.net.blocks.parameters() if p.dim() == 2]
        rest = [p for p in self.parameters if all(p is not q for q in matrices)]
        muon = torch.optim.Muon(matrices, lr=1e-4, adjust_lr_fn='match_rms_adamw')
        adamw = torch.optim.AdamW(rest, lr=1e-4, fused=True)
        self.optimizer = types.SimpleNamespace(
            step=lambda: (adamw.step(), muon.step()), zero_grad=self.net.zero_grad
        )

    def backward(self, precision):
        with autocast(device, precision):
            self.loss_function(self.net, self.x0, self.xt, self.t, **self.options).mean().backward()

    def step(self, precision):
        self.backward(precision)
        self.update()

    def update(self):
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if norm > 1:
            torch._foreach_mul_(gradients, 1 / norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(self.ema, self.parameters, 1e-4)

    def flops(self):
        projected = self.x0.numel() if self.dense else len(self.masked)
        return self.net.train_flops(self.rows, self.net.config.block_size, projected)


def prototype(net, x0, xt, t):
    """The NELBO in plain PyTorch, with one idea: project masked positions alone."""
    masked = xt == net.config.mask_id
    mask_id = torch.tensor(net.config.mask_id, device=device)
    logits = net.head(net.trunk(xt)[masked]).index_fill(1, mask_id, -torch.inf)
    nll = F.cross_entropy(logits, x0[masked], reduction='none')
    return torch.zeros(x0.shape, device=device).masked_scatter(masked, nll) / t[:, None]


def textbook(net, x0, xt, t):
    return reference.subs_nelbo(net, x0, xt, t, loglinear)


def train():
    """The textbook is dense; the prototype projects masked positions alone; both have torch's own
    attention and dropout. The last row gives freed memory back."""

    def measured(name, loss_function, precision, rate):
        reset_peak()
        with contextlib.nullcontext() if loss_function is per_token_loss else torch_only():
            training = Training(loss_function)
            time_ = median(partial(training.step, precision), repeats)
        return dict(
            name=name,
            dtype=precision,
            tokens_per_s=training.x0.numel() / time_,
            of_matmul=training.flops() / time_ / rate,
            peak_gb=peak_gigabytes(),
        )

    given_back = {}
    for precision in formats:  # before reuse_memory, which cannot be undone
        given_back[precision] = measured(
            'prototype, memory given back', prototype, precision, matmul_rate(precision)
        )
    if device.type == 'cpu':
        reuse_memory()
    for precision in formats:
        rate = matmul_rate(precision)
        found = [
            measured('nanoMDM', per_token_loss, precision, rate),
            measured('textbook', textbook, precision, rate),
            measured('prototype', prototype, precision, rate),
            given_back[precision],
        ]
        for row in found:
            yield row | dict(
                times_textbook=row['tokens_per_s'] / found[1]['tokens_per_s'],
                matmul_gflops=rate / 1e9,
            )


def packing():
    """Training on rows of several documents, against rows of one and padding that is neither masked
    nor looked at, or a token like any other (xlm). Lengths are log-normal, of median 0.625 L and
    sigma 1.06, those of at most L: OpenWebText's at L = 1,024. Useful are tokens of documents."""
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(np.log(0.625 * block_size), 1.06, 4096)).astype(int) + 1
    lengths = lengths[lengths <= block_size]
    with tempfile.TemporaryDirectory() as folder:
        ids = rng.integers(0, vocab_size - 1, lengths.sum()).astype('<u4')
        ids.tofile(f'{folder}/train.bin')
        np.append(0, lengths.cumsum()).astype('<i8').tofile(f'{folder}/train.idx')
        tok = dict(eos_id=0, bos_id=0, pad_id=0, mask_id=vocab_size - 1)
        tok |= dict(name='random', vocab_size=vocab_size)
        counts = dict(documents=len(lengths), tokens=len(ids), bytes=len(ids))
        with open(f'{folder}/meta.json', 'w') as f:
            json.dump(
                dict(
                    command='', source=dict(dataset='random'), dtype='uint32',
                    tokenizer=tok, splits=dict(train=counts)
                ), f
            )
        kinds = (('documents', True), ('pad', False), ('pad', True))
        sources = [data.TokenRows(folder, 'train', block_size, *kind) for kind in kinds]
        nets = [new_net().train() for _ in kinds]
        optimizers = [torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True) for net in nets]
        t = (torch.arange(batch_size) + 0.5) / batch_size

        def train_step(net, optimizer, batch, precision):
            with autocast(device, precision):
                loss = per_token_loss(
                    net, batch['x0'], batch['xt'], batch['t'], masked=batch['masked'],
                    attention_mask=batch['attention_mask']
                )
            (loss * batch['scored']).mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        for precision in formats:
            times, useful = [[] for _ in kinds], [0] * len(kinds)
            for step in range(2 + repeats):  # in turn: the machine may have other work
                for i, (net, optimizer) in enumerate(zip(nets, optimizers, strict=True)):
                    clean = sources[i][np.arange(step * batch_size, (step + 1) * batch_size)]
                    batch = model.corrupt_batch(clean, t, net.config, loglinear, step, device)
                    elapsed = seconds(partial(train_step, net, optimizer, batch, precision))
                    if step >= 2:
                        times[i].append(elapsed)
                        useful[i] += int(clean['document'].sum()) / repeats
            rates = [n / sorted(x)[repeats // 2] for n, x in zip(useful, times, strict=True)]
            for i, (kind, on_padding) in enumerate(kinds):
                yield dict(
                    name=kind,
                    dtype=precision,
                    loss_on_padding=str(on_padding and kind == 'pad'),
                    filled=float(lengths.sum() / block_size / len(sources[i])),
                    useful_tokens_per_s=rates[i],
                    times_padded=rates[i] / rates[1],
                )


def projection():
    """Vocabulary projection and cross entropy of half of the positions, against the dense form."""
    for precision in formats:
        rate = matmul_rate(precision)
        net = new_net(n_layer=1)
        N = batch_size * block_size // 2
        h = torch.randn(N, n_embd, device=device, requires_grad=True)
        target = torch.randint(vocab_size - 1, (N,), device=device)

        def dense_nll(h, target, net=net):
            return F.cross_entropy(net.head(h), target, reduction='none')

        for name, nll in (('nanoMDM', net.nll), ('textbook', dense_nll)):
            backward_times = []

            def forward_backward(
                nll=nll, h=h, target=target, precision=precision, net=net, times=backward_times
            ):
                with autocast(device, precision):
                    loss = nll(h, target).sum()
                times.append(seconds(loss.backward))
                net.zero_grad()

            total = median(forward_backward)
            backward = sorted(backward_times[2:])[2]
            yield dict(
                name=name,
                dtype=precision,
                positions=N,
                forward_ms=(total - backward) * 1e3,
                backward_ms=backward * 1e3,
                of_matmul=6 * N * n_embd * vocab_size / total / rate,
            )


def attentions():
    """The ways to one layer's attention, forward and backward."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    ways = {'nanoMDM': model.attention, 'torch': F.scaled_dot_product_attention}
    shapes = ((8, 4, 256, 64), (2, 12, 1024, 64))
    if device.type == 'cuda':
        shapes = ((32, 12, 1024, 64), (4, 16, 4096, 128))
        for name in ('FLASH_ATTENTION', 'CUDNN_ATTENTION', 'EFFICIENT_ATTENTION'):
            kernel = sdpa_kernel(getattr(SDPBackend, name))
            ways[f'torch, {name.lower()}'] = kernel(F.scaled_dot_product_attention)

    def forward_backward(way, qkv, grad):
        return torch.autograd.grad(way(*qkv), qkv, grad)

    for precision in formats:
        rate = matmul_rate(precision)
        for B, H, L, D in shapes:
            q, k, v, grad = torch.randn(
                4, B, H, L, D, device=device, dtype=getattr(torch, precision)
            ).requires_grad_()
            for name, way in ways.items():
                try:
                    forward = median(partial(way, q.detach(), k.detach(), v.detach()))
                    total = median(partial(forward_backward, way, (q, k, v), grad))
                except RuntimeError as error:  # a backend that does not take this format
                    print(f'{name}, {precision}: {str(error).splitlines()[0]}')
                    continue
                yield dict(
                    name=name,
                    dtype=precision,
                    rows=B,
                    heads=H,
                    tokens=L,
                    width=D,
                    forward_ms=forward * 1e3,
                    forward_backward_ms=total * 1e3,
                    of_matmul=12 * B * H * L * L * D / total / rate,
                )


def mamba():
    """Steps of DiMamba's net and of the attention net of the same size, in turns, over longer and
    longer rows: two, and one of the longest, for memory, which leaves a core idle in the scan.
    times_first: time per token, of that in the shortest rows. step_gb: what a step needs beyond the
    weights, their average and AdamW's state."""
    for precision in formats:
        first = {}
        for length in (block_size * 2**k for k in range(6)):
            shape = dict(rows=2 if length < 32 * block_size else 1, block_size=length)
            published = dict(mixer='mamba', norm='rmsnorm', head_bias=False)
            nets = dict(attention=Training(**shape), mamba=Training(**shape, **published))
            times = {name: [] for name in nets}
            peaks = {}
            for name, training in nets.items():
                for p in training.parameters:
                    p.grad = torch.zeros_like(p)
                training.update()  # makes AdamW's state
                reset_peak()
                before = peak_gigabytes()
                training.step(precision)
                peaks[name] = peak_gigabytes() - before
            for _ in range(repeats):
                for name, training in nets.items():
                    times[name].append(seconds(partial(training.step, precision)))
            rates = {
                name: training.x0.numel() / sorted(times[name])[repeats // 2]
                for name, training in nets.items()
            }
            first = first or rates
            for name, training in nets.items():
                yield dict(
                    name=name,
                    dtype=precision,
                    rows=training.rows,
                    tokens=length,
                    tokens_per_s=rates[name],
                    times_attention=rates[name] / rates['attention'],
                    times_first=first[name] / rates[name],
                    step_gb=peaks[name],
                )
            del nets, training


def cost():
    """How the time of a training step grows, and a model of it fitted to these rows: a cost for a
    FLOP of products, a FLOP of attention, an element of the activations, a logit, a parameter."""
    precision = formats[-1]
    rows = []
    terms = []
    base = dict(block_size=256, vocab_size=50258, n_layer=4, n_head=4, n_embd=256)
    shapes = [
        (16, {}),
        *((4096 // L, dict(block_size=L)) for L in (512, 1024, 2048, 4096)),
        *((16, dict(vocab_size=V)) for V in (256, 4096, 32_000, 128_000)),
        *((16, dict(n_layer=n)) for n in (2, 8, 16)),
        (16, dict(n_embd=128, n_head=2)),
        (16, dict(n_embd=512, n_head=8)),
        *((B, {}) for B in (1, 4, 64)),
    ]
    for B, shape in shapes:
        training = Training(rows=B, **base | shape)
        time_ = median(partial(training.step, precision), 3)
        c = training.net.config
        P = training.net.num_params()
        tokens, flops = training.x0.numel(), training.flops()
        attention = 12 * tokens * c.n_layer * c.block_size * c.n_embd
        terms.append(
            [
                (flops - attention) / 1e9,
                attention / 1e9,
                tokens * c.n_layer * c.n_embd / 1e6,
                len(training.masked) * c.vocab_size / 1e6,
                P / 1e6,
            ]
        )
        rows.append(
            dict(
                dtype=precision,
                rows=B,
                tokens=c.block_size,
                vocabulary=c.vocab_size,
                layers=c.n_layer,
                width=c.n_embd,
                millions=round(P / 1e6),
                gflops=flops / 1e9,
                ms=time_ * 1e3,
                tokens_per_s=tokens / time_,
            )
        )
        del training
    terms = torch.tensor(terms, dtype=torch.float64)
    measured = torch.tensor([row['ms'] for row in rows], dtype=torch.float64)
    # the least relative errors
    factors = torch.linalg.lstsq(
        terms / measured[:, None], torch.ones(len(rows), 1, dtype=torch.float64)
    ).solution
    names = (
        'GFLOPs of products', 'GFLOPs of attention', 'million tokens x layers x width',
        'million masked tokens x vocabulary', 'million parameters'
    )
    fitted = zip(factors.flatten().tolist(), names, strict=True)
    print('ms = ' + ' + '.join(f'{factor:.3g} x {name}' for factor, name in fitted))
    for row, predicted in zip(rows, (terms @ factors).flatten().tolist(), strict=True):
        yield row | dict(model_ms=predicted, model_to_measured=predicted / row['ms'])


# -----------------------------------------------------------------------------
# whole runs of train.py


@contextlib.contextmanager
def corpus():
    """A folder on this disk with tokenized text and a function that runs train.py there."""
    shape = [
        f'--{key}={constants[key]}'
        for key in ('tokenizer', 'n_layer', 'n_head', 'n_embd', 'cond_dim', 'dropout', 'device')
    ]
    with tempfile.TemporaryDirectory(dir='.') as folder:
        with open(os.path.join(folder, 'corpus.txt'), 'w') as f:
            f.write('\n\n'.join(document for _, document, _, _ in data.read_stdlib()))

        def run(script, *options, processes=0, **environment):
            launcher = []
            if processes:
                launcher = [
                    '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}'
                ]
            done = subprocess.run(
                [sys.executable, *launcher, os.path.join(root, script), *options],
                cwd=folder,
                capture_output=True,
                text=True,
                env=os.environ | environment,
            )
            assert done.returncode == 0, done.stdout + done.stderr
            return done.stdout

        def run_train(*options, **how):
            shutil.rmtree(os.path.join(folder, 'out'), ignore_errors=True)
            stdout = run(
                'train.py', '--dataset=corpus', *shape, '--sample_at_end=False', '--eval_iters=1',
                '--out_dir=out', *options, **how
            )
            with open(os.path.join(folder, 'out', 'metrics.jsonl')) as f:
                rates = sorted(
                    row['tokens_per_s']
                    for row in map(json.loads, f)
                    if 'tokens_per_s' in row and row['iter'] > 2
                )
            return stdout, rates[len(rates) // 2]

        run('data.py', '--dataset=text:corpus.txt', '--name=corpus', f'--tokenizer={tokenizer}')
        yield run_train


def loop():
    """The whole loop of train.py, and how much of its time it waits for batches."""
    with corpus() as run_train:
        for precision in formats:
            stdout, rate = run_train(
                f'--dtype={precision}', f'--batch_size={batch_size}',
                f'--global_batch_size={batch_size}', f'--block_size={block_size}', '--max_iters=30',
                '--log_interval=3'
            )
            waited = float(re.search(r'waited for its batches ([\d.]+)%', stdout).group(1))
            yield dict(name='train.py', dtype=precision, tokens_per_s=rate, waited_percent=waited)


def processes():
    """Several processes of this machine (gloo, or nccl on GPUs) on one global batch."""
    available = torch.cuda.device_count() if device.type == 'cuda' else os.cpu_count()
    counts = [n for n in (1, 2, 4, 8) if n <= available]
    rates = []
    with corpus() as run_train:
        for n in counts:
            threads = {}
            if device.type == 'cpu':
                threads = dict(OMP_NUM_THREADS=str(os.cpu_count() // n))
            _, rate = run_train(
                f'--batch_size={batch_size}', f'--global_batch_size={batch_size * counts[-1]}',
                f'--block_size={block_size}', '--max_iters=12', '--log_interval=2', processes=n,
                **threads
            )
            rates.append(rate)
            yield dict(
                name='gloo' if device.type == 'cpu' else 'nccl',
                processes=n,
                parameters=new_net().num_params(),
                tokens_per_s=rate,
                times_one=rate / rates[0],
            )


def estimate():
    """On paper: MDLM's 170M (rows of 1,024), SMDM's 1028M and 2121M (rows of 2,048) on 8 and 64
    H100s, 524,288 tokens a step at 50% of 989 TFLOP/s, in `micro` micro-batches a GPU. DDP: each
    GPU sends and receives 2 (n-1)/n times the float32 gradients, once a step (no_sync), beside the
    last micro-batch's backward pass, two thirds of its products, except for the last bucket, the
    embedding's gradient. FSDP: every micro-batch gathers the float32 weights twice, forward and
    backward, and scatters the gradients, (n-1)/n each; it runs beside the products but for the
    first gather and the last scatter of a block. 360 GB/s between the GPUs of a node and 45 GB/s a
    GPU between nodes (of 450 and 50). state_gb: weights, gradients, average, AdamW's on a GPU."""
    llama = dict(
        block_size=2048, vocab_size=32001, mask_id=32000, cond_dim=0, norm='rmsnorm', mlp='swiglu',
        mlp_bias=False, head_bias=False, head_mask=False
    )
    nets = {
        'MDLM 170M': dict(n_layer=12, n_head=12, n_embd=768),
        'SMDM 1028M': SIZES['1028M'] | llama,
        'SMDM 2121M': SIZES['2121M'] | llama,
    }
    for name, shape in nets.items():
        with torch.device('meta'):
            net = DiT(ModelConfig(**shape))
        P, wte = net.num_params(), net.wte.weight.numel()
        block = sum(p.numel() for p in net.blocks[0].parameters())
        L = net.config.block_size
        for n, micro in ((8, 1), (8, 4), (64, 1), (64, 2)):
            rate = 360e9 if n == 8 else 45e9
            compute = net.train_flops(2**19 // L, L, 2**18) / n / (0.5 * 989e12)
            for way in ('ddp', 'fsdp'):
                if way == 'ddp':
                    wire = 2 * 4 * P * (n - 1) / n / rate
                    hidden = compute / micro * 2 / 3
                    alone = wire * wte / P
                else:
                    wire = micro * 3 * 4 * P * (n - 1) / n / rate
                    hidden = compute
                    alone = 2 * 4 * block * (n - 1) / n / rate
                exposed = alone + max(0, wire - alone - hidden)
                yield dict(
                    name=name,
                    way=way,
                    gpus=n,
                    micro=micro,
                    parameters=P,
                    state_gb=20 * P / 1e9 / (n if way == 'fsdp' else 1),
                    compute_ms=compute * 1e3,
                    sent_gb=wire * rate / 1e9,
                    wire_ms=wire * 1e3,
                    exposed_ms=exposed * 1e3,
                    tokens_per_s=2**19 / (compute + exposed),
                    of_linear=compute / (compute + exposed),
                )


def optimizers():
    """The quickstart with AdamW and with Muon: bits/byte of the averaged weights at its end, and
    the first evaluated step that is no worse than AdamW's last."""
    last = None
    with tempfile.TemporaryDirectory(dir='.') as folder:
        for name, learning_rate in (('adamw', '1e-3'), ('muon', '6e-3')):
            shutil.rmtree(os.path.join(folder, 'out'), ignore_errors=True)
            done = subprocess.run(
                [
                    sys.executable,
                    os.path.join(root, 'train.py'),
                    os.path.join(root, 'config', 'quickstart.py'),
                    f'--optimizer={name}',
                    f'--learning_rate={learning_rate}',
                    '--ar_share=0',  # every evaluation is of a diffusion net
                    '--eval_interval=30',
                    '--ckpt_interval=1000',
                    '--sample_at_end=False',
                    f'--device={device}',
                    '--out_dir=out',
                ],
                cwd=folder,
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stdout + done.stderr
            with open(os.path.join(folder, 'out', 'metrics.jsonl')) as f:
                found = [
                    (row['iter'], row['val_bpb']) for row in map(json.loads, f) if 'val_bpb' in row
                ]
            last = found[-1][1] if last is None else last
            reached = [step for step, bpb in found if bpb <= last]
            yield dict(
                name=name,
                learning_rate=learning_rate,
                last_step=found[-1][0],
                val_bpb=found[-1][1],
                steps_to_adamw=float(min(reached, default='nan')),
            )


# name -> constants of train.py, whose defaults are MDLM's. The line to beat is 1,000 steps of 32
# rows at the best learning rate of its grid, 'mdlm 1e-3'
RECIPES = {}
for rate in ('2.5e-4', '5e-4', '1e-3', '2e-3', '4e-3'):
    RECIPES[f'mdlm {rate}'] = dict(learning_rate=float(rate))
    RECIPES[f'ar {rate}'] = dict(
        learning_rate=float(rate), objective='ar', causal=True, cond_dim=0)
FAST = dict(
    objective='mlm', optimizer='muon', learning_rate=6e-3, lr_schedule='linear', warmup_iters=20,
    momentum=0.9, beta2=0.99, ema=0.99, t_range=(1e-3, 0.7), ar_share=0.3, cond_dim=0, dropout=0.0,
    mlp='relu', qkv_bias=True, unigram_bias=True, tied=True, embed_norm=True, global_batch_size=16
)
for share in (1, 2, 4, 8, 12, 16):  # of the line's tokens
    RECIPES[f'fast 1/{share}'] = FAST | dict(max_iters=2000 // share)
TEXTS = dict(stdlib='bpe-4096', wikitext2='gpt2')  # with their tokenizers
RACE = dict(
    n_layer=4, n_head=3, n_embd=192, packing='concat', block_size=128, batch_size=16,
    global_batch_size=32, max_iters=1000, warmup_iters=50, dtype='bfloat16'
)


def raced(text, recipe, seed):
    """One run of train.py, or what is known of it: {'nats': of averaged weights on the validation
    split, 'tokens': , 'seconds': of CPU time, the start included}."""
    given = RACE | recipe
    given['eval_interval'] = given['ckpt_interval'] = given['max_iters']
    run = json.dumps([text, given, seed], sort_keys=True)
    folder = os.path.join(race_dir, hashlib.sha256(run.encode()).hexdigest()[:12])
    path = f'{folder}.json'
    if os.path.exists(path):
        with open(path) as f:
            return json.load(f)
    prepared = data.find_or_prepare(text, TEXTS[text])
    before = sum(os.times()[2:4])
    done = subprocess.run(
        [
            sys.executable, os.path.join(root, 'train.py'), f'--dataset={text}',
            f'--tokenizer={TEXTS[text]}',
            *(f'--{key}={value}' for key, value in given.items()), f'--seed={seed}',
            f'--out_dir={folder}', '--overwrite=True', '--eval_iters=1', '--sample_at_end=False',
            f'--device={device}'
        ],
        capture_output=True, text=True)
    ended = f"step {given['max_iters']}: validation" in done.stdout  # no signal stopped it
    assert done.returncode == 0 and ended, done.stdout + done.stderr
    seconds = sum(os.times()[2:4]) - before
    net = load_pretrained(os.path.join(folder, 'ckpt.pt'), device=device)
    rows = data.TokenRows(prepared, 'validation', given['block_size'] + net.config.causal, 'concat')
    with autocast(device, 'bfloat16'):
        found = measured_nelbo(net, rows, num_mc=8, batch_size=32)
    found = dict(nats=found['nats_per_token'], bits_per_byte=found['bits_per_byte'],
                 run=run, seconds=seconds,
                 tokens=given['max_iters'] * given['global_batch_size'] * given['block_size'])
    shutil.rmtree(folder)
    with open(path, 'w') as f:
        json.dump(found, f)
    return found


def race():
    """Recipes on one net and two texts: the NELBO (`count`, 8 draws a row) of averaged weights
    after the last step on all of the validation split, median and range over seeds; CPU seconds."""
    for name in recipes.split(','):
        require_known('recipe ', name, RECIPES)
    chosen = {name: RECIPES[name] for name in recipes.split(',')}
    if recipe is not None:
        chosen = {str(recipe): recipe}
    for text in texts.split(','):
        for name, given in chosen.items():
            found = [raced(text, given, seed) for seed in race_seeds]
            nats = sorted(run['nats'] for run in found)
            yield dict(
                name=name, text=text, runs=len(nats), tokens=found[0]['tokens'],
                seconds=sorted(run['seconds'] for run in found)[len(nats) // 2],
                nats=nats[len(nats) // 2], low=nats[0], high=nats[-1],
                bits_per_byte=sorted(run['bits_per_byte'] for run in found)[len(nats) // 2])


def checkpoint():
    with corpus() as run_train:
        stdout, _ = run_train(
            '--block_size=64', '--batch_size=1', '--global_batch_size=1', '--max_iters=60',
            '--ckpt_interval=20'
        )
    for step, gigabytes, took, waited in re.findall(
        r'step (\d+): .* written, ([\d.]+) GB in ([\d.]+) s, ([\d.]+) s of which', stdout
    ):
        yield dict(
            name='checkpoint', step=int(step), gb=float(gigabytes), written_s=float(took),
            waited_s=float(waited)
        )


# -----------------------------------------------------------------------------
# sampling


class Enough(Exception):
    """Raised by on_change to end generate() early."""


def sample():
    """Against the dense sampler, which evaluates and draws every position at every step."""
    net = new_net().eval()
    baseline = None
    for precision in formats:
        rate = matmul_rate(precision)
        events = []  # (last step that changed the first row or -1, positions that changed)

        def stop_after_first(rows, cols, ids, confidence, now, events=events):
            of_first = now[rows == 0]
            events.append((of_first.max().item() if len(of_first) else -1, len(rows)))
            if sum(step >= 0 for step, _ in events) == first:
                raise Enough

        def sampled(on_change=stop_after_first):
            with contextlib.suppress(Enough):
                return generate(
                    net,
                    batch_size,
                    block_size,
                    steps,
                    on_change=on_change if first else None,
                    compile=compile,
                )

        with torch.no_grad(), autocast(device, precision):
            generate(net, batch_size, block_size, 2, compile=compile)
            reset_peak()
            ours, result = timed(sampled)
            ours_peak = peak_gigabytes()
            if first:
                covered = max(step for step, _ in events) + 1  # of the grid
                evaluations = batch_size * first
                projected = sum(n for _, n in events[1:])
            else:
                covered = steps
                evaluations = result.nfe.sum().item()
                projected = batch_size * block_size
            reset_peak()
            with torch_only():
                dense_step = (
                    seconds(
                        partial(
                            reference.ancestral, net, batch_size, block_size, steps, loglinear,
                            only_steps=dense_steps, dtype=torch.float32
                        )
                    )
                    / dense_steps
                )
            dense_peak = peak_gigabytes()
        dense = dense_step * covered
        baseline = baseline or dense_step
        dense_evaluations = batch_size * covered
        for name, time_, n, heads, peak in (
            ('nanoMDM', ours, evaluations, projected, ours_peak),
            ('textbook', dense, dense_evaluations, dense_evaluations * block_size, dense_peak),
        ):
            yield dict(
                name=name,
                dtype=precision,
                steps=covered,
                s_per_sample=time_ / batch_size,
                nfe=n / batch_size,
                of_matmul=net.train_flops(n, block_size, heads) / 3 / time_ / rate,
                peak_gb=peak,
                times_textbook=dense / time_,
                times_textbook_float32=baseline * covered / time_,
            )


def batch():
    """Samples one by one, and as one batch."""
    net = new_net().eval()

    def one_by_one():
        for i in range(batch_size):
            generate(net, 1, block_size, steps, first_row=i)

    for precision in formats:
        with torch.no_grad(), autocast(device, precision):
            generate(net, 1, block_size, 2)
            alone = seconds(one_by_one)
            reset_peak()
            together = seconds(
                partial(generate, net, batch_size, block_size, steps, batch_size=batch_size)
            )
        yield dict(
            name=f'{batch_size} samples',
            dtype=precision,
            one_by_one_s=alone,
            one_batch_s=together,
            batch_to_single=together / alone,
            peak_gb=peak_gigabytes(),
        )


def samplers():
    """Every sampler on one net."""
    calls = [
        ('ancestral', {}),
        ('first_hitting', {}),
        ('fixed', {}),
        ('fixed', dict(confidence='top_prob')),
        ('fixed', dict(confidence='entropy', threshold=1.0)),
        ('greedy', {}),
        ('low_confidence', dict(block_length=32)),
        ('remdm', {}),
        ('semi_ar', {}),
        ('ancestral', dict(prompt=[1] * 8, cfg_scale=1.0)),
    ]
    for precision in formats:
        for name, options in calls:
            net = new_net().eval()
            with torch.no_grad(), autocast(device, precision):
                taken, result = timed(
                    partial(generate, net, batch_size, block_size, steps, name, **options)
                )
            nfe = result.nfe.double().mean().item()
            shown = [f'{key}={value}' for key, value in options.items() if key != 'prompt']
            yield dict(
                name=' '.join([name, *shown]),
                dtype=precision,
                s_per_sample=taken / batch_size,
                nfe=nfe,
                ms_per_evaluation=taken / batch_size / nfe * 1000,
            )


def ar():
    """A causal net with a key/value cache against a diffusion net of its size in few to many
    steps."""
    nets = {
        'ar': new_net(causal=True, objective='ar', cond_dim=0).eval(),
        'ancestral': new_net().eval(),
    }
    for precision in formats:
        for rows in (1, batch_size):
            first_rate = None
            for name, tokens_a_step in (
                ('ar', 1),
                ('ancestral', 32),
                ('ancestral', 8),
                ('ancestral', 1),
            ):
                num_steps = block_size // tokens_a_step
                call = partial(
                    generate,
                    nets[name],
                    rows,
                    block_size,
                    sampler=name,
                    prompt=[1],
                    top_p=0.9,
                    batch_size=rows,
                )
                with torch.no_grad(), autocast(device, precision):
                    call(steps=2)
                    taken, result = timed(partial(call, steps=num_steps))
                rate = rows * block_size / taken
                first_rate = first_rate or rate
                nfe = result.nfe.double().mean().item()
                yield dict(
                    name=name,
                    dtype=precision,
                    rows=rows,
                    steps=num_steps,
                    nfe=nfe,
                    tokens_per_s=rate,
                    ms_per_evaluation=rows * block_size / rate / nfe * 1e3,
                    times_ar=rate / first_rate,
                )


def nelbo():
    """The spread of the two estimators of the NELBO over seeds."""
    net = load_pretrained(out_dir, device=device)
    tok = data.get_tokenizer(**net.tokenizer)
    folder = data.find_or_prepare(net.constants['dataset'], tok.name)
    rows = data.TokenRows(folder, 'validation', net.config.block_size, net.constants['packing'])
    for num_mc in (1, 4, 16):
        for estimator in ('time', 'count'):
            results = [
                measured_nelbo(net, rows, num_mc, 16, seed, 32, estimator=estimator)
                for seed in range(seeds)
            ]
            found = torch.tensor(
                [result['nats_per_token'] for result in results], dtype=torch.float64
            )
            spread = found.std().item()
            yield dict(
                estimator=estimator,
                num_mc=num_mc,
                evaluations=32 * num_mc,
                mean_nats=found.mean().item(),
                mean_se=spread / seeds**0.5,
                spread=spread,
                spread_times_root_evaluations=spread * (32 * num_mc) ** 0.5,
            )


def memory():
    """The memory that train.py says it needs, and the peak of its third step above that of a net of
    nothing, each in a process of its own; the same of three steps of the dense textbook in float32
    or autocast, which evaluates and writes nothing. ours: the measured peak over the textbook's."""
    quickstart = os.path.join(root, 'config', 'quickstart.py')
    script = 'import runpy, sys; sys.path.insert(0, sys.argv[1]); sys.argv[:2] = ["train.py"]\n'
    script += f"runpy.run_path({os.path.join(root, 'train.py')!r}, run_name='__main__')\n"
    script += "print(*(line for line in open('/proc/self/status') if 'VmHWM' in line))"
    if device.type == 'cuda':
        script += "\nprint('VmHWM:', torch.cuda.max_memory_allocated() // 1024)"
        script = f'import torch; {script}'

    def peak(*options):
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(
                [sys.executable, '-c', script, root, quickstart, f'--out_dir={folder}',
                 '--max_iters=3', '--warmup_iters=1', '--optimizer=adamw', '--dropout=0.1',
                 '--sample_at_end=False', '--sample_interval=0', '--eval_iters=1',
                 f'--device={device}', *options],
                capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            config = torch.load(f'{folder}/ckpt.pt', mmap=True)['model_config']
        found = re.search(r'([\d.]+)M parameters and .* need ([\d.]+) GB', done.stdout)
        measured = int(re.findall(r'VmHWM:\s+(\d+)', done.stdout)[-1]) * 1024 / 1e9
        return float(found[1]), float(found[2]), measured, config

    def of_textbook(precision, rows, micro_batches, config):
        reset_peak()
        before = peak_gigabytes()
        with torch_only():
            training = Training(textbook, rows, **config)
            for _ in range(3):
                for _ in range(micro_batches):
                    training.backward(precision)
                training.update()
        return peak_gigabytes() - before

    mdlm = '--mlp=gelu --cond_dim=128 --tied=False --objective=subs --t_range=None --ar_share=0'
    llama = '--norm=rmsnorm --mlp=swiglu --objective=subs --ar_share=0'
    _, _, nothing, _ = peak(
        '--n_layer=1', '--n_head=1', '--n_embd=8', '--block_size=8', '--batch_size=1',
        '--global_batch_size=1', '--dtype=float32')
    for L, micro_batches, shape in (
        (256, 2, f'--n_layer=4 --n_head=4 --n_embd=256 --batch_size=8 {mdlm}'),
        (256, 1, f'--n_layer=4 --n_head=4 --n_embd=256 --batch_size=8 {mdlm} --tokenizer=gpt2'),
        (512, 1, f'--n_layer=6 --n_head=6 --n_embd=384 --batch_size=8 {llama}'),
        (512, 2, f'--n_layer=12 --n_head=12 --n_embd=768 --batch_size=2 {mdlm}'),
        (1024, 1, f'--n_layer=12 --n_head=12 --n_embd=768 --batch_size=2 {mdlm} --tokenizer=gpt2'),
    ):
        words = dict(re.findall(r'--(\w+)=(\S+)', shape))
        rows = int(words['batch_size'])
        for precision in formats:
            millions, predicted, measured, config = peak(
                *shape.split(), f'--block_size={L}', f'--dtype={precision}',
                f'--global_batch_size={rows * micro_batches}')
            dense = of_textbook(precision, rows, micro_batches, config)
            yield dict(
                dtype=precision, rows=rows, tokens=L, layers=int(words['n_layer']),
                width=int(words['n_embd']), mlp=words['mlp'], a_step=micro_batches,
                millions=millions, predicted_gb=predicted, measured_gb=measured - nothing,
                ratio=predicted / (measured - nothing), textbook_gb=dense,
                ours=(measured - nothing) / dense)


# -----------------------------------------------------------------------------
# what a GPU is for


def launches():
    """Kernels that a training step and one evaluation of a 12-layer net start, counted on the
    pretended GPU of the tests, and what the host needs for them at 10 us each; of the trunk alone
    in the code that torch.compile makes for a CPU. With CUDA graphs an evaluation is one launch and
    the head."""
    one, two = (pretended.count_compiled(n) for n in (1, 2))  # all blocks have the same code
    compiled = {
        f'trunk compiled, {name}': Counter({k: one[name][k] + 11 * (n - one[name][k])
                                            for k, n in two[name].items()})
        for name in two
    }
    torch.cuda._lazy_init = lambda: None
    for name, counts in (pretended.count_launches() | compiled).items():
        (first, n), (second, m) = counts.most_common(2)
        yield dict(
            name=name, launches=counts.total(), most=f'{n} {first}, {m} {second}',
            host_ms=counts.total() / 100
        )


def goals():
    """Yield (what, found, unit, goal or None, whether less is better, more about it)."""
    on_gpu = device.type == 'cuda'
    shape = dict(n_layer=2, n_head=2, n_embd=64, vocab_size=2048, block_size=64)
    batches, num_samples, num_steps = (2, 4), 4, 32
    if on_gpu:
        shape = dict(n_layer=12, n_head=12, n_embd=768, vocab_size=50258, block_size=1024)
        batches, num_samples, num_steps = (32, 64), 64, 1000
    for rows, optimizer in ((batches[0], 'adamw'), (batches[0], 'muon'), (batches[1], 'adamw')):
        reset_peak()
        training = Training(rows=rows, **shape)
        if optimizer == 'muon':
            training.use_muon()
        if on_gpu:
            training.net.trunk = torch.compile(training.net.trunk)
        compiling = seconds(partial(training.step, 'bfloat16'))
        time_ = median(partial(training.step, 'bfloat16'), 10)
        about = f'{training.x0.numel() / time_:,.0f} tokens/s, first step {compiling:.1f} s'
        mfu = training.flops() / time_ / 989e12 * 100
        name = f'training, {optimizer}, {rows} rows, bfloat16'
        yield name, mfu, '% MFU', 50 if optimizer == 'adamw' else None, False, about
        yield f'{name}, peak', peak_gigabytes(), 'GB', 40 if rows == batches[1] else None, True, ''
        del training
    net = new_net(**shape).eval()
    with torch.no_grad(), autocast(device, 'bfloat16'):
        x = torch.full((1, shape['block_size']), net.config.mask_id, device=device)
        sigma = torch.zeros(1, device=device)
        trunk = torch.compile(net.trunk, mode='reduce-overhead') if on_gpu else net.trunk
        compiling = seconds(lambda: trunk(x, sigma))
        time_ = median(lambda: net.head(trunk(x, sigma)[:, :1]), 50)
        about = f'first one {compiling:.1f} s'
        yield 'one evaluation, batch 1', time_ * 1e3, 'ms', 1, True, about
        call = partial(
            generate, net, num_samples, shape['block_size'], compile=on_gpu, batch_size=num_samples
        )
        call(steps=num_steps)  # compiles each size of a batch
        ours = seconds(partial(call, steps=num_steps))
        with torch_only():
            dense = partial(
                reference.ancestral, net, num_samples, shape['block_size'], num_steps, loglinear,
                only_steps=2, dtype=torch.float32
            )
            dense()
            textbook_s = seconds(dense) / 2 * num_steps
        about = f'{ours:.1f} s, textbook {textbook_s:.1f} s'
        name = f'{num_samples} samples, {num_steps} steps'
        yield name, textbook_s / ours, 'times the textbook', 10, False, about


def run_goals():
    """Print one table of the goals, then of the tests that need the device, of the quickstart and
    of the race's winner, which gets the time that is left. Its goal is MDLM's best on that text."""
    until = time.monotonic() + 60 * minutes
    title = f'{machine_name()}, torch {torch.__version__}'
    if device.type != 'cuda':
        title += ', a rehearsal with small shapes: the goals are those of a GPU'
    print(f'\n{title}\n\n| what | found | goal | | |\n|---|---|---|---|---|', flush=True)

    def show(what, found, unit, goal, less, about=''):
        verdict = ''
        if goal is not None:
            verdict = 'pass' if (found <= goal if less else found >= goal) else 'FAIL'
        sign = '' if goal is None else f"{'≤' if less else '≥'} {goal} {unit}"
        print(table_row([what, f'{cell(found)} {unit}', sign, verdict, about]), flush=True)

    try:
        for row in goals():
            show(*row)
            if time.monotonic() > until:
                break
    except (RuntimeError, ValueError) as error:  # out of memory, a compiler that is missing
        why = str(error).strip().splitlines()[0]
        print(table_row(['the goals after this', '', '', 'FAIL', f'{type(error).__name__}: {why}']))
    environment = os.environ | dict(HF_HUB_OFFLINE='1')
    here = tempfile.TemporaryDirectory()

    def finished(what, *command):
        """The process when it has ended; None, which is said, when there is no time for it."""
        left = until - time.monotonic()
        try:
            return subprocess.run(
                [sys.executable, *command], cwd=here.name, env=environment, capture_output=True,
                text=True, timeout=max(left, 0.1)
            )
        except subprocess.TimeoutExpired:
            print(table_row([what, '', '', 'no time', f'not done in {left:.0f} s']), flush=True)

    def run(what, unit, goal, less, value, *command):
        done = finished(what, *command)
        if done is None:
            return
        last = [*(done.stdout + done.stderr).strip().splitlines(), ''][-1]
        found = value(done)
        if found is None:
            print(table_row([what, '', '', 'FAIL', last]), flush=True)
        else:
            show(what, found, unit, goal, less, last if goal == 0 else '')

    def least(pattern, done):
        return min(map(float, re.findall(pattern, done.stdout)), default=None)

    run('tests on the device', 'failures', 0, True, lambda done: float(done.returncode),
        '-m', 'pytest', '-q', '-p', 'no:cacheprovider', os.path.join(root, 'tests'), '-k',
        'cuda or gpu')
    common = [f'--device={device.type}', '--sample_at_end=False', '--sample_interval=0']
    small = [] if device.type == 'cuda' else ['--max_iters=20', '--n_layer=2', '--n_embd=96']
    train_py, config = os.path.join(root, 'train.py'), os.path.join(root, 'config', '')
    bits_per_byte = partial(least, r'([\d.]+) ± \S+ bits/byte')
    run('config/quickstart.py', 'bits/byte', 2.0, True, bits_per_byte,
        train_py, f'{config}quickstart.py', *common, *small)

    # the race's winner on the quickstart's text, as many steps as go into 5 minutes or what is left
    name = 'the fast recipe for {:.1f} minutes'
    fast = [train_py, f'{config}fast_wikitext2.py', '--dataset=stdlib', '--tokenizer=bpe-4096',
            '--log_interval=20', '--overwrite=True', *common]
    began = time.monotonic()
    done = finished(name.format(5), *fast, '--max_iters=60', '--eval_interval=60', '--eval_iters=1')
    rates = re.findall(r'([\d,]+) tokens/s', done.stdout if done else '')
    if rates:
        rate = int(rates[-1].replace(',', ''))
        starting = time.monotonic() - began  # longer than what comes before the first step
        budget = min(5 * 60, until - time.monotonic()) - starting
        num_steps = max(20, int(0.8 * budget * rate / (16 * 128)))
        run(name.format(budget / 60), 'nats/token', 5.20, True, partial(least, r'validation (\S+)'),
            *fast, f'--max_iters={num_steps}', f'--eval_interval={num_steps // 5}')
    elif done:
        print(table_row([name.format(5), '', '', 'FAIL', done.stderr.strip()]))


# -----------------------------------------------------------------------------
# data


def prepare():
    """Text -> bins, in paragraphs of 0.12 kB and in documents of 5 kB, against the tokenizer alone
    on one core."""
    paragraphs = '\n\n'.join(document for _, document, _, _ in data.read_stdlib()).split('\n\n')
    here = os.getcwd()
    for name, size in (('paragraphs', 0), ('documents', 5000)):
        documents = []
        document = ''
        for paragraph in paragraphs:
            document += paragraph + '\n'
            if len(document) > size:
                if document.strip():
                    documents.append(document.strip('\n'))
                document = ''
        text = '\n\n'.join(documents) + '\n\n'
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            with open('corpus.txt', 'w') as f:
                for _ in range(max(1, int(megabytes * 1e6 / len(text.encode())))):
                    f.write(text)
            reset_peak()
            ours = seconds(partial(data.prepare, 'text:corpus.txt', tokenizer, 'corpus'))
            peak = peak_gigabytes()
            # without EOS
            tokens = sum(
                split['tokens'] - split['documents']
                for split in data.read_meta('data/corpus')['splits'].values()
            )
            tok = data.get_tokenizer(tokenizer, 'data/corpus')
            tok.encode_batch(documents)
            runs = [timed(partial(tok.encode_batch, documents)) for _ in range(3)]
            alone = min(taken for taken, _ in runs)
            single = len(runs[0][1][0]) / alone
            os.chdir(here)
        rate = tokens / ours
        yield dict(
            name=name,
            mean_kb=len(text) / len(documents) / 1e3,
            tokens_per_s=rate,
            one_core=single,
            cores=os.cpu_count(),
            of_all_cores=rate / single / os.cpu_count(),
            peak_gb=peak,
        )


def block():
    """One sample of block diffusion in blocks of 16 tokens, 16 steps each, of growing length; of a
    diffusion net in as many evaluations; and of a causal net. times_first: time per token, of that
    of the shortest."""
    nets = dict(
        block=new_net(block_length=16).eval(),
        ancestral=new_net().eval(),
        ar=new_net(causal=True, objective='ar', cond_dim=0).eval(),
    )
    lengths = [block_size * 2**k // 4 for k in range(5)]
    for precision in formats:
        evaluations, first_rate = {}, None
        calls = [('block', L, 16) for L in lengths] + [('ancestral', lengths[2], None)]
        for name, L, num_steps in [*calls, ('ar', lengths[2], 1)]:
            if name == 'ancestral':  # in n steps some n (1 - (1 - 1/n)^L) unmask something
                num_steps = next(
                    n for n in range(1, 2**20) if n * (1 - (1 - 1 / n) ** L) >= evaluations[L]
                )
            call = partial(generate, nets[name], 1, L, num_steps, name, prompt=[1], top_p=0.9)
            with torch.no_grad(), autocast(device, precision):
                generate(nets[name], 1, 32, 2, name, prompt=[1])
                taken, result = timed(call)
            rate = L / taken
            first_rate = first_rate or rate
            evaluations[L] = result.nfe.item()
            yield dict(
                name=name,
                dtype=precision,
                tokens=L,
                steps=num_steps,
                nfe_per_token=evaluations[L] / L,
                tokens_per_s=rate,
                ms_per_evaluation=taken / evaluations[L] * 1e3,
                times_first=first_rate / rate,
            )


# -----------------------------------------------------------------------------

PARTS = dict(
    train=train, projection=projection, attention=attentions, cost=cost, loop=loop,
    processes=processes, estimate=estimate, checkpoint=checkpoint, sample=sample, batch=batch,
    samplers=samplers, ar=ar, nelbo=nelbo, optimizers=optimizers, memory=memory, data=prepare,
    mamba=mamba, packing=packing, launches=launches, block=block, race=race,
)
LARGE = '--n_layer=12 --n_head=12 --n_embd=768 --block_size=1024'  # MDLM's 170M
SUITE = {
    'cpu': [
        'train', f'train {LARGE} --batch_size=2 --repeats=3', 'packing', 'projection', 'attention',
        'cost', 'loop', 'processes', 'estimate', f'checkpoint {LARGE}', 'sample',
        f'sample {LARGE} --batch_size=1 --steps=1000 --first=30 --dense_steps=2',
        'batch --steps=64', 'samplers --batch_size=4 --steps=128 --dtype=bfloat16',
        'ar --dtype=bfloat16', 'data'
    ],
    'cuda': [
        'train', f'train {LARGE} --batch_size=32 --compile=True',
        f'train {LARGE} --batch_size=64 --compile=True --dtype=bfloat16',
        f'packing {LARGE} --batch_size=32 --dtype=bfloat16',
        f'projection {LARGE} --batch_size=32', 'attention', 'cost', f'loop {LARGE} --batch_size=32',
        f'processes {LARGE} --batch_size=32', 'estimate', f'checkpoint {LARGE}', 'sample',
        f'sample {LARGE} --batch_size=1 --steps=1000 --compile=True',
        f'sample {LARGE} --batch_size=64 --steps=1000 --dtype=bfloat16',
        f'batch {LARGE} --steps=64',
        f'samplers {LARGE} --batch_size=4 --steps=128 --dtype=bfloat16',
        f'ar {LARGE} --batch_size=64 --dtype=bfloat16', 'data'
    ],
}


def label(row):
    """What tells a row from others: all but what was found, and the versions."""

    def identifies(key, value):
        if key in constants:
            return key not in ('out', 'compare')
        return key not in ('commit', 'torch') and not isinstance(value, float)

    return json.dumps(
        {key: value for key, value in row.items() if identifies(key, value)}, sort_keys=True
    )


def changes(old, new):
    """(row, measure, before, now) of all that both lists of rows hold; the last of equal rows
    counts."""
    old = {label(row): row for row in old}
    for what, row in {label(row): row for row in new}.items():
        if what in old:
            for key, now in row.items():
                if isinstance(now, float) and key not in constants:
                    yield row, key, old[what][key], now


def cell(value):
    if not isinstance(value, float):
        return str(value)
    return f'{value:,.0f}' if value >= 100 else f'{value:.3g}'


def table_row(values):
    return '| ' + ' | '.join(values) + ' |'


def machine_name():
    if device.type == 'cuda':
        return torch.cuda.get_device_name()
    if os.path.exists('/proc/cpuinfo'):
        with open('/proc/cpuinfo') as f:
            for line in f:
                if line.startswith('model name'):
                    return line.split(':')[1].strip()
    return platform.processor()


def run_part():
    """Print the table of one part, and append its rows to `out`."""
    title = f'{part} on {machine_name()}, {torch.get_num_threads()} threads'
    title += f', torch {torch.__version__}'
    of_no_net = 'data', 'nelbo', 'optimizers', 'memory', 'estimate', 'cost', 'attention', 'mamba'
    if part not in (*of_no_net, 'launches', 'race'):
        title += f', {new_net().num_params() / 1e6:.0f}M parameters ({n_layer} x {n_embd})'
        title += f', vocabulary {vocab_size:,}, rows of {block_size}'
    if part == 'mamba':
        title += f', {n_layer} x {n_embd}, vocabulary {vocab_size:,}'
    print(f'\n{title}')
    print(' '.join((PARTS[part].__doc__ or '').split()))
    git = ['git', 'rev-parse', '--short', 'HEAD']
    common = dict(
        machine=machine_name(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        commit=subprocess.run(git, cwd=root, capture_output=True, text=True).stdout.strip(),
    )
    for i, row in enumerate(PARTS[part]()):
        if i == 0:
            print(table_row(row) + '\n|' + '---|' * len(row))
        print(table_row(map(cell, row.values())), flush=True)
        with open(out, 'a') as f:
            f.write(json.dumps(common | constants | dict(part=part) | row) + '\n')


def run_suite():
    """Each part in a process of its own."""
    given = [argument for argument in sys.argv[1:] if not argument.startswith('--compare')]
    for line in SUITE[device.type]:
        name, *options = line.split()
        command = [sys.executable, os.path.abspath(__file__), f'--part={name}', *given, *options]
        if subprocess.run(command).returncode:
            sys.exit(f'error: part {name} failed')


def print_changes(old, new):
    found = list(changes(old, new))
    alike = len({label(row) for row, *_ in found})
    print(f'\n{alike} rows are in {compare} too; what changed by a twentieth or more\n')
    print('| part | what | measure | before | now | now / before |\n|---|---|---|---|---|---|')
    named = (
        'name', 'dtype', 'rows', 'tokens', 'n_layer', 'n_embd', 'vocabulary', 'layers', 'width',
        'steps'
    )
    for row, key, was, now in found:
        if abs(now - was) > 0.05 * abs(was):
            what = ', '.join(str(value) for name, value in row.items() if name in named)
            ratio = f'{now / was:.2f}' if was else '-'
            print(table_row([row['part'], what, key, f'{was:.4g}', f'{now:.4g}', ratio]))


if part not in (None, *PARTS):
    sys.exit(f"error: part='{part}' is not known: choose from {', '.join(PARTS)}")
if part is None:
    for_all = (
        'device', 'dtype', 'tokenizer', 'megabytes', 'repeats', 'out', 'compare', 'minutes'
    )
    for argument in sys.argv[1:]:
        if argument.lstrip('-').partition('=')[0] not in for_all:
            sys.exit(f'error: {argument} goes with a --part: those have shapes of their own')
try:
    with open(out, 'a+') as f:
        f.seek(0)
        already = len(f.readlines())
except OSError as error:
    sys.exit(f'error: out={out} cannot be written ({error.strerror})')
before = []
if compare:
    try:
        with open(compare) as f:
            before = [json.loads(line) for line in f]
    except (OSError, ValueError) as error:
        sys.exit(
            f'error: compare={compare} is not a file that an earlier run has written ({error})'
        )
formats = [dtype] if dtype else ['float32', 'bfloat16']
if minutes:
    run_goals()
elif part:
    run_part()
else:
    run_suite()
if compare:
    with open(out) as f:
        print_changes(before, [json.loads(line) for line in f.readlines()[already:]])
