import io
import json
from pathlib import Path

import pytest

import headshare as hs
from headshare.calibration.layerwise.layers import Layers
from headshare.errors import CheckpointError, HeadshareError
from headshare.integrations.transformers.loading import empty_model, load_tokenizer
from support import tiny
from support.command_line import Run
from support.texts import a_text, add_tokenizer


@pytest.fixture
def folder(llama: Path) -> Path:
    return add_tokenizer(llama)


def change(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def put_code(folder: Path, name: str, base: str) -> None:
    (folder / "own.py").write_text(
        f"open({str(folder / 'CODE_RAN')!r}, 'w')\nfrom transformers import {base}\nclass {name}({base}): pass\n"
    )


def own_tokenizer(folder: Path, auto_map: object) -> None:
    put_code(folder, "Own", "PreTrainedTokenizerFast")
    change(folder / "tokenizer_config.json", tokenizer_class="Own", auto_map=auto_map)


@pytest.mark.parametrize("auto_map", [{"AutoTokenizer": ["own.Own", None]}, ["own.Own", None], "own.Own"])
def test_a_tokenizers_own_code_never_runs_whatever_stands_on_standard_input(
    folder: Path, auto_map: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own_tokenizer(folder, auto_map)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    with pytest.raises(CheckpointError, match=r"needs tokenizer code of its own.*does not run"):
        load_tokenizer(hs.open_checkpoint(folder))
    assert not (folder / "CODE_RAN").exists()
    assert "Do you wish" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "command",
    [
        "eval {} --text {} --window 16",
        "generate {} --prompt w5",
        "share {} out --ratio 0.3 --match output --calibration {} --calibration-window 16",
        "train {} out --data {} --max_steps 1 --context 16",
    ],
)
def test_no_command_runs_it_or_asks(
    folder: Path,
    command: str,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own_tokenizer(folder, {"AutoTokenizer": ["own.Own", None]})
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    done = run(*command.format(folder, a_text(tmp_path / "text.txt")).split())
    assert done.status == 1
    assert "needs tokenizer code of its own" in done.err
    assert not (folder / "CODE_RAN").exists()


def test_a_tokenizer_that_transformers_knows_loads_without_the_code_beside_it(folder: Path) -> None:
    put_code(folder, "PreTrainedTokenizerFast", "PreTrainedTokenizerFast")
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.PreTrainedTokenizerFast", None]})
    assert load_tokenizer(hs.open_checkpoint(folder))("w5 w6")["input_ids"] == [5, 6]
    assert not (folder / "CODE_RAN").exists()


def test_a_model_of_its_own_code_is_refused_before_its_tokenizer_is_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_code(folder, "Own", "LlamaConfig")
    change(folder / "config.json", model_type="own", auto_map={"AutoConfig": "own.Own"})
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    for open_it in (load_tokenizer, hs.load, empty_model):
        given = folder if open_it is hs.load else hs.open_checkpoint(folder)
        with pytest.raises(CheckpointError, match="needs model code of its own"):
            open_it(given)
    assert not (folder / "CODE_RAN").exists()


@pytest.mark.parametrize(
    "named",
    [
        {"attn_implementation": "somebody/kernel"},
        {"_attn_implementation": "somebody/kernel@v1:attention"},
        {"attn_implementation": {"": "eager", "text_config": "paged|somebody/kernel"}},
        {"experts_implementation": "somebody/kernel"},
        {"text_config": {"attn_implementation": "somebody/kernel"}},
        {"layers_config": [{"_attn_implementation_internal": "somebody/kernel"}]},
    ],
)
def test_a_kernel_that_a_configuration_names_is_not_fetched(
    folder: Path, named: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.integrations import hub_kernels

    fetched: list[object] = []
    for loader in ("load_and_register_attn_kernel", "lazy_load_kernel"):
        monkeypatch.setattr(hub_kernels, loader, lambda *args, **_: fetched.append(args), raising=False)
    change(folder / "config.json", **named)
    checkpoint = hs.open_checkpoint(folder)
    for open_it in (lambda: hs.load(folder), lambda: empty_model(checkpoint), lambda: load_tokenizer(checkpoint)):
        with pytest.raises(CheckpointError, match=r"names a kernel to fetch and run.*somebody/kernel"):
            open_it()
    with pytest.raises(HeadshareError, match=r"names a kernel|not a valid 'llama' configuration"):
        Layers(checkpoint)
    assert not fetched


def test_attention_by_one_of_transformers_own_ways_is_no_kernel(folder: Path) -> None:
    change(folder / "config.json", attn_implementation="eager")
    assert hs.load(folder)(tiny.tokens()).logits.isfinite().all()


def test_a_pickle_that_a_configuration_names_as_its_weights_is_not_opened(folder: Path) -> None:
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04not a safetensors file")
    change(folder / "config.json", transformers_weights="adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model.bin.*not a safetensors file"):
        hs.load(folder)
