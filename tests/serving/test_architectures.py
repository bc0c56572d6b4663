"""Decoders export by one code, alike layers traced once; every architecture, task and format is proven, or refused.

`benchmarks/support_tables.py` makes the support table from what the slow tests record.
"""

import collections
from pathlib import Path

import pytest

from serving.export import ExportError, Options, VerificationFailed, export_model

SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
}
PHI = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2}  # half of each head of 64 is rotated
SLIDING = {"sliding_window": 16}  # shorter than the prompts of the proof
GPT2 = {"vocab_size": 320, "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 256}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
LATENT |= {"num_key_value_heads": 4}
DEEPSEEK = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}

# Config class, settings beside SIZES, and the kinds of layers: how many layers are traced.
DECODERS = {
    "gpt2": ("GPT2Config", GPT2, 1),
    "opt": ("OPTConfig", {"ffn_dim": 96, "word_embed_proj_dim": 64}, 1),
    "llama": ("LlamaConfig", {}, 1),
    "qwen2": ("Qwen2Config", {"use_sliding_window": True, "max_window_layers": 2, **SLIDING}, 2),
    "qwen3": ("Qwen3Config", {"head_dim": 32}, 1),
    "mistral": ("MistralConfig", SLIDING, 1),
    "gpt_neox": ("GPTNeoXConfig", {"hidden_size": 128, "num_attention_heads": 2}, 1),
    "gemma2": ("Gemma2Config", {"head_dim": 16, **SLIDING}, 2),
    "phi": ("PhiConfig", PHI, 1),
    "smollm3": ("SmolLM3Config", {}, 2),  # every fourth layer has no rotation
    # Neighbours are rotated as pairs, not halves of a head.
    "cohere": ("CohereConfig", {}, 1),
    "glm": ("GlmConfig", {"head_dim": 32}, 1),
    "ernie4_5": ("Ernie4_5Config", {}, 1),
    # Keys are larger than values, and other things are cached.
    "youtu": ("YoutuConfig", LATENT, 1),
    # Mixtures of experts.
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}, 1),
    "qwen2_moe": ("Qwen2MoeConfig", EXPERTS | {"shared_expert_intermediate_size": 48}, 1),
    "qwen3_moe": ("Qwen3MoeConfig", EXPERTS | {"head_dim": 32}, 1),
    "olmoe": ("OlmoeConfig", EXPERTS, 1),
    "phimoe": ("PhimoeConfig", {"num_local_experts": 4}, 1),
    "deepseek_v3": ("DeepseekV3Config", LATENT | EXPERTS | DEEPSEEK, 2),  # the first layer is no mixture
}
SELDOM = ("ernie4_5", "qwen2_moe", "qwen3_moe", "phimoe", "deepseek_v3")  # exported by the slow tests alone


def save_decoder(folder: Path, save, name: str, auto: str = "AutoModelForCausalLM") -> Path:
    """Save a random decoder with a head, loaded by transformers' class `auto`, and a small tokenizer."""
    import transformers

    kind, settings, _ = DECODERS[name]
    sizes = {} if name == "gpt2" else SIZES
    config = getattr(transformers, kind)(
        **{**sizes, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, **settings}
    )
    return save(folder, getattr(transformers, auto).from_config(config).eval())


@pytest.fixture(scope="module")
def traced():
    """Which layers were traced, for each model that was exported."""
    from serving.export import graph

    found: dict[str, list[int]] = {}
    real = graph._example

    def watched(step, source, layers):
        found[source.config.model_type] = layers
        return real(step, source, layers)

    graph._example = watched
    yield found
    graph._example = real


@pytest.fixture(scope="module")
def exported(tmp_path_factory, save_with_tokenizer, traced):
    """Return a function that exports a decoder once, and returns the record of its proof and the nodes of its graph."""
    import onnx

    done: dict[str, tuple[dict, collections.Counter]] = {}

    def of(name: str) -> tuple[dict, collections.Counter]:
        if name not in done:
            folder = tmp_path_factory.mktemp(name)
            record = export_model(save_decoder(folder / "model", save_with_tokenizer, name), folder / "onnx")
            graph = onnx.load(folder / "onnx" / "model.onnx", load_external_data=False).graph
            done[name] = record, collections.Counter(node.op_type for node in graph.node)
        return done[name]

    return of


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SELDOM else name for name in DECODERS]
)
def test_a_decoder_is_exported_and_proven(exported, traced, name):
    record, _ = exported(name)
    assert record["passed"]
    assert record["checks"]["tokens_in_a_crowd"]["tokens"] == 7 * 24
    assert len(traced[name]) == DECODERS[name][2], "layers that are alike are traced once"


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "smollm3"])
def test_a_layer_is_two_norms_one_attention_and_five_products(exported, name):
    _, nodes = exported(name)
    assert nodes["MatMul"] == 5 * 4 + 1, "queries, keys and values are one"
    assert nodes["GroupQueryAttention"] == 4
    assert nodes["SkipSimplifiedLayerNormalization"] == 2 * 4
    assert nodes["SimplifiedLayerNormalization"] == 1
    assert not {"Cos", "Sin", "Neg", "Concat", "RotaryEmbedding", "Sigmoid", "Pow", "Reshape", "Split"} & nodes.keys()


def test_for_cuda_gate_and_up_are_one_product_too(tmp_path, save_with_tokenizer):
    import onnx

    model = save_decoder(tmp_path / "model", save_with_tokenizer, "llama")
    export_model(model, tmp_path / "onnx", Options(dtype="fp16", optimize_for="cuda"))
    graph = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False).graph
    assert collections.Counter(node.op_type for node in graph.node)["MatMul"] == 4 * 4 + 1


def test_a_gpt_2_layer_has_its_residuals_in_its_norms_and_its_bias_in_its_gelu(exported):
    _, nodes = exported("gpt2")
    assert (nodes["MatMul"], nodes["SkipLayerNormalization"], nodes["FastGelu"]) == (4 * 4 + 1, 2 * 4 + 1, 4)
    assert not {"Gemm", "Tanh", "Pow", "LayerNormalization", "Reshape"} & nodes.keys()


@pytest.mark.parametrize("name", ["phi", "qwen3", "gemma2", "cohere", "glm"])
def test_heads_that_are_rotated_in_part_or_normed_first_are_rotated_inside_attention(exported, name):
    _, nodes = exported(name)
    assert not {"Cos", "Sin", "Neg", "RotaryEmbedding"} & nodes.keys()


def test_queries_keys_and_values_of_one_matrix_that_lie_by_heads_are_read_as_they_come(exported):
    _, nodes = exported("gpt_neox")
    assert (nodes["MatMul"], nodes["GroupQueryAttention"]) == (4 * 4 + 1, 4)
    assert not {"Cos", "Split", "Slice", "Transpose", "Reshape", "Concat", "RotaryEmbedding"} & nodes.keys()


@pytest.mark.parametrize("name", ["cohere", pytest.param("deepseek_v3", marks=pytest.mark.slow)])
def test_norms_and_routers_that_cast_their_weights_to_fp32_are_the_same_nodes_in_half_precision(
    tmp_path, save_with_tokenizer, name
):
    model = save_decoder(tmp_path / "model", save_with_tokenizer, name)
    try:
        record = export_model(model, tmp_path / "onnx", Options(dtype="fp16"))
    except VerificationFailed as error:
        assert name == "deepseek_v3", "whose few random experts fp16 may turn over"
        record = error.record
    assert record["checks"]["same_graph"]["passed"]


@pytest.mark.parametrize("name", ["mixtral", "olmoe"])
def test_a_mixture_has_one_operator_for_its_experts_and_never_a_copy_of_their_weights_for_each_token(exported, name):
    _, nodes = exported(name)
    assert nodes["MoE"] == 4
    assert nodes["Gather"] == 2, "of embeddings and of the tokens that are kept"
    assert not {"Loop", "If", "NonZero", "GatherND", "Where"} & nodes.keys()


@pytest.mark.parametrize(
    "name",
    ["gpt2", "mistral", *(pytest.param(each, marks=pytest.mark.slow) for each in ("opt", "llama", "qwen3", "gemma2"))],
)
def test_attention_in_standard_operators_gives_the_sources_tokens_too(tmp_path, save_with_tokenizer, name):
    import onnx

    source = save_decoder(tmp_path / "model", save_with_tokenizer, name)
    record = export_model(source, tmp_path / "onnx", Options(optimize_for="cuda"))
    crowd = record["checks"]["tokens_in_a_crowd"]
    assert (record["passed"], crowd["tokens"], crowd["mismatches"], crowd["near_ties"]) == (True, 7 * 24, 0, 0)
    graph = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False).graph
    nodes = collections.Counter(node.op_type for node in graph.node)
    assert (nodes["Attention"], nodes["TensorScatter"], nodes["GroupQueryAttention"]) == (4, 8, 0)
    masks = nodes["LessOrEqual"], nodes["Greater"]
    assert masks == {"mistral": (1, 1), "gemma2": (2, 1)}.get(name, (1, 0)), "one mask for each kind of layer"


@pytest.mark.parametrize("name", ["stablelm", "falcon", "gptj"])
def test_a_decoder_with_attention_of_its_own_is_refused_by_name(tmp_path, save_with_tokenizer, name):
    import transformers

    kind = {"stablelm": "StableLmConfig", "falcon": "FalconConfig", "gptj": "GPTJConfig"}[name]
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 256, "vocab_size": 320}
    config = getattr(transformers, kind)(**(sizes if name == "gptj" else SIZES | {"num_hidden_layers": 2}))
    model = save_with_tokenizer(tmp_path / "model", transformers.AutoModelForCausalLM.from_config(config).eval())
    with pytest.raises(ExportError, match=r"ForCausalLM cannot be exported: it does not put every layer"):
        export_model(model, tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


# --- the support table

DECODER_TASKS = {
    "text": "AutoModelForCausalLM",
    "label": "AutoModelForSequenceClassification",
    "tags": "AutoModelForTokenClassification",
    "vector": "AutoModel",
}
POOLED = ("llama", "qwen2", "qwen3", "mistral", "gemma2")  # kinds that embedding models are made of
NO_HEAD = {(name, task) for name in ("cohere", "ernie4_5", "youtu", "olmoe") for task in ("label", "tags")}
NO_HEAD |= {("opt", "tags"), ("phimoe", "tags")} | {(name, "vector") for name in DECODERS if name not in POOLED}
ENCODERS = ("bert", "roberta", "distilbert", "electra")
ENCODER_TASKS = ("label", "pair", "labels", "number", "tags", "masks", "vector")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "task"),
    [(name, task) for name in DECODERS for task in DECODER_TASKS if (name, task) not in NO_HEAD],
)
def test_a_decoder(name, task, tmp_path, save_with_tokenizer, pool, outcomes):
    model = save_decoder(tmp_path / "model", save_with_tokenizer, name, DECODER_TASKS[task])
    if task == "vector":
        pool(model, {"pooling_mode_lasttoken": True})
    found = outcomes(model)
    assert found["fp32"] == "verified"


@pytest.mark.slow
@pytest.mark.parametrize("task", ENCODER_TASKS)
@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder(name, task, tmp_path, save_text_model, outcomes):
    found = outcomes(save_text_model(tmp_path / "model", name, task))
    assert found["fp32"] == "verified"
