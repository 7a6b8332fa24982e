"""Settings of a `Trainer` that runs on a CPU and neither saves, logs nor shows anything."""

from transformers import TrainingArguments


def quiet(folder, **options):
    """Return training arguments.

    Args:
        folder: Where a trainer would save.
        **options: More of them, or others.
    """
    silence = {"report_to": [], "use_cpu": True, "disable_tqdm": True}
    silence |= {"save_strategy": "no", "logging_strategy": "no"}
    return TrainingArguments(str(folder), **{**silence, **options})
