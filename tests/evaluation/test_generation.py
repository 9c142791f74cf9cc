"""Texts and translations that models write, alone as in company, by sacrebleu and nltk."""

import dataclasses
import re
from pathlib import Path

import pytest
import sacrebleu
import torch

from headshare.errors import EvaluationError
from headshare.evaluation.generation import Writing, continuations
from headshare.evaluation.harness import Runner, Settings
from headshare.evaluation.results import Metric
from headshare.evaluation.translation import Parallel, bleu_and_meteor


def test_what_is_written_in_company_is_what_is_written_alone(runner: Runner) -> None:
    prompts = ["the cat", "Question: does the river freeze in winter?\nAnswer:", "a kite", "when it is cold the pig"]
    together = continuations(dataclasses.replace(runner, settings=Settings(batch_size=3)), prompts, Writing(9))
    assert together == [continuations(runner, [one], Writing(9))[0] for one in prompts]
    for prompt, text in zip(prompts, together, strict=True):
        tokens = runner.tokenizer.encode(prompt)
        for _ in range(9):
            with torch.inference_mode():
                tokens.append(int(runner.model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
            if tokens[-1] == runner.tokenizer.eos_token_id:
                break
        assert text == runner.tokenizer.decode(tokens[len(runner.tokenizer.encode(prompt)) :], skip_special_tokens=True)


def test_what_is_drawn_depends_on_the_seed_and_on_nothing_else(runner: Runner) -> None:
    def drawn(prompts: list[str], seed: int) -> list[str]:
        return continuations(runner, prompts, Writing(8, None, 1.0, seed))

    assert drawn(["the cat", "a kite"], 3) == [drawn(["the cat"], 3)[0], drawn(["a kite"], 3)[0]]
    assert drawn(["the cat"], 3) != drawn(["the cat"], 4)


def test_what_is_written_ends_before_the_stop(runner: Runner) -> None:
    (whole,) = continuations(runner, ["the cat"], Writing(12))
    stop = whole[len(whole) // 2]
    assert continuations(runner, ["the cat"], Writing(12, stop)) == [whole.partition(stop)[0]]


def test_translations_are_measured_as_sacrebleu_and_nltk_measure_them(runner: Runner, tmp_path: Path) -> None:
    (tmp_path / "en").write_text("the cat was there\nthe pig went\n")
    written = continuations(runner, ["the cat was there\n", "the pig went\n"], Writing(64, "\n"))
    (tmp_path / "fr").write_text(f"{written[0].strip()}\nand {' '.join(written[1].split()[:3])} so\n")
    references = (tmp_path / "fr").read_text().rstrip("\n").split("\n")
    parallel = Parallel(tmp_path / "en", tmp_path / "fr")
    one = parallel.run(runner, "key")
    wanted = sacrebleu.corpus_bleu([text.strip() for text in written], [references]).score
    assert one.metrics["bleu"].value == pytest.approx(wanted)
    assert one.questions == 2
    assert one.settings["bleu"].startswith("nrefs:1|") or "|v:" in one.settings["bleu"]
    assert re.fullmatch(r"bleu [\d.]+ ± [\d.]+, meteor [\d.]+ ± [\d.]+", one.in_cell)


def test_errors_of_translations_are_those_of_their_lines() -> None:
    references = [f"the cat number {n} went to the house of the pig {n % 3}" for n in range(40)]
    written = [
        " ".join(word for k, word in enumerate(text.split()) if (n * k) % 7 != 1) for n, text in enumerate(references)
    ]
    found, _ = bleu_and_meteor(written, references)
    alone = [bleu_and_meteor([one], [other])[0]["meteor"] for one, other in zip(written, references, strict=True)]
    assert all(metric.error is None for metric in alone)
    values = torch.tensor([metric.value for metric in alone])
    assert found["meteor"].error == pytest.approx(float(values.std() / len(values) ** 0.5), rel=1e-4)
    drawn = torch.Generator().manual_seed(0)
    resampled = []
    for _ in range(400):
        some = torch.randint(40, (40,), generator=drawn).tolist()
        resampled.append(sacrebleu.corpus_bleu([written[n] for n in some], [[references[n] for n in some]]).score)
    assert found["bleu"].error == pytest.approx(float(torch.tensor(resampled).std()), rel=0.2)
    # Nothing right is 0 without a doubt, and no reason to fail.
    assert bleu_and_meteor(["x", "y"], ["a b c d", "e f g h"])[0]["bleu"] == Metric(0.0, 0.0)


def test_meteor_rewards_order_and_stems_and_needs_no_dictionary() -> None:
    def meteor(written: str, reference: str, language: str | None = "english") -> float:
        return bleu_and_meteor([written], [reference], language)[0]["meteor"].value or 0.0

    assert meteor("a b c d e f", "a b c d e f") == pytest.approx(100 * (1 - 0.5 / 6**3), rel=1e-6)
    assert meteor("a b c d", "a b c d") > meteor("d c b a", "a b c d") > 0
    assert meteor("cats", "cat") > 0
    assert meteor("cats", "cat", None) == 0
    assert meteor("une maisons blanches", "une maison blanche", "french") == meteor("a b c", "a b c")
    assert meteor("une maisons blanches", "une maison blanche", None) < meteor("a b c", "a b c")
    assert meteor("A dog.", "a dog .") == meteor("a b c", "a b c")  # words and stops apart, in small letters
    assert meteor("dog", "cat") == 0


def test_parallel_texts_and_prompts_that_do_not_fit_are_refused(runner: Runner, tmp_path: Path) -> None:
    (tmp_path / "one").write_text("a\nb\n")
    (tmp_path / "other").write_text("a\n")
    with pytest.raises(EvaluationError, match=r"2 lines and .* 1"):
        Parallel(tmp_path / "one", tmp_path / "other")
    with pytest.raises(EvaluationError, match=r"put \{source\} there"):
        Parallel(tmp_path / "one", tmp_path / "one", prompt="translate")
    with pytest.raises(EvaluationError, match="stems no 'klingon'"):
        Parallel(tmp_path / "one", tmp_path / "one", language="klingon")
    with pytest.raises(EvaluationError, match="has no tokens"):
        continuations(runner, [""], Writing(4))
    with pytest.raises(EvaluationError, match="more than the model's 256"):
        continuations(runner, ["the cat"], Writing(256))
    for wrong in ({"tokens": 0}, {"temperature": -1.0}):
        with pytest.raises(EvaluationError):
            Writing(**wrong)
