"""Deliberately broken versions of the package, and the tests that must see each of them."""
