import importlib
import subprocess
import sys

import fathom


def test_every_public_name_is_there_and_documented():
    assert 10 <= len(fathom.__all__) <= 15
    for name in fathom.__all__:
        assert getattr(fathom, name).__doc__, name
    assert sorted(dir(fathom)) == sorted(fathom.__all__)
    assert fathom.depth_attention is importlib.import_module("fathom.depth_attention")


def test_an_unknown_name_is_an_attribute_error():
    try:
        fathom.nothing  # noqa: B018
    except AttributeError as error:
        assert "nothing" in str(error)
    else:
        raise AssertionError("no AttributeError")


def test_importing_the_package_does_not_import_torch():
    code = "import sys, fathom, fathom.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_two_epsilons_are_one():
    assert importlib.import_module("fathom.models.config").EPS == fathom.depth_attention.EPS
