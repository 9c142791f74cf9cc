"""Products with matrices of 8 bits, which are not unpacked whole. Each kind of device has its own.

A product takes inputs (tokens, inputs), whole numbers (outputs, inputs) and the scale of each row, and gives (tokens,
outputs) in the type of the inputs. What is registered for a kind of device must compute sums of inputs times whole
numbers, and scale them once: so they differ from a product with the unpacked matrix by roundings alone.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import linear

Product = Callable[[Tensor, Tensor, Tensor], Tensor]

# The most tokens for which torch's product of 16-bit inputs and whole numbers is faster than converting these: it reads
# them once for each token. Measured on 576 x 1536 and 4096 x 4096 (benchmarks/int8.py).
FEW_TOKENS = 16
# torch's product takes so many inputs in one step, and reads past the end of a matrix that its steps do not fill
WHOLE_STEPS = 32
# whole numbers that are converted together, so that they stay in a cache
AT_ONCE = 2**20
HALF = (torch.bfloat16, torch.float16)


def converted(
    x: Float[Tensor, "tokens inputs"], numbers: Int[Tensor, "outputs inputs"], scale: Float[Tensor, " outputs"]
) -> Float[Tensor, "tokens outputs"]:
    """The product by converting the whole numbers to the inputs' type, in which they are exact."""
    return linear(x, numbers.to(x.dtype)) * scale


def on_cpu(
    x: Float[Tensor, "tokens inputs"], numbers: Int[Tensor, "outputs inputs"], scale: Float[Tensor, " outputs"]
) -> Float[Tensor, "tokens outputs"]:
    """The product on a CPU: torch's own for few tokens, else some rows at a time."""
    outputs, inputs = numbers.shape
    if (torch.is_grad_enabled() and x.requires_grad) or torch.compiler.is_compiling():
        return converted(x, numbers, scale)
    if len(x) <= FEW_TOKENS and x.dtype in HALF and numbers.is_contiguous() and inputs % WHOLE_STEPS == 0:
        return torch._weight_int8pack_mm(x.contiguous(), numbers, scale)
    step = max(1, AT_ONCE // max(1, inputs))
    if step >= outputs:
        return linear(x, numbers.to(x.dtype)).mul_(scale)
    made = x.new_empty(len(x), outputs)
    rows = x.new_empty(step, inputs)
    for start in range(0, outputs, step):
        some = numbers[start : start + step]
        made[:, start : start + step] = linear(x, rows[: len(some)].copy_(some))
    return made.mul_(scale)


PRODUCTS: dict[str, Product] = {"cpu": on_cpu}


def product(
    x: Float[Tensor, "*tokens inputs"], numbers: Int[Tensor, "outputs inputs"], scale: Float[Tensor, " outputs"]
) -> Float[Tensor, "*tokens outputs"]:
    """The product of inputs and a matrix of whole numbers with one scale for each row."""
    flat = x.reshape(-1, x.shape[-1])
    made = PRODUCTS.get(x.device.type, converted)(flat, numbers, scale.to(x.dtype))
    return made.view(*x.shape[:-1], len(numbers))
