"""``device_map``: the stream follows the sublayers over devices, and what is offloaded of it is there when it is read."""

from pathlib import Path

import pytest
import torch
from accelerate.hooks import attach_align_device_hook_on_blocks
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import fathom.hf as hf
from fathom.hf.export import from_native
from fathom.hf.placement import stream_on
from fathom.models.config import ResidualConfig
from fathom.residuals import RULES
from tests.hf.networks import network
from tests.hf.test_modeling import native, tokens


def place(model: PreTrainedModel, devices: dict[str, str]) -> None:
    """As ``dispatch_model`` does for devices that all keep their weights; ``devices`` of the parts of ``model.model``."""
    named = {f"model.{name}": device for name, device in devices.items()}
    attach_align_device_hook_on_blocks(
        model, execution_device=named, offload=dict.fromkeys(named, False), skip_keys=model._skip_keys_device_placement
    )


@pytest.mark.parametrize(
    ("rule", "border"), [*((rule, 3) for rule in ("prenorm", "block", "full", *RULES)), ("full", 6)]
)
def test_state_and_parameters_go_where_the_sublayers_are(rule: str, border: int) -> None:
    """Two devices, the meta device second: an operation on tensors of both raises."""
    model = from_native(native(rule))
    devices = {f"sublayers.{site}": "cpu" if site < border else "meta" for site in range(6)}
    place(model, {"embedding": "cpu", "stream": "cpu", "final_norm": "meta", **devices})
    last = model.model(tokens(2, 20)).last_hidden_state
    assert last.is_meta and last.shape == (2, 20, 16)
    assert not any(parameter.is_meta for parameter in model.model.stream.parameters())


def test_a_conversion_is_placed_layer_by_layer() -> None:
    model = hf.convert(network("llama"), ResidualConfig(rule="full"))
    parts = {"embed_tokens": "cpu", "rotary_emb": "cpu", "layers.0": "cpu", "layers.1": "meta", "layers.2": "meta"}
    place(model.network, {**parts, "norm": "meta"})
    assert model.network.model(tokens(2, 20)).last_hidden_state.is_meta


@pytest.mark.parametrize("kind", ["native", "converted"])
def test_an_offloaded_model_computes_the_same(kind: str, tmp_path: Path) -> None:
    if kind == "native":
        model: PreTrainedModel = from_native(native())
    else:
        model = hf.convert(network("llama"), ResidualConfig(num_blocks=3))
    with torch.no_grad():
        next(parameter for name, parameter in model.named_parameters() if name.endswith("stream.query")).normal_()
    model.save_pretrained(tmp_path / "model")
    text: Tensor = tokens(2, 20)
    whole = sum(parameter.nbytes for parameter in model.parameters())
    found = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map="auto", max_memory={"cpu": whole // 2}, offload_folder=tmp_path / "disk"
    )
    for _ in range(2):  # what is offloaded has no data before and after
        where = {name: parameter.device.type for name, parameter in found.named_parameters()}
        assert where[next(name for name in where if name.endswith("stream.query"))] == "meta"
        assert {"cpu", "meta"} == set(where.values())
        assert torch.equal(found(text).logits, model(text).logits)
    made = [each.generate(text[:1], max_new_tokens=5, do_sample=False) for each in (found, model)]
    assert torch.equal(*made)


def test_gradients_flow_through_a_copy_of_the_stream() -> None:
    stream = native("muddformer").stream
    same, copied = stream_on(stream, torch.device("cpu")), stream_on(stream, torch.device("cpu:0"))
    assert same is stream and copied is not stream
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))

    def gradients(each: torch.nn.Module) -> list[Tensor]:
        stream.zero_grad()
        state = each.start(x)  # type: ignore[operator]
        for site in range(6):
            read, state = each.read(state, site, torch.tanh)  # type: ignore[operator]
            output = read if isinstance(read, Tensor) else read.value
            state = each.write(state, site, output)  # type: ignore[operator]
        each.finish(state, torch.tanh).sum().backward()  # type: ignore[operator]
        return [parameter.grad.clone() for parameter in stream.parameters() if parameter.grad is not None]

    for got, expected in zip(gradients(copied), gradients(stream), strict=True):
        assert torch.equal(got, expected)
