"""A tokenizer that ends every text changes nothing: prompts and contexts are gone on from, and are not ended."""

import shutil
from pathlib import Path

import pytest
import transformers as tf
from lm_eval.models.huggingface import HFLM
from tokenizers.processors import TemplateProcessing

import headshare as hs
from headshare.evaluation.generation import Writing, continuations
from headshare.evaluation.harness import Runner, Settings, _hushed, chosen_tasks

OPTIONS = [
    ("the cat went", " to the house"),
    ("Question: does the wind", " fall"),
    ("a kite ", "flies when"),
    ("", "yes"),
]


class Asked:
    """A request of the harness."""

    def __init__(self, *args: object) -> None:
        self.args = args


@pytest.fixture(scope="session")
def ended(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, with a tokenizer that puts the end-of-text token behind every text."""
    folder = Path(shutil.copytree(model, tmp_path_factory.mktemp("ended") / "model"))
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    end = (tokenizer.eos_token, tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"$A {end[0]}", special_tokens=[end])
    tokenizer.save_pretrained(folder)
    assert tf.AutoTokenizer.from_pretrained(folder)("the")["input_ids"][-1] == end[1]
    return folder


def runner_of(folder: Path) -> Runner:
    return Runner.of(hs.open_checkpoint(folder), Settings(batch_size=3))


def test_the_text_that_a_model_writes_is_stock_greedy_text_after_the_prompt_alone(model: Path, ended: Path) -> None:
    tokenizer = tf.AutoTokenizer.from_pretrained(model)
    stock = tf.AutoModelForCausalLM.from_pretrained(model)
    prompts = [context for context, _ in OPTIONS if context]
    wanted = []
    for prompt in prompts:
        given = tokenizer(prompt, return_tensors="pt")
        out = stock.generate(**given, max_new_tokens=12, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        wanted.append(tokenizer.decode(out[0, given["input_ids"].shape[1] :], skip_special_tokens=True))
    assert continuations(runner_of(ended), prompts, Writing(12)) == wanted


def test_likelihoods_of_endings_and_texts_are_those_that_the_harness_gives_with_a_tokenizer_that_ends_nothing(
    model: Path, ended: Path
) -> None:
    with _hushed():
        tokenizer = tf.AutoTokenizer.from_pretrained(model)
        stock = HFLM(pretrained=tf.AutoModelForCausalLM.from_pretrained(model), tokenizer=tokenizer, batch_size=3)
        ours = runner_of(ended)._for_harness
        options = [Asked(*option) for option in OPTIONS]
        wanted = stock.loglikelihood(options, disable_tqdm=True)
        found = ours.loglikelihood(options, disable_tqdm=True)
        texts = [Asked(context + ending) for context, ending in OPTIONS]
        wanted_rolling = stock.loglikelihood_rolling(texts, disable_tqdm=True)
        found_rolling = ours.loglikelihood_rolling(texts, disable_tqdm=True)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in wanted], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    assert found_rolling == pytest.approx(wanted_rolling, abs=1e-4)


def test_tasks_come_out_the_same(model: Path, ended: Path, data: Path) -> None:
    (task,) = chosen_tasks(["boolq"], data)
    assert task.run(runner_of(ended), "").metrics == task.run(runner_of(model), "").metrics
