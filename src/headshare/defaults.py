"""Values that options offer, or have where nothing else is said, for those who import no library to know them."""

# types that weights can be written in, with their names in safetensors files
OUTPUT_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
# tokens of a calibration text
TOKENS = 32_768
# what the demo saves, the ratio of the paper's method there, and the tokens that it measures on
DEMO_SAVED = ("5%", "10%", "20%")
DEMO_RATIO = 0.3
DEMO_TOKENS = 4096
# formats that a model may be made for
GGUF = "gguf"
TARGET_NAMES = (GGUF,)
# characters of the longest name that a plan holds
MAX_NAME = 200
# words for the bits that a plan may give matrices
WIDTH_NAMES = ("16", "8", "4", "auto")
