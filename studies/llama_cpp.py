"""A GGUF file in llama.cpp beside its folder in transformers: bytes, tokens a second, perplexity on the same tokens.

    pip install xllamacpp
    python studies/llama_cpp.py small.gguf OUT --text FILE [--tokens 2048] [--window 512] [--threads 1]

Perplexity is over windows of the text, each from its first token on. llama.cpp runs as it comes (its cache in 16-bit
numbers); it is asked for the probabilities of the next token after each prefix of a window. Tokens a second are of 64
that it generates greedily, the best of five times; `--tokens 0` asks for them alone. Prints one row of a table.
"""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import xllamacpp as xc
from torch import Tensor

import headshare as hs
from headshare.integrations.transformers.loading import load_model, load_tokenizer

# more of llama.cpp's most likely tokens are asked for than transformers' rank of the one that follows
MORE = 200
GENERATED = 64


def server(file: Path, context: int, threads: int) -> xc.Server:
    """llama.cpp with a file loaded."""
    params = xc.CommonParams()
    params.model.path = str(file)
    params.n_ctx = context
    params.n_parallel = 1
    params.cpuparams.n_threads = threads
    params.verbosity = -1
    return xc.Server(params)


def ask(engine: xc.Server, **asked: Any) -> dict[str, Any]:
    """The answer of llama.cpp to a request for a completion."""
    found = engine.handle_completions({"temperature": 0, "ignore_eos": True, **asked})
    answer: dict[str, Any] = json.loads(found) if isinstance(found, str | bytes) else found
    return answer


def likelihoods(engine: xc.Server, window: list[int], ranks: list[int], vocabulary: int) -> Iterator[float]:
    """llama.cpp's log-probability of each token of a window but the first, after those before it."""
    for at, rank in enumerate(ranks, 1):
        for count in (min(rank + MORE, vocabulary), vocabulary):
            # a letter is forced, since a token that ends a text comes without its probabilities
            answer = ask(engine, prompt=window[:at], n_predict=1, n_probs=count, logit_bias=[[40, 1e4]])
            listed = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            found = next((each["logprob"] for each in listed if each["id"] == window[at]), None)
            if found is not None:
                yield found
                break


def speed(engine: xc.Server, window: list[int]) -> float:
    """Tokens a second while llama.cpp generates."""
    runs = [ask(engine, prompt=window[:64], n_predict=GENERATED, cache_prompt=False)["timings"] for _ in range(5)]
    return max(float(run["predicted_per_second"]) for run in runs)


def windows_of(folder: Path, text: str, tokens: int, size: int) -> Tensor:
    """Windows of a text, at least one: windows x tokens."""
    count = max(tokens // size, 1) * size
    with hs.open_checkpoint(folder) as checkpoint:
        ids = load_tokenizer(checkpoint)(text[: count * 20], add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[:count]).view(-1, size)


@torch.no_grad()
def in_transformers(folder: Path, windows: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of all tokens of windows but the first, and the ranks of these: windows x tokens."""
    with hs.open_checkpoint(folder) as checkpoint:
        model = load_model(checkpoint, dtype=torch.float32)
    scores = torch.cat([model(window[None]).logits[:, :-1].double().log_softmax(-1) for window in windows])
    wanted = scores.gather(2, windows[:, 1:, None])
    return wanted[..., 0], (scores > wanted).sum(dim=-1)


def compared(engine: xc.Server, folder: Path, windows: Tensor) -> list[str]:
    """Perplexity in llama.cpp and in transformers, and how far log-probabilities are apart: on average, and at most."""
    theirs, ranks = in_transformers(folder, windows)
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    rows = zip(windows.tolist(), ranks.tolist(), strict=True)
    ours = torch.tensor([list(likelihoods(engine, window, row, vocabulary)) for window, row in rows]).double()
    missed = (ours - theirs).abs()
    perplexities = [f"{math.exp(-one.mean()):.3f}" for one in (ours, theirs)]
    return [*perplexities, f"{missed.mean():.4f}", f"{missed.max():.3f}"]


def main() -> None:
    """Print the row of a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    for name, number in (("tokens", 2048), ("window", 512), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=number)
    given = parser.parse_args()
    windows = windows_of(given.folder, given.text.read_text(), given.tokens, given.window)
    engine = server(given.file, given.window + GENERATED, given.threads)
    cells = [given.file.name, f"{given.file.stat().st_size:,}", f"{speed(engine, windows[0].tolist()):.0f}"]
    cells += compared(engine, given.folder, windows) if given.tokens else [""] * 4
    print("| file | bytes | tokens/s | perplexity | in transformers | mean difference, nats | largest |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
