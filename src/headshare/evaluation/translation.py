"""Translations by a model, and their BLEU and METEOR with standard errors."""

import hashlib
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from headshare.errors import CalibrationError, EvaluationError
from headshare.evaluation.generation import Writing, continuations
from headshare.evaluation.harness import PROMPTS, Runner, Settings
from headshare.evaluation.results import Metric, TaskResult, key_of_result
from headshare.installing import install
from headshare.text.formats import read_lines

SOURCE = "{source}"
RESAMPLED = 1000
METEOR_RULE = "words by 13a"
# half of a 95 % confidence interval, in standard errors
HALF_INTERVAL = 1.96


@dataclass(frozen=True)
class Parallel:
    """A text and its translation, line by line.

    The model is given `prompt` with a line in the place of {source}, and writes up to the end of the line. `language`
    is that of the translation, whose words METEOR matches by their stems. Of files of rows, the documents under
    `text_field` are the lines.

    Raises:
        EvaluationError: if a file cannot be read, they have different numbers of lines, the prompt has no {source}, or
            there is no stemmer for the language.
    """

    source: Path
    reference: Path
    prompt: str = SOURCE + "\n"
    limit: int | None = None
    tokens: int = 64
    language: str | None = None
    text_field: str | None = None
    pairs: tuple[tuple[str, str], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if SOURCE not in self.prompt:
            raise EvaluationError(
                f"the prompt {self.prompt!r:.60} does not say where the text goes: put {SOURCE} there."
            )
        stemmer_for(self.language)
        try:
            sides = [read_lines(path, self.text_field) for path in (self.source, self.reference)]
        except CalibrationError as error:
            raise EvaluationError(str(error)) from None
        if len(sides[0]) != len(sides[1]):
            raise EvaluationError(
                f"{self.source} has {len(sides[0])} lines and {self.reference} {len(sides[1])}; each line must have "
                "its translation."
            )
        object.__setattr__(self, "pairs", tuple(zip(*sides, strict=True))[: self.limit])

    @property
    def name(self) -> str:
        """The heading of its column."""
        return f"translation of {self.source.name}"

    def key(self, model: str, settings: Settings) -> str:
        """Cache key of this translation for a model and settings."""
        asked = (self.prompt, self.tokens, self.language)
        rules = (METEOR_RULE, PROMPTS)
        return key_of_result(model, self.pairs, asked, *rules, settings.dtype, packages=("sacrebleu", "nltk"))

    def run(self, runner: Runner, key: str) -> TaskResult:
        """Translate every line and measure the translations.

        Raises:
            EvaluationError: as `continuations` does, or if sacrebleu or nltk are not installed.
        """
        prompts = [self.prompt.replace(SOURCE, line) for line, _ in self.pairs]
        written = continuations(runner, prompts, Writing(self.tokens, stop="\n"))
        references = [reference for _, reference in self.pairs]
        stripped = [text.strip() for text in written]
        metrics, signature = bleu_and_meteor(stripped, references, self.language)
        settings = {
            "prompt": self.prompt, "tokens": self.tokens, "limit": self.limit, "language": self.language,
            "lines": hashlib.sha256(json.dumps(self.pairs).encode()).hexdigest()[:8], **runner.circumstances,
            "bleu": signature, "meteor": METEOR_RULE,
        }  # fmt: skip
        lines = tuple(counts_of_line(*each) for each in zip(stripped, references, strict=True))
        return TaskResult(runner.name, self.name, key, metrics, len(self.pairs), settings=settings, lines=lines)


def stemmer_for(language: str | None) -> Any:
    """The Snowball stemmer of a language; without a language, a stemmer that leaves words as they are.

    Raises:
        EvaluationError: if there is none, or nltk is not installed.
    """
    if language is None:
        return SimpleNamespace(stem=str)
    try:
        from nltk.stem.snowball import SnowballStemmer
    except ImportError:
        raise EvaluationError(f"translations are measured by sacrebleu and nltk. Run: {install('eval')}") from None
    if language not in SnowballStemmer.languages:
        known = ", ".join(sorted(SnowballStemmer.languages))
        raise EvaluationError(f"nltk stems no {language!r:.40}. There are {known}; without, words match as they are.")
    return SnowballStemmer(language)


def bleu_and_meteor(
    written: Sequence[str], references: Sequence[str], language: str | None = None
) -> tuple[dict[str, Metric], str]:
    """Corpus BLEU and mean METEOR of translations, in percent with standard errors, and sacrebleu's signature.

    BLEU is computed by sacrebleu. Its standard error comes from sacrebleu's confidence interval of 1,000 bootstrap
    samples of lines (Koehn, 2004).

    METEOR is the mean over lines (Banerjee and Lavie, "METEOR", 2005). Words are those of sacrebleu's 13a tokenizer, in
    small letters. They match exactly or by their stems in this language. Synonyms, which there are for English alone,
    are left out.

    Raises:
        EvaluationError: if sacrebleu or nltk are not installed.
    """
    try:
        from nltk.translate.meteor_score import meteor_score
        from sacrebleu import BLEU
        from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
    except ImportError:
        raise EvaluationError(f"translations are measured by sacrebleu and nltk. Run: {install('eval')}") from None
    metric = BLEU()
    words = Tokenizer13a()
    stemmer = stemmer_for(language)
    # the JSON form of the score has the confidence interval
    bleu = metric.corpus_score(list(written), [list(references)], n_bootstrap=RESAMPLED)
    signature = metric.get_signature().format()
    interval = json.loads(bleu.format(width=6, signature=signature, is_json=True))
    scores = [
        100 * meteor_score([words(reference).split()], words(text).split(), stemmer=stemmer, wordnet=_NoSynonyms())
        for text, reference in zip(written, references, strict=True)
    ]
    # one line has no standard error
    several = len(scores) > 1
    metrics = {
        "bleu": Metric(float(bleu.score), interval.get("confidence_var", 0.0) / HALF_INTERVAL if several else None),
        "meteor": Metric(
            statistics.mean(scores), statistics.stdev(scores) / math.sqrt(len(scores)) if several else None
        ),
    }
    return metrics, signature


def counts_of_line(written: str, reference: str) -> tuple[int, ...]:
    """What corpus BLEU adds up over lines: matching n-grams of 1 to 4 words, all n-grams, and both lengths."""
    from sacrebleu import BLEU

    found = BLEU(effective_order=True).sentence_score(written, [reference])
    return (*map(int, found.counts), *map(int, found.totals), int(found.sys_len), int(found.ref_len))


class _NoSynonyms:
    """A dictionary without synonyms, in the place of WordNet."""

    def synsets(self, _: str) -> list[object]:
        return []
