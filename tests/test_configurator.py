import os
import sys

import pytest

from configurator import configure, constants_of
from conftest import ROOT

SCRIPT = '''"""A script."""
import os

width = 64             # units
rate = 1e-3            # per step
name = 'x'             # any text
flag = False
limit = None           # None: no limit
shape = (1, 2)         # a tuple
computed = os.cpu_count()
constants = configure(globals())
later = 3


def f():
    inside = 1
'''


@pytest.fixture
def script(tmp_path):
    path = tmp_path / 'script.py'
    path.write_text(SCRIPT)

    def configured(*arguments):
        module = dict(
            __file__=str(path), width=64, rate=1e-3, name='x', flag=False, limit=None, shape=(1, 2),
            computed=2
        )
        constants = configure(module, list(arguments))
        assert all(module[key] == value for key, value in constants.items())
        return constants

    return configured


def test_constants_are_the_literals_above_configure(tmp_path):
    (tmp_path / 's.py').write_text(SCRIPT)
    constants = constants_of(tmp_path / 's.py')
    assert constants == dict(
        width=(64, 'units'),
        rate=(1e-3, 'per step'),
        name=('x', 'any text'),
        flag=(False, ''),
        limit=(None, 'None: no limit'),
        shape=((1, 2), 'a tuple'),
    )


def test_files_and_keys_are_taken_in_order(script, tmp_path):
    one, two = tmp_path / 'one.py', tmp_path / 'two.py'
    one.write_text('width = 1\nrate = 1\n')
    two.write_text(
        'import math\n_ten = math.floor(10.5)\n'
        'width = width + _ten  # computes with what is known so far\n'
    )
    assert script(str(one), str(two), '--width=5') == dict(
        width=5, rate=1.0, name='x', flag=False, limit=None, shape=(1, 2)
    )
    assert script('--width=5', str(one))['width'] == 1
    assert script('--width=5', str(two))['width'] == 15


@pytest.mark.parametrize(
    'argument, key, value',
    [
        ('--width=7', 'width', 7),
        ('--rate=2', 'rate', 2.0),
        ('--rate=3e-4', 'rate', 3e-4),
        ('--name=12', 'name', '12'),
        ('--name=a=b', 'name', 'a=b'),
        ('--flag=True', 'flag', True),
        ('--limit=3', 'limit', 3),
        ('--limit=abc', 'limit', 'abc'),
        ('--limit=None', 'limit', None),
        ('--name=', 'name', ''),
        ('--shape=[3,4]', 'shape', (3, 4)),
        ('--limit=owt/x-y', 'limit', 'owt/x-y'),
        ('--width=1_000', 'width', 1000),
    ],
)
def test_values_have_the_type_of_the_default(script, argument, key, value):
    result = script(argument)[key]
    assert result == value and type(result) is type(value)


@pytest.mark.parametrize(
    'argument, message',
    [
        ('--widht=7', "no constant 'widht' in this script; the nearest is 'width'"),
        ('--width=1.5', 'width=1.5: width takes an int'),
        ('--width=abc', 'takes an int'),
        ('--width=True', 'takes an int'),
        ('--flag=1', 'takes a bool'),
        ('--flag=yes', 'takes a bool'),
        ('--rate=x', 'takes a float'),
        ('--rate=None', 'takes a float'),
        ('--width', 'write --width=VALUE'),
        ('width=3', 'neither a config file'),
        ('--later=4', "no constant 'later'"),
        ('--width=', 'takes an int'),
        ('--width=__import__("os")', 'takes an int'),
    ],
)
def test_bad_arguments_are_refused(script, argument, message):
    with pytest.raises(ValueError, match='(?s)' + message.replace('(', r'\(').replace(')', r'\)')):
        script(argument)


def test_bad_files_are_refused(script, tmp_path):
    with pytest.raises(FileNotFoundError, match='no config file'):
        script('missing.py')
    (tmp_path / 'bad.py').write_text('wdith = 3\n')
    with pytest.raises(
        ValueError,
        match="bad.py: there is no constant 'wdith' in this script; the nearest is 'width'",
    ):
        script(str(tmp_path / 'bad.py'))
    (tmp_path / 'bad.py').write_text('width = "3"\n')
    with pytest.raises(ValueError, match='takes an int'):
        script(str(tmp_path / 'bad.py'))
    (tmp_path / 'bad.py').write_text('width = = 3\n')
    with pytest.raises(ValueError, match='bad.py, line 1'):
        script(str(tmp_path / 'bad.py'))


@pytest.mark.parametrize('name', ['train.py', 'sample.py', 'eval.py', 'data.py'])
def test_help_lists_every_constant_with_its_comment(here, capsys, name):
    with pytest.raises(SystemExit) as ended:
        here(name, '--help')
    assert not ended.value.code
    shown = capsys.readouterr().out
    constants = constants_of(os.path.join(ROOT, name))
    assert len(constants) >= 5
    for key, (default, comment) in constants.items():
        assert f'--{key}={default!r}' in shown and comment in shown


def test_every_config_is_read_by_its_script(monkeypatch):
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)  # configure() sets its own
    files = sorted(
        file for file in os.listdir(os.path.join(ROOT, 'config')) if file.endswith('.py')
    )
    assert len(files) >= 10
    for file in files:
        script = os.path.join(ROOT, 'eval.py' if file.startswith('eval_') else 'train.py')
        module = {key: default for key, (default, _) in constants_of(script).items()} | dict(
            __file__=script
        )
        assert configure(module, [os.path.join(ROOT, 'config', file)])['out_dir'].startswith('out')


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--max_iters=many'], 'error: max_iters='),
        (['config/none.py'], 'error: there is no config file config/none.py'),
        (['--max_iters', '3'], 'error: --max_iters: write --max_iters=VALUE'),
    ],
)
def test_bad_arguments_end_a_script_with_one_line(refused, arguments, message):
    stderr = refused('train.py', *arguments)
    assert stderr.startswith(message) and stderr.count('\n') == 1


def test_an_unknown_key_ends_a_process_with_one_line(run):
    stderr = run('train.py', '--no_such_key=1', status=1).stderr
    assert stderr.startswith("error: --no_such_key=1: there is no constant 'no_such_key'")
    assert stderr.count('\n') == 1
