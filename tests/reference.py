"""
The textbook: dense, slow versions of the loss and the sampler, written from the MDLM paper (arXiv 2406.07524), full
log-probabilities at every position of every step. They are the oracle of the tests and the baseline of tests/bench.py.
"""
import itertools

import torch
import torch.nn.functional as F


def subs_log_probs(net, xt, sigma=None):
    """log p(x0 | xt), (B, L, V), under the SUBS parameterisation (section 3.2.3): the mask has no probability, and what is seen stays."""
    logits = net(xt, sigma)
    logits[:, :, net.config.mask_id] = -torch.inf
    log_probs = logits.log_softmax(dim=-1)
    seen = torch.full_like(log_probs, -torch.inf).scatter(2, xt[:, :, None], 0.0)
    return torch.where((xt == net.config.mask_id)[:, :, None], log_probs, seen)


def subs_nelbo(net, x0, xt, t, schedule):
    """Equation 10, per token (B, L): -log p(x0 | xt) times -alpha'_t / (1 - alpha_t), from dense log-probabilities."""
    log_p = subs_log_probs(net, xt, schedule.sigma(t)).gather(2, x0[:, :, None]).squeeze(2)
    alpha = schedule.alpha(t)
    return -log_p * (schedule.dsigma(t) * alpha / (1 - alpha))[:, None]  # alpha' = -dsigma alpha


def mlm(net, x0, xt, t, schedule):
    """Cross entropy over all ids at the masked positions, (B, L)."""
    nll = F.cross_entropy(net(xt, schedule.sigma(t)).transpose(1, 2), x0, reduction='none')
    return torch.where(xt == net.config.mask_id, nll, 0.0)


def reverse_probs(net, xt, t, s, schedule):
    """q(xs | xt, x0 = p(x0 | xt)), (B, L, V), equation 7, for scalars s < t: (alpha_s - alpha_t) p(x0 | xt) / (1 - alpha_t), the mask
    (1 - alpha_s) / (1 - alpha_t); what is seen stays."""
    alpha_t, alpha_s = schedule.alpha(t), schedule.alpha(s)
    sigma = schedule.conditioning(t).expand(len(xt)).to(torch.float32)
    p = subs_log_probs(net, xt, sigma).exp()
    stay = (1 - alpha_s) / (1 - alpha_t) if s > 0 else torch.zeros(())  # the last step reveals all that is left
    hidden = (xt == net.config.mask_id)[:, :, None]
    q = torch.where(hidden, p * (1 - stay), p)
    q[:, :, net.config.mask_id] = torch.where(xt == net.config.mask_id, stay.to(q.dtype), 0.0)
    return q


def time_grid(steps):
    return torch.arange(steps, -1, -1, dtype=torch.float64) / steps  # 1 -> 0


@torch.no_grad()
def ancestral(net, num_samples, length, steps, schedule, generator=None, only_steps=None, dtype=torch.float64):
    """The full-vocabulary ancestral sampler: every step evaluates everything and draws every position. -> (n, L) ids.
    For timing: only_steps, stop after so many; dtype, that of the draws, float32 in the released code."""
    device = next(net.parameters()).device
    xt, times = torch.full((num_samples, length), net.config.mask_id, device=device), time_grid(steps).float()
    for t, s in list(itertools.pairwise(times))[:only_steps]:
        q = reverse_probs(net, xt, t, s, schedule)
        u = torch.rand(q.shape, generator=generator, dtype=dtype, device=device)
        xt = (q.to(dtype) / -(1 - u).log()).argmax(dim=-1)  # exponential race, exact in float64
    return xt


@torch.no_grad()
def ancestral_distribution(net, length, steps, schedule):
    """The exact distribution of the ancestral sampler's result by enumeration of all V^L states: dict of tuple -> probability."""
    mask_id, vocab_size = net.config.mask_id, net.config.vocab_size
    states = torch.tensor(list(itertools.product(range(vocab_size), repeat=length)))           # (V^L, L)
    p = (states == mask_id).all(dim=1).double()                                                # all masked at t = 1
    for t, s in itertools.pairwise(time_grid(steps)):
        q = reverse_probs(net, states, t, s, schedule).double()                                # (V^L, L, V)
        step = torch.ones(len(states), len(states), dtype=torch.float64)
        for position in range(length):
            step *= q[:, position][:, states[:, position]]                                     # from state -> to state
        p = p @ step
    return {tuple(state.tolist()): float(mass) for state, mass in zip(states, p) if (state != mask_id).all()}
