"""The names of the storages, for those who offer a choice of them without importing torch."""

AUTO = "auto"

# In the order in which `auto` asks the storages. Any that follows one that never refuses must be asked for by name.
NAMES = ("alias", "indirect", "owner", "vmm")
