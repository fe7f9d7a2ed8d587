"""Prompts and answers as commands: from files to a table, with kills on the way."""

import glob
import json
import math
import os
import signal
import subprocess
import sys
import time
import types

import pytest

from conftest import ROOT
from data import read_meta
from eval import judge_answers
from test_train import checkpoint, equal

SFT = os.path.join(ROOT, 'config', 'sft_reverse.py')
EVAL = os.path.join(ROOT, 'config', 'eval_reverse.py')
SMALL = (
    SFT, '--init_from=auto', '--n_layer=2', '--n_head=2', '--n_embd=32', '--cond_dim=0',
    '--block_size=80', '--batch_size=8', '--global_batch_size=16', '--device=cpu',
    '--dtype=float32', '--log_interval=1', '--ckpt_interval=4', '--eval_interval=1000',
)
MEASURE = (
    '--input=facts', EVAL, '--bleu=False', '--device=cpu', '--length=80', '--steps=8',
    '--batch_size=2',
)
FILES = (
    'p2d_prompts_test', 'd2p_reverse_prompts_test', 'd2p_prompts_test', 'p2d_reverse_prompts_test')


@pytest.fixture(autouse=True)
def facts(tmp_path, monkeypatch):
    """facts/: 20 names with descriptions, half of them in either order, as the reversal files."""
    monkeypatch.chdir(tmp_path)
    os.mkdir('facts')
    told = [(f'Ann {chr(65 + i)}', f'the maker of {i} boats') for i in range(20)]

    def write(name, pairs):
        with open(f'facts/{name}.jsonl', 'w') as f:
            for prompt, completion in pairs:
                f.write(json.dumps(dict(prompt=prompt, completion=' ' + completion)) + '\n')

    forward = [(f'{name}, known as', what) for name, what in told]
    backward = [(f'Called {what} is', name) for name, what in told]
    write('all_prompts_train', forward[:10] + backward[10:])
    for name, pairs in zip(
            FILES, (forward[:10], forward[10:], backward[10:], backward[:10]), strict=True):
        write(name, pairs)


def start(script, *arguments):
    """A script in the background, its output in out.txt."""
    with open('out.txt', 'w') as f:
        return subprocess.Popen(
            [sys.executable, os.path.join(ROOT, script), *arguments], stdout=f,
            stderr=subprocess.STDOUT,
            env=os.environ | dict(OMP_NUM_THREADS='1', PYTHONDONTWRITEBYTECODE='1'))


def kill_when(condition, number, script, *arguments):
    """Start a script, and send it a signal once a condition holds. Its exit status."""
    process, until = start(script, *arguments), time.time() + 120
    while not condition():
        with open('out.txt') as f:
            assert process.poll() is None and time.time() < until, f.read()
        time.sleep(0.002)
    process.send_signal(number)
    return process.wait()


def items(folder):
    return {name: read(f'{folder}/{name}.jsonl') for name in os.listdir(folder)
            if os.path.isdir(f'{folder}/{name}')}


def read(path):
    with open(path) as f:
        return [json.loads(line) for line in f]


@pytest.mark.slow
def test_files_become_a_table_and_kills_on_the_way_change_nothing(run):
    """One SIGKILL while the net trains, then a SIGKILL and a SIGTERM while it answers."""
    run(
        'data.py', '--dataset=reverse', '--input=facts/all_prompts_train.jsonl',
        '--tokenizer=bytes', '--name=reverse')
    assert read_meta('data/reverse')['splits']['train']['documents'] == 20
    run('train.py', *SMALL, '--max_iters=24', '--out_dir=whole')
    kill_when(
        lambda: os.path.exists('parts/ckpt.pt'), signal.SIGKILL, 'train.py', *SMALL,
        '--max_iters=24', '--out_dir=parts')
    assert checkpoint('parts')['iter'] < 24
    run('train.py', *SMALL, '--max_iters=24', '--out_dir=parts')
    assert equal(checkpoint('whole')['model'], checkpoint('parts')['model'])

    table = run('eval.py', *MEASURE, '--init_from=whole').stdout
    assert table.count('| 10 |') == 4
    for number, count in ((signal.SIGKILL, 3), (signal.SIGTERM, 8)):
        status = kill_when(
            lambda count=count: len(glob.glob('parts/answers/*/*.jsonl')) >= count, number,
            'eval.py', *MEASURE, '--init_from=parts')
        assert status == -number
    kept = {path: os.stat(path).st_mtime_ns for path in glob.glob('parts/answers/*/*.jsonl')}
    assert 8 <= len(kept) < 20
    assert run('eval.py', *MEASURE, '--init_from=parts').stdout.splitlines()[-4:] == (
        table.splitlines()[-4:])
    assert items('parts/answers') == items('whole/answers')
    assert kept == {path: os.stat(path).st_mtime_ns for path in kept}  # not made again
    assert not glob.glob('parts/**/*.unfinished', recursive=True)
    assert len(read('results.jsonl')) == 8  # four rows of each finished measurement


def test_a_folder_after_the_config_that_names_its_files_is_told(refused):
    error = refused('eval.py', EVAL, '--input=facts', '--bleu=False')
    assert error.count('\n') == 1 and '--input=FOLDER config/eval_reverse.py' in error


def test_none_right_has_an_error_too():
    c = types.SimpleNamespace(answer_pattern=None, match='exact', bleu=False)
    drawn = [dict(text='no')] * 8
    found = judge_answers(c, 'name', 'items.jsonl', ['?'] * 8, ['yes'] * 8, drawn)
    assert found['accuracy'] == 0 and found['accuracy_se'] == pytest.approx(0.3 / math.sqrt(8))
