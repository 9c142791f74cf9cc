"""Tables of what `bench` measured, in Markdown."""

from headshare.bench.bench import Bench, Ratio
from headshare.tables import markdown


def bench_table(results: Bench) -> str:
    """Table of a bench, one line a figure: the dense model's, then every other subject's with ratio and quartiles."""
    names = list(results.memory)
    lines = [("", *names)]
    for task, ratios in results.tasks.items():
        per_pass = 1 if task == "decode" else int(task.split()[1])
        lines.append(
            (f"{task}, tokens/s", *(_ratio(ratio, f"{per_pass / ratio.median:,.1f}") for ratio in ratios.values()))
        )
    for what, ratios in results.loading.items():
        label = {"load_s": "load, s", "first_token_s": "load and first token, s"}[what]
        lines.append((label, *(_ratio(ratio, f"{ratio.median:.3f}") for ratio in ratios.values())))
    lines.append(("parameters", *(mib(loaded.parameter_bytes) for loaded in results.memory.values())))
    lines.append(
        (
            "PSS",
            *("unknown" if loaded.pss_bytes is None else mib(loaded.pss_bytes) for loaded in results.memory.values()),
        )
    )
    saved = (
        f"{loaded.saved_of_ideal:.1%}" if loaded.saved_of_ideal is not None else ""
        for loaded in results.memory.values()
    )
    lines.append(("saved PSS, of ideal", *saved))
    return markdown(lines)


def _ratio(ratio: Ratio, figure: str) -> str:
    if ratio.low == ratio.high == 1:
        return figure
    return f"{figure} (time x{ratio.ratio:.3f}, {ratio.low:.3f} to {ratio.high:.3f})"


def mib(count: int) -> str:
    """Bytes as mebibytes with one decimal."""
    return f"{count / 2**20:,.1f} MiB"
