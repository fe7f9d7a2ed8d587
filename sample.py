"""
Draw samples from a trained net:

    python sample.py --steps=1024 --top_p=0.95                  from out/, where config/owt_mlm.py trains to
    python sample.py --out_dir=out-quickstart --num_samples=4 --prompt="Return the" --out=samples.jsonl

Row i of a call is a function of (seed, first_row + i) alone: the batch size changes nothing but rounding. All draws are made in
float64: in float32 the tail of the uniform is cut off, which lowers the temperature without saying so.
"""
import json
import math
import os
from dataclasses import dataclass

import torch
from tqdm import tqdm

from data import get_tokenizer, key_of
from model import autocast, get_schedule, load_pretrained, loglinear, pick_device

out_dir = 'out'         # where train.py left ckpt.pt
init_from = None        # another source of weights for load_pretrained; None: out_dir
overrides = None        # fields of ModelConfig that the source cannot tell, such as "{'objective': 'sedd', 'time_conditioning': True}"
ema = True              # the averaged weights; False: the last ones
tokenizer = None        # None: the one the checkpoint names
device = 'auto'         # 'auto', 'cpu', 'cuda', 'cuda:1', 'mps'
dtype = 'auto'          # 'float32', 'bfloat16' (autocast), or 'auto': bfloat16 where the device multiplies it natively
seed = 0
num_samples = 4
batch_size = 16         # rows that go through the net together
length = None           # tokens a sample, the prompt included; None: the net's block_size
steps = 1024            # of the sampler
sampler = 'ancestral'
temperature = 1.0       # 0: the most probable token
top_p = 1.0             # keep the tokens whose cumulative probability is at most top_p, and always the first
top_k = 0               # keep the k most probable tokens; 0: all
cfg_scale = 0.0         # guidance, un + (1 + cfg_scale) (cond - un), un having the prompt masked; 0: none
prompt = ''             # text that every sample begins with
out = None              # write the samples to this .jsonl file instead of the terminal


@dataclass
class Samples:
    tokens: torch.Tensor       # (n, L) int64, no mask id left
    nfe: torch.Tensor          # (n,) int64, network evaluations of the row; a guided pair counts 2
    reveal_step: torch.Tensor  # (n, L) int64, the step 0 ... steps-1 at which a position was revealed, -1 where it was given


def draw(logits, u, mask_id, temperature=1.0, top_k=0, top_p=1.0):
    """One token for each row of logits (N, V), by inverse CDF of the uniforms u (N,) float64 in [0, 1) -> ids (N,).
    In this order: the mask is excluded, temperature, top_k, top_p. Of the tokens in falling order, top_p keeps those whose
    cumulative probability is at most top_p, and always the first, as the released code of xlm and ReMDM does."""
    logits = logits.to(u.device).to(torch.float64)
    logits[:, mask_id] = -torch.inf
    if temperature == 0:
        return logits.argmax(dim=-1)
    probs = torch.softmax(logits / temperature, dim=-1)                                        # (N, V)
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
    return torch.where(cdf[:, -1].isnan(), mask_id, torch.minimum(ids, last))                  # generate() refuses what is left masked


def reveal(net, x, sigma, rows, cols, u, unprompted=None, cfg_scale=0.0, **draw_options):
    """Tokens (N,) for the positions (rows, cols) of x (B, L): the trunk runs over x, the head over those positions alone.
    With unprompted (B, L), x with its prompt masked, guided: un + (1 + cfg_scale) (cond - un) (SMDM, equation 6), in one batch."""
    if unprompted is None:
        h = net.trunk(x, sigma)[rows, cols]                                                    # (N, C)
    else:
        h = net.trunk(torch.cat((x, unprompted)), torch.cat((sigma, sigma)))
        h, h_un = h[rows, cols], h[rows + len(x), cols]
    ids, size = [], max(1, 2 ** 25 // net.config.vocab_size)                                   # (size, V) float64 is large
    for i in range(0, len(rows), size):
        logits = net.head(h[i:i + size])
        if unprompted is not None:
            un = net.head(h_un[i:i + size])
            logits = un + (1 + cfg_scale) * (logits - un)
        ids.append(draw(logits, u[i:i + size], net.config.mask_id, **draw_options))
    return torch.cat(ids).to(x.device)


def ancestral(net, x, given, steps, u_when, u_what, schedule, cfg_scale, progress, **draw_options):
    """MDLM's ancestral sampler (equation 7) on the grid of times 1 -> 0, in its reveal-time form.

    A net that never predicts the mask reveals a position at a step that does not depend on what is revealed: the first one whose end
    s has (1 - alpha_s) / (1 - alpha_1) at or below one uniform. So these steps are drawn first, and each row visits only its own, at
    the time of each; the trunk runs for rows that change and the head for positions being revealed. The last step reveals all that is
    left. x (B, L) on the net's device is filled in; given (B, L) bool, u_when and u_what (B, L) float64 are on the CPU.
    progress(n) is called when n tokens have been revealed.
    Returns nfe (B,) and reveal_step (B, L)."""
    device, mask_id = x.device, net.config.mask_id
    times = torch.arange(steps, -1, -1, dtype=torch.float64) / steps                           # t_0 = 1, ..., t_steps = 0
    still_masked = (1 - schedule.alpha(times)) / (1 - schedule.alpha(times[0]))
    still_masked[-1] = 0
    # how many of the ends t_1, ..., t_steps leave the position masked; the step after them reveals it
    reveal_step = steps - torch.searchsorted(still_masked[1:].flip(0), u_when, right=True)
    reveal_step[given] = -1
    # number the distinct steps of each row: its visits to the network
    ordered, order = reveal_step.sort(dim=1)
    first = (ordered.diff(dim=1, prepend=torch.full((len(x), 1), -1)) > 0).long()
    visit_of = torch.empty_like(order).scatter_(1, order, first.cumsum(dim=1) - 1)             # (B, L), -1 where given
    visits = visit_of.amax(dim=1) + 1                                                          # (B,)
    positions = visit_of.flatten().argsort(stable=True)[given.sum():]                          # by visit, then by row
    guided = bool(cfg_scale and given.any())
    for some in positions.split(visit_of[~given].bincount().tolist()):                         # rows at their n-th visit, each at a time of its own
        rows, cols = some // x.size(1), some % x.size(1)
        active, row = rows.unique(return_inverse=True)                                         # (A,), (N,) into them
        step = torch.empty_like(active).index_copy_(0, row, reveal_step[rows, cols])
        u = u_what[rows, cols].to('cpu' if device.type == 'mps' else device)                   # MPS has no float64
        sigma, hidden = schedule.conditioning(times[step]).float().to(device), given[active].to(device)
        active, rows, cols, row = (index.to(device) for index in (active, rows, cols, row))    # all known here: the device is never asked
        xt = x[active]
        x[rows, cols] = reveal(net, xt, sigma, row, cols, u, torch.where(hidden, mask_id, xt) if guided else None, cfg_scale, **draw_options)
        progress(len(rows))
    return visits * (1 + guided), reveal_step


SAMPLERS = {'ancestral': ancestral}


def prompt_ids(prompt, net, num_samples, length):
    """(n, P) int64 from text, ids (P,) or ids (n, P). Raises ValueError where it does not fit."""
    if isinstance(prompt, str):
        if net.tokenizer is None:
            raise ValueError('the source of the weights names no tokenizer: give the prompt as ids')
        prompt = get_tokenizer(**net.tokenizer).encode(prompt)
    ids = torch.as_tensor([] if prompt is None or len(prompt) == 0 else prompt)
    if ids.numel() and (ids.is_floating_point() or ids.dtype == torch.bool):
        raise ValueError(f'prompt holds {ids.dtype}, not ids')
    ids = ids.to('cpu', torch.int64)
    ids = ids.expand(num_samples, -1) if ids.dim() == 1 else ids
    if ids.dim() != 2 or len(ids) != num_samples:
        raise ValueError(f'prompt has shape {tuple(ids.shape)}: ids (P,) for all rows or (n, P) with n = num_samples = {num_samples} are needed')
    if ids.size(1) > length:
        raise ValueError(f'the prompt has {ids.size(1)} tokens, more than the length of {length}')
    if ids.numel() and not (0 <= ids.min() and ids.max() < net.config.vocab_size and (ids != net.config.mask_id).all()):
        raise ValueError(f'the prompt holds an id that is not a token: ids are 0 ... {net.config.vocab_size - 1}, without the mask {net.config.mask_id}')
    return ids


@torch.no_grad()
def generate(net, num_samples, length, steps, sampler='ancestral', prompt=None, cfg_scale=0.0, temperature=1.0, top_p=1.0, top_k=0, seed=0,
             first_row=0, batch_size=16, schedule=loglinear, progress=False):
    """Draw num_samples rows of `length` tokens, the prompt included -> Samples.

    prompt: text, ids (P,) for all rows, or ids (n, P); it is kept as it is. Row i is seeded by (seed, first_row + i), whatever the
    batch_size; schedule is the one the net was trained with. For the rest see the constants above. Raises ValueError where an option is impossible."""
    config = net.config
    for name, value in (('num_samples', num_samples), ('length', length), ('steps', steps), ('top_k', top_k), ('batch_size', batch_size)):
        if type(value) is not int:
            raise ValueError(f'{name}={value!r}: it must be a whole number')
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler '{sampler}' is not known: choose from {', '.join(SAMPLERS)}")
    if config.objective not in ('subs', 'mlm'):
        raise ValueError(f"sampler '{sampler}' takes nets of the objectives subs and mlm, not {config.objective}")
    for name, value, fits, needed in (
            ('num_samples', num_samples, num_samples >= 1, 'at least 1'), ('batch_size', batch_size, batch_size >= 1, 'at least 1'),
            ('steps', steps, steps >= 1, 'at least 1'), ('length', length, 1 <= length <= config.block_size, f"1 to {config.block_size}, the net's block_size"),
            ('temperature', temperature, 0 <= temperature < math.inf, '0 or more, and finite'), ('top_p', top_p, 0 < top_p <= 1, 'above 0 and at most 1'),
            ('top_k', top_k, top_k >= 0, '0 (all tokens) or more'), ('cfg_scale', cfg_scale, -1 <= cfg_scale < math.inf, '-1 or more, and finite')):
        if not fits:
            raise ValueError(f'{name}={value}: it must be {needed}')
    ids = prompt_ids(prompt, net, num_samples, length)
    given = torch.zeros(num_samples, length, dtype=torch.bool)
    given[:, :ids.size(1)] = True
    x = torch.full((num_samples, length), config.mask_id)
    x[given] = ids.flatten()
    u = torch.stack([torch.rand(2, length, dtype=torch.float64, generator=torch.Generator().manual_seed(key_of(seed, first_row + i)))
                     for i in range(num_samples)])                                             # (n, 2, L): when, and what
    device, nfe, reveal_step = next(net.parameters()).device, [], []
    with tqdm(total=int((~given).sum()), unit=' tokens', desc='sampling', disable=not progress) as bar:
        for rows in torch.arange(num_samples).split(batch_size):
            xt = x[rows].to(device)
            for result, kept in zip(SAMPLERS[sampler](net, xt, given[rows], steps, u[rows, 0], u[rows, 1], schedule, cfg_scale, bar.update,
                                                      temperature=temperature, top_p=top_p, top_k=top_k), (nfe, reveal_step)):
                kept.append(result)
            x[rows] = xt.cpu()
    if (x == config.mask_id).any():
        raise ValueError('the logits of the net, or what the options make of them, are not numbers: nothing can be drawn from them')
    return Samples(x, torch.cat(nfe), torch.cat(reveal_step))


# -----------------------------------------------------------------------------

if __name__ == '__main__':
    from configurator import configure
    constants = configure(globals())
    if not isinstance(overrides, (dict, type(None))):
        raise ValueError(f'overrides={overrides!r}: a dict of fields of ModelConfig is needed')
    out = out and str(out)
    if out and (os.path.isdir(out) or not os.path.isdir(os.path.dirname(out) or '.')):
        raise ValueError(f'out={out} is a folder' if os.path.isdir(out) else f'out={out}: there is no folder {os.path.dirname(out)}')
    net = load_pretrained(str(init_from or os.path.join(out_dir, 'ckpt.pt')), ema, pick_device(device), **(overrides or {}))
    if tokenizer:
        net.tokenizer = (net.tokenizer or {}) | dict(name=tokenizer)
    tok = get_tokenizer(**net.tokenizer) if net.tokenizer else None
    if tok and tok.vocab_size != net.config.vocab_size:
        raise ValueError(f"tokenizer '{tok.name}' has {tok.vocab_size} ids, the net {net.config.vocab_size}: give the one it was trained with")
    with autocast(pick_device(device), dtype):
        samples = generate(net, num_samples, net.config.block_size if length is None else length, steps, sampler, prompt or None, cfg_scale, temperature,
                           top_p, top_k, seed, batch_size=batch_size, progress=True, schedule=get_schedule(net.constants.get('schedule', 'loglinear')))
    texts = [tok and tok.decode([i for i in ids if i != tok.pad_id or i == tok.eos_id]) for ids in samples.tokens.tolist()]
    if out:
        with open(out + '.unfinished', 'w') as f:
            for ids, text, nfe in zip(samples.tokens.tolist(), texts, samples.nfe.tolist()):
                f.write(json.dumps(dict(ids=ids, text=text, nfe=nfe, settings=constants)) + '\n')
        os.replace(out + '.unfinished', out)
        print(f'{num_samples} samples written to {out}')
    else:
        for i, (ids, text, nfe) in enumerate(zip(samples.tokens.tolist(), texts, samples.nfe.tolist())):
            print(f'--- sample {i} ({nfe} network evaluations)\n{ids if text is None else text}')
