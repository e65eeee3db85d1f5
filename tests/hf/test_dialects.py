"""Each dialect against the released class or the published equation: outputs and every gradient."""

import pytest
import torch
from torch import Tensor

from fathom.errors import UserError
from fathom.hf.dialects import DIALECTS, from_k3, k3_names, to_k3
from fathom.models.config import ResidualConfig
from fathom.residuals import make_stream


def sources(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [(scale * torch.randn(2, 3, 24, dtype=dtype)).requires_grad_() for scale in range(1, 6)]


def same(ours: list[Tensor], theirs: list[Tensor], inputs: list[Tensor]) -> None:
    weights = [torch.randn_like(each) for each in ours]
    gradients = []
    for outs in (ours, theirs):
        loss = sum((out * weight).sum() for out, weight in zip(outs, weights, strict=True))
        gradients.append(torch.autograd.grad(loss, inputs))
    tolerance = 1e-5 if ours[0].dtype == torch.float32 else 1e-12
    for one, other in zip((*ours, *gradients[0]), (*theirs, *gradients[1]), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("num_queries", [1, 3])
def test_inkling2_is_the_released_class(num_queries: int) -> None:
    """Transformers has it from 5.23 on."""
    inkling2 = pytest.importorskip("transformers.models.inkling2.modeling_inkling2")

    class Config:
        hidden_size = 24

    released = inkling2.Inkling2BlockAttentionResidual(Config(), num_queries)
    torch.nn.init.normal_(released.query, std=2.0)
    given = sources()
    theirs = released(torch.stack(given[:-1], dim=-2), given[-1])
    ours = DIALECTS["inkling2"].read(given, released.query.view(-1, 24))
    same(ours, list(theirs), [*given, released.query])


@pytest.mark.parametrize("name", ["paper", "fla", "kimi_k3", "alice_ai", "sana_video", "delta"])
def test_the_others_are_their_equations(name: str) -> None:
    dialect, given = DIALECTS[name], sources(torch.float64)
    query = torch.randn(24, dtype=torch.float64, requires_grad=True)
    gain = torch.randn(24, dtype=torch.float64, requires_grad=True) if dialect.gain else None
    values = torch.stack(given)
    keys = values / (values.square().mean(-1, keepdim=True) + dialect.eps).sqrt()
    scores = (keys * (1 if gain is None else gain) * query).sum(-1)
    theirs = (scores.softmax(0)[..., None] * values).sum(0) + (values.sum(0) if name == "delta" else 0)
    ours = dialect.read(given, query[None], None if gain is None else gain[None])
    same(ours, [theirs], [*given, query] + ([] if gain is None else [gain]))


def test_a_gain_that_a_dialect_lacks_is_refused() -> None:
    with pytest.raises(UserError, match="Inkling-2 has no weight"):
        DIALECTS["inkling2"].read(sources(), torch.zeros(1, 24), torch.ones(1, 24))


def test_kimi_k3s_schedule() -> None:
    """93 layers in blocks of 12: seven whole ones and a last one of 9; nine sources at the output, the embedding included."""
    schedule = DIALECTS["kimi_k3"].schedule(93)
    assert len(schedule) == 187
    assert schedule[0] == ["embedding"] and schedule[1] == ["embedding", "partial"]
    assert schedule[24] == ["embedding", "block 1"] and schedule[25] == ["embedding", "block 1", "partial"]
    starts = [site for site in range(1, 186) if "partial" not in schedule[site]]
    assert starts == [24 * n for n in range(1, 8)]
    assert schedule[-1] == ["embedding"] + [f"block {n}" for n in range(1, 9)]


@pytest.mark.parametrize(
    ("name", "layers", "output"), [("inkling2", 48, 9), ("alice_ai", 10, 4), ("sana_video", 20, 4)]
)
def test_schedules_of_the_others(name: str, layers: int, output: int) -> None:
    assert len(DIALECTS[name].schedule(layers)[-1]) == output


def test_a_block_size_that_is_a_setting_is_asked_for() -> None:
    with pytest.raises(UserError, match="layers_per_block"):
        DIALECTS["paper"].schedule(8)
    assert len(DIALECTS["paper"].schedule(8, 2)[-1]) == 5


def test_kimi_k3s_weights_map_to_a_stream_and_back() -> None:
    tensors: dict[str, Tensor] = {}
    for proj, norm in k3_names(3):
        tensors |= {proj: torch.randn(1, 8), norm: torch.randn(8)}
    assert "model.layers.2.self_attention_res_proj.weight" in tensors and "model.output_attn_res_norm.weight" in tensors
    stream = make_stream(ResidualConfig(block_size=4), 6, 8)
    stream.load_state_dict(from_k3(tensors, 3))
    assert torch.equal(stream.query[4], tensors["model.layers.2.self_attention_res_proj.weight"][0])  # type: ignore[index]
    assert torch.equal(stream.key_gain[3], tensors["model.layers.1.mlp_res_norm.weight"])  # type: ignore[index]
    back = to_k3(stream.query.detach(), stream.key_gain.detach())  # type: ignore[operator, union-attr]
    assert back.keys() == tensors.keys() and all(torch.equal(back[name], tensors[name]) for name in tensors)
    del tensors["model.layers.1.mlp_res_norm.weight"]
    with pytest.raises(UserError, match=r"layers\.1\.mlp_res_norm\.weight is missing"):
        from_k3(tensors, 3)
