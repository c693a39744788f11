"""Small networks with coupling patterns that model libraries lack or hide in large models."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv_bn(cin: int, cout: int, k: int = 3, s: int = 1, g: int = 1, act: type[nn.Module] = nn.SiLU) -> nn.Sequential:
    """Convolve with padding, normalise, activate."""
    conv = nn.Conv2d(cin, cout, k, s, k // 2, groups=g, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(cout), act())


def conv_gn(cin: int, cout: int, s: int = 1, groups: int = 4) -> nn.Sequential:
    """Convolve 3x3, normalise in groups, activate."""
    return nn.Sequential(nn.Conv2d(cin, cout, 3, s, 1), nn.GroupNorm(groups, cout), nn.SiLU())


def mlp(*widths: int) -> nn.Sequential:
    """Stack linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class UNet(nn.Module):
    """U-Net with three levels; ``transpose`` upsamples by (grouped) ConvTranspose and BatchNorm, else by Resize."""

    def __init__(self, *, transpose: bool, widths: Sequence[int] = (16, 32, 64, 128)) -> None:
        """Build encoder, decoder and head."""
        super().__init__()
        block = conv_bn if transpose else conv_gn
        pairs = list(pairwise(widths))
        self.stem = block(3, widths[0])
        self.down = nn.ModuleList(nn.Sequential(block(a, b, s=2), block(b, b)) for a, b in pairs)
        self.up = nn.ModuleList(self._up(b, a, transpose, i) for i, (a, b) in enumerate(pairs))
        self.merge = nn.ModuleList(block(2 * a, a) for a, _ in pairs)
        self.head = nn.Conv2d(widths[0], 5, 1)

    def _up(self, cin: int, cout: int, transpose: bool, level: int) -> nn.Module:
        """Double the size; the outermost transposed convolution is grouped."""
        if not transpose:
            return nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(cin, cout, 1))
        conv = nn.ConvTranspose2d(cin, cout, 4, 2, 1, groups=1 if level else 4, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(cout), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        """Segment an image."""
        skips = [self.stem(x)]
        for down in self.down:
            skips.append(down(skips[-1]))
        y = skips.pop()
        for up, merge in zip(reversed(self.up), reversed(self.merge), strict=True):
            y = merge(torch.cat([skips.pop(), up(y)], 1))
        return self.head(y)


class Bottleneck(nn.Module):
    """Two convolutions with a shortcut if asked."""

    def __init__(self, c: int, shortcut: bool) -> None:
        """Keep ``c`` channels."""
        super().__init__()
        self.a, self.b, self.shortcut = conv_bn(c, c), conv_bn(c, c), shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch."""
        return x + self.b(self.a(x)) if self.shortcut else self.b(self.a(x))


class C2f(nn.Module):
    """Split in two, chain bottlenecks, concatenate every stage (YOLOv8)."""

    def __init__(self, cin: int, cout: int, n: int, *, shortcut: bool = False) -> None:
        """Chain ``n`` bottlenecks of width ``cout // 2``."""
        super().__init__()
        c = cout // 2
        self.inner, self.outer = conv_bn(cin, 2 * c, 1), conv_bn((2 + n) * c, cout, 1)
        self.blocks = nn.ModuleList(Bottleneck(c, shortcut) for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        """Run the chain."""
        parts = list(self.inner(x).chunk(2, 1))
        for block in self.blocks:
            parts.append(block(parts[-1]))
        return self.outer(torch.cat(parts, 1))


class SPPF(nn.Module):
    """Pool three times in a row and concatenate."""

    def __init__(self, c: int) -> None:
        """Halve the width inside."""
        super().__init__()
        self.inner, self.outer, self.pool = conv_bn(c, c // 2, 1), conv_bn(2 * c, c, 1), nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Pool and merge."""
        parts = [self.inner(x)]
        for _ in range(3):
            parts.append(self.pool(parts[-1]))
        return self.outer(torch.cat(parts, 1))


class YoloHead(nn.Module):
    """Decoupled head with distribution focal loss bins; returns boxes and class scores of all levels."""

    bins = 8

    def __init__(self, widths: Sequence[int], classes: int) -> None:
        """Build one box and one class branch for each level."""
        super().__init__()
        self.box = nn.ModuleList(nn.Sequential(conv_bn(c, 32), nn.Conv2d(32, 4 * self.bins, 1)) for c in widths)
        self.cls = nn.ModuleList(nn.Sequential(conv_bn(c, 24), nn.Conv2d(24, classes, 1)) for c in widths)
        self.register_buffer("project", torch.arange(self.bins).float())

    def forward(self, levels: list[Tensor]) -> Tensor:
        """Decode to (N, 4 + classes, anchors)."""
        boxes, scores, centres = [], [], []
        for level, box, cls in zip(levels, self.box, self.cls, strict=True):
            h, w = level.shape[-2:]
            rows, cols = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
            centres.append(torch.stack([cols, rows]).reshape(2, h * w))
            boxes.append(box(level).flatten(2))
            scores.append(cls(level).flatten(2))
        raw = torch.cat(boxes, 2)
        distances = raw.view(-1, 4, self.bins, raw.shape[2]).softmax(2).transpose(2, 3) @ self.project
        low, high = distances.chunk(2, 1)
        centre = torch.cat(centres, 1)
        return torch.cat([centre - low, centre + high, torch.cat(scores, 2).sigmoid()], 1)


class YoloV8Like(nn.Module):
    """CSP backbone, path aggregation neck, DFL head."""

    def __init__(self, classes: int = 6, widths: Sequence[int] = (16, 32, 48, 64, 96)) -> None:
        """Build three levels."""
        super().__init__()
        a, b, c, d, e = widths
        self.stem = nn.Sequential(conv_bn(3, a, s=2), conv_bn(a, b, s=2), C2f(b, b, 1, shortcut=True))
        self.p3 = nn.Sequential(conv_bn(b, c, s=2), C2f(c, c, 2, shortcut=True))
        self.p4 = nn.Sequential(conv_bn(c, d, s=2), C2f(d, d, 2, shortcut=True))
        self.p5 = nn.Sequential(conv_bn(d, e, s=2), C2f(e, e, 1, shortcut=True), SPPF(e))
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.n4, self.n3 = C2f(e + d, d, 1), C2f(d + c, c, 1)
        self.d3, self.d4 = conv_bn(c, c, s=2), conv_bn(d, d, s=2)
        self.o4, self.o5 = C2f(c + d, d, 1), C2f(d + e, e, 1)
        self.head = YoloHead((c, d, e), classes)

    def forward(self, x: Tensor) -> Tensor:
        """Detect."""
        p3 = self.p3(self.stem(x))
        p4 = self.p4(p3)
        p5 = self.p5(p4)
        n4 = self.n4(torch.cat([self.up(p5), p4], 1))
        n3 = self.n3(torch.cat([self.up(n4), p3], 1))
        o4 = self.o4(torch.cat([self.d3(n3), n4], 1))
        o5 = self.o5(torch.cat([self.d4(o4), p5], 1))
        return self.head([n3, o4, o5])


def espcn() -> nn.Module:
    """Super-resolve by sub-pixel convolution."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 5, padding=2), nn.Tanh(), nn.Conv2d(32, 24, 3, padding=1), nn.Tanh(),
        nn.Conv2d(24, 8 * 4, 3, padding=1), nn.PixelShuffle(2), nn.PReLU(8), nn.Conv2d(8, 9, 3, padding=1),
        nn.PixelShuffle(3),
    )  # fmt: skip


def space_to_depth_net() -> nn.Module:
    """Fold space into channels and back (PixelUnshuffle, PixelShuffle)."""
    return nn.Sequential(
        conv_bn(3, 10), nn.PixelUnshuffle(2), conv_bn(40, 24), nn.PixelUnshuffle(2), conv_bn(96, 48),
        nn.PixelShuffle(4), nn.Conv2d(3, 3, 3, padding=1),
    )  # fmt: skip


class Tagger(nn.Module):
    """Embed, run a recurrent network, classify each token."""

    def __init__(self, cell: type[nn.RNNBase], *, layers: int = 2, both: bool = False, hidden: int = 48) -> None:
        """``both`` runs both directions."""
        super().__init__()
        self.embed = nn.Embedding(90, 32)
        self.rnn = cell(32, hidden, layers, batch_first=True, bidirectional=both)
        self.head = nn.Sequential(nn.Linear(hidden * (1 + both), 40), nn.ReLU(), nn.Linear(40, 7))

    def forward(self, ids: Tensor) -> Tensor:
        """Tag (N, T) ids."""
        return self.head(self.rnn(self.embed(ids))[0])


class LastState(nn.Module):
    """Classify a sequence of vectors by the last hidden and cell states of an LSTM, joined."""

    def __init__(self) -> None:
        """Build two layers."""
        super().__init__()
        self.inner, self.rnn = nn.Linear(12, 20), nn.LSTM(20, 28, 2, batch_first=True)
        self.head = mlp(56, 30, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Classify (N, T, 12)."""
        _, (h, c) = self.rnn(torch.relu(self.inner(x)))
        return self.head(torch.cat([h[-1], c[-1]], 1))


class Gated(nn.Module):
    """Residual MLP with gated linear units: ``fused`` uses one projection and a chunk, else two projections."""

    def __init__(self, *, fused: bool, width: int = 32, hidden: int = 88, depth: int = 3) -> None:
        """Stack ``depth`` blocks."""
        super().__init__()
        self.fused = fused
        self.norm = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.gate = nn.ModuleList(nn.Linear(width, hidden * (1 + fused)) for _ in range(depth))
        self.up = nn.ModuleList(nn.Linear(width, hidden) for _ in range(0 if fused else depth))
        self.down = nn.ModuleList(nn.Linear(hidden, width) for _ in range(depth))
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (N, T, width)."""
        for i, (norm, gate, down) in enumerate(zip(self.norm, self.gate, self.down, strict=True)):
            y = norm(x)
            x = x + down(F.glu(gate(y), -1) if self.fused else F.silu(gate(y)) * self.up[i](y))
        return self.head(x)


class TiedAutoencoder(nn.Module):
    """Autoencoder whose decoder uses the encoder's weights, transposed."""

    def __init__(self, widths: Sequence[int] = (40, 24, 12)) -> None:
        """Keep one weight for each pair of layers."""
        super().__init__()
        pairs = list(pairwise(widths))
        self.weights = nn.ParameterList(torch.randn(b, a) / math.sqrt(a) for a, b in pairs)
        self.enc = nn.ParameterList(torch.randn(b) / 9 for _, b in pairs)
        self.dec = nn.ParameterList(torch.randn(a) / 9 for a, _ in pairs)

    def forward(self, x: Tensor) -> Tensor:
        """Encode and decode (N, 40)."""
        for w, b in zip(self.weights, self.enc, strict=True):
            x = torch.tanh(F.linear(x, w, b))
        for w, b in zip(reversed(self.weights), reversed(self.dec), strict=True):
            x = F.linear(torch.tanh(x), w.t(), b)
        return x


class TiedLanguageModel(nn.Module):
    """Recurrent language model whose output layer is the embedding table."""

    def __init__(self) -> None:
        """Tie the tables."""
        super().__init__()
        self.embed, self.rnn = nn.Embedding(90, 36), nn.GRU(36, 36, batch_first=True)
        self.norm = nn.LayerNorm(36)

    def forward(self, ids: Tensor) -> Tensor:
        """Score the next token for (N, T) ids."""
        return F.linear(self.norm(self.rnn(self.embed(ids))[0]), self.embed.weight)


class OddDenseNet(nn.Module):
    """DenseNet with irregular growth rates and widths."""

    def __init__(self) -> None:
        """Build two dense blocks with a transition."""
        super().__init__()
        self.stem, c = conv_bn(3, 13), 13
        self.blocks = nn.ModuleList()
        for growths, out in (((7, 11, 5), 19), ((9, 3, 14, 1), 0)):
            layers = nn.ModuleList()
            for g in growths:
                layers.append(nn.Sequential(nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, g, 3, padding=1)))
                c += g
            last = nn.Sequential(conv_bn(c, out, 1), nn.AvgPool2d(2)) if out else nn.Identity()
            self.blocks.append(nn.ModuleList([layers, last]))
            c = out or c
        self.head = nn.Linear(c, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Classify."""
        x = self.stem(x)
        for layers, last in self.blocks:
            for layer in layers:
                x = torch.cat([x, layer(x)], 1)
            x = last(x)
        return self.head(x.mean((2, 3)))


class Residual(nn.Module):
    """Sum of a body and a shortcut, activated."""

    def __init__(self, body: nn.Module, shortcut: nn.Module | None = None) -> None:
        """Without a shortcut the input is added as it is."""
        super().__init__()
        self.body, self.shortcut = body, shortcut or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Add and activate."""
        return torch.relu(self.body(x) + self.shortcut(x))


def classifier(*body: nn.Module, width: int, classes: int = 10) -> nn.Sequential:
    """Append global pooling and a linear layer."""
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


def groupnorm_resnet() -> nn.Module:
    """ResNet with GroupNorm and strided shortcuts."""
    layers: list[nn.Module] = [conv_gn(3, 24)]
    for a, b in ((24, 24), (24, 48), (48, 48), (48, 96)):
        s = 1 if a == b else 2
        body = nn.Sequential(conv_gn(a, b, s), nn.Conv2d(b, b, 3, padding=1), nn.GroupNorm(8, b))
        layers.append(Residual(body, None if a == b else nn.Sequential(nn.Conv2d(a, b, 1, s), nn.GroupNorm(8, b))))
    return classifier(*layers, width=96)


class PadShortcut(nn.Module):
    """Parameter-free shortcut: subsample and pad channels with zeros on both sides (ResNet option A)."""

    def __init__(self, extra: int) -> None:
        """Pad ``extra`` channels in all."""
        super().__init__()
        self.extra = extra

    def forward(self, x: Tensor) -> Tensor:
        """Pad axis 1."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2))


def padded_resnet() -> nn.Module:
    """ResNet whose shortcuts pad channels."""
    layers: list[nn.Module] = [conv_bn(3, 16)]
    for a, b in ((16, 16), (16, 32), (32, 64)):
        body = nn.Sequential(conv_bn(a, b, s=1 if a == b else 2), nn.Conv2d(b, b, 3, padding=1), nn.BatchNorm2d(b))
        layers.append(Residual(body, None if a == b else PadShortcut(b - a)))
    return classifier(*layers, width=64)


class Rope(nn.Module):
    """Rotary position embedding by halves."""

    def __init__(self, width: int, length: int) -> None:
        """Precompute the angles."""
        super().__init__()
        angles = torch.outer(torch.arange(length), 10000 ** (-torch.arange(0, width, 2) / width)).repeat(1, 2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, x: Tensor) -> Tensor:
        """Rotate (N, heads, T, width)."""
        a, b = x.chunk(2, -1)
        return x * self.cos + torch.cat([-b, a], -1) * self.sin


class PlainRMSNorm(nn.Module):
    """RMSNorm spelt out, for exporters without the operator."""

    def __init__(self, width: int) -> None:
        """Scale the last axis."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Divide by the root of the mean square."""
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class GroupedAttention(nn.Module):
    """Causal attention on 16 tokens with rotary positions, query-key norms and fewer key-value heads than heads."""

    def __init__(self, norm: type[nn.Module], width: int, heads: int, kv: int) -> None:
        """Share each key-value head between ``heads // kv`` query heads."""
        super().__init__()
        self.heads, self.kv, self.d = heads, kv, width // heads
        self.q, self.k = nn.Linear(width, width, bias=False), nn.Linear(width, kv * self.d, bias=False)
        self.v, self.o = nn.Linear(width, kv * self.d, bias=False), nn.Linear(width, width, bias=False)
        self.rope, self.qn, self.kn = Rope(self.d, 16), norm(self.d), norm(self.d)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over (N, T, width)."""
        n, t, _ = x.shape
        q = self.rope(self.qn(self.q(x).view(n, t, self.heads, self.d)).transpose(1, 2))
        k = self.rope(self.kn(self.k(x).view(n, t, self.kv, self.d)).transpose(1, 2))
        v = self.v(x).view(n, t, self.kv, self.d).transpose(1, 2)
        repeat = self.heads // self.kv
        k, v = (y[:, :, None].expand(-1, -1, repeat, -1, -1).reshape(n, self.heads, t, self.d) for y in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).reshape(n, t, -1))


class SwiGLU(nn.Module):
    """Gated feed-forward layer."""

    def __init__(self, width: int, hidden: int) -> None:
        """Build three projections."""
        super().__init__()
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform the last axis."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class PreNorm(nn.Module):
    """Residual around a norm and a body."""

    def __init__(self, norm: nn.Module, body: nn.Module) -> None:
        """Wrap ``body``."""
        super().__init__()
        self.norm, self.body = norm, body

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch."""
        return x + self.body(self.norm(x))


def rope_gqa(norm: type[nn.Module]) -> nn.Module:
    """Small decoder in today's style: RMSNorm, rotary grouped-query attention, SwiGLU."""
    blocks: list[nn.Module] = [nn.Embedding(90, 64)]
    for _ in range(3):
        blocks += [
            PreNorm(norm(64), GroupedAttention(norm, 64, 8, 2)),
            PreNorm(norm(64), SwiGLU(64, 176)),
        ]
    return nn.Sequential(*blocks, norm(64), nn.Linear(64, 90, bias=False))


class LinearAttention(nn.Module):
    """Attention with a feature map in place of the softmax: keys meet values first."""

    def __init__(self, width: int, heads: int) -> None:
        """Project with one fused layer."""
        super().__init__()
        self.heads, self.qkv, self.o = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over (N, T, width)."""
        n, t, c = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        y = q @ (k.transpose(-2, -1) @ v) / (q @ k.sum(-2, keepdim=True).transpose(-2, -1))
        return self.o(y.transpose(1, 2).reshape(n, t, c))


class EinsumAttention(nn.Module):
    """Attention written with einsum on weights that keep heads and head width as axes of their own."""

    def __init__(self, width: int, heads: int, d: int) -> None:
        """Hold (width, heads, d) projections."""
        super().__init__()
        self.qkv = nn.ParameterList(torch.randn(width, heads, d) / math.sqrt(width) for _ in range(3))
        self.o = nn.Parameter(torch.randn(heads, d, width) / math.sqrt(width))
        self.scale = d**-0.5

    def forward(self, x: Tensor) -> Tensor:
        """Attend over (N, T, width)."""
        q, k, v = (torch.einsum("btc,chd->bthd", x, w) for w in self.qkv)
        weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) * self.scale).softmax(-1)
        return torch.einsum("bhqk,bkhd,hdc->bqc", weights, v, self.o)


def token_stack(make: type[nn.Module] | None, *options: int) -> nn.Module:
    """Stack attention of a kind with GELU MLPs on (N, T, 48)."""
    blocks: list[nn.Module] = []
    for _ in range(2):
        feed = nn.Sequential(nn.Linear(48, 100), nn.GELU(), nn.Linear(100, 48))
        blocks += [PreNorm(nn.LayerNorm(48), make(48, *options)), PreNorm(nn.LayerNorm(48), feed)]
    return nn.Sequential(*blocks, nn.LayerNorm(48), nn.Linear(48, 9))


class SE(nn.Module):
    """Squeeze and excite by 1x1 convolutions."""

    def __init__(self, c: int, r: int = 4) -> None:
        """Reduce to ``c // r``."""
        super().__init__()
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(c, c // r, 1), nn.ReLU(), nn.Conv2d(c // r, c, 1), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        """Scale the channels."""
        return x * self.gate(x)


class ECA(nn.Module):
    """Efficient channel attention: a convolution along the channel axis."""

    def __init__(self, c: int, k: int = 3) -> None:
        """The kernel sees ``k`` neighbouring channels; ``c`` is not used."""
        super().__init__()
        self.conv = nn.Conv1d(1, 1, k, padding=k // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Scale the channels."""
        y = self.conv(x.mean((2, 3)).unsqueeze(1)).squeeze(1).sigmoid()
        return x * y[:, :, None, None]


class CBAM(nn.Module):
    """Channel attention from average and maximum with a shared MLP, then spatial attention."""

    def __init__(self, c: int, r: int = 4) -> None:
        """Reduce to ``c // r``."""
        super().__init__()
        self.mlp, self.spatial = mlp(c, c // r, c), nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        """Scale channels, then places."""
        gate = torch.sigmoid(self.mlp(x.mean((2, 3))) + self.mlp(x.amax((2, 3))))
        x = x * gate[:, :, None, None]
        return x * torch.sigmoid(self.spatial(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)))


def attention_cnn(gate: type[nn.Module]) -> nn.Module:
    """Residual CNN with a gate in each branch."""
    layers: list[nn.Module] = [conv_bn(3, 24, s=2)]
    for a, b in ((24, 24), (24, 40), (40, 40)):
        body = nn.Sequential(conv_bn(a, b), conv_bn(b, b), gate(b))
        layers.append(Residual(body, None if a == b else conv_bn(a, b, 1)))
    return classifier(*layers, width=40)


class Shuffle(nn.Module):
    """Shuffle channels between groups."""

    def __init__(self, groups: int) -> None:
        """Interleave ``groups``."""
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """Permute axis 1."""
        return F.channel_shuffle(x, self.groups) if self.groups == 1 else self._shuffle(x)

    def _shuffle(self, x: Tensor) -> Tensor:
        """Reshape, transpose, reshape."""
        n, c, h, w = x.shape
        return x.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def grouped_cnn() -> nn.Module:
    """Grouped, depthwise and depth-multiplier convolutions with shuffles."""
    return classifier(
        conv_bn(3, 24), conv_bn(24, 48, g=4), Shuffle(4), conv_bn(48, 48, g=48), conv_bn(48, 96, g=48),
        conv_bn(96, 96, 1, g=3), Shuffle(3), Residual(conv_bn(96, 96, g=8)), conv_bn(96, 60, 1), width=60,
    )  # fmt: skip


class SimpleGate(nn.Module):
    """Multiply the halves of the channels (NAFNet)."""

    def forward(self, x: Tensor) -> Tensor:
        """Halve axis 1."""
        a, b = x.chunk(2, 1)
        return a * b


def gated_cnn() -> nn.Module:
    """CNN with simple gates and maxout over pairs of channels."""
    return classifier(
        conv_bn(3, 32), SimpleGate(), conv_bn(16, 48), Residual(nn.Sequential(conv_bn(48, 96, 1), SimpleGate())),
        conv_bn(48, 40), Maxout(), conv_bn(20, 24), width=24,
    )  # fmt: skip


class Maxout(nn.Module):
    """Keep the larger of neighbouring channels."""

    def forward(self, x: Tensor) -> Tensor:
        """Halve axis 1."""
        n, c, h, w = x.shape
        return x.view(n, c // 2, 2, h, w).amax(2)


class WaveNet(nn.Module):
    """Dilated causal 1-D convolutions with gates, residuals and summed skips, weight-normed."""

    def __init__(self, width: int = 24, skip: int = 20) -> None:
        """Build four layers."""
        super().__init__()
        norm = nn.utils.parametrizations.weight_norm
        self.stem = nn.Conv1d(4, width, 1)
        self.gates = nn.ModuleList(norm(nn.Conv1d(width, 2 * width, 2, dilation=2**i)) for i in range(4))
        self.res = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in range(4))
        self.skips = nn.ModuleList(nn.Conv1d(width, skip, 1) for _ in range(4))
        self.head = nn.Sequential(nn.ReLU(), nn.Conv1d(skip, 16, 1), nn.ReLU(), nn.Conv1d(16, 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Predict (N, 8, T) from (N, 4, T)."""
        x, total = self.stem(x), torch.zeros(())
        for i, (gate, res, skip) in enumerate(zip(self.gates, self.res, self.skips, strict=True)):
            a, b = gate(F.pad(x, (2**i, 0))).chunk(2, 1)
            y = torch.tanh(a) * torch.sigmoid(b)
            x, total = x + res(y), total + skip(y)
        return self.head(total)


class Siamese(nn.Module):
    """Two inputs through one tower; the distance and the product are classified."""

    def __init__(self) -> None:
        """Build the tower once."""
        super().__init__()
        self.tower = nn.Sequential(conv_bn(3, 16, s=2), conv_bn(16, 32, s=2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = mlp(64, 24, 2)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Compare two images."""
        a, b = self.tower(a), self.tower(b)
        return self.head(torch.cat([(a - b).abs(), a * b], 1))


class Heads(nn.Module):
    """One trunk, an image and a vector input, three outputs of different rank."""

    def __init__(self) -> None:
        """Join a CNN and an MLP."""
        super().__init__()
        self.cnn = nn.Sequential(conv_bn(3, 16, s=2), conv_bn(16, 30, s=2))
        self.vector = mlp(10, 20, 30)
        self.mask, self.label, self.box = nn.Conv2d(30, 2, 1), nn.Linear(30, 5), mlp(30, 16, 4)

    def forward(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return a mask, logits and a box."""
        y = self.cnn(x) * torch.sigmoid(self.vector(v))[:, :, None, None]
        pooled = y.amax((2, 3))
        return self.mask(y), self.label(pooled), self.box(pooled)


def conv_autoencoder() -> nn.Module:
    """Flatten a map into a code and unflatten it: channels are the outer axis of the linear layers."""
    return nn.Sequential(
        conv_bn(3, 12, s=2), conv_bn(12, 20, s=2), nn.Flatten(), nn.Linear(20 * 64, 32), nn.ReLU(),
        nn.Linear(32, 20 * 64), nn.Unflatten(1, (20, 8, 8)), nn.ConvTranspose2d(20, 12, 2, 2), nn.ReLU(),
        nn.ConvTranspose2d(12, 3, 2, 2),
    )  # fmt: skip


def conv3d_net() -> nn.Module:
    """3-D convolutions with InstanceNorm."""
    return nn.Sequential(
        nn.Conv3d(2, 12, 3, padding=1), nn.InstanceNorm3d(12, affine=True), nn.ReLU(), nn.MaxPool3d(2),
        nn.Conv3d(12, 20, 3, padding=1), nn.BatchNorm3d(20), nn.PReLU(20), nn.ConvTranspose3d(20, 9, 2, 2),
        nn.LeakyReLU(0.1), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(9, 4),
    )  # fmt: skip


def style_net() -> nn.Module:
    """Style transfer: reflection padding, InstanceNorm, residuals, nearest upsampling."""

    def block(a: int, b: int, s: int = 1) -> nn.Sequential:
        """Pad by reflection, convolve, normalise."""
        return nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(a, b, 3, s), nn.InstanceNorm2d(b, affine=True))

    relu, up = nn.ReLU(), nn.Upsample(scale_factor=2)
    body = Residual(nn.Sequential(block(32, 32), relu, block(32, 32)))
    return nn.Sequential(
        block(3, 16), relu, block(16, 32, 2), relu, body, up, block(32, 16), relu, nn.LocalResponseNorm(5),
        nn.ReflectionPad2d(1), nn.Conv2d(16, 3, 3), nn.Tanh(),
    )  # fmt: skip


class SpatialTransformer(nn.Module):
    """Localise, warp the features by grid sampling, classify."""

    def __init__(self) -> None:
        """Build localiser and classifier."""
        super().__init__()
        self.features = conv_bn(3, 18)
        self.local = nn.Sequential(conv_bn(18, 12, s=2), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(12, 6))
        self.head = classifier(conv_bn(18, 26, s=2), width=26)

    def forward(self, x: Tensor) -> Tensor:
        """Classify."""
        y = self.features(x)
        grid = F.affine_grid(self.local(y).view(-1, 2, 3), list(y.shape), align_corners=False)
        return self.head(F.grid_sample(y, grid, align_corners=False))


class PointNet(nn.Module):
    """Points through shared 1-D convolutions, a learnt alignment of features, a maximum over points."""

    def __init__(self) -> None:
        """Build the alignment of 16 features."""
        super().__init__()

        def layer(a: int, b: int) -> nn.Sequential:
            """Convolve each point."""
            return nn.Sequential(nn.Conv1d(a, b, 1), nn.BatchNorm1d(b), nn.ReLU())

        self.first, self.align, self.fit = layer(3, 16), layer(16, 28), nn.Linear(28, 256)
        self.second, self.head = nn.Sequential(layer(16, 32), layer(32, 64)), mlp(64, 40, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Classify (N, 3, points)."""
        y = self.first(x)
        matrix = self.fit(self.align(y).amax(2)).view(-1, 16, 16)
        return self.head(self.second(matrix @ y).amax(2))


class GraphNet(nn.Module):
    """Graph convolutions with a dense adjacency matrix as input."""

    def __init__(self) -> None:
        """Build three layers with skips."""
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in ((8, 24), (24, 24), (24, 24)))
        self.head = nn.Linear(24, 3)

    def forward(self, x: Tensor, a: Tensor) -> Tensor:
        """Classify nodes: (N, nodes, 8) features, (N, nodes, nodes) adjacency."""
        y = torch.relu(self.layers[0](a @ x))
        for layer in self.layers[1:]:
            y = y + torch.relu(layer(a @ y))
        return self.head(y)


class Experts(nn.Module):
    """Dense mixture of experts with stacked weights (experts, in, out)."""

    def __init__(self, experts: int = 4, width: int = 20, hidden: int = 36) -> None:
        """Stack the experts' weights."""
        super().__init__()
        self.gate = nn.Linear(width, experts)
        self.inner = nn.Parameter(torch.randn(experts, width, hidden) / math.sqrt(width))
        self.outer = nn.Parameter(torch.randn(experts, hidden, width) / math.sqrt(hidden))

    def forward(self, x: Tensor) -> Tensor:
        """Mix (N, width)."""
        y = torch.relu(x.unsqueeze(0) @ self.inner) @ self.outer
        return x + (y * self.gate(x).softmax(-1).t().unsqueeze(-1)).sum(0)


class DynamicConv(nn.Module):
    """Convolution kernels mixed from a bank by the input (CondConv): weights that are computed."""

    def __init__(self) -> None:
        """Hold a bank of four kernels."""
        super().__init__()
        self.stem, self.route = conv_bn(3, 16, s=2), nn.Linear(16, 4)
        self.bank, self.tail = nn.Parameter(torch.randn(4, 24 * 16 * 9) / 12), conv_bn(24, 20)
        self.head = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Classify one image (batch 1)."""
        y = self.stem(x)
        kernel = (self.route(y.mean((0, 2, 3))).softmax(-1) @ self.bank).view(24, 16, 3, 3)
        return self.head(self.tail(F.conv2d(y, kernel, padding=1)).mean((2, 3)))


class TorchTransformer(nn.Module):
    """torch's own encoder and decoder layers: in-projections packed as (3C, C), cross-attention."""

    def __init__(self) -> None:
        """Build two encoder layers and one decoder layer."""
        super().__init__()
        options = {"d_model": 40, "nhead": 4, "dim_feedforward": 72, "batch_first": True, "dropout": 0.0}
        self.encoder = nn.ModuleList(nn.TransformerEncoderLayer(**options, activation="gelu") for _ in range(2))
        self.decoder = nn.TransformerDecoderLayer(**options)
        self.queries, self.head = nn.Parameter(torch.randn(1, 6, 40)), mlp(40, 24, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Decode six slots from (N, T, 40)."""
        for layer in self.encoder:
            x = layer(x)
        return self.head(self.decoder(self.queries.expand(x.shape[0], -1, -1), x))


class ConvLSTM(nn.Module):
    """Convolutional LSTM cell unrolled over five frames."""

    def __init__(self, hidden: int = 14) -> None:
        """Compute the four gates with one convolution."""
        super().__init__()
        self.hidden, self.stem, self.cell = (
            hidden,
            nn.Conv2d(2, 10, 3, padding=1),
            nn.Conv2d(10 + hidden, 4 * hidden, 3, padding=1),
        )
        self.head = nn.Conv2d(hidden, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Predict the next of (N, 5, 2, H, W)."""
        h = c = torch.zeros_like(x[:, 0, :1]).expand(-1, self.hidden, -1, -1)
        for t in range(5):
            i, f, o, g = self.cell(torch.cat([torch.relu(self.stem(x[:, t])), h], 1)).split(self.hidden, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        return self.head(h)


class ControlFlow(nn.Module):
    """An If on the data and a Loop over the batch, for scripting."""

    def __init__(self) -> None:
        """Build branches of equal shape."""
        super().__init__()
        self.inner, self.a, self.b, self.step = (nn.Linear(16, 16) for _ in range(4))
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (N, 16)."""
        y = torch.relu(self.inner(x))
        y = self.a(y) if bool(y.mean() > 0.4) else torch.tanh(self.b(y))
        for _ in range(x.size(0)):
            y = y + torch.tanh(self.step(y))
        return self.head(y)


class Cond(nn.Module):
    """``torch.cond`` between two branches."""

    def __init__(self) -> None:
        """Build branches of equal shape."""
        super().__init__()
        self.inner, self.a, self.b, self.head = (
            nn.Linear(16, 24),
            nn.Linear(24, 20),
            nn.Linear(24, 20),
            nn.Linear(20, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Transform (N, 16)."""
        y = torch.relu(self.inner(x))
        return self.head(torch.cond(y.mean() > 0.4, lambda z: self.a(z), lambda z: torch.tanh(self.b(z)), (y,)))
