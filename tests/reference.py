"""
The textbook: dense, slow versions of the loss and the sampler, written from the MDLM paper
(arXiv 2406.07524) with full log-probabilities at every position of every step. They are the oracle
of the tests and the baseline of tests/bench.py.
"""

import collections
import itertools

import torch
import torch.nn.functional as F


def subs_log_probs(net, xt, sigma=None):
    """log p(x0 | xt), (B, L, V), under SUBS (section 3.2.3): the mask has no probability, and
    tokens that are visible stay."""
    logits = net(xt, sigma)
    logits[:, :, net.config.mask_id] = -torch.inf
    log_probs = logits.log_softmax(dim=-1)
    seen = torch.full_like(log_probs, -torch.inf).scatter(2, xt[:, :, None], 0.0)
    return torch.where((xt == net.config.mask_id)[:, :, None], log_probs, seen)


def subs_nelbo(net, x0, xt, t, schedule):
    """Equation 10, per token (B, L): -log p(x0 | xt) times -alpha'_t / (1 - alpha_t)."""
    log_p = subs_log_probs(net, xt, schedule.sigma(t)).gather(2, x0[:, :, None]).squeeze(2)
    alpha = schedule.alpha(t)
    return -log_p * (schedule.dsigma(t) * alpha / (1 - alpha))[:, None]  # alpha' = -dsigma alpha


def mlm(net, x0, xt, t, schedule):
    """Cross entropy over all ids at the masked positions, (B, L)."""
    nll = F.cross_entropy(net(xt, schedule.sigma(t)).transpose(1, 2), x0, reduction='none')
    return torch.where(xt == net.config.mask_id, nll, 0.0)


def reverse_probs(net, xt, t, s, schedule):
    """Equation 7: q(xs | xt, x0 = p(x0 | xt)), (B, L, V), for scalars s < t.

    A token has (alpha_s - alpha_t) p(x0 | xt) / (1 - alpha_t), the mask
    (1 - alpha_s) / (1 - alpha_t); tokens that are visible stay."""
    alpha_t, alpha_s = schedule.alpha(t), schedule.alpha(s)
    sigma = schedule.conditioning(t).expand(len(xt)).to(torch.float32)
    p = subs_log_probs(net, xt, sigma).exp()
    # the last step reveals all that is left
    stay = (1 - alpha_s) / (1 - alpha_t)
    if s == 0:  # the last step unmasks the rest
        stay = torch.zeros(())
    hidden = (xt == net.config.mask_id)[:, :, None]
    q = torch.where(hidden, p * (1 - stay), p)
    q[:, :, net.config.mask_id] = torch.where(xt == net.config.mask_id, stay.to(q.dtype), 0.0)
    return q


def selective_scan(x, delta, A, B, C, D, bias):
    """The recurrence of model.selective_scan, position after position."""
    dt = F.softplus(delta + bias[:, None, None])
    S = torch.zeros(*x.shape[:2], *A.shape[1:], dtype=x.dtype)  # (G, B, E, N)
    ys = []
    for i in range(x.size(2)):
        decay = torch.exp(dt[:, :, i, :, None] * A[:, None])
        S = decay * S + (dt * x)[:, :, i, :, None] * B[:, :, i, None]
        ys.append((S * C[:, :, i, None]).sum(dim=-1) + D[:, None] * x[:, :, i])
    return torch.stack(ys, dim=2)


def dimamba(weights, x, sigma):
    """The logits of DiMamba by its published names and equations; x (B, L), sigma (B,)."""
    trunk = 'model.bimamba.backbone.'

    def linear(name, x):
        return F.linear(x, weights[f'{name}.weight'], weights.get(f'{name}.bias'))

    def mamba(name, u):
        x, z = linear(f'{name}.in_proj', u).chunk(2, dim=-1)
        taps = weights[f'{name}.conv1d.weight'][:, 0]  # (E, K)
        K, N = taps.size(1), weights[f'{name}.A_log'].size(1)
        padded = F.pad(x, (0, 0, K - 1, 0))
        conv = sum(taps[:, k] * padded[:, k:k + x.size(1)] for k in range(K))
        v = F.silu(conv + weights[f'{name}.conv1d.bias'])
        rank, B, C = linear(f'{name}.x_proj', v).tensor_split((-2 * N, -N), dim=-1)
        args = (
            v, rank @ weights[f'{name}.dt_proj.weight'].T, -weights[f'{name}.A_log'].exp(), B, C,
            weights[f'{name}.D'], weights[f'{name}.dt_proj.bias']
        )
        y = selective_scan(*(tensor[None] for tensor in args))[0]
        return linear(f'{name}.out_proj', y * F.silu(z))

    def modulated(name, h, shift, scale):
        return F.rms_norm(h, h.shape[-1:], weights[f'{name}.weight'], 1e-5) * (1 + scale) + shift

    angle = sigma[:, None] * 10_000.0 ** (-torch.arange(128, dtype=sigma.dtype) / 128)
    c = torch.cat((angle.cos(), angle.sin()), dim=1)
    for i in (0, 2):
        c = F.silu(linear(f'sigma_map.mlp.{i}', c))
    h = weights[f'{trunk}embeddings.word_embeddings.weight'][x]
    layers = [name for name in weights if name.endswith('.norm.weight')]
    for i in range(len(layers)):
        layer = f'{trunk}layers.{i}'
        shift, scale, gate = linear(f'{layer}.adaLN_modulation', c)[:, None].chunk(3, dim=-1)
        v = modulated(f'{layer}.norm', h, shift, scale)
        mixed = mamba(f'{layer}.mixer.mamba_fwd', v)
        mixed = mixed + mamba(f'{layer}.mixer.mamba_rev', v.flip(1)).flip(1)
        h = h + gate * mixed
    shift, scale = linear(f'{trunk}adaLN_modulation_final', c)[:, None].chunk(2, dim=-1)
    return linear('model.lm_head', modulated(f'{trunk}norm_f', h, shift, scale))


def time_grid(steps):
    return torch.arange(steps, -1, -1, dtype=torch.float64) / steps  # 1 -> 0


@torch.no_grad()
def ancestral(
    net, num_samples, length, steps, schedule, generator=None, only_steps=None, dtype=torch.float64
):
    """The full-vocabulary ancestral sampler: every step evaluates and draws every position.
    -> (n, L) ids. For timing: only_steps, stop after so many; dtype, that of the draws, which is
    float32 in the released code."""
    device = next(net.parameters()).device
    xt = torch.full((num_samples, length), net.config.mask_id, device=device)
    times = time_grid(steps).float()
    for t, s in list(itertools.pairwise(times))[:only_steps]:
        q = reverse_probs(net, xt, t, s, schedule)
        u = torch.rand(q.shape, generator=generator, dtype=dtype, device=device)
        xt = (q.to(dtype) / -(1 - u).log()).argmax(dim=-1)  # exponential race, exact in float64
    return xt


@torch.no_grad()
def ancestral_distribution(net, length, steps, schedule):
    """The exact distribution of the ancestral sampler's result, by enumeration of all V^L states:
    dict of tuple -> probability."""
    mask_id, vocab_size = net.config.mask_id, net.config.vocab_size
    states = torch.tensor(list(itertools.product(range(vocab_size), repeat=length)))  # (V^L, L)
    p = (states == mask_id).all(dim=1).double()  # all masked at t = 1
    for t, s in itertools.pairwise(time_grid(steps)):
        q = reverse_probs(net, states, t, s, schedule).double()  # (V^L, L, V)
        step = torch.ones(len(states), len(states), dtype=torch.float64)
        for position in range(length):
            step *= q[:, position][:, states[:, position]]  # from state -> to state
        p = p @ step
    return {
        tuple(state.tolist()): float(mass)
        for state, mass in zip(states, p, strict=True)
        if (state != mask_id).all()
    }


# -----------------------------------------------------------------------------
# the samplers by enumeration: exact distributions on tiny vocabularies, in plain Python. A state is
# a tuple of ids; a rule maps (step, state) to what may come next, (state, probability) pairs


def chain(start, steps, rule):
    """The distribution after `steps` steps, dict of state -> probability."""
    p = {start: 1.0}
    for i in range(steps):
        q = collections.defaultdict(float)
        for state, mass in p.items():
            for following, probability in rule(i, state):
                q[following] += mass * probability
        p = q
    return dict(p)


class Says:
    """What a net says of a state, as lists of V floats for each position.

    belief(state): the softmax over the tokens without the mask, with guidance.
    tokens(state): what tokens are drawn from, with temperature, top_k and top_p too."""

    def __init__(self, net, temperature=1.0, top_k=0, top_p=1.0, cfg_scale=0.0, given=()):
        self.net = net
        self.mask_id = net.config.mask_id
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = top_p
        self.cfg_scale = cfg_scale
        self.given = set(given)
        self.known = {}

    @torch.no_grad()
    def logits(self, state, sigma=None):
        if (state, sigma) not in self.known:
            noise = None if sigma is None else torch.tensor([sigma])
            cond = self.net(torch.tensor([state]), noise)[0].double()
            if self.cfg_scale:
                hidden = [
                    self.mask_id if i in self.given else token for i, token in enumerate(state)
                ]
                un = self.net(torch.tensor([hidden]), noise)[0].double()
                cond = un + (1 + self.cfg_scale) * (cond - un)
            self.known[state, sigma] = cond
        return self.known[state, sigma].clone()

    def belief(self, state, sigma=None):
        logits = self.logits(state, sigma)
        logits[:, self.mask_id] = -torch.inf
        return logits.softmax(dim=-1).tolist()

    def tokens(self, state, sigma=None):
        if self.temperature == 0:
            return [
                [float(v == max(range(len(p)), key=p.__getitem__)) for v in range(len(p))]
                for p in self.belief(state, sigma)
            ]
        logits = self.logits(state, sigma) / self.temperature
        logits[:, self.mask_id] = -torch.inf
        out = []
        for p in logits.softmax(dim=-1).tolist():
            order = sorted(range(len(p)), key=lambda v: -p[v])[: self.top_k or None]
            total = sum(p[v] for v in order)
            running = 0.0
            kept = []
            for v in order:
                running += p[v] / total
                if not kept or running <= self.top_p or self.top_p == 1:
                    kept.append(v)
            total = sum(p[v] for v in kept)
            out.append([p[v] / total if v in kept else 0.0 for v in range(len(p))])
        return out


def independently(state, choices):
    """Every way to change positions independently. choices: position -> [(token, probability)]."""
    for picks in itertools.product(*choices.values()):
        following, mass = list(state), 1.0
        for position, (token, probability) in zip(choices, picks, strict=True):
            following[position], mass = token, mass * probability
        if mass:
            yield tuple(following), mass


def masked_positions(state, mask_id):
    return [i for i, token in enumerate(state) if token == mask_id]


def revealing(state, positions, tokens):
    """Tokens drawn independently at these positions."""
    return independently(state, {i: list(enumerate(tokens[i])) for i in positions})


def reveal_each_with(chance, says, sigma=None, window=None):
    """A rule: each masked position is unmasked with probability chance(i). sigma(i): what the net
    is told; window(i): what it sees."""

    def rule(i, state):
        begin, end = window(i) if window else (0, len(state))
        tokens, c = says.tokens(state[begin:end], sigma and sigma(i)), chance(i)
        return independently(
            state,
            {
                j: [(says.mask_id, 1 - c)]
                + [(v, c * p) for v, p in enumerate(tokens[j - begin]) if p]
                for j in masked_positions(state, says.mask_id)
                if begin <= j < end
            },
        )

    return rule


def subsets(positions, count, weights=None):
    """Sets of `count` positions and their probabilities: uniform, or drawn one after another
    without replacement, by weight."""
    found = collections.defaultdict(float)
    for order in itertools.permutations(positions, count):
        mass, left = 1.0, {i: 1.0 if weights is None else weights[i] for i in positions}
        for i in order:
            mass *= left[i] / sum(left.values())
            del left[i]
        found[frozenset(order)] += mass
    return found.items()
