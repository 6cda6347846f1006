"""The workloads as PyTorch's users write them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from . import workloads as w


def step_of(workload: w.Workload, params: Any, *, compiled: bool) -> Callable[[], Any]:
    """Return a function that makes one Adam step at each call and returns the loss."""
    model = MODELS[type(workload.model)](workload, params)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, 1e-3, fused=True)
    x, y = (torch.from_numpy(np.array(array)) for array in workload.batch)
    classes = not y.is_floating_point()
    if classes:
        y = y.long()

    def loss() -> Any:
        outputs, penalty = model(x)
        if classes:
            error = F.cross_entropy(outputs.flatten(0, -2), y.flatten())
        else:
            error = F.mse_loss(outputs, y)
        weights = sum(p.square().sum() for name, p in model.named_parameters() if _is_kernel(name))
        return error + penalty + w.WEIGHTS * weights

    if compiled:
        torch.compiler.reset()
        loss = torch.compile(loss, dynamic=False)

    def step() -> Any:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        return float(value.detach())

    return step


def _is_kernel(name: str) -> bool:
    return "weight" in name and "norm" not in name


def _tensor(array: Any) -> Any:
    return nn.Parameter(torch.from_numpy(np.array(array)))


def _dense(params: Any) -> nn.Linear:
    kernel = np.asarray(params["kernel"])
    layer = nn.Linear(*kernel.shape)
    layer.weight, layer.bias = _tensor(kernel.T), _tensor(params["bias"])
    return layer


def _norm(params: Any) -> nn.LayerNorm:
    layer = nn.LayerNorm(params["scale"].shape, eps=1e-6)
    layer.weight, layer.bias = _tensor(params["scale"]), _tensor(params["bias"])
    return layer


def _embed(params: Any) -> nn.Embedding:
    return nn.Embedding.from_pretrained(_tensor(params["embedding"]).data, freeze=False)


def _l1(h: Any) -> Any:
    return w.ACTIVITY * h.abs().sum() / len(h)


class _MLP(nn.Module):
    def __init__(self, workload: w.Workload, params: Any) -> None:
        super().__init__()
        hidden = (_dense(params[name]["dense"]) for name in workload.penalized)
        self.hidden = nn.ModuleList(hidden)
        self.out = _dense(params["out"])

    def forward(self, x: Any) -> Any:
        penalty = 0.0
        for layer in self.hidden:
            x = F.relu(layer(x))
            penalty = penalty + _l1(x)
        return self.out(x), penalty


class _CNN(nn.Module):
    def __init__(self, workload: w.Workload, params: Any) -> None:
        super().__init__()
        self.convs = nn.ModuleList()
        for name in workload.penalized:
            kernel = np.asarray(params[name]["conv"]["kernel"])
            layer = nn.Conv2d(*kernel.shape[2:], 3, padding="same")
            layer.weight = _tensor(kernel.transpose(3, 2, 0, 1))
            layer.bias = _tensor(params[name]["conv"]["bias"])
            self.convs.append(layer)
        self.out = _dense(params["out"])

    def forward(self, x: Any) -> Any:
        x, penalty = x.permute(0, 3, 1, 2), 0.0
        for layer in self.convs:
            x = F.relu(layer(x))
            penalty = penalty + _l1(x)
        return self.out(x.permute(0, 2, 3, 1).flatten(1)), penalty


class _Attention(nn.Module):
    def __init__(self, params: Any, heads: int) -> None:
        super().__init__()
        self.heads = heads
        for name in ("query", "key", "value", "out"):
            kernel, width = params[name]["kernel"], params["out"]["kernel"].shape[-1]
            flat = {"kernel": kernel.reshape(width, width), "bias": params[name]["bias"].ravel()}
            setattr(self, name, _dense(flat))

    def forward(self, x: Any) -> Any:
        split = (*x.shape[:-1], self.heads, -1)
        q, k, v = (f(x).view(split).transpose(1, 2) for f in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class _Block(nn.Module):
    def __init__(self, params: Any, heads: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = _norm(params["norm_1"]), _norm(params["norm_2"])
        self.attention = _Attention(params["attention"], heads)
        self.hidden, self.out = _dense(params["hidden"]["dense"]), _dense(params["out"])

    def forward(self, x: Any) -> Any:
        x = x + self.attention(self.norm_1(x))
        hidden = F.relu(self.hidden(self.norm_2(x)))
        return x + self.out(hidden), _l1(hidden)


class _Transformer(nn.Module):
    def __init__(self, workload: w.Workload, params: Any) -> None:
        super().__init__()
        model: Any = workload.model
        self.embed, self.position = _embed(params["embed"]), _tensor(params["position"])
        blocks = (_Block(params[f"block_{i}"], model.heads) for i in range(model.layers))
        self.blocks = nn.ModuleList(blocks)
        self.norm, self.head = _norm(params["norm"]), _dense(params["head"])

    def forward(self, tokens: Any) -> Any:
        x, penalty = self.embed(tokens) + self.position, 0.0
        for block in self.blocks:
            x, own = block(x)
            penalty = penalty + own
        return self.head(self.norm(x)), penalty


class _LSTM(nn.Module):
    def __init__(self, workload: w.Workload, params: Any) -> None:
        super().__init__()
        model: Any = workload.model
        cell = params["cell"]
        self.embed, self.head = _embed(params["embed"]), _dense(params["head"])
        self.lstm = nn.LSTM(model.width, model.width, batch_first=True)
        for theirs, part, leaf in (
            ("weight_ih_l0", "i", "kernel"),
            ("weight_hh_l0", "h", "kernel"),
            ("bias_ih_l0", "h", "bias"),
        ):
            joined = np.concatenate([np.asarray(cell[part + gate][leaf]) for gate in "ifgo"], -1)
            getattr(self.lstm, theirs).data = _tensor(joined.T).data.contiguous()
        # Flax and Keras have one bias, PyTorch two.
        self.lstm.bias_hh_l0.data.zero_()
        self.lstm.bias_hh_l0.requires_grad_(False)

    def forward(self, tokens: Any) -> Any:
        h, _ = self.lstm(self.embed(tokens))
        change = h[:, 1:] - h[:, :-1]
        penalty = w.AR * h.square().mean() + w.TAR * change.square().mean()
        return self.head(h), penalty


MODELS: dict[Any, Callable[[w.Workload, Any], nn.Module]] = {
    w.MLP: _MLP,
    w.CNN: _CNN,
    w.Transformer: _Transformer,
    w.LSTM: _LSTM,
}
