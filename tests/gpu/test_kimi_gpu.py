"""Kimi Linear on a GPU: fla-core's KDA and the grouped product are the plain equations, and activations are those counted."""

from collections.abc import Callable
from dataclasses import replace
from statistics import median

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fathom.models.activations import gpu_activation_bytes
from fathom.models.config import ResidualConfig
from fathom.models.kimi_linear import build
from fathom.models.moe import Experts, Router
from tests.kernels.cases import error
from tests.models.test_kimi_activations import WIDE

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
pytest.importorskip("fla.ops", reason="needs fla-core")


def looped(experts: Experts, x: Tensor, gate_up: Tensor, down: Tensor, counts: Tensor) -> Tensor:
    """``Experts.grouped`` by one product after the other."""
    triples = zip(x.split(counts.tolist()), gate_up.unbind(), down.unbind(), strict=True)
    return torch.cat([F.linear(experts.activation(*F.linear(p, g).chunk(2, dim=-1)), d) for p, g, d in triples])


def results(device: str, *, low: bool) -> dict[str, Tensor]:
    """Logits and gradients over documents of many lengths, in bf16 if ``low``."""
    tokens = torch.randint(1024, (4, 193), generator=torch.Generator().manual_seed(1)).to(device)
    tokens[:, 50:150:20] = 0
    model = build(replace(WIDE, document_mask=True), end_of_text=0)
    generator = torch.Generator().manual_seed(2)
    for router in model.modules():
        if isinstance(router, Router):
            # Each token's own, with gaps that no score closes: in bf16 near-ties would choose other experts.
            bias = 2.0 * torch.rand(4 * 192, 8, generator=generator).argsort(1)
            router.bias = nn.Parameter(bias, requires_grad=False)
    model.to(device).eval()  # in training a router counts, and cannot with such a bias
    with torch.autocast(device, torch.bfloat16, enabled=low):
        logits = model(tokens[:, :-1])
    F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten()).backward()
    found = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    return found | {"logits": logits.detach().double()}


def assert_as_good_as_plain(kernels: Callable[[], dict[str, Tensor]], plain: Callable[..., dict[str, Tensor]]) -> None:
    """At most twice the error of ``plain`` in bf16, against ``plain`` in float32.

    log_rate has a number a head, whose error may be next to none by chance: what the median parameter's is counts as none.
    """
    truth, rounded, fast = plain(low=False), plain(low=True), kernels()
    errors = {name: error(rounded[name], each) for name, each in truth.items()}
    usual = median(errors.values())
    wrong = {
        name: (found, errors[name])
        for name, each in truth.items()
        if not (found := error(fast[name], each)) <= 2 * max(errors[name], usual)
    }
    assert not wrong, (usual, wrong)


def test_fla_s_kernels_and_the_grouped_product_are_the_plain_equations(monkeypatch: pytest.MonkeyPatch) -> None:
    """The chunked path and a loop over the experts are the plain ones; norms and reads are the same in all three."""

    def plain(*, low: bool) -> dict[str, Tensor]:
        with monkeypatch.context() as patch:
            patch.setenv("FATHOM_KDA", "chunked")
            patch.setattr(Experts, "grouped", looped)
            return results("cuda", low=low)

    monkeypatch.setenv("FATHOM_KDA", "fla")
    assert_as_good_as_plain(lambda: results("cuda", low=True), plain)


@pytest.mark.parametrize("rule", ["prenorm", "block"])
def test_a_gpu_keeps_what_is_counted(rule: str) -> None:
    """To the byte, between two batches: weights and casts of them are in both."""
    config = WIDE if rule == "block" else replace(WIDE, residual=ResidualConfig(rule="prenorm"))
    model = build(config).cuda()

    def kept(batch: int, length: int) -> int:
        tokens = torch.zeros(batch, length, dtype=torch.int64, device="cuda")
        found: dict[int, Tensor] = {}

        def pack(tensor: Tensor) -> Tensor:
            found.setdefault(tensor.untyped_storage().data_ptr(), tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cuda", torch.bfloat16):
            loss = model.loss(tokens, tokens.clone())
        del loss
        return sum(tensor.untyped_storage().nbytes() for tensor in found.values())

    def counted(batch: int, length: int) -> int:
        parts = gpu_activation_bytes(config, batch, length)
        return parts["sublayers"] + parts["head and loss"] + parts[rule]

    assert kept(16, 192) - kept(8, 128) == counted(16, 192) - counted(8, 128)
