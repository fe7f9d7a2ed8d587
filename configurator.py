"""
Constants from config files and the command line:

    python train.py config/quickstart.py --max_iters=20 --learning_rate=1e-3
    python sample.py --eta=0.1          a key of the constant sampler_options, which is a dict

A script has its constants at the top, literals with a comment, and calls configure(globals()).
Files and --key=value are taken in the order given. A config file is Python that assigns constants;
modules that it imports and names that begin with an underscore are its own.

A comment may begin with what its constant takes, or the None that is its default:

    batch_size = 32     # [>= 1] rows a micro-batch     (a range never holds inf or NaN)
    beta1 = 0.9         # [0 <= x < 1]
    T = None            # [int >= 0] steps
    norm = 'rmsnorm'    # [layernorm | rmsnorm]
"""
import ast
import contextlib
import difflib
import functools
import inspect
import math
import operator
import os
import re
import signal
import sys
import time
import traceback
import types


def require(condition, message):
    """Raise ValueError(message) unless the condition holds."""
    if not condition:
        raise ValueError(message)


@functools.cache
def constants_of(path):
    """name -> (default, comment) of the literals at the top of a script, up to its first function,
    class, if or configure()."""
    with open(path, encoding='utf-8') as f:
        source = f.read()
    lines = source.splitlines()
    constants = {}
    for node in ast.parse(source).body:
        behind = isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.If))
        if behind or 'configure(' in ast.unparse(node):
            break
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                default = ast.literal_eval(node.value)
            except ValueError:
                continue  # computed: not a constant
            comment = lines[node.end_lineno - 1][node.end_col_offset:].partition('#')[2].strip()
            constants[node.targets[0].id] = default, comment
    return constants


@functools.cache
def defaults_of(function):
    """name -> (default, comment) of a function's parameters that have a default. The comment is
    behind it, as with the constants of a script, where it is the last of its line."""
    source = ''
    with contextlib.suppress(OSError):  # typed into an interpreter
        source = inspect.getsource(function)
    options = {}
    for name, parameter in inspect.signature(function).parameters.items():
        comment = re.search(rf'^ *(?:def .*\W)?{name}\b[^#=\n]*=[^#=\n]*# *(.*)', source, re.M)
        if parameter.default is not parameter.empty:
            options[name] = parameter.default, comment[1] if comment else 'its own option'
    return options


# -----------------------------------------------------------------------------
# what a constant takes

KINDS = {
    'int': 'a whole number', 'number': 'a number', 'bool': 'True or False',
    'str': 'a string', 'dict': 'a dict', 'tuple': 'a tuple'}
BOUNDS = {
    '>': (operator.gt, 'above'), '>=': (operator.ge, 'at least'),
    '<': (operator.lt, 'below'), '<=': (operator.le, 'at most')}


def check_spec(key, value, default, comment):
    """Raise ValueError where the value is not what the [...] in its comment names."""
    if not comment.startswith('[') or value is None and default is None:
        return
    spec = comment[1:].partition(']')[0]
    if ' | ' in spec:
        require(value in spec.split(' | '),
                f'{key}={value!r} is not known: choose from {spec.replace(" | ", ", ")}')
        return
    spec = re.sub(r'(\S+) <(=?) x ', r'>\2 \1 ', spec)  # 0 <= x < 1: >= 0 < 1
    match = re.fullmatch(rf'({"|".join(KINDS)})?(?: ?[<>]=? \S+)*', spec)
    assert spec and match, f'{key}: [{spec}] is neither a kind, a range nor choices'
    kind = match[1]
    bounds = re.findall(r'([<>]=?) (\S+)', spec)
    fits = type(value).__name__ in (['int', 'float'] if kind in (None, 'number') else [kind])
    words = [KINDS[kind]] if kind else []
    if bounds:
        fits = fits and abs(value) <= sys.float_info.max  # as wide as a float
        fits = fits and all(BOUNDS[sign][0](value, float(bound)) for sign, bound in bounds)
        words.append(' and '.join(f'{BOUNDS[sign][1]} {bound}' for sign, bound in bounds))
    if value in (math.inf, -math.inf):
        words.append('finite')
    if default is None:
        words.append('or None')
    require(fits, f'{key}={value!r}: it must be {", ".join(words)}')


def checked(key, value, default):
    """The value as the type of the default. Raises ValueError where it has another."""
    kind = type(default)
    if kind is float and type(value) is int:
        return float(value)
    if kind is tuple and type(value) is list:
        return tuple(value)
    article = 'an' if kind is int else 'a'
    require(default is None or type(value) is kind,
            f'{key}={value!r}: {key} takes {article} {kind.__name__}, like {default!r}')
    return value


def parsed(key, text, default):
    """What --key=text stands for: the text where the constant is a string, else a literal."""
    if isinstance(default, str):
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = text  # no literal: a string, which a None default takes
    return checked(key, value, default)


def default_of(key, constants, where):
    if key not in constants:
        near, = difflib.get_close_matches(key, constants, n=1, cutoff=0)
        raise ValueError(f"{where}: there is no constant '{key}' in this script; the nearest is "
                         f"'{near}' (--help lists them all)")
    return constants[key][0]


# -----------------------------------------------------------------------------


def run_config(path, values):
    """Run a config file, which sees the values so far -> what it assigns."""
    scope = dict(values)
    try:
        with open(path, encoding='utf-8') as f:
            exec(compile(f.read(), path, 'exec'), scope)
    except SyntaxError as error:
        raise ValueError(f'{path}, line {error.lineno}: {error.msg}') from None
    except (Exception, SystemExit) as error:
        raise ValueError(f'{path}: {type(error).__name__}: {error}') from None
    return {
        key: value for key, value in scope.items()
        if not key.startswith('_') and not isinstance(value, types.ModuleType)
        and not (key in values and value is values[key])}


def show_and_exit(script, groups):
    print(f'usage: python {os.path.basename(script)} [config/FILE.py ...] [--key=value ...]')
    width = 32  # longer defaults are rare: only their own comment moves
    for outer, group in groups.items():
        print(outer and f'\nkeys of {outer}:')
        for key, (default, comment) in group.items():
            print(f"  --{f'{key}={default!r}':<{width}}  {comment}".rstrip())
    sys.exit()


def one_line_for_bad_input(kind, error, tb):
    """The excepthook: what our own files raise on purpose is one line to the user; anything else is
    a bug and keeps its traceback."""
    raised_in = os.path.abspath(traceback.extract_tb(tb)[-1].filename) if tb else ''
    process = ''
    rank = os.environ.get('RANK', '0')
    if rank != '0':  # what all find wrong the first process says; torchrun then ends the others
        process = f'process {rank}: '
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)
    if issubclass(kind, (ValueError, OSError)) and os.path.dirname(raised_in) == OURS:
        print(f'error: {process}{error}', file=sys.stderr, flush=True)
    elif kind.__name__ == 'OutOfMemoryError':
        why = str(error).split('. ')[0]
        advice = 'lower batch_size, which changes nothing else'
        print(f'error: the device is out of memory ({why}): {advice}', file=sys.stderr, flush=True)
    elif issubclass(kind, KeyboardInterrupt):
        print('interrupted', file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, tb)


OURS = os.path.dirname(os.path.abspath(__file__))
if os.path.dirname(os.path.abspath(getattr(sys.modules['__main__'], '__file__', ''))) == OURS:
    # at once, for Ctrl-C while torch is imported; not in programs of others that import our files
    sys.excepthook = one_line_for_bad_input


def configure(module, argv=None, **dicts):
    """Override the constants of a script and return them all as a dict. module: its globals().
    dicts: what the keys of a constant that is a dict are, {key: (default, comment)}; --key=value
    sets one, unless a constant has its name.
    Raises ValueError or FileNotFoundError; from here on these end the script with one line."""
    sys.excepthook = one_line_for_bad_input
    constants = constants_of(module['__file__'])
    outer_of = {key: outer for outer, keys in dicts.items() for key in keys if key not in constants}
    known = dict.fromkeys(outer_of, (None, '')) | constants

    def assign(key, value):
        if key in outer_of:
            outer = outer_of[key]
            theirs = {} if module[outer] is None else module[outer]
            require(isinstance(theirs, dict), f'{outer}={theirs!r}: it must be a dict')
            key, value = outer, theirs | {key: value}
        module[key] = value

    for argument in sys.argv[1:] if argv is None else argv:
        if argument in ('--help', '-h'):
            groups = {'': constants}
            for key, outer in outer_of.items():
                groups.setdefault(outer, {})[key] = dicts[outer][key]
            show_and_exit(module['__file__'], groups)
        elif argument.startswith('--'):
            key, equals, text = argument[2:].partition('=')
            default = default_of(key, known, argument)
            require(equals, f'{argument}: write --{key}=VALUE, with an equals sign and no space')
            assign(key, parsed(key, text, default))
        else:
            require(argument.endswith('.py'),
                    f"'{argument}' is neither a config file (*.py) nor of the form --key=value")
            if not os.path.isfile(argument):
                raise FileNotFoundError(f'there is no config file {argument}')
            assigned = run_config(argument, {key: module[key] for key in constants})
            for key, value in assigned.items():
                assign(key, checked(key, value, default_of(key, known, argument)))
    for key, (default, comment) in constants.items():
        check_spec(key, module[key], default, comment)
    return {key: module[key] for key in constants}
