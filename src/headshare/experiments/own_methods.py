"""Methods that a person has written: a Python file of their own, which is run so that it registers them."""

import sys
import traceback
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from headshare.errors import OptionError
from headshare.experiments.methods import METHODS
from headshare.files.digests import SHA256, file_digest
from headshare.files.printable import reason_of
from headshare.files.untrusted import is_file


def methods_from(file: Path) -> list[str]:
    """Run a Python file that registers methods by `headshare.experiments.method`. Returns their names.

    The file is code, so only one that the person at the keyboard names is ever run: no checkpoint and no recipe can
    name one. Its digest becomes part of what its cells are kept under, so that a method that was changed is measured
    again.

    Raises:
        OptionError: if the file is missing or fails, registers nothing, or takes the name of one of our methods.
    """
    if not is_file(file):
        raise OptionError(f"there is no file {file} of methods.")
    before = dict(METHODS)
    for name in [name for name, method in METHODS.items() if method.digest]:
        del METHODS[name]
    ours = dict(METHODS)
    try:
        _run(file)
        if taken := [name for name, method in ours.items() if METHODS[name] is not method]:
            raise OptionError(f"{file} registers '{taken[0]}', which is a method already. Choose another name.")
        names = [name for name in METHODS if name not in ours]
        if not names:
            raise OptionError(f"{file} registers no method. Decorate a function: @method('name', 'what it does')")
    except BaseException:
        METHODS.clear()
        METHODS.update(before)
        raise
    digest = file_digest(file, SHA256)
    for name in names:
        METHODS[name] = replace(METHODS[name], digest=digest)
    return names


def _run(file: Path) -> None:
    """Run the file as a module of its own."""
    spec = spec_from_file_location(f"methods_of_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise OptionError(f"{file} is no Python file: its name should end in .py.")
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for the module that they are in
    try:
        spec.loader.exec_module(module)
    except OptionError:
        raise
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        where = f" at line {lines[-1]}" if lines else ""
        raise OptionError(f"{file} fails{where}: {reason_of(error)}.") from error
