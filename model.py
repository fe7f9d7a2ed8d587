"""
The network, the noise, the objectives, and weights in and out.

What is unusual here, for a reader who knows nanoGPT:
- attention looks both ways; a mask id stands for what is not known yet; rotary positions, no position table
- the conditioning is adaLN-zero (DiT); most masked diffusion models always feed it sigma = 0, so that it is one vector
  for the whole batch and folds into the weight and bias of the norms
- trunk and head are apart: a loss or a sampler projects to the vocabulary only the positions it needs, and the cross
  entropy keeps one (N, V) buffer for the N positions that have a loss, half of them or so in diffusion
- one class for every family: an architecture is a ModelConfig

References: MDLM (Sahoo et al. 2024, arXiv 2406.07524), DiT (Peebles & Xie 2022, arXiv 2212.09748),
SMDM (Nie et al. 2024, arXiv 2410.18514).
"""
import contextlib
import ctypes
import dataclasses
import json
import math
import os
import pickle
import re
import shutil
import types
import typing
import zipfile
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

try:
    from flash_attn import flash_attn_func  # optional, for GPUs
except ImportError:
    flash_attn_func = None

# -----------------------------------------------------------------------------
# the network

ACTIVATIONS = {'gelu': lambda x: F.gelu(x, approximate='tanh'), 'relu': F.relu, 'swiglu': F.silu}


@dataclass
class ModelConfig:
    """All that tells one architecture from another. The defaults are MDLM's OpenWebText model, 170M parameters."""
    block_size: int = 1024           # longest row (L)
    vocab_size: int = 50258          # every id that can occur in the input, the mask included (V)
    mask_id: int | None = 50257      # None: a causal net without a mask
    pad_id: int | None = None        # its embedding is zero and untrained (xlm); None: padding is a token like any other
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_mlp: int | None = None         # hidden width of the mlp; None: 4 * n_embd
    cond_dim: int = 128              # width of the adaLN conditioning; 0: none
    time_conditioning: bool = False  # False: the conditioning is fed sigma = 0 whatever the time
    causal: bool = False             # attention looks back only
    norm: str = 'layernorm'          # 'layernorm' or 'rmsnorm'
    mlp: str = 'gelu'                # 'gelu' (tanh form), 'relu' or 'swiglu'
    norm_bias: bool = False
    mlp_bias: bool = True
    head_bias: bool = True
    head_mask: bool = True           # the head has a row for the mask, the last id where it has none
    rotary_bf16: bool = False        # cos and sin rounded to bfloat16, as SMDM's weights were trained with
    dropout: float = 0.0             # on the two residual branches of a block
    attn_dropout: float = 0.0        # on the attention weights
    init: str = 'mdlm'               # of new weights: 'mdlm' (adaLN and head zero), 'xlm' (PyTorch's defaults), 'smdm' (normal)
    objective: str = 'subs'          # what the outputs mean: a key of OBJECTIVES

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, kinds = getattr(self, field.name), typing.get_args(field.type) or (field.type,)
            if type(value) not in kinds and not (float in kinds and type(value) is int):
                raise ValueError(f'{field.name}={value!r}: {" or ".join(kind.__name__ for kind in kinds)} is needed')
        if self.n_mlp is None:
            self.n_mlp = 4 * self.n_embd
        if self.cond_dim < 0:
            raise ValueError(f'cond_dim={self.cond_dim}: it must be 0 or more')
        for key in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'n_mlp'):
            if getattr(self, key) < 1:
                raise ValueError(f'{key}={getattr(self, key)}: it must be at least 1')
        for key in ('dropout', 'attn_dropout'):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f'{key}={getattr(self, key)}: it must be a probability below 1')
        for key, known in (('mlp', ACTIVATIONS), ('norm', ('layernorm', 'rmsnorm')), ('init', ('mdlm', 'xlm', 'smdm')), ('objective', OBJECTIVES)):
            if getattr(self, key) not in known:
                raise ValueError(f"{key}='{getattr(self, key)}' is not known: choose from {', '.join(known)}")
        if self.n_embd % self.n_head or self.n_embd // self.n_head % 2:
            raise ValueError(f'n_embd={self.n_embd} over n_head={self.n_head}: heads need a whole and even width')
        if self.time_conditioning and not self.cond_dim:
            raise ValueError('time_conditioning=True needs a conditioning: cond_dim=0 leaves none')
        if self.mask_id is None and not self.causal:
            raise ValueError('mask_id=None: only a causal net does without a mask')
        if self.mask_id is not None and not 0 <= self.mask_id < self.vocab_size:
            raise ValueError(f'mask_id={self.mask_id} is outside the vocabulary of {self.vocab_size} ids')
        if self.pad_id is not None and not 0 <= self.pad_id < self.vocab_size:
            raise ValueError(f'pad_id={self.pad_id} is outside the vocabulary of {self.vocab_size} ids')
        if not self.head_mask and self.mask_id != self.vocab_size - 1:
            raise ValueError(f'head_mask=False with mask_id={self.mask_id}: a mask that the head has no row for is the last of the {self.vocab_size} ids')
        if self.causal != (self.objective == 'ar'):
            raise ValueError(f"causal={self.causal} with objective='{self.objective}': causal nets are trained with 'ar', and only they")


# named sizes, in the constants of train.py. SMDM's are named after their non-embedding parameters, in millions
SIZES = {
    'mdlm-tiny': dict(n_layer=8, n_head=8, n_embd=512, n_mlp=2048, cond_dim=128),
    'mdlm-small': dict(n_layer=12, n_head=12, n_embd=768, n_mlp=3072, cond_dim=128),
    'mdlm-medium': dict(n_layer=24, n_head=16, n_embd=1024, n_mlp=4096, cond_dim=128),
} | {f'{size}M': dict(zip(('n_layer', 'n_head', 'n_embd', 'n_mlp'), shape)) for size, shape in {
    6: (6, 4, 256, 1024), 19: (8, 6, 384, 1536), 34: (8, 8, 512, 2048), 48: (9, 9, 576, 2304), 66: (10, 10, 640, 2560), 75: (16, 8, 640, 1600),
    85: (13, 10, 640, 2560), 113: (12, 12, 768, 3072), 142: (15, 12, 768, 3072), 170: (18, 12, 768, 3072), 180: (14, 14, 896, 3584),
    206: (16, 14, 896, 3584), 231: (18, 14, 896, 3584), 268: (16, 16, 1024, 4096), 302: (18, 16, 1024, 4096), 336: (20, 16, 1024, 4096),
    472: (18, 10, 1280, 5120), 551: (21, 10, 1280, 5120), 571: (18, 11, 1408, 5632), 629: (24, 10, 1280, 5120), 666: (21, 11, 1408, 5632),
    717: (19, 12, 1536, 6144), 761: (24, 11, 1408, 5632), 831: (22, 12, 1536, 6144), 944: (25, 12, 1536, 6144), 1028: (20, 14, 1792, 7168),
    1233: (24, 14, 1792, 7168), 1476: (22, 16, 2048, 8192), 1678: (25, 16, 2048, 8192), 2121: (28, 17, 2176, 8704)}.items()}


def rotary_table(position, head_dim, bf16=False):
    """cos and sin (..., 1, 1, head_dim/2) of the rotary angles at positions (...), base 10,000, float32; bf16: rounded to bfloat16."""
    inv_freq = 1.0 / 10_000 ** (torch.arange(0, head_dim, 2, device=position.device, dtype=torch.float32) / head_dim)
    angle = position[..., None, None, None] * inv_freq
    return (angle.cos().bfloat16().float(), angle.sin().bfloat16().float()) if bf16 else (angle.cos(), angle.sin())


def apply_rotary(x, cos, sin):
    """Rotate the halves (not interleaved pairs) of each head of x (B, L, 2, H, head_dim), q and k at once."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


def dropout(x, p):
    """F.dropout, on a CPU with 16 random bits an element (p is rounded to them): torch draws a whole number for each there, in one thread,
    which takes longer than the mlp before it."""
    if not p or x.device.type != 'cpu':
        return F.dropout(x, p)
    dropped = min(round(p * 2 ** 16), 2 ** 16 - 1)    # of 2^16
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-2 ** 63, None).view(torch.int16)[:x.numel()].view(x.shape)
    return x * (bits >= dropped - 2 ** 15).to(x.dtype).mul_(2 ** 16 / (2 ** 16 - dropped))


def attention(q, k, v, attn_mask=None, p=0.0, is_causal=False):
    """softmax(q k^T / sqrt(C/H)) v, q (B, H, L, C/H), k and v (B, H, K, C/H); attn_mask (B, 1, 1, K) bool: what is looked at; p: dropout of the
    weights. It is torch's kernel but for two cases: on a GPU the one of flash-attn where that is installed, and in bfloat16 on a CPU plain
    products, which take half the time there; their (B, H, L, K) is still small at rows of 1,024. They round the scores to bfloat16, which torch does not:
    the quickstart's net is 0.34% from its float32 output rather than 0.29%, and its loss moves by 1e-5 of it."""
    if q.device.type == 'cpu' and q.dtype == torch.bfloat16 and q.size(2) * k.size(2) <= 2 ** 20 and not (p or is_causal):
        scores = (q * q.size(3) ** -0.5) @ k.transpose(2, 3)
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, torch.finfo(scores.dtype).min)
        return scores.softmax(dim=3) @ v
    if q.device.type == 'cuda' and q.dtype == torch.bfloat16 and flash_attn_func and attn_mask is None:
        return flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), dropout_p=p, causal=is_causal).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=p, is_causal=is_causal)


class Norm(nn.Module):
    """LayerNorm or RMSNorm, optionally modulated: norm(x) * (1 + scale) + shift, scale and shift (1 or B, 1, n_embd)."""

    def __init__(self, config):
        super().__init__()
        self.rms = config.norm == 'rmsnorm'
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if config.norm_bias else None

    def forward(self, x, shift=None, scale=None):
        weight, bias = self.weight, self.bias
        if shift is not None:  # modulation is another weight and bias, for each row or, at a constant sigma, for all
            weight, bias = weight * (1 + scale), shift if bias is None else bias * (1 + scale) + shift
        # outside of layer_norm, whose CPU kernel sums the gradient of a weight in an order that depends on the number of threads
        x = F.rms_norm(x, x.shape[-1:], eps=1e-5) if self.rms else F.layer_norm(x, x.shape[-1:])
        return x * weight if bias is None else torch.addcmul(bias.to(x.dtype), x, weight)


class Block(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.norm1 = Norm(config)
        self.attn_qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.attn_out = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.norm2 = Norm(config)
        self.mlp_gate = nn.Linear(config.n_embd, config.n_mlp, bias=config.mlp_bias) if config.mlp == 'swiglu' else None
        self.mlp_in = nn.Linear(config.n_embd, config.n_mlp, bias=config.mlp_bias)
        self.mlp_out = nn.Linear(config.n_mlp, config.n_embd, bias=config.mlp_bias)
        self.adaLN = nn.Linear(config.cond_dim, 6 * config.n_embd) if config.cond_dim else None

    def attention(self, x, cos, sin, attn_mask, cache):
        B, L, C = x.shape
        qkv = self.attn_qkv(x).view(B, L, 3, self.config.n_head, C // self.config.n_head)  # (B, L, 3, H, C/H)
        q, k = apply_rotary(qkv[:, :, :2], cos, sin).permute(2, 0, 3, 1, 4)                # 2 x (B, H, L, C/H)
        v = qkv[:, :, 2].transpose(1, 2)
        is_causal = self.config.causal
        if cache is not None:
            k, v = cache.extend(self, k, v)
            is_causal = cache.position is None
        y = attention(q, k, v, attn_mask, self.config.attn_dropout if self.training else 0.0, is_causal)
        return self.attn_out(y.transpose(1, 2).reshape(B, L, C))

    def mlp(self, x):
        activation = ACTIVATIONS[self.config.mlp]
        return self.mlp_out(activation(self.mlp_in(x)) if self.mlp_gate is None else activation(self.mlp_gate(x)) * self.mlp_in(x))

    def forward(self, x, c, rotary, attn_mask=None, cache=None):
        drop = lambda branch: dropout(branch, self.config.dropout) if self.training else branch
        if c is None:
            x = x + drop(self.attention(self.norm1(x), *rotary, attn_mask, cache))
            return x + drop(self.mlp(self.norm2(x)))
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN(c)[:, None].chunk(6, dim=2)  # (1 or B, 1, C) each
        x = x + gate1 * drop(self.attention(self.norm1(x, shift1, scale1), *rotary, attn_mask, cache))
        return x + gate2 * drop(self.mlp(self.norm2(x, shift2, scale2)))


class KVCache:
    """The keys and values that a causal net has computed, (2, rows, H, length, C/H) for each block. A call of the trunk with it is given
    either the first tokens of the rows `slots`, (n, P), `position` being None, or one token of every row, (rows, 1), at `position`
    (rows,), which is on the CPU, so that a GPU need not be asked how far to look."""

    def __init__(self, rows, length):
        self.rows, self.length, self.kept, self.slots, self.position = rows, length, {}, slice(None), None

    def extend(self, block, k, v):
        """The keys and values (n, H, P or 1, C/H) of a block's new tokens -> those to attend to."""
        if block not in self.kept:
            self.kept[block] = k.new_zeros(2, self.rows, k.size(1), self.length, k.size(3))
        kv = self.kept[block]
        if self.position is None:
            kv[0, self.slots, :, :k.size(2)], kv[1, self.slots, :, :k.size(2)] = k, v
            return k, v
        every, position = torch.arange(self.rows, device=k.device), self.position.to(k.device)
        kv[0, every, :, position], kv[1, every, :, position] = k[:, :, 0], v[:, :, 0]
        return kv[:, :, :, :int(self.position.max()) + 1].unbind()

    def seen(self, device):
        """(n, 1, 1, reach) bool: what each row may look at; None where all may look at everything."""
        reach = torch.arange(int(self.position.max()) + 1)
        seen = reach <= self.position[:, None]
        return None if seen.all() else seen[:, None, None].to(device)

    def keep(self, slots):
        """Drop all rows but these."""
        self.rows, self.kept = len(slots), {block: kv[:, slots.to(kv.device)] for block, kv in self.kept.items()}


class SigmaMap(nn.Module):
    """The conditioning vector of a noise level: 256 sinusoidal features (cosines first), then a small mlp."""

    def __init__(self, cond_dim):
        super().__init__()
        self.fc1 = nn.Linear(256, cond_dim)
        self.fc2 = nn.Linear(cond_dim, cond_dim)

    def forward(self, sigma):  # (B,) -> (B, cond_dim)
        freqs = torch.exp(-math.log(10_000) * torch.arange(128, device=sigma.device, dtype=torch.float32) / 128)
        angle = sigma.float()[:, None] * freqs
        features = torch.cat((angle.cos(), angle.sin()), dim=-1).to(self.fc1.weight.dtype)     # (B, 256)
        return F.silu(self.fc2(F.silu(self.fc1(features))))


class DiT(nn.Module):
    """The one network: ids (B, L) -> logits (B, L, V). Its parameters are registered in the order of MDLM's release."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.tokenizer, self.constants, self.extra = None, {}, {}  # what load_pretrained knows of where it comes from
        self.wte = nn.Embedding(config.vocab_size, config.n_embd, padding_idx=config.pad_id)
        self.sigma_map = SigmaMap(config.cond_dim) if config.cond_dim else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm_f = Norm(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size - (not config.head_mask), bias=config.head_bias)
        self.adaLN_f = nn.Linear(config.cond_dim, 2 * config.n_embd) if config.cond_dim else None
        if config.init == 'mdlm':  # nn.Linear's own defaults elsewhere; adaLN-zero: every block starts as the identity
            nn.init.kaiming_uniform_(self.wte.weight, a=math.sqrt(5))
            for name, p in self.named_parameters():
                if name.startswith('lm_head') or 'adaLN' in name:
                    nn.init.zeros_(p)
        elif config.init == 'smdm':
            for name, p in self.named_parameters():
                if p.dim() == 2:
                    out = name.endswith(('attn_out.weight', 'mlp_out.weight'))
                    nn.init.normal_(p, std=1 / math.sqrt(config.n_embd) / config.n_layer if out else math.sqrt(2 / (5 * config.n_embd)))

    def trunk(self, x, sigma=None, attended=None, cache=None):
        """ids x (B, L), sigma (B,) total noise -> (B, L, n_embd), all that is before the vocabulary projection.
        attended (B, L) bool: False where nothing may look at (padding); None: everything is seen.
        cache: a KVCache that holds what a causal net has seen before x."""
        config, c = self.config, None
        if config.cond_dim:
            if not config.time_conditioning:
                sigma = torch.zeros(1, device=x.device)
            elif sigma is None:
                raise ValueError('this net is time-conditioned: give sigma (B,), the total noise of each row')
            c = self.sigma_map(sigma)                                                          # (1 or B, cond_dim)
        position = torch.arange(x.size(1), device=x.device) if cache is None or cache.position is None else cache.position[:, None].to(x.device)
        rotary = rotary_table(position, config.n_embd // config.n_head, config.rotary_bf16)
        # (B, 1, 1, L); a causal net does not look at padding on the right anyway
        attn_mask = None if attended is None or config.causal else attended[:, None, None, :]
        if cache is not None and cache.position is not None:
            attn_mask = cache.seen(x.device)
        h = self.wte(x)
        for block in self.blocks:
            h = block(h, c, rotary, attn_mask, cache)
        if c is None:
            return self.norm_f(h)
        shift, scale = self.adaLN_f(c)[:, None].chunk(2, dim=2)
        return self.norm_f(h, shift, scale)

    def head(self, h):
        """The vocabulary projection, h (..., n_embd) -> logits (..., V) float32 (float64 for a float64 net); -inf for a mask without a row."""
        logits = self.lm_head(h)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits if self.config.head_mask else F.pad(logits, (0, 1), value=-math.inf)

    def nll(self, h, target, exclude=None):
        """-log softmax(head(h))[target], h (N, n_embd), target (N,) -> (N,) float32, in one (N, V) buffer at most.
        exclude: an id that is given no probability (SUBS excludes the mask)."""
        return self.nll_and_logit(h, target, exclude)[0]

    def nll_and_logit(self, h, target, exclude=None):
        """nll, and head(h)[target] itself, both (N,): their sum is the log-sum-exp of the logits that are not excluded."""
        exclude = exclude if self.config.head_mask else None
        return _NLL.apply(h, self.lm_head.weight, self.lm_head.bias, target, exclude, torch.is_grad_enabled())

    def forward(self, x, sigma=None, attended=None):
        return self.head(self.trunk(x, sigma, attended))

    def num_params(self, embedding=True):
        """Number of parameters; embedding=False leaves out the embedding and the vocabulary projection."""
        n = sum(p.numel() for p in self.parameters())
        return n if embedding else n - self.wte.weight.numel() - sum(p.numel() for p in self.lm_head.parameters())

    def train_flops(self, rows, length, scored):
        """FLOPs of the matrix products of a forward and backward pass over rows x length tokens, `scored` of which are projected.
        The recomputations some kernels make are not counted: this is what MFU is measured with."""
        config = self.config
        matrices = 3 if config.mlp == 'swiglu' else 2
        per_token = config.n_layer * (4 * config.n_embd ** 2 + matrices * config.n_embd * config.n_mlp + 2 * length * config.n_embd)
        return 6 * (rows * length * per_token + scored * config.n_embd * config.vocab_size)


class _NLL(torch.autograd.Function):
    """Linear layer and cross entropy in one, a chunk of the vocabulary after the other: each is small enough to stay in a CPU's cache. The
    forward pass leaves the softmax of each chunk without the target, in the compute dtype, and its share of the whole, which is
    exp(lse of the chunk - lse of all); the backward pass is then two matrix products a chunk, whatever gradient the rows are given.
    The target has a term of its own, exact where its probability is near 1. Sums and exponentials are float32 whatever the autocast."""

    @staticmethod
    def forward(ctx, h, weight, bias, target, exclude, needs_grad):
        device = h.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h.dtype
        wide = torch.promote_types(dtype, torch.float32)
        h_, weight_ = h.to(dtype), weight.to(dtype)
        N, V = h.size(0), weight.size(0)
        width = min(V, max(512, 2 ** (23 if device == 'cpu' else 29) // dtype.itemsize // max(N, 1)))  # of so many bytes: a GPU wants them large
        width = math.ceil(V / math.ceil(V / width))                                            # and all alike
        chunks, pieces, lses, logit = [slice(i, i + width) for i in range(0, V, width)], [], [], 0
        for chunk in chunks:
            logits = (h_ @ weight_[chunk].t()).to(wide)                                        # (N, width)
            if bias is not None:
                logits += bias[chunk]
            if exclude is not None and chunk.start <= exclude < chunk.stop:
                logits[:, exclude - chunk.start] = -1e30                                       # finite: there may be nothing else in the chunk
            column = (target - chunk.start).clamp(0, logits.size(1) - 1)[:, None]
            here, value = column == target[:, None] - chunk.start, logits.gather(1, column)
            logit = torch.where(here, value, logit)
            p = logits.scatter_(1, column, torch.where(here, -1e30, value)).softmax(dim=1)
            lses.append(logits.amax(dim=1) - p.amax(dim=1).log())
            if needs_grad:
                pieces.append(p.to(dtype))
        logit, lses = logit.squeeze(1), torch.stack(lses)                                      # (N,), (chunks, N)
        nll = F.softplus(lses.logsumexp(dim=0) - logit, threshold=50) + 0 * logit             # no number where the logit is infinite
        ctx.set_materialize_grads(False)  # most objectives have no use for the logit
        if needs_grad:
            ctx.save_for_backward(h_, weight_, target, nll, torch.exp(lses - (nll + logit)), *pieces)
            ctx.chunks, ctx.dtypes = chunks, (h.dtype, weight.dtype, None if bias is None else bias.dtype)
        return nll, logit

    @staticmethod
    def backward(ctx, grad_nll, grad_logit):
        h, weight, target, nll, shares, *pieces = ctx.saved_tensors
        h_dtype, weight_dtype, bias_dtype = ctx.dtypes
        grad_nll = torch.zeros_like(nll) if grad_nll is None else grad_nll
        at_target = grad_nll * torch.expm1(-nll) + (0 if grad_logit is None else grad_logit)   # (N,)
        dh = weight[target] * at_target[:, None]
        dweight = torch.empty(weight.shape, device=h.device, dtype=weight_dtype)
        dbias = None if bias_dtype is None else torch.empty(len(weight), device=h.device, dtype=bias_dtype)
        for chunk, share, p in zip(ctx.chunks, shares, pieces):
            grad = (grad_nll * share)[:, None]                                                 # (N, 1)
            dh += (p @ weight[chunk]) * grad
            dweight[chunk] = p.t() @ (h * grad).to(p.dtype)
            if dbias is not None:
                dbias[chunk] = (p.t() @ grad.to(p.dtype)).squeeze(1)
        dweight.index_add_(0, target, (h * at_target[:, None]).to(weight_dtype))
        if dbias is not None:
            dbias.index_add_(0, target, at_target.to(bias_dtype))
        return dh.to(h_dtype), dweight, dbias, None, None, None


# -----------------------------------------------------------------------------
# devices and number formats


def pick_device(name, local_rank=0):
    """'auto', 'cpu', 'mps', 'cuda' or 'cuda:N' -> torch.device. Raises ValueError where there is no such device."""
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    kind, _, index = name.partition(':')
    count = {'cpu': 1, 'mps': int(torch.backends.mps.is_available()), 'cuda': torch.cuda.device_count()}.get(kind)
    if count is None or index and not index.isdigit():
        raise ValueError(f"device='{name}' is not known: choose from auto, cpu, cuda, cuda:N, mps")
    processes = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    if kind == 'cuda' and not index and processes > count > 0:
        raise ValueError(f'{processes} processes on a machine with {count} GPUs: give torchrun --nproc_per_node={count}')
    index = int(index) if index else local_rank if kind == 'cuda' else 0
    if index >= count:
        raise ValueError(f"device='{name}': there is no {kind} device {index} here; device='auto' takes what there is")
    return torch.device(kind, index) if kind == 'cuda' else torch.device(kind)


def reuse_memory():
    """Keep freed memory for the next step rather than give it back to the kernel, which zeroes each page anew before it is used again: that
    takes a tenth of our training step on a CPU, and up to two fifths of one in plain PyTorch. Where malloc is glibc's; elsewhere nothing is
    changed."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        malloc = ctypes.CDLL(None).mallopt
        malloc(-4, 0), malloc(-1, -1)                 # M_MMAP_MAX, M_TRIM_THRESHOLD of malloc.h: no pages of its own for a large tensor, no trimming


def autocast(device, dtype):
    """The context to run a net in. dtype: 'float32', 'bfloat16', or 'auto': bfloat16 where the device multiplies it natively."""
    if dtype not in ('auto', 'float32', 'bfloat16'):
        raise ValueError(f"dtype='{dtype}' is not known: choose from auto, float32, bfloat16")
    if dtype == 'auto':
        native = {'cuda': lambda: torch.cuda.is_bf16_supported(including_emulation=False), 'cpu': torch.cpu._is_avx512_bf16_supported, 'mps': lambda: False}[device.type]()
        dtype = 'bfloat16' if native else 'float32'
    return torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != 'float32')


# -----------------------------------------------------------------------------
# noise: x0 -> xt


class Schedule:
    """sigma(t), the total noise, dsigma(t), its derivative, and alpha(t) = exp(-sigma(t)), the probability that a token is still seen at
    time t; t in [0, 1]. conditioning(t): what a time-conditioned net is fed."""

    def alpha(self, t):
        return torch.exp(-self.sigma(t))

    def conditioning(self, t):
        return self.sigma(t)

    def conditioning_at(self, masked):
        """What a time-conditioned net is fed when a position is masked with probability `masked`, at most that of t = 1."""
        return -torch.log1p(-masked.clamp(max=1 - float(self.alpha(torch.ones((), dtype=torch.float64)))))

    def sigma_range(self):
        """The noise between which time is importance-sampled."""
        raise ValueError(f'importance-sampled time is not defined for the schedule {type(self).__name__}: choose loglinear or linear')

    def log_masked_range(self):
        """log(1 - exp(-sigma)) at both ends."""
        return (math.log1p(-math.exp(-sigma)) for sigma in self.sigma_range())

    def importance_time(self, t):
        """Times at which the weight of the NELBO is constant (MDLM, appendix C.2): log(1 - alpha) is uniform for uniform t."""
        low, high = self.log_masked_range()
        return self.time_of(-torch.log1p(-torch.exp(t * high + (1 - t) * low)))

    def importance_weight(self):
        """That constant weight, of -log p(x0 | xt)."""
        return -next(self.log_masked_range())


class LogLinear(Schedule):
    """A position is masked with probability (1 - eps) t (MDLM, appendix E.1)."""

    def __init__(self, eps=1e-3):
        self.eps = eps

    def sigma(self, t):
        return -torch.log1p(-(1 - self.eps) * t)

    def dsigma(self, t):
        return (1 - self.eps) / (1 - (1 - self.eps) * t)

    def alpha(self, t):
        return 1 - (1 - self.eps) * t

    def sigma_range(self):
        return self.eps, -math.log(self.eps)

    def time_of(self, sigma):
        return -torch.expm1(-sigma) / (1 - self.eps)


class Linear(Schedule):

    def __init__(self, sigma_min=1e-4, sigma_max=20.0):
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def sigma(self, t):
        return self.sigma_min + t * (self.sigma_max - self.sigma_min)

    def dsigma(self, t):
        return torch.full_like(t, self.sigma_max - self.sigma_min)

    def sigma_range(self):
        return self.sigma_min, self.sigma_max

    def time_of(self, sigma):
        return (sigma - self.sigma_min) / (self.sigma_max - self.sigma_min)


class Geometric(Schedule):

    def __init__(self, sigma_min=1e-3, sigma_max=1.0):
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def sigma(self, t):
        return self.sigma_min ** (1 - t) * self.sigma_max ** t

    def dsigma(self, t):
        return self.sigma(t) * math.log(self.sigma_max / self.sigma_min)


class Cosine(Schedule):
    """alpha = eps + (1 - eps) cos(t pi/2)."""

    def __init__(self, eps=1e-3):
        self.eps = eps

    def alpha(self, t):
        return self.eps + (1 - self.eps) * torch.cos(t * math.pi / 2)

    def sigma(self, t):
        return -torch.log(self.alpha(t))

    def dsigma(self, t):
        return math.pi / 2 * (1 - self.eps) * torch.sin(t * math.pi / 2) / self.alpha(t)


class CosineSqr(Cosine):
    """alpha = eps + (1 - eps) cos^2(t pi/2)."""

    def alpha(self, t):
        return self.eps + (1 - self.eps) * torch.cos(t * math.pi / 2) ** 2

    def dsigma(self, t):
        return math.pi / 2 * (1 - self.eps) * torch.sin(t * math.pi) / self.alpha(t)


class ChangeOfVariables(Schedule):
    """Loglinear's noise in the time in which log(1 - alpha) is linear, which the net is conditioned on (MDLM, appendix C.2)."""

    def __init__(self, eps=1e-3):
        self.low, self.high = LogLinear(eps).log_masked_range()

    def alpha(self, t):
        return -torch.expm1(self.low + t * (self.high - self.low))

    def sigma(self, t):
        return -torch.log(self.alpha(t))

    def dsigma(self, t):
        return (self.high - self.low) * (1 / self.alpha(t) - 1)

    def conditioning(self, t):
        return t

    def conditioning_at(self, masked):
        return ((masked.log() - self.low) / (self.high - self.low)).clamp(0, 1)


SCHEDULES = {'loglinear': LogLinear, 'linear': Linear, 'geometric': Geometric, 'cosine': Cosine, 'cosinesqr': CosineSqr,
             'change_of_variables': ChangeOfVariables}


def get_schedule(name, **parameters):
    """A Schedule by name: a key of SCHEDULES, with its parameters."""
    if name not in SCHEDULES:
        raise ValueError(f"schedule '{name}' is not known: choose from {', '.join(SCHEDULES)}")
    return SCHEDULES[name](**parameters)


loglinear = get_schedule('loglinear')


def corrupt(x0, t, mask_id, schedule, generator=None, maskable=None):
    """Draw xt ~ q(xt | x0): each position of x0 (B, L) turns into the mask with probability 1 - alpha_t, t (B,).
    maskable (B, L) bool: the rest stays as it is. The uniforms are drawn on the generator's device (default: the CPU)."""
    where = generator.device if generator is not None else 'cpu'
    u = torch.rand(x0.shape, generator=generator, device=where).to(x0.device)
    masked = u < 1 - schedule.alpha(t)[:, None]
    return torch.where(masked if maskable is None else masked & maskable, mask_id, x0)


def corrupt_exactly(x0, t, mask_id, generator, maskable):
    """Turn round(t n) of the n maskable positions of each row into the mask, all choices being equally likely; t (B,)."""
    u = torch.rand(x0.shape, generator=generator).masked_fill(~maskable, 2)
    count = (t * maskable.sum(dim=1)).round()
    return torch.where((u.argsort(dim=1).argsort(dim=1) < count[:, None]) & maskable, mask_id, x0)


def corrupt_batch(batch, t, config, schedule, key, device, visible=False, exactly=False):
    """A batch of data.TokenRows with xt drawn at the times t (B,) by a generator seeded with key, on device. `masked` is the flat
    indices of the positions of xt that have a loss: the draws are made on the CPU, so that a GPU need not be asked for them.
    visible: all scored positions have one, the seen ones too. exactly: see corrupt_exactly. For a causal net nothing is corrupted, and the first column, which it
    does not predict, is not scored."""
    x0, scored, attended = batch['x0'], batch['scored'], batch['attended']
    xt = masked = None
    if config.causal:
        scored = scored.clone()
        scored[:, 0] = False
    else:
        generator = torch.Generator().manual_seed(key)
        xt = corrupt_exactly(x0, t, config.mask_id, generator, batch['maskable']) if exactly else corrupt(x0, t, config.mask_id, schedule, generator, batch['maskable'])
        masked = (scored if visible else (xt == config.mask_id) & scored).flatten().nonzero().squeeze(1)
    noised = dict(x0=x0, xt=xt, t=t, masked=masked, scored=scored, attended=None if attended.all() else attended)  # attention is faster without a mask
    move = lambda x: x if x is None else x.pin_memory().to(device, non_blocking=True) if device.type == 'cuda' else x.to(device)
    return {name: move(x) for name, x in noised.items()}


def stratified_times(u, index, n, eps=1e-3):
    """Times in [eps, 1] that share one uniform u and spread evenly over n strata: (u + index/n) mod 1, index (...,) of 0..n-1
    (low-discrepancy sampling, Kingma et al. 2021, arXiv 2107.00630, appendix I.1)."""
    return ((u + index / n) % 1 * (1 - eps) + eps).float()


def on_grid(t, T):
    """Continuous times -> the grid 1/T ... 1 of T steps."""
    return ((t * T).floor().clamp(max=T - 1) + 1) / T


# -----------------------------------------------------------------------------
# objectives: the loss of each position, named after their papers. Each takes Masked and returns the loss of its N positions, (N,)


@dataclass
class Masked:
    """The N masked positions of a batch, as the trunk leaves them."""
    net: DiT
    h: torch.Tensor       # (N, n_embd)
    x0: torch.Tensor      # (N,) the tokens behind the masks
    t: torch.Tensor       # (N,)
    schedule: Schedule
    T: int                # number of steps; 0: continuous time

    def nll(self, exclude_mask=True):
        return self.net.nll(self.h, self.x0, self.net.config.mask_id if exclude_mask else None)


def subs(at, importance=False):
    """MDLM's NELBO, equation 10: the SUBS parameterisation gives the mask no probability and keeps what is seen, so that only masked
    positions have a loss, -log p(x0 | xt) weighed by -alpha'_t / (1 - alpha_t); 1/t for loglinear. In T steps, equation 8:
    weighed by T (alpha_s - alpha_t) / (1 - alpha_t), s = t - 1/T."""
    if importance:
        return at.nll() * at.schedule.importance_weight()
    if at.T:
        alpha_t, alpha_s = at.schedule.alpha(at.t), at.schedule.alpha(at.t - 1 / at.T)
        return at.nll() * (at.T * (alpha_s - alpha_t) / (1 - alpha_t))
    return at.nll() * (at.schedule.dsigma(at.t) / torch.expm1(at.schedule.sigma(at.t)))


def mlm(at):
    """The xlm experiment's: cross entropy at the masked positions over all V ids, the mask's own included, not weighed by time."""
    return at.nll(exclude_mask=False)


def d3pm(at, subs_masking=False):
    """The T-step diffusion term of absorbing D3PM (Austin et al. 2021; MDLM, appendix A.2.4), alpha_t = 1 - t, where the net may give the
    mask itself a probability p_m: T KL(q(xs | xt, x0) || p(xs | xt)). subs_masking: p_m = 0, which is 'subs' at T."""
    if subs_masking:
        return subs(at)
    mask_id, head = at.net.config.mask_id, at.net.lm_head
    nll, logit = at.net.nll_and_logit(at.h, at.x0)
    logit_m = (at.h.float() * head.weight[mask_id]).sum(dim=-1) + (0 if head.bias is None else head.bias[mask_id])
    p_m = (logit_m - (nll + logit)).double().exp()
    t, dt = at.t.double(), 1 / at.T
    s = (t - dt).clamp(min=0)
    log_t = torch.log1p((1 - t) * p_m / t)
    log_s = torch.where(s > dt / 2, torch.log1p((1 - s) * p_m / s.clamp(min=dt / 2)), 0)       # its share is s/t: nothing at s = 0
    return (at.T * (dt / t * (log_t + nll) + s / t * (log_t - log_s))).float()


def sedd(at):
    """SEDD's score entropy for the absorbing process (Lou et al. 2023, equation 5), dsigma included. The net's logits are
    log-scores up to -log(e^sigma - 1) - log(V - 1)."""
    sigma = at.schedule.sigma(at.t)
    nll, logit = at.net.nll_and_logit(at.h, at.x0, at.net.config.mask_id)
    log_ratio = -torch.log(torch.expm1(sigma))                                                 # of the true score at x0
    scale = log_ratio - math.log(at.net.config.vocab_size - 1)
    positive, negative = torch.exp(nll + logit + scale), log_ratio.exp() * (logit + scale)
    return at.schedule.dsigma(at.t) * (positive - negative + log_ratio.exp() * (log_ratio - 1))


def ar(net, x0, attended=None):
    """-log p(x0[:, i] | x0[:, :i]) of a causal net, (B, L), the mask excluded; nothing at column 0."""
    h = net.trunk(x0[:, :-1], attended=attended)
    nll = net.nll(h.flatten(0, 1), x0[:, 1:].flatten(), net.config.mask_id)
    return F.pad(nll.view(len(x0), -1), (1, 0))


OBJECTIVES = {'subs': subs, 'mlm': mlm, 'd3pm': d3pm, 'sedd': sedd, 'ar': ar}


def check_objective(objective, T=0, subs_masking=False, importance=False, causal=None):
    """Refuse, by name, what cannot go together."""
    if objective not in OBJECTIVES:
        raise ValueError(f"objective '{objective}' is not known: choose from {', '.join(OBJECTIVES)}")
    for bad, why in ((objective == 'd3pm' and not T, "objective 'd3pm' is defined in steps: give T, such as T=1000"),
                     (T and objective not in ('d3pm', 'subs'), f"objective '{objective}' is not defined in steps: T={T} goes with d3pm or subs"),
                     (T < 0, f'T={T}: the number of steps, or 0 for continuous time'),
                     (subs_masking and objective != 'd3pm', f"subs_masking=True goes with objective d3pm, not '{objective}'"),
                     (importance and objective != 'subs', f"importance-sampled time goes with objective subs, not '{objective}'"),
                     (importance and T, f'importance-sampled time is continuous: it cannot go with T={T}'),
                     (causal is not None and causal != (objective == 'ar'), f"objective '{objective}' does not go with a net with causal={causal}")):
        if bad:
            raise ValueError(why)


def per_token_loss(net, x0, xt, t, objective=None, schedule=loglinear, T=0, subs_masking=False, importance=False, masked=None, attended=None):
    """The loss of each position in nats, (B, L) float32, zero where it adds nothing.

    x0, xt (B, L) ids; t (B,) the times of xt; objective: a key of OBJECTIVES, default the net's own. T > 0: in T steps, t on the grid
    1/T ... 1. subs_masking: d3pm without a probability for the mask. importance: t was drawn by schedule.importance_time.
    'ar': xt, t are not used. masked (N,): the flat indices where xt is the mask, if they are known already (looking them up makes a
    GPU wait); attended (B, L) bool: see DiT.trunk. Raises ValueError where options cannot go together.
    The trunk runs over everything, the head over the masked positions alone."""
    objective = objective or net.config.objective
    check_objective(objective, T, subs_masking, importance, net.config.causal)
    if objective == 'ar':
        return ar(net, x0, attended)
    if masked is None:
        masked = (xt == net.config.mask_id).flatten().nonzero().squeeze(1)
    h = net.trunk(xt, schedule.conditioning(t), attended).flatten(0, 1)                        # (B*L, n_embd)
    at = Masked(net, h.index_select(0, masked), x0.flatten()[masked], t[masked // x0.size(1)], schedule, T)
    loss = OBJECTIVES[objective](at, **dict(subs=dict(importance=importance), d3pm=dict(subs_masking=subs_masking)).get(objective, {}))
    return torch.zeros(x0.numel(), device=x0.device, dtype=loss.dtype).index_copy(0, masked, loss).view(x0.shape)


def reconstruction_loss(net, x0, schedule=loglinear, subs_masking=False, attended=None):
    """D3PM's term at t = 0, -log p(x0 | x0) at every position, (B, L): its T-step diffusion term leaves it out."""
    h = net.trunk(x0, schedule.conditioning(torch.zeros(len(x0), device=x0.device)), attended)
    return net.nll(h.flatten(0, 1), x0.flatten(), net.config.mask_id if subs_masking else None).view(x0.shape)


def nelbo_per_token(net, batch, schedule=loglinear, T=0, subs_masking=False):
    """The bound on -log p(x0) of each position, (B, L), for a batch of corrupt_batch: the net's own objective with all its terms; of an
    'mlm' net MDLM's NELBO, of an 'ar' net the likelihood itself."""
    objective = 'subs' if net.config.objective == 'mlm' else net.config.objective
    loss = per_token_loss(net, batch['x0'], batch['xt'], batch['t'], objective, schedule, T, subs_masking, masked=batch['masked'], attended=batch['attended'])
    if objective == 'd3pm':
        loss = loss + reconstruction_loss(net, batch['x0'], schedule, subs_masking, batch['attended'])
    return loss


# -----------------------------------------------------------------------------
# weights in and out

# names of the parameters in the published layouts, (ours, theirs) with {i} for the number of the block; the first that fits counts
LAYOUTS = {
    'mdlm': [
        ('wte.weight', 'backbone.vocab_embed.embedding'),
        ('sigma_map.fc1', 'backbone.sigma_map.mlp.0'),
        ('sigma_map.fc2', 'backbone.sigma_map.mlp.2'),
        ('blocks.{i}.mlp_in', 'backbone.blocks.{i}.mlp.0'),
        ('blocks.{i}.mlp_out', 'backbone.blocks.{i}.mlp.2'),
        ('blocks.{i}.adaLN', 'backbone.blocks.{i}.adaLN_modulation'),
        ('blocks.{i}', 'backbone.blocks.{i}'),
        ('norm_f', 'backbone.output_layer.norm_final'),
        ('lm_head', 'backbone.output_layer.linear'),
        ('adaLN_f', 'backbone.output_layer.adaLN_modulation'),
    ],
    'xlm': [
        ('wte', 'embed_tokens'),
        ('blocks.{i}.attn_out', 'encoder.{i}.o_proj'),
        ('blocks.{i}.mlp_in', 'encoder.{i}.mlp.0'),
        ('blocks.{i}.mlp_out', 'encoder.{i}.mlp.2'),
        ('blocks.{i}', 'encoder.{i}'),
        ('norm_f', 'output_layer.norm_final'),
        ('lm_head', 'output_layer.linear'),
    ],
    'smdm': [
        ('wte', 'transformer.wte'),
        ('blocks.{i}.norm1', 'transformer.h.{i}.norm_1'),
        ('blocks.{i}.norm2', 'transformer.h.{i}.norm_2'),
        ('blocks.{i}.attn_qkv', 'transformer.h.{i}.attn.attn'),
        ('blocks.{i}.attn_out', 'transformer.h.{i}.attn.proj'),
        ('blocks.{i}.mlp_gate', 'transformer.h.{i}.mlp.swiglu.w1'),
        ('blocks.{i}.mlp_in', 'transformer.h.{i}.mlp.swiglu.w2'),
        ('blocks.{i}.mlp_out', 'transformer.h.{i}.mlp.swiglu.w3'),
        ('norm_f', 'transformer.ln_f'),
        ('lm_head', 'lm_head'),
    ],
}


def renamed(name, pairs):
    """name in the other column of a table of (from, to) pairs, or None where no pair fits."""
    for source, target in pairs:
        match = re.match(re.escape(source).replace(r'\{i\}', r'(\d+)') + r'(?=\.|$)', name)
        if match:
            return target.format(i=match.group(1) if match.groups() else '') + name[match.end():]


def interleave_heads(weight, n_head, inverse=False):
    """SMDM packs q, k, v head by head: (H, 3, head_dim, C) where ours is (3, H, head_dim, C)."""
    first, second = (n_head, 3) if inverse else (3, n_head)
    return weight.view(first, second, -1, weight.size(1)).transpose(0, 1).reshape(weight.shape)


def layout_of(names, source):
    """Which published layout a file has, by its names."""
    for layout, first in (('mdlm', 'backbone.vocab_embed.embedding'), ('xlm', 'embed_tokens.weight'), ('smdm', 'transformer.wte.weight')):
        if first in names:
            return layout
    raise ValueError(f"{source} has none of the layouts {', '.join(LAYOUTS)}: its first names are {', '.join(sorted(names)[:5])}")


def fields_of(layout, tensors, described, source):
    """ModelConfig fields read off the tensors of a published layout, what they cannot tell from config.json (`described`).
    n_head is None where neither says."""
    def sizes(embedding, block, mlp):
        missing = [name for name in (embedding, mlp.format(i=0)) if name not in tensors]
        if missing:
            raise ValueError(f"{source}, read in the layout '{layout}', lacks {', '.join(missing)}")
        layers = {int(match.group(1)) for match in (re.match(re.escape(block) + r'(\d+)\.', name) for name in tensors) if match}
        V, C = tensors[embedding].shape
        return dict(vocab_size=V, n_embd=C, n_layer=len(layers), n_mlp=tensors[mlp.format(i=0)].size(0))

    inv_freq = next((tensor for name, tensor in tensors.items() if name.endswith('rotary_emb.inv_freq')), None)
    if layout == 'mdlm':
        fields = sizes('backbone.vocab_embed.embedding', 'backbone.blocks.', 'backbone.blocks.{i}.mlp.0.weight')
        conditioned = tensors.get('backbone.sigma_map.mlp.2.weight')
        fields |= dict(mask_id=fields['vocab_size'] - 1, cond_dim=0 if conditioned is None else conditioned.size(0), causal=conditioned is None,
                       objective='ar' if conditioned is None else 'subs', block_size=1024, n_head=None)
        theirs = dict(block_size='model_length', n_head='n_heads', dropout='dropout', time_conditioning='time_conditioning')
        fields |= {ours: described[key] for ours, key in theirs.items() if key in described}
    elif layout == 'xlm':  # GPT-2's ids and seven named ones, of which the last are <|pad|> <|unk|> <|mask|> <|sep|>
        fields = sizes('embed_tokens.weight', 'encoder.', 'encoder.{i}.mlp.0.weight')
        fields |= dict(mask_id=fields['vocab_size'] - 2, pad_id=fields['vocab_size'] - 4, cond_dim=0, mlp='relu', norm_bias=True, head_bias=False,
                       init='xlm', objective='mlm', block_size=1024, n_head=12 if fields['n_embd'] == 768 else None)
    else:
        fields = sizes('transformer.wte.weight', 'transformer.h.', 'transformer.h.{i}.mlp.swiglu.w1.weight')
        rows = tensors['lm_head.weight'].size(0) if 'lm_head.weight' in tensors else fields['vocab_size']
        causal = rows == fields['vocab_size']
        shape = tuple(fields[key] for key in ('n_layer', 'n_embd', 'n_mlp'))
        known = [size['n_head'] for size in SIZES.values() if tuple(size.get(key) for key in ('n_layer', 'n_embd', 'n_mlp')) == shape]
        fields |= dict(mask_id=None if causal else rows, head_mask=causal, causal=causal, objective='ar' if causal else 'subs', cond_dim=0, norm='rmsnorm',
                       mlp='swiglu', mlp_bias=False, head_bias=False, rotary_bf16=True, init='smdm', block_size=2048, n_head=known[0] if known else None)
    if inv_freq is not None:
        fields['n_head'] = fields['n_embd'] // (2 * len(inv_freq))
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    return fields | {key: value for key, value in described.items() if key in known and layout != 'mdlm'}


def read_checkpoint(path):
    """The dict that train.py saved at path, tensors on the CPU. Nothing in the file is executed.
    Raises FileNotFoundError, or ValueError where the file is truncated, damaged or not one of ours."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f'no checkpoint at {path}: train one with train.py, or give another out_dir or init_from')
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # the CRC of every record: torch.load itself would take a flipped bit
    except (OSError, MemoryError):  # the machine's fault, not the file's
        raise
    except Exception as error:  # BadZipFile, and what else a flipped bit in a header leads to
        damaged = error
    if damaged is not None:
        raise ValueError(f'{path} is truncated or damaged ({damaged}): use another checkpoint')
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception:  # a zip of something else, or with something else than tensors in it
        checkpoint = None
    sections = dict(model=dict, ema=dict, optimizer=list, iter=int, tokens_seen=int, best_val_loss=float, model_config=dict, constants=dict, tokenizer=dict)
    for key, kind in sections.items():
        if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(key), kind):
            raise ValueError(f'{path} is not a checkpoint of train.py (no {key})')
    return checkpoint


def put(folder, name, same):
    """Give the file `same` of folder another name there, in place of what has the name."""
    path = os.path.join(folder, name)
    if os.path.exists(path) and os.path.samefile(path, os.path.join(folder, same)):
        return
    if os.path.exists(path + '.unfinished'):
        os.remove(path + '.unfinished')
    try:
        os.link(os.path.join(folder, same), path + '.unfinished')
    except OSError:  # a file system without links
        shutil.copyfile(os.path.join(folder, same), path + '.unfinished')
    os.replace(path + '.unfinished', path)


def write_checkpoint(checkpoint, folder, files):
    """Write a checkpoint under the names `files` in folder, so that whatever happens there is a whole one: written under another name,
    flushed to the disk, then renamed; the ckpt.pt before it is kept as ckpt.prev.pt. Raises OSError or RuntimeError where it cannot be."""
    os.makedirs(folder, exist_ok=True)
    path = lambda name: os.path.join(folder, name)

    unfinished = files[0] + '.unfinished'
    try:
        with open(path(unfinished), 'wb') as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
        for name in files[1:]:  # the first name comes last: where it is, all are
            put(folder, name, unfinished)
        if 'ckpt.pt' in files and os.path.exists(path('ckpt.pt')):
            put(folder, 'ckpt.prev.pt', 'ckpt.pt')
        os.replace(path(unfinished), path(files[0]))
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(path(unfinished))
        raise
    with contextlib.suppress(OSError):  # not everywhere can a folder be opened
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def read_newest(folder):
    """(checkpoint, None), read from folder/ckpt.pt, or where that is missing or damaged (checkpoint, why), read from the one before it.
    Raises what read_checkpoint raises where neither is whole."""
    try:
        return read_checkpoint(os.path.join(folder, 'ckpt.pt')), None
    except (ValueError, FileNotFoundError) as error:
        if not os.path.isfile(os.path.join(folder, 'ckpt.prev.pt')):
            raise
        return read_checkpoint(os.path.join(folder, 'ckpt.prev.pt')), error


class _Ignored:
    """Stands for whatever a foreign pickle wants to build that is no tensor and no plain container."""

    def __new__(cls, *args, **kwargs):
        return object.__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass

    def __setitem__(self, key, value):
        pass

    def append(self, item):
        pass

    extend = add = append


class _TensorUnpickler(pickle.Unpickler):
    """Builds tensors and plain containers. Everything else that the file names is ignored, and nothing of it is imported or called."""
    allowed = {('collections', 'OrderedDict'), ('torch._utils', '_rebuild_tensor_v2'), ('torch._utils', '_rebuild_parameter'), ('torch', 'Size')}

    def find_class(self, module, name):
        return super().find_class(module, name) if (module, name) in self.allowed else _Ignored


def read_lightning(path, ema):
    """Named tensors from a Lightning .ckpt: its state_dict, with the averaged weights of ema.shadow_params (in the order of the
    parameters) in place of the last ones if `ema`. The foreign objects beside them are not built."""
    reader = types.SimpleNamespace(Unpickler=_TensorUnpickler, __name__='nanomdm')
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=False, pickle_module=reader)
        tensors = {name: tensor for name, tensor in checkpoint['state_dict'].items() if isinstance(tensor, torch.Tensor)}
        shadow = checkpoint['ema']['shadow_params'] if ema and checkpoint.get('ema') else None
    except Exception as error:  # whatever a broken or hostile file leads to
        raise ValueError(f'{path} is not a Lightning checkpoint that can be read ({type(error).__name__}: {error})') from None
    if shadow is not None:
        parameters = [name for name in tensors if 'rotary_emb' not in name]
        if len(shadow) != len(parameters) or any(tensors[name].shape != average.shape for name, average in zip(parameters, shadow)):
            raise ValueError(f'{path}: ema.shadow_params do not fit the {len(parameters)} parameters of its state_dict; ema=False takes these')
        tensors |= dict(zip(parameters, shadow))
    return tensors


def find_source(source):
    """A local path for a source: itself, or what is downloaded (or already cached) from the hub for org/name[@revision][:file]."""
    source = os.fspath(source)
    path = os.path.expanduser(source)
    match = re.fullmatch(r'([\w.-]+/[\w.-]+)(?:@([\w./-]+))?(?::([\w./-]+))?', source)
    if os.path.exists(path) or not match or path.endswith('.pt'):
        return path
    repository, revision, file = match.groups()
    try:
        from huggingface_hub import snapshot_download
        folder = snapshot_download(repository, revision=revision, allow_patterns=[file] if file else ['*.json', '*.safetensors'])
    except Exception as error:  # the hub's client has many, and what matters to the user is the same
        raise ValueError(f"{source} is no file or folder here, and cannot be had from the hub ({type(error).__name__}); where there is a network: hf "
                         f"download {repository}{f' {file}' if file else ''}{f' --revision {revision}' if revision else ''} --local-dir FOLDER, "
                         'then give the FOLDER') from None
    return os.path.join(folder, file) if file else folder


def read_published(path, ema):
    """(named tensors, config.json) of a folder, a .safetensors or a Lightning .ckpt."""
    described = {}
    if os.path.isdir(path):
        if os.path.isfile(os.path.join(path, 'config.json')):
            with open(os.path.join(path, 'config.json')) as f:
                described = json.load(f)
        index = os.path.join(path, 'model.safetensors.index.json')
        if os.path.isfile(index):
            with open(index) as f:
                files = sorted(set(json.load(f)['weight_map'].values()))
        else:
            files = sorted(file for file in os.listdir(path) if file.endswith('.safetensors'))
            if len(files) > 1:
                raise ValueError(f"{path} holds several models: give one of {', '.join(files[:5])}{' ...' if len(files) > 5 else ''} (hub: org/name:FILE)")
        paths = [os.path.join(path, file) for file in files]
    elif path.endswith('.ckpt'):
        return read_lightning(path, ema), described
    else:
        paths = [path]
    tensors = {}
    for file in paths:
        try:
            tensors |= load_file(file)
        except Exception as error:  # safetensors' own
            raise ValueError(f'{file} is not a whole .safetensors file ({error})') from None
    return tensors, described


def build(fields, overrides, tensors, source):
    """The net of fields and overrides with the given tensors for weights; every name and shape must agree."""
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    for key in [*fields, *overrides]:
        if key not in known:
            raise ValueError(f"{source}: '{key}' is not a field of ModelConfig")
    fields = fields | overrides
    if fields.get('n_head', 0) is None:
        raise ValueError(f'{source} does not say how many heads its width of {fields["n_embd"]} is divided into: give n_head=...')
    with torch.device('meta'):
        net = DiT(ModelConfig(**fields))
    load_state(net, tensors, source, assign=True)
    return net


def load_state(net, tensors, source, assign=False):
    """Give net the named tensors; every name and every shape must agree. Raises ValueError naming what does not."""
    own = net.state_dict()
    for what, names in (('lacks', own.keys() - tensors.keys()), ('has unknown', tensors.keys() - own.keys())):
        if names:
            raise ValueError(f"{source} {what} {', '.join(sorted(names)[:5])}{' ...' if len(names) > 5 else ''}")
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) or tensor.shape != own[name].shape:
            tensor = torch.as_tensor(0) if not isinstance(tensor, torch.Tensor) else tensor
            raise ValueError(f'{source}: {name} has shape {tuple(tensor.shape)}, the model {tuple(own[name].shape)}')
    net.load_state_dict(tensors, assign=assign)


def check_overrides(overrides):
    """Refuse what is not a dict of fields of ModelConfig, or None."""
    known = [field.name for field in dataclasses.fields(ModelConfig)]
    if not isinstance(overrides, (dict, type(None))) or not all(key in known for key in overrides or ()):
        raise ValueError(f"overrides={overrides!r}: a dict of fields of ModelConfig is needed, which are {', '.join(known)}")


TOKENIZERS = {('mdlm', 50258): 'gpt2', ('xlm', 50263): 'gpt2-xlm'}  # of the published models, by layout and number of ids


def load_pretrained(source, ema=True, device='cpu', **overrides):
    """A net in eval mode from source: a ckpt.pt of train.py (or the out_dir that holds one), a folder with model.safetensors (and
    config.json), a lone .safetensors, a Lightning .ckpt, or a Hugging Face id[@revision][:file]. The layout is told by the names.

    ema: the averaged weights rather than the last ones, where a file has both. overrides: fields of ModelConfig that the file cannot tell.
    net.tokenizer is the arguments for data.get_tokenizer, None where the source does not say; net.constants those of the run of train.py
    that made a ckpt.pt, else empty; net.extra the tensors of the file that are no parameters (save_pretrained puts them back).
    Raises FileNotFoundError or ValueError."""
    path = find_source(source)
    published = path.endswith(('.safetensors', '.ckpt')) or os.path.isdir(path) and any(file.endswith('.safetensors') for file in os.listdir(path))
    if not published:
        path = path if path.endswith('.pt') else os.path.join(path, 'ckpt.pt')
        checkpoint = read_checkpoint(path)
        net = build(checkpoint['model_config'], overrides, checkpoint['ema' if ema else 'model'], source)
        net.tokenizer, net.constants = dict(name=str(checkpoint['tokenizer'].get('name')), folder=os.path.dirname(path)), checkpoint['constants']
    elif not os.path.exists(path):
        raise FileNotFoundError(f'{source} is not there')
    else:
        tensors, described = read_published(path, ema)
        layout = layout_of(tensors, source)
        fields = fields_of(layout, tensors, described, source)
        theirs_to_ours = [(theirs, ours) for ours, theirs in LAYOUTS[layout]]
        extra = {name: tensors.pop(name) for name in list(tensors) if name.endswith('rotary_emb.inv_freq')}
        n_head = overrides.get('n_head', fields['n_head'])
        ours = {}
        for name in list(tensors):  # one by one: no second copy of the file in memory
            tensor = tensors.pop(name).float()
            key = renamed(name, theirs_to_ours) or name
            if layout == 'smdm' and key.endswith('attn_qkv.weight') and n_head and tensor.size(0) % (3 * n_head) == 0:
                tensor = interleave_heads(tensor, n_head, inverse=True)
            ours[key] = tensor
        net = build(fields, overrides, ours, f"{source}, read in the layout '{layout}',")
        name = TOKENIZERS.get((layout, net.config.vocab_size))
        net.tokenizer, net.extra = name and dict(name=name), extra
    return net.to(device).eval()


def save_pretrained(net, folder):
    """Write config.json and model.safetensors in the published layout of the net's family, for the released code to load strictly.
    Raises ValueError where the net is of no published family."""
    config = net.config
    if config.mlp == 'swiglu' and config.norm == 'rmsnorm' and not (config.mlp_bias or config.head_bias or config.cond_dim or config.norm_bias):
        layout = 'smdm'
    elif config.mlp == 'relu' and config.norm == 'layernorm' and config.norm_bias and config.mlp_bias and not (config.cond_dim or config.head_bias or config.causal):
        layout = 'xlm'
    elif config.mlp == 'gelu' and config.norm == 'layernorm' and not config.norm_bias and config.mlp_bias and config.head_bias and bool(config.cond_dim) != config.causal:
        layout = 'mdlm'
    else:
        raise ValueError('a net with these settings is of no published family (MDLM, its AR baseline, xlm, SMDM): its ckpt.pt is its only form')
    tensors = {}
    for name, tensor in net.state_dict().items():
        tensor = interleave_heads(tensor, config.n_head) if layout == 'smdm' and name.endswith('attn_qkv.weight') else tensor
        tensors[renamed(name, LAYOUTS[layout])] = tensor.contiguous().cpu()
    extra = net.extra
    if not extra and layout != 'smdm':
        inv_freq = 1.0 / 10_000 ** (torch.arange(0, config.n_embd // config.n_head, 2, dtype=torch.float32) / (config.n_embd // config.n_head))
        names = ['backbone.rotary_emb.inv_freq'] if layout == 'mdlm' else [f'encoder.{i}.rotary_emb.inv_freq' for i in range(config.n_layer)]
        extra = {name: inv_freq.clone() for name in names}
    described = dataclasses.asdict(config)
    if layout == 'mdlm':
        described = dict(architectures=['MDLM'], model_type='mdlm', vocab_size=config.vocab_size, model_length=config.block_size, hidden_dim=config.n_embd,
                         cond_dim=config.cond_dim, n_blocks=config.n_layer, n_heads=config.n_head, dropout=config.dropout,
                         time_conditioning=config.time_conditioning, return_dict=False, torch_dtype='float32')
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, 'model.safetensors')
    save_file(tensors | extra, path + '.unfinished', metadata=dict(format='pt'))
    os.chmod(path + '.unfinished', 0o644)  # safetensors writes for its owner alone
    os.replace(path + '.unfinished', path)
    with open(os.path.join(folder, 'config.json'), 'w') as f:
        json.dump(described, f, indent=1)
