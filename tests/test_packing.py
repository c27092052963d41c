"""Episodes in transit arrive to the bit."""

import multiprocessing
import os
import pickle
import signal
import sys

import pytest
import torch

from metaicl.episode import Episode, Examples
from metaicl.packing import Packed
from metaicl.task import EpisodeStream
from metaicl.tasks import GaussianClasses


def odd_episode() -> Episode:
    """Every kind of field, sizes that are no multiple of the alignment, and an empty one."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 7, generator=generator, dtype=torch.float64).to(torch.float16)
    mask = torch.rand(3, 5, generator=generator) < 0.7
    support = Examples(x, torch.arange(15).view(3, 5) % 3, mask, torch.arange(15).view(3, 5))
    query = Examples(torch.zeros(3, 1, 7, dtype=torch.float16), torch.ones(3, 1, dtype=torch.long))
    return Episode(support, query, {"empty": torch.zeros(3, 0), "seed": torch.tensor([1, 2, 3], dtype=torch.int8)})


def test_episodes_survive_packing_and_pickling() -> None:
    stream = EpisodeStream(GaussianClasses(dim=3), seed=1, split="train", n_shot=(1, 4), n_query=2, chunk_size=3)
    episodes = [stream[0], odd_episode(), stream[1], odd_episode()[:0]]
    received = pickle.loads(pickle.dumps(Packed.pack(episodes))).unpack()
    assert [episode.fingerprint() for episode in received] == [episode.fingerprint() for episode in episodes]


def test_complex_latents_survive_packing() -> None:
    part = Examples(torch.ones(1, 1, 1), torch.ones(1, 1, 1))
    episode = Episode(part, part, {"a": torch.ones(1), "w": torch.tensor([[1 + 2j, 3.0]], dtype=torch.complex128)})
    assert Packed.pack([episode]).unpack()[0].fingerprint() == episode.fingerprint()


def test_a_stream_gives_the_same_chunks_in_messages_of_any_size(monkeypatch) -> None:
    stream = EpisodeStream(GaussianClasses(dim=3), seed=1, split="train", n_shot=(1, 4), n_query=2, chunk_size=3)
    here = [chunk.fingerprint() for chunk in stream.chunks(2, 9)]
    assert len(set(here)) == 7
    for workers, chunks, size in ((1, 4, 2**22), (2, 4, 2**22), (2, 16, 1)):
        monkeypatch.setattr("metaicl.task._CHUNKS_PER_MESSAGE", chunks)
        monkeypatch.setattr("metaicl.task._BYTES_PER_MESSAGE", size)
        assert [chunk.fingerprint() for chunk in stream.chunks(2, 9, workers=workers)] == here
    assert list(stream.chunks(4, 4, workers=1)) == []


@pytest.mark.skipif(sys.platform == "win32", reason="there a signal ends a process whatever it says")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_workers_leave_signals_to_their_parent(monkeypatch, number: signal.Signals) -> None:
    monkeypatch.setattr("metaicl.task._CHUNKS_PER_MESSAGE", 1)
    stream = EpisodeStream(GaussianClasses(dim=3), seed=1, split="train", n_shot=1, n_query=2, chunk_size=3)
    earlier = multiprocessing.active_children()
    chunks = stream.chunks(0, 12, workers=1)
    received = [next(chunks), next(chunks)]  # the second one comes from the worker
    (worker,) = [child for child in multiprocessing.active_children() if child not in earlier]
    assert worker.pid is not None
    os.kill(worker.pid, number)
    received += chunks
    assert [chunk.fingerprint() for chunk in received] == [stream[i].fingerprint() for i in range(12)]
    worker.join(timeout=60)
    assert worker.exitcode == 0
