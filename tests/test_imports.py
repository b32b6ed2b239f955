"""Importing any module of the library is cheap and silent: it draws and prints nothing, and brings
no heavy package along. One process loads torch once and forks for every module.
"""

import json
import subprocess
import sys

from conftest import CHAPTERS, ROOMED, module

HEAVY = ("matplotlib", "seaborn", "ipywidgets", "transformers", "accelerate", "pandas", "scipy")
MAKERS = ("nbdev", "fastcore")  # what makes the library is no part of it

IMPORTER = """
import contextlib, importlib, io, json, os, sys
import torch

def imported(name):
    "What is wrong with importing a module, in a process of its own."
    read, write = os.pipe()
    if child := os.fork():
        os.close(write)
        with os.fdopen(read) as answer:
            text = answer.read()
        os.waitpid(child, 0)
        return json.loads(text) if text else "the process died"
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            importlib.import_module(name)
        heavy = sorted(set(HEAVY) & set(sys.modules))
        wrong = f"brings {heavy}" if heavy else f"says {said.getvalue()!r}" * bool(said.getvalue())
    except BaseException as error:
        wrong = repr(error)
    os.write(write, json.dumps(wrong).encode())
    os._exit(0)

HEAVY, names = json.loads(sys.argv[1])
print(json.dumps({n: wrong for n in names if (wrong := imported(n))}))
"""


def test_every_import_is_cheap_and_silent():
    names = [f"tfbench.{module(p).removesuffix('.__init__')}" for p in [*ROOMED, *CHAPTERS]]
    arguments = json.dumps([HEAVY + MAKERS, names])
    command = [sys.executable, "-W", "error::SyntaxWarning", "-c", IMPORTER, arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {}
