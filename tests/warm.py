"""A Python that has imported torch once and forks for each script it is asked to run: what a user
sees of `python train.py ...`, without the seconds of the imports. Started by conftest.py's `run`.

Of our own files it has imported none, and it computes nothing: a fork has no threads but its own.
A line of stdin is a job, dict(script, arguments, cwd, environment, stdout, stderr: files to write);
two lines of stdout are its process, at once, and its status as os.waitpid() gives it."""

import gc
import json
import os
import signal
import sys
import types

import numpy  # noqa: F401
import torch._dynamo  # noqa: F401 (what the first step of an optimizer imports)

TIMEOUT = 600  # seconds

gc.collect()
gc.freeze()  # else a fork's last collection copies and frees all that torch is

for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if not child:
        break
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
else:
    sys.exit()

# --- the script's process: what it raises goes through to the interpreter, as in one of its own

signal.alarm(TIMEOUT)
os.environ.clear()
os.environ.update(job['environment'])
os.chdir(job['cwd'])
for descriptor, path in enumerate((os.devnull, job['stdout'], job['stderr'])):
    os.dup2(os.open(path, os.O_RDWR | os.O_APPEND), descriptor)
sys.argv = [job['script'], *job['arguments']]
sys.path[0] = os.path.dirname(job['script'])
sys.modules['__main__'] = main = types.ModuleType('__main__')
main.__file__ = job['script']
with open(job['script'], 'rb') as f:
    code = compile(f.read(), job['script'], 'exec')
exec(code, vars(main))
