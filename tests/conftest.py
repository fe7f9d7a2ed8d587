import os
import runpy
import subprocess
import sys

import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SHARED = os.path.join(os.path.dirname(ROOT), 'shared')
sys.path[:0] = [ROOT, os.path.join(ROOT, 'tests')]

os.environ['HF_HUB_OFFLINE'] = '1'  # before anything imports the hub's client

from configurator import one_line_for_bad_input  # noqa: E402
from model import DiT, ModelConfig  # noqa: E402


def pytest_configure(config):
    config.addinivalue_line('markers', 'slow: takes more than a few seconds; -m "not slow" leaves it out')


@pytest.fixture
def shared():
    if not os.path.isdir(SHARED):
        pytest.skip('needs ../shared (test vectors and texts that are not part of the repository)')
    return SHARED


@pytest.fixture
def gpt2_vocabulary(shared, monkeypatch):
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', os.path.join(shared, 'tiktoken'))


@pytest.fixture
def tiny_net():
    """A function that makes a small random net, every weight of it at work."""
    def make(seed=0, scale=0.3, **overrides):
        torch.manual_seed(seed)
        net = DiT(ModelConfig(**dict(block_size=16, vocab_size=11, mask_id=10, n_layer=2, n_head=2, n_embd=16, cond_dim=8) | overrides))
        with torch.no_grad():
            for p in net.parameters():
                p.add_(torch.randn(p.shape) * scale)
        return net.eval()
    return make


@pytest.fixture
def here(monkeypatch):
    """A function that runs a script of the repository in this process and folder, which is quicker; returns its globals, lets errors through."""
    def call(script, *arguments):
        path = os.path.join(ROOT, script)
        monkeypatch.setattr(sys, 'argv', [path, *map(str, arguments)])
        monkeypatch.setattr(sys, 'excepthook', sys.excepthook)  # configure() sets its own
        return runpy.run_path(path, run_name='__main__')
    return call


@pytest.fixture
def refused(here, tmp_path, monkeypatch, capsys):
    """A function that runs a script as `here` does on input that it must refuse, and returns what it would leave on stderr."""
    def call(script, *arguments):
        monkeypatch.chdir(tmp_path)
        with pytest.raises((ValueError, OSError)) as error:
            here(script, *arguments)
        capsys.readouterr()
        one_line_for_bad_input(error.type, error.value, error.tb)
        return capsys.readouterr().err
    return call


@pytest.fixture
def run(tmp_path):
    """A function that runs a script of the repository in an empty folder, as a user would: run('train.py', '--key=value', ...).
    With processes=n under torchrun. Returns the finished process; fails where the exit status is not the expected one."""
    def call(script, *arguments, processes=None, status=0, cwd=tmp_path, threads=1, **environment):
        python = [sys.executable] if processes is None else [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
        env = os.environ | dict(OMP_NUM_THREADS=str(threads), HF_HUB_OFFLINE='1', PYTHONDONTWRITEBYTECODE='1') | environment
        done = subprocess.run([*python, os.path.join(ROOT, script), *map(str, arguments)], cwd=cwd, env=env, capture_output=True, text=True, timeout=600)
        assert done.returncode == status, f'{script} {arguments}: exit status {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}'
        return done
    return call
