"""The reference of Python: a page for each public package, whose words are those of the docstrings."""

import headshare

# package: title of its page, what it is for; names are those of its `__all__`, or all that it defines
PACKAGES = {
    "headshare": ("headshare", "The public names. `import headshare as hs` also makes transformers know the format."),
    "headshare.plan": ("headshare.plan", "What is given up, as values that can be printed, saved and compared."),
    "headshare.evaluation": ("headshare.evaluation", "Perplexity, tasks, translation and generation."),
    "headshare.training": ("headshare.training", "PostShare, recovery and distillation on the Hugging Face Trainer."),
    "headshare.experiments": ("headshare.experiments", "Methods side by side at equal bytes."),
    "headshare.errors": ("headshare.errors", "Every error. All are kinds of `HeadshareError`."),
}


def _address(package: str) -> str:
    return f"reference/python/{package}.md"


def navigation() -> list[dict[str, str]]:
    """The entries of the navigation."""
    return [{package: _address(package)} for package in PACKAGES]


def pages() -> dict[str, str]:
    """The pages, under their addresses."""
    return {_address(package): _page(package, *words) for package, words in PACKAGES.items()}


def _page(package: str, title: str, summary: str) -> str:
    lines = [f"# {title}", "", summary, ""]
    if package == "headshare.errors":
        lines += [f"::: {package}", "    options: {show_root_heading: false}", ""]
        return "\n".join(lines)
    module = headshare if package == "headshare" else __import__(package, fromlist=["__all__"])
    for name in module.__all__:
        lines += [f"::: {package}.{name}", ""]
    return "\n".join(lines)
