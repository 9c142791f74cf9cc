"""Files: whole or absent after a write, locked, resumed after a stop, and checked where strangers wrote them."""
