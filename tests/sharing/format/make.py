"""The script that wrote the shared checkpoints in this folder, once, with the code of the commit that added it.

    PYTHONPATH=src:tests python tests/sharing/format/make.py

They stand for every checkpoint of this format that somebody has. `tests/test_format.py` asks that later code reads,
expands and saves them byte for byte as this code did. They are not written again: what today's code writes would only
agree with itself. So the script refuses where they are. A later format gets folders of its own beside these.

    ties        Llama, bfloat16: q, k and v tied in mode star; a weight that fills a page begins at a page
    scaled      Llama, float16: q, k, v and o tied, each tied column of o with a scale; refitted
    factored    GPT-2 (fused, transposed, with biases), bfloat16: columns of o as products of rank 1 and 2
    removed     Qwen2 (biases of q, k and v), bfloat16: heads and neurons removed
    packed      Llama with biases, bfloat16: q, k and v tied, matrices of 4 bits in groups of 8
    everything  Phi-3 (fused), bfloat16, in two files: ties, scales, products and removals; refitted

`expected.json` holds SHA-256 digests for each folder: its files, its plan, the file that the plan is saved as, the
files of the expanded folder, and the weights that transformers saves of the loaded model.
Products have ranks of at most 2, because a sum of two is rounded alike on every machine.
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf
from nearest import stand_in
from test_format import EXPECTED, FOLDER, found_of

import headshare as hs
from headshare.architecture.config import text_config
from headshare.architecture.recognition import attention_layout, ffn_layout
from headshare.calibration.gptq import round_by_gptq
from headshare.evaluation.verify import verify
from headshare.plan.layout import Layout
from headshare.plan.low_rank import Factored
from headshare.plan.plan import SharePlan
from headshare.plan.removal import Removal
from headshare.plan.section import Choice
from headshare.plan.ties import Selection
from headshare.plan.units import HeadUnit, Part, Tie

VOCABULARY = 40
TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
COMMON = {
    **TOKENS,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
QKV = (Part.Q, Part.K, Part.V)


def dense_model(config: tf.PretrainedConfig, dtype: torch.dtype, **save: object) -> hs.Checkpoint:
    """A model of this configuration with random weights, biases and norms too, as the folder `dense`."""
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (1 if parameter.ndim == 1 else 0))
    model.to(dtype).save_pretrained("dense", **save)
    return hs.open_checkpoint("dense")


def calibration() -> hs.Calibration:
    """Tokens to refit on."""
    draw = torch.Generator().manual_seed(1)
    return hs.Calibration(torch.randint(3, VOCABULARY, (32, 16), generator=draw), False, "drawn tokens", 0)


def heads(dense: hs.Checkpoint) -> Layout:
    return attention_layout(text_config(dense.config), dense.shapes)


def neurons(dense: hs.Checkpoint, groups: int) -> Layout:
    return ffn_layout(text_config(dense.config), dense.shapes, groups)


def ties(*four: tuple[int, int, int, int]) -> tuple[Tie, ...]:
    return tuple(Tie(HeadUnit(a, b), HeadUnit(c, d)) for a, b, c, d in four)


def make_ties(out: Path) -> None:
    config = tf.LlamaConfig(**{**COMMON, "hidden_size": 32, "intermediate_size": 16, "head_dim": 16})
    dense = dense_model(config, torch.bfloat16)
    plan = hs.make_plan(hs.score_units(dense), 0.5, mode="star")
    hs.share(dense, plan).save(out)


def make_scaled(out: Path) -> None:
    dense = dense_model(tf.LlamaConfig(**COMMON), torch.float16)
    (chosen,) = hs.make_plan(hs.score_units(dense, parts="qkvo"), 0.5, parts="qkvo").selections
    scaled = Selection(layout=chosen.layout, ties=chosen.ties, scale=True, chosen=chosen.chosen)
    plan = SharePlan(model_type="llama", selections=(scaled,))
    hs.refit(hs.share(dense, plan), calibration()).save(out)


def make_factored(out: Path) -> None:
    config = tf.GPT2Config(**TOKENS, n_embd=16, n_layer=3, n_head=4, n_positions=32, n_inner=24)
    dense = dense_model(config, torch.bfloat16)
    plan = SharePlan(
        model_type="gpt2",
        factored=(
            Factored(
                layout=heads(dense).only((Part.O,)),
                units={0: [1], 2: [0, 2, 3]},
                ranks={0: [2], 2: [1, 2, 1]},
                chosen=Choice(match="drawn", ratio=0.25),
            ),
        ),
    )
    hs.share(dense, plan).save(out)


def make_removed(out: Path) -> None:
    config = tf.Qwen2Config(**{**COMMON, "num_attention_heads": 8, "num_key_value_heads": 4})
    dense = dense_model(config, torch.bfloat16)
    plan = SharePlan(
        model_type="qwen2",
        removals=(
            Removal(layout=heads(dense), removed={0: [3], 2: [0, 1, 3]}),
            Removal(layout=neurons(dense, 24), removed={0: [0, 23], 1: range(4, 9), 2: [1, 3, 5, 6, 7]}),
        ),
    )
    hs.share(dense, plan).save(out)


def make_packed(out: Path) -> None:
    dense = dense_model(tf.LlamaConfig(**COMMON, attention_bias=True), torch.bfloat16)
    plan = hs.make_plan(hs.score_units(dense), 0.5)
    shared = hs.open_checkpoint(hs.share(dense, plan).save("shared"))
    with pytest.MonkeyPatch.context() as patched:  # the nearest numbers stand for the ones of gptqmodel
        stand_in(patched)
        round_by_gptq(shared, calibration(), group=8).save(out)


def make_everything(out: Path) -> None:
    config = tf.Phi3Config(**{**COMMON, "num_hidden_layers": 4, "num_key_value_heads": 4})
    dense = dense_model(config, torch.bfloat16, max_shard_size="12KB")
    units = heads(dense)
    plan = SharePlan(
        model_type="phi3",
        selections=(
            Selection(layout=units.only(QKV), ties=ties((2, 0, 0, 1), (3, 1, 1, 2))),
            Selection(layout=units.only((Part.O,)), ties=ties((1, 1, 0, 1), (2, 0, 0, 1)), scale=True),
            Selection(layout=neurons(dense, 4), ties=ties((1, 0, 0, 0), (3, 2, 0, 1))),
        ),
        removals=(
            Removal(layout=units, removed={0: [3], 1: [0], 3: [0]}),
            Removal(layout=neurons(dense, 24), removed={0: [12, 13, 14], 1: [7, 23], 2: [1, 2], 3: [0, 20]}),
        ),
        factored=(Factored(layout=units.only((Part.O,)), units={3: [1, 2]}, ranks={3: [1, 2]}),),
    )
    hs.refit(hs.share(dense, plan), calibration()).save(out)


MAKERS: dict[str, Callable[[Path], None]] = {
    "ties": make_ties,
    "scaled": make_scaled,
    "factored": make_factored,
    "removed": make_removed,
    "packed": make_packed,
    "everything": make_everything,
}


def main() -> None:
    """Write all folders and what is expected of them, none of which may be there."""
    for path in (EXPECTED, *(FOLDER / name for name in MAKERS)):
        if path.exists():
            sys.exit(f"{path} is there, and what was written once is not written again.")
    expected = {}
    for name, make in MAKERS.items():
        with tempfile.TemporaryDirectory() as work:
            os.chdir(work)  # so that a checkpoint says of its base model "dense", and not where that was
            make(FOLDER / name)
            found = verify(hs.open_checkpoint(FOLDER / name), hs.open_checkpoint("dense"))
            assert found.ok, (name, found.problems)
            expected[name] = found_of(name, Path(work))
    EXPECTED.write_text(json.dumps(expected, indent=2) + "\n")


if __name__ == "__main__":
    main()
