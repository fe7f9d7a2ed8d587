import dataclasses
import math
import os

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import model
import reference
from conftest import SHARED, relative
from model import (
    DiT, ModelConfig, autocast, corrupt, corrupt_batch, get_schedule, load_pretrained, loglinear,
    per_token_loss, pick_device, stratified_times
)

GOLDEN = os.path.join(os.path.dirname(__file__), 'golden')


# --- the network and MDLM's loss against the release (float32: 2e-5 relative is rounding)


@pytest.fixture(params=['golden', 'shared'])
def vectors(request):
    folder = GOLDEN if request.param == 'golden' else os.path.join(SHARED, 'fixtures')
    if not os.path.isdir(folder):
        pytest.skip('needs ../shared/fixtures')
    return os.path.join(folder, 'mdlm_hf'), load_file(
        os.path.join(folder, 'mdlm_expected.safetensors')
    )


@torch.no_grad()
def test_network_matches_the_release(vectors):
    source, expected = vectors
    net, conditioned = load_pretrained(source), load_pretrained(source, time_conditioning=True)
    sigma = loglinear.sigma(expected['t'])
    assert relative(net(expected['xt']), expected['logits_sigma0']) < 2e-5
    # not time-conditioned: fed 0 whatever sigma is
    assert torch.equal(net(expected['xt'], sigma), net(expected['xt']))
    assert relative(conditioned(expected['xt'], sigma), expected['logits_sigma']) < 2e-5
    assert relative(conditioned(expected['xt'], 0 * sigma), expected['logits_sigma0']) < 2e-5


@torch.no_grad()
def test_subs_matches_the_release(vectors):
    source, expected = vectors
    net, conditioned = load_pretrained(source), load_pretrained(source, time_conditioning=True)
    x0 = expected['x0']
    xt = expected['xt']
    t = expected['t']
    log_probs = reference.subs_log_probs(net, xt)
    finite = expected['subs_logprob'] > -1e5
    assert torch.equal(finite, log_probs > -1e5)
    assert relative(log_probs[finite], expected['subs_logprob'][finite]) < 2e-5
    assert relative(per_token_loss(net, x0, xt, t), expected['subs_nelbo_per_token']) < 2e-5
    assert (
        relative(per_token_loss(conditioned, x0, xt, t), expected['subs_tc_nelbo_per_token']) < 2e-5
    )


def test_loglinear_matches_the_release(vectors):
    t, expected = vectors[1]['schedule_t'], vectors[1]
    schedule = get_schedule('loglinear', eps=1e-3)
    assert relative(schedule.sigma(t), expected['sigma_loglinear']) < 2e-6
    assert relative(schedule.dsigma(t), expected['dsigma_loglinear']) < 2e-6
    torch.testing.assert_close(schedule.alpha(t), torch.exp(-schedule.sigma(t)))
    with pytest.raises(ValueError, match="schedule 'cubic' is not known"):
        get_schedule('cubic')


# --- the loss


@pytest.mark.parametrize(
    'shape',
    [
        dict(),
        dict(time_conditioning=True),
        dict(cond_dim=0, norm_bias=True, mlp='relu', head_bias=False),
        dict(mask_id=3),
    ],
)
@pytest.mark.parametrize('objective', ['subs', 'mlm'])
def test_sparse_loss_equals_dense_loss_and_gradients(tiny_net, shape, objective):
    # no dropout: train mode changes nothing
    net = tiny_net(objective=objective, **shape).double().train()
    tokens = [i for i in range(11) if i != net.config.mask_id]
    x0 = torch.tensor(tokens)[torch.randint(10, (5, 16))]
    t = torch.rand(5, dtype=torch.float64) * 0.9 + 0.1
    xt = corrupt(x0, t, net.config.mask_id, loglinear)
    # any gradient by the per-token losses, not one that is the same for all
    weight = torch.randn(5, 16, dtype=torch.float64)
    dense = dict(subs=reference.subs_nelbo, mlm=reference.mlm)[objective]
    results = []
    for loss in (per_token_loss(net, x0, xt, t), dense(net, x0, xt, t, loglinear)):
        net.zero_grad()
        (loss * weight).sum().backward()
        results.append([loss.detach()] + [p.grad.clone() for p in net.parameters()])
    for sparse, full in zip(*results, strict=True):
        assert sparse.dtype == torch.float64
        # sinusoids and rotary angles are float32
        torch.testing.assert_close(sparse, full, rtol=1e-6, atol=1e-6 * full.abs().max().item())
    assert all(
        p.grad.abs().sum() > 0 for name, p in net.named_parameters() if 'sigma_map' not in name
    )


def test_sparse_loss_equals_dense_loss_in_bfloat16_and_over_several_chunks(tiny_net):
    net = tiny_net(vocab_size=9001, mask_id=9000, scale=0.05)
    x0 = torch.randint(9000, (40, 16))
    t = torch.rand(40) * 0.5 + 0.5  # a loss that is summed over several chunks of the vocabulary
    xt = corrupt(x0, t, 9000, loglinear)
    assert (xt == 9000).sum() > 256
    grads = []
    for bfloat16 in (False, True):
        with torch.autocast('cpu', torch.bfloat16, enabled=bfloat16):
            loss = per_token_loss(net, x0, xt, t)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(
            loss,
            reference.subs_nelbo(net, x0, xt, t, loglinear),
            rtol=0.03 if bfloat16 else 1e-4,
            atol=0.3 if bfloat16 else 1e-4,
        )
        net.zero_grad()
        loss.mean().backward()
        grads.append(net.lm_head.weight.grad.clone())
    assert (grads[0] - grads[1]).norm() / grads[0].norm() < 0.02  # bfloat16 has 8 bits


def test_known_masked_positions_change_nothing(tiny_net):
    net = tiny_net()
    x0, t = torch.randint(10, (4, 16)), torch.rand(4) * 0.9 + 0.1
    batch = dict(
        x0=x0,
        maskable=torch.ones(4, 16, dtype=torch.bool),
        scored=torch.ones(4, 16, dtype=torch.bool),
        attention_mask=torch.ones(4, 16, dtype=torch.bool),
    )
    noised = corrupt_batch(batch, t, net.config, loglinear, 1, torch.device('cpu'))
    assert noised['attention_mask'] is None
    loss = per_token_loss(net, x0, noised['xt'], t)
    assert torch.equal(per_token_loss(net, x0, noised['xt'], t, masked=noised['masked']), loss)
    assert torch.equal(loss != 0, noised['xt'] == 10)


def test_padding_that_is_not_attended_is_not_seen(tiny_net):
    net = tiny_net()
    xt, attention_mask = torch.randint(10, (2, 16)), torch.ones(2, 16, dtype=torch.bool)
    attention_mask[:, 12:] = False
    other = xt.clone()
    other[:, 12:] = (other[:, 12:] + 1) % 10
    torch.testing.assert_close(
        net(xt, attention_mask=attention_mask)[:, :12],
        net(other, attention_mask=attention_mask)[:, :12],
    )
    torch.testing.assert_close(net(xt, attention_mask=attention_mask)[:, :12], net(xt[:, :12]))
    assert not torch.allclose(net(xt)[:, :12], net(other)[:, :12])


def test_nelbo_of_a_uniform_model_is_known_in_closed_form():
    # a new net is uniform over the V - 1 ids that are not the mask (its head is zero):
    # E[NELBO] = (1 - eps) log(V - 1) a token
    net = DiT(
        ModelConfig(block_size=32, vocab_size=101, mask_id=100, n_layer=1, n_head=2, n_embd=8)
    )
    n, L = 4000, 32
    x0 = torch.randint(100, (n, L))
    t = stratified_times(torch.rand((), dtype=torch.float64), torch.arange(n), n)
    rows = per_token_loss(net, x0, corrupt(x0, t, 100, loglinear), t).detach().sum(dim=1)
    assert abs(rows.mean() - (1 - 1e-3) * L * math.log(100)) < 4 * rows.std() / math.sqrt(n)


def test_corrupt_masks_with_probability_one_minus_alpha():
    x0 = torch.zeros(200_000, 1, dtype=torch.int64)
    for t in (0.05, 0.5, 1.0):
        found = (corrupt(x0, torch.full((200_000,), t), 1, loglinear) == 1).double().mean().item()
        expected = 0.999 * t
        assert abs(found - expected) < 4.5 * math.sqrt(expected * (1 - expected) / 200_000) + 1e-9
    maskable = torch.rand(200_000, 1) < 0.5
    assert (corrupt(x0, torch.ones(200_000), 1, loglinear, maskable=maskable)[~maskable] == 0).all()


def test_corrupt_is_a_function_of_its_generator():
    x0, t = torch.zeros(8, 8, dtype=torch.int64), torch.full((8,), 0.5)
    a, b, c = (
        corrupt(x0, t, 1, loglinear, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize('n', [1, 2, 7, 512])
def test_stratified_times_hold_one_point_in_every_stratum(n):
    t = stratified_times(torch.tensor(0.77, dtype=torch.float64), torch.arange(n), n)
    assert t.min() >= 1e-3 and t.max() <= 1
    strata = (((t.double() - 1e-3) / (1 - 1e-3) - 0.77) * n).round().long() % n
    assert sorted(strata.tolist()) == list(range(n))
    gaps = t.sort().values.diff()
    torch.testing.assert_close(gaps, torch.full_like(gaps, (1 - 1e-3) / n), rtol=1e-3, atol=1e-6)


# --- the net's settings


def test_new_nets_start_as_their_family():
    mdlm = DiT(ModelConfig(vocab_size=50, mask_id=49, n_layer=2, n_head=2, n_embd=16))
    assert (mdlm(torch.randint(50, (2, 8))) == 0).all()  # head zero
    assert all((p == 0).all() for name, p in mdlm.named_parameters() if 'adaLN' in name)
    xlm = DiT(
        ModelConfig(
            vocab_size=50, mask_id=49, pad_id=47, n_layer=2, n_head=2, n_embd=64, cond_dim=0,
            norm_bias=True, mlp='relu', head_bias=False, init='xlm'
        )
    )
    assert (xlm.wte.weight[47] == 0).all() and abs(xlm.wte.weight[:47].std() - 1) < 0.05
    xlm(torch.full((1, 4), 47)).sum().backward()
    assert (xlm.wte.weight.grad[47] == 0).all()  # and untrained
    assert xlm.lm_head.bias is None and xlm.norm_f.bias is not None and xlm.sigma_map is None


def test_default_config_is_the_published_170M_model():
    with torch.device('meta'):
        net = DiT(ModelConfig())
    assert round(net.num_params() / 1e6) == 170


def test_dropout_is_on_in_training_only(tiny_net):
    for key in ('dropout', 'attn_dropout'):
        net = tiny_net(**{key: 0.5})
        x = torch.randint(10, (2, 16))
        assert torch.equal(net(x), net(x))
        net.train()
        assert not torch.equal(net(x), net(x))


def test_attention_looks_both_ways_and_knows_positions(tiny_net):
    net, x = tiny_net(), torch.randint(10, (1, 16))
    changed = x.clone()
    changed[0, 8] = (x[0, 8] + 1) % 10
    # every position, before and after
    assert ((net(x) - net(changed)).abs().amax(dim=-1) > 1e-6).all()
    assert not torch.allclose(net(x.flip(1)), net(x).flip(1), atol=1e-3)


@pytest.mark.parametrize('mlp', ['gelu', 'swiglu'])
def test_flops_are_those_of_the_matrices(tiny_net, mlp):
    net = tiny_net(mlp=mlp)
    matrices = sum(
        p.numel()
        for name, p in net.blocks.named_parameters()
        if p.dim() == 2 and 'adaLN' not in name
    )
    assert net.train_flops(3, 16, 20) == 6 * (
        3 * 16 * (matrices + 2 * net.config.n_layer * 16 * net.config.n_embd)
        + 20 * net.lm_head.weight.numel()
    )


# plain products, one token against a cache, torch's own kernel
@pytest.mark.parametrize('L, K', [(48, 48), (1, 48), (1100, 1100)])
@pytest.mark.parametrize('masked', [False, True])
def test_attention_in_bfloat16_is_attention(L, K, masked):
    q = torch.randn(2, 3, L, 8)
    k = torch.randn(2, 3, K, 8)
    v = torch.randn(2, 3, K, 8)
    seen = torch.rand(2, 1, 1, K) < 0.5 if masked else None
    q = 2 * q  # scores of some size
    scores = q.double() @ k.double().transpose(2, 3) / 8**0.5
    if seen is not None:
        scores = scores.masked_fill(~seen, -math.inf)
    exact = scores.softmax(dim=3) @ v.double()
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.02)):
        found = model.attention(*(x.to(dtype) for x in (q, k, v)), attn_mask=seen)
        assert found.dtype == dtype and (found.double() - exact).norm() < tolerance * exact.norm()


def test_flash_attn_is_used_on_a_gpu_where_it_can_be(monkeypatch):
    class OnGPU(torch.Tensor):
        device = torch.device('cuda')

    def flash_attn_func(q, k, v, dropout_p, causal):  # (B, L, H, C/H), as in the package
        calls.append((dropout_p, causal))
        return torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal
        ).transpose(1, 2)

    calls, qkv = [], torch.randn(3, 2, 3, 16, 8, dtype=torch.bfloat16)
    q, k, v = (x.as_subclass(OnGPU) for x in qkv)
    monkeypatch.setattr(model, 'flash_attn_func', flash_attn_func)
    for causal in (False, True):
        expected = torch.nn.functional.scaled_dot_product_attention(*qkv, is_causal=causal)
        torch.testing.assert_close(
            model.attention(q, k, v, p=0.1, is_causal=causal).as_subclass(torch.Tensor),
            expected,
            rtol=0.02,
            atol=0.02,
        )
    assert calls == [(0.1, False), (0.1, True)]
    model.attention(q, k, v, attn_mask=torch.ones(2, 1, 1, 16, dtype=torch.bool))
    model.attention(q.float(), k.float(), v.float())
    model.attention(*qkv)
    assert len(calls) == 2  # it knows neither masks nor float32


def test_dropout_on_a_cpu_keeps_what_it_says(tiny_net):
    x = torch.ones(1001, 999, requires_grad=True)
    for p in (0.1, 0.5):
        torch.manual_seed(1)
        y, x.grad = model.dropout(x, p), None
        y.sum().backward()
        n, kept = x.numel(), (y != 0).double()
        assert torch.equal(x.grad, y.detach())
        assert len(y.unique()) == 2
        assert abs(y.max() * (1 - p) - 1) < 2e-5
        assert abs(kept.mean() - (1 - p)) < 4 * (p * (1 - p) / n) ** 0.5  # standard errors
        for step in (1, 2, 3, 4):  # four elements share a draw of 64 bits
            both = (kept.flatten()[:-step] * kept.flatten()[step:]).mean()
            assert abs(both - (1 - p) ** 2) < 4 / n**0.5
        torch.manual_seed(1)
        assert torch.equal(model.dropout(x, p), y)
    assert (model.dropout(x, 1 - 1e-9) != 0).float().mean() < 1e-4  # next to nothing


def test_nothing_larger_than_the_masked_positions_reaches_the_vocabulary(tiny_net):
    net, sizes = tiny_net(vocab_size=9001, mask_id=9000), []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(
                x.numel()
                for x in (out if isinstance(out, (tuple, list)) else [out])
                if isinstance(x, torch.Tensor)
            )
            return out

    x0 = torch.randint(9000, (64, 16))
    xt = x0.clone()
    xt[:, :3] = 9000
    with Sizes():
        per_token_loss(net, x0, xt, torch.full((64,), 0.2)).sum().backward()
    assert max(sizes) <= 64 * 3 * 9001  # of 64 * 16 * 9001


@pytest.mark.parametrize(
    'vocab_size, N', [(9001, 3), (9001, 4500), (2049, 5000), (513, 5000), (2, 3)]
)
@pytest.mark.parametrize('bfloat16', [False, True])
def test_chunks_of_the_vocabulary_add_up_to_the_cross_entropy(tiny_net, vocab_size, N, bfloat16):
    net = tiny_net(vocab_size=vocab_size, mask_id=vocab_size - 1, scale=0.5)
    h = torch.randn(N, 16)
    target = torch.randint(vocab_size - 1, (N,))
    weight = torch.rand(N)
    # all but certain of the target
    h[::2] = 30 * torch.nn.functional.normalize(net.lm_head.weight[target[::2]].detach(), dim=1)
    found = []
    for ours in (True, False):
        h_ = h.clone().requires_grad_()
        with torch.autocast('cpu', torch.bfloat16, enabled=bfloat16 and ours):
            if ours:
                nll = net.nll(h_, target, vocab_size - 1)
            else:
                mask_id = torch.tensor(vocab_size - 1)
                logits = net.head(h_).index_fill(1, mask_id, -torch.inf)
                nll = torch.nn.functional.cross_entropy(logits, target, reduction='none')
        net.zero_grad()
        (nll * weight).sum().backward()
        found.append([nll.detach(), h_.grad, net.lm_head.weight.grad, net.lm_head.bias.grad])
    for ours, dense in zip(*found, strict=True):
        assert ours.isfinite().all()
        assert (ours - dense).norm() <= (0.03 if bfloat16 else 2e-4) * dense.norm() + 1e-6


@pytest.mark.parametrize(
    'bad, message',
    [
        (dict(n_embd=20, n_head=3), 'n_embd=20 over n_head=3'),
        (dict(mlp='tanh'), "mlp='tanh' is not known"),
        (dict(dropout=1.0), 'dropout=1.0'),
        (dict(cond_dim=0, time_conditioning=True), 'cond_dim=0'),
        (dict(mask_id=11), 'mask_id=11'),
        (dict(n_layer=0), 'n_layer=0'),
        (dict(objective='gan'), "objective='gan' is not known"),
    ],
)
def test_impossible_configs_are_refused(tiny_net, bad, message):
    with pytest.raises(ValueError, match=message):
        tiny_net(**bad)


def test_time_conditioned_nets_ask_for_sigma(tiny_net):
    with pytest.raises(ValueError, match='give sigma'):
        tiny_net(time_conditioning=True)(torch.zeros(1, 4, dtype=torch.int64))


def test_devices_and_dtypes_that_are_not_there_are_refused():
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device='cuda'"):
            pick_device('cuda')
    with pytest.raises(ValueError, match='is not known'):
        pick_device('tpu')
    with pytest.raises(ValueError, match='float16'):
        autocast(torch.device('cpu'), 'float16')


# --- checkpoints


def save_own(net, path, **changes):
    torch.save(
        dict(
            model=net.state_dict(),
            ema={k: v + 1 for k, v in net.state_dict().items()},
            model_config=dataclasses.asdict(net.config),
            constants={},
            tokenizer=dict(name='bytes'),
            optimizer=[],
            iter=1,
            tokens_seen=1,
            best_val_loss=1.0,
        )
        | changes,
        path,
    )


def test_load_pretrained_reads_our_checkpoints(tiny_net, tmp_path):
    net = tiny_net()
    save_own(net, tmp_path / 'ckpt.pt')
    for source in (tmp_path, tmp_path / 'ckpt.pt'):
        last = load_pretrained(str(source), ema=False, dropout=0.25)
        assert torch.equal(last.wte.weight, net.wte.weight)
        assert last.config.dropout == 0.25
        assert not last.training
        # the average by default
        assert torch.equal(load_pretrained(str(source)).wte.weight, net.wte.weight + 1)


def test_broken_and_foreign_checkpoints_are_refused(tiny_net, tmp_path):
    path = tmp_path / 'ckpt.pt'
    with pytest.raises(FileNotFoundError, match='no checkpoint at'):
        load_pretrained(str(tmp_path))
    save_own(tiny_net(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match='truncated or damaged'):
        load_pretrained(str(path))
    flipped = bytearray(whole)
    where = whole.index(tiny_net().wte.weight.detach().numpy().tobytes()) + 5
    flipped[where] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(ValueError, match='truncated or damaged'):
        load_pretrained(str(path))
    torch.save(dict(state_dict={}), path)
    with pytest.raises(ValueError, match='is not a checkpoint of train.py'):
        load_pretrained(str(path))
    save_own(tiny_net(), path)
    with pytest.raises(
        ValueError, match=r'attn_qkv.weight has shape|wte.weight has shape|has shape'
    ):
        load_pretrained(str(path), n_embd=32)
    with pytest.raises(ValueError, match='lacks blocks.2'):
        load_pretrained(str(path), n_layer=3)
    with pytest.raises(ValueError, match="'n_layers' is not a field"):
        load_pretrained(str(path), n_layers=3)


def test_a_checkpoint_with_code_in_it_does_nothing(tmp_path):
    class Attack:
        def __reduce__(self):
            return open, (str(tmp_path / 'pwned'), 'w')

    torch.save(dict(model=Attack(), ema={}, model_config={}), tmp_path / 'ckpt.pt')
    with pytest.raises(ValueError, match='is not a checkpoint of train.py'):
        load_pretrained(str(tmp_path))
    assert not (tmp_path / 'pwned').exists()
