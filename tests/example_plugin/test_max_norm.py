"""The plug-in's own test: the contract kit, in one line."""

from orchestrator.compression.testing import check_compressor


def test_it_keeps_the_contract():
    check_compressor({"kind": "max_norm"}, ["llava", "vipllava"])
