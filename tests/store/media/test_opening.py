"""A place is a path or a URL."""

from pathlib import Path

import pytest

from ntkpipe.base import errors
from ntkpipe.store.media.opening import medium_at


def test_a_place_is_a_path_or_a_url(tmp_path):
    assert medium_at(str(tmp_path)) == medium_at(tmp_path)
    assert medium_at("~/a.zarr").root == Path.home() / "a.zarr"
    assert medium_at("s3://bucket/a.zarr").root == "s3://bucket/a.zarr"
    with pytest.raises(errors.ConfigError, match="needed a path or a URL"):
        medium_at(3)
