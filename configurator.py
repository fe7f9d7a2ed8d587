"""
Constants from config files and the command line:

    python train.py config/quickstart.py --max_iters=20 --learning_rate=1e-3

A script has its constants at the top, each a literal with a comment behind it, and calls configure(globals()). Files and
--key=value are taken in the order in which they are given; a config file is plain Python that assigns constants (it may import
modules to compute them with; names that begin with an underscore are its own).
The only code run here is that of the config files named by the user.
"""
import ast
import difflib
import os
import signal
import sys
import time
import traceback
import types


def constants_of(path):
    """name -> (default, comment) of the literals assigned at the top of a script, up to its first function, class, if or configure()."""
    with open(path, encoding='utf-8') as f:
        source = f.read()
    lines, constants = source.splitlines(), {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.If)) or 'configure(' in ast.unparse(node):
            break
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                default = ast.literal_eval(node.value)
            except ValueError:
                continue  # not a constant: computed
            comment = lines[node.end_lineno - 1][node.end_col_offset:].partition('#')[2].strip()
            constants[node.targets[0].id] = default, comment
    return constants


def checked(key, value, default):
    """value as the type of the constant's default. Raises ValueError where it is of another."""
    kind = type(default)
    if default is None or type(value) is kind:
        return value
    if kind is float and type(value) is int:
        return float(value)
    if kind is tuple and type(value) is list:
        return tuple(value)
    raise ValueError(f'{key}={value!r}: {key} takes {"an" if kind is int else "a"} {kind.__name__}, like {default!r}')


def parsed(key, text, default):
    """The value that --key=text stands for: text as it is where the constant is a string, else a Python literal."""
    if isinstance(default, str):
        return text
    try:
        return checked(key, ast.literal_eval(text), default)
    except (SyntaxError, TypeError):
        pass
    except ValueError as error:
        if str(error).startswith(f'{key}='):
            raise
    return checked(key, text, default)  # not a literal: a string, which a None default takes


def known(key, constants, where):
    if key not in constants:
        near = difflib.get_close_matches(key, constants, n=1, cutoff=0)
        raise ValueError(f"{where}: there is no constant '{key}' in this script; the nearest is '{near[0]}' (--help lists them all)")
    return constants[key][0]


def show_constants_and_exit(script, constants):
    print(f'usage: python {os.path.basename(script)} [config/FILE.py ...] [--key=value ...]\n')
    width = max(len(f'--{key}={default!r}') for key, (default, _) in constants.items())
    for key, (default, comment) in constants.items():
        print(f'  {f"--{key}={default!r}":<{width}}  {comment}'.rstrip())
    sys.exit(0)


def one_line_for_bad_input(kind, error, tb):
    """Exceptions that our own files raise on purpose are messages to the user; anything else is a bug and keeps its traceback."""
    raised_in = os.path.dirname(os.path.abspath(traceback.extract_tb(tb)[-1].filename)) if tb else None
    rank = os.environ.get('RANK', '0')
    if rank != '0':  # what all processes find wrong the first one says, and torchrun ends the others meanwhile
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)
    if issubclass(kind, (ValueError, OSError)) and raised_in == os.path.dirname(os.path.abspath(__file__)):
        print(f"error: {f'process {rank}: ' if rank != '0' else ''}{error}", file=sys.stderr, flush=True)
    elif kind.__name__ == 'OutOfMemoryError':
        print(f'error: the device is out of memory ({str(error).split(". ")[0]}): lower batch_size, which changes nothing else', file=sys.stderr, flush=True)
    elif issubclass(kind, KeyboardInterrupt):
        print('interrupted', file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, tb)


def configure(module, argv=None):
    """Override the constants of a script from argv (default: the command line) and return them all as a dict.
    module: the script's globals(). Raises ValueError or FileNotFoundError; from here on these, where one of our files raises
    them, end the script with one line and exit status 1."""
    sys.excepthook = one_line_for_bad_input
    constants = constants_of(module['__file__'])
    for argument in sys.argv[1:] if argv is None else argv:
        if argument in ('--help', '-h'):
            show_constants_and_exit(module['__file__'], constants)
        elif argument.startswith('--'):
            key, equals, text = argument[2:].partition('=')
            default = known(key, constants, argument)
            if not equals:
                raise ValueError(f'{argument}: write --{key}=VALUE, with an equals sign and no space')
            module[key] = parsed(key, text, default)
        elif not argument.endswith('.py'):
            raise ValueError(f"'{argument}' is neither a config file (*.py) nor of the form --key=value")
        elif not os.path.isfile(argument):
            raise FileNotFoundError(f'there is no config file {argument}')
        else:
            before = {key: module[key] for key in constants}  # a config may compute with the values so far
            scope = dict(before)
            try:
                with open(argument, encoding='utf-8') as f:
                    exec(compile(f.read(), argument, 'exec'), scope)
            except SyntaxError as error:
                raise ValueError(f'{argument}, line {error.lineno}: {error.msg}') from None
            except (Exception, SystemExit) as error:
                raise ValueError(f'{argument}: {type(error).__name__}: {error}') from None
            for key, value in scope.items():
                if not (key.startswith('_') or isinstance(value, types.ModuleType) or key in before and value is before[key]):
                    module[key] = checked(key, value, known(key, constants, argument))
    return {key: module[key] for key in constants}
