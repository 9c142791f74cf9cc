"""Files: written whole or not at all, locked, resumed after a stop, and read with care where strangers wrote them."""
