"""The commands by name: where each stands, the form of its help, and examples. None is imported before it is used."""
