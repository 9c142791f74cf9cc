"""The names of the files that make a model's folder, in one list for all who ask.

`checkpoint.contents` chooses by it what a model is loaded from and what is copied along. `folder` replaces nothing else
where no manifest says what was written. This module opens no file.
"""

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CARD = "README.md"
ADAPTER = "adapter_config.json"
MODULES = "modules.json"
SAFE = ".safetensors"
TOKENIZER = (
    "tokenizer.json", "tokenizer.*.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.model", "tokenizer.model.v*", "*.tiktoken", "tiktoken.model", "tekken.json", "spiece.model", "spm.model",
    "spm_char.model", "sentencepiece.model", "sentencepiece.bpe.model", "source.spm", "target.spm", "vocab.json",
    "vocab.txt", "merges.txt", "bpe.codes", "dict.txt", "emoji.json", "normalizer.json", "byte_maps.json",
    "entity_vocab.json", "target_vocab.json", "vocab-src.json", "vocab-tgt.json", "prophetnet.tokenizer",
    "word_shape.json", "word_pronunciation.json", "chat_template.jinja", "chat_template.json",
    "additional_chat_templates/*.jinja",
)  # fmt: skip
SETTINGS = (
    "generation_config.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "audio_tokenizer_config.json", MODULES, "config_sentence_transformers.json", "sentence_*_config.json",
)  # fmt: skip
_LICENCES = ("LICEN[CS]E", "Licen[cs]e", "licen[cs]e", "COPYING", "NOTICE", "Notice", "USE_POLICY")
LICENCE = tuple(f"{word}{end}" for word in _LICENCES for end in ("", ".txt", ".md", "-*.txt", "-*.md"))
CODE = ("*.py",)
# what headshare itself adds to a folder
RECORDS = ("training.json",)
# within the folders of a sentence embedder's modules, which have weights of their own
OF_A_MODULE = ("*.json", "*.txt", "*.model", "*.jinja", f"*{SAFE}")
# what a checkpoint's folder holds that no manifest lists: one that was written before the manifest listed all, or by
# another tool. Licences, code and what else somebody may have put there are left alone.
WRITTEN = (
    CONFIG, f"*{SAFE}", f"*{SAFE}.index.json", *RECORDS, *TOKENIZER, *SETTINGS,
    *(f"[0-9]_*/{name}" for name in (CONFIG, WEIGHTS)),
)  # fmt: skip
