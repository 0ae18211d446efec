"""The EfficientZero network, which acts (steps 2 and 3) and learns (step 5).

The training network normalises by the batch; the snapshot, its copy with every BatchNorm folded, is what search, acting and bootstrap
values use. Both are one class: `Network(spec)` and `Network(spec, folded=True)`, the second filled by `snapshot.fold`.
Architecture: EfficientZero (Ye et al., NeurIPS 2021), appendix A.1; published code has the same sizes.
In the shapes `B` is the batch, `A` the actions, `C x H x W` the latent, `H2` the LSTM state: both halves, 2 x units.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speedyzero.layers import ActionConv, ConvNorm, Head, LinearNorm, Norm, Parts, ResBlock, WithoutMemory, lstm_cell, read_out
from speedyzero.pixels import Pixels
from speedyzero.sizes import NetworkSpec
from speedyzero_kernels import dispatch
from speedyzero_kernels.head import fits
from speedyzero_kernels.support import to_scalar


class Prediction(NamedTuple):
    """What the prediction network says of a latent."""

    policy: Tensor
    """Policy logits [B, A]."""
    value: Tensor
    """Value logits [B, bins]."""


class Transition(NamedTuple):
    """What the dynamics network says of a latent and an action."""

    latent: Tensor
    """Next latent [B, C, H, W]."""
    hidden: Tensor
    """Next LSTM state [B, H2]."""
    prefix: Tensor
    """Value-prefix logits [B, bins]."""


class Network(nn.Module):
    """Representation, dynamics and prediction; the training network also has the consistency projection."""

    def __init__(self, spec: NetworkSpec, folded: bool = False):
        super().__init__()
        self.spec = spec
        self.pixels = Pixels(spec.normalised) if spec.normalised else None
        stem, channels = spec.stem_channels, spec.channels
        # An nn.Identity stands where a ReLU was before its layer took it over, and keeps the numbers in the weights' names.
        if spec.pyramid and spec.representation == "compact":
            layers = [
                ConvNorm(spec.in_channels, stem, 7, 4, folded), nn.Identity(), ResBlock(stem, channels, 2, folded),
                ResBlock(channels, channels, 1, folded), ResBlock(channels, channels, 1, folded),
            ]
        elif spec.pyramid:
            layers = [
                ConvNorm(spec.in_channels, stem, 3, 2, folded), nn.Identity(), ResBlock(stem, stem, 1, folded),
                ResBlock(stem, channels, 2, folded), ResBlock(channels, channels, 1, folded), nn.AvgPool2d(3, 2, 1),
                ResBlock(channels, channels, 1, folded), nn.AvgPool2d(3, 2, 1), ResBlock(channels, channels, 1, folded),
            ]
        else:
            layers = [ConvNorm(spec.in_channels, channels, 3, 1, folded), nn.Identity(), ResBlock(channels, channels, 1, folded)]
        self.representation = nn.Sequential(*layers)

        flat = spec.head_channels * spec.board[0] * spec.board[1]
        self.dynamics_conv = ActionConv(channels, spec.actions, spec.board, spec.action_encoding, folded)
        self.dynamics_block = ResBlock(channels, channels, 1, folded)
        self.prefix_conv = ConvNorm(channels, spec.head_channels, 1, 1, folded)
        self.prefix_lstm = nn.LSTMCell(flat, spec.lstm)
        self.prefix_norm = Norm(spec.lstm, folded)
        self.prefix_head = Head(spec.lstm, spec.head_hidden, spec.bins, folded)

        self.prediction_block = ResBlock(channels, channels, 1, folded)
        self.value_conv = ConvNorm(channels, spec.head_channels, 1, 1, folded)
        self.value_head = Head(flat, spec.head_hidden, spec.bins, folded)
        self.policy_conv = ConvNorm(channels, spec.head_channels, 1, 1, folded)
        self.policy_head = Head(flat, spec.head_hidden, spec.actions, folded)

        self.fused_heads = folded and fits(spec.head_channels, spec.head_hidden, spec.lstm, max(spec.bins, spec.actions))
        """Whether on CUDA each head of `model_step` is one launch; the widest are not."""

        if not folded:
            wide, narrow = spec.projection, spec.projection // 2
            latent_size = channels * spec.board[0] * spec.board[1]
            self.projection = nn.Sequential(
                LinearNorm(latent_size, wide), nn.Identity(), LinearNorm(wide, wide), nn.Identity(), LinearNorm(wide, wide, relu=False)
            )
            self.predictor = nn.Sequential(LinearNorm(wide, narrow), nn.Identity(), nn.Linear(narrow, wide))

    @property
    def normalisation(self) -> dict[str, Tensor]:
        """What normalises the pixels of observations, if anything does: keyword arguments of `gather.observations`."""
        return {} if self.pixels is None else {"mean": self.pixels.mean, "scale": self.pixels.scale}

    @property
    def input_format(self) -> dict[str, Any]:
        """What observations should be: keyword arguments of `gather.observations`."""
        weight = next(self.parameters())
        return {"dtype": weight.dtype, "memory_format": dispatch.board_format(weight), **self.normalisation}

    def represent(self, observation: Tensor) -> Tensor:
        """Observation [B, stack x C, H, W] -> latent."""
        return self.representation(observation)

    def predict(self, latent: Tensor) -> Prediction:
        """Policy and value logits of a latent."""
        x = self.prediction_block(latent)
        value = self.value_head(self.value_conv(x).flatten(1))
        policy = self.policy_head(self.policy_conv(x).flatten(1))
        return Prediction(policy, value)

    def advance(self, latent: Tensor, action: Tensor, parts: Parts | None = None) -> Tensor:
        """Latent and action [B] int64 -> next latent."""
        return self.dynamics_block(self.dynamics_conv(latent, action, parts))

    def unroll(self, latent: Tensor, actions: Tensor, between: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Latent and actions [B, K] int64 -> the K + 1 latents from the given one on; `between` is applied to every new one."""
        latents = [latent]
        for action, parts in zip(actions.unbind(1), self.dynamics_conv.split(actions), strict=True):
            latents.append(between(self.advance(latents[-1], action, parts)))
        return latents

    def prefix_features(self, latent: Tensor) -> Tensor:
        """What the value-prefix LSTM reads of a latent it arrives at: [B, features]."""
        return self.prefix_conv(latent).flatten(1)

    def remember(self, features: Tensor, hidden: Tensor) -> Tensor:
        """One step of the value-prefix LSTM: features and LSTM state -> LSTM state [B, H2], its output the first half."""
        return torch.cat(self.prefix_lstm(features, hidden.chunk(2, dim=1)), dim=1)

    def outputs(self, features: Tensor, batch: int, horizon: int) -> list[Tensor]:
        """What `remember` says of features [K x B, F], step-major, from zeros every `horizon` steps: K outputs [B, H].

        The features of all steps are one product, and so are the gradients that come from it; a step from zeros has no other.
        """
        lstm, hidden, outputs = self.prefix_lstm, None, []
        inputs = F.linear(features, lstm.weight_ih, lstm.bias_ih + lstm.bias_hh)
        zeros = inputs.new_zeros(batch, inputs.shape[1])
        for k, gates in enumerate(inputs.split(batch)):
            if k % horizon == 0:
                hidden, cell = lstm_cell(gates, zeros, zeros[:, : lstm.hidden_size])
            else:
                hidden, cell = lstm_cell(gates, F.linear(hidden, lstm.weight_hh), cell)
            outputs.append(hidden)
        return outputs

    def prefix(self, hidden: Tensor) -> Tensor:
        """LSTM state, or its output alone -> value-prefix logits [B, bins]."""
        return self.prefix_head(self.prefix_norm(hidden[:, : self.spec.lstm]))

    def step(self, latent: Tensor, hidden: Tensor, action: Tensor) -> Transition:
        """Latent, LSTM state and action [B] int64 -> what follows."""
        latent = self.advance(latent, action)
        hidden = self.remember(self.prefix_features(latent), hidden)
        return Transition(latent, hidden, self.prefix(hidden))

    def initial_hidden(self, batch: int) -> Tensor:
        """The LSTM state at a root: zeros [B, H2]."""
        weight = self.prefix_lstm.weight_hh
        return torch.zeros(batch, 2 * self.spec.lstm, dtype=weight.dtype, device=weight.device)

    def model_step(self, latent: Tensor, hidden: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The model as `search` wants it: next latent, LSTM state, value prefix [B], policy logits [B, A], value [B]."""
        if self.fused_heads and dispatch.runs_kernel(latent):
            latent = self.advance(latent, action)
            hidden = self.remember(self.prefix_features(latent), hidden)
            x = self.prediction_block(latent)
            prefix = read_out(self.prefix_head, self.prefix_norm, hidden[:, : self.spec.lstm], scalar=True)
            policy = read_out(self.policy_head, self.policy_conv, x, scalar=False)
            return latent, hidden, prefix, policy, read_out(self.value_head, self.value_conv, x, scalar=True)
        transition = self.step(latent, hidden, action)
        prediction = self.predict(transition.latent)
        return (transition.latent, transition.hidden, to_scalar(transition.prefix), prediction.policy, to_scalar(prediction.value))


def outline(spec: NetworkSpec) -> Network:
    """A training network whose tensors have shapes and no memory: what it would hold, before it is made."""
    with WithoutMemory():
        return Network(spec)
