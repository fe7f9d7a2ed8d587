"""
Train a masked diffusion language model. One process, or any number under torchrun:

    python train.py config/quickstart.py
    torchrun --nproc_per_node=8 train.py config/owt_mlm.py
    torchrun --nnodes=2 --node_rank=0 --master_addr=HOST --nproc_per_node=8 train.py config/owt_mdlm.py    (and node_rank=1)

Everything random is a function of (seed, step, micro-batch), so that 1, 2 or 8 processes with the same global batch see the same
batches, and a run that was killed goes on with --init_from=resume as if it had never stopped.
"""
import contextlib
import copy
import dataclasses
import datetime
import gc
import glob
import json
import math
import os
import re
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel as DDP

from configurator import configure, constants_of
from data import TokenRows, find_or_prepare, get_tokenizer, key_of, permute
from model import (SIZES, DiT, ModelConfig, autocast, check_objective, check_overrides, corrupt_batch, get_schedule, load_pretrained, load_state,
                   nelbo_per_token, on_grid, per_token_loss, pick_device, put, read_newest, reuse_memory, stratified_times, write_checkpoint)
from sample import generate

# input and output
out_dir = 'out'             # checkpoints and metrics.jsonl
init_from = 'scratch'       # 'scratch', 'resume' (out_dir/ckpt.pt), 'auto' (resume if there is one), or a source for load_pretrained: weights and architecture
overrides = None            # fields of ModelConfig that this source cannot tell, such as "{'n_head': 4}"
eval_interval = 2000        # steps
eval_iters = 20             # global batches of an evaluation, at most
log_interval = 10           # steps
ckpt_interval = 2000        # steps; ckpt.pt is the latest
keep_interval = 0           # steps; ckpt_<step>.pt is kept for ever; 0: none
sample_interval = 0         # steps; print a sample at evaluations on these steps; 0: never
sample_at_end = True        # print samples when training is done
wandb_project = None        # log to this project of wandb; None: only to metrics.jsonl
# data
dataset = 'openwebtext'     # a folder in data/, or what data.py knows
tokenizer = 'gpt2'          # the one the bins were made with
val_split = 'validation'    # what evaluations are made on
packing = 'wrap'            # how rows are cut: 'wrap', 'concat', 'pad', 'sentence'
loss_on_padding = True      # packing 'pad': padding is corrupted and predicted like any token
block_size = 1024           # tokens a row
batch_size = 32             # rows a micro-batch
global_batch_size = 512     # rows a step, of all processes and micro-batches together
ssl_ratio = 0.0             # share of micro-batches that are cut to a length drawn from 1 ... block_size (SMDM)
# model
size = None                 # a name in model.SIZES, in place of n_layer, n_head, n_embd, n_mlp (and cond_dim)
n_layer = 12
n_head = 12
n_embd = 768
n_mlp = None                # hidden width of the mlp; None: 4 * n_embd
cond_dim = 128              # width of the adaLN conditioning; 0: none
time_conditioning = False   # feed the noise level to the conditioning; False: always 0
causal = False              # attention looks back only: goes with objective 'ar'
norm = 'layernorm'          # 'layernorm' or 'rmsnorm'
mlp = 'gelu'                # 'gelu', 'relu' or 'swiglu'
norm_bias = False           # norms with a bias
mlp_bias = True             # linears of the mlp with a bias
head_bias = True            # vocabulary projection with a bias
head_mask = True            # vocabulary projection with a row for the mask; False and causal: no mask at all
rotary_bf16 = False         # rotary table rounded to bfloat16 (SMDM)
dropout = 0.1               # on the residual branches
attn_dropout = 0.0          # on the attention weights
init = 'mdlm'               # of new weights: 'mdlm', 'xlm' or 'smdm'
# objective
objective = 'subs'          # 'subs' (MDLM's NELBO), 'mlm' (xlm's cross entropy), 'd3pm', 'sedd' or 'ar'
schedule = 'loglinear'      # of the noise: a key of model.SCHEDULES, with its default parameters
T = 0                       # steps of the diffusion, for 'd3pm' and 'subs'; 0: continuous time
subs_masking = False        # d3pm: no probability for the mask
importance = False          # subs: draw times at which the weight of the loss is constant
use_num_masked_factor = False   # mlm: weigh a row by 1 / (1 + its masked positions)
loss_on_visible_tokens = False  # mlm: predict what is seen too
# optimizer
optimizer = 'adamw'         # 'adamw', or 'muon' for the matrices of the blocks and adamw for the rest
learning_rate = 3e-4
max_iters = 1_000_000       # steps
flops = None                # a budget of 6 * parameters without embeddings * tokens, in place of max_iters
lr_schedule = 'constant'    # after the warm-up: 'constant', or 'cosine' down to min_lr at max_iters
warmup_iters = 2500         # steps
warmup_share = 0.0          # of max_iters, where that is more than warmup_iters
min_lr = 0.0
weight_decay = 0.0
decay_all = False           # decay every parameter; False: matrices only
beta1 = 0.9
beta2 = 0.999
grad_clip = 1.0             # largest norm of the gradient; 0: no limit
ema = 0.9999                # decay of the averaged weights, min(ema, (1 + n) / (10 + n)) at the n-th step
# system
device = 'auto'             # 'auto' (cuda, mps or cpu, whichever is there), 'cpu', 'cuda', 'cuda:1', 'mps'
dtype = 'auto'              # 'float32', 'bfloat16' (autocast), or 'auto': bfloat16 where the device multiplies it natively
compile = None              # torch.compile the trunk; None: on CUDA
seed = 0
max_bad_steps = 20          # so many steps in a row without a finite loss and gradient, which are skipped, end the run
shard = False               # FSDP in place of DDP: weights, gradients and optimizer shared out, for nets that do not fit
constants = configure(globals())

# -----------------------------------------------------------------------------
# who we are, and on what

rank, local_rank, world_size = (int(os.environ.get(key, default)) for key, default in (('RANK', 0), ('LOCAL_RANK', 0), ('WORLD_SIZE', 1)))
master = rank == 0
device = pick_device(device, local_rank)
amp = autocast(device, dtype)
if device.type == 'cpu':
    reuse_memory()

for key in ('batch_size', 'global_batch_size', 'eval_interval', 'eval_iters', 'log_interval', 'ckpt_interval', 'max_iters', 'learning_rate', 'max_bad_steps'):
    if not 0 < constants[key] < math.inf:
        raise ValueError(f'{key}={constants[key]}: it must be positive')
for key in ('keep_interval', 'sample_interval', 'warmup_iters', 'min_lr', 'weight_decay', 'grad_clip'):
    if not 0 <= constants[key] < math.inf:
        raise ValueError(f'{key}={constants[key]}: it must be 0 or more')
for key in ('beta1', 'beta2', 'ema', 'ssl_ratio', 'warmup_share'):
    if not 0 <= constants[key] <= (1 if key == 'ssl_ratio' else 1 - 1e-9):
        raise ValueError(f'{key}={constants[key]}: it must be a share of 1')
if compile not in (None, True, False) or flops is not None and type(flops) not in (int, float):
    raise ValueError(f'compile={compile!r}, flops={flops!r}: the one is True, False or None, the other a number or None')
for key, known in (('optimizer', ('adamw', 'muon')), ('lr_schedule', ('constant', 'cosine'))):
    if constants[key] not in known:
        raise ValueError(f"{key}='{constants[key]}' is not known: choose from {', '.join(known)}")
if global_batch_size % (batch_size * world_size):
    raise ValueError(f'global_batch_size={global_batch_size} is not divisible into micro-batches of batch_size={batch_size} for each of '
                     f'{world_size} processes: make it a multiple of {batch_size * world_size}')
if size is not None and size not in SIZES:
    raise ValueError(f"size='{size}' is not known: choose from {', '.join(SIZES)}")
for key, wins in [*((key, f'size={size}') for key in (SIZES[size] if size is not None else {}) if key != 'cond_dim'), *([('max_iters', f'flops={flops:g}')] if flops is not None else [])]:
    if master and constants[key] != constants_of(__file__)[key][0] and (size is None or constants[key] != SIZES[size].get(key)):
        print(f'warning: {wins} says what {key} is, {key}={constants[key]} is not used: give --{wins.partition("=")[0]}=None to choose it yourself', flush=True)
if objective != 'mlm' and (use_num_masked_factor or loss_on_visible_tokens):
    raise ValueError(f"use_num_masked_factor and loss_on_visible_tokens go with objective mlm, not '{objective}'")
if shard and (world_size == 1 or optimizer == 'muon'):
    raise ValueError('shard=True shares the net among several processes (torchrun), with optimizer=adamw: Muon needs whole matrices')
check_objective(objective, T, subs_masking, importance, causal)
schedule = get_schedule(schedule)
if importance:
    schedule.sigma_range()                            # refuses schedules without it
micro_batches = global_batch_size // batch_size       # of a step, on all processes together
my_micro_batches = range(rank, micro_batches, world_size)

folder = find_or_prepare(dataset, tokenizer)          # before the process group starts: others wait for the files, not for a timeout
row_length = block_size + (causal and packing == 'concat')  # the last token of a causal row of the stream is a target only
train_rows = TokenRows(folder, 'train', row_length, packing, loss_on_padding)
val_rows = TokenRows(folder, val_split, row_length, packing, loss_on_padding)
tokenizer_meta = train_rows.meta['tokenizer']
mask_id = tokenizer_meta['mask_id']

if wandb_project and master:
    try:
        import wandb
    except ImportError:
        raise ValueError(f'wandb_project={wandb_project} needs the package wandb: pip install wandb') from None
if world_size > 1:
    if device.type == 'cuda':
        torch.cuda.set_device(device)
    dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo', timeout=datetime.timedelta(minutes=10))
os.makedirs(out_dir, exist_ok=True)
if master:                                            # what a killed run was writing
    for path in glob.glob(os.path.join(glob.escape(out_dir), '*.unfinished')):
        os.remove(path)

# -----------------------------------------------------------------------------
# the net, its average, the optimizer

torch.manual_seed(seed)
if device.type == 'cuda':
    torch.set_float32_matmul_precision('high')        # TF32 for what is not autocast
shape = {field.name: constants[field.name] for field in dataclasses.fields(ModelConfig) if field.name in constants}
if size is not None:
    shape |= {key: value for key, value in SIZES[size].items() if key != 'cond_dim' or cond_dim}
shape |= dict(vocab_size=tokenizer_meta['vocab_size'], mask_id=mask_id)
if causal and not head_mask and mask_id == shape['vocab_size'] - 1:  # no mask at all, as SMDM's causal nets
    shape |= dict(vocab_size=mask_id, mask_id=None, head_mask=True)
if init == 'xlm' and tokenizer_meta['pad_id'] != tokenizer_meta['eos_id']:
    shape['pad_id'] = tokenizer_meta['pad_id']

step, tokens_seen, best_val_loss, checkpoint, changed = 0, 0, math.inf, None, {}
check_overrides(overrides)
if not init_from:
    raise ValueError("init_from='': give 'scratch', 'resume' or a source of weights")
if init_from == 'auto':
    init_from = 'resume' if any(os.path.exists(os.path.join(out_dir, file)) for file in ('ckpt.pt', 'ckpt.prev.pt')) else 'scratch'
if init_from in ('scratch', 'resume'):
    net = DiT(ModelConfig(**shape))
else:
    net = load_pretrained(init_from, **dict(dropout=dropout, attn_dropout=attn_dropout, block_size=block_size, objective=objective) | (overrides or {}))
    check_objective(objective, T, subs_masking, importance, net.config.causal)
    theirs = get_tokenizer(**net.tokenizer).meta() if net.tokenizer else dict(vocab_size=net.config.vocab_size, mask_id=net.config.mask_id)
    if any(theirs[key] != tokenizer_meta[key] for key in theirs) and not (net.config.mask_id is None and net.config.vocab_size == mask_id):
        raise ValueError(f'init_from={init_from} has other token ids ({theirs}) than {folder} ({tokenizer_meta})')
if init_from == 'resume':
    checkpoint, failed = read_newest(out_dir)
    if failed and master:
        print(f'warning: {failed}; resuming from {out_dir}/ckpt.prev.pt, the checkpoint before it', flush=True)
        if os.path.exists(os.path.join(out_dir, 'ckpt.pt')):
            os.replace(os.path.join(out_dir, 'ckpt.pt'), os.path.join(out_dir, 'ckpt.bad.pt'))
        put(out_dir, 'ckpt.pt', 'ckpt.prev.pt')       # the next one must not make a predecessor of the broken one
    for key, ours in dataclasses.asdict(net.config).items():
        if checkpoint['model_config'].get(key) != ours and 'dropout' not in key:
            raise ValueError(f"{out_dir}/ckpt.pt has {key}={checkpoint['model_config'].get(key)!r}, the run {key}={ours!r}: they must agree to resume")
    if checkpoint['tokenizer'] != tokenizer_meta:
        raise ValueError(f"{out_dir}/ckpt.pt was trained with another tokenizer ({checkpoint['tokenizer']}) than {folder} ({tokenizer_meta})")
    if len(checkpoint['optimizer']) != (2 if optimizer == 'muon' else 1):
        raise ValueError(f"{out_dir}/ckpt.pt has the state of optimizer='{checkpoint['constants'].get('optimizer')}', the run '{optimizer}': they must agree to resume")
    changed = {key: value for key, value in constants.items() if checkpoint['constants'].get(key) != value and key != 'init_from'}
    if master:
        print(f"resuming at step {checkpoint['iter']:,}", *(f"{key}={value!r} (was {checkpoint['constants'].get(key)!r})" for key, value in changed.items()), sep=', ', flush=True)
    load_state(net, checkpoint['model'], out_dir)
    step, tokens_seen, best_val_loss = (checkpoint[key] for key in ('iter', 'tokens_seen', 'best_val_loss'))
if world_size > 1:                                    # folders that are not shared, or a disk that fails one of them
    steps = [None] * world_size
    dist.all_gather_object(steps, step)
    if len(set(steps)) > 1:
        raise ValueError(f'the processes would go on from different steps, {steps}: out_dir={out_dir} must be one folder that all of them read')
mean_length = block_size * (1 - ssl_ratio) + ssl_ratio * (1 + block_size) / 2
if flops is not None:
    max_iters = round(flops / (6 * net.num_params(embedding=False) * global_batch_size * mean_length))
    if max_iters < 1:
        raise ValueError(f'flops={flops:g} is less than one step: {6 * net.num_params(embedding=False) * global_batch_size * mean_length:.3g}')
warmup_iters = max(warmup_iters, round(warmup_share * max_iters))
ema_net = copy.deepcopy(net).eval().requires_grad_(False)
if checkpoint:
    load_state(ema_net, checkpoint['ema'], out_dir)
net.train()


class Loss(nn.Module):
    """The loss of a micro-batch, as a module: DDP and FSDP see to the forward of their own module alone, not to net.trunk."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, batch):
        if objective in ('subs', 'mlm'):
            loss = per_token_loss(self.net, batch['x0'], batch['xt'], batch['t'], objective, schedule, T, importance=importance, masked=batch['masked'],
                                  attended=batch['attended'])
        else:
            loss = nelbo_per_token(self.net, batch, schedule, T, subs_masking)
        if use_num_masked_factor:
            loss = loss / (1 + (batch['xt'] == mask_id).sum(dim=1, keepdim=True))
        if objective == 'mlm':
            return (loss * batch['scored']).sum() / max(batch['masked'].numel(), 1)
        return (loss * batch['scored']).sum() / batch['scored'].sum().clamp(min=1)  # on the device: no waiting for it


class Bound(Loss):
    """What is evaluated, (B, L): the NELBO of each token, of an 'ar' net its likelihood."""

    def forward(self, batch):
        return nelbo_per_token(self.net, batch, schedule, T, subs_masking)


loss_module, bound = Loss(net), Bound(ema_net)
if shard:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, distribute_tensor
    mesh = init_device_mesh(device.type, (world_size,))
    for module in (*net.blocks, *ema_net.blocks, loss_module, bound):
        fully_shard(module, mesh=mesh, reshard_after_forward=module is not loss_module)
else:
    net.to(device)
    ema_net.to(device)

matrices = {name for name, p in net.named_parameters() if p.dim() >= 2}
for_muon = {name for name in matrices if name.startswith('blocks.') and 'adaLN' not in name} if optimizer == 'muon' else set()
groups = [[p for name, p in net.named_parameters() if name not in for_muon and (name in matrices) == decay] for decay in (True, False)]
optimizers = [torch.optim.AdamW([dict(params=groups[0]), dict(params=groups[1], weight_decay=weight_decay if decay_all else 0.0)],
                                lr=learning_rate, betas=(beta1, beta2), weight_decay=weight_decay, fused=True)]
if for_muon:
    optimizers.append(torch.optim.Muon([p for name, p in net.named_parameters() if name in for_muon], lr=learning_rate,
                                       weight_decay=weight_decay, adjust_lr_fn='match_rms_adamw'))
if checkpoint:
    for opt, state in zip(optimizers, checkpoint['optimizer'], strict=True):
        settings = [{key: value for key, value in group.items() if key != 'params'} for group in opt.param_groups]
        if shard:
            for i, p in enumerate(p for group in opt.param_groups for p in group['params']):
                state['state'][i] = {key: distribute_tensor(x.to(device), mesh, p.placements) if x.shape == p.shape else x for key, x in state['state'].get(i, {}).items()}
        opt.load_state_dict(state)
        for group, setting in zip(opt.param_groups, settings):
            group.update(setting)                     # decay, betas: those of this run

if compile or compile is None and device.type == 'cuda':
    net.trunk = torch.compile(net.trunk)              # the trunk itself: torch.compile(net).trunk would run eagerly

if world_size > 1 and not shard:
    loss_module = DDP(loss_module, device_ids=[device.index] if device.type == 'cuda' else None, gradient_as_bucket_view=True)

# -----------------------------------------------------------------------------
# batches, evaluation, checkpoints


def row_length_of(step, micro):
    """SMDM's stochastic sequence length: L, but for a share ssl_ratio of the micro-batches one drawn from 1 ... L."""
    cut, length = torch.rand(2, generator=torch.Generator().manual_seed(key_of(seed, step, micro, 1)), dtype=torch.float64).tolist()
    return 1 + int(length * block_size) + (row_length - block_size) if cut < ssl_ratio else row_length


def training_batch(step, micro):
    """Micro-batch `micro` of a step. Its rows come from a permutation of each epoch; its times are every micro_batches-th of the strata
    of the global batch, so that each micro-batch has early and late ones."""
    index = step * global_batch_size + micro * batch_size + np.arange(batch_size)
    epoch, place = index // len(train_rows), index % len(train_rows)
    rows = np.concatenate([permute(place[epoch == e], len(train_rows), seed, e) for e in np.unique(epoch)])
    u = torch.rand((), generator=torch.Generator().manual_seed(key_of(seed, step)), dtype=torch.float64)
    t = stratified_times(u, micro + micro_batches * torch.arange(batch_size), global_batch_size)
    t = on_grid(t, T) if T else schedule.importance_time(t) if importance else t
    batch, length = train_rows[rows], row_length_of(step, micro)
    batch = {name: x[:, :length] for name, x in batch.items()}
    return corrupt_batch(batch, t, net.config, schedule, key_of(seed, step, micro), device, loss_on_visible_tokens)


@torch.no_grad()
def evaluate():
    """NELBO of the averaged weights (of an 'ar' net, the likelihood itself) on the first rows of val_split: nats a scored token, bits a
    byte. Rows, times and masks are the same each time, and so are the figures on any number of processes."""
    n = min(len(val_rows), eval_iters * global_batch_size)
    sums = torch.zeros(4, dtype=torch.float64)
    for start in range(rank * batch_size, n + (rank * batch_size if shard else 0), world_size * batch_size):
        indices = np.arange(min(start, n - 1), min(start + batch_size, n))  # past the end, FSDP takes part with a row that does not count
        t = stratified_times(0.5, torch.from_numpy(permute(indices, n, 0)), n)
        rows = val_rows[indices]
        batch = corrupt_batch(rows, on_grid(t, T) if T else t, net.config, schedule, key_of(start), device)
        with amp:
            loss = bound(batch)
        loss, scored = loss.cpu().double(), batch['scored'].cpu() & (start < n)
        known = scored & rows['document']
        sums += torch.stack([x.sum() for x in (loss * scored, scored, loss * known, known)])
    if world_size > 1:
        sums = sums.to(device)
        dist.all_reduce(sums)
    loss, scored, document_loss, document_tokens = sums.tolist()
    counts = val_rows.counts
    return loss / scored, document_loss / document_tokens * counts['tokens'] / counts['bytes'] / math.log(2)


def copied(state, buffer=None):
    """state, nested dicts and lists, with its tensors copied to the CPU: into those of buffer, an earlier result, where it has them."""
    if isinstance(state, torch.Tensor):
        if shard and isinstance(state, DTensor):
            state = state.full_tensor()
        if not master:
            return None
        if buffer is None or buffer.shape != state.shape:
            buffer = torch.empty(state.shape, dtype=state.dtype, pin_memory=device.type == 'cuda')
        return buffer.copy_(state.detach(), non_blocking=True)
    if isinstance(state, dict):
        return type(state)((key, copied(value, (buffer or {}).get(key))) for key, value in state.items())
    if isinstance(state, (list, tuple)):
        return [copied(value, buffer[i] if buffer and i < len(buffer) else None) for i, value in enumerate(state)]
    return state


def take_snapshot():
    global snapshot
    snapshot = copied(dict(model=net.state_dict(), ema=ema_net.state_dict(), optimizer=[opt.state_dict() for opt in optimizers]), snapshot)


def say(*words):
    """print, also where what it prints to is full."""
    with contextlib.suppress(OSError):
        print(*words, flush=True)


def save(*files):
    """Write a checkpoint under these names, in the background: the loop waits for the copy of the state alone."""
    global newest
    started = time.time()
    wait_for_save()
    if master or shard:
        take_snapshot()
    if not master:
        return
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    newest = snapshot | dict(iter=step, tokens_seen=tokens_seen, best_val_loss=best_val_loss, model_config=dataclasses.asdict(net.config),
                             constants=constants, tokenizer=tokenizer_meta), files, started, time.time() - started
    write_newest()


def write_newest():
    """Begin to write what save has copied."""
    global saving
    checkpoint, files, started, waited = newest
    if not os.path.isdir(out_dir):
        say(f'warning: {out_dir} is gone: it is made again, without what was in it')
        with contextlib.suppress(OSError):            # the checkpoint will say so
            open_metrics()

    def write():
        try:
            write_checkpoint(checkpoint, out_dir, files)
        except Exception as error:  # a full disk, a folder that is gone: whatever it is, it is told and tried again
            while error.__context__ and not isinstance(error, OSError):  # torch's own error comes after the disk's
                error = error.__context__
            failures.append(f"the checkpoint of step {checkpoint['iter']} could not be written to {out_dir} ({type(error).__name__}: {error})")
            return
        with contextlib.suppress(OSError):
            size = os.path.getsize(os.path.join(out_dir, files[0])) / 1e9
            say(f"step {checkpoint['iter']}: {', '.join(files)} written, {size:.2f} GB in {time.time() - started:.2f} s, {waited:.2f} s of which the training waited")

    saving = threading.Thread(target=write)
    saving.start()


def wait_for_save():
    """Wait until the last checkpoint is on the disk. Returns whether it is; if not, says why."""
    global saving
    if saving:
        saving.join()
        saving = None
    ok = not failures
    while failures:
        say(f'warning: {failures.pop()}; training goes on, the next one will be tried')
    return ok


def make_buffers():
    """The buffers of checkpoints, while training goes on: what they hold is of no account yet."""
    with contextlib.suppress(RuntimeError):           # the optimizer's state may be growing; then save makes them
        take_snapshot()


snapshot, newest, saving, failures = None, None, None, []


def get_lr(step):
    """Linear warm-up, then constant or cosine."""
    if step < warmup_iters:
        return learning_rate * (step + 1) / warmup_iters
    if lr_schedule == 'constant':
        return learning_rate
    done = (step - warmup_iters) / max(1, max_iters - warmup_iters)
    return min_lr + (learning_rate - min_lr) * 0.5 * (1 + math.cos(math.pi * done))


def open_metrics():
    global metrics
    os.makedirs(out_dir, exist_ok=True)
    metrics = open(os.path.join(out_dir, 'metrics.jsonl'), 'a', buffering=1)
    if tokenizer_meta['sha256']:                      # a tokenizer trained with the data goes where the weights go
        shutil.copy(os.path.join(folder, 'tokenizer.json'), out_dir)


def log(**line):
    try:
        metrics.write(json.dumps(line) + '\n')
    except OSError as error:
        say(f'warning: {metrics.name} cannot be written ({error})')
    if wandb_project:
        wandb.log(line, step=line['iter'])


def print_samples(n):
    if shard:
        print(f'no samples of a net that is shared out: python sample.py --out_dir={out_dir}')
        return
    ema_net.tokenizer, ema_net.constants = dict(name=tokenizer_meta['name'], folder=folder), constants
    with amp:
        out = generate(ema_net, n, block_size, steps=block_size, sampler=None, top_p=0.9, seed=seed)
    tok = get_tokenizer(**ema_net.tokenizer)
    for i, ids in enumerate(out.tokens.tolist()):
        print(f'--- sample {i} (top_p 0.9, {out.nfe[i]} network evaluations)\n{tok.decode(ids[:out.length[i]])}')


if master:
    path = os.path.join(out_dir, 'metrics.jsonl')
    kept, lines = [], []
    if os.path.exists(path):
        with open(path, errors='replace') as f:
            lines = f.readlines()
    if checkpoint:                                    # what came after the checkpoint is going to be done again
        kept = [line for line in lines if (match := re.match(r'\{"iter": (\d+), .*\}\n', line)) and int(match.group(1)) <= step]
    if kept != lines:
        try:
            with open(path + '.unfinished', 'w') as f:
                f.writelines(kept)
            os.replace(path + '.unfinished', path)
        except OSError as error:
            say(f'warning: {path} could not be cut back to step {step} ({error})')
    open_metrics()
    if changed:
        log(iter=step, changed=changed)
    if wandb_project:
        wandb.init(project=wandb_project, name=out_dir, config=constants)
    print(f'{net.num_params() / 1e6:.2f}M parameters ({net.num_params(embedding=False) / 1e6:.2f}M without embedding and head), {len(train_rows):,} rows of '
          f'{block_size} tokens, {len(train_rows) / global_batch_size:,.1f} steps an epoch; {world_size} x {device}, '
          f"{'bfloat16 autocast' if amp._enabled else 'float32'}; training to step {max_iters:,} in {out_dir}", flush=True)

# dense bf16 FLOP/s of GPUs, for the share of it that is used
PEAK = {'A100': 312e12, 'H100': 989e12, 'H200': 989e12, 'B200': 2250e12}
peak = next((rate for gpu, rate in PEAK.items() if device.type == 'cuda' and gpu in torch.cuda.get_device_name(device)), None)
step_flops = net.train_flops(global_batch_size, block_size, global_batch_size * block_size // (1 if causal else 2))  # about half are masked

# -----------------------------------------------------------------------------
# the loop

parameters, ema_parameters = list(net.parameters()), list(ema_net.parameters())
local = lambda p: p.to_local() if shard else p        # this process's share
del checkpoint
stop_signal = None


def ask_to_stop(number, frame):
    """SIGTERM and SIGUSR1, which queues send before they take the machine, and Ctrl-C: finish the step first. One more, later than torchrun
    passes the first on, ends at once."""
    global stop_signal, asked
    if stop_signal is not None and time.time() - asked > 3:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    elif stop_signal is None:
        stop_signal, asked = number, time.time()


for number in (signal.SIGTERM, signal.SIGINT, *([signal.SIGUSR1] if hasattr(signal, 'SIGUSR1') else [])):
    signal.signal(number, ask_to_stop)

start, timer, timed_from = step, time.time(), step
skipped = bad_steps = stopping = 0                    # updates skipped in all, and in a row; whether some process is asked to stop
typical_norm = None                                   # a running mean of the gradient norm
maker = ThreadPoolExecutor(1)                         # makes the next batch while this one is trained on
upcoming, began, waited = maker.submit(training_batch, step, rank), time.time(), 0.0
loss = micro_loss = None
while True:

    files = []
    if step > start and (step % eval_interval == 0 or step == max_iters):
        val_loss, val_bpb = evaluate()
        better = val_loss < best_val_loss
        best_val_loss = val_loss if better else best_val_loss  # no number is not better
        files += ['ckpt_best.pt'] * better
        if master:
            say(f'step {step}: validation {val_loss:.4f} nats/token, {val_bpb:.4f} bits/byte')
            log(iter=step, val_loss=val_loss, val_bpb=val_bpb)
            if sample_interval and step % sample_interval == 0:
                print_samples(1)
        timer, timed_from = time.time(), step         # evaluations are not counted in tokens/s
    hopeless = bad_steps >= max_bad_steps
    if step > start and (step % ckpt_interval == 0 or step == max_iters or stopping or hopeless):
        files = ['ckpt.pt', *files]
    if step > start and keep_interval and step % keep_interval == 0:
        files += [f'ckpt_{step}.pt']
    if files:
        save(*files)
    if step >= max_iters or stopping or hopeless:
        break

    lr = get_lr(step)
    for opt in optimizers:
        for group in opt.param_groups:
            group['lr'] = lr
    loss = 0.0
    for micro in my_micro_batches:
        waits = time.time()
        batch = upcoming.result()
        waited += time.time() - waits
        last = micro == my_micro_batches[-1]
        upcoming = maker.submit(training_batch, *((step + 1, rank) if last else (step, micro + world_size)))
        torch.manual_seed(key_of(seed, step, micro, 2))  # dropout: a stream of its own, not that of the masks
        with contextlib.nullcontext() if last or world_size == 1 or shard else loss_module.no_sync():
            with amp:
                micro_loss = loss_module(batch) / len(my_micro_batches)
            micro_loss.backward()
        loss += micro_loss.detach()
    gradients = [p.grad for p in parameters if p.grad is not None]
    grad_norm = nn.utils.get_total_norm(gradients)
    grad_norm = grad_norm.full_tensor() if shard else grad_norm
    state = torch.stack([loss.float(), (~torch.isfinite(loss + grad_norm)).float(), torch.full_like(loss, stop_signal is not None, dtype=torch.float32)])
    if world_size > 1:                                # all processes skip, and stop, together
        state[0] /= world_size
        dist.all_reduce(state, op=dist.ReduceOp.SUM)
    loss, bad, stopping, grad_norm = *state.tolist(), float(grad_norm)  # note: this waits for the device
    if not bad:
        if 0 < grad_clip < grad_norm:
            torch._foreach_mul_(gradients, grad_clip / grad_norm)
        for opt in optimizers:
            opt.step()
        with torch.no_grad():                         # step + 1 updates with this one
            torch._foreach_lerp_([local(p) for p in ema_parameters], [local(p) for p in parameters], 1 - min(ema, (2 + step) / (11 + step)))
    for opt in optimizers:
        opt.zero_grad(set_to_none=True)
    tokens_seen += sum(batch_size * row_length_of(step, micro) for micro in range(micro_batches)) - global_batch_size * (row_length - block_size)
    step += 1
    if step == start + 1 and master and not shard:    # the buffers of checkpoints, made while training goes on
        saving = threading.Thread(target=make_buffers)
        saving.start()
    bad_steps, skipped = (bad_steps + 1, skipped + 1) if bad else (0, skipped)
    if master and bad:
        say(f'step {step}: loss {loss}, grad norm {grad_norm}: no numbers, the update is skipped ({bad_steps} in a row, {skipped} since step {start:,})')
    if not bad and typical_norm and grad_norm > 10 * typical_norm and master:
        say(f'step {step}: grad norm {grad_norm:.2f}, where {typical_norm:.2f} is usual')
    if not bad:
        typical_norm = grad_norm if typical_norm is None else 0.98 * typical_norm + 0.02 * grad_norm

    if step % log_interval == 0 or step == start + 1:
        seconds = (time.time() - timer) / (step - timed_from)
        timer, timed_from = time.time(), step
        if master and not bad:
            rate = global_batch_size * block_size / seconds
            mfu = f', MFU {step_flops / seconds / peak / world_size:.1%}' if peak else ''
            left = datetime.timedelta(seconds=round(seconds * (max_iters - step)))
            say(f'step {step}: loss {loss:.3f}, lr {lr:.2e}, grad norm {grad_norm:.2f}, {rate:,.0f} tokens/s{mfu}, {left} left')
            log(iter=step, loss=loss, lr=lr, grad_norm=grad_norm, tokens_per_s=rate)

if master and step > start:
    say(f'the loop waited for its batches {waited / (time.time() - began):.2%} of the time')
saved = wait_for_save()
if not saved and master:
    write_newest()                                    # once more, before all is lost
    saved = wait_for_save()
if master and stopping and saved and step < max_iters:
    say(f'stopped by a signal after step {step}: go on with the same command and --init_from=resume')
if master and sample_at_end and step >= max_iters:
    print_samples(4)
if world_size > 1:
    dist.barrier()                                    # the others wait for the last checkpoint and the samples
    del loss_module, micro_loss, loss                 # gloo's threads end with what DDP holds: an exit before that aborts now and then
    gc.collect()
    dist.destroy_process_group()
if hopeless:
    raise ValueError(f'{bad_steps} steps in a row had no finite loss and gradient: stopped at step {step}, out_dir={out_dir} holds the last weights that were numbers; lower learning_rate')
if not saved:
    raise OSError(f'the last checkpoint could not be written to {out_dir}: the newest there is older than step {step}')
