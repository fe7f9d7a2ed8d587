"""
How fast, against the dense textbook versions of tests/reference.py in the same run:

    python tests/bench.py --part=train                       30M parameters, 8 x 256 tokens, AdamW and EMA included
    python tests/bench.py --part=train --n_layer=12 --n_head=12 --n_embd=768 --block_size=1024 --batch_size=2       MDLM's 170M
    python tests/bench.py --part=sample                      4 samples of 256 tokens in 512 steps
    python tests/bench.py --part=sample --n_layer=12 --n_head=12 --n_embd=768 --block_size=1024 --batch_size=1 --steps=1000 --first=30 --dense_steps=3
    python tests/bench.py --part=batch                       8 samples in one batch and one by one
    python tests/bench.py --part=samplers                    the time of each sampler
    python tests/bench.py --part=nelbo --out_dir=out-quickstart      the spread of the estimators of the NELBO over seeds
    python tests/bench.py --part=checkpoint --n_layer=12 --n_head=12 --n_embd=768    how long training waits for a checkpoint of MDLM's 170M
    python tests/bench.py --part=data --megabytes=2000       text -> bins; the memory it takes

Prints a table, then one JSON line a row. "of matmul" is the share of the FLOP/s of a large matrix product in the same process and
format; only products that are performed are counted. Peak memory is the process's (CPU) or the allocator's (CUDA).
"""
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time

import torch

sys.path[:0] = [os.path.dirname(os.path.dirname(os.path.abspath(__file__))), os.path.dirname(os.path.abspath(__file__))]

import data  # noqa: E402
import eval  # noqa: E402
import reference  # noqa: E402
from configurator import configure  # noqa: E402
from model import DiT, ModelConfig, autocast, corrupt, load_pretrained, loglinear, per_token_loss, pick_device  # noqa: E402
from sample import generate  # noqa: E402

part = 'train'        # 'train', 'sample', 'batch', 'samplers', 'nelbo', 'checkpoint', 'data'
device = 'cpu'        # 'cpu', 'cuda'
dtype = None          # 'float32', 'bfloat16'; None: both
n_layer = 4
n_head = 4
n_embd = 256
cond_dim = 128
vocab_size = 50258
block_size = 256      # tokens a row
batch_size = None     # rows; None: 8, of part sample 4
repeats = 5           # training steps that are timed, after two that are not; the median counts
steps = 512           # of the sampler
first = 0             # so many network evaluations of the first row are timed, and the dense sampler over the steps they cover; 0: all (sample)
dense_steps = 6       # so many of them are timed in the dense sampler, which does the same work in each; its time for all follows from that
compile = False       # compile the trunk (train)
megabytes = 50        # of text (data)
tokenizer = 'gpt2'    # (data)
out_dir = 'out-quickstart'  # a trained net (nelbo)
seeds = 16            # (nelbo)
constants = configure(globals())
batch_size = batch_size or (4 if part == 'sample' else 8)
device = pick_device(device)


def synchronize():
    if device.type == 'cuda':
        torch.cuda.synchronize()


def seconds(function):
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def reset_peak():
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats()
    elif os.path.exists('/proc/self/clear_refs'):
        with open('/proc/self/clear_refs', 'w') as f:
            f.write('5')  # Linux: forget the peak of the resident memory


def peak_gigabytes():
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated() / 1e9
    if os.path.exists('/proc/self/status'):
        with open('/proc/self/status') as f:
            return next(int(line.split()[1]) for line in f if line.startswith('VmHWM')) / 1e6
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == 'darwin' else 1e6)


def matmul_rate(format):
    """FLOP/s of a large matrix product."""
    n = 8192 if device.type == 'cuda' else 2048
    a, b = (torch.randn(n, n, device=device).to(getattr(torch, format)) for _ in range(2))
    a @ b
    return 2 * n ** 3 / min(seconds(lambda: a @ b) for _ in range(5))


def new_net():
    torch.manual_seed(0)
    net = DiT(ModelConfig(block_size=block_size, vocab_size=vocab_size, mask_id=vocab_size - 1, n_layer=n_layer, n_head=n_head, n_embd=n_embd, cond_dim=cond_dim)).to(device)
    with torch.no_grad():
        for p in net.parameters():  # adaLN-zero would switch the blocks off
            p.add_(torch.randn_like(p) * 0.02)
    return net


def train_row(name, loss_function, format, rate):
    net = new_net().train()
    if compile:
        net.trunk = torch.compile(net.trunk)
    ema = [p.detach().clone() for p in net.parameters()]
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
    x0 = torch.randint(vocab_size - 1, (batch_size, block_size)).to(device)
    t = ((torch.arange(batch_size) + 0.5) / batch_size).to(device)
    xt = corrupt(x0, t, vocab_size - 1, loglinear, torch.Generator().manual_seed(0))

    def step():
        with autocast(device, format):
            loss = loss_function(net, x0, xt, t).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(ema, list(net.parameters()), 1e-4)

    reset_peak()
    step(), step()
    median = sorted(seconds(step) for _ in range(repeats))[repeats // 2]
    scored = (xt == vocab_size - 1).sum().item() if name == 'nanoMDM' else x0.numel()
    return dict(name=name, dtype=format, tokens_per_s=x0.numel() / median, of_matmul=net.train_flops(batch_size, block_size, scored) / median / rate, peak_gb=peak_gigabytes())


def train():
    dense = lambda net, x0, xt, t: reference.subs_nelbo(net, x0, xt, t, loglinear)
    for format in formats:
        rate = matmul_rate(format)
        ours, textbook = train_row('nanoMDM', per_token_loss, format, rate), train_row('textbook', dense, format, rate)
        for row in (ours, textbook):
            yield row | dict(times_textbook=row['tokens_per_s'] / textbook['tokens_per_s'], matmul_gflops=rate / 1e9)


class Enough(Exception):
    pass


def sample():
    net, baseline = new_net().eval(), None
    for format in formats:
        rate = matmul_rate(format)
        events = []

        def stop_after_first(rows, cols, ids, confidence, now):
            events.append((now[rows == 0].max().item(), len(rows)) if (rows == 0).any() else (-1, len(rows)))
            if sum(step >= 0 for step, _ in events) == first:
                raise Enough

        def ours_timed():
            try:
                return generate(net, batch_size, block_size, steps, on_change=stop_after_first if first else None)
            except Enough:
                return None

        with torch.no_grad(), autocast(device, format):
            generate(net, batch_size, block_size, 2)
            reset_peak()
            result = []
            ours, ours_peak = seconds(lambda: result.append(ours_timed())), peak_gigabytes()
            covered = max(step for step, _ in events) + 1 if first else steps                  # of the grid
            evaluations = batch_size * first if first else result[0].nfe.sum().item()
            projected = sum(n for _, n in events[1:]) if first else batch_size * block_size
            reset_peak()
            dense = seconds(lambda: reference.ancestral(net, batch_size, block_size, steps, loglinear, only_steps=dense_steps, dtype=torch.float32)) / dense_steps * covered
        baseline = baseline or dense / covered
        flops = lambda evaluations, projected: net.train_flops(evaluations, block_size, projected) / 3
        for name, time_, n, heads, peak in (('nanoMDM', ours, evaluations, projected, ours_peak),
                                            ('textbook', dense, batch_size * covered, batch_size * covered * block_size, peak_gigabytes())):
            yield dict(name=name, dtype=format, steps=covered, s_per_sample=time_ / batch_size, nfe=n / batch_size, of_matmul=flops(n, heads) / time_ / rate, peak_gb=peak,
                       times_textbook=dense / time_, times_textbook_float32=baseline * covered / time_)


def batch():
    net = new_net().eval()
    for format in formats:
        with torch.no_grad(), autocast(device, format):
            generate(net, 1, block_size, 2)
            alone = seconds(lambda: [generate(net, 1, block_size, steps, first_row=i) for i in range(batch_size)])
            reset_peak()
            together = seconds(lambda: generate(net, batch_size, block_size, steps, batch_size=batch_size))
        yield dict(name=f'{batch_size} samples', dtype=format, one_by_one_s=alone, one_batch_s=together, batch_to_single=together / alone, peak_gb=peak_gigabytes())


def samplers():
    calls = [('ancestral', {}), ('first_hitting', {}), ('fixed', {}), ('fixed', dict(confidence='top_prob')), ('fixed', dict(confidence='entropy', threshold=1.0)), ('greedy', {}),
             ('low_confidence', dict(block_length=32)), ('remdm', {}), ('semi_ar', {}), ('ancestral', dict(prompt=[1] * 8, cfg_scale=1.0))]
    for format in formats:
        for name, options in calls:
            net = new_net().eval()
            with torch.no_grad(), autocast(device, format):
                result = []
                taken = seconds(lambda: result.append(generate(net, batch_size, block_size, steps, name, **options)))
            nfe = result[0].nfe.double().mean().item()
            yield dict(name=' '.join([name, *(f'{key}={value}' for key, value in options.items() if key != 'prompt')]), dtype=format, s_per_sample=taken / batch_size, nfe=nfe,
                       ms_per_evaluation=taken / batch_size / nfe * 1000)


def nelbo():
    net = load_pretrained(out_dir, device=device)
    tok = data.get_tokenizer(**net.tokenizer)
    rows = data.TokenRows(data.find_or_prepare(net.constants['dataset'], tok.name), 'validation', net.config.block_size, net.constants['packing'])
    for num_mc in (1, 4, 16):
        for estimator in ('time', 'count'):
            found = torch.tensor([eval.nelbo(net, rows, num_mc, 16, seed, 32, estimator=estimator)['nats_per_token'] for seed in range(seeds)], dtype=torch.float64)
            spread = found.std().item()
            yield dict(estimator=estimator, num_mc=num_mc, evaluations=32 * num_mc, mean_nats=found.mean().item(), mean_se=spread / seeds ** 0.5, spread=spread,
                       spread_times_root_evaluations=spread * (32 * num_mc) ** 0.5)


def checkpoint():
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    with tempfile.TemporaryDirectory(dir='.') as folder:  # this disk, not one in memory
        with open(os.path.join(folder, 'corpus.txt'), 'w') as f:
            f.write('\n\n'.join(document for _, document, _, _ in data.read_stdlib()))
        for command in (['data.py', '--dataset=text:corpus.txt', '--name=corpus', f'--tokenizer={tokenizer}'],
                        ['train.py', '--dataset=corpus', f'--tokenizer={tokenizer}', f'--n_layer={n_layer}', f'--n_head={n_head}', f'--n_embd={n_embd}', f'--cond_dim={cond_dim}', '--block_size=64',
                         '--batch_size=1', '--global_batch_size=1', '--max_iters=60', '--ckpt_interval=20', '--eval_iters=1', '--sample_at_end=False', f'--device={device}', '--out_dir=out']):
            done = subprocess.run([sys.executable, os.path.join(root, command[0]), *command[1:]], cwd=folder, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
    for step, gigabytes, took, waited in re.findall(r'step (\d+): .* written, ([\d.]+) GB in ([\d.]+) s, ([\d.]+) s of which', done.stdout):
        yield dict(name='checkpoint', step=int(step), gb=float(gigabytes), written_s=float(took), waited_s=float(waited))


def prepare():
    text = '\n\n'.join(document for _, document, _, _ in data.read_stdlib())
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        with open('corpus.txt', 'w') as f:
            for _ in range(max(1, int(megabytes * 1e6 / len(text.encode())))):
                f.write(text + '\n\n')
        tok = data.get_tokenizer(tokenizer)
        documents = text.split('\n\n')
        counts = []
        alone = seconds(lambda: counts.append(len(tok.encode_batch(documents)[0])))
        reset_peak()
        ours = seconds(lambda: data.prepare('text:corpus.txt', tokenizer, 'corpus'))
        tokens = sum(split['tokens'] for split in data.read_meta('data/corpus')['splits'].values())
        os.chdir('/')
    single, rate = counts[0] / alone, tokens / ours
    yield dict(name='data.py', tokens_per_s=rate, one_core=single, cores=os.cpu_count(), of_all_cores=rate / single / os.cpu_count(), megabytes=megabytes, peak_gb=peak_gigabytes())


parts = dict(train=train, sample=sample, batch=batch, samplers=samplers, nelbo=nelbo, checkpoint=checkpoint, data=prepare)
if part not in parts:
    raise ValueError(f"part='{part}' is not known: choose from {', '.join(parts)}")
formats = [dtype] if dtype else ['float32', 'bfloat16']
machine = torch.cuda.get_device_name() if device.type == 'cuda' else next(
    (line.split(':')[1].strip() for line in open('/proc/cpuinfo') if line.startswith('model name')) if os.path.exists('/proc/cpuinfo') else iter(()), platform.processor())
print(f'{part} on {machine}, {torch.get_num_threads()} threads, torch {torch.__version__}' + (
    f', {new_net().num_params() / 1e6:.0f}M parameters ({n_layer} x {n_embd}), vocabulary {vocab_size:,}, rows of {block_size}' if part not in ('data', 'nelbo', 'checkpoint') else ''))
rows = []
for row in parts[part]():
    if not rows:
        print('| ' + ' | '.join(row) + ' |\n|' + '---|' * len(row))
    rows.append(row)
    print('| ' + ' | '.join(value if isinstance(value, str) else f'{value:,.0f}' if value >= 100 else f'{value:.3g}' for value in row.values()) + ' |', flush=True)
for row in rows:
    print(json.dumps(dict(machine=machine) | constants | row))
