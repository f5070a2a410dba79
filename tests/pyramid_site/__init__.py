"""Pyramid applications with pyramid_tm: ``site`` is one with the bank, and ``new_site(…)`` makes others."""
