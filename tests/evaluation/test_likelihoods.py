"""Log-likelihoods of endings beside those of lm-evaluation-harness's own model, which reads every context anew."""

import inspect
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models

from headshare.errors import EvaluationError
from headshare.evaluation.harness import _hushed
from headshare.evaluation.likelihoods import ContextsOnce
from headshare.integrations.transformers.caches import cache_argument
from support import tiny

LONGEST = 64
CAUSAL = sorted(
    name for name, (kind, _, _) in tiny.FAMILIES.items() if kind.__name__.endswith(("CausalLM", "HeadModel"))
)
SLIDING = {
    "mistral": tf.MistralConfig(**{**tiny.WIDE_HEADS, "sliding_window": 7}),
    "gemma3": tf.Gemma3TextConfig(**{**tiny.WIDE_HEADS, "sliding_window": 7}),
}
LONG = {"rope_theta": 10000.0, "original_max_position_embeddings": 32}
SCALED = {
    "phi3": tf.Phi3Config(
        **tiny.GROUPED,
        original_max_position_embeddings=32,
        rope_parameters={**LONG, "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0] * 4},
    ),
    "llama-gqa": tf.LlamaConfig(**tiny.GROUPED, rope_parameters={**LONG, "rope_type": "dynamic", "factor": 4.0}),
}
RECURRENT = tf.Lfm2Config(**tiny.GROUPED, layer_types=["conv", "full_attention"] * 2)


def built(kind: Any, config: Any) -> Any:
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter if parameter.ndim == 1 else 0))
    return model


def wrapped(kind: Any, model: Any, batch_size: int) -> Any:
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with _hushed():
        return kind(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=LONGEST)


def asked() -> list[tuple[None, list[int], list[int]]]:
    """Options of questions: endings of one token and of many, alike but for their last, contexts of one token, ones
    that do not fit beside their ending, and a question that is asked twice."""
    draw = random.Random(0)

    def some(count: int) -> list[int]:
        return draw.choices(range(3, tiny.VOCABULARY), k=count)

    found: list[tuple[None, list[int], list[int]]] = []
    for length in (1, 2, 9, 9, 23, 40, 61, 90):
        context = some(length)
        found += [(None, context, some(count)) for count in (1, 1, 4, 7, 2)]
        found += [(None, context, [5, 6, last]) for last in (7, 8)]
    found += [(None, some(length), some(3)) for length in (1, 5, 30, 70)]
    found += [(None, some(2), some(LONGEST)), found[20]]
    draw.shuffle(found)
    return found


def answers(model: Any) -> tuple[list[float], list[bool]]:
    with _hushed():
        values, greedy = zip(*model._loglikelihood_tokens(asked(), disable_tqdm=True), strict=True)
    return list(values), list(greedy)


@pytest.mark.parametrize("batch_size", [1, 4, 16])
@pytest.mark.parametrize("name", CAUSAL)
def test_likelihoods_are_those_of_the_harness(name: str, batch_size: int) -> None:
    model = built(*tiny.FAMILIES[name][:2])
    theirs, ours = (answers(wrapped(kind, model, batch_size)) for kind in (HFLM, ContextsOnce))
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5, abs=1e-5)
    assert ours[1] == theirs[1]


@pytest.mark.parametrize("name", SLIDING)
def test_likelihoods_hold_where_attention_is_to_a_window(name: str) -> None:
    model = built(tiny.FAMILIES[name][0], SLIDING[name])
    theirs, ours = (answers(wrapped(kind, model, 5)) for kind in (HFLM, ContextsOnce))
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("name", SCALED)
def test_likelihoods_hold_where_positions_depend_on_the_length(name: str) -> None:
    """A context whose keys were turned as in short texts is not gone on from as in long ones."""
    model = built(tiny.FAMILIES[name][0], SCALED[name])
    theirs, ours = (answers(wrapped(kind, model, 5)) for kind in (HFLM, ContextsOnce))
    assert ours == theirs


@pytest.mark.parametrize(("context", "ending"), [([5, 6], []), ([], [5, 6])])
def test_what_has_no_tokens_is_refused(context: list[int], ending: list[int]) -> None:
    ours = wrapped(ContextsOnce, built(*tiny.FAMILIES["llama-gqa"][:2]), 4)
    with pytest.raises(EvaluationError, match="has no token"):
        ours._loglikelihood_tokens([(("asked", "for"), [5, 6], [7]), (("so", "little"), context, ending)])


def test_an_ending_that_is_likeliest_in_every_token_is_said_to_be_so() -> None:
    model = built(*tiny.FAMILIES["llama-gqa"][:2])
    context, ending = [5, 6, 7], list[int]()
    for _ in range(4):
        ending.append(int(model(torch.tensor([context + ending])).logits[0, -1].argmax()))
    other = [*ending[:-1], (ending[-1] + 1) % tiny.VOCABULARY]
    found = wrapped(ContextsOnce, model, 4)._loglikelihood_tokens([(None, context, ending), (None, context, other)])
    assert [greedy for _, greedy in found] == [True, False]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[tuple[int, int]]]:
    """How many tokens each call of a model read, and of how many it said what comes next."""

    def watch(model: Any) -> list[tuple[int, int]]:
        seen: list[tuple[int, int]] = []
        own = model.forward

        def forward(input_ids: torch.Tensor, **rest: Any) -> Any:
            out = own(input_ids, **rest)
            seen.append((input_ids.numel(), out.logits.shape[:2].numel()))
            return out

        forward.__signature__ = inspect.signature(own)  # type: ignore[attr-defined]
        monkeypatch.setattr(model, "forward", forward)
        return seen

    return watch


def test_a_context_is_read_once_and_only_endings_are_predicted(read: Callable[[Any], list[tuple[int, int]]]) -> None:
    model = built(*tiny.FAMILIES["llama-gqa"][:2])
    seen = read(model)
    options = [(None, list(range(3, 43)), [50 + option] * 3) for option in range(4)]
    wrapped(ContextsOnce, model, 4)._loglikelihood_tokens(options)
    assert seen == [(39, 1), (4 * 3, 4 * 3)]
    seen.clear()
    wrapped(ContextsOnce, model, 4)._loglikelihood_tokens(options[:1])
    assert seen == [(42, 3)]


def test_options_that_differ_in_their_last_token_are_one_row(read: Callable[[Any], list[tuple[int, int]]]) -> None:
    model = built(*tiny.FAMILIES["llama-gqa"][:2])
    seen = read(model)
    wrapped(ContextsOnce, model, 4)._loglikelihood_tokens([(None, [5, 6, 7], [letter]) for letter in (8, 9, 10, 11)])
    assert seen == [(3, 1)]


def test_models_that_keep_no_keys_and_values_run_as_the_harness_runs_them() -> None:
    model = built(tf.Lfm2ForCausalLM, RECURRENT)
    ours = wrapped(ContextsOnce, model, 4)
    assert answers(ours) == answers(wrapped(HFLM, model, 4))
    assert not ours.keeps_contexts


def test_keys_and_values_go_under_the_name_that_the_installed_release_gives_them() -> None:
    class Older:
        def forward(self, input_ids: Any, past_key_values: Any = None) -> None: ...

    class Newer:
        def forward(self, input_ids: Any, cache: Any = None) -> None: ...

    class Neither:
        def forward(self, input_ids: Any) -> None: ...

    names = [cache_argument(kind()) for kind in (Older, Newer, Neither)]
    assert names == ["past_key_values", "cache", None]


def test_every_causal_model_of_the_tests_goes_on_from_its_contexts() -> None:
    """A release that renames an argument would make tasks slow, and nothing else would tell."""
    for name in CAUSAL:
        assert wrapped(ContextsOnce, built(*tiny.FAMILIES[name][:2]), 4).keeps_contexts, name


def test_likelihoods_of_half_precision_are_computed_in_full() -> None:
    model = built(*tiny.FAMILIES["llama-gqa"][:2]).bfloat16()
    context = [5, 6, 7, 8]
    found = wrapped(ContextsOnce, model, 4)._loglikelihood_tokens([(None, context, [token]) for token in range(20)])
    with torch.inference_mode():
        wanted = model(torch.tensor([context])).logits[0, -1].double().log_softmax(-1)[:20]
    assert [value for value, _ in found] == pytest.approx(wanted.tolist(), rel=1e-5)
