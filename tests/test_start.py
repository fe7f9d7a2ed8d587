"""How train.py starts, waits and ends: what its constants say, what is left in out_dir."""

import os
import re
import time

import pytest
import torch

from model import load_pretrained
from test_survival import injected
from test_train import SMALL, checkpoint, metrics


def test_constants_tell_the_shape_that_is_trained(mine, here, capsys):
    here('train.py', *SMALL, '--max_iters=1', '--out_dir=source')
    options = [*SMALL, '--init_from=source', '--n_layer=3', '--size=6M']
    here('train.py', *options, '--max_iters=2')
    for last in (3, 4):  # as trained, and resumed by the same command
        said, config = checkpoint()['constants'], load_pretrained('out').config
        assert said['n_layer'] == config.n_layer == 1 and said['n_embd'] == config.n_embd == 16
        assert said['n_mlp'] == 64 and said['size'] is None
        here('train.py', *options, f'--max_iters={last}', '--init_from=resume')
    assert 'resuming at step 2, max_iters=3 (was 2)\n' in capsys.readouterr().out
    here('train.py', *SMALL, '--max_iters=5', '--init_from=resume')  # without a word about it
    here('train.py', *options, '--max_iters=6', '--init_from=resume')
    with pytest.raises(ValueError, match='out/ckpt.pt has n_layer=1, the run n_layer=18'):
        here('train.py', *options, '--size=170M', '--max_iters=7', '--init_from=resume')


def test_old_checkpoints_whose_constants_are_those_given_resume(mine, here):
    here('train.py', *SMALL, '--max_iters=1', '--out_dir=source')
    options = [*SMALL, '--init_from=source', '--n_layer=3']
    here('train.py', *options, '--max_iters=2')
    state = checkpoint()
    del state['unused'], state['constants']['memory_check']
    state['constants']['n_layer'] = 3
    torch.save(state, 'out/ckpt.pt')
    here('train.py', *options, '--max_iters=3', '--init_from=resume')
    assert checkpoint()['constants']['n_layer'] == 1


def test_what_is_asked_for_by_name_is_not_dropped_without_a_word(mine, here, capsys):
    here('train.py', *SMALL, '--max_iters=1', '--out_dir=source', '--tied=True', '--mlp=relu')
    here('train.py', *SMALL, '--max_iters=1', '--init_from=source', '--tied=False', '--mlp=relu')
    assert 'not used are tied=False (it has True)' in capsys.readouterr().out
    with pytest.raises(ValueError, match='ckpt.pt has tied=True, the run tied=False'):
        here('train.py', *SMALL, '--max_iters=2', '--init_from=resume', '--out_dir=source',
             '--tied=False')


def test_a_run_is_not_resumed_on_another_text(mine, here):
    here('train.py', *SMALL, '--max_iters=1')
    os.rename('data/mine', 'data/other')
    with pytest.raises(ValueError, match="dataset='mine', the run names 'other': they must agree"):
        here('train.py', *SMALL, '--max_iters=2', '--init_from=resume', '--dataset=other')
    assert checkpoint()['iter'] == 1


def test_a_validation_of_one_row_has_no_error(mine, here, capsys):
    here('train.py', *SMALL, '--block_size=64', '--eval_interval=1', '--max_iters=1',
         '--packing=concat', '--eval_iters=1', '--global_batch_size=1', '--batch_size=1')
    told = capsys.readouterr().out
    assert re.search(r'validation [\d.]+ nats/token, [\d.]+ bits/byte \(first 1 of', told)


def test_a_refusal_leaves_no_folder_behind(mine, run):
    done = run('train.py', injected('raise ValueError("no")'), *SMALL, status=1)
    assert 'no' in done.stderr and not os.path.exists('out')
    os.mkdir('out')
    with open('out/notes.txt', 'w') as f:
        f.write('mine')
    run('train.py', 'fault.py', *SMALL, status=1)
    assert os.listdir('out') == ['notes.txt']


def test_who_knows_better_trains_with_less_memory_than_is_said_to_be_needed(
    mine, here, refused, capsys, monkeypatch
):
    monkeypatch.setattr('model.free_memory', lambda device: 1e3)
    assert '0.00 GB are free on cpu: lower n_layer' in refused('train.py', *SMALL)
    here('train.py', *SMALL, '--max_iters=1', '--memory_check=False')
    assert '0.00 GB are free on cpu\n' in capsys.readouterr().out


def test_epochs_of_crop_are_passes_over_the_text(mine, here, capsys):
    done = here('train.py', *SMALL, '--packing=crop', '--epochs=1', '--eval_iters=1')
    rows = len(done['train_rows'].tokens) // 16
    assert done['max_iters'] == rows // 8 == checkpoint()['iter']
    assert f'{rows / 8:,.1f} steps an epoch' in capsys.readouterr().out


def test_a_step_reads_one_tensor_from_the_device(mine, here, monkeypatch):
    reads = []
    for name in ('item', 'tolist', '__float__', '__bool__', '__int__'):
        read = getattr(torch.Tensor, name)

        def noted(self, read=read, name=name):
            if getattr(self, 'of_step', False):
                reads.append(name)
            return read(self)

        monkeypatch.setattr(torch.Tensor, name, noted)
    stack = torch.stack

    def marked(tensors, *arguments, **options):
        found = stack(tensors, *arguments, **options)
        found.of_step = found.shape == (5,)
        return found

    norm = torch.nn.utils.get_total_norm

    def marked_norm(*arguments):
        found = norm(*arguments)
        found.of_step = True
        return found

    monkeypatch.setattr(torch, 'stack', marked)
    monkeypatch.setattr(torch.nn.utils, 'get_total_norm', marked_norm)
    here('train.py', *SMALL, '--max_iters=3', '--eval_interval=10')
    assert reads == ['tolist'] * 3 and all('grad_norm' in line for line in metrics()[0].values())


@pytest.mark.slow
def test_others_wait_for_samples_longer_than_the_timeout_of_a_step(mine, run):
    with open('patient.py', 'w') as f:
        f.write("""import datetime as _datetime
import functools as _functools
import time as _time
import torch.distributed as _dist
import sample as _sample
_start, _slow = _dist.init_process_group, _sample.SAMPLERS['ancestral']
def _impatient(backend, timeout):
    _start(backend, timeout=_datetime.timedelta(seconds=4))
@_functools.wraps(_slow)
def _sampler(*arguments, **options):
    _time.sleep(8)
    return _slow(*arguments, **options)
_dist.init_process_group, _sample.SAMPLERS['ancestral'] = _impatient, _sampler
""")
    began = time.time()
    run('train.py', 'patient.py', *SMALL, '--max_iters=2', '--sample_interval=1',
        '--eval_interval=1', '--sample_at_end=True', processes=2)
    assert time.time() - began > 20 and checkpoint()['iter'] == 2
