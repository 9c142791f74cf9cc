"""The picture of a plan as a page: layers by heads, who lends to whom, what is gone, and bytes by layer."""
