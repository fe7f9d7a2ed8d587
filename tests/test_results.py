"""What eval.py refuses before it loads a judge or appends to a file."""

import json

import pytest
from filelock import FileLock

import eval as measures
from conftest import save_net


@pytest.fixture
def trained(tiny_net, rows, tmp_path):
    save_net(tiny_net(vocab_size=258, mask_id=257), tmp_path)
    rows()
    return tmp_path


def test_results_are_appended_to_results_alone(trained, here, refused):
    start = 'eval.py', '--out_dir=.', '--device=cpu', '--max_rows=2'
    (trained / 'README.md').write_text('# mine\n')
    (trained / 'samples.jsonl').write_text('{"text": "to be"}\n')
    assert 'README.md: it must end in .jsonl' in refused(*start, '--results=README.md')
    error = refused(*start, '--results=samples.jsonl')
    assert 'samples.jsonl, line 1: not a result of eval.py' in error and error.count('\n') == 1
    assert (trained / 'README.md').read_text() == '# mine\n'
    assert (trained / 'samples.jsonl').read_text() == '{"text": "to be"}\n'
    for _ in range(2):
        here(*start, '--results=new.jsonl')
    assert len(open('new.jsonl').readlines()) == 2


def test_the_harness_refuses_what_its_tasks_say(trained, refused):
    start = 'eval.py', '--metric=harness', '--out_dir=.', '--device=cpu', '--tasks=arc_easy'
    for given in ('--length=8', '--temperature=0.5'):
        error = refused(*start, given)
        assert 'takes neither --length nor --temperature' in error and error.count('\n') == 1


def test_samples_drawn_otherwise_are_refused_before_a_judge_is_loaded(
    trained, refused, monkeypatch
):
    folder = trained / 'samples' / '4'
    folder.mkdir(parents=True)
    row = dict(row=0, text='to be', ids=[1], nfe=1, settings=dict(steps=5))
    (folder / '000000-000000.jsonl').write_text(json.dumps(row) + '\n')
    start = 'eval.py', '--out_dir=.', '--device=cpu', '--judge=nowhere/none'
    for given in (['--metric=samples', '--steps=4'], ['--metric=table', '--table_steps=(2,4)']):
        assert 'holds samples drawn with ' in refused(*start, *given)
    (folder / '000000-000000.jsonl').unlink()
    assert "the judge 'nowhere/none' cannot be loaded" in refused(*start, *given)


def test_no_judge_is_told_what_to_give(trained, refused):
    error = refused('eval.py', '--metric=samples', '--out_dir=.', '--device=cpu', '--judge=')
    assert error.startswith("error: judge=''") and 'such as gpt2' in error


def test_two_that_draw_into_one_folder_do_not_meet(tmp_path):
    folder = str(tmp_path / 'samples')

    def make(batch):
        with pytest.raises(ValueError, match='samples: another eval.py draws into it: wait'):
            measures.kept_rows(folder, 2, 2, {}, make)
        return [dict(text=str(i)) for i in batch]

    rows = measures.kept_rows(folder, 2, 2, {}, make)
    assert [row['text'] for row in rows] == ['0', '1']
    with FileLock(f'{folder}.lock', timeout=0):  # it is free again
        pass


def test_help_is_aligned(here, capsys):
    with pytest.raises(SystemExit):
        here('eval.py', '--help')
    lines = capsys.readouterr().out.splitlines()
    line, = [line for line in lines if line.startswith('  --out_dir=')]
    assert line.index('where train.py') < 40
