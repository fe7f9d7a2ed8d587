"""
The network, the noise, the objectives, and weights in and out.

What is unusual here, for a reader who knows nanoGPT:
- attention looks both ways; a mask id stands for what is not known yet; rotary positions, no position table
- the conditioning is adaLN-zero (DiT); most masked diffusion models always feed it sigma = 0, so that it is one vector
  for the whole batch and folds into the weight and bias of the norms
- trunk and head are apart: a loss or a sampler projects to the vocabulary only the positions it needs, and the cross
  entropy keeps one (N, V) buffer for its N masked positions; nothing of shape (B, L, V) is ever built
- one class for every family: an architecture is a ModelConfig

References: MDLM (Sahoo et al. 2024, arXiv 2406.07524), DiT (Peebles & Xie 2022, arXiv 2212.09748),
SMDM (Nie et al. 2024, arXiv 2410.18514).
"""
import dataclasses
import json
import math
import os
import pickle
import re
import zipfile
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file

# -----------------------------------------------------------------------------
# the network

ACTIVATIONS = {'gelu': lambda x: F.gelu(x, approximate='tanh'), 'relu': F.relu}


@dataclass
class ModelConfig:
    """All that tells one architecture from another. The defaults are MDLM's OpenWebText model, 170M parameters."""
    block_size: int = 1024           # longest row (L)
    vocab_size: int = 50258          # every id that can occur in the input, the mask included (V)
    mask_id: int = 50257
    pad_id: int | None = None        # its embedding is zero and untrained (xlm); None: padding is a token like any other
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_mlp: int | None = None         # hidden width of the mlp; None: 4 * n_embd
    cond_dim: int = 128              # width of the adaLN conditioning; 0: none
    time_conditioning: bool = False  # False: the conditioning is fed sigma = 0 whatever the time
    mlp: str = 'gelu'                # 'gelu' (tanh form) or 'relu'
    norm_bias: bool = False
    head_bias: bool = True
    dropout: float = 0.0             # on the two residual branches of a block
    attn_dropout: float = 0.0        # on the attention weights
    init: str = 'mdlm'               # of new weights: 'mdlm' (adaLN and head zero) or 'xlm' (PyTorch's defaults)
    objective: str = 'subs'          # what the outputs mean: a key of OBJECTIVES

    def __post_init__(self):
        if self.n_mlp is None:
            self.n_mlp = 4 * self.n_embd
        for key in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'n_mlp'):
            if getattr(self, key) < 1:
                raise ValueError(f'{key}={getattr(self, key)}: it must be at least 1')
        for key in ('dropout', 'attn_dropout'):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f'{key}={getattr(self, key)}: it must be a probability below 1')
        for key, known in (('mlp', ACTIVATIONS), ('init', ('mdlm', 'xlm')), ('objective', OBJECTIVES)):
            if getattr(self, key) not in known:
                raise ValueError(f"{key}='{getattr(self, key)}' is not known: choose from {', '.join(known)}")
        if self.n_embd % self.n_head or self.n_embd // self.n_head % 2:
            raise ValueError(f'n_embd={self.n_embd} over n_head={self.n_head}: heads need a whole and even width')
        if self.time_conditioning and not self.cond_dim:
            raise ValueError('time_conditioning=True needs a conditioning: cond_dim=0 leaves none')
        if not 0 <= self.mask_id < self.vocab_size:
            raise ValueError(f'mask_id={self.mask_id} is outside the vocabulary of {self.vocab_size} ids')


def rotary_table(length, head_dim, device):
    """cos and sin (L, 1, 1, head_dim/2) of the rotary angles, base 10,000, float32."""
    inv_freq = 1.0 / 10_000 ** (torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angle = torch.arange(length, device=device, dtype=torch.float32)[:, None, None, None] * inv_freq
    return angle.cos(), angle.sin()


def apply_rotary(x, cos, sin):
    """Rotate the halves (not interleaved pairs) of each head of x (B, L, 2, H, head_dim), q and k at once."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


class Norm(nn.Module):
    """LayerNorm, optionally modulated: norm(x) * (1 + scale) + shift, scale and shift (1 or B, 1, n_embd)."""

    def __init__(self, n_embd, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))
        self.bias = nn.Parameter(torch.zeros(n_embd)) if bias else None

    def forward(self, x, shift=None, scale=None):
        weight, bias = self.weight, self.bias
        if shift is not None:  # modulation is another weight and bias, for each row or, at a constant sigma, for all
            weight, bias = weight * (1 + scale), shift if bias is None else bias * (1 + scale) + shift
        # outside of layer_norm, whose CPU kernel sums the gradient of a weight in an order that depends on the number of threads
        x = F.layer_norm(x, x.shape[-1:])
        return x * weight if bias is None else torch.addcmul(bias.to(x.dtype), x, weight)


class Block(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.norm1 = Norm(config.n_embd, config.norm_bias)
        self.attn_qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.attn_out = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.norm2 = Norm(config.n_embd, config.norm_bias)
        self.mlp_in = nn.Linear(config.n_embd, config.n_mlp)
        self.mlp_out = nn.Linear(config.n_mlp, config.n_embd)
        self.adaLN = nn.Linear(config.cond_dim, 6 * config.n_embd) if config.cond_dim else None

    def attention(self, x, cos, sin, attn_mask):
        B, L, C = x.shape
        qkv = self.attn_qkv(x).view(B, L, 3, self.config.n_head, C // self.config.n_head)  # (B, L, 3, H, C/H)
        q, k = apply_rotary(qkv[:, :, :2], cos, sin).permute(2, 0, 3, 1, 4)                # 2 x (B, H, L, C/H)
        v = qkv[:, :, 2].transpose(1, 2)
        dropout = self.config.attn_dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout)
        return self.attn_out(y.transpose(1, 2).reshape(B, L, C))

    def mlp(self, x):
        return self.mlp_out(ACTIVATIONS[self.config.mlp](self.mlp_in(x)))

    def forward(self, x, c, rotary, attn_mask=None):
        drop = lambda branch: F.dropout(branch, self.config.dropout, self.training)
        if c is None:
            x = x + drop(self.attention(self.norm1(x), *rotary, attn_mask))
            return x + drop(self.mlp(self.norm2(x)))
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN(c)[:, None].chunk(6, dim=2)  # (1 or B, 1, C) each
        x = x + gate1 * drop(self.attention(self.norm1(x, shift1, scale1), *rotary, attn_mask))
        return x + gate2 * drop(self.mlp(self.norm2(x, shift2, scale2)))


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
        self.wte = nn.Embedding(config.vocab_size, config.n_embd, padding_idx=config.pad_id)
        self.sigma_map = SigmaMap(config.cond_dim) if config.cond_dim else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm_f = Norm(config.n_embd, config.norm_bias)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=config.head_bias)
        self.adaLN_f = nn.Linear(config.cond_dim, 2 * config.n_embd) if config.cond_dim else None
        if config.init == 'mdlm':  # nn.Linear's own defaults elsewhere; adaLN-zero: every block starts as the identity
            nn.init.kaiming_uniform_(self.wte.weight, a=math.sqrt(5))
            for name, p in self.named_parameters():
                if name.startswith('lm_head') or 'adaLN' in name:
                    nn.init.zeros_(p)

    def trunk(self, x, sigma=None, attended=None):
        """ids x (B, L), sigma (B,) total noise -> (B, L, n_embd), all that is before the vocabulary projection.
        attended (B, L) bool: False where nothing may look at (padding); None: everything is seen."""
        config, c = self.config, None
        if config.cond_dim:
            if not config.time_conditioning:
                sigma = torch.zeros(1, device=x.device)
            elif sigma is None:
                raise ValueError('this net is time-conditioned: give sigma (B,), the total noise of each row')
            c = self.sigma_map(sigma)                                                          # (1 or B, cond_dim)
        rotary = rotary_table(x.size(1), config.n_embd // config.n_head, x.device)
        attn_mask = None if attended is None else attended[:, None, None, :]                   # (B, 1, 1, L)
        h = self.wte(x)
        for block in self.blocks:
            h = block(h, c, rotary, attn_mask)
        if c is None:
            return self.norm_f(h)
        shift, scale = self.adaLN_f(c)[:, None].chunk(2, dim=2)
        return self.norm_f(h, shift, scale)

    def head(self, h):
        """The vocabulary projection, h (..., n_embd) -> logits (..., V) float32 (float64 for a float64 net)."""
        logits = self.lm_head(h)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def nll(self, h, target, exclude=None):
        """-log softmax(head(h))[target], h (N, n_embd), target (N,) -> (N,) float32, in one (N, V) buffer at most.
        exclude: an id that is given no probability (SUBS excludes the mask)."""
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
        per_token = config.n_layer * (4 * config.n_embd ** 2 + 2 * config.n_embd * config.n_mlp + 2 * length * config.n_embd)
        return 6 * (rows * length * per_token + scored * config.n_embd * config.vocab_size)


class _NLL(torch.autograd.Function):
    """Linear layer and cross entropy in one. The forward pass walks over chunks of rows and leaves softmax - onehot, the
    gradient of each row's loss by its logits, in one (N, V) buffer of the compute dtype; the backward pass is then two
    matrix products whatever gradient the rows are given. The log-sum-exp is float32 whatever the autocast."""

    @staticmethod
    def forward(ctx, h, weight, bias, target, exclude, needs_grad):
        device = h.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h.dtype
        h_, weight_ = h.to(dtype), weight.to(dtype)
        bias_ = None if bias is None else bias.to(dtype)
        N, V = h.size(0), weight.size(0)
        wide = torch.promote_types(dtype, torch.float32)
        nll = torch.empty(N, device=h.device, dtype=wide)
        delta = torch.empty(N, V, device=h.device, dtype=dtype) if needs_grad else None
        rows = max(128, 2 ** (20 if device == 'cpu' else 28) // V)  # a chunk stays in a CPU's cache; on a GPU it fills the machine
        for i in range(0, N, rows):
            at, logits = target[i:i + rows, None], F.linear(h_[i:i + rows], weight_, bias_).to(wide)
            if exclude is not None:
                logits[:, exclude] = -math.inf
            lse = logits.logsumexp(dim=-1, keepdim=True)
            nll[i:i + rows] = (lse - logits.gather(1, at)).squeeze(1)
            if needs_grad:
                p = logits.sub_(lse).exp_()
                delta[i:i + rows] = p.scatter_add_(1, at, torch.full_like(lse, -1))
        if needs_grad:
            ctx.save_for_backward(h_, weight_, delta)
            ctx.dtypes = h.dtype, weight.dtype, None if bias is None else bias.dtype
        return nll

    @staticmethod
    def backward(ctx, grad):
        h, weight, delta = ctx.saved_tensors
        h_dtype, weight_dtype, bias_dtype = ctx.dtypes
        grad = grad[:, None].to(delta.dtype)
        dh = ((delta @ weight) * grad).to(h_dtype)
        dweight = (delta.t() @ (h * grad)).to(weight_dtype)
        dbias = None if bias_dtype is None else (delta.t() @ grad).squeeze(1).to(bias_dtype)
        return dh, dweight, dbias, None, None, None


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
    index = int(index) if index else local_rank if kind == 'cuda' else 0
    if index >= count:
        raise ValueError(f"device='{name}': there is no {kind} device {index} here; device='auto' takes what there is")
    return torch.device(kind, index) if kind == 'cuda' else torch.device(kind)


def autocast(device, dtype):
    """The context to run a net in. dtype: 'float32', 'bfloat16', or 'auto': bfloat16 where the device multiplies it natively."""
    if dtype not in ('auto', 'float32', 'bfloat16'):
        raise ValueError(f"dtype='{dtype}' is not known: choose from auto, float32, bfloat16")
    if dtype == 'auto':
        native = {'cuda': torch.cuda.is_bf16_supported, 'cpu': torch.cpu._is_avx512_bf16_supported, 'mps': lambda: False}[device.type]()
        dtype = 'bfloat16' if native else 'float32'
    return torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != 'float32')


# -----------------------------------------------------------------------------
# noise: x0 -> xt


class LogLinear:
    """alpha_t = 1 - (1 - eps) t: a position is masked with probability (1 - eps) t (MDLM, appendix E.1)."""

    def __init__(self, eps=1e-3):
        self.eps = eps

    def sigma(self, t):
        """Total noise, -log alpha_t."""
        return -torch.log1p(-(1 - self.eps) * t)

    def dsigma(self, t):
        """Its derivative by t."""
        return (1 - self.eps) / (1 - (1 - self.eps) * t)

    def alpha(self, t):
        """Probability that a token is still seen at time t."""
        return 1 - (1 - self.eps) * t


SCHEDULES = {'loglinear': LogLinear}


def get_schedule(name, **parameters):
    """A noise schedule with .sigma(t), .dsigma(t), .alpha(t) = exp(-sigma(t)) on tensors t in [0, 1]."""
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


def corrupt_batch(batch, t, mask_id, schedule, key, device):
    """A batch of data.TokenRows with xt drawn at the times t (B,) by a generator seeded with key, on device. `masked` is the flat
    indices of the positions of xt that have a loss: the draws are made on the CPU, so that a GPU need not be asked for them."""
    xt = corrupt(batch['x0'], t, mask_id, schedule, torch.Generator().manual_seed(key), batch['maskable'])
    masked = ((xt == mask_id) & batch['scored']).flatten().nonzero().squeeze(1)
    batch = batch | dict(xt=xt, t=t, masked=masked)
    if batch['attended'].all():
        batch['attended'] = None  # attention is faster without a mask
    move = lambda x: x if x is None else x.pin_memory().to(device, non_blocking=True) if device.type == 'cuda' else x.to(device)
    return {name: move(x) for name, x in batch.items()}


def stratified_times(u, index, n, eps=1e-3):
    """Times in [eps, 1] that share one uniform u and spread evenly over n strata: (u + index/n) mod 1, index (...,) of 0..n-1
    (low-discrepancy sampling, Kingma et al. 2021, arXiv 2107.00630, appendix I.1)."""
    return ((u + index / n) % 1 * (1 - eps) + eps).float()


# -----------------------------------------------------------------------------
# objectives: the loss of each position


def masked_nll(net, x0, xt, sigma, exclude, masked, attended):
    """-log p(x0 | xt) at the masked positions of xt, zero elsewhere, (B, L) float32. The trunk runs over everything, the head
    over the masked positions alone."""
    if masked is None:
        masked = (xt == net.config.mask_id).flatten().nonzero().squeeze(1)
    h = net.trunk(xt, sigma, attended).flatten(0, 1)                                           # (B*L, n_embd)
    nll = net.nll(h.index_select(0, masked), x0.flatten()[masked], exclude)                    # (N,)
    return torch.zeros(x0.numel(), device=x0.device, dtype=nll.dtype).index_copy(0, masked, nll).view(x0.shape)


def subs(net, x0, xt, t, schedule, masked=None, attended=None):
    """MDLM's continuous-time NELBO, equation 10: the SUBS parameterisation gives the mask no probability and keeps what is
    seen, so that only masked positions have a loss, -log p(x0 | xt) weighed by -alpha'_t / (1 - alpha_t); 1/t for loglinear."""
    sigma = schedule.sigma(t)
    nll = masked_nll(net, x0, xt, sigma, net.config.mask_id, masked, attended)
    return nll * (schedule.dsigma(t) / torch.expm1(sigma))[:, None]


def mlm(net, x0, xt, t, schedule, masked=None, attended=None):
    """The xlm experiment's: cross entropy at the masked positions over all V ids, the mask's own included, not weighed by time."""
    return masked_nll(net, x0, xt, schedule.sigma(t), None, masked, attended)


# the per-token loss, and what its sum over a micro-batch is divided by: all 'scored' positions or the 'masked' ones
OBJECTIVES = {'subs': (subs, 'scored'), 'mlm': (mlm, 'masked')}


def per_token_loss(net, x0, xt, t, objective=None, schedule=loglinear, masked=None, attended=None):
    """The loss of each position in nats, (B, L) float32, zero where it adds nothing.

    x0, xt (B, L) ids; t (B,) the times of xt; objective: a key of OBJECTIVES, default the net's own.
    masked (N,): the flat indices where xt is the mask, if they are known already (looking them up makes a GPU wait);
    attended (B, L) bool: see DiT.trunk."""
    objective = objective or net.config.objective
    if objective not in OBJECTIVES:
        raise ValueError(f"objective '{objective}' is not known: choose from {', '.join(OBJECTIVES)}")
    return OBJECTIVES[objective][0](net, x0, xt, t, schedule, masked, attended)


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
}


def mdlm_config(config):
    """ModelConfig fields from the config.json of an MDLM release."""
    return dict(block_size=config['model_length'], vocab_size=config['vocab_size'], mask_id=config['vocab_size'] - 1,
                n_layer=config['n_blocks'], n_head=config['n_heads'], n_embd=config['hidden_dim'],
                cond_dim=config['cond_dim'], time_conditioning=config['time_conditioning'], dropout=config['dropout'])


def to_ours(name, layout):
    """The name that a tensor of a published layout has in DiT, or None: it has none there."""
    for ours, theirs in LAYOUTS[layout]:
        match = re.match(re.escape(theirs).replace(r'\{i\}', r'(\d+)') + r'(?=\.|$)', name)
        if match:
            return ours.format(i=match.group(1) if match.groups() else '') + name[match.end():]


def read_checkpoint(path):
    """The dict that train.py saved at path, tensors on the CPU. Nothing in the file is executed.
    Raises FileNotFoundError, or ValueError where the file is truncated, damaged or not one of ours."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f'no checkpoint at {path}: train one with train.py, or give another out_dir or init_from')
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # the CRC of every record: torch.load itself would take a flipped bit
    except (zipfile.BadZipFile, OSError) as error:
        damaged = error
    if damaged is not None:
        raise ValueError(f'{path} is truncated or damaged ({damaged}): use another checkpoint')
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError:
        checkpoint = None
    if not isinstance(checkpoint, dict) or not {'model', 'ema', 'model_config'} <= checkpoint.keys():
        raise ValueError(f'{path} is not a checkpoint of train.py')
    return checkpoint


def configured(fields, overrides, source):
    """ModelConfig(**fields) with overrides, refusing names it does not have."""
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    for key in [*fields, *overrides]:
        if key not in known:
            raise ValueError(f"{source}: '{key}' is not a field of ModelConfig")
    return ModelConfig(**fields | overrides)


def load_state(net, tensors, source):
    """Copy named tensors into net; every name and every shape must agree. Raises ValueError naming what does not."""
    own = net.state_dict()
    for what, names in (('lacks', own.keys() - tensors.keys()), ('has an unknown', tensors.keys() - own.keys())):
        if names:
            raise ValueError(f"{source} {what} {', '.join(sorted(names)[:5])}{' ...' if len(names) > 5 else ''}")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise ValueError(f'{source}: {name} has shape {tuple(tensor.shape)}, the model {tuple(own[name].shape)}')
    net.load_state_dict(tensors)


def load_pretrained(source, ema=True, device='cpu', **overrides):
    """A net in eval mode from source: a ckpt.pt of train.py (or the out_dir that holds one), or a folder with config.json and
    model.safetensors as MDLM's release has them. ema: the averaged weights of a ckpt.pt rather than the last ones.
    overrides: fields of ModelConfig. net.tokenizer is the arguments for data.get_tokenizer, None where the source does not say;
    net.constants those of the run of train.py that made a ckpt.pt, else empty."""
    path, tokenizer, constants = os.path.expanduser(source), None, {}
    if os.path.isfile(os.path.join(path, 'model.safetensors')):
        with open(os.path.join(path, 'config.json')) as f:
            fields = mdlm_config(json.load(f))
        tokenizer = dict(name='gpt2') if fields['vocab_size'] == 50258 else None
        tensors = {to_ours(name, 'mdlm') or name: tensor
                   for name, tensor in load_file(os.path.join(path, 'model.safetensors')).items() if 'rotary_emb' not in name}
    else:
        path = path if path.endswith('.pt') else os.path.join(path, 'ckpt.pt')
        checkpoint = read_checkpoint(path)
        fields, tensors, constants = checkpoint['model_config'], checkpoint['ema' if ema else 'model'], checkpoint['constants']
        tokenizer = dict(name=checkpoint['tokenizer']['name'], folder=os.path.dirname(path))
    net = DiT(configured(fields, overrides, source))
    load_state(net, tensors, source)
    net.tokenizer, net.constants = tokenizer, constants
    return net.to(device).eval()
