"""A newer transformers is used with a warning, a tested one without."""

from __future__ import annotations

import warnings

import pytest

from dropflow.backbone.versions import NEWEST_TESTED, warn_if_untested


def test_a_newer_version_warns_and_goes_on() -> None:
    with pytest.warns(UserWarning, match=r"transformers 5\.99\.1 is newer than"):
        warn_if_untested("5.99.1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_untested(f"{NEWEST_TESTED}.9")
        warn_if_untested("5.20.0")
