"""A pretended GPU: tensors that say they are on 'cuda' and compute on the CPU, and a count of what
has to wait for a real one."""

import collections
import concurrent.futures
import os
import re
import traceback

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

import model

CUDA = torch.device('cuda', 0)
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class OnGPU(torch.Tensor):
    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), dtype=inner.dtype, device='cpu', dispatch_device=True
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func == torch.Tensor.device.__get__:
            return CUDA
        if func == torch.Tensor.tolist:
            args = (args[0].cpu(),)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:
            return torch.device('meta')  # for C++, which would look for a driver
        raise AssertionError(f'{func} of the pretended GPU outside of PretendedGPU()')


def inner(x):
    return x.inner if isinstance(x, OnGPU) else x


class PretendedGPU(TorchDispatchMode):
    """waits: a Counter of the calls that wait for the GPU. sent: copies to it that do not. reads:
    the lines of the repository that have read from it."""

    def __init__(self):
        super().__init__()
        self.waits = collections.Counter()
        self.sent = 0
        self.reads = []
        self.pinned = []  # kept, so that no other tensor gets their memory

    def is_pinned(self, tensor):
        return any(x.data_ptr() == tensor.data_ptr() for x in self.pinned)

    def wait(self, why):
        self.waits[why] += 1
        if why == 'read':
            ours = [frame for frame in traceback.extract_stack() if os.path.dirname(
                frame.filename) == ROOT]
            self.reads.append(ours[-1].line if ours else '')

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        if func is torch.ops.prim.device.default:
            return torch.device('meta' if isinstance(args[0], OnGPU) else 'cpu')
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        on_gpu = any(isinstance(x, OnGPU) for x in tensors)
        device = kwargs.get('device')
        device = torch.device(device) if device is not None else None
        to_gpu = on_gpu if device is None else device.type in ('cuda', 'meta')
        if device is not None:
            kwargs['device'] = torch.device('cpu')
        if name == 'is_pinned':
            return self.is_pinned(args[0])
        if name == '_pin_memory':
            self.pinned.append(args[0].clone())
            return self.pinned[-1]
        if name == '_to_copy' and on_gpu != to_gpu or name == 'copy_' and len(
            {isinstance(x, OnGPU) for x in args[:2]}
        ) == 2:
            source = args[0] if name == '_to_copy' else args[1]
            on_cpu = args[0] if isinstance(source, OnGPU) else source
            late = kwargs.get('non_blocking') or args[2:] == (True,)
            if not (late and self.is_pinned(on_cpu)):
                self.wait('read' if isinstance(source, OnGPU) else 'copy')
            elif on_cpu is source:
                self.sent += 1
        elif on_gpu:
            indices = [x for x in args[1] if x is not None] if name.startswith('index') and (
                isinstance(args[1], (list, tuple))) else []
            if name in ('_local_scalar_dense', 'nonzero') or any(
                x.dtype in (torch.bool, torch.uint8) for x in indices
            ):
                self.wait('read')
            for x in tensors:
                if not isinstance(x, OnGPU) and x.dim() > 0:
                    self.wait('copy')
        pin = kwargs.pop('pin_memory', False)
        result = func(*tree_map(inner, args), **tree_map(inner, kwargs))
        if name.endswith('_') and isinstance(args[0], OnGPU) or name == 'index_put_':
            return args[0]
        if pin:
            self.pinned.append(result)
        if not to_gpu or name in ('_local_scalar_dense', 'equal'):
            return result
        return tree_map(lambda x: OnGPU(x) if isinstance(x, torch.Tensor) else x, result)


class AtOnce:
    """In place of a ThreadPoolExecutor: threads of their own would not see the pretended GPU."""

    def __init__(self, max_workers):
        pass

    def submit(self, function, *args):
        future = concurrent.futures.Future()
        future.set_result(function(*args))
        return future


def install(monkeypatch):
    """Let a script find one GPU."""
    monkeypatch.setattr(torch.nn.Module, 'to', lambda net, device: moved(net))
    nothing = dict(weights=0, activations=0, total=0)
    monkeypatch.setattr(model, 'memory_needed', lambda *args, **options: dict(nothing))
    monkeypatch.setattr(concurrent.futures, 'ThreadPoolExecutor', AtOnce)
    monkeypatch.setattr(torch.cuda, '_lazy_init', lambda: None)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device=None: 'a pretended GPU')
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda device=None: (10 ** 11, 10 ** 11))
    monkeypatch.setattr(torch.cuda, 'set_device', lambda device: None)
    monkeypatch.setattr(torch.cuda, 'synchronize', lambda device=None: None)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda **options: True)


def moved(net):
    """The net with its weights on the pretended GPU."""
    for module in net.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            moved_p = torch.nn.Parameter(OnGPU(p.detach()), requires_grad=p.requires_grad)
            setattr(module, name, moved_p)
    return net


class Launches(TorchDispatchMode):
    """counts: a Counter of the operations that start a kernel, by name. What makes views or room
    starts none."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aliases = [out.alias_info for out in func._schema.returns]
        view = any(alias is not None and not alias.is_write for alias in aliases)
        out = func(*args, **kwargs or {})
        on_gpu = any(isinstance(x, OnGPU) or isinstance(x, torch.Tensor) and x.is_cuda
                     for x in tree_flatten((args, out))[0])
        name = func.overloadpacket.__name__
        if on_gpu and func.namespace == 'aten' and not view and 'empty' not in name:
            self.counts[name] += 1
        return out


class OneKernel(torch.autograd.Function):
    """Stands for fused attention: its shapes, one kernel forward and three backward."""

    @staticmethod
    def forward(ctx, q, k, v):
        return v.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.clone(), grad.clone(), grad.clone()


def count_launches(n_layer=12, rows=2, length=64, **options):
    """Kernels of a training step (forward, backward, update) and of one evaluation of the trunk, as
    Counters, on the pretended GPU. The net is narrow, which changes no count."""
    config = model.ModelConfig(n_layer=n_layer, n_head=2, n_embd=32, vocab_size=200, mask_id=199,
                               dropout=0.1, **options)
    net = model.DiT(config).train()
    attention = model.attention
    model.attention = lambda q, k, v, *options: OneKernel.apply(q, k, v)
    try:
        with PretendedGPU():
            moved(net)
            parameters = list(net.parameters())
            ema = [OnGPU(p.inner.clone()) for p in parameters]
            optimizer = torch.optim.AdamW(parameters, fused=True)
            x = torch.zeros(rows, length, dtype=torch.int64, device=CUDA)
            t = torch.ones(rows, device=CUDA)
            masked = torch.arange(rows * length // 2, device=CUDA)
            for _ in range(2):  # the first makes the optimizer's state
                with Launches() as forward:
                    loss = model.per_token_loss(net, x, x, t, masked=masked).mean()
                with Launches() as backward:
                    loss.backward()
                with Launches() as update:
                    gradients = [p.grad for p in parameters if p.grad is not None]
                    torch._foreach_norm(gradients)
                    torch._foreach_mul_(gradients, 0.5)
                    optimizer.step()
                    optimizer.zero_grad()
                    with torch.no_grad():
                        torch._foreach_lerp_(ema, parameters, 1e-4)
            net.eval()
            with torch.no_grad(), Launches() as evaluation:
                net.trunk(x[:1], torch.zeros(1, device=CUDA))
    finally:
        model.attention = attention
    return dict(forward=forward.counts, backward=backward.counts, update=update.counts,
                evaluation=evaluation.counts)


def count_compiled(n_layer, rows=2, length=64):
    """What torch.compile leaves of the trunk's operations: calls of kernels in its code for a CPU,
    of a training step (forward and backward) and of an evaluation, as Counters. No dropout, which a
    GPU's kernels contain."""
    from torch._inductor.utils import run_and_get_code

    net = model.DiT(model.ModelConfig(n_layer=n_layer, n_head=2, n_embd=32, vocab_size=200,
                                      mask_id=199, dropout=0.0))
    x, sigma = torch.zeros(rows, length, dtype=torch.int64), torch.zeros(rows)
    trunk = torch.compile(net.trunk)

    def evaluate():
        with torch.no_grad():
            trunk(x[:1], sigma[:1])

    found = {}
    for name, work in dict(step=lambda: trunk(x, sigma).sum().backward(), evaluation=evaluate
                           ).items():
        net.train(name == 'step')
        _, codes = run_and_get_code(work)
        calls = [call for code in codes for call in re.findall(
            r'^ +(?:\w+ = )?(cpp_fused|extern_kernels\.\w+|torch\.ops\.\w+\.\w+)', code, re.M)]
        found[name] = collections.Counter(calls)
    return found


class Bytes(TorchDispatchMode):
    """moved: bytes that kernels read and write, counting tensors of at least `least` elements."""

    def __init__(self, least):
        super().__init__()
        self.least = least
        self.moved = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        aliases = [returned.alias_info for returned in func._schema.returns]
        view = any(alias is not None and not alias.is_write for alias in aliases)
        name = func.overloadpacket.__name__
        if func.namespace == 'aten' and not view and 'empty' not in name:
            sparse = name.startswith(('gather', 'scatter', 'index'))
            written = {argument.name for argument in func._schema.arguments if argument.is_out}
            read = args, {key: x for key, x in (kwargs or {}).items() if key not in written}
            tensors = [x for x in tree_flatten((read, out))[0]
                       if isinstance(x, torch.Tensor) and x.numel() >= self.least]
            self.moved += sum(x.numel() * x.element_size() for x in tensors) * (not sparse)
        return out
