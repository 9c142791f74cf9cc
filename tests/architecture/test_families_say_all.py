"""A row of the families' table is all that is said of a family: no module beside `architecture` names one."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

import headshare
import headshare as hs
from headshare.architecture.families import FAMILIES, Linear
from headshare.architecture.model_class import predicts_next
from headshare.architecture.modules import linear_of
from headshare.sharing.size import parameter_infos
from headshare.text.windows import longest_window
from support import tiny

SOURCE = Path(headshare.__file__).parent
TYPES = {model_type for family in FAMILIES for model_type in family.model_types}
# Names that are not a family's where they stand: module, name, and what it is there.
ALLOWED = {
    ("checkpoint/contents.py", "LayerNorm"): "a module of sentence-transformers, by its folder's name",
    ("experiments/peers/slicegpt.py", "LayerNorm"): "torch's own class, which a norm is or is not",
    ("evaluation/likelihoods.py", "position_ids"): "an argument that every model is called with",
    ("integrations/gguf/vocabulary.py", "gpt2"): "GGUF's word for byte-level tokenizers, of any family",
    ("integrations/gguf/vocabulary.py", "llama"): "GGUF's word for tokenizers of SentencePiece",
    ("integrations/gguf/splitting.py", "llama"): "llama-bpe, a name of a tokenizer's splitting",
    ("integrations/gguf/splitting.py", "qwen2"): "the same",
    ("integrations/vllm/models.py", "LlamaForCausalLM"): "vLLM's own class, which reduced models are made from",
    ("integrations/vllm/models.py", "o_proj"): "the module of it that a layer without attention stands in for",
}


def class_names() -> set[str]:
    """Of configurations, models and linear modules of the table's families."""
    mappings = [
        CONFIG_MAPPING_NAMES,
        *(found for name, found in vars(modeling_auto).items() if name.endswith("MAPPING_NAMES")),
    ]
    found = {mapping.get(model_type) for mapping in mappings for model_type in TYPES}
    names = {name for one in found if one for name in ((one,) if isinstance(one, str) else one)}
    return names | {family.linear.name for family in FAMILIES} - {"Linear"}


def tensor_names() -> set[str]:
    """Steps of tensors' paths that are no words: with an underscore, a digit or a capital, and those of embeddings."""
    paths: set[str] = set()
    for family in FAMILIES:
        paths |= {*vars(family.qkv).values(), *vars(family.ffn).values(), family.o, *family.tied_outputs}
        paths |= {*family.buffers, *family.masks, *(one for pair in family.old_names for one in pair)}
    steps = {step for path in paths for step in path.split(".")}
    telling = {step for step in steps if re.search(r"[_0-9A-Z]", step)}
    return telling | {one for family in FAMILIES for one in (family.embedding, *family.optional)}


def words_of(tree: ast.AST) -> Iterator[str]:
    """Words in string literals and names in code. Docstrings and help texts may name what they like."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    left_out: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            left_out.add(id(node.body[0].value))  # type: ignore[attr-defined]
        elif isinstance(node, ast.keyword) and node.arg == "help":
            left_out |= {id(one) for one in ast.walk(node.value)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in left_out:
            yield from re.findall(r"[A-Za-z0-9_]+(?:-[A-Za-z0-9_]+)*", node.value)
            yield from re.findall(r"[A-Za-z0-9_]+", node.value)
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.alias):
            yield from node.name.split(".")


def named_in(code: str, words: set[str]) -> set[str]:
    return set(words_of(ast.parse(code))) & words


def test_the_words_of_families_are_found_in_code_and_not_in_its_docs() -> None:
    assert {"llama", "xlm-roberta", "LlamaForCausalLM", "BertConfig", "FalconLinear"} <= TYPES | class_names()
    assert {"q_proj", "W_pack", "wte", "pooler", "masked_bias", "fc1", "dense_h_to_4h"} <= tensor_names()
    words = TYPES | class_names() | tensor_names()
    assert named_in('"""llama."""\nhelp = f("gpt2", help="opt")\nx.Conv1D', words) == {"gpt2", "Conv1D"}
    assert named_in('if kind in ("xlm-roberta",): pass', words) == {"xlm-roberta", "roberta"}
    assert named_in("from transformers import FalconModel", words) == {"FalconModel"}
    assert named_in('a = f"{b}.attn.c_attn.weight"', words) == {"c_attn"}


def test_no_module_beside_the_table_names_a_family_its_classes_or_its_tensors() -> None:
    words, found = TYPES | class_names() | tensor_names(), set()
    for path in SOURCE.rglob("*.py"):
        module = path.relative_to(SOURCE).as_posix()
        if not module.startswith("architecture/"):
            found |= {(module, word) for word in named_in(path.read_text(encoding="utf-8"), words)}
    assert found == set(ALLOWED)


def test_every_model_type_is_in_one_row_and_transformers_knows_it_or_runs_its_own_code() -> None:
    listed = [model_type for family in FAMILIES for model_type in family.model_types]
    assert len(listed) == len(set(listed))
    assert set(listed) - set(CONFIG_MAPPING_NAMES) == {"baichuan"}


# ---- what rows say is what happens


class Renamed(torch.nn.Linear):
    pass


class Doubled(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_a_linear_modules_class_says_how_it_multiplies() -> None:
    falcon = tf.FalconForCausalLM(tf.FalconConfig(**tiny.FALCON))
    conv, linear = Conv1D(6, 4), linear_of(falcon.transformer.h[0].mlp.dense_h_to_4h)
    assert linear is not None
    assert (linear.name, linear.in_out, linear.bias_after) == ("FalconLinear", False, True)
    assert linear_of(conv) == Linear("Conv1D", in_out=True, sizes=("nx", "nf"))
    assert [getattr(conv, size) for size in linear_of(conv).sizes] == list(conv.weight.shape)
    assert linear_of(torch.nn.Linear(4, 6)) == linear_of(Renamed(4, 6)) == Linear()
    assert linear_of(Doubled(4, 6)) is None
    assert linear_of(torch.nn.LayerNorm(4)) is None


def test_a_model_whose_stack_several_rows_describe_has_one_stack(tmp_path: Path) -> None:
    tf.ElectraModel(tf.ElectraConfig(**tiny.COMMON, embedding_size=32)).save_pretrained(tmp_path / "dense")
    dense = hs.open_checkpoint(tmp_path / "dense")
    plan = hs.make_plan(hs.score_units(dense), 0.3)
    assert plan.selections[0].layout.layers == tiny.COMMON["num_hidden_layers"]


def test_a_model_that_only_listed_kin_know_is_a_row_as_they_are() -> None:
    config = tf.CamembertConfig(**tiny.COMMON)
    assert longest_window(config.to_dict()) == 63
    assert longest_window(tf.BertConfig(**tiny.COMMON).to_dict()) == 64
    assert not predicts_next("CamembertForCausalLM", config.to_dict())
    config.is_decoder = True
    assert predicts_next("CamembertForCausalLM", config.to_dict())


@pytest.mark.parametrize("name", ["bert", "roberta", "camembert", "gpt2", "gpt_neox"])
def test_what_older_checkpoints_store_beside_parameters_is_not_counted(name: str, tmp_path: Path) -> None:
    """Names as these models' own code gave them to masks and positions when they were stored."""
    stored = {
        "bert": {"bert.embeddings.position_ids": (1, 64)},
        "roberta": {"roberta.embeddings.position_ids": (1, 64)},
        "camembert": {"roberta.embeddings.position_ids": (1, 64)},
        "gpt2": {"transformer.h.0.attn.bias": (1, 1, 64, 64), "transformer.h.0.attn.masked_bias": ()},
        "gpt_neox": {
            "gpt_neox.layers.0.attention.bias": (1, 1, 64, 64),
            "gpt_neox.layers.0.attention.masked_bias": (),
            "gpt_neox.layers.0.attention.rotary_emb.inv_freq": (4,),
        },
    }[name]
    if name == "camembert":
        tf.CamembertForMaskedLM(tf.CamembertConfig(**tiny.COMMON)).save_pretrained(tmp_path)
    else:
        tiny.make(name, tmp_path)
    before = parameter_infos(hs.open_checkpoint(tmp_path))
    file = tmp_path / "model.safetensors"
    tensors = load_file(file) | {key: torch.ones(shape) for key, shape in stored.items()}
    tensors["extra.attention.bias"] = torch.ones(3)
    save_file(tensors, file, metadata={"format": "pt"})
    assert set(parameter_infos(hs.open_checkpoint(tmp_path))) == {*before, "extra.attention.bias"}
