"""What a forward pass shows on the way: the erasers' outputs, and where video tokens attend to the concept's words.

Both captures are context managers around calls of the model. They listen only while the model's own forward method
runs, so that gradient checkpointing, which runs blocks again in the backward pass, cannot overwrite what was captured.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from fastunlearn.families import attentions, find_transformer
from fastunlearn.functional import LowRankOutput, concept_attention
from fastunlearn.interception import Attention, Interception
from fastunlearn.ops.arguments import integer_tensor, token_index_rows


class _Capture:
    """Knows when the model's forward method runs, and cleans up."""

    def __init__(self, model: nn.Module) -> None:
        self._transformer, self._family = find_transformer(model)
        self._undo: ExitStack | None = None
        self._running = False
        self._grad_wanted = False
        self._seen: set[str] = set()

    def _before(self, module: nn.Module, args: Any) -> None:
        self._running = True
        self._grad_wanted = torch.is_grad_enabled()

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        self._running = False

    def _listen(self, undo: ExitStack) -> None:
        raise NotImplementedError

    def _why_nothing(self) -> str:
        raise NotImplementedError

    def __enter__(self) -> Any:
        if self._undo is not None:
            raise RuntimeError(f"this {type(self).__name__} is active already")
        self._seen.clear()
        with ExitStack() as undo:
            undo.callback(self._transformer.register_forward_pre_hook(self._before).remove)
            undo.callback(self._transformer.register_forward_hook(self._after, always_call=True).remove)
            self._listen(undo)
            self._undo = undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._undo is not None:
            self._undo.close()
        self._undo, self._running = None, False
        if kind is None and not self._seen:
            raise RuntimeError(f"{type(self).__name__} captured nothing: {self._why_nothing()}")


def _check_mapping(name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{name}: expected a mapping such as a dict, got {type(value).__name__}")


class EraserOutputsCapture(_Capture):
    """Fills `eraser_outputs` with what each eraser adds to its attention, for the localization loss.

        eraser_outputs = {}
        with EraserOutputsCapture(model, erasers, eraser_outputs):
            velocity = model(x_t, t, cond)

    Outputs are (B, N, D) by layer, in the computation's dtype and with their graph, and without the scale that
    `set_eraser_scale` gave the erasers. Another call of the model replaces them; the recomputation of gradient
    checkpointing does not.

    With `low_rank`, which is the form to prefer, each is a `LowRankOutput` instead, which `localization_loss` takes as
    well: what the eraser's last layer reads, r of D numbers a token (128 of 3072 in CogVideoX-5B), and its parameters
    themselves.

    Args:
        model: the transformer that has the erasers, or a wrapper of it.
        erasers: those to capture, by layer, as `attach_erasers` returned them.
        eraser_outputs: the mapping to fill.
        low_rank: whether to capture low-rank outputs.

    Raises:
        TypeError: the model is of no supported family, or `erasers` or `eraser_outputs` is no mapping.
        ValueError: `low_rank` with an eraser that does not end in a `torch.nn.Linear` called `up`.
        RuntimeError: at the end, if nothing was captured; in the forward pass, if checkpointing is reentrant, which
            cuts captured outputs off their gradients.
    """

    def __init__(
        self,
        model: nn.Module,
        erasers: Mapping[str, nn.Module],
        eraser_outputs: MutableMapping[str, Any],
        *,
        low_rank: bool = False,
    ) -> None:
        super().__init__(model)
        _check_mapping("eraser_outputs", eraser_outputs, MutableMapping)
        _check_mapping("erasers", erasers, Mapping)
        for name, eraser in erasers.items():
            if not isinstance(eraser, nn.Module):
                raise TypeError(f"erasers[{name!r}]: expected a torch.nn.Module, got {type(eraser).__name__}")
            if low_rank and not isinstance(getattr(eraser, "up", None), nn.Linear):
                raise ValueError(
                    f"erasers[{name!r}]: expected one that ends in a torch.nn.Linear called up, as AdapterEraser does; "
                    f"got {type(eraser).__name__}: capture with low_rank=False"
                )
        self._erasers = erasers
        self._outputs = eraser_outputs
        self._low_rank = low_rank

    def _listen(self, undo: ExitStack) -> None:
        for name, eraser in self._erasers.items():
            if self._low_rank:
                last: Any = eraser.up
                undo.callback(last.register_forward_hook(self._hook(name, eraser)).remove)
            else:
                undo.callback(eraser.register_forward_hook(self._hook(name, eraser)).remove)

    def _hook(self, name: str, eraser: nn.Module) -> Callable[[nn.Module, Any, Tensor], None]:
        def keep(module: nn.Module, args: Any, output: Tensor) -> None:
            if not self._running:
                return
            trained = any(parameter.requires_grad for parameter in eraser.parameters())
            if self._grad_wanted and trained and not output.requires_grad:
                raise RuntimeError(
                    f"the output of eraser {name!r} has no gradient: checkpoint with use_reentrant=False"
                )
            up: Any = module
            self._outputs[name] = LowRankOutput(args[0], up.weight, up.bias) if self._low_rank else output
            self._seen.add(name)

        return keep

    def _why_nothing(self) -> str:
        return (
            "the model was not called, its erasers were disabled, they belong to another model, or it was compiled "
            "before the capture began"
        )


class AttnMapsCapture(_Capture):
    """Fills `attn_maps` with the probabilities with which video tokens attend to text tokens.

        attn_maps = {}
        with AttnMapsCapture(model, attn_maps, token_indices=[3, 4]):
            model(x_t, t, cond)
        mask = get_mask(attn_maps, None, 0.5, height, width)["average_mask"]

    They are the probabilities of the attention that runs, after query and key norms and rotary embedding, over all its
    keys. The attention's output stays the same, bit for bit. Neither queries, keys nor anything with tokens x tokens
    elements is kept. Several calls of the model within one `with` are averaged; recomputation by gradient checkpointing
    does not count. Maps are detached float32, by layer ("transformer_blocks.0.attn1"), and may change while the `with`
    lasts.

    Args:
        model: a supported transformer, or a wrapper of one.
        attn_maps: the mapping to fill. With `token_indices`: (B, N) for N video tokens, summed over the chosen tokens
            and averaged over heads, the form to prefer. Without: (B, heads, N, text tokens), which
            `get_mask(word_indices=...)` reduces later (CogVideoX-2B at 480p: 0.5 GB a layer).
        token_indices: positions in the text, (T,) or (B, T), -1 for none. With classifier-free guidance B is the
            doubled batch, and the unconditional rows can be all -1.

    Raises:
        TypeError: the model is of no supported family, `attn_maps` is no mapping, or `token_indices` not of integers.
        ValueError: `token_indices` is empty; in the forward pass, if it does not fit the batch or the text, or if a
            call's batch or size is not that of the calls before.
        RuntimeError: at the end, if nothing was captured.
    """

    def __init__(
        self,
        model: nn.Module,
        attn_maps: MutableMapping[str, Tensor],
        *,
        token_indices: Tensor | Sequence[int] | Sequence[Sequence[int]] | None = None,
    ) -> None:
        super().__init__(model)
        _check_mapping("attn_maps", attn_maps, MutableMapping)
        self._maps = attn_maps
        self._calls: dict[str, int] = {}
        self._has_warned = False
        self._tokens: Tensor | None = None
        if token_indices is not None:
            self._tokens = integer_tensor("token_indices", token_indices)
            if not self._tokens.numel():
                raise ValueError(f"token_indices: expected at least one position, got {token_indices}")

    def _listen(self, undo: ExitStack) -> None:
        self._calls.clear()
        for name, attention in attentions(self._transformer, self._family.text_attended).items():
            undo.callback(self._wrap(name, attention))

    def _wrap(self, name: str, attention: Any) -> Callable[[], None]:
        """Replaces the instance's forward method: the mode is then left whatever happens in between, unlike by hooks.

        The processor cannot be wrapped instead: diffusers passes it only the arguments that its signature names.
        """
        original, was_own = attention.forward, "forward" in vars(attention)

        def forward(hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *args: Any, **kw: Any) -> Any:
            if not self._running or encoder_hidden_states is None:
                return original(hidden_states, encoder_hidden_states, *args, **kw)
            text_length = encoder_hidden_states.shape[1]
            with Interception(lambda attention: self._keep(name, text_length, attention)):
                return original(hidden_states, encoder_hidden_states, *args, **kw)

        def restore() -> None:
            if was_own:
                attention.forward = original
            else:
                del attention.forward

        attention.forward = forward
        return restore

    def _keep(self, name: str, text_length: int, attention: Attention) -> None:
        # Maps made in inference mode could not be averaged with those of a call outside of it.
        with torch.inference_mode(False), torch.no_grad():
            new = self._map(attention, *self._family.video_and_text(attention.query.shape[2], text_length))
            calls = self._calls[name] = self._calls.get(name, 0) + 1
            if calls > 1:
                had, got = tuple(self._maps[name].shape), tuple(new.shape)
                if had != got:
                    raise ValueError(
                        f"the maps of {name!r} are averaged over calls of one shape: had {had}, got {got}; "
                        "capture each shape apart"
                    )
                # In place: a map with all heads and words may be too large to have twice.
                new = self._maps[name].lerp_(new, 1 / calls)
        self._maps[name] = new
        self._seen.add(name)

    def _map(self, attention: Attention, video: slice, text: slice) -> Tensor:
        if attention.lse is None:
            self._warn_of_another_pass()
        if self._tokens is None:
            return attention.with_lse().part(video, text).probabilities()
        batch, keys = attention.query.shape[0], attention.key.shape[2]
        first, last, _ = text.indices(keys)
        index = token_index_rows(self._tokens, batch, last - first).to(attention.query.device)
        if not attention.masks_keys_only:
            # Masks that are added, or differ by head or query, are beyond what the kernel reads.
            probabilities = attention.with_lse().part(video, text).probabilities().mean(1)
            index = index[:, None].expand(-1, probabilities.shape[1], -1)
            return probabilities.gather(2, index.clamp(min=0)).masked_fill(index < 0, 0).sum(2)
        # A log-sum-exp over all keys leaves only the text's to be read.
        if attention.lse is not None:
            attention = attention.part(video, text)
        else:
            attention = attention.part(video, slice(None))
            index = torch.where((index >= 0) & (index < last - first), index + first, -1)
        return concept_attention(
            attention.query,
            attention.key,
            index,
            scale=attention.scale,
            key_mask=attention.key_mask,
            lse=attention.lse,
        )

    def _warn_of_another_pass(self) -> None:
        if self._has_warned or torch.compiler.is_compiling():
            return
        self._has_warned = True
        warnings.warn(
            "the attention that runs does not give its log-sum-exp (it has a mask on a GPU, dropout, or a backend of "
            "its own): each captured map takes another pass over the keys",
            stacklevel=2,
        )

    def _why_nothing(self) -> str:
        return (
            "the model was not called, it was compiled before the capture began, or its attention processors do not "
            "use torch.nn.functional.scaled_dot_product_attention (choose the native attention backend)"
        )
