"""What happens to a user's out_dir: nothing in it is lost, and what is in it is used as it is."""

import contextlib
import fcntl
import hashlib
import io
import os
import shutil
import signal
import subprocess
import sys
import types

import pytest
import torch

from conftest import ROOT
from data import TOKENIZERS, get_tokenizer, prepare
from model import DiT, ModelConfig, load_pretrained, put, read_newest, say, write_checkpoint
from sample import tokenizer_of
from test_survival import injected, shown, start, wait_for
from test_train import SMALL, checkpoint, equal, metrics

BPE = [
    *(a for a in SMALL if not a.startswith(('--dataset', '--tokenizer'))),
    '--dataset=text:c.txt', '--tokenizer=bpe-300', '--max_iters=2'
]  # fmt: skip


def files(folder='out'):
    return {name: open(os.path.join(folder, name), 'rb').read() for name in os.listdir(folder)}


# --- one run in an out_dir


def test_a_finished_run_is_not_replaced_unless_asked(mine, here, refused):
    here('train.py', *SMALL)
    before = files()
    source = ['--init_from=other']
    shutil.copytree('out', 'other')
    for options in ([], source, ['--init_from=out']):
        error = refused('train.py', *SMALL, *options)
        assert error.count('\n') == 1
        assert error.startswith('error: out_dir=out holds a run (ckpt.pt, ckpt_best.pt, metrics')
        for way in ('--init_from=resume', 'another --out_dir', '--overwrite=True'):
            assert way in error
    for left in (['ckpt.prev.pt'], ['ckpt_best.pt'], ['ckpt_4.pt'], ['metrics.jsonl']):
        shutil.rmtree('out')
        os.mkdir('out')
        for name in left:
            with open(f'out/{name}', 'wb') as f:
                f.write(before['metrics.jsonl'])
        assert 'holds a run' in refused('train.py', *SMALL)
        assert files() == {name: before['metrics.jsonl'] for name in left}
    with open('out/ckpt_7.pt', 'wb') as f:
        f.write(b'of the run before')
    here('train.py', *SMALL, '--max_iters=3', '--overwrite=True')
    assert set(files()) == {'ckpt.pt', 'ckpt_best.pt', 'metrics.jsonl'}
    assert checkpoint()['iter'] == 3 and sorted(metrics()[0]) == [1, 2, 3]
    here('train.py', *SMALL, '--max_iters=4', '--overwrite=True', '--init_from=resume')
    assert sorted(metrics()[0]) == [1, 2, 3, 4]


def test_auto_begins_anew_where_a_run_was_killed_before_its_first_checkpoint(mine, here, refused):
    os.mkdir('out')
    with open('out/metrics.jsonl', 'w') as f:
        f.write('{"iter": 1, "loss": 2.0}\n')
    assert 'holds a run (metrics.jsonl)' in refused('train.py', *SMALL)
    here('train.py', *SMALL, '--max_iters=2', '--init_from=auto')
    assert sorted(metrics()[0]) == [1, 2]


def test_a_run_killed_before_its_first_ckpt_resumes_from_its_best(mine, here, capsys):
    here('train.py', *SMALL, '--eval_interval=4', '--keep_interval=4')
    whole = checkpoint()['model']
    put('out', 'ckpt_best.pt', 'ckpt_4.pt')
    for name in set(files()) - {'ckpt_best.pt', 'metrics.jsonl'}:
        os.remove(f'out/{name}')
    here('train.py', *SMALL, '--init_from=auto')
    assert 'resuming from out/ckpt_best.pt' in (output := capsys.readouterr().out)
    assert 'resuming at step 4' in output and equal(checkpoint()['model'], whole)


def test_an_out_dir_that_is_locked_is_left_alone(mine, here, refused):
    here('train.py', *SMALL, '--max_iters=2')
    before = files()
    with open('out/.lock', 'w') as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        for options in (['--overwrite=True'], ['--init_from=resume'], ['--init_from=auto']):
            error = refused('train.py', *SMALL, *options)
            assert error.startswith('error: out_dir=out: another training is going on there')
            assert error.count('\n') == 1
        assert files() == before | {'.lock': b''}
    here('train.py', *SMALL, '--init_from=resume')
    assert checkpoint()['iter'] == 10 and '.lock' not in os.listdir('out')


@pytest.mark.slow
def test_a_second_training_in_one_out_dir_is_refused_until_the_first_is_killed(mine, refused, run):
    process = start(*SMALL, '--max_iters=1000000', '--ckpt_interval=5')
    wait_for(lambda: 'step 20:' in shown(), process)
    error = refused('train.py', *SMALL, '--init_from=auto', '--max_iters=2000000')
    assert error.startswith('error: out_dir=out: another training is going on there')
    process.kill()  # the file stays, the lock does not
    process.wait()
    last = read_newest('out')[0]['iter']
    run('train.py', *SMALL, f'--max_iters={last + 2}', '--init_from=resume')
    assert checkpoint()['iter'] == last + 2 and '.lock' not in os.listdir('out')


@pytest.mark.slow
def test_all_processes_of_a_second_training_end(mine, run):
    process = start(*SMALL, '--max_iters=1000000', '--ckpt_interval=5')
    wait_for(lambda: 'step 20:' in shown(), process)
    done = run('train.py', *SMALL, '--overwrite=True', processes=2, status=1)
    assert done.stderr.count('error: out_dir=out: another training is going on there') == 1
    assert 'train.py", line' not in done.stderr  # no traceback
    assert process.poll() is None
    process.kill()
    process.wait()


def test_a_file_system_without_locks_is_gone_on_with(mine, here, monkeypatch):
    def no_locks(file, how):
        raise OSError(38, 'Function not implemented')

    monkeypatch.setattr(fcntl, 'flock', no_locks)
    here('train.py', *SMALL, '--max_iters=1')
    assert checkpoint()['iter'] == 1


def test_resuming_a_finished_run_is_one_line(mine, here, capsys):
    here('train.py', *SMALL)
    before = files()
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        here('train.py', *SMALL, '--init_from=resume', '--sample_at_end=True')
    assert not ended.value.code
    shown = capsys.readouterr().out
    assert shown == 'out is finished: it is at step 10 of 10; a larger --max_iters goes on\n'
    assert files() == before


def test_an_out_dir_that_cannot_be_written_is_one_line_before_training(mine, refused):
    with open('out', 'w') as f:
        f.write('mine')
    for out_dir in ('out', 'out/deeper', '/proc/nowhere', '/dev/null'):
        error = refused('train.py', *SMALL, f'--out_dir={out_dir}')
        assert error.startswith(f'error: out_dir={out_dir} cannot be written to: ')
        assert error.count('\n') == 1
    assert open('out').read() == 'mine'


# --- the tokenizer beside the weights


def test_the_tokenizer_comes_with_a_checkpoint_and_is_checked(mine, here, refused, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr('model.write_checkpoint', lambda *arguments: 1 / 0)
        with pytest.raises(OSError, match='could not be written'):
            here('train.py', *BPE)
    assert os.listdir('out') == ['metrics.jsonl']
    here('train.py', *BPE, '--overwrite=True')
    trained = files()['tokenizer.json']
    assert trained == files('data/c-bpe-300')['tokenizer.json']
    assert checkpoint()['tokenizer']['sha256'] == hashlib.sha256(trained).hexdigest()
    net = load_pretrained('out')
    assert get_tokenizer(**net.tokenizer).meta() == checkpoint()['tokenizer']
    with open('out/tokenizer.json', 'wb') as f:  # of the same size and special ids
        f.write(trained.replace(b'"type": "ByteLevel"', b'"type":  "ByteLevel"', 1))
    with pytest.raises(ValueError, match="'bpe-300' in out has sha256=.*: give its own"):
        get_tokenizer(**net.tokenizer)
    assert refused('sample.py', '--num_samples=1', '--device=cpu').count('in out has sha256=') == 1
    state = checkpoint()
    del state['tokenizer']['sha256']  # as in old checkpoints
    torch.save(state, 'out/ckpt.pt')
    get_tokenizer(**load_pretrained('out').tokenizer)


def test_an_out_dir_that_vanishes_gets_its_tokenizer_again(mine, here):
    vanishing = "_torch.save.__defaults__ and call == 5 and __import__('shutil').rmtree('out')"
    here('train.py', injected(vanishing), *BPE)
    assert set(files()) >= {'ckpt.pt', 'tokenizer.json'}
    get_tokenizer(**load_pretrained('out').tokenizer)


@pytest.mark.parametrize(
    'name, config, problem',
    [
        ('bytes', dict(vocab_size=258, mask_id=257), None),
        ('bytes', dict(vocab_size=258, mask_id=3), "'mask_id': 257}, the net"),
        ('bytes', dict(vocab_size=259, mask_id=257), "'vocab_size': 258, 'mask_id'"),
        ('bytes', dict(vocab_size=258, mask_id=257, pad_id=255), "'pad_id': 256}, the net"),
        ('bytes', dict(vocab_size=257, mask_id=None, causal=True, objective='ar'), None),
        ('text8', dict(vocab_size=35, mask_id=34), "'mask_id': 4}, the net"),
    ],
)
def test_special_ids_are_compared_not_the_number_of_ids_alone(name, config, problem):
    net = DiT(ModelConfig(n_layer=1, n_head=1, n_embd=8, cond_dim=0, **config))
    net.tokenizer = dict(name=name)
    if problem:
        with pytest.raises(ValueError, match=problem):
            tokenizer_of(net)
    else:
        assert tokenizer_of(net).name == name


def test_sampling_and_measuring_compare_the_special_ids(mine, here, refused):
    here('train.py', *SMALL, '--max_iters=1')
    state = checkpoint()
    for key, value in (('mask_id', 7), ('pad_id', 7)):
        torch.save(state | dict(model_config=state['model_config'] | {key: value}), 'out/ckpt.pt')
        for script in ('sample.py', 'eval.py'):
            assert f"'{key}': 7" in refused(script, '--device=cpu')
    torch.save(state | dict(tokenizer=state['tokenizer'] | dict(bos_id=7)), 'out/ckpt.pt')
    for script in ('sample.py', 'eval.py'):
        assert 'the net was trained with bos_id=7' in refused(script, '--device=cpu')


# --- what a run goes on from


def test_a_stopped_fine_tuning_resumes_with_the_printed_command(mine, here, refused, capsys):
    here('train.py', *SMALL, '--out_dir=source', '--dropout=0.0')
    # the shape is that of the source whatever is given
    options = [
        *(a for a in SMALL if not a.startswith('--n_')), '--init_from=source', '--n_layer=3',
        '--mlp=relu', '--eval_interval=5', '--dropout=0.1'
    ]  # fmt: skip
    capsys.readouterr()
    here('train.py', *options, '--out_dir=whole')
    warnings = [line for line in capsys.readouterr().out.splitlines() if 'warning' in line]
    assert warnings == [
        'warning: source tells the shape of the net, not used are '
        "n_layer=3 (it has 1), mlp='relu' (it has 'gelu')"
    ]
    stop = "if call == 13: _os.kill(_os.getpid(), 15)"  # in the fourth of its steps
    handler = signal.getsignal(signal.SIGTERM)
    here('train.py', injected(stop), *options)
    signal.signal(signal.SIGTERM, handler)
    stopped = 'step 4: go on with the same command and --init_from=resume\n'
    assert stopped in capsys.readouterr().out
    shutil.rmtree('source')
    here('train.py', *options, '--init_from=resume')
    resumed = capsys.readouterr().out
    assert 'resuming at step 4\n' in resumed
    assert resumed.count('not used are n_layer=3 (it has 1), mlp=') == 1
    assert equal(checkpoint('whole')['model'], checkpoint()['model'])
    error = refused('train.py', *options, '--init_from=resume', '--n_layer=2', '--max_iters=11')
    assert error.startswith('error: out/ckpt.pt has n_layer=1, the run n_layer=2: they must agree')
    overrides = "--overrides={'mlp': 'swiglu'}"
    error = refused('train.py', *options, '--init_from=resume', overrides, '--max_iters=11')
    assert error.startswith("error: out/ckpt.pt has mlp='gelu', the run mlp='swiglu'")


def test_resuming_needs_no_word_about_the_shape(mine, here, capsys):
    here('train.py', *SMALL)
    capsys.readouterr()
    options = [a for a in SMALL if not a.startswith(('--n_', '--cond_dim'))]
    here('train.py', *options, '--init_from=resume', '--max_iters=12')
    assert 'resuming at step 10, max_iters=12 (was 10)\n' in capsys.readouterr().out
    assert checkpoint()['constants']['n_embd'] == 16 == load_pretrained('out').config.n_embd


def test_a_net_goes_on_with_new_text_and_its_own_tokenizer(mine, here, refused, monkeypatch):
    here('train.py', *BPE, '--out_dir=first', '--block_size=8')
    with open('new.txt', 'w') as f:
        f.write('\n\n'.join(['or not to be, that is the question'] * 200))
    prepare('text:new.txt', 'bpe-300', 'new')
    # ids of the same names from another file
    options = [*BPE, '--dataset=new', '--init_from=first']
    assert 'init_from=first has other ids' in refused('train.py', *options)
    shutil.rmtree('data/new')
    monkeypatch.setattr(
        'data.train_bpe', lambda texts, size, path: shutil.copy('first/tokenizer.json', path)
    )
    prepare('text:new.txt', 'bpe-300', 'new')
    here('train.py', *options, '--n_layer=5')
    config = load_pretrained('out').config
    assert (config.n_layer, config.block_size) == (1, 16)


def test_damage_anywhere_in_the_newest_checkpoint_leads_to_the_one_before(tmp_path):
    folder = str(tmp_path)
    whole = dict(
        model=dict(a=torch.randn(30, 30)), ema=dict(a=torch.randn(9)), optimizer=[],
        tokens_seen=1, best_val_loss=1.0, model_config={}, constants={}, tokenizer={}
    )  # fmt: skip
    write_checkpoint(whole | dict(iter=1), folder, ('ckpt.pt',))
    write_checkpoint(whole | dict(iter=2), folder, ('ckpt.pt',))
    data = (tmp_path / 'ckpt.pt').read_bytes()
    directory = data.index(b'PK\x01\x02')  # the central directory, then the end record
    places = [*range(directory, len(data), 5), *range(len(data) - 22, len(data))]
    broken = [data[:at] for at in (0, 1, 30, len(data) // 2, *places)]
    for at in places:
        broken += [data[:at] + bytes([byte]) + data[at + 1 :] for byte in (data[at] ^ 128, 255)]
    fallen = 0
    for damaged in broken:
        (tmp_path / 'new').write_bytes(damaged)
        os.replace(tmp_path / 'new', tmp_path / 'ckpt.pt')
        read, failed = read_newest(folder)
        assert read['iter'] == (1 if failed else 2)
        fallen += failed is not None
    assert fallen > len(broken) // 2


@pytest.mark.parametrize(
    'content, problem',
    [
        ('{"weight_map": {"a": "mod', 'is not whole'),
        ('[]', 'holds no dict'),
        ('{"metadata": {}}', 'has no weight_map'),
        ('{"weight_map": {"a": "../secret.safetensors"}}', 'names ../secret.safetensors: only'),
        ('{"weight_map": {"a": "/tmp/secret.safetensors"}}', 'names /tmp/secret.safetensors: only'),
        ('{"weight_map": {"a": 7}}', '7 is not a whole .safetensors file'),
    ],
)
def test_an_index_is_whole_and_names_files_of_its_folder(tmp_path, refused, content, problem):
    os.mkdir(tmp_path / 'net')
    (tmp_path / 'net' / 'model.safetensors').write_bytes(b'')
    (tmp_path / 'net' / 'model.safetensors.index.json').write_text(content)
    error = refused('sample.py', '--init_from=net')
    assert problem in error and error.startswith('error: net/') and error.count('\n') == 1


# --- what is printed and logged


def test_nothing_printed_ends_a_run(monkeypatch):
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding='ascii')
    full, closed = open('/dev/full', 'w'), open(os.devnull, 'w')
    closed.close()
    for output in (ascii_only, full, closed, None):
        monkeypatch.setattr(sys, 'stdout', output)
        say('café \ud800')
    assert ascii_only.buffer.getvalue() == b'caf\\xe9 \\ud800\n'
    with contextlib.suppress(OSError):
        full.close()


SAMPLES = [*SMALL, '--max_iters=2', '--sample_at_end=True', '--learning_rate=1e-9']


def test_samples_do_not_end_a_training(mine, here, capsys, monkeypatch):
    def gone(name):
        raise FileNotFoundError('it is gone')

    monkeypatch.setitem(TOKENIZERS, 'bytes', gone)
    here('train.py', *SAMPLES)
    assert 'warning: no samples (FileNotFoundError: it is gone)' in capsys.readouterr().out


@pytest.mark.slow
def test_neither_ascii_nor_a_full_disk_end_a_training(mine, run):
    done = run('train.py', *SAMPLES, PYTHONIOENCODING='ascii', PYTHONUTF8='0')
    # bytes that are no text
    assert done.stdout.count('--- sample') == 4 and '\\ufffd' in done.stdout
    with open('/dev/full', 'w') as full:
        command = [sys.executable, os.path.join(ROOT, 'train.py'), *SAMPLES, '--out_dir=full']
        assert subprocess.run(command, stdout=full, timeout=100).returncode == 0


class Wandb(types.ModuleType):
    """Stands in for wandb: keeps what it is given."""

    def __init__(self):
        super().__init__('wandb')
        self.calls, self.logged = [], []
        self.Table = dict

    def init(self, **settings):
        self.calls.append(settings)
        return types.SimpleNamespace(id=settings['id'] or 'new-id')

    def log(self, line, step):
        self.logged.append((step, line))


def test_a_resumed_run_continues_its_wandb_run_and_sends_samples(mine, here, monkeypatch):
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, 'wandb', wandb)
    options = [*SMALL, '--wandb_project=p', '--sample_at_end=True']
    here('train.py', *options, '--max_iters=2')
    assert checkpoint()['wandb_id'] == 'new-id'
    here('train.py', *SMALL, '--max_iters=3', '--init_from=resume')  # without it for a while
    here('train.py', *options, '--max_iters=4', '--init_from=resume')
    assert [call['id'] for call in wandb.calls] == [None, 'new-id']
    assert all(call['resume'] == 'allow' and call['project'] == 'p' for call in wandb.calls)
    tables = {step: line['samples'] for step, line in wandb.logged if 'samples' in line}
    assert set(tables) == {2, 4} and tables[4]['columns'] == ['step', 'text']
    assert [row[0] for row in tables[4]['data']] == [4] * 4
    assert isinstance(tables[4]['data'][0][1], str)
    here('train.py', *SMALL, '--out_dir=plain', '--max_iters=1')
    assert 'wandb_id' not in checkpoint('plain')


def test_tensorboard_gets_the_numbers_of_the_log(mine, here, monkeypatch):
    numbers = {}

    class SummaryWriter:
        def __init__(self, folder):
            assert folder == 'out'

        def add_scalar(self, key, value, step):
            numbers.setdefault(step, {})[key] = value

        def close(self):
            numbers['closed'] = True

    module = types.ModuleType('torch.utils.tensorboard')
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', module)
    here('train.py', *SMALL, '--max_iters=2', '--tensorboard=True')
    losses, validation = metrics()
    assert numbers.pop('closed')
    assert numbers == {
        step: {key: value for key, value in (line | validation.get(step, {})).items()
               if key != 'iter'}
        for step, line in losses.items()
    }  # fmt: skip
