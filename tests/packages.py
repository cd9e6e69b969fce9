"""The import packages that the distribution holds."""

PACKAGES = [
    "dropflow",
    "dropflow_lab",
    "dropflow_anchorprune",
    "dropflow_cdpruner",
    "dropflow_control",
    "dropflow_dart",
    "dropflow_divprune",
    "dropflow_fastv",
    "dropflow_hidrop",
    "dropflow_mustdrop",
    "dropflow_pixelprune",
    "dropflow_prumerge",
    "dropflow_pyramiddrop",
    "dropflow_scope",
    "dropflow_sparsevlm",
    "dropflow_tome",
    "dropflow_visionzip",
    "dropflow_vtw",
    "dropflow_adapters",
    "dropflow_policies",
]
