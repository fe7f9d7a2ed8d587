"""
The network, the noise, the objectives, and weights in and out.

What is unusual here, for a reader who knows nanoGPT:
- attention looks both ways, positions are rotary, a mask id stands for an unknown token
- adaLN-zero conditioning (DiT), mostly of sigma = 0: one vector for the whole batch
- the head projects only the positions that a loss or a sampler needs
- one class for all families: an architecture is a ModelConfig; a block holds attention and an mlp,
  or a state-space model in both directions (mixer='mamba')

As a script it uploads a net to the Hugging Face hub:

    python model.py --push=you/name --source=out-quickstart

References: MDLM (Sahoo et al. 2024, arXiv 2406.07524), DiT (Peebles & Xie 2022, arXiv 2212.09748),
SMDM (Nie et al. 2024, arXiv 2410.18514).
"""
import contextlib
import ctypes
import dataclasses
import errno
import functools
import inspect
import json
import math
import os
import pickle
import re
import shutil
import sys
import tempfile
import threading
import time
import types
import typing
import weakref
import zipfile
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch._compile import _disable_dynamo  # torch.compiler.disable takes a second to import
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from configurator import require

try:
    from flash_attn import flash_attn_func, flash_attn_varlen_func  # optional, for GPUs
except ImportError:
    flash_attn_func = flash_attn_varlen_func = None
try:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn  # optional, for GPUs
except ImportError:
    selective_scan_fn = None

push = None      # [str] the hub's you/name that a net is uploaded to
source = 'out'   # the net: an out_dir, or what else load_pretrained reads
private = False  # a new repository is seen by you alone


def require_known(what, value, known):
    require(value in [*known], f"{what}'{value}' is not known: choose from {', '.join(known)}")


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
    qkv_bias: bool = False  # of the attention, which begins with looking near: look_near
    embed_norm: bool = False  # a norm behind the embedding
    tied: bool = False  # the head's weights are the embedding's
    head_mask: bool = True  # False: no row for the mask, the last id
    rotary_bf16: bool = False  # cos and sin rounded to bfloat16 (SMDM)
    dropout: float | int = 0.0  # on the two residual branches of a block
    attn_dropout: float | int = 0.0  # on the attention weights
    init: str = 'mdlm'  # adaLN-zero; or 'xlm' (PyTorch's), 'smdm' (normal)
    objective: str = 'subs'  # what the outputs mean: a key of OBJECTIVES
    mixer: str = 'attention'  # with an mlp; or 'mamba', alone in its block (DiMamba)
    d_state: int = 16  # mamba: numbers a channel remembers
    d_conv: int = 4  # mamba: taps of the convolution
    expand: int = 2  # mamba: channels over n_embd
    block_length: int | None = None  # block diffusion: tokens that are noised together; None: all

    def __post_init__(self):
        for field in dataclasses.fields(self):
            kinds = typing.get_args(field.type) or (field.type,)
            value = getattr(self, field.name)
            names = ' or '.join(kind.__name__ for kind in kinds)
            require(type(value) in kinds, f'{field.name}={value!r}: {names} is needed')
        if self.n_mlp is None:
            self.n_mlp = 4 * self.n_embd

        choices = dict(
            norm=('layernorm', 'rmsnorm'), mlp=ACTIVATIONS, init=('mdlm', 'xlm', 'smdm'),
            mixer=('attention', 'mamba'), objective=OBJECTIVES)
        for key, known in choices.items():
            require_known(f'{key}=', getattr(self, key), known)
        V, is_ar = self.vocab_size, self.objective == 'ar'
        mamba = self.mixer == 'mamba'
        blocks = self.objective == 'subs' and not (mamba or self.time_conditioning)
        rules = [
            ('block_size vocab_size n_layer n_head n_embd n_mlp d_state d_conv expand',
             lambda x: x >= 1, 'at least 1'),
            ('cond_dim', lambda x: x >= 0, '0 or more'),
            ('cond_dim', lambda x: x or not self.time_conditioning, 'above 0 to condition on time'),
            ('dropout attn_dropout', lambda x: 0 <= x < 1, 'a probability below 1'),
            ('mask_id pad_id', lambda x: x is None or 0 <= x < V, f'one of the {V} ids'),
            ('mask_id', lambda x: self.causal or x is not None, 'an id unless causal'),
            ('mask_id', lambda x: self.head_mask or x == V - 1, 'the last id without head_mask'),
            ('tied', lambda x: not x or self.head_mask and self.pad_id is None,
             'False without head_mask, or with pad_id'),
            ('causal', lambda x: not (x and mamba), "False: mixer 'mamba' looks both ways"),
            ('init', lambda x: x == 'mdlm' or not mamba, "'mdlm' with mixer 'mamba'"),
            ('attn_dropout qkv_bias', lambda x: not (x and mamba), "0 with mixer 'mamba'"),
            ('causal', lambda x: x == is_ar, f"{is_ar} with objective '{self.objective}'"),
            ('block_length', lambda x: x is None or blocks and x > 0 and self.block_size % x == 0,
             f'a divisor of block_size={self.block_size}, with objective subs, attention and no '
             'time_conditioning'),
        ]
        for keys, holds, rule in rules:
            for key in keys.split():
                value = getattr(self, key)
                require(holds(value), f'{key}={value!r}: it must be {rule}')
        require(
            mamba or self.n_embd % (2 * self.n_head) == 0,
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


def inv_freq(head_dim, device='cpu'):
    return 1.0 / 10_000 ** (torch.arange(0, head_dim, 2, device=device) / head_dim)


def rotary_table(position, head_dim, bf16=False):
    """cos and sin, (..., 1, 1, head_dim/2) float32, at positions (...)."""
    angle = position[..., None, None, None] * inv_freq(head_dim, position.device)
    dtype = torch.bfloat16 if bf16 else torch.float32
    return angle.cos().to(dtype).float(), angle.sin().to(dtype).float()


@torch.no_grad()
def look_near(bias, n_head):
    """Give attn_qkv's bias (3C,) values with which head 0 looks one token back, head 1 one ahead,
    heads 2 and 3 less sharply two back and two ahead, ... whatever the tokens are.

    For rotary frequencies w the bias adds sum_w a w cos(w (j - i - offset)) to the scores, its
    greatest value at the offset. Without it a net learns to look near so late that it spends a
    quarter of a short run at the loss of the tokens' frequencies.
    """
    bias.zero_()
    q, k, _ = bias.view(3, n_head, 2, -1)  # (n_head, 2, head_dim/2): rotary's halves
    w = 1.0 / 10_000 ** torch.linspace(0, 1, q.size(2) + 1)[:-1]
    for head in range(n_head):
        far = 1 + head // 2
        offset = far if head % 2 else -far
        scale = (2.5 * 0.25 ** (far - 1) * w * math.sqrt(2 * len(w))).sqrt()
        q[head, 0] = scale
        k[head] = scale * torch.stack(((offset * w).cos(), -(offset * w).sin()))


def apply_rotary(x, cos, sin):
    """Rotate halves (not interleaved pairs) of the heads of x (B, L, 2, H, head_dim)."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


class SSM(nn.Module):
    """The parameters of one direction of Mamba (Gu & Dao 2023, arXiv 2312.00752, algorithm 2)."""

    def __init__(self, config):
        super().__init__()
        E, N, K = config.expand * config.n_embd, config.d_state, config.d_conv
        R = math.ceil(config.n_embd / 16)
        self.A_log = nn.Parameter(torch.arange(1.0, N + 1).log().repeat(E, 1))
        self.D = nn.Parameter(torch.ones(E))
        self.conv1d = nn.Conv1d(E, E, K, groups=E, padding=K - 1)
        self.x_proj = nn.Linear(E, R + 2 * N, bias=False)
        self.dt_proj = nn.Linear(R, E)
        with torch.no_grad():  # softplus(bias) is log-uniform in [0.001, 0.1]
            dt = torch.exp(torch.empty(E).uniform_(math.log(0.001), math.log(0.1)))
            self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))


class Mamba(nn.Module):
    """The sum of two SSMs, of either direction, which share their projections (DiMamba)."""

    def __init__(self, config):
        super().__init__()
        C, E = config.n_embd, config.expand * config.n_embd
        self.fwd = SSM(config)
        self.rev = SSM(config)
        self.in_proj = nn.Linear(C, 2 * E, bias=False)
        self.out_proj = nn.Linear(E, C, bias=False)
        with torch.no_grad():
            self.out_proj.weight /= math.sqrt(config.n_layer)

    def forward(self, x, keep=None):
        """(B, L, C) -> (B, L, C). keep (B, L, 1) bool: False adds nothing to any state."""
        x, z = self.in_proj(x).chunk(2, dim=2)
        if keep is not None:
            x, keep = x * keep, torch.stack((keep, keep.flip(1)))
        # (2, B, L, E): the directions side by side from here on
        x = convolve_both_ways(x, self.both('conv1d.weight')[:, :, 0], self.both('conv1d.bias'))
        if keep is not None:
            x = x * keep
        E, R = self.both('dt_proj.weight').shape[1:]
        N = self.fwd.A_log.size(1)
        delta, B, C = torch.einsum(
            'gble,gre->gblr', x, self.both('x_proj.weight')).split((R, N, N), dim=3)
        delta = torch.einsum('gblr,ger->gble', delta, self.both('dt_proj.weight'))
        y, y_rev = selective_scan(
            x, delta, -torch.exp(self.both('A_log')), B, C, self.both('D'),
            self.both('dt_proj.bias'))
        return self.out_proj((y + y_rev.flip(1)) * F.silu(z))

    def both(self, name):
        return torch.stack([self.fwd.get_parameter(name), self.rev.get_parameter(name)])


class Block(nn.Module):

    def __init__(self, config):
        super().__init__()
        C, M = config.n_embd, config.n_mlp
        self.config = config
        self.norm1 = Norm(config)
        self.mamba = Mamba(config) if config.mixer == 'mamba' else None
        if self.mamba:
            self.adaLN = nn.Linear(config.cond_dim, 3 * C) if config.cond_dim else None
            return
        self.attn_qkv = nn.Linear(C, 3 * C, bias=config.qkv_bias)
        if config.qkv_bias:
            look_near(self.attn_qkv.bias, config.n_head)
        self.attn_out = nn.Linear(C, C, bias=False)
        self.norm2 = Norm(config)
        bias = config.mlp_bias
        self.mlp_gate = nn.Linear(C, M, bias) if config.mlp == 'swiglu' else None
        self.mlp_in = nn.Linear(C, M, bias)
        self.mlp_out = nn.Linear(M, C, bias)
        self.adaLN = nn.Linear(config.cond_dim, 6 * C) if config.cond_dim else None

    def attn_dropout(self):
        return self.config.attn_dropout if self.training else 0.0

    def attention(self, x, rotary, attn_mask, cache):
        B, L, C = x.shape
        H = self.config.n_head
        qkv = self.attn_qkv(x).view(B, L, 3, H, C // H)
        q, k = apply_rotary(qkv[:, :, :2], *rotary).permute(2, 0, 3, 1, 4)  # (B, H, L, C/H) each
        v = qkv[:, :, 2].transpose(1, 2)
        is_causal = self.config.causal
        if cache is not None:
            k, v = cache.extend(self, k, v)
            is_causal = is_causal and cache.position is None
        if callable(attn_mask):  # within documents or blocks
            y = attn_mask(q, k, v)
        else:
            y = attention(q, k, v, attn_mask, self.attn_dropout(), is_causal)
        return self.attn_out(y.transpose(1, 2).reshape(B, L, C))

    def mlp(self, x):
        activation = ACTIVATIONS[self.config.mlp]
        if self.mlp_gate:
            return self.mlp_out(activation(self.mlp_gate(x)) * self.mlp_in(x))
        return self.mlp_out(activation(self.mlp_in(x)))

    def forward(self, x, c, rotary, attn_mask=None, cache=None):
        p = self.config.dropout if self.training else 0.0
        if self.mamba:
            branches = [(self.norm1, lambda x: self.mamba(x, attn_mask))]
        else:
            branches = [(self.norm1, lambda x: self.attention(x, rotary, attn_mask, cache)),
                        (self.norm2, self.mlp)]
        if c is None:
            for norm, branch in branches:
                x = x + dropout(branch(norm(x)), p)
            return x
        modulation = self.adaLN(c)[:, None].chunk(3 * len(branches), dim=2)  # (1 or B, 1, C) each
        for i, (norm, branch) in enumerate(branches):
            shift, scale, gate = modulation[3 * i:3 * i + 3]
            x = x + gate * dropout(branch(norm(x, shift, scale)), p)
        return x


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
        self.tokenizer = None  # load_pretrained fills in these four
        self.constants = {}
        self.progress = {}
        self.extra = {}
        self.wte = nn.Embedding(V, C, padding_idx=config.pad_id)
        self.sigma_map = SigmaMap(cond_dim) if cond_dim else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm_e = Norm(config) if config.embed_norm else nn.Identity()
        self.norm_f = Norm(config)
        self.lm_head = nn.Linear(C, V if config.head_mask else V - 1, bias=config.head_bias)
        self.tie()
        self.adaLN_f = nn.Linear(cond_dim, 2 * C) if cond_dim else None
        if config.init == 'mdlm':
            if config.mixer == 'mamba':
                nn.init.normal_(self.wte.weight, std=0.02)
            else:
                nn.init.kaiming_uniform_(self.wte.weight, a=math.sqrt(5))
                for p in self.lm_head.parameters():
                    nn.init.zeros_(p)
                if config.tied:
                    nn.init.normal_(self.wte.weight, std=0.02)
            for name, p in self.named_parameters():
                if 'adaLN' in name:
                    nn.init.zeros_(p)  # every block starts as the identity
        elif config.init == 'smdm':
            for name, p in self.named_parameters():
                if name.endswith(('attn_out.weight', 'mlp_out.weight')):
                    nn.init.normal_(p, std=1 / math.sqrt(C) / config.n_layer)
                elif p.dim() == 2:
                    nn.init.normal_(p, std=math.sqrt(2 / (5 * C)))

    def tie(self):
        if self.config.tied:
            self.lm_head.weight = self.wte.weight

    def trunk(self, x, sigma=None, attention_mask=None, cache=None, x0=None, causal=False):
        """ids x (B, L) -> (B, L, n_embd).

        sigma (B,): total noise, which a time-conditioned net needs.
        attention_mask (B, L) bool: False where nothing looks (mamba: what adds nothing). Or int, of
        rows that hold several documents: the number of each token's document, -1 of padding.
        Attention then stays within a document, whose positions begin at 0. cache: a KVCache.
        With a block_length each block looks at itself and those before it, at most block_size
        positions: in x, or of x = xt at the clean ones of x0 (B, L). causal: attention looks back
        only, as it always does in a causal net.
        """
        config = self.config
        causal = causal or config.causal
        require(
            sigma is not None or not config.time_conditioning,
            'this net is time-conditioned: give sigma (B,), the total noise')
        require(
            config.mixer == 'attention' or not is_packed(attention_mask),
            "rows of several documents need a net with mixer='attention': give another packing")
        require(
            not config.block_length or not is_packed(attention_mask),
            "rows of several documents do not go with block_length: give another packing")
        c = None
        if config.cond_dim:
            if not config.time_conditioning:
                sigma = torch.zeros(1, device=x.device)
            c = self.sigma_map(sigma)  # (1 or B, cond_dim)
        L = x.size(1)
        position = torch.arange(L, device=x.device)
        attn_mask = rotary = None
        if config.mixer == 'mamba':
            attn_mask = None if attention_mask is None else attention_mask[:, :, None]
        elif cache is not None and cache.position is not None:
            position, attn_mask = cache.positions, cache.attn_mask
        elif is_packed(attention_mask):
            attn_mask, position = within_documents(
                attention_mask, causal, self.blocks[0].attn_dropout())
        elif causal and not config.causal:
            attn_mask = functools.partial(
                attention, p=self.blocks[0].attn_dropout(), is_causal=True)
        elif config.block_length and L > config.block_length:
            if x0 is not None:
                x = torch.cat((x0, x), dim=1)
                position = position.repeat(2)
            attn_mask = within_blocks(
                config, L, x, attention_mask, self.blocks[0].attn_dropout())
        elif attention_mask is not None and not causal:  # padding is on the right
            attn_mask = attention_mask[:, None, None, :]
            if self.training and has_flash(x.device):
                attn_mask, _ = within_documents(
                    attention_mask.int() - 1, p=self.blocks[0].attn_dropout(), way='flash')
        if config.mixer == 'attention':
            rotary = rotary_table(position, config.n_embd // config.n_head, config.rotary_bf16)
        h = self.norm_e(self.wte(x))
        for block in self.blocks:
            h = block(h, c, rotary, attn_mask, cache)
        h = h[:, -L:]
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
        exclude: an id without probability."""
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
            ends = {*self.wte.parameters(), *self.lm_head.parameters()}
            n -= sum(p.numel() for p in ends)
        return n

    def train_flops(self, rows, length, scored):
        """FLOPs of a step, matrix products only; `scored` positions are projected."""
        config, C = self.config, self.config.n_embd
        per_token = sum(p.numel() for name, p in self.blocks.named_parameters()
                        if p.dim() == 2 and not name.endswith(('adaLN.weight', 'A_log')))
        if config.mixer == 'attention':
            per_token += config.n_layer * 2 * length * C
        if config.block_length and config.block_length < length:
            per_token *= 2  # [x0, xt]; attention takes a little less
        return 6 * (rows * length * per_token + scored * C * config.vocab_size)


def is_packed(attention_mask):
    """Whether it numbers documents."""
    return attention_mask is not None and attention_mask.dtype != torch.bool


class KVCache:
    """Keys and values of a net that looks back only, token by token or in blocks: of the last
    `length` positions of each row, (2, rows, H, length, C/H) a block of the net.

    The trunk gets tokens (n, T) of the rows `slots`: with position=None the first ones, else those
    from `position` (n,) on: one, or of block diffusion a block of `width`, less at a row's end. A
    block may come again: the last time counts. position, and attention_mask with it, are on the
    CPU to not wait for a GPU.
    """

    def __init__(self, rows, length, width=1):
        self.rows = rows
        self.length = length
        self.width = width
        self.kept = {}
        self.slots = slice(None)
        self.position = None
        self.at = None  # (row (n, 1), place (n, T)) on the device
        self.positions = None  # (n, T) on the device
        self.attn_mask = None  # (n, 1, 1, reach) bool on the device; None: all True
        self.reach = 0

    def begin(self, position, T, device, others=(), attention_mask=None):
        """T tokens a row stand from position (n,) on; attention_mask (n, T) bool. What all blocks
        need goes to the device, and with it CPU tensors `others`, which are returned."""
        n, self.position = len(position), position
        inside = torch.ones(n, T, dtype=torch.bool) if attention_mask is None else attention_mask
        positions = position[:, None] + torch.arange(self.width)
        place = positions % self.length
        self.reach = min(int(positions.max()) + 1, self.length)
        seen = torch.arange(self.reach) < position[:, None]
        seen.scatter_(1, place, F.pad(inside, (0, self.width - T)))
        self.positions, place, *others, seen = sent_at_once(
            (positions[:, :T], place[:, :T], *others, None if seen.all() else seen), device)
        self.at = torch.arange(self.rows, device=device)[self.slots, None], place
        self.attn_mask = None if seen is None else seen[:, None, None]
        return others

    def extend(self, block, k, v):
        """Store k and v (n, H, T, C/H); return those to look at."""
        if block not in self.kept:
            self.kept[block] = k.new_zeros(2, self.rows, k.size(1), self.length, k.size(3))
        kv, new = self.kept[block], torch.stack((k, v))
        if self.position is None:
            T = k.size(2)
            if T > self.length:  # position p stands at p % length
                new = new[:, :, :, -self.length:].roll(T % self.length, dims=3)
            kv[:, self.slots, :, :T] = new
            return k, v
        row, place = self.at
        kv[:, row, :, place] = new.permute(1, 3, 0, 2, 4)
        return kv[:, self.slots, :, :self.reach].unbind()

    def keep(self, slots):
        """Drop all rows but these (n,), on the device."""
        self.rows = len(slots)
        self.kept = {block: kv[:, slots] for block, kv in self.kept.items()}


# n_layer, n_head, n_embd; SMDM's are named after their non-embedding parameters
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
    """Total noise sigma at time t in [0, 1], its derivative dsigma, and alpha = exp(-sigma), the
    probability of not being masked. A schedule defines sigma or alpha."""

    def alpha(self, t):
        return torch.exp(-self.sigma(t))

    def sigma(self, t):
        return -torch.log(self.alpha(t))

    def dsigma(self, t):
        with torch.enable_grad():
            t = t.detach().requires_grad_()
            return torch.autograd.grad(self.sigma(t).sum(), t)[0]

    def conditioning(self, t):
        """What a time-conditioned net is fed: finite even where alpha is 0."""
        return self.sigma(t).clamp(max=30)

    def conditioning_at(self, mask_prob):
        """The same for mask_prob = 1 - alpha, cut off at t = 1."""
        alpha_1 = float(self.alpha(torch.ones((), dtype=torch.float64)))
        return -torch.log1p(-mask_prob.clamp(max=1 - alpha_1)).clamp(min=-30)

    def sigma_range(self):
        """The noise between which time is importance-sampled."""
        raise ValueError('importance-sampled time is not defined for the schedule '
                         f'{type(self).__name__}: choose loglinear or linear')

    def log_masked_range(self):
        """log(1 - exp(-sigma)) at both ends."""
        return [math.log1p(-math.exp(-sigma)) for sigma in self.sigma_range()]

    def importance_time(self, t):
        """Uniform t -> times of uniform log(1 - alpha), of one weight in the NELBO
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
        falls = (alpha.diff() <= 0).all() and dsigma.isfinite().all()
        falls = falls and 1 >= alpha[0] > alpha[-1] >= 0
    except (ArithmeticError, TypeError, ValueError):  # such as the logarithm of 0
        falls = False
    require(falls, f"schedule '{name}' with {parameters}: alpha(t) must fall from at most 1 to at "
            'least 0 over t = 0 ... 1')
    return schedule


def schedule_of(constants):
    """The Schedule that constants of train.py name, by default loglinear."""
    parameters = constants.get('schedule_parameters') or {}
    require(isinstance(parameters, dict), f'schedule_parameters={parameters!r}: a dict is needed')
    parameters = {str(key): value for key, value in parameters.items()}
    return get_schedule(constants.get('schedule', 'loglinear'), **parameters)


loglinear = get_schedule('loglinear')


def corrupt(x0, t, mask_id, schedule, generator=None, maskable=None):
    """xt ~ q(xt | x0): positions of x0 (B, L) are masked with probability 1 - alpha(t), t (B,) or
    (B, L), where maskable (B, L)."""
    device = generator.device if generator else 'cpu'
    u = torch.rand(x0.shape, generator=generator, device=device).to(x0.device)
    masked = u < 1 - schedule.alpha(t if t.dim() == 2 else t[:, None])
    if maskable is not None:
        masked = masked & maskable
    return torch.where(masked, mask_id, x0)


def in_blocks(x, block_length):
    """(B, L) -> (B, blocks, block_length); the last block is filled up with 0."""
    return F.pad(x, (0, -x.size(1) % block_length)).unflatten(1, (-1, block_length))


def corrupt_exactly(x0, t, mask_id, generator, maskable, block_length=None):
    """Mask exactly round(t n) of the n maskable positions of each row; t (B,). Or of each block, t
    (B, L)."""
    if block_length:
        ids, t, maskable = (
            in_blocks(x, block_length).flatten(0, 1) for x in (x0, t, maskable))
        xt = corrupt_exactly(ids, t[:, 0], mask_id, generator, maskable)
        return xt.view(len(x0), -1)[:, :x0.size(1)]
    u = torch.rand(x0.shape, generator=generator).masked_fill(~maskable, 2)
    rank = u.argsort(dim=1).argsort(dim=1)
    count = (t * maskable.sum(dim=1)).round()
    return torch.where((rank < count[:, None]) & maskable, mask_id, x0)


def corrupt_batch(
        batch, t, config, schedule, key, device, visible=False, exactly=False, drop_prompt=False):
    """A batch of data.TokenRows at the times t (B,), or (B, blocks) with a block_length, with xt
    drawn from the seed `key`, or each row from one of a list.

    Returns tensors on device: x0, xt, t, scored, attention_mask (None: all True) and masked (N,),
    flat indices of the positions with a loss. visible: those are all that are scored.
    exactly: see corrupt_exactly. drop_prompt: what may not be corrupted is masked too.
    For a causal net nothing is masked, and the first token of a document is not scored.
    """
    x0, scored, maskable = batch['x0'], batch['scored'], batch['maskable']
    attention_mask = batch['attention_mask']
    packed = is_packed(attention_mask)
    xt = masked = None
    width = config.block_length
    if width:
        t = t.repeat_interleave(width, dim=1)[:, :x0.size(1)]
    if config.causal:
        scored = scored.clone()
        scored[:, 0] = False
        if packed:
            scored[:, 1:] &= attention_mask.diff(dim=1) == 0
    else:
        keys = [key] if isinstance(key, int) else key
        parts = []
        for rows, k in zip(torch.arange(len(x0)).chunk(len(keys)), keys, strict=True):
            generator = torch.Generator().manual_seed(k)
            given = x0[rows], t[rows], config.mask_id
            if exactly:
                parts.append(corrupt_exactly(*given, generator, maskable[rows], width))
            else:
                parts.append(corrupt(*given, schedule, generator, maskable[rows]))
        xt = torch.cat(parts)
        if drop_prompt:
            xt = xt.masked_fill(~maskable, config.mask_id)
            if width:  # the net sees x0, too
                x0 = x0.masked_fill(~maskable, config.mask_id)
        has_loss = scored if visible else (xt == config.mask_id) & scored
        masked = has_loss.flatten().nonzero().squeeze(1)

    noised = dict(x0=x0, xt=xt, t=t, masked=masked, scored=scored)
    noised['attention_mask'] = None if not packed and attention_mask.all() else attention_mask
    return {name: tensor if tensor is None else sent(tensor, device)
            for name, tensor in noised.items()}


def sent(tensor, device):
    """A tensor of the CPU on the device, without waiting for a GPU."""
    on_gpu = device.type == 'cuda'
    return (tensor.pin_memory() if on_gpu else tensor).to(device, non_blocking=on_gpu)


def sent_at_once(tensors, device):
    """CPU tensors, those of wide elements first, and Nones, on the device: a GPU's by one copy."""
    if device.type != 'cuda':  # MPS has no float64
        return [x if x is None or x.dtype == torch.float64 else x.to(device) for x in tensors]
    flat = [torch.empty(0, dtype=torch.uint8) if x is None
            else x.contiguous().view(-1).view(torch.uint8) for x in tensors]
    parts = sent(torch.cat(flat), device).split([len(x) for x in flat])
    return [None if x is None else part.view(x.dtype).view(x.shape)
            for x, part in zip(tensors, parts, strict=True)]


def stratified_times(u, index, n, eps=1e-3, most=1.0):
    """A time in [eps, most], below 1, in each stratum index (...,) of n, from one uniform u
    (Kingma et al. 2021, arXiv 2107.00630, appendix I.1)."""
    below_1 = 1 - 2 ** -24  # rounding up to 1 would leave a weight of inf / inf where alpha is 0
    return ((u + index / n) % 1 * (most - eps) + eps).float().clamp(max=below_1)


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


def subs(pos, *, importance=False):
    """MDLM's NELBO: -log p(x0 | xt), the mask excluded, weighted by time.

    Equation 10: by -alpha'_t / (1 - alpha_t), 1/t for loglinear.
    Equation 8, T steps: by T (alpha_s - alpha_t) / (1 - alpha_t), s = t - 1/T.
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


def d3pm(pos, *, subs_masking=False):
    """Absorbing D3PM's diffusion term, T KL(q(xs | xt, x0) || p(xs | xt)).

    p_m: the probability the net gives the mask, 0 with subs_masking, which is subs
    (Austin et al. 2021; MDLM, appendix A.2.4). t and s: 1 - alpha, as released without eps for
    loglinear.
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
    at_zero = s <= dt / 2
    if not isinstance(pos.schedule, LogLinear):
        t, s = (1 - pos.schedule.alpha(time) for time in (t, s.masked_fill(at_zero, 0)))
        dt, at_zero = t - s, s <= 0
    log_t = torch.log1p((1 - t) * p_m / t)
    log_s = torch.log1p((1 - s) * p_m / s.masked_fill(at_zero, 1))
    log_s = log_s.masked_fill(at_zero, 0)  # its factor s/t is 0 at s = 0
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
    """-log p(x0[:, i] | x0[:, :i]), (B, L), the mask excluded; 0 at column 0. Attention looks back
    only, in any net."""
    if attention_mask is not None:
        attention_mask = attention_mask[:, :-1]
    h = net.trunk(x0[:, :-1], attention_mask=attention_mask, causal=True)
    nll = net.nll(h.flatten(0, 1), x0[:, 1:].flatten(), exclude=net.config.mask_id)
    return F.pad(nll.view(len(x0), -1), (1, 0))


@dataclass
class Objective:
    """A new objective is a loss and a row of OBJECTIVES. The keyword-only arguments of the loss are
    its options: constants of train.py that have their names set them."""
    loss: typing.Callable  # (MaskedPositions, *, options) -> (N,); that of 'ar' takes rows
    predicts: str  # what the net puts out; a sampler says what it takes
    sampler: str | None = None  # the default one
    bound: str | None = None  # the objective to evaluate by; None: its own loss
    steps: str = 'none'  # T is 'none', 'optional' or 'required'
    has_reconstruction: bool = False  # reconstruction_loss is a term of the bound
    over_masked: bool = False  # trained on the mean over masked positions; False: over all scored

    @property
    def options(self):
        """name -> default"""
        parameters = inspect.signature(self.loss).parameters.values()
        for p in parameters:
            require(p.default is p.empty or p.kind == p.KEYWORD_ONLY or self.loss is ar,
                    f'{self.loss.__name__}: its option {p.name} must be keyword-only: (p, *, ...)')
        return {p.name: p.default for p in parameters if p.kind == p.KEYWORD_ONLY}


OBJECTIVES = {
    'subs': Objective(subs, 'x0', 'ancestral', 'subs', 'optional'),
    'mlm': Objective(mlm, 'x0', 'fixed', 'subs', over_masked=True),
    'd3pm': Objective(
        d3pm, 'x0 or mask', 'ancestral', 'd3pm', 'required', has_reconstruction=True),
    'sedd': Objective(sedd, 'score', 'analytic', 'sedd'),
    'ar': Objective(ar, 'next token', 'ar', 'ar'),
}


def options_of(objective, options):
    """Those of options (a dict) that its loss takes."""
    return {name: options[name] for name in options if name in OBJECTIVES[objective].options}


def check_objective(objective, T=0, options=None, causal=None):
    """Raise ValueError where these do not go together. options: name -> value, those of other
    objectives at their defaults."""
    require_known('objective ', objective, OBJECTIVES)
    record, options = OBJECTIVES[objective], options or {}
    said = f"objective '{objective}'"
    require(T >= 0, f'T={T}: the number of steps, or 0 for continuous time')
    require(T or record.steps != 'required', f'{said} is defined in steps: give T, such as T=1000')
    require(not T or record.steps != 'none', f'{said} is not defined in steps: T={T}')
    known = {name: key for key, other in OBJECTIVES.items() for name in other.options}
    for name in options.keys() - record.options.keys():
        require_known('option ', name, known)
        require(options[name] == OBJECTIVES[known[name]].options[name],
                f'{name}={options[name]!r} goes with objective {known[name]}')
    require(not (options.get('importance') and T),
            f'importance-sampled time cannot go with T={T}')
    require(
        causal in (None, record.predicts == 'next token'),
        f'{said} does not go with a net with causal={causal}')


def per_token_loss(
        net, x0, xt, t, objective=None, schedule=loglinear, T=0, masked=None,
        attention_mask=None, reconstruction=False, **options):
    """The loss of each position in nats, (B, L) float32, zero where there is none.

    x0, xt (B, L): ids; t (B,) or (B, L): times of xt, with T > 0 steps on_grid ('ar' uses x0
    alone). With a block_length xt is the noised blocks, each given the clean ones before it.
    objective: default: the net's own. options: its own (importance: t is of importance_time).
    masked (N,): flat indices of the positions with a loss; default: where xt is the mask.
    reconstruction: add reconstruction_loss where it is a term of the bound.
    """
    objective = objective or net.config.objective
    check_objective(objective, T, options, net.config.causal)
    record, options = OBJECTIVES[objective], options_of(objective, options)
    if objective == 'ar':
        return record.loss(net, x0, attention_mask)
    if masked is None:
        masked = (xt == net.config.mask_id).flatten().nonzero().squeeze(1)
    # the trunk runs over everything, the head over the masked positions alone
    clean = x0 if net.config.block_length else None
    h = net.trunk(xt, schedule.conditioning(t), attention_mask, x0=clean)
    h = h.flatten(0, 1).index_select(0, masked)  # (N, n_embd)
    t = t.flatten()[masked] if t.dim() == 2 else t[masked // x0.size(1)]
    positions = MaskedPositions(net, h, x0.flatten()[masked], t, schedule, T)
    loss = record.loss(positions, **options)
    dense = torch.zeros(x0.numel(), device=x0.device, dtype=loss.dtype)
    loss = dense.index_copy(0, masked, loss).view(x0.shape)
    if reconstruction and record.has_reconstruction:
        loss = loss + reconstruction_loss(
            net, x0, schedule, options.get('subs_masking', False), attention_mask)
    return loss


def reconstruction_loss(net, x0, schedule=loglinear, subs_masking=False, attention_mask=None):
    """D3PM's term at t = 0, -log p(x0 | x0) of each position, (B, L) nats."""
    t = torch.zeros(len(x0), device=x0.device)
    h = net.trunk(x0, schedule.conditioning(t), attention_mask).flatten(0, 1)
    exclude = net.config.mask_id if subs_masking else None
    return net.nll(h, x0.flatten(), exclude).view(x0.shape)


# -----------------------------------------------------------------------------
# from the losses of rows to a likelihood


def row_sums(loss, batch, rows):
    """loss (B, L) of corrupt_batch(rows) -> (4, B) float64: nats and number of all scored tokens,
    nats and number of those of documents."""
    loss, scored = loss.cpu(), batch['scored'].cpu()
    document = scored & rows['document']
    parts = (loss * scored, scored, loss * document, document)
    return torch.stack([part.double().sum(dim=1) for part in parts])


def ratio_with_error(sums, counts):
    """sum / count over independent rows (n,), and its standard error (the ratio estimator)."""
    n = len(sums)
    ratio = sums.sum() / counts.sum()
    if n == 1:
        return float(ratio), math.nan
    residual = sums - ratio * counts
    error = math.sqrt(n / (n - 1) * (residual ** 2).sum()) / counts.sum()
    return float(ratio), float(error)


def with_error(value, error, digits=4):
    """'1.2345 ± 0.0012'; of one row there is no error."""
    return f'{value:.{digits}f}' + ('' if math.isnan(error) else f' ± {error:.{digits}f}')


def likelihood_of(sums, counts, objective):
    """row_sums (4, n) and the tokens and bytes of the split -> dict of nats_per_token, over all
    scored tokens, the packing's too (as published), bits_per_byte, over those of documents, their
    standard errors (.._se), tokens, document_tokens, rows. An objective without a bound has its
    own name in place of both."""
    nats, nats_se = ratio_with_error(sums[0], sums[1])
    document_nats, document_se = ratio_with_error(sums[2], sums[3])
    to_bits = counts['tokens'] / counts['bytes'] / math.log(2)
    if OBJECTIVES[objective].bound:
        found = dict(
            nats_per_token=nats, nats_per_token_se=nats_se, bits_per_byte=document_nats * to_bits,
            bits_per_byte_se=document_se * to_bits)
    else:
        found = {objective: nats, f'{objective}_se': nats_se}
    return found | dict(
        tokens=int(sums[1].sum()), document_tokens=int(sums[3].sum()), rows=sums.size(1))


# -----------------------------------------------------------------------------
# devices and number formats


def pick_device(name, local_rank=0):
    """'auto', 'cpu', 'mps', 'cuda' or 'cuda:N' -> torch.device. ValueError if it is not there."""
    mps = torch.backends.mps.is_available()
    counts = dict(cuda=torch.cuda.device_count(), mps=int(mps), cpu=1)
    if name == 'auto':
        name = next(kind for kind, count in counts.items() if count)
    match = re.fullmatch(r'(cuda|mps|cpu)(?::(\d+))?', name)
    require(match, f"device='{name}' is not known: choose from auto, cpu, cuda, cuda:N, mps")
    kind, index = match.groups()
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
# memory


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors made under it: now, those alive; peak, the most there were.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.sizes = {}  # of storages, by address

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.sizes:
                storage = x.untyped_storage()
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.forget, storage._cdata)
        return out

    def forget(self, address):
        self.now -= self.sizes.pop(address)


def memory_needed(
        config, batch_size, length, device='cpu', dtype='float32', schedule=loglinear, T=0,
        make_optimizers=None, accumulate=False, visible=False, shards=1, t_range=(0.0, 1.0),
        **options):
    """Bytes that training takes on the device at its peak, for each part and in all -> dict.

    A step is made with tensors that have no memory: with micro-batches of batch_size rows that mask
    what a schedule does at most at times in t_range, several a step (accumulate) or one.
    make_optimizers(net) -> list; None: AdamW. visible: as in corrupt_batch. shards: processes that
    share all but the activations (FSDP). On a CPU 'heap' is among them: what lies unused between
    tensors (see reuse_memory), as measured in BENCHMARKS.md.
    """
    device = torch.device(device)
    on_gpu = device.type == 'cuda'
    share = 1.0  # of the positions that have a loss; rows have strata of times
    if not (config.causal or visible):
        span = t_range[1] - t_range[0]
        mean = schedule.alpha(torch.linspace(*t_range, 101)).mean().item()
        share = 1 - mean + 0.5 * span / batch_size
    scored = round(min(share, 1) * batch_size * length)
    parts = {}
    with FakeTensorMode(), LiveBytes() as live, torch.device(device if on_gpu else 'cpu'):

        def account(name):
            parts[name] = live.now - sum(parts.values())

        net = DiT(config).train()
        account('weights')
        for p in net.parameters():
            p.grad = torch.empty_like(p)
        account('gradients')
        optimizers = make_optimizers(net) if make_optimizers else [
            torch.optim.AdamW(net.parameters(), fused=True)]
        for opt in optimizers:
            opt.step()
        account('optimizer')
        average = [torch.empty_like(p) for p in net.parameters()]
        account('average')
        if not accumulate:
            net.zero_grad()
        x = torch.zeros(batch_size, length, dtype=torch.int64)
        masked = torch.zeros(scored, dtype=torch.int64)
        with autocast(device, dtype):
            loss = per_token_loss(
                net, x, x, torch.ones(batch_size), None, schedule, T, masked,
                reconstruction=True, **options).mean()
        loss.backward()
    parts['activations'] = live.peak - sum(parts.values())
    del average
    state = parts['weights'] + parts['optimizer'] + parts['average']
    parts = {name: size if name == 'activations' else size // shards
             for name, size in parts.items()}
    if not on_gpu:
        parts['heap'] = (parts['gradients'] + parts['activations']) * 3 // 10
        if shards > 1:
            parts['checkpoint'] = state  # gathered by one process
    return parts | dict(total=sum(parts.values()))


def free_memory(device, root=''):
    """Bytes that a GPU, or the machine and the control groups of this process, can still give."""
    if device.type == 'cuda':
        return torch.cuda.mem_get_info(device)[0]

    def read(path):
        with contextlib.suppress(OSError), open(f'{root}{path}') as f:
            return f.read()
        return ''

    def number(text, name=''):  # 'name: 5 kB', 'name 5' or '5'; inf where there is none
        match = re.search(rf'^{name}:? *(\d+)', text, re.MULTILINE)
        return int(match[1]) if match else math.inf

    free = [os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES'),  # all there is: for macOS
            1024 * number(read('/proc/meminfo'), 'MemAvailable')]
    for path in re.findall(r'^\d+:(?:memory)?:/(.*)', read('/proc/self/cgroup'), re.MULTILINE):
        for kind, limit, used in (('/memory', 'limit_in_bytes', 'usage_in_bytes'),
                                  ('', 'max', 'current')):  # version 1 and 2
            above = f'/sys/fs/cgroup{kind}/{path}'
            while above.startswith('/sys/fs/cgroup'):
                cached = number(read(f'{above}/memory.stat'), 'inactive_file')
                if cached < math.inf:
                    free.append(number(read(f'{above}/memory.{limit}')) + cached
                                - number(read(f'{above}/memory.{used}')))
                above = os.path.dirname(above)
    return min(free)


# -----------------------------------------------------------------------------
# checkpoints of train.py

PLAIN_RECORD = re.compile(
    r'data\.pkl|data/\d+|version|byteorder|\.format_version|\.storage_alignment|'
    r'\.data/serialization_id')


def check_archive(path):
    """Raise ValueError unless torch.save wrote the file and it is whole. Torch itself would run the
    code of a TorchScript archive, unpack a few compressed bytes into gigabytes, and take a flipped
    bit."""
    require(zipfile.is_zipfile(path), 'it is no whole zip archive, as torch.save writes since 1.6')
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
    Raises FileNotFoundError or ValueError."""
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f'no checkpoint at {path}: train one, or give another out_dir or init_from')
    try:
        check_archive(path)
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except MemoryError:
        raise
    except pickle.UnpicklingError:  # it holds something else than tensors and plain containers
        checkpoint = None
    except Exception as error:  # BadZipFile, and what else a flipped bit in a header leads to
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # EINVAL: a wrong offset
            raise  # the machine's fault, not the file's
        why = str(error).partition('\n')[0]
        raise ValueError(
            f'{path} is truncated or damaged ({why}): use another checkpoint') from None
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


@contextlib.contextmanager
def whole_file(path):
    """A binary file to write to, which has its name only when it is whole. Raises OSError, which
    names it."""
    unfinished = path + '.unfinished'
    try:
        with open(unfinished, 'wb') as f:
            yield f
        os.replace(unfinished, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.remove(unfinished)
        if isinstance(error, OSError):
            raise OSError(f'{path} cannot be written ({error.strerror})') from None
        raise


def write_whole(path, text):
    with whole_file(path) as f:
        f.write(text.encode())


def write_checkpoint(checkpoint, folder, files, tokenizer=None, when_read=lambda: None):
    """Write a checkpoint under the names `files` in folder, where an older ckpt.pt becomes
    ckpt.prev.pt: a kill leaves a whole one. tokenizer: the bytes of tokenizer.json, which goes
    there first. when_read is called as soon as the tensors may change. Raises OSError or
    RuntimeError."""
    os.makedirs(folder, exist_ok=True)
    if tokenizer:
        with whole_file(os.path.join(folder, 'tokenizer.json')) as f:
            f.write(tokenizer)
    with whole_file(os.path.join(folder, files[0])) as f:
        torch.save(checkpoint, f)
        when_read()
        f.flush()
        os.fsync(f.fileno())
        for name in files[1:]:  # the first name comes last: where it is, all are
            put(folder, name, files[0] + '.unfinished')
        if 'ckpt.pt' in files and os.path.exists(os.path.join(folder, 'ckpt.pt')):
            put(folder, 'ckpt.prev.pt', 'ckpt.pt')
    with contextlib.suppress(OSError):  # a folder cannot be opened everywhere
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def read_newest(folder):
    """(checkpoint, None) of folder/ckpt.pt; where that is missing or damaged, (checkpoint, why) of
    the one before it (ckpt_best.pt, where a run was killed before its first ckpt.pt)."""
    try:
        return read_checkpoint(os.path.join(folder, 'ckpt.pt')), None
    except (ValueError, FileNotFoundError) as error:
        names = ['ckpt.prev.pt']
        if isinstance(error, FileNotFoundError):
            names.append('ckpt_best.pt')
        for older in (os.path.join(folder, name) for name in names):
            if os.path.isfile(older):
                return read_checkpoint(older), error
        raise


def say(text):
    """print, which neither a full disk nor a terminal that lacks a letter can fail."""
    encoding = getattr(sys.stdout, 'encoding', None) or 'utf-8'
    with contextlib.suppress(OSError, ValueError):  # ValueError: it is closed
        print(text.encode(encoding, 'backslashreplace').decode(encoding), flush=True)


class CheckpointWriter:
    """Writes checkpoints in the background: of a GPU's state a copy, of a CPU's the tensors
    themselves, which may change after wait_until_read. Failures are warnings. The master alone
    writes. tokenizer: the bytes of tokenizer.json, or None."""

    def __init__(self, folder, device, master, tokenizer):
        self.folder, self.device, self.master = folder, device, master
        self.tokenizer = tokenizer
        self.state = None   # what is or was written: a GPU's buffers are used again
        self.newest = None  # with the rest of what is to be written
        self.thread = self.failure = None
        self.read = threading.Event()  # torch.save is done with the state

    def on_cpu(self, state, buffer):
        """state (nested dicts and lists), a GPU's tensors copied into those of buffer that fit."""
        if isinstance(state, torch.Tensor):
            if hasattr(state, 'full_tensor'):  # FSDP's: all processes take part
                state = state.full_tensor()
            if not self.master:
                return None
            if self.device.type == 'cpu':
                return state.detach()
            if buffer is None or buffer.shape != state.shape:
                buffer = torch.empty(state.shape, dtype=state.dtype,
                                     pin_memory=self.device.type == 'cuda')
            return buffer.copy_(state.detach(), non_blocking=True)
        if isinstance(state, dict):
            buffer = buffer or {}
            return type(state)((key, self.on_cpu(x, buffer.get(key))) for key, x in state.items())
        if isinstance(state, (list, tuple)):
            buffers = (buffer or []) + [None] * len(state)
            return [self.on_cpu(x, y) for x, y in zip(state, buffers, strict=False)]
        return state

    def save(self, state, names, **rest):
        """Write state, with the entries `rest`, under names. All processes call it."""
        started = time.monotonic()
        self.wait()
        self.state = self.on_cpu(state, self.state)
        if not self.master:
            return
        if self.device.type == 'cuda':
            torch.cuda.synchronize(self.device)
        self.newest = self.state | rest, names, started
        self.waited = time.monotonic() - started
        self.start()

    def wait_until_read(self):
        """Wait until the state of a CPU may change."""
        if self.thread and self.device.type == 'cpu':
            started = time.monotonic()
            self.read.wait()
            self.waited += time.monotonic() - started

    def start(self):
        if not os.path.isdir(self.folder):
            say(f'warning: {self.folder} is gone: it is made again, without what was in it')
        self.read.clear()
        self.thread = threading.Thread(target=self.write)
        self.thread.start()

    def write(self):
        checkpoint, names, started = self.newest
        step = checkpoint['iter']
        try:
            write_checkpoint(checkpoint, self.folder, names, self.tokenizer, self.read.set)
        except Exception as error:  # a full disk, a folder that is gone
            while error.__context__ and not isinstance(error, OSError):
                error = error.__context__  # torch's own error comes after the disk's
            self.failure = (f'the checkpoint of step {step} could not be written to {self.folder} '
                            f'({type(error).__name__}: {error})')
            return
        finally:
            self.read.set()
        with contextlib.suppress(OSError):
            size = os.path.getsize(os.path.join(self.folder, names[0])) / 1e9
            say(f"step {step}: {', '.join(names)} written, {size:.2f} GB in "
                f'{time.monotonic() - started:.2f} s, {self.waited:.2f} s of which the training '
                'waited')

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


# -----------------------------------------------------------------------------
# published weights

FIELDS = [field.name for field in dataclasses.fields(ModelConfig)]


@dataclass
class Family:
    """How the files of a published family spell its nets. Fields are read off the tensors, then off
    config.json; functions among the values are called on those known so far."""
    names: dict       # parts of parameters' names, ours -> theirs: replaced in this order
    settings: dict    # fields that all its nets share: save_pretrained tells the family by them
    assumed: dict     # fields where neither tensors nor config.json say
    # config.json, if not in our names: theirs -> a field of ours, a function of them, a constant
    described: dict = dataclasses.field(default_factory=lambda: {name: name for name in FIELDS})
    tokenizers: dict = dataclasses.field(default_factory=dict)  # vocab_size -> name
    constants: dict = dataclasses.field(default_factory=dict)  # its data, prompts and measures
    inv_freq: str | None = None  # name of the rotary frequencies, where the files hold them
    heads_interleaved: bool = False


def evaluated(table, fields):
    return {key: value(fields) if callable(value) else value for key, value in table.items()}


def last_id(fields):
    return fields['vocab_size'] - 1


def by_attention(fields):
    return 'ar' if fields['causal'] else 'subs'


def n_head_by_size(fields):
    """n_head of the entry of SIZES with these dimensions, or None."""
    for size in SIZES.values():
        if all(size[key] == fields[key] for key in ('n_layer', 'n_embd', 'n_mlp')):
            return size['n_head']


FAMILIES = {}

FAMILIES['mdlm'] = Family(  # and its AR baseline, which is the same without conditioning
    names={
        'wte.weight': 'backbone.vocab_embed.embedding',
        'blocks.': 'backbone.blocks.',
        'mlp_in': 'mlp.0',
        'mlp_out': 'mlp.2',
        'sigma_map.fc1': 'backbone.sigma_map.mlp.0',
        'sigma_map.fc2': 'backbone.sigma_map.mlp.2',
        'adaLN.': 'adaLN_modulation.',
        'adaLN_f.': 'backbone.output_layer.adaLN_modulation.',
        'norm_f': 'backbone.output_layer.norm_final',
        'lm_head': 'backbone.output_layer.linear',
    },
    settings=dict(
        mixer='attention', norm='layernorm', mlp='gelu', norm_bias=False, mlp_bias=True,
        head_bias=True, causal=lambda fields: not fields['cond_dim'], block_length=None),
    assumed=dict(
        block_size=1024, n_head=None, mask_id=last_id, objective=by_attention),
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
        'blocks.': 'encoder.',
        'attn_out': 'o_proj',
        'mlp_in': 'mlp.0',
        'mlp_out': 'mlp.2',
        'norm_f': 'output_layer.norm_final',
        'lm_head': 'output_layer.linear',
    },
    settings=dict(
        mixer='attention', norm='layernorm', mlp='relu', norm_bias=True, mlp_bias=True,
        head_bias=False, cond_dim=0, causal=False),
    assumed=dict(
        block_size=1024, objective='mlm', init='xlm',
        attn_dropout=lambda fields: fields.get('dropout', 0.0),
        mask_id=lambda fields: fields['vocab_size'] - 2,
        pad_id=lambda fields: fields['vocab_size'] - 4,
        n_head=lambda fields: 12 if fields['n_embd'] == 768 else None),
    described=dict(
        num_embeddings='vocab_size', d_model='n_embd', num_layers='n_layer', nhead='n_head',
        padding_idx='pad_id', mask_idx='mask_id', dim_feedforward='n_mlp', dropout='dropout',
        activation='relu', layer_norm_eps=1e-5, max_length='block_size',
        rotary_emb_dim=lambda fields: fields['n_embd'] // fields['n_head'],
        force_flash_attn=False, final_layer_without_normalization=False),
    tokenizers={50263: 'gpt2-xlm'},
    constants=dict(packing='pad', protocol='xlm', judge_dtype='bfloat16'),
    inv_freq='encoder.{i}.rotary_emb.inv_freq')

FAMILIES['smdm'] = Family(  # the head has no row for the mask; AR nets have no mask
    names={
        'wte': 'transformer.wte',
        'blocks.': 'transformer.h.',
        'norm1': 'norm_1',
        'norm2': 'norm_2',
        'attn_qkv': 'attn.attn',
        'attn_out': 'attn.proj',
        'mlp_gate': 'mlp.swiglu.w1',
        'mlp_in': 'mlp.swiglu.w2',
        'mlp_out': 'mlp.swiglu.w3',
        'norm_f': 'transformer.ln_f',
    },
    settings=dict(
        mixer='attention', norm='rmsnorm', mlp='swiglu', norm_bias=False, mlp_bias=False,
        head_bias=False, cond_dim=0),
    assumed=dict(
        block_size=2048, n_head=n_head_by_size, rotary_bf16=True, init='smdm',
        causal=lambda fields: fields['head_rows'] == fields['vocab_size'],
        mask_id=lambda fields: None if fields['causal'] else fields['head_rows'],
        head_mask=lambda fields: fields['causal'], objective=by_attention),
    constants=dict(packing='concat', prompt_bos=True, mc_eps=0.0, mc_draws=1024),
    heads_interleaved=True)

BIMAMBA = 'model.bimamba.backbone.'

FAMILIES['dimamba'] = Family(
    names={
        'wte': BIMAMBA + 'embeddings.word_embeddings',
        'blocks.': BIMAMBA + 'layers.',
        '.norm1.': '.norm.',
        'mamba.fwd': 'mixer.mamba_fwd',
        'mamba.rev': 'mixer.mamba_rev',
        'mamba.in_proj': 'mixer.mamba_fwd.in_proj',
        'mamba.out_proj': 'mixer.mamba_fwd.out_proj',
        'sigma_map.fc1': 'sigma_map.mlp.0',
        'sigma_map.fc2': 'sigma_map.mlp.2',
        'adaLN.': 'adaLN_modulation.',
        'adaLN_f': BIMAMBA + 'adaLN_modulation_final',
        'norm_f': BIMAMBA + 'norm_f',
        'lm_head': 'model.lm_head',
    },
    settings=dict(
        mixer='mamba', norm='rmsnorm', norm_bias=False, head_bias=False, head_mask=True,
        cond_dim=lambda fields: max(1, fields['cond_dim']), causal=False),
    assumed=dict(block_size=1024, mask_id=last_id),
    tokenizers={50258: 'gpt2'},
    constants=FAMILIES['mdlm'].constants)

FAMILIES['bd3lm'] = dataclasses.replace(  # told from mdlm by config.json alone
    FAMILIES['mdlm'],
    settings={key: value for key, value in FAMILIES['mdlm'].settings.items()
              if key != 'block_length'},
    described=FAMILIES['mdlm'].described | dict(
        architectures=['BD3LM'], model_type='bd3lm', block_size='block_length', cross_attn=True),
    constants=dict(packing='concat', protocol='mdlm', first_given=True))

for family in FAMILIES.values():
    family.settings.update(tied=False, qkv_bias=False, embed_norm=False)

FAMILIES['native'] = Family(  # ours, for nets that no other layout fits
    names={},
    settings={},
    assumed=dict(n_head=None))

# what dimamba's directions share has the names of both
SHARED = re.compile(r'(mixer\.mamba_)(fwd|rev)(\.(?:in|out)_proj\.)')
# what torch.compile, DDP, FSDP and Fabric put before the names of modules
WRAPPERS = re.compile(r'(?<![^.])(?:_orig_mod|module|_forward_module|_fsdp_wrapped_module)\.')


def renamed(name, names):
    for part, theirs in names.items():
        name = name.replace(part, theirs)
    return name


def interleave_heads(weight, n_head, inverse=False):
    """SMDM packs q, k, v head by head: (H, 3, head_dim, C) where ours is (3, H, head_dim, C)."""
    first, second = (n_head, 3) if inverse else (3, n_head)
    return weight.view(first, second, -1, weight.size(1)).transpose(0, 1).reshape(weight.shape)


def family_of(names, source):
    """(the key of FAMILIES whose embedding is among the names, what is before all names)."""
    for key, family in FAMILIES.items():
        for prefix in ('', 'model.', 'backbone.'):  # a LightningModule's
            if prefix + renamed('wte.weight', family.names) in names:
                return key, prefix
    raise ValueError(f"{source} has none of the layouts {', '.join(FAMILIES)}: "
                     f'its first names are {some_of(names)}')


def some_of(names):
    return ', '.join(sorted(names)[:5]) + (' ...' if len(names) > 5 else '')


def fields_of(family, described, tensors=None, inv_freq=None):
    """ModelConfig fields by a config.json (in the family's names or ours), a net's tensors (under
    our names) and its rotary frequencies."""
    theirs = {name: name for name in FIELDS} | family.described
    fields = {ours: described[name] for name, ours in theirs.items()
              if name in described and ours in FIELDS}
    if tensors:
        def size(name, dim=0):
            return tensors[name].size(dim) if name in tensors else None

        V, n_embd = tensors['wte.weight'].shape
        E = size('blocks.0.mamba.fwd.A_log')
        read = dict(
            vocab_size=V, n_embd=n_embd, head_rows=size('lm_head.weight') or V,
            n_layer=len({name.split('.')[1] for name in tensors if name.startswith('blocks.')}),
            cond_dim=size('sigma_map.fc2.weight') or 0, n_mlp=size('blocks.0.mlp_in.weight'),
            n_head=None if inv_freq is None else n_embd // (2 * len(inv_freq)),
            d_state=size('blocks.0.mamba.fwd.A_log', 1),
            d_conv=size('blocks.0.mamba.fwd.conv1d.weight', 2),
            expand=E and E // n_embd)
        fields |= {key: value for key, value in read.items() if value is not None}
    fields |= evaluated(family.settings, fields)
    for key, value in family.assumed.items():
        if key not in fields:
            fields |= evaluated({key: value}, fields)
    fields.pop('head_rows', None)
    untold = described.get('nanomdm', {})  # what the family's own config.json cannot tell
    return fields | {key: untold[key] for key in untold.keys() - {'constants', 'tokenizer'}}


TRAINING = ('.ckpt', '.pth')  # what Lightning and Fabric save


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


def read_training(path, ema):
    """(named tensors, if `ema` their averages in this order or None) of a Lightning .ckpt, a Fabric
    .pth or a saved state_dict."""
    reader = types.SimpleNamespace(Unpickler=_TensorUnpickler, __name__='nanomdm')
    try:
        check_archive(path)
        checkpoint = torch.load(path, map_location='cpu', weights_only=False, pickle_module=reader)
        tensors = checkpoint.get('state_dict', checkpoint.get('model', checkpoint))
        tensors = {name: tensor for name, tensor in tensors.items()
                   if isinstance(tensor, torch.Tensor)}
        average = checkpoint['ema']['shadow_params'] if ema and checkpoint.get('ema') else None
    except Exception as error:  # whatever a broken or hostile file leads to
        kind = 'Lightning' if path.endswith('.ckpt') else 'Fabric'
        raise ValueError(f'{path} is not a {kind} checkpoint that can be read '
                         f'({type(error).__name__}: {error})') from None
    return tensors, average


def find_source(source):
    """source if it is a path, else where the hub's org/name[@revision][:file] was downloaded to."""
    path = os.path.expanduser(source)
    match = re.fullmatch(r'([\w.-]+/[\w.-]+)(?:@([\w./-]+))?(?::([\w./-]+))?', source)
    if os.path.exists(path) or not match or path.endswith('.pt'):
        return path
    repository, revision, file = match.groups()
    try:
        from huggingface_hub import snapshot_download
        folder = snapshot_download(
            repository, revision=revision, allow_patterns=file or ['*.json', '*.safetensors'])
    except Exception as error:  # the hub's client has many, and the remedy is the same
        what = [repository, file, revision and f'--revision {revision}', '--local-dir FOLDER']
        raise ValueError(
            f'{source} is not here, and the hub cannot be used ({type(error).__name__}): with a '
            f"network, hf download {' '.join(filter(None, what))}, then give the FOLDER") from None
    return os.path.join(folder, file or '')


def read_json(path):
    try:
        with open(path) as f:
            described = json.load(f)
    except (ValueError, RecursionError) as error:  # json's own, and that of a byte that is no text
        raise ValueError(f'{path} is not whole ({error}): download it again') from None
    require(isinstance(described, dict), f'{path} holds no dict')
    return described


def safetensors_of(folder):
    """Paths of the files of the one model in a folder."""
    index = os.path.join(folder, 'model.safetensors.index.json')
    if os.path.isfile(index):
        weight_map = read_json(index).get('weight_map')
        require(isinstance(weight_map, dict), f'{index} has no weight_map')
        files = sorted(set(map(str, weight_map.values())))
        for file in files:
            require(file == os.path.basename(file),
                    f'{index} names {file}: only files in its folder are read')
    else:
        files = [file for file in os.listdir(folder) if file.endswith('.safetensors')]
        require(len(files) < 2, f'{folder} holds several models: give one of {some_of(files)} '
                '(hub: org/name:FILE)')
    return [os.path.join(folder, file) for file in files]


def read_published(path, ema):
    """(named tensors, config.json) of a folder, a .safetensors, a Lightning .ckpt or a .pth."""
    described, tensors, average = {}, {}, None
    if os.path.isfile(os.path.join(path, 'config.json')):
        described = read_json(os.path.join(path, 'config.json'))
    if os.path.isfile(path) and path.endswith(TRAINING):
        tensors, average = read_training(path, ema)
    else:
        for file in safetensors_of(path) if os.path.isdir(path) else [path]:
            try:
                tensors |= load_file(file)
            except Exception as error:  # safetensors' own
                raise ValueError(f'{file} is not a whole .safetensors file ({error})') from None
    tensors = {WRAPPERS.sub('', name): tensor for name, tensor in tensors.items()
               if not name.startswith('sampling_eps_')}  # BD3-LM's range of times
    for name in list(tensors):
        first = SHARED.sub(r'\1fwd\3', name)
        if first != name and first in tensors:
            require(torch.equal(tensors.pop(name), tensors[first]),
                    f'{path}: {name} is not equal to {first}: only nets whose directions share '
                    'their projections can be read')
    if average is not None:
        names = [name for name in tensors if 'rotary_emb' not in name]
        require([tensors[name].shape for name in names] == [tensor.shape for tensor in average],
                f'{path}: ema.shadow_params do not fit the {len(names)} parameters of its '
                'state_dict; ema=False takes these')
        tensors |= dict(zip(names, average, strict=True))
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
    require(not lacking, f'{source} lacks {some_of(lacking)}')
    require(not unknown, f'{source} has unknown {some_of(unknown)}')
    for name, tensor in tensors.items():
        shape = tuple(getattr(tensor, 'shape', ()))
        require(shape == own[name].shape,
                f'{source}: {name} has shape {shape}, the model {tuple(own[name].shape)}')
    net.load_state_dict(tensors, assign=assign)
    net.tie()


def check_overrides(overrides):
    require(overrides is None or isinstance(overrides, dict) and set(overrides) <= set(FIELDS),
            f"overrides={overrides!r}: a dict of fields of ModelConfig is needed: {FIELDS}")


def load_pretrained(source, ema=True, device='cpu', trainable=False, **overrides):
    """A net in eval mode from source: a ckpt.pt of train.py (or the out_dir that holds one), a
    folder with model.safetensors (and config.json), a lone .safetensors, a Lightning .ckpt, SMDM's
    .pth, or a Hugging Face id[@revision][:file]. The family is told by the names of the tensors.

    ema: the averaged weights where a file has both. trainable: its parameters take gradients.
    overrides: fields of ModelConfig that the file cannot tell. Sets net.tokenizer (arguments of
    data.get_tokenizer, None: unknown), net.constants (of the run or the published family),
    net.progress (iter and tokens_seen of a run) and net.extra (tensors that are no parameters).
    Raises FileNotFoundError or ValueError."""
    source = os.fspath(source)
    path = find_source(source)
    is_own = not path.endswith(('.safetensors', *TRAINING))
    if os.path.isdir(path):
        is_own = not any(file.endswith('.safetensors') for file in os.listdir(path))
    load = load_own if is_own else load_published
    return load(path, source, ema, overrides).to(device).eval().requires_grad_(trainable)


def load_own(path, source, ema, overrides):
    path = path if path.endswith('.pt') else os.path.join(path, 'ckpt.pt')
    checkpoint = read_checkpoint(path)
    weights, meta = checkpoint['ema' if ema else 'model'], checkpoint['tokenizer']
    net = build(checkpoint['model_config'], overrides, weights, source)
    net.tokenizer = dict(name=str(meta.get('name')), folder=os.path.dirname(path), meta=meta)
    net.constants = checkpoint['constants']
    net.progress = {key: checkpoint[key] for key in ('iter', 'tokens_seen')}
    return net


def load_published(path, source, ema, overrides):
    if not os.path.exists(path):
        raise FileNotFoundError(f'{source} is not there')
    tensors, described = read_published(path, ema)
    key, prefix = family_of(tensors, source)
    if described.get('model_type') == 'bd3lm':
        key = 'bd3lm'
    family, source = FAMILIES[key], f"{source}, read in the layout '{key}',"
    untold = described.get('nanomdm', {})
    good = isinstance(untold, dict) and isinstance(untold.get('constants', {}), dict)
    require(good, f"{source} has no dict 'nanomdm' in its config.json")
    tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()
               if name.startswith(prefix)}
    extra = {name: tensors.pop(name) for name in list(tensors) if name.endswith('inv_freq')}
    ours = {theirs: part for part, theirs in reversed(family.names.items())}
    tensors = {renamed(name, ours): tensor for name, tensor in tensors.items()}
    for name in tensors:  # one by one: no second copy of the file in memory
        tensors[name] = tensors[name].float()
    fields = fields_of(family, described, tensors, next(iter(extra.values()), None))
    net = build(fields, overrides, tensors, source)
    if family.heads_interleaved:
        for block in net.blocks:
            weight = block.attn_qkv.weight
            weight.data = interleave_heads(weight.data, net.config.n_head, inverse=True)
    net.extra, net.constants = extra, dict(untold.get('constants', family.constants))
    if untold.get('tokenizer'):
        net.tokenizer = dict(name=str(untold['tokenizer']), folder=path)
    elif net.config.vocab_size in family.tokenizers:
        net.tokenizer = dict(name=family.tokenizers[net.config.vocab_size])
    return net


# modeling_nanomdm.py of a folder, beside nanomdm.py, which is this file
AUTO_CLASSES = '''"""The net of this folder for the auto classes of transformers, by nanoMDM."""
import transformers
from torch.func import functional_call
from torch.nn import Module
from transformers.modeling_outputs import MaskedLMOutput

from .nanomdm import FAMILIES, DiT, ModelConfig, fields_of, interleave_heads, renamed

FAMILY = FAMILIES['{family}']


class MDLMConfig(transformers.PretrainedConfig):
    model_type = 'mdlm'


class MDLM(transformers.PreTrainedModel):
    """The network, its parameters under the published names."""
    config_class = MDLMConfig
    base_model_prefix = 'mdlm'
    _keys_to_ignore_on_load_unexpected = [r'inv_freq$', r'mamba_rev[.](in|out)_proj']

    def __init__(self, config):
        super().__init__(config)
        net = DiT(ModelConfig(**fields_of(FAMILY, config.to_dict())))
        self.names = {{}}
        for ours, parameter in net.named_parameters():
            self.names[ours] = renamed(ours, FAMILY.names)
            module = self
            *path, last = self.names[ours].split('.')
            for name in path:
                module = module._modules.setdefault(name, Module())
            module.register_parameter(last, parameter)
        self.skeleton = [net.to('meta')]  # in a list: no submodule
        self.post_init()

    def forward(self, input_ids, timesteps=None, return_dict=None, attention_mask=None):
        """ids (B, L), sigma (B,) where the net is time-conditioned -> logits (B, L, V)."""
        net, weights = self.skeleton[0].train(self.training), {{}}
        for ours, theirs in self.names.items():
            weights[ours] = self.get_parameter(theirs)
            if FAMILY.heads_interleaved and ours.endswith('attn_qkv.weight'):
                weights[ours] = interleave_heads(weights[ours], net.config.n_head, inverse=True)
        if attention_mask is not None:
            attention_mask = attention_mask.bool()
        logits = functional_call(net, weights, (input_ids, timesteps, attention_mask))
        if return_dict is None:
            return_dict = self.config.return_dict
        return MaskedLMOutput(logits=logits) if return_dict else logits
'''



def save_pretrained(net, folder):
    """Write config.json and model.safetensors as the released code of the net's family loads them,
    in our own names where it has none; and two Python files, with which
    transformers.AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True) loads them."""
    config = dataclasses.asdict(net.config)
    key, family = next((key, family) for key, family in FAMILIES.items()
                       if evaluated(family.settings, config).items() <= config.items())
    tensors = {}
    for name, tensor in net.state_dict().items():
        if family.heads_interleaved and name.endswith('attn_qkv.weight'):
            tensor = interleave_heads(tensor, net.config.n_head)
        tensors[renamed(name, family.names)] = tensor.contiguous().cpu()
    if net.config.tied:
        tensors['lm_head.weight'] = tensors['lm_head.weight'].clone()
    for name in list(tensors):
        if SHARED.search(name):
            tensors[SHARED.sub(r'\1rev\3', name)] = tensors[name].clone()
    extra = net.extra
    if not extra and family.inv_freq:
        head_dim = net.config.n_embd // net.config.n_head
        extra = {family.inv_freq.format(i=i): inv_freq(head_dim) for i in range(len(net.blocks))}
    described = {theirs: config[value] if value in FIELDS else value
                 for theirs, value in evaluated(family.described, config).items()}
    told = dataclasses.asdict(ModelConfig(**fields_of(family, described)))
    untold = {field: value for field, value in config.items() if told[field] != value}
    if net.constants not in ({}, family.constants):
        untold['constants'] = net.constants
    os.makedirs(folder, exist_ok=True)
    tokenizer = net.tokenizer or {}
    if tokenizer.get('name') not in (None, family.tokenizers.get(net.config.vocab_size)):
        untold['tokenizer'] = tokenizer['name']
    if untold.get('tokenizer', '').startswith('bpe-'):
        with contextlib.suppress(FileNotFoundError, shutil.SameFileError):
            shutil.copy(os.path.join(tokenizer.get('folder') or '', 'tokenizer.json'), folder)
    if untold:
        described['nanomdm'] = untold
    described['auto_map'] = dict(AutoConfig='modeling_nanomdm.MDLMConfig',
                                 AutoModelForMaskedLM='modeling_nanomdm.MDLM')
    with whole_file(os.path.join(folder, 'model.safetensors')) as f:
        save_file(tensors | extra, f.name, metadata=dict(format='pt'))
        os.chmod(f.name, os.fstat(f.fileno()).st_mode)  # safetensors writes for its owner alone
    with open(__file__, encoding='utf-8') as f:
        source = f.read().partition("\nif __name__ == '__main__'")[0]
    source = source.replace(
        '\nfrom configurator import require\n', '\n\n' + inspect.getsource(require))
    write_whole(os.path.join(folder, 'nanomdm.py'), source)
    write_whole(os.path.join(folder, 'modeling_nanomdm.py'), AUTO_CLASSES.format(family=key))
    write_whole(os.path.join(folder, 'config.json'), json.dumps(described, indent=1))


def model_card(net, repository, folder):
    """README.md of a repository: how the net was trained, and its last validation by metrics.jsonl
    in its out_dir."""
    config, step = net.config, net.progress.get('iter')
    facts = dict(
        objective=config.objective, parameters=f'{net.num_params():,}',
        shape=f'{config.n_layer} blocks of width {config.n_embd}, {config.n_head} heads',
        block_size=config.block_size, vocab_size=config.vocab_size,
        tokenizer=net.tokenizer and net.tokenizer['name'])
    for key in ('dataset', 'packing', 'learning_rate', 'global_batch_size', 'seed'):
        facts[key] = net.constants.get(key)
    path, lines = os.path.join(folder, 'metrics.jsonl'), []
    if step is not None:
        facts |= dict(steps=f'{step:,}', tokens=f"{net.progress['tokens_seen']:,}",
                      weights=f"the average of decay {net.constants.get('ema')}")
        with contextlib.suppress(FileNotFoundError), open(path, encoding='utf-8') as f:
            lines = [line for line in f if line.endswith('}\n')]  # a kill may cut one
    try:
        lines = [json.loads(line) for line in lines if '"val_bpb"' in line]
    except ValueError as error:
        raise ValueError(f'{path} is not whole ({error})') from None
    for line in [line for line in lines if line['val_bpb'] and line['iter'] <= step][-1:]:
        facts[f"validation at step {line['iter']:,}"] = (
            f"{line['val_loss']:.4f} nats/token, {line['val_bpb']:.4f} bits/byte "
            f"(at most {net.constants.get('eval_iters') or 'all'} global batches of rows)")
    rows = ''.join(f'| {key} | {value} |\n' for key, value in facts.items() if value is not None)
    return f"""---
library_name: transformers
tags: [masked-diffusion, nanomdm]
---
# {repository.partition('/')[2]}

A language model by nanoMDM. All that its source says of its data, training and measures:

| | |
|---|---|
{rows}
```python
from transformers import AutoModelForMaskedLM
model = AutoModelForMaskedLM.from_pretrained('{repository}', trust_remote_code=True)
```

Samples, with nanoMDM: `python sample.py --init_from={repository}`
"""


def push_to_hub(source, repository, private=False):
    """Upload what save_pretrained writes and a model card. Raises ValueError where that fails."""
    require(repository and re.fullmatch(r'[\w.-]+/[\w.-]+', repository),
            f'push={repository!r}: give the name of a repository of yours, --push=you/name')
    net = load_pretrained(source)
    out_dir = source if os.path.isdir(source) else os.path.dirname(source)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(net, folder)
        write_whole(os.path.join(folder, 'README.md'), model_card(net, repository, out_dir))
        try:
            from huggingface_hub import HfApi
            HfApi().create_repo(repository, private=private, exist_ok=True)
            HfApi().upload_folder(repo_id=repository, folder_path=folder)
        except Exception as error:  # the hub's client has many
            why = str(error).strip().partition('\n')[0]
            raise ValueError(
                f'{source} was not uploaded to {repository} ({type(error).__name__}: {why}): it '
                "needs a network, and a token that may write, by 'hf auth login'") from None
    say(f'uploaded to https://huggingface.co/{repository}')


# -----------------------------------------------------------------------------
# what makes it fast: skip at first reading


class _NLL(torch.autograd.Function):
    """Linear layer and cross entropy in one, in chunks of the vocabulary that fit a CPU's cache.

    Forward keeps each chunk's softmax without the target, in the compute dtype, and the chunk's
    probability. The target has a term of its own, exact where its probability is near 1. Sums and
    exponentials are float32 at least; on a GPU the probability that a chunk's sum is told by has
    been rounded, so that forward passes three times over (N, V): it is 2^-8 nats off at most.
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
        if device == 'cuda':
            width = math.ceil(width / 64) * 64  # rows that tensor cores can load
        chunks = [slice(i, i + width) for i in range(0, V, width)]
        # one piece of memory, where many of other sizes each step would leave holes
        softmaxes = h.new_empty(N * V if needs_grad else 0)
        lses = []
        logit = 0
        for chunk in chunks:
            if device == 'cuda':  # the fewest passes over (N, width)
                bias_c = None if bias is None else bias[chunk].to(dtype)
                logits = F.linear(h, weight[chunk], bias_c)
            else:
                logits = (h @ weight[chunk].t()).to(wide)  # (N, width)
                if bias is not None:
                    logits += bias[chunk]
            if exclude is not None and chunk.start <= exclude < chunk.stop:
                logits[:, exclude - chunk.start] = -1e30  # finite: it may be alone in the chunk
            column = (target - chunk.start).clamp(0, logits.size(1) - 1)[:, None]
            value = logits.gather(1, column)
            is_target = column == target[:, None] - chunk.start
            logit = torch.where(is_target, value.to(wide), logit)
            logits.scatter_(1, column, torch.where(is_target, -1e30, value))
            kept = softmaxes[N * chunk.start:N * min(chunk.stop, V)] if needs_grad else None
            if needs_grad and device == 'cuda':
                softmax = torch.softmax(logits, dim=1, out=kept.view(logits.shape))
                seen = slice(64)  # any column tells the sum; the largest of some do not underflow
            else:
                softmax, seen = logits.softmax(dim=1, dtype=wide), slice(None)
                if needs_grad:
                    kept.view(softmax.shape).copy_(softmax)
            best, share = logits[:, seen].amax(dim=1), softmax[:, seen].amax(dim=1)
            lses.append(best.to(wide) - share.to(wide).log())
        logit, lses = logit.squeeze(1), torch.stack(lses)  # (N,), (chunks, N)
        nll = F.softplus(lses.logsumexp(dim=0) - logit, threshold=50)
        nll = nll + 0 * logit  # NaN where the logit is infinite
        ctx.set_materialize_grads(False)  # most objectives have no use for the logit
        if needs_grad:
            probs = torch.exp(lses - (nll + logit))
            ctx.save_for_backward(h, weight, target, nll, probs, softmaxes)
            ctx.chunks, ctx.dtypes = chunks, dtypes
        return nll, logit

    @staticmethod
    def backward(ctx, grad_nll, grad_logit):
        h, weight, target, nll, probs, softmaxes = ctx.saved_tensors
        h_dtype, weight_dtype, bias_dtype = ctx.dtypes
        if grad_nll is None:
            grad_nll = torch.zeros_like(nll)
        grad_target = grad_nll * torch.expm1(-nll)  # (N,)
        grad_target = grad_target + (0 if grad_logit is None else grad_logit)
        dh = weight[target] * grad_target[:, None]
        dweight = h.new_empty(weight.shape, dtype=weight_dtype)
        dbias = h.new_empty(len(weight), dtype=bias_dtype) if bias_dtype else None
        softmaxes = softmaxes.split([len(h) * len(weight[chunk]) for chunk in ctx.chunks])
        for chunk, prob, softmax in zip(ctx.chunks, probs, softmaxes, strict=True):
            softmax = softmax.view(len(h), len(weight[chunk]))
            grad = (grad_nll * prob)[:, None]  # (N, 1)
            dh += (softmax @ weight[chunk]) * grad
            dweight[chunk] = softmax.t() @ (h * grad).to(softmax.dtype)
            if dbias is not None:
                dbias[chunk] = (softmax.t() @ grad.to(softmax.dtype)).squeeze(1)
        dweight.index_add_(0, target, (h * grad_target[:, None]).to(weight_dtype))
        if dbias is not None:
            dbias.index_add_(0, target, grad_target.to(bias_dtype))
        return dh.to(h_dtype), dweight, dbias, None, None, None


@_disable_dynamo  # which would unroll its loop over the positions
def convolve_both_ways(x, taps, bias):
    """silu of the causal convolutions of x (B, L, E) and of x reversed -> (2, B, L, E).
    taps (2, E, K), bias (2, E)."""
    K = taps.size(2)
    taps = taps.permute(2, 0, 1)[:, :, None, None].contiguous()
    return _Convolution.apply(F.pad(x, (0, 0, K - 1, K - 1)), taps, bias[:, None, None])


class _Convolution(torch.autograd.Function):
    """x (B, L + 2K - 2, E), taps (K, 2, 1, 1, E), bias (2, 1, 1, E) -> (2, B, L, E).

    In chunks of positions that fit a CPU's cache; torch's conv1d copies x to have positions last.
    """

    @staticmethod
    def windows(x, K):
        """Chunks of positions, and what each is made of: slices of x and of x reversed."""
        P, L = x.size(1), x.size(1) - 2 * (K - 1)
        length = L if x.device.type == 'cuda' else max(2 ** 16 // x[:, 0].numel(), 8)
        for i in to_work_on(range(0, L, length), x):
            chunk = slice(i, min(i + length, L))
            end = chunk.stop + K - 1
            yield chunk, slice(i, end), slice(P - end, P - i)

    @staticmethod
    def convolved(x, ahead, back, taps, bias):
        """What each tap meets, (2, B, length, E), and the sum."""
        window = torch.stack((x[:, ahead], x[:, back].flip(1))).to(taps.dtype)
        length = window.size(2) - len(taps) + 1
        parts = [window[:, :, k:k + length] for k in range(len(taps))]
        y = bias
        for part, tap in zip(parts, taps, strict=True):
            y = torch.addcmul(y, part, tap)
        return parts, y

    @staticmethod
    def forward(ctx, x, taps, bias):
        ctx.save_for_backward(x, taps, bias)
        K = len(taps)
        y = x.new_empty(2, len(x), x.size(1) - 2 * (K - 1), x.size(2))
        for chunk, *window in _Convolution.windows(x, K):
            y[:, :, chunk] = F.silu(_Convolution.convolved(x, *window, taps, bias)[1])
        return y

    @staticmethod
    def backward(ctx, dy):
        x, taps, bias = ctx.saved_tensors
        dx, dtaps, dbias = (torch.zeros_like(tensor) for tensor in (x, taps, bias))
        for chunk, ahead, back in _Convolution.windows(x, len(taps)):
            parts, y = _Convolution.convolved(x, ahead, back, taps, bias)
            grad = torch.ops.aten.silu_backward(dy[:, :, chunk].to(y.dtype), y)
            window = y.new_zeros(2, len(x), ahead.stop - ahead.start, x.size(2))
            for k, part in enumerate(parts):
                window[:, :, k:k + grad.size(2)].addcmul_(grad, taps[k])
                dtaps[k] += (grad * part).sum(dim=(1, 2), keepdim=True)
            dbias += grad.sum(dim=(1, 2), keepdim=True)
            dx[:, ahead] += window[0]
            dx[:, back] += window[1].flip(1)
        return dx, dtaps, dbias


def to_work_on(chunks, x):
    """All of the chunks; one where x has no memory, to see how much is needed."""
    return chunks[:1] if isinstance(x, FakeTensor) else chunks


@_disable_dynamo
def selective_scan(x, delta, A, B, C, D, bias):
    """y_l = S_l C_l + D x_l, S_l = exp(dt_l A) S_{l-1} + dt_l x_l B_l, dt = softplus(delta + bias).

    In G groups with weights of their own: x, delta, y (G, B, L, E), A (G, E, N), B, C (G, B, L, N),
    D, bias (G, E). The states are float32 at least.
    """
    if selective_scan_fn and x.device.type == 'cuda' and not isinstance(x, FakeTensor):
        x, delta, B, C = (tensor.transpose(2, 3) for tensor in (x, delta, B, C))
        groups = zip(x, delta, A, B, C, D, strict=True)
        ys = [selective_scan_fn(*group, delta_bias=bias_g, delta_softplus=True)
              for group, bias_g in zip(groups, bias, strict=True)]
        return torch.stack(ys).transpose(2, 3)
    wide = torch.promote_types(x.dtype, torch.float32)
    weights = A.transpose(1, 2), D, bias
    A, D, bias = (tensor.to(wide).repeat_interleave(x.size(1), dim=0) for tensor in weights)
    rows = (tensor.flatten(0, 1) for tensor in (x, delta, B, C))
    return _Scan.apply(A, D, bias, *rows).view(x.shape)


class _Scan(torch.autograd.Function):
    """The scan of rows: A (B, N, E), D, bias (B, E), x, delta, y (B, L, E), B, C (B, L, N).

    In chunks of positions that fit a CPU's cache: of the whole length there is only what comes and
    goes. Backward makes all states again but those between chunks.
    """

    @staticmethod
    def chunks(A, L):
        length = min(max(2 ** 20 // A.numel(), 8), 32, L)
        return [slice(i, min(i + length, L)) for i in range(0, L, length)]

    @staticmethod
    def states(A, dt, u, B, S, decay, states):
        """Fill in exp(dt A) and the states of a chunk that begins with the state S; u = dt x."""
        torch.mul(dt[:, :, None], A / math.log(2), out=decay).exp2_()  # exp_ takes 5 times as long
        torch.mul(B[:, :, :, None], u[:, :, None], out=states)
        for decay_l, S_l in zip(decay.unbind(), states.unbind(), strict=True):
            S = S_l.addcmul_(decay_l, S)
        return S.clone()

    @staticmethod
    def forward(ctx, A, D, bias, *rows):
        rows = [tensor.transpose(0, 1) for tensor in rows]  # (L, B, .)
        chunks = _Scan.chunks(A, len(rows[0]))
        decay, states = A.new_empty(2, chunks[0].stop, *A.shape)
        y = torch.empty_like(rows[0])
        S = torch.zeros_like(A)
        first = A.new_empty(len(chunks), *A.shape)  # the state before each chunk
        with torch.autocast(A.device.type, enabled=False):
            for i, chunk in enumerate(to_work_on(chunks, A)):
                x, delta, B, C = (tensor[chunk].to(A.dtype) for tensor in rows)
                first[i] = S
                dt = F.softplus(delta + bias)
                S = _Scan.states(A, dt, dt * x, B, S, decay[:len(x)], states[:len(x)])
                y[chunk] = (C[:, :, None] @ states[:len(x)]).squeeze(2).addcmul_(D, x)
        ctx.save_for_backward(A, D, bias, first, *rows)
        return y.transpose(0, 1)

    @staticmethod
    def backward(ctx, dy):
        A, D, bias, first, *rows = ctx.saved_tensors
        chunks = _Scan.chunks(A, len(rows[0]))
        decays, states, grads = A.new_empty(3, chunks[0].stop, *A.shape)
        dA, dD, dbias = (torch.zeros_like(tensor) for tensor in (A, D, bias))
        dx, ddelta, dB, dC = drows = [torch.empty_like(tensor) for tensor in rows]
        later = torch.zeros_like(A)  # what the next chunk says of the state before it
        with torch.autocast(A.device.type, enabled=False):
            for i, chunk in reversed(list(enumerate(to_work_on(chunks, A)))):
                x, delta, B, C, dy_c = (
                    tensor[chunk].to(A.dtype) for tensor in (*rows, dy.transpose(0, 1)))
                decay, S, dS = decays[:len(x)], states[:len(x)], grads[:len(x)]
                dt = F.softplus(delta + bias)
                u = dt * x
                _Scan.states(A, dt, u, B, first[i], decay, S)
                torch.mul(C[:, :, :, None], dy_c[:, :, None], out=dS)
                dS[-1] += later
                for j in range(len(x) - 2, -1, -1):
                    dS[j].addcmul_(decay[j + 1], dS[j + 1])
                dC[chunk] = (S * dy_c[:, :, None]).sum(dim=3)  # as a product: 6 times as long
                dB[chunk] = (dS * u[:, :, None]).sum(dim=3)
                du = (B[:, :, None] @ dS).squeeze(2)
                dx[chunk] = (du * dt).addcmul_(D, dy_c)
                dD += (dy_c * x).sum(dim=0)
                decay *= dS
                later = decay[0].clone()
                decay[1:] *= S[:-1]
                decay[0] *= first[i]  # now the gradient of dt A
                ddt = du * x
                for k in range(A.size(1)):
                    ddt.addcmul_(decay[:, :, k], A[:, k])
                ddt *= -torch.expm1(-dt)
                ddelta[chunk] = ddt
                dbias += ddt.sum(dim=0)
                dA += decay.mul_(dt[:, :, None]).sum(dim=0)
        return dA, dD, dbias, *(tensor.transpose(0, 1) for tensor in drows)


def dropout(x, p):
    """F.dropout, on a CPU with 16 random bits an element (p is rounded): torch's own is slow."""
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
    In bfloat16 on a CPU plain products take half the time, with rounded scores.
    """
    bfloat16 = q.dtype == torch.bfloat16
    small = q.size(2) * k.size(2) <= 2 ** 20
    if bfloat16 and q.device.type == 'cpu' and small and not (p or is_causal):
        scores = (q * q.size(3) ** -0.5) @ k.transpose(2, 3)
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, torch.finfo(scores.dtype).min)
        return scores.softmax(dim=3) @ v
    on_gpu = q.device.type == 'cuda' and not isinstance(q, FakeTensor)
    if bfloat16 and on_gpu and flash_attn_func and attn_mask is None:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return flash_attn_func(q, k, v, dropout_p=p, causal=is_causal).transpose(1, 2)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=attn_mask, dropout_p=p, is_causal=is_causal)


@_disable_dynamo  # its shapes depend on the documents
def within_documents(documents, is_causal=False, p=0.0, way=None):
    """A function (q, k, v) of attention within documents, and positions in them (B, L).

    documents (B, L) int: the number of each token's; padding has one too. way: None: the fastest.
    """
    (B, L), device = documents.shape, documents.device
    begins = F.pad(documents.diff(dim=1) != 0, (1, 0), value=True)
    index = torch.arange(L, device=device)
    position = index - torch.where(begins, index, 0).cummax(dim=1).values
    if way is None:
        way = 'each' if p or device.type != 'cuda' else 'flex'  # FlexAttention has no dropout
        if has_flash(device):
            way = 'flash'
    if way == 'flex':
        from torch.nn.attention.flex_attention import create_block_mask

        def mask_mod(b, h, i, j):
            same = documents[b, i] == documents[b, j]
            return same & (i >= j) if is_causal else same

        block_mask = create_block_mask(mask_mod, B, None, L, L, device=device)
        return functools.partial(flex_within, flex_attention(), block_mask), position
    if way == 'flash':  # note: this waits for the GPU, twice for all blocks
        kept = (documents >= 0).flatten().nonzero().squeeze(1)
        ends = F.pad(begins.flatten()[kept].nonzero().squeeze(1), (0, 1), value=len(kept))
        return functools.partial(flash_within, kept, ends.int(), L, is_causal, p), position
    ends = F.pad(begins.flatten().nonzero().squeeze(1), (0, 1), value=B * L)
    return functools.partial(attention_of_each, ends.diff().tolist(), is_causal, p), position


def looks_at(i, j, length, config):
    """Whether position i of [x0, xt], each so long, looks at j (BD3-LM's mask)."""
    block_i, block_j = i % length // config.block_length, j % length // config.block_length
    window = config.block_size // config.block_length
    clean = (block_j < block_i + (i < length)) & (block_i - block_j < window)
    return torch.where(j < length, clean, (i >= length) & (block_i == block_j))


@_disable_dynamo
def within_blocks(config, length, x, attention_mask=None, p=0.0, way=None):
    """A function (q, k, v) of block diffusion's attention over x, x0 (B, length) or [x0, xt]
    (B, 2 * length). attention_mask (B, length): False where nothing looks. way: as above."""
    device, twice = x.device, x.size(1) > length
    if way is None:  # FlexAttention would be compiled for every length of a prompt
        way = 'flex' if twice and not p and device.type == 'cuda' else 'each'
    if way == 'flex':
        from torch.nn.attention.flex_attention import create_block_mask

        def mask_mod(b, h, i, j):
            looks = looks_at(i, j, length, config)
            return looks if attention_mask is None else looks & attention_mask[b, j % length]

        rows = None if attention_mask is None else len(x)
        block_mask = create_block_mask(
            mask_mod, rows, None, x.size(1), x.size(1), device=device)
        return functools.partial(flex_within, flex_attention(), block_mask)
    size = config.block_length * max(1, 128 // config.block_length)
    halves = torch.arange(x.size(1), device=device).split(length)
    chunks = []
    for begin in range(0, length, size):
        own = slice(begin, min(begin + size, length))
        spans = [slice(0, own.stop), own][:len(halves)]  # of the keys, clean and noised
        j = torch.cat([half[span] for half, span in zip(halves, spans, strict=True)])
        mask = looks_at(torch.cat([half[own] for half in halves])[:, None], j, length, config)
        if attention_mask is not None:
            mask = mask & attention_mask[:, None, None, j % length]
        chunks.append((own, spans, mask))
    return functools.partial(attention_in_chunks, length, chunks, p)


@_disable_dynamo
def attention_in_chunks(length, chunks, p, q, k, v):
    """Some blocks at a time, clean and noised, with what is before them."""
    q, k, v = (x.split(length, dim=2) for x in (q, k, v))
    parts = []
    for own, spans, mask in chunks:
        queries = torch.cat([half[:, :, own] for half in q], dim=2)
        near = (torch.cat([half[:, :, span] for half, span in zip(x, spans, strict=True)], dim=2)
                for x in (k, v))
        parts.append(attention(queries, *near, mask, p).unflatten(2, (len(q), -1)))
    return torch.cat(parts, dim=3).flatten(2, 3)


@functools.cache
def flex_attention():
    from torch.nn.attention.flex_attention import flex_attention
    return torch.compile(flex_attention)  # without it, all scores are in memory at once


def flex_within(attend, block_mask, q, k, v):
    # note: compiled for a CPU by torch 2.13, other layouts give wrong values
    return attend(*(x.contiguous() for x in (q, k, v)), block_mask=block_mask)


def has_flash(device):
    return bool(flash_attn_varlen_func) and device.type == 'cuda' and (
        torch.is_autocast_enabled('cuda'))


def flash_within(kept, ends, longest, is_causal, p, q, k, v):
    """Nothing is computed for padding, the positions that are not kept (N,): it gets zeros."""
    flat = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]  # (B*L, H, C/H)
    y = flash_attn_varlen_func(
        *(x[kept] for x in flat), ends, ends, longest, longest, dropout_p=p, causal=is_causal)
    y = torch.zeros_like(flat[0]).index_copy(0, kept, y)
    return y.view(q.transpose(1, 2).shape).transpose(1, 2)


@_disable_dynamo
def attention_of_each(lengths, is_causal, p, q, k, v):
    """Document by document: on a CPU faster than any mask."""
    flat = (x.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None] for x in (q, k, v))
    parts = zip(*(x.split(lengths, dim=2) for x in flat), strict=True)  # (1, H, length, C/H)
    y = torch.cat([attention(*part, None, p, is_causal) for part in parts], dim=2)
    return y.view(q.size(1), len(q), -1, q.size(3)).transpose(0, 1)


def reuse_memory(now=True):
    """Keep freed memory (glibc): zeroing new pages is a tenth of a training step on a CPU.
    now=False: not yet, but keep what stays (weights, an optimizer's state) out of its way."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2 ** 17)  # M_MMAP_THRESHOLD: large tensors have mappings of their own,
        if now:
            mallopt(-4, 0)    # M_MMAP_MAX: from now on none
            mallopt(-1, -1)   # M_TRIM_THRESHOLD: no trimming


if __name__ == '__main__':
    from configurator import configure
    configure(globals())
    push_to_hub(source, push, private)
