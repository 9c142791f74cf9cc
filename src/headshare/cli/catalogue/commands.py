"""The table of commands, in the order of `--help`, with examples of each.

Its words are those of the README: MODEL and OUT are folders, FILE is a text.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# panels of the help of the whole
SMALLER = "Make a model smaller"
BEFORE = "Look before"
AFTER = "Look at what was written"
MEASURE = "Measure"


@dataclass(frozen=True)
class Command:
    """A command: its function, as module:name in `headshare.cli`, its panel, examples, and what typer is to know.

    One that `goes_on` keeps its state when it is stopped.
    """

    home: str
    panel: str
    examples: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    goes_on: bool = False


COMMANDS = {
    "shrink": Command(
        "shrinking.command:shrink",
        SMALLER,
        (
            "headshare shrink MODEL OUT --save 20% --calibration FILE",
            "headshare shrink MODEL OUT --to 4GB --calibration FILE --dry-run",
            "headshare shrink MODEL OUT --to 40% --bits auto --calibration FILE",
        ),
        goes_on=True,
    ),
    "estimate": Command(
        "plan:estimate", BEFORE, ("headshare estimate MODEL", "headshare estimate MODEL --ratio 0.2 --parts qkvo")
    ),
    "score": Command("plan:score", BEFORE, ("headshare score MODEL --output scores.safetensors",)),
    "plan": Command(
        "plan:plan",
        BEFORE,
        (
            "headshare plan --from-scores scores.safetensors --ratio 0.2",
            "headshare plan MODEL --save 10% --calibration FILE",
        ),
        goes_on=True,
    ),
    "share": Command(
        "share:share",
        SMALLER,
        (
            "headshare share MODEL OUT --ratio 0.2",
            "headshare share MODEL OUT --ratio 0.2 --calibration FILE --refit",
            "headshare share MODEL OUT --save 10% --calibration FILE --refit",
            "headshare share MODEL OUT --plan share_plan.json",
            "headshare share MODEL OUT --match exact",
        ),
        goes_on=True,
    ),
    "repeat": Command("convert:repeat", SMALLER, ("headshare repeat MODEL OUT --layers 10-16",)),
    "refit": Command("share:refit", SMALLER, ("headshare refit SHARED --calibration FILE --out OUT",), goes_on=True),
    "quantize": Command(
        "convert:quantize",
        SMALLER,
        (
            "headshare quantize SHARED OUT --bits 8",
            "headshare quantize SHARED OUT --calibration FILE",
        ),
    ),
    "inspect": Command("inspect:inspect", AFTER, ("headshare inspect OUT --html picture.html",)),
    "expand": Command("convert:expand", AFTER, ("headshare expand OUT DENSE",)),
    "export": Command(
        "convert:export",
        AFTER,
        ("headshare export OUT model.gguf", "headshare export OUT model.gguf --dtype q8_0"),
    ),
    "attention": Command(
        "inspect:attention",
        MEASURE,
        (
            "headshare attention MODEL --text FILE",
            "headshare attention MODEL --text FILE --text FILE2 --html attention.html",
        ),
    ),
    "run": Command(
        "elsewhere.run:run",
        AFTER,
        (
            "headshare run -- lm_eval --model hf --model_args pretrained=OUT --tasks NAMES",
            "headshare run -- accelerate launch script.py",
        ),
        {"allow_interspersed_args": False},
    ),
    "register": Command(
        "elsewhere.register:register",
        AFTER,
        ("headshare register", "headshare register --remove"),
    ),
    "push": Command(
        "elsewhere.push:push",
        AFTER,
        ("headshare push OUT USER/NAME --dry-run", "headshare push OUT USER/NAME --private"),
    ),
    "verify": Command("inspect:verify", AFTER, ("headshare verify OUT --against MODEL",)),
    "demo": Command("bench:demo", MEASURE, ("headshare demo MODEL --text FILE",)),
    "bench": Command(
        "bench:bench", MEASURE, ("headshare bench OUT", "headshare bench OUT --against MODEL --tokens 1,512")
    ),
    "train": Command(
        "train:train",
        SMALLER,
        (
            "headshare train MODEL OUT --data FILE --ratio 0.2",
            "headshare train SHARED OUT --method recover --data FILE --learning_rate 1e-4",
        ),
        {"allow_extra_args": True, "ignore_unknown_options": True},
        goes_on=True,
    ),
    "eval": Command(
        "evaluate:evaluate_command",
        MEASURE,
        (
            "headshare eval OUT --text FILE",
            "headshare eval MODEL OUT --tasks piqa,boolq --data-dir DATA",
        ),
        goes_on=True,
    ),
    "tasks": Command("elsewhere.tasks:tasks", MEASURE, ("headshare tasks TASKS --data-dir DATA --tasks piqa,boolq",)),
    "generate": Command(
        "evaluate:generate_command", MEASURE, ('headshare generate MODEL OUT --prompt "The capital of France is"',)
    ),
    "compare": Command(
        "compare:compare_command",
        MEASURE,
        (
            "headshare compare MODEL --text FILE --ratios 0.1,0.2",
            "headshare compare MODEL --text FILE --methods auto --calibration FILE",
        ),
        goes_on=True,
    ),
    "reproduce": Command(
        "reproducing.command:reproduce_command",
        MEASURE,
        (
            "headshare reproduce MODEL --out DIR --data-dir DATA",
            "headshare reproduce MODEL --out DIR --only table-12,figure-6 --dry-run",
        ),
        goes_on=True,
    ),
    "report": Command(
        "compare:report_command", MEASURE, ("headshare report compared --out report.md --html report.html",)
    ),
}
