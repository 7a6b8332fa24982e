"""The example that compares adapters by their evidence says no more than the evidence does."""

from support.examples import imported


def test_a_small_lead_decides_nothing(monkeypatch):
    verdict = imported("marglik_training", monkeypatch).verdict
    found = verdict({"rank 2": -40.0, "rank 8": -31.0, "rank 32": -33.5})
    assert (
        found
        == "The evidence decides nothing between rank 2 and rank 8 and rank 32: under 10 nats."
    )
    found = verdict({"rank 2": -50.0, "rank 8": -31.0, "rank 32": -33.5})
    assert found == "The evidence decides nothing between rank 8 and rank 32: under 10 nats."
    found = verdict({"rank 2": -50.0, "rank 8": -31.0, "rank 32": -43.5})
    assert found == "The training data support rank 8 most, by 12.5 nats."
