"""An imported log names what its engine kept free, whatever the variables of the artifact say."""

from pathlib import Path

import msgspec
import pytest

from harness.errors import BadInputError
from harness.store.yaml import parse_calibration, read_calibration, to_yaml

SMALL = Path(__file__).parents[2] / "golden/llama-server/b11434-cuda-h100/small-1b/small-1b.yaml"


def test_less_is_kept_free_by_an_import_alone() -> None:
    replace, measured = msgspec.structs.replace, read_calibration(SMALL)
    metadata = measured.metadata
    placement = replace(metadata.placement, reserve_gb=0.5)
    less = replace(measured, metadata=replace(metadata, placement=placement))
    machine = replace(metadata.machine, meter="import")
    imported = replace(measured, metadata=replace(metadata, placement=placement, machine=machine))
    with pytest.raises(BadInputError, match=r"reserve_gb is 0\.5"):
        parse_calibration(to_yaml(less).encode(), "x.yaml")
    assert parse_calibration(to_yaml(imported).encode(), "x.yaml") == imported
