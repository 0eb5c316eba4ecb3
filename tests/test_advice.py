"""A sentence for each kind of trouble, and none that nobody reads."""

import re

import pytest

from port_checker import advice
from port_checker.connect import VerdictKind
from port_checker.tls import TlsVerdictKind
from tests.support.namespace import ROOT

SENTENCES = [
    name for name in vars(advice) if name.isupper() and isinstance(vars(advice)[name], str)
]
SOURCE = "".join(path.read_text() for path in (ROOT / "port_checker").rglob("*.py"))


def test_each_kind_of_verdict_has_its_advice() -> None:
    assert advice.FOR_PAGE.keys() == set(VerdictKind)
    without = {TlsVerdictKind.VALID, TlsVerdictKind.NO_CONNECTION}  # nothing to do; as for a port
    assert advice.FOR_TLS.keys() == set(TlsVerdictKind) - without


@pytest.mark.parametrize("name", SENTENCES)
def test_each_sentence_is_used_and_is_one(name: str) -> None:
    assert len(re.findall(rf"\b{name}\b", SOURCE)) > 1
    sentence = getattr(advice, name)
    assert sentence.endswith(".") or name == "AND_ROUTER"  # which ends in another sentence
