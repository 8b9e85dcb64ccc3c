"""The library: recipes, artifacts, weights, surgery, models, training, serving, scoring, reports.

Importing it installs the remedies of `vlmcore.compat`, before anyone can import transformers: a
library that has once looked for torchvision in vain does not look again.
"""

from vlmcore import compat

compat.install()
