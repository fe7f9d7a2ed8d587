"""How the repository reads: a linter, the width of lines, the size of files, the named packages."""

import ast
import glob
import importlib.util
import os
import re
import subprocess
import sys

import pytest

from conftest import ROOT

PACKAGE_OF = dict(
    mauve='mauve-text', flash_attn='flash-attn', huggingface_hub='huggingface-hub',
    mamba_ssm='mamba-ssm', lm_eval='lm-eval',
)


def files(*patterns):
    found = [path for pattern in patterns for path in glob.glob(os.path.join(ROOT, pattern))]
    assert found
    return sorted(found)


def read(path):
    with open(path, encoding='utf-8') as f:
        return f.read()


@pytest.mark.skipif(not importlib.util.find_spec('ruff'), reason='needs ruff (pip install ruff)')
def test_the_linter_finds_nothing():
    command = ['ruff', 'check', '--select', 'E,F,B', '--line-length', '100', '--no-cache', '.']
    done = subprocess.run(
        [sys.executable, '-m', *command], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_line_is_wider_than_100_columns():
    wide = [
        f'{os.path.relpath(path, ROOT)}:{number}: {len(line)} columns'
        for path in files('*.py', 'tests/*.py', 'config/*.py')
        for number, line in enumerate(read(path).splitlines(), start=1)
        if len(line) > 100
    ]
    assert not wide, '\n'.join(wide)


def test_the_readme_stays_small():
    assert os.path.getsize(os.path.join(ROOT, 'README.md')) <= 14_336


def imported_modules(path):
    """Top-level names of all modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(read(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition('.')[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.partition('.')[0]


def test_every_imported_package_is_named_in_the_requirements():
    paths = files('*.py', 'tests/*.py', 'config/*.py')
    ours = {os.path.splitext(os.path.basename(path))[0] for path in paths}
    modules = {module for path in paths for module in imported_modules(path)}
    packages = {PACKAGE_OF.get(name, name) for name in modules - ours - sys.stdlib_module_names}
    requirements = read(os.path.join(ROOT, 'requirements.txt')).replace('_', '-')
    named = set(re.findall(r'[\w-]+', requirements))  # optional ones stand in a comment
    assert len(packages) > 10
    assert packages <= named, f'not in requirements.txt: {sorted(packages - named)}'
