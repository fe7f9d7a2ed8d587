"""What data.py advises can be done, and nothing that a user asks for is ignored."""

import os
import shlex
import signal

import pytest

from conftest import write
from data import TokenRows, find_or_prepare, get_tokenizer, prepare, read_meta
from test_own_text import TINY


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_comma_is_part_of_the_path_of_a_text():
    text = 'to be\n\nor not'
    folder = prepare('text:' + write('a,b.txt', text), 'bytes')
    assert folder == 'data/a_b-bytes' and read_meta(folder)['source']['size'] == len(text)
    write('a,b.txt', 'to be\n\nor now')
    with pytest.raises(ValueError, match='was made from'):
        prepare('text:a,b.txt', 'bytes')


def test_nothing_but_the_data_stays_in_the_folder():
    write('c.txt', 'to be\n\nor not')
    for _ in range(2):  # made, found
        prepare('text:c.txt', 'bytes', 'c')
        assert os.listdir('data') == ['c']
    write('c.txt', '')
    with pytest.raises(ValueError, match='holds no document'):
        prepare('text:c.txt', 'bytes', 'empty')
    assert os.listdir('data') == ['c']


@pytest.mark.parametrize('packing', ['pad', 'sentence', 'documents', 'crop'])
def test_grouping_is_refused_where_no_groups_are_cut(packing, mine):
    with pytest.raises(ValueError, match=f"grouping=3: rows of packing '{packing}' are not cut"):
        TokenRows('data/mine', 'train', 16, packing, grouping=3)


def test_rows_that_begin_with_bos_begin_anew_in_each_group(mine):
    rows = TokenRows('data/mine', 'train', 16, 'bos', grouping=3)
    tokens, found = rows.tokens.tolist(), []
    for first, end in zip(rows.offsets[:-1:3], [*rows.offsets[3:-1:3], rows.offsets[-1]],
                          strict=True):
        group = [256, *tokens[first:end - 1]]  # EOS, which is BOS here, goes before the next one
        found += [group[i:i + 16] for i in range(0, len(group) - 15, 16)]
    assert rows[:]['x0'].tolist() == found


def command_in(error, name):
    """The arguments of the data.py command that an error advises."""
    words = shlex.split(error.split('python data.py ')[1].split(', which')[0])
    return [word.replace('NAME', name) for word in words]


def test_what_train_py_advises_after_an_edit_can_be_done(here, refused):
    command = ('train.py', '--dataset=text:c.txt', '--tokenizer=bytes', '--max_iters=1', *TINY)
    write('c.txt', '\n\n'.join(f'to be {i}' for i in range(200)))
    here(*command)
    write('c.txt', '\n\n'.join(f'not to be {i}' for i in range(200)))
    error = refused(*command)
    assert error.startswith('error: data/c-bytes was made from') and error.count('\n') == 1
    assert error.endswith('which is --dataset=NAME\n')
    here('data.py', *command_in(error, 'edited'))
    here('train.py', '--dataset=edited', '--max_iters=1', '--out_dir=again', *TINY)


def test_data_with_the_ids_of_a_net_are_made_by_the_command_that_is_advised(here, refused):
    write('old.txt', '\n\n'.join(f'to be {i} or not' for i in range(200)))
    write('new.txt', '\n\n'.join(f'a new text {i}' for i in range(200)))
    here('train.py', '--dataset=text:old.txt', '--tokenizer=bpe-260', '--max_iters=1', *TINY)
    prepare('text:new.txt', 'bpe-260')  # ids of its own
    command = ('train.py', '--init_from=out', '--out_dir=tuned', '--max_iters=1', *TINY)
    assert '--tokenizer=out' in refused(*command, '--dataset=new-bpe-260')
    error = refused(*command, '--dataset=new-bpe-260', '--tokenizer=out')
    assert "holds ids of the tokenizer 'bpe-260', not 'out'" in error
    here('data.py', *command_in(error, ''))
    assert read_meta('data/new-out')['tokenizer'] == get_tokenizer('out').meta()
    here(*command, '--dataset=new-out')


def test_a_name_that_is_nowhere_is_looked_up_in_data_and_among_the_datasets():
    with pytest.raises(FileNotFoundError, match='no data in data/x-bytes, nor in data/x, and'):
        find_or_prepare('x', 'bytes')
    write('x.txt', 'to be')
    folder = prepare('text:x.txt', 'bytes')
    assert find_or_prepare('x', 'bytes') == folder == 'data/x-bytes'


@pytest.mark.parametrize('script', ['data.py', 'train.py', 'sample.py', 'eval.py'])
def test_ctrl_c_during_the_imports_is_one_line(script, run, tmp_path):
    write('numpy.py', 'raise KeyboardInterrupt')
    assert run(script, status=-signal.SIGINT, PYTHONPATH=str(tmp_path)).stderr == 'interrupted\n'
