"""On a CUDA device: products with shared weights beside dense ones, then whole models of Llama-2-7B's shape.

    python benchmarks/gpu.py [--runs 20] [--ratio 0.3] [--sets 8] [--only products|models] [--json]

Weights are random and made on the device; only their shapes are the models' own. All ways take turns within one run.
A product is timed over several sets of weights, more than the device's cache holds, recorded in a CUDA graph, so that
Python's time is in none of the figures. Models are timed so and, where it says eager, as Python runs them.
"""

import argparse
import gc
import json
import random
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from headshare.architecture.modules import ModuleMap
from headshare.architecture.recognition import attention_layout
from headshare.errors import StorageError
from headshare.plan.plan import SharePlan
from headshare.plan.section import Choice
from headshare.plan.ties import Selection
from headshare.plan.units import HeadUnit, Tie
from headshare.storage.pooled.cuda_driver import AddressSpan, Block, cuda_driver
from headshare.storage.pooled.frozen import read_banks
from headshare.storage.pooled.product import BlockTable, slot_linear
from headshare.storage.projection import SharedProjection
from headshare.storage.registry import STORAGES
from machine import machine
from make_checkpoint import SHAPES as CHECKPOINTS
from make_checkpoint import config_of

# hidden size, query heads, key/value heads; heads have 128 channels
SHAPES = {"Llama-2-7B": (4096, 32, 32), "Llama-3.1-8B": (4096, 32, 8), "Llama-3-70B": (8192, 64, 8)}
HEAD = 128
TOKENS = (1, 16, 512, 4096)
TARGETS = {"decode": 0.98, "prefill": 0.95, "saving": 0.98}
GRAPH, EAGER = "decode, one token in a graph", "decode, 32 tokens eager"
COUNTS = {GRAPH: 1, EAGER: 32, "prefill, 512 tokens": 512, "prefill, 4096 tokens": 4096}
DTYPE = torch.bfloat16
Way = Callable[[], object]


# ---- time


def recorded(call: Way) -> Way:
    """The same work as a CUDA graph. It has run before, so that everything to be measured or compiled is."""
    with torch.no_grad():
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
    return graph.replay


def milliseconds(call: Way) -> float:
    """One call, by the device's clock."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def by_turns(ways: dict[str, Way], runs: int) -> dict[str, list[float]]:
    """Milliseconds of every way, `runs` times, one after the other in each run; a first run is thrown away."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    with torch.no_grad():
        for run in range(runs + 1):
            for name, call in ways.items():
                time = milliseconds(call)
                if run:
                    times[name].append(time)
    return times


def compared(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Each way's median time, and how fast it is beside dense: ratio of medians, and the ratios' spread by run."""
    dense = times["dense"]
    return {
        name: {
            "milliseconds": statistics.median(values),
            "speed": statistics.median(dense) / statistics.median(values),
            "least": min(a / b for a, b in zip(dense, values, strict=True)),
            "most": max(a / b for a, b in zip(dense, values, strict=True)),
        }
        for name, values in times.items()
    }


# ---- products


def product_ways(
    outputs: int, inputs: int, across: bool, tokens: int, sets: int, ratio: float, device: str
) -> dict[str, Way]:
    """The ways to multiply, each with `sets` weights by turns. With `across`, input channels are what is shared."""
    rows, width = (inputs, outputs) if across else (outputs, inputs)
    count = rows // HEAD
    kept = max(1, int(sets * count * (1 - ratio)))
    generator = torch.Generator().manual_seed(0)
    bank = torch.randn(kept, HEAD, width, dtype=DTYPE, device=device) / inputs**0.5
    tables = [torch.randint(0, kept, (count,), generator=generator, dtype=torch.int32) for _ in range(sets)]
    slots = [BlockTable(bank, table.to(device)) for table in tables]
    dense = [one.gather().T.contiguous() if across else one.gather() for one in slots]
    x = torch.randn(tokens, inputs, dtype=DTYPE, device=device)
    ways: dict[str, Way] = {
        "dense": lambda: [functional.linear(x, weight) for weight in dense],
        "indirect": lambda: [slot_linear(x, one, None, across=across) for one in slots],
        "gather": lambda: [functional.linear(x, one.gather().T if across else one.gather()) for one in slots],
    }
    mapped = mapped_weights(bank, tables, device)
    if mapped:
        ways["vmm"] = lambda: [functional.linear(x, weight.T if across else weight) for weight in mapped]
    return ways


def mapped_weights(bank: Tensor, tables: list[Tensor], device: str) -> list[Tensor]:
    """The weights of these tables laid over mapped blocks; none where the device's granules do not allow it."""
    try:
        driver = cuda_driver(torch.device(device))
    except StorageError:
        return []
    slot = bank[0].nbytes
    if slot % driver.granularity:
        return []
    blocks = [Block(driver, slot) for _ in range(len(bank))]
    driver.tensor(AddressSpan(driver, blocks)).view(bank.dtype).view(bank.shape).copy_(bank)
    spans = [AddressSpan(driver, [blocks[n] for n in table.tolist()]) for table in tables]
    return [driver.tensor(span).view(bank.dtype).view(-1, bank.shape[-1]) for span in spans]


def products(runs: int, ratio: float, sets: int, device: str) -> Iterator[dict[str, Any]]:
    """One row for each shape, projection and token count."""
    for name, (hidden, heads, kv_heads) in SHAPES.items():
        kinds = {"q": (heads * HEAD, hidden, False), "k": (kv_heads * HEAD, hidden, False),
                 "o": (hidden, heads * HEAD, True)}  # fmt: skip
        for projection, (outputs, inputs, across) in kinds.items():
            for tokens in TOKENS:
                ways = product_ways(outputs, inputs, across, tokens, sets, ratio, device)
                times = by_turns({way: recorded(call) for way, call in ways.items()}, runs)
                yield {"shape": name, "projection": projection, "tokens": tokens, "ways": compared(times)}


# ---- models


def random_plan(config: LlamaConfig, shapes: dict[str, tuple[int, ...]], ratio: float) -> SharePlan:
    """q, k, v and o of this share of units, drawn by chance, tied to kept units of earlier layers, drawn by chance."""
    layout = attention_layout(config.to_dict(), shapes)
    chance = random.Random(0)
    units = [layout.unit(n) for n in range(layout.units)]
    given = set(chance.sample(units[layout.groups :], int(ratio * layout.units)))
    kept = [unit for unit in units if unit not in given]
    ties = [Tie(unit, chance.choice(earlier(unit, kept))) for unit in sorted(given)]
    return SharePlan(model_type="llama", selections=(Selection(layout=layout, ties=tuple(ties), chosen=Choice()),))


def earlier(unit: HeadUnit, kept: list[HeadUnit]) -> list[HeadUnit]:
    """Those of earlier layers."""
    return [other for other in kept if other.layer < unit.layer]


def built(
    config: LlamaConfig, plan: SharePlan, storage: str, weights: Callable[[str, Tensor], Tensor], device: str
) -> Any:
    """A model whose weights are set one by one; `weights` gives each for its name and what stands there on meta."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(DTYPE)
    tensors = plan.tensors
    if storage != "dense":
        STORAGES[storage](dict.fromkeys(tensors, device)).install(model, tensors, ModuleMap.of(model, tensors))
    for name, parameter in list(model.named_parameters()):
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, nn.Parameter(weights(name, parameter), requires_grad=False))
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(device)
    read_banks(model)
    return model.eval()


def drawn(_: str, like: Tensor, device: str) -> Tensor:
    """Random weights; norms of ones."""
    if like.ndim == 1:
        return torch.ones(like.shape, dtype=DTYPE, device=device)
    return torch.empty(like.shape, dtype=DTYPE, device=device).normal_(std=0.02)


def copied(name: str, _: Tensor, model: Any, whole: bool) -> Tensor:
    """The weight of that name in a shared model: as it is stored there, or whole."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    found = module.whole_weight() if whole and isinstance(module, SharedProjection) else getattr(module, leaf)
    return found.detach().clone(memory_format=torch.contiguous_format)


def taken(device: str) -> tuple[int, int]:
    """Bytes in torch's tensors, and bytes that the device has given to anybody."""
    gc.collect()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return torch.cuda.memory_allocated(device), total - free


def models(runs: int, ratio: float, device: str) -> dict[str, Any]:
    """Decode, prefill and memory of a dense model, and of models that share, all with the same numbers in them."""
    shape = CHECKPOINTS["llama-2-7b"]
    config = LlamaConfig(**{k: v for k, v in config_of(shape).items() if k not in ("architectures", "model_type")})
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in LlamaForCausalLM(config).named_parameters()}
    plan = random_plan(config, shapes, ratio)
    bytes_of, held, refused = {}, {}, {}
    sources = {"indirect": partial(drawn, device=device)}
    for storage in ("indirect", "dense", "vmm"):
        before = taken(device)
        try:
            held[storage] = built(config, plan, storage, sources.get(storage, drawn), device)
        except StorageError as error:
            refused[storage] = str(error)
            continue
        bytes_of[storage] = [after - b for after, b in zip(taken(device), before, strict=True)]
        for other, whole in (("dense", True), ("vmm", False)):
            sources[other] = partial(copied, model=held["indirect"], whole=whole)
    ideal = saved_bytes(plan)
    saving = {name: (bytes_of["dense"][name == "vmm"] - bytes_of[name][name == "vmm"]) / ideal
              for name in bytes_of if name != "dense"}  # fmt: skip
    order = ["dense", *(name for name in held if name != "dense")]
    offered = {name: ways(held[name], device) for name in order}
    timed = {kind: compared(by_turns({name: offered[name][kind] for name in order}, runs)) for kind in COUNTS}
    for kind, by_way in timed.items():
        for found in by_way.values():
            found["tokens_per_second"] = COUNTS[kind] / found["milliseconds"] * 1000
    return {"bytes": bytes_of, "ideal_saving_bytes": ideal, "saving": saving, "times": timed, "refused": refused,
            "difference": differences(held, device)}  # fmt: skip


def ways(model: Any, device: str) -> dict[str, Way]:
    """What a model is timed at. The graph's token has no context: its time is that of weights."""
    one, many = (torch.randint(5, 1000, (1, count), device=device) for count in (1, 4096))
    forward = partial(model, use_cache=False, logits_to_keep=1)
    generate = partial(model.generate, max_new_tokens=32, min_new_tokens=32, do_sample=False, pad_token_id=0)
    return {
        GRAPH: recorded(partial(forward, one)),
        EAGER: partial(generate, one, attention_mask=torch.ones_like(one)),
        "prefill, 512 tokens": partial(forward, many[:, :512]),
        "prefill, 4096 tokens": partial(forward, many),
    }


def differences(held: dict[str, Any], device: str) -> dict[str, float]:
    """The largest difference of a logit from the dense model's, beside the largest logit."""
    tokens = torch.randint(5, 1000, (1, 64), device=device, generator=torch.Generator(device).manual_seed(0))
    with torch.no_grad():
        logits = {name: model(tokens, use_cache=False).logits.float() for name, model in held.items()}
    largest = logits["dense"].abs().max()
    return {name: ((found - logits["dense"]).abs().max() / largest).item() for name, found in logits.items()}


def saved_bytes(plan: SharePlan) -> int:
    """What the plan's gaps would take."""
    tensors = plan.tensors.values()
    return sum((t.shape[0] * t.shape[1] - t.stored_shape[0] * t.stored_shape[1]) * DTYPE.itemsize for t in tensors)


# ---- words


def cell(found: dict[str, float] | None) -> str:
    """Speed beside dense, with its spread."""
    return f"{found['speed']:5.2f} ({found['least']:.2f}-{found['most']:.2f})" if found else "-"


def print_product(row: dict[str, Any]) -> None:
    """One line of the table."""
    kind = "decode" if row["tokens"] == 1 else "prefill"
    dense = row["ways"]["dense"]["milliseconds"]
    cells = "".join(f"{cell(row['ways'].get(way)):>20}" for way in ("indirect", "gather", "vmm"))
    print(f"{row['shape']:13}{row['projection']:3}{row['tokens']:6}{dense:10.3f}{cells}   target {TARGETS[kind]}")


def print_models(found: dict[str, Any]) -> None:
    """The table of whole models."""
    for kind, by_way in found["times"].items():
        cells = "".join(f"  {way} {cell(by_way[way])}" for way in by_way if way != "dense")
        dense, target = by_way["dense"]["tokens_per_second"], TARGETS[kind.split(",")[0]]
        print(f"{kind:30} dense {dense:9.1f} tokens/s{cells}   target {target}")
    ideal, target = found["ideal_saving_bytes"], TARGETS["saving"]
    for way, share in found["saving"].items():
        print(f"memory saved by {way}: {share:.1%} of {ideal:,} bytes   target {target:.0%}")
    for way, reason in found["refused"].items():
        print(f"{way}: {reason}")
    print("largest difference of a logit, beside the largest logit: ", found["difference"])


def main() -> None:
    """Measure, print; exit 1 without a CUDA device."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--sets", type=int, default=8)
    parser.add_argument("--only", choices=["products", "models"])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: benchmarks/gpu.py measures on a CUDA device, and torch sees none here.")
    device = f"cuda:{torch.cuda.current_device()}"
    data: dict[str, Any] = {
        "device": torch.cuda.get_device_name(), "machine": machine(), "targets": TARGETS, "ratio": arguments.ratio,
        "products": [],
    }  # fmt: skip
    if arguments.only != "models":
        for row in products(arguments.runs, arguments.ratio, arguments.sets, device):
            data["products"].append(row)
            if not arguments.json:
                print_product(row)
    if arguments.only != "products":
        data["models"] = models(arguments.runs, arguments.ratio, device)
        if not arguments.json:
            print_models(data["models"])
    print(json.dumps(data if arguments.json else {"device": data["device"], **data["machine"]}))


if __name__ == "__main__":
    main()
