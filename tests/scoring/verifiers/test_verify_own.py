"""A user's own verifier: whatever it does, the caller gets a verdict in bounded time."""

import os
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siftline.scoring.verifiers import ExactVerifier, Verdict, get_verifier
from siftline.scoring.verifiers.own import OwnVerifier

SOURCE = '''
import os, time
import numpy as np
from siftline.scoring.verifiers import Verdict

class Same:
    """Answers by what the response asks for."""

    calls = 0

    def __call__(self, response, answer):
        self.calls += 1
        print("noise on stdout")
        if response == "hang":
            while True:
                time.sleep(0.01)
        if response == "die":
            os._exit(3)
        if response == "raise":
            raise LookupError("no such thing")
        if response == "bool":
            return True
        if response == "numpy":
            return Verdict(np.bool_(True), response, "match", np.int64(2))
        if response == "number":
            return Verdict(1, response, "match")
        if response == "array":
            return Verdict(np.array([True]), response, "match")
        if response == "extracted":
            return Verdict(True, 18, "match")
        if response == "reason":
            return Verdict(True, "18", None)
        if response == "step":
            return Verdict(False, "18", "wrong_answer", "first")
        if response == "count":
            return Verdict(True, str(self.calls), "match")
        same = response == answer
        return Verdict(same, response, "match" if same else "wrong_answer", None if same else 2)

nothing = 3
'''


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "my_checks.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    made = OwnVerifier("my_checks:Same", timeout=20)
    yield made
    made.close()


def test_its_verdicts_come_through_whole(own):
    assert own("a", "a") == Verdict(True, "a", "match")
    assert own("b", "a") == Verdict(False, "b", "wrong_answer", 2)
    assert own("count", "") == Verdict(True, "3", "match")  # one child for all calls


def test_what_it_does_wrong_is_an_error_of_its_own(own):
    for said, reason in (
        ("raise", "verifier_error: LookupError: no such thing"),
        ("bool", "verifier_error: it returned bool, not a Verdict"),
        ("number", "verifier_error: correct is 1: give True, False or None"),
        ("array", "verifier_error: correct is array([ True]): give True, False or None"),
        ("extracted", "verifier_error: extracted is 18: give a text or None"),
        ("reason", "verifier_error: reason is None: give a text"),
        ("step", "verifier_error: first_error is 'first': give a whole number or None"),
        ("die", "verifier_error: the verifier's process ended with code 3"),
    ):
        assert own(said, "a") == Verdict(None, None, reason)
        assert own("a", "a").correct is True


def test_numpys_truth_is_truth(own):
    found = own("numpy", "")
    assert found == Verdict(True, "numpy", "match", 2)
    assert found.correct is True


def test_a_hang_ends_with_its_process_and_the_next_call_works(own):
    own("a", "a")
    child = own._child.pid
    own.timeout = 0.5
    began = time.monotonic()
    assert own("hang", "a") == Verdict(None, None, "verifier_error: timeout after 0.5 s")
    assert time.monotonic() - began < 10
    assert not os.path.exists(f"/proc/{child}")
    own.timeout = 20
    assert own("a", "a").correct is True


def test_several_threads_may_ask(own):
    found = {}

    def ask(name):
        found[name] = [own(f"{name}{i}", f"{name}{i % 2}").correct for i in range(10)]

    threads = [threading.Thread(target=ask, args=(name,)) for name in "xyz"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(found[name] == [i < 2 for i in range(10)] for name in "xyz")


@settings(max_examples=30, deadline=None)
@given(st.text(max_size=40), st.text(max_size=40))
def test_it_is_the_same_as_without_a_process(plain, response, answer):
    assert plain(response, answer) == ExactVerifier()(response, answer)


@pytest.fixture(scope="module")
def plain():
    made = OwnVerifier("siftline.scoring.verifiers:ExactVerifier")
    yield made
    made.close()


def test_a_name_that_is_none_is_refused_at_once(own):
    with pytest.raises(ValueError, match="can't be imported"):
        OwnVerifier("my_checks:Missing")
    with pytest.raises(ValueError, match="is not callable"):
        get_verifier("my_checks:nothing")
    assert get_verifier("my_checks:Same") is get_verifier("my_checks:Same")
    get_verifier("my_checks:Same").close()
