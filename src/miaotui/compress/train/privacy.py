"""Differentially private training, through Opacus: clipping by window, noise, and the account of ε.

DP-SGD (Abadi et al. 2016, arXiv 1607.00133) with Poisson sampling. The unit is one window: whether any single window
was in the text changes the probability of any outcome by at most e^ε, but for a probability δ. A document longer than
a window, or one that the text holds twice, is not protected as a whole. Noise is of PyTorch's generator, which is no
cryptographic one.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from miaotui.compress.train.settings import Privacy
from miaotui.errors import DependencyError, UsageError


class Private:
    """Gradients window by window: each clipped to the norm `clip`, summed, with noise, over the expected batch.

    Raises UsageError where no amount of noise gives the wanted ε.
    """

    def __init__(
        self, wanted: Privacy, *, steps: int, batch: int, windows: int, clip: float, seed: int, device: str = "cpu"
    ) -> None:
        accountants, optimizers, get_noise_multiplier = _opacus()
        if batch > windows:
            raise UsageError(f"A batch of {batch} windows is drawn of {windows}.", "Ask for a smaller batch.")
        if wanted.delta >= 1 / windows:
            raise UsageError(
                f"δ is {wanted.delta:g}, and the text has {windows} windows: that allows publishing one of them.",
                f"Give a δ below {1 / windows:.1g}, such as {0.1 / windows:.1g}.",
            )
        self.wanted = wanted
        self.rate = batch / windows
        self.batch, self.clip = batch, clip
        try:
            with _quiet():
                found = get_noise_multiplier(
                    target_epsilon=wanted.epsilon,
                    target_delta=wanted.delta,
                    sample_rate=self.rate,
                    steps=steps,
                    accountant="rdp",
                )
            self.noise = float(found)
        except ValueError as error:
            raise UsageError(
                f"No noise gives ε = {wanted.epsilon:g} in {steps} steps.",
                "Ask for a larger ε or fewer steps.",
            ) from error
        self.accountant: Any = accountants.RDPAccountant()
        self._optimizers = optimizers
        self.generator = torch.Generator(device).manual_seed(seed)
        self._clipped: Any = None

    def begin(self, parameters: Sequence[torch.Tensor]) -> None:
        """Start a step's sum."""
        self._clipped = self._optimizers.DPOptimizer(
            torch.optim.SGD(parameters, lr=1.0),
            noise_multiplier=self.noise,
            max_grad_norm=self.clip,
            expected_batch_size=self.batch,
            generator=self.generator,
        )
        for parameter in parameters:
            parameter.grad_sample = parameter.new_zeros((0, *parameter.shape))  # type: ignore[attr-defined]
        self._clipped.clip_and_accumulate()

    def add(self) -> None:
        """Take the gradient of one window, which the parameters have, and clear it."""
        for parameter in self._clipped.params:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad_sample, parameter.grad = gradient[None], None
        self._clipped.clip_and_accumulate()

    def end(self) -> None:
        """Give the parameters the step's gradient, and account for it."""
        self._clipped.add_noise()
        self._clipped.scale_grad()
        self.accountant.step(noise_multiplier=self.noise, sample_rate=self.rate)
        for parameter in self._clipped.params:
            parameter.grad_sample = parameter.summed_grad = None

    @property
    def epsilon(self) -> float:
        """Of all steps until now."""
        if not self.accountant.history:
            return 0.0
        with _quiet():
            return float(self.accountant.get_epsilon(delta=self.wanted.delta))

    # -- checkpoints -------------------------------------------------------------------------------------
    @property
    def history(self) -> list[list[float]]:
        return [list(entry) for entry in self.accountant.history]

    @history.setter
    def history(self, entries: list[list[float]]) -> None:
        self.accountant.history = [(noise, rate, int(steps)) for noise, rate, steps in entries]

    def report(self) -> dict[str, float]:
        found = {"epsilon": self.epsilon, "delta": self.wanted.delta, "noise": self.noise, "clip": self.clip}
        assert math.isfinite(found["epsilon"])
        return {**found, "sample_rate": self.rate}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning that a bound could be tighter with more orders of Rényi's divergence: it holds as it is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Optimal order is", category=UserWarning)
        yield


def _opacus() -> tuple[Any, Any, Any]:
    try:
        from opacus import accountants, optimizers
        from opacus.accountants.utils import get_noise_multiplier
    except ImportError as error:
        raise DependencyError(
            f"Differential privacy needs Opacus, which is absent ({error}).",
            "Install it: pip install 'miaotui[private]'.",
        ) from error
    return accountants, optimizers, get_noise_multiplier
