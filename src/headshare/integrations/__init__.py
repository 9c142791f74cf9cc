"""How shared checkpoints load in other libraries."""
