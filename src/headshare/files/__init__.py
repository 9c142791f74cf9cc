"""Files: written whole or not at all, locked, resumed after a stop, and read with care where strangers wrote them.

A folder is written as a locked temporary sibling, flushed, opened again, compared, then renamed;
over an old one it is exchanged. What is made for a time is locked while its maker lives, and removed by the
next once it is dead (`scratch`). `resume` holds the state of a run that can be stopped: whose it is,
until when it is kept, and what is left of one whose output is in place. `kept_rows` holds results that
many runs add to. Knows no plan, no model and no checkpoint.
"""
