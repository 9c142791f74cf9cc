"""The harness's model, run once on a context for all its endings, with predictions for the endings' tokens alone.

Only this module imports lm-eval as it is imported.
"""

import inspect
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from headshare.errors import EvaluationError
from headshare.integrations.transformers.caches import cache_argument
from headshare.integrations.transformers.loading import running
from headshare.progress import track

# rotary embeddings whose angles depend on the length of the whole text, so that a context cannot be read by itself
LENGTH_DEPENDENT = {"dynamic", "longrope"}
# arguments of forward without which a context cannot be read once and gone on from
NEEDED = {"attention_mask", "position_ids", "logits_to_keep"}
Tokens = tuple[int, ...]


@dataclass(frozen=True)
class _Row:
    """The tokens that a model reads for an option: a context, and the ending without its last token.

    Options that differ in their last token alone are one row.
    """

    context: Tokens
    before_last: Tokens

    @property
    def tokens(self) -> Tokens:
        """All tokens that are read."""
        return self.context + self.before_last

    @property
    def predicted(self) -> int:
        """The number of tokens that are predicted, which are those of the ending."""
        return len(self.before_last) + 1


def _values(config: Mapping[Any, Any], wanted: str) -> Iterator[Any]:
    """Values under this name in a configuration, at any depth."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _values(value, wanted)
        elif name == wanted:
            yield value


def _pieces(rows: list[_Row], size: int) -> list[list[_Row]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


class ContextsOnce(HFLM):  # type: ignore[misc]
    """The harness's model of transformers, with the same answers for less work.

    The harness reads a context again for each ending, and predicts every token of both. This class reads a context
    once, and predicts the tokens of endings alone. Log-likelihoods are computed in float32.

    Some models run as the harness runs them: those whose layers keep something else than keys and values, whose rotary
    embeddings depend on the text's length, or whose forward takes no positions.
    """

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, Sequence[int], Sequence[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """The log-likelihood of each request's ending after its context, and whether all its tokens are the likeliest.

        A request's second field is the context and its third the ending. A request that is too long loses tokens at
        the beginning of its context.

        Raises:
            EvaluationError: if a context or an ending has no tokens.
        """
        for asked_for, context, ending in requests:
            if not (context and ending):
                raise EvaluationError(
                    f"of {asked_for!r:.200}, {'the ending' if context else 'the context'} has no token."
                )
        if not self.keeps_contexts or any(len(ending) > self.max_length for *_, ending in requests):
            answers: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
            return answers
        # requests that need the same predictions are asked for once
        asked: dict[_Row, list[int]] = defaultdict(list)
        for number, (_, context, ending) in enumerate(requests):
            tokens = (*context, *ending)[-(self.max_length + 1) :]
            asked[_Row(tokens[: -len(ending)], tokens[-len(ending) : -1])].append(number)
        # rows come in the order of their batches; results go back to the numbers of their requests
        results: dict[int, tuple[float, bool]] = {}
        rows = self._predictions(asked)
        for row, logits in rows if disable_tqdm else track(rows, "options", len(asked)):
            likelihoods = logits.float().log_softmax(dim=-1)
            for number in asked[row]:
                tokens_of_ending = torch.tensor(requests[number][2], device=logits.device)
                taken = likelihoods.gather(-1, tokens_of_ending[:, None]).double().sum().item()
                results[number] = taken, bool((likelihoods.argmax(dim=-1) == tokens_of_ending).all())
        return [results[number] for number in range(len(requests))]

    @cached_property
    def _cache_argument(self) -> str | None:
        """The name of the model's argument for keys and values."""
        return cache_argument(self.model)

    @cached_property
    def keeps_contexts(self) -> bool:
        """Whether a context can be read once and gone on from, with padding before it."""
        lacking = NEEDED - set(inspect.signature(self.model.forward).parameters)
        if self.backend != "causal" or lacking or self._cache_argument is None:
            return False
        if not LENGTH_DEPENDENT.isdisjoint(_values(self.model.config.to_dict(), "rope_type")):
            return False
        layers = DynamicCache(config=self.model.config).layers
        return bool(layers) and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)

    def _predictions(self, rows: Iterable[_Row]) -> Iterator[tuple[_Row, Float[Tensor, "predicted words"]]]:
        """Logits of each row's ending, in batches of rows of similar length."""
        # a context is worth reading by itself if several endings follow it and something is left of it without its
        # last token, which is read with the endings
        by_context: dict[Tokens, list[_Row]] = defaultdict(list)
        for row in rows:
            by_context[row.context].append(row)
        several = list[list[_Row]]()
        single = list[_Row]()
        for some in by_context.values():
            for group in _pieces(some, self.batch_size):
                if len(group) > 1 and len(group[0].context) > 1:
                    several.append(group)
                else:
                    single += group
        # neighbours are of similar length, so that little is padded
        for batch in self._filled(sorted(several, key=lambda group: -len(group[0].context))):
            yield from self._from_contexts(batch)
        for alone in _pieces(sorted(single, key=lambda row: -len(row.tokens)), self.batch_size):
            yield from self._in_one(alone)

    def _filled(self, groups: Iterable[Sequence[_Row]]) -> Iterator[list[Sequence[_Row]]]:
        """Groups of rows, collected as long as their rows fit in a batch."""
        batch: list[Sequence[_Row]] = []
        for group in groups:
            if batch and sum(map(len, batch)) + len(group) > self.batch_size:
                yield batch
                batch = []
            batch.append(group)
        if batch:
            yield batch

    @torch.inference_mode()
    def _in_one(self, rows: Sequence[_Row]) -> list[tuple[_Row, Float[Tensor, "predicted words"]]]:
        """Logits of endings from one pass over contexts and endings, padded on the left so that endings stand last."""
        inputs = self._padded([row.tokens for row in rows])
        with running():
            logits = self.model(**inputs, use_cache=False, logits_to_keep=max(row.predicted for row in rows)).logits
        return [(row, words[-row.predicted :]) for row, words in zip(rows, logits, strict=True)]

    @torch.inference_mode()
    def _from_contexts(self, groups: Sequence[Sequence[_Row]]) -> list[tuple[_Row, Float[Tensor, "predicted words"]]]:
        """Logits of endings from two passes: one over contexts, one over the endings of each.

        The first pass reads each group's context without its last token, padded on the left. The second goes on from
        its keys and values. It reads the context's last token and the ending of each row, padded on the right, where no
        token sees the padding.
        """
        # first pass: each context once; then a copy of its keys and values for each of its rows
        rows = [row for group in groups for row in group]
        cache = DynamicCache(config=self.model.config)
        inputs = self._padded([group[0].context[:-1] for group in groups])
        keys_and_values: dict[str, Any] = {str(self._cache_argument): cache, "use_cache": True}
        with running():
            self.model(**inputs, **keys_and_values, logits_to_keep=1)
        of_row = torch.tensor([number for number, group in enumerate(groups) for _ in group])
        cache.batch_select_indices(of_row)
        # second pass: the last token of the context predicts the ending's first
        width = max(row.predicted for row in rows)
        ends = torch.zeros(len(rows), width, dtype=torch.long)
        for number, row in enumerate(rows):
            ends[number, : row.predicted] = torch.tensor((row.context[-1], *row.before_last))
        lengths = torch.tensor([len(row.context) - 1 for row in rows])
        # padding may lie past the last position that the model has; its logits are dropped
        positions = (lengths[:, None] + torch.arange(width)).clamp(max=self.max_length - 1)
        mask = None
        if "attention_mask" in inputs:
            mask = torch.cat(
                [inputs["attention_mask"][of_row.to(self.device)], torch.ones_like(ends, device=self.device)], dim=1
            )
        with running():
            logits = self.model(
                input_ids=ends.to(self.device),
                attention_mask=mask,
                position_ids=positions.to(self.device),
                **keys_and_values,
            ).logits
        return [(row, words[: row.predicted]) for row, words in zip(rows, logits, strict=True)]

    def _padded(self, rows: Sequence[Tokens]) -> dict[str, Int[Tensor, "rows tokens"]]:
        """The rows as one input, padded on the left, and without a mask where no row is padded."""
        width = max(map(len, rows))
        ids = torch.tensor([(0,) * (width - len(row)) + row for row in rows])
        padding = torch.tensor([width - len(row) for row in rows])[:, None]
        positions = torch.arange(width) - padding
        inputs = {"input_ids": ids, "position_ids": positions.clamp(min=0)}
        if padding.any():
            inputs["attention_mask"] = (positions >= 0).long()
        return {name: value.to(self.device) for name, value in inputs.items()}
