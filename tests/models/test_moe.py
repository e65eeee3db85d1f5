import pytest
import torch
import torch.nn.functional as F

from fathom.models.kimi_config import KimiConfig
from fathom.models.layers import Context
from fathom.models.moe import Experts, MoE, Router, balance, count, situ, swiglu

CONTEXT = Context(torch.empty(0), torch.empty(0), None)


def layer(**options) -> MoE:
    moe = MoE(KimiConfig(dim=10, num_heads=1, num_experts=6, active_experts=2, expert_dim=7, **options)).double()
    generator = torch.Generator().manual_seed(5)
    for name, parameter in moe.named_parameters():
        scale = 0.1 if name == "router.bias" else 0.6
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale
    return moe


def activate(kind: str, both: torch.Tensor) -> torch.Tensor:
    gate, up = both.chunk(2, dim=-1)
    if kind == "swiglu":
        return gate * torch.sigmoid(gate) * up
    return 4 * torch.tanh(gate / 4) * torch.sigmoid(gate) * 25 * torch.tanh(up / 25)


def dense_loop(moe: MoE, x: torch.Tensor, kind: str) -> torch.Tensor:
    """Every expert on every token; those that a token did not choose have weight zero."""
    scores = torch.sigmoid(x @ moe.router.weight.T)
    chosen = (scores + moe.router.bias).topk(2, dim=-1).indices
    mask = torch.zeros_like(scores).scatter(-1, chosen, 1.0)
    weights = 2.446 * scores * mask / (scores * mask).sum(-1, keepdim=True)
    inner = moe.into(x)
    routed = sum(
        weights[..., e : e + 1] * (activate(kind, inner @ moe.experts.gate_up[e].T) @ moe.experts.down[e].T)
        for e in range(6)
    )
    if moe.shared is None:
        return moe.back(routed)
    return moe.back(routed) + activate(kind, x @ moe.shared.gate_up.weight.T) @ moe.shared.down.weight.T


@pytest.mark.parametrize(
    ("kind", "options"),
    [("swiglu", {}), ("situ", {"latent_dim": 4, "shared_experts": 2}), ("swiglu", {"shared_experts": 0})],
)
def test_equals_a_dense_loop_with_all_gradients(kind: str, options: dict):
    moe, x = layer(mlp_activation=kind, **options), torch.randn(3, 8, 10).double().requires_grad_()
    parts = [x, *(p for name, p in moe.named_parameters() if name not in ("norm.weight", "router.bias"))]
    expected, found = dense_loop(moe, x, kind), moe(x, CONTEXT)
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(found)
    for a, b in zip(
        torch.autograd.grad((expected * weight).sum(), parts),
        torch.autograd.grad((found * weight).sum(), parts),
        strict=True,
    ):
        torch.testing.assert_close(b, a)


def test_the_grouped_product_is_the_loop_s():
    """On a GPU it takes bf16 alone; on a CPU torch computes it in float32."""
    torch.manual_seed(0)
    experts, x = Experts(6, 12, 8, "swiglu"), torch.randn(9, 12, requires_grad=True)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    counts = torch.tensor([3, 0, 1, 4, 0, 1])
    weight = torch.randn(9, 12)
    results = []
    for output in (experts.sorted(x, counts), experts.grouped(x, experts.gate_up, experts.down, counts)):
        parts = (x, experts.gate_up, experts.down)
        results.append([output, *torch.autograd.grad((output * weight).sum(), parts)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)


def skewed(rule: str, steps: int, rate: float = 0.01) -> tuple[float, float]:
    """The largest load over the mean of a router that prefers some experts, at first and after ``steps``; fresh tokens each."""
    config = KimiConfig(dim=16, num_heads=1, num_experts=8, active_experts=2, balance=rule, balance_rate=rate)
    router = Router(config)
    generator = torch.Generator().manual_seed(6)
    router.weight.data = torch.randn(8, 16, generator=generator) * 0.3
    router.weight.data[:, 0] = torch.linspace(-1, 1, 8)
    spreads = []
    for _ in range(steps):
        tokens = torch.randn(2048, 16, generator=generator)
        tokens[:, 0] = 1.0
        chosen, _ = router(tokens)
        assert chosen.numel() == count(chosen, 8).sum()  # none dropped
        load = router.balance()
        spreads.append((load.max() / load.mean()).item())
    return spreads[0], sum(spreads[-10:]) / 10


@pytest.mark.parametrize(("rule", "steps"), [("bias", 150), ("quantile", 40)])
def test_balance_evens_out_a_skewed_router(rule: str, steps: int):
    before, after = skewed(rule, steps)
    assert before > 1.5
    assert after < 1.1


def test_without_balance_the_skew_stays():
    before, after = skewed("none", 20)
    assert after > 1.5 and abs(after - before) < 0.2


def test_the_bias_chooses_and_does_not_weigh():
    moe, x = layer(), torch.randn(5, 10).double()
    _, weights = moe.router(x)
    torch.testing.assert_close(weights.sum(-1), torch.full((5,), 2.446).double())
    moe.router.bias += 3.0
    torch.testing.assert_close(moe.router(x)[1], weights)
    moe.router.bias[4] += 9.0
    assert (moe.router(x)[0] == 4).any(-1).all()


def test_only_training_counts_and_the_largest_load_is_told():
    moe, x = layer(), torch.randn(2, 50, 10).double()
    with torch.no_grad():
        moe(x, CONTEXT)
    assert not moe.router.load.any()
    moe(x, CONTEXT)
    load = moe.router.load.clone()
    assert load.sum() == 200
    found = balance(torch.nn.ModuleList([moe]))
    torch.testing.assert_close(found, (load.max() / load.mean()).reshape(1))
    assert not moe.router.load.any()
    assert balance(torch.nn.Linear(1, 1)) is None


def test_situ_is_swiglu_for_small_inputs_and_bounded():
    gate, up = torch.randn(2, 100).double() * 1e-3
    torch.testing.assert_close(situ(gate, up), swiglu(gate, up), rtol=1e-6, atol=0)
    assert situ(torch.tensor(1e4), torch.tensor(1e4)) == 100
    torch.testing.assert_close(swiglu(gate, up), F.silu(gate) * up)
