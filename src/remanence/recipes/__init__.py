"""Recipes: a run is a Python function that returns all of it. One module is one recipe; its name on the command line has dashes.

They live inside the package, so that an installed library has them too. Each module has

    def recipe(out=None, seed=0, steps=None, device="auto", fast=False, data=None, memory=None) -> Run

out: where the run will write. fast: a run of seconds that shows that everything works, not what it can do. data: a folder of .txt files.
memory: slugs of the catalog (--memory or --mixers). A recipe that trains a grid of small models returns a Grid (recipes/_grid.py), which
starts like a Run. A recipe refuses, with a UsageError, a flag that means nothing to it.
"""
