"""Plain modules: images in, answers out, with the proof that every export has."""

import shutil

import numpy as np
import pytest
import torch

from serving.directory import BadInput, read_manifest
from serving.export import ExportError, VerificationFailed, export_module
from serving.module import Module
from serving.tasks import open_task
from serving.verify import verify


class SmallCNN(torch.nn.Module):
    """Two convolutions with batch normalisation, whose running statistics are those of some images."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.BatchNorm2d(8)
        self.conv2, self.norm2 = torch.nn.Conv2d(8, 12, 3, padding=1), torch.nn.BatchNorm2d(12)
        self.dropout, self.head = torch.nn.Dropout(0.5), torch.nn.Linear(12, 4)

    def forward(self, images):
        hidden = torch.nn.functional.max_pool2d(torch.relu(self.norm1(self.conv1(images))), 2)
        hidden = torch.relu(self.norm2(self.conv2(hidden))).mean((2, 3))
        return self.head(self.dropout(hidden))


class Two(torch.nn.Module):
    """Ids and numbers in, two answers out, by name."""

    def __init__(self):
        super().__init__()
        self.table, self.mix = torch.nn.Embedding(10, 6), torch.nn.Linear(6, 3)

    def forward(self, ids, weights):
        mixed = (self.table(ids) * weights[..., None]).sum(1)
        return {"scores": self.mix(mixed), "total": weights.sum(1)}


@pytest.fixture(scope="module")
def cnn():
    torch.manual_seed(0)
    model = SmallCNN()
    for _ in range(3):
        model(torch.randn(16, 1, 12, 12) * 2 + 1)  # as in training: the statistics follow
    return model


@pytest.fixture(scope="module")
def cnn_dir(cnn, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cnn") / "onnx"
    assert export_module(cnn, torch.randn(1, 1, 12, 12), folder, labels=["a", "b", "c", "d"])["passed"]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("name", "task"), [("a module of convolutions", "tensors")])
def test_a_module_is_in_the_support_table(cnn, tmp_path, record_property, name, task):
    assert export_module(cnn, torch.randn(1, 1, 12, 12), tmp_path / "onnx")["passed"]
    record_property("fp32", "verified")


def test_a_module_answers_as_its_source_in_batches_of_any_size(cnn, cnn_dir):
    assert cnn.training, "it is left as it was"
    opened, source = Module.open(cnn_dir), cnn.eval()
    try:
        for size in (1, 2, 7):
            images = torch.randn(size, 1, 12, 12)
            with torch.no_grad():
                expected = source(images)
            np.testing.assert_allclose(opened(images=images.numpy())["output"], expected, atol=1e-5)
    finally:
        cnn.train()
    assert opened.manifest["labels"] == ["a", "b", "c", "d"]
    record = verify(cnn_dir)
    assert list(record["checks"]) == ["manifest", "output_one_by_one", "output_batch"]


@pytest.mark.parametrize("form", [tuple, dict])
def test_several_inputs_and_outputs_keep_their_names(tmp_path, form):
    torch.manual_seed(1)
    model, given = Two().eval(), {"ids": torch.randint(0, 10, (5, 4)), "weights": torch.rand(5, 4)}
    export_module(model, given if form is dict else tuple(given.values()), tmp_path / "onnx")
    opened = Module.open(tmp_path / "onnx")
    with torch.no_grad():
        expected = model(**given)
    found = opened(**{name: value.numpy() for name, value in given.items()})
    assert found.keys() == {"scores", "total"}
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-5)


@pytest.mark.parametrize("strategy", ["lora", "adapter"])
def test_a_module_with_the_small_layers_of_a_strategy_is_exported_with_them(cnn, tmp_path, strategy):
    import copy

    from trainer.config import Adapter, Lora
    from trainer.strategies import adapter, lora

    base = copy.deepcopy(cnn)
    if strategy == "adapter":
        model = adapter.apply_adapter(base, Adapter(type="adapter", size=3, after=["conv1", "conv2"]))
    else:
        model = lora.apply_lora(base, Lora(type="lora", rank=2, targets=["conv1", "conv2"]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.3)
    images = torch.randn(3, 1, 12, 12)
    given = {"images": images} if strategy == "adapter" else [images]
    if strategy == "lora":
        model = model.base_model.model  # PEFT's own wrapper hides the names of the inputs
    export_module(model, given, tmp_path / "onnx")
    with torch.no_grad():
        expected = model.eval()(images)
        assert float((expected - cnn.eval()(images)).abs().max()) > 0.05
    cnn.train()
    np.testing.assert_allclose(Module.open(tmp_path / "onnx")(images=images.numpy())["output"], expected, atol=1e-5)


def test_weights_that_were_changed_are_seen(cnn_dir, tmp_path, change_graph, failed_checks):
    import onnx

    def scale_one(graph):
        tensor = next(each for each in graph.initializer if each.name.endswith("conv2.weight"))
        values = onnx.numpy_helper.to_array(tensor) * np.float32(1.02)
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))

    change_graph(folder := shutil.copytree(cnn_dir, tmp_path / "onnx"), scale_one)
    assert failed_checks(folder, Module) == ["output_one_by_one", "output_batch"]


def test_rows_that_depend_on_each_other_are_never_published(tmp_path):
    class Centred(torch.nn.Module):
        def forward(self, numbers):
            return numbers - numbers.mean(0, keepdim=True)

    with pytest.raises(VerificationFailed, match="nothing was published: output_batch: outputs differ by"):
        export_module(Centred(), torch.randn(4, 3), tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


@pytest.mark.parametrize("kind", ["whole numbers", "truths"])
def test_whole_numbers_and_truths_must_be_equal_not_near(tmp_path, change_graph, failed_checks, kind):
    import onnx

    class Places(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = torch.nn.Parameter(torch.tensor([0.5]))

        def forward(self, numbers):
            return (numbers + self.shift).long() if kind == "whole numbers" else numbers + self.shift > 0

    inputs = torch.tensor([[100000.0, -1.0], [7.0, -3.0]])  # so large that one more is within a tolerance
    record = export_module(Places(), inputs, tmp_path / "onnx")
    assert record["checks"]["output_batch"]["found"].startswith("0 of ")

    def shift_by_one(graph):
        [tensor] = [each for each in graph.initializer if onnx.numpy_helper.to_array(each).tolist() in (0.5, [0.5])]
        tensor.CopyFrom(onnx.numpy_helper.from_array(np.array([1.5], np.float32), tensor.name))

    change_graph(tmp_path / "onnx", shift_by_one)
    assert failed_checks(tmp_path / "onnx", Module) == ["output_one_by_one", "output_batch"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "batches of nothing; accepted: of one size, one or more"),
        ([torch.zeros(2, 4), torch.zeros(2, 4), torch.zeros(2)], "3 found, but forward of Two takes ids, weights"),
        ({"ids": torch.zeros(2, 4), "weights": torch.zeros(3, 4)}, "batches of {'ids': 2, 'weights': 3}"),
        ({"ids": torch.tensor(3)}, r"ids is torch.Size\(\[\]\); accepted: tensors whose first size is the batch"),
        ({"ids": "text"}, "ids is str; accepted: tensors"),
        ({"ids": torch.zeros(2, 4)}, "Two: cannot answer one row of example_inputs alone"),
    ],
)
def test_inputs_that_are_no_batch_are_refused(tmp_path, given, message):
    with pytest.raises(ExportError, match=message):
        export_module(Two(), given, tmp_path / "onnx")
    assert not list(tmp_path.iterdir())


def test_weights_that_are_no_numbers_and_a_folder_in_use_are_refused(tmp_path):
    model = torch.nn.Linear(3, 2)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("kept")
    with pytest.raises(ExportError, match="only an older ONNX directory is replaced"):
        export_module(model, torch.zeros(2, 3), tmp_path / "home")
    model.weight.data[0, 0] = float("inf")
    with pytest.raises(ExportError, match="its weight weight holds NaN or infinity"):
        export_module(model, torch.zeros(2, 3), tmp_path / "onnx")


def test_a_module_is_asked_in_its_own_shapes_and_types_only(cnn_dir, trivet):
    opened = Module.open(cnn_dir)
    with pytest.raises(BadInput, match="inputs: image found; accepted: images"):
        opened(image=np.zeros((1, 1, 12, 12), np.float32))
    with pytest.raises(BadInput, match=r"images is float64 of shape \[1, 1, 12, 12\]; accepted: float32 of shape"):
        opened(images=np.zeros((1, 1, 12, 12)))
    with pytest.raises(BadInput, match=r"its task is module, not classification; use: serving\.module\.Module\.open"):
        open_task(cnn_dir)
    code, _, err = trivet("serve", cnn_dir, "--port", "0")
    assert (code, "its task is module, which has no endpoint" in err) == (2, True)
    assert read_manifest(cnn_dir, "onnx")["row_shapes"] == {"images": [1, 12, 12]}
