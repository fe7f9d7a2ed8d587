import json

import pytest

SHAPE = [
    '--n_layer=1', '--n_head=2', '--n_embd=32', '--vocab_size=300', '--block_size=32',
    '--batch_size=2', '--repeats=1'
]
BENCH = 'tests/bench.py'


@pytest.mark.slow
def test_the_benchmark_writes_what_it_prints_and_says_what_changed(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = run(BENCH, '--part=train', *SHAPE).stdout
    with open('bench.jsonl') as f:
        rows = [json.loads(line) for line in f]
    assert [(row['name'], row['dtype']) for row in rows] == [
        (name, dtype)
        for dtype in ('float32', 'bfloat16')
        for name in ('nanoMDM', 'textbook', 'prototype', 'prototype, memory given back')
    ]
    assert all(
        row['part'] == 'train'
        and row['n_embd'] == 32
        and row['tokens_per_s'] > 0
        and 0 < row['of_matmul'] < 1
        and row['machine']
        for row in rows
    )
    assert all(row['times_textbook'] == 1 for row in rows if row['name'] == 'textbook')
    assert table.count('nanoMDM') == 2

    with open('old.jsonl', 'w') as f:  # as if it had been a thousand times as fast
        f.writelines(
            json.dumps(
                row
                | dict(
                    tokens_per_s=1000 * row['tokens_per_s'],
                    times_textbook=row['times_textbook'] / 1000,
                )
            )
            + '\n'
            for row in rows
        )
    found = run(BENCH, '--part=train', '--compare=old.jsonl', *SHAPE).stdout.split(
        '8 rows are in old.jsonl too'
    )[1]
    assert found.count('| times_textbook |') == 8 and found.count('| tokens_per_s |') == 8
    with open('bench.jsonl') as f:
        assert len(f.readlines()) == 16

    for part in ('projection', 'ar', 'estimate', 'launches'):
        run(BENCH, f'--part={part}', *SHAPE)
    with open('bench.jsonl') as f:
        rows = [json.loads(line) for line in f]
    parts = [row['part'] for row in rows]
    assert (parts.count('projection'), parts.count('ar'), parts.count('estimate')) == (4, 16, 24)
    n = {row['name']: row['launches'] for row in rows if row['part'] == 'launches'}
    assert 100 < n['trunk compiled, evaluation'] < n['evaluation'] / 2
    assert 300 < n['trunk compiled, step'] < (n['forward'] + n['backward']) / 2

    last = run(BENCH, '--part=estimate', '--compare=old.jsonl', *SHAPE).stdout
    assert '\n0 rows are in old.jsonl too' in last


def test_the_benchmark_refuses_what_is_not_there(run, here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'broken.jsonl').write_text('{"part": ')
    for name in ('nix', 'broken.jsonl'):
        with pytest.raises(SystemExit) as ended:
            here(BENCH, f'--compare={name}')
        assert ended.value.code.startswith(
            f'error: compare={name} is not a file that an earlier run has written'
        )
    assert run(BENCH, '--part=nix', status=1).stderr.startswith("error: part='nix' is not known")
