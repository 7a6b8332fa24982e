"""What processes that run a sharded model on data of their own say, where their batches differ."""

from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler, default_collate

from laplace_lora import KronLoraLaplace, KronLoraLLLaplace
from support.batches import loader, split_rows, token_batch
from support.language import EXACT, text_batch, text_loader
from support.models import peft_model
from support.posteriors import LOW
from support.preferences import pair_loader
from support.processes import outcome_of
from support.spans import question_batch, question_loader, reader
from support.tokens import tagged_batch, tagged_loader, tagger
from support.vision import image_text_model, image_texts


class InTurn:
    """Gives batches of varying sizes, as samplers with a budget of tokens do."""

    drop_last = False

    def __init__(self, *batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)


def in_layers(model):
    """Shard a model, each layer of its stacks by itself."""
    for module in list(model.modules()):
        if isinstance(module, nn.ModuleList) and not hasattr(module, "unshard"):
            for layer in module:
                fully_shard(layer)
    return fully_shard(model)


def cut(rows):
    """Collate texts as long as the longest of them."""
    length = max(int(row["attention_mask"].sum()) for row in rows)
    return {k: v[:, :length] if v.ndim == 2 else v for k, v in default_collate(rows).items()}


def questions_about_images():
    """Batches of two texts with an image each, with two and none, and without any."""
    for i, counts in enumerate([(1, 1), (1, 1), (2, 0), (1, 1), (1, 1), (0, 0)]):
        batch = dict(image_texts(counts, tails=(2, 3), seed=i)[0])
        if not sum(counts):
            del batch["pixel_values"]
        yield {**batch, "labels": torch.arange(2)}


def cases():
    """Return model, likelihood, class, options and data of each case."""
    padded = DataLoader(split_rows(token_batch((5, 5, 5, 5, 4, 6, 4, 3))), 2, collate_fn=cut)
    sizes = InTurn([0], [1], [2], [3, 4], [5, 6], [7])
    uneven = DataLoader(split_rows(token_batch((5,) * 8)), batch_sampler=sizes)
    images = DataLoader(list(questions_about_images()), batch_size=None)
    tokens = {**LOW, **EXACT}
    tags = tagged_loader(batch=tagged_batch((4, 6, 3, 5, 2)))
    texts = text_loader(batch=text_batch((4, 3, 3), (2, 1, 1)))
    spans = question_loader(batch=question_batch((5, 7, 4), (1, 2, 0), (3, 2, 0)))
    texts_alone = partial(image_text_model, "llava")
    answers = {"target_ids": [7, 8, 9]}
    classifier = partial(peft_model, "llama")
    return {
        "padding": (classifier, "classification", KronLoraLaplace, LOW, padded),
        "sizes": (classifier, "classification", KronLoraLaplace, LOW, uneven),
        "images": (texts_alone, "classification", KronLoraLaplace, answers, images),
        "tags": (partial(tagger, "llama"), "token_classification", KronLoraLaplace, tokens, tags),
        "texts": (
            partial(peft_model, "llama-lm"),
            "language_modeling",
            KronLoraLaplace,
            tokens,
            texts,
        ),
        "spans": (partial(reader, "llama"), "question_answering", KronLoraLaplace, tokens, spans),
        "pairs": (
            partial(peft_model, "llama", num_labels=1),
            "reward_modeling",
            KronLoraLaplace,
            LOW,
            pair_loader(),
        ),
        "last layer": (classifier, "classification", KronLoraLLLaplace, {}, loader()),
    }


def said_of(case):
    """Return what a posterior says of data, by the call; sharded where there are processes."""
    make, likelihood, cls, options, data = cases()[case]
    model = make()
    if dist.is_initialized():
        model, data = in_layers(model), dealt_out(data)
    la = cls(model, likelihood, **options)
    la.fit(data)
    found = {"n": torch.tensor(float(la.n_data)), "fit": la.log_marginal_likelihood().detach()}
    if la.logits_model is not None and likelihood in ("classification", "reward_modeling"):
        la.optimize_prior_precision(method="loo", train_loader=data)
        la.prior_precision = 3.0
        found["calibrate"] = torch.tensor(la.calibrate(data).nll_after)
        found["predict"] = la.predict(data).probs
    return found


def dealt_out(data):
    """Return a loader that gives each process its share of another's batches or examples."""
    if isinstance(data.batch_sampler, InTurn):
        from accelerate import Accelerator

        return Accelerator(cpu=True).prepare(data)
    return DataLoader(
        data.dataset,
        data.batch_size,
        collate_fn=data.collate_fn,
        sampler=DistributedSampler(data.dataset, shuffle=False),
    )


def surprised(rank):
    """Return what is said where one process takes a pass more, and where one fails in between."""
    found = {}
    # All run the first batches of both, and each the next by itself.
    data = dealt_out(DataLoader(split_rows(token_batch((5,) * 8)), batch_size=2))
    for name in ("more", "fails"):
        la = KronLoraLaplace(in_layers(peft_model("llama")), "classification", **LOW)
        la.fit(data)
        before = la.state
        nll, calls = la.objective.nll, []

        def other(f, y, la=la, nll=nll, calls=calls, name=name):
            calls.append(1)
            if rank == 1 and len(calls) == 3:
                if name == "fails":
                    raise ValueError("no luck")
                la.logits_model(token_batch((4, 2)))
            return nll(f, y)

        la.objective.nll = other
        found[name] = outcome_of(partial(la.fit, data)), la.state is before
        la.objective.nll = nll
    return found
