"""What is imported before a command runs: nothing that takes seconds."""

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import headshare
from headshare.cli.catalogue.commands import COMMANDS
from headshare.storage.names import NAMES

SLOW = ("torch", "transformers", "safetensors", "accelerate", "numpy", "jaxtyping", "huggingface_hub")

SEEN = """
import contextlib, io, json, os, sys
from headshare.cli.app import main

def run(*words, **environment):
    os.environ.update(environment)
    sys.argv = ["headshare", *words]
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main()
    for name in environment:
        del os.environ[name]
    return [out.getvalue(), [name for name in {slow} if name in sys.modules]]

seen = {{"--version": run("--version"), "--help": run("--help")}}
for command in {commands}:
    seen[command] = run(command, "--help", TERMINAL_WIDTH="200")
def complete(words):
    return run(COMP_WORDS=words, COMP_CWORD=str(len(words.split())), _HEADSHARE_COMPLETE="complete_bash")
seen["TAB"] = complete("headshare ")
seen["share --TAB"] = complete("headshare share --match ")
print(json.dumps(seen))
"""


def fresh(program: str) -> str:
    """The output of a program in an interpreter of its own, which imports headshare from where this one does."""
    environment = {**os.environ, "PYTHONPATH": str(Path(headshare.__file__).parents[1]), "OMP_WAIT_POLICY": "PASSIVE"}
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, env=environment, timeout=120
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_help_and_completion_import_nothing_that_takes_seconds() -> None:
    seen = json.loads(fresh(SEEN.format(slow=SLOW, commands=list(COMMANDS))))
    assert {what: slow for what, (_, slow) in seen.items() if slow} == {}
    # and they say what they are to say, choices out of the registries included
    assert seen["--version"][0].startswith("headshare ")
    assert all(f" {command} " in seen["--help"][0] for command in COMMANDS)
    assert all(f"Usage: headshare {command} " in seen[command][0] for command in COMMANDS)
    assert ", ".join(NAMES) in seen["bench"][0]
    assert set(COMMANDS) <= set(seen["TAB"][0].split())
    assert {"qk", "separate", "output"} <= set(seen["share --TAB"][0].split())


def test_the_format_registers_when_transformers_is_imported_after_headshare() -> None:
    said = fresh(
        "import sys, headshare\n"
        "before = 'transformers' in sys.modules or 'torch' in sys.modules\n"
        "import transformers\n"
        "transformers.PreTrainedModel\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING\n"
        "print(before, 'headshare' in AUTO_QUANTIZATION_CONFIG_MAPPING, 'headshare' in AUTO_QUANTIZER_MAPPING)"
    )
    assert said == "False True True\n"


@pytest.mark.parametrize("package", ["", ".plan", ".evaluation", ".training", ".experiments"])
def test_lazy_names_are_those_that_type_checkers_see(package: str) -> None:
    module = importlib.import_module(f"headshare{package}")
    tree = ast.parse(Path(str(module.__file__)).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert set(module.__all__) == set(seen) - {"__version__"}
    for name, home in seen.items():
        assert getattr(module, name) is getattr(importlib.import_module(str(home)), name)
        assert name in dir(module)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        module.nothing  # noqa: B018 - it is asked for
