"""The stand-ins have the signatures of the releases that they name."""

import importlib
import importlib.metadata
from operator import attrgetter
from typing import Any

import pytest
from torch.nn import functional

from tests.support.stand_ins import RELEASED, bare_signature, installed_stand_ins
from tests.support.stand_ins.scaled_grouped_mm import scaled_grouped_mm


@pytest.mark.parametrize(("module", "name"), RELEASED)
def test_stand_ins_have_the_released_signature(module: str, name: str) -> None:
    released = RELEASED[module, name]
    with installed_stand_ins():
        loaded: Any = importlib.import_module(module)
    assert bare_signature(attrgetter(name)(loaded)) == released.signature
    assert f"{released.distribution} {released.version}, {released.source}" in loaded.__doc__


@pytest.mark.parametrize(("module", "name"), RELEASED)
def test_the_real_package_has_it_too(module: str, name: str) -> None:
    released = RELEASED[module, name]
    try:
        version = importlib.metadata.version(released.distribution)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{released.distribution} is not installed")
    if version != released.version:
        pytest.skip(f"{version} is installed, the stand-in is of {released.version}")
    assert bare_signature(attrgetter(name)(importlib.import_module(module))) == released.signature


def test_the_emulated_gemm_has_torchs_signature() -> None:
    real = bare_signature(functional.scaled_grouped_mm)
    assert bare_signature(scaled_grouped_mm) == real
