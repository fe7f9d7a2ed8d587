"""A pretended GPU: tensors that say they are on 'cuda' and compute on the CPU, and a count of what
has to wait for a real one."""

import collections

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

CUDA = torch.device('cuda', 0)


class OnGPU(torch.Tensor):
    called = CUDA  # what the device is called; 'meta' inside of indexing, which asks for a driver

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), dtype=inner.dtype, device='cpu', dispatch_device=True
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        indexing = func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__)
        OnGPU.called = torch.device('meta') if indexing else CUDA
        try:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        finally:
            OnGPU.called = CUDA

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:
            return cls.called
        raise AssertionError(f'{func} of the pretended GPU outside of PretendedGPU()')


def inner(x):
    return x.inner if isinstance(x, OnGPU) else x


class PretendedGPU(TorchDispatchMode):
    """waits: a Counter of the calls that wait for the GPU. sent: copies to it that do not."""

    def __init__(self):
        super().__init__()
        self.waits = collections.Counter()
        self.sent = 0
        self.pinned = []  # kept, so that no other tensor gets their ids

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        if func is torch.ops.prim.device.default:
            return OnGPU.called if isinstance(args[0], OnGPU) else torch.device('cpu')
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        on_gpu = any(isinstance(x, OnGPU) for x in tensors)
        device = kwargs.get('device')
        device = torch.device(device) if device is not None else None
        to_gpu = on_gpu if device is None else device.type in ('cuda', 'meta')
        if device is not None:
            kwargs['device'] = torch.device('cpu')
        if name == 'is_pinned':
            return any(x is args[0] for x in self.pinned)
        if name == '_pin_memory':
            self.pinned.append(args[0].clone())
            return self.pinned[-1]
        if name == '_to_copy' and on_gpu != to_gpu or name == 'copy_' and len(
            {isinstance(x, OnGPU) for x in args[:2]}
        ) == 2:
            source = args[0] if name == '_to_copy' else args[1]
            late = kwargs.get('non_blocking') and any(x is source for x in self.pinned)
            if late and not isinstance(source, OnGPU):
                self.sent += 1
            else:
                self.waits['read' if isinstance(source, OnGPU) else 'copy'] += 1
        elif on_gpu:
            indices = [x for x in args[1] if x is not None] if name.startswith('index') and (
                isinstance(args[1], (list, tuple))) else []
            if name in ('_local_scalar_dense', 'nonzero') or any(
                x.dtype in (torch.bool, torch.uint8) for x in indices
            ):
                self.waits['read'] += 1
            self.waits['copy'] += sum(
                not isinstance(x, OnGPU) and x.dim() > 0 for x in tensors
            )
        result = func(*tree_map(inner, args), **tree_map(inner, kwargs))
        if name.endswith('_') and isinstance(args[0], OnGPU) or name == 'index_put_':
            return args[0]
        if not to_gpu or name in ('_local_scalar_dense', 'equal'):
            return result
        return tree_map(lambda x: OnGPU(x) if isinstance(x, torch.Tensor) else x, result)


def moved(net):
    """The net with its weights on the pretended GPU."""
    for module in net.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(OnGPU(p.detach()), requires_grad=False))
    return net
