"""Methods of the comparison that train an adapter of their own: IVON, and MAP with more labels."""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional as F

from benchmarks.study.checkpoints import pretrained, train, training_loader
from benchmarks.study.tasks import Task
from laplace_lora import LogitsModel
from laplace_lora.adaptive import IVON
from laplace_lora.evaluation import MAP

# Of the authors' scripts for their small data sets (github.com/team-approx-bayes/ivon-lora), whose
# thousands of steps we do not take: the rate gives a step AdamW's largest length.
IVON_SETTINGS = {"ess": 1e6, "hess_init": 1e-3, "clip_radius": 1e-3, "weight_decay": 1e-6}


def with_more_labels(task: Task, args: argparse.Namespace, seed: int, labels: int) -> PeftModel:
    """Train like the checkpoint, on the training rows and the first validation rows.

    Epochs are as many, so that more rows are more steps.
    """
    rows = [*task.splits["train"], *task.splits["val"][:labels]]
    more = replace(task, splits={**task.splits, "train": rows})
    model = pretrained(more, args, seed)
    train(model, more, args)
    return model


class SampledAdapter(MAP):
    """An adapter trained with a width for its weights, averaged over samples of them.

    Args:
        task: The data.
        args: The study's arguments.
        seed: Of head, adapter, batch order, dropout and samples.
        n_samples: Of the weights, the same for every batch.
    """

    def __init__(self, task: Task, args: argparse.Namespace, seed: int, n_samples: int) -> None:
        self.peft = pretrained(task, args, seed)
        super().__init__(LogitsModel(self.peft, task.target_ids))
        self.trained = [p for p in self.peft.parameters() if p.requires_grad]
        self.generator = torch.Generator(self.trained[0].device).manual_seed(seed)
        self.n_samples = n_samples

    @property
    def bytes(self) -> int:
        """What is stored beside the mean."""
        raise NotImplementedError

    def sampled(self) -> AbstractContextManager[None]:
        """Return a context in which the model has a sample of its weights."""
        raise NotImplementedError

    @torch.no_grad()
    def __call__(self, batch: Any) -> Tensor:
        """Return class probabilities, ``(batch, classes)``."""
        self.generator.manual_seed(0)
        total: Any = 0
        for _ in range(self.n_samples):
            with self.sampled():
                total = total + super().__call__(batch)
        return total / self.n_samples


class VariationalMean(SampledAdapter):
    """IVON: an adapter trained by variational inference.

    Source: Cong et al. (2024), arXiv:2411.04421. Epochs, batches and schedule are the
    checkpoint's.

    Args:
        task: See `SampledAdapter`.
        args: See there.
        seed: See there.
        n_samples: See there.
    """

    def __init__(self, task: Task, args: argparse.Namespace, seed: int, n_samples: int) -> None:
        super().__init__(task, args, seed, n_samples)
        rate = args.rate / IVON_SETTINGS["clip_radius"]
        self.optimizer = IVON(self.trained, rate, generator=self.generator, **IVON_SETTINGS)
        self._fit(task, args)

    def _fit(self, task: Task, args: argparse.Namespace) -> None:
        loader, schedule = training_loader(task, args, self.optimizer)
        self.peft.train()
        for _ in range(args.epochs):
            for batch in loader:
                with self.optimizer.sampled_params(train=True):
                    with torch.autocast(str(args.device), torch.bfloat16, enabled=args.autocast):
                        output = self.model(batch)
                    F.cross_entropy(output, batch["labels"].to(output.device)).backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
                schedule.step()
        self.peft.eval()

    @property
    def bytes(self) -> int:
        """What is stored beside the mean: one width a weight."""
        return sum(p.nbytes for p in self.trained)

    def sampled(self) -> AbstractContextManager[None]:
        """Return a context in which the model has a sample of its weights."""
        return self.optimizer.sampled_params()
