"""Commands for what is done elsewhere: in other tools, and on the hub."""
