"""
Train a masked diffusion language model, on one process or any number under torchrun:

    python train.py config/quickstart.py
    torchrun --nproc_per_node=8 train.py config/owt_mlm.py
    torchrun --nnodes=2 --node_rank=0 --master_addr=HOST --nproc_per_node=8 train.py config/...

Everything random is a function of (seed, step, micro-batch): any number of processes sees the same
batches, and --init_from=resume continues a killed run as if it had never stopped.
"""
from configurator import configure, constants_of, require  # first: it answers Ctrl-C

import atexit
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
import pathlib
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

from data import TokenRows, find_or_prepare, get_tokenizer, key_of, permute
from model import (
    FAMILIES, FIELDS, OBJECTIVES, SIZES, CheckpointWriter, DiT, ModelConfig, autocast, build,
    check_objective, corrupt_batch, free_memory, likelihood_of, load_pretrained,
    load_state, memory_needed, on_grid, options_of, per_token_loss, pick_device, put, read_newest,
    require_known, reuse_memory, row_sums, say, schedule_of, stratified_times, with_error,
    write_whole)
from sample import TAKES, generate

# the constants; configurator.py checks what stands in [...]
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
block_length = None         # [int >= 1] block diffusion (BD3-LM): tokens noised together; None: all
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
ar_share = 0.0              # [0 <= x < 1] share of max_iters: a new net begins as a causal one
t_range = None              # [tuple] (least, most) time of training; None: (sampling_eps, 1)
first_given = False         # [bool] the first token of a row is neither masked nor scored (BD3-LM)
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
momentum = 0.95             # [0 <= x < 1] of muon
grad_clip = 1.0             # [>= 0] largest norm of the gradient; 0: no limit
ema = 0.9999                # [0 <= x < 1] decay of the average; step n: at most (1 + n) / (10 + n)
# system
device = 'auto'             # 'auto' (the first there is), 'cuda', 'cuda:1', 'mps', 'cpu'
dtype = 'auto'              # [auto | float32 | bfloat16] auto: bfloat16 if native to the device
compile = None              # [bool] torch.compile the trunk; None: on CUDA
seed = 0
memory_check = True         # refuse what needs more memory than is free; False: only say it
max_bad_steps = 20          # [> 0] non-finite steps in a row, which are skipped, that end the run
shard = False               # FSDP in place of DDP, for nets that do not fit on one device
constants = configure(globals())

# -----------------------------------------------------------------------------
# who we are, on what, with which rows

rank = int(os.environ.get('RANK', 0))
world_size = int(os.environ.get('WORLD_SIZE', 1))
master = rank == 0
device = pick_device(device, int(os.environ.get('LOCAL_RANK', 0)))
amp = autocast(device, dtype)
on_gpu = device.type == 'cuda'
if compile is None:
    compile = on_gpu
if device.type == 'cpu':
    reuse_memory(now=False)

options = {name: constants[name] for record in OBJECTIVES.values() for name in record.options
           if name in constants}
check_objective(objective, T, options, causal)
if size is not None:
    require_known('size=', size, SIZES)
record = OBJECTIVES[objective]
measured_by = record.bound or objective
is_pair = packing == 'pair'
require(global_batch_size % (batch_size * world_size) == 0,
        f'global_batch_size={global_batch_size} is not divisible by batch_size={batch_size} '
        f'* {world_size} processes')
require(record.over_masked or not (use_num_masked_factor or loss_on_visible_tokens),
        "use_num_masked_factor and loss_on_visible_tokens go with objective 'mlm'")
require(not shard or world_size > 1 and optimizer != 'muon' and not eval_gen_ppl,
        'shard=True shares the net among several processes, without muon and eval_gen_ppl')
is_range = t_range is None or [type(t) in (int, float) for t in t_range] == [True, True]
require(is_range and (t_range is None or 0 <= t_range[0] <= t_range[1] <= 1),
        f't_range={t_range}: (least, most) in 0 ... 1 are needed')
lowest, highest = t_range or (sampling_eps, 1.0)
require(epochs is None or flops is None, 'epochs and flops both set max_iters: give one of them')
require(is_pair or pad_to == 'block' and not prompt_drop,
        "pad_to and prompt_drop go with packing 'pair'")
require(not (causal and prompt_drop), 'prompt_drop goes with nets that are not causal')
require(measured_by in OBJECTIVES,
        f"objective '{objective}': its bound '{measured_by}' is not in OBJECTIVES")
require(not (sample_at_end or sample_interval or eval_gen_ppl)
        or record.predicts in TAKES.get(record.sampler, ()),
        f"objective '{objective}' has no sampler: give it one in OBJECTIVES that is registered "
        f"with @sampler_for('{record.predicts}'), or --sample_at_end=False --sample_interval=0")
schedule = schedule_of(constants)
micro_batches = global_batch_size // batch_size  # of a step, on all processes together
my_micro_batches = range(rank, micro_batches, world_size)

folder = find_or_prepare(dataset, tokenizer)  # before the process group, which would time out
# the last token of a causal net's row: only a target
extra = int(causal and packing in ('concat', 'crop'))
row_length = block_size + extra
loss_on_padding = loss_on_padding and not (is_pair and causal)  # its one EOS is the answer's
train_rows = TokenRows(folder, 'train', row_length, packing, loss_on_padding)
# what pads a batch is not measured, which would depend on the batch
val_rows = TokenRows(folder, val_split, row_length, packing,
                     loss_on_padding and pad_to == 'block', pad_to)
train_rows.first_given = val_rows.first_given = first_given
# of a pass over the text: 'crop' has a row at every place
rows_a_pass = len(train_rows.tokens) // block_size if packing == 'crop' else len(train_rows)
tokenizer_meta = train_rows.meta['tokenizer']
mask_id = tokenizer_meta['mask_id']
tokenizer_file = None  # of a tokenizer trained with the data: it goes where the weights go
if tokenizer_meta['sha256']:
    get_tokenizer(tokenizer_meta['name'], folder, tokenizer_meta)  # refuses another one
    tokenizer_file = pathlib.Path(folder, 'tokenizer.json').read_bytes()
if eval_gen_ppl and master:
    from eval import generative_perplexity, load_judge, without_special
    judge = load_judge(gen_ppl_judge, device)
try:
    if wandb_project and master:
        import wandb
    if tensorboard and master:
        from torch.utils.tensorboard import SummaryWriter
except ImportError as error:
    raise ValueError(f'{error}: pip install wandb or tensorboard, or log without it') from None

if on_gpu:
    torch.set_float32_matmul_precision('high')  # TF32 for what is not autocast
    torch.cuda.set_device(device)
if world_size > 1:
    dist.init_process_group('nccl' if on_gpu else 'gloo', timeout=datetime.timedelta(minutes=10))
    # to wait for what the first process does alone
    patient_group = dist.new_group(backend='gloo', timeout=datetime.timedelta(days=1))

# -----------------------------------------------------------------------------
# what a run starts from

defaults = {key: default for key, (default, _) in constants_of(__file__).items()}
RESUMABLE = 'ckpt.pt', 'ckpt.prev.pt', 'ckpt_best.pt'  # the first there is


def tell(text):
    """say, by the first process alone."""
    if master:
        say(text)


def shape_of_run():
    """Fields of ModelConfig by the constants."""
    shape = {key: constants[key] for key in FIELDS if key in constants} | SIZES.get(size, {})
    if not cond_dim:
        shape['cond_dim'] = 0
    shape |= dict(vocab_size=tokenizer_meta['vocab_size'], mask_id=mask_id)
    if causal and not head_mask and mask_id == shape['vocab_size'] - 1:  # as SMDM's causal nets
        shape |= dict(vocab_size=mask_id, mask_id=None, head_mask=True)
    if init == 'xlm' and tokenizer_meta['pad_id'] != tokenizer_meta['eos_id']:
        shape['pad_id'] = tokenizer_meta['pad_id']
    return shape


def newest_checkpoint():
    """The newest whole checkpoint of out_dir. It is ckpt.pt afterwards."""
    checkpoint, failed = read_newest(out_dir)
    if failed and master:
        older = next(name for name in RESUMABLE[1:] if os.path.exists(f'{out_dir}/{name}'))
        say(f'warning: {failed}; resuming from {out_dir}/{older}, the checkpoint before it')
        with contextlib.suppress(FileNotFoundError):
            os.replace(f'{out_dir}/ckpt.pt', f'{out_dir}/ckpt.bad.pt')
        put(out_dir, 'ckpt.pt', older)
    text = checkpoint['constants'].get('dataset', dataset)
    require(text == dataset or os.path.basename(folder) == text, f'{out_dir} was trained on '
            f"dataset='{text}', the run names '{dataset}': they must agree to resume; on other "
            f'text a net is trained by --init_from={out_dir} and another --out_dir')
    theirs = checkpoint['constants'].get('optimizer')
    require(len(checkpoint['optimizer']) == 1 + (optimizer == 'muon'),
            f"{out_dir}/ckpt.pt has the state of optimizer='{theirs}', the run '{optimizer}': "
            'they must agree to resume')
    return checkpoint


def check_net(config, ids, source, given=None):
    """Compare this run with a net that was read -> constants of the shape that are not used.
    given: those of the run that is resumed, with which the others must agree."""
    theirs = dataclasses.asdict(config)
    require(ids.items() <= tokenizer_meta.items(),
            f'init_from={init_from} has other ids ({ids}) than {folder} ({tokenizer_meta}): data '
            f"with its ids are made by --tokenizer={source.removesuffix('/ckpt.pt')}")
    asked_for = {argument[2:].partition('=')[0] for argument in sys.argv[1:]}
    asked_for |= {key for key, ours in shape.items() if key in constants and ours != defaults[key]}
    unused = {key: ours for key, ours in shape.items() if key in asked_for and ours != theirs[key]}
    if given:
        wanted = unused | dict(block_size=block_size, objective=objective)
        wanted = {key: ours for key, ours in wanted.items() if given[key] != ours}
        for key, ours in (wanted | (overrides or {})).items():
            require(theirs.get(key) == ours, f'{source} has {key}={theirs.get(key)!r}, the run '
                    f'{key}={ours!r}: they must agree to resume')
    if unused:
        tell(f'warning: {source} tells the shape of the net, not used are ' + ', '.join(
            f'{key}={ours!r} (it has {theirs[key]!r})' for key, ours in unused.items()))
    return unused


def steps_to_train(config):
    """max_iters, or what epochs or flops come to."""
    steps = max_iters
    if epochs is not None:
        steps = int(rows_a_pass * epochs / global_batch_size)
    if flops is not None:
        with torch.device('meta'):
            num_params = DiT(config).num_params(embedding=False)
        mean_length = block_size * (1 - ssl_ratio) + ssl_ratio * (1 + block_size) / 2
        steps = round(flops / (6 * num_params * global_batch_size * mean_length))
    budget = f'flops={flops:g} is' if flops else f'epochs={epochs} of {rows_a_pass:,} rows are'
    require(steps, f'{budget} less than one step')
    return steps


def warn_of_idle():
    """Say which constants were given and do nothing."""
    by = {key: 'size' for key in SIZES.get(size, {}) if key != 'cond_dim'}
    if flops or epochs:
        by['max_iters'] = 'flops' if flops else 'epochs'
    for key, name in by.items():
        if constants[key] not in (defaults[key], shape.get(key)):
            tell(f'warning: {name}={constants[name]} says what {key} is, {key}={constants[key]} is '
                 f'not used: give --{name}=None to choose it yourself')
    noise = 'an objective with noise', not causal
    needs = dict(
        schedule=noise, schedule_parameters=noise, time_sampling=noise, sampling_eps=noise,
        t_range=noise, momentum=("optimizer='muon'", optimizer == 'muon'),
        ar_share=('attention, neither causal nor time_conditioning', can_look_back),
        min_lr=("lr_schedule='cosine'", lr_schedule != 'constant'),
        unigram_bias=('head_bias', head_bias),
        warmup_share=('a larger max_iters', warmup_share * max_iters > warmup_iters),
        loss_on_padding=("packing='pad' or 'pair'", packing in ('pad', 'pair')),
        ssl_group=('ssl_ratio', ssl_ratio),
        overrides=('weights in init_from', init_from not in ('scratch', 'resume')),
        gen_ppl_judge=('eval_gen_ppl', eval_gen_ppl),
        gen_ppl_samples=('eval_gen_ppl', eval_gen_ppl))
    idle = [f'{key}={constants[key]!r} (it needs {what})' for key, (what, used) in needs.items()
            if not used and constants[key] != defaults[key]]
    if idle:
        tell('warning: these do nothing: ' + ', '.join(idle))
    if not record.bound:
        tell(f"objective '{objective}' has no bound in OBJECTIVES: what validation and eval.py "
             'measure is its loss, no likelihood')


def check_memory(config):
    """Say what training takes. Raises ValueError where there is less, before it is allocated."""
    def needed(rows):
        return memory_needed(
            config, rows, row_length, device, dtype, schedule, T, make_optimizers,
            len(my_micro_batches) > 1, loss_on_visible_tokens or ar_steps > 0,
            world_size if shard else 1,
            (lowest, highest), **options_of(objective, options))

    free = free_memory(device) / (1 if on_gpu else int(os.environ.get('LOCAL_WORLD_SIZE', 1)))
    parts = needed(batch_size)
    total = parts.pop('total')
    said = (f"{parts['weights'] * world_size ** shard / 4e6:.2f}M parameters and {batch_size} rows "
            f'of {row_length} need {total / 1e9:.2f} GB ('
            + ', '.join(f'{name} {size / 1e9:.2f}' for name, size in parts.items())
            + f'), {free / 1e9:.2f} GB are free on {device}')
    # compiling saves activations
    if not memory_check or total - compile * parts['activations'] <= free:
        return tell(said)
    fewer = [rows for rows in range(batch_size - 1, 0, -1) if batch_size % rows == 0]
    fits = next((rows for rows in fewer if needed(rows)['total'] <= free), None)
    remedy = f'lower batch_size, {fits} fits' if fits else (
        'lower n_layer, n_embd or block_size, batch_size is not enough')
    raise ValueError(f'{said}: {remedy}')


def claim_out_dir():
    """Lock out_dir and remove what this run replaces -> the lock. Raises ValueError where a run
    goes on there, or would be lost, or where nothing can be written."""
    files = sorted(glob.glob('*', root_dir=out_dir))
    run = [name for name in files if re.fullmatch(r'ckpt.*\.pt|metrics\.jsonl', name)]
    killed_early = auto and run == ['metrics.jsonl']  # before its first checkpoint
    require(init_from == 'resume' or overwrite or not run or killed_early,
            f'out_dir={out_dir} holds a run ({", ".join(run)}), which would be lost: go on with it '
            '(--init_from=resume), give another --out_dir, or replace it (--overwrite=True)')
    lock = FileLock(os.path.join(out_dir, '.lock'))
    try:
        os.makedirs(out_dir, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f'out_dir={out_dir}: another training is going on there, wait for its end '
                         'or give another --out_dir') from None
    except OSError as error:
        raise ValueError(f'out_dir={out_dir} cannot be written to: {error}') from None
    except NotImplementedError:
        pass  # a file system without locks
    killed = r'(ckpt.*|metrics\.jsonl)\.unfinished'  # what a killed run was writing
    replaced = [name for name in files if re.fullmatch(killed, name)]
    if overwrite and init_from != 'resume':
        replaced += [*run, 'tokenizer.json']
    for name in replaced:
        pathlib.Path(out_dir, name).unlink(missing_ok=True)
    return lock


def leave_out_dir():
    """Unlock out_dir. Where nothing was written, it is removed."""
    if lock.is_locked:
        with contextlib.suppress(OSError):
            os.remove(lock.lock_file)  # whoever waits for the one that is gone makes another
            os.rmdir(out_dir)
        lock.release()


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
                                           momentum=momentum, adjust_lr_fn='match_rms_adamw'))
    return optimizers


def load_optimizers(saved):
    """Their state. The settings of their groups (decay, betas) are those of this run."""
    for opt, state in zip(optimizers, (theirs['state'] for theirs in saved), strict=True):
        if shard:
            parameters = [p for group in opt.param_groups for p in group['params']]
            state = {i: {key: distribute_tensor(x.to(device), mesh, parameters[i].placements)
                         if x.shape == parameters[i].shape else x for key, x in tensors.items()}
                     for i, tensors in state.items()}
        opt.load_state_dict(opt.state_dict() | dict(state=state))


# -----------------------------------------------------------------------------
# batches and the loss


def uniform(shape, *key, dtype=torch.float64):
    """What is drawn is a function of (seed, *key)."""
    generator = torch.Generator().manual_seed(key_of(seed, *key))
    return torch.rand(shape, generator=generator, dtype=dtype)


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
    cut, length = uniform(2, step, micro // ssl_group, 1).tolist()
    return longest_row_of(step) if cut >= ssl_ratio else 1 + int(length * block_size) + extra


def times_of(step, micro):
    """Times (batch_size,), or (batch_size, blocks). 'stratified': over the global batch, by one
    uniform, and interleaved so that those of each micro-batch span [0, 1]. 'per_process' (MDLM):
    each row, or block, of a micro-batch in a stratum, by its own uniform. 'iid' (SMDM, xlm)."""
    unit = torch.arange(batch_size * blocks)
    if time_sampling == 'stratified':
        strata = (micro + micro_batches * (unit // blocks)) * blocks + unit % blocks
        n = global_batch_size * blocks
        t = stratified_times(uniform((), step), strata, n, lowest, highest)
    else:
        n = len(unit) if time_sampling == 'per_process' else 1
        u = uniform(len(unit), step, micro, 3) / n
        t = stratified_times(u, unit % n, n, lowest, highest)
    return t.view(batch_size, blocks) if net.config.block_length else t


def objective_at(step):
    """A new net begins as a causal one, which learns from every position."""
    return 'ar' if step < ar_steps else objective


def training_batch(step, micro):
    """Micro-batch `micro` of a step."""
    t = times_of(step, micro)
    if T:
        t = on_grid(t, T)
    elif importance:
        t = schedule.importance_time(t)
    length = row_length_of(step, micro)
    rows = train_rows[rows_of(step, micro * batch_size, batch_size)]
    rows = {name: x[:, :length] for name, x in rows.items()}
    drop = uniform((), step, micro, 4, dtype=torch.float32).item() < prompt_drop
    config = net.config
    if step < ar_steps:
        config = dataclasses.replace(config, objective='ar', causal=True, block_length=None)
    return corrupt_batch(rows, t, config, schedule, key_of(seed, step, micro), device,
                         loss_on_visible_tokens, drop_prompt=drop)


class Loss(nn.Module):
    """per_token_loss as a module: DDP and FSDP synchronise only the forward of what they wrap."""

    def __init__(self, net, **options):
        super().__init__()
        self.net, self.options = net, options

    def forward(self, batch, objective):
        if objective == 'ar':  # of a causal net, or in the causal phase of another
            return OBJECTIVES['ar'].loss(self.net, batch['x0'], batch['attention_mask'])
        return per_token_loss(
            self.net, batch['x0'], batch['xt'], batch['t'], objective, schedule, T,
            batch['masked'], batch['attention_mask'], reconstruction=True,
            **options_of(objective, self.options))


def mean_loss(loss, batch):
    """(B, L) nats -> the loss, and the share of its divisor's positions that are scored.
    loss_norm 'step': over all positions; the loop then divides by the share of the whole step."""
    if use_num_masked_factor and batch['xt'] is not None:
        loss = loss / (1 + (batch['xt'] == mask_id).sum(dim=1, keepdim=True))
    if record.over_masked and batch['masked'] is not None:
        count = torch.tensor(batch['masked'].numel())
    else:
        count = batch['scored'].sum()  # on the device: no waiting for it
    divisor = batch_size * (row_length - causal)  # nothing predicts column 0 of a causal net
    if loss_norm == 'micro':
        divisor = count = count.clamp(min=1)
    return (loss * batch['scored']).sum() / divisor, count / divisor


def get_lr(step):
    """Linear warm-up, then lr_schedule."""
    if step + (lr_offset or 0) < warmup_iters:
        return learning_rate * (step + (1 if lr_offset is None else lr_offset)) / warmup_iters
    if lr_schedule == 'constant':
        return learning_rate
    done = (step + (lr_offset or 0) - warmup_iters) / max(1, max_iters - warmup_iters)
    left = 1 - done if lr_schedule == 'linear' else 0.5 * (1 + math.cos(math.pi * done))
    return min_lr + (learning_rate - min_lr) * left


# -----------------------------------------------------------------------------
# evaluation, samples, logs


@torch.no_grad()
def evaluate():
    """likelihood_of the averaged weights on the first rows of val_split, and what is logged of it,
    also the mean over masked positions that is trained on. All draws are always the same."""
    n = min(len(val_rows), eval_iters * global_batch_size or len(val_rows))
    measures = [measured_by, objective] if record.over_masked else [measured_by]
    first = rank * batch_size
    sums = torch.zeros(6, n, dtype=torch.float64)
    # past the end, FSDP takes part with a row that does not count
    for start in range(first, n + first if shard else n, world_size * batch_size):
        indices = np.arange(min(start, n - 1), min(start + batch_size, n))
        strata = torch.from_numpy(permute(indices, n, 0))
        if net.config.block_length:
            strata = strata[:, None] * blocks + torch.arange(blocks)
        t = stratified_times(0.5, strata, n * blocks, sampling_eps)
        if T:
            t = on_grid(t, T)
        rows = val_rows[indices]
        batch = corrupt_batch(rows, t, net.config, schedule, key_of(start), device)
        with amp:
            losses = [eval_loss(batch, name) for name in measures]
        if start < n:
            sums[:4, indices] = row_sums(losses[0], batch, rows)
        if start < n and record.over_masked:
            masked = dict(scored=batch['scored'] & (batch['xt'] == mask_id))
            sums[4:, indices] = row_sums(losses[1], masked, rows)[:2]
    if world_size > 1:
        sums = sums.to(device)
        dist.all_reduce(sums)
        sums = sums.cpu()
    found = likelihood_of(sums[:4], val_rows.counts, objective)
    logged = dict(val_loss=found['nats_per_token' if record.bound else objective],
                  val_bpb=found.get('bits_per_byte'))
    total, masked = sums[4:].sum(dim=1).tolist()
    if masked:
        logged[f'val_{objective}_loss'] = total / masked
    tell(f'step {step}: validation ' + ', '.join(
        f"{with_error(found[name], found[name + '_se'])} {name.replace('_per_', '/')}"
        for name in ('nats_per_token', 'bits_per_byte', objective) if name in found)
        + f' (first {n:,} of {len(val_rows):,} rows, one time each)')
    return found, logged


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
    rows = [ids[:n] for ids, n in zip(out.tokens.tolist(), out.length, strict=True)]
    eos = tokenizer_meta['eos_id']
    for ids, prompt in zip(rows, options.get('prompt', ()), strict=False):  # EOS fills their rows
        if eos in ids[len(prompt):]:
            del ids[ids.index(eos, len(prompt)):]
    return [tok.decode(ids) for ids in rows], out.nfe


def print_samples(n, when):
    """-> their texts"""
    if shard:
        say(f'no samples of a net that is shared out: python sample.py --out_dir={out_dir}')
        return []
    prompts = {}
    if is_pair:  # those of val_rows: without one these nets say nothing
        kept = val_rows.kept[np.arange(n) % len(val_rows)]
        prompts['prompt'] = [val_rows.document(i)[:val_rows.prompt[i]].tolist() for i in kept]
    texts, nfe = texts_of_average(n, temperature=0.7, **prompts)
    for i, text in enumerate(texts):
        say(f'--- sample {i} {when} (temperature 0.7, {nfe[i]} network evaluations)\n{text}')
    if wandb_project and texts:
        table = wandb.Table(columns=['step', 'text'], data=[[step, text] for text in texts])
        wandb.log(dict(samples=table), step=step)
    return texts


def judge_samples():
    """The generative perplexity of samples, nothing truncated, and their entropy in nats."""
    texts, _ = texts_of_average(gen_ppl_samples, batch_size=batch_size)
    try:
        found = generative_perplexity([without_special(text, judge[1]) for text in texts],
                                      judge, 'xlm', min(batch_size, 8))
    except ValueError as error:  # nothing but special tokens, NaN
        say(f'warning: no generative perplexity ({error})')
        return {}
    gen_ppl, entropy = found['gen_ppl'], found['entropy']
    say(f'step {step}: generative perplexity {gen_ppl:.2f}, entropy {entropy:.2f} of '
        f"{found['texts']} samples by {gen_ppl_judge}")
    return dict(gen_ppl=gen_ppl, entropy=entropy)


class Metrics:
    """metrics.jsonl, wandb and TensorBoard."""

    def __init__(self, wandb_id):
        self.path, self.wandb_id = f'{out_dir}/metrics.jsonl', wandb_id
        if os.path.exists(self.path):
            self.cut()
        if wandb_project:
            self.wandb_id = wandb.init(project=wandb_project, name=out_dir, config=constants,
                                       id=wandb_id, resume='allow').id
        self.board = SummaryWriter(out_dir) if tensorboard else None

    def cut(self):
        """Drop the lines after this step, which is done again."""
        with open(self.path, errors='replace') as f:
            matches = [re.match(r'\{"iter": (\d+), .*\}\n', line) for line in f]
        try:
            write_whole(self.path, ''.join(m[0] for m in matches if m and int(m[1]) <= step))
        except OSError as error:
            say(f'warning: {error}')

    def write(self, **values):
        try:
            with open(self.path, 'a') as f:
                f.write(json.dumps(dict(iter=step) | values) + '\n')
        except OSError as error:
            say(f'warning: {error}')
        if wandb_project:
            wandb.log(dict(iter=step) | values, step=step)
        if tensorboard:
            for key in values.keys() - {'changed'}:
                self.board.add_scalar(key, values[key], step)


# dense bf16 FLOP/s, for the share that is used (MFU)
PEAK = {'A100': 312e12, 'H100': 989e12, 'H200': 989e12, 'B200': 2250e12}


def report(loss, lr, grad_norm, seconds):
    """Print and log a step that took so many seconds."""
    rate = global_batch_size * min(block_size, longest_row_of(step - 1)) / seconds
    scored = 1 if objective_at(step - 1) == 'ar' else 2  # all positions, or the masked half
    projected = global_batch_size * block_size // scored
    used = net.train_flops(global_batch_size, block_size, projected) / seconds / world_size
    gpu = torch.cuda.get_device_name(device) if on_gpu else ''
    mfu = ''.join(f', MFU {used / PEAK[name]:.1%}' for name in PEAK if name in gpu)
    left = datetime.timedelta(seconds=round(min(seconds * (max_iters - step), 1e13)))  # no overflow
    say(f'step {step}: loss {loss:.3f}, lr {lr:.2e}, grad norm {grad_norm:.2f}, '
        f'{rate:,.0f} tokens/s{mfu}, {left} left')
    metrics.write(loss=loss, lr=lr, grad_norm=grad_norm, tokens_per_s=rate)


def training_state():
    return dict(model=net.state_dict(), ema=ema_net.state_dict(),
                optimizer=[opt.state_dict() for opt in optimizers])


def wait_for_master():
    """Let the others wait for what the first process does alone, a day at most."""
    if world_size > 1:
        dist.barrier(group=patient_group)


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
# the net, its average, the optimizer

torch.manual_seed(seed)
auto = init_from == 'auto'
if auto:
    found = any(os.path.exists(f'{out_dir}/{name}') for name in RESUMABLE)
    init_from = 'resume' if found else 'scratch'
shape = shape_of_run()
dropouts = {key: (shape | (overrides or {}))[key] for key in ('dropout', 'attn_dropout')}
net, before, unused = None, {}, {}
checkpoint = dict(iter=0, tokens_seen=0, best_val_loss=math.inf)
if init_from == 'resume':
    checkpoint = newest_checkpoint()
    before, unused = defaults | checkpoint['constants'], checkpoint.get('unused', {})
    source = f'{out_dir}/ckpt.pt'
    net = build(checkpoint['model_config'], dropouts, checkpoint['model'], source)
    given = before | SIZES.get(before['size'], {}) | unused
    unused |= check_net(net.config, checkpoint['tokenizer'], source, given)
elif init_from != 'scratch':
    ours = dict(block_size=block_size, objective=objective) | (overrides or {}) | dropouts
    if block_length:
        ours['block_length'] = block_length
    net = load_pretrained(init_from, trainable=True, **ours)
    before, theirs = net.constants, net.config
    ids = dict(vocab_size=theirs.vocab_size, mask_id=theirs.mask_id)
    if net.tokenizer:
        ids = get_tokenizer(**net.tokenizer).meta()
    if theirs.mask_id is None and theirs.vocab_size == mask_id:
        ids = {}  # a causal net that has all ids but the mask
    unused = check_net(theirs, ids, init_from)
step, tokens_seen = checkpoint['iter'], checkpoint['tokens_seen']
best_val_loss = checkpoint['best_val_loss']
config = net.config if net else ModelConfig(**shape)
blocks = -(-row_length // (config.block_length or row_length))  # of a row, each with a time
max_iters = steps_to_train(config)
if step >= max_iters:
    tell(f'{out_dir} is finished: it is at step {step:,} of {max_iters:,}; '
         'a larger --max_iters goes on')
    if world_size > 1:
        dist.destroy_process_group()
    sys.exit()
can_look_back = not (config.causal or config.time_conditioning or config.mixer == 'mamba')
warn_of_idle()
if init_from != 'scratch':  # a run goes on with its own, and a net that knows text has none
    theirs = before['ar_share'] if init_from == 'resume' else 0.0
    if ar_share not in (theirs, 0.0):
        tell(f'warning: ar_share={ar_share} is for new nets, this run has {theirs}')
    # as many steps as before, whatever max_iters is now
    ar_share = constants['ar_share'] = theirs and theirs * before['max_iters'] / max_iters
ar_steps = round(ar_share * max_iters) if can_look_back else 0
warmup_iters = max(warmup_iters, round(warmup_share * max_iters))
check_memory(config)

# constants say what is trained: the shape is the net's, max_iters what epochs or flops came to
constants |= {key: getattr(config, key) for key in FIELDS if key in constants}
constants['max_iters'] = max_iters
if unused.keys() & SIZES.get(size, {}):
    constants['size'] = None
# how nets of its family are prompted and measured
constants |= {key: before[key] for family in FAMILIES.values() for key in family.constants
              if key in before and key not in constants}
changed = {}
if step:
    changed = {key: value for key, value in constants.items()
               if before[key] != value and key not in ('init_from', 'overwrite')}
    changes = [f'{key}={value!r} (was {before[key]!r})' for key, value in changed.items()]
    tell(', '.join([f'resuming at step {step:,}', *changes]))

net = net or DiT(config)
if unigram_bias and head_bias and init_from == 'scratch':
    counts = np.bincount(train_rows.tokens[:2 ** 24], minlength=net.config.vocab_size) + 1.0
    with torch.no_grad():
        net.lm_head.bias.copy_(torch.from_numpy(
            np.log(counts / counts.sum()))[:len(net.lm_head.bias)])
ema_net = copy.deepcopy(net)
if step:
    load_state(ema_net, checkpoint['ema'], out_dir)
net.train()
ema_net.eval().requires_grad_(False)
loss_module = Loss(net, **options)
eval_loss = Loss(ema_net, **options | dict(importance=False))
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
if step:
    load_optimizers(checkpoint['optimizer'])
if compile:
    net.trunk = torch.compile(net.trunk)  # torch.compile(net).trunk would run eagerly
if world_size > 1:
    if not shard:
        loss_module = DDP(loss_module, gradient_as_bucket_view=True)
    steps = [None] * world_size  # folders may not be shared, a disk may fail one of them
    dist.all_gather_object(steps, step)
    require(len(set(steps)) == 1, f'the processes would resume at different steps, {steps}: '
            f'out_dir={out_dir} must be one folder for all')

# -----------------------------------------------------------------------------
# the loop

if master:
    lock = claim_out_dir()
    atexit.register(leave_out_dir)
    metrics = Metrics(checkpoint.get('wandb_id'))
    if changed:
        metrics.write(changed=changed)
    left_out = f' ({train_rows.left_out:,} longer ones left out)' if train_rows.left_out else ''
    say(f'{net.num_params(embedding=False) / 1e6:.2f}M parameters without embedding and head; '
        f'{len(train_rows):,} rows of {block_size} tokens{left_out}, '
        f'{rows_a_pass / global_batch_size:,.1f} steps an epoch; {world_size} x {device}, '
        f"{'bfloat16 autocast' if amp._enabled else 'float32'}; "
        f'training to step {max_iters:,} in {out_dir}'
        + f', the first {ar_steps:,} as a causal net' * (ar_steps > 0))
del checkpoint  # its tensors take memory
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):  # queues send the first or the last
    signal.signal(number, ask_to_stop)

writer = CheckpointWriter(out_dir, device, master, tokenizer_file)
parameters, ema_parameters = list(net.parameters()), list(ema_net.parameters())
start = step
skipped, bad_steps = 0, 0  # updates skipped in all, and in a row
stopping, usual_norm = 0, 0  # whether some process is asked to stop; a running mean
maker = ThreadPoolExecutor(1)  # makes the next batch while this one is trained on
upcoming = maker.submit(training_batch, step, rank)
untrained = print_samples(1, 'before training') if master and sample_interval and not step else []
wait_for_master()
began, waited = time.monotonic(), 0.0
timer, timed_from = began, step
while True:

    better = False
    if step > start and (step % eval_interval == 0 or step == max_iters):
        found, logged = evaluate()
        better = logged['val_loss'] < best_val_loss  # NaN is never better
        if better:
            best_val_loss = logged['val_loss']
        if master:
            if eval_gen_ppl:
                logged |= judge_samples()
            metrics.write(**logged)
            at_end = sample_at_end and step == max_iters
            if sample_interval and step % sample_interval == 0 and not at_end:
                print_samples(1, f'at step {step}')
        wait_for_master()
        timer, timed_from = time.monotonic(), step  # evaluations do not count in tokens/s
    hopeless = bad_steps >= max_bad_steps
    ending = step >= max_iters or stopping or hopeless
    due = {'ckpt.pt': ending or step % ckpt_interval == 0, 'ckpt_best.pt': better,
           f'ckpt_{step}.pt': keep_interval and step % keep_interval == 0}
    files = [name for name in due if due[name] and step > start]
    if files:
        seldom = dict(wandb_id=metrics.wandb_id, unused=unused) if master else {}
        writer.save(training_state(), files, iter=step, tokens_seen=tokens_seen,
                    best_val_loss=best_val_loss, model_config=dataclasses.asdict(net.config),
                    constants=constants, tokenizer=tokenizer_meta,
                    **{key: value for key, value in seldom.items() if value})
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
                micro_loss, part = mean_loss(loss_module(batch, objective_at(step)), batch)
                micro_loss = micro_loss / len(my_micro_batches)
            micro_loss.backward()
        loss += micro_loss.detach()
        micro_loss = None  # or its graph lies between the tensors of the next
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
    # note: this, and nothing else, waits for the device
    loss, filled, bad, stopping, grad_norm = torch.stack([*status, grad_norm.float()]).tolist()
    scale = world_size / (filled or world_size)  # to the mean over what the whole step scores
    loss, grad_norm = loss * scale, grad_norm * scale
    if not bad:
        if 0 < grad_clip < grad_norm:
            scale *= grad_clip / grad_norm
        if scale != 1:
            torch._foreach_mul_(gradients, scale)
        writer.wait_until_read()
        for opt in optimizers:
            opt.step()
        with torch.no_grad():
            decay = min(ema, (2 + step) / (11 + step))  # step + 1 updates with this one
            pair = ema_parameters, parameters
            if shard:  # what this process holds of them
                pair = ([p.to_local() for p in tensors] for tensors in pair)
            torch._foreach_lerp_(*pair, 1 - decay)
    gradients = None  # which would keep them in memory
    for opt in optimizers:
        opt.zero_grad(set_to_none=True)
    if step == start and device.type == 'cpu':
        reuse_memory()
    tokens_seen += sum(batch_size * (row_length_of(step, micro) - extra)
                       for micro in range(micro_batches))
    step += 1
    if bad:
        bad_steps += 1
        skipped += 1
        tell(f'step {step}: loss {loss}, grad norm {grad_norm}: not finite, the update is '
             f'skipped ({bad_steps} in a row, {skipped} since step {start:,})')
    else:
        bad_steps = 0
        usual_norm = usual_norm or grad_norm
        if grad_norm > 10 * usual_norm:
            tell(f'step {step}: grad norm {grad_norm:.2f}, where {usual_norm:.2f} is usual')
        usual_norm += 0.02 * (grad_norm - usual_norm)

    if step % log_interval == 0 or step == start + 1:
        seconds = (time.monotonic() - timer) / (step - timed_from)
        timer, timed_from = time.monotonic(), step
        if master and not bad:
            report(loss, lr, grad_norm, seconds)

saved = writer.wait() or writer.retry()
if master:
    if step > start:
        share = waited / (time.monotonic() - began)
        say(f'the loop waited for its batches {share:.2%} of the time')
    if stopping and saved and step < max_iters:
        say(f'stopped by a signal after step {step}: '
            'go on with the same command and --init_from=resume')
    if sample_at_end and step >= max_iters:
        if untrained:
            say(f'--- sample 0 before training, again\n{untrained[0]}')
        print_samples(4, f'after {step} steps')
        say(f'next: python sample.py --out_dir={out_dir} --watch=True (or --trace=trace.html), '
            f'and python eval.py --out_dir={out_dir}')
    if tensorboard:
        metrics.board.close()
    leave_out_dir()
wait_for_master()
if world_size > 1:
    loss_module = None  # gloo's threads end with what DDP holds, or exiting may abort
    gc.collect()
    dist.destroy_process_group()
require(not hopeless,
        f'{bad_steps} steps in a row had no finite loss and gradient: stopped at step {step}, '
        f'{out_dir} holds the last finite weights; lower learning_rate')
if not saved:
    raise OSError(f'the last checkpoint could not be written to {out_dir}: '
                  f'the newest there is older than step {step}')
