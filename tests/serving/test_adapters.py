"""Adapters: a bottleneck stays in the graph, a LoRA of PEFT is merged with its true scale over the base it names."""

import json
import shutil

import numpy as np
import pytest
import torch

from serving.directory import DirectoryError, read_manifest, seal
from serving.engine import Engine
from serving.export import ExportError, HeldOutRows, Options, VerificationFailed, export_model
from serving.request import Request, Sampling
from serving.tasks import open_task
from trainer import model_dir
from trainer.config import Adapter
from trainer.strategies import adapter, adapter_files

SEALED = {"format_version", "kind", "files"}  # what `seal` adds by itself
TEXTS = ["the quick brown fox", "the list of the lines in the file"]


def learned(model, seed=1):
    """Give the small layers of a strategy weights that change what the model answers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def save_beside_base(base, folder, auto, objective):
    """Write a bottleneck adapter over the model in `base` as the trainer does; return the model."""
    import transformers

    model = getattr(transformers, auto).from_pretrained(base)
    learned(adapter.apply_adapter(model, Adapter(type="adapter", size=4)))
    folder.mkdir()
    model_dir._save_beside_base(folder, model, transformers.AutoTokenizer.from_pretrained(base), str(base))
    facts = {"strategy": "adapter", "labels": None, "base_model": str(base), "step": 3, "max_length": 60}
    seal(folder, "model", objective=objective, **facts)
    return model


TASKS = {
    "label": ("AutoModelForSequenceClassification", "classification"),
    "tags": ("AutoModelForTokenClassification", "token_classification"),
    "masks": ("AutoModelForMaskedLM", "masked_lm"),
}


@pytest.mark.parametrize(
    ("kind", "asked"), [("bert", "tags"), ("gpt2", "label"), pytest.param("roberta", "masks", marks=pytest.mark.slow)]
)
def test_a_bottleneck_adapter_over_a_model_of_texts_stays_in_the_graph(save_text_model, tmp_path, kind, asked):
    import onnx

    auto, objective = TASKS[asked]
    model = save_beside_base(save_text_model(tmp_path / "base", kind, asked), tmp_path / "model", auto, objective)
    assert export_model(tmp_path / "model", tmp_path / "onnx", attach=adapter_files.load)["passed"]
    names = {
        each.name for each in onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False).graph.initializer
    }
    assert sum(".adapter.down." in name for name in names) >= 4, "two in each of two layers"
    manifest = read_manifest(tmp_path / "onnx", "onnx")
    assert (manifest["source"]["strategy"], manifest["max_length"]) == ("adapter", 60)
    if asked == "label":
        task = open_task(tmp_path / "onnx")
        for text in TEXTS:
            question = task.encode(text)
            with torch.no_grad():
                expected = model(torch.tensor([question.rows[0].ids])).logits.softmax(-1)[0]
            np.testing.assert_allclose([*task.answer(question)["scores"].values()], expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "task"),
    [("bert with a bottleneck adapter", "label"), ("gpt2 with a bottleneck adapter", "label")],
)
def test_a_bottleneck_adapter_in_every_format(save_text_model, tmp_path, outcomes, name, task):
    base = save_text_model(tmp_path / "base", name.partition(" ")[0], task)
    save_beside_base(base, tmp_path / "model", *TASKS[task])
    assert outcomes(tmp_path / "model", attach=adapter_files.load)["fp32"] == "verified"


def test_a_bottleneck_adapter_over_a_decoder_generates_what_its_source_does(save_model, tmp_path, trivet):
    model = save_beside_base(
        save_model(tmp_path / "base", "llama"), tmp_path / "model", "AutoModelForCausalLM", "causal_lm"
    )
    code, _, err = trivet("export", tmp_path / "model", tmp_path / "onnx")
    assert code == 0, err
    engine, prompt = Engine.open(tmp_path / "onnx"), [5, 9, 30, 41]
    engine.add(request := Request("a", prompt, Sampling(12)))
    while not request.is_finished:
        engine.step()
    ids = list(prompt)
    for _ in range(len(request.output_ids)):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert request.output_ids == ids[len(prompt) :]
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, adapter.Bottleneck):
                module.up.weight.zero_()
        assert int(model(torch.tensor([prompt])).logits[0, -1].argmax()) != request.output_ids[0], "it changes nothing"


def test_a_bottleneck_adapter_whose_base_changed_since_is_refused(save_text_model, tmp_path):
    save_beside_base(save_text_model(tmp_path / "base", "bert", "label"), tmp_path / "model", *TASKS["label"])
    weights = tmp_path / "model" / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(DirectoryError, match=r"base/model\.safetensors: altered since it was written"):
        export_model(tmp_path / "model", tmp_path / "onnx", attach=adapter_files.load)
    assert not (tmp_path / "onnx").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: tensors | {"bert.encoder.layer.0.output.lora_A": torch.ones(4)},
            "its weights hold bert.encoder.layer.0.output.lora_A, which BertForSequenceClassification does not read",
        ),
        (
            lambda tensors: {name: value for name, value in tensors.items() if name != "bert.pooler.dense.weight"},
            "its weights lack bert.pooler.dense.weight",
        ),
    ],
)
def test_the_base_of_an_adapter_holds_what_its_class_reads_no_more_and_no_less(
    save_text_model, tmp_path, change, message
):
    from safetensors.torch import load_file, save_file

    save_beside_base(save_text_model(tmp_path / "base", "bert", "label"), tmp_path / "model", *TASKS["label"])
    weights = tmp_path / "model" / "base" / "model.safetensors"
    save_file(change(load_file(weights)), weights, metadata={"format": "pt"})
    manifest = read_manifest(tmp_path / "model", "model")
    seal(tmp_path / "model", "model", **{name: manifest[name] for name in manifest.keys() - SEALED})
    with pytest.raises(ExportError, match=message):
        export_model(tmp_path / "model", tmp_path / "onnx", attach=adapter_files.load)
    assert not (tmp_path / "onnx").exists()


@pytest.fixture
def lora(save_model, tmp_path):
    """A LoRA whose scale is 3 over a tiny Llama, as PEFT saves it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = save_model(tmp_path / "base", "llama")
    config = LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    wrapped = learned(get_peft_model(AutoModelForCausalLM.from_pretrained(base), config))
    wrapped.save_pretrained(tmp_path / "lora")
    named = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(base)
    return tmp_path / "lora"


def test_a_lora_of_peft_is_merged_with_its_true_scale(lora, tmp_path):
    from peft import PeftModel
    from safetensors.numpy import load_file
    from transformers import AutoModelForCausalLM

    assert export_model(lora, tmp_path / "onnx")["passed"]
    base = tmp_path / "base"
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), lora).eval()
    stored = load_file(tmp_path / "onnx" / "reference.safetensors")
    ids = stored["ids.2"]
    with torch.no_grad():
        logits = model(torch.tensor(ids[None, :-1])).logits[0]
        bare = AutoModelForCausalLM.from_pretrained(base)(torch.tensor(ids[None, :-1])).logits[0]
    np.testing.assert_allclose(stored["logits.2"], logits[-len(stored["logits.2"]) :], atol=1e-4)
    assert float((logits - bare).abs().max()) > 0.5, "the adapter changes nothing"


@pytest.mark.parametrize(("quantization", "scale"), [(None, 0.5), ("int8-weights", 0.0), ("int4", 2.0)])
def test_a_lora_merged_with_another_scale_or_not_at_all_is_seen(quantization, scale, lora, tmp_path, monkeypatch):
    from peft.tuners.lora import LoraLayer

    from serving.export import lora_folder

    def scaled(model, folder, base):
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.scaling = {name: true * scale for name, true in module.scaling.items()}
        return merge(model, folder, base)

    merge = lora_folder.merge
    monkeypatch.setattr(lora_folder, "merge", scaled)
    when = "before quantisation, in fp32: " if quantization else ""
    text = HeldOutRows([{"text": "the quick brown fox " * 200}], "one fox")
    with pytest.raises(VerificationFailed, match=f"nothing was published: {when}logits_one_by_one: logits differ by"):
        export_model(lora, tmp_path / "onnx", Options(quantization=quantization), held_out=text)


def test_a_lora_whose_base_is_missing_or_another_is_refused_naming_both(lora, save_model, tmp_path):
    base = tmp_path / "base"
    base.rename(tmp_path / "moved")
    with pytest.raises(
        ExportError, match=rf"{lora}: its base '{base}' is no model folder here; get the base, and name"
    ):
        export_model(lora, tmp_path / "onnx")
    save_model(base, "llama", intermediate_size=48)
    with pytest.raises(ExportError, match=rf"{lora}: does not fit its base {base} \(.*size mismatch"):
        export_model(lora, tmp_path / "onnx")
    shutil.rmtree(base)
    save_model(base, "llama", num_hidden_layers=1)
    with pytest.raises(
        ExportError, match=rf"{lora}: does not fit its base {base} \(only one of the two has .*layers\.1"
    ):
        export_model(lora, tmp_path / "onnx")
    shutil.rmtree(base)
    save_model(base, "gpt2")
    with pytest.raises(ExportError, match=rf"{lora}: does not fit its base {base} \(.*; has the base changed since"):
        export_model(lora, tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_a_base_that_trivet_made_and_somebody_altered_is_refused_naming_both(lora, tmp_path):
    base = tmp_path / "base"
    seal(base, "model", objective="causal_lm", labels=None, strategy="full", base_model=None, step=1)
    (base / "generation_config.json").write_text("{}")
    with pytest.raises(
        ExportError, match=rf"{lora}: its base {base} has changed since: .*generation_config\.json: alt"
    ):
        export_model(lora, tmp_path / "onnx")


def test_a_base_that_is_not_what_a_run_merged_its_lora_into_is_refused(lora, save_model, tmp_path):
    """A run keeps its unmerged LoRA in adapter/ beside what it was merged into."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base, run = tmp_path / "base", tmp_path / "run"
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), lora).merge_and_unload().save_pretrained(run)
    shutil.move(lora, run / "adapter")
    seal(run, "model", objective="causal_lm", labels=None, strategy="lora", base_model=str(base), step=1)
    assert export_model(run / "adapter", tmp_path / "onnx")["passed"]
    shutil.rmtree(base)
    save_model(base, "llama", seed=5)
    with pytest.raises(
        ExportError, match=rf"adapter: its base {base} has changed since: .* is not what {run} was merged"
    ):
        export_model(run / "adapter", tmp_path / "other")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "its peft_type is IA3; accepted: LORA"),
        ({"base_model_name_or_path": None}, "its base None is no model folder here"),
        (
            {"task_type": "SEQ_CLS"},
            r"its task_type is SEQ_CLS, but its base .* is a LlamaForCausalLM; export the merged",
        ),
    ],
)
def test_an_adapter_that_cannot_be_merged_is_refused(lora, tmp_path, changes, message):
    config = json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ExportError, match=message):
        export_model(lora, tmp_path / "onnx")


def test_an_adapter_without_safetensors_is_refused(lora, tmp_path):
    (lora / "adapter_model.safetensors").rename(lora / "adapter_model.bin")
    with pytest.raises(ExportError, match=r"has no adapter_model\.safetensors; save the adapter again"):
        export_model(lora, tmp_path / "onnx")
