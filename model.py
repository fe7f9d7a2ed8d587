"""
The network, the noise, the objectives, and weights in and out.

What is unusual here, for a reader who knows nanoGPT:
- attention looks both ways, positions are rotary, a mask id stands for an unknown token
- adaLN-zero conditioning (DiT), mostly of sigma = 0: then one vector for the whole batch is
  folded into the weight and bias of the norms
- the head projects only the positions that a loss or a sampler needs
- one class for all families: an architecture is a ModelConfig

References: MDLM (Sahoo et al. 2024, arXiv 2406.07524), DiT (Peebles & Xie 2022, arXiv 2212.09748),
SMDM (Nie et al. 2024, arXiv 2410.18514).
"""
import contextlib
import ctypes
import dataclasses
import inspect
import errno
import json
import math
import os
import pickle
import re
import shutil
import sys
import threading
import time
import types
import typing
import zipfile
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from configurator import require

try:
    from flash_attn import flash_attn_func  # optional, for GPUs
except ImportError:
    flash_attn_func = None


def require_known(what, value, known):
    require(value in known, f"{what}'{value}' is not known: choose from {', '.join(known)}")


# -----------------------------------------------------------------------------
# the network

ACTIVATIONS = dict(
    gelu=lambda x: F.gelu(x, approximate='tanh'), relu=F.relu, swiglu=F.silu)


@dataclass
class ModelConfig:
    """An architecture. The defaults are MDLM's OpenWebText model, 170M parameters."""
    block_size: int = 1024  # longest row (L)
    vocab_size: int = 50258  # with the mask (V)
    mask_id: int | None = 50257  # None: no mask (causal)
    pad_id: int | None = None  # its embedding stays zero (xlm)
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_mlp: int | None = None  # width of the mlp; None: 4 * n_embd
    cond_dim: int = 128  # of the adaLN conditioning; 0: none
    time_conditioning: bool = False  # False: sigma = 0 always
    causal: bool = False
    norm: str = 'layernorm'  # or 'rmsnorm'
    mlp: str = 'gelu'  # a key of ACTIVATIONS
    norm_bias: bool = False
    mlp_bias: bool = True
    head_bias: bool = True
    head_mask: bool = True  # False: no row for the mask, the last id
    rotary_bf16: bool = False  # cos and sin rounded to bfloat16 (SMDM)
    dropout: float | int = 0.0  # on the two residual branches of a block
    attn_dropout: float | int = 0.0  # on the attention weights
    init: str = 'mdlm'  # adaLN-zero; or 'xlm' (PyTorch's), 'smdm' (normal)
    objective: str = 'subs'  # what the outputs mean: a key of OBJECTIVES

    def __post_init__(self):
        for field in dataclasses.fields(self):
            kinds = typing.get_args(field.type) or (field.type,)
            value = getattr(self, field.name)
            names = ' or '.join(kind.__name__ for kind in kinds)
            require(type(value) in kinds, f'{field.name}={value!r}: {names} is needed')
        if self.n_mlp is None:
            self.n_mlp = 4 * self.n_embd

        require_known('norm=', self.norm, ('layernorm', 'rmsnorm'))
        require_known('mlp=', self.mlp, ACTIVATIONS)
        require_known('init=', self.init, ('mdlm', 'xlm', 'smdm'))
        require_known('objective=', self.objective, OBJECTIVES)
        V, is_ar = self.vocab_size, self.objective == 'ar'
        rules = [
            ('block_size vocab_size n_layer n_head n_embd n_mlp', lambda x: x >= 1, 'at least 1'),
            ('cond_dim', lambda x: x >= 0, '0 or more'),
            ('cond_dim', lambda x: x or not self.time_conditioning, 'above 0 to condition on time'),
            ('dropout attn_dropout', lambda x: 0 <= x < 1, 'a probability below 1'),
            ('mask_id pad_id', lambda x: x is None or 0 <= x < V, f'one of the {V} ids'),
            ('mask_id', lambda x: self.causal or x is not None, 'an id unless causal'),
            ('mask_id', lambda x: self.head_mask or x == V - 1, 'the last id without head_mask'),
            ('causal', lambda x: x == is_ar, f"{is_ar} with objective '{self.objective}'"),
        ]
        for keys, holds, rule in rules:
            for key in keys.split():
                value = getattr(self, key)
                require(holds(value), f'{key}={value!r}: it must be {rule}')
        require(
            self.n_embd % (2 * self.n_head) == 0,
            f'n_embd={self.n_embd} over n_head={self.n_head}: heads need a whole and even width')


class Norm(nn.Module):
    """norm(x), or norm(x) * (1 + scale) + shift with both (1 or B, 1, n_embd)."""

    def __init__(self, config):
        super().__init__()
        self.rms = config.norm == 'rmsnorm'
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if config.norm_bias else None

    def forward(self, x, shift=None, scale=None):
        weight, bias = self.weight, self.bias
        if shift is not None:  # modulation is another weight and bias
            weight = weight * (1 + scale)
            bias = shift if bias is None else bias * (1 + scale) + shift
        # layer_norm's own weight has a gradient that depends on the number of CPU threads
        norm = F.rms_norm if self.rms else F.layer_norm
        x = norm(x, x.shape[-1:], eps=1e-5)
        return x * weight if bias is None else torch.addcmul(bias.to(x.dtype), x, weight)


def rotary_table(position, head_dim, bf16=False):
    """cos and sin, (..., 1, 1, head_dim/2) float32, at positions (...)."""
    exponent = torch.arange(0, head_dim, 2, device=position.device) / head_dim
    angle = position[..., None, None, None] * (1.0 / 10_000 ** exponent)
    dtype = torch.bfloat16 if bf16 else torch.float32
    return angle.cos().to(dtype).float(), angle.sin().to(dtype).float()


def apply_rotary(x, cos, sin):
    """Rotate halves (not interleaved pairs) of the heads of x (B, L, 2, H, head_dim)."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


class Block(nn.Module):

    def __init__(self, config):
        super().__init__()
        C, M = config.n_embd, config.n_mlp
        self.config = config
        self.norm1 = Norm(config)
        self.attn_qkv = nn.Linear(C, 3 * C, bias=False)
        self.attn_out = nn.Linear(C, C, bias=False)
        self.norm2 = Norm(config)
        bias = config.mlp_bias
        self.mlp_gate = nn.Linear(C, M, bias) if config.mlp == 'swiglu' else None
        self.mlp_in = nn.Linear(C, M, bias)
        self.mlp_out = nn.Linear(M, C, bias)
        self.adaLN = nn.Linear(config.cond_dim, 6 * C) if config.cond_dim else None

    def attention(self, x, rotary, attn_mask, cache):
        B, L, C = x.shape
        H = self.config.n_head
        qkv = self.attn_qkv(x).view(B, L, 3, H, C // H)
        q, k = apply_rotary(qkv[:, :, :2], *rotary).permute(2, 0, 3, 1, 4)  # (B, H, L, C/H) each
        v = qkv[:, :, 2].transpose(1, 2)
        is_causal = self.config.causal
        if cache is not None:
            k, v = cache.extend(self, k, v)
            is_causal = cache.position is None
        p = self.config.attn_dropout if self.training else 0.0
        y = attention(q, k, v, attn_mask, p, is_causal)
        return self.attn_out(y.transpose(1, 2).reshape(B, L, C))

    def mlp(self, x):
        activation = ACTIVATIONS[self.config.mlp]
        if self.mlp_gate:
            return self.mlp_out(activation(self.mlp_gate(x)) * self.mlp_in(x))
        return self.mlp_out(activation(self.mlp_in(x)))

    def forward(self, x, c, rotary, attn_mask=None, cache=None):
        p = self.config.dropout if self.training else 0.0
        if c is None:
            x = x + dropout(self.attention(self.norm1(x), rotary, attn_mask, cache), p)
            return x + dropout(self.mlp(self.norm2(x)), p)
        # (1 or B, 1, C) each
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN(c)[:, None].chunk(6, dim=2)
        y = self.attention(self.norm1(x, shift1, scale1), rotary, attn_mask, cache)
        x = x + gate1 * dropout(y, p)
        return x + gate2 * dropout(self.mlp(self.norm2(x, shift2, scale2)), p)


class SigmaMap(nn.Module):
    """sigma (B,) -> conditioning (B, cond_dim)."""

    def __init__(self, cond_dim):
        super().__init__()
        self.fc1 = nn.Linear(256, cond_dim)
        self.fc2 = nn.Linear(cond_dim, cond_dim)

    def forward(self, sigma):
        steps = torch.arange(128, device=sigma.device)
        angle = sigma.float()[:, None] * torch.exp(-math.log(10_000) * steps / 128)
        features = torch.cat((angle.cos(), angle.sin()), dim=-1).to(self.fc1.weight.dtype)
        return F.silu(self.fc2(F.silu(self.fc1(features))))


class DiT(nn.Module):
    """ids (B, L) -> logits (B, L, V). Parameters are in MDLM's order."""

    def __init__(self, config):
        super().__init__()
        C, V, cond_dim = config.n_embd, config.vocab_size, config.cond_dim
        self.config = config
        self.tokenizer = None  # load_pretrained fills in these three
        self.constants = {}
        self.extra = {}
        self.wte = nn.Embedding(V, C, padding_idx=config.pad_id)
        self.sigma_map = SigmaMap(cond_dim) if cond_dim else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm_f = Norm(config)
        self.lm_head = nn.Linear(C, V if config.head_mask else V - 1, bias=config.head_bias)
        self.adaLN_f = nn.Linear(cond_dim, 2 * C) if cond_dim else None
        if config.init == 'mdlm':
            nn.init.kaiming_uniform_(self.wte.weight, a=math.sqrt(5))
            for name, p in self.named_parameters():
                if name.startswith('lm_head') or 'adaLN' in name:
                    nn.init.zeros_(p)  # every block starts as the identity
        elif config.init == 'smdm':
            for name, p in self.named_parameters():
                if name.endswith(('attn_out.weight', 'mlp_out.weight')):
                    nn.init.normal_(p, std=1 / math.sqrt(C) / config.n_layer)
                elif p.dim() == 2:
                    nn.init.normal_(p, std=math.sqrt(2 / (5 * C)))

    def trunk(self, x, sigma=None, attention_mask=None, cache=None):
        """ids x (B, L) -> (B, L, n_embd).

        sigma (B,): total noise; ValueError if a time-conditioned net gets none.
        attention_mask (B, L) bool: False where nothing looks. cache: a KVCache.
        """
        config = self.config
        require(
            sigma is not None or not config.time_conditioning,
            'this net is time-conditioned: give sigma (B,), the total noise')
        c = None
        if config.cond_dim:
            if not config.time_conditioning:
                sigma = torch.zeros(1, device=x.device)
            c = self.sigma_map(sigma)  # (1 or B, cond_dim)
        position = torch.arange(x.size(1), device=x.device)
        attn_mask = None
        if cache is not None and cache.position is not None:
            position, attn_mask = cache.begin(x.device)
        elif attention_mask is not None and not config.causal:  # padding is on the right
            attn_mask = attention_mask[:, None, None, :]
        rotary = rotary_table(position, config.n_embd // config.n_head, config.rotary_bf16)
        h = self.wte(x)
        for block in self.blocks:
            h = block(h, c, rotary, attn_mask, cache)
        if c is None:
            return self.norm_f(h)
        shift, scale = self.adaLN_f(c)[:, None].chunk(2, dim=2)
        return self.norm_f(h, shift, scale)

    def head(self, h):
        """h (..., n_embd) -> logits (..., V), at least float32; -inf for a missing mask."""
        logits = self.lm_head(h)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits if self.config.head_mask else F.pad(logits, (0, 1), value=-math.inf)

    def forward(self, x, sigma=None, attention_mask=None):
        return self.head(self.trunk(x, sigma, attention_mask))

    def nll(self, h, target, exclude=None):
        """-log softmax(head(h))[target] in nats, (N,) float32; h (N, n_embd), target (N,).
        exclude: an id without probability (for SUBS the mask)."""
        return self.nll_and_logit(h, target, exclude)[0]

    def nll_and_logit(self, h, target, exclude=None):
        """nll and head(h)[target], (N,): their sum is the log-sum-exp of the logits."""
        head = self.lm_head
        exclude = exclude if self.config.head_mask else None
        return _NLL.apply(h, head.weight, head.bias, target, exclude, torch.is_grad_enabled())

    def num_params(self, embedding=True):
        """embedding=False: without embedding and head."""
        n = sum(p.numel() for p in self.parameters())
        if not embedding:
            n -= self.wte.weight.numel() + sum(p.numel() for p in self.lm_head.parameters())
        return n

    def train_flops(self, rows, length, scored):
        """FLOPs of a step for MFU, matrix products only; `scored` positions are projected."""
        config, C = self.config, self.config.n_embd
        matrices = 3 if config.mlp == 'swiglu' else 2
        weights = 4 * C ** 2 + matrices * C * config.n_mlp
        per_token = config.n_layer * (weights + 2 * length * C)
        return 6 * (rows * length * per_token + scored * C * config.vocab_size)


class KVCache:
    """Keys and values of a causal net, (2, rows, H, length, C/H) a block.

    position=None: the trunk gets the first tokens (n, P) of the rows `slots`; else one token of
    every row, (rows, 1), at `position` (rows,), which is on the CPU to not wait for a GPU.
    """

    def __init__(self, rows, length):
        self.rows = rows
        self.length = length
        self.kept = {}
        self.slots = slice(None)
        self.position = None
        self.at = None  # (row, position) on the device

    def begin(self, device):
        """-> positions (rows, 1) on the device, and attn_mask (rows, 1, 1, reach) bool; None: all
        True. Copied once for all blocks."""
        self.at = torch.arange(self.rows, device=device), sent(self.position, device)
        seen = torch.arange(int(self.position.max()) + 1) <= self.position[:, None]
        attn_mask = None if seen.all() else sent(seen, device)[:, None, None]
        return self.at[1][:, None], attn_mask

    def extend(self, block, k, v):
        """Store k and v (n, H, P or 1, C/H); return those to look at."""
        if block not in self.kept:
            self.kept[block] = k.new_zeros(2, self.rows, k.size(1), self.length, k.size(3))
        kv = self.kept[block]
        if self.position is None:
            kv[:, self.slots, :, :k.size(2)] = torch.stack((k, v))
            return k, v
        row, position = self.at
        kv[:, row, :, position] = torch.cat((k, v), dim=2).transpose(1, 2)
        return kv[:, :, :, :int(self.position.max()) + 1].unbind()

    def keep(self, slots):
        """Drop all rows but these (n,), on the device."""
        self.rows = len(slots)
        self.kept = {block: kv[:, slots] for block, kv in self.kept.items()}


# named sizes, in train.py's constants: n_layer, n_head, n_embd
# (SMDM's are named after their non-embedding parameters)
SIZES = {}
for line in '''mdlm-tiny 8 8 512
mdlm-small 12 12 768
mdlm-medium 24 16 1024
6M 6 4 256
19M 8 6 384
34M 8 8 512
48M 9 9 576
66M 10 10 640
75M 16 8 640
85M 13 10 640
113M 12 12 768
142M 15 12 768
170M 18 12 768
180M 14 14 896
206M 16 14 896
231M 18 14 896
268M 16 16 1024
302M 18 16 1024
336M 20 16 1024
472M 18 10 1280
551M 21 10 1280
571M 18 11 1408
629M 24 10 1280
666M 21 11 1408
717M 19 12 1536
761M 24 11 1408
831M 22 12 1536
944M 25 12 1536
1028M 20 14 1792
1233M 24 14 1792
1476M 22 16 2048
1678M 25 16 2048
2121M 28 17 2176'''.split('\n'):
    name, *shape = line.split()
    n_layer, n_head, C = map(int, shape)
    SIZES[name] = dict(n_layer=n_layer, n_head=n_head, n_embd=C, n_mlp=4 * C)
    if name.startswith('mdlm'):
        SIZES[name]['cond_dim'] = 128
SIZES['75M']['n_mlp'] = 1600

# -----------------------------------------------------------------------------
# noise: x0 -> xt


class Schedule:
    """Total noise sigma at time t in [0, 1], and its derivative dsigma. alpha = exp(-sigma) is the
    probability of not being masked. A schedule defines dsigma, and sigma or alpha."""

    def alpha(self, t):
        return torch.exp(-self.sigma(t))

    def sigma(self, t):
        return -torch.log(self.alpha(t))

    def conditioning(self, t):
        """What a time-conditioned net is fed: finite even where alpha is 0."""
        return self.sigma(t).clamp(max=30)

    def conditioning_at(self, mask_prob):
        """The same for mask_prob = 1 - alpha, cut off at t = 1."""
        alpha_1 = float(self.alpha(torch.ones((), dtype=torch.float64)))
        return -torch.log1p(-mask_prob.clamp(max=1 - alpha_1)).clamp(min=-30)

    def sigma_range(self):
        """The noise between which time is importance-sampled."""
        name = type(self).__name__
        raise ValueError(
            f'importance-sampled time is not defined for the schedule {name}: '
            'choose loglinear or linear')

    def log_masked_range(self):
        """log(1 - exp(-sigma)) at both ends."""
        return [math.log1p(-math.exp(-sigma)) for sigma in self.sigma_range()]

    def importance_time(self, t):
        """Uniform t -> times with uniform log(1 - alpha), all of one weight in the NELBO
        (MDLM, appendix C.2)."""
        low, high = self.log_masked_range()
        return self.time_of(-torch.log1p(-torch.exp(t * high + (1 - t) * low)))

    def importance_weight(self):
        return -self.log_masked_range()[0]


@dataclass
class LogLinear(Schedule):
    """1 - alpha = (1 - eps) t (MDLM, appendix E.1). xlm and SMDM have eps = 0."""
    eps: float = 1e-3

    def sigma(self, t):
        return -torch.log1p(-(1 - self.eps) * t)

    def dsigma(self, t):
        return (1 - self.eps) / (1 - (1 - self.eps) * t)

    def alpha(self, t):
        return 1 - (1 - self.eps) * t

    def sigma_range(self):
        require(self.eps > 0, 'importance-sampled time needs eps above 0')
        return self.eps, -math.log(self.eps)

    def time_of(self, sigma):
        return -torch.expm1(-sigma) / (1 - self.eps)


@dataclass
class Linear(Schedule):
    sigma_min: float = 1e-3
    sigma_max: float = 7.0

    def sigma(self, t):
        return self.sigma_min + t * (self.sigma_max - self.sigma_min)

    def dsigma(self, t):
        return torch.full_like(t, self.sigma_max - self.sigma_min)

    def sigma_range(self):
        return self.sigma_min, self.sigma_max

    def time_of(self, sigma):
        return (sigma - self.sigma_min) / (self.sigma_max - self.sigma_min)


@dataclass
class Geometric(Schedule):
    sigma_min: float = 1e-3
    sigma_max: float = 1.0

    def sigma(self, t):
        return self.sigma_min ** (1 - t) * self.sigma_max ** t

    def dsigma(self, t):
        return self.sigma(t) * math.log(self.sigma_max / self.sigma_min)


@dataclass
class Cosine(Schedule):
    eps: float = 1e-3
    power = 1

    def alpha(self, t):
        return self.eps + (1 - self.eps) * torch.cos(t * math.pi / 2) ** self.power

    def dsigma(self, t):
        angle = t * math.pi / 2 * self.power
        return math.pi / 2 * (1 - self.eps) * torch.sin(angle) / self.alpha(t)


class CosineSqr(Cosine):
    power = 2


@dataclass
class ChangeOfVariables(Schedule):
    """The noise of loglinear with log(1 - alpha) linear in t (MDLM, appendix C.2)."""
    eps: float = 1e-3

    def __post_init__(self):
        self.low, self.high = LogLinear(self.eps).log_masked_range()

    def alpha(self, t):
        return -torch.expm1(self.low + t * (self.high - self.low))

    def dsigma(self, t):
        return (self.high - self.low) * (1 / self.alpha(t) - 1)

    def conditioning(self, t):
        return t

    def conditioning_at(self, mask_prob):
        return ((mask_prob.log() - self.low) / (self.high - self.low)).clamp(0, 1)


SCHEDULES = dict(
    loglinear=LogLinear, linear=Linear, geometric=Geometric, cosine=Cosine, cosinesqr=CosineSqr,
    change_of_variables=ChangeOfVariables)


def get_schedule(name, **parameters):
    """A Schedule by its name in SCHEDULES. Raises ValueError."""
    require_known('schedule ', name, SCHEDULES)
    known = inspect.signature(SCHEDULES[name]).parameters
    for key in parameters:
        require_known(f"schedule '{name}': the parameter ", key, known)
    try:
        schedule = SCHEDULES[name](**parameters)
        t = torch.linspace(0, 1, 11, dtype=torch.float64)
        alpha, dsigma = schedule.alpha(t), schedule.dsigma(t[1:-1])
        falls = bool((alpha.diff() <= 0).all() and dsigma.isfinite().all())
        falls = falls and 1 >= alpha[0] > alpha[-1] >= 0
    except (ArithmeticError, TypeError, ValueError):  # such as the logarithm of 0
        falls = False
    require(falls, f"schedule '{name}' with {parameters}: alpha(t), the share that is not masked, "
            'must fall from at most 1 to at least 0 over t = 0 ... 1')
    return schedule


def schedule_of(constants):
    """The Schedule that the constants of train.py name ({}, of published weights: loglinear)."""
    parameters = constants.get('schedule_parameters') or {}
    parameters = {str(key): value for key, value in parameters.items()}
    return get_schedule(constants.get('schedule', 'loglinear'), **parameters)


loglinear = get_schedule('loglinear')


def corrupt(x0, t, mask_id, schedule, generator=None, maskable=None):
    """xt ~ q(xt | x0): positions of x0 (B, L) are masked with probability 1 - alpha(t), t (B,),
    where maskable (B, L). The draws are made on the generator's device (or the CPU)."""
    device = generator.device if generator else 'cpu'
    u = torch.rand(x0.shape, generator=generator, device=device).to(x0.device)
    masked = u < 1 - schedule.alpha(t)[:, None]
    if maskable is not None:
        masked = masked & maskable
    return torch.where(masked, mask_id, x0)


def corrupt_exactly(x0, t, mask_id, generator, maskable):
    """Mask exactly round(t n) of the n maskable positions of each row; t (B,)."""
    u = torch.rand(x0.shape, generator=generator).masked_fill(~maskable, 2)
    rank = u.argsort(dim=1).argsort(dim=1)
    count = (t * maskable.sum(dim=1)).round()
    return torch.where((rank < count[:, None]) & maskable, mask_id, x0)


def corrupt_batch(
        batch, t, config, schedule, key, device, visible=False, exactly=False, drop_prompt=False):
    """A batch of data.TokenRows at the times t (B,), with xt drawn from the seed `key`, or
    each row from one of a list.

    Returns tensors on device: x0, xt, t, scored, attention_mask (None: all True) and masked (N,),
    flat indices of the positions with a loss, found on the CPU to not wait for a GPU.
    visible: all scored positions have a loss. exactly: see corrupt_exactly. drop_prompt: what may
    not be corrupted is masked too, after the draws.
    For a causal net nothing is masked, and column 0 is not scored.
    """
    x0, scored, maskable = batch['x0'], batch['scored'], batch['maskable']
    attention_mask = batch['attention_mask']
    xt = masked = None
    if config.causal:
        scored = scored.clone()
        scored[:, 0] = False
    else:
        keys = [key] if isinstance(key, int) else key
        parts = []
        for rows, k in zip(torch.arange(len(x0)).chunk(len(keys)), keys, strict=True):
            generator = torch.Generator().manual_seed(k)
            given = x0[rows], t[rows], config.mask_id
            if exactly:
                parts.append(corrupt_exactly(*given, generator, maskable[rows]))
            else:
                parts.append(corrupt(*given, schedule, generator, maskable[rows]))
        xt = torch.cat(parts)
        if drop_prompt:
            xt = xt.masked_fill(~maskable, config.mask_id)
        has_loss = scored if visible else (xt == config.mask_id) & scored
        masked = has_loss.flatten().nonzero().squeeze(1)

    noised = dict(x0=x0, xt=xt, t=t, masked=masked, scored=scored)
    noised['attention_mask'] = None if attention_mask.all() else attention_mask
    return {name: tensor if tensor is None else sent(tensor, device)
            for name, tensor in noised.items()}


def sent(tensor, device):
    """A tensor of the CPU on the device, without waiting for a GPU."""
    on_gpu = device.type == 'cuda'
    return (tensor.pin_memory() if on_gpu else tensor).to(device, non_blocking=on_gpu)


def stratified_times(u, index, n, eps=1e-3):
    """A time in [eps, 1) in each stratum index (...,) of n, from one uniform u
    (Kingma et al. 2021, arXiv 2107.00630, appendix I.1)."""
    below_1 = 1 - 2 ** -24  # rounding up to 1 would leave a weight of inf / inf where alpha is 0
    return ((u + index / n) % 1 * (1 - eps) + eps).float().clamp(max=below_1)


def on_grid(t, T):
    """Continuous times -> the grid 1/T ... 1 of T steps."""
    return ((t * T).floor().clamp(max=T - 1) + 1) / T


# -----------------------------------------------------------------------------
# objectives: each loss takes MaskedPositions and returns nats, (N,)


@dataclass
class MaskedPositions:
    """The N positions of a batch that have a loss."""
    net: DiT
    h: torch.Tensor  # (N, n_embd)
    x0: torch.Tensor  # (N,) the tokens behind the masks
    t: torch.Tensor  # (N,)
    schedule: Schedule
    T: int  # number of steps; 0: continuous time


def subs(pos, importance=False):
    """MDLM's NELBO: -log p(x0 | xt), the mask excluded, weighted by time.

    Equation 10: by -alpha'_t / (1 - alpha_t), 1/t for loglinear.
    Equation 8, T steps: by T (alpha_s - alpha_t) / (1 - alpha_t), s = t - 1/T.
    It is also the bound that mlm nets are measured with: for another weight, add an objective.
    """
    nll = pos.net.nll(pos.h, pos.x0, exclude=pos.net.config.mask_id)
    if importance:
        return nll * pos.schedule.importance_weight()
    if pos.T:
        alpha_t, alpha_s = pos.schedule.alpha(pos.t), pos.schedule.alpha(pos.t - 1 / pos.T)
        return nll * (pos.T * (alpha_s - alpha_t) / (1 - alpha_t))
    return nll * (pos.schedule.dsigma(pos.t) / torch.expm1(pos.schedule.sigma(pos.t)))


def mlm(pos):
    """Cross entropy over all V ids, the mask included, not weighted by time (xlm)."""
    return pos.net.nll(pos.h, pos.x0)


def d3pm(pos, subs_masking=False):
    """Absorbing D3PM's diffusion term, T KL(q(xs | xt, x0) || p(xs | xt)), alpha_t = 1 - t.

    p_m: the probability the net gives the mask, 0 with subs_masking, which is subs
    (Austin et al. 2021; MDLM, appendix A.2.4).
    """
    if subs_masking:
        return subs(pos)
    mask_id, head = pos.net.config.mask_id, pos.net.lm_head
    nll, logit = pos.net.nll_and_logit(pos.h, pos.x0)
    logit_m = (pos.h.float() * head.weight[mask_id]).sum(dim=-1)
    if head.bias is not None:
        logit_m = logit_m + head.bias[mask_id]
    p_m = float64(logit_m - (nll + logit)).exp()
    t, dt = float64(pos.t), 1 / pos.T
    s = (t - dt).clamp(min=0)
    log_t = torch.log1p((1 - t) * p_m / t)
    log_s = torch.log1p((1 - s) * p_m / s.clamp(min=dt / 2))
    log_s = torch.where(s > dt / 2, log_s, 0)  # its factor s/t is 0 at s = 0
    return (pos.T * (dt / t * (log_t + nll) + s / t * (log_t - log_s))).float()


def sedd(pos):
    """SEDD's absorbing score entropy times dsigma (Lou et al. 2023, equation 5).

    The net's logits are log-scores up to -log(e^sigma - 1) - log(V - 1).
    """
    sigma = pos.schedule.sigma(pos.t)
    nll, logit = pos.net.nll_and_logit(pos.h, pos.x0, exclude=pos.net.config.mask_id)
    log_ratio = -torch.log(torch.expm1(sigma))  # the true log-score of x0
    scale = log_ratio - math.log(pos.net.config.vocab_size - 1)
    positive = torch.exp(nll + logit + scale)
    negative = log_ratio.exp() * (logit + scale)
    constant = log_ratio.exp() * (log_ratio - 1)
    return pos.schedule.dsigma(pos.t) * (positive - negative + constant)


def ar(net, x0, attention_mask=None):
    """-log p(x0[:, i] | x0[:, :i]) of a causal net, (B, L), the mask excluded; 0 at column 0."""
    h = net.trunk(x0[:, :-1], attention_mask=attention_mask)
    nll = net.nll(h.flatten(0, 1), x0[:, 1:].flatten(), exclude=net.config.mask_id)
    return F.pad(nll.view(len(x0), -1), (1, 0))


@dataclass
class Objective:
    """A new objective is a loss and a row of OBJECTIVES."""
    loss: typing.Callable  # (MaskedPositions, **options) -> (N,); that of 'ar' takes rows
    predicts: str  # what the net puts out; a sampler says what it takes
    sampler: str  # the default one
    bound: str  # the objective to evaluate by
    steps: str = 'none'  # T is 'none', 'optional' or 'required'
    options: tuple = ()  # keyword arguments of the loss
    has_reconstruction: bool = False  # reconstruction_loss is a term of the bound


OBJECTIVES = {
    'subs': Objective(subs, 'x0', 'ancestral', 'subs', 'optional', ('importance',)),
    'mlm': Objective(mlm, 'x0', 'fixed', 'subs'),
    'd3pm': Objective(
        d3pm, 'x0 or mask', 'ancestral', 'd3pm', 'required', ('subs_masking',),
        has_reconstruction=True),
    'sedd': Objective(sedd, 'score', 'analytic', 'sedd'),
    'ar': Objective(ar, 'next token', 'ar', 'ar'),
}


def check_objective(objective, T=0, subs_masking=False, importance=False, causal=None):
    """Raise ValueError where these options do not go together."""
    require_known('objective ', objective, OBJECTIVES)
    record = OBJECTIVES[objective]
    said = f"objective '{objective}'"
    require(T >= 0, f'T={T}: the number of steps, or 0 for continuous time')
    require(T or record.steps != 'required', f'{said} is defined in steps: give T, such as T=1000')
    require(not T or record.steps != 'none', f'{said} is not defined in steps: T={T}')
    require(
        not subs_masking or 'subs_masking' in record.options,
        'subs_masking=True goes with objective d3pm')
    require(
        not importance or 'importance' in record.options,
        'importance-sampled time goes with objective subs')
    require(not (importance and T), f'importance-sampled time cannot go with T={T}')
    require(
        causal in (None, record.predicts == 'next token'),
        f'{said} does not go with a net with causal={causal}')


def per_token_loss(
        net, x0, xt, t, objective=None, schedule=loglinear, T=0, subs_masking=False,
        importance=False, masked=None, attention_mask=None, reconstruction=False):
    """The loss of each position in nats, (B, L) float32, zero where there is none.

    x0, xt (B, L): ids; t (B,): times of xt, with T > 0 steps on_grid ('ar' uses x0 alone).
    objective: default: the net's own. importance: t is from schedule.importance_time.
    masked (N,): flat indices of the positions with a loss; default: where xt is the mask.
    reconstruction: add reconstruction_loss where it is a term of the bound.
    Raises ValueError where options do not go together.
    """
    objective = objective or net.config.objective
    check_objective(objective, T, subs_masking, importance, net.config.causal)
    record = OBJECTIVES[objective]
    if objective == 'ar':
        return record.loss(net, x0, attention_mask)
    if masked is None:
        masked = (xt == net.config.mask_id).flatten().nonzero().squeeze(1)
    # the trunk runs over everything, the head over the masked positions alone
    h = net.trunk(xt, schedule.conditioning(t), attention_mask).flatten(0, 1)  # (B*L, n_embd)
    positions = MaskedPositions(
        net, h.index_select(0, masked), x0.flatten()[masked], t[masked // x0.size(1)], schedule, T)
    options = dict(subs_masking=subs_masking, importance=importance)
    loss = record.loss(positions, **{name: options[name] for name in record.options})
    dense = torch.zeros(x0.numel(), device=x0.device, dtype=loss.dtype)
    loss = dense.index_copy(0, masked, loss).view(x0.shape)
    if reconstruction and record.has_reconstruction:
        loss = loss + reconstruction_loss(net, x0, schedule, subs_masking, attention_mask)
    return loss


def reconstruction_loss(net, x0, schedule=loglinear, subs_masking=False, attention_mask=None):
    """D3PM's term at t = 0, -log p(x0 | x0) of each position, (B, L) nats."""
    t = torch.zeros(len(x0), device=x0.device)
    h = net.trunk(x0, schedule.conditioning(t), attention_mask).flatten(0, 1)
    exclude = net.config.mask_id if subs_masking else None
    return net.nll(h, x0.flatten(), exclude).view(x0.shape)


# -----------------------------------------------------------------------------
# devices and number formats


def pick_device(name, local_rank=0):
    """'auto', 'cpu', 'mps', 'cuda' or 'cuda:N' -> torch.device. ValueError if it is not there."""
    mps = torch.backends.mps.is_available()
    counts = dict(cuda=torch.cuda.device_count(), mps=int(mps), cpu=1)
    if name == 'auto':
        name = next(kind for kind, count in counts.items() if count)
    kind, _, index = name.partition(':')
    is_known = kind in counts and (not index or index.isdigit())
    require(is_known, f"device='{name}' is not known: choose from auto, cpu, cuda, cuda:N, mps")
    count, processes = counts[kind], int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    require(
        kind != 'cuda' or index or processes <= count or count == 0,
        f'{processes} processes for {count} GPUs: give torchrun --nproc_per_node={count}')
    index = int(index or (local_rank if kind == 'cuda' else 0))
    require(
        index < count, f"device='{name}': there is no {kind} device {index}; try device='auto'")
    return torch.device(kind, index) if kind == 'cuda' else torch.device(kind)


def float64(x):
    """x in float64; on MPS, which has none, in float32."""
    return x.float() if x.device.type == 'mps' else x.double()


def autocast(device, dtype):
    """The context to run a net in. 'auto': bfloat16 where the device has it, else float32."""
    require_known('dtype=', dtype, ('auto', 'float32', 'bfloat16'))
    if dtype == 'auto':
        native = False
        if device.type == 'cuda':
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        elif device.type == 'cpu':
            native = torch.cpu._is_avx512_bf16_supported()
        dtype = 'bfloat16' if native else 'float32'
    return torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != 'float32')


# -----------------------------------------------------------------------------
# weights in and out


@dataclass
class Family:
    """How the files of a published family spell its nets. A value that is a function is called on
    the fields known so far. A field is read off the tensors, then off config.json."""
    names: dict       # ours -> theirs of parameters, {i}: the block; the first that fits counts
    settings: dict    # fields that all its nets share: save_pretrained tells the family by them
    assumed: dict     # fields where neither tensors nor config.json say
    described: dict   # config.json: theirs -> a field of ours, or a constant
    tokenizers: dict  # vocab_size -> name
    constants: dict   # how its data, prompts and measures are made, where a user does not say
    inv_freq: str | None = None  # name of the rotary frequencies, where the files hold them
    heads_interleaved: bool = False


def n_head_by_size(fields):
    """n_head of the entry of SIZES with these dimensions, or None."""
    for size in SIZES.values():
        if all(size[key] == fields[key] for key in ('n_layer', 'n_embd', 'n_mlp')):
            return size['n_head']


FIELDS = [field.name for field in dataclasses.fields(ModelConfig)]

FAMILIES = {}

FAMILIES['mdlm'] = Family(  # and its AR baseline, which is the same without conditioning
    names={
        'wte.weight': 'backbone.vocab_embed.embedding',
        'sigma_map.fc1': 'backbone.sigma_map.mlp.0',
        'sigma_map.fc2': 'backbone.sigma_map.mlp.2',
        'blocks.{i}.mlp_in': 'backbone.blocks.{i}.mlp.0',
        'blocks.{i}.mlp_out': 'backbone.blocks.{i}.mlp.2',
        'blocks.{i}.adaLN': 'backbone.blocks.{i}.adaLN_modulation',
        'blocks.{i}': 'backbone.blocks.{i}',
        'norm_f': 'backbone.output_layer.norm_final',
        'lm_head': 'backbone.output_layer.linear',
        'adaLN_f': 'backbone.output_layer.adaLN_modulation',
    },
    settings=dict(
        norm='layernorm', mlp='gelu', norm_bias=False, mlp_bias=True, head_bias=True,
        causal=lambda fields: not fields['cond_dim']),
    assumed=dict(
        block_size=1024, n_head=None, mask_id=lambda fields: fields['vocab_size'] - 1,
        objective=lambda fields: 'ar' if fields['causal'] else 'subs'),
    described=dict(
        architectures=['MDLM'], model_type='mdlm', vocab_size='vocab_size',
        model_length='block_size', hidden_dim='n_embd', cond_dim='cond_dim',
        n_blocks='n_layer', n_heads='n_head', dropout='dropout',
        time_conditioning='time_conditioning', return_dict=False, torch_dtype='float32'),
    tokenizers={50258: 'gpt2'},
    constants=dict(packing='wrap', protocol='mdlm'),
    inv_freq='backbone.rotary_emb.inv_freq')

FAMILIES['xlm'] = Family(  # the last ids are <|pad|> <|unk|> <|mask|> <|sep|>
    names={
        'wte': 'embed_tokens',
        'blocks.{i}.attn_out': 'encoder.{i}.o_proj',
        'blocks.{i}.mlp_in': 'encoder.{i}.mlp.0',
        'blocks.{i}.mlp_out': 'encoder.{i}.mlp.2',
        'blocks.{i}': 'encoder.{i}',
        'norm_f': 'output_layer.norm_final',
        'lm_head': 'output_layer.linear',
    },
    settings=dict(
        norm='layernorm', mlp='relu', norm_bias=True, mlp_bias=True, head_bias=False,
        cond_dim=0, causal=False),
    assumed=dict(
        block_size=1024, objective='mlm', init='xlm',
        mask_id=lambda fields: fields['vocab_size'] - 2,
        pad_id=lambda fields: fields['vocab_size'] - 4,
        n_head=lambda fields: 12 if fields['n_embd'] == 768 else None),
    described=dict(zip(FIELDS, FIELDS, strict=True)),
    tokenizers={50263: 'gpt2-xlm'},
    constants=dict(packing='pad', protocol='xlm', judge_dtype='bfloat16'),
    inv_freq='encoder.{i}.rotary_emb.inv_freq')

FAMILIES['smdm'] = Family(  # the head has no row for the mask; AR nets have no mask
    names={
        'wte': 'transformer.wte',
        'blocks.{i}.norm1': 'transformer.h.{i}.norm_1',
        'blocks.{i}.norm2': 'transformer.h.{i}.norm_2',
        'blocks.{i}.attn_qkv': 'transformer.h.{i}.attn.attn',
        'blocks.{i}.attn_out': 'transformer.h.{i}.attn.proj',
        'blocks.{i}.mlp_gate': 'transformer.h.{i}.mlp.swiglu.w1',
        'blocks.{i}.mlp_in': 'transformer.h.{i}.mlp.swiglu.w2',
        'blocks.{i}.mlp_out': 'transformer.h.{i}.mlp.swiglu.w3',
        'norm_f': 'transformer.ln_f',
        'lm_head': 'lm_head',
    },
    settings=dict(
        norm='rmsnorm', mlp='swiglu', norm_bias=False, mlp_bias=False, head_bias=False,
        cond_dim=0),
    assumed=dict(
        block_size=2048, n_head=n_head_by_size, rotary_bf16=True, init='smdm',
        causal=lambda fields: fields['head_rows'] == fields['vocab_size'],
        mask_id=lambda fields: None if fields['causal'] else fields['head_rows'],
        head_mask=lambda fields: fields['causal'],
        objective=lambda fields: 'ar' if fields['causal'] else 'subs'),
    described=dict(zip(FIELDS, FIELDS, strict=True)),
    tokenizers={},
    constants=dict(packing='concat', prompt_bos=True, mc_eps=0.0, mc_draws=1024),
    heads_interleaved=True)

FAMILIES['native'] = Family(  # ours, for nets that no other layout fits
    names={name: name for name in ('wte', 'sigma_map', 'blocks', 'norm_f', 'lm_head', 'adaLN_f')},
    settings={},
    assumed=dict(n_head=None),
    described=dict(zip(FIELDS, FIELDS, strict=True)),
    tokenizers={},
    constants={})


def renamed(name, pairs):
    """name in the other column of a table of (from, to) pairs, or None where no pair fits."""
    for source, target in pairs:
        pattern = re.escape(source).replace(r'\{i\}', r'(\d+)') + r'(?=\.|$)'
        match = re.match(pattern, name)
        if match:
            return target.format(i=match.group(1) if match.groups() else '') + name[match.end():]


def interleave_heads(weight, n_head, inverse=False):
    """SMDM packs q, k, v head by head: (H, 3, head_dim, C) where ours is (3, H, head_dim, C)."""
    first, second = (n_head, 3) if inverse else (3, n_head)
    return weight.view(first, second, -1, weight.size(1)).transpose(0, 1).reshape(weight.shape)


def family_of(names, source):
    """The key of FAMILIES whose embedding is among the names."""
    for key, family in FAMILIES.items():
        if renamed('wte.weight', family.names.items()) in names:
            return key
    first = ', '.join(sorted(names)[:5])
    raise ValueError(f"{source} has none of the layouts {', '.join(FAMILIES)}: "
                     f'its first names are {first}')


def settings_of(family, fields):
    return {key: value(fields) if callable(value) else value
            for key, value in family.settings.items()}


def fields_of(family, tensors, inv_freq, described):
    """ModelConfig fields by a net's tensors (under our names), its rotary frequencies (or None) and
    its config.json."""
    vocab_size, n_embd = tensors['wte.weight'].shape
    layers = {name.split('.')[1] for name in tensors if name.startswith('blocks.')}
    fields = dict(vocab_size=vocab_size, n_embd=n_embd, n_layer=len(layers),
                  n_mlp=len(tensors['blocks.0.mlp_in.weight']),
                  cond_dim=len(tensors.get('sigma_map.fc2.weight', ())),
                  head_rows=len(tensors.get('lm_head.weight', tensors['wte.weight'])))
    if inv_freq is not None:
        fields['n_head'] = n_embd // (2 * len(inv_freq))
    fields |= settings_of(family, fields)
    for theirs, ours in family.described.items():
        if theirs in described and ours in FIELDS:
            fields.setdefault(ours, described[theirs])
    for key, value in family.assumed.items():
        if key not in fields:
            fields[key] = value(fields) if callable(value) else value
    del fields['head_rows']
    return fields


PLAIN_RECORD = re.compile(
    r'data\.pkl|data/\d+|version|byteorder|\.format_version|\.storage_alignment|'
    r'\.data/serialization_id')


def check_archive(path):
    """Raise ValueError unless the file is a whole zip of one pickle and its tensors as torch.save
    writes it. Torch itself would run the code of a TorchScript archive, unpack a few compressed
    bytes into gigabytes, and take a flipped bit."""
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        names = [record.filename.partition('/') for record in records]
        for root, _, name in names:
            require(
                root == names[0][0] and PLAIN_RECORD.fullmatch(name),
                f'it holds {root}/{name}, which torch.save does not write')
        require(len(set(names)) == len(names), 'it holds two records of one name')
        stored = all(record.compress_type == zipfile.ZIP_STORED for record in records)
        size = sum(record.file_size for record in records)
        require(stored and size <= os.path.getsize(path), 'it is compressed')
        damaged = archive.testzip()
    require(damaged is None, str(damaged))


def read_checkpoint(path):
    """The dict that train.py saved at path, tensors on the CPU. Nothing in the file is executed.
    Raises FileNotFoundError, or ValueError where the file is truncated, damaged or not ours."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f'no checkpoint at {path}: train one with train.py, '
                                'or give another out_dir or init_from')
    try:
        check_archive(path)
    except MemoryError:
        raise
    except Exception as error:  # BadZipFile, and what else a flipped bit in a header leads to
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # EINVAL: a wrong offset
            raise  # the machine's fault, not the file's
        raise ValueError(
            f'{path} is truncated or damaged ({error}): use another checkpoint') from None
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception:  # a zip of something else, or with something else than tensors in it
        checkpoint = None
    sections = dict(
        model=dict, ema=dict, optimizer=list, iter=int, tokens_seen=int, best_val_loss=float,
        model_config=dict, constants=dict, tokenizer=dict)
    for key, kind in sections.items():
        require(isinstance(checkpoint, dict) and isinstance(checkpoint.get(key), kind),
                f'{path} is not a checkpoint of train.py (no {key})')
    if checkpoint['constants'].get('schedule') == 'linear':  # its default before it was recorded
        checkpoint['constants'].setdefault(
            'schedule_parameters', dict(sigma_min=1e-4, sigma_max=20.0))
    return checkpoint


def put(folder, name, same):
    """Give the file `same` of folder another name there, replacing what has the name."""
    path, source = os.path.join(folder, name), os.path.join(folder, same)
    if os.path.exists(path) and os.path.samefile(path, source):
        return
    with contextlib.suppress(FileNotFoundError):
        os.remove(path + '.unfinished')
    try:
        os.link(source, path + '.unfinished')
    except OSError:  # a file system without links
        shutil.copyfile(source, path + '.unfinished')
    os.replace(path + '.unfinished', path)


def write_checkpoint(checkpoint, folder, files, tokenizer=None):
    """Write a checkpoint under the names `files` in folder. It is flushed to the disk before it has
    them, and an older ckpt.pt becomes ckpt.prev.pt: a kill leaves a whole one.
    tokenizer: the bytes of tokenizer.json, which goes there first. Raises OSError or RuntimeError.
    """
    os.makedirs(folder, exist_ok=True)
    path, unfinished = os.path.join(folder, files[0]), files[0] + '.unfinished'
    try:
        if tokenizer:
            with open(path + '.unfinished', 'wb') as f:
                f.write(tokenizer)
            os.replace(path + '.unfinished', os.path.join(folder, 'tokenizer.json'))
        with open(path + '.unfinished', 'wb') as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
        for name in files[1:]:  # the first name comes last: where it is, all are
            put(folder, name, unfinished)
        if 'ckpt.pt' in files and os.path.exists(os.path.join(folder, 'ckpt.pt')):
            put(folder, 'ckpt.prev.pt', 'ckpt.pt')
        os.replace(path + '.unfinished', path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(path + '.unfinished')
        raise
    with contextlib.suppress(OSError):  # a folder cannot be opened everywhere
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def read_newest(folder):
    """(checkpoint, None) of folder/ckpt.pt; where that is missing or damaged, (checkpoint, why) of
    the one before it (ckpt_best.pt, where a run was killed before its first ckpt.pt). Raises as
    read_checkpoint does where neither is whole."""
    try:
        return read_checkpoint(os.path.join(folder, 'ckpt.pt')), None
    except (ValueError, FileNotFoundError) as error:
        older = os.path.join(folder, 'ckpt.prev.pt')
        if isinstance(error, FileNotFoundError) and not os.path.isfile(older):
            older = os.path.join(folder, 'ckpt_best.pt')
        if not os.path.isfile(older):
            raise
        return read_checkpoint(older), error


def say(text):
    """print, but neither a full disk behind the output nor a terminal that lacks a letter ends the
    run."""
    encoding = getattr(sys.stdout, 'encoding', None) or 'utf-8'
    with contextlib.suppress(OSError, ValueError):  # ValueError: it is closed
        print(text.encode(encoding, 'backslashreplace').decode(encoding), flush=True)


class CheckpointWriter:
    """Writes checkpoints in the background: training waits only for a copy of its state. Failures
    are warnings. The master alone writes. tokenizer: the bytes of tokenizer.json, or None."""

    def __init__(self, folder, device, master, tokenizer):
        self.folder, self.device, self.master = folder, device, master
        self.tokenizer = tokenizer
        self.buffers = None  # the state's copy on the CPU, used again by the next save
        self.newest = None   # what is to be written
        self.thread = self.failure = None

    def copy(self, state, buffer):
        """state (nested dicts and lists), its tensors copied into those of buffer that fit."""
        if isinstance(state, torch.Tensor):
            if hasattr(state, 'full_tensor'):  # FSDP's: all processes take part
                state = state.full_tensor()
            if not self.master:
                return None
            if buffer is None or buffer.shape != state.shape:
                buffer = torch.empty(state.shape, dtype=state.dtype,
                                     pin_memory=self.device.type == 'cuda')
            return buffer.copy_(state.detach(), non_blocking=True)
        if isinstance(state, dict):
            buffer = buffer or {}
            return type(state)((key, self.copy(x, buffer.get(key))) for key, x in state.items())
        if isinstance(state, (list, tuple)):
            buffers = (buffer or []) + [None] * len(state)
            return [self.copy(x, y) for x, y in zip(state, buffers, strict=False)]
        return state

    def make_buffers(self, state):
        """Make the buffers while training goes on, by a copy that may be inconsistent."""
        def make():
            with contextlib.suppress(RuntimeError):  # then the first save makes them
                self.buffers = self.copy(state, None)
        self.thread = threading.Thread(target=make)
        self.thread.start()

    def save(self, state, names, **rest):
        """Write state, with the entries `rest`, under names. All processes call it."""
        started = time.monotonic()
        self.wait()
        self.buffers = self.copy(state, self.buffers)
        if not self.master:
            return
        if self.device.type == 'cuda':
            torch.cuda.synchronize(self.device)
        self.newest = self.buffers | rest, names, started, time.monotonic() - started
        self.start()

    def start(self):
        if not os.path.isdir(self.folder):
            say(f'warning: {self.folder} is gone: it is made again, without what was in it')
        self.thread = threading.Thread(target=self.write)
        self.thread.start()

    def write(self):
        checkpoint, names, started, waited = self.newest
        step = checkpoint['iter']
        try:
            write_checkpoint(checkpoint, self.folder, names, self.tokenizer)
        except Exception as error:  # a full disk, a folder that is gone
            while error.__context__ and not isinstance(error, OSError):
                error = error.__context__  # torch's own error comes after the disk's
            self.failure = (f'the checkpoint of step {step} could not be written to {self.folder} '
                            f'({type(error).__name__}: {error})')
            return
        with contextlib.suppress(OSError):
            size = os.path.getsize(os.path.join(self.folder, names[0])) / 1e9
            say(f"step {step}: {', '.join(names)} written, {size:.2f} GB in "
                f'{time.monotonic() - started:.2f} s, {waited:.2f} s of which the training waited')

    def wait(self):
        """Wait for the last save. Returns whether it succeeded; a failure is printed."""
        if self.thread:
            self.thread.join()
        failure, self.thread, self.failure = self.failure, None, None
        if failure:
            say(f'warning: {failure}; training goes on, the next one will be tried')
        return failure is None

    def retry(self):
        """Try the last save once more. Returns whether it succeeded."""
        self.start()
        return self.wait()


class _Ignored:
    """Stands for what a foreign pickle builds besides tensors and plain containers."""

    def __init__(self, *args, **kwargs):
        pass

    __setstate__ = __setitem__ = append = extend = add = __init__


class _TensorUnpickler(pickle.Unpickler):
    """Builds tensors and plain containers; imports and calls nothing else that a file names."""
    allowed = {('collections', 'OrderedDict'), ('torch._utils', '_rebuild_tensor_v2'),
               ('torch._utils', '_rebuild_parameter'), ('torch', 'Size')}

    def find_class(self, module, name):
        return super().find_class(module, name) if (module, name) in self.allowed else _Ignored


def read_lightning(path, ema):
    """The state_dict of a Lightning .ckpt; `ema`: with the averaged weights of ema.shadow_params,
    which are in the order of the parameters, if it has them."""
    reader = types.SimpleNamespace(Unpickler=_TensorUnpickler, __name__='nanomdm')
    try:
        check_archive(path)
        checkpoint = torch.load(path, map_location='cpu', weights_only=False, pickle_module=reader)
        tensors = {name: tensor for name, tensor in checkpoint['state_dict'].items()
                   if isinstance(tensor, torch.Tensor)}
        shadow = checkpoint['ema']['shadow_params'] if ema and checkpoint.get('ema') else None
    except Exception as error:  # whatever a broken or hostile file leads to
        raise ValueError(f'{path} is not a Lightning checkpoint that can be read '
                         f'({type(error).__name__}: {error})') from None
    if shadow is not None:
        names = [name for name in tensors if 'rotary_emb' not in name]
        require([tensors[name].shape for name in names] == [average.shape for average in shadow],
                f'{path}: ema.shadow_params do not fit the {len(names)} parameters of its '
                'state_dict; ema=False takes these')
        tensors |= dict(zip(names, shadow, strict=True))
    return tensors


def find_source(source):
    """source if it is a path, else where the hub's org/name[@revision][:file] was downloaded to."""
    source = os.fspath(source)
    path = os.path.expanduser(source)
    match = re.fullmatch(r'([\w.-]+/[\w.-]+)(?:@([\w./-]+))?(?::([\w./-]+))?', source)
    if os.path.exists(path) or not match or path.endswith('.pt'):
        return path
    repository, revision, file = match.groups()
    patterns = [file] if file else ['*.json', '*.safetensors']
    try:
        from huggingface_hub import snapshot_download
        folder = snapshot_download(repository, revision=revision, allow_patterns=patterns)
    except Exception as error:  # the hub's client has many, and the remedy is the same
        what = ' '.join([repository, *patterns[:bool(file)]])
        if revision:
            what += f' --revision {revision}'
        raise ValueError(
            f'{source} is no file or folder here, and the hub cannot be used '
            f'({type(error).__name__}); where there is a network: hf download {what} '
            '--local-dir FOLDER, then give the FOLDER') from None
    return os.path.join(folder, file) if file else folder


def read_json(path):
    try:
        with open(path) as f:
            described = json.load(f)
    except (ValueError, RecursionError) as error:  # json's own, and that of a byte that is no text
        raise ValueError(f'{path} is not whole ({error}): download it again') from None
    require(isinstance(described, dict), f'{path} holds no dict')
    return described


def read_published(path, ema):
    """(named tensors, config.json) of a folder, a .safetensors or a Lightning .ckpt."""
    described = {}
    if path.endswith('.ckpt') and not os.path.isdir(path):
        return read_lightning(path, ema), described
    paths = [path]
    if os.path.isdir(path):
        if os.path.isfile(os.path.join(path, 'config.json')):
            described = read_json(os.path.join(path, 'config.json'))
        index = os.path.join(path, 'model.safetensors.index.json')
        if os.path.isfile(index):
            weight_map = read_json(index).get('weight_map')
            require(isinstance(weight_map, dict), f'{index} has no weight_map')
            files = sorted(set(map(str, weight_map.values())))
            for file in files:
                require(file == os.path.basename(file),
                        f'{index} names {file}: only files in its folder are read')
        else:
            files = sorted(file for file in os.listdir(path) if file.endswith('.safetensors'))
            some = ', '.join(files[:5]) + (' ...' if len(files) > 5 else '')
            require(len(files) < 2,
                    f'{path} holds several models: give one of {some} (hub: org/name:FILE)')
        paths = [os.path.join(path, file) for file in files]
    tensors = {}
    for file in paths:
        try:
            tensors |= load_file(file)
        except Exception as error:  # safetensors' own
            raise ValueError(f'{file} is not a whole .safetensors file ({error})') from None
    return tensors, described


def build(fields, overrides, tensors, source):
    """The net of fields and overrides with the given tensors for weights."""
    for key in [*fields, *overrides]:
        require(key in FIELDS, f"{source}: '{key}' is not a field of ModelConfig")
    fields = fields | overrides
    require(fields.get('n_head', 0) is not None, f'{source} does not say how many heads its width '
            f"of {fields.get('n_embd')} is divided into: give n_head=...")
    with torch.device('meta'):
        net = DiT(ModelConfig(**fields))
    load_state(net, tensors, source, assign=True)
    return net


def load_state(net, tensors, source, assign=False):
    """Give net the named tensors. Raises ValueError naming what disagrees in name or shape."""
    own = net.state_dict()
    lacking, unknown = own.keys() - tensors.keys(), tensors.keys() - own.keys()
    for what, names in (('lacks', lacking), ('has unknown', unknown)):
        some = ', '.join(sorted(names)[:5]) + (' ...' if len(names) > 5 else '')
        require(not names, f'{source} {what} {some}')
    for name, tensor in tensors.items():
        shape = tuple(getattr(tensor, 'shape', ()))
        require(isinstance(tensor, torch.Tensor) and shape == own[name].shape,
                f'{source}: {name} has shape {shape}, the model {tuple(own[name].shape)}')
    net.load_state_dict(tensors, assign=assign)


def check_overrides(overrides):
    """Refuse what is not a dict of fields of ModelConfig, or None."""
    require(overrides is None or isinstance(overrides, dict) and set(overrides) <= set(FIELDS),
            f'overrides={overrides!r}: a dict of fields of ModelConfig is needed, which are '
            f"{', '.join(FIELDS)}")


def load_pretrained(source, ema=True, device='cpu', trainable=False, **overrides):
    """A net in eval mode from source: a ckpt.pt of train.py (or the out_dir that holds one), a
    folder with model.safetensors (and config.json), a lone .safetensors, a Lightning .ckpt, or a
    Hugging Face id[@revision][:file]. The family is told by the names of the tensors.

    ema: the averaged weights where a file has both. trainable: its parameters take gradients.
    overrides: fields of ModelConfig that the file cannot tell. Sets net.tokenizer (arguments of
    data.get_tokenizer, None: unknown), net.constants (of the run that made the weights, or of the
    published family) and net.extra (tensors that are no parameters).
    Raises FileNotFoundError or ValueError."""
    path = find_source(source)
    published = path.endswith(('.safetensors', '.ckpt'))
    if os.path.isdir(path):
        published |= any(file.endswith('.safetensors') for file in os.listdir(path))
    if not published:
        path = path if path.endswith('.pt') else os.path.join(path, 'ckpt.pt')
        checkpoint = read_checkpoint(path)
        weights = checkpoint['ema' if ema else 'model']
        net = build(checkpoint['model_config'], overrides, weights, source)
        name = str(checkpoint['tokenizer'].get('name'))
        net.tokenizer = dict(
            name=name, folder=os.path.dirname(path), meta=checkpoint['tokenizer'])
        net.constants = checkpoint['constants']
        return net.to(device).eval().requires_grad_(trainable)
    if not os.path.exists(path):
        raise FileNotFoundError(f'{source} is not there')
    tensors, described = read_published(path, ema)
    key = family_of(tensors, source)
    family, source = FAMILIES[key], f"{source}, read in the layout '{key}',"
    extra = {name: tensors.pop(name) for name in list(tensors) if name.endswith('inv_freq')}
    pairs = [(theirs, ours) for ours, theirs in family.names.items()]
    tensors = {renamed(name, pairs) or name: tensor for name, tensor in tensors.items()}
    require('blocks.0.mlp_in.weight' in tensors, f'{source} lacks blocks.0.mlp_in.weight')
    fields = fields_of(family, tensors, next(iter(extra.values()), None), described)
    untold = described.get('nanomdm', {})  # by save_pretrained
    good = isinstance(untold, dict) and isinstance(untold.get('constants', {}), dict)
    require(good, f"{source} has no dict 'nanomdm' in its config.json")
    constants, tokenizer = untold.pop('constants', family.constants), untold.pop('tokenizer', None)
    fields |= untold
    n_head = overrides.get('n_head', fields['n_head'])
    for name in tensors:  # one by one: no second copy of the file in memory
        tensor = tensors[name].float()
        packed = family.heads_interleaved and name.endswith('attn_qkv.weight')
        if packed and n_head and tensor.size(0) % (3 * n_head) == 0:
            tensor = interleave_heads(tensor, n_head, inverse=True)
        tensors[name] = tensor
    net = build(fields, overrides, tensors, source)
    net.extra, net.constants = extra, dict(constants)
    if tokenizer:
        net.tokenizer = dict(name=str(tokenizer), folder=path)
    elif net.config.vocab_size in family.tokenizers:
        net.tokenizer = dict(name=family.tokenizers[net.config.vocab_size])
    return net.to(device).eval().requires_grad_(trainable)


def save_pretrained(net, folder):
    """Write config.json and model.safetensors as the released code of the net's family loads them,
    or with our own names where the net is of no published family."""
    config = dataclasses.asdict(net.config)
    family = next(family for family in FAMILIES.values()
                  if settings_of(family, config).items() <= config.items())
    tensors = {}
    for name, tensor in net.state_dict().items():
        if family.heads_interleaved and name.endswith('attn_qkv.weight'):
            tensor = interleave_heads(tensor, net.config.n_head)
        tensors[renamed(name, family.names.items())] = tensor.contiguous().cpu()
    extra = net.extra
    if not extra and family.inv_freq:
        head_dim = net.config.n_embd // net.config.n_head
        inv_freq = 1.0 / 10_000 ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        extra = {family.inv_freq.format(i=i): inv_freq.clone() for i in range(net.config.n_layer)}
    described = {theirs: config[ours] if ours in FIELDS else ours
                 for theirs, ours in family.described.items()}
    # what the family's own files cannot tell
    told = dataclasses.asdict(ModelConfig()) | fields_of(
        family, net.state_dict(), next(iter(extra.values()), None), described)
    untold = {key: value for key, value in config.items() if told[key] != value}
    if net.constants not in ({}, family.constants):
        untold['constants'] = net.constants
    os.makedirs(folder, exist_ok=True)
    if net.tokenizer and net.tokenizer['name'] != family.tokenizers.get(net.config.vocab_size):
        untold['tokenizer'] = net.tokenizer['name']
        trained = os.path.join(net.tokenizer.get('folder') or '', 'tokenizer.json')
        copy = os.path.join(folder, 'tokenizer.json')
        if os.path.isfile(trained) and os.path.abspath(trained) != os.path.abspath(copy):
            shutil.copyfile(trained, copy)
    if untold:
        described['nanomdm'] = untold
    path = os.path.join(folder, 'model.safetensors')
    save_file(tensors | extra, path + '.unfinished', metadata=dict(format='pt'))
    os.chmod(path + '.unfinished', 0o644)  # safetensors writes for its owner alone
    os.replace(path + '.unfinished', path)
    with open(os.path.join(folder, 'config.json'), 'w') as f:
        json.dump(described, f, indent=1)


# -----------------------------------------------------------------------------
# what makes it fast: skip at first reading


class _NLL(torch.autograd.Function):
    """Linear layer and cross entropy in one, in chunks of the vocabulary that fit a CPU's cache.

    Forward keeps each chunk's softmax without the target, in the compute dtype, and the chunk's
    probability; backward is two products a chunk. The target has a term of its own, exact where
    its probability is near 1. Sums and exponentials are float32 whatever the autocast.
    """

    @staticmethod
    def forward(ctx, h, weight, bias, target, exclude, needs_grad):
        device = h.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h.dtype
        wide = torch.promote_types(dtype, torch.float32)
        dtypes = h.dtype, weight.dtype, None if bias is None else bias.dtype
        h, weight = h.to(dtype), weight.to(dtype)
        N, V = h.size(0), weight.size(0)
        chunk_bytes = 2 ** (23 if device == 'cpu' else 29)
        width = min(V, max(512, chunk_bytes // dtype.itemsize // max(N, 1)))
        width = math.ceil(V / math.ceil(V / width))  # all chunks alike
        chunks = [slice(i, i + width) for i in range(0, V, width)]
        softmaxes, lses = [], []
        logit = 0
        for chunk in chunks:
            logits = (h @ weight[chunk].t()).to(wide)  # (N, width)
            if bias is not None:
                logits += bias[chunk]
            if exclude is not None and chunk.start <= exclude < chunk.stop:
                logits[:, exclude - chunk.start] = -1e30  # finite: it may be alone in the chunk
            column = (target - chunk.start).clamp(0, logits.size(1) - 1)[:, None]
            value = logits.gather(1, column)
            is_target = column == target[:, None] - chunk.start
            logit = torch.where(is_target, value, logit)
            logits.scatter_(1, column, torch.where(is_target, -1e30, value))
            softmax = logits.softmax(dim=1)
            lses.append(logits.amax(dim=1) - softmax.amax(dim=1).log())
            if needs_grad:
                softmaxes.append(softmax.to(dtype))
        logit, lses = logit.squeeze(1), torch.stack(lses)  # (N,), (chunks, N)
        nll = F.softplus(lses.logsumexp(dim=0) - logit, threshold=50)
        nll = nll + 0 * logit  # NaN where the logit is infinite
        ctx.set_materialize_grads(False)  # most objectives have no use for the logit
        if needs_grad:
            probs = torch.exp(lses - (nll + logit))
            ctx.save_for_backward(h, weight, target, nll, probs, *softmaxes)
            ctx.chunks, ctx.dtypes = chunks, dtypes
        return nll, logit

    @staticmethod
    def backward(ctx, grad_nll, grad_logit):
        h, weight, target, nll, probs, *softmaxes = ctx.saved_tensors
        h_dtype, weight_dtype, bias_dtype = ctx.dtypes
        if grad_nll is None:
            grad_nll = torch.zeros_like(nll)
        grad_target = grad_nll * torch.expm1(-nll)  # (N,)
        grad_target = grad_target + (0 if grad_logit is None else grad_logit)
        dh = weight[target] * grad_target[:, None]
        dweight = h.new_empty(weight.shape, dtype=weight_dtype)
        dbias = h.new_empty(len(weight), dtype=bias_dtype) if bias_dtype else None
        for chunk, prob, softmax in zip(ctx.chunks, probs, softmaxes, strict=True):
            grad = (grad_nll * prob)[:, None]  # (N, 1)
            dh += (softmax @ weight[chunk]) * grad
            dweight[chunk] = softmax.t() @ (h * grad).to(softmax.dtype)
            if dbias is not None:
                dbias[chunk] = (softmax.t() @ grad.to(softmax.dtype)).squeeze(1)
        dweight.index_add_(0, target, (h * grad_target[:, None]).to(weight_dtype))
        if dbias is not None:
            dbias.index_add_(0, target, grad_target.to(bias_dtype))
        return dh.to(h_dtype), dweight, dbias, None, None, None


def dropout(x, p):
    """F.dropout, on a CPU with 16 random bits an element (p is rounded): torch's own, in one
    thread, takes longer there than the mlp before it."""
    if p == 0:
        return x
    if x.device.type != 'cpu':
        return F.dropout(x, p)
    threshold = min(round(p * 2 ** 16), 2 ** 16 - 1)  # of 2^16 values, those below are dropped
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-2 ** 63, None)
    bits = bits.view(torch.int16)[:x.numel()].view(x.shape)
    return x * (bits >= threshold - 2 ** 15).to(x.dtype).mul_(2 ** 16 / (2 ** 16 - threshold))


def attention(q, k, v, attn_mask=None, p=0.0, is_causal=False):
    """softmax(q k^T / sqrt(C/H)) v, q (B, H, L, C/H), k and v (B, H, K, C/H).

    attn_mask (B, 1, 1, K) bool: what is looked at. p: dropout of the weights.
    In bfloat16 on a CPU plain products take half the time, with rounded scores: the quickstart's
    net is 0.34% from its float32 output rather than 0.29%.
    """
    bfloat16 = q.dtype == torch.bfloat16
    small = q.size(2) * k.size(2) <= 2 ** 20
    if bfloat16 and q.device.type == 'cpu' and small and not (p or is_causal):
        scores = (q * q.size(3) ** -0.5) @ k.transpose(2, 3)
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, torch.finfo(scores.dtype).min)
        return scores.softmax(dim=3) @ v
    if bfloat16 and q.device.type == 'cuda' and flash_attn_func and attn_mask is None:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return flash_attn_func(q, k, v, dropout_p=p, causal=is_causal).transpose(1, 2)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=attn_mask, dropout_p=p, is_causal=is_causal)


def reuse_memory():
    """Keep freed memory (glibc only): zeroing new pages is a tenth of a training step on a CPU."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)   # M_MMAP_MAX: no mapping of its own for a large tensor
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: no trimming
