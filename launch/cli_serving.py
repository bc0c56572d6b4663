"""The commands from a trained model to answers: export, proof, decoding, serving."""

from pathlib import Path
from typing import Annotated

import typer

from launch import collecting, politeness
from launch.disk_errors import naming
from launch.onnxruntime_wheels import refuse_wheel_clash
from serving.directory import BadInput

app = typer.Typer()

OnnxArgument = Annotated[Path, typer.Argument(metavar="ONNX_DIR", help="A directory made by `trivet export`.")]
Provider = Annotated[str, typer.Option(help="cpu, cuda or tensorrt; never something else in silence.")]


@app.command()
def export(
    model: Annotated[Path, typer.Argument(metavar="MODEL_DIR|RUN|SWEEP", help="What to export.")],
    onnx_dir: Annotated[Path, typer.Argument(metavar="ONNX_DIR", help="Where it goes.")],
    dtype: Annotated[str, typer.Option(help="fp32, fp16 or bf16: of weights, activations and cache.")] = "fp32",
    optimize_for: Annotated[str, typer.Option(help="cpu or cuda: whose operators are used.")] = "cpu",
    loras: Annotated[
        str | None, typer.Option(metavar="DIR,DIR", help="LoRA adapters to keep beside the base; each row picks one.")
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Print the graph's nodes, who runs each, what is in pieces.")
    ] = False,
    quantize: Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT[,FORMAT]",
            help="int8 (weights and activations), int8-weights or int4 (weights, in blocks), for the CPU. Refused "
            "where it costs too much on held-out text: perplexity x1.03 for int8, x1.10 for int4, 1 point of accuracy.",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Held-out text for --quantize: .txt, or .jsonl with text (and label), messages, or prompt and "
            "completion. Default: what the run held out, else the Python standard library's own text.",
        ),
    ] = None,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="Export fp32 and each FORMAT into folders of ONNX_DIR (ONNX_DIR/fp32, ONNX_DIR/int8 ...), print size, "
            "speed, memory and quality side by side, and plot them as ONNX_DIR/comparison.png.",
        ),
    ] = False,
) -> None:
    """Export a model to ONNX, prove it against the untouched source, and publish it only then."""
    collecting.rarely()
    refuse_wheel_clash()
    politeness.check_hub_address()
    from launch.export import export

    folders = [] if loras is None else [each.strip() for each in loras.split(",")]
    if "" in folders:
        raise BadInput(f"--loras: {loras!r} names no folder at one place; accepted: DIR,DIR, or leave it out")
    asked = {"dtype": dtype, "optimize_for": optimize_for, "loras": tuple(map(Path, folders))}
    with naming(onnx_dir):
        if compare:
            if explain:
                raise BadInput("--explain: is of one graph; leave out --compare, or --explain")
            from launch.comparison import compare_formats

            raise typer.Exit(compare_formats(model, onnx_dir, quantize, data, **asked))
        raise typer.Exit(export(model, onnx_dir, explain=explain, data=data, quantization=quantize, **asked))


@app.command()
def verify(onnx_dir: OnnxArgument, provider: Provider = "cpu") -> None:
    """Prove an ONNX directory again, on this machine and provider, without torch."""
    refuse_wheel_clash()
    from launch.export import verify_again

    with naming(onnx_dir):
        raise typer.Exit(verify_again(onnx_dir, provider))


@app.command()
def generate(
    onnx_dir: OnnxArgument,
    prompt: Annotated[str | None, typer.Option(help="One prompt; a chat model gets it as the user's turn.")] = None,
    input: Annotated[Path | None, typer.Option(help="JSONL rows with `prompt` or `messages`, and an `id`.")] = None,
    output: Annotated[Path | None, typer.Option(help="Where the answers go; default: standard output.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="0 is off.")] = 0,
    top_p: Annotated[float, typer.Option(help="1 is off.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Give prompts to a chat model as plain text.")] = False,
    slots: Annotated[int, typer.Option(help="Rows decoded at a time.")] = 8,
    lora: Annotated[str | None, typer.Option(help="The adapter that answers; default: the base alone.")] = None,
    provider: Provider = "cpu",
) -> None:
    """Generate text, one prompt or a file of them."""
    refuse_wheel_clash()
    from launch.generate import generate
    from serving.request import Sampling

    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed)
    with naming(output or Path("standard output")):
        code = generate(
            onnx_dir,
            prompt,
            input,
            output,
            sampling=sampling,
            prompts_are_plain=raw,
            slots=slots,
            provider=provider,
            lora=lora,
        )
    raise typer.Exit(code)


@app.command()
def predict(
    onnx_dir: OnnxArgument,
    text: Annotated[str | None, typer.Option(help="One text to answer about.")] = None,
    text_pair: Annotated[str | None, typer.Option(help="The text that is judged with it, by a model of pairs.")] = None,
    input: Annotated[Path | None, typer.Option(help="JSONL rows with `text`, `text_pair`?, and an `id`.")] = None,
    output: Annotated[Path | None, typer.Option(help="Where the answers go; default: standard output.")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Tokens for each mask; default: 5.")] = None,
    provider: Provider = "cpu",
) -> None:
    """Answer about a text, or each row of a file: labels, tags of words, words for masks, a vector."""
    refuse_wheel_clash()
    from launch.predict import predict

    with naming(output or Path("standard output")):
        raise typer.Exit(predict(onnx_dir, text, input, output, provider=provider, text_pair=text_pair, top_k=top_k))


@app.command()
def serve(
    onnx_dir: OnnxArgument,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    slots: Annotated[int, typer.Option(help="Requests decoded at a time.")] = 8,
    api_key_file: Annotated[Path | None, typer.Option(help="Accepted API keys, one a line.")] = None,
    provider: Provider = "cpu",
) -> None:
    """Serve a model over HTTP: OpenAI-compatible, streaming, with a playground page at /."""
    refuse_wheel_clash()
    from launch.api_keys import read_keys
    from launch.export import offer_verification
    from serving.server import serve

    api_keys = read_keys(api_key_file)
    with naming(onnx_dir):
        offer_verification(onnx_dir, provider)
    serve(onnx_dir, host=host, port=port, slots=slots, api_keys=api_keys, provider=provider)
