"""The range of transformers versions that the engine is tested with."""

from __future__ import annotations

import warnings

import transformers
from packaging.version import Version
from transformers.modeling_outputs import BaseModelOutputWithPast

NEWEST_TESTED = Version("5.24")
"""The newest minor version that the suite runs on; the oldest one is in the package's requirements."""
CACHE_ARGUMENT = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
"""Name of the KV cache among the arguments and outputs of models: `cache` from transformers 5.24 on."""


def warn_if_untested(installed: str = transformers.__version__) -> None:
    """Warn, once per process by Python's own rule, that a newer transformers has not been tested."""
    version = Version(installed)
    if (version.major, version.minor) > (NEWEST_TESTED.major, NEWEST_TESTED.minor):
        warnings.warn(
            f"transformers {installed} is newer than {NEWEST_TESTED}, the newest version dropflow was tested with; "
            "results should be compared with an older version before they are trusted",
            stacklevel=3,
        )
