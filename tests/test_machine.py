"""What a GPU would be asked to do, shown without one: tests/pretended.py."""

import collections
import threading
import time
import weakref

import pytest
import torch
import torch.nn.functional as F

import model
import pretended
from model import CheckpointWriter, DiT, ModelConfig
from sample import generate
from test_train import SMALL, metrics

ROW_SUMS = "loss, scored = loss.cpu(), batch['scored'].cpu()"


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, '_lazy_init', lambda: None)
    return pretended.PretendedGPU()


# --- what is read, and what waits


@pytest.mark.parametrize('objective', ['subs', 'mlm'])
def test_a_training_step_reads_once_from_the_gpu(mine, here, monkeypatch, objective):
    steps, options = 3, [*SMALL, '--max_iters=3', '--eval_iters=1', '--dropout=0']
    options += [f'--objective={objective}']
    here('train.py', *options, '--out_dir=cpu')
    pretended.install(monkeypatch)
    with pretended.PretendedGPU() as gpu:
        here('train.py', *options, '--device=cuda', '--compile=False', '--out_dir=gpu')
    for on_cpu, on_gpu in zip(metrics('cpu')[0].values(), metrics('gpu')[0].values(), strict=True):
        assert on_gpu['loss'] == pytest.approx(on_cpu['loss'], rel=1e-5)  # it did train
    reads = collections.Counter(gpu.reads)
    batches = 4 * (2 if objective == 'mlm' else 1)  # of the one evaluation, and its cross entropy
    assert reads.pop(ROW_SUMS) == 2 * batches
    assert reads.total() <= steps, reads
    assert gpu.waits['copy'] == 0 and gpu.sent >= 4 * 5 * steps


AR = dict(objective='ar', causal=True, cond_dim=0)
SAMPLERS = [
    ('ancestral', dict(), dict(), False),
    ('ancestral', dict(prompt=[[1, 2], [3]], cfg_scale=1.0), dict(time_conditioning=True), False),
    ('ancestral', dict(length=[12, 7]), dict(), False),
    ('analytic', dict(), dict(), False),
    ('fixed', dict(), dict(), False),
    ('semi_ar', dict(length=24), dict(), False),
    ('first_hitting', dict(), dict(), False),
    ('remdm', dict(), dict(), False),
    ('ancestral', dict(), dict(objective='d3pm'), True),
    ('analytic', dict(), dict(objective='sedd', time_conditioning=True), True),
    ('fixed', dict(confidence='top_prob'), dict(), True),
    ('greedy', dict(prompt=[[1, 2], [3]], cfg_scale=1.0), dict(), True),
    ('low_confidence', dict(), dict(), True),
    ('remdm', dict(strategy='conf'), dict(), True),
    ('ar', dict(prompt=[1, 2]), AR, False),
]


@pytest.mark.parametrize('sampler, options, net_options, scored', SAMPLERS)
def test_an_evaluation_sends_twice_and_reads_where_it_scores(
    tiny_net, monkeypatch, gpu, sampler, options, net_options, scored
):
    net = tiny_net(**dict(vocab_size=110, mask_id=109) | net_options)
    options = dict(num_samples=2, length=12, steps=6, sampler=sampler, seed=1) | options
    expected = generate(net, **options)
    evaluations = []
    trunk = net.trunk
    monkeypatch.setattr(net, 'trunk', lambda *a, **k: evaluations.append(1) or trunk(*a, **k))
    with gpu:
        out = generate(pretended.moved(net), **options)
    assert torch.equal(out.tokens, expected.tokens)
    n = len(evaluations)
    # the start goes there; the tokens come back, and whether all logits were numbers
    assert gpu.waits['copy'] <= 2
    assert n <= gpu.sent <= 2 * n
    assert gpu.waits['read'] <= 2 + scored * n, gpu.reads


# --- launches and bytes

US = 1e-6


def test_the_host_keeps_ahead_of_a_gpu_at_12_x_768():
    """PyTorch needs about 10 us for an operation. A step of 32 x 1,024 tokens at half of an H100's
    989 TFLOP/s takes longer than twice that for all of its kernels, so the GPU is never idle."""
    found = {name: n.total() for name, n in pretended.count_launches().items()}
    with torch.device('meta'):
        net = DiT(ModelConfig())
    computing = net.train_flops(32, 1024, 32 * 1024 // 2) / (0.5 * 989e12)
    launches = found['forward'] + found['backward'] + found['update']
    assert 1000 < launches < computing / 2 / (10 * US), found
    # the same kernels for every block: no shape or value adds any
    less = {name: n.total() for name, n in pretended.count_launches(11, 1, 32).items()}
    for name in ('forward', 'evaluation'):
        assert 0 < found[name] - less[name] < found[name] / 11


def test_what_a_cuda_graph_leaves_of_an_evaluation_takes_half_a_millisecond(
    tiny_net, monkeypatch, gpu
):
    """The compiled trunk is one launch; each other kernel of a step takes the host 10 us."""
    net = tiny_net(vocab_size=110, mask_id=109)
    names = {}
    counts, trunk = [], net.trunk

    def one_launch(x, sigma, attention_mask=None):
        counts.append(launches.counts.total())
        names.update(launches.counts)
        h = trunk(x, sigma, attention_mask)
        launches.counts.clear()
        return h

    monkeypatch.setattr(net, 'trunk', one_launch)
    with gpu, pretended.Launches() as launches:
        generate(pretended.moved(net), 1, 12, 12, 'first_hitting')
    print(dict(names))
    between = counts[1:-1]  # from one evaluation to the next
    assert len(set(between)) == 1 and between[0] <= 50


def test_the_chunked_loss_moves_few_times_its_logits(gpu):
    """Passes over (N, V) of two bytes an element: read or written once is 1."""
    N, V, C = 256, 4096, 8
    one = 2 * N * V

    def passes(nll):
        h = torch.randn(N, C, dtype=torch.bfloat16)
        weight, bias = torch.randn(V, C).bfloat16(), torch.zeros(V).bfloat16()
        target = torch.arange(N)
        leaves = [pretended.OnGPU(x).requires_grad_() for x in (h, weight, bias)]
        with pretended.Bytes(N * V // 2) as forward:
            loss = nll(*leaves, pretended.OnGPU(target)).sum()
        with pretended.Bytes(N * V // 2) as backward:
            loss.backward()
        return forward.moved / one, backward.moved / one

    def ours(h, weight, bias, target):
        return model._NLL.apply(h, weight, bias, target, V - 1, True)[0]

    def dense(h, weight, bias, target):
        return F.cross_entropy(F.linear(h, weight, bias).float(), target, reduction='none')

    with gpu:
        forward, backward = passes(ours)
        dense_forward, dense_backward = passes(dense)
    assert 2.9 < forward <= 3.1 and 2.9 < backward <= 3  # 64 of 4,096 columns are read again
    assert dense_forward + dense_backward > 1.4 * (forward + backward)


@pytest.mark.parametrize('bias', [False, True])
def test_the_chunked_loss_of_a_gpu_rounds_less_than_its_logits_do(gpu, bias):
    """Its log-sum-exp comes from a bfloat16 probability, 2^-8 off at most; no bias remains."""
    N, V, C = 512, 3000, 64
    draw = torch.Generator().manual_seed(0)
    h = torch.randn(N, C, generator=draw).bfloat16()
    weight = (0.5 * torch.randn(V, C, generator=draw)).bfloat16()
    bias = torch.randn(V, generator=draw).bfloat16() if bias else None
    logits = F.linear(h, weight, bias)
    logits[:, V - 1] = -1e30
    target = torch.randint(0, V - 1, (N,), generator=draw)
    target[::2] = logits.argmax(dim=1)[::2]
    given = [x if x is None else x.requires_grad_() for x in (h, weight, bias)]
    expected = F.cross_entropy(logits.double(), target, reduction='none')
    with gpu:
        moved = [x if x is None else pretended.OnGPU(x.detach()).requires_grad_() for x in given]
        loss = model._NLL.apply(*moved, pretended.OnGPU(target), V - 1, True)[0]
        loss.sum().backward()
    error = loss.inner.detach() - expected
    assert error.abs().max() < 2 ** -8 and error.mean().abs() < 2e-4
    model._NLL.apply(*given, target, V - 1, True)[0].sum().backward()
    for ours, theirs in zip(moved, given, strict=True):
        if theirs is not None:
            difference = ours.grad.inner.float() - theirs.grad.float()
            assert difference.norm() < 0.02 * theirs.grad.float().norm()


# --- flash-attn, by a stand-in of the package


@pytest.mark.parametrize('padded', [True, False])
def test_flash_attn_computes_nothing_for_padding(tiny_net, monkeypatch, padded):
    from test_packed import flash_attn_varlen_func

    tokens = []

    def counted(q, *arguments, **options):
        tokens.append(len(q))
        return flash_attn_varlen_func(q, *arguments, **options)

    net = tiny_net()
    x = torch.randint(0, 10, (3, 16))
    length = torch.tensor([16, 5, 9]) if padded else torch.full((3,), 16)
    seen = torch.arange(16) < length[:, None]
    weight = torch.randn(3, 16, 16) * seen[:, :, None]
    results = []
    for has_flash in (False, True):
        monkeypatch.setattr(model, 'has_flash', lambda device, has_flash=has_flash: has_flash)
        monkeypatch.setattr(model, 'flash_attn_varlen_func', counted)
        net.train().zero_grad()
        (net.trunk(x, None, seen if padded else None) * weight).sum().backward()
        results.append([p.grad.clone() for p in net.blocks.parameters()])
    assert tokens == ([30] * 2 if padded else [])  # one call a block, of what is not padding
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))
    net.eval().trunk(x, None, seen)
    assert len(tokens) == 2 * padded  # samplers wait for nothing


# --- memory


def test_no_graph_is_left_when_the_next_begins(mine, here, monkeypatch):
    """Its nodes would lie between the tensors of the next, in a heap that keeps what is freed."""
    graphs, left = [], []
    forward = model._NLL.forward

    def noted(ctx, *arguments):
        left.append(sum(graph() is not None for graph in graphs))
        graphs.append(weakref.ref(ctx))
        return forward(ctx, *arguments)

    monkeypatch.setattr(model._NLL, 'forward', noted)
    here('train.py', *SMALL, '--max_iters=3', '--eval_iters=1', '--dropout=0', '--out_dir=out')
    assert len(graphs) > 3 and not any(left)


def test_the_memory_that_is_said_follows_the_range_of_times():
    config = ModelConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=5000, mask_id=4999)
    half, whole = (
        model.memory_needed(config, 16, 64, t_range=(0.0, most))['activations'] for most in (0.5, 1)
    )
    scored = 16 * 64 * (0.5 + 0.5 / 16) / 2  # fewer; each has a softmax in float32
    assert whole - half > 0.9 * scored * 5000 * 4


# --- checkpoints from live tensors


def test_the_update_waits_until_the_file_holds_the_tensors(tmp_path, monkeypatch):
    weight, began, go_on = torch.zeros(1000), threading.Event(), threading.Event()
    save = torch.save

    def slowly(*arguments):
        began.set()
        go_on.wait(10)
        save(*arguments)

    monkeypatch.setattr(torch, 'save', slowly)
    writer = CheckpointWriter(str(tmp_path), torch.device('cpu'), True, None)
    rest = dict(iter=1, tokens_seen=1, best_val_loss=1.0, model_config={}, constants={})
    state = dict(model=dict(w=weight), ema={}, optimizer=[dict(state={0: dict(m=weight)})])
    writer.save(state, ['ckpt.pt'], **rest, tokenizer={})
    assert writer.newest[0]['model']['w'].data_ptr() == weight.data_ptr()  # no copy
    assert began.wait(10)
    threading.Timer(0.2, go_on.set).start()
    started = time.monotonic()
    writer.wait_until_read()
    weight += 1  # the update
    assert time.monotonic() - started > 0.1
    assert writer.wait()
    assert torch.load(tmp_path / 'ckpt.pt')['model']['w'].sum() == 0
    # a save that fails lets the update go on, too

    def full(*arguments):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(torch, 'save', full)
    writer.save(state, ['ckpt.pt'], **rest, tokenizer={})
    writer.wait_until_read()
    assert not writer.wait()
