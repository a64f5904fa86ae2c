"""Captures of a forward pass: the erasers' outputs, and how much video tokens attend to the concept's words.

Both captures are context managers around calls of the model. They capture only while the model's own forward method
runs: gradient checkpointing runs blocks again in the backward pass, and that must not overwrite what was captured.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from fastunlearn.erasers.adapter import AdapterEraser
from fastunlearn.families import attentions, find_transformer, token_grid
from fastunlearn.functional import LowRankOutput, concept_attention
from fastunlearn.interception import Attention, Interception
from fastunlearn.ops.arguments import integer_tensor, token_index_rows


class _Capture:
    """Base class: knows when the model's forward method runs, and removes all hooks at the end."""

    def __init__(self, model: nn.Module) -> None:
        self._transformer, self._family = find_transformer(model)
        self._undo: ExitStack | None = None
        self._in_forward = False
        self._grad_enabled = False
        self._seen: set[str] = set()

    def _before(self, module: nn.Module, args: Any) -> None:
        self._in_forward = self._undo is not None  # a model that was compiled inside keeps calling this hook
        self._grad_enabled = torch.is_grad_enabled()

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        self._in_forward = False

    def _install_hooks(self, undo: ExitStack) -> None:
        """Installs the hooks, and pushes onto `undo` the callbacks that remove them."""
        raise NotImplementedError

    def _captured_modules(self) -> Mapping[str, nn.Module]:
        """The modules that are captured, by the layers' names."""
        raise NotImplementedError

    def _reasons_for_nothing(self) -> str:
        """The possible reasons why nothing was captured, for the error message."""
        raise NotImplementedError

    def _hidden_layers(self) -> list[str]:
        """The layers of which nothing was captured, and which are in a part of the model that was compiled."""
        compiled = [module for module in self._transformer.modules() if _is_compiled(module)]
        inside = {id(child) for module in compiled for child in module.modules()}
        modules = self._captured_modules().items()
        return [name for name, module in modules if name not in self._seen and id(module) in inside]

    def __enter__(self) -> Any:
        if self._undo is not None:
            raise RuntimeError(f"this {type(self).__name__} is active already")
        self._seen.clear()
        with ExitStack() as undo:
            undo.callback(self._transformer.register_forward_pre_hook(self._before).remove)
            undo.callback(self._transformer.register_forward_hook(self._after, always_call=True).remove)
            self._install_hooks(undo)
            self._undo = undo.pop_all()
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._undo is not None:
            self._undo.close()
        self._undo, self._in_forward = None, False
        if error_type is None and not self._seen:
            raise RuntimeError(f"{type(self).__name__} captured nothing: {self._reasons_for_nothing()}")
        if error_type is None and (hidden := self._hidden_layers()):
            raise RuntimeError(
                f"{type(self).__name__} captured nothing of layers {', '.join(hidden)}: they were compiled before the "
                "capture began"
            )


def _is_compiled(module: nn.Module) -> bool:
    """Whether a module was given to `torch.compile`, is what that returned, or has a forward method that is."""
    wraps = "_orig_mod" in module._modules or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
    return wraps or getattr(module, "_compiled_call_impl", None) is not None


def _check_mapping(name: str, value: object, mapping_type: type) -> None:
    if not isinstance(value, mapping_type):
        raise TypeError(f"{name}: expected a mapping such as a dict, got {type(value).__name__}")


class EraserOutputsCapture(_Capture):
    """Fills `eraser_outputs` with the output of each eraser, for the localization loss.

        eraser_outputs = {}
        with EraserOutputsCapture(model, erasers, eraser_outputs):
            velocity = model(x_t, t, cond)

    Outputs are (B, N, D) by layer, in the dtype that the model computes in, attached to the autograd graph, and before
    the scale of `set_eraser_scale` is applied. The next call of the model replaces them; recomputation by gradient
    checkpointing does not.

    `low_rank=True` is recommended: it captures `LowRankOutput`s, which `localization_loss` takes too. Such an output is
    the input of the eraser's last layer, r instead of D numbers per token (128 instead of 3072 in CogVideoX-5B),
    together with that layer's parameters.

    Args:
        model: the transformer that has the erasers, or a wrapper of it.
        erasers: the erasers to capture, by layer, as `attach_erasers` returned them.
        eraser_outputs: the mapping to fill.
        low_rank: whether to capture low-rank outputs.

    Raises:
        TypeError: the model is of no supported family, or `erasers` or `eraser_outputs` is not a mapping.
        ValueError: `low_rank` is set, and an eraser is neither an AdapterEraser nor ends in a `torch.nn.Linear` called
            `up`.
        RuntimeError: at the end, if nothing was captured, or nothing of layers that were compiled before; in a forward
            pass, if gradient checkpointing is reentrant, because captured outputs then have no gradient, or if
            `low_rank` is set and an eraser is offloaded.
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
            is_low_rank = isinstance(eraser, AdapterEraser) or isinstance(getattr(eraser, "up", None), nn.Linear)
            if low_rank and not is_low_rank:
                raise ValueError(
                    f"erasers[{name!r}]: expected an AdapterEraser, or one that ends in a torch.nn.Linear called up, "
                    f"got {type(eraser).__name__}; capture it with low_rank=False"
                )
        self._erasers = erasers
        self._outputs = eraser_outputs
        self._low_rank = low_rank

    def _install_hooks(self, undo: ExitStack) -> None:
        for name, eraser in self._erasers.items():
            if self._low_rank:
                last: Any = eraser.up
                undo.callback(last.register_forward_hook(self._hook(name, eraser)).remove)
            else:
                undo.callback(eraser.register_forward_hook(self._hook(name, eraser)).remove)

    def _captured_modules(self) -> Mapping[str, nn.Module]:
        return self._erasers

    def _hook(self, name: str, eraser: nn.Module) -> Callable[[nn.Module, Any, Tensor], None]:
        def keep(module: nn.Module, args: Any, output: Tensor) -> None:
            if not self._in_forward:
                return
            trained = any(parameter.requires_grad for parameter in eraser.parameters())
            if self._grad_enabled and trained and not output.requires_grad:
                raise RuntimeError(
                    f"the output of eraser {name!r} has no gradient: checkpoint with use_reentrant=False"
                )
            up: Any = module
            if self._low_rank and up.weight.device.type == "meta":
                raise RuntimeError(
                    f"the weights of eraser {name!r} are offloaded as soon as it has run: capture it with "
                    "low_rank=False, or offload the model before its erasers are attached"
                )
            self._outputs[name] = LowRankOutput(args[0], up.weight, up.bias) if self._low_rank else output
            self._seen.add(name)

        return keep

    def _reasons_for_nothing(self) -> str:
        return (
            "the model was not called, its erasers were disabled, they belong to another model, or it was compiled "
            "before the capture began"
        )


class AttnMapsCapture(_Capture):
    """Fills `attn_maps` with the attention probabilities from video tokens to text tokens.

        attn_maps = {}
        with AttnMapsCapture(model, attn_maps, token_indices=[3, 4]):
            model(x_t, t, cond)
        mask = get_mask(attn_maps, None, 0.5)["average_mask"]

    These are the probabilities of the model's own attention, over all of its keys, after query and key norms and
    rotary embeddings. The attention's output stays the same, bit for bit. Queries and keys are not kept, nor is
    anything of tokens x tokens elements. Maps of several calls of the model within one `with` are averaged;
    recomputation by gradient checkpointing does not count as a call. Maps are float32, detached, by layer
    ("transformer_blocks.0.attn1"), and may change until the `with` ends. From then on each has an attribute
    `token_grid`, the (frames, rows, columns) of its N video tokens, which `get_mask` reads; copies do not have it.

    Args:
        model: a supported transformer, or a wrapper of one.
        attn_maps: the mapping to fill. With `token_indices`, which is recommended: (B, N) for N video tokens, summed
            over the chosen text tokens and averaged over heads. Without: (B, heads, N, text tokens), to be reduced
            later by `get_mask(word_indices=...)` (CogVideoX-2B at 480p: 0.5 GB per layer).
        token_indices: positions in the text, (T,) or (B, T), with -1 for none. With classifier-free guidance B is the
            doubled batch, and the unconditional rows can be all -1.

    Raises:
        TypeError: the model is of no supported family, `attn_maps` is not a mapping, or `token_indices` does not hold
            integers.
        ValueError: `token_indices` is empty; in the forward pass, if it does not fit the batch or the text, or if the
            batch, the size or the token grid of a call differs from that of earlier calls.
        RuntimeError: at the end, if nothing was captured, or nothing of layers that were compiled before.
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
        self._grid: tuple[int, int, int] | None = None
        self._has_warned = False
        self._tokens: Tensor | None = None
        self._token_rows: dict[tuple[Any, ...], Tensor] = {}
        if token_indices is not None:
            self._tokens = integer_tensor("token_indices", token_indices)
            if not self._tokens.numel():
                raise ValueError(f"token_indices: expected at least one position, got {token_indices}")

    def _install_hooks(self, undo: ExitStack) -> None:
        self._calls.clear()
        self._token_rows.clear()
        self._grid = None
        undo.callback(self._transformer.register_forward_pre_hook(self._keep_grid, with_kwargs=True).remove)
        for name, attention in self._captured_modules().items():
            undo.callback(self._wrap(name, attention))

    def _captured_modules(self) -> Mapping[str, nn.Module]:
        return attentions(self._transformer, self._family.text_attended)

    def _keep_grid(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        latents = kwargs.get("hidden_states", args[0] if args else None)
        if not isinstance(latents, Tensor) or latents.dim() != 5:
            return
        grid = token_grid(module, latents.shape[1:])
        if self._grid not in (None, grid):
            raise ValueError(
                f"hidden_states: expected latents of {self._grid} (frames, rows, columns) tokens, as in earlier calls, "
                f"got {grid}; maps are averaged over calls, so capture each size separately"
            )
        self._grid = grid

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(error_type, error, traceback)
        for name in self._seen:
            attn_map: Any = self._maps[name]
            # Where processes share the tokens of a sample, a map has a part of the grid.
            if self._grid is not None and attn_map.shape[1 if attn_map.dim() == 2 else 2] == math.prod(self._grid):
                attn_map.token_grid = self._grid

    def _wrap(self, name: str, attention: Any) -> Callable[[], None]:
        """Replaces the forward method of one attention, and returns what restores it.

        The method is wrapped, not hooked, so that the interception ends even if the attention raises. Wrapping the
        attention processor would not work: diffusers passes a processor only the arguments that its signature names.
        """
        original, has_own_forward = attention.forward, "forward" in vars(attention)

        def forward(hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *args: Any, **kw: Any) -> Any:
            if not self._in_forward or encoder_hidden_states is None:
                return original(hidden_states, encoder_hidden_states, *args, **kw)
            text_length = encoder_hidden_states.shape[1]
            with Interception(lambda attention: self._keep(name, text_length, attention)):
                return original(hidden_states, encoder_hidden_states, *args, **kw)

        def restore() -> None:
            if has_own_forward:
                attention.forward = original
            else:
                del attention.forward

        attention.forward = forward
        return restore

    def _keep(self, name: str, text_length: int, attention: Attention) -> None:
        # A tensor made in inference mode could not be averaged in place with one made outside.
        with torch.inference_mode(False), torch.no_grad():
            new = self._map(attention, *self._family.video_and_text(attention.query.shape[2], text_length))
            calls = self._calls[name] = self._calls.get(name, 0) + 1
            if calls > 1:
                expected, got = tuple(self._maps[name].shape), tuple(new.shape)
                if expected != got:
                    raise ValueError(
                        f"attn_maps[{name!r}]: expected shape {expected}, as in earlier calls, got {got}; maps are "
                        "averaged over calls, so capture each shape separately"
                    )
                # In place: there may not be memory for two copies of a map with all heads and words.
                new = self._maps[name].lerp_(new, 1 / calls)
        self._maps[name] = new
        self._seen.add(name)

    def _map(self, attention: Attention, video: slice, text: slice) -> Tensor:
        """The map of one attention, in the form that `attn_maps` documents."""
        if attention.lse is None:
            self._warn_of_extra_pass()
        if self._tokens is None:
            return attention.with_lse().part(video, text).probabilities()
        if not attention.masks_keys_only:
            # The kernel takes no masks that are added to the logits, or that differ between heads or queries.
            probabilities = attention.with_lse().part(video, text).probabilities().mean(1)
            index = self._rows_of_tokens(attention, text, 0)[:, None].expand(-1, probabilities.shape[1], -1)
            return probabilities.gather(2, index.clamp(min=0)).masked_fill(index < 0, 0).sum(2)
        # With the log-sum-exp known, only the keys of the text have to be read.
        if attention.lse is not None:
            index = self._rows_of_tokens(attention, text, 0)
            attention = attention.part(video, text)
        else:
            index = self._rows_of_tokens(attention, text, text.indices(attention.key.shape[2])[0])
            attention = attention.part(video, slice(None))
        return concept_attention(
            attention.query,
            attention.key,
            index,
            scale=attention.scale,
            key_mask=attention.key_mask,
            lse=attention.lse,
        )

    def _rows_of_tokens(self, attention: Attention, text: slice, shift: int) -> Tensor:
        """The indices of the chosen text tokens plus `shift`, (B, T), -1 for none.

        They are checked and copied to the device once: a copy at every call would make the host wait for the device.
        """
        assert self._tokens is not None
        first, last, _ = text.indices(attention.key.shape[2])
        batch, device = attention.query.shape[0], attention.query.device
        key = (batch, last - first, shift, device)
        rows = None if torch.compiler.is_compiling() else self._token_rows.get(key)
        if rows is None:
            rows = token_index_rows(self._tokens, batch, last - first)
            rows = torch.where((rows >= 0) & (rows < last - first), rows + shift, -1).to(device)
            if not torch.compiler.is_compiling():
                self._token_rows[key] = rows
        return rows

    def _warn_of_extra_pass(self) -> None:
        if self._has_warned or torch.compiler.is_compiling():
            return
        self._has_warned = True
        warnings.warn(
            "the attention does not return its log-sum-exp (it has a mask on a GPU, dropout, an unknown backend, or "
            "another capture around this one): each captured map costs another pass over the keys",
            stacklevel=2,
        )

    def _reasons_for_nothing(self) -> str:
        return (
            "the model was not called, it was compiled before the capture began, or its attention processors do not "
            "use torch.nn.functional.scaled_dot_product_attention (choose the native attention backend)"
        )
