"""One kind of layer, held in five ways: q, k and v of many layers, of which 30 % of the units are shared.

    python benchmarks/layers.py [--shapes 576/64,2048/128,4096/128] [--dtypes bfloat16,float32] [--tokens 1,16,512]
                                [--repeats 15] [--json]

dense: stock Linear. alias, owner: headshare's storages. gather: the rows of each call put together by index_select
from one bank. loop: one product for each head. Every repeat runs all layers once in each way, by turns, in an order
that moves on; ratios are medians of pairs with quartiles. There are as many layers as fill --gigabytes (4 to 120).
A tilde marks results that differ from dense in the last bits.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from headshare.architecture.modules import ModuleMap
from headshare.plan.section import Gap
from headshare.plan.tensors import GappedTensor
from headshare.storage.pooled.frozen import read_banks
from headshare.storage.registry import STORAGES
from machine import machine

RATIO = 0.3
WAYS = ("dense", "alias", "owner", "gather", "loop")


class Layers(nn.Module):
    """q, k and v of some layers, as a model holds them."""

    def __init__(self, layers: int, hidden: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({part: nn.Linear(hidden, hidden, bias=False, dtype=dtype, device="meta") for part in "qkv"})
            for _ in range(layers)
        )


def ties_of(layers: int, heads: int, seed: int = 0) -> dict[tuple[int, int], tuple[int, int]]:
    """A star plan: 30 % of all heads, chosen at random, each with a random donor among the kept of earlier layers."""
    rng = random.Random(seed)
    recipients = set(rng.sample([(n, h) for n in range(1, layers) for h in range(heads)], int(RATIO * layers * heads)))
    return {
        (layer, head): rng.choice([(n, h) for n in range(layer) for h in range(heads) if (n, h) not in recipients])
        for layer, head in sorted(recipients)
    }


def gapped(layers: int, hidden: int, head: int, ties: dict) -> dict[str, GappedTensor]:
    """The same as what a plan means for each tensor."""
    tensors = {}
    for layer in range(layers):
        for part in "qkv":
            gaps = [
                Gap(mine * head, (mine + 1) * head, f"layers.{donor[0]}.{part}.weight", donor[1] * head)
                for (at, mine), donor in sorted(ties.items())
                if at == layer
            ]
            name = f"layers.{layer}.{part}.weight"
            tensors[name] = GappedTensor(name, (hidden, hidden), 0, tuple(gaps))
    return tensors


def build(layers: int, hidden: int, head: int, dtype: torch.dtype) -> dict[str, Callable[[int, Tensor], list[Tensor]]]:
    """For each way: a function from a layer's number and x to its q, k and v. All compute the same."""
    ties = ties_of(layers, hidden // head)
    tensors = gapped(layers, hidden, head, ties)
    modules = {name: name.removesuffix(".weight") for name in tensors}
    stored = {name: torch.randn(tensor.stored_shape).mul_(0.02).to(dtype) for name, tensor in tensors.items()}
    models = {}
    for way in ("alias", "owner"):
        models[way] = Layers(layers, hidden, dtype)
        STORAGES[way](dict.fromkeys(tensors, "cpu")).install(models[way], tensors, ModuleMap.of(models[way], tensors))
        for name, rows in stored.items():
            models[way].get_submodule(modules[name]).weight = nn.Parameter(rows, requires_grad=False)
        read_banks(models[way])
    owner = {name: models["owner"].get_submodule(path) for name, path in modules.items()}
    models["dense"] = Layers(layers, hidden, dtype)
    blocks, tables, first, starts = [], {}, 0, {}
    for name, rows in stored.items():
        starts[name], first = first, first + len(rows) // head
        blocks.append(rows)
    bank = torch.cat(blocks).view(first, head, hidden)
    for name, tensor in tensors.items():
        models["dense"].get_submodule(modules[name]).weight = nn.Parameter(
            owner[name].whole_weight().detach().clone(), requires_grad=False
        )
        table = []
        for source, start, stop in tensor.whole():
            at = starts[source] + tensors[source].stored_index(start) // head
            table += range(at, at + (stop - start) // head)
        tables[name] = torch.tensor(table)
    scratch = torch.empty(hidden // head, head, hidden, dtype=dtype)

    def projected(model: nn.Module) -> Callable[[int, Tensor], list[Tensor]]:
        return lambda layer, x: [module(x) for module in model.layers[layer].values()]

    def gather(layer: int, x: Tensor) -> list[Tensor]:
        out = []
        for part in "qkv":
            torch.index_select(bank, 0, tables[f"layers.{layer}.{part}.weight"], out=scratch)
            out.append(linear(x, scratch.view(hidden, hidden)))
        return out

    lists = {name: [bank[slot] for slot in table.tolist()] for name, table in tables.items()}

    def loop(layer: int, x: Tensor) -> list[Tensor]:
        return [torch.cat([linear(x, w) for w in lists[f"layers.{layer}.{part}.weight"]], dim=-1) for part in "qkv"]

    return {way: projected(models[way]) for way in ("dense", "alias", "owner")} | {"gather": gather, "loop": loop}


def measure(ways: dict, layers: int, hidden: int, dtype: torch.dtype, tokens: int, repeats: int) -> dict[str, dict]:
    """Seconds of all layers for each way, as ratios to dense measured next to one another."""
    x = torch.randn(tokens, hidden).to(dtype)
    same = {
        way: all(
            torch.equal(a, b) for n in range(0, layers, 7) for a, b in zip(run(n, x), ways["dense"](n, x), strict=True)
        )
        for way, run in ways.items()
    }
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for repeat in range(repeats + 1):
        for way in (*WAYS[repeat % len(WAYS) :], *WAYS[: repeat % len(WAYS)]):
            begun = time.perf_counter()
            for layer in range(layers):
                ways[way](layer, x)
            if repeat:
                seconds[way].append(time.perf_counter() - begun)
    found = {}
    for way, values in seconds.items():
        ratios = [a / b for a, b in zip(values, seconds["dense"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        found[way] = {
            "us_per_layer": statistics.median(values) / layers * 1e6,
            "ratio": middle,
            "quartiles": [low, high],
            "bit_identical": same[way],
        }
    return found


def main() -> None:
    """Measure each shape, type and number of tokens; print a line or a JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="576/64,2048/128,4096/128")
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--tokens", default="1,16,512")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--gigabytes", type=float, default=0.8)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = []
    with torch.inference_mode():
        for shape in arguments.shapes.split(","):
            hidden, head = map(int, shape.split("/"))
            for name in arguments.dtypes.split(","):
                dtype = getattr(torch, name)
                layers = max(4, int(arguments.gigabytes * 1e9 / (3 * hidden * hidden * dtype.itemsize)))
                layers = min(layers, 120)
                ways = build(layers, hidden, head, dtype)
                for tokens in map(int, arguments.tokens.split(",")):
                    found = measure(ways, layers, hidden, dtype, tokens, arguments.repeats)
                    rows.append({"shape": shape, "dtype": name, "tokens": tokens, "layers": layers, "ways": found})
                    if not arguments.json:
                        print(line(rows[-1]), flush=True)
    if arguments.json:
        print(json.dumps({"ratio_shared": RATIO, "rows": rows, "machine": machine()}))
    else:
        print(json.dumps(machine()))


def line(row: dict) -> str:
    """One row of a Markdown table."""
    cells = [row["shape"], row["dtype"], str(row["tokens"]), f"{row['ways']['dense']['us_per_layer']:,.0f} us"]
    for way in WAYS[1:]:
        one = row["ways"][way]
        low, high = one["quartiles"]
        cells.append(f"{one['ratio']:.3f} ({low:.3f} to {high:.3f}){'' if one['bit_identical'] else ' ~'}")
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
