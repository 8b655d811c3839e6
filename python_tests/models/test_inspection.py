"""The words of ``describe`` against checkpoints whose content is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pickle_words import Persistent, module_state, persistent_pickle, torch_file

from sage_fast.models.checkpoints import Stub, read_checkpoint
from sage_fast.models.inspection import TensorEntry, describe, settings_of


@pytest.fixture()
def groups(tmp_path):
    def describe_bytes(content: bytes):
        (tmp_path / "file").write_bytes(content)
        return {group.place: group for group in describe(read_checkpoint(tmp_path / "file"))}

    return describe_bytes


def test_state_dicts_and_settings(groups):
    content = {
        "state_dict": {"encoder.a": torch.zeros(2, 3), "encoder.b": torch.zeros(4).half()},
        "opts": {"output_size": 256, "device": torch.device("cuda"), "sizes": [1, 2], "long": "x" * 1000},
        "latent_avg": torch.zeros(18, 8),
        "step": 7,
    }
    found = groups(torch_file(content))
    assert list(found) == ["", "state_dict", "opts"]
    assert found[""].tensors == (TensorEntry("latent_avg", (18, 8), "float32"),) and found[""].settings == {"step": 7}
    assert found["state_dict"].tensors[1] == TensorEntry("encoder.b", (4,), "float16")
    assert found["state_dict"].n_elements == 10
    assert found["opts"].settings == {"output_size": 256, "device": "cuda", "sizes": [1, 2]}


def test_networks_have_a_class_and_what_they_were_made_with(groups):
    inner = Persistent("MappingNetwork", module_state({"w_avg": torch.zeros(5)}))
    made_with = {"z_dim": 4, "mapping_kwargs": {"num_layers": 2}}
    state = module_state({}, {"mapping": inner}, _init_kwargs=made_with, img_resolution=32, training=False)
    found = groups(persistent_pickle({"G_ema": Persistent("Generator", state)}))
    assert found["G_ema"].class_name == "Generator"
    assert found["G_ema"].tensors == (TensorEntry("mapping.w_avg", (5,), "float32"),)
    expected = {"img_resolution": 32, "training": False, "z_dim": 4, "mapping_kwargs.num_layers": 2}
    assert found["G_ema"].settings == expected


def test_the_state_of_an_optimizer_is_one_group(groups):
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5, momentum=0.9)
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    found = groups(torch_file({"g_optim": optimizer.state_dict()}))
    names = [entry.name for entry in found["g_optim.state"].tensors]
    assert names == ["0.momentum_buffer", "1.momentum_buffer"]


def test_a_list_of_arrays_is_one_group(groups):
    found = groups(persistent_pickle({"codes": [np.zeros(3), {"x": np.zeros(2)}]}))
    assert [entry.name for entry in found["codes"].tensors] == ["0", "1.x"]


def test_a_network_in_an_instance_that_is_none(groups):
    trainer = Persistent("Trainer", {"network": Persistent("Generator", module_state({"a": torch.zeros(1)}))})
    assert groups(persistent_pickle({"trainer": trainer}))["trainer.network"].class_name == "Generator"


def test_a_file_of_one_tensor(groups):
    assert groups(torch_file(torch.zeros(3)))[""].tensors == (TensorEntry("", (3,), "float32"),)


def test_settings_of_a_tensorflow_network():
    state = {"name": "G", "static_kwargs": {"resolution": 64}, "version": 4, "build_module_src": "x" * 9999}
    assert settings_of(Stub("dnnlib.tflib.network", "Network", (), state)) == {
        "name": "G",
        "version": 4,
        "resolution": 64,
    }
