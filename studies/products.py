"""Arguments of a study, with how exact its products of float32 matrices are."""

import argparse

import torch


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """What the command line says, with `--products` among it, which holds from now on."""
    parser.add_argument(
        "--products", choices=["float32", "bfloat16"], default="float32", help="of float32 matrices, CPU"
    )
    args = parser.parse_args()
    if args.products == "bfloat16":
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    return args
