"""What importing the package loads, in processes of their own."""

import json
import subprocess
import sys

import pytest

# Large libraries that the package itself does not need before it is asked for a picture, a
# progress bar in a notebook, or the like.
LARGE = ["matplotlib", "torchmetrics", "accelerate", "torchvision", "pandas", "sklearn", "IPython"]
LARGE += ["datasets", "rich", "click", "huggingface_hub.hf_api"]


def loaded(code):
    """Return which of the large libraries a program loads."""
    program = (
        f"{code}\nimport json, sys\nprint(json.dumps([m for m in {LARGE} if m in sys.modules]))"
    )
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return set(json.loads(run.stdout.splitlines()[-1]))


def test_importing_the_package_loads_none():
    assert loaded("import laplace_lora; laplace_lora.__version__") == set()


@pytest.mark.slow
def test_its_names_load_none_that_its_foundations_do_not():
    foundations = "import laplace, peft; from transformers import TrainerCallback"
    names = "from laplace_lora import *; import laplace_lora.evaluation, laplace_lora.generation"
    assert loaded(names) <= loaded(foundations)
