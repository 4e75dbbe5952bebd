"""The demo's training: scikit-learn's handwritten digits, a minute or less on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from edgekit.progress import Progress, silent
from edgekit.training.digits_net import digits_net

EPOCHS, BATCH, RATE = 15, 64, 3e-3
CALIBRATION_SAMPLES, TEST_SAMPLES = 320, 500


def train(checkpoint: Path, calibration: Path, test: Path, *, seed: int = 0, on_progress: Progress = silent) -> float:
    """Train the demo's network, save its state_dict, and calibration and test data as `.npz`; top-1 on the test data.

    Calibration samples come from the training data. The images `(N, 1, 8, 8)` are float32 in [0, 1].
    """
    digits = load_digits()
    images = (digits.images[:, None] / 16.0).astype(np.float32)
    labels = digits.target.astype(np.int64)
    order = np.random.default_rng(seed).permutation(len(labels))
    held_out, used = order[:TEST_SAMPLES], order[TEST_SAMPLES:]
    shown = used[:CALIBRATION_SAMPLES]
    np.savez(calibration, image=images[shown], labels=labels[shown])
    np.savez(test, image=images[held_out], labels=labels[held_out])

    torch.manual_seed(seed)
    network = digits_net()
    with _one_thread():
        _fit(network, torch.from_numpy(images[used]), torch.from_numpy(labels[used]), seed, on_progress)
    torch.save(network.state_dict(), checkpoint)
    network.eval()
    with torch.no_grad():
        scores = network(torch.from_numpy(images[held_out]))
    return float((scores.argmax(1).numpy() == labels[held_out]).mean())


@contextmanager
def _one_thread() -> Iterator[None]:
    """Layers this small gain nothing from a second thread; on a busy machine, threads that wait for each other take ten times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _fit(network: nn.Module, images: Tensor, labels: Tensor, seed: int, on_progress: Progress) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), RATE)
    steps = EPOCHS * (len(labels) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    for epoch in range(EPOCHS):
        order = torch.randperm(len(labels), generator=generator)
        for start in range(0, len(labels) - BATCH + 1, BATCH):
            chosen = order[start : start + BATCH]
            loss = nn.functional.cross_entropy(network(images[chosen]), labels[chosen])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
        on_progress("train", epoch + 1, EPOCHS)
