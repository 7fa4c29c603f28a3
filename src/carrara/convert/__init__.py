"""Checkpoints of other programs as models of Carrara, and back, each with a report of what was found equal.

One row of `LAYOUTS` is one program's way to lay out a model: how it is recognised, read and written.
"""

from carrara.convert.compvis import export_compvis, export_taming, import_compvis
from carrara.convert.diffusers import export_diffusers, import_diffusers
from carrara.convert.guided_diffusion import export_guided_diffusion, import_guided_diffusion
from carrara.convert.imported import Contents, Convertible, Hints, Imported, refuse_taken
from carrara.convert.layouts import LAYOUTS, Layout, export_model, import_model, load
from carrara.convert.parity import PARITY, check_outputs, fingerprint

__all__ = [
    "LAYOUTS",
    "PARITY",
    "Contents",
    "Convertible",
    "Hints",
    "Imported",
    "Layout",
    "check_outputs",
    "export_compvis",
    "export_diffusers",
    "export_guided_diffusion",
    "export_model",
    "export_taming",
    "fingerprint",
    "import_compvis",
    "import_diffusers",
    "import_guided_diffusion",
    "import_model",
    "load",
    "refuse_taken",
]
