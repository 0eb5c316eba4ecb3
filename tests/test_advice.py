"""A sentence for each kind of trouble, and none that nobody reads."""

import re
from collections import Counter

from port_checker import advice
from port_checker.connect import VerdictKind
from port_checker.tls import TlsVerdictKind
from port_checker.verdicts import PORT_VERDICTS, TLS_KINDS
from tests.support.namespace import ROOT

SENTENCES: dict[str, str] = {
    name: value for name, value in vars(advice).items() if name.isupper() and isinstance(value, str)
}


def test_each_kind_of_verdict_has_its_advice() -> None:
    assert advice.FOR_PAGE.keys() == set(VerdictKind)
    without = {TlsVerdictKind.VALID, TlsVerdictKind.NO_CONNECTION}  # nothing to do; as for a port
    assert advice.FOR_TLS.keys() == set(TlsVerdictKind) - without


def test_each_kind_of_verdict_has_words_that_stand_for_it() -> None:
    kinds = {verdict.kind for verdict in PORT_VERDICTS.values()}
    assert kinds == set(VerdictKind) - {VerdictKind.OPEN, VerdictKind.OTHER}
    assert set(TLS_KINDS.values()) == set(TlsVerdictKind) - {TlsVerdictKind.VALID}


def test_each_sentence_is_used_and_is_one() -> None:
    source = "".join(path.read_text() for path in (ROOT / "port_checker").rglob("*.py"))
    uses = Counter(re.findall(r"\w+", source))
    for name, sentence in SENTENCES.items():
        assert uses[name] > 1, name
        assert sentence.endswith(".") or name == "AND_ROUTER"  # which ends in another sentence
