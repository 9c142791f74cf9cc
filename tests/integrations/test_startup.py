"""`headshare run`: programs that never import headshare know the format, and are otherwise as they would be."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import headshare
from headshare.errors import OptionError, OutputError
from headshare.integrations.transformers.startup import always
from headshare.integrations.transformers.startup.command import ON_PATH, environment, found
from support.shares import share

SOURCE = str(Path(headshare.__file__).parents[1])
KNOWS = (
    "import sys; before = 'headshare' in sys.modules; import transformers; print(before, 'headshare' in sys.modules)"
)


def run(*words: object, path: Path | None = None, **settings: object) -> subprocess.CompletedProcess[str]:
    """`headshare run -- WORDS` in a process of its own."""
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([*([str(path)] if path else []), SOURCE])}
    return subprocess.run(
        [sys.executable, "-m", "headshare", "run", "--", *map(str, words)],
        capture_output=True, text=True, check=False, env=variables, timeout=120, **settings,
    )  # fmt: skip


@pytest.fixture
def stand_ins(tmp_path: Path) -> Path:
    """A folder with a transformers that takes no seconds to import."""
    folder = tmp_path / "packages"
    (folder / "transformers").mkdir(parents=True)
    (folder / "transformers" / "__init__.py").write_text("")
    return folder


def test_a_script_that_never_imports_headshare_loads_a_shared_model(llama: Path, tmp_path: Path) -> None:
    """With the real transformers, which takes its seconds."""
    script = tmp_path / "loads.py"
    script.write_text(
        "import sys\nfrom transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "print(type(model.model.layers[-1].self_attn.q_proj).__module__)\n"
    )
    done = run(script, share(llama, tmp_path / "shared"))
    assert done.stdout.startswith("headshare.storage."), done.stderr


def test_headshare_is_imported_once_transformers_is_in_the_program_and_in_those_that_it_starts(stand_ins: Path) -> None:
    child = "import sys, transformers; sys.exit('headshare' not in sys.modules)"
    starts = f"""if __name__ == "__main__":
    {KNOWS}
    import multiprocessing, subprocess
    print(subprocess.run([sys.executable, "-c", {child!r}]).returncode)
    process = multiprocessing.get_context("spawn").Process(target=exec, args=({child!r},))
    process.start()
    process.join()
    print(process.exitcode)
"""
    script = stand_ins / "starts.py"
    script.write_text(starts)
    assert run(script, path=stand_ins).stdout == "False True\n0\n0\n"


def test_a_program_without_transformers_imports_nothing_of_headshare() -> None:
    names = (
        "[name for name in sys.modules if name.partition('.')[0] in ('headshare', 'torch', 'typing', 'pathlib', 're')]"
    )
    plain = subprocess.run(
        [sys.executable, "-c", f"import sys, colorsys; print({names})"], capture_output=True, text=True
    )
    assert run("-c", f"import sys, colorsys; print({names})").stdout == plain.stdout


def test_streams_words_exit_status_and_signals_are_the_commands_own(stand_ins: Path) -> None:
    program = "import sys; print(sys.argv[1:], input()); print('no', file=sys.stderr); sys.exit(7)"
    done = run("-c", program, "--json", "-h", input="given\n")
    assert (done.returncode, done.stdout, done.stderr) == (7, "['--json', '-h'] given\n", "no\n")
    assert run("-c", "import os, signal; os.kill(os.getpid(), signal.SIGTERM)").returncode == -signal.SIGTERM
    # a shell that the command is does not find SIGPIPE ignored, as Python does for itself
    ignored = run("sh", "-c", "grep SigIgn /proc/self/status").stdout.split()[1]
    assert int(ignored, 16) & 1 << (signal.SIGPIPE - 1) == 0


def test_another_sitecustomize_runs_too(stand_ins: Path) -> None:
    (stand_ins / "sitecustomize.py").write_text("import sys\nsys.customized = __file__\n")
    told = run("-c", f"{KNOWS}; print(sys.customized, sys.modules['sitecustomize'].__file__)", path=stand_ins)
    own = str(stand_ins / "sitecustomize.py")
    assert told.stdout == f"False True\n{own} {own}\n"
    assert told.stderr == ""


def test_a_python_that_has_no_headshare_says_so_once_and_goes_on(stand_ins: Path) -> None:
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ON_PATH), str(stand_ins)])}
    program = "import sys; sys.modules['headshare'] = None; import transformers; import transformers.x"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=variables)
    assert done.stderr.count("loads no models of headshare's format") == 1
    assert "No module named 'transformers.x'" in done.stderr


def test_commands_are_found_beside_headshare_first_and_python_runs_scripts_and_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "one.py"
    script.write_text("")
    assert found(["one.py", "--x"]) == [sys.executable, "one.py", "--x"]
    assert found(["-m", "lm_eval", "-h"]) == [sys.executable, "-m", "lm_eval", "-h"]
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("python", "alone"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    assert found(["python"]) == [str(Path(sys.executable).parent / "python")]
    assert found(["alone", "1"]) == [str(tmp_path / "alone"), "1"]
    for words, said in ((["none"], "no command 'none'"), (["none.py"], "no file none.py"), ([], "say what to run")):
        with pytest.raises(OptionError, match=said):
            found(words)


def test_the_folder_stands_once_in_the_path_before_what_was_there() -> None:
    before = {"PYTHONPATH": os.pathsep.join(("a", "", "b")), "X": "1"}
    once = environment(before)
    assert once == environment(once) == {"PYTHONPATH": os.pathsep.join((str(ON_PATH), "a", "b")), "X": "1"}
    assert environment({})["PYTHONPATH"] == str(ON_PATH)


# ---- `headshare register`


@pytest.fixture
def packages(stand_ins: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages that stands for the environment's, with a transformers."""
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(stand_ins))
    return stand_ins


def started(packages: Path, program: str) -> subprocess.CompletedProcess[str]:
    """What a program prints in a Python that reads the .pth files of this folder, as it does those of its own."""
    begins = f"import site, sys; site.addsitedir({str(packages)!r}); "
    return subprocess.run(
        [sys.executable, "-W", "error", "-X", "dev", "-c", begins + program],
        capture_output=True, text=True, check=False, timeout=120, env={**os.environ, "PYTHONPATH": SOURCE},
    )  # fmt: skip


def test_a_registered_environment_knows_the_format_without_a_command(packages: Path) -> None:
    for _ in range(2):  # twice is once
        assert always.register() == packages / always.NAME
    assert started(packages, KNOWS).stdout == "False True\n"
    names = "import colorsys; print('headshare' in sys.modules)"
    done = started(packages, names)
    assert (done.stdout, done.stderr) == ("False\n", "")
    assert always.unregister()
    assert not always.unregister()
    assert started(packages, KNOWS).stdout == "False False\n"


def test_an_environment_from_which_headshare_is_gone_says_nothing(
    packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(always, "HOOK", packages / "h\u00f6\u00f6k's.py")
    always.register()
    done = started(packages, KNOWS)
    assert (done.stdout, done.stderr) == ("False False\n", "")
    always.HOOK.write_text("print('run')")
    assert started(packages, "pass").stdout == "run\n"


def test_an_environment_that_cannot_be_written_to_is_one_error(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(packages / "none"))
    with pytest.raises(OutputError, match=r"none.*headshare-format"):
        always.register()
    (packages / always.NAME).mkdir()
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(packages))
    with pytest.raises(OutputError, match="headshare-format"):
        always.unregister()
