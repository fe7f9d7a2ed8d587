"""
Measure a trained net:

    python eval.py --out_dir=out-quickstart
    python eval.py --out_dir=out --dataset=wikitext2 --num_mc=8
    torchrun --nproc_per_node=8 eval.py --out_dir=out            rows are shared among the processes, the figures are the same

A perplexity here is never without its tokens, its unit and its standard error. The loglinear schedule masks with probability
(1 - eps) t but weighs by 1/t, as published, so that a NELBO reads eps = 0.1% low.
"""
import math
import os

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from data import TokenRows, find_or_prepare, get_tokenizer, key_of, permute
from model import (autocast, corrupt_batch, get_schedule, load_pretrained, loglinear, nelbo_per_token, on_grid, pick_device, stratified_times)

metric = 'ppl'          # 'ppl': the NELBO of a split
out_dir = 'out'         # where train.py left ckpt.pt
init_from = None        # another source of weights for load_pretrained; None: out_dir
overrides = None        # fields of ModelConfig that the source cannot tell, such as "{'objective': 'sedd', 'time_conditioning': True}"
ema = True              # the averaged weights; False: the last ones
device = 'auto'         # 'auto', 'cpu', 'cuda', 'cuda:1', 'mps'
dtype = 'float32'       # 'bfloat16' (autocast) is faster and reads a little differently
seed = 0
batch_size = 16         # rows that go through the net together
dataset = None          # a folder in data/, or what data.py knows; None: what the net was trained on
tokenizer = None        # None: the one the checkpoint names
split = 'validation'
packing = None          # how rows are cut: 'wrap', 'concat', 'pad'; None: as the net was trained, else 'wrap'
block_size = None       # tokens a row; None: the net's
T = None                # steps of the bound, for subs and d3pm nets; 0: continuous time; None: as the net was trained, else 0
num_mc = 4              # times drawn for each row
max_rows = None         # evaluate so many rows, spread over the split; None: all


def ratio_with_error(sums, counts):
    """sum / count over rows (n,) and its standard error, rows being independent (the ratio estimator of survey sampling)."""
    ratio = sums.sum() / counts.sum()
    residual = sums - ratio * counts
    n = len(sums)
    error = math.sqrt(n / (n - 1) * (residual ** 2).sum()) / counts.sum() if n > 1 else math.nan
    return float(ratio), float(error)


@torch.no_grad()
def nelbo(net, rows, num_mc=1, batch_size=16, seed=0, max_rows=None, schedule=loglinear, T=0, subs_masking=False, progress=False):
    """The negative evidence lower bound of rows (data.TokenRows) by the net's own objective ('mlm' nets: by MDLM's equation 10; 'ar' nets:
    the likelihood itself), in continuous time or in T steps, with num_mc times a row, stratified within the row and over the rows.
    Under torch.distributed the rows are shared, and every process returns the same dict:

    nats_per_token, ppl: over all scored tokens, those that the packing added included (as published); bits_per_byte: over the tokens of
    documents alone, times tokens/bytes of the split; each with its standard error (.._se); tokens, document_tokens, rows, num_mc.
    The errors are those of independent rows: stratification makes the true ones a little smaller."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = next(net.parameters()).device
    num_mc = 1 if net.config.causal else num_mc               # nothing is drawn
    for name, value in (('num_mc', num_mc), ('batch_size', batch_size), ('max_rows', len(rows) if max_rows is None else max_rows)):
        if type(value) is not int or value < 1:
            raise ValueError(f'{name}={value!r}: it must be a whole number of at least 1')
    n = min(len(rows), max_rows or len(rows))
    chosen = np.arange(n) * len(rows) // n
    u = torch.rand((), generator=torch.Generator().manual_seed(key_of(seed)), dtype=torch.float64)
    sums = torch.zeros(4, n, dtype=torch.float64)         # of the losses and the numbers of tokens: all scored ones, those of documents
    for start in tqdm(range(rank * batch_size, n, world_size * batch_size), desc='rows', unit_scale=batch_size, disable=not progress or rank > 0):
        here = np.arange(start, min(start + batch_size, n))
        batch = rows[chosen[here]]
        for j in range(num_mc):
            t = stratified_times(u, torch.from_numpy(permute(here, n, seed)) + j * n, num_mc * n)
            t = on_grid(t, T) if T else t
            noised = corrupt_batch(batch, t, net.config, schedule, key_of(seed, start, j), device)
            loss = nelbo_per_token(net, noised, schedule, T, subs_masking).cpu()
            scored = noised['scored'].cpu()
            document = scored & batch['document']
            sums[:, here] += torch.stack([x.double().sum(dim=1) for x in (loss * scored, scored, loss * document, document)]) / num_mc
    if world_size > 1:
        sums = sums.to(device)
        dist.all_reduce(sums)
        sums = sums.cpu()
    nats, nats_se = ratio_with_error(sums[0], sums[1])
    document_nats, document_se = ratio_with_error(sums[2], sums[3])
    to_bits_per_byte = rows.counts['tokens'] / rows.counts['bytes'] / math.log(2)
    return dict(nats_per_token=nats, nats_per_token_se=nats_se, ppl=math.exp(nats), ppl_se=math.exp(nats) * nats_se,
                bits_per_byte=document_nats * to_bits_per_byte, bits_per_byte_se=document_se * to_bits_per_byte,
                tokens=int(sums[1].sum()), document_tokens=int(sums[3].sum()), rows=n, num_mc=num_mc)


# -----------------------------------------------------------------------------

if __name__ == '__main__':
    from configurator import configure
    configure(globals())
    if not isinstance(overrides, (dict, type(None))):
        raise ValueError(f'overrides={overrides!r}: a dict of fields of ModelConfig is needed')
    if metric != 'ppl':
        raise ValueError(f"metric '{metric}' is not known: choose from ppl")
    device = pick_device(device, int(os.environ.get('LOCAL_RANK', 0)))
    net = load_pretrained(str(init_from or os.path.join(out_dir, 'ckpt.pt')), ema, device, **(overrides or {}))
    if tokenizer or net.tokenizer is None:
        net.tokenizer = (net.tokenizer or {}) | dict(name=tokenizer or 'gpt2')
    tok = get_tokenizer(**net.tokenizer)
    dataset = dataset or net.constants.get('dataset')
    if dataset is None:
        raise ValueError('the source of the weights does not say what to measure them on: give --dataset=NAME')
    if block_size is not None and type(block_size) is not int:
        raise ValueError(f'block_size={block_size!r}: it must be a whole number')
    packing, T = packing or net.constants.get('packing', 'wrap'), net.constants.get('T', 0) if T is None else T
    block_size = (net.config.block_size if block_size is None else block_size) + (net.config.causal and packing == 'concat')
    rows = TokenRows(find_or_prepare(dataset, tok.name), split, block_size, packing, net.constants.get('loss_on_padding', True))
    if rows.meta['tokenizer'] != tok.meta() or tok.vocab_size != net.config.vocab_size and net.config.mask_id is not None:
        raise ValueError(f"the net has {net.config.vocab_size} ids of the tokenizer {tok.meta()}, the data those of {rows.meta['tokenizer']}: "
                         'measure it on data prepared with its own')
    if 'RANK' in os.environ:
        if device.type == 'cuda':
            torch.cuda.set_device(device)
        dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo', device_id=device if device.type == 'cuda' else None)
    with autocast(device, dtype):
        result = nelbo(net, rows, num_mc, batch_size, seed, max_rows, get_schedule(net.constants.get('schedule', 'loglinear')), T,
                       net.constants.get('subs_masking', False), progress=True)
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(f"{'NLL' if net.config.causal else 'NELBO'} of {init_from or out_dir} on {dataset}/{split}, {result['rows']:,} rows x {result['num_mc']} times, {result['tokens']:,} tokens "
              f"({result['document_tokens']:,} of documents)")
        print(f"  {result['nats_per_token']:.4f} ± {result['nats_per_token_se']:.4f} nats/token")
        print(f"  {result['ppl']:.2f} ± {result['ppl_se']:.2f} perplexity (exp of nats/token)")
        print(f"  {result['bits_per_byte']:.4f} ± {result['bits_per_byte_se']:.4f} bits/byte")
    if dist.is_initialized():
        dist.destroy_process_group()
