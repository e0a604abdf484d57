"""Writes the API reference from the docstrings, as HTML pages: `python .ci/reference.py FOLDER`."""

import sys
from pathlib import Path

import pdoc

# This clone, where another copy is installed too.
sys.path.insert(0, str(Path(__file__).parents[1]))

import hf_spp

# What the README and the examples import from, beside the package itself.
FURTHER = (
    "hf_spp.assets",
    "hf_spp.cards.eval_entries",
    "hf_spp.comparison.classification",
    "hf_spp.comparison.evaluation",
    "hf_spp.comparison.images",
    "hf_spp.comparison.metrics",
)

for name in hf_spp.__all__:
    getattr(hf_spp, name)  # The package imports a name when it is first used, and pdoc does not ask for it.
hf_spp.__doc__ = f"{hf_spp.__doc__}\n\nFurther modules: {', '.join(f'`{name}`' for name in FURTHER)}."
pdoc.render.configure(docformat="google", show_source=False)
pdoc.pdoc("hf_spp", r"!hf_spp\.", *FURTHER, output_directory=Path(sys.argv[1]))
