"""vLLM with shared models, one after the other, in a process of its own: what it predicts, and what it holds.

Run as a script: the folder of the models, a JSON object of options, and the file to write answers to.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from headshare.errors import HeadshareError

LENGTH = 128
CONTINUED = 8
SAMPLING = {"temperature": 0, "max_tokens": CONTINUED, "ignore_eos": True}


def shared_memory() -> int:
    """Bytes of memory behind this process's aliases, each page once however many addresses it has."""
    total = 0
    ours = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first and not first.endswith(":"):
            ours = "memfd:headshare" in rest
        elif ours and first == "Pss:":
            total += int(rest.split()[0]) * 1024
    return total


def held(model: Any) -> dict[str, int]:
    """Bytes of the matrices that this rank's modules hold: as they are stored, and as modules see them."""
    from headshare.integrations.vllm.linear import SharedLinearMethod

    methods = [module.quant_method for module in model.modules() if hasattr(module, "quant_method")]
    weights = next(method.weights for method in methods if isinstance(method, SharedLinearMethod))
    return {"stored": weights.stored_bytes, "dense": weights.dense_bytes, "memory": shared_memory()}


def answer(folder: Path, prompts: list[list[int]], options: dict[str, Any]) -> dict[str, Any]:
    """Log-probabilities of the prompts' tokens and greedy continuations, and what every rank holds.

    The continuations are asked for twice, so that the second time keys and values of the prompts are in the cache.
    """
    from vllm import LLM, SamplingParams, TokensPrompt

    before = shared_memory()
    asked = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
    made = LLM(model=str(folder), dtype="float32", max_model_len=LENGTH, block_size=32, **options)
    outputs = made.generate(asked, SamplingParams(**SAMPLING, prompt_logprobs=0), use_tqdm=False)
    made.generate(asked, SamplingParams(**SAMPLING), use_tqdm=False)
    again = made.generate(asked, SamplingParams(**SAMPLING), use_tqdm=False)
    found = {
        "logprobs": [[next(iter(each.values())).logprob for each in out.prompt_logprobs[1:]] for out in outputs],
        "greedy": [list(out.outputs[0].token_ids) for out in outputs],
        "again": [list(out.outputs[0].token_ids) for out in again],
        "cached": [out.num_cached_tokens for out in again],
        "held": [{**rank, "memory": rank["memory"] - before} for rank in made.apply_model(held)],
    }
    made.llm_engine.engine_core.shutdown()
    return found


def adapted(folder: Path, prompts: list[list[int]], options: dict[str, Any]) -> dict[str, Any]:
    """Greedy continuations and their tokens' log-probabilities, without and with the adapter that lies in the folder.

    vLLM does not score prompts on a CPU where it takes adapters.
    """
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.lora.request import LoRARequest

    asked = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
    lora = {"enable_lora": True, "max_lora_rank": 8}
    made = LLM(model=str(folder), dtype="float32", max_model_len=LENGTH, block_size=32, **lora, **options)
    found = {}
    for kind, request in (("plain", None), ("adapted", LoRARequest("adapter", 1, str(folder / "adapter")))):
        scored = SamplingParams(**SAMPLING, logprobs=0)
        outputs = [out.outputs[0] for out in made.generate(asked, scored, use_tqdm=False, lora_request=request)]
        found[kind] = {
            "greedy": [list(out.token_ids) for out in outputs],
            "logprobs": [[next(iter(each.values())).logprob for each in out.logprobs] for out in outputs],
        }
    made.llm_engine.engine_core.shutdown()
    return found


def main() -> None:
    """Ask the models of a folder, each in a folder below it, for the prompts of a file there."""
    folder, options, out = Path(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3])
    prompts = json.loads((folder / "prompts.json").read_text())
    answers: dict[str, Any] = {}
    for model in sorted(path for path in folder.iterdir() if path.is_dir()):
        try:
            ask = adapted if (model / "adapter").exists() else answer
            answers[model.name] = ask(model, prompts, options)
        except HeadshareError as error:
            answers[model.name] = {"refused": str(error)}
        out.write_text(json.dumps(answers))
        from vllm.distributed import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    os.environ |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    main()
