# SPDX-License-Identifier: Apache-2.0
"""Signals while a command works, and after it has done its work."""

from __future__ import annotations

import os
import signal

import pytest

from cryoci.cli.signals import settle, unwinding

ALL = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_told_to_end_while_it_works(number: int) -> None:
    undone = []
    with pytest.raises(SystemExit) as ended, unwinding():
        try:
            os.kill(os.getpid(), number)
        finally:
            undone.append(number)
    assert ended.value.code == 128 + number and undone == [number]


@pytest.mark.parametrize("number", ALL)
def test_told_to_end_when_the_work_is_done(number: int) -> None:
    with unwinding():
        settle()
        os.kill(os.getpid(), number)
    os.kill(os.getpid(), number)  # while it says what it did


def test_handlers_are_put_back() -> None:
    before = {number: signal.getsignal(number) for number in ALL}
    with unwinding():
        assert signal.getsignal(signal.SIGTERM) != before[signal.SIGTERM]
    assert {number: signal.getsignal(number) for number in ALL} == before
