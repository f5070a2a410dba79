"""Projections, on each host and database.

A test asks for ``desk``: a bank on one host, its two read models (``Balance`` and ``Seen``), and what an operator does
with projections. ``desk.balances()`` registers a projection, ``desk.open(100)`` saves events, ``desk.run_once()``
applies all that there are, and ``desk.poison`` has the amounts of deposits at which handlers fail.
``new_desk(**config)`` makes one with other settings.
"""
