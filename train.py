"""
Train a masked diffusion language model, on one process or any number under torchrun:

    python train.py config/quickstart.py
    torchrun --nproc_per_node=8 train.py config/owt_mlm.py
    torchrun --nnodes=2 --node_rank=0 --master_addr=HOST --nproc_per_node=8 train.py config/...

Everything random is a function of (seed, step, micro-batch): any number of processes sees the same
batches, and --init_from=resume continues a killed run as if it had never stopped.
"""
import contextlib
import copy
import dataclasses
import datetime
import functools
import gc
import glob
import json
import math
import os
import re
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from filelock import FileLock, Timeout
from torch.nn.parallel import DistributedDataParallel as DDP

from configurator import configure, constants_of, require
from data import TokenRows, find_or_prepare, get_tokenizer, key_of, permute
from model import (
    FAMILIES, OBJECTIVES, SIZES, CheckpointWriter, DiT, ModelConfig, autocast, build,
    check_objective, check_overrides, corrupt_batch, free_memory, likelihood_of, load_pretrained,
    load_state, memory_needed, on_grid, options_of, per_token_loss, pick_device, put,
    read_newest, reuse_memory, row_sums, say, schedule_of, stratified_times)
from sample import SAMPLERS, TAKES, generate

# input and output
out_dir = 'out'             # checkpoints and metrics.jsonl
init_from = 'scratch'       # 'scratch', 'resume', 'auto' (resume if there is a ckpt.pt) or weights
overwrite = False           # begin anew where out_dir holds a run: its files are removed
overrides = None            # [dict] fields of ModelConfig that weights cannot tell: "{'n_head': 4}"
eval_interval = 2000        # [> 0] steps
eval_iters = 20             # [>= 0] global batches of an evaluation, at most; 0: all of val_split
log_interval = 10           # [> 0] steps
ckpt_interval = 2000        # [> 0] steps; ckpt.pt is the latest, ckpt.prev.pt the one before it
keep_interval = 0           # [>= 0] steps; ckpt_<step>.pt is kept for ever; 0: none
sample_interval = 0         # [>= 0] steps; a sample before training, and on these; 0: never
sample_at_end = True        # print samples when training is done
eval_gen_ppl = False        # [bool] evaluations judge samples: generative perplexity, entropy
gen_ppl_judge = 'gpt2-large'  # ... by this causal net, a Hugging Face name or a folder
gen_ppl_samples = 16        # [int >= 1] ... so many of block_size tokens in block_size steps
wandb_project = None        # log to this project of wandb; None: only to metrics.jsonl
tensorboard = False         # log to TensorBoard too, in out_dir
# data
dataset = 'openwebtext'     # a folder in data/, or what data.py knows
tokenizer = None            # [str] of the data; None: the one that data/<dataset> was made with
val_split = 'validation'    # what evaluations are made on
packing = 'wrap'            # how rows are cut: a key of data.PACKINGS
loss_on_padding = True      # 'pad', 'pair': padding is masked and predicted like any token
pad_to = 'block'            # [block | batch] 'pair': rows of block_size, or of a step's longest
prompt_drop = 0.0           # [0 <= x <= 1] 'pair': share of micro-batches with their prompts masked
block_size = 1024           # tokens a row
batch_size = 32             # [> 0] rows a micro-batch
global_batch_size = 512     # [> 0] rows a step, of all processes and micro-batches together
ssl_ratio = 0.0             # [0 <= x <= 1] share of micro-batches cut to a random length (SMDM)
ssl_group = 1               # [int >= 1] neighbouring micro-batches that share a cut
# model
size = None                 # a name in model.SIZES, in place of the next four (and cond_dim)
n_layer = 12
n_head = 12
n_embd = 768
n_mlp = None                # [int] hidden width of the mlp; None: 4 * n_embd
cond_dim = 128              # width of the adaLN conditioning; 0: none
time_conditioning = False   # feed the noise level to the conditioning; False: always 0
causal = False              # attention looks back only: goes with objective 'ar'
mixer = 'attention'         # [attention | mamba] mamba: DiMamba, bidirectional, without an mlp
d_state = 16                # [int >= 1] mamba: numbers that a channel remembers
d_conv = 4                  # [int >= 1] mamba: taps of the convolution
expand = 2                  # [int >= 1] mamba: channels over n_embd
norm = 'layernorm'          # [layernorm | rmsnorm]
mlp = 'gelu'                # [gelu | relu | swiglu]
norm_bias = False           # norms with a bias
mlp_bias = True             # linears of the mlp with a bias
embed_norm = False          # a norm behind the embedding
head_bias = True            # vocabulary projection with a bias
unigram_bias = False        # ... that begins with the log-frequencies of the tokens
tied = False                # ... with the embedding's weights
head_mask = True            # ... with a row for the mask; False and causal: no mask at all
qkv_bias = False            # attention with biases, by which it looks at near tokens from the start
rotary_bf16 = False         # rotary table rounded to bfloat16 (SMDM)
dropout = 0.1               # on the residual branches
attn_dropout = 0.0          # on the attention weights
init = 'mdlm'               # [mdlm | xlm | smdm] of new weights
# objective
objective = 'subs'          # 'subs' (MDLM), 'mlm' (xlm's cross entropy), 'd3pm', 'sedd' or 'ar'
schedule = 'loglinear'      # of the noise: a key of model.SCHEDULES
schedule_parameters = None  # [dict] its own, "{'eps': 1e-4}"; None: its defaults
time_sampling = 'stratified'  # [stratified | per_process | iid] see times_of
sampling_eps = 1e-3         # [0 <= x < 1] the least time
max_time = 1.0              # [0 < x <= 1] the greatest; below 1 a training loss is no bound
T = 0                       # steps of the diffusion, for 'd3pm' and 'subs'; 0: continuous time
subs_masking = False        # d3pm: no probability for the mask
importance = False          # subs: draw times at which the weight of the loss is constant
use_num_masked_factor = False   # mlm: weigh a row by 1 / (1 + its masked positions)
loss_on_visible_tokens = False  # mlm: predict what is seen too
loss_norm = 'step'          # [step | micro] mean over what a step, or each micro-batch, scores
# optimizer
optimizer = 'adamw'         # [adamw | muon] muon: for the matrices of the blocks, adamw the rest
learning_rate = 3e-4        # [> 0]
max_iters = 1_000_000       # [> 0] steps
epochs = None               # [number > 0] passes over the rows, sets max_iters
flops = None                # [number > 0] 6 * non-embedding parameters * tokens, sets max_iters
lr_schedule = 'constant'    # [constant | cosine | linear] after the warm-up: to min_lr at the end
warmup_iters = 2500         # [>= 0] steps
warmup_share = 0.0          # [0 <= x < 1] of max_iters, if that is more than warmup_iters
min_lr = 0.0                # [>= 0]
lr_offset = None            # [0 <= x <= 1] where in a step its rate is read; None: 1, then 0
weight_decay = 0.0          # [>= 0]
decay_all = False           # decay every parameter; False: matrices only
beta1 = 0.9                 # [0 <= x < 1]
beta2 = 0.999               # [0 <= x < 1]
grad_clip = 1.0             # [>= 0] largest norm of the gradient; 0: no limit
ema = 0.9999                # [0 <= x < 1] decay of the average; step n: at most (1 + n) / (10 + n)
# system
device = 'auto'             # 'auto' (the first there is), 'cuda', 'cuda:1', 'mps', 'cpu'
dtype = 'auto'              # [auto | float32 | bfloat16] auto: bfloat16 if native to the device
compile = None              # [bool] torch.compile the trunk; None: on CUDA
seed = 0
max_bad_steps = 20          # [> 0] non-finite steps in a row, which are skipped, that end the run
shard = False               # FSDP in place of DDP, for nets that do not fit on one device
constants = configure(globals())

# -----------------------------------------------------------------------------
# who we are, and on what

rank = int(os.environ.get('RANK', 0))
local_rank = int(os.environ.get('LOCAL_RANK', 0))
world_size = int(os.environ.get('WORLD_SIZE', 1))
master = rank == 0
device = pick_device(device, local_rank)
amp = autocast(device, dtype)
if device.type == 'cpu':
    reuse_memory()

require(global_batch_size % (batch_size * world_size) == 0,
        f'global_batch_size={global_batch_size} is not divisible by batch_size={batch_size} times '
        f'{world_size} processes: make it a multiple of {batch_size * world_size}')
require(size in (None, *SIZES), f"size='{size}' is not known: choose from {', '.join(SIZES)}")
require(objective == 'mlm' or not (use_num_masked_factor or loss_on_visible_tokens),
        f"use_num_masked_factor and loss_on_visible_tokens go with mlm, not '{objective}'")
require(not shard or world_size > 1 and optimizer != 'muon',
        'shard=True shares the net among several processes, with adamw: Muon needs whole matrices')
require(init_from, "init_from='': give 'scratch', 'resume' or a source of weights")
require(epochs is None or flops is None, 'epochs and flops both set max_iters: give one of them')
is_pair = packing == 'pair'
require(is_pair or pad_to == 'block' and not prompt_drop,
        f"pad_to and prompt_drop go with packing 'pair', not '{packing}'")
require(not (causal and prompt_drop), 'prompt_drop goes with nets that are not causal')
check_overrides(overrides)
options = {name: constants[name] for record in OBJECTIVES.values() for name in record.options
           if name in constants}
check_objective(objective, T, options, causal)
record = OBJECTIVES[objective]
measured_by = record.bound or objective
require(measured_by in OBJECTIVES, f"objective '{objective}': its bound '{measured_by}' is not in "
        f"OBJECTIVES, which has {', '.join(OBJECTIVES)}")
require(not (sample_at_end or sample_interval or eval_gen_ppl) or record.sampler in SAMPLERS
        and record.predicts in TAKES[record.sampler],
        f"objective '{objective}' has no sampler: give it one in OBJECTIVES that is registered "
        f"with @sampler_for('{record.predicts}') in sample.py, or train with "
        '--sample_at_end=False --sample_interval=0')
if not record.bound and master:
    say(f"objective '{objective}' has no bound in OBJECTIVES: validation and eval.py measure its "
        'own loss, which is no likelihood')
schedule = schedule_of(constants)
if importance:
    schedule.sigma_range()  # refuses schedules without it
micro_batches = global_batch_size // batch_size  # of a step, on all processes together
my_micro_batches = range(rank, micro_batches, world_size)

folder = find_or_prepare(dataset, tokenizer)  # before the process group, which would time out
# the last token of a causal net's row is a target only
row_length = block_size + (causal and packing in ('concat', 'crop'))
loss_on_padding = loss_on_padding and not (is_pair and causal)  # its one EOS is the answer's
train_rows = TokenRows(folder, 'train', row_length, packing, loss_on_padding)
# what pads a batch is not measured, which would depend on the batch
val_rows = TokenRows(folder, val_split, row_length, packing,
                     loss_on_padding and pad_to == 'block', pad_to)
tokenizer_meta = train_rows.meta['tokenizer']
mask_id = tokenizer_meta['mask_id']
tokenizer_file = None  # of a tokenizer trained with the data: it goes where the weights go
if tokenizer_meta['sha256']:
    get_tokenizer(tokenizer_meta['name'], folder, tokenizer_meta)
    with open(os.path.join(folder, 'tokenizer.json'), 'rb') as f:
        tokenizer_file = f.read()

if eval_gen_ppl:
    require(not shard, 'eval_gen_ppl=True needs a net that is not shared out: give --shard=False')
    if master:
        from eval import generative_perplexity, load_judge, without_special
        judge = load_judge(gen_ppl_judge, device)
if wandb_project and master:
    try:
        import wandb
    except ImportError:
        raise ValueError(f'wandb_project={wandb_project} needs wandb: pip install wandb') from None
if tensorboard and master:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError('tensorboard=True needs it: pip install tensorboard') from None
if device.type == 'cuda':
    torch.set_float32_matmul_precision('high')  # TF32 for what is not autocast
if world_size > 1:
    if device.type == 'cuda':
        torch.cuda.set_device(device)
    dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo',
                            timeout=datetime.timedelta(minutes=10))

# -----------------------------------------------------------------------------
# what a run starts from


def shape_of_run():
    """Fields of ModelConfig by the constants. A warning is printed where one overrules another."""
    shape = {field.name: constants[field.name] for field in dataclasses.fields(ModelConfig)
             if field.name in constants}
    shape |= SIZES.get(size, {})
    if not cond_dim:
        shape['cond_dim'] = 0
    shape |= dict(vocab_size=tokenizer_meta['vocab_size'], mask_id=mask_id)
    if causal and not head_mask and mask_id == shape['vocab_size'] - 1:  # as SMDM's causal nets
        shape |= dict(vocab_size=mask_id, mask_id=None, head_mask=True)
    if init == 'xlm' and tokenizer_meta['pad_id'] != tokenizer_meta['eos_id']:
        shape['pad_id'] = tokenizer_meta['pad_id']

    overruled = {key: 'size' for key in SIZES.get(size, {}) if key != 'cond_dim'}
    for key in ('flops', 'epochs'):
        if constants[key] is not None:
            overruled['max_iters'] = key
    for key, by in overruled.items():
        default = constants_of(__file__)[key][0]
        if master and constants[key] not in (default, shape.get(key)):
            say(f'warning: {by}={constants[by]} says what {key} is, {key}={constants[key]} is '
                f'not used: give --{by}=None to choose it yourself')
    return shape


def warn_of_unused(config, source):
    """Say which constants were given for a net whose shape its source tells."""
    unused = [f'{key}={ours!r} (it has {config[key]!r})' for key, ours in shape.items()
              if key in constants and ours not in (constants_of(__file__)[key][0], config[key])]
    if unused and master:
        say(f'warning: {source} tells the shape of the net, not used are ' + ', '.join(unused))


def pretrained_net():
    fields = {key: shape[key] for key in ('dropout', 'attn_dropout', 'block_size', 'objective')}
    net = load_pretrained(init_from, trainable=True, **fields | (overrides or {}))
    warn_of_unused(dataclasses.asdict(net.config), init_from)
    check_objective(objective, T, options, net.config.causal)
    theirs = dict(vocab_size=net.config.vocab_size, mask_id=net.config.mask_id)
    if net.tokenizer:
        theirs = get_tokenizer(**net.tokenizer).meta()
    without_mask = net.config.mask_id is None and net.config.vocab_size == mask_id
    require(without_mask or theirs.items() <= tokenizer_meta.items(),
            f'init_from={init_from} has other ids ({theirs}) than {folder} ({tokenizer_meta}): '
            f'data with its ids are made by --tokenizer={init_from}')
    return net


def checkpoint_to_resume():
    """The newest whole checkpoint in out_dir. Raises ValueError where this run is not its run."""
    checkpoint, failed = read_newest(out_dir)
    path = f'{out_dir}/ckpt.pt'
    if failed and master:
        names = 'ckpt.prev.pt', 'ckpt_best.pt'
        older = next(name for name in names if os.path.exists(f'{out_dir}/{name}'))
        say(f'warning: {failed}; resuming from {out_dir}/{older}, the checkpoint before it')
        with contextlib.suppress(FileNotFoundError):
            os.replace(path, f'{out_dir}/ckpt.bad.pt')
        put(out_dir, 'ckpt.pt', older)  # not to keep the broken one at the next save
    theirs = checkpoint['tokenizer']
    require(theirs == tokenizer_meta, f'{path} was trained with another tokenizer ({theirs}) than '
            f'{folder} ({tokenizer_meta})')
    theirs = checkpoint['constants'].get('optimizer')
    require(len(checkpoint['optimizer']) == 1 + (optimizer == 'muon'),
            f"{path} has the state of optimizer='{theirs}', the run '{optimizer}': "
            'they must agree to resume')
    return checkpoint


def resumed_net():
    """The net of the checkpoint. Constants may differ from its shape where they are not given, or
    where they did so in the first run, which took its shape from weights."""
    path, before = f'{out_dir}/ckpt.pt', checkpoint['constants']
    wanted = {key: shape[key] for key in shape if key in constants} | (overrides or {})
    dropouts = {key: value for key, value in wanted.items() if 'dropout' in key}
    net = build(checkpoint['model_config'], dropouts, checkpoint['model'], path)
    config, defaults = dataclasses.asdict(net.config), constants_of(__file__)
    for key, ours in wanted.items():
        agrees = config[key] == ours
        if key not in (overrides or {}):
            agrees |= ours == defaults[key][0] and key not in ('block_size', 'objective')
            agrees |= all(before.get(name) == constants[name] for name in ('size', key))
        require(agrees, f'{path} has {key}={config[key]!r}, the run {key}={ours!r}: '
                'they must agree to resume')
    warn_of_unused(config, path)
    return net


def claim_out_dir():
    """Lock out_dir for this process -> the lock, which ends with it. Raises ValueError where a run
    is going on in it, where there is one that would be replaced, or where nothing can be written.
    """
    name = f'out_dir={out_dir}'
    lock = FileLock(os.path.join(out_dir, '.lock'))
    there = [os.path.basename(file) for pattern in ('ckpt*.pt', 'metrics.jsonl')
             for file in sorted(glob.glob(os.path.join(glob.escape(out_dir), pattern)))]
    if auto and there == ['metrics.jsonl']:
        there = []  # this run was killed before its first checkpoint
    require(init_from == 'resume' or overwrite or not there,
            f'{name} holds a run ({", ".join(there)}), which would be lost: go on with it '
            '(--init_from=resume), give another --out_dir, or replace it (--overwrite=True)')
    try:
        os.makedirs(out_dir, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f'{name}: another training is going on there, wait for its end or '
                         'give another --out_dir') from None
    except OSError as error:
        raise ValueError(f'{name} cannot be written to: {error}') from None
    except NotImplementedError:
        pass  # a file system without locks
    return lock


class Loss(nn.Module):
    """per_token_loss as a module: DDP and FSDP synchronise only the forward of what they wrap."""

    def __init__(self, net, objective, **options):
        super().__init__()
        self.net, self.objective = net, objective
        self.options = options

    def forward(self, batch, objective=None):
        """A batch of corrupt_batch -> (B, L) nats."""
        objective = objective or self.objective
        return per_token_loss(
            self.net, batch['x0'], batch['xt'], batch['t'], objective, schedule, T,
            batch['masked'], batch['attention_mask'], reconstruction=True,
            **options_of(objective, self.options))


def make_optimizers(net):
    by_muon, decayed, not_decayed = [], [], []
    for name, p in net.named_parameters():
        if p.dim() < 2 or name.endswith('A_log'):
            not_decayed.append(p)
        elif (optimizer == 'muon' and name.startswith('blocks.') and 'adaLN' not in name
              and p.dim() == 2):
            by_muon.append(p)
        else:
            decayed.append(p)
    groups = [dict(params=decayed),
              dict(params=not_decayed, weight_decay=weight_decay if decay_all else 0.0)]
    optimizers = [torch.optim.AdamW(groups, lr=learning_rate, betas=(beta1, beta2),
                                    weight_decay=weight_decay, fused=True)]
    if by_muon:
        optimizers.append(torch.optim.Muon(by_muon, lr=learning_rate, weight_decay=weight_decay,
                                           adjust_lr_fn='match_rms_adamw'))
    return optimizers


def check_memory(config):
    """Say what training takes. Raises ValueError where there is less, before it is allocated."""
    free = free_memory(device)
    if device.type != 'cuda':
        free /= int(os.environ.get('LOCAL_WORLD_SIZE', 1))

    def needed(rows):
        return memory_needed(
            config, rows, row_length, device, dtype, schedule, T, make_optimizers,
            len(my_micro_batches) > 1, loss_on_visible_tokens, world_size if shard else 1,
            **options_of(objective, options))

    parts = needed(batch_size)
    total = parts.pop('total')
    said = (f"{parts['weights'] * world_size ** shard / 4e6:.2f}M parameters and {batch_size} rows "
            f'of {row_length} need {total / 1e9:.2f} GB ('
            + ', '.join(f'{name} {size / 1e9:.2f}' for name, size in parts.items())
            + f'), {free / 1e9:.2f} GB are free on {device}')
    compiled = compile or compile is None and device.type == 'cuda'  # saves activations
    if total - compiled * parts['activations'] > free:
        fewer = [rows for rows in range(batch_size - 1, 0, -1) if batch_size % rows == 0]
        fits = next((rows for rows in fewer if needed(rows)['total'] <= free), None)
        remedy = f'lower batch_size, {fits} fits' if fits else (
            'lower n_layer, n_embd or block_size, batch_size is not enough')
        raise ValueError(f'{said}: {remedy}')
    if master:
        say(said)


# -----------------------------------------------------------------------------
# the net, its average, the optimizer

torch.manual_seed(seed)
step, tokens_seen, best_val_loss = 0, 0, math.inf
wandb_id = None
checkpoint, changed = None, {}
auto = init_from == 'auto'
if auto:
    names = 'ckpt.pt', 'ckpt.prev.pt', 'ckpt_best.pt'
    found = any(os.path.exists(f'{out_dir}/{name}') for name in names)
    init_from = 'resume' if found else 'scratch'
shape = shape_of_run()
net = None
if init_from == 'resume':
    checkpoint = checkpoint_to_resume()
    net = resumed_net()
elif init_from != 'scratch':
    net = pretrained_net()
model_config = net.config if net else ModelConfig(**shape)
if checkpoint:
    step, tokens_seen = checkpoint['iter'], checkpoint['tokens_seen']
    best_val_loss = checkpoint['best_val_loss']
    wandb_id = checkpoint.get('wandb_id')
if flops is not None:
    mean_length = block_size * (1 - ssl_ratio) + ssl_ratio * (1 + block_size) / 2
    with torch.device('meta'):
        num_params = DiT(model_config).num_params(embedding=False)
    one_step = 6 * num_params * global_batch_size * mean_length
    max_iters = round(flops / one_step)
    require(max_iters > 0, f'flops={flops:g} is less than one step: {one_step:.3g}')
if epochs is not None:
    max_iters = int(len(train_rows) * epochs / global_batch_size)
    require(max_iters > 0, f'epochs={epochs} of {len(train_rows):,} rows are less than one step of '
            f'global_batch_size={global_batch_size}')
constants['max_iters'] = max_iters  # what epochs and flops came to
warmup_iters = max(warmup_iters, round(warmup_share * max_iters))
if checkpoint and step >= max_iters:
    if master:
        say(f'{out_dir} is finished: it is at step {step:,} of {max_iters:,}; '
            'a larger --max_iters goes on')
    if world_size > 1:
        dist.destroy_process_group()
    sys.exit()
check_memory(model_config)
lock = claim_out_dir() if master else None
net = net or DiT(model_config)
if unigram_bias and head_bias and init_from == 'scratch':
    ids = train_rows.tokens[:2 ** 24].astype(np.int64)
    counts = torch.from_numpy(np.bincount(ids, minlength=net.config.vocab_size)) + 1
    with torch.no_grad():
        net.lm_head.bias.copy_((counts / counts.sum()).log()[:len(net.lm_head.bias)])
before = checkpoint['constants'] if checkpoint else net.constants
# how nets of its family are prompted and measured
constants |= {key: before[key] for family in FAMILIES.values() for key in family.constants
              if key in before and key not in constants}
ema_net = copy.deepcopy(net)
if checkpoint:
    load_state(ema_net, checkpoint['ema'], out_dir)
    for key in shape.keys() & before.keys() - {'dropout', 'attn_dropout'}:
        constants[key] = before[key]
    changed = {key: value for key, value in constants.items()
               if before.get(key) != value and key not in ('init_from', 'overwrite')}
    if master:
        changes = [f'{key}={value!r} (was {before.get(key)!r})' for key, value in changed.items()]
        say(', '.join([f'resuming at step {step:,}', *changes]))
net.train()
ema_net.eval().requires_grad_(False)
if world_size > 1:  # folders may not be shared, a disk may fail one of them
    steps = [None] * world_size
    dist.all_gather_object(steps, step)
    require(len(set(steps)) == 1, f'the processes would resume at different steps, {steps}: '
            f'out_dir={out_dir} must be one folder for all')
of_noise = 'schedule', 'schedule_parameters', 'time_sampling', 'sampling_eps', 'max_time'
needs = dict.fromkeys(of_noise, ('an objective with noise', not causal)) | {
    'min_lr': ("lr_schedule='cosine'", lr_schedule != 'constant'),
    'warmup_share': ('a larger max_iters', warmup_share * max_iters > constants['warmup_iters']),
    'loss_on_padding': ("packing='pad' or 'pair'", packing in ('pad', 'pair')),
    'ssl_group': ('ssl_ratio', ssl_ratio),
    'unigram_bias': ('head_bias', head_bias),
    'overrides': ('weights in init_from', init_from not in ('scratch', 'resume')),
    'gen_ppl_judge': ('eval_gen_ppl', eval_gen_ppl),
    'gen_ppl_samples': ('eval_gen_ppl', eval_gen_ppl),
}
idle = [f'{key}={constants[key]!r} (it needs {what})' for key, (what, used) in needs.items()
        if not used and constants[key] != constants_of(__file__)[key][0]]
if idle and master:
    say('warning: these do nothing: ' + ', '.join(idle))

loss_module = Loss(net, objective, **options)
eval_loss = Loss(ema_net, measured_by, **options | dict(importance=False))
if shard:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_tensor
    mesh = init_device_mesh(device.type, (world_size,))
    for module in (*net.blocks, *ema_net.blocks, loss_module, eval_loss):
        fully_shard(module, mesh=mesh, reshard_after_forward=module is not loss_module)
else:
    net.to(device)
    ema_net.to(device)
optimizers = make_optimizers(net)
if checkpoint:
    for opt, saved in zip(optimizers, checkpoint['optimizer'], strict=True):
        state = saved['state']
        if shard:
            sharded = [p for group in opt.param_groups for p in group['params']]
            for i, p in enumerate(sharded):
                state[i] = {key: distribute_tensor(x.to(device), mesh, p.placements)
                            if x.shape == p.shape else x for key, x in state.get(i, {}).items()}
        # the groups' settings (decay, betas) are those of this run
        opt.load_state_dict(dict(state=state, param_groups=opt.state_dict()['param_groups']))
    del checkpoint, saved, state
if compile or compile is None and device.type == 'cuda':
    net.trunk = torch.compile(net.trunk)  # torch.compile(net).trunk would run eagerly
if world_size > 1 and not shard:
    loss_module = DDP(loss_module, device_ids=[device.index] if device.type == 'cuda' else None,
                      gradient_as_bucket_view=True)

# -----------------------------------------------------------------------------
# batches, evaluation, logs


def rows_of(step, first, n):
    """n indices of a step's rows, from its `first` on. Each epoch permutes the rows."""
    index = step * global_batch_size + first + np.arange(n)
    epoch, place = index // len(train_rows), index % len(train_rows)
    return np.concatenate([permute(place[epoch == e], len(train_rows), seed, e)
                           for e in np.unique(epoch)])


@functools.lru_cache(4)
def longest_row_of(step):
    """pad_to: the length of all rows of a step that are not cut."""
    if pad_to == 'block':
        return row_length
    return train_rows.longest(rows_of(step, 0, global_batch_size))


def row_length_of(step, micro):
    """SMDM's stochastic sequence length: some micro-batches draw one from 1 ... block_size."""
    generator = torch.Generator().manual_seed(key_of(seed, step, micro // ssl_group, 1))
    cut, length = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
    if cut >= ssl_ratio:
        return longest_row_of(step)
    return 1 + int(length * block_size) + (row_length - block_size)


def times_of(step, micro):
    """Times (batch_size,). 'stratified': over the global batch, by one uniform, and interleaved so
    that those of each micro-batch span [0, 1]. 'per_process' (MDLM): each row of a micro-batch in
    a stratum, by its own uniform. 'iid' (SMDM, xlm)."""
    row = torch.arange(batch_size)
    if time_sampling == 'stratified':
        generator = torch.Generator().manual_seed(key_of(seed, step))
        u = torch.rand((), generator=generator, dtype=torch.float64)
        strata = micro + micro_batches * row
        return stratified_times(u, strata, global_batch_size, sampling_eps, max_time)
    n = batch_size if time_sampling == 'per_process' else 1
    generator = torch.Generator().manual_seed(key_of(seed, step, micro, 3))
    u = torch.rand(batch_size, generator=generator, dtype=torch.float64) / n
    return stratified_times(u, row % n, n, sampling_eps, max_time)


def training_batch(step, micro):
    """Micro-batch `micro` of a step."""
    rows = rows_of(step, micro * batch_size, batch_size)
    t = times_of(step, micro)
    if T:
        t = on_grid(t, T)
    elif importance:
        t = schedule.importance_time(t)
    length = row_length_of(step, micro)
    batch = {name: x[:, :length] for name, x in train_rows[rows].items()}
    generator = torch.Generator().manual_seed(key_of(seed, step, micro, 4))
    drop = torch.rand((), generator=generator).item() < prompt_drop
    return corrupt_batch(batch, t, net.config, schedule, key_of(seed, step, micro), device,
                         loss_on_visible_tokens, drop_prompt=drop)


def mean_loss(loss, batch):
    """(B, L) nats -> the loss, and the share of its divisor's positions that are scored.
    loss_norm 'step': over all positions; the loop then divides by the share of the whole step."""
    if use_num_masked_factor:
        loss = loss / (1 + (batch['xt'] == mask_id).sum(dim=1, keepdim=True))
    if objective == 'mlm':
        count = torch.tensor(batch['masked'].numel())
    else:
        count = batch['scored'].sum()  # on the device: no waiting for it
    divisor = batch_size * (row_length - causal)  # nothing predicts column 0 of a causal net
    if loss_norm == 'micro':
        divisor = count = count.clamp(min=1)
    return (loss * batch['scored']).sum() / divisor, count / divisor


@torch.no_grad()
def evaluate():
    """What the averaged weights reach on the first rows of val_split (model.likelihood_of), and
    what is logged of it; of mlm nets also the mean cross entropy at masked positions (xlm). Rows,
    times and masks are always the same."""
    n = min(len(val_rows), eval_iters * global_batch_size or len(val_rows))
    first = rank * batch_size
    sums = torch.zeros(6, n, dtype=torch.float64)
    # past the end, FSDP takes part with a row that does not count
    for start in range(first, n + first if shard else n, world_size * batch_size):
        indices = np.arange(min(start, n - 1), min(start + batch_size, n))
        t = stratified_times(0.5, torch.from_numpy(permute(indices, n, 0)), n, sampling_eps)
        if T:
            t = on_grid(t, T)
        rows = val_rows[indices]
        batch = corrupt_batch(rows, t, net.config, schedule, key_of(start), device)
        with amp:
            loss = eval_loss(batch)
            cross_entropy = eval_loss(batch, 'mlm') if objective == 'mlm' else None
        if start < n:
            sums[:4, indices] = row_sums(loss, batch, rows)
        if start < n and objective == 'mlm':
            masked = dict(scored=batch['scored'] & (batch['xt'] == mask_id))
            sums[4:, indices] = row_sums(cross_entropy, masked, rows)[:2]
    if world_size > 1:
        sums = sums.to(device)
        dist.all_reduce(sums)
        sums = sums.cpu()
    found = likelihood_of(sums[:4], val_rows.counts, objective)
    logged = dict(val_loss=found['nats_per_token' if record.bound else objective],
                  val_bpb=found.get('bits_per_byte'))
    cross_entropy, masked = sums[4:].sum(dim=1).tolist()
    return found, logged | (dict(val_mlm_loss=cross_entropy / masked) if masked else {})


def get_lr(step):
    """Linear warm-up, then lr_schedule."""
    if step + (lr_offset or 0) < warmup_iters:
        return learning_rate * (step + (1 if lr_offset is None else lr_offset)) / warmup_iters
    if lr_schedule == 'constant':
        return learning_rate
    done = (step + (lr_offset or 0) - warmup_iters) / max(1, max_iters - warmup_iters)
    left = 1 - done if lr_schedule == 'linear' else 0.5 * (1 + math.cos(math.pi * done))
    return min_lr + (learning_rate - min_lr) * left


def cut_metrics():
    """Drop the lines after this step, which is done again."""
    if not os.path.exists(metrics_path):
        return
    with open(metrics_path, errors='replace') as f:
        matches = [re.match(r'\{"iter": (\d+), .*\}\n', line) for line in f]
    kept = [match[0] for match in matches if match and int(match[1]) <= step]
    try:
        with open(metrics_path + '.unfinished', 'w') as f:
            f.writelines(kept)
        os.replace(metrics_path + '.unfinished', metrics_path)
    except OSError as error:
        say(f'warning: {metrics_path} could not be cut back to step {step} ({error})')


def log(**line):
    try:
        with open(metrics_path, 'a') as f:
            f.write(json.dumps(line) + '\n')
    except OSError as error:
        say(f'warning: {metrics_path} cannot be written ({error})')
    if wandb_project:
        wandb.log(line, step=line['iter'])
    if tensorboard:
        for key in line.keys() - {'iter', 'changed'}:
            board.add_scalar(key, line[key], line['iter'])


def texts_of_average(n, **options):
    """n texts of the averaged weights, and the network evaluations of each; [] where it fails."""
    ema_net.tokenizer = dict(name=tokenizer_meta['name'], folder=folder)
    ema_net.constants = constants
    try:
        with amp:
            out = generate(ema_net, n, block_size, steps=block_size, sampler=None, seed=seed,
                           **options)
        tok = get_tokenizer(**ema_net.tokenizer)
    except Exception as error:  # a tokenizer that is gone, a full device
        say(f'warning: no samples ({type(error).__name__}: {error})')
        return [], []
    texts = [tok.decode(ids[:n]) for ids, n in zip(out.tokens.tolist(), out.length, strict=True)]
    return texts, out.nfe


def judge_samples():
    """The generative perplexity of samples, nothing truncated, and their entropy in nats."""
    texts, _ = texts_of_average(gen_ppl_samples, batch_size=batch_size)
    texts = [without_special(text, judge[1]) for text in texts]
    try:
        found = generative_perplexity(texts, judge, 'xlm', min(batch_size, 8))
    except ValueError as error:  # nothing but special tokens, not a number
        say(f'warning: no generative perplexity ({error})')
        return {}
    say(f"step {step}: generative perplexity {found['gen_ppl']:.2f}, entropy "
        f"{found['entropy']:.2f} of {found['texts']} samples by {gen_ppl_judge}")
    return {key: found[key] for key in ('gen_ppl', 'entropy')}


def print_samples(n, when):
    """-> their texts"""
    if shard:
        say(f'no samples of a net that is shared out: python sample.py --out_dir={out_dir}')
        return []
    texts, nfe = texts_of_average(n, temperature=0.7)
    for i, text in enumerate(texts):
        say(f'--- sample {i} {when} (temperature 0.7, {nfe[i]} network evaluations)\n{text}')
    if wandb_project and texts:
        table = wandb.Table(columns=['step', 'text'], data=[[step, text] for text in texts])
        wandb.log(dict(samples=table), step=step)
    return texts


def training_state():
    states = [opt.state_dict() for opt in optimizers]
    return dict(model=net.state_dict(), ema=ema_net.state_dict(), optimizer=states)


stop_requests = []  # when


def ask_to_stop(number, frame):
    """Finish the step first. One more, later than torchrun passes the first on, ends at once."""
    stop_requests.append(time.monotonic())
    if master and len(stop_requests) == 1:
        with contextlib.suppress(OSError):  # not by print, which may be what is interrupted
            os.write(1, b'stopping after this step; a second signal, seconds later, ends at once\n')
    if stop_requests[-1] - stop_requests[0] > 3:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


# -----------------------------------------------------------------------------
# the loop

metrics_path = os.path.join(out_dir, 'metrics.jsonl')
writer = CheckpointWriter(out_dir, device, master, tokenizer_file)
if master:
    stale = ['ckpt*.unfinished', 'metrics.jsonl.unfinished']  # what a killed run was writing
    if overwrite and init_from != 'resume':
        stale += ['ckpt*.pt', 'metrics.jsonl', 'tokenizer.json']
    for pattern in stale:
        for path in glob.glob(os.path.join(glob.escape(out_dir), pattern)):
            os.remove(path)
    cut_metrics()
    if wandb_project:
        wandb_id = wandb.init(project=wandb_project, name=out_dir, config=constants, id=wandb_id,
                              resume='allow').id
    if tensorboard:
        board = SummaryWriter(out_dir)
    if changed:
        log(iter=step, changed=changed)
    left_out = f' ({train_rows.left_out:,} longer ones left out)' if train_rows.left_out else ''
    say(f'{net.num_params() / 1e6:.2f}M parameters '
        f'({net.num_params(embedding=False) / 1e6:.2f}M without embedding and head), '
        f'{len(train_rows):,} rows of {block_size} tokens{left_out}, '
        f'{len(train_rows) / global_batch_size:,.1f} steps an epoch; {world_size} x {device}, '
        f"{'bfloat16 autocast' if amp._enabled else 'float32'}; "
        f'training to step {max_iters:,} in {out_dir}')

# dense bf16 FLOP/s, for the share that is used
PEAK = {'A100': 312e12, 'H100': 989e12, 'H200': 989e12, 'B200': 2250e12}
gpu = torch.cuda.get_device_name(device) if device.type == 'cuda' else ''
peak = next((PEAK[name] for name in PEAK if name in gpu), None)

for name in ('SIGTERM', 'SIGINT', 'SIGUSR1'):  # queues send the first or the last
    if hasattr(signal, name):
        signal.signal(getattr(signal, name), ask_to_stop)

parameters, ema_parameters = list(net.parameters()), list(ema_net.parameters())
start = step
timer, timed_from = time.monotonic(), step
skipped = 0          # updates skipped in all,
bad_steps = 0        # and in a row
stopping = 0         # whether some process is asked to stop
typical_norm = None  # a running mean of the gradient norm
maker = ThreadPoolExecutor(1)  # makes the next batch while this one is trained on
upcoming = maker.submit(training_batch, step, rank)
untrained = print_samples(1, 'before training') if master and sample_interval and not step else []
began, waited = time.monotonic(), 0.0
while True:

    better = False
    if step > start and (step % eval_interval == 0 or step == max_iters):
        found, logged = evaluate()
        val_loss = logged['val_loss']
        better = val_loss < best_val_loss  # NaN is never better
        if better:
            best_val_loss = val_loss
        if master:
            say(f'step {step}: validation ' + ', '.join(
                f"{found[name]:.4f} ± {found[name + '_se']:.4f} {name.replace('_per_', '/')}"
                for name in ('nats_per_token', 'bits_per_byte', objective) if name in found)
                + f" (first {found['rows']:,} of {len(val_rows):,} rows, one time each)")
            if eval_gen_ppl:
                logged |= judge_samples()
            log(iter=step, **logged)
            at_end = sample_at_end and step == max_iters
            if sample_interval and step % sample_interval == 0 and not at_end:
                print_samples(1, f'at step {step}')
        timer, timed_from = time.monotonic(), step  # evaluations do not count in tokens/s
    hopeless = bad_steps >= max_bad_steps
    ending = step >= max_iters or stopping or hopeless
    files = []
    if step > start and (step % ckpt_interval == 0 or ending):
        files.append('ckpt.pt')
    if better:
        files.append('ckpt_best.pt')
    if step > start and keep_interval and step % keep_interval == 0:
        files.append(f'ckpt_{step}.pt')
    if files:
        of_wandb = dict(wandb_id=wandb_id) if wandb_id else {}
        writer.save(training_state(), files, iter=step, tokens_seen=tokens_seen,
                    best_val_loss=best_val_loss, model_config=dataclasses.asdict(net.config),
                    constants=constants, tokenizer=tokenizer_meta, **of_wandb)
    if ending:
        break

    lr = get_lr(step)
    for opt in optimizers:
        for group in opt.param_groups:
            group['lr'] = lr
    loss, filled = 0.0, torch.zeros((), device=device)
    for micro in my_micro_batches:
        waiting_from = time.monotonic()
        batch = upcoming.result()
        waited += time.monotonic() - waiting_from
        last = micro == my_micro_batches[-1]
        following = (step + 1, rank) if last else (step, micro + world_size)
        upcoming = maker.submit(training_batch, *following)
        torch.manual_seed(key_of(seed, step, micro, 2))  # dropout has a stream of its own
        synchronised = last or world_size == 1 or shard
        with contextlib.nullcontext() if synchronised else loss_module.no_sync():
            with amp:
                micro_loss, part = mean_loss(loss_module(batch), batch)
                micro_loss = micro_loss / len(my_micro_batches)
            micro_loss.backward()
        loss += micro_loss.detach()
        filled += part
    gradients = [p.grad for p in parameters if p.grad is not None]
    grad_norm = nn.utils.get_total_norm(gradients)
    if shard:
        grad_norm = grad_norm.full_tensor()
    bad = ~torch.isfinite(loss + grad_norm)
    status = torch.stack([loss.float(), filled / len(my_micro_batches), bad.float(),
                          torch.full_like(loss, bool(stop_requests), dtype=torch.float32)])
    if world_size > 1:  # all processes skip, and stop, together
        status[0] /= world_size
        dist.all_reduce(status, op=dist.ReduceOp.SUM)
    loss, filled, bad, stopping = status.tolist()  # note: this waits for the device
    scale = world_size / (filled or world_size)  # to the mean over what the whole step scores
    loss, grad_norm = loss * scale, float(grad_norm) * scale
    if not bad:
        if 0 < grad_clip < grad_norm:
            scale *= grad_clip / grad_norm
        if scale != 1:
            torch._foreach_mul_(gradients, scale)
        for opt in optimizers:
            opt.step()
        with torch.no_grad():
            decay = min(ema, (2 + step) / (11 + step))  # step + 1 updates with this one
            pair = ema_parameters, parameters
            if shard:  # what this process holds of them
                pair = ([p.to_local() for p in tensors] for tensors in pair)
            torch._foreach_lerp_(*pair, 1 - decay)
    for opt in optimizers:
        opt.zero_grad(set_to_none=True)
    tokens_seen -= global_batch_size * (row_length - block_size)
    tokens_seen += sum(batch_size * row_length_of(step, micro) for micro in range(micro_batches))
    step += 1
    if step == start + 1 and master and not shard:
        writer.make_buffers(training_state())
    if bad:
        bad_steps += 1
        skipped += 1
        if master:
            say(f'step {step}: loss {loss}, grad norm {grad_norm}: not finite, the update is '
                f'skipped ({bad_steps} in a row, {skipped} since step {start:,})')
    else:
        bad_steps = 0
        if master and typical_norm and grad_norm > 10 * typical_norm:
            say(f'step {step}: grad norm {grad_norm:.2f}, where {typical_norm:.2f} is usual')
        if typical_norm is None:
            typical_norm = grad_norm
        else:
            typical_norm = 0.98 * typical_norm + 0.02 * grad_norm

    if step % log_interval == 0 or step == start + 1:
        seconds = (time.monotonic() - timer) / (step - timed_from)
        timer, timed_from = time.monotonic(), step
        if master and not bad:
            length = min(block_size, longest_row_of(step - 1))
            rate = global_batch_size * length / seconds
            mfu = ''
            if peak:
                projected = global_batch_size * block_size // (1 if causal else 2)  # the masked
                used = net.train_flops(global_batch_size, block_size, projected) / seconds
                mfu = f', MFU {used / peak / world_size:.1%}'
            left = min(seconds * (max_iters - step), 1e13)  # timedelta overflows
            left = datetime.timedelta(seconds=round(left))
            say(f'step {step}: loss {loss:.3f}, lr {lr:.2e}, grad norm {grad_norm:.2f}, '
                f'{rate:,.0f} tokens/s{mfu}, {left} left')
            log(iter=step, loss=loss, lr=lr, grad_norm=grad_norm, tokens_per_s=rate)

if master and step > start:
    say(f'the loop waited for its batches {waited / (time.monotonic() - began):.2%} of the time')
saved = writer.wait() or writer.retry()
if master and stopping and saved and step < max_iters:
    say(f'stopped by a signal after step {step}: '
        'go on with the same command and --init_from=resume')
if master and sample_at_end and step >= max_iters:
    if untrained:
        say(f'--- sample 0 before training, again\n{untrained[0]}')
    print_samples(4, f'after {step} steps')
    say(f'next: python sample.py --out_dir={out_dir} --watch=True (or --trace=trace.html), and '
        f'python eval.py --out_dir={out_dir}')
if master:
    with contextlib.suppress(OSError):
        os.remove(lock.lock_file)  # whoever waits for the one that is gone makes another
    lock.release()
    if tensorboard:
        board.close()
if world_size > 1:
    dist.barrier()  # the others wait for the last checkpoint and the samples
    loss_module = micro_loss = None  # gloo's threads end with what DDP holds, or exiting may abort
    gc.collect()
    dist.destroy_process_group()
require(not hopeless,
        f'{bad_steps} steps in a row had no finite loss and gradient: stopped at step {step}, '
        f'{out_dir} holds the last finite weights; lower learning_rate')
if not saved:
    raise OSError(f'the last checkpoint could not be written to {out_dir}: '
                  f'the newest there is older than step {step}')
