import dataclasses
import functools
import json
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import types

import pytest
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
os.environ['HF_HUB_OFFLINE'] = '1'  # before anything imports the hub's client

from configurator import one_line_for_bad_input
from data import TokenRows, prepare
from model import OBJECTIVES, DiT, ModelConfig

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SHARED = os.path.join(os.path.dirname(ROOT), 'shared')


def pytest_configure(config):
    config.addinivalue_line(
        'markers', 'slow: takes more than a few seconds; -m "not slow" leaves it out'
    )


@pytest.fixture
def shared():
    if not os.path.isdir(SHARED):
        pytest.skip('needs ../shared (test vectors and texts that are not part of the repository)')
    return SHARED


@pytest.fixture
def gpt2_vocabulary(shared, monkeypatch):
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', os.path.join(shared, 'tiktoken'))


@pytest.fixture(scope='session')
def vectors():
    """What SMDM's fine-tuning and downstream suite give."""
    path = os.path.join(SHARED, 'fixtures', 'smdm_downstream.json')
    if not os.path.isfile(path):
        pytest.skip('needs ../shared (test vectors that are not part of the repository)')
    with open(path) as f:
        return json.load(f)


@pytest.fixture
def tiny_net():
    """A function that makes a small random net whose every weight matters."""

    def make(seed=0, scale=0.3, **overrides):
        torch.manual_seed(seed)
        shape = dict(
            block_size=16, vocab_size=11, mask_id=10, n_layer=2, n_head=2, n_embd=16, cond_dim=8
        )
        net = DiT(ModelConfig(**shape | overrides))
        with torch.no_grad():
            for p in net.parameters():
                p.add_(torch.randn(p.shape) * scale)
        return net.eval()

    return make


def save_net(net, folder):
    """A net as train.py leaves it in out_dir."""
    torch.save(
        dict(
            model=net.state_dict(),
            ema=net.state_dict(),
            model_config=dataclasses.asdict(net.config),
            tokenizer=dict(name='bytes'),
            constants=dict(dataset='c-bytes', packing='wrap', loss_on_padding=True),
            optimizer=[],
            iter=1,
            tokens_seen=1,
            best_val_loss=1.0,
        ),
        folder / 'ckpt.pt',
    )


def relative(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def write(path, text):
    with open(path, 'w', encoding='utf-8') as f:
        f.write(text)
    return str(path)


def write_words(path):
    """400 short documents of four words."""
    rng = random.Random(0)
    documents = [
        ' '.join(rng.choice(('to', 'be', 'or', 'not')) for _ in range(rng.randint(2, 20)))
        for _ in range(400)
    ]
    with open(path, 'w') as f:
        f.write('\n\n'.join(documents))


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """Words in data/mine, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    write_words('c.txt')
    prepare('text:c.txt', 'bytes', 'mine')


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """A function that makes the validation rows of words in data/c-bytes, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    write_words('c.txt')

    def make(packing='wrap', **options):
        folder = prepare('text:c.txt', 'bytes')
        return TokenRows(folder, 'validation', 16, packing, **options)

    return make


@functools.cache
def compiled(path):
    with open(path, 'rb') as f:
        return compile(f.read(), path, 'exec')


@pytest.fixture
def here(monkeypatch):
    """A function that runs a script of the repository in this process and folder, which is quicker
    than `run`. It returns the script's globals and lets errors through."""

    def call(script, *arguments):
        path = os.path.join(ROOT, script)
        monkeypatch.setattr(sys, 'argv', [path, *map(str, arguments)])
        monkeypatch.setattr(sys, 'excepthook', sys.excepthook)  # configure() sets its own
        for key, record in OBJECTIVES.items():  # a config may replace one
            monkeypatch.setitem(OBJECTIVES, key, record)
        main = types.ModuleType('__main__')
        main.__file__ = path
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, '__main__', main)
            exec(compiled(path), vars(main))
        return vars(main)

    return call


@pytest.fixture
def refused(here, tmp_path, monkeypatch, capsys):
    """A function that runs a script as `here` does, on input that it must refuse, and returns what
    the script would leave on stderr."""

    def call(script, *arguments):
        monkeypatch.chdir(tmp_path)
        with pytest.raises((ValueError, OSError)) as error:
            here(script, *arguments)
        capsys.readouterr()
        one_line_for_bad_input(error.type, error.value, error.tb)
        return capsys.readouterr().err

    return call


ALONE = dict(OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1', PYTHONDONTWRITEBYTECODE='1')


@pytest.fixture(scope='session')
def warm():
    """A function that makes a Fork of warm.py, which runs one script at a time."""
    forks = []

    def end():
        while forks:
            fork = forks.pop()
            if fork.poll() is None:  # left by a test that failed
                fork.kill()
                fork.wait()

    def start(*job):
        end()
        forks.append(Fork(server, *job))
        return forks[0]

    with subprocess.Popen(
        [sys.executable, os.path.join(ROOT, 'tests', 'warm.py')],
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | ALONE | dict(PYTORCH_NVML_BASED_CUDA_CHECK='1'),  # no CUDA before a fork
    ) as server:
        yield start
        end()


class Fork:
    """A script that warm.py runs. It has what the tests use of a subprocess.Popen."""

    def __init__(self, server, script, arguments, cwd, stdout, stderr):
        job = dict(script=script, arguments=arguments, cwd=str(cwd), stdout=stdout, stderr=stderr,
                   environment=os.environ | ALONE)
        server.stdin.write(json.dumps(job).encode() + b'\n')
        self.said = server.stdout
        self.pid = int(self.said.readline())
        self.status = None

    def poll(self, timeout=0):
        if self.status is None and select.select([self.said], [], [], timeout)[0]:
            self.status = os.waitstatus_to_exitcode(int(self.said.readline()))
        return self.status

    def wait(self):
        return self.poll(timeout=None)

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)


def run_warm(warm, script, arguments, cwd):
    """A script run by warm.py, as subprocess.run() would return it."""
    with tempfile.NamedTemporaryFile('r') as stdout, tempfile.NamedTemporaryFile('r') as stderr:
        status = warm(script, arguments, cwd, stdout.name, stderr.name).wait()
        return subprocess.CompletedProcess(arguments, status, stdout.read(), stderr.read())


@pytest.fixture
def run(tmp_path, request):
    """A function that runs a script of the repository as a user would, in an empty folder:
    run('train.py', '--key=value', ...), with processes=n under torchrun. It returns the finished
    process and fails where the exit status is not the expected one. It is a fork of a Python that
    has imported torch, unless told otherwise or started with an environment, torchrun or threads.
    """

    def call(
        script, *arguments, processes=None, status=0, cwd=tmp_path, threads=1, fork=True,
        **environment,
    ):
        script, arguments = os.path.join(ROOT, script), [str(x) for x in arguments]
        if fork and processes is None and threads == 1 and not environment:
            done = run_warm(request.getfixturevalue('warm'), script, arguments, cwd)
        else:
            python = [sys.executable]
            if processes is not None:
                python += [
                    '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}'
                ]
            done = subprocess.run(
                [*python, script, *arguments],
                cwd=cwd,
                env=os.environ | ALONE | dict(OMP_NUM_THREADS=str(threads)) | environment,
                capture_output=True,
                text=True,
                timeout=600,
            )
        output = f'{done.stdout[-3000:]}\n{done.stderr[-3000:]}'
        assert done.returncode == status, f'{script} {arguments}: {done.returncode}\n{output}'
        return done

    return call
