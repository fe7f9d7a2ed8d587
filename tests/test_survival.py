"""Training that survives. The faults here are real: processes are killed, disks are full. Those of
the arithmetic are put in by config files, which are Python. What happens when something breaks:

- Killed at any moment, also inside a save: the last whole checkpoint is found, and the rest of the
  run equals the uninterrupted one to the bit on one CPU (test_killed_twenty_times_...,
  test_names_come_before_...).
- SIGTERM, SIGUSR1, Ctrl-C: the step is finished, a checkpoint is written, the exit status is 0.
  Another signal, more than 3 s later, ends the run at once (test_a_signal_ends_the_run_...,
  test_torchrun_passes_a_signal_...).
- The newest checkpoint is damaged or gone: a warning is printed, the one before it (ckpt.prev.pt)
  is used, and the damaged one is kept as ckpt.bad.pt. A disk that cannot be read ends the run
  instead (test_a_broken_newest_checkpoint_...).
- The disk is full, the log's too: a warning is printed, training goes on and tries again at the
  next checkpoint. The exit status is 1 if the last one could not be written (test_a_full_disk_...).
- out_dir is removed: it is made again with the next checkpoint (test_an_out_dir_that_vanishes_...).
- A non-finite loss or gradient, on any process: no process makes the update; it is counted and a
  warning is printed (test_bad_numbers_on_one_process_...).
- max_bad_steps of them in a row: a checkpoint of the last good weights, exit status 1
  (test_only_bad_numbers_...).
- A gradient norm ten times the usual: a warning is printed (test_a_jump_of_the_gradient_...).
- CUDA is out of memory: one line says which constant to lower (test_out_of_memory_..., raised by
  hand).
- A process dies: torchrun ends the job within a minute (test_a_process_that_dies_...).
- A constant that all processes find wrong: one line, from the first process
  (test_what_all_processes_find_wrong_...).
- Another number of processes on resume: the same run, up to the order of additions
  (test_one_process_then_two_..., test_sharing_the_net_out_...).
"""

import glob
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from conftest import ROOT
from test_train import SMALL, checkpoint, equal, metrics

# its checkpoint takes a while to write
WIDE = [*SMALL, '--n_layer=4', '--n_embd=192', '--n_head=4', '--block_size=8']


def start(*arguments, processes=None, shell=''):
    """train.py in the background, its output in out.txt."""
    python = [sys.executable]
    if processes is not None:
        python += ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
    command = [*python, os.path.join(ROOT, 'train.py'), *arguments]
    if shell:
        command = ['bash', '-c', f'{shell}; exec "$@"', 'bash', *command]
    with open('out.txt', 'w') as f:
        return subprocess.Popen(
            command,
            stdout=f,
            stderr=subprocess.STDOUT,
            env=os.environ | dict(OMP_NUM_THREADS='1', PYTHONDONTWRITEBYTECODE='1'),
        )


def shown():
    with open('out.txt') as f:
        return f.read()


def wait_for(condition, process, seconds=120):
    until = time.time() + seconds
    while not condition():
        assert process.poll() is None and time.time() < until, shown()
        time.sleep(0.0005)


def injected(code):
    """A config file that runs code after each training loss. `call` counts from 1, `rank` is this
    process's, `loss` can be changed."""
    with open('fault.py', 'w') as f:
        f.write(f"""import dataclasses as _dataclasses
import functools as _functools
import os as _os
import torch as _torch
import model as _model
from torch._subclasses.fake_tensor import FakeTensor as _FakeTensor
_subs, _calls = _model.OBJECTIVES['subs'], []
@_functools.wraps(_subs.loss)
def _faulty(*arguments, **options):
    loss = _subs.loss(*arguments, **options)
    if not _torch.is_grad_enabled() or isinstance(loss, _FakeTensor):  # which measures memory
        return loss
    _calls.append(1)
    call, rank = len(_calls), int(_os.environ.get('RANK', 0))
    {code}
    return loss
_model.OBJECTIVES['subs'] = _dataclasses.replace(_subs, loss=_faulty)
""")
    return 'fault.py'


# --- kills


@pytest.mark.slow
def test_killed_twenty_times_it_ends_with_the_weights_of_the_uninterrupted_run(mine, run, warm):
    options = [
        *WIDE, '--max_iters=600', '--ckpt_interval=4', '--eval_interval=50', '--eval_iters=1',
        '--global_batch_size=4', '--lr_schedule=cosine'
    ]
    run('train.py', *options, '--out_dir=whole')
    rng, inside = random.Random(0), 0
    for kill in range(20):
        arguments = [*options, '--out_dir=parts', '--init_from=auto']
        open('out.txt', 'w').close()
        process = warm(os.path.join(ROOT, 'train.py'), arguments, os.getcwd(), 'out.txt', 'out.txt')
        wait_for(lambda: '\nstep ' in shown(), process)
        if not kill % 2:  # something is gained each time, on a busy machine too
            wait_for(lambda: os.path.exists('parts/ckpt.pt'), process)
        time.sleep(rng.random() * 0.3)
        if kill % 2:  # in the middle of a save
            wait_for(
                lambda: os.path.exists('parts/ckpt.pt.unfinished') or '600: validation' in shown(),
                process,
            )
            time.sleep(rng.random() * 0.01)
        process.kill()
        process.wait()
        inside += os.path.exists('parts/ckpt.pt.unfinished')
        assert not os.path.exists('parts/ckpt.pt') or checkpoint('parts')['iter'] > 0
    assert inside >= 3 and checkpoint('parts')['iter'] < 600
    run('train.py', *options, '--out_dir=parts', '--init_from=auto')
    assert not glob.glob('parts/*.unfinished')
    for key in ('model', 'ema', 'optimizer', 'iter', 'tokens_seen', 'best_val_loss'):
        assert equal(checkpoint('whole')[key], checkpoint('parts')[key]), key
    assert sorted(metrics('parts')[0]) == list(range(1, 601))


@pytest.mark.parametrize(
    'number',
    [
        signal.SIGTERM,
        *(
            pytest.param(number, marks=pytest.mark.slow)
            for number in (signal.SIGINT, signal.SIGUSR1)
        ),
    ],
)
def test_a_signal_ends_the_run_with_a_checkpoint(mine, run, number):
    process = start(*SMALL, '--max_iters=1000000')
    wait_for(lambda: 'step 5:' in shown(), process)
    process.send_signal(number)
    assert process.wait(60) == 0
    step = checkpoint()['iter']
    assert (
        f'stopped by a signal after step {step}: go on with the same command and --init_from=resume'
        in shown()
    )
    assert step >= 5
    run('train.py', *SMALL, f'--max_iters={step + 3}', '--init_from=resume')
    assert checkpoint()['iter'] == step + 3 and sorted(metrics()[0]) == list(range(1, step + 4))


@pytest.mark.slow
@pytest.mark.parametrize('whole_group', [False, True])
def test_torchrun_passes_a_signal_to_all_and_the_run_goes_on_from_there(mine, run, whole_group):
    process = start(*SMALL, '--max_iters=1000000', processes=2)
    wait_for(lambda: 'step 5:' in shown(), process)
    children = open(f'/proc/{process.pid}/task/{process.pid}/children').read().split()
    # then the workers get two
    for pid in [process.pid, *map(int, children)] if whole_group else [process.pid]:
        os.kill(pid, signal.SIGTERM)
    process.wait(60)
    step = checkpoint()['iter']
    assert shown().count('stopped by a signal after step') == 1
    run('train.py', *SMALL, f'--max_iters={step + 2}', '--init_from=auto', processes=2)
    assert checkpoint()['iter'] == step + 2


@pytest.mark.slow
def test_a_process_that_dies_takes_the_job_down(mine):
    began = time.time()
    process = start(
        injected('if rank == 1 and call == 9: _os._exit(7)'),
        *SMALL,
        '--max_iters=1000000',
        processes=2,
    )
    assert process.wait(90) != 0 and time.time() - began < 80


@pytest.mark.slow
def test_one_process_then_two_are_one_run(mine, run):
    run('train.py', *SMALL, '--out_dir=whole')
    run('train.py', *SMALL, '--out_dir=parts', '--max_iters=5')
    run('train.py', *SMALL, '--out_dir=parts', '--init_from=resume', processes=2)
    for step, line in metrics('whole')[0].items():
        assert metrics('parts')[0][step]['loss'] == pytest.approx(line['loss'], rel=1e-5)
    for name, p in checkpoint('whole')['model'].items():
        torch.testing.assert_close(checkpoint('parts')['model'][name], p, rtol=1e-3, atol=1e-5)


# --- checkpoints and disks


def test_a_broken_newest_checkpoint_is_passed_over(mine, here, capsys):
    options = [*SMALL, '--ckpt_interval=4']
    here('train.py', *options, '--out_dir=whole')
    here('train.py', *options, '--out_dir=parts')
    assert checkpoint('parts')['iter'] == 10 and checkpoint('parts', 'ckpt.prev.pt')['iter'] == 8
    with open('parts/ckpt.pt', 'r+b') as f:  # one bit
        f.seek(os.path.getsize('parts/ckpt.pt') // 2)
        byte = f.read(1)[0]
        f.seek(-1, 1)
        f.write(bytes([byte ^ 4]))
    capsys.readouterr()
    here('train.py', *options, '--out_dir=parts', '--init_from=resume')
    assert 'warning: parts/ckpt.pt is truncated or damaged' in (output := capsys.readouterr().out)
    assert 'resuming at step 8' in output
    assert equal(checkpoint('whole')['model'], checkpoint('parts')['model'])
    os.remove('parts/ckpt.pt')
    here('train.py', *options, '--out_dir=parts', '--init_from=resume')
    assert equal(checkpoint('whole')['model'], checkpoint('parts')['model'])


def test_a_full_disk_is_told_and_the_run_goes_on(mine):
    # blocks of 1,024 bytes: the bins fit, a checkpoint does not
    process = start(*SMALL, '--ckpt_interval=4', shell='ulimit -f 20')
    assert process.wait(60) == 1
    output = shown()
    assert output.count('warning: the checkpoint of step') >= 3
    assert 'File too large' in output
    assert 'step 10: loss' in output
    assert 'error: the last checkpoint could not be written to out' in output.splitlines()[-1]
    assert 'Traceback' not in output
    assert not glob.glob('out/*.unfinished') and not os.path.exists('out/ckpt.pt')


@pytest.mark.slow
def test_a_full_disk_under_the_output_and_a_net_that_is_shared_out(mine):
    # out.txt and metrics.jsonl are full soon
    process = start(*SMALL, '--max_iters=300', shell='ulimit -f 4')
    assert process.wait(60) == 1 and 'Traceback' not in shown()
    options = [*SMALL, '--max_iters=3', '--shard=True', '--out_dir=shared']
    process = start(*options, processes=2, shell='ulimit -f 20')
    assert process.wait(120) == 1 and 'the last checkpoint could not be written' in shown()


def test_names_come_before_the_one_that_counts(tmp_path, monkeypatch):
    from model import put, read_newest, write_checkpoint

    whole = dict(
        model={}, ema={}, optimizer=[], tokens_seen=1, best_val_loss=1.0, model_config={},
        constants={}, tokenizer={}
    )
    write_checkpoint(whole | dict(iter=1), str(tmp_path), ('ckpt.pt',))
    write_checkpoint(whole | dict(iter=2), str(tmp_path), ('ckpt.pt', 'ckpt_best.pt', 'ckpt_2.pt'))
    assert sorted(os.listdir(tmp_path)) == ['ckpt.prev.pt', 'ckpt.pt', 'ckpt_2.pt', 'ckpt_best.pt']
    replace = os.replace
    for moment in range(1, 5):  # killed before each renaming
        moves = []

        def killed(a, b, moves=moves, moment=moment):
            moves.append(b)
            if len(moves) == moment:
                raise KeyboardInterrupt
            replace(a, b)

        monkeypatch.setattr(os, 'replace', killed)
        with pytest.raises(KeyboardInterrupt):
            write_checkpoint(
                whole | dict(iter=9), str(tmp_path), ('ckpt.pt', 'ckpt_best.pt', 'ckpt_9.pt')
            )
        monkeypatch.setattr(os, 'replace', replace)
        assert read_newest(str(tmp_path)) == (whole | dict(iter=2), None)
        assert checkpoint(tmp_path, 'ckpt.prev.pt')['iter'] == (1 if moment < 4 else 2)
    put(str(tmp_path), 'ckpt.prev.pt', 'ckpt.pt')
    put(str(tmp_path), 'ckpt.prev.pt', 'ckpt.pt')
    whole_file = (tmp_path / 'ckpt.pt').read_bytes()
    # a flipped bit is seen, or does not matter
    for at in random.Random(0).sample(range(len(whole_file)), 60):
        (tmp_path / 'ckpt.new').write_bytes(
            whole_file[:at] + bytes([whole_file[at] ^ 16]) + whole_file[at + 1 :]
        )
        os.replace(tmp_path / 'ckpt.new', tmp_path / 'ckpt.pt')
        assert read_newest(str(tmp_path))[0]['iter'] == 2
    # a disk that cannot be read just now is not a damaged file
    with monkeypatch.context() as patch:
        patch.setattr(
            'zipfile.ZipFile', lambda path: (_ for _ in ()).throw(OSError(5, 'Input/output error'))
        )
        with pytest.raises(OSError, match='Input/output'):
            read_newest(str(tmp_path))


def test_an_out_dir_that_vanishes_is_made_again(mine, here, capsys):
    import shutil

    shutil.rmtree('out', ignore_errors=True)
    here(
        'train.py',
        injected("if call == 20: __import__('shutil').rmtree('out')"),
        *SMALL,
        '--ckpt_interval=4',
    )
    assert checkpoint()['iter'] == 10
    assert 'warning: out is gone: it is made again' in capsys.readouterr().out
    assert 10 in metrics()[0]


# --- numbers


@pytest.mark.slow
def test_bad_numbers_on_one_process_are_skipped_by_all(mine, run):
    # 2 micro-batches a step for each process
    run(
        'train.py',
        injected("loss = loss * float('nan') if rank == 1 and call in (5, 6, 11) else loss"),
        *SMALL,
        processes=2,
    )
    output = run('train.py', 'fault.py', *SMALL, '--out_dir=again', processes=2).stdout
    assert 'step 3: loss nan' in output
    assert 'step 6: loss nan' in output
    assert output.count('the update is skipped') == 2
    assert '2 since step 0' in output
    state = checkpoint()
    assert all(torch.isfinite(p).all() for p in state['model'].values()) and state['iter'] == 10
    assert {int(s['step']) for s in state['optimizer'][0]['state'].values()} == {8}
    assert set(metrics()[0]) == {1, 2, 4, 5, 7, 8, 9, 10}


def test_only_bad_numbers_end_the_run_with_a_checkpoint(mine, run):
    done = run(
        'train.py',
        injected('loss = loss / 0 if call > 20 else loss'),
        *SMALL,
        '--max_iters=100',
        '--max_bad_steps=4',
        status=1,
    )
    assert done.stderr.splitlines()[-1].startswith(
        'error: 4 steps in a row had no finite loss and gradient: stopped at step 9'
    )
    assert done.stderr.count('error') == 1
    assert checkpoint()['iter'] == 9
    assert all(torch.isfinite(p).all() for p in checkpoint()['model'].values())


def test_a_jump_of_the_gradient_is_told(mine, here, capsys):
    here('train.py', injected('loss = loss * 1000 if 29 <= call <= 32 else loss'), *SMALL)
    assert 'step 8: grad norm' in (output := capsys.readouterr().out) and 'is usual' in output


def test_out_of_memory_says_what_to_lower(mine, run):
    done = run(
        'train.py',
        injected(
            "if call == 3: raise _torch.OutOfMemoryError('CUDA out of memory. Tried to allocate')"
        ),
        *SMALL,
        status=1,
    )
    assert (
        done.stderr.splitlines()[-1] == 'error: the device is out of memory (CUDA out of memory): '
        'lower batch_size, which changes nothing else'
    )
    assert 'Traceback' not in done.stderr


@pytest.mark.slow
def test_what_all_processes_find_wrong_is_said_once(mine, run):
    for fault in ('--n_embd=15', '--dataset=nowhere'):
        assert run('train.py', *SMALL, fault, processes=2, status=1).stderr.count('error: ') == 1


# --- FSDP


@pytest.mark.slow
def test_sharing_the_net_out_equals_ddp(mine, run):
    options = [*SMALL, '--n_layer=3', '--eval_interval=5', '--eval_iters=3']
    run('train.py', *options, '--out_dir=ddp', processes=2)
    run('train.py', *options, '--out_dir=fsdp', '--shard=True', '--max_iters=6', processes=2)
    run('train.py', *options, '--out_dir=fsdp', '--shard=True', '--init_from=resume', processes=2)
    for (step, line), again in zip(
        metrics('ddp')[0].items(), metrics('fsdp')[0].values(), strict=True
    ):
        assert again['loss'] == pytest.approx(line['loss'], rel=1e-5) and again[
            'grad_norm'
        ] == pytest.approx(line['grad_norm'], rel=1e-4), step
    assert metrics('fsdp')[1][10]['val_loss'] == pytest.approx(
        metrics('ddp')[1][10]['val_loss'], rel=1e-5
    )
    for part in ('model', 'ema'):
        for name, p in checkpoint('ddp')[part].items():
            torch.testing.assert_close(checkpoint('fsdp')[part][name], p, rtol=1e-3, atol=1e-5)
    # a single process goes on
    run('train.py', *options, '--out_dir=fsdp', '--init_from=resume', '--max_iters=12')
    assert checkpoint('fsdp')['iter'] == 12


@pytest.mark.slow
def test_the_largest_size_trains_shared_out_at_reduced_width(mine, run):
    config = os.path.join(ROOT, 'config', 'smdm_mdm.py')
    # 2121M's, its width divided by 16
    shape = [
        '--size=None', '--flops=None', '--n_layer=28', '--n_head=17', '--n_embd=136', '--n_mlp=544'
    ]
    run(
        'train.py', config, *SMALL, *shape, '--max_iters=3', '--shard=True', '--packing=concat',
        processes=2
    )
    losses = metrics()[0]
    assert len(losses) == 3 and all(0 < line['loss'] < 10 for line in losses.values())


def test_sharing_out_is_refused_where_it_cannot_be(mine, refused):
    for options in (['--shard=True'], ['--shard=True', '--optimizer=muon']):
        assert refused('train.py', *SMALL, *options).startswith(
            'error: shard=True shares the net among several processes'
        )
