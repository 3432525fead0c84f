"""Which layouts a run could have on so many GPUs, what they would need and how long they take.

``contents``: what a rank holds. ``assumptions``: every number that is not counted, with its slow
and fast end and its source. ``layouts``: candidates, and why some are refused. ``compute`` and
``communication``: seconds. ``prediction``: one layout. ``plan``: all of them. ``report`` and
``command``: what is printed. Memory and FLOPs are the dry run's own functions.
"""
