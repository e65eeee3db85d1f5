"""examples/: other people's networks take a stream in under ten changed lines, and start as what they were."""

import difflib
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from fathom import BlockAttnRes
from fathom.models.layers import RMSNorm
from fathom.stream import norm_parts

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NETWORKS = {
    "decoder": lambda module: module.Decoder(50, 16).double(),
    "vit": lambda module: module.VisionTransformer(16, 4, 10).double(),
}
INPUTS = {
    "decoder": lambda: torch.randint(50, (2, 16)),
    "vit": lambda: torch.randn(2, 3, 16, 16, dtype=torch.float64),
}


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def code(name: str) -> list[str]:
    """The lines of an example without its docstring, imports and blank lines."""
    lines = (EXAMPLES / f"{name}.py").read_text().splitlines()[1:]
    return [line for line in lines if line.strip() and not line.startswith(("import ", "from "))]


@pytest.mark.parametrize("name", NETWORKS)
def test_under_ten_lines_are_new(name: str) -> None:
    changes = difflib.ndiff(code(f"{name}_plain"), code(f"{name}_attnres"))
    assert 0 < sum(line.startswith("+ ") for line in changes) < 10


@pytest.mark.parametrize("name", NETWORKS)
def test_it_starts_as_the_plain_network_and_learns(name: str) -> None:
    plain, stream = (NETWORKS[name](example(f"{name}_{kind}")) for kind in ("plain", "attnres"))
    missing = stream.load_state_dict(plain.state_dict(), strict=False)
    assert missing.missing_keys == ["stream.query", "stream.key_gain"] and not missing.unexpected_keys
    for network in (plain, stream):
        for module in network.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 0.0
    inputs = INPUTS[name]()
    torch.testing.assert_close(stream(inputs), plain(inputs), rtol=0, atol=1e-12)
    targets = torch.randn_like(plain(inputs))
    optimizer = torch.optim.AdamW(stream.parameters(), lr=1e-3)
    losses = []
    for _ in range(10):
        loss = nn.functional.mse_loss(stream(inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and stream.stream.query[1:].abs().amax(-1).gt(0).all()


def test_a_layer_norm_is_no_rms_norm() -> None:
    """Both have a weight and an epsilon, but only one of them subtracts the mean."""
    norm, mean = nn.LayerNorm(8), torch.full((8,), 3.0)
    nn.init.normal_(norm.bias)
    stream = BlockAttnRes(2, 8, num_blocks=1)
    embedding = torch.randn(2, 8) + mean
    x, state = stream.read(stream.start(embedding), 0, norm)
    torch.testing.assert_close(x, norm(embedding))
    torch.testing.assert_close(stream.finish(stream.write(state, 0, embedding), norm), norm(embedding))


def test_only_a_plain_rms_norm_is_taken_apart() -> None:
    """A kernel applies weight and epsilon itself: of a norm that may compute something else, it must not."""

    class OnePlus(RMSNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.rms_norm(x, (x.shape[-1],), 1 + self.weight, self.eps)

    plain, torchs = RMSNorm(8, 1e-6), nn.RMSNorm(8, eps=1e-5)
    assert norm_parts(plain) == (plain.weight, 1e-6) and norm_parts(torchs) == (torchs.weight, 1e-5)
    hooked = RMSNorm(8, 1e-6)
    hooked.register_forward_hook(lambda module, args, output: output)
    others = [
        OnePlus(8, 1e-6),
        nn.LayerNorm(8),
        hooked,
        nn.RMSNorm(8),
        nn.RMSNorm((2, 4), eps=1e-5),
        nn.Identity(),
        abs,
    ]
    assert [norm_parts(norm) for norm in others] == [(None, 0.0)] * len(others)
