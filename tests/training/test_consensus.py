import os
import signal

import torch

from training.consensus import Consensus

CPU = torch.device("cpu")


def test_a_finite_step_is_taken_without_a_gate():
    consensus = Consensus(CPU)
    assert consensus.agree(torch.tensor(True), bad_images=2, tag="step") is None
    verdict = consensus.verdict()
    assert (verdict.skipped, verdict.stop, verdict.bad_images, verdict.tag) == (False, False, 2, "step")
    assert consensus.verdict() is None


def test_a_step_that_is_not_finite_closes_the_gate():
    consensus = Consensus(CPU)
    assert consensus.agree(torch.tensor(False), bad_images=0).item() == 0.0
    assert consensus.verdict().skipped


def test_a_clock_that_says_it_is_time_to_save_is_heard():
    consensus = Consensus(CPU)
    for save in (True, False):
        consensus.agree(torch.tensor(True), bad_images=0, save=save)
        assert consensus.verdict(wait=True).save == save
    assert consensus.verdict(wait=True) is None


def test_signals_ask_for_a_stop_after_the_step():
    before = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        for name in before:
            consensus = Consensus(CPU)
            consensus.listen()
            os.kill(os.getpid(), name)
            consensus.agree(torch.tensor(True), bad_images=0)
            assert consensus.verdict().stop
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
