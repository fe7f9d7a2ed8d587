"""Sudoku: puzzles with one solution, and what a net makes of them in which order."""
import itertools
import json
import math
import random

import numpy as np
import pytest

from conftest import ROOT
from data import (
    read_meta, read_sudoku, sudoku_peers, sudoku_puzzle, sudoku_solutions)


def count_solutions(puzzle, rows, columns):
    """By trying every digit in every cell, in order: nothing of data.py is used."""
    side = rows * columns
    cells = list(puzzle)

    def allowed(i, digit):
        r, c = divmod(i, side)
        corner = r // rows * rows, c // columns * columns
        box = [(corner[0] + a) * side + corner[1] + b
               for a, b in itertools.product(range(rows), range(columns))]
        others = [r * side + k for k in range(side)] + [k * side + c for k in range(side)] + box
        return all(cells[j] != digit for j in others)

    def count(i):
        if i == len(cells):
            return 1
        if cells[i] != '.':
            return count(i + 1)
        total = 0
        for digit in '123456789'[:side]:
            if allowed(i, digit):
                cells[i] = digit
                total += count(i + 1)
                cells[i] = '.'
        return total

    return count(0)


@pytest.mark.parametrize('rows, columns, clues', [(2, 2, 4), (2, 3, 10), (3, 2, 12), (3, 3, 36)])
def test_a_puzzle_has_its_clues_and_one_solution(rows, columns, clues):
    side, found = rows * columns, 0
    for key in range(6):
        made = sudoku_puzzle(rows, columns, clues, key)
        if made is None:
            continue
        puzzle, solution = made
        assert len(puzzle) == len(solution) == side ** 2
        assert sum(cell != '.' for cell in puzzle) == clues
        assert all(cell in ('.', digit) for cell, digit in zip(puzzle, solution, strict=True))
        for i, peers in enumerate(sudoku_peers(rows, columns)):
            assert solution[i] in '123456789'[:side]
            assert all(solution[i] != solution[j] for j in peers)
        assert count_solutions(puzzle, rows, columns) == 1
        found += 1
    assert found > 2


def test_the_solver_finds_all_288_grids_of_4_by_4():
    grids = sudoku_solutions([15] * 16, sudoku_peers(2, 2), random.Random(0))
    assert len({tuple(grid) for grid in grids}) == 288


def test_puzzles_are_reproducible_distinct_and_the_first_of_more():
    def made(puzzles, **options):
        items = read_sudoku(box='2x2', clues=5, puzzles=puzzles, **options)
        return [(split, example) for split, example, *_ in items]

    some = made(60)
    assert some == made(90)[:60] and some != made(60, seed=1)
    assert len({str(example) for _, example in some}) == 60
    assert [split for split, _ in some].count('validation') == 3


@pytest.mark.parametrize('options, told', [
    (dict(box='3x4'), 'box='), (dict(clues=82), 'clues=82'), (dict(clues=2.5), 'clues=2.5'),
    (dict(puzzles=0), 'puzzles=0'), (dict(box='2x2', clues=3), 'none in')])
def test_impossible_puzzles_are_refused(options, told):
    with pytest.raises(ValueError, match=told):
        next(read_sudoku(**options))


def test_options_of_the_reader_are_keys_of_the_command_line(run, refused, tmp_path):
    command = ['data.py', '--dataset=sudoku', '--tokenizer=bytes', '--box=2x2', '--clues=6']
    run(*command, '--puzzles=40', '--name=s')
    meta = read_meta(str(tmp_path / 'data/s'))
    assert meta['source']['options'] == dict(box='2x2', clues=6, puzzles=40)
    assert '--box=2x2 --clues=6 --puzzles=40' in meta['command']
    assert meta['splits']['train']['documents'] == 38
    ids = np.fromfile(tmp_path / 'data/s/train.bin', dtype='<u2')[:34]
    puzzle, solution = bytes(ids[1:17].tolist()), bytes(ids[17:33].tolist())
    assert puzzle.count(b'.') == 10 and sorted(solution) == sorted(b'1234' * 4)
    assert ids[0] == ids[33] == meta['tokenizer']['eos_id']
    told = refused('data.py', '--dataset=stdlib', '--tokenizer=bytes', '--clues=6')
    assert "dataset 'stdlib' has no option 'clues'" in told


@pytest.mark.slow
def test_a_net_solves_more_in_the_order_of_its_confidence_than_in_any_order(run, tmp_path):
    run('data.py', '--dataset=sudoku', '--tokenizer=bytes', '--box=2x2', '--clues=5',
        '--puzzles=20000', '--name=s')
    run('train.py', f'{ROOT}/config/sudoku.py', '--dataset=s', '--block_size=34', '--n_layer=4',
        '--n_head=4', '--n_embd=96', '--max_iters=600', '--batch_size=64',
        '--global_batch_size=64', '--warmup_iters=50', '--device=cpu')
    accuracy = {}
    for order in ('uniform', 'prob_diff'):
        run('eval.py', '--metric=generation', '--out_dir=out-sudoku', '--max_rows=200',
            '--steps=16', '--sampler=fixed', f'--confidence={order}', '--device=cpu',
            f'--samples_dir={order}', '--temperature=0')
        with open(tmp_path / 'results.jsonl') as f:
            accuracy[order] = json.loads(f.readlines()[-1])['result']['accuracy']
    # four standard errors of a difference of 200 puzzles
    assert accuracy['prob_diff'] > accuracy['uniform'] + 4 * math.sqrt(0.5 / 200), accuracy
