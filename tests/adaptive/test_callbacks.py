"""IVON and AdaLoRA inside `transformers.Trainer`."""

import json
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from transformers import Trainer, TrainerCallback, TrainingArguments

from laplace_lora.adaptive import (
    IVON,
    AdaLoraCallback,
    IVONCallback,
    PosteriorScore,
    SensitivityScore,
)
from laplace_lora.adaptive.checkpoints import SENSITIVITY_FILE
from laplace_lora.adaptive.shared_draws import share_draws
from laplace_lora.adaptive.training_checks import check_settings
from support.adalora import kept, layers_of, tiny_adalora
from support.batches import rows, token_batch
from support.models import base_model, peft_model
from support.sweeps import rest_slow

STEPS = 16


def examples(count=24):
    batch = token_batch((4,) * count)
    return [rows(batch, n) for n in range(count)]


def ivon_of(model, **kwargs):
    trained = [p for p in model.parameters() if p.requires_grad]
    options = {"lr": 0.1, "ess": 24, "betas": (0.9, 0.9), "hess_init": 1.0, "clip_radius": 1.0}
    return IVON(trained, **{**options, **kwargs})


def trainer(model, folder, callbacks, optimizer=None, **kwargs):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    arguments = TrainingArguments(
        str(folder),
        **{
            "per_device_train_batch_size": 4,
            "max_steps": STEPS,
            "max_grad_norm": 0.0,
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "save_strategy": "no",
            "logging_strategy": "no",
            **kwargs,
        },
    )
    optimizers = (optimizer, None)
    return Trainer(
        model,
        arguments,
        train_dataset=examples(),
        eval_dataset=examples(4),
        callbacks=callbacks,
        optimizers=optimizers,
    )


class Spy(TrainerCallback):
    """Records gradients and weights where other callbacks have not changed them."""

    def __init__(self):
        self.grads = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("kind", ["sensitivity", "snr_magnitude", "score"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ranks_are_allocated_during_training(kind, dtype, tmp_path):
    model = tiny_adalora(dtype=dtype)
    ivon = None if kind == "sensitivity" else ivon_of(model)
    score = PosteriorScore(ivon, "snr") if kind == "score" else kind
    trainer(
        model,
        tmp_path,
        [AdaLoraCallback(score)],
        ivon,
        gradient_accumulation_steps=2,
        bf16=dtype == torch.bfloat16,
    ).train()
    count = len(layers_of(model))
    assert kept(model) == 2 * count
    pattern = model.peft_config["default"].rank_pattern
    assert sum(map(sum, pattern.values())) == 2 * count
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(base_model("bert"), tmp_path / "adapter")
    assert sum(len(layer.A) for layer in layers_of(loaded)) == 2 * count


def test_a_given_scale_is_used(tmp_path):
    class Scaled(IVONCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            before = [p.grad.clone() for g in ivon.param_groups for p in g["params"]]
            super().on_pre_optimizer_step(args, state, control, **kwargs)
            after = [p.grad for g in ivon.param_groups for p in g["params"]]
            assert all(torch.equal(0.5 * a, b) for a, b in zip(before, after, strict=True))

    model = peft_model("bert", dtype=torch.float32)
    ivon = ivon_of(model)
    trainer(model, tmp_path, [Scaled(0.5)], ivon, max_steps=2).train()


def test_gradients_are_computed_at_drawn_weights_and_the_mean_is_evaluated(tmp_path):
    model = peft_model("bert", dtype=torch.float32)
    ivon = ivon_of(model, lr=1e-12)
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    seen = {"step": [], "eval": []}

    class Look(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            seen["step"].append([p.detach().clone() for p in trained])

        def on_step_end(self, args, state, control, **kwargs):
            seen["eval"].append([p.detach().clone() for p in trained])

    trainer(
        model, tmp_path, [IVONCallback(), Look()], ivon, max_steps=2, gradient_accumulation_steps=2
    ).train()
    assert len(seen["step"]) == 2
    for drawn in seen["step"]:
        assert all((a - b).abs().max() > 1e-3 for a, b in zip(before, drawn, strict=True))
    for mean in seen["eval"]:
        assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(before, mean, strict=True))


@pytest.mark.parametrize("at", rest_slow([7, 14], 0))
@pytest.mark.parametrize("kind", ["sensitivity", "snr_magnitude"])
def test_checkpoints_resume_in_mid_schedule(kind, at, tmp_path):
    """Ranks, mean and curvature end as without the interruption; 14 lies past the final mask."""
    results = []
    for resumed in (False, True):
        folder = tmp_path / str(resumed)
        options = {"save_strategy": "steps", "save_steps": at, "seed": 3}

        def fresh(folder=folder, options=options):
            model = tiny_adalora()
            if kind == "sensitivity":
                trained = [p for p in model.parameters() if p.requires_grad]
                optimizer = torch.optim.AdamW(trained, lr=1e-2)
            else:
                optimizer = ivon_of(model)
            callback = AdaLoraCallback(kind)
            return model, optimizer, trainer(model, folder, [callback], optimizer, **options)

        model, optimizer, run = fresh()
        if resumed:

            class Stop(TrainerCallback):
                def on_step_end(self, args, state, control, **kwargs):
                    if state.global_step == at:
                        control.should_save = control.should_training_stop = True

            run.add_callback(Stop())
            run.train()
            model, optimizer, run = fresh()
            run.train(resume_from_checkpoint=str(folder / f"checkpoint-{at}"))
        else:
            run.train()
        pattern = model.peft_config["default"].rank_pattern
        hessians = [s["hessian"] for s in optimizer.state.values() if "hessian" in s]
        weights = [p.detach() for p in model.parameters() if p.requires_grad]
        results.append((json.dumps(pattern), weights + hessians))
    assert results[0][0] == results[1][0]
    for a, b in zip(results[0][1], results[1][1], strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


def test_what_would_go_wrong_silently_is_refused(tmp_path):
    model = tiny_adalora()
    with pytest.raises(ValueError, match="set max_grad_norm=0"):
        trainer(
            model, tmp_path, [AdaLoraCallback("snr")], ivon_of(model), max_grad_norm=1.0
        ).train()
    with pytest.raises(ValueError, match="leave it out of the TrainingArguments"):
        plain = peft_model("bert", dtype=torch.float32)
        run = trainer(plain, tmp_path, [IVONCallback()], ivon_of(plain))
        run.args.enable_jit_checkpoint = True  # what older transformers do not know
        run.train()
    with pytest.raises(ValueError, match="training ends after 5 steps"):
        trainer(model, tmp_path, [AdaLoraCallback()], max_steps=5).train()
    with pytest.raises(ValueError, match="the criterion 'snr' needs a posterior"):
        trainer(model, tmp_path, [AdaLoraCallback("snr")]).train()
    plain = peft_model("bert", dtype=torch.float32)
    with pytest.raises(TypeError, match="expected a PeftModel with an AdaLoRA adapter"):
        trainer(plain, tmp_path, [AdaLoraCallback()]).train()


@pytest.mark.slow
def test_a_missing_sensitivity_file_stops_a_resumed_run(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 7}
    trainer(tiny_adalora(), tmp_path, [AdaLoraCallback(SensitivityScore())], **options).train()
    (tmp_path / "checkpoint-7" / SENSITIVITY_FILE).unlink()
    with pytest.raises(ValueError, match="with the sensitivities is missing"):
        trainer(tiny_adalora(), tmp_path, [AdaLoraCallback()], **options).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-7")
        )


@pytest.mark.slow
def test_sensitivities_of_another_training_stop_a_resumed_run(tmp_path):
    """A checkpoint may be anywhere; the sensitivities are looked for in ``output_dir``."""
    options = {"save_strategy": "steps", "save_steps": 7}
    for folder, rate in (("one", 1e-2), ("other", 2e-2)):
        given = {**options, "learning_rate": rate}
        trainer(tiny_adalora(), tmp_path / folder, [AdaLoraCallback()], **given).train()
    again = trainer(tiny_adalora(), tmp_path / "other", [AdaLoraCallback()], **options)
    with pytest.raises(ValueError, match="saved with other weights"):
        again.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-7"))


@pytest.mark.parametrize("best", [8, 16])
def test_the_best_checkpoint_is_saved_as_it_computes(best, tmp_path):
    """Ranks are final from step 13 on; an earlier model has triplets beyond them."""
    model = tiny_adalora()
    options = {"save_strategy": "steps", "save_steps": 8, "eval_strategy": "steps", "eval_steps": 8}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "score"}
    run = trainer(model, tmp_path, [AdaLoraCallback()], greater_is_better=True, **options)
    run.compute_metrics = lambda _: {"score": float(run.state.global_step == best)}
    if best < 13:
        with pytest.warns(UserWarning, match="16 triplets are left, not 8"):
            run.train()
    else:
        run.train()
    assert kept(model) == (16 if best < 13 else 8)
    batch = token_batch((4, 3, 5))
    del batch["labels"]  # of a loaded adapter PEFT computes no penalty
    before = model.eval()(**batch).logits
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(base_model("bert"), tmp_path / "adapter").eval()
    assert torch.allclose(loaded(**batch).logits, before, atol=1e-6)


@pytest.mark.parametrize("kind", ["ivon", "adalora"])
def test_an_optimiser_that_lost_its_parameters_stops_a_resumed_run(kind, tmp_path):
    """PEFT's loading of a checkpoint makes a bfloat16 adapter float32, in new parameters."""
    options = {"save_strategy": "steps", "save_steps": 7}

    def fresh():
        if kind == "ivon":
            model = peft_model("bert", dtype=torch.bfloat16)
            return trainer(model, tmp_path, [IVONCallback()], ivon_of(model), **options)
        model = tiny_adalora(dtype=torch.bfloat16)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        return trainer(model, tmp_path, [AdaLoraCallback()], optimizer, **options)

    fresh().train()
    with pytest.raises(ValueError, match=r"does not hold '.*lora_A.*make the adapter float32"):
        fresh().train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))


def test_a_training_stopped_in_mid_step_saves_and_evaluates_the_mean(tmp_path):
    model = peft_model("bert", dtype=torch.float32)
    ivon, drawn = ivon_of(model), []

    class Stop(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

        def on_evaluate(self, args, state, control, **kwargs):
            drawn.append(ivon.is_drawn)

        def on_save(self, args, state, control, **kwargs):
            drawn.append(ivon.is_drawn)

    options = {"gradient_accumulation_steps": 2, "save_strategy": "epoch", "eval_strategy": "epoch"}
    trainer(model, tmp_path, [IVONCallback(), Stop()], ivon, **options).train()
    assert drawn == [False, False]


def best_of(tmp_path, dtype=torch.float32, **kwargs):
    """Train with IVON, and go back to the checkpoint of step 8 at the end."""
    model = peft_model("bert", dtype=dtype)
    ivon = ivon_of(model)
    options = {"save_strategy": "steps", "save_steps": 8, "eval_strategy": "steps", "eval_steps": 8}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "score", **kwargs}
    run = trainer(model, tmp_path, [IVONCallback()], ivon, greater_is_better=True, **options)
    run.compute_metrics = lambda _: {"score": float(run.state.global_step == 8)}
    run.train()
    return model, ivon


def test_the_curvature_is_that_of_the_best_checkpoint(tmp_path):
    _, ivon = best_of(tmp_path)
    saved = torch.load(tmp_path / "checkpoint-8" / "optimizer.pt", weights_only=True)["state"]
    assert len(saved) == len(ivon.state)
    for one, (_, p) in zip(saved.values(), ivon.trainable(), strict=True):
        assert ivon.state[p]["step"] == 8
        assert torch.equal(ivon.state[p]["hessian"], one["hessian"])


def test_a_best_checkpoint_without_its_curvature_is_pointed_out(tmp_path):
    with pytest.warns(UserWarning, match=r"curvature is that of step 16.*optimizer\.pt"):
        best_of(tmp_path, save_only_model=True)
    with pytest.warns(UserWarning, match=r"curvature is that of step 16.*does not hold"):
        best_of(tmp_path, torch.bfloat16)


def test_a_process_alone_draws_nothing_to_share():
    ivon = ivon_of(peft_model("bert"))
    before = torch.random.get_rng_state()
    share_draws(ivon, 0)
    assert torch.equal(torch.random.get_rng_state(), before) and ivon.generator is None


def test_draws_of_each_processs_own_are_refused():
    """The trainer averages their gradients, and the curvature would be divided by the processes."""
    args = SimpleNamespace(max_grad_norm=0, world_size=2)
    with pytest.raises(ValueError, match="leave sync out"):
        check_settings(args, sync=True)
    check_settings(args)


def test_sensitivities_have_the_smoothings_of_the_configuration(tmp_path):
    model, callback = tiny_adalora(beta1=0.2, beta2=0.4), AdaLoraCallback()
    trainer(model, tmp_path, [callback]).train()
    assert (callback._allocator.score.beta1, callback._allocator.score.beta2) == (0.2, 0.4)
