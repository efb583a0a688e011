"The doctor's questions on machines that are not here: a pretended GPU, GPUs of several sizes, two workers."
from itertools import product
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from acl_nb import doctor
from acl_nb.losses import LOSSES, CELoss
from acl_nb.memory import gpus_needed, step_memory
from acl_nb.rates import loading_rate, write_photographs
from acl_nb.recipes import recipe
from acl_nb.settings import Recipe
from acl_nb.testing import PretendGPU
from acl_nb.views import POLICIES, Policy

def diagnosed_on(device, monkeypatch, *names):
    "What checks of the doctor say where training would use that device."
    monkeypatch.setattr(doctor, "start_processes", lambda: SimpleNamespace(device=device))
    return doctor.diagnose(checks={name: doctor.CHECKS[name] for name in names})

def test_the_doctor_compares_every_loss_and_every_view_with_the_cpu(monkeypatch):
    with PretendGPU() as gpu: found = diagnosed_on(gpu.device, monkeypatch, "parity", "pixels")
    assert {verdict.word for verdict in found.values()} == {"ok"}, found
    assert "on this cuda" in found["parity"].note

def test_the_doctor_names_the_loss_and_the_view_that_a_gpu_gets_wrong(monkeypatch):
    def biased(loss, logits, labels):
        flat = logits.flatten(0, 1), labels.repeat_interleave(logits.shape[1])
        return F.cross_entropy(*flat) * (1.01 if logits.is_cuda else 1)

    def bright(images, draw):
        return images + images.is_cuda

    monkeypatch.setattr(CELoss, "forward", biased)
    monkeypatch.setitem(POLICIES, "plain", Policy({"bright": bright}))
    with PretendGPU() as gpu: found = diagnosed_on(gpu.device, monkeypatch, "parity", "pixels")
    assert {verdict.word for verdict in found.values()} == {"fails"}
    assert "(ce, " in found["parity"].note and "plain" in found["pixels"].note

@pytest.mark.parametrize("capability, word", [(7, "fp16"), (8, "bf16"), (9, "bf16")])
def test_the_doctor_knows_in_which_precision_a_gpu_trains(monkeypatch, capability, word):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.version.hip", None)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    properties = SimpleNamespace(major=capability)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: properties)
    found = diagnosed_on(torch.device("cuda"), monkeypatch, "precision")["precision"]
    assert found.word == "ok" and f"computes in {word}" in found.note

def test_memory_is_calculated_for_recipes_that_nobody_could_run_here():
    kept = {"imagenet_lt_resnet50_90": 33.7, "imagenet_lt_resnext50_32x4d_90": 43.8}     # GB, by another program
    for name, gigabytes in kept.items():
        memory = step_memory(recipe(name, data="nowhere"))
        assert memory.kept / 1e9 == pytest.approx(gigabytes, rel=0.02)
        assert [gpus_needed(memory, size) for size in (40, 80)] == [2, 1]

@pytest.mark.parametrize("loss", list(LOSSES))
def test_memory_is_calculated_for_every_loss(loss):
    memory = step_memory(recipe("cifar100_lt", data="nowhere", loss=loss))
    assert 0.1e9 < memory.kept < memory.total < 3e9

def test_files_are_loaded_by_workers_while_the_doctor_measures(tmp_path):
    for part, name in product(("train", "test"), "ab"):
        folder = tmp_path/part/name
        folder.mkdir(parents=True)
        write_photographs(folder, 2)
    r = Recipe(dataset="folder_lt", data=str(tmp_path), imbalance="as_is", policy="imagenet_rand", size=64)
    with mock.patch("acl_nb.loading._usual_workers", return_value=2):
        found = loading_rate(r, [3, 64, 64], seconds=0.3)
    assert (found.workers, found.own) == (2, True) and found.rate > 1
